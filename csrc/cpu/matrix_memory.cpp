// Compiled once per instruction set, with TORCH_EXT_ISA naming it: the kernels of matrix memories.
#include "matrix_memory.h"

#include "matrix_memory_isa.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class S>
void MatrixMemoryOf<S>::forward(
    const MatrixMemoryForward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
  MatrixMemory<S>::forward(p, plan, begin, end);
}
template <class S>
void MatrixMemoryOf<S>::backward(
    const MatrixMemoryBackward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
  MatrixMemory<S>::backward(p, plan, begin, end);
}
template <class S>
void MatrixMemoryOf<S>::reduce(
    const MatrixMemoryBackward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
  MatrixMemory<S>::reduce(p, plan, begin, end);
}

template struct MatrixMemoryOf<float>;
template struct MatrixMemoryOf<double>;
template struct MatrixMemoryOf<BFloat16>;
template struct MatrixMemoryOf<Half>;

} // namespace torch_ext::cpu::TORCH_EXT_ISA
