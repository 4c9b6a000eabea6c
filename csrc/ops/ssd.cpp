// torch_ext::ssd, Mamba-2's scan (Dao and Gu 2024, https://arxiv.org/abs/2405.21060): C, B and x are queries, keys and
// values; the decay is e^(dt A), what is written is scaled by dt. A state is (B, H, P, N), the matrix memory's turned.
#include "matrix_memory.h"
#include "torch_ext/ops.h"

namespace torch_ext {
namespace {

MatrixMemoryNames names_of(bool step) {
  return {.q = "C", .k = "B", .v = "x", .C = step ? "state" : "initial_state", .K = "N", .V = "P"};
}

struct Ssd {
  MatrixMemory memory;
  Opt D, z;
  Tensor x;

  Ssd(const char* op, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
      const Tensor& C, const Opt& D, const Opt& z, const Opt& dt_bias, const Opt& state,
      const Opt& cu_seqlens, bool dt_softplus, bool reverse, bool step, const Opt& state_indices)
      : D(D), z(z), x(x) {
    const at::ScalarType dtype = x.scalar_type(), wide = state_dtype(dtype);
    const MatrixMemoryNames names = names_of(step);
    check_heads(op, names, C, B, x, step);
    check_gate(op, "dt", dt, x, /*half=*/true);
    const c10::SymInt heads = x.sym_size(-2), values = x.sym_size(-1);
    const auto parameter = [&](const char* name, const Opt& p, bool per_value) {
      if (!defined(p)) return;
      TORCH_CHECK_VALUE(
          p->layout() == at::kStrided, op, ": ", name, " has layout ", p->layout(),
          ", expected Strided");
      TORCH_CHECK_TYPE(
          p->scalar_type() == dtype || p->scalar_type() == wide, op, ": ", name, " has dtype ",
          dtype_text(p->scalar_type()), ", expected ", dtype_text(dtype),
          dtype == wide ? "" : " or float32", ", as x has dtype ", dtype_text(dtype));
      check_device(op, name, *p, x.device(), "the device of x");
      if (per_value && p->dim() == 2)
        check_shape(op, name, *p, {"H", "P"}, {heads, values}, "or (H,), as x has them");
      else
        check_shape(op, name, *p, {"H"}, {heads}, "one number per head of x");
    };
    TORCH_CHECK_TYPE(A.defined(), op, ": A is None, expected a tensor (H,)");
    parameter("A", A, false);
    parameter("D", D, true);
    parameter("dt_bias", dt_bias, false);
    if (defined(z)) {
      check_dtype(op, "z", *z, dtype, "the dtype of x");
      check_device(op, "z", *z, x.device(), "the device of x");
      if (step)
        check_shape(op, "z", *z, {"B", "H", "P"}, x.sym_sizes(), "the shape of x");
      else
        check_shape(op, "z", *z, {"B", "T", "H", "P"}, x.sym_sizes(), "the shape of x");
    }
    memory.op = op;
    memory.q = C, memory.k = B, memory.v = x;
    memory.cu_seqlens = cu_seqlens;
    memory.reverse = reverse;
    memory.wide_h = defined(D) || defined(z); // rounded once, after them
    check_cu_seqlens(op, names, memory);
    if (defined(state)) {
      const char* first = defined(state_indices) ? "num_rows"
                          : defined(cu_seqlens)  ? "num_sequences"
                                                 : "B";
      TORCH_CHECK_VALUE(
          state->dim() == 4, op, ": ", names.C, " has shape ", shape_text(state->sym_sizes()),
          ", expected (", first, ", H, P, N)");
      check_dtype(
          op, names.C, *state, wide, "the dtype of the states for x of " + dtype_text(dtype));
      const c10::SymInt rows = defined(state_indices) ? state->sym_size(0)
                               : defined(cu_seqlens)  ? cu_seqlens->sym_size(0) - 1
                                                      : x.sym_size(0);
      check_shape(
          op, names.C, *state, {first, "H", "P", "N"}, {rows, heads, values, C.sym_size(-1)},
          "the states of each sequence");
      memory.C = state->transpose(-1, -2);
    }
    check_states(op, names, memory, step, state_indices);
    Tensor time_step = dt.to(wide);
    if (defined(dt_bias)) time_step = time_step + dt_bias->to(wide);
    if (dt_softplus) time_step = at::softplus(time_step);
    memory.log_decay = time_step * A.to(wide);
    memory.input_scale = time_step;
  }

