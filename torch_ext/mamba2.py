r"""Mamba-2: a gated layer around a causal convolution and the scan of matrices, :func:`torch_ext.ssd`.

.. math::
    z, xBC, \delta &= \text{in\_proj}(\text{input}) \\
    x, B, C &= \text{silu}(\text{conv1d}(xBC)) \\
    y &= \text{ssd}(x, \delta, A, B, C, D) \\
    \text{output} &= \text{out\_proj}(\text{RMSNorm}(y\, \text{silu}(z)))

Dao & Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
State Space Duality", arXiv:2405.21060, section 7.1. Parameters have the names, shapes and initial
values of the package mamba_ssm.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._padding import last_inputs, valid_steps
from ._sequence_layer import check_state_type, shape_text
from .causal_conv1d import causal_conv1d, causal_conv1d_step
from .mamba import State
from .ssd import ssd, ssd_step


class GatedRMSNorm(nn.Module):
    """RMSNorm of groups of channels, with a gate ``silu(z)`` before it or after it."""

    __constants__ = ["eps", "groups", "norm_before_gate"]

    def __init__(
        self,
        channels: int,
        groups: int,
        eps: float,
        norm_before_gate: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1)

    def extra_repr(self) -> str:
        return (
            f"{len(self.weight)}, groups={self.groups}, eps={self.eps}, "
            f"norm_before_gate={self.norm_before_gate}"
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(x, z, self.weight, self.groups, self.eps, self.norm_before_gate)


def gated_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    groups: int,
    eps: float,
    norm_before_gate: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """See :class:`GatedRMSNorm`; without ``z`` there is no gate."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    if z is not None and not norm_before_gate:
        y = y * F.silu(z.to(wide))
    y = y.unflatten(-1, [groups, -1])
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if z is not None and norm_before_gate:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype)


def limited_steps(
    dt: Tensor, dt_bias: Tensor | None, softplus: bool, limit: tuple[float, float]
) -> Tensor:
    """The scan's step sizes, which it would make itself if they had no limits."""
    dt = dt.to(torch.float64 if dt.dtype == torch.float64 else torch.float32)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt)
    return dt.clamp(limit[0], limit[1])


