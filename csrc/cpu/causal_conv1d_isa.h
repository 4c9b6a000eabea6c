// Where isa.cpp finds the kernels of causal_conv1d.cpp, which is compiled once per instruction set too, beside it.
#pragma once
#include "kernels.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class S>
struct CausalConv1dKernels {
  static void forward(const CausalConv1dForward&, const CausalConv1dPlan&, int64_t, int64_t);
  static void backward(const CausalConv1dBackward&, const CausalConv1dPlan&, int64_t, int64_t);
};

constexpr void list_causal_conv1d(KernelTable& t) {
  const auto add = [&]<class S>(DType dtype, S) {
    t.conv_forward[int(dtype)] = &CausalConv1dKernels<S>::forward;
    t.conv_backward[int(dtype)] = &CausalConv1dKernels<S>::backward;
  };
  add(DType::f32, float{});
  add(DType::f64, double{});
  add(DType::bf16, BFloat16{});
  add(DType::f16, Half{});
}

} // namespace torch_ext::cpu::TORCH_EXT_ISA
