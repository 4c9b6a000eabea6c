// torch_ext::causal_conv1d: checks, Meta, CPU and CUDA kernels, derivatives of every order and mode, autocast, steps. The
// kernels: csrc/cpu/causal_conv1d.h, csrc/cuda/causal_conv1d.cuh. What it shares with the recurrences (threads, offsets,
// rows of a pool): diagonal.h.
#include "diagonal.h"
#include "torch_ext/ops.h"
#ifdef TORCH_EXT_CUDA
#include "../cuda/causal_conv1d.h"
#endif

#include <algorithm>

namespace torch_ext {
namespace {

constexpr const char* kName = "causal_conv1d";
using Activation = std::optional<c10::string_view>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>; // of x, weight, bias, initial state
using at::SymInt;

// ---- calls through the dispatcher ----

template <class Signature>
auto find(const char* tail) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("torch_ext::") + kName + tail).c_str(), "")
      .typed<Signature>();
}
Pair call(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Opt& initial_state,
    const Opt& cu_seqlens, Activation activation) {
  static const auto op = find<decltype(call)>("");
  return op.call(x, weight, bias, initial_state, cu_seqlens, activation);
}
Gradients call_backward(
    const Opt& grad_y, const Opt& grad_final_state, const Tensor& x, const Tensor& weight,
    const Opt& bias, const Opt& initial_state, const Opt& cu_seqlens, Activation activation) {
  static const auto op = find<decltype(call_backward)>("_backward");
  return op.call(grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, activation);
}
Pair call_step(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Tensor& state,
    const Opt& state_indices, Activation activation) {
  static const auto op = find<decltype(call_step)>("_step");
  return op.call(x, weight, bias, state, state_indices, activation);
}
Tensor call_step_(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Tensor& state,
    const Opt& state_indices, Activation activation) {
  static const auto op = find<decltype(call_step_)>("_step_");
  return op.call(x, weight, bias, state, state_indices, activation);
}

// ---- checks ----

bool is_silu(Activation activation) {
  if (!activation) return false;
  TORCH_CHECK_VALUE(
      *activation == "silu", kName, ": activation is '", *activation, "', expected None or 'silu'");
  return true;
}
Activation activation_of(bool silu) { return silu ? Activation("silu") : std::nullopt; }

// What kernels compute with: weights and sums.
at::ScalarType wide(const Tensor& x) { return state_dtype(x.scalar_type()); }

void check_parameters(const char* op, const Tensor& x, const Tensor& weight, const Opt& bias) {
  const SymInt width = x.sym_size(-1);
  const auto check = [&](const char* name, const Tensor& p) {
    TORCH_CHECK_TYPE(
        p.scalar_type() == x.scalar_type() || p.scalar_type() == wide(x), op, ": ", name,
        " has dtype ", dtype_text(p.scalar_type()), ", expected ", dtype_text(x.scalar_type()),
        x.scalar_type() == wide(x) ? "" : " or float32", ", as x has dtype ",
        dtype_text(x.scalar_type()));
    check_device(op, name, p, x.device(), "the device of x");
  };
  check("weight", weight);
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && equal(weight.sym_size(0), width), op, ": weight has shape ",
      shape_text(weight.sym_sizes()), ", expected (D=", width, ", W), one filter per channel of x");
  TORCH_CHECK_VALUE(
      weight.sym_size(1).sym_ge(1).expect_true(__FILE__, __LINE__), op, ": weight has shape ",
      shape_text(weight.sym_sizes()), ", expected (D=", width,
      ", W) with at least one tap, W >= 1");
  if (!defined(bias)) return;
  check("bias", *bias);
  check_shape(op, "bias", *bias, {"D"}, {width}, "one number per channel of x");
}

