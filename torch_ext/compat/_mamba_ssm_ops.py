"""mamba_ssm's functions: ``selective_scan_fn``, ``mamba_inner_fn``, ``selective_state_update``."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .._sequence_layer import is_compiling
from ..causal_conv1d import causal_conv1d, causal_conv1d_reference
from ..selective_scan import (
    selective_scan,
    selective_scan_reference,
    selective_scan_step,
    selective_scan_step_,
)
from ._common import (
    check_indices,
    check_shape,
    needs_grad,
    parameter,
    wide_dtype,
    widest,
    write_rows,
)

__all__ = [
    "mamba_inner_fn",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan: :func:`torch_ext.selective_scan` by mamba_ssm's name.

    Args:
        u: ``(B, D, L)``.
        delta: ``(B, D, L)``.
        A: ``(D, N)``, real or complex.
        B: constant ``(D, N)``, per step ``(B, N, L)``, or ``(B, G, N, L)`` for ``G`` groups of
            channels. Where ``A`` is complex, a constant one is, and one per step has ``2L`` numbers
            in place of ``L``, real and imaginary part in turn (or is complex).
        C: as ``B``.
        D: ``(D,)``.
        z: ``(B, D, L)``.
        delta_bias: ``(D,)``.
        delta_softplus: softplus after the bias.
        return_last_state: return the state after the last step as well.

    Returns:
        ``(B, D, L)``, the dtype of ``u``; with ``return_last_state`` also ``(B, D, N)``, float32
        (float64 for float64 inputs), complex if ``A`` is.

    Notes:
        Unlike the peer's, the last state has a gradient, and is right with a constant ``B``. Inputs
        of several dtypes meet in the widest.

    Example:
        >>> from torch_ext.compat.mamba_ssm import selective_scan_fn
        >>> one, decay = torch.ones(1, 1, 3), torch.full((1, 1), -0.6931472)
        >>> selective_scan_fn(4 * one, one, decay, one, one)
        tensor([[[4., 6., 7.]]])
    """
    return _selective_scan(
        selective_scan, "selective_scan_fn", u, delta, A, B, C, D, z, delta_bias, delta_softplus,
        return_last_state,
    )  # fmt: skip


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What :func:`selective_scan_fn` computes, as a plain PyTorch loop over time.

    Example:
        >>> from torch_ext.compat.mamba_ssm import selective_scan_ref
        >>> one, decay = torch.ones(1, 1, 3), torch.full((1, 1), -0.6931472)
        >>> selective_scan_ref(4 * one, one, decay, one, one)
        tensor([[[4., 6., 7.]]])
    """
    return _selective_scan(
        selective_scan_reference, "selective_scan_ref", u, delta, A, B, C, D, z, delta_bias,
        delta_softplus, return_last_state,
    )  # fmt: skip


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    r"""The Mamba layer without its first projection.

    .. math::
        x, z &= xz, \qquad u = \text{silu}(\text{conv1d}(x)) \\
        \delta, B, C &= W_x u, \qquad \delta \leftarrow W_\delta \delta \\
        \text{output} &= W_{out}\, \text{selective\_scan}(u, \delta, A, B, C, D, z)

    Args:
        xz: ``(B, 2 Di, L)``, x above z.
        conv1d_weight: ``(Di, 1, W)``.
        conv1d_bias: ``(Di,)``.
        x_proj_weight: ``(R + 2N, Di)``, the rows of delta, B, C; those of a constant ``B`` or ``C``
            are left out, and there are ``2N`` in place of ``N`` where ``A`` is complex.
        delta_proj_weight: ``(Di, R)``.
        out_proj_weight: ``(d_model, Di)``.
        out_proj_bias: ``(d_model,)``.
        A: ``(Di, N)``, real or complex.
        B: as in :func:`selective_scan_fn`; None: ``x_proj_weight`` gives it.
        C: as ``B``.
        D: ``(Di,)``.
        delta_bias: ``(Di,)``.
        B_proj_bias: added to what ``x_proj_weight`` gives for B, ``(N,)``, or ``(2N,)`` if ``A`` is
            complex.
        C_proj_bias: as ``B_proj_bias``.
        delta_softplus: as in :func:`selective_scan_fn`.
        checkpoint_lvl: from 1 on the backward computes the convolution's output and delta again
            instead of keeping them (outside torch.compile, which decides that itself).
        b_rms_weight: RMS norm of what ``x_proj_weight`` gives for B, the shape of ``B_proj_bias``.
        c_rms_weight: as ``b_rms_weight``, for C.
        dt_rms_weight: RMS norm of what ``x_proj_weight`` gives for delta, before
            ``delta_proj_weight``. ``(R,)``; or ``(Di,)``, to scale delta after it.
        b_c_dt_rms_eps: added to the mean squares.

    Returns:
        ``(B, L, d_model)``.

    Notes:
        Where the peer contradicts the model it is for, we follow the model: FalconMamba, which
        alone uses the norms, has that of delta before ``delta_proj_weight``, in transformers' code
        for inference and in its own training; the peer's fused function has it after, and leaves
        all three out of its gradient. And ``out_proj_bias`` gets its gradient.

    Example:
        >>> from torch_ext.compat.mamba_ssm import mamba_inner_fn
        >>> m = torch_ext.Mamba(8, d_state=4)
        >>> x = torch.randn(2, 10, 8)
        >>> y = mamba_inner_fn(
        ...     m.in_proj(x).transpose(1, 2), m.conv1d.weight, m.conv1d.bias, m.x_proj.weight,
        ...     m.dt_proj.weight, m.out_proj.weight, None, -torch.exp(m.A_log), D=m.D,
        ...     delta_bias=m.dt_proj.bias,
        ... )
        >>> torch.allclose(y, m(x), atol=1e-6)
        True
    """
    return _inner(
        causal_conv1d, selective_scan, "mamba_inner_fn", xz, conv1d_weight, conv1d_bias,
        x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D, delta_bias,
        B_proj_bias, C_proj_bias, delta_softplus, checkpoint_lvl, b_rms_weight, c_rms_weight,
        dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """What :func:`mamba_inner_fn` computes, with plain PyTorch loops over time.

    Example:
        >>> from torch_ext.compat.mamba_ssm import mamba_inner_ref
        >>> one = torch.ones(1, 1)
        >>> xz, rows = torch.ones(1, 2, 2), torch.ones(3, 1)
        >>> mamba_inner_ref(xz, one[None], None, rows, one, one, None, -one).shape
        torch.Size([1, 2, 1])
    """
    return _inner(
        causal_conv1d_reference, selective_scan_reference, "mamba_inner_ref", xz, conv1d_weight,
        conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus, 0, None, None, None, 0.0,
    )  # fmt: skip


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the selective scan from a state that is overwritten.

    Args:
        state: ``(B, D, N)``, or ``(B, H, P, N)`` for ``H`` heads of ``P`` channels, of any floating
            dtype; computed in float32 (float64 if an input or the state is). With
            ``state_batch_indices`` a pool, ``(num_slots, ...)``.
        x: ``(B, D)``, or ``(B, H, P)``.
        dt: as ``x``. It may be expanded, as may ``A`` and ``dt_bias``.
        A: ``(D, N)``, or ``(H, P, N)``.
        B: ``(B, N)``, or ``(B, G, N)`` for ``G`` groups of channels, or of heads.
        C: as ``B``.
        D: ``(D,)``, or ``(H, P)``. None if omitted.
        z: as ``x``. None if omitted.
        dt_bias: ``(D,)``, or ``(H, P)``. None if omitted.
        dt_softplus: softplus after the bias.
        state_batch_indices: slot of each row, int32 or int64, ``(B,)``. Rows below 0 are padding:
            their output is 0 and no state changes.

    Returns:
        The shape and dtype of ``x``.

    Notes:
        Where an input requires grad, gradients pass through the output and through the new state
        (the peer has none). The peer raises where ``D`` or ``dt_bias`` is None.

    Example:
        >>> from torch_ext.compat.mamba_ssm import selective_state_update
        >>> one, decay = torch.ones(1, 1), torch.full((1, 1), -0.6931472)
        >>> state = torch.full((1, 1, 1), 4.0)
        >>> selective_state_update(state, 4 * one, one, decay, one, one)
        tensor([[6.]])
        >>> state.flatten()
        tensor([6.])
    """
    return _state_update(
        "selective_state_update", False, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus,
        state_batch_indices,
    )  # fmt: skip


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """What :func:`selective_state_update` computes, in plain PyTorch.

    Example:
        >>> from torch_ext.compat.mamba_ssm import selective_state_update_ref
        >>> one, decay = torch.ones(1, 1), torch.full((1, 1), -0.6931472)
        >>> state = torch.full((1, 1, 1), 4.0)
        >>> selective_state_update_ref(state, 4 * one, one, decay, one, one)
        tensor([[6.]])
    """
    return _state_update(
        "selective_state_update_ref", True, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, None
    )


