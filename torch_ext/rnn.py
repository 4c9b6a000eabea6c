r"""Layers of the gated recurrences: LSTM, GRU and RNN with torch.nn's arguments, parameters and results and with
options that torch.nn does not have; sLSTM; IndRNN.

Their options, where ``a = R h`` is the recurrent product, ``p`` a probability:

``num_heads``: R is block-diagonal, a block for each head, whose units see each other alone.

``layer_norm="haste"``: the gates are :math:`\text{LN}(W x)\, \gamma_x + \text{LN}(R h)\, \gamma_h + b` with
one mean and variance for all gates and units of a head, as in haste's LayerNormLSTM and LayerNormGRU;
the LSTM's cell has a third norm on its way into ``h``, over the units of a head.

``zoneout``: units keep their old ``h`` with probability ``p`` at each step (Krueger et al. 2017,
arXiv:1606.01305); in evaluation :math:`h = p\, h_{t-1} + (1 - p)\, \hat h_t`. ``zoneout_c``: the same for ``c``.

``recurrent_dropout``, ``input_dropout``: one mask of ``h`` on its way into ``R``, one of a layer's input, each drawn
once a sequence (variational dropout, Gal & Ghahramani 2016, arXiv:1512.05287).

``weight_dropout``: one mask of ``weight_hh``, drawn once a call (DropConnect; Merity et al. 2018,
arXiv:1708.02182).

``recurrent_clip``: bound on each element of the gradient that comes back through ``R``.
"""

import torch
from torch import _VF, Tensor

from ._gated_layer import GatedLayer, check_hx_type, check_word
from ._sequence_layer import check_state_type
from .elman import elman, elman_step
from .gru import gru, gru_step
from .lstm import lstm, lstm_step

Device = torch.device | str | None


