"""The functions of the package mlstm_kernels (``import mlstm_kernels``) on our operators.

Names, arguments, layouts ``(B, NH, S, DH)`` and states, ``c`` ``(B, NH, DHQK, DHHV)``, ``n`` ``(B, NH,
DHQK)``, ``m`` ``(B, NH, 1)``, are the peer's; all kernels are one here, :func:`torch_ext.mlstm`. Beyond
the peer's they run on the CPU and in float64, take any length of sequence and any head size, and all
of them take and return states. Where they differ:

* Gradients are those of the forward. The peer's ``custbw`` and Triton kernels leave out what passes
  through the divisor, the initial ``n`` and ``m`` and the final states: ``normalizer_grad=False``, a
  keyword of every function and of :class:`mLSTMBackendConfig`, takes the divisor for a constant as
  they do.
* ``chunk_size`` and what else chooses a kernel's tiles is taken and ignored, and so is
  ``autocast_kernel_dtype``: half-precision inputs are multiplied as they are, others in float32.
* States are float32 (float64 beside float64), or ``dtype_state`` where there is one.

Note that the peer's ``wrap_chunkwise__*`` functions have ``f`` before ``i``, all others ``i`` before
``f``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..mlstm import mlstm, mlstm_step
from ._common import check_shape, wide_dtype

States = tuple[Tensor, Tensor, Tensor]
SigmoidStates = tuple[Tensor, Tensor]

__all__ = [
    "get_available_mlstm_kernels",
    "get_available_mlstm_sequence_kernels",
    "get_available_mlstm_step_kernels",
    "get_mlstm_kernel",
    "get_mlstm_sequence_kernel",
    "get_mlstm_step_kernel",
    "mLSTMBackend",
    "mLSTMBackendConfig",
    "mlstm_chunkwise__limit_chunk",
    "mlstm_chunkwise__native_autograd",
    "mlstm_chunkwise__native_custbw",
    "mlstm_chunkwise__xl_chunk",
    "mlstm_parallel__limit_headdim",
    "mlstm_parallel__native_autograd",
    "mlstm_parallel__native_custbw",
    "mlstm_parallel__native_stablef_autograd",
    "mlstm_parallel__native_stablef_custbw",
    "mlstm_recurrent_sequence__native_fw",
    "mlstm_recurrent_sequence__triton_step_fused_fw",
    "mlstm_recurrent_step__native",
    "mlstm_recurrent_step__triton",
    "mlstm_siging_chunkwise__xl_chunk",
    "mlstm_siging_parallel__native_autograd",
    "mlstm_siging_parallel__native_custbw",
    "wrap_chunkwise__arbitrary_sequence_length",
    "wrap_chunkwise__arbitrary_sequence_length_with_padding",
    "wrap_chunkwise__pad_zeros",
]


def mlstm_chunkwise__native_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int = 64,
    normalizer_grad: bool = True,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, States]:
    """mLSTM over whole sequences: :func:`torch_ext.mlstm` by mlstm_kernels' name.

    Args:
        q: ``(B, NH, S, DHQK)``, scaled by ``DHQK**-0.5``.
        k: ``(B, NH, S, DHQK)``.
        v: ``(B, NH, S, DHHV)``.
        i: pre-activation of the input gate, ``(B, NH, S)``.
        f: pre-activation of the forget gate, ``(B, NH, S)``.
        c_initial: ``(B, NH, DHQK, DHHV)``. Zeros if omitted, as the others.
        n_initial: ``(B, NH, DHQK)``.
        m_initial: ``(B, NH, 1)`` or ``(B, NH)``.
        return_last_states: return those after the last step as well.
        eps: added to the divisor.
        chunk_size: taken and ignored.
        normalizer_grad: see :func:`torch_ext.mlstm`.
        kwargs: taken and ignored.

    Returns:
        ``h``, ``(B, NH, S, DHHV)``, the dtype of ``q``; with ``return_last_states`` also ``(c, n,
        m)``.

    Example:
        >>> from torch_ext.compat.mlstm_kernels import mlstm_chunkwise__native_autograd
        >>> q = k = torch.ones(1, 1, 3, 1)
        >>> v = torch.tensor([4.0, 8.0, 3.0]).view(1, 1, 3, 1)
        >>> i = torch.zeros(1, 1, 3)
        >>> h, (c, n, m) = mlstm_chunkwise__native_autograd(
        ...     q, k, v, i, i + 100, return_last_states=True
        ... )
        >>> h.flatten(), m.shape
        (tensor([4.0000, 6.0000, 5.0000]), torch.Size([1, 1, 1]))
    """
    return _sequence(
        "mlstm_chunkwise__native_autograd", q, k, v, i, f, c_initial, n_initial, m_initial,
        return_last_states, eps, normalizer_grad, "exp", True,
    )  # fmt: skip


def mlstm_chunkwise__native_custbw(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int = 64,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    normalizer_grad: bool = True,
) -> Tensor | tuple[Tensor, States]:
    """See :func:`mlstm_chunkwise__native_autograd`."""
    return _sequence(
        "mlstm_chunkwise__native_custbw", q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, normalizer_grad, "exp", True,
    )  # fmt: skip


def mlstm_chunkwise__limit_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int = 64,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    normalizer_grad: bool = True,
) -> Tensor | tuple[Tensor, States]:
    """See :func:`mlstm_chunkwise__native_autograd`."""
    return _sequence(
        "mlstm_chunkwise__limit_chunk", q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, normalizer_grad, "exp", True,
    )  # fmt: skip


def mlstm_chunkwise__xl_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int = 128,
    chunk_size_inter: int | None = None,
    chunk_size_intra: int | None = None,
    siz_b_L_parallel: int | None = None,
    siz_b_L_loop: int | None = None,
    siz_b_DH_parallel: int | None = None,
    siz_b_DH_loop: int | None = None,
    num_warps_intra: int | None = None,
    num_warps_inter: int | None = None,
    num_stages_intra: int | None = None,
    num_stages_inter: int | None = None,
    recompute_states_in_bw: bool = True,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    normalizer_grad: bool = True,
) -> Tensor | tuple[Tensor, States]:
    """See :func:`mlstm_chunkwise__native_autograd`."""
    return _sequence(
        "mlstm_chunkwise__xl_chunk", q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, normalizer_grad, "exp", True,
    )  # fmt: skip


def mlstm_siging_chunkwise__xl_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    normalize: bool = True,
    chunk_size: int = 128,
    chunk_size_inter: int | None = None,
    chunk_size_intra: int | None = None,
    siz_b_L_parallel: int | None = None,
    siz_b_L_loop: int | None = None,
    siz_b_DH_parallel: int | None = None,
    siz_b_DH_loop: int | None = None,
    num_warps_intra: int | None = None,
    num_warps_inter: int | None = None,
    num_stages_intra: int | None = None,
    num_stages_inter: int | None = None,
    recompute_states_in_bw: bool = True,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    normalizer_grad: bool = True,
) -> Tensor | tuple[Tensor, SigmoidStates]:
    """With ``input_gate="sigmoid"``, whose states are ``(c, n)``; else as the others."""
    return _sequence(
        "mlstm_siging_chunkwise__xl_chunk", q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, normalizer_grad, "sigmoid", normalize,
    )  # fmt: skip


def mlstm_parallel__native_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    normalizer_grad: bool = True,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, States]:
    """See :func:`mlstm_chunkwise__native_autograd`."""
    return _sequence(
        "mlstm_parallel__native_autograd", q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, normalizer_grad, "exp", True,
    )  # fmt: skip


def mlstm_parallel__native_custbw(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    normalizer_grad: bool = True,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, States]:
    """See :func:`mlstm_chunkwise__native_autograd`."""
    return _sequence(
        "mlstm_parallel__native_custbw", q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, normalizer_grad, "exp", True,
    )  # fmt: skip


def mlstm_parallel__native_stablef_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    normalizer_grad: bool = True,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, States]:
    """See :func:`mlstm_chunkwise__native_autograd`."""
    return _sequence(
        "mlstm_parallel__native_stablef_autograd", q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, normalizer_grad, "exp", True,
    )  # fmt: skip


def mlstm_parallel__native_stablef_custbw(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    normalizer_grad: bool = True,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, States]:
    """See :func:`mlstm_chunkwise__native_autograd`."""
    return _sequence(
        "mlstm_parallel__native_stablef_custbw", q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, normalizer_grad, "exp", True,
    )  # fmt: skip


def mlstm_parallel__limit_headdim(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    normalizer_grad: bool = True,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, States]:
    """See :func:`mlstm_chunkwise__native_autograd`."""
    return _sequence(
        "mlstm_parallel__limit_headdim", q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, normalizer_grad, "exp", True,
    )  # fmt: skip


def mlstm_siging_parallel__native_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    stable_fgate: bool = True,
    normalize: bool = True,
    normalizer_grad: bool = True,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, SigmoidStates]:
    """With ``input_gate="sigmoid"``, whose states are ``(c, n)``; else as the others."""
    return _sequence(
        "mlstm_siging_parallel__native_autograd", q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, normalizer_grad, "sigmoid", normalize,
    )  # fmt: skip


def mlstm_siging_parallel__native_custbw(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    stable_fgate: bool = True,
    normalize: bool = True,
    autocast_kernel_dtype: torch.dtype = torch.float32,
    normalizer_grad: bool = True,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, SigmoidStates]:
    """With ``input_gate="sigmoid"``, whose states are ``(c, n)``; else as the others."""
    return _sequence(
        "mlstm_siging_parallel__native_custbw", q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, normalizer_grad, "sigmoid", normalize,
    )  # fmt: skip


def mlstm_recurrent_sequence__native_fw(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    dtype_state: torch.dtype = torch.float32,
    normalizer_grad: bool = True,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, States]:
    """See :func:`mlstm_chunkwise__native_autograd`."""
    return _sequence(
        "mlstm_recurrent_sequence__native_fw", q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, normalizer_grad, "exp", True, dtype_state,
    )  # fmt: skip


def mlstm_recurrent_sequence__triton_step_fused_fw(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    dtype_state: torch.dtype = torch.float32,
    normalizer_grad: bool = True,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, States]:
    """See :func:`mlstm_chunkwise__native_autograd`."""
    return _sequence(
        "mlstm_recurrent_sequence__triton_step_fused_fw", q, k, v, i, f, c_initial, n_initial,
        m_initial, return_last_states, eps, normalizer_grad, "exp", True, dtype_state,
    )  # fmt: skip


def mlstm_recurrent_step__native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    eps: float = 1e-6,
    dtype_state: torch.dtype = torch.float32,
    normalizer_grad: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, States]:
    """One step: :func:`torch_ext.mlstm_step` by mlstm_kernels' name.

    Args:
        q: ``(B, NH, DHQK)``.
        k: ``(B, NH, DHQK)``.
        v: ``(B, NH, DHHV)``.
        i: ``(B, NH, 1)``.
        f: ``(B, NH, 1)``.
        c: ``(B, NH, DHQK, DHHV)``.
        n: ``(B, NH, DHQK)``.
        m: ``(B, NH, 1)``.
        eps: added to the divisor.
        dtype_state: of the new states, which are float64 beside float64.
        normalizer_grad: see :func:`torch_ext.mlstm`.
        kwargs: taken and ignored.

    Returns:
        ``h``, ``(B, NH, DHHV)``, the dtype of ``q``, and the new ``(c, n, m)``.

    Example:
        >>> from torch_ext.compat.mlstm_kernels import mlstm_recurrent_step__native
        >>> one = torch.ones(1, 1, 1)
        >>> state = (torch.full((1, 1, 1, 1), 4.0), one, 0 * one)
        >>> h, state = mlstm_recurrent_step__native(one, one, 8 * one, 0 * one, 100 * one, *state)
        >>> h
        tensor([[[6.0000]]])
    """
    where = "mlstm_recurrent_step__native"
    check_shape(where, "v", v, B=None, NH=None, DHHV=None)
    B, NH, width = v.shape
    check_shape(where, "q", q, B=B, NH=NH, DHQK=None)
    check_shape(where, "k", k, B=B, NH=NH, DHQK=q.shape[2])
    i, f = (
        _gate(where, name, gate, q, {"B": B, "NH": NH}, {"one": 1})
        for name, gate in [("i", i), ("f", f)]
    )
    state = _states(where, "", c, n, m, q, width)
    h, state = mlstm_step(
        q, k.to(q.dtype), v.to(q.dtype), i, f, state, eps=eps, normalizer_grad=normalizer_grad
    )
    return h, _given_back(state, dtype_state)


def mlstm_recurrent_step__triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    eps: float = 1e-6,
    dtype_state: torch.dtype = torch.float32,
    normalizer_grad: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, States]:
    """See :func:`mlstm_recurrent_step__native`."""
    return mlstm_recurrent_step__native(q, k, v, i, f, c, n, m, eps, dtype_state, normalizer_grad)


# ---- kernels by name ----

_KERNELS: dict[str, Callable] = {
    "chunkwise--native_autograd": mlstm_chunkwise__native_autograd,
    "chunkwise--native_custbw": mlstm_chunkwise__native_custbw,
    "chunkwise--triton_limit_chunk": mlstm_chunkwise__limit_chunk,
    "chunkwise--triton_xl_chunk": mlstm_chunkwise__xl_chunk,
    "chunkwise--triton_xl_chunk_siging": mlstm_siging_chunkwise__xl_chunk,
    "parallel--native_autograd": mlstm_parallel__native_autograd,
    "parallel--native_custbw": mlstm_parallel__native_custbw,
    "parallel--native_stablef_autograd": mlstm_parallel__native_stablef_autograd,
    "parallel--native_stablef_custbw": mlstm_parallel__native_stablef_custbw,
    "parallel--native_siging_autograd": mlstm_siging_parallel__native_autograd,
    "parallel--native_siging_custbw": mlstm_siging_parallel__native_custbw,
    "parallel--triton_limit_headdim": mlstm_parallel__limit_headdim,
}
_SEQUENCE_KERNELS: dict[str, Callable] = {
    "native_sequence__native": mlstm_recurrent_sequence__native_fw,
    "native_sequence__triton": mlstm_recurrent_sequence__triton_step_fused_fw,
}
_STEP_KERNELS: dict[str, Callable] = {
    "native": mlstm_recurrent_step__native,
    "triton": mlstm_recurrent_step__triton,
}


def _get(where: str, kernels: dict[str, Callable], name: str) -> Callable:
    if name not in kernels:
        raise ValueError(f"{where}: name is {name!r}, expected one of {list(kernels)}")
    return kernels[name]


def get_mlstm_kernel(name: str) -> Callable:
    """The function of that name, such as ``"chunkwise--triton_xl_chunk"``.

    Example:
        >>> from torch_ext.compat.mlstm_kernels import get_mlstm_kernel
        >>> get_mlstm_kernel("chunkwise--triton_xl_chunk").__name__
        'mlstm_chunkwise__xl_chunk'
    """
    return _get("get_mlstm_kernel", _KERNELS, name)


def get_mlstm_sequence_kernel(name: str) -> Callable:
    """The function of that name, ``"native_sequence__native"`` or ``"native_sequence__triton"``."""
    return _get("get_mlstm_sequence_kernel", _SEQUENCE_KERNELS, name)


def get_mlstm_step_kernel(name: str) -> Callable:
    """The function of that name, ``"native"`` or ``"triton"``."""
    return _get("get_mlstm_step_kernel", _STEP_KERNELS, name)


def get_available_mlstm_kernels() -> list[str]:
    """What :func:`get_mlstm_kernel` knows."""
    return list(_KERNELS)


def get_available_mlstm_sequence_kernels() -> list[str]:
    """What :func:`get_mlstm_sequence_kernel` knows."""
    return list(_SEQUENCE_KERNELS)


def get_available_mlstm_step_kernels() -> list[str]:
    """What :func:`get_mlstm_step_kernel` knows."""
    return list(_STEP_KERNELS)


# ---- wrappers: f stands before i ----


def wrap_chunkwise__arbitrary_sequence_length(
    mlstm_chunkwise_kernel: Callable,
    mlstm_sequence_kernel: Callable,
    mlstm_step_kernel: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    i: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = True,
    eps: float = 1e-6,
    autocast_kernel_dtype: torch.dtype = torch.bfloat16,
    chunk_size: int = 64,
    dtype_state: torch.dtype = torch.float32,
    enable_logging: bool = False,
) -> Tensor | tuple[Tensor, States]:
    """``mlstm_chunkwise_kernel`` on sequences of any length, which ours take by themselves.

    The two other kernels, and what has to do with the peer's cutting, are taken and ignored. Note
    that ``f`` stands before ``i``.
    """
    return _wrapped(
        mlstm_chunkwise_kernel, q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, autocast_kernel_dtype, chunk_size, dtype_state,
    )  # fmt: skip


def wrap_chunkwise__arbitrary_sequence_length_with_padding(
    mlstm_chunkwise_kernel: Callable,
    mlstm_sequence_kernel: Callable,
    mlstm_step_kernel: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    i: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = True,
    eps: float = 1e-6,
    autocast_kernel_dtype: torch.dtype = torch.bfloat16,
    chunk_size: int = 64,
    dtype_state: torch.dtype = torch.float32,
) -> Tensor | tuple[Tensor, States]:
    """See :func:`wrap_chunkwise__arbitrary_sequence_length`."""
    return _wrapped(
        mlstm_chunkwise_kernel, q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, autocast_kernel_dtype, chunk_size, dtype_state,
    )  # fmt: skip


def wrap_chunkwise__pad_zeros(
    mlstm_chunkwise_kernel: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    i: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    autocast_kernel_dtype: torch.dtype = torch.bfloat16,
    chunk_size: int = 64,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, States]:
    """See :func:`wrap_chunkwise__arbitrary_sequence_length`; ``kwargs`` go to the kernel."""
    return _wrapped(
        mlstm_chunkwise_kernel, q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states,
        eps, autocast_kernel_dtype, chunk_size, None, **kwargs,
    )  # fmt: skip


# ---- the module ----

ChunkwiseKernel = Literal[
    "chunkwise--native_autograd",
    "chunkwise--native_custbw",
    "chunkwise--triton_limit_chunk",
    "chunkwise--triton_xl_chunk",
    "chunkwise--triton_xl_chunk_siging",
    "parallel--native_autograd",
    "parallel--native_custbw",
    "parallel--native_stablef_autograd",
    "parallel--native_stablef_custbw",
    "parallel--triton_limit_headdim",
    "parallel--native_siging_autograd",
    "parallel--native_siging_custbw",
]
SequenceKernel = Literal["native_sequence__native", "native_sequence__triton"]
StepKernel = Literal["native", "triton"]
BackendMode = Literal["train", "train_with_padding", "inference"]
DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclass
class mLSTMBackendConfig:  # noqa: N801
    """mlstm_kernels' ``mLSTMBackendConfig``, by its field names and defaults.

    ``normalizer_grad`` is ours: False trains with the peer's shortcut, see :func:`torch_ext.mlstm`.
    """

    chunkwise_kernel: ChunkwiseKernel = "chunkwise--native_autograd"
    sequence_kernel: SequenceKernel = "native_sequence__native"
    step_kernel: StepKernel = "native"
    mode: BackendMode = "train"
    chunk_size: int = 64
    return_last_states: bool = True
    autocast_kernel_dtype: DtypeName = "bfloat16"
    eps: float = 1e-6
    inference_state_dtype: DtypeName = "float32"
    normalize_siging: bool = True
    normalizer_grad: bool = True

    def __post_init__(self) -> None:
        for field, kind in [
            ("chunkwise_kernel", ChunkwiseKernel),
            ("sequence_kernel", SequenceKernel),
            ("step_kernel", StepKernel),
            ("mode", BackendMode),
            ("autocast_kernel_dtype", DtypeName),
            ("inference_state_dtype", DtypeName),
        ]:
            value = getattr(self, field)
            if value not in get_args(kind):
                raise ValueError(
                    f"mLSTMBackendConfig: {field} is {value!r}, expected one of {get_args(kind)}"
                )


class mLSTMBackend(nn.Module):  # noqa: N801
    """mlstm_kernels' ``mLSTMBackend``: the kernels that a config names, as a module.

    In the modes ``"train"`` and ``"train_with_padding"`` it returns ``h``, and the last states if it
    is asked for them; in ``"inference"`` it always returns both, states in
    ``inference_state_dtype``. Every mode takes any length, with states.

    Example:
        >>> from torch_ext.compat.mlstm_kernels import mLSTMBackend, mLSTMBackendConfig
        >>> backend = mLSTMBackend(mLSTMBackendConfig(mode="inference"))
        >>> q = k = torch.randn(2, 4, 7, 8)
        >>> h, (c, n, m) = backend(q, k, torch.randn(2, 4, 7, 16), q[..., 0], k[..., 0])
        >>> h.shape, c.shape
        (torch.Size([2, 4, 7, 16]), torch.Size([2, 4, 8, 16]))
    """

    config_class = mLSTMBackendConfig

    def __init__(self, config: mLSTMBackendConfig) -> None:
        super().__init__()
        self.config = config
        options: dict[str, Any] = {"normalizer_grad": config.normalizer_grad}
        self.step_kernel_fn = partial(get_mlstm_step_kernel(config.step_kernel), **options)
        self.sequence_kernel_fn = partial(
            get_mlstm_sequence_kernel(config.sequence_kernel), **options
        )
        self.siging = "siging" in config.chunkwise_kernel
        if self.siging:
            options["normalize"] = config.normalize_siging
        self.chunkwise_kernel_fn = partial(get_mlstm_kernel(config.chunkwise_kernel), **options)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        c_initial: Tensor | None = None,
        n_initial: Tensor | None = None,
        m_initial: Tensor | None = None,
        return_last_states: bool | None = None,
        mode: BackendMode | None = None,
    ) -> Tensor | tuple[Tensor, States]:
        """Runs all steps.

        Args:
            q: ``(B, NH, S, DHQK)``.
            k: ``(B, NH, S, DHQK)``.
            v: ``(B, NH, S, DHHV)``.
            i: ``(B, NH, S)``.
            f: ``(B, NH, S)``.
            c_initial: ``(B, NH, DHQK, DHHV)``. Zeros if omitted, as the others.
            n_initial: ``(B, NH, DHQK)``.
            m_initial: ``(B, NH, 1)``.
            return_last_states: the config's if omitted.
            mode: the config's if omitted.

        Returns:
            ``h``, ``(B, NH, S, DHHV)``, or ``(h, (c, n, m))``.
        """
        mode = self.config.mode if mode is None else mode
        if mode not in get_args(BackendMode):
            raise ValueError(
                f"mLSTMBackend: mode is {mode!r}, expected one of {get_args(BackendMode)}"
            )
        if return_last_states is None:
            return_last_states = self.config.return_last_states
        inference = mode == "inference"
        result = self.chunkwise_kernel_fn(
            q=q, k=k, v=v, i=i, f=f, c_initial=c_initial, n_initial=n_initial, m_initial=m_initial,
            return_last_states=return_last_states or inference, eps=self.config.eps,
        )  # fmt: skip
        if not inference:
            return result
        h, states = result
        return h, _given_back(states, getattr(torch, self.config.inference_state_dtype))

    def extra_repr(self) -> str:
        return f"{self.config}"


# ---- what they share ----


def _wrapped(
    kernel: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor | None,
    n: Tensor | None,
    m: Tensor | None,
    return_last_states: bool,
    eps: float,
    autocast_kernel_dtype: torch.dtype,
    chunk_size: int,
    dtype_state: torch.dtype | None,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, States]:
    result = kernel(
        q=q, k=k, v=v, i=i, f=f, c_initial=c, n_initial=n, m_initial=m,
        return_last_states=return_last_states, eps=eps, chunk_size=chunk_size,
        autocast_kernel_dtype=autocast_kernel_dtype, **kwargs,
    )  # fmt: skip
    if not return_last_states or dtype_state is None:
        return result
    return result[0], _given_back(result[1], dtype_state)


def _gate(
    where: str, name: str, gate: Tensor, q: Tensor, sizes: dict[str, int], last: dict[str, int]
) -> Tensor:
    """A gate as the operator takes it, from ``sizes`` with or without the last dimension of one."""
    if gate.dim() == len(sizes) + len(last):
        check_shape(where, name, gate, **sizes, **last)
        gate = gate.flatten(-1 - len(last)) if last else gate
    else:
        check_shape(where, name, gate, **sizes)
    return gate if gate.dtype is q.dtype else gate.to(wide_dtype(q.dtype))


def _states(
    where: str, suffix: str, c: Tensor, n: Tensor, m: Tensor, q: Tensor, width: int
) -> States:
    """The operator's states, of whatever dtype the given ones are."""
    sizes = {"B": q.shape[0], "NH": q.shape[1]}
    check_shape(where, "c" + suffix, c, **sizes, DHQK=q.shape[-1], DHHV=width)
    check_shape(where, "n" + suffix, n, **sizes, DHQK=q.shape[-1])
    if m.dim() == 2:
        check_shape(where, "m" + suffix, m, **sizes)
    else:
        check_shape(where, "m" + suffix, m, **sizes, one=1)
        m = m.squeeze(2)
    wide = wide_dtype(q.dtype)
    return c.to(wide), n.to(wide), m.to(wide)


