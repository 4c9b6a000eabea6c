"""Runs nvcc as it is told, and keeps each source's machine code and ptxas' report for kernel_budget.py --built.

    CMAKE_CUDA_COMPILER_LAUNCHER="python;benchmarks/keep_cubins.py;FOLDER" pip install --no-build-isolation .

FOLDER/NAME/ gets the cubins of NAME.cu, one per architecture, the report as `log`, and nvcc's own version as `version`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

REPORT = ("-Xptxas", "-v,-warn-spills")


def main(folder: str, *command: str) -> int:
    sources = [Path(word) for word in command if word.endswith(".cu")]
    if "-c" not in command or len(sources) != 1:
        return subprocess.run(command).returncode
    kept = Path(folder).resolve() / sources[0].stem
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    run = subprocess.run(
        [*command, *REPORT, "--keep", "--keep-dir", str(kept)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for file in kept.iterdir():
        if file.suffix != ".cubin":
            file.unlink()
    if run.returncode:
        print(run.stdout, end="")
        shutil.rmtree(kept)
        return run.returncode
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True)
    (kept / "version").write_text(version.stdout)
    (kept / "log").write_text(run.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
