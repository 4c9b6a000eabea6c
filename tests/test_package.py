"""How torch_ext builds, installs, loads, and what it says when it cannot.

Stand-ins for torch make most of it quick.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_ext
from torch_ext._library import build_info, folder

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = folder / "lib" / "libtorch_ext.so"
sys.path.insert(0, str(ROOT / "cmake"))
import toolchain  # noqa: E402

FAKE_TORCH = """
__version__ = {version!r}
class version: cuda = {cuda!r}
class utils: cmake_prefix_path = "nowhere"
class ops:
    def load_library(path): raise OSError("undefined symbol: _ZN2at")
"""


def run(*command, env=None, **kwargs):
    env = {k: str(v) for k, v in {**os.environ, **(env or {})}.items() if v is not None}
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=300, env=env, **kwargs
    )
    done.all = done.stdout + done.stderr
    return done


def fake_torch(path, version="2.15.0", cuda=None, text=None):
    (path / "torch").mkdir(parents=True)
    (path / "torch" / "__init__.py").write_text(
        text or FAKE_TORCH.format(version=version, cuda=cuda)
    )
    return {"PYTHONPATH": path}


NO_TORCH = "raise ImportError(\"No module named 'torch'\")"


# ---- building ----
@pytest.fixture
def source(tmp_path):
    """As much of the source as a build reads before it compiles."""
    to = tmp_path / "source"
    to.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    shutil.copytree(ROOT / "cmake", to / "cmake")
    return to


def build(source, env):
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=source, env=env)
    assert done.returncode == 1
    assert "Traceback" not in done.all
    return done.all


def test_build_without_torch(source, tmp_path):
    said = build(source, fake_torch(tmp_path, text=NO_TORCH))
    assert "no torch can be imported" in said
    assert f"pip install --no-build-isolation {source}" in said


def test_build_with_an_old_torch(source, tmp_path):
    said = build(source, fake_torch(tmp_path, "2.10.1+cu128"))
    assert "torch 2.11 or newer is needed, this is 2.10.1+cu128: pip install -U torch" in said


def test_build_without_a_compiler(source, tmp_path):
    env = fake_torch(tmp_path) | {"PATH": tmp_path, "CXX": None}
    assert "no C++ compiler was found (c++, g++, clang++): apt-get install g++" in build(
        source, env
    )


def test_build_with_a_compiler_that_does_not_know_cxx20(source, tmp_path):
    cxx = tmp_path / "old-c++"
    cxx.write_text("#!/bin/sh\necho unrecognized option -std=c++20 >&2\nexit 1\n")
    cxx.chmod(0o755)
    said = build(source, fake_torch(tmp_path) | {"CXX": cxx})
    assert f"{cxx} does not compile C++20" in said
    assert "unrecognized option" in said


@pytest.mark.parametrize("version", ["3.25.1", None])
def test_build_without_a_new_cmake(tmp_path, version, monkeypatch):
    cmake = tmp_path / "cmake"
    cmake.write_text(f"#!/bin/sh\necho cmake version {version}\n")
    cmake.chmod(0o755)
    monkeypatch.setattr(toolchain, "programs", lambda name: [str(cmake)] if version else [])
    with pytest.raises(SystemExit, match="cmake 3.26 or newer is needed.*: pip install cmake") as e:
        toolchain.find_cmake()
    assert ("is 3.25" in str(e.value)) == bool(version)


def toolkit(folder, version, compiles="exit 0"):
    """A folder as CUDA's, with an nvcc that knows its version."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    says = (
        f'echo "Cuda compilation tools, release {version}, V{version}.88"' if version else "exit 1"
    )
    nvcc.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then {says}; else {compiles}; fi\n')
    nvcc.chmod(0o755)
    return str(nvcc)


