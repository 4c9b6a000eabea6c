r"""sLSTM: an LSTM with exponential gates, a normaliser and a recurrent matrix for each head.

.. math::
    (\tilde i, \tilde f, \tilde z, \tilde o)_t &= x_t + R\, h_{t-1} + b \\
    m_t &= \max(\log \sigma(\tilde f_t) + m_{t-1},\; \tilde i_t) \\
    i_t &= e^{\tilde i_t - m_t}, \qquad f_t = e^{\log \sigma(\tilde f_t) + m_{t-1} - m_t} \\
    c_t &= f_t c_{t-1} + i_t \tanh(\tilde z_t), \qquad n_t = f_t n_{t-1} + i_t \\
    h_t &= \sigma(\tilde o_t)\, c_t / n_t

Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517, section 2.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._gated import check_choice, recurrent_product, run_gated_reference
from .linear_attention import check_states

# The output h, the cell c, the normaliser n and the stabiliser m.
State = tuple[Tensor, Tensor, Tensor, Tensor]


def slstm(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    initial_state: State | None = None,
    forget_gate: str = "sigmoid",
    normalizer: str = "sum",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    gradient_clip: float | None = None,
) -> tuple[Tensor, State]:
    r"""Scalar LSTM with exponential gates: recurrent product, gates and states in one pass.

    .. math::
        (\tilde i, \tilde f, \tilde z, \tilde o)_t &= x_t + R\, h_{t-1} + b \\
        m_t &= \max(\log \sigma(\tilde f_t) + m_{t-1},\; \tilde i_t) \\
        i_t &= e^{\tilde i_t - m_t}, \qquad f_t = e^{\log \sigma(\tilde f_t) + m_{t-1} - m_t} \\
        c_t &= f_t c_{t-1} + i_t \tanh(\tilde z_t), \qquad n_t = f_t n_{t-1} + i_t \\
        h_t &= \sigma(\tilde o_t)\, c_t / n_t

    for every head, whose ``R`` sees the units of that head alone. Beck et al. 2024, "xLSTM",
    arXiv:2405.04517, section 2.2. ``m`` keeps the exponentials in range: ``exp(m) c`` and ``exp(m) n``
    are what is remembered, and ``h`` does not depend on ``m``. Where ``n`` is 0, as in a state of
    zeros, nothing is remembered: ``m`` is not looked at, and the new one is the input gate's.

    Args:
        x: what the input adds to the gates ``i``, ``f``, ``z``, ``o``, ``(B, T, 4, H, K)``. Any
            strides. float64, float32, bfloat16 or float16.
        R: recurrent weights of each gate and head, ``(4, H, K, K)``, rows are outputs as in
            torch.nn.Linear. The dtype of ``x`` or float32; beside float32 also bfloat16, which
            halves its storage alone.
        bias: ``(4, H, K)``, the dtype of ``x`` or float32. Zeros if omitted.
        initial_state: ``h``, ``c``, ``n`` and ``m``, ``(B, H, K)`` each, float32 (float64 for float64
            inputs). Zeros if omitted. ``n`` is not negative.
        forget_gate: ``"sigmoid"``, or ``"exp"``, where the pre-activation stands for
            :math:`\log \sigma(\tilde f_t)`.
        normalizer: ``"sum"``, or ``"at_least_one"``, whose ``n`` is at least 1 (the peer FlashRNN's;
            the same but for states with an ``n`` below 1).
        cu_seqlens: where several sequences stand end to end in the one row (``B`` is 1): sequence
            ``s`` is the steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. int32 or int64,
            ``(num_sequences + 1,)``, from 0 to ``T``, never descending. States then have
            ``num_sequences`` rows.
        reverse: run from the last step to the first (of each sequence).
        reset: steps before which the state is replaced by zeros, bool, ``(B, T)``.
        recurrent_mask: factor of ``h`` on its way into ``R``, ``(B, H, K)`` (a row for each sequence
            with ``cu_seqlens``), floating point: variational dropout (Gal & Ghahramani 2016,
            arXiv:1512.05287). It has no gradient.
        h_update: share of the new ``h``, ``(B, T, H, K)``, floating point; the rest is the old one:
            zoneout (Krueger et al. 2017, arXiv:1606.01305), a mask in training and ``1 - p``
            otherwise. It has no gradient.
        norm_weight: layer norm of :math:`R\, h_{t-1}` over all gates and units of a head together,
            before the bias, with these weights, ``(4, H, K)``, the dtype of ``x`` or float32. No
            norm if omitted.
        norm_eps: added to the variance.
        gradient_clip: bound, at least 0, on each element of the gradient that comes back through
            ``R`` to the state before; 0 cuts it. What comes of it is not the forward's gradient.

    Returns:
        ``h``, ``(B, T, H, K)``, the dtype of ``x``, and the final state, ``h``, ``c``, ``n`` and
        ``m``, float32 or float64. With no step at all it is the initial state.

    Raises:
        ValueError: a shape differs from the above, ``cu_seqlens`` does not ascend from 0 to ``T``,
            ``forget_gate`` or ``normalizer`` is another word, or ``gradient_clip`` is negative.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.
        NotImplementedError: the tensors are on a GPU, and this build has no CUDA kernels.

    Notes:
        Accumulates in float32 for half precision. Gradients are those of the forward, through the
        stabiliser and the final state as well, where the greater of two has that of their maximum
        (the input gate, where they are equal). Differentiable any number of times.

        Other packages' arguments: FlashRNN has these, with states ``(4, B, 1, H, K)`` and the
        normaliser ``"at_least_one"``. The package xlstm has ``R`` as ``(H, K, 4, K)``, inputs first.

    Example:
        >>> x = torch.zeros(1, 3, 4, 1, 1)
        >>> x[:, :, 1], x[:, :, 3] = 100.0, 100.0  # forgets nothing, shows everything
        >>> x[0, :, 2, 0, 0] = torch.tensor([1.0, 0.0, -0.5])
        >>> h, (h_T, c, n, m) = torch_ext.slstm(x, torch.zeros(4, 1, 1, 1))
        >>> h.flatten()
        tensor([0.7616, 0.3808, 0.0998])
        >>> n.flatten()
        tensor([3.])
    """
    h: Tensor | None = None
    c: Tensor | None = None
    n: Tensor | None = None
    m: Tensor | None = None
    if initial_state is not None:
        if not torch.jit.is_scripting():
            check_states("slstm", "initial_state", initial_state, "h, c, n, m")
        h, c, n, m = initial_state
    y, h, c, n, m = torch.ops.torch_ext.slstm(
        x,
        R,
        bias,
        h,
        c,
        n,
        m,
        forget_gate,
        normalizer,
        cu_seqlens,
        reverse,
        reset,
        recurrent_mask,
        h_update,
        norm_weight,
        norm_eps,
        gradient_clip,
    )
    return y, (h, c, n, m)


def slstm_step(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None,
    state: State,
    state_indices: Tensor | None = None,
    forget_gate: str = "sigmoid",
    normalizer: str = "sum",
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, State]:
    r"""One step of :func:`slstm`.

    Args:
        x: ``(B, 4, H, K)``.
        R: as in :func:`slstm`.
        bias: as in :func:`slstm`, or None.
        state: ``h``, ``c``, ``n`` and ``m``, ``(B, H, K)`` each; with ``state_indices`` pools of
            states, ``(num_slots, H, K)``.
        state_indices: row of the pools for each row of ``x``, int32 or int64, ``(B,)``. Rows with a
            negative index are skipped: their ``h`` is 0 and no state changes.
        forget_gate: as in :func:`slstm`.
        normalizer: as in :func:`slstm`.
        recurrent_mask: ``(B, H, K)``, a row for each of ``x``.
        h_update: as in :func:`slstm`, ``(B, H, K)``.
        norm_weight: as in :func:`slstm`.
        norm_eps: as in :func:`slstm`.

    Returns:
        ``h``, ``(B, H, K)``, the dtype of ``x``, and the new state; with ``state_indices`` the whole
        new pools.

    Raises:
        ValueError: a shape differs from the above, an index is not below ``num_slots``, or
            ``forget_gate`` or ``normalizer`` is another word.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> x, R = torch.tensor([0.0, 100.0, 0.0, 100.0]).reshape(1, 4, 1, 1), torch.zeros(4, 1, 1, 1)
        >>> h, c, n, m = (torch.full((1, 1, 1), y) for y in (0.5, 1.0, 1.0, 0.0))
        >>> h, state = torch_ext.slstm_step(x, R, None, (h, c, n, m))
        >>> h
        tensor([[[0.5000]]])
    """
    if not torch.jit.is_scripting():
        check_states("slstm_step", "state", state, "h, c, n, m")
    h, c, n, m = state
    y, h, c, n, m = torch.ops.torch_ext.slstm_step(
        x,
        R,
        bias,
        h,
        c,
        n,
        m,
        state_indices,
        forget_gate,
        normalizer,
        recurrent_mask,
        h_update,
        norm_weight,
        norm_eps,
    )
    return y, (h, c, n, m)


def slstm_step_(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None,
    state: State,
    state_indices: Tensor | None = None,
    forget_gate: str = "sigmoid",
    normalizer: str = "sum",
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    r"""One step of :func:`slstm` that overwrites the four tensors of ``state``.

    Otherwise as :func:`slstm_step`; not differentiable, so where an input requires grad it raises a
    RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``h``, ``(B, H, K)``.

    Example:
        >>> x, R = torch.tensor([0.0, 0.0, 1.0, 100.0]).reshape(1, 4, 1, 1), torch.zeros(4, 1, 1, 1)
        >>> state, slot = tuple(torch.zeros(3, 1, 1) for _ in range(4)), torch.tensor([2])
        >>> h = torch_ext.slstm_step_(x, R, None, state, slot)
        >>> state[1].flatten(), state[2].flatten()
        (tensor([0.0000, 0.0000, 0.7616]), tensor([0., 0., 1.]))
    """
    if not torch.jit.is_scripting():
        check_states("slstm_step_", "state", state, "h, c, n, m")
    h, c, n, m = state
    return torch.ops.torch_ext.slstm_step_(
        x,
        R,
        bias,
        h,
        c,
        n,
        m,
        state_indices,
        forget_gate,
        normalizer,
        recurrent_mask,
        h_update,
        norm_weight,
        norm_eps,
    )


def slstm_reference(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    initial_state: State | None = None,
    forget_gate: str = "sigmoid",
    normalizer: str = "sum",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    gradient_clip: float | None = None,
) -> tuple[Tensor, State]:
    """What :func:`slstm` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> x = torch.tensor([0.0, 0.0, 1.0, 100.0]).reshape(1, 1, 4, 1, 1).expand(1, 2, 4, 1, 1)
        >>> slstm_reference(x, torch.zeros(4, 1, 1, 1))[0].flatten()
        tensor([0.7616, 0.7616])
    """
    check_choice("slstm", "forget_gate", forget_gate, ("sigmoid", "exp"))
    check_choice("slstm", "normalizer", normalizer, ("sum", "at_least_one"))

    def cell(x: Tensor, u: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        i, f, z, o = (x + recurrent_product(R, u, bias, norm_weight, norm_eps)).unbind(1)
        _, c, n, m = state
        kept = (F.logsigmoid(f) if forget_gate == "sigmoid" else f) + m
        m = torch.where((n == 0) | (i >= kept), i, kept)
        # At most 1, also where m is the input gate's because n is 0 (before exp: inf has no gradient).
        i, f = torch.exp((i - m).clamp(max=0)), torch.exp((kept - m).clamp(max=0))
        c, n = f * c + i * torch.tanh(z), f * n + i
        if normalizer == "at_least_one":  # at 1 itself the gradient passes
            n = torch.where(n < 1, 1.0, n)
        return torch.sigmoid(o) * c / n, c, n, m

    rows = [R.shape[1:3]] * 4
    return run_gated_reference(
        cell, x, rows, initial_state, cu_seqlens, reverse, reset, recurrent_mask,
        (h_update, None, None, None), gradient_clip,
    )  # fmt: skip
