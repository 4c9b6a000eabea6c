"""Echo state networks: a fixed random recurrence, and a linear readout fitted in closed form."""

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._gated_layer import check_bool
from ._sequence_layer import check_lengths_type, check_state_type, shape_text
from .elman import elman, elman_step
from .rnn import Device


class EchoStateNetwork(nn.Module):
    r"""Echo state network: a reservoir of fixed random weights, whose linear readout is fitted in closed form.

    .. math::
        h_t &= (1 - a)\, h_{t-1} + a \tanh(W x_t + R\, h_{t-1} + b) \\
        y_t &= W_\text{out} [x_t; h_t] + b_\text{out}

    Jaeger 2001, "The 'echo state' approach to analysing and training recurrent neural networks", GMD report 148;
    Lukosevicius 2012, "A Practical Guide to Applying Echo State Networks". With ``num_layers``, each layer reads the
    states of the one before, and the readout those of all (Gallicchio, Micheli & Pedrelli 2017, "Deep reservoir
    computing: a critical experimental analysis").

    Args:
        input_size: channels of the input.
        hidden_size: units of the reservoir (of each layer).
        output_size: channels of the output.
        num_layers: reservoirs, one above the other.
        batch_first: the input and the output are ``(B, T, ...)`` instead of ``(T, B, ...)``; the state is
            ``(num_layers, B, hidden_size)`` in either case.
        spectral_radius: greatest absolute value of an eigenvalue of each R; 0 leaves no recurrence but the leak.
        density: share of each row of R that is not 0. Each unit sees ``round(density * hidden_size)`` units, at least
            one.
        input_scale: ``W`` is uniform in ``+-input_scale``; that between layers is uniform, with this as its greatest
            singular value.
        bias_scale: ``b`` is uniform in ``+-bias_scale``; with 0, what an input does and what its negative does are
            opposite.
        leak_rate: ``a``, above 0 and at most 1, the share of a state that a step makes new.
        washout: steps at the begin of each sequence that :meth:`fit` leaves out, since the zeros that the state comes
            from are seen in them.
        read_input: False leaves :math:`x_t` out of the readout.
        seed: of the random weights, the same on every device; or a generator of the CPU, to go on with.
        device: of parameters and buffers.
        dtype: of parameters and buffers. States are float32, and float64 if they are, under autocast too.

    Attributes:
        weight_ih: buffer, ``(hidden_size, input_size)``, ``W`` of the first layer.
        weight_between: buffer, ``(num_layers - 1, hidden_size, hidden_size)``, ``W`` of the others.
        weight_hh: buffer, ``(num_layers, hidden_size, hidden_size)``, R. It is kept with its zeros.
        bias_ih: buffer, ``(num_layers, hidden_size)``.
        weight_out: parameter, ``(output_size, num_features)``, zeros until :meth:`fit`; ``num_features`` is
            ``num_layers * hidden_size``, and ``input_size`` with ``read_input``.
        bias_out: parameter, ``(output_size,)``.

    Raises:
        TypeError: a size is no integer, a flag no bool, or another number no number.
        ValueError: a size is below 1, or a number outside its range.

    Notes:
        The readout is also a parameter like any other, for a loss that has no closed form. Gradients flow through the
        reservoir to ``x`` and to the state. Making R takes its eigenvalues, in the order of ``hidden_size ** 3``
        operations. It runs as :func:`torch_ext.elman`, over all steps in one call.

    Example:
        >>> t = torch.arange(400.0)
        >>> series = torch.sin(0.3 * t).reshape(1, -1, 1)
        >>> net = torch_ext.EchoStateNetwork(1, 100, 1, batch_first=True, washout=50)
        >>> state = net.fit(series[:, :300], series[:, 1:301], ridge=1e-6)  # the next value
        >>> y, state = net.generate(series[:, 300], state, 50)  # and on from what it wrote itself
        >>> (y - series[:, 301:351]).abs().max() < 0.05
        tensor(True)
    """

    weight_ih: Tensor
    weight_between: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    # What partial_fit has added up is not a part of the model.
    __jit_ignored_attributes__ = ["_sums"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int = 1,
        batch_first: bool = False,
        *,
        spectral_radius: float = 0.9,
        density: float = 0.1,
        input_scale: float = 1.0,
        bias_scale: float = 1.0,
        leak_rate: float = 1.0,
        washout: int = 0,
        read_input: bool = True,
        seed: int | torch.Generator = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._name = type(self).__name__
        for argument, value, least in [
            ("input_size", input_size, 1),
            ("hidden_size", hidden_size, 1),
            ("output_size", output_size, 1),
            ("num_layers", num_layers, 1),
            ("washout", washout, 0),
        ]:
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{self._name}: {argument} is {value!r}, expected an integer")
            if value < least:
                raise ValueError(f"{self._name}: {argument} is {value}, expected at least {least}")
        check_bool(self._name, "batch_first", batch_first)
        check_bool(self._name, "read_input", read_input)
        for argument, value in [
            ("spectral_radius", spectral_radius),
            ("input_scale", input_scale),
            ("bias_scale", bias_scale),
        ]:
            _check_number(self._name, argument, value)
        for argument, value in [("density", density), ("leak_rate", leak_rate)]:
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise TypeError(f"{self._name}: {argument} is {value!r}, expected a number")
            if not 0 < value <= 1:
                raise ValueError(
                    f"{self._name}: {argument} is {value}, expected a number in (0, 1]"
                )
        if isinstance(seed, bool) or not isinstance(seed, int | torch.Generator):
            raise TypeError(
                f"{self._name}: seed is {seed!r}, expected an integer or a torch.Generator"
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = output_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.spectral_radius = float(spectral_radius)
        self.density = float(density)
        self.input_scale = float(input_scale)
        self.bias_scale = float(bias_scale)
        self.leak_rate = float(leak_rate)
        self.washout = washout
        self.read_input = read_input
        self.num_features = num_layers * hidden_size + (input_size if read_input else 0)

        generator = (
            seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        for name, value in self._draw(generator).items():
            self.register_buffer(name, value.to(device=device, dtype=dtype))
        for name, shape in [
            ("weight_out", (output_size, self.num_features)),
            ("bias_out", (output_size,)),
        ]:
            self.register_parameter(
                name, nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
            )
        self._sums: tuple[Tensor, Tensor] | None = None

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The reservoirs, on the CPU in float64, so that the same seed is the same network everywhere."""

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(shape, dtype=torch.float64, generator=generator, device="cpu") - 1

        size, layers = self.hidden_size, self.num_layers
        weight_ih = self.input_scale * uniform(size, self.input_size)
        between, recurrent, bias = [], [], []
        for layer in range(layers):
            if layer > 0:
                W = uniform(size, size)
                between.append(W * (self.input_scale / torch.linalg.matrix_norm(W, 2)))
            # With as many numbers in each row, at least one, there is a cycle, and so an eigenvalue other than 0.
            seen = uniform(size, size).argsort(1)[:, : max(1, round(self.density * size))]
            R = torch.zeros(size, size, dtype=torch.float64)
            R.scatter_(1, seen, uniform(*seen.shape))
            R *= self.spectral_radius / torch.linalg.eigvals(R).abs().max()
            recurrent.append(R)
            bias.append(self.bias_scale * uniform(size))
        empty = torch.zeros(0, size, size, dtype=torch.float64)
        return {
            "weight_ih": weight_ih,
            "weight_between": torch.stack(between) if between else empty,
            "weight_hh": torch.stack(recurrent),
            "bias_ih": torch.stack(bias),
        }

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, {self.output_size}"
        for option, default in [
            ("num_layers", 1),
            ("batch_first", False),
            ("spectral_radius", 0.9),
            ("density", 0.1),
            ("input_scale", 1.0),
            ("bias_scale", 1.0),
            ("leak_rate", 1.0),
            ("washout", 0),
            ("read_input", True),
        ]:
            value = getattr(self, option)
            if value != default:
                text += f", {option}={value!r}"
        return text

    # ---- the reservoir ----
    def _run(self, x: Tensor, state: Tensor, one_step: bool = False) -> tuple[Tensor, Tensor]:
        """``(B, T, input_size)`` to the features ``(B, T, num_features)`` and the final state; ``(B, input_size)`` to
        ``(B, num_features)`` with ``one_step``."""
        units = self.hidden_size
        features: list[Tensor] = []
        if self.read_input:
            features.append(x)
        final_states: list[Tensor] = []
        for layer in range(self.num_layers):
            weight = self.weight_ih if layer == 0 else self.weight_between[layer - 1]
            a = F.linear(x, weight, self.bias_ih[layer])
            update: Tensor | None = None
            if self.leak_rate != 1:
                shape = a.unflatten(-1, [1, units]).shape
                update = torch.full([1], self.leak_rate, dtype=state.dtype, device=a.device)
                update = update.expand(shape)
            a = a.unflatten(-1, [1, 1, units])
            R = self.weight_hh[layer].reshape(1, 1, units, units)
            h = state[layer].unsqueeze(1)
            if one_step:
                h, final_state = elman_step(a, R, None, h, h_update=update)
            else:
                h, final_state = elman(a, R, None, h, h_update=update)
            x = h.squeeze(-2)
            features.append(x)
            final_states.append(final_state.squeeze(1))
        return torch.cat(features, -1), torch.stack(final_states)

    def _enter(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        """``x`` as ``(B, T, input_size)``, the state in its dtype, with a batch, and whether ``x`` had one."""
        if not torch.jit.is_scripting():
            self._check_types(self._name, x, state)
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
            x = x.transpose(0, 1)
        if state is None:
            return x, self.init_state(x.shape[0]), batched
        return x, self._state_in(self._name, x, state, batched), batched

    def _leave(self, y: Tensor, state: Tensor, batched: bool) -> tuple[Tensor, Tensor]:
        if not batched:
            return y.squeeze(0), state.squeeze(1)
        return y if self.batch_first else y.transpose(0, 1), state

    def _state_in(self, owner: str, x: Tensor, state: Tensor, batched: bool) -> Tensor:
        want = [self.num_layers, x.shape[0], self.hidden_size]
        text = f"num_layers={self.num_layers}, B={x.shape[0]}, hidden_size={self.hidden_size}"
        if not batched:
            want = [self.num_layers, self.hidden_size]
            text = f"num_layers={self.num_layers}, hidden_size={self.hidden_size}"
        if list(state.shape) != want:
            raise ValueError(f"{owner}: state has shape {shape_text(state)}, expected ({text})")
        if not state.is_floating_point():
            raise TypeError(f"{owner}: state has dtype {state.dtype}, expected {self._wide()}")
        return (state if batched else state.unsqueeze(1)).to(self._wide())

    def _wide(self) -> torch.dtype:
        return torch.float64 if self.weight_hh.dtype == torch.float64 else torch.float32

    @torch.jit.unused
    def _check_types(self, owner: str, x: Tensor, state: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{owner}: x is {type(x).__name__}, expected a tensor")
        if x.dtype != self.weight_hh.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{owner}: x has dtype {x.dtype}, expected {self.weight_hh.dtype}, that of the weights"
            )
        if state is not None:
            check_state_type(owner, state)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs all steps.

        Args:
            x: ``(T, B, input_size)``; ``(B, T, input_size)`` with ``batch_first``; ``(T, input_size)`` without a batch.
            state: ``(num_layers, B, hidden_size)``, without ``B`` for an ``x`` without a batch. Zeros if omitted.

        Returns:
            The readout, as ``x`` with ``output_size`` channels, and the final state, in the form of ``state``, float32
            or float64.

        Raises:
            ValueError: another shape of ``x`` or of ``state``.
            TypeError: ``x`` has, outside autocast, another dtype than the weights, or ``state`` is no floating-point
                tensor.
        """
        x, state, batched = self._enter(x, state)
        features, state = self._run(x, state)
        return self._leave(F.linear(features, self.weight_out, self.bias_out), state, batched)

    @torch.jit.export
    def features(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the readout sees, for another one: as :meth:`forward`, with ``num_features`` channels, the input's first
        (with ``read_input``), then the layers'."""
        x, state, batched = self._enter(x, state)
        features, state = self._run(x, state)
        return self._leave(features, state, batched)

    @torch.jit.export
    def init_state(self, batch_size: int) -> Tensor:
        """Zeros ``(num_layers, B, hidden_size)``."""
        shape = [self.num_layers, batch_size, self.hidden_size]
        return torch.zeros(shape, dtype=self._wide(), device=self.weight_hh.device)

    @torch.jit.export
    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step, for streaming; differentiable.

        Args:
            x: ``(B, input_size)``.
            state: from ``init_state``, ``forward``, ``fit`` or ``step``.

        Returns:
            The readout ``(B, output_size)`` and the new state.

        Raises:
            ValueError: another shape of ``x`` or of ``state``.
        """
        owner = f"{self._name}.step"
        if not torch.jit.is_scripting():
            self._check_types(owner, x, state)
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise ValueError(
                f"{owner}: x has shape {shape_text(x)}, expected (B, input_size={self.input_size})"
            )
        features, state = self._run(x, self._state_in(owner, x, state, True), True)
        return F.linear(features, self.weight_out, self.bias_out), state

    @torch.jit.export
    def generate(self, x: Tensor, state: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """Goes on by itself: each output is the next input.

        Args:
            x: the first input, ``(B, input_size)``: the last value that is known.
            state: of the steps before it, as in :meth:`step`.
            num_steps: outputs to make.

        Returns:
            The outputs, ``(B, num_steps, output_size)``, ``(num_steps, B, output_size)`` without ``batch_first``, and
            the state before the last of them is read.

        Raises:
            ValueError: ``output_size`` is not ``input_size``, ``num_steps`` is negative, or another shape of ``x`` or
                of ``state``.
        """
        if self.output_size != self.input_size:
            raise ValueError(
                f"{self._name}.generate: output_size is {self.output_size}, expected "
                f"input_size={self.input_size}, since outputs are inputs"
            )
        if num_steps < 0:
            raise ValueError(
                f"{self._name}.generate: num_steps is {num_steps}, expected at least 0"
            )
        outputs: list[Tensor] = []
        for _ in range(num_steps):
            x, state = self.step(x, state)
            outputs.append(x)
        dim = 1 if self.batch_first else 0
        if len(outputs) == 0:
            return x.unsqueeze(dim).narrow(dim, 0, 0), state
        return torch.stack(outputs, dim), state

    # ---- the readout ----
    @torch.jit.unused
    def fit(
        self,
        x: Tensor,
        target: Tensor,
        ridge: float = 1e-6,
        state: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        r"""Fits the readout to sequences by ridge regression, in closed form.

        .. math::
            \min_{W_\text{out}, b_\text{out}} \sum_t \lVert y_t - \text{target}_t \rVert^2 + \text{ridge}\, \lVert
            W_\text{out} \rVert^2

        over all steps of all sequences but the washout. What earlier calls have seen is forgotten; sequences that do
        not fit into memory together are added up by :meth:`partial_fit`.

        Args:
            x: as in :meth:`forward`.
            target: as ``x``, with ``output_size`` channels; any floating-point dtype.
            ridge: at least 0. It counts beside the sum over all steps. With 0, of all readouts that fit equally well,
                it is the smallest.
            state: as in :meth:`forward`. Where it is given nothing is washed out.
            lengths: number of steps of each row of a padded batch, integers, ``(B,)``. What stands after them is
                ignored, even NaN.

        Returns:
            The state after the last step of ``x``, from which :meth:`generate` and :meth:`step` go on. (Of padded
            rows it is that after the padding.)

        Raises:
            ValueError: another shape, ``ridge`` is negative, no step is left, or a value is not finite.
            TypeError: another dtype, or ``ridge`` is no number.
        """
        _check_number(f"{self._name}.fit", "ridge", ridge)
        self._sums = None
        state = self.partial_fit(x, target, state, lengths)
        self.solve(ridge)
        return state

    @torch.jit.unused
    @torch.no_grad()
    def partial_fit(
        self,
        x: Tensor,
        target: Tensor,
        state: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Adds sequences to those that :meth:`solve` fits the readout to.

        Sums are float64, and of one size however many the steps. They are not in ``state_dict``, nor in a scripted
        module.

        Args:
            x: as in :meth:`fit`.
            target: as in :meth:`fit`.
            state: as in :meth:`fit`: that which the call before has returned, where a long sequence comes in pieces.
            lengths: as in :meth:`fit`.

        Returns:
            The state after the last step of ``x``.

        Raises:
            ValueError: another shape, or a value that is not finite.
            TypeError: another dtype.
        """
        owner = f"{self._name}.fit"
        if not isinstance(target, Tensor) or not target.is_floating_point():
            came = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(f"{owner}: target is {came}, expected a floating-point tensor")
        self._check_types(self._name, x, state)
        wanted = (*x.shape[:-1], self.output_size)
        if target.shape != wanted:
            text = ", ".join([str(size) for size in wanted])
            raise ValueError(f"{owner}: target has shape {shape_text(target)}, expected ({text})")
        washout = self.washout if state is None else 0
        x, state, batched = self._enter(x, state)
        if not batched:
            target = target.unsqueeze(0)
        elif not self.batch_first:
            target = target.transpose(0, 1)
        steps = torch.arange(x.shape[1], device=x.device)
        counts = (steps >= washout).expand(x.shape[:2])
        if lengths is not None:
            self._check_lengths(owner, lengths, x)
            present = steps < lengths.to(x.device).unsqueeze(1)
            counts = counts & present
            x = torch.where(present.unsqueeze(2), x, 0.0)
        features, state = self._run(x, state)
        features = F.pad(features[counts].double(), (0, 1), value=1.0)  # the last is the bias
        target = target[counts].to(features)
        gram, moment = features.mT @ features, features.mT @ target
        if not (gram.isfinite().all() and moment.isfinite().all()):
            raise ValueError(f"{owner}: x or target has values that are not finite")
        if self._sums is not None:
            gram, moment = gram + self._sums[0].to(gram), moment + self._sums[1].to(gram)
        self._sums = (gram, moment)
        return state if batched else state.squeeze(1)

    @torch.jit.unused
    @torch.no_grad()
    def solve(self, ridge: float = 1e-6) -> None:
        """Fits the readout to all that :meth:`partial_fit` has seen since the last :meth:`fit`; with another ``ridge``
        again at will.

        Args:
            ridge: as in :meth:`fit`.

        Raises:
            ValueError: ``ridge`` is negative, or there was no step.
            TypeError: ``ridge`` is no number.
        """
        owner = f"{self._name}.solve"
        _check_number(owner, "ridge", ridge)
        if self._sums is None or self._sums[0][-1, -1] == 0:
            raise ValueError(
                f"{owner}: x had no step, expected some beyond washout={self.washout}, in fit or partial_fit"
            )
        gram, moment = self._sums
        penalty = gram.new_full((self.num_features + 1,), float(ridge))
        penalty[-1] = 0  # a shift of the target is no weight
        gram = gram + penalty.diag()
        factor, failed = torch.linalg.cholesky_ex(gram)
        if ridge == 0 or failed:
            # Singular, as it is with fewer steps than features, or with a ridge that is lost in the rounding.
            solution = torch.linalg.pinv(gram, hermitian=True) @ moment
        else:
            solution = torch.cholesky_solve(moment, factor)
        self.weight_out.copy_(solution[:-1].mT)
        self.bias_out.copy_(solution[-1])

    def _check_lengths(self, owner: str, lengths: Tensor, x: Tensor) -> None:
        check_lengths_type(owner, lengths)
        if lengths.shape != x.shape[:1]:
            raise ValueError(
                f"{owner}: lengths has shape {shape_text(lengths)}, expected (B={x.shape[0]})"
            )
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"{owner}: lengths has dtype {lengths.dtype}, expected an integer")
        if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= x.shape[1]:
            raise ValueError(
                f"{owner}: lengths has values from {int(lengths.min())} to {int(lengths.max())}, "
                f"expected values from 0 to T={x.shape[1]}"
            )


def _check_number(owner: str, argument: str, value: float) -> None:
    """That it is a finite number, at least 0."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{owner}: {argument} is {value!r}, expected a number")
    if not 0 <= value < math.inf:
        raise ValueError(f"{owner}: {argument} is {value}, expected a finite number, at least 0")
