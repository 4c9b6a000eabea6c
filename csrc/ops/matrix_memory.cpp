// torch_ext::matrix_memory, the operator behind every matrix memory with a scalar decay: checks, Meta, CPU and CUDA kernels,
// derivatives of every order and mode, steps in place. The kernels: csrc/cpu/matrix_memory.h,
// csrc/cuda/matrix_memory.cuh and matrix_memory_backward.cuh. Its members, which state their gates and have names of their
// own for everything, are mlstm.cpp, linear_attention.cpp, retention.cpp and ssd.cpp.
//
// The operator has a fifth output, the states from which the backward starts: empty unless `checkpoints` asks for them, as
// the autograd kernel does when it records on the CPU. A backward without them makes them first. On CUDA, where a pass
// over keys and values costs less than keeping them, they are zeros that nobody reads.
#include "matrix_memory.h"
#ifdef TORCH_EXT_CUDA
#include "../cuda/matrix_memory.h"
#endif

namespace torch_ext {
namespace {

constexpr const char* kName = "matrix_memory";
using at::SymInt;
using Text = c10::string_view;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>; // h, C, n, m, kept
// Of q, k, v, log_decay, log_input, input_scale, C, n, m.
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
constexpr size_t kGradients = std::tuple_size_v<Gradients>;
constexpr size_t kStates = 6; // where the states are among them

// ---- calls through the dispatcher ----

constexpr std::array kNormalizers{"none", "sum", "at_least_one", "stabilized"};
Normalizer normalizer_of(Text name) {
  for (size_t i = 0; i < kNormalizers.size(); ++i)
    if (name == kNormalizers[i]) return Normalizer(i);
  TORCH_CHECK_VALUE(
      false, kName, ": normalizer is '", name,
      "', expected 'none', 'sum', 'at_least_one' or 'stabilized'");
}
Text name_of(Normalizer n) { return kNormalizers[size_t(n)]; }

Outputs call(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Opt& C, const Opt& n, const Opt& m, const Opt& cu_seqlens,
    double scale, double eps, Text normalizer, bool exact, bool reverse, bool wide_h,
    bool checkpoints) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::matrix_memory", "")
                             .typed<decltype(call)>();
  return op.call(
      q, k, v, log_decay, log_input, input_scale, C, n, m, cu_seqlens, scale, eps, normalizer,
      exact, reverse, wide_h, checkpoints);
}
Outputs call(const MatrixMemory& x, bool checkpoints) {
  return call(
      x.q, x.k, x.v, x.log_decay, x.log_input, x.input_scale, x.C, x.n, x.m, x.cu_seqlens, x.scale,
      x.eps, name_of(x.normalizer), x.exact, x.reverse, x.wide_h, checkpoints);
}
Gradients call_backward(
    const Opt& grad_h, const Opt& grad_C, const Opt& grad_n, const Opt& grad_m, const Tensor& q,
    const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Opt& C, const Opt& n, const Opt& m, const Tensor& kept,
    const Opt& cu_seqlens, double scale, double eps, Text normalizer, bool exact, bool reverse,
    bool wide_h) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::matrix_memory_backward", "")
                             .typed<decltype(call_backward)>();
  return op.call(
      grad_h, grad_C, grad_n, grad_m, q, k, v, log_decay, log_input, input_scale, C, n, m, kept,
      cu_seqlens, scale, eps, normalizer, exact, reverse, wide_h);
}
using Upstream = std::array<Opt, 4>; // of h, C, n, m
Gradients call_backward(const Upstream& g, const MatrixMemory& x, const Tensor& kept) {
  return call_backward(
      g[0], g[1], g[2], g[3], x.q, x.k, x.v, x.log_decay, x.log_input, x.input_scale, x.C, x.n, x.m,
      kept, x.cu_seqlens, x.scale, x.eps, name_of(x.normalizer), x.exact, x.reverse, x.wide_h);
}
Tensor call_step_(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Tensor& C, const Opt& n, const Opt& m, const Opt& state_indices,
    double scale, double eps, Text normalizer, bool wide_h) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::matrix_memory_step_", "")
                             .typed<decltype(call_step_)>();
  return op.call(
      q, k, v, log_decay, log_input, input_scale, C, n, m, state_indices, scale, eps, normalizer,
      wide_h);
}

// ---- checks ----

bool normalizes(const MatrixMemory& x) { return x.normalizer != Normalizer::none; }
bool stabilizes(const MatrixMemory& x) { return x.normalizer == Normalizer::stabilized; }
at::ScalarType wide(const MatrixMemory& x) { return state_dtype(x.v.scalar_type()); }
at::ScalarType h_dtype(const MatrixMemory& x) { return x.wide_h ? wide(x) : x.v.scalar_type(); }
SymInt rows_of(const MatrixMemory& x) {
  return defined(x.cu_seqlens) ? x.cu_seqlens->sym_size(0) - 1 : x.q.sym_size(0);
}

// Of what members have checked in their own words, all that kernels rely on. `step`: no time, states are a pool's rows.
void check(const MatrixMemory& x, bool step, const Opt& state_indices) {
  const char* op = step ? "matrix_memory_step_" : kName;
  check_heads(op, {}, x.q, x.k, x.v, step, /*wide_keys=*/true);
  const auto gate = [&](const char* name, const Opt& g) {
    if (defined(g)) check_gate(op, name, *g, x.v, /*half=*/false);
  };
  gate("log_decay", x.log_decay);
  gate("log_input", x.log_input);
  gate("input_scale", x.input_scale);
  TORCH_CHECK_VALUE(
      !defined(x.log_input) || stabilizes(x), op,
      ": log_input is given, expected None where normalizer is not 'stabilized'");
  check_states(op, {}, x, step, state_indices);
}

// ---- Meta: checks and output shapes; kernels begin with it ----

SymInt kept_count(const MatrixMemory& x) {
  const int64_t keys = x.q.sym_size(-1).guard_int(__FILE__, __LINE__),
                values = x.v.sym_size(-1).guard_int(__FILE__, __LINE__),
                chunk = matrix_memory_chunk(keys, values);
  MatrixMemoryProblem p;
  p.key_size = keys, p.value_size = values;
  const SymInt steps = x.q.sym_size(1), rows = rows_of(x),
               chunks = defined(x.cu_seqlens) ? steps / chunk + rows
                                              : rows * ((steps + (chunk - 1)) / chunk);
  return chunks * x.v.sym_size(2) * matrix_memory_state_size(p);
}

std::array<Tensor, 3> empty_states(const MatrixMemory& x) {
  const auto options = x.q.options().dtype(wide(x));
  const SymInt rows = rows_of(x), heads = x.v.sym_size(-2), keys = x.q.sym_size(-1);
  const auto make = [&](bool wanted, std::vector<SymInt> shape) {
    return wanted ? at::empty_symint(shape, options) : at::empty({0}, options);
  };
  return {
      make(true, {rows, heads, keys, x.v.sym_size(-1)}), make(normalizes(x), {rows, heads, keys}),
      make(stabilizes(x), {rows, heads})};
}

Outputs empty_outputs(const MatrixMemory& x, bool checkpoints) {
  check(x, /*step=*/false, {});
  auto [C, n, m] = empty_states(x);
  return {
      at::empty_symint(x.v.sym_sizes(), x.v.options().dtype(h_dtype(x))), C, n, m,
      at::empty_symint({checkpoints ? kept_count(x) : SymInt(0)}, x.q.options().dtype(wide(x)))};
}

