// Adding up rows: teams of warps that stream lists of rows through shared memory.
//
// A block has several teams, each on its own, so that one has loads in flight while another changes
// from one list to the next. In a team
//   columns  are threads that each add up twice 16 bytes of every row (and more of long rows). Each
//            loads ahead what it will add itself, so nobody waits for anybody within a list.
//   the lister, one warp more, writes the next list meanwhile, waits for what that takes, and raises
//            the flags of the list before.
// They meet once a list, at the team's barrier.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ptx.cuh"
#include "warp.cuh"

namespace ep {

constexpr int kMaxTeamThreads = 1024;  // of all teams of a block
constexpr int kMaxColumns = 448;
constexpr int kWide = 2;    // 16-byte vectors of a row that a column takes at a time
constexpr int kStages = 4;  // rows of which a column has loads in flight, and the one it adds
constexpr int kMaxTeams = 8;
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
  const uint4* row;
  uint32_t what;  // the bits below, and the output row above them

  static constexpr uint32_t kNone = 1u << 6;  // zeros, a sum of level 0 of their own
  static constexpr int kOutShift = 7;
  __host__ __device__ static constexpr uint32_t first_of(int level) { return 1u << 2 * level; }
  __host__ __device__ static constexpr uint32_t last_of(int level) { return 2u << 2 * level; }
  // Of one that was read as it stands in memory; `what` is the third word.
  __device__ static const uint4* row_of(const uint4& entry) {
    return reinterpret_cast<const uint4*>(uint64_t{entry.y} << 32 | entry.x);
  }
};
constexpr uint32_t kListedRowBytes = 16;

// What a team is given at a barrier.
struct List {
  uint4* out;        // output row 0 of the list
  int32_t num_rows;  // negative: there are no more lists
};
constexpr int kListBytes = 16;
static_assert(sizeof(List) == kListBytes && sizeof(ListedRow) == kListedRowBytes);

// The teams of a block, and how its shared memory is cut up.
struct Teams {
  int32_t columns;  // threads that add
  int32_t num_teams;
  int32_t list_rows;  // at most, of a list

