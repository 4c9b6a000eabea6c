"""Checkpoints of xLSTM language models, in three layouts.

* The package xlstm's ``xLSTMLMModel``: a config with ``mlstm_block``, ``num_blocks`` and so on, on
  its own or as ``model`` of a training's config, and a ``state_dict``, as their users save them.
* Its ``xLSTMLarge``, such as xLSTM-7B: ``config.yaml`` with ``qk_dim_factor`` and so on, and
  ``model.safetensors`` or ``model_0.safetensors``, ...
* transformers' ``xLSTMForCausalLM``: ``config.json`` with ``model_type`` ``"xlstm"``, and
  ``model.safetensors``.

The last two have their parameters' names in common, but for the embedding's, and either one matrix
for each projection or fused ones.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _checkpoint
from ._checkpoint import entry
from ._xlstm_config import xLSTMLargeConfig, xLSTMLMModelConfig

FILES = ("config.json", "config.yaml", "config.yml")

# Arguments of xLSTMLarge, with transformers' defaults where they are not the package's.
_LARGE: dict[str, tuple[Any, Any]] = {
    "num_heads": (int, 8),
    "use_bias": (bool, False),
    "norm_eps": ((int, float), 1e-6),
    "norm_reduction_force_float32": (bool, True),
    "qk_dim_factor": ((int, float), 0.5),
    "v_dim_factor": ((int, float), 1.0),
    "eps": ((int, float), 1e-6),
    "ffn_proj_factor": ((int, float), 2.667),
    "ffn_round_up_to_multiple_of": (int, 64),
    "gate_soft_cap": ((int, float), 15.0),
    "output_logit_soft_cap": ((int, float), 30.0),
}


def read(name: str, folder: Path) -> tuple[str, dict[str, Any], Mapping[str, Tensor]]:
    """``"xlstm"`` or ``"xlstm_large"``, the config of such a model, and its parameters; ``name``
    begins what errors say."""
    path, config = _checkpoint.read_config(name, folder, FILES)
    place = f"{name}: {path}"
    if "model_type" not in config and isinstance(config.get("model"), dict):
        config = config["model"]  # of a training's config
    model_type = config.get("model_type")
    if model_type == "xlstm":
        kind, arguments = "xlstm_large", _read_transformers_config(place, config)
    elif model_type is None and ("mlstm_block" in config or "slstm_block" in config):
        kind, arguments = "xlstm", _known(place, xLSTMLMModelConfig, config)
    elif model_type is None and "embedding_dim" in config and "num_heads" in config:
        kind, arguments = "xlstm_large", _known(place, xLSTMLargeConfig, config)
    else:
        found = f"the entries are {sorted(map(str, config))}"
        if model_type is not None:
            found = f"model_type is {model_type!r}"
        raise ValueError(
            f'{place}: {found}, expected model_type "xlstm" (transformers), or, without a '
            "model_type, mlstm_block (xLSTMLMModel of xlstm), or embedding_dim and num_heads "
            "(its xLSTMLarge)"
        )
    weights = _checkpoint.open_weights(name, folder, own_names=True)
    weights = _without_prefix(weights)
    if kind == "xlstm":
        _refuse_slstm(name, weights)
    if "backbone.embeddings.weight" in weights:
        theirs = {"embedding.weight": "backbone.embeddings.weight"}
        weights = _checkpoint.Renamed(weights, theirs)
    if model_type == "xlstm" and arguments["use_bias"]:
        # transformers' last norm has none, where the package's has one.
        norm = weights.get("backbone.out_norm.weight")
        if norm is not None and "backbone.out_norm.bias" not in weights:
            bias = {"backbone.out_norm.bias": lambda: torch.zeros_like(norm)}
            weights = _checkpoint.Computed(_makers(weights) | bias)
    if kind == "xlstm_large":
        arguments["weight_mode"] = "single"
        if any(key.endswith(".qkv_opreact.weight") for key in weights):
            arguments["weight_mode"] = "fused"
    return kind, arguments, weights


def _known(place: str, kind: type, config: dict[str, Any]) -> dict[str, Any]:
    """``config``, with an error for entries of the wrong sort, which may be meant for another
    model."""
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = [key for key in config if key not in known and not str(key).startswith("_")]
    if unknown:
        raise ValueError(
            f"{place}: {', '.join(map(repr, unknown))} is unknown, expected entries of "
            f"{kind.__name__}"
        )
    return dict(config)


def _read_transformers_config(place: str, config: dict[str, Any]) -> dict[str, Any]:
    width, blocks = config.get("hidden_size"), config.get("num_hidden_layers")
    both = {
        "embedding_dim": ("hidden_size", width),
        "num_blocks": ("num_hidden_layers", blocks),
    }
    sizes = {}
    for key, (other, value) in both.items():
        mine = config.get(key)
        if value is not None and mine is not None and value != mine:
            raise ValueError(f"{place}: {key} is {mine} and {other} is {value}, expected the same")
        present = {key: mine if mine is not None else value}
        sizes[key] = entry(place, present, key, int)
    # None leaves a cap out, which a missing entry does not.
    given = {key: entry(place, config, key, *_LARGE[key]) for key in _LARGE
             if config.get(key, 0) is not None}  # fmt: skip
    no_caps = {key: None for key in _LARGE if key.endswith("soft_cap") and key not in given}
    return {
        "vocab_size": entry(place, config, "vocab_size", int, 50304),
        **sizes,
        **given,
        **no_caps,
        "add_out_norm": True,  # whatever the entry says: it has one
    }


def _makers(weights: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    return {key: lambda key=key: weights[key] for key in weights}


_PREFIXES = ("_orig_mod.", "module.", "model.")


def _without_prefix(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The names as they were before torch.compile, DataParallel or a trainer's module."""
    prefix = ""
    while weights:
        keys = [key.removeprefix(prefix) for key in weights]
        more = next((p for p in _PREFIXES if all(key.startswith(p) for key in keys)), None)
        if more is None:
            break
        prefix += more
    if not prefix:
        return weights
    return _checkpoint.Renamed(weights, {key.removeprefix(prefix): key for key in weights})


