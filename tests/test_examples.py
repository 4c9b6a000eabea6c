"""The examples do what they say: at tiny size, in processes of their own, as a user runs them."""

import importlib.util
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

for needed in ("numpy", "pandas", "matplotlib", "vega_datasets"):
    pytest.importorskip(needed)

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = {"forecast.png", "forecast.ts", "forecast.json", "recent.csv", "forecast.csv"}


def run(script, *arguments, folder):
    """In a folder elsewhere, so that the source tree does not stand in for the package."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


def load(script):
    """The script as a module, to call main() where starting a process would take seconds."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def forecasting():
    return load("forecast_temperature.py")


@pytest.fixture(autouse=True)
def same_threads():
    """main() sets the number of threads; other tests shall not notice."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_csv(path, days=75, seed=0):
    """Days that resemble each other less and less, in degrees Fahrenheit, with holes."""
    hours = np.arange(24 * days)
    noise = np.random.default_rng(seed).normal(size=hours.size)
    weather = np.zeros(hours.size)
    for t in hours[1:]:
        weather[t] = 0.98 * weather[t - 1] + noise[t]
    values = 50 + 10 * np.sin(2 * np.pi * (hours - 9) / 24) + 2 * weather
    values[100:103] = np.nan
    times = pd.date_range("2024-02-01", periods=hours.size, freq="h")
    frame = pd.DataFrame({"when": times, "station": "x", "degrees": values.round(2)})
    frame.drop(index=[700, 701]).to_csv(path, index=False)
    return path


def assert_readable_picture(path):
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[0] >= 600 and picture.shape[1] >= 1000
    assert 30_000 < path.stat().st_size < 2_000_000
    dark = (picture[..., :3].min(-1) < 0.9).mean()
    assert 0.01 < dark < 0.5  # neither empty nor a blot


# --------------------------------------------------------------------------------------------------
# forecast_temperature.py
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cities")
    options = ["--epochs", 2, "--hidden", 32, "--layers", 1, "--no-compare", "--no-package"]
    done = run("forecast_temperature.py", *options, "--out", folder / "out", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out", done


def test_forecast_leaves_its_files(cities):
    out, done = cities
    assert {path.name for path in out.iterdir()} == FILES
    assert_readable_picture(out / "forecast.png")
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert "epoch 1 of 2" in done.stdout  # progress without a terminal

    report = json.loads((out / "forecast.json").read_text())
    assert report["series"] == ["Seattle", "San Francisco"]
    assert report["periods"]["held_out"] == ["2010-11-01 00:00:00", "2010-12-31 23:00:00"]
    for scores in report["errors"].values():
        assert len(scores["mae_by_horizon"]) == len(scores["rmse_by_horizon"]) == 24
        assert np.isclose(np.mean(scores["mae_by_horizon"]), scores["mae"], atol=1e-4)
    recent = pd.read_csv(out / "recent.csv")
    assert list(recent.columns) == ["date", *report["features"]] and len(recent) == 336
    assert recent["date"].iloc[-1] == "2010-12-31 23:00:00"
    assert len(pd.read_csv(out / "forecast.csv")) == 24


def test_forecast_beats_what_learns_nothing(cities):
    out, done = cities
    report = json.loads((out / "forecast.json").read_text())
    assert report["beats_same_hour_yesterday_and_persistence"] is True
    ours = report["errors"]["min_gru"]
    for name in ("same hour yesterday", "persistence"):
        theirs = report["errors"][name]
        assert ours["mae"] < theirs["mae"] and ours["rmse"] < theirs["rmse"]
        for series in report["series"]:
            assert ours["by_series"][series]["mae"] < theirs["by_series"][series]["mae"]
    assert "min_gru beats both same hour yesterday and persistence" in done.stdout


STREAM = """
import sys
from pathlib import Path

import numpy as np
import torch
import torch_ext

out = Path(sys.argv[1])
model = torch.jit.load(str(out / "forecast.ts"))
rows = np.loadtxt(out / "recent.csv", delimiter=",", skiprows=1, usecols=range(1, 6))
rows = torch.tensor(rows, dtype=torch.float32)
saved = np.loadtxt(out / "forecast.csv", delimiter=",", skiprows=1, usecols=1)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-4)


