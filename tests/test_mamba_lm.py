"""MambaBlock and MambaLM: against the formula and transformers; prompts, streams, checkpoints."""

import copy
import io
import json
import math
import struct

import pytest
import torch
import torch.nn.functional as F
from cases import close
from test_mamba import formula

import torch_ext
from torch_ext import _checkpoint
from torch_ext._sampling import sample
from torch_ext.compat import _mamba_ssm_models as peer

V, C = 13, 8


def make(generator, dtype=torch.float64, **options):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    options = {"d_state": 3, "pad_vocab_size_multiple": 1} | options
    model = torch_ext.MambaLM(V, C, 2, **options)
    with torch.no_grad():  # logits that differ, biases and norms that do something
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("proj.bias"):
                p.add_(torch.randn(p.shape) / 4)
        model.backbone.embedding.weight.mul_(20)
    return model.to(dtype)


def tokens(generator, B=3, T=11):
    return torch.randint(V, (B, T), generator=generator)


def logits_by_formula(model, ids):
    """Block after block, in the parameters' dtype."""
    backbone = model.backbone

    def norm(layer, x):
        if not model.config["rms_norm"]:
            return F.layer_norm(x, (C,), layer.weight, layer.bias, 1e-5)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * layer.weight

    x = backbone.embedding.weight[ids]
    for layer in backbone.layers:
        x = x + formula(layer.mixer, norm(layer.norm, x))[0]
    return norm(backbone.norm_f, x) @ model.lm_head.weight.T


def equal_states(got, want, row=slice(None)):
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a, b, strict=True):
            close(x[row].detach(), y.detach())


# ---- the model ----
def test_parameters(seed):
    torch.manual_seed(seed)
    model = torch_ext.MambaLM(50, 64, 4, d_state=5, bias=True)
    mixer = {
        "in_proj.weight": (256, 64), "in_proj.bias": (256,), "conv1d.weight": (128, 1, 4),
        "conv1d.bias": (128,), "x_proj.weight": (14, 128), "dt_proj.weight": (128, 4),
        "dt_proj.bias": (128,), "A_log": (128, 5), "D": (128,), "out_proj.weight": (64, 128),
        "out_proj.bias": (64,),
    }  # fmt: skip
    want = {"backbone.embedding.weight": (56, 64), "backbone.norm_f.weight": (64,)}
    want["lm_head.weight"] = (56, 64)
    for i in range(4):
        want[f"backbone.layers.{i}.norm.weight"] = (64,)
        want |= {f"backbone.layers.{i}.mixer.{key}": shape for key, shape in mixer.items()}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == want
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert 0.018 < float(model.backbone.embedding.weight.detach().std()) < 0.022
    first = copy.deepcopy(model).requires_grad_(False).backbone.layers[0].mixer
    bound = 1 / math.sqrt(128) / math.sqrt(4)
    assert 0.95 * bound < float(first.out_proj.weight.abs().max()) <= bound
    assert (first.in_proj.bias == 0).all() and (first.out_proj.bias == 0).all()
    assert first.layer_idx == 0 and model.backbone.layers[0].mixer.A_log._no_weight_decay

    untied = torch_ext.MambaLM(50, 64, 1, rms_norm=False, tie_embeddings=False)
    assert untied.lm_head.weight is not untied.backbone.embedding.weight
    assert float(untied.lm_head.weight.detach().abs().max()) <= 1 / 8
    assert untied.backbone.norm_f.bias.shape == (64,)
    half = torch_ext.MambaLM(50, 64, 1, dtype=torch.bfloat16)
    wide = {n for n, p in half.named_parameters() if p.dtype is torch.float32}
    assert wide == {"backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.D"}


@pytest.mark.parametrize("tied", [True, False])
def test_reset_parameters(tied, seed):
    """On the meta device first, then somewhere: as if made there."""
    options = {"rms_norm": False, "bias": True, "tie_embeddings": tied}
    with torch.device("meta"):
        model = torch_ext.MambaLM(50, 16, 2, **options)
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    model.reset_parameters()
    twin = torch_ext.MambaLM(50, 16, 2, **options)
    torch.manual_seed(seed)
    twin.reset_parameters()
    for (name, got), want in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(got, want), name
    assert (model.lm_head.weight is model.backbone.embedding.weight) == tied


@pytest.mark.parametrize("options", [{}, {"rms_norm": False}, {"bias": True}], ids=str)
def test_formula(options, generator):
    model, ids = make(generator, **options), tokens(generator)
    want = logits_by_formula(model, ids)
    close(model(ids).detach(), want.detach())
    parameters = list(model.parameters())
    grads = torch.autograd.grad(model(ids).sin().sum(), parameters)
    wants = torch.autograd.grad(want.sin().sum(), parameters)
    for (name, _), g, w in zip(model.named_parameters(), grads, wants, strict=True):
        close(g, w, grad=True, name=name)


