// How the kernels of csrc/cuda/diagonal.cu are launched: see kernel_shapes.h.
#include "cuda/diagonal.cu"

#include "kernel_shapes.h"

namespace torch_ext::cuda {
namespace {

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
