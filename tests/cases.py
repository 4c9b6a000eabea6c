"""The one list of operators. Every suite in this folder runs over `CASES`: an operator that is
added here inherits them all, and test_registration.py fails while one is registered but not listed.

To add a recurrence: a `Case` at the end of this file, a small layer that a consumer would write
around it, its formula in numpy and a table worked out by hand in oracle.py. What is no diagonal
recurrence is among `OTHERS`, and what has a matrix for a state among `MATRICES`, on which those
suites run that ask for `cases=ALL`; what the other suites demand of it has a file of its own,
tests/test_NAME.py (of all matrix memories, tests/test_matrix_memory.py, and of their references,
tests/test_matrix_memory_references.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import torch_ext

REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex128, torch.complex64)
HALF = (torch.bfloat16, torch.float16)

# What a state of these inputs is kept in, and what is accumulated in.
STATE_DTYPE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
WIDE = {torch.complex64: torch.complex128, torch.complex128: torch.complex128}

# Bounds on `error` below, in units of the dtype's eps, against the float64 reference on the same,
# already rounded, inputs. Twice to six times the worst of thousands of random sequences of up to
# 257 steps.
#   float64, float32, complex: everything is computed in the dtype itself. A step costs about 3
#     roundings and a sigmoid of a few units in the last place, and a long memory adds up hundreds
#     of them, as a random walk. A gradient passes two such chains and multiplies differences (h -
#     candidate) that may cancel.
#   bfloat16, float16: the arithmetic is float32, so a value is off by its one final rounding: half
#     a unit. A gradient reads the saved h, which is rounded already: another half unit, times those
#     differences.
_FULL = (torch.float64, torch.float32, torch.complex128, torch.complex64)
VALUE_BOUND = dict.fromkeys(_FULL, 32) | dict.fromkeys(HALF, 0.51)
GRAD_BOUND = dict.fromkeys(_FULL, 256) | dict.fromkeys(HALF, 8)


def state_dtype(dtype):
    return STATE_DTYPE.get(dtype, dtype)


def wide(x):
    """The same numbers in float64 (or complex128), cut from any graph, as a leaf of its own."""
    y = x.detach().to(WIDE.get(x.dtype, torch.float64), copy=True).resolve_conj().resolve_neg()
    return y.requires_grad_(x.requires_grad)


def error(got, want, floor=0.0, size=0.0):
    """Largest |got - want| / (|want| + rms(want)), where differences up to `floor` count as none;
    infinite where only one of the two is NaN or infinite. Few numbers may all be what is left of a
    cancellation: `size` says how large those were that cancelled, and stands for a smaller rms."""
    got, want = (x.detach().cpu().to(WIDE.get(x.dtype, torch.float64)) for x in (got, want))
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0
    finite = want[want.isfinite()].abs()
    rms = max(float(finite.square().mean().sqrt()) if finite.numel() else 0.0, size)
    difference = (got - want).abs()
    same = (got == want) | (got.isnan() & want.isnan()) | (difference <= floor)
    ratio = torch.where(same, 0.0, difference / (want.abs() + rms))
    return float(ratio.nan_to_num(nan=torch.inf).max())


def close(got, want, dtype=None, grad=False, factor=1.0, name="value", size=0.0):
    """Asserts that `got` is as close to `want`, computed in float64, as its dtype promises."""
    dtype = dtype or got.dtype
    bound = (GRAD_BOUND if grad else VALUE_BOUND)[dtype] * factor * torch.finfo(dtype).eps
    # numbers that small are flushed to zero, or have few digits (float16 keeps its subnormals)
    floor = 6e-8 if dtype is torch.float16 else 16 * torch.finfo(dtype).tiny
    found = error(got, want, floor, size)
    assert found <= bound, f"{name}: relative error {found:.3g}, allowed {bound:.3g} for {dtype}"


@dataclass(frozen=True)
class Case:
    name: str  # torch_ext.NAME and torch.ops.torch_ext.NAME
    arguments: tuple[str, ...]  # the inputs that run over time, (B, T, D), in order
    draw: Callable  # (name of an argument, shape, generator) -> float64 (or complex128) sample
    layer: type  # a module around the operator, as a user writes one
    variants: tuple[dict, ...] = ({},)  # every combination of options
    dtypes: tuple[torch.dtype, ...] = REAL

    def __str__(self):
        return self.name

    @property
    def function(self):
        return getattr(torch_ext, self.name)

    @property
    def reference(self):
        return getattr(torch_ext, self.name + "_reference")

    @property
    def step(self):
        return getattr(torch_ext, self.name + "_step")

    @property
    def step_(self):
        return getattr(torch_ext, self.name + "_step_")

    @property
    def op(self):
        return getattr(torch.ops.torch_ext, self.name).default

    @property
    def backward_op(self):
        return getattr(torch.ops.torch_ext, self.name + "_backward").default

    @property
    def operators(self):
        """The dispatcher's operators that belong to this case."""
        return {f"torch_ext::{self.name}{tail}" for tail in ("", "_backward", "_step", "_step_")}

    def promised(self, x, given):
        """The dtype whose precision `x`, made from `given`, has."""
        return x.dtype

    def by_torch(self, options):
        """Whether torch's own operators make something of the inputs. Where they cut them for their
        threads, the last bit may be another one."""
        return False

    # What the leaves are: those that run over time, parameters, the state. A class below for each
    # operator that has more than the first and the last.
    @property
    def names(self):
        return (*self.arguments, "initial_state")

    states = ("initial_state",)  # the last of the names
    carrier = property(lambda self: self.arguments[0])  # what reaches both h and the final state
    optional = ()  # names of leaves that may be None, besides the state
    free = frozenset()  # (name, dimension) that no other argument has: it is what it is
    channel = "D"  # the dimension whose elements do not see each other
    output = "BTD"  # the dimensions of h
    slack = 1  # of what `close` allows: sums of many products that cancel are off by more roundings
    fast = False  # finite differences along a random direction, not of every element
    thin = False  # options but the first in one dtype alone
    loose = False  # made of several operators: an output may not depend on a leaf
    longest = 257  # steps, where a slow reference takes part
    words = ("identity", "g")  # what `activation` may be, where there is one
    sizes: ClassVar = {}  # of dimensions other than B, T and D

    def letters(self, name):
        """The dimensions of a leaf, a letter each."""
        return "BD" if name == "initial_state" else "BTD"

    @property
    def ends(self):
        """The dimensions of h and of the final states."""
        return (self.output, *map(self.letters, self.states))

    def extents(self, B, T, D):
        return {"B": B, "T": T, "D": D} | self.sizes

    def shape(self, name, B, T, D):
        return tuple(self.extents(B, T, D)[d] for d in self.letters(name))

    def output_shape(self, B, T, D):
        """Of h; of a step's, where T is None."""
        return tuple(self.extents(B, T, D)[d] for d in self.output if d != "T" or T is not None)

    def also(self, name, dtype):
        """The dtypes that a leaf may have beside inputs of this one, besides it."""
        return ()

    def leaves(self, B, T, D, dtype, generator, device="cpu", state=True, grad=False):
        """Sample inputs and, where `state`, the initial state (`state` rows of it if it is a
        number)."""
        out = []
        for name in self.names:
            if name not in self.states:
                kind = self.leaf_dtype(name, dtype)
                out.append(self.sample(name, self.shape(name, B, T, D), kind, generator))
            elif state is not False and state is not None:
                shape = self.shape(name, B if state is True else state, None, D)
                label = "state" if name == "initial_state" else name
                out.append(self.sample(label, shape, self.state_dtype(dtype), generator))
        return [x.to(device).requires_grad_(grad) for x in out]

    def sample(self, argument, shape, dtype, generator):
        x = self.draw(argument, shape, generator, WIDE.get(dtype, torch.float64))
        return x.to(dtype)

    def leaf_dtype(self, name, dtype):
        """Of a leaf that is no state."""
        return dtype

    def named(self, leaves):
        """As keywords; the state may be missing."""
        return dict(zip(self.names, leaves, strict=False))

    def at(self, leaves, time):
        """The leaves (the state may be missing) with those that run over time at this step or
        slice of it."""
        n = len(self.arguments)
        return [x[:, time] for x in leaves[:n]] + list(leaves[n:])

    @property
    def inputs(self):
        """The number of leaves other than states."""
        return len(self.names) - len(self.states)

    def state_dtype(self, dtype):
        return state_dtype(dtype)

    def state_shape(self, rows, D):
        return self.shape("initial_state", rows, None, D)

    def backward(self, grad_h, grad_final, leaves, h, options, cu=None, reverse=False):
        """The backward operator, called by hand; the gradients of the leaves."""
        *inputs, state = leaves
        tail = (h, state, cu, *options.values(), reverse)
        return self.backward_op(grad_h, grad_final, *inputs, *tail)

    def bind(self, function=None, **options):
        """The function of the leaves alone: f(*inputs) or f(*inputs, initial_state) -> (h,
        final_state)."""
        function, n = function or self.function, self.inputs

        def bound(*leaves):
            return function(*leaves[:n], leaves[n] if len(leaves) > n else None, **options)

        return bound

    def constant(self, options):
        """The final states, by their place among the outputs, that do not depend on any leaf where
        no initial state is given."""
        return ()

    def bind_step(self, function=None, **options):
        """f(*inputs, state) -> (h, state)."""
        function = function or self.step
        return lambda *leaves, **k: function(*leaves, **options, **k)


