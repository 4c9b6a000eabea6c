"""xLSTMLM and xLSTMLarge: against the formula, transformers and the package xlstm; prompts, streams,
checkpoints."""

import copy
import dataclasses
import doctest
import io
import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import close
from test_xlstm import block_formula, large_block_formula, shake

import torch_ext
from torch_ext import _checkpoint, _language_model, xlstm_lm
from torch_ext._xlstm_config import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    sLSTMBlockConfig,
    xLSTMLargeConfig,
    xLSTMLMModelConfig,
)
from torch_ext._yaml import read_yaml

V, C = 13, 8
OPTIONS = {
    "xlstm": {"num_heads": 2, "round_proj_up_to_multiple_of": 8},
    "xlstm-tied": {"num_heads": 2, "round_proj_up_to_multiple_of": 8, "bias": True}
    | {"tie_weights": True, "add_post_blocks_norm": False, "conv1d_kernel_size": 3},
    "large": {"num_heads": 2, "ffn_round_up_to_multiple_of": 8},
    "large-fused": {"num_heads": 1, "ffn_round_up_to_multiple_of": 8, "weight_mode": "fused"}
    | {"use_bias": True, "output_logit_soft_cap": 2.0, "qk_dim_factor": 1.0, "norm_eps": 1e-5},
    "large-sigmoid": {"num_heads": 1, "ffn_round_up_to_multiple_of": 8, "input_gate": "sigmoid"}
    | {"add_out_norm": False, "output_logit_soft_cap": None, "gate_soft_cap": None},
}
KINDS = pytest.mark.parametrize("name", OPTIONS)
SOME = pytest.mark.parametrize("name", ["xlstm-tied", "large-fused"])


def make(name, generator, dtype=torch.float64, **options):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    kind = torch_ext.xLSTMLarge if name.startswith("large") else torch_ext.xLSTMLM
    model = shake(kind(V, C, **({"num_blocks": 2} | OPTIONS[name] | options)), generator)
    with torch.no_grad():  # logits that differ, and gates that write
        for key, p in model.named_parameters():
            if "embedding" in key or (
                key.startswith("lm_head") and not model.config.get("tie_weights")
            ):
                p.mul_(5)
            elif key.endswith("igate_preact.bias"):
                p.add_(10)
            elif key.endswith("ifgate_preact.bias"):
                p[: p.shape[0] // 2].add_(10)
    return model.to(dtype)


def tokens(generator, B=3, T=11):
    return torch.randint(V, (B, T), generator=generator)


def logits_by_formula(model, ids):
    """Block after block, in the parameters' dtype."""
    if isinstance(model, torch_ext.xLSTMLM):
        x, stack = model.token_embedding.weight[ids], model.xlstm_block_stack
        for block in stack.blocks:
            x = block_formula(block, x)[0]
        if model.config["add_post_blocks_norm"]:
            x = F.layer_norm(x, (C,), 1 + stack.post_blocks_norm.weight, None, 1e-5)
        return x @ model.lm_head.weight.T
    x = model.embedding.weight[ids]
    for block in model.backbone.blocks:
        x = large_block_formula(block, x)[0]
    if model.config["add_out_norm"]:
        norm = model.backbone.out_norm
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + model.config["norm_eps"])
        x = x * norm.weight + (0 if norm.bias is None else norm.bias)
    x, cap = x @ model.lm_head.weight.T, model.config["output_logit_soft_cap"]
    return x if cap is None else cap * torch.tanh(x / cap)


def equal_states(got, want, row=slice(None)):
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a, b, strict=True):
            close(x[row].detach(), y.detach(), factor=8)


