"""Peak memory of a call beyond its inputs.

On the CPU it is the growth of a process' largest resident set (`ru_maxrss`): that counts scratch
memory of C++ code as well, which torch's profiler does not see, and only pages that were touched.
Each case runs in a process of its own, forked from one that has imported everything:

    python benchmarks/memory.py CASES.json     one line of JSON per case

On a GPU gpu.py asks torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

WARM_UP_SHAPE = (1, 64, 64)
MAMBA_MEMORY = ("selective_scan", "selective_scan[fused]", "causal_conv1d")


def make_cases(
    operators: Sequence[str], peers: Sequence[str], shape: tuple[int, int, int], dtype: str
) -> list[dict]:
    """Operators, then layers; what a peer is asked for, ours is asked for too."""
    from shapes import MAMBA_OPERATORS

    operators = [
        name
        for name in operators  # one of Mamba's operators for each way that its memory goes
        if name not in MAMBA_OPERATORS or name in MAMBA_MEMORY
    ]
    cases = [
        {"who": "torch_ext", "what": name, "mode": mode, "shape": list(shape), "dtype": dtype}
        for name in operators
        for mode in ("forward", "forward+backward")
    ]
    layers = []
    if any(name.startswith("min_gru") for name in operators):
        layers += ["MinGRU"]
    if any(name.startswith("min_lstm") for name in operators):
        layers += ["MinLSTM"]
    for layer in layers:
        for who in ("torch_ext", *(p for p in ("minGRU-pytorch", "torch.nn") if p in peers)):
            cases.append(
                {
                    "who": who,
                    "what": layer,
                    "mode": "training step",
                    "shape": list(shape),
                    "dtype": dtype,
                }
            )
    return cases


def tensors_needed(case: dict) -> int | None:
    """How many (B, T, D) tensors an operator's results are: no implementation needs fewer."""
    from shapes import MAMBA_OPERATORS, OPERATORS

    if case["what"] in MAMBA_OPERATORS:
        return 1 if case["mode"] == "forward" else MAMBA_OPERATORS[case["what"]].results
    operator = OPERATORS.get(case["what"])
    if operator is None:
        return None
    return 1 if case["mode"] == "forward" else 1 + len(operator.inputs)


def make_case(case: dict, device: str) -> Callable[[], object]:
    """Inputs are drawn in place, in their own dtype: nothing that was larger is behind them."""
    import torch
    from shapes import MAMBA_OPERATORS, OPERATORS

    import torch_ext

    dtype = getattr(torch, case["dtype"])
    shape = tuple(case["shape"])
    if case["what"] in MAMBA_OPERATORS:
        return _make_mamba_case(case, shape, dtype, device)

    def draw() -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_()

    if case["what"] in OPERATORS:
        operator = OPERATORS[case["what"]]
        function = getattr(torch_ext, operator.function)
        options = dict(operator.options)
        inputs = [draw().sigmoid_() if name == "a" else draw() for name in operator.inputs]
        if case["mode"] == "forward":

            def call() -> object:
                with torch.inference_mode():
                    return function(*inputs, **options)

            return call
        grad_h = draw()
        leaves = [tensor.requires_grad_() for tensor in inputs]

        def call() -> object:
            h, _ = function(*leaves, **options)
            return h, torch.autograd.grad(h, leaves, grad_h)

        return call

    from peers import autocast, make_layer

    layer = make_layer(case["what"], case["who"], shape[-1], device)
    x = torch.empty(shape, device=device).normal_().requires_grad_()
    grad_h = torch.empty(shape, device=device, dtype=dtype).normal_()
    parameters = [x, *layer.parameters()]

    def call() -> object:
        with autocast(device, dtype):
            out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        return out, torch.autograd.grad(out, parameters, grad_h.to(out.dtype))

    return call


