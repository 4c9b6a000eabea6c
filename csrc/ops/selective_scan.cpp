// torch_ext::selective_scan: checks, Meta, CPU and CUDA kernels, derivatives of every order and mode, autocast, steps. The
// kernels: csrc/cpu/selective_scan.h, csrc/cuda/selective_scan.cuh. What it shares with the other recurrences (threads,
// offsets, rows of a pool): diagonal.h.
//
// The operator has a third output, the states from which the backward starts again: empty unless `checkpoints` asks for
// them, as the autograd kernel does when it records. A backward without them makes them first.
#include "../core/selective_scan_problem.h"
#include "diagonal.h"
#include "torch_ext/ops.h"
#ifdef TORCH_EXT_CUDA
#include "../cuda/selective_scan.h"
#endif

namespace torch_ext {
namespace {

constexpr const char* kName = "selective_scan";
using Three = std::tuple<Tensor, Tensor, Tensor>; // y, final state, checkpoints
// Of u, delta, A, B, C, D, z, delta_bias, initial state.
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
constexpr size_t kGradients = std::tuple_size_v<Gradients>;
using at::SymInt;

// The arguments of every one of the operators.
struct Arguments {
  Tensor u, delta, A, B, C;
  Opt D, z, delta_bias, state, cu_seqlens;
  bool delta_softplus = false, reverse = false;

  bool complex() const { return A.is_complex(); }
  at::ScalarType wide() const { return state_dtype(u.scalar_type()); }
  at::ScalarType state_type() const { return complex() ? at::toComplexType(wide()) : wide(); }
  // Of B and C as kernels read them. Without time, in a step, there is no constant one.
  at::ScalarType coefficient_type(const Tensor& c, bool step) const {
    return complex() || (!step && c.dim() == 2) ? state_type() : u.scalar_type();
  }
  SymInt rows() const { return defined(cu_seqlens) ? cu_seqlens->sym_size(0) - 1 : u.sym_size(0); }
  variable_list differentiable() const {
    return {
        u,
        delta,
        A,
        B,
        C,
        D.value_or(Tensor()),
        z.value_or(Tensor()),
        delta_bias.value_or(Tensor()),
        state.value_or(Tensor())};
  }
};

// ---- calls through the dispatcher ----

Three call(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Opt& initial_state,
    const Opt& cu_seqlens, bool delta_softplus, bool reverse, bool checkpoints) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::selective_scan", "")
                             .typed<decltype(call)>();
  return op.call(
      u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse,
      checkpoints);
}
Three call(const Arguments& x, bool checkpoints) {
  return call(
      x.u, x.delta, x.A, x.B, x.C, x.D, x.z, x.delta_bias, x.state, x.cu_seqlens, x.delta_softplus,
      x.reverse, checkpoints);
}
Gradients call_backward(
    const Opt& grad_y, const Opt& grad_final_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const Opt& D, const Opt& z,
    const Opt& delta_bias, const Opt& initial_state, const Tensor& checkpoints,
    const Opt& cu_seqlens, bool delta_softplus, bool reverse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::selective_scan_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(
      grad_y, grad_final_state, u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints,
      cu_seqlens, delta_softplus, reverse);
}
Gradients call_backward(
    const Opt& grad_y, const Opt& grad_final_state, const Arguments& x, const Tensor& checkpoints) {
  return call_backward(
      grad_y, grad_final_state, x.u, x.delta, x.A, x.B, x.C, x.D, x.z, x.delta_bias, x.state,
      checkpoints, x.cu_seqlens, x.delta_softplus, x.reverse);
}
Tensor call_step_(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Tensor& state,
    const Opt& state_indices, bool delta_softplus) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::selective_scan_step_", "")
                             .typed<decltype(call_step_)>();
  return op.call(u, delta, A, B, C, D, z, delta_bias, state, state_indices, delta_softplus);
}
Pair call_step(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Tensor& state,
    const Opt& state_indices, bool delta_softplus) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::selective_scan_step", "")
                             .typed<decltype(call_step)>();
  return op.call(u, delta, A, B, C, D, z, delta_bias, state, state_indices, delta_softplus);
}

// ---- checks ----

