"""Weights of haste's modules (haste_pytorch) as the arguments of our operators and of torch.nn.

haste's parameters are ``kernel`` ``(input_size, G * H)`` and ``recurrent_kernel`` ``(H, G * H)``,
inputs first, and vectors of ``G * H``; the gates of its LSTM are in the order i, g, f, o, those of
its GRU z, r, h, where torch.nn and our operators have i, f, g, o and r, z, n. What is made here are
new tensors, in the dtype of the old ones; gradients pass.

DropConnect and zoneout are no weights: they are ``R`` with zeros in it, and the operators'
``h_update``.
"""

from collections.abc import Mapping

from torch import Tensor

from ._common import check_shape

# For each of our gates the place of haste's.
_LSTM = (0, 2, 1, 3)
_GRU = (1, 0, 2)


def lstm_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Weights of haste's ``LSTM`` or ``LayerNormLSTM`` for :func:`torch_ext.lstm`.

    Args:
        state_dict: the module's, with H hidden units: ``kernel`` ``(input_size, 4 H)``,
            ``recurrent_kernel`` ``(H, 4 H)``, ``bias`` ``(4 H,)``; of a ``LayerNormLSTM`` also
            ``gamma`` ``(2, 4 H)``, ``gamma_h`` and ``beta_h`` ``(H,)``.

    Returns:
        ``weight`` ``(4 H, input_size)``, for :func:`torch.nn.functional.linear`; ``R``
        ``(4, 1, H, H)`` and ``bias`` ``(4, 1, H)``, arguments of :func:`torch_ext.lstm`. Of a
        ``LayerNormLSTM`` also its arguments ``norm_weight`` ``(4, 1, H)``, ``cell_norm_weight`` and
        ``cell_norm_bias`` ``(1, H)``, and ``input_norm_weight`` ``(4 H,)``: the weight of a layer
        norm over all of ``linear(input, weight)``.

    Raises:
        ValueError: a parameter is missing or unknown, or its shape differs from the above.

    Example:
        >>> from torch_ext.compat import haste
        >>> theirs = {"kernel": torch.randn(3, 20), "recurrent_kernel": torch.randn(5, 20)}
        >>> weights = haste.lstm_weights(theirs | {"bias": torch.zeros(20)})
        >>> x = torch.nn.functional.linear(torch.randn(2, 7, 3), weights.pop("weight"))
        >>> h, (h_T, c_T) = torch_ext.lstm(x.unflatten(-1, (4, 1, 5)), **weights)
        >>> h.shape
        torch.Size([2, 7, 1, 5])
    """
    where, names = "haste.lstm_weights", {"gamma", "gamma_h", "beta_h"}
    hidden, normed = _check(where, state_dict, 4, {"bias"}, names)
    weights = {
        "weight": _gates(state_dict["kernel"], _LSTM).T.contiguous(),
        "R": _recurrent(state_dict["recurrent_kernel"], _LSTM),
        "bias": _gates(state_dict["bias"], _LSTM).view(4, 1, hidden),
    }
    if normed:
        of_input, of_R = state_dict["gamma"].unbind()
        weights["input_norm_weight"] = _gates(of_input, _LSTM)
        weights["norm_weight"] = _gates(of_R, _LSTM).view(4, 1, hidden)
        weights["cell_norm_weight"] = state_dict["gamma_h"].clone().view(1, hidden)
        weights["cell_norm_bias"] = state_dict["beta_h"].clone().view(1, hidden)
    return weights


def gru_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Weights of haste's ``GRU`` or ``LayerNormGRU`` for :func:`torch_ext.gru`.

    Args:
        state_dict: the module's, with H hidden units: ``kernel`` ``(input_size, 3 H)``,
            ``recurrent_kernel`` ``(H, 3 H)``, ``bias`` and ``recurrent_bias`` ``(3 H,)``; of a
            ``LayerNormGRU`` also ``gamma`` ``(2, 3 H)``.

    Returns:
        ``weight`` ``(3 H, input_size)`` and ``input_bias`` ``(3 H,)``, for
        :func:`torch.nn.functional.linear`; ``R`` ``(3, 1, H, H)`` and ``bias`` ``(3, 1, H)``,
        arguments of :func:`torch_ext.gru`. Of a ``LayerNormGRU`` also its argument ``norm_weight``
        ``(3, 1, H)``, and ``input_norm_weight`` ``(3 H,)``: the weight of a layer norm over all of
        ``linear(input, weight)``, to which ``input_bias`` is added afterwards.

    Raises:
        ValueError: a parameter is missing or unknown, or its shape differs from the above.

    Example:
        >>> from torch_ext.compat import haste
        >>> theirs = {"kernel": torch.randn(3, 15), "recurrent_kernel": torch.randn(5, 15)}
        >>> theirs |= {"bias": torch.zeros(15), "recurrent_bias": torch.zeros(15)}
        >>> weights = haste.gru_weights(theirs)
        >>> x = torch.randn(2, 7, 3)
        >>> x = torch.nn.functional.linear(x, weights.pop("weight"), weights.pop("input_bias"))
        >>> h, h_T = torch_ext.gru(x.unflatten(-1, (3, 1, 5)), **weights)
        >>> h.shape
        torch.Size([2, 7, 1, 5])
    """
    where = "haste.gru_weights"
    hidden, normed = _check(where, state_dict, 3, {"bias", "recurrent_bias"}, {"gamma"})
    weights = {
        "weight": _gates(state_dict["kernel"], _GRU).T.contiguous(),
        "input_bias": _gates(state_dict["bias"], _GRU),
        "R": _recurrent(state_dict["recurrent_kernel"], _GRU),
        "bias": _gates(state_dict["recurrent_bias"], _GRU).view(3, 1, hidden),
    }
    if normed:
        of_input, of_R = state_dict["gamma"].unbind()
        weights["input_norm_weight"] = _gates(of_input, _GRU)
        weights["norm_weight"] = _gates(of_R, _GRU).view(3, 1, hidden)
    return weights