  Tensor finish(const Tensor& h) const {
    if (!defined(D) && !defined(z)) return h;
    const at::ScalarType dtype = x.scalar_type(), wide = state_dtype(dtype);
    Tensor y = h.to(wide);
    if (defined(D)) y = y + (D->dim() == 1 ? D->unsqueeze(-1) : *D).to(wide) * x.to(wide);
    if (defined(z)) y = y * at::silu(z->to(wide));
    return y.to(dtype);
  }
};

Pair forward(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& dt_bias, const Opt& initial_state, const Opt& cu_seqlens,
    bool dt_softplus, bool reverse) {
  const Ssd ssd(
      "ssd", x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, reverse,
      /*step=*/false, {});
  const MatrixMemoryOutputs out = call_matrix_memory(ssd.memory);
  return {ssd.finish(out.h), out.C.transpose(-1, -2).contiguous()};
}
Pair step(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& dt_bias, const Tensor& state, const Opt& state_indices,
    bool dt_softplus) {
  const Ssd ssd(
      "ssd_step", x, dt, A, B, C, D, z, dt_bias, state, {}, dt_softplus, /*reverse=*/false,
      /*step=*/true, state_indices);
  const MatrixMemoryOutputs out = matrix_memory_step("ssd", ssd.memory, state_indices);
  Tensor y = ssd.finish(out.h);
  if (defined(state_indices)) // rows without a state
    y = at::where(
        state_indices->to(x.device()).ge(0).unsqueeze(-1).unsqueeze(-1), y, at::zeros_like(y));
  return {y, out.C.transpose(-1, -2).contiguous()};
}
Tensor step_(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& dt_bias, const Tensor& state, const Opt& state_indices,
    bool dt_softplus) {
  const auto or_none = [](const Opt& t) { return t.value_or(Tensor()); };
  check_no_grad("ssd_step_", {x, dt, A, B, C, or_none(D), or_none(z), or_none(dt_bias), state});
  const Ssd ssd(
      "ssd_step_", x, dt, A, B, C, D, z, dt_bias, state, {}, dt_softplus, /*reverse=*/false,
      /*step=*/true, state_indices);
  const Tensor y = ssd.finish(call_matrix_memory_step_(ssd.memory, state_indices));
  if (!defined(state_indices)) return y;
  return at::where(
      state_indices->to(x.device()).ge(0).unsqueeze(-1).unsqueeze(-1), y, at::zeros_like(y));
}

template <c10::DeviceType Device>
struct AutocastArguments {
  Tensor x, dt, A, B, C;
  Opt D, z, dt_bias;
  at::ScalarType wide;

  AutocastArguments(
      const Tensor& x0, const Tensor& dt0, const Tensor& A0, const Tensor& B0, const Tensor& C0,
      const Opt& D0, const Opt& z0, const Opt& dt_bias0)
      : x(x0), B(B0), C(C0) {
    autocast_together<Device>(x, B, C);
    wide = state_dtype(x.scalar_type());
    dt = *cast(dt0, wide), A = *cast(A0, wide), D = cast(D0, wide);
    z = cast(z0, x.scalar_type()), dt_bias = cast(dt_bias0, wide);
  }
  static Opt cast(const Opt& t, at::ScalarType dtype) {
    return defined(t) ? Opt(at::autocast::cached_cast(dtype, *t, Device)) : Opt();
  }
};
template <c10::DispatchKey Key, c10::DeviceType Device>
Pair autocast(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& dt_bias, const Opt& initial_state, const Opt& cu_seqlens,
    bool dt_softplus, bool reverse) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const AutocastArguments<Device> a(x, dt, A, B, C, D, z, dt_bias);
  return forward(
      a.x, a.dt, a.A, a.B, a.C, a.D, a.z, a.dt_bias, a.cast(initial_state, a.wide), cu_seqlens,
      dt_softplus, reverse);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Pair autocast_step(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& dt_bias, const Tensor& state, const Opt& state_indices,
    bool dt_softplus) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const AutocastArguments<Device> a(x, dt, A, B, C, D, z, dt_bias);
  return step(
      a.x, a.dt, a.A, a.B, a.C, a.D, a.z, a.dt_bias,
      at::autocast::cached_cast(a.wide, state, Device), state_indices, dt_softplus);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Tensor autocast_step_( // the state is written: it has its dtype, or is refused
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& dt_bias, const Tensor& state, const Opt& state_indices,
    bool dt_softplus) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const AutocastArguments<Device> a(x, dt, A, B, C, D, z, dt_bias);
  return step_(a.x, a.dt, a.A, a.B, a.C, a.D, a.z, a.dt_bias, state, state_indices, dt_softplus);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      torch::schema(
          "ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
          "Tensor? z=None, Tensor? dt_bias=None, Tensor? initial_state=None, "
          "Tensor? cu_seqlens=None, bool dt_softplus=False, bool reverse=False) -> (Tensor y, "
          "Tensor final_state)"),
      tags);
  m.def(
      torch::schema(
          "ssd_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
          "Tensor? dt_bias, Tensor state, Tensor? state_indices=None, bool dt_softplus=False) -> "
          "(Tensor y, Tensor state)"),
      tags);
  m.def(
      torch::schema(
          "ssd_step_(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
          "Tensor? dt_bias, Tensor(a!) state, Tensor? state_indices=None, "
          "bool dt_softplus=False) -> Tensor y"),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("ssd", &forward);
  m.impl("ssd_step", &step);
  m.impl("ssd_step_", &step_);
}
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatchedDecomposition, m) { // else vmap would loop
  m.impl("ssd", &forward);
  m.impl("ssd_step", &step);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) {
  m.impl("ssd", &autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("ssd_step", &autocast_step<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("ssd_step_", &autocast_step_<c10::DispatchKey::AutocastCPU, at::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) {
  m.impl("ssd", &autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("ssd_step", &autocast_step<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("ssd_step_", &autocast_step_<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

using Forward = decltype(forward);
using Step = decltype(step);
using StepInPlace = decltype(step_);

} // namespace

TensorPair ssd(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
    const OptionalTensor& initial_state, bool dt_softplus, const OptionalTensor& cu_seqlens,
    bool reverse) {
  static const auto op = member<Forward>("ssd");
  return op.call(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, reverse);
}
TensorPair ssd_step(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
    const Tensor& state, const OptionalTensor& state_indices, bool dt_softplus) {
  static const auto op = member<Step>("ssd_step");
  return op.call(x, dt, A, B, C, D, z, dt_bias, state, state_indices, dt_softplus);
}
Tensor ssd_step_(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias, Tensor& state,
    const OptionalTensor& state_indices, bool dt_softplus) {
  static const auto op = member<StepInPlace>("ssd_step_");
  return op.call(x, dt, A, B, C, D, z, dt_bias, state, state_indices, dt_softplus);
}

} // namespace torch_ext