void check(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Opt& initial_state,
    const Opt& cu_seqlens) {
  check_sequences(kName, {"x"}, {x}, /*complex=*/false, /*initial_state=*/{}, cu_seqlens);
  check_parameters(kName, x, weight, bias);
  if (!defined(initial_state)) return;
  check_dtype(
      kName, "initial_state", *initial_state, x.scalar_type(),
      "the dtype of x, whose last rows it holds");
  check_device(kName, "initial_state", *initial_state, x.device(), "the device of x");
  check_shape(
      kName, "initial_state", *initial_state,
      {defined(cu_seqlens) ? "num_sequences" : "B", "D", "W-1"},
      {defined(cu_seqlens) ? cu_seqlens->sym_size(0) - 1 : x.sym_size(0), x.sym_size(2),
       weight.sym_size(1) - 1},
      "the inputs before the first, oldest first");
}

void check_step(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Tensor& state,
    const Opt& state_indices) {
  constexpr const char* op = "causal_conv1d_step";
  check_inputs(op, {"x"}, {x}, /*complex=*/false, {"B", "D"});
  check_parameters(op, x, weight, bias);
  check_dtype(op, "state", state, x.scalar_type(), "the dtype of x, whose last rows it holds");
  check_device(op, "state", state, x.device(), "the device of x");
  const SymInt width = x.sym_size(1), taps = weight.sym_size(1) - 1;
  if (!defined(state_indices))
    return check_shape(
        op, "state", state, {"B", "D", "W-1"}, {x.sym_size(0), width, taps},
        "the inputs before x, oldest first");
  check_index_dtype(op, "state_indices", *state_indices);
  check_index_device(op, "state_indices", *state_indices, x.device());
  check_shape(
      op, "state_indices", *state_indices, {"B"}, {x.sym_size(0)}, "one index per row of x");
  TORCH_CHECK_VALUE(
      state.dim() == 3 && equal(state.sym_size(1), width) && equal(state.sym_size(2), taps), op,
      ": state has shape ", shape_text(state.sym_sizes()), ", expected (num_rows, D=", width,
      ", W-1=", taps, "), a pool of states for x and weight");
}

// ---- Meta: checks and output shapes; kernels begin with it ----

Pair meta(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Opt& initial_state,
    const Opt& cu_seqlens, Activation activation) {
  check(x, weight, bias, initial_state, cu_seqlens);
  is_silu(activation);
  const SymInt rows = defined(cu_seqlens) ? cu_seqlens->sym_size(0) - 1 : x.sym_size(0);
  return {
      at::empty_symint(x.sym_sizes(), x.options()),
      at::empty_symint({rows, x.sym_size(2), weight.sym_size(1) - 1}, x.options())};
}
Gradients meta_backward(
    const Opt& grad_y, const Opt& grad_final_state, const Tensor& x, const Tensor& weight,
    const Opt& bias, const Opt& initial_state, const Opt& cu_seqlens, Activation activation) {
  auto [grad_x, grad_state] = meta(x, weight, bias, initial_state, cu_seqlens, activation);
  constexpr const char* op = "causal_conv1d_backward";
  if (defined(grad_y))
    check_shape(op, "grad_y", *grad_y, {"B", "T", "D"}, x.sym_sizes(), "the shape of x");
  if (defined(grad_final_state))
    check_shape(
        op, "grad_final_state", *grad_final_state, {"B", "D", "W-1"}, grad_state.sym_sizes(),
        "the shape of the state");
  const auto bias_dtype = defined(bias) ? bias->scalar_type() : wide(x);
  return {
      grad_x, at::empty_symint(weight.sym_sizes(), weight.options()),
      at::empty_symint({x.sym_size(2)}, weight.options().dtype(bias_dtype)), grad_state};
}
Tensor meta_step_(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Tensor& state,
    const Opt& state_indices, Activation activation) {
  check_step(x, weight, bias, state, state_indices);
  is_silu(activation);
  return at::empty_symint(x.sym_sizes(), x.options());
}

// ---- kernels: launch(dtype, problem) is the driver of a device ----

ConvState conv_state(const Opt& s) {
  if (!defined(s)) return {};
  return {s->const_data_ptr(), s->stride(0), s->stride(1), s->stride(2)};
}

// The parameters as kernels read them; alive while a kernel runs.
struct Parameters {
  Tensor weight, bias;
  Parameters(const Tensor& x, const Tensor& w, const Opt& b) : weight(w.to(wide(x)).contiguous()) {
    if (defined(b)) bias = b->to(wide(x)).contiguous();
  }
};