Gradients empty_gradients(const Upstream& g, const MatrixMemory& x, const Tensor& kept) {
  constexpr const char* op = "matrix_memory_backward";
  check(x, /*step=*/false, {});
  auto [C, n, m] = empty_states(x);
  if (defined(g[0]))
    check_shape(op, "grad_h", *g[0], {"B", "T", "H", "V"}, x.v.sym_sizes(), "the shape of v");
  if (defined(g[1]))
    check_shape(op, "grad_C", *g[1], {"rows", "H", "K", "V"}, C.sym_sizes(), "the shape of C");
  if (defined(g[2]) && normalizes(x))
    check_shape(op, "grad_n", *g[2], {"rows", "H", "K"}, n.sym_sizes(), "the shape of n");
  if (defined(g[3]) && stabilizes(x))
    check_shape(op, "grad_m", *g[3], {"rows", "H"}, m.sym_sizes(), "the shape of m");
  check_dtype(op, "kept", kept, wide(x), "the dtype of the states");
  const SymInt count = kept_count(x);
  TORCH_CHECK_VALUE(
      kept.sym_numel().sym_eq(0).guard_bool(__FILE__, __LINE__) || equal(kept.sym_numel(), count),
      op, ": kept has ", kept.sym_numel(), " elements, expected ", count,
      " from matrix_memory with checkpoints=True and the same arguments, or none");
  const auto like = [](const Tensor& t) { return at::empty_symint(t.sym_sizes(), t.options()); };
  const auto gate = [&](const Opt& t) {
    return defined(t) ? like(*t) : at::empty({0}, x.q.options().dtype(wide(x)));
  };
  return {
      like(x.q), like(x.k), like(x.v), gate(x.log_decay), gate(x.log_input), gate(x.input_scale),
      C,         n,         m};
}

// ---- kernels: launch(dtype, problem) is the driver of a device ----

template <class Data>
Data data_of(const Tensor& t) {
  if constexpr (std::is_const_v<std::remove_pointer_t<Data>>)
    return t.const_data_ptr();
  else
    return t.mutable_data_ptr();
}
template <class Data>
OverHeads<Data> over_heads(const Tensor& t) { // (B, T, H, K), or without T
  return {
      data_of<Data>(t), t.stride(0), t.dim() == 4 ? t.stride(1) : 0, t.stride(-2),
      t.size(-1) > 1 ? t.stride(-1) : 1};
}
template <class Data>
PerHead<Data> gate(const Opt& t) { // (B, T, H), or without T
  if (!defined(t) || t->numel() == 0) return {};
  return {data_of<Data>(*t), t->stride(0), t->dim() == 3 ? t->stride(1) : 0, t->stride(-1)};
}
template <class Data>
MatrixState<Data> matrix_state(const Opt& C, const Opt& n, const Opt& m) {
  MatrixState<Data> s;
  if (defined(C))
    s.C = data_of<Data>(*C), s.C_row = C->stride(0), s.C_head = C->stride(1),
    s.C_key = C->stride(2), s.C_value = C->size(3) > 1 ? C->stride(3) : 1;
  if (defined(n) && n->dim() == 3)
    s.n = data_of<Data>(*n), s.n_row = n->stride(0), s.n_head = n->stride(1),
    s.n_key = n->stride(2);
  if (defined(m) && m->dim() == 2)
    s.m = data_of<Data>(*m), s.m_row = m->stride(0), s.m_head = m->stride(1);
  return s;
}
void describe(MatrixMemoryProblem& p, const MatrixMemory& x, const Tensor& offsets, bool step) {
  p.num_sequences = offsets.defined() ? offsets.size(0) - 1 : x.q.size(0);
  p.num_steps = step ? 1 : x.q.size(1);
  p.num_groups = x.q.size(-2);
  p.num_heads = x.v.size(-2);
  p.key_size = x.q.size(-1);
  p.value_size = x.v.size(-1);
  if (offsets.defined()) p.cu_seqlens = offsets.const_data_ptr<int64_t>();
  p.reverse = x.reverse;
  p.normalizer = x.normalizer;
  p.exact = x.exact;
  p.wide_keys = x.q.scalar_type() != x.v.scalar_type();
  p.wide_h = x.wide_h;
  p.scale = x.scale;
  p.eps = x.eps;
  p.q = over_heads<const void*>(x.q);
  p.k = over_heads<const void*>(x.k);
  p.v = over_heads<const void*>(x.v);
  p.log_decay = gate<const void*>(x.log_decay);
  p.log_input = gate<const void*>(x.log_input);
  p.input_scale = gate<const void*>(x.input_scale);
  p.initial_state = matrix_state<const void*>(x.C, x.n, x.m);
}
Tensor offsets_of(const MatrixMemory& x) {
  return defined(x.cu_seqlens) ? sequence_offsets(kName, *x.cu_seqlens, x.q.size(1), x.q.device())
                               : Tensor();
}

template <class Launch>
Outputs forward_on(Launch launch, const MatrixMemory& x, bool checkpoints) {
  auto [h, C, n, m, kept] = empty_outputs(x, checkpoints);
  const Tensor offsets = offsets_of(x);
  MatrixMemoryForward p;
  describe(p, x, offsets, /*step=*/false);
  p.h = over_heads<void*>(h);
  p.final_state = matrix_state<void*>(C, n, m);
  if (checkpoints && x.q.is_cuda()) kept.zero_();
  if (checkpoints) p.checkpoints = kept.mutable_data_ptr();
  launch(kernel_dtype(x.v.scalar_type()), p);
  return {h, C, n, m, kept};
}

template <class Launch>
Gradients backward_on(
    Launch launch, const Upstream& g, const MatrixMemory& x, const Tensor& checkpoints) {
  auto grads = empty_gradients(g, x, checkpoints);
  auto& [gq, gk, gv, g_decay, g_input, g_scale, gC, gn, gm] = grads;
  Tensor kept = checkpoints;
  if (kept.numel() == 0 && !x.q.is_cuda()) kept = std::get<4>(call(x, /*checkpoints=*/true));
  const Tensor offsets = offsets_of(x);
  const auto as = [](const Opt& t, at::ScalarType dtype) {
    return defined(t) ? Opt(t->to(dtype)) : Opt();
  };
  const Opt gh = as(g[0], h_dtype(x)), of_C = as(g[1], wide(x)), of_n = as(g[2], wide(x)),
            of_m = as(g[3], wide(x));
  MatrixMemoryBackward p;
  describe(p, x, offsets, /*step=*/false);
  p.checkpoints = kept.const_data_ptr();
  if (defined(gh)) p.grad_h = over_heads<const void*>(*gh);
  p.grad_final_state = matrix_state<const void*>(of_C, of_n, of_m);
  p.grad_q = over_heads<void*>(gq);
  p.grad_k = over_heads<void*>(gk);
  p.grad_v = over_heads<void*>(gv);
  p.grad_log_decay = gate<void*>(g_decay);
  p.grad_log_input = gate<void*>(g_input);
  p.grad_input_scale = gate<void*>(g_scale);
  p.grad_initial_state = matrix_state<void*>(gC, gn, gm);
  if (p.num_heads == 0) gq.zero_(), gk.zero_(); // of heads that share them, none
  launch(kernel_dtype(x.v.scalar_type()), p);
  return grads;
}