def test_chunks_and_steps(generator):
    model, ids = make(generator), tokens(generator)
    want, last = model.prefill(ids)
    torch.testing.assert_close(want, model(ids), rtol=0, atol=0)
    for cuts in ([0, 1, 2, 11], [0, 5, 5, 11]):
        state, pieces = model.init_state(3), []
        for i in range(len(cuts) - 1):
            logits, state = model.prefill(ids[:, cuts[i] : cuts[i + 1]], state)
            pieces.append(logits)
        close(torch.cat(pieces, 1).detach(), want.detach())
        equal_states(state, last)
    state = model.init_state(3)
    for t in range(11):
        logits, state = model.step(ids[:, t], state)
        close(logits.detach(), want[:, t].detach())
    equal_states(state, last)
    logits, state = model.prefill(ids.int(), last_only=True)
    close(logits.detach(), want[:, -1].detach())
    equal_states(state, last)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding(padding, generator):
    model, ids = make(generator, bias=True, rms_norm=False), tokens(generator, B=4)
    lengths = torch.tensor([11, 0, 2, 7])
    steps = torch.arange(11) if padding == "right" else 10 - torch.arange(11)
    valid = steps < lengths[:, None]
    padded = torch.where(valid, ids, -100)  # which nothing looks at
    logits, state = model.prefill(padded, None, lengths, padding)
    small = lengths.to(torch.uint8)
    last, last_state = model.prefill(padded, None, small, padding, last_only=True)
    torch.testing.assert_close(model(padded, lengths, padding), logits)
    assert (logits[~valid] == 0).all() and (last[1] == 0).all()
    equal_states(last_state, state)
    loss = 0
    for i, n in enumerate(lengths.tolist()):
        if n > 0:
            want, want_state = model.prefill(ids[i][valid[i]][None])
            close(logits[i][valid[i]].detach(), want[0].detach())
            close(last[i].detach(), want[0, -1].detach())
            equal_states(state, want_state, row=slice(i, i + 1))
            loss = loss + want.square().sum()
    parameters = list(model.parameters())
    wants = torch.autograd.grad(loss, parameters)
    for g, w in zip(torch.autograd.grad(logits.square().sum(), parameters), wants, strict=True):
        close(g, w, grad=True)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_block(padding, generator):
    """NaN in the padding, and gradients that do not see it."""
    torch.manual_seed(0)
    block = torch_ext.MambaBlock(C, d_state=3, bias=True).double()
    x = torch.randn(3, 9, C, generator=generator, dtype=torch.float64).requires_grad_()
    lengths = torch.tensor([9, 4, 1])
    steps = torch.arange(9) if padding == "right" else 8 - torch.arange(9)
    valid = steps < lengths[:, None]
    padded = torch.where(valid[..., None], x, torch.nan)
    y, state = block.prefill(padded, None, lengths, padding)
    torch.testing.assert_close(block(padded, lengths, padding), y)
    assert (y[~valid] == 0).all()
    loss = 0
    for i in range(3):
        row = x[i][valid[i]][None]
        want = row + block.mixer(F.rms_norm(row, (C,), block.norm.weight, 1e-5))
        close(y[i][valid[i]].detach(), want[0].detach())
        loss = loss + want.sin().sum()
    inputs = [x, *block.parameters()]
    wants = torch.autograd.grad(loss, inputs)
    for g, w in zip(torch.autograd.grad(y.sin().sum(), inputs), wants, strict=True):
        close(g, w, grad=True)
    both = torch_ext.MambaBlock(C, d_state=3, bidirectional=True).double()
    assert both(x).shape == x.shape
    with pytest.raises(RuntimeError, match="bidirectional"):
        both.prefill(x)


def test_residual_is_not_rounded(generator):
    x = torch.randn(2, 5, C, generator=generator).bfloat16()
    torch.manual_seed(0)
    block = torch_ext.MambaBlock(C, dtype=torch.bfloat16)
    y, state = block.prefill(x)
    assert y.dtype is torch.float32 and block(y).dtype is torch.float32
    assert block.step(x[:, 0], state)[0].dtype is torch.float32
    normed = F.rms_norm(x.float(), (C,), block.norm.weight.float(), 1e-5).bfloat16()
    torch.testing.assert_close(y, x.float() + block.mixer(normed).float(), rtol=0, atol=0)
    block.residual_in_fp32 = False
    assert block(x).dtype is torch.bfloat16
    # Many blocks: what each adds is far below bfloat16's resolution of the sum.
    small = torch_ext.MambaLM(V, C, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        small.backbone.embedding.weight.fill_(1)
        for layer in small.backbone.layers:
            layer.mixer.out_proj.weight.mul_(1e-3)
    hidden = []
    small.backbone.norm_f.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    small(tokens(generator))
    assert hidden[0].dtype is torch.float32
    assert (hidden[0] != 1).any() and ((hidden[0] - 1).abs() < 2**-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, generator):
    model, ids = make(generator), tokens(generator)
    want = model(ids)
    half = copy.deepcopy(model).to(dtype)
    got, state = half.prefill(ids)
    assert got.dtype is dtype and all(s.dtype is torch.float32 for pair in state for s in pair)
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.15)
    got, _ = half.step(ids[:, 0], half.init_state(3))
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), want[:, 0], rtol=0.05, atol=0.15)
    assert half.generate(ids, 3, 0.7, top_k=5).shape == (3, 14)
    half(ids).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        got, state = model.float().prefill(ids)
    assert got.dtype is torch.bfloat16
    assert all(s.dtype is torch.float32 for pair in state for s in pair)
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.15)


def test_learns_and_writes(seed):
    torch.manual_seed(seed)
    model = torch_ext.MambaLM(V, 16, 2, d_state=4)
    text = torch.randint(V, (1, 40))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(text[:, :-1])[0], text[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert torch.equal(model.generate(text[:, :8], 32, 0.0), text)


def test_activation_checkpointing(generator):
    model, ids = make(generator), tokens(generator)
    parameters, calls = list(model.parameters()), []
    lengths = torch.tensor([11, 3, 6])
    want = torch.autograd.grad(model(ids, lengths).sin().sum(), parameters)
    model.backbone.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.backbone.activation_checkpointing = True
    got = torch.autograd.grad(model(ids, lengths).sin().sum(), parameters)
    torch.testing.assert_close(got, want)
    assert len(calls) == 2  # and again in the backward
    with torch.no_grad():
        model(ids)
    assert len(calls) == 3
    assert torch_ext.MambaLM(
        V, C, 1, activation_checkpointing=True
    ).backbone.activation_checkpointing


# ---- generation ----
def naive(model, ids, n):
    """Greedy, the whole sequence again for each token."""
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1:, : model.vocab_size].argmax(-1)], 1)
    return ids


