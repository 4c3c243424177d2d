// Adding up rows: teams of warps that stream lists of rows through their registers.
//
// A block has several teams, which do not wait for one another: one has loads in flight while
// another changes from one list to the next. In a team
//   columns     are threads that each add up some 16-byte vectors of every row. Each loads ahead
//               what it will add itself, so nobody waits for anybody within a list.
//   the lister  is one warp more, the producer where warps are specialised. Meanwhile it writes the
//               next list, waits for the rows on it, and raises the flags of the list before.
// They meet once a list, at the team's barrier.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/ptx.cuh"
#include "common/vectors.cuh"
#include "common/warp.cuh"

namespace ep {

// All teams of a block together: each thread may have 128 registers, and an SM has room for one
// block.
constexpr int kMaxTeamThreads = 512;
constexpr int kMaxColumns = 224;
constexpr int kWide = 4;      // 16-byte vectors of a row that a column takes at a time
constexpr int kMaxAhead = 4;  // rows of which a column has loads in flight
constexpr int kMaxTeams = 8;
constexpr int kMaxTeamShared = 226 * 1024;

// 16 bytes of a row as FP32 numbers.
template <typename T>
struct Vector {
  float value[kPerVector<T>];
  __device__ void assign(const uint4& bits) { unpack<T>(bits, value); }
  __device__ void add(const uint4& bits) {
    float other[kPerVector<T>];
    unpack<T>(bits, other);
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) value[i] += other[i];
  }
  __device__ uint4 rounded() const { return pack<T>(value); }
};

// A sum of a column's vectors.
template <typename T>
struct Sum {
  Vector<T> vectors[kWide];
  // Adds `bits`, or begins with them.
  __device__ void add(const uint4 (&bits)[kWide], bool is_first) {
    if (is_first) {
#pragma unroll
      for (int w = 0; w < kWide; ++w) vectors[w].assign(bits[w]);
    } else {
#pragma unroll
      for (int w = 0; w < kWide; ++w) vectors[w].add(bits[w]);
    }
  }
  __device__ void round(uint4 (&bits)[kWide]) const {
#pragma unroll
    for (int w = 0; w < kWide; ++w) bits[w] = vectors[w].rounded();
  }
};

// A row of a list, and what is done before and after it is added. A sum starts from its first row,
// not from zero, so that -0 survives.
struct ListedRow {
  const uint4* row;
  uint32_t what;  // the bits below, and the output row above them

  static constexpr uint32_t kFirst = 1u << 0;    // a sum begins
  static constexpr uint32_t kRound = 1u << 1;    // the sum so far is rounded
  static constexpr uint32_t kKeep = 1u << 2;     // the sum is complete, is rounded and kept
  static constexpr uint32_t kAddKept = 1u << 3;  // the one that was kept last is added
  static constexpr uint32_t kLast = 1u << 4;     // the sum is complete, is rounded and written
  // Where there are several nodes: a node's sum is complete, is rounded, and is added to the sum
  // over the nodes before it.
  static constexpr uint32_t kLastOfNode = 1u << 5;
  static constexpr uint32_t kFirstNode = 1u << 6;
  // After one of these there is more to do than to add the next row.
  static constexpr uint32_t kAfter = kRound | kKeep | kAddKept | kLast | kLastOfNode;
  static constexpr int kOutShift = 7;
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
  int32_t list_rows;  // most rows of a list

  static Teams of_rows(int32_t row_bytes, int32_t list_rows) {
    const int32_t vectors = row_bytes / 16;
    const int32_t passes = ceil_div(vectors, kWide * kMaxColumns);
    Teams teams;
    teams.columns = round_up(ceil_div(vectors, kWide * passes), kWarpSize);
    teams.list_rows = list_rows;
    teams.num_teams = std::min(
        {kMaxTeams, kMaxTeamThreads / teams.team_threads(), kMaxTeamShared / teams.team_bytes()});
    return teams;
  }
  __host__ __device__ int32_t team_threads() const { return columns + kWarpSize; }
  __host__ __device__ int32_t block_threads() const { return num_teams * team_threads(); }
  __host__ __device__ int32_t kept_bytes() const { return kWide * columns * 16; }
  // Rows from one list to the next: beyond its end rows are loaded that are not used.
  __host__ __device__ int32_t list_stride() const { return list_rows + kMaxAhead; }
  __host__ __device__ int32_t team_bytes() const {
    return kept_bytes() + 2 * (list_stride() * static_cast<int32_t>(kListedRowBytes) + kListBytes);
  }
  __host__ __device__ int32_t shared_bytes() const { return num_teams * team_bytes(); }
};

// The calling thread's team.
class Team {
 public:
  __device__ Team(uint8_t* shared, const Teams& teams)
      : teams_(teams), team_(threadIdx.x / teams.team_threads()) {
    uint8_t* const mine = shared + team_ * teams.team_bytes();
    kept_ = reinterpret_cast<uint4*>(mine) + first_vector();
    lists_ = reinterpret_cast<List*>(mine + teams.kept_bytes());
    rows_ = reinterpret_cast<ListedRow*>(lists_ + 2);
  }

