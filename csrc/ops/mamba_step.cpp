// torch_ext::mamba_step: one step of a whole Mamba layer in one call, made of differentiable operators. The layer:
// torch_ext/mamba.py.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/FunctionsManual.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "diagonal.h"
#include "torch_ext/ops.h"

namespace torch_ext {
namespace {

// x W^T + bias. A few rows on the CPU, without a gradient: as fast as the weights are read, where torch's product takes
// twice as long. Whatever watches operators (compilers, transforms, autocast) sees torch's.
Tensor project(const Tensor& x, const Tensor& weight, const Opt& bias = {}) {
  constexpr int64_t kFewRows = 8;
  const bool has_bias = bias && bias->defined();
  const auto plain = [&](const Tensor& t) {
    return t.is_cpu() && t.unsafeGetTensorImpl()->has_storage() && t.stride(-1) == 1 &&
           t.scalar_type() == x.scalar_type() && !t.is_neg() &&
           !t.key_set().has_any(c10::DispatchKeySet(
               {c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize}));
  };
  if (!plain(x) || x.size(0) > kFewRows || x.size(0) == 0 || !plain(weight) ||
      (has_bias && !plain(*bias)) || at::autocast::is_autocast_enabled(at::kCPU) ||
      torch::autograd::compute_requires_grad(x, weight, bias) ||
      torch::autograd::isFwGradDefined(x) || torch::autograd::isFwGradDefined(weight) ||
      torch::autograd::isFwGradDefined(bias) || torch::jit::tracer::isTracing() ||
      c10::impl::dispatch_mode_enabled())
    return at::linear(x, weight, bias);
  cpu::Projection p;
  p.rows = x.size(0), p.inputs = x.size(1), p.outputs = weight.size(0);
  p.x = x.const_data_ptr(), p.x_row = x.stride(0);
  p.weight = weight.const_data_ptr(), p.weight_row = weight.stride(0);
  if (has_bias) p.bias = bias->const_data_ptr();
  const Tensor y = at::empty(at::IntArrayRef({p.rows, p.outputs}), x.options());
  p.y = y.mutable_data_ptr();
  return cpu::project(kernel_dtype(x.scalar_type()), p, torch_threads())
             ? y
             : at::linear(x, weight, bias);
}

struct Layer {
  const Tensor& x;
  const Tensor& in_proj_weight;
  const Opt& in_proj_bias;
  const Tensor& conv_weight;
  const Opt& conv_bias;
  const Tensor& x_proj_weight;
  const Tensor& dt_proj_weight;
  const Opt& dt_proj_bias;
  const Tensor& A_log;
  const Opt& D;
  const Tensor& out_proj_weight;
  const Opt& out_proj_bias;
  const Tensor& conv_state;
  const Tensor& scan_state;
  const Opt& state_indices;

