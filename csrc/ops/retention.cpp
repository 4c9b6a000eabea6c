// torch_ext::retention (Sun et al. 2023, https://arxiv.org/abs/2307.08621): each head decays at a rate of its own, constant
// in time.
#include "matrix_memory.h"
#include "torch_ext/ops.h"

namespace torch_ext {
namespace {

constexpr MatrixMemoryNames kNames{.C = "initial_state"}, kStepNames{.C = "state"};

// RetNet's: 1 - 2^(-5 - head).
Tensor log_of_decay(const char* op, const Opt& decay, const Tensor& v) {
  const at::ScalarType wide = state_dtype(v.scalar_type());
  const c10::SymInt heads = v.sym_size(-2);
  if (!defined(decay)) {
    const Tensor head = at::arange(at::Scalar(heads), v.options().dtype(at::kDouble));
    return at::log1p(-at::exp2(-5 - head)).to(wide);
  }
  TORCH_CHECK_TYPE(
      decay->scalar_type() == wide || decay->scalar_type() == v.scalar_type(), op,
      ": decay has dtype ", dtype_text(decay->scalar_type()), ", expected ", dtype_text(wide),
      wide == v.scalar_type() ? "" : " or " + dtype_text(v.scalar_type()), ", beside tokens of ",
      dtype_text(v.scalar_type()));
  check_device(op, "decay", *decay, v.device(), "the device of q");
  check_shape(op, "decay", *decay, {"H"}, {heads}, "one number per head of v");
  return at::log(decay->to(wide));
}

MatrixMemory prepare(
    const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Opt& decay,
    const Opt& state, const Opt& cu_seqlens, std::optional<double> scale, bool reverse, bool step,
    const Opt& state_indices) {
  const MatrixMemoryNames& names = step ? kStepNames : kNames;
  check_heads(op, names, q, k, v, step);
  MatrixMemory x{q, k, v, {}, {}, {}, state, {}, {}, cu_seqlens};
  x.op = op;
  auto shape = v.sym_sizes().vec();
  shape.pop_back();
  x.log_decay = log_of_decay(op, decay, v).expand_symint(shape);
  x.scale = scale.value_or(1 / std::sqrt(double(q.sym_size(-1).guard_int(__FILE__, __LINE__))));
  x.reverse = reverse;
  check_states(op, names, x, step, state_indices);
  return x;
}

Pair forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& decay, const Opt& initial_state,
    const Opt& cu_seqlens, std::optional<double> scale, bool reverse) {
  const MatrixMemoryOutputs out = call_matrix_memory(prepare(
      "retention", q, k, v, decay, initial_state, cu_seqlens, scale, reverse, /*step=*/false, {}));
  return {out.h, out.C};
}
Pair step(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& decay, const Tensor& state,
    const Opt& state_indices, std::optional<double> scale) {
  const MatrixMemoryOutputs out = matrix_memory_step(
      "retention",
      prepare(
          "retention_step", q, k, v, decay, state, {}, scale, /*reverse=*/false, /*step=*/true,
          state_indices),
      state_indices);
  return {out.h, out.C};
}
Tensor step_(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& decay, const Tensor& state,
    const Opt& state_indices, std::optional<double> scale) {
  check_no_grad("retention_step_", {q, k, v, decay.value_or(Tensor()), state});
  return call_matrix_memory_step_(
      prepare(
          "retention_step_", q, k, v, decay, state, {}, scale, /*reverse=*/false, /*step=*/true,
          state_indices),
      state_indices);
}

template <c10::DispatchKey Key, c10::DeviceType Device>
Pair autocast(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& decay, const Opt& initial_state,
    const Opt& cu_seqlens, std::optional<double> scale, bool reverse) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  Tensor a = q, b = k, c = v;
  autocast_together<Device>(a, b, c);
  Opt rate = decay, state = initial_state;
  autocast_state<Device>(rate, a);
  autocast_state<Device>(state, a);
  return forward(a, b, c, rate, state, cu_seqlens, scale, reverse);
}

template <c10::DispatchKey Key, c10::DeviceType Device>
Pair autocast_step(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& decay, const Tensor& state,
    const Opt& state_indices, std::optional<double> scale) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  Tensor a = q, b = k, c = v;
  autocast_together<Device>(a, b, c);
  Opt rate = decay;
  autocast_state<Device>(rate, a);
  const at::ScalarType wide = state_dtype(a.scalar_type());
  return step(a, b, c, rate, at::autocast::cached_cast(wide, state, Device), state_indices, scale);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Tensor autocast_step_( // the state is written: it has its dtype, or is refused
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& decay, const Tensor& state,
    const Opt& state_indices, std::optional<double> scale) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  Tensor a = q, b = k, c = v;
  autocast_together<Device>(a, b, c);
  Opt rate = decay;
  autocast_state<Device>(rate, a);
  return step_(a, b, c, rate, state, state_indices, scale);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      torch::schema("retention(Tensor q, Tensor k, Tensor v, Tensor? decay=None, "
                    "Tensor? initial_state=None, Tensor? cu_seqlens=None, float? scale=None, "
                    "bool reverse=False) -> (Tensor h, Tensor final_state)"),
      tags);
  m.def(
      torch::schema("retention_step(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor state, "
                    "Tensor? state_indices=None, float? scale=None) -> (Tensor h, Tensor state)"),
      tags);
  m.def(
      torch::schema(
          "retention_step_(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor(a!) state, "
          "Tensor? state_indices=None, float? scale=None) -> Tensor h"),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("retention", &forward);
  m.impl("retention_step", &step);
  m.impl("retention_step_", &step_);
}
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatchedDecomposition, m) { // else vmap would loop
  m.impl("retention", &forward);
  m.impl("retention_step", &step);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) {
  m.impl("retention", &autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("retention_step", &autocast_step<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("retention_step_", &autocast_step_<c10::DispatchKey::AutocastCPU, at::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) {
  m.impl("retention", &autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("retention_step", &autocast_step<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("retention_step_", &autocast_step_<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

using Forward = decltype(forward);
using Step = decltype(step);
using StepInPlace = decltype(step_);

} // namespace

TensorPair retention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& decay,
    const OptionalTensor& initial_state, std::optional<double> scale,
    const OptionalTensor& cu_seqlens, bool reverse) {
  static const auto op = member<Forward>("retention");
  return op.call(q, k, v, decay, initial_state, cu_seqlens, scale, reverse);
}
TensorPair retention_step(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& decay,
    const Tensor& state, const OptionalTensor& state_indices, std::optional<double> scale) {
  static const auto op = member<Step>("retention_step");
  return op.call(q, k, v, decay, state, state_indices, scale);
}
Tensor retention_step_(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& decay, Tensor& state,
    const OptionalTensor& state_indices, std::optional<double> scale) {
  static const auto op = member<StepInPlace>("retention_step_");
  return op.call(q, k, v, decay, state, state_indices, scale);
}

} // namespace torch_ext