class LSTM(GatedLayer):
    r"""LSTM with torch.nn.LSTM's arguments, parameters and results, and with options of its own.

    .. math::
        (i, f, g, o)_t &= W x_t + b_{ih} + R h_{t-1} + b_{hh} \\
        c_t &= \sigma(f_t)\, c_{t-1} + \sigma(i_t) \tanh(g_t) \\
        h_t &= \sigma(o_t) \tanh(c_t)

    Hochreiter & Schmidhuber 1997, "Long Short-Term Memory"; Gers, Schmidhuber & Cummins 2000, "Learning to
    Forget".

    Args:
        input_size: channels of the input.
        hidden_size: channels of ``c``, and of ``h`` but with ``proj_size``.
        num_layers: layers, each of which reads the output of the one before.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        batch_first: the input and the output are ``(B, T, ...)`` instead of ``(T, B, ...)``; states are
            ``(num_layers * num_directions, B, ...)`` in either case.
        dropout: probability of a zero in the output of each layer but the last, in training.
        bidirectional: a second direction runs from a sequence's last step to its first; its output is
            appended to the first one's.
        proj_size: channels of ``h``, a projection of :math:`\sigma(o_t) \tanh(c_t)` (Sak et al. 2014,
            arXiv:1402.1128). 0 is none.
        device: of the parameters.
        dtype: of the parameters.
        num_heads: R is block-diagonal, a block for each head, whose units see each other alone; 1 is
            torch.nn's dense one. Divides ``hidden_size`` and ``proj_size``.
        coupled: no gate ``i``: :math:`1 - \sigma(f_t)` is in the place of :math:`\sigma(i_t)` (Greff et al.
            2017, arXiv:1503.04069). Parameters then have 3 in the place of 4.
        peephole: :math:`c_{t-1}` adds to ``i`` and ``f``, and :math:`c_t` to ``o``, unit by unit (Gers &
            Schmidhuber 2000, "Recurrent Nets that Time and Count").
        layer_norm: ``"none"``, or ``"haste"``, that of the package haste's LayerNormLSTM: the gates are
            :math:`\gamma_x \text{LN}(W x) + \gamma_h \text{LN}(R h)` and the biases, with one mean and
            variance for all gates and units of a head, and eps 1e-5. ``h`` is made of :math:`\text{LN}(c_t)`
            of each head, with weight and bias; ``c`` itself is kept as it is.
        zoneout: probability with which a unit keeps its old ``h`` at a step, in training; otherwise ``h`` is
            that share of the old one (Krueger et al. 2017, arXiv:1606.01305).
        zoneout_c: the same of ``c``. A step's ``h`` is made of its new ``c`` in either case.
        recurrent_dropout: probability of a zero in the mask of ``h`` on its way into R, drawn once a
            sequence, layer and direction, in training (variational dropout, Gal & Ghahramani 2016,
            arXiv:1512.05287).
        input_dropout: the same of each layer's input, one mask for both directions.
        weight_dropout: probability of a zero in ``weight_hh``, drawn once a call, in training (DropConnect,
            Merity et al. 2018, arXiv:1708.02182).
        recurrent_clip: bound, at least 0, on each element of the gradient that comes back through R to the
            state before. What comes of it is not the forward's gradient. None is no bound.

    Attributes:
        weight_ih_l{k}[_reverse]: ``(4 * hidden_size, in)``, the rows of i, f, g, o (f, g, o with
            ``coupled``); ``in`` is ``input_size`` for ``k = 0``, else ``num_directions * h_size``, and
            ``h_size`` is ``proj_size`` or ``hidden_size``.
        weight_hh_l{k}[_reverse]: ``(4 * hidden_size, h_size / num_heads)``, R.
        bias_ih_l{k}[_reverse]: ``(4 * hidden_size,)``.
        bias_hh_l{k}[_reverse]: ``(4 * hidden_size,)``.
        weight_hr_l{k}[_reverse]: ``(proj_size, hidden_size / num_heads)``, with ``proj_size``.
        peephole_l{k}[_reverse]: ``(3, hidden_size)``, of i, f, o (2: f, o, with ``coupled``), with
            ``peephole``.
        input_norm_weight_l{k}[_reverse]: ``(4 * hidden_size,)``, :math:`\gamma_x`, with ``layer_norm``.
        recurrent_norm_weight_l{k}[_reverse]: ``(4 * hidden_size,)``, :math:`\gamma_h`.
        cell_norm_weight_l{k}[_reverse]: ``(hidden_size,)``.
        cell_norm_bias_l{k}[_reverse]: ``(hidden_size,)``.

    Raises:
        TypeError: a size is no integer, or ``bias`` or ``batch_first`` no bool.
        ValueError: a size is below 1, a probability outside [0, 1], or a word or a pair of options not one of
            the above.

    Notes:
        Without any of the options behind ``dtype`` it is torch.nn.LSTM: the same parameters in the same
        order, the same values from the same seed, the same results. On CUDA it calls cuDNN then (in training,
        or without gradients), whose backward is not differentiable; under
        ``torch.backends.cudnn.flags(enabled=False)``, with any option, and on the CPU the operator
        :func:`torch_ext.lstm` runs, which is differentiable any number of times, in float16 and bfloat16 too
        with sums and states in float32. ``step`` and ``init_state`` stream. ``weight_hh`` alone may be
        bfloat16 beside float32 (``rnn.weight_hh_l0.data = rnn.weight_hh_l0.data.bfloat16()``), which halves
        its storage. Initialisers: :mod:`torch_ext.init`.

    Example:
        >>> rnn = torch_ext.LSTM(3, 8, num_layers=2, batch_first=True, zoneout=0.1, layer_norm="haste")
        >>> x = torch.randn(4, 100, 3)
        >>> y, (h, c) = rnn.eval()(x)
        >>> y.shape, h.shape, c.shape
        (torch.Size([4, 100, 8]), torch.Size([2, 4, 8]), torch.Size([2, 4, 8]))
        >>> state = rnn.init_state(batch_size=4)
        >>> for t in range(100):
        ...     y_t, state = rnn.step(x[:, t], state)
        >>> torch.allclose(y_t, y[:, -1], atol=1e-5)
        True
        >>> plain = torch.nn.LSTM(3, 8)
        >>> ours = torch_ext.LSTM(3, 8)
        >>> ours.load_state_dict(plain.state_dict())
        <All keys matched successfully>
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
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        coupled: bool = False,
        peephole: bool = False,
        layer_norm: str = "none",
        zoneout: float = 0.0,
        zoneout_c: float = 0.0,
        recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        recurrent_clip: float | None = None,
    ) -> None:
        sizes = isinstance(proj_size, int) and isinstance(hidden_size, int)
        if sizes and not 0 <= proj_size < max(hidden_size, 1):
            raise ValueError(
                f"LSTM: proj_size is {proj_size}, expected 0, or 1 to hidden_size - 1="
                f"{hidden_size - 1}"
            )
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
            proj_size,
            zoneout_c,
        )
        self.gate_names = "fgo" if coupled else "ifgo"
        self.coupled = bool(coupled)
        self.peephole = bool(peephole)
        super().__init__(
            3 if coupled else 4,
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
        options = coupled or peephole or num_heads > 1 or layer_norm != "none"
        options = options or max(zoneout, zoneout_c, recurrent_dropout) > 0
        options = options or max(input_dropout, weight_dropout) > 0 or recurrent_clip is not None
        self._plain, self._like_torch = not options, True

    def parameter_shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        shapes = super().parameter_shapes(input_size)
        norms = {kind: shapes.pop(kind) for kind in self._norm_shapes()}
        if self.proj_size > 0:
            shapes["weight_hr"] = (self.proj_size, self._units)
        if self.peephole:
            shapes["peephole"] = (self.num_gates - 1, self.hidden_size)
        if norms:
            norms |= {
                "cell_norm_weight": (self.hidden_size,),
                "cell_norm_bias": (self.hidden_size,),
            }
        return shapes | norms

    def state_sizes(self) -> list[list[tuple[str, int]]]:
        h = ("hidden_size", self.hidden_size)
        if self.proj_size > 0:
            h = ("proj_size", self.proj_size)
        return [[h], [("hidden_size", self.hidden_size)]]

    def _units_of(self, weights: list[Tensor], kind: str) -> Tensor | None:
        found = self._optional(weights, kind)
        if found is None:
            return None
        return self._by_head(found)

    def _projection(self, weights: list[Tensor]) -> Tensor | None:
        found = self._optional(weights, "weight_hr")
        if found is None:
            return None
        return found.unflatten(0, [self.num_heads, self.proj_size // self.num_heads])

    def gated(
        self,
        gates: Tensor,
        weights: list[Tensor],
        state: list[Tensor],
        cu_seqlens: Tensor | None,
        reverse: bool,
        reset: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        h0, c0 = self._by_head(state[0]), self._by_head(state[1])
        y, (h, c) = lstm(
            self._by_gate(gates),
            self._recurrent_weight(weights),
            self._per_gate(weights, "bias_hh"),
            (h0, c0),
            self.coupled,
            self._units_of(weights, "peephole"),
            self._projection(weights),
            cu_seqlens,
            reverse,
            reset,
            self._recurrent_mask(h0),
            self._update(self.zoneout, gates, [h0.shape[1], h0.shape[2]]),
            self._update(self.zoneout_c, gates, [c0.shape[1], c0.shape[2]]),
            self._per_gate(weights, "recurrent_norm_weight"),
            self._units_of(weights, "cell_norm_weight"),
            self._units_of(weights, "cell_norm_bias"),
            self.norm_eps,
            self.recurrent_clip,
        )
        return y.flatten(-2), [h.flatten(-2), c.flatten(-2)]

    def recurrence_step(
        self, gates: Tensor, weights: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        h0, c0 = self._by_head(state[0]), self._by_head(state[1])
        y, (h, c) = lstm_step(
            self._by_gate(gates),
            self._recurrent_weight(weights),
            self._per_gate(weights, "bias_hh"),
            (h0, c0),
            None,
            self.coupled,
            self._units_of(weights, "peephole"),
            self._projection(weights),
            None,
            self._update(self.zoneout, gates, [h0.shape[1], h0.shape[2]]),
            self._update(self.zoneout_c, gates, [c0.shape[1], c0.shape[2]]),
            self._per_gate(weights, "recurrent_norm_weight"),
            self._units_of(weights, "cell_norm_weight"),
            self._units_of(weights, "cell_norm_bias"),
            self.norm_eps,
        )
        return y.flatten(-2), [h.flatten(-2), c.flatten(-2)]

    def native(
        self, x: Tensor, batch_sizes: Tensor | None, state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        weights = self._weights()
        if batch_sizes is None:
            y, h, c = _VF.lstm(
                x,
                state,
                weights,
                self.bias,
                self.num_layers,
                self.dropout,
                self.training,
                self.bidirectional,
                self.batch_first,
            )
        else:
            y, h, c = _VF.lstm(
                x,
                batch_sizes,
                state,
                weights,
                self.bias,
                self.num_layers,
                self.dropout,
                self.training,
                self.bidirectional,
            )
        return y, [h, c]

    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Runs all steps.

        Args:
            input: ``(T, B, input_size)``; ``(B, T, input_size)`` with ``batch_first``; ``(T, input_size)``
                without a batch; or, outside TorchScript, a :class:`~torch.nn.utils.rnn.PackedSequence`, for
                which no padding is computed.
            hx: ``h`` ``(num_layers * num_directions, B, proj_size or hidden_size)`` and ``c`` ``(...,
                hidden_size)``, without ``B`` for an input without a batch. The dtype of ``input``, or float32
                beside half precision. Zeros if omitted.
            lengths: number of steps of each row of a padded batch, integers, ``(B,)``. What stands after them
                is ignored, even NaN: the output there is 0, the final state is that after a row's last step,
                and the second direction begins there. Values outside 0 to ``T`` raise for a tensor on the
                CPU; elsewhere, and under torch.compile, they count as 0 and ``T``.
            reset: steps before which the state is replaced by zeros, bool, ``(T, B)``, or ``(B, T)`` with
                ``batch_first``; ``(T,)`` without a batch; ``(num_steps,)``, in the order of its data, for a
                PackedSequence. (For the second direction, before is after in time.)

        Returns:
            The last layer's output, as ``input`` with ``num_directions * (proj_size or hidden_size)``
            channels, and the final state, in the form and the dtype of ``hx``; without ``hx`` in the output's
            dtype.

        Raises:
            ValueError: ``input`` has another number of dimensions or, outside autocast, another dtype than
                the parameters; ``lengths`` or ``reset`` is not as above.
            RuntimeError: another size of ``input``, or another shape or dtype of ``hx``.
            TypeError: ``hx`` is not made of tensors, or another dtype of ``lengths`` or ``reset``.
        """
        states: list[Tensor] | None = None
        if hx is not None:
            if not torch.jit.is_scripting():
                check_hx_type(self._name, hx, 2)
            states = [hx[0], hx[1]]
        y, final = self._forward_gated(input, states, lengths, reset)
        return y, (final[0], final[1])

    @torch.jit.export
    def init_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Zeros ``h`` ``(num_layers * num_directions, B, proj_size or hidden_size)`` and ``c`` ``(..., hidden_size)``,
        float32, or float64 in a double module."""
        state = self.zero_state(batch_size)
        return state[0], state[1]

    @torch.jit.export
    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One step, for streaming; differentiable.

        Args:
            x: ``(B, input_size)``.
            state: from ``init_state``, ``forward`` or ``step``.

        Returns:
            The last layer's output ``(B, proj_size or hidden_size)`` and the new state.

        Raises:
            RuntimeError: the module is bidirectional, or in training with masks that are drawn once a
                sequence.
        """
        if not torch.jit.is_scripting():
            check_state_type(f"{self._name}.step", state, 2)
        y, final = self._step(x, [state[0], state[1]])
        return y, (final[0], final[1])


