// Adding up rows: teams of warps that stream lists of rows through shared memory.
//
// A block has several teams, each on its own, so that one has loads in flight while another changes
// from one list to the next. In a team
//   columns  are threads that each add up 16 bytes of every row (or several times 16 of long rows).
//            Each loads ahead what it will add itself, so nobody waits for anybody within a list.
//   the lister, one warp more, writes the next list meanwhile, waits for what that takes, and raises
//            the flags of the list before.
// They meet once a list, at the team's barrier.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "ptx.cuh"

namespace ep {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxTeamThreads = 1024;  // of all teams of a block
constexpr int kMaxColumns = 448;
constexpr int kMaxTeams = 8;
constexpr int kStages = 8;  // 16-byte loads of a column in flight
constexpr int kMaxTeamShared = 226 * 1024;  // the kernel has a little of its own

// 16 bytes of a row as FP32 numbers.
template <typename T>
struct Vector;

template <>
struct Vector<__nv_bfloat16> {
  float value[8];
  __device__ void assign(const uint4& bits) { unpack(bits, value); }
  __device__ void add(const uint4& bits) {
    float other[8];
    unpack(bits, other);
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] += other[i];
  }
  __device__ uint4 rounded() const {
    uint4 bits;
    auto* const pairs = reinterpret_cast<__nv_bfloat162*>(&bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(value[2 * i], value[2 * i + 1]);
    return bits;
  }
  __device__ static void unpack(const uint4& bits, float* out) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
};

template <>
struct Vector<float> {
  float value[4];
  __device__ void assign(const uint4& bits) {
    value[0] = __uint_as_float(bits.x);
    value[1] = __uint_as_float(bits.y);
    value[2] = __uint_as_float(bits.z);
    value[3] = __uint_as_float(bits.w);
  }
  __device__ void add(const uint4& bits) {
    value[0] += __uint_as_float(bits.x);
    value[1] += __uint_as_float(bits.y);
    value[2] += __uint_as_float(bits.z);
    value[3] += __uint_as_float(bits.w);
  }
  __device__ uint4 rounded() const {
    return make_uint4(__float_as_uint(value[0]), __float_as_uint(value[1]),
                      __float_as_uint(value[2]), __float_as_uint(value[3]));
  }
};

// A row of a list. Sums are nested: rows make up a sum of level 0; the rounded sums of a level make up
// one of the next; the highest level's is written. A sum starts from its first number, not from zero,
// so that -0 survives.
struct ListedRow {
  int32_t index;  // of the row in its array
  uint32_t what;  // the bits below, and the output row above them

  static constexpr uint32_t kStaged = 1u << 6;  // stands in the second array
  static constexpr uint32_t kNone = 1u << 7;    // there is no row: zeros
  static constexpr int kOutShift = 8;
  __host__ __device__ static constexpr uint32_t first_of(int level) { return 1u << 2 * level; }
  __host__ __device__ static constexpr uint32_t last_of(int level) { return 2u << 2 * level; }
};

// What a team is given at a barrier.
struct List {
  uint4* out;        // output row 0 of the list
  int32_t num_rows;  // negative: there are no more lists
};
constexpr int kListBytes = 16;
static_assert(sizeof(List) == kListBytes && sizeof(ListedRow) == 8);

// The teams of a block, and how its shared memory is cut up.
struct Teams {
  int32_t columns;  // threads that add
  int32_t num_teams;
  int32_t list_rows;  // at most, of a list

  static Teams of_rows(int32_t row_bytes, int32_t list_rows) {
    const int32_t vectors = row_bytes / 16;
    const int32_t passes = (vectors + kMaxColumns - 1) / kMaxColumns;
    Teams teams;
    teams.columns = ((vectors + passes - 1) / passes + kWarpSize - 1) / kWarpSize * kWarpSize;
    teams.num_teams = std::min(kMaxTeams, kMaxTeamThreads / teams.team_threads());
    teams.list_rows = list_rows;
    return teams;
  }
  __host__ __device__ int32_t team_threads() const { return columns + kWarpSize; }
  __host__ __device__ int32_t block_threads() const { return num_teams * team_threads(); }
  __host__ __device__ int32_t ring_bytes() const { return kStages * columns * 16; }
  __host__ __device__ int32_t team_bytes() const {
    return ring_bytes() + 2 * (list_rows * static_cast<int32_t>(sizeof(ListedRow)) + kListBytes);
  }
  __host__ __device__ int32_t shared_bytes() const { return num_teams * team_bytes(); }
};

// The calling thread's team.
class Team {
 public:
  __device__ Team(uint8_t* shared, const Teams& teams)
      : teams_(teams), team_(threadIdx.x / teams.team_threads()) {
    uint8_t* const mine = shared + team_ * teams.team_bytes();
    ring_ = reinterpret_cast<uint4*>(mine);
    lists_ = reinterpret_cast<List*>(mine + teams.ring_bytes());
    rows_ = reinterpret_cast<ListedRow*>(lists_ + 2);
  }

