// C++ modules: the twins of torch_ext's Python modules, with the same parameters, defaults and
// results, so that weights go from one to the other (load_state_dict). They train, clone, print and
// are saved like torch's own.
//
//   torch_ext::nn::MinGRU rnn(torch_ext::nn::MinGRUOptions(16, 64).num_layers(2).batch_first(true));
//   torch_ext::nn::load_state_dict(rnn, "weights.pt"); // of torch.save(model.state_dict(), ...)
//   auto [y, state] = rnn->forward(torch::randn({8, 100, 16}));
//
// Arguments of the wrong form throw c10::ValueError or c10::TypeError, which are c10::Errors.
#pragma once
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/ordered_dict.h>
#include <torch/types.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "torch_ext.h"

namespace torch_ext::nn {

// ---- layers ----

/// How the gates' biases begin: with one value, or such that the units' memories are spread evenly
/// between `shortest` and `longest` steps, both above 1 (chrono initialisation).
struct GateBiasInit {
  GateBiasInit(double value) : value(value) {}
  GateBiasInit(double shortest, double longest) : steps({shortest, longest}) {}
  double value = 0;
  std::optional<std::pair<double, double>> steps;
};

struct TORCH_EXT_API MinGRUOptions {
  MinGRUOptions(int64_t input_size, int64_t hidden_size)
      : input_size_(input_size), hidden_size_(hidden_size) {}

  TORCH_ARG(int64_t, input_size);
  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, num_layers) = 1;
  TORCH_ARG(bool, bias) = true;
  /// x and the output are (B, T, ...) instead of (T, B, ...); the state is the same in either case
  TORCH_ARG(bool, batch_first) = false;
  /// probability of a zero in the output of each layer but the last, in training
  TORCH_ARG(double, dropout) = 0.0;
  TORCH_ARG(bool, bidirectional) = false;
  /// of the candidate: "identity", or "g" for the paper's positive candidates (appendix B)
  TORCH_ARG(std::string, activation) = "identity";
  /// of the gate z; negative is long memory
  TORCH_ARG(std::optional<GateBiasInit>, gate_bias_init) = std::nullopt;
};

struct TORCH_EXT_API MinLSTMOptions {
  MinLSTMOptions(int64_t input_size, int64_t hidden_size)
      : input_size_(input_size), hidden_size_(hidden_size) {}

  TORCH_ARG(int64_t, input_size);
  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, num_layers) = 1;
  TORCH_ARG(bool, bias) = true;
  TORCH_ARG(bool, batch_first) = false;
  TORCH_ARG(double, dropout) = 0.0;
  TORCH_ARG(bool, bidirectional) = false;
  TORCH_ARG(std::string, activation) = "identity";
  /// divide both gates by their sum
  TORCH_ARG(bool, normalize) = true;
  /// of the forget gate, the input gate gets its negative; positive is long memory
  TORCH_ARG(std::optional<GateBiasInit>, gate_bias_init) = std::nullopt;
};

struct TORCH_EXT_API MLSTMOptions {
  MLSTMOptions(int64_t input_size, int64_t hidden_size)
      : input_size_(input_size), hidden_size_(hidden_size) {}

  TORCH_ARG(int64_t, input_size);
  /// channels of each direction's output, those of the values of all heads
  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, num_layers) = 1;
  TORCH_ARG(bool, bias) = true;
  TORCH_ARG(bool, batch_first) = false;
  TORCH_ARG(double, dropout) = 0.0;
  TORCH_ARG(bool, bidirectional) = false;
  /// memories side by side, each with gates of its own
  TORCH_ARG(int64_t, num_heads) = 1;
  /// channels of the queries and of the keys of all heads; hidden_size if left out
  TORCH_ARG(std::optional<int64_t>, qk_size) = std::nullopt;
  /// "exp" or "sigmoid"
  TORCH_ARG(std::string, input_gate) = "exp";
  /// divide by the normaliser; false goes with the input gate "sigmoid" alone
  TORCH_ARG(bool, normalize) = true;
  /// added to the divisor
  TORCH_ARG(double, eps) = 1e-6;
  /// of the forget gate; 3 to 6 over the heads if left out
  TORCH_ARG(std::optional<GateBiasInit>, gate_bias_init) = std::nullopt;
  /// of the input gate
  TORCH_ARG(double, input_gate_bias_init) = 0.0;
};

