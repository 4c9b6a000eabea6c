r"""Retention: linear attention without a normaliser, whose memory fades at a rate per head.

.. math::
    S_t = \gamma S_{t-1} + k_t v_t^\top, \qquad h_t = S_t^\top (s\, q_t)

Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei 2023, "Retentive Network: A Successor to Transformer for
Large Language Models", arXiv:2307.08621, section 2.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._padding import valid_steps
from ._sequence_layer import check_state_type, shape_text
from .linear_attention import per_head, run_matrix_reference, sequences
from .linear_scan import state_dtype
from .ssd import ssd


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""RetNet's retention: a matrix memory with a constant decay per head.

    .. math::
        S_t = \gamma S_{t-1} + k_t v_t^\top, \qquad h_t = S_t^\top (s\, q_t)

    for every head, with :math:`\gamma` its ``decay`` and :math:`s` the ``scale``. Sun et al. 2023,
    "Retentive Network", arXiv:2307.08621, section 2.1. The rotation of queries and keys comes
    before, the norm of the heads after it.

    Args:
        q: queries, ``(B, T, G, K)``: a head each, or fewer, where ``G`` divides ``H``; head ``h``
            has the queries and the keys ``h // (H / G)``. Any strides, such as those of the view
            ``x.transpose(1, 2)`` of ``(B, G, T, K)``. float64, float32, bfloat16 or float16.
        k: keys, ``(B, T, G, K)``, the dtype of ``q``.
        v: values, ``(B, T, H, V)``, the dtype of ``q``.
        decay: what a head keeps at each step, ``(H,)``, above 0 and up to 1, the dtype of ``q`` or
            float32. RetNet's ``1 - 2**(-5 - head)`` if omitted.
        initial_state: ``(B, H, K, V)``, float32 (float64 for float64 inputs). Zeros if omitted.
        scale: factor of the queries. ``K**-0.5`` if omitted.
        cu_seqlens: where several sequences stand end to end in the one row (``B`` is 1): sequence
            ``s`` is the steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. int32 or int64,
            ``(num_sequences + 1,)``, from 0 to ``T``, never descending. States then have
            ``num_sequences`` rows.
        reverse: run from the last step to the first (of each sequence).

    Returns:
        ``h``, ``(B, T, H, V)``, the dtype of ``q``, and the final state, ``(B, H, K, V)``, float32
        or float64. With no step at all the final state is the initial state.

    Raises:
        ValueError: a shape differs from the above, or ``cu_seqlens`` does not ascend from 0 to
            ``T``.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.
        NotImplementedError: the tensors are on a GPU, and this build has no CUDA kernels.

    Notes:
        Accumulates in float32 for half precision. Bitwise the same on every run and for every
        number of threads. Differentiable any number of times, in ``decay`` and through the final
        state as well.

    Example:
        >>> one = torch.ones(1, 3, 1, 1)
        >>> h, final_state = torch_ext.retention(one, one, 4 * one, torch.tensor([0.5]))
        >>> h.flatten()
        tensor([4., 6., 7.])
    """
    return torch.ops.torch_ext.retention(q, k, v, decay, initial_state, cu_seqlens, scale, reverse)


def retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of :func:`retention`.

    Args:
        q: ``(B, G, K)``.
        k: ``(B, G, K)``, the dtype of ``q``.
        v: ``(B, H, V)``, the dtype of ``q``.
        decay: as in :func:`retention`, or None.
        state: ``(B, H, K, V)``; with ``state_indices`` a pool of states, ``(num_slots, H, K, V)``.
        state_indices: row of the pool for each row of ``q``, int32 or int64, ``(B,)``. Rows with a
            negative index are skipped: their ``h`` is 0 and no state changes.
        scale: as in :func:`retention`.

    Returns:
        ``h``, ``(B, H, V)``, the dtype of ``q``, and the new state; with ``state_indices`` the
        whole new pool.

    Raises:
        ValueError: a shape differs from the above, or an index is not below ``num_slots``.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> one, state = torch.ones(1, 1, 1), torch.full((1, 1, 1, 1), 4.0)
        >>> h, state = torch_ext.retention_step(one, one, 4 * one, torch.tensor([0.5]), state)
        >>> h
        tensor([[[6.]]])
    """
    return torch.ops.torch_ext.retention_step(q, k, v, decay, state, state_indices, scale)


def retention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""One step of :func:`retention` that overwrites ``state``.

    Otherwise as :func:`retention_step`; not differentiable, so where an input requires grad it
    raises a RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``h``, ``(B, H, V)``.

    Example:
        >>> one, pool, slot = torch.ones(1, 1, 1), torch.zeros(3, 1, 1, 1), torch.tensor([2])
        >>> h = torch_ext.retention_step_(one, one, 4 * one, None, pool, slot)
        >>> pool.flatten()
        tensor([0., 0., 4.])
    """
    return torch.ops.torch_ext.retention_step_(q, k, v, decay, state, state_indices, scale)


