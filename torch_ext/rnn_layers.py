"""Layers of the gated recurrences that torch.nn does not have: sLSTM and IndRNN.

Options are those of :mod:`torch_ext.rnn`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._gated_layer import GatedLayer, check_bound, check_hx_type, check_word
from ._sequence_layer import GateBiasInit, check_state_type, chrono_
from .ind_rnn import ind_rnn, ind_rnn_step
from .init import slstm_bias
from .rnn import Device, OneStateGatedLayer
from .slstm import State, slstm, slstm_step


class SLSTM(GatedLayer):
    r"""Layers of :func:`torch_ext.slstm` with the constructor and contract of torch.nn.LSTM.

    .. math::
        (\tilde i, \tilde f, \tilde z, \tilde o)_t &= W x_t + b + R h_{t-1} \\
        m_t &= \max(\log \sigma(\tilde f_t) + m_{t-1},\; \tilde i_t) \\
        c_t &= e^{\log \sigma(\tilde f_t) + m_{t-1} - m_t} c_{t-1} + e^{\tilde i_t - m_t} \tanh(\tilde z_t) \\
        n_t &= e^{\log \sigma(\tilde f_t) + m_{t-1} - m_t} n_{t-1} + e^{\tilde i_t - m_t} \\
        h_t &= \sigma(\tilde o_t)\, c_t / n_t

    Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517, section 2.2. There are four states.
    One ``b`` is in the place of torch.nn's two.

    Args:
        input_size: channels of the input.
        hidden_size: channels of each state.
        num_layers: layers, each of which reads the output of the one before.
        bias: False leaves out ``b``.
        batch_first: the input and the output are ``(B, T, ...)`` instead of ``(T, B, ...)``; states are
            ``(num_layers * num_directions, B, ...)`` in either case.
        dropout: probability of a zero in the output of each layer but the last, in training.
        bidirectional: a second direction runs from a sequence's last step to its first; its output is
            appended to the first one's.
        num_heads: R is block-diagonal, a block for each head, whose units see each other alone; 1 is dense.
            Divides ``hidden_size``.
        forget_gate: ``"sigmoid"``, or ``"exp"``, where the pre-activation is in the place of :math:`\log
            \sigma(\tilde f_t)`.
        normalizer: ``"sum"``, or ``"at_least_one"``, see :func:`torch_ext.slstm`.
        gate_bias_init: the first value of the forget gate's ``b``. None spreads it from 5 to -7 over the
            units of a head, by :func:`torch_ext.init.power_law_forget_bias_` with a layer as a block (for
            ``"exp"``, the logarithm of its sigmoid). A number is the value for all. A pair ``(shortest,
            longest)`` of numbers of steps, above 1, draws the time that a unit remembers uniformly between
            them (chrono initialisation, Tallec & Ollivier 2018, arXiv:1804.11188).
        layer_norm: ``"none"``, or ``"haste"``, that of the package haste's LayerNormLSTM: the gates are
            :math:`\gamma_x \text{LN}(W x) + \gamma_h \text{LN}(R h)` and the biases, with one mean and
            variance for all gates and units of a head, and eps 1e-5. (No norm of the cell: ``n`` is one.)
        zoneout: probability with which a unit keeps its old ``h`` at a step, in training; otherwise ``h`` is
            that share of the old one (Krueger et al. 2017, arXiv:1606.01305). The other states go on.
        recurrent_dropout: probability of a zero in the mask of ``h`` on its way into R, drawn once a
            sequence, layer and direction, in training (variational dropout, Gal & Ghahramani 2016,
            arXiv:1512.05287).
        input_dropout: the same of each layer's input, one mask for both directions.
        weight_dropout: probability of a zero in ``weight_hh``, drawn once a call, in training (DropConnect,
            Merity et al. 2018, arXiv:1708.02182).
        recurrent_clip: bound, at least 0, on each element of the gradient that comes back through R to the
            state before. What comes of it is not the forward's gradient. None is no bound.
        device: of the parameters.
        dtype: of the parameters. States are float32, and float64 if they are, under autocast too.

    Attributes:
        weight_ih_l{k}[_reverse]: ``(4 * hidden_size, in)``, the rows of i, f, z, o; ``in`` is ``input_size``
            for ``k = 0``, else ``num_directions * hidden_size``.
        weight_hh_l{k}[_reverse]: ``(4 * hidden_size, hidden_size / num_heads)``, R.
        bias_ih_l{k}[_reverse]: ``(4 * hidden_size,)``; 0 at first, but for f.
        input_norm_weight_l{k}[_reverse]: ``(4 * hidden_size,)``, :math:`\gamma_x`, with ``layer_norm``.
        recurrent_norm_weight_l{k}[_reverse]: ``(4 * hidden_size,)``, :math:`\gamma_h`.

    Raises:
        TypeError: a size is no integer, or ``bias`` or ``batch_first`` no bool.
        ValueError: a size is below 1, a probability outside [0, 1], or a word or a pair of options not one of
            the above.

    Example:
        >>> rnn = torch_ext.SLSTM(3, 8, num_layers=2, batch_first=True, num_heads=2)
        >>> x = torch.randn(4, 100, 3)
        >>> y, (h, c, n, m) = rnn(x)
        >>> y.shape, m.shape
        (torch.Size([4, 100, 8]), torch.Size([2, 4, 8]))
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
        forget_gate: str = "sigmoid",
        normalizer: str = "sum",
        gate_bias_init: GateBiasInit = None,
        layer_norm: str = "none",
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        recurrent_clip: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_word("SLSTM", "forget_gate", forget_gate, ["sigmoid", "exp"])
        check_word("SLSTM", "normalizer", normalizer, ["sum", "at_least_one"])
        self._set_options(
            hidden_size,
            bias,
            batch_first,
            dropout,
            num_heads,
            layer_norm,
            zoneout,
            recurrent_dropout,
            input_dropout,
            weight_dropout,
            recurrent_clip,
        )
        self.gate_names = "ifzo"
        self.forget_gate = forget_gate
        self.normalizer = normalizer
        super().__init__(
            4,
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
        self._finish()

    def parameter_shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        shapes = super().parameter_shapes(input_size)
        shapes.pop("bias_hh", None)  # one bias says it all
        return shapes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ``+-1 / sqrt(hidden_size)``, biases 0 but for the forget gate's."""
        super().reset_parameters()
        for at, weights in enumerate(self.all_weights):
            if self.bias:
                layer = at // self.num_directions
                slstm_bias(weights[2], self.num_heads, layer, self.num_layers, self.forget_gate)
                if self.gate_bias_init is not None:
                    self.init_gate_bias(weights[2])

    def init_gate_bias(self, bias: Tensor) -> None:
        f = bias.chunk(4)[1]
        if not isinstance(self.gate_bias_init, tuple | list):
            f.fill_(self.gate_bias_init)
        elif self.forget_gate == "sigmoid":
            chrono_(f, *self.gate_bias_init)
        else:  # the pre-activation is the logarithm of the share that is kept
            f.copy_(F.logsigmoid(chrono_(f, *self.gate_bias_init)))

    def state_sizes(self) -> list[list[tuple[str, int]]]:
        size = ("hidden_size", self.hidden_size)
        return [[size], [size], [size], [size]]

    def gated(
        self,
        gates: Tensor,
        weights: list[Tensor],
        state: list[Tensor],
        cu_seqlens: Tensor | None,
        reverse: bool,
        reset: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        h0 = self._by_head(state[0])
        y, (h, c, n, m) = slstm(
            self._by_gate(gates),
            self._recurrent_weight(weights),
            None,
            (h0, self._by_head(state[1]), self._by_head(state[2]), self._by_head(state[3])),
            self.forget_gate,
            self.normalizer,
            cu_seqlens,
            reverse,
            reset,
            self._recurrent_mask(h0),
            self._update(self.zoneout, gates, [h0.shape[1], h0.shape[2]]),
            self._per_gate(weights, "recurrent_norm_weight"),
            self.norm_eps,
            self.recurrent_clip,
        )
        return y.flatten(-2), [s.flatten(-2) for s in [h, c, n, m]]

    def recurrence_step(
        self, gates: Tensor, weights: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        h0 = self._by_head(state[0])
        y, (h, c, n, m) = slstm_step(
            self._by_gate(gates),
            self._recurrent_weight(weights),
            None,
            (h0, self._by_head(state[1]), self._by_head(state[2]), self._by_head(state[3])),
            None,
            self.forget_gate,
            self.normalizer,
            None,
            self._update(self.zoneout, gates, [h0.shape[1], h0.shape[2]]),
            self._per_gate(weights, "recurrent_norm_weight"),
            self.norm_eps,
        )
        return y.flatten(-2), [s.flatten(-2) for s in [h, c, n, m]]

    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Runs all steps.

        Args:
            input: ``(T, B, input_size)``; ``(B, T, input_size)`` with ``batch_first``; ``(T, input_size)``
                without a batch; or, outside TorchScript, a :class:`~torch.nn.utils.rnn.PackedSequence`, for
                which no padding is computed.
            hx: ``h``, ``c``, ``n`` and ``m``, ``(num_layers * num_directions, B, hidden_size)`` each, without
                ``B`` for an input without a batch. The dtype of ``input``, or float32 beside half precision.
                Zeros if omitted.
            lengths: number of steps of each row of a padded batch, integers, ``(B,)``. What stands after them
                is ignored, even NaN: the output there is 0, the final state is that after a row's last step,
                and the second direction begins there. Values outside 0 to ``T`` raise for a tensor on the
                CPU; elsewhere, and under torch.compile, they count as 0 and ``T``.
            reset: steps before which the state is replaced by zeros, bool, ``(T, B)``, or ``(B, T)`` with
                ``batch_first``; ``(T,)`` without a batch; ``(num_steps,)``, in the order of its data, for a
                PackedSequence. (For the second direction, before is after in time.)

        Returns:
            The last layer's output, as ``input`` with ``num_directions * hidden_size`` channels, and the
            final state, in the form and the dtype of ``hx``; without ``hx`` in float32 or float64.

        Raises:
            ValueError: ``input`` has another number of dimensions or, outside autocast, another dtype than
                the parameters; ``lengths`` or ``reset`` is not as above.
            RuntimeError: another size of ``input``, or another shape or dtype of ``hx``.
            TypeError: ``hx`` is not made of tensors, or another dtype of ``lengths`` or ``reset``.
        """
        states: list[Tensor] | None = None
        if hx is not None:
            if not torch.jit.is_scripting():
                check_hx_type(self._name, hx, 4)
            states = [hx[0], hx[1], hx[2], hx[3]]
        y, final = self._forward_gated(input, states, lengths, reset)
        return y, (final[0], final[1], final[2], final[3])

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros ``h``, ``c``, ``n`` and ``m``, ``(num_layers * num_directions, B, hidden_size)`` each."""
        state = self.zero_state(batch_size)
        return state[0], state[1], state[2], state[3]

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step, for streaming; differentiable.

        Args:
            x: ``(B, input_size)``.
            state: from ``init_state``, ``forward`` or ``step``.

        Returns:
            The last layer's output ``(B, hidden_size)`` and the new state.

        Raises:
            RuntimeError: the module is bidirectional, or in training with masks that are drawn once a
                sequence.
        """
        if not torch.jit.is_scripting():
            check_state_type(f"{self._name}.step", state, 4)
        y, final = self._step(x, [state[0], state[1], state[2], state[3]])
        return y, (final[0], final[1], final[2], final[3])


class IndRNN(OneStateGatedLayer):
    r"""Layers of :func:`torch_ext.ind_rnn` with the constructor and contract of torch.nn.RNN.

    .. math::
        h_t = \text{relu}(W x_t + b + u \odot h_{t-1})

    Li et al. 2018, "Independently Recurrent Neural Network (IndRNN): Building A Longer and Deeper RNN",
    arXiv:1803.04831. Units see each other in the layers between, not over time: use two or more. One ``b`` is in
    the place of torch.nn's two.

    Args:
        input_size: channels of the input.
        hidden_size: channels of ``h``.
        num_layers: layers, each of which reads the output of the one before.
        nonlinearity: ``"relu"``, or ``"tanh"``. (torch.nn.RNN's default is tanh.)
        bias: False leaves out ``b``.
        batch_first: the input and the output are ``(B, T, ...)`` instead of ``(T, B, ...)``; states are
            ``(num_layers * num_directions, B, ...)`` in either case.
        dropout: probability of a zero in the output of each layer but the last, in training.
        bidirectional: a second direction runs from a sequence's last step to its first; its output is
            appended to the first one's.
        recurrent_max: greatest size of an element of ``u``: the forward clamps to it what has grown beyond,
            whose gradient is 0 there. The paper's for sequences of ``T`` steps is ``2 ** (1 / T)``, beyond
            which relu's states and gradients explode. None is no bound.
        zoneout: probability with which a unit keeps its old ``h`` at a step, in training; otherwise ``h`` is
            that share of the old one (Krueger et al. 2017, arXiv:1606.01305).
        recurrent_dropout: probability of a zero in the mask of ``h`` on its way into the product with ``u``,
            drawn once a sequence, layer and direction, in training (variational dropout, Gal & Ghahramani
            2016, arXiv:1512.05287).
        input_dropout: the same of each layer's input, one mask for both directions.
        recurrent_clip: bound, at least 0, on each element of the gradient that comes back through ``u`` to
            the state before. What comes of it is not the forward's gradient. None is no bound.
        device: of the parameters.
        dtype: of the parameters. The state is float32, and float64 if they are, under autocast too.

    Attributes:
        weight_ih_l{k}[_reverse]: ``(hidden_size, in)``; ``in`` is ``input_size`` for ``k = 0``, else
            ``num_directions * hidden_size``.
        weight_hh_l{k}[_reverse]: ``u``, ``(hidden_size,)``, at first uniform in 0 to 1, or to
            ``recurrent_max`` if it is less; see :func:`torch_ext.init.uniform_ind_rnn_`.
        bias_ih_l{k}[_reverse]: ``(hidden_size,)``.

    Raises:
        TypeError: a size is no integer, or ``bias`` or ``batch_first`` no bool.
        ValueError: a size is below 1, a probability outside [0, 1], or a word or a pair of options not one of
            the above.

    Example:
        >>> rnn = torch_ext.IndRNN(3, 8, num_layers=2, batch_first=True, recurrent_max=2 ** (1 / 100))
        >>> y, h = rnn(torch.randn(4, 100, 3))
        >>> y.shape, h.shape
        (torch.Size([4, 100, 8]), torch.Size([2, 4, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        recurrent_max: float | None = None,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0,
        recurrent_clip: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_word("IndRNN", "nonlinearity", nonlinearity, ["tanh", "relu"])
        check_bound("IndRNN", "recurrent_max", recurrent_max)
        self._set_options(
            hidden_size,
            bias,
            batch_first,
            dropout,
            1,
            "none",
            zoneout,
            recurrent_dropout,
            input_dropout,
            0.0,
            recurrent_clip,
        )
        self.gate_names = "h"
        self.nonlinearity = nonlinearity
        self.recurrent_max = None if recurrent_max is None else float(recurrent_max)
        super().__init__(
            1,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            None,
            device,
            dtype,
        )
        self._finish()

    def parameter_shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (self.hidden_size, input_size),
            "weight_hh": (self.hidden_size,),
        }
        if self.bias:
            shapes["bias_ih"] = (self.hidden_size,)
        return shapes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ``+-1 / sqrt(hidden_size)``; recurrent weights in 0 to 1, or to ``recurrent_max`` if it
        is less."""
        super().reset_parameters()
        most = 1.0 if self.recurrent_max is None else min(1.0, self.recurrent_max)
        for weights in self.all_weights:
            weights[1].uniform_(0.0, most)

    def _recurrent_weight(self, weights: list[Tensor]) -> Tensor:
        u = weights[self._at["weight_hh"]]
        most = self.recurrent_max
        return u if most is None else u.clamp(-most, most)

    def gated(
        self,
        gates: Tensor,
        weights: list[Tensor],
        state: list[Tensor],
        cu_seqlens: Tensor | None,
        reverse: bool,
        reset: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        y, h = ind_rnn(
            gates,
            self._recurrent_weight(weights),
            None,
            state[0],
            self.nonlinearity,
            cu_seqlens,
            reverse,
            reset,
            self._recurrent_mask(state[0]),
            self._update(self.zoneout, gates, [self.hidden_size]),
            self.recurrent_clip,
        )
        return y, [h]

    def recurrence_step(
        self, gates: Tensor, weights: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        y, h = ind_rnn_step(
            gates,
            self._recurrent_weight(weights),
            None,
            state[0],
            None,
            self.nonlinearity,
            None,
            self._update(self.zoneout, gates, [self.hidden_size]),
        )
        return y, [h]
