// MinGRU, MinLSTM, the block around them, and the language model made of it. The same in Python: torch_ext/min_gru.py,
// min_lstm.py, min_rnn.py. (One file, since torch's headers take longer to compile than all that follows them.)
#include <torch/nn/init.h>

#include <ostream>
#include <utility>
#include <vector>

#include "sampling.h"
#include "sequence_layer.h"
#include "torch_ext/ops.h"

namespace torch_ext::nn {

using torch::Tensor;

// ---- layers ----

namespace detail {

// Gates of hidden_size rows each, and a state that is one tensor.
template <class Layer, class Options, int64_t kGates>
struct OneState {
  static constexpr int64_t num_gates = kGates;
  static void check(const Options&) {}
  static int64_t rows(const Options& options) { return num_gates * options.hidden_size(); }
  static std::vector<StateSizes> state_sizes(const Options& options) {
    return {{{"hidden_size", options.hidden_size()}}};
  }
  static void init(const Options& options, const Tensor& /*weight*/, const Tensor& bias) {
    if (options.gate_bias_init()) Layer::init_gate_bias(*options.gate_bias_init(), bias);
  }
};

template <>
struct Recurrence<MinGRUOptions> : OneState<Recurrence<MinGRUOptions>, MinGRUOptions, 2> {
  static constexpr const char* name = "MinGRU";

  static void init_gate_bias(const GateBiasInit& init, const Tensor& bias) {
    Tensor gate = bias.chunk(num_gates)[0];
    fill_gate_bias(init, gate);
    if (init.steps) gate.neg_(); // 1 - z is the share that is kept
  }
  static std::tuple<Tensor, States> run(
      const MinGRUOptions& options, const Tensor& gates, const States& state, const Tensor& valid,
      bool reverse) {
    auto x = gates.chunk(num_gates, -1);
    if (valid.defined()) { // z = 0 keeps the state
      x[0] = torch::where(valid, x[0], -1e4);
      x[1] = torch::where(valid, x[1], 0.0);
    }
    const auto [h, last] = min_gru(x[0], x[1], state[0], options.activation(), {}, reverse);
    return {h, {last}};
  }
  static std::tuple<Tensor, States> step(
      const MinGRUOptions& options, const Tensor& gates, const States& state) {
    const auto x = gates.chunk(num_gates, -1);
    const auto [h, next] = min_gru_step(x[0], x[1], state[0], {}, options.activation());
    return {h, {next}};
  }
};

template class SequenceLayerImpl<MinGRUImpl, MinGRUOptions>;

template <>
struct Recurrence<MinLSTMOptions> : OneState<Recurrence<MinLSTMOptions>, MinLSTMOptions, 3> {
  static constexpr const char* name = "MinLSTM";

  static void init_gate_bias(const GateBiasInit& init, const Tensor& bias) {
    const auto gates = bias.chunk(num_gates);
    fill_gate_bias(init, gates[0]);
    gates[1].copy_(-gates[0]);
  }
  static std::tuple<Tensor, States> run(
      const MinLSTMOptions& options, const Tensor& gates, const States& state, const Tensor& valid,
      bool reverse) {
    auto x = gates.chunk(num_gates, -1);
    if (valid.defined()) { // f = 1 and i = 0 keep the state
      x[0] = torch::where(valid, x[0], 1e4);
      x[1] = torch::where(valid, x[1], -1e4);
      x[2] = torch::where(valid, x[2], 0.0);
    }
    const auto [h, last] = min_lstm(
        x[0], x[1], x[2], state[0], options.activation(), options.normalize(), {}, reverse);
    return {h, {last}};
  }
  static std::tuple<Tensor, States> step(
      const MinLSTMOptions& options, const Tensor& gates, const States& state) {
    const auto x = gates.chunk(num_gates, -1);
    const auto [h, next] =
        min_lstm_step(x[0], x[1], x[2], state[0], {}, options.activation(), options.normalize());
    return {h, {next}};
  }
};

template class SequenceLayerImpl<MinLSTMImpl, MinLSTMOptions>;

} // namespace detail

// ---- the block and the language model ----

using detail::shape_of;

namespace detail {

NormImpl::NormImpl(std::string kind, int64_t dim) : kind_(std::move(kind)), dim_(dim) {
  TORCH_CHECK_VALUE(
      kind_ == "layer_norm" || kind_ == "rms_norm", "MinRNNBlock: norm is '", kind_,
      "', expected 'layer_norm' or 'rms_norm'");
  NormImpl::reset();
}
void NormImpl::reset() {
  weight = register_parameter("weight", torch::ones({dim_}));
  if (kind_ == "layer_norm") bias = register_parameter("bias", torch::zeros({dim_}));
}
Tensor NormImpl::forward(const Tensor& x) {
  return kind_ == "layer_norm" ? torch::layer_norm(x, {dim_}, weight, bias)
                               : torch::rms_norm(x, {dim_}, weight);
}
void NormImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_ext::nn::Norm(" << kind_ << ", " << dim_ << ")";
}

} // namespace detail

