"""Builds torch_ext against the torch that is installed: pip install --no-build-isolation .

CMakeLists.txt has the list of sources and every flag, cmake/toolchain.py finds what is needed; this
file runs CMake and puts its results into the Python package. Environment variables:

    TORCH_EXT_CUDA=0|1       without or with CUDA kernels (default: with, if torch has CUDA and an
                             nvcc of its major version is found: a toolkit's, or pip's)
    TORCH_CUDA_ARCH_LIST     "8.0;9.0a;12.0+PTX" (default: what torch itself was built for)
    TORCH_EXT_WERROR=1       warnings of our own code are errors
    TORCH_EXT_OBJECTS        a build folder of another torch: what knows no torch is taken from there
    MAX_JOBS                 compilations and C++ tests at a time (default: one per core)
    CXX, CUDACXX, CUDA_HOME  as usual

For developers:

    python setup.py build_ext --inplace    puts the results into the source's own torch_ext/
    python setup.py cpp_tests              builds (where the last build left off) and runs C++ tests
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools import __version__ as setuptools_version
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))
import toolchain  # noqa: E402

VERSION = re.search(r"project\(torch_ext VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[
    1
]
BUILD_INFO = '''"""Written by setup.py: what this build was made for."""

version = {version!r}
torch = {torch!r}
torch_cuda = {torch_cuda!r}
cuda = {cuda!r}
cuda_architectures = {cuda_architectures!r}
'''


def say(message):
    print(f"torch_ext: {message}", file=sys.stderr, flush=True)


def run(*command):
    command = [str(c) for c in command]
    if subprocess.run(command).returncode:
        toolchain.stop(f"this failed, its own message is above: {' '.join(command)}")


def forget_other_nvcc(cache, nvcc):
    """CMake cannot change the compiler of a folder: it starts over and drops the other options."""
    if nvcc and cache.exists():
        known = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.+)$", cache.read_text(), re.M)
        if known and known[1] != nvcc:
            shutil.rmtree(cache.parent)


def take_objects(other, folder):
    """The kernels' objects of another build, and what ninja knows of them: it compiles again what differs."""
    if folder.exists() or not (other / ".ninja_log").exists():
        return
    (folder / "CMakeFiles").mkdir(parents=True)
    for name in (".ninja_log", ".ninja_deps"):
        shutil.copy2(other / name, folder)
    for pattern in ("torch_ext_cuda.dir", "torch_ext_kernels.dir", "torch_ext_isa_*.dir"):
        for objects in (other / "CMakeFiles").glob(pattern):
            shutil.copytree(objects, folder / "CMakeFiles" / objects.name)


class Build(build_ext):
    def run(self):
        tools = self.compile(tests=False)
        inplace = self.inplace or self.editable_mode
        package = (ROOT if inplace else Path(self.build_lib).resolve()) / "torch_ext"
        run(tools["cmake"], "--install", self.folder, "--prefix", package, "--strip")
        (package / "_build_info.py").write_text(BUILD_INFO.format(version=VERSION, **tools))

    def compile(self, tests):
        t = toolchain.find_all()
        for note in t["notes"]:
            say(note)
        if t["cuda"]:
            cuda = f"CUDA {t['cuda']} for {' '.join(t['cuda_architectures'])}"
        else:
            cuda = f"CPU only ({t['no_cuda_reason']})"
        say(f"torch {t['torch']}, {t['cxx']}, {cuda}")
        if not t["python_headers"]:
            say("without torch_ext._C, for tests and information: no Python.h (python3-dev has it)")

        # CMake remembers what it found, so each combination has a folder; in it rebuilds are
        # incremental.
        parts = [
            "torch",
            t["torch"],
            sys.implementation.cache_tag,
            f"cuda{t['cuda']}" if t["cuda"] else "cpu",
        ]
        if os.environ.get("CXX"):
            parts.append(Path(t["cxx"]).name)
        self.folder = ROOT / "build" / "-".join(parts)
        forget_other_nvcc(self.folder / "CMakeCache.txt", t["nvcc"])
        if other := os.environ.get("TORCH_EXT_OBJECTS"):
            take_objects(Path(other), self.folder)
        options = {
            "CMAKE_PREFIX_PATH": t["torch_cmake"],
            "CMAKE_CXX_COMPILER": t["cxx"],
            "Python_EXECUTABLE": sys.executable,
            "TORCH_EXT_CUDA": int(bool(t["cuda"])),
            "TORCH_EXT_PYTHON": int(t["python_headers"]),
            "TORCH_EXT_TESTS": int(tests),
            "TORCH_EXT_WERROR": int(os.environ.get("TORCH_EXT_WERROR") == "1"),
        }
        if t["cuda"]:
            options["CMAKE_CUDA_COMPILER"] = t["nvcc"]
            options["CMAKE_CUDA_ARCHITECTURES"] = ";".join(t["cuda_architectures"])
            if t["cuda_flags"]:
                flags = f"{shlex.join(t['cuda_flags'])} {os.environ.get('CUDAFLAGS', '')}"
                options["CMAKE_CUDA_FLAGS"] = flags.strip()
            options["TORCH_EXT_CUDA_INCLUDES"] = ";".join(toolchain.header_folders(t["cuda_flags"]))
        if t["ninja"]:
            options["CMAKE_MAKE_PROGRAM"] = t["ninja"]
        generator = "Ninja" if t["ninja"] else "Unix Makefiles"
        defines = [f"-D{name}={value}" for name, value in options.items()]
        run(t["cmake"], "-S", ROOT, "-B", self.folder, "-G", generator, *defines)
        self.jobs = os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))
        run(t["cmake"], "--build", self.folder, "--parallel", self.jobs)
        return t


class CppTests(Build):
    description = "build the C++ tests in the folder of the last build, and run them"

    def run(self):
        cmake = Path(self.compile(tests=True)["cmake"])
        ctest = cmake.with_name("ctest")
        run(ctest, "--test-dir", self.folder, "--output-on-failure", "--parallel", self.jobs)


class FreshPython(build_py):
    """Forgets the last build: setuptools would also pack files that are gone from the source."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "torch_ext"), ignore_errors=True)
        super().run()


if __name__ == "__main__":
    if toolchain.numbers(setuptools_version) < (77, 0):
        toolchain.stop(
            f"setuptools 77 or newer is needed, this is {setuptools_version}: "
            'pip install -U "setuptools>=77"'
        )
    setup(
        version=VERSION,
        ext_modules=[
            Extension("torch_ext._C", [])
        ],  # says that the wheel is of this platform and Python
        cmdclass={"build_ext": Build, "build_py": FreshPython, "cpp_tests": CppTests},
    )
