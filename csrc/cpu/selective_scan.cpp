// Compiled once per instruction set, with TORCH_EXT_ISA naming it: the kernels of Mamba's selective scan.
#include "selective_scan.h"

#include "selective_scan_isa.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class S, bool kComplex>
void SelectiveScanOf<S, kComplex>::forward(
    const SelectiveScanForward& p, const SelectiveScanPlan& plan, int64_t begin, int64_t end) {
  SelectiveScan<S, kComplex>::forward(p, plan, begin, end);
}
template <class S, bool kComplex>
void SelectiveScanOf<S, kComplex>::backward(
    const SelectiveScanBackward& p, const SelectiveScanPlan& plan, int64_t begin, int64_t end) {
  SelectiveScan<S, kComplex>::backward(p, plan, begin, end);
}
template <class S, bool kComplex>
void SelectiveScanOf<S, kComplex>::reduce_channels(
    const SelectiveScanBackward& p, const SelectiveScanPlan& plan, int64_t begin, int64_t end) {
  SelectiveScan<S, kComplex>::reduce_channels(p, plan, begin, end);
}
template <class S, bool kComplex>
void SelectiveScanOf<S, kComplex>::reduce_tokens(
    const SelectiveScanBackward& p, const SelectiveScanPlan& plan, int64_t begin, int64_t end) {
  SelectiveScan<S, kComplex>::reduce_tokens(p, plan, begin, end);
}

template struct SelectiveScanOf<float, false>;
template struct SelectiveScanOf<double, false>;
template struct SelectiveScanOf<BFloat16, false>;
template struct SelectiveScanOf<Half, false>;
template struct SelectiveScanOf<float, true>;
template struct SelectiveScanOf<double, true>;

} // namespace torch_ext::cpu::TORCH_EXT_ISA
