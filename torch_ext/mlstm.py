r"""mLSTM: an LSTM whose state is a matrix, with an exponential input gate and a normaliser.

.. math::
    m_t &= \max(\log \sigma(f_t) + m_{t-1},\; i_t) \\
    f'_t &= \exp(\log \sigma(f_t) + m_{t-1} - m_t), \qquad i'_t = \exp(i_t - m_t) \\
    C_t &= f'_t C_{t-1} + i'_t\, k_t v_t^\top, \qquad n_t = f'_t n_{t-1} + i'_t k_t \\
    h_t &= \frac{C_t^\top (s\, q_t)}{\max(|n_t^\top (s\, q_t)|,\; e^{-m_t}) + \epsilon}

for every head. Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517,
section 2.3; with ``input_gate="sigmoid"`` the variant mLSTMsig of Beck et al. 2025, "Tiled Flash
Linear Attention", arXiv:2503.14376.
"""

import torch
from torch import Tensor

from ._sequence_layer import GateBiasInit, SequenceLayer, check_state_type, chrono_
from .linear_attention import check_states, per_head, run_matrix_reference, sequences
from .linear_scan import state_dtype

# The matrix C, the normaliser n and the stabiliser m.
State = tuple[Tensor, Tensor, Tensor]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    initial_state: State | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    input_gate: str = "exp",
    normalize: bool = True,
    normalizer_grad: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    r"""Matrix LSTM: gates, stabiliser, memory and normaliser in one pass.

    .. math::
        m_t &= \max(\log \sigma(f_t) + m_{t-1},\; i_t) \\
        f'_t &= \exp(\log \sigma(f_t) + m_{t-1} - m_t), \qquad i'_t = \exp(i_t - m_t) \\
        C_t &= f'_t C_{t-1} + i'_t\, k_t v_t^\top, \qquad n_t = f'_t n_{t-1} + i'_t k_t \\
        h_t &= \frac{C_t^\top (s\, q_t)}{\max(|n_t^\top (s\, q_t)|,\; e^{-m_t}) + \epsilon}

    for every head, with :math:`s` the ``scale``. Beck et al. 2024, "xLSTM", arXiv:2405.04517,
    section 2.3. ``m`` keeps the exponentials in range: ``exp(m) C`` and ``exp(m) n`` are what is
    remembered, and ``h`` depends on ``m`` through ``eps`` alone. With ``input_gate="sigmoid"``
    (Beck et al. 2025, arXiv:2503.14376) it is not needed: ``i' = sigmoid(i)``, ``f' = sigmoid(f)``,
    and the divisor is ``max(|n^T (s q)|, 1) + eps``, or none without ``normalize``.

    Args:
        q: queries, ``(B, T, G, K)``: a head each, or fewer, where ``G`` divides ``H``; head ``h``
            has the queries and the keys ``h // (H / G)``. Any strides, such as those of the view
            ``x.transpose(1, 2)`` of ``(B, G, T, K)``. float64, float32, bfloat16 or float16.
        k: keys, ``(B, T, G, K)``, the dtype of ``q``.
        v: values, ``(B, T, H, V)``, the dtype of ``q``.
        i: pre-activation of the input gate, ``(B, T, H)``, the dtype of ``q``, or float32 beside
            half precision.
        f: pre-activation of the forget gate, ``(B, T, H)``, dtypes as for ``i``.
        initial_state: ``C``, ``(B, H, K, V)``, ``n``, ``(B, H, K)``, and ``m``, ``(B, H)``, float32
            (float64 for float64 inputs). Zeros if omitted.
        scale: factor of the queries. ``K**-0.5`` if omitted.
        eps: added to the divisor.
        input_gate: ``"exp"`` or ``"sigmoid"``.
        normalize: divide. False, for ``input_gate="sigmoid"`` alone, leaves out the division, and
            ``n`` comes back as it went in.
        normalizer_grad: False takes the divisor of ``exp(m) C^T (s q)`` for a constant in the
            backward: the shortcut by which mlstm_kernels trains, right where a norm that is blind
            to the size of ``h`` follows directly. Gradients through the final state stay whole.
        cu_seqlens: where several sequences stand end to end in the one row (``B`` is 1): sequence
            ``s`` is the steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. int32 or int64,
            ``(num_sequences + 1,)``, from 0 to ``T``, never descending. States then have
            ``num_sequences`` rows.
        reverse: run from the last step to the first (of each sequence).

    Returns:
        ``h``, ``(B, T, H, V)``, the dtype of ``q``, and the final state, ``C``, ``n`` and ``m``,
        float32 or float64. With no step at all the final state is the initial state, and with
        ``input_gate="sigmoid"`` ``m`` always is: its zeros stay zeros.

    Raises:
        ValueError: a shape differs from the above, ``cu_seqlens`` does not ascend from 0 to ``T``,
            ``input_gate`` is another word, or ``normalize`` is False with ``input_gate="exp"``.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.
        NotImplementedError: the tensors are on a GPU, and this build has no CUDA kernels.

    Notes:
        Accumulates in float32 for half precision. Bitwise the same on every run, and with
        ``input_gate="exp"`` for every number of threads; torch's own sigmoid may differ in the last
        bit where threads meet. Gradients are those of the forward, through the divisor, the
        stabiliser and the final state as well. Differentiable any number of times.

        Other packages' states: mlstm_kernels has ``m`` as ``(B, H, 1)``, else the same ones. The
        package xlstm scales keys instead of queries: give ``k * K**-0.5`` and ``scale=1.0``, and
        states are its own (``n`` as ``(B, H, K, 1)``, ``m`` as ``(B, H, 1, 1)`` there). Its ``C``
        and ``n`` are those of the default ``scale`` times ``K**-0.5``; ``m`` is the same.

    Example:
        >>> one, gate = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1)
        >>> v = torch.tensor([4.0, 8.0, 3.0]).reshape(1, 3, 1, 1)
        >>> h, (C, n, m) = torch_ext.mlstm(one, one, v, gate, gate + 100)  # forgets nothing
        >>> h.flatten()
        tensor([4.0000, 6.0000, 5.0000])
        >>> C.flatten(), n.flatten()
        (tensor([15.]), tensor([3.]))
    """
    C: Tensor | None = None
    n: Tensor | None = None
    m: Tensor | None = None
    if initial_state is not None:
        if not torch.jit.is_scripting():
            check_states("mlstm", "initial_state", initial_state, "C, n, m")
        C, n, m = initial_state
    h, C, n, m = torch.ops.torch_ext.mlstm(
        q,
        k,
        v,
        i,
        f,
        C,
        n,
        m,
        cu_seqlens,
        scale,
        eps,
        input_gate,
        normalize,
        normalizer_grad,
        reverse,
    )
    return h, (C, n, m)


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    input_gate: str = "exp",
    normalize: bool = True,
    normalizer_grad: bool = True,
) -> tuple[Tensor, State]:
    r"""One step of :func:`mlstm`.

    Args:
        q: ``(B, G, K)``.
        k: ``(B, G, K)``, the dtype of ``q``.
        v: ``(B, H, V)``, the dtype of ``q``.
        i: ``(B, H)``, the dtype of ``q``, or float32 beside half precision.
        f: ``(B, H)``, dtypes as for ``i``.
        state: ``C``, ``(B, H, K, V)``, ``n``, ``(B, H, K)``, and ``m``, ``(B, H)``; with
            ``state_indices`` three pools with ``num_slots`` rows in the place of ``B``.
        state_indices: row of the pools for each row of ``q``, int32 or int64, ``(B,)``. Rows with a
            negative index are skipped: their ``h`` is 0 and no state changes.
        scale: as in :func:`mlstm`.
        eps: as in :func:`mlstm`.
        input_gate: as in :func:`mlstm`.
        normalize: as in :func:`mlstm`.
        normalizer_grad: as in :func:`mlstm`.

    Returns:
        ``h``, ``(B, H, V)``, the dtype of ``q``, and the new state; with ``state_indices`` the
        whole new pools.

    Raises:
        ValueError: a shape differs from the above, an index is not below ``num_slots``,
            ``input_gate`` is another word, or ``normalize`` is False with ``input_gate="exp"``.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> one, gate = torch.ones(1, 1, 1), torch.zeros(1, 1)
        >>> state = torch.full((1, 1, 1, 1), 4.0), torch.ones(1, 1, 1), torch.zeros(1, 1)
        >>> h, state = torch_ext.mlstm_step(one, one, 8 * one, gate, gate + 100, state)
        >>> h
        tensor([[[6.0000]]])
    """
    if not torch.jit.is_scripting():
        check_states("mlstm_step", "state", state, "C, n, m")
    C, n, m = state
    h, C, n, m = torch.ops.torch_ext.mlstm_step(
        q, k, v, i, f, C, n, m, state_indices, scale, eps, input_gate, normalize, normalizer_grad
    )
    return h, (C, n, m)


