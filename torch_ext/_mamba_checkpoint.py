"""Checkpoints of Mamba language models, in two layouts.

mamba_ssm's ``MambaLMHeadModel`` has ``config.json`` with ``d_model``, ``n_layer``, ``ssm_cfg`` and so
on, and ``pytorch_model.bin``; transformers' ``MambaForCausalLM`` and ``Mamba2ForCausalLM`` have
``config.json`` with ``model_type`` ``"mamba"`` or ``"mamba2"``, and ``model.safetensors``. Both have the
parameters' names in common, but for the embedding's.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import _checkpoint
from ._checkpoint import entry


def read(name: str, folder: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """The arguments of ``MambaLM`` and its parameters; ``name`` begins what errors say."""
    path, config = _checkpoint.read_config(name, folder)
    place = f"{name}: {path}"
    model_type = config.get("model_type")
    if model_type in ("mamba", "mamba2"):
        arguments = _read_transformers_config(place, config)
    elif model_type is None and "d_model" in config and "n_layer" in config:
        arguments = read_mamba_ssm_config(place, config)
    else:
        found = f"the entries are {sorted(config)}"
        if model_type is not None:
            found = f"model_type is {model_type!r}"
        raise ValueError(
            f'{place}: {found}, expected model_type "mamba" or "mamba2" (transformers), or d_model, '
            "n_layer and no model_type (mamba_ssm). FalconMamba and hybrids with attention are "
            "other models"
        )
    weights = _checkpoint.open_weights(name, folder)
    if "backbone.embeddings.weight" in weights:
        theirs = {"backbone.embedding.weight": "backbone.embeddings.weight"}
        weights = _checkpoint.Renamed(weights, theirs)
    return arguments, weights


def write(
    name: str,
    folder: Path,
    model: nn.Module,
    config: dict[str, Any],
    layout: str,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """See ``MambaLM.save_pretrained``; ``config`` has the arguments of ``MambaLM``."""
    writers = {"transformers": _transformers_config, "mamba_ssm": _mamba_ssm_config}
    if layout not in writers:
        raise ValueError(f'{name}: layout is {layout!r}, expected "transformers" or "mamba_ssm"')
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    entries = writers[layout](name, config, tensors["lm_head.weight"]) | dict(extra or {})
    if layout == "transformers":
        tensors["backbone.embeddings.weight"] = tensors.pop("backbone.embedding.weight")
        if config["tie_embeddings"]:  # stands there once, as safetensors wants it
            del tensors["lm_head.weight"]
    _checkpoint.save(folder, entries, tensors, safetensors=layout == "transformers")


def _read_transformers_config(place: str, config: dict[str, Any]) -> dict[str, Any]:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f'{place}: hidden_act is {config["hidden_act"]!r}, expected "silu"')
    rows = entry(place, config, "vocab_size", int)
    vocab_size = entry(place, config, "torch_ext_vocab_size", int, rows)
    if not 0 < vocab_size <= rows:
        raise ValueError(
            f"{place}: torch_ext_vocab_size is {vocab_size}, expected 1 to vocab_size={rows}"
        )
    d_model = entry(place, config, "hidden_size", int)
    mamba2 = config["model_type"] == "mamba2"
    options = {
        "d_state": entry(place, config, "state_size", int, 128 if mamba2 else 16),
        "d_conv": entry(place, config, "conv_kernel", int, 4),
        "expand": entry(place, config, "expand", (int, float), 2),
        "dt_min": entry(place, config, "time_step_min", (int, float), 0.001),
        "dt_max": entry(place, config, "time_step_max", (int, float), 0.1),
        "dt_init_floor": entry(place, config, "time_step_floor", (int, float), 1e-4),
        "conv_bias": entry(place, config, "use_conv_bias", bool, True),
        "bias": entry(place, config, "use_bias", bool, False),
    }
    if mamba2:
        options = {"ssm_cfg": _read_mamba2_options(place, config, d_model, options)}
    else:
        options["dt_rank"] = entry(place, config, "time_step_rank", (int, str), "auto")
        options["dt_init"] = entry(place, config, "time_step_init_scheme", str, "random")
        options["dt_scale"] = entry(place, config, "time_step_scale", (int, float), 1.0)
    return {
        "vocab_size": vocab_size,
        "pad_vocab_size_multiple": rows if vocab_size < rows else 1,
        "d_model": d_model,
        "n_layer": entry(place, config, "num_hidden_layers", int),
        **options,
        "norm_eps": entry(place, config, "layer_norm_epsilon", (int, float), 1e-5),
        "residual_in_fp32": entry(place, config, "residual_in_fp32", bool, True),
        "tie_embeddings": entry(place, config, "tie_word_embeddings", bool, not mamba2),
    }


def _read_mamba2_options(
    place: str, config: dict[str, Any], d_model: int, options: dict[str, Any]
) -> dict[str, Any]:
    headdim = entry(place, config, "head_dim", int, 64)
    heads = entry(place, config, "num_heads", int, 128)
    if heads * headdim != int(options["expand"] * d_model):
        raise ValueError(
            f"{place}: num_heads is {heads} and head_dim {headdim}, expected expand * hidden_size="
            f"{int(options['expand'] * d_model)} as their product"
        )
    limit = entry(place, config, "time_step_limit", (list, tuple), (0.0, math.inf))
    try:  # JSON has no infinity, and transformers writes {"__float__": "Infinity"}
        low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in limit)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{place}: time_step_limit is {limit!r}, expected two numbers") from None
    return {
        "layer": "Mamba2",
        **options,
        "headdim": headdim,
        "ngroups": entry(place, config, "n_groups", int, 8),
        "chunk_size": entry(place, config, "chunk_size", int, 256),
        "dt_limit": (low, high),
    }


def _transformers_config(name: str, config: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    if not config["rms_norm"]:
        raise ValueError(
            f"{name}: rms_norm is False, expected True: transformers' Mamba has no LayerNorm. "
            'layout="mamba_ssm" has'
        )
    layer, options = _options_of(config)
    if options["expand"] != int(options["expand"]):
        raise ValueError(
            f"{name}: expand is {options['expand']}, expected a whole number in transformers' "
            'layout. layout="mamba_ssm" takes others'
        )
    rows = weight.shape[0]
    entries = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": rows,
        **({"torch_ext_vocab_size": config["vocab_size"]} if config["vocab_size"] < rows else {}),
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "state_size": options["d_state"],
        "conv_kernel": options["d_conv"],
        "expand": int(options["expand"]),
        "time_step_min": options["dt_min"],
        "time_step_max": options["dt_max"],
        "time_step_floor": options["dt_init_floor"],
        "use_conv_bias": options["conv_bias"],
        "use_bias": options["bias"],
        "hidden_act": "silu",
        "layer_norm_epsilon": config["norm_eps"],
        "residual_in_fp32": config["residual_in_fp32"],
        "tie_word_embeddings": config["tie_embeddings"],
        "dtype": str(weight.dtype).removeprefix("torch."),
        # transformers would take token 0 for each of them.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if layer == "Mamba1":
        return entries | {
            "time_step_rank": options["dt_rank"],
            "time_step_init_scheme": options["dt_init"],
            "time_step_scale": options["dt_scale"],
        }
    inner = int(options["expand"]) * config["d_model"]
    for key, expected in [
        ("d_ssm", inner),
        ("D_has_hdim", False),
        ("rmsnorm", True),
        ("norm_before_gate", False),
    ]:
        if options[key] != expected and options[key] is not None:
            raise ValueError(
                f"{name}: {key} is {options[key]}, expected {expected} in transformers' layout. "
                'layout="mamba_ssm" takes others'
            )
    low, high = options["dt_limit"]
    return entries | {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "num_heads": inner // options["headdim"],
        "head_dim": options["headdim"],
        "n_groups": options["ngroups"],
        "chunk_size": options["chunk_size"],
        "time_step_limit": [low, {"__float__": "Infinity"} if high == math.inf else high],
    }


# Options of mamba_ssm's layers, in its ssm_cfg: what they are, and their defaults.
OPTIONS: dict[str, dict[str, tuple[Any, Any]]] = {
    "Mamba1": {
        "d_state": (int, 16),
        "d_conv": (int, 4),
        "expand": ((int, float), 2),
        "dt_rank": ((int, str), "auto"),
        "dt_min": ((int, float), 0.001),
        "dt_max": ((int, float), 0.1),
        "dt_init": (str, "random"),
        "dt_scale": ((int, float), 1.0),
        "dt_init_floor": ((int, float), 1e-4),
        "conv_bias": (bool, True),
        "bias": (bool, False),
    },
    "Mamba2": {
        "d_state": (int, 128),
        "d_conv": (int, 4),
        "conv_init": ((int, float, type(None)), None),
        "expand": ((int, float), 2),
        "headdim": (int, 64),
        "d_ssm": ((int, type(None)), None),
        "ngroups": (int, 1),
        "A_init_range": ((tuple, list), (1, 16)),
        "D_has_hdim": (bool, False),
        "rmsnorm": (bool, True),
        "norm_before_gate": (bool, False),
        "dt_min": ((int, float), 0.001),
        "dt_max": ((int, float), 0.1),
        "dt_init_floor": ((int, float), 1e-4),
        "dt_limit": ((tuple, list), (0.0, math.inf)),
        "conv_bias": (bool, True),
        "bias": (bool, False),
        "chunk_size": (int, 256),
    },
}
# There is one path.
_IGNORED = {"Mamba1": ["use_fast_path"], "Mamba2": ["use_mem_eff_path", "sequence_parallel"]}


def layer_options(
    place: str, given: Mapping[str, Any], ssm_cfg: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """A layer's name and all of its options, by mamba_ssm's ``ssm_cfg``.

    Args:
        place: begins what errors say.
        given: Mamba-1's options that were given in another way.
        ssm_cfg: ``{"layer": "Mamba1" or "Mamba2", ...}`` or None.
    """
    if ssm_cfg is None:
        return "Mamba1", dict(given)
    own = dict(ssm_cfg)
    layer = own.pop("layer", "Mamba1")
    if layer not in OPTIONS:
        raise ValueError(
            f'{place}: the layer in ssm_cfg is {layer!r}, expected "Mamba1" or "Mamba2"'
        )
    for name, (_, default) in OPTIONS["Mamba1"].items():
        if name in given and given[name] != default:
            raise ValueError(f"{place}: {name} is {given[name]!r}, expected it in ssm_cfg instead")
    options = {name: default for name, (_, default) in OPTIONS[layer].items()}
    for key in _IGNORED[layer]:
        own.pop(key, None)
    for key, value in own.items():
        if key not in options:
            raise ValueError(f"{place}: ssm_cfg has {key!r}, expected some of {sorted(options)}")
        kinds = OPTIONS[layer][key][0]
        nothing = value is None and isinstance(kinds, tuple) and type(None) in kinds
        options[key] = None if nothing else entry(f"{place}: ssm_cfg", own, key, kinds)
        if isinstance(value, list):  # as JSON has it
            options[key] = tuple(value)
    return layer, options


def _options_of(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The layer's name and options in ``MambaLM.config``."""
    ssm_cfg = config.get("ssm_cfg")
    if ssm_cfg is None:
        return "Mamba1", {key: config[key] for key in OPTIONS["Mamba1"]}
    return layer_options("config", {}, ssm_cfg)


