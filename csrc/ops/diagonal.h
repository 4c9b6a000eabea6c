// Everything that an operator of the diagonal family is, from its cell: checks, Meta, CPU and CUDA kernels, derivatives of
// every order and mode, autocast, steps. An operator states its cell, its arguments' names and its options:
//
//   struct MinGruOperator {
//     using Cell = MinGru;
//     using Options = torch_ext::Options<std::string_view>;              after the tensors, before `reverse`
//     static constexpr std::array names{"gate", "candidate"};            the cell's inputs, in order
//     static constexpr const char* schema = "str activation=\"identity\"";
//     static unsigned flags(std::string_view activation);               for the cell's constructor; raises ValueError
//   };
//   static const RegisterDiagonal<MinGruOperator> registered;
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/library.h>

#include <functional>

#include "../cells/all.h"
#include "../core/autograd_op.h"
#include "../core/checks.h"
#include "../core/tensor_lane.h"
#include "../cpu/dispatch.h"
#include "torch_ext/torch_ext.h"
#ifdef TORCH_EXT_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "../cuda/diagonal.h"
#endif

namespace torch_ext {

using Pair = std::tuple<Tensor, Tensor>;

template <class... O>
struct Options {};

// The recurrence of all of them, of which their second derivatives are made.
inline Pair call_linear_scan(
    const Tensor& a, const Tensor& b, const Opt& initial_state, const Opt& cu_seqlens,
    bool reverse) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("torch_ext::linear_scan", "")
          .typed<Pair(const Tensor&, const Tensor&, const Opt&, const Opt&, bool)>();
  return op.call(a, b, initial_state, cu_seqlens, reverse);
}

// For every step the state before it, given the state after every step and before the first. h (B, T, D), in time order
// from the first step to the last, or from the last to the first if `reverse`.
Tensor state_before(const Tensor& h, const Opt& initial_state, const Opt& cu_seqlens, bool reverse);

// cu_seqlens as int64 on the device, its contents checked where that costs no synchronisation.
Tensor sequence_offsets(
    const char* op, const Tensor& cu_seqlens, int64_t num_steps, at::Device device);
// state_indices likewise. Undefined where there are none.
Tensor state_rows(
    const char* op, const Opt& state_indices, int64_t batch, int64_t num_rows, at::Device device);

// The tensors `x` alike in dtype, device and shape, of which `letters` are the dimensions.
void check_inputs(
    const char* op, at::ArrayRef<const char*> names, at::TensorList x, bool complex,
    std::initializer_list<const char*> letters);
void check_index_dtype(const char* op, const char* name, const Tensor& x);
void check_index_device(const char* op, const char* name, const Tensor& x, at::Device device);
void check_sequences(
    const char* op, at::ArrayRef<const char*> names, at::TensorList x, bool complex,
    const Opt& initial_state, const Opt& cu_seqlens);
// That no two elements of the state that is written in place share memory.
void check_no_overlap(const char* op, const Tensor& state);
void check_step(
    const char* op, at::ArrayRef<const char*> names, at::TensorList x, bool complex,
    const Tensor& state, const Opt& state_indices);

// A differentiable step for the rows of a pool of states: run(states) -> (y, next states), a row each. y, and the whole pool
// with the next states in it.
Pair step_in_pool(
    const char* op, const Tensor& pool, const Tensor& state_indices,
    const std::function<Pair(const Tensor&)>& run);
// The same of several pools at once: run(a row of each) -> (y, next rows).
std::pair<Tensor, variable_list> step_in_pools(
    const char* op, const variable_list& pools, const Tensor& state_indices,
    const std::function<std::pair<Tensor, variable_list>(const variable_list&)>& run);
// The CUDA kernel of an operator that has none in this build: says so.
void no_cuda_kernel(const c10::OperatorHandle& op, torch::jit::Stack*);
// Of a step in place, for tensors that are still to be conjugated or negated: torch's own fallback, which does that for
// other operators, wants what is written to be returned.
void resolve_lazy(const c10::OperatorHandle& op, torch::jit::Stack*);

Strided strided(const Tensor& x); // (B, T, D) or (B, D)
Strided strided(const Opt& x);
DType kernel_dtype(at::ScalarType dtype);