class ConvolutionCase(Case):
    """Its leaves are x, the parameters and the state, which has a dimension more."""

    names = ("x", "weight", "bias", "initial_state")
    optional = ("bias",)
    words = ("silu",)
    # no size that test_consumers.py has in a first call, or torch takes them for one
    sizes: ClassVar = {"W": 3, "V": 2}

    def letters(self, name):
        return {"x": "BTD", "weight": "DW", "bias": "D", "initial_state": "BDV"}[name]

    def also(self, name, dtype):
        return (torch.float32,) if dtype in HALF and name in ("weight", "bias") else ()

    def state_dtype(self, dtype):
        return dtype

    def backward(self, grad_h, grad_final, leaves, h, options, cu=None, reverse=False):
        return self.backward_op(grad_h, grad_final, *leaves, cu, *options.values())

    def bind(self, function=None, reverse=False, cu_seqlens=None, **options):
        """`reverse` is not the operator's: everything is turned round before and after."""
        function = function or self.function

        def bound(x, weight, bias, state=None):
            if not reverse:
                return function(x, weight, bias, state, cu_seqlens=cu_seqlens, **options)
            cu = None if cu_seqlens is None else x.shape[1] - cu_seqlens.flip(0)
            packed = cu is not None
            state = state.flip(0) if packed and state is not None else state
            y, final = function(x.flip(1), weight, bias, state, cu_seqlens=cu, **options)
            return y.flip(1), final.flip(0) if packed else final

        return bound


