"""torch_ext.compat.xlstm: the package's names, states and returns, against the package itself where
it is installed; transformers' xLSTM on our operators, patched or with our blocks found by it."""

import collections
import dataclasses
import doctest
import importlib.util
import inspect
import json
import subprocess
import sys
import warnings

import pytest
import torch
from test_xlstm import shake
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ext
from torch_ext import compat
from torch_ext.compat import _xlstm_blocks, _xlstm_large, xlstm

V, C, B, T = 13, 16, 3, 9
INSTALLED = importlib.util.find_spec("xlstm") is not None
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def peer():
    if not INSTALLED or compat._PACKAGES["xlstm"].is_ours("xlstm"):
        pytest.skip("the package xlstm is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("xlstm")


def make_config(package, **options):
    layer = package.mLSTMLayerConfig(num_heads=2, qkv_proj_blocksize=4, conv1d_kernel_size=3)
    options = {"num_blocks": 2, "embedding_dim": C, "vocab_size": V, "context_length": T} | options
    return package.xLSTMLMModelConfig(
        mlstm_block=package.mLSTMBlockConfig(mlstm=layer), bias=True, **options
    )


def make(generator, package=xlstm, **options):
    torch.manual_seed(1)
    return shake(package.xLSTMLMModel(make_config(package, **options)), generator)


def make_large(generator, package=xlstm, **options):
    torch.manual_seed(1)
    options = {"embedding_dim": C, "num_heads": 2, "num_blocks": 2, "vocab_size": V} | options
    options = {"return_last_states": True, "mode": "inference"} | options
    kernels = {"chunkwise_kernel": "chunkwise--native_autograd", "step_kernel": "native"}
    kernels["sequence_kernel"] = "native_sequence__native"
    model = package.xLSTMLarge(package.xLSTMLargeConfig(**kernels, **options))
    shake(model, generator)
    with torch.no_grad():
        model.embedding.weight.mul_(5)
        for name, p in model.named_parameters():
            if "igate" in name and name.endswith("bias"):
                p.add_(10)
    return model


def tokens(generator):
    return torch.randint(V, (B, T), generator=generator)


# ---- blocks and the language model ----
def test_steps(generator):
    """Of the layer, the block, the stack, the model: each as all at once."""
    model = make(generator).double()
    stack, ids = model.xlstm_block_stack, tokens(generator)
    x = torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    for module in (stack.blocks[0].xlstm, stack.blocks[0]):
        want, state = module(x, ignored=3), {}
        for t in range(T):
            before = {name: [s.clone() for s in part] for name, part in state.items()}
            y, after = module.step(x[:, t : t + 1], **state)
            torch.testing.assert_close(y, want[:, t : t + 1])
            for name, part in before.items():
                assert all(map(torch.equal, state[name], part))  # unlike the peer's
            state = after
    for module, all_steps in ((stack, x), (model, ids)):
        want, state = module(all_steps), None
        for t in range(T):
            y, state = module.step(all_steps[:, t : t + 1], state)
            torch.testing.assert_close(y, want[:, t : t + 1])
    assert list(state) == ["block_0", "block_1"]
    shapes = {k: [tuple(s.shape) for s in part] for k, part in state["block_1"].items()}
    K = 32
    assert shapes == {
        "mlstm_state": [(B, 2, K, K), (B, 2, K, 1), (B, 2, 1, 1)], "conv_state": [(B, 3, 2 * K)],
    }  # fmt: skip
    # Half precision: states stay float32, and those of others are taken.
    half = make(generator).bfloat16()
    _, state = half.step(ids[:, :1])
    state = {k: {n: tuple(s.bfloat16() for s in p) for n, p in b.items()} for k, b in state.items()}
    logits, state = half.step(ids[:, 1:2], state)
    assert logits.dtype is torch.bfloat16
    assert all(s.dtype is torch.float32 for s in state["block_0"]["mlstm_state"])
    with pytest.raises(ValueError, match=r"mLSTMLayer.step: x has shape \(3, 2, 16\), expected"):
        stack.step(torch.randn(B, 2, C).double())


def test_as_ours(generator):
    """The same parameters as torch_ext.xLSTMLM, and its methods."""
    model, ids = make(generator), tokens(generator)
    ours = torch_ext.xLSTMLM.from_config(model.config)
    ours.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids), ours(ids), rtol=0, atol=0)
    assert torch.equal(model.generate(ids, 5, 0.0), ours.generate(ids, 5, 0.0))
    torch.testing.assert_close(model.prefill(ids)[0], ours(ids))
    lengths = torch.tensor([T, 3, 1])
    torch.testing.assert_close(model(ids, lengths), ours(ids, lengths))
    one = xlstm.mLSTMLayer(xlstm.mLSTMLayerConfig(embedding_dim=C, conv1d_kernel_size=1))
    y, state = one.step(torch.ones(1, 1, C))
    torch.testing.assert_close(y, one(torch.ones(1, 1, C)))
    assert state["conv_state"][0].shape == (1, 1, 64)