def test_generate(generator):
    model, ids = make(generator), tokens(generator)
    want = naive(model, ids, 6)
    assert torch.equal(model.generate(ids, 6, temperature=0.0), want)
    assert torch.equal(model.generate(ids, 0), ids)
    assert model.generate(ids.int(), 2, 0.0).dtype is torch.int32
    for chunk in (1, 4, 10, 11, 50):
        assert torch.equal(model.generate(ids, 6, 0.0, prefill_chunk=chunk), want)
    streamed = list(model.stream(ids, 6, 0.0))
    assert torch.equal(torch.stack(streamed, 1), want[:, 11:])
    # These leave one token to draw from.
    assert torch.equal(model.generate(ids, 6, 1.0, top_k=1), want)
    assert torch.equal(model.generate(ids, 6, 1.0, top_p=1e-6), want)
    assert torch.equal(model.generate(ids, 6, 1e-4), want)
    drawn = [model.generate(ids, 6, generator=torch.Generator().manual_seed(k)) for k in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("chunk", [None, 1, 3, 8])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_generate_from_padded_prompts(padding, chunk, generator):
    """Each row as alone."""
    model, ids = make(generator, bias=True), tokens(generator)
    lengths = torch.tensor([4, 11, 1])
    steps = torch.arange(11) if padding == "right" else 10 - torch.arange(11)
    valid = steps < lengths[:, None]
    padded = torch.where(valid, ids, -1)
    got = model.generate(padded, 5, 0.0, lengths=lengths, padding=padding, prefill_chunk=chunk)
    assert torch.equal(got[:, :11], padded)
    small = lengths.to(torch.uint8)
    again = model.generate(padded, 5, 0.0, lengths=small, padding=padding, prefill_chunk=chunk)
    assert torch.equal(again, got)
    for i, n in enumerate(lengths.tolist()):
        want = naive(model, ids[i][valid[i]][None], 5)
        assert torch.equal(got[i, 11:], want[0, n:])


def test_generate_ends_at_eos(generator):
    """The same draws with and without: each row is what it was, up to its end."""
    model, ids, eos = make(generator), tokens(generator, B=6), [3, 5]

    def draw(**options):
        again = torch.Generator().manual_seed(1)
        return model.generate(ids, 60, 8.0, generator=again, **options)[:, 11:]

    free = draw()
    met = torch.isin(free, torch.tensor(eos))
    ends = met.int().argmax(1)
    assert met.any(1).all() and len(set(ends.tolist())) > 2 and int(ends.max()) < 59
    for pad, options in ((3, {}), (7, {"pad_token_id": 7})):
        got = draw(eos_token_id=eos, **options)
        assert got.shape[1] == int(ends.max()) + 1
        for i, end in enumerate(ends.tolist()):
            assert torch.equal(got[i, : end + 1], free[i, : end + 1])
            assert (got[i, end + 1 :] == pad).all()
    first = int(model.generate(ids[:1], 1, 0.0)[0, -1])
    assert model.generate(ids[:1], 12, 0.0, eos_token_id=first).shape == (1, 12)


def test_padded_vocabulary_is_never_drawn(generator):
    model = make(generator, pad_vocab_size_multiple=16)
    ids = tokens(generator)
    with torch.no_grad():
        model.backbone.embedding.weight[V:] = 100 * model.backbone.embedding.weight[:3]
    assert model(ids).shape == (3, 11, 16)
    assert (model(ids).argmax(-1) >= V).any()
    assert torch.equal(model.generate(ids, 9, 0.0), naive(model, ids, 9))
    assert int(model.generate(ids, 9, 2.0).max()) < V


def test_sample(generator):
    """Frequencies of many draws, against the probabilities that the options leave."""
    p = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1])
    rows = p.log().expand(20000, -1)
    cold = p.square() / p.square().sum()
    for options, want in (
        ((1.0, None, None), p),
        ((0.5, None, None), cold),
        ((1.0, 2, None), torch.tensor([0, 4 / 7, 3 / 7, 0, 0])),
        ((1.0, 99, None), p),
        ((1.0, None, 0.75), torch.tensor([0, 0.4, 0.3, 0.15, 0]) / 0.85),
        ((1.0, None, 0.65), torch.tensor([0, 4 / 7, 3 / 7, 0, 0])),
        ((1.0, None, 1.0), p),
        ((1.0, 3, 0.5), torch.tensor([0, 4 / 7, 3 / 7, 0, 0])),  # 0.4 / 0.85 is below a half
        ((0.0, None, None), torch.tensor([0.0, 1, 0, 0, 0])),
    ):
        found = sample(rows, *options, generator).bincount(minlength=5) / 20000
        assert (found[want == 0] == 0).all(), options
        torch.testing.assert_close(found, want, rtol=0, atol=0.015, msg=str(options))


def test_stream_leaves_gradients_on(generator):
    """Between two tokens the caller trains."""
    model, ids = make(generator), tokens(generator)
    for token in model.stream(ids, 2):
        assert torch.is_grad_enabled() and not token.requires_grad
        model(ids).sum().backward()
    assert not model.generate(ids, 2).requires_grad


