// Mamba, Mamba-2, the block around them, and the language model made of it. The same in Python: torch_ext/mamba.py,
// mamba2.py, mamba_lm.py.
#include <cmath>
#include <ostream>
#include <utility>

#include "sampling.h"
#include "sequence_layer.h"
#include "torch_ext/ops.h"

namespace torch_ext::nn {

using torch::Tensor;

namespace {

using detail::shape_of;

OptionalTensor optional(const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

// 0 in the padding, whatever stands there.
Tensor masked(const Tensor& x, const Tensor& valid) {
  return valid.defined() ? torch::where(valid, x, 0.0) : x;
}

void check_x(const char* name, const Tensor& x, int64_t d_model) {
  TORCH_CHECK_VALUE(
      x.defined() && x.dim() == 3 && x.size(2) == d_model, name, ": x has shape ", shape_of(x),
      ", expected (B, T, d_model=", d_model, ")");
}

void check_one_step(const char* name, const Tensor& x, int64_t d_model) {
  TORCH_CHECK_VALUE(
      x.defined() && x.dim() == 2 && x.size(1) == d_model, name, ".step: x has shape ", shape_of(x),
      ", expected (B, d_model=", d_model, ")");
}

// Where in x (B, T, ...) there is no padding, (B, T, 1); undefined without lengths.
Tensor valid_steps(
    const char* name, const Tensor& x, const Tensor& lengths, const std::string& padding) {
  TORCH_CHECK_VALUE(
      padding == "right" || padding == "left", name, ": padding is '", padding,
      "', expected 'right' or 'left'");
  if (!lengths.defined()) return {};
  const int64_t num_steps = x.size(1);
  detail::check_lengths(name, lengths, x.size(0), num_steps);
  Tensor steps = torch::arange(num_steps, torch::dtype(torch::kLong).device(x.device()));
  if (padding == "left") steps = num_steps - 1 - steps;
  return (steps < lengths.to(x.device()).unsqueeze(1)).unsqueeze(2);
}

// The last inputs of each row of x (B, T, D) before its padding on the right, which a convolution has run over; `before`
// (B, D, W - 1) are those before its first.
Tensor last_inputs(const Tensor& before, const Tensor& x, const Tensor& lengths) {
  const Tensor everything = torch::cat({before.transpose(1, 2).to(x.scalar_type()), x}, 1);
  const Tensor place = lengths.to(x.device()).unsqueeze(1) +
                       torch::arange(before.size(2), torch::dtype(torch::kLong).device(x.device()));
  return everything.gather(1, place.unsqueeze(2).expand({-1, -1, x.size(2)})).transpose(1, 2);
}

// Biases whose softplus are step sizes between two bounds, uniform in the logarithm.
Tensor initial_dt_bias(const Tensor& like, double dt_min, double dt_max, double floor) {
  const Tensor dt =
      torch::empty_like(like).uniform_(std::log(dt_min), std::log(dt_max)).exp().clamp_min(floor);
  return dt + torch::log(-torch::expm1(-dt)); // the inverse of softplus
}

at::ScalarType parameter_dtype_of_recurrence() {
  return torch::get_default_dtype_as_scalartype() == torch::kDouble ? torch::kDouble
                                                                    : torch::kFloat;
}

void check_mamba_state(
    const char* name, const MambaState& state, torch::IntArrayRef conv_shape, const char* channels,
    torch::IntArrayRef scan_shape, std::initializer_list<const char*> scan_names) {
  const auto& [conv, scan] = state;
  TORCH_CHECK_VALUE(
      conv.defined() && conv.sizes() == conv_shape, name, ": the first tensor of state has shape ",
      shape_of(conv), ", expected (B=", conv_shape[0], ", ", channels, "=", conv_shape[1],
      ", d_conv - 1=", conv_shape[2], ")");
  std::string expected;
  size_t i = 0;
  for (const char* each : scan_names)
    expected += c10::str(i ? ", " : "", each, "=", scan_shape[i]), ++i;
  TORCH_CHECK_VALUE(
      scan.defined() && scan.sizes() == scan_shape, name, ": the second tensor of state has shape ",
      shape_of(scan), ", expected (", expected, ")");
}

} // namespace

// ---- the layer ----

MambaImpl::MambaImpl(const MambaOptions& options) : options(options) {
  for (const auto& [argument, value] :
       {std::pair("d_model", options.d_model()),
        {"d_state", options.d_state()},
        {"d_conv", options.d_conv()},
        {"dt_rank", dt_rank()}}) {
    TORCH_CHECK_VALUE(value >= 1, "Mamba: ", argument, " is ", value, ", expected at least 1");
  }
  TORCH_CHECK_VALUE(
      d_inner() >= 1, "Mamba: expand is ", options.expand(), ", expected at least 1 / d_model");
  TORCH_CHECK_VALUE(
      options.dt_init() == "random" || options.dt_init() == "constant", "Mamba: dt_init is '",
      options.dt_init(), "', expected 'random' or 'constant'");
  TORCH_CHECK_VALUE(
      0 < options.dt_min() && options.dt_min() <= options.dt_max(), "Mamba: dt_min is ",
      options.dt_min(), " and dt_max ", options.dt_max(), ", expected 0 < dt_min <= dt_max");
  MambaImpl::reset();
}

void MambaImpl::reset() {
  using torch::nn::Conv1d, torch::nn::Conv1dOptions, torch::nn::Linear, torch::nn::LinearOptions;
  const int64_t d_model = options.d_model(), d_state = options.d_state();
  // Random numbers are drawn in Python's order, so that a seed gives the same parameters.
  in_proj = register_module(
      "in_proj", Linear(LinearOptions(d_model, 2 * d_inner()).bias(options.bias())));
  const auto wide = parameter_dtype_of_recurrence();
  const auto make = [&](Direction& direction, const std::string& tail) {
    direction.conv1d = register_module(
        "conv1d" + tail, Conv1d(Conv1dOptions(d_inner(), d_inner(), options.d_conv())
                                    .groups(d_inner())
                                    .bias(options.conv_bias())
                                    .padding(options.d_conv() - 1)));
    direction.x_proj = register_module(
        "x_proj" + tail, Linear(LinearOptions(d_inner(), dt_rank() + 2 * d_state).bias(false)));
    direction.dt_proj = register_module("dt_proj" + tail, Linear(dt_rank(), d_inner()));
    direction.A_log =
        register_parameter("A" + tail + "_log", torch::empty({d_inner(), d_state}, wide));
    direction.D = register_parameter("D" + tail, torch::empty({d_inner()}, wide));
    reset_recurrence(direction);
  };
  make(ahead, "");
  if (options.bidirectional()) make(back, "_b");
  out_proj =
      register_module("out_proj", Linear(LinearOptions(d_inner(), d_model).bias(options.bias())));
}

void MambaImpl::reset_parameters() {
  in_proj->reset_parameters();
  for (Direction* direction : {&ahead, &back}) {
    if (!direction->conv1d) continue;
    direction->conv1d->reset_parameters();
    direction->x_proj->reset_parameters();
  }
  out_proj->reset_parameters();
  for (Direction* direction : {&ahead, &back}) {
    if (direction->conv1d) reset_recurrence(*direction);
  }
}

void MambaImpl::reset_recurrence(const Direction& direction) {
  const torch::NoGradGuard no_grad;
  const double bound = options.dt_scale() / std::sqrt(double(dt_rank()));
  if (options.dt_init() == "constant") {
    direction.dt_proj->weight.fill_(bound);
  } else {
    direction.dt_proj->weight.uniform_(-bound, bound);
  }
  direction.dt_proj->bias.copy_(
      initial_dt_bias(direction.D, options.dt_min(), options.dt_max(), options.dt_init_floor()));
  const Tensor states = torch::arange(1, options.d_state() + 1, direction.A_log.options());
  direction.A_log.copy_(states.log().expand_as(direction.A_log));
  direction.D.fill_(1);
}

void MambaImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "torch_ext::nn::Mamba(d_model=" << options.d_model()
         << ", d_state=" << options.d_state() << ", d_conv=" << options.d_conv()
         << ", expand=" << options.expand() << ", dt_rank=" << dt_rank()
         << ", conv_bias=" << options.conv_bias() << ", bias=" << options.bias()
         << ", bidirectional=" << options.bidirectional() << ")";
}

Tensor MambaImpl::forward(const Tensor& x, const Tensor& lengths, const std::string& padding) {
  if (!options.bidirectional()) return std::get<0>(prefill(x, {}, lengths, padding));
  check_x("Mamba", x, options.d_model());
  const Tensor valid = valid_steps("Mamba", x, lengths, padding);
  const auto parts = in_proj->forward(masked(x, valid)).chunk(2, -1);
  const MambaState zeros = init_state(x.size(0));
  const Tensor y = std::get<0>(run(ahead, parts[0], parts[1], zeros, valid));
  const Tensor from_the_end = std::get<0>(run(
      back, parts[0].flip(1), parts[1].flip(1), zeros, valid.defined() ? valid.flip(1) : valid));
  return masked(out_proj->forward(y + from_the_end.flip(1)), valid);
}

std::tuple<Tensor, MambaState> MambaImpl::prefill(
    const Tensor& x, const std::optional<MambaState>& initial_state, const Tensor& lengths,
    const std::string& padding) {
  check_one_direction("prefill");
  check_x("Mamba", x, options.d_model());
  const Tensor valid = valid_steps("Mamba", x, lengths, padding);
  TORCH_CHECK_VALUE(
      !valid.defined() || !initial_state || padding == "right",
      "Mamba.prefill: state is given, expected none with padding on the left, ",
      "which would stand between the state and the first step");
  const int64_t batch_size = x.size(0);
  const MambaState state = initial_state ? *initial_state : init_state(batch_size);
  check_state(state, batch_size);
  const auto parts = in_proj->forward(masked(x, valid)).chunk(2, -1);
  const auto [y, new_state] = run(ahead, parts[0], parts[1], state, valid);
  auto [conv, scan] = new_state;
  const Tensor& before = std::get<0>(state);
  if (valid.defined() && padding == "right") {
    conv = last_inputs(before, parts[0], lengths);
  }
  return {masked(out_proj->forward(y), valid), {conv.to(before.scalar_type()), scan}};
}

std::tuple<Tensor, MambaState> MambaImpl::step(const Tensor& x, const MambaState& state) {
  check_one_direction("step");
  check_one_step("Mamba", x, options.d_model());
  check_state(state, x.size(0));
  const auto [y, conv, scan] = mamba_step(
      x, in_proj->weight, optional(in_proj->bias), ahead.conv1d->weight.squeeze(1),
      optional(ahead.conv1d->bias), ahead.x_proj->weight, ahead.dt_proj->weight,
      ahead.dt_proj->bias, ahead.A_log, ahead.D, out_proj->weight, optional(out_proj->bias),
      std::get<0>(state), std::get<1>(state));
  return {y, {conv, scan}};
}

MambaState MambaImpl::init_state(int64_t batch_size) const {
  const auto dtype = ahead.A_log.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  const auto like = torch::dtype(dtype).device(ahead.D.device());
  return {
      torch::zeros({batch_size, d_inner(), options.d_conv() - 1}, like),
      torch::zeros({batch_size, d_inner(), options.d_state()}, like)};
}

// One direction between the projections, and its states.
std::tuple<Tensor, MambaState> MambaImpl::run(
    const Direction& direction, const Tensor& inner, const Tensor& z, const MambaState& state,
    const Tensor& valid) {
  const auto [u, conv] = causal_conv1d(
      masked(inner, valid), direction.conv1d->weight.squeeze(1), optional(direction.conv1d->bias),
      std::get<0>(state).to(inner.scalar_type()), "silu");
  const auto projected =
      torch::linear(u, direction.x_proj->weight)
          .split_with_sizes({dt_rank(), options.d_state(), options.d_state()}, -1);
  Tensor delta = torch::linear(projected[0], direction.dt_proj->weight);
  if (valid.defined()) delta = torch::where(valid, delta, -1e4); // a step of size 0 keeps the state
  const auto [y, scan] = selective_scan(
      u, delta, -torch::exp(direction.A_log), projected[1], projected[2], direction.D, z,
      direction.dt_proj->bias, std::get<1>(state), true);
  return {y, {conv, scan}};
}

void MambaImpl::check_one_direction(const char* method) const {
  TORCH_CHECK(
      !options.bidirectional(), "Mamba.", method, ": the layer is bidirectional, expected one ",
      "direction: the second one starts from the last step");
}

void MambaImpl::check_state(const MambaState& state, int64_t batch_size) const {
  check_mamba_state(
      "Mamba", state, {batch_size, d_inner(), options.d_conv() - 1}, "d_inner",
      {batch_size, d_inner(), options.d_state()}, {"B", "d_inner", "d_state"});
}

// ---- Mamba-2 ----

namespace detail {

GatedRMSNormImpl::GatedRMSNormImpl(
    int64_t channels, int64_t groups, double eps, bool norm_before_gate)
    : channels_(channels), groups_(groups), eps_(eps), norm_before_gate_(norm_before_gate) {
  GatedRMSNormImpl::reset();
}

void GatedRMSNormImpl::reset() {
  weight = register_parameter("weight", torch::empty({channels_}));
  reset_parameters();
}

void GatedRMSNormImpl::reset_parameters() {
  const torch::NoGradGuard no_grad;
  weight.fill_(1);
}

Tensor GatedRMSNormImpl::forward(const Tensor& x, const Tensor& z) {
  const auto wide = state_dtype(x.scalar_type());
  const Tensor gate = torch::silu(z.to(wide));
  Tensor y = x.to(wide);
  if (!norm_before_gate_) y = y * gate;
  y = y.unflatten(-1, {groups_, -1});
  y = (y * torch::rsqrt(y.square().mean(-1, /*keepdim=*/true) + eps_)).flatten(-2);
  y = y * weight.to(wide);
  if (norm_before_gate_) y = y * gate;
  return y.to(x.scalar_type());
}

void GatedRMSNormImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "torch_ext::nn::GatedRMSNorm(" << channels_ << ", groups=" << groups_
         << ", eps=" << eps_ << ", norm_before_gate=" << norm_before_gate_ << ")";
}

} // namespace detail

