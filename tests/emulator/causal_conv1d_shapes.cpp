// How the kernels of csrc/cuda/causal_conv1d.cu are launched: see kernel_shapes.h.
#include "cuda/causal_conv1d.cu"

#include "kernel_shapes.h"

namespace torch_ext::cuda {
namespace {

template <class S>
void print(const char* kernel, int shared = 0, int threads = kConvThreads) {
  printf(
      "{\"kernel\": \"causal_conv1d_%s\", \"threads\": %d, \"dynamic_shared\": %d, "
      "\"outputs\": 1}\n",
      (std::string(kernel) + " " + dtype_name<S>).c_str(), threads, shared);
}
// A pass of the main loop: a piece of a sequence. "special": with its activation.
template <class L>
void print_tiles(const char* direction, int shared, int arrays, int halo) {
  constexpr int kRows = kConvThreads / (kConvRowBytes / 16); // that are fetched at once
  printf(
      "{\"kernel\": \"causal_conv1d_%s %s %d\", \"threads\": %d, \"dynamic_shared\": %d, "
      "\"arrays\": %d, \"outputs\": 1, \"itemsize\": %d, \"elements_per_pass\": %d, "
      "\"copies\": %d, \"special\": true, \"steps_per_tile\": %d, \"channels\": %d, "
      "\"enough_blocks\": %d, \"tiles_per_block\": %d}\n",
      direction, dtype_name<typename L::S>, L::kWindow, kConvThreads, shared, arrays,
      int(sizeof(typename L::S)), kConvRows * L::kPerLane,
      int(conv_divide_up(L::kTime + halo, kRows)), L::kTime, L::kChannels, kConvEnoughBlocks,
      kConvTiles);
}
template <class L>
void print_tiles() {
  print_tiles<L>("forward", L::kForwardBytes, 1, L::kHalo);
  print_tiles<L>("backward", L::kBackwardBytes, 2, 2 * L::kHalo);
}
template <class S>
void print_all(ConvDriver<S>) {
  print_tiles<ConvTile<S, 4>>();
  print_tiles<ConvTile<S, 8>>();
  for (const char* kernel : {"step", "wide_forward", "wide_gradient", "wide_input", "wide_weight"})
    print<S>(kernel);
  for (int window = 2; window <= 4; ++window)
    printf(
        "{\"kernel\": \"causal_conv1d_step_vectors %s %d\", \"threads\": %d, "
        "\"dynamic_shared\": 0, \"outputs\": 1}\n",
        dtype_name<S>, window, kConvThreads);
  if constexpr (sizeof(S) >= 4) print<S>("sum", kConvSumThreads * int(sizeof(S)), kConvSumThreads);
}

} // namespace
} // namespace torch_ext::cuda

int main() {
  using torch_ext::DType;
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    torch_ext::cuda::conv_dispatch(dtype, [](auto driver) { torch_ext::cuda::print_all(driver); });
}
