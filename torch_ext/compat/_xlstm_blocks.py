"""The xlstm package's blocks and their language model: ours with the peer's ``step`` and states."""

from typing import Any

import torch
from torch import Tensor, nn

from .._sequence_layer import shape_text
from .._xlstm_config import (
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    read_config,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStackConfig,
    xLSTMLMModelConfig,
)
from ..xlstm import State
from ..xlstm import mLSTMBlock as _mLSTMBlock
from ..xlstm import mLSTMLayer as _mLSTMLayer
from ..xlstm import xLSTMBlockStack as _xLSTMBlockStack
from ..xlstm_lm import xLSTMLM as _xLSTMLM

# Of a block, and of a stack of them.
BlockState = dict[str, tuple[Tensor, ...]]
StackState = dict[str, BlockState]


def _one_step(where: str, x: Tensor) -> Tensor:
    if x.dim() != 3 or x.shape[1] != 1:
        raise ValueError(f"{where}: x has shape {shape_text(x)}, expected (B, 1, embedding_dim)")
    return x[:, 0]


class mLSTMLayer(_mLSTMLayer):
    """The package's ``mLSTMLayer``: parameters as :class:`torch_ext.mLSTMLayer`.

    Args:
        config: an :class:`mLSTMLayerConfig`, which is copied.

    Example:
        >>> from torch_ext.compat.xlstm import mLSTMLayer, mLSTMLayerConfig
        >>> layer = mLSTMLayer(mLSTMLayerConfig(embedding_dim=16, num_heads=2))
        >>> y, state = layer.step(torch.randn(2, 1, 16))
        >>> y, state = layer.step(torch.randn(2, 1, 16), **state)
        >>> [tuple(s.shape) for s in state["mlstm_state"]]
        [(2, 2, 32, 32), (2, 2, 32, 1), (2, 2, 1, 1)]
    """

    config_class = mLSTMLayerConfig

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, padding: str = "right", **kwargs: Any
    ) -> Tensor:
        """Runs all steps: see :meth:`torch_ext.mLSTMLayer.forward`. Others are ignored."""
        return super().forward(x, lengths, padding)

    def step(
        self,
        x: Tensor,
        mlstm_state: tuple[Tensor, Tensor, Tensor] | None = None,
        conv_state: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, BlockState]:
        """One step.

        Args:
            x: ``(B, 1, embedding_dim)``.
            mlstm_state: C ``(B, H, K, K)``, n ``(B, H, K, 1)`` and m ``(B, H, 1, 1)``. Zeros if
                omitted.
            conv_state: the last inputs of the convolution, one more than it needs, ``(B,
                conv1d_kernel_size, inner)``, in a tuple. Zeros if omitted.

        Returns:
            ``(B, 1, embedding_dim)``, and both states by their names, for the next step. Unlike
            the peer's they are new tensors, float32 whatever the parameters are.
        """
        state = self._from_peer(x.shape[0], mlstm_state, conv_state)
        y, after = self._step(_one_step("mLSTMLayer.step", x), state)
        return y.unsqueeze(1), self._to_peer(after, state)

    def _from_peer(
        self,
        batch_size: int,
        mlstm_state: tuple[Tensor, Tensor, Tensor] | None,
        conv_state: tuple[Tensor, ...] | None,
    ) -> State:
        state = self.init_state(batch_size)
        if conv_state is not None:
            state[0] = conv_state[0][:, 1:].transpose(1, 2).to(state[0])
        if mlstm_state is not None:
            C, n, m = mlstm_state
            parts = (C, n.squeeze(-1), m.flatten(-3) if m.dim() == 4 else m)
            for k, part in enumerate(parts, 1):
                state[k] = part.to(state[k])
        return state

    def _to_peer(self, state: State, before: State) -> BlockState:
        conv, C, n, m = state
        oldest = before[0][:, :, :1] if self.d_conv > 1 else conv.new_zeros(*conv.shape[:2], 1)
        conv = torch.cat([oldest, conv], 2).transpose(1, 2)
        return {
            "mlstm_state": (C, n.unsqueeze(-1), m[..., None, None]),
            "conv_state": (conv,),
        }


class mLSTMBlock(_mLSTMBlock):
    """The package's ``mLSTMBlock``: parameters as :class:`torch_ext.mLSTMBlock`.

    Args:
        config: an :class:`mLSTMBlockConfig`, which is copied.
    """

    config_class = mLSTMBlockConfig
    _layer_class = mLSTMLayer

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, padding: str = "right", **kwargs: Any
    ) -> Tensor:
        """Runs all steps: see :meth:`torch_ext.mLSTMBlock.forward`. Others are ignored."""
        return super().forward(x, lengths, padding)

    def step(self, x: Tensor, **state: Any) -> tuple[Tensor, BlockState]:
        """One step: ``x`` ``(B, 1, embedding_dim)`` and, by their names, the states of
        :meth:`mLSTMLayer.step`."""
        y, after = self.xlstm.step(self.xlstm_norm(x), **state)
        return x + y, after