Mamba2Impl::Mamba2Impl(const Mamba2Options& options) : options(options) {
  const char* name = "Mamba2";
  for (const auto& [argument, value] :
       {std::pair("d_model", options.d_model()),
        {"d_state", options.d_state()},
        {"d_conv", options.d_conv()},
        {"headdim", options.headdim()},
        {"ngroups", options.ngroups()}}) {
    TORCH_CHECK_VALUE(value >= 1, name, ": ", argument, " is ", value, ", expected at least 1");
  }
  TORCH_CHECK_VALUE(
      d_inner() >= 1, name, ": expand is ", options.expand(), ", expected at least 1 / d_model");
  TORCH_CHECK_VALUE(
      0 < d_ssm() && d_ssm() <= d_inner(), name, ": d_ssm is ", d_ssm(),
      ", expected 1 to d_inner=", d_inner());
  TORCH_CHECK_VALUE(
      d_ssm() % options.headdim() == 0, name, ": headdim is ", options.headdim(),
      ", expected a number that divides ", options.d_ssm() ? "d_ssm" : "d_inner", "=", d_ssm());
  TORCH_CHECK_VALUE(
      nheads() % options.ngroups() == 0, name, ": ngroups is ", options.ngroups(),
      ", expected a number that divides the number of heads, ", nheads());
  TORCH_CHECK_VALUE(
      0 < options.dt_min() && options.dt_min() <= options.dt_max(), name, ": dt_min is ",
      options.dt_min(), " and dt_max ", options.dt_max(), ", expected 0 < dt_min <= dt_max");
  const auto& [low, high] = options.A_init_range();
  TORCH_CHECK_VALUE(
      0 < low && low <= high, name, ": A_init_range is (", low, ", ", high,
      "), expected 0 < low <= high");
  const auto& [shortest, longest] = options.dt_limit();
  TORCH_CHECK_VALUE(
      0 <= shortest && shortest <= longest, name, ": dt_limit is (", shortest, ", ", longest,
      "), expected 0 <= low <= high");
  Mamba2Impl::reset();
}

