"""benchmarks/kernel_budget.py and keep_cubins.py without a CUDA compiler: recorded logs, and machine code made here."""

import copy
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import kernel_budget as budget  # noqa: E402
import sass  # noqa: E402

TILES = (
    "_ZN9torch_ext4cuda21diagonal_tiles_kernelINS0_12BackwardWalkINS_6MinGruENS_8BFloat16EEEEE"
    "vNT_7ProblemENS0_8ScheduleE"
)
LOG = f"""\
ptxas info    : 44 bytes gmem
ptxas info    : Compiling entry function '{TILES}' for 'sm_90a'
ptxas info    : Function properties for {TILES}
    16 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1088 bytes smem, 888 bytes cmem[0]
ptxas info    : Compile time = 220.0 ms
ptxas info    : Function properties for __internal_division
    64 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers
ptxas warning : Registers are spilled to local memory in function '{TILES}', 4 bytes spill stores
"""


def test_log_of_the_compiler():
    found = budget.parse_ptxas(LOG)
    assert found == {
        TILES: budget.Compiled(168, spilled_bytes=16, stack_bytes=16, static_shared=1088),
        "other": budget.Compiled(18),
    }
    (warning,) = budget.warnings_in(LOG)
    assert warning.startswith("ptxas warning : Registers are spilled")


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void torch_ext::cuda::diagonal_tiles_kernel<torch_ext::cuda::BackwardWalk<torch_ext::MinGru, "
            "torch_ext::BFloat16> >(torch_ext::cuda::BackwardWalk<torch_ext::MinGru, "
            "torch_ext::BFloat16>::Problem, torch_ext::cuda::Schedule)",
            "diagonal_tiles backward min_gru bfloat16",
        ),
        (
            "void torch_ext::cuda::diagonal_short_kernel<torch_ext::cuda::ForwardWalk<torch_ext::LinearScan, "
            "torch_ext::Complex<float> > >(torch_ext::cuda::ForwardWalk<torch_ext::LinearScan, "
            "torch_ext::Complex<float> >::Problem)",
            "diagonal_short forward linear_scan complex64",
        ),
        (
            "void torch_ext::cuda::diagonal_empty_kernel<torch_ext::cuda::ForwardWalk<torch_ext::MinLstm, "
            "double> >(torch_ext::cuda::ForwardWalk<torch_ext::MinLstm, double>::Problem)",
            "diagonal_empty forward min_lstm float64",
        ),
        ("torch_ext::cuda::fill_kernel(float*, int)", "fill"),
        (
            "void torch_ext::cuda::sum_kernel<torch_ext::Complex<float>, 4>(torch_ext::Sum<float, 2>)",
            "sum complex64 4",
        ),
    ],
)
def test_names_are_readable(demangled, short):
    assert budget.readable(demangled) == short


def test_sources_are_those_of_cmake():
    assert budget.cuda_sources("set(cuda_sources  # a (remark\n  a.cu\n  b.cu # c.cu\n)") == [
        "a.cu",
        "b.cu",
    ]
    sources = budget.cuda_sources((ROOT / "CMakeLists.txt").read_text())
    assert sources and all((ROOT / source).is_file() for source in sources)


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks", "share"),
    [
        ("90a", 256, 128, 0, 2, 0.25),  # registers
        ("90a", 256, 32, 0, 8, 1.0),  # warps
        ("90a", 32, 16, 0, 32, 0.5),  # blocks
        ("90a", 128, 32, 57 << 10, 3, 0.1875),  # shared memory: 58 KiB with what is reserved
        ("90a", 128, 32, 227 << 10, 1, 0.0625),
        ("90a", 128, 32, (227 << 10) + 1, 0, 0.0),  # more than a block may have
        ("80", 160, 128, 0, 3, 15 / 64),  # 16 warps have registers, five to a block
        ("80", 96, 168, 0, 4, 12 / 64),  # 5376 each: 12 warps
        ("80", 128, 250, 0, 2, 8 / 64),  # 8192 each: 8 warps
        ("120", 256, 40, 0, 6, 1.0),  # 48 warps
        ("120", 32, 16, 0, 24, 0.5),
        ("120", 128, 32, 58 << 10, 1, 4 / 48),
    ],
)
def test_occupancy(architecture, threads, registers, shared, blocks, share):
    assert budget.resident_blocks(architecture, threads, registers, shared) == blocks
    assert budget.occupancy(architecture, threads, registers, shared) == pytest.approx(share)


