r"""LSTM: long short-term memory with a recurrent matrix for each head, and what was added to it since.

.. math::
    (i, f, g, o)_t &= x_t + R\, h_{t-1} + b \\
    c_t &= \sigma(f_t)\, c_{t-1} + \sigma(i_t) \tanh(g_t) \\
    h_t &= \sigma(o_t) \tanh(c_t)

Hochreiter & Schmidhuber 1997, "Long Short-Term Memory", with the forget gate of Gers, Schmidhuber &
Cummins 2000, "Learning to Forget"; torch.nn.LSTM's.
"""

import torch
from torch import Tensor

from ._gated import layer_norm, recurrent_product, run_gated_reference
from .linear_attention import check_states

# The output h and the cell c.
State = tuple[Tensor, Tensor]


def lstm(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    initial_state: State | None = None,
    coupled: bool = False,
    peephole: Tensor | None = None,
    projection: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    c_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    cell_norm_weight: Tensor | None = None,
    cell_norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    gradient_clip: float | None = None,
) -> tuple[Tensor, State]:
    r"""LSTM: recurrent product, gates and states in one pass.

    .. math::
        (i, f, g, o)_t &= x_t + R\, h_{t-1} + b \\
        c_t &= \sigma(f_t)\, c_{t-1} + \sigma(i_t) \tanh(g_t) \\
        h_t &= \sigma(o_t) \tanh(c_t)

    for every head, whose ``R`` sees the units of that head alone; with one head that is torch.nn.LSTM.
    Hochreiter & Schmidhuber 1997, "Long Short-Term Memory"; Gers, Schmidhuber & Cummins 2000, "Learning
    to Forget".

    Args:
        x: what the input adds to the gates ``i``, ``f``, ``g``, ``o``, ``(B, T, 4, H, K)``. Any
            strides. float64, float32, bfloat16 or float16.
        R: recurrent weights of each gate and head, ``(4, H, K, P)``, rows are outputs as in
            torch.nn.Linear; ``P`` is ``K`` but with ``projection``. The dtype of ``x`` or float32;
            beside float32 also bfloat16, which halves its storage alone.
        bias: ``(4, H, K)``, the dtype of ``x`` or float32. Zeros if omitted.
        initial_state: ``h``, ``(B, H, P)``, and ``c``, ``(B, H, K)``, float32 (float64 for float64
            inputs). Zeros if omitted.
        coupled: the gates are ``f``, ``g``, ``o`` alone (3 in the place of 4), and :math:`1 -
            \sigma(f_t)` is in the place of :math:`\sigma(i_t)` (Greff et al. 2017,
            arXiv:1503.04069).
        peephole: weights ``(3, H, K)`` by which :math:`c_{t-1}` adds to ``i`` and ``f``, and
            :math:`c_t` to ``o`` (Gers & Schmidhuber 2000); ``(2, H, K)``, of ``f`` and ``o``, with
            ``coupled``. The dtype of ``x`` or float32. None if omitted.
        projection: of each head, ``(H, P, K)``, :math:`h_t = W \sigma(o_t) \tanh(c_t)` (Sak et al.
            2014, arXiv:1402.1128). The dtype of ``x`` or float32. None if omitted.
        cu_seqlens: where several sequences stand end to end in the one row (``B`` is 1): sequence
            ``s`` is the steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. int32 or int64,
            ``(num_sequences + 1,)``, from 0 to ``T``, never descending. States then have
            ``num_sequences`` rows.
        reverse: run from the last step to the first (of each sequence).
        reset: steps before which the state is replaced by zeros, bool, ``(B, T)``.
        recurrent_mask: factor of ``h`` on its way into ``R``, ``(B, H, P)`` (a row for each sequence
            with ``cu_seqlens``), floating point: variational dropout (Gal & Ghahramani 2016,
            arXiv:1512.05287). It has no gradient.
        h_update: share of the new ``h``, ``(B, T, H, P)``, floating point; the rest is the old one:
            zoneout (Krueger et al. 2017, arXiv:1606.01305), a mask in training and ``1 - p``
            otherwise. It has no gradient.
        c_update: as ``h_update``, of ``c``, ``(B, T, H, K)``. The step's own ``h`` is made of ``c`` before
            it is zoned out.
        norm_weight: layer norm of :math:`R\, h_{t-1}` over all gates and units of a head together,
            before the bias, with these weights, the shape of ``bias``, the dtype of ``x`` or float32. No
            norm if omitted.
        cell_norm_weight: layer norm of ``c`` over the units of a head, with these weights, ``(H, K)``, on
            its way into ``h``; what is kept, and what peepholes see, is ``c`` itself. The dtype of ``x``
            or float32. No norm if omitted.
        cell_norm_bias: added to it, ``(H, K)``, the dtype of ``x`` or float32. Zeros if omitted. Goes
            with ``cell_norm_weight`` alone.
        norm_eps: added to the variances.
        gradient_clip: bound, at least 0, on each element of the gradient that comes back through
            ``R`` to the state before; 0 cuts it. What comes of it is not the forward's gradient.

    Returns:
        ``h``, ``(B, T, H, P)``, the dtype of ``x``, and the final state, ``h`` and ``c``, float32 or
        float64. With no step at all it is the initial state.

    Raises:
        ValueError: a shape differs from the above, ``cu_seqlens`` does not ascend from 0 to ``T``,
            ``cell_norm_bias`` comes without ``cell_norm_weight``, or ``gradient_clip`` is negative.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.
        NotImplementedError: the tensors are on a GPU, and this build has no CUDA kernels.

    Notes:
        Accumulates in float32 for half precision. Gradients are those of the forward, through the final
        state as well. Differentiable any number of times.

        From torch.nn.LSTM: ``x`` is ``F.linear(input, weight_ih, bias_ih)`` and ``R`` is
        ``weight_hh``, ``bias`` is ``bias_hh``, ``projection`` is ``weight_hr``, each with its first
        dimension split in gates and heads. The two norms are those of haste's LayerNormLSTM.

    Example:
        >>> x = torch.zeros(1, 3, 4, 1, 1)
        >>> x[:, :, :2], x[:, :, 3] = 100.0, 100.0  # all gates open
        >>> x[0, :, 2, 0, 0] = torch.tensor([1.0, 0.0, -0.5])
        >>> h, (h_T, c) = torch_ext.lstm(x, torch.zeros(4, 1, 1, 1))
        >>> h.flatten()
        tensor([0.6420, 0.6420, 0.2908])
    """
    h: Tensor | None = None
    c: Tensor | None = None
    if initial_state is not None:
        if not torch.jit.is_scripting():
            check_states("lstm", "initial_state", initial_state, "h, c")
        h, c = initial_state
    y, h, c = torch.ops.torch_ext.lstm(
        x,
        R,
        bias,
        h,
        c,
        coupled,
        peephole,
        projection,
        cu_seqlens,
        reverse,
        reset,
        recurrent_mask,
        h_update,
        c_update,
        norm_weight,
        cell_norm_weight,
        cell_norm_bias,
        norm_eps,
        gradient_clip,
    )
    return y, (h, c)