// torch's own threads, through its C interface: at::parallel_for would be serial in a library built without OpenMP.
inline cpu::Parallel torch_threads() {
  return {
      at::get_num_threads(),
      [](int64_t n, int64_t grain, void (*fn)(int64_t, int64_t, void*), void* ctx) {
        TORCH_CHECK(
            torch_parallel_for(0, n, grain, fn, ctx) == 0, "torch_ext: parallel_for failed");
      }};
}

template <
    class Op, class = std::make_index_sequence<Op::names.size()>, class = typename Op::Options>
struct Diagonal;

template <class Op, size_t... I, class... O>
struct Diagonal<Op, std::index_sequence<I...>, Options<O...>> {
  using Cell = typename Op::Cell;
  static constexpr size_t N = sizeof...(I);
  static_assert(N == size_t(num_inputs<Cell>), "as many names as the cell has inputs");
  static constexpr int kCell = DiagonalCells::index<Cell>();
  static_assert(kCell >= 0, "the cell is not in DiagonalCells (csrc/cells/all.h)");
  static constexpr bool kIsLinearScan = std::is_same_v<Cell, LinearScan>;
  static constexpr const char* name = Cell::name;
  using Inputs = std::array<Tensor, N>;
  template <size_t>
  using In = const Tensor&;
  template <size_t>
  using Out = Tensor;
  using Gradients = std::tuple<Out<I>..., Tensor>; // of the inputs and of the initial state

  // ---- calls through the dispatcher ----

