"""Options, fixtures and the table of consumers, for every suite in this folder."""

import os
import re
import zlib
from pathlib import Path

# Before torch is imported: waiting threads sleep instead of spinning, or, on a machine that is busy
# with something else, every small parallel region waits for a thread that is not running.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402

TABLE_BEGIN, TABLE_END = "<!-- consumers: begin -->", "<!-- consumers: end -->"


def pytest_addoption(parser):
    group = parser.getgroup("torch_ext")
    group.addoption(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where the operators run"
    )
    group.addoption(
        "--seed", type=int, help="replaces the seed that each random test derives from its name"
    )
    group.addoption(
        "--consumer-table",
        metavar="FILE",
        help="writes what each consumer of an operator did into this Markdown file, a column per "
        "version of torch; other versions' columns stay",
    )


def pytest_configure(config):
    for line in (
        "slow: takes seconds; deselect with -m 'not slow'",
        "consumer(name): one row of the table that --consumer-table writes",
        "unpoisoned: allocations are left as they are instead of filled with NaN",
    ):
        config.addinivalue_line("markers", line)
    import torch

    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch.cuda.is_available() is False here")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def seed(request):
    """A number that follows from the test's name: the same in every run, different between
    tests."""
    given = request.config.getoption("--seed")
    value = zlib.crc32(request.node.name.encode()) if given is None else given
    print(f"seed {value} (--seed {value} repeats it)")
    return value


@pytest.fixture
def generator(seed):
    """Draws on the CPU, so that every device sees the same numbers."""
    import torch

    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def poison(request):
    """Fills every uninitialised allocation with NaN: what an operator forgets to write is seen."""
    import torch

    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads():
    """Puts back the number of threads that a test changes."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def child_environment():
    """For subprocesses: they find this folder and the torch_ext that is under test."""
    import torch_ext

    here, package = Path(__file__).resolve().parent, Path(torch_ext.__file__).resolve().parents[1]
    path = [str(here), str(package), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, path)))


# ---- several processes: pytest -n 2 --dist loadgroup, as run.sh does ----
# Groups of tests, by their names.
ONE_AT_A_TIME = {
    "test_more_elements_than_int32": "memory",
    "test_more_elements_than_int32_of_a_matrix_memory": "memory",
}


def group(item):
    """Tests of one group go to one process, one after the other."""
    if item.path.name == "test_cuda.py":
        return "gpu"
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    if any(fixture[-1].scope == "module" for fixture in fixtures):
        return item.path.name  # what the fixture takes long to make is made once
    return ONE_AT_A_TIME.get(item.originalname)


# ---- the table of consumers ----
def pytest_collection_modifyitems(config, items):
    for item in items:
        if config.pluginmanager.hasplugin("xdist") and (name := group(item)):
            item.add_marker(pytest.mark.xdist_group(name))
        mark = item.get_closest_marker("consumer")
        if mark:
            case = getattr(item, "callspec", None) and item.callspec.params.get("case")
            item.user_properties.append(("consumer", (mark.args[0], str(case or ""))))


_results: dict[str, dict[str, set[str]]] = {}


def pytest_runtest_logreport(report):
    consumer = dict(report.user_properties).get("consumer")
    if consumer and (report.when == "call" or report.outcome != "passed"):
        name, case = consumer
        _results.setdefault(name, {}).setdefault(case, set()).add(report.outcome)


def pytest_sessionfinish(session):
    file = session.config.getoption("--consumer-table")
    if file and _results and not hasattr(session.config, "workerinput"):
        import torch
        from cases import ALL

        everything = [case.name for case in ALL]
        column = {name: _cell(found, everything) for name, found in _results.items()}
        version = "torch " + torch.__version__.split("+")[0]
        path = Path(file)
        before = path.read_text() if path.exists() else ""
        path.write_text(merge_table(before, version, column, everything))


def _cell(found, everything):
    groups = {"pass": [], "**FAIL**": [], "skipped": []}
    for case, outcomes in found.items():
        key = "**FAIL**" if "failed" in outcomes else "pass" if "passed" in outcomes else "skipped"
        groups[key].append(case)
    parts = []
    for key, cases in groups.items():
        named = [c for c in everything if c in cases]
        if cases:
            parts.append(key if named in ([], everything) else f"{key}: {', '.join(named)}")
    return "; ".join(parts)


def merge_table(text, version, column, operators):
    """Puts one version's column into the table in `text` (between the two marks, if it has
    them)."""
    begin, end = text.find(TABLE_BEGIN), text.find(TABLE_END)
    marked = 0 <= begin < end
    old = text[begin + len(TABLE_BEGIN) : end] if marked else text
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in old.splitlines()
        if line.startswith("|") and not re.match(r"\|[\s:-]+\|", line)
    ]
    table = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]}
    for name in column:
        table.setdefault(name, {})
    for name, cells in table.items():
        cells[version] = column.get(name, cells.get(version, "not run"))
    versions = sorted(
        {v for cells in table.values() for v in cells},
        key=lambda v: [int(n) for n in re.findall(r"\d+", v)],
    )
    lines = [
        f"`pass` without names: every operator of tests/cases.py ({', '.join(operators)}).",
        "",
        "| consumer | " + " | ".join(versions) + " |",
        "|---" * (len(versions) + 1) + "|",
    ]
    for name in sorted(table):
        cells = [table[name].get(v, "not run") for v in versions]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    new = "\n".join(lines) + "\n"
    if not marked:
        return new
    return text[: begin + len(TABLE_BEGIN)] + "\n" + new + text[end:]