# ---- dtypes ----


def _complex(x: Tensor) -> Tensor:
    """Real and imaginary part, which alternate along the last dimension."""
    if x.is_complex():
        return x
    x = x.to(wide_dtype(x.dtype)).unflatten(-1, (-1, 2))
    return torch.view_as_complex(x.contiguous())


def _dtypes(
    over_time: list[Tensor | None], A: Tensor, B: Tensor, C: Tensor, constant: int
) -> tuple[torch.dtype, Callable[[Tensor | None], Tensor | None], Tensor, Tensor, Tensor]:
    """The dtype in which all that runs over time meets, how to bring it there, and A, B, C as the
    operators take them beside it. Of B and C, those with ``constant`` dimensions are parameters."""
    coefficients = [x for x in (B, C) if x.dim() != constant]
    dtype = widest(*over_time, *(x.real if x.is_complex() else x for x in coefficients))
    if not A.is_complex() and (B.is_complex() or C.is_complex()):
        raise TypeError(
            f"B has dtype {B.dtype} and C {C.dtype}, expected real ones, as A has dtype {A.dtype}"
        )
    if A.is_complex():
        dtype = wide_dtype(dtype)  # the operators have no complex half precision
        states = torch.promote_types(torch.complex32, dtype)
        if B.dim() != constant:
            B = _complex(B)
        if C.dim() != constant:
            C = _complex(C)
        A, B, C = A.to(states), B.to(states), C.to(states)
    else:
        A = parameter(A, dtype)
        B, C = (parameter(x, dtype) if x.dim() == constant else x.to(dtype) for x in (B, C))
    return dtype, lambda x: None if x is None else x.to(dtype), A, B, C


