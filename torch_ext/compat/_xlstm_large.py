"""xLSTM-7B by the xlstm package's names: ours with the peer's ``forward`` and states."""

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import xlstm as _xlstm
from .._sequence_layer import shape_text
from .._xlstm_checkpoint import convert
from .._xlstm_config import read_config, xLSTMLargeConfig
from ..xlstm import soft_cap as _soft_cap
from ..xlstm_lm import xLSTMLarge as _xLSTMLarge
from ._common import needs_grad

# What a layer has, and a model: by the number of its block.
mLSTMLayerStateType = tuple[Tensor, Tensor, Tensor]
mLSTMStateType = dict[int, mLSTMLayerStateType]

WeightModeType = Literal["single", "fused"]
BackendModeType = Literal["train", "train_with_padding", "inference"]
DtypeType = Literal["float32", "bfloat16", "float16"]
# All are the same here, but for "siging".
ChunkwiseKernelType = Literal[
    "chunkwise--native_autograd", "chunkwise--native_custbw", "chunkwise--triton_limit_chunk",
    "chunkwise--triton_xl_chunk", "chunkwise--triton_xl_chunk_siging", "parallel--native_autograd",
    "parallel--native_custbw", "parallel--native_stablef_autograd",
    "parallel--native_stablef_custbw", "parallel--triton_limit_headdim",
    "parallel--native_siging_autograd", "parallel--native_siging_custbw",
]  # fmt: skip
SequenceKernelType = Literal["native_sequence__native", "native_sequence__triton"]
StepKernelType = Literal["native", "triton"]


# ---- parts ----
def soft_cap(values: Tensor, cap_value: float | Tensor | None) -> Tensor:
    """``cap_value * tanh(values / cap_value)``; None leaves ``values`` as they are."""
    return _soft_cap(values, cap_value)


def round_up_to_next_multiple_of(x: float, multiple_of: int) -> int:
    """``x`` up to a multiple; what a fraction is too much is cut off first, as by the peer."""
    return int((x + multiple_of - 1) // multiple_of * multiple_of)


class RMSNorm(_xlstm.RMSNorm):
    """The package's ``RMSNorm``, always with a weight."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        use_weight: bool = True,
        use_bias: bool = False,
        force_float32_reductions: bool = True,
    ) -> None:
        _check_weight("RMSNorm", use_weight)
        super().__init__(num_features, eps, use_bias, force_float32_reductions, None, None)


class MultiHeadLayerNorm(_xlstm.MultiHeadNorm):
    """The package's ``MultiHeadLayerNorm``, always with a weight: ``(B, T, H, V)`` to ``(B, T, H *
    V)``."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float = 1e-6,
        use_weight: bool = True,
        use_bias: bool = False,
        force_float32_reductions: bool = True,
    ) -> None:
        _check_weight("MultiHeadLayerNorm", use_weight)
        super().__init__(
            num_heads * head_dim, eps, False, use_bias, force_float32_reductions, None, None
        )


def _check_weight(name: str, use_weight: bool) -> None:
    if not use_weight:
        raise ValueError(f"{name}: use_weight is False, expected True: norms have a weight here")


# ---- layer and block ----
@dataclass
class mLSTMBackendConfig:
    """Which kernel the peer takes; ``eps`` and ``siging`` in ``chunkwise_kernel`` count here."""

    chunkwise_kernel: ChunkwiseKernelType = "chunkwise--native_autograd"
    sequence_kernel: SequenceKernelType = "native_sequence__native"
    step_kernel: StepKernelType = "native"
    mode: BackendModeType = "train"
    chunk_size: int = 64
    return_last_states: bool = True
    autocast_kernel_dtype: DtypeType = "bfloat16"
    eps: float = 1e-6
    inference_state_dtype: DtypeType = "float32"
    normalize_siging: bool = True


@dataclass
class xLSTMLargeLayerConfig:
    """The package's ``xlstm.xlstm_large.mLSTMLayerConfig``."""

    embedding_dim: int
    num_heads: int
    use_bias: bool = False
    norm_eps: float = 1e-6
    norm_reduction_force_float32: bool = True
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    gate_soft_cap: float = 15.0
    mlstm_backend: Any = None
    weight_mode: WeightModeType = "single"

    def __post_init__(self) -> None:
        if self.mlstm_backend is None:
            self.mlstm_backend = mLSTMBackendConfig()


def _from_peer(layer: _xlstm.xLSTMLargeLayer, state: Any) -> list[Tensor] | None:
    """C, n and m ``(B, H, 1)``, or None."""
    if state is None:
        return None
    C, n, m = state
    wide = torch.float64 if layer.multihead_norm.weight.dtype == torch.float64 else torch.float32
    return [C.to(wide), n.to(wide), m.squeeze(-1).to(wide)]