class SelectiveScanCase(Case):
    """Its leaves: what runs over time, the parameters, the state; its functions take them in that
    order, and by name."""

    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")

    names = ("u", "delta", "B", "C", "z", "A", "D", "delta_bias", "initial_state")
    optional = ("D", "z", "delta_bias")
    sizes: ClassVar = {"N": 3}

    def letters(self, name):
        short = {"A": "DN", "B": "BTN", "C": "BTN", "D": "D", "delta_bias": "D"}
        return short.get(name, "BDN" if name == "initial_state" else "BTD")

    def also(self, name, dtype):
        return (torch.float32,) if dtype in HALF and name in ("A", "D", "delta_bias") else ()

    def sample(self, argument, shape, dtype, generator):
        x = super().sample(argument, shape, dtype, generator)
        if argument == "A" and dtype.is_complex:  # some turns in the time that it takes to fade
            x = torch.complex(-x.real.abs(), 3 * x.imag)
        return x

    def backward(self, grad_h, grad_final, leaves, h, options, cu=None, reverse=False):
        def call(*ordered):  # without the states that the forward kept
            kept = ordered[2].new_empty(0, dtype=self.state_dtype(ordered[0].dtype))
            tail = (kept, cu, *options.values(), reverse)
            return self.backward_op(grad_h, grad_final, *ordered, *tail)

        grads = dict(zip(self.order, self.ordered(call)(*leaves), strict=True))
        return tuple(grads[name] for name in self.names)

    def ordered(self, function):
        def of_leaves(u, delta, B, C, z, A, D, delta_bias, *rest, **options):
            return function(u, delta, A, B, C, D, z, delta_bias, *rest, **options)

        return of_leaves

    @property
    def function(self):
        return self.ordered(torch_ext.selective_scan)

    @property
    def reference(self):
        return self.ordered(torch_ext.selective_scan_reference)

    @property
    def step(self):
        return self.ordered(torch_ext.selective_scan_step)

    @property
    def step_(self):
        return self.ordered(torch_ext.selective_scan_step_)


