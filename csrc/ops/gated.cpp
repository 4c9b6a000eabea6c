// torch_ext::gated, the operator behind every gated recurrence: checks, Meta, CPU kernels, derivatives of every order and
// mode, steps in place. The kernels: csrc/cpu/gated.h. Its members, which state their cells, are slstm.cpp, lstm.cpp,
// gru.cpp and elman.cpp. On CUDA what csrc/cuda/gated.h has no kernels for is the composite of this file, step by step.
//
// The operator's last output is what the backward needs of every token: empty unless `keep` asks for it, as the autograd
// kernel does when it records and there are kernels. A backward without it makes it first.
#include "gated.h"
#ifdef TORCH_EXT_CUDA
#include "../cuda/gated.h"
#endif

namespace torch_ext {
namespace {

constexpr const char* kName = "gated";
using at::SymInt;
constexpr size_t kTensors = 17, kDifferentiable = 12;
using Tensors = std::array<Opt, kTensors>;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>; // y, h, c, n, m, kept
using Gradients = std::tuple<
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Upstream = std::array<Opt, 5>; // of y, h, c, n, m
constexpr std::array kTensorNames{
    "x",
    "R",
    "bias",
    "weights",
    "projection",
    "norm_weight",
    "cell_norm_weight",
    "cell_norm_bias",
    "h",
    "c",
    "n",
    "m",
    "recurrent_mask",
    "h_update",
    "c_update",
    "reset",
    "cu_seqlens"};

Tensors to_array(const Gated& g) {
  return {
      g.x,
      g.R,
      g.bias,
      g.weights,
      g.projection,
      g.norm_weight,
      g.cell_norm_weight,
      g.cell_norm_bias,
      g.h,
      g.c,
      g.n,
      g.m,
      g.recurrent_mask,
      g.h_update,
      g.c_update,
      g.reset,
      g.cu_seqlens};
}
Gated from_array(
    const Tensors& t, int64_t cell, int64_t flags, double norm_eps,
    std::optional<double> gradient_clip, bool reverse) {
  TORCH_CHECK_VALUE(
      0 <= cell && cell < GatedCells::size, kName, ": cell is ", cell, ", expected 0 to ",
      GatedCells::size - 1);
  Gated g;
  static_cast<GatedTensors&>(g) = {t[0], t[1],  t[2],  t[3],  t[4],  t[5],  t[6],  t[7], t[8],
                                   t[9], t[10], t[11], t[12], t[13], t[14], t[15], t[16]};
  g.cell = int(cell), g.flags = unsigned(flags), g.norm_eps = norm_eps;
  g.gradient_clip = gradient_clip, g.reverse = reverse;
  return g;
}

// f(a cell of that type's place in GatedCells)
template <class F, class... Cell>
auto visit(int cell, const F& f, Cells<Cell...>) {
  using Result = decltype(f(static_cast<Lstm*>(nullptr)));
  Result result;
  ((GatedCells::index<Cell>() == cell ? (void)(result = f(static_cast<Cell*>(nullptr))) : void()),
   ...);
  return result;
}
template <class F>
auto visit(int cell, const F& f) {
  return visit(cell, f, GatedCells{});
}

// ---- calls through the dispatcher ----

template <size_t>
using In = const Opt&;
template <class>
struct Signatures;
template <size_t... I>
struct Signatures<std::index_sequence<I...>> {
  using Forward = Outputs(In<I>..., int64_t, int64_t, double, std::optional<double>, bool, bool);
  using Backward = Gradients(
      const Opt&, const Opt&, const Opt&, const Opt&, const Opt&, In<I>..., const Tensor&, int64_t,
      int64_t, double, std::optional<double>, bool);
  using Step = Tensor(In<I>..., const Opt&, int64_t, int64_t, double);

  static Outputs call(const Gated& g, bool keep) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::gated", "").typed<Forward>();
    const Tensors t = to_array(g);
    return op.call(t[I]..., g.cell, g.flags, g.norm_eps, g.gradient_clip, g.reverse, keep);
  }
  static Gradients call_backward(const Upstream& u, const Gated& g, const Tensor& kept) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("torch_ext::gated_backward", "")
                               .typed<Backward>();
    const Tensors t = to_array(g);
    return op.call(
        u[0], u[1], u[2], u[3], u[4], t[I]..., kept, g.cell, g.flags, g.norm_eps, g.gradient_clip,
        g.reverse);
  }
  static Tensor call_step_(const Gated& g, const Opt& state_indices) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::gated_step_", "").typed<Step>();
    const Tensors t = to_array(g);
    return op.call(t[I]..., state_indices, g.cell, g.flags, g.norm_eps);
  }
};
using Calls = Signatures<std::make_index_sequence<kTensors>>;

// ---- checks ----

GatedSizes sizes_of(const Gated& g) { return kGatedSizes[g.cell]; }
at::ScalarType wide(const Gated& g) { return state_dtype(g.x->scalar_type()); }
bool has_product(const Gated& g) { return sizes_of(g).from_h > 0; }
SymInt width_of(const Gated& g) { return g.x->sym_size(-1); }
SymInt h_width_of(const Gated& g) {
  return defined(g.projection) ? g.projection->sym_size(1) : g.x->sym_size(-1);
}
SymInt rows_of(const Gated& g) {
  return defined(g.cu_seqlens) ? g.cu_seqlens->sym_size(0) - 1 : g.x->sym_size(0);
}
constexpr std::array kStateNames{"h", "c", "n", "m"};
std::array<Opt, 4> states_of(const Gated& g) { return {g.h, g.c, g.n, g.m}; }