def _given_back(states: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """In the peer's shapes and of that dtype, but for float64, which stays."""
    if len(states) == 3 and states[2].dim() == 2:
        states = (states[0], states[1], states[2].unsqueeze(2))
    return tuple(s if s.dtype is torch.float64 else s.to(dtype) for s in states)


def _sequence(
    where: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor | None,
    n: Tensor | None,
    m: Tensor | None,
    return_last_states: bool,
    eps: float,
    normalizer_grad: bool,
    input_gate: str,
    normalize: bool,
    dtype_state: torch.dtype = torch.float32,
) -> Any:
    check_shape(where, "v", v, B=None, NH=None, S=None, DHHV=None)
    B, NH, S, width = v.shape
    check_shape(where, "q", q, B=B, NH=NH, S=S, DHQK=None)
    check_shape(where, "k", k, B=B, NH=NH, S=S, DHQK=q.shape[3])
    sizes = {"B": B, "NH": NH, "S": S}
    i, f = (_gate(where, name, gate, q, sizes, {}) for name, gate in [("i", i), ("f", f)])
    state: States | None = None
    if c is not None or n is not None or m is not None:
        new = partial(q.new_zeros, dtype=wide_dtype(q.dtype))
        c = new(B, NH, q.shape[3], width) if c is None else c
        n = new(B, NH, q.shape[3]) if n is None else n
        m = new(B, NH, 1) if m is None else m
        state = _states(where, "_initial", c, n, m, q, width)
    over_time = [t.transpose(1, 2) for t in (q, k.to(q.dtype), v.to(q.dtype), i, f)]
    h, states = mlstm(
        *over_time, state, eps=eps, input_gate=input_gate, normalize=normalize,
        normalizer_grad=normalizer_grad,
    )  # fmt: skip
    h = h.transpose(1, 2)
    if not return_last_states:
        return h
    return h, _given_back(states[:2] if input_gate == "sigmoid" else states, dtype_state)


# What stands in each of the package's modules.
MODULES = {
    "mlstm_kernels": [],
    "mlstm_kernels.torch": [
        "get_available_mlstm_kernels",
        "get_available_mlstm_sequence_kernels",
        "get_available_mlstm_step_kernels",
        "get_mlstm_kernel",
        "get_mlstm_sequence_kernel",
        "get_mlstm_step_kernel",
    ],
    "mlstm_kernels.torch.backend_module": ["mLSTMBackend", "mLSTMBackendConfig"],
    "mlstm_kernels.torch.chunkwise": [
        "mlstm_chunkwise__native_autograd",
        "mlstm_chunkwise__native_custbw",
        "mlstm_chunkwise__limit_chunk",
        "mlstm_chunkwise__xl_chunk",
        "mlstm_siging_chunkwise__xl_chunk",
    ],
    "mlstm_kernels.torch.chunkwise.native": [
        "mlstm_chunkwise__native_autograd",
        "mlstm_chunkwise__native_custbw",
    ],
    "mlstm_kernels.torch.chunkwise.triton_limit_chunk": ["mlstm_chunkwise__limit_chunk"],
    "mlstm_kernels.torch.chunkwise.triton_xl_chunk": ["mlstm_chunkwise__xl_chunk"],
    "mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging": ["mlstm_siging_chunkwise__xl_chunk"],
    "mlstm_kernels.torch.kernel_wrappers": [
        "wrap_chunkwise__arbitrary_sequence_length",
        "wrap_chunkwise__arbitrary_sequence_length_with_padding",
        "wrap_chunkwise__pad_zeros",
    ],
    "mlstm_kernels.torch.parallel": [
        "mlstm_parallel__native_autograd",
        "mlstm_parallel__native_custbw",
        "mlstm_siging_parallel__native_autograd",
        "mlstm_siging_parallel__native_custbw",
        "mlstm_parallel__native_stablef_autograd",
        "mlstm_parallel__native_stablef_custbw",
        "mlstm_parallel__limit_headdim",
    ],
    "mlstm_kernels.torch.parallel.native": [
        "mlstm_parallel__native_autograd",
        "mlstm_parallel__native_custbw",
    ],
    "mlstm_kernels.torch.parallel.native_siging": [
        "mlstm_siging_parallel__native_autograd",
        "mlstm_siging_parallel__native_custbw",
    ],
    "mlstm_kernels.torch.parallel.native_stablef": [
        "mlstm_parallel__native_stablef_autograd",
        "mlstm_parallel__native_stablef_custbw",
    ],
    "mlstm_kernels.torch.parallel.triton_limit_headdim": ["mlstm_parallel__limit_headdim"],
    "mlstm_kernels.torch.recurrent": [
        "mlstm_recurrent_sequence__native_fw",
        "mlstm_recurrent_sequence__triton_step_fused_fw",
        "mlstm_recurrent_step__native",
        "mlstm_recurrent_step__triton",
    ],
    "mlstm_kernels.torch.recurrent.native_sequence": [
        "mlstm_recurrent_sequence__native_fw",
        "mlstm_recurrent_sequence__triton_step_fused_fw",
    ],
    "mlstm_kernels.torch.recurrent.native_step": ["mlstm_recurrent_step__native"],
    "mlstm_kernels.torch.recurrent.triton_step": ["mlstm_recurrent_step__triton"],
}
