// Where isa.cpp finds the kernels of projection.cpp, which is compiled once per instruction set too, beside it.
#pragma once
#include "kernels.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class S>
void project(const Projection&, int64_t begin, int64_t end);

constexpr void list_projections(KernelTable& t) {
  t.projection[int(DType::f32)] = &project<float>;
  t.projection[int(DType::f64)] = &project<double>;
  t.projection[int(DType::bf16)] = &project<BFloat16>;
  t.projection[int(DType::f16)] = &project<Half>;
}

} // namespace torch_ext::cpu::TORCH_EXT_ISA