def test_prompt_in_chunks_takes_flat_memory(generator):
    """No tensor of a chunked prompt is longer than a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = make(generator, torch.float32)
    T, chunk, largest = 4000, 50, [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.is_floating_point():
                    largest[0] = max(largest[0], t.numel())
            return out

    ids = tokens(generator, 1, T)
    with Watch():
        got = list(model.stream(ids, 1, 0.0, prefill_chunk=chunk))
    assert largest[0] <= chunk * 2 * 2 * C
    assert torch.equal(got[0], model(ids)[:, -1].argmax(-1))


# ---- TorchScript, torch.compile, torch.export ----
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("rms_norm", [True, False])
def test_scripted(rms_norm, generator):
    model, ids = make(generator, rms_norm=rms_norm, bias=rms_norm), tokens(generator)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    lengths = torch.tensor([4, 0, 9])
    torch.testing.assert_close(scripted(ids), model(ids))
    torch.testing.assert_close(scripted(ids, lengths, "left"), model(ids, lengths, "left"))
    torch.testing.assert_close(
        scripted.prefill(ids, None, lengths, "right", True),
        model.prefill(ids, None, lengths, "right", True),
    )
    _, state = scripted.prefill(ids, scripted.init_state(3))
    torch.testing.assert_close(scripted.step(ids[:, 0], state), model.step(ids[:, 0], state))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled(checkpointing, generator):
    """No graph break, forward and training, and one compilation for every batch and length."""
    model = make(generator, torch.float32, activation_checkpointing=checkpointing)
    parameters = list(model.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, T in ((3, 11), (5, 9))[: 1 if checkpointing else 2]:
            ids = tokens(generator, B, T)
            got = torch.autograd.grad(compiled(ids).square().sum(), parameters)
            want = torch.autograd.grad(model(ids).square().sum(), parameters)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    if not checkpointing:
        ids, lengths = tokens(generator), torch.tensor([3, 11, 1])
        with torch.no_grad():
            for method, arguments in (
                ("prefill", (ids, None, lengths, "right", True)),
                ("step", (ids[:, 0], model.init_state(3))),
            ):
                run = torch.compile(getattr(model, method), fullgraph=True, backend="aot_eager")
                torch.testing.assert_close(run(*arguments), getattr(model, method)(*arguments))


@pytest.mark.slow
def test_exported(generator):
    model = make(generator, torch.float32)
    sizes = {0: torch.export.Dim("B", min=2), 1: torch.export.Dim("T", min=2)}
    program = torch.export.export(
        model, (tokens(generator),), dynamic_shapes={"ids": sizes}, strict=False
    )
    for B, T in ((3, 11), (5, 40)):
        ids = tokens(generator, B, T)
        torch.testing.assert_close(program.module()(ids), model(ids))


def test_gradients_of_each_sample(generator):
    """torch.func's vmap of grad, in which ids have no numbers to be checked."""
    model, ids = make(generator), tokens(generator)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row[None],)).sin().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)
    for i in range(3):
        for name, want in torch.func.grad(loss)(parameters, ids[i]).items():
            close(got[name][i], want, grad=True, name=name)


# ---- checkpoints ----
def describe(model):
    return {k: (v.dtype, v.clone()) for k, v in model.state_dict().items()}


def assert_same(got, want):
    got, want = describe(got), describe(want)
    assert list(got) == list(want)
    for key in want:
        assert got[key][0] is want[key][0], key
        assert torch.equal(got[key][1], want[key][1]), key


@pytest.mark.parametrize("layout", ["transformers", "mamba_ssm"])
@pytest.mark.parametrize(
    "options",
    [
        {"pad_vocab_size_multiple": 8},
        {"tie_embeddings": False, "bias": True, "conv_bias": False, "residual_in_fp32": False},
        {"d_conv": 3, "expand": 3, "dt_rank": 2, "dt_min": 0.01, "dt_init": "constant"},
    ],
    ids=str,
)
def test_save_and_load(layout, options, generator, tmp_path):
    model, ids = make(generator, torch.float32, **options), tokens(generator)
    model.save_pretrained(tmp_path / "a" / "b", layout)
    again = torch_ext.MambaLM.from_pretrained(tmp_path / "a" / "b")
    assert_same(again, model)
    assert again.vocab_size == V
    same = {k: v for k, v in model.config.items() if k != "pad_vocab_size_multiple"}
    assert {k: v for k, v in again.config.items() if k in same} == same
    assert (again.lm_head.weight is again.backbone.embedding.weight) == model.config[
        "tie_embeddings"
    ]
    mixer = again.backbone.layers[0].mixer
    assert mixer.A_log._no_weight_decay and mixer.dt_proj.bias._no_reinit
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0)

    half = torch_ext.MambaLM.from_pretrained(tmp_path / "a" / "b", dtype=torch.bfloat16)
    want = {torch.float32 if n.endswith(("A_log", "D")) else torch.bfloat16: n
            for n, _ in model.named_parameters()}  # fmt: skip
    for name, p in half.named_parameters():
        wide = name.endswith(("A_log", "mixer.D"))
        assert p.dtype is (torch.float32 if wide else torch.bfloat16), name
    assert len(want) == 2
    half.save_pretrained(tmp_path / "half", layout)
    assert_same(torch_ext.MambaLM.from_pretrained(tmp_path / "half"), half)
    # What is loaded does not hang on the file.
    with torch.no_grad():
        again.backbone.embedding.weight.zero_()
    assert_same(torch_ext.MambaLM.from_pretrained(tmp_path / "a" / "b"), model)