// What both forms have in common; `step`: without time.
void check_parameters(const char* op, const Arguments& x, bool step) {
  const at::ScalarType dtype = x.u.scalar_type(), wide = x.wide();
  const SymInt width = x.u.sym_size(-1);
  TORCH_CHECK_TYPE(
      x.A.scalar_type() == dtype || x.A.scalar_type() == wide ||
          (wide == dtype && x.A.scalar_type() == at::toComplexType(wide)),
      op, ": A has dtype ", dtype_text(x.A.scalar_type()), ", expected ", dtype_text(dtype),
      wide == dtype ? " or " + dtype_text(at::toComplexType(wide)) : " or float32",
      ", as u has dtype ", dtype_text(dtype));
  check_device(op, "A", x.A, x.u.device(), "the device of u");
  TORCH_CHECK_VALUE(
      x.A.dim() == 2 && equal(x.A.sym_size(0), width), op, ": A has shape ",
      shape_text(x.A.sym_sizes()), ", expected (D=", width,
      ", N), the states of each channel of u");
  const SymInt states = x.A.sym_size(1);
  TORCH_CHECK_VALUE(
      states.sym_ge(1).expect_true(__FILE__, __LINE__), op, ": A has shape ",
      shape_text(x.A.sym_sizes()), ", expected (D=", width, ", N) with at least one state, N >= 1");

  const auto check_coefficient = [&](const char* name, const Tensor& c) {
    TORCH_CHECK_TYPE(
        c.defined(), op, ": ", name, " has dtype None, expected ", dtype_text(x.state_type()));
    check_device(op, name, c, x.u.device(), "the device of u");
    if (!step && c.dim() == 2) {
      TORCH_CHECK_TYPE(
          c.scalar_type() == x.state_type() || (!x.complex() && c.scalar_type() == dtype), op, ": ",
          name, " has dtype ", dtype_text(c.scalar_type()), ", expected ",
          dtype_text(x.state_type()), ", the dtype of the states, as it is constant in time");
      check_shape(op, name, c, {"D", "N"}, {width, states}, "the shape of A, or one with time");
      return;
    }
    check_dtype(
        op, name, c, x.complex() ? x.state_type() : dtype,
        x.complex() ? "complex like A" : "the dtype of u");
    const int64_t before = step ? 1 : 2; // B and T
    TORCH_CHECK_VALUE(
        c.dim() == before + 1 || c.dim() == before + 2, op, ": ", name, " has shape ",
        shape_text(c.sym_sizes()), ", expected ",
        step ? "(B, N) or (B, G, N)" : "(B, T, N), (B, T, G, N) or (D, N)");
    const bool grouped = c.dim() == before + 2;
    const SymInt batch = x.u.sym_size(0), groups = grouped ? c.sym_size(-2) : SymInt(1);
    if (step && grouped)
      check_shape(op, name, c, {"B", "G", "N"}, {batch, groups, states}, "as u and A have it");
    else if (step)
      check_shape(op, name, c, {"B", "N"}, {batch, states}, "as u and A have it");
    else if (grouped)
      check_shape(
          op, name, c, {"B", "T", "G", "N"}, {batch, x.u.sym_size(1), groups, states},
          "as u and A have it");
    else
      check_shape(
          op, name, c, {"B", "T", "N"}, {batch, x.u.sym_size(1), states}, "as u and A have it");
    TORCH_CHECK_VALUE(
        groups.sym_ge(1).expect_true(__FILE__, __LINE__) && equal(width % groups, 0), op, ": ",
        name, " has shape ", shape_text(c.sym_sizes()), ", expected a number of groups, G=", groups,
        ", that divides D=", width, ", the channels of u");
  };
  check_coefficient("B", x.B);
  check_coefficient("C", x.C);

  const auto check_vector = [&](const char* name, const Opt& v) {
    if (!defined(v)) return;
    TORCH_CHECK_TYPE(
        v->scalar_type() == dtype || v->scalar_type() == wide, op, ": ", name, " has dtype ",
        dtype_text(v->scalar_type()), ", expected ", dtype_text(dtype),
        wide == dtype ? "" : " or float32", ", as u has dtype ", dtype_text(dtype));
    check_device(op, name, *v, x.u.device(), "the device of u");
    check_shape(op, name, *v, {"D"}, {width}, "one number per channel of u");
  };
  check_vector("D", x.D);
  check_vector("delta_bias", x.delta_bias);
}

at::ArrayRef<const char*> names_of(const Arguments& x) {
  static constexpr std::array names{"u", "delta", "z"};
  return {names.data(), defined(x.z) ? size_t(3) : size_t(2)};
}
std::vector<Tensor> over_time(const Arguments& x) {
  return defined(x.z) ? std::vector<Tensor>{x.u, x.delta, *x.z} : std::vector<Tensor>{x.u, x.delta};
}

void check(const Arguments& x) {
  check_sequences(
      kName, names_of(x), over_time(x), /*complex=*/false, /*initial_state=*/{}, x.cu_seqlens);
  check_parameters(kName, x, /*step=*/false);
  if (!defined(x.state)) return;
  check_dtype(
      kName, "initial_state", *x.state, x.state_type(),
      "the dtype of the states for u of " + dtype_text(x.u.scalar_type()) + " and this A");
  check_device(kName, "initial_state", *x.state, x.u.device(), "the device of u");
  check_shape(
      kName, "initial_state", *x.state, {defined(x.cu_seqlens) ? "num_sequences" : "B", "D", "N"},
      {x.rows(), x.u.sym_size(2), x.A.sym_size(1)}, "one state per sequence");
}

void check_step(const Arguments& x, const Opt& state_indices) {
  constexpr const char* op = "selective_scan_step";
  check_inputs(op, names_of(x), over_time(x), /*complex=*/false, {"B", "D"});
  check_parameters(op, x, /*step=*/true);
  const Tensor& state = *x.state;
  check_dtype(
      op, "state", state, x.state_type(),
      "the dtype of the states for u of " + dtype_text(x.u.scalar_type()) + " and this A");
  check_device(op, "state", state, x.u.device(), "the device of u");
  const SymInt width = x.u.sym_size(1), states = x.A.sym_size(1);
  if (!defined(state_indices))
    return check_shape(
        op, "state", state, {"B", "D", "N"}, {x.u.sym_size(0), width, states},
        "the states of each row of u");
  check_index_dtype(op, "state_indices", *state_indices);
  check_index_device(op, "state_indices", *state_indices, x.u.device());
  check_shape(
      op, "state_indices", *state_indices, {"B"}, {x.u.sym_size(0)}, "one index per row of u");
  TORCH_CHECK_VALUE(
      state.dim() == 3 && equal(state.sym_size(1), width) && equal(state.sym_size(2), states), op,
      ": state has shape ", shape_text(state.sym_sizes()), ", expected (num_rows, D=", width,
      ", N=", states, "), a pool of states for u and A");
}

// ---- Meta: checks and output shapes; kernels begin with it ----

SymInt checkpoint_count(const Arguments& x) {
  const SymInt steps = x.u.sym_size(1);
  const int64_t interval =
      selective_scan_interval(x.A.sym_size(1).guard_int(__FILE__, __LINE__), x.complex());
  const SymInt kept = defined(x.cu_seqlens) ? steps / interval + x.rows()
                                            : x.rows() * ((steps + (interval - 1)) / interval);
  return kept * x.u.sym_size(2) * x.A.sym_size(1);
}