  static Teams of_rows(int32_t row_bytes, int32_t list_rows) {
    const int32_t vectors = row_bytes / 16;
    const int32_t passes = (vectors + kWide * kMaxColumns - 1) / (kWide * kMaxColumns);
    const int32_t wanted = (vectors + kWide * passes - 1) / (kWide * passes);
    Teams teams;
    teams.columns = (wanted + kWarpSize - 1) / kWarpSize * kWarpSize;
    teams.list_rows = list_rows;
    teams.num_teams = std::min({kMaxTeams, kMaxTeamThreads / teams.team_threads(),
                                kMaxTeamShared / teams.team_bytes()});
    return teams;
  }
  __host__ __device__ int32_t team_threads() const { return columns + kWarpSize; }
  __host__ __device__ int32_t block_threads() const { return num_teams * team_threads(); }
  __host__ __device__ int32_t ring_bytes() const { return kStages * kWide * columns * 16; }
  __host__ __device__ int32_t team_bytes() const {
    return ring_bytes() + 2 * (list_rows * static_cast<int32_t>(kListedRowBytes) + kListBytes);
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

  // The rows of the next list.
  __device__ ListedRow* rows() const { return rows_ + (number_ & 1) * teams_.list_rows; }

  // For the lister: the columns have finished the list before, and go on with this one.
  __device__ void hand_over(uint4* out, int32_t num_rows) {
    if (lane_id() == 0) lists_[number_ & 1] = List{out, num_rows};
    meet();
    ++number_;
  }

  // For the lister: the columns return from add_up.
  __device__ void finish() { hand_over(nullptr, -1); }

  // For the columns: adds up the rows of all lists, of `vectors` times 16 bytes each.
  template <typename T, int kLevels>
  __device__ void add_up(int32_t vectors) {
    while (true) {
      meet();
      const List list = lists_[number_ & 1];
      const ListedRow* const listed = rows();
      ++number_;
      if (list.num_rows < 0) return;
      for (int32_t first = column(); first < vectors; first += kWide * teams_.columns) {
        add_up_list<T, kLevels>(list, listed, first, vectors);
      }
    }
  }

 private:
  __device__ int32_t column() const { return threadIdx.x - team_ * teams_.team_threads(); }
  __device__ void meet() const {
    __syncwarp();  // the barrier takes whole warps, and the last columns may be ahead of theirs
    ptx::named_barrier(team_ + 1, teams_.team_threads());
  }

  // Vector `first` of the list's rows and the column's next one. What limits an SM here is the number
  // of instructions: so addresses are carried along, and a column that has no next vector takes its
  // only one twice.
  template <typename T, int kLevels>
  __device__ void add_up_list(const List& list, const ListedRow* listed, int32_t first,
                              int32_t vectors) const {
    static_assert(kWide == 2, "first and second");
    const int32_t second = first + teams_.columns < vectors ? teams_.columns : 0;
    const uint32_t step_bytes = teams_.columns * 16;
    const uint32_t ring = ptx::shared_address(ring_ + column());
    const uint32_t ring_end = ring + kStages * kWide * step_bytes;
    uint32_t ahead = ptx::shared_address(listed);
    const uint32_t listed_end = ahead + list.num_rows * kListedRowBytes;
    // Every turn commits a group, empty or not, so that they can be counted.
    const auto load = [&](uint32_t stage) {
      if (ahead < listed_end) {
        const uint4 entry = ptx::load_shared(ahead);
        if (!(entry.z & ListedRow::kNone)) {
          const uint4* const row = ListedRow::row_of(entry) + first;
          ptx::async_load(stage, row);
          ptx::async_load(stage + step_bytes, row + second);
        }
      }
      ahead += kListedRowBytes;
      ptx::async_commit();
    };
    for (int i = 0; i < kStages - 1; ++i) load(ring + i * kWide * step_bytes);
    Vector<T> sums[kLevels][kWide];
    uint32_t stage = ring, free_stage = ring_end - kWide * step_bytes;
    for (uint32_t at = ptx::shared_address(listed); at < listed_end; at += kListedRowBytes) {
      load(free_stage);
      ptx::async_wait<kStages - 1>();
      const uint32_t what = ptx::load_shared_u32(at + offsetof(ListedRow, what));
      uint4 bits[kWide];
#pragma unroll
      for (int w = 0; w < kWide; ++w) bits[w] = ptx::load_shared(stage + w * step_bytes);
      free_stage = stage;
      stage += kWide * step_bytes;
      if (stage == ring_end) stage = ring;
#pragma unroll
      for (int level = 0; level < kLevels; ++level) {
        if (what & ListedRow::first_of(level)) {
          if (level == 0 && what & ListedRow::kNone) {
#pragma unroll
            for (int w = 0; w < kWide; ++w) bits[w] = make_uint4(0, 0, 0, 0);
          }
#pragma unroll
          for (int w = 0; w < kWide; ++w) sums[level][w].assign(bits[w]);
        } else {
#pragma unroll
          for (int w = 0; w < kWide; ++w) sums[level][w].add(bits[w]);
        }
        if (!(what & ListedRow::last_of(level))) break;
#pragma unroll
        for (int w = 0; w < kWide; ++w) bits[w] = sums[level][w].rounded();
        if (level < kLevels - 1) continue;
        uint4* const out =
            list.out + static_cast<int64_t>(what >> ListedRow::kOutShift) * vectors + first;
        ptx::store_global(out, bits[0]);
        ptx::store_global(out + second, bits[1]);
      }
    }
  }

  Teams teams_;
  int32_t team_;
  int32_t number_ = 0;  // of the next list: two are in memory by turns
  uint4* ring_;      // [kStages, kWide, columns]
  List* lists_;      // [2]
  ListedRow* rows_;  // [2, list_rows]
};

}  // namespace ep