class MatrixCase(Case):
    """A matrix memory: what other cases have of channels, this has of heads. Its functions take
    and give the leaves by name; of several states, which are a tuple, each is a leaf."""

    dims: ClassVar = {}
    sizes: ClassVar = {"K": 3, "V": 2}
    carrier = "v"
    own_heads = False  # of queries and keys: or all heads have the same ones
    channel = "H"
    output = "BTHV"
    slack = 8
    fast = thin = loose = True
    longest = 70

    @property
    def names(self):
        return tuple(self.dims)

    def promised(self, x, given):
        """float32 states and gradients are sums of products of 16 bits where the machine has them."""
        products = given.dtype is torch.bfloat16 or (given.dtype in HALF and given.is_cuda)
        return given.dtype if products else x.dtype

    def letters(self, name):
        return self.dims[name]

    def extents(self, B, T, D):
        groups = max(D, 1) if self.own_heads else 1
        return {"B": B, "T": T, "H": D, "G": groups} | self.sizes

    def state_shape(self, rows, D):
        return self.shape(self.states[0], rows, None, D)

    def flat(self, function):
        """Of the leaves, by place or by name, and what may follow them; gives as many outputs."""
        step = "_step" in function.__name__
        states = ["state" if step and x == "initial_state" else x for x in self.states]
        names = [*self.names[: self.inputs], *states, "state_indices" if step else "cu_seqlens"]
        keyword = "state" if step else "initial_state"

        def of_leaves(*leaves, **options):
            given = dict(zip(names, leaves, strict=False)) | options
            parts = [given.pop(name, None) for name in states]
            state = parts[0] if len(parts) == 1 else tuple(parts)
            if all(x is None for x in parts):
                state = None
            out = function(**given, **{keyword: state})
            if isinstance(out, Tensor):
                return out
            return (out[0], *out[1]) if len(parts) > 1 else out

        return of_leaves

    @property
    def function(self):
        return self.flat(getattr(torch_ext, self.name))

    @property
    def reference(self):
        return self.flat(getattr(torch_ext, self.name + "_reference"))

    @property
    def step(self):
        return self.flat(getattr(torch_ext, self.name + "_step"))

    @property
    def step_(self):
        return self.flat(getattr(torch_ext, self.name + "_step_"))

    def bind(self, function=None, **options):
        function = function or self.function
        return lambda *leaves: function(*leaves, **options)

    @property
    def operators(self):
        """It has no backward of its own: that of matrix_memory, which it calls."""
        return {f"torch_ext::{self.name}{tail}" for tail in ("", "_step", "_step_")}

    def sample(self, argument, shape, dtype, generator):
        x = self.draw(argument, shape, generator, torch.float64)
        if argument == "q":  # a sign for all of them, or what divides is what is left of a sum
            x = x * (1 if torch.rand((), generator=generator) < 0.5 else -1)
        return x.to(dtype)


class MLSTMCase(MatrixCase):
    dims: ClassVar = {
        "q": "BTGK", "k": "BTGK", "v": "BTHV", "i": "BTH", "f": "BTH",
        "C": "BHKV", "n": "BHK", "m": "BH",
    }  # fmt: skip
    states = ("C", "n", "m")
    own_heads = True
    free = frozenset({("v", "H"), ("v", "V")})

    def also(self, name, dtype):
        return (torch.float32,) if dtype in HALF and name in ("i", "f") else ()

    def by_torch(self, options):
        return options.get("input_gate") == "sigmoid"

    def constant(self, options):
        if options.get("input_gate") != "sigmoid":
            return ()
        return (3,) if options.get("normalize", True) else (2, 3)


class LinearAttentionCase(MatrixCase):
    dims: ClassVar = {"q": "BTGK", "k": "BTGK", "v": "BTHV", "S": "BHKV", "z": "BHK"}
    states = ("S", "z")
    free = frozenset({("v", "H"), ("v", "V")})

    def by_torch(self, options):
        return options.get("feature_map", "elu") == "elu"

    def constant(self, options):
        return () if options.get("normalize", True) else (2,)


class RetentionCase(MatrixCase):
    dims: ClassVar = {
        "q": "BTGK", "k": "BTGK", "v": "BTHV", "decay": "H", "initial_state": "BHKV",
    }  # fmt: skip
    optional = ("decay",)
    own_heads = True
    free = frozenset({("v", "H"), ("v", "V")})

    def also(self, name, dtype):
        return (torch.float32,) if dtype in HALF and name == "decay" else ()


class SSDCase(MatrixCase):
    """C is first here: it is what the others are measured by."""

    dims: ClassVar = {
        "C": "BTGN", "B": "BTGN", "x": "BTHP", "dt": "BTH", "z": "BTHP",
        "A": "H", "D": "H", "dt_bias": "H", "initial_state": "BHPN",
    }  # fmt: skip
    sizes: ClassVar = {"N": 3, "P": 2}
    output = "BTHP"
    carrier = "x"
    optional = ("D", "z", "dt_bias")
    free = frozenset({("x", "H"), ("x", "P")})

    def by_torch(self, options):  # softplus and silu
        return True

    def also(self, name, dtype):
        return (torch.float32,) if dtype in HALF and name in ("dt", "A", "D", "dt_bias") else ()


