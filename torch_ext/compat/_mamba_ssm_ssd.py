"""mamba_ssm's functions of Mamba-2: ``mamba_chunk_scan_combined``, what is fused around it, and its
norm."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mamba2 import gated_rms_norm, limited_steps
from ..ssd import ssd
from ._common import check_indices, check_shape, parameter, wide_dtype, widest
from .causal_conv1d import causal_conv1d_fn

__all__ = [
    "RMSNorm",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "rmsnorm_fn",
]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2's scan: :func:`torch_ext.ssd` by mamba_ssm's name.

    Args:
        x: ``(B, L, H, P)``.
        dt: ``(B, L, H)``.
        A: ``(H,)``.
        B: ``(B, L, G, N)``.
        C: ``(B, L, G, N)``.
        chunk_size: taken and ignored: the kernel chooses its chunks itself.
        D: ``(H,)`` or ``(H, P)``.
        z: gate, ``(B, L, H, P)``.
        dt_bias: ``(H,)``.
        initial_states: ``(B, H, P, N)``. With ``seq_idx`` they enter those first sequences of the
            rows whose number is 0, with ``cu_seqlens`` the first sequence; or, unlike the peer,
            there is one for each sequence of ``cu_seqlens``, ``(num_sequences, H, P, N)``.
        seq_idx: number of the sequence to which each step belongs, where several stand in one row,
            int32 or int64, ``(B, L)``. A new sequence begins wherever it changes, and sees nothing
            of the one before.
        cu_seqlens: where sequences stand end to end in the one row, ``(num_sequences + 1,)``, int32
            or int64. Unlike the peer, which leaves that to ``seq_idx``, it separates them as well;
            beside it ``seq_idx`` is not looked at.
        dt_softplus: softplus after the bias.
        dt_limit: step sizes are kept between these two, after softplus.
        return_final_states: return the states after the last step of each row as well.
        return_varlen_states: with ``cu_seqlens``, return those after each sequence as well.
        state_dtype: taken and ignored: between chunks states are float32 (float64 for float64).

    Returns:
        ``(B, L, H, P)``, the dtype of ``x``; then the final states ``(B, H, P, N)`` and those of the
        sequences ``(num_sequences, H, P, N)``, float32 or float64, through which gradients pass.

    Example:
        >>> from torch_ext.compat.mamba_ssm import mamba_chunk_scan_combined
        >>> x, one = torch.full((1, 4, 1, 1), 4.0), torch.ones(1, 4, 1, 1)
        >>> A = torch.tensor([-0.6931472])  # a half per unit of dt
        >>> mamba_chunk_scan_combined(x, one[..., 0], A, one, one, chunk_size=64).flatten()
        tensor([4.0000, 6.0000, 7.0000, 7.5000])
        >>> two = torch.tensor([[0, 0, 1, 1]])
        >>> mamba_chunk_scan_combined(x, one[..., 0], A, one, one, 64, seq_idx=two).flatten()
        tensor([4., 6., 4., 6.])
    """
    where = "mamba_chunk_scan_combined"
    check_shape(where, "x", x, B=None, L=None, H=None, P=None)
    rows, steps, heads, width = x.shape
    check_shape(where, "dt", dt, B=rows, L=steps, H=heads)
    check_shape(where, "A", A, H=heads)
    check_shape(where, "B", B, B=rows, L=steps, G=None, N=None)
    check_shape(where, "C", C, B=rows, L=steps, G=B.shape[2], N=B.shape[3])
    if B.shape[2] == 0 or heads % B.shape[2]:
        raise ValueError(
            f"{where}: B has G={B.shape[2]} groups, expected a number that divides H={heads}"
        )
    if D is not None:
        check_shape(where, "D", D, **{"H": heads, **({"P": width} if D.dim() == 2 else {})})
    if z is not None:
        check_shape(where, "z", z, B=rows, L=steps, H=heads, P=width)
    if dt_bias is not None:
        check_shape(where, "dt_bias", dt_bias, H=heads)
    if return_varlen_states and cu_seqlens is None:
        raise ValueError(f"{where}: return_varlen_states is True, expected cu_seqlens beside it")

    dtype = widest(x, dt if dt.dtype is torch.float64 else None, B, C, z)
    wide = wide_dtype(dtype)
    # The step sizes may be wider than the rest.
    dt = dt.to(wide if dt.dtype in (torch.float32, torch.float64) else dtype)
    bias = parameter(dt_bias, dtype)
    if tuple(dt_limit) != (0.0, math.inf):
        dt = limited_steps(dt, bias, dt_softplus, (float(dt_limit[0]), float(dt_limit[1])))
        dt, bias, dt_softplus = dt.to(wide), None, False
    states = None if initial_states is None else initial_states.to(wide)
    if states is not None:
        sequences = {} if cu_seqlens is None else {"or num_sequences": len(cu_seqlens) - 1}
        size = rows if states.shape[0] == rows else sequences.get("or num_sequences", rows)
        sizes = {"B": size, "H": heads, "P": width, "N": B.shape[3]}
        check_shape(where, "initial_states", states, **sizes)

    over_time = [x.to(dtype), dt, B.to(dtype), C.to(dtype), None if z is None else z.to(dtype)]
    if cu_seqlens is not None:
        check_indices(where, "cu_seqlens", cu_seqlens, **{"num_sequences + 1": None})
        if rows != 1:
            raise ValueError(f"{where}: x has B={rows}, expected 1 with cu_seqlens")
        if states is not None:
            states = _pad_rows(states, len(cu_seqlens) - 1)
    elif seq_idx is not None and steps > 0:
        check_indices(where, "seq_idx", seq_idx, B=rows, L=steps)
        cu_seqlens = packed(seq_idx)
        over_time = [None if t is None else t.flatten(0, 1).unsqueeze(0) for t in over_time]
        if states is not None:
            states = _first_states(states, seq_idx, cu_seqlens)
    hidden, dt, B, C, z = over_time
    y, after = ssd(
        hidden, dt, parameter(A, dtype), B, C, parameter(D, dtype), z, bias, states, dt_softplus,
        cu_seqlens,
    )  # fmt: skip
    y = y.view(x.shape).to(x.dtype)
    if not return_final_states and not return_varlen_states:
        return y
    outputs = [y]
    if return_final_states:
        final = after
        if cu_seqlens is not None:  # that of the last sequence in each row
            ends = torch.arange(1, rows + 1, device=x.device) * steps
            final = after[torch.searchsorted(cu_seqlens.long(), ends) - 1]
        outputs.append(final)
    if return_varlen_states:
        outputs.append(after)
    return tuple(outputs)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """All of a Mamba-2 layer after its input projection: :class:`torch_ext.Mamba2`'s.

    Args:
        zxbcdt: ``(B, L, 2 * d_mlp + 2 * d_ssm + 2 * G * N + H)``: z0 and x0 of a gated MLP beside
            the scan, z, x, B, C and the step sizes, which get a softplus.
        conv1d_weight: ``(d_ssm + 2 * G * N, W)``.
        conv1d_bias: ``(d_ssm + 2 * G * N,)``.
        dt_bias: ``(H,)``.
        A: ``(H,)``.
        D: ``(H,)`` or ``(H, P)``.
        chunk_size: taken and ignored.
        initial_states: ``(B, H, P, N)``.
        seq_idx: as in :func:`mamba_chunk_scan_combined`, for the convolution as well.
        dt_limit: as in :func:`mamba_chunk_scan_combined`.
        return_final_states: return the states after the last step of each row as well.
        activation: of the convolution: None, ``"silu"`` or ``"swish"``.
        rmsnorm_weight: ``(d_ssm,)``; without it there is no norm behind the scan.
        rmsnorm_eps: added to the mean square, of each of the ``ngroups`` parts of the channels.
        outproj_weight: ``(d_model, d_mlp + d_ssm)``. No projection if omitted.
        outproj_bias: ``(d_model,)``.
        headdim: ``P``, needed where ``D`` is ``(H,)``.
        ngroups: ``G``.
        norm_before_gate: norm, then gate, in place of gate, then norm.
        state_dtype: taken and ignored.

    Returns:
        ``(B, L, d_model)``, or ``(B, L, d_mlp + d_ssm)`` without a projection; with
        ``return_final_states`` also ``(B, H, P, N)``.

    Example:
        >>> from torch_ext.compat.mamba_ssm import mamba_split_conv1d_scan_combined
        >>> m = torch_ext.Mamba2(8, d_state=4, headdim=4)
        >>> x = torch.randn(2, 10, 8)
        >>> y = mamba_split_conv1d_scan_combined(
        ...     m.in_proj(x), m.conv1d.weight[:, 0], m.conv1d.bias, m.dt_bias, -m.A_log.exp(), m.D,
        ...     chunk_size=256, rmsnorm_weight=m.norm.weight, rmsnorm_eps=1e-5, headdim=4,
        ...     outproj_weight=m.out_proj.weight, norm_before_gate=False,
        ... )
        >>> torch.allclose(y, m(x), atol=1e-6)
        True
    """
    where = "mamba_split_conv1d_scan_combined"
    check_shape(where, "conv1d_weight", conv1d_weight, conv_dim=None, W=None)
    check_shape(where, "dt_bias", dt_bias, H=None)
    heads, channels = dt_bias.shape[0], conv1d_weight.shape[0]
    if D.dim() == 1:
        if headdim is None:
            raise ValueError(f"{where}: headdim is None, expected P as D has one dimension")
        check_shape(where, "D", D, H=heads)
    else:
        check_shape(where, "D", D, H=heads, P=headdim)
    width = heads * (D.shape[1] if D.dim() == 2 else headdim)
    states, rest = divmod(channels - width, 2 * ngroups)
    mlp = zxbcdt.shape[-1] - width - channels - heads
    if rest or states < 1 or mlp < 0 or mlp % 2:
        raise ValueError(
            f"{where}: zxbcdt has {zxbcdt.shape[-1]} channels and conv1d_weight {channels}, expected "
            f"2 * d_mlp + 2 * d_ssm + 2 * G * N + H and d_ssm + 2 * G * N, with d_ssm={width}, "
            f"G={ngroups} and H={heads}"
        )
    check_shape(where, "zxbcdt", zxbcdt, B=None, L=None, channels=zxbcdt.shape[-1])
    z0, x0, z, inner, dt = zxbcdt.split([mlp // 2, mlp // 2, width, channels, heads], -1)
    u = causal_conv1d_fn(
        inner.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation
    ).transpose(1, 2)
    hidden, B, C = u.split([width, ngroups * states, ngroups * states], -1)
    gate = None if rmsnorm_weight is not None else z.unflatten(-1, (heads, -1))
    y, final = mamba_chunk_scan_combined(
        hidden.unflatten(-1, (heads, -1)), dt, A, B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)), chunk_size, D, gate, dt_bias, initial_states, seq_idx,
        dt_softplus=True, dt_limit=dt_limit, return_final_states=True,
    )  # fmt: skip
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = gated_rms_norm(y, z, rmsnorm_weight, ngroups, rmsnorm_eps, norm_before_gate)
    if mlp:
        y = torch.cat([F.silu(z0) * x0, y], -1)
    if outproj_weight is not None:
        y = F.linear(y.to(outproj_weight.dtype), outproj_weight, outproj_bias)
    return (y, final) if return_final_states else y


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMSNorm of the last dimension with a gate: ``norm(x) silu(z)``, or ``norm(x silu(z))``.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)``, added before the gate.
        z: the shape of ``x``. No gate if omitted.
        eps: added to the mean square.
        group_size: so many channels are normed by themselves. ``D`` if omitted.
        norm_before_gate: norm, then gate, in place of gate, then norm.

    Returns:
        The shape and dtype of ``x``.

    Example:
        >>> from torch_ext.compat.mamba_ssm import rmsnorm_fn
        >>> x, one = torch.tensor([3.0, -3.0, 1.0, 1.0]), torch.ones(4)
        >>> rmsnorm_fn(x, one, None, group_size=2, eps=0.0)
        tensor([ 1., -1.,  1.,  1.])
    """
    where = "rmsnorm_fn"
    check_shape(where, "weight", weight, D=x.shape[-1])
    if bias is not None:
        check_shape(where, "bias", bias, D=x.shape[-1])
    if z is not None and z.shape != x.shape:
        raise ValueError(f"{where}: z has shape {tuple(z.shape)}, expected {tuple(x.shape)}")
    size = x.shape[-1] if group_size is None else group_size
    if size < 1 or x.shape[-1] % size:
        raise ValueError(
            f"{where}: group_size is {group_size}, expected a number that divides D={x.shape[-1]}"
        )
    return gated_rms_norm(x, z, weight, x.shape[-1] // size, eps, norm_before_gate, bias)


class RMSNorm(nn.Module):
    """mamba_ssm's gated ``RMSNorm``: :func:`rmsnorm_fn` with a weight.

    Example:
        >>> from torch_ext.compat.mamba_ssm import RMSNorm
        >>> norm = RMSNorm(8, group_size=4, norm_before_gate=False)
        >>> norm(torch.randn(2, 8), torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``x`` and the gate ``z``, ``(..., hidden_size)``, to the normed one."""
        return rmsnorm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate
        )


def packed(seq_idx: Tensor) -> Tensor:
    """``cu_seqlens`` of all rows of ``seq_idx`` ``(B, L)`` end to end: a sequence begins with each
    row, and wherever the number changes."""
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([seq_idx.numel()])])


def _pad_rows(states: Tensor, rows: int) -> Tensor:
    """Zeros for the sequences after the first one, which alone has a state."""
    if states.shape[0] == rows:
        return states
    return torch.cat([states, states.new_zeros(rows - states.shape[0], *states.shape[1:])])


def _first_states(states: Tensor, seq_idx: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each row's state for its first sequence, if that has the number 0."""
    rows, steps = seq_idx.shape
    every = states.new_zeros(len(cu_seqlens) - 1, *states.shape[1:])
    first = torch.searchsorted(cu_seqlens, torch.arange(rows, device=states.device) * steps)
    enters = (seq_idx[:, 0] == 0).view(-1, 1, 1, 1)
    return every.index_copy(0, first, torch.where(enters, states, 0.0))
