"""The package xlstm (``import xlstm``) on our operators, as far as mLSTM goes.

``xLSTMBlockStack``, ``xLSTMLMModel`` and their configs, and ``xLSTMLarge`` (xLSTM-7B), with the
peer's constructors, arguments, states and parameter names, so that each one's ``state_dict`` loads
in the other. Beyond the peer, any length is right, without a mask of ``context_length`` squared;
states are float32; gradients are those of the forward. sLSTM blocks raise a NotImplementedError.

What the package has in ``xlstm.xlstm_large`` under names that it has twice is here
``xLSTMLargeBlock``, ``xLSTMLargeLayer`` and ``xLSTMLargeLayerConfig``; after
:func:`torch_ext.compat.install` it is found under its own.
"""

from .._xlstm_config import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStackConfig,
    xLSTMLargeConfig,
    xLSTMLMModelConfig,
)
from ._xlstm_blocks import (
    mLSTMBlock,
    mLSTMLayer,
    sLSTMBlock,
    sLSTMLayer,
    xLSTMBlockStack,
    xLSTMLMModel,
)
from ._xlstm_large import (
    BackendModeType,
    ChunkwiseKernelType,
    DtypeType,
    MultiHeadLayerNorm,
    RMSNorm,
    SequenceKernelType,
    StepKernelType,
    WeightModeType,
    convert_single_weights_to_fused_weights,
    generate_tokens,
    get_sampling_fn,
    greedy_sampling,
    load_from_pretrained,
    mLSTMBackendConfig,
    mLSTMLayerStateType,
    mLSTMStateType,
    round_up_to_next_multiple_of,
    soft_cap,
    xLSTMLarge,
    xLSTMLargeBlock,
    xLSTMLargeBlockStack,
    xLSTMLargeLayer,
    xLSTMLargeLayerConfig,
)

# The package's modules, with their names and, where it is another, ours.
MODULES: dict[str, list[str] | dict[str, str]] = {
    "xlstm": [
        "mLSTMBlock", "mLSTMBlockConfig", "mLSTMLayer", "mLSTMLayerConfig", "sLSTMBlock",
        "sLSTMBlockConfig", "sLSTMLayer", "sLSTMLayerConfig", "FeedForwardConfig",
        "xLSTMBlockStack", "xLSTMBlockStackConfig", "xLSTMLMModel", "xLSTMLMModelConfig",
    ],
    "xlstm.blocks": [],
    "xlstm.blocks.mlstm": [],
    "xlstm.blocks.mlstm.block": ["mLSTMBlock", "mLSTMBlockConfig"],
    "xlstm.blocks.mlstm.layer": ["mLSTMLayer", "mLSTMLayerConfig"],
    "xlstm.blocks.slstm": [],
    "xlstm.blocks.slstm.block": ["sLSTMBlock", "sLSTMBlockConfig"],
    "xlstm.blocks.slstm.layer": ["sLSTMLayer", "sLSTMLayerConfig"],
    "xlstm.components": [],
    "xlstm.components.feedforward": ["FeedForwardConfig"],
    "xlstm.xlstm_block_stack": ["xLSTMBlockStack", "xLSTMBlockStackConfig"],
    "xlstm.xlstm_lm_model": ["xLSTMLMModel", "xLSTMLMModelConfig"],
    "xlstm.xlstm_large": {
        "xLSTMLarge": "xLSTMLarge",
        "xLSTMLargeConfig": "xLSTMLargeConfig",
        "mLSTMLayer": "xLSTMLargeLayer",
        "mLSTMLayerConfig": "xLSTMLargeLayerConfig",
    },
    "xlstm.xlstm_large.components": ["MultiHeadLayerNorm", "RMSNorm", "soft_cap"],
    "xlstm.xlstm_large.from_pretrained": ["load_from_pretrained"],
    "xlstm.xlstm_large.generate": ["generate_tokens", "get_sampling_fn", "greedy_sampling"],
    "xlstm.xlstm_large.model": {
        "mLSTMBlock": "xLSTMLargeBlock",
        "mLSTMLayer": "xLSTMLargeLayer",
        "mLSTMLayerConfig": "xLSTMLargeLayerConfig",
        "xLSTMLargeBlockStack": "xLSTMLargeBlockStack",
    }
    | {
        name: name
        for name in (
            "BackendModeType", "ChunkwiseKernelType", "DtypeType", "MultiHeadLayerNorm", "RMSNorm",
            "SequenceKernelType", "StepKernelType", "WeightModeType", "generate_tokens",
            "get_sampling_fn", "mLSTMBackendConfig", "mLSTMLayerStateType", "mLSTMStateType",
            "round_up_to_next_multiple_of", "soft_cap", "xLSTMLarge", "xLSTMLargeConfig",
        )
    },
    "xlstm.xlstm_large.utils": [
        "convert_single_weights_to_fused_weights", "round_up_to_next_multiple_of",
    ],
}  # fmt: skip

__all__ = [
    "BackendModeType",
    "ChunkwiseKernelType",
    "DtypeType",
    "FeedForwardConfig",
    "MultiHeadLayerNorm",
    "RMSNorm",
    "SequenceKernelType",
    "StepKernelType",
    "WeightModeType",
    "convert_single_weights_to_fused_weights",
    "generate_tokens",
    "get_sampling_fn",
    "greedy_sampling",
    "load_from_pretrained",
    "mLSTMBackendConfig",
    "mLSTMBlock",
    "mLSTMBlockConfig",
    "mLSTMLayer",
    "mLSTMLayerConfig",
    "mLSTMLayerStateType",
    "mLSTMStateType",
    "round_up_to_next_multiple_of",
    "sLSTMBlock",
    "sLSTMBlockConfig",
    "sLSTMLayer",
    "sLSTMLayerConfig",
    "soft_cap",
    "xLSTMBlockStack",
    "xLSTMBlockStackConfig",
    "xLSTMLMModel",
    "xLSTMLMModelConfig",
    "xLSTMLarge",
    "xLSTMLargeBlock",
    "xLSTMLargeBlockStack",
    "xLSTMLargeConfig",
    "xLSTMLargeLayer",
    "xLSTMLargeLayerConfig",
]
