"""Where transformers' Mamba-2 models and hybrids call functions that ours replace."""

from collections.abc import Callable

from .causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from .mamba_ssm import mamba_chunk_scan_combined, selective_state_update

# A model, and its class that calls them.
MIXERS = {
    "mamba2": "Mamba2Mixer",
    "bamba": "BambaMixer",
    "falcon_h1": "FalconH1Mixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "zamba2": "Zamba2MambaMixer",
}

# transformers' name, ours, and the parameters of theirs, in the order of ours.
FUNCTIONS: dict[str, tuple[Callable, list[str]]] = {
    "causal_conv1d_fn": (causal_conv1d_fn, ["hidden_states", "weight", "bias"]),
    "causal_conv1d_update": (
        causal_conv1d_update,
        ["hidden_states", "conv_state", "weight", "bias", "activation"],
    ),
    "mamba2_chunk_scan": (
        mamba_chunk_scan_combined,
        ["hidden_states", "dt", "A", "B", "C", "chunk_size", "D"],
    ),
    "mamba2_selective_state_update": (
        selective_state_update,
        ["state", "hidden_states", "dt", "A", "B", "C", "D"],
    ),
}

# The whole layer in one, without the attention mask: None sends it the other way.
FUSED = "mamba2_split_conv1d_scan_combined"
