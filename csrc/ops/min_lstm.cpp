// torch_ext::min_lstm. The recurrence: csrc/cells/min_lstm.h; what surrounds it: diagonal.h.
#include "activation.h"
#include "diagonal.h"
#include "torch_ext/ops.h"

namespace torch_ext {
namespace {

struct MinLstmOperator {
  using Cell = MinLstm;
  using Options = torch_ext::Options<std::string_view, bool>;
  static constexpr std::array names{"forget_gate", "input_gate", "candidate"};
  static constexpr const char* schema = "str activation=\"identity\", bool normalize=True";
  static unsigned flags(std::string_view activation, bool normalize) {
    return (is_g("min_lstm", activation) ? MinLstm::kG : 0) | (normalize ? MinLstm::kNormalize : 0);
  }
};
using Operator = Diagonal<MinLstmOperator>;
const RegisterDiagonal<MinLstmOperator> registered;

} // namespace

TensorPair min_lstm(
    const Tensor& forget_gate, const Tensor& input_gate, const Tensor& candidate,
    const OptionalTensor& initial_state, std::string_view activation, bool normalize,
    const OptionalTensor& cu_seqlens, bool reverse) {
  return Operator::call(
      forget_gate, input_gate, candidate, initial_state, cu_seqlens, activation, normalize,
      reverse);
}
TensorPair min_lstm_step(
    const Tensor& forget_gate, const Tensor& input_gate, const Tensor& candidate,
    const Tensor& state, const OptionalTensor& state_indices, std::string_view activation,
    bool normalize) {
  return Operator::call_step(
      forget_gate, input_gate, candidate, state, state_indices, activation, normalize);
}
Tensor min_lstm_step_(
    const Tensor& forget_gate, const Tensor& input_gate, const Tensor& candidate, Tensor& state,
    const OptionalTensor& state_indices, std::string_view activation, bool normalize) {
  return Operator::call_step_(
      forget_gate, input_gate, candidate, state, state_indices, activation, normalize);
}

} // namespace torch_ext