void Mamba2Impl::reset() {
  using torch::nn::Conv1d, torch::nn::Conv1dOptions, torch::nn::Linear, torch::nn::LinearOptions;
  // Random numbers are drawn in Python's order, so that a seed gives the same parameters.
  const int64_t rows = 2 * (d_inner() - d_ssm()) + d_ssm() + conv_dim() + nheads();
  in_proj = register_module(
      "in_proj", Linear(LinearOptions(options.d_model(), rows).bias(options.bias())));
  conv1d = register_module(
      "conv1d", Conv1d(Conv1dOptions(conv_dim(), conv_dim(), options.d_conv())
                           .groups(conv_dim())
                           .bias(options.conv_bias())
                           .padding(options.d_conv() - 1)));
  const auto wide = parameter_dtype_of_recurrence();
  dt_bias = register_parameter("dt_bias", torch::empty({nheads()}, wide));
  A_log = register_parameter("A_log", torch::empty({nheads()}, wide));
  D = register_parameter("D", torch::empty({options.D_has_hdim() ? d_ssm() : nheads()}, wide));
  if (options.rmsnorm())
    norm = register_module(
        "norm", detail::GatedRMSNorm(
                    d_ssm(), options.ngroups(), options.norm_eps(), options.norm_before_gate()));
  out_proj = register_module(
      "out_proj", Linear(LinearOptions(d_inner(), options.d_model()).bias(options.bias())));
  reset_recurrence();
}

