r"""Linear attention: a softmax's exponential replaced by a feature map, so that a matrix remembers.

.. math::
    S_t &= S_{t-1} + \phi(k_t)\, v_t^\top, \qquad z_t = z_{t-1} + \phi(k_t) \\
    h_t &= \frac{S_t^\top \phi(q_t)}{z_t^\top \phi(q_t) + \epsilon}

for every head. Katharopoulos, Vyas, Pappas, Fleuret 2020, "Transformers are RNNs: Fast
Autoregressive Transformers with Linear Attention", arXiv:2006.16236, section 3.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from ._padding import valid_steps
from ._sequence_layer import check_state_type, shape_text
from .linear_scan import state_dtype

# The matrix S and the normaliser z.
State = tuple[Tensor, Tensor]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State | None = None,
    scale: float = 1.0,
    feature_map: str = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    r"""Causal linear attention, with its feature map and its normaliser, in one pass.

    .. math::
        S_t &= S_{t-1} + \phi(k_t)\, v_t^\top, \qquad z_t = z_{t-1} + \phi(k_t) \\
        h_t &= \frac{S_t^\top (s\, \phi(q_t))}{z_t^\top (s\, \phi(q_t)) + \epsilon}

    for every head, with :math:`s` the ``scale``. Katharopoulos et al. 2020, "Transformers are
    RNNs", arXiv:2006.16236, section 3.

    Args:
        q: queries, ``(B, T, G, K)``: a head each, or fewer, where ``G`` divides ``H``; head ``h``
            has the queries and the keys ``h // (H / G)``. Any strides, such as those of the view
            ``x.transpose(1, 2)`` of ``(B, G, T, K)``. float64, float32, bfloat16 or float16.
        k: keys, ``(B, T, G, K)``, the dtype of ``q``.
        v: values, ``(B, T, H, V)``, the dtype of ``q``.
        initial_state: ``S``, ``(B, H, K, V)``, and ``z``, ``(B, H, K)``, float32 (float64 for
            float64 inputs). Zeros if omitted.
        scale: factor of the queries' features. With ``normalize`` it changes no more than what
            ``eps`` weighs.
        feature_map: of queries and keys: ``"elu"``, which is elu + 1: ``x + 1`` for ``x > 0``,
            ``exp(x)`` below; ``"relu"``; or ``"identity"``.
        normalize: divide by the normaliser. False leaves out the division, and ``z`` comes back as
            it went in.
        eps: added to the normaliser, which is 0 where no key has met the query. With
            ``"identity"`` the normaliser has either sign, and nothing keeps it away from 0.
        cu_seqlens: where several sequences stand end to end in the one row (``B`` is 1): sequence
            ``s`` is the steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. int32 or int64,
            ``(num_sequences + 1,)``, from 0 to ``T``, never descending. States then have
            ``num_sequences`` rows.
        reverse: run from the last step to the first (of each sequence).

    Returns:
        ``h``, ``(B, T, H, V)``, the dtype of ``q``, and the final state, ``S`` and ``z``, float32
        or float64. With no step at all the final state is the initial state.

    Raises:
        ValueError: a shape differs from the above, ``cu_seqlens`` does not ascend from 0 to ``T``,
            or ``feature_map`` is another word.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.
        NotImplementedError: the tensors are on a GPU, and this build has no CUDA kernels.

    Notes:
        Accumulates in float32 for half precision. Bitwise the same on every run; for every
        number of threads too, but for ``feature_map="elu"``: torch's own may differ in the last bit
        where threads meet. Differentiable any number of times, through the final state as well.

    Example:
        >>> one = torch.ones(1, 3, 1, 1)
        >>> v = torch.tensor([4.0, 8.0, 3.0]).reshape(1, 3, 1, 1)
        >>> h, (S, z) = torch_ext.linear_attention(one, one, v)  # equal keys: the mean so far
        >>> h.flatten()
        tensor([4.0000, 6.0000, 5.0000])
        >>> S.flatten(), z.flatten()  # elu + 1 makes keys of 2
        (tensor([30.]), tensor([6.]))
    """
    S: Tensor | None = None
    z: Tensor | None = None
    if initial_state is not None:
        if not torch.jit.is_scripting():
            check_states("linear_attention", "initial_state", initial_state, "S, z")
        S, z = initial_state
    h, S, z = torch.ops.torch_ext.linear_attention(
        q, k, v, S, z, cu_seqlens, scale, feature_map, normalize, eps, reverse
    )
    return h, (S, z)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    state_indices: Tensor | None = None,
    scale: float = 1.0,
    feature_map: str = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, State]:
    r"""One step of :func:`linear_attention`.

    Args:
        q: ``(B, G, K)``.
        k: ``(B, G, K)``, the dtype of ``q``.
        v: ``(B, H, V)``, the dtype of ``q``.
        state: ``S``, ``(B, H, K, V)``, and ``z``, ``(B, H, K)``; with ``state_indices`` two pools,
            ``(num_slots, H, K, V)`` and ``(num_slots, H, K)``.
        state_indices: row of the pools for each row of ``q``, int32 or int64, ``(B,)``. Rows with a
            negative index are skipped: their ``h`` is 0 and no state changes.
        scale: as in :func:`linear_attention`.
        feature_map: as in :func:`linear_attention`.
        normalize: as in :func:`linear_attention`.
        eps: as in :func:`linear_attention`.

    Returns:
        ``h``, ``(B, H, V)``, the dtype of ``q``, and the new state; with ``state_indices`` the
        whole new pools.

    Raises:
        ValueError: a shape differs from the above, an index is not below ``num_slots``, or
            ``feature_map`` is another word.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> one, state = torch.ones(1, 1, 1), (torch.full((1, 1, 1, 1), 8.0), torch.ones(1, 1, 1))
        >>> h, (S, z) = torch_ext.linear_attention_step(
        ...     one, one, one, state, feature_map="identity", normalize=False
        ... )
        >>> h
        tensor([[[9.]]])
    """
    if not torch.jit.is_scripting():
        check_states("linear_attention_step", "state", state, "S, z")
    S, z = state
    h, S, z = torch.ops.torch_ext.linear_attention_step(
        q, k, v, S, z, state_indices, scale, feature_map, normalize, eps
    )
    return h, (S, z)


def linear_attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    state_indices: Tensor | None = None,
    scale: float = 1.0,
    feature_map: str = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    r"""One step of :func:`linear_attention` that overwrites both tensors of ``state``.

    Otherwise as :func:`linear_attention_step`; not differentiable, so where an input requires grad
    it raises a RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``h``, ``(B, H, V)``.

    Example:
        >>> one, slot = torch.ones(1, 1, 1), torch.tensor([2])
        >>> S, z = torch.zeros(3, 1, 1, 1), torch.zeros(3, 1, 1)
        >>> h = torch_ext.linear_attention_step_(one, one, 4 * one, (S, z), slot)
        >>> S.flatten(), z.flatten()
        (tensor([0., 0., 8.]), tensor([0., 0., 2.]))
    """
    if not torch.jit.is_scripting():
        check_states("linear_attention_step_", "state", state, "S, z")
    S, z = state
    return torch.ops.torch_ext.linear_attention_step_(
        q, k, v, S, z, state_indices, scale, feature_map, normalize, eps
    )


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State | None = None,
    scale: float = 1.0,
    feature_map: str = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    """What :func:`linear_attention` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> one = torch.ones(1, 2, 1, 1)
        >>> linear_attention_reference(one, one, 4 * one, eps=0.0)[0].flatten()
        tensor([4., 4.])
    """

    def step(state: State, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        S, z = state
        q, k = scale * features(q, feature_map), features(k, feature_map)
        S = S + k[..., None] * v[..., None, :]
        h = (S * q[..., None]).sum(-2)
        if normalize:
            z = z + k
            h = h / ((z * q).sum(-1, keepdim=True) + eps)
        return h, (S, z)

    heads = v.shape[2]
    if initial_state is None:
        shape = [sequences(v, cu_seqlens), heads, k.shape[3]]
        S = v.new_zeros([*shape, v.shape[3]], dtype=state_dtype(v.dtype))
        initial_state = S, v.new_zeros(shape, dtype=S.dtype)
    inputs = [per_head(q, heads), per_head(k, heads), v]
    return run_matrix_reference(step, v, inputs, initial_state, cu_seqlens, reverse)


class LinearAttention(nn.Module):
    r"""A layer of causal self-attention in linear time: projections around ``linear_attention``.

    .. math::
        q_t, k_t, v_t &= W_q x_t + b_q,\; W_k x_t + b_k,\; W_v x_t + b_v \\
        y_t &= W_o\, \text{linear\_attention}(q, k, v)_t + b_o

    Katharopoulos et al. 2020, "Transformers are RNNs", arXiv:2006.16236. Parameters have the names
    and initial values of the package fast_transformers' ``AttentionLayer``.

    Args:
        d_model: channels of input and output.
        n_heads: heads.
        d_keys: ``K``, channels of a head's queries and keys. ``d_model / n_heads`` if omitted.
        d_values: ``V``, channels of a head's values. ``d_model / n_heads`` if omitted.
        feature_map: see :func:`torch_ext.linear_attention`.
        normalize: see :func:`torch_ext.linear_attention`.
        eps: see :func:`torch_ext.linear_attention`.
        bias: False leaves out the projections' biases.
        device: of the parameters.
        dtype: of the parameters. States are float32, and float64 if they are, under autocast too.

    Attributes:
        query_projection.weight, key_projection.weight: ``(n_heads * K, d_model)``.
        value_projection.weight: ``(n_heads * V, d_model)``.
        out_projection.weight: ``(d_model, n_heads * V)``.

    Example:
        >>> layer = torch_ext.LinearAttention(16, n_heads=2)
        >>> x = torch.randn(2, 10, 16)
        >>> y = layer(x)
        >>> first, state = layer.prefill(x[:, :9])
        >>> last, state = layer.step(x[:, 9], state)
        >>> torch.allclose(torch.cat([first, last[:, None]], 1), y, atol=1e-5)
        True
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_keys: int | None = None,
        d_values: int | None = None,
        *,
        feature_map: str = "elu",
        normalize: bool = True,
        eps: float = 1e-6,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or n_heads < 1:
            raise ValueError(
                f"LinearAttention: d_model is {d_model} and n_heads {n_heads}, expected at least 1"
            )
        if (d_keys is None or d_values is None) and d_model % n_heads:
            raise ValueError(
                f"LinearAttention: d_model is {d_model}, expected a multiple of n_heads={n_heads} "
                "without d_keys and d_values"
            )
        if feature_map not in ("elu", "relu", "identity"):
            raise ValueError(
                f'LinearAttention: feature_map is {feature_map!r}, expected "elu", "relu" or '
                '"identity"'
            )
        self.d_model = d_model
        self.n_heads = n_heads
        self.d_keys = d_model // n_heads if d_keys is None else d_keys
        self.d_values = d_model // n_heads if d_values is None else d_values
        for name, value in [("d_keys", self.d_keys), ("d_values", self.d_values)]:
            if value < 1:
                raise ValueError(f"LinearAttention: {name} is {value}, expected at least 1")
        self.feature_map = feature_map
        self.normalize = normalize
        self.eps = float(eps)
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.query_projection = nn.Linear(d_model, n_heads * self.d_keys, **factory)
        self.key_projection = nn.Linear(d_model, n_heads * self.d_keys, **factory)
        self.value_projection = nn.Linear(d_model, n_heads * self.d_values, **factory)
        self.out_projection = nn.Linear(n_heads * self.d_values, d_model, **factory)

    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``."""
        for linear in (
            self.query_projection,
            self.key_projection,
            self.value_projection,
            self.out_projection,
        ):
            linear.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.d_model}, n_heads={self.n_heads}, feature_map={self.feature_map!r}"

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
            state: see ``init_state``. Zeros if omitted.
            lengths: as in ``forward``. The state is that after the last step of each row.
            padding: as in ``forward``.

        Returns:
            ``(B, T, d_model)`` and the state after the last step, with which the next steps of the
            same sequences give what they would have given in one call.
        """
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(
                f"LinearAttention: x has shape {shape_text(x)}, expected (B, T, "
                f"d_model={self.d_model})"
            )
        valid = valid_steps("LinearAttention", x, lengths, padding)
        if valid is not None:
            x = torch.where(valid, x, 0.0)
        if state is None:
            state = self.init_state(x.shape[0])
        self._check_state(state, x.shape[0])
        q, k, v = self._project(x)
        if valid is not None:  # keys whose features are 0
            k = torch.where(valid[..., None], k, -1e4 if self.feature_map == "elu" else 0.0)
        h, state = linear_attention(q, k, v, state, 1.0, self.feature_map, self.normalize, self.eps)
        y = self.out_projection(h.flatten(-2))
        return (y if valid is None else torch.where(valid, y, 0.0)), state

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: ``S`` ``(B, n_heads, K, V)`` and ``z`` ``(B, n_heads, K)``."""
        weight = self.query_projection.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shape = [batch_size, self.n_heads, self.d_keys]
        return (
            torch.zeros(shape + [self.d_values], dtype=wide, device=weight.device),
            torch.zeros(shape, dtype=wide, device=weight.device),
        )

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: ``x`` ``(B, d_model)`` and a state to ``(B, d_model)`` and the next state."""
        if x.dim() != 2 or x.shape[1] != self.d_model:
            raise ValueError(
                f"LinearAttention.step: x has shape {shape_text(x)}, expected (B, "
                f"d_model={self.d_model})"
            )
        self._check_state(state, x.shape[0])
        q, k, v = self._project(x)
        h, state = linear_attention_step(
            q, k, v, state, None, 1.0, self.feature_map, self.normalize, self.eps
        )
        return self.out_projection(h.flatten(-2)), state

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = [self.n_heads, -1]
        q, k, v = self.query_projection(x), self.key_projection(x), self.value_projection(x)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)

    def _check_state(self, state: State, batch_size: int) -> None:
        if not torch.jit.is_scripting():
            check_state_type("LinearAttention", state, 2)
        S, z = state
        shape = [batch_size, self.n_heads, self.d_keys]
        if list(S.shape) != shape + [self.d_values]:
            raise ValueError(
                f"LinearAttention: state[0] has shape {shape_text(S)}, expected (B={batch_size}, "
                f"n_heads={self.n_heads}, K={self.d_keys}, V={self.d_values})"
            )
        if list(z.shape) != shape:
            raise ValueError(
                f"LinearAttention: state[1] has shape {shape_text(z)}, expected (B={batch_size}, "
                f"n_heads={self.n_heads}, K={self.d_keys})"
            )


