"""What all layers with torch.nn.GRU's contract share: parameters, directions, padding, state.

A layer is a :class:`SequenceLayer` that says how many gates it has and calls its operator in
``recurrence`` and ``recurrence_step``. One state per layer: :class:`OneStateLayer`.

The methods that TorchScript compiles (all but the constructor's and the PackedSequence ones) are
written in its subset of Python: full annotations, states as lists of tensors.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

# The bias itself, or the (shortest, longest) time that a unit remembers, see chrono_.
GateBiasInit = float | tuple[float, float] | None


class SequenceLayer(nn.Module):
    """Stacked, possibly bidirectional recurrence with the constructor of :class:`torch.nn.GRU`.

    Parameters of layer ``k``: ``weight_ih_l{k}`` ``(num_gates * hidden_size, in)`` and
    ``bias_ih_l{k}``, with the suffix ``_reverse`` for the second direction, then those that a
    subclass adds in ``parameter_shapes``.
    """

    _flat_weights: list[Tensor]

    def __init__(
        self,
        num_gates: int,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        gate_bias_init: GateBiasInit,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self._name = type(self).__name__
        for argument, value in [
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ]:
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{self._name}: {argument} is {value!r}, expected an integer")
            if value < 1:
                raise ValueError(f"{self._name}: {argument} is {value}, expected at least 1")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"{self._name}: dropout is {dropout}, expected a number in [0, 1]")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"{self._name}: dropout is {dropout} with num_layers=1, but it acts between layers",
                stacklevel=3,
            )
        if gate_bias_init is not None:
            check_gate_bias_init(self._name, gate_bias_init, bias)

        self.num_gates = num_gates
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_directions = 2 if bidirectional else 1
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.gate_bias_init = gate_bias_init

        self._weight_names: list[str] = []
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size * self.num_directions
            for suffix in ["", "_reverse"][: self.num_directions]:
                for kind, shape in self.parameter_shapes(width).items():
                    name = f"{kind}_l{layer}{suffix}"
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(name, parameter)
                    self._weight_names.append(name)
        self.reset_parameters()

    def parameter_shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        """Kind and shape of the parameters of one layer and direction; the first two stay first."""
        rows = self.num_gates * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, input_size)}
        if self.bias:
            shapes["bias_ih"] = (rows,)
        return shapes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ``+-1 / sqrt(hidden_size)``, as torch.nn; then ``gate_bias_init``."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name in self._weight_names:
            getattr(self, name).uniform_(-bound, bound)
        if self.gate_bias_init is not None:
            for name in self._weight_names:
                if name.startswith("bias_ih"):
                    self.init_gate_bias(getattr(self, name))

    def init_gate_bias(self, bias: Tensor) -> None:
        """Writes ``gate_bias_init`` into one ``bias_ih``."""
        raise NotImplementedError

    def recurrence(
        self,
        gates: Tensor,
        weights: list[Tensor],
        state: list[Tensor],
        valid: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """One layer and direction: the operator.

        Args:
            gates: ``(B, T, num_gates * hidden_size)``, the input projection.
            weights: what ``parameter_shapes`` adds to ``weight_ih`` and ``bias_ih``.
            state: of this layer and direction, each ``(B, ...)``.
            valid: ``(B, T, 1)``, False in the padding, where the state must not change.
            cu_seqlens: see :func:`torch_ext.linear_scan`.
            reverse: run from the last step to the first.
        """
        raise NotImplementedError

    def recurrence_step(
        self, gates: Tensor, weights: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One step of one layer: ``gates`` ``(B, num_gates * hidden_size)``."""
        raise NotImplementedError

    def state_sizes(self) -> list[list[tuple[str, int]]]:
        """Of each tensor of the state: its dimensions after ``B``, by name and size."""
        return [[("hidden_size", self.hidden_size)]]

    def zero_state(self, batch_size: int) -> list[Tensor]:
        """The state before the first step, each ``(num_layers * num_directions, B, ...)``."""
        weight = self._weights()[0]
        state: list[Tensor] = []
        for sizes in self.state_sizes():
            shape = [self.num_layers * self.num_directions, batch_size]
            for _, size in sizes:
                shape.append(size)
            state.append(
                torch.zeros(
                    shape,
                    dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
                    device=weight.device,
                )
            )
        return state

    def flatten_parameters(self) -> None:
        """Nothing to do; here because users of torch.nn.GRU call it."""

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        for option, default in [
            ("num_layers", 1),
            ("bias", True),
            ("batch_first", False),
            ("dropout", 0.0),
            ("bidirectional", False),
            ("activation", "identity"),
            ("normalize", True),
            ("gate_bias_init", None),
        ]:
            value = getattr(self, option, default)
            if value != default:
                text += f", {option}={value!r}"
        return text

    def __prepare_scriptable__(self) -> "SequenceLayer":
        # TorchScript has no getattr by a computed name, so a scripted layer gets its parameters as
        # a list of the same tensors, as torch.nn's RNNs do. Eager code never looks at the list.
        self._flat_weights = [getattr(self, name) for name in self._weight_names]
        return self

    def _weights(self) -> list[Tensor]:
        if torch.jit.is_scripting():
            return self._flat_weights
        else:
            return [getattr(self, name) for name in self._weight_names]

    def _weights_of(self, layer: int, direction: int) -> list[Tensor]:
        weights = self._weights()
        count = len(weights) // (self.num_layers * self.num_directions)
        at = (layer * self.num_directions + direction) * count
        return weights[at : at + count]

    def _project(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        return F.linear(x, weights[0], weights[1] if self.bias else None)

    def _run(
        self,
        x: Tensor,
        state: list[Tensor],
        valid: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers: ``x`` ``(B, T, input_size)``, states as in ``zero_state``."""
        final_states: list[list[Tensor]] = [[] for _ in state]
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            for direction in range(self.num_directions):
                weights = self._weights_of(layer, direction)
                at = layer * self.num_directions + direction
                y, final_state = self.recurrence(
                    self._project(x, weights),
                    weights[2 if self.bias else 1 :],
                    [s[at] for s in state],
                    valid,
                    cu_seqlens,
                    direction == 1,
                )
                outputs.append(y)
                for k in range(len(state)):
                    final_states[k].append(final_state[k])
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if valid is not None:
                x = torch.where(valid, x, 0.0)
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, [torch.stack(s) for s in final_states]

    def _forward(
        self, x: Tensor, state: list[Tensor] | None, lengths: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """torch.nn.GRU's contract around ``_run``."""
        if not torch.jit.is_scripting():
            for part in state or []:
                check_state_type(self._name, part)
            if isinstance(x, PackedSequence):
                return self._forward_packed(x, state, lengths)
            self._check_dtype(x)
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            shape = "(B, T, " if self.batch_first else "(T, B, "
            raise ValueError(
                f"{self._name}: x has shape {shape_text(x)}, expected {shape}input_size="
                f"{self.input_size}), or (T, input_size={self.input_size}) without a batch"
            )
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1).contiguous()  # a strided x would cost the projection more

        batch_size = x.shape[0]
        if state is None:
            state = self.zero_state(batch_size)
        elif batched:
            self._check_state(state, batch_size)
        else:
            for k, sizes in enumerate(self.state_sizes()):
                if state[k].dim() != 1 + len(sizes):
                    names = "num_layers * num_directions"
                    for name, _ in sizes:
                        names += f", {name}"
                    raise ValueError(
                        f"{self._name}: state has shape {shape_text(state[k])}, expected ({names}) "
                        f"since x has no batch"
                    )
            state = [s.unsqueeze(1) for s in state]
            self._check_state(state, 1)

        valid: Tensor | None = None
        if lengths is not None:
            if not batched:
                raise ValueError(f"{self._name}: lengths is given, expected None without a batch")
            self._check_lengths(lengths, batch_size, x.shape[1])
            steps = torch.arange(x.shape[1], device=x.device)
            valid = (steps < lengths.to(x.device).unsqueeze(1)).unsqueeze(2)
            x = torch.where(valid, x, 0.0)  # else NaN in the padding reaches the weights' gradients

        y, state = self._run(x, state, valid, None)
        if not batched:
            return y.squeeze(0), [s.squeeze(1) for s in state]
        return y if self.batch_first else y.transpose(0, 1), state

    @torch.jit.unused
    def _forward_packed(
        self, x: PackedSequence, state: list[Tensor] | None, lengths: Tensor | None
    ) -> tuple[PackedSequence, list[Tensor]]:
        """Puts the sequences end to end, runs them so, without padding, and undoes it."""
        if lengths is not None:
            raise ValueError(f"{self._name}: lengths is given, expected None for a PackedSequence")
        self._check_dtype(x.data)
        if x.data.dim() != 2 or x.data.shape[1] != self.input_size:
            raise ValueError(
                f"{self._name}: x.data has shape {shape_text(x.data)}, "
                f"expected (num_steps, input_size={self.input_size})"
            )
        batch_size = int(x.batch_sizes[0])
        if state is None:
            state = self.zero_state(batch_size)
        else:
            self._check_state(state, batch_size)
            if x.sorted_indices is not None:
                state = [s.index_select(1, x.sorted_indices) for s in state]

        order, cu_seqlens = sequence_order(x.batch_sizes)
        order = order.to(x.data.device)
        y, state = self._run(x.data[order].unsqueeze(0), state, None, cu_seqlens)
        y = y.squeeze(0)[torch.argsort(order)]
        if x.unsorted_indices is not None:
            state = [s.index_select(1, x.unsorted_indices) for s in state]
        return PackedSequence(y, x.batch_sizes, x.sorted_indices, x.unsorted_indices), state

    def _step(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if self.bidirectional:
            raise RuntimeError(
                f"{self._name}.step: bidirectional is True, expected False: "
                f"the second direction begins at a sequence's end"
            )
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise ValueError(
                f"{self._name}.step: x has shape {shape_text(x)}, "
                f"expected (B, input_size={self.input_size})"
            )
        if not torch.jit.is_scripting():
            for part in state:
                check_state_type(f"{self._name}.step", part)
        self._check_state(state, x.shape[0])
        new_states: list[list[Tensor]] = [[] for _ in state]
        for layer in range(self.num_layers):
            weights = self._weights_of(layer, 0)
            x, new_state = self.recurrence_step(
                self._project(x, weights),
                weights[2 if self.bias else 1 :],
                [s[layer] for s in state],
            )
            for k in range(len(state)):
                new_states[k].append(new_state[k])
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, [torch.stack(s) for s in new_states]

    def _check_state(self, state: list[Tensor], batch_size: int) -> None:
        rows = self.num_layers * self.num_directions
        for k, sizes in enumerate(self.state_sizes()):
            shape = [rows, batch_size]
            for _, size in sizes:
                shape.append(size)
            if list(state[k].shape) != shape:
                text = f"num_layers * num_directions={rows}, B={batch_size}"
                for name, size in sizes:
                    text += f", {name}={size}"
                raise ValueError(
                    f"{self._name}: state has shape {shape_text(state[k])}, expected ({text})"
                )

    def _check_lengths(self, lengths: Tensor, batch_size: int, num_steps: int) -> None:
        if not torch.jit.is_scripting():
            check_lengths_type(self._name, lengths)
        if lengths.dim() != 1 or lengths.shape[0] != batch_size:
            raise ValueError(
                f"{self._name}: lengths has shape {shape_text(lengths)}, expected (B={batch_size})"
            )
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"{self._name}: lengths has dtype {lengths.dtype}, expected an integer")
        # Looking at the values of a tensor on a GPU would make the CPU wait for it, and a graph
        # that is being recorded has no values.
        if lengths.is_cpu and batch_size > 0 and not is_compiling():
            low, high = int(lengths.min()), int(lengths.max())
            if low < 0 or high > num_steps:
                raise ValueError(
                    f"{self._name}: lengths has values from {low} to {high}, "
                    f"expected values from 0 to T={num_steps}"
                )

    @torch.jit.unused
    def _check_dtype(self, x: Tensor) -> None:
        dtype = self._weights()[0].dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{self._name}: x has dtype {x.dtype}, expected {dtype}, that of the parameters"
            )