// `step`: x (B, G, H, K), states those of `state_indices` or of the rows.
void check(const Gated& g, bool step, const Opt& state_indices) {
  const char* op = g.op;
  const GatedSizes sizes = sizes_of(g);
  TORCH_CHECK_TYPE(defined(g.x), op, ": x is None, expected a tensor");
  const Tensor& x = *g.x;
  const at::ScalarType dtype = x.scalar_type(), states = state_dtype(dtype);
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      op, ": x has dtype ", dtype_text(dtype), ", expected float32, float64, bfloat16 or float16");
  const char* shape = step ? "(B, G, H, K)" : "(B, T, G, H, K)";
  TORCH_CHECK_VALUE(
      x.dim() == (step ? 4 : 5), op, ": x has shape ", shape_text(x.sym_sizes()), ", expected ",
      shape);
  TORCH_CHECK_VALUE(
      equal(x.sym_size(-3), sizes.from_x), op, ": x has shape ", shape_text(x.sym_sizes()),
      ", expected ", shape, " with G=", sizes.from_x, " gates");
  const SymInt heads = x.sym_size(-2), width = x.sym_size(-1), batch = x.sym_size(0);
  const auto parameter = [&](const char* name, const Opt& t, bool half_storage,
                             std::initializer_list<const char*> letters,
                             std::initializer_list<SymInt> expected, const char* why) {
    if (!defined(t)) return;
    const at::ScalarType given = t->scalar_type();
    const bool stored = half_storage && given == at::kBFloat16 && dtype == at::kFloat;
    TORCH_CHECK_TYPE(
        given == dtype || given == states || stored, op, ": ", name, " has dtype ",
        dtype_text(given), ", expected ", dtype_text(dtype),
        dtype != states                       ? " or " + dtype_text(states)
        : half_storage && dtype == at::kFloat ? std::string(" or bfloat16")
                                              : std::string(),
        ", beside x of ", dtype_text(dtype));
    check_device(op, name, *t, x.device(), "the device of x");
    check_shape(op, name, *t, letters, expected, why);
  };
  SymInt h_width = width;
  if (defined(g.projection)) {
    TORCH_CHECK_VALUE(
        g.projection->dim() == 3, op, ": projection has shape ",
        shape_text(g.projection->sym_sizes()), ", expected (H, P, K)");
    h_width = g.projection->sym_size(1);
    parameter(
        "projection", g.projection, false, {"H", "P", "K"}, {heads, h_width, width},
        "from the units of each head");
  }
  TORCH_CHECK_TYPE(
      defined(g.R) == has_product(g), op, ": R is ", defined(g.R) ? "given" : "None",
      has_product(g) ? ", expected a tensor" : ", expected None");
  const SymInt gates = sizes.from_h;
  parameter(
      "R", g.R, true, {"G", "H", "K", defined(g.projection) ? "P" : "K"},
      {gates, heads, width, h_width}, "a matrix (out, in) per gate and head");
  parameter("bias", g.bias, false, {"G", "H", "K"}, {gates, heads, width}, "one per unit and gate");
  parameter(
      g.weights_name, g.weights, false, {std::to_string(sizes.weights).c_str(), "H", "K"},
      {SymInt(sizes.weights), heads, width}, "one per unit");
  parameter(
      "norm_weight", g.norm_weight, false, {"G", "H", "K"}, {gates, heads, width},
      "one per unit and gate");
  TORCH_CHECK_VALUE(
      !(defined(g.norm_weight) && sizes.two_products), op,
      ": norm_weight is given, expected None with reset_after=False, the reset gate before the "
      "product");
  TORCH_CHECK_VALUE(
      defined(g.cell_norm_weight) || !defined(g.cell_norm_bias), op,
      ": cell_norm_bias is given without cell_norm_weight, expected both, or the weight alone");
  parameter(
      "cell_norm_weight", g.cell_norm_weight, false, {"H", "K"}, {heads, width}, "one per unit");
  parameter("cell_norm_bias", g.cell_norm_bias, false, {"H", "K"}, {heads, width}, "one per unit");

  const SymInt steps = step ? SymInt(1) : x.sym_size(1);
  if (defined(g.cu_seqlens)) {
    check_index_dtype(op, "cu_seqlens", *g.cu_seqlens);
    check_index_device(op, "cu_seqlens", *g.cu_seqlens, x.device());
    TORCH_CHECK_VALUE(
        !g.cu_seqlens->key_set().has(c10::DispatchKey::FuncTorchBatched), op,
        ": cu_seqlens has a vmap dimension, expected none: it has to be the same for all that vmap "
        "runs over");
    TORCH_CHECK_VALUE(
        g.cu_seqlens->dim() == 1 &&
            g.cu_seqlens->sym_size(0).sym_ge(1).expect_true(__FILE__, __LINE__),
        op, ": cu_seqlens has shape ", shape_text(g.cu_seqlens->sym_sizes()),
        ", expected (num_sequences + 1,)");
    TORCH_CHECK_VALUE(
        equal(batch, 1), op, ": x has shape ", shape_text(x.sym_sizes()),
        ", expected B=1 with cu_seqlens: sequences lie end to end in one row");
  }
  const SymInt rows = rows_of(g);
  const char* of_rows = defined(g.cu_seqlens) ? "num_sequences" : "B";
  const auto constant = [&](const char* name, const Opt& t) {
    TORCH_CHECK_VALUE(
        !(t->requires_grad() && at::GradMode::is_enabled()), op, ": ", name,
        " requires grad, expected a constant: the operator has no gradient for it");
    check_device(op, name, *t, x.device(), "the device of x");
  };
  const auto is_float = [&](const char* name, const Opt& t) {
    constant(name, t);
    TORCH_CHECK_TYPE(
        at::isFloatingType(t->scalar_type()), op, ": ", name, " has dtype ",
        dtype_text(t->scalar_type()), ", expected a floating dtype");
  };
  if (defined(g.recurrent_mask)) {
    is_float("recurrent_mask", g.recurrent_mask);
    check_shape(
        op, "recurrent_mask", *g.recurrent_mask, {of_rows, "H", "P"}, {rows, heads, h_width},
        "one per sequence and unit of h");
  }
  const auto update = [&](const char* name, const Opt& t, const SymInt& units, const char* letter) {
    if (!defined(t)) return;
    is_float(name, t);
    if (step)
      check_shape(op, name, *t, {"B", "H", letter}, {batch, heads, units}, "one per unit");
    else
      check_shape(
          op, name, *t, {"B", "T", "H", letter}, {batch, steps, heads, units},
          "one per step and unit");
  };
  update("h_update", g.h_update, h_width, defined(g.projection) ? "P" : "K");
  update("c_update", g.c_update, width, "K");
  if (defined(g.reset)) {
    constant("reset", g.reset);
    TORCH_CHECK_TYPE(
        g.reset->scalar_type() == at::kBool, op, ": reset has dtype ",
        dtype_text(g.reset->scalar_type()), ", expected bool");
    check_shape(
        op, "reset", *g.reset, {"B", "T", "H"}, {batch, steps, heads}, "one per step and head");
  }
  TORCH_CHECK_VALUE(
      !g.gradient_clip || *g.gradient_clip >= 0, op, ": gradient_clip is ",
      g.gradient_clip.value_or(0), ", expected a number that is not negative, or None");

  const auto given = states_of(g);
  SymInt state_rows = rows;
  if (defined(state_indices)) {
    check_index_dtype(op, "state_indices", *state_indices);
    check_index_device(op, "state_indices", *state_indices, x.device());
    check_shape(op, "state_indices", *state_indices, {"B"}, {batch}, "one index per row of x");
    TORCH_CHECK_VALUE(
        defined(g.h) && g.h->dim() == 3, op, ": ", g.state_name, " has shape ",
        defined(g.h) ? shape_text(g.h->sym_sizes()) : "None",
        ", expected (num_rows, H, K), a pool of states");
    state_rows = g.h->sym_size(0);
  }
  for (int i = 0; i < 4; ++i) {
    const Opt& s = given[size_t(i)];
    const char* name = i == 0 ? g.state_name : kStateNames[size_t(i)];
    TORCH_CHECK_TYPE(
        !step || i >= sizes.states || defined(s), op, ": ", name,
        " is None, expected a tensor, which a step has");
    if (!defined(s)) continue;
    TORCH_CHECK_VALUE(i < sizes.states, op, ": ", name, " is given, expected None");
    check_dtype(op, name, *s, states, "the dtype of the states for inputs of " + dtype_text(dtype));
    check_device(op, name, *s, x.device(), "the device of x");
    check_shape(
        op, name, *s,
        {defined(state_indices) ? "num_rows" : of_rows, "H",
         i == 0 && defined(g.projection) ? "P" : "K"},
        {state_rows, heads, i == 0 ? h_width : width}, "the states of each sequence");
  }
}

// ---- Meta: checks and output shapes; kernels begin with it ----

SymInt tokens_of(const Gated& g) { return g.x->sym_size(0) * g.x->sym_size(1); }
SymInt padded(const SymInt& n) { return (n + 15) / 16 * 16; }
// Numbers of a token that are kept, as gated_kept() has it.
SymInt kept_size(const Gated& g) {
  const GatedSizes sizes = sizes_of(g);
  const SymInt parts = sizes.gates + sizes.states + (defined(g.norm_weight) ? sizes.from_h : 0) +
                       (defined(g.cell_norm_weight) ? 1 : 0) + (defined(g.projection) ? 1 : 0);
  return parts * g.x->sym_size(3) * padded(width_of(g).max(h_width_of(g)));
}
std::array<Tensor, 4> empty_states(const Gated& g) {
  const auto options = g.x->options().dtype(wide(g));
  std::array<Tensor, 4> states;
  for (int i = 0; i < 4; ++i)
    states[size_t(i)] =
        i < sizes_of(g).states
            ? at::empty_symint(
                  {rows_of(g), g.x->sym_size(3), i == 0 ? h_width_of(g) : width_of(g)}, options)
            : at::empty({0}, options);
  return states;
}
std::vector<SymInt> y_shape(const Gated& g) {
  return {g.x->sym_size(0), g.x->sym_size(1), g.x->sym_size(3), h_width_of(g)};
}
Outputs empty_outputs(const Gated& g, bool keep) {
  check(g, /*step=*/false, {});
  const auto s = empty_states(g);
  return {
      at::empty_symint(y_shape(g), g.x->options()),
      s[0],
      s[1],
      s[2],
      s[3],
      at::empty_symint(
          {keep ? tokens_of(g) * kept_size(g) : SymInt(0)}, g.x->options().dtype(wide(g)))};
}
Gradients empty_gradients(const Upstream& u, const Gated& g, const Tensor& kept) {
  check(g, /*step=*/false, {});
  constexpr const char* op = "gated_backward";
  if (defined(u[0]))
    check_shape(op, "grad_y", *u[0], {"B", "T", "H", "P"}, y_shape(g), "the shape of y");
  check_dtype(op, "kept", kept, wide(g), "the dtype of the states");
  TORCH_CHECK_VALUE(
      kept.sym_numel().sym_eq(0).guard_bool(__FILE__, __LINE__) ||
          equal(kept.sym_numel(), tokens_of(g) * kept_size(g)),
      op, ": kept has ", kept.sym_numel(), " elements, expected ", tokens_of(g) * kept_size(g),
      " from gated with keep=True and the same arguments, or none");
  const auto s = empty_states(g);
  const auto like = [&](const Opt& t) {
    return defined(t) ? at::empty_symint(t->sym_sizes(), t->options())
                      : at::empty({0}, g.x->options().dtype(wide(g)));
  };
  return {
      like(g.x),
      like(g.R),
      like(g.bias),
      like(g.weights),
      like(g.projection),
      like(g.norm_weight),
      like(g.cell_norm_weight),
      like(g.cell_norm_bias),
      s[0],
      s[1],
      s[2],
      s[3]};
}

