// The choice of a token, which language models share.
#pragma once
#include <torch/types.h>

#include <algorithm>
#include <limits>
#include <optional>

namespace torch_ext::nn::detail {

/// One token (B) from logits (B, vocab_size), see torch_ext::nn::MambaLM::generate.
inline torch::Tensor sample(
    torch::Tensor logits, double temperature, std::optional<int64_t> top_k,
    std::optional<double> top_p) {
  if (temperature == 0) return logits.argmax(-1);
  logits = logits.to(torch::kFloat) / temperature;
  if (top_k) {
    const torch::Tensor best = std::get<0>(logits.topk(std::min(*top_k, logits.size(-1))));
    logits = logits.masked_fill(
        logits < best.narrow(-1, best.size(-1) - 1, 1), -std::numeric_limits<double>::infinity());
  }
  torch::Tensor p = torch::softmax(logits, -1);
  if (top_p) {
    const auto [ordered, places] = p.sort(-1, /*descending=*/true);
    // The probability of all that are more likely.
    const torch::Tensor before = ordered.cumsum(-1) - ordered;
    p = torch::zeros_like(p).scatter(-1, places, ordered.masked_fill(before >= *top_p, 0.0));
  }
  return torch::multinomial(p, 1).squeeze(1);
}

} // namespace torch_ext::nn::detail