# ---- the models ----
def test_parameters(seed):
    torch.manual_seed(seed)
    model = torch_ext.xLSTMLM(200, 64, 3, dtype=torch.bfloat16)
    keys = list(model.state_dict())
    assert keys[0].startswith("xlstm_block_stack.blocks.0.xlstm") and len(keys) == 3 * 14 + 3
    assert keys[-3:] == [
        "xlstm_block_stack.post_blocks_norm.weight", "token_embedding.weight", "lm_head.weight",
    ]  # fmt: skip
    small = (2 / (5 * 64)) ** 0.5
    for weight in (model.token_embedding.weight, model.lm_head.weight):
        assert weight.dtype is torch.bfloat16
        assert 0.95 * small < float(weight.detach().float().std()) < 1.05 * small
    tied = torch_ext.xLSTMLM(50, 64, 1, tie_weights=True)
    assert tied.lm_head.weight is tied.token_embedding.weight
    large = torch_ext.xLSTMLarge(200, 64, 2, 4)
    keys = list(large.state_dict())
    assert len(keys) == 2 * 15 + 3 and keys[0] == "embedding.weight"
    assert keys[-2:] == ["backbone.out_norm.weight", "lm_head.weight"]
    assert "backbone.blocks.1.mlstm_layer.ogate_preact.weight" in keys
    for weight in (large.embedding.weight, large.lm_head.weight):
        assert 0.95 * small < float(weight.detach().std()) < 1.05 * small
    assert large.config["ffn_proj_factor"] == 2.6667 and large.config["input_gate"] == "exp"
    again = torch_ext.xLSTMLarge(**large.config)
    assert again.config == large.config
    assert torch_ext.xLSTMLM(**tied.config).config == tied.config


@SOME
def test_reset_parameters(name, seed):
    """On the meta device first, then somewhere: as if made there."""
    kind = torch_ext.xLSTMLarge if name.startswith("large") else torch_ext.xLSTMLM
    module = kind(V, C, 2, **OPTIONS[name], device="meta").to_empty(device="cpu")
    twin = kind(V, C, 2, **OPTIONS[name])
    for one in (module, twin):
        torch.manual_seed(seed)
        one.reset_parameters()
    for (key, p), q in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(p, q), key
    if name == "xlstm-tied":
        assert module.lm_head.weight is module.token_embedding.weight


@KINDS
def test_formula(name, generator):
    model, ids = make(name, generator), tokens(generator)
    want = logits_by_formula(model, ids)
    close(model(ids).detach(), want.detach(), factor=8)
    assert want.std() > 0.1
    parameters = list(model.parameters())
    grads = torch.autograd.grad(model(ids).sin().sum(), parameters)
    wants = torch.autograd.grad(want.sin().sum(), parameters)
    for (key, _), g, w in zip(model.named_parameters(), grads, wants, strict=True):
        close(g, w, grad=True, name=key, factor=16)


@KINDS
def test_chunks_and_steps(name, generator):
    model, ids = make(name, generator), tokens(generator)
    want, last = model.prefill(ids)
    torch.testing.assert_close(want, model(ids), rtol=0, atol=0)
    state, pieces = model.init_state(3), []
    for begin, end in ((0, 1), (1, 6), (6, 6), (6, 11)):
        logits, state = model.prefill(ids[:, begin:end], state)
        pieces.append(logits)
    close(torch.cat(pieces, 1).detach(), want.detach(), factor=8)
    equal_states(state, last)
    state = model.init_state(3)
    for t in range(11):
        logits, state = model.step(ids[:, t], state)
        close(logits.detach(), want[:, t].detach(), factor=8)
    equal_states(state, last)
    logits, state = model.prefill(ids.int(), last_only=True)
    close(logits.detach(), want[:, -1].detach(), factor=8)
    equal_states(state, last)


@pytest.mark.parametrize("padding", ["right", "left"])
@SOME
def test_padding(name, padding, generator):
    model, ids = make(name, generator), tokens(generator, B=4)
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
            close(logits[i][valid[i]].detach(), want[0].detach(), factor=8)
            close(last[i].detach(), want[0, -1].detach(), factor=8)
            equal_states(state, want_state, row=slice(i, i + 1))
            loss = loss + want.square().sum()
    parameters = list(model.parameters())
    wants = torch.autograd.grad(loss, parameters)
    for g, w in zip(torch.autograd.grad(logits.square().sum(), parameters), wants, strict=True):
        close(g, w, grad=True, factor=16)