  static Pair call(
      In<I>... x, const Opt& initial_state, const Opt& cu_seqlens, O... options, bool reverse) {
    static const auto op =
        find(name).template typed<Pair(In<I>..., const Opt&, const Opt&, O..., bool)>();
    return op.call(x..., initial_state, cu_seqlens, options..., reverse);
  }
  static Gradients call_backward(
      const Opt& grad_h, const Opt& grad_final_state, In<I>... x, const Tensor& h,
      const Opt& initial_state, const Opt& cu_seqlens, O... options, bool reverse) {
    static const auto op = find(std::string(name) + "_backward")
                               .template typed<Gradients(
                                   const Opt&, const Opt&, In<I>..., const Tensor&, const Opt&,
                                   const Opt&, O..., bool)>();
    return op.call(
        grad_h, grad_final_state, x..., h, initial_state, cu_seqlens, options..., reverse);
  }
  static Pair call_step(In<I>... x, const Tensor& state, const Opt& state_indices, O... options) {
    static const auto op = find(std::string(name) + "_step")
                               .template typed<Pair(In<I>..., const Tensor&, const Opt&, O...)>();
    return op.call(x..., state, state_indices, options...);
  }
  static Tensor call_step_(
      In<I>... x, const Tensor& state, const Opt& state_indices, O... options) {
    static const auto op = find(std::string(name) + "_step_")
                               .template typed<Tensor(In<I>..., const Tensor&, const Opt&, O...)>();
    return op.call(x..., state, state_indices, options...);
  }
  static c10::OperatorHandle find(const std::string& op) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("torch_ext::" + op).c_str(), "");
  }

  // ---- Meta: checks and output shapes; kernels begin with it ----

  static Pair meta(
      In<I>... x, const Opt& initial_state, const Opt& cu_seqlens, O... options, bool) {
    check_sequences(name, Op::names, Inputs{x...}, Cell::complex, initial_state, cu_seqlens);
    Op::flags(options...);
    const Tensor& first = std::get<0>(std::tie(x...));
    const auto rows = cu_seqlens ? cu_seqlens->sym_size(0) - 1 : first.sym_size(0);
    return {
        at::empty_symint(first.sym_sizes(), first.options()),
        at::empty_symint(
            {rows, first.sym_size(2)}, first.options().dtype(state_dtype(first.scalar_type())))};
  }
  static Gradients meta_backward(
      const Opt& grad_h, const Opt& grad_final_state, In<I>... x, const Tensor& h,
      const Opt& initial_state, const Opt& cu_seqlens, O... options, bool reverse) {
    auto [like_h, like_state] = meta(x..., initial_state, cu_seqlens, options..., reverse);
    const auto op = std::string(name) + "_backward";
    check_shape(op.c_str(), "h", h, {"B", "T", "D"}, like_h.sym_sizes(), "the shape of the inputs");
    check_dtype(op.c_str(), "h", h, like_h.scalar_type(), "the dtype of the inputs");
    if (defined(grad_h))
      check_shape(
          op.c_str(), "grad_h", *grad_h, {"B", "T", "D"}, like_h.sym_sizes(), "the shape of h");
    if (defined(grad_final_state))
      check_shape(
          op.c_str(), "grad_final_state", *grad_final_state, {"B", "D"}, like_state.sym_sizes(),
          "the shape of the state");
    return {at::empty_symint(x.sym_sizes(), x.options())..., like_state};
  }

  // ---- kernels ----

  template <class Problem>
  static void describe(
      Problem& p, const Inputs& x, const Tensor& offsets, const Opt& initial_state, bool reverse,
      unsigned flags) {
    p.num_sequences = offsets.defined() ? offsets.size(0) - 1 : x[0].size(0);
    p.num_steps = x[0].size(1);
    p.width = x[0].size(2);
    if (offsets.defined()) p.cu_seqlens = offsets.template const_data_ptr<int64_t>();
    p.reverse = reverse;
    p.flags = flags;
    for (size_t i = 0; i < N; ++i) p.inputs[i] = strided(x[i]);
    p.initial_state = strided(initial_state);
  }
  template <class Launch>
  static Pair forward(
      Launch launch, const Inputs& x, const Opt& initial_state, const Opt& cu_seqlens, Pair out,
      unsigned flags, bool reverse) {
    Tensor offsets;
    if (cu_seqlens) offsets = sequence_offsets(name, *cu_seqlens, x[0].size(1), x[0].device());
    DiagonalForward p;
    describe(p, x, offsets, initial_state, reverse, flags);
    p.h = std::get<0>(out).mutable_data_ptr();
    p.final_state = std::get<1>(out).mutable_data_ptr();
    launch(kernel_dtype(x[0].scalar_type()), p);
    return out;
  }
  template <class Launch>
  static Gradients backward(
      Launch launch, Opt grad_h, Opt grad_final_state, const Inputs& x, const Tensor& h,
      const Opt& initial_state, const Opt& cu_seqlens, Gradients out, unsigned flags,
      bool reverse) {
    Tensor offsets;
    if (cu_seqlens) offsets = sequence_offsets(name, *cu_seqlens, x[0].size(1), x[0].device());
    if (defined(grad_h)) grad_h = grad_h->to(x[0].scalar_type());
    if (defined(grad_final_state))
      grad_final_state = grad_final_state->to(state_dtype(x[0].scalar_type()));
    DiagonalBackward p;
    describe(p, x, offsets, initial_state, reverse, flags);
    p.h = strided(h);
    p.grad_h = strided(grad_h);
    p.grad_final_state = strided(grad_final_state);
    ((p.grad_inputs[I] = std::get<I>(out).mutable_data_ptr()), ...);
    p.grad_initial_state = std::get<N>(out).mutable_data_ptr();
    launch(kernel_dtype(x[0].scalar_type()), p);
    return out;
  }
  // One step for every row, in place in the pool of states.
  template <class Launch>
  static Tensor step_in_place(
      Launch launch, const Inputs& x, const Tensor& state, const Opt& state_indices,
      unsigned flags) {
    check_step(name, Op::names, x, Cell::complex, state, state_indices);
    check_no_overlap(name, state);
    const Tensor rows = state_rows(name, state_indices, x[0].size(0), state.size(0), x[0].device());
    const Tensor pool = state.contiguous(); // the state itself, nearly always
    Tensor h = at::empty({x[0].size(0), x[0].size(1)}, x[0].options());
    Inputs with_time;
    for (size_t i = 0; i < N; ++i) with_time[i] = x[i].unsqueeze(1);
    DiagonalForward p;
    describe(p, with_time, {}, pool, false, flags);
    if (rows.defined()) p.state_rows = rows.const_data_ptr<int64_t>();
    p.h = h.mutable_data_ptr();
    p.final_state = pool.mutable_data_ptr();
    launch(kernel_dtype(x[0].scalar_type()), p);
    if (!pool.is_same(state)) state.copy_(pool);
    return h;
  }

  static void launch_cpu(DType dtype, const DiagonalForward& p) {
    cpu::diagonal_forward(kCell, dtype, p, torch_threads());
  }
  static void launch_cpu(DType dtype, const DiagonalBackward& p) {
    cpu::diagonal_backward(kCell, dtype, p, torch_threads());
  }
  static Pair cpu(
      In<I>... x, const Opt& initial_state, const Opt& cu_seqlens, O... options, bool reverse) {
    return forward(
        [](auto dtype, const auto& p) { launch_cpu(dtype, p); }, {x...}, initial_state, cu_seqlens,
        meta(x..., initial_state, cu_seqlens, options..., reverse), Op::flags(options...), reverse);
  }
  static Gradients cpu_backward(
      const Opt& grad_h, const Opt& grad_final_state, In<I>... x, const Tensor& h,
      const Opt& initial_state, const Opt& cu_seqlens, O... options, bool reverse) {
    return backward(
        [](auto dtype, const auto& p) { launch_cpu(dtype, p); }, grad_h, grad_final_state, {x...},
        h, initial_state, cu_seqlens,
        meta_backward(
            grad_h, grad_final_state, x..., h, initial_state, cu_seqlens, options..., reverse),
        Op::flags(options...), reverse);
  }
  static Tensor cpu_step_(In<I>... x, const Tensor& state, const Opt& state_indices, O... options) {
    return step_in_place(
        [](auto dtype, const auto& p) { launch_cpu(dtype, p); }, {x...}, state, state_indices,
        Op::flags(options...));
  }
