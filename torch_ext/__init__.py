"""Fused C++ and CUDA operators for modern recurrence, and the PyTorch modules built on them."""

# isort: off
from ._library import cmake_prefix_path  # loads the operators: before all others
from . import _vmap as _vmap

# isort: on
from .linear_scan import linear_scan, linear_scan_reference, linear_scan_step, linear_scan_step_
from .min_gru import min_gru, min_gru_reference, min_gru_step, min_gru_step_
from .min_lstm import min_lstm, min_lstm_reference, min_lstm_step, min_lstm_step_

__all__ = [
    "cmake_prefix_path",
    "linear_scan",
    "linear_scan_reference",
    "linear_scan_step",
    "linear_scan_step_",
    "min_gru",
    "min_gru_reference",
    "min_gru_step",
    "min_gru_step_",
    "min_lstm",
    "min_lstm_reference",
    "min_lstm_step",
    "min_lstm_step_",
]