# ---- the scan ----


def _scan(
    scan: Callable,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """``scan``, time before channels, for any dtypes."""
    dtype, cast, A, B, C = _dtypes([u, delta, z], A, B, C, constant=2)
    y, last_state = scan(
        cast(u), cast(delta), A, B, C, parameter(D, dtype), cast(z), parameter(delta_bias, dtype),
        None, delta_softplus,
    )  # fmt: skip
    return y.to(u.dtype), last_state


def _coefficient(
    where: str, name: str, c: Tensor, batch: int, width: int, states: int, steps: int, pairs: bool
) -> Tensor:
    """B or C with time before groups and states."""
    if c.dim() == 2:
        check_shape(where, name, c, D=width, N=states)
        return c
    length = {"2L": 2 * steps} if pairs and not c.is_complex() else {"L": steps}
    if c.dim() == 3:
        check_shape(where, name, c, B=batch, N=states, **length)
        c = c.unsqueeze(1)
    else:
        check_shape(where, name, c, B=batch, G=None, N=states, **length)
        if c.shape[1] == 0 or width % c.shape[1]:
            raise ValueError(
                f"{where}: {name} has G={c.shape[1]} groups, expected a number that divides "
                f"D={width}"
            )
    return (_complex(c) if pairs else c).permute(0, 3, 1, 2)


def _selective_scan(
    scan: Callable,
    where: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    check_shape(where, "u", u, B=None, D=None, L=None)
    batch, width, steps = u.shape
    for name, x in [("delta", delta), ("z", z)]:
        if x is not None:
            check_shape(where, name, x, B=batch, D=width, L=steps)
    check_shape(where, "A", A, D=width, N=None)
    for name, x in [("D", D), ("delta_bias", delta_bias)]:
        if x is not None:
            check_shape(where, name, x, D=width)
    sizes = (batch, width, A.shape[1], steps, A.is_complex())
    y, last_state = _scan(
        scan,
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        _coefficient(where, "B", B, *sizes),
        _coefficient(where, "C", C, *sizes),
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        delta_softplus,
    )
    y = y.transpose(1, 2)
    return (y, last_state) if return_last_state else y


# ---- the layer ----


class _Recomputed:
    """A tensor that autograd does not keep: it is made again when the backward asks for it.

    ``make`` gives the values, in the same layout. Once is enough for all the nodes that keep it.
    """

    def __init__(self, device: str, make: Callable[[], Tensor]) -> None:
        self.device, self.make = device, make
        self.uses = self.left = 0
        self.value: Tensor | None = None

    def pack(self, x: Tensor):
        self.uses += 1
        return self, x.shape, x.stride(), x.storage_offset()

    def view(self, shape, stride, offset) -> Tensor:
        if self.value is None:
            self.left = self.uses
            with torch.no_grad(), torch.autocast(self.device, enabled=False):
                self.value = self.make()
        view = self.value.as_strided(shape, stride, offset)
        self.left -= 1
        if self.left == 0:
            self.value = None
        return view


class _Recompute:
    """Keeps the tensors that ``add`` names out of what autograd saves while it is entered."""

    def __init__(self) -> None:
        self.recomputed: dict[int, _Recomputed] = {}

    def add(self, x: Tensor, make: Callable[[], Tensor]) -> None:
        self.recomputed[x.untyped_storage().data_ptr()] = _Recomputed(x.device.type, make)

    def pack(self, x: Tensor):
        recomputed = self.recomputed.get(x.untyped_storage().data_ptr())
        return x if recomputed is None else recomputed.pack(x)

    @staticmethod
    def unpack(packed) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].view(*packed[1:])

    def entered(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)


def _may_recompute(*tensors: Tensor | None) -> bool:
    """Not where somebody else decides what is kept: a compiler, torch.func, or hooks around us."""
    if is_compiling() or not needs_grad(*tensors):
        return False
    autograd = torch._C._autograd
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and autograd._saved_tensors_hooks_is_enabled()
        and autograd._top_saved_tensors_default_hooks(False) is None
    )


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = wide_dtype(x.dtype)
    weight = None if weight is None else weight.to(wide)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight, eps).to(x.dtype)


