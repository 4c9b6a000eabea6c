"""xLSTM's layers and blocks: against their formulas in plain PyTorch and the package xlstm, in one
call, in chunks and in steps."""

import doctest
import io
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import close

import torch_ext
from torch_ext import xlstm

D = 8


def mlstm_formula(q, k, v, i, f, scale_q, scale_k, eps=1e-6, sigmoid=False):
    """Zero states, float64, a loop over time: ``(B, T, H, K)`` and the states."""
    B, T, H, K = q.shape
    C, n = q.new_zeros(B, H, K, v.shape[3]), q.new_zeros(B, H, K)
    m, outputs = q.new_zeros(B, H), []
    for t in range(T):
        if sigmoid:
            write, keep = torch.sigmoid(i[:, t]), torch.sigmoid(f[:, t])
        else:
            kept = F.logsigmoid(f[:, t]) + m
            m = torch.maximum(kept, i[:, t])
            write, keep = torch.exp(i[:, t] - m), torch.exp(kept - m)
        kt, qt = scale_k * k[:, t], scale_q * q[:, t]
        C = keep[..., None, None] * C + write[..., None, None] * kt[..., None] * v[:, t, :, None]
        n = keep[..., None] * n + write[..., None] * kt
        size = torch.maximum((n * qt).sum(-1).abs(), torch.exp(-m)) + eps
        outputs.append((C * qt[..., None]).sum(-2) / size[..., None])
    return torch.stack(outputs, 1), C, n, m


