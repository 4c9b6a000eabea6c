#!/usr/bin/env python
"""What every CUDA kernel takes of a GPU, held against a file of what it may take.

    python benchmarks/kernel_budget.py                        the file as a table
    python benchmarks/kernel_budget.py --check                compiles and compares; exit status 1 if more is taken
    python benchmarks/kernel_budget.py --check --arch 90a     the same for one architecture
    python benchmarks/kernel_budget.py --write                compiles and writes the file
    --built FOLDER                  with --check or --write: uses the machine code that keep_cubins.py has put there
    --library                       with them: a full build as well, the size of the library and how long that takes
    --library FILE                  with --check: the size of a library that is built

Needs nvcc and a C++ compiler, no GPU. Registers, spilled bytes and shared memory are the compiler's own figures;
threads and dynamic shared memory come from the kernels' sources (tests/emulator/NAME_shapes.cpp, one
for each csrc/cuda/NAME.cu); instructions are counted in the machine code, as the function
`per_element` says. kernel_budget.json is the file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import sass

ROOT = Path(__file__).resolve().parent.parent
BUDGET = Path(__file__).resolve().with_suffix(".json")
ARCHITECTURES = ("80", "90a", "100", "120")
GROWTH = 0.05  # what may be added without a new file
ABOUT = (
    "Written by benchmarks/kernel_budget.py --write. Registers of a thread, bytes of a block, occupancy as a share "
    "of the warps that a multiprocessor can hold; loop, way, mufu, states, products: instructions per element, as "
    "`per_element` says; "
    "estimated: what of an architecture was not measured, until a --write that compiles all of it; "
    "library: a full build of the package for one architecture (Linux, x86-64, GCC); its bytes without GPUs' machine "
    "code, which is counted in object_bytes."
)

# ---- what an architecture has --------------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    """CUDA C++ Programming Guide, "Technical specifications per compute capability"."""

    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_per_block: int
    registers: int = 65536


MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164 << 10, 163 << 10),
    "89": Multiprocessor(48, 24, 100 << 10, 99 << 10),
    "90a": Multiprocessor(64, 32, 228 << 10, 227 << 10),
    "100": Multiprocessor(64, 32, 228 << 10, 227 << 10),
    "120": Multiprocessor(48, 24, 100 << 10, 99 << 10),
}
RESERVED_SHARED_BYTES = 1024  # of each block, from 8.0 on
SHARED_UNIT, REGISTER_UNIT, WARP_UNIT = 128, 256, 4


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def resident_blocks(architecture: str, threads: int, registers: int, shared: int) -> int:
    """Blocks of a kernel that a multiprocessor holds at once; 0 if not even one fits."""
    limits = MULTIPROCESSORS[architecture]
    if shared > limits.shared_bytes_per_block:
        return 0
    warps = round_up(threads, 32) // 32
    # Registers are given to whole warps, and warps are spread evenly over four schedulers.
    warps_by_registers = limits.registers // round_up(registers * 32, REGISTER_UNIT)
    return min(
        limits.blocks,
        limits.warps // warps,
        warps_by_registers // WARP_UNIT * WARP_UNIT // warps,
        limits.shared_bytes // round_up(shared + RESERVED_SHARED_BYTES, SHARED_UNIT),
    )


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> float:
    """Warps that a multiprocessor holds, as a share of those that it could."""
    blocks = resident_blocks(architecture, threads, registers, shared)
    return blocks * (round_up(threads, 32) // 32) / MULTIPROCESSORS[architecture].warps


# ---- what the sources and the compiler say ---------------------------------------------------------


def cuda_sources(cmake: str) -> list[str]:
    """The list of that name in CMakeLists.txt."""
    block = re.search(r"set\(cuda_sources\b([^)]*)\)", cmake)
    if not block:
        raise SystemExit("kernel_budget.py: CMakeLists.txt has no list cuda_sources")
    return re.sub(r"#.*", "", block[1]).split()


DTYPES = {
    "float": "float32",
    "double": "float64",
    "BFloat16": "bfloat16",
    "Half": "float16",
    "Complex<float>": "complex64",
    "Complex<double>": "complex128",
}
# What else stands among a kernel's template arguments.
ARGUMENTS = DTYPES | {
    **{f"ScanTypes<{one}, false>": name for one, name in DTYPES.items()},
    **{f"ScanTypes<{one}, true>": DTYPES.get(f"Complex<{one}>", one) for one in DTYPES},
    "(ScanWalk)0": "forward",
    "(ScanWalk)1": "forward_effect",
    "(ScanWalk)2": "backward_effect",
    "SelectiveScanForward": "forward",
    "SelectiveScanBackward": "backward",
}


def _template_arguments(name: str) -> list[str]:
    """Of "f<A, B<C, D> >(...)": ["A", "B<C, D>"]."""
    found, depth = [""], 0
    for letter in name[name.index("<") + 1 :]:
        depth += (letter == "<") - (letter == ">")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [one.strip() for one in found]


def readable(demangled: str) -> str:
    """A kernel's name as the file has it, as in "diagonal_tiles backward min_gru bfloat16": its own
    name without "_kernel", then its template's arguments."""
    name = demangled.replace("torch_ext::", "").replace("cuda::", "").removeprefix("void ")
    kernel = re.match(r"\w+", name)
    walk = re.search(r"<(Forward|Backward)Walk<(\w+), (\w+(?:<\w+>)?) ?> ?>", name)
    if not kernel:
        return demangled
    short = kernel[0].removesuffix("_kernel")
    if not walk:
        arguments = _template_arguments(name) if name[kernel.end() :].startswith("<") else []
        if any(one.startswith("(ScanWalk)") for one in arguments):
            arguments.pop()  # the problem follows from the walk
        return " ".join([short, *(ARGUMENTS.get(one, one) for one in arguments)])
    cell = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", walk[2]).lower()
    return f"{short} {walk[1].lower()} {cell} {DTYPES.get(walk[3], walk[3])}"