/// The memories C, their normalisers n and their stabilisers m.
using MLSTMState = std::tuple<torch::Tensor, torch::Tensor, torch::Tensor>;

namespace detail {

/// A state that may be left out: an undefined tensor, or no tuple.
template <class State>
using Given =
    std::conditional_t<std::is_same_v<State, torch::Tensor>, torch::Tensor, std::optional<State>>;

/// What layers with torch::nn::GRU's contract share. Parameters: weight_ih_l{k}[_reverse]
/// (gates * hidden_size, in) and bias_ih_l{k}[_reverse], the gates' rows one after the other in the
/// order of the operator's arguments; `in` is input_size for k = 0, else directions * hidden_size.
/// State: a tensor, or a tuple of several.
template <class Derived, class Options, class State = torch::Tensor>
class TORCH_EXT_API SequenceLayerImpl : public torch::nn::Cloneable<Derived> {
 public:
  explicit SequenceLayerImpl(const Options& options);
  SequenceLayerImpl(int64_t input_size, int64_t hidden_size)
      : SequenceLayerImpl(Options(input_size, hidden_size)) {}

  /// Runs all steps.
  ///   x        (T, B, input_size), (B, T, input_size) with batch_first, (T, input_size) without batch
  ///   state    (num_layers * directions, B, hidden_size), without B for an x without batch; float32,
  ///            float64 in a double module. Zeros if left out.
  ///   lengths  number of steps of each row of a padded batch, integers, (B). What stands after them
  ///            is ignored: the output there is 0 and the state that after a row's last step.
  /// Returns the last layer's output and the state after the last step, of the forms of x and state.
  std::tuple<torch::Tensor, State> forward(
      const torch::Tensor& x, const Given<State>& state = {}, const torch::Tensor& lengths = {});

  /// One step, for streaming: x (B, input_size) and the state before it to the output (B, hidden_size)
  /// and the state after it. Not for bidirectional layers.
  std::tuple<torch::Tensor, State> step(const torch::Tensor& x, const State& state);

  /// The state before the first step: zeros, (num_layers * directions, B, hidden_size).
  State init_state(int64_t batch_size) const;

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  Options options;

 private:
  int64_t num_directions() const { return options.bidirectional() ? 2 : 1; }
  torch::Tensor project(const torch::Tensor& x, int64_t layer, int64_t direction) const;
  std::vector<torch::Tensor> zeros(int64_t batch_size) const;
  void check_state(const std::vector<torch::Tensor>& state, int64_t batch_size) const;
  void check_dtype(const torch::Tensor& x) const;

  std::vector<torch::Tensor> weights_, biases_; // of each layer and direction
};

} // namespace detail

/// minGRU, see torch_ext.MinGRU in Python and min_gru in ops.h.
/// The gates' rows of the parameters: z, candidate.
class TORCH_EXT_API MinGRUImpl : public detail::SequenceLayerImpl<MinGRUImpl, MinGRUOptions> {
 public:
  using SequenceLayerImpl::SequenceLayerImpl;
  // Here as well, since torch::nn::AnyModule wants it in the class itself.
  std::tuple<torch::Tensor, torch::Tensor> forward(
      const torch::Tensor& x, const torch::Tensor& state = {}, const torch::Tensor& lengths = {}) {
    return SequenceLayerImpl::forward(x, state, lengths);
  }

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(torch::Tensor())}, {2, torch::nn::AnyValue(torch::Tensor())})
};
extern template class detail::SequenceLayerImpl<MinGRUImpl, MinGRUOptions>;
TORCH_MODULE(MinGRU);

/// minLSTM, see torch_ext.MinLSTM in Python and min_lstm in ops.h.
/// The gates' rows of the parameters: forget gate, input gate, candidate.
class TORCH_EXT_API MinLSTMImpl : public detail::SequenceLayerImpl<MinLSTMImpl, MinLSTMOptions> {
 public:
  using SequenceLayerImpl::SequenceLayerImpl;
  // Here as well, since torch::nn::AnyModule wants it in the class itself.
  std::tuple<torch::Tensor, torch::Tensor> forward(
      const torch::Tensor& x, const torch::Tensor& state = {}, const torch::Tensor& lengths = {}) {
    return SequenceLayerImpl::forward(x, state, lengths);
  }

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(torch::Tensor())}, {2, torch::nn::AnyValue(torch::Tensor())})
};
extern template class detail::SequenceLayerImpl<MinLSTMImpl, MinLSTMOptions>;
TORCH_MODULE(MinLSTM);

