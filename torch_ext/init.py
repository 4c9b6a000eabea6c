"""Initialisers of recurrent layers and cells: torch_ext's LSTM, GRU, RNN, SLSTM, IndRNN and their cells, and
torch.nn's. Each works in place, on all layers and directions, and returns the module."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._sequence_layer import chrono_ as _chrono_

# The gates of torch.nn's, in the order of their rows; ours have gate_names.
_TORCH_GATES = [
    ((nn.LSTM, nn.LSTMCell), "ifgo"),
    ((nn.GRU, nn.GRUCell), "rzn"),
    ((nn.RNN, nn.RNNCell), "h"),
]


@torch.no_grad()
def orthogonal_recurrent_(module: nn.Module, gain: float = 1.0) -> nn.Module:
    """Fills the recurrent matrix of each gate and head with an orthogonal one.

    Saxe, McClelland & Ganguli 2014, "Exact solutions to the nonlinear dynamics of learning in deep
    linear neural networks", arXiv:1312.6120. torch.nn.init.orthogonal_ of the whole ``weight_hh`` makes its
    columns orthogonal, not the matrix that a state passes through.

    Args:
        module: a layer or a cell with a ``weight_hh`` of two dimensions.
        gain: factor.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no recurrent layer or cell.
        ValueError: it has no recurrent matrices, as IndRNN.

    Example:
        >>> rnn = torch_ext.init.orthogonal_recurrent_(torch_ext.GRU(3, 8, num_heads=2))
        >>> R = rnn.weight_hh_l0.unflatten(0, (3, 2, 4))
        >>> torch.allclose(R @ R.mT, torch.eye(4), atol=1e-5)
        True
    """
    _gates("orthogonal_recurrent_", module)
    for weight in _parameters(module, "weight_hh"):
        if weight.dim() != 2:
            raise ValueError(
                f"orthogonal_recurrent_: module is {type(module).__name__}, expected one with "
                "recurrent matrices"
            )
        for block in weight.split(module.hidden_size // getattr(module, "num_heads", 1)):
            nn.init.orthogonal_(block, gain)
    return module


@torch.no_grad()
def forget_bias_(module: nn.Module, value: float = 1.0) -> nn.Module:
    r"""Sets the forget gate's bias, the sum of ``bias_ih`` and ``bias_hh``.

    Gers, Schmidhuber & Cummins 2000, "Learning to Forget"; Jozefowicz, Zaremba & Sutskever 2015, "An
    Empirical Exploration of Recurrent Network Architectures", who advise 1. In a GRU it is the bias of ``z``, the
    share of the state that is kept.

    Args:
        module: a layer or a cell of LSTM, sLSTM or GRU, with biases.
        value: positive remembers.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no recurrent layer or cell.
        ValueError: it has no such gate, or no biases.

    Example:
        >>> rnn = torch_ext.init.forget_bias_(torch_ext.LSTM(3, 2), 1.0)
        >>> (rnn.bias_ih_l0 + rnn.bias_hh_l0)[2:4].tolist()
        [1.0, 1.0]
    """
    for gates in _biases("forget_bias_", module):
        gates["keep"][0].fill_(value)
        for other in gates["keep"][1:]:
            other.zero_()
    return module


@torch.no_grad()
def chrono_(module: nn.Module, shortest: float, longest: float) -> nn.Module:
    r"""Draws forget biases so that units remember a range of numbers of steps.

    .. math::
        b_f = \log(\tau - 1), \quad \tau \sim U(\text{shortest}, \text{longest}), \quad b_i = -b_f

    Tallec & Ollivier 2018, "Can recurrent neural networks warp time?", arXiv:1804.11188, section 3, where
    the range is 2 to the longest dependency. In a GRU it is the bias of ``z``, the share of the state that is
    kept. Where there is no sigmoid input gate (sLSTM, coupled gates) ``b_f`` alone is drawn.

    Args:
        module: a layer or a cell of LSTM, sLSTM or GRU, with biases.
        shortest: number of steps, above 1.
        longest: at least ``shortest``.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no recurrent layer or cell.
        ValueError: it has no such gate, or no biases, or the range is not one.

    Example:
        >>> rnn = torch_ext.init.chrono_(torch_ext.LSTM(3, 2), 11.0, 11.0)
        >>> bias = (rnn.bias_ih_l0 + rnn.bias_hh_l0).detach()
        >>> torch.sigmoid(bias[:4])  # of i and f
        tensor([0.0909, 0.0909, 0.9091, 0.9091])
    """
    if not 1 < shortest <= longest:
        raise ValueError(
            f"chrono_: shortest is {shortest} and longest {longest}, expected 1 < shortest <= longest"
        )
    for gates in _biases("chrono_", module):
        keep = _chrono_(gates["keep"][0], shortest, longest)
        for other in gates["keep"][1:]:
            other.zero_()
        if "take" in gates:
            gates["take"][0].copy_(-keep)
            for other in gates["take"][1:]:
                other.zero_()
    return module


@torch.no_grad()
def power_law_forget_bias_(
    module: nn.Module, block_index: int = 0, num_blocks: int = 1
) -> nn.Module:
    r"""Spreads the forget biases from 5 to -7 over the units of each head; sLSTM's.

    .. math::
        b_f[k] = 5 - 12\, \left(\frac{k}{K - 1}\right)^{0.3 + 1.3\, r}, \qquad r =
        \frac{\text{block\_index}}{\text{num\_blocks} - 1}

    for the units :math:`k` = 0 to :math:`K - 1` of a head, :math:`r = 0` for one block: the default
    ``powerlaw_blockdependent`` of the package xlstm (Beck et al. 2024, arXiv:2405.04517). A head of one
    unit has 5.

    Args:
        module: a layer or a cell of sLSTM or LSTM, with biases.
        block_index: of the first layer, from 0; each further layer of ``module`` is one more.
        num_blocks: of the model.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no recurrent layer or cell.
        ValueError: it has no forget gate, or no biases, or the last layer's index is not below
            ``num_blocks``.

    Example:
        >>> rnn = torch_ext.init.power_law_forget_bias_(torch_ext.SLSTM(3, 4))
        >>> rnn.bias_ih_l0[4:8].detach()
        tensor([ 5.0000, -3.6307, -5.6256, -7.0000])
    """
    if "f" not in _gates("power_law_forget_bias_", module):
        raise ValueError(
            f"power_law_forget_bias_: module is {type(module).__name__}, expected one with a forget gate"
        )
    directions = 2 if getattr(module, "bidirectional", False) else 1
    found = _biases("power_law_forget_bias_", module)
    last = block_index + len(found) // directions - 1
    if not 0 <= block_index <= last < num_blocks:
        raise ValueError(
            f"power_law_forget_bias_: block_index is {block_index} of num_blocks={num_blocks}, expected "
            f"0 <= block_index, and {last}, the last layer's, below num_blocks"
        )
    for at, gates in enumerate(found):
        heads = getattr(module, "num_heads", 1)
        power_law(gates["keep"][0], heads, block_index + at // directions, num_blocks)
        for other in gates["keep"][1:]:
            other.zero_()
    return module


@torch.no_grad()
def uniform_ind_rnn_(
    module: nn.Module, low: float = 0.0, high: float = 1.0, last_low: float | None = None
) -> nn.Module:
    r"""Draws the recurrent weights of an IndRNN uniformly.

    Li et al. 2018, "Independently Recurrent Neural Network (IndRNN)", arXiv:1803.04831. With relu, a unit whose
    weight is ``u`` has ``u ** T`` of its state after ``T`` steps: weights from 0 to 1 are memories of all lengths, and
    where an answer is asked for at the end of ``T`` steps, the last layer's are better near 1.

    Args:
        module: an IndRNN or an IndRNNCell.
        low: least weight.
        high: greatest weight, such as ``2 ** (1 / T)``.
        last_low: ``low`` of the last layer, such as ``0.5 ** (1 / T)``. ``low`` if omitted.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not an IndRNN.
        ValueError: ``low`` or ``last_low`` is above ``high``.

    Example:
        >>> rnn = torch_ext.init.uniform_ind_rnn_(torch_ext.IndRNN(3, 8, 2), high=1.0, last_low=0.9)
        >>> bool((rnn.weight_hh_l1 >= 0.9).all())
        True
    """
    weights = [w for w in _parameters(module, "weight_hh") if w.dim() == 1]
    if not weights:
        raise TypeError(
            f"uniform_ind_rnn_: module is {type(module).__name__}, expected IndRNN or IndRNNCell"
        )
    for argument, value in [("low", low), ("last_low", low if last_low is None else last_low)]:
        if value > high:
            raise ValueError(
                f"uniform_ind_rnn_: {argument} is {value}, expected at most high={high}"
            )
    directions = 2 if getattr(module, "bidirectional", False) else 1
    for at, weight in enumerate(weights):
        last = at >= len(weights) - directions and last_low is not None
        weight.uniform_(last_low if last else low, high)
    return module


def power_law(bias: Tensor, num_heads: int, block_index: int, num_blocks: int) -> Tensor:
    """Fills the forget biases of one layer, see :func:`power_law_forget_bias_`."""
    units = bias.numel() // num_heads
    ratio = block_index / (num_blocks - 1) if num_blocks > 1 else 0.0
    k = torch.arange(units, dtype=torch.float64) / max(units - 1, 1)
    return bias.copy_((5 - 12 * k ** (0.3 + 1.3 * ratio)).repeat(num_heads))


def slstm_bias(
    bias: Tensor, num_heads: int, block_index: int, num_blocks: int, forget_gate: str
) -> None:
    """An sLSTM's biases: 0, and the power law for the forget gate."""
    i, f, z, o = bias.chunk(4)
    for gate in (i, z, o):
        gate.zero_()
    power_law(f, num_heads, block_index, num_blocks)
    if forget_gate == "exp":  # its pre-activation is the logarithm of the share that is kept
        f.copy_(F.logsigmoid(f))


