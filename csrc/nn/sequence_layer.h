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

using States = std::vector<Tensor>;                              // the tensors of a layer's state
using StateSizes = std::vector<std::pair<const char*, int64_t>>; // of one of them, behind B

/// What is specialised for each layer's Options:
///   static constexpr const char* name;
///   static void check(const Options&);                // what the layer alone has
///   static int64_t rows(const Options&);              // of weight_ih
///   static std::vector<StateSizes> state_sizes(const Options&);    // of each tensor of the state
///   static void init(const Options&, const Tensor& weight, const Tensor& bias); // after the uniform values; bias may be
/// undefined
///   static std::tuple<Tensor, States> run(            // the operator
///       const Options&, const Tensor& gates, const States& state, const Tensor& valid, bool reverse);
///   static std::tuple<Tensor, States> step(const Options&, const Tensor& gates, const States& state);
/// gates: the projected input, (B, T, rows), without T in a step; valid: (B, T, 1), false in the padding, where the state
/// must not change, or undefined.
template <class Options>
struct Recurrence;

// A state as its tensors, and back.
template <class State>
States tensors_of(const State& state) {
  if constexpr (std::is_same_v<State, Tensor>)
    return {state};
  else
    return std::apply([](const auto&... each) { return States{each...}; }, state);
}
template <class State>
State state_of(const States& all) {
  if constexpr (std::is_same_v<State, Tensor>)
    return all[0];
  else
    return [&]<size_t... I>(std::index_sequence<I...>) { return State(all[I]...); }
  (std::make_index_sequence<std::tuple_size_v<State>>());
}
template <class State>
std::optional<States> tensors_of_given(const Given<State>& state) {
  if constexpr (std::is_same_v<State, Tensor>)
    return state.defined() ? std::optional(States{state}) : std::nullopt;
  else
    return state ? std::optional(tensors_of(*state)) : std::nullopt;
}

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

