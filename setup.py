"""Builds torch_ext with CMake against the torch that is installed: pip install --no-build-isolation .

CMakeLists.txt has the list of sources and every flag. This file finds torch, the compiler, cmake and the CUDA toolkit,
says in one sentence what is missing, and puts CMake's results into the Python package.

    TORCH_EXT_CUDA=0|1       without or with the CUDA kernels (default: with, if torch and the toolkit allow it)
    TORCH_CUDA_ARCH_LIST     "8.0;9.0a;12.0+PTX" (default: what torch itself was built for)
    TORCH_EXT_WERROR=1       warnings of our own code are errors
    MAX_JOBS, CXX, CUDA_HOME as usual

    python setup.py build_ext --inplace    for developers: the results go into the source's own torch_ext/
    python setup.py cpp_tests              builds the C++ tests in the same build folder and runs them
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
OLDEST_CMAKE = (3, 26)
NO_TORCH = f"""
torch_ext: it is compiled against the torch it will run with, and no torch can be imported here ({{}}).
pip's build isolation hides an installed torch, so this is the way to install:

    pip install torch "setuptools>=77" cmake ninja
    pip install --no-build-isolation {HERE}
"""
CXX20 = """
#include <concepts>
#include <span>
template <std::integral T> constexpr T twice(std::span<const T> s) { return T(2 * s[0]); }
int main() { const int one[1] = {1}; return twice<int>(one) - 2; }
"""


def stop(message):
    sys.exit(f"\ntorch_ext: {message}\n")


def say(message):
    print(f"torch_ext: {message}", file=sys.stderr, flush=True)


def numbers(version, count=2):
    return tuple(int(n) for n in re.findall(r"\d+", version)[:count])


def programs(name):
    """Every program of that name: beside this interpreter (not on PATH in a venv that is not activated), then on PATH."""
    folders = [sysconfig.get_path("scripts"), *os.environ.get("PATH", "").split(os.pathsep)]
    return [p for p in (shutil.which(name, path=folder) for folder in folders if folder) if p]


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def find_torch():
    try:
        import torch
    except ImportError as e:
        sys.exit(NO_TORCH.format(e))
    if numbers(torch.__version__) < OLDEST_TORCH:
        stop(f"torch 2.11 or newer is needed, and this is torch {torch.__version__}: pip install -U torch")
    return torch


def find_compiler():
    wanted = os.environ.get("CXX")
    found = [p for name in ([wanted] if wanted else ["c++", "g++", "clang++"]) for p in [shutil.which(name)] if p]
    install = "apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), or set CXX to one"
    if not found:
        stop(f"no C++ compiler was found{f' at CXX={wanted}' if wanted else ''}: {install}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "cxx20.cpp")
        source.write_text(CXX20)
        for cxx in found:
            tried = subprocess.run([cxx, "-std=c++20", source, "-o", source.with_suffix("")], capture_output=True, text=True)
            if tried.returncode == 0:
                return cxx
    stop(f"{cxx} cannot compile C++20, which torch's headers need (g++ 11 or clang++ 14 or newer): {install}\n{tried.stderr}")


def find_cmake():
    found = [(numbers(output(p, "--version")), p) for p in programs("cmake")]
    for version, cmake in found:
        if version >= OLDEST_CMAKE:
            return cmake
    other = ", and " + ", ".join(f"{p} is {'.'.join(map(str, v))}" for v, p in found) if found else ""
    stop(f"cmake 3.26 or newer is needed{other}: pip install cmake ninja")


def find_nvcc():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for path in [f"{h}/bin" for h in homes if h] + [None, "/usr/local/cuda/bin"]:
        nvcc = shutil.which("nvcc", path=path)
        if nvcc:
            return nvcc, ".".join(map(str, numbers(output(nvcc, "--version").partition("release ")[2])))
    return None, ""


def decide_cuda(torch_cuda, wanted, nvcc, nvcc_version):
    """Build the CUDA kernels or not, and the reason if not. `torch_cuda` is torch.version.cuda."""
    if wanted == "0":
        return False, "TORCH_EXT_CUDA=0"
    if not torch_cuda:
        reason = "this torch is built without CUDA: install a CUDA build of torch"
    elif not nvcc:
        reason = f"no CUDA toolkit was found: install CUDA {torch_cuda} or set CUDA_HOME"
    elif numbers(nvcc_version, 1) != numbers(torch_cuda, 1):
        reason = f"{nvcc} is CUDA {nvcc_version}, torch is built for CUDA {torch_cuda}: set CUDA_HOME to a matching toolkit"
    else:
        return True, ""
    if wanted == "1":
        stop(f"TORCH_EXT_CUDA=1, but {reason}")
    return False, reason


def cuda_architectures(wanted, torch_flags, known):
    """CMake's list from TORCH_CUDA_ARCH_LIST, or else from torch's own (known without a GPU), newest also as PTX."""
    if wanted:
        names = [n.removeprefix("sm_").replace(".", "") for n in wanted.replace(";", " ").replace(",", " ").split()]
        if bad := [n for n in names if not re.fullmatch(r"\d+[af]?(\+PTX)?", n)]:
            stop(f'TORCH_CUDA_ARCH_LIST has {bad[0]!r}, expected numbers as in "8.0;9.0a;12.0+PTX"')
    else:
        names = [n.removeprefix("sm_") for n in torch_flags.split() if n.startswith("sm_")]
        names = [n for n in names if not known or n in known] or sorted(known, key=int)
        names[-1] += "+PTX"
    return ";".join(n.removesuffix("+PTX") if n.endswith("+PTX") else n + "-real" for n in names)


class Build(build_ext):
    def run(self):
        self.build(tests=False)

    def build(self, tests):
        torch = find_torch()
        cxx, cmake = find_compiler(), find_cmake()
        nvcc, nvcc_version = find_nvcc()
        wanted = os.environ.get("TORCH_EXT_CUDA", "")
        cuda, reason = decide_cuda(torch.version.cuda, wanted, nvcc, nvcc_version)
        archs = ""
        if cuda:
            known = re.findall(r"compute_(\d+)\s", output(nvcc, "--list-gpu-arch"))
            archs = cuda_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), torch._C._cuda_getArchFlags() or "", known)
        headers = Path(sysconfig.get_path("include"), "Python.h").exists()
        say(f"torch {torch.__version__}, {cxx}, " + (f"CUDA {nvcc_version} for {archs}" if cuda else f"CPU only ({reason})"))
        if not headers:
            say("Python.h was not found, so torch_ext._C (build information, test hooks) is left out; python3-dev has it")

        # A folder for each combination, since CMake remembers what it found: rebuilds are incremental in each.
        key = f"torch-{torch.__version__}-{sys.implementation.cache_tag}-{f'cuda{nvcc_version}' if cuda else 'cpu'}"
        key += f"-{Path(cxx).name}" if os.environ.get("CXX") else ""
        self.folder = HERE / "build" / key
        options = {
            "CMAKE_PREFIX_PATH": torch.utils.cmake_prefix_path,
            "CMAKE_CXX_COMPILER": cxx,
            "TORCH_EXT_CUDA": int(cuda),
            "TORCH_EXT_PYTHON": int(headers),
            "TORCH_EXT_TESTS": int(tests),
            "TORCH_EXT_WERROR": int(os.environ.get("TORCH_EXT_WERROR") == "1"),
            "Python_EXECUTABLE": sys.executable,
        }
        if cuda:
            options |= {"CMAKE_CUDA_COMPILER": nvcc, "CMAKE_CUDA_ARCHITECTURES": archs}
        generator = ["-G", "Unix Makefiles"]
        if ninja := programs("ninja"):
            generator = ["-G", "Ninja"]
            options["CMAKE_MAKE_PROGRAM"] = ninja[0]
        self.cmake(cmake, "-S", HERE, "-B", self.folder, *generator, *(f"-D{k}={v}" for k, v in options.items()))
        jobs = os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))
        self.cmake(cmake, "--build", self.folder, "--parallel", jobs)
        if tests:
            return
        inplace = self.inplace or self.editable_mode
        package = (HERE if inplace else Path(self.build_lib).resolve()) / "torch_ext"
        self.cmake(cmake, "--install", self.folder, "--prefix", package, "--strip")
        (package / "_build_info.py").write_text(
            '"""Written by setup.py: what this build was made for."""\n\n'
            f'version = "{VERSION}"\n'
            f'torch = "{torch.__version__}"\n'
            f"torch_cuda = {torch.version.cuda!r}\n"
            f"cuda = {nvcc_version if cuda else None!r}\n"
            f"cuda_architectures = {archs.split(';') if cuda else []!r}\n"
        )

    def cmake(self, *command):
        command = [str(c) for c in command]
        if subprocess.run(command).returncode:
            stop("this failed, its own message is above: " + " ".join(command))


class CppTests(Build):
    description = "build the C++ tests in the folder of the last build and run them"

    def run(self):
        self.build(tests=True)
        self.cmake("ctest", "--test-dir", self.folder, "--output-on-failure")


class FreshPython(build_py):
    """setuptools keeps files in build/lib* that are gone from the source."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "torch_ext"), ignore_errors=True)
        super().run()


VERSION = re.search(r"project\(torch_ext VERSION ([\d.]+)", (HERE / "CMakeLists.txt").read_text())[1]

if __name__ == "__main__":
    setup(
        version=VERSION,
        ext_modules=[Extension("torch_ext._C", [])],  # makes the wheel one of this platform; CMake builds it
        cmdclass={"build_ext": Build, "build_py": FreshPython, "cpp_tests": CppTests},
    )