def _gates(owner: str, module: nn.Module) -> str:
    """The gates of a recurrent module in the order of their rows, a letter each."""
    names = getattr(module, "gate_names", None)
    for classes, known in _TORCH_GATES:
        if isinstance(module, classes):
            names = known
    if not isinstance(names, str):
        raise TypeError(
            f"{owner}: module is {type(module).__name__}, expected a recurrent layer or cell"
        )
    return names


def _parameters(module: nn.Module, kind: str) -> list[Tensor]:
    """Those of a kind, as layers and directions follow each other."""
    return [p for name, p in module.named_parameters(recurse=False) if name.startswith(kind)]


def _biases(owner: str, module: nn.Module) -> list[dict[str, list[Tensor]]]:
    """Of each layer and direction, the rows of its one or two biases that belong to the gate that keeps the
    state ("keep"), and to an LSTM's input gate ("take")."""
    names = _gates(owner, module)
    keep = next((name for name in "fz" if name in names), "")
    if not keep:
        raise ValueError(
            f"{owner}: module is {type(module).__name__}, expected one with a gate that keeps its state"
        )
    kinds = [_parameters(module, kind) for kind in ("bias_ih", "bias_hh")]
    if not any(kinds):
        raise ValueError(f"{owner}: module has bias=False, expected True")
    rows = {"keep": names.index(keep)}
    if names == "ifgo":
        rows["take"] = names.index("i")
    found = []
    for biases in zip(*[kind for kind in kinds if kind], strict=True):
        parts = [bias.chunk(len(names)) for bias in biases]
        found.append({role: [part[row] for part in parts] for role, row in rows.items()})
    return found
