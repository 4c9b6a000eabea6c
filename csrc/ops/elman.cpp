// torch_ext::elman, torch.nn.RNN's recurrence, and torch_ext::ind_rnn, whose units see only themselves (csrc/cells/elman.h):
// cells of the gated family.
#include "gated.h"
#include "torch_ext/ops.h"

namespace torch_ext {
namespace {

using Text = c10::string_view;
bool is_relu(const char* op, Text nonlinearity) {
  TORCH_CHECK_VALUE(
      nonlinearity == "tanh" || nonlinearity == "relu", op, ": nonlinearity is '", nonlinearity,
      "', expected 'tanh' or 'relu'");
  return nonlinearity == "relu";
}

using Result = std::tuple<Tensor, Tensor>; // y, h

Gated arguments(
    const char* op, const Tensor& x, const Opt& R, const Opt& bias, const Opt& h, Text nonlinearity,
    const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight, double norm_eps) {
  Gated g;
  g.op = op;
  g.x = x, g.R = R, g.bias = bias;
  g.h = h;
  g.state_name =
      std::string_view(op).find("_step") == std::string_view::npos ? "initial_state" : "state";
  g.cell = GatedCells::index<Elman>();
  g.flags = is_relu(op, nonlinearity) ? Elman::kRelu : 0;
  g.recurrent_mask = recurrent_mask;
  g.h_update = h_update;
  g.norm_weight = norm_weight;
  g.norm_eps = norm_eps;
  return g;
}

Result forward(
    const Tensor& x, const Tensor& R, const Opt& bias, const Opt& h, Text nonlinearity,
    const Opt& cu_seqlens, bool reverse, const Opt& reset, const Opt& recurrent_mask,
    const Opt& h_update, const Opt& norm_weight, double norm_eps,
    std::optional<double> gradient_clip) {
  Gated g = arguments(
      "elman", x, R, bias, h, nonlinearity, recurrent_mask, h_update, norm_weight, norm_eps);
  g.cu_seqlens = cu_seqlens, g.reset = reset_of_heads(g.op, reset, *g.x);
  g.reverse = reverse, g.gradient_clip = gradient_clip;
  const GatedOutputs out = call_gated(g);
  return {out.y, out.h};
}
Result step(
    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Opt& state_indices,
    Text nonlinearity, const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight,
    double norm_eps) {
  const Gated g = arguments(
      "elman_step", x, R, bias, h, nonlinearity, recurrent_mask, h_update, norm_weight, norm_eps);
  const GatedOutputs out = gated_step("elman", g, state_indices);
  return {out.y, out.h};
}
Tensor step_(
    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Opt& state_indices,
    Text nonlinearity, const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight,
    double norm_eps) {
  return gated_step_(
      "elman_step_",
      arguments(
          "elman_step_", x, R, bias, h, nonlinearity, recurrent_mask, h_update, norm_weight,
          norm_eps),
      state_indices);
}

// x and the parameters stay what they are: x comes from a product that autocast has chosen the dtype of. States go along.
template <c10::DispatchKey Key, c10::DeviceType Device>
Result autocast(
    const Tensor& x, const Tensor& R, const Opt& bias, const Opt& h, Text nonlinearity,
    const Opt& cu_seqlens, bool reverse, const Opt& reset, const Opt& recurrent_mask,
    const Opt& h_update, const Opt& norm_weight, double norm_eps,
    std::optional<double> gradient_clip) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const auto cast = [&](const Opt& state) { return gated_autocast_state<Device>(state, x); };
  return forward(
      x, R, bias, cast(h), nonlinearity, cu_seqlens, reverse, reset, recurrent_mask, h_update,
      norm_weight, norm_eps, gradient_clip);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Result autocast_step(
    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Opt& state_indices,
    Text nonlinearity, const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight,
    double norm_eps) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const auto cast = [&](const Tensor& state) { return *gated_autocast_state<Device>(state, x); };
  return step(
      x, R, bias, cast(h), state_indices, nonlinearity, recurrent_mask, h_update, norm_weight,
      norm_eps);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Tensor autocast_step_( // the states are written: they have their dtype, or are refused

    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Opt& state_indices,
    Text nonlinearity, const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight,
    double norm_eps) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  return step_(
      x, R, bias, h, state_indices, nonlinearity, recurrent_mask, h_update, norm_weight, norm_eps);
}

// ---- ind_rnn: x (B, T, D), u and bias (D,) ----

Gated ind_arguments(
    const char* op, const Tensor& x, const Tensor& u, const Opt& bias, const Opt& h,
    Text nonlinearity, const Opt& cu_seqlens, const Opt& state_indices, const Opt& recurrent_mask,
    const Opt& h_update, bool step) {
  const int64_t dims = step ? 2 : 3;
  TORCH_CHECK_VALUE(
      x.dim() == dims, op, ": x has shape ", shape_text(x.sym_sizes()), ", expected ",
      step ? "(B, D)" : "(B, T, D)");
  const c10::SymInt width = x.sym_size(-1);
  const auto vector = [&](const char* name, const Tensor& t) {
    TORCH_CHECK_TYPE(
        t.scalar_type() == x.scalar_type() || t.scalar_type() == state_dtype(x.scalar_type()), op,
        ": ", name, " has dtype ", dtype_text(t.scalar_type()), ", expected ",
        dtype_text(x.scalar_type()), " or that of the states, beside x");
    check_device(op, name, t, x.device(), "the device of x");
    check_shape(op, name, t, {"D"}, {width}, "one per unit of x");
    return t.to(state_dtype(x.scalar_type())).view_symint({1, width});
  };
  const auto over_time = [&](const char* name, const Opt& t) {
    if (!defined(t)) return Opt();
    if (step)
      check_shape(op, name, *t, {"B", "D"}, x.sym_sizes(), "the shape of x");
    else
      check_shape(op, name, *t, {"B", "T", "D"}, x.sym_sizes(), "the shape of x");
    return Opt(t->unsqueeze(-2));
  };
  // Of a cu_seqlens or state_indices that is refused later, the number of rows is not looked at.
  const auto per_row = [&](const char* name, const Opt& t, bool pool) {
    if (!defined(t)) return Opt();
    TORCH_CHECK_VALUE(
        t->dim() == 2, op, ": ", name, " has shape ", shape_text(t->sym_sizes()), ", expected ",
        pool                  ? "(num_rows, D)"
        : defined(cu_seqlens) ? "(num_sequences, D)"
                              : "(B, D)");
    c10::SymInt rows = t->sym_size(0);
    if (!pool && !defined(cu_seqlens)) rows = x.sym_size(0);
    if (defined(cu_seqlens) && cu_seqlens->dim() == 1) rows = cu_seqlens->sym_size(0) - 1;
    check_shape(
        op, name, *t,
        {pool                  ? "num_rows"
         : defined(cu_seqlens) ? "num_sequences"
                               : "B",
         "D"},
        {rows, width}, "one per sequence and unit");
    return Opt(t->unsqueeze(-2));
  };
  Gated g;
  g.op = op;
  g.cell = GatedCells::index<IndRnn>();
  g.flags = is_relu(op, nonlinearity) ? IndRnn::kRelu : 0;
  g.x = x.unsqueeze(-2).unsqueeze(-2);
  const Tensor weight = vector("u", u);
  g.weights = at::stack({weight, defined(bias) ? vector("bias", *bias) : at::zeros_like(weight)});
  g.state_name = step ? "state" : "initial_state";
  g.h = per_row(g.state_name, h, defined(state_indices));
  g.recurrent_mask = per_row("recurrent_mask", recurrent_mask, false);
  g.h_update = over_time("h_update", h_update);
  return g;
}
Result ind_forward(
    const Tensor& x, const Tensor& u, const Opt& bias, const Opt& h, Text nonlinearity,
    const Opt& cu_seqlens, bool reverse, const Opt& reset, const Opt& recurrent_mask,
    const Opt& h_update, std::optional<double> gradient_clip) {
  Gated g = ind_arguments(
      "ind_rnn", x, u, bias, h, nonlinearity, cu_seqlens, Opt(), recurrent_mask, h_update,
      /*step=*/false);
  g.cu_seqlens = cu_seqlens, g.reset = reset_of_heads(g.op, reset, *g.x);
  g.reverse = reverse, g.gradient_clip = gradient_clip;
  const GatedOutputs out = call_gated(g);
  return {out.y.squeeze(2), out.h.squeeze(1)};
}
Result ind_step(
    const Tensor& x, const Tensor& u, const Opt& bias, const Tensor& h, const Opt& state_indices,
    Text nonlinearity, const Opt& recurrent_mask, const Opt& h_update) {
  const Gated g = ind_arguments(
      "ind_rnn_step", x, u, bias, h, nonlinearity, Opt(), state_indices, recurrent_mask, h_update,
      /*step=*/true);
  const GatedOutputs out = gated_step("ind_rnn", g, state_indices);
  return {out.y.squeeze(1), out.h.squeeze(1)};
}
Tensor ind_step_(
    const Tensor& x, const Tensor& u, const Opt& bias, const Tensor& h, const Opt& state_indices,
    Text nonlinearity, const Opt& recurrent_mask, const Opt& h_update) {
  return gated_step_(
             "ind_rnn_step_",
             ind_arguments(
                 "ind_rnn_step_", x, u, bias, h, nonlinearity, Opt(), state_indices, recurrent_mask,
                 h_update, /*step=*/true),
             state_indices)
      .squeeze(1);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Result ind_autocast(
    const Tensor& x, const Tensor& u, const Opt& bias, const Opt& h, Text nonlinearity,
    const Opt& cu_seqlens, bool reverse, const Opt& reset, const Opt& recurrent_mask,
    const Opt& h_update, std::optional<double> gradient_clip) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  return ind_forward(
      x, u, bias, gated_autocast_state<Device>(h, x), nonlinearity, cu_seqlens, reverse, reset,
      recurrent_mask, h_update, gradient_clip);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Result ind_autocast_step(
    const Tensor& x, const Tensor& u, const Opt& bias, const Tensor& h, const Opt& state_indices,
    Text nonlinearity, const Opt& recurrent_mask, const Opt& h_update) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  return ind_step(
      x, u, bias, *gated_autocast_state<Device>(h, x), state_indices, nonlinearity, recurrent_mask,
      h_update);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Tensor ind_autocast_step_(
    const Tensor& x, const Tensor& u, const Opt& bias, const Tensor& h, const Opt& state_indices,
    Text nonlinearity, const Opt& recurrent_mask, const Opt& h_update) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  return ind_step_(x, u, bias, h, state_indices, nonlinearity, recurrent_mask, h_update);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      torch::schema("elman(Tensor x, Tensor R, Tensor? bias=None, Tensor? initial_state=None, "
                    "str nonlinearity=\"tanh\", Tensor? cu_seqlens=None, bool reverse=False, "
                    "Tensor? reset=None, Tensor? recurrent_mask=None, Tensor? h_update=None, "
                    "Tensor? norm_weight=None, float norm_eps=1e-5, float? gradient_clip=None) -> "
                    "(Tensor y, Tensor final_state)"),
      tags);
  m.def(
      torch::schema("elman_step(Tensor x, Tensor R, Tensor? bias, Tensor state, "
                    "Tensor? state_indices=None, str nonlinearity=\"tanh\", "
                    "Tensor? recurrent_mask=None, Tensor? h_update=None, Tensor? norm_weight=None, "
                    "float norm_eps=1e-5) -> (Tensor y, Tensor state)"),
      tags);
  m.def(
      torch::schema("elman_step_(Tensor x, Tensor R, Tensor? bias, Tensor(a!) state, "
                    "Tensor? state_indices=None, str nonlinearity=\"tanh\", "
                    "Tensor? recurrent_mask=None, Tensor? h_update=None, Tensor? norm_weight=None, "
                    "float norm_eps=1e-5) -> Tensor y"),
      tags);
  m.def(
      torch::schema("ind_rnn(Tensor x, Tensor u, Tensor? bias=None, Tensor? initial_state=None, "
                    "str nonlinearity=\"relu\", Tensor? cu_seqlens=None, bool reverse=False, "
                    "Tensor? reset=None, Tensor? recurrent_mask=None, Tensor? h_update=None, "
                    "float? gradient_clip=None) -> (Tensor y, Tensor final_state)"),
      tags);
  m.def(
      torch::schema(
          "ind_rnn_step(Tensor x, Tensor u, Tensor? bias, Tensor state, "
          "Tensor? state_indices=None, str nonlinearity=\"relu\", "
          "Tensor? recurrent_mask=None, Tensor? h_update=None) -> (Tensor y, Tensor state)"),
      tags);
  m.def(
      torch::schema("ind_rnn_step_(Tensor x, Tensor u, Tensor? bias, Tensor(a!) state, "
                    "Tensor? state_indices=None, str nonlinearity=\"relu\", "
                    "Tensor? recurrent_mask=None, Tensor? h_update=None) -> Tensor y"),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("ind_rnn", &ind_forward);
  m.impl("ind_rnn_step", &ind_step);
  m.impl("ind_rnn_step_", &ind_step_);
  m.impl("elman", &forward);
  m.impl("elman_step", &step);
  m.impl("elman_step_", &step_);
}
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatchedDecomposition, m) { // else vmap would loop
  m.impl("elman", &forward);
  m.impl("elman_step", &step);
  m.impl("ind_rnn", &ind_forward);
  m.impl("ind_rnn_step", &ind_step);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) {
  m.impl("ind_rnn", &ind_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("ind_rnn_step", &ind_autocast_step<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("ind_rnn_step_", &ind_autocast_step_<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("elman", &autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("elman_step", &autocast_step<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("elman_step_", &autocast_step_<c10::DispatchKey::AutocastCPU, at::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) {
  m.impl("ind_rnn", &ind_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("ind_rnn_step", &ind_autocast_step<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("ind_rnn_step_", &ind_autocast_step_<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("elman", &autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("elman_step", &autocast_step<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("elman_step_", &autocast_step_<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

using Forward = decltype(forward);
using Step = decltype(step);
using StepInPlace = decltype(step_);
using IndForward = decltype(ind_forward);
using IndStep = decltype(ind_step);
using IndStepInPlace = decltype(ind_step_);

} // namespace

TensorPair elman(
    const Tensor& x, const Tensor& R, const OptionalTensor& bias,
    const OptionalTensor& initial_state, std::string_view nonlinearity, const GatedOptions& o) {
  static const auto op = gated_member<Forward>("elman");
  check_options("elman", o, /*step=*/false, false, true);
  return op.call(
      x, R, bias, initial_state, nonlinearity, o.cu_seqlens, o.reverse, o.reset, o.recurrent_mask,
      o.h_update, o.norm_weight, o.norm_eps, o.gradient_clip);
}
TensorPair elman_step(
    const Tensor& x, const Tensor& R, const OptionalTensor& bias, const at::Tensor& state,
    const OptionalTensor& state_indices, std::string_view nonlinearity, const GatedOptions& o) {
  static const auto op = gated_member<Step>("elman_step");
  check_options("elman_step", o, /*step=*/true, false, true);
  return op.call(
      x, R, bias, state, state_indices, nonlinearity, o.recurrent_mask, o.h_update, o.norm_weight,
      o.norm_eps);
}
Tensor elman_step_(
    const Tensor& x, const Tensor& R, const OptionalTensor& bias, at::Tensor& state,
    const OptionalTensor& state_indices, std::string_view nonlinearity, const GatedOptions& o) {
  static const auto op = gated_member<StepInPlace>("elman_step_");
  check_options("elman_step_", o, /*step=*/true, false, true);
  return op.call(
      x, R, bias, state, state_indices, nonlinearity, o.recurrent_mask, o.h_update, o.norm_weight,
      o.norm_eps);
}

TensorPair ind_rnn(
    const Tensor& x, const Tensor& u, const OptionalTensor& bias,
    const OptionalTensor& initial_state, std::string_view nonlinearity, const GatedOptions& o) {
  static const auto op = gated_member<IndForward>("ind_rnn");
  check_options("ind_rnn", o, /*step=*/false, false, false);
  return op.call(
      x, u, bias, initial_state, nonlinearity, o.cu_seqlens, o.reverse, o.reset, o.recurrent_mask,
      o.h_update, o.gradient_clip);
}
TensorPair ind_rnn_step(
    const Tensor& x, const Tensor& u, const OptionalTensor& bias, const at::Tensor& state,
    const OptionalTensor& state_indices, std::string_view nonlinearity, const GatedOptions& o) {
  static const auto op = gated_member<IndStep>("ind_rnn_step");
  check_options("ind_rnn_step", o, /*step=*/true, false, false);
  return op.call(x, u, bias, state, state_indices, nonlinearity, o.recurrent_mask, o.h_update);
}
Tensor ind_rnn_step_(
    const Tensor& x, const Tensor& u, const OptionalTensor& bias, at::Tensor& state,
    const OptionalTensor& state_indices, std::string_view nonlinearity, const GatedOptions& o) {
  static const auto op = gated_member<IndStepInPlace>("ind_rnn_step_");
  check_options("ind_rnn_step_", o, /*step=*/true, false, false);
  return op.call(x, u, bias, state, state_indices, nonlinearity, o.recurrent_mask, o.h_update);
}

} // namespace torch_ext