MinRNNBlockImpl::MinRNNBlockImpl(const MinRNNBlockOptions& options)
    : options(options), rnn(MinGRU(nullptr)) {
  const int64_t dim = options.dim();
  TORCH_CHECK_VALUE(dim >= 1, "MinRNNBlock: dim is ", dim, ", expected at least 1");
  TORCH_CHECK_VALUE(
      options.layer() == "min_gru" || options.layer() == "min_lstm", "MinRNNBlock: layer is '",
      options.layer(), "', expected 'min_gru' or 'min_lstm'");
  TORCH_CHECK_VALUE(
      options.conv_width() >= 1, "MinRNNBlock: conv_width is ", options.conv_width(),
      ", expected at least 1");
  for (const auto& [option, value] :
       {std::pair("expansion", options.expansion()), {"mlp_ratio", options.mlp_ratio()}}) {
    TORCH_CHECK_VALUE(
        int64_t(double(dim) * value) >= 1, "MinRNNBlock: ", option, " is ", value,
        ", expected at least 1 / dim = 1 / ", dim);
  }
  MinRNNBlockImpl::reset();
}

void MinRNNBlockImpl::reset() {
  const int64_t dim = options.dim();
  const int64_t hidden_size = int64_t(double(dim) * options.expansion());
  const int64_t mlp_size = int64_t(double(dim) * options.mlp_ratio());
  const auto layer = [&](auto of) {
    return of.batch_first(true)
        .activation(options.activation())
        .gate_bias_init(options.gate_bias_init());
  };
  norm = register_module("norm", detail::Norm(options.norm(), dim));
  conv = register_module(
      "conv",
      torch::nn::Conv1d(torch::nn::Conv1dOptions(dim, dim, options.conv_width()).groups(dim)));
  if (options.layer() == "min_gru") {
    rnn = register_module("rnn", MinGRU(layer(MinGRUOptions(dim, hidden_size))));
  } else {
    rnn = register_module("rnn", MinLSTM(layer(MinLSTMOptions(dim, hidden_size))));
  }
  down = register_module("down", torch::nn::Linear(hidden_size, dim));
  mlp_norm = register_module("mlp_norm", detail::Norm(options.norm(), dim));
  mlp_up = register_module("mlp_up", torch::nn::Linear(dim, mlp_size));
  mlp_down = register_module("mlp_down", torch::nn::Linear(mlp_size, dim));
  dropout = register_module("dropout", torch::nn::Dropout(options.dropout()));
}

void MinRNNBlockImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_ext::nn::MinRNNBlock(dim=" << options.dim() << ", layer=" << options.layer()
         << ", expansion=" << options.expansion() << ", conv_width=" << options.conv_width()
         << ", mlp_ratio=" << options.mlp_ratio() << ", norm=" << options.norm()
         << ", dropout=" << options.dropout() << ", activation=" << options.activation() << ")";
}

std::tuple<Tensor, MinRNNState> MinRNNBlockImpl::forward(
    const Tensor& x, const std::optional<MinRNNState>& initial_state) {
  TORCH_CHECK_VALUE(
      x.defined() && x.dim() == 3 && x.size(2) == options.dim(), "MinRNNBlock: x has shape ",
      shape_of(x), ", expected (B, T, dim=", options.dim(), ")");
  const auto& [last_inputs, h] = initial_state ? *initial_state : init_state(x.size(0));
  const auto [convolved, new_inputs] = convolve(norm->forward(x), last_inputs);
  const auto [y, new_h] = std::visit(
      [&, &convolved = convolved, &h = h](auto& layer) {
        return layer->forward(convolved, h.unsqueeze(0));
      },
      rnn);
  return {finish(x, y), {new_inputs, new_h.squeeze(0)}};
}