# ---- machine code ------------------------------------------------------------------------------------

ALWAYS = 7 << 12, 7 << 23
PREDICATE = 0 << 12, 7 << 23
OTHER = 0x210


def one(opcode, when=ALWAYS, low=0, high=0):
    return when[0] | opcode | low, when[1] | high


def branch(offset, when=ALWAYS, architecture=90):
    """A jump over so many instructions from the next one on."""
    words = offset * 4
    if architecture < 90:
        return one(sass.BRANCH, when, (words & (1 << 30) - 1) << 34, words >> 30 & 0x3FFFF)
    low = (words & 0xFF) << 16 | (words >> 8 & (1 << 30) - 1) << 34
    return one(sass.BRANCH, when, low, words >> 38 & 0x3FFFF)


def push(register, offset):
    return one(sass.SYNC_PUSH, low=register << 16 | offset * 16 << 32)


def code(*instructions):
    return [sass.Instruction(*each) for each in instructions]


def elf(texts):
    """The least that is a cubin: sections of code, and their names."""
    strings, data, headers = b"\0", b"", []
    for name, content in [(".shstrtab", None), *((".text." + key, x) for key, x in texts.items())]:
        headers.append((len(strings), content))
        strings += name.encode() + b"\0"
    rows = [struct.pack("<IIQQQQ", 0, 0, 0, 0, 0, 0) + bytes(24)]
    for name, content in headers:
        content = strings if content is None else b"".join(struct.pack("<QQ", *x) for x in content)
        rows.append(struct.pack("<IIQQQQ", name, 1, 0, 0, 64 + len(data), len(content)) + bytes(24))
        data += content
    head = bytearray(64)
    head[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", head, 0x28, 64 + len(data))
    struct.pack_into("<HHH", head, 0x3A, 64, len(rows), 1)
    return bytes(head) + data + b"".join(rows)


def test_kernels_of_a_cubin():
    first = [one(OTHER), one(sass.EXIT)]
    found = sass.kernels(elf({"a": first, "b": [one(sass.EXIT)]}))
    assert found == {"a": code(*first), "b": code(one(sass.EXIT))}
    with pytest.raises(ValueError, match="not a 64-bit ELF file"):
        sass.kernels(b"\x7fELF\x01\x01")


def test_jumps_as_the_compiler_encodes_them():
    recorded = [  # architecture, low, high, bytes from the next instruction on
        (90, 0x0000000000E49947, 0x008FEC0003800000, 0x390),
        (90, 0x0000000800B82947, 0x000FEA0003800000, 0xAE0),
        (90, 0x00000C7000007945, 0x000FE20003800000, 0xC70),
        (120, 0x0000007000007945, 0x000FE20003800200, 0x70),
        (120, 0x0000000108E07547, 0x000FF2000B800000, 0x380),
        (80, 0x000191B27F007947, 0x000FEA000B800000, 0x191B0),
    ]
    for architecture, low, high, distance in recorded:
        assert sass.Instruction(low, high).jump(architecture) == distance
    for architecture in (80, 90):
        for offset in (-1000, -1, 0, 1, 70, 100000):
            (jump,) = code(branch(offset, architecture=architecture))
            assert jump.jump(architecture) == offset * 16
            assert jump.always
    assert not code(branch(1, PREDICATE))[0].always


@pytest.mark.parametrize("architecture", [80, 90])
def test_loops_and_the_usual_way(architecture):
    def to(offset, when=ALWAYS):
        return branch(offset, when, architecture)

    instructions = code(
        one(OTHER),
        one(OTHER),  # 1: the outer loop begins
        one(OTHER),  # 2: the inner one
        to(-2, PREDICATE),
        push(3, 4),  # meet at 9
        to(2, PREDICATE),  # to 8
        one(sass.FENCE),  # 6: the rare way
        one(sass.SYNC, low=3 << 16),
        one(sass.STORE_GLOBAL, high=9 << 8),  # 8: the usual one
        to(-9, PREDICATE),  # to 1
        one(sass.EXIT),
        to(-1),  # pads
    )
    flow = sass.Flow(instructions, architecture)
    assert [sorted(loop.body) for loop in flow.loops] == [list(range(1, 10)), [2, 3]]
    assert [loop.header for loop in flow.inside(flow.loops[0])] == [2]
    assert flow.way(flow.loops[0], {}) == [1, 2, 3, 4, 5, 8, 9]
    assert flow.way(flow.loops[0], {8: 100}) == [1, 2, 3, 4, 5, 6, 7, 9]
    assert instructions[8].store_bytes == 4


def test_the_way_has_no_more_of_the_counted_than_asked_for():
    copy_ = one(sass.COPY_ASYNC)
    skip = branch(1, PREDICATE)
    instructions = code(
        skip, copy_, skip, copy_, skip, copy_, branch(-7, PREDICATE), one(sass.EXIT)
    )
    flow = sass.Flow(instructions, 90)
    counted = frozenset({1, 3, 5})
    for most in range(4):
        way = flow.way(flow.loops[0], {}, counted, most)
        assert sum(at in counted for at in way) == most


def test_instructions_per_element():
    instructions = code(
        one(sass.COPY_ASYNC),
        one(sass.LOAD_SHARED),
        one(0x308),
        branch(2, PREDICATE),
        one(sass.FENCE),  # the exchange with other blocks
        one(OTHER),
        one(sass.STORE_GLOBAL, high=9 << 8),
        branch(-8, PREDICATE),
        one(sass.EXIT),
    )
    launch = {"elements_per_thread": 2, "itemsize": 8, "arrays": 1, "outputs": 1}
    assert budget.per_element(instructions, "90a", launch) == {"loop": 4.0, "way": 3.0, "mufu": 0.5}
    assert budget.per_element(code(one(OTHER), one(sass.EXIT)), "90a", launch) is None


def test_instructions_of_a_scan():
    wide, narrow = 6 << 9, 4 << 9  # 16 bytes and 4
    special = one(0x308)
    instructions = code(
        one(OTHER),
        one(OTHER),  # a tile begins
        one(sass.LOAD_GLOBAL, high=wide),  # fetching: a loop, or else number by number
        one(OTHER),
        branch(-3, PREDICATE),
        branch(1, PREDICATE),
        one(sass.LOAD_GLOBAL, high=narrow),
        one(
            OTHER
        ),  # a part of the steps, and a loop over them, of which one exponential may be left out
        special,
        branch(1, PREDICATE),
        special,
        branch(-4, PREDICATE),
        branch(-6, PREDICATE),
        special,  # outputs
        one(sass.STORE_GLOBAL, high=wide),
        branch(-3, PREDICATE),
        branch(-16, PREDICATE),
        one(sass.EXIT),
    )
    launch = {
        "elements_per_pass": 10,
        "state_passes": [[2, 3], [1, 2]],
        "outer_passes": 2,
        "fill_passes": 4,
        "finish_passes": 5,
    }
    counts = budget.per_element(instructions, "90a", launch)
    # Through the steps 3 times 4 instructions and twice 3; around them twice 2; four times 3
    # before, five times 3 after; 3 more.
    assert counts == {"loop": 1.6, "way": 5.2, "mufu": 1.3, "states": 1.8}
    assert budget.per_element(instructions, "90a", launch | {"state_passes": [[9, 1]]}) is None


PRODUCT = one(sass.MATRIX_PRODUCT)


def loop_of(*body):
    """The instructions, and a jump back to the first of them."""
    return [*body, branch(-len(body) - 1, PREDICATE)]


def of_products(*extra):
    """Tiles: a barrier, then a loop over pieces, then one of two loops of products, or else products in line."""
    two = loop_of(one(OTHER), PRODUCT, PRODUCT)  # 4
    only = loop_of(PRODUCT, one(OTHER))  # 3
    line = [PRODUCT] * 3
    way = [
        one(sass.BARRIER),
        *loop_of(one(sass.LOAD_GLOBAL, high=6 << 9), one(OTHER)),  # whole pieces: 3
        branch(2, PREDICATE),
        one(sass.LOAD_GLOBAL, high=4 << 9),  # number by number
        one(OTHER),
        branch(len(two) + 1, PREDICATE),
        *two,
        branch(len(only) + 2 + len(line)),
        branch(len(only) + 1, PREDICATE),
        *only,
        branch(len(line)),
        *line,
        one(sass.STORE_GLOBAL, high=4 << 9),
        *extra,
    ]
    return code(one(OTHER), *loop_of(*way), one(sass.EXIT))


PASSES = {"product_passes": [4, 2], "fill_passes": 5, "outer_passes": 7}


def test_instructions_of_products():
    instructions = of_products()
    flow = sass.Flow(instructions, 90)
    assert [len(loop.body) for loop in flow.loops] == [23, 4, 3, 3]
    counts = budget.per_element(instructions, "90a", PASSES)
    # Around them a barrier, pieces five times 3, two jumps, the store and the jump back: 20. To two
    # products a pass one jump more, to one of them two, in line one.
    ways = 20 + 1 + 4 * 4, 20 + 2 + 2 * 3, 20 + 1 + 3
    products = 4 * 2, 2 * 1, 3
    assert counts == {
        "loop": round(23 / 6, 1),
        "way": round(sum(ways) / sum(products), 1),
        "mufu": 0.0,
        "products": round(7 / 3, 1),
    }
    more = budget.per_element(of_products(*[one(OTHER)] * 13), "90a", PASSES)
    assert more["way"] == round((sum(ways) + 39) / sum(products), 1)
    assert more["products"] == counts["products"] and more["loop"] == round(36 / 6, 1)
    # Exponentials on the way, as many as the launch says.
    special = of_products(branch(1, PREDICATE), one(0x308), branch(1, PREDICATE), one(0x308))
    for number in (0, 1, 2):
        found = budget.per_element(special, "90a", PASSES | {"exponentials": number})
        assert found["mufu"] == round(3 * number / sum(products), 2)


def test_products_without_a_tile():
    bare = code(one(OTHER), *loop_of(PRODUCT, one(OTHER)), one(sass.EXIT))
    assert budget.per_element(bare, "90a", PASSES) is None
    none = code(one(OTHER), *loop_of(one(sass.BARRIER), one(OTHER)), one(sass.EXIT))
    assert budget.per_element(none, "90a", PASSES) is None


def test_products_in_parts():
    """A loop of products inside of one over parts: what is around them there is passed as the launch says."""
    inner = loop_of(PRODUCT, one(OTHER))
    parts = loop_of(one(OTHER), *inner)  # 5
    instructions = code(one(OTHER), *loop_of(one(sass.BARRIER), *parts), one(sass.EXIT))
    counts = budget.per_element(instructions, "90a", PASSES)
    # The barrier and the jump; seven times two around the products; four passes of them.
    assert counts["way"] == round((2 + 7 * 2 + 4 * 3) / 4, 1)
    assert (counts["products"], counts["loop"]) == (3.0, 7.0)


# ---- the comparison --------------------------------------------------------------------------------------

NAME = "diagonal_tiles forward min_gru float32"
LAUNCH = {NAME: {"threads": 256, "dynamic_shared": 50000, "chained_dynamic_shared": 20000}}
ROW = {
    "registers": 100,
    "spilled_bytes": 0,
    "static_shared": 0,
    "instructions": 1000,
    "per_element": {"loop": 200.0, "way": 100.0, "mufu": 2.0},
    "occupancy": 0.25,
    "chained_occupancy": 0.25,
}
MEASURED = {
    "90a": {"object_bytes": 10000, "seconds": 30, "warnings": [], "kernels": {NAME: ROW}},
}


def changed(**values):
    """What was measured, with other values."""
    found = copy.deepcopy(MEASURED)
    row = found["90a"]["kernels"][NAME]
    for key, value in values.items():
        part = found["90a"] if key in found["90a"] else row if key in row else row["per_element"]
        part[key] = value
    return found


FILE = budget.merged({}, "13.0.88", LAUNCH, MEASURED)


@pytest.mark.parametrize("growth", [0.5, 1, 1.04])
@pytest.mark.parametrize("quantity", ["registers", "loop", "way", "object_bytes"])
def test_four_percent_more_pass(quantity, growth):
    allowed = {"registers": 100, "loop": 200.0, "way": 100.0, "object_bytes": 10000}[quantity]
    assert budget.offences(FILE, LAUNCH, changed(**{quantity: allowed * growth})) == []


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"registers": 106}, f"{NAME}, sm_90a: registers: 100 allowed, 106 found"),
        (
            {"way": 106.0},
            f"{NAME}, sm_90a: instructions per element, usual way: 100 allowed, 106 found",
        ),
        (
            {"loop": 212.0},
            f"{NAME}, sm_90a: instructions per element, whole loop: 200 allowed, 212 found",
        ),
        (
            {"object_bytes": 10600},
            "all kernels, sm_90a: bytes of the object: 10000 allowed, 10600 found",
        ),
        ({"spilled_bytes": 4}, f"{NAME}, sm_90a: spilled bytes: 0 allowed, 4 found"),
        ({"warnings": ["ptxas warning : x"]}, "sm_90a: ptxas warning : x"),
        (
            {"kernels": {}},
            f"{NAME}, sm_90a: kernel: 1 allowed, 0 found: it is in the file alone",
        ),
    ],
)
def test_what_fails(values, line):
    assert budget.offences(FILE, LAUNCH, changed(**values)) == [line]


