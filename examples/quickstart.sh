#!/usr/bin/env bash
# Trains MinGRU on real hourly temperatures, from nothing but Python (3.10 or newer, with venv) and a C++20 compiler.
#
#   bash examples/quickstart.sh [options of forecast_temperature.py, e.g. --epochs 1 --out FOLDER]
#
# Variables that choose the environment: see cmake/environment.sh. Nothing outside of it and of the repository changes.
# With a GPU and without a CUDA toolkit, pip brings the CUDA compiler; TORCH_EXT_CUDA=0 leaves the CUDA kernels out,
# TORCH_EXT_CUDA=1 builds them on a machine without a GPU, too.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/../cmake/environment.sh"

out=$root/examples/out
previous=
for word in "$@"; do
  case $word in --out=*) out=${word#--out=} ;; esac
  [ "$previous" != --out ] || out=$word
  previous=$word
done

install_nvcc=yes # see cmake/environment.sh
choose_environment
echo "This will"
describe_environment
echo "  - train a recurrent network on two cities' hourly temperatures and draw its forecast (3 minutes on two cores)"

prepare_environment examples
say "training, and forecasting the last two months"
"$python" "$root/examples/forecast_temperature.py" --out "$out" "$@" || fail "the example stopped, the reason is above"

[ -e "$out/forecast.png" ] || fail "the example ended without $out/forecast.png"
say "done. The forecast is drawn in $out/forecast.png"
echo "To go on in the same environment: source $venv/bin/activate"