#ifdef TORCH_EXT_CUDA
  template <class Problem>
  static void launch_cuda(DType dtype, const Problem& p) {
    // Given back when this returns: the caching allocator hands it out again in the order of the stream.
    const Tensor workspace = at::empty(
        {cuda::diagonal_workspace(kCell, dtype, p)}, at::device(at::kCUDA).dtype(at::kByte));
    cuda::diagonal(
        kCell, dtype, p, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  static Pair cuda(
      In<I>... x, const Opt& initial_state, const Opt& cu_seqlens, O... options, bool reverse) {
    const c10::cuda::CUDAGuard guard(std::get<0>(std::tie(x...)).device());
    return forward(
        [](auto dtype, const auto& p) { launch_cuda(dtype, p); }, {x...}, initial_state, cu_seqlens,
        meta(x..., initial_state, cu_seqlens, options..., reverse), Op::flags(options...), reverse);
  }
  static Gradients cuda_backward(
      const Opt& grad_h, const Opt& grad_final_state, In<I>... x, const Tensor& h,
      const Opt& initial_state, const Opt& cu_seqlens, O... options, bool reverse) {
    const c10::cuda::CUDAGuard guard(std::get<0>(std::tie(x...)).device());
    return backward(
        [](auto dtype, const auto& p) { launch_cuda(dtype, p); }, grad_h, grad_final_state, {x...},
        h, initial_state, cu_seqlens,
        meta_backward(
            grad_h, grad_final_state, x..., h, initial_state, cu_seqlens, options..., reverse),
        Op::flags(options...), reverse);
  }
  static Tensor cuda_step_(
      In<I>... x, const Tensor& state, const Opt& state_indices, O... options) {
    const c10::cuda::CUDAGuard guard(state.device());
    return step_in_place(
        [](auto dtype, const auto& p) { launch_cuda(dtype, p); }, {x...}, state, state_indices,
        Op::flags(options...));
  }
#endif

  // ---- the same as differentiable tensor code, from the same cell ----

  static std::array<TensorLane, N> lanes(const Inputs& x) {
    std::array<TensorLane, N> v;
    for (size_t i = 0; i < N; ++i) v[i] = {x[i].to(state_dtype(x[i].scalar_type()))};
    return v;
  }
  static Pair composite(
      const Inputs& x, const Opt& initial_state, const Opt& cu_seqlens, unsigned flags,
      bool reverse) {
    const Affine<TensorLane> step = Cell(flags).affine(pack<Cell, TensorLane>(lanes(x).data()));
    auto [h, final_state] =
        call_linear_scan(step.a.v, step.b.v, initial_state, cu_seqlens, reverse);
    return {h.to(x[0].scalar_type()), final_state};
  }
  // The carry c[t] = conj(a[t]) (grad_h[t] + c[t+1]) is itself a linear scan, against time.
  static variable_list composite_backward(
      const Opt& grad_h, const Opt& grad_final_state, const Inputs& x, const Tensor& h,
      const Opt& initial_state, const Opt& cu_seqlens, unsigned flags, bool reverse) {
    const Cell cell(flags);
    const auto in = pack<Cell, TensorLane>(lanes(x).data());
    const at::ScalarType accumulate = state_dtype(x[0].scalar_type());
    const Tensor a = at::conj(cell.affine(in).a.v);
    const Tensor g = defined(grad_h) ? grad_h->to(accumulate) : at::zeros_like(a);
    Opt g_final;
    if (defined(grad_final_state)) g_final = grad_final_state->to(accumulate);
    auto [carry, grad_initial] = call_linear_scan(a, a * g, g_final, cu_seqlens, !reverse);
    const TensorLane dh{g + state_before(carry, g_final, cu_seqlens, !reverse)};
    const TensorLane before{state_before(h.to(accumulate), initial_state, cu_seqlens, reverse)};
    const auto gradient = step_vjp(cell, in, before, dh);
    TensorLane dx[N];
    unpack<Cell, TensorLane>(gradient.dx, dx);
    return {dx[I].v.to(x[I].scalar_type())..., grad_initial};
  }

  // ---- derivatives ----

  template <class T>
  struct Owned {
    using type = T;
  };
  template <class Dummy>
  struct Owned<std::basic_string_view<char, Dummy>> {
    using type = std::string;
  };
  static void save_options(AutogradContext* ctx, O... options, bool reverse) {
    [[maybe_unused]] int k = 0;
    ((ctx->saved_data["option" + std::to_string(k++)] = typename Owned<O>::type(options)), ...);
    ctx->saved_data["reverse"] = reverse;
  }
  template <class F>
  static auto with_options(AutogradContext* ctx, F f) {
    [[maybe_unused]] auto next = [ctx, k = 0]() mutable {
      return ctx->saved_data["option" + std::to_string(k++)];
    };
    const std::tuple<typename Owned<O>::type...> options{
        next().template to<typename Owned<O>::type>()...}; // braces: in order
    const bool reverse = ctx->saved_data["reverse"].toBool();
    return std::apply([&](const auto&... o) { return f(O(o)..., reverse); }, options);
  }

  struct Forward : torch::autograd::Function<Forward> {
    static constexpr bool is_traceable = true;
    static variable_list forward(
        AutogradContext* ctx, In<I>... x, const Opt& initial_state, const Opt& cu_seqlens,
        O... options, bool reverse) {
      ctx->set_materialize_grads(false);
      auto [h, final_state] = [&] {
        BelowAutograd guard;
        return call(x..., initial_state, cu_seqlens, options..., reverse);
      }();
      // Another input stands in for one that the gradient does not read: it need not be kept alive.
      const Tensor& first = std::get<0>(std::tie(x...));
      static_assert(gradient_reads<Cell>(0));
      ctx->save_for_backward(
          {(gradient_reads<Cell>(int(I)) ? x : first)..., h, initial_state.value_or(Tensor()),
           cu_seqlens.value_or(Tensor())});
      save_options(ctx, options..., reverse);
      ctx->saved_data["has_initial_state"] = initial_state.has_value();
      ctx->saved_data["has_cu_seqlens"] = cu_seqlens.has_value();
      return {h, final_state};
    }
    static variable_list backward(AutogradContext* ctx, variable_list g) {
      variable_list out(N + 2 + sizeof...(O) + 1);
      if (!g[0].defined() && !g[1].defined()) return out;
      const variable_list s = ctx->get_saved_variables();
      const Gradients grads = with_options(ctx, [&](O... options, bool reverse) {
        return call_backward(
            opt(g[0]), opt(g[1]), s[I]..., s[N], opt(s[N + 1]), opt(s[N + 2]), options..., reverse);
      });
      ((out[I] = std::get<I>(grads)), ...);
      if (s[N + 1].defined()) out[N] = std::get<N>(grads);
      return out;
    }
    // Of linear_scan alone; the others' forward mode is that of their composite, which ends in linear_scan.
    // dh[t] = a[t] dh[t-1] + (da[t] h[t-1] + db[t]): the operator itself.
    static variable_list jvp(
        AutogradContext* ctx, const variable_list& in, const variable_list& d,
        const variable_list& out) requires kIsLinearScan {
      const bool has_initial_state = ctx->saved_data["has_initial_state"].toBool();
      const Opt initial_state = has_initial_state ? Opt(in[2]) : Opt(),
                d_initial = has_initial_state ? Opt(d[2]) : Opt();
      const Opt cu_seqlens =
          ctx->saved_data["has_cu_seqlens"].toBool() ? Opt(in[has_initial_state ? 3 : 2]) : Opt();
      const bool reverse = ctx->saved_data["reverse"].toBool();
      auto [dh, d_final] = call(
          in[0],
          d[0] * state_before(out[0], initial_state, cu_seqlens, reverse).to(in[0].scalar_type()) +
              d[1],
          d_initial, cu_seqlens, reverse);
      return {dh, d_final};
    }
  };

  // The gradient, differentiable itself: fused at first, and where it is differentiated by its composite.
  struct Backward : torch::autograd::Function<Backward> {
    static constexpr bool is_traceable = true;
    static variable_list forward(
        AutogradContext* ctx, const Opt& grad_h, const Opt& grad_final_state, In<I>... x,
        const Tensor& h, const Opt& initial_state, const Opt& cu_seqlens, O... options,
        bool reverse) {
      ctx->set_materialize_grads(false);
      const Gradients grads = [&] {
        BelowAutograd guard;
        return call_backward(
            grad_h, grad_final_state, x..., h, initial_state, cu_seqlens, options..., reverse);
      }();
      ctx->save_for_backward(
          {grad_h.value_or(Tensor()), grad_final_state.value_or(Tensor()), x..., h,
           initial_state.value_or(Tensor()), cu_seqlens.value_or(Tensor())});
      save_options(ctx, options..., reverse);
      return {std::get<I>(grads)..., std::get<N>(grads)};
    }
    static variable_list backward(AutogradContext* ctx, variable_list gg) {
      constexpr size_t kDifferentiable = N + 4; // all tensors but cu_seqlens
      variable_list out(N + 5 + sizeof...(O) + 1);
      differentiate_composite(
          ctx->get_saved_variables(), kDifferentiable, gg,
          [&](const variable_list& s) {
            return with_options(ctx, [&](O... options, bool reverse) {
              return composite_backward(
                  opt(s[0]), opt(s[1]), {s[2 + I]...}, s[2 + N], opt(s[3 + N]), opt(s[4 + N]),
                  Op::flags(options...), reverse);
            });
          },
          out);
      return out;
    }
  };

  static Pair autograd(
      In<I>... x, const Opt& initial_state, const Opt& cu_seqlens, O... options, bool reverse) {
    const bool dual = (has_tangent(x) || ...) || has_tangent(initial_state);
    if (dual && !kIsLinearScan) {
      check_sequences(name, Op::names, Inputs{x...}, Cell::complex, initial_state, cu_seqlens);
      return composite({x...}, initial_state, cu_seqlens, Op::flags(options...), reverse);
    }
    if (dual || torch::autograd::compute_requires_grad(x..., initial_state)) {
      const variable_list out =
          apply_op<Forward>(x..., initial_state, cu_seqlens, options..., reverse);
      return {out[0], out[1]};
    }
    BelowAutograd below;
    return call(x..., initial_state, cu_seqlens, options..., reverse);
  }
  static Gradients autograd_backward(
      const Opt& grad_h, const Opt& grad_final_state, In<I>... x, const Tensor& h,
      const Opt& initial_state, const Opt& cu_seqlens, O... options, bool reverse) {
    const auto as_tuple = [](const variable_list& g) { return Gradients{g[I]..., g[N]}; };
    if (has_tangent(grad_h) || has_tangent(grad_final_state) || (has_tangent(x) || ...) ||
        has_tangent(h) || has_tangent(initial_state))
      return as_tuple(composite_backward(
          grad_h, grad_final_state, {x...}, h, initial_state, cu_seqlens, Op::flags(options...),
          reverse));
    if (torch::autograd::compute_requires_grad(grad_h, grad_final_state, x..., h, initial_state))
      return as_tuple(apply_op<Backward>(
          grad_h, grad_final_state, x..., h, initial_state, cu_seqlens, options..., reverse));
    BelowAutograd below;
    return call_backward(
        grad_h, grad_final_state, x..., h, initial_state, cu_seqlens, options..., reverse);
  }

  // ---- autocast: inputs of several dtypes meet in the widest; the state stays float32 ----

  template <c10::DispatchKey Key, c10::DeviceType Device>
  static Pair autocast(
      In<I>... x, const Opt& initial_state, const Opt& cu_seqlens, O... options, bool reverse) {
    c10::impl::ExcludeDispatchKeyGuard off(Key);
    const at::ScalarType widest = widest_of(x...);
    const Opt state =
        defined(initial_state)
            ? Opt(at::autocast::cached_cast(state_dtype(widest), *initial_state, Device))
            : Opt();
    return call(
        at::autocast::cached_cast(widest, x, Device)..., state, cu_seqlens, options..., reverse);
  }
  template <c10::DispatchKey Key, c10::DeviceType Device>
  static Pair autocast_step(
      In<I>... x, const Tensor& state, const Opt& state_indices, O... options) {
    c10::impl::ExcludeDispatchKeyGuard off(Key);
    const at::ScalarType widest = widest_of(x...);
    return step(
        at::autocast::cached_cast(widest, x, Device)...,
        at::autocast::cached_cast(state_dtype(widest), state, Device), state_indices, options...);
  }
  template <c10::DispatchKey Key, c10::DeviceType Device>
  static Tensor autocast_step_( // the state is written: it has its dtype, or is refused
      In<I>... x, const Tensor& state, const Opt& state_indices, O... options) {
    c10::impl::ExcludeDispatchKeyGuard off(Key);
    const at::ScalarType widest = widest_of(x...);
    return call_step_(
        at::autocast::cached_cast(widest, x, Device)..., state, state_indices, options...);
  }
  static at::ScalarType widest_of(In<I>... x) {
    at::ScalarType widest = std::get<0>(std::tie(x...)).scalar_type();
    ((widest = at::promote_types(widest, x.scalar_type())), ...);
    return widest;
  }

  // ---- one step ----

  // Made of differentiable operators, so every derivative and every transform follows.
  static Pair step(In<I>... x, const Tensor& state, const Opt& state_indices, O... options) {
    check_step(name, Op::names, Inputs{x...}, Cell::complex, state, state_indices);
    const auto run = [&](const Tensor& from) -> Pair {
      auto [h, next] = call(x.unsqueeze(1)..., from, std::nullopt, options..., false);
      return {h.select(1, 0), next};
    };
    return defined(state_indices) ? step_in_pool(name, state, *state_indices, run) : run(state);
  }
  static Tensor autograd_step_(
      In<I>... x, const Tensor& state, const Opt& state_indices, O... options) {
    TORCH_CHECK(
        !torch::autograd::compute_requires_grad(x..., state), name,
        "_step_: an input requires grad, but the state is written in place, "
        "where no gradient can pass; expected torch.no_grad(), or ",
        name, "_step, which is differentiable");
    at::AutoDispatchBelowAutograd below;
    return call_step_(x..., state, state_indices, options...);
  }
  static Tensor bump_version_step_(
      In<I>... x, const Tensor& state, const Opt& state_indices, O... options) {
    Tensor h;
    {
      BelowAutograd below;
      h = call_step_(x..., state, state_indices, options...);
    }
    torch::autograd::impl::bump_version(state);
    return h;
  }
  static Tensor meta_step_(
      In<I>... x, const Tensor& state, const Opt& state_indices, O... options) {
    check_step(name, Op::names, Inputs{x...}, Cell::complex, state, state_indices);
    Op::flags(options...);
    const Tensor& first = std::get<0>(std::tie(x...));
    return at::empty_symint(first.sym_sizes(), first.options());
  }
};

// An operator's four schemas and all their kernels.
template <class Op>
struct RegisterDiagonal {
  using D = Diagonal<Op>;
  using Key = c10::DispatchKey;
  std::vector<torch::Library> libraries;

  torch::Library& library(torch::Library::Kind kind, std::optional<Key> key = std::nullopt) {
    return libraries.emplace_back(kind, "torch_ext", key, __FILE__, __LINE__);
  }
  RegisterDiagonal() {
    const std::string name = D::name, options = *Op::schema ? std::string(", ") + Op::schema : "";
    std::string tensors, plain_options = options, gradients;
    for (const char* x : Op::names)
      tensors += std::string(tensors.empty() ? "" : ", ") + "Tensor " + x,
          gradients += std::string("Tensor grad_") + x + ", ";
    while (plain_options.find('=') != std::string::npos) { // the backward has no defaults
      const size_t from = plain_options.find('='), to = plain_options.find(',', from);
      plain_options.erase(from, to == std::string::npos ? to : to - from);
    }
    const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
    auto& def = library(torch::Library::FRAGMENT);
    def.def(
        torch::schema((name + "(" + tensors +
                       ", Tensor? initial_state=None, Tensor? cu_seqlens=None" + options +
                       ", bool reverse=False) -> (Tensor h, Tensor final_state)")
                          .c_str()),
        tags);
    def.def(
        torch::schema((name + "_backward(Tensor? grad_h, Tensor? grad_final_state, " + tensors +
                       ", Tensor h, Tensor? initial_state, Tensor? cu_seqlens" + plain_options +
                       ", bool reverse) -> (" + gradients + "Tensor grad_initial_state)")
                          .c_str()),
        tags);
    def.def(
        torch::schema((name + "_step(" + tensors + ", Tensor state, Tensor? state_indices=None" +
                       options + ") -> (Tensor h, Tensor state)")
                          .c_str()),
        tags);
    def.def(
        torch::schema((name + "_step_(" + tensors +
                       ", Tensor(a!) state, Tensor? state_indices=None" + options + ") -> Tensor h")
                          .c_str()),
        tags);

    const std::string backward = name + "_backward", step = name + "_step", step_ = name + "_step_";
    const auto implement = [&](Key key, auto f, auto b, auto s) {
      auto& m = library(torch::Library::IMPL, key);
      m.impl(name.c_str(), f);
      m.impl(backward.c_str(), b);
      m.impl(step_.c_str(), s);
    };
    implement(Key::CPU, &D::cpu, &D::cpu_backward, &D::cpu_step_);
#ifdef TORCH_EXT_CUDA
    implement(Key::CUDA, &D::cuda, &D::cuda_backward, &D::cuda_step_);
#endif
    implement(Key::Meta, &D::meta, &D::meta_backward, &D::meta_step_);
    implement(Key::Autograd, &D::autograd, &D::autograd_backward, &D::autograd_step_);
    library(torch::Library::IMPL, Key::ADInplaceOrView).impl(step_.c_str(), &D::bump_version_step_);
    for (const Key key : {Key::Conjugate, Key::Negative})
      library(torch::Library::IMPL, key)
          .impl(step_.c_str(), torch::CppFunction::makeFromBoxedFunction<&resolve_lazy>());
    library(torch::Library::IMPL, Key::CompositeImplicitAutograd).impl(step.c_str(), &D::step);
    const auto autocast = [&](Key key, auto f, auto s, auto in_place) {
      auto& m = library(torch::Library::IMPL, key);
      m.impl(name.c_str(), f);
      m.impl(step.c_str(), s);
      m.impl(step_.c_str(), in_place);
    };
    autocast(
        Key::AutocastCPU, &D::template autocast<Key::AutocastCPU, at::kCPU>,
        &D::template autocast_step<Key::AutocastCPU, at::kCPU>,
        &D::template autocast_step_<Key::AutocastCPU, at::kCPU>);
    autocast(
        Key::AutocastCUDA, &D::template autocast<Key::AutocastCUDA, at::kCUDA>,
        &D::template autocast_step<Key::AutocastCUDA, at::kCUDA>,
        &D::template autocast_step_<Key::AutocastCUDA, at::kCUDA>);
  }
};

} // namespace torch_ext
