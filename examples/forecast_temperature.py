#!/usr/bin/env python3
"""Forecasts the next 24 hours of temperature from the last 168, with a layer of torch_ext.

    python forecast_temperature.py                           Seattle and San Francisco
    python forecast_temperature.py --csv my.csv --date time --value temp
    python forecast_temperature.py --layer mlstm
    python forecast_temperature.py --layer nn.LSTM --hidden 64
    python forecast_temperature.py --epochs 1 --no-compare   a quick look

What it does, in order:

1. reads hourly series and splits them by time: training, then a month of validation, then the last
   two months, which nothing looks at before the end;
2. trains by truncated backpropagation through time: each series is cut into a few long tracks, the
   model walks along all of them at once, a week at a time, and hands its state, detached, from
   week to week;
3. takes the weights of the best validation error, and reports the error on the held-out months for
   every horizon from 1 to 24 hours, beside two forecasts that learn nothing (the same hour of
   yesterday, and the last temperature), beside nn.LSTM of the same size and a linear regression;
4. leaves in the output folder
     forecast.png    forecasts against what came, and the error by horizon
     forecast.ts     TorchScript: forward(history, state) -> (B, 24), sequence(history, state),
                     init_state(B), step(x_t, state)
     forecast.pt2    AOTInductor package of forward(history), any batch (needs a C++ compiler)
     forecast.json   settings, normalisation, errors
     recent.csv      the last two weeks of the first series, as the features that the model reads
     forecast.csv    the forecast that follows them

The model reads raw features and answers in degrees Celsius: normalisation is part of it, so a C++
program needs nothing but the file. Its state has constant size however long it runs.

About the two cities: from one day to the next their values change by less than 0.1 degrees Celsius,
as only means of many years do. They are a typical year, not the weather of one: expect errors of
some hundredths of a degree there, and of 2 to 3 degrees on a station's own record.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HISTORY = 168  # hours that a forecast may look back on when no state is given
HORIZON = 24  # hours forecast
FEATURES = ("temperature", "hour_sin", "hour_cos", "year_sin", "year_cos")
INPUTS = 7  # of the network: the features and two differences of temperatures
DIRECT = 5  # of these go straight to the output too: those of the year would be taken for a trend


class UserError(Exception):
    """Something the user can mend; printed as one sentence."""


try:
    import numpy as np
    import pandas as pd
    import torch
    from torch import Tensor, nn

    import torch_ext
except ImportError as error:
    sys.exit(
        f"forecast_temperature: {error}. It needs torch, torch_ext, numpy and pandas: "
        "pip install numpy pandas, and see the README for torch_ext."
    )


# --------------------------------------------------------------------------------------------------
# The layers one can choose from
# --------------------------------------------------------------------------------------------------


class OneState(nn.Module):
    """A layer whose state is one tensor and that has its own `step`: those of torch_ext."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.layer(x, state)

    def init_state(self, batch_size: int) -> Tensor:
        return self.layer.init_state(batch_size)

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.step(x_t, state)


class TorchGRU(nn.Module):
    """nn.GRU in the same clothes; a step is a sequence of length one."""

    def __init__(self, layer: nn.GRU):
        super().__init__()
        self.layer = layer
        self.state_shape = (layer.num_layers, layer.hidden_size)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.layer(x, state)

    def init_state(self, batch_size: int) -> Tensor:
        weight = self.layer.weight_ih_l0
        return weight.new_zeros(self.state_shape[0], batch_size, self.state_shape[1])

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.layer(x_t.unsqueeze(1), state)
        return y[:, 0], state


class TorchLSTM(nn.Module):
    """nn.LSTM in the same clothes; its two states travel stacked, h before c."""

    def __init__(self, layer: nn.LSTM):
        super().__init__()
        self.layer = layer
        self.num_layers = layer.num_layers
        self.state_shape = (2 * layer.num_layers, layer.hidden_size)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if state is None:
            state = self.init_state(x.size(0))
        y, (h, c) = self.layer(x, (state[: self.num_layers], state[self.num_layers :]))
        return y, torch.cat([h, c])

    def init_state(self, batch_size: int) -> Tensor:
        weight = self.layer.weight_ih_l0
        return weight.new_zeros(self.state_shape[0], batch_size, self.state_shape[1])

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.forward(x_t.unsqueeze(1), state)
        return y[:, 0], state