@SOME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(name, dtype, generator):
    model, ids = make(name, generator), tokens(generator)
    want = model(ids)
    half = copy.deepcopy(model).to(dtype)
    got, state = half.prefill(ids)
    assert got.dtype is dtype and all(s.dtype is torch.float32 for part in state for s in part)
    assert float((got.double() - want).abs().mean()) < 0.05 * float(want.std())
    got, _ = half.step(ids[:, 0], half.init_state(3))
    assert got.dtype is dtype
    assert half.generate(ids, 3, 0.7, top_k=5).shape == (3, 14)
    half(ids).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        got, state = model.float().prefill(ids)
    assert all(s.dtype is torch.float32 for part in state for s in part)
    assert float((got.double() - want).abs().mean()) < 0.05 * float(want.std())


def test_learns_and_writes(seed):
    torch.manual_seed(seed)
    model = torch_ext.xLSTMLM(V, 16, 2)
    text = torch.randint(V, (1, 32))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(text[:, :-1])[0], text[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert torch.equal(model.generate(text[:, :8], 24, 0.0), text)


# ---- generation, of which test_mamba_lm.py has more ----
def naive(model, ids, n):
    """Greedy, the whole sequence again for each token."""
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


@SOME
def test_generate(name, generator):
    model, ids = make(name, generator), tokens(generator)
    want = naive(model, ids, 6)
    for chunk in (None, 1, 4):
        assert torch.equal(model.generate(ids, 6, 0.0, prefill_chunk=chunk), want)
    assert torch.equal(torch.stack(list(model.stream(ids, 6, 0.0)), 1), want[:, 11:])
    lengths = torch.tensor([4, 11, 1])
    for padding in ("right", "left"):
        steps = torch.arange(11) if padding == "right" else 10 - torch.arange(11)
        valid = steps < lengths[:, None]
        padded = torch.where(valid, ids, -1)
        for chunk in (None, 3):
            got = model.generate(
                padded, 5, 0.0, lengths=lengths, padding=padding, prefill_chunk=chunk
            )
            for i, n in enumerate(lengths.tolist()):
                alone = naive(model, ids[i][valid[i]][None], 5)
                assert torch.equal(got[i, 11:], alone[0, n:])
    eos = int(want[0, 13])
    got = model.generate(ids[:1], 30, 0.0, eos_token_id=eos)
    assert torch.equal(got[0], want[0, : 12 + int((want[0, 11:] == eos).nonzero()[0, 0])])


# ---- TorchScript, torch.compile, torch.export ----
@KINDS
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted(name, generator):
    model, ids = make(name, generator), tokens(generator)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    lengths = torch.tensor([4, 0, 9])
    torch.testing.assert_close(scripted(ids, lengths, "left"), model(ids, lengths, "left"))
    torch.testing.assert_close(
        scripted.prefill(ids, None, lengths, "right", True),
        model.prefill(ids, None, lengths, "right", True),
    )
    _, state = scripted.prefill(ids, scripted.init_state(3))
    torch.testing.assert_close(scripted.step(ids[:, 0], state), model.step(ids[:, 0], state))


@pytest.mark.slow
def test_compiled(generator):
    """No graph break, and one compilation for every batch and length: test_xlstm.py has the
    blocks."""
    model = make("large-fused", generator, torch.float32, num_blocks=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for B, T in ((3, 11), (5, 9)):
            ids = tokens(generator, B, T)
            torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_exported(generator):
    model = make("xlstm", generator, torch.float32)
    sizes = {0: torch.export.Dim("B", min=2), 1: torch.export.Dim("T", min=2)}
    program = torch.export.export(
        model, (tokens(generator),), dynamic_shapes={"ids": sizes}, strict=False
    )
    for B, T in ((3, 11), (5, 40)):
        ids = tokens(generator, B, T)
        torch.testing.assert_close(program.module()(ids), model(ids))


def test_gradients_of_each_sample(generator):
    """torch.func's vmap of grad, in which ids have no numbers to be checked."""
    model, ids = make("large", generator), tokens(generator)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row[None],)).sin().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)
    for i in range(3):
        for name, want in torch.func.grad(loss)(parameters, ids[i]).items():
            close(got[name][i], want, grad=True, name=name, factor=8)