  // The team's number in the grid. Neighbours are in different blocks.
  __device__ int32_t index() const { return team_ * gridDim.x + blockIdx.x; }
  __device__ bool is_lister() const { return column() >= teams_.columns; }

  // The rows of the next list.
  __device__ ListedRow* rows() const { return rows_ + (number_ & 1) * teams_.list_stride(); }

  // For the lister: the columns have finished the list before, and go on with this one.
  __device__ void hand_over(uint4* out, int32_t num_rows) {
    if (lane_id() == 0) lists_[number_ & 1] = List{out, num_rows};
    meet();
    ++number_;
  }

  // For the lister: the columns return from add_up.
  __device__ void finish() { hand_over(nullptr, -1); }

  // For the columns: adds up the rows of all lists, of `vectors` times 16 bytes each.
  template <typename T, bool kOneNode>
  __device__ void add_up(int32_t vectors) {
    while (true) {
      meet();
      const List list = lists_[number_ & 1];
      const ListedRow* const listed = rows();
      ++number_;
      if (list.num_rows < 0) return;
      for (int32_t first = first_vector(); first < vectors; first += kWide * teams_.columns) {
        add_up_list<T, kOneNode>(list, listed, first, vectors);
      }
    }
  }

 private:
  __device__ int32_t column() const { return threadIdx.x - team_ * teams_.team_threads(); }
  // The first vector of this column. A warp has kWide times 32 neighbouring ones.
  __device__ int32_t first_vector() const {
    return column() / kWarpSize * (kWide * kWarpSize) + lane_id();
  }
  __device__ void meet() const {
    __syncwarp();  // the barrier takes whole warps, and the last columns may be ahead of theirs
    ptx::named_barrier(team_ + 1, teams_.team_threads());
  }

  // Vector `first` of the list's rows, and every 32nd one after it.
  template <typename T, bool kOneNode>
  __device__ void add_up_list(const List& list, const ListedRow* listed, int32_t first,
                              int32_t vectors) const {
    constexpr int kAhead = kOneNode ? kMaxAhead : 2;  // the nodes' sums need registers
    const int32_t room = vectors - first;
    uint32_t next = ptx::shared_address(listed), at = next;
    const uint32_t end = next + list.num_rows * kListedRowBytes;
    // No branch here: after one the compiler waits for all loads that are in flight.
    const auto load = [&](uint4(&bits)[kWide]) {
      const uint64_t address = ptx::load_shared_u64(next + offsetof(ListedRow, row));
      const uint4* const row = reinterpret_cast<const uint4*>(address) + first;
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        ptx::load_global_if(next < end && w * kWarpSize < room, &bits[w], row + w * kWarpSize);
      }
      next += kListedRowBytes;
    };
    Sum<T> sum, of_nodes;
    const auto add = [&](uint32_t what, uint4(&bits)[kWide]) {
      sum.add(bits, what & ListedRow::kFirst);
      if (!(what & ListedRow::kAfter)) return;
      if (what & ListedRow::kAddKept) {
#pragma unroll
        for (int w = 0; w < kWide; ++w) sum.vectors[w].add(kept_[w * kWarpSize]);
        // With one node it comes with kLast.
        if (!(what & ListedRow::kLastOfNode)) return;
      }
      sum.round(bits);
      if (what & ListedRow::kRound) {
        sum.add(bits, true);
        return;
      }
      if (what & ListedRow::kKeep) {
#pragma unroll
        for (int w = 0; w < kWide; ++w) kept_[w * kWarpSize] = bits[w];
        return;
      }
      if (!kOneNode && what & ListedRow::kLastOfNode) {
        of_nodes.add(bits, what & ListedRow::kFirstNode);
        if (!(what & ListedRow::kLast)) return;
        of_nodes.round(bits);
      }
      uint4* const out =
          list.out + static_cast<int64_t>(what >> ListedRow::kOutShift) * vectors + first;
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        if (w * kWarpSize < room) ptx::store_global(out + w * kWarpSize, bits[w]);
      }
    };
    uint4 ahead[kAhead][kWide];
#pragma unroll
    for (auto& bits : ahead) load(bits);
    while (at < end) {
#pragma unroll
      for (auto& bits : ahead) {
        if (at >= end) break;
        const uint32_t what = ptx::load_shared_u32(at + offsetof(ListedRow, what));
        at += kListedRowBytes;
        add(what, bits);
        load(bits);
      }
    }
  }

  Teams teams_;
  int32_t team_;
  int32_t number_ = 0;  // of the next list: two are in memory by turns
  uint4* kept_;         // [kWide, columns], from this column's first one on
  List* lists_;         // [2]
  ListedRow* rows_;     // [2, list_stride()]
};

}  // namespace ep