def _run(module: nn.Module, x: Tensor, state: list[Tensor] | None) -> tuple[Tensor, Any]:
    """All steps of a layer or block, and its state as the peer has it."""
    if x.dim() == 3 and x.shape[1] == 1 and state is not None:
        y, (C, n, m) = module._step(x[:, 0], state)
        y = y.unsqueeze(1)
    else:
        y, (C, n, m) = module.prefill(x, state)
    return y, (C, n, m.unsqueeze(-1))


class xLSTMLargeLayer(_xlstm.xLSTMLargeLayer):
    """The package's ``xlstm.xlstm_large.mLSTMLayer``: parameters as
    :class:`torch_ext.xLSTMLargeLayer`.

    Args:
        config: an :class:`xLSTMLargeLayerConfig` or :class:`xLSTMLargeConfig`, which is copied.
    """

    def __init__(self, config: Any, **factory: Any) -> None:
        backend = getattr(config, "mlstm_backend", None)
        fields = {}
        if backend is not None:
            fields = {"eps": backend.eps, "chunkwise_kernel": backend.chunkwise_kernel}
        super().__init__(config, **factory, **fields)

    def forward(
        self, x: Tensor, state: mLSTMLayerStateType | None = None
    ) -> tuple[Tensor, mLSTMLayerStateType]:
        """``x`` ``(B, T, embedding_dim)``, and C ``(B, H, K, V)``, n ``(B, H, K)`` and m ``(B, H,
        1)``, or None for zeros, to the same."""
        return _run(self, x, _from_peer(self, state))


class xLSTMLargeBlock(_xlstm.xLSTMLargeBlock):
    """The package's ``xlstm.xlstm_large.mLSTMBlock``: parameters as
    :class:`torch_ext.xLSTMLargeBlock`.

    Args:
        config: an :class:`xLSTMLargeConfig`, or transformers' ``xLSTMConfig``; it is copied.
    """

    _layer_class = xLSTMLargeLayer

    def forward(
        self, x: Tensor, state: mLSTMLayerStateType | None = None
    ) -> tuple[Tensor, mLSTMLayerStateType]:
        """See :meth:`xLSTMLargeLayer.forward`."""
        return _run(self, x, _from_peer(self.mlstm_layer, state))


class xLSTMLargeBlockStack(_xlstm.LargeBlockStack):
    """What the package's ``xLSTMLarge`` has as ``backbone``."""

    _block_class = xLSTMLargeBlock

    def forward(
        self, x: Tensor, state: mLSTMStateType | None = None
    ) -> tuple[Tensor, mLSTMStateType]:
        """``x`` ``(B, T, embedding_dim)`` and each block's state by its number. Where no gradient
        is asked for, the tensors that are given are overwritten, as by the peer."""
        if state is None:
            state = dict.fromkeys(range(len(self.blocks)))
        for k, block in enumerate(self.blocks):
            before = state[k]
            x, after = block(x, before)
            if before is None or needs_grad(x, *after):
                state[k] = after
            else:
                for old, new in zip(before, after, strict=True):
                    old.copy_(new)
        return self.out_norm(x), state


# ---- the model ----
class xLSTMLarge(_xLSTMLarge):
    """The package's ``xLSTMLarge``: parameters as :class:`torch_ext.xLSTMLarge`, of which it also has
    ``prefill``, ``init_state``, ``stream`` and ``from_pretrained``.

    ``mode``, ``chunk_size`` and the kernels of the config change nothing: any length is right, for
    training as well.

    Args:
        config: an :class:`xLSTMLargeConfig`, which is copied.

    Example:
        >>> from torch_ext.compat.xlstm import xLSTMLarge, xLSTMLargeConfig
        >>> config = xLSTMLargeConfig(
        ...     embedding_dim=16, num_heads=2, num_blocks=2, vocab_size=50, return_last_states=True
        ... )
        >>> model = xLSTMLarge(config)
        >>> logits, state = model(torch.tensor([[1, 2, 3]]))
        >>> tokens, state = model.generate(torch.tensor([[1, 2, 3]]), max_length=5)
        >>> tokens.shape
        torch.Size([1, 5])
    """

    config_class = xLSTMLargeConfig
    _stack_class = xLSTMLargeBlockStack

    def __init__(self, config: xLSTMLargeConfig) -> None:
        self._init(read_config(xLSTMLargeConfig, "xLSTMLarge", config), False, None, None)

    def _init(self, *arguments: Any) -> None:
        super()._init(*arguments)
        self.config = self._config

    def forward(
        self, x: Tensor, state: mLSTMStateType | None = None
    ) -> Tensor | tuple[Tensor, mLSTMStateType]:
        """Logits of the token after each of ``x``.

        Args:
            x: ``(B, T)``.
            state: what the call before returned. Zeros if omitted. Where no gradient is asked for,
                its tensors are overwritten.

        Returns:
            ``(B, T, vocab_size)``; with ``config.return_last_states`` also the state, by the number
            of the block C ``(B, H, K, V)``, n ``(B, H, K)`` and m ``(B, H, 1)``.
        """
        logits, state = self._with_state(x, state)
        return (logits, state) if self.config.return_last_states else logits

    def _with_state(self, x: Tensor, state: mLSTMStateType | None) -> tuple[Tensor, mLSTMStateType]:
        x = self._embed(self._tokens(x, None, "right"))
        x, state = self.backbone(x, state)
        return self._logits(x), state

    def generate(
        self,
        prefill_tokens: Tensor,
        max_length: int,
        sampling_type: str = "greedy",
        state: mLSTMStateType | None = None,
    ) -> tuple[Tensor | None, mLSTMStateType]:
        """Continues each sequence by ``max_length`` tokens.

        Args:
            prefill_tokens: ``(B, T)`` or ``(B,)``.
            max_length: number of new tokens.
            sampling_type: ``"greedy"``.
            state: what goes before ``prefill_tokens``.

        Returns:
            The new tokens ``(B, max_length)``, and the state before the last one.
        """
        return generate_tokens(
            self._with_state,
            prefill_tokens,
            max_length,
            get_sampling_fn(sampling_type),
            state=state,
            device=self.embedding.weight.device,
        )


