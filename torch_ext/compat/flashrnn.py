"""What FlashRNN's functions take and return, as the arguments and states of our operators.

Both have block-diagonal recurrent matrices, rows as outputs, and the gates of sLSTM (i, f, z, o),
of LSTM (i, f, z, o: our i, f, g, o) and of Elman's network in one order. What differs are the
states, which FlashRNN has in one tensor, the layouts of its kernels, and sLSTM's normaliser, which it
keeps at 1 or more.
"""

from typing import Any

import torch
from torch import Tensor

from .._sequence_layer import shape_text
from ..linear_scan import state_dtype
from ._common import check_shape

# Of x, R and b by letter: batch, time, gate, head, unit (D, of a recurrent matrix the output's), and
# the unit that the recurrent matrix sees (P).
_LAYOUTS = {
    "functional": ("BTGHD", "GHDP", "GHD"),
    "cuda": ("TBHGD", "HPGD", "HGD"),
    "cuda_fused": ("TBHDG", "HDGP", "HDG"),
}

# Gates, and states.
_FUNCTIONS = {"slstm": (4, 4), "lstm": (4, 2), "elman": (1, 1)}

State = Tensor | tuple[Tensor, ...]


def arguments(
    function: str,
    Wx: Tensor,
    R: Tensor,
    b: Tensor | None = None,
    states: Tensor | None = None,
    layout: str = "functional",
) -> dict[str, Any]:
    """The arguments of :func:`torch_ext.slstm`, :func:`torch_ext.lstm` or :func:`torch_ext.elman`,
    from those of ``flashrnn(Wx, R, b, states, function)``.

    Args:
        function: ``"slstm"``, ``"lstm"`` or ``"elman"``.
        Wx: what the input adds to the gates, ``(B, T, G, N, D)``, with G gates, N heads and D units
            of each.
        R: recurrent weights, ``(G, N, D, D)``, rows are outputs.
        b: ``(G, N, D)``, or None.
        states: ``(S, B, 1, N, D)``, with the S states h, c, n, m of sLSTM, h, c of LSTM, and h of
            Elman's network. Zeros if omitted.
        layout: ``"functional"``, the above; ``"cuda"`` or ``"cuda_fused"``, in which the kernels of
            these backends have ``Wx``, ``R`` and ``b``: ``(T, B, N, G, D)``, ``(N, P, G, D)`` and
            ``(N, G, D)``, with P the unit that is seen; or ``(T, B, N, D, G)``, ``(N, D, G, P)`` and
            ``(N, D, G)``. ``states`` is the same in all.

    Returns:
        ``x``, ``R``, ``bias``, ``initial_state``, and ``normalizer`` of sLSTM: views of what was
        given, states in float32 (float64 of float64).

    Raises:
        ValueError: ``function`` or ``layout`` is another word, or a shape differs from the above.

    Example:
        >>> from torch_ext.compat import flashrnn
        >>> Wx, R, b = torch.randn(2, 7, 4, 3, 5), torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5)
        >>> h, state = torch_ext.slstm(**flashrnn.arguments("slstm", Wx, R, b))
        >>> flashrnn.states(state).shape
        torch.Size([4, 2, 1, 3, 5])
    """
    where = "flashrnn.arguments"
    if function not in _FUNCTIONS:
        raise ValueError(f'{where}: function is {function!r}, expected "slstm", "lstm" or "elman"')
    if layout not in _LAYOUTS:
        raise ValueError(
            f'{where}: layout is {layout!r}, expected "functional", "cuda" or "cuda_fused"'
        )
    gates, count = _FUNCTIONS[function]
    given, ours = _LAYOUTS[layout], _LAYOUTS["functional"]
    x = _permuted(where, "Wx", Wx, given[0], ours[0])
    R = _permuted(where, "R", R, given[1], ours[1])
    check_shape(where, "Wx", x, B=None, T=None, G=gates, N=None, D=None)
    B, _, _, N, D = x.shape
    check_shape(where, "R", R, G=gates, N=N, D=D, P=D)
    if b is not None:
        b = _permuted(where, "b", b, given[2], ours[2])
        check_shape(where, "b", b, G=gates, N=N, D=D)
    result: dict[str, Any] = {"x": x, "R": R, "bias": b, "initial_state": None}
    if states is not None:
        check_shape(where, "states", states, S=count, B=B, one=1, N=N, D=D)
        result["initial_state"] = initial_state(states)
    if function == "slstm":
        result["normalizer"] = "at_least_one"
    return result


def initial_state(states: Tensor) -> State:
    """``states`` ``(S, B, 1, N, D)`` as our operators have them: S tensors ``(B, N, D)`` in float32
    (float64 of float64), or the one of Elman's network.

    Raises:
        ValueError: the shape differs from the above.

    Example:
        >>> from torch_ext.compat import flashrnn
        >>> h, c = flashrnn.initial_state(torch.zeros(2, 8, 1, 3, 5))
        >>> h.shape
        torch.Size([8, 3, 5])
    """
    check_shape("flashrnn.initial_state", "states", states, S=None, B=None, one=1, N=None, D=None)
    parts = states.squeeze(2).to(state_dtype(states.dtype)).unbind()
    return parts[0] if len(parts) == 1 else parts


def states(state: State) -> Tensor:
    """The states that our operators return, as FlashRNN has them, ``(S, B, 1, N, D)``.

    Args:
        state: a tensor ``(B, N, D)`` or a tuple of such.

    Raises:
        ValueError: the shapes differ from the above.

    Example:
        >>> from torch_ext.compat import flashrnn
        >>> flashrnn.states((torch.zeros(8, 3, 5), torch.ones(8, 3, 5))).shape
        torch.Size([2, 8, 1, 3, 5])
    """
    parts = (state,) if isinstance(state, Tensor) else tuple(state)
    for k, part in enumerate(parts):
        if part.dim() != 3 or part.shape != parts[0].shape:
            raise ValueError(
                f"flashrnn.states: state[{k}] has shape {shape_text(part)}, expected (B, N, D), all "
                "the same"
            )
    return torch.stack(parts).unsqueeze(2)


def _permuted(where: str, name: str, x: Tensor, given: str, ours: str) -> Tensor:
    if x.dim() != len(given):
        expected = ", ".join("N" if letter == "H" else letter for letter in given)
        raise ValueError(f"{where}: {name} has shape {shape_text(x)}, expected ({expected})")
    return x.permute([given.index(letter) for letter in ours])
