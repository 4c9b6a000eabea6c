// torch_ext::gru, torch.nn.GRU's recurrence and the one of the paper (csrc/cells/gru.h): cells of the gated family.
#include "gated.h"
#include "torch_ext/ops.h"

namespace torch_ext {
namespace {

using Text = c10::string_view;
using Result = std::tuple<Tensor, Tensor>; // y, h

Gated arguments(
    const char* op, const Tensor& x, const Opt& R, const Opt& bias, const Opt& h, bool reset_after,
    const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight, double norm_eps) {
  Gated g;
  g.op = op;
  g.x = x, g.R = R, g.bias = bias;
  g.h = h;
  g.state_name =
      std::string_view(op).find("_step") == std::string_view::npos ? "initial_state" : "state";
  g.cell = reset_after ? GatedCells::index<Gru>() : GatedCells::index<GruResetBefore>();
  g.recurrent_mask = recurrent_mask;
  g.h_update = h_update;
  g.norm_weight = norm_weight;
  g.norm_eps = norm_eps;
  return g;
}

Result forward(
    const Tensor& x, const Tensor& R, const Opt& bias, const Opt& h, bool reset_after,
    const Opt& cu_seqlens, bool reverse, const Opt& reset, const Opt& recurrent_mask,
    const Opt& h_update, const Opt& norm_weight, double norm_eps,
    std::optional<double> gradient_clip) {
  Gated g =
      arguments("gru", x, R, bias, h, reset_after, recurrent_mask, h_update, norm_weight, norm_eps);
  g.cu_seqlens = cu_seqlens, g.reset = reset_of_heads(g.op, reset, *g.x);
  g.reverse = reverse, g.gradient_clip = gradient_clip;
  const GatedOutputs out = call_gated(g);
  return {out.y, out.h};
}
Result step(
    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Opt& state_indices,
    bool reset_after, const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight,
    double norm_eps) {
  const Gated g = arguments(
      "gru_step", x, R, bias, h, reset_after, recurrent_mask, h_update, norm_weight, norm_eps);
  const GatedOutputs out = gated_step("gru", g, state_indices);
  return {out.y, out.h};
}
Tensor step_(
    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Opt& state_indices,
    bool reset_after, const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight,
    double norm_eps) {
  return gated_step_(
      "gru_step_",
      arguments(
          "gru_step_", x, R, bias, h, reset_after, recurrent_mask, h_update, norm_weight, norm_eps),
      state_indices);
}

// x and the parameters stay what they are: x comes from a product that autocast has chosen the dtype of. States go along.
template <c10::DispatchKey Key, c10::DeviceType Device>
Result autocast(
    const Tensor& x, const Tensor& R, const Opt& bias, const Opt& h, bool reset_after,
    const Opt& cu_seqlens, bool reverse, const Opt& reset, const Opt& recurrent_mask,
    const Opt& h_update, const Opt& norm_weight, double norm_eps,
    std::optional<double> gradient_clip) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const auto cast = [&](const Opt& state) { return gated_autocast_state<Device>(state, x); };
  return forward(
      x, R, bias, cast(h), reset_after, cu_seqlens, reverse, reset, recurrent_mask, h_update,
      norm_weight, norm_eps, gradient_clip);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Result autocast_step(
    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Opt& state_indices,
    bool reset_after, const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight,
    double norm_eps) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const auto cast = [&](const Tensor& state) { return *gated_autocast_state<Device>(state, x); };
  return step(
      x, R, bias, cast(h), state_indices, reset_after, recurrent_mask, h_update, norm_weight,
      norm_eps);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Tensor autocast_step_( // the states are written: they have their dtype, or are refused

    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Opt& state_indices,
    bool reset_after, const Opt& recurrent_mask, const Opt& h_update, const Opt& norm_weight,
    double norm_eps) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  return step_(
      x, R, bias, h, state_indices, reset_after, recurrent_mask, h_update, norm_weight, norm_eps);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      torch::schema("gru(Tensor x, Tensor R, Tensor? bias=None, Tensor? initial_state=None, "
                    "bool reset_after=True, Tensor? cu_seqlens=None, bool reverse=False, "
                    "Tensor? reset=None, Tensor? recurrent_mask=None, Tensor? h_update=None, "
                    "Tensor? norm_weight=None, float norm_eps=1e-5, float? gradient_clip=None) -> "
                    "(Tensor y, Tensor final_state)"),
      tags);
  m.def(
      torch::schema(
          "gru_step(Tensor x, Tensor R, Tensor? bias, Tensor state, "
          "Tensor? state_indices=None, bool reset_after=True, Tensor? recurrent_mask=None, "
          "Tensor? h_update=None, Tensor? norm_weight=None, float norm_eps=1e-5) -> "
          "(Tensor y, Tensor state)"),
      tags);
  m.def(
      torch::schema(
          "gru_step_(Tensor x, Tensor R, Tensor? bias, Tensor(a!) state, "
          "Tensor? state_indices=None, bool reset_after=True, Tensor? recurrent_mask=None, "
          "Tensor? h_update=None, Tensor? norm_weight=None, float norm_eps=1e-5) -> Tensor y"),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("gru", &forward);
  m.impl("gru_step", &step);
  m.impl("gru_step_", &step_);
}
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatchedDecomposition, m) { // else vmap would loop
  m.impl("gru", &forward);
  m.impl("gru_step", &step);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) {
  m.impl("gru", &autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("gru_step", &autocast_step<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("gru_step_", &autocast_step_<c10::DispatchKey::AutocastCPU, at::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) {
  m.impl("gru", &autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("gru_step", &autocast_step<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("gru_step_", &autocast_step_<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

using Forward = decltype(forward);
using Step = decltype(step);
using StepInPlace = decltype(step_);

} // namespace

TensorPair gru(
    const Tensor& x, const Tensor& R, const OptionalTensor& bias,
    const OptionalTensor& initial_state, bool reset_after, const GatedOptions& o) {
  static const auto op = gated_member<Forward>("gru");
  check_options("gru", o, /*step=*/false, false, true);
  return op.call(
      x, R, bias, initial_state, reset_after, o.cu_seqlens, o.reverse, o.reset, o.recurrent_mask,
      o.h_update, o.norm_weight, o.norm_eps, o.gradient_clip);
}
TensorPair gru_step(
    const Tensor& x, const Tensor& R, const OptionalTensor& bias, const at::Tensor& state,
    const OptionalTensor& state_indices, bool reset_after, const GatedOptions& o) {
  static const auto op = gated_member<Step>("gru_step");
  check_options("gru_step", o, /*step=*/true, false, true);
  return op.call(
      x, R, bias, state, state_indices, reset_after, o.recurrent_mask, o.h_update, o.norm_weight,
      o.norm_eps);
}
Tensor gru_step_(
    const Tensor& x, const Tensor& R, const OptionalTensor& bias, at::Tensor& state,
    const OptionalTensor& state_indices, bool reset_after, const GatedOptions& o) {
  static const auto op = gated_member<StepInPlace>("gru_step_");
  check_options("gru_step_", o, /*step=*/true, false, true);
  return op.call(
      x, R, bias, state, state_indices, reset_after, o.recurrent_mask, o.h_update, o.norm_weight,
      o.norm_eps);
}

} // namespace torch_ext
