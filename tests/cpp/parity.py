"""C++ modules against Python modules: the same weights give the same answers.

    python parity.py torch_ext_parity

Writes each module's weights in every form that torch_ext::nn::load_state_dict reads, an input and
the Python module's answers, and has the C++ program of parity.cpp compare. Ends with 77, which
ctest counts as skipped, where torch or torch_ext is not installed.
"""

import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

sys.path[:] = [
    p for p in sys.path if p
]  # not the source tree's torch_ext, unless PYTHONPATH says so

try:
    import torch

    import torch_ext
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

warnings.simplefilter("ignore")  # newer versions of torch call TorchScript deprecated

# The same names and options as in parity.cpp.
CASES = {
    "min_gru": lambda: torch_ext.MinGRU(5, 7),
    "min_gru_deep": lambda: torch_ext.MinGRU(
        5, 7, num_layers=3, bidirectional=True, activation="g", dropout=0.5
    ),
    "min_gru_no_bias": lambda: torch_ext.MinGRU(5, 7, bias=False),
    "min_lstm": lambda: torch_ext.MinLSTM(5, 7, num_layers=2),
    "min_lstm_raw": lambda: torch_ext.MinLSTM(
        5, 7, bidirectional=True, activation="g", normalize=False
    ),
    "mlstm": lambda: torch_ext.MLSTM(5, 8, num_layers=2, num_heads=2, qk_size=6),
    "mlstm_raw": lambda: torch_ext.MLSTM(
        5, 8, bidirectional=True, num_heads=4, input_gate="sigmoid", normalize=False
    ),
    "mlstm_options": lambda: torch_ext.MLSTM(
        5,
        6,
        bias=False,
        input_gate="sigmoid",
        eps=0.1,
    ),
    "mlstm_memory": lambda: torch_ext.MLSTM(
        5, 6, num_heads=2, gate_bias_init=(5, 100), input_gate_bias_init=-1
    ),
    "block": lambda: torch_ext.MinRNNBlock(8),
    "block_lstm": lambda: torch_ext.MinRNNBlock(
        8,
        layer="min_lstm",
        norm="rms_norm",
        conv_width=2,
        expansion=1.5,
        mlp_ratio=2,
        activation="g",
    ),
    "mamba": lambda: torch_ext.Mamba(20),
    "mamba_options": lambda: torch_ext.Mamba(
        20,
        d_state=5,
        d_conv=3,
        expand=1.5,
        dt_rank=4,
        dt_min=0.01,
        dt_max=0.2,
        dt_init="constant",
        dt_scale=0.5,
        dt_init_floor=0.05,
        conv_bias=False,
        bias=True,
    ),
    "mamba_both": lambda: torch_ext.Mamba(20, bidirectional=True),
    "mamba2": lambda: torch_ext.Mamba2(20, d_state=6, headdim=8),
    "mamba2_options": lambda: torch_ext.Mamba2(
        20,
        d_state=5,
        d_conv=3,
        conv_init=0.2,
        expand=1.6,
        headdim=4,
        d_ssm=24,
        ngroups=2,
        A_init_range=(2, 5),
        D_has_hdim=True,
        norm_before_gate=True,
        dt_min=0.01,
        dt_max=0.2,
        dt_init_floor=0.05,
        dt_limit=(0.1, 0.6),
        bias=True,
        conv_bias=False,
        norm_eps=1e-3,
    ),
    "mamba2_no_norm": lambda: torch_ext.Mamba2(20, d_state=3, headdim=5, rmsnorm=False),
    "mambalm": lambda: torch_ext.MambaLM(11, 20, 2),
    "mambalm_2": lambda: torch_ext.MambaLM(
        11, 20, 2, norm_eps=1e-3, ssm_cfg={"layer": "Mamba2", "d_state": 6, "headdim": 8}
    ),
    "mambalm_untied": lambda: torch_ext.MambaLM(
        11,
        20,
        3,
        d_state=5,
        bias=True,
        rms_norm=False,
        norm_eps=1e-3,
        residual_in_fp32=False,
        tie_embeddings=False,
        pad_vocab_size_multiple=4,
    ),
    "lm": lambda: torch_ext.MinRNNLM(11, 8, 2, layer="min_lstm"),
}


