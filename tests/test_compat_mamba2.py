"""mamba_ssm's Mamba-2 by its own names, and transformers' Mamba-2 models and hybrids on it."""

import importlib
import math
import subprocess
import sys

import pytest
import torch
from cases import close

import torch_ext
from torch_ext import compat
from torch_ext.compat.mamba_ssm import (
    InferenceParams,
    Mamba2,
    MambaConfig,
    MambaLMHeadModel,
    RMSNorm,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    rmsnorm_fn,
)

ROWS, L, H, P, G, N = 3, 13, 4, 3, 2, 5


def scan_arguments(generator, dtype=torch.float64):
    """All that the scan takes, in the peer's order up to D, then by name."""
    noise = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, dt = noise(ROWS, L, H, P), noise(ROWS, L, H)
    B, C, z = noise(ROWS, L, G, N), noise(ROWS, L, G, N), noise(ROWS, L, H, P)
    over_time = [t.to(dtype) for t in (x, dt, B, C, z)]
    x, dt, B, C, z = (t.requires_grad_() for t in over_time)
    wide = torch.promote_types(dtype, torch.float32)
    A = (-noise(H).exp()).to(wide).requires_grad_()
    D, dt_bias = (noise(H).to(wide).requires_grad_() for _ in range(2))
    states = noise(ROWS, H, P, N).to(wide).requires_grad_()
    options = {"D": D, "z": z, "dt_bias": dt_bias, "initial_states": states, "dt_softplus": True}
    return (x, dt, A, B, C), options


def plain_scan(x, dt, A, B, C, *, D=None, z=None, dt_bias=None, start=None, dt_softplus=False,
               limit=(0.0, math.inf)):  # fmt: skip
    """One sequence (L, ...), a loop over time, and the state after it."""
    dt = dt + (0 if dt_bias is None else dt_bias)
    dt = (torch.nn.functional.softplus(dt) if dt_softplus else dt).clamp(*limit)
    group = torch.arange(x.shape[1]) // (x.shape[1] // B.shape[1])
    S = x.new_zeros(*x.shape[1:], B.shape[2]) if start is None else start
    ys = []
    for t in range(len(x)):
        S = torch.exp(dt[t] * A)[:, None, None] * S
        S = S + (dt[t][:, None] * x[t])[..., None] * B[t, group][:, None]
        ys.append((S * C[t, group][:, None]).sum(-1))
    y = torch.stack(ys) if ys else x
    if D is not None:
        y = y + (D[:, None] if D.dim() == 1 else D) * x
    return y if z is None else y * z * torch.sigmoid(z), S


def plain(arguments, options, bounds, enters):
    """Row by row and sequence by sequence; ``bounds[b]`` has where they begin and end."""
    x, dt, A, B, C = arguments
    own = {k: v for k, v in options.items() if k in ("D", "dt_bias", "dt_softplus")}
    limit = options.get("dt_limit", (0.0, math.inf))
    states, z = options.get("initial_states"), options.get("z")
    ys, finals, every = [], [], []
    for b, cuts in enumerate(bounds):
        pieces = []
        for k in range(len(cuts) - 1):
            s = slice(cuts[k], cuts[k + 1])
            start = states[b] if states is not None and k == 0 and enters[b] else None
            y, final = plain_scan(
                x[b, s], dt[b, s], A, B[b, s], C[b, s], z=None if z is None else z[b, s],
                start=start, limit=limit, **own,
            )  # fmt: skip
            pieces.append(y)
            every.append(final)
        ys.append(torch.cat(pieces))
        finals.append(final)
    return torch.stack(ys), torch.stack(finals), torch.stack(every)


SEQ_IDX = torch.tensor([[0] * 4 + [1] * 9, [3] * 5 + [0] * 2 + [-1] * 6, [0] * 13])
BOUNDS = [[0, 4, 13], [0, 5, 7, 13], [0, 13]]


