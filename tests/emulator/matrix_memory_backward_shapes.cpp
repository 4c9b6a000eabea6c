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
  // Of one part, and of three: those of so many as the call wants have the same kernels.
  print("queries 1", kGradThreads, MatrixGradShared(1, true, true).bytes);
  print("queries 0", kGradThreads, MatrixGradShared(3, true, true).bytes);
  print("states 1", kGradThreads, MatrixGradShared(1, false, false).bytes);
  print("states 0", kGradThreads, MatrixGradShared(3, false, false).bytes);
  print("keys 1", kGradThreads, MatrixGradShared(1, true, false).bytes);
  print("keys 0", kGradThreads, MatrixGradShared(3, true, false).bytes);
  print("maxima", 32, 0);
  print("shared", kGradThreads, 0);
}
