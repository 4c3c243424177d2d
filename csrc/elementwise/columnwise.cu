// Column-wise copies of FP8 rows that arrived, for weight gradients: every expert's in one launch.
//
// A row has a scale every 128 columns, a weight gradient's GEMM reads columns with a scale every
// 128 rows, transposed. Transformer Engine would dequantise the rows and quantise them again, an
// expert at a time. Here a block takes a tile of 128 rows by 128 columns through its registers: the
// bits are the same, and each byte is read and written once.

#include "common/launch.cuh"
#include "common/vectors.cuh"
#include "common/warp.cuh"
#include "elementwise/blocks.cuh"
#include "ep_comm.h"

namespace {

constexpr int kTile = ep::kScaleBlock;  // rows and columns
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * ep::kWarpSize;
constexpr int kPerWarp = kTile / kWarps;         // rows: a vector of each column
constexpr int kPerLane = kTile / ep::kWarpSize;  // columns
constexpr int kVectors = kTile / kPerWarp;       // of a column
static_assert(kPerWarp == sizeof(uint4) && kPerLane == sizeof(uint32_t), "a lane's share");

struct Tile {
  int64_t group_begin;  // its expert's first row
  int32_t group_rows;   // and how many that has
  int32_t first_row;    // the tile's, in the group
};

// Finds tile number `index` among those of all experts, by whole warps. False where there is none.
__device__ inline bool find_tile(const ep_columnwise_args& args, int32_t index, Tile* tile) {
  int32_t before = 0;
  for (int32_t first = 0; first < args.num_experts; first += ep::kWarpSize) {
    const int32_t expert = first + ep::lane_id();
    int32_t begin = 0, rows = 0;
    if (expert < args.num_experts) {
      begin = args.expert_offsets[expert];
      rows = args.expert_offsets[expert + 1] - begin;
    }
    const int32_t tiles = ep::ceil_div(rows, kTile);
    int32_t total;
    const int32_t mine = before + ep::sum_before(tiles, &total);
    const unsigned found = __ballot_sync(ep::kFullWarp, mine <= index && index < mine + tiles);
    if (found != 0) {
      const int32_t lane = __ffs(static_cast<int>(found)) - 1;
      tile->group_begin = __shfl_sync(ep::kFullWarp, begin, lane);
      tile->group_rows = __shfl_sync(ep::kFullWarp, rows, lane);
      tile->first_row = (index - __shfl_sync(ep::kFullWarp, mine, lane)) * kTile;
      return true;
    }
    before += total;
  }
  return false;
}

// The four columns of a lane in a row: their values, as BF16 has them.
__device__ inline void dequantise(uint32_t bytes, float scale, float* values) {
#pragma unroll
  for (int c = 0; c < kPerLane; c += 2) {
    const float2 pair = ep::unpack_fp8_pair(static_cast<uint16_t>(bytes >> (8 * c)));
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(pair.x * scale, pair.y * scale);
    values[c] = __low2float(rounded);
    values[c + 1] = __high2float(rounded);
  }
}

__global__ void __launch_bounds__(kThreads)
    columnwise_kernel(const __grid_constant__ ep_columnwise_args args) {
  __shared__ float amaxes[kWarps][kTile];
  // Vectors of a column stand in another order in each group of four columns, so that neither side
  // has lanes that wait for each other's banks.
  __shared__ uint4 columns[kTile][kVectors];
  Tile tile;
  const auto blocks = static_cast<uint32_t>(args.hidden / kTile);  // of columns
  const auto tile_index = static_cast<int32_t>(blockIdx.x / blocks);
  const auto block = static_cast<int32_t>(blockIdx.x % blocks);
  if (!find_tile(args, tile_index, &tile)) return;  // the host counted more; for the whole block

  const int32_t warp = threadIdx.x / ep::kWarpSize, lane = ep::lane_id();
  const int64_t hidden = args.hidden;
  const int64_t first_row = tile.first_row + warp * kPerWarp;
  // Groups are whole vectors of rows, so a warp has all of its rows or none.
  const bool inside = first_row < tile.group_rows;
  uint32_t bytes[kPerWarp] = {};
  float scales[kPerWarp] = {};
  if (inside) {
    const uint8_t* const row = args.rows + (tile.group_begin + first_row) * hidden +
                               static_cast<int64_t>(block) * kTile + lane * kPerLane;
    const float* const scale = args.scales + tile.group_begin * (hidden / kTile) +
                               static_cast<int64_t>(block) * tile.group_rows + first_row;
#pragma unroll
    for (int r = 0; r < kPerWarp; ++r) {
      bytes[r] = *reinterpret_cast<const uint32_t*>(row + r * hidden);
      scales[r] = scale[r];
    }
  }
  float amax[kPerLane] = {};
#pragma unroll
  for (int r = 0; r < kPerWarp; ++r) {
    float values[kPerLane];
    dequantise(bytes[r], scales[r], values);
#pragma unroll
    for (int c = 0; c < kPerLane; ++c) amax[c] = fmaxf(amax[c], fabsf(values[c]));  // not of NaN
  }
#pragma unroll
  for (int c = 0; c < kPerLane; ++c) amaxes[warp][lane * kPerLane + c] = amax[c];
  __syncthreads();
  float multiplier[kPerLane];
#pragma unroll
  for (int c = 0; c < kPerLane; ++c) {
    float largest = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, amaxes[w][lane * kPerLane + c]);
    multiplier[c] = ep::power_of_two_scale(largest);
    if (warp == 0) {
      const int64_t column = static_cast<int64_t>(block) * kTile + lane * kPerLane + c;
      args.column_scales[tile_index * hidden + column] = 1.0f / multiplier[c];
    }
  }
  union {
    uint4 vector;
    uint16_t pairs[kPerWarp / 2];
  } packed[kPerLane];
#pragma unroll
  for (int r = 0; r < kPerWarp; r += 2) {
    float first[kPerLane], second[kPerLane];
    dequantise(bytes[r], scales[r], first);
    dequantise(bytes[r + 1], scales[r + 1], second);
#pragma unroll
    for (int c = 0; c < kPerLane; ++c) {
      packed[c].pairs[r / 2] =
          ep::pack_fp8_pair(first[c] * multiplier[c], second[c] * multiplier[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < kPerLane; ++c) {
    columns[lane * kPerLane + c][(warp ^ lane) % kVectors] = packed[c].vector;
  }
  __syncthreads();
  uint8_t* const out = args.data + tile.group_begin * hidden + tile.first_row;
  for (int32_t i = threadIdx.x; i < kTile * kVectors; i += kThreads) {
    const int32_t column = i / kVectors, vector = i % kVectors;
    if (tile.first_row + vector * kPerWarp >= tile.group_rows) continue;
    const int64_t of_expert = static_cast<int64_t>(block) * kTile + column;
    *reinterpret_cast<uint4*>(out + of_expert * tile.group_rows + vector * kPerWarp) =
        columns[column][(vector ^ (column / kPerLane)) % kVectors];
  }
}

const ep::Kernels kernels("column-wise quantisation", ep::Setup::kPlain, 0, columnwise_kernel);

}  // namespace

int32_t ep_columnwise(const ep_columnwise_args* args, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  if (args->num_tiles == 0) return EP_OK;
  const auto grid = static_cast<unsigned>(args->num_tiles) * (args->hidden / kTile);
  columnwise_kernel<<<grid, kThreads, 0, stream>>>(*args);
  return ep::check_cuda(cudaGetLastError(), "ep_columnwise");
}