Three empty_outputs(const Arguments& x, bool checkpoints) {
  check(x);
  const auto options = x.u.options().dtype(x.state_type());
  return {
      at::empty_symint(x.u.sym_sizes(), x.u.options()),
      at::empty_symint({x.rows(), x.u.sym_size(2), x.A.sym_size(1)}, options),
      at::empty_symint({checkpoints ? checkpoint_count(x) : SymInt(0)}, options)};
}

Gradients empty_gradients(
    const Opt& grad_y, const Opt& grad_final_state, const Arguments& x, const Tensor& checkpoints) {
  constexpr const char* op = "selective_scan_backward";
  check(x);
  const SymInt width = x.u.sym_size(2), states = x.A.sym_size(1);
  if (defined(grad_y))
    check_shape(op, "grad_y", *grad_y, {"B", "T", "D"}, x.u.sym_sizes(), "the shape of u");
  if (defined(grad_final_state))
    check_shape(
        op, "grad_final_state", *grad_final_state, {"B", "D", "N"}, {x.rows(), width, states},
        "the shape of the state");
  check_dtype(op, "kept", checkpoints, x.state_type(), "the dtype of the states");
  const SymInt count = checkpoint_count(x);
  TORCH_CHECK_VALUE(
      checkpoints.sym_numel().sym_eq(0).guard_bool(__FILE__, __LINE__) ||
          equal(checkpoints.sym_numel(), count),
      op, ": kept has ", checkpoints.sym_numel(), " elements, expected ", count,
      " from selective_scan with checkpoints=True and the same arguments, or none");
  const auto like = [](const Tensor& t) { return at::empty_symint(t.sym_sizes(), t.options()); };
  const auto vector = [&](const Opt& v) {
    return defined(v) ? like(*v) : at::empty_symint({width}, x.u.options().dtype(x.wide()));
  };
  return {
      like(x.u),
      like(x.delta),
      like(x.A),
      like(x.B),
      like(x.C),
      vector(x.D),
      defined(x.z) ? like(*x.z) : at::empty_symint({0}, x.u.options()),
      vector(x.delta_bias),
      at::empty_symint({x.rows(), width, states}, x.u.options().dtype(x.state_type()))};
}

// ---- kernels ----

template <class Data>
Data data_of(const Tensor& t) {
  if constexpr (std::is_const_v<std::remove_pointer_t<Data>>)
    return t.const_data_ptr();
  else
    return t.mutable_data_ptr();
}
template <class Data>
OverTime<Data> over_time(const Tensor& t) { // (B, T, D), or (B, D) for one step
  const bool step = t.dim() == 2;
  return {data_of<Data>(t), t.stride(0), step ? 0 : t.stride(1), t.stride(-1)};
}
template <class Data>
OverStates<Data> over_states(const Tensor& t) { // (rows, D, N) or (D, N)
  return {data_of<Data>(t), t.dim() == 3 ? t.stride(0) : 0, t.stride(-2), t.stride(-1)};
}
template <class Data>
OverChannels<Data> over_channels(const Tensor& t) {
  return {data_of<Data>(t), t.stride(0)};
}
template <class Data>
Coefficient<Data> coefficient(const Tensor& t, bool step) {
  Coefficient<Data> c;
  c.data = data_of<Data>(t);
  c.state = t.stride(-1);
  const int64_t before = step ? 1 : 2;
  if (!step && t.dim() == 2) {
    c.constant = true;
    c.channel = t.stride(0);
    return c;
  }
  c.sequence = t.stride(0);
  c.time = step ? 0 : t.stride(1);
  c.group = t.dim() == before + 2 ? t.stride(-2) : 0;
  return c;
}
// B and C may have different numbers of groups: of both, every channel's is the group in the finer division, if one
// divides the other; else each channel is a group of its own.
int64_t groups_of(const Tensor& t, bool step) { return t.dim() == (step ? 3 : 4) ? t.size(-2) : 1; }
Tensor with_groups(const Tensor& t, int64_t groups, bool step) {
  const int64_t own = groups_of(t, step);
  if (own == groups || (!step && t.dim() == 2)) return t;
  const Tensor grouped = own == 1 && t.dim() == (step ? 2 : 3) ? t.unsqueeze(-2) : t;
  return grouped.repeat_interleave(groups / own, -2);
}

// The arguments as kernels read them; alive while a kernel runs.
struct Prepared {
  Arguments x;
  Tensor offsets;
  bool step;
  int64_t groups;

  Prepared(const Arguments& given, bool one_step) : x(given), step(one_step) {
    const auto wide_vector = [&](Opt& v) {
      if (defined(v)) v = v->to(x.wide());
    };
    x.A = x.A.to(x.state_type()).resolve_conj();
    x.B = x.B.to(x.coefficient_type(x.B, step)).resolve_conj();
    x.C = x.C.to(x.coefficient_type(x.C, step)).resolve_conj();
    wide_vector(x.D);
    wide_vector(x.delta_bias);
    if (defined(x.state)) x.state = x.state->resolve_conj();
    const int64_t of_b = groups_of(x.B, step), of_c = groups_of(x.C, step);
    groups = std::max(of_b, of_c);
    if (groups % of_b || groups % of_c) groups = x.u.size(-1);
    x.B = with_groups(x.B, groups, step);
    x.C = with_groups(x.C, groups, step);
    if (defined(x.cu_seqlens))
      offsets = sequence_offsets(kName, *x.cu_seqlens, x.u.size(1), x.u.device());
  }
  DType dtype() const { return kernel_dtype(x.complex() ? x.state_type() : x.u.scalar_type()); }
  void describe(SelectiveScanProblem& p) const {
    p.num_sequences = offsets.defined() ? offsets.size(0) - 1 : x.u.size(0);
    p.num_steps = step ? 1 : x.u.size(1);
    p.width = x.u.size(-1);
    p.num_states = x.A.size(1);
    p.num_groups = groups;
    if (offsets.defined()) p.cu_seqlens = offsets.const_data_ptr<int64_t>();
    p.reverse = x.reverse;
    p.delta_softplus = x.delta_softplus;
    p.u = over_time<const void*>(x.u);
    p.delta = over_time<const void*>(x.delta);
    if (defined(x.z)) p.z = over_time<const void*>(*x.z);
    p.A = over_states<const void*>(x.A);
    p.B = coefficient<const void*>(x.B, step);
    p.C = coefficient<const void*>(x.C, step);
    if (defined(x.D)) p.D = over_channels<const void*>(*x.D);
    if (defined(x.delta_bias)) p.delta_bias = over_channels<const void*>(*x.delta_bias);
    if (defined(x.state)) p.initial_state = over_states<const void*>(*x.state);
  }
};

