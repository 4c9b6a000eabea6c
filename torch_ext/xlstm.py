r"""The blocks of xLSTM: those of the paper, and those of the language model xLSTM-7B.

.. math::
    x &\leftarrow x + \text{mLSTM}(\text{norm}(x)) \\
    x &\leftarrow x + \text{FFN}(\text{norm}(x)) \qquad \text{(xLSTM-7B)}

Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517, section 2.4 and figure
11 (:class:`mLSTMLayer`, :class:`mLSTMBlock`, :class:`xLSTMBlockStack`); Beck et al. 2025, "xLSTM
7B: A Recurrent LLM for Fast and Efficient Inference", arXiv:2503.13427, section 3
(:class:`xLSTMLargeLayer`, :class:`xLSTMLargeBlock`). Parameters have the names, shapes and initial
values of the package xlstm; those of the second kind the initial values of transformers' xLSTM,
as the package draws none.

All have the same states: a list of tensors for a layer or a block, a list of those for a stack, in
float32 (float64 in double modules).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._padding import last_inputs, last_step, valid_steps
from ._sequence_layer import shape_text
from ._xlstm_config import (
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    read_config,
    xLSTMBlockStackConfig,
    xLSTMLargeConfig,
)
from .causal_conv1d import causal_conv1d, causal_conv1d_step
from .linear_scan import state_dtype
from .mlstm import mlstm, mlstm_step

# Of one layer or block, in the order that its init_state says.
State = list[Tensor]


# ---- parts ----
class HeadwiseLinear(nn.Module):
    """A linear map of each group of channels: ``weight`` ``(groups, out, in)``."""

    def __init__(
        self,
        channels: int,
        blocksize: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        shape = (channels // blocksize, blocksize, blocksize)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        groups, _, width = self.weight.shape
        y = torch.einsum("...gi,goi->...go", x.unflatten(-1, [groups, width]), self.weight)
        y = y.flatten(-2)
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)  # autocast rounds y alone


class CausalConv1d(nn.Module):
    """What holds the convolution's parameters, as ``conv.weight`` and ``conv.bias``."""

    def __init__(
        self,
        channels: int,
        width: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv1d(
            channels, channels, width, groups=channels, padding=width - 1, **factory
        )


class LayerNorm(nn.LayerNorm):
    """Without a bias, and with ``1 + weight`` as its scale."""

    def __init__(
        self, dim: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__(dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, None, self.eps)


class RMSNorm(nn.Module):
    """Root mean square in float32, then rounded, then scaled."""

    __constants__ = ["eps", "wide"]

    def __init__(
        self,
        dim: int,
        eps: float,
        bias: bool,
        wide: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.wide = wide
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.wide:
            x = x.to(state_dtype(dtype))
        y = F.rms_norm(x, [x.shape[-1]], None, self.eps).to(dtype) * self.weight
        bias = self.bias
        return y if bias is None else y + bias


class MultiHeadNorm(nn.Module):
    """A layer norm of each head: ``(..., H, V)`` to ``(..., H * V)``.

    Args:
        channels: ``H * V``.
        eps: added to the variance.
        residual: the scale is ``1 + weight``, not ``weight``.
        bias: add one.
        wide: compute in float32 where ``x`` is of half precision.
        device: of the parameters.
        dtype: of the parameters.
    """

    __constants__ = ["eps", "residual", "wide"]

    def __init__(
        self,
        channels: int,
        eps: float,
        residual: bool,
        bias: bool,
        wide: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.residual = residual
        self.wide = wide
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.residual else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.wide:
            x = x.to(state_dtype(dtype))
        y = F.layer_norm(x, [x.shape[-1]], None, None, self.eps).to(dtype).flatten(-2)
        y = y * (1 + self.weight if self.residual else self.weight)
        bias = self.bias
        return y if bias is None else y + bias


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)``: near 0 as it is, never beyond ``cap``."""
    return x if cap is None else cap * torch.tanh(x / cap)


def small_init_(weight: Tensor, dim: int) -> None:
    """Nguyen & Salazar 2019, "Transformers without Tears", arXiv:1910.05895."""
    nn.init.normal_(weight, std=math.sqrt(2 / (5 * dim)))


def wang_init_(weight: Tensor, dim: int, num_blocks: int) -> None:
    """For what is added to the residual: smaller, the more blocks there are."""
    nn.init.normal_(weight, std=2 / num_blocks / math.sqrt(dim))


def zero_bias_(*modules: nn.Module) -> None:
    for module in modules:
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_layer_state(name: str, state: State, shapes: list[list[int]], names: list[str]) -> None:
    """That ``state`` is a list of tensors of these shapes, whose ``names`` errors say."""
    if not torch.jit.is_scripting():
        _check_types(name, state, names)
    for k, shape in enumerate(shapes):
        if list(state[k].shape) != shape:
            expected = ", ".join([str(size) for size in shape])
            raise ValueError(
                f"{name}: state[{k}] has shape {shape_text(state[k])}, expected {names[k]} of shape "
                f"({expected})"
            )


@torch.jit.unused
def _check_types(name: str, state: object, names: list[str]) -> None:
    many = isinstance(state, list | tuple)
    if many and len(state) == len(names) and all(isinstance(part, Tensor) for part in state):
        return
    came = type(state).__name__
    if many:
        came = f"[{', '.join(type(part).__name__ for part in state)}]"
    raise TypeError(
        f"{name}: state is {came}, expected a list of {len(names)} tensors ({', '.join(names)}), as "
        "init_state makes it"
    )


def _check_sequence(name: str, x: Tensor, dim: int) -> None:
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(
            f"{name}: x has shape {shape_text(x)}, expected (B, T, embedding_dim={dim})"
        )


def _check_step(name: str, x: Tensor, dim: int) -> None:
    if x.dim() != 2 or x.shape[1] != dim:
        raise ValueError(
            f"{name}.step: x has shape {shape_text(x)}, expected (B, embedding_dim={dim})"
        )


def _no_state_before_padding(name: str, state: State | None, padding: str) -> None:
    if state is not None and padding == "left":
        raise ValueError(
            f"{name}.prefill: state is given, expected None with padding on the left, which would "
            "stand between the state and the first step"
        )


def _close_gates(i: Tensor, f: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """In the padding nothing is written and nothing forgotten."""
    if valid is None:
        return i, f
    return torch.where(valid, i, -1e4), torch.where(valid, f, 1e4)


# ---- the paper's ----
class MLSTMCell(nn.Module):
    """Gates and norm of an :class:`mLSTMLayer`, of which the parameters' names speak."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.igate = nn.Linear(3 * channels, num_heads, **factory)
        self.fgate = nn.Linear(3 * channels, num_heads, **factory)
        self.outnorm = MultiHeadNorm(channels, 1e-5, True, False, False, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.outnorm.reset_parameters()
        nn.init.zeros_(self.fgate.weight)
        bias = self.fgate.bias
        bias.copy_(torch.linspace(3, 6, bias.shape[0], device=bias.device))
        nn.init.zeros_(self.igate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)


class mLSTMLayer(nn.Module):
    r"""The mLSTM layer of the xLSTM paper, for whole sequences, chunks of them, and single steps.

    .. math::
        u, z &= \text{proj\_up}(x), \qquad c = \text{silu}(\text{conv1d}(u)) \\
        q, k, v &= \text{q\_proj}(c), \text{k\_proj}(c), \text{v\_proj}(u) \\
        i, f &= \text{igate}([q, k, v]), \text{fgate}([q, k, v]) \\
        h &= \text{outnorm}(\text{mlstm}(q, k, v, i, f)) \\
        y &= \text{proj\_down}((h + \text{learnable\_skip} \odot c) \odot \text{silu}(z))

    Beck et al. 2024, "xLSTM", arXiv:2405.04517, figure 11; ``q``, ``k`` and ``v`` come from small
    blocks of channels each, and the gates are those of :func:`torch_ext.mlstm`.

    Args:
        config: an ``mLSTMLayerConfig`` of the package xlstm or of :mod:`torch_ext.compat.xlstm`,
            any object or mapping with such fields, or None. It is copied.
        device: of the parameters.
        dtype: of the parameters. States are float32, and float64 if they are, under autocast too.
        fields: go before those of ``config``:

            * ``embedding_dim``: channels of input and output. There is no default.
            * ``num_heads`` (4).
            * ``proj_factor`` (2.0): inner channels, in multiples of ``embedding_dim``;
              ``round_proj_up_to_multiple_of`` (64) makes them a multiple of itself, and
              ``round_proj_up_dim_up`` (True) says whether upwards.
            * ``conv1d_kernel_size`` (4): steps that the convolution sees, this one included.
            * ``qkv_proj_blocksize`` (4): channels of a block of ``q_proj``, ``k_proj``, ``v_proj``.
            * ``bias`` (False): of the projections.
            * ``dropout`` (0.0): probability of a zero in the output, in training.
            * ``context_length``: taken and ignored: any length is right.

    Attributes:
        proj_up.weight: ``(2 * inner, embedding_dim)``, the rows of u, then z.
        q_proj.weight, k_proj.weight, v_proj.weight: ``(inner / blocksize, blocksize, blocksize)``.
        conv1d.conv.weight: ``(inner, 1, conv1d_kernel_size)``; ``conv1d.conv.bias``.
        mlstm_cell.igate.weight, mlstm_cell.fgate.weight: ``(num_heads, 3 * inner)``, zero at first;
            the biases begin as N(0, 0.1^2), and from 3 to 6 over the heads.
        mlstm_cell.outnorm.weight: ``(inner,)``, what is added to a scale of 1.
        learnable_skip: ``(inner,)``.
        proj_down.weight: ``(embedding_dim, inner)``.
        config: the fields.

    Example:
        >>> layer = torch_ext.mLSTMLayer(embedding_dim=16, num_heads=2)
        >>> x = torch.randn(2, 10, 16)
        >>> y = layer(x)
        >>> first, state = layer.prefill(x[:, :9])
        >>> last, state = layer.step(x[:, 9], state)
        >>> torch.allclose(torch.cat([first, last[:, None]], 1), y, atol=1e-5)
        True
    """

    __constants__ = ["embedding_dim", "inner_dim", "num_heads", "d_conv"]

    def __init__(
        self,
        config: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        self.config = config = read_config(mLSTMLayerConfig, "mLSTMLayer", config, fields)
        for option in ("embedding_dim", "num_heads", "conv1d_kernel_size", "qkv_proj_blocksize"):
            value = getattr(config, option)
            if value < 1:
                raise ValueError(f"mLSTMLayer: {option} is {value}, expected at least 1")
        inner = config._inner_embedding_dim
        if inner is None or inner < 1:
            raise ValueError(
                f"mLSTMLayer: proj_factor is {config.proj_factor}, expected at least one inner "
                f"channel, which are {inner}"
            )
        for option in ("num_heads", "qkv_proj_blocksize"):
            value = getattr(config, option)
            if inner % value != 0:
                raise ValueError(
                    f"mLSTMLayer: {option} is {value}, expected a divisor of the {inner} inner "
                    "channels"
                )
        self.embedding_dim: int = config.embedding_dim
        self.inner_dim: int = inner
        self.num_heads: int = config.num_heads
        self.d_conv: int = config.conv1d_kernel_size
        factory = {"device": device, "dtype": dtype}
        bias, block = config.bias, config.qkv_proj_blocksize

        self.proj_up = nn.Linear(self.embedding_dim, 2 * inner, bias=bias, **factory)
        self.q_proj = HeadwiseLinear(inner, block, bias, **factory)
        self.k_proj = HeadwiseLinear(inner, block, bias, **factory)
        self.v_proj = HeadwiseLinear(inner, block, bias, **factory)
        self.conv1d = CausalConv1d(inner, self.d_conv, **factory)
        self.mlstm_cell = MLSTMCell(inner, self.num_heads, **factory)
        self.learnable_skip = nn.Parameter(torch.empty(inner, **factory))
        self.proj_down = nn.Linear(inner, self.embedding_dim, bias=bias, **factory)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``."""
        dim = self.embedding_dim
        for module in (self.proj_up, self.q_proj, self.k_proj, self.v_proj):
            small_init_(module.weight, dim)
        wang_init_(self.proj_down.weight, dim, self.config._num_blocks)
        zero_bias_(self.proj_up, self.q_proj, self.k_proj, self.v_proj, self.proj_down)
        self.conv1d.conv.reset_parameters()
        nn.init.ones_(self.learnable_skip)
        self.mlstm_cell.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.embedding_dim}, num_heads={self.num_heads}"

    def forward(self, x: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """Runs all steps, from zero states.

        Args:
            x: ``(B, T, embedding_dim)``.
            lengths: number of steps of each row of a padded batch, integers, ``(B,)``. Padding
                changes no result of the others, whatever stands there; its own outputs are 0.
            padding: side on which the padding is, ``"right"`` or ``"left"``.

        Returns:
            ``(B, T, embedding_dim)``.
        """
        return self.prefill(x, None, lengths, padding)[0]

    @torch.jit.export
    def prefill(
        self,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        padding: str = "right",
    ) -> tuple[Tensor, State]:
        """``forward`` from a state to a state: for prompts, streams and truncated backpropagation.

        Args:
            x: the next steps, ``(B, T, embedding_dim)``.
            state: see ``init_state``. Zeros if omitted; it has to be where padding is on the left.
            lengths: as in ``forward``. The state is that after the last step of each row.
            padding: as in ``forward``.

        Returns:
            ``(B, T, embedding_dim)`` and the state after the last step, with which the next steps
            of the same sequences give what they would have given in one call.
        """
        _check_sequence("mLSTMLayer", x, self.embedding_dim)
        valid = valid_steps("mLSTMLayer", x, lengths, padding)
        if valid is not None:
            x = torch.where(valid, x, 0.0)
            _no_state_before_padding("mLSTMLayer", state, padding)
        if state is None:
            state = self.init_state(x.shape[0])
        self._check_state(state, x.shape[0])
        u, z = self.proj_up(x).chunk(2, -1)
        if valid is not None:
            u = torch.where(valid, u, 0.0)
        weight = self.conv1d.conv.weight.squeeze(1)
        c, conv = causal_conv1d(u, weight, self.conv1d.conv.bias, state[0].to(u.dtype), "silu")
        q, k, v, i, f = self._project(u, c)
        i, f = _close_gates(i, f, valid)
        h, (C, n, m) = mlstm(q, k, v, i, f, (state[1], state[2], state[3]), 1.0)
        y = self._finish(h, c, z)
        if valid is not None:
            y = torch.where(valid, y, 0.0)
        if lengths is not None and padding == "right":
            conv = last_inputs(state[0], u, lengths)
        return y, [conv.to(state[0].dtype), C, n, m]

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: the convolution's last inputs ``(B, inner, conv1d_kernel_size - 1)``, and the
        matrices C ``(B, H, K, K)``, n ``(B, H, K)`` and m ``(B, H)`` of :func:`torch_ext.mlstm`, as
        the package xlstm has them: it scales the keys, not the queries."""
        weight = self.learnable_skip
        state: State = []
        for shape in self._shapes(batch_size):
            state.append(torch.zeros(shape, dtype=state_dtype(weight.dtype), device=weight.device))
        return state

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: ``x`` ``(B, embedding_dim)`` and a state to ``(B, embedding_dim)`` and the next
        state."""
        return self._step(x, state)

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """``step``, which a subclass may give to another package's."""
        _check_step("mLSTMLayer", x, self.embedding_dim)
        self._check_state(state, x.shape[0])
        u, z = self.proj_up(x).chunk(2, -1)
        weight = self.conv1d.conv.weight.squeeze(1)
        c, conv = causal_conv1d_step(
            u, weight, self.conv1d.conv.bias, state[0].to(u.dtype), None, "silu"
        )
        q, k, v, i, f = self._project(u, c)
        h, (C, n, m) = mlstm_step(q, k, v, i, f, (state[1], state[2], state[3]), None, 1.0)
        return self._finish(h, c, z), [conv.to(state[0].dtype), C, n, m]

    def _project(self, u: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and gates of ``(..., inner)``."""
        q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(u)
        qkv = torch.cat([q, k, v], -1)
        i, f = self.mlstm_cell.igate(qkv), self.mlstm_cell.fgate(qkv)
        heads = [self.num_heads, self.inner_dim // self.num_heads]
        # The keys are scaled, not the queries: so are the package's states.
        k = k * heads[1] ** -0.5
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads), i, f

    def _finish(self, h: Tensor, c: Tensor, z: Tensor) -> Tensor:
        y = self.mlstm_cell.outnorm(h) + self.learnable_skip * c
        return self.dropout(self.proj_down(y * F.silu(z)))

    def _shapes(self, batch_size: int) -> list[list[int]]:
        heads, width = self.num_heads, self.inner_dim // self.num_heads
        return [
            [batch_size, self.inner_dim, self.d_conv - 1],
            [batch_size, heads, width, width],
            [batch_size, heads, width],
            [batch_size, heads],
        ]

    def _check_state(self, state: State, batch_size: int) -> None:
        names = ["the convolution's inputs", "C", "n", "m"]
        check_layer_state("mLSTMLayer", state, self._shapes(batch_size), names)


class mLSTMBlock(nn.Module):
    """A residual around a norm and an :class:`mLSTMLayer`: ``y = x + xlstm(xlstm_norm(x))``.

    Args:
        config: an ``mLSTMBlockConfig`` of the package xlstm or of :mod:`torch_ext.compat.xlstm`,
            any object or mapping with its field ``mlstm``, or None.
        device: of the parameters.
        dtype: of the parameters.
        fields: go before those of ``config``, or, where there is none, are those of
            :class:`mLSTMLayer`.

    Attributes:
        xlstm_norm.weight: ``(embedding_dim,)``, what is added to a scale of 1.
        xlstm: the :class:`mLSTMLayer`.

    Example:
        >>> block = torch_ext.mLSTMBlock(embedding_dim=16)
        >>> y, state = block.prefill(torch.randn(2, 10, 16))
        >>> y, state = block.step(torch.randn(2, 16), state)
    """

    _layer_class = mLSTMLayer

    def __init__(
        self,
        config: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        if config is None and "mlstm" not in fields:
            inner = read_config(mLSTMLayerConfig, "mLSTMBlock", None, fields)
            config, fields = mLSTMBlockConfig(mlstm=inner), {}
        self.config = config = read_config(mLSTMBlockConfig, "mLSTMBlock", config, fields)
        self.xlstm = self._layer_class(config.mlstm, device=device, dtype=dtype)
        self.xlstm_norm = LayerNorm(self.xlstm.embedding_dim, device, dtype)

    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``."""
        self.xlstm_norm.reset_parameters()
        self.xlstm.reset_parameters()

    def forward(self, x: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """Runs all steps, from zero states: see :meth:`mLSTMLayer.forward`."""
        x = self._mask(x, lengths, padding)
        return x + self.xlstm(self.xlstm_norm(x), lengths, padding)

    @torch.jit.export
    def prefill(
        self,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        padding: str = "right",
    ) -> tuple[Tensor, State]:
        """``forward`` from a state to a state: see :meth:`mLSTMLayer.prefill`."""
        x = self._mask(x, lengths, padding)
        y, state = self.xlstm.prefill(self.xlstm_norm(x), state, lengths, padding)
        return x + y, state

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: see :meth:`mLSTMLayer.init_state`."""
        return self.xlstm.init_state(batch_size)

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: ``x`` ``(B, embedding_dim)`` and a state to ``(B, embedding_dim)`` and the next
        state."""
        return self._step(x, state)

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        _check_step("mLSTMBlock", x, self.xlstm.embedding_dim)
        y, state = self.xlstm._step(self.xlstm_norm(x), state)
        return x + y, state

    def _mask(self, x: Tensor, lengths: Tensor | None, padding: str) -> Tensor:
        _check_sequence("mLSTMBlock", x, self.xlstm.embedding_dim)
        valid = valid_steps("mLSTMBlock", x, lengths, padding)
        # Before the norm, whose gradient would be NaN where the padding is.
        return x if valid is None else torch.where(valid, x, 0.0)


class BlockStack(nn.Module):
    """Blocks one after the other, then a norm: what both kinds of xLSTM have in common.

    A block of any kind fits in: it has ``forward``, ``prefill``, ``init_state`` and ``_step``, with
    a list of tensors for its state.

    Attributes:
        activation_checkpointing: ``forward`` keeps the blocks' inputs alone for the backward and
            computes the rest again (see :mod:`torch.utils.checkpoint`).
    """

    activation_checkpointing: bool

    def _norm(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """``x`` ``(B, T, embedding_dim)`` to the same shape, zero in the padding."""
        valid = valid_steps("xLSTM", x, lengths, padding)
        # Through each block's forward, where hooks, wrappers and sharding take hold.
        for block in self.blocks:
            if torch.jit.is_scripting():
                x = block(x, lengths, padding)
            elif self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, lengths, padding, use_reentrant=False)
            else:
                x = block(x, lengths, padding)
        x = self._norm(x)
        return x if valid is None else torch.where(valid, x, 0.0)

    @torch.jit.export
    def prefill(
        self,
        x: Tensor,
        state: list[State] | None = None,
        lengths: Tensor | None = None,
        padding: str = "right",
        last_only: bool = False,
    ) -> tuple[Tensor, list[State]]:
        """``forward`` from a state to a state; the last step of each row alone, ``(B,
        embedding_dim)``, if ``last_only``."""
        valid = valid_steps("xLSTM", x, lengths, padding)
        if state is not None:
            self._check_state(state)
        new_state: list[State] = []
        for k, block in enumerate(self.blocks):
            block_state: State | None = None
            if state is not None:
                block_state = state[k]
            x, after = block.prefill(x, block_state, lengths, padding)
            new_state.append(after)
        if last_only:
            x = last_step(x, lengths, padding)
            if valid is not None and lengths is not None:
                valid = (lengths.to(x.device) > 0).unsqueeze(1)
        x = self._norm(x)
        return x if valid is None else torch.where(valid, x, 0.0), new_state

    @torch.jit.export
    def init_state(self, batch_size: int) -> list[State]:
        """Zeros: the state of each block."""
        state: list[State] = []
        for block in self.blocks:
            state.append(block.init_state(batch_size))
        return state

    @torch.jit.export
    def step(self, x: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """One step: ``x`` ``(B, embedding_dim)`` and a state to the same shape and the next
        state."""
        return self._step(x, state)

    def _step(self, x: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        self._check_state(state)
        new_state: list[State] = []
        for k, block in enumerate(self.blocks):
            x, after = block._step(x, state[k])
            new_state.append(after)
        return self._norm(x), new_state

    def _check_state(self, state: list[State]) -> None:
        if not torch.jit.is_scripting() and not isinstance(state, list | tuple):
            raise TypeError(
                f"xLSTM: state is {type(state).__name__}, expected a list with the state of each "
                "block, as init_state makes it"
            )
        if len(state) != len(self.blocks):
            raise ValueError(
                f"xLSTM: state has {len(state)} entries, expected num_blocks={len(self.blocks)}"
            )


class xLSTMBlockStack(BlockStack):
    """Blocks of the xLSTM paper, one after the other, and a norm: a model without its vocabulary.

    Args:
        config: an ``xLSTMBlockStackConfig`` of the package xlstm or of
            :mod:`torch_ext.compat.xlstm`, any object or mapping with such fields, or None. Such
            without a field ``mlstm_block`` have only sLSTM blocks.
        device: of the parameters.
        dtype: of the parameters.
        fields: go before those of ``config``:

            * ``mlstm_block``: the config of its :class:`mLSTMBlock`, see there; a mapping will do,
              such as ``{"mlstm": {"num_heads": 4}}``.
            * ``embedding_dim`` (128), ``num_blocks`` (1), ``bias`` (False), ``dropout`` (0.0): of
              every block.
            * ``add_post_blocks_norm`` (True): the norm at the end.
            * ``slstm_at`` (``[]``): the numbers of the blocks that are sLSTM blocks.
            * ``context_length``: taken and ignored: any length is right.

    Raises:
        NotImplementedError: a block is an sLSTM block.

    Attributes:
        blocks.{i}: each an :class:`mLSTMBlock`.
        post_blocks_norm.weight: ``(embedding_dim,)``, what is added to a scale of 1.

    Example:
        >>> stack = torch_ext.xLSTMBlockStack(mlstm_block={}, embedding_dim=16, num_blocks=2)
        >>> y, state = stack.prefill(torch.randn(2, 10, 16))
        >>> y, state = stack.step(torch.randn(2, 16), state)
    """

    _block_class = mLSTMBlock

    def __init__(
        self,
        config: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation_checkpointing: bool = False,
        **fields: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.config = config = read_config(xLSTMBlockStackConfig, name, config, fields)
        if config.num_blocks < 1:
            raise ValueError(f"{name}: num_blocks is {config.num_blocks}, expected at least 1")
        self.activation_checkpointing = activation_checkpointing
        self.blocks = nn.ModuleList()
        for k, kind in enumerate(config.block_map):
            if kind == 1:
                raise NotImplementedError(
                    f"{name}: blocks.{k} is an sLSTM block, by slstm_at={config.slstm_at} and "
                    f"mlstm_block={'None' if config.mlstm_block is None else 'given'}; expected "
                    "mLSTM blocks alone: there are no sLSTM blocks yet"
                )
            config.mlstm_block._block_idx = k
            self.blocks.append(self._block_class(config.mlstm_block, device=device, dtype=dtype))
        if config.add_post_blocks_norm:
            self.post_blocks_norm = LayerNorm(config.embedding_dim, device, dtype)
        else:
            self.post_blocks_norm = nn.Identity()

    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``."""
        for block in self.blocks:
            block.reset_parameters()
        if self.config.add_post_blocks_norm:
            self.post_blocks_norm.reset_parameters()

    def _norm(self, x: Tensor) -> Tensor:
        return self.post_blocks_norm(x)


# ---- those of xLSTM-7B ----
class xLSTMLargeLayer(nn.Module):
    r"""The mLSTM layer of xLSTM-7B, for whole sequences, chunks of them, and single steps.

    .. math::
        q, k, v, o &= W_q x, W_k x, W_v x, W_o x \\
        i, f &= \text{cap}(W_i x + b_i), \text{cap}(W_f x + b_f), \qquad
        \text{cap}(a) = c \tanh(a / c) \\
        y &= \text{out\_proj}(\sigma(o) \odot \text{norm}(\text{mlstm}(q, k, v, i, f)))

    with :func:`torch_ext.mlstm` and a layer norm of each head. Beck et al. 2025, "xLSTM 7B",
    arXiv:2503.13427, section 3.

    Args:
        config: see :class:`xLSTMLargeBlock`.
        device: of the parameters.
        dtype: of the parameters. States are float32, and float64 if they are, under autocast too.
        fields: see :class:`xLSTMLargeBlock`.

    Attributes:
        q.weight, k.weight: ``(embedding_dim * qk_dim_factor, embedding_dim)``.
        v.weight, ogate_preact.weight: ``(embedding_dim * v_dim_factor, embedding_dim)``.
        igate_preact.weight, fgate_preact.weight: ``(num_heads, embedding_dim)``, zero at first; the
            biases begin as -10, and from 3 to 6 over the heads.
        qkv_opreact.weight, ifgate_preact.weight: with ``weight_mode="fused"`` the rows of q, k, v
            and o, and those of i and f, in the place of the ones above.
        multihead_norm.weight: ``(embedding_dim * v_dim_factor,)``.
        out_proj.weight: ``(embedding_dim, embedding_dim * v_dim_factor)``.
    """

    __constants__ = [
        "embedding_dim", "num_heads", "qk_dim", "v_dim", "fused", "eps", "input_gate",
    ]  # fmt: skip
    gate_soft_cap: float | None

    def __init__(
        self,
        config: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        self.config = config = read_large_config("xLSTMLargeLayer", config, fields)
        dim = config.embedding_dim
        self.embedding_dim: int = dim
        self.num_heads: int = config.num_heads
        self.qk_dim = int(dim * config.qk_dim_factor)
        self.v_dim = int(dim * config.v_dim_factor)
        for option, width in (("qk_dim_factor", self.qk_dim), ("v_dim_factor", self.v_dim)):
            if width < 1 or width % self.num_heads != 0:
                raise ValueError(
                    f"xLSTMLargeLayer: {option} is {getattr(config, option)}, expected a multiple "
                    f"of num_heads={self.num_heads} for embedding_dim * {option}, which is {width}"
                )
        self.fused: bool = config.weight_mode == "fused"
        self.gate_soft_cap = config.gate_soft_cap
        self.eps: float = config.eps
        # The peer has it in the name of its kernel.
        self.input_gate = "sigmoid" if "siging" in config.chunkwise_kernel else "exp"

        def linear(rows: int, bias: bool = config.use_bias) -> nn.Linear:
            return nn.Linear(dim, rows, bias=bias, device=device, dtype=dtype)

        if self.fused:
            self.qkv_opreact = linear(2 * self.qk_dim + 2 * self.v_dim)
            self.ifgate_preact = linear(2 * self.num_heads, True)
        else:
            self.q = linear(self.qk_dim)
            self.k = linear(self.qk_dim)
            self.v = linear(self.v_dim)
            self.ogate_preact = linear(self.v_dim)
            self.igate_preact = linear(self.num_heads, True)
            self.fgate_preact = linear(self.num_heads, True)
        self.multihead_norm = MultiHeadNorm(
            self.v_dim, config.norm_eps, False, config.use_bias,
            config.norm_reduction_force_float32, device, dtype,
        )  # fmt: skip
        self.out_proj = nn.Linear(self.v_dim, dim, bias=config.use_bias, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``."""
        if self.fused:
            inputs, gates = [self.qkv_opreact], [self.ifgate_preact]
            i, f = self.ifgate_preact.bias.chunk(2)
        else:
            inputs = [self.q, self.k, self.v, self.ogate_preact]
            gates = [self.igate_preact, self.fgate_preact]
            i, f = self.igate_preact.bias, self.fgate_preact.bias
        for module in inputs:
            small_init_(module.weight, self.embedding_dim)
        for module in gates:
            nn.init.zeros_(module.weight)
        i.fill_(-10)
        f.copy_(torch.linspace(3, 6, self.num_heads, device=f.device))
        self.multihead_norm.reset_parameters()
        wang_init_(self.out_proj.weight, self.embedding_dim, self.config.num_blocks)
        zero_bias_(*inputs, self.out_proj)

    def extra_repr(self) -> str:
        return f"{self.embedding_dim}, num_heads={self.num_heads}"

    def forward(self, x: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """Runs all steps, from zero states: see :meth:`mLSTMLayer.forward`."""
        return self.prefill(x, None, lengths, padding)[0]

    @torch.jit.export
    def prefill(
        self,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        padding: str = "right",
    ) -> tuple[Tensor, State]:
        """``forward`` from a state to a state: see :meth:`mLSTMLayer.prefill`."""
        _check_sequence("xLSTMLargeLayer", x, self.embedding_dim)
        valid = valid_steps("xLSTMLargeLayer", x, lengths, padding)
        if valid is not None:
            x = torch.where(valid, x, 0.0)
            _no_state_before_padding("xLSTMLargeLayer", state, padding)
        if state is None:
            state = self.init_state(x.shape[0])
        self._check_state(state, x.shape[0])
        q, k, v, o, i, f = self._project(x)
        i, f = _close_gates(i, f, valid)
        h, (C, n, m) = mlstm(
            q, k, v, i, f, (state[0], state[1], state[2]), None, self.eps, self.input_gate
        )
        y = self.out_proj(torch.sigmoid(o) * self.multihead_norm(h))
        if valid is not None:
            y = torch.where(valid, y, 0.0)
        return y, [C, n, m]

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: the matrices C ``(B, H, K, V)``, n ``(B, H, K)`` and m ``(B, H)`` of
        :func:`torch_ext.mlstm`."""
        weight = self.multihead_norm.weight
        state: State = []
        for shape in self._shapes(batch_size):
            state.append(torch.zeros(shape, dtype=state_dtype(weight.dtype), device=weight.device))
        return state

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: ``x`` ``(B, embedding_dim)`` and a state to ``(B, embedding_dim)`` and the next
        state."""
        return self._step(x, state)

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        _check_step("xLSTMLargeLayer", x, self.embedding_dim)
        self._check_state(state, x.shape[0])
        q, k, v, o, i, f = self._project(x)
        h, (C, n, m) = mlstm_step(
            q, k, v, i, f, (state[0], state[1], state[2]), None, None, self.eps, self.input_gate
        )
        return self.out_proj(torch.sigmoid(o) * self.multihead_norm(h)), [C, n, m]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values, output gate, input and forget gate of ``(..., embedding_dim)``."""
        if self.fused:
            widths = [self.qk_dim, self.qk_dim, self.v_dim, self.v_dim]
            q, k, v, o = self.qkv_opreact(x).split(widths, -1)
            i, f = soft_cap(self.ifgate_preact(x), self.gate_soft_cap).chunk(2, -1)
        else:
            q, k, v, o = self.q(x), self.k(x), self.v(x), self.ogate_preact(x)
            i = soft_cap(self.igate_preact(x), self.gate_soft_cap)
            f = soft_cap(self.fgate_preact(x), self.gate_soft_cap)
        qk = [self.num_heads, self.qk_dim // self.num_heads]
        v = v.unflatten(-1, [self.num_heads, self.v_dim // self.num_heads])
        return q.unflatten(-1, qk), k.unflatten(-1, qk), v, o, i, f

    def _shapes(self, batch_size: int) -> list[list[int]]:
        heads = self.num_heads
        width = self.qk_dim // heads
        return [
            [batch_size, heads, width, self.v_dim // heads],
            [batch_size, heads, width],
            [batch_size, heads],
        ]

    def _check_state(self, state: State, batch_size: int) -> None:
        names = ["C", "n", "m"]
        check_layer_state("xLSTMLargeLayer", state, self._shapes(batch_size), names)


class FeedForward(nn.Module):
    r"""SwiGLU: ``proj_down(silu(proj_up_gate(x)) * proj_up(x))``.

    Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """

    __constants__ = ["fused"]

    def __init__(
        self,
        config: xLSTMLargeConfig,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.config = config
        dim, bias = config.embedding_dim, config.use_bias
        factory = {"device": device, "dtype": dtype}
        multiple = config.ffn_round_up_to_multiple_of
        width = int((dim * config.ffn_proj_factor + multiple - 1) // multiple * multiple)
        if width < 1:
            raise ValueError(
                f"xLSTMLargeBlock: ffn_proj_factor is {config.ffn_proj_factor}, expected at least "
                "one channel"
            )
        self.fused: bool = config.weight_mode == "fused"
        if self.fused:
            self.proj_up_gate_z = nn.Linear(dim, 2 * width, bias=bias, **factory)
        else:
            self.proj_up_gate = nn.Linear(dim, width, bias=bias, **factory)
            self.proj_up = nn.Linear(dim, width, bias=bias, **factory)
        self.proj_down = nn.Linear(width, dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        ups = [self.proj_up_gate_z] if self.fused else [self.proj_up_gate, self.proj_up]
        for module in ups:
            small_init_(module.weight, self.config.embedding_dim)
        down = self.proj_down
        wang_init_(down.weight, down.in_features, self.config.num_blocks)
        zero_bias_(*ups, down)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, z = self.proj_up_gate_z(x).chunk(2, -1)
        else:
            gate, z = self.proj_up_gate(x), self.proj_up(x)
        return self.proj_down(F.silu(gate) * z)


class xLSTMLargeBlock(nn.Module):
    """A block of xLSTM-7B: an :class:`xLSTMLargeLayer` and a SwiGLU network, each with a norm before
    and a residual around.

    Args:
        config: an ``xLSTMLargeConfig`` of the package xlstm or of :mod:`torch_ext.compat.xlstm`,
            any object or mapping with such fields, or None. It is copied.
        device: of the parameters.
        dtype: of the parameters.
        fields: go before those of ``config``:

            * ``embedding_dim``: channels of input and output, and ``num_heads``. There are no
              defaults.
            * ``qk_dim_factor`` (0.5), ``v_dim_factor`` (1.0): channels of the queries and keys, and
              of the values, of all heads, in multiples of ``embedding_dim``.
            * ``gate_soft_cap`` (15.0): see :class:`xLSTMLargeLayer`. None leaves it out.
            * ``ffn_proj_factor`` (2.6667), ``ffn_round_up_to_multiple_of`` (64): channels inside of
              the SwiGLU network, in multiples of ``embedding_dim``, and of what they are a multiple.
            * ``use_bias`` (False): of the projections and norms. The gates i and f always have one.
            * ``norm_eps`` (1e-6), ``norm_reduction_force_float32`` (True): of the norms.
            * ``eps`` (1e-6): of :func:`torch_ext.mlstm`.
            * ``weight_mode``: ``"single"`` (default) or ``"fused"``, which has fewer and larger
              matrices.
            * ``num_blocks`` (1): how many of these there will be, for the initial values.
            * ``chunkwise_kernel``: of the names that the peer has, those with ``siging`` make the
              input gate a sigmoid; nothing else follows from it.
            * Others are taken and ignored: the choice of kernels is ours.

    Attributes:
        norm_mlstm.weight, norm_ffn.weight: ``(embedding_dim,)``.
        mlstm_layer: the :class:`xLSTMLargeLayer`.
        ffn: ``proj_up_gate``, ``proj_up`` (``proj_up_gate_z`` when fused) and ``proj_down``.

    Example:
        >>> block = torch_ext.xLSTMLargeBlock(embedding_dim=16, num_heads=2)
        >>> y, state = block.prefill(torch.randn(2, 10, 16))
        >>> y, state = block.step(torch.randn(2, 16), state)
    """

    _layer_class = xLSTMLargeLayer

    def __init__(
        self,
        config: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        self.config = config = read_large_config("xLSTMLargeBlock", config, fields)
        norm = (
            config.embedding_dim, config.norm_eps, config.use_bias,
            config.norm_reduction_force_float32, device, dtype,
        )  # fmt: skip
        self.norm_mlstm = RMSNorm(*norm)
        self.mlstm_layer = self._layer_class(config, device=device, dtype=dtype)
        self.norm_ffn = RMSNorm(*norm)
        self.ffn = FeedForward(config, device, dtype)

    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``."""
        for module in (self.norm_mlstm, self.mlstm_layer, self.norm_ffn, self.ffn):
            module.reset_parameters()

    def forward(self, x: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """Runs all steps, from zero states: see :meth:`mLSTMLayer.forward`."""
        x = self._mask(x, lengths, padding)
        x = x + self.mlstm_layer(self.norm_mlstm(x), lengths, padding)
        return self._feed_forward(x, lengths, padding)

    @torch.jit.export
    def prefill(
        self,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        padding: str = "right",
    ) -> tuple[Tensor, State]:
        """``forward`` from a state to a state: see :meth:`mLSTMLayer.prefill`."""
        x = self._mask(x, lengths, padding)
        y, state = self.mlstm_layer.prefill(self.norm_mlstm(x), state, lengths, padding)
        return self._feed_forward(x + y, lengths, padding), state

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: see :meth:`xLSTMLargeLayer.init_state`."""
        return self.mlstm_layer.init_state(batch_size)

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: ``x`` ``(B, embedding_dim)`` and a state to ``(B, embedding_dim)`` and the next
        state."""
        return self._step(x, state)

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        _check_step("xLSTMLargeBlock", x, self.mlstm_layer.embedding_dim)
        y, state = self.mlstm_layer._step(self.norm_mlstm(x), state)
        x = x + y
        return x + self.ffn(self.norm_ffn(x)), state

    def _feed_forward(self, x: Tensor, lengths: Tensor | None, padding: str) -> Tensor:
        x = x + self.ffn(self.norm_ffn(x))
        # With biases it is not 0 in the padding.
        return self._mask(x, lengths, padding)

    def _mask(self, x: Tensor, lengths: Tensor | None, padding: str) -> Tensor:
        _check_sequence("xLSTMLargeBlock", x, self.mlstm_layer.embedding_dim)
        valid = valid_steps("xLSTMLargeBlock", x, lengths, padding)
        # Before the norm, whose gradient would be NaN where the padding is.
        return x if valid is None else torch.where(valid, x, 0.0)


class LargeBlockStack(BlockStack):
    """What :class:`torch_ext.xLSTMLarge` has as ``backbone``."""

    _block_class = xLSTMLargeBlock

    def __init__(
        self,
        config: xLSTMLargeConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.blocks = nn.ModuleList(
            self._block_class(config, device=device, dtype=dtype) for _ in range(config.num_blocks)
        )
        if config.add_out_norm:
            self.out_norm = RMSNorm(
                config.embedding_dim, config.norm_eps, config.use_bias,
                config.norm_reduction_force_float32, device, dtype,
            )  # fmt: skip
        else:
            self.out_norm = nn.Identity()

    def reset_parameters(self) -> None:
        for block in self.blocks:
            block.reset_parameters()
        if self.config.add_out_norm:
            self.out_norm.reset_parameters()

    def _norm(self, x: Tensor) -> Tensor:
        return self.out_norm(x)


def read_large_config(name: str, config: Any, fields: dict[str, Any]) -> xLSTMLargeConfig:
    """The config of a block, which has no vocabulary and may not know how many there are."""
    for key in ("num_blocks", "vocab_size"):
        there = key in config if isinstance(config, Mapping) else hasattr(config, key)
        if not there:
            fields = {key: 1} | fields
    config = read_config(xLSTMLargeConfig, name, config, fields)
    for option in ("embedding_dim", "num_heads", "num_blocks", "ffn_round_up_to_multiple_of"):
        value = getattr(config, option)
        if value < 1:
            raise ValueError(f"{name}: {option} is {value}, expected at least 1")
    if config.weight_mode not in ("single", "fused"):
        raise ValueError(
            f'{name}: weight_mode is {config.weight_mode!r}, expected "single" or "fused"'
        )
    return config
