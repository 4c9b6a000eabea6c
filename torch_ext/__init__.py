"""Fused C++ and CUDA operators for modern recurrence, and the PyTorch modules built on them."""

# isort: off
from ._library import build_info, cmake_prefix_path  # loads the operators: before all others
from . import _vmap as _vmap

# isort: on
from . import compat, init
from .causal_conv1d import (
    causal_conv1d,
    causal_conv1d_reference,
    causal_conv1d_step,
    causal_conv1d_step_,
)
from .conv_rnn import ConvGRU, ConvLSTM
from .echo_state import EchoStateNetwork
from .elman import elman, elman_reference, elman_step, elman_step_
from .gru import gru, gru_reference, gru_step, gru_step_
from .ind_rnn import ind_rnn, ind_rnn_reference, ind_rnn_step, ind_rnn_step_
from .linear_attention import (
    LinearAttention,
    linear_attention,
    linear_attention_reference,
    linear_attention_step,
    linear_attention_step_,
)
from .linear_scan import linear_scan, linear_scan_reference, linear_scan_step, linear_scan_step_
from .lstm import lstm, lstm_reference, lstm_step, lstm_step_
from .mamba import Mamba, mamba_step, mamba_step_
from .mamba2 import Mamba2
from .mamba_lm import MambaBlock, MambaLM
from .min_gru import MinGRU, min_gru, min_gru_reference, min_gru_step, min_gru_step_
from .min_lstm import MinLSTM, min_lstm, min_lstm_reference, min_lstm_step, min_lstm_step_
from .min_rnn import MinRNNBlock, MinRNNLM
from .mlstm import MLSTM, mlstm, mlstm_reference, mlstm_step, mlstm_step_
from .retention import Retention, retention, retention_reference, retention_step, retention_step_
from .rnn import GRU, LSTM, RNN
from .rnn_cells import GRUCell, IndRNNCell, LSTMCell, RNNCell, SLSTMCell
from .rnn_layers import SLSTM, IndRNN
from .selective_scan import (
    selective_scan,
    selective_scan_reference,
    selective_scan_step,
    selective_scan_step_,
)
from .slstm import slstm, slstm_reference, slstm_step, slstm_step_
from .ssd import ssd, ssd_reference, ssd_step, ssd_step_
from .xlstm import (
    mLSTMBlock,
    mLSTMLayer,
    xLSTMBlockStack,
    xLSTMLargeBlock,
    xLSTMLargeLayer,
)
from .xlstm_lm import xLSTMLarge, xLSTMLM
from .xlstm_slstm import sLSTMBlock, sLSTMLayer

__version__ = build_info.version

__all__ = [
    "ConvGRU",
    "ConvLSTM",
    "EchoStateNetwork",
    "GRU",
    "GRUCell",
    "IndRNN",
    "IndRNNCell",
    "LSTM",
    "LSTMCell",
    "LinearAttention",
    "MLSTM",
    "Mamba",
    "Mamba2",
    "MambaBlock",
    "MambaLM",
    "MinGRU",
    "MinLSTM",
    "MinRNNBlock",
    "MinRNNLM",
    "RNN",
    "RNNCell",
    "Retention",
    "SLSTM",
    "SLSTMCell",
    "__version__",
    "causal_conv1d",
    "causal_conv1d_reference",
    "causal_conv1d_step",
    "causal_conv1d_step_",
    "cmake_prefix_path",
    "compat",
    "elman",
    "elman_reference",
    "elman_step",
    "elman_step_",
    "gru",
    "gru_reference",
    "gru_step",
    "gru_step_",
    "ind_rnn",
    "ind_rnn_reference",
    "ind_rnn_step",
    "ind_rnn_step_",
    "init",
    "linear_attention",
    "linear_attention_reference",
    "linear_attention_step",
    "linear_attention_step_",
    "linear_scan",
    "linear_scan_reference",
    "linear_scan_step",
    "linear_scan_step_",
    "lstm",
    "lstm_reference",
    "lstm_step",
    "lstm_step_",
    "mLSTMBlock",
    "mLSTMLayer",
    "mamba_step",
    "mamba_step_",
    "min_gru",
    "min_gru_reference",
    "min_gru_step",
    "min_gru_step_",
    "min_lstm",
    "min_lstm_reference",
    "min_lstm_step",
    "min_lstm_step_",
    "mlstm",
    "mlstm_reference",
    "mlstm_step",
    "mlstm_step_",
    "retention",
    "retention_reference",
    "retention_step",
    "retention_step_",
    "selective_scan",
    "selective_scan_reference",
    "selective_scan_step",
    "selective_scan_step_",
    "sLSTMBlock",
    "sLSTMLayer",
    "slstm",
    "slstm_reference",
    "slstm_step",
    "slstm_step_",
    "ssd",
    "ssd_reference",
    "ssd_step",
    "ssd_step_",
    "xLSTMBlockStack",
    "xLSTMLM",
    "xLSTMLarge",
    "xLSTMLargeBlock",
    "xLSTMLargeLayer",
]