void describe(
    CausalConv1dProblem& p, const Tensor& x, const Parameters& parameters, const Tensor& offsets,
    const Opt& initial_state, bool silu) {
  p.num_sequences = offsets.defined() ? offsets.size(0) - 1 : x.size(0);
  p.num_steps = x.size(1);
  p.width = x.size(2);
  p.window = parameters.weight.size(1);
  if (offsets.defined()) p.cu_seqlens = offsets.const_data_ptr<int64_t>();
  p.silu = silu;
  p.x = strided(x);
  p.weight = parameters.weight.const_data_ptr();
  if (parameters.bias.defined()) p.bias = parameters.bias.const_data_ptr();
  p.initial_state = conv_state(initial_state);
}
Tensor offsets_of(const Tensor& x, const Opt& cu_seqlens) {
  return defined(cu_seqlens) ? sequence_offsets(kName, *cu_seqlens, x.size(1), x.device())
                             : Tensor();
}

template <class Launch>
Pair forward(
    Launch launch, const Tensor& x, const Tensor& weight, const Opt& bias, const Opt& initial_state,
    const Opt& cu_seqlens, Activation activation) {
  auto [y, final_state] = meta(x, weight, bias, initial_state, cu_seqlens, activation);
  const Parameters parameters(x, weight, bias);
  const Tensor offsets = offsets_of(x, cu_seqlens);
  CausalConv1dForward p;
  describe(p, x, parameters, offsets, initial_state, is_silu(activation));
  p.y = y.mutable_data_ptr();
  p.final_state = final_state.mutable_data_ptr();
  launch(kernel_dtype(x.scalar_type()), p);
  return {y, final_state};
}

template <class Launch>
Gradients backward(
    Launch launch, const Opt& grad_y, const Opt& grad_final_state, const Tensor& x,
    const Tensor& weight, const Opt& bias, const Opt& initial_state, const Opt& cu_seqlens,
    Activation activation) {
  auto [grad_x, grad_weight, grad_bias, grad_state] = meta_backward(
      grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, activation);
  const Parameters parameters(x, weight, bias);
  const Tensor offsets = offsets_of(x, cu_seqlens);
  const auto like_x = [&](const Opt& g) {
    return defined(g) ? Opt(g->to(x.scalar_type())) : Opt();
  };
  const Opt grad_rows = like_x(grad_y), grad_final = like_x(grad_final_state);
  const Tensor wide_weight = at::empty_like(parameters.weight, at::MemoryFormat::Contiguous);
  const Tensor wide_bias = at::empty({x.size(2)}, parameters.weight.options());
  CausalConv1dBackward p;
  describe(p, x, parameters, offsets, initial_state, is_silu(activation));
  p.grad_y = strided(grad_rows);
  p.grad_final_state = conv_state(grad_final);
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_weight = wide_weight.mutable_data_ptr();
  p.grad_bias = wide_bias.mutable_data_ptr();
  p.grad_initial_state = grad_state.mutable_data_ptr();
  launch(kernel_dtype(x.scalar_type()), p);
  return {
      grad_x, wide_weight.to(grad_weight.scalar_type()), wide_bias.to(grad_bias.scalar_type()),
      grad_state};
}

// One step for every row, in place in the pool of states.
template <class Launch>
Tensor step_in_place(
    Launch launch, const Tensor& x, const Tensor& weight, const Opt& bias, const Tensor& state,
    const Opt& state_indices, Activation activation) {
  check_step(x, weight, bias, state, state_indices);
  check_no_overlap(kName, state);
  const bool silu = is_silu(activation);
  const Tensor rows = state_rows(kName, state_indices, x.size(0), state.size(0), x.device());
  const Tensor pool = state.contiguous(); // the state itself, nearly always
  const Parameters parameters(x, weight, bias);
  Tensor y = at::empty(x.sizes(), x.options());
  CausalConv1dForward p;
  describe(p, x.unsqueeze(1), parameters, {}, pool, silu);
  if (rows.defined()) p.state_rows = rows.const_data_ptr<int64_t>();
  p.y = y.mutable_data_ptr();
  p.final_state = pool.mutable_data_ptr();
  launch(kernel_dtype(x.scalar_type()), p);
  if (!pool.is_same(state)) state.copy_(pool);
  return y;
}

