r"""minLSTM: an LSTM whose gates see the input alone, so that its recurrence is linear in the state.

.. math::
    f_t &= \sigma(\text{forget\_gate}_t), \quad i_t = \sigma(\text{input\_gate}_t) \\
    f'_t &= \frac{f_t}{f_t + i_t}, \quad i'_t = \frac{i_t}{f_t + i_t} \\
    h_t &= f'_t \odot h_{t-1} + i'_t \odot \text{act}(\text{candidate}_t)

Feng, Tung, Ahmed, Bengio, Hajimirsadeghi 2024, "Were RNNs All We Needed?", arXiv:2410.01201v3:
section 3.2 and appendix A with ``activation="identity"``; appendix B, whose states are positive,
with ``activation="g"`` (see :mod:`torch_ext.min_gru`). ``normalize=False`` leaves out the second
line, as the authors' code can.
"""

import torch
from torch import Tensor

from ._sequence_layer import GateBiasInit, OneStateLayer, chrono_
from .linear_scan import run_reference
from .min_gru import candidate_activation, check_activation


def min_lstm(
    forget_gate: Tensor,
    input_gate: Tensor,
    candidate: Tensor,
    initial_state: Tensor | None = None,
    activation: str = "identity",
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Minimal long short-term memory: gates, candidate and recurrence in one pass.

    .. math::
        f_t &= \sigma(\text{forget\_gate}_t), \quad i_t = \sigma(\text{input\_gate}_t) \\
        f'_t &= \frac{f_t}{f_t + i_t}, \quad i'_t = \frac{i_t}{f_t + i_t} \\
        h_t &= f'_t \odot h_{t-1} + i'_t \odot \text{act}(\text{candidate}_t)

    Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201v3, section 3.2 (``"identity"``),
    appendix B (``"g"``).

    Args:
        forget_gate: pre-activation of the forget gate, ``(B, T, D)``. float64, float32, bfloat16 or
            float16.
        input_gate: pre-activation of the input gate, ``(B, T, D)``, the dtype of ``forget_gate``.
        candidate: pre-activation of the candidate state, ``(B, T, D)``, the dtype of
            ``forget_gate``.
        initial_state: ``h`` before the first step, ``(B, D)``, float32 (float64 for float64
            inputs). Zeros if omitted. It is the state itself: no activation is applied to it,
            whatever ``activation`` says.
        activation: of the candidate: ``"identity"``, or ``"g"``: ``x + 0.5`` for ``x >= 0``,
            ``sigmoid(x)`` below.
        normalize: divide both gates by their sum, so that they add to 1. False uses ``f`` and ``i``
            as they are.
        cu_seqlens: where several sequences stand end to end in the one row (``B`` is 1): sequence
            ``s`` is the steps ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. int32 or int64,
            ``(num_sequences + 1,)``, from 0 to ``T``, never descending. States then have
            ``num_sequences`` rows.
        reverse: run from the last step to the first (of each sequence). The initial state enters
            after the last step and the final state is ``h[0]``.

    Returns:
        ``h`` of all steps, ``(B, T, D)``, the dtype of ``forget_gate``, and the final state, ``(B,
        D)``, float32 or float64. With no step at all the final state is the initial state.

    Raises:
        ValueError: a shape differs from the above, ``cu_seqlens`` does not ascend from 0 to ``T``,
            or ``activation`` is another word.
        TypeError: a dtype differs from the above.
        RuntimeError: the tensors are on different devices.

    Notes:
        Accumulates in float32 for half precision. Bitwise the same on every run and for every
        number of threads. The backward saves the three inputs, ``h`` and the initial state, and
        recomputes the rest. Differentiable any number of times, through the final state as well.

    Example:
        >>> zeros, candidate = torch.zeros(1, 3, 1), torch.full((1, 3, 1), 8.0)
        >>> h, final_state = torch_ext.min_lstm(zeros, zeros, candidate)
        >>> h.flatten()
        tensor([4., 6., 7.])
        >>> h, final_state = torch_ext.min_lstm(zeros, zeros, candidate, activation="g")
        >>> final_state
        tensor([[7.4375]])
    """
    return torch.ops.torch_ext.min_lstm(
        forget_gate,
        input_gate,
        candidate,
        initial_state,
        cu_seqlens,
        activation,
        normalize,
        reverse,
    )


def min_lstm_step(
    forget_gate: Tensor,
    input_gate: Tensor,
    candidate: Tensor,
    state: Tensor,
    state_indices: Tensor | None = None,
    activation: str = "identity",
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""One step of :func:`min_lstm`.

    Args:
        forget_gate: ``(B, D)``.
        input_gate: ``(B, D)``, the dtype of ``forget_gate``.
        candidate: ``(B, D)``, the dtype of ``forget_gate``.
        state: ``(B, D)``, float32 or float64; with ``state_indices`` a pool of states,
            ``(num_slots, D)``.
        state_indices: row of the pool for each row of ``forget_gate``, int32 or int64, ``(B,)``.
            Rows with a negative index are skipped: their ``h`` is 0 and no state changes.
        activation: as in :func:`min_lstm`.
        normalize: as in :func:`min_lstm`.

    Returns:
        ``h``, ``(B, D)``, the dtype of ``forget_gate``, and the new state; with ``state_indices``
        the whole new pool.

    Raises:
        ValueError: a shape differs from the above, an index is not below ``num_slots``,
            or ``activation`` is another word.
        TypeError: a dtype differs from the above.

    Notes:
        Differentiable, also with ``state_indices``.

    Example:
        >>> zeros, state = torch.zeros(1, 1), torch.full((1, 1), 4.0)
        >>> h, state = torch_ext.min_lstm_step(zeros, zeros, zeros + 8.0, state)
        >>> state
        tensor([[6.]])
    """
    return torch.ops.torch_ext.min_lstm_step(
        forget_gate, input_gate, candidate, state, state_indices, activation, normalize
    )


def min_lstm_step_(
    forget_gate: Tensor,
    input_gate: Tensor,
    candidate: Tensor,
    state: Tensor,
    state_indices: Tensor | None = None,
    activation: str = "identity",
    normalize: bool = True,
) -> Tensor:
    r"""One step of :func:`min_lstm` that overwrites ``state``.

    Otherwise as :func:`min_lstm_step`; not differentiable, so where an input requires
    grad it raises a RuntimeError outside ``torch.no_grad()``.

    Returns:
        ``h``, ``(B, D)``.

    Example:
        >>> zeros, state = torch.zeros(1, 1), torch.full((1, 1), 4.0)
        >>> h = torch_ext.min_lstm_step_(zeros, zeros, zeros + 8.0, state, normalize=False)
        >>> state
        tensor([[6.]])
    """
    return torch.ops.torch_ext.min_lstm_step_(
        forget_gate, input_gate, candidate, state, state_indices, activation, normalize
    )


def min_lstm_reference(
    forget_gate: Tensor,
    input_gate: Tensor,
    candidate: Tensor,
    initial_state: Tensor | None = None,
    activation: str = "identity",
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """What :func:`min_lstm` computes, as a plain PyTorch loop over time.

    Slow and obvious, differentiable, for any dtype.

    Example:
        >>> zeros = torch.zeros(1, 2, 1)
        >>> min_lstm_reference(zeros, zeros, torch.full((1, 2, 1), 8.0))[1]
        tensor([[6.]])
    """

    def step(h: Tensor, forget_gate: Tensor, input_gate: Tensor, candidate: Tensor) -> Tensor:
        if normalize:
            f, i = normalized_gates(forget_gate, input_gate)
        else:
            f, i = torch.sigmoid(forget_gate), torch.sigmoid(input_gate)
        return f * h + i * candidate_activation(candidate, activation)

    inputs = [forget_gate, input_gate, candidate]
    return run_reference(step, inputs, initial_state, cu_seqlens, reverse)


def normalized_gates(forget_gate: Tensor, input_gate: Tensor) -> tuple[Tensor, Tensor]:
    """``f / (f + i)`` and ``i / (f + i)`` with ``f``, ``i`` the sigmoids of the gates.

    Computed as ``sigmoid(-d)`` and ``sigmoid(d)`` with ``d = log i - log f``, the paper's appendix
    B.3, which holds where both sigmoids are 0 in floating point as well.
    """
    d = torch.nn.functional.logsigmoid(input_gate) - torch.nn.functional.logsigmoid(forget_gate)
    return torch.sigmoid(-d), torch.sigmoid(d)


class MinLSTM(OneStateLayer):
    r"""Layers of :func:`torch_ext.min_lstm` with the constructor and contract of torch.nn.GRU.

    .. math::
        f_t &= \sigma(W_f x_t + b_f), \quad i_t = \sigma(W_i x_t + b_i) \\
        f'_t &= \frac{f_t}{f_t + i_t}, \quad i'_t = \frac{i_t}{f_t + i_t} \\
        h_t &= f'_t \odot h_{t-1} + i'_t \odot \text{act}(W_h x_t + b_h)

    Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201v3, section 3.2. There is one
    state, not the LSTM's two. The gates see ``x`` alone, so one layer cannot count or copy: use
    two or more (the paper's Table 1).

    Args:
        input_size: channels of ``x``.
        hidden_size: channels of the state and of each direction's output.
        num_layers: layers, each of which reads the output of the one before.
        bias: False leaves out ``b_f``, ``b_i`` and ``b_h``.
        batch_first: ``x`` and the output are ``(B, T, ...)`` instead of ``(T, B, ...)``; the state
            is ``(num_layers * num_directions, B, hidden_size)`` in either case.
        dropout: probability of a zero in the output of each layer but the last, in training.
        bidirectional: a second direction runs from a sequence's last step to its first; its output
            is appended to the first one's.
        activation: ``"identity"``, or ``"g"`` for the paper's positive candidates (appendix B).
        normalize: False uses ``f`` and ``i`` in place of ``f'`` and ``i'``.
        gate_bias_init: None leaves the uniform initialisation, under which a unit keeps about half
            of its state at each step. A number is the value of ``b_f``, and ``b_i`` becomes its
            negative, so that ``f + i = 1`` where ``x = 0``; positive is long memory. (``b_f`` alone
            would not do: normalised against ``i = 0.5``, the share kept stays below 2/3.) A pair
            ``(shortest, longest)`` of numbers of steps, above 1, draws the time ``tau`` that a unit
            remembers uniformly between them: ``b_f = log(tau - 1)``, ``b_i = -b_f`` (chrono
            initialisation, Tallec & Ollivier 2018, arXiv:1804.11188).
        device: of the parameters.
        dtype: of the parameters. The state is float32, and float64 if they are, under autocast too.

    Attributes:
        weight_ih_l{k}[_reverse]: ``(3 * hidden_size, in)``, the rows of ``W_f``, ``W_i``, ``W_h``;
            ``in`` is ``input_size`` for ``k = 0``, else ``num_directions * hidden_size``.
        bias_ih_l{k}[_reverse]: ``(3 * hidden_size,)``, ``b_f``, ``b_i``, ``b_h``.

    Example:
        >>> rnn = torch_ext.MinLSTM(3, 8, num_layers=2, batch_first=True, bidirectional=True)
        >>> y, state = rnn(torch.randn(4, 100, 3), lengths=torch.tensor([100, 0, 7, 50]))
        >>> y.shape, state.shape
        (torch.Size([4, 100, 16]), torch.Size([4, 4, 8]))
        >>> y[2, 7:].abs().max()
        tensor(0., grad_fn=<MaxBackward1>)
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
        activation: str = "identity",
        normalize: bool = True,
        gate_bias_init: GateBiasInit = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation("MinLSTM", activation)
        super().__init__(
            3,
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
        self.activation = activation
        self.normalize = normalize

    def init_gate_bias(self, bias: Tensor) -> None:
        forget_gate, input_gate, _ = bias.chunk(3)
        if isinstance(self.gate_bias_init, tuple | list):
            chrono_(forget_gate, *self.gate_bias_init)
        else:
            forget_gate.fill_(self.gate_bias_init)
        input_gate.copy_(-forget_gate)

    def recurrence(
        self,
        gates: Tensor,
        weights: list[Tensor],
        state: list[Tensor],
        valid: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        forget_gate, input_gate, candidate = gates.chunk(3, -1)
        if valid is not None:  # f = 1 and i = 0 keep the state
            forget_gate = torch.where(valid, forget_gate, 1e4)
            input_gate = torch.where(valid, input_gate, -1e4)
            candidate = torch.where(valid, candidate, 0.0)
        h, final_state = min_lstm(
            forget_gate,
            input_gate,
            candidate,
            state[0],
            self.activation,
            self.normalize,
            cu_seqlens,
            reverse,
        )
        return h, [final_state]

    def recurrence_step(
        self, gates: Tensor, weights: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        forget_gate, input_gate, candidate = gates.chunk(3, -1)
        h, new_state = min_lstm_step(
            forget_gate, input_gate, candidate, state[0], None, self.activation, self.normalize
        )
        return h, [new_state]