def test_layer_norm_needs_the_other_layout(generator, tmp_path):
    model = make(generator, torch.float32, rms_norm=False)
    with pytest.raises(ValueError, match='rms_norm is False.*layout="mamba_ssm"'):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, "mamba_ssm")
    assert_same(torch_ext.MambaLM.from_pretrained(tmp_path), model)
    wide = make(generator, norm_eps=1e-6)
    with pytest.raises(ValueError, match='norm_eps is 1e-06.*layout="transformers"'):
        wide.save_pretrained(tmp_path, "mamba_ssm")
    with pytest.raises(ValueError, match="expand is 1.5"):
        make(generator, expand=1.5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layout is 'onnx'"):
        model.save_pretrained(tmp_path, "onnx")


def test_layouts_on_disk(generator, tmp_path):
    """Names and numbers as the two packages expect them, read without our reader."""
    model = make(generator, torch.float32, pad_vocab_size_multiple=8)
    model.save_pretrained(tmp_path / "hf", extra={"eos_token_id": 3})
    raw = (tmp_path / "hf" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    names = {k.replace("embedding.", "embeddings.") for k in model.state_dict()} - {
        "lm_head.weight"
    }
    assert set(header) == names
    end = 0
    for entry in header.values():  # nothing between, nothing twice
        assert entry["dtype"] == "F32" and entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
    assert end == len(raw) - 8 - length
    at = header["backbone.layers.1.mixer.A_log"]
    found = torch.frombuffer(bytearray(raw[8 + length :]), dtype=torch.float32)
    found = found[at["data_offsets"][0] // 4 : at["data_offsets"][1] // 4].view(at["shape"])
    assert torch.equal(found, model.backbone.layers[1].mixer.A_log)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    some = {"model_type": "mamba", "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2}
    assert some.items() <= config.items() and config["eos_token_id"] == 3

    model.save_pretrained(tmp_path / "ssm", "mamba_ssm")
    config = json.loads((tmp_path / "ssm" / "config.json").read_text())
    assert vars(peer.MambaConfig(**config))["vocab_size"] == V
    assert config["ssm_cfg"] == {"layer": "Mamba1", "d_state": 3}
    saved = torch.load(tmp_path / "ssm" / "pytorch_model.bin", weights_only=True)
    assert set(saved) == set(model.state_dict())


def test_shards_and_old_files(generator, tmp_path):
    model = make(generator, torch.float32)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    (tmp_path / "model.safetensors").unlink()
    del state["lm_head.weight"]
    parts = {"part-1.safetensors": {}, "part-2.safetensors": {}}
    for k, (key, value) in enumerate(state.items()):
        parts[f"part-{k % 2 + 1}.safetensors"][key] = value
    index = {"weight_map": {key: file for file, part in parts.items() for key in part}}
    for file, part in parts.items():
        _checkpoint.write_safetensors(tmp_path / file, part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(torch_ext.MambaLM.from_pretrained(tmp_path), model)
    (tmp_path / "part-2.safetensors").rename(tmp_path / "part-3.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"part-2.safetensors, which model.safetensors.index"
    ):
        torch_ext.MambaLM.from_pretrained(tmp_path)
    index["weight_map"]["backbone.norm_f.weight"] = "../part-1.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="names '../part-1.safetensors', expected a file beside it"
    ):
        torch_ext.MambaLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    for part, zipped in (("a.bin", True), ("b.bin", False)):
        half = dict(list(state.items())[part == "b.bin" :: 2])
        torch.save(half, tmp_path / part, _use_new_zipfile_serialization=zipped)
        index["weight_map"].update(dict.fromkeys(half, part))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(torch_ext.MambaLM.from_pretrained(tmp_path), model)


def test_safetensors_both_ways(seed, tmp_path):
    """Our files in the package safetensors, its files in ours."""
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(seed)
    tensors = {
        "byte": torch.randint(255, (3,), dtype=torch.uint8),
        "half": torch.randn(2, 3).half(),
        "brain": torch.randn(5, 1, 2).bfloat16(),
        "transposed": torch.randn(3, 4).T,
        "double": torch.randn(4).double(),
        "integer": torch.randint(9, (2, 2)),
        "flags": torch.tensor([True, False]),
        "empty": torch.randn(0, 4),
        "scalar": torch.tensor(3.5),
    }
    _checkpoint.write_safetensors(tmp_path / "ours", tensors)
    safetensors.save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs")
    for found in (
        safetensors.load_file(tmp_path / "ours"),
        _checkpoint.Safetensors("test", tmp_path / "theirs"),
        _checkpoint.Safetensors("test", tmp_path / "ours"),
    ):
        assert set(found) == set(tensors) and len(found) == 9
        for key, want in tensors.items():
            assert found[key].dtype is want.dtype and found[key].shape == want.shape
            assert torch.equal(found[key], want), key


def test_unaligned_safetensors(tmp_path):
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                         "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}})  # fmt: skip
    raw = struct.pack("<Q", len(header)) + header.encode() + b"\x07" + struct.pack("<2f", 1.5, -2)
    (tmp_path / "file").write_bytes(raw)
    found = _checkpoint.Safetensors("test", tmp_path / "file")
    assert found["a"].tolist() == [7] and found["b"].tolist() == [1.5, -2]
    found["b"].zero_()
    assert (tmp_path / "file").read_bytes() == raw


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (None, b"1234", "has 4 bytes, expected a safetensors file"),
        (None, b"\xff" * 20, "its header would end at"),
        (HEADER, b"1234", "a would end at .*the file is cut off"),
        ({"a": HEADER["a"] | {"dtype": "F3"}}, bytes(8), "a has dtype F3"),
        ({"a": HEADER["a"] | {"shape": [3]}}, bytes(8), r"a has shape \[3\] of F32 in 8 bytes"),
        ({"a": HEADER["a"] | {"shape": [-2]}}, bytes(8), r"a has shape \[-2\] at bytes 0 to 8"),
        ({"a": {"shape": [2]}}, bytes(8), "a header that is not safetensors'"),
        ([1], bytes(8), "a header that is not safetensors'"),
    ],
)
def test_damaged_safetensors(header, data, message, tmp_path):
    if header is not None:
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + data
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=f"test: .*file.*{message}"):
        _checkpoint.Safetensors("test", tmp_path / "file")


SSM = {"d_model": C, "n_layer": 2, "vocab_size": V, "ssm_cfg": {"d_state": 3}}
HF = {"model_type": "mamba", "hidden_size": C, "num_hidden_layers": 2, "vocab_size": V}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "there is no file .*config.json"),
        ("{", "config.json is not JSON"),
        ([], "config.json holds no object"),
        ({"layers": 3}, r"the entries are \['layers'\], expected model_type \"mamba\""),
        ({"model_type": "jamba"}, "model_type is 'jamba', expected .*FalconMamba and hybrids"),
        ({"model_type": "falcon_mamba"}, "model_type is 'falcon_mamba'"),
        (HF | {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected \"silu\""),
        (HF | {"hidden_size": "8"}, "hidden_size is '8', expected int"),
        (HF | {"use_bias": 1}, "use_bias is 1, expected bool"),
        ({"model_type": "mamba", "hidden_size": C, "vocab_size": V}, "no num_hidden_layers"),
        (HF | {"torch_ext_vocab_size": 99}, "torch_ext_vocab_size is 99, expected 1 to"),
        (SSM | {"ssm_cfg": {"layer": "Mamba3"}}, "layer in ssm_cfg is 'Mamba3', expected"),
        (SSM | {"ssm_cfg": {"headdim": 64}}, "ssm_cfg has 'headdim', expected some of"),
        (SSM | {"ssm_cfg": {"d_state": "3"}}, "ssm_cfg: d_state is '3', expected int"),
        (SSM | {"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\], expected none"),
        (SSM | {"d_intermediate": 64}, "d_intermediate is 64, expected 0"),
        (SSM, "has no weights, expected model.safetensors or pytorch_model.bin"),
    ],
    ids=str,
)
def test_bad_config(config, message, tmp_path):
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"MambaLM.from_pretrained: .*{message}"
    ):
        torch_ext.MambaLM.from_pretrained(tmp_path)


