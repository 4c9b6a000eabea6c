// torch_ext::lstm, torch.nn.LSTM's recurrence and its variants (csrc/cells/lstm.h): cells of the gated family.
#include "gated.h"
#include "torch_ext/ops.h"

namespace torch_ext {
namespace {

using Text = c10::string_view;
using Result = std::tuple<Tensor, Tensor, Tensor>; // y, h, c

Gated arguments(
    const char* op, const Tensor& x, const Opt& R, const Opt& bias, const Opt& h, const Opt& c,
    bool coupled, const Opt& peephole, const Opt& projection, const Opt& recurrent_mask,
    const Opt& h_update, const Opt& c_update, const Opt& norm_weight, const Opt& cell_norm_weight,
    const Opt& cell_norm_bias, double norm_eps) {
  Gated g;
  g.op = op;
  g.x = x, g.R = R, g.bias = bias;
  g.h = h;
  g.c = c;
  g.cell = coupled ? GatedCells::index<CoupledLstm>() : GatedCells::index<Lstm>();
  g.flags = defined(peephole) ? Lstm::kPeephole : 0;
  g.weights = peephole, g.weights_name = "peephole";
  g.projection = projection;
  g.recurrent_mask = recurrent_mask;
  g.h_update = h_update;
  g.c_update = c_update;
  g.norm_weight = norm_weight;
  g.cell_norm_weight = cell_norm_weight;
  g.cell_norm_bias = cell_norm_bias;
  g.norm_eps = norm_eps;
  return g;
}

Result forward(
    const Tensor& x, const Tensor& R, const Opt& bias, const Opt& h, const Opt& c, bool coupled,
    const Opt& peephole, const Opt& projection, const Opt& cu_seqlens, bool reverse,
    const Opt& reset, const Opt& recurrent_mask, const Opt& h_update, const Opt& c_update,
    const Opt& norm_weight, const Opt& cell_norm_weight, const Opt& cell_norm_bias, double norm_eps,
    std::optional<double> gradient_clip) {
  Gated g = arguments(
      "lstm", x, R, bias, h, c, coupled, peephole, projection, recurrent_mask, h_update, c_update,
      norm_weight, cell_norm_weight, cell_norm_bias, norm_eps);
  g.cu_seqlens = cu_seqlens, g.reset = reset_of_heads(g.op, reset, *g.x);
  g.reverse = reverse, g.gradient_clip = gradient_clip;
  const GatedOutputs out = call_gated(g);
  return {out.y, out.h, out.c};
}
Result step(
    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Tensor& c,
    const Opt& state_indices, bool coupled, const Opt& peephole, const Opt& projection,
    const Opt& recurrent_mask, const Opt& h_update, const Opt& c_update, const Opt& norm_weight,
    const Opt& cell_norm_weight, const Opt& cell_norm_bias, double norm_eps) {
  const Gated g = arguments(
      "lstm_step", x, R, bias, h, c, coupled, peephole, projection, recurrent_mask, h_update,
      c_update, norm_weight, cell_norm_weight, cell_norm_bias, norm_eps);
  const GatedOutputs out = gated_step("lstm", g, state_indices);
  return {out.y, out.h, out.c};
}
Tensor step_(
    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Tensor& c,
    const Opt& state_indices, bool coupled, const Opt& peephole, const Opt& projection,
    const Opt& recurrent_mask, const Opt& h_update, const Opt& c_update, const Opt& norm_weight,
    const Opt& cell_norm_weight, const Opt& cell_norm_bias, double norm_eps) {
  return gated_step_(
      "lstm_step_",
      arguments(
          "lstm_step_", x, R, bias, h, c, coupled, peephole, projection, recurrent_mask, h_update,
          c_update, norm_weight, cell_norm_weight, cell_norm_bias, norm_eps),
      state_indices);
}

// x and the parameters stay what they are: x comes from a product that autocast has chosen the dtype of. States go along.
template <c10::DispatchKey Key, c10::DeviceType Device>
Result autocast(
    const Tensor& x, const Tensor& R, const Opt& bias, const Opt& h, const Opt& c, bool coupled,
    const Opt& peephole, const Opt& projection, const Opt& cu_seqlens, bool reverse,
    const Opt& reset, const Opt& recurrent_mask, const Opt& h_update, const Opt& c_update,
    const Opt& norm_weight, const Opt& cell_norm_weight, const Opt& cell_norm_bias, double norm_eps,
    std::optional<double> gradient_clip) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const auto cast = [&](const Opt& state) { return gated_autocast_state<Device>(state, x); };
  return forward(
      x, R, bias, cast(h), cast(c), coupled, peephole, projection, cu_seqlens, reverse, reset,
      recurrent_mask, h_update, c_update, norm_weight, cell_norm_weight, cell_norm_bias, norm_eps,
      gradient_clip);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Result autocast_step(
    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Tensor& c,
    const Opt& state_indices, bool coupled, const Opt& peephole, const Opt& projection,
    const Opt& recurrent_mask, const Opt& h_update, const Opt& c_update, const Opt& norm_weight,
    const Opt& cell_norm_weight, const Opt& cell_norm_bias, double norm_eps) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const auto cast = [&](const Tensor& state) { return *gated_autocast_state<Device>(state, x); };
  return step(
      x, R, bias, cast(h), cast(c), state_indices, coupled, peephole, projection, recurrent_mask,
      h_update, c_update, norm_weight, cell_norm_weight, cell_norm_bias, norm_eps);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Tensor autocast_step_( // the states are written: they have their dtype, or are refused

    const Tensor& x, const Tensor& R, const Opt& bias, const Tensor& h, const Tensor& c,
    const Opt& state_indices, bool coupled, const Opt& peephole, const Opt& projection,
    const Opt& recurrent_mask, const Opt& h_update, const Opt& c_update, const Opt& norm_weight,
    const Opt& cell_norm_weight, const Opt& cell_norm_bias, double norm_eps) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  return step_(
      x, R, bias, h, c, state_indices, coupled, peephole, projection, recurrent_mask, h_update,
      c_update, norm_weight, cell_norm_weight, cell_norm_bias, norm_eps);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      torch::schema("lstm(Tensor x, Tensor R, Tensor? bias=None, Tensor? h=None, Tensor? c=None, "
                    "bool coupled=False, Tensor? peephole=None, Tensor? projection=None, "
                    "Tensor? cu_seqlens=None, bool reverse=False, Tensor? reset=None, Tensor? "
                    "recurrent_mask=None, Tensor? h_update=None, Tensor? c_update=None, Tensor? "
                    "norm_weight=None, Tensor? cell_norm_weight=None, Tensor? cell_norm_bias=None, "
                    "float norm_eps=1e-5, float? gradient_clip=None) -> (Tensor y, Tensor h, "
                    "Tensor c)"),
      tags);
  m.def(
      torch::schema(
          "lstm_step(Tensor x, Tensor R, Tensor? bias, Tensor h, Tensor c, Tensor? "
          "state_indices=None, bool coupled=False, Tensor? peephole=None, Tensor? projection=None, "
          "Tensor? recurrent_mask=None, Tensor? h_update=None, Tensor? c_update=None, Tensor? "
          "norm_weight=None, Tensor? cell_norm_weight=None, Tensor? cell_norm_bias=None, float "
          "norm_eps=1e-5) -> (Tensor y, Tensor h, Tensor c)"),
      tags);
  m.def(
      torch::schema(
          "lstm_step_(Tensor x, Tensor R, Tensor? bias, Tensor(a!) h, Tensor(b!) c, Tensor? "
          "state_indices=None, bool coupled=False, Tensor? peephole=None, Tensor? projection=None, "
          "Tensor? recurrent_mask=None, Tensor? h_update=None, Tensor? c_update=None, Tensor? "
          "norm_weight=None, Tensor? cell_norm_weight=None, Tensor? cell_norm_bias=None, float "
          "norm_eps=1e-5) -> Tensor y"),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("lstm", &forward);
  m.impl("lstm_step", &step);
  m.impl("lstm_step_", &step_);
}
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatchedDecomposition, m) { // else vmap would loop
  m.impl("lstm", &forward);
  m.impl("lstm_step", &step);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) {
  m.impl("lstm", &autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("lstm_step", &autocast_step<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("lstm_step_", &autocast_step_<c10::DispatchKey::AutocastCPU, at::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) {
  m.impl("lstm", &autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("lstm_step", &autocast_step<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("lstm_step_", &autocast_step_<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

using Forward = decltype(forward);
using Step = decltype(step);
using StepInPlace = decltype(step_);

} // namespace

std::tuple<Tensor, TensorPair> lstm(
    const Tensor& x, const Tensor& R, const OptionalTensor& bias,
    const std::optional<TensorPair>& initial_state, bool coupled, const OptionalTensor& peephole,
    const OptionalTensor& projection, const GatedOptions& o) {
  static const auto op = gated_member<Forward>("lstm");
  check_options("lstm", o, /*step=*/false, true, true);
  Opt h0, c0;
  if (initial_state) std::tie(h0, c0) = *initial_state;
  const auto [y, h, c] = op.call(
      x, R, bias, h0, c0, coupled, peephole, projection, o.cu_seqlens, o.reverse, o.reset,
      o.recurrent_mask, o.h_update, o.c_update, o.norm_weight, o.cell_norm_weight, o.cell_norm_bias,
      o.norm_eps, o.gradient_clip);
  return {y, {h, c}};
}
std::tuple<Tensor, TensorPair> lstm_step(
    const Tensor& x, const Tensor& R, const OptionalTensor& bias, const TensorPair& state,
    const OptionalTensor& state_indices, bool coupled, const OptionalTensor& peephole,
    const OptionalTensor& projection, const GatedOptions& o) {
  static const auto op = gated_member<Step>("lstm_step");
  check_options("lstm_step", o, /*step=*/true, true, true);
  const auto [y, h, c] = op.call(
      x, R, bias, std::get<0>(state), std::get<1>(state), state_indices, coupled, peephole,
      projection, o.recurrent_mask, o.h_update, o.c_update, o.norm_weight, o.cell_norm_weight,
      o.cell_norm_bias, o.norm_eps);
  return {y, {h, c}};
}
Tensor lstm_step_(
    const Tensor& x, const Tensor& R, const OptionalTensor& bias, TensorPair& state,
    const OptionalTensor& state_indices, bool coupled, const OptionalTensor& peephole,
    const OptionalTensor& projection, const GatedOptions& o) {
  static const auto op = gated_member<StepInPlace>("lstm_step_");
  check_options("lstm_step_", o, /*step=*/true, true, true);
  return op.call(
      x, R, bias, std::get<0>(state), std::get<1>(state), state_indices, coupled, peephole,
      projection, o.recurrent_mask, o.h_update, o.c_update, o.norm_weight, o.cell_norm_weight,
      o.cell_norm_bias, o.norm_eps);
}

} // namespace torch_ext
