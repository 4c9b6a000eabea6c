"""Peers, timed in turn with ours: other scans, other minGRUs, torch.nn, the minRNN paper's loops.

To add one: an entry in PEERS, and a `Contender` in the comparison that it belongs to.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from mamba_operators import (
    MambaChecker,
    check_step,
    make_inputs,
    make_step,
    on_device,
    options_of,
    step_inputs,
)
from matrix_memory_operators import MatrixChecker, step_arguments
from matrix_memory_operators import make_inputs as make_matrix_inputs
from measure import Samples, first_line
from operators import Checker, WrongResult, draw_tensors
from shapes import (
    MAMBA_OPERATORS,
    MATRIX_LAYER_PEERS,
    MATRIX_OPERATORS,
    MLSTM_CHUNKS,
    MLSTM_GOALS,
    OPERATORS,
    PAPER_BATCH,
    PAPER_RATIOS,
    PEER_GOALS,
    XLSTM_HEADS,
    MambaOperator,
    MatrixOperator,
    MatrixShape,
)
from torch import nn
from torch.nn import functional as F

import torch_ext

Results = tuple[torch.Tensor, ...]
Call = Callable[[], object]

# Accepted distance of two results, in relation to their norm. minGRU-pytorch works in log space:
# its float32 error grows with T and reaches 5e-3 in the gate's gradient at T = 2048, where ours
# stays at 2e-7. Norms, not largest values, because its gradient of a candidate that is exactly zero
# is 0 (it goes through relu), where g has the slope 1.
LOG_SPACE_TOLERANCE = 1e-2
LOOP_TOLERANCE = 1e-4
SCAN_TOLERANCE = 1e-4
# A divisor may be close to 0, and peers add their eps to other parts of it.
MATRIX_TOLERANCE = 2e-3
MATRIX_TF32_TOLERANCE = 1e-2  # peers round float32 operands to the 11 bits of TF32
# Half precision: inputs and results are rounded, and some peers sum in it as well.
HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Peer:
    """`module` must be importable, or the peer is reported as missing with `install`."""

    module: str
    install: str
    devices: tuple[str, ...] = ("cpu", "cuda")


PEERS = {
    "minGRU-pytorch": Peer("minGRU_pytorch", "pip install minGRU-pytorch==0.2.1 einops"),
    "minGRU-pytorch compiled": Peer("minGRU_pytorch", "pip install minGRU-pytorch==0.2.1 einops"),
    "associative_scan": Peer("torch._higher_order_ops.associative_scan", "comes with torch"),
    "associative_scan eager": Peer(
        "torch._higher_order_ops.associative_scan", "comes with torch", ("cpu",)
    ),
    "transformers": Peer("transformers.models.mamba", "pip install transformers", ("cpu",)),
    "mambapy": Peer("mambapy", "pip install mambapy", ("cpu",)),
    "accelerated-scan": Peer("accelerated_scan", "pip install accelerated-scan"),
    "accelerated-scan (Triton)": Peer(
        "accelerated_scan", "pip install accelerated-scan", ("cuda",)
    ),
    "fla-hgrn": Peer("fla.ops", "pip install flash-linear-attention", ("cuda",)),
    "mamba_ssm": Peer("mamba_ssm", "pip install --no-build-isolation mamba-ssm", ("cuda",)),
    "causal-conv1d": Peer(
        "causal_conv1d", "pip install --no-build-isolation causal-conv1d", ("cuda",)
    ),
    "mlstm_kernels": Peer("mlstm_kernels", "pip install mlstm_kernels", ("cpu",)),
    "mlstm_kernels xl_chunk": Peer("mlstm_kernels", "pip install mlstm_kernels", ("cuda",)),
    "mlstm_kernels limit_chunk": Peer("mlstm_kernels", "pip install mlstm_kernels", ("cuda",)),
    "mlstm_kernels step": Peer("mlstm_kernels", "pip install mlstm_kernels", ("cuda",)),
    "fla-simple-gla": Peer("fla.ops", "pip install flash-linear-attention", ("cuda",)),
    "xlstm": Peer("xlstm", "pip install xlstm", ("cpu",)),
    "transformers mamba2": Peer("transformers.models.mamba2", "pip install transformers", ("cpu",)),
    "transformers mamba2 compiled": Peer(
        "transformers.models.mamba2", "pip install transformers", ("cpu",)
    ),
    "transformers xlstm": Peer("transformers.models.xlstm", "pip install transformers", ("cpu",)),
    "transformers xlstm compiled": Peer(
        "transformers.models.xlstm", "pip install transformers", ("cpu",)
    ),
    "torch.nn": Peer("torch.nn", "comes with torch"),
    "loops": Peer("torch.nn", "comes with torch"),
    "transformer": Peer("torch.nn", "comes with torch", ("cpu",)),
}


def why_not(name: str, device: str) -> str | None:
    """The reason why a peer cannot take part here, or None."""
    peer = PEERS[name]
    if device not in peer.devices:
        return f"runs on {' and '.join(peer.devices)} only"
    try:
        found = importlib.util.find_spec(peer.module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"not installed: {peer.install}"


@dataclass
class Contender:
    """A peer in a comparison. `make` returns its call on one of the sets of buffers."""

    peer: str
    make: Callable[[int], Call]
    tolerance: float | None  # None: another model, whose results cannot be ours
    same: Callable[[Results], Results] = lambda results: results  # in our order and layout
    note: str = ""
    goal: float | None = None  # how many times faster ours is to be


@dataclass
class Comparison:
    what: str
    shape: tuple[int, ...]
    dtype: str
    ours: Callable[[int], Call]
    contenders: list[Contender]
    beside: dict[str, Call] = field(default_factory=dict)  # timed with them, compared with nothing


def compare(comparison: Comparison, timer, threads: int | None) -> Iterator[tuple[str, dict]]:
    """Checks each contender, then times all that agree in turn with ours.

    Yields ("peers", a row), ("alone", what ours took), ("not_run", a peer and the reason) and
    ("wrong", a result that differs): one peer that fails takes nothing from the others.
    """
    what, sets = comparison.what, timer.sets
    ours = [comparison.ours(index) for index in range(sets)]
    expected = [tensor.detach().clone() for tensor in ours[0]()]
    variants: dict[str, list[Call]] = {"ours": ours}
    differences: dict[str, float | None] = {}
    for contender in comparison.contenders:
        about = {"what": what, "peer": contender.peer, "shape": list(comparison.shape)}
        try:
            calls = [contender.make(index) for index in range(sets)]
            got = calls[0]()
            differences[contender.peer] = None
            if contender.tolerance is not None:
                differences[contender.peer] = _agree(
                    expected, contender.same(got), contender.tolerance, f"{contender.peer}, {what}"
                )
            del got
        except WrongResult as wrong:
            yield "wrong", {**about, "what": str(wrong), "threads": threads}
            continue
        except Exception as error:  # what a peer does not support, in its own words
            yield "not_run", {**about, "reason": first_line(error)}
            continue
        variants[contender.peer] = calls
    del expected
    samples = timer.measure(variants | {key: [call] for key, call in comparison.beside.items()})
    about = {"shape": list(comparison.shape), "dtype": comparison.dtype, "threads": threads}
    alone = {key: samples[key].summary() for key in comparison.beside}
    yield "alone", {"what": what, **about, "ours": samples["ours"].summary(), **alone}
    for contender in comparison.contenders:
        if contender.peer not in variants:
            continue
        goal = contender.goal
        if contender.peer == "minGRU-pytorch":
            goal = PEER_GOALS.get(what)
        yield (
            "peers",
            _row(
                what,
                contender.peer,
                samples["ours"],
                samples[contender.peer],
                threads,
                differences[contender.peer],
                shape=list(comparison.shape),
                dtype=comparison.dtype,
                goal=goal if timer.device == "cpu" else None,
                note=contender.note,
                **alone,
            ),
        )


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def _agree(ours: Results, theirs: Results, tolerance: float, what: str) -> float:
    """Results (tensors in the same order) must agree before they are timed."""
    difference = 0.0
    for a, b in zip(ours, theirs, strict=True):
        one = _difference(a.detach(), b.detach())
        if not one <= tolerance:
            raise WrongResult(
                f"{what}: ours and the peer's result differ by {one:.1e} of the norm "
                f"(accepted: {tolerance:.0e})"
            )
        difference = max(difference, one)
    return difference


def _row(
    what: str,
    peer: str,
    ours: Samples,
    theirs: Samples,
    threads: int | None,
    difference: float | None,
    **more: object,
) -> dict:
    """Ratio of the best rounds; and its range, round by round."""
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return {
        "what": what,
        "peer": peer,
        "threads": threads,
        "ours": ours.summary(),
        "theirs": theirs.summary(),
        "ratio": theirs.best / ours.best,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "relative_difference": difference,
        **more,
    }


# -- scans -----------------------------------------------------------------------------------------


def _passes(function: Callable, inputs: Results, grad: torch.Tensor, mode: str) -> Call:
    """Forward without gradients, or forward and the gradient of every input."""
    if mode == "forward":

        def call() -> Results:
            with torch.inference_mode():
                return (function(*inputs),)

        return call
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)

    def call() -> Results:
        h = function(*leaves)
        return (h, *torch.autograd.grad(h, leaves, grad))

    return call


def _ours_scan(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch_ext.linear_scan(a, b)[0]


def _combine(left: Results, right: Results) -> Results:
    return left[0] * right[0], right[0] * left[1] + right[1]


def _associative_scan(device: str) -> Callable:
    from torch._higher_order_ops.associative_scan import associative_scan

    mode = "pointwise" if device == "cuda" else "generic"  # pointwise is for CUDA alone

    @torch.compile
    def scan(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return associative_scan(_combine, (a, b), dim=1, combine_mode=mode)[1]

    return scan


def _accelerated_scan(peer: str, device: str) -> Callable:
    """On the CPU the package has its reference only, in plain torch."""
    name = "ref" if device == "cpu" else "scalar" if "Triton" in peer else "warp"
    return importlib.import_module(f"accelerated_scan.{name}").scan


def _fla_hgrn() -> Callable:
    chunk_hgrn = importlib.import_module("fla.ops.hgrn").chunk_hgrn
    return lambda g, x: chunk_hgrn(x, g)[0]


def scan_comparisons(
    names: list[str], shape: tuple[int, int, int], dtype: torch.dtype, device: str, sets: int
) -> Iterator[Comparison]:
    """linear_scan beside the scans of others, each on tensors in the layout that it wants."""
    name = "linear_scan"
    Checker(device).check(name, OPERATORS[name], shape, dtype, ())
    tensors = [
        draw_tensors(("a", "b", "grad_h"), shape, dtype, device, seed) for seed in range(sets)
    ]
    tolerance = SCAN_TOLERANCE if dtype.itemsize >= 4 else HALF_TOLERANCE

    def rows(index: int, transform: Callable = lambda x: x) -> Results:
        return tuple(transform(tensors[index][key]) for key in ("a", "b", "grad_h"))

    def time_last(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous()

    for mode in ("forward", "forward+backward"):
        contenders = []
        if "associative_scan" in names:
            scan = _associative_scan(device)

            def make_associative(index: int, scan: Callable = scan, mode: str = mode) -> Call:
                a, b, grad = rows(index)
                return _passes(scan, (a, b), grad, mode)

            contenders.append(
                Contender("associative_scan", make_associative, tolerance, note="compiled")
            )
        for peer in ("accelerated-scan", "accelerated-scan (Triton)"):
            if peer not in names:
                continue

            def make_accelerated(index: int, peer: str = peer, mode: str = mode) -> Call:
                a, b, grad = rows(index, time_last)
                return _passes(_accelerated_scan(peer, device), (a, b), grad, mode)

            contenders.append(
                Contender(
                    peer,
                    make_accelerated,
                    tolerance,
                    lambda results: tuple(x.transpose(1, 2) for x in results),
                    "its reference in torch" if device == "cpu" else "its own layout, (B, D, T)",
                )
            )
        if "fla-hgrn" in names:

            def make_hgrn(index: int, mode: str = mode) -> Call:
                a, b, grad = rows(index)
                return _passes(_fla_hgrn(), (a.float().log().to(dtype), b), grad, mode)

            def of_log(results: Results) -> Results:
                """Its first gradient is that of log a; ours is that of a."""
                if len(results) == 1:
                    return results
                h, grad_log, grad_b = results
                return h, (grad_log.float() / tensors[0]["a"].float()), grad_b

            contenders.append(
                Contender(
                    "fla-hgrn", make_hgrn, tolerance, of_log, "takes log a and exponentiates it"
                )
            )

        def make_ours(index: int, mode: str = mode) -> Call:
            a, b, grad = rows(index)
            return _passes(_ours_scan, (a, b), grad, mode)

        yield Comparison(f"linear_scan: {mode}", shape, _name(dtype), make_ours, contenders)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- minGRU-pytorch --------------------------------------------------------------------------------


class Projected:
    """Stands for the output of the peer's Linear: its forward asks it for a shape and two halves.

    With the Linear replaced by Identity the peer's own forward then does exactly its gates and its
    scan, on separate contiguous tensors, as ours does.
    """

    def __init__(self, candidate: torch.Tensor, gate: torch.Tensor):
        self.halves = (candidate, gate)
        self.shape = candidate.shape

    def chunk(self, chunks: int, dim: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return self.halves


def gate_comparisons(
    names: list[str], shape: tuple[int, int, int], dtype: torch.dtype, device: str, sets: int
) -> Iterator[Comparison]:
    """min_gru beside minGRU-pytorch's gates and scan, on the same finished projections."""
    name = "min_gru[g]"
    Checker(device).check(name, OPERATORS[name], shape, dtype, ())
    chosen = [n for n in ("minGRU-pytorch", "minGRU-pytorch compiled") if n in names]
    tensors = [
        draw_tensors(("gate", "candidate", "grad_h"), shape, dtype, device, seed)
        for seed in range(sets)
    ]

    def ours(gate: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        return torch_ext.min_gru(gate, candidate, activation="g")[0]

    def call_of(function: Callable, index: int, mode: str) -> Call:
        gate, candidate, grad_h = tensors[index].values()
        return _passes(function, (gate, candidate), grad_h, mode)

    for mode in ("forward", "forward+backward"):
        contenders = []
        for peer_name in chosen:
            theirs = _peer_gates(peer_name, shape[-1], dtype, device)

            def make(index: int, theirs: Callable = theirs, mode: str = mode) -> Call:
                return call_of(theirs, index, mode)

            contenders.append(
                Contender(peer_name, make, _log_space_tolerance(dtype), note=_float_note(dtype))
            )
        yield Comparison(
            f"min_gru: gates and scan, {mode}",
            shape,
            _name(dtype),
            lambda index, mode=mode: call_of(ours, index, mode),
            contenders,
        )


def _peer_gates(peer_name: str, dim: int, dtype: torch.dtype, device: str) -> Callable:
    from minGRU_pytorch.minGRU import minGRU as PeerMinGRU

    peer = PeerMinGRU(dim).to(device)
    peer.to_hidden_and_gate = nn.Identity()

    def theirs(gate: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        return peer(Projected(_at_least_float(candidate), _at_least_float(gate))).to(dtype)

    return torch.compile(theirs) if peer_name.endswith("compiled") else theirs


def _log_space_tolerance(dtype: torch.dtype) -> float:
    return LOG_SPACE_TOLERANCE if dtype.itemsize >= 4 else HALF_TOLERANCE


def _at_least_float(x: torch.Tensor) -> torch.Tensor:
    """A peer's sums of logarithms over thousands of steps are noise in half precision. Autocast
    knows that on a GPU and not on a CPU; this is kinder than both: one conversion."""
    return x.float() if x.dtype.itemsize == 2 else x


def _float_note(dtype: torch.dtype) -> str:
    return "its scan in float32" if dtype.itemsize == 2 else ""


# -- layers ----------------------------------------------------------------------------------------

LAYERS = ("MinGRU", "MinLSTM")


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Half precision as layers are trained with it; its cache is nothing for CUDA graphs."""
    half = dtype.itemsize == 2
    return torch.autocast(
        device, dtype if half else torch.bfloat16, enabled=half, cache_enabled=False
    )


def make_layer(layer: str, who: str, dim: int, device: str) -> nn.Module:
    """One layer, `dim` to `dim`, batch first, ours or a peer's, with the weights of one draw."""
    torch.manual_seed(0)
    if who == "torch.nn":
        builtin = {"MinGRU": nn.GRU, "MinLSTM": nn.LSTM}[layer]
        return builtin(dim, dim, bias=False, batch_first=True).to(device)
    blocks = {"MinGRU": 2, "MinLSTM": 3}[layer]
    weights = [torch.empty(dim, dim).uniform_(-(dim**-0.5), dim**-0.5) for _ in range(blocks)]
    if who == "torch_ext":
        ours = getattr(torch_ext, layer)(dim, dim, bias=False, batch_first=True, activation="g")
        with torch.no_grad():
            ours.weight_ih_l0.copy_(torch.cat(weights))
        return ours.to(device)
    # Ours has the gates' rows first, then the candidate's; theirs is the other way round.
    theirs_first = torch.cat((weights[-1], *weights[:-1]))
    if layer == "MinGRU":
        from minGRU_pytorch.minGRU import minGRU

        peer = minGRU(dim)
        linear = peer.to_hidden_and_gate
    else:
        from minGRU_pytorch.minLSTM import minLSTM

        peer = minLSTM(dim)
        linear = peer.to_hidden_and_f_i_gate
    with torch.no_grad():
        linear.weight.copy_(theirs_first)
    linear.register_forward_hook(lambda module, inputs, output: _at_least_float(output))
    return peer.to(device)


def layer_comparisons(
    layer: str, names: list[str], shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> Iterator[Comparison]:
    """Forward, and the gradients of the input and of every weight; half precision by autocast."""
    dim = shape[-1]
    drawn = draw_tensors(("x", "grad_h"), shape, torch.float32, device)
    x, grad_h = drawn["x"].requires_grad_(), drawn["grad_h"]

    def step_of(module: Callable, weights: list[nn.Parameter]) -> Call:
        def step() -> Results:
            with autocast(device, dtype):
                out = module(x)
            out = out[0] if isinstance(out, tuple) else out
            return out, *torch.autograd.grad(out, (x, *weights), grad_h.to(out.dtype))

        return step

    def make(who: str, compiled: bool = False) -> Call:
        module = make_layer(layer, who, dim, device)
        weights = list(module.parameters())
        return step_of(torch.compile(module) if compiled else module, weights)

    def in_our_order(results: Results) -> Results:
        out, grad_x, grad_weight = results
        first, *others = grad_weight.split(dim)
        return out, grad_x, torch.cat((*others, first))

    ours = make_layer(layer, "torch_ext", dim, device)
    if dtype.itemsize >= 4:
        _check_layer(layer.removeprefix("Min"), ours, x.detach())
    contenders = []
    for peer in ("minGRU-pytorch", "minGRU-pytorch compiled"):
        if peer in names:
            contenders.append(
                Contender(
                    peer,
                    lambda index, peer=peer: make("minGRU-pytorch", peer.endswith("compiled")),
                    _log_space_tolerance(dtype),
                    in_our_order,
                    _float_note(dtype),
                )
            )
    if "torch.nn" in names:
        contenders.append(
            Contender(
                "torch.nn",
                lambda index: make("torch.nn"),
                None,
                note=f"nn.{layer.removeprefix('Min')} of the same size: another model",
            )
        )
    projections = nn.Linear(dim, ours.weight_ih_l0.shape[0], bias=False).to(device)
    grad_projected = torch.randn(*shape[:-1], projections.out_features, device=device)

    def projections_alone() -> object:
        with autocast(device, dtype):
            out = projections(x)
        return torch.autograd.grad(out, (x, projections.weight), grad_projected.to(out.dtype))

    step = step_of(ours, list(ours.parameters()))
    yield Comparison(
        f"{layer}: layer, training step",
        shape,
        _name(dtype),
        lambda index: step,
        contenders,
        {"projections_alone": projections_alone},
    )


# -- Mamba -----------------------------------------------------------------------------------------


def _associative(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    return associative_scan(_combine, (a, b), dim=1, combine_mode="generic")


def _loop(a: torch.Tensor, b: torch.Tensor) -> Results:
    h, states = torch.zeros_like(b[:, 0]), []
    for decay, new in zip(a.unbind(1), b.unbind(1), strict=True):
        h = decay * h + new
        states.append(h)
    return a, torch.stack(states, 1)


class PlainMamba(nn.Module):
    """A Mamba layer's formulas in plain PyTorch, with all states in memory, and another's weights.

    `scan` is "associative_scan", torch's own, or "loop", which is the reference.
    """

    def __init__(self, layer: nn.Module, scan: str):
        super().__init__()
        self.scan = {"associative_scan": _associative, "loop": _loop}[scan]
        self.dt_rank, self.d_state = layer.dt_rank, layer.d_state
        copied = {name: p.detach().clone() for name, p in layer.named_parameters()}
        for name, value in copied.items():
            self.register_parameter(name.replace(".", "__"), nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time = x.shape[1]
        u, z = F.linear(x, self.in_proj__weight).chunk(2, -1)
        taps = self.conv1d__weight.shape[-1]
        u = F.conv1d(
            u.transpose(1, 2), self.conv1d__weight, self.conv1d__bias, padding=taps - 1,
            groups=u.shape[-1],
        )  # fmt: skip
        u = F.silu(u[..., :time].transpose(1, 2))
        sizes = [self.dt_rank, self.d_state, self.d_state]
        delta, B, C = F.linear(u, self.x_proj__weight).split(sizes, -1)
        delta = F.softplus(F.linear(delta, self.dt_proj__weight, self.dt_proj__bias))
        a = torch.exp(delta[..., None] * -torch.exp(self.A_log))
        h = self.scan(a, (delta * u)[..., None] * B[:, :, None])[1]
        y = (h * C[:, :, None]).sum(-1) + self.D * u
        return F.linear(y * F.silu(z), self.out_proj__weight)


def _make_mamba(who: str, ours: nn.Module) -> Callable:
    """The peer's layer, with the weights of ours. Names of weights differ only by `__`."""
    if who.startswith("associative_scan"):
        plain = PlainMamba(ours, "associative_scan")
        return plain if who.endswith("eager") else torch.compile(plain)
    if who == "transformers":
        from transformers import MambaConfig, logging
        from transformers.models.mamba.modeling_mamba import MambaMixer

        logging.set_verbosity_error()  # that it is slow without its kernels is what we measure
        config = MambaConfig(
            hidden_size=ours.d_model, state_size=ours.d_state, expand=2, num_hidden_layers=1
        )
        peer: nn.Module = MambaMixer(config, layer_idx=0)
    else:
        from mambapy.mamba import MambaBlock, MambaConfig

        peer = MambaBlock(MambaConfig(d_model=ours.d_model, n_layers=1, d_state=ours.d_state))
    peer.load_state_dict(ours.state_dict())
    return peer


MAMBA_NOTES = {
    "transformers": "MambaMixer, its path without kernels",
    "mambapy": "MambaBlock, its pscan",
    "associative_scan": "torch's, in a plain layer, compiled",
    "associative_scan eager": "torch's, in a plain layer",
}


def _layer_call(module: Callable, x: torch.Tensor, grad: torch.Tensor, mode: str) -> Call:
    """Forward, or with the gradients of x and of the weights, in the order of their names."""
    parameters = {
        name.removeprefix("_orig_mod.").replace("__", "."): parameter
        for name, parameter in module.named_parameters()
    }
    weights = [parameters[name] for name in sorted(parameters)]

    def run(x: torch.Tensor) -> torch.Tensor:
        out = module(x)
        return out[0] if isinstance(out, tuple) else out

    def forward() -> Results:
        with torch.no_grad():
            return (run(x),)

    def train() -> Results:
        leaf = x.detach().requires_grad_()
        out = run(leaf)
        return (out, *torch.autograd.grad(out, (leaf, *weights), grad))

    return forward if mode == "forward" else train


MATRIX_NOTES = {
    "Mamba2": "Mamba2Mixer, its path without kernels",
    "mLSTMLayer": "mLSTMLayer, which is quadratic in T",
    "xLSTMLargeBlock": "xLSTMBlock, native chunkwise",
}


def mamba_comparison(mode: str, time: int, width: int, names: list[str]) -> Comparison:
    """One layer, one row of `time` tokens: forward, or the gradients of input and weights too."""
    torch.manual_seed(0)
    ours = torch_ext.Mamba(width)
    x = torch.randn(1, time, width)
    grad = torch.randn(1, time, width)
    _check_mamba(ours, x)

    contenders = [
        Contender(
            who,
            lambda index, who=who: _layer_call(_make_mamba(who, ours), x, grad, mode),
            LOOP_TOLERANCE,
            note=MAMBA_NOTES[who],
        )
        for who in names
    ]
    step = _layer_call(ours, x, grad, mode)
    return Comparison(
        f"Mamba: layer, {mode}, T={time}",
        (1, time, width),
        "float32",
        lambda index: step,
        contenders,
    )


def _import_from(package: str, module: str) -> types.ModuleType:
    """A module of a package whose own __init__ may ask for more than is here: mamba_ssm's imports
    its language models, and with them what other versions of transformers had."""
    try:
        return importlib.import_module(f"{package}.{module}")
    except ImportError:
        found = importlib.util.find_spec(package)
        if found is None or found.submodule_search_locations is None:
            raise
        bare = types.ModuleType(package)
        bare.__path__, bare.__spec__ = list(found.submodule_search_locations), found
        sys.modules[package] = bare
        return importlib.import_module(f"{package}.{module}")


def _mamba_ssm_scan() -> Callable:
    return _import_from("mamba_ssm", "ops.selective_scan_interface").selective_scan_fn


def _mamba_ssm_step() -> Callable:
    module = _import_from("mamba_ssm", "ops.triton.selective_state_update")
    return module.selective_state_update


def _causal_conv1d(function: str) -> Callable:
    return getattr(importlib.import_module("causal_conv1d"), function)


def _turned(results: Results) -> Results:
    """(B, D, T) as (B, T, D), and the other way round."""
    return tuple(x.transpose(1, 2) if x.dim() == 3 else x for x in results)


def mamba_operator_comparisons(
    names: list[str],
    name: str,
    operator: MambaOperator,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    checker: MambaChecker,
    sets: int,
) -> Iterator[Comparison]:
    """selective_scan beside mamba_ssm's, which takes (B, D, T), causal_conv1d beside causal-conv1d's
    on the same memory. Forward, and with the gradients of all inputs."""
    checker.check(name, operator, shape, dtype, ())
    checker.references.clear()  # large, and not asked for again
    drawn = make_inputs(operator, shape, dtype)
    buffers = [on_device(*drawn, checker.device) for _ in range(sets)]
    make_inputs.cache_clear()
    convolution, options = operator.function == "causal_conv1d", options_of(operator)
    peer = "causal-conv1d" if convolution else "mamba_ssm"

    def given(index: int) -> tuple[Results, torch.Tensor]:
        inputs, grad = buffers[index]
        return tuple(x for x in inputs if x is not None), grad

    def ours(*inputs: torch.Tensor) -> torch.Tensor:
        return getattr(torch_ext, operator.function)(*inputs, **options)[0]

    def make_ours(index: int, mode: str) -> Call:
        inputs, grad = given(index)
        return _passes(ours, inputs, grad, mode)

    def make_theirs(index: int, mode: str) -> Call:
        inputs, grad = given(index)
        function = _causal_conv1d("causal_conv1d_fn") if convolution else _mamba_ssm_scan()
        inputs, (grad,) = _turned(inputs), _turned((grad,))
        if not convolution:  # time must be the last in memory as well
            inputs, grad = tuple(x.contiguous() for x in inputs), grad.contiguous()
        return _passes(functools.partial(function, **options), inputs, grad, mode)

    tolerance = SCAN_TOLERANCE if dtype.itemsize >= 4 else HALF_TOLERANCE
    note = "its CUDA kernels"
    if not convolution and not operator.time_last:
        note += ", its own layout, (B, D, T)"
    for mode in ("forward", "forward+backward"):
        contenders = []
        if peer in names:
            make = functools.partial(make_theirs, mode=mode)
            contenders.append(Contender(peer, make, tolerance, _turned, note))
        make = functools.partial(make_ours, mode=mode)
        yield Comparison(f"{name}: {mode}", shape, _name(dtype), make, contenders)


def mamba_step_comparisons(
    names: list[str], batch: int, dim: int, dtype: torch.dtype, device: str, sets: int
) -> Iterator[Comparison]:
    """One token in place: selective_scan_step_ beside mamba_ssm's selective_state_update, and
    causal_conv1d_step_ beside causal_conv1d_update. The first call's y and state must agree."""
    tolerance = SCAN_TOLERANCE if dtype.itemsize >= 4 else HALF_TOLERANCE

    def call_of(function: Callable, state: torch.Tensor) -> Call:
        def call() -> Results:
            with torch.inference_mode():
                return function(state), state

        return call

    def scan_step(inputs: tuple) -> Callable:
        function = _mamba_ssm_step()
        u, delta, A, B, C, D, z, delta_bias = inputs
        return lambda state: function(
            state, u, delta, A, B, C, D=D, z=z, dt_bias=delta_bias, dt_softplus=True
        )

    def conv_step(inputs: tuple) -> Callable:
        function = _causal_conv1d("causal_conv1d_update")
        x, weight, bias = inputs
        return lambda state: function(x, state, weight, bias, activation="silu")

    for peer, name, theirs, note in (
        ("mamba_ssm", "selective_scan[fused]", scan_step, "its Triton kernel"),
        ("causal-conv1d", "causal_conv1d", conv_step, "its CUDA kernel"),
    ):
        if peer not in names:
            continue
        operator = MAMBA_OPERATORS[name]
        check_step(name, operator, batch, dim, dtype, device)

        def make_ours(index: int, operator: MambaOperator = operator) -> Call:
            inputs, state = step_inputs(operator, batch, dim, dtype, device)
            return call_of(lambda state: make_step(operator, inputs, state)(), state)

        def make_theirs(
            index: int, operator: MambaOperator = operator, theirs: Callable = theirs
        ) -> Call:
            inputs, state = step_inputs(operator, batch, dim, dtype, device)
            return call_of(theirs(inputs), state)

        contenders = [Contender(peer, make_theirs, tolerance, note=note)]
        what = f"{operator.function}_step_"
        yield Comparison(what, (batch, dim), _name(dtype), make_ours, contenders)
    make_inputs.cache_clear()


def _check_mamba(layer: nn.Module, x: torch.Tensor) -> None:
    """Its first steps against plain PyTorch's loop in float64, all of them against itself there."""
    exact = PlainMamba(layer, "loop").double()
    with torch.no_grad():
        difference = _difference(layer(x[:, :128]), exact(x[:, :128].double()))
        whole = copy.deepcopy(layer).double()(x.double())
        difference = max(difference, _difference(layer(x), whole))
    if not difference <= LOOP_TOLERANCE:
        raise WrongResult(
            f"Mamba layer is wrong by {difference:.1e} of its norm (accepted: {LOOP_TOLERANCE:.0e})"
        )


# -- matrix memories -------------------------------------------------------------------------------


def _mlstm_kernels(chunk: int) -> Callable:
    """The package's chunks in plain PyTorch, whose gradients are autograd's."""
    name = "chunkwise--native_autograd"
    kernel = importlib.import_module("mlstm_kernels.torch").get_mlstm_kernel(name)
    return functools.partial(kernel, chunk_size=chunk, autocast_kernel_dtype=torch.float32)


def mlstm_comparisons(shape: MatrixShape) -> Iterator[Comparison]:
    """mlstm beside mlstm_kernels in several chunk sizes, each on tensors in its own layout."""
    operator = MATRIX_OPERATORS["mlstm"]
    MatrixChecker().check("mlstm", operator, shape, torch.float32, ())
    inputs, grad = make_matrix_inputs(operator, shape, torch.float32)

    def heads_first(results: Results) -> Results:
        return tuple(x.transpose(1, 2).contiguous() for x in results)

    def ours(*inputs: torch.Tensor) -> torch.Tensor:
        return torch_ext.mlstm(*inputs)[0]

    def make(index: int, chunk: int, mode: str) -> Call:
        (theirs,) = heads_first((grad,))
        return _passes(_mlstm_kernels(chunk), heads_first(inputs), theirs, mode)

    for mode in ("forward", "forward+backward"):
        contenders = []
        for chunk in MLSTM_CHUNKS:
            default = chunk == MLSTM_CHUNKS[0]
            contenders.append(
                Contender(
                    "mlstm_kernels" if default else f"mlstm_kernels, chunks of {chunk}",
                    functools.partial(make, chunk=chunk, mode=mode),
                    MATRIX_TOLERANCE,
                    heads_first,
                    "native chunkwise, exact gradients" + (", its default chunk" * default),
                    MLSTM_GOALS[mode] if default else None,
                )
            )
        step = _passes(ours, inputs, grad, mode)
        yield Comparison(
            f"mlstm: {mode}", shape, "float32", lambda index, step=step: step, contenders
        )


def _mlstm_triton(peer: str, sigmoid: bool) -> tuple[Callable, int]:
    """A Triton kernel of the package and the chunk that its authors time it with."""
    kernels = importlib.import_module("mlstm_kernels.torch")
    if peer.endswith("step"):
        return kernels.get_mlstm_step_kernel("triton"), 1
    name = f"chunkwise--triton_{peer.split()[-1]}{'_siging' * sigmoid}"
    return kernels.get_mlstm_kernel(name), 64 if "limit" in peer else 128


def _fla_simple_gla() -> Callable:
    return importlib.import_module("fla.ops.simple_gla").chunk_simple_gla


def _mamba_ssm_ssd() -> Callable:
    return _import_from("mamba_ssm", "ops.triton.ssd_combined").mamba_chunk_scan_combined


def _heads_first(results: Results) -> Results:
    return tuple(x.transpose(1, 2).contiguous() for x in results)


def _same(results: Results) -> Results:
    return results


def _matrix_peer(
    peer: str, inputs: Results, grad: torch.Tensor, options: dict, mode: str
) -> tuple[Call, Callable[[Results], Results], str]:
    """A peer's call on buffers of its own layout, how its results become ours, and what to say."""
    if peer == "mamba_ssm":
        function = functools.partial(_mamba_ssm_ssd(), chunk_size=256)
        return _passes(function, inputs, grad, mode), _same, "chunks of 256"
    if peer == "fla-simple-gla":
        q, k, v, i, f = inputs
        gate = i.float().sigmoid()
        scaled = (k.float() * gate[..., None]).to(k.dtype)
        decay = F.logsigmoid(f.float())
        scale, function = q.shape[-1] ** -0.5, _fla_simple_gla()

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor):
            return function(q, k, v, g=g, scale=scale)[0]

        def ours(results: Results) -> Results:
            """Its gradients are those of the keys times the gate, and of the logarithm of the decay."""
            if len(results) == 1:
                return results
            h, grad_q, grad_k, grad_v, grad_decay = results
            of_gate = (grad_k.float() * k.float()).sum(-1)
            grad_i = of_gate * gate * (1 - gate)
            return (
                h, grad_q, grad_k.float() * gate[..., None], grad_v, grad_i,
                grad_decay.float() * (-f.float()).sigmoid(),
            )  # fmt: skip

        note = "takes log decays, and keys times the gate"
        return _passes(call, (q, scaled, v, decay), grad, mode), ours, note
    sigmoid = options.get("input_gate") == "sigmoid"
    kernel, chunk = _mlstm_triton(peer, sigmoid)
    more = {"normalize": False} if sigmoid else {}
    function = functools.partial(
        kernel, chunk_size=chunk, autocast_kernel_dtype=inputs[0].dtype, **more
    )
    (theirs,) = _heads_first((grad,))
    note = f"its Triton kernels, chunks of {chunk}, its own layout, (B, H, T, K)"
    return _passes(function, _heads_first(inputs), theirs, mode), _heads_first, note


def matrix_operator_comparisons(
    names: list[str],
    name: str,
    operator: MatrixOperator,
    shape: MatrixShape,
    dtype: torch.dtype,
    checker: MatrixChecker,
    variant: tuple,
    sets: int,
) -> Iterator[Comparison]:
    """A matrix memory on a GPU beside kernels of the same equations. Forward, and with the gradients of
    all inputs."""
    checker.check(name, operator, shape, dtype, variant)
    checker.references.clear()
    drawn = make_matrix_inputs(operator, shape, dtype)
    buffers = [on_device(*drawn, checker.device) for _ in range(sets)]
    make_matrix_inputs.cache_clear()
    options = dict(operator.options)

    def ours(*inputs: torch.Tensor) -> torch.Tensor:
        return getattr(torch_ext, operator.function)(*inputs, **options)[0]

    tolerance = MATRIX_TF32_TOLERANCE if dtype.itemsize >= 4 else HALF_TOLERANCE
    for mode in ("forward", "forward+backward"):
        contenders = []
        for peer in names:
            contender = Contender(peer, lambda index: None, tolerance)

            def make(
                index: int, peer: str = peer, contender: Contender = contender, mode: str = mode
            ) -> Call:
                call, same, contender.note = _matrix_peer(peer, *buffers[index], options, mode)
                if index == 0:  # the results that are compared
                    contender.same = same
                return call

            contender.make = make
            contenders.append(contender)
        yield Comparison(
            f"{name}: {mode}",
            shape,
            _name(dtype),
            lambda index, mode=mode: _passes(ours, *buffers[index], mode),
            contenders,
        )


def matrix_step_comparisons(
    peer: str,
    operator: MatrixOperator,
    shape: MatrixShape,
    batch: int,
    dtype: torch.dtype,
    buffers: list[tuple[Results, Results]],
) -> Iterator[Comparison]:
    """One token: mlstm_step_ beside mlstm_kernels' step, which gives new states, and ssd_step_ beside
    mamba_ssm's selective_state_update. h and the states after the first call must agree."""
    tolerance = SCAN_TOLERANCE if dtype.itemsize >= 4 else HALF_TOLERANCE
    function = getattr(torch_ext, f"{operator.function}_step_")

    def copied(index: int) -> tuple[Results, Results]:
        inputs, state = buffers[index]
        return inputs, tuple(x.clone() for x in state)

    def make_ours(index: int) -> Call:
        inputs, state = copied(index)
        arguments = step_arguments(operator, inputs, state)

        def call() -> Results:
            with torch.inference_mode():
                return function(*arguments), *state

        return call

    def make_theirs(index: int) -> Call:
        inputs, state = copied(index)
        if operator.function == "ssd":
            x, dt, A, B, C = inputs
            update, (S,) = _mamba_ssm_step(), state
            dt = dt[..., None].expand(*x.shape)
            A = A[:, None, None].expand(*S.shape[1:])
            # Without a skip connection and a bias it raises; expanded, they are one number to a head.
            none = torch.zeros_like(A[:, 0, 0])[:, None].expand(*x.shape[1:])

            def call() -> Results:
                with torch.inference_mode():
                    return update(S, x, dt, A, B, C, D=none, dt_bias=none), S

            return call
        kernel, _ = _mlstm_triton(peer, False)
        q, k, v, i, f = inputs
        C, n, m = state
        given = (q, k, v, i[..., None], f[..., None], C, n, m[..., None])

        def call() -> Results:
            with torch.inference_mode():
                h, (C, n, m) = kernel(*given)
                return h, C, n, m.reshape(state[2].shape)

        return call

    note = "its Triton kernel" + ("" if operator.function == "ssd" else ", which gives new states")
    yield Comparison(
        f"{operator.function}_step_",
        (batch, *shape[2:]),
        _name(dtype),
        make_ours,
        [Contender(peer, make_theirs, tolerance, note=note)],
    )


def _make_matrix_layer(who: str, ours: nn.Module, time: int) -> Callable:
    """The peer's layer with the weights of ours, whose names are the same."""
    if who.startswith("transformers"):
        import transformers

        transformers.logging.set_verbosity_error()  # that it has no kernels is what we measure
    if who.startswith("transformers mamba2"):
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        config = transformers.Mamba2Config(
            hidden_size=ours.d_model, num_heads=ours.nheads, head_dim=ours.headdim, n_groups=1,
            state_size=ours.d_state, num_hidden_layers=1,
        )  # fmt: skip
        peer: nn.Module = Mamba2Mixer(config, layer_idx=0)
    elif who.startswith("transformers xlstm"):
        from transformers.models.xlstm.modeling_xlstm import xLSTMBlock

        config = transformers.xLSTMConfig(
            hidden_size=ours.norm_mlstm.weight.numel(), num_heads=XLSTM_HEADS, num_hidden_layers=1,
            ffn_proj_factor=2.6667, mode="train", chunk_size=min(64, time),
            autocast_kernel_dtype="float32",
        )  # fmt: skip
        peer = xLSTMBlock(config)
    else:
        import xlstm

        config = xlstm.mLSTMLayerConfig(
            embedding_dim=ours.proj_down.out_features, num_heads=XLSTM_HEADS, context_length=time
        )
        peer = xlstm.mLSTMLayer(config)
    peer.load_state_dict(ours.state_dict())
    return torch.compile(peer) if who.endswith("compiled") else peer


def matrix_layer_comparisons(
    layer: str, time: int, width: int, names: list[str]
) -> Iterator[Comparison]:
    """Mamba2, mLSTMLayer or xLSTMLargeBlock, one row of `time` tokens, with the peers' weights."""
    torch.manual_seed(0)
    if layer == "Mamba2":
        ours: nn.Module = torch_ext.Mamba2(width, headdim=min(64, width))
    elif layer == "mLSTMLayer":
        ours = torch_ext.mLSTMLayer(embedding_dim=width, num_heads=XLSTM_HEADS, context_length=time)
    else:
        ours = torch_ext.xLSTMLargeBlock(
            embedding_dim=width, num_heads=XLSTM_HEADS, num_blocks=1, vocab_size=1
        )
    chosen = [name for name in MATRIX_LAYER_PEERS[layer] if name in names]
    if not chosen:
        return
    x, grad = torch.randn(1, time, width), torch.randn(1, time, width)
    with torch.no_grad():
        difference = _difference(ours(x), copy.deepcopy(ours).double()(x.double()))
    if not difference <= LOOP_TOLERANCE:
        raise WrongResult(
            f"{layer} differs from itself in float64 by {difference:.1e} of its norm (accepted: "
            f"{LOOP_TOLERANCE:.0e})"
        )
    for mode in ("forward", "training step"):
        contenders = [
            Contender(
                who,
                lambda index, who=who, mode=mode: _layer_call(
                    _make_matrix_layer(who, ours, time), x, grad, mode
                ),
                MATRIX_TOLERANCE,
                note=MATRIX_NOTES[layer],
            )
            for who in chosen
        ]
        step = _layer_call(ours, x, grad, mode)
        yield Comparison(
            f"{layer}: layer, {mode}, T={time}",
            (1, time, width),
            "float32",
            lambda index, step=step: step,
            contenders,
        )


# -- the paper's table -----------------------------------------------------------------------------


class LoopGRU(nn.Module):
    """torch.nn.GRU's equations as a Python loop, (T, B, I) -> (T, B, H).

    Kind to the loop: one matrix product projects all inputs at once, and unbind's backward is one
    stack, where indexing x[t] would write a whole zero gradient at every step.
    """

    def __init__(self, twin: nn.GRU):
        super().__init__()
        self.twin = twin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twin = self.twin
        h = x.new_zeros(x.shape[1], twin.hidden_size)
        outputs = []
        for projected in F.linear(x, twin.weight_ih_l0, twin.bias_ih_l0).unbind(0):
            recurrent = F.linear(h, twin.weight_hh_l0, twin.bias_hh_l0)
            reset_x, update_x, new_x = projected.chunk(3, 1)
            reset_h, update_h, new_h = recurrent.chunk(3, 1)
            reset = torch.sigmoid(reset_x + reset_h)
            update = torch.sigmoid(update_x + update_h)
            new = torch.tanh(new_x + reset * new_h)
            h = torch.lerp(new, h, update)
            outputs.append(h)
        return torch.stack(outputs)


class LoopLSTM(nn.Module):
    """torch.nn.LSTM's equations as a Python loop, (T, B, I) -> (T, B, H); see LoopGRU."""

    def __init__(self, twin: nn.LSTM):
        super().__init__()
        self.twin = twin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twin = self.twin
        h = x.new_zeros(x.shape[1], twin.hidden_size)
        c = torch.zeros_like(h)
        bias = twin.bias_ih_l0 + twin.bias_hh_l0
        outputs = []
        for projected in F.linear(x, twin.weight_ih_l0, bias).unbind(0):
            gates = projected + F.linear(h, twin.weight_hh_l0)
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs)


def _training(module: nn.Module, x: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    parameters = [p for p in module.parameters() if p.requires_grad]

    def step() -> tuple[torch.Tensor, ...]:
        out = module(x)
        if isinstance(out, tuple):
            out = out[0]
        loss = out.square().mean()
        return (out, *torch.autograd.grad(loss, parameters))

    return step


def _check_layer(kind: str, layer: nn.Module, x: torch.Tensor) -> None:
    """Our layer's output for two rows against its equations in float64, written out here."""
    reference = {"GRU": torch_ext.min_gru_reference, "LSTM": torch_ext.min_lstm_reference}[kind]
    with torch.no_grad():
        out = layer(x)[0][:2].double()
        weight = layer.weight_ih_l0.double()
        bias = layer.bias_ih_l0.double() if layer.bias else None
        blocks = F.linear(x[:2].double(), weight, bias).chunk(2 if kind == "GRU" else 3, dim=-1)
        difference = _difference(out, reference(*blocks, activation="g")[0])
    if not difference <= LOOP_TOLERANCE:
        raise WrongResult(
            f"Min{kind} layer is wrong by {difference:.1e} of its norm "
            f"(accepted: {LOOP_TOLERANCE:.0e})"
        )


def papers_table(times: tuple[int, ...], width: int, threads: int | None, timer) -> Iterator[dict]:
    """Forward, loss and backward of one layer, batch 64: ours, the loops and torch.nn in turn."""
    device = timer.device
    for time in times:
        torch.manual_seed(0)
        x = torch.randn(PAPER_BATCH, time, width, device=device)
        x_time_major = x.transpose(0, 1).contiguous()
        builtin = {"GRU": nn.GRU(width, width), "LSTM": nn.LSTM(width, width)}
        loops = {"GRU": LoopGRU(builtin["GRU"]), "LSTM": LoopLSTM(builtin["LSTM"])}
        ours = {
            "GRU": torch_ext.MinGRU(width, width, batch_first=True, activation="g"),
            "LSTM": torch_ext.MinLSTM(width, width, batch_first=True, activation="g"),
        }
        for kind in ("GRU", "LSTM"):
            for module in (builtin[kind], loops[kind], ours[kind]):
                module.to(device)
            calls = {
                "ours": _training(ours[kind], x),
                "loop": _training(loops[kind], x_time_major),
                "torch.nn": _training(builtin[kind], x_time_major),
            }
            _check_layer(kind, ours[kind], x)
            _agree(calls["loop"](), calls["torch.nn"](), LOOP_TOLERANCE, f"{kind} loop, T={time}")
            # Tens of thousands of launches: a graph of them is not what the paper timed.
            samples = timer.measure({key: [call] for key, call in calls.items()}, graph=False)
            name = f"min_{kind.lower()}"
            for peer, key in ((f"{kind} as a Python loop", "loop"), (f"nn.{kind}", "torch.nn")):
                yield _row(
                    f"Min{kind} layer, T={time}",
                    peer,
                    samples["ours"],
                    samples[key],
                    threads,
                    None,
                    shape=[PAPER_BATCH, time, width],
                    dtype="float32",
                    papers_ratio=PAPER_RATIOS.get((name, time)) if key == "loop" else None,
                )