def test_bad_weights(generator, tmp_path):
    model = make(generator, torch.float32)
    model.save_pretrained(tmp_path, "mamba_ssm")
    file, good = tmp_path / "pytorch_model.bin", model.state_dict()

    def attempt(content, message):
        torch.save(content, file)
        with pytest.raises(ValueError, match=f"MambaLM.from_pretrained: .*{message}"):
            torch_ext.MambaLM.from_pretrained(tmp_path)

    torch.save({k: v for k, v in good.items() if k != "lm_head.weight"}, file)
    assert_same(torch_ext.MambaLM.from_pretrained(tmp_path), model)
    some = {k: v for k, v in good.items() if "layers.1.norm" not in k} | {"more": torch.ones(1)}
    attempt(some, r"lacks backbone.layers.1.norm.weight and has, unexpectedly, more")
    attempt({"more": torch.ones(1)}, "lacks backbone.embedding.weight, .* and 14 more and has")
    attempt(
        good | {"backbone.norm_f.weight": torch.ones(C + 1)},
        r"backbone.norm_f.weight of shape \(9,\), expected \(8,\)",
    )
    eighths = {key: value.to(torch.int8) for key, value in good.items()}
    attempt(eighths, "backbone.embedding.weight of torch.int8, expected floating-point numbers")
    attempt(good | {"lm_head.weight": torch.ones(V, C)}, "a lm_head.weight that is not backbone")
    attempt([1], "holds list, expected tensors by name")
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read as tensors"):
        torch_ext.MambaLM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a local folder.*nothing is downloaded"):
        torch_ext.MambaLM.from_pretrained("state-spaces/mamba-130m")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SSM))
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        torch_ext.MambaLM.from_pretrained(tmp_path)


# ---- transformers ----
@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


