// The C++ half of parity.py: builds the module that a name stands for, loads the weights that Python wrote, and compares
// with what the Python module answered. Called as: torch_ext_parity NAME FOLDER
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/torch.h>

#include <cstdio>
#include <fstream>
#include <functional>
#include <map>
#include <string>

#include "torch_ext/nn.h"

using torch::Tensor;
using namespace torch_ext::nn;

namespace {

StateDict answers; // what Python wrote: x, lengths, and the results by name
double worst = 0;

void compare(const std::string& name, const Tensor& got) {
  const Tensor& want = answers[name];
  TORCH_CHECK(
      got.sizes() == want.sizes() && got.scalar_type() == want.scalar_type(), name, " is ",
      got.toString(), " ", got.sizes(), ", in Python ", want.toString(), " ", want.sizes());
  const Tensor difference = (got - want).abs();
  worst = std::max(worst, difference.numel() ? difference.max().item<double>() : 0);
  TORCH_CHECK(
      torch::allclose(got, want, 1e-5, 1e-5), name, " differs by ",
      difference.max().item<double>());
}

// Loads from each kind of file that Python writes, into modules that begin differently.
template <class Module, class Options, class Check>
void run(const std::string& folder, const Options& options, const Check& check) {
  for (const char* file : {"/state_dict.pt", "/parameters.pt", "/script.pt"}) {
    Module module(options);
    module->eval();
    load_state_dict(module, folder + file);
    check(module);
  }
}

template <class Module, class Options>
void run_layer(const std::string& folder, const Options& options) {
  run<Module>(folder, options, [&](Module& module) {
    const Tensor& x = answers["x"];
    const auto [y, state] = module->forward(x);
    compare("y", y);
    compare("state", state);
    const auto [padded_y, padded_state] = module->forward(x, state, answers["lengths"]);
    compare("padded_y", padded_y);
    compare("padded_state", padded_state);
    if (answers.contains("step_y")) {
      const auto [step_y, step_state] = module->step(x[0], state);
      compare("step_y", step_y);
      compare("step_state", step_state);
    }
  });
}

void run_block(const std::string& folder, const MinRNNBlockOptions& options) {
  run<MinRNNBlock>(folder, options, [&](MinRNNBlock& module) {
    const Tensor& x = answers["x"];
    const auto [y, state] = module->forward(x);
    compare("y", y);
    compare("last_inputs", std::get<0>(state));
    compare("state", std::get<1>(state));
    const auto [more, more_state] = module->forward(x, state);
    compare("more", more);
    compare("step_y", std::get<0>(module->step(x.select(1, 0), more_state)));
  });
}

void run_lm(const std::string& folder, const MinRNNLMOptions& options) {
  run<MinRNNLM>(folder, options, [&](MinRNNLM& module) {
    const Tensor& ids = answers["x"];
    compare("y", module->forward(ids));
    const auto [logits, state] = module->prefill(ids);
    compare("last_inputs", std::get<0>(state));
    compare("state", std::get<1>(state));
    compare("step_y", std::get<0>(module->step(ids.select(1, 0), state)));
    compare("generated", module->generate(ids, 12, 0.0));
  });
}

void compare_initial(const torch::nn::Module& fresh) {
  for (const auto& each : fresh.named_parameters()) {
    compare("initial." + each.key(), each.value());
  }
}

void run_mlstm(const std::string& folder, const MLSTMOptions& options) {
  torch::manual_seed(0); // as in Python: a new layer has the same values
  compare_initial(*MLSTM(options));
  run<MLSTM>(folder, options, [&](MLSTM& module) {
    const Tensor& x = answers["x"];
    const auto compare_state = [](const std::string& name, const MLSTMState& state) {
      compare(name + "_C", std::get<0>(state));
      compare(name + "_n", std::get<1>(state));
      compare(name + "_m", std::get<2>(state));
    };
    const auto [y, state] = module->forward(x);
    compare("y", y);
    compare_state("state", state);
    const auto [padded_y, padded_state] = module->forward(x, state, answers["lengths"]);
    compare("padded_y", padded_y);
    compare_state("padded_state", padded_state);
    if (!options.bidirectional()) {
      const auto [step_y, step_state] = module->step(x[0], state);
      compare("step_y", step_y);
      compare_state("step_state", step_state);
    }
  });
}

template <class Module, class Options>
void run_mamba(const std::string& folder, const Options& options) {
  torch::manual_seed(0); // as in Python: a new layer has the same values
  Module fresh(options);
  compare_initial(*fresh);
  run<Module>(folder, options, [&](Module& module) {
    const Tensor &x = answers["x"], &lengths = answers["lengths"];
    compare("y", module->forward(x));
    compare("right", module->forward(x, lengths));
    compare("left", module->forward(x, lengths, "left"));
    if constexpr (requires { options.bidirectional(); }) {
      if (options.bidirectional()) return;
    }
    const auto compare_both = [](const std::string& name, const auto& result) {
      const auto& [y, state] = result;
      compare(name + "_y", y);
      compare(name + "_conv", std::get<0>(state));
      compare(name + "_scan", std::get<1>(state));
    };
    compare_both("left", module->prefill(x, {}, lengths, "left"));
    const auto first = module->prefill(x);
    compare_both("first", first);
    compare_both("more", module->prefill(x, std::get<1>(first), lengths));
    compare_both("step", module->step(x.select(1, 0), std::get<1>(first)));
  });
}

void run_mamba_lm(const std::string& folder, const MambaLMOptions& options) {
  torch::manual_seed(0);
  compare_initial(*MambaLM(options));
  run<MambaLM>(folder, options, [&](MambaLM& module) {
    const Tensor &ids = answers["x"], &lengths = answers["lengths"];
    compare("y", module->forward(ids));
    compare("right", module->forward(ids, lengths));
    compare("left", module->forward(ids, lengths, "left"));
    const auto [more, state] = module->prefill(ids, std::get<1>(module->prefill(ids)), lengths);
    compare("more", more);
    compare("conv", std::get<0>(state[1]));
    compare("scan", std::get<1>(state[1]));
    compare("step", std::get<0>(module->step(ids.select(1, 0), state)));
    for (const std::string padding : {"right", "left"}) {
      compare("last_" + padding, std::get<0>(module->prefill(ids, {}, lengths, padding, true)));
      compare(
          "generated_" + padding,
          module->generate(ids, 12, 0.0, {}, {}, lengths.clamp_min(1), padding));
    }
  });
}

// The same names and options as in parity.py.
const std::map<std::string, std::function<void(const std::string& folder)>> kCases = {
    {"min_gru", [](auto& f) { run_layer<MinGRU>(f, MinGRUOptions(5, 7)); }},
    {"min_gru_deep",
     [](auto& f) {
       run_layer<MinGRU>(
           f, MinGRUOptions(5, 7).num_layers(3).bidirectional(true).activation("g").dropout(0.5));
     }},
    {"min_gru_no_bias", [](auto& f) { run_layer<MinGRU>(f, MinGRUOptions(5, 7).bias(false)); }},
    {"min_lstm", [](auto& f) { run_layer<MinLSTM>(f, MinLSTMOptions(5, 7).num_layers(2)); }},
    {"min_lstm_raw",
     [](auto& f) {
       run_layer<MinLSTM>(
           f, MinLSTMOptions(5, 7).bidirectional(true).activation("g").normalize(false));
     }},
    {"mlstm",
     [](auto& f) { run_mlstm(f, MLSTMOptions(5, 8).num_layers(2).num_heads(2).qk_size(6)); }},
    {"mlstm_raw",
     [](auto& f) {
       run_mlstm(
           f, MLSTMOptions(5, 8).bidirectional(true).num_heads(4).input_gate("sigmoid").normalize(
                  false));
     }},
    {"mlstm_options",
     [](auto& f) { run_mlstm(f, MLSTMOptions(5, 6).bias(false).input_gate("sigmoid").eps(0.1)); }},
    {"mlstm_memory",
     [](auto& f) {
       run_mlstm(
           f, MLSTMOptions(5, 6)
                  .num_heads(2)
                  .gate_bias_init(GateBiasInit(5, 100))
                  .input_gate_bias_init(-1));
     }},
    {"block", [](auto& f) { run_block(f, MinRNNBlockOptions(8)); }},
    {"block_lstm",
     [](auto& f) {
       run_block(
           f, MinRNNBlockOptions(8)
                  .layer("min_lstm")
                  .norm("rms_norm")
                  .conv_width(2)
                  .expansion(1.5)
                  .mlp_ratio(2)
                  .activation("g"));
     }},
    {"mamba", [](auto& f) { run_mamba<Mamba>(f, MambaOptions(20)); }},
    {"mamba_options",
     [](auto& f) {
       run_mamba<Mamba>(
           f, MambaOptions(20)
                  .d_state(5)
                  .d_conv(3)
                  .expand(1.5)
                  .dt_rank(4)
                  .dt_min(0.01)
                  .dt_max(0.2)
                  .dt_init("constant")
                  .dt_scale(0.5)
                  .dt_init_floor(0.05)
                  .conv_bias(false)
                  .bias(true));
     }},
    {"mamba_both", [](auto& f) { run_mamba<Mamba>(f, MambaOptions(20).bidirectional(true)); }},
    {"mamba2", [](auto& f) { run_mamba<Mamba2>(f, Mamba2Options(20).d_state(6).headdim(8)); }},
    {"mamba2_options",
     [](auto& f) {
       run_mamba<Mamba2>(
           f, Mamba2Options(20)
                  .d_state(5)
                  .d_conv(3)
                  .conv_init(0.2)
                  .expand(1.6)
                  .headdim(4)
                  .d_ssm(24)
                  .ngroups(2)
                  .A_init_range({2, 5})
                  .D_has_hdim(true)
                  .norm_before_gate(true)
                  .dt_min(0.01)
                  .dt_max(0.2)
                  .dt_init_floor(0.05)
                  .dt_limit({0.1, 0.6})
                  .bias(true)
                  .conv_bias(false)
                  .norm_eps(1e-3));
     }},
    {"mamba2_no_norm",
     [](auto& f) { run_mamba<Mamba2>(f, Mamba2Options(20).d_state(3).headdim(5).rmsnorm(false)); }},
    {"mambalm_2",
     [](auto& f) {
       const auto block = MambaBlockOptions(Mamba2Options(20).d_state(6).headdim(8)).norm_eps(1e-3);
       run_mamba_lm(f, MambaLMOptions(11, block, 2));
     }},
    {"mambalm", [](auto& f) { run_mamba_lm(f, MambaLMOptions(11, 20, 2)); }},
    {"mambalm_untied",
     [](auto& f) {
       const auto block = MambaBlockOptions(MambaOptions(20).d_state(5).bias(true))
                              .rms_norm(false)
                              .norm_eps(1e-3)
                              .residual_in_fp32(false);
       run_mamba_lm(
           f, MambaLMOptions(11, block, 3).tie_embeddings(false).pad_vocab_size_multiple(4));
     }},
    {"lm", [](auto& f) { run_lm(f, MinRNNLMOptions(11, 8, 2).layer("min_lstm")); }},
};

} // namespace

int main(int argc, char** argv) {
  try {
    TORCH_CHECK(argc == 3 && kCases.count(argv[1]), "usage: torch_ext_parity NAME FOLDER");
    const std::string folder = argv[2];
    answers = read_state_dict(folder + "/answers.pt");
    const torch::NoGradGuard no_grad;
    kCases.at(argv[1])(folder);
    std::printf("%s: largest difference %.1e\n", argv[1], worst);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s: %s\n", argc > 1 ? argv[1] : "", error.what_without_backtrace());
    return 1;
  }
}
