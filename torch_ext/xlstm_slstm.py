r"""The sLSTM layer and block of the xLSTM paper.

.. math::
    x &\leftarrow x + \text{sLSTM}(\text{norm}(x)) \\
    x &\leftarrow x + \text{FFN}(\text{norm}(x))

Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517, section 2.4 and figure
10. Parameters have the names, shapes and initial values of the package xlstm; states are those of
:mod:`torch_ext.xlstm`, lists of tensors in float32 (float64 in double modules).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._padding import last_inputs, valid_steps
from ._xlstm_config import (
    FeedForwardConfig,
    read_config,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
)
from ._xlstm_parts import (
    CausalConv1d,
    HeadwiseLinear,
    LayerNorm,
    MultiHeadNorm,
    State,
    check_layer_state,
    check_sequence,
    check_step,
    close_gates,
    no_state_before_padding,
    small_init_,
    wang_init_,
    zero_bias_,
)
from .causal_conv1d import causal_conv1d, causal_conv1d_step
from .linear_scan import state_dtype
from .slstm import slstm, slstm_step


# ---- the cell's parameters ----
class SLSTMCell(nn.Module):
    """Recurrent kernel and bias of an :class:`sLSTMLayer`, as either backend of the package has them.

    With gates ``G`` = i, f, z, o, ``H`` heads, ``K`` units each, and ``P`` units seen:

    =====================  ==============  ==============
    backend                ``"cuda"``      ``"vanilla"``
    =====================  ==============  ==============
    ``_recurrent_kernel_`` ``(H, P, G K)`` ``(H, G K, P)``
    ``_bias_``             ``(H G K,)``    ``(G H K,)``
    =====================  ==============  ==============

    The two biases have one shape and another order. What is loaded is put into the order of
    ``backend``: the kernel's shape beside it says which it has.
    """

    __constants__ = ["num_heads", "width", "vanilla"]

    def __init__(
        self,
        config: sLSTMLayerConfig,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads: int = config.num_heads
        self.width: int = config.embedding_dim // config.num_heads
        self.vanilla: bool = config.backend == "vanilla"
        heads, width = self.num_heads, self.width
        shape = (heads, 4 * width, width) if self.vanilla else (heads, width, 4 * width)
        factory = {"device": device, "dtype": dtype}
        self._recurrent_kernel_ = nn.Parameter(torch.empty(shape, **factory))
        self._bias_ = nn.Parameter(torch.empty(4 * heads * width, **factory))

    def forward(self) -> tuple[Tensor, Tensor]:
        """``R`` ``(4, H, K, K)`` and ``bias`` ``(4, H, K)`` of :func:`torch_ext.slstm`, views of the
        parameters."""
        heads, width = self.num_heads, self.width
        kernel, bias = self._recurrent_kernel_, self._bias_
        if self.vanilla:
            R = kernel.view(heads, 4, width, width).transpose(0, 1)
            return R, bias.view(4, heads, width)
        R = kernel.view(heads, width, 4, width).permute(2, 0, 3, 1)
        return R, bias.view(heads, 4, width).transpose(0, 1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The same numbers in either layout."""
        config, kernel = self.config, self._recurrent_kernel_
        bound = config.embedding_dim**-0.5
        R = torch.zeros(4, self.num_heads, self.width, self.width, device=kernel.device)
        bias = torch.zeros(4, self.num_heads, self.width, device=kernel.device)
        if config.recurrent_weight_init == "standard":
            R.uniform_(-bound, bound)
        if config.bias_init == "standard":
            bias.uniform_(-bound, bound)
        elif config.bias_init == "small_init":
            bias[1] = torch.linspace(3, 6, self.width, device=bias.device)
        elif config.bias_init == "powerlaw_blockdependent":
            place = torch.arange(self.width, device=bias.device) / max(self.width - 1, 1)
            depth = config._block_idx / max(config._num_blocks - 1, 1)
            bias[1] = 5 - 12 * place ** (0.3 + 1.3 * depth)
        to_R, to_bias = self()
        to_R.copy_(R)
        to_bias.copy_(bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        kernel = state_dict.get(prefix + "_recurrent_kernel_")
        heads, width = self.num_heads, self.width
        other = (heads, width, 4 * width) if self.vanilla else (heads, 4 * width, width)
        if isinstance(kernel, Tensor) and tuple(kernel.shape) == other:
            state_dict[prefix + "_recurrent_kernel_"] = kernel.transpose(1, 2).contiguous()
            bias = state_dict.get(prefix + "_bias_")
            if isinstance(bias, Tensor) and bias.shape == self._bias_.shape:
                order = (heads, 4, width) if self.vanilla else (4, heads, width)
                state_dict[prefix + "_bias_"] = bias.reshape(order).transpose(0, 1).reshape(-1)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def layout_of_kernel(kernel: Tensor) -> str | None:
    """``"vanilla"``, ``"cuda"``, or None of a shape that neither backend has."""
    if kernel.dim() == 3 and kernel.shape[1] == 4 * kernel.shape[2]:
        return "vanilla"
    if kernel.dim() == 3 and kernel.shape[2] == 4 * kernel.shape[1]:
        return "cuda"
    return None


# ---- the layer ----
class sLSTMLayer(nn.Module):
    r"""The sLSTM layer of the xLSTM paper, for whole sequences, chunks of them, and single steps.

    .. math::
        c &= \text{silu}(\text{conv1d}(x)) \\
        i, f &= \text{fgate}(c), \text{igate}(c), \qquad z, o = \text{zgate}(x), \text{ogate}(x) \\
        y &= \text{group\_norm}(\text{slstm}(i, f, z, o))

    Beck et al. 2024, "xLSTM", arXiv:2405.04517, figure 10. The cell is :func:`torch_ext.slstm`, with
    a recurrent matrix for each head; the gates are linear maps of each head's channels, and the norm
    is a layer norm of each head. ``fgate`` makes the input gate and ``igate`` the forget gate, as in
    the package xlstm, whose checkpoints have them so.

    Args:
        config: an ``sLSTMLayerConfig`` of the package xlstm or of :mod:`torch_ext.compat.xlstm`,
            any object or mapping with such fields, or None. It is copied.
        device: of the parameters.
        dtype: of the parameters. States are float32, and float64 if they are, under autocast too.
        fields: go before those of ``config``:

            * ``embedding_dim``: channels of input and output. There is no default.
            * ``num_heads`` (4).
            * ``conv1d_kernel_size`` (4): steps that the convolution sees, this one included; 0
              leaves out convolution and silu.
            * ``backend`` (``"cuda"``): layout of the recurrent kernel and its bias, ``"cuda"`` or
              ``"vanilla"``, as this backend of the package has them. Nothing else depends on it, and
              ``load_state_dict`` takes both.
            * ``bias_init``: ``"powerlaw_blockdependent"`` (default), ``"small_init"``,
              ``"standard"`` or ``"zeros"``, see ``_bias_``.
            * ``recurrent_weight_init``: ``"zeros"`` (default), or ``"standard"``, uniform in
              +-embedding_dim^-0.5.
            * ``group_norm_weight`` (True): the norm has a weight.
            * ``dropout`` (0.0): probability of a zero between cell and norm, in training.
            * ``gradient_recurrent_cut`` (False): no gradient comes back through the recurrent
              kernel to the step before; ``gradient_recurrent_clipval`` (None): bound on each of its
              elements. (The package's ``"cuda"`` does so, its ``"vanilla"`` does not.)
            * ``forward_clipval`` (None), ``function`` (``"slstm"``): nothing else is there.
            * Others, such as dtypes and shapes of the package's kernels, are taken and ignored, as
              is ``initial_val`` there: states begin as zeros.

    Attributes:
        conv1d.conv.weight: ``(embedding_dim, 1, conv1d_kernel_size)``; ``conv1d.conv.bias``.
        igate.weight, fgate.weight, zgate.weight, ogate.weight: ``(num_heads, K, K)`` with ``K``
            channels of a head, from N(0, 2 / (5 embedding_dim)).
        slstm_cell._recurrent_kernel_: ``(num_heads, K, 4 K)``, or ``(num_heads, 4 K, K)`` of
            ``backend="vanilla"``; gates in the order i, f, z, o.
        slstm_cell._bias_: ``(4 * embedding_dim,)``, heads first, or gates first of
            ``backend="vanilla"``. It begins as 0, but for the forget gate:
            ``5 - 12 (k / (K - 1))^(0.3 + 1.3 r)`` of unit k, with r from 0 in the first block to 1
            in the last one; from 3 to 6 with ``"small_init"``; 0 with ``"zeros"``. With
            ``"standard"`` all of it is uniform in +-embedding_dim^-0.5.
        group_norm.weight: ``(embedding_dim,)``, what is added to a scale of 1.
        config: the fields.

    Raises:
        ValueError: a field is outside of the above, or ``num_heads`` no divisor of
            ``embedding_dim``.
        TypeError: there is no such field.

    Example:
        >>> layer = torch_ext.sLSTMLayer(embedding_dim=16, num_heads=2)
        >>> x = torch.randn(2, 10, 16)
        >>> y = layer(x)
        >>> first, state = layer.prefill(x[:, :9])
        >>> last, state = layer.step(x[:, 9], state)
        >>> torch.allclose(torch.cat([first, last[:, None]], 1), y, atol=1e-5)
        True
    """

    __constants__ = ["embedding_dim", "num_heads", "d_conv", "has_conv"]
    gradient_clip: float | None

    def __init__(
        self,
        config: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        self.config = config = read_config(sLSTMLayerConfig, "sLSTMLayer", config, fields)
        _check_config(config)
        dim = config.embedding_dim
        self.embedding_dim: int = dim
        self.num_heads: int = config.num_heads
        self.d_conv: int = config.conv1d_kernel_size
        self.has_conv: bool = self.d_conv > 0
        self.gradient_clip = config.gradient_recurrent_clipval
        if config.gradient_recurrent_cut:
            self.gradient_clip = 0.0
        factory = {"device": device, "dtype": dtype}
        width = dim // self.num_heads

        if self.has_conv:
            self.conv1d = CausalConv1d(dim, self.d_conv, **factory)
        self.fgate = HeadwiseLinear(dim, width, False, **factory)
        self.igate = HeadwiseLinear(dim, width, False, **factory)
        self.zgate = HeadwiseLinear(dim, width, False, **factory)
        self.ogate = HeadwiseLinear(dim, width, False, **factory)
        self.slstm_cell = SLSTMCell(config, **factory)
        self.group_norm = MultiHeadNorm(
            dim, 1e-5, True, False, False, weight=config.group_norm_weight, **factory
        )
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``."""
        for module in (self.igate, self.fgate, self.zgate, self.ogate):
            small_init_(module.weight, self.embedding_dim)
        if self.has_conv:
            self.conv1d.conv.reset_parameters()
        self.slstm_cell.reset_parameters()
        self.group_norm.reset_parameters()

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
        check_sequence("sLSTMLayer", x, self.embedding_dim)
        valid = valid_steps("sLSTMLayer", x, lengths, padding)
        if valid is not None:
            x = torch.where(valid, x, 0.0)
            no_state_before_padding("sLSTMLayer", state, padding)
        if state is None:
            state = self.init_state(x.shape[0])
        self._check_state(state, x.shape[0])
        c, conv = x, state[0]
        if self.has_conv:
            weight = self.conv1d.conv.weight.squeeze(1)
            c, conv = causal_conv1d(x, weight, self.conv1d.conv.bias, conv.to(x.dtype), "silu")
        if lengths is not None and padding == "right":
            conv = last_inputs(state[0], x, lengths)
        gates = self._gates(x, c, valid)
        update: Tensor | None = None
        if valid is not None:
            update = (
                valid.unsqueeze(3).to(gates.dtype).expand(-1, -1, gates.shape[3], gates.shape[4])
            )
        R, bias = self.slstm_cell()
        y, after = slstm(
            gates, R, bias, (state[1], state[2], state[3], state[4]),
            h_update=update, gradient_clip=self.gradient_clip,
        )  # fmt: skip
        y = self.group_norm(self.dropout(y))
        new_state = [conv.to(state[0].dtype), after[0], after[1], after[2], after[3]]
        if valid is not None and lengths is not None:
            y = torch.where(valid, y, 0.0)
            # Closed gates keep what there is, but where nothing is remembered (n = 0) they write.
            # The first step overwrites it; where there is none, here is the state again.
            empty = (lengths.to(x.device) == 0)[:, None, None]
            for k in range(1, 5):
                new_state[k] = torch.where(empty, state[k], new_state[k])
        return y, new_state

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: the convolution's last inputs ``(B, embedding_dim, conv1d_kernel_size - 1)``, and h,
        c, n and m ``(B, H, K)`` of :func:`torch_ext.slstm`."""
        like = self.slstm_cell._bias_
        state: State = []
        for shape in self._shapes(batch_size):
            state.append(torch.zeros(shape, dtype=state_dtype(like.dtype), device=like.device))
        return state

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: ``x`` ``(B, embedding_dim)`` and a state to ``(B, embedding_dim)`` and the next
        state."""
        return self._step(x, state)

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """``step``, which a subclass may give to another package's."""
        check_step("sLSTMLayer", x, self.embedding_dim)
        self._check_state(state, x.shape[0])
        c, conv = x, state[0]
        if self.has_conv:
            weight = self.conv1d.conv.weight.squeeze(1)
            c, conv = causal_conv1d_step(
                x, weight, self.conv1d.conv.bias, conv.to(x.dtype), None, "silu"
            )
        R, bias = self.slstm_cell()
        y, (h, cell, n, m) = slstm_step(
            self._gates(x, c, None), R, bias, (state[1], state[2], state[3], state[4])
        )
        y = self.group_norm(self.dropout(y))
        return y, [conv.to(state[0].dtype), h, cell, n, m]

    def _gates(self, x: Tensor, c: Tensor, valid: Tensor | None) -> Tensor:
        """Pre-activations ``(..., 4, H, K)`` of i, f, z and o."""
        # Not by mistake: the names of the package's checkpoints.
        i, f = close_gates(self.fgate(c), self.igate(c), valid)
        gates = torch.stack([i, f, self.zgate(x), self.ogate(x)], -2)
        return gates.unflatten(-1, [self.num_heads, self.embedding_dim // self.num_heads])

    def _shapes(self, batch_size: int) -> list[list[int]]:
        heads = [batch_size, self.num_heads, self.embedding_dim // self.num_heads]
        return [
            [batch_size, self.embedding_dim, max(self.d_conv - 1, 0)],
            heads,
            heads,
            heads,
            heads,
        ]

    def _check_state(self, state: State, batch_size: int) -> None:
        names = ["the convolution's inputs", "h", "c", "n", "m"]
        check_layer_state("sLSTMLayer", state, self._shapes(batch_size), names)


def _check_config(config: sLSTMLayerConfig) -> None:
    for option, least in (("embedding_dim", 1), ("num_heads", 1), ("conv1d_kernel_size", 0)):
        value = getattr(config, option)
        if value < least:
            raise ValueError(f"sLSTMLayer: {option} is {value}, expected at least {least}")
    if config.embedding_dim % config.num_heads != 0:
        raise ValueError(
            f"sLSTMLayer: num_heads is {config.num_heads}, expected a divisor of "
            f"embedding_dim={config.embedding_dim}"
        )
    choices = {
        "backend": ("cuda", "vanilla"),
        "function": ("slstm",),
        "bias_init": ("powerlaw_blockdependent", "small_init", "standard", "zeros"),
        "recurrent_weight_init": ("zeros", "standard"),
    }
    for option, known in choices.items():
        value = getattr(config, option)
        if value not in known:
            expected = " or ".join(f'"{word}"' for word in known)
            raise ValueError(f"sLSTMLayer: {option} is {value!r}, expected {expected}")
    if config.forward_clipval is not None:
        raise ValueError(
            f"sLSTMLayer: forward_clipval is {config.forward_clipval}, expected None: nothing is "
            "clipped in the forward"
        )
    clip = config.gradient_recurrent_clipval
    if clip is not None and not clip >= 0:
        raise ValueError(
            f"sLSTMLayer: gradient_recurrent_clipval is {clip}, expected None or at least 0"
        )


# ---- the block ----
class SquaredReLU(nn.Module):
    """``relu(x)^2``: So et al. 2021, "Primer", arXiv:2109.08668."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


_ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "relu^2": SquaredReLU,
    "sigmoid": nn.Sigmoid,
    "swish": nn.SiLU,
    "selu": nn.SELU,
}


class GatedFeedForward(nn.Module):
    r"""``proj_down(act(u) * v)`` with ``u, v = proj_up(x)``.

    Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """

    def __init__(
        self,
        config: FeedForwardConfig,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if config.ff_type != "ffn_gated":
            raise ValueError(f'sLSTMBlock: ff_type is {config.ff_type!r}, expected "ffn_gated"')
        if config.act_fn not in _ACTIVATIONS:
            raise ValueError(
                f"sLSTMBlock: act_fn is {config.act_fn!r}, expected some of {list(_ACTIVATIONS)}"
            )
        width = config._proj_up_dim
        if width is None or width < 1:
            raise ValueError(
                f"sLSTMBlock: proj_factor is {config.proj_factor}, expected at least one channel "
                f"inside of the feed-forward network, which are {width}"
            )
        self.config = config
        dim, bias = config.embedding_dim, config.bias
        factory = {"device": device, "dtype": dtype}
        self.proj_up = nn.Linear(dim, 2 * width, bias=bias, **factory)
        self.proj_down = nn.Linear(width, dim, bias=bias, **factory)
        self.act = _ACTIVATIONS[config.act_fn]()
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        config = self.config
        small_init_(self.proj_up.weight, config.embedding_dim)
        wang_init_(self.proj_down.weight, config.embedding_dim, config._num_blocks)
        zero_bias_(self.proj_up, self.proj_down)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.proj_up(x).chunk(2, -1)
        return self.dropout(self.proj_down(self.act(u) * v))


class sLSTMBlock(nn.Module):
    """An :class:`sLSTMLayer` and a gated feed-forward network, each with a norm before and a residual
    around: ``x + xlstm(xlstm_norm(x))``, then ``x + ffn(ffn_norm(x))``.

    Args:
        config: an ``sLSTMBlockConfig`` of the package xlstm or of :mod:`torch_ext.compat.xlstm`,
            any object or mapping with its fields, or None. It is copied.
        device: of the parameters.
        dtype: of the parameters.
        fields: go before those of ``config``, or, where there is none, are those of
            :class:`sLSTMLayer`, and ``feedforward``:

            * ``slstm``: the config of its :class:`sLSTMLayer`, see there; a mapping will do.
            * ``feedforward``: None leaves the network out. Its fields: ``proj_factor`` (1.3),
              channels inside in multiples of ``embedding_dim``, which
              ``round_proj_up_to_multiple_of`` (64) makes a multiple of itself, upwards by
              ``round_proj_up_dim_up`` (True); ``act_fn``: ``"gelu"`` (default), ``"relu"``,
              ``"relu^2"``, ``"sigmoid"``, ``"swish"`` or ``"selu"``; ``bias`` (False); ``dropout``
              (0.0).

    Attributes:
        xlstm_norm.weight, ffn_norm.weight: ``(embedding_dim,)``, what is added to a scale of 1.
        xlstm: the :class:`sLSTMLayer`.
        ffn.proj_up.weight: ``(2 * inner, embedding_dim)``, the rows of what the activation sees,
            then of what it gates; ``ffn.proj_down.weight``: ``(embedding_dim, inner)``.

    Raises:
        ValueError: a field is outside of the above, or of what :class:`sLSTMLayer` says.
        TypeError: there is no such field.

    Example:
        >>> block = torch_ext.sLSTMBlock(embedding_dim=16)
        >>> y, state = block.prefill(torch.randn(2, 10, 16))
        >>> y, state = block.step(torch.randn(2, 16), state)
    """

    _layer_class = sLSTMLayer
    __constants__ = ["has_ffn"]

    def __init__(
        self,
        config: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        if config is None and "slstm" not in fields:
            block = {key: fields.pop(key) for key in ["feedforward"] if key in fields}
            fields = {"slstm": read_config(sLSTMLayerConfig, "sLSTMBlock", None, fields)} | block
        self.config = config = read_config(sLSTMBlockConfig, "sLSTMBlock", config, fields)
        self.xlstm = self._layer_class(config.slstm, device=device, dtype=dtype)
        self.xlstm_norm = LayerNorm(self.xlstm.embedding_dim, device, dtype)
        self.has_ffn: bool = config.feedforward is not None
        if self.has_ffn:
            self.ffn_norm = LayerNorm(self.xlstm.embedding_dim, device, dtype)
            self.ffn = GatedFeedForward(config.feedforward, device, dtype)

    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``."""
        self.xlstm_norm.reset_parameters()
        self.xlstm.reset_parameters()
        if self.has_ffn:
            self.ffn_norm.reset_parameters()
            self.ffn.reset_parameters()

    def forward(self, x: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """Runs all steps, from zero states: see :meth:`sLSTMLayer.forward`."""
        x = self._mask(x, lengths, padding)
        x = x + self.xlstm(self.xlstm_norm(x), lengths, padding)
        return self._mask(self._feed_forward(x), lengths, padding)

    @torch.jit.export
    def prefill(
        self,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        padding: str = "right",
    ) -> tuple[Tensor, State]:
        """``forward`` from a state to a state: see :meth:`sLSTMLayer.prefill`."""
        x = self._mask(x, lengths, padding)
        y, state = self.xlstm.prefill(self.xlstm_norm(x), state, lengths, padding)
        return self._mask(self._feed_forward(x + y), lengths, padding), state

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: see :meth:`sLSTMLayer.init_state`."""
        return self.xlstm.init_state(batch_size)

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: ``x`` ``(B, embedding_dim)`` and a state to ``(B, embedding_dim)`` and the next
        state."""
        return self._step(x, state)

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        check_step("sLSTMBlock", x, self.xlstm.embedding_dim)
        y, state = self.xlstm._step(self.xlstm_norm(x), state)
        return self._feed_forward(x + y), state

    def _feed_forward(self, x: Tensor) -> Tensor:
        if self.has_ffn:
            x = x + self.ffn(self.ffn_norm(x))
        return x

    def _mask(self, x: Tensor, lengths: Tensor | None, padding: str) -> Tensor:
        check_sequence("sLSTMBlock", x, self.xlstm.embedding_dim)
        valid = valid_steps("sLSTMBlock", x, lengths, padding)
        # Before the norm, whose gradient would be NaN where the padding is; and after the network,
        # which with biases is not 0 there.
        return x if valid is None else torch.where(valid, x, 0.0)