void launch_cpu(DType dtype, const CausalConv1dForward& p) {
  cpu::causal_conv1d_forward(dtype, p, torch_threads());
}
void launch_cpu(DType dtype, const CausalConv1dBackward& p) {
  cpu::causal_conv1d_backward(dtype, p, torch_threads());
}
Pair cpu_forward(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Opt& initial_state,
    const Opt& cu_seqlens, Activation activation) {
  return forward(
      [](auto dtype, const auto& p) { launch_cpu(dtype, p); }, x, weight, bias, initial_state,
      cu_seqlens, activation);
}
Gradients cpu_backward(
    const Opt& grad_y, const Opt& grad_final_state, const Tensor& x, const Tensor& weight,
    const Opt& bias, const Opt& initial_state, const Opt& cu_seqlens, Activation activation) {
  return backward(
      [](auto dtype, const auto& p) { launch_cpu(dtype, p); }, grad_y, grad_final_state, x, weight,
      bias, initial_state, cu_seqlens, activation);
}
Tensor cpu_step_(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Tensor& state,
    const Opt& state_indices, Activation activation) {
  return step_in_place(
      [](auto dtype, const auto& p) { launch_cpu(dtype, p); }, x, weight, bias, state,
      state_indices, activation);
}
#ifdef TORCH_EXT_CUDA
template <class Problem>
void launch_cuda(DType dtype, const Problem& p) {
  // Given back when this returns: the caching allocator hands it out again in the order of the stream.
  const Tensor workspace =
      at::empty({cuda::causal_conv1d_workspace(dtype, p)}, at::device(at::kCUDA).dtype(at::kByte));
  cuda::causal_conv1d(
      dtype, p, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
Pair cuda_forward(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Opt& initial_state,
    const Opt& cu_seqlens, Activation activation) {
  const c10::cuda::CUDAGuard guard(x.device());
  return forward(
      [](auto dtype, const auto& p) { launch_cuda(dtype, p); }, x, weight, bias, initial_state,
      cu_seqlens, activation);
}
Gradients cuda_backward(
    const Opt& grad_y, const Opt& grad_final_state, const Tensor& x, const Tensor& weight,
    const Opt& bias, const Opt& initial_state, const Opt& cu_seqlens, Activation activation) {
  const c10::cuda::CUDAGuard guard(x.device());
  return backward(
      [](auto dtype, const auto& p) { launch_cuda(dtype, p); }, grad_y, grad_final_state, x, weight,
      bias, initial_state, cu_seqlens, activation);
}
Tensor cuda_step_(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Tensor& state,
    const Opt& state_indices, Activation activation) {
  const c10::cuda::CUDAGuard guard(state.device());
  return step_in_place(
      [](auto dtype, const auto& p) { launch_cuda(dtype, p); }, x, weight, bias, state,
      state_indices, activation);
}
#endif

// ---- the same as differentiable tensor code ----

// The inputs that the taps see: those of the state, then x. Dense: (B, W - 1 + T, D). Packed: (T + S (W - 1), D), x first,
// and for each tap the places of what it sees.
struct Inputs {
  Tensor all, offsets, sequence, token;
  SymInt num_steps, num_sequences, width;
  int64_t before; // W - 1

  Inputs(const Tensor& x, const Tensor& weight, const Opt& initial_state, const Opt& cu_seqlens)
      : num_steps(x.sym_size(1)),
        num_sequences(defined(cu_seqlens) ? cu_seqlens->sym_size(0) - 1 : x.sym_size(0)),
        width(x.sym_size(2)),
        before(weight.sym_size(1).guard_int(__FILE__, __LINE__) - 1) {
    const Tensor state =
        (defined(initial_state)
             ? *initial_state
             : at::zeros_symint({num_sequences, width, SymInt(before)}, x.options()))
            .to(wide(x))
            .transpose(1, 2);
    const Tensor rows = x.to(wide(x));
    if (!defined(cu_seqlens)) {
      all = at::cat({state, rows}, 1);
      return;
    }
    all = at::cat({rows.select(0, 0), state.reshape_symint({num_sequences * before, width})}, 0);
    offsets = cu_seqlens->to(x.device(), at::kLong);
    token = at::arange(at::Scalar(num_steps), offsets.options());
    sequence = at::searchsorted(
        offsets.narrow_symint(0, 1, num_sequences), token, /*out_int32=*/false, /*right=*/true);
  }
  bool packed() const { return offsets.defined(); }
  // Places of the inputs of `sequence` that are `place` rows after its first; below 0 they lie in its state.
  Tensor places(const Tensor& of_sequence, const Tensor& begin, const Tensor& place) const {
    return at::where(
        place.ge(0), begin + place, of_sequence * before + place + (num_steps + before));
  }
  Tensor seen_by(int64_t k) const {
    const Tensor begin = offsets.index_select(0, sequence);
    return places(sequence, begin, token - begin + (k - before));
  }
  Tensor seen_last() const { // (S, W - 1)
    const Tensor of_sequence =
        at::arange(at::Scalar(num_sequences), offsets.options()).unsqueeze(1);
    const Tensor begin = offsets.narrow_symint(0, 0, num_sequences).unsqueeze(1),
                 end = offsets.narrow_symint(0, 1, num_sequences).unsqueeze(1);
    const Tensor place = end - begin + at::arange(-before, 0, offsets.options());
    return places(of_sequence, begin, place);
  }
  Tensor tap(int64_t k) const {
    return packed() ? all.index_select(0, seen_by(k)).unsqueeze(0)
                    : all.narrow_symint(1, k, num_steps);
  }
  Tensor last() const {
    if (!packed()) return all.narrow_symint(1, num_steps, before).transpose(1, 2);
    return all.index_select(0, seen_last().flatten())
        .view_symint({num_sequences, SymInt(before), width})
        .transpose(1, 2);
  }
  // The adjoints of tap, last and of the constructor.
  Tensor add_tap(const Tensor& sum, int64_t k, const Tensor& g) const {
    return packed() ? at::index_add(sum, 0, seen_by(k), g.squeeze(0))
                    : sum + at::constant_pad_nd_symint(g, {0, 0, k, before - k}, 0);
  }
  Tensor add_last(const Tensor& sum, const Tensor& g) const {
    const Tensor rows = g.transpose(1, 2);
    return packed() ? at::index_add(
                          sum, 0, seen_last().flatten(),
                          rows.reshape_symint({num_sequences * before, width}))
                    : sum + at::constant_pad_nd_symint(rows, {0, 0, num_steps, 0}, 0);
  }
  Pair split(const Tensor& sum) const { // of x and of the state
    if (!packed())
      return {sum.narrow_symint(1, before, num_steps), sum.narrow(1, 0, before).transpose(1, 2)};
    return {
        sum.narrow_symint(0, 0, num_steps).unsqueeze(0),
        sum.narrow_symint(0, num_steps, num_sequences * before)
            .view_symint({num_sequences, SymInt(before), width})
            .transpose(1, 2)};
  }
};

Tensor pre_activation(
    const Inputs& in, const Tensor& weight, const Opt& bias, at::ScalarType wide) {
  const Tensor w = weight.to(wide);
  Tensor sum = in.tap(0) * w.select(1, 0);
  for (int64_t k = 1; k <= in.before; ++k) sum = sum + in.tap(k) * w.select(1, k);
  return defined(bias) ? sum + bias->to(wide) : sum;
}

Pair composite(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Opt& initial_state,
    const Opt& cu_seqlens, bool silu) {
  const Inputs in(x, weight, initial_state, cu_seqlens);
  const Tensor pre = pre_activation(in, weight, bias, wide(x));
  const Tensor y = silu ? pre * at::sigmoid(pre) : pre;
  return {y.to(x.scalar_type()), in.last().to(x.scalar_type())};
}

Gradients composite_backward(
    const Opt& grad_y, const Opt& grad_final_state, const Tensor& x, const Tensor& weight,
    const Opt& bias, const Opt& initial_state, const Opt& cu_seqlens, bool silu) {
  const Inputs in(x, weight, initial_state, cu_seqlens);
  const at::ScalarType dtype = wide(x);
  const Tensor w = weight.to(dtype);
  Tensor g = defined(grad_y) ? grad_y->to(dtype) : at::zeros_like(x, x.options().dtype(dtype));
  if (silu) {
    const Tensor pre = pre_activation(in, weight, bias, dtype), s = at::sigmoid(pre);
    g = g * s * (1 + pre * at::rsub(s, 1));
  }
  Tensor sum = at::zeros_like(in.all);
  variable_list grad_weight;
  for (int64_t k = 0; k <= in.before; ++k) {
    sum = in.add_tap(sum, k, g * w.select(1, k));
    grad_weight.push_back((g * in.tap(k)).sum(at::IntArrayRef({0, 1})));
  }
  if (defined(grad_final_state)) sum = in.add_last(sum, grad_final_state->to(dtype));
  const auto [grad_x, grad_state] = in.split(sum);
  return {
      grad_x.to(x.scalar_type()), at::stack(grad_weight, 1).to(weight.scalar_type()),
      g.sum(at::IntArrayRef({0, 1})).to(defined(bias) ? bias->scalar_type() : dtype),
      grad_state.to(x.scalar_type())};
}

// ---- derivatives ----

struct Forward : torch::autograd::Function<Forward> {
  static constexpr bool is_traceable = true;
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Opt& bias,
      const Opt& initial_state, const Opt& cu_seqlens, Activation activation) {
    ctx->set_materialize_grads(false);
    auto [y, final_state] = [&] {
      BelowAutograd guard;
      return call(x, weight, bias, initial_state, cu_seqlens, activation);
    }();
    ctx->save_for_backward(
        {x, weight, bias.value_or(Tensor()), initial_state.value_or(Tensor()),
         cu_seqlens.value_or(Tensor())});
    ctx->saved_data["silu"] = is_silu(activation);
    return {y, final_state};
  }
  static variable_list backward(AutogradContext* ctx, variable_list g) {
    variable_list out(6);
    if (!g[0].defined() && !g[1].defined()) return out;
    const variable_list s = ctx->get_saved_variables();
    std::tie(out[0], out[1], out[2], out[3]) = call_backward(
        opt(g[0]), opt(g[1]), s[0], s[1], opt(s[2]), opt(s[3]), opt(s[4]),
        activation_of(ctx->saved_data["silu"].toBool()));
    if (!s[2].defined()) out[2] = Tensor();
    if (!s[3].defined()) out[3] = Tensor();
    return out;
  }
};

// The gradient, differentiable itself: fused at first, and where it is differentiated by its composite.
struct Backward : torch::autograd::Function<Backward> {
  static constexpr bool is_traceable = true;
  static variable_list forward(
      AutogradContext* ctx, const Opt& grad_y, const Opt& grad_final_state, const Tensor& x,
      const Tensor& weight, const Opt& bias, const Opt& initial_state, const Opt& cu_seqlens,
      Activation activation) {
    ctx->set_materialize_grads(false);
    const auto [grad_x, grad_weight, grad_bias, grad_state] = [&] {
      BelowAutograd guard;
      return call_backward(
          grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, activation);
    }();
    ctx->save_for_backward(
        {grad_y.value_or(Tensor()), grad_final_state.value_or(Tensor()), x, weight,
         bias.value_or(Tensor()), initial_state.value_or(Tensor()), cu_seqlens.value_or(Tensor())});
    ctx->saved_data["silu"] = is_silu(activation);
    return {grad_x, grad_weight, grad_bias, grad_state};
  }
  static variable_list backward(AutogradContext* ctx, variable_list gg) {
    constexpr size_t kDifferentiable = 6; // all tensors but cu_seqlens
    variable_list out(kDifferentiable + 2);
    differentiate_composite(
        ctx->get_saved_variables(), kDifferentiable, gg,
        [&](const variable_list& s) {
          const auto [grad_x, grad_weight, grad_bias, grad_state] = composite_backward(
              opt(s[0]), opt(s[1]), s[2], s[3], opt(s[4]), opt(s[5]), opt(s[6]),
              ctx->saved_data["silu"].toBool());
          return variable_list{grad_x, grad_weight, grad_bias, grad_state};
        },
        out);
    return out;
  }
};

template <class... T>
bool any_tangent(const T&... t) {
  return (has_tangent(t) || ...);
}

Pair autograd(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Opt& initial_state,
    const Opt& cu_seqlens, Activation activation) {
  if (any_tangent(x, weight, bias, initial_state)) {
    check(x, weight, bias, initial_state, cu_seqlens);
    return composite(x, weight, bias, initial_state, cu_seqlens, is_silu(activation));
  }
  if (torch::autograd::compute_requires_grad(x, weight, bias, initial_state)) {
    const variable_list out =
        apply_op<Forward>(x, weight, bias, initial_state, cu_seqlens, activation);
    return {out[0], out[1]};
  }
  BelowAutograd below;
  return call(x, weight, bias, initial_state, cu_seqlens, activation);
}
Gradients autograd_backward(
    const Opt& grad_y, const Opt& grad_final_state, const Tensor& x, const Tensor& weight,
    const Opt& bias, const Opt& initial_state, const Opt& cu_seqlens, Activation activation) {
  if (any_tangent(grad_y, grad_final_state, x, weight, bias, initial_state))
    return composite_backward(
        grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, is_silu(activation));
  if (torch::autograd::compute_requires_grad(
          grad_y, grad_final_state, x, weight, bias, initial_state)) {
    const variable_list g = apply_op<Backward>(
        grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, activation);
    return {g[0], g[1], g[2], g[3]};
  }
  BelowAutograd below;
  return call_backward(
      grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, activation);
}

// ---- autocast: the dtype of x rules. Its states hold rows of x, and parameters may be float32 beside it ----

template <c10::DeviceType Device>
Tensor autocast_parameter(const Tensor& x, const Tensor& p) {
  return p.scalar_type() == x.scalar_type() ? p : at::autocast::cached_cast(wide(x), p, Device);
}
template <c10::DeviceType Device>
Opt autocast_parameter(const Tensor& x, const Opt& p) {
  return defined(p) ? Opt(autocast_parameter<Device>(x, *p)) : Opt();
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Pair autocast(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Opt& initial_state,
    const Opt& cu_seqlens, Activation activation) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const Opt state = defined(initial_state)
                        ? Opt(at::autocast::cached_cast(x.scalar_type(), *initial_state, Device))
                        : Opt();
  return call(
      x, autocast_parameter<Device>(x, weight), autocast_parameter<Device>(x, bias), state,
      cu_seqlens, activation);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Pair autocast_step(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Tensor& state,
    const Opt& state_indices, Activation activation) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  return call_step(
      x, autocast_parameter<Device>(x, weight), autocast_parameter<Device>(x, bias),
      at::autocast::cached_cast(x.scalar_type(), state, Device), state_indices, activation);
}
// Here the state's dtype rules: it is written in place.
template <c10::DispatchKey Key, c10::DeviceType Device>
Tensor autocast_step_(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Tensor& state,
    const Opt& state_indices, Activation activation) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  const Tensor row = at::autocast::cached_cast(state.scalar_type(), x, Device);
  return call_step_(
      row, autocast_parameter<Device>(row, weight), autocast_parameter<Device>(row, bias), state,
      state_indices, activation);
}

