// MLSTM. The same in Python: torch_ext/mlstm.py.
#include <utility>
#include <vector>

#include "sequence_layer.h"
#include "torch_ext/ops.h"

namespace torch_ext::nn::detail {

template <>
struct Recurrence<MLSTMOptions> {
  static constexpr const char* name = "MLSTM";

  static int64_t qk_size(const MLSTMOptions& options) {
    return options.qk_size().value_or(options.hidden_size());
  }
  // Of q, k, v, i, f, o.
  static std::vector<int64_t> parts(const MLSTMOptions& options) {
    const int64_t keys = qk_size(options), values = options.hidden_size(),
                  heads = options.num_heads();
    return {keys, keys, values, heads, heads, values};
  }
  static int64_t rows(const MLSTMOptions& options) {
    return 2 * (qk_size(options) + options.hidden_size() + options.num_heads());
  }
  static std::vector<StateSizes> state_sizes(const MLSTMOptions& options) {
    const std::pair heads("num_heads", options.num_heads()),
        keys("K", qk_size(options) / options.num_heads()),
        values("V", options.hidden_size() / options.num_heads());
    return {{heads, keys, values}, {heads, keys}, {heads}};
  }

  static void check(const MLSTMOptions& options) {
    for (const auto& [argument, value] :
         {std::pair("num_heads", options.num_heads()), {"qk_size", qk_size(options)}})
      TORCH_CHECK_VALUE(value >= 1, name, ": ", argument, " is ", value, ", expected at least 1");
    for (const auto& [argument, value] :
         {std::pair("hidden_size", options.hidden_size()), {"qk_size", qk_size(options)}})
      TORCH_CHECK_VALUE(
          value % options.num_heads() == 0, name, ": ", argument, " is ", value,
          ", expected a multiple of num_heads=", options.num_heads());
    TORCH_CHECK_VALUE(
        options.input_gate() == "exp" || options.input_gate() == "sigmoid", name,
        ": input_gate is '", options.input_gate(), "', expected 'exp' or 'sigmoid'");
    TORCH_CHECK_VALUE(
        options.normalize() || options.input_gate() != "exp", name,
        ": normalize is false, expected true with input_gate 'exp'");
    TORCH_CHECK_VALUE(
        options.bias() || options.input_gate_bias_init() == 0, name, ": input_gate_bias_init is ",
        options.input_gate_bias_init(), ", expected 0 with bias=false");
  }
  static void init(const MLSTMOptions& options, const Tensor& weight, const Tensor& bias) {
    const auto of_weight = weight.split_with_sizes(parts(options));
    of_weight[3].zero_(), of_weight[4].zero_();
    if (!bias.defined()) return;
    const auto of_bias = bias.split_with_sizes(parts(options));
    of_bias[3].fill_(options.input_gate_bias_init());
    if (options.gate_bias_init())
      fill_gate_bias(*options.gate_bias_init(), of_bias[4]);
    else
      of_bias[4].copy_(torch::linspace(3, 6, options.num_heads(), bias.options()));
  }

  static Tensor heads(const MLSTMOptions& options, const Tensor& x) {
    return x.unflatten(-1, {options.num_heads(), -1});
  }
  static std::tuple<Tensor, States> finish(
      const std::tuple<Tensor, MLSTMState>& out, const Tensor& output_gate) {
    const auto& [h, state] = out;
    return {h.flatten(-2) * torch::sigmoid(output_gate), tensors_of(state)};
  }
  static std::tuple<Tensor, States> run(
      const MLSTMOptions& options, const Tensor& gates, const States& state, const Tensor& valid,
      bool reverse) {
    auto x = (valid.defined() ? torch::where(valid, gates, 0.0) : gates)
                 .split_with_sizes(parts(options), -1);
    if (valid.defined()) { // no input and nothing forgotten; float16 ends at 65504
      x[3] = torch::where(valid, x[3], -6e4);
      x[4] = torch::where(valid, x[4], 6e4);
    }
    return finish(
        mlstm(
            heads(options, x[0]), heads(options, x[1]), heads(options, x[2]), x[3], x[4],
            state_of<MLSTMState>(state), {}, options.eps(), options.input_gate(),
            options.normalize(), true, {}, reverse),
        x[5]);
  }
  static std::tuple<Tensor, States> step(
      const MLSTMOptions& options, const Tensor& gates, const States& state) {
    const auto x = gates.split_with_sizes(parts(options), -1);
    return finish(
        mlstm_step(
            heads(options, x[0]), heads(options, x[1]), heads(options, x[2]), x[3], x[4],
            state_of<MLSTMState>(state), {}, {}, options.eps(), options.input_gate(),
            options.normalize()),
        x[5]);
  }
};

template class SequenceLayerImpl<MLSTMImpl, MLSTMOptions, MLSTMState>;

} // namespace torch_ext::nn::detail