def test_shared_memory_fails():
    launch = {NAME: LAUNCH[NAME] | {"dynamic_shared": 53000}}
    (line,) = budget.offences(FILE, launch, MEASURED)
    assert line == f"{NAME}, sm_90a: shared memory: 50000 allowed, 53000 found"


def test_a_kernel_with_one_way_of_being_launched():
    launch = {NAME: {"threads": 256, "dynamic_shared": 50000}}
    row = {key: value for key, value in ROW.items() if key != "chained_occupancy"}
    file = budget.merged({}, "13.0.88", launch, changed(kernels={NAME: row}))
    assert budget.offences(file, launch, changed(kernels={NAME: row})) == []
    more = {NAME: {"threads": 256, "dynamic_shared": 53000}}
    assert len(budget.offences(file, more, changed(kernels={NAME: row}))) == 1
    assert NAME in budget.table(file, ["90a"])


def test_new_kernels_and_architectures_fail():
    new = changed(kernels={NAME: ROW, "new": ROW})
    (line,) = budget.offences(FILE, LAUNCH | {"new": LAUNCH[NAME]}, new)
    assert line == "new, sm_90a: kernel: 0 allowed, 1 found: it is not in the file"
    (line,) = budget.offences(FILE, LAUNCH, {"100": MEASURED["90a"]})
    assert line == "all kernels, sm_100: not in the file; --write adds it"