void Mamba2Impl::reset_parameters() {
  in_proj->reset_parameters();
  conv1d->reset_parameters();
  if (norm) norm->reset_parameters();
  out_proj->reset_parameters();
  reset_recurrence();
}

void Mamba2Impl::reset_recurrence() {
  const torch::NoGradGuard no_grad;
  if (const auto& bound = options.conv_init()) conv1d->weight.uniform_(-*bound, *bound);
  dt_bias.copy_(
      initial_dt_bias(dt_bias, options.dt_min(), options.dt_max(), options.dt_init_floor()));
  A_log.uniform_(options.A_init_range().first, options.A_init_range().second).log_();
  D.fill_(1);
}

void Mamba2Impl::pretty_print(std::ostream& stream) const {
  stream << "torch_ext::nn::Mamba2(d_model=" << options.d_model()
         << ", d_state=" << options.d_state() << ", d_conv=" << options.d_conv()
         << ", expand=" << options.expand() << ", headdim=" << options.headdim()
         << ", ngroups=" << options.ngroups() << ")";
}

Tensor Mamba2Impl::forward(const Tensor& x, const Tensor& lengths, const std::string& padding) {
  return std::get<0>(prefill(x, {}, lengths, padding));
}

std::tuple<Tensor, MambaState> Mamba2Impl::prefill(
    const Tensor& x, const std::optional<MambaState>& initial_state, const Tensor& lengths,
    const std::string& padding) {
  check_x("Mamba2", x, options.d_model());
  const Tensor valid = valid_steps("Mamba2", x, lengths, padding);
  TORCH_CHECK_VALUE(
      !valid.defined() || !initial_state || padding == "right",
      "Mamba2.prefill: state is given, expected none with padding on the left, ",
      "which would stand between the state and the first step");
  const MambaState state = initial_state ? *initial_state : init_state(x.size(0));
  check_state(state, x.size(0));
  const Tensor& before = std::get<0>(state);
  const auto parts = project(masked(x, valid));
  const Tensor inner = masked(parts[2], valid);
  auto [u, conv] = causal_conv1d(
      inner, conv1d->weight.squeeze(1), optional(conv1d->bias), before.to(inner.scalar_type()),
      "silu");
  const auto of_heads = heads(u);
  const auto [dt, bias] = time_steps(parts[3], valid);
  const auto [y, scan] =
      ssd(of_heads[0], dt, -torch::exp(A_log), of_heads[1], of_heads[2], skip(), gate(parts[1]),
          bias, std::get<1>(state), bias.has_value());
  if (valid.defined() && padding == "right") conv = last_inputs(before, inner, lengths);
  return {
      masked(finish(y, parts[1], parts[0]), valid),
      MambaState(conv.to(before.scalar_type()), scan)};
}

