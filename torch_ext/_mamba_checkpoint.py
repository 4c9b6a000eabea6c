"""Checkpoints of Mamba language models, in two layouts.

mamba_ssm's ``MambaLMHeadModel`` has ``config.json`` with ``d_model``, ``n_layer``, ``ssm_cfg`` and so
on, and ``pytorch_model.bin``; transformers' ``MambaForCausalLM`` has ``config.json`` with ``model_type``
``"mamba"``, and ``model.safetensors``. Both have the parameters' names in common, but for the
embedding's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import _checkpoint


def read(name: str, folder: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """The arguments of ``MambaLM`` and its parameters; ``name`` begins what errors say."""
    place, config = f"{name}: {folder / 'config.json'}", _checkpoint.read_config(name, folder)
    model_type = config.get("model_type")
    if model_type == "mamba":
        arguments = _read_transformers_config(place, config)
    elif model_type is None and "d_model" in config and "n_layer" in config:
        arguments = read_mamba_ssm_config(place, config)
    else:
        found = f"the entries are {sorted(config)}"
        if model_type is not None:
            found = f"model_type is {model_type!r}"
        raise ValueError(
            f'{place}: {found}, expected model_type "mamba" (transformers), or d_model, n_layer and '
            "no model_type (mamba_ssm). Mamba-2, FalconMamba and hybrids with attention are other "
            "models"
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


def _entry(place: str, config: dict[str, Any], key: str, kinds: Any, default: Any = None) -> Any:
    """``config[key]``, which has to be there if there is no default."""
    value = config.get(key, default)
    if value is None:
        raise ValueError(f"{place}: there is no {key}")
    allowed = (kinds,) if isinstance(kinds, type) else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        expected = " or ".join(kind.__name__ for kind in allowed)
        raise ValueError(f"{place}: {key} is {value!r}, expected {expected}")
    return value


def _read_transformers_config(place: str, config: dict[str, Any]) -> dict[str, Any]:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f'{place}: hidden_act is {config["hidden_act"]!r}, expected "silu"')
    rows = _entry(place, config, "vocab_size", int)
    vocab_size = _entry(place, config, "torch_ext_vocab_size", int, rows)
    if not 0 < vocab_size <= rows:
        raise ValueError(
            f"{place}: torch_ext_vocab_size is {vocab_size}, expected 1 to vocab_size={rows}"
        )
    return {
        "vocab_size": vocab_size,
        "pad_vocab_size_multiple": rows if vocab_size < rows else 1,
        "d_model": _entry(place, config, "hidden_size", int),
        "n_layer": _entry(place, config, "num_hidden_layers", int),
        "d_state": _entry(place, config, "state_size", int, 16),
        "d_conv": _entry(place, config, "conv_kernel", int, 4),
        "expand": _entry(place, config, "expand", (int, float), 2),
        "dt_rank": _entry(place, config, "time_step_rank", (int, str), "auto"),
        "dt_min": _entry(place, config, "time_step_min", (int, float), 0.001),
        "dt_max": _entry(place, config, "time_step_max", (int, float), 0.1),
        "dt_init": _entry(place, config, "time_step_init_scheme", str, "random"),
        "dt_scale": _entry(place, config, "time_step_scale", (int, float), 1.0),
        "dt_init_floor": _entry(place, config, "time_step_floor", (int, float), 1e-4),
        "conv_bias": _entry(place, config, "use_conv_bias", bool, True),
        "bias": _entry(place, config, "use_bias", bool, False),
        "norm_eps": _entry(place, config, "layer_norm_epsilon", (int, float), 1e-5),
        "residual_in_fp32": _entry(place, config, "residual_in_fp32", bool, True),
        "tie_embeddings": _entry(place, config, "tie_word_embeddings", bool, True),
    }


def _transformers_config(name: str, config: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    if not config["rms_norm"]:
        raise ValueError(
            f"{name}: rms_norm is False, expected True: transformers' Mamba has no LayerNorm. "
            'layout="mamba_ssm" has'
        )
    if config["expand"] != int(config["expand"]):
        raise ValueError(
            f"{name}: expand is {config['expand']}, expected a whole number in transformers' "
            'layout. layout="mamba_ssm" takes others'
        )
    rows = weight.shape[0]
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": rows,
        **({"torch_ext_vocab_size": config["vocab_size"]} if config["vocab_size"] < rows else {}),
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "state_size": config["d_state"],
        "conv_kernel": config["d_conv"],
        "expand": int(config["expand"]),
        "time_step_rank": config["dt_rank"],
        "time_step_min": config["dt_min"],
        "time_step_max": config["dt_max"],
        "time_step_init_scheme": config["dt_init"],
        "time_step_scale": config["dt_scale"],
        "time_step_floor": config["dt_init_floor"],
        "use_conv_bias": config["conv_bias"],
        "use_bias": config["bias"],
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


# Options of mamba_ssm's Mamba, in its ssm_cfg: what they are, and their defaults.
_SSM_CFG: dict[str, tuple[Any, Any]] = {
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
}


def read_mamba_ssm_config(place: str, config: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments; ``place`` begins what errors say."""
    ssm_cfg = dict(config.get("ssm_cfg") or {})
    layer = ssm_cfg.pop("layer", "Mamba1")
    if layer != "Mamba1":
        raise ValueError(f'{place}: the layer in ssm_cfg is {layer!r}, expected "Mamba1"')
    ssm_cfg.pop("use_fast_path", None)  # there is one path
    for key in ssm_cfg:
        if key not in _SSM_CFG:
            raise ValueError(f"{place}: ssm_cfg has {key!r}, expected some of {sorted(_SSM_CFG)}")
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
        "vocab_size": _entry(place, config, "vocab_size", int, 50277),
        "d_model": _entry(place, config, "d_model", int),
        "n_layer": _entry(place, config, "n_layer", int),
        "rms_norm": _entry(place, config, "rms_norm", bool, True),
        "residual_in_fp32": _entry(place, config, "residual_in_fp32", bool, True),
        "tie_embeddings": _entry(place, config, "tie_embeddings", bool, True),
        "pad_vocab_size_multiple": _entry(place, config, "pad_vocab_size_multiple", int, 8),
        **{key: _entry(f"{place}: ssm_cfg", ssm_cfg, key, _SSM_CFG[key][0]) for key in ssm_cfg},
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
    ssm_cfg = {key: config[key] for key, (_, value) in _SSM_CFG.items() if config[key] != value}
    return {
        "d_model": config["d_model"],
        "d_intermediate": 0,
        "n_layer": config["n_layer"],
        "vocab_size": config["vocab_size"],
        "ssm_cfg": {"layer": "Mamba1", **ssm_cfg},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": config["rms_norm"],
        "residual_in_fp32": config["residual_in_fp32"],
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config["pad_vocab_size_multiple"],
        "tie_embeddings": config["tie_embeddings"],
    }
