// torch_ext::mlstm, xLSTM's matrix memory (Beck et al. 2024, https://arxiv.org/abs/2405.04517): a forget gate that decays,
// and either an input gate that is exponential, where everything is divided by e^m and by what the normaliser says, or a
// sigmoid.
#include "matrix_memory.h"
#include "torch_ext/ops.h"

namespace torch_ext {
namespace {

using Text = c10::string_view;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>; // h, C, n, m

bool is_exponential(const char* op, Text input_gate, bool normalize) {
  TORCH_CHECK_VALUE(
      input_gate == "exp" || input_gate == "sigmoid", op, ": input_gate is '", input_gate,
      "', expected 'exp' or 'sigmoid'");
  TORCH_CHECK_VALUE(
      normalize || input_gate != "exp", op,
      ": normalize is False, expected True with input_gate 'exp', whose states are kept divided by "
      "e^m");
  return input_gate == "exp";
}

// The call's arguments, checked, and its gates.
MatrixMemory prepare(
    const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i,
    const Tensor& f, const Opt& C, const Opt& n, const Opt& m, const Opt& cu_seqlens,
    std::optional<double> scale, double eps, Text input_gate, bool normalize, bool normalizer_grad,
    bool reverse, bool step, const Opt& state_indices) {
  const bool exponential = is_exponential(op, input_gate, normalize);
  check_heads(op, {}, q, k, v, step);
  check_gate(op, "i", i, v, /*half=*/true);
  check_gate(op, "f", f, v, /*half=*/true);
  MatrixMemory x{q, k, v, {}, {}, {}, C, n, m, cu_seqlens};
  x.scale = scale.value_or(1 / std::sqrt(double(q.sym_size(-1).guard_int(__FILE__, __LINE__))));
  x.eps = eps;
  x.op = op;
  x.exact = normalizer_grad;
  x.reverse = reverse;
  x.normalizer = Normalizer::stabilized; // as far as shapes of states go
  check_states(op, {}, x, step, state_indices);
  x.normalizer = exponential ? Normalizer::stabilized
                 : normalize ? Normalizer::at_least_one
                             : Normalizer::none;
  const at::ScalarType wide = state_dtype(q.scalar_type());
  x.log_decay = at::log_sigmoid(f.to(wide));
  (exponential ? x.log_input : x.input_scale) = exponential ? i.to(wide) : at::sigmoid(i.to(wide));
  if (!exponential) x.m.reset();
  if (!normalize) x.n.reset();
  return x;
}

// States that take no part are handed on as they are, or as zeros.
Tensor handed_on(const Opt& given, const Tensor& C, bool keys) {
  if (defined(given)) return given->clone(at::MemoryFormat::Contiguous);
  const auto sizes = C.sym_sizes().slice(0, keys ? 3 : 2);
  return at::zeros_symint(sizes, C.options());
}
Four finish(const MatrixMemoryOutputs& out, const MatrixMemory& x, const Opt& n, const Opt& m) {
  return {
      out.h, out.C, x.normalizer == Normalizer::none ? handed_on(n, out.C, true) : out.n,
      x.normalizer == Normalizer::stabilized ? out.m : handed_on(m, out.C, false)};
}

Four forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
    const Opt& C, const Opt& n, const Opt& m, const Opt& cu_seqlens, std::optional<double> scale,
    double eps, Text input_gate, bool normalize, bool normalizer_grad, bool reverse) {
  const MatrixMemory x = prepare(
      "mlstm", q, k, v, i, f, C, n, m, cu_seqlens, scale, eps, input_gate, normalize,
      normalizer_grad, reverse, /*step=*/false, {});
  return finish(call_matrix_memory(x), x, n, m);
}
Four step(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
    const Tensor& C, const Tensor& n, const Tensor& m, const Opt& state_indices,
    std::optional<double> scale, double eps, Text input_gate, bool normalize,
    bool normalizer_grad) {
  const MatrixMemory x = prepare(
      "mlstm_step", q, k, v, i, f, C, n, m, {}, scale, eps, input_gate, normalize, normalizer_grad,
      /*reverse=*/false, /*step=*/true, state_indices);
  return finish(matrix_memory_step("mlstm", x, state_indices), x, n, m);
}
Tensor step_(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
    const Tensor& C, const Tensor& n, const Tensor& m, const Opt& state_indices,
    std::optional<double> scale, double eps, Text input_gate, bool normalize) {
  check_no_grad("mlstm_step_", {q, k, v, i, f, C, n, m});
  const MatrixMemory x = prepare(
      "mlstm_step_", q, k, v, i, f, C, n, m, {}, scale, eps, input_gate, normalize,
      /*normalizer_grad=*/true, /*reverse=*/false, /*step=*/true, state_indices);
  return call_matrix_memory_step_(x, state_indices);
}

template <c10::DispatchKey Key, c10::DeviceType Device>
Four autocast(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
    const Opt& C, const Opt& n, const Opt& m, const Opt& cu_seqlens, std::optional<double> scale,
    double eps, Text input_gate, bool normalize, bool normalizer_grad, bool reverse) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  Tensor a = q, b = k, c = v;
  autocast_together<Device>(a, b, c);
  Opt C0 = C, n0 = n, m0 = m;
  for (Opt* s : {&C0, &n0, &m0}) autocast_state<Device>(*s, a);
  const at::ScalarType wide = state_dtype(a.scalar_type());
  return forward(
      a, b, c, at::autocast::cached_cast(wide, i, Device),
      at::autocast::cached_cast(wide, f, Device), C0, n0, m0, cu_seqlens, scale, eps, input_gate,
      normalize, normalizer_grad, reverse);
}