@pytest.fixture
def no_cuda(tmp_path, monkeypatch):
    """A machine without CUDA; bin/ is on its PATH, site/ among its Python packages."""
    for name in ("TORCH_EXT_CUDA", "CUDA_HOME", "CUDA_PATH", "CUDACXX", "CUDAHOSTCXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(toolchain, "CUDA_FOLDERS", [f"{tmp_path}/cuda", f"{tmp_path}/cuda-*"])
    return tmp_path


def found(torch_cuda):
    cuda = toolchain.find_cuda(torch_cuda)
    assert bool(cuda["nvcc"]) == bool(cuda["cuda"]) == (not cuda["no_cuda_reason"])
    return cuda["nvcc"], cuda["notes"]


def test_nvcc_is_looked_for_where_the_user_says_then_on_path_then_in_pips_packages(
    no_cuda, monkeypatch
):
    pip = toolkit(no_cuda / "site" / "nvidia" / "cu13", "13.2")
    assert found("13.2") == (pip, [])
    usual = toolkit(no_cuda / "cuda-13.0", "13.0")  # another minor version is fine
    assert found("13.2") == (usual, [])
    on_path = toolkit(no_cuda, "13.1")
    assert found("13.2") == (on_path, [])
    home = toolkit(no_cuda / "home", "13.3")
    monkeypatch.setenv("CUDA_HOME", str(no_cuda / "home"))
    assert found("13.2") == (home, [])
    named = toolkit(no_cuda / "named", "13.4")
    monkeypatch.setenv("CUDACXX", named)
    assert found("13.2") == (named, [])

    monkeypatch.setenv("TORCH_EXT_CUDA", "1")
    assert found("13.2") == (named, [])
    monkeypatch.setenv("TORCH_EXT_CUDA", "0")
    assert toolchain.find_cuda("13.2")["no_cuda_reason"] == "TORCH_EXT_CUDA=0"


def test_a_toolkit_of_another_major_version_is_not_used(no_cuda, monkeypatch):
    old = toolkit(no_cuda / "cuda-12.4", "12.4")
    (no_cuda / "cuda").symlink_to("cuda-12.4")
    same = str(no_cuda / "cuda" / "bin" / "nvcc")  # as old: named once
    note = f"{same} (CUDA 12.4) is not used: torch is built for CUDA 13.2"
    assert found("13.2") == (None, [note])
    pip = toolkit(no_cuda / "site" / "nvidia" / "cu13", "13.2")
    assert found("13.2") == (pip, [note])
    monkeypatch.setenv("CUDA_HOME", str(no_cuda / "cuda-12.4"))  # as images set it
    assert found("13.2") == (pip, [note.replace(same, old)])

    older = toolkit(no_cuda / "cuda-11.8", "11.8")
    broken = toolkit(no_cuda, "")
    note = f"{old} (CUDA 12.4), {broken} (it does not run), {older} (CUDA 11.8) are not used: torch"
    assert [n.partition(" is built")[0] for n in found("13.2")[1]] == [note]
    new = toolkit(no_cuda / "cuda-13.0", "13.0")
    assert found("13.2") == (new, [])


def test_pips_nvcc_of_mixed_versions_is_not_used(no_cuda):
    fatal = "ptxas fatal   : Unsupported .version 9.5; current version is '9.0'"
    pip = toolkit(no_cuda / "site" / "nvidia" / "cu13", "13.0", f'echo "{fatal}" >&2; exit 255')
    assert found("13.0") == (None, [f"{pip} is not used, it does not compile: {fatal}"])


def test_pips_nvcc_needs_a_cxx_compiler_that_it_knows(no_cuda, monkeypatch):
    monkeypatch.setenv("CUDAHOSTCXX", "g++-14")
    said = "host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later than"
    toolkit(
        no_cuda / "site" / "nvidia" / "cu13",
        "13.0",
        f'case "$*" in *-ccbin=g++-14*) ;; *) echo "{said}" >&2; exit 1 ;; esac',
    )
    assert found("13.0")[0]
    monkeypatch.delenv("CUDAHOSTCXX")
    assert found("13.0")[0] is None
    reason = toolchain.find_cuda("13.0")["no_cuda_reason"]
    assert "set CUDAHOSTCXX to an older one" in reason and "pip install" not in reason


def test_headers_of_system_packages_reach_an_nvcc_of_the_venv(no_cuda, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(no_cuda / "site"), str(no_cuda / "system")])
    system = no_cuda / "system" / "nvidia" / "cu13"
    system.mkdir(parents=True)
    site = no_cuda / "site" / "nvidia" / "cu13"
    toolkit(site, "13.0")
    expected = [f"-isystem={system}/include", f"-L{site}/lib", f"-L{system}/lib"]
    assert toolchain.find_cuda("13.0")["cuda_flags"] == expected
    assert toolchain.header_folders(expected) == [f"{system}/include"]
    for file in ("setup.py", "CMakeLists.txt"):  # and the C++ sources, which include CUDA's as well
        assert "TORCH_EXT_CUDA_INCLUDES" in (ROOT / file).read_text()
    monkeypatch.setenv("CUDA_HOME", str(site))
    assert toolchain.find_cuda("13.0")["cuda_flags"] == expected
    toolkit(no_cuda / "home", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(no_cuda / "home"))
    assert toolchain.find_cuda("13.0")["cuda_flags"] == []