with torch.no_grad():
    last = rows[-168:].unsqueeze(0)
    forecast = model(last)
    assert forecast.shape == (1, 24)
    close(forecast[0].double(), torch.tensor(saved))

    # Hour by hour, a state of constant size.
    state = model.init_state(1)
    sizes = [s.shape for s in state]
    every_hour, _ = model.sequence(last, None)
    for t in range(168):
        forecast_t, state = model.step(last[:, t], state)
        close(forecast_t, every_hour[:, t])
        assert [s.shape for s in state] == sizes
    close(forecast_t, forecast)

    # In two parts; and a batch with a state that has seen more.
    _, middle = model.sequence(last[:, :100], None)
    close(model(last[:, 100:], middle), forecast)
    two = torch.stack([rows[:168], rows[-168:]])
    _, state = model.sequence(two, model.init_state(2))
    more, _ = model.step(rows[168].expand(2, -1), state)
    assert more.shape == (2, 24) and bool(torch.isfinite(more).all())
    close(more[:1], model(rows[None, :169]))

    # From the very first hour on, when there is no yesterday.
    first, _ = model.step(last[:, 0], model.init_state(1))
    assert bool(torch.isfinite(first).all())
print("streamed")
"""


def test_saved_model_streams_in_a_fresh_process(cities, tmp_path):
    command = [sys.executable, "-c", STREAM, str(cities[0])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "streamed" in done.stdout, done.stderr


def test_csv_with_comparison(tmp_path, forecasting, capsys):
    path = make_csv(tmp_path / "station.csv")
    options = ["--csv", path, "--date", "when", "--value", "degrees", "--unit", "F"]
    options += ["--holdout-days", 20, "--layer", "min_lstm", "--hidden", 16, "--epochs", 1]
    options += ["--no-package", "--out", tmp_path / "deep" / "out"]
    assert forecasting.main([*map(str, options)]) == 0
    printed = capsys.readouterr().out
    assert "degrees: missing hours filled by straight lines: 5" in printed
    report = json.loads((tmp_path / "deep" / "out" / "forecast.json").read_text())
    expected = ["min_lstm", "same hour yesterday", "persistence", "nn.LSTM", "linear regression"]
    assert list(report["errors"]) == expected
    assert 5 < report["normalisation"]["mean"] < 15  # of 50 degrees Fahrenheit
    assert report["settings"]["layer"] == "min_lstm"
    assert_readable_picture(tmp_path / "deep" / "out" / "forecast.png")


@pytest.mark.parametrize("layer", ["mamba", "mlstm"])
def test_csv_with_other_layers(layer, tmp_path, forecasting):
    path = make_csv(tmp_path / "station.csv")
    options = ["--csv", path, "--date", "when", "--value", "degrees", "--holdout-days", 20]
    options += ["--layer", layer, "--hidden", 16, "--layers", 1, "--epochs", 2, "--no-compare"]
    assert forecasting.main([*map(str, options), "--no-package", "--out", str(tmp_path)]) == 0
    errors = json.loads((tmp_path / "forecast.json").read_text())["errors"]
    assert list(errors) == [layer, "same hour yesterday", "persistence"]
    for name in ("same hour yesterday", "persistence"):
        assert errors[layer]["mae"] < errors[name]["mae"]
    assert_readable_picture(tmp_path / "forecast.png")


@pytest.mark.parametrize("layer", ["mlstm", "mamba2", "retention", "linear_attention"])
def test_forecast_divides_its_width_among_heads(layer, forecasting, capsys):
    with pytest.raises(SystemExit):
        forecasting.parse(["--layer", layer, "--hidden", "20"])
    assert "--hidden: 20 is not a multiple of 8" in capsys.readouterr().err
    assert forecasting.parse(["--layer", layer, "--hidden", "24"]).hidden == 24
    assert forecasting.parse(["--layer", "min_gru", "--hidden", "20"]).hidden == 20


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, they say
@pytest.mark.parametrize(
    "layer",
    ["nn.GRU", "nn.LSTM", "min_lstm", "mlstm", "mamba", "mamba2", "retention", "linear_attention"],
)
def test_every_layer_steps_as_it_runs(layer, forecasting):
    torch.manual_seed(0)
    model = forecasting.Forecaster(layer, 8, 2, 0.0, mean=10.0, std=5.0, scale=2.0).eval()
    torch.nn.init.normal_(model.head.weight)
    model = torch.jit.script(model)
    history = 10 + torch.randn(3, 30, 5)
    with torch.no_grad():
        expected, last = model.sequence(history)
        state = model.init_state(3)
        for t in range(30):
            forecast, state = model.step(history[:, t], state)
            torch.testing.assert_close(forecast, expected[:, t], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(model(history), expected[:, -1], rtol=1e-5, atol=1e-4)
        for a, b in zip(state, last, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_training_does_not_look_ahead(forecasting, tmp_path):
    """Other values after the training part: same statistics, same weights after an epoch."""
    path = make_csv(tmp_path / "a.csv")
    frame = forecasting.load_csv(path, "when", ["degrees"], "F")
    frame = forecasting.make_hourly(frame, "a")
    data = forecasting.Data(frame, 20, "a")
    other = frame.copy()
    other.iloc[data.end_train :] = 1e3
    settings = Namespace(lr=0.01, seed=0, epochs=1, tracks=2, patience=1)
    settings = Namespace(**vars(settings), hidden=8, layers=1, dropout=0.0)
    weights = []
    for each in (data, forecasting.Data(other, 20, "b")):
        model = forecasting.make_model("min_gru", each, settings)
        forecasting.train(model, each, settings, "test")
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    # And the forecasts that are judged are made of the held-out hours, no more and no less.
    _, truth, origins = data.windows(data.end_validation, data.hours)
    assert origins[0] == data.end_validation - 1 and origins[-1] == data.hours - 25
    assert float(truth[0, -1, -1]) == float(data.temperature[0, -1])


BAD_CSV = {
    "missing": (None, ["--csv", "nowhere.csv"], "there is no file nowhere.csv"),
    "date": ("a,temp\n1,2\n", [], "has no column 'date'; its columns are: a, temp"),
    "value": ("date,b\n2024-01-01,2\n", [], "has no column 'temp'; its columns are: date, b"),
    "dates": ("date,temp\nsoon,2\nlater,3\n", [], "column 'date' of .* does not hold dates"),
    "numbers": ("date,temp\n2024-01-01,warm\n", [], "column 'temp' of .* does not hold numbers"),
    "empty": ("", [], "cannot be read as CSV"),
    "no rows": ("date,temp\n", [], "has 0 days of hourly values and 119 are needed"),
    "short": ("hours", [], "has 2 days of hourly values and 119 are needed"),
    "daily": ("days", [], "has a row every 24 hours; hourly values are needed"),
    "constant": ("constant", [], "do not vary"),
}


@pytest.mark.parametrize("name", BAD_CSV)
def test_bad_csv_gets_a_sentence(name, tmp_path, forecasting, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, options, message = BAD_CSV[name]
    series = {"hours": ("h", 48, False), "days": ("D", 200, False), "constant": ("h", 3000, True)}
    if content in series:
        step, count, constant = series[content]
        times = pd.date_range("2024-01-01", periods=count, freq=step)
        values = np.full(count, 3.5) if constant else np.arange(count)
        pd.DataFrame({"date": times, "temp": values}).to_csv("given.csv", index=False)
    elif content is not None:
        Path("given.csv").write_text(content)
    if not options:
        options = ["--csv", "given.csv"]
    with pytest.raises(forecasting.UserError, match=message):
        forecasting.main([*options, "--out", "out"])


def test_user_mistakes_end_without_traceback(tmp_path):
    done = run("forecast_temperature.py", "--csv", "nowhere.csv", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "forecast_temperature: there is no file nowhere.csv\n"


@pytest.mark.slow
def test_forecast_package(tmp_path, forecasting, capsys):
    path = make_csv(tmp_path / "station.csv")
    options = ["--csv", path, "--date", "when", "--value", "degrees", "--holdout-days", 20]
    options += ["--hidden", 8, "--layers", 1, "--epochs", 1, "--no-compare", "--out", tmp_path]
    assert forecasting.main([*map(str, options)]) == 0
    printed = capsys.readouterr().out
    package = tmp_path / "forecast.pt2"
    if not package.exists():
        assert "there is no C++ compiler" in printed
        pytest.skip("there is no C++ compiler")
    loaded = torch._inductor.aoti_load_package(str(package))
    scripted = torch.jit.load(str(tmp_path / "forecast.ts"))
    for batch in (1, 2, 7):
        history = 10 + torch.randn(batch, 168, 5)
        with torch.no_grad():
            torch.testing.assert_close(loaded(history), scripted(history), rtol=1e-5, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# char_lm.py
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writing():
    return load("char_lm.py")


def test_char_lm_learns_and_writes(tmp_path):
    options = ["--steps", 60, "--dim", 48, "--layers", 1, "--length", 64, "--batch", 8]
    options += [
        "--threads",
        1,
        "--sample",
        80,
        "--prompt",
        "First",
        "--save",
        tmp_path / "model.ts",
    ]
    done = run("char_lm.py", *options, "--layer", "min_lstm", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    bits = dict(re.findall(r"^  (.+?)  +(\d\.\d{3})$", done.stdout, re.MULTILINE))
    uniform, learned = float(bits["equal probabilities"]), float(bits["min_lstm"])
    assert 2 < float(bits["2-gram model"]) < 4
    assert learned < 0.75 * uniform
    written = re.search(r"ms per character:\n\n(First.{80})\n", done.stdout, re.DOTALL)
    assert written, done.stdout
    assert (tmp_path / "model.ts").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, they say
def test_char_lm_learns_mamba_as_on_the_reference(tmp_path, writing, capsys, monkeypatch):
    """Per step just as fast: the curves differ by less than those of two seeds, and learn."""
    text, model, picture = (tmp_path / name for name in ("text.txt", "model.ts", "curves.png"))
    text.write_text(writing.TEXT.read_text()[:30_000])
    options = ["--layer", "mamba", "--steps", 60, "--dim", 32, "--layers", 1, "--length", 16]
    options += ["--batch", 4, "--threads", 1, "--sample", 20, "--lr", 0.02]
    options += ["--save", model, "--compare-reference", picture]
    drawn = {}
    draw = writing.draw
    monkeypatch.setattr(
        writing,
        "draw",
        lambda path, curves, title: (drawn.update(curves), draw(path, curves, title)),
    )
    assert writing.main([str(text), *map(str, options)]) == 0
    assert "mean of the last 6 steps" in capsys.readouterr().out
    ours, reference, other = map(np.array, drawn.values())
    assert len(ours) == 60 and ours[-10:].mean() < 0.7 * ours[0]
    assert not np.array_equal(ours, reference), "the references were not used"
    assert np.abs(ours - reference).mean() < 0.1 * np.abs(ours - other).mean()
    assert_readable_picture(picture)
    loaded = torch.jit.load(str(model))
    _, state = loaded.prefill(torch.tensor([[1, 2, 3]]))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.step(torch.tensor([4]), state)[0][0],
            loaded(torch.tensor([[1, 2, 3, 4]]))[0, -1],
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, they say
@pytest.mark.parametrize("layer", ["mlstm", "retention", "linear_attention", "mamba2", "xlstm"])
def test_char_lm_with_a_matrix_for_a_state(layer, tmp_path, writing, capsys):
    """It learns, with the operators as with their references; what it saves goes step by step."""
    text, model = tmp_path / "text.txt", tmp_path / "model.ts"
    text.write_text(writing.TEXT.read_text()[:10_000])
    options = ["--layer", layer, "--steps", 30, "--dim", 16, "--heads", 2, "--layers", 2]
    options += ["--length", 16, "--batch", 4, "--threads", 1, "--lr", 0.02, "--dropout", 0]
    options = [str(text), *map(str, options)]
    assert writing.main([*options, "--sample", "20", "--save", str(model)]) == 0
    printed = capsys.readouterr().out
    bits = dict(re.findall(r"^  (.+?)  +(\d\.\d{3})$", printed, re.MULTILINE))
    assert float(bits[layer]) < 0.85 * float(bits["equal probabilities"])
    written = re.search(r"ms per character:\n\n(.{21})\n", printed, re.DOTALL)
    assert written, printed

    loaded = torch.jit.load(str(model))
    ids = torch.arange(24).view(2, 12)
    _, state = loaded.prefill(ids[:, :9])
    with torch.no_grad():
        expected = loaded(ids)
        for t in range(9, 12):
            logits, state = loaded.step(ids[:, t], state)
            torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-5)

    args = writing.parse([*options, "--steps", "8"])
    ids = torch.randint(40, (2000,), generator=torch.Generator().manual_seed(0))
    ours = writing.train(writing.make_model(40, args, 0), ids, args, 0)
    with writing.on_references(layer):
        reference = writing.train(writing.make_model(40, args, 0), ids, args, 0)
    assert ours != reference, "the references were not used"
    np.testing.assert_allclose(ours, reference, atol=2e-3)


def test_char_lm_counts_bits(writing):
    """A text that two characters determine, and one that nothing does."""
    assert writing.ngram_bits("abcd" * 500, "abcd" * 50) < 0.05
    letters = np.random.default_rng(0).integers(0, 4, 20_000)
    text = "".join("abcd"[k] for k in letters)
    assert writing.ngram_bits(text[:-2000], text[-2000:]) == pytest.approx(2, abs=0.02)

    import torch_ext

    model = torch_ext.MinRNNLM(4, 8, 1)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    ids = torch.tensor(letters[:5000])
    assert writing.model_bits(model, ids) == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt"], "there is no file nowhere.txt"),
        (["short.txt"], "short.txt has 11 characters and at least 2,580 are needed"),
        (["binary.txt"], "binary.txt is not a text in UTF-8"),
        (["--prompt", "\u03c0"], "the prompt has characters that the text does not have"),
        (["--save", "nowhere/model.ts"], "--save: there is no folder"),
        (["--compare-reference", "nowhere/a.png"], "--compare-reference: there is no folder"),
    ],
)
def test_char_lm_mistakes_get_a_sentence(arguments, message, tmp_path, writing, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("hello world")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00" * 5000)
    with pytest.raises(writing.UserError, match=re.escape(message)):
        writing.main(arguments)


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_char_lm_has_no_dropout_in_mamba(layer, writing, capsys):
    with pytest.raises(SystemExit):
        writing.parse(["--layer", layer, "--dropout", "0.1"])
    assert "--dropout: Mamba has none" in capsys.readouterr().err
    assert writing.parse(["--layer", layer]).dropout == 0


def test_char_lm_divides_its_width_among_heads(writing, capsys):
    with pytest.raises(SystemExit):
        writing.parse(["--layer", "mlstm", "--dim", "20"])
    assert "--dim: 20 is not a multiple of 8, twice --heads" in capsys.readouterr().err
    assert writing.parse(["--layer", "mlstm", "--dim", "20", "--heads", "5"]).dim == 20
    assert writing.parse(["--layer", "min_gru", "--dim", "20"]).dim == 20


# --------------------------------------------------------------------------------------------------
# mamba_generate.py
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generating():
    return load("mamba_generate.py")


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """A checkpoint that has learned one sentence, of which some characters are several bytes."""
    import torch_ext

    torch.manual_seed(0)
    model = torch_ext.MambaLM(256, 32, 1, d_state=8)
    text = torch.tensor([list("Mamba is \u00e0 la carte. ".encode())])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(text[:, :-1])[0], text[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    folder = tmp_path_factory.mktemp("parrot")
    model.save_pretrained(folder)
    return folder


def test_mamba_continues_a_prompt(parrot, tmp_path):
    options = ["--temperature", 0, "--max-new-tokens", 17, "--prefill-chunk", 3]
    done = run("mamba_generate.py", parrot, "Mamba", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Mamba is \u00e0 la carte. \n"
    assert re.search(r"^5 tokens read in .* 17 written, .* ms each", done.stderr, re.MULTILINE)


def test_mamba_draws_by_its_options(parrot, generating, capsys):
    def written(*options):
        options = [*map(str, options)]
        assert generating.main([str(parrot), "Mamba", "--max-new-tokens", "17", *options]) == 0
        return capsys.readouterr().out

    greedy = written("--temperature", 0)
    assert written("--top-k", 1) == written("--top-p", 1e-4) == greedy
    assert written("--dtype", "bfloat16", "--temperature", 0) == greedy
    wild = [written("--temperature", 9, "--seed", seed) for seed in (1, 1, 2)]
    assert wild[0] == wild[1] != wild[2]
    # A byte from the middle of the sentence ends it.
    config = json.loads((parrot / "config.json").read_text())
    (parrot / "config.json").write_text(json.dumps(config | {"eos_token_id": [ord("l"), 999]}))
    try:
        assert written("--temperature", 0) == "Mamba is \u00e0 l\n"
    finally:
        (parrot / "config.json").write_text(json.dumps(config))


def test_mamba_with_a_tokenizer(generating, tmp_path, capsys):
    """Of words, and of bytes that are parts of characters."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    import torch_ext

    torch.manual_seed(0)
    model = torch_ext.MambaLM(300, 16, 1)
    model.save_pretrained(tmp_path / "model")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("H", "e"), ("l", "l")]
    vocabulary = {c: k for k, c in enumerate([*alphabet, "He", "ll", "<end>"])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    fast.save_pretrained(tmp_path / "model")

    # What it tells, piece by piece, is the whole text.
    text = "Hello \u00e0 la carte, \U0001f40d\U0001f40d Hello! " * 9
    tokenizer = generating.FromFiles(tmp_path / "model")
    decode = tokenizer.decoder()
    tokens = tokenizer.encode(text)
    assert len(tokens) < len(text.encode()) and "".join(map(decode, tokens)) == text
    assert tokenizer.eos_token_id == vocabulary["<end>"]
    options = ["Hello", "--max-new-tokens", "5", "--temperature", "0"]
    assert generating.main([str(tmp_path / "model"), *options]) == 0
    written = capsys.readouterr().out
    want = model.generate(torch.tensor([tokenizer.encode("Hello")]), 5, 0.0)
    assert written.startswith("Hello")
    assert written.rstrip("\n") == fast.decode(want[0]).rstrip("\n\ufffd")

    torch_ext.MambaLM(2000, 16, 1).save_pretrained(tmp_path / "bare")
    with pytest.raises(generating.UserError, match="2,000 tokens are not bytes: name the folder"):
        generating.main([str(tmp_path / "bare"), *options])
    assert generating.main([str(tmp_path / "bare"), *options, "--tokenizer", "bytes"]) == 0
    there = ["--tokenizer", str(tmp_path / "model")]
    assert generating.main([str(tmp_path / "bare"), *options, *there]) == 0
    with pytest.raises(generating.UserError, match="--tokenizer: nowhere has none of tokenizer"):
        generating.main([str(tmp_path / "bare"), *options, "--tokenizer", "nowhere"])
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(generating.UserError, match="the tokenizer in .*model cannot be read"):
        generating.main([str(tmp_path / "model"), *options])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "a"], "folder is 'nowhere', expected a local folder"),
        ([".", "a"], "there is no file config.json"),
        (["PARROT", ""], "the prompt has nothing in it"),
        (["PARROT", "a", "--temperature", "-1"], "temperature is -1.0, expected at least 0"),
        (["PARROT", "a", "--top-k", "0"], "top_k is 0"),
        (["PARROT", "a", "--top-p", "2"], "top_p is 2.0"),
        (["PARROT", "a", "--max-new-tokens", "-3"], "max_new_tokens is -3"),
        (["tiny", "a"], "the prompt has token 97, and the model has 50 tokens"),
        (["pieces", "a"], "pieces has a tokenizer, which the package transformers reads"),
    ],
)
def test_mamba_mistakes_get_a_sentence(
    arguments, message, parrot, tmp_path, generating, monkeypatch
):
    import torch_ext

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it was not there
    torch_ext.MambaLM(50, 16, 1).save_pretrained("tiny")
    torch_ext.MambaLM(50, 16, 1).save_pretrained("pieces")
    Path("pieces/tokenizer.json").write_text("{}")
    arguments = [str(parrot) if a == "PARROT" else a for a in arguments]
    with pytest.raises(generating.UserError, match=re.escape(message)):
        generating.main(arguments)


