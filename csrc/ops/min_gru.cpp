// torch_ext::min_gru. The recurrence: csrc/cells/min_gru.h; what surrounds it: diagonal.h.
#include "activation.h"
#include "diagonal.h"
#include "torch_ext/ops.h"

namespace torch_ext {
namespace {

struct MinGruOperator {
  using Cell = MinGru;
  using Options = torch_ext::Options<std::string_view>;
  static constexpr std::array names{"gate", "candidate"};
  static constexpr const char* schema = "str activation=\"identity\"";
  static unsigned flags(std::string_view activation) {
    return is_g("min_gru", activation) ? MinGru::kG : 0;
  }
};
using Operator = Diagonal<MinGruOperator>;
const RegisterDiagonal<MinGruOperator> registered;

} // namespace

TensorPair min_gru(
    const Tensor& gate, const Tensor& candidate, const OptionalTensor& initial_state,
    std::string_view activation, const OptionalTensor& cu_seqlens, bool reverse) {
  return Operator::call(gate, candidate, initial_state, cu_seqlens, activation, reverse);
}
TensorPair min_gru_step(
    const Tensor& gate, const Tensor& candidate, const Tensor& state,
    const OptionalTensor& state_indices, std::string_view activation) {
  return Operator::call_step(gate, candidate, state, state_indices, activation);
}
Tensor min_gru_step_(
    const Tensor& gate, const Tensor& candidate, Tensor& state, const OptionalTensor& state_indices,
    std::string_view activation) {
  return Operator::call_step_(gate, candidate, state, state_indices, activation);
}

} // namespace torch_ext