// ---- kernels ----

template <class Data>
Data data_of(const Tensor& t) {
  if constexpr (std::is_const_v<std::remove_pointer_t<Data>>)
    return t.const_data_ptr();
  else
    return t.mutable_data_ptr();
}
int64_t unit_stride(const Tensor& t) { return t.size(-1) > 1 ? t.stride(-1) : 1; }
// (B, T, G, H, K), (B, G, H, K) of a step, or without gates.
template <class Data>
OverUnits<Data> over_units(const Opt& t, bool gates, bool step) {
  if (!defined(t)) return {};
  return {data_of<Data>(*t),         t->stride(0),  step ? 0 : t->stride(1),
          gates ? t->stride(-3) : 0, t->stride(-2), unit_stride(*t)};
}
template <class Data>
UnitState<Data> unit_state(const Opt& t) { // (rows, H, K)
  if (!defined(t) || t->dim() != 3) return {};
  return {data_of<Data>(*t), t->stride(0), t->stride(1), unit_stride(*t)};
}

// The parameters as kernels want them: contiguous, of the states' dtype. They live as long as this.
struct Described {
  std::array<Tensor, 9> held;
  Tensor offsets;
  template <class Problem>
  void describe(Problem& p, const Gated& g, bool step) {
    const at::ScalarType dtype = wide(g);
    size_t i = 0;
    const auto hold = [&](const Opt& t, at::ScalarType as) -> const void* {
      if (!defined(t)) return nullptr;
      held[i] = t->to(as).contiguous();
      return held[i++].const_data_ptr();
    };
    if (!step && defined(g.cu_seqlens))
      offsets = sequence_offsets(kName, *g.cu_seqlens, g.x->size(1), g.x->device());
    p.cell = g.cell, p.flags = g.flags;
    p.num_sequences = offsets.defined() ? offsets.size(0) - 1 : g.x->size(0);
    p.num_steps = step ? 1 : g.x->size(1);
    p.num_heads = g.x->size(-2);
    p.width = g.x->size(-1);
    p.h_width = defined(g.projection) ? g.projection->size(1) : p.width;
    if (offsets.defined()) p.cu_seqlens = offsets.const_data_ptr<int64_t>();
    p.reverse = g.reverse;
    p.norm_eps = g.norm_eps;
    p.x = over_units<const void*>(g.x, true, step);
    const bool half_R = defined(g.R) && g.R->scalar_type() == at::kBFloat16;
    p.R_dtype = half_R ? DType::bf16 : dtype == at::kDouble ? DType::f64 : DType::f32;
    p.R = hold(g.R, half_R ? at::kBFloat16 : dtype);
    p.bias = hold(g.bias, dtype);
    p.weights = hold(g.weights, dtype);
    p.projection = hold(g.projection, dtype);
    p.norm_weight = hold(g.norm_weight, dtype);
    p.cell_norm_weight = hold(g.cell_norm_weight, dtype);
    p.cell_norm_bias = hold(g.cell_norm_bias, dtype);
    if (defined(g.recurrent_mask)) {
      held[i] = g.recurrent_mask->to(dtype);
      p.mask = unit_state<const void*>(held[i++]);
    }
    const auto wide_of = [&](const Opt& t) { return defined(t) ? Opt(t->to(dtype)) : Opt(); };
    h_update = wide_of(g.h_update), c_update = wide_of(g.c_update);
    p.h_update = over_units<const void*>(h_update, false, step);
    p.c_update = over_units<const void*>(c_update, false, step);
    if (defined(g.reset)) {
      p.reset = g.reset->const_data_ptr<bool>();
      p.reset_sequence = g.reset->stride(0), p.reset_time = g.reset->stride(1);
      p.reset_head = g.reset->stride(2);
    }
    const auto states = states_of(g);
    for (size_t s = 0; s < 4; ++s) p.initial_state[s] = unit_state<const void*>(states[s]);
  }
  Opt h_update, c_update;
};