def _refuse_slstm(name: str, weights: Mapping[str, Tensor]) -> None:
    for key in weights:
        found = re.match(r"xlstm_block_stack\.(blocks\.\d+)\.xlstm\.slstm_cell\.", key)
        if found:
            raise NotImplementedError(
                f"{name}: the checkpoint's xlstm_block_stack.{found[1]} is an sLSTM block, expected "
                "mLSTM blocks alone: there are no sLSTM blocks yet"
            )


# ---- one matrix for each projection, or fused ones ----
# The fused one's name, those of its rows in order.
_FUSED = {
    "mlstm_layer.qkv_opreact": ("mlstm_layer.q", "mlstm_layer.k", "mlstm_layer.v",
                                "mlstm_layer.ogate_preact"),
    "mlstm_layer.ifgate_preact": ("mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"),
    "ffn.proj_up_gate_z": ("ffn.proj_up_gate", "ffn.proj_up"),
}  # fmt: skip


def convert(
    weights: Mapping[str, Tensor], weight_mode: str, rows: Mapping[str, int]
) -> Mapping[str, Tensor]:
    """``weights`` of either layout in that of ``weight_mode``.

    Args:
        weights: by name.
        weight_mode: ``"single"`` or ``"fused"``.
        rows: of ``"mlstm_layer.q"`` and so on, for the way to ``"single"``.
    """
    makers: dict[str, Callable[[], Tensor]] = {}
    for key in weights:
        head, place = _split_name(key)
        leaf = key.rpartition(".")[2]
        if weight_mode == "fused":
            for fused, parts in _FUSED.items():
                if place in parts:
                    keys = [f"{head}{part}.{leaf}" for part in parts]
                    if place == parts[0] and all(other in weights for other in keys):
                        makers[f"{head}{fused}.{leaf}"] = lambda keys=keys: torch.cat(
                            [weights[k] for k in keys]
                        )
                    break
            else:
                makers[key] = lambda key=key: weights[key]
        elif place in _FUSED:
            begin = 0
            for part in _FUSED[place]:
                makers[f"{head}{part}.{leaf}"] = lambda key=key, begin=begin, n=rows[part]: weights[
                    key
                ][begin : begin + n]
                begin += rows[part]
        else:
            makers[key] = lambda key=key: weights[key]
    return _checkpoint.Computed(makers)