def _inner(
    convolution: Callable,
    scan: Callable,
    where: str,
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    delta_softplus: bool,
    checkpoint_lvl: int,
    b_rms_weight: Tensor | None,
    c_rms_weight: Tensor | None,
    dt_rms_weight: Tensor | None,
    eps: float,
) -> Tensor:
    check_shape(where, "conv1d_weight", conv1d_weight, Di=None, one=1, W=None)
    inner = conv1d_weight.shape[0]
    check_shape(where, "xz", xz, **{"B": None, "2 Di": 2 * inner, "L": None})
    check_shape(where, "delta_proj_weight", delta_proj_weight, Di=inner, R=None)
    check_shape(where, "out_proj_weight", out_proj_weight, d_model=None, Di=inner)
    check_shape(where, "A", A, Di=inner, N=None)
    rank, states = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    sizes = [rank] + [states for c in (B, C) if c is None]
    check_shape(where, "x_proj_weight", x_proj_weight, **{"R + B + C": sum(sizes), "Di": inner})
    for name, x, given in [
        ("B_proj_bias", B_proj_bias, B),
        ("b_rms_weight", b_rms_weight, B),
        ("C_proj_bias", C_proj_bias, C),
        ("c_rms_weight", c_rms_weight, C),
    ]:
        if x is None:
            continue
        if given is not None:
            raise ValueError(
                f"{where}: {name} is given, expected None, as {name[0].upper()} is given as well"
            )
        check_shape(where, name, x, N=states)

    x, z = xz.transpose(1, 2).chunk(2, -1)
    weight = parameter(conv1d_weight.squeeze(1), x.dtype)
    conv1d_bias = parameter(conv1d_bias, x.dtype)
    u, _ = convolution(x, weight, conv1d_bias, None, "silu")

    recompute = None
    if (
        checkpoint_lvl >= 1
        and u.numel() > 0
        and _may_recompute(
            xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias
        )
    ):
        recompute = _Recompute()
        kept = [None if t is None else t.detach() for t in (x, weight, conv1d_bias)]
        recompute.add(u, lambda: convolution(*kept, None, "silu")[0])

    with nullcontext() if recompute is None else recompute.entered():
        parts = list(F.linear(u, x_proj_weight).split(sizes, -1))
        low_rank = parts.pop(0)
        if dt_rms_weight is not None:
            before = dt_rms_weight.shape == (rank,)
            if not before:
                check_shape(where, "dt_rms_weight", dt_rms_weight, **{"R or Di": inner})
                delta_proj_weight = delta_proj_weight * dt_rms_weight[:, None].to(
                    delta_proj_weight.dtype
                )
            low_rank = _rms_norm(low_rank, dt_rms_weight if before else None, eps)
        delta = F.linear(low_rank, delta_proj_weight)
        if recompute is not None:
            dtype = delta.dtype  # that of autocast, where it is on
            thin, wide = low_rank.detach().to(dtype), delta_proj_weight.detach().to(dtype)
            recompute.add(delta, lambda: F.linear(thin, wide))

        coefficients = []
        for name, c, bias, norm in [
            ("B", B, B_proj_bias, b_rms_weight),
            ("C", C, C_proj_bias, c_rms_weight),
        ]:
            if c is not None:
                c = _coefficient(
                    where, name, c, xz.shape[0], inner, A.shape[1], xz.shape[2], A.is_complex()
                )
            else:
                c = parts.pop(0)
                if bias is not None:
                    c = c + bias.to(c.dtype)
                if norm is not None:
                    c = _rms_norm(c, norm, eps)
            coefficients.append(c)
        y, _ = _scan(scan, u, delta, A, *coefficients, D, z, delta_bias, delta_softplus)
    if out_proj_bias is not None:
        out_proj_bias = out_proj_bias.to(out_proj_weight.dtype)
    return F.linear(y, out_proj_weight, out_proj_bias)