struct OnCpu {
  explicit OnCpu(const Opt&) {}
  void operator()(DType dtype, const GatedForward& p) const {
    cpu::gated_forward(dtype, p, torch_threads());
  }
  void operator()(DType dtype, const GatedBackward& p) const {
    cpu::gated_backward(dtype, p, torch_threads());
  }
};
// Has CUDA kernels for the call, of which nothing is known to be right but x's device?
bool has_cuda_kernels(const Gated& g) {
#ifdef TORCH_EXT_CUDA
  if (g.x->dim() < 4 || defined(g.norm_weight) || defined(g.cell_norm_weight) ||
      defined(g.projection))
    return false;
  GatedProblem p; // what the kernels ask for besides
  p.cell = g.cell;
  const SymInt width = g.x->sym_size(-1);
  p.width =
      width.sym_le(cuda::kGatedWidest).guard_bool(__FILE__, __LINE__) ? 1 : cuda::kGatedWidest + 1;
  return cuda::gated_supported(p);
#else
  (void)g;
  return false;
#endif
}
#ifdef TORCH_EXT_CUDA
struct OnCuda {
  c10::cuda::OptionalCUDAGuard guard;
  explicit OnCuda(const Opt& x) { guard.set_device(x->device()); }
  template <class Problem>
  void operator()(DType dtype, const Problem& p) const {
    cuda::gated(dtype, p, c10::cuda::getCurrentCUDAStream().stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};
#endif

template <class Driver>
Outputs forward(const Gated& g, bool keep) {
  Outputs out = empty_outputs(g, keep);
  const Driver run(g.x);
  auto& [y, h, c, n, m, kept] = out;
  GatedForward p;
  Described described;
  described.describe(p, g, /*step=*/false);
  p.h = over_units<void*>(y, false, false);
  const std::array<Tensor, 4> states{h, c, n, m};
  for (size_t i = 0; i < 4; ++i) p.final_state[i] = unit_state<void*>(states[i]);
  if (keep && kept.numel()) p.kept = kept.mutable_data_ptr();
  run(kernel_dtype(g.x->scalar_type()), p);
  return out;
}

// (tokens, H, P) times the mask of each token's sequence.
Tensor masked(const Tensor& h, const Gated& g, const Tensor& offsets) {
  if (!defined(g.recurrent_mask)) return h;
  const Tensor mask = g.recurrent_mask->to(h.scalar_type());
  if (!offsets.defined())
    return (h.view({g.x->size(0), g.x->size(1), h.size(1), h.size(2)}) * mask.unsqueeze(1))
        .reshape(h.sizes());
  return h * mask.repeat_interleave(offsets.diff(), 0, h.size(0));
}
// The sum over tokens of a (tokens, G, H, K) times b (tokens, H, P): (G, H, K, P).
Tensor sum_of_products(const Tensor& a, const Tensor& b) {
  const int64_t tokens = a.size(0), G = a.size(1), H = a.size(2), K = a.size(3), P = b.size(2);
  if (H == 1) // one product, of views
    return a.reshape({tokens, G * K}).t().mm(b.select(1, 0)).view({G, H, K, P});
  return a.permute({2, 1, 3, 0})
      .reshape({H, G * K, tokens})
      .bmm(b.permute({1, 0, 2}))
      .view({H, G, K, P})
      .permute({1, 0, 2, 3});
}

template <class Driver>
Gradients backward(const Upstream& u, const Gated& g, const Tensor& made) {
  Gradients grads = empty_gradients(u, g, made);
  const Driver run(g.x);
  auto& [gx, gR, g_bias, g_weights, g_projection, g_norm, g_cell_norm, g_cell_bias, gh, gc, gn, gm] =
      grads;
  const GatedSizes sizes = sizes_of(g);
  const Tensor kept = made.numel() == 0 ? std::get<5>(Calls::call(g, /*keep=*/true)) : made;
  GatedBackward p;
  Described described;
  described.describe(p, g, /*step=*/false);
  const auto options = g.x->options().dtype(wide(g));
  const auto as = [](const Opt& t, at::ScalarType dtype) {
    return defined(t) ? Opt(t->to(dtype)) : Opt();
  };
  const Opt gy = as(u[0], g.x->scalar_type());
  std::array<Opt, 4> of_states;
  const std::array<Tensor, 4> g_states{gh, gc, gn, gm};
  for (size_t i = 0; i < 4; ++i) {
    of_states[i] = as(u[i + 1], wide(g));
    p.grad_final_state[i] = unit_state<const void*>(of_states[i]);
    p.grad_initial_state[i] = unit_state<void*>(g_states[i]);
  }
  p.kept = kept.const_data_ptr();
  p.clips = g.gradient_clip.has_value(), p.clip = g.gradient_clip.value_or(0);
  p.grad_h = over_units<const void*>(gy, false, false);
  p.grad_x = over_units<void*>(gx, true, false);
  const int64_t tokens = p.num_tokens(), H = p.num_heads, K = p.width, P = p.h_width,
                rows = p.num_sequences;
  const auto make = [&](bool wanted, at::IntArrayRef shape) {
    return wanted ? at::empty(shape, options) : Tensor();
  };
  const auto shares = [&](const Tensor& grad) { // one per sequence
    if (grad.numel() == 0) return Tensor();
    std::vector<int64_t> shape{rows};
    for (const int64_t n : grad.sizes()) shape.push_back(n);
    return at::zeros(shape, options);
  };
  const Tensor ga = make(gR.numel() > 0, {tokens, sizes.from_h, H, K}),
               operand = make(sizes.two_products, {tokens, H, P}),
               projected = make(defined(g.projection), {tokens, H, P}), s_bias = shares(g_bias),
               s_weights = shares(g_weights), s_norm = shares(g_norm),
               s_cell_norm = shares(g_cell_norm), s_cell_bias = shares(g_cell_bias);
  const auto pointer = [](const Tensor& t) {
    return t.defined() && t.numel() ? t.mutable_data_ptr() : nullptr;
  };
  p.grad_a = pointer(ga), p.operand = pointer(operand), p.grad_projected = pointer(projected);
  p.grad_bias = pointer(s_bias), p.grad_weights = pointer(s_weights);
  p.grad_norm_weight = pointer(s_norm), p.grad_cell_norm_weight = pointer(s_cell_norm);
  p.grad_cell_norm_bias = pointer(s_cell_bias);
  run(kernel_dtype(g.x->scalar_type()), p);

  const auto sum = [](const Tensor& to, const Tensor& each) {
    if (each.defined()) to.copy_(each.sum(0));
  };
  sum(g_bias, s_bias), sum(g_weights, s_weights), sum(g_norm, s_norm);
  sum(g_cell_norm, s_cell_norm), sum(g_cell_bias, s_cell_bias);
  if (gR.numel() == 0) return grads;
  const GatedKept of = gated_kept(p, sizes.gates, sizes.states, sizes.from_h);
  const Tensor parts =
      kept.view({tokens, of.size / std::max<int64_t>(H * of.width, 1), H, of.width});
  const Tensor before = masked(parts.select(1, of.states).narrow(2, 0, P), g, described.offsets);
  if (!sizes.two_products) {
    gR.copy_(sum_of_products(ga, before));
  } else {
    const int64_t first = sizes.from_h - 1;
    gR.narrow(0, 0, first).copy_(sum_of_products(ga.narrow(1, 0, first), before));
    gR.narrow(0, first, 1).copy_(sum_of_products(ga.narrow(1, first, 1), operand));
  }
  if (g_projection.numel())
    g_projection.copy_(
        sum_of_products(projected.unsqueeze(1), parts.select(1, of.unprojected).narrow(2, 0, K))
            .select(0, 0));
  return grads;
}

template <class Driver>
Tensor step_(const Gated& g, const Opt& state_indices) {
  check(g, /*step=*/true, state_indices);
  const Driver run(g.x);
  const auto states = states_of(g);
  for (const Opt& s : states)
    if (defined(s)) check_no_overlap(kName, *s);
  const Tensor rows = state_rows(kName, state_indices, g.x->size(0), g.h->size(0), g.x->device());
  Tensor y = at::empty(
      {g.x->size(0), g.x->size(2), defined(g.projection) ? g.projection->size(1) : g.x->size(3)},
      g.x->options());
  GatedForward p;
  Described described;
  described.describe(p, g, /*step=*/true);
  if (rows.defined()) {
    p.state_rows = rows.const_data_ptr<int64_t>();
    y.zero_(); // rows without a state
  }
  p.h = over_units<void*>(y, false, true);
  for (size_t i = 0; i < 4; ++i) p.final_state[i] = unit_state<void*>(states[i]);
  run(kernel_dtype(g.x->scalar_type()), p);
  return y;
}

// ---- the same as differentiable tensor code, step by step ----

template <class Cell>
struct Composite {
  static constexpr int kGates = num_gates<Cell>, kStates = num_states<Cell>,
                       kFromX = num_from_x<Cell>, kFromH = num_from_h<Cell>,
                       kWeights = num_weights<Cell>;
  using Gates = typename Cell::template Gates<TensorLane>;
  using State = typename Cell::template State<TensorLane>;
  using Weights = typename Cell::template Weights<TensorLane>;

  const Gated& g;
  const Cell cell;
  const at::ScalarType dtype;
  const int64_t rows, steps;
  Tensor x, R, bias, projection, norm_weight, cell_norm_weight, cell_norm_bias, mask, h_update,
      c_update;
  Weights weights;
  std::vector<Tensor> initial, last; // states
  std::vector<Tensor> outputs;       // in the order of time

  struct Step {
    Gates gates;
    State before, after;
    TensorLane seen;
    Tensor operand, product, scale, centred, cell_scale, cell_centred, unprojected, second;
  };
  std::vector<Step> trace;

  explicit Composite(const Gated& of, bool keep)
      : g(of), cell(of.flags), dtype(wide(of)), rows(of.x->size(0)), steps(of.x->size(1)) {
    const auto cast = [&](const Opt& t) { return defined(t) ? t->to(dtype) : Tensor(); };
    x = cast(g.x), R = cast(g.R), bias = cast(g.bias), projection = cast(g.projection);
    norm_weight = cast(g.norm_weight), cell_norm_weight = cast(g.cell_norm_weight);
    cell_norm_bias = cast(g.cell_norm_bias), mask = cast(g.recurrent_mask);
    h_update = cast(g.h_update), c_update = cast(g.c_update);
    const int64_t H = x.size(3), K = x.size(4), P = projection.defined() ? projection.size(1) : K;
    const auto zeros = [&](int64_t units) { return at::zeros({rows, H, units}, x.options()); };
    TensorLane w[kWeights + 1];
    for (int i = 0; i < kWeights; ++i)
      w[i].v =
          defined(g.weights) ? g.weights->to(dtype).select(0, i) : at::zeros({H, K}, x.options());
    weights = to_fields<Cell::template Weights, TensorLane>(w);
    const auto given = states_of(g);
    for (int i = 0; i < kStates; ++i)
      initial.push_back(
          defined(given[size_t(i)]) ? given[size_t(i)]->to(dtype) : zeros(i == 0 ? P : K));
    last = initial;
    for (int64_t t = 0; t < steps; ++t) {
      Step s = step(token(t), last);
      if (keep) trace.push_back(std::move(s));
    }
  }
  int64_t token(int64_t t) const { return g.reverse ? steps - 1 - t : t; }
  // NaN and infinity are replaced, too.
  Tensor replaced(const Tensor& state, int64_t token) const {
    if (!defined(g.reset)) return state;
    return at::where(
        g.reset->select(1, token).unsqueeze(-1), at::zeros({}, state.options()), state);
  }
  static Tensor times(const Tensor& matrix, const Tensor& h) { // (G, H, K, P), (B, H, P)
    return at::einsum("ghkp,bhp->bghk", {matrix, h});
  }
  static Tensor mixed(const Tensor& update, const Tensor& now, const Tensor& before) {
    return update * now + (1 - update) * before;
  }
  Step step(int64_t at_token, std::vector<Tensor>& state) {
    Step s;
    TensorLane before[kStates];
    for (int i = 0; i < kStates; ++i) before[i].v = replaced(state[size_t(i)], at_token);
    s.before = to_fields<Cell::template State, TensorLane>(before);
    const Tensor x_t = x.select(1, at_token), h = before[0].v;
    s.operand = mask.defined() ? h * mask : h;
    TensorLane gate[kGates];
    for (int i = 0; i < kGates; ++i) gate[i].v = at::zeros({}, x.options());
    for (int i = 0; i < kFromX; ++i) gate[Cell::from_x[i]].v = x_t.select(1, i);
    const auto add = [&](const Tensor& a, int first) {
      for (int i = 0; i < int(a.size(1)); ++i) {
        TensorLane& to = gate[Cell::from_h[first + i]];
        to.v = to.v + a.select(1, i);
      }
    };
    const auto biased = [&](const Tensor& a, int first) {
      return bias.defined() ? a + bias.narrow(0, first, a.size(1)) : a;
    };
    constexpr int kFirst = kFromH - Cell::two_products;
    if constexpr (kFromH > 0) {
      s.product = times(R.narrow(0, 0, kFirst), s.operand);
      Tensor a = s.product;
      if (norm_weight.defined()) {
        s.centred = a - a.mean(at::IntArrayRef({1, 3}), true);
        s.scale = at::rsqrt(s.centred.square().mean(at::IntArrayRef({1, 3}), true) + g.norm_eps);
        a = s.centred * s.scale * norm_weight;
      }
      add(biased(a, 0), 0);
    }
    if constexpr (Cell::two_products) {
      s.second =
          cell.operand(to_fields<Cell::template Gates, TensorLane>(gate), TensorLane{s.operand}).v;
      add(biased(times(R.narrow(0, kFirst, 1), s.second), kFirst), kFirst);
    }
    s.gates = to_fields<Cell::template Gates, TensorLane>(gate);
    s.after = cell.update(s.gates, s.before, weights);
    TensorLane after[kStates];
    to_array<Cell::template State, TensorLane>(s.after, after);
    s.seen = kFromH == 0 ? TensorLane{s.operand} : after[kStates > 1 ? 1 : 0];
    if (cell_norm_weight.defined()) {
      s.cell_centred = s.seen.v - s.seen.v.mean(-1, true);
      s.cell_scale = at::rsqrt(s.cell_centred.square().mean(-1, true) + g.norm_eps);
      s.seen.v = s.cell_centred * s.cell_scale * cell_norm_weight;
      if (cell_norm_bias.defined()) s.seen.v = s.seen.v + cell_norm_bias;
    }
    Tensor out = cell.output(s.gates, s.before, s.after, s.seen, weights).v;
    s.unprojected = out;
    if (projection.defined()) out = at::einsum("hpk,bhk->bhp", {projection, out});
    if (h_update.defined()) out = mixed(h_update.select(1, at_token), out, h);
    state[0] = out;
    for (int i = 1; i < kStates; ++i) state[size_t(i)] = after[i].v;
    if (c_update.defined()) state[1] = mixed(c_update.select(1, at_token), after[1].v, before[1].v);
    outputs.push_back(out);
    return s;
  }

  Outputs result() const {
    Tensor y;
    if (outputs.empty()) {
      y = at::zeros({rows, 0, initial[0].size(1), initial[0].size(2)}, x.options());
    } else {
      std::vector<Tensor> all = outputs;
      if (g.reverse) std::reverse(all.begin(), all.end());
      y = at::stack(all, 1);
    }
    const auto state = [&](int i) {
      return i < kStates ? last[size_t(i)] : at::empty({0}, x.options());
    };
    return {y.to(g.x->scalar_type()),   state(0), state(1), state(2), state(3),
            at::empty({0}, x.options())};
  }

  // Of a norm over `dims` of centred * scale.
  static Tensor through_norm(
      const Tensor& d, const Tensor& centred, const Tensor& scale, at::IntArrayRef dims) {
    const Tensor normal = centred * scale;
    return scale * (d - d.mean(dims, true) - normal * (d * normal).mean(dims, true));
  }

  variable_list backward(const Upstream& u) const {
    const Tensor gy = defined(u[0]) ? u[0]->to(dtype) : Tensor();
    std::vector<Tensor> d; // of the state after the step at hand
    for (int i = 0; i < kStates; ++i)
      d.push_back(
          defined(u[size_t(i) + 1]) ? u[size_t(i) + 1]->to(dtype)
                                    : at::zeros_like(initial[size_t(i)]));
    const auto fields = [](const std::vector<Tensor>& from) {
      TensorLane each[kStates];
      for (int i = 0; i < kStates; ++i) each[i].v = from[size_t(i)];
      return to_fields<Cell::template State, TensorLane>(each);
    };
    const auto unpack = [](const State& s, std::vector<Tensor>& to) {
      TensorLane each[kStates];
      to_array<Cell::template State, TensorLane>(s, each);
      for (int i = 0; i < kStates; ++i) to[size_t(i)] = each[i].v;
    };
    if constexpr (requires { Cell::enter(State{}, State{}); })
      unpack(Cell::enter(fields(last), fields(d)), d);
    const auto zeros = [](const Tensor& like) {
      return like.defined() ? at::zeros_like(like) : Tensor();
    };
    Tensor gR = zeros(R), g_bias = zeros(bias), g_projection = zeros(projection),
           g_norm = zeros(norm_weight), g_cell_norm = zeros(cell_norm_weight),
           g_cell_bias = zeros(cell_norm_bias);
    std::vector<Tensor> g_weights(static_cast<size_t>(kWeights)), gx(static_cast<size_t>(steps));
    const auto sum_to = [](Tensor& to, const Tensor& x) { to = to.defined() ? to + x : x; };
    for (int64_t t = steps - 1; t >= 0; --t) {
      const Step& s = trace[size_t(t)];
      const int64_t at_token = token(t);
      Tensor dh = d[0], past, past_c;
      if (gy.defined()) dh = dh + gy.select(1, at_token);
      if (h_update.defined()) {
        const Tensor update = h_update.select(1, at_token);
        past = (1 - update) * dh, dh = update * dh;
      }
      if (projection.defined()) {
        g_projection = g_projection + at::einsum("bhp,bhk->hpk", {dh, s.unprojected});
        dh = at::einsum("hpk,bhp->bhk", {projection, dh});
      }
      const auto o = cell.output_vjp(s.gates, s.before, s.after, s.seen, weights, TensorLane{dh});
      std::vector<Tensor> after(static_cast<size_t>(kStates));
      unpack(o.after, after);
      after[0] = at::zeros_like(dh);
      Tensor d_seen = o.seen.v;
      if (cell_norm_weight.defined()) {
        g_cell_norm = g_cell_norm + (d_seen * s.cell_centred * s.cell_scale).sum(0);
        if (cell_norm_bias.defined()) g_cell_bias = g_cell_bias + d_seen.sum(0);
        d_seen = through_norm(d_seen * cell_norm_weight, s.cell_centred, s.cell_scale, {-1});
      }
      if constexpr (kStates > 1) {
        if (c_update.defined()) {
          const Tensor update = c_update.select(1, at_token);
          past_c = (1 - update) * d[1], d[1] = update * d[1];
        }
        for (int i = 1; i < kStates; ++i) after[size_t(i)] = after[size_t(i)] + d[size_t(i)];
        after[1] = after[1] + d_seen;
      }
      const auto v = cell.update_vjp(s.gates, s.before, s.after, weights, fields(after));
      TensorLane of_output[kGates], gate[kGates];
      to_array<Cell::template Gates, TensorLane>(o.gates, of_output);
      to_array<Cell::template Gates, TensorLane>(v.gates, gate);
      for (int i = 0; i < kGates; ++i) gate[i].v = gate[i].v + of_output[i].v;
      std::vector<Tensor> of_update(static_cast<size_t>(kStates));
      unpack(o.before, d), unpack(v.before, of_update);
      for (int i = 0; i < kStates; ++i) {
        if (i == 0 && projection.defined()) continue;
        d[size_t(i)] = d[size_t(i)] + of_update[size_t(i)];
      }
      if (projection.defined()) d[0] = at::zeros_like(initial[0]); // the cell does not see h
      if (past.defined()) d[0] = d[0] + past;
      if (past_c.defined()) d[1] = d[1] + past_c;
      if constexpr (kWeights > 0) {
        TensorLane a[kWeights], b[kWeights];
        to_array<Cell::template Weights, TensorLane>(o.weights, a);
        to_array<Cell::template Weights, TensorLane>(v.weights, b);
        for (int i = 0; i < kWeights; ++i)
          sum_to(g_weights[size_t(i)], (a[i].v + b[i].v).expand_as(dh).sum(0));
      }
      Tensor through; // of the operand
      if constexpr (kFromH == 0) through = d_seen;
      if constexpr (Cell::two_products) {
        constexpr int kLast = kFromH - 1;
        const Tensor dn = gate[Cell::from_h[kLast]].v;
        const auto of = cell.operand_vjp(
            s.gates, TensorLane{s.operand},
            TensorLane{at::einsum("hkp,bhk->bhp", {R.select(0, kLast), dn})});
        gate[0].v = gate[0].v + of.r.v;
        through = of.h.v;
        gR = gR + at::constant_pad_nd(
                      at::einsum("bhk,bhp->hkp", {dn, s.second}).unsqueeze(0),
                      {0, 0, 0, 0, 0, 0, kLast, 0});
      }
      if constexpr (kFromH > 0) {
        std::vector<Tensor> of_h;
        for (int i = 0; i < kFromH; ++i)
          of_h.push_back(gate[Cell::from_h[i]].v.expand_as(x.select(1, 0).select(1, 0)));
        Tensor a = at::stack(of_h, 1); // (B, G, H, K)
        if (bias.defined()) g_bias = g_bias + a.sum(0);
        if (norm_weight.defined()) {
          g_norm = g_norm + (a * s.centred * s.scale).sum(0);
          a = Composite::through_norm(a * norm_weight, s.centred, s.scale, {1, 3});
        }
        constexpr int kFirst = kFromH - Cell::two_products;
        const Tensor first = a.narrow(1, 0, kFirst);
        const Tensor back = at::einsum("ghkp,bghk->bhp", {R.narrow(0, 0, kFirst), first});
        through = through.defined() ? through + back : back;
        Tensor of_R = at::einsum("bghk,bhp->ghkp", {first, s.operand});
        if (Cell::two_products) of_R = at::constant_pad_nd(of_R, {0, 0, 0, 0, 0, 0, 0, 1});
        gR = gR + of_R;
      }
      if (mask.defined()) through = through * mask;
      if (g.gradient_clip) through = at::clamp(through, -*g.gradient_clip, *g.gradient_clip);
      d[0] = d[0] + through;
      for (Tensor& each : d) each = replaced(each, at_token);
      std::vector<Tensor> of_x;
      for (int i = 0; i < kFromX; ++i)
        of_x.push_back(gate[Cell::from_x[i]].v.expand_as(x.select(1, 0).select(1, 0)));
      gx[size_t(at_token)] = at::stack(of_x, 1);
    }
    if constexpr (requires { Cell::leave(State{}, State{}); }) {
      std::vector<Tensor> left = d;
      unpack(Cell::leave(fields(initial), fields(d)), left);
      if (defined(g.reset) && steps > 0)
        for (Tensor& each : left) each = replaced(each, token(0));
      if (steps > 0)
        d = left;
      else
        unpack(Cell::leave(fields(last), fields(d)), d);
    }
    const auto none = [&] { return at::empty({0}, x.options()); };
    const auto as = [&](const Opt& given, const Tensor& grad) {
      return defined(given) ? grad.to(given->scalar_type()) : none();
    };
    Tensor of_weights;
    if (defined(g.weights)) {
      for (Tensor& w : g_weights)
        if (!w.defined()) w = at::zeros({x.size(3), x.size(4)}, x.options());
      of_weights = at::stack(g_weights, 0);
    }
    const Tensor of_x = steps > 0 ? at::stack(gx, 1) : at::zeros_like(x);
    const auto state = [&](int i) { return i < kStates ? d[size_t(i)] : none(); };
    return {
        of_x.to(g.x->scalar_type()),
        as(g.R, gR),
        as(g.bias, g_bias),
        as(g.weights, of_weights),
        as(g.projection, g_projection),
        as(g.norm_weight, g_norm),
        as(g.cell_norm_weight, g_cell_norm),
        as(g.cell_norm_bias, g_cell_bias),
        state(0),
        state(1),
        state(2),
        state(3)};
  }
};

variable_list as_list(const Outputs& out) {
  return std::apply([](const auto&... each) { return variable_list{each...}; }, out);
}
Gradients as_tuple(const variable_list& g) {
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11]};
}