def test_spills_fail_even_if_the_file_has_them():
    spilled = changed(spilled_bytes=4)
    file = budget.merged({}, "13.0.88", LAUNCH, spilled)
    assert budget.offences(file, LAUNCH, spilled) != []


PRODUCTS = {"loop": 100.0, "way": 20.0, "mufu": 0.1, "products": 5.0}


@pytest.mark.parametrize(
    ("counts", "lines"),
    [
        (PRODUCTS | {"products": 5.2}, []),
        (PRODUCTS | {"products": 5.3}, ["products: 5 allowed, 5.3 found"]),
        (PRODUCTS | {"way": 22.0}, ["usual way: 20 allowed, 22 found"]),
        # A loop that the count does not find any more.
        (None, [f"{x}: {y} allowed, none found" for x, y in (
            ("products", 5), ("usual way", 20), ("whole loop", 100)
        )]),
    ],
)  # fmt: skip
def test_products_are_compared(counts, lines):
    def row(counts):
        kept = {key: value for key, value in ROW.items() if key != "per_element"}
        return kept | ({"per_element": counts} if counts else {})

    file = budget.merged({}, "13.0.88", LAUNCH, changed(kernels={NAME: row(PRODUCTS)}))
    found = budget.offences(file, LAUNCH, changed(kernels={NAME: row(counts)}))
    assert found == [f"{NAME}, sm_90a: instructions per element, {line}" for line in lines]