# ---- checkpoints ----
def assert_same(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert list(got) == list(want)
    for key in want:
        assert got[key].dtype is want[key].dtype and torch.equal(got[key], want[key]), key


LAYOUTS = [(name, {}) for name in ("xlstm", "xlstm-tied")]
LAYOUTS += [("large", {"layout": layout}) for layout in ("transformers", "xlstm")]
LAYOUTS += [("large-fused", {"layout": "xlstm"}), ("large-sigmoid", {"layout": "xlstm"})]


@pytest.mark.parametrize("name, options", LAYOUTS, ids=str)
def test_save_and_load(name, options, generator, tmp_path):
    model, ids = make(name, generator, torch.float32), tokens(generator)
    model.save_pretrained(tmp_path / "a" / "b", **options)
    again = torch_ext.xLSTMLM.from_pretrained(tmp_path / "a" / "b")
    assert type(again) is type(model) and again.config == model.config
    assert_same(again, model)
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0)
    half = type(model).from_pretrained(tmp_path / "a" / "b", dtype=torch.bfloat16)
    assert all(p.dtype is torch.bfloat16 for p in half.parameters())
    half.save_pretrained(tmp_path / "half", **options)
    assert_same(torch_ext.xLSTMLM.from_pretrained(tmp_path / "half"), half)
    if name == "xlstm-tied":
        assert again.lm_head.weight is again.token_embedding.weight


def test_weight_modes(generator, tmp_path):
    """Either layout in either mode: the same numbers."""
    single = make("large", generator, torch.float32, use_bias=True)
    ids = tokens(generator)
    single.save_pretrained(tmp_path / "single", "xlstm")
    fused = torch_ext.xLSTMLarge.from_pretrained(tmp_path / "single", weight_mode="fused")
    assert fused.config == single.config | {"weight_mode": "fused"}
    layer, fused_layer = single.backbone.blocks[1].mlstm_layer, fused.backbone.blocks[1].mlstm_layer
    rows = [layer.q.weight, layer.k.weight, layer.v.weight, layer.ogate_preact.weight]
    assert torch.equal(fused_layer.qkv_opreact.weight, torch.cat(rows))
    gates = torch.cat([layer.igate_preact.bias, layer.fgate_preact.bias])
    assert torch.equal(fused_layer.ifgate_preact.bias, gates)
    torch.testing.assert_close(fused(ids), single(ids))
    fused.save_pretrained(tmp_path / "xlstm", "xlstm")
    assert_same(torch_ext.xLSTMLarge.from_pretrained(tmp_path / "xlstm"), fused)
    again = torch_ext.xLSTMLarge.from_pretrained(tmp_path / "xlstm", weight_mode="single")
    assert_same(again, single)
    # What the config says does not matter, but what is there.
    config = (tmp_path / "xlstm" / "config.yaml").read_text()
    assert 'weight_mode: "fused"\n' in config and "norm_eps: 1.0e-06\n" in config
    (tmp_path / "xlstm" / "config.yaml").write_text(config.replace("fused", "single"))
    assert_same(torch_ext.xLSTMLarge.from_pretrained(tmp_path / "xlstm"), fused)
    # transformers has one mode.
    with torch.no_grad():
        fused.backbone.out_norm.bias.zero_()
        single.backbone.out_norm.bias.zero_()
    fused.save_pretrained(tmp_path / "hf")
    assert_same(torch_ext.xLSTMLarge.from_pretrained(tmp_path / "hf"), single)