std::tuple<Tensor, MambaState> Mamba2Impl::step(const Tensor& x, const MambaState& state) {
  check_one_step("Mamba2", x, options.d_model());
  check_state(state, x.size(0));
  const Tensor& before = std::get<0>(state);
  const auto parts = project(x);
  const auto [u, conv] = causal_conv1d_step(
      parts[2], conv1d->weight.squeeze(1), optional(conv1d->bias),
      before.to(parts[2].scalar_type()), {}, "silu");
  const auto of_heads = heads(u);
  const auto [dt, bias] = time_steps(parts[3], {});
  const auto [y, scan] = ssd_step(
      of_heads[0], dt, -torch::exp(A_log), of_heads[1], of_heads[2], skip(), gate(parts[1]), bias,
      std::get<1>(state), {}, bias.has_value());
  return {finish(y, parts[1], parts[0]), MambaState(conv.to(before.scalar_type()), scan)};
}

MambaState Mamba2Impl::init_state(int64_t batch_size) const {
  const auto like = torch::dtype(state_dtype(A_log.scalar_type())).device(A_log.device());
  return {
      torch::zeros({batch_size, conv_dim(), options.d_conv() - 1}, like),
      torch::zeros({batch_size, nheads(), options.headdim(), options.d_state()}, like)};
}

// The MLP beside the scan, the gate, the convolution's inputs, the step sizes.
std::vector<Tensor> Mamba2Impl::project(const Tensor& x) {
  return in_proj->forward(x).split_with_sizes(
      {2 * (d_inner() - d_ssm()), d_ssm(), conv_dim(), nheads()}, -1);
}

// x, B and C after the convolution.
std::vector<Tensor> Mamba2Impl::heads(const Tensor& u) const {
  const int64_t width = options.ngroups() * options.d_state();
  auto parts = u.split_with_sizes({d_ssm(), width, width}, -1);
  parts[0] = parts[0].unflatten(-1, {nheads(), -1});
  for (size_t i : {1, 2}) parts[i] = parts[i].unflatten(-1, {options.ngroups(), options.d_state()});
  return parts;
}

// dt and dt_bias of the scan, whose softplus comes with the bias. A step of size 0 keeps the state.
std::pair<Tensor, std::optional<Tensor>> Mamba2Impl::time_steps(
    Tensor dt, const Tensor& valid) const {
  const auto& [low, high] = options.dt_limit();
  if (low == 0 && std::isinf(high))
    return {valid.defined() ? torch::where(valid, dt, -1e4) : dt, dt_bias};
  dt = dt.to(state_dtype(dt.scalar_type()));
  dt = torch::softplus(dt + dt_bias.to(dt.scalar_type())).clamp(low, high);
  return {masked(dt, valid), std::nullopt};
}

// The scan's gate, where there is no norm that has it.
std::optional<Tensor> Mamba2Impl::gate(const Tensor& z) const {
  if (norm) return std::nullopt;
  return z.unflatten(-1, {nheads(), -1});
}

Tensor Mamba2Impl::skip() const {
  return options.D_has_hdim() ? D.unflatten(0, {nheads(), -1}) : D;
}

Tensor Mamba2Impl::finish(Tensor y, const Tensor& z, const Tensor& mlp) {
  y = y.flatten(-2);
  if (norm) y = norm->forward(y, z);
  if (d_ssm() < d_inner()) {
    const auto parts = mlp.chunk(2, -1);
    y = torch::cat({torch::silu(parts[0]) * parts[1], y}, -1);
  }
  return out_proj->forward(y);
}

