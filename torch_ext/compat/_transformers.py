"""transformers' Mamba, Mamba-2 and xLSTM models on our operators, after transformers has been
imported."""

import importlib
import inspect
from collections.abc import Callable
from functools import wraps
from types import ModuleType

from . import _transformers_mamba2 as mamba2
from . import _transformers_xlstm as xlstm
from .causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from .mamba_ssm import selective_scan_fn, selective_state_update

_MIXERS = {
    "mamba": "MambaMixer",
    "falcon_mamba": "FalconMambaMixer",
    "jamba": "JambaMambaMixer",
    "zamba": "ZambaMambaMixer",
}

# transformers' name, ours, and the parameters of theirs, in the order of ours.
_FUNCTIONS: dict[str, tuple[Callable, list[str]]] = {
    "causal_conv1d_fn": (causal_conv1d_fn, ["hidden_states", "weight", "bias"]),
    "causal_conv1d_update": (
        causal_conv1d_update,
        ["hidden_states", "conv_state", "weight", "bias", "activation"],
    ),
    "mamba_selective_scan": (
        selective_scan_fn,
        ["hidden_states", "dt", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"]
        + ["return_last_state"],
    ),
    "mamba_selective_state_update": (
        selective_state_update,
        ["state", "hidden_states", "dt", "A", "B", "C", "D"],
    ),
}

# Of each model: the class that calls them, the functions, and the one that is the layer as a whole.
_MODELS = {
    **{model: (mixer, _FUNCTIONS, "mamba_inner_fn") for model, mixer in _MIXERS.items()},
    **{model: (mixer, mamba2.FUNCTIONS, mamba2.FUSED) for model, mixer in mamba2.MIXERS.items()},
}

_VERSIONS = "5.17 to 5.23"


class TransformersPatch:
    """What :func:`patch_transformers` has replaced. As a context manager it undoes it at the end.

    Attributes:
        names: the functions that were replaced, such as
            ``"transformers.models.mamba.modeling_mamba.causal_conv1d_fn"``.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._replaced: list[tuple[ModuleType | type, str, Callable, Callable]] = []

    def _replace(self, owner: ModuleType | type, name: str, ours: Callable) -> None:
        self._replaced.append((owner, name, getattr(owner, name), ours))
        place = f"{owner.__module__}." if isinstance(owner, type) else ""
        self.names.append(f"{place}{owner.__name__}.{name}")
        setattr(owner, name, ours)

    def undo(self) -> None:
        """Puts transformers' functions back, but for those that somebody else has replaced since."""
        for module, name, theirs, ours in self._replaced:
            if getattr(module, name) is ours:
                setattr(module, name, theirs)
        self._replaced.clear()
        self.names.clear()

    def __enter__(self) -> "TransformersPatch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"TransformersPatch({self.names})"


def patch_transformers(*models: str) -> TransformersPatch:
    """Makes transformers' Mamba, Mamba-2 and xLSTM models compute with our operators, on the CPU as
    well.

    For a program in which transformers has been imported already; :func:`install` is for one in
    which it has not. Either way weights, arguments and results stay what they are. Models that were
    made before use ours too: the functions of the model files are replaced, not the models. In
    training, transformers hands the whole layer to ``mamba_inner_fn`` (or Mamba-2's) where there is
    one, and then forgets the attention mask after the convolution; patched models take the other
    way, with the mask. Its xLSTM then takes any length in every mode, not only those that are
    shorter than ``chunk_size``, and knows no attention mask either way.

    Args:
        models: some of ``"mamba"``, ``"falcon_mamba"``, ``"jamba"``, ``"zamba"``, ``"mamba2"``,
            ``"bamba"``, ``"falcon_h1"``, ``"granitemoehybrid"``, ``"nemotron_h"``, ``"zamba2"``,
            ``"xlstm"``. All if none is given, but for xLSTM where the package xlstm is installed,
            from which transformers then takes its blocks.

    Returns:
        What was replaced (nothing that had been before), with ``undo()``; also a context manager.

    Raises:
        ValueError: another model.
        ImportError: transformers is not installed.
        RuntimeError: the installed transformers does not have the functions that this replaces, or
            has them with other parameters. Those of 5.17 to 5.23 do. Nothing is replaced then.

    Example:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1))
        >>> patch = torch_ext.compat.patch_transformers("mamba")
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 16])
        >>> patch.undo()
    """
    for model in models:
        if model not in _MODELS and model != xlstm.MODEL:
            expected = [*_MODELS, xlstm.MODEL]
            raise ValueError(
                f'patch_transformers: models has "{model}", expected some of {expected}'
            )
    named = xlstm.MODEL in models
    backend = _xlstm_backend(named) if named or not models else None
    chosen = [model for model in models if model in _MODELS] if models else _MODELS
    modules = [(_module(model), *_MODELS[model]) for model in chosen]
    for module, mixer, functions, _ in modules:
        _check(module, mixer, functions)
    patch = TransformersPatch()
    for module, _, functions, fused in modules:
        for name, (ours, _) in functions.items():
            if not hasattr(getattr(module, name), "_torch_ext"):
                patch._replace(module, name, _stand_in_for(getattr(module, name), ours))
        inner = getattr(module, fused, None)
        if inner is not None and not hasattr(inner, "_torch_ext"):
            patch._replace(module, fused, _stand_in_for(inner, _not_fused))
    if backend is not None and not hasattr(getattr(backend, xlstm.METHOD), "_torch_ext"):
        ours = xlstm.stand_in_for(getattr(backend, xlstm.METHOD))
        patch._replace(backend, xlstm.METHOD, ours)
    return patch


def _xlstm_backend(named: bool) -> type | None:
    """The class that has the method, after a check. None where there is nothing to replace."""
    module = _module(xlstm.MODEL)
    if xlstm.ready(module) or (xlstm.external(module) and not named):
        return None
    where = f"patch_transformers: transformers {_version()}: {module.__name__}"
    xlstm.check(module, where, _VERSIONS)
    return getattr(module, xlstm.CLASS)


def _stand_in_for(theirs: Callable, ours: Callable) -> Callable:
    """``ours``, without the keyword arguments that it does not know, as transformers does it; and
    ``theirs`` for the activations that only transformers has."""
    known = frozenset(inspect.signature(ours).parameters)

    @wraps(ours)
    def replacement(*args, **kwargs):
        if kwargs.get("activation") not in (None, "silu", "swish"):
            return theirs(*args, **kwargs)
        return ours(*args, **{name: value for name, value in kwargs.items() if name in known})

    replacement._torch_ext = theirs
    return replacement


def _not_fused(*args, **kwargs) -> None:
    """As transformers' own ``mamba_inner_fn``: None sends the layer the other way."""
    return None


def _version() -> str:
    return importlib.import_module("transformers").__version__


def _module(model: str) -> ModuleType:
    importlib.import_module("transformers")
    name = f"transformers.models.{model}.modeling_{model}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise RuntimeError(
            f"patch_transformers: transformers {_version()} has no {name}, expected a version from "
            f"{_VERSIONS}"
        ) from e


def _check(
    module: ModuleType, mixer: str, functions: dict[str, tuple[Callable, list[str]]]
) -> None:
    """Everything that is replaced is there, has the parameters that we expect, and is used."""
    where = f"patch_transformers: transformers {_version()}: {module.__name__}"
    layer = getattr(module, mixer, None)
    forward = inspect.unwrap(layer.forward) if layer is not None else None
    for name, (_, expected) in functions.items():
        theirs = getattr(module, name, None)
        if theirs is None:
            raise RuntimeError(f"{where} has no {name}, expected a version from {_VERSIONS}")
        if hasattr(theirs, "_torch_ext"):
            theirs = theirs._torch_ext
        found = list(inspect.signature(getattr(theirs, "forward", theirs)).parameters)
        if found[: len(expected)] != expected:
            raise RuntimeError(
                f"{where}.{name} has the parameters {found}, expected them to begin with "
                f"{expected}, as in versions from {_VERSIONS}"
            )
        if forward is None or name not in forward.__code__.co_names:
            raise RuntimeError(
                f"{where}.{mixer}.forward does not call {name}, expected a version from {_VERSIONS}"
            )