// ---- one step ----

// Made of differentiable operators, so every derivative and every transform follows.
Pair step(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Tensor& state,
    const Opt& state_indices, Activation activation) {
  check_step(x, weight, bias, state, state_indices);
  const auto run = [&](const Tensor& from) -> Pair {
    auto [y, next] = call(x.unsqueeze(1), weight, bias, from, std::nullopt, activation);
    return {y.select(1, 0), next};
  };
  return defined(state_indices) ? step_in_pool(kName, state, *state_indices, run) : run(state);
}
Tensor autograd_step_(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Tensor& state,
    const Opt& state_indices, Activation activation) {
  TORCH_CHECK(
      !torch::autograd::compute_requires_grad(x, weight, bias, state), kName,
      "_step_: an input requires grad, but the state is written in place, where no gradient can "
      "pass; expected torch.no_grad(), or ",
      kName, "_step, which is differentiable");
  at::AutoDispatchBelowAutograd below;
  return call_step_(x, weight, bias, state, state_indices, activation);
}
Tensor bump_version_step_(
    const Tensor& x, const Tensor& weight, const Opt& bias, const Tensor& state,
    const Opt& state_indices, Activation activation) {
  Tensor y;
  {
    BelowAutograd below;
    y = call_step_(x, weight, bias, state, state_indices, activation);
  }
  torch::autograd::impl::bump_version(state);
  return y;
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      torch::schema(
          "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None, "
          "Tensor? cu_seqlens=None, str? activation=None) -> (Tensor y, Tensor final_state)"),
      tags);
  m.def(
      torch::schema("causal_conv1d_backward(Tensor? grad_y, Tensor? grad_final_state, Tensor x, "
                    "Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
                    "str? activation) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, "
                    "Tensor grad_initial_state)"),
      tags);
  m.def(
      torch::schema(
          "causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, Tensor state, "
          "Tensor? state_indices=None, str? activation=None) -> (Tensor y, Tensor state)"),
      tags);
  m.def(
      torch::schema("causal_conv1d_step_(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, "
                    "Tensor? state_indices=None, str? activation=None) -> Tensor y"),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("causal_conv1d", &cpu_forward);
  m.impl("causal_conv1d_backward", &cpu_backward);
  m.impl("causal_conv1d_step_", &cpu_step_);
}
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
#ifdef TORCH_EXT_CUDA
  m.impl("causal_conv1d", &cuda_forward);
  m.impl("causal_conv1d_backward", &cuda_backward);
  m.impl("causal_conv1d_step_", &cuda_step_);
