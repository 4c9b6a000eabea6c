// Trains torch_ext::nn::MinGRU in C++, from nothing, on the adding problem of Hochreiter and
// Schmidhuber (1997): of a sequence of random numbers two are marked, and the answer is their sum.
// Only a network that remembers both over the whole sequence can do better than a mean squared error
// of 1/6, which it gets by always answering 1.
#include <torch/torch.h>
#include <torch_ext/nn.h>

#include <cmath>
#include <numbers>

#include "example.h"

namespace {

constexpr const char* kUsage =
    "usage: train_min_gru [STEPS [WEIGHTS.pt]]\n"
    "\n"
    "  STEPS       of training (default 600)\n"
    "  WEIGHTS.pt  where to save the weights (default: nowhere). In Python:\n"
    "              dict(torch.jit.load(\"WEIGHTS.pt\").named_parameters())\n";

constexpr int64_t kBatch = 64, kLength = 100;

// x (B, T, 2): a number in [0, 1) and whether it is marked; target (B,): the sum of the marked ones.
std::pair<torch::Tensor, torch::Tensor> adding_problem() {
  const torch::Tensor numbers = torch::rand({kBatch, kLength});
  const torch::Tensor marks = torch::zeros({kBatch, kLength});
  const int64_t half = kLength / 2; // one mark in each half
  marks.scatter_(1, torch::randint(half, {kBatch, 1}), 1.0);
  marks.scatter_(1, torch::randint(half, kLength, {kBatch, 1}), 1.0);
  return {torch::stack({numbers, marks}, 2), (numbers * marks).sum(1)};
}

struct AdderImpl : torch::nn::Module {
  torch_ext::nn::MinGRU rnn{torch_ext::nn::MinGRUOptions(2, 64)
                                .num_layers(2) // one layer cannot: its gate does not see the state
                                .batch_first(true)
                                .gate_bias_init(torch_ext::nn::GateBiasInit(2, kLength))};
  torch::nn::Linear head{64, 1};

  AdderImpl() {
    register_module("rnn", rnn);
    register_module("head", head);
  }
  torch::Tensor forward(const torch::Tensor& x) {
    const auto [y, state] = rnn->forward(x);
    return head->forward(state[-1]).squeeze(1); // the last layer's state has seen everything
  }
};
TORCH_MODULE(Adder);

double error_of(Adder& model) {
  const torch::NoGradGuard no_gradients;
  const auto [x, target] = adding_problem();
  return torch::mse_loss(model->forward(x), target).item<double>();
}

void train_min_gru(const std::vector<std::string>& arguments) {
  if (arguments.size() > 2) throw UserError(kUsage);
  const int64_t steps = arguments.empty() ? 600 : positive_number(arguments[0], "STEPS");
  torch::manual_seed(0);
  Adder model;
  int64_t count = 0;
  for (const torch::Tensor& parameter : model->parameters()) count += parameter.numel();
  std::printf(
      "MinGRU with %lld parameters learns to add two numbers among %lld\n"
      "(mean squared error of always answering 1: %.4f)\n\n",
      static_cast<long long>(count), static_cast<long long>(kLength), 1. / 6);

  torch::optim::AdamW optimizer(
      model->parameters(), torch::optim::AdamWOptions(1e-2).weight_decay(0));
  auto& options = static_cast<torch::optim::AdamWOptions&>(optimizer.param_groups()[0].options());
  std::printf("%8s %12s %14s\n", "step", "error", "sequences/s");
  const int64_t report = std::max<int64_t>(steps / 12, 1);
  const Stopwatch watch;
  double sum = 0, first = 0, last = 0;
  int64_t summed = 0;
  for (int64_t step = 1; step <= steps; ++step) {
    const double progress = double(step) / double(steps);
    options.lr(1e-2 * 0.5 * (1 + std::cos(std::numbers::pi * progress)));
    const auto [x, target] = adding_problem();
    optimizer.zero_grad();
    const torch::Tensor loss = torch::mse_loss(model->forward(x), target);
    loss.backward();
    torch::nn::utils::clip_grad_norm_(model->parameters(), 1.0);
    optimizer.step();
    sum += loss.item<double>();
    ++summed;
    if (step % report == 0 || step == steps) {
      last = sum / double(summed);
      if (first == 0) first = last;
      const double rate = double(step * kBatch) / watch.seconds();
      std::printf("%8lld %12.5f %14.0f\n", static_cast<long long>(step), last, rate);
      std::fflush(stdout);
      sum = 0;
      summed = 0;
    }
  }
  const double error = error_of(model);
  std::printf("\nerror on new sequences: %.5f\n", error);
  if (steps > 1 && !(last < first)) throw UserError("the error has not fallen");

  if (arguments.size() > 1) {
    torch::save(model, arguments[1]);
    Adder read;
    torch_ext::nn::load_state_dict(read, arguments[1]);
    const auto [x, target] = adding_problem();
    if (!torch::equal(read->forward(x), model->forward(x))) {
      throw UserError("the weights read back from " + arguments[1] + " are others");
    }
    std::printf("saved to %s and read back\n", arguments[1].c_str());
  }
}

} // namespace

int main(int argc, char** argv) { return run_program(argc, argv, kUsage, train_min_gru); }