/// mLSTM, see torch_ext.MLSTM in Python and mlstm in ops.h. The rows of the parameters: q, k (qk_size each), v
/// (hidden_size), i, f (num_heads each), the output gate (hidden_size). The state, C (num_layers * directions, B, num_heads,
/// K, V), n without V, m without K and V, where K = qk_size / num_heads, V = hidden_size / num_heads.
class TORCH_EXT_API MLSTMImpl
    : public detail::SequenceLayerImpl<MLSTMImpl, MLSTMOptions, MLSTMState> {
 public:
  using SequenceLayerImpl::SequenceLayerImpl;
  // Here as well, since torch::nn::AnyModule wants it in the class itself.
  std::tuple<torch::Tensor, MLSTMState> forward(
      const torch::Tensor& x, const std::optional<MLSTMState>& state = {},
      const torch::Tensor& lengths = {}) {
    return SequenceLayerImpl::forward(x, state, lengths);
  }

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(std::optional<MLSTMState>())},
      {2, torch::nn::AnyValue(torch::Tensor())})
};
extern template class detail::SequenceLayerImpl<MLSTMImpl, MLSTMOptions, MLSTMState>;
TORCH_MODULE(MLSTM);

// ---- the block around them, and the language model made of it ----

struct TORCH_EXT_API MinRNNBlockOptions {
  MinRNNBlockOptions(int64_t dim) : dim_(dim) {}

  TORCH_ARG(int64_t, dim);
  /// "min_gru" or "min_lstm"
  TORCH_ARG(std::string, layer) = "min_gru";
  /// width of the recurrence's state, in multiples of dim
  TORCH_ARG(double, expansion) = 2.0;
  /// steps that the convolution sees, the current one included
  TORCH_ARG(int64_t, conv_width) = 4;
  /// width of the MLP, in multiples of dim
  TORCH_ARG(double, mlp_ratio) = 4.0;
  /// "layer_norm" or "rms_norm"
  TORCH_ARG(std::string, norm) = "layer_norm";
  /// probability of a zero in what is added to each residual, in training
  TORCH_ARG(double, dropout) = 0.0;
  TORCH_ARG(std::string, activation) = "identity";
  TORCH_ARG(std::optional<GateBiasInit>, gate_bias_init) = std::nullopt;
};

/// Inputs of the convolution that it still needs, and the recurrence's state.
using MinRNNState = std::tuple<torch::Tensor, torch::Tensor>;

namespace detail {

/// LayerNorm or RMSNorm over the last dimension; torch has no C++ module of the latter.
class TORCH_EXT_API NormImpl : public torch::nn::Cloneable<NormImpl> {
 public:
  NormImpl(std::string kind, int64_t dim);
  torch::Tensor forward(const torch::Tensor& x);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  torch::Tensor weight, bias;

 private:
  std::string kind_;
  int64_t dim_;
};
TORCH_MODULE(Norm);

} // namespace detail

/// The paper's block, see torch_ext.MinRNNBlock in Python: norm, convolution, minRNN, projection;
/// norm, MLP; two residuals.
class TORCH_EXT_API MinRNNBlockImpl : public torch::nn::Cloneable<MinRNNBlockImpl> {
 public:
  explicit MinRNNBlockImpl(const MinRNNBlockOptions& options);

  /// x (B, T, dim) and a state to y (B, T, dim) and the state after the last step.
  std::tuple<torch::Tensor, MinRNNState> forward(
      const torch::Tensor& x, const std::optional<MinRNNState>& state = {});
  /// One step: x and y are (B, dim).
  std::tuple<torch::Tensor, MinRNNState> step(const torch::Tensor& x, const MinRNNState& state);
  /// Zeros: the convolution's last inputs (B, dim, conv_width - 1), and (B, hidden_size).
  MinRNNState init_state(int64_t batch_size) const;

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  MinRNNBlockOptions options;
  detail::Norm norm{nullptr}, mlp_norm{nullptr};
  torch::nn::Conv1d conv{nullptr};
  std::variant<MinGRU, MinLSTM> rnn;
  torch::nn::Linear down{nullptr}, mlp_up{nullptr}, mlp_down{nullptr};
  torch::nn::Dropout dropout{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<MinRNNState>())})

 private:
  std::tuple<torch::Tensor, torch::Tensor> convolve(
      torch::Tensor x, const torch::Tensor& last_inputs);
  torch::Tensor finish(torch::Tensor x, const torch::Tensor& y);
};
TORCH_MODULE(MinRNNBlock);