@pytest.mark.parametrize("seq_idx", [None, SEQ_IDX.int()], ids=["rows", "seq_idx"])
@pytest.mark.parametrize(
    "change",
    [{}, {"dt_limit": (0.4, 0.9)}, {"D": None, "z": None, "dt_bias": None, "initial_states": None}],
    ids=["all", "limit", "few"],
)
def test_chunk_scan(seq_idx, change, generator):
    """With all gradients, through the final states as well."""
    arguments, options = scan_arguments(generator)
    options |= change
    if seq_idx is None:
        bounds, enters = [[0, L]] * ROWS, [True] * ROWS
    else:
        bounds, enters = BOUNDS, [True, False, True]  # the state enters sequences that are 0
    want, want_final, _ = plain(arguments, options, bounds, enters)
    got, final = mamba_chunk_scan_combined(
        *arguments, 4, seq_idx=seq_idx, return_final_states=True, **options
    )
    close(got.detach(), want.detach())
    close(final.detach(), want_final.detach())
    alone = mamba_chunk_scan_combined(*arguments, chunk_size=8, seq_idx=seq_idx, **options)
    assert torch.equal(alone, got)
    leaves = [*arguments, *(v for v in options.values() if isinstance(v, torch.Tensor))]
    loss = lambda y, S: y.sin().sum() + S.square().sum()  # noqa: E731
    for g, w in zip(
        torch.autograd.grad(loss(got, final), leaves),
        torch.autograd.grad(loss(want, want_final), leaves),
        strict=True,
    ):
        close(g, w, grad=True)