// launch(dtype, problem): the device's driver.
template <class Launch>
Three forward_on(Launch launch, const Arguments& x, bool checkpoints) {
  auto [y, final_state, kept] = empty_outputs(x, checkpoints);
  const Prepared prepared(x, /*one_step=*/false);
  SelectiveScanForward p;
  prepared.describe(p);
  p.out = over_time<void*>(y);
  p.final_state = over_states<void*>(final_state);
  if (checkpoints) p.checkpoints = kept.mutable_data_ptr();
  launch(prepared.dtype(), p);
  return {y, final_state, kept};
}

template <class Launch>
Gradients backward_on(
    Launch launch, const Opt& grad_y, const Opt& grad_final_state, const Arguments& x,
    const Tensor& checkpoints) {
  const Tensor& u = x.u;
  auto [du, ddelta, dA, dB, dC, dD, dz, dbias, dstate] =
      empty_gradients(grad_y, grad_final_state, x, checkpoints);
  Tensor kept = checkpoints;
  if (kept.numel() == 0) kept = std::get<2>(call(x, /*checkpoints=*/true));
  const Prepared prepared(x, /*one_step=*/false);
  const Opt gy = defined(grad_y) ? Opt(grad_y->to(u.scalar_type())) : Opt();
  const Opt gs =
      defined(grad_final_state) ? Opt(grad_final_state->to(x.state_type()).resolve_conj()) : Opt();
  SelectiveScanBackward p;
  prepared.describe(p);
  p.checkpoints = kept.const_data_ptr();
  if (defined(gy)) p.grad_out = over_time<const void*>(*gy);
  if (defined(gs)) p.grad_final_state = over_states<const void*>(*gs);
  p.grad_u = over_time<void*>(du);
  p.grad_delta = over_time<void*>(ddelta);
  if (defined(x.z)) p.grad_z = over_time<void*>(dz);
  // Sums are made in the dtypes and groups that kernels read.
  const auto like = [](const Tensor& t) {
    return at::empty(t.sizes(), t.options().memory_format(at::MemoryFormat::Contiguous));
  };
  const Tensor wide_A = like(prepared.x.A), wide_B = like(prepared.x.B),
               wide_C = like(prepared.x.C),
               wide_D = at::empty({u.size(2)}, u.options().dtype(x.wide())),
               wide_bias = at::empty_like(wide_D);
  p.grad_A = over_states<void*>(wide_A);
  p.grad_B = coefficient<void*>(wide_B, false);
  p.grad_C = coefficient<void*>(wide_C, false);
  p.grad_D = over_channels<void*>(wide_D);
  p.grad_delta_bias = over_channels<void*>(wide_bias);
  p.grad_initial_state = over_states<void*>(dstate);
  launch(prepared.dtype(), p);
  if (u.size(2) == 0) wide_B.zero_(), wide_C.zero_(); // sums over no channels
  const auto back = [&](const Tensor& sum, const Tensor& like) {
    Tensor folded = sum;
    if (sum.sizes() != like.sizes()) {
      const int64_t own = groups_of(like, false);
      folded = sum.unflatten(-2, {own, sum.size(-2) / own}).sum(-2);
      if (like.dim() == 3) folded = folded.squeeze(-2);
    }
    return folded.to(like.scalar_type());
  };
  return {
      du,
      ddelta,
      wide_A.to(dA.scalar_type()),
      back(wide_B, dB),
      back(wide_C, dC),
      wide_D.to(dD.scalar_type()),
      dz,
      wide_bias.to(dbias.scalar_type()),
      dstate};
}

// One step for every row, in place in the pool of states.
template <class Launch>
Tensor step_on(Launch launch, const Arguments& x, const Opt& state_indices) {
  const Tensor &u = x.u, &state = *x.state;
  check_step(x, state_indices);
  check_no_overlap(kName, state);
  const Tensor rows = state_rows(kName, state_indices, u.size(0), state.size(0), u.device());
  const Prepared prepared(x, /*one_step=*/true);
  const Tensor& pool = *prepared.x.state; // the state itself, unless it is a conjugate view
  Tensor y = at::empty(u.sizes(), u.options());
  SelectiveScanForward p;
  prepared.describe(p);
  if (rows.defined()) p.state_rows = rows.const_data_ptr<int64_t>();
  p.out = over_time<void*>(y);
  p.final_state = over_states<void*>(pool);
  launch(prepared.dtype(), p);
  if (!pool.is_same(state)) state.copy_(pool);
  return y;
}