  // Those of the parts say the rest.
  void check(const char* op) const {
    const auto dims = [&](const char* name, const Tensor& t, int64_t n, const char* shape) {
      TORCH_CHECK_VALUE(
          t.dim() == n, op, ": ", name, " has shape ", shape_text(t.sym_sizes()), ", expected ",
          shape);
    };
    dims("x", x, 2, "(B, d_model)");
    dims("A_log", A_log, 2, "(d_inner, N)");
    dims("conv_weight", conv_weight, 2, "(d_inner, W)");
    dims("dt_proj_weight", dt_proj_weight, 2, "(d_inner, R)");
    dims("out_proj_weight", out_proj_weight, 2, "(d_model, d_inner)");
    const auto model = x.sym_size(1), inner = A_log.sym_size(0), states = A_log.sym_size(1),
               window = conv_weight.sym_size(1), rank = dt_proj_weight.sym_size(1);
    const auto fits = [&](const char* name, const Tensor& t,
                          std::initializer_list<const char*> letters,
                          std::initializer_list<c10::SymInt> sizes) {
      check_shape(
          op, name, t, letters, c10::SymIntArrayRef(sizes.begin(), sizes.size()),
          "as x is (B, d_model), A_log (d_inner, N), conv_weight (d_inner, W), dt_proj_weight "
          "(d_inner, R)");
    };
    const auto fits_if = [&](const char* name, const Opt& t, const char* letter,
                             const c10::SymInt& size) {
      if (t && t->defined()) fits(name, *t, {letter}, {size});
    };
    fits("in_proj_weight", in_proj_weight, {"2 d_inner", "d_model"}, {inner * 2, model});
    fits_if("in_proj_bias", in_proj_bias, "2 d_inner", inner * 2);
    fits("conv_weight", conv_weight, {"d_inner", "W"}, {inner, window});
    fits_if("conv_bias", conv_bias, "d_inner", inner);
    fits("x_proj_weight", x_proj_weight, {"R + 2 N", "d_inner"}, {rank + states * 2, inner});
    fits("dt_proj_weight", dt_proj_weight, {"d_inner", "R"}, {inner, rank});
    fits_if("dt_proj_bias", dt_proj_bias, "d_inner", inner);
    fits_if("D", D, "d_inner", inner);
    fits(
        "out_proj_weight", out_proj_weight, {"d_model", "d_inner"},
        {out_proj_weight.sym_size(0), inner});
    fits_if("out_proj_bias", out_proj_bias, "d_model", out_proj_weight.sym_size(0));
    const bool pool = state_indices && state_indices->defined();
    const auto rows = pool ? conv_state.sym_size(0) : x.sym_size(0);
    const char* of = pool ? "num_slots" : "B";
    fits("conv_state", conv_state, {of, "d_inner", "W - 1"}, {rows, inner, window - 1});
    fits("scan_state", scan_state, {of, "d_inner", "N"}, {rows, inner, states});
    check_dtypes_and_devices(op);
    if (!pool) return;
    check_index_dtype(op, "state_indices", *state_indices);
    check_index_device(op, "state_indices", *state_indices, x.device());
    check_shape(
        op, "state_indices", *state_indices, {"B"}, {x.sym_size(0)}, "one index per row of x");
  }
  // Before any part of the layer runs: the first ones write, and the names of the arguments are the layer's.
  void check_dtypes_and_devices(const char* op) const {
    const auto dtype = x.scalar_type(), wide = state_dtype(dtype);
    const bool cast = at::autocast::is_autocast_enabled(x.device().type()); // then the parts decide
    TORCH_CHECK_TYPE(
        dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
        op, ": x has dtype ", dtype_text(dtype),
        ", expected float32, float64, bfloat16 or float16");
    const auto check = [&](const char* name, const Opt& t, const char* more,
                           std::initializer_list<at::ScalarType> also) {
      if (!t || !t->defined()) return;
      check_device(op, name, *t, x.device(), "the device of x");
      bool fits = cast || t->scalar_type() == dtype;
      for (const auto other : also) fits = fits || t->scalar_type() == other;
      TORCH_CHECK_TYPE(
          fits, op, ": ", name, " has dtype ", dtype_text(t->scalar_type()), ", expected ",
          dtype_text(dtype), more, ", as x has dtype ", dtype_text(dtype));
    };
    check("in_proj_weight", in_proj_weight, "", {});
    check("in_proj_bias", in_proj_bias, "", {});
    const char* or_wide = wide == dtype ? "" : " or float32";
    check("conv_weight", conv_weight, or_wide, {wide});
    check("conv_bias", conv_bias, or_wide, {wide});
    check("x_proj_weight", x_proj_weight, "", {});
    check("dt_proj_weight", dt_proj_weight, "", {});
    check("dt_proj_bias", dt_proj_bias, or_wide, {wide});
    check("A_log", A_log, or_wide, {wide});
    check("D", D, or_wide, {wide});
    check("out_proj_weight", out_proj_weight, "", {});
    check("out_proj_bias", out_proj_bias, "", {});
    check("conv_state", conv_state, " or wider", {wide, at::kDouble});
    check_device(op, "scan_state", scan_state, x.device(), "the device of x");
    if (!cast)
      check_dtype(
          op, "scan_state", scan_state, wide,
          "the dtype of the states for x of " + dtype_text(dtype));
  }

