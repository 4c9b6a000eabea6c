r"""Mamba: a gated layer around a causal convolution and the selective scan.

.. math::
    x, z &= \text{in\_proj}(\text{input}) \\
    u &= \text{silu}(\text{conv1d}(x)) \\
    \delta, B, C &= \text{x\_proj}(u), \qquad \delta \leftarrow \text{dt\_proj}(\delta) \\
    \text{output} &= \text{out\_proj}(\text{selective\_scan}(u, \delta, A, B, C, D, z))

Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752,
section 3.4. Parameters have the names, shapes and initial values of the package mamba_ssm.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._padding import last_inputs, valid_steps
from ._sequence_layer import check_state_type, shape_text
from .causal_conv1d import causal_conv1d
from .selective_scan import selective_scan

# The convolution's last inputs, and the scan's states.
State = tuple[Tensor, Tensor]


def mamba_step(
    x: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    state: State,
    state_indices: Tensor | None = None,
) -> tuple[Tensor, State]:
    r"""One step of a whole :class:`Mamba` layer, by its weights: for decoding.

    .. math::
        x, z &= W_\text{in} \, \text{input} + b_\text{in} \\
        u &= \text{silu}(\text{conv1d}(x)) \\
        \delta, B, C &= W_x u, \qquad \delta \leftarrow \text{softplus}(W_\delta \delta + b_\delta) \\
        h &\leftarrow e^{-\delta e^{A_\text{log}}} h + \delta B u \\
        \text{output} &= W_\text{out} ((C h + D u) \, \text{silu}(z)) + b_\text{out}

    Gu & Dao 2023, arXiv:2312.00752, section 3.4.

    Args:
        x: ``(B, d_model)``, of any floating dtype.
        in_proj_weight: ``(2 * d_inner, d_model)``, the rows of x, then z.
        in_proj_bias: ``(2 * d_inner,)`` or None.
        conv_weight: ``(d_inner, W)``.
        conv_bias: ``(d_inner,)`` or None.
        x_proj_weight: ``(R + 2 * N, d_inner)``, the rows of the step size, B and C.
        dt_proj_weight: ``(d_inner, R)``.
        dt_proj_bias: ``(d_inner,)`` or None.
        A_log: ``(d_inner, N)``, real.
        D: ``(d_inner,)`` or None.
        out_proj_weight: ``(d_out, d_inner)``.
        out_proj_bias: ``(d_out,)`` or None.
        state: the convolution's last inputs ``(B, d_inner, W - 1)``, of x's dtype or wider, and the
            scan's states ``(B, d_inner, N)``, float32 (float64 with float64 weights).
        state_indices: rows of ``state``, ``(B,)``, for states ``(num_slots, ...)`` of which each
            row of x has one; where it is negative, ``y`` is 0 and no state changes.

    Returns:
        ``y``, ``(B, d_out)``, and the next state; with ``state_indices`` all of its rows.

    Raises:
        ValueError: a shape differs from the above, or an index is not below ``num_slots``.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> m = torch_ext.Mamba(8)
        >>> weights = [
        ...     m.in_proj.weight, None, m.conv1d.weight[:, 0], m.conv1d.bias, m.x_proj.weight,
        ...     m.dt_proj.weight, m.dt_proj.bias, m.A_log, m.D, m.out_proj.weight, None,
        ... ]
        >>> x, state = torch.randn(2, 8), m.init_state(2)
        >>> y, next_state = torch_ext.mamba_step(x, *weights, state)
        >>> torch.equal(y, m.step(x, state)[0])
        True
    """
    y, conv_state, scan_state = torch.ops.torch_ext.mamba_step(
        x, in_proj_weight, in_proj_bias, conv_weight, conv_bias, x_proj_weight, dt_proj_weight,
        dt_proj_bias, A_log, D, out_proj_weight, out_proj_bias, state[0], state[1], state_indices,
    )  # fmt: skip
    return y, (conv_state, scan_state)


def mamba_step_(
    x: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    state: State,
    state_indices: Tensor | None = None,
) -> Tensor:
    r"""One step of a whole :class:`Mamba` layer that overwrites both tensors of ``state``.

    Otherwise as :func:`mamba_step`; not differentiable, so where an input requires grad it raises a
    RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``y``, ``(B, d_out)``.

    Example:
        >>> m = torch_ext.Mamba(8)
        >>> x, pool, slots = torch.randn(2, 8), m.init_state(5), torch.tensor([3, -1])
        >>> with torch.no_grad():
        ...     y = torch_ext.mamba_step_(
        ...         x, m.in_proj.weight, None, m.conv1d.weight[:, 0], m.conv1d.bias, m.x_proj.weight,
        ...         m.dt_proj.weight, m.dt_proj.bias, m.A_log, m.D, m.out_proj.weight, None, pool,
        ...         slots,
        ...     )
        >>> [bool(row.any()) for row in pool[1]]
        [False, False, False, True, False]
    """
    return torch.ops.torch_ext.mamba_step_(
        x, in_proj_weight, in_proj_bias, conv_weight, conv_bias, x_proj_weight, dt_proj_weight,
        dt_proj_bias, A_log, D, out_proj_weight, out_proj_bias, state[0], state[1], state_indices,
    )  # fmt: skip


class Mamba(nn.Module):
    r"""The Mamba layer, for whole sequences, chunks of them, and single steps.

    Args:
        d_model: channels of input and output.
        d_state: states of each inner channel.
        d_conv: steps that the convolution sees, the current one included.
        expand: inner channels, in multiples of ``d_model``.
        dt_rank: rank of the step sizes' projection; ``"auto"`` is ``ceil(d_model / 16)``.
        dt_min: the step sizes are drawn between ``dt_min`` and ``dt_max``, uniformly in the
            logarithm, and stand in ``dt_proj.bias``.
        dt_max: see ``dt_min``.
        dt_init: of ``dt_proj.weight``: ``"random"`` is uniform between plus and minus
            ``dt_scale / sqrt(dt_rank)``, ``"constant"`` is that number.
        dt_scale: see ``dt_init``.
        dt_init_floor: smallest initial step size.
        conv_bias: False leaves out the convolution's bias.
        bias: True adds biases to ``in_proj`` and ``out_proj``.
        use_fast_path: taken and ignored, as there is only one path: for code written for mamba_ssm.
        layer_idx: kept as an attribute, for code written for mamba_ssm.
        device: of the parameters.
        dtype: of the parameters but ``A_log`` and ``D``, which are float32 or wider. States are
            float32, and float64 if the parameters are, under autocast too.
        bidirectional: a second direction with parameters of its own (``conv1d_b``, ``x_proj_b``,
            ``dt_proj_b``, ``A_b_log``, ``D_b``) runs from a sequence's last step to its first, and
            both are added before ``out_proj``. It has ``forward`` alone, no states and no steps.

    Attributes:
        in_proj.weight: ``(2 * d_inner, d_model)``, the rows of x, then z.
        conv1d.weight: ``(d_inner, 1, d_conv)``.
        x_proj.weight: ``(dt_rank + 2 * d_state, d_inner)``: step size, B, C.
        dt_proj.weight: ``(d_inner, dt_rank)``.
        A_log: ``(d_inner, d_state)``; A is ``-exp(A_log)``.
        D: ``(d_inner,)``.
        out_proj.weight: ``(d_model, d_inner)``.

    Example:
        >>> mamba = torch_ext.Mamba(16)
        >>> x = torch.randn(2, 10, 16)
        >>> y = mamba(x)
        >>> first, state = mamba.prefill(x[:, :7])
        >>> second, state = mamba.prefill(x[:, 7:9], state)
        >>> last, state = mamba.step(x[:, 9], state)
        >>> torch.allclose(torch.cat([first, second, last[:, None]], 1), y, atol=1e-5)
        True
    """

    __constants__ = ["bidirectional"]

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        for name, value in [("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)]:
            if value < 1:
                raise ValueError(f"Mamba: {name} is {value}, expected at least 1")
        if int(expand * d_model) < 1:
            raise ValueError(f"Mamba: expand is {expand}, expected at least 1 / d_model")
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f'Mamba: dt_rank is {dt_rank!r}, expected a number or "auto"')
        if not isinstance(dt_rank, str) and dt_rank < 1:
            raise ValueError(f"Mamba: dt_rank is {dt_rank}, expected at least 1")
        if dt_init not in ("random", "constant"):
            raise ValueError(f'Mamba: dt_init is {dt_init!r}, expected "random" or "constant"')
        if not 0 < dt_min <= dt_max:
            raise ValueError(
                f"Mamba: dt_min is {dt_min} and dt_max {dt_max}, expected 0 < dt_min <= dt_max"
            )
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = self.conv_dim = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.layer_idx = layer_idx
        self.bidirectional = bidirectional
        self._dt = (dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

        factory = {"device": device, "dtype": dtype}
        wide = (
            torch.float64 if torch.empty(0, dtype=dtype).dtype is torch.float64 else torch.float32
        )
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        for tail in ("", "_b") if bidirectional else ("",):
            conv1d = nn.Conv1d(
                self.d_inner, self.d_inner, d_conv, groups=self.d_inner, bias=conv_bias,
                padding=d_conv - 1, **factory,
            )  # fmt: skip
            x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
            dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)
            A_log = nn.Parameter(torch.empty(self.d_inner, d_state, device=device, dtype=wide))
            D = nn.Parameter(torch.empty(self.d_inner, device=device, dtype=wide))
            for parameter in (A_log, D):
                parameter._no_weight_decay = True
            self.add_module("conv1d" + tail, conv1d)
            self.add_module("x_proj" + tail, x_proj)
            self.add_module("dt_proj" + tail, dt_proj)
            self.register_parameter("A_b_log" if tail else "A_log", A_log)
            self.register_parameter("D" + tail, D)
            self._reset_recurrence(dt_proj, A_log, D)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    @torch.no_grad()
    def _reset_recurrence(self, dt_proj: nn.Linear, A_log: Tensor, D: Tensor) -> None:
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor = self._dt
        bound = dt_scale * self.dt_rank**-0.5
        if dt_init == "constant":
            dt_proj.weight.fill_(bound)
        else:
            dt_proj.weight.uniform_(-bound, bound)
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.empty_like(D).uniform_(low, high).exp().clamp_min(dt_init_floor)
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        dt_proj.bias._no_reinit = True
        A_log.copy_(torch.arange(1, self.d_state + 1, device=A_log.device).log().expand_as(A_log))
        D.fill_(1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``."""
        self.in_proj.reset_parameters()
        self.conv1d.reset_parameters()
        self.x_proj.reset_parameters()
        self.out_proj.reset_parameters()
        self._reset_recurrence(self.dt_proj, self.A_log, self.D)
        if self.bidirectional:
            self.conv1d_b.reset_parameters()
            self.x_proj_b.reset_parameters()
            self._reset_recurrence(self.dt_proj_b, self.A_b_log, self.D_b)

    def extra_repr(self) -> str:
        text = f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"
        return text + (", bidirectional=True" if self.bidirectional else "")

    def forward(self, x: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """Runs all steps, from zero states.

        Args:
            x: ``(B, T, d_model)``.
            lengths: number of steps of each row of a padded batch, integers, ``(B,)``. Padding
                changes no result of the others, whatever stands there; its own outputs are 0.
            padding: side on which the padding is, ``"right"`` or ``"left"``.

        Returns:
            ``(B, T, d_model)``.
        """
        if not self.bidirectional:
            return self.prefill(x, None, lengths, padding)[0]
        self._check(x)
        valid = self._valid(x, lengths, padding)
        if valid is not None:
            x = torch.where(valid, x, 0.0)
        inner, z = self.in_proj(x).chunk(2, -1)
        conv, scan = self._zeros(x.shape[0])
        y = self._run(
            inner, z, conv, scan, valid, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight,
            self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D,
        )[0]  # fmt: skip
        back = self._run(
            inner.flip(1), z.flip(1), conv, scan, None if valid is None else valid.flip(1),
            self.conv1d_b.weight, self.conv1d_b.bias, self.x_proj_b.weight, self.dt_proj_b.weight,
            self.dt_proj_b.bias, self.A_b_log, self.D_b,
        )[0]  # fmt: skip
        y = self.out_proj(y + back.flip(1))
        return y if valid is None else torch.where(valid, y, 0.0)

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
            x: the next steps, ``(B, T, d_model)``.
            state: see ``init_state``. Zeros if omitted; it has to be where padding is on the left.
            lengths: as in ``forward``. The state is that after the last step of each row.
            padding: as in ``forward``.

        Returns:
            ``(B, T, d_model)`` and the state after the last step, with which the next steps of the
            same sequences give what they would have given in one call.
        """
        if self.bidirectional:
            raise RuntimeError(
                "Mamba.prefill: the layer is bidirectional, expected one direction: "
                "the second one starts from the last step"
            )
        self._check(x)
        valid = self._valid(x, lengths, padding)
        if valid is not None:
            x = torch.where(valid, x, 0.0)
            if state is not None and padding == "left":
                raise ValueError(
                    "Mamba.prefill: state is given, expected None with padding on the left, "
                    "which would stand between the state and the first step"
                )
        if state is None:
            state = self._zeros(x.shape[0])
        self._check_state(state, x.shape[0])
        inner, z = self.in_proj(x).chunk(2, -1)
        y, conv, scan = self._run(
            inner, z, state[0], state[1], valid, self.conv1d.weight, self.conv1d.bias,
            self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D,
        )  # fmt: skip
        y = self.out_proj(y)
        if valid is not None:
            y = torch.where(valid, y, 0.0)
        if lengths is not None and padding == "right":
            # Without the padding, which the convolution has run over.
            conv = last_inputs(state[0], inner, lengths)
        return y, (conv.to(state[0].dtype), scan)

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: the convolution's last inputs ``(B, d_inner, d_conv - 1)``, and the scan's states
        ``(B, d_inner, d_state)``."""
        return self._zeros(batch_size)

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: ``x`` ``(B, d_model)`` and a state to ``(B, d_model)`` and the next state."""
        if self.bidirectional:
            raise RuntimeError(
                "Mamba.step: the layer is bidirectional, expected one direction: "
                "the second one starts from the last step"
            )
        if x.dim() != 2 or x.shape[1] != self.d_model:
            raise ValueError(
                f"Mamba.step: x has shape {shape_text(x)}, expected (B, d_model={self.d_model})"
            )
        self._check_state(state, x.shape[0])
        return mamba_step(
            x, self.in_proj.weight, self.in_proj.bias, self.conv1d.weight.squeeze(1),
            self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias,
            self.A_log, self.D, self.out_proj.weight, self.out_proj.bias, state,
        )  # fmt: skip

    def _run(
        self,
        inner: Tensor,
        z: Tensor,
        conv_state: Tensor,
        scan_state: Tensor,
        valid: Tensor | None,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        x_weight: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One direction between the projections, and its states."""
        if valid is not None:
            inner = torch.where(valid, inner, 0.0)
        u, conv_state = causal_conv1d(
            inner, conv_weight.squeeze(1), conv_bias, conv_state.to(inner.dtype), "silu"
        )
        delta, B, C = F.linear(u, x_weight).split([self.dt_rank, self.d_state, self.d_state], -1)
        delta = F.linear(delta, dt_weight)
        if valid is not None:  # a step of size 0 keeps the state
            delta = torch.where(valid, delta, -1e4)
        y, scan_state = selective_scan(
            u, delta, -torch.exp(A_log), B, C, D, z, dt_bias, scan_state, True
        )
        return y, conv_state, scan_state

    def _conv_inputs(self, x: Tensor) -> Tensor:
        return self.in_proj(x).chunk(2, -1)[0]

    def _zeros(self, batch_size: int) -> State:
        wide = torch.float64 if self.A_log.dtype == torch.float64 else torch.float32
        return (
            torch.zeros(
                [batch_size, self.d_inner, self.d_conv - 1], dtype=wide, device=self.D.device
            ),
            torch.zeros([batch_size, self.d_inner, self.d_state], dtype=wide, device=self.D.device),
        )

    def _check_state(self, state: State, batch_size: int) -> None:
        if not torch.jit.is_scripting():
            check_state_type("Mamba", state, 2)
        conv, scan = state
        if list(conv.shape) != [batch_size, self.d_inner, self.d_conv - 1]:
            raise ValueError(
                f"Mamba: state[0] has shape {shape_text(conv)}, expected (B={batch_size}, "
                f"d_inner={self.d_inner}, d_conv - 1={self.d_conv - 1})"
            )
        if list(scan.shape) != [batch_size, self.d_inner, self.d_state]:
            raise ValueError(
                f"Mamba: state[1] has shape {shape_text(scan)}, expected (B={batch_size}, "
                f"d_inner={self.d_inner}, d_state={self.d_state})"
            )

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(
                f"Mamba: x has shape {shape_text(x)}, expected (B, T, d_model={self.d_model})"
            )

    def _valid(self, x: Tensor, lengths: Tensor | None, padding: str) -> Tensor | None:
        """Where there is no padding, ``(B, T, 1)``."""
        return valid_steps("Mamba", x, lengths, padding)
