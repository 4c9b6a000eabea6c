"""LSTM and GRU whose states are images (or signals, or volumes) and whose products are convolutions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._gated_layer import check_bool
from ._sequence_layer import SequenceLayer, check_state_type, shape_text
from .min_gru import min_gru_step
from .min_lstm import min_lstm_step
from .rnn import Device

# About the cell. A state's next step needs the convolution of the state, so that an operator over the whole sequence
# cannot run it. Of a step, what the two states of the recurrence become, c = f c + i g and h = (1 - z) h + z n, is what
# min_lstm_step and min_gru_step compute, with the candidate's tanh in front; it takes their kernels and gradients from
# them. The rest (peepholes, tanh, the gate of the output) is torch's own: lstm_step and gru_step have it too, but only
# with a recurrent matrix, that for units which see each other by no product would be a head for each unit, of one zero.
# That works, and takes many times as long as what is here.


class ConvLayer(SequenceLayer):
    """What ConvLSTM and ConvGRU share; a subclass computes a step in ``cell``.

    ``x`` is ``(B, T, C, *space)`` within, and a state ``(num_layers * num_directions, B, hidden_size, *space)``.
    """

    _flat_weights: list[Tensor]
    spatial_size: list[int] | None

    def _set_convolution(
        self,
        kernel_size: int | tuple[int, ...],
        bias: bool,
        batch_first: bool,
        bidirectional: bool,
        dim: int,
    ) -> None:
        """Checks and keeps what the parameters' shapes follow from: before the constructor."""
        owner = type(self).__name__
        for argument, flag in [
            ("bias", bias),
            ("batch_first", batch_first),
            ("bidirectional", bidirectional),
        ]:
            check_bool(owner, argument, flag)
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise TypeError(f"{owner}: dim is {dim!r}, expected 1, 2 or 3")
        if dim not in (1, 2, 3):
            raise ValueError(f"{owner}: dim is {dim}, expected 1, 2 or 3")
        self.dim = dim
        self.kernel_size = self._sizes("kernel_size", kernel_size)
        if any(size % 2 == 0 for size in self.kernel_size):
            raise ValueError(
                f"{owner}: kernel_size is {kernel_size}, expected odd numbers: a state has a middle"
            )
        self._padding = [size // 2 for size in self.kernel_size]
        self.spatial_size = None

    def _sizes(self, argument: str, given: int | tuple[int, ...]) -> list[int]:
        """One size for each dimension of the space."""
        sizes = list(given) if isinstance(given, tuple | list) else [given] * self.dim
        owner, expected = type(self).__name__, f"an integer, or dim={self.dim} of them"
        if any(not isinstance(size, int) or isinstance(size, bool) for size in sizes):
            raise TypeError(f"{owner}: {argument} is {given!r}, expected {expected}")
        if len(sizes) != self.dim or min(sizes) < 1:
            raise ValueError(f"{owner}: {argument} is {given}, expected {expected}, at least 1")
        return sizes

    def parameter_shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        rows, kernel = self.num_gates * self.hidden_size, tuple(self.kernel_size)
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, input_size, *kernel)}
        if self.bias:
            shapes["bias_ih"] = (rows,)
        return shapes | {"weight_hh": (rows, self.hidden_size, *kernel)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ``+-1 / sqrt(n)``, ``n = hidden_size * prod(kernel_size)``: torch.nn's with what a unit sees."""
        bound = 1 / math.sqrt(self.hidden_size * math.prod(self.kernel_size))
        for name in self._weight_names:
            nn.init.uniform_(getattr(self, name), -bound, bound)

    def extra_repr(self) -> str:
        kernel = tuple(self.kernel_size) if len(set(self.kernel_size)) > 1 else self.kernel_size[0]
        head = f"{self.input_size}, {self.hidden_size}"
        text = f"{head}, {kernel}" + super().extra_repr()[len(head) :]
        for option, default in [("dim", 2), ("peephole", False), ("reset_after", False)]:
            value = getattr(self, option, default)
            if value != default:
                text += f", {option}={value!r}"
        if self.spatial_size is not None:
            text += f", spatial_size={tuple(self.spatial_size)}"
        return text

    def cell(self, gates: Tensor, weights: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        """One step of one layer and direction.

        Args:
            gates: ``(B, num_gates * hidden_size, *space)``, the convolution of the input.
            weights: all but ``weight_ih`` and ``bias_ih``.
            state: each ``(B, hidden_size, *space)``, in the state dtype; the first is the output.
        """
        raise NotImplementedError

    def num_states(self) -> int:
        return 1

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.dim == 1:
            return F.conv1d(x, weight, bias, 1, self._padding)
        if self.dim == 2:
            return F.conv2d(x, weight, bias, 1, self._padding)
        return F.conv3d(x, weight, bias, 1, self._padding)

    def _run_steps(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """All layers."""
        final_states: list[list[Tensor]] = [[] for _ in state]
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            for direction in range(self.num_directions):
                weights = self._weights_of(layer, direction)
                bias = weights[1] if self.bias else None
                gates = self._convolve(x.flatten(0, 1), weights[0], bias)  # of all steps at once
                gates = gates.unflatten(0, [x.shape[0], x.shape[1]])
                rest = weights[2 if self.bias else 1 :]
                at = layer * self.num_directions + direction
                s = [part[at] for part in state]
                steps = gates.unbind(1)  # not gates[:, t], whose gradient is as large as gates
                ys: list[Tensor] = []
                for k in range(len(steps)):
                    s = self.cell(steps[len(steps) - 1 - k if direction == 1 else k], rest, s)
                    ys.append(s[0].to(gates.dtype))
                if direction == 1:
                    ys.reverse()
                outputs.append(
                    torch.stack(ys, 1) if len(ys) > 0 else gates.narrow(2, 0, self.hidden_size)
                )
                for k in range(len(state)):
                    final_states[k].append(s[k])
            x = torch.cat(outputs, 2) if self.bidirectional else outputs[0]
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, [torch.stack(s) for s in final_states]

    def _forward_space(self, x: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        if not torch.jit.is_scripting():
            self._check_tensor(self._name, x)
        order = ["B", "T"] if self.batch_first else ["T", "B"]
        # Any number of dimensions but that without a batch is measured against that with one.
        batched = x.dim() != self.dim + 2
        self._check_input(self._name, x, order if batched else ["T"])
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        space = x.shape[3:]
        if state is None:
            state = self._zero_states(x.shape[0], space)
        else:
            state = self._states_in(self._name, x, state, batched, space)
        y, state = self._run_steps(x, state)
        if not batched:
            return y.squeeze(0), [s.squeeze(1) for s in state]
        return y if self.batch_first else y.transpose(0, 1), state

    def _step_space(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        owner = f"{self._name}.step"
        if self.bidirectional:
            raise RuntimeError(
                f"{owner}: bidirectional is True, expected False: "
                f"the second direction begins at a sequence's end"
            )
        if not torch.jit.is_scripting():
            self._check_tensor(owner, x)
        self._check_input(owner, x, ["B"])
        state = self._states_in(owner, x, state, True, x.shape[2:])
        y, state = self._run_steps(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def _check_input(self, owner: str, x: Tensor, order: list[str]) -> None:
        channel = len(order)
        right = x.dim() == channel + 1 + self.dim and x.shape[channel] == self.input_size
        wanted = self.spatial_size
        if right and wanted is not None:
            right = list(x.shape[channel + 1 :]) == wanted
        if not right:
            text = ", ".join(order) + f", input_size={self.input_size}"
            if wanted is not None:
                text += ", spatial_size=" + ", ".join([str(size) for size in wanted])
            else:
                text += ", " + ", ".join([f"S{k + 1}" for k in range(self.dim)])
            raise ValueError(f"{owner}: x has shape {shape_text(x)}, expected ({text})")

    @torch.jit.unused
    def _check_tensor(self, owner: str, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{owner}: x is {type(x).__name__}, expected a tensor")
        self._check_dtype(x)

    def _states_in(
        self, owner: str, x: Tensor, state: list[Tensor], batched: bool, space: list[int]
    ) -> list[Tensor]:
        """The initial states, with a batch, in the state dtype."""
        rows = self.num_layers * self.num_directions
        want = [rows, x.shape[0]] if batched else [rows]
        for size in [self.hidden_size] + list(space):
            want.append(size)
        wide = self._state_dtype()
        states: list[Tensor] = []
        for s in state:
            if list(s.shape) != want:
                text = f"num_layers * num_directions={rows}, "
                text += f"B={x.shape[0]}, " if batched else ""
                text += f"hidden_size={self.hidden_size}, "
                text += ", ".join([str(size) for size in space])
                raise ValueError(f"{owner}: state has shape {shape_text(s)}, expected ({text})")
            if not s.is_floating_point():
                raise TypeError(f"{owner}: state has dtype {s.dtype}, expected {wide}")
            states.append((s if batched else s.unsqueeze(1)).to(wide))
        return states

    def _state_dtype(self) -> torch.dtype:
        return torch.float64 if self._weights()[0].dtype == torch.float64 else torch.float32

    def _zero_states(self, batch_size: int, space: list[int]) -> list[Tensor]:
        shape = [self.num_layers * self.num_directions, batch_size, self.hidden_size]
        for size in space:
            shape.append(size)
        states: list[Tensor] = []
        for _ in range(self.num_states()):
            zeros = torch.zeros(shape, dtype=self._state_dtype(), device=self._weights()[0].device)
            states.append(zeros)
        return states

    def _first_states(self, batch_size: int, spatial_size: list[int]) -> list[Tensor]:
        if len(spatial_size) != self.dim:
            raise ValueError(
                f"{self._name}.init_state: spatial_size has {len(spatial_size)} numbers, "
                f"expected dim={self.dim}"
            )
        return self._zero_states(batch_size, spatial_size)


class ConvLSTM(ConvLayer):
    r"""LSTM of images, signals or volumes: convolutions in the place of the matrices.

    .. math::
        (\tilde i, \tilde f, \tilde g, \tilde o)_t &= W * x_t + R * h_{t-1} + b \\
        c_t &= \sigma(\tilde f_t + p_f \odot c_{t-1}) \odot c_{t-1} +
            \sigma(\tilde i_t + p_i \odot c_{t-1}) \odot \tanh(\tilde g_t) \\
        h_t &= \sigma(\tilde o_t + p_o \odot c_t) \odot \tanh(c_t)

    with :math:`p = 0` unless ``peephole``. :math:`*` is a convolution as torch.nn has it, with zeros around and a
    result of the input's size. Shi et al. 2015, "Convolutional LSTM Network: A Machine Learning Approach for
    Precipitation Nowcasting", arXiv:1506.04214.

    Args:
        input_size: channels of the input.
        hidden_size: channels of ``h`` and of ``c``.
        kernel_size: of both convolutions, odd; a number, or ``dim`` of them.
        num_layers: layers, each of which reads the output of the one before.
        bias: False leaves out ``b``.
        batch_first: the input and the output are ``(B, T, ...)`` instead of ``(T, B, ...)``; states are
            ``(num_layers * num_directions, B, ...)`` in either case.
        dropout: probability of a zero in the output of each layer but the last, in training.
        bidirectional: a second direction runs from a sequence's last step to its first; its channels are
            appended to the first one's.
        dim: dimensions of the space, 1, 2 or 3.
        peephole: the gates see ``c``, by a weight for each channel, or, with ``spatial_size``, for each channel and
            place, as the paper has it.
        spatial_size: size of the space, a number or ``dim`` of them: that of peepholes with a weight for each
            place. Inputs of another size are then refused. None, the default, is any size.
        device: of the parameters.
        dtype: of the parameters. States are float32, and float64 if they are, under autocast too.

    Attributes:
        weight_ih_l{k}[_reverse]: ``(4 * hidden_size, in, *kernel_size)``, the rows of i, f, g, o; ``in`` is
            ``input_size`` for ``k = 0``, else ``num_directions * hidden_size``.
        bias_ih_l{k}[_reverse]: ``(4 * hidden_size,)``.
        weight_hh_l{k}[_reverse]: ``(4 * hidden_size, hidden_size, *kernel_size)``, R.
        peephole_l{k}[_reverse]: ``(3, hidden_size, *spatial_size)``, of i, f, o, with ``peephole``; ones in the
            place of ``spatial_size`` if that is None.

    Raises:
        TypeError: a size is no integer, or ``bias``, ``batch_first``, ``bidirectional`` or ``peephole`` no bool.
        ValueError: a size is below 1, ``kernel_size`` is even or not of ``dim`` numbers, ``dim`` is not 1, 2 or 3,
            ``dropout`` is outside [0, 1], or ``spatial_size`` comes without ``peephole``.

    Notes:
        A graph of torch.export or torch.compile has the steps one by one, for one ``T``; ``B`` and the space may be
        dynamic. TorchScript has a loop. :func:`torch_ext.init.forget_bias_` and :func:`torch_ext.init.chrono_`
        initialise its forget gate.

    Example:
        >>> rnn = torch_ext.ConvLSTM(1, 8, kernel_size=3, num_layers=2, batch_first=True)
        >>> x = torch.randn(4, 10, 1, 16, 16)  # ten images of 16 x 16
        >>> y, (h, c) = rnn(x)
        >>> y.shape, h.shape
        (torch.Size([4, 10, 8, 16, 16]), torch.Size([2, 4, 8, 16, 16]))
        >>> state = rnn.init_state(4, [16, 16])
        >>> for t in range(10):
        ...     y_t, state = rnn.step(x[:, t], state)
        >>> torch.allclose(y_t, y[:, -1], atol=1e-5)
        True
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: int | tuple[int, ...],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        dim: int = 2,
        peephole: bool = False,
        spatial_size: int | tuple[int, ...] | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._set_convolution(kernel_size, bias, batch_first, bidirectional, dim)
        check_bool("ConvLSTM", "peephole", peephole)
        self.gate_names = "ifgo"
        self.peephole = peephole
        if spatial_size is not None:
            if not peephole:
                raise ValueError(
                    f"ConvLSTM: spatial_size is {spatial_size}, expected None with peephole=False"
                )
            self.spatial_size = self._sizes("spatial_size", spatial_size)
        super().__init__(
            4,
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

    def parameter_shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        shapes = super().parameter_shapes(input_size)
        if self.peephole:
            shapes["peephole"] = (3, self.hidden_size, *(self.spatial_size or [1] * self.dim))
        return shapes

    def num_states(self) -> int:
        return 2

    def cell(self, gates: Tensor, weights: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        R, c = weights[0], state[1]
        a = (gates + self._convolve(state[0].to(R.dtype), R, None)).to(c.dtype)
        i, f, g, o = a.chunk(4, 1)
        if self.peephole:
            peephole = weights[1].to(c.dtype)
            i, f = i + peephole[0] * c, f + peephole[1] * c
        g = torch.tanh(g)
        new = min_lstm_step(
            f.flatten(1), i.flatten(1), g.flatten(1), c.flatten(1), None, "identity", False
        )[1]
        c = new.view_as(c)
        if self.peephole:
            o = o + weights[1].to(c.dtype)[2] * c
        return [torch.sigmoid(o) * torch.tanh(c), c]

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Runs all steps.

        Args:
            x: ``(T, B, input_size, *space)``; ``(B, T, input_size, *space)`` with ``batch_first``; ``(T,
                input_size, *space)`` without a batch.
            state: ``h`` and ``c``, ``(num_layers * num_directions, B, hidden_size, *space)`` each, without
                ``B`` for an ``x`` without a batch. Zeros if omitted.

        Returns:
            The last layer's output, as ``x`` with ``num_directions * hidden_size`` channels, and the final state,
            in the form of ``state``, float32 or float64.

        Raises:
            ValueError: another shape of ``x`` or of ``state``.
            TypeError: ``x`` has, outside autocast, another dtype than the parameters, or ``state`` is no pair of
                floating-point tensors.
        """
        states: list[Tensor] | None = None
        if state is not None:
            if not torch.jit.is_scripting():
                check_state_type(self._name, state, 2)
            states = [state[0], state[1]]
        y, final = self._forward_space(x, states)
        return y, (final[0], final[1])

    @torch.jit.export
    def init_state(self, batch_size: int, spatial_size: list[int]) -> tuple[Tensor, Tensor]:
        """Zeros ``h`` and ``c``, ``(num_layers * num_directions, B, hidden_size, *spatial_size)`` each."""
        state = self._first_states(batch_size, spatial_size)
        return state[0], state[1]

    @torch.jit.export
    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One step, for streaming; differentiable.

        Args:
            x: ``(B, input_size, *space)``.
            state: from ``init_state``, ``forward`` or ``step``.

        Returns:
            The last layer's output ``(B, hidden_size, *space)`` and the new state.

        Raises:
            RuntimeError: the module is bidirectional.
            ValueError: another shape of ``x`` or of ``state``.
        """
        if not torch.jit.is_scripting():
            check_state_type(f"{self._name}.step", state, 2)
        y, final = self._step_space(x, [state[0], state[1]])
        return y, (final[0], final[1])


class ConvGRU(ConvLayer):
    r"""GRU of images, signals or volumes: convolutions in the place of the matrices.

    .. math::
        r_t &= \sigma(W_r * x_t + R_r * h_{t-1} + b_r), \qquad
            z_t = \sigma(W_z * x_t + R_z * h_{t-1} + b_z) \\
        n_t &= \tanh(W_n * x_t + R_n * (r_t \odot h_{t-1}) + b_n) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    :math:`*` is a convolution as torch.nn has it, with zeros around and a result of the input's size. Ballas et al.
    2016, "Delving Deeper into Convolutional Networks for Learning Video Representations", arXiv:1511.06432, whose
    ``z`` is what is :math:`1 - z` here and in torch.nn.GRU.

    Args:
        input_size: channels of the input.
        hidden_size: channels of ``h``.
        kernel_size: of all convolutions, odd; a number, or ``dim`` of them.
        num_layers: layers, each of which reads the output of the one before.
        bias: False leaves out the biases.
        batch_first: the input and the output are ``(B, T, ...)`` instead of ``(T, B, ...)``; states are
            ``(num_layers * num_directions, B, ...)`` in either case.
        dropout: probability of a zero in the output of each layer but the last, in training.
        bidirectional: a second direction runs from a sequence's last step to its first; its channels are
            appended to the first one's.
        dim: dimensions of the space, 1, 2 or 3.
        reset_after: :math:`r_t \odot (R_n * h_{t-1} + b_{hn})`, as torch.nn.GRU has it, in the place of :math:`R_n *
            (r_t \odot h_{t-1})`: one convolution of the state in a step instead of two, one after the other.
        device: of the parameters.
        dtype: of the parameters. States are float32, and float64 if they are, under autocast too.

    Attributes:
        weight_ih_l{k}[_reverse]: ``(3 * hidden_size, in, *kernel_size)``, the rows of r, z, n; ``in`` is
            ``input_size`` for ``k = 0``, else ``num_directions * hidden_size``.
        bias_ih_l{k}[_reverse]: ``(3 * hidden_size,)``.
        weight_hh_l{k}[_reverse]: ``(3 * hidden_size, hidden_size, *kernel_size)``, R.
        bias_hh_l{k}[_reverse]: ``(3 * hidden_size,)``, with ``reset_after``.

    Raises:
        TypeError: a size is no integer, or ``bias``, ``batch_first``, ``bidirectional`` or ``reset_after`` no bool.
        ValueError: a size is below 1, ``kernel_size`` is even or not of ``dim`` numbers, ``dim`` is not 1, 2 or 3, or
            ``dropout`` is outside [0, 1].

    Notes:
        A graph of torch.export or torch.compile has the steps one by one, for one ``T``; ``B`` and the space may be
        dynamic. TorchScript has a loop. :func:`torch_ext.init.forget_bias_` and :func:`torch_ext.init.chrono_`
        initialise the bias of ``z``.

    Example:
        >>> rnn = torch_ext.ConvGRU(2, 8, kernel_size=5, batch_first=True, dim=1)
        >>> x = torch.randn(4, 10, 2, 100)  # signals of 100 samples
        >>> y, h = rnn(x)
        >>> y.shape, h.shape
        (torch.Size([4, 10, 8, 100]), torch.Size([1, 4, 8, 100]))
        >>> y_t, h = rnn.step(x[:, 0], h)
        >>> y_t.shape
        torch.Size([4, 8, 100])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: int | tuple[int, ...],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        dim: int = 2,
        reset_after: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._set_convolution(kernel_size, bias, batch_first, bidirectional, dim)
        check_bool("ConvGRU", "reset_after", reset_after)
        self.gate_names = "rzn"
        self.reset_after = reset_after
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

    def parameter_shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        shapes = super().parameter_shapes(input_size)
        if self.reset_after and self.bias:
            shapes["bias_hh"] = (3 * self.hidden_size,)
        return shapes

    def cell(self, gates: Tensor, weights: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        R, h = weights[0], state[0]
        x = gates.to(h.dtype)
        if self.reset_after:
            a = self._convolve(h.to(R.dtype), R, weights[1] if self.bias else None).to(h.dtype)
            xr, xz, xn = x.chunk(3, 1)
            ar, az, an = a.chunk(3, 1)
            r, z = torch.sigmoid(xr + ar), xz + az
            n = torch.tanh(xn + r * an)
        else:
            size = self.hidden_size
            a = x[:, : 2 * size] + self._convolve(h.to(R.dtype), R[: 2 * size], None).to(h.dtype)
            r, z = a.chunk(2, 1)
            u = (torch.sigmoid(r) * h).to(R.dtype)
            n = torch.tanh(x[:, 2 * size :] + self._convolve(u, R[2 * size :], None).to(h.dtype))
        # min_gru's gate is the share of what is new.
        new = min_gru_step((-z).flatten(1), n.flatten(1), h.flatten(1))[1]
        return [new.view_as(h)]

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs all steps.

        Args:
            x: ``(T, B, input_size, *space)``; ``(B, T, input_size, *space)`` with ``batch_first``; ``(T,
                input_size, *space)`` without a batch.
            state: ``(num_layers * num_directions, B, hidden_size, *space)``, without ``B`` for an ``x`` without
                a batch. Zeros if omitted.

        Returns:
            The last layer's output, as ``x`` with ``num_directions * hidden_size`` channels, and the final state,
            in the form of ``state``, float32 or float64.

        Raises:
            ValueError: another shape of ``x`` or of ``state``.
            TypeError: ``x`` has, outside autocast, another dtype than the parameters, or ``state`` is no
                floating-point tensor.
        """
        states: list[Tensor] | None = None
        if state is not None:
            if not torch.jit.is_scripting():
                check_state_type(self._name, state)
            states = [state]
        y, final = self._forward_space(x, states)
        return y, final[0]

    @torch.jit.export
    def init_state(self, batch_size: int, spatial_size: list[int]) -> Tensor:
        """Zeros ``(num_layers * num_directions, B, hidden_size, *spatial_size)``."""
        return self._first_states(batch_size, spatial_size)[0]

    @torch.jit.export
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step, see :meth:`ConvLSTM.step`."""
        if not torch.jit.is_scripting():
            check_state_type(f"{self._name}.step", state)
        y, final = self._step_space(x, [state])
        return y, final[0]