void Mamba2Impl::check_state(const MambaState& state, int64_t batch_size) const {
  check_mamba_state(
      "Mamba2", state, {batch_size, conv_dim(), options.d_conv() - 1},
      "d_ssm + 2 * ngroups * d_state", {batch_size, nheads(), options.headdim(), options.d_state()},
      {"B", "nheads", "headdim", "d_state"});
}

// ---- the block ----

namespace detail {

ResidualNormImpl::ResidualNormImpl(int64_t dim, bool rms_norm, double eps)
    : dim_(dim), rms_norm_(rms_norm), eps_(eps) {
  ResidualNormImpl::reset();
}

void ResidualNormImpl::reset() {
  weight = register_parameter("weight", torch::empty({dim_}));
  if (!rms_norm_) bias = register_parameter("bias", torch::empty({dim_}));
  reset_parameters();
}

void ResidualNormImpl::reset_parameters() {
  const torch::NoGradGuard no_grad;
  weight.fill_(1);
  if (!rms_norm_) bias.zero_();
}

Tensor ResidualNormImpl::forward(const Tensor& x) {
  const Tensor wide = weight.to(x.scalar_type());
  const Tensor y = rms_norm_ ? torch::rms_norm(x, {dim_}, wide, eps_)
                             : torch::layer_norm(x, {dim_}, wide, bias.to(x.scalar_type()), eps_);
  return y.to(weight.scalar_type());
}

void ResidualNormImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_ext::nn::ResidualNorm(" << (rms_norm_ ? "rms_norm" : "layer_norm") << ", "
         << dim_ << ", eps=" << eps_ << ")";
}

} // namespace detail

MambaBlockImpl::MambaBlockImpl(const MambaBlockOptions& options)
    : options(options), mixer(Mamba(nullptr)) {
  MambaBlockImpl::reset();
}

void MambaBlockImpl::reset() {
  // First, as it checks its options.
  if (const auto* mamba2 = std::get_if<Mamba2Options>(&options.mixer()))
    mixer = Mamba2(Mamba2Options(*mamba2).norm_eps(options.norm_eps()));
  else
    mixer = Mamba(std::get<MambaOptions>(options.mixer()));
  norm = register_module(
      "norm", detail::ResidualNorm(options.d_model(), options.rms_norm(), options.norm_eps()));
  std::visit([&](auto& each) { register_module("mixer", each); }, mixer);
}

void MambaBlockImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "torch_ext::nn::MambaBlock(rms_norm=" << options.rms_norm()
         << ", norm_eps=" << options.norm_eps()
         << ", residual_in_fp32=" << options.residual_in_fp32() << ")";
}

Tensor MambaBlockImpl::forward(
    const Tensor& input, const Tensor& lengths, const std::string& padding) {
  const Tensor x = residual(input, lengths, padding);
  return x +
         std::visit(
             [&](auto& each) { return each->forward(norm->forward(x), lengths, padding); }, mixer);
}

std::tuple<Tensor, MambaState> MambaBlockImpl::prefill(
    const Tensor& input, const std::optional<MambaState>& state, const Tensor& lengths,
    const std::string& padding) {
  const Tensor x = residual(input, lengths, padding);
  const auto [y, new_state] = std::visit(
      [&](auto& each) { return each->prefill(norm->forward(x), state, lengths, padding); }, mixer);
  return {x + y, new_state};
}

std::tuple<Tensor, MambaState> MambaBlockImpl::step(const Tensor& input, const MambaState& state) {
  check_one_step("MambaBlock", input, options.d_model());
  const Tensor x = widen(input);
  const auto [y, new_state] =
      std::visit([&](auto& each) { return each->step(norm->forward(x), state); }, mixer);
  return {x + y, new_state};
}

Tensor MambaBlockImpl::widen(const Tensor& x) const {
  return options.residual_in_fp32() && x.scalar_type() != torch::kDouble ? x.to(torch::kFloat) : x;
}

Tensor MambaBlockImpl::residual(
    const Tensor& x, const Tensor& lengths, const std::string& padding) const {
  check_x("MambaBlock", x, options.d_model());
  // Before the norm, whose gradient would be NaN where the padding is.
  return masked(widen(x), valid_steps("MambaBlock", x, lengths, padding));
}

// ---- the language model ----

namespace detail {

MambaBackboneImpl::MambaBackboneImpl(const MambaLMOptions& options) : options(options) {
  MambaBackboneImpl::reset();
}

void MambaBackboneImpl::reset() {
  const MambaBlockOptions& block = options.block();
  const int64_t d_model = block.d_model(), multiple = options.pad_vocab_size_multiple();
  const int64_t rows = (options.vocab_size() + multiple - 1) / multiple * multiple;
  embedding = register_module("embedding", torch::nn::Embedding(rows, d_model));
  layers = register_module("layers", torch::nn::ModuleList());
  for (int64_t k = 0; k < options.n_layer(); ++k) layers->push_back(MambaBlock(block));
  norm_f = register_module("norm_f", ResidualNorm(d_model, block.rms_norm(), block.norm_eps()));
}

void MambaBackboneImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_ext::nn::MambaBackbone";
}