class OneStateLayer(SequenceLayer):
    """A :class:`SequenceLayer` whose state is one tensor."""

    def forward(
        self, x: Tensor, state: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs all steps.

        Args:
            x: ``(T, B, input_size)``; ``(B, T, input_size)`` with ``batch_first``;
                ``(T, input_size)`` without a batch; or, outside TorchScript, a
                :class:`~torch.nn.utils.rnn.PackedSequence`, for which no padding is computed.
            state: ``(num_layers * num_directions, B, hidden_size)``, float32 (float64 in a double
                module); without ``B`` for an ``x`` without a batch. Zeros if omitted.
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
            states = [state]
        y, states = self._forward(x, states, lengths)
        return y, states[0]

    @torch.jit.export
    def init_state(self, batch_size: int) -> Tensor:
        """Zeros ``(num_layers * num_directions, B, hidden_size)``."""
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
            RuntimeError: the module is bidirectional.
        """
        y, states = self._step(x, [state])
        return y, states[0]


def sequence_order(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """How to put the sequences of a PackedSequence end to end.

    Its data has all first steps, then all second steps; step ``t`` has ``batch_sizes[t]`` rows.

    Returns:
        The index of the data's rows in the order of sequences, and ``cu_seqlens``.

    Example:
        >>> sequence_order(torch.tensor([2, 2, 1]))  # rows: a0 b0 a1 b1 a2
        (tensor([0, 2, 4, 1, 3]), tensor([0, 3, 5]))
    """
    sequence = torch.arange(int(batch_sizes[0])).unsqueeze(1)
    first_row = batch_sizes.cumsum(0) - batch_sizes
    present = sequence < batch_sizes
    return (first_row + sequence)[present], F.pad(present.sum(1).cumsum(0), (1, 0))


def chrono_(logit: Tensor, shortest: float, longest: float) -> Tensor:
    r"""Fills ``logit`` with those of ``1 - 1 / tau``, ``tau`` uniform in a range of steps.

    .. math::
        \text{logit} = \log(\tau - 1), \quad \tau \sim U(\text{shortest}, \text{longest})

    A unit that keeps the share ``1 - 1 / tau`` of its state at each step remembers about ``tau``
    steps. Tallec & Ollivier 2018, "Can recurrent neural networks warp time?", arXiv:1804.11188,
    section 3 ("chrono initialization"), where the range is 2 to the longest dependency.
    """
    return logit.uniform_(shortest, longest).sub_(1).log_()


def check_gate_bias_init(name: str, init: GateBiasInit, bias: bool) -> None:
    if not bias:
        raise ValueError(f"{name}: gate_bias_init is {init}, expected None with bias=False")
    if isinstance(init, tuple | list) and not (len(init) == 2 and 1 < init[0] <= init[1]):
        raise ValueError(
            f"{name}: gate_bias_init is {init}, expected a number, "
            "or (shortest, longest) with 1 < shortest <= longest"
        )


def is_compiling() -> bool:
    """Under torch.compile or torch.export; a scripted module is neither."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_compiling()


def shape_text(x: Tensor) -> str:
    return "(" + ", ".join([str(size) for size in x.shape]) + ")"


def check_lengths_type(owner: str, lengths: object) -> None:
    """That lengths are a tensor. For Python: TorchScript knows by itself."""
    if not isinstance(lengths, Tensor):
        raise TypeError(
            f"{owner}: lengths is {type(lengths).__name__}, expected a tensor of integers, (B,)"
        )


def check_state_type(owner: str, state: object, tensors: int = 1) -> None:
    """That a state is a tensor, or a tuple of so many. For Python: TorchScript knows by itself."""
    many = isinstance(state, tuple | list)
    parts = list(state) if many else [state]
    if (
        (tensors > 1) == many
        and len(parts) == tensors
        and all(isinstance(part, Tensor) for part in parts)
    ):
        return
    came = (
        "(" + ", ".join([type(part).__name__ for part in parts]) + ")"
        if many
        else type(state).__name__
    )
    expected = "a tensor" if tensors == 1 else f"a tuple of {tensors} tensors"
    raise TypeError(f"{owner}: state is {came}, expected {expected}, as init_state makes it")
