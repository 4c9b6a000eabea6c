// Compiled once per instruction set, with TORCH_EXT_ISA naming it: the kernels of a product with a few rows.
#include "projection.h"

#include "projection_isa.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class S>
void project(const Projection& p, int64_t begin, int64_t end) {
  ProjectionKernel<S>::run(p, begin, end);
}

template void project<float>(const Projection&, int64_t, int64_t);
template void project<double>(const Projection&, int64_t, int64_t);
template void project<BFloat16>(const Projection&, int64_t, int64_t);
template void project<Half>(const Projection&, int64_t, int64_t);

} // namespace torch_ext::cpu::TORCH_EXT_ISA