def normal(argument, shape, generator, dtype):
    return torch.randn(shape, generator=generator, dtype=dtype)


def remembers(shape):
    """Every second channel keeps its state for hundreds of steps, so that an error far back
    shows."""
    return torch.arange(shape[-1]) % 2 == 1


def draw_scan(argument, shape, generator, dtype):
    """Decays of either sign up to the unit circle, some exactly 0 and some exactly 1."""
    if argument != "a":
        return normal(argument, shape, generator, dtype)
    u = torch.rand(shape, generator=generator, dtype=torch.float64)
    a = torch.where(remembers(shape), 1 - u / 256, u)
    angle = torch.randn(shape, generator=generator, dtype=torch.float64)
    if dtype.is_complex:
        return torch.polar(a, angle)
    a = torch.where(u < 0.02, 1.0, torch.where((u > 0.98) & ~remembers(shape), 0.0, a))
    return torch.where(angle < -1, -a, a)


def draw_gates(argument, shape, generator, dtype):
    """Pre-activations on both flanks of the sigmoid; candidates of both signs."""
    x = normal(argument, shape, generator, dtype)
    shift = {"gate": -6, "forget_gate": 3, "input_gate": -3}.get(argument)
    return x if shift is None else 2 * x + torch.where(remembers(shape), shift, 0)


def draw_selective_scan(argument, shape, generator, dtype):
    """States that fade within a step and others that stay for hundreds. Steps are forwards: below 0
    and without softplus, states explode."""
    x = normal(argument, shape, generator, dtype)
    if argument == "A" and not dtype.is_complex:
        return -torch.exp(2 * x - 1).clamp_min(0.02)
    return x.abs() if argument in ("delta", "delta_bias") else x


def draw_positive(argument, shape, generator, dtype):
    """Queries, keys and normalisers that add up, and never to 0; gates that forget at once and that
    keep for hundreds of steps."""
    x = normal(argument, shape, generator, dtype)
    if argument in ("q", "k", "n", "z", "delta"):
        return x.abs() + 0.1
    return {"i": 2 * x, "f": 3 * x + 3}.get(argument, x)


def draw_retention(argument, shape, generator, dtype):
    x = normal(argument, shape, generator, dtype)
    return torch.sigmoid(3 * x + 1) if argument == "decay" else x


def draw_ssd(argument, shape, generator, dtype):
    x = normal(argument, shape, generator, dtype)
    if argument == "A":
        return -torch.exp(2 * x - 1).clamp_min(0.02)
    return x.abs() if argument in ("dt", "dt_bias", "delta") else x


class Layer(nn.Module):
    """A projection, the recurrence, a projection back: (B, T, size) -> (B, T, size)."""

    def __init__(self, size: int = 4):
        super().__init__()
        self.inp = nn.Linear(size, self.width * size)
        self.out = nn.Linear(size, size)


class LinearScanLayer(Layer):
    width = 2

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self.inp(x).chunk(2, -1)
        h, state = torch_ext.linear_scan(torch.sigmoid(a), b, state)
        return self.out(h), state


class MinGRULayer(Layer):
    width = 2

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        gate, candidate = self.inp(x).chunk(2, -1)
        h, state = torch_ext.min_gru(gate, candidate, state, activation="g")
        return self.out(h), state


class MinLSTMLayer(Layer):
    width = 3

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f, i, candidate = self.inp(x).chunk(3, -1)
        h, state = torch_ext.min_lstm(f, i, candidate, state, normalize=False)
        return self.out(h), state


class CausalConv1dLayer(nn.Module):
    def __init__(self, size: int = 4):
        super().__init__()
        self.inp = nn.Linear(size, size)
        self.weight = nn.Parameter(torch.randn(size, 4) / 2)
        self.bias = nn.Parameter(torch.randn(size))
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The state is (B, size) here as for the other layers: three inputs are made of it."""
        x = self.inp(x)
        before: Tensor | None = None
        if state is not None:
            before = torch.stack([state, -state, state / 2], -1).to(x.dtype)
        y, before = torch_ext.causal_conv1d(x, self.weight, self.bias, before, "silu")
        return self.out(y), (before[..., 0] - before[..., 1] + 2 * before[..., 2]).float()


class SelectiveScanLayer(nn.Module):
    def __init__(self, size: int = 4):
        super().__init__()
        self.inp = nn.Linear(size, 3 * size + 4)
        self.A = nn.Parameter(-torch.rand(size, 2))
        self.D = nn.Parameter(torch.randn(size))
        self.bias = nn.Parameter(torch.randn(size))
        self.out = nn.Linear(size, size)
        self.size = size

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The state is (B, size) here as for the other layers: two are made of it."""
        D = self.size
        u, delta, z, B, C = self.inp(x).split([D, D, D, 2, 2], -1)
        before: Tensor | None = None
        if state is not None:
            before = torch.stack([state, -state], -1)
        y, before = torch_ext.selective_scan(
            u, delta, self.A, B, C, self.D, z, self.bias, before, True
        )
        return self.out(y), before[..., 0] + 2 * before[..., 1]


