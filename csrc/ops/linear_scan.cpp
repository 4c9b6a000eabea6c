// torch_ext::linear_scan. The recurrence: csrc/cells/linear_scan.h; what surrounds it: diagonal.h.
#include "diagonal.h"
#include "torch_ext/ops.h"

namespace torch_ext {
namespace {

struct LinearScanOperator {
  using Cell = LinearScan;
  using Options = torch_ext::Options<>;
  static constexpr std::array names{"a", "b"};
  static constexpr const char* schema = "";
  static unsigned flags() { return 0; }
};
using Operator = Diagonal<LinearScanOperator>;
const RegisterDiagonal<LinearScanOperator> registered;

} // namespace

TensorPair linear_scan(
    const Tensor& a, const Tensor& b, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, bool reverse) {
  return Operator::call(a, b, initial_state, cu_seqlens, reverse);
}
TensorPair linear_scan_step(
    const Tensor& a, const Tensor& b, const Tensor& state, const OptionalTensor& state_indices) {
  return Operator::call_step(a, b, state, state_indices);
}
Tensor linear_scan_step_(
    const Tensor& a, const Tensor& b, Tensor& state, const OptionalTensor& state_indices) {
  return Operator::call_step_(a, b, state, state_indices);
}

} // namespace torch_ext
