"""Finds what the build needs, or says in one sentence how to get it.

setup.py builds with what this finds. `python cmake/toolchain.py` prints it, `python
cmake/toolchain.py compiler` only looks for a C++ compiler.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST_TORCH = (2, 11)
OLDEST_CMAKE = (3, 26)
INSTALL_COMPILER = "apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), or set CXX"
CXX20 = """
#include <concepts>
#include <span>
template <std::integral T> constexpr T twice(std::span<const T> s) { return T(2 * s[0]); }
int main() { const int one[1] = {1}; return twice<int>(one) - 2; }
"""


def stop(message):
    sys.exit(f"torch_ext: {message}")


def numbers(version, count=2):
    return tuple(int(n) for n in re.findall(r"\d+", version)[:count])


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def programs(name):
    """All of that name: beside this interpreter (a venv may not be activated), then on PATH."""
    folders = [sysconfig.get_path("scripts"), *os.environ.get("PATH", "").split(os.pathsep)]
    return [p for p in (shutil.which(name, path=folder) for folder in folders if folder) if p]


def find_torch():
    try:
        import torch
    except ImportError as e:
        stop(
            "it is compiled against the torch it will run with, and no torch can be imported "
            f"here ({e}). pip's build isolation hides an installed one; install it like this:\n\n"
            '    pip install torch "setuptools>=77" cmake ninja\n'
            f"    pip install --no-build-isolation {ROOT}\n"
        )
    if numbers(torch.__version__) < OLDEST_TORCH:
        stop(f"torch 2.11 or newer is needed, this is {torch.__version__}: pip install -U torch")
    return torch


def find_compiler():
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["c++", "g++", "clang++"]
    found = [p for p in map(shutil.which, names) if p]
    if not found:
        stop(f"no C++ compiler was found ({', '.join(names)}): {INSTALL_COMPILER}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "cxx20.cpp")
        source.write_text(CXX20)
        for cxx in found:
            command = [cxx, "-std=c++20", source, "-o", source.with_suffix("")]
            tried = subprocess.run(command, capture_output=True, text=True)
            if tried.returncode == 0:
                return cxx
    stop(
        f"{cxx} does not compile C++20, which torch's headers need (g++ 11, clang++ 14 or newer "
        f"do): {INSTALL_COMPILER}. It said:\n{tried.stderr}"
    )


def find_cmake():
    found = [(numbers(output(p, "--version")), p) for p in programs("cmake")]
    for version, cmake in found:
        if version >= OLDEST_CMAKE:
            return cmake
    seen = "".join(f", {p} is {'.'.join(map(str, v)) or 'broken'}" for v, p in found)
    stop(f"cmake 3.26 or newer is needed{seen}: pip install cmake ninja")


def find_nvcc():
    """nvcc and its version "13.0", or None and ""."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for path in [*(f"{h}/bin" for h in homes if h), None, "/usr/local/cuda/bin"]:
        if nvcc := shutil.which("nvcc", path=path):
            release = output(nvcc, "--version").partition("release ")[2]
            return nvcc, ".".join(map(str, numbers(release)))
    return None, ""


def decide_cuda(torch_cuda, nvcc, nvcc_version):
    """Whether to build the CUDA kernels, and why not. torch_cuda is torch.version.cuda."""
    wanted = os.environ.get("TORCH_EXT_CUDA", "")
    if wanted == "0":
        return False, "TORCH_EXT_CUDA=0"
    if not torch_cuda:
        reason = "this torch is built without CUDA"
    elif not nvcc:
        reason = f"no nvcc was found: install CUDA {torch_cuda} or set CUDA_HOME"
    elif numbers(nvcc_version, 1) != numbers(torch_cuda, 1):
        reason = f"{nvcc} is CUDA {nvcc_version}, torch is built for {torch_cuda}: set CUDA_HOME"
    else:
        return True, ""
    if wanted == "1":
        stop(f"TORCH_EXT_CUDA=1, but {reason}")
    return False, reason


def cuda_architectures(torch_flags, known):
    """CMake's list from TORCH_CUDA_ARCH_LIST, else torch's own, which are known without a GPU.

    torch_flags is torch._C._cuda_getArchFlags(), "sm_75 sm_80 ...", known what nvcc can compile
    for. The newest is kept as PTX too, for GPUs to come.
    """
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        names = [n.replace(".", "") for n in re.split(r"[;,\s]+", wanted.strip())]
        for name in names:
            if not re.fullmatch(r"\d+[af]?(\+PTX)?", name):
                stop(f'TORCH_CUDA_ARCH_LIST={wanted!r}: expected numbers as in "8.0;9.0a;12.0+PTX"')
    else:
        names = [n.removeprefix("sm_") for n in torch_flags.split() if n.startswith("sm_")]
        names = [n for n in names if n in known] or list(known)
        names[-1] += "+PTX"
    return [n.removesuffix("+PTX") if n.endswith("+PTX") else n + "-real" for n in names]


def find_all():
    """What setup.py builds with; stops with a sentence when something is missing."""
    torch = find_torch()
    nvcc, nvcc_version = find_nvcc()
    cuda, reason = decide_cuda(torch.version.cuda, nvcc, nvcc_version)
    known = re.findall(r"compute_(\d+)\b", output(nvcc, "--list-gpu-arch")) if cuda else []
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_cmake": torch.utils.cmake_prefix_path,
        "cxx": find_compiler(),
        "cmake": find_cmake(),
        "ninja": next(iter(programs("ninja")), None),
        "python_headers": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "nvcc": nvcc if cuda else None,
        "cuda": nvcc_version if cuda else None,
        "cuda_architectures": cuda_architectures(torch._C._cuda_getArchFlags() or "", known)
        if cuda
        else [],
        "no_cuda_reason": reason,
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["compiler"]:
        print(find_compiler())
    else:
        for name, value in find_all().items():
            print(f"{name:20}{value}")