class MatrixLayer(nn.Module):
    """Two heads, whose states are made of a state (B, size) as the other layers have it."""

    def __init__(self, size: int = 4):
        super().__init__()
        self.inp = nn.Linear(size, self.width)
        self.out = nn.Linear(4, size)

    def matrix(self, state: Tensor) -> Tensor:
        """(B, 2, 3, 2), of its first four numbers."""
        heads = state[:, :4].reshape(-1, 2, 1, 2)
        return torch.cat([heads, -heads, heads / 2], 2)

    def vector(self, final: Tensor) -> Tensor:
        """(B, 4), of such a state."""
        return (final[:, :, 0] + 2 * final[:, :, 1] - final[:, :, 2]).flatten(1)


class MLSTMLayer(MatrixLayer):
    width = 20

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v, i, f = self.inp(x).split([6, 6, 4, 2, 2], -1)
        q = torch.sigmoid(q).unflatten(-1, (2, 3))
        k = torch.sigmoid(k).unflatten(-1, (2, 3))
        before: tuple[Tensor, Tensor, Tensor] | None = None
        if state is not None:
            C = self.matrix(state)
            before = (C, C.abs().sum(-1), state[:, :2])
        h, (C, n, m) = torch_ext.mlstm(q, k, v.unflatten(-1, (2, 2)), i, f, before, eps=0.01)
        return self.out(h.flatten(2)), self.vector(C) + torch.cat([n.sum(-1), m], 1)


class LinearAttentionLayer(MatrixLayer):
    width = 10

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = self.inp(x).split([3, 3, 4], -1)
        before: tuple[Tensor, Tensor] | None = None
        if state is not None:
            S = self.matrix(state)
            before = (S, S.abs().sum(-1))
        h, (S, z) = torch_ext.linear_attention(
            q.unsqueeze(2), k.unsqueeze(2), v.unflatten(-1, (2, 2)), before, 0.5, eps=0.1
        )
        return self.out(h.flatten(2)), self.vector(S) + z.sum(-1).repeat(1, 2)


class RetentionLayer(MatrixLayer):
    width = 16

    def __init__(self, size: int = 4):
        super().__init__(size)
        self.decay = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = self.inp(x).split([6, 6, 4], -1)
        before: Tensor | None = None
        if state is not None:
            before = self.matrix(state)
        h, after = torch_ext.retention(
            q.unflatten(-1, (2, 3)),
            k.unflatten(-1, (2, 3)),
            v.unflatten(-1, (2, 2)),
            torch.sigmoid(self.decay),
            before,
        )
        return self.out(h.flatten(2)), self.vector(after)


class SSDLayer(MatrixLayer):
    width = 16

    def __init__(self, size: int = 4):
        super().__init__(size)
        self.A = nn.Parameter(-torch.rand(2))
        self.D = nn.Parameter(torch.randn(2))
        self.bias = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, z, B, C, dt = self.inp(x).split([4, 4, 3, 3, 2], -1)
        before: Tensor | None = None
        if state is not None:
            before = self.matrix(state).transpose(2, 3)
        y, after = torch_ext.ssd(
            u.unflatten(-1, (2, 2)),
            dt,
            self.A,
            B.unsqueeze(2),
            C.unsqueeze(2),
            self.D,
            z.unflatten(-1, (2, 2)),
            self.bias,
            before,
            True,
        )
        return self.out(y.flatten(2)), self.vector(after.transpose(2, 3))


CASES = (
    Case("linear_scan", ("a", "b"), draw_scan, LinearScanLayer, dtypes=REAL + COMPLEX),
    Case(
        "min_gru",
        ("gate", "candidate"),
        draw_gates,
        MinGRULayer,
        ({"activation": "identity"}, {"activation": "g"}),
    ),
    Case(
        "min_lstm",
        ("forget_gate", "input_gate", "candidate"),
        draw_gates,
        MinLSTMLayer,
        (
            {"activation": "identity", "normalize": True},
            {"activation": "g", "normalize": True},
            {"activation": "identity", "normalize": False},
            {"activation": "g", "normalize": False},
        ),
    ),
)


