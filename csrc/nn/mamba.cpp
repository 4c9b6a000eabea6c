// Mamba. The same in Python: torch_ext/mamba.py.
#include <algorithm>
#include <cmath>
#include <ostream>
#include <utility>

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

} // namespace

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
  const auto wide =
      torch::get_default_dtype_as_scalartype() == torch::kDouble ? torch::kDouble : torch::kFloat;
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

void MambaImpl::reset_recurrence(const Direction& direction) {
  const torch::NoGradGuard no_grad;
  const double bound = options.dt_scale() / std::sqrt(double(dt_rank()));
  if (options.dt_init() == "constant") {
    direction.dt_proj->weight.fill_(bound);
  } else {
    direction.dt_proj->weight.uniform_(-bound, bound);
  }
  const Tensor dt = torch::empty_like(direction.D)
                        .uniform_(std::log(options.dt_min()), std::log(options.dt_max()))
                        .exp()
                        .clamp_min(options.dt_init_floor());
  direction.dt_proj->bias.copy_(dt + torch::log(-torch::expm1(-dt))); // the inverse of softplus
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
  const Tensor valid = valid_steps(x, lengths, padding);
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
  const Tensor valid = valid_steps(x, lengths, padding);
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
    // The last inputs of each row before its padding, which the convolution has run over.
    const Tensor everything =
        torch::cat({before.transpose(1, 2).to(parts[0].scalar_type()), parts[0]}, 1);
    const Tensor place =
        lengths.to(x.device()).unsqueeze(1) +
        torch::arange(options.d_conv() - 1, torch::dtype(torch::kLong).device(x.device()));
    conv = everything.gather(1, place.unsqueeze(2).expand({-1, -1, d_inner()})).transpose(1, 2);
  }
  return {masked(out_proj->forward(y), valid), {conv.to(before.scalar_type()), scan}};
}

std::tuple<Tensor, MambaState> MambaImpl::step(const Tensor& x, const MambaState& state) {
  check_one_direction("step");
  TORCH_CHECK_VALUE(
      x.defined() && x.dim() == 2 && x.size(1) == options.d_model(), "Mamba.step: x has shape ",
      shape_of(x), ", expected (B, d_model=", options.d_model(), ")");
  check_state(state, x.size(0));
  const auto& [conv_before, scan_before] = state;
  const auto parts = in_proj->forward(x).chunk(2, -1);
  const auto [u, conv] = causal_conv1d_step(
      parts[0], ahead.conv1d->weight.squeeze(1), optional(ahead.conv1d->bias),
      conv_before.to(parts[0].scalar_type()), {}, "silu");
  const auto projected = ahead.x_proj->forward(u).split_with_sizes(
      {dt_rank(), options.d_state(), options.d_state()}, -1);
  const auto [y, scan] = selective_scan_step(
      u, torch::linear(projected[0], ahead.dt_proj->weight), -torch::exp(ahead.A_log), projected[1],
      projected[2], ahead.D, parts[1], ahead.dt_proj->bias, scan_before, {}, true);
  return {out_proj->forward(y), {conv.to(conv_before.scalar_type()), scan}};
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
  const auto& [conv, scan] = state;
  const int64_t kept = options.d_conv() - 1;
  TORCH_CHECK_VALUE(
      conv.defined() && conv.sizes() == torch::IntArrayRef({batch_size, d_inner(), kept}),
      "Mamba: the first tensor of state has shape ", shape_of(conv), ", expected (B=", batch_size,
      ", d_inner=", d_inner(), ", d_conv - 1=", kept, ")");
  TORCH_CHECK_VALUE(
      scan.defined() &&
          scan.sizes() == torch::IntArrayRef({batch_size, d_inner(), options.d_state()}),
      "Mamba: the second tensor of state has shape ", shape_of(scan), ", expected (B=", batch_size,
      ", d_inner=", d_inner(), ", d_state=", options.d_state(), ")");
}

// Where there is no padding, (B, T, 1); undefined without lengths.
Tensor MambaImpl::valid_steps(
    const Tensor& x, const Tensor& lengths, const std::string& padding) const {
  TORCH_CHECK_VALUE(
      x.defined() && x.dim() == 3 && x.size(2) == options.d_model(), "Mamba: x has shape ",
      shape_of(x), ", expected (B, T, d_model=", options.d_model(), ")");
  TORCH_CHECK_VALUE(
      padding == "right" || padding == "left", "Mamba: padding is '", padding,
      "', expected 'right' or 'left'");
  if (!lengths.defined()) return {};
  const int64_t num_steps = x.size(1);
  detail::check_lengths("Mamba", lengths, x.size(0), num_steps);
  Tensor steps = torch::arange(num_steps, torch::dtype(torch::kLong).device(x.device()));
  if (padding == "left") steps = num_steps - 1 - steps;
  return (steps < lengths.to(x.device()).unsqueeze(1)).unsqueeze(2);
}

} // namespace torch_ext::nn