def lstm_step(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None,
    state: State,
    state_indices: Tensor | None = None,
    coupled: bool = False,
    peephole: Tensor | None = None,
    projection: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    c_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    cell_norm_weight: Tensor | None = None,
    cell_norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, State]:
    r"""One step of :func:`lstm`.

    Args:
        x: ``(B, 4, H, K)``; 3 in the place of 4 with ``coupled``.
        R: as in :func:`lstm`.
        bias: as in :func:`lstm`, or None.
        state: ``h``, ``(B, H, P)``, and ``c``, ``(B, H, K)``; with ``state_indices`` pools of states,
            ``(num_slots, H, P)`` and ``(num_slots, H, K)``.
        state_indices: row of the pools for each row of ``x``, int32 or int64, ``(B,)``. Rows with a
            negative index are skipped: their ``h`` is 0 and no state changes.
        coupled: as in :func:`lstm`.
        peephole: as in :func:`lstm`.
        projection: as in :func:`lstm`.
        recurrent_mask: ``(B, H, P)``, a row for each of ``x``.
        h_update: as in :func:`lstm`, ``(B, H, P)``.
        c_update: as in :func:`lstm`, ``(B, H, K)``.
        norm_weight: as in :func:`lstm`.
        cell_norm_weight: as in :func:`lstm`.
        cell_norm_bias: as in :func:`lstm`.
        norm_eps: as in :func:`lstm`.

    Returns:
        ``h``, ``(B, H, P)``, the dtype of ``x``, and the new state; with ``state_indices`` the whole
        new pools.

    Raises:
        ValueError: a shape differs from the above, an index is not below ``num_slots``, or
            ``cell_norm_bias`` comes without ``cell_norm_weight``.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> x, R = torch.tensor([0.0, 100.0, 0.0, 100.0]).reshape(1, 4, 1, 1), torch.zeros(4, 1, 1, 1)
        >>> h, state = torch_ext.lstm_step(x, R, None, (torch.zeros(1, 1, 1), torch.ones(1, 1, 1)))
        >>> h
        tensor([[[0.7616]]])
    """
    if not torch.jit.is_scripting():
        check_states("lstm_step", "state", state, "h, c")
    h, c = state
    y, h, c = torch.ops.torch_ext.lstm_step(
        x,
        R,
        bias,
        h,
        c,
        state_indices,
        coupled,
        peephole,
        projection,
        recurrent_mask,
        h_update,
        c_update,
        norm_weight,
        cell_norm_weight,
        cell_norm_bias,
        norm_eps,
    )
    return y, (h, c)