def read_mamba_ssm_config(place: str, config: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments; ``place`` begins what errors say."""
    layer, options = layer_options(place, {}, config.get("ssm_cfg") or {})
    if config.get("attn_layer_idx"):
        raise ValueError(
            f"{place}: attn_layer_idx is {config['attn_layer_idx']}, expected none: "
            "there are no attention layers"
        )
    if config.get("d_intermediate"):
        raise ValueError(
            f"{place}: d_intermediate is {config['d_intermediate']}, expected 0: "
            "there are no MLPs between the Mamba layers"
        )
    return {
        "vocab_size": entry(place, config, "vocab_size", int, 50277),
        "d_model": entry(place, config, "d_model", int),
        "n_layer": entry(place, config, "n_layer", int),
        "rms_norm": entry(place, config, "rms_norm", bool, True),
        "residual_in_fp32": entry(place, config, "residual_in_fp32", bool, True),
        "tie_embeddings": entry(place, config, "tie_embeddings", bool, True),
        "pad_vocab_size_multiple": entry(place, config, "pad_vocab_size_multiple", int, 8),
        **(options if layer == "Mamba1" else {"ssm_cfg": {"layer": layer, **options}}),
    }


def _mamba_ssm_config(name: str, config: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    if config["norm_eps"] != 1e-5:
        raise ValueError(
            f"{name}: norm_eps is {config['norm_eps']}, expected 1e-05: mamba_ssm's layout has no "
            'entry for it. layout="transformers" has'
        )
    return mamba_ssm_config(config)


def mamba_ssm_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of mamba_ssm's ``MambaConfig``."""
    layer, options = _options_of(config)
    ssm_cfg = {key: options[key] for key, (_, v) in OPTIONS[layer].items() if options[key] != v}
    return {
        "d_model": config["d_model"],
        "d_intermediate": 0,
        "n_layer": config["n_layer"],
        "vocab_size": config["vocab_size"],
        "ssm_cfg": {"layer": layer, **ssm_cfg},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": config["rms_norm"],
        "residual_in_fp32": config["residual_in_fp32"],
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config["pad_vocab_size_multiple"],
        "tie_embeddings": config["tie_embeddings"],
    }