@pytest.mark.parametrize("each", [False, True])
def test_chunk_scan_of_sequences_end_to_end(each, generator):
    arguments, options = scan_arguments(generator)
    options["D"] = torch.randn(H, P, generator=generator, dtype=torch.float64)
    arguments = tuple(t if t.dim() == 1 else t[:1] for t in arguments)
    options["z"] = options["z"][:1]
    cuts = torch.tensor([0, 4, 4, 13], dtype=torch.int32)
    want, _, every = plain(arguments, options | {"initial_states": None}, [cuts.tolist()], [False])
    if each:  # one for each sequence; the peer has one for the first
        x, dt, A, B, C = arguments
        starts, pieces = options["initial_states"], []
        own = {k: options[k] for k in ("D", "dt_bias", "dt_softplus")}
        for k, (begin, end) in enumerate([(0, 4), (4, 4), (4, 13)]):
            s = slice(begin, end)
            pieces.append(
                plain_scan(
                    x[0, s],
                    dt[0, s],
                    A,
                    B[0, s],
                    C[0, s],
                    z=options["z"][0, s],
                    start=starts[k],
                    **own,
                )  # fmt: skip
            )
        want = torch.cat([y for y, _ in pieces])[None]
        every = torch.stack([S for _, S in pieces])
    else:
        options["initial_states"] = None
    y, final, states = mamba_chunk_scan_combined(
        *arguments, 256, cu_seqlens=cuts, return_final_states=True, return_varlen_states=True,
        **options,
    )  # fmt: skip
    close(y.detach(), want.detach())
    close(states.detach(), every.detach())
    close(final.detach(), every[-1:].detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunk_scan_in_half_precision(dtype, generator):
    """Beside float32 parameters, step sizes of either dtype, and states that are float32."""
    (x, dt, A, B, C), options = scan_arguments(generator, dtype)
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    whole = [[0, L]] * ROWS
    for step in (dt, dt.float()):
        want, want_final, _ = plain(
            (x.double(), step.double(), A.double(), B.double(), C.double()), exact, whole,
            [True] * ROWS,
        )  # fmt: skip
        y, final = mamba_chunk_scan_combined(
            x, step, A, B, C, 64, return_final_states=True, **options
        )
        assert y.dtype == dtype and final.dtype == torch.float32
        limit = 4 * torch.finfo(dtype).eps * float(want.detach().abs().max())
        assert float((y.double() - want).detach().abs().max()) < limit
        close(final.double().detach(), want_final.detach(), dtype=torch.float32)


def test_bad_scans(generator):
    (x, dt, A, B, C), options = scan_arguments(generator)
    cases = [
        (lambda: mamba_chunk_scan_combined(x[0], dt, A, B, C, 4), r"x has shape .*expected \(B, L"),
        (lambda: mamba_chunk_scan_combined(x, dt[:, 1:], A, B, C, 4), "dt has shape .*L=13, H=4"),
        (lambda: mamba_chunk_scan_combined(x, dt, A, B, C[..., 1:], 4), "C has shape .*N=5"),
        (
            lambda: mamba_chunk_scan_combined(x, dt, A, B[:, :, [0] * 3], C[:, :, [0] * 3], 4),
            "B has G=3 groups, expected a number that divides H=4",
        ),
        (
            lambda: mamba_chunk_scan_combined(x, dt, A, B, C, 4, cu_seqlens=torch.tensor([0, 13])),
            "x has B=3, expected 1 with cu_seqlens",
        ),
        (
            lambda: mamba_chunk_scan_combined(x, dt, A, B, C, 4, return_varlen_states=True),
            "return_varlen_states is True, expected cu_seqlens",
        ),
        (
            lambda: mamba_chunk_scan_combined(x, dt, A, B, C, 4, seq_idx=SEQ_IDX[:2]),
            "seq_idx has shape .*B=3, L=13",
        ),
        (
            lambda: mamba_chunk_scan_combined(
                x, dt, A, B, C, 4, initial_states=options["initial_states"][:2]
            ),
            "initial_states has shape .*B=3, H=4, P=3, N=5",
        ),
    ]
    for call, text in cases:
        with pytest.raises(ValueError, match="mamba_chunk_scan_combined: " + text):
            call()


# ---- the layer and the model ----


def make_layer(generator, **options):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    layer = Mamba2(8, **{"d_state": 5, "headdim": 4, "layer_idx": 0, **options}).double()
    torch.nn.init.normal_(layer.dt_bias)
    return layer


LAYERS = [
    {"ngroups": 2},
    {"rmsnorm": False, "D_has_hdim": True},
    {"d_ssm": 8, "dt_limit": (0.3, 0.8), "norm_before_gate": True, "bias": True},
]


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_layer(options, generator):
    """Whole, from caches, by steps, several sequences in a row, and as the peer's fused function."""
    layer = make_layer(generator, **options)
    ours = torch_ext.Mamba2(8, d_state=5, headdim=4, **options).double()
    ours.load_state_dict(layer.state_dict())
    u = torch.randn(2, L, 8, generator=generator, dtype=torch.float64)
    want = ours(u)
    assert torch.equal(layer(u), want)
    assert torch.equal(layer(u.flatten(0, 1), seqlen=L), want.flatten(0, 1))

    params = InferenceParams(max_seqlen=L, max_batch_size=2)
    pieces = []
    with torch.no_grad():
        for steps in (6, 1, 2, 1, 3):
            at = params.seqlen_offset
            pieces.append(layer(u[:, at : at + steps], inference_params=params))
            params.seqlen_offset += steps
    close(torch.cat(pieces, 1), want.detach())
    conv, ssm = params.key_value_memory_dict[0]
    assert conv.shape == (2, layer.conv_dim, 4) and ssm.shape == (2, layer.nheads, 4, 5)
    close(conv, layer._conv_inputs(u)[:, -4:].mT.detach())
    conv, ssm = layer.allocate_inference_cache(2, L)
    y, conv2, ssm2 = layer.step(u[:, :1], conv, ssm)
    assert conv2 is conv and ssm2 is ssm and ssm.any()
    close(y.detach(), want[:, :1].detach())
    with pytest.raises(ValueError, match=r"Mamba2.step: ssm_state has shape"):
        layer.step(u[:, :1], conv, ssm[:, 1:])

    seq_idx = torch.tensor([[0] * 5 + [1] * 8, [0] * 9 + [1] * 4])
    parts = [layer(u[:1, :5]), layer(u[:1, 5:]), layer(u[1:, :9]), layer(u[1:, 9:])]
    separate = torch.cat(parts, 1).view(2, L, 8)
    close(layer(u, seq_idx=seq_idx).detach(), separate.detach())
    cuts = torch.tensor([0, 5, 13], dtype=torch.int32)
    close(layer(u[:1], cu_seqlens=cuts).detach(), separate[:1].detach())
    with pytest.raises(ValueError, match="inference_params is given, expected None beside"):
        layer(u, seq_idx=seq_idx, inference_params=params)

    def fused(seq_idx, **more):
        return mamba_split_conv1d_scan_combined(
            layer.in_proj(u), layer.conv1d.weight.squeeze(1), layer.conv1d.bias, layer.dt_bias,
            -layer.A_log.exp(), layer._skip(), 256, seq_idx=seq_idx, dt_limit=layer.dt_limit,
            rmsnorm_weight=None if layer.norm is None else layer.norm.weight, rmsnorm_eps=1e-5,
            outproj_weight=layer.out_proj.weight, outproj_bias=layer.out_proj.bias, headdim=4,
            ngroups=layer.ngroups, norm_before_gate=layer.norm_before_gate, **more,
        )  # fmt: skip

    y, final = fused(None, return_final_states=True)
    close(y.detach(), want.detach())
    close(final.detach(), ours.prefill(u)[1][1].detach())
    close(fused(seq_idx).detach(), separate.detach())


@pytest.mark.parametrize("before", [True, False])
def test_norm(before, generator):
    x, z = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    gate = z * torch.sigmoid(z)
    parts = (x if before else x * gate).unflatten(-1, (2, 3))
    parts = parts / (parts.square().mean(-1, keepdim=True) + 0.1).sqrt()
    want = parts.flatten(-2) * weight
    options = {"eps": 0.1, "group_size": 3, "norm_before_gate": before}
    close(rmsnorm_fn(x, weight, None, z, **options), want * (gate if before else 1))
    close(rmsnorm_fn(x, weight, bias, z, **options), (want + bias) * (gate if before else 1))
    whole = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    close(rmsnorm_fn(x, weight, None), whole * weight)
    norm = RMSNorm(6, **options).double()
    assert list(norm.state_dict()) == ["weight"]
    close(norm(x, z).detach(), rmsnorm_fn(x, torch.ones(6), None, z, **options))
    with pytest.raises(ValueError, match="group_size is 4, expected a number that divides D=6"):
        rmsnorm_fn(x, weight, None, group_size=4)
    with pytest.raises(ValueError, match=r"z has shape \(3, 5\), expected \(3, 6\)"):
        rmsnorm_fn(x, weight, None, z[:, 1:])


def test_model(generator):
    """mamba_ssm's language model: the same as MambaLM, from caches, and packed."""
    cfg = {"layer": "Mamba2", "d_state": 5, "headdim": 4, "ngroups": 2, "use_mem_eff_path": True}
    torch.manual_seed(1)
    model = MambaLMHeadModel(MambaConfig(d_model=8, n_layer=2, vocab_size=13, ssm_cfg=cfg))
    ours = torch_ext.MambaLM(13, 8, 2, ssm_cfg=cfg)
    ours.load_state_dict(model.state_dict())
    ids = torch.randint(0, 13, (2, L), generator=generator)
    want = ours(ids)
    assert torch.equal(model(ids).logits, want)
    params = InferenceParams(max_seqlen=L, max_batch_size=2)
    pieces = []
    for steps in (6, 1, 6):
        at = params.seqlen_offset
        pieces.append(model(ids[:, at : at + steps], inference_params=params).logits)
        params.seqlen_offset += steps
    torch.testing.assert_close(torch.cat(pieces, 1), want)
    assert torch.equal(model.generate(ids, L + 6), ours.generate(ids, 6, 0.0))
    seq_idx = torch.tensor([[0] * 5 + [1] * 8] * 2)
    separate = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], 1)
    torch.testing.assert_close(model(ids, seq_idx=seq_idx).logits, separate)
    torch.testing.assert_close(
        model(ids, seq_idx=seq_idx, num_last_tokens=2).logits, separate[:, -2:]
    )
    with pytest.raises(TypeError, match="Mamba-2 layers take no mask"):
        model(ids, mask=None)