template <class Launch>
Tensor step_on(Launch launch, const MatrixMemory& x, const Opt& state_indices) {
  check(x, /*step=*/true, state_indices);
  for (const Opt* s : {&x.C, &x.n, &x.m})
    if (defined(*s)) check_no_overlap(kName, **s);
  const Tensor rows = state_rows(kName, state_indices, x.q.size(0), x.C->size(0), x.q.device());
  Tensor h = at::empty(x.v.sizes(), x.v.options().dtype(h_dtype(x)));
  MatrixMemoryForward p;
  describe(p, x, {}, /*step=*/true);
  if (rows.defined()) p.state_rows = rows.const_data_ptr<int64_t>();
  p.h = over_heads<void*>(h);
  p.final_state = matrix_state<void*>(x.C, x.n, x.m);
  launch(kernel_dtype(x.v.scalar_type()), p);
  return h;
}

struct OnCpu {
  explicit OnCpu(const Tensor&) {}
  void operator()(DType dtype, const MatrixMemoryForward& p) const {
    cpu::matrix_memory_forward(dtype, p, torch_threads());
  }
  void operator()(DType dtype, const MatrixMemoryBackward& p) const {
    cpu::matrix_memory_backward(dtype, p, torch_threads());
  }
};
#ifdef TORCH_EXT_CUDA
// Of a float32 operand of a matrix product, as torch.set_float32_matmul_precision means it.
int bfloat16_parts() {
  switch (at::globalContext().float32MatmulPrecision()) {
    case at::Float32MatmulPrecision::MEDIUM:
      return 1;
    case at::Float32MatmulPrecision::HIGH:
      return 2;
    default:
      return 3;
  }
}
struct OnCuda {
  c10::cuda::OptionalCUDAGuard guard;
  explicit OnCuda(const Tensor& q) {
    if (q.defined() && q.is_cuda()) guard.set_device(q.device()); // else the checks will tell
  }
  template <class Problem>
  void operator()(DType dtype, const Problem& p) const {
    const int parts = bfloat16_parts();
    // Given back when this returns: the caching allocator hands it out again in the order of the stream.
    const Tensor workspace = at::empty(
        {cuda::matrix_memory_workspace(dtype, p, parts)}, at::device(at::kCUDA).dtype(at::kByte));
    cuda::matrix_memory(
        dtype, p, parts, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};
#endif

MatrixMemory arguments(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Opt& C, const Opt& n, const Opt& m, const Opt& cu_seqlens,
    double scale, double eps, Text normalizer, bool exact, bool reverse, bool wide_h) {
  return {
      q,
      k,
      v,
      log_decay,
      log_input,
      input_scale,
      C,
      n,
      m,
      cu_seqlens,
      scale,
      eps,
      normalizer_of(normalizer),
      exact,
      reverse,
      wide_h};
}

template <class Device>
Outputs forward_kernel(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Opt& C, const Opt& n, const Opt& m, const Opt& cu_seqlens,
    double scale, double eps, Text normalizer, bool exact, bool reverse, bool wide_h,
    bool checkpoints) {
  return forward_on(
      Device(q),
      arguments(
          q, k, v, log_decay, log_input, input_scale, C, n, m, cu_seqlens, scale, eps, normalizer,
          exact, reverse, wide_h),
      checkpoints);
}
template <class Device>
Gradients backward_kernel(
    const Opt& grad_h, const Opt& grad_C, const Opt& grad_n, const Opt& grad_m, const Tensor& q,
    const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Opt& C, const Opt& n, const Opt& m, const Tensor& kept,
    const Opt& cu_seqlens, double scale, double eps, Text normalizer, bool exact, bool reverse,
    bool wide_h) {
  return backward_on(
      Device(q), {grad_h, grad_C, grad_n, grad_m},
      arguments(
          q, k, v, log_decay, log_input, input_scale, C, n, m, cu_seqlens, scale, eps, normalizer,
          exact, reverse, wide_h),
      kept);
}
template <class Device>
Tensor step_kernel_(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Tensor& C, const Opt& n, const Opt& m, const Opt& state_indices,
    double scale, double eps, Text normalizer, bool wide_h) {
  return step_on(
      Device(q),
      arguments(
          q, k, v, log_decay, log_input, input_scale, C, n, m, {}, scale, eps, normalizer, true,
          false, wide_h),
      state_indices);
}
Outputs meta(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Opt& C, const Opt& n, const Opt& m, const Opt& cu_seqlens,
    double scale, double eps, Text normalizer, bool exact, bool reverse, bool wide_h,
    bool checkpoints) {
  return empty_outputs(
      arguments(
          q, k, v, log_decay, log_input, input_scale, C, n, m, cu_seqlens, scale, eps, normalizer,
          exact, reverse, wide_h),
      checkpoints);
}
Gradients meta_backward(
    const Opt& grad_h, const Opt& grad_C, const Opt& grad_n, const Opt& grad_m, const Tensor& q,
    const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Opt& C, const Opt& n, const Opt& m, const Tensor& kept,
    const Opt& cu_seqlens, double scale, double eps, Text normalizer, bool exact, bool reverse,
    bool wide_h) {
  return empty_gradients(
      {grad_h, grad_C, grad_n, grad_m},
      arguments(
          q, k, v, log_decay, log_input, input_scale, C, n, m, cu_seqlens, scale, eps, normalizer,
          exact, reverse, wide_h),
      kept);
}
Tensor meta_step_(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Tensor& C, const Opt& n, const Opt& m, const Opt& state_indices,
    double scale, double eps, Text normalizer, bool wide_h) {
  check(
      arguments(
          q, k, v, log_decay, log_input, input_scale, C, n, m, {}, scale, eps, normalizer, true,
          false, wide_h),
      /*step=*/true, state_indices);
  return at::empty_symint(
      v.sym_sizes(), v.options().dtype(wide_h ? state_dtype(v.scalar_type()) : v.scalar_type()));
}

// ---- the same as differentiable tensor code, of every step with every other one: time and memory grow with T squared ----

struct Composite {
  const MatrixMemory& x;
  SymInt steps, rows, heads, shares; // sequences; heads of v for one of q
  // (B, H, T, size), q scaled; (B, H, T), gates in double; states in the order of time.
  Tensor q, k, v, f, i, s, C0, n0, m0;
  Tensor sequence, begin,
      end; // packed: of each token, its sequence, and that one's first and last token's successor
  Tensor starts, ends; // packed: of each sequence
  // In the header's words; D: exponents, with those of the state at the start as a last column.
  Tensor W, carry, G, P, numerator, r, least, d, D, m, D_end, end_weight, decay;

  explicit Composite(const MatrixMemory& arguments)
      : x(arguments),
        steps(x.q.sym_size(1)),
        rows(rows_of(x)),
        heads(x.v.sym_size(2)),
        shares(heads / x.q.sym_size(2)) {
    const auto dtype = wide(x);
    q = shared(x.q).to(dtype) * x.scale, k = shared(x.k).to(dtype), v = over_time(x.v).to(dtype);
    const auto options = x.q.options();
    const auto gate = [&](const Opt& g, double other, at::ScalarType type) {
      return defined(g)
                 ? over_time(g->unsqueeze(-1)).squeeze(-1).to(type)
                 : at::full_symint({x.q.sym_size(0), heads, steps}, other, options.dtype(type));
    };
    f = gate(x.log_decay, 0, at::kDouble).clamp_min(-1e9);
    i = gate(x.log_input, 0, at::kDouble);
    s = gate(x.input_scale, 1, dtype);
    const auto state = [&](const Opt& given, std::vector<SymInt> shape) {
      const Tensor t = defined(given) ? *given : at::zeros_symint(shape, options.dtype(dtype));
      return packed() && x.reverse ? t.flip(0) : t;
    };
    const SymInt keys = x.q.sym_size(3), values = x.v.sym_size(3);
    C0 = state(x.C, {rows, heads, keys, values});
    n0 = state(x.n, {rows, heads, keys});
    m0 = state(x.m, {rows, heads}).to(at::kDouble);

    const Tensor token = at::arange(at::Scalar(steps), options.dtype(at::kLong));
    Tensor mask = token.unsqueeze(0).le(token.unsqueeze(1)); // (t, j)
    if (packed()) {
      Tensor offsets = x.cu_seqlens->to(x.q.device(), at::kLong);
      if (x.reverse) offsets = (at::full_symint({}, steps, offsets.options()) - offsets).flip(0);
      starts = offsets.narrow_symint(0, 0, rows), ends = offsets.narrow_symint(0, 1, rows);
      sequence = at::searchsorted(ends, token, /*out_int32=*/false, /*right=*/true);
      begin = starts.index_select(0, sequence), end = ends.index_select(0, sequence);
      mask = mask.logical_and(sequence.unsqueeze(0).eq(sequence.unsqueeze(1)));
    }
    const Tensor F = f.cumsum(-1), before = with_zero(F);
    const double none = -std::numeric_limits<double>::infinity();
    const auto exponents = [&](const Tensor& upper, const Tensor& of_steps, const Tensor& lift) {
      const Tensor D = at::where(
          of_steps, upper.unsqueeze(-1) - F.unsqueeze(-2) + i.unsqueeze(-2),
          at::full({}, none, F.options()));
      return at::cat({D, lift.unsqueeze(-1)}, -1);
    };
    Tensor since = F;
    if (packed()) since = F - before.index_select(-1, begin);
    D = exponents(F, mask, since + at_tokens(m0));
    m = largest(D);
    const Tensor weights = at::exp(D - m.unsqueeze(-1)).to(dtype);
    W = weights.narrow_symint(-1, 0, steps);
    carry = weights.select_symint(-1, steps);
    G = q.matmul(k.transpose(-1, -2));
    P = G * W * s.unsqueeze(-2);
    numerator = P.matmul(v) + carry.unsqueeze(-1) * rows_times(q, C0, false);
    if (normalizes(x)) {
      r = P.sum(-1) + carry * (q * at_tokens(n0)).sum(-1);
      least = stabilizes(x) ? at::exp(-m).to(dtype) : at::ones_like(r);
      d = x.normalizer == Normalizer::sum ? r + x.eps : at::maximum(at::abs(r), least) + x.eps;
    }
    // At the ends: (rows, H, T + 1).
    Tensor total, whole, of_sequence;
    if (packed()) {
      const Tensor upper = before.index_select(-1, ends), lower = before.index_select(-1, starts);
      total = upper.squeeze(0).transpose(0, 1);                // (S, H)
      whole = (upper - lower).squeeze(0).transpose(0, 1) + m0; // (S, H)
      of_sequence = sequence.unsqueeze(0)
                        .eq(at::arange(at::Scalar(rows), sequence.options()).unsqueeze(1))
                        .unsqueeze(1)
                        .unsqueeze(1); // (S, 1, 1, T)
    } else {
      total = f.sum(-1);
      whole = total + m0;
      of_sequence = at::ones_symint({1, 1, 1, steps}, mask.options());
    }
    in_sequence = of_sequence.squeeze(2);
    D_end = exponents(total.unsqueeze(-1), of_sequence, whole.unsqueeze(-1)).squeeze(2);
    m_end = largest(D_end);
    const Tensor at_end = at::exp(D_end - m_end.unsqueeze(-1)).to(dtype);
    end_weight = at_end.narrow_symint(-1, 0, steps);
    decay = at_end.select_symint(-1, steps);
  }

  Tensor in_sequence; // (rows or 1, 1, T): packed, which tokens are a sequence's
  Tensor m_end;

  bool packed() const { return defined(x.cu_seqlens); }
  Tensor over_time(
      const Tensor& t) const { // (B, T, H, size) in the order of time, as (B, H, T, size)
    return (x.reverse ? t.flip(1) : t).transpose(1, 2);
  }
  Tensor back_over_time(const Tensor& t) const {
    const Tensor u = t.transpose(1, 2);
    return x.reverse ? u.flip(1) : u;
  }
  Tensor shared(const Tensor& t) const {
    const Tensor u = over_time(t);
    return u.unsqueeze(2)
        .expand_symint({u.sym_size(0), u.sym_size(1), shares, u.sym_size(2), u.sym_size(3)})
        .reshape_symint({u.sym_size(0), heads, u.sym_size(2), u.sym_size(3)});
  }
  Tensor sum_shared(const Tensor& t, const Tensor& like) const {
    return back_over_time(t.reshape_symint({t.sym_size(0), heads / shares, shares, t.sym_size(2),
                                            t.sym_size(3)})
                              .sum(2))
        .to(like.scalar_type());
  }
  static Tensor with_zero(const Tensor& t) { return at::constant_pad_nd(t, {1, 0}, 0); }
  Tensor largest(const Tensor& exponent) const {
    if (!stabilizes(x)) return at::zeros_like(exponent.select_symint(-1, steps));
    return exponent.amax(-1).clamp_min(-1e30);
  }
  // Of a state (rows, H, ...) what a token (B, H, T, ...) has of it.
  Tensor at_tokens(const Tensor& t) const {
    if (!packed()) return t.unsqueeze(2);
    return t.index_select(0, sequence).transpose(0, 1).unsqueeze(0);
  }
  // Each token's row times its sequence's matrix, or that turned.
  Tensor rows_times(const Tensor& t, const Tensor& state, bool turned) const {
    const Tensor C = turned ? state.transpose(-1, -2) : state;
    return packed() ? t.unsqueeze(-2).matmul(at_tokens(C)).squeeze(-2) : t.matmul(C);
  }
  Tensor per_sequence(const Tensor& t) const { // (B, H, T, size): of other sequences, zeros
    return packed() ? t * in_sequence.unsqueeze(-1) : t;
  }
  // Sums from each token to the end of its sequence.
  Tensor to_the_end(const Tensor& t) const {
    const Tensor sums = t.flip(-1).cumsum(-1).flip(-1);
    if (!packed()) return sums;
    return sums - at::constant_pad_nd(sums, {0, 1}, 0).index_select(-1, end);
  }

  Tensor C_end() const {
    const Tensor weighted = k * (end_weight * s).unsqueeze(-1);
    return decay.unsqueeze(-1).unsqueeze(-1) * C0 + weighted.transpose(-1, -2).matmul(v);
  }
  Tensor n_end() const {
    return decay.unsqueeze(-1) * n0 + (k * (end_weight * s).unsqueeze(-1)).sum(-2);
  }
  Tensor back_state(const Tensor& t) const { return packed() && x.reverse ? t.flip(0) : t; }

  Outputs outputs() const {
    Tensor h = normalizes(x) ? numerator / d.unsqueeze(-1) : numerator;
    if (normalizes(x) && !x.exact) {
      // The divisor of what is not divided by e^m is a constant: m cancels.
      const Tensor lift = at::exp(m - m.detach()).to(numerator.scalar_type());
      h = numerator * (lift / d.detach()).unsqueeze(-1);
    }
    const auto none = [&] { return at::empty({0}, C0.options()); };
    return {
        back_over_time(h).to(h_dtype(x)), back_state(C_end()),
        normalizes(x) ? back_state(n_end()) : none(),
        stabilizes(x) ? back_state(m_end).to(C0.scalar_type()) : none(), none()};
  }

  Gradients backward(const Upstream& g) const {
    const auto dtype = wide(x);
    const auto state = [&](const Opt& t, const Tensor& like) {
      return defined(t) ? back_state(*t).to(dtype)
                        : at::zeros_like(like, like.options().dtype(dtype));
    };
    const Tensor gh = defined(g[0]) ? over_time(*g[0]).to(dtype) : at::zeros_like(numerator),
                 gC = state(g[1], C0), gn = state(normalizes(x) ? g[2] : Opt(), n0),
                 gm = state(stabilizes(x) ? g[3] : Opt(), m0);
    const Tensor u = normalizes(x) ? gh / d.unsqueeze(-1) : gh;
    Tensor e = at::zeros_like(carry), of_m = at::zeros_like(carry);
    if (normalizes(x) && x.exact) {
      const Tensor through = (u * numerator).sum(-1) / d;
      e = x.normalizer == Normalizer::sum
              ? -through
              : -at::where(at::abs(r).gt(least), at::sign(r) * through, at::zeros_like(through));
      if (stabilizes(x)) of_m = through * -x.eps;
    }
    const Tensor N = (u.matmul(v.transpose(-1, -2)) + e.unsqueeze(-1)) * W, E = N * s.unsqueeze(-2),
                 carried = carry.unsqueeze(-1);
    const Tensor gq =
        E.matmul(k) + carried * (rows_times(u, C0, true) + e.unsqueeze(-1) * at_tokens(n0));
    const Tensor own_end = packed() ? end_weight.sum(0, /*keepdim=*/true) : end_weight,
                 weight = (s * own_end).unsqueeze(-1);
    const Tensor met = rows_times(v, gC, true) + at_tokens(gn);
    const Tensor gk = E.transpose(-1, -2).matmul(q) + weight * met;
    const Tensor gv = P.transpose(-1, -2).matmul(u) + weight * rows_times(k, gC, false);
    const Tensor own = (G * N).sum(-2) + own_end * (k * met).sum(-1);
    Tensor of_input = s * own;
    const Tensor flow =
        (C_end() * gC).sum(at::IntArrayRef({-2, -1})) + (n_end() * gn).sum(-1); // (rows, H)
    Tensor of_decay = to_the_end((q * gq).sum(-1) - (k * gk).sum(-1)) + at_tokens(flow);
    const Tensor scaled_q = per_sequence(q * carried);
    const Tensor gC0 =
                     scaled_q.transpose(-1, -2).matmul(u) + decay.unsqueeze(-1).unsqueeze(-1) * gC,
                 gn0 = (scaled_q * e.unsqueeze(-1)).sum(-2) + decay.unsqueeze(-1) * gn;
    Tensor gm0 = at::zeros_like(gm);
    if (stabilizes(x)) {
      // The gradient of a maximum goes to where it was.
      const auto where = [&](const Tensor& exponent, const Tensor& g) {
        const Tensor places = at::arange(at::Scalar(steps + 1), x.q.options().dtype(at::kLong));
        return exponent.argmax(-1, true).eq(places).to(dtype) * g.unsqueeze(-1);
      };
      const Tensor gm_end = gm - flow, at_steps = where(D, of_m), at_ends = where(D_end, gm_end);
      Tensor to_ends = at_ends.narrow_symint(-1, 0, steps);
      if (packed()) to_ends = to_ends.sum(0, /*keepdim=*/true);
      const Tensor to_inputs = at_steps.narrow_symint(-1, 0, steps).sum(-2) + to_ends;
      of_input = of_input + to_inputs;
      of_decay = of_decay + to_the_end(of_m - to_inputs) + at_tokens(gm_end);
      Tensor to_state = at_steps.select_symint(-1, steps); // (B, H, T)
      to_state = packed() ? (to_state * in_sequence).sum(-1) : to_state.sum(-1);
      gm0 = to_state + at_ends.select_symint(-1, steps) +
            (C0 * gC0).sum(at::IntArrayRef({-2, -1})) + (n0 * gn0).sum(-1);
    }
    const auto none = [&] { return at::empty({0}, C0.options()); };
    const auto gate = [&](const Opt& given, const Tensor& t) {
      return defined(given) ? back_over_time(t.unsqueeze(-1)).squeeze(-1).to(dtype) : none();
    };
    return {
        sum_shared(gq * x.scale, x.q),
        sum_shared(gk, x.k),
        back_over_time(gv).to(x.v.scalar_type()),
        gate(x.log_decay, of_decay),
        gate(x.log_input, of_input),
        gate(x.input_scale, own),
        back_state(gC0),
        normalizes(x) ? back_state(gn0) : none(),
        stabilizes(x) ? back_state(gm0).to(dtype) : none()};
  }
};

#ifdef TORCH_EXT_CUDA
// In double precision, and on GPUs without products of bfloat16, it is the composite, whose memory grows with T squared.
Gradients cuda_backward(
    const Opt& grad_h, const Opt& grad_C, const Opt& grad_n, const Opt& grad_m, const Tensor& q,
    const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Opt& C, const Opt& n, const Opt& m, const Tensor& kept,
    const Opt& cu_seqlens, double scale, double eps, Text normalizer, bool exact, bool reverse,
    bool wide_h) {
  const OnCuda device(q);
  const MatrixMemory x = arguments(
      q, k, v, log_decay, log_input, input_scale, C, n, m, cu_seqlens, scale, eps, normalizer,
      exact, reverse, wide_h);
  const Upstream g{grad_h, grad_C, grad_n, grad_m};
  if (cuda::matrix_memory_has_backward(kernel_dtype(v.scalar_type())))
    return backward_on(
        [&](DType dtype, const MatrixMemoryBackward& p) { device(dtype, p); }, g, x, kept);
  const Gradients grads = empty_gradients(g, x, kept);
  const auto copy = [](const auto&... to) {
    return [&](const auto&... from) { ((to.numel() > 0 ? to.copy_(from) : to), ...); };
  };
  std::apply(std::apply(copy, grads), Composite(x).backward(g));
  return grads;
}
#endif

// ---- derivatives ----

variable_list differentiable(const MatrixMemory& x) {
  const auto or_none = [](const Opt& t) { return t.value_or(Tensor()); };
  return {
      x.q,
      x.k,
      x.v,
      or_none(x.log_decay),
      or_none(x.log_input),
      or_none(x.input_scale),
      or_none(x.C),
      or_none(x.n),
      or_none(x.m)};
}
variable_list saved(const MatrixMemory& x) {
  variable_list all = differentiable(x);
  all.push_back(x.cu_seqlens.value_or(Tensor()));
  return all;
}
constexpr size_t kSaved = kGradients + 1;
MatrixMemory restored(const variable_list& s, size_t at, AutogradContext* ctx) {
  return {
      s[at],
      s[at + 1],
      s[at + 2],
      opt(s[at + 3]),
      opt(s[at + 4]),
      opt(s[at + 5]),
      opt(s[at + 6]),
      opt(s[at + 7]),
      opt(s[at + 8]),
      opt(s[at + 9]),
      ctx->saved_data["scale"].toDouble(),
      ctx->saved_data["eps"].toDouble(),
      Normalizer(ctx->saved_data["normalizer"].toInt()),
      ctx->saved_data["exact"].toBool(),
      ctx->saved_data["reverse"].toBool(),
      ctx->saved_data["wide_h"].toBool()};
}
void save_options(AutogradContext* ctx, const MatrixMemory& x) {
  ctx->set_materialize_grads(false);
  ctx->saved_data["scale"] = x.scale;
  ctx->saved_data["eps"] = x.eps;
  ctx->saved_data["normalizer"] = int64_t(x.normalizer);
  ctx->saved_data["exact"] = x.exact;
  ctx->saved_data["reverse"] = x.reverse;
  ctx->saved_data["wide_h"] = x.wide_h;
}
template <class Tuple>
variable_list as_list(const Tuple& g) {
  return std::apply([](const auto&... each) { return variable_list{each...}; }, g);
}
Gradients as_tuple(const variable_list& g) {
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8]};
}

