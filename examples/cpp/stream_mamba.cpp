// Streams a Mamba language model, token by token, for as long as one likes, in constant memory: its state does not grow
// with what it has read and written.
//
// The model is one that examples/char_lm.py saves as TorchScript, of any layer.
#include <algorithm>

#include "language_model.h"

namespace {

constexpr const char* kUsage =
    "usage: stream_mamba MODEL.ts [TOKENS [PROMPT]]\n"
    "\n"
    "  MODEL.ts  what examples/char_lm.py --layer mamba --save MODEL.ts has made\n"
    "  TOKENS    how many to write (default 20000)\n"
    "  PROMPT    what they follow (default: a new line)\n";

constexpr int64_t kShown = 300;      // characters printed
constexpr double kTemperature = 0.7; // low is careful, high is inventive
constexpr double kAllowedGrowth = 4; // MiB between a warm program and its end

void stream_mamba(const std::vector<std::string>& arguments) {
  if (arguments.empty() || arguments.size() > 3) throw UserError(kUsage);
  const std::string path = arguments[0];
  const int64_t count = arguments.size() > 1 ? positive_number(arguments[1], "TOKENS") : 20000;
  const std::string prompt = arguments.size() > 2 ? arguments[2] : "\n";

  const torch::InferenceMode no_gradients;
  torch::set_num_threads(1); // the matrices of one token are too small to be shared
  torch::manual_seed(0);
  const LanguageModel language(path);
  const std::vector<int64_t> ids = language.numbers_of(prompt);
  const auto step = language.module.get_method("step");
  torch::IValue state;
  torch::Tensor logits;
  const auto take = [&](const torch::IValue& result) {
    logits = result.toTupleRef().elements()[0].toTensor();
    state = result.toTupleRef().elements()[1];
  };

  // The prompt in steps is the same as the prompt in one call.
  const torch::IValue empty = language.module.get_method("init_state")({int64_t(1)});
  state = empty;
  for (const int64_t id : ids) take(step({torch::tensor({id}), state}));
  const torch::Tensor in_steps = logits;
  take(language.module.get_method("prefill")({torch::tensor(ids).unsqueeze(0), empty}));
  logits = logits.select(1, -1);
  const double difference = (in_steps - logits).abs().max().item<double>();
  std::printf("largest difference between the prompt in steps and in one call: %.1e\n", difference);
  if (!(difference < 1e-2)) throw UserError("steps and one call disagree");

  std::printf("writing %lld tokens; the first of them:\n\n", static_cast<long long>(count));
  const int64_t report = std::max<int64_t>(count / 10, 1);
  std::string table;
  double warm = 0, warm_peak = 0, told = 0;
  const Stopwatch watch;
  for (int64_t token = 1; token <= count; ++token) {
    const torch::Tensor p = torch::softmax(logits / kTemperature, -1);
    const torch::Tensor id = torch::multinomial(p, 1).squeeze(1);
    if (token <= kShown)
      std::fputs(language.characters.at(size_t(id.item<int64_t>())).c_str(), stdout);
    take(step({id, state}));
    if (token % report == 0 || token == count) {
      const double now = watch.seconds();
      char row[80];
      std::snprintf(
          row, sizeof row, "%12lld %14.0f %14.1f %14.1f\n", static_cast<long long>(token),
          double((token - 1) % report + 1) / (now - told), resident_mib(), peak_mib());
      table += row;
      told = now;
      if (warm == 0) {
        warm = resident_mib();
        warm_peak = peak_mib();
      }
    }
  }
  std::printf(
      "\n\n%12s %14s %14s %14s\n%s", "token", "tokens/s", "resident MiB", "peak MiB",
      table.c_str());
  if (!logits.isfinite().all().item<bool>()) throw UserError("the logits are not finite");
  const double growth = std::max(resident_mib() - warm, peak_mib() - warm_peak);
  std::printf("memory grew by %.1f MiB over the last nine tenths\n", growth);
  if (growth > kAllowedGrowth) throw UserError("memory grows while streaming");
}

} // namespace

int main(int argc, char** argv) { return run_program(argc, argv, kUsage, stream_mamba); }