struct OnCpu {
  explicit OnCpu(const Tensor&) {}
  void operator()(DType dtype, const SelectiveScanForward& p) const {
    TORCH_INTERNAL_ASSERT(cpu::selective_scan_forward(dtype, p, torch_threads()));
  }
  void operator()(DType dtype, const SelectiveScanBackward& p) const {
    TORCH_INTERNAL_ASSERT(cpu::selective_scan_backward(dtype, p, torch_threads()));
  }
};
#ifdef TORCH_EXT_CUDA
struct OnCuda {
  c10::cuda::OptionalCUDAGuard guard;
  explicit OnCuda(const Tensor& u) {
    if (u.defined() && u.is_cuda()) guard.set_device(u.device()); // else the checks will tell
  }
  template <class Problem>
  void operator()(DType dtype, const Problem& p) const {
    // Given back when this returns: the caching allocator hands it out again in the order of the stream.
    const Tensor workspace = at::empty(
        {cuda::selective_scan_workspace(dtype, p)}, at::device(at::kCUDA).dtype(at::kByte));
    cuda::selective_scan(
        dtype, p, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};
#endif

template <class Device>
Three forward_kernel(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Opt& initial_state,
    const Opt& cu_seqlens, bool delta_softplus, bool reverse, bool checkpoints) {
  const Arguments x{u,          delta,          A,      B, C, D, z, delta_bias, initial_state,
                    cu_seqlens, delta_softplus, reverse};
  const Device device(u);
  return forward_on([&](auto dtype, const auto& p) { device(dtype, p); }, x, checkpoints);
}
template <class Device>
Gradients backward_kernel(
    const Opt& grad_y, const Opt& grad_final_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const Opt& D, const Opt& z,
    const Opt& delta_bias, const Opt& initial_state, const Tensor& checkpoints,
    const Opt& cu_seqlens, bool delta_softplus, bool reverse) {
  const Arguments x{u,          delta,          A,      B, C, D, z, delta_bias, initial_state,
                    cu_seqlens, delta_softplus, reverse};
  const Device device(u);
  return backward_on(
      [&](auto dtype, const auto& p) { device(dtype, p); }, grad_y, grad_final_state, x,
      checkpoints);
}
template <class Device>
Tensor step_kernel_(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Tensor& state,
    const Opt& state_indices, bool delta_softplus) {
  const Device device(u);
  return step_on(
      [&](auto dtype, const auto& p) { device(dtype, p); },
      {u, delta, A, B, C, D, z, delta_bias, state, {}, delta_softplus}, state_indices);
}

// ---- Meta ----

Three meta(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Opt& initial_state,
    const Opt& cu_seqlens, bool delta_softplus, bool reverse, bool checkpoints) {
  return empty_outputs(
      {u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse},
      checkpoints);
}
Gradients meta_backward(
    const Opt& grad_y, const Opt& grad_final_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const Opt& D, const Opt& z,
    const Opt& delta_bias, const Opt& initial_state, const Tensor& checkpoints,
    const Opt& cu_seqlens, bool delta_softplus, bool reverse) {
  return empty_gradients(
      grad_y, grad_final_state,
      {u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse},
      checkpoints);
}
Tensor meta_step_(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Tensor& state,
    const Opt& state_indices, bool delta_softplus) {
  check_step({u, delta, A, B, C, D, z, delta_bias, state, {}, delta_softplus}, state_indices);
  return at::empty_symint(u.sym_sizes(), u.options());
}

// ---- the same as differentiable tensor code: a linear scan over all channels' states ----

// A (B, T, D, N) tensor of B or C.
Tensor for_every_channel(const Tensor& c, const SymInt& width) {
  if (c.dim() == 2) return c.unsqueeze(0).unsqueeze(0);
  if (c.dim() == 3) return c.unsqueeze(2);
  const SymInt groups = c.sym_size(2), own = width / groups;
  return c.unsqueeze(3)
      .expand_symint({c.sym_size(0), c.sym_size(1), groups, own, c.sym_size(3)})
      .reshape_symint({c.sym_size(0), c.sym_size(1), width, c.sym_size(3)});
}
// And back: the sum over what `like` has once.
Tensor sum_to(const Tensor& sum, const Tensor& like) {
  if (like.dim() == 2) return sum.sum(at::IntArrayRef({0, 1}));
  if (like.dim() == 3) return sum.sum(2);
  const SymInt groups = like.sym_size(2);
  return sum
      .reshape_symint(
          {sum.sym_size(0), sum.sym_size(1), groups, sum.sym_size(2) / groups, sum.sym_size(3)})
      .sum(3);
}

struct Composite {
  const Arguments& x;
  Tensor u, pre, time_step, A, B, C, decay, input, h, final_state, y; // y before the gate
  Opt state;

  explicit Composite(const Arguments& arguments) : x(arguments) {
    const at::ScalarType wide = x.wide(), states = x.state_type();
    const SymInt width = x.u.sym_size(2), per_channel = x.A.sym_size(1);
    u = x.u.to(wide);
    pre = x.delta.to(wide);
    if (defined(x.delta_bias)) pre = pre + x.delta_bias->to(wide);
    time_step = x.delta_softplus ? at::softplus(pre, 1, 20) : pre;
    A = x.A.to(states);
    B = for_every_channel(x.B.to(states), width);
    C = for_every_channel(x.C.to(states), width);
    decay = at::exp(time_step.unsqueeze(-1) * A);
    input = (time_step * u).unsqueeze(-1) * B;
    if (defined(x.state)) state = x.state->to(states).flatten(1);
    auto [all, last] =
        call_linear_scan(decay.flatten(2), input.flatten(2), state, x.cu_seqlens, x.reverse);
    h = all.reshape_symint(decay.sym_sizes());
    final_state = last.reshape_symint({x.rows(), width, per_channel});
    y = (C * h).sum(-1);
    if (x.complex()) y = 2 * at::real(y);
    if (defined(x.D)) y = y + x.D->to(wide) * u;
  }
  Tensor real(const Tensor& t) const { return x.complex() ? at::real(t) : t; }

  Pair outputs() const {
    const Tensor gated = defined(x.z) ? y * at::silu(x.z->to(y.scalar_type())) : y;
    return {gated.to(x.u.scalar_type()), final_state};
  }

  Gradients backward(const Opt& grad_y, const Opt& grad_final_state) const {
    const at::ScalarType wide = x.wide();
    Tensor g = defined(grad_y) ? grad_y->to(wide) : at::zeros_like(u);
    Tensor dz = at::zeros_symint({0}, x.u.options());
    if (defined(x.z)) {
      const Tensor z = x.z->to(wide), s = at::sigmoid(z);
      dz = (g * y * s * (1 + z * at::rsub(s, 1))).to(x.z->scalar_type());
      g = g * z * s;
    }
    const Tensor readout = (x.complex() ? 2 * g : g).unsqueeze(-1);
    const Opt grad_last =
        defined(grad_final_state) ? Opt(grad_final_state->to(x.state_type()).flatten(1)) : Opt();
    static const auto scan_backward = c10::Dispatcher::singleton()
                                          .findSchemaOrThrow("torch_ext::linear_scan_backward", "")
                                          .typed<std::tuple<Tensor, Tensor, Tensor>(
                                              const Opt&, const Opt&, const Tensor&, const Tensor&,
                                              const Tensor&, const Opt&, const Opt&, bool)>();
    auto [grad_decay, grad_input, grad_first] = scan_backward.call(
        (readout * at::conj(C)).flatten(2), grad_last, decay.flatten(2), input.flatten(2),
        h.flatten(2), state, x.cu_seqlens, x.reverse);
    const Tensor grad_exponent = grad_decay.reshape_symint(decay.sym_sizes()) * at::conj(decay);
    grad_input = grad_input.reshape_symint(decay.sym_sizes());
    const Tensor to_input = real(grad_input * at::conj(B)).sum(-1); // the gradient of time_step u
    Tensor du = to_input * time_step;
    Tensor dD = at::zeros_symint({x.u.sym_size(2)}, u.options());
    if (defined(x.D)) {
      du = du + g * x.D->to(wide);
      dD = (g * u).sum(at::IntArrayRef({0, 1})).to(x.D->scalar_type());
    }
    Tensor ddelta = to_input * u + real(grad_exponent * at::conj(A)).sum(-1);
    if (x.delta_softplus)
      ddelta = ddelta * at::where(pre > 20, at::ones_like(pre), at::sigmoid(pre));
    const Tensor dbias = ddelta.sum(at::IntArrayRef({0, 1}));
    return {
        du.to(x.u.scalar_type()),
        ddelta.to(x.delta.scalar_type()),
        (grad_exponent * time_step.unsqueeze(-1))
            .sum(at::IntArrayRef({0, 1}))
            .to(x.A.scalar_type()),
        sum_to(grad_input * (time_step * u).unsqueeze(-1), x.B).to(x.B.scalar_type()),
        sum_to(readout * at::conj(h), x.C).to(x.C.scalar_type()),
        dD,
        dz,
        defined(x.delta_bias) ? dbias.to(x.delta_bias->scalar_type()) : dbias,
        grad_first.reshape_symint(final_state.sym_sizes())};
  }
};

// ---- derivatives ----

// Where the arguments stand in the saved tensors, from `at` on.
variable_list saved(const Arguments& x) {
  variable_list all = x.differentiable();
  all.push_back(x.cu_seqlens.value_or(Tensor()));
  return all;
}
Arguments restored(const variable_list& s, size_t at, AutogradContext* ctx) {
  return {
      s[at],
      s[at + 1],
      s[at + 2],
      s[at + 3],
      s[at + 4],
      opt(s[at + 5]),
      opt(s[at + 6]),
      opt(s[at + 7]),
      opt(s[at + 8]),
      opt(s[at + 9]),
      ctx->saved_data["delta_softplus"].toBool(),
      ctx->saved_data["reverse"].toBool()};
}
constexpr size_t kSaved = kGradients + 1;
void save_options(AutogradContext* ctx, const Arguments& x) {
  ctx->set_materialize_grads(false);
  ctx->saved_data["delta_softplus"] = x.delta_softplus;
  ctx->saved_data["reverse"] = x.reverse;
}
variable_list as_list(const Gradients& g) {
  return std::apply([](const auto&... each) { return variable_list{each...}; }, g);
}
Gradients as_tuple(const variable_list& g) {
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8]};
}