// Packed: sequence after sequence. f(its call, its place) -> tensors.
template <class F>
void each_sequence(const Gated& g, const F& f) {
  const Tensor offsets = g.cu_seqlens->to(at::kCPU, at::kLong);
  std::vector<int64_t>
      at; // one by one: torch.func wraps tensors, which then have no memory of their own
  for (int64_t s = 0; s < offsets.size(0); ++s) at.push_back(offsets.select(0, s).item<int64_t>());
  for (size_t i = 0; i < at.size(); ++i)
    TORCH_CHECK_VALUE(
        at[i] >= (i ? at[i - 1] : 0) && at[0] == 0 && at.back() == g.x->size(1), g.op,
        ": cu_seqlens[", i, "] is ", at[i],
        ", expected offsets that begin with 0, do not fall, and end with T=", g.x->size(1));
  for (int64_t i = 0; i + 1 < int64_t(at.size()); ++i) {
    const size_t s = size_t(i);
    const auto tokens = [&](const Opt& t) {
      return defined(t) ? Opt(t->narrow(1, at[s], at[s + 1] - at[s])) : Opt();
    };
    const auto row = [&](const Opt& t) { return defined(t) ? Opt(t->narrow(0, i, 1)) : Opt(); };
    Gated one = g;
    one.cu_seqlens.reset();
    one.x = tokens(g.x), one.h_update = tokens(g.h_update), one.c_update = tokens(g.c_update);
    one.reset = tokens(g.reset), one.recurrent_mask = row(g.recurrent_mask);
    one.h = row(g.h), one.c = row(g.c), one.n = row(g.n), one.m = row(g.m);
    f(one, tokens, row);
  }
}