  // Of all teams in the grid; neighbours are in different blocks.
  __device__ int32_t index() const { return team_ * gridDim.x + blockIdx.x; }
  __device__ bool is_lister() const { return column() >= teams_.columns; }

  // For the lister: the rows of list number `list`, counted from 0.
  __device__ ListedRow* rows(int32_t list) const { return rows_ + (list & 1) * teams_.list_rows; }

  // For the lister: the columns have finished the list before, and go on with this one.
  __device__ void hand_over(int32_t list, uint4* out, int32_t num_rows) const {
    if (threadIdx.x % kWarpSize == 0) lists_[list & 1] = List{out, num_rows};
    __syncwarp();
    meet();
  }

  // For the columns: adds up the rows of all lists. Rows have `vectors` times 16 bytes and stand in
  // `rows` or in `staged`.
  template <typename T, int kLevels>
  __device__ void add_up(const uint4* rows, const uint4* staged, int32_t vectors) const {
    for (int32_t number = 0;; ++number) {
      meet();
      const List list = lists_[number & 1];
      if (list.num_rows < 0) return;
      add_up_list<T, kLevels>(list, rows_ + (number & 1) * teams_.list_rows, rows, staged, vectors);
    }
  }

 private:
  __device__ int32_t column() const { return threadIdx.x - team_ * teams_.team_threads(); }
  __device__ void meet() const { ptx::named_barrier(team_ + 1, teams_.team_threads()); }

  template <typename T, int kLevels>
  __device__ void add_up_list(const List& list, const ListedRow* listed, const uint4* rows,
                              const uint4* staged, int32_t vectors) const {
    uint4* const ring = ring_ + column();
    const int32_t columns = teams_.columns;
    // What is loaded next; every turn commits a group, so that they can be counted.
    int32_t next = 0, next_column = column();
    const auto load = [&](int32_t stage) {
      if (next_column < vectors) {
        const ListedRow row = listed[next];
        if (!(row.what & ListedRow::kNone)) {
          const uint4* const array = row.what & ListedRow::kStaged ? staged : rows;
          ptx::async_load(ring + stage * columns,
                          array + static_cast<int64_t>(row.index) * vectors + next_column);
        }
        if (++next == list.num_rows) {
          next = 0;
          next_column += columns;
        }
      }
      ptx::async_commit();
    };
    for (int32_t stage = 0; stage < kStages - 1; ++stage) load(stage);
    int32_t stage = 0;
    Vector<T> sums[kLevels];
    for (int32_t at = column(); at < vectors; at += columns) {
      for (int32_t i = 0; i < list.num_rows; ++i) {
        load((stage + kStages - 1) % kStages);
        ptx::async_wait<kStages - 1>();
        const uint32_t what = listed[i].what;
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (!(what & ListedRow::kNone)) bits = ring[stage * columns];
        stage = (stage + 1) % kStages;
#pragma unroll
        for (int level = 0; level < kLevels; ++level) {
          if (what & ListedRow::first_of(level)) {
            sums[level].assign(bits);
          } else {
            sums[level].add(bits);
          }
          if (!(what & ListedRow::last_of(level))) break;
          bits = sums[level].rounded();
          if (level == kLevels - 1) {
            list.out[static_cast<int64_t>(what >> ListedRow::kOutShift) * vectors + at] = bits;
          }
        }
      }
    }
  }

  Teams teams_;
  int32_t team_;
  uint4* ring_;      // [kStages, columns]
  List* lists_;      // [2]
  ListedRow* rows_;  // [2, list_rows]
};

}  // namespace ep
