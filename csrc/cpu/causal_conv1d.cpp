// Compiled once per instruction set, with TORCH_EXT_ISA naming it: the kernels of the causal convolution.
#include "causal_conv1d.h"

#include "causal_conv1d_isa.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class S>
void CausalConv1dKernels<S>::forward(
    const CausalConv1dForward& p, const CausalConv1dPlan& plan, int64_t begin, int64_t end) {
  CausalConv1d<S>::forward(p, plan, begin, end);
}
template <class S>
void CausalConv1dKernels<S>::backward(
    const CausalConv1dBackward& p, const CausalConv1dPlan& plan, int64_t begin, int64_t end) {
  CausalConv1d<S>::backward(p, plan, begin, end);
}

template struct CausalConv1dKernels<float>;
template struct CausalConv1dKernels<double>;
template struct CausalConv1dKernels<BFloat16>;
template struct CausalConv1dKernels<Half>;

} // namespace torch_ext::cpu::TORCH_EXT_ISA
