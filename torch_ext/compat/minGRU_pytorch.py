"""The modules of the package minGRU-pytorch (``import minGRU_pytorch``) on our operators.

``minGRU`` and ``minLSTM`` have the peer's constructor, parameter names and ``forward``, and load
its ``state_dict`` as it is; :func:`load` turns one into our layers. Its model is the paper's
appendix B: candidates are ``g(x)``, so states are positive.

A state that is handed over is ``h`` itself, after the activation, ``(B, 1, dim_inner)``; none means
zero. There the peer contradicts itself, and we follow its step-by-step form: given more than one
step, its minLSTM begins with ``h + 0.5`` (``log_g`` where its minGRU has ``log``). Where the peer
returns the state in the dtype of the output, ours is float32 (float64 in double modules), and
takes either.
"""

from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor, nn

from ..min_gru import MinGRU, min_gru
from ..min_lstm import MinLSTM, min_lstm

__all__ = ["load", "minGRU", "minLSTM"]


class _Layer(nn.Module):
    """What the two have in common: all but the projection's name and width, and the operator."""

    _projection: str
    _num_parts: int

    def __init__(
        self, dim: int, expansion_factor: float = 1.0, proj_out: bool | None = None
    ) -> None:
        super().__init__()
        if proj_out is None:
            proj_out = expansion_factor != 1.0
        self.dim_inner = int(dim * expansion_factor)
        projection = nn.Linear(dim, self._num_parts * self.dim_inner, bias=False)
        self.add_module(self._projection, projection)
        self.to_out = nn.Linear(self.dim_inner, dim, bias=False) if proj_out else nn.Identity()

    def recurrence(self, gates: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        prev_hidden: Tensor | None = None,
        return_next_prev_hidden: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``x`` ``(B, T, dim)`` to ``(B, T, dim)``, or ``(B, T, dim_inner)`` without ``to_out``.

        Args:
            x: ``(B, T, dim)``.
            prev_hidden: state from the steps before, ``(B, 1, dim_inner)``.
            return_next_prev_hidden: return the state after the last step as well.
        """
        gates = getattr(self, self._projection)(x)
        state = None
        if prev_hidden is not None:
            if prev_hidden.shape != (x.shape[0], 1, self.dim_inner):
                raise ValueError(
                    f"{type(self).__name__}: prev_hidden has shape {tuple(prev_hidden.shape)}, "
                    f"expected (B={x.shape[0]}, 1, dim_inner={self.dim_inner})"
                )
            wide = torch.float64 if gates.dtype == torch.float64 else torch.float32
            state = prev_hidden.squeeze(1).to(wide)
        h, final_state = self.recurrence(gates, state)
        y = self.to_out(h)
        return (y, final_state.unsqueeze(1)) if return_next_prev_hidden else y


class minGRU(_Layer):
    """minGRU-pytorch's ``minGRU``.

    Args:
        dim: channels of ``x``.
        expansion_factor: width of the state, in multiples of ``dim``.
        proj_out: project the state back to ``dim``; by default if it is not ``dim`` wide.

    Example:
        >>> layer = torch_ext.compat.minGRU_pytorch.minGRU(8)
        >>> x = torch.randn(2, 20, 8)
        >>> y, hidden = layer(x, return_next_prev_hidden=True)
        >>> y_next = layer(x, prev_hidden=hidden)
    """

    _projection, _num_parts = "to_hidden_and_gate", 2

    def recurrence(self, gates: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden, gate = gates.chunk(2, -1)
        return min_gru(gate, hidden, state, "g")


class minLSTM(_Layer):
    """minGRU-pytorch's ``minLSTM``; arguments as :class:`minGRU`.

    Example:
        >>> layer = torch_ext.compat.minGRU_pytorch.minLSTM(8, expansion_factor=1.5)
        >>> layer(torch.randn(2, 20, 8)).shape
        torch.Size([2, 20, 8])
    """

    _projection, _num_parts = "to_hidden_and_f_i_gate", 3

    def recurrence(self, gates: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden, forget_gate, input_gate = gates.chunk(3, -1)
        return min_lstm(forget_gate, input_gate, hidden, state, "g")


def load(
    source: nn.Module | Mapping[str, Tensor] | str | PathLike, prefix: str = ""
) -> tuple[MinGRU | MinLSTM, nn.Linear | None]:
    """Turns a minGRU-pytorch layer into ours.

    Args:
        source: the peer's module, its ``state_dict``, or a file that ``torch.save`` wrote of one.
        prefix: where the layer stands in ``source``, such as ``"layers.0.2."`` in a ``minLM``.

    Returns:
        A :class:`torch_ext.MinGRU` or :class:`torch_ext.MinLSTM` with ``batch_first`` and
        ``activation="g"``, and the layer's ``to_out``, or None if it has none. The peer's
        ``prev_hidden`` ``(B, 1, dim_inner)`` is our state ``(1, B, dim_inner)``.

    Raises:
        ValueError: there is no such layer.

    Example:
        >>> peer = torch_ext.compat.minGRU_pytorch.minGRU(8, expansion_factor=2.0)
        >>> rnn, to_out = torch_ext.compat.minGRU_pytorch.load(peer)
        >>> x = torch.randn(2, 20, 8)
        >>> torch.allclose(to_out(rnn(x)[0]), peer(x))
        True
    """
    if isinstance(source, nn.Module):
        source = source.state_dict()
    elif not isinstance(source, Mapping):
        source = torch.load(source, map_location="cpu", weights_only=True)

    gru, lstm = prefix + "to_hidden_and_gate.weight", prefix + "to_hidden_and_f_i_gate.weight"
    if gru not in source and lstm not in source:
        raise ValueError(
            f"load: source has neither {gru} nor {lstm}, expected one of them; it has "
            f"{list(source)}"
        )
    layer, num_gates, weight = (
        (MinGRU, 2, source[gru]) if gru in source else (MinLSTM, 3, source[lstm])
    )
    factory = {"device": weight.device, "dtype": weight.dtype}
    hidden_size = weight.shape[0] // num_gates
    rnn = layer(
        weight.shape[1], hidden_size, bias=False, batch_first=True, activation="g", **factory
    )
    # Rows of the peer's projection: the candidate, then the gates. Of ours: the candidate last.
    rnn.load_state_dict({"weight_ih_l0": weight.roll(-hidden_size, 0)})

    to_out = None
    if f"{prefix}to_out.weight" in source:
        to_out = nn.Linear(hidden_size, weight.shape[1], bias=False, **factory)
        to_out.load_state_dict({"weight": source[f"{prefix}to_out.weight"]})
    return rnn, to_out