def test_as_users_save_them(generator, tmp_path):
    """A training's config and checkpoint, compiled models, numbered parts."""
    model = make("xlstm", generator, torch.float32)
    text = """
# an experiment
training: {lr: 1.0e-3, seeds: [1, 2]}
model:
  mlstm_block:
    mlstm:
      num_heads: 2  # few
      round_proj_up_to_multiple_of: 8
  num_blocks: 2
  embedding_dim: 8
  vocab_size: 13
  slstm_at: []
  context_length: 256
"""
    (tmp_path / "config.yaml").write_text(text)
    for content in (
        model.state_dict(),
        {"model_state_dict": model.state_dict(), "step": 3},
        {"state_dict": {f"module._orig_mod.{k}": v for k, v in model.state_dict().items()}},
    ):
        torch.save(content, tmp_path / "last.pt")
        assert_same(torch_ext.xLSTMLM.from_pretrained(tmp_path), model)
    torch.save({}, tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="last.pt, other.pt are several"):
        torch_ext.xLSTMLM.from_pretrained(tmp_path)
    items = list(model.state_dict().items())
    for k in range(3):
        _checkpoint.write_safetensors(tmp_path / f"model_{k}.safetensors", dict(items[k::3]))
    assert_same(torch_ext.xLSTMLM.from_pretrained(tmp_path), model)


XLSTM = {"mlstm_block": {"mlstm": {"num_heads": 2}}, "embedding_dim": C, "vocab_size": V}
LARGE = {"embedding_dim": C, "num_heads": 2, "num_blocks": 2, "vocab_size": V}
HF = {"model_type": "xlstm", "hidden_size": C, "num_hidden_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "there is no file .*config.json"),
        ([], "config.json holds no object"),
        ({"layers": 3}, r"the entries are \['layers'\], expected model_type \"xlstm\""),
        ({"model_type": "mamba"}, "model_type is 'mamba', expected model_type \"xlstm\""),
        (HF | {"num_heads": "2"}, "num_heads is '2', expected int"),
        (HF | {"use_bias": 1}, "use_bias is 1, expected bool"),
        (HF | {"embedding_dim": 9}, "embedding_dim is 9 and hidden_size is 8, expected the same"),
        ({"model_type": "xlstm", "hidden_size": C}, "there is no num_blocks"),
        (LARGE | {"heads": 3}, "'heads' is unknown, expected entries of xLSTMLargeConfig"),
        (XLSTM | {"layers": 3}, "'layers' is unknown, expected entries of xLSTMLMModelConfig"),
        (LARGE, "has no weights, expected model.safetensors or pytorch_model.bin"),
    ],
    ids=str,
)
def test_bad_config(config, message, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"xLSTMLM.from_pretrained: .*{message}"
    ):
        torch_ext.xLSTMLM.from_pretrained(tmp_path)


