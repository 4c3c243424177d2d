// Words of memory that several threads use: read and written as a whole, and waited for.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <iterator>

struct uint4 {
  uint32_t x, y, z, w;
};

namespace emulation {

// 16 bytes in one access, as .b128 is: nobody sees a part of them. So do it processors that have AVX,
// where the address is a multiple of 16; others do not know the instruction.
using Vector = int32_t __attribute__((vector_size(16)));
inline uint4 load_whole(const uint4* from) {
  Vector bits;
  asm volatile("vmovdqa %1, %0" : "=x"(bits) : "m"(*reinterpret_cast<const Vector*>(from)) : "memory");
  uint4 value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void store_whole(uint4* to, const uint4& value) {
  Vector bits;
  std::memcpy(&bits, &value, sizeof bits);
  asm volatile("vmovdqa %1, %0" : "=m"(*reinterpret_cast<Vector*>(to)) : "x"(bits) : "memory");
}

// The control: whether such words are written in two halves.
extern std::atomic<bool> tears_words;

// Reads a word that others write.
template <typename T>
T load(const T* word) {
  if constexpr (sizeof(T) == 16) {
    return load_whole(word);
  } else {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
  }
}

using Bits = unsigned __int128;

// A word of memory, and what was seen there.
struct Look {
  const void* word = nullptr;
  uint32_t bytes = 0;
  Bits seen = 0;

  template <typename T>
  Look(const T* from, const T& value) : word(from), bytes(sizeof(T)) {
    std::memcpy(&seen, &value, sizeof(T));
  }
  Look() = default;

  bool is_same() const {
    if (bytes == 4) return load(static_cast<const uint32_t*>(word)) == seen;
    if (bytes == 8) return load(static_cast<const uint64_t*>(word)) == seen;
    const uint4 now = load(static_cast<const uint4*>(word));
    return std::memcmp(&now, &seen, sizeof now) == 0;
  }
};

// The words that a thread has looked at, and in which it may be waiting for something new: several,
// where it takes what comes first.
struct Looks {
  static constexpr int kMost = 8;
  static constexpr int kSpins = 3;         // of each word, before it is left alone
  static constexpr int kSpinsOfTurn = 16;  // kernels count their looks, to check now and then
  Look words[kMost];
  int count = 0;
  int in_vain = 0;  // looks that found what had been there
  bool has_waited = false;

  const Look* end() const { return words + count; }
  bool are_same() const {
    return std::all_of(words, end(), [](const Look& look) { return look.is_same(); });
  }
  void begin(const Look& look, bool after_wait) {
    words[0] = look;
    count = 1;
    in_vain = 0;
    has_waited = after_wait;
  }
  // Called where the thread meets others: what they look at, it waits for too. So it goes on, but where
  // all look at one word.
  void meet() {
    if (count > 1) count = in_vain = 0;
  }
  // True where there is nothing to be seen until a word changes.
  bool is_in_vain(const Look& look) {
    const Look* const known =
        std::find_if(std::cbegin(words), end(), [&](const Look& each) { return each.word == look.word; });
    if (known == end() && count < kMost) {
      words[count++] = look;
    } else if (known == end() || known->seen != look.seen) {
      begin(look, false);
    } else {
      return ++in_vain >= (has_waited ? kSpinsOfTurn : kSpins * count);
    }
    return false;
  }
};

}  // namespace emulation