def test_checkpoints(generator, tmp_path):
    model, ids = make(generator), tokens(generator)
    model.save_pretrained(tmp_path)
    again = xlstm.xLSTMLMModel.from_pretrained(tmp_path)
    assert type(again) is xlstm.xLSTMLMModel and again.config == model.config
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0)
    large = make_large(generator)
    large.save_pretrained(tmp_path / "large", "xlstm")
    again = xlstm.load_from_pretrained(tmp_path / "large", return_last_states=False, chunk_size=16)
    assert again.config.chunk_size == 16
    torch.testing.assert_close(again(ids), large(ids)[0], rtol=0, atol=0)


def test_configs():
    config = make_config(xlstm, slstm_at="all", num_blocks=3)
    assert config.slstm_at == [0, 1, 2] and config.block_map == [1, 1, 1]
    config = make_config(xlstm, slstm_at=[1], num_blocks=3, dropout=0.25)
    assert config.block_map == [0, 1, 0]
    layer = config.mlstm_block.mlstm
    assert (layer.embedding_dim, layer.dropout, layer._inner_embedding_dim) == (C, 0.25, 64)
    with pytest.raises(NotImplementedError, match="xLSTMBlockStack: blocks.1 is an sLSTM block"):
        xlstm.xLSTMLMModel(config)
    for kind, given in (
        (xlstm.sLSTMBlock, xlstm.sLSTMBlockConfig(feedforward=xlstm.FeedForwardConfig())),
        (xlstm.sLSTMLayer, xlstm.sLSTMLayerConfig(backend="vanilla")),
    ):
        with pytest.raises(NotImplementedError, match=f"{kind.__name__}: there are no sLSTM"):
            kind(given)
    assert xlstm.xLSTMLarge(xlstm.xLSTMLargeConfig(16, 2, 1, V)).config.weight_mode == "single"


def test_configs_from_dacite():
    dacite = pytest.importorskip("dacite")
    given = dataclasses.asdict(make_config(xlstm))
    made = dacite.from_dict(xlstm.xLSTMLMModelConfig, given, config=dacite.Config(strict=True))
    assert made == make_config(xlstm)


@pytest.mark.parametrize("on_embedding", [False, True])
def test_weight_decay(on_embedding, generator):
    model = make(generator, weight_decay_on_embedding=on_embedding, tie_weights=on_embedding)
    decay, no_decay = model.get_weight_decay_optim_groups()
    names, others = model.get_weight_decay_optim_group_param_names()
    everything = dict(model.named_parameters())
    assert set(names) | set(others) == set(everything) and not set(names) & set(others)
    assert [everything[n] is p for n, p in zip(names, decay, strict=True)] == [True] * len(names)
    assert len(others) == len(no_decay)
    assert ("token_embedding.weight" in names) == on_embedding
    assert ("lm_head.weight" in names) == (not on_embedding)
    layer = "xlstm_block_stack.blocks.0.xlstm."
    assert {layer + "q_proj.weight", layer + "mlstm_cell.igate.weight"} <= set(names)
    assert {layer + "learnable_skip", layer + "mlstm_cell.outnorm.weight",
            layer + "proj_up.bias", "xlstm_block_stack.post_blocks_norm.weight"} <= set(others)  # fmt: skip