struct Forward : torch::autograd::Function<Forward> {
  static constexpr bool is_traceable = true;
  static variable_list forward(
      AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v, const Opt& log_decay,
      const Opt& log_input, const Opt& input_scale, const Opt& C, const Opt& n, const Opt& m,
      const Opt& cu_seqlens, double scale, double eps, Text normalizer, bool exact, bool reverse,
      bool wide_h) {
    const MatrixMemory x = arguments(
        q, k, v, log_decay, log_input, input_scale, C, n, m, cu_seqlens, scale, eps, normalizer,
        exact, reverse, wide_h);
    save_options(ctx, x);
    const Outputs out = [&] {
      BelowAutograd guard;
      return call(x, /*checkpoints=*/!q.is_cuda());
    }();
    variable_list all = saved(x);
    all.push_back(std::get<4>(out));
    ctx->save_for_backward(std::move(all));
    return {std::get<0>(out), std::get<1>(out), std::get<2>(out), std::get<3>(out)};
  }
  static variable_list backward(AutogradContext* ctx, variable_list g) {
    variable_list out(kSaved + 6);
    if (!g[0].defined() && !g[1].defined() && !g[2].defined() && !g[3].defined()) return out;
    const variable_list s = ctx->get_saved_variables();
    const MatrixMemory x = restored(s, 0, ctx);
    const variable_list grads =
        as_list(call_backward({opt(g[0]), opt(g[1]), opt(g[2]), opt(g[3])}, x, s[kSaved]));
    for (size_t i = 0; i < kGradients; ++i)
      if (s[i].defined()) out[i] = grads[i];
    return out;
  }
};

