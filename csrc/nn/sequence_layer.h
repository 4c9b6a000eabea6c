// The layers with torch::nn::GRU's contract, but for their recurrence: parameters, directions, padding, state. A layer is
// an Options struct (torch_ext/nn.h) and its Recurrence (min_rnn.cpp).
#pragma once
#include <ATen/autocast_mode.h>
#include <torch/utils.h>

#include <cmath>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "../core/checks.h"
#include "torch_ext/nn.h"

namespace torch_ext::nn::detail {

using torch::Tensor;

/// What is specialised for each layer's Options:
///   static constexpr const char* name; static constexpr int64_t num_gates;
///   static void init_gate_bias(const GateBiasInit& init, const Tensor& bias);
///   static std::tuple<Tensor, Tensor> run(     // the operator
///       const Options&, const Tensor& gates, const Tensor& state, const Tensor& valid, bool reverse);
///   static std::tuple<Tensor, Tensor> step(const Options&, const Tensor& gates, const Tensor& state);
/// gates: the projected input, (B, T, num_gates * hidden_size), without T in a step; valid: (B, T, 1),
/// false in the padding, where the state must not change, or undefined.
template <class Options>
struct Recurrence;

/// Fills `logit` with those of 1 - 1 / tau, the share of its state that a unit keeps which remembers
/// about tau steps. Tallec & Ollivier 2018, arXiv:1804.11188, section 3.
inline void fill_gate_bias(const GateBiasInit& init, Tensor logit) {
  if (init.steps) {
    logit.uniform_(init.steps->first, init.steps->second).sub_(1).log_();
  } else {
    logit.fill_(init.value);
  }
}

inline std::string shape_of(const Tensor& x) {
  return x.defined() ? shape_text(x.sym_sizes()) : "none (it is undefined)";
}

inline void check_lengths(
    const char* name, const Tensor& lengths, int64_t batch_size, int64_t num_steps) {
  TORCH_CHECK_VALUE(
      lengths.dim() == 1 && lengths.size(0) == batch_size, name, ": lengths has shape ",
      shape_of(lengths), ", expected (B=", batch_size, ")");
  TORCH_CHECK_TYPE(
      c10::isIntegralType(lengths.scalar_type(), /*includeBool=*/false), name,
      ": lengths has dtype ", dtype_text(lengths.scalar_type()), ", expected an integer");
  // Looking at the values of a tensor on a GPU would make the CPU wait for it.
  if (lengths.is_cpu() && batch_size > 0) {
    const int64_t low = lengths.min().item<int64_t>(), high = lengths.max().item<int64_t>();
    TORCH_CHECK_VALUE(
        low >= 0 && high <= num_steps, name, ": lengths has values from ", low, " to ", high,
        ", expected values from 0 to T=", num_steps);
  }
}

template <class Derived, class Options>
SequenceLayerImpl<Derived, Options>::SequenceLayerImpl(const Options& options) : options(options) {
  const char* name = Recurrence<Options>::name;
  for (const auto& [argument, value] :
       {std::pair("input_size", options.input_size()),
        {"hidden_size", options.hidden_size()},
        {"num_layers", options.num_layers()}}) {
    TORCH_CHECK_VALUE(value >= 1, name, ": ", argument, " is ", value, ", expected at least 1");
  }
  const double dropout = options.dropout();
  TORCH_CHECK_VALUE(
      0 <= dropout && dropout <= 1, name, ": dropout is ", dropout,
      ", expected a number in [0, 1]");
  if (dropout > 0 && options.num_layers() == 1) {
    TORCH_WARN(name, ": dropout is ", dropout, " with num_layers=1, but it acts between layers");
  }
  TORCH_CHECK_VALUE(
      options.activation() == "identity" || options.activation() == "g", name, ": activation is '",
      options.activation(), "', expected 'identity' or 'g'");
  if (options.gate_bias_init()) {
    TORCH_CHECK_VALUE(
        options.bias(), name, ": gate_bias_init is given, expected nullopt with bias=false");
    if (const auto& steps = options.gate_bias_init()->steps) {
      TORCH_CHECK_VALUE(
          1 < steps->first && steps->first <= steps->second, name, ": gate_bias_init is (",
          steps->first, ", ", steps->second, "), expected 1 < shortest <= longest");
    }
  }
  SequenceLayerImpl::reset();
}

template <class Derived, class Options>
void SequenceLayerImpl<Derived, Options>::reset() {
  weights_.clear();
  biases_.clear();
  const int64_t rows = Recurrence<Options>::num_gates * options.hidden_size();
  for (int64_t layer = 0; layer < options.num_layers(); ++layer) {
    const int64_t columns =
        layer == 0 ? options.input_size() : options.hidden_size() * num_directions();
    for (int64_t direction = 0; direction < num_directions(); ++direction) {
      const std::string suffix = c10::str("_l", layer, direction ? "_reverse" : "");
      weights_.push_back(
          this->register_parameter("weight_ih" + suffix, torch::empty({rows, columns})));
      if (options.bias()) {
        biases_.push_back(this->register_parameter("bias_ih" + suffix, torch::empty({rows})));
      }
    }
  }
  reset_parameters();
}

template <class Derived, class Options>
void SequenceLayerImpl<Derived, Options>::reset_parameters() {
  const torch::NoGradGuard no_grad;
  const double bound = 1 / std::sqrt(double(options.hidden_size()));
  for (auto& parameter : this->parameters()) parameter.uniform_(-bound, bound);
  if (options.gate_bias_init()) {
    for (const Tensor& bias : biases_) {
      Recurrence<Options>::init_gate_bias(*options.gate_bias_init(), bias);
    }
  }
}

template <class Derived, class Options>
void SequenceLayerImpl<Derived, Options>::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "torch_ext::nn::" << Recurrence<Options>::name
         << "(input_size=" << options.input_size() << ", hidden_size=" << options.hidden_size()
         << ", num_layers=" << options.num_layers() << ", bias=" << options.bias()
         << ", batch_first=" << options.batch_first() << ", dropout=" << options.dropout()
         << ", bidirectional=" << options.bidirectional()
         << ", activation=" << options.activation();
  if constexpr (requires { options.normalize(); }) {
    stream << ", normalize=" << options.normalize();
  }
  stream << ")";
}