def test_counts_that_the_file_has_not_are_said():
    bare = {key: value for key, value in ROW.items() if key != "per_element"}
    file = budget.merged({}, "13.0.88", LAUNCH, changed(kernels={NAME: bare}))
    assert budget.offences(file, LAUNCH, MEASURED) == []
    (line,) = budget.uncounted(file, LAUNCH, MEASURED)
    assert line == f"sm_90a: the file has no instructions per element of {NAME}; --write adds them"
    assert budget.uncounted(FILE, LAUNCH, MEASURED) == []
    assert budget.uncounted(FILE, LAUNCH, {"100": MEASURED["90a"]}) == []  # nothing of it is there


def test_writing_keeps_other_architectures():
    file = budget.merged(FILE, "13.0.88", LAUNCH, {"80": MEASURED["90a"]})
    assert list(file["architectures"]) == ["80", "90a"]
    assert list(file["kernels"][NAME]) == ["launch", "80", "90a"]
    assert file["total"] == {"object_bytes": 20000, "compile_seconds": 60}
    assert json.loads(budget.to_text(file)) == file


def test_what_is_estimated_is_said_until_it_is_measured():
    file = copy.deepcopy(FILE)
    file["architectures"]["90a"]["estimated"] = {"compile_seconds": "a part"}
    kept = budget.merged(file, "13.0.88", LAUNCH, changed(seconds=None))["architectures"]["90a"]
    assert kept["compile_seconds"] == 30 and kept["estimated"] == {"compile_seconds": "a part"}
    new = budget.merged(file, "13.0.88", LAUNCH, changed(seconds=40))["architectures"]["90a"]
    assert new["compile_seconds"] == 40 and "estimated" not in new


