// Every operator and the Mamba layer in a program without Python: typed functions, a TorchScript module that is trained
// further and run in steps, an AOTInductor package, and the dispatcher. Prints one line for each that
// test_consumers.py looks for.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>
#include <torch/torch.h>
#include <torch_ext/ops.h>
#include <torch_ext/torch_ext.h>

#include <functional>
#include <iostream>
#include <string>
#include <tuple>
#include <vector>

using torch::Tensor;
using Outputs = std::tuple<Tensor, Tensor>;

namespace {

bool close(const Tensor& a, const Tensor& b) { return torch::allclose(a, b, 1e-4, 1e-5); }

// The gradient of the sum of squared gradients, of a function of one tensor.
Tensor twice(const std::function<Outputs(const Tensor&)>& f, const Tensor& x) {
  auto leaf = x.detach().requires_grad_();
  auto [h, final_state] = f(leaf);
  auto total = h.sin().sum() + final_state.pow(3).sum();
  auto first = torch::autograd::grad({total}, {leaf}, {}, true, true)[0];
  return torch::autograd::grad({first.square().sum()}, {leaf})[0];
}

Outputs loop(const Tensor& decay, const Tensor& drive, const Tensor& state) {
  std::vector<Tensor> out;
  auto h = state;
  for (int64_t t = 0; t < decay.size(1); ++t) {
    h = decay.select(1, t) * h + drive.select(1, t);
    out.push_back(h);
  }
  return {torch::stack(out, 1), h};
}

void check(
    const char* name, const std::function<Outputs(const Tensor&)>& f,
    const std::function<Outputs(const Tensor&)>& reference, const Tensor& x) {
  auto got = f(x), want = reference(x);
  TORCH_CHECK(close(std::get<0>(got), std::get<0>(want)), name, ": h");
  TORCH_CHECK(close(std::get<1>(got), std::get<1>(want)), name, ": final state");
  TORCH_CHECK(close(twice(f, x), twice(reference, x)), name, ": second derivative");
}

void functions() {
  auto options = torch::TensorOptions().dtype(torch::kFloat64);
  auto x = torch::randn({2, 5, 3}, options), c = torch::randn({2, 5, 3}, options);
  auto s = torch::randn({2, 3}, options);
  check(
      "linear_scan", [&](const Tensor& y) { return torch_ext::linear_scan(y, c, s); },
      [&](const Tensor& y) { return loop(y, c, s); }, x);
  check(
      "min_gru", [&](const Tensor& y) { return torch_ext::min_gru(y, c, s); },
      [&](const Tensor& y) { return loop(1 - y.sigmoid(), y.sigmoid() * c, s); }, x);
  check(
      "min_lstm",
      [&](const Tensor& y) { return torch_ext::min_lstm(y, c, y, s, "identity", false); },
      [&](const Tensor& y) { return loop(y.sigmoid(), c.sigmoid() * y, s); }, x);
  auto weight = torch::randn({3, 4}, options), before = torch::randn({2, 3, 3}, options);
  check(
      "causal_conv1d",
      [&](const Tensor& y) { return torch_ext::causal_conv1d(y, weight, {}, before, "silu"); },
      [&](const Tensor& y) {
        auto seen = torch::cat({before, y.transpose(1, 2)}, -1);
        auto sum = torch::zeros_like(y);
        for (int64_t k = 0; k < 4; ++k)
          sum = sum + weight.select(1, k) * seen.narrow(2, k, 5).transpose(1, 2);
        return Outputs{torch::silu(sum), seen.narrow(2, 5, 3)};
      },
      x);

  // Defaults, packed sequences and the other direction.
  auto row = torch::randn({1, 5, 3}, options), states = torch::randn({2, 3}, options);
  auto cu = torch::tensor({0, 2, 5}, torch::kInt64);
  auto packed = std::get<0>(torch_ext::min_gru(row, row, states, "g", cu, true));
  auto part = std::get<0>(torch_ext::min_gru(
      row.narrow(1, 2, 3), row.narrow(1, 2, 3), states.narrow(0, 1, 1), "g", {}, true));
  TORCH_CHECK(close(packed.narrow(1, 2, 3), part), "packed");
  TORCH_CHECK(
      close(
          std::get<0>(torch_ext::min_lstm(row, row, row)),
          std::get<0>(torch_ext::min_lstm(row, row, row, {}, "identity", true))),
      "defaults");

  // Streaming with the state overwritten.
  auto h = std::get<0>(torch_ext::min_gru(x, c, s));
  auto state = s.clone();
  for (int64_t t = 0; t < 5; ++t) {
    auto ht = torch_ext::min_gru_step_(x.select(1, t), c.select(1, t), state);
    TORCH_CHECK(close(ht, h.select(1, t)) && close(state, ht), "step");
  }
  auto [ht, next] = torch_ext::linear_scan_step(x.select(1, 0), c.select(1, 0), s);
  TORCH_CHECK(close(next, x.select(1, 0) * s + c.select(1, 0)), "functional step");
  std::cout << "functions ok\n";
}

void dispatcher() {
  for (std::string name : {"linear_scan", "min_gru", "min_lstm"})
    for (std::string tail : {"", "_backward", "_step", "_step_"})
      c10::Dispatcher::singleton().findSchemaOrThrow(("torch_ext::" + name + tail).c_str(), "");
  try {
    torch_ext::min_gru(torch::ones({2, 3, 4}), torch::ones({2, 3, 5}));
    TORCH_CHECK(false, "a wrong shape was accepted");
  } catch (const c10::ValueError& error) {
    std::cout << error.what_without_backtrace() << "\n";
  }
  std::cout << "dispatcher ok, torch_ext " << torch_ext::version() << "\n";
}

void package(torch::jit::Module& module, const char* file) {
  torch::NoGradGuard off;
  torch::inductor::AOTIModelPackageLoader loader(file);
  for (int64_t T : {7, 20, 33}) {
    auto x = torch::randn({3, T, 4}), state = torch::randn({3, 4});
    auto got = loader.run({x, state});
    auto want = module.forward({x, state}).toTupleRef().elements();
    TORCH_CHECK(
        close(got[0], want[0].toTensor()) && close(got[1], want[1].toTensor()),
        "the package and the script module disagree");
  }
  std::cout << "package ok\n";
}

void train(torch::jit::Module& module) {
  std::vector<Tensor> parameters, before;
  for (const auto& p : module.parameters()) {
    parameters.push_back(p);
    before.push_back(p.detach().clone());
  }
  torch::optim::Adam adam(parameters, torch::optim::AdamOptions(1e-2));
  auto x = torch::randn({3, 20, 4}), state = torch::randn({3, 4});
  auto target = torch::cumsum(x, 1).tanh();
  double first = 0, last = 0;
  for (int i = 0; i < 200; ++i) {
    adam.zero_grad();
    auto y = module.forward({x, state}).toTupleRef().elements()[0].toTensor();
    auto loss = torch::mse_loss(y, target);
    loss.backward();
    adam.step();
    (i ? last : first) = loss.item<double>();
  }
  TORCH_CHECK(last < 0.5 * first, "did not learn: ", first, " to ", last);
  for (size_t i = 0; i < parameters.size(); ++i)
    TORCH_CHECK(!parameters[i].equal(before[i]), "parameter ", i, " has not changed");
  std::cout << "script ok, loss " << first << " to " << last << "\n";
}

// A Mamba layer by its exported methods: a chunk, then steps, are the sequence.
void steps(torch::jit::Module mamba) {
  torch::NoGradGuard off;
  auto x = torch::randn({2, 9, 4});
  auto want = mamba.forward({x}).toTensor();
  auto state = mamba.run_method("init_state", 2);
  auto chunk = mamba.run_method("prefill", x.slice(1, 0, 5), state);
  TORCH_CHECK(close(chunk.toTupleRef().elements()[0].toTensor(), want.slice(1, 0, 5)), "the chunk");
  state = chunk.toTupleRef().elements()[1];
  for (int64_t t = 5; t < 9; ++t) {
    auto result = mamba.run_method("step", x.select(1, t), state);
    TORCH_CHECK(close(result.toTupleRef().elements()[0].toTensor(), want.select(1, t)), "step ", t);
    state = result.toTupleRef().elements()[1];
  }
  std::cout << "steps ok\n";
}

} // namespace

int main(int argc, char** argv) {
  TORCH_CHECK(argc == 3, "usage: consumer everything.ts everything.pt2");
  torch::manual_seed(0);
  functions();
  dispatcher();
  auto module = torch::jit::load(argv[1]);
  package(module, argv[2]);
  train(module);
  steps(module.attr("mamba").toModule());
}