def torch_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``state_dict`` of a torch.nn.LSTM or torch.nn.GRU of one layer, from haste's ``LSTM`` or
    ``GRU``.

    Args:
        state_dict: see :func:`lstm_weights` and :func:`gru_weights`; there is no torch.nn module
            with layer norms.

    Returns:
        ``weight_ih_l0``, ``weight_hh_l0``, ``bias_ih_l0`` and ``bias_hh_l0``; the last one is zero
        of an LSTM, which has one bias.

    Raises:
        ValueError: a parameter is missing or unknown, or its shape differs from what is said there.

    Example:
        >>> from torch_ext.compat import haste
        >>> theirs = {"kernel": torch.randn(3, 20), "recurrent_kernel": torch.randn(5, 20)}
        >>> lstm = torch.nn.LSTM(3, 5)
        >>> lstm.load_state_dict(haste.torch_state_dict(theirs | {"bias": torch.zeros(20)}))
        <All keys matched successfully>
    """
    where = "haste.torch_state_dict"
    if "recurrent_bias" in state_dict:
        _check(where, state_dict, 3, {"bias", "recurrent_bias"})
        weights = gru_weights(state_dict)
        input_bias, bias = weights["input_bias"], weights["bias"].flatten()
    else:
        _check(where, state_dict, 4, {"bias"})
        weights = lstm_weights(state_dict)
        input_bias = weights["bias"].flatten()
        bias = input_bias.new_zeros(input_bias.shape)
    return {
        "weight_ih_l0": weights["weight"],
        "weight_hh_l0": weights["R"].flatten(0, 2),
        "bias_ih_l0": input_bias,
        "bias_hh_l0": bias,
    }


def ind_rnn_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of haste's ``IndRNN`` for :func:`torch_ext.ind_rnn`, whose ``nonlinearity`` is then
    ``"tanh"``.

    Args:
        state_dict: the module's, with H hidden units: ``kernel`` ``(input_size, H)``,
            ``recurrent_scale`` and ``bias`` ``(H,)``.

    Returns:
        ``weight`` ``(H, input_size)``, for :func:`torch.nn.functional.linear`; ``u`` and ``bias``
        ``(H,)``, arguments of :func:`torch_ext.ind_rnn`.

    Raises:
        ValueError: a parameter is missing or unknown, or its shape differs from the above.

    Example:
        >>> from torch_ext.compat import haste
        >>> theirs = {"kernel": torch.randn(3, 5), "recurrent_scale": torch.rand(5)}
        >>> weights = haste.ind_rnn_weights(theirs | {"bias": torch.zeros(5)})
        >>> x = torch.nn.functional.linear(torch.randn(2, 7, 3), weights.pop("weight"))
        >>> torch_ext.ind_rnn(x, **weights, nonlinearity="tanh")[0].shape
        torch.Size([2, 7, 5])
    """
    where = "haste.ind_rnn_weights"
    _check_names(where, state_dict, {"kernel", "recurrent_scale", "bias"})
    hidden = state_dict["recurrent_scale"].numel()
    check_shape(where, "recurrent_scale", state_dict["recurrent_scale"], H=None)
    check_shape(where, "kernel", state_dict["kernel"], input_size=None, H=hidden)
    check_shape(where, "bias", state_dict["bias"], H=hidden)
    return {
        "weight": state_dict["kernel"].T.contiguous(),
        "u": state_dict["recurrent_scale"].clone(),
        "bias": state_dict["bias"].clone(),
    }


def _gates(parameter: Tensor, order: tuple[int, ...]) -> Tensor:
    """``(..., G * H)`` with the gates in our order."""
    parts = parameter.unflatten(-1, (len(order), -1))
    return parts[..., list(order), :].flatten(-2)


def _recurrent(kernel: Tensor, order: tuple[int, ...]) -> Tensor:
    """``(in, G * H)`` as ``(G, 1, out, in)``."""
    parts = _gates(kernel, order).T.unflatten(0, (len(order), 1, -1))
    return parts.contiguous()


def _check_names(where: str, state_dict: Mapping[str, Tensor], wanted: set[str]) -> None:
    missing, unknown = sorted(wanted - set(state_dict)), sorted(set(state_dict) - wanted)
    if missing or unknown:
        came = "lacks " + ", ".join(missing) if missing else "has " + ", ".join(unknown)
        raise ValueError(f"{where}: state_dict {came}, expected {', '.join(sorted(wanted))}")


def _check(
    where: str,
    state_dict: Mapping[str, Tensor],
    gates: int,
    biases: set[str],
    norms: set[str] | None = None,
) -> tuple[int, bool]:
    """Hidden units, and whether there are layer norms."""
    normed = norms is not None and any(name in state_dict for name in norms)
    wanted = {"kernel", "recurrent_kernel"} | biases | (norms if norms and normed else set())
    _check_names(where, state_dict, wanted)
    kernel = state_dict["recurrent_kernel"]
    hidden = kernel.shape[0] if kernel.dim() > 0 else 0
    wide = {f"{gates}H": gates * hidden}
    check_shape(where, "recurrent_kernel", kernel, H=hidden, **wide)
    check_shape(where, "kernel", state_dict["kernel"], input_size=None, **wide)
    for name in sorted(biases):
        check_shape(where, name, state_dict[name], **wide)
    if normed:
        check_shape(where, "gamma", state_dict["gamma"], both=2, **wide)
        for name in sorted(set(norms or ()) - {"gamma"}):
            check_shape(where, name, state_dict[name], H=hidden)
    return hidden, normed
