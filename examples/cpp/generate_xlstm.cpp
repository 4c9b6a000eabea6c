// Continues several prompts at once with an xLSTM language model. Prompts of different lengths are one batch, padded on the
// left: the model is told how long each is, and each goes on as it would alone.
//
// The model is one that examples/char_lm.py saves as TorchScript, of the layer xlstm, mamba or mamba2.
#include <algorithm>

#include "language_model.h"

namespace {

constexpr const char* kUsage =
    "usage: generate_xlstm MODEL.ts [TOKENS [PROMPT ...]]\n"
    "\n"
    "  MODEL.ts  what examples/char_lm.py --layer xlstm --save MODEL.ts has made\n"
    "  TOKENS    how many to write after each prompt (default 100)\n"
    "  PROMPT    what they follow (default: the names of three speakers)\n";

constexpr double kTemperature = 0.7; // low is careful, high is inventive
constexpr double kTopP = 0.95;       // of the most likely tokens, as many as have this probability
constexpr int64_t kCompared = 20;    // tokens that each prompt is continued by alone

torch::Tensor most_likely(const torch::Tensor& logits) { return logits.argmax(-1); }

torch::Tensor drawn(const torch::Tensor& logits) {
  const torch::Tensor p = torch::softmax(logits / kTemperature, -1);
  const auto [ordered, places] = p.sort(-1, /*descending=*/true);
  const torch::Tensor before = ordered.cumsum(-1) - ordered; // all that are more likely
  const torch::Tensor kept = ordered.masked_fill(before >= kTopP, 0.0);
  return places.gather(1, torch::multinomial(kept, 1)).squeeze(1);
}

// (B, count): what follows each of the prompts.
template <class Choose>
torch::Tensor generate(
    const LanguageModel& language, const std::vector<std::vector<int64_t>>& prompts, int64_t count,
    Choose choose) {
  size_t longest = 0;
  for (const auto& prompt : prompts) longest = std::max(longest, prompt.size());
  const int64_t rows = int64_t(prompts.size()), steps = int64_t(longest);
  torch::Tensor ids = torch::zeros({rows, steps}, torch::kLong),
                lengths = torch::zeros({rows}, torch::kLong);
  for (int64_t row = 0; row < rows; ++row) {
    const auto& prompt = prompts[size_t(row)];
    lengths[row] = int64_t(prompt.size());
    ids[row].slice(0, steps - int64_t(prompt.size())).copy_(torch::tensor(prompt));
  }
  torch::Tensor logits;
  torch::IValue state;
  const auto take = [&](const torch::IValue& result) {
    logits = result.toTupleRef().elements()[0].toTensor();
    state = result.toTupleRef().elements()[1];
  };
  take(language.module.get_method("prefill")(
      {ids, torch::IValue(), lengths, "left", /*last_only=*/true}));
  const auto step = language.module.get_method("step");
  std::vector<torch::Tensor> tokens;
  for (int64_t n = 0; n < count; ++n) {
    if (n > 0) take(step({tokens.back(), state}));
    tokens.push_back(choose(logits));
  }
  return torch::stack(tokens, 1);
}

void generate_xlstm(const std::vector<std::string>& arguments) {
  if (arguments.empty()) throw UserError(kUsage);
  const int64_t count = arguments.size() > 1 ? positive_number(arguments[1], "TOKENS") : 100;
  std::vector<std::string> texts(
      arguments.begin() + std::min<size_t>(arguments.size(), 2), arguments.end());
  if (texts.empty()) texts = {"First Citizen:\n", "KING:\n", "All:\n"};

  const torch::InferenceMode no_gradients;
  torch::set_num_threads(1); // the matrices of a few tokens are too small to be shared
  torch::manual_seed(0);
  const LanguageModel language(arguments[0]);
  std::vector<std::vector<int64_t>> prompts;
  for (const std::string& text : texts) prompts.push_back(language.numbers_of(text));

  const int64_t compared = std::min(count, kCompared);
  const torch::Tensor together = generate(language, prompts, compared, most_likely);
  int64_t differ = 0;
  for (size_t row = 0; row < prompts.size(); ++row) {
    const torch::Tensor alone = generate(language, {prompts[row]}, compared, most_likely);
    differ += !torch::equal(alone[0], together[int64_t(row)]);
  }
  std::printf(
      "%zu prompts together, and each alone: %lld differ\n", prompts.size(),
      static_cast<long long>(differ));
  if (differ > 0) throw UserError("padding has changed what follows");

  const Stopwatch watch;
  const torch::Tensor written = generate(language, prompts, count, drawn);
  const double seconds = watch.seconds();
  for (size_t row = 0; row < prompts.size(); ++row) {
    std::printf("\n---- %zu ----\n%s", row + 1, texts[row].c_str());
    for (int64_t n = 0; n < count; ++n) {
      const int64_t id = written[int64_t(row)][n].item<int64_t>();
      std::fputs(language.characters.at(size_t(id)).c_str(), stdout);
    }
    std::printf("\n");
  }
  std::printf(
      "\n%.0f tokens/s, %zu at a time\n", double(count) * double(prompts.size()) / seconds,
      prompts.size());
}

} // namespace

int main(int argc, char** argv) { return run_program(argc, argv, kUsage, generate_xlstm); }