class MatrixState(nn.Module):
    """torch_ext.MLSTM; its three states travel as one, (layers, B, numbers)."""

    def __init__(self, layer: torch_ext.MLSTM):
        super().__init__()
        self.layer = layer
        self.shapes = [list(part.shape[2:]) for part in layer.init_state(1)]
        self.sizes = [math.prod(shape) for shape in self.shapes]

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if state is None:
            state = self.init_state(x.size(0))
        y, after = self.layer(x, self._apart(state))
        return y, self._together(after)

    def init_state(self, batch_size: int) -> Tensor:
        return self._together(self.layer.init_state(batch_size))

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = self.layer.step(x_t, self._apart(state))
        return y, self._together(after)

    def _together(self, state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return torch.cat([part.flatten(2) for part in state], 2)

    def _apart(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        C, n, m = state.split(self.sizes, 2)
        C, n = C.unflatten(2, self.shapes[0]), n.unflatten(2, self.shapes[1])
        return C, n, m.unflatten(2, self.shapes[2])


class Block(nn.Module):
    """A layer with two states, a norm before and a residual around it.

    Its states travel as one, (B, numbers).
    """

    def __init__(self, layer: nn.Module, size: int, dropout: float):
        super().__init__()
        self.norm = nn.RMSNorm(size)
        self.layer = layer
        self.dropout = nn.Dropout(dropout)
        state = layer.init_state(1)
        parts = [state] if isinstance(state, Tensor) else state
        self.shapes = [list(part.shape[1:]) for part in parts]
        self.sizes = [math.prod(shape) for shape in self.shapes]

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = self.layer.prefill(self.norm(x), self._apart(state))
        return x + self.dropout(y), self._together(after)

    @torch.jit.export
    def init_state(self, batch_size: int) -> Tensor:
        return self._together(self.layer.init_state(batch_size))

    @torch.jit.export
    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = self.layer.step(self.norm(x_t), self._apart(state))
        return x_t + self.dropout(y), self._together(after)

    def _together(self, state: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([part.flatten(1) for part in state], 1)

    def _apart(self, state: Tensor) -> tuple[Tensor, Tensor]:
        first, second = state.split(self.sizes, 1)
        return first.unflatten(1, self.shapes[0]), second.unflatten(1, self.shapes[1])


class RetentionBlock(Block):
    """The same around torch_ext.Retention, which has one state."""

    def _together(self, state: Tensor) -> Tensor:
        return state.flatten(1)

    def _apart(self, state: Tensor) -> Tensor:
        return state.unflatten(1, self.shapes[0])


class Stack(nn.Module):
    """Blocks, the states of which travel stacked."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if state is None:
            state = self.init_state(x.size(0))
        states: list[Tensor] = []
        for k, block in enumerate(self.blocks):
            x, after = block(x, state[k])
            states.append(after)
        return x, torch.stack(states)

    @torch.jit.export
    def init_state(self, batch_size: int) -> Tensor:
        return torch.stack([block.init_state(batch_size) for block in self.blocks])

    @torch.jit.export
    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []
        for k, block in enumerate(self.blocks):
            x_t, after = block.step(x_t, state[k])
            states.append(after)
        return x_t, torch.stack(states)


HEADS = 4  # of layers whose state is a matrix per head


def mlstm(size: int, hidden: int, num_layers: int, **options: Any) -> nn.Module:
    return torch_ext.MLSTM(size, hidden, num_layers, num_heads=HEADS, **options)


def stack(
    block: Callable[..., nn.Module], layer: Callable[[int], nn.Module]
) -> Callable[..., nn.Module]:
    """Blocks around a layer with the constructor of nn.GRU, as far as Forecaster needs it."""

    def make(
        size: int, hidden: int, num_layers: int, *, batch_first: bool, dropout: float
    ) -> nn.Module:
        assert size == hidden and batch_first
        return Stack([block(layer(size), size, dropout) for _ in range(num_layers)])

    return make


def mamba2(size: int) -> nn.Module:
    return torch_ext.Mamba2(size, d_state=16, headdim=2 * size // HEADS)


def retention(size: int) -> nn.Module:
    return torch_ext.Retention(size, HEADS)


def linear_attention(size: int) -> nn.Module:
    return torch_ext.LinearAttention(size, HEADS)


# A new layer of torch_ext with one state tensor is one more line here.
LAYERS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "min_gru": (torch_ext.MinGRU, OneState),
    "min_lstm": (torch_ext.MinLSTM, OneState),
    "mlstm": (mlstm, MatrixState),
    "mamba": (stack(Block, torch_ext.Mamba), OneState),
    "mamba2": (stack(Block, mamba2), OneState),
    "retention": (stack(RetentionBlock, retention), OneState),
    "linear_attention": (stack(Block, linear_attention), OneState),
    "nn.GRU": (nn.GRU, TorchGRU),
    "nn.LSTM": (nn.LSTM, TorchLSTM),
}
MATRICES = ("mlstm", "mamba2", "retention", "linear_attention")  # whose width the heads share


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


class Forecaster(nn.Module):
    """The next 24 temperatures, at every hour, as a correction to those of the last 24 hours.

    It reads FEATURES: the temperature in degrees Celsius, sine and cosine of the hour of the day
    and of the day of the year. Its state is a pair: the last 24 temperatures (B, 24), oldest first,
    NaN where unknown, and the state of the recurrent layer. What is older than a day the layer must
    remember, for instance how much warmer each of these hours was than on the day before.
    """

    def __init__(
        self,
        layer: str,
        hidden: int,
        layers: int,
        dropout: float,
        mean: float,
        std: float,
        scale: float,
    ):
        super().__init__()
        make, adapt = LAYERS[layer]
        self.horizon, self.direct = HORIZON, DIRECT  # TorchScript reads no globals
        self.encoder = nn.Linear(INPUTS, hidden)
        self.rnn = adapt(
            make(hidden, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, HORIZON)
        self.skip = nn.Linear(DIRECT + HORIZON, HORIZON)
        for last in (self.head, self.skip):  # start as the seasonal-naive forecast, then improve
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.register_buffer("scale", torch.tensor(scale))

    def _inputs(self, features: Tensor, past: Tensor) -> Tensor:
        """What the layer reads. past (B, 24 + T) is a day, then the temperatures of features."""
        temperature = features[..., 0]
        steps = features.size(1)
        since_yesterday = torch.nan_to_num(temperature - past[:, :steps], nan=0.0)
        since_last_hour = torch.nan_to_num(temperature - past[:, 23 : 23 + steps], nan=0.0)
        return torch.stack(
            [
                (temperature - self.mean) / self.std,
                since_yesterday / self.scale,
                since_last_hour / self.scale,
                features[..., 1],
                features[..., 2],
                features[..., 3],
                features[..., 4],
            ],
            dim=-1,
        )

    def _forecast(self, encoded: Tensor, inputs: Tensor, last_day: Tensor) -> Tensor:
        """last_day (..., 24): the temperatures that end with the hour of the forecast."""
        now = last_day[..., -1:]
        last_day = torch.where(torch.isnan(last_day), now, last_day)
        direct = torch.cat([inputs[..., : self.direct], (last_day - now) / self.std], dim=-1)
        correction = self.head(self.dropout(encoded)) + self.skip(direct)
        return last_day + self.scale * correction

    def _run(
        self, history: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if state is None:
            recent = torch.full_like(history[:, :1, 0], float("nan")).expand(-1, self.horizon)
            hidden = None
        else:
            recent, hidden = state
        past = torch.cat([recent, history[..., 0]], dim=1)
        inputs = self._inputs(history, past)
        encoded, hidden = self.rnn(nn.functional.silu(self.encoder(inputs)), hidden)
        return encoded, inputs, past, hidden

    def forward(self, history: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """history (B, T, 5), T = 168 in training -> (B, 24): the hours that follow it."""
        encoded, inputs, past, _ = self._run(history, state)
        return self._forecast(encoded[:, -1], inputs[:, -1], past[:, -self.horizon :])

    @torch.jit.export
    def sequence(
        self, history: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The forecast at every hour of history, (B, T, 24), and the state to go on from."""
        encoded, inputs, past, hidden = self._run(history, state)
        forecast = self._forecast(encoded, inputs, past.unfold(1, self.horizon, 1)[:, 1:])
        return forecast, (past[:, -self.horizon :], hidden)

    @torch.jit.export
    def init_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        recent = self.mean.new_full((batch_size, self.horizon), float("nan"))
        return recent, self.rnn.init_state(batch_size)

    @torch.jit.export
    def step(
        self, x_t: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One hour, x_t (B, 5) -> the 24 hours that follow it, (B, 24), and the next state."""
        recent, hidden = state
        past = torch.cat([recent, x_t[:, :1]], dim=1)
        inputs = self._inputs(x_t.unsqueeze(1), past)[:, 0]
        encoded, hidden = self.rnn.step(nn.functional.silu(self.encoder(inputs)), hidden)
        recent = past[:, 1:]
        return self._forecast(encoded, inputs, recent), (recent, hidden)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def load_cities() -> pd.DataFrame:
    """Hourly temperatures of two cities, degrees Celsius, from the vega_datasets package."""
    try:
        from vega_datasets import local_data
    except ImportError:
        raise UserError(
            "the two cities come from the package vega_datasets, which is not installed: "
            "pip install vega_datasets, or name a file of your own with --csv"
        ) from None
    cities = {"Seattle": local_data.seattle_temps(), "San Francisco": local_data.sf_temps()}
    frame = pd.DataFrame({name: data.set_index("date")["temp"] for name, data in cities.items()})
    return (frame - 32) / 1.8


def load_csv(path: Path, date: str, values: list[str], unit: str) -> pd.DataFrame:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        table = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as CSV: {str(error).strip()}") from None
    for column in [date, *values]:
        if column not in table.columns:
            listed = ", ".join(map(str, table.columns))
            raise UserError(f"{path} has no column {column!r}; its columns are: {listed}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the dates have no format of the usual ones
            index = pd.DatetimeIndex(pd.to_datetime(table[date]))
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"column {date!r} of {path} does not hold dates: {reason}") from None
    if index.tz is not None:
        index = index.tz_localize(None)
    frame = pd.DataFrame(index=index[index.notna()])
    for column in values:
        try:
            numbers = pd.to_numeric(table[column])
        except (ValueError, TypeError) as error:
            raise UserError(f"column {column!r} of {path} does not hold numbers: {error}") from None
        frame[str(column)] = numbers.to_numpy()[index.notna()]
    return (frame - 32) / 1.8 if unit == "F" else frame


def make_hourly(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """One row per hour: means where there are several, straight lines over gaps of up to 6 hours.

    Straight lines over longer gaps would be learned as weather, so of a series that has them the
    longest stretch without is used.
    """
    frame = frame.sort_index()
    spacing = frame.index.unique().to_series().diff().median()
    if spacing > pd.Timedelta(hours=1.5):
        raise UserError(
            f"{source} has a row every {spacing / pd.Timedelta(hours=1):g} hours; hourly values "
            "are needed"
        )
    frame = frame.resample("h").mean()
    for name in frame.columns:
        missing = frame[name].isna()
        length = missing.groupby((missing != missing.shift()).cumsum()).transform("sum")
        frame[name] = frame[name].interpolate(limit_area="inside").mask(missing & (length > 6))
        if (short := int((missing & (length <= 6)).sum())) > 0:
            print(f"{name}: missing hours filled by straight lines: {short}.")
    good = frame.notna().all(axis=1).to_numpy()
    if not good.all():
        edges = np.flatnonzero(np.diff(np.concatenate([[0], good.astype(int), [0]])))
        starts, stops = edges[::2], edges[1::2]
        if len(starts) == 0:
            return frame.iloc[:0]
        longest = int(np.argmax(stops - starts))
        print(f"{source} has longer gaps; only its longest stretch without one is used.")
        frame = frame.iloc[starts[longest] : stops[longest]]
    return frame


class Data:
    """Series (S, N, 5) with the borders of training, validation and the held-out months."""

    def __init__(self, frame: pd.DataFrame, holdout_days: int, source: str):
        hours = len(frame)
        self.holdout = holdout_days * 24
        self.validation = min(30 * 24, self.holdout)
        needed = self.holdout + self.validation + 28 * 24
        if hours < needed:
            raise UserError(
                f"{source} has {hours / 24:.0f} days of hourly values and {needed // 24} are "
                f"needed: {holdout_days} held out, {self.validation // 24} for validation and 28 "
                "to learn from; --holdout-days changes the first"
            )
        self.frame = frame
        self.names = [str(name) for name in frame.columns]
        self.end_train = hours - self.holdout - self.validation
        self.end_validation = hours - self.holdout
        self.hours = hours
        self.features = torch.stack([self._features(frame[name]) for name in frame.columns])
        self.temperature = self.features[..., 0]

        learned = self.temperature[:, : self.end_train]
        if float(learned.std()) < 1e-6:
            raise UserError(f"the values of {source} do not vary")
        self.mean = float(learned.mean())
        self.std = float(learned.std())
        self.day_to_day = float((learned[:, 24:] - learned[:, :-24]).abs().mean())
        self.scale = max(float((learned[:, 24:] - learned[:, :-24]).std()), 1e-3 * self.std)

    @staticmethod
    def _features(series: pd.Series) -> Tensor:
        hour = 2 * math.pi * series.index.hour.to_numpy() / 24
        year = 2 * math.pi * (series.index.day_of_year.to_numpy() - 1) / 365.25
        columns = [series.to_numpy(), np.sin(hour), np.cos(hour), np.sin(year), np.cos(year)]
        return torch.tensor(np.stack(columns, axis=-1), dtype=torch.float32)

    def targets(self, start: int, stop: int) -> Tensor:
        """(S, stop - start, 24): the hours that follow each hour of [start, stop)."""
        return self.temperature[:, start + 1 : stop + HORIZON].unfold(1, HORIZON, 1)

    def windows(self, first: int, last: int, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """All forecasts whose 24 hours lie in [first, last): histories, truth, last known hours."""
        origins = torch.arange(max(first, HISTORY) - 1, last - HORIZON, stride)
        ago = torch.arange(1 - HISTORY, 1)
        ahead = torch.arange(1, HORIZON + 1)
        histories = self.features[:, origins[:, None] + ago]
        return histories, self.temperature[:, origins[:, None] + ahead], origins


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


class Progress:
    """tqdm where it is installed and someone is watching, a line now and then otherwise."""

    def __init__(self, total: int, title: str):
        self.total, self.title, self.done, self.told = total, title, 0, time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=total, desc=title, unit="epoch", leave=False)
            except ImportError:
                pass

    def update(self, text: str) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            self.bar.update()
        elif time.monotonic() - self.told > 5 or self.done == 1:
            self.told = time.monotonic()
            print(f"  {self.title}: epoch {self.done} of {self.total}, {text}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@torch.no_grad()
def predict(model: Forecaster, histories: Tensor) -> Tensor:
    """(S, N, 168, 5) -> (S, N, 24), in pieces that stay in the cache."""
    model.eval()
    pieces = histories.flatten(0, 1).split(256)
    return torch.cat([model(piece) for piece in pieces]).unflatten(0, histories.shape[:2])


def train(model: Forecaster, data: Data, args: argparse.Namespace, title: str) -> dict:
    """Truncated backpropagation through time; leaves the best weights in the model."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs + 1)
    # No target may lie beyond the training part, so its last 24 hours are targets only.
    usable = data.end_train - HORIZON
    targets = data.targets(0, usable)
    histories, truth, _ = data.windows(data.end_train, data.end_validation, stride=5)
    tracks = max(1, min(args.tracks, usable // (2 * HISTORY)))
    best = {"mae": float("inf"), "epoch": 0}
    weights = None
    progress = Progress(args.epochs, title)
    started = time.monotonic()
    for epoch in range(1, args.epochs + 1):
        model.train()
        # The tracks begin elsewhere in every epoch, so that no two epochs see the same windows.
        shift = int(torch.randint(HISTORY, (), generator=generator))
        length = (usable - shift) // tracks

        def cut(series: Tensor, shift: int = shift, length: int = length) -> Tensor:
            """(S, N, ...) -> (S * tracks, length, ...)"""
            series = series[:, shift : shift + tracks * length]
            return series.unflatten(1, (tracks, length)).flatten(0, 1)

        inputs, wanted = cut(data.features[:, :usable]), cut(targets)
        rows = inputs.size(0)
        state = model.init_state(rows)
        known = torch.zeros(rows, 1)  # hours since a row's state was empty
        total, windows = 0.0, 0
        for start in range(0, length, HISTORY):
            x, y = inputs[:, start : start + HISTORY], wanted[:, start : start + HISTORY]
            if start:
                # One row in four starts anew, as a forecast from 168 hours alone does.
                fresh = torch.rand(rows, generator=generator) < 0.25
                empty = model.init_state(rows)
                state = (
                    torch.where(fresh[:, None], empty[0], state[0]),
                    torch.where(fresh[:, None], empty[1], state[1]),
                )
                known[fresh] = 0
            forecast, state = model.sequence(x, state)
            state = (state[0].detach(), state[1].detach())
            hours = known + torch.arange(1, x.size(1) + 1)
            known += x.size(1)
            counts = (hours > 48).float()[..., None]  # before that there is too little to go by
            error = nn.functional.smooth_l1_loss(
                forecast / model.scale, y / model.scale, beta=0.5, reduction="none"
            )
            loss = (error * counts).sum() / (counts.sum() * HORIZON).clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total, windows = total + loss.item(), windows + 1
        schedule.step()
        mae = float((predict(model, histories) - truth).abs().mean())
        if mae < best["mae"]:
            best = {"mae": mae, "epoch": epoch}
            weights = {name: value.clone() for name, value in model.state_dict().items()}
        progress.update(f"loss {total / windows:.4f}, validation error {mae:.4f} °C")
        if not math.isfinite(total):
            break
        if epoch - best["epoch"] >= args.patience:
            break
    progress.close()
    if weights is None:
        raise UserError("training diverged in the first epoch; a smaller --lr may help")
    model.load_state_dict(weights)
    seconds = time.monotonic() - started
    return {
        "best_epoch": best["epoch"],
        "epochs": epoch,
        "validation_mae": best["mae"],
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


# --------------------------------------------------------------------------------------------------
# How good it is
# --------------------------------------------------------------------------------------------------


def seasonal_naive(histories: Tensor) -> Tensor:
    """The same hour of the last day."""
    return histories[..., -HORIZON:, 0]


def persistence(histories: Tensor) -> Tensor:
    """The last temperature, for all hours to come."""
    return histories[..., -1:, 0].expand(*histories.shape[:-2], HORIZON)


def linear_regression(data: Data) -> Callable[[Tensor], Tensor]:
    """Ridge regression on the 168 temperatures: what needs no recurrence, a strong opponent.

    The penalty is chosen on the validation part.
    """

    def inputs(histories: Tensor) -> Tensor:
        past = histories[..., 0].double()
        now = past[..., -1:]
        columns = [(past - now) / data.std, (now - data.mean) / data.std]
        return torch.cat([*columns, histories[..., -1, 1:3], torch.ones_like(now)], dim=-1)

    histories, truth, _ = data.windows(0, data.end_train)
    x, y = inputs(histories).flatten(0, 1), (truth - histories[..., -1:, 0]).flatten(0, 1).double()
    square, right = x.T @ x, x.T @ y
    histories, truth, _ = data.windows(data.end_train, data.end_validation)
    best, chosen = float("inf"), None
    for penalty in (0.01, 0.1, 1.0, 10.0, 100.0):
        solution = torch.linalg.solve(square + penalty * torch.eye(square.size(0)), right)
        guess = histories[..., -1:, 0] + inputs(histories) @ solution
        error = float((guess - truth).abs().mean())
        if error < best:
            best, chosen = error, solution
    return lambda histories: (histories[..., -1:, 0] + inputs(histories) @ chosen).float()


def errors(forecast: Tensor, truth: Tensor, names: list[str]) -> dict:
    """MAE and RMSE by horizon, their means over the horizons, and the means by series."""

    def both(difference: Tensor) -> tuple[Tensor, Tensor]:
        difference = difference.flatten(0, -2).double()
        return difference.abs().mean(0), difference.square().mean(0).sqrt()

    mae, rmse = both(forecast - truth)
    result = {"mae": float(mae.mean()), "rmse": float(rmse.mean())}
    result["mae_by_horizon"] = [round(value, 5) for value in mae.tolist()]
    result["rmse_by_horizon"] = [round(value, 5) for value in rmse.tolist()]
    result["by_series"] = {}
    for name, difference in zip(names, forecast - truth, strict=True):
        mae, rmse = both(difference)
        result["by_series"][name] = {"mae": float(mae.mean()), "rmse": float(rmse.mean())}
    return result


@torch.no_grad()
def carried_error(model: Forecaster, data: Data) -> float:
    """MAE on the held-out part when the state is carried from the first hour of the data on."""
    model.eval()
    state = model.init_state(data.features.size(0))
    _, state = model.sequence(data.features[:, : data.end_validation], state)
    forecast, _ = model.sequence(data.features[:, data.end_validation : -HORIZON], state)
    truth = data.targets(data.end_validation, data.hours - HORIZON)
    return float((forecast - truth).abs().mean())


def print_table(scores: dict[str, dict]) -> None:
    width = max(15, *(len(name) for name in scores))
    print("\nError on the held-out part in °C, MAE / RMSE\n")
    print("  hours ahead  " + "  ".join(name.rjust(width) for name in scores))
    for hour in range(HORIZON):
        cells = [
            f"{s['mae_by_horizon'][hour]:.3f} / {s['rmse_by_horizon'][hour]:.3f}"
            for s in scores.values()
        ]
        print(f"  {hour + 1:11d}  " + "  ".join(cell.rjust(width) for cell in cells))
    cells = [f"{s['mae']:.3f} / {s['rmse']:.3f}" for s in scores.values()]
    print("         mean  " + "  ".join(cell.rjust(width) for cell in cells))


def print_verdict(scores: dict[str, dict], model: str, naive: list[str], names: list[str]) -> bool:
    """Whether the model beats the forecasts that learn nothing, at every mean over the horizons."""
    ours = scores[model]
    all_beaten = True
    print()
    for name in naive:
        other = scores[name]
        pairs = [("all series", ours, other)] if len(names) > 1 else []
        pairs += [(s, ours["by_series"][s], other["by_series"][s]) for s in names]
        for where, a, b in pairs:
            beaten = a["mae"] < b["mae"] and a["rmse"] < b["rmse"]
            all_beaten &= beaten
            print(
                f"  {where}: MAE {a['mae']:.3f} against {b['mae']:.3f}, RMSE {a['rmse']:.3f} "
                f"against {b['rmse']:.3f} of {name}: {'beaten' if beaten else 'NOT BEATEN'}"
            )
    verdict = "beats" if all_beaten else "DOES NOT BEAT"
    print(f"\n{model} {verdict} both {naive[0]} and {naive[1]} on the held-out part.")
    return all_beaten


# --------------------------------------------------------------------------------------------------
# What is left behind
# --------------------------------------------------------------------------------------------------

INK, TRUTH, GRID = "#222222", "#9a9a9a", "#e6e6e6"
COLOURS = ["#0b62b8", "#e08a00", "#8a8a8a", "#1f9e77", "#b5489a"]  # model, two naive ones, others


def plot(path: Path, data: Data, forecast: Tensor, scores: dict[str, dict], title: str) -> None:
    """Top: some held-out days and their forecasts. Below: their errors. Bottom: by horizon."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.dates as mdates
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": TRUTH,
        "axes.labelcolor": INK,
        "axes.titlelocation": "left",
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.grid": True,
        "grid.color": GRID,
        "legend.frameon": False,
    }
    shown = data.names[:2]
    model = next(iter(scores))
    # Six days from the middle of the held-out part; each forecast is made at midnight.
    times = data.frame.index
    start = (data.end_validation + data.hours) // 2
    start -= int(times[start].hour)
    days = min(6, (data.hours - 1 - start) // 24)

    with plt.rc_context(style):
        figure = plt.figure(figsize=(13, 10))
        sides = {"left": 0.065, "right": 0.985}
        grid = figure.add_gridspec(
            2,
            len(shown),
            height_ratios=[2, 1],
            hspace=0.2,
            wspace=0.16,
            bottom=0.41,
            top=0.87,
            **sides,
        )
        for column, name in enumerate(shown):
            top = figure.add_subplot(grid[0, column])
            low = figure.add_subplot(grid[1, column], sharex=top)
            truth = data.temperature[column].numpy()
            whole = slice(start, start + 24 * days + 1)
            top.plot(times[whole], truth[whole], color=TRUTH, linewidth=6, alpha=0.5, label="truth")
            for origin in range(start, start + 24 * days, 24):
                hours = slice(origin, origin + HORIZON + 1)  # from the last known hour on
                ours = forecast[column, origin - data.first_origin].numpy()
                naive = truth[origin - 23 : origin + 1]
                for guess, colour, style, label in (
                    (naive, COLOURS[1], (0, (4, 2)), "same hour yesterday"),
                    (ours, COLOURS[0], "-", f"{model}, 24 hours ahead of each dot"),
                ):
                    line = np.concatenate([truth[origin : origin + 1], guess])
                    label = label if origin == start else None
                    top.plot(times[hours], line, color=colour, linestyle=style, label=label)
                    low.plot(times[hours][1:], guess - truth[hours][1:], color=colour, linewidth=1)
                top.plot(times[origin], truth[origin], "o", color=COLOURS[0], markersize=7)
            low.axhline(0, color=INK, linewidth=0.8)
            top.set_title(name, fontweight="bold")
            top.set_ylabel("°C")
            low.set_ylabel("°C")
            low.set_title("forecast minus truth", fontsize=10)
            low.xaxis.set_major_locator(mdates.DayLocator())
            low.xaxis.set_major_formatter(mdates.DateFormatter("%d %b"))
            top.tick_params(labelbottom=False)
            if column == 0:
                entries = top.get_legend_handles_labels()
                figure.legend(*entries, loc="upper left", bbox_to_anchor=(0.055, 0.945), ncols=3)

        grid = figure.add_gridspec(1, 1, bottom=0.055, top=0.30, **sides)
        bottom = figure.add_subplot(grid[0])
        ahead = np.arange(1, HORIZON + 1)
        for (name, score), colour in zip(scores.items(), COLOURS, strict=False):
            bottom.plot(
                ahead,
                score["mae_by_horizon"],
                color=colour,
                linewidth=2.6 if name == model else 1.6,
                marker="o" if name == model else None,
                markersize=4,
                label=f"{name}, mean {score['mae']:.3f} °C",
                zorder=3 if name == model else 2,
            )
        means = [score["mae"] for score in scores.values()]
        if max(means) > 6 * min(means):
            bottom.set_yscale("log")
            bottom.yaxis.set_major_formatter("{x:g}")
        else:
            bottom.set_ylim(bottom=0)
        bottom.set_xticks(ahead)
        bottom.set_xlim(0.7, HORIZON + 0.3)
        bottom.set_xlabel("hours ahead")
        bottom.set_ylabel("mean absolute error, °C")
        span = f"{times[data.end_validation]:%d %b} to {times[-1]:%d %b %Y}"
        bottom.set_title(f"Error by horizon, held-out {span}", fontweight="bold", pad=30)
        bottom.legend(
            loc="lower left",
            bbox_to_anchor=(-0.012, 0.99),
            ncols=len(scores),
            columnspacing=1.3,
            handlelength=1.5,
            fontsize=9,
        )
        figure.suptitle(title, fontsize=15, fontweight="bold", x=0.065, y=0.98, ha="left")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def save_torchscript(path: Path, model: Forecaster, histories: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch call TorchScript deprecated
        scripted = torch.jit.script(model)
        scripted.save(str(path))
        loaded = torch.jit.load(str(path))
    with torch.no_grad():
        difference = float((loaded(histories) - model(histories)).abs().max())
    print(f"{path}: read back, largest difference {difference:.1e} °C")


def save_package(path: Path, model: Forecaster, histories: Tensor) -> str | None:
    """The reason why there is none, or None."""
    compiler = os.environ.get("CXX") or next(
        (name for name in ("g++", "clang++", "c++") if shutil.which(name)), None
    )
    if compiler is None or shutil.which(compiler) is None:
        return "there is no C++ compiler"
    print(f"Compiling {path} ...", flush=True)
    started = time.monotonic()
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = torch.export.Dim("batch", min=1, max=65536)
            exported = torch.export.export(model, (histories,), dynamic_shapes=({0: batch},))
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
            loaded = torch._inductor.aoti_load_package(str(path))
            more = torch.cat([histories, histories[:1]])
            difference = float((loaded(more) - model(more)).abs().max())
    except Exception as error:  # whatever a compiler or the exporter may say
        path.unlink(missing_ok=True)
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    seconds = time.monotonic() - started
    print(f"{path}: read back, largest difference {difference:.1e} °C, made in {seconds:.0f} s")
    return None


def save_tables(folder: Path, model: Forecaster, data: Data) -> None:
    """recent.csv and forecast.csv, of the first series."""
    columns = [data.features[0, :, k].numpy() for k in range(len(FEATURES))]
    table = pd.DataFrame(dict(zip(FEATURES, columns, strict=True)), index=data.frame.index)
    table.index.name = "date"
    table.iloc[-2 * HISTORY :].to_csv(folder / "recent.csv", float_format="%.9g")
    with torch.no_grad():
        forecast = model(data.features[:1, -HISTORY:])[0]
    times = data.frame.index[-1] + pd.to_timedelta(np.arange(1, HORIZON + 1), unit="h")
    table = pd.DataFrame({"temperature": forecast.numpy()}, index=times)
    table.index.name = "date"
    table.to_csv(folder / "forecast.csv", float_format="%.9g")


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="Without --csv: Seattle and San Francisco, hour by hour (package vega_datasets).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    group = parser.add_argument_group("data")
    group.add_argument("--csv", type=Path, metavar="FILE", help="hourly values of your own")
    group.add_argument("--date", metavar="COLUMN", default="date", help="its column of dates")
    group.add_argument(
        "--value", metavar="COLUMN", nargs="+", default=["temp"], help="its column(s) of values"
    )
    group.add_argument("--unit", choices=["C", "F"], default="C", help="of the file's values")
    group.add_argument(
        "--holdout-days", type=positive, metavar="DAYS", default=61, help="kept for the test"
    )
    group = parser.add_argument_group("model")
    group.add_argument("--layer", choices=list(LAYERS), default="min_gru", help="recurrent layer")
    group.add_argument("--hidden", type=positive, default=64, help="its width")
    group.add_argument("--layers", type=positive, default=2, help="how many of it, stacked")
    group.add_argument("--dropout", type=fraction, default=0.1, help="in training")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive, default=30, help="passes over the data, at most")
    group.add_argument(
        "--patience", type=positive, default=10, help="stop after as many without progress"
    )
    group.add_argument("--tracks", type=positive, default=4, help="pieces that a series is cut in")
    group.add_argument("--lr", type=float, default=0.01, help="largest learning rate")
    group.add_argument("--seed", type=int, default=0, help="of all random numbers")
    group.add_argument(
        "--threads", type=positive, default=1, help="of torch; more helps with large layers only"
    )
    add(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train nn.LSTM of the same size too, and fit a linear regression",
    )
    add(
        "--package",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make forecast.pt2 with AOTInductor",
    )
    add("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the results")
    args = parser.parse_args(arguments)
    if args.lr <= 0:
        parser.error(f"argument --lr: {args.lr} is not positive")
    if args.layer in MATRICES and args.hidden % (2 * HEADS):
        parser.error(f"argument --hidden: {args.hidden} is not a multiple of {2 * HEADS}")
    return args


def make_model(layer: str, data: Data, args: argparse.Namespace) -> Forecaster:
    torch.manual_seed(args.seed)
    sizes = (args.hidden, args.layers, args.dropout)
    return Forecaster(layer, *sizes, data.mean, data.std, data.scale)


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    args = parse(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib, which draws the forecast, is missing: pip install matplotlib")
    torch.set_num_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {args.out} cannot be made: {error.strerror}") from None

    if args.csv is None:
        frame, source = load_cities(), "vega_datasets"
    else:
        frame, source = load_csv(args.csv, args.date, args.value, args.unit), str(args.csv)
    data = Data(make_hourly(frame, source), args.holdout_days, source)
    times = data.frame.index
    periods = {
        "training": (times[0], times[data.end_train - 1]),
        "validation": (times[data.end_train], times[data.end_validation - 1]),
        "held_out": (times[data.end_validation], times[-1]),
    }
    print(f"{', '.join(data.names)}: {data.hours:,} hours each, °C. From day to day the same hour")
    print(f"changes by {data.day_to_day:.2f} °C on the average.")
    for name, (first, last) in periods.items():
        print(f"  {name.replace('_', ' '):10s}  {first:%d %b %Y} to {last:%d %b %Y}")

    model = make_model(args.layer, data, args)
    training = {args.layer: train(model, data, args, args.layer)}
    histories, truth, origins = data.windows(data.end_validation, data.hours)
    data.first_origin = int(origins[0])
    forecasts = {
        args.layer: predict(model, histories),
        "same hour yesterday": seasonal_naive(histories),
        "persistence": persistence(histories),
    }
    if args.compare:
        other = "nn.LSTM" if args.layer != "nn.LSTM" else "min_gru"
        opponent = make_model(other, data, args)
        training[other] = train(opponent, data, args, other)
        forecasts[other] = predict(opponent, histories)
        forecasts["linear regression"] = linear_regression(data)(histories)
    for name, facts in training.items():
        print(
            f"{name}: {facts['parameters']:,} parameters, {facts['seconds']} s for "
            f"{facts['epochs']} epochs, best validation error {facts['validation_mae']:.4f} °C "
            f"in epoch {facts['best_epoch']}"
        )
    scores = {name: errors(forecast, truth, data.names) for name, forecast in forecasts.items()}
    print_table(scores)
    beats = print_verdict(scores, args.layer, ["same hour yesterday", "persistence"], data.names)
    carried = carried_error(model, data)
    print(f"With the state carried since {times[0]:%d %b %Y} its MAE is {carried:.3f} °C.\n")

    model.eval()
    sample = histories.flatten(0, 1)[:3].contiguous()
    save_torchscript(args.out / "forecast.ts", model, sample)
    save_tables(args.out, model, data)
    title = f"{args.layer} on held-out temperatures, 24 hours ahead"
    plot(args.out / "forecast.png", data, forecasts[args.layer], scores, title)
    print(f"{args.out / 'forecast.png'}: the forecasts, drawn")
    package = args.out / "forecast.pt2"
    package.unlink(missing_ok=True)  # one of an earlier run would be of another model
    if not args.package:
        reason = "--no-package"
    elif args.layer == "nn.GRU":
        reason = "torch.export writes out every step of nn.GRU, to compile them takes very long"
    else:
        reason = save_package(package, model, sample)
    if reason:
        print(f"{package} was not made: {reason}.")

    seconds = round(time.monotonic() - started, 1)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report = {
        "settings": settings,
        "series": data.names,
        "periods": {k: [str(first), str(last)] for k, (first, last) in periods.items()},
        "features": list(FEATURES),
        "history": HISTORY,
        "horizon": HORIZON,
        "normalisation": {"mean": data.mean, "std": data.std, "scale": data.scale},
        "training": training,
        "errors": scores,
        "mae_state_carried": carried,
        "beats_same_hour_yesterday_and_persistence": beats,
        "package": reason or package.name,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_ext": getattr(torch_ext, "__version__", "unknown"),
        },
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }
    (args.out / "forecast.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"All of it is in {args.out}, after {seconds:.0f} s.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"forecast_temperature: {error}")
    except KeyboardInterrupt:
        sys.exit("forecast_temperature: stopped")