struct Forward : torch::autograd::Function<Forward> {
  static constexpr bool is_traceable = true;
  static variable_list forward(
      AutogradContext* ctx, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
      const Tensor& C, const Opt& D, const Opt& z, const Opt& delta_bias, const Opt& initial_state,
      const Opt& cu_seqlens, bool delta_softplus, bool reverse) {
    const Arguments x{u,          delta,          A,      B, C, D, z, delta_bias, initial_state,
                      cu_seqlens, delta_softplus, reverse};
    save_options(ctx, x);
    auto [y, final_state, checkpoints] = [&] {
      BelowAutograd guard;
      return call(x, /*checkpoints=*/true);
    }();
    variable_list all = saved(x);
    all.push_back(checkpoints);
    ctx->save_for_backward(std::move(all));
    return {y, final_state};
  }
  static variable_list backward(AutogradContext* ctx, variable_list g) {
    variable_list out(kSaved + 2);
    if (!g[0].defined() && !g[1].defined()) return out;
    const variable_list s = ctx->get_saved_variables();
    const variable_list grads =
        as_list(call_backward(opt(g[0]), opt(g[1]), restored(s, 0, ctx), s[kSaved]));
    for (size_t i = 0; i < kGradients; ++i)
      if (s[i].defined()) out[i] = grads[i];
    return out;
  }
};

