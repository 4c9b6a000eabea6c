r"""GRU: gated recurrent unit with a recurrent matrix for each head.

.. math::
    r_t &= \sigma(x^r_t + R_r h_{t-1} + b_r), \qquad z_t = \sigma(x^z_t + R_z h_{t-1} + b_z) \\
    n_t &= \tanh(x^n_t + r_t \odot (R_n h_{t-1} + b_n)) \\
    h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine
Translation", arXiv:1406.1078; with the reset gate behind the product, as torch.nn.GRU has it.
"""

import torch
from torch import Tensor

from ._gated import recurrent_product, run_gated_reference


def gru(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset_after: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    gradient_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""GRU: recurrent product, gates and state in one pass.

    .. math::
        r_t &= \sigma(x^r_t + R_r h_{t-1} + b_r), \qquad z_t = \sigma(x^z_t + R_z h_{t-1} + b_z) \\
        n_t &= \tanh(x^n_t + r_t \odot (R_n h_{t-1} + b_n)) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    for every head, whose ``R`` sees the units of that head alone; with one head that is torch.nn.GRU.
    Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", arXiv:1406.1078, whose
    reset gate is in front of the product: ``reset_after=False``.

    Args:
        x: what the input adds to the gates ``r`` and ``z`` and to the candidate ``n``,
            ``(B, T, 3, H, K)``. Any strides. float64, float32, bfloat16 or float16.
        R: recurrent weights of each gate and head, ``(3, H, K, K)``, rows are outputs as in
            torch.nn.Linear. The dtype of ``x`` or float32; beside float32 also bfloat16, which
            halves its storage alone.
        bias: ``(3, H, K)``, the dtype of ``x`` or float32. Zeros if omitted.
        initial_state: ``(B, H, K)``, float32 (float64 for float64 inputs). Zeros if omitted.
        reset_after: False has :math:`R_n (r_t \odot h_{t-1}) + b_n` in the place of :math:`r_t \odot
            (R_n h_{t-1} + b_n)`: the GRU of the paper, and not of torch.nn.
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
            before the bias, with these weights, ``(3, H, K)``, the dtype of ``x`` or float32. No
            norm if omitted. Goes with ``reset_after`` alone.
        norm_eps: added to the variance.
        gradient_clip: bound, at least 0, on each element of the gradient that comes back through
            ``R`` to the state before; 0 cuts it. What comes of it is not the forward's gradient.

    Returns:
        ``h``, ``(B, T, H, K)``, the dtype of ``x``, and the final state, ``(B, H, K)``, float32 or
        float64. With no step at all it is the initial state.

    Raises:
        ValueError: a shape differs from the above, ``cu_seqlens`` does not ascend from 0 to ``T``,
            ``norm_weight`` comes with ``reset_after=False``, or ``gradient_clip`` is negative.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.
        NotImplementedError: the tensors are on a GPU, and this build has no CUDA kernels.

    Notes:
        Accumulates in float32 for half precision. Gradients are those of the forward, through the final
        state as well. Differentiable any number of times.

        From torch.nn.GRU: ``x`` is ``F.linear(input, weight_ih, bias_ih)`` and ``R`` is
        ``weight_hh``, ``bias`` is ``bias_hh``, each with its first dimension split in gates and heads.

    Example:
        >>> x = torch.zeros(1, 3, 3, 1, 1)  # both gates are half open
        >>> x[0, :, 2, 0, 0] = torch.tensor([1.0, 0.0, -1.0])
        >>> h, final_state = torch_ext.gru(x, torch.zeros(3, 1, 1, 1))
        >>> h.flatten()
        tensor([ 0.3808,  0.1904, -0.2856])
    """
    return torch.ops.torch_ext.gru(
        x,
        R,
        bias,
        initial_state,
        reset_after,
        cu_seqlens,
        reverse,
        reset,
        recurrent_mask,
        h_update,
        norm_weight,
        norm_eps,
        gradient_clip,
    )


def gru_step(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    reset_after: bool = True,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    r"""One step of :func:`gru`.

    Args:
        x: ``(B, 3, H, K)``.
        R: as in :func:`gru`.
        bias: as in :func:`gru`, or None.
        state: ``(B, H, K)``; with ``state_indices`` a pool of states, ``(num_slots, H, K)``.
        state_indices: row of the pool for each row of ``x``, int32 or int64, ``(B,)``. Rows with a
            negative index are skipped: their ``h`` is 0 and no state changes.
        reset_after: as in :func:`gru`.
        recurrent_mask: ``(B, H, K)``, a row for each of ``x``.
        h_update: as in :func:`gru`, ``(B, H, K)``.
        norm_weight: as in :func:`gru`.
        norm_eps: as in :func:`gru`.

    Returns:
        ``h``, ``(B, H, K)``, the dtype of ``x``, and the new state; with ``state_indices`` the whole
        new pool.

    Raises:
        ValueError: a shape differs from the above, an index is not below ``num_slots``, or
            ``norm_weight`` comes with ``reset_after=False``.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> x, R, state = torch.zeros(1, 3, 1, 1), torch.zeros(3, 1, 1, 1), torch.ones(1, 1, 1)
        >>> h, state = torch_ext.gru_step(x, R, None, state)
        >>> h
        tensor([[[0.5000]]])
    """
    return torch.ops.torch_ext.gru_step(
        x,
        R,
        bias,
        state,
        state_indices,
        reset_after,
        recurrent_mask,
        h_update,
        norm_weight,
        norm_eps,
    )


def gru_step_(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    reset_after: bool = True,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    r"""One step of :func:`gru` that overwrites ``state``.

    Otherwise as :func:`gru_step`; not differentiable, so where an input requires grad it raises a
    RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``h``, ``(B, H, K)``.

    Example:
        >>> x, R, pool = torch.zeros(1, 3, 1, 1), torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1)
        >>> h = torch_ext.gru_step_(x, R, None, pool, torch.tensor([2]))
        >>> pool.flatten()
        tensor([1.0000, 1.0000, 0.5000])
    """
    return torch.ops.torch_ext.gru_step_(
        x,
        R,
        bias,
        state,
        state_indices,
        reset_after,
        recurrent_mask,
        h_update,
        norm_weight,
        norm_eps,
    )


def gru_reference(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset_after: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    gradient_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`gru` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> R = torch.zeros(3, 1, 1, 1)
        >>> gru_reference(torch.zeros(1, 2, 3, 1, 1), R, None, torch.ones(1, 1, 1))[0].flatten()
        tensor([0.5000, 0.2500])
    """
    if norm_weight is not None and not reset_after:
        raise ValueError("gru: norm_weight is given, expected None with reset_after=False")

    def cell(x: Tensor, u: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a = recurrent_product(R, u, bias, norm_weight, norm_eps)
        r, z = torch.sigmoid(x[:, 0] + a[:, 0]), torch.sigmoid(x[:, 1] + a[:, 1])
        if reset_after:
            n = torch.tanh(x[:, 2] + r * a[:, 2])
        else:
            b = None if bias is None else bias[2:]
            n = torch.tanh(x[:, 2] + recurrent_product(R[2:], r * u, b, None, norm_eps)[:, 0])
        return ((1 - z) * n + z * state[0],)

    h, (final,) = run_gated_reference(
        cell, x, [R.shape[1:3]], None if initial_state is None else [initial_state], cu_seqlens,
        reverse, reset, recurrent_mask, (h_update,), gradient_clip,
    )  # fmt: skip
    return h, final
