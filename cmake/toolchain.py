"""Finds what the build needs, or says in one sentence how to get it.

setup.py builds with what this finds. `python cmake/toolchain.py` prints it, `python
cmake/toolchain.py compiler` only looks for a C++ compiler, and `python cmake/toolchain.py
cuda-packages` prints what pip has to install for the CUDA kernels on a machine with a GPU, or
nothing.
"""

import glob
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST_TORCH = (2, 11)
OLDEST_CMAKE = (3, 26)
# Where toolkits are that are on no PATH: NVIDIA's and the distributions' packages put them there.
CUDA_FOLDERS = ["/usr/local/cuda", "/usr/local/cuda-*", "/opt/cuda"]
OLDEST_CUDA_OF_PIP = 13  # the packages of CUDA 12 have no nvcc
INSTALL_COMPILER = "apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), or set CXX"
CXX20 = """
#include <concepts>
#include <span>
template <std::integral T> constexpr T twice(std::span<const T> s) { return T(2 * s[0]); }
int main() { const int one[1] = {1}; return twice<int>(one) - 2; }
"""
KERNEL = """
#include <cuda_fp16.h>
__global__ void twice(__half* x) { *x = *x + *x; }
int main() { twice<<<1, 1>>>(nullptr); }
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch without NumPy, which the build does not need
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


def cuda_version(nvcc):
    """Such as "13.0"; "" for an nvcc that does not run."""
    return ".".join(map(str, numbers(output(nvcc, "--version").partition("release ")[2])))


def system_nvccs():
    """Each nvcc once: first those that the user names, then those on PATH and in CUDA_FOLDERS."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    usual = [sorted(glob.glob(f), key=numbers, reverse=True) for f in CUDA_FOLDERS]
    found = [shutil.which(os.environ.get("CUDACXX", ""))]
    found += [shutil.which("nvcc", path=f"{home}/bin") for home in homes if home]
    found += programs("nvcc")
    found += [shutil.which("nvcc", path=f"{folder}/bin") for folder in sum(usual, [])]
    unique = {}
    for path in filter(None, found):
        unique.setdefault(os.path.realpath(path), path)
    return list(unique.values())


def pip_nvcc(major):
    """nvcc of the pip packages in this environment, or None, and the flags it needs.

    Its libraries are in lib, and CUDA 13.0's looks in lib64. In a venv with --system-site-packages,
    CUDA's headers and libraries may be in the system's folder and nvcc in the venv's.
    """
    folders = [Path(p, "nvidia", f"cu{major}") for p in dict.fromkeys(sys.path) if p]
    folders = [f for f in folders if f.is_dir()]
    for folder in folders:
        if nvcc := shutil.which("nvcc", path=folder / "bin"):
            headers = [f"-isystem={f}/include" for f in folders if f != folder]
            return nvcc, [*headers, *(f"-L{f}/lib" for f in folders)]
    return None, []


def header_folders(flags):
    """The folders of CUDA's headers among nvcc's flags: C++ sources include them, too."""
    return [flag.removeprefix("-isystem=") for flag in flags if flag.startswith("-isystem=")]


