"""csrc/README.md's five steps, followed to the letter in a copy of the tree with a toy recurrence."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(?:\w+ file=(\S+)|(diff))\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(*command, cwd, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    p = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert p.returncode == 0, f"{command}\n{p.stdout[-4000:]}{p.stderr[-4000:]}"
    return p.stdout


@pytest.mark.slow
def test_five_steps(tmp_path):
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("needs the source tree")
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(
        ".git", "build", ".venv", "__pycache__", "*.so", "_build_info.py"
    )
    shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
    run("git", "init", "-q", cwd=tree)
    blocks = BLOCK.findall((ROOT / "csrc" / "README.md").read_text())
    assert len(blocks) == 8
    for number, (file, _, text) in enumerate(blocks):
        if file:
            (tree / file).write_text(text)
        else:
            patch = tmp_path / f"{number}.diff"
            patch.write_text(text)
            run("git", "apply", "--recount", "-C1", patch, cwd=tree)

    # The CPU alone, and no C++ modules or bindings, which do not take part: it is the operator that is built.
    build = tmp_path / "build"
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    lists = tree / "CMakeLists.txt"
    lists.write_text(
        re.sub(
            r"  csrc/(nn/\w+|ops/(min|causal|selective|mamba|matrix)_\w+|"
            r"ops/(mlstm|linear_attention|retention|ssd))\.cpp\n",
            "",
            lists.read_text(),
        )
    )
    run(
        cmake, "-S", tree, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", cwd=tree,
    )  # fmt: skip
    run(cmake, "--build", build, "--target", "torch_ext", cwd=tree)
    code = f"""
import importlib.util, sys, torch
torch.ops.load_library(r"{build / "libtorch_ext.so"}")
sys.path.insert(0, r"{tree}")
package = type(sys)("torch_ext"); package.__path__ = [r"{tree / "torch_ext"}"]
sys.modules["torch_ext"] = package
from torch_ext.decay_sum import *
from torch_ext.decay_sum import decay_sum_reference
g = torch.Generator().manual_seed(0)
shapes = (2, 70, 37), (2, 70, 37), (2, 37)
x = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
torch.testing.assert_close(decay_sum(*x), decay_sum_reference(*x))
loss = lambda f: (f(*x)[0].square().sum() + f(*x)[1].sum())
torch.testing.assert_close(torch.autograd.grad(loss(decay_sum), x), torch.autograd.grad(loss(decay_sum_reference), x))
small = [y[..., :3, :2].detach().requires_grad_() for y in x[:2]] + [x[2][..., :2].detach().requires_grad_()]
assert torch.autograd.gradgradcheck(decay_sum, small)
assert torch.autograd.gradcheck(decay_sum, small, check_forward_ad=True)
got, want = decay_sum(*[y.float() for y in x])[0], decay_sum_reference(*x)[0].float()
torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
print("works")
"""
    assert "works" in run(sys.executable, "-c", code, cwd=tmp_path)
    # The fifth step is an entry in the list that all suites run over.
    assert '"decay_sum"' in (tree / "tests" / "cases.py").read_text()