def _make_mamba_case(case: dict, shape: tuple, dtype, device: str) -> Callable[[], object]:
    import torch
    from mamba_operators import options_of
    from shapes import MAMBA_OPERATORS, MAMBA_STATES, MAMBA_TAPS

    import torch_ext

    operator = MAMBA_OPERATORS[case["what"]]
    function, options = getattr(torch_ext, operator.function), options_of(operator)
    batch, steps, dim = shape
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def draw(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_()

    def constant(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=wide, device=device).uniform_(-1, -0.01)

    if operator.function == "causal_conv1d":
        inputs = [draw(*shape), constant(dim, MAMBA_TAPS), constant(dim)]
    else:
        inputs = [draw(*shape), draw(*shape).uniform_(1e-3, 0.1), constant(dim, MAMBA_STATES)]
        inputs += [draw(batch, steps, MAMBA_STATES) for _ in ("B", "C")]
        inputs += [constant(dim), draw(*shape), constant(dim)] if operator.fused else [None] * 3
    if case["mode"] == "forward":

        def call() -> object:
            with torch.inference_mode():
                return function(*inputs, **options)

        return call
    grad = draw(*shape)
    leaves = [None if x is None else x.requires_grad_() for x in inputs]
    given = [x for x in leaves if x is not None]

    def call() -> object:
        y, _ = function(*leaves, **options)
        return y, torch.autograd.grad(y, given, grad)

    return call


# -- a long text ------------------------------------------------------------------------------------


def make_long_cases(sizes, dtype: str) -> list[dict]:
    """A MambaLM reads texts of growing length: all at once, and in chunks with a state between."""
    model = {"what": "long", "width": sizes.width, "layers": sizes.layers, "dtype": dtype}
    return [
        *({**model, "chunk": None, "tokens": tokens} for tokens in sizes.whole),
        *({**model, "chunk": sizes.chunk, "tokens": tokens} for tokens in sizes.chunked),
    ]


def _measure_long(case: dict, threads: int) -> dict:
    """One reading, after a small one: seconds, and memory beyond the model and its tokens."""
    import torch
    from shapes import LONG_VOCAB

    import torch_ext

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    model = torch_ext.MambaLM(LONG_VOCAB, case["width"], case["layers"], dtype=dtype).eval()
    ids = torch.randint(LONG_VOCAB, (1, case["tokens"]))

    def read(ids: torch.Tensor, chunk: int) -> torch.Tensor:
        state = None
        for piece in ids.split(chunk, 1):
            logits, state = model.prefill(piece, state, last_only=True)
        return logits

    with torch.inference_mode():
        read(ids[:, :64], 32)
        first = min(case["tokens"], 256)
        whole, parts = read(ids[:, :first], first), read(ids[:, :first], 64)
        error = ((whole - parts).float().norm() / whole.float().norm()).item()
        if not error <= (1e-4 if dtype.itemsize >= 4 else 5e-2):
            return {"failed": f"chunks differ from the whole by {error:.1e} of the norm"}
        before = _peak()
        start = time.perf_counter()
        read(ids, case["chunk"] or case["tokens"])
        seconds = time.perf_counter() - start
        after = _peak()
    return {**case, "threads": threads, "seconds": seconds, "peak_bytes": after - before}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure(case: dict, threads: int) -> dict:
    import torch

    torch.set_num_threads(threads)
    make_case({**case, "shape": list(WARM_UP_SHAPE)}, "cpu")()  # code, thread pool, its stacks
    call = make_case(case, "cpu")
    before = _peak()
    result = call()
    after = _peak()
    del result
    return {**case, "peak_bytes": after - before}


def _forked(work: Callable[[], dict]) -> dict:
    """Runs it in a child; a child that dies is a result as well."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            answer = work()
        except BaseException as error:
            answer = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"failed": f"ended with status {status}"}


def peak_memory(cases: Sequence[dict], threads: int, timeout: float = 600) -> Iterator[dict]:
    """The CPU's rows, from a process that leaves malloc as it is."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.json"
        file.write_text(json.dumps({"cases": list(cases), "threads": threads}))
        command = [sys.executable, __file__, str(file)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    lines = [line for line in child.stdout.splitlines() if line.startswith("{")]
    yield from map(json.loads, lines)
    if child.returncode or len(lines) != len(cases):
        missing = f"ended with {child.returncode}: {child.stderr.strip()[-200:]}"
        yield from ({**case, "failed": missing} for case in cases[len(lines) :])


def main(file: str) -> None:
    import torch

    import torch_ext  # noqa: F401

    torch.set_num_threads(1)  # a fork must not inherit a thread pool
    wanted = json.loads(Path(file).read_text())
    for case in wanted["cases"]:
        work = _measure_long if case["what"] == "long" else _measure
        row = _forked(lambda case=case, work=work: work(case, wanted["threads"]))
        print(json.dumps({**case, **row}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
