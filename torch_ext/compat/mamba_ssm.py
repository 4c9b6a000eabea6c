"""The package mamba_ssm (``import mamba_ssm``), Mamba-1 and Mamba-2, on our operators.

Names, arguments, layouts and return values are the peer's; beyond it everything runs on the CPU as
well, takes float64, any number of states and strides, and gradients pass through last states.
Inputs are handed over as they lie in memory; results have their channels side by side, ``(B, D,
L)`` with stride 1 along ``D``. A shape that is wrong raises a ValueError, a dtype a TypeError.
"""

from ._mamba_ssm_layer import Mamba, Mamba2
from ._mamba_ssm_models import InferenceParams, MambaConfig, MambaLMHeadModel
from ._mamba_ssm_ops import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)
from ._mamba_ssm_ssd import (
    RMSNorm,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    rmsnorm_fn,
)

__all__ = [
    "InferenceParams",
    "Mamba",
    "Mamba2",
    "MambaConfig",
    "MambaLMHeadModel",
    "RMSNorm",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "mamba_split_conv1d_scan_combined",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
]