class Mamba2(nn.Module):
    r"""The Mamba-2 layer, for whole sequences, chunks of them, and single steps.

    Args:
        d_model: channels of input and output.
        d_state: ``N``, columns of each head's state.
        d_conv: steps that the convolution sees, the current one included.
        conv_init: the convolution's weights are drawn between plus and minus it; as torch.nn.Conv1d
            does if omitted.
        expand: ``d_inner`` in multiples of ``d_model``.
        headdim: ``P``, rows of each head's state; ``d_ssm / headdim`` is the number of heads, ``H``.
        d_ssm: channels that pass through the scan, ``d_inner`` if omitted. The others are a gated
            MLP beside it, ``silu(z0) x0``.
        ngroups: groups of heads with a B and a C each.
        A_init_range: ``-A`` is drawn uniformly between these two.
        D_has_hdim: ``D`` has a number for each channel instead of one for each head.
        rmsnorm: False leaves out the norm behind the scan.
        norm_before_gate: ``RMSNorm(y) silu(z)`` in place of ``RMSNorm(y silu(z))``.
        dt_min: the step sizes are drawn between ``dt_min`` and ``dt_max``, uniformly in the
            logarithm, and stand in ``dt_bias``.
        dt_max: see ``dt_min``.
        dt_init_floor: smallest initial step size.
        dt_limit: step sizes are kept between these two, after softplus.
        bias: True adds biases to ``in_proj`` and ``out_proj``.
        conv_bias: False leaves out the convolution's bias.
        chunk_size, use_mem_eff_path, sequence_parallel: taken and ignored, as there is only one
            path, which chooses its chunks itself: for code written for mamba_ssm.
        layer_idx: kept as an attribute, for code written for mamba_ssm.
        process_group: None; there is no tensor parallelism.
        device: of the parameters.
        dtype: of the parameters but ``A_log``, ``D`` and ``dt_bias``, which are float32 or wider.
            States are float32, and float64 if the parameters are, under autocast too.
        norm_eps: added to the mean square in the norm.

    Attributes:
        in_proj.weight: ``(2 * d_inner + 2 * ngroups * d_state + H, d_model)``, the rows of z, x, B,
            C and the step sizes; before them those of z0 and x0 where ``d_ssm < d_inner``.
        conv1d.weight: ``(d_ssm + 2 * ngroups * d_state, 1, d_conv)``.
        dt_bias: ``(H,)``.
        A_log: ``(H,)``; A is ``-exp(A_log)``.
        D: ``(H,)``, or ``(d_ssm,)`` with ``D_has_hdim``.
        norm.weight: ``(d_ssm,)``; each of the ``ngroups`` parts of the channels is normed by itself.
        out_proj.weight: ``(d_model, d_inner)``.

    Example:
        >>> mamba = torch_ext.Mamba2(16, d_state=8, headdim=4)
        >>> x = torch.randn(2, 10, 16)
        >>> y = mamba(x)
        >>> first, state = mamba.prefill(x[:, :7])
        >>> second, state = mamba.prefill(x[:, 7:9], state)
        >>> last, state = mamba.step(x[:, 9], state)
        >>> torch.allclose(torch.cat([first, second, last[:, None]], 1), y, atol=1e-5)
        True
    """

    __constants__ = ["rmsnorm", "D_has_hdim"]

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, value in [
            ("d_model", d_model),
            ("d_state", d_state),
            ("d_conv", d_conv),
            ("headdim", headdim),
            ("ngroups", ngroups),
        ]:
            if value < 1:
                raise ValueError(f"Mamba2: {name} is {value}, expected at least 1")
        if int(expand * d_model) < 1:
            raise ValueError(f"Mamba2: expand is {expand}, expected at least 1 / d_model")
        d_inner = int(expand * d_model)
        channels = d_inner if d_ssm is None else d_ssm
        if not 0 < channels <= d_inner:
            raise ValueError(f"Mamba2: d_ssm is {d_ssm}, expected 1 to d_inner={d_inner}")
        if channels % headdim:
            raise ValueError(
                f"Mamba2: headdim is {headdim}, expected a number that divides "
                f"{'d_inner' if d_ssm is None else 'd_ssm'}={channels}"
            )
        if channels // headdim % ngroups:
            raise ValueError(
                f"Mamba2: ngroups is {ngroups}, expected a number that divides the number of "
                f"heads, {channels // headdim}"
            )
        if not 0 < dt_min <= dt_max:
            raise ValueError(
                f"Mamba2: dt_min is {dt_min} and dt_max {dt_max}, expected 0 < dt_min <= dt_max"
            )
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"Mamba2: A_init_range is {A_init_range}, expected 0 < low <= high")
        if not 0 <= dt_limit[0] <= dt_limit[1]:
            raise ValueError(f"Mamba2: dt_limit is {dt_limit}, expected 0 <= low <= high")
        if process_group is not None:
            raise ValueError("Mamba2: process_group is given, expected None")
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = d_inner
        self.headdim = headdim
        self.d_ssm = channels
        self.ngroups = ngroups
        self.nheads = channels // headdim
        self.D_has_hdim = D_has_hdim
        self.rmsnorm = rmsnorm
        self.norm_before_gate = norm_before_gate
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self.chunk_size = chunk_size
        self.layer_idx = layer_idx
        self.conv_dim = channels + 2 * ngroups * d_state
        self._parts = [2 * (d_inner - channels), channels, self.conv_dim, self.nheads]
        self._limited = self.dt_limit != (0.0, float("inf"))
        self._init = (conv_init, A_init_range, dt_min, dt_max, dt_init_floor)

        factory = {"device": device, "dtype": dtype}
        wide = (
            torch.float64 if torch.empty(0, dtype=dtype).dtype is torch.float64 else torch.float32
        )
        self.in_proj = nn.Linear(d_model, sum(self._parts), bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, bias=conv_bias,
            padding=d_conv - 1, **factory,
        )  # fmt: skip
        sizes = [("dt_bias", self.nheads), ("A_log", self.nheads)]
        for name, size in [*sizes, ("D", channels if D_has_hdim else self.nheads)]:
            parameter = nn.Parameter(torch.empty(size, device=device, dtype=wide))
            parameter._no_weight_decay = True
            self.register_parameter(name, parameter)
        self.norm = (
            GatedRMSNorm(channels, ngroups, norm_eps, norm_before_gate, device, dtype)
            if rmsnorm
            else None
        )
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **factory)
        self._reset_recurrence()

    @torch.no_grad()
    def _reset_recurrence(self) -> None:
        """What torch.nn's layers have not drawn in their constructors."""
        conv_init, A_init_range, dt_min, dt_max, dt_init_floor = self._init
        if conv_init is not None:
            self.conv1d.weight.uniform_(-conv_init, conv_init)
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.empty_like(self.dt_bias).uniform_(low, high).exp().clamp_min(dt_init_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.dt_bias._no_reinit = True
        self.A_log.uniform_(*A_init_range).log_()
        self.D.fill_(1)

    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``."""
        for module in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            if module is not None:
                module.reset_parameters()
        self._reset_recurrence()

    def extra_repr(self) -> str:
        text = f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"
        return f"{text}, headdim={self.headdim}, ngroups={self.ngroups}"

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
            x: the next steps, ``(B, T, d_model)``.
            state: see ``init_state``. Zeros if omitted; it has to be where padding is on the left.
            lengths: as in ``forward``. The state is that after the last step of each row.
            padding: as in ``forward``.

        Returns:
            ``(B, T, d_model)`` and the state after the last step, with which the next steps of the
            same sequences give what they would have given in one call.
        """
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(
                f"Mamba2: x has shape {shape_text(x)}, expected (B, T, d_model={self.d_model})"
            )
        valid = self._valid(x, lengths, padding)
        if valid is not None:
            x = torch.where(valid, x, 0.0)
            if state is not None and padding == "left":
                raise ValueError(
                    "Mamba2.prefill: state is given, expected None with padding on the left, "
                    "which would stand between the state and the first step"
                )
        if state is None:
            state = self._zeros(x.shape[0])
        self._check_state(state, x.shape[0])
        y, inner, (conv, scan) = self._run(x, state, valid, None)
        if valid is not None:
            y = torch.where(valid, y, 0.0)
        if lengths is not None and padding == "right":
            # Without the padding, which the convolution has run over.
            conv = last_inputs(state[0], inner, lengths)
        return y, (conv.to(state[0].dtype), scan)

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: the convolution's last inputs ``(B, d_ssm + 2 * ngroups * d_state, d_conv - 1)``,
        and the scan's states ``(B, H, headdim, d_state)``."""
        return self._zeros(batch_size)

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: ``x`` ``(B, d_model)`` and a state to ``(B, d_model)`` and the next state."""
        if x.dim() != 2 or x.shape[1] != self.d_model:
            raise ValueError(
                f"Mamba2.step: x has shape {shape_text(x)}, expected (B, d_model={self.d_model})"
            )
        self._check_state(state, x.shape[0])
        mlp, z, inner, dt = self.in_proj(x).split(self._parts, -1)
        u, conv = causal_conv1d_step(
            inner, self.conv1d.weight.squeeze(1), self.conv1d.bias, state[0].to(inner.dtype), None,
            "silu",
        )  # fmt: skip
        hidden, B, C = self._heads(u)
        dt, dt_bias = self._time_steps(dt, None)
        y, scan = ssd_step(
            hidden, dt, -torch.exp(self.A_log), B, C, self._skip(), self._gate(z), dt_bias,
            state[1], None, dt_bias is not None,
        )  # fmt: skip
        return self._finish(y, z, mlp), (conv.to(state[0].dtype), scan)

    def _run(
        self, x: Tensor, state: State, valid: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, State]:
        """Output, the convolution's inputs, and the states after the last steps."""
        mlp, z, inner, dt = self.in_proj(x).split(self._parts, -1)
        if valid is not None:
            inner = torch.where(valid, inner, 0.0)
        u, conv = causal_conv1d(
            inner, self.conv1d.weight.squeeze(1), self.conv1d.bias, state[0].to(inner.dtype),
            "silu", cu_seqlens,
        )  # fmt: skip
        hidden, B, C = self._heads(u)
        dt, dt_bias = self._time_steps(dt, valid)
        y, scan = ssd(
            hidden, dt, -torch.exp(self.A_log), B, C, self._skip(), self._gate(z), dt_bias,
            state[1], dt_bias is not None, cu_seqlens,
        )  # fmt: skip
        return self._finish(y, z, mlp), inner, (conv, scan)

    def _conv_inputs(self, x: Tensor) -> Tensor:
        return self.in_proj(x).split(self._parts, -1)[2]

    def _heads(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, B and C after the convolution."""
        width = self.ngroups * self.d_state
        hidden, B, C = u.split([self.d_ssm, width, width], -1)
        groups = [self.ngroups, self.d_state]
        return (
            hidden.unflatten(-1, [self.nheads, -1]),
            B.unflatten(-1, groups),
            C.unflatten(-1, groups),
        )

    def _time_steps(self, dt: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``dt`` and ``dt_bias`` of the scan, whose softplus comes with the bias. A step of size 0
        keeps the state."""
        if not self._limited:
            return (dt if valid is None else torch.where(valid, dt, -1e4)), self.dt_bias
        dt = limited_steps(dt, self.dt_bias, True, self.dt_limit)
        return (dt if valid is None else torch.where(valid, dt, 0.0)), None

    def _skip(self) -> Tensor:
        return self.D.unflatten(0, [self.nheads, -1]) if self.D_has_hdim else self.D

    def _gate(self, z: Tensor) -> Tensor | None:
        """The scan's gate, where there is no norm that has it."""
        return None if self.rmsnorm else z.unflatten(-1, [self.nheads, -1])

    def _finish(self, y: Tensor, z: Tensor, mlp: Tensor) -> Tensor:
        y = y.flatten(-2)
        if self.norm is not None:
            y = self.norm(y, z)
        if self.d_ssm < self.d_inner:
            z0, x0 = mlp.chunk(2, -1)
            y = torch.cat([F.silu(z0) * x0, y], -1)
        return self.out_proj(y)

    def _zeros(self, batch_size: int) -> State:
        wide = torch.float64 if self.A_log.dtype == torch.float64 else torch.float32
        device = self.A_log.device
        return (
            torch.zeros([batch_size, self.conv_dim, self.d_conv - 1], dtype=wide, device=device),
            torch.zeros(
                [batch_size, self.nheads, self.headdim, self.d_state], dtype=wide, device=device
            ),
        )

    def _check_state(self, state: State, batch_size: int) -> None:
        if not torch.jit.is_scripting():
            check_state_type("Mamba2", state, 2)
        conv, scan = state
        if list(conv.shape) != [batch_size, self.conv_dim, self.d_conv - 1]:
            raise ValueError(
                f"Mamba2: state[0] has shape {shape_text(conv)}, expected (B={batch_size}, "
                f"d_ssm + 2 * ngroups * d_state={self.conv_dim}, d_conv - 1={self.d_conv - 1})"
            )
        if list(scan.shape) != [batch_size, self.nheads, self.headdim, self.d_state]:
            raise ValueError(
                f"Mamba2: state[1] has shape {shape_text(scan)}, expected (B={batch_size}, "
                f"H={self.nheads}, headdim={self.headdim}, d_state={self.d_state})"
            )

    def _valid(self, x: Tensor, lengths: Tensor | None, padding: str) -> Tensor | None:
        """Where there is no padding, ``(B, T, 1)``."""
        return valid_steps("Mamba2", x, lengths, padding)