def make_theirs(transformers, seed, **options):
    torch.manual_seed(seed)
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=50, state_size=5, **options
    )
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", "proj.bias")):
                p.add_(torch.randn(p.shape) / 4)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": True},
        {"use_conv_bias": False, "time_step_rank": 5},
        {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "expand": 3},
        {"conv_kernel": 3, "layer_norm_epsilon": 1e-2, "residual_in_fp32": False},
    ],
    ids=str,
)
def test_as_transformers(options, transformers, seed, tmp_path):
    theirs = make_theirs(transformers, seed, **options)
    shards = {"max_shard_size": "20KB"} if "expand" in options else {}
    theirs.save_pretrained(tmp_path / "theirs", **shards)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == bool(shards)
    ours = torch_ext.MambaLM.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(50, (3, 12))
    with torch.no_grad():
        want = theirs(ids).logits
        assert want.std() > 0.1
        torch.testing.assert_close(ours(ids), want, rtol=1e-4, atol=1e-4)
        lengths = torch.tensor([12, 5, 2])
        if not options.get("use_bias"):  # there their padding on the left reaches the convolution
            mask = (11 - torch.arange(12) < lengths[:, None]).long()
            padded = theirs(ids, attention_mask=mask).logits
            got = ours(ids, lengths, "left")
            torch.testing.assert_close(got[mask > 0], padded[mask > 0], rtol=1e-4, atol=1e-4)
    want = theirs.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(ids, 10, 0.0), want)
    eos = int(want[0, 14])
    want = theirs.generate(
        ids, max_new_tokens=10, do_sample=False, eos_token_id=eos, pad_token_id=7
    )
    got = ours.generate(ids, 10, 0.0, eos_token_id=eos, pad_token_id=7)
    assert torch.equal(got, want)

    ours.save_pretrained(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(back, transformers.MambaForCausalLM)
    for (name, a), b in zip(theirs.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, theirs(ids).logits)


def test_transformers_loads_what_we_trained(transformers, generator, tmp_path):
    """A model of ours from the start, its padded vocabulary included, in bfloat16 as well."""
    ours = torch_ext.MambaLM(V, 32, 2, d_state=4)
    ids = tokens(generator)
    ours.save_pretrained(tmp_path)
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.eos_token_id is None and theirs.config.vocab_size == 16
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=1e-4)
    half = torch_ext.MambaLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / "half")
    assert theirs.dtype is torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids).logits.float(), half(ids).float(), rtol=0.1, atol=0.05
        )


# ---- mamba_ssm's names ----
def make_peer(generator, **options):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    options = {"d_model": C, "n_layer": 2, "vocab_size": V, "ssm_cfg": {"d_state": 3}} | options
    model = peer.MambaLMHeadModel(peer.MambaConfig(**options))
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(20)
    return model.double()


def test_peer_forward_and_caches(generator):
    model, ids = make_peer(generator), tokens(generator)
    lm = torch_ext.MambaLM(V, C, 2, d_state=3).double()
    lm.load_state_dict(model.state_dict())
    want = lm(ids)
    assert type(model(ids)).__name__ == "CausalLMOutput"
    torch.testing.assert_close(model(ids).logits, want)
    torch.testing.assert_close(model(ids, num_last_tokens=2).logits, want[:, -2:])
    # The caches are the convolution's last d_conv inputs, and the scan's states.
    norm, mixer = lm.backbone.layers[0].norm, lm.backbone.layers[0].mixer
    inner = mixer.in_proj(norm(lm.backbone.embedding(ids))).chunk(2, -1)[0].mT
    inner = F.pad(inner, (4, 0))
    for allocated in (True, False):
        for cuts in ([0, 11], [0, 6, 7, 8, 11], [0, 1, 3, 4, 11]):
            params = peer.InferenceParams(max_seqlen=20, max_batch_size=3)
            if allocated:
                params.key_value_memory_dict = model.allocate_inference_cache(3, 20)
                first = params.key_value_memory_dict[0]
            for start, end in zip(cuts, cuts[1:], strict=False):
                got = model(ids[:, start:end], inference_params=params).logits
                params.seqlen_offset += end - start
                close(got.detach(), want[:, start:end].detach())
                conv, scan = params.key_value_memory_dict[0]
                close(conv.detach(), inner[:, :, end : end + 4].detach())
                close(scan.detach(), lm.prefill(ids[:, :end])[1][0][1].detach())
                if allocated:
                    assert conv is first[0] and scan is first[1]
    # Another prompt with the same caches begins anew.
    params.reset(20, 3)
    torch.testing.assert_close(model(ids, inference_params=params).logits, want)
    with pytest.raises(ValueError, match=r"key_value_memory_dict\[0\] has shapes \(3, 16, 4\)"):
        model(ids[:2], inference_params=params)
    with pytest.raises(TypeError, match="take no seq_idx"):
        model(ids, seq_idx=ids)
    half = model.bfloat16().allocate_inference_cache(2, 9)[1]
    assert [c.dtype for c in half] == [torch.bfloat16, torch.float32]
    assert [tuple(c.shape) for c in half] == [(2, 16, 4), (2, 16, 3)]
    half = model.allocate_inference_cache(2, 9, dtype=torch.float16)[1]
    assert half[0].dtype is half[1].dtype is torch.float16


def test_peer_generate(generator):
    model, ids = make_peer(generator, pad_vocab_size_multiple=1), tokens(generator)
    lm = make(generator)
    lm.load_state_dict(model.state_dict())
    want = lm.generate(ids, 6, 0.0)
    assert torch.equal(model.generate(ids, max_length=17), want)
    full = model.generate(ids, 17, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(full.sequences, want) and len(full.scores) == 6
    for k, scores in enumerate(full.scores):
        close(scores, lm(want)[:, 10 + k].detach())
    assert model.generate(ids, 17, return_dict_in_generate=True).scores is None
    torch.manual_seed(3)
    drawn = model.generate(ids, 40, top_k=0, temperature=3.0)
    torch.manual_seed(3)
    assert torch.equal(drawn, lm.generate(ids, 29, 3.0))
    assert torch.equal(model.generate(ids, 17, top_k=0, top_p=1e-6), want)
    assert torch.equal(model.generate(ids, 17, top_k=0, min_p=1.0), want)
    # Forced tokens, then its own.
    forced = tokens(generator, 3, 14)
    forced[:, :11] = ids
    got = model.generate(ids, 17, teacher_outputs=forced)
    assert torch.equal(got, lm.generate(forced, 3, 0.0))
    assert int(model.generate(ids, 17, vocab_size=4)[:, 11:].max()) < 4
    # No token twice.
    got = model.generate(ids[:, :1], V, repetition_penalty=1e9)
    low = lm(got)[0]
    for k in range(1, V):
        logits = low[k - 1].clone()
        seen = got[0, :k]
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 1e9, logits[seen] / 1e9)
        assert int(logits.argmax()) == int(got[0, k])
    one = model.generate(ids[:1], 30, eos_token_id=int(want[0, 13]))
    at = (want[0, 11:] == want[0, 13]).nonzero()[0, 0]
    assert torch.equal(one[0], want[0, : 12 + at])

    class Streamer:
        pieces, ended = [], False

        def put(self, piece):
            self.pieces.append(piece)

        def end(self):
            self.ended = True

    streamer = Streamer()
    model.generate(ids, 17, streamer=streamer)
    assert streamer.ended and torch.equal(torch.cat(streamer.pieces, 1), want)