template <c10::DispatchKey Key, c10::DeviceType Device>
Four autocast_step(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
    const Tensor& C, const Tensor& n, const Tensor& m, const Opt& state_indices,
    std::optional<double> scale, double eps, Text input_gate, bool normalize,
    bool normalizer_grad) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  Tensor a = q, b = k, c = v;
  autocast_together<Device>(a, b, c);
  const auto cast = [wide = state_dtype(a.scalar_type())](const Tensor& t) {
    return at::autocast::cached_cast(wide, t, Device);
  };
  return step(
      a, b, c, cast(i), cast(f), cast(C), cast(n), cast(m), state_indices, scale, eps, input_gate,
      normalize, normalizer_grad);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Tensor autocast_step_( // the states are written: they have their dtype, or are refused
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
    const Tensor& C, const Tensor& n, const Tensor& m, const Opt& state_indices,
    std::optional<double> scale, double eps, Text input_gate, bool normalize) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  Tensor a = q, b = k, c = v;
  autocast_together<Device>(a, b, c);
  const at::ScalarType wide = state_dtype(a.scalar_type());
  return step_(
      a, b, c, at::autocast::cached_cast(wide, i, Device),
      at::autocast::cached_cast(wide, f, Device), C, n, m, state_indices, scale, eps, input_gate,
      normalize);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      torch::schema(
          "mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? C=None, "
          "Tensor? n=None, Tensor? m=None, Tensor? cu_seqlens=None, float? scale=None, "
          "float eps=1e-6, str input_gate=\"exp\", bool normalize=True, "
          "bool normalizer_grad=True, bool reverse=False) -> (Tensor h, Tensor C, Tensor n, "
          "Tensor m)"),
      tags);
  m.def(
      torch::schema(
          "mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor C, Tensor n, "
          "Tensor m, Tensor? state_indices=None, float? scale=None, float eps=1e-6, "
          "str input_gate=\"exp\", bool normalize=True, bool normalizer_grad=True) -> (Tensor h, "
          "Tensor C, Tensor n, Tensor m)"),
      tags);
  m.def(
      torch::schema("mlstm_step_(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) C, "
                    "Tensor(b!) n, Tensor(c!) m, Tensor? state_indices=None, float? scale=None, "
                    "float eps=1e-6, str input_gate=\"exp\", bool normalize=True) -> Tensor h"),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("mlstm", &forward);
  m.impl("mlstm_step", &step);
  m.impl("mlstm_step_", &step_);
}
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatchedDecomposition, m) { // else vmap would loop
  m.impl("mlstm", &forward);
  m.impl("mlstm_step", &step);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) {
  m.impl("mlstm", &autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("mlstm_step", &autocast_step<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("mlstm_step_", &autocast_step_<c10::DispatchKey::AutocastCPU, at::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) {
  m.impl("mlstm", &autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("mlstm_step", &autocast_step<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("mlstm_step_", &autocast_step_<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

using Forward = decltype(forward);
using Step = decltype(step);
using StepInPlace = decltype(step_);

} // namespace

std::tuple<Tensor, MLSTMState> mlstm(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
    const std::optional<MLSTMState>& initial_state, std::optional<double> scale, double eps,
    std::string_view input_gate, bool normalize, bool normalizer_grad,
    const OptionalTensor& cu_seqlens, bool reverse) {
  static const auto op = member<Forward>("mlstm");
  Opt C0, n0, m0;
  if (initial_state) std::tie(C0, n0, m0) = *initial_state;
  auto [h, C, n, m] = op.call(
      q, k, v, i, f, C0, n0, m0, cu_seqlens, scale, eps, input_gate, normalize, normalizer_grad,
      reverse);
  return {h, {C, n, m}};
}
std::tuple<Tensor, MLSTMState> mlstm_step(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
    const MLSTMState& state, const OptionalTensor& state_indices, std::optional<double> scale,
    double eps, std::string_view input_gate, bool normalize, bool normalizer_grad) {
  static const auto op = member<Step>("mlstm_step");
  auto [h, C, n, m] = op.call(
      q, k, v, i, f, std::get<0>(state), std::get<1>(state), std::get<2>(state), state_indices,
      scale, eps, input_gate, normalize, normalizer_grad);
  return {h, {C, n, m}};
}
Tensor mlstm_step_(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
    MLSTMState& state, const OptionalTensor& state_indices, std::optional<double> scale, double eps,
    std::string_view input_gate, bool normalize) {
  static const auto op = member<StepInPlace>("mlstm_step_");
  return op.call(
      q, k, v, i, f, std::get<0>(state), std::get<1>(state), std::get<2>(state), state_indices,
      scale, eps, input_gate, normalize);
}

} // namespace torch_ext
