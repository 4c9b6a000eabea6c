"""Other packages' functions and modules, by their own names and signatures, on our operators.

``torch_ext.compat.minGRU_pytorch`` stands for ``minGRU_pytorch``, ``.mamba_ssm`` for ``mamba_ssm``
(Mamba-1 and Mamba-2), ``.causal_conv1d`` for ``causal_conv1d``, ``.mlstm_kernels`` for
``mlstm_kernels``, ``.xlstm`` for ``xlstm`` (mLSTM). Code that cannot be changed finds ours after
:func:`install`; transformers' models use ours after :func:`patch_transformers`.
"""

import importlib.util
import sys

from . import causal_conv1d, mamba_ssm, minGRU_pytorch, mlstm_kernels, xlstm
from ._stand_in import Package
from ._transformers import TransformersPatch, patch_transformers

# Packages of one module, with the names under which it can be imported.
_ALIASES = {
    "minGRU_pytorch": (
        minGRU_pytorch,
        ["minGRU_pytorch", "minGRU_pytorch.minGRU", "minGRU_pytorch.minLSTM"],
    ),
}

# The versions are the peers' releases up to which ours go: code that asks takes mamba_ssm from 2.0 on
# for one that has Mamba-2, and from 2.3 on for one that has Mamba-3.
_PACKAGES = {
    "mamba_ssm": Package(
        mamba_ssm,
        "2.2.6+torch.ext",
        {
            "mamba_ssm": [
                "selective_scan_fn",
                "mamba_inner_fn",
                "Mamba",
                "Mamba2",
                "MambaLMHeadModel",
            ],
            "mamba_ssm.models": [],
            "mamba_ssm.models.config_mamba": ["MambaConfig"],
            "mamba_ssm.models.mixer_seq_simple": ["MambaLMHeadModel"],
            "mamba_ssm.modules": [],
            "mamba_ssm.modules.mamba2": ["Mamba2"],
            "mamba_ssm.modules.mamba_simple": ["Mamba"],
            "mamba_ssm.ops": [],
            "mamba_ssm.ops.selective_scan_interface": [
                "selective_scan_fn",
                "selective_scan_ref",
                "mamba_inner_fn",
                "mamba_inner_ref",
            ],
            "mamba_ssm.ops.triton": [],
            "mamba_ssm.ops.triton.layernorm_gated": ["RMSNorm", "rmsnorm_fn"],
            "mamba_ssm.ops.triton.ssd_combined": [
                "mamba_chunk_scan_combined",
                "mamba_split_conv1d_scan_combined",
            ],
            "mamba_ssm.ops.triton.selective_state_update": [
                "selective_state_update",
                "selective_state_update_ref",
            ],
            "mamba_ssm.utils": [],
            "mamba_ssm.utils.generation": ["InferenceParams"],
        },
    ),
    "causal_conv1d": Package(
        causal_conv1d,
        "1.6.1+torch.ext",
        {
            "causal_conv1d": ["causal_conv1d_fn", "causal_conv1d_update"],
            "causal_conv1d.causal_conv1d_interface": [
                "causal_conv1d_fn",
                "causal_conv1d_ref",
                "causal_conv1d_update",
                "causal_conv1d_update_ref",
            ],
            "causal_conv1d.causal_conv1d_varlen": [
                "causal_conv1d_varlen_states",
                "causal_conv1d_varlen_states_ref",
            ],
        },
    ),
    "mlstm_kernels": Package(mlstm_kernels, "2.0.6+torch.ext", mlstm_kernels.MODULES),
    "xlstm": Package(xlstm, "2.0.6+torch.ext", xlstm.MODULES),
}

__all__ = [
    "TransformersPatch",
    "causal_conv1d",
    "install",
    "mamba_ssm",
    "minGRU_pytorch",
    "mlstm_kernels",
    "patch_transformers",
    "xlstm",
]


def install(*names: str) -> list[str]:
    """Makes ``import NAME`` find ours where the package itself is not installed.

    All of the package's modules whose contents we have are found, by ``importlib.util.find_spec``
    and ``importlib.metadata`` as well. After ``install("mamba_ssm", "causal_conv1d")`` a
    transformers (5.15 and newer) that is imported later takes our operators by itself, for its
    Mamba, Mamba2, FalconMamba, Jamba, Zamba, Bamba and so on, and for the convolutions of others,
    and after ``install("xlstm")`` its xLSTM our blocks. For one that has been imported, and for
    training on padded batches, see :func:`patch_transformers`.

    Args:
        names: packages, such as ``"mamba_ssm"``. All that we have if none is given.

    Returns:
        The packages for which ours are now found. Those that are installed are left alone.

    Raises:
        ValueError: we have nothing for a name.

    Example:
        >>> names = torch_ext.compat.install("minGRU_pytorch")
        >>> from minGRU_pytorch import minGRU
    """
    everything = [*_ALIASES, *_PACKAGES]
    installed = []
    for name in names or everything:
        if name not in everything:
            raise ValueError(f'install: names has "{name}", expected some of {everything}')
        if name in _PACKAGES:
            package = _PACKAGES[name]
            if package.is_ours(name) or _is_free(name):
                package.install()
                installed.append(name)
            continue
        module, aliases = _ALIASES[name]
        if sys.modules.get(name) is module or _is_free(name):
            sys.modules.update(dict.fromkeys(aliases, module))
            installed.append(name)
    return installed


def _is_free(name: str) -> bool:
    return name not in sys.modules and importlib.util.find_spec(name) is None