def test_peer_checkpoints(generator, tmp_path):
    model, ids = make_peer(generator), tokens(generator)
    model.save_pretrained(tmp_path)
    again = peer.MambaLMHeadModel.from_pretrained(tmp_path)
    assert isinstance(again, peer.MambaLMHeadModel) and isinstance(again.config, peer.MambaConfig)
    assert vars(again.config) == vars(model.config) | {
        "ssm_cfg": {"layer": "Mamba1", "d_state": 3},
    }
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert again.lm_head.weight is again.backbone.embedding.weight
    lm = torch_ext.MambaLM.from_pretrained(tmp_path)
    torch.testing.assert_close(lm(ids), model(ids).logits)
    lm.save_pretrained(tmp_path / "hf")
    again = peer.MambaLMHeadModel.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    torch.testing.assert_close(again(ids).logits.double(), model(ids).logits, rtol=1e-4, atol=1e-4)
    wide = peer.MambaLMHeadModel(model.config, initializer_cfg={"initializer_range": 1.0})
    assert float(wide.backbone.embedding.weight.detach().std()) > 0.5
    for options, message in (
        ({"d_intermediate": 3}, "config: d_intermediate is 3"),
        ({"attn_layer_idx": [0]}, r"config: attn_layer_idx is \[0\]"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3', expected \"Mamba1\""),
    ):
        with pytest.raises(ValueError, match=f"MambaLMHeadModel: .*{message}"):
            make_peer(generator, **options)


# ---- mistakes ----
def test_errors(generator):
    model, ids = make(generator), tokens(generator)
    state = model.init_state(3)
    one = torch.tensor([1, 2, 3])
    for call, message in (
        (lambda: model(ids[0]), r"MambaLM: ids has shape \(11\), expected \(B, T\)"),
        (lambda: model(ids + V), "ids has values from .*, expected 0 to 12"),
        (lambda: model(ids, torch.tensor([1, 2, 12])), "values from 1 to 12, expected 0 to T=11"),
        (lambda: model(ids, one, "top"), 'padding is "top"'),
        (lambda: model.step(ids, state), r"MambaLM.step: ids has shape \(3, 11\), expected \(B,\)"),
        (lambda: model.step(ids[:, 0], state[:1]), "state has 1 entries, expected n_layer=2"),
        (lambda: model.prefill(ids, state * 2), "state has 4 entries, expected n_layer=2"),
        (lambda: model.prefill(ids[:2], state), r"state\[0\] has shape \(3, 16, 3\)"),
        (lambda: model.prefill(ids, state, one, "left"), "state is given"),
        (lambda: model.prefill(ids[:, :0], last_only=True), "ids has no steps"),
        (lambda: torch_ext.MambaLM(0, C, 2), "MambaLM: vocab_size is 0"),
        (lambda: torch_ext.MambaLM(V, C, 0), "MambaLM: n_layer is 0"),
        (lambda: torch_ext.MambaLM(V, C, 1, pad_vocab_size_multiple=0), "multiple is 0"),
        (lambda: torch_ext.MambaLM(V, 0, 1), "d_model is 0"),
        (lambda: model.generate(ids[:, :0], 1), r"ids has shape \(3, 0\)"),
        (lambda: model.generate(ids, -1), "max_new_tokens is -1"),
        (lambda: model.generate(ids, 1, -0.5), "temperature is -0.5"),
        (lambda: model.generate(ids, 1, math.nan), "temperature is nan"),
        (lambda: model.generate(ids, 1, top_k=0), "top_k is 0"),
        (lambda: model.generate(ids, 1, top_p=0.0), "top_p is 0.0"),
        (lambda: model.generate(ids, 1, eos_token_id=V), r"eos_token_id is \[13\], expected 0 to"),
        (lambda: model.generate(ids, 1, pad_token_id=-1), r"pad_token_id is \[-1\]"),
        (lambda: model.generate(ids, 1, prefill_chunk=0), "prefill_chunk is 0"),
        (lambda: model.generate(ids, 1, padding="top"), 'padding is "top"'),
        (lambda: model.generate(ids, 1, lengths=one[:2]), r"lengths has shape \(2\)"),
        (lambda: model.generate(ids, 1, lengths=one - 1), "values from 0 to 2, expected 1 to T=11"),
        (lambda: model.stream(ids, -1), "max_new_tokens is -1"),  # at once, not at the first token
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="ids has dtype torch.float32"):
        model(ids.float())
    block, x = torch_ext.MambaBlock(C), torch.randn(3, 11, C)
    with pytest.raises(ValueError, match=r"MambaBlock: x has shape \(11, 8\)"):
        block(x[0])
    with pytest.raises(ValueError, match=r"MambaBlock.step: x has shape \(3, 11, 8\)"):
        block.step(x, block.init_state(3))