# ---- what a build has left ---------------------------------------------------------------------------

NVCC = """\
#!/bin/sh
[ "$1" = --version ] && { echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; }
while [ $# -gt 0 ]; do [ "$1" = --keep-dir ] && folder=$2; [ "$1" = broken.cu ] && broken=1; shift; done
[ "$broken" ] && { echo "broken.cu(1): error: no"; exit 2; }
echo 80 > "$folder/scan.compute_80.cubin"
echo 120 > "$folder/scan.compute_120.sm_120.cubin"
echo > "$folder/scan.compute_120.ptx"
echo "ptxas info    : Compiling entry function 'scan' for 'sm_80'
ptxas info    : Used 18 registers, used 0 barriers
ptxas info    : Compiling entry function 'scan' for 'sm_120'
ptxas info    : Used 20 registers, used 0 barriers"
"""


@pytest.fixture
def keep(tmp_path):
    """Runs keep_cubins.py with an nvcc that compiles scan.cu for two architectures."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)

    def run(*arguments):
        program = ROOT / "benchmarks" / "keep_cubins.py"
        command = [sys.executable, program, tmp_path / "built", nvcc, *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    return run


def test_a_build_leaves_its_machine_code(keep, tmp_path):
    run = keep("-x", "cu", "-c", "csrc/scan.cu", "-o", "scan.o")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    names = {"log", "version", "scan.compute_80.cubin", "scan.compute_120.sm_120.cubin"}
    assert {file.name for file in (tmp_path / "built" / "scan").iterdir()} == names
    for architecture, registers in (("80", 18), ("120", 20)):
        found = budget.find_built(tmp_path / "built", "13.0.88", "csrc/scan.cu", architecture)
        assert found[0].read_text() == f"{architecture}\n"
        assert budget.parse_ptxas(found[1]) == {"scan": budget.Compiled(registers)}


def test_a_build_that_does_not_count(keep, tmp_path):
    built = tmp_path / "built"
    assert budget.find_built(None, "13.0.88", "scan.cu", "80") is None
    assert budget.find_built(built, "13.0.88", "scan.cu", "80") is None
    assert keep("-c", "scan.cu").returncode == 0
    assert budget.find_built(built, "13.0.88", "scan.cu", "80") is not None
    assert budget.find_built(built, "13.0.88", "scan.cu", "90a") is None
    assert budget.find_built(built, "13.1.80", "scan.cu", "80") is None
    os.utime(built / "scan" / "log", (0, 0))  # a source is newer
    assert budget.find_built(built, "13.0.88", "scan.cu", "80") is None


def test_a_build_that_fails_says_why(keep, tmp_path):
    run = keep("-c", "broken.cu")
    assert (run.returncode, run.stdout) == (2, "broken.cu(1): error: no\n")
    assert not (tmp_path / "built" / "broken").exists()


def test_the_library_without_machine_code(tmp_path):
    text = elf({"host": [one(sass.EXIT)], "device": [one(sass.EXIT)] * 5})
    library = tmp_path / "lib.so"
    library.write_bytes(text)
    assert budget.library_bytes(library) == len(text)
    library.write_bytes(text.replace(b".text.device", b".nv_fatbin\0\0"[:12]))
    assert budget.library_bytes(library) == len(text) - 5 * sass.INSTRUCTION_BYTES


def test_the_library_is_held_to_its_size_and_not_to_its_time():
    library = {"architecture": "90a", "bytes": 1000, "build_seconds": 100, "cores": 2}
    file = FILE | {"library": library}
    assert budget.library_offences(file, 1050) == []
    (line,) = budget.library_offences(file, 1051)
    assert line == "the library without GPUs' machine code: bytes: 1000 allowed, 1051 found"
    assert budget.library_offences(FILE, 1000) != []
    assert budget.merged(file, "13.0.88", LAUNCH, MEASURED)["library"] == library


def test_the_file():
    """Complete, and of the shape that this program writes."""
    text = budget.BUDGET.read_text()
    file = json.loads(text)
    assert budget.to_text(file) == text
    assert list(file["architectures"]) == list(budget.ARCHITECTURES)
    for key, total in file["total"].items():
        assert total == sum(row[key] for row in file["architectures"].values())
    assert file["library"]["bytes"] > 10**6 and file["library"]["build_seconds"] > 0
    for name, row in file["kernels"].items():
        assert row.keys() == {"launch", *budget.ARCHITECTURES}, name
        for architecture in budget.ARCHITECTURES:
            shared = row[architecture]["static_shared"] + row["launch"]["dynamic_shared"]
            assert shared <= budget.MULTIPROCESSORS[architecture].shared_bytes_per_block
            assert row[architecture]["occupancy"] > 0
            if name.startswith("diagonal_tiles"):
                counts = row[architecture]["per_element"]
                assert 0 <= counts["mufu"] < counts["way"] < counts["loop"]
            if name.startswith("selective_scan_wide"):
                counts = row[architecture]["per_element"]
                assert 1 < counts["mufu"] < counts["states"] < counts["way"]
            if "product_passes" in row["launch"]:
                counts = row[architecture].get("per_element")
                assert counts or architecture != "90a"
                if counts:
                    assert 1 < counts["products"] < counts["way"] < counts["loop"]
    of_products = [
        name for name, row in file["kernels"].items() if "product_passes" in row["launch"]
    ]
    assert len(of_products) == 4 + 4 + 6
    assert budget.table(file, ["90a"]).count("\n") == len(file["kernels"])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX") or "c++"), reason="no C++ compiler")
def test_the_file_has_the_kernels_of_the_sources(tmp_path):
    launches = budget.launches(tmp_path)
    assert launches.keys() == json.loads(budget.BUDGET.read_text())["kernels"].keys()
    assert all(row["threads"] % 32 == 0 for row in launches.values())