Tensor MambaBackboneImpl::forward(
    const Tensor& ids, const Tensor& lengths, const std::string& padding) {
  TORCH_CHECK_VALUE(
      ids.defined() && ids.dim() == 2, "MambaLM: ids has shape ", shape_of(ids),
      ", expected (B, T)");
  const Tensor valid = valid_steps("MambaLM", ids, lengths, padding);
  Tensor x = embed(ids, valid);
  for (int64_t k = 0; k < options.n_layer(); ++k) x = block(k).forward(x, lengths, padding);
  return masked(norm_f->forward(x), valid);
}

std::tuple<Tensor, MambaLMState> MambaBackboneImpl::prefill(
    const Tensor& ids, const std::optional<MambaLMState>& state, const Tensor& lengths,
    const std::string& padding, bool last_only) {
  TORCH_CHECK_VALUE(
      ids.defined() && ids.dim() == 2, "MambaLM: ids has shape ", shape_of(ids),
      ", expected (B, T)");
  TORCH_CHECK_VALUE(
      !last_only || ids.size(1) > 0, "MambaLM: ids has no steps, expected T >= 1 with last_only");
  Tensor valid = valid_steps("MambaLM", ids, lengths, padding);
  if (state) check_state(*state);
  Tensor x = embed(ids, valid);
  MambaLMState new_state;
  for (int64_t k = 0; k < options.n_layer(); ++k) {
    const auto before = state ? std::optional((*state)[size_t(k)]) : std::nullopt;
    const auto [y, after] = block(k).prefill(x, before, lengths, padding);
    x = y;
    new_state.push_back(after);
  }
  if (last_only) {
    if (valid.defined() && padding == "right") {
      const Tensor last = (lengths.to(x.device(), torch::kLong) - 1).clamp_min(0);
      x = x.gather(1, last.view({-1, 1, 1}).expand({-1, 1, x.size(2)})).squeeze(1);
    } else {
      x = x.select(1, -1);
    }
    if (valid.defined()) valid = (lengths.to(x.device()) > 0).unsqueeze(1);
  }
  return {masked(norm_f->forward(x), valid), new_state};
}

std::tuple<Tensor, MambaLMState> MambaBackboneImpl::step(
    const Tensor& ids, const MambaLMState& state) {
  TORCH_CHECK_VALUE(
      ids.defined() && ids.dim() == 1, "MambaLM.step: ids has shape ", shape_of(ids),
      ", expected (B,)");
  check_state(state);
  Tensor x = embedding->forward(ids);
  MambaLMState new_state;
  for (int64_t k = 0; k < options.n_layer(); ++k) {
    const auto [y, after] = block(k).step(x, state[size_t(k)]);
    x = y;
    new_state.push_back(after);
  }
  return {norm_f->forward(x), new_state};
}

Tensor MambaBackboneImpl::embed(const Tensor& given, const Tensor& valid) {
  TORCH_CHECK_TYPE(
      given.scalar_type() == torch::kLong || given.scalar_type() == torch::kInt,
      "MambaLM: ids has dtype ", dtype_text(given.scalar_type()), ", expected int64 or int32");
  const Tensor ids = valid.defined() ? torch::where(valid.squeeze(2), given, 0) : given;
  // Looking at the values of a tensor on a GPU would make the CPU wait for it.
  if (ids.is_cpu() && ids.numel() > 0) {
    const int64_t low = ids.min().item<int64_t>(), high = ids.max().item<int64_t>();
    const int64_t rows = embedding->options.num_embeddings();
    TORCH_CHECK_VALUE(
        low >= 0 && high < rows, "MambaLM: ids has values from ", low, " to ", high,
        ", expected 0 to ", rows - 1);
  }
  return embedding->forward(ids);
}

void MambaBackboneImpl::check_state(const MambaLMState& state) const {
  TORCH_CHECK_VALUE(
      int64_t(state.size()) == options.n_layer(), "MambaLM: state has ", state.size(),
      " entries, expected n_layer=", options.n_layer());
}

} // namespace detail

MambaLMImpl::MambaLMImpl(const MambaLMOptions& options) : options(options) {
  for (const auto& [argument, value] :
       {std::pair("vocab_size", options.vocab_size()),
        {"n_layer", options.n_layer()},
        {"pad_vocab_size_multiple", options.pad_vocab_size_multiple()}}) {
    TORCH_CHECK_VALUE(value >= 1, "MambaLM: ", argument, " is ", value, ", expected at least 1");
  }
  MambaLMImpl::reset();
}