def test_bad_checkpoints(generator, tmp_path):
    model = make("xlstm", generator, torch.float32)
    model.save_pretrained(tmp_path)
    load = torch_ext.xLSTMLM.from_pretrained
    with pytest.raises(ValueError, match="has an xLSTMLM, expected an xLSTMLarge"):
        torch_ext.xLSTMLarge.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weight_mode is 'fused', expected None"):
        load(tmp_path, weight_mode="fused")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"slstm_at": [1]}))
    with pytest.raises(NotImplementedError, match="blocks.1 is an sLSTM block, by slstm_at"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = model.state_dict()
    weights["xlstm_block_stack.blocks.1.xlstm.slstm_cell._bias_"] = torch.ones(3)
    _checkpoint.write_safetensors(tmp_path / "model.safetensors", weights)
    with pytest.raises(NotImplementedError, match="xlstm_block_stack.blocks.1 is an sLSTM block"):
        load(tmp_path)
    del weights["xlstm_block_stack.blocks.1.xlstm.slstm_cell._bias_"], weights["lm_head.weight"]
    _checkpoint.write_safetensors(tmp_path / "model.safetensors", weights)
    with pytest.raises(ValueError, match="the checkpoint lacks lm_head.weight"):
        load(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("a: &b 1")
    with pytest.raises(ValueError, match="config.yaml is not YAML that is read here: line 1 has"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a local folder.*nothing is downloaded"):
        load("NX-AI/xLSTM-7b")
    large = make("large-fused", generator)
    with pytest.raises(ValueError, match='out_norm.bias is not 0.*layout="xlstm" has'):
        large.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layout is 'onnx'"):
        large.save_pretrained(tmp_path, "onnx")
    sigmoid = make("large-sigmoid", generator)
    with pytest.raises(ValueError, match="add_out_norm is False, expected True"):
        sigmoid.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="input_gate is 'sigmoid', expected \"exp\""):
        make("large", generator, input_gate="sigmoid").save_pretrained(tmp_path)


YAML = """
# comment
training:
  lr: 1.0e-3  # a number
  none: [~, null, yes, "no", 'it''s', -1, .5, {a: 1, b: [x y, "c, d"]}]
  url: http://x.y:80/z
  list:
  - a: 1
    b: two words
  -
    - 1
    - 2
  empty:
text: "t#x"
long: [1, 2,
  3]
"""


def test_yaml():
    """As PyYAML reads it, and what it writes."""
    configs = [
        xLSTMLMModelConfig(mlstm_block=mLSTMBlockConfig(), num_blocks=3, vocab_size=5),
        xLSTMLMModelConfig(
            mLSTMBlockConfig(), sLSTMBlockConfig(feedforward=FeedForwardConfig(act_fn="gelu")),
            slstm_at=[1], num_blocks=2,
        ),
        xLSTMLargeConfig(4, 2, 3, 5, gate_soft_cap=None),
    ]  # fmt: skip
    assert read_yaml(YAML)["training"]["none"][-1] == {"a": 1, "b": ["x y", "c, d"]}
    assert read_yaml(YAML)["long"] == [1, 2, 3] and read_yaml("") is None
    for text, message in (
        ("a: 1\n  b: 2", "line 2 is indented by more"),
        ("  a: 1\nb: 2", "line 2 is indented by less"),
        ("a: [1, 2", "line 1 has brackets that are not closed"),
        ("\ta: 1", "line 1 is indented by a tab"),
        ("a: |\n  x", "line 1 has '|', of a kind"),
        ("a: 'x", 'line 1 has "\'x" with one quote'),
        ("a: [1] 2", "line 1 has '2' after its brackets"),
        ("one\ntwo", "line 1 is a text of several lines"),
    ):
        with pytest.raises(ValueError, match=message.replace("|", r"\|").replace("[", r"\[")):
            read_yaml(text)
    yaml = pytest.importorskip("yaml")
    assert read_yaml(YAML) == yaml.safe_load(YAML)
    for config in configs:
        for flow in (True, False, None):
            text = yaml.safe_dump(dataclasses.asdict(config), default_flow_style=flow)
            assert read_yaml(text) == yaml.safe_load(text) == dataclasses.asdict(config)


# ---- transformers ----
@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


def make_theirs(transformers, generator, **options):
    torch.manual_seed(0)
    # Chunks longer than any text here: the native code of others fails.
    config = transformers.xLSTMConfig(
        hidden_size=64, num_hidden_layers=2, num_heads=2, vocab_size=50, chunk_size=64,
        qk_dim_factor=1.0, ffn_round_up_to_multiple_of=16, eos_token_id=None, bos_token_id=None,
        pad_token_id=None, **options,
    )  # fmt: skip
    model = shake(transformers.xLSTMForCausalLM(config), generator).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("igate_preact.bias"):
                p.add_(10)
            elif "embeddings" in name or "lm_head" in name:
                p.mul_(5)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": True, "v_dim_factor": 2.0, "norm_eps": 1e-3, "gate_soft_cap": 3.0},
        {"output_logit_soft_cap": 4.0, "eps": 1e-2, "ffn_proj_factor": 1.5},
    ],
    ids=str,
)
def test_as_transformers(options, transformers, generator, tmp_path):
    theirs = make_theirs(transformers, generator, **options)
    shards = {"max_shard_size": "40KB"} if "eps" in options else {}
    theirs.save_pretrained(tmp_path / "theirs", **shards)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == bool(shards)
    ours = torch_ext.xLSTMLM.from_pretrained(tmp_path / "theirs")
    assert isinstance(ours, torch_ext.xLSTMLarge)
    ids = torch.randint(50, (3, 12), generator=generator)
    with torch.no_grad():
        want = theirs(ids).logits
        assert want.std() > 0.1
        torch.testing.assert_close(ours(ids), want, rtol=1e-4, atol=1e-4)
    want = theirs.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(ours.generate(ids, 10, 0.0), want)
    if options.get("use_bias"):
        assert not ours.backbone.out_norm.bias.any()  # which theirs does not have

    ours.save_pretrained(tmp_path / "ours", extra={"eos_token_id": 3})
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(back, transformers.xLSTMForCausalLM) and back.config.eos_token_id == 3
    for (name, a), b in zip(theirs.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, theirs(ids).logits)
        fused = torch_ext.xLSTMLM.from_pretrained(tmp_path / "theirs", weight_mode="fused")
        torch.testing.assert_close(fused(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
        fused.save_pretrained(tmp_path / "fused")  # as single matrices: theirs cannot make others
        back = transformers.xLSTMForCausalLM.from_pretrained(tmp_path / "fused")
        torch.testing.assert_close(back(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


# ---- the package xlstm ----
@pytest.fixture(scope="module")
def peer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("xlstm")
    if module.__version__.endswith("torch.ext"):
        pytest.skip("xlstm is ours")
    return module


def test_as_xlstm(peer, generator, tmp_path):
    config = peer.xLSTMLMModelConfig(
        mlstm_block=peer.mLSTMBlockConfig(mlstm=peer.mLSTMLayerConfig(num_heads=2)),
        num_blocks=2, embedding_dim=32, vocab_size=50, context_length=22, bias=True,
    )  # fmt: skip
    theirs = peer.xLSTMLMModel(config)
    theirs.reset_parameters()
    shake(theirs, generator).eval()
    with torch.no_grad():
        theirs.lm_head.weight.mul_(5)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    torch.save(theirs.state_dict(), tmp_path / "xlstm.pt")
    ours = torch_ext.xLSTMLM.from_pretrained(tmp_path)
    copied = torch_ext.xLSTMLM.from_config(config)
    copied.load_state_dict(theirs.state_dict())
    ids = torch.randint(50, (3, 12), generator=generator)
    with torch.no_grad():
        want = theirs(ids)
        assert want.std() > 0.1
        torch.testing.assert_close(ours(ids), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(copied(ids), want, rtol=1e-4, atol=1e-4)
        state, text = None, ids  # as they generate: step by step
        for t in range(12 + 8):
            logits, state = theirs.step(text[:, t : t + 1], state)
            if t >= 11:
                text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ours.generate(ids, 9, 0.0), text)
    ours.save_pretrained(tmp_path / "ours")
    entries = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert entries["embedding_dim"] == 32 and entries["mlstm_block"]["mlstm"]["num_heads"] == 2
    saved = _checkpoint.Safetensors("test", tmp_path / "ours" / "model.safetensors")
    theirs.load_state_dict(dict(saved))


@pytest.mark.parametrize("fused", [False, True])
def test_as_xlstm_large(fused, peer, generator, tmp_path):
    large = pytest.importorskip("xlstm.xlstm_large.model")
    config = large.xLSTMLargeConfig(
        embedding_dim=32, num_heads=2, num_blocks=2, vocab_size=50, chunk_size=64, mode="inference",
        chunkwise_kernel="chunkwise--native_autograd", step_kernel="native",
        sequence_kernel="native_sequence__native", return_last_states=True, use_bias=True,
        weight_mode="fused" if fused else "single",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = shake(large.xLSTMLarge(config), generator).eval()
    with torch.no_grad():
        theirs.lm_head.weight.mul_(5)
    (tmp_path / "config.yaml").write_text(
        "".join(f"{key}: {value}\n" for key, value in dataclasses.asdict(config).items())
    )
    _checkpoint.write_safetensors(tmp_path / "model_0.safetensors", theirs.state_dict())
    ours = torch_ext.xLSTMLM.from_pretrained(tmp_path)
    assert ours.config["weight_mode"] == config.weight_mode
    ids = torch.randint(50, (3, 12), generator=generator)
    with torch.no_grad():
        want, _ = theirs(ids)
        assert want.std() > 0.1
        torch.testing.assert_close(ours(ids), want, rtol=1e-4, atol=1e-4)
        text, _ = theirs.generate(ids, max_length=9)
    assert torch.equal(ours.generate(ids, 9, 0.0)[:, 12:], text)
    if not fused:  # what they write into a folder, and load
        from xlstm.xlstm_large.from_pretrained import load_from_pretrained

        ours.save_pretrained(tmp_path / "ours", "xlstm")
        back = load_from_pretrained(tmp_path / "ours", return_last_states=True)
        with torch.no_grad():
            torch.testing.assert_close(back(ids)[0], want)


# ---- mistakes ----
def test_errors(generator):
    model, ids = make("xlstm", generator), tokens(generator)
    large, state, one = make("large", generator), model.init_state(3), torch.tensor([1, 2, 3])
    for call, message in (
        (lambda: model(ids[0]), r"xLSTM: ids has shape \(11\), expected \(B, T\)"),
        (lambda: large(ids + V), "ids has values from .*, expected 0 to 12"),
        (lambda: model(ids, torch.tensor([1, 2, 12])), "values from 1 to 12, expected 0 to T=11"),
        (lambda: model(ids, one, "top"), 'padding is "top"'),
        (lambda: model.step(ids, state), r"xLSTM.step: ids has shape \(3, 11\), expected \(B,\)"),
        (lambda: model.step(ids[:, 0], state[:1]), "state has 1 entries, expected num_blocks=2"),
        (
            lambda: large.prefill(ids, large.init_state(3) * 2),
            "state has 4 entries, expected num_b",
        ),
        (lambda: model.prefill(ids[:2], state), r"state\[0\] has shape \(3, 16, 3\)"),
        (lambda: model.prefill(ids, state, one, "left"), "state is given"),
        (lambda: model.prefill(ids[:, :0], last_only=True), "ids has no steps"),
        (lambda: torch_ext.xLSTMLM(0, C, 2), "xLSTMLM: vocab_size is 0"),
        (lambda: torch_ext.xLSTMLM(V, C, 0), "num_blocks is 0"),
        (lambda: torch_ext.xLSTMLM(V, 0, 1), "embedding_dim is 0"),
        (lambda: torch_ext.xLSTMLarge(0, C, 2, 2), "xLSTMLarge: vocab_size is 0"),
        (lambda: torch_ext.xLSTMLarge(V, C, 2, 2, input_gate="relu"), "input_gate is 'relu'"),
        (lambda: model.generate(ids, -1), "xLSTMLM.generate: max_new_tokens is -1"),
        (lambda: large.generate(ids, 1, math.nan), "xLSTMLarge.generate: temperature is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="ids has dtype torch.float32"):
        model(ids.float())
    with pytest.raises(NotImplementedError, match="blocks.1 is an sLSTM block"):
        torch_ext.xLSTMLM(V, C, 2, slstm_at=[1])


def test_examples():
    names = {"torch": torch, "torch_ext": torch_ext}
    for module in (xlstm_lm, _language_model):
        result = doctest.testmod(module, extraglobs=names)
        assert result.failed == 0 and result.attempted > 5
