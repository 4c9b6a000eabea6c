"""xLSTM's layers and blocks: against their formulas in plain PyTorch and the package xlstm, in one
call, in chunks and in steps."""

import doctest
import importlib
import io
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import close

import torch_ext
from torch_ext import xlstm, xlstm_slstm

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


def slstm_layer_formula(layer, x, clip=None):
    """The paper's, figure 10: before the norm, ``(B, T, H, K)``, and the states. ``clip`` bounds the
    gradient on its way back through the recurrent kernel."""
    B, T, D = x.shape
    H = layer.config.num_heads
    c = x
    if layer.config.conv1d_kernel_size > 0:
        conv = layer.conv1d.conv
        c = F.conv1d(x.mT, conv.weight, conv.bias, padding=conv.weight.shape[2] - 1, groups=D)
        c = F.silu(c[:, :, :T]).mT
    # The module fgate makes the input gate, igate the forget gate.
    gates = [(layer.fgate, c), (layer.igate, c), (layer.zgate, x), (layer.ogate, x)]
    gates = [(x @ torch.block_diag(*gate.weight).T).view(B, T, H, D // H) for gate, x in gates]
    kernel, bias = layer.slstm_cell._recurrent_kernel_, layer.slstm_cell._bias_
    if layer.config.backend == "cuda":  # (H, in, G, out) and (H, G, K)
        R = torch.stack([kernel.view(H, D // H, 4, D // H)[:, :, g].mT for g in range(4)])
        bias = torch.stack([bias.view(H, 4, D // H)[:, g] for g in range(4)])
    else:  # (H, G, out, in) and (G, H, K)
        R = torch.stack([kernel.view(H, 4, D // H, D // H)[:, g] for g in range(4)])
        bias = bias.view(4, H, D // H)
    h, c, n, m = (x.new_zeros(B, H, D // H) for _ in range(4))
    outputs = []
    for t in range(T):
        u = h.clone()
        if clip is not None and u.requires_grad:
            u.register_hook(lambda g: g.clamp(-clip, clip))
        a = torch.einsum("ghkp,bhp->gbhk", R, u)
        i, f, z, o = (gates[g][:, t] + a[g] + bias[g] for g in range(4))
        kept = F.logsigmoid(f) + m
        m = i if t == 0 else torch.maximum(i, kept)
        i, f = torch.exp(i - m), torch.exp(kept - m) * (t > 0)
        c, n = f * c + i * torch.tanh(z), f * n + i
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    return torch.stack(outputs, 1), [h, c, n, m]


def head_norm(layer, h):
    h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, False, keepdim=True) + 1e-5)
    h = h.flatten(-2)
    return h if layer.group_norm.weight is None else h * (1 + layer.group_norm.weight)


ACTIVATIONS = {
    "gelu": F.gelu,
    "relu": F.relu,
    "relu^2": lambda x: F.relu(x) ** 2,
    "sigmoid": torch.sigmoid,
    "swish": lambda x: x * torch.sigmoid(x),
    "selu": F.selu,
}


def slstm_block_formula(block, x):
    normed = F.layer_norm(x, x.shape[-1:], 1 + block.xlstm_norm.weight, None, 1e-5)
    h, state = slstm_layer_formula(block.xlstm, normed)
    x = x + head_norm(block.xlstm, h)
    config = block.config.feedforward
    if config is not None:
        normed = F.layer_norm(x, x.shape[-1:], 1 + block.ffn_norm.weight, None, 1e-5)
        gate, up = block.ffn.proj_up(normed).chunk(2, -1)
        x = x + block.ffn.proj_down(ACTIVATIONS[config.act_fn](gate) * up)
    return x, state


def formula_of(block):
    if isinstance(block, torch_ext.sLSTMBlock):
        return slstm_block_formula
    return block_formula if isinstance(block, torch_ext.mLSTMBlock) else large_block_formula


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


SMALL = {"round_proj_up_to_multiple_of": 8}
BLOCKS = {
    "block": (torch_ext.mLSTMBlock, {"num_heads": 2}),
    "block-bias": (torch_ext.mLSTMBlock, {"num_heads": 4, "bias": True}),
    "block-conv1": (
        torch_ext.mLSTMBlock,
        {"num_heads": 1, "conv1d_kernel_size": 1, "qkv_proj_blocksize": 8, "proj_factor": 1.0},
    ),
    "large": (torch_ext.xLSTMLargeBlock, {"num_heads": 2}),
    "large-bias": (
        torch_ext.xLSTMLargeBlock,
        {"num_heads": 2, "use_bias": True, "qk_dim_factor": 1.0, "v_dim_factor": 1.5, "eps": 1e-3},
    ),
    "large-fused": (
        torch_ext.xLSTMLargeBlock,
        {"num_heads": 1, "weight_mode": "fused", "use_bias": True, "gate_soft_cap": 2.0},
    ),
    "large-sigmoid": (
        torch_ext.xLSTMLargeBlock,
        {"num_heads": 2, "gate_soft_cap": None}
        | {"chunkwise_kernel": "parallel--native_siging_autograd"},
    ),
    "slstm": (torch_ext.sLSTMBlock, {"num_heads": 2, "feedforward": SMALL}),
    "slstm-bias": (
        torch_ext.sLSTMBlock,
        {"num_heads": 1, "backend": "vanilla", "conv1d_kernel_size": 2}
        | {"feedforward": SMALL | {"bias": True, "act_fn": "relu^2"}},
    ),
    "slstm-bare": (
        torch_ext.sLSTMBlock,
        {"num_heads": 4, "conv1d_kernel_size": 0, "group_norm_weight": False, "feedforward": None},
    ),
}
KINDS = pytest.mark.parametrize("name", BLOCKS)
SOME = pytest.mark.parametrize("name", ["block-bias", "large-bias", "slstm-bias"])


def shake(module, generator):
    """Gates, norms and biases that do something."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "gate" in name and name.endswith("weight") and "proj_up" not in name:
                if "ogate" not in name:
                    p.add_(noise / p.shape[-1] ** 0.5)
            elif "slstm_cell" in name:
                p.add_(noise)
            elif "norm" in name or name.endswith("bias") or "skip" in name:
                p.add_(noise / 4)
    return module


def make(name, generator, dtype=torch.float64):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    kind, options = BLOCKS[name]
    rounded = {
        torch_ext.mLSTMBlock: SMALL,
        torch_ext.xLSTMLargeBlock: {"ffn_round_up_to_multiple_of": 8},
        torch_ext.sLSTMBlock: {},
    }[kind]
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


@pytest.mark.parametrize("backend", ["cuda", "vanilla"])
def test_parameters_of_the_slstm_block(backend, seed):
    torch.manual_seed(seed)
    block = torch_ext.sLSTMBlock(embedding_dim=96, num_heads=4, backend=backend)
    assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == {
        "xlstm.conv1d.conv.weight": (96, 1, 4), "xlstm.conv1d.conv.bias": (96,),
        "xlstm.fgate.weight": (4, 24, 24), "xlstm.igate.weight": (4, 24, 24),
        "xlstm.zgate.weight": (4, 24, 24), "xlstm.ogate.weight": (4, 24, 24),
        "xlstm.slstm_cell._recurrent_kernel_": (4, 24, 96) if backend == "cuda" else (4, 96, 24),
        "xlstm.slstm_cell._bias_": (384,),
        "xlstm.group_norm.weight": (96,), "xlstm_norm.weight": (96,), "ffn_norm.weight": (96,),
        "ffn.proj_up.weight": (256, 96), "ffn.proj_down.weight": (96, 128),
    }  # fmt: skip
    layer, small = block.xlstm, (2 / (5 * 96)) ** 0.5
    for p in (layer.igate.weight, layer.zgate.weight, block.ffn.proj_up.weight):
        assert 0.9 * small < float(p.detach().std()) < 1.1 * small
    for p in (layer.group_norm.weight, block.ffn_norm.weight, layer.slstm_cell._recurrent_kernel_):
        assert (p == 0).all()
    assert 0.95 < float(block.ffn.proj_down.weight.detach().std()) / (2 / 96**0.5) < 1.05

    def biases(**options):
        layer = torch_ext.sLSTMLayer(embedding_dim=96, num_heads=4, backend=backend, **options)
        bias = layer.slstm_cell._bias_.detach()
        return bias.view(4, 4, 24).transpose(0, 1) if backend == "cuda" else bias.view(4, 4, 24)

    place = torch.arange(24) / 23
    for k, exponent in enumerate((0.3, 0.95, 1.6)):
        bias = biases(_block_idx=k, _num_blocks=3)
        torch.testing.assert_close(bias[1], (5 - 12 * place**exponent).expand(4, 24))
        assert (bias[[0, 2, 3]] == 0).all()
    assert (biases(bias_init="zeros") == 0).all()
    bias = biases(bias_init="small_init")
    torch.testing.assert_close(bias[1], torch.linspace(3, 6, 24).expand(4, 24))
    assert (bias[[0, 2, 3]] == 0).all()
    layer = torch_ext.sLSTMLayer(
        embedding_dim=96, recurrent_weight_init="standard", backend=backend
    )
    for p in (biases(bias_init="standard"), layer.slstm_cell._recurrent_kernel_):
        assert 0.95 * 96**-0.5 < float(p.detach().abs().max()) <= 96**-0.5
    # One unit in each head, of which the formula says nothing.
    one = torch_ext.sLSTMLayer(embedding_dim=4, num_heads=4, backend=backend).slstm_cell._bias_
    assert one.detach().view(4, 4).sum().item() == 20 and one.max() == 5


def test_slstm_layouts(generator):
    """Either layout loads into a layer of either, and means the same there."""
    options = {"embedding_dim": D, "num_heads": 2, "recurrent_weight_init": "standard"}
    cuda = shake(torch_ext.sLSTMLayer(**options), generator).double()
    vanilla = torch_ext.sLSTMLayer(**options, backend="vanilla").double()
    before = {key: value.clone() for key, value in cuda.state_dict().items()}
    vanilla.load_state_dict(cuda.state_dict())
    x = inputs(generator)
    torch.testing.assert_close(vanilla(x), cuda(x))
    kernel, bias = vanilla.slstm_cell._recurrent_kernel_, vanilla.slstm_cell._bias_
    assert not torch.equal(bias, before["slstm_cell._bias_"])
    for g in range(4):
        for h in range(2):
            assert torch.equal(
                bias.view(4, 2, 4)[g, h], before["slstm_cell._bias_"].view(2, 4, 4)[h, g]
            )
            assert torch.equal(
                kernel.view(2, 4, 4, 4)[h, g],
                before["slstm_cell._recurrent_kernel_"].view(2, 4, 4, 4)[h, :, g].T,
            )
    for other in (torch_ext.sLSTMLayer(**options), torch_ext.sLSTMBlock(**options).xlstm):
        other = other.double()
        other.load_state_dict(vanilla.state_dict())  # back
        for key, value in other.state_dict().items():
            assert torch.equal(value, before[key]), key
    given = vanilla.state_dict()
    cuda.load_state_dict(given)
    assert given["slstm_cell._recurrent_kernel_"].shape == (2, 16, 4)  # the caller's as it was
    # The same numbers are drawn for both.
    layers = []
    for backend in ("cuda", "vanilla"):
        torch.manual_seed(0)
        options = {"embedding_dim": D, "bias_init": "standard", "recurrent_weight_init": "standard"}
        layers.append(torch_ext.sLSTMLayer(backend=backend, **options).double())
    torch.testing.assert_close(layers[0](x), layers[1](x))
    with pytest.raises(RuntimeError, match="size mismatch for slstm_cell._recurrent_kernel_"):
        cuda.load_state_dict(before | {"slstm_cell._recurrent_kernel_": torch.ones(2, 4, 15)})


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
        lambda **o: torch_ext.sLSTMBlock(
            embedding_dim=16, bias_init="standard", recurrent_weight_init="standard", **o
        ),
        lambda **o: torch_ext.sLSTMBlock(embedding_dim=16, feedforward={"bias": True}, **o),
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
    mixed = {"mlstm_block": {}, "slstm_block": {"slstm": {"num_heads": 2}, "feedforward": {}}}
    mixed = torch_ext.xLSTMBlockStack(
        mixed, slstm_at=[0, 2], num_blocks=3, embedding_dim=16, dropout=0.5, bias=True
    )
    assert mixed.config.block_map == [1, 0, 1]
    first, _, last = mixed.blocks
    assert [b.xlstm.config._block_idx for b in (first, last)] == [0, 2]
    assert last.xlstm.config._num_blocks == 3 and last.ffn.config._num_blocks == 3
    assert last.xlstm.dropout.p == 0.5 and last.ffn.dropout.p == 0 and last.ffn.proj_up.bias is None
    assert last.xlstm.config.hidden_size == last.ffn.config.embedding_dim == 16
    for options in ({"slstm_at": "all", "mlstm_block": {}}, {}):
        all_slstm = torch_ext.xLSTMBlockStack(slstm_block={}, num_blocks=2, **options)
        assert [type(block) for block in all_slstm.blocks] == [torch_ext.sLSTMBlock] * 2
    layer = torch_ext.sLSTMLayer(SimpleNamespace(embedding_dim=16, num_heads=2), backend="vanilla")
    assert torch_ext.sLSTMLayer(layer.config).config == layer.config
    block = torch_ext.sLSTMBlock({"slstm": layer.config, "feedforward": None}, _num_blocks=3)
    assert block.xlstm.config.backend == "vanilla" and not hasattr(block, "ffn")
    assert torch_ext.sLSTMBlock(block.config).config == block.config
    assert isinstance(
        torch_ext.xLSTMBlockStack(stack.config, add_post_blocks_norm=False).post_blocks_norm,
        torch.nn.Identity,
    )


# ---- values ----
@KINDS
def test_formula(name, generator):
    block, x = make(name, generator), inputs(generator)
    y, state = block.prefill(x)
    want, want_state = formula_of(block)(block, x)
    close(y.detach(), want.detach(), factor=8)
    for got, other in zip(state[-len(want_state) :], want_state, strict=True):
        close(got.detach(), other.detach(), factor=8)
    torch.testing.assert_close(block(x), y, rtol=0, atol=0)
    parameters = list(block.parameters())
    got = torch.autograd.grad(block(x).sin().sum(), parameters)
    wants = torch.autograd.grad(want.sin().sum(), parameters)
    factor = 256 if name.startswith("slstm") else 32  # rounding comes back through R in each step
    for (key, _), g, w in zip(block.named_parameters(), got, wants, strict=True):
        close(g, w, grad=True, name=key, factor=factor)


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


@pytest.mark.parametrize("name", ["block", "slstm"])
def test_gradients_through_states(name, generator):
    """In two halves, the second one by chunk or by steps, as in one call."""
    block, x = make(name, generator), inputs(generator).requires_grad_()
    variables = [x, *block.parameters()]
    want, last = block.prefill(x)
    loss = want.sin().sum() + sum(s.cos().sum() for s in last)
    wants = torch.autograd.grad(loss, variables)
    for steps in (False, True):
        first, state = block.prefill(x[:, :5])
        if steps:
            pieces = [first]
            for t in range(5, 11):
                y, state = block.step(x[:, t], state)
                pieces.append(y[:, None])
        else:
            second, state = block.prefill(x[:, 5:], state)
            pieces = [first, second]
        loss = torch.cat(pieces, 1).sin().sum() + sum(s.cos().sum() for s in state)
        for g, w in zip(torch.autograd.grad(loss, variables), wants, strict=True):
            close(g, w, grad=True, factor=256)


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


@pytest.mark.parametrize("name", ["block", "slstm"])
def test_padding_after_a_state(name, generator):
    block, x = make(name, generator), inputs(generator)
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
    training = not name.startswith("block")  # all would take long
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


def test_slstm_dropout(generator, seed):
    """Between cell and norm, as in the package; none in evaluation."""
    layer = shake(
        torch_ext.sLSTMLayer(embedding_dim=D, num_heads=2, dropout=0.5), generator
    ).double()
    x = inputs(generator)
    torch.manual_seed(seed)
    got = layer(x)
    h = slstm_layer_formula(layer, x)[0]
    torch.manual_seed(seed)
    torch.testing.assert_close(got, head_norm(layer, F.dropout(h, 0.5)))
    torch.testing.assert_close(layer.eval()(x), head_norm(layer, h))


@pytest.mark.parametrize(
    "options", [{"gradient_recurrent_cut": True}, {"gradient_recurrent_clipval": 0.05}], ids=str
)
def test_slstm_gradient_clip(options, generator):
    layer = torch_ext.sLSTMLayer(embedding_dim=D, num_heads=2, **options)
    layer, x = shake(layer, generator).double(), inputs(generator)
    clip = options.get("gradient_recurrent_clipval", 0.0)
    parameters = list(layer.parameters())

    def gradients(y):
        return torch.autograd.grad(y.sin().sum(), parameters)

    exact = gradients(head_norm(layer, slstm_layer_formula(layer, x)[0]))
    wants = gradients(head_norm(layer, slstm_layer_formula(layer, x, clip)[0]))
    for got, want in zip(gradients(layer(x)), wants, strict=True):
        close(got, want, grad=True, factor=256)
    assert any(not torch.allclose(w, e, rtol=1e-3) for w, e in zip(wants, exact, strict=True))


@pytest.mark.parametrize("slstm_at", [[], [1]])
def test_activation_checkpointing(slstm_at, generator):
    torch.manual_seed(0)
    stack = torch_ext.xLSTMBlockStack(
        mlstm_block={"mlstm": SMALL}, slstm_block={"slstm": {"num_heads": 2}}, slstm_at=slstm_at,
        num_blocks=2, embedding_dim=D,
    )  # fmt: skip
    stack = shake(stack, generator).double()
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


def make_theirs(peer, block=False, **options):
    """Their sLSTM layer, with a recurrent kernel that is not zero, or their block."""
    options = {"backend": "vanilla", "dtype": "float32", "embedding_dim": 8} | options
    feedforward = options.pop("feedforward", {})
    config = peer.sLSTMLayerConfig(**options)
    if not block:
        return peer.sLSTMLayer(config)
    if feedforward is not None:
        feedforward = peer.FeedForwardConfig(**(SMALL | feedforward))
    return peer.sLSTMBlock(
        peer.sLSTMBlockConfig(slstm=config, feedforward=feedforward, _num_blocks=1, _block_idx=0)
    )


def equal_gradients(got, want, ours, theirs):
    parameters = dict(ours.named_parameters())
    assert list(theirs.state_dict()) and set(parameters) == {
        k for k, _ in theirs.named_parameters()
    }
    grads = torch.autograd.grad(got.sin().sum(), list(parameters.values()))
    grads = dict(zip(parameters, grads, strict=True))
    wants = torch.autograd.grad(want.sin().sum(), list(theirs.parameters()))
    for (key, _), w in zip(theirs.named_parameters(), wants, strict=True):
        close(grads[key], w, grad=True, name=key, factor=256)


@pytest.mark.parametrize(
    "T, options",
    [
        (200, {"num_heads": 2}),
        (200, {"num_heads": 1, "feedforward": {"act_fn": "swish", "bias": True}}),
        (33, {"num_heads": 4, "conv1d_kernel_size": 2, "feedforward": {"act_fn": "relu^2"}}),
        (17, {"num_heads": 2, "conv1d_kernel_size": 0, "feedforward": {"act_fn": "selu"}}),
        (3, {"num_heads": 2, "group_norm_weight": False, "feedforward": {"act_fn": "sigmoid"}}),
        (2, {"num_heads": 2, "bias_init": "standard", "feedforward": {"act_fn": "relu"}}),
        (1, {"num_heads": 1, "bias_init": "small_init", "feedforward": None}),
    ],
    ids=str,
)
def test_slstm_as_xlstm(T, options, peer, generator):
    """Outputs and gradients, from a checkpoint in the layout of either of its backends."""
    theirs = shake(make_theirs(peer, block=True, **options), generator).double()
    x = torch.randn(2, T, 8, generator=generator, dtype=torch.float64)
    want = theirs(x)
    ours = torch_ext.sLSTMBlock(theirs.config).double()
    ours.load_state_dict(theirs.state_dict())
    got = ours(x)
    close(got.detach(), want.detach(), factor=8)
    if T > 1:  # after one step c / n is tanh(z): those of i and f are nothing but rounding
        equal_gradients(got, want, ours, theirs)
    # Their other backend's parameters, as it computes them from what both have in common.
    cell, module = theirs.xlstm.slstm_cell, importlib.import_module("xlstm.blocks.slstm.cell")
    other, content = module.sLSTMCell_cuda, theirs.state_dict()
    kernel = cell._recurrent_kernel_int2ext(cell._recurrent_kernel_)
    place = "xlstm.slstm_cell."
    content[place + "_recurrent_kernel_"] = other._recurrent_kernel_ext2int(cell, kernel)
    content[place + "_bias_"] = other._bias_ext2int(cell, cell._bias_int2ext(cell._bias_))
    K = 8 // options["num_heads"]
    assert content[place + "_recurrent_kernel_"].shape == (8 // K, K, 4 * K)
    cuda = torch_ext.sLSTMLayer(theirs.xlstm.config, backend="cuda").double()
    block = torch_ext.sLSTMBlock({"slstm": cuda.config, "feedforward": theirs.config.feedforward})
    for one in (ours, block.double()):
        one.load_state_dict(content)
        close(one(x).detach(), want.detach(), factor=8)
    for key, value in content.items():
        torch.testing.assert_close(block.state_dict()[key], value, rtol=0, atol=0)


def test_slstm_states_as_xlstm(peer, generator):
    """States handed over in both directions, where theirs are right."""
    theirs = shake(make_theirs(peer, num_heads=2), generator).double()
    ours = torch_ext.sLSTMLayer(theirs.config).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 11, 8, generator=generator, dtype=torch.float64)
    want = theirs(x)
    with torch.no_grad():
        _, state = ours.prefill(x[:, :5])
        cell = torch.stack([s.flatten(1) for s in state[1:]])
        conv = torch.nn.functional.pad(state[0], (1, 0)).mT.clone()
        handed = {"conv_state": (conv,), "slstm_state": cell}
        for t in range(5, 8):
            y, handed = theirs.step(x[:, t : t + 1], **handed)
            close(y[:, 0], want[:, t].detach(), factor=8)
        state = [handed["conv_state"][0][:, 1:].mT]
        state += [s.unflatten(1, (2, 4)) for s in handed["slstm_state"]]
        y, _ = ours.prefill(x[:, 8:], state)
        close(y, want[:, 8:].detach(), factor=8)


@pytest.mark.parametrize("bias_init", ["powerlaw_blockdependent", "small_init", "zeros"])
def test_slstm_initial_values_as_xlstm(bias_init, peer):
    for blocks, place in ((1, 0), (4, 0), (4, 2), (4, 3)):
        options = {"num_heads": 2, "embedding_dim": 16, "bias_init": bias_init}
        options |= {"_num_blocks": blocks, "_block_idx": place}
        theirs = make_theirs(peer, **options)
        theirs.reset_parameters()
        ours = torch_ext.sLSTMLayer(theirs.config)
        torch.testing.assert_close(ours.slstm_cell._bias_, theirs.slstm_cell._bias_)
        assert not theirs.slstm_cell._recurrent_kernel_.any()
        assert not ours.slstm_cell._recurrent_kernel_.any()
    theirs = make_theirs(
        peer, embedding_dim=256, bias_init="standard", recurrent_weight_init="standard"
    )
    ours = torch_ext.sLSTMLayer(theirs.config)
    theirs.reset_parameters()
    for key, value in theirs.state_dict().items():
        if "conv" not in key:
            mine = float(ours.state_dict()[key].std())
            assert abs(mine - float(value.std())) <= 0.06 * mine, key


@pytest.mark.parametrize("number", range(4))
def test_stacks_as_xlstm(number, peer, generator):
    """Random small configs, blocks of both kinds."""

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    blocks = draw(2, 3, 4)
    slstm_at = [k for k in range(blocks) if draw(True, False)] or [blocks - 1]
    slstm = peer.sLSTMLayerConfig(
        backend="vanilla", dtype="float32", num_heads=draw(1, 2, 4), conv1d_kernel_size=draw(0, 2, 4),
        bias_init=draw("powerlaw_blockdependent", "standard", "small_init"),
    )  # fmt: skip
    feedforward = peer.FeedForwardConfig(
        act_fn=draw("gelu", "swish"), proj_factor=draw(1.3, 2.0), bias=draw(True, False)
    )
    T = draw(5, 50, 120)
    mlstm = peer.mLSTMLayerConfig(num_heads=draw(1, 2), conv1d_kernel_size=draw(2, 4))
    config = peer.xLSTMBlockStackConfig(
        mlstm_block=peer.mLSTMBlockConfig(mlstm=mlstm), num_blocks=blocks, slstm_at=slstm_at,
        slstm_block=peer.sLSTMBlockConfig(slstm=slstm, feedforward=draw(feedforward, None)),
        embedding_dim=16, context_length=T, bias=draw(True, False),
        add_post_blocks_norm=draw(True, False),
    )  # fmt: skip
    print(config)
    theirs = shake(peer.xLSTMBlockStack(config), generator).double()
    ours = torch_ext.xLSTMBlockStack(config).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, T, 16, generator=generator, dtype=torch.float64)
    want, got = theirs(x), ours(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # mLSTM's eps stands elsewhere
    parameters = dict(ours.named_parameters())
    grads = torch.autograd.grad(got.sin().sum(), list(parameters.values()))
    grads = dict(zip(parameters, grads, strict=True))
    wants = torch.autograd.grad(want.sin().sum(), list(theirs.parameters()))
    for (key, _), w in zip(theirs.named_parameters(), wants, strict=True):
        torch.testing.assert_close(grads[key], w, rtol=1e-4, atol=1e-4, msg=key)


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
    slstm, slstm_block = torch_ext.sLSTMLayer, torch_ext.sLSTMBlock
    one_slstm, feedforward = make("slstm", generator), {"slstm": {"embedding_dim": 8}}
    for call, message in (
        (
            lambda: one_slstm(x[0]),
            r"sLSTMBlock: x has shape \(11, 8\), expected \(B, T, embedding_d",
        ),
        (lambda: one_slstm.xlstm(x[..., :3]), r"sLSTMLayer: x has shape \(3, 11, 3\), expected"),
        (lambda: one_slstm.step(x, state), r"sLSTMBlock.step: x has shape \(3, 11, 8\), expected"),
        (
            lambda: one_slstm.step(x[:2, 0], one_slstm.init_state(3)),
            r"sLSTMLayer: state\[0\] has shape \(3, 8, 3\), expected the con",
        ),
        (
            lambda: one_slstm.prefill(x, [*one_slstm.init_state(3)[:4], x]),
            r"sLSTMLayer: state\[4\] has shape \(3, 11, 8\), expected m of shape \(3, 2, 4\)",
        ),
        (
            lambda: one_slstm.prefill(x, one_slstm.init_state(3), one, "left"),
            "sLSTMLayer.prefill: state is given",
        ),
        (lambda: one_slstm(x, one + 9), "lengths has values from 10 to 12, expected 0 to T=11"),
        (lambda: slstm(), "sLSTMLayer: embedding_dim is -1, expected at least 1"),
        (lambda: slstm(embedding_dim=8, num_heads=0), "num_heads is 0, expected at least 1"),
        (lambda: slstm(embedding_dim=8, num_heads=3), "num_heads is 3, expected a divisor of emb"),
        (
            lambda: slstm(embedding_dim=8, conv1d_kernel_size=-1),
            "conv1d_kernel_size is -1, expected",
        ),
        (
            lambda: slstm(embedding_dim=8, backend="triton"),
            'backend is \'triton\', expected "cuda" or "vanilla"',
        ),
        (lambda: slstm(embedding_dim=8, function="lstm"), "function is 'lstm', expected \"slstm\""),
        (lambda: slstm(embedding_dim=8, bias_init="no"), "bias_init is 'no', expected \"powerlaw_"),
        (
            lambda: slstm(embedding_dim=8, recurrent_weight_init="no"),
            "weight_init is 'no', expected",
        ),
        (
            lambda: slstm(embedding_dim=8, forward_clipval=1.0),
            "forward_clipval is 1.0, expected None",
        ),
        (
            lambda: slstm(embedding_dim=8, gradient_recurrent_clipval=-1.0),
            "gradient_recurrent_clipval is -1.0, expected None or at least 0",
        ),
        (
            lambda: slstm_block(feedforward, feedforward={"act_fn": "no"}),
            r"sLSTMBlock: act_fn is 'no', expected some of \['gelu'",
        ),
        (
            lambda: slstm_block(feedforward, feedforward={"ff_type": "ffn"}),
            "ff_type is 'ffn', expected \"ffn_gated\"",
        ),
        (
            lambda: slstm_block(feedforward, feedforward={"proj_factor": 0.0}),
            "proj_factor is 0.0, expected at least one channel",
        ),
        (
            lambda: stack(mlstm_block={}, num_blocks=2, slstm_at=[1]),
            r"xLSTMBlockStack: slstm_block is None, expected the config of blocks.1, by slstm_at=\[1",
        ),
        (lambda: stack(num_blocks=2), r"slstm_block is None, .* blocks.0, by slstm_at=\[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (lambda: slstm(embedding_dim=8, heads=2), "sLSTMLayer has 'heads', expected some of"),
        (
            lambda: slstm_block(feedforward, feedforward={"factor": 2}),
            "sLSTMBlock: feedforward has 'factor', expected|feedforward: config has 'factor'",
        ),
        (
            lambda: one_slstm.step(x[:, 0], state),
            "state is .*, expected a list of 5 tensors",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_examples():
    names = {"torch": torch, "torch_ext": torch_ext}
    for module in (xlstm, xlstm_slstm):
        result = doctest.testmod(module, extraglobs=names)
        assert result.failed == 0 and result.attempted > 8