struct TORCH_EXT_API MinRNNLMOptions {
  MinRNNLMOptions(int64_t vocab_size, int64_t dim, int64_t num_layers)
      : vocab_size_(vocab_size), dim_(dim), num_layers_(num_layers) {}

  TORCH_ARG(int64_t, vocab_size);
  TORCH_ARG(int64_t, dim);
  TORCH_ARG(int64_t, num_layers);
  // The others are those of each block; the dropout also acts on the embedding.
  TORCH_ARG(std::string, layer) = "min_gru";
  TORCH_ARG(double, expansion) = 2.0;
  TORCH_ARG(int64_t, conv_width) = 4;
  TORCH_ARG(double, mlp_ratio) = 4.0;
  TORCH_ARG(std::string, norm) = "layer_norm";
  TORCH_ARG(double, dropout) = 0.0;
  TORCH_ARG(std::string, activation) = "identity";
  TORCH_ARG(std::optional<GateBiasInit>, gate_bias_init) = std::nullopt;
};

/// A language model of MinRNNBlocks, see torch_ext.MinRNNLM in Python: embedding, blocks, norm, logits.
class TORCH_EXT_API MinRNNLMImpl : public torch::nn::Cloneable<MinRNNLMImpl> {
 public:
  explicit MinRNNLMImpl(const MinRNNLMOptions& options);

  /// Logits (B, T, vocab_size) of the token after each of ids (B, T).
  torch::Tensor forward(const torch::Tensor& ids);
  /// `forward` from a state to a state.
  std::tuple<torch::Tensor, MinRNNState> prefill(
      const torch::Tensor& ids, const std::optional<MinRNNState>& state = {});
  /// One token of each sequence, (B), to logits (B, vocab_size) and a state.
  std::tuple<torch::Tensor, MinRNNState> step(const torch::Tensor& ids, const MinRNNState& state);
  /// Zeros: the two states of MinRNNBlock, each (num_layers, B, ...).
  MinRNNState init_state(int64_t batch_size) const;
  /// Appends tokens to ids (B, T), T >= 1, one at a time in constant memory. A temperature of 0 always
  /// takes the most likely one; with top_k only that many most likely ones are drawn from.
  /// Records no gradient. Call eval() before if the model has dropout.
  torch::Tensor generate(
      const torch::Tensor& ids, int64_t max_new_tokens, double temperature = 1.0,
      std::optional<int64_t> top_k = {});

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  MinRNNLMOptions options;
  torch::nn::Embedding embedding{nullptr};
  torch::nn::Dropout dropout{nullptr};
  torch::nn::ModuleList layers{nullptr};
  detail::Norm norm{nullptr};
  torch::nn::Linear head{nullptr};
};
TORCH_MODULE(MinRNNLM);

// ---- Mamba ----

struct TORCH_EXT_API MambaOptions {
  MambaOptions(int64_t d_model) : d_model_(d_model) {}

  TORCH_ARG(int64_t, d_model);
  /// states of each inner channel
  TORCH_ARG(int64_t, d_state) = 16;
  /// steps that the convolution sees, the current one included
  TORCH_ARG(int64_t, d_conv) = 4;
  /// inner channels, in multiples of d_model
  TORCH_ARG(double, expand) = 2.0;
  /// rank of the step sizes' projection; ceil(d_model / 16) if left out
  TORCH_ARG(std::optional<int64_t>, dt_rank) = std::nullopt;
  /// the step sizes begin between dt_min and dt_max, uniformly in the logarithm, and at least at dt_init_floor
  TORCH_ARG(double, dt_min) = 0.001;
  TORCH_ARG(double, dt_max) = 0.1;
  /// of dt_proj.weight: "random" is uniform between plus and minus dt_scale / sqrt(dt_rank), "constant" that number
  TORCH_ARG(std::string, dt_init) = "random";
  TORCH_ARG(double, dt_scale) = 1.0;
  TORCH_ARG(double, dt_init_floor) = 1e-4;
  /// the convolution has a bias
  TORCH_ARG(bool, conv_bias) = true;
  /// in_proj and out_proj have one
  TORCH_ARG(bool, bias) = false;
  /// a second direction with parameters of its own; it has `forward` alone, no states and no steps
  TORCH_ARG(bool, bidirectional) = false;
};

