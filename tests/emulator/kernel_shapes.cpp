// Prints how each CUDA kernel is launched, a line of JSON per kernel: threads, bytes of dynamic shared memory, and what a
// thread of it works on. benchmarks/kernel_budget.py compiles and runs this beside the compiler's own figures, so that
// these stay where they are defined. Needs no CUDA: the kernels are instantiated for the emulator and not run.
#include <stdio.h>

#include "cuda/diagonal.cu"

namespace torch_ext::cuda {
namespace {

template <class S>
constexpr const char* dtype_name = nullptr;
template <>
constexpr const char* dtype_name<float> = "float32";
template <>
constexpr const char* dtype_name<double> = "float64";
template <>
constexpr const char* dtype_name<BFloat16> = "bfloat16";
template <>
constexpr const char* dtype_name<Half> = "float16";
template <>
constexpr const char* dtype_name<Complex<float>> = "complex64";
template <>
constexpr const char* dtype_name<Complex<double>> = "complex128";

template <class Walk>
void print(const char* kernel, int threads, int shared, int chained_shared) {
  printf(
      "{\"kernel\": \"%s %s %s %s\", \"threads\": %d, \"dynamic_shared\": %d, "
      "\"chained_dynamic_shared\": %d, \"arrays\": %d, \"outputs\": %d, \"itemsize\": %d",
      kernel, Walk::kBackward ? "backward" : "forward", Walk::Cell::name,
      dtype_name<typename Walk::S>, threads, shared, chained_shared, Walk::kArrays, Walk::kOutputs,
      int(sizeof(typename Walk::S)));
}

template <class Walk>
void print_kernels() {
  using L = LayoutOf<Walk>;
  print<Walk>("diagonal_tiles", L::kThreads, shared_bytes<Walk>(false), shared_bytes<Walk>(true));
  printf(
      ", \"elements_per_thread\": %d, \"steps_per_tile\": %d, \"channels\": %d, \"stages\": %d, "
      "\"tiles_per_link\": %d, \"enough_blocks\": %d}\n",
      L::kSteps * L::kPerLane, L::kTime, L::kChannels, kStages, kChain, kEnoughBlocks);
  for (const char* kernel : {"diagonal_short", "diagonal_empty"}) {
    print<Walk>(kernel, kShortThreads, 0, 0);
    printf("}\n");
  }
}

// Every cell and dtype that `dispatch` compiles.
template <template <class, class> class Walk, class... Cell>
void print_all(Cells<Cell...> cells) {
  for (int cell = 0; cell < cells.size; ++cell) {
    for (int dtype = 0; dtype < int(DType::count); ++dtype) {
      dispatch<Walk>(cells, cell, DType(dtype), []<class W>(Driver<W>) { print_kernels<W>(); });
    }
  }
}

} // namespace
} // namespace torch_ext::cuda

int main() {
  torch_ext::cuda::print_all<torch_ext::cuda::ForwardWalk>(torch_ext::DiagonalCells{});
  torch_ext::cuda::print_all<torch_ext::cuda::BackwardWalk>(torch_ext::DiagonalCells{});
}