// The gradient, differentiable itself: fused at first, and where it is differentiated by its composite.
struct Backward : torch::autograd::Function<Backward> {
  static constexpr bool is_traceable = true;
  static variable_list forward(
      AutogradContext* ctx, const Opt& grad_y, const Opt& grad_final_state, const Tensor& u,
      const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const Opt& D,
      const Opt& z, const Opt& delta_bias, const Opt& initial_state, const Tensor& checkpoints,
      const Opt& cu_seqlens, bool delta_softplus, bool reverse) {
    const Arguments x{u,          delta,          A,      B, C, D, z, delta_bias, initial_state,
                      cu_seqlens, delta_softplus, reverse};
    save_options(ctx, x);
    const Gradients grads = [&] {
      BelowAutograd guard;
      return call_backward(grad_y, grad_final_state, x, checkpoints);
    }();
    variable_list all{grad_y.value_or(Tensor()), grad_final_state.value_or(Tensor())};
    for (const Tensor& t : saved(x)) all.push_back(t);
    ctx->save_for_backward(std::move(all));
    return as_list(grads);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gg) {
    constexpr size_t kDifferentiable = 2 + kGradients; // all tensors but checkpoints and cu_seqlens
    variable_list out(kDifferentiable + 4);
    differentiate_composite(
        ctx->get_saved_variables(), kDifferentiable, gg,
        [&](const variable_list& s) {
          return as_list(Composite(restored(s, 2, ctx)).backward(opt(s[0]), opt(s[1])));
        },
        out);
    return out;
  }
};

bool any_tangent(const variable_list& tensors) {
  for (const Tensor& t : tensors)
    if (has_tangent(t)) return true;
  return false;
}

Three autograd(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Opt& initial_state,
    const Opt& cu_seqlens, bool delta_softplus, bool reverse, bool checkpoints) {
  const Arguments x{u,          delta,          A,      B, C, D, z, delta_bias, initial_state,
                    cu_seqlens, delta_softplus, reverse};
  const auto none = [&] { return at::empty({0}, u.options().dtype(x.state_type())); };
  if (any_tangent(x.differentiable())) {
    check(x);
    auto [y, final_state] = Composite(x).outputs();
    return {y, final_state, none()};
  }
  if (torch::autograd::compute_requires_grad(u, delta, A, B, C, D, z, delta_bias, initial_state)) {
    const variable_list out = apply_op<Forward>(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse);
    return {out[0], out[1], none()};
  }
  BelowAutograd below;
  return call(x, checkpoints);
}
Gradients autograd_backward(
    const Opt& grad_y, const Opt& grad_final_state, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const Opt& D, const Opt& z,
    const Opt& delta_bias, const Opt& initial_state, const Tensor& checkpoints,
    const Opt& cu_seqlens, bool delta_softplus, bool reverse) {
  const Arguments x{u,          delta,          A,      B, C, D, z, delta_bias, initial_state,
                    cu_seqlens, delta_softplus, reverse};
  if (has_tangent(grad_y) || has_tangent(grad_final_state) || any_tangent(x.differentiable()))
    return Composite(x).backward(grad_y, grad_final_state);
  if (torch::autograd::compute_requires_grad(
          grad_y, grad_final_state, u, delta, A, B, C, D, z, delta_bias, initial_state))
    return as_tuple(apply_op<Backward>(
        grad_y, grad_final_state, u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints,
        cu_seqlens, delta_softplus, reverse));
  BelowAutograd below;
  return call_backward(grad_y, grad_final_state, x, checkpoints);
}

// ---- autocast: what runs over time meets in the widest dtype; parameters may be float32 beside it ----

template <c10::DeviceType Device>
Arguments autocast_arguments(Arguments x) {
  at::ScalarType widest = at::promote_types(x.u.scalar_type(), x.delta.scalar_type());
  if (defined(x.z)) widest = at::promote_types(widest, x.z->scalar_type());
  const bool step = x.u.dim() == 2;
  const auto over_time = [&](const Tensor& c) { return step || c.dim() > 2; };
  if (!x.complex()) {
    if (over_time(x.B)) widest = at::promote_types(widest, x.B.scalar_type());
    if (over_time(x.C)) widest = at::promote_types(widest, x.C.scalar_type());
  }
  if (x.complex()) widest = at::promote_types(widest, at::toRealValueType(x.A.scalar_type()));
  const auto cast = [&](Tensor& t, at::ScalarType dtype) {
    if (t.scalar_type() != dtype) t = at::autocast::cached_cast(dtype, t, Device);
  };
  cast(x.u, widest);
  cast(x.delta, widest);
  if (defined(x.z)) cast(*x.z, widest);
  if (x.A.scalar_type() != widest) cast(x.A, x.state_type());
  for (Tensor* c : {&x.B, &x.C})
    if (over_time(*c))
      cast(*c, x.complex() ? x.state_type() : widest);
    else if (c->scalar_type() != widest)
      cast(*c, x.state_type());
  for (Opt* v : {&x.D, &x.delta_bias})
    if (defined(*v) && (*v)->scalar_type() != widest) cast(**v, x.wide());
  return x;
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Three autocast(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Opt& initial_state,
    const Opt& cu_seqlens, bool delta_softplus, bool reverse, bool checkpoints) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  Arguments x = autocast_arguments<Device>(
      {u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse});
  if (defined(x.state)) x.state = at::autocast::cached_cast(x.state_type(), *x.state, Device);
  return call(x, checkpoints);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Pair autocast_step(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Tensor& state,
    const Opt& state_indices, bool delta_softplus) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const Arguments x = autocast_arguments<Device>({u, delta, A, B, C, D, z, delta_bias, {}, {}});
  return call_step(
      x.u, x.delta, x.A, x.B, x.C, x.D, x.z, x.delta_bias,
      at::autocast::cached_cast(x.state_type(), state, Device), state_indices, delta_softplus);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Tensor autocast_step_(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Tensor& state,
    const Opt& state_indices, bool delta_softplus) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const Arguments x = autocast_arguments<Device>({u, delta, A, B, C, D, z, delta_bias, {}, {}});
  return call_step_(
      x.u, x.delta, x.A, x.B, x.C, x.D, x.z, x.delta_bias, state, state_indices, delta_softplus);
}

