"""Single steps of the gated recurrences as modules: LSTMCell, GRUCell and RNNCell with torch.nn's arguments and
parameters, SLSTMCell and IndRNNCell."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._gated_layer import check_bool, check_bound, check_heads, check_hx_type, check_word, fits
from ._sequence_layer import shape_text
from .elman import elman_step
from .gru import gru_step
from .ind_rnn import ind_rnn_step
from .init import slstm_bias
from .lstm import lstm_step
from .rnn import Device
from .slstm import State, slstm_step


class GatedCell(nn.Module):
    """Parameters, the input projection and torch.nn's contract; a subclass calls its operator."""

    recurrent_max: float | None

    def __init__(
        self,
        gate_names: str,
        input_size: int,
        hidden_size: int,
        bias: bool,
        num_heads: int,
        states: int,
        shapes: dict[str, tuple[int, ...]],
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self._name = type(self).__name__
        check_bool(self._name, "bias", bias)
        for argument, value in [("input_size", input_size), ("hidden_size", hidden_size)]:
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{self._name}: {argument} is {value!r}, expected an integer")
            if value < 1:
                raise ValueError(f"{self._name}: {argument} is {value}, expected at least 1")
        check_heads(self._name, num_heads, [("hidden_size", hidden_size)])
        self.gate_names = gate_names
        self.num_gates = len(gate_names)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.num_heads = num_heads
        self._states = states
        rows, units = self.num_gates * hidden_size, hidden_size // num_heads
        wanted = {"weight_ih": (rows, input_size), "weight_hh": (rows, units)}
        if bias:
            wanted |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        for name, shape in (wanted | shapes).items():
            if shape:
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(name, parameter)
            else:
                self.register_parameter(name, None)
        if not bias:  # as torch.nn, whose cells have the names all the same
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ``+-1 / sqrt(hidden_size)``, as torch.nn."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            parameter.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        for option, default in [
            ("bias", True),
            ("nonlinearity", "relu" if self._name == "IndRNNCell" else "tanh"),
            ("coupled", False),
            ("reset_after", True),
            ("num_heads", 1),
            ("forget_gate", "sigmoid"),
            ("normalizer", "sum"),
            ("recurrent_max", None),
        ]:
            value = getattr(self, option, default)
            if value != default:
                text += f", {option}={value!r}"
        return text

    def _enter(self, x: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """The input projection ``(B, rows)`` and the states ``(B, hidden_size)`` in the state dtype."""
        if x.dim() != 1 and x.dim() != 2:
            raise ValueError(
                f"{self._name}: input has shape {shape_text(x)}, expected (B, input_size="
                f"{self.input_size}) or (input_size={self.input_size})"
            )
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"{self._name}: input has shape {shape_text(x)}, expected (B, input_size="
                f"{self.input_size}) or (input_size={self.input_size})"
            )
        batched = x.dim() == 2
        wide = torch.float64 if self.weight_ih.dtype == torch.float64 else torch.float32
        batch_size = x.shape[0] if batched else 1
        states: list[Tensor] = []
        if state is None:
            for _ in range(self._states):
                shape = [batch_size, self.hidden_size]
                states.append(torch.zeros(shape, dtype=wide, device=x.device))
        else:
            for k in range(len(state)):
                s = state[k]
                which = "hx" if len(state) == 1 else f"hx[{k}]"
                want = [batch_size, self.hidden_size] if batched else [self.hidden_size]
                if list(s.shape) != want:
                    text = f"B={batch_size}, " if batched else ""
                    said = (
                        f"{self._name}: {which} has shape {shape_text(s)}, expected "
                        f"({text}hidden_size={self.hidden_size})"
                    )
                    if s.dim() != len(want):
                        raise ValueError(said)
                    raise RuntimeError(said)
                if not fits(s, x):
                    raise RuntimeError(
                        f"{self._name}: {which} has dtype {s.dtype}, expected {x.dtype} or float32"
                    )
                states.append((s if batched else s.unsqueeze(0)).to(wide))
        gates = F.linear(x if batched else x.unsqueeze(0), self.weight_ih, self.bias_ih)
        return gates, states

    def _leave(self, x: Tensor, y: Tensor, s: Tensor, given: list[Tensor] | None, k: int) -> Tensor:
        """A new state as it was given: its dtype, else the output's, and with or without a batch."""
        s = s.to(y.dtype) if given is None else s.to(given[k].dtype)
        return s if x.dim() == 2 else s.squeeze(0)

    def _by_gate(self, gates: Tensor) -> Tensor:
        return gates.unflatten(
            1, [self.num_gates, self.num_heads, self.hidden_size // self.num_heads]
        )

    def _by_head(self, s: Tensor) -> Tensor:
        return s.unflatten(1, [self.num_heads, self.hidden_size // self.num_heads])

    def _recurrent_weight(self) -> Tensor:
        units = self.hidden_size // self.num_heads
        return self.weight_hh.unflatten(0, [self.num_gates, self.num_heads, units])

    def _recurrent_bias(self) -> Tensor | None:
        bias = self.bias_hh
        if bias is None:
            return None
        units = self.hidden_size // self.num_heads
        return bias.unflatten(0, [self.num_gates, self.num_heads, units])


class LSTMCell(GatedCell):
    r"""One step of an LSTM, with torch.nn.LSTMCell's arguments, parameters and call.

    .. math::
        (i, f, g, o) &= W x + b_{ih} + R h + b_{hh} \\
        c' &= \sigma(f)\, c + \sigma(i) \tanh(g), \qquad h' = \sigma(o) \tanh(c')

    Hochreiter & Schmidhuber 1997, "Long Short-Term Memory"; see :class:`torch_ext.LSTM`.

    Args:
        input_size: channels of the input.
        hidden_size: channels of ``h`` and of ``c``.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        device: of the parameters.
        dtype: of the parameters.
        num_heads: R is block-diagonal, a block for each head.
        coupled: no gate ``i``: :math:`1 - \sigma(f)` is in its place.

    Attributes:
        weight_ih: ``(4 * hidden_size, input_size)``, the rows of i, f, g, o (f, g, o with ``coupled``).
        weight_hh: ``(4 * hidden_size, hidden_size / num_heads)``.
        bias_ih: ``(4 * hidden_size,)``.
        bias_hh: ``(4 * hidden_size,)``.

    Example:
        >>> cell = torch_ext.LSTMCell(3, 8)
        >>> x, state = torch.randn(10, 4, 3), None
        >>> for t in range(10):
        ...     state = cell(x[t], state)
        >>> state[0].shape, state[1].shape
        (torch.Size([4, 8]), torch.Size([4, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        coupled: bool = False,
    ) -> None:
        gates = "fgo" if coupled else "ifgo"
        super().__init__(gates, input_size, hidden_size, bias, num_heads, 2, {}, device, dtype)
        self.coupled = bool(coupled)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: ``(B, input_size)``, or ``(input_size,)`` without a batch.
            hx: ``h`` and ``c``, ``(B, hidden_size)`` each, or ``(hidden_size,)``; the dtype of ``input``, or
                float32 beside half precision. Zeros if omitted.

        Returns:
            The new ``h`` and ``c``, each in the form and the dtype of the old one.

        Raises:
            ValueError: a number of dimensions differs from the above.
            RuntimeError: a size or a dtype does.
            TypeError: ``hx`` is no pair of tensors.
        """
        given: list[Tensor] | None = None
        if hx is not None:
            if not torch.jit.is_scripting():
                check_hx_type(self._name, hx, 2)
            given = [hx[0], hx[1]]
        gates, state = self._enter(input, given)
        y, (h, c) = lstm_step(
            self._by_gate(gates),
            self._recurrent_weight(),
            self._recurrent_bias(),
            (self._by_head(state[0]), self._by_head(state[1])),
            None,
            self.coupled,
        )
        return (
            self._leave(input, y, h.flatten(1), given, 0),
            self._leave(input, y, c.flatten(1), given, 1),
        )


class GRUCell(GatedCell):
    r"""One step of a GRU, with torch.nn.GRUCell's arguments, parameters and call.

    .. math::
        (r, z) &= \sigma(W_{rz} x + b_{ih} + R_{rz} h + b_{hh}) \\
        n &= \tanh(W_n x + b_{in} + r \odot (R_n h + b_{hn})), \qquad h' = (1 - z) \odot n + z \odot h

    Cho et al. 2014, arXiv:1406.1078; see :class:`torch_ext.GRU`.

    Args:
        input_size: channels of the input.
        hidden_size: channels of ``h``.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        device: of the parameters.
        dtype: of the parameters.
        num_heads: R is block-diagonal, a block for each head.
        reset_after: False has :math:`R_n (r \odot h) + b_{hn}`, the paper's.

    Attributes:
        weight_ih: ``(3 * hidden_size, input_size)``, the rows of r, z, n.
        weight_hh: ``(3 * hidden_size, hidden_size / num_heads)``.
        bias_ih: ``(3 * hidden_size,)``.
        bias_hh: ``(3 * hidden_size,)``.

    Example:
        >>> cell = torch_ext.GRUCell(3, 8)
        >>> cell(torch.randn(4, 3), torch.zeros(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        reset_after: bool = True,
    ) -> None:
        super().__init__("rzn", input_size, hidden_size, bias, num_heads, 1, {}, device, dtype)
        self.reset_after = bool(reset_after)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: ``(B, input_size)``, or ``(input_size,)`` without a batch.
            hx: ``(B, hidden_size)``, or ``(hidden_size,)``; the dtype of ``input``, or float32 beside half
                precision. Zeros if omitted.

        Returns:
            The new ``h``, in the form and the dtype of the old one.

        Raises:
            ValueError: a number of dimensions differs from the above.
            RuntimeError: a size or a dtype does.
            TypeError: ``hx`` is no tensor.
        """
        given: list[Tensor] | None = None
        if hx is not None:
            if not torch.jit.is_scripting():
                check_hx_type(self._name, hx, 1)
            given = [hx]
        gates, state = self._enter(input, given)
        y, h = gru_step(
            self._by_gate(gates),
            self._recurrent_weight(),
            self._recurrent_bias(),
            self._by_head(state[0]),
            None,
            self.reset_after,
        )
        return self._leave(input, y, h.flatten(1), given, 0)


class RNNCell(GatedCell):
    r"""One step of an Elman network, with torch.nn.RNNCell's arguments, parameters and call.

    .. math::
        h' = \tanh(W x + b_{ih} + R h + b_{hh})

    Elman 1990, "Finding Structure in Time"; see :class:`torch_ext.RNN`.

    Args:
        input_size: channels of the input.
        hidden_size: channels of ``h``.
        bias: False leaves out ``b_ih`` and ``b_hh``.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device: of the parameters.
        dtype: of the parameters.
        num_heads: R is block-diagonal, a block for each head.

    Attributes:
        weight_ih: ``(hidden_size, input_size)``.
        weight_hh: ``(hidden_size, hidden_size / num_heads)``.
        bias_ih: ``(hidden_size,)``.
        bias_hh: ``(hidden_size,)``.

    Example:
        >>> cell = torch_ext.RNNCell(3, 8, nonlinearity="relu")
        >>> cell(torch.randn(4, 3)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
    ) -> None:
        check_word("RNNCell", "nonlinearity", nonlinearity, ["tanh", "relu"])
        super().__init__("h", input_size, hidden_size, bias, num_heads, 1, {}, device, dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step, see :meth:`GRUCell.forward`."""
        given: list[Tensor] | None = None
        if hx is not None:
            if not torch.jit.is_scripting():
                check_hx_type(self._name, hx, 1)
            given = [hx]
        gates, state = self._enter(input, given)
        y, h = elman_step(
            self._by_gate(gates),
            self._recurrent_weight(),
            self._recurrent_bias(),
            self._by_head(state[0]),
            None,
            self.nonlinearity,
        )
        return self._leave(input, y, h.flatten(1), given, 0)


class SLSTMCell(GatedCell):
    r"""One step of an sLSTM; see :class:`torch_ext.SLSTM` and :func:`torch_ext.slstm`.

    Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517, section 2.2.

    Args:
        input_size: channels of the input.
        hidden_size: channels of each of the states ``h``, ``c``, ``n`` and ``m``.
        bias: False leaves out the bias.
        device: of the parameters.
        dtype: of the parameters. States are float32, or float64.
        num_heads: R is block-diagonal, a block for each head.
        forget_gate: ``"sigmoid"`` or ``"exp"``.
        normalizer: ``"sum"`` or ``"at_least_one"``.

    Attributes:
        weight_ih: ``(4 * hidden_size, input_size)``, the rows of i, f, z, o.
        weight_hh: ``(4 * hidden_size, hidden_size / num_heads)``.
        bias_ih: ``(4 * hidden_size,)``, at first as :func:`torch_ext.init.power_law_forget_bias_` says, else
            0.

    Example:
        >>> cell = torch_ext.SLSTMCell(3, 8, num_heads=2)
        >>> state = None
        >>> for x_t in torch.randn(10, 4, 3):
        ...     y_t, state = cell(x_t, state)
        >>> y_t.shape, len(state)
        (torch.Size([4, 8]), 4)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        forget_gate: str = "sigmoid",
        normalizer: str = "sum",
    ) -> None:
        check_word("SLSTMCell", "forget_gate", forget_gate, ["sigmoid", "exp"])
        check_word("SLSTMCell", "normalizer", normalizer, ["sum", "at_least_one"])
        shapes: dict[str, tuple[int, ...]] = {"bias_hh": ()}
        self.forget_gate = forget_gate  # reset_parameters asks for it
        self.normalizer = normalizer
        super().__init__("ifzo", input_size, hidden_size, bias, num_heads, 4, shapes, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ``+-1 / sqrt(hidden_size)``, biases 0 but for the forget gate's."""
        super().reset_parameters()
        if self.bias:
            slstm_bias(self.bias_ih, self.num_heads, 0, 1, self.forget_gate)

    def forward(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]:
        """One step.

        Args:
            input: ``(B, input_size)``, or ``(input_size,)`` without a batch.
            hx: ``h``, ``c``, ``n``, ``m``, ``(B, hidden_size)`` each, or ``(hidden_size,)``, float32 (float64
                in a double module) or the dtype of ``input``. Zeros if omitted.

        Returns:
            The output ``(B, hidden_size)``, the dtype of ``input``, and the new state, in the dtypes of the old
            one, else float32 or float64.

        Raises:
            ValueError: a number of dimensions differs from the above.
            RuntimeError: a size or a dtype does.
            TypeError: ``hx`` is no tuple of four tensors.
        """
        given: list[Tensor] | None = None
        if hx is not None:
            if not torch.jit.is_scripting():
                check_hx_type(self._name, hx, 4)
            given = [hx[0], hx[1], hx[2], hx[3]]
        gates, s = self._enter(input, given)
        y, (h, c, n, m) = slstm_step(
            self._by_gate(gates),
            self._recurrent_weight(),
            None,
            (self._by_head(s[0]), self._by_head(s[1]), self._by_head(s[2]), self._by_head(s[3])),
            None,
            self.forget_gate,
            self.normalizer,
        )
        like = s if given is None else given  # half precision is too little for n and m
        state = (
            self._leave(input, y, h.flatten(1), like, 0),
            self._leave(input, y, c.flatten(1), like, 1),
            self._leave(input, y, n.flatten(1), like, 2),
            self._leave(input, y, m.flatten(1), like, 3),
        )
        y = y.flatten(1)
        return y if input.dim() == 2 else y.squeeze(0), state


class IndRNNCell(GatedCell):
    r"""One step of an IndRNN; see :class:`torch_ext.IndRNN`.

    .. math::
        h' = \text{relu}(W x + b + u \odot h)

    Li et al. 2018, "Independently Recurrent Neural Network (IndRNN)", arXiv:1803.04831.

    Args:
        input_size: channels of the input.
        hidden_size: channels of ``h``.
        bias: False leaves out ``b``.
        nonlinearity: ``"relu"`` or ``"tanh"``.
        device: of the parameters.
        dtype: of the parameters.
        recurrent_max: greatest size of an element of ``u``, to which it is clamped on its way into the step.
            None is no bound.

    Attributes:
        weight_ih: ``(hidden_size, input_size)``.
        weight_hh: ``u``, ``(hidden_size,)``, at first uniform in 0 to 1, or to ``recurrent_max`` if it is
            less.
        bias_ih: ``(hidden_size,)``.

    Example:
        >>> cell = torch_ext.IndRNNCell(3, 8)
        >>> cell(torch.randn(4, 3)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_max: float | None = None,
    ) -> None:
        check_word("IndRNNCell", "nonlinearity", nonlinearity, ["tanh", "relu"])
        check_bound("IndRNNCell", "recurrent_max", recurrent_max)
        shapes: dict[str, tuple[int, ...]] = {"weight_hh": (hidden_size,), "bias_hh": ()}
        self.nonlinearity = nonlinearity
        self.recurrent_max = None if recurrent_max is None else float(recurrent_max)
        super().__init__("h", input_size, hidden_size, bias, 1, 1, shapes, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ``+-1 / sqrt(hidden_size)``; recurrent weights in 0 to 1, or to ``recurrent_max`` if it
        is less."""
        super().reset_parameters()
        most = 1.0 if self.recurrent_max is None else min(1.0, self.recurrent_max)
        self.weight_hh.uniform_(0.0, most)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step, see :meth:`GRUCell.forward`."""
        given: list[Tensor] | None = None
        if hx is not None:
            if not torch.jit.is_scripting():
                check_hx_type(self._name, hx, 1)
            given = [hx]
        gates, state = self._enter(input, given)
        u, most = self.weight_hh, self.recurrent_max
        if most is not None:
            u = u.clamp(-most, most)
        y, h = ind_rnn_step(gates, u, None, state[0], None, self.nonlinearity)
        return self._leave(input, y, h, given, 0)