class OneStateGatedLayer(GatedLayer):
    """A :class:`GatedLayer` whose state is ``h`` alone."""

    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs all steps.

        Args:
            input: ``(T, B, input_size)``; ``(B, T, input_size)`` with ``batch_first``; ``(T, input_size)``
                without a batch; or, outside TorchScript, a :class:`~torch.nn.utils.rnn.PackedSequence`, for
                which no padding is computed.
            hx: ``(num_layers * num_directions, B, hidden_size)``, without ``B`` for an input without a batch.
                The dtype of ``input``, or float32 beside half precision. Zeros if omitted.
            lengths: number of steps of each row of a padded batch, integers, ``(B,)``. What stands after them
                is ignored, even NaN: the output there is 0, the final state is that after a row's last step,
                and the second direction begins there. Values outside 0 to ``T`` raise for a tensor on the
                CPU; elsewhere, and under torch.compile, they count as 0 and ``T``.
            reset: steps before which the state is replaced by zeros, bool, ``(T, B)``, or ``(B, T)`` with
                ``batch_first``; ``(T,)`` without a batch; ``(num_steps,)``, in the order of its data, for a
                PackedSequence. (For the second direction, before is after in time.)

        Returns:
            The last layer's output, as ``input`` with ``num_directions * hidden_size`` channels, and the
            final state, in the form and the dtype of ``hx``; without ``hx`` in the output's dtype (IndRNN: in
            float32, or float64).

        Raises:
            ValueError: ``input`` has another number of dimensions or, outside autocast, another dtype than
                the parameters; ``lengths`` or ``reset`` is not as above.
            RuntimeError: another size of ``input``, or another shape or dtype of ``hx``.
            TypeError: ``hx`` is not made of tensors, or another dtype of ``lengths`` or ``reset``.
        """
        states: list[Tensor] | None = None
        if hx is not None:
            if not torch.jit.is_scripting():
                check_hx_type(self._name, hx, 1)
            states = [hx]
        y, final = self._forward_gated(input, states, lengths, reset)
        return y, final[0]

    @torch.jit.export
    def init_state(self, batch_size: int) -> Tensor:
        """Zeros ``(num_layers * num_directions, B, hidden_size)``, float32, or float64 in a double module."""
        return self.zero_state(batch_size)[0]

    @torch.jit.export
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step, for streaming; differentiable.

        Args:
            x: ``(B, input_size)``.
            state: ``(num_layers, B, hidden_size)``, from ``init_state``, ``forward`` or ``step``.

        Returns:
            The last layer's output ``(B, hidden_size)`` and the new state.

        Raises:
            RuntimeError: the module is bidirectional, or in training with masks that are drawn once a
                sequence.
        """
        if not torch.jit.is_scripting():
            check_state_type(f"{self._name}.step", state)
        y, final = self._step(x, [state])
        return y, final[0]