# ---- xLSTMLarge ----
@pytest.mark.parametrize("fused", [False, True])
def test_large(fused, generator):
    model, ids = (
        make_large(generator, weight_mode="fused" if fused else "single"),
        tokens(generator),
    )
    ours = torch_ext.xLSTMLarge.from_config(model.config)
    ours.load_state_dict(model.state_dict())
    want = ours(ids)
    logits, state = model(ids)
    torch.testing.assert_close(logits, want)
    assert list(state) == [0, 1]
    assert [tuple(s.shape) for s in state[0]] == [(B, 2, 4, 8), (B, 2, 4), (B, 2, 1)]
    with torch.no_grad():
        first, state = model(ids[:, :5])
        kept = state[0][0]
        rest = [first]
        for begin, end in ((5, 6), (6, 8), (8, 9)):
            logits, state = model(ids[:, begin:end], state)
            rest.append(logits)
            assert state[0][0] is kept  # overwritten, as by the peer
    torch.testing.assert_close(torch.cat(rest, 1), want, **CLOSE)
    first, state = model(ids[:, :5])  # but not where gradients pass
    second, _ = model(ids[:, 5:], state)
    got = torch.autograd.grad(torch.cat([first, second], 1).sin().sum(), list(model.parameters()))
    wants = torch.autograd.grad(want.sin().sum(), list(ours.parameters()))
    torch.testing.assert_close(got, wants, rtol=1e-3, atol=1e-4)
    text, state = model.generate(ids, max_length=4)
    assert torch.equal(text, ours.generate(ids, 4, 0.0)[:, T:])
    more, _ = model.generate(text[:, -1], max_length=2, state=state)
    assert torch.equal(more, ours.generate(ids, 6, 0.0)[:, T + 4 :])
    assert model.generate(ids, 0)[0] is None
    model.config.return_last_states = False
    assert torch.equal(model(ids), want)
    if not fused:
        both = xlstm.xLSTMLarge(dataclasses.replace(model.config, weight_mode="fused"))
        both.load_state_dict(xlstm.convert_single_weights_to_fused_weights(model.state_dict()))
        torch.testing.assert_close(both(ids), want)


