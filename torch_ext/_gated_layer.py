"""What the layers of the gated recurrences share: heads, the options that torch.nn does not have, and
torch.nn's contract where they carry torch.nn's names.

As in ``_sequence_layer``, what TorchScript compiles is written in its subset of Python.
"""

import numbers
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ._sequence_layer import SequenceLayer, sequence_order, shape_text


class GatedLayer(SequenceLayer):
    """A :class:`SequenceLayer` over one of the gated recurrences.

    A subclass calls ``_set_options`` before the constructor here, gives its parameters in
    ``parameter_shapes`` in the order of its ``state_dict``, and calls its operator in ``gated`` and
    ``recurrence_step``.
    """

    _flat_weights: list[Tensor]
    recurrent_clip: float | None
    recurrent_max: float | None
    __jit_unused_properties__ = ["all_weights"]

    def _set_options(
        self,
        hidden_size: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        num_heads: int,
        layer_norm: str,
        zoneout: float,
        recurrent_dropout: float,
        input_dropout: float,
        weight_dropout: float,
        recurrent_clip: float | None,
        output_size: int = 0,
        zoneout_c: float = 0.0,
    ) -> None:
        """Checks and keeps what all have: before the constructor, which makes parameters by it."""
        owner = type(self).__name__
        for argument, flag in [("bias", bias), ("batch_first", batch_first)]:
            check_bool(owner, argument, flag)
        check_heads(owner, num_heads, [("hidden_size", hidden_size), ("proj_size", output_size)])
        check_word(owner, "layer_norm", layer_norm, ["none", "haste"])
        for argument, share in [
            ("dropout", dropout),
            ("zoneout", zoneout),
            ("zoneout_c", zoneout_c),
            ("recurrent_dropout", recurrent_dropout),
            ("input_dropout", input_dropout),
            ("weight_dropout", weight_dropout),
        ]:
            check_share(owner, argument, share)
        check_bound(owner, "recurrent_clip", recurrent_clip)
        self.num_heads = num_heads
        self.layer_norm = layer_norm
        self.norm_eps = 1e-5
        self.zoneout = float(zoneout)
        self.zoneout_c = float(zoneout_c)
        self.recurrent_dropout = float(recurrent_dropout)
        self.input_dropout = float(input_dropout)
        self.weight_dropout = float(weight_dropout)
        self.recurrent_clip = None if recurrent_clip is None else float(recurrent_clip)
        self.recurrent_max = None
        self.proj_size = output_size
        self._units = hidden_size // num_heads
        # Whether errors and states are torch.nn's, and whether its own kernel computes the same.
        self._like_torch = False
        self._plain = False
        # Where gated() finds a parameter in the list that it is given; -1 if there is none.
        self._at = {
            name: -1
            for name in (
                *("weight_hh", "bias_hh", "weight_hr", "peephole", "input_norm_weight"),
                *("recurrent_norm_weight", "cell_norm_weight", "cell_norm_bias"),
            )
        }

    def _finish(self) -> None:
        """After the constructor: where each parameter stands."""
        kinds = [
            k for k in self.parameter_shapes(self.input_size) if k not in ("weight_ih", "bias_ih")
        ]
        for at, kind in enumerate(kinds):
            self._at[kind] = at

    def _norm_shapes(self) -> dict[str, tuple[int, ...]]:
        rows = (self.num_gates * self.hidden_size,)
        if self.layer_norm == "none":
            return {}
        return {"input_norm_weight": rows, "recurrent_norm_weight": rows}

    def parameter_shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        rows = self.num_gates * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, input_size),
            "weight_hh": (rows, self.output_size() // self.num_heads),
        }
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        return shapes | self._norm_shapes()

    def output_size(self) -> int:
        return self.hidden_size if self.proj_size == 0 else self.proj_size

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ``+-1 / sqrt(hidden_size)`` as torch.nn, the weights of norms 1, their bias 0."""
        super().reset_parameters()
        for name in self._weight_names:
            if "norm_weight" in name:
                nn.init.ones_(getattr(self, name))
            elif "norm_bias" in name:
                nn.init.zeros_(getattr(self, name))

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, as torch.nn's RNNs have them."""
        weights = [getattr(self, name) for name in self._weight_names]
        count = len(weights) // (self.num_layers * self.num_directions)
        return [weights[at : at + count] for at in range(0, len(weights), count)]

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for option, default in [
            ("proj_size", 0),
            ("nonlinearity", "relu" if type(self).__name__ == "IndRNN" else "tanh"),
            ("coupled", False),
            ("peephole", False),
            ("reset_after", True),
            ("num_heads", 1),
            ("forget_gate", "sigmoid"),
            ("normalizer", "sum"),
            ("layer_norm", "none"),
            ("zoneout", 0.0),
            ("zoneout_c", 0.0),
            ("recurrent_dropout", 0.0),
            ("input_dropout", 0.0),
            ("weight_dropout", 0.0),
            ("recurrent_clip", None),
            ("recurrent_max", None),
        ]:
            value = getattr(self, option, default)
            if value != default:
                text += f", {option}={value!r}"
        return text

    def gated(
        self,
        gates: Tensor,
        weights: list[Tensor],
        state: list[Tensor],
        cu_seqlens: Tensor | None,
        reverse: bool,
        reset: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """One layer and direction: the operator.

        Args:
            gates: ``(B, T, num_gates * hidden_size)``, the input projection.
            weights: all but ``weight_ih`` and ``bias_ih``.
            state: of this layer and direction, each ``(B, ...)``, in the state dtype.
            cu_seqlens: see :func:`torch_ext.lstm`.
            reverse: run from the last step to the first.
            reset: see :func:`torch_ext.lstm`.
        """
        raise NotImplementedError

    def native(
        self, x: Tensor, batch_sizes: Tensor | None, state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers by torch's own kernel, where ``_plain`` says that it computes the same."""
        return x, state

    def _is_plain(self) -> bool:
        """Whether torch's own kernel computes the same, as it does with weights of one dtype."""
        weights = self._weights()
        return self._plain and weights[0].dtype == weights[1].dtype

    # ---- parts of gated() ----
    def _optional(self, weights: list[Tensor], kind: str) -> Tensor | None:
        at = self._at[kind]
        if at < 0:
            return None
        return weights[at]

    def _per_gate(self, weights: list[Tensor], kind: str) -> Tensor | None:
        """A parameter of ``num_gates * hidden_size``, by gate and head."""
        found = self._optional(weights, kind)
        if found is None:
            return None
        return found.unflatten(0, [self.num_gates, self.num_heads, self._units])

    def _recurrent_weight(self, weights: list[Tensor]) -> Tensor:
        """``R`` ``(num_gates, num_heads, K, P)``, in training without what DropConnect leaves out."""
        R = weights[self._at["weight_hh"]]
        if self.training and self.weight_dropout > 0:
            R = F.dropout(R, self.weight_dropout)
        return R.unflatten(0, [self.num_gates, self.num_heads, self._units])

    def _by_gate(self, gates: Tensor) -> Tensor:
        return gates.unflatten(-1, [self.num_gates, self.num_heads, self._units])

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, [self.num_heads, x.shape[-1] // self.num_heads])

    def _recurrent_mask(self, h: Tensor) -> Tensor | None:
        if self.training and self.recurrent_dropout > 0:
            return F.dropout(torch.ones_like(h), self.recurrent_dropout)
        return None

    def _update(self, share: float, gates: Tensor, sizes: list[int]) -> Tensor | None:
        """The share of a new state in what zoneout with this probability keeps, for each step."""
        if share == 0:
            return None
        shape: list[int] = []
        for size in gates.shape[:-1]:
            shape.append(size)
        for size in sizes:
            shape.append(size)
        dtype = torch.float64 if gates.dtype == torch.float64 else torch.float32
        if self.training:
            return (torch.rand(shape, dtype=dtype, device=gates.device) >= share).to(dtype)
        return torch.full([1] * len(shape), 1 - share, dtype=dtype, device=gates.device).expand(
            shape
        )

    # ---- all layers ----
    def _weights_of(self, layer: int, direction: int) -> list[Tensor]:
        weights = self._weights()
        count = len(weights) // (self.num_layers * self.num_directions)
        at = (layer * self.num_directions + direction) * count
        weights = weights[at : at + count]
        if not self.bias:
            return weights
        return [weights[0], weights[2], weights[1]] + weights[3:]  # those of the input first

    def _project(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        bias = weights[1] if self.bias else None
        norm = self._optional(weights[2 if self.bias else 1 :], "input_norm_weight")
        if norm is None:
            return F.linear(x, weights[0], bias)
        gates = self._by_gate(F.linear(x, weights[0]))
        dtype = gates.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        gates = gates.to(wide)
        gates = gates - gates.mean([-3, -1], keepdim=True)
        gates = gates * torch.rsqrt(gates.square().mean([-3, -1], keepdim=True) + self.norm_eps)
        gates = gates.flatten(-3) * norm.to(wide)
        if bias is not None:
            gates = gates + bias.to(wide)
        return gates.to(dtype)

    def _run_gated(
        self,
        x: Tensor,
        state: list[Tensor],
        valid: Tensor | None,
        cu_seqlens: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers: ``x`` ``(B, T, input_size)``, states as in ``zero_state``."""
        final_states: list[list[Tensor]] = [[] for _ in state]
        for layer in range(self.num_layers):
            if self.training and self.input_dropout > 0:
                rows = torch.ones([state[0].shape[1], x.shape[2]], dtype=x.dtype, device=x.device)
                mask = F.dropout(rows, self.input_dropout)
                if cu_seqlens is None:
                    x = x * mask.unsqueeze(1)
                else:
                    steps = torch.arange(x.shape[1], device=x.device)
                    ends = cu_seqlens[1:].to(x.device)
                    x = x * mask[torch.bucketize(steps, ends, right=True)]
            outputs: list[Tensor] = []
            for direction in range(self.num_directions):
                weights = self._weights_of(layer, direction)
                at = layer * self.num_directions + direction
                y, final_state = self.gated(
                    self._project(x, weights),
                    weights[2 if self.bias else 1 :],
                    [s[at] for s in state],
                    cu_seqlens,
                    direction == 1,
                    reset,
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

    def _run_padded(
        self, x: Tensor, state: list[Tensor], lengths: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Rows filled up to ``T`` steps, as sequences end to end: each row's own, then its padding,
        which is a sequence too, from a state of zeros that nobody looks at."""
        rows, steps = x.shape[0], x.shape[1]
        lengths = lengths.to(x.device).long().clamp(0, steps)
        begin = torch.arange(rows, device=x.device) * steps
        inner = torch.stack([begin, begin + lengths], 1).flatten()
        end = torch.full([1], rows * steps, dtype=inner.dtype, device=x.device)
        cu_seqlens = torch.cat([inner, end])

        valid = (torch.arange(steps, device=x.device) < lengths.unsqueeze(1)).reshape(1, -1)
        # The padding's state is zero at every step, or a recurrence that grows would overflow there.
        reset = ~valid if reset is None else reset.reshape(1, -1) | ~valid
        valid = valid.unsqueeze(2)
        x = x.reshape(1, rows * steps, x.shape[2])
        x = torch.where(valid, x, 0.0)  # else NaN in the padding reaches the weights' gradients
        state = [torch.stack([s, torch.zeros_like(s)], 2).flatten(1, 2) for s in state]
        y, state = self._run_gated(x, state, valid, cu_seqlens, reset)
        return y.reshape(rows, steps, y.shape[2]), [s[:, ::2] for s in state]

    def _state_in(self, like: Tensor, state: list[Tensor] | None, batch_size: int) -> list[Tensor]:
        """The initial state in the state dtype."""
        if state is None:
            return self.zero_state(batch_size)
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return [s.to(wide) for s in state]

    def _state_out(
        self, y: Tensor, final: list[Tensor], given: list[Tensor] | None
    ) -> list[Tensor]:
        """The final state in the dtype of the one that was given, else, as torch.nn, of ``y``."""
        if given is not None:
            return [final[k].to(given[k].dtype) for k in range(len(final))]
        return [s.to(y.dtype) for s in final] if self._like_torch else final

    def _forward_gated(
        self,
        x: Tensor,
        state: list[Tensor] | None,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """torch.nn's contract around ``_run_gated``."""
        if not torch.jit.is_scripting():
            if isinstance(x, PackedSequence):
                return self._packed_gated(x, state, lengths, reset)
            self._check_type(x)
        batched = x.dim() == 3
        if x.dim() not in (2, 3):
            raise ValueError(self._bad_shape(x))
        if x.shape[-1] != self.input_size:
            raise RuntimeError(self._bad_shape(x))
        time = 1 if self.batch_first else 0
        if not batched:
            x = x.unsqueeze(1 - time)
        batch_size, num_steps = x.shape[1 - time], x.shape[time]
        if state is not None:
            self._check_hx(x, state, batch_size, batched)
            if not batched:
                state = [s.unsqueeze(1) for s in state]
        if lengths is not None:
            if not batched:
                raise ValueError(f"{self._name}: lengths is given, expected None without a batch")
            self._check_lengths(lengths, batch_size, num_steps)
        if reset is not None:
            if not batched:
                if reset.dim() != 1:
                    self._bad_reset(reset, [num_steps])
                reset = reset.unsqueeze(1 - time)
            self._check_reset(
                reset, [batch_size, num_steps] if self.batch_first else [num_steps, batch_size]
            )

        if (
            lengths is None
            and reset is None
            and _native_is_best(x, self._is_plain(), self.training)
        ):
            if state is None:
                given = [s.to(x.dtype) for s in self.zero_state(batch_size)]
            else:
                given = [s.to(x.dtype) for s in state]
            y, final = self.native(x, None, given)
            final = self._state_out(y, final, state)
            if not batched:
                return y.squeeze(1 - time), [s.squeeze(1) for s in final]
            return y, final

        if not self.batch_first:
            x = x.transpose(0, 1).contiguous()  # a strided x would cost the projection more
            if reset is not None:
                reset = reset.transpose(0, 1)
        first = self._state_in(self._weights()[0], state, batch_size)
        if lengths is None:
            y, final = self._run_gated(x, first, None, None, reset)
        else:
            y, final = self._run_padded(x, first, lengths, reset)
        final = self._state_out(y, final, state)
        if not batched:
            return y.squeeze(0), [s.squeeze(1) for s in final]
        # As torch.nn's, whose users call view() on it.
        return y if self.batch_first else y.transpose(0, 1).contiguous(), final

    @torch.jit.unused
    def _packed_gated(
        self,
        x: PackedSequence,
        state: list[Tensor] | None,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[PackedSequence, list[Tensor]]:
        """Puts the sequences end to end, runs them so, without padding, and undoes it."""
        if lengths is not None:
            raise ValueError(f"{self._name}: lengths is given, expected None for a PackedSequence")
        self._check_type(x.data)
        if x.data.dim() != 2 or x.data.shape[1] != self.input_size:
            raise RuntimeError(
                f"{self._name}: input.data has shape {shape_text(x.data)}, "
                f"expected (num_steps, input_size={self.input_size})"
            )
        if reset is not None:
            self._check_reset(reset, [x.data.shape[0]])
        batch_size = int(x.batch_sizes[0])
        if state is not None:
            self._check_hx(x.data, state, batch_size, True)
        first = self._state_in(self._weights()[0], state, batch_size)
        if x.sorted_indices is not None:
            first = [s.index_select(1, x.sorted_indices) for s in first]
        if reset is None and _native_is_best(x.data, self._is_plain(), self.training):
            y, final = self.native(x.data, x.batch_sizes, [s.to(x.data.dtype) for s in first])
        else:
            order, cu_seqlens = sequence_order(x.batch_sizes)
            order = order.to(x.data.device)
            y, final = self._run_gated(
                x.data[order].unsqueeze(0),
                first,
                None,
                cu_seqlens,
                None if reset is None else reset[order].unsqueeze(0),
            )
            y = y.squeeze(0)[torch.argsort(order)]
        if x.unsorted_indices is not None:
            final = [s.index_select(1, x.unsorted_indices) for s in final]
        final = self._state_out(y, final, state)
        return PackedSequence(y, x.batch_sizes, x.sorted_indices, x.unsorted_indices), final

    def _step(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        masks = self.recurrent_dropout > 0 or self.input_dropout > 0 or self.weight_dropout > 0
        if self.training and masks:
            raise RuntimeError(
                f"{self._name}.step: training is True, expected False (call eval()) with "
                f"recurrent_dropout, input_dropout or weight_dropout, which are drawn once a sequence"
            )
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
        self._check_state(state, x.shape[0])
        first = self._state_in(self._weights()[0], state, x.shape[0])
        finals: list[list[Tensor]] = [[] for _ in state]
        for layer in range(self.num_layers):
            weights = self._weights_of(layer, 0)
            x, final = self.recurrence_step(
                self._project(x, weights),
                weights[2 if self.bias else 1 :],
                [s[layer] for s in first],
            )
            for k in range(len(state)):
                finals[k].append(final[k])
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, self._state_out(x, [torch.stack(s) for s in finals], state)

    # ---- checks ----
    @torch.jit.unused
    def _check_type(self, x: Tensor) -> None:
        dtype = self._weights()[0].dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"{self._name}: input has dtype {x.dtype}, expected {dtype}, that of the parameters"
            )

    def _bad_shape(self, x: Tensor) -> str:
        shape = "(B, T, " if self.batch_first else "(T, B, "
        return (
            f"{self._name}: input has shape {shape_text(x)}, expected {shape}input_size="
            f"{self.input_size}), or (T, input_size={self.input_size}) without a batch"
        )

    def _check_hx(self, x: Tensor, state: list[Tensor], batch_size: int, batched: bool) -> None:
        rows = self.num_layers * self.num_directions
        sizes = self.state_sizes()
        for k in range(len(state)):
            name, size = sizes[k][0]
            want = [rows, batch_size, size] if batched else [rows, size]
            if list(state[k].shape) != want:
                text = f"num_layers * num_directions={rows}, "
                if batched:
                    text += f"B={batch_size}, "
                which = "hx" if len(state) == 1 else f"hx[{k}]"
                raise RuntimeError(
                    f"{self._name}: {which} has shape {shape_text(state[k])}, expected "
                    f"({text}{name}={size})"
                )
            if not fits(state[k], x):
                which = "hx" if len(state) == 1 else f"hx[{k}]"
                raise RuntimeError(
                    f"{self._name}: {which} has dtype {state[k].dtype}, expected {x.dtype} or float32"
                )

    def _check_reset(self, reset: Tensor, want: list[int]) -> None:
        if list(reset.shape) != want:
            self._bad_reset(reset, want)
        if reset.dtype != torch.bool:
            raise TypeError(f"{self._name}: reset has dtype {reset.dtype}, expected torch.bool")

    def _bad_reset(self, reset: Tensor, want: list[int]) -> None:
        text = "(" + ", ".join([str(size) for size in want]) + ")"
        raise ValueError(f"{self._name}: reset has shape {shape_text(reset)}, expected {text}")


def _native_is_best(x: Tensor, plain: bool, training: bool) -> bool:
    """Whether torch's own kernel runs a layer that is the same as torch.nn's.

    On CUDA, where there are no kernels of our own for these recurrences yet: cuDNN. Its backward works
    in training mode alone and has no backward of its own, so with gradients in evaluation mode, and under
    ``torch.backends.cudnn.flags(enabled=False)``, ours run. On the CPU ours always do.
    """
    if not torch.jit.is_scripting() and not torch.backends.cudnn.enabled:
        return False
    return plain and x.is_cuda and (training or not torch.is_grad_enabled())


def check_hx_type(owner: str, hx: object, tensors: int) -> None:
    """That ``hx`` is a tensor, or a tuple of so many. For Python: TorchScript knows by itself."""
    many = isinstance(hx, tuple | list)
    parts = list(hx) if many else [hx]
    right = many == (tensors > 1) and len(parts) == tensors
    if right and all(isinstance(part, Tensor) for part in parts):
        return
    came = ", ".join([type(part).__name__ for part in parts])
    expected = "a tensor" if tensors == 1 else f"a tuple of {tensors} tensors"
    raise TypeError(f"{owner}: hx is {'(' + came + ')' if many else came}, expected {expected}")


def fits(state: Tensor, x: Tensor) -> bool:
    """Whether a state's dtype goes with an input's: its own; else, but for doubles, single or half precision,
    which autocast makes of single."""
    if state.dtype == x.dtype:
        return True
    halves = state.dtype == torch.float16 or state.dtype == torch.bfloat16
    return x.dtype != torch.float64 and (state.dtype == torch.float32 or halves)


def check_bool(owner: str, argument: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {argument} is {value!r}, expected a bool")


def check_share(owner: str, argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Number) or not 0 <= value <= 1:
        raise ValueError(f"{owner}: {argument} is {value!r}, expected a number in [0, 1]")


def check_bound(owner: str, argument: str, value: float | None) -> None:
    if value is not None and not value >= 0:
        raise ValueError(f"{owner}: {argument} is {value!r}, expected None or a number, at least 0")


def check_word(owner: str, argument: str, value: object, words: Sequence[str]) -> None:
    if value not in words:
        text = " or ".join(f'"{word}"' for word in words)
        raise ValueError(f"{owner}: {argument} is {value!r}, expected {text}")


def check_heads(owner: str, num_heads: int, sizes: Sequence[tuple[str, int]]) -> None:
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"{owner}: num_heads is {num_heads!r}, expected an integer")
    if num_heads < 1:
        raise ValueError(f"{owner}: num_heads is {num_heads}, expected at least 1")
    for argument, value in sizes:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{owner}: {argument} is {value!r}, expected an integer")
        if value % num_heads:
            raise ValueError(
                f"{owner}: {argument} is {value}, expected a multiple of num_heads={num_heads}"
            )