template <class Derived, class Options>
Tensor SequenceLayerImpl<Derived, Options>::init_state(int64_t batch_size) const {
  const Tensor& weight = weights_[0];
  const auto dtype = weight.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  return torch::zeros(
      {options.num_layers() * num_directions(), batch_size, options.hidden_size()},
      weight.options().dtype(dtype).requires_grad(false));
}

template <class Derived, class Options>
std::tuple<Tensor, Tensor> SequenceLayerImpl<Derived, Options>::forward(
    const Tensor& input, const Tensor& initial_state, const Tensor& lengths) {
  const char* name = Recurrence<Options>::name;
  Tensor x = input, state = initial_state;
  check_dtype(x);
  TORCH_CHECK_VALUE(
      (x.dim() == 2 || x.dim() == 3) && x.size(-1) == options.input_size(), name, ": x has shape ",
      shape_of(x), ", expected ", options.batch_first() ? "(B, T, " : "(T, B, ",
      "input_size=", options.input_size(), "), or (T, input_size=", options.input_size(),
      ") without a batch");
  const bool batched = x.dim() == 3;
  if (!batched) {
    x = x.unsqueeze(0);
  } else if (!options.batch_first()) {
    x = x.transpose(0, 1).contiguous(); // a strided x would cost the projection more
  }

  const int64_t batch_size = x.size(0), num_steps = x.size(1);
  if (!state.defined()) {
    state = init_state(batch_size);
  } else {
    if (!batched) {
      TORCH_CHECK_VALUE(
          state.dim() == 2, name, ": state has shape ", shape_of(state),
          ", expected (num_layers * num_directions, hidden_size) since x has no batch");
      state = state.unsqueeze(1);
    }
    check_state(state, batch_size);
  }

  Tensor valid;
  if (lengths.defined()) {
    TORCH_CHECK_VALUE(batched, name, ": lengths is given, expected none without a batch");
    check_lengths(name, lengths, batch_size, num_steps);
    const Tensor steps = torch::arange(num_steps, x.options().dtype(torch::kLong));
    valid = (steps < lengths.to(x.device()).unsqueeze(1)).unsqueeze(2);
    x = torch::where(valid, x, 0.0); // else NaN in the padding reaches the weights' gradients
  }

  std::vector<Tensor> final_states;
  for (int64_t layer = 0; layer < options.num_layers(); ++layer) {
    std::vector<Tensor> outputs;
    for (int64_t direction = 0; direction < num_directions(); ++direction) {
      auto [y, final_state] = Recurrence<Options>::run(
          options, project(x, layer, direction), state[layer * num_directions() + direction], valid,
          direction == 1);
      outputs.push_back(y);
      final_states.push_back(final_state);
    }
    x = options.bidirectional() ? torch::cat(outputs, -1) : outputs[0];
    if (valid.defined()) x = torch::where(valid, x, 0.0);
    if (layer < options.num_layers() - 1) {
      x = torch::dropout(x, options.dropout(), this->is_training());
    }
  }
  state = torch::stack(final_states);
  if (!batched) return {x.squeeze(0), state.squeeze(1)};
  return {options.batch_first() ? x : x.transpose(0, 1), state};
}

