"""A Mamba language model beside a transformer of equal size, xLSTMs beside the packages' code with
the same weights: tokens per second at a context."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measure import Effort, Samples, first_line, measure
from operators import TOLERANCES, WrongResult
from shapes import ModelSizes
from torch import nn
from torch.nn import functional as F

import torch_ext

Call = Callable[[], object]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor, cache: torch.Tensor, start: int) -> torch.Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, time, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        stop = start + time
        cache[0, :, :, start:stop] = k
        cache[1, :, :, start:stop] = v
        # A prompt starts the cache, and a token after it sees everything: no mask is needed.
        seen = F.scaled_dot_product_attention(
            q, cache[0, :, :, :stop], cache[1, :, :, :stop], is_causal=time > 1
        )
        x = x + self.out(seen.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    """A decoder with a key-value cache, written plainly; its weights are random.

    Kind to it: no position encoding, the cache is allocated once for all of the context.
    """

    def __init__(self, vocab: int, width: int, layers: int, heads: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def make_cache(self, batch: int, length: int) -> list[torch.Tensor]:
        """Keys and values of each block, (2, B, heads, length, width of a head)."""
        weight = self.embedding.weight
        heads = self.blocks[0].heads
        size = (2, batch, heads, length, weight.shape[1] // heads)
        return [torch.empty(size, dtype=weight.dtype) for _ in self.blocks]

    def forward(self, ids: torch.Tensor, cache: list[torch.Tensor], start: int = 0) -> torch.Tensor:
        """Logits after the last of `ids`, which is a prompt, or one token after `start` others."""
        if start and ids.shape[1] != 1:
            raise ValueError(
                f"Transformer: ids has {ids.shape[1]} tokens, expected 1 after a start"
            )
        x = self.embedding(ids)
        for block, kept in zip(self.blocks, cache, strict=True):
            x = block(x, kept, start)
        return F.linear(self.norm(x[:, -1]), self.embedding.weight)


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _check(mamba: nn.Module, transformer: Transformer, vocab: int, dtype: torch.dtype) -> float:
    """Token by token gives what a whole prompt gives: nothing else can tell that a cache is right."""
    ids = torch.randint(vocab, (1, 9), generator=torch.Generator().manual_seed(0))
    whole, _ = mamba.prefill(ids, last_only=True)
    logits, state = mamba.prefill(ids[:, :4], last_only=True)
    for t in range(4, 9):
        logits, state = mamba.step(ids[:, t], state)
    cache = transformer.make_cache(1, 9)
    expected = transformer(ids, cache)
    transformer(ids[:, :4], cache := transformer.make_cache(1, 9))
    for t in range(4, 9):
        got = transformer(ids[:, t : t + 1], cache, t)
    worst = 0.0
    tolerance = 1e-4 if dtype.itemsize >= 4 else TOLERANCES[dtype]
    for who, a, b in (("MambaLM", logits, whole), ("the transformer", got, expected)):
        error = ((a - b).float().norm() / b.float().norm()).item()
        if not error <= tolerance:
            raise WrongResult(
                f"{who}: token by token differs from the whole prompt by {error:.1e} of the norm "
                f"(accepted: {tolerance:.0e})"
            )
        worst = max(worst, error)
    return worst


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), None)


def _fill(cache: list[torch.Tensor]) -> None:
    """Random keys and values: drawn once, because gigabytes of them take long."""
    cache[0].normal_()
    for other in cache[1:]:
        other.copy_(cache[0])


def time_models(
    sizes: ModelSizes, dtype: torch.dtype, threads: int, effort: Effort, beside: bool
) -> Iterator[tuple[str, dict]]:
    """("models", a row) for either model, phase and context; ("not_run", what memory forbids)."""
    torch.manual_seed(0)
    mamba = torch_ext.MambaLM(sizes.vocab, sizes.width, sizes.layers, dtype=dtype).eval()
    peer = Transformer(sizes.vocab, sizes.width, sizes.layers // 2, sizes.heads).to(dtype).eval()
    named = {"MambaLM": mamba} | ({"transformer": peer} if beside else {})
    size = {who: parameters_of(model) for who, model in named.items()}
    with torch.inference_mode():
        error = _check(mamba, peer, sizes.vocab, dtype)

    def rows(samples: dict[str, Samples], phase: str, context: int, tokens: int) -> Iterator:
        for who, sample in samples.items():
            yield (
                "models",
                {
                    "who": who,
                    "phase": phase,
                    "context": context,
                    "parameters": size[who],
                    "width": sizes.width,
                    "dtype": str(dtype).removeprefix("torch."),
                    "threads": threads,
                    **sample.summary(),
                    "tokens_per_second": tokens / sample.best,
                    "error": error,
                },
            )

    for context in sizes.prefill:
        ids = torch.randint(sizes.vocab, (1, context))
        cache = peer.make_cache(1, context) if beside else []
        calls: dict[str, Call] = {"MambaLM": lambda ids=ids: mamba.prefill(ids, last_only=True)}
        if beside:
            calls["transformer"] = lambda ids=ids, cache=cache: peer(ids, cache)
        with torch.inference_mode():
            samples = measure(calls, effort)
        yield from rows(samples, "prefill", context, context)
        del cache, calls

    token = torch.randint(sizes.vocab, (1,))
    for context in sizes.decode:
        calls = {}
        state = [tuple(x.normal_(std=0.1) for x in pair) for pair in mamba.init_state(1)]
        calls["MambaLM"] = lambda state=state: mamba.step(token, state)
        needed = 2 * len(peer.blocks) * (context + 1) * sizes.width * dtype.itemsize
        available = _available_bytes()
        if beside and available is not None and needed > 0.8 * available:
            reason = f"a cache of {needed / 2**30:.1f} GiB does not fit into memory"
            yield (
                "not_run",
                {"peer": "transformer", "what": f"decode after {context} tokens", "reason": reason},
            )
        elif beside:
            cache = peer.make_cache(1, context + 1)
            _fill(cache)
            calls["transformer"] = lambda cache=cache, context=context: peer(
                token[None], cache, context
            )
        with torch.inference_mode():
            samples = measure(calls, effort)
        yield from rows(samples, "decode", context, 1)
        cache = calls = None


# -- xLSTM -----------------------------------------------------------------------------------------


class _Ours:
    """A model as it is timed: a prompt's logits, and a token after it."""

    def __init__(self, model: nn.Module):
        self.model = model

    def prefill(self, ids: torch.Tensor) -> tuple[torch.Tensor, object]:
        return self.model.prefill(ids)

    def step(self, ids: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
        logits, state = self.model.step(ids[:, 0], state)
        return logits[:, None], state


class _Transformers(_Ours):
    def prefill(self, ids: torch.Tensor) -> tuple[torch.Tensor, object]:
        return self.step(ids, None)

    def step(self, ids: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
        out = self.model(ids, cache_params=state, use_cache=True)
        return out.logits, out.cache_params


class _Package(_Ours):
    """The package xlstm reads a prompt in parallel without keeping a state, and goes step by step
    where it wants one."""

    def prefill(self, ids: torch.Tensor) -> tuple[torch.Tensor, object]:
        return self.model(ids), None

    def step(self, ids: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
        return self.model.step(ids, state)


def _transformers_twin(ours: nn.Module, dtype: torch.dtype) -> _Ours:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        model = transformers.xLSTMForCausalLM.from_pretrained(folder, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    for module in model.modules():  # its kernels round to bfloat16 otherwise
        if hasattr(getattr(module, "config", None), "autocast_kernel_dtype"):
            module.config.autocast_kernel_dtype = name
    return _Transformers(model.eval())


def _package_twin(ours: nn.Module, sizes: ModelSizes, dtype: torch.dtype) -> _Ours:
    import xlstm

    config = xlstm.xLSTMLMModelConfig(
        mlstm_block=xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=sizes.heads)),
        num_blocks=sizes.layers, embedding_dim=sizes.width, vocab_size=sizes.vocab,
        context_length=max((*sizes.prefill, *sizes.decode)),
    )  # fmt: skip
    model = xlstm.xLSTMLMModel(config)
    model.load_state_dict(ours.state_dict())
    return _Package(model.to(dtype).eval())


def _logits_after(model: _Ours, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits after each of `ids`: those after a prompt, and token by token."""
    if isinstance(model, _Package):
        prompt = 0
        parts, state = [], None
    else:
        logits, state = model.prefill(ids[:, :prompt])
        parts = [logits]
    for t in range(prompt, ids.shape[1]):
        logits, state = model.step(ids[:, t : t + 1], state)
        parts.append(logits)
    return torch.cat(parts, 1)


def time_xlstm_models(
    sizes: ModelSizes, dtype: torch.dtype, threads: int, effort: Effort, names: list[str]
) -> Iterator[tuple[str, dict]]:
    """("xlstm_models", a row) for each model, phase and context; ("not_run", a peer and the reason);
    ("wrong", a peer whose logits differ). Every model makes the logits of all of a prompt."""
    torch.manual_seed(0)
    given = (sizes.vocab, sizes.width, sizes.layers, sizes.heads)
    tolerance = 1e-3 if dtype.itemsize >= 4 else 5e-2
    ids = torch.randint(sizes.vocab, (1, 9))
    for name, made, peer, make in (
        ("xLSTMLarge", torch_ext.xLSTMLarge, "transformers xlstm", _transformers_twin),
        ("xLSTMLM", torch_ext.xLSTMLM, "xlstm", _package_twin),
    ):
        # The peers' code in plain PyTorch fails where keys and values have different sizes.
        options = {"qk_dim_factor": 1.0} if name == "xLSTMLarge" else {}
        ours = made(*given, **options, dtype=dtype).eval()
        models = {name: _Ours(ours)}
        errors = {}
        with torch.inference_mode():
            expected = ours(ids)
        if peer in names:
            try:
                twin = make(ours, dtype) if peer != "xlstm" else make(ours, sizes, dtype)
                models[peer] = twin
            except Exception as error:  # what a peer does not support, in its own words
                about = {"peer": peer, "what": "a language model", "reason": first_line(error)}
                yield "not_run", about
        for who, model in list(models.items()):
            try:
                with torch.inference_mode():
                    got = _logits_after(model, ids, 4)
            except Exception as error:
                if model is models[name]:
                    raise
                del models[who]
                about = {"peer": who, "what": "a language model", "reason": first_line(error)}
                yield "not_run", about
                continue
            errors[who] = ((got - expected).float().norm() / expected.float().norm()).item()
            if not errors[who] <= tolerance:
                del models[who]
                what = f"{who}: logits differ by {errors[who]:.1e} of the norm"
                yield "wrong", {"what": f"{what} (accepted: {tolerance:.0e})", "threads": threads}
        for phase, contexts in (("prefill", sizes.prefill), ("decode", sizes.decode)):
            for context in contexts:
                prompt = torch.randint(sizes.vocab, (1, context))
                calls: dict[str, Call] = {}
                with torch.inference_mode():
                    for who, model in models.items():
                        if phase == "prefill":
                            calls[who] = lambda model=model, prompt=prompt: model.prefill(prompt)
                            continue
                        # What it costs does not depend on what the state holds.
                        start = None if isinstance(model, _Package) else model.prefill(ids)[1]
                        token = prompt[:, :1]
                        state = model.step(token, start)[1]
                        calls[who] = lambda model=model, token=token, state=state: model.step(
                            token, state
                        )
                    samples = measure(calls, effort)
                for who, sample in samples.items():
                    row = {
                        "who": who,
                        "phase": phase,
                        "context": context,
                        "parameters": parameters_of(models[who].model),
                        "width": sizes.width,
                        "dtype": str(dtype).removeprefix("torch."),
                        "threads": threads,
                        **sample.summary(),
                        "tokens_per_second": (context if phase == "prefill" else 1) / sample.best,
                        "error": errors[who],
                    }
                    yield "xlstm_models", row
