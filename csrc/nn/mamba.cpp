// Mamba, the block around it, and the language model made of it. The same in Python: torch_ext/mamba.py, mamba_lm.py.
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
Tensor valid_steps(const Tensor& x, const Tensor& lengths, const std::string& padding) {
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
  check_x("Mamba", x, options.d_model());
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
  check_x("Mamba", x, options.d_model());
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

MambaBlockImpl::MambaBlockImpl(const MambaBlockOptions& options) : options(options) {
  MambaBlockImpl::reset();
}

void MambaBlockImpl::reset() {
  mixer = Mamba(options.mixer()); // first, as it checks its options
  norm = register_module(
      "norm",
      detail::ResidualNorm(options.mixer().d_model(), options.rms_norm(), options.norm_eps()));
  register_module("mixer", mixer);
}

void MambaBlockImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "torch_ext::nn::MambaBlock(rms_norm=" << options.rms_norm()
         << ", norm_eps=" << options.norm_eps()
         << ", residual_in_fp32=" << options.residual_in_fp32() << ")";
}

Tensor MambaBlockImpl::forward(
    const Tensor& input, const Tensor& lengths, const std::string& padding) {
  const Tensor x = residual(input, lengths, padding);
  return x + mixer->forward(norm->forward(x), lengths, padding);
}

std::tuple<Tensor, MambaState> MambaBlockImpl::prefill(
    const Tensor& input, const std::optional<MambaState>& state, const Tensor& lengths,
    const std::string& padding) {
  const Tensor x = residual(input, lengths, padding);
  const auto [y, new_state] = mixer->prefill(norm->forward(x), state, lengths, padding);
  return {x + y, new_state};
}

std::tuple<Tensor, MambaState> MambaBlockImpl::step(const Tensor& input, const MambaState& state) {
  check_one_step("MambaBlock", input, options.mixer().d_model());
  const Tensor x = widen(input);
  const auto [y, new_state] = mixer->step(norm->forward(x), state);
  return {x + y, new_state};
}

Tensor MambaBlockImpl::widen(const Tensor& x) const {
  return options.residual_in_fp32() && x.scalar_type() != torch::kDouble ? x.to(torch::kFloat) : x;
}

Tensor MambaBlockImpl::residual(
    const Tensor& x, const Tensor& lengths, const std::string& padding) const {
  check_x("MambaBlock", x, options.mixer().d_model());
  // Before the norm, whose gradient would be NaN where the padding is.
  return masked(widen(x), valid_steps(x, lengths, padding));
}

// ---- the language model ----

namespace detail {

MambaBackboneImpl::MambaBackboneImpl(const MambaLMOptions& options) : options(options) {
  MambaBackboneImpl::reset();
}

void MambaBackboneImpl::reset() {
  const MambaBlockOptions& block = options.block();
  const int64_t d_model = block.mixer().d_model(), multiple = options.pad_vocab_size_multiple();
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
  const Tensor valid = valid_steps(ids, lengths, padding);
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
  Tensor valid = valid_steps(ids, lengths, padding);
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
    block.mixer->reset_parameters();
    for (const auto& linear : {block.mixer->in_proj, block.mixer->out_proj}) {
      if (linear->bias.defined()) linear->bias.zero_();
    }
    // So that the residual's variance at the end does not grow with the number of blocks.
    block.mixer->out_proj->weight.div_(std::sqrt(double(options.n_layer())));
  }
  backbone->norm_f->reset_parameters();
  backbone->embedding->weight.normal_(0, 0.02);
  if (lm_head) lm_head->reset_parameters();
}

void MambaLMImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "torch_ext::nn::MambaLM(vocab_size=" << options.vocab_size()
         << ", d_model=" << options.block().mixer().d_model() << ", n_layer=" << options.n_layer()
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