OTHERS = (
    ConvolutionCase(
        "causal_conv1d",
        ("x",),
        normal,
        CausalConv1dLayer,
        ({"activation": None}, {"activation": "silu"}),
    ),
    SelectiveScanCase(
        "selective_scan",
        ("u", "delta", "B", "C", "z"),
        draw_selective_scan,
        SelectiveScanLayer,
        ({"delta_softplus": False}, {"delta_softplus": True}),
    ),
)
MATRICES = (
    MLSTMCase(
        "mlstm",
        ("q", "k", "v", "i", "f"),
        draw_positive,
        MLSTMLayer,
        (
            {"input_gate": "exp", "normalize": True},
            {"input_gate": "sigmoid", "normalize": True},
            {"input_gate": "sigmoid", "normalize": False},
        ),
        REAL,
    ),
    LinearAttentionCase(
        "linear_attention",
        ("q", "k", "v"),
        draw_positive,
        LinearAttentionLayer,
        ({"normalize": True}, {"normalize": False}),
        REAL,
    ),
    RetentionCase("retention", ("q", "k", "v"), draw_retention, RetentionLayer),
    SSDCase(
        "ssd",
        ("C", "B", "x", "dt", "z"),
        draw_ssd,
        SSDLayer,
        ({"dt_softplus": False}, {"dt_softplus": True}),
    ),
)
DIRECT = CASES + OTHERS  # each with a backward operator of its own
ALL = DIRECT + MATRICES
# What a matrix memory's operators call: no function of users, but it has all kernels and derivatives.
INNER = {f"torch_ext::matrix_memory{tail}" for tail in ("", "_backward", "_step_")}

# Of the matrix memories, whose kernels are the same, one.
IN_EVERYTHING = CASES + OTHERS + MATRICES[:1]


class Everything(nn.Module):
    """The layers of all operators, one after the other, each from its own state or none: what takes
    a minute to compile is tried on all of them at once."""

    def __init__(self, size: int = 4):
        super().__init__()
        self.layers = nn.ModuleList([case.layer(size) for case in IN_EVERYTHING])

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        finals: list[Tensor] = []
        for layer in self.layers:
            y, final = layer(x, state)
            x = x + y
            finals.append(final)
        return x, torch.cat(finals)


# mamba_step is no sequence's: its arguments, of a layer of odd sizes, and their dimensions.
LAYER_STEP = {
    "x": "BM",
    "in_proj_weight": "PM",
    "in_proj_bias": "P",
    "conv_weight": "IW",
    "conv_bias": "I",
    "x_proj_weight": "QI",
    "dt_proj_weight": "IR",
    "dt_proj_bias": "I",
    "A_log": "IN",
    "D": "I",
    "out_proj_weight": "OI",
    "out_proj_bias": "O",
    "conv_state": "BIV",
    "scan_state": "BIN",
}
LAYER_OPTIONAL = ("in_proj_bias", "conv_bias", "dt_proj_bias", "D", "out_proj_bias")


def layer_sizes(B=3, M=6, I=4, N=5, W=3, R=2, O=7):  # noqa: E741
    return dict(B=B, M=M, I=I, N=N, W=W, R=R, O=O, P=2 * I, Q=R + 2 * N, V=W - 1)