def mlstm_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    input_gate: str = "exp",
    normalize: bool = True,
) -> Tensor:
    r"""One step of :func:`mlstm` that overwrites the three tensors of ``state``.

    Otherwise as :func:`mlstm_step`; not differentiable, so where an input requires grad it raises a
    RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``h``, ``(B, H, V)``.

    Example:
        >>> one, gate, slot = torch.ones(1, 1, 1), torch.zeros(1, 1), torch.tensor([2])
        >>> state = torch.zeros(3, 1, 1, 1), torch.zeros(3, 1, 1), torch.zeros(3, 1)
        >>> h = torch_ext.mlstm_step_(one, one, 8 * one, gate, gate, state, slot)
        >>> state[0].flatten(), state[1].flatten()
        (tensor([0., 0., 8.]), tensor([0., 0., 1.]))
    """
    if not torch.jit.is_scripting():
        check_states("mlstm_step_", "state", state, "C, n, m")
    C, n, m = state
    return torch.ops.torch_ext.mlstm_step_(
        q, k, v, i, f, C, n, m, state_indices, scale, eps, input_gate, normalize
    )


def mlstm_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    initial_state: State | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    input_gate: str = "exp",
    normalize: bool = True,
    normalizer_grad: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    """What :func:`mlstm` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> one, gate = torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1)
        >>> mlstm_reference(one, one, 8 * one, gate, gate, eps=0.0)[0].flatten()
        tensor([8., 8.])
    """
    if input_gate not in ("exp", "sigmoid"):
        raise ValueError(f'mlstm: input_gate is "{input_gate}", expected "exp" or "sigmoid"')
    if input_gate == "exp" and not normalize:
        raise ValueError('mlstm: normalize is False, expected True with input_gate "exp"')
    heads, wide = v.shape[2], state_dtype(v.dtype)
    s = max(k.shape[3], 1) ** -0.5 if scale is None else scale

    def step(
        state: State, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor
    ) -> tuple[Tensor, State]:
        C, n, m = state
        if input_gate == "exp":
            kept = torch.nn.functional.logsigmoid(f) + m
            m = torch.maximum(kept, i)
            i, f = torch.exp(i - m), torch.exp(kept - m)
        else:
            i, f = torch.sigmoid(i), torch.sigmoid(f)
        C = f[..., None, None] * C + i[..., None, None] * k[..., None] * v[..., None, :]
        numerator = (C * (s * q)[..., None]).sum(-2)
        if not normalize:
            return numerator, (C, n, m)
        n = f[..., None] * n + i[..., None] * k
        # Numerator and divisor times exp(min(m, 0)): exp(-m) alone is inf where m is -1e4. (relu's
        # slope at 0 is 0, so that the two parts of m have slopes that add up to 1.)
        stabiliser = m if input_gate == "exp" else torch.zeros_like(m)
        above = torch.relu(stabiliser)
        below = stabiliser - above
        if normalizer_grad:
            factor = torch.exp(below)
        else:  # a constant is the divisor of exp(m) C^T (s q), which m cancels out of
            factor = torch.exp(below.detach()) * torch.exp(stabiliser - stabiliser.detach())
        r = (n * (s * q)).sum(-1).abs()
        divisor = torch.maximum(torch.exp(below) * r, torch.exp(-above)) + eps * torch.exp(below)
        if not normalizer_grad:
            divisor = divisor.detach()
        return (factor / divisor)[..., None] * numerator, (C, n, m)

    if initial_state is None:
        shape = [sequences(v, cu_seqlens), heads, k.shape[3]]
        C = v.new_zeros([*shape, v.shape[3]], dtype=wide)
        initial_state = C, C.new_zeros(shape), C.new_zeros(shape[:2])
    inputs = [per_head(q, heads), per_head(k, heads), v, i, f]
    return run_matrix_reference(step, v, inputs, initial_state, cu_seqlens, reverse)


