"""transformers' Mamba models on our operators, against its own PyTorch code: the same weights give
the same logits, gradients and texts, whether transformers finds ours or they are put into it."""

import collections
import doctest
import importlib.util
import inspect
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ext
from torch_ext import compat
from torch_ext.compat import _mamba_ssm_ops, _transformers

for package in ("mamba_ssm", "causal_conv1d"):
    if importlib.util.find_spec(package) and not compat._PACKAGES[package].is_ours(package):
        # There is no PyTorch code of transformers' to compare with.
        pytest.skip(f"{package} itself is installed", allow_module_level=True)
transformers = pytest.importorskip("transformers")

B, L, VOCABULARY = 2, 9, 37
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "use_cache": True}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
MAMBA = SMALL | {"state_size": 4, "num_hidden_layers": 2, "time_step_rank": 3}
HYBRID = SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
HYBRID |= {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 3}
CONFIGS = {
    "mamba": ("Mamba", MAMBA | {"use_bias": False}),
    "mamba-biases": ("Mamba", MAMBA | {"use_bias": True, "conv_kernel": 3}),
    "mamba-no-biases": ("Mamba", MAMBA | {"use_bias": False, "use_conv_bias": False}),
    "falcon_mamba": ("FalconMamba", MAMBA | {"mixer_rms_eps": 1e-3}),
    "falcon_mamba-biases": ("FalconMamba", MAMBA | {"use_bias": True, "conv_kernel": 2}),
    "jamba": (
        "Jamba",
        HYBRID | {"num_hidden_layers": 4, "num_experts": 3, "expert_layer_period": 2},
    ),
    "jamba-biases": (
        "Jamba",
        HYBRID | {"num_hidden_layers": 2, "num_experts": 1, "mamba_proj_bias": True},
    ),
    "zamba": (
        "Zamba",
        HYBRID
        | {"num_key_value_heads": 2, "num_hidden_layers": 4, "n_mamba_heads": 2}
        | {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    ),
}
MODELS = pytest.mark.parametrize("name", CONFIGS)
CLOSE = {"atol": 3e-5, "rtol": 3e-4}  # both sides are float32


def make(name, generator):
    """Random weights of a size that makes every term count."""
    family, options = CONFIGS[name]
    options = dict(options)
    model = getattr(transformers, family + "ForCausalLM")(
        getattr(transformers, family + "Config")(**options)
    )
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if key.endswith("A_log"):
                p.copy_(0.5 * noise)
            elif "norm" in key:
                p.copy_(1 + 0.2 * noise)
            elif "dt_proj" in key and key.endswith("bias"):
                p.copy_(noise - 1)
            else:
                p.copy_(noise / max(1, p.shape[-1]) ** 0.5 if p.dim() > 1 else noise)
    return model.eval()


def tokens(generator, padded=False):
    ids = torch.randint(1, VOCABULARY, (B, L), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
        ids[mask == 0] = 0
    return ids, mask


class Count(TorchDispatchMode):
    """How often each of our operators runs."""

    def __enter__(self):
        self.calls = collections.Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "torch_ext":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def mixers(model):
    """Mamba layers, and the scans that they make in all."""
    layers = [m for m in model.modules() if hasattr(m, "A_log")]
    return len(layers), sum(getattr(m, "n_mamba_heads", 1) for m in layers)


def run(model, ids, mask, training):
    """Logits and the gradient of every parameter."""
    model.train(training)
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    labels = ids.masked_fill(mask == 0, -100) if mask is not None else ids
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ).backward()
    model.eval()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def same(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            size = max(1.0, float(w[w.isfinite()].abs().max()) if w.numel() else 0.0)
            torch.testing.assert_close(g / size, w / size, **CLOSE)


@contextmanager
def patched(*models):
    with compat.patch_transformers(*models) as patch:
        yield patch


@MODELS
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients(name, training, padded, generator):
    model, (ids, mask) = make(name, generator), tokens(generator, padded)
    mask = mask if padded else None
    with Count() as count:
        want = run(model, ids, mask, training)
    assert not count.calls
    with patched(), Count() as count:
        got = run(model, ids, mask, training)
    layers, scans = mixers(model)
    assert count.calls == {
        "causal_conv1d": layers,
        "causal_conv1d_backward": layers,
        "selective_scan": scans,
        "selective_scan_backward": scans,
    }
    if mask is not None:  # whatever comes out where there is nothing
        got[0], want[0] = got[0][mask == 1], want[0][mask == 1]
    same(got, want)


@MODELS
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_generate(name, padded, generator):
    model, (ids, mask) = make(name, generator), tokens(generator, padded)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True, "attention_mask": mask}
    with Count() as count:
        want = model.generate(ids, **options)
    assert not count.calls
    with patched(), Count() as count:
        got = model.generate(ids, **options)
    layers, scans = mixers(model)
    # One prefill, then a step for each token but the last.
    assert count.calls["selective_scan"] == scans
    assert count.calls["selective_scan_step_"] == 4 * scans
    assert count.calls["causal_conv1d"] == 5 * layers
    assert torch.equal(got.sequences, want.sequences)
    same(got.logits, want.logits)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba"])
def test_cache(name, generator):
    """Token by token from a cache is all at once; and autograd may be on, as in the peer's code."""
    model, (ids, _) = make(name, generator), tokens(generator)
    with patched():
        whole = model(input_ids=ids, use_cache=False).logits
        out = model(input_ids=ids[:, :5], use_cache=True)
        key = "cache_params" if "cache_params" in out else "past_key_values"
        logits = [out.logits]
        for t in range(5, L):
            out = model(input_ids=ids[:, t : t + 1], use_cache=True, **{key: out[key]})
            logits.append(out.logits)
        same([torch.cat(logits, 1).detach()], [whole.detach()])
        logits[-1].sum().backward()  # of the last step alone, its cache included
        assert all(p.grad is not None for n, p in model.named_parameters() if "in_proj" in n)


def test_half_precision(generator):
    """bfloat16 is as near to float32 as transformers' own code, and needs no float32 weights."""
    model, (ids, mask) = make("mamba", generator), tokens(generator)
    with torch.no_grad():
        exact = model(input_ids=ids).logits
        model.bfloat16()
        theirs = model(input_ids=ids).logits
        with patched(), Count() as count:
            ours = model(input_ids=ids).logits
            text = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert count.calls["selective_scan"] == 4 and text.shape == (B, L + 3)
    limit = 1.5 * float((theirs - exact).abs().mean()) + 1e-3
    assert float((ours - exact).abs().mean()) <= limit


@pytest.mark.parametrize("name", ["mamba-biases", "falcon_mamba", "jamba"])
def test_autocast(name, generator):
    """Gradients under bfloat16 autocast are about as near to float32's as with transformers' own
    code: one can be twice the other by chance."""
    model, (ids, _) = make(name, generator), tokens(generator)

    def gradients(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, *grads = run(model, ids, None, True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    exact, theirs = gradients(False), gradients(True)
    with patched():
        ours = gradients(True)
    assert float((ours - exact).norm()) <= 4 * float((theirs - exact).norm())
    assert float((ours - exact).norm()) > 0


def test_other_activations_stay_theirs(generator):
    CONFIGS["relu"] = ("Mamba", MAMBA | {"hidden_act": "relu"})
    try:
        model, (ids, _) = make("relu", generator), tokens(generator)
    finally:
        del CONFIGS["relu"]
    want = run(model, ids, None, False)
    with patched(), Count() as count:
        same(run(model, ids, None, False), want)
    assert count.calls["selective_scan"] == 2 and count.calls["causal_conv1d"] == 0


def test_compiles(generator):
    """Without a graph break."""
    model, (ids, _) = make("mamba", generator), tokens(generator)
    called = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    want = run(model, ids, None, False)
    with patched():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        got = run(compiled, ids, None, False)
    assert called.count("torch_ext.selective_scan") == called.count("torch_ext.causal_conv1d") == 2
    same(got, want)


# ---- patch_transformers ----


def test_patch_and_undo(monkeypatch):
    module = transformers.models.jamba.modeling_jamba
    mamba = transformers.models.mamba.modeling_mamba
    monkeypatch.setattr(mamba, "causal_conv1d_fn", mamba.causal_conv1d_fn)  # for the end
    before = dict(vars(module))
    patch = compat.patch_transformers("jamba")
    names = ["causal_conv1d_fn", "causal_conv1d_update", "mamba_selective_scan"]
    names += ["mamba_selective_state_update", "mamba_inner_fn"]
    assert patch.names == [f"transformers.models.jamba.modeling_jamba.{name}" for name in names]
    assert "modeling_jamba.causal_conv1d_fn" in repr(patch)
    changed = {k for k, v in vars(module).items() if before.get(k) is not v}
    assert changed == set(names)

    more = compat.patch_transformers("jamba", "mamba")
    assert len(more.names) == 5 and all(".mamba.modeling_mamba." in name for name in more.names)
    patch.undo()
    assert {k for k, v in vars(module).items() if before.get(k) is not v} == set()
    assert hasattr(mamba.causal_conv1d_fn, "_torch_ext")
    other = mamba.causal_conv1d_fn = lambda: None  # by somebody else, since
    more.undo()
    assert mamba.causal_conv1d_fn is other and more.names == []


def test_patch_of_something_else():
    with pytest.raises(ValueError, match=r'models has "mamba9", expected some of \[.mamba., .falc'):
        compat.patch_transformers("mamba", "mamba9")


@pytest.mark.parametrize(
    "change, text",
    [
        ("missing", "has no mamba_selective_scan, expected a version from 5.17"),
        ("renamed", "has the parameters ['u', 'dt'], expected them to begin with ['hidden_states'"),
        ("unused", "MambaMixer.forward does not call causal_conv1d_fn, expected a version from"),
    ],
)
def test_patch_of_another_version(change, text, monkeypatch):
    """Nothing is replaced, and the error says what is different."""
    module = transformers.models.mamba.modeling_mamba
    if change == "missing":
        monkeypatch.delattr(module, "mamba_selective_scan")
    elif change == "renamed":
        monkeypatch.setattr(module, "mamba_selective_scan", lambda u, dt: None)
    else:
        monkeypatch.setattr(module.MambaMixer, "forward", lambda self, hidden_states: None)
    jamba = dict(vars(transformers.models.jamba.modeling_jamba))
    with pytest.raises(RuntimeError) as raised:
        compat.patch_transformers("jamba", "mamba")
    message = str(raised.value)
    assert message.startswith(f"patch_transformers: transformers {transformers.__version__}")
    assert "modeling_mamba" in message and text in message
    assert dict(vars(transformers.models.jamba.modeling_jamba)) == jamba


def test_example():
    names = {"torch": torch, "torch_ext": torch_ext}
    result = doctest.testmod(_transformers, extraglobs=names)
    assert result.failed == 0 and result.attempted > 0


# ---- install: transformers looks for the packages while it is imported ----


def without_lookup(function):
    """transformers' own code. With the package kernels its functions are modules."""
    if isinstance(function, torch.nn.Module):
        function = inspect.getclosurevars(type(function).forward).nonlocals["func"]
    return inspect.unwrap(function)


def check_installed():
    """Runs in a process of its own, in which transformers came after ours."""
    generator = torch.Generator().manual_seed(0)
    fused, inner = [], _mamba_ssm_ops._inner
    _mamba_ssm_ops._inner = lambda *x: fused.append(1) or inner(*x)
    for name in CONFIGS:
        model, (ids, mask) = make(name, generator), tokens(generator, padded=True)
        module = sys.modules[type(model).__module__]
        theirs = [
            "causal_conv1d_fn", "causal_conv1d_update", "mamba_inner_fn", "mamba_selective_scan",
            "mamba_selective_state_update",
        ]  # fmt: skip
        theirs = [function for function in theirs if hasattr(module, function)]

        def everything(model=model, ids=ids, mask=mask):
            with torch.no_grad():
                text = model.generate(
                    ids, attention_mask=mask, max_new_tokens=4, do_sample=False,
                    return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
            assert text.sequences.shape == (B, L + 4)
            evaluated = run(model, ids, mask, False)
            evaluated[0] = evaluated[0][mask == 1]
            return [*text.logits, *evaluated, *run(model, ids, None, True)]

        fused.clear()
        with Count() as count:
            got = everything()
        layers, scans = mixers(model)
        # Only these two hand the whole layer over, in training.
        assert len(fused) == (layers if CONFIGS[name][0].endswith("Mamba") else 0), name
        assert count.calls["selective_scan"] == 3 * scans, (name, count.calls)
        assert count.calls["selective_scan_step_"] == 3 * scans, (name, count.calls)
        found = {function: getattr(module, function) for function in theirs}
        for function, wrapped in found.items():
            setattr(module, function, without_lookup(wrapped))
        with Count() as count:
            want = everything()
        assert not count.calls
        for function, wrapped in found.items():
            setattr(module, function, wrapped)
        same(got, want)
        # And patched on top: the same functions, and the mask in training as well.
        with compat.patch_transformers(module.__name__.split(".")[-2]):
            same(everything(), want)
    print("the same")


def test_install(child_environment, tmp_path):
    program = """
from torch_ext import compat
assert compat.install("mamba_ssm", "causal_conv1d") == ["mamba_ssm", "causal_conv1d"]
import test_compat_transformers
test_compat_transformers.check_installed()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment, capture_output=True, text=True,
        timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr[-3000:]
    assert "falling back" not in done.stderr


def test_importing_ours_imports_no_transformers(child_environment):
    program = "import sys, torch_ext; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], env=child_environment, check=True, timeout=300)