/// The convolution's last inputs, and the scan's states.
using MambaState = std::tuple<torch::Tensor, torch::Tensor>;

/// Mamba, see torch_ext.Mamba in Python and selective_scan in ops.h. Parameters have mamba_ssm's names and shapes:
/// in_proj.weight, conv1d.weight, conv1d.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A_log, D, out_proj.weight;
/// conv1d_b, x_proj_b, dt_proj_b, A_b_log, D_b for the second direction.
class TORCH_EXT_API MambaImpl : public torch::nn::Cloneable<MambaImpl> {
 public:
  explicit MambaImpl(const MambaOptions& options);

  /// Runs all steps, from zero states, x (B, T, d_model) to (B, T, d_model).
  ///   lengths  number of steps of each row of a padded batch, integers, (B). Padding changes no result of the
  ///            others, whatever stands there; its own outputs are 0.
  ///   padding  side on which it is, "right" or "left".
  torch::Tensor forward(
      const torch::Tensor& x, const torch::Tensor& lengths = {},
      const std::string& padding = "right");
  /// `forward` from a state to a state: that after the last step of each row. Zeros if left out; it has to be
  /// where padding is on the left.
  std::tuple<torch::Tensor, MambaState> prefill(
      const torch::Tensor& x, const std::optional<MambaState>& state = {},
      const torch::Tensor& lengths = {}, const std::string& padding = "right");
  /// One step: x and y are (B, d_model).
  std::tuple<torch::Tensor, MambaState> step(const torch::Tensor& x, const MambaState& state);
  /// Zeros: (B, d_inner, d_conv - 1) and (B, d_inner, d_state); float32, float64 in a double module.
  MambaState init_state(int64_t batch_size) const;

  /// Draws all parameters again.
  void reset_parameters();

  int64_t d_inner() const { return int64_t(options.expand() * double(options.d_model())); }
  int64_t dt_rank() const { return options.dt_rank().value_or((options.d_model() + 15) / 16); }

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// What each direction has of its own.
  struct Direction {
    torch::nn::Conv1d conv1d{nullptr};
    torch::nn::Linear x_proj{nullptr}, dt_proj{nullptr};
    torch::Tensor A_log, D;
  };

  MambaOptions options;
  torch::nn::Linear in_proj{nullptr}, out_proj{nullptr};
  Direction ahead, back;

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(torch::Tensor())}, {2, torch::nn::AnyValue(std::string("right"))})

 private:
  void reset_recurrence(const Direction& direction);
  std::tuple<torch::Tensor, MambaState> run(
      const Direction& direction, const torch::Tensor& inner, const torch::Tensor& z,
      const MambaState& state, const torch::Tensor& valid);
  void check_one_direction(const char* method) const;
  void check_state(const MambaState& state, int64_t batch_size) const;
};
TORCH_MODULE(Mamba);

struct TORCH_EXT_API Mamba2Options {
  Mamba2Options(int64_t d_model) : d_model_(d_model) {}

  TORCH_ARG(int64_t, d_model);
  /// columns of each head's state
  TORCH_ARG(int64_t, d_state) = 128;
  /// steps that the convolution sees, the current one included
  TORCH_ARG(int64_t, d_conv) = 4;
  /// the convolution's weights begin between plus and minus it; as torch::nn::Conv1d's if left out
  TORCH_ARG(std::optional<double>, conv_init) = std::nullopt;
  /// inner channels, in multiples of d_model
  TORCH_ARG(double, expand) = 2.0;
  /// rows of each head's state
  TORCH_ARG(int64_t, headdim) = 64;
  /// channels that pass through the scan, all inner ones if left out; the others are a gated MLP beside it
  TORCH_ARG(std::optional<int64_t>, d_ssm) = std::nullopt;
  /// groups of heads with a B and a C each
  TORCH_ARG(int64_t, ngroups) = 1;
  /// -A begins between these two
  using Range = std::pair<double, double>;
  TORCH_ARG(Range, A_init_range) = {1, 16};
  /// D has a number for each channel, not for each head
  TORCH_ARG(bool, D_has_hdim) = false;
  /// there is a norm behind the scan
  TORCH_ARG(bool, rmsnorm) = true;
  /// RMSNorm(y) silu(z), else RMSNorm(y silu(z))
  TORCH_ARG(bool, norm_before_gate) = false;
  /// the step sizes begin between dt_min and dt_max, uniformly in the logarithm, and at least at dt_init_floor
  TORCH_ARG(double, dt_min) = 0.001;
  TORCH_ARG(double, dt_max) = 0.1;
  TORCH_ARG(double, dt_init_floor) = 1e-4;
  /// step sizes are kept between these two
  TORCH_ARG(Range, dt_limit) = {0, std::numeric_limits<double>::infinity()};
  /// in_proj and out_proj have biases
  TORCH_ARG(bool, bias) = false;
  /// the convolution has one
  TORCH_ARG(bool, conv_bias) = true;
  /// added to the mean square in the norm
  TORCH_ARG(double, norm_eps) = 1e-5;
};