class MLSTM(SequenceLayer):
    r"""Layers of :func:`torch_ext.mlstm` with the constructor and contract of torch.nn.LSTM.

    .. math::
        q_t, k_t, v_t, i_t, f_t, o_t &= W x_t + b \\
        \text{output}_t &= \sigma(o_t) \odot \text{mlstm}(q, k, v, i, f)_t

    Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517, section 2.3,
    equations 19 to 27. There are three states, not the LSTM's two, and all gates see ``x`` alone:
    what depends on the order of several things wants two or more layers.

    Args:
        input_size: channels of ``x``.
        hidden_size: channels of each direction's output, those of the values: ``V = hidden_size /
            num_heads`` of each head.
        num_layers: layers, each of which reads the output of the one before.
        bias: False leaves out ``b``.
        batch_first: ``x`` and the output are ``(B, T, ...)`` instead of ``(T, B, ...)``; states
            are ``(num_layers * num_directions, B, ...)`` in either case.
        dropout: probability of a zero in the output of each layer but the last, in training.
        bidirectional: a second direction runs from a sequence's last step to its first; its output
            is appended to the first one's.
        num_heads: memories side by side, each with gates of its own. Their states have
            ``qk_size * hidden_size / num_heads`` numbers together, so more heads are less memory
            and less work.
        qk_size: channels of the queries and of the keys of all heads, ``K = qk_size / num_heads``
            of each head. ``hidden_size`` if omitted; xLSTM-7B has half of it.
        input_gate: ``"exp"``, or ``"sigmoid"`` for mLSTMsig, see :func:`torch_ext.mlstm`.
        normalize: divide by the normaliser. False goes with ``input_gate="sigmoid"`` alone.
        eps: added to the divisor.
        gate_bias_init: the first value of ``b_f``. None spreads it from 3 to 6 over the heads
            (both xlstm and xLSTM-7B do), which remember 20 to 400 steps. A number is the value for
            all; positive is long memory. A pair ``(shortest, longest)`` of numbers of steps, above
            1, draws the time ``tau`` that a head remembers uniformly between them: ``b_f = log(tau
            - 1)`` (chrono initialisation, Tallec & Ollivier 2018, arXiv:1804.11188).
        input_gate_bias_init: the first value of ``b_i``. xLSTM-7B's -10 makes outputs of the size
            of e^-10, which a norm behind the layer brings back; nothing here does, hence 0.
        device: of the parameters.
        dtype: of the parameters. States are float32, and float64 if they are, under autocast too.

    Attributes:
        weight_ih_l{k}[_reverse]: ``(2 * qk_size + 2 * hidden_size + 2 * num_heads, in)``, the rows
            of q, k, v, i, f, o; ``in`` is ``input_size`` for ``k = 0``, else ``num_directions *
            hidden_size``. Those of i and f begin as zeros, as the peers' do, so that memory lasts
            as long as ``b_f`` says.
        bias_ih_l{k}[_reverse]: one number for each row.

    Example:
        >>> rnn = torch_ext.MLSTM(3, 8, num_layers=2, batch_first=True, num_heads=2)
        >>> x = torch.randn(4, 100, 3)
        >>> y, (C, n, m) = rnn(x)
        >>> y.shape, C.shape, n.shape, m.shape  # doctest: +NORMALIZE_WHITESPACE
        (torch.Size([4, 100, 8]), torch.Size([2, 4, 2, 4, 4]), torch.Size([2, 4, 2, 4]),
         torch.Size([2, 4, 2]))
        >>> state = rnn.init_state(batch_size=4)
        >>> for t in range(100):
        ...     y_t, state = rnn.step(x[:, t], state)
        >>> torch.allclose(y_t, y[:, -1], atol=1e-5)
        True
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        num_heads: int = 1,
        qk_size: int | None = None,
        input_gate: str = "exp",
        normalize: bool = True,
        eps: float = 1e-6,
        gate_bias_init: GateBiasInit = None,
        input_gate_bias_init: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for argument, value in [("num_heads", num_heads), ("qk_size", qk_size)]:
            if argument == "qk_size" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"MLSTM: {argument} is {value!r}, expected an integer")
            if value < 1:
                raise ValueError(f"MLSTM: {argument} is {value}, expected at least 1")
        qk_size = hidden_size if qk_size is None else qk_size
        for argument, value in [("hidden_size", hidden_size), ("qk_size", qk_size)]:
            if isinstance(value, int) and value % num_heads:
                raise ValueError(
                    f"MLSTM: {argument} is {value}, expected a multiple of num_heads={num_heads}"
                )
        if input_gate not in ("exp", "sigmoid"):
            raise ValueError(f'MLSTM: input_gate is {input_gate!r}, expected "exp" or "sigmoid"')
        if input_gate == "exp" and not normalize:
            raise ValueError('MLSTM: normalize is False, expected True with input_gate "exp"')
        if input_gate_bias_init != 0 and not bias:
            raise ValueError(
                f"MLSTM: input_gate_bias_init is {input_gate_bias_init}, expected 0 with bias=False"
            )
        # Before the constructor below, which makes parameters of these sizes.
        self.num_heads = num_heads
        self.qk_size = qk_size
        self.input_gate = input_gate
        self.normalize = normalize
        self.eps = float(eps)
        self.input_gate_bias_init = float(input_gate_bias_init)
        self._rows = [qk_size, qk_size, hidden_size, num_heads, num_heads, hidden_size]
        super().__init__(
            6,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            gate_bias_init,
            device,
            dtype,
        )

    def parameter_shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        rows = sum(self._rows)
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, input_size)}
        if self.bias:
            shapes["bias_ih"] = (rows,)
        return shapes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ``+-1 / sqrt(hidden_size)``, as torch.nn, but for the two gates'."""
        super().reset_parameters()
        for name in self._weight_names:
            parameter = getattr(self, name)
            if name.startswith("weight_ih"):
                _, _, _, i, f, _ = parameter.split(self._rows)
                i.zero_()
                f.zero_()
            elif self.gate_bias_init is None:
                self.init_gate_bias(parameter)

    def init_gate_bias(self, bias: Tensor) -> None:
        _, _, _, i, f, _ = bias.split(self._rows)
        i.fill_(self.input_gate_bias_init)
        if self.gate_bias_init is None:
            f.copy_(torch.linspace(3.0, 6.0, self.num_heads))
        elif isinstance(self.gate_bias_init, tuple | list):
            chrono_(f, *self.gate_bias_init)
        else:
            f.fill_(self.gate_bias_init)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for option, default in [
            ("num_heads", 1),
            ("qk_size", self.hidden_size),
            ("input_gate", "exp"),
            ("eps", 1e-6),
            ("input_gate_bias_init", 0.0),
        ]:
            value = getattr(self, option)
            if value != default:
                text += f", {option}={value!r}"
        return text

    def state_sizes(self) -> list[list[tuple[str, int]]]:
        heads = ("num_heads", self.num_heads)
        keys = ("K", self.qk_size // self.num_heads)
        values = ("V", self.hidden_size // self.num_heads)
        return [[heads, keys, values], [heads, keys], [heads]]

    def recurrence(
        self,
        gates: Tensor,
        weights: list[Tensor],
        state: list[Tensor],
        valid: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        if valid is not None:
            gates = torch.where(valid, gates, 0.0)
        q, k, v, i, f, o = gates.split(self._rows, -1)
        if valid is not None:  # no input and nothing forgotten; float16 ends at 65504
            i = torch.where(valid, i, -6e4)
            f = torch.where(valid, f, 6e4)
        h, (C, n, m) = mlstm(
            self._heads(q),
            self._heads(k),
            self._heads(v),
            i,
            f,
            (state[0], state[1], state[2]),
            None,
            self.eps,
            self.input_gate,
            self.normalize,
            True,
            cu_seqlens,
            reverse,
        )
        return h.flatten(-2) * torch.sigmoid(o), [C, n, m]

    def recurrence_step(
        self, gates: Tensor, weights: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        q, k, v, i, f, o = gates.split(self._rows, -1)
        h, (C, n, m) = mlstm_step(
            self._heads(q),
            self._heads(k),
            self._heads(v),
            i,
            f,
            (state[0], state[1], state[2]),
            None,
            None,
            self.eps,
            self.input_gate,
            self.normalize,
        )
        return h.flatten(-2) * torch.sigmoid(o), [C, n, m]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, [self.num_heads, -1])

    def forward(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Runs all steps.

        Args:
            x: ``(T, B, input_size)``; ``(B, T, input_size)`` with ``batch_first``;
                ``(T, input_size)`` without a batch; or, outside TorchScript, a
                :class:`~torch.nn.utils.rnn.PackedSequence`, for which no padding is computed.
            state: ``C`` ``(num_layers * num_directions, B, num_heads, K, V)``, ``n`` without ``V``
                and ``m`` without ``K`` and ``V``, float32 (float64 in a double module); without
                ``B`` for an ``x`` without a batch. Zeros if omitted.
            lengths: number of steps of each row of a padded batch, integers, ``(B,)``. What stands
                after them is ignored, even NaN: the output there is 0, the final state is that
                after a row's last step, and the second direction begins there. Values outside 0 to
                ``T`` raise for a tensor on the CPU; elsewhere, and under torch.compile, they count
                as 0 and ``T``.

        Returns:
            The last layer's output, as ``x`` with ``num_directions * hidden_size`` channels, and
            the final state, in the form of ``state``.
        """
        states: list[Tensor] | None = None
        if state is not None:
            if not torch.jit.is_scripting():
                check_state_type(self._name, state, 3)
            states = [state[0], state[1], state[2]]
        y, states = self._forward(x, states, lengths)
        return y, (states[0], states[1], states[2])

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: ``C`` ``(num_layers * num_directions, B, num_heads, K, V)``, ``n`` without ``V``,
        ``m`` without ``K`` and ``V``."""
        state = self.zero_state(batch_size)
        return state[0], state[1], state[2]

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step, for streaming; differentiable.

        Args:
            x: ``(B, input_size)``.
            state: as in ``forward``, from ``init_state``, ``forward`` or ``step``.

        Returns:
            The last layer's output ``(B, hidden_size)`` and the new state.

        Raises:
            RuntimeError: the module is bidirectional.
        """
        if not torch.jit.is_scripting():
            check_state_type(f"{self._name}.step", state, 3)
        y, states = self._step(x, [state[0], state[1], state[2]])
        return y, (states[0], states[1], states[2])