def layer_sample(argument, shape, dtype, generator):
    """Projections that neither grow nor shrink."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x / max(1, shape[-1]) ** 0.5 if argument.endswith("proj_weight") else x).to(dtype)


def layer_call(generator, dtype=torch.float32, rows=None, **sizes):
    """A valid call of mamba_step but for the states, which stand side by side."""
    sizes = layer_sizes(**sizes)
    call = {}
    for name, letters in LAYER_STEP.items():
        own = sizes | ({"B": rows} if rows is not None and "state" in name else {})
        kind = state_dtype(dtype) if name == "scan_state" else dtype
        call[name] = layer_sample(name, tuple(own[d] for d in letters), kind, generator)
    return call


def layer_step(call, indices=None, in_place=False):
    """(y, conv_state, scan_state) of mamba_step, or y of mamba_step_."""
    call = dict(call)
    state = call.pop("conv_state"), call.pop("scan_state")
    function = torch_ext.mamba_step_ if in_place else torch_ext.mamba_step
    out = function(**call, state=state, state_indices=indices)
    return out if in_place else (out[0], *out[1])


def layer_step_formula(
    x, in_proj_weight, conv_weight, x_proj_weight, dt_proj_weight, A_log, out_proj_weight,
    conv_state, scan_state, in_proj_bias=None, conv_bias=None, dt_proj_bias=None, D=None,
    out_proj_bias=None,
):  # fmt: skip
    """Its equations, in plain PyTorch."""
    plus = lambda x, b: x if b is None else x + b  # noqa: E731
    R, N = dt_proj_weight.shape[1], A_log.shape[1]
    inner, z = plus(x @ in_proj_weight.T, in_proj_bias).chunk(2, -1)
    seen = torch.cat([conv_state, inner[..., None]], -1)
    u = nn.functional.silu(plus((seen * conv_weight).sum(-1), conv_bias))
    delta, b, c = (u @ x_proj_weight.T).split([R, N, N], -1)
    delta = nn.functional.softplus(plus(delta @ dt_proj_weight.T, dt_proj_bias))[..., None]
    h = torch.exp(-delta * A_log.exp()) * scan_state + delta * u[..., None] * b[:, None]
    y = (h * c[:, None]).sum(-1) + (0 if D is None else D * u)
    y = plus((y * nn.functional.silu(z)) @ out_proj_weight.T, out_proj_bias)
    return y, seen[..., 1:], h


# Every length, batch and width that has its own path somewhere (empty, one, below and above a
# vector and a tile of time), each at least twice; the full product would add time and no path.
SHAPES = (
    (3, 0, 5),
    (0, 7, 16),
    (1, 7, 0),
    (1, 1, 1),
    (3, 2, 33),
    (1, 2, 100),
    (3, 7, 5),
    (1, 7, 16),
    (1, 64, 1),
    (3, 64, 33),
    (1, 64, 100),
    (1, 257, 16),
    (3, 257, 5),
    (0, 0, 0),
)


def short(dtype):
    return str(dtype).removeprefix("torch.")


def label(options):
    return "-".join(
        (key if value else "no_" + key) if isinstance(value, bool) else str(value)
        for key, value in options.items()
    )


def over(dtypes=None, variants=True, cases=CASES):
    """Parametrises a test over `case`, its `options` (the first alone where not `variants`) and,
    where `dtypes` is a tuple or "all", over those `dtype`s that the operator takes."""
    names = ["case"] + ["options"] * variants + ["dtype"] * (dtypes is not None)
    values = []
    for case in cases:
        for options in case.variants if variants else [None]:
            mine = list(case.dtypes) if dtypes == "all" else list(dtypes or [None])
            if case.thin and options and options != case.variants[0] and len(mine) > 1:
                mine = [torch.float32] if torch.float32 in mine else mine[:1]
            for dtype in mine:
                if dtype is not None and dtype not in case.dtypes:
                    continue
                row = [case] + [options] * variants + [dtype] * (dtypes is not None)
                text = [case.name, variants and label(options), dtype and short(dtype)]
                values.append(pytest.param(*row, id="-".join(t for t in text if t)))
    return pytest.mark.parametrize(names, values)


def cotangents(outputs, generator):
    """Random gradients for these outputs: the same numbers whatever the outputs' dtype can hold of
    them."""
    out = []
    for x in outputs:
        g = torch.randn(x.shape, generator=generator, dtype=WIDE.get(x.dtype, torch.float64))
        out.append(g.to(x.dtype).to(x.device))
    return out


def gradients(f, leaves, through=None, weights=None, generator=None, unused=False):
    """Gradients of every leaf that asks for one, through these outputs of f or all, under these
    cotangents. An output may depend on no leaf that asks for one.

    A leaf that is cut off is an error, or, where `unused` allows that (a reference that never
    touches it because there is no step), has gradient zero."""
    outputs = f(*leaves)
    outputs = [outputs[i] for i in through or range(len(outputs))]
    weights = cotangents(outputs, generator) if weights is None else weights
    pairs = [p for p in zip(outputs, weights, strict=True) if p[0].requires_grad or not unused]
    wanted = [x for x in leaves if x.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in wanted]
    outputs, weights = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, wanted, weights, allow_unused=unused)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=True)]


def bounds(lengths):
    return [0, *accumulate(lengths)]


def refuses(error, pieces, function, *args, **kwargs):
    """Asserts that the call raises this very error, in words of which these are some."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert caught.type is error, f"{caught.type.__name__}, expected {error.__name__}"
    message = str(caught.value)
    for piece in pieces:
        assert str(piece) in message, f"{piece!r} is not in {message!r}"
    assert "Exception raised from" not in message.split("\n")[0]
