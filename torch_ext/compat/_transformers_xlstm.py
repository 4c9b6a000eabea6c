"""Where transformers' xLSTM calls what ours replaces: a method, not functions."""

import inspect
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from torch import Tensor

from ..mlstm import mlstm, mlstm_step
from ._common import wide_dtype

MODEL = "xlstm"
CLASS, METHOD, CALLER = "xLSTMBackend", "forward", "xLSTMLayer"
PARAMETERS = [
    "query", "key", "value", "igate", "fgate", "c_initial", "n_initial", "m_initial",
    "return_last_states", "mode",
]  # fmt: skip


def backend_forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool | None = None,
    mode: str | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """``xLSTMBackend.forward``, for any length in every mode: queries, keys and values ``(B, H, T,
    K)``, gates ``(B, H, T)``, C ``(B, H, K, V)``, n ``(B, H, K)`` and m ``(B, H, 1)``."""
    mode = self.config.mode if mode is None else mode
    if return_last_states is None or "inference" in mode:
        return_last_states = "inference" in mode or self.config.return_last_states
    state = None
    if c_initial is not None and n_initial is not None and m_initial is not None:
        wide = wide_dtype(query.dtype)
        state = (c_initial.to(wide), n_initial.to(wide), m_initial.squeeze(-1).to(wide))
    eps = self.config.eps
    if query.shape[2] == 1 and state is not None:
        h, (C, n, m) = mlstm_step(
            query[:, :, 0], key[:, :, 0], value[:, :, 0], igate[:, :, 0], fgate[:, :, 0], state,
            eps=eps,
        )  # fmt: skip
        h = h.unsqueeze(2)
    else:
        h, (C, n, m) = mlstm(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
            igate.transpose(1, 2), fgate.transpose(1, 2), state, eps=eps,
        )  # fmt: skip
        h = h.transpose(1, 2)
    return (h, (C, n, m.unsqueeze(-1))) if return_last_states else h


def ready(module: ModuleType) -> bool:
    """Whether its blocks are the package's, and those ours: :func:`torch_ext.compat.install`."""
    base = getattr(module, "mLSTMBlock", None)
    return base is not None and base.__module__.startswith("torch_ext.")


def external(module: ModuleType) -> bool:
    """Whether its blocks are the package's."""
    return getattr(module, "external_xlstm", False)


def check(module: ModuleType, where: str, versions: str) -> None:
    """What is replaced is there, has the parameters that we expect, and is used."""
    if external(module):
        raise RuntimeError(
            f"{where} takes its blocks from the installed package xlstm, expected it not to be "
            "installed: there is nothing of transformers' to replace"
        )
    theirs = getattr(getattr(module, CLASS, None), METHOD, None)
    if theirs is None:
        raise RuntimeError(f"{where} has no {CLASS}.{METHOD}, expected a version from {versions}")
    found = list(inspect.signature(inspect.unwrap(theirs)).parameters)[1:]
    if found != PARAMETERS:
        raise RuntimeError(
            f"{where}.{CLASS}.{METHOD} has the parameters {found}, expected {PARAMETERS}, as in "
            f"versions from {versions}"
        )
    caller = getattr(getattr(module, CALLER, None), "forward", None)
    if caller is None or "mlstm_backend" not in inspect.unwrap(caller).__code__.co_names:
        raise RuntimeError(
            f"{where}.{CALLER}.forward does not call mlstm_backend, expected a version from "
            f"{versions}"
        )


def stand_in_for(theirs: Callable) -> Callable:
    replacement = wraps(theirs)(lambda *args, **kwargs: backend_forward(*args, **kwargs))
    replacement._torch_ext = theirs
    return replacement