def features(x: Tensor, feature_map: str) -> Tensor:
    """The feature map of this name. That of ``"elu"`` stays positive where elu rounds to -1."""
    if feature_map == "elu":
        return torch.where(x > 0, x + 1, torch.exp(torch.where(x > 0, 0, x)))
    if feature_map == "relu":
        return torch.relu(x)
    if feature_map == "identity":
        return x
    raise ValueError(
        f'linear_attention: feature_map is "{feature_map}", expected "elu", "relu" or "identity"'
    )


def per_head(x: Tensor, heads: int) -> Tensor:
    """``(B, T, G, ...)`` with every group in the place of each of its heads."""
    return x.repeat_interleave(heads // x.shape[2], 2)


def sequences(v: Tensor, cu_seqlens: Tensor | None) -> int:
    """The rows of a state."""
    return v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def check_states(owner: str, argument: str, state: object, names: str) -> None:
    """That a state is a tuple of the tensors named. For Python: TorchScript knows by itself."""
    many = isinstance(state, tuple | list)
    parts = list(state) if many else []
    expected = names.count(",") + 1
    if len(parts) == expected and all(isinstance(part, Tensor) for part in parts):
        return
    came = "(" + ", ".join([type(part).__name__ for part in parts]) + ")"
    came = came if many else type(state).__name__
    raise TypeError(
        f"{owner}: {argument} is {came}, expected a tuple of {expected} tensors, ({names})"
    )


def run_matrix_reference(
    step: Callable[..., tuple[Tensor, tuple[Tensor, ...]]],
    v: Tensor,
    inputs: list[Tensor],
    initial_state: tuple[Tensor, ...],
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs ``h, state = step(state, *(x[:, t] for x in inputs))`` over time: what the references
    of all matrix memories share. ``h`` has the shape and dtype of ``v``."""
    T, wide = v.shape[1], state_dtype(v.dtype)
    inputs = [x.to(wide) for x in inputs]
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    outputs = [v[:, 0]] * T if T else []
    final_states = []
    for s, (start, stop) in enumerate(pairwise(bounds)):
        state = initial_state
        if cu_seqlens is not None:
            state = tuple(x[s : s + 1] for x in state)
        for t in reversed(range(start, stop)) if reverse else range(start, stop):
            outputs[t], state = step(state, *(x[:, t] for x in inputs))
        final_states.append(state)
    h = torch.stack(outputs, 1).to(v.dtype) if outputs else torch.zeros_like(v)
    if not final_states:
        return h, tuple(x.clone() for x in initial_state)
    return h, tuple(torch.cat(parts) for parts in zip(*final_states, strict=True))