def retention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """What :func:`retention` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> one = torch.ones(1, 2, 1, 1)
        >>> retention_reference(one, one, 4 * one, torch.tensor([0.5]))[0].flatten()
        tensor([4., 6.])
    """
    heads, wide = v.shape[2], state_dtype(v.dtype)
    if decay is None:
        decay = 1 - 2 ** (-5 - torch.arange(heads, dtype=wide, device=v.device))
    factor = decay.to(wide)[:, None, None]
    s = max(k.shape[3], 1) ** -0.5 if scale is None else scale

    def step(state: tuple[Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        S = factor * state[0] + k[..., None] * v[..., None, :]
        return (S * (s * q)[..., None]).sum(-2), (S,)

    if initial_state is None:
        shape = [sequences(v, cu_seqlens), heads, k.shape[3], v.shape[3]]
        initial_state = v.new_zeros(shape, dtype=wide)
    inputs = [per_head(q, heads), per_head(k, heads), v]
    h, (S,) = run_matrix_reference(step, v, inputs, (initial_state,), cu_seqlens, reverse)
    return h, S


class Retention(nn.Module):
    r"""RetNet's layer: retention at several scales, with rotated queries and keys and a gate.

    .. math::
        q_t, k_t, v_t &= R^t W_q x_t,\; R^t W_k x_t,\; W_v x_t \\
        y_t &= W_o \big(\text{silu}(W_g x_t) \odot \text{norm}(\text{retention}(q, k, v)_t)\big)

    with a decay for each head, and :math:`R` a rotation of each pair of channels by an angle of its
    own, so that products of queries and keys see how far apart they are (xPos, whose decay is the
    retention's). Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language
    Models", arXiv:2307.08621, section 2.3. Parameters have the names and initial values of
    torchscale's ``MultiScaleRetention``, whose further divisions of a head by a number cancel out in
    the norm, but for its eps.

    Args:
        embed_dim: channels of input and output, and of the queries and keys of all heads.
        num_heads: heads; ``K = embed_dim / num_heads`` is even.
        value_dim: channels of the values of all heads, ``V = value_dim / num_heads`` of each.
            ``2 * embed_dim`` if omitted.
        decay: of each head, in (0, 1]. RetNet's ``1 - 2**(-5 - head)`` if omitted.
        rotate: False leaves the queries and keys as they are.
        gate: False leaves out the gate and ``g_proj``.
        norm_eps: added to the mean square of each head's values in the norm, which has no weights.
        bias: True adds biases to the projections.
        device: of the parameters.
        dtype: of the parameters. States are float32, and float64 if they are, under autocast too.

    Attributes:
        q_proj.weight, k_proj.weight: ``(embed_dim, embed_dim)``.
        v_proj.weight, g_proj.weight: ``(value_dim, embed_dim)``.
        out_proj.weight: ``(embed_dim, value_dim)``.

    Example:
        >>> layer = torch_ext.Retention(16, num_heads=2)
        >>> x = torch.randn(2, 10, 16)
        >>> y = layer(x)
        >>> first, state = layer.prefill(x[:, :9])
        >>> last, state = layer.step(x[:, 9], state)
        >>> torch.allclose(torch.cat([first, last[:, None]], 1), y, atol=1e-5)
        True
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        value_dim: int | None = None,
        *,
        decay: list[float] | tuple[float, ...] | None = None,
        rotate: bool = True,
        gate: bool = True,
        norm_eps: float = 1e-5,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = 2 * embed_dim if value_dim is None else value_dim
        for name, value in [("num_heads", num_heads), ("embed_dim", embed_dim)]:
            if value < 1:
                raise ValueError(f"Retention: {name} is {value}, expected at least 1")
        for name, value in [("embed_dim", embed_dim), ("value_dim", value_dim)]:
            if value < 1 or value % num_heads:
                raise ValueError(
                    f"Retention: {name} is {value}, expected a multiple of num_heads={num_heads}"
                )
        if rotate and embed_dim // num_heads % 2:
            raise ValueError(
                f"Retention: embed_dim / num_heads is {embed_dim // num_heads}, expected an even "
                "number with rotate=True, which turns channels in pairs"
            )
        decays = [1 - 2.0 ** (-5 - head) for head in range(num_heads)] if decay is None else decay
        if len(decays) != num_heads or not all(0 < factor <= 1 for factor in decays):
            raise ValueError(
                f"Retention: decay is {decay}, expected num_heads={num_heads} numbers in (0, 1]"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.value_dim = value_dim
        self.decay = [float(factor) for factor in decays]
        self.rotate = rotate
        self.gate = gate
        self.norm_eps = norm_eps
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **factory)
        self.k_proj = nn.Linear(embed_dim, embed_dim, **factory)
        self.v_proj = nn.Linear(embed_dim, value_dim, **factory)
        self.g_proj = nn.Linear(embed_dim, value_dim, **factory) if gate else None
        self.out_proj = nn.Linear(value_dim, embed_dim, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier's uniform times ``2**-2.5``, ``out_proj`` times 1/2, as torchscale; biases 0."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.out_proj):
            if linear is None:
                continue
            nn.init.xavier_uniform_(linear.weight, 0.5 if linear is self.out_proj else 2**-2.5)
            if linear.bias is not None:
                linear.bias.zero_()

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, value_dim={self.value_dim}"

    def forward(self, x: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """Runs all steps, from zero states.

        Args:
            x: ``(B, T, embed_dim)``.
            lengths: number of steps of each row of a padded batch, integers, ``(B,)``. Padding
                changes no result of the others, whatever stands there; its own outputs are 0.
            padding: side on which the padding is, ``"right"`` or ``"left"``.

        Returns:
            ``(B, T, embed_dim)``.
        """
        return self.prefill(x, None, lengths, padding)[0]

    @torch.jit.export
    def prefill(
        self,
        x: Tensor,
        state: Tensor | None = None,
        lengths: Tensor | None = None,
        padding: str = "right",
    ) -> tuple[Tensor, Tensor]:
        """``forward`` from a state to a state: for prompts, streams and truncated backpropagation.

        Args:
            x: the next steps, ``(B, T, embed_dim)``.
            state: see ``init_state``. Zeros if omitted; it has to be where padding is on the left.
            lengths: as in ``forward``. The state is that after the last step of each row.
            padding: as in ``forward``.

        Returns:
            ``(B, T, embed_dim)`` and the state after the last step, with which the next steps of
            the same sequences give what they would have given in one call.
        """
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(
                f"Retention: x has shape {shape_text(x)}, expected (B, T, "
                f"embed_dim={self.embed_dim})"
            )
        valid = valid_steps("Retention", x, lengths, padding)
        if valid is not None:
            x = torch.where(valid, x, 0.0)
            if state is not None and padding == "left":
                raise ValueError(
                    "Retention.prefill: state is given, expected None with padding on the left, "
                    "which would stand between the state and the first step"
                )
        if state is None:
            state = self.init_state(x.shape[0])
        self._check_state(state, x.shape[0])
        q, k, v = self._project(x)
        steps = torch.arange(x.shape[1], device=x.device)
        if self.rotate:
            q, k = self._turn(q, steps[None, :, None]), self._turn(k, steps[None, :, None])
        decay = torch.tensor(self.decay, dtype=state_dtype(q.dtype), device=x.device)
        ends = torch.full([1], x.shape[1], device=x.device)
        if valid is None:
            h, state = retention(q, k, v, decay, state)
        else:
            # Padding neither enters the state nor lets it fade, so decays differ between steps: a
            # step of size 0 does that.
            k, v = torch.where(valid[..., None], k, 0.0), torch.where(valid[..., None], v, 0.0)
            sizes = valid.to(decay.dtype).expand(-1, -1, self.num_heads)
            h, turned = ssd(
                v, sizes, torch.log(decay), k, q * k.shape[3] ** -0.5,
                initial_state=state.transpose(2, 3),
            )  # fmt: skip
            state = turned.transpose(2, 3)
            if lengths is not None and padding == "right":
                ends = lengths.to(x.device)
        if self.rotate:
            state = self._turn_state(state, -ends)
        y = self._finish(x, h)
        return (y if valid is None else torch.where(valid, y, 0.0)), state

    @torch.jit.export
    def init_state(self, batch_size: int) -> Tensor:
        """Zeros ``(B, num_heads, K, V)``. A state's keys are turned as seen from the next step, so
        that it needs no count of the steps before."""
        weight = self.q_proj.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        keys, values = self.embed_dim // self.num_heads, self.value_dim // self.num_heads
        shape = [batch_size, self.num_heads, keys, values]
        return torch.zeros(shape, dtype=wide, device=weight.device)

    @torch.jit.export
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: ``x`` ``(B, embed_dim)`` and a state to ``(B, embed_dim)`` and the next."""
        if x.dim() != 2 or x.shape[1] != self.embed_dim:
            raise ValueError(
                f"Retention.step: x has shape {shape_text(x)}, expected (B, "
                f"embed_dim={self.embed_dim})"
            )
        self._check_state(state, x.shape[0])
        q, k, v = self._project(x)
        decay = torch.tensor(self.decay, dtype=state_dtype(q.dtype), device=x.device)
        h, state = retention_step(q, k, v, decay, state)
        if self.rotate:
            state = self._turn_state(state, torch.full([1], -1, device=x.device))
        return self._finish(x, h), state

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = [self.num_heads, -1]
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)

    def _turn(self, x: Tensor, steps: Tensor) -> Tensor:
        """Turns each pair of the last dimension's channels by so many steps."""
        pairs = x.shape[-1] // 2
        # Angles per step from 1 to 1e-4, in double: 1e5 steps leave float32 two digits.
        exponents = torch.arange(pairs, dtype=torch.float64, device=x.device) / max(pairs - 1, 1)
        angles = steps.unsqueeze(-1).to(torch.float64) * torch.pow(10000.0, -exponents)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = torch.cos(angles).to(wide), torch.sin(angles).to(wide)
        even, odd = x.to(wide).unflatten(-1, [pairs, 2]).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
        return turned.flatten(-2).to(x.dtype)

    def _turn_state(self, state: Tensor, steps: Tensor) -> Tensor:
        """``steps``: of all rows or of each."""
        return self._turn(state.transpose(2, 3), steps[:, None, None]).transpose(2, 3)

    def _finish(self, x: Tensor, h: Tensor) -> Tensor:
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        y = h.to(wide)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.norm_eps)
        y = y.to(h.dtype).flatten(-2)
        if self.g_proj is not None:
            y = F.silu(self.g_proj(x)) * y
        return self.out_proj(y)

    def _check_state(self, state: Tensor, batch_size: int) -> None:
        if not torch.jit.is_scripting():
            check_state_type("Retention", state)
        keys, values = self.embed_dim // self.num_heads, self.value_dim // self.num_heads
        if list(state.shape) != [batch_size, self.num_heads, keys, values]:
            raise ValueError(
                f"Retention: state has shape {shape_text(state)}, expected (B={batch_size}, "
                f"num_heads={self.num_heads}, K={keys}, V={values})"
            )
