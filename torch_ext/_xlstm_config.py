"""What an xLSTM is made of, by the field names and defaults of the package xlstm.

Fields that begin with an underscore are filled in by what contains them.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class UpProjection:
    """Width of a projection upwards: ``proj_factor * embedding_dim``, rounded to a multiple."""

    proj_factor: float | None = None
    round_proj_up_dim_up: bool = True
    round_proj_up_to_multiple_of: int = 64
    _proj_up_dim: int | None = None

    def _set_proj_up_dim(self, embedding_dim: int) -> None:
        if self.proj_factor is None or embedding_dim is None:
            return
        multiple = self.round_proj_up_to_multiple_of
        count = self.proj_factor * embedding_dim / multiple
        rounded = math.ceil(count) if self.round_proj_up_dim_up else math.floor(count)
        self._proj_up_dim = rounded * multiple


@dataclass
class mLSTMLayerConfig(UpProjection):
    """See :class:`torch_ext.mLSTMLayer`."""

    proj_factor: float = 2.0
    conv1d_kernel_size: int = 4
    qkv_proj_blocksize: int = 4
    num_heads: int = 4
    embedding_dim: int = -1
    bias: bool = False
    dropout: float = 0.0
    context_length: int = -1
    _num_blocks: int = 1
    _inner_embedding_dim: int | None = None

    def __post_init__(self) -> None:
        self._set_proj_up_dim(self.embedding_dim)
        self._inner_embedding_dim = self._proj_up_dim


@dataclass
class mLSTMBlockConfig:
    """See :class:`torch_ext.mLSTMBlock`."""

    mlstm: mLSTMLayerConfig = field(default_factory=mLSTMLayerConfig)
    _num_blocks: int | None = None
    _block_idx: int | None = None

    def __post_init__(self) -> None:
        if self._num_blocks is not None:
            self.mlstm._num_blocks = self._num_blocks
        self.mlstm.__post_init__()


@dataclass
class FeedForwardConfig(UpProjection):
    """The gated feed-forward network of an sLSTM block."""

    proj_factor: float = 1.3
    act_fn: str = "gelu"
    embedding_dim: int = -1
    dropout: float = 0.0
    bias: bool = False
    ff_type: Literal["ffn_gated"] = "ffn_gated"
    _num_blocks: int = 1

    def __post_init__(self) -> None:
        self._set_proj_up_dim(self.embedding_dim)


@dataclass
class sLSTMLayerConfig:
    """An sLSTM layer, of which there are the options alone."""

    hidden_size: int = -1
    num_heads: int = 4
    num_states: int = 4
    backend: Literal["vanilla", "cuda"] = "cuda"
    function: str = "slstm"
    bias_init: Literal["powerlaw_blockdependent", "small_init", "standard", "zeros"] = (
        "powerlaw_blockdependent"
    )
    recurrent_weight_init: Literal["zeros", "standard"] = "zeros"
    _block_idx: int = 0
    _num_blocks: int = 1
    num_gates: int = 4
    gradient_recurrent_cut: bool = False
    gradient_recurrent_clipval: float | None = None
    forward_clipval: float | None = None
    batch_size: int = 8
    input_shape: str = "BSGNH"
    internal_input_shape: str = "SBNGH"
    output_shape: str = "BNSH"
    constants: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    dtype_b: str | None = "float32"
    dtype_r: str | None = None
    dtype_w: str | None = None
    dtype_g: str | None = None
    dtype_s: str | None = None
    dtype_a: str | None = None
    enable_automatic_mixed_precision: bool = True
    initial_val: float | list[float] = 0.0
    embedding_dim: int = -1
    conv1d_kernel_size: int = 4
    group_norm_weight: bool = True
    dropout: float = 0.0


@dataclass
class sLSTMBlockConfig:
    """An sLSTM block, of which there are the options alone."""

    slstm: sLSTMLayerConfig = field(default_factory=sLSTMLayerConfig)
    feedforward: FeedForwardConfig | None = field(default_factory=FeedForwardConfig)
    _num_blocks: int | None = None
    _block_idx: int | None = None


@dataclass
class xLSTMBlockStackConfig:
    """See :class:`torch_ext.xLSTMBlockStack`."""

    mlstm_block: mLSTMBlockConfig | None = None
    slstm_block: sLSTMBlockConfig | None = None
    context_length: int = -1
    num_blocks: int = 1
    embedding_dim: int = 128
    add_post_blocks_norm: bool = True
    bias: bool = False
    dropout: float = 0.0
    slstm_at: list[int] | Literal["all"] = field(default_factory=list)
    _block_map: str | None = None

    def __post_init__(self) -> None:
        if self.mlstm_block is None or self.slstm_at == "all":
            self.slstm_at = list(range(self.num_blocks))
        if self.mlstm_block is not None:
            layer = self.mlstm_block.mlstm
            layer.embedding_dim, layer.bias = self.embedding_dim, self.bias
            layer.dropout, layer.context_length = self.dropout, self.context_length
            self.mlstm_block._num_blocks = self.num_blocks
            self.mlstm_block.__post_init__()
        for place in self.slstm_at:
            if not 0 <= place < self.num_blocks:
                raise ValueError(
                    f"{type(self).__name__}: slstm_at is {self.slstm_at}, expected numbers of "
                    f"blocks, 0 to num_blocks - 1 = {self.num_blocks - 1}"
                )
        kinds = ["1" if k in self.slstm_at else "0" for k in range(self.num_blocks)]
        self._block_map = ",".join(kinds)

    @property
    def block_map(self) -> list[int]:
        """For each block 0 if it is an mLSTM block, 1 if it is an sLSTM block."""
        return [int(kind) for kind in self._block_map.split(",") if kind]


@dataclass
class xLSTMLMModelConfig(xLSTMBlockStackConfig):
    """See :class:`torch_ext.xLSTMLM`."""

    vocab_size: int = -1
    tie_weights: bool = False
    weight_decay_on_embedding: bool = False
    add_embedding_dropout: bool = False


@dataclass
class xLSTMLargeConfig:
    """See :class:`torch_ext.xLSTMLarge`."""

    embedding_dim: int
    num_heads: int
    num_blocks: int
    vocab_size: int
    use_bias: bool = False
    norm_eps: float = 1e-6
    norm_reduction_force_float32: bool = True
    add_out_norm: bool = True
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    chunkwise_kernel: str = "chunkwise--triton_limit_chunk"
    sequence_kernel: str = "native_sequence__triton"
    step_kernel: str = "triton"
    mode: Literal["train", "train_with_padding", "inference"] = "train"
    chunk_size: int = 64
    return_last_states: bool = False
    autocast_kernel_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    eps: float = 1e-6
    inference_state_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    ffn_proj_factor: float = 2.6667
    ffn_round_up_to_multiple_of: int = 64
    gate_soft_cap: float | None = 15.0
    output_logit_soft_cap: float | None = 30.0
    weight_mode: Literal["single", "fused"] = "single"


_NESTED: dict[str, type] = {
    "mlstm_block": mLSTMBlockConfig,
    "slstm_block": sLSTMBlockConfig,
    "mlstm": mLSTMLayerConfig,
    "slstm": sLSTMLayerConfig,
    "feedforward": FeedForwardConfig,
}


def read_config(
    kind: type, name: str, config: Any = None, fields: Mapping[str, Any] | None = None
) -> Any:
    """A new ``kind``.

    Args:
        kind: one of the classes above.
        name: begins what errors say.
        config: a mapping, or any object with such attributes, such as the config of another
            package. What it does not have takes its default.
        fields: goes before ``config``.
    """
    known = [f.name for f in dataclasses.fields(kind)]
    if config is None:
        given = {}
    elif isinstance(config, Mapping):
        given = dict(config)
        check_names(kind, f"{name}: config", given)
    else:
        given = {key: getattr(config, key) for key in known if hasattr(config, key)}
        if not given:
            raise TypeError(
                f"{name}: config is {type(config).__name__}, expected a {kind.__name__}, a mapping "
                "or another object with its fields"
            )
    fields = fields or {}
    check_names(kind, name, fields)
    given |= fields
    for key, value in given.items():
        if key in _NESTED and value is not None:
            given[key] = read_config(_NESTED[key], f"{name}: {key}", value)
        elif isinstance(value, list | tuple):
            given[key] = list(value)  # the caller's own stays as it is
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [key for key in required if key not in given]
    if missing:
        raise TypeError(f"{name}: {', '.join(missing)} is missing")
    # What is computed from others is computed again, and what others have not filled in yet takes
    # its default.
    unset = [k for k, v in given.items() if k in _COMPUTED or (k.startswith("_") and v is None)]
    return kind(**{k: v for k, v in given.items() if k in known and k not in unset})


_COMPUTED = ("_proj_up_dim", "_inner_embedding_dim", "_block_map")


def check_names(kind: type, name: str, given: Mapping[str, Any]) -> None:
    """All but those that begin with an underscore, which others have more of."""
    known = [f.name for f in dataclasses.fields(kind)]
    unknown = [key for key in given if key not in known and not str(key).startswith("_")]
    if unknown:
        public = [key for key in known if not key.startswith("_")]
        raise TypeError(f"{name} has {', '.join(map(repr, unknown))}, expected some of {public}")