# ---- one step ----


def _state_update(
    where: str,
    reference: bool,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    indices: Tensor | None,
) -> Tensor:
    if state.dim() == 4:
        channels = {"H": state.shape[1], "P": state.shape[2]}
    else:
        rows = "num_slots" if indices is not None else "B"
        check_shape(where, "state", state, **{rows: None, "D": None, "N": None})
        channels = {"D": state.shape[1]}
    batch, states = x.shape[0] if x.dim() else 0, state.shape[-1]
    for name, value in [("x", x), ("dt", dt), ("z", z)]:
        if value is not None:
            check_shape(where, name, value, B=batch, **channels)
    if indices is None:
        check_shape(where, "state", state, B=batch, **channels, N=states)
    else:
        check_indices(where, "state_batch_indices", indices, B=batch)
    check_shape(where, "A", A, **channels, N=states)
    for name, value in [("D", D), ("dt_bias", dt_bias)]:
        if value is not None:
            check_shape(where, name, value, **channels)
    divisible = state.shape[1]
    for name, value in [("B", B), ("C", C)]:
        groups = {"G": None} if value.dim() == 3 else {}
        check_shape(where, name, value, B=batch, **groups, N=states)
        if groups and (value.shape[1] == 0 or divisible % value.shape[1]):
            raise ValueError(
                f"{where}: {name} has G={value.shape[1]} groups, expected a number that divides "
                f"{next(iter(channels))}={divisible}"
            )

    out_dtype, out_shape = x.dtype, x.shape
    if A.is_complex():
        B, C = B + 0j, C + 0j
    dtype, cast, A, B, C = _dtypes(
        [x, dt, z, state if state.dtype is torch.float64 else None], A, B, C, constant=0
    )
    # Heads are channels: the groups of B and C cut both alike.
    flat = lambda t, at=0: None if t is None else t.flatten(at, at + len(channels) - 1)  # noqa: E731
    arguments = (
        flat(cast(x), 1), flat(cast(dt), 1), flat(A), B, C, flat(parameter(D, dtype)),
        flat(cast(z), 1), flat(parameter(dt_bias, dtype)),
    )  # fmt: skip
    states_dtype = A.dtype if A.is_complex() else wide_dtype(dtype)

    viewable = state.dim() == 3 or state.stride(1) == state.shape[2] * state.stride(2)
    if (
        viewable
        and not reference
        and state.dtype is states_dtype
        and not needs_grad(state, *arguments)
    ):
        y = selective_scan_step_(*arguments, flat(state, 1), indices, dt_softplus)
        return y.view(out_shape).to(out_dtype)

    rows = state if indices is None else state[indices.clamp(min=0)]
    before = flat(rows, 1).to(states_dtype)
    if needs_grad(state, *arguments):
        before = before.clone()  # the backward needs what is overwritten below
    if reference:
        u, delta, A, B, C, D, z, dt_bias = arguments
        u, delta, B, C, z = (t if t is None else t.unsqueeze(1) for t in (u, delta, B, C, z))
        y, after = selective_scan_reference(u, delta, A, B, C, D, z, dt_bias, before, dt_softplus)
        y = y.squeeze(1)
    else:
        y, after = selective_scan_step(*arguments, before, None, dt_softplus)
    y = y.reshape(out_shape).to(out_dtype)
    after = after.to(state.dtype).unflatten(1, state.shape[1:-1])
    if indices is None:
        state.copy_(after)
        return y
    valid = write_rows(state, indices, after, rows)
    return torch.where(valid.reshape(-1, *[1] * len(channels)), y, 0.0)
