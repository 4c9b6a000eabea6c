# shellcheck shell=bash
# Sourced by examples/quickstart.sh, tests/run.sh and .ci/run: a Python environment with torch and torch_ext.
#   TORCH_EXT_VENV   the environment to use, made when it does not exist. Default: the active one if it has torch,
#                    else .venv in the repository
#   TORCH_EXT_TORCH  what pip installs when the environment has no torch, e.g. "torch==2.11.0" (default: the newest)
#   PYTHON           the Python that makes a new environment (default: the first of 3.10 or newer)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
unset PYTHONPATH # the source's own torch_ext/ must not hide the installed one

say() { printf '\n== %s\n' "$*"; }
fail() {
  printf '\nerror: %s\n' "$*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.10 or newer with venv is needed: apt-get install python3-venv, or set PYTHON to one"
}

# Sets venv and python, and has_torch to the version of its torch or to nothing. Changes nothing.
choose_environment() {
  local active
  venv=${TORCH_EXT_VENV:-}
  for active in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
    if [ -z "$venv" ] && [ -n "$active" ] && [ -n "$(torch_of "$active/bin/python")" ]; then venv=$active; fi
  done
  venv=${venv:-$root/.venv}
  python=$venv/bin/python
  has_torch=$(torch_of "$python")
  [ -x "$python" ] || find_python > /dev/null
}
torch_of() { "$1" -c 'import importlib.metadata as m; print(m.version("torch"))' 2> /dev/null || true; }

# What prepare_environment is about to do, in the list of steps that a script prints first.
describe_environment() {
  if [ -n "$has_torch" ]; then
    echo "  - use the Python environment $venv, which has torch $has_torch"
  else
    echo "  - make the Python environment $venv and install torch there (6 GB of disk, 5 minutes on a fast network)"
  fi
  [ -z "${install_nvcc:-}" ] || [ "${TORCH_EXT_CUDA:-}" = 0 ] ||
    echo "  - with a GPU and no CUDA toolkit that fits torch: install the CUDA compiler there (0.3 GB of disk)"
  echo "  - compile torch_ext and install it there (5 minutes on two cores the first time, then seconds)"
}

# With install_nvcc set, pip also installs CUDA's compiler where that gives a GPU its kernels.
install_cuda_compiler() {
  local packages
  packages=$("$python" "$root/cmake/toolchain.py" cuda-packages) || exit 1
  [ -n "$packages" ] || return 0
  say "installing the CUDA compiler"
  "$python" -m pip install "$packages" || say "pip could not install it: going on without CUDA kernels"
}

# prepare_environment EXTRA: torch, torch_ext and what the extra in pyproject.toml names.
prepare_environment() {
  local log=$root/build/install.log
  mkdir -p "$root/build"
  if [ ! -x "$python" ]; then
    say "making the environment $venv"
    "$(find_python)" -m venv "$venv" || fail "$venv could not be made, the reason is above"
  fi
  "$python" "$root/cmake/toolchain.py" compiler > /dev/null || exit 1 # before a long download
  if [ -z "$has_torch" ]; then
    say "installing torch"
    # shellcheck disable=SC2086  # several words, e.g. with an index
    "$python" -m pip install ${TORCH_EXT_TORCH:-torch} || fail "torch could not be installed, the reason is above"
  fi
  "$python" -m pip install -q "setuptools>=77" "cmake>=3.26" ninja || fail "pip could not install the build tools"
  [ -z "${install_nvcc:-}" ] || install_cuda_compiler
  "$python" "$root/cmake/toolchain.py" > /dev/null || exit 1
  say "compiling and installing torch_ext"
  rm -f "$log.failed"
  { "$python" -m pip install -v --no-build-isolation "${root}[$1]" 2>&1 || touch "$log.failed"; } | tee "$log" |
    grep --line-buffered -E '^ *(torch_ext: |\[[0-9]+/|Downloading )' || true
  if [ -e "$log.failed" ]; then
    tail -n 30 "$log"
    fail "torch_ext could not be installed, the reason is above, and all that was printed in $log"
  fi
}