class GRU(OneStateGatedLayer):
    r"""GRU with torch.nn.GRU's arguments, parameters and results, and with options of its own.

    .. math::
        (r, z)_t &= \sigma(W_{rz} x_t + b_{ih} + R_{rz} h_{t-1} + b_{hh}) \\
        n_t &= \tanh(W_n x_t + b_{in} + r_t \odot (R_n h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", arXiv:1406.1078.

    Args:
        input_size: channels of the input.
        hidden_size: channels of ``h``.
        num_layers: layers, each of which reads the output of the one before.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        batch_first: the input and the output are ``(B, T, ...)`` instead of ``(T, B, ...)``; states are
            ``(num_layers * num_directions, B, ...)`` in either case.
        dropout: probability of a zero in the output of each layer but the last, in training.
        bidirectional: a second direction runs from a sequence's last step to its first; its output is
            appended to the first one's.
        device: of the parameters.
        dtype: of the parameters.
        num_heads: R is block-diagonal, a block for each head, whose units see each other alone; 1 is
            torch.nn's dense one. Divides ``hidden_size``.
        reset_after: False has :math:`R_n (r_t \odot h_{t-1}) + b_{hn}` in the place of :math:`r_t \odot (R_n
            h_{t-1} + b_{hn})`: the GRU of the paper, which torch.nn does not have.
        layer_norm: ``"none"``, or ``"haste"``, that of the package haste's LayerNormGRU: the gates are
            :math:`\gamma_x \text{LN}(W x) + \gamma_h \text{LN}(R h)` and the biases, with one mean and
            variance for all gates and units of a head, and eps 1e-5. Goes with ``reset_after`` alone.
        zoneout: probability with which a unit keeps its old ``h`` at a step, in training; otherwise ``h`` is
            that share of the old one (Krueger et al. 2017, arXiv:1606.01305).
        recurrent_dropout: probability of a zero in the mask of ``h`` on its way into R, drawn once a
            sequence, layer and direction, in training (variational dropout, Gal & Ghahramani 2016,
            arXiv:1512.05287).
        input_dropout: the same of each layer's input, one mask for both directions.
        weight_dropout: probability of a zero in ``weight_hh``, drawn once a call, in training (DropConnect,
            Merity et al. 2018, arXiv:1708.02182).
        recurrent_clip: bound, at least 0, on each element of the gradient that comes back through R to the
            state before. What comes of it is not the forward's gradient. None is no bound.

    Attributes:
        weight_ih_l{k}[_reverse]: ``(3 * hidden_size, in)``, the rows of r, z, n; ``in`` is ``input_size`` for
            ``k = 0``, else ``num_directions * hidden_size``.
        weight_hh_l{k}[_reverse]: ``(3 * hidden_size, hidden_size / num_heads)``, R.
        bias_ih_l{k}[_reverse]: ``(3 * hidden_size,)``.
        bias_hh_l{k}[_reverse]: ``(3 * hidden_size,)``.
        input_norm_weight_l{k}[_reverse]: ``(3 * hidden_size,)``, :math:`\gamma_x`, with ``layer_norm``.
        recurrent_norm_weight_l{k}[_reverse]: ``(3 * hidden_size,)``, :math:`\gamma_h`.

    Raises:
        TypeError: a size is no integer, or ``bias`` or ``batch_first`` no bool.
        ValueError: a size is below 1, a probability outside [0, 1], or a word or a pair of options not one of
            the above.

    Notes:
        Without any of the options behind ``dtype`` it is torch.nn.GRU: the same parameters in the same order,
        the same values from the same seed, the same results. On CUDA it calls cuDNN then (in training, or
        without gradients), whose backward is not differentiable; under
        ``torch.backends.cudnn.flags(enabled=False)``, with any option, and on the CPU the operator
        :func:`torch_ext.gru` runs, which is differentiable any number of times, in float16 and bfloat16 too
        with sums and states in float32. ``step`` and ``init_state`` stream. ``weight_hh`` alone may be
        bfloat16 beside float32 (``rnn.weight_hh_l0.data = rnn.weight_hh_l0.data.bfloat16()``), which halves
        its storage. Initialisers: :mod:`torch_ext.init`.

    Example:
        >>> rnn = torch_ext.GRU(3, 8, num_layers=2, batch_first=True, num_heads=2)
        >>> y, h = rnn(torch.randn(4, 100, 3))
        >>> y.shape, h.shape, rnn.weight_hh_l0.shape
        (torch.Size([4, 100, 8]), torch.Size([2, 4, 8]), torch.Size([24, 4]))
        >>> x, reset = torch.randn(1, 6, 3), torch.tensor([[False, False, False, True, False, False]])
        >>> torch.allclose(rnn(x, reset=reset)[0][:, 3:], rnn(x[:, 3:])[0])
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
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        reset_after: bool = True,
        layer_norm: str = "none",
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        recurrent_clip: float | None = None,
    ) -> None:
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
        if layer_norm != "none" and not reset_after:
            raise ValueError(
                f'GRU: layer_norm is {layer_norm!r}, expected "none" with reset_after=False'
            )
        self.gate_names = "rzn"
        self.reset_after = bool(reset_after)
        super().__init__(
            3,
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
        options = not reset_after or num_heads > 1 or layer_norm != "none"
        options = options or max(zoneout, recurrent_dropout, input_dropout, weight_dropout) > 0
        self._plain, self._like_torch = not options and recurrent_clip is None, True

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
        y, h = gru(
            self._by_gate(gates),
            self._recurrent_weight(weights),
            self._per_gate(weights, "bias_hh"),
            h0,
            self.reset_after,
            cu_seqlens,
            reverse,
            reset,
            self._recurrent_mask(h0),
            self._update(self.zoneout, gates, [h0.shape[1], h0.shape[2]]),
            self._per_gate(weights, "recurrent_norm_weight"),
            self.norm_eps,
            self.recurrent_clip,
        )
        return y.flatten(-2), [h.flatten(-2)]

    def recurrence_step(
        self, gates: Tensor, weights: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        h0 = self._by_head(state[0])
        y, h = gru_step(
            self._by_gate(gates),
            self._recurrent_weight(weights),
            self._per_gate(weights, "bias_hh"),
            h0,
            None,
            self.reset_after,
            None,
            self._update(self.zoneout, gates, [h0.shape[1], h0.shape[2]]),
            self._per_gate(weights, "recurrent_norm_weight"),
            self.norm_eps,
        )
        return y.flatten(-2), [h.flatten(-2)]

    def native(
        self, x: Tensor, batch_sizes: Tensor | None, state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        weights = self._weights()
        if batch_sizes is None:
            y, h = _VF.gru(
                x,
                state[0],
                weights,
                self.bias,
                self.num_layers,
                self.dropout,
                self.training,
                self.bidirectional,
                self.batch_first,
            )
        else:
            y, h = _VF.gru(
                x,
                batch_sizes,
                state[0],
                weights,
                self.bias,
                self.num_layers,
                self.dropout,
                self.training,
                self.bidirectional,
            )
        return y, [h]


class RNN(OneStateGatedLayer):
    r"""Elman network with torch.nn.RNN's arguments, parameters and results, and with options of its own.

    .. math::
        h_t = \tanh(W x_t + b_{ih} + R h_{t-1} + b_{hh})

    Elman 1990, "Finding Structure in Time".

    Args:
        input_size: channels of the input.
        hidden_size: channels of ``h``.
        num_layers: layers, each of which reads the output of the one before.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        batch_first: the input and the output are ``(B, T, ...)`` instead of ``(T, B, ...)``; states are
            ``(num_layers * num_directions, B, ...)`` in either case.
        dropout: probability of a zero in the output of each layer but the last, in training.
        bidirectional: a second direction runs from a sequence's last step to its first; its output is
            appended to the first one's.
        device: of the parameters.
        dtype: of the parameters.
        num_heads: R is block-diagonal, a block for each head, whose units see each other alone; 1 is
            torch.nn's dense one. Divides ``hidden_size``.
        layer_norm: ``"none"``, or ``"haste"``, that of the package haste's layers: the gates are
            :math:`\gamma_x \text{LN}(W x) + \gamma_h \text{LN}(R h)` and the biases, with one mean and
            variance for all gates and units of a head, and eps 1e-5.
        zoneout: probability with which a unit keeps its old ``h`` at a step, in training; otherwise ``h`` is
            that share of the old one (Krueger et al. 2017, arXiv:1606.01305).
        recurrent_dropout: probability of a zero in the mask of ``h`` on its way into R, drawn once a
            sequence, layer and direction, in training (variational dropout, Gal & Ghahramani 2016,
            arXiv:1512.05287).
        input_dropout: the same of each layer's input, one mask for both directions.
        weight_dropout: probability of a zero in ``weight_hh``, drawn once a call, in training (DropConnect,
            Merity et al. 2018, arXiv:1708.02182).
        recurrent_clip: bound, at least 0, on each element of the gradient that comes back through R to the
            state before. What comes of it is not the forward's gradient. None is no bound.

    Attributes:
        weight_ih_l{k}[_reverse]: ``(hidden_size, in)``; ``in`` is ``input_size`` for ``k = 0``, else
            ``num_directions * hidden_size``.
        weight_hh_l{k}[_reverse]: ``(hidden_size, hidden_size / num_heads)``, R.
        bias_ih_l{k}[_reverse]: ``(hidden_size,)``.
        bias_hh_l{k}[_reverse]: ``(hidden_size,)``.
        input_norm_weight_l{k}[_reverse]: ``(hidden_size,)``, :math:`\gamma_x`, with ``layer_norm``.
        recurrent_norm_weight_l{k}[_reverse]: ``(hidden_size,)``, :math:`\gamma_h`.

    Raises:
        TypeError: a size is no integer, or ``bias`` or ``batch_first`` no bool.
        ValueError: a size is below 1, a probability outside [0, 1], or a word or a pair of options not one of
            the above.

    Notes:
        Without any of the options behind ``dtype`` it is torch.nn.RNN: the same parameters in the same order,
        the same values from the same seed, the same results. On CUDA it calls cuDNN then (in training, or
        without gradients), whose backward is not differentiable; under
        ``torch.backends.cudnn.flags(enabled=False)``, with any option, and on the CPU the operator
        :func:`torch_ext.elman` runs, which is differentiable any number of times, in float16 and bfloat16 too
        with sums and states in float32. ``step`` and ``init_state`` stream. ``weight_hh`` alone may be
        bfloat16 beside float32 (``rnn.weight_hh_l0.data = rnn.weight_hh_l0.data.bfloat16()``), which halves
        its storage. Initialisers: :mod:`torch_ext.init`.

    Example:
        >>> rnn = torch_ext.RNN(3, 8, nonlinearity="relu", batch_first=True, recurrent_dropout=0.2)
        >>> y, h = rnn(torch.randn(4, 100, 3))
        >>> y.shape, h.shape
        (torch.Size([4, 100, 8]), torch.Size([1, 4, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        layer_norm: str = "none",
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        recurrent_clip: float | None = None,
    ) -> None:
        check_word("RNN", "nonlinearity", nonlinearity, ["tanh", "relu"])
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
        self.gate_names = "h"
        self.nonlinearity = nonlinearity
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
        options = num_heads > 1 or layer_norm != "none" or recurrent_clip is not None
        options = options or max(zoneout, recurrent_dropout, input_dropout, weight_dropout) > 0
        self._plain, self._like_torch = not options, True

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
        y, h = elman(
            self._by_gate(gates),
            self._recurrent_weight(weights),
            self._per_gate(weights, "bias_hh"),
            h0,
            self.nonlinearity,
            cu_seqlens,
            reverse,
            reset,
            self._recurrent_mask(h0),
            self._update(self.zoneout, gates, [h0.shape[1], h0.shape[2]]),
            self._per_gate(weights, "recurrent_norm_weight"),
            self.norm_eps,
            self.recurrent_clip,
        )
        return y.flatten(-2), [h.flatten(-2)]

    def recurrence_step(
        self, gates: Tensor, weights: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        h0 = self._by_head(state[0])
        y, h = elman_step(
            self._by_gate(gates),
            self._recurrent_weight(weights),
            self._per_gate(weights, "bias_hh"),
            h0,
            None,
            self.nonlinearity,
            None,
            self._update(self.zoneout, gates, [h0.shape[1], h0.shape[2]]),
            self._per_gate(weights, "recurrent_norm_weight"),
            self.norm_eps,
        )
        return y.flatten(-2), [h.flatten(-2)]

    def native(
        self, x: Tensor, batch_sizes: Tensor | None, state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        weights = self._weights()
        h = state[0]
        if batch_sizes is None:
            if self.nonlinearity == "tanh":
                y, h = _VF.rnn_tanh(
                    x,
                    h,
                    weights,
                    self.bias,
                    self.num_layers,
                    self.dropout,
                    self.training,
                    self.bidirectional,
                    self.batch_first,
                )
            else:
                y, h = _VF.rnn_relu(
                    x,
                    h,
                    weights,
                    self.bias,
                    self.num_layers,
                    self.dropout,
                    self.training,
                    self.bidirectional,
                    self.batch_first,
                )
        elif self.nonlinearity == "tanh":
            y, h = _VF.rnn_tanh(
                x,
                batch_sizes,
                h,
                weights,
                self.bias,
                self.num_layers,
                self.dropout,
                self.training,
                self.bidirectional,
            )
        else:
            y, h = _VF.rnn_relu(
                x,
                batch_sizes,
                h,
                weights,
                self.bias,
                self.num_layers,
                self.dropout,
                self.training,
                self.bidirectional,
            )
        return y, [h]