variable_list composite_forward(const Gated& g) {
  if (!defined(g.cu_seqlens))
    return visit(g.cell, [&]<class Cell>(Cell*) {
      return as_list(Composite<Cell>(g, /*keep=*/false).result());
    });
  std::array<std::vector<Tensor>, 6> parts;
  each_sequence(g, [&](const Gated& one, const auto&, const auto&) {
    const variable_list out = composite_forward(one);
    for (size_t i = 0; i < 6; ++i) parts[i].push_back(out[i]);
  });
  if (parts[0].empty()) { // no sequence
    const auto s = empty_states(g);
    return {
        at::zeros_symint(y_shape(g), g.x->options()),
        s[0],
        s[1],
        s[2],
        s[3],
        at::empty({0}, s[0].options())};
  }
  variable_list out;
  for (size_t i = 0; i < 6; ++i)
    out.push_back(parts[i][0].dim() == 1 ? parts[i][0] : at::cat(parts[i], i == 0 ? 1 : 0));
  return out;
}
variable_list composite_backward(const Upstream& u, const Gated& g) {
  if (!defined(g.cu_seqlens))
    return visit(
        g.cell, [&]<class Cell>(Cell*) { return Composite<Cell>(g, /*keep=*/true).backward(u); });
  std::vector<variable_list> parts;
  each_sequence(g, [&](const Gated& one, const auto& tokens, const auto& row) {
    parts.push_back(
        composite_backward({tokens(u[0]), row(u[1]), row(u[2]), row(u[3]), row(u[4])}, one));
  });
  if (parts.empty()) {
    const auto like = [&](const Opt& t) {
      return defined(t) ? at::zeros_like(*t) : at::empty({0}, g.x->options().dtype(wide(g)));
    };
    variable_list out;
    const Tensors all = to_array(g);
    for (size_t i = 0; i < 8; ++i) out.push_back(like(all[i]));
    for (const Tensor& s : empty_states(g)) out.push_back(s);
    return out;
  }
  variable_list out;
  for (size_t i = 0; i < kDifferentiable; ++i) {
    std::vector<Tensor> each;
    for (const variable_list& p : parts) each.push_back(p[i]);
    if (each[0].dim() == 1 && each[0].size(0) == 0) {
      out.push_back(each[0]);
    } else if (i == 0) {
      out.push_back(at::cat(each, 1));
    } else if (i >= 8) {
      out.push_back(at::cat(each, 0));
    } else {
      Tensor sum = each[0];
      for (size_t s = 1; s < each.size(); ++s) sum = sum + each[s];
      out.push_back(sum);
    }
  }
  return out;
}

