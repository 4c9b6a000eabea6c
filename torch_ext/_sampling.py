"""Tokens drawn from logits: what the language models share."""

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token ``(B,)`` from logits ``(B, vocab_size)``."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = logits.masked_fill(logits < smallest, -float("inf"))
    p = torch.softmax(logits, -1)
    if top_p is not None:
        ordered, places = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the probability of all that are more likely
        p = torch.zeros_like(p).scatter(1, places, ordered.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(p, 1, generator=generator).squeeze(1)