// ---- one step ----

// Made of differentiable operators, so every derivative and every transform follows.
Pair step(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Tensor& state,
    const Opt& state_indices, bool delta_softplus) {
  check_step({u, delta, A, B, C, D, z, delta_bias, state, {}, delta_softplus}, state_indices);
  const auto with_time = [](const Opt& t) { return defined(t) ? Opt(t->unsqueeze(1)) : Opt(); };
  const auto run = [&](const Tensor& from) -> Pair {
    auto [y, next, none] = call(
        u.unsqueeze(1), delta.unsqueeze(1), A, B.unsqueeze(1), C.unsqueeze(1), D, with_time(z),
        delta_bias, from, std::nullopt, delta_softplus, /*reverse=*/false, /*checkpoints=*/false);
    return {y.select(1, 0), next};
  };
  return defined(state_indices) ? step_in_pool(kName, state, *state_indices, run) : run(state);
}
Tensor autograd_step_(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Tensor& state,
    const Opt& state_indices, bool delta_softplus) {
  TORCH_CHECK(
      !torch::autograd::compute_requires_grad(u, delta, A, B, C, D, z, delta_bias, state), kName,
      "_step_: an input requires grad, but the state is written in place, where no gradient can "
      "pass; expected torch.no_grad(), or ",
      kName, "_step, which is differentiable");
  at::AutoDispatchBelowAutograd below;
  return call_step_(u, delta, A, B, C, D, z, delta_bias, state, state_indices, delta_softplus);
}
Tensor bump_version_step_(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Opt& D, const Opt& z, const Opt& delta_bias, const Tensor& state,
    const Opt& state_indices, bool delta_softplus) {
  Tensor y;
  {
    BelowAutograd below;
    y = call_step_(u, delta, A, B, C, D, z, delta_bias, state, state_indices, delta_softplus);
  }
  torch::autograd::impl::bump_version(state);
  return y;
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      torch::schema(
          "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
          "Tensor? z=None, Tensor? delta_bias=None, Tensor? initial_state=None, "
          "Tensor? cu_seqlens=None, bool delta_softplus=False, bool reverse=False, "
          "bool checkpoints=False) -> (Tensor y, Tensor final_state, Tensor kept)"),
      tags);
  m.def(
      torch::schema(
          "selective_scan_backward(Tensor? grad_y, Tensor? grad_final_state, Tensor u, "
          "Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
          "Tensor? initial_state, Tensor kept, Tensor? cu_seqlens, bool delta_softplus, "
          "bool reverse) -> (Tensor grad_u, Tensor grad_delta, Tensor grad_A, Tensor grad_B, "
          "Tensor grad_C, Tensor grad_D, Tensor grad_z, Tensor grad_delta_bias, "
          "Tensor grad_initial_state)"),
      tags);
  m.def(
      torch::schema(
          "selective_scan_step(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
          "Tensor? z, Tensor? delta_bias, Tensor state, Tensor? state_indices=None, "
          "bool delta_softplus=False) -> (Tensor y, Tensor state)"),
      tags);
  m.def(
      torch::schema(
          "selective_scan_step_(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
          "Tensor? z, Tensor? delta_bias, Tensor(a!) state, Tensor? state_indices=None, "
          "bool delta_softplus=False) -> Tensor y"),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("selective_scan", &forward_kernel<OnCpu>);
  m.impl("selective_scan_backward", &backward_kernel<OnCpu>);
  m.impl("selective_scan_step_", &step_kernel_<OnCpu>);
}
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
#ifdef TORCH_EXT_CUDA
  m.impl("selective_scan", &forward_kernel<OnCuda>);
  m.impl("selective_scan_backward", &backward_kernel<OnCuda>);
  m.impl("selective_scan_step_", &step_kernel_<OnCuda>);
#else
  for (const char* name : {"selective_scan", "selective_scan_backward", "selective_scan_step_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&no_cuda_kernel>());
#endif
}
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("selective_scan", &meta);
  m.impl("selective_scan_backward", &meta_backward);
  m.impl("selective_scan_step_", &meta_step_);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("selective_scan", &autograd);
  m.impl("selective_scan_backward", &autograd_backward);
  m.impl("selective_scan_step_", &autograd_step_);
}
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) {
  m.impl("selective_scan_step_", &bump_version_step_);
}
TORCH_LIBRARY_IMPL(torch_ext, Conjugate, m) {
  m.impl("selective_scan_step_", torch::CppFunction::makeFromBoxedFunction<&resolve_lazy>());
}
TORCH_LIBRARY_IMPL(torch_ext, Negative, m) {
  m.impl("selective_scan_step_", torch::CppFunction::makeFromBoxedFunction<&resolve_lazy>());
}
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("selective_scan_step", &step);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) {
  m.impl("selective_scan", &autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("selective_scan_step", &autocast_step<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("selective_scan_step_", &autocast_step_<c10::DispatchKey::AutocastCPU, at::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) {
  m.impl("selective_scan", &autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("selective_scan_step", &autocast_step<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("selective_scan_step_", &autocast_step_<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

} // namespace

TensorPair selective_scan(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    const OptionalTensor& initial_state, bool delta_softplus, const OptionalTensor& cu_seqlens,
    bool reverse) {
  auto [y, final_state, none] = call(
      u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse,
      /*checkpoints=*/false);
  return {y, final_state};
}
TensorPair selective_scan_step(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    const Tensor& state, const OptionalTensor& state_indices, bool delta_softplus) {
  return call_step(u, delta, A, B, C, D, z, delta_bias, state, state_indices, delta_softplus);
}
Tensor selective_scan_step_(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    Tensor& state, const OptionalTensor& state_indices, bool delta_softplus) {
  return call_step_(u, delta, A, B, C, D, z, delta_bias, state, state_indices, delta_softplus);
}

} // namespace torch_ext