def layer_answers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    x, lengths = torch.randn(6, 3, 5), torch.tensor([6, 0, 4])
    y, state = module(x)
    padded_y, padded_state = module(x, state, lengths)
    answers = {"x": x, "lengths": lengths, "y": y, "state": state}
    answers |= {"padded_y": padded_y, "padded_state": padded_state}
    if not module.bidirectional:
        answers["step_y"], answers["step_state"] = module.step(x[0], state)
    return answers


def mlstm_answers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    x, lengths = torch.randn(6, 3, 5), torch.tensor([6, 0, 4])
    y, state = module(x)
    padded_y, padded_state = module(x, state, lengths)
    answers = {"x": x, "lengths": lengths, "y": y, "padded_y": padded_y}
    states = {"state": state, "padded_state": padded_state}
    if not module.bidirectional:
        answers["step_y"], states["step_state"] = module.step(x[0], state)
    for name, each in states.items():
        answers |= {f"{name}_{part}": t for part, t in zip("Cnm", each, strict=True)}
    return answers


def mamba_answers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    x, lengths = torch.randn(3, 9, 20), torch.tensor([9, 1, 6])
    right, left = module(x, lengths), module(x, lengths, "left")
    answers = {"x": x, "lengths": lengths, "y": module(x), "right": right, "left": left}
    if not getattr(module, "bidirectional", False):
        first = module.prefill(x)
        results = {"first": first, "left": module.prefill(x, None, lengths, "left")}
        results["more"] = module.prefill(x, first[1], lengths)
        results["step"] = module.step(x[:, 0], first[1])
        for name, (y, (conv, scan)) in results.items():
            answers |= {f"{name}_y": y, f"{name}_conv": conv, f"{name}_scan": scan}
    return answers


def mamba_lm_answers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids, lengths = torch.randint(11, (3, 6)), torch.tensor([6, 0, 4])
    more, state = module.prefill(ids, module.prefill(ids)[1], lengths)
    answers = {"x": ids, "lengths": lengths, "y": module(ids), "more": more}
    answers |= {"conv": state[1][0], "scan": state[1][1], "step": module.step(ids[:, 0], state)[0]}
    for padding in ("right", "left"):
        answers[padding] = module(ids, lengths, padding)
        answers[f"last_{padding}"] = module.prefill(ids, None, lengths, padding, True)[0]
        answers[f"generated_{padding}"] = module.generate(
            ids, 12, 0.0, lengths=lengths.clamp_min(1), padding=padding
        )
    return answers


def block_answers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    x = torch.randn(2, 6, 8)
    y, state = module(x)
    more, more_state = module(x, state)
    step_y, _ = module.step(x[:, 0], more_state)
    last_inputs, h = state
    return {"x": x, "y": y, "last_inputs": last_inputs, "state": h, "more": more, "step_y": step_y}


def lm_answers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(11, (2, 6))
    _, state = module.prefill(ids)
    step_y, _ = module.step(ids[:, 0], state)
    answers = {"x": ids, "y": module(ids), "last_inputs": state[0], "state": state[1]}
    return answers | {"step_y": step_y, "generated": module.generate(ids, 12, 0.0)}


def main(program: str) -> int:
    failed = []
    for name, make in CASES.items():
        torch.manual_seed(0)
        module = make().eval()
        initial = {f"initial.{k}": v.detach().clone() for k, v in module.named_parameters()}
        with torch.no_grad():
            for parameter in module.parameters():  # norms and biases too, that all of them count
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            kinds = {"lm": lm_answers, "block": block_answers, "mamba": mamba_answers}
            kinds |= {"mambalm": mamba_lm_answers, "mamba2": mamba_answers, "mlstm": mlstm_answers}
            answers = kinds.get(name.partition("_")[0], layer_answers)(module) | initial
        with tempfile.TemporaryDirectory() as folder:
            torch.save(module.state_dict(), Path(folder, "state_dict.pt"))
            torch.save(dict(module.named_parameters()), Path(folder, "parameters.pt"))
            torch.jit.script(module).save(str(Path(folder, "script.pt")))
            torch.save({k: v.contiguous() for k, v in answers.items()}, Path(folder, "answers.pt"))
            if subprocess.run([program, name, folder]).returncode:
                failed.append(name)
    if failed:
        print(f"differ from Python: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