# ---- transformers ----

SMALL = {"vocab_size": 37, "hidden_size": 16, "use_cache": True, "pad_token_id": 0}
SMALL |= {"bos_token_id": 1, "eos_token_id": None}
HYBRID = SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 4, "mamba_d_state": 5, "mamba_chunk_size": 4}
MODELS = {
    "mamba2": (
        "Mamba2",
        SMALL
        | {"num_heads": 8, "head_dim": 4, "n_groups": 2, "state_size": 5, "num_hidden_layers": 2}
        | {"chunk_size": 4, "use_bias": True},
    ),
    "bamba": (
        "Bamba",
        HYBRID | MAMBA | {"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_groups": 2},
    ),
    "falcon_h1": (
        "FalconH1",
        HYBRID | MAMBA | {"num_hidden_layers": 2, "mamba_d_ssm": 32, "head_dim": 8}
        | {"mamba_n_groups": 2},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        HYBRID | MAMBA | {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}
        | {"mamba_n_groups": 1, "num_local_experts": 0, "shared_intermediate_size": 24},
    ),
    "nemotron_h": (
        "NemotronH",
        HYBRID
        | {"hybrid_override_pattern": "M*M-", "num_hidden_layers": 4, "mamba_num_heads": 8}
        | {"mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 5, "chunk_size": 4, "head_dim": 8},
    ),
    "zamba2": (
        "Zamba2",
        HYBRID
        | {"num_key_value_heads": 2, "num_hidden_layers": 2, "n_mamba_heads": 8}
        | {"layers_block_type": ["mamba", "hybrid"], "mamba_headdim": 4, "mamba_ngroups": 2}
        | {"mamba_d_state": 5, "chunk_size": 4, "mamba_expand": 2, "num_mem_blocks": 1},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def helpers():
    pytest.importorskip("transformers")
    return importlib.import_module("test_compat_transformers")


@pytest.mark.parametrize("name", MODELS)
def test_transformers(name, helpers, generator, monkeypatch):
    """Logits and gradients in evaluation and in training on padded rows, and generated text, with
    its own code and with ours, which then runs once for each Mamba layer."""
    monkeypatch.setitem(helpers.CONFIGS, name, MODELS[name])
    model = helpers.make(name, generator)
    ids, mask = helpers.tokens(generator, padded=True)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def everything():
        results = []
        for training in (False, True):
            logits, *gradients = helpers.run(model, ids, mask, training)
            results += [logits[mask == 1], *gradients]
        with torch.no_grad():
            text = model.generate(ids, **options)
        return text.sequences, [*results, *text.logits]

    with helpers.Count() as count:
        want_text, want = everything()
    assert not count.calls
    with compat.patch_transformers(name) as patch, helpers.Count() as count:
        assert f"transformers.models.{name}.modeling_{name}.mamba2_chunk_scan" in patch.names
        got_text, got = everything()
    layers = sum(hasattr(m, "A_log") for m in model.modules())
    # Forward and backward twice, and a prefill; then a step for each token but the last.
    assert layers > 0 and count.calls["matrix_memory"] == 3 * layers, count.calls
    assert count.calls["matrix_memory_backward"] == 2 * layers
    assert torch.equal(got_text, want_text)
    helpers.same(got, want)


def test_transformers_compiles(helpers, generator, monkeypatch):
    """Without a graph break."""
    monkeypatch.setitem(helpers.CONFIGS, "mamba2", MODELS["mamba2"])
    model, (ids, _) = helpers.make("mamba2", generator), helpers.tokens(generator)
    called = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    want = helpers.run(model, ids, None, False)
    torch._dynamo.reset()
    with compat.patch_transformers("mamba2"):
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        got = helpers.run(compiled, ids, None, False)
    assert called.count("torch_ext.ssd") == called.count("torch_ext.causal_conv1d") == 2
    helpers.same(got, want)


def test_transformers_finds_the_stand_in(helpers, child_environment, tmp_path):
    """After install(), in a process in which transformers comes later, without patching."""
    program = """
from torch_ext import compat
compat.install("mamba_ssm", "causal_conv1d")
import mamba_ssm, torch
from mamba_ssm import Mamba2
from mamba_ssm.modules.mamba2 import Mamba2 as same
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm, rmsnorm_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
assert Mamba2 is same is compat.mamba_ssm.Mamba2
import test_compat_mamba2, test_compat_transformers as helpers
from transformers.models.mamba2 import modeling_mamba2 as module
generator = torch.Generator().manual_seed(0)
helpers.CONFIGS["mamba2"] = test_compat_mamba2.MODELS["mamba2"]
model = helpers.make("mamba2", generator)
ids, _ = helpers.tokens(generator)
def everything():
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    return [text.double(), *helpers.run(model, ids, None, False), *helpers.run(model, ids, None, True)]
with helpers.Count() as count:
    got = everything()
assert count.calls["matrix_memory"] == 6, count.calls
for name in test_compat_mamba2.compat._transformers_mamba2.FUNCTIONS:
    setattr(module, name, helpers.without_lookup(getattr(module, name)))
module.mamba2_split_conv1d_scan_combined = lambda *x, **y: None
with helpers.Count() as count:
    want = everything()
assert not count.calls
helpers.same(got, want)
print("the same")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment, capture_output=True, text=True,
        timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr[-3000:]