def demangle(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    run = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return dict(zip(names, run.stdout.splitlines(), strict=True))


@dataclass
class Compiled:
    """What ptxas reports of a kernel."""

    registers: int = 0
    spilled_bytes: int = 0  # stores and loads
    stack_bytes: int = 0
    static_shared: int = 0


def parse_ptxas(log: str) -> dict[str, Compiled]:
    """The report of -Xptxas -v by mangled name; functions that are no kernels are left out."""
    found: dict[str, Compiled] = {}
    kernel = properties = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            kernel = match[1]
            found[kernel] = Compiled()
        elif match := re.search(r"Function properties for (\S+)", line):
            properties = match[1]
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            if properties in found:
                found[properties].stack_bytes = int(match[1])
                found[properties].spilled_bytes = int(match[2]) + int(match[3])
        elif (match := re.search(r"Used (\d+) registers", line)) and kernel:
            found[kernel].registers = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                found[kernel].static_shared = int(shared[1])
    return found


def report_for(architecture: str, log: str) -> str:
    """The part of a report on several architectures, one after the other, that is about one."""
    found, own = [], True
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '\S+' for 'sm_(\w+)'", line):
            own = match[1] == architecture
        if own:
            found.append(line)
    return "\n".join(found)


def warnings_in(log: str) -> list[str]:
    return [line.strip() for line in log.splitlines() if re.search(r"\b(warning|error)\b", line)]


# ---- instructions ------------------------------------------------------------------------------------


def _loads(one: sass.Instruction) -> bool:
    return one.opcode in (sass.LOAD_SHARED, sass.COPY_ASYNC)


def _usual_way(flow: sass.Flow, loop: sass.Loop, copies: int, special: bool) -> list[int]:
    """The way around the main loop of a thread that has nothing special to do, as far as jumps tell.

    All steps are there, with the cheapest of the options, or, if `special`, an activation; inputs
    come by 16 bytes; no other block is waited for, no sequence starts, no division has an operand
    out of the usual range.
    """
    weight = {}
    inner = set().union(*(other.body for other in flow.inside(loop)))
    for at in loop.body:
        one = flow.code[at]
        if (
            one.opcode == sass.FENCE
            or one.opcode in sass.SHUFFLES
            or (one.opcode == sass.CALL and one.always)
            or one.waits_for_all_copies
        ):
            weight[at] = 10**6
        elif one.opcode == sass.STORE_GLOBAL:
            weight[at] = -1000 * one.store_bytes
        elif one.opcode == sass.LOAD_SHARED and at not in inner:
            weight[at] = -1000
        elif one.opcode == sass.LOAD_GLOBAL and copies:
            weight[at] = 10**5
        elif one.opcode in sass.MUFU and special:
            weight[at] = -100
    # Some jumps leave out the end of a sequence: a state is stored, at an address that takes a product.
    loading = flow.before(loop, {at for at, one in enumerate(flow.code) if _loads(one)})
    for first, part in flow.skippable(loop).items():
        codes = [flow.code[at] for at in part]
        stores = sum(one.opcode == sass.STORE_GLOBAL for one in codes)
        if first not in loading and 1 <= stores <= 2 and any(one.is_wide_product for one in codes):
            weight[first] = weight.get(first, 0) + 10**5
    counted = frozenset(at for at in loop.body if flow.code[at].opcode == sass.COPY_ASYNC)
    return flow.way(loop, weight, counted, copies)


def _scan_counts(flow: sass.Flow, launch: dict) -> dict[str, float] | None:
    """`per_element` of a selective scan, whose launch says how often the loops inside a tile's are passed.

    On the usual way arrays are there and loaded by 16 bytes, and no state grows; the states before
    tiles are kept.
    """
    code, tile = flow.code, flow.loops[0]
    inner = flow.inside(tile)

    def special(body: Iterable[int]) -> int:
        return sum(code[at].opcode in sass.MUFU for at in body)

    most = max(count for count, _ in launch["state_passes"])
    states = [loop for loop in inner if special(loop.body) == most and not flow.inside(loop)]
    if not states:
        return None
    loop = min(states, key=lambda one: len(one.body))  # without a bound on exponents
    around = [other for other in inner if loop.body < other.body]

    weight = {}
    for at in tile.body:
        one = code[at]
        if one.opcode in (sass.LOAD_GLOBAL, sass.STORE_GLOBAL):  # sizes stand at the same place
            weight[at] = -1000 if one.store_bytes >= 8 else 10**6
        elif one.opcode in sass.MUFU or one.opcode in sass.SHUFFLES:
            weight[at] = -1000
    # All of the passes over states: the fetching of inputs is before, the outputs come after.
    total = specials = in_states = 0.0
    for count, times in launch["state_passes"]:
        counted = frozenset(at for at in loop.body if code[at].opcode in sass.MUFU)
        plain = {at: w for at, w in weight.items() if at not in counted}
        way = flow.way(loop, plain, counted, count)
        in_states += len(way) * times
        specials += special(way) * times
    total += in_states
    way = flow.way(tile, weight | {loop.header: -(10**9)})
    passed = False
    for at in way:
        if at in loop.body:
            passed = True
            continue
        if any(at in other.body for other in around):
            times = launch["outer_passes"]
        elif any(at in other.body for other in inner):
            times = launch["finish_passes" if passed else "fill_passes"]
        else:
            times = 1
        total += times
        specials += times * (code[at].opcode in sass.MUFU)
    elements = launch["elements_per_pass"]
    return {
        "loop": round(len(tile.body) / elements, 1),
        "way": round(total / elements, 1),
        "mufu": round(specials / elements, 2),
        "states": round(in_states / elements, 1),
    }


def _product_counts(flow: sass.Flow, launch: dict) -> dict[str, float] | None:
    """`per_element` of a kernel of matrix products, whose launch says how often the loops inside a tile's are passed.

    A tile's loop is the smallest one with a barrier around a product. Each pass of it makes one of the products in it:
    a loop of its own, or all that is unrolled. On the usual way through it whole pieces are loaded and stored, also
    what is stored once in a chunk, and of exponentials there are as many as the launch says.
    """
    code = flow.code

    def products(body: Iterable[int]) -> int:
        return sum(code[at].opcode == sass.MATRIX_PRODUCT for at in body)

    with_products = [loop for loop in flow.loops if products(loop.body)]
    innermost = [
        loop for loop in with_products if not any(products(one.body) for one in flow.inside(loop))
    ]
    barriers = [
        loop for loop in flow.loops if any(code[at].opcode == sass.BARRIER for at in loop.body)
    ]
    tiles: list[sass.Loop] = []
    for loop in innermost:
        around = [one for one in barriers if loop.body < one.body]
        if not around:
            return None
        tile = min(around, key=lambda one: len(one.body))
        if tile not in tiles:
            tiles.append(tile)
    if not tiles:
        return None
    most = max(products(loop.body) for loop in innermost)
    looped = set().union(*(loop.body for loop in innermost))
    total = made = specials = 0
    for tile in tiles:
        kinds: list[sass.Loop | None] = [loop for loop in innermost if loop.body < tile.body]
        if (
            products(tile.body - looped) > most
        ):  # less is the rest of a loop that is partly unrolled
            kinds.append(None)
        inner = flow.inside(tile)
        for kind in kinds:
            weight = {}
            for at in tile.body:
                one = code[at]
                if one.opcode == sass.COPY_ASYNC:
                    weight[at] = -1000
                elif one.opcode == sass.LOAD_GLOBAL:
                    weight[at] = -1000 if one.store_bytes == 16 else 10**5
                elif one.opcode == sass.STORE_GLOBAL:
                    weight[at] = -1000 * one.store_bytes
                elif one.opcode in sass.SHUFFLES:
                    weight[at] = 10**5
                elif kind is None and one.opcode == sass.MATRIX_PRODUCT and at not in looped:
                    weight[at] = -(10**4)
            if kind is not None:
                weight[kind.header] = -(10**9)
            counted: frozenset[int] = frozenset()
            if "exponentials" in launch:
                counted = frozenset(at for at in tile.body if code[at].opcode in sass.MUFU)
            for at in flow.way(tile, weight, counted, launch.get("exponentials", 0)):
                if kind is not None and at in kind.body:
                    continue
                around = [one for one in inner if at in one.body]
                times = 1
                if around:
                    holds = kind is not None and any(kind.body < one.body for one in around)
                    times = launch["outer_passes" if holds else "fill_passes"]
                total += times
                made += times * (code[at].opcode == sass.MATRIX_PRODUCT)
                specials += times * (code[at].opcode in sass.MUFU)
            if kind is not None:
                own = products(kind.body)
                passes = launch["product_passes"][0 if own == most else -1]
                total += passes * len(kind.body)
                made += passes * own
    return {
        "loop": round(sum(len(t.body) for t in tiles) / sum(products(t.body) for t in tiles), 1),
        "way": round(total / made, 1),
        "mufu": round(specials / made, 2),
        "products": round(
            sum(len(loop.body) for loop in innermost)
            / sum(products(loop.body) for loop in innermost),
            1,
        ),
    }


def per_element(
    code: list[sass.Instruction], architecture: str, launch: dict
) -> dict[str, float] | None:
    """Instructions of a thread per element in the kernel's main loop.

    An element is one channel of one step; of a selective scan, one state of one channel of one step;
    of a matrix memory, one product of matrices by a warp (m16n8k16).

    "loop": all of the loop's instructions, without those of the loops inside it that fetch inputs:
    what the compiler made of the source, rare cases included. "way": those that are executed on the
    usual way through it, inputs fetched, and the effects of the other warps folded as often as the
    last warp does. "mufu": of these, exponentials and reciprocals. "states", of a selective scan: those of
    the loop over its steps alone; "products", of a matrix memory: those of the loops that do nothing else. None: the
    kernel has no loop, or its launch does not say how much a pass of it does.
    """
    if not {"outputs", "state_passes", "product_passes"} & launch.keys():
        return None
    flow = sass.Flow(code, int(architecture.rstrip("af")))
    if "product_passes" in launch:
        return _product_counts(flow, launch)
    if "state_passes" in launch:
        return _scan_counts(flow, launch) if flow.loops else None
    if not flow.loops or not any(code[at].opcode == sass.STORE_GLOBAL for at in flow.loops[0].body):
        return None
    loop = flow.loops[0]
    tiled = "elements_per_thread" in launch
    copies = launch.get("copies", 0)
    if tiled:
        copies = launch["elements_per_thread"] * launch["itemsize"] // 16
    arrays = launch["arrays"] if tiled else 1

    def copies_in(body: Iterable[int]) -> int:
        return sum(code[at].opcode == sass.COPY_ASYNC for at in body)

    fetching = [other for other in flow.inside(loop) if copies_in(other.body)]
    fetching = [one for one in fetching if not any(one.body < other.body for other in fetching)]
    # Either a loop over the arrays, with all that fetches one of them, or one per array.
    over_arrays = any(flow.inside(one) for one in fetching)
    special = launch.get("special", False)
    way = _usual_way(flow, loop, copies if over_arrays else copies * arrays, special)
    times = dict.fromkeys(way, 1.0)
    for one in fetching:
        here = one.body & times.keys()
        if own := copies_in(here):
            times.update(dict.fromkeys(here, float(arrays if over_arrays else copies / own)))
    if tiled:
        elements = launch["elements_per_thread"]
    elif "elements_per_pass" in launch:
        elements = launch["elements_per_pass"]
    else:
        stores = [code[at] for at in way if code[at].opcode == sass.STORE_GLOBAL]
        elements = max(1, len(stores) // launch["outputs"])
    body = len(loop.body) - sum(len(one.body) for one in fetching)
    return {
        "loop": round(body / elements, 1),
        "way": round(sum(times.values()) / elements, 1),
        "mufu": round(
            sum(t for at, t in times.items() if code[at].opcode in sass.MUFU) / elements, 2
        ),
    }


def find_nvdisasm() -> str | None:
    """NVIDIA's disassembler: of the toolkit, or of the package nvidia-cuda-nvdisasm."""
    beside = Path(sysconfig.get_path("purelib"), "nvidia/cu13/bin/nvdisasm")
    return shutil.which("nvdisasm") or (str(beside) if os.access(beside, os.X_OK) else None)


def check_jumps(nvdisasm: str, cubin: Path, architecture: str) -> str | None:
    """Where NVIDIA's disassembler sees another target of a jump than sass.py, if anywhere."""
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
    labels: dict[tuple[str, str], int] = {}
    jumps: list[tuple[str, int, str]] = []
    section, pending, code = "", [], sass.kernels(cubin.read_bytes())
    for line in text.stdout.splitlines():
        if line.startswith(".text."):
            section = line.strip().removeprefix(".text.").removesuffix(":")
        elif line.startswith(".L_"):
            pending.append(line.strip().removesuffix(":"))
        elif match := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(.*)", line):
            at = int(match[1], 16)
            labels.update({(section, label): at for label in pending})
            pending = []
            if jump := re.search(r"\b(?:BRA|BSSY)\b.*`\((\.L_\w+)\)", match[2]):
                jumps.append((section, at, jump[1]))
    for section, at, label in jumps:
        one = code[section][at // sass.INSTRUCTION_BYTES]
        ours = at + sass.INSTRUCTION_BYTES + one.jump(int(architecture.rstrip("af")))
        if ours != labels[section, label]:
            return f"{section} at {at:#x}: {ours:#x} instead of {labels[section, label]:#x}"
    return None


# ---- measuring ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiler:
    nvcc: str
    version: str
    built: Path | None = None  # what keep_cubins.py has kept


def launches(folder: Path) -> dict[str, dict]:
    """How each kernel is launched, by its readable name: what tests/emulator/NAME_shapes.cpp prints."""
    emulator = ROOT / "tests" / "emulator"
    compiler = os.environ.get("CXX") or "c++"
    found: dict[str, dict] = {}
    for source in cuda_sources((ROOT / "CMakeLists.txt").read_text()):
        shapes = f"{Path(source).stem}_shapes"
        command = [compiler, "-std=c++20", "-w", "-DTORCH_EXT_EMULATE"]
        command += ["-I", str(ROOT / "csrc"), "-I", str(ROOT / "tests")]
        command += [str(emulator / f"{shapes}.cpp"), str(emulator / "emulator.cpp")]
        subprocess.run([*command, "-o", str(folder / shapes)], check=True)
        run = subprocess.run([str(folder / shapes)], capture_output=True, text=True, check=True)
        rows = [json.loads(line) for line in run.stdout.splitlines()]
        found |= {row.pop("kernel"): row for row in rows}
    return found


def schedules(launch: dict) -> list[str]:
    """Prefixes of what differs between the ways in which a kernel is launched."""
    return ["", "chained_"] if "chained_dynamic_shared" in launch else [""]


def compile_source(nvcc: str, source: str, architecture: str, folder: Path) -> tuple[Path, str]:
    """The cubin of a source, with the options of CMakeLists.txt, and what the compiler said."""
    cubin = folder / f"{Path(source).stem}.{architecture}.cubin"
    command = [nvcc, "-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr"]
    command += ["-Xptxas", "-v,-warn-spills", "-cubin", "-o", str(cubin)]
    command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc/include"), str(ROOT / source)]
    run = subprocess.run(command, capture_output=True, text=True)
    log = run.stdout + run.stderr
    if run.returncode:
        sys.exit(f"kernel_budget.py: {source} does not compile for sm_{architecture}:\n{log}")
    return cubin, log


def compiler_version(text: str) -> str:
    """Of what nvcc --version prints."""
    return re.search(r"V([\d.]+)", text)[1]


def find_built(
    built: Path | None, compiler: str, source: str, architecture: str
) -> tuple[Path, str] | None:
    """What `compile_source` returns, from what keep_cubins.py has kept; None if that is missing, of
    another compiler, or older than a file in csrc/."""
    folder = built / Path(source).stem if built else None
    if not folder or not (folder / "log").exists():
        return None
    if compiler_version((folder / "version").read_text()) != compiler:
        return None
    made = (folder / "log").stat().st_mtime
    if any(file.stat().st_mtime > made for file in (ROOT / "csrc").rglob("*.[ch]*")):
        return None
    log = (folder / "log").read_text()
    cubins = [
        file
        for file in folder.glob("*.cubin")
        if re.search(rf"\.(sm|compute)_{architecture}\.cubin$", file.name)
    ]
    if set(re.findall(r"for 'sm_(\w+)'", log)) == {architecture}:  # nvcc's name has none, then
        cubins = list(folder.glob("*.cubin"))
    return (cubins[0], report_for(architecture, log)) if len(cubins) == 1 else None


def figures(
    architecture: str, compiled: Compiled, code: list[sass.Instruction], launch: dict
) -> dict:
    row = {
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
        "static_shared": compiled.static_shared,
        "instructions": len(code),
    }
    if counts := per_element(code, architecture, launch):
        row["per_element"] = counts
    for schedule in schedules(launch):
        shared = compiled.static_shared + launch[f"{schedule}dynamic_shared"]
        share = occupancy(architecture, launch["threads"], compiled.registers, shared)
        row[f"{schedule}occupancy"] = round(share, 4)
    return row


def measure(compiler: Compiler, architecture: str, folder: Path, launch: dict[str, dict]) -> dict:
    """One architecture: {"object_bytes", "seconds", "warnings", "kernels": {name: figures}};
    "seconds" is None unless all was compiled here."""
    started = time.monotonic()
    sources = cuda_sources((ROOT / "CMakeLists.txt").read_text())
    found = [
        find_built(compiler.built, compiler.version, source, architecture) for source in sources
    ]
    compiled = [
        one or compile_source(compiler.nvcc, source, architecture, folder)
        for one, source in zip(found, sources, strict=True)
    ]
    seconds = None if any(found) else round(time.monotonic() - started)
    result: dict = {
        "object_bytes": sum(cubin.stat().st_size for cubin, _ in compiled),
        "seconds": seconds,
        "built": sum(one is not None for one in found),
        "warnings": [line for _, log in compiled for line in warnings_in(log)],
        "kernels": {},
    }
    for cubin, log in compiled:
        reports, code = parse_ptxas(log), sass.kernels(cubin.read_bytes())
        nvdisasm = find_nvdisasm()
        if nvdisasm and (wrong := check_jumps(nvdisasm, cubin, architecture)):
            sys.exit(f"kernel_budget.py: sass.py misreads a jump of sm_{architecture}: {wrong}")
        for mangled, name in demangle(reports).items():
            short = readable(name)
            if short not in launch:
                result["warnings"].append(
                    f"{cubin.name.split('.')[0]}_shapes.cpp does not print {short!r}"
                )
                continue
            result["kernels"][short] = figures(
                architecture, reports[mangled], code[mangled], launch[short]
            )
    return result


def measure_all(
    compiler: Compiler, architectures: list[str], jobs: int
) -> tuple[dict, dict[str, dict]]:
    """Launches by kernel, and what `measure` returns by architecture."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launch = launches(folder)
        with ThreadPoolExecutor(jobs) as pool:
            results = pool.map(lambda a: measure(compiler, a, folder, launch), architectures)
            return launch, dict(zip(architectures, results, strict=True))


# ---- the whole library --------------------------------------------------------------------------------------

LIBRARY_ARCHITECTURE = "90a"
FATBIN = ".nv_fatbin"


def library_bytes(library: Path) -> int:
    """The size of the file without the machine code of GPUs: the same for every list of them."""
    size = library.stat().st_size
    return size - sum(len(x) for name, x in sass.sections(library.read_bytes()) if name == FATBIN)


def build_library() -> dict:
    """A full build of the package for one architecture, from nothing, against this Python's torch."""
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name, "source"), Path(name, "out")
        leave = shutil.ignore_patterns("build", ".git", "__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT, source, ignore=leave)
        environment = os.environ | {"TORCH_CUDA_ARCH_LIST": "9.0a", "TORCH_EXT_CUDA": "1"}
        started = time.monotonic()
        command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(out)]
        run = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        seconds = time.monotonic() - started
        libraries = list(out.rglob("libtorch_ext.so"))
        if run.returncode or len(libraries) != 1:
            sys.exit(f"kernel_budget.py: the library does not build:\n{run.stdout}{run.stderr}")
        return {
            "architecture": LIBRARY_ARCHITECTURE,
            "bytes": library_bytes(libraries[0]),
            "build_seconds": round(seconds),
            "cores": len(os.sched_getaffinity(0)),
        }


def library_offences(budget: dict, found: int) -> list[str]:
    """Its size alone: how long a build takes says as much about the machine."""
    allowed = budget.get("library", {}).get("bytes", 0)
    if found <= allowed * (1 + GROWTH):
        return []
    return [f"the library without GPUs' machine code: bytes: {allowed} allowed, {found} found"]


# ---- the file ---------------------------------------------------------------------------------------------


def merged(budget: dict, compiler: str, launch: dict, measured: dict[str, dict]) -> dict:
    """The new file: measured architectures anew, the others as they were."""
    architectures = {**budget.get("architectures", {})}
    rows: dict[str, dict] = {name: {"launch": launch[name]} for name in sorted(launch)}
    for name, old in budget.get("kernels", {}).items():
        if name in rows:
            rows[name] |= {key: old[key] for key in old if key not in ("launch", *measured)}
    for architecture, result in measured.items():
        kernels = result["kernels"]
        old = architectures.get(architecture, {})
        timed = result["seconds"] is not None
        architectures[architecture] = {
            "object_bytes": result["object_bytes"],
            "compile_seconds": result["seconds"] if timed else old.get("compile_seconds", 0),
            "kernels": len(kernels),
            "instructions": sum(row["instructions"] for row in kernels.values()),
            "spilled_bytes": sum(row["spilled_bytes"] for row in kernels.values()),
            "most_registers": max((row["registers"] for row in kernels.values()), default=0),
        }
        if not timed and "estimated" in old:
            architectures[architecture]["estimated"] = old["estimated"]
        for name, row in kernels.items():
            rows[name][architecture] = row
    order = sorted(architectures, key=lambda a: int(a.rstrip("af")))
    return {
        "about": ABOUT,
        "compiler": compiler,
        "library": budget.get("library", {}),
        "architectures": {a: architectures[a] for a in order},
        "total": {
            "object_bytes": sum(x["object_bytes"] for x in architectures.values()),
            "compile_seconds": sum(x["compile_seconds"] for x in architectures.values()),
        },
        "kernels": {
            name: {"launch": row["launch"], **{a: row[a] for a in order if a in row}}
            for name, row in rows.items()
        },
    }


def to_text(budget: dict) -> str:
    """JSON with a line per kernel and architecture, so that differences can be read."""
    lines = ["{"]
    for key in ("about", "compiler", "library", "total"):
        lines.append(f" {json.dumps(key)}: {json.dumps(budget[key])},")
    lines.append(' "architectures": {')
    rows = [f"  {json.dumps(a)}: {json.dumps(x)}" for a, x in budget["architectures"].items()]
    lines += [",\n".join(rows), " },", ' "kernels": {']
    kernels = []
    for name, row in budget["kernels"].items():
        inside = ",\n".join(f"   {json.dumps(key)}: {json.dumps(x)}" for key, x in row.items())
        kernels.append(f"  {json.dumps(name)}: {{\n{inside}\n  }}")
    return "\n".join([*lines, ",\n".join(kernels), " }", "}", ""])


def quantities(row: dict, launch: dict) -> dict[str, float]:
    """What is compared of a kernel, by name."""
    found = {"registers": row["registers"]}
    for schedule in schedules(launch):
        name = "shared memory" + (", chained" if schedule else "")
        found[name] = row["static_shared"] + launch[f"{schedule}dynamic_shared"]
    counts = row.get("per_element", {})
    if counts:
        found["instructions per element, whole loop"] = counts["loop"]
        found["instructions per element, usual way"] = counts["way"]
    if "states" in counts:
        found["instructions per element, loop over steps"] = counts["states"]
    if "products" in counts:
        found["instructions per element, products"] = counts["products"]
    return found


def counted(name: str) -> bool:
    """Is this quantity made from machine code?"""
    return name.startswith("instructions")


def uncounted(budget: dict, launch: dict, measured: dict[str, dict]) -> list[str]:
    """A line for each architecture whose kernels have counts of instructions that the file has not."""
    lines = []
    for architecture, result in measured.items():
        new = [
            name
            for name, row in sorted(result["kernels"].items())
            if "per_element" in row
            and architecture in (known := budget["kernels"].get(name, {}))
            and "per_element" not in known[architecture]
        ]
        if new:
            lines.append(
                f"sm_{architecture}: the file has no instructions per element of {', '.join(new)}; --write adds them"
            )
    return lines


def offences(budget: dict, launch: dict, measured: dict[str, dict]) -> list[str]:
    """A line for each way in which kernels take more than the file allows."""
    bad = []

    def compare(name: str, architecture: str, quantity: str, allowed: float, found: float) -> None:
        if found > allowed * (1 + GROWTH):
            bad.append(
                f"{name}, sm_{architecture}: {quantity}: {allowed:g} allowed, {found:g} found"
            )

    for architecture, result in measured.items():
        bad += [f"sm_{architecture}: {line}" for line in result["warnings"]]
        known = budget.get("architectures", {}).get(architecture)
        if known is None:
            bad.append(f"all kernels, sm_{architecture}: not in the file; --write adds it")
            continue
        compare(
            "all kernels",
            architecture,
            "bytes of the object",
            known["object_bytes"],
            result["object_bytes"],
        )
        rows = {name: row for name, row in budget["kernels"].items() if architecture in row}
        for name in sorted(rows.keys() - result["kernels"].keys()):
            bad.append(
                f"{name}, sm_{architecture}: kernel: 1 allowed, 0 found: it is in the file alone"
            )
        for name, row in sorted(result["kernels"].items()):
            if row["spilled_bytes"]:
                bad.append(
                    f"{name}, sm_{architecture}: spilled bytes: 0 allowed, {row['spilled_bytes']} found"
                )
            if name not in rows:
                bad.append(
                    f"{name}, sm_{architecture}: kernel: 0 allowed, 1 found: it is not in the file"
                )
                continue
            allowed = quantities(rows[name][architecture], rows[name]["launch"])
            found = quantities(row, launch[name])
            for quantity, value in found.items():
                if quantity in allowed or not counted(quantity) or any(map(counted, allowed)):
                    compare(name, architecture, quantity, allowed.get(quantity, 0), value)
            bad += [  # a loop that is not found any more would hide whatever it has become
                f"{name}, sm_{architecture}: {quantity}: {allowed[quantity]:g} allowed, none found"
                for quantity in sorted(allowed.keys() - found.keys())
                if counted(quantity)
            ]
    return bad


def table(budget: dict, architectures: list[str]) -> str:
    lines = [
        f"{'kernel':<44} {'sm':<4} threads regs spill   smem chained  occ. chained  loop   way  mufu"
    ]
    for name, kernel in budget["kernels"].items():
        launch = kernel["launch"]
        for architecture in architectures:
            if architecture not in kernel:
                continue
            row = kernel[architecture]
            counts = row.get("per_element")
            text = f"{counts['loop']:>5} {counts['way']:>5} {counts['mufu']:>5}" if counts else ""
            chained = f"{row['chained_occupancy']:.0%}" if "chained_occupancy" in row else ""
            lines.append(
                f"{name:<44} {architecture:<4} {launch['threads']:>7} {row['registers']:>4} "
                f"{row['spilled_bytes']:>5} {launch['dynamic_shared']:>6} "
                f"{launch.get('chained_dynamic_shared', ''):>7} {row['occupancy']:>4.0%} "
                f"{chained:>7} {text}".rstrip()
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compile and compare with the file")
    what.add_argument("--write", action="store_true", help="compile and write the file")
    add("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="ARCH")
    add("--jobs", type=int, choices=(1, 2), default=1, help="architectures compiled at once")
    add("--built", type=Path, metavar="FOLDER", help="where keep_cubins.py has put machine code")
    add(
        "--library",
        nargs="?",
        const="",
        metavar="FILE",
        help="the library's size as well, of FILE or of a full build: takes minutes",
    )
    add("--nvcc", default="nvcc")
    add("--file", type=Path, default=BUDGET)
    args = parser.parse_args(argv)
    if args.write and args.library:
        parser.error("--library FILE is not for --write, which writes how long a build takes, too")

    budget = json.loads(args.file.read_text()) if args.file.exists() else {"kernels": {}}
    if not (args.check or args.write):
        print(table(budget, args.arch))
        return 0

    version = subprocess.run([args.nvcc, "--version"], capture_output=True, text=True, check=True)
    compiler = compiler_version(version.stdout)
    launch, measured = measure_all(Compiler(args.nvcc, compiler, args.built), args.arch, args.jobs)
    if args.built:
        number = sum(result["built"] for result in measured.values())
        print(f"Machine code of {number} sources and architectures was there.")
    library = build_library() if args.library == "" else None
    if args.write:
        budget = merged(budget, compiler, launch, measured)
        if library:
            budget["library"] = library
        args.file.write_text(to_text(budget))
    elif compiler != budget.get("compiler"):
        print(f"The file is of nvcc {budget.get('compiler')}, this is nvcc {compiler}.")
    bad = offences(budget, launch, measured)
    print("".join(f"{line}\n" for line in uncounted(budget, launch, measured)), end="")
    if library:
        print(f"The library was built in {library['build_seconds']} s on {library['cores']} cores.")
    if args.library is not None:
        size = library["bytes"] if library else library_bytes(Path(args.library))
        bad += library_offences(budget, size)
        print(f"The library without GPUs' machine code: {size} bytes.")
    print("\n".join(bad) or f"All kernels keep to the budget: sm_{', sm_'.join(args.arch)}.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