@pytest.mark.parametrize(
    "torch_cuda, installed, reason",
    [
        (None, "", "this torch is built without CUDA"),
        ("12.8", "", "no nvcc of CUDA 12 that works was found, and pip has none: install"),
        ("13.0", "13.0.2", 'pip install "cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]==13.0.2"'),
        ("13.2", "13.2.2", 'pip install "cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]==13.2.2"'),
        ("13.2", "13.0.2", 'pip install "cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]==13.2.*"'),
        ("13.2", "", 'pip install "cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]==13.2.*"'),
    ],
)
def test_without_nvcc_one_sentence_says_how_to_get_it(
    torch_cuda, installed, reason, no_cuda, monkeypatch
):
    if installed:
        about = no_cuda / "site" / f"cuda_toolkit-{installed}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Name: cuda-toolkit\nVersion: {installed}\n")
    assert found(torch_cuda) == (None, [])
    assert reason in toolchain.find_cuda(torch_cuda)["no_cuda_reason"]
    toolkit(no_cuda, "11.8")
    monkeypatch.setenv("TORCH_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match=f"TORCH_EXT_CUDA=1, but .*{re.escape(reason)}") as e:
        toolchain.find_cuda(torch_cuda)
    assert ("(CUDA 11.8) is not used" in str(e.value)) == bool(torch_cuda)


@pytest.mark.parametrize(
    "torch_cuda, gpu, wanted, nvcc, expected",
    [
        ("13.2", True, "", "", True),
        ("13.2", True, "", "12.8", True),
        ("13.2", True, "", "13.0", False),
        ("13.2", True, "0", "", False),
        ("13.2", False, "", "", False),
        ("13.2", False, "1", "", True),
        ("12.8", True, "", "", False),
        (None, False, "1", "", False),
    ],
)
def test_packages_are_asked_for_when_a_gpu_needs_them(
    torch_cuda, gpu, wanted, nvcc, expected, no_cuda, monkeypatch
):
    class FakeTorch:
        class version:
            cuda = torch_cuda

        class cuda:
            is_available = staticmethod(lambda: gpu)

    if nvcc:
        toolkit(no_cuda, nvcc)
    monkeypatch.setenv("TORCH_EXT_CUDA", wanted)
    packages = "cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]==13.2.*"
    assert toolchain.missing_cuda_packages(FakeTorch) == (packages if expected else "")


def test_another_nvcc_gets_a_fresh_build_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from setup import forget_other_nvcc

    cache = tmp_path / "build" / "CMakeCache.txt"
    for nvcc, kept in (("/a/nvcc", True), (None, True), ("/b/nvcc", False), ("/b/nvcc", False)):
        if kept:
            cache.parent.mkdir(exist_ok=True)
            cache.write_text("CMAKE_CUDA_COMPILER:STRING=/a/nvcc\n")
        forget_other_nvcc(cache, nvcc)
        assert cache.exists() == kept


def test_kernels_of_another_build(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from setup import take_objects

    other, folder = tmp_path / "other", tmp_path / "folder"
    take_objects(other, folder)
    assert not folder.exists()  # nothing to take
    kernels = ["torch_ext_cuda.dir/a.cu.o", "torch_ext_isa_avx2.dir/b.cpp.o"]
    for file in [*kernels, "torch_ext.dir/c.cpp.o", "CMakeCache.txt"]:
        (other / "CMakeFiles" / file).parent.mkdir(parents=True, exist_ok=True)
        (other / "CMakeFiles" / file).write_text("")
    for file in (".ninja_log", ".ninja_deps", "CMakeCache.txt"):
        (other / file).write_text("")
    os.utime(other / "CMakeFiles" / kernels[0], (1000, 1000))
    take_objects(other, folder)
    taken = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert taken == {".ninja_log", ".ninja_deps", *(f"CMakeFiles/{file}" for file in kernels)}
    assert (folder / "CMakeFiles" / kernels[0]).stat().st_mtime == 1000  # ninja goes by it
    (other / ".ninja_log").write_text("new")
    take_objects(other, folder)
    assert (folder / ".ninja_log").read_text() == ""  # what was built here stays


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("", "75-real 80-real 90"),
        ("9.0a", "90a-real"),
        ("8.0;9.0a;12.0+PTX", "80-real 90a-real 120"),
        ("8.0 9.0", "80-real 90-real"),
    ],
)
def test_cuda_architectures(wanted, expected, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    known = ["75", "80", "86", "90"]  # what the toolkit compiles for: not 100
    flags = "sm_75 sm_80 sm_90 sm_100"
    assert toolchain.cuda_architectures(flags, known) == expected.split()


def test_cuda_architectures_that_mean_nothing(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST='Hopper': expected numbers"):
        toolchain.cuda_architectures("sm_90", ["90"])


def test_cmake_lists_every_source():
    listed = set(
        re.findall(r"^  (csrc/\S+\.(?:cpp|cu))$", (ROOT / "CMakeLists.txt").read_text(), re.M)
    )
    there = {
        str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")
    }
    assert listed == there


# ---- the scripts ----
@pytest.mark.parametrize("script", ["examples/quickstart.sh", "tests/run.sh"])
def test_scripts_fail_with_a_sentence(script, tmp_path):
    env = {"TORCH_EXT_VENV": tmp_path / "none", "PYTHON": "false", "TORCH_EXT_SKIP_CPP": 1}
    done = run("bash", ROOT / script, env=env)
    assert done.returncode == 1
    assert done.stderr.strip().startswith(
        "error: Python 3.10 or newer with venv is needed: apt-get"
    )

    env |= {"TORCH_EXT_VENV": sys.prefix, "CXX": "no-such-compiler"}
    done = run("bash", ROOT / script, env=env)
    assert done.returncode == 1
    assert f"use the Python environment {sys.prefix}, which has torch" in done.stdout
    assert "no C++ compiler was found (no-such-compiler)" in done.stderr


# ---- loading ----
@pytest.fixture
def package(tmp_path):
    """A torch_ext that only loads its library, to be imported with a stand-in for torch."""
    to = tmp_path / "site" / "torch_ext"
    (to / "lib").mkdir(parents=True)
    (to / "lib" / "libtorch_ext.so").touch()
    (to / "__init__.py").write_text("from . import _library")
    shutil.copy(folder / "_library.py", to)
    (to / "_build_info.py").write_text("torch, torch_cuda = '2.15.0+cu132', '13.2'")
    return to


def import_error(package, path, **kwargs):
    env = fake_torch(path, **kwargs)
    env["PYTHONPATH"] = f"{path}:{package.parent}"
    done = run(sys.executable, "-c", "import torch_ext", env=env)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


def test_import_without_torch(package, tmp_path):
    assert "torch_ext needs torch, which cannot be imported" in import_error(
        package, tmp_path, text=NO_TORCH
    )


@pytest.mark.parametrize("version", ["2.14.0+cu132", "2.16.0+cu132", "3.15.0"])
def test_import_with_another_torch(package, tmp_path, version):
    said = import_error(package, tmp_path, version=version, cuda="13.2")
    assert (
        f"ImportError: torch_ext was built for torch 2.15.0+cu132, but this is torch {version}. "
        in said
    )
    assert REBUILD in said


def test_import_with_a_torch_without_cuda(package, tmp_path):
    said = import_error(package, tmp_path, version="2.15.1+cpu")
    assert "built for a torch with CUDA, but this torch 2.15.1+cpu is without CUDA" in said
    assert REBUILD in said


def test_import_of_a_library_that_does_not_load(package, tmp_path):
    said = import_error(package, tmp_path, version="2.15.1", cuda="13.2")
    assert "libtorch_ext could not be loaded: undefined symbol: _ZN2at" in said
    assert REBUILD in said


def test_import_without_the_library(package, tmp_path):
    (package / "lib" / "libtorch_ext.so").unlink()
    said = import_error(package, tmp_path, version="2.15.0", cuda="13.2")
    assert "libtorch_ext.so does not exist" in said


def test_import_of_the_source_tree(package, tmp_path):
    (package / "_build_info.py").unlink()
    said = import_error(package, tmp_path)
    assert f"imported from {package}, where it has not been built" in said
    assert "run Python from another folder" in said


def test_two_copies_in_one_process(tmp_path):
    copy = shutil.copy(LIBRARY, tmp_path)
    code = f"import torch; torch.ops.load_library({str(copy)!r}); import torch_ext"
    done = run(sys.executable, "-c", code, env={"PYTHONPATH": folder.parent}, cwd=tmp_path)
    assert done.returncode == 1  # an exception: two registrations would abort
    assert f"another copy of libtorch_ext is already loaded in this process, {copy}" in done.stderr


def test_loaded_before_the_import(tmp_path):
    code = f"import torch; torch.ops.load_library({str(LIBRARY)!r}); import torch_ext; print('ok')"
    done = run(sys.executable, "-c", code, env={"PYTHONPATH": folder.parent}, cwd=tmp_path)
    assert done.stdout == "ok\n", done.stderr


# ---- what is installed ----
def test_main(tmp_path):
    done = run(sys.executable, "-m", "torch_ext", env={"PYTHONPATH": folder.parent}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"torch_ext     {build_info.version}" in done.stdout
    assert f"built for {build_info.torch}, running {torch.__version__}" in done.stdout
    assert f"threads       {torch.get_num_threads()}" in done.stdout
    assert (
        "CUDA kernels  " + (f"CUDA {build_info.cuda}" if build_info.cuda else "not built")
        in done.stdout
    )
    isa = pytest.importorskip("torch_ext._C").isa()
    assert f"{isa} in use" in done.stdout


def test_everything_but_the_hooks_works_without_them(tmp_path):
    code = "import sys, runpy; sys.modules['torch_ext._C'] = None; "
    code += "runpy.run_module('torch_ext', run_name='__main__')"
    done = run(sys.executable, "-c", code, env={"PYTHONPATH": folder.parent}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"CPU kernels +not known, .*_C", done.stdout)


def test_hooks():
    _C = pytest.importorskip("torch_ext._C")
    assert _C.build_info()["version"] == build_info.version
    assert "generic" in _C.isas()
    assert _C.isa() in _C.isas()
    assert _C.num_threads() == torch.get_num_threads()
    try:
        assert _C.force_isa("generic")
        assert _C.isa() == "generic"
        assert not _C.force_isa("no such set")
        assert _C.isa() == "generic"
    finally:
        assert _C.force_isa("")
    for kind, unit in {"copy": "GB/s", "triad": "GB/s", "exp": "G/s", "fma": "G/s"}.items():
        found = _C.calibrate(kind, 4096, nontemporal=False, threads=1, seconds=0.001)
        assert found["rate"] > 0
        assert found["unit"] == unit
    with pytest.raises(ValueError, match="kind is 'sine', expected copy, triad, exp or fma"):
        _C.calibrate("sine", 4096)


@pytest.mark.parametrize("limit", ["default", "avx2", "avx512"])
def test_the_instruction_set_follows_torchs_switch(limit, tmp_path):
    _C = pytest.importorskip("torch_ext._C")
    expected = {"default": "generic"}.get(limit, limit)
    if expected not in _C.isas() or not _C.force_isa(expected):
        pytest.skip(f"{expected} was not built or this machine lacks it")
    _C.force_isa("")
    code = "import torch_ext; from torch_ext import _C; print(_C.isa())"
    env = {"PYTHONPATH": folder.parent, "ATEN_CPU_CAPABILITY": limit}
    assert run(sys.executable, "-c", code, env=env, cwd=tmp_path).stdout.strip() == expected


def test_the_library_contains_no_python():
    needed = run("readelf", "-d", LIBRARY).stdout
    assert "libtorch_cpu.so" in needed
    assert "libpython" not in needed
    assert "libtorch_python" not in needed
    undefined = run("nm", "-D", "--undefined-only", LIBRARY).stdout
    assert not re.findall(r" U (_?Py[A-Z_]\w*)", undefined)


def test_instruction_sets_share_nothing():
    """What is not an instruction set's own is linked once for all, maybe AVX-512's for everyone."""
    built = sorted(
        (ROOT / "build").glob(f"torch-{torch.__version__}-{sys.implementation.cache_tag}-*")
    )
    objects = [o for b in built for o in b.glob("CMakeFiles/torch_ext_isa_*.dir/**/*.o")]
    if not objects:
        pytest.skip("this torch_ext was not built in this source tree")
    for o in objects:
        isa = re.search(r"torch_ext_isa_(\w+)\.dir", str(o))[1]
        defined = run("nm", "-C", "--defined-only", "--extern-only", o).stdout
        names = re.findall(r"^[0-9a-f]+ \w (.+)$", defined, re.M)
        assert any(f"torch_ext::cpu::{isa}::" in n for n in names), defined
        assert [n for n in names if f"torch_ext::cpu::{isa}::" not in n] == []


# ---- C++ programs ----
@pytest.fixture
def program(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.26)\n"
        "project(program LANGUAGES CXX)\n"
        "find_package(TorchExt REQUIRED)\n"
        "add_executable(program main.cpp)\n"
        "target_link_libraries(program PRIVATE TorchExt::torch_ext)\n"
    )
    (tmp_path / "main.cpp").write_text("int main() {}\n")
    return tmp_path


def configure(program, *prefix, version="2.15", cuda=True):
    paths = ";".join(map(str, [*prefix, torch_ext.cmake_prefix_path]))
    cmake = toolchain.find_cmake()
    return run(cmake, "-S", program, "-B", program / "build", f"-DCMAKE_PREFIX_PATH={paths}")


def test_a_cxx_program_names_no_operator_and_has_them_all(program):
    """find_package(TorchExt) brings torch, and a library whose symbols are not used stays."""
    (program / "main.cpp").write_text(
        "#include <ATen/core/dispatch/Dispatcher.h>\n"
        "int main() {\n"
        '  return !c10::Dispatcher::singleton().findSchema({"torch_ext::linear_scan", ""});\n'
        "}\n"
    )
    done = configure(program)
    assert done.returncode == 0, done.all
    done = run(toolchain.find_cmake(), "--build", program / "build")
    assert done.returncode == 0, done.all
    done = run(program / "build" / "program", env={"LD_LIBRARY_PATH": None})
    assert done.returncode == 0, done.all


@pytest.mark.parametrize("kind", ["other version", "other CUDA"])
def test_a_cxx_program_with_another_torch(program, tmp_path, kind):
    other = tmp_path / "other" / "torch"
    major, minor = build_info.torch.split(".")[:2]
    if kind == "other version":
        minor = int(minor) + 1
    for name, text in {
        "share/cmake/Torch/TorchConfig.cmake": "",
        "lib/libtorch.so": "",
        "include/torch/headeronly/version.h": f"#define TORCH_VERSION_MAJOR {major}\n"
        f"#define TORCH_VERSION_MINOR {minor}\n",
    }.items():
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text(text)
    if kind == "other CUDA" and not build_info.torch_cuda:
        (other / "lib/libtorch_cuda.so").touch()
    if kind == "other version" and build_info.torch_cuda:
        (other / "lib/libtorch_cuda.so").touch()
    done = configure(program, other / "share" / "cmake")
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "torch_ext was built for" in said
    assert REBUILD in said
