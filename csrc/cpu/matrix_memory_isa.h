// Where isa.cpp finds the kernels of matrix_memory.cpp, which is compiled once per instruction set too, beside it.
#pragma once
#include "kernels.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class S>
struct MatrixMemoryOf {
  static void forward(const MatrixMemoryForward&, const MatrixMemoryPlan&, int64_t, int64_t);
  static void backward(const MatrixMemoryBackward&, const MatrixMemoryPlan&, int64_t, int64_t);
  static void reduce(const MatrixMemoryBackward&, const MatrixMemoryPlan&, int64_t, int64_t);
};

constexpr void list_matrix_memory(KernelTable& t) {
  const auto add = [&]<class Kernel>(DType dtype, Kernel) {
    t.matrix_memory[int(dtype)] = {&Kernel::forward, &Kernel::backward, &Kernel::reduce};
  };
  add(DType::f32, MatrixMemoryOf<float>{});
  add(DType::f64, MatrixMemoryOf<double>{});
  add(DType::bf16, MatrixMemoryOf<BFloat16>{});
  add(DType::f16, MatrixMemoryOf<Half>{});
}

} // namespace torch_ext::cpu::TORCH_EXT_ISA