void MambaLMImpl::reset() {
  backbone = register_module("backbone", detail::MambaBackbone(options));
  // Drawn where the weight is tied too, as in Python, so that a seed gives the same parameters.
  const Tensor& embedding = backbone->embedding->weight;
  lm_head =
      torch::nn::Linear(torch::nn::LinearOptions(embedding.size(1), embedding.size(0)).bias(false));
  if (options.tie_embeddings()) {
    lm_head = nullptr;
  } else {
    register_module("lm_head", lm_head);
  }
  reset_parameters();
}

void MambaLMImpl::reset_parameters() {
  const torch::NoGradGuard no_grad;
  for (int64_t k = 0; k < options.n_layer(); ++k) {
    MambaBlockImpl& block = backbone->block(k);
    block.norm->reset_parameters();
    std::visit(
        [&](auto& mixer) {
          mixer->reset_parameters();
          for (const auto& linear : {mixer->in_proj, mixer->out_proj}) {
            if (linear->bias.defined()) linear->bias.zero_();
          }
          // So that the residual's variance at the end does not grow with the number of blocks.
          mixer->out_proj->weight.div_(std::sqrt(double(options.n_layer())));
        },
        block.mixer);
  }
  backbone->norm_f->reset_parameters();
  backbone->embedding->weight.normal_(0, 0.02);
  if (lm_head) lm_head->reset_parameters();
}

void MambaLMImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "torch_ext::nn::MambaLM(vocab_size=" << options.vocab_size()
         << ", d_model=" << options.block().d_model() << ", n_layer=" << options.n_layer()
         << ", tie_embeddings=" << options.tie_embeddings() << ")";
}

Tensor MambaLMImpl::logits(const Tensor& x) {
  return lm_head ? lm_head->forward(x) : torch::linear(x, backbone->embedding->weight);
}

Tensor MambaLMImpl::forward(const Tensor& ids, const Tensor& lengths, const std::string& padding) {
  return logits(backbone->forward(ids, lengths, padding));
}

std::tuple<Tensor, MambaLMState> MambaLMImpl::prefill(
    const Tensor& ids, const std::optional<MambaLMState>& state, const Tensor& lengths,
    const std::string& padding, bool last_only) {
  const auto [x, new_state] = backbone->prefill(ids, state, lengths, padding, last_only);
  return {logits(x), new_state};
}

std::tuple<Tensor, MambaLMState> MambaLMImpl::step(const Tensor& ids, const MambaLMState& state) {
  const auto [x, new_state] = backbone->step(ids, state);
  return {logits(x), new_state};
}

MambaLMState MambaLMImpl::init_state(int64_t batch_size) const {
  MambaLMState state;
  for (int64_t k = 0; k < options.n_layer(); ++k) {
    state.push_back(backbone->block(k).init_state(batch_size));
  }
  return state;
}

Tensor MambaLMImpl::generate(
    const Tensor& ids, int64_t max_new_tokens, double temperature, std::optional<int64_t> top_k,
    std::optional<double> top_p, const Tensor& lengths, const std::string& padding) {
  const char* name = "MambaLM.generate";
  TORCH_CHECK_VALUE(
      ids.defined() && ids.dim() == 2 && ids.size(1) >= 1, name, ": ids has shape ", shape_of(ids),
      ", expected (B, T) with T >= 1");
  TORCH_CHECK_VALUE(
      max_new_tokens >= 0, name, ": max_new_tokens is ", max_new_tokens, ", expected at least 0");
  TORCH_CHECK_VALUE(
      temperature >= 0, name, ": temperature is ", temperature, ", expected at least 0");
  TORCH_CHECK_VALUE(
      !top_k || *top_k >= 1, name, ": top_k is ", top_k.value_or(0), ", expected at least 1");
  TORCH_CHECK_VALUE(
      !top_p || (0 < *top_p && *top_p <= 1), name, ": top_p is ", top_p.value_or(0),
      ", expected a number in (0, 1]");
  TORCH_CHECK_VALUE(
      !lengths.defined() || lengths.numel() == 0 || lengths.min().item<int64_t>() >= 1, name,
      ": lengths has values below 1, expected 1 to T=", ids.size(1));
  const torch::NoGradGuard no_grad;
  std::vector<Tensor> tokens = {ids};
  MambaLMState state;
  Tensor next;
  for (int64_t n = 0; n < max_new_tokens; ++n) {
    if (n == 0) {
      std::tie(next, state) = prefill(ids, {}, lengths, padding, /*last_only=*/true);
    } else {
      std::tie(next, state) = step(tokens.back().squeeze(1), state);
    }
    const Tensor known = next.narrow(-1, 0, options.vocab_size()); // not the rows of padding
    const Tensor token = detail::sample(known, temperature, top_k, top_p);
    tokens.push_back(token.to(ids.scalar_type()).unsqueeze(1));
  }
  return torch::cat(tokens, 1);
}

} // namespace torch_ext::nn
