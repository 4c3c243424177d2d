// Sizes that kernels are compiled for. With few tokens a kernel's time is that of its longest chain
// of instructions, and sizes that the compiler knows shorten it.
#pragma once

#include "common/launch.cuh"

namespace ep::low_latency {

template <int kHidden, int kRanks>
struct Shape {
  static constexpr int hidden = kHidden, ranks = kRanks;

  static bool is_of(const ep_low_latency& common) {
    return common.hidden == kHidden && common.peers.num_ranks == kRanks;
  }
};
template <typename... Each>
struct Shapes {};

using CompiledShapes = Shapes<Shape<2048, 2>, Shape<2048, 4>, Shape<2048, 8>,  //
                              Shape<4096, 2>, Shape<4096, 4>, Shape<4096, 8>,  //
                              Shape<7168, 2>, Shape<7168, 4>, Shape<7168, 8>>;

// `Kernel<kHidden, kRanks>::function` is the kernel; that for <0, 0> takes any sizes.
template <template <int, int> class Kernel, typename... Each>
Kernels of_shapes(const char* what, int32_t shared_bytes, Shapes<Each...>) {
  return Kernels(what, Setup::kShared, shared_bytes, Kernel<0, 0>::function,
                 Kernel<Each::hidden, Each::ranks>::function...);
}

template <template <int, int> class Kernel, typename... Each>
auto kernel_for(const ep_low_latency& common, Shapes<Each...>) {
  auto* function = Kernel<0, 0>::function;
  if (!common.is_general) {
    ((Each::is_of(common) ? void(function = Kernel<Each::hidden, Each::ranks>::function) : void()),
     ...);
  }
  return function;
}

}  // namespace ep::low_latency