  // conv(input) -> u and scan(u, delta, A, B, C, z) -> y change the states, or make new ones.
  template <class Conv, class Scan>
  Tensor run(Conv conv, Scan scan) const {
    const auto inner = A_log.sym_size(0), states = A_log.sym_size(1),
               rank = dt_proj_weight.sym_size(1);
    const Tensor both = project(x, in_proj_weight, in_proj_bias);
    const Tensor u = conv(both.narrow_symint(1, 0, inner));
    const Tensor all = project(u, x_proj_weight);
    const Tensor delta = project(all.narrow_symint(1, 0, rank), dt_proj_weight);
    const Tensor y = scan(
        u, delta, at::exp(A_log).neg(), all.narrow_symint(1, rank, states),
        all.narrow_symint(1, rank + states, states), both.narrow_symint(1, inner, inner));
    const Tensor out = project(y, out_proj_weight, out_proj_bias);
    if (!state_indices || !state_indices->defined()) return out;
    return at::where(state_indices->ge(0).unsqueeze(1), out, at::zeros_like(out));
  }
};

std::tuple<Tensor, Tensor, Tensor> step(
    const Tensor& x, const Tensor& in_proj_weight, const Opt& in_proj_bias,
    const Tensor& conv_weight, const Opt& conv_bias, const Tensor& x_proj_weight,
    const Tensor& dt_proj_weight, const Opt& dt_proj_bias, const Tensor& A_log, const Opt& D,
    const Tensor& out_proj_weight, const Opt& out_proj_bias, const Tensor& conv_state,
    const Tensor& scan_state, const Opt& state_indices) {
  const Layer layer{
      x,
      in_proj_weight,
      in_proj_bias,
      conv_weight,
      conv_bias,
      x_proj_weight,
      dt_proj_weight,
      dt_proj_bias,
      A_log,
      D,
      out_proj_weight,
      out_proj_bias,
      conv_state,
      scan_state,
      state_indices};
  layer.check("mamba_step");
  Tensor next_conv, next_scan;
  const Tensor y = layer.run(
      [&](const Tensor& input) {
        // The convolution's state has the dtype of its inputs, which it holds; the layer's may be wider.
        const auto [u, next] = causal_conv1d_step(
            input, conv_weight, conv_bias, conv_state.to(input.scalar_type()), state_indices,
            "silu");
        next_conv = next.to(conv_state.scalar_type());
        return u;
      },
      [&](const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
          const Tensor& z) {
        const auto [out, next] = selective_scan_step(
            u, delta, A, B, C, D, z, dt_proj_bias, scan_state, state_indices,
            /*delta_softplus=*/true);
        next_scan = next;
        return out;
      });
  return {y, next_conv, next_scan};
}

Tensor step_(
    const Tensor& x, const Tensor& in_proj_weight, const Opt& in_proj_bias,
    const Tensor& conv_weight, const Opt& conv_bias, const Tensor& x_proj_weight,
    const Tensor& dt_proj_weight, const Opt& dt_proj_bias, const Tensor& A_log, const Opt& D,
    const Tensor& out_proj_weight, const Opt& out_proj_bias, Tensor conv_state, Tensor scan_state,
    const Opt& state_indices) {
  const Layer layer{
      x,
      in_proj_weight,
      in_proj_bias,
      conv_weight,
      conv_bias,
      x_proj_weight,
      dt_proj_weight,
      dt_proj_bias,
      A_log,
      D,
      out_proj_weight,
      out_proj_bias,
      conv_state,
      scan_state,
      state_indices};
  TORCH_CHECK(
      !torch::autograd::compute_requires_grad(
          x, in_proj_weight, in_proj_bias, conv_weight, conv_bias, x_proj_weight, dt_proj_weight,
          dt_proj_bias, A_log, D, out_proj_weight, out_proj_bias, conv_state, scan_state),
      "mamba_step_: an input requires grad, but the states are written in place, where no gradient "
      "can pass; expected torch.no_grad(), or mamba_step, which is differentiable");
  layer.check("mamba_step_");
  for (const Tensor& state : {conv_state, scan_state})
    if (!state.unsafeGetTensorImpl()->has_symbolic_sizes_strides())
      check_no_overlap("mamba", state);
  return layer.run(
      [&](const Tensor& input) {
        // Here the state's dtype rules, as it is written in place.
        const auto dtype = conv_state.scalar_type();
        return causal_conv1d_step_(
                   input.to(dtype), conv_weight.to(dtype),
                   conv_bias && conv_bias->defined() ? Opt(conv_bias->to(dtype)) : Opt(),
                   conv_state, state_indices, "silu")
            .to(input.scalar_type());
      },
      [&](const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
          const Tensor& z) {
        return selective_scan_step_(
            u, delta, A, B, C, D, z, dt_proj_bias, scan_state, state_indices,
            /*delta_softplus=*/true);
      });
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const std::string layer =
      "Tensor x, Tensor in_proj_weight, Tensor? in_proj_bias, Tensor conv_weight, "
      "Tensor? conv_bias, Tensor x_proj_weight, Tensor dt_proj_weight, Tensor? dt_proj_bias, "
      "Tensor A_log, Tensor? D, Tensor out_proj_weight, Tensor? out_proj_bias, ";
  m.def(
      torch::schema(("mamba_step(" + layer +
                     "Tensor conv_state, Tensor scan_state, Tensor? state_indices=None) -> "
                     "(Tensor y, Tensor conv_state, Tensor scan_state)")
                        .c_str()),
      tags);
  m.def(
      torch::schema(("mamba_step_(" + layer +
                     "Tensor(a!) conv_state, Tensor(b!) scan_state, Tensor? state_indices=None) -> "
                     "Tensor y")
                        .c_str()),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("mamba_step", &step);
  m.impl("mamba_step_", &step_);
}
TORCH_LIBRARY_IMPL(
    torch_ext, FuncTorchBatchedDecomposition, m) { // vmap: over the operators it is made of
  m.impl("mamba_step", &step);
}

} // namespace

std::tuple<Tensor, Tensor, Tensor> mamba_step(
    const Tensor& x, const Tensor& in_proj_weight, const OptionalTensor& in_proj_bias,
    const Tensor& conv_weight, const OptionalTensor& conv_bias, const Tensor& x_proj_weight,
    const Tensor& dt_proj_weight, const OptionalTensor& dt_proj_bias, const Tensor& A_log,
    const OptionalTensor& D, const Tensor& out_proj_weight, const OptionalTensor& out_proj_bias,
    const Tensor& conv_state, const Tensor& scan_state, const OptionalTensor& state_indices) {
  return step(
      x, in_proj_weight, in_proj_bias, conv_weight, conv_bias, x_proj_weight, dt_proj_weight,
      dt_proj_bias, A_log, D, out_proj_weight, out_proj_bias, conv_state, scan_state,
      state_indices);
}
Tensor mamba_step_(
    const Tensor& x, const Tensor& in_proj_weight, const OptionalTensor& in_proj_bias,
    const Tensor& conv_weight, const OptionalTensor& conv_bias, const Tensor& x_proj_weight,
    const Tensor& dt_proj_weight, const OptionalTensor& dt_proj_bias, const Tensor& A_log,
    const OptionalTensor& D, const Tensor& out_proj_weight, const OptionalTensor& out_proj_bias,
    Tensor& conv_state, Tensor& scan_state, const OptionalTensor& state_indices) {
  return step_(
      x, in_proj_weight, in_proj_bias, conv_weight, conv_bias, x_proj_weight, dt_proj_weight,
      dt_proj_bias, A_log, D, out_proj_weight, out_proj_bias, conv_state, scan_state,
      state_indices);
}

} // namespace torch_ext