def test_large_parts(generator):
    config = xlstm.xLSTMLargeLayerConfig(embedding_dim=C, num_heads=2)
    config.mlstm_backend.eps = 1e-3
    layer = xlstm.xLSTMLargeLayer(config)
    assert layer.eps == 1e-3
    x = torch.randn(B, T, C, generator=generator)
    y, state = layer(x)
    torch.testing.assert_close(layer(x[:, :1], None)[0], y[:, :1])
    again = torch.cat([layer(x[:, :4])[0], layer(x[:, 4:], layer(x[:, :4])[1])[0]], 1)
    torch.testing.assert_close(again, y, **CLOSE)
    assert xlstm.RMSNorm(C, use_bias=True)(x).shape == x.shape
    assert xlstm.MultiHeadLayerNorm(2, 8)(x.view(B, T, 2, 8)).shape == x.shape
    torch.testing.assert_close(xlstm.soft_cap(x, 2.0), 2 * torch.tanh(x / 2))
    assert xlstm.soft_cap(x, None) is x
    assert xlstm.round_up_to_next_multiple_of(65, 64) == 128
    assert xlstm.round_up_to_next_multiple_of(128.5, 64) == 128  # as by the peer
    text, _ = xlstm.generate_tokens(
        lambda x, state: (torch.eye(5)[(x + 1) % 5], state), max_length=4, device="cpu"
    )
    assert text.tolist() == [[1, 2, 3, 4]]
    for call, message in (
        (lambda: xlstm.RMSNorm(C, use_weight=False), "RMSNorm: use_weight is False"),
        (lambda: xlstm.get_sampling_fn("best"), "sampling_fn_name is 'best', expected \"greedy\""),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_examples():
    names = {"torch": torch, "torch_ext": torch_ext}
    for module in (_xlstm_blocks, _xlstm_large):
        result = doctest.testmod(module, extraglobs=names)
        assert result.failed == 0 and result.attempted > 3


# ---- the package itself ----
def test_names(peer):
    """What we have is there, with the same parameters in the same order."""
    for module, names in xlstm.MODULES.items():
        theirs = importlib.import_module(module)
        for name in names:
            ours = getattr(xlstm, names[name] if isinstance(names, dict) else name)
            assert hasattr(theirs, name), (module, name)
            if dataclasses.is_dataclass(ours) and name != "mLSTMBackendConfig":
                want = inspect.signature(getattr(theirs, name)).parameters
                got = inspect.signature(ours).parameters
                assert list(got) == list(want), name
                for key in got:
                    if got[key].default is not None and "factory" not in str(got[key].default):
                        assert got[key].default == want[key].default, (name, key)


def test_model_as_theirs(peer, generator):
    """States go from one to the other and back."""
    theirs, ids = make(generator, peer).double(), tokens(generator)
    ours = xlstm.xLSTMLMModel(theirs.config).double()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids), rtol=1e-5, atol=1e-5)
        state, got, want, models = None, [], [], (theirs, ours)
        alone = None
        for t in range(T):
            logits, state = models[t // 2 % 2].step(ids[:, t : t + 1], state)
            got.append(logits)
            logits, alone = theirs.step(ids[:, t : t + 1], alone)
            want.append(logits)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    decay = [
        {k for k, p in m.named_parameters() if any(p is q for q in group)}
        for m in models for group in m.get_weight_decay_optim_groups()
    ]  # fmt: skip
    assert decay[:2] == decay[2:]


def test_large_as_theirs(peer, generator):
    large = importlib.import_module("xlstm.xlstm_large.model")
    theirs, ids = make_large(generator, large), tokens(generator)
    ours = xlstm.xLSTMLarge(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        want, state = theirs(ids)
        got, ours_state = ours(ids)
        torch.testing.assert_close(got, want, **CLOSE)
        torch.testing.assert_close(ours_state, state, **CLOSE)
        want, _ = theirs(ids[:, :1], {k: tuple(s.clone() for s in v) for k, v in state.items()})
        torch.testing.assert_close(ours(ids[:, :1], state)[0], want, **CLOSE)
        want, _ = theirs.generate(ids, 6)
        assert torch.equal(ours.generate(ids, 6)[0], want)
    theirs = importlib.import_module("xlstm.xlstm_large.utils")
    want = theirs.convert_single_weights_to_fused_weights(dict(ours.state_dict()))
    got = xlstm.convert_single_weights_to_fused_weights(ours.state_dict())
    assert set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want)


# ---- install ----
def test_install(child_environment, tmp_path):
    """As if the package were not installed."""
    program = """
import importlib, importlib.util, sys, torch_ext
if importlib.util.find_spec("xlstm"):
    sys.path[:] = [p for p in sys.path if not importlib.machinery.PathFinder.find_spec("xlstm", [p])]
    importlib.invalidate_caches()
if importlib.util.find_spec("xlstm") is None:
    assert torch_ext.compat.install("xlstm") == ["xlstm"] == torch_ext.compat.install("xlstm")
    import xlstm, importlib.metadata
    from xlstm import mLSTMBlock, xLSTMLMModel
    from xlstm.xlstm_large import mLSTMLayer
    from xlstm.xlstm_large.model import mLSTMBlock as Large, xLSTMLarge
    from torch_ext.compat import xlstm as ours
    assert mLSTMBlock is ours.mLSTMBlock and Large is ours.xLSTMLargeBlock
    assert mLSTMLayer is ours.xLSTMLargeLayer and xLSTMLarge is ours.xLSTMLarge
    assert xlstm.__version__ == importlib.metadata.version("xlstm") == "2.0.6+torch.ext"
    for module, names in ours.MODULES.items():
        found = importlib.import_module(module)
        assert found.__all__ == list(names) and all(hasattr(found, name) for name in names)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment, capture_output=True, text=True,
        timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]


# ---- transformers ----
class Count(TorchDispatchMode):
    """How often each of our operators runs."""

    def __enter__(self):
        self.calls = collections.Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "torch_ext":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def transformers():
    if INSTALLED:
        pytest.skip("xlstm is installed: there is no PyTorch code of transformers' to compare with")
    return pytest.importorskip("transformers")


def make_hf(transformers, generator, **options):
    torch.manual_seed(1)
    options = {"chunk_size": 64} | options
    config = transformers.xLSTMConfig(
        hidden_size=64, num_hidden_layers=2, num_heads=2, vocab_size=37, qk_dim_factor=1.0,
        ffn_round_up_to_multiple_of=16, eos_token_id=None, bos_token_id=1, pad_token_id=0,
        **options,
    )  # fmt: skip
    model = shake(transformers.xLSTMForCausalLM(config), generator).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("igate_preact.bias"):
                p.add_(10)
            elif "embeddings" in name or "lm_head" in name:
                p.mul_(5)
    return model


def run(model, ids, training=True):
    """Loss, logits and the gradient of every parameter."""
    model.train(training)
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    model.eval()
    return [out.loss.detach(), out.logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_bias": True, "eps": 1e-2}], ids=str)
def test_transformers(options, training, transformers, generator):
    model = make_hf(transformers, generator, **options)
    ids = torch.randint(37, (2, T), generator=generator)
    with Count() as count:
        want = run(model, ids, training)
    assert not count.calls
    with compat.patch_transformers("xlstm"), Count() as count:
        got = run(model, ids, training)
        assert count.calls == {"matrix_memory": 2, "matrix_memory_backward": 2}
        model.config.mode = "train"
        again = run(model, ids, training)
    for g, w, a in zip(got, want, again, strict=True):
        size = max(1.0, float(w.abs().max()))
        torch.testing.assert_close(g / size, w / size, rtol=3e-4, atol=3e-5)
        torch.testing.assert_close(a, g, rtol=0, atol=0)
    assert want[1].std() > 0.1 and want[2].abs().max() > 0


def test_transformers_generate(transformers, generator):
    model = make_hf(transformers, generator)
    ids = torch.randint(37, (2, T), generator=generator)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True}
    with Count() as count:
        want = model.generate(ids, **options)
    assert not count.calls
    with compat.patch_transformers("xlstm"), Count() as count:
        got = model.generate(ids, **options)
        # One prefill, then a step for each token but the last, from the cache.
        assert count.calls == {"matrix_memory": 2 + 4 * 2}
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.logits, want.logits, rtol=3e-4, atol=3e-4)


def test_transformers_cache(transformers, generator):
    """In pieces from a cache is all at once: at any length, in chunks of inference as well."""
    model = make_hf(transformers, generator, chunk_size=4)
    ids = torch.randint(37, (2, 13), generator=generator)
    with compat.patch_transformers("xlstm"), torch.no_grad():
        whole = model(input_ids=ids).logits
        out, pieces = None, []
        for begin, end in ((0, 5), (5, 6), (6, 7), (7, 13)):
            cache = out.cache_params if out is not None else None
            out = model(input_ids=ids[:, begin:end], use_cache=True, cache_params=cache)
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
        model.config.max_inference_chunksize = 5
        torch.testing.assert_close(
            model(input_ids=ids, use_cache=True).logits, whole, rtol=1e-4, atol=1e-4
        )
        half = model.bfloat16()
        text = half.generate(ids, max_new_tokens=3, do_sample=False)
        assert text.shape == (2, 16)


@pytest.mark.parametrize("autocast", [False, True])
def test_transformers_half_precision(autocast, transformers, generator):
    """bfloat16, of the parameters or by autocast, is as near to float32 as with their own code."""
    model = make_hf(transformers, generator)
    ids = torch.randint(37, (2, T), generator=generator)
    exact = torch.cat([g.flatten() for g in run(model, ids)])

    def run_half():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return torch.cat([g.flatten().float() for g in run(model, ids)])

    if not autocast:
        model.bfloat16()
    theirs = run_half()
    with compat.patch_transformers("xlstm"), Count() as count:
        ours = run_half()
    assert count.calls["matrix_memory"] == 2
    assert 0 < float((ours - exact).norm()) <= 2 * float((theirs - exact).norm())


def test_transformers_patch_and_undo(transformers, monkeypatch):
    module = importlib.import_module("transformers.models.xlstm.modeling_xlstm")
    before = module.xLSTMBackend.forward
    patch = compat.patch_transformers("xlstm")
    assert patch.names == ["transformers.models.xlstm.modeling_xlstm.xLSTMBackend.forward"]
    assert module.xLSTMBackend.forward is not before
    assert compat.patch_transformers("xlstm").names == []
    patch.undo()
    assert module.xLSTMBackend.forward is before
    with compat.patch_transformers() as patch:
        assert sum("xlstm" in name for name in patch.names) == 1
    with pytest.raises(ValueError, match=r'models has "slstm", expected some of .*"?xlstm'):
        compat.patch_transformers("slstm")
    with monkeypatch.context() as context:
        context.setattr(module.xLSTMBackend, "forward", lambda self, q, k: None)
        with pytest.raises(
            RuntimeError, match=r"xLSTMBackend.forward has the parameters \['q', 'k"
        ):
            compat.patch_transformers("mamba", "xlstm")
    with monkeypatch.context() as context:
        context.delattr(module, "xLSTMBackend")
        with pytest.raises(RuntimeError, match="has no xLSTMBackend.forward, expected a version"):
            compat.patch_transformers("xlstm")
    with monkeypatch.context() as context:
        context.setattr(module.xLSTMLayer, "forward", lambda self, x: None)
        with pytest.raises(RuntimeError, match="xLSTMLayer.forward does not call mlstm_backend"):
            compat.patch_transformers("xlstm")
    with monkeypatch.context() as context:  # the package, before transformers was imported
        context.setattr(module, "external_xlstm", True)
        with pytest.raises(RuntimeError, match="from the installed package xlstm"):
            compat.patch_transformers("xlstm")
        with compat.patch_transformers() as patch:
            assert not any("xlstm" in name for name in patch.names)


def test_transformers_finds_ours(transformers, generator, child_environment, tmp_path):
    """In a process in which it is imported after ours: the same logits, gradients and text."""
    model = make_hf(transformers, generator, use_bias=True)
    ids = torch.randint(37, (2, T), generator=generator)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        text = model.generate(ids, max_new_tokens=4, do_sample=False)
    names = [name for name, _ in model.named_parameters()]
    want = dict(zip(["loss", "logits", *names], run(model, ids), strict=True))
    torch.save({"ids": ids, "text": text, "want": want}, tmp_path / "want.pt")
    program = """
import sys, torch, torch_ext
assert torch_ext.compat.install("xlstm") == ["xlstm"]
import transformers
import test_compat_xlstm as tests
model = transformers.xLSTMForCausalLM.from_pretrained(sys.argv[1])
block = model.backbone.blocks[0]
assert isinstance(block, torch_ext.xLSTMLargeBlock), type(block).__mro__
saved = torch.load(sys.argv[1] + "/want.pt")
with tests.Count() as count:
    got = tests.run(model, saved["ids"])
assert count.calls == {"matrix_memory": 2, "matrix_memory_backward": 2}, count.calls
names = [name for name, _ in model.named_parameters()]
got = dict(zip(["loss", "logits", *names], got, strict=True))
assert set(got) == set(saved["want"])
for name, want in saved["want"].items():
    size = max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got[name] / size, want / size, rtol=3e-4, atol=3e-5, msg=name)
text = model.generate(saved["ids"], max_new_tokens=4, do_sample=False)
assert torch.equal(text, saved["text"])
assert torch_ext.compat.patch_transformers("xlstm").names == []  # which are ours already
fresh = transformers.xLSTMForCausalLM(model.config)
assert (fresh.backbone.blocks[0].mlstm_layer.igate_preact.bias == -10).all()
print("the same")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=child_environment, capture_output=True,
        text=True, timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr[-3000:]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "xlstm"