namespace detail {

/// RMSNorm of groups of channels, with a gate silu(z) before it or after it.
class TORCH_EXT_API GatedRMSNormImpl : public torch::nn::Cloneable<GatedRMSNormImpl> {
 public:
  GatedRMSNormImpl(int64_t channels, int64_t groups, double eps, bool norm_before_gate);
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& z);
  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  torch::Tensor weight;

 private:
  int64_t channels_, groups_;
  double eps_;
  bool norm_before_gate_;
};
TORCH_MODULE(GatedRMSNorm);

} // namespace detail

/// Mamba-2, see torch_ext.Mamba2 in Python and ssd in ops.h. Parameters have mamba_ssm's names and shapes: in_proj.weight,
/// conv1d.weight, conv1d.bias, dt_bias, A_log, D, norm.weight, out_proj.weight. `lengths` and `padding` are those of Mamba.
class TORCH_EXT_API Mamba2Impl : public torch::nn::Cloneable<Mamba2Impl> {
 public:
  explicit Mamba2Impl(const Mamba2Options& options);

  /// Runs all steps, from zero states, x (B, T, d_model) to (B, T, d_model).
  torch::Tensor forward(
      const torch::Tensor& x, const torch::Tensor& lengths = {},
      const std::string& padding = "right");
  /// `forward` from a state to a state: that after the last step of each row. Zeros if left out; it has to be
  /// where padding is on the left.
  std::tuple<torch::Tensor, MambaState> prefill(
      const torch::Tensor& x, const std::optional<MambaState>& state = {},
      const torch::Tensor& lengths = {}, const std::string& padding = "right");
  /// One step: x and y are (B, d_model).
  std::tuple<torch::Tensor, MambaState> step(const torch::Tensor& x, const MambaState& state);
  /// Zeros: (B, d_ssm + 2 * ngroups * d_state, d_conv - 1) and (B, nheads, headdim, d_state); float32, float64 in a
  /// double module.
  MambaState init_state(int64_t batch_size) const;

  /// Draws all parameters again.
  void reset_parameters();

  int64_t d_inner() const { return int64_t(options.expand() * double(options.d_model())); }
  int64_t d_ssm() const { return options.d_ssm().value_or(d_inner()); }
  int64_t nheads() const { return d_ssm() / options.headdim(); }

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  Mamba2Options options;
  torch::nn::Linear in_proj{nullptr}, out_proj{nullptr};
  torch::nn::Conv1d conv1d{nullptr};
  torch::Tensor dt_bias, A_log, D;
  detail::GatedRMSNorm norm{nullptr}; // null without rmsnorm

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(torch::Tensor())}, {2, torch::nn::AnyValue(std::string("right"))})

 private:
  int64_t conv_dim() const { return d_ssm() + 2 * options.ngroups() * options.d_state(); }
  std::vector<torch::Tensor> project(const torch::Tensor& x);
  std::vector<torch::Tensor> heads(const torch::Tensor& u) const;
  std::pair<torch::Tensor, std::optional<torch::Tensor>> time_steps(
      torch::Tensor dt, const torch::Tensor& valid) const;
  std::optional<torch::Tensor> gate(const torch::Tensor& z) const;
  torch::Tensor skip() const;
  torch::Tensor finish(torch::Tensor y, const torch::Tensor& z, const torch::Tensor& mlp);
  void reset_recurrence();
  void check_state(const MambaState& state, int64_t batch_size) const;
};
TORCH_MODULE(Mamba2);

struct TORCH_EXT_API MambaBlockOptions {
  MambaBlockOptions(int64_t d_model) : mixer_(MambaOptions(d_model)) {}
  MambaBlockOptions(MambaOptions mixer) : mixer_(std::move(mixer)) {}
  MambaBlockOptions(Mamba2Options mixer) : mixer_(std::move(mixer)) {}