# --------------------------------------------------------------------------------------------------
# recall.py
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recalling():
    return load("recall.py")


def test_recall_is_what_mlstm_can_and_min_gru_cannot(tmp_path, recalling, capsys):
    out = tmp_path / "deep" / "out"
    assert recalling.main(["--quick", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^mlstm solves it: \S+ % right with 4 pairs\.$", printed, re.MULTILINE)
    assert re.search(r"^min_gru DOES NOT SOLVE it: ", printed, re.MULTILINE)
    assert {path.name for path in out.iterdir()} == {"recall.png", "recall.json"}
    assert_readable_picture(out / "recall.png")
    report = json.loads((out / "recall.json").read_text())
    mlstm, min_gru = report["results"]["mlstm"], report["results"]["min_gru"]
    assert abs(mlstm["parameters"] / min_gru["parameters"] - 1) < 0.01
    assert mlstm["state"] > 5 * min_gru["state"]
    assert mlstm["curve"]["160"] > report["solved_from"] and min_gru["curve"]["160"] < 0.5
    assert list(mlstm["by_pairs"]) == ["1", "2", "3", "4", "6", "8"]
    assert mlstm["by_pairs"]["4"] == mlstm["curve"]["160"]


def test_recall_asks_for_what_it_has_shown(recalling):
    args = recalling.parse(["--pairs", "5", "--keys", "7", "--values", "3"])
    generator = torch.Generator().manual_seed(0)
    keys, values, answers = recalling.draw_sequences(40, 5, args, generator)
    assert keys.shape == values.shape == (40, 10) and answers.shape == (40, 5)
    assert bool((values[:, 5:] == 3).all()) and int(values[:, :5].max()) == 2
    for row in range(40):
        shown = dict(zip(keys[row, :5].tolist(), values[row, :5].tolist(), strict=True))
        assert len(shown) == 5 and max(shown) < 7
        assert [shown[key] for key in keys[row, 5:].tolist()] == answers[row].tolist()
        assert sorted(shown) == sorted(keys[row, 5:].tolist())
    orders = {tuple(row.argsort().tolist()) for row in keys[:, 5:]}
    assert len(orders) > 20  # not that of the pairs

    # An answer that looks at nothing but the sequence is right always, one that guesses is not.
    class Oracle(torch.nn.Module):
        def forward(self, keys, values):
            same = (keys[:, :, None] == keys[:, None]) & (values[:, None] < args.values)
            shown = torch.nn.functional.one_hot(values, args.values + 1)[..., :-1]
            return same.float() @ shown.float()

    assert recalling.accuracy(Oracle(), 5, args) == 1
    untrained = recalling.Network("mlstm", 64, args)
    assert recalling.accuracy(untrained, 5, args) == pytest.approx(1 / 3, abs=0.15)


@pytest.mark.parametrize("name", ["min_gru", "min_lstm", "nn.LSTM", "nn.GRU", "mlstm"])
def test_recall_makes_networks_as_large(name, recalling):
    args = recalling.parse(["--dim", "24", "--hidden", "24", "--heads", "3", "--blocks", "2"])
    wanted = recalling.parameters(recalling.Network("mlstm", 24, args))
    hidden = recalling.as_large(name, wanted, args)
    if name == "mlstm":
        assert hidden == 24
        return
    apart = [
        abs(recalling.parameters(recalling.Network(name, width, args)) - wanted)
        for width in range(1, 3 * hidden)
    ]
    assert apart[hidden - 1] == min(apart)
    assert recalling.as_large(name, 1, args) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "65"], "--pairs: 65 pairs need as many keys, --keys is 64"),
        (["--pairs", "0"], "--pairs: 0 is not at least 1"),
        (["--values", "1"], "--values: with one value there is nothing to remember"),
        (["--lr", "0"], "--lr: 0.0 is not positive"),
        (["--hidden", "63"], "--hidden: 63 is not a multiple of --heads 2"),
        (["--layers", "mlstm", "mlstm"], "--layers: mlstm is named twice"),
        (["--quick", "--pairs", "17"], "--pairs: 17 pairs need as many keys, --keys is 16"),
    ],
)
def test_recall_refuses(arguments, message, recalling, capsys):
    with pytest.raises(SystemExit) as stop:
        recalling.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_recall_needs_a_folder(recalling, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(recalling.UserError, match="file cannot be made"):
        recalling.main(["--out", str(tmp_path / "file")])


# --------------------------------------------------------------------------------------------------
# parity.py
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parity():
    return load("parity.py")


def test_parity_is_what_recurrent_gates_can_and_parallel_ones_cannot(tmp_path, parity, capsys):
    out = tmp_path / "deep" / "out"
    assert parity.main(["--quick", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for name in ("slstm", "lstm"):
        assert re.search(rf"^{name} solves it: \S+ % right at length 80\.$", printed, re.MULTILINE)
    assert re.search(r"^min_lstm DOES NOT SOLVE it: ", printed, re.MULTILINE)
    assert {path.name for path in out.iterdir()} == {"parity.png", "parity.json"}
    assert_readable_picture(out / "parity.png")
    report = json.loads((out / "parity.json").read_text())
    assert list(report["results"]) == ["slstm", "lstm", "min_lstm"]
    for name, result in report["results"].items():
        assert list(result["by_length"])[-1] == "80" and result["parameters"] > 1000
        solved = result["by_length"]["80"] >= report["solved_from"]
        assert solved == (name != "min_lstm")
    assert abs(report["results"]["min_lstm"]["by_length"]["80"] - 0.5) < 0.1


def test_parity_asks_for_parity(parity):
    args = parity.parse(["--length", "9", "--times", "3"])
    assert parity.lengths(args) == [1, 2, 4, 6, 9, 11, 13, 15, 18, 20, 22, 24, 27]
    bits, answers = parity.draw_bits(40, 9, torch.Generator().manual_seed(0))
    for row in range(40):
        ones = 0
        for bit, answer in zip(bits[row].tolist(), answers[row].tolist(), strict=True):
            ones += bit
            assert answer == ones % 2

    class Oracle(torch.nn.Module):
        def forward(self, bits):
            return torch.nn.functional.one_hot(bits.cumsum(1) % 2, 2).float()

    assert parity.accuracy(Oracle(), 27, args) == 1
    torch.manual_seed(0)
    assert parity.accuracy(parity.Network("lstm", args), 27, args) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(
    "name", ["slstm", "lstm", "gru", "rnn", "nn.LSTM", "mlstm", "min_lstm", "min_gru", "mamba"]
)
def test_parity_has_these_layers(name, parity):
    args = parity.parse(["--dim", "8", "--hidden", "12", "--blocks", "2"])
    network = parity.Network(name, args)
    logits = network(torch.randint(2, (3, 5)))
    assert logits.shape == (3, 5, 2)
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "0"], "--length: 0 is not at least 1"),
        (["--times", "1"], "--times: 1 time is no longer than what is trained on"),
        (["--lr", "-1"], "--lr: -1.0 is not positive"),
        (["--hidden", "7"], "--hidden: 7 is odd, mlstm has 2 heads"),
        (["--layers", "lstm", "lstm"], "--layers: lstm is named twice"),
    ],
)
def test_parity_refuses(arguments, message, parity, capsys):
    with pytest.raises(SystemExit) as stop:
        parity.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_parity_needs_a_folder(parity, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(parity.UserError, match="file cannot be made"):
        parity.main(["--out", str(tmp_path / "file")])


SCRIPTS = {
    "forecast_temperature.py": ["--layer", "abacus"],
    "char_lm.py": ["--layer", "abacus"],
    "mamba_generate.py": ["folder", "prompt", "--dtype", "abacus"],
    "recall.py": ["--layers", "abacus"],
    "parity.py": ["--layers", "abacus"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_options(script, capsys):
    module = load(script)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert SCRIPTS[script][-2] in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        module.main(SCRIPTS[script])
    assert stop.value.code == 2
    assert "abacus" in capsys.readouterr().err