def lstm_step_(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None,
    state: State,
    state_indices: Tensor | None = None,
    coupled: bool = False,
    peephole: Tensor | None = None,
    projection: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    c_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    cell_norm_weight: Tensor | None = None,
    cell_norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    r"""One step of :func:`lstm` that overwrites the two tensors of ``state``.

    Otherwise as :func:`lstm_step`; not differentiable, so where an input requires grad it raises a
    RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``h``, ``(B, H, P)``.

    Example:
        >>> x = torch.tensor([100.0, 0.0, 1.0, 100.0]).reshape(1, 4, 1, 1)
        >>> state, slot = (torch.zeros(3, 1, 1), torch.zeros(3, 1, 1)), torch.tensor([2])
        >>> h = torch_ext.lstm_step_(x, torch.zeros(4, 1, 1, 1), None, state, slot)
        >>> state[0].flatten(), state[1].flatten()
        (tensor([0.0000, 0.0000, 0.6420]), tensor([0.0000, 0.0000, 0.7616]))
    """
    if not torch.jit.is_scripting():
        check_states("lstm_step_", "state", state, "h, c")
    h, c = state
    return torch.ops.torch_ext.lstm_step_(
        x,
        R,
        bias,
        h,
        c,
        state_indices,
        coupled,
        peephole,
        projection,
        recurrent_mask,
        h_update,
        c_update,
        norm_weight,
        cell_norm_weight,
        cell_norm_bias,
        norm_eps,
    )


def lstm_reference(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    initial_state: State | None = None,
    coupled: bool = False,
    peephole: Tensor | None = None,
    projection: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    c_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    cell_norm_weight: Tensor | None = None,
    cell_norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    gradient_clip: float | None = None,
) -> tuple[Tensor, State]:
    """What :func:`lstm` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> x = torch.tensor([100.0, 100.0, 1.0, 100.0]).reshape(1, 1, 4, 1, 1).expand(1, 2, 4, 1, 1)
        >>> lstm_reference(x, torch.zeros(4, 1, 1, 1))[1][1].flatten()
        tensor([1.5232])
    """
    if cell_norm_bias is not None and cell_norm_weight is None:
        raise ValueError("lstm: cell_norm_bias is given, expected None without cell_norm_weight")

    def cell(x: Tensor, u: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        *first, g, o = (x + recurrent_product(R, u, bias, norm_weight, norm_eps)).unbind(1)
        c = state[1]
        peeks = [] if peephole is None else peephole.to(c.dtype).unbind(0)
        if peephole is not None:  # i and f, or f, see the cell of the step before
            first = [gate + p * c for gate, p in zip(first, peeks[:-1], strict=True)]
        f = torch.sigmoid(first[-1])
        i = 1 - f if coupled else torch.sigmoid(first[0])
        c = f * c + i * torch.tanh(g)
        if peephole is not None:
            o = o + peeks[-1] * c
        seen = c
        if cell_norm_weight is not None:
            seen = layer_norm(c, (-1,), norm_eps) * cell_norm_weight.to(c.dtype)
        if cell_norm_bias is not None:
            seen = seen + cell_norm_bias.to(c.dtype)
        h = torch.sigmoid(o) * torch.tanh(seen)
        if projection is not None:
            h = torch.einsum("hpk,bhk->bhp", projection.to(c.dtype), h)
        return h, c

    heads, units, inputs = R.shape[1:]
    return run_gated_reference(
        cell, x, [[heads, inputs], [heads, units]], initial_state, cu_seqlens, reverse, reset,
        recurrent_mask, (h_update, c_update), gradient_clip,
    )  # fmt: skip