def layer_formula(layer, x):
    """The paper's, figure 11."""
    config = layer.config
    B, T, _ = x.shape
    inner, H = layer.inner_dim, config.num_heads
    u, z = layer.proj_up(x).chunk(2, -1)
    conv = layer.conv1d.conv
    c = F.conv1d(u.mT, conv.weight, conv.bias, padding=layer.d_conv - 1, groups=inner)
    c = F.silu(c[:, :, :T]).mT

    def headwise(module, x):
        y = x @ torch.block_diag(*module.weight).T
        return y if module.bias is None else y + module.bias

    q, k, v = headwise(layer.q_proj, c), headwise(layer.k_proj, c), headwise(layer.v_proj, u)
    qkv = torch.cat([q, k, v], -1)
    cell = layer.mlstm_cell
    q, k, v = (y.view(B, T, H, inner // H) for y in (q, k, v))
    h, *state = mlstm_formula(q, k, v, cell.igate(qkv), cell.fgate(qkv), 1.0, (inner // H) ** -0.5)
    h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, False, keepdim=True) + 1e-5)
    y = h.flatten(-2) * (1 + cell.outnorm.weight) + layer.learnable_skip * c
    return layer.proj_down(y * F.silu(z)), state


def block_formula(block, x):
    normed = F.layer_norm(x, x.shape[-1:], 1 + block.xlstm_norm.weight, None, 1e-5)
    y, state = layer_formula(block.xlstm, normed)
    return x + y, state


def large_block_formula(block, x):
    """xLSTM-7B's, section 3 and figure 1."""
    config, layer, ffn = block.config, block.mlstm_layer, block.ffn
    B, T, dim = x.shape

    def norm(module, x):
        y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * module.weight
        return y if module.bias is None else y + module.bias

    def cap(x):
        return x if config.gate_soft_cap is None else (
            config.gate_soft_cap * torch.tanh(x / config.gate_soft_cap)
        )  # fmt: skip

    y = norm(block.norm_mlstm, x)
    if layer.fused:
        qk, vo = layer.qk_dim, layer.v_dim
        q, k, v, o = layer.qkv_opreact(y).split([qk, qk, vo, vo], -1)
        i, f = cap(layer.ifgate_preact(y)).chunk(2, -1)
    else:
        q, k, v, o = layer.q(y), layer.k(y), layer.v(y), layer.ogate_preact(y)
        i, f = cap(layer.igate_preact(y)), cap(layer.fgate_preact(y))
    q, k, v = (y.view(B, T, config.num_heads, -1) for y in (q, k, v))
    sigmoid = layer.input_gate == "sigmoid"
    h, *state = mlstm_formula(q, k, v, i, f, q.shape[3] ** -0.5, 1.0, config.eps, sigmoid)
    h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(
        h.var(-1, False, keepdim=True) + config.norm_eps
    )
    h = h.flatten(-2) * layer.multihead_norm.weight
    if layer.multihead_norm.bias is not None:
        h = h + layer.multihead_norm.bias
    x = x + layer.out_proj(torch.sigmoid(o) * h)
    y = norm(block.norm_ffn, x)
    if layer.fused:
        gate, up = ffn.proj_up_gate_z(y).chunk(2, -1)
    else:
        gate, up = ffn.proj_up_gate(y), ffn.proj_up(y)
    return x + ffn.proj_down(F.silu(gate) * up), state


BLOCKS = {
    "block": (torch_ext.mLSTMBlock, block_formula, {"num_heads": 2}),
    "block-bias": (torch_ext.mLSTMBlock, block_formula, {"num_heads": 4, "bias": True}),
    "block-conv1": (
        torch_ext.mLSTMBlock,
        block_formula,
        {"num_heads": 1, "conv1d_kernel_size": 1, "qkv_proj_blocksize": 8, "proj_factor": 1.0},
    ),
    "large": (torch_ext.xLSTMLargeBlock, large_block_formula, {"num_heads": 2}),
    "large-bias": (
        torch_ext.xLSTMLargeBlock,
        large_block_formula,
        {"num_heads": 2, "use_bias": True, "qk_dim_factor": 1.0, "v_dim_factor": 1.5, "eps": 1e-3},
    ),
    "large-fused": (
        torch_ext.xLSTMLargeBlock,
        large_block_formula,
        {"num_heads": 1, "weight_mode": "fused", "use_bias": True, "gate_soft_cap": 2.0},
    ),
    "large-sigmoid": (
        torch_ext.xLSTMLargeBlock,
        large_block_formula,
        {"num_heads": 2, "gate_soft_cap": None}
        | {"chunkwise_kernel": "parallel--native_siging_autograd"},
    ),
}
SMALL = {"round_proj_up_to_multiple_of": 8}
KINDS = pytest.mark.parametrize("name", BLOCKS)
SOME = pytest.mark.parametrize("name", ["block-bias", "large-bias"])


def shake(module, generator):
    """Gates, norms and biases that do something."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "gate" in name and name.endswith("weight") and "proj_up" not in name:
                if "ogate" not in name:
                    p.add_(noise / p.shape[-1] ** 0.5)
            elif "norm" in name or name.endswith("bias") or "skip" in name:
                p.add_(noise / 4)
    return module


def make(name, generator, dtype=torch.float64):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    kind, _, options = BLOCKS[name]
    rounded = SMALL if kind is torch_ext.mLSTMBlock else {"ffn_round_up_to_multiple_of": 8}
    block = shake(kind(embedding_dim=D, **(rounded | options)), generator).to(dtype)
    if kind is torch_ext.xLSTMLargeBlock:  # whose input gate starts as good as closed
        with torch.no_grad():
            layer = block.mlstm_layer
            bias = layer.ifgate_preact.bias if layer.fused else layer.igate_preact.bias
            bias[: layer.num_heads] += 10
    return block


def inputs(generator, B=3, T=11, dtype=torch.float64):
    return torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(dtype)


# ---- parameters ----
def test_parameters_of_the_layer(seed):
    torch.manual_seed(seed)
    block = torch_ext.mLSTMBlock(embedding_dim=96, num_heads=4, bias=True)
    assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == {
        "xlstm.learnable_skip": (192,),
        "xlstm.proj_up.weight": (384, 96), "xlstm.proj_up.bias": (384,),
        "xlstm.q_proj.weight": (48, 4, 4), "xlstm.q_proj.bias": (192,),
        "xlstm.k_proj.weight": (48, 4, 4), "xlstm.k_proj.bias": (192,),
        "xlstm.v_proj.weight": (48, 4, 4), "xlstm.v_proj.bias": (192,),
        "xlstm.conv1d.conv.weight": (192, 1, 4), "xlstm.conv1d.conv.bias": (192,),
        "xlstm.mlstm_cell.igate.weight": (4, 576), "xlstm.mlstm_cell.igate.bias": (4,),
        "xlstm.mlstm_cell.fgate.weight": (4, 576), "xlstm.mlstm_cell.fgate.bias": (4,),
        "xlstm.mlstm_cell.outnorm.weight": (192,),
        "xlstm.proj_down.weight": (96, 192), "xlstm.proj_down.bias": (96,),
        "xlstm_norm.weight": (96,),
    }  # fmt: skip
    layer, cell = block.xlstm, block.xlstm.mlstm_cell
    for p in (layer.q_proj.bias, layer.proj_up.bias, layer.proj_down.bias, block.xlstm_norm.weight,
              cell.igate.weight, cell.fgate.weight, cell.outnorm.weight):  # fmt: skip
        assert (p == 0).all()
    assert (layer.learnable_skip == 1).all()
    torch.testing.assert_close(cell.fgate.bias.detach(), torch.linspace(3, 6, 4))
    assert 0 < float(cell.igate.bias.detach().abs().max()) < 0.6
    small = (2 / (5 * 96)) ** 0.5
    for p in (layer.proj_up.weight, layer.q_proj.weight, layer.v_proj.weight):
        assert 0.85 * small < float(p.detach().std()) < 1.15 * small
    assert 0.95 < float(layer.proj_down.weight.detach().std()) / (2 / 96**0.5) < 1.05
    stack = torch_ext.xLSTMBlockStack(mlstm_block={}, embedding_dim=96, num_blocks=5)
    down = stack.blocks[3].xlstm.proj_down.weight.detach().std()
    assert 0.95 < float(down) / (2 / 5 / 96**0.5) < 1.05
    assert set(stack.state_dict()) >= {"blocks.4.xlstm_norm.weight", "post_blocks_norm.weight"}
    bare = torch_ext.mLSTMLayer(embedding_dim=8, proj_factor=3, round_proj_up_to_multiple_of=16)
    assert bare.inner_dim == 32 and bare.proj_up.bias is None and bare.q_proj.bias is None
    bare = torch_ext.mLSTMLayer(
        embedding_dim=8, proj_factor=3, round_proj_up_to_multiple_of=16, round_proj_up_dim_up=False
    )
    assert bare.inner_dim == 16


def test_parameters_of_the_large_block(seed):
    torch.manual_seed(seed)
    single = torch_ext.xLSTMLargeBlock(embedding_dim=128, num_heads=4, num_blocks=3)
    layer = {
        "q.weight": (64, 128), "k.weight": (64, 128), "v.weight": (128, 128),
        "ogate_preact.weight": (128, 128), "igate_preact.weight": (4, 128),
        "igate_preact.bias": (4,), "fgate_preact.weight": (4, 128), "fgate_preact.bias": (4,),
        "multihead_norm.weight": (128,), "out_proj.weight": (128, 128),
    }  # fmt: skip
    ffn = {"proj_up_gate.weight": (384, 128), "proj_up.weight": (384, 128)}
    ffn["proj_down.weight"] = (128, 384)
    norms = {"norm_mlstm.weight": (128,), "norm_ffn.weight": (128,)}
    assert {k: tuple(v.shape) for k, v in single.state_dict().items()} == (
        {f"mlstm_layer.{k}": v for k, v in layer.items()}
        | {f"ffn.{k}": v for k, v in ffn.items()}
        | norms
    )
    fused = torch_ext.xLSTMLargeBlock(
        single.config, weight_mode="fused", use_bias=True, device="cpu"
    )
    assert {k: tuple(v.shape) for k, v in fused.state_dict().items() if "weight" in k} == norms | {
        "mlstm_layer.qkv_opreact.weight": (384, 128), "mlstm_layer.ifgate_preact.weight": (8, 128),
        "mlstm_layer.multihead_norm.weight": (128,), "mlstm_layer.out_proj.weight": (128, 128),
        "ffn.proj_up_gate_z.weight": (768, 128), "ffn.proj_down.weight": (128, 384),
    }  # fmt: skip
    gates = torch.cat([torch.full((4,), -10.0), torch.linspace(3, 6, 4)])
    torch.testing.assert_close(fused.mlstm_layer.ifgate_preact.bias.detach(), gates)
    one = single.mlstm_layer
    torch.testing.assert_close(
        torch.cat([one.igate_preact.bias, one.fgate_preact.bias]).detach(), gates
    )
    for p in (one.igate_preact.weight, one.fgate_preact.weight, fused.mlstm_layer.out_proj.bias,
              fused.norm_ffn.bias, fused.ffn.proj_down.bias):  # fmt: skip
        assert (p == 0).all()
    small = (2 / (5 * 128)) ** 0.5
    for p in (one.q.weight, one.ogate_preact.weight, single.ffn.proj_up.weight):
        assert 0.95 * small < float(p.detach().std()) < 1.05 * small
    wang = 2 / 3 / 128**0.5
    assert 0.95 * wang < float(one.out_proj.weight.detach().std()) < 1.05 * wang
    down = single.ffn.proj_down.weight.detach().std()
    assert 0.95 < float(down) / (2 / 3 / 384**0.5) < 1.05
    # The peer's rounding: up, where something whole is left.
    assert torch_ext.xLSTMLargeBlock(embedding_dim=24, num_heads=1).ffn.proj_down.in_features == 64


@pytest.mark.parametrize(
    "make_one",
    [
        lambda **o: torch_ext.mLSTMBlock(embedding_dim=16, bias=True, **o),
        lambda **o: torch_ext.xLSTMLargeBlock(embedding_dim=16, num_heads=2, use_bias=True, **o),
        lambda **o: torch_ext.xLSTMLargeBlock(
            embedding_dim=16, num_heads=2, weight_mode="fused", **o
        ),
        lambda **o: torch_ext.xLSTMBlockStack(mlstm_block={}, num_blocks=2, embedding_dim=16, **o),
    ],
)
def test_reset_parameters(make_one, seed):
    """On the meta device first, then somewhere: as if made there."""
    module = make_one(device="meta", dtype=torch.float64).to_empty(device="cpu")
    twin = make_one(dtype=torch.float64)
    for one in (module, twin):
        torch.manual_seed(seed)
        one.reset_parameters()
    for (name, p), q in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert p.dtype is torch.float64 and torch.equal(p, q), name


def test_configs():
    """An object, a mapping, fields; never changed, and fields go first."""
    theirs = SimpleNamespace(embedding_dim=16, num_heads=2, something_else=3)
    for config in (theirs, {"embedding_dim": 16, "num_heads": 2, "_mine": 1}):
        layer = torch_ext.mLSTMLayer(config, num_heads=1, dropout=0.25)
        assert (layer.embedding_dim, layer.num_heads, layer.dropout.p) == (16, 1, 0.25)
    assert vars(theirs) == {"embedding_dim": 16, "num_heads": 2, "something_else": 3}
    assert torch_ext.mLSTMLayer(theirs, _num_blocks=None).config._num_blocks == 1
    again = torch_ext.mLSTMLayer(layer.config)
    assert again.config == layer.config and again.config is not layer.config
    block = torch_ext.mLSTMBlock(SimpleNamespace(mlstm=theirs))
    assert block.xlstm.num_heads == 2
    stack = torch_ext.xLSTMBlockStack(
        {"mlstm_block": {"mlstm": {"num_heads": 2}}, "num_blocks": 2}, embedding_dim=16, dropout=0.5
    )
    assert [b.xlstm.embedding_dim for b in stack.blocks] == [16, 16]
    assert stack.blocks[1].xlstm.dropout.p == 0.5 and stack.config.block_map == [0, 0]
    assert isinstance(
        torch_ext.xLSTMBlockStack(stack.config, add_post_blocks_norm=False).post_blocks_norm,
        torch.nn.Identity,
    )


# ---- values ----
@KINDS
def test_formula(name, generator):
    block, x = make(name, generator), inputs(generator)
    y, state = block.prefill(x)
    want, want_state = BLOCKS[name][1](block, x)
    close(y.detach(), want.detach(), factor=8)
    for got, other in zip(state[-3:], want_state, strict=True):
        close(got.detach(), other.detach(), factor=8)
    torch.testing.assert_close(block(x), y, rtol=0, atol=0)
    parameters = list(block.parameters())
    got = torch.autograd.grad(block(x).sin().sum(), parameters)
    wants = torch.autograd.grad(want.sin().sum(), parameters)
    for (key, _), g, w in zip(block.named_parameters(), got, wants, strict=True):
        close(g, w, grad=True, name=key, factor=32)


@KINDS
def test_chunks_and_steps(name, generator):
    block, x = make(name, generator), inputs(generator)
    want, last = block.prefill(x)
    for cuts in ([0, 1, 2, 11], [0, 5, 5, 11]):
        state, pieces = block.init_state(3), []
        for begin, end in zip(cuts, cuts[1:], strict=False):
            y, state = block.prefill(x[:, begin:end], state)
            pieces.append(y)
        close(torch.cat(pieces, 1).detach(), want.detach(), factor=8)
        for got, other in zip(state, last, strict=True):
            close(got.detach(), other.detach(), factor=8)
    state = tuple(block.init_state(3))  # a tuple will do
    for t in range(11):
        y, state = block.step(x[:, t], state)
        close(y.detach(), want[:, t].detach(), factor=8)
    for got, other in zip(state, last, strict=True):
        close(got.detach(), other.detach(), factor=8)


@pytest.mark.parametrize("padding", ["right", "left"])
@SOME
def test_padding(name, padding, generator):
    """Whatever stands in the padding, NaN included; the gradients as well."""
    block = make(name, generator)
    lengths = torch.tensor([11, 0, 2, 7])
    x = inputs(generator, B=4).requires_grad_()
    steps = torch.arange(11) if padding == "right" else 10 - torch.arange(11)
    valid = (steps < lengths[:, None])[..., None]
    padded = torch.where(valid, x, torch.nan)
    y, state = block.prefill(padded, None, lengths, padding)
    torch.testing.assert_close(block(padded, lengths, padding), y)
    assert (torch.where(valid, 0.0, y) == 0).all()
    loss = 0
    for row, length in enumerate(lengths.tolist()):
        part = slice(0, length) if padding == "right" else slice(11 - length, 11)
        want, want_state = block.prefill(x[row : row + 1, part])
        close(y[row : row + 1, part].detach(), want.detach(), factor=8)
        for got, other in zip(state, want_state, strict=True):
            close(got[row : row + 1].detach(), other.detach(), factor=8)
        loss = loss + want.square().sum() + sum(s.sin().sum() for s in want_state)
    mine = y.square().sum() + sum(s.sin().sum() for s in state)
    variables = [x, *block.parameters()]
    wants = torch.autograd.grad(loss, variables)
    for g, w in zip(torch.autograd.grad(mine, variables), wants, strict=True):
        close(g, w, grad=True, factor=8)
    layer = block.xlstm if hasattr(block, "xlstm") else block.mlstm_layer
    alone = layer(padded, lengths, padding)
    assert (torch.where(valid, 0.0, alone) == 0).all() and alone.isfinite().all()


def test_padding_after_a_state(generator):
    block, x = make("block", generator), inputs(generator)
    before, lengths = block.prefill(x)[1], torch.tensor([3, 0, 11])
    _, state = block.prefill(x, before, lengths)
    for row, length in enumerate(lengths.tolist()):
        _, want = block.prefill(x[row : row + 1, :length], [s[row : row + 1] for s in before])
        for got, other in zip(state, want, strict=True):
            close(got[row : row + 1].detach(), other.detach(), factor=8)


# ---- dtypes, TorchScript, torch.compile ----
@SOME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype, generator):
    block, x = make(name, generator), inputs(generator)
    want = block(x)
    got, state = block.to(dtype).prefill(x.to(dtype))
    assert got.dtype is dtype and all(s.dtype is torch.float32 for s in state)
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.1)
    y, state = block.step(x[:, 0].to(dtype), block.init_state(3))
    assert y.dtype is dtype and all(s.dtype is torch.float32 for s in state)
    torch.testing.assert_close(y.double(), want[:, 0], rtol=0.05, atol=0.1)


@SOME
def test_autocast(name, generator):
    block, x = make(name, generator, torch.float32), inputs(generator, dtype=torch.float32)
    want, want_state = block.prefill(x)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = block.prefill(x)
        y, after = block.step(x[:, 0], block.init_state(3))
    assert all(s.dtype is torch.float32 for s in (*state, *after))
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.1)
    torch.testing.assert_close(y.float(), want[:, 0], rtol=0.05, atol=0.1)
    torch.testing.assert_close(state[-3], want_state[-3], rtol=0.1, atol=0.1)
    got.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


@KINDS
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted(name, generator):
    block, x = make(name, generator), inputs(generator)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(block), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    torch.testing.assert_close(scripted(x), block(x))
    lengths = torch.tensor([4, 0, 9])
    torch.testing.assert_close(scripted(x, lengths, "left"), block(x, lengths, "left"))
    _, state = scripted.prefill(x, scripted.init_state(3), lengths)
    torch.testing.assert_close(state, block.prefill(x, None, lengths)[1])
    torch.testing.assert_close(scripted.step(x[:, 0], state), block.step(x[:, 0], state))
    with pytest.raises(torch.jit.Error, match=r"state\[0\] has shape \(3, .*expected"):
        scripted.step(x[:2, 0], state)


@pytest.mark.slow
@SOME
def test_compiled(name, generator):
    """No graph break, and one compilation for every batch and length."""
    block = make(name, generator, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    training = name.startswith("large")  # both would take long
    with torch._dynamo.config.patch(error_on_recompile=True), torch.set_grad_enabled(training):
        for B, T in ((3, 11), (5, 9)):
            x = inputs(generator, B, T, torch.float32)
            got, want = compiled(x), block(x)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            if training:
                parameters = list(block.parameters())
                got = torch.autograd.grad(got.square().sum(), parameters)
                want = torch.autograd.grad(want.square().sum(), parameters)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    step = torch.compile(block.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        state = block.init_state(5)
        torch.testing.assert_close(step(x[:, 0], state), block.step(x[:, 0], state))


def test_dropout(generator):
    block = torch_ext.mLSTMBlock(embedding_dim=D, dropout=0.5)
    x = inputs(generator, dtype=torch.float32)
    added = block(x) - x
    assert 0.3 < float((added == 0).float().mean()) < 0.7
    assert (block.eval()(x) != x).all()


def test_activation_checkpointing(generator):
    torch.manual_seed(0)
    stack = shake(
        torch_ext.xLSTMBlockStack(mlstm_block={"mlstm": SMALL}, num_blocks=2, embedding_dim=D),
        generator,
    ).double()
    x, parameters = inputs(generator), list(stack.parameters())
    lengths = torch.tensor([11, 3, 6])
    want = torch.autograd.grad(stack(x, lengths).sin().sum(), parameters)
    stack.activation_checkpointing = True
    got = torch.autograd.grad(stack(x, lengths).sin().sum(), parameters)
    torch.testing.assert_close(got, want)


# ---- the package xlstm ----
@pytest.fixture(scope="module")
def peer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("xlstm")
    if module.__version__.endswith("torch.ext"):
        pytest.skip("xlstm is ours")
    return module


@pytest.mark.parametrize("bias", [False, True])
def test_as_xlstm(bias, peer, generator):
    """Outputs, gradients, and states handed over in both directions."""
    config = peer.mLSTMLayerConfig(
        embedding_dim=32, num_heads=2, context_length=11, bias=bias, proj_factor=1.3
    )
    config = peer.mLSTMBlockConfig(mlstm=config, _num_blocks=1)
    theirs = shake(peer.mLSTMBlock(config), generator).double()
    ours = torch_ext.mLSTMBlock(config).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 11, 32, generator=generator, dtype=torch.float64)
    want, got = theirs(x), ours(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # eps stands elsewhere
    parameters = dict(ours.named_parameters())
    grads = torch.autograd.grad(got.sin().sum(), list(parameters.values()))
    wants = torch.autograd.grad(want.sin().sum(), [p for _, p in theirs.named_parameters()])
    wants = dict(zip((k for k, _ in theirs.named_parameters()), wants, strict=True))
    for key, g in zip(parameters, grads, strict=True):
        torch.testing.assert_close(g, wants[key], rtol=1e-4, atol=1e-4, msg=key)

    y, state = ours.prefill(x[:, :5])
    conv, C, n, m = (s.detach() for s in state)
    conv = torch.nn.functional.pad(conv, (1, 0)).mT.clone()
    handed = {"mlstm_state": (C, n[..., None], m[..., None, None]), "conv_state": (conv,)}
    with torch.no_grad():
        for t in range(5, 8):
            y, handed = theirs.step(x[:, t : t + 1], **handed)
            close(y[:, 0], got[:, t].detach(), factor=8)
        C, n, m = handed["mlstm_state"]
        state = [handed["conv_state"][0][:, 1:].mT, C, n[..., 0], m[..., 0, 0]]
        for t in range(8, 11):
            y, state = ours.step(x[:, t], state)
            close(y, got[:, t].detach(), factor=8)


# ---- mistakes ----
def test_errors(generator):
    block, large, x = make("block", generator), make("large", generator), inputs(generator)
    state, one = block.init_state(3), torch.tensor([1, 2, 3])
    layer, make_large = torch_ext.mLSTMLayer, torch_ext.xLSTMLargeBlock
    stack = torch_ext.xLSTMBlockStack
    for call, message in (
        (
            lambda: block(x[0]),
            r"mLSTMBlock: x has shape \(11, 8\), expected \(B, T, embedding_dim=8",
        ),
        (lambda: block.xlstm(x[..., :3]), r"mLSTMLayer: x has shape \(3, 11, 3\), expected"),
        (lambda: block.step(x, state), r"mLSTMBlock.step: x has shape \(3, 11, 8\), expected \(B,"),
        (
            lambda: block.step(x[:2, 0], state),
            r"state\[0\] has shape \(3, 16, 3\), expected the con",
        ),
        (
            lambda: large.prefill(x, [*large.init_state(3)[:2], x]),
            r"xLSTMLargeLayer: state\[2\] has shape \(3, 11, 8\), expected m of shape \(3, 2\)",
        ),
        (lambda: block(x, one[:2]), r"lengths has shape \(2\), expected \(B=3,\)"),
        (lambda: large(x, one + 9), "lengths has values from 10 to 12, expected 0 to T=11"),
        (lambda: block(x, one, "top"), 'padding is "top"'),
        (lambda: block.prefill(x, state, one, "left"), "mLSTMLayer.prefill: state is given"),
        (
            lambda: large.prefill(x, large.init_state(3), one, "left"),
            "Layer.prefill: state is given",
        ),
        (lambda: layer(), "mLSTMLayer: embedding_dim is -1, expected at least 1"),
        (lambda: layer(embedding_dim=8, num_heads=0), "num_heads is 0, expected at least 1"),
        (
            lambda: layer(embedding_dim=8, num_heads=3),
            "num_heads is 3, expected a divisor of the 64",
        ),
        (
            lambda: layer(embedding_dim=8, qkv_proj_blocksize=5),
            "blocksize is 5, expected a divisor",
        ),
        (lambda: layer(embedding_dim=8, conv1d_kernel_size=0), "conv1d_kernel_size is 0"),
        (lambda: layer(embedding_dim=8, proj_factor=0), "proj_factor is 0, expected at least one"),
        (
            lambda: make_large(embedding_dim=8, num_heads=3),
            "qk_dim_factor is 0.5, expected a multip",
        ),
        (lambda: make_large(embedding_dim=8, num_heads=0), "num_heads is 0, expected at least 1"),
        (
            lambda: make_large(embedding_dim=8, num_heads=2, weight_mode="both"),
            'weight_mode is \'both\', expected "single" or "fused"',
        ),
        (lambda: stack(mlstm_block={}, num_blocks=0), "num_blocks is 0, expected at least 1"),
        (lambda: stack(mlstm_block={}, slstm_at=[3]), r"slstm_at is \[3\], expected numbers of bl"),
        (
            lambda: stack(mlstm_block={}).step(x[:, 0], []),
            "state has 0 entries, expected num_blocks",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (lambda: block(x, torch.ones(3)), "lengths has dtype torch.float32"),
        (lambda: block(x, [1, 2, 3]), "mLSTMBlock: lengths is list, expected a tensor of integers"),
        (
            lambda: block.step(x[:, 0], state[:3]),
            r"state is \[Tensor, Tensor, Tensor\], expected a",
        ),
        (lambda: block.step(x[:, 0], x), "state is Tensor, expected a list of 4 tensors"),
        (lambda: layer(embedding_dim=8, heads=2), "mLSTMLayer has 'heads', expected some of"),
        (lambda: layer({"embedding": 8}), "mLSTMLayer: config has 'embedding', expected some of"),
        (lambda: layer(8), "config is int, expected a mLSTMLayerConfig, a mapping"),
        (lambda: make_large(embedding_dim=8), "xLSTMLargeBlock: num_heads is missing"),
        (lambda: stack(mlstm_block={}).step(x[:, 0], x), "state is Tensor, expected a list with"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    for options, place in (({"slstm_at": [1]}, 1), ({"slstm_at": "all"}, 0)):
        with pytest.raises(
            NotImplementedError, match=rf"blocks.{place} is an sLSTM block.*slstm_at"
        ):
            stack(mlstm_block={}, num_blocks=2, **options)
    with pytest.raises(NotImplementedError, match="blocks.0 is an sLSTM block.*mlstm_block=None"):
        stack(slstm_block={})


def test_examples():
    names = {"torch": torch, "torch_ext": torch_ext}
    result = doctest.testmod(xlstm, extraglobs=names)
    assert result.failed == 0 and result.attempted > 10
