// How the kernels of csrc/cuda/matrix_memory_backward.cu are launched: see kernel_shapes.h.
#include "cuda/matrix_memory.cu"
#include "cuda/matrix_memory_backward.cu"

#include "kernel_shapes.h"

int main() {
  using namespace torch_ext::cuda;
  const auto print = [](const char* kernel, int threads, int shared) {
    printf(
        "{\"kernel\": \"matrix_grad_%s\", \"threads\": %d, \"dynamic_shared\": %d}\n", kernel,
        threads, shared);
  };
  // A pass of a main loop is a product of tiles, 16 steps of its depth after the other, and in parts those of each two
  // parts that count; `depths` of them make a pass of its innermost loop. Inputs come by eight numbers, and that loop is
  // unrolled twice.
  const auto print_products = [](const char* kernel, int parts, int depths, int shared) {
    const int steps = kGradSteps / 16, pairs = parts * (parts + 1) / 2;
    printf(
        "{\"kernel\": \"matrix_grad_%s %d\", \"threads\": %d, \"dynamic_shared\": %d, \"parts\": "
        "%d, "
        "\"steps\": %d, \"enough_blocks\": %d, \"fill_passes\": %d, \"outer_passes\": %d, "
        "\"product_passes\": [%d]}\n",
        kernel, parts == 1, kGradThreads, shared, parts, kGradSteps, int(kGradEnoughBlocks),
        kGradSteps * (kGradSteps / 8) / kGradThreads / 2, steps * parts, steps * pairs / depths);
  };
  // Of one part, and of three: those of so many as the call wants have the same kernels. Some with one part take two
  // sixteens of depth at once.
  for (const int parts : {1, 3}) {
    const int two = parts == 1 ? 2 : 1;
    print_products("queries", parts, two, MatrixGradShared(parts, true, true).bytes);
    print_products("states", parts, 1, MatrixGradShared(parts, false, false).bytes);
    print_products("keys", parts, two, MatrixGradShared(parts, true, false).bytes);
  }
  print("maxima", 32, 0);
  print("shared", kGradThreads, 0);
}
