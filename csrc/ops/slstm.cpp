// torch_ext::slstm, xLSTM's scalar memory (csrc/cells/slstm.h has its equations): a cell of the gated family.
#include "gated.h"
#include "torch_ext/ops.h"

namespace torch_ext {
namespace {

using Text = c10::string_view;
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>; // y, h, c, n, m

Gated arguments(
    const char* op, const Tensor& x, const Opt& R, const Opt& bias, const Opt& h, const Opt& c,
    const Opt& n, const Opt& m, Text forget_gate, Text normalizer, const Opt& recurrent_mask,
    const Opt& h_update, const Opt& norm_weight, double norm_eps) {
  Gated g;
  g.op = op;
  g.x = x, g.R = R, g.bias = bias;
  g.h = h;
  g.c = c;
  g.n = n;
  g.m = m;
  TORCH_CHECK_VALUE(
      forget_gate == "sigmoid" || forget_gate == "exp", op, ": forget_gate is '", forget_gate,
      "', expected 'sigmoid' or 'exp'");
  TORCH_CHECK_VALUE(
      normalizer == "sum" || normalizer == "at_least_one", op, ": normalizer is '", normalizer,
      "', expected 'sum' or 'at_least_one'");
  g.cell = GatedCells::index<Slstm>();
  g.flags = (forget_gate == "exp" ? Slstm::kExpForget : 0) |
            (normalizer == "sum" ? 0 : Slstm::kAtLeastOne);
  g.recurrent_mask = recurrent_mask;
  g.h_update = h_update;
  g.norm_weight = norm_weight;
  g.norm_eps = norm_eps;
  return g;
}

Result forward(
    const Tensor& x, const Tensor& R, const Opt& bias, const Opt& h, const Opt& c, const Opt& n,
    const Opt& m, Text forget_gate, Text normalizer, const Opt& cu_seqlens, bool reverse,
    const Opt& reset, const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight,
    double norm_eps, std::optional<double> gradient_clip) {
  Gated g = arguments(
      "slstm", x, R, bias, h, c, n, m, forget_gate, normalizer, recurrent_mask, h_update,
      norm_weight, norm_eps);
  g.cu_seqlens = cu_seqlens, g.reset = reset_of_heads(g.op, reset, *g.x);
  g.reverse = reverse, g.gradient_clip = gradient_clip;
  const GatedOutputs out = call_gated(g);
  return {out.y, out.h, out.c, out.n, out.m};
}
Result step(
    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Tensor& c,
    const Tensor& n, const Tensor& m, const Opt& state_indices, Text forget_gate, Text normalizer,
    const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight, double norm_eps) {
  const Gated g = arguments(
      "slstm_step", x, R, bias, h, c, n, m, forget_gate, normalizer, recurrent_mask, h_update,
      norm_weight, norm_eps);
  const GatedOutputs out = gated_step("slstm", g, state_indices);
  return {out.y, out.h, out.c, out.n, out.m};
}
Tensor step_(
    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Tensor& c,
    const Tensor& n, const Tensor& m, const Opt& state_indices, Text forget_gate, Text normalizer,
    const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight, double norm_eps) {
  return gated_step_(
      "slstm_step_",
      arguments(
          "slstm_step_", x, R, bias, h, c, n, m, forget_gate, normalizer, recurrent_mask, h_update,
          norm_weight, norm_eps),
      state_indices);
}

// x and the parameters stay what they are: x comes from a product that autocast has chosen the dtype of. States go along.
template <c10::DispatchKey Key, c10::DeviceType Device>
Result autocast(
    const Tensor& x, const Tensor& R, const Opt& bias, const Opt& h, const Opt& c, const Opt& n,
    const Opt& m, Text forget_gate, Text normalizer, const Opt& cu_seqlens, bool reverse,
    const Opt& reset, const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight,
    double norm_eps, std::optional<double> gradient_clip) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const auto cast = [&](const Opt& state) { return gated_autocast_state<Device>(state, x); };
  return forward(
      x, R, bias, cast(h), cast(c), cast(n), cast(m), forget_gate, normalizer, cu_seqlens, reverse,
      reset, recurrent_mask, h_update, norm_weight, norm_eps, gradient_clip);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Result autocast_step(
    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Tensor& c,
    const Tensor& n, const Tensor& m, const Opt& state_indices, Text forget_gate, Text normalizer,
    const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight, double norm_eps) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const auto cast = [&](const Tensor& state) { return *gated_autocast_state<Device>(state, x); };
  return step(
      x, R, bias, cast(h), cast(c), cast(n), cast(m), state_indices, forget_gate, normalizer,
      recurrent_mask, h_update, norm_weight, norm_eps);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Tensor autocast_step_( // the states are written: they have their dtype, or are refused

    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Tensor& c,
    const Tensor& n, const Tensor& m, const Opt& state_indices, Text forget_gate, Text normalizer,
    const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight, double norm_eps) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  return step_(
      x, R, bias, h, c, n, m, state_indices, forget_gate, normalizer, recurrent_mask, h_update,
      norm_weight, norm_eps);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      torch::schema(
          "slstm(Tensor x, Tensor R, Tensor? bias=None, Tensor? h=None, Tensor? c=None, Tensor? "
          "n=None, Tensor? m=None, str forget_gate=\"sigmoid\", str normalizer=\"sum\", "
          "Tensor? cu_seqlens=None, bool reverse=False, Tensor? reset=None, Tensor? "
          "recurrent_mask=None, Tensor? h_update=None, Tensor? norm_weight=None, "
          "float norm_eps=1e-5, float? gradient_clip=None) -> (Tensor y, Tensor h, Tensor "
          "c, Tensor n, Tensor m)"),
      tags);
  m.def(
      torch::schema(
          "slstm_step(Tensor x, Tensor R, Tensor? bias, Tensor h, Tensor c, Tensor n, Tensor m, "
          "Tensor? state_indices=None, str forget_gate=\"sigmoid\", str normalizer=\"sum\", "
          "Tensor? recurrent_mask=None, Tensor? h_update=None, Tensor? norm_weight=None, float "
          "norm_eps=1e-5) -> (Tensor y, Tensor h, Tensor c, Tensor n, Tensor "
          "m)"),
      tags);
  m.def(
      torch::schema("slstm_step_(Tensor x, Tensor R, Tensor? bias, Tensor(a!) h, Tensor(b!) c, "
                    "Tensor(c!) n, Tensor(d!) m, Tensor? state_indices=None, str "
                    "forget_gate=\"sigmoid\", str normalizer=\"sum\", "
                    "Tensor? recurrent_mask=None, Tensor? h_update=None, Tensor? norm_weight=None, "
                    "float norm_eps=1e-5) -> Tensor y"),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("slstm", &forward);
  m.impl("slstm_step", &step);
  m.impl("slstm_step_", &step_);
}
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatchedDecomposition, m) { // else vmap would loop
  m.impl("slstm", &forward);
  m.impl("slstm_step", &step);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) {
  m.impl("slstm", &autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("slstm_step", &autocast_step<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("slstm_step_", &autocast_step_<c10::DispatchKey::AutocastCPU, at::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) {
  m.impl("slstm", &autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("slstm_step", &autocast_step<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("slstm_step_", &autocast_step_<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

using Forward = decltype(forward);
using Step = decltype(step);
using StepInPlace = decltype(step_);

} // namespace

std::tuple<Tensor, SLSTMState> slstm(
    const Tensor& x, const Tensor& R, const OptionalTensor& bias,
    const std::optional<SLSTMState>& initial_state, std::string_view forget_gate,
    std::string_view normalizer, const GatedOptions& o) {
  static const auto op = gated_member<Forward>("slstm");
  check_options("slstm", o, /*step=*/false, false, true);
  Opt h0, c0, n0, m0;
  if (initial_state) std::tie(h0, c0, n0, m0) = *initial_state;
  const auto [y, h, c, n, m] = op.call(
      x, R, bias, h0, c0, n0, m0, forget_gate, normalizer, o.cu_seqlens, o.reverse, o.reset,
      o.recurrent_mask, o.h_update, o.norm_weight, o.norm_eps, o.gradient_clip);
  return {y, {h, c, n, m}};
}
std::tuple<Tensor, SLSTMState> slstm_step(
    const Tensor& x, const Tensor& R, const OptionalTensor& bias, const SLSTMState& state,
    const OptionalTensor& state_indices, std::string_view forget_gate, std::string_view normalizer,
    const GatedOptions& o) {
  static const auto op = gated_member<Step>("slstm_step");
  check_options("slstm_step", o, /*step=*/true, false, true);
  const auto [y, h, c, n, m] = op.call(
      x, R, bias, std::get<0>(state), std::get<1>(state), std::get<2>(state), std::get<3>(state),
      state_indices, forget_gate, normalizer, o.recurrent_mask, o.h_update, o.norm_weight,
      o.norm_eps);
  return {y, {h, c, n, m}};
}
Tensor slstm_step_(
    const Tensor& x, const Tensor& R, const OptionalTensor& bias, SLSTMState& state,
    const OptionalTensor& state_indices, std::string_view forget_gate, std::string_view normalizer,
    const GatedOptions& o) {
  static const auto op = gated_member<StepInPlace>("slstm_step_");
  check_options("slstm_step_", o, /*step=*/true, false, true);
  return op.call(
      x, R, bias, std::get<0>(state), std::get<1>(state), std::get<2>(state), std::get<3>(state),
      state_indices, forget_gate, normalizer, o.recurrent_mask, o.h_update, o.norm_weight,
      o.norm_eps);
}

} // namespace torch_ext
