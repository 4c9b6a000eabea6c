r"""Elman's recurrent network, with a recurrent matrix for each head.

.. math::
    h_t = \tanh(x_t + R\, h_{t-1} + b)

or relu in the place of tanh. Elman 1990, "Finding Structure in Time"; torch.nn.RNN's.
"""

import torch
from torch import Tensor

from ._gated import check_choice, recurrent_product, run_gated_reference


def elman(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    nonlinearity: str = "tanh",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    gradient_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Elman's recurrent network: recurrent product, nonlinearity and state in one pass.

    .. math::
        h_t = \tanh(x_t + R\, h_{t-1} + b)

    for every head, whose ``R`` sees the units of that head alone; with one head that is torch.nn.RNN.
    Elman 1990, "Finding Structure in Time".

    Args:
        x: what the input adds, ``(B, T, 1, H, K)``. Any strides. float64, float32, bfloat16 or float16.
        R: recurrent weights of each head, ``(1, H, K, K)``, rows are outputs as in
            torch.nn.Linear. The dtype of ``x`` or float32; beside float32 also bfloat16, which
            halves its storage alone.
        bias: ``(1, H, K)``, the dtype of ``x`` or float32. Zeros if omitted.
        initial_state: ``(B, H, K)``, float32 (float64 for float64 inputs). Zeros if omitted.
        nonlinearity: ``"tanh"`` or ``"relu"``.
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
        norm_weight: layer norm of :math:`R\, h_{t-1}` over all units of a head,
            before the bias, with these weights, ``(1, H, K)``, the dtype of ``x`` or float32. No
            norm if omitted.
        norm_eps: added to the variance.
        gradient_clip: bound, at least 0, on each element of the gradient that comes back through
            ``R`` to the state before; 0 cuts it. What comes of it is not the forward's gradient.

    Returns:
        ``h``, ``(B, T, H, K)``, the dtype of ``x``, and the final state, ``(B, H, K)``, float32 or
        float64. With no step at all it is the initial state.

    Raises:
        ValueError: a shape differs from the above, ``cu_seqlens`` does not ascend from 0 to ``T``,
            ``nonlinearity`` is another word, or ``gradient_clip`` is negative.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.
        NotImplementedError: the tensors are on a GPU, and this build has no CUDA kernels.

    Notes:
        Accumulates in float32 for half precision. Gradients are those of the forward, through the final
        state as well. Differentiable any number of times.

        From torch.nn.RNN: ``x`` is ``F.linear(input, weight_ih, bias_ih)`` and ``R`` is
        ``weight_hh``, ``bias`` is ``bias_hh``, each with its first dimension split in heads.

    Example:
        >>> x, R = torch.ones(1, 3, 1, 1, 1), torch.full((1, 1, 1, 1), 0.5)
        >>> h, final_state = torch_ext.elman(x, R, nonlinearity="relu")
        >>> h.flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    return torch.ops.torch_ext.elman(
        x,
        R,
        bias,
        initial_state,
        nonlinearity,
        cu_seqlens,
        reverse,
        reset,
        recurrent_mask,
        h_update,
        norm_weight,
        norm_eps,
        gradient_clip,
    )


def elman_step(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    nonlinearity: str = "tanh",
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    r"""One step of :func:`elman`.

    Args:
        x: ``(B, 1, H, K)``.
        R: as in :func:`elman`.
        bias: as in :func:`elman`, or None.
        state: ``(B, H, K)``; with ``state_indices`` a pool of states, ``(num_slots, H, K)``.
        state_indices: row of the pool for each row of ``x``, int32 or int64, ``(B,)``. Rows with a
            negative index are skipped: their ``h`` is 0 and no state changes.
        nonlinearity: as in :func:`elman`.
        recurrent_mask: ``(B, H, K)``, a row for each of ``x``.
        h_update: as in :func:`elman`, ``(B, H, K)``.
        norm_weight: as in :func:`elman`.
        norm_eps: as in :func:`elman`.

    Returns:
        ``h``, ``(B, H, K)``, the dtype of ``x``, and the new state; with ``state_indices`` the whole
        new pool.

    Raises:
        ValueError: a shape differs from the above, an index is not below ``num_slots``, or
            ``nonlinearity`` is another word.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> x, R, state = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), 2.0)
        >>> h, state = torch_ext.elman_step(x, R, None, state, nonlinearity="relu")
        >>> h
        tensor([[[3.]]])
    """
    return torch.ops.torch_ext.elman_step(
        x,
        R,
        bias,
        state,
        state_indices,
        nonlinearity,
        recurrent_mask,
        h_update,
        norm_weight,
        norm_eps,
    )


def elman_step_(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    nonlinearity: str = "tanh",
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    r"""One step of :func:`elman` that overwrites ``state``.

    Otherwise as :func:`elman_step`; not differentiable, so where an input requires grad it raises a
    RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``h``, ``(B, H, K)``.

    Example:
        >>> x, R, pool = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.full((3, 1, 1), 2.0)
        >>> h = torch_ext.elman_step_(x, R, None, pool, torch.tensor([2]), "relu")
        >>> pool.flatten()
        tensor([2., 2., 3.])
    """
    return torch.ops.torch_ext.elman_step_(
        x,
        R,
        bias,
        state,
        state_indices,
        nonlinearity,
        recurrent_mask,
        h_update,
        norm_weight,
        norm_eps,
    )


def elman_reference(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    nonlinearity: str = "tanh",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    recurrent_mask: Tensor | None = None,
    h_update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    gradient_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`elman` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> R = torch.full((1, 1, 1, 1), 0.5)
        >>> elman_reference(torch.ones(1, 2, 1, 1, 1), R, nonlinearity="relu")[0].flatten()
        tensor([1.0000, 1.5000])
    """
    check_choice("elman", "nonlinearity", nonlinearity, ("tanh", "relu"))
    activate = torch.tanh if nonlinearity == "tanh" else torch.relu

    def cell(x: Tensor, u: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (activate(x + recurrent_product(R, u, bias, norm_weight, norm_eps))[:, 0],)

    h, (final,) = run_gated_reference(
        cell, x, [R.shape[1:3]], None if initial_state is None else [initial_state], cu_seqlens,
        reverse, reset, recurrent_mask, (h_update,), gradient_clip,
    )  # fmt: skip
    return h, final