// The gradient, differentiable itself: fused at first, and where it is differentiated by its composite.
struct Backward : torch::autograd::Function<Backward> {
  static constexpr bool is_traceable = true;
  static variable_list forward(
      AutogradContext* ctx, const Opt& grad_h, const Opt& grad_C, const Opt& grad_n,
      const Opt& grad_m, const Tensor& q, const Tensor& k, const Tensor& v, const Opt& log_decay,
      const Opt& log_input, const Opt& input_scale, const Opt& C, const Opt& n, const Opt& m,
      const Tensor& kept, const Opt& cu_seqlens, double scale, double eps, Text normalizer,
      bool exact, bool reverse, bool wide_h) {
    const MatrixMemory x = arguments(
        q, k, v, log_decay, log_input, input_scale, C, n, m, cu_seqlens, scale, eps, normalizer,
        exact, reverse, wide_h);
    save_options(ctx, x);
    const Upstream g{grad_h, grad_C, grad_n, grad_m};
    const Gradients grads = [&] {
      BelowAutograd guard;
      return call_backward(g, x, kept);
    }();
    variable_list all;
    for (const Opt& t : g) all.push_back(t.value_or(Tensor()));
    for (const Tensor& t : saved(x)) all.push_back(t);
    ctx->save_for_backward(std::move(all));
    return as_list(grads);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gg) {
    constexpr size_t kDifferentiable = 4 + kGradients; // all tensors but kept and cu_seqlens
    variable_list out(kDifferentiable + 8);
    differentiate_composite(
        ctx->get_saved_variables(), kDifferentiable, gg,
        [&](const variable_list& s) {
          const MatrixMemory x = restored(s, 4, ctx);
          return as_list(Composite(x).backward({opt(s[0]), opt(s[1]), opt(s[2]), opt(s[3])}));
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

Outputs autograd(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Opt& C, const Opt& n, const Opt& m, const Opt& cu_seqlens,
    double scale, double eps, Text normalizer, bool exact, bool reverse, bool wide_h,
    bool checkpoints) {
  const MatrixMemory x = arguments(
      q, k, v, log_decay, log_input, input_scale, C, n, m, cu_seqlens, scale, eps, normalizer,
      exact, reverse, wide_h);
  if (any_tangent(differentiable(x))) {
    check(x, /*step=*/false, {});
    return Composite(x).outputs();
  }
  if (torch::autograd::compute_requires_grad(q, k, v, log_decay, log_input, input_scale, C, n, m)) {
    const variable_list out = apply_op<Forward>(
        q, k, v, log_decay, log_input, input_scale, C, n, m, cu_seqlens, scale, eps, normalizer,
        exact, reverse, wide_h);
    return {out[0], out[1], out[2], out[3], at::empty({0}, q.options().dtype(wide(x)))};
  }
  BelowAutograd below;
  return call(x, checkpoints);
}
Gradients autograd_backward(
    const Opt& grad_h, const Opt& grad_C, const Opt& grad_n, const Opt& grad_m, const Tensor& q,
    const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Opt& C, const Opt& n, const Opt& m, const Tensor& kept,
    const Opt& cu_seqlens, double scale, double eps, Text normalizer, bool exact, bool reverse,
    bool wide_h) {
  const MatrixMemory x = arguments(
      q, k, v, log_decay, log_input, input_scale, C, n, m, cu_seqlens, scale, eps, normalizer,
      exact, reverse, wide_h);
  const Upstream g{grad_h, grad_C, grad_n, grad_m};
  if (has_tangent(grad_h) || has_tangent(grad_C) || has_tangent(grad_n) || has_tangent(grad_m) ||
      any_tangent(differentiable(x)))
    return Composite(x).backward(g);
  if (torch::autograd::compute_requires_grad(
          grad_h, grad_C, grad_n, grad_m, q, k, v, log_decay, log_input, input_scale, C, n, m))
    return as_tuple(apply_op<Backward>(
        grad_h, grad_C, grad_n, grad_m, q, k, v, log_decay, log_input, input_scale, C, n, m, kept,
        cu_seqlens, scale, eps, normalizer, exact, reverse, wide_h));
  BelowAutograd below;
  return call_backward(g, x, kept);
}
Tensor autograd_step_(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Tensor& C, const Opt& n, const Opt& m, const Opt& state_indices,
    double scale, double eps, Text normalizer, bool wide_h) {
  TORCH_CHECK(
      !torch::autograd::compute_requires_grad(q, k, v, log_decay, log_input, input_scale, C, n, m),
      "matrix_memory_step_: an input requires grad, but the state is written in place, where no "
      "gradient can pass; expected torch.no_grad(), or the step that is not in place");
  at::AutoDispatchBelowAutograd below;
  return call_step_(
      q, k, v, log_decay, log_input, input_scale, C, n, m, state_indices, scale, eps, normalizer,
      wide_h);
}
Tensor bump_version_step_(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& log_decay, const Opt& log_input,
    const Opt& input_scale, const Tensor& C, const Opt& n, const Opt& m, const Opt& state_indices,
    double scale, double eps, Text normalizer, bool wide_h) {
  Tensor h;
  {
    BelowAutograd below;
    h = call_step_(
        q, k, v, log_decay, log_input, input_scale, C, n, m, state_indices, scale, eps, normalizer,
        wide_h);
  }
  torch::autograd::impl::bump_version(C);
  if (defined(n)) torch::autograd::impl::bump_version(*n);
  if (defined(m)) torch::autograd::impl::bump_version(*m);
  return h;
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      torch::schema(
          "matrix_memory(Tensor q, Tensor k, Tensor v, Tensor? log_decay=None, "
          "Tensor? log_input=None, Tensor? input_scale=None, Tensor? C=None, Tensor? n=None, "
          "Tensor? m=None, Tensor? cu_seqlens=None, float scale=1.0, float eps=0.0, "
          "str normalizer=\"none\", bool exact=True, bool reverse=False, bool wide_h=False, "
          "bool checkpoints=False) "
          "-> (Tensor h, Tensor C, Tensor n, Tensor m, Tensor kept)"),
      tags);
  m.def(
      torch::schema(
          "matrix_memory_backward(Tensor? grad_h, Tensor? grad_C, Tensor? grad_n, Tensor? grad_m, "
          "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? log_input, "
          "Tensor? input_scale, Tensor? C, Tensor? n, Tensor? m, Tensor kept, "
          "Tensor? cu_seqlens, float scale, float eps, str normalizer, bool exact, bool reverse, "
          "bool wide_h) "
          "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_log_decay, "
          "Tensor grad_log_input, Tensor grad_input_scale, Tensor grad_C, Tensor grad_n, "
          "Tensor grad_m)"),
      tags);
  m.def(
      torch::schema(
          "matrix_memory_step_(Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
          "Tensor? log_input, Tensor? input_scale, Tensor(a!) C, Tensor(b!)? n, Tensor(c!)? m, "
          "Tensor? state_indices=None, float scale=1.0, float eps=0.0, str normalizer=\"none\", "
          "bool wide_h=False) -> Tensor h"),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("matrix_memory", &forward_kernel<OnCpu>);
  m.impl("matrix_memory_backward", &backward_kernel<OnCpu>);
  m.impl("matrix_memory_step_", &step_kernel_<OnCpu>);
}
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
#ifdef TORCH_EXT_CUDA
  m.impl("matrix_memory", &forward_kernel<OnCuda>);
  m.impl("matrix_memory_backward", &cuda_backward);
  m.impl("matrix_memory_step_", &step_kernel_<OnCuda>);
#else
  for (const char* name : {"matrix_memory", "matrix_memory_backward", "matrix_memory_step_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&no_cuda_kernel>());
#endif
}
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("matrix_memory", &meta);
  m.impl("matrix_memory_backward", &meta_backward);
  m.impl("matrix_memory_step_", &meta_step_);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("matrix_memory", &autograd);
  m.impl("matrix_memory_backward", &autograd_backward);
  m.impl("matrix_memory_step_", &autograd_step_);
}
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) {
  m.impl("matrix_memory_step_", &bump_version_step_);
}
TORCH_LIBRARY_IMPL(torch_ext, Conjugate, m) {
  m.impl("matrix_memory_step_", torch::CppFunction::makeFromBoxedFunction<&resolve_lazy>());
}
TORCH_LIBRARY_IMPL(torch_ext, Negative, m) {
  m.impl("matrix_memory_step_", torch::CppFunction::makeFromBoxedFunction<&resolve_lazy>());
}

} // namespace

void check_heads(
    const char* op, const MatrixMemoryNames& names, const Tensor& q, const Tensor& k,
    const Tensor& v, bool step, bool wide_keys) {
  const int64_t dims = step ? 3 : 4;
  const at::ScalarType dtype = q.scalar_type();
  const auto shape_of = [&](const char* head, const char* size) {
    return std::string(step ? "(B, " : "(B, T, ") + head + ", " + size + ")";
  };
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      op, ": ", names.q, " has dtype ", dtype_text(dtype),
      ", expected float32, float64, bfloat16 or float16");
  TORCH_CHECK_VALUE(
      q.dim() == dims, op, ": ", names.q, " has shape ", shape_text(q.sym_sizes()), ", expected ",
      shape_of("G", names.K));
  const std::string of_q = std::string("of ") + names.q;
  for (const auto& [name, t] : {std::pair{names.k, &k}, std::pair{names.v, &v}}) {
    if (!(wide_keys && t == &v && state_dtype(v.scalar_type()) == dtype))
      check_dtype(op, name, *t, dtype, "the dtype " + of_q);
    check_device(op, name, *t, q.device(), "the device " + of_q);
  }
  auto shape = q.sym_sizes().vec();
  if (step)
    check_shape(op, names.k, k, {"B", "G", names.K}, shape, "the shape " + of_q);
  else
    check_shape(op, names.k, k, {"B", "T", "G", names.K}, shape, "the shape " + of_q);
  TORCH_CHECK_VALUE(
      v.dim() == dims, op, ": ", names.v, " has shape ", shape_text(v.sym_sizes()), ", expected ",
      shape_of("H", names.V));
  const SymInt groups = q.sym_size(-2), heads = v.sym_size(-2);
  shape[size_t(dims - 2)] = heads, shape[size_t(dims - 1)] = v.sym_size(-1);
  if (step)
    check_shape(op, names.v, v, {"B", "H", names.V}, shape, "the batch " + of_q);
  else
    check_shape(op, names.v, v, {"B", "T", "H", names.V}, shape, "the batch and steps " + of_q);
  TORCH_CHECK_VALUE(
      groups.sym_ge(1).expect_true(__FILE__, __LINE__) && equal(heads % groups, 0), op, ": ",
      names.q, " has shape ", shape_text(q.sym_sizes()), ", expected a number of heads, G=", groups,
      ", that divides H=", heads, ", the heads of ", names.v);
}

void check_gate(const char* op, const char* name, const Tensor& gate, const Tensor& v, bool half) {
  const at::ScalarType dtype = v.scalar_type(), states = state_dtype(dtype);
  TORCH_CHECK_TYPE(
      gate.scalar_type() == states || (half && gate.scalar_type() == dtype), op, ": ", name,
      " has dtype ", dtype_text(gate.scalar_type()), ", expected ", dtype_text(states),
      half && states != dtype ? " or " + dtype_text(dtype) : "", ", beside tokens of ",
      dtype_text(dtype));
  check_device(op, name, gate, v.device(), "the device of the other inputs");
  auto shape = v.sym_sizes().vec();
  shape.pop_back();
  if (shape.size() == 2)
    check_shape(op, name, gate, {"B", "H"}, shape, "one number per head");
  else
    check_shape(op, name, gate, {"B", "T", "H"}, shape, "one number per head and step");
}

void check_cu_seqlens(const char* op, const MatrixMemoryNames& names, const MatrixMemory& x) {
  if (!defined(x.cu_seqlens)) return;
  check_index_dtype(op, "cu_seqlens", *x.cu_seqlens);
  check_index_device(op, "cu_seqlens", *x.cu_seqlens, x.q.device());
  TORCH_CHECK_VALUE( // in the words of the rule for vmap, which knows the one operator alone
      !x.cu_seqlens->key_set().has(c10::DispatchKey::FuncTorchBatched), op,
      ": cu_seqlens has a vmap dimension, expected none: it has to be the same for all that vmap "
      "runs over");
  TORCH_CHECK_VALUE(
      x.cu_seqlens->dim() == 1, op, ": cu_seqlens has shape ",
      shape_text(x.cu_seqlens->sym_sizes()), ", expected (num_sequences + 1,)");
  TORCH_CHECK_VALUE(
      x.cu_seqlens->sym_size(0).sym_ge(1).expect_true(__FILE__, __LINE__), op,
      ": cu_seqlens is empty, expected (num_sequences + 1,) offsets");
  TORCH_CHECK_VALUE(
      equal(x.v.sym_size(0), 1), op, ": ", names.v, " has shape ", shape_text(x.v.sym_sizes()),
      ", expected B=1 with cu_seqlens: sequences lie end to end in one row");
}

void check_states(
    const char* op, const MatrixMemoryNames& names, const MatrixMemory& x, bool step,
    const Opt& state_indices) {
  const SymInt heads = x.v.sym_size(-2), keys = x.q.sym_size(-1);
  check_cu_seqlens(op, names, x);
  SymInt rows = rows_of(x);
  const auto required = [&](const char* name, const Opt& s) { // the dispatcher takes None for it
    TORCH_CHECK_TYPE(defined(s), op, ": ", name, " is None, expected a tensor, which a step has");
  };
  if (step) {
    required(names.C, x.C);
    if (normalizes(x)) required(names.n, x.n);
    if (stabilizes(x)) required(names.m, x.m);
  }
  if (defined(state_indices)) {
    check_index_dtype(op, "state_indices", *state_indices);
    check_index_device(op, "state_indices", *state_indices, x.q.device());
    check_shape(
        op, "state_indices", *state_indices, {"B"}, {x.v.sym_size(0)},
        std::string("one index per row of ") + names.v);
    TORCH_CHECK_VALUE(
        x.C->dim() == 4, op, ": ", names.C, " has shape ", shape_text(x.C->sym_sizes()),
        ", expected (num_rows, H, ", names.K, ", ", names.V, "), a pool of states");
    rows = x.C->sym_size(0);
  }
  const char* first = defined(state_indices)           ? "num_rows"
                      : step || !defined(x.cu_seqlens) ? "B"
                                                       : "num_sequences";
  const auto state = [&](const char* name, const Opt& s, bool wanted,
                         std::initializer_list<const char*> letters,
                         std::initializer_list<SymInt> sizes) {
    if (!defined(s)) return;
    TORCH_CHECK_VALUE(
        wanted, op, ": ", name, " is given, expected None with normalizer '", name_of(x.normalizer),
        "'");
    check_dtype(
        op, name, *s, wide(x),
        "the dtype of the states for inputs of " + dtype_text(x.v.scalar_type()));
    check_device(op, name, *s, x.q.device(), "the device of the inputs");
    check_shape(op, name, *s, letters, sizes, "the states of each sequence");
  };
  state(names.C, x.C, true, {first, "H", names.K, names.V}, {rows, heads, keys, x.v.sym_size(-1)});
  state(names.n, x.n, normalizes(x), {first, "H", names.K}, {rows, heads, keys});
  state(names.m, x.m, stabilizes(x), {first, "H"}, {rows, heads});
}

void check_no_grad(const char* op, const variable_list& tensors) {
  bool any = false;
  for (const Tensor& t : tensors) any = any || (t.defined() && t.requires_grad());
  TORCH_CHECK(
      !any || !at::GradMode::is_enabled(), op,
      ": an input requires grad, but the state is written in place, where no gradient can pass; "
      "expected torch.no_grad(), or ",
      std::string(op).substr(0, strlen(op) - 1), ", which is differentiable");
}

MatrixMemoryOutputs matrix_memory_step(
    const char* op, const MatrixMemory& x, const Opt& state_indices) {
  const auto run = [&](const Opt& C, const Opt& n, const Opt& m) {
    const auto with_time = [](const Opt& t) { return defined(t) ? Opt(t->unsqueeze(1)) : Opt(); };
    MatrixMemory one = x;
    one.q = x.q.unsqueeze(1), one.k = x.k.unsqueeze(1), one.v = x.v.unsqueeze(1);
    one.log_decay = with_time(x.log_decay), one.log_input = with_time(x.log_input);
    one.input_scale = with_time(x.input_scale);
    one.C = C, one.n = n, one.m = m;
    MatrixMemoryOutputs out = call_matrix_memory(one);
    out.h = out.h.select(1, 0);
    return out;
  };
  if (!defined(state_indices)) return run(x.C, x.n, x.m);
  variable_list pools{*x.C};
  if (defined(x.n)) pools.push_back(*x.n);
  if (defined(x.m)) pools.push_back(*x.m);
  MatrixMemoryOutputs out;
  const auto [h, next] = step_in_pools(op, pools, *state_indices, [&](const variable_list& rows) {
    size_t i = 1;
    const Opt n = defined(x.n) ? Opt(rows[i++]) : Opt(), m = defined(x.m) ? Opt(rows[i]) : Opt();
    out = run(rows[0], n, m);
    variable_list after{out.C};
    if (defined(x.n)) after.push_back(out.n);
    if (defined(x.m)) after.push_back(out.m);
    return std::pair(out.h, after);
  });
  size_t i = 1;
  out.h = h, out.C = next[0];
  if (defined(x.n)) out.n = next[i++];
  if (defined(x.m)) out.m = next[i];
  return out;
}

// What kernels alone can see, such as the contents of cu_seqlens, they refuse in the name of their operator: it becomes the
// member's, which is what was called.
template <class Call>
auto in_the_name_of(const char* op, const Call& call) {
  const auto renamed = [op](const c10::Error& e) {
    const std::string& text = e.msg();
    const size_t colon = text.find(": ");
    const bool ours = text.rfind(kName, 0) == 0 && colon != std::string::npos;
    return ours ? op + text.substr(colon) : text;
  };
  try {
    return call();
  } catch (const c10::ValueError& e) {
    C10_THROW_ERROR(ValueError, renamed(e));
  } catch (const c10::NotImplementedError& e) {
    C10_THROW_ERROR(NotImplementedError, renamed(e));
  }
}

MatrixMemoryOutputs call_matrix_memory(const MatrixMemory& x) {
  return in_the_name_of(x.op, [&]() -> MatrixMemoryOutputs {
    auto [h, C, n, m, kept] = call(x, /*checkpoints=*/false);
    return {h, C, n, m};
  });
}
Tensor call_matrix_memory_step_(const MatrixMemory& x, const Opt& state_indices) {
  return in_the_name_of(x.op, [&] {
    return call_step_(
        x.q, x.k, x.v, x.log_decay, x.log_input, x.input_scale, *x.C, x.n, x.m, state_indices,
        x.scale, x.eps, name_of(x.normalizer), x.wide_h);
  });
}

} // namespace torch_ext