Outputs forward_cuda(const Gated& g, bool keep) {
#ifdef TORCH_EXT_CUDA
  if (has_cuda_kernels(g)) return forward<OnCuda>(g, keep);
#endif
  const Outputs out = empty_outputs(g, keep);
  const variable_list made = composite_forward(g);
  const variable_list to = as_list(out);
  for (size_t i = 0; i < 5; ++i) to[i].copy_(made[i]);
  if (to[5].numel()) to[5].zero_(); // nobody reads it
  return out;
}
Gradients backward_cuda(const Upstream& u, const Gated& g, const Tensor& kept) {
#ifdef TORCH_EXT_CUDA
  if (has_cuda_kernels(g)) return backward<OnCuda>(u, g, kept);
#endif
  const Gradients grads = empty_gradients(u, g, kept);
  const variable_list made = composite_backward(u, g);
  size_t i = 0;
  std::apply(
      [&](const auto&... to) { ((to.numel() ? (void)to.copy_(made[i]) : void(), ++i), ...); },
      grads);
  return grads;
}
Tensor step_cuda(const Gated& g, const Opt& state_indices) {
#ifdef TORCH_EXT_CUDA
  if (has_cuda_kernels(g)) return step_<OnCuda>(g, state_indices);
#endif
  check(g, /*step=*/true, state_indices);
  Gated one = g;
  const auto with_time = [](const Opt& t) { return defined(t) ? Opt(t->unsqueeze(1)) : Opt(); };
  one.x = with_time(g.x), one.h_update = with_time(g.h_update),
  one.c_update = with_time(g.c_update);
  const std::array<Opt*, 4> states{&one.h, &one.c, &one.n, &one.m};
  const auto pools = states_of(g);
  for (const Opt& s : pools)
    if (defined(s)) check_no_overlap(kName, *s);
  Tensor rows, there;
  if (defined(state_indices)) {
    rows = state_rows(kName, state_indices, g.x->size(0), g.h->size(0), g.x->device());
    there = rows.ge(0);
    for (Opt* s : states)
      if (defined(*s)) *s = (*s)->index_select(0, rows.clamp_min(0));
  }
  const variable_list out = composite_forward(one);
  Tensor y = out[0].select(1, 0);
  for (size_t i = 0; i < 4; ++i) {
    if (!defined(pools[i])) continue;
    if (!there.defined())
      pools[i]->copy_(out[i + 1]);
    else
      pools[i]->index_copy_(0, rows.masked_select(there), out[i + 1].index({there}));
  }
  if (there.defined()) y = y * there.view({-1, 1, 1}).to(y.scalar_type());
  return y;
}

// ---- derivatives ----

void save_options(AutogradContext* ctx, const Gated& g) {
  ctx->set_materialize_grads(false);
  ctx->saved_data["cell"] = int64_t(g.cell);
  ctx->saved_data["flags"] = int64_t(g.flags);
  ctx->saved_data["norm_eps"] = g.norm_eps;
  ctx->saved_data["clips"] = g.gradient_clip.has_value();
  ctx->saved_data["clip"] = g.gradient_clip.value_or(0);
  ctx->saved_data["reverse"] = g.reverse;
}
Gated restored(const variable_list& s, size_t at, AutogradContext* ctx) {
  Tensors t;
  for (size_t i = 0; i < kTensors; ++i) t[i] = opt(s[at + i]);
  const bool clips = ctx->saved_data["clips"].toBool();
  return from_array(
      t, ctx->saved_data["cell"].toInt(), ctx->saved_data["flags"].toInt(),
      ctx->saved_data["norm_eps"].toDouble(),
      clips ? std::optional(ctx->saved_data["clip"].toDouble()) : std::nullopt,
      ctx->saved_data["reverse"].toBool());
}
void push(variable_list& to, const Gated& g) {
  for (const Opt& t : to_array(g)) to.push_back(t.value_or(Tensor()));
}
bool any_tangent(const Gated& g) {
  for (const Opt& t : to_array(g))
    if (has_tangent(t)) return true;
  return false;
}
bool any_requires_grad(const Gated& g) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Opt& t : to_array(g))
    if (defined(t) && t->requires_grad()) return true;
  return false;
}

template <class>
struct Nodes;
template <size_t... I>
struct Nodes<std::index_sequence<I...>> {
  struct Forward : torch::autograd::Function<Forward> {
    static constexpr bool is_traceable = true;
    static variable_list forward(
        AutogradContext* ctx, In<I>... t, int64_t cell, int64_t flags, double norm_eps,
        std::optional<double> clip, bool reverse) {
      const Gated g = from_array({t...}, cell, flags, norm_eps, clip, reverse);
      save_options(ctx, g);
      const Outputs out = [&] {
        BelowAutograd guard;
        return Calls::call(g, /*keep=*/!g.x->is_cuda() || has_cuda_kernels(g));
      }();
      variable_list all;
      push(all, g);
      all.push_back(std::get<5>(out));
      ctx->save_for_backward(std::move(all));
      return {
          std::get<0>(out), std::get<1>(out), std::get<2>(out), std::get<3>(out), std::get<4>(out)};
    }
    static variable_list backward(AutogradContext* ctx, variable_list u) {
      variable_list out(kTensors + 5);
      bool any = false;
      for (const Tensor& each : u) any = any || each.defined();
      if (!any) return out;
      const variable_list s = ctx->get_saved_variables();
      const Gated g = restored(s, 0, ctx);
      const Gradients grads = Calls::call_backward(
          {opt(u[0]), opt(u[1]), opt(u[2]), opt(u[3]), opt(u[4])}, g, s[kTensors]);
      const variable_list all =
          std::apply([](const auto&... each) { return variable_list{each...}; }, grads);
      for (size_t i = 0; i < kDifferentiable; ++i)
        if (s[i].defined()) out[i] = all[i];
      return out;
    }
  };
  // The gradient, differentiable itself: fused at first, and where it is differentiated by its composite.
  struct Backward : torch::autograd::Function<Backward> {
    static constexpr bool is_traceable = true;
    static variable_list forward(
        AutogradContext* ctx, const Opt& gy, const Opt& gh, const Opt& gc, const Opt& gn,
        const Opt& gm, In<I>... t, const Tensor& kept, int64_t cell, int64_t flags, double norm_eps,
        std::optional<double> clip, bool reverse) {
      const Gated g = from_array({t...}, cell, flags, norm_eps, clip, reverse);
      save_options(ctx, g);
      const Upstream u{gy, gh, gc, gn, gm};
      const Gradients grads = [&] {
        BelowAutograd guard;
        return Calls::call_backward(u, g, kept);
      }();
      variable_list all;
      for (const Opt& each : u) all.push_back(each.value_or(Tensor()));
      push(all, g);
      ctx->save_for_backward(std::move(all));
      return std::apply([](const auto&... each) { return variable_list{each...}; }, grads);
    }
    static variable_list backward(AutogradContext* ctx, variable_list gg) {
      constexpr size_t kOf = 5 + kDifferentiable; // all tensors but those that have no gradient
      variable_list out(5 + kTensors + 6);
      differentiate_composite(
          ctx->get_saved_variables(), kOf, gg,
          [&](const variable_list& s) {
            return composite_backward(
                {opt(s[0]), opt(s[1]), opt(s[2]), opt(s[3]), opt(s[4])}, restored(s, 5, ctx));
          },
          out);
      return out;
    }
  };

  static Outputs autograd(
      In<I>... t, int64_t cell, int64_t flags, double norm_eps, std::optional<double> clip,
      bool reverse, bool keep) {
    const Gated g = from_array({t...}, cell, flags, norm_eps, clip, reverse);
    if (any_tangent(g)) {
      check(g, /*step=*/false, {});
      const variable_list out = composite_forward(g);
      return {out[0], out[1], out[2], out[3], out[4], out[5]};
    }
    if (any_requires_grad(g)) {
      const variable_list out = apply_op<Forward>(t..., cell, flags, norm_eps, clip, reverse);
      return {out[0], out[1], out[2],
              out[3], out[4], at::empty({0}, g.x->options().dtype(wide(g)))};
    }
    BelowAutograd below;
    return Calls::call(g, keep);
  }
  static Gradients autograd_backward(
      const Opt& gy, const Opt& gh, const Opt& gc, const Opt& gn, const Opt& gm, In<I>... t,
      const Tensor& kept, int64_t cell, int64_t flags, double norm_eps, std::optional<double> clip,
      bool reverse) {
    const Gated g = from_array({t...}, cell, flags, norm_eps, clip, reverse);
    const Upstream u{gy, gh, gc, gn, gm};
    bool tangents = any_tangent(g), grads = any_requires_grad(g);
    for (const Opt& each : u) {
      tangents = tangents || has_tangent(each);
      grads = grads || (at::GradMode::is_enabled() && defined(each) && each->requires_grad());
    }
    if (tangents) return as_tuple(composite_backward(u, g));
    if (grads)
      return as_tuple(
          apply_op<Backward>(gy, gh, gc, gn, gm, t..., kept, cell, flags, norm_eps, clip, reverse));
    BelowAutograd below;
    return Calls::call_backward(u, g, kept);
  }
  static Tensor autograd_step_(
      In<I>... t, const Opt& state_indices, int64_t cell, int64_t flags, double norm_eps) {
    const Gated g = from_array({t...}, cell, flags, norm_eps, {}, false);
    TORCH_CHECK(
        !any_requires_grad(g),
        "gated_step_: an input requires grad, but the state is written in place, where no gradient "
        "can pass; expected torch.no_grad(), or the step that is not in place");
    at::AutoDispatchBelowAutograd below;
    return Calls::call_step_(g, state_indices);
  }
  static Tensor bump_version_step_(
      In<I>... t, const Opt& state_indices, int64_t cell, int64_t flags, double norm_eps) {
    const Gated g = from_array({t...}, cell, flags, norm_eps, {}, false);
    Tensor y;
    {
      BelowAutograd below;
      y = Calls::call_step_(g, state_indices);
    }
    for (const Opt& s : states_of(g))
      if (defined(s)) torch::autograd::impl::bump_version(*s);
    return y;
  }

