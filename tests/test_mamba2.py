"""Mamba2, and MambaLM made of it, against the formula in plain PyTorch and against transformers."""

import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from cases import close
from torch._dynamo.testing import CompileCounterWithBackend

import torch_ext

script_warnings = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.\w+` is :DeprecationWarning",
    r"ignore:`torch\.jit\.\w+` is :FutureWarning",
)

D_MODEL, B, T = 8, 3, 11
VARIANTS = [
    {},
    {"ngroups": 2, "bias": True},
    {"D_has_hdim": True, "rmsnorm": False, "conv_bias": False},
    {"norm_before_gate": True, "ngroups": 4, "d_conv": 1},
    {"d_ssm": 8, "dt_limit": (0.3, 0.6), "conv_init": 0.5},
    {"d_ssm": 8, "rmsnorm": False, "dt_limit": (0.0, 0.5), "ngroups": 2},
]


def make(generator, dtype=torch.float64, **options):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    layer = torch_ext.Mamba2(D_MODEL, **{"d_state": 5, "headdim": 4, **options})
    with torch.no_grad():  # step sizes of 0.001 to 0.1 would leave too little to see
        layer.dt_bias.normal_()
        layer.D.normal_()
        if layer.norm is not None:
            layer.norm.weight.normal_()
    return layer.to(dtype)


def inputs(generator, rows=B, steps=T, dtype=torch.float64):
    return torch.randn(rows, steps, D_MODEL, generator=generator, dtype=torch.float64).to(dtype)


def formula(layer, x, options):
    """Zero states: the paper's equations and mamba_ssm's options, a loop over time and heads."""
    d_inner = 2 * D_MODEL
    d_ssm, G, N, P = options.get("d_ssm", d_inner), options.get("ngroups", 1), 5, 4
    H, d_mlp = d_ssm // P, d_inner - options.get("d_ssm", d_inner)
    z0, x0, z, xBC, dt = layer.in_proj(x).split([d_mlp, d_mlp, d_ssm, d_ssm + 2 * G * N, H], -1)
    weight, bias, T = layer.conv1d.weight, layer.conv1d.bias, x.shape[1]
    conv = F.conv1d(xBC.mT, weight, bias, padding=weight.shape[2] - 1, groups=len(weight))
    u, Bs, Cs = F.silu(conv[:, :, :T]).mT.split([d_ssm, G * N, G * N], -1)
    dt = F.softplus(dt + layer.dt_bias).clamp(*options.get("dt_limit", (0, math.inf)))
    heads = []
    for h in range(H):
        own, g = slice(h * P, (h + 1) * P), h // (H // G)
        D = layer.D[own] if options.get("D_has_hdim") else layer.D[h]
        S, ys = x.new_zeros(x.shape[0], P, N), []
        for t in range(T):
            b, c = Bs[:, t, g * N : (g + 1) * N], Cs[:, t, g * N : (g + 1) * N]
            step = dt[:, t, h, None, None]
            S = torch.exp(-step * layer.A_log[h].exp()) * S
            S = S + step * u[:, t, own, None] * b[:, None]
            ys.append((S * c[:, None]).sum(-1) + D * u[:, t, own])
        heads.append((torch.stack(ys, 1), S))
    y = torch.cat([ys for ys, _ in heads], -1)
    gate = z * torch.sigmoid(z)
    if not options.get("rmsnorm", True):
        y = y * gate
    else:
        before = options.get("norm_before_gate", False)
        parts = (y if before else y * gate).chunk(G, -1)
        parts = [p / (p.square().mean(-1, keepdim=True) + 1e-5).sqrt() for p in parts]
        y = torch.cat(parts, -1) * layer.norm.weight * (gate if before else 1)
    y = torch.cat([z0 * torch.sigmoid(z0) * x0, y], -1)
    return layer.out_proj(y), torch.stack([S for _, S in heads], 1)


# ---- the layer ----


def test_parameters():
    layer = torch_ext.Mamba2(40, d_state=5, d_conv=3, headdim=8, ngroups=2, A_init_range=(2, 3))
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "in_proj.weight": (80 + 80 + 20 + 10, 40),
        "conv1d.weight": (100, 1, 3),
        "conv1d.bias": (100,),
        "dt_bias": (10,),
        "A_log": (10,),
        "D": (10,),
        "norm.weight": (80,),
        "out_proj.weight": (40, 80),
    }
    A, dt = layer.A_log.exp(), F.softplus(torch_ext.Mamba2(512, headdim=2).dt_bias)
    assert A.min() >= 2 and A.max() <= 3 and A.std() > 0
    dt = dt.detach()
    assert 0.0009 < float(dt.min()) < 0.01 < float(dt.max()) < 0.101
    assert (layer.D == 1).all() and (layer.norm.weight == 1).all()
    for parameter in (layer.A_log, layer.D, layer.dt_bias):
        assert parameter._no_weight_decay
    small = torch_ext.Mamba2(
        16, d_state=4, headdim=4, d_ssm=24, D_has_hdim=True, rmsnorm=False, conv_init=0.01,
        bias=True, conv_bias=False, dtype=torch.bfloat16,
    )  # fmt: skip
    shapes = {k: tuple(v.shape) for k, v in small.state_dict().items()}
    assert shapes == {
        "in_proj.weight": (2 * 32 + 8 + 6, 16),
        "in_proj.bias": (2 * 32 + 8 + 6,),
        "conv1d.weight": (32, 1, 4),
        "dt_bias": (6,),
        "A_log": (6,),
        "D": (24,),
        "out_proj.weight": (16, 32),
        "out_proj.bias": (16,),
    }
    assert small.conv1d.weight.abs().max() <= 0.01
    assert small.A_log.dtype is small.dt_bias.dtype is torch.float32
    before = small.A_log.clone()
    small.reset_parameters()
    assert not torch.equal(small.A_log, before) and small.conv1d.weight.abs().max() <= 0.01


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_formula(options, generator):
    layer, x = make(generator, **options), inputs(generator)
    y, state = layer.prefill(x)
    want, want_state = formula(layer, x, options)
    close(y.detach(), want.detach())
    close(state[1].detach(), want_state.detach())
    parameters = list(layer.parameters())
    got = torch.autograd.grad(layer(x).sin().sum(), parameters)
    want = torch.autograd.grad(want.sin().sum(), parameters)
    for (name, _), g, w in zip(layer.named_parameters(), got, want, strict=True):
        close(g, w, grad=True, name=name)


@pytest.mark.parametrize("options", [VARIANTS[0], VARIANTS[3], VARIANTS[4]], ids=str)
def test_chunks_and_steps(options, generator):
    """With their gradients, which flow through the states that are handed over."""
    layer, x = make(generator, **options), inputs(generator)

    def run(pieces):
        state, outputs, at = layer.init_state(B), [], 0
        for steps in pieces:
            if steps == "step":
                y, state = layer.step(x[:, at], state)
                y, steps = y[:, None], 1
            else:
                y, state = layer.prefill(x[:, at : at + steps], state)
            outputs.append(y)
            at += steps
        y = torch.cat(outputs, 1)
        loss = y.sin().sum() + state[0].sum() + state[1].square().sum()
        return [y, *state, *torch.autograd.grad(loss, list(layer.parameters()))]

    want = run([T])
    for pieces in ([1, 1, 9], [5, 0, 6], ["step"] * T, [4, "step", 6]):
        for got, w in zip(run(pieces), want, strict=True):
            close(got.detach(), w.detach(), grad=True)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("options", [VARIANTS[0], VARIANTS[4]], ids=str)
def test_padding(options, padding, generator):
    """Every row as it would be alone, with NaN in the padding, and no gradient there."""
    layer, x = make(generator, **options), inputs(generator, 4)
    lengths = torch.tensor([T, 4, 1, 0])
    steps = torch.arange(T) if padding == "right" else torch.arange(T).flip(0)
    past = steps >= lengths[:, None]
    x[past] = torch.nan
    x.requires_grad_()
    y, state = layer.prefill(x, None, lengths, padding)
    assert not y[past].any()
    for b, length in enumerate(lengths.tolist()):
        row = x[b : b + 1, :length] if padding == "right" else x[b : b + 1, T - length :]
        want, want_state = layer.prefill(row)
        got = y[b : b + 1, :length] if padding == "right" else y[b : b + 1, T - length :]
        close(got.detach(), want.detach())
        for a, w in zip(state, want_state, strict=True):
            close(a[b : b + 1].detach(), w.detach())
    y.sum().backward()
    assert not x.grad[past].any() and x.grad.isfinite().all()
    close(layer(x, lengths, padding).detach(), y.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_float32(dtype, generator):
    layer, x = make(generator, torch.float32, ngroups=2), inputs(generator, dtype=torch.float32)
    want, want_state = layer.prefill(x)
    bound = {"atol": 32 * torch.finfo(dtype).eps, "rtol": 32 * torch.finfo(dtype).eps}
    with torch.autocast("cpu", dtype):
        y, state = layer.prefill(x)
        _, stepped = layer.step(x[:, 0], state)
    assert {part.dtype for part in (*state, *stepped)} == {torch.float32}
    torch.testing.assert_close(y.float(), want, **bound)
    torch.testing.assert_close(state[1], want_state[1], **bound)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    half = torch_ext.Mamba2(D_MODEL, d_state=5, headdim=4, ngroups=2, dtype=dtype)
    half.load_state_dict(layer.state_dict())
    y, state = half.prefill(x.to(dtype))
    _, stepped = half.step(x[:, 0].to(dtype), state)
    assert y.dtype == dtype and {p.dtype for p in (*state, *stepped)} == {torch.float32}
    torch.testing.assert_close(y.float(), want, **bound)


@script_warnings
@pytest.mark.parametrize("options", [{}, VARIANTS[4], VARIANTS[2]], ids=str)
def test_script(options, generator):
    layer, x = make(generator, torch.float32, **options), inputs(generator, dtype=torch.float32)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    loaded, lengths = torch.jit.load(file), torch.tensor([T, 0, 4])
    assert torch.equal(loaded(x, lengths), layer(x, lengths))
    y, state = loaded.prefill(x)
    want, want_state = layer.prefill(x)
    assert torch.equal(y, want) and torch.equal(state[1], want_state[1])
    close(loaded.step(x[:, 0], state)[0].detach(), layer.step(x[:, 0], state)[0].detach())


def test_compiles_and_exports(generator):
    layer = make(generator, torch.float32, ngroups=2)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for rows, steps in [(6, 7), (3, 13), (2, 9)]:
        x, lengths = inputs(generator, rows, steps, torch.float32), torch.arange(rows) + 1
        results = []
        for run in (compiled, layer):
            layer.zero_grad()
            y = run(x, lengths)
            y.sin().sum().backward()
            results.append([y, *(p.grad.clone() for p in layer.parameters())])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3
    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("steps")}
    program = torch.export.export(
        layer.eval(), (inputs(generator, dtype=torch.float32),), dynamic_shapes=(sizes,)
    )
    x = inputs(generator, 2, 33, torch.float32)
    close(program.module()(x).detach(), layer(x).detach())


def bad_calls():
    layer = torch_ext.Mamba2(8, d_state=5, headdim=4)
    x, (conv, scan) = torch.zeros(2, 3, 8), layer.init_state(2)
    make = torch_ext.Mamba2
    yield lambda: make(8), "headdim is 64, expected a number that divides d_inner=16"
    yield lambda: make(8, headdim=8, ngroups=3), "ngroups is 3, expected a number that divides the"
    yield lambda: make(8, headdim=4, d_ssm=20), "d_ssm is 20, expected 1 to d_inner=16"
    yield lambda: make(8, headdim=4, d_state=0), "d_state is 0, expected at least 1"
    yield lambda: make(8, headdim=4, dt_limit=(1.0, 0.5)), r"dt_limit is \(1.0, 0.5\), expected 0"
    yield lambda: make(8, headdim=4, A_init_range=(0, 1)), r"A_init_range is \(0, 1\), expected 0"
    yield lambda: make(8, headdim=4, dt_min=0), "dt_min is 0 and dt_max 0.1, expected"
    yield lambda: make(8, headdim=4, process_group=1), "process_group is given, expected None"
    yield lambda: layer(x[0]), r"x has shape \(3, 8\), expected \(B, T, d_model=8\)"
    yield lambda: layer.step(x, (conv, scan)), r"step: x has shape \(2, 3, 8\), expected \(B, d_m"
    yield lambda: layer.prefill(x, (conv[:1], scan)), r"state\[0\] has shape \(1, 26, 3\), expected"
    yield lambda: layer.prefill(x, (conv, scan[..., 1:])), r"state\[1\] has shape .*, expected \(B="
    yield lambda: layer(x, torch.tensor([4, 1])), "lengths has values from 1 to 4, expected 0 to T"
    yield (
        lambda: layer.prefill(x, (conv, scan), torch.tensor([3, 1]), "left"),
        "state is given, expected None with padding on the left",
    )


@pytest.mark.parametrize("call, text", list(bad_calls()), ids=lambda v: str(v)[:40])
def test_bad_arguments(call, text):
    with pytest.raises(ValueError, match="Mamba2.*: " + text if "step" not in text else text):
        call()


# ---- the language model ----

CFG = {"layer": "Mamba2", "d_state": 5, "headdim": 4, "ngroups": 2}


def language_model(**options):
    return torch_ext.MambaLM(13, D_MODEL, 2, ssm_cfg=CFG, pad_vocab_size_multiple=1, **options)


def test_lm_is_its_equations(generator):
    torch.manual_seed(1)
    model = language_model(norm_eps=0.1).double()
    ids = torch.randint(0, 13, (B, T), generator=generator)
    x = model.backbone.embedding.weight[ids]
    norm = lambda x, weight: x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight  # noqa: E731
    for layer in model.backbone.layers:
        assert isinstance(layer.mixer, torch_ext.Mamba2) and layer.mixer.norm.eps == 0.1
        x = x + layer.mixer(norm(x, layer.norm.weight))
    want = norm(x, model.backbone.norm_f.weight) @ model.lm_head.weight.T
    close(model(ids).detach(), want.detach())
    first, state = model.prefill(ids[:, :6])
    last, _ = model.step(ids[:, 6], state)
    close(torch.cat([first, last[:, None]], 1).detach(), want[:, :7].detach())
    # Greedy: the most likely token of a plain loop, and of padded rows.
    text = ids
    for _ in range(5):
        text = torch.cat([text, model(text)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(ids, 5, 0.0), text)
    padded = F.pad(ids, (2, 0))
    lengths = torch.full((B,), T)
    got = model.generate(padded, 5, 0.0, lengths=lengths, padding="left")
    assert torch.equal(got[:, 2:], text)


@script_warnings
def test_lm_scripts_and_repeats_its_config(generator):
    model = language_model()
    again = torch_ext.MambaLM(**model.config)
    again.load_state_dict(model.state_dict())
    ids = torch.randint(0, 13, (B, T), generator=generator)
    assert torch.equal(again(ids), model(ids))
    assert torch.equal(torch.jit.script(model)(ids), model(ids))
    block = torch_ext.MambaBlock(D_MODEL, ssm_cfg=CFG)
    x, state = inputs(generator, dtype=torch.float32), block.init_state(B)
    close(block.step(x[:, 0], state)[0].detach(), block(x)[:, 0].detach())


@pytest.mark.parametrize("layout", ["transformers", "mamba_ssm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lm_saves_and_loads(layout, dtype, generator, tmp_path):
    cfg = CFG | {"dt_limit": (0.25, 0.5), "chunk_size": 128}
    model = torch_ext.MambaLM(13, D_MODEL, 2, ssm_cfg=cfg, dtype=dtype, tie_embeddings=False)
    model.save_pretrained(tmp_path, layout)
    again = torch_ext.MambaLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 13, (B, T), generator=generator)
    assert again(ids).dtype == dtype and torch.equal(again(ids), model(ids))
    config = json.loads((tmp_path / "config.json").read_text())
    if layout == "mamba_ssm":
        assert config["ssm_cfg"] == {**cfg, "dt_limit": [0.25, 0.5]}
    else:
        assert config["model_type"] == "mamba2" and config["num_heads"] == 4


def lm_cases(tmp_path):
    def load(**entries):
        base = {"model_type": "mamba2", "vocab_size": 13, "hidden_size": 8, "num_heads": 4}
        base |= {"num_hidden_layers": 1, "head_dim": 4} | entries
        (tmp_path / "config.json").write_text(json.dumps(base))
        torch_ext.MambaLM.from_pretrained(tmp_path)

    lm = lambda **cfg: torch_ext.MambaLM(13, 8, 1, ssm_cfg={"layer": "Mamba2", **cfg})  # noqa: E731
    yield lambda: lm(layer="Mamba9"), "the layer in ssm_cfg is 'Mamba9', expected \"Mamba1\" or"
    yield lambda: lm(dt_rank=3), "ssm_cfg has 'dt_rank', expected some of"
    yield lambda: lm(headdim="4"), "ssm_cfg: headdim is '4', expected int"
    yield (
        lambda: torch_ext.MambaLM(13, 8, 1, d_state=4, ssm_cfg=CFG),
        "d_state is 4, expected it in ssm_cfg instead",
    )
    yield (
        lambda: torch_ext.MambaBlock(8, ssm_cfg=CFG, bidirectional=True),
        "bidirectional is True, expected False with Mamba2",
    )
    yield (
        lambda: load(num_heads=3),
        "num_heads is 3 and head_dim 4, expected expand . hidden_size=16",
    )
    yield lambda: load(time_step_limit=[1]), r"time_step_limit is \[1\], expected two numbers"
    yield lambda: load(hidden_act="gelu"), "hidden_act is 'gelu', expected \"silu\""
    yield (
        lambda: lm(d_state=4, headdim=4, rmsnorm=False).save_pretrained(tmp_path),
        "rmsnorm is False, expected True in transformers' layout",
    )
    yield (
        lambda: lm(d_state=4, headdim=4, d_ssm=8).save_pretrained(tmp_path),
        "d_ssm is 8, expected 16 in transformers' layout",
    )


def test_bad_lm_arguments(tmp_path):
    for call, text in lm_cases(tmp_path):
        with pytest.raises(ValueError, match=f"Mamba(LM|Block).*: .*{text}"):
            call()


def test_lm_learns_a_text():
    torch.manual_seed(3)
    model = torch_ext.MambaLM(128, 32, 2, ssm_cfg={"layer": "Mamba2", "d_state": 16, "headdim": 8})
    text = torch.tensor([list(b"the state of a head is a matrix")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(text[:, :-1])
        loss = F.cross_entropy(logits[..., :128].flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert torch.equal(model.generate(text[:, :6], text.shape[1] - 6, 0.0), text)


# ---- transformers ----


@pytest.mark.parametrize(
    "options", [{}, {"n_groups": 1, "use_bias": True, "tie_word_embeddings": True}], ids=str
)
def test_transformers_models_load(options, tmp_path, seed):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.Mamba2Config(
        **{"vocab_size": 37, "hidden_size": 16, "num_heads": 8, "head_dim": 4, "n_groups": 2}
        | {"state_size": 5, "num_hidden_layers": 2, "chunk_size": 4, "layer_norm_epsilon": 1e-3}
        | options
    )
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = torch_ext.MambaLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 37, (B, T))
    want, got = theirs(ids).logits, ours(ids)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    # Both sums of squares: as the second opinion on gradients.
    want.square().sum().backward()
    got.square().sum().backward()
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        name = name.replace("embeddings", "embedding")
        torch.testing.assert_close(own[name].grad, parameter.grad, atol=1e-3, rtol=1e-3)
    new = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, 8, 0.0), theirs.generate(ids, **new))

    folder = tmp_path / "ours"
    ours.save_pretrained(folder)
    again = transformers.Mamba2ForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(again(ids).logits, want, atol=1e-5, rtol=1e-5)
