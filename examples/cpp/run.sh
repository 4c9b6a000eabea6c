#!/usr/bin/env bash
# Builds the five C++ programs against an installed torch_ext and runs them.
#
#   bash examples/cpp/run.sh [FOLDER]
#
#   FOLDER   with what examples/forecast_temperature.py --out FOLDER has made (forecast.ts, forecast.pt2,
#            recent.csv, forecast.csv). Without it a small model is trained first, which takes a minute or two.
#
# Variables that choose the environment: see cmake/environment.sh. torch_ext is installed there if it is not yet.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/../../cmake/environment.sh"

models=${1:-}
case $models in -*) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | head -n -1; exit 0 ;; esac
build=$root/build/examples-cpp
if [ -n "$models" ]; then
  for file in forecast.ts forecast.pt2 recent.csv forecast.csv; do
    [ -e "$models/$file" ] || fail "$models has no $file: make it with examples/forecast_temperature.py --out $models"
  done
fi

choose_environment
has() { (cd / && "$python" -c "import $1") 2> /dev/null; }
needed="torch_ext"
[ -n "$models" ] || needed="torch_ext, pandas, matplotlib, vega_datasets"
installed=yes
has "$needed" || installed=
echo "This will"
if [ "$installed" ]; then
  echo "  - use torch_ext of the Python environment $venv, with torch $has_torch"
else
  describe_environment
fi
[ -n "$models" ] || echo "  - train a small forecast model (a minute or two)"
echo "  - train a small Mamba and a small xLSTM on Shakespeare (a minute)"
echo "  - compile five C++ programs against torch and torch_ext (four minutes on two cores) and run them (a minute)"
[ "$installed" ] || prepare_environment examples

if [ -z "$models" ]; then
  models=$build/models
  say "training a small forecast model"
  "$python" "$root/examples/forecast_temperature.py" --epochs 1 --hidden 32 --no-compare --out "$models" ||
    fail "the forecast model could not be made, the reason is above"
  [ -e "$models/forecast.pt2" ] || fail "forecast_temperature.py made no AOTInductor package, the reason is above"
fi

mkdir -p "$build/models"
for layer in mamba xlstm; do
  say "training a small language model, $layer"
  "$python" "$root/examples/char_lm.py" --layer "$layer" --steps 250 --sample 0 --save "$build/models/$layer.ts" ||
    fail "the language model could not be made, the reason is above"
done

say "compiling the programs"
cmake=$venv/bin/cmake
[ -x "$cmake" ] || cmake=$(command -v cmake) || fail "cmake is missing: $python -m pip install cmake"
prefix=$(cd / && "$python" -c 'import torch_ext; print(torch_ext.cmake_prefix_path)')
# A folder for each torch: CMake remembers where it found one.
programs=$build/torch-$has_torch
"$cmake" -S "$root/examples/cpp" -B "$programs" -DCMAKE_PREFIX_PATH="$prefix" > "$build.log" 2>&1 &&
  "$cmake" --build "$programs" >> "$build.log" 2>&1 || {
  tail -n 30 "$build.log"
  fail "the programs could not be compiled, the reason is above, and all that was printed in $build.log"
}

say "stream_forecast: a TorchScript model, step by step"
"$programs/stream_forecast" "$models/forecast.ts" "$models/recent.csv" || fail "stream_forecast failed"
say "stream_mamba: a language model in TorchScript, token by token"
"$programs/stream_mamba" "$build/models/mamba.ts" 20000 "First Citizen:" || fail "stream_mamba failed"
say "generate_xlstm: several prompts at once, continued by an xLSTM language model in TorchScript"
"$programs/generate_xlstm" "$build/models/xlstm.ts" 100 || fail "generate_xlstm failed"
say "run_package: an AOTInductor package"
"$programs/run_package" "$models/forecast.pt2" "$models/recent.csv" "$models/forecast.csv" || fail "run_package failed"
say "train_min_gru: training with the C++ modules"
"$programs/train_min_gru" 600 "$build/weights.pt" || fail "train_min_gru failed"
say "done"