  int64_t d_model() const {
    return std::visit([](const auto& each) { return each.d_model(); }, mixer_);
  }

  /// those of Mamba, or of Mamba2, whose norm takes norm_eps too
  using Mixer = std::variant<MambaOptions, Mamba2Options>;
  TORCH_ARG(Mixer, mixer);
  /// the norms are RMSNorms, else LayerNorms
  TORCH_ARG(bool, rms_norm) = true;
  /// added to the variance in the norms
  TORCH_ARG(double, norm_eps) = 1e-5;
  /// y is float32 whatever x and the parameters are (float64 stays), else of the dtype of x
  TORCH_ARG(bool, residual_in_fp32) = true;
};

namespace detail {

/// LayerNorm or RMSNorm of what may be wider than the parameters, in whose dtype the result is.
class TORCH_EXT_API ResidualNormImpl : public torch::nn::Cloneable<ResidualNormImpl> {
 public:
  ResidualNormImpl(int64_t dim, bool rms_norm, double eps);
  torch::Tensor forward(const torch::Tensor& x);
  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  torch::Tensor weight, bias;

 private:
  int64_t dim_;
  bool rms_norm_;
  double eps_;
};
TORCH_MODULE(ResidualNorm);

} // namespace detail

/// A residual around a norm and Mamba or Mamba2, y = x + mixer(norm(x)): see torch_ext.MambaBlock in Python, and Mamba
/// for the arguments.
class TORCH_EXT_API MambaBlockImpl : public torch::nn::Cloneable<MambaBlockImpl> {
 public:
  explicit MambaBlockImpl(const MambaBlockOptions& options);

  torch::Tensor forward(
      const torch::Tensor& x, const torch::Tensor& lengths = {},
      const std::string& padding = "right");
  std::tuple<torch::Tensor, MambaState> prefill(
      const torch::Tensor& x, const std::optional<MambaState>& state = {},
      const torch::Tensor& lengths = {}, const std::string& padding = "right");
  std::tuple<torch::Tensor, MambaState> step(const torch::Tensor& x, const MambaState& state);
  MambaState init_state(int64_t batch_size) const {
    return std::visit([&](const auto& each) { return each->init_state(batch_size); }, mixer);
  }

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  MambaBlockOptions options;
  detail::ResidualNorm norm{nullptr};
  std::variant<Mamba, Mamba2> mixer;

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(torch::Tensor())}, {2, torch::nn::AnyValue(std::string("right"))})

 private:
  torch::Tensor widen(const torch::Tensor& x) const;
  torch::Tensor residual(
      const torch::Tensor& x, const torch::Tensor& lengths, const std::string& padding) const;
};
TORCH_MODULE(MambaBlock);

struct TORCH_EXT_API MambaLMOptions {
  /// `block` is d_model, or MambaOptions, Mamba2Options, or MambaBlockOptions
  MambaLMOptions(int64_t vocab_size, MambaBlockOptions block, int64_t n_layer)
      : vocab_size_(vocab_size), block_(std::move(block)), n_layer_(n_layer) {}

  TORCH_ARG(int64_t, vocab_size);
  TORCH_ARG(MambaBlockOptions, block);
  TORCH_ARG(int64_t, n_layer);
  /// the logits' weight is the embedding's: one parameter, backbone.embedding.weight; else there is lm_head.weight
  TORCH_ARG(bool, tie_embeddings) = true;
  /// embedding and logits have as many more rows as make their number V a multiple of this
  TORCH_ARG(int64_t, pad_vocab_size_multiple) = 8;
};

/// A state of Mamba or Mamba2 for each block.
using MambaLMState = std::vector<MambaState>;

namespace detail {

/// Embedding, blocks and the last norm: what MambaLM has as `backbone`. The results are (B, T, d_model), (B, d_model)
/// with last_only and in a step.
class TORCH_EXT_API MambaBackboneImpl : public torch::nn::Cloneable<MambaBackboneImpl> {
 public:
  explicit MambaBackboneImpl(const MambaLMOptions& options);

  torch::Tensor forward(
      const torch::Tensor& ids, const torch::Tensor& lengths, const std::string& padding);
  std::tuple<torch::Tensor, MambaLMState> prefill(
      const torch::Tensor& ids, const std::optional<MambaLMState>& state,
      const torch::Tensor& lengths, const std::string& padding, bool last_only);
  std::tuple<torch::Tensor, MambaLMState> step(const torch::Tensor& ids, const MambaLMState& state);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  MambaBlockImpl& block(int64_t k) { return layers->at<MambaBlockImpl>(size_t(k)); }
  const MambaBlockImpl& block(int64_t k) const { return layers->at<MambaBlockImpl>(size_t(k)); }

