// Compiled once per instruction set, with TORCH_EXT_ISA naming it: the kernels of gated recurrences.
#include "gated.h"

#include "gated_isa.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class Cell, class A>
void GatedOf<Cell, A>::forward(
    const GatedForward& p, const GatedPlan& plan, DType dtype, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  GatedForwardRun<Cell, A>(p, plan, dtype, begin, end).run();
}
template <class Cell, class A>
void GatedOf<Cell, A>::backward(
    const GatedBackward& p, const GatedPlan& plan, DType dtype, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  GatedBackwardRun<Cell, A>(p, plan, dtype, begin, end).run();
}
template <class Cell, class A>
int64_t GatedOf<Cell, A>::forward_scratch(const GatedForward& p, const GatedPlan& plan) {
  return GatedForwardScratch<Cell>(p, plan).size;
}
template <class Cell, class A>
int64_t GatedOf<Cell, A>::backward_scratch(const GatedBackward& p, const GatedPlan& plan) {
  return GatedBackwardScratch<Cell>(p, plan).size;
}
template <class W>
void GatedPackOf<W>::pack(
    const GatedPanel& p, const void* matrix, int64_t first_gate, int64_t heads, bool transposed,
    int64_t begin, int64_t end) {
  GatedPacking<W>::pack(p, matrix, first_gate, heads, transposed, begin, end);
}

#define TORCH_EXT_GATED(Cell)           \
  template struct GatedOf<Cell, float>; \
  template struct GatedOf<Cell, double>;
TORCH_EXT_GATED(Lstm)
TORCH_EXT_GATED(CoupledLstm)
TORCH_EXT_GATED(Gru)
TORCH_EXT_GATED(GruResetBefore)
TORCH_EXT_GATED(Elman)
TORCH_EXT_GATED(IndRnn)
TORCH_EXT_GATED(Slstm)
template struct GatedPackOf<float>;
template struct GatedPackOf<double>;
template struct GatedPackOf<BFloat16>;

} // namespace torch_ext::cpu::TORCH_EXT_ISA
