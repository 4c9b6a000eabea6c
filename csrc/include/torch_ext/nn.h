// C++ modules: the twins of torch_ext's Python modules, with the same parameter names, shapes and results, so that weights
// go from one to the other (load_state_dict below). They train like any torch::nn module.
//
//   torch_ext::nn::MinGRU rnn(torch_ext::nn::MinGRUOptions(16, 64).num_layers(2).batch_first(true));
//   auto [y, state] = rnn->forward(torch::randn({8, 100, 16}));
#pragma once
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/pimpl.h>
#include <torch/ordered_dict.h>
#include <torch/types.h>

#include "torch_ext.h"

namespace torch_ext::nn {

/// Options of `MinGRU`; those of torch::nn::LSTM, then its own.
struct TORCH_EXT_API MinGRUOptions {
  MinGRUOptions(int64_t input_size, int64_t hidden_size)
      : input_size_(input_size), hidden_size_(hidden_size) {}

  TORCH_ARG(int64_t, input_size);
  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, num_layers) = 1;
  TORCH_ARG(bool, bias) = true;
  /// x and output are (B, T, features) rather than (T, B, features); the state is not affected
  TORCH_ARG(bool, batch_first) = false;
  /// of the outputs of every layer but the last, while training
  TORCH_ARG(double, dropout) = 0.0;
  TORCH_ARG(bool, bidirectional) = false;
  /// of the candidate: "identity", or "g" of the paper's appendix B, which keeps states positive
  TORCH_ARG(std::string, activation) = "identity";
  /// see the Python module
  TORCH_ARG(std::optional<double>, gate_bias_init) = std::nullopt;
};

/// Options of `MinLSTM`.
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
  TORCH_ARG(std::optional<double>, gate_bias_init) = std::nullopt;
};

namespace detail {

/// What MinGRU and MinLSTM have in common: torch::nn::LSTM's contract around a recurrence that
/// takes the projected input. `Derived` says which recurrence.
template <class Derived, class Options>
class TORCH_EXT_API SequenceLayerImpl : public torch::nn::Cloneable<Derived> {
 public:
  explicit SequenceLayerImpl(Options options);

  /// x: (T, B, input_size), (B, T, input_size) with batch_first, or (T, input_size).
  /// state: (num_layers * directions, B, hidden_size), without B for an x without B; zeros if left out. float32, float64 in a double module.
  /// lengths: (B,), the number of valid steps of each row of a padded batch. Outputs beyond it are
  /// zero, and the state is that after the last valid step.
  /// Returns the last layer's outputs, (..., directions * hidden_size), and the state after the last step, of the form of `state`.
  std::tuple<torch::Tensor, torch::Tensor> forward(
      const torch::Tensor& x, const torch::Tensor& state = {}, const torch::Tensor& lengths = {});

  /// One step: x_t (B, input_size) or (input_size,) and the state before it give the output and the
  /// state after it. Only for one direction.
  std::tuple<torch::Tensor, torch::Tensor> step(
      const torch::Tensor& x_t, const torch::Tensor& state = {});

  /// Zeros, (num_layers * directions, batch_size, hidden_size).
  torch::Tensor init_state(int64_t batch_size) const;

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  Options options;

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {1, torch::nn::AnyValue(torch::Tensor())}, {2, torch::nn::AnyValue(torch::Tensor())})
};

}  // namespace detail
}  // namespace torch_ext::nn