std::tuple<Tensor, MinRNNState> MinRNNBlockImpl::step(const Tensor& x, const MinRNNState& state) {
  TORCH_CHECK_VALUE(
      x.defined() && x.dim() == 2 && x.size(1) == options.dim(), "MinRNNBlock.step: x has shape ",
      shape_of(x), ", expected (B, dim=", options.dim(), ")");
  const auto& [last_inputs, h] = state;
  const auto [convolved, new_inputs] = convolve(norm->forward(x).unsqueeze(1), last_inputs);
  const auto [y, new_h] = std::visit(
      [&, &convolved = convolved, &h = h](auto& layer) {
        return layer->step(convolved.squeeze(1), h.unsqueeze(0));
      },
      rnn);
  return {finish(x, y), {new_inputs, new_h.squeeze(0)}};
}

MinRNNState MinRNNBlockImpl::init_state(int64_t batch_size) const {
  const Tensor h =
      std::visit([&](const auto& layer) { return layer->init_state(batch_size).squeeze(0); }, rnn);
  return {h.new_zeros({batch_size, options.dim(), options.conv_width() - 1}), h};
}

// Causal depthwise convolution of x (B, T, dim) after last_inputs.
std::tuple<Tensor, Tensor> MinRNNBlockImpl::convolve(Tensor x, const Tensor& last_inputs) {
  TORCH_CHECK_VALUE(
      last_inputs.defined() &&
          last_inputs.sizes() ==
              torch::IntArrayRef({x.size(0), options.dim(), options.conv_width() - 1}),
      "MinRNNBlock: the first tensor of state has shape ", shape_of(last_inputs),
      ", expected (B=", x.size(0), ", dim=", options.dim(),
      ", conv_width - 1=", options.conv_width() - 1, ")");
  if (x.size(1) == 0) return {x, last_inputs}; // torch's conv1d wants one output at least
  x = torch::cat({last_inputs.to(x.scalar_type()), x.transpose(1, 2)}, 2);
  const Tensor y = conv->forward(x);
  const int64_t kept = options.conv_width() - 1;
  return {y.transpose(1, 2), x.narrow(2, x.size(2) - kept, kept).to(last_inputs.scalar_type())};
}

// Everything after the recurrence, which looks at one step at a time.
Tensor MinRNNBlockImpl::finish(Tensor x, const Tensor& y) {
  x = x + dropout->forward(down->forward(y));
  const Tensor inner = torch::gelu(mlp_up->forward(mlp_norm->forward(x)));
  return x + dropout->forward(mlp_down->forward(inner));
}

MinRNNLMImpl::MinRNNLMImpl(const MinRNNLMOptions& options) : options(options) {
  for (const auto& [argument, value] :
       {std::pair("vocab_size", options.vocab_size()),
        {"dim", options.dim()},
        {"num_layers", options.num_layers()}}) {
    TORCH_CHECK_VALUE(value >= 1, "MinRNNLM: ", argument, " is ", value, ", expected at least 1");
  }
  MinRNNLMImpl::reset();
}

void MinRNNLMImpl::reset() {
  const auto block = MinRNNBlockOptions(options.dim())
                         .layer(options.layer())
                         .expansion(options.expansion())
                         .conv_width(options.conv_width())
                         .mlp_ratio(options.mlp_ratio())
                         .norm(options.norm())
                         .dropout(options.dropout())
                         .activation(options.activation())
                         .gate_bias_init(options.gate_bias_init());
  embedding =
      register_module("embedding", torch::nn::Embedding(options.vocab_size(), options.dim()));
  torch::nn::init::normal_(embedding->weight, 0, 0.02);
  dropout = register_module("dropout", torch::nn::Dropout(options.dropout()));
  layers = register_module("layers", torch::nn::ModuleList());
  for (int64_t k = 0; k < options.num_layers(); ++k) layers->push_back(MinRNNBlock(block));
  norm = register_module("norm", detail::Norm(options.norm(), options.dim()));
  head = register_module("head", torch::nn::Linear(options.dim(), options.vocab_size()));
}

void MinRNNLMImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_ext::nn::MinRNNLM(vocab_size=" << options.vocab_size()
         << ", dim=" << options.dim() << ", num_layers=" << options.num_layers() << ")";
}

Tensor MinRNNLMImpl::forward(const Tensor& ids) { return std::get<0>(prefill(ids)); }

std::tuple<Tensor, MinRNNState> MinRNNLMImpl::prefill(
    const Tensor& ids, const std::optional<MinRNNState>& initial_state) {
  TORCH_CHECK_VALUE(
      ids.defined() && ids.dim() == 2, "MinRNNLM: ids has shape ", shape_of(ids),
      ", expected (B, T)");
  const auto& [last_inputs, h] = initial_state ? *initial_state : init_state(ids.size(0));
  Tensor x = dropout->forward(embedding->forward(ids));
  std::vector<Tensor> new_inputs, new_h;
  for (int64_t k = 0; k < options.num_layers(); ++k) {
    auto& block = layers->at<MinRNNBlockImpl>(size_t(k));
    auto [y, state] = block.forward(x, MinRNNState(last_inputs[k], h[k]));
    x = y;
    new_inputs.push_back(std::get<0>(state));
    new_h.push_back(std::get<1>(state));
  }
  return {head->forward(norm->forward(x)), {torch::stack(new_inputs), torch::stack(new_h)}};
}

std::tuple<Tensor, MinRNNState> MinRNNLMImpl::step(const Tensor& ids, const MinRNNState& state) {
  TORCH_CHECK_VALUE(
      ids.defined() && ids.dim() == 1, "MinRNNLM.step: ids has shape ", shape_of(ids),
      ", expected (B,)");
  const auto& [last_inputs, h] = state;
  Tensor x = dropout->forward(embedding->forward(ids));
  std::vector<Tensor> new_inputs, new_h;
  for (int64_t k = 0; k < options.num_layers(); ++k) {
    auto& block = layers->at<MinRNNBlockImpl>(size_t(k));
    auto [y, new_state] = block.step(x, MinRNNState(last_inputs[k], h[k]));
    x = y;
    new_inputs.push_back(std::get<0>(new_state));
    new_h.push_back(std::get<1>(new_state));
  }
  return {head->forward(norm->forward(x)), {torch::stack(new_inputs), torch::stack(new_h)}};
}

MinRNNState MinRNNLMImpl::init_state(int64_t batch_size) const {
  std::vector<Tensor> last_inputs, h;
  for (int64_t k = 0; k < options.num_layers(); ++k) {
    const auto state = layers->at<MinRNNBlockImpl>(size_t(k)).init_state(batch_size);
    last_inputs.push_back(std::get<0>(state));
    h.push_back(std::get<1>(state));
  }
  return {torch::stack(last_inputs), torch::stack(h)};
}

Tensor MinRNNLMImpl::generate(
    const Tensor& ids, int64_t max_new_tokens, double temperature, std::optional<int64_t> top_k) {
  TORCH_CHECK_VALUE(
      ids.defined() && ids.dim() == 2 && ids.size(1) >= 1, "MinRNNLM.generate: ids has shape ",
      shape_of(ids), ", expected (B, T) with T >= 1");
  TORCH_CHECK_VALUE(
      max_new_tokens >= 0, "MinRNNLM.generate: max_new_tokens is ", max_new_tokens,
      ", expected at least 0");
  TORCH_CHECK_VALUE(
      temperature >= 0, "MinRNNLM.generate: temperature is ", temperature, ", expected at least 0");
  TORCH_CHECK_VALUE(
      !top_k || *top_k >= 1, "MinRNNLM.generate: top_k is ", top_k.value_or(0),
      ", expected at least 1");
  const torch::NoGradGuard no_grad;
  std::vector<Tensor> tokens = {ids};
  if (max_new_tokens > 0) {
    auto [all_logits, state] = prefill(ids);
    Tensor logits = all_logits.select(1, -1);
    tokens.push_back(detail::sample(logits, temperature, top_k, {}).unsqueeze(1));
    for (int64_t n = 1; n < max_new_tokens; ++n) {
      std::tie(logits, state) = step(tokens.back().squeeze(1), state);
      tokens.push_back(detail::sample(logits, temperature, top_k, {}).unsqueeze(1));
    }
  }
  return torch::cat(tokens, 1);
}

} // namespace torch_ext::nn