def _split_name(key: str) -> tuple[str, str]:
    """``backbone.blocks.3.`` and ``mlstm_layer.q`` of ``backbone.blocks.3.mlstm_layer.q.weight``."""
    found = re.match(r"(backbone\.blocks\.\d+\.)(.*)\.(weight|bias)$", key)
    return (found[1], found[2]) if found else ("", key)


def block_rows(block: nn.Module) -> dict[str, int]:
    """Rows of each projection of an ``xLSTMLargeBlock``, of either mode."""
    layer, ffn = block.mlstm_layer, block.ffn
    rows = {"mlstm_layer.q": layer.qk_dim, "mlstm_layer.k": layer.qk_dim}
    rows |= {"mlstm_layer.v": layer.v_dim, "mlstm_layer.ogate_preact": layer.v_dim}
    rows |= dict.fromkeys(_FUSED["mlstm_layer.ifgate_preact"], layer.num_heads)
    return rows | dict.fromkeys(_FUSED["ffn.proj_up_gate_z"], ffn.proj_down.in_features)


# ---- writing ----
def write_xlstm(folder: Path, model: nn.Module, config: Any, extra: Mapping[str, Any]) -> None:
    """``config`` is a dataclass of the package's fields."""
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    entries = _public(dataclasses.asdict(config)) | dict(extra)
    large = isinstance(config, xLSTMLargeConfig)
    file = "config.yaml" if large else "config.json"
    _checkpoint.save(folder, entries, tensors, safetensors=True, config_file=file)


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """Without what is computed."""
    return {
        key: _public(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not key.startswith("_")
    }


def write_transformers(
    name: str, folder: Path, model: nn.Module, config: dict[str, Any], extra: Mapping[str, Any]
) -> None:
    """For ``xLSTMForCausalLM``; ``config`` has the arguments of ``xLSTMLarge``."""
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    # transformers has the other mode as well, and fails when it draws its parameters.
    if config["weight_mode"] == "fused":
        tensors = dict(convert(tensors, "single", block_rows(model.backbone.blocks[0])))
    if not config["add_out_norm"]:
        raise ValueError(
            f"{name}: add_out_norm is False, expected True: transformers' xLSTM has the norm. "
            'layout="xlstm" can do without'
        )
    if config["input_gate"] != "exp":
        raise ValueError(
            f'{name}: input_gate is {config["input_gate"]!r}, expected "exp": transformers\' xLSTM '
            'has no other. layout="xlstm" has'
        )
    bias = tensors.pop("backbone.out_norm.bias", None)
    if bias is not None and bool((bias != 0).any()):
        raise ValueError(
            f"{name}: backbone.out_norm.bias is not 0, expected 0: transformers' xLSTM has none. "
            'layout="xlstm" has'
        )
    embedding = tensors.pop("embedding.weight")
    tensors["backbone.embeddings.weight"] = embedding
    entries = {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": "xlstm",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["embedding_dim"],
        "embedding_dim": config["embedding_dim"],
        "num_hidden_layers": config["num_blocks"],
        "num_blocks": config["num_blocks"],
        **{key: config[key] for key in _LARGE},
        "add_out_norm": True,
        "weight_mode": "single",
        "tie_word_embeddings": False,
        "dtype": str(embedding.dtype).removeprefix("torch."),
        # transformers would take tokens 0 to 2 for them.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    _checkpoint.save(folder, entries | dict(extra), tensors, safetensors=True)