#else
  for (const char* name : {"causal_conv1d", "causal_conv1d_backward", "causal_conv1d_step_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&no_cuda_kernel>());
#endif
}
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("causal_conv1d", &meta);
  m.impl("causal_conv1d_backward", &meta_backward);
  m.impl("causal_conv1d_step_", &meta_step_);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("causal_conv1d", &autograd);
  m.impl("causal_conv1d_backward", &autograd_backward);
  m.impl("causal_conv1d_step_", &autograd_step_);
}
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) {
  m.impl("causal_conv1d_step_", &bump_version_step_);
}
TORCH_LIBRARY_IMPL(torch_ext, Conjugate, m) {
  m.impl("causal_conv1d_step_", torch::CppFunction::makeFromBoxedFunction<&resolve_lazy>());
}
TORCH_LIBRARY_IMPL(torch_ext, Negative, m) {
  m.impl("causal_conv1d_step_", torch::CppFunction::makeFromBoxedFunction<&resolve_lazy>());
}
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) { m.impl("causal_conv1d_step", &step); }
TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) {
  m.impl("causal_conv1d", &autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("causal_conv1d_step", &autocast_step<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("causal_conv1d_step_", &autocast_step_<c10::DispatchKey::AutocastCPU, at::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) {
  m.impl("causal_conv1d", &autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("causal_conv1d_step", &autocast_step<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("causal_conv1d_step_", &autocast_step_<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

} // namespace

TensorPair causal_conv1d(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& initial_state, std::optional<std::string_view> activation,
    const OptionalTensor& cu_seqlens) {
  return call(x, weight, bias, initial_state, cu_seqlens, activation);
}
TensorPair causal_conv1d_step(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& state,
    const OptionalTensor& state_indices, std::optional<std::string_view> activation) {
  return call_step(x, weight, bias, state, state_indices, activation);
}
Tensor causal_conv1d_step_(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, Tensor& state,
    const OptionalTensor& state_indices, std::optional<std::string_view> activation) {
  return call_step_(x, weight, bias, state, state_indices, activation);
}

} // namespace torch_ext