  MambaLMOptions options;
  torch::nn::Embedding embedding{nullptr};
  torch::nn::ModuleList layers{nullptr};
  ResidualNorm norm_f{nullptr};

 private:
  torch::Tensor embed(const torch::Tensor& ids, const torch::Tensor& valid);
  void check_state(const MambaLMState& state) const;
};
TORCH_MODULE(MambaBackbone);

} // namespace detail

/// A language model of MambaBlocks, see torch_ext.MambaLM in Python: embedding, blocks, norm, logits. Parameters have
/// mamba_ssm's names. Arguments `lengths` and `padding` are those of Mamba.
class TORCH_EXT_API MambaLMImpl : public torch::nn::Cloneable<MambaLMImpl> {
 public:
  explicit MambaLMImpl(const MambaLMOptions& options);

  /// Logits (B, T, V) of the token after each of ids (B, T).
  torch::Tensor forward(
      const torch::Tensor& ids, const torch::Tensor& lengths = {},
      const std::string& padding = "right");
  /// `forward` from a state to a state. With last_only logits after each row's last token alone, (B, V).
  std::tuple<torch::Tensor, MambaLMState> prefill(
      const torch::Tensor& ids, const std::optional<MambaLMState>& state = {},
      const torch::Tensor& lengths = {}, const std::string& padding = "right",
      bool last_only = false);
  /// One token of each sequence, (B,), to logits (B, V) and a state.
  std::tuple<torch::Tensor, MambaLMState> step(const torch::Tensor& ids, const MambaLMState& state);
  /// Zeros.
  MambaLMState init_state(int64_t batch_size) const;
  /// Appends tokens to ids (B, T), T >= 1, one at a time in constant memory. A temperature of 0 always takes the most
  /// likely one; with top_k only that many most likely ones are drawn from, with top_p the fewest that together have
  /// that probability. Records no gradient.
  torch::Tensor generate(
      const torch::Tensor& ids, int64_t max_new_tokens, double temperature = 1.0,
      std::optional<int64_t> top_k = {}, std::optional<double> top_p = {},
      const torch::Tensor& lengths = {}, const std::string& padding = "right");

  void reset() override;
  /// Draws all parameters again, as the constructor does.
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  MambaLMOptions options;
  detail::MambaBackbone backbone{nullptr};
  torch::nn::Linear lm_head{nullptr}; // null with tie_embeddings

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(torch::Tensor())}, {2, torch::nn::AnyValue(std::string("right"))})

 private:
  torch::Tensor logits(const torch::Tensor& x);
};
TORCH_MODULE(MambaLM);

// ---- weights ----

using StateDict = torch::OrderedDict<std::string, torch::Tensor>;

/// The named tensors in a file, on the CPU. The file is one of
///   torch.save(model.state_dict(), path), or of any {name: tensor}    in Python
///   torch.jit.save(scripted, path): its parameters and buffers        in Python
///   torch::save(module, path)                                         in C++
TORCH_EXT_API StateDict read_state_dict(const std::string& path);

/// Copies tensors into the parameters and buffers of the same names; dtype and device remain those of
/// the module. Names that are missing, unexpected or of another shape are an error, which names all of
/// them and leaves the module as it was. A second name of a tensor that another name has as well, such
/// as that of a tied weight, need not be known.
TORCH_EXT_API void load_state_dict(torch::nn::Module& module, const StateDict& state_dict);

/// The same from a file. `prefix` picks a part of a larger model: "encoder.rnn" takes the tensors
/// encoder.rnn.weight_ih_l0 and so on.
TORCH_EXT_API void load_state_dict(
    torch::nn::Module& module, const std::string& path, const std::string& prefix = "");

template <class Impl>
void load_state_dict(
    torch::nn::ModuleHolder<Impl>& module, const std::string& path,
    const std::string& prefix = "") {
  load_state_dict(*module, path, prefix);
}
template <class Impl>
void load_state_dict(torch::nn::ModuleHolder<Impl>& module, const StateDict& state_dict) {
  load_state_dict(*module, state_dict);
}

} // namespace torch_ext::nn