  template <Outputs (*kRun)(const Gated&, bool)>
  static Outputs forward(
      In<I>... t, int64_t cell, int64_t flags, double norm_eps, std::optional<double> clip,
      bool reverse, bool keep) {
    return kRun(from_array({t...}, cell, flags, norm_eps, clip, reverse), keep);
  }
  template <Gradients (*kRun)(const Upstream&, const Gated&, const Tensor&)>
  static Gradients backward(
      const Opt& gy, const Opt& gh, const Opt& gc, const Opt& gn, const Opt& gm, In<I>... t,
      const Tensor& kept, int64_t cell, int64_t flags, double norm_eps, std::optional<double> clip,
      bool reverse) {
    return kRun(
        {gy, gh, gc, gn, gm}, from_array({t...}, cell, flags, norm_eps, clip, reverse), kept);
  }
  template <Tensor (*kRun)(const Gated&, const Opt&)>
  static Tensor step_(
      In<I>... t, const Opt& state_indices, int64_t cell, int64_t flags, double norm_eps) {
    return kRun(from_array({t...}, cell, flags, norm_eps, {}, false), state_indices);
  }
};
using All = Nodes<std::make_index_sequence<kTensors>>;

Tensor empty_step(const Gated& g, const Opt& state_indices) {
  check(g, /*step=*/true, state_indices);
  return at::empty_symint({g.x->sym_size(0), g.x->sym_size(2), h_width_of(g)}, g.x->options());
}

// Tensor? x, ...; in a step in place states are written.
std::string tensors_schema(bool in_place) {
  std::string s;
  for (size_t i = 0; i < kTensors; ++i) {
    const bool written = in_place && i >= 8 && i < 12;
    s += written ? std::string("Tensor(") + char('a' + i - 8) + "!)? " : std::string("Tensor? ");
    s += std::string(kTensorNames[i]) + ", ";
  }
  return s;
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      torch::schema(
          ("gated(" + tensors_schema(false) +
           "int cell, int flags, float norm_eps, float? gradient_clip, bool reverse, bool keep) -> "
           "(Tensor y, Tensor h_last, Tensor c_last, Tensor n_last, Tensor m_last, Tensor kept)")
              .c_str()),
      tags);
  m.def(
      torch::schema(
          ("gated_backward(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor? grad_n, "
           "Tensor? grad_m, " +
           tensors_schema(false) +
           "Tensor kept, int cell, int flags, float norm_eps, float? gradient_clip, bool reverse) "
           "-> (Tensor grad_x, Tensor grad_R, Tensor grad_bias, Tensor grad_weights, "
           "Tensor grad_projection, Tensor grad_norm_weight, Tensor grad_cell_norm_weight, "
           "Tensor grad_cell_norm_bias, Tensor grad_initial_h, Tensor grad_initial_c, "
           "Tensor grad_initial_n, Tensor grad_initial_m)")
              .c_str()),
      tags);
  m.def(
      torch::schema(("gated_step_(" + tensors_schema(true) +
                     "Tensor? state_indices, int cell, int flags, float norm_eps) -> Tensor y")
                        .c_str()),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("gated", &All::forward<forward<OnCpu>>);
  m.impl("gated_backward", &All::backward<backward<OnCpu>>);
  m.impl("gated_step_", &All::step_<step_<OnCpu>>);
}
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("gated", &All::forward<forward_cuda>);
  m.impl("gated_backward", &All::backward<backward_cuda>);
  m.impl("gated_step_", &All::step_<step_cuda>);
}
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("gated", &All::forward<empty_outputs>);
  m.impl("gated_backward", &All::backward<empty_gradients>);
  m.impl("gated_step_", &All::step_<empty_step>);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("gated", &All::autograd);
  m.impl("gated_backward", &All::autograd_backward);
  m.impl("gated_step_", &All::autograd_step_);
}
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) {
  m.impl("gated_step_", &All::bump_version_step_);
}
TORCH_LIBRARY_IMPL(torch_ext, Conjugate, m) {
  m.impl("gated_step_", torch::CppFunction::makeFromBoxedFunction<&resolve_lazy>());
}
TORCH_LIBRARY_IMPL(torch_ext, Negative, m) {
  m.impl("gated_step_", torch::CppFunction::makeFromBoxedFunction<&resolve_lazy>());
}

} // namespace

GatedOutputs call_gated(const Gated& g) {
  check(g, /*step=*/false, {});
  const auto [y, h, c, n, m, kept] = Calls::call(g, /*keep=*/false);
  return {y, h, c, n, m};
}

GatedOutputs gated_step(const char* op, const Gated& g, const Opt& state_indices) {
  check(g, /*step=*/true, state_indices);
  const auto run = [&](const std::array<Opt, 4>& states) {
    const auto with_time = [](const Opt& t) { return defined(t) ? Opt(t->unsqueeze(1)) : Opt(); };
    Gated one = g;
    one.x = with_time(g.x), one.h_update = with_time(g.h_update),
    one.c_update = with_time(g.c_update);
    one.h = states[0], one.c = states[1], one.n = states[2], one.m = states[3];
    GatedOutputs out = call_gated(one);
    out.y = out.y.select(1, 0);
    return out;
  };
  const auto states = states_of(g);
  if (!defined(state_indices)) return run(states);
  variable_list pools;
  for (const Opt& s : states)
    if (defined(s)) pools.push_back(*s);
  GatedOutputs out;
  const auto [y, next] = step_in_pools(op, pools, *state_indices, [&](const variable_list& rows) {
    std::array<Opt, 4> own;
    for (size_t i = 0; i < rows.size(); ++i) own[i] = rows[i];
    out = run(own);
    variable_list after{out.h, out.c, out.n, out.m};
    after.resize(rows.size());
    return std::pair(out.y, after);
  });
  out.y = y;
  const std::array<Tensor*, 4> to{&out.h, &out.c, &out.n, &out.m};
  for (size_t i = 0; i < next.size(); ++i) *to[i] = next[i];
  return out;
}

Tensor gated_step_(const char* op, const Gated& g, const Opt& state_indices) {
  check(g, /*step=*/true, state_indices);
  bool any = false;
  for (const Opt& t : to_array(g)) any = any || (defined(t) && t->requires_grad());
  TORCH_CHECK(
      !any || !at::GradMode::is_enabled(), op,
      ": an input requires grad, but the state is written in place, where no gradient can pass; "
      "expected torch.no_grad(), or ",
      std::string(op).substr(0, strlen(op) - 1), ", which is differentiable");
  return Calls::call_step_(g, state_indices);
}

Opt reset_of_heads(const char* op, const Opt& reset, const Tensor& x) {
  if (!defined(reset) || x.dim() != 5) return reset; // x is refused before anything else
  TORCH_CHECK_TYPE(
      reset->scalar_type() == at::kBool, op, ": reset has dtype ", dtype_text(reset->scalar_type()),
      ", expected bool");
  check_shape(op, "reset", *reset, {"B", "T"}, {x.sym_size(0), x.sym_size(1)}, "one per step");
  return reset->unsqueeze(-1).expand_symint({x.sym_size(0), x.sym_size(1), x.sym_size(3)});
}
void check_options(const char* op, const GatedOptions& options, bool step, bool cell, bool norms) {
  const auto refuse = [&](const char* name, bool given, bool allowed) {
    TORCH_CHECK_VALUE(allowed || !given, op, ": ", name, " is given, expected none");
  };
  refuse("cu_seqlens", defined(options.cu_seqlens), !step);
  refuse("reverse", options.reverse, !step);
  refuse("reset", defined(options.reset), !step);
  refuse("gradient_clip", options.gradient_clip.has_value(), !step);
  refuse("c_update", defined(options.c_update), cell);
  refuse("cell_norm_weight", defined(options.cell_norm_weight), cell);
  refuse("cell_norm_bias", defined(options.cell_norm_bias), cell);
  refuse("norm_weight", defined(options.norm_weight), norms);
}

} // namespace torch_ext
