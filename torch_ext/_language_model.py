"""What the language models share: generation, and checks of tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._sampling import sample
from ._sequence_layer import is_compiling, shape_text


class LanguageModel(nn.Module):
    """A model with ``vocab_size``, ``prefill``, ``init_state`` and ``step``, see
    :class:`torch_ext.MambaLM`, that continues texts."""

    vocab_size: int

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        lengths: Tensor | None = None,
        padding: str = "right",
        prefill_chunk: int | None = None,
        generator: torch.Generator | None = None,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """Continues each sequence, one token at a time, in constant memory.

        Args:
            ids: the beginning of each sequence, ``(B, T)``, at least one token.
            max_new_tokens: how many tokens to append.
            temperature: divides the logits; 0 always takes the most likely token.
            top_k: draw from the ``top_k`` most likely tokens only.
            top_p: draw from the fewest most likely tokens that together have at least the
                probability ``top_p``, after ``temperature`` and ``top_k``.
            eos_token_id: the token, or tokens, that end a sequence. What follows in its row is
                ``pad_token_id``, and the result ends where the last row does.
            lengths: number of tokens of each row of padded ``ids``, at least 1, ``(B,)``. Every row
                is continued as it would be alone.
            padding: side on which the padding is, ``"right"`` or ``"left"``.
            prefill_chunk: how many tokens of ``ids`` are read at a time; all at once if omitted.
                Memory does not grow with the length of ``ids`` if it is given.
            generator: what draws. torch's default one if omitted.
            pad_token_id: see ``eos_token_id``, whose first it is if omitted.

        Returns:
            ``(B, T + n)`` with ``n <= max_new_tokens``: ``ids`` as it is, its padding included,
            then the new tokens.

        Notes:
            Records no gradient. :meth:`stream` has the tokens one by one.

        Example:
            >>> model = torch_ext.MambaLM(vocab_size=256, d_model=16, n_layer=2)
            >>> prompts = torch.tensor([list(b"Mamba is"), list(b"Why?    ")])
            >>> lengths = torch.tensor([8, 4])
            >>> model.generate(prompts, 4, temperature=0.8, top_p=0.9, lengths=lengths).shape
            torch.Size([2, 12])
        """
        new = self.stream(
            ids, max_new_tokens, temperature, top_k, top_p, eos_token_id, lengths, padding,
            prefill_chunk, generator, pad_token_id,
        )  # fmt: skip
        return torch.cat([ids, *(token.to(ids.dtype).unsqueeze(1) for token in new)], 1)

    def stream(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        lengths: Tensor | None = None,
        padding: str = "right",
        prefill_chunk: int | None = None,
        generator: torch.Generator | None = None,
        pad_token_id: int | None = None,
    ) -> Iterator[Tensor]:
        """The new tokens of :meth:`generate`, ``(B,)`` each, as soon as they are drawn.

        Example:
            >>> model = torch_ext.MambaLM(vocab_size=256, d_model=16, n_layer=2)
            >>> prompt = torch.tensor([list(b"Mamba is")])
            >>> len([token.item() for token in model.stream(prompt, 4)])
            4
        """
        name = f"{type(self).__name__}.generate"
        if ids.dim() != 2 or ids.shape[1] < 1:
            raise ValueError(
                f"{name}: ids has shape {shape_text(ids)}, expected (B, T) with T >= 1"
            )
        if max_new_tokens < 0:
            raise ValueError(f"{name}: max_new_tokens is {max_new_tokens}, expected at least 0")
        if not temperature >= 0:
            raise ValueError(f"{name}: temperature is {temperature}, expected at least 0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"{name}: top_k is {top_k}, expected at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"{name}: top_p is {top_p}, expected a number in (0, 1]")
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ValueError(f"{name}: prefill_chunk is {prefill_chunk}, expected at least 1")
        eos = [] if eos_token_id is None else eos_token_id
        eos = list(eos) if isinstance(eos, Sequence) else [int(eos)]
        pad = pad_token_id if pad_token_id is not None else eos[0] if eos else 0
        for argument, tokens in [("eos_token_id", eos), ("pad_token_id", [pad])]:
            if any(not 0 <= token < self.vocab_size for token in tokens):
                raise ValueError(
                    f"{name}: {argument} is {tokens}, expected 0 to vocab_size - 1 = "
                    f"{self.vocab_size - 1}"
                )
        if padding not in ("right", "left"):
            raise ValueError(f'{name}: padding is "{padding}", expected "right" or "left"')
        if lengths is not None:
            B, T = ids.shape
            if lengths.shape != (B,) or lengths.is_floating_point():
                raise ValueError(
                    f"{name}: lengths has shape {shape_text(lengths)} and dtype {lengths.dtype}, "
                    f"expected (B={B},) integers"
                )
            low, high = (int(lengths.min()), int(lengths.max())) if B > 0 else (1, 1)
            if low < 1 or high > T:
                raise ValueError(
                    f"{name}: lengths has values from {low} to {high}, expected 1 to T={T}"
                )
            lengths = lengths.to(ids.device, torch.int64)
            if padding == "left":  # chunks need the first tokens in the first columns
                ids = ids.gather(1, (torch.arange(T, device=ids.device) - lengths[:, None]) % T)
        choose = (temperature, top_k, top_p, generator)
        return self._stream(ids, max_new_tokens, choose, eos, pad, lengths, prefill_chunk)

    @torch.no_grad()  # around each step: the caller's code between them is not concerned
    def _stream(
        self,
        ids: Tensor,
        max_new_tokens: int,
        choose: tuple[float, int | None, float | None, torch.Generator | None],
        eos: list[int],
        pad: int,
        lengths: Tensor | None,
        prefill_chunk: int | None,
    ) -> Iterator[Tensor]:
        if max_new_tokens == 0:
            return
        logits, state = self._read(ids, lengths, prefill_chunk)
        ends = torch.tensor(eos, device=ids.device)
        done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for k in range(max_new_tokens):
            token = sample(logits[:, : self.vocab_size], *choose)
            if eos:
                token = torch.where(done, pad, token)
                done = done | torch.isin(token, ends)
            yield token
            if eos and bool(done.all()):
                return
            if k < max_new_tokens - 1:
                logits, state = self._step(token, state)

    def _read(self, ids: Tensor, lengths: Tensor | None, chunk: int | None) -> tuple[Tensor, Any]:
        """Logits ``(B, V)`` after each row's last token, and the state there."""
        T = ids.shape[1]
        if chunk is None or chunk >= T:
            return self.prefill(ids, None, lengths, last_only=True)
        state = self.init_state(ids.shape[0])
        last, rest = None, None
        for start in range(0, T, chunk):
            piece = ids[:, start : start + chunk]
            if lengths is not None:
                rest = (lengths - start).clamp(0, piece.shape[1])
            logits, state = self.prefill(piece, state, rest, last_only=True)
            if last is not None and rest is not None:  # rows can have ended before
                logits = torch.where((rest > 0)[:, None], logits, last)
            last = logits
        return last, state

    def _step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """``step``, where a subclass has given that name to another package's."""
        return self.step(ids, state)


@torch.jit.unused
def check_ids(name: str, ids: Tensor, rows: int) -> None:
    """Says more than the embedding would. On the CPU alone, as reading numbers waits for a GPU."""
    if not ids.is_cpu or ids.numel() == 0 or is_compiling():
        return
    try:
        low, high = int(ids.min()), int(ids.max())
    except RuntimeError:  # there are no numbers to read, as under vmap
        return
    if low < 0 or high >= rows:
        raise ValueError(f"{name}: ids has values from {low} to {high}, expected 0 to {rows - 1}")