template <class Derived, class Options, class State>
SequenceLayerImpl<Derived, Options, State>::SequenceLayerImpl(const Options& options)
    : options(options) {
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
  if constexpr (requires { options.activation(); }) {
    TORCH_CHECK_VALUE(
        options.activation() == "identity" || options.activation() == "g", name,
        ": activation is '", options.activation(), "', expected 'identity' or 'g'");
  }
  Recurrence<Options>::check(options);
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

template <class Derived, class Options, class State>
void SequenceLayerImpl<Derived, Options, State>::reset() {
  weights_.clear();
  biases_.clear();
  const int64_t rows = Recurrence<Options>::rows(options);
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

template <class Derived, class Options, class State>
void SequenceLayerImpl<Derived, Options, State>::reset_parameters() {
  const torch::NoGradGuard no_grad;
  const double bound = 1 / std::sqrt(double(options.hidden_size()));
  for (auto& parameter : this->parameters()) parameter.uniform_(-bound, bound);
  for (size_t i = 0; i < weights_.size(); ++i)
    Recurrence<Options>::init(options, weights_[i], options.bias() ? biases_[i] : Tensor());
}

template <class Derived, class Options, class State>
void SequenceLayerImpl<Derived, Options, State>::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "torch_ext::nn::" << Recurrence<Options>::name
         << "(input_size=" << options.input_size() << ", hidden_size=" << options.hidden_size()
         << ", num_layers=" << options.num_layers() << ", bias=" << options.bias()
         << ", batch_first=" << options.batch_first() << ", dropout=" << options.dropout()
         << ", bidirectional=" << options.bidirectional();
  if constexpr (requires { options.activation(); }) {
    stream << ", activation=" << options.activation();
  }
  if constexpr (requires { options.num_heads(); }) {
    stream << ", num_heads=" << options.num_heads()
           << ", qk_size=" << options.qk_size().value_or(options.hidden_size())
           << ", input_gate=" << options.input_gate() << ", eps=" << options.eps();
  }
  if constexpr (requires { options.normalize(); }) {
    stream << ", normalize=" << options.normalize();
  }
  stream << ")";
}

template <class Derived, class Options, class State>
State SequenceLayerImpl<Derived, Options, State>::init_state(int64_t batch_size) const {
  return state_of<State>(zeros(batch_size));
}

template <class Derived, class Options, class State>
States SequenceLayerImpl<Derived, Options, State>::zeros(int64_t batch_size) const {
  const Tensor& weight = weights_[0];
  const auto dtype = weight.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  States all;
  for (const StateSizes& sizes : Recurrence<Options>::state_sizes(options)) {
    std::vector<int64_t> shape{options.num_layers() * num_directions(), batch_size};
    for (const auto& [name, size] : sizes) shape.push_back(size);
    all.push_back(torch::zeros(shape, weight.options().dtype(dtype).requires_grad(false)));
  }
  return all;
}

template <class Derived, class Options, class State>
std::tuple<Tensor, State> SequenceLayerImpl<Derived, Options, State>::forward(
    const Tensor& input, const Given<State>& initial_state, const Tensor& lengths) {
  const char* name = Recurrence<Options>::name;
  Tensor x = input;
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
  const auto given = tensors_of_given<State>(initial_state);
  States state = given ? *given : zeros(batch_size);
  if (given) {
    const auto sizes = Recurrence<Options>::state_sizes(options);
    for (size_t i = 0; i < state.size() && !batched; ++i) {
      std::string names;
      for (const auto& [of, size] : sizes[i]) names += std::string(", ") + of;
      TORCH_CHECK_VALUE(
          state[i].defined() && state[i].dim() == int64_t(1 + sizes[i].size()), name,
          ": state has shape ", shape_of(state[i]), ", expected (num_layers * num_directions",
          names, ") since x has no batch");
      state[i] = state[i].unsqueeze(1);
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

  std::vector<States> final_states(state.size()); // of all layers and directions
  for (int64_t layer = 0; layer < options.num_layers(); ++layer) {
    std::vector<Tensor> outputs;
    for (int64_t direction = 0; direction < num_directions(); ++direction) {
      States of_this;
      for (const Tensor& each : state)
        of_this.push_back(each[layer * num_directions() + direction]);
      auto [y, final_state] = Recurrence<Options>::run(
          options, project(x, layer, direction), of_this, valid, direction == 1);
      outputs.push_back(y);
      for (size_t i = 0; i < state.size(); ++i) final_states[i].push_back(final_state[i]);
    }
    x = options.bidirectional() ? torch::cat(outputs, -1) : outputs[0];
    if (valid.defined()) x = torch::where(valid, x, 0.0);
    if (layer < options.num_layers() - 1) {
      x = torch::dropout(x, options.dropout(), this->is_training());
    }
  }
  for (size_t i = 0; i < state.size(); ++i) {
    state[i] = torch::stack(final_states[i]);
    if (!batched) state[i] = state[i].squeeze(1);
  }
  if (!batched) return {x.squeeze(0), state_of<State>(state)};
  return {options.batch_first() ? x : x.transpose(0, 1), state_of<State>(state)};
}

template <class Derived, class Options, class State>
std::tuple<Tensor, State> SequenceLayerImpl<Derived, Options, State>::step(
    const Tensor& input, const State& given) {
  const char* name = Recurrence<Options>::name;
  TORCH_CHECK(
      !options.bidirectional(), name, ".step: bidirectional is true, expected false: ",
      "the second direction begins at a sequence's end");
  check_dtype(input);
  TORCH_CHECK_VALUE(
      input.dim() == 2 && input.size(1) == options.input_size(), name, ".step: x has shape ",
      shape_of(input), ", expected (B, input_size=", options.input_size(), ")");
  const States state = tensors_of(given);
  check_state(state, input.size(0));
  Tensor x = input;
  std::vector<States> new_states(state.size()); // of all layers
  for (int64_t layer = 0; layer < options.num_layers(); ++layer) {
    States of_this;
    for (const Tensor& each : state) of_this.push_back(each[layer]);
    auto [y, new_state] = Recurrence<Options>::step(options, project(x, layer, 0), of_this);
    for (size_t i = 0; i < state.size(); ++i) new_states[i].push_back(new_state[i]);
    x = y;
    if (layer < options.num_layers() - 1) {
      x = torch::dropout(x, options.dropout(), this->is_training());
    }
  }
  States after;
  for (const States& each : new_states) after.push_back(torch::stack(each));
  return {x, state_of<State>(after)};
}

template <class Derived, class Options, class State>
Tensor SequenceLayerImpl<Derived, Options, State>::project(
    const Tensor& x, int64_t layer, int64_t direction) const {
  const size_t at = size_t(layer * num_directions() + direction);
  return torch::linear(x, weights_[at], options.bias() ? biases_[at] : Tensor());
}

template <class Derived, class Options, class State>
void SequenceLayerImpl<Derived, Options, State>::check_state(
    const States& state, int64_t batch_size) const {
  const char* name = Recurrence<Options>::name;
  const int64_t rows = options.num_layers() * num_directions();
  const auto sizes = Recurrence<Options>::state_sizes(options);
  for (size_t i = 0; i < state.size(); ++i) {
    std::vector<int64_t> shape{rows, batch_size};
    std::string text = c10::str("num_layers * num_directions=", rows, ", B=", batch_size);
    for (const auto& [of, size] : sizes[i]) {
      shape.push_back(size);
      text += c10::str(", ", of, "=", size);
    }
    TORCH_CHECK_VALUE(
        state[i].defined() && state[i].sizes() == torch::IntArrayRef(shape), name,
        ": state has shape ", shape_of(state[i]), ", expected (", text, ")");
  }
}

template <class Derived, class Options, class State>
void SequenceLayerImpl<Derived, Options, State>::check_dtype(const Tensor& x) const {
  const char* name = Recurrence<Options>::name;
  TORCH_CHECK_VALUE(x.defined(), name, ": x is undefined, expected a tensor");
  const auto dtype = weights_[0].scalar_type();
  TORCH_CHECK_TYPE(
      x.scalar_type() == dtype || at::autocast::is_autocast_enabled(x.device().type()), name,
      ": x has dtype ", dtype_text(x.scalar_type()), ", expected ", dtype_text(dtype),
      ", that of the parameters");
}

} // namespace torch_ext::nn::detail