def does_not_compile(nvcc, flags):
    """What nvcc says of a small kernel: "" when it compiles and links.

    pip may mix parts of two CUDAs, and no nvcc takes a g++ much newer than itself.
    """
    if host := os.environ.get("CUDAHOSTCXX"):  # which CMake passes on
        flags = [*flags, f"-ccbin={host}"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cu")
        source.write_text(KERNEL)
        command = [nvcc, *flags, "-std=c++20", source, "-o", source.with_suffix("")]
        tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode == 0:
        return ""
    lines = (tried.stderr + tried.stdout).strip().splitlines() or ["nothing"]
    worst = next((line for line in lines if re.search("error|fatal|cannot", line)), lines[-1])
    return worst.strip().partition(" The nvcc flag")[0]  # advice to ignore it


def cuda_packages(torch_cuda):
    """What pip installs to compile for a torch of that CUDA: exactly its release, if pip knows it.

    All of the parts are named, because some releases of cuda-toolkit leave open which release of
    the others nvcc comes with.
    """
    try:
        release = importlib.metadata.version("cuda-toolkit")
    except importlib.metadata.PackageNotFoundError:
        release = ""
    if numbers(release) != numbers(torch_cuda):
        release = f"{torch_cuda}.*"
    return f"cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]=={release}"


def find_cuda(torch_cuda):
    """What compiles the CUDA kernels for a torch of CUDA torch_cuda, or why nothing does.

    Of the same major version, that is: minor versions go together. A toolkit of the system comes
    before pip's packages, as it may be what the user keeps up to date; "notes" says what was seen
    and is not used.
    """
    found = {"nvcc": None, "cuda": None, "cuda_flags": [], "no_cuda_reason": "", "notes": []}
    wanted = os.environ.get("TORCH_EXT_CUDA", "")
    if wanted == "0":
        return found | {"no_cuda_reason": "TORCH_EXT_CUDA=0"}
    if not torch_cuda:
        reason = "this torch is built without CUDA"
    else:
        major = numbers(torch_cuda, 1)[0]
        pip, pip_flags = pip_nvcc(major)
        others = []
        for nvcc in system_nvccs():
            version = cuda_version(nvcc)
            if numbers(version, 1) == (major,):
                same = pip and os.path.realpath(nvcc) == os.path.realpath(pip)  # CUDA_HOME names it
                return found | {
                    "nvcc": nvcc,
                    "cuda": version,
                    "cuda_flags": pip_flags if same else [],
                }
            others.append(f"{nvcc} ({f'CUDA {version}' if version else 'it does not run'})")
        if others:
            are = "is" if len(others) == 1 else "are"
            found["notes"].append(
                f"{', '.join(others)} {are} not used: torch is built for CUDA {torch_cuda}"
            )
        said = does_not_compile(pip, pip_flags) if pip else ""
        if pip and not said:
            return found | {"nvcc": pip, "cuda": cuda_version(pip), "cuda_flags": pip_flags}
        if said:
            found["notes"].append(f"{pip} is not used, it does not compile: {said}")
        reason = f"no nvcc of CUDA {major} that works was found, and "
        if re.search("unsupported (GNU|clang) version", said):
            reason = (
                "pip's nvcc takes no C++ compiler as new as this: set CUDAHOSTCXX to an older one"
            )
        elif major >= OLDEST_CUDA_OF_PIP:
            here = sysconfig.get_path("scripts")
            command = "pip" if shutil.which("pip") == f"{here}/pip" else f"{sys.executable} -m pip"
            reason += f'this installs one: {command} install "{cuda_packages(torch_cuda)}"'
        else:
            reason += f"pip has none: install CUDA {torch_cuda} or set CUDA_HOME"
    if wanted == "1":
        stop("; ".join([*found["notes"], f"TORCH_EXT_CUDA=1, but {reason}"]))
    return found | {"no_cuda_reason": reason}


def missing_cuda_packages(torch):
    """What pip should install now: for GPUs that torch can use, and nothing where there are none.

    On a machine without a GPU the kernels would be a large download and minutes of compiling for
    nothing; TORCH_EXT_CUDA=1 asks for them all the same.
    """
    wanted = os.environ.get("TORCH_EXT_CUDA", "")
    cuda = torch.version.cuda
    if not cuda or numbers(cuda, 1) < (OLDEST_CUDA_OF_PIP,) or wanted == "0":
        return ""
    if wanted != "1" and not torch.cuda.is_available():
        return ""
    os.environ.pop("TORCH_EXT_CUDA", None)  # nothing to stop for: it is about to be installed
    return "" if find_cuda(cuda)["nvcc"] else cuda_packages(cuda)


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
    cuda = find_cuda(torch.version.cuda)
    architectures = []
    if nvcc := cuda["nvcc"]:
        known = re.findall(r"compute_(\d+)\b", output(nvcc, "--list-gpu-arch"))
        architectures = cuda_architectures(torch._C._cuda_getArchFlags() or "", known)
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_cmake": torch.utils.cmake_prefix_path,
        "cxx": find_compiler(),
        "cmake": find_cmake(),
        "ninja": next(iter(programs("ninja")), None),
        "python_headers": Path(sysconfig.get_path("include"), "Python.h").exists(),
        **cuda,
        "cuda_architectures": architectures,
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["compiler"]:
        print(find_compiler())
    elif sys.argv[1:] == ["cuda-packages"]:
        print(missing_cuda_packages(find_torch()))
    else:
        for name, value in find_all().items():
            print(f"{name:20}{value}")
