#!/usr/bin/env bash
# Installs torch_ext and runs every test: pytest, then the C++ tests.
#
#   bash tests/run.sh [options of pytest, e.g. -x -k min_gru, or file names in tests/]
#
#   MAX_JOBS=n             processes at a time (default: one per core, of pytest at most 4); -n 0 among pytest's
#                          options runs all its tests in one, as debuggers want it
#   TORCH_EXT_SKIP_CPP=1   without the C++ tests, which need GoogleTest (apt-get install libgtest-dev)
#
# Variables that choose the environment: see cmake/environment.sh.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/../cmake/environment.sh"

cpp=yes
[ "${TORCH_EXT_SKIP_CPP:-0}" = 0 ] || cpp=
choose_environment
echo "This will"
describe_environment
echo "  - run the Python tests (10 minutes on two cores)${cpp:+, then build and run the C++ tests (3 minutes)}"

if [ "$cpp" ] && ! echo '#include <gtest/gtest.h>' | ${CXX:-c++} -E -x c++ ${CONDA_PREFIX:+-I"$CONDA_PREFIX/include"} - > /dev/null 2>&1; then
  fail "the C++ tests need GoogleTest: apt-get install libgtest-dev (or TORCH_EXT_SKIP_CPP=1 to leave them out)"
fi

prepare_environment test
failed=
say "Python tests"
cd "$root/tests" # not the root, whose torch_ext/ would hide the installed package
"$python" -m pytest -n "${MAX_JOBS:-auto}" --maxprocesses 4 --dist loadgroup "$@" || failed="Python tests"

if [ "$cpp" ]; then
  say "C++ tests"
  cd "$root"
  "$python" setup.py -q cpp_tests || failed="${failed:+$failed and }C++ tests"
fi
[ -z "$failed" ] || fail "the $failed failed, the reason is above"
say "all tests passed"