class xLSTMBlockStack(_xLSTMBlockStack):
    """The package's ``xLSTMBlockStack``: parameters as :class:`torch_ext.xLSTMBlockStack`.

    Args:
        config: an :class:`xLSTMBlockStackConfig`, which is copied.

    Raises:
        NotImplementedError: a block is an sLSTM block.

    Example:
        >>> from torch_ext.compat.xlstm import (
        ...     mLSTMBlockConfig, mLSTMLayerConfig, xLSTMBlockStack, xLSTMBlockStackConfig
        ... )
        >>> block = mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=2))
        >>> config = xLSTMBlockStackConfig(mlstm_block=block, num_blocks=2, embedding_dim=16)
        >>> stack = xLSTMBlockStack(config)
        >>> stack(torch.randn(2, 10, 16)).shape
        torch.Size([2, 10, 16])
    """

    config_class = xLSTMBlockStackConfig
    _block_class = mLSTMBlock

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, padding: str = "right", **kwargs: Any
    ) -> Tensor:
        """Runs all steps: see :meth:`torch_ext.xLSTMBlockStack.forward`. Others are ignored."""
        return super().forward(x, lengths, padding)

    def step(self, x: Tensor, state: StackState | None = None) -> tuple[Tensor, StackState]:
        """One step: ``x`` ``(B, 1, embedding_dim)`` and each block's states under ``"block_0"`` and
        so on; zeros where they are omitted."""
        after = {}
        for k, block in enumerate(self.blocks):
            name = f"block_{k}"
            x, after[name] = block.step(x, **(state or {}).get(name, {}))
        return self.post_blocks_norm(x), after


class xLSTMLMModel(_xLSTMLM):
    """The package's ``xLSTMLMModel``: parameters as :class:`torch_ext.xLSTMLM`, of which it also has
    ``prefill``, ``init_state``, ``generate`` and ``from_pretrained``.

    Args:
        config: an :class:`xLSTMLMModelConfig`, which is copied.
        kwargs: ignored.

    Raises:
        NotImplementedError: a block is an sLSTM block.

    Example:
        >>> from torch_ext.compat.xlstm import (
        ...     mLSTMBlockConfig, mLSTMLayerConfig, xLSTMLMModel, xLSTMLMModelConfig
        ... )
        >>> block = mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=2))
        >>> model = xLSTMLMModel(
        ...     xLSTMLMModelConfig(mlstm_block=block, num_blocks=2, embedding_dim=16, vocab_size=50)
        ... )
        >>> logits, state = model.step(torch.tensor([[3]]))
        >>> logits, state = model.step(logits.argmax(-1), state)
        >>> logits.shape
        torch.Size([1, 1, 50])
    """

    config_class = xLSTMLMModelConfig
    _stack_class = xLSTMBlockStack

    def __init__(self, config: xLSTMLMModelConfig, **kwargs: Any) -> None:
        self._init(read_config(xLSTMLMModelConfig, "xLSTMLMModel", config), False, None, None)

    def _init(self, *arguments: Any) -> None:
        super()._init(*arguments)
        self.config = self._config

    def forward(self, idx: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """Logits ``(B, T, vocab_size)`` of ``idx`` ``(B, T)``: see
        :meth:`torch_ext.xLSTMLM.forward`."""
        return super().forward(idx, lengths, padding)

    def step(
        self, idx: Tensor, state: StackState | None = None, **kwargs: Any
    ) -> tuple[Tensor, StackState]:
        """One token of each sequence, ``(B, 1)``, and the state of :meth:`xLSTMBlockStack.step`, to
        logits ``(B, 1, vocab_size)`` and the next state."""
        x, state = self.xlstm_block_stack.step(self._embed(idx), state)
        return self._logits(x), state

    def get_weight_decay_optim_groups(
        self, **kwargs: Any
    ) -> tuple[tuple[nn.Parameter, ...], tuple[nn.Parameter, ...]]:
        """The parameters with weight decay, and those without: norms, biases and skips, and the
        embedding unless ``weight_decay_on_embedding``."""
        decay, no_decay = self._groups()
        return tuple(decay.values()), tuple(no_decay.values())

    def get_weight_decay_optim_group_param_names(
        self, **kwargs: Any
    ) -> tuple[list[str], list[str]]:
        """The names of ``get_weight_decay_optim_groups``."""
        decay, no_decay = self._groups()
        return list(decay), list(no_decay)

    def _groups(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        groups: tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]] = ({}, {})
        for name, p in self.named_parameters():
            if p.requires_grad:
                decays = "weight" in name and "norm" not in name
                if p is self.token_embedding.weight:
                    decays = self.config.weight_decay_on_embedding
                groups[0 if decays else 1][name] = p
        return groups


class sLSTMLayer(nn.Module):
    """The package's ``sLSTMLayer``, which there is not yet.

    Raises:
        NotImplementedError: always.
    """

    config_class = sLSTMLayerConfig

    def __init__(self, config: sLSTMLayerConfig) -> None:
        raise NotImplementedError(f"{type(self).__name__}: there are no sLSTM blocks yet")


class sLSTMBlock(sLSTMLayer):
    """The package's ``sLSTMBlock``, which there is not yet.

    Raises:
        NotImplementedError: always.
    """

    config_class = sLSTMBlockConfig