def load_from_pretrained(
    checkpoint_path: str | PathLike[str],
    return_last_states: bool | None = None,
    chunkwise_kernel_name: str | None = None,
    sequence_kernel_name: str | None = None,
    step_kernel_name: str | None = None,
    backend_mode: str | None = "inference",
    chunk_size: int | None = None,
) -> xLSTMLarge:
    """The package's loader of ``config.yaml`` and safetensors: see
    :meth:`torch_ext.xLSTMLM.from_pretrained`. Arguments replace what the config says."""
    model = xLSTMLarge.from_pretrained(checkpoint_path, weight_mode="single")
    for key, value in [
        ("return_last_states", return_last_states),
        ("chunkwise_kernel", chunkwise_kernel_name),
        ("sequence_kernel", sequence_kernel_name),
        ("step_kernel", step_kernel_name),
        ("mode", backend_mode),
        ("chunk_size", chunk_size),
    ]:
        if value is not None:
            setattr(model.config, key, value)
    return model


# ---- functions ----
def greedy_sampling(logits: Tensor) -> Tensor:
    """The most likely token."""
    return logits.argmax(-1)


def get_sampling_fn(sampling_fn_name: str) -> Callable[[Tensor], Tensor]:
    """By its name, of which there is ``"greedy"``."""
    if sampling_fn_name != "greedy":
        raise ValueError(
            f'get_sampling_fn: sampling_fn_name is {sampling_fn_name!r}, expected "greedy"'
        )
    return greedy_sampling


@torch.no_grad()
def generate_tokens(
    llm_forward: Callable[[Tensor, Any], tuple[Tensor, Any]],
    prefill_tokens: Tensor | None = None,
    max_length: int = 128,
    token_sample_fn: Callable[[Tensor], Tensor] = greedy_sampling,
    bos_token_id: int = 0,
    state: Any = None,
    batch_size_no_prefill: int = 1,
    generated_tokens: Tensor | None = None,
    device: torch.device | str = "cuda",
) -> tuple[Tensor | None, Any]:
    """``max_length`` tokens of any model that returns logits and a state.

    Args:
        llm_forward: tokens ``(B, T)`` and a state to logits and the next state.
        prefill_tokens: ``(B, T)`` or ``(B,)``; ``bos_token_id`` if omitted.
        max_length: number of new tokens.
        token_sample_fn: logits ``(B, 1, V)`` to tokens ``(B, 1)``.
        bos_token_id: see ``prefill_tokens``.
        state: what goes before ``prefill_tokens``.
        batch_size_no_prefill: rows where there is no ``prefill_tokens``.
        generated_tokens: ``(B, max_length)``, where the tokens are written; made if omitted.
        device: of what is made.

    Returns:
        The new tokens, None if there are none, and the state before the last one.
    """
    if prefill_tokens is None:
        prefill_tokens = torch.full((batch_size_no_prefill, 1), bos_token_id, device=device)
    if prefill_tokens.dim() == 1:
        prefill_tokens = prefill_tokens[:, None]
    shape = (prefill_tokens.shape[0], max_length)
    if max_length < 1:
        return None, state
    if generated_tokens is None:
        generated_tokens = torch.empty(shape, dtype=torch.int64, device=device)
    elif generated_tokens.shape != shape:
        raise ValueError(
            f"generate_tokens: generated_tokens has shape {shape_text(generated_tokens)}, expected "
            f"{shape}"
        )
    token = prefill_tokens
    for k in range(max_length):
        logits, state = llm_forward(token, state)
        token = token_sample_fn(logits[:, -1:])
        generated_tokens[:, k : k + 1] = token
    return generated_tokens, state


def convert_single_weights_to_fused_weights(
    single_weight_state_dict: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The ``state_dict`` of an ``xLSTMLarge`` for ``weight_mode="fused"``, from one for
    ``"single"``."""
    return dict(convert(single_weight_state_dict, "fused", {}))