template <class Derived, class Options>
std::tuple<Tensor, Tensor> SequenceLayerImpl<Derived, Options>::step(
    const Tensor& input, const Tensor& state) {
  const char* name = Recurrence<Options>::name;
  TORCH_CHECK(
      !options.bidirectional(), name, ".step: bidirectional is true, expected false: ",
      "the second direction begins at a sequence's end");
  check_dtype(input);
  TORCH_CHECK_VALUE(
      input.dim() == 2 && input.size(1) == options.input_size(), name, ".step: x has shape ",
      shape_of(input), ", expected (B, input_size=", options.input_size(), ")");
  check_state(state, input.size(0));
  Tensor x = input;
  std::vector<Tensor> new_states;
  for (int64_t layer = 0; layer < options.num_layers(); ++layer) {
    auto [y, new_state] = Recurrence<Options>::step(options, project(x, layer, 0), state[layer]);
    new_states.push_back(new_state);
    x = y;
    if (layer < options.num_layers() - 1) {
      x = torch::dropout(x, options.dropout(), this->is_training());
    }
  }
  return {x, torch::stack(new_states)};
}

template <class Derived, class Options>
Tensor SequenceLayerImpl<Derived, Options>::project(
    const Tensor& x, int64_t layer, int64_t direction) const {
  const size_t at = size_t(layer * num_directions() + direction);
  return torch::linear(x, weights_[at], options.bias() ? biases_[at] : Tensor());
}

template <class Derived, class Options>
void SequenceLayerImpl<Derived, Options>::check_state(
    const Tensor& state, int64_t batch_size) const {
  const char* name = Recurrence<Options>::name;
  const int64_t rows = options.num_layers() * num_directions();
  TORCH_CHECK_VALUE(
      state.defined() &&
          state.sizes() == torch::IntArrayRef({rows, batch_size, options.hidden_size()}),
      name, ": state has shape ", shape_of(state), ", expected (num_layers * num_directions=", rows,
      ", B=", batch_size, ", hidden_size=", options.hidden_size(), ")");
}

template <class Derived, class Options>
void SequenceLayerImpl<Derived, Options>::check_dtype(const Tensor& x) const {
  const char* name = Recurrence<Options>::name;
  TORCH_CHECK_VALUE(x.defined(), name, ": x is undefined, expected a tensor");
  const auto dtype = weights_[0].scalar_type();
  TORCH_CHECK_TYPE(
      x.scalar_type() == dtype || at::autocast::is_autocast_enabled(x.device().type()), name,
      ": x has dtype ", dtype_text(x.scalar_type()), ", expected ", dtype_text(dtype),
      ", that of the parameters");
}

} // namespace torch_ext::nn::detail
