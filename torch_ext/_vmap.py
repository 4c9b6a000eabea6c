"""Teaches torch.func.vmap about the operators.

Rows of the batch and channels are independent in all of them, so the dimension that vmap adds is
folded into the batch, or, where an index names rows (packed sequences, states in a pool), into the
channels; and unfolded from every output. Operators in place have no rule: vmap the functional ones.
"""

import torch
from torch import Tensor

DIAGONAL = ("linear_scan", "min_gru", "min_lstm")


def _register(name: str, index: str) -> None:
    operator = getattr(torch.ops.torch_ext, name)
    index_at = [argument.name for argument in operator.default._schema.arguments].index(index)

    def rule(info, in_dims, *args):
        # Trailing arguments that have their default value may be absent.
        indexed = len(args) > index_at and args[index_at] is not None
        if indexed and in_dims[index_at] is not None:
            raise ValueError(
                f"{name}: {index} has a vmap dimension, expected none: "
                "it has to be the same for all that vmap runs over"
            )

        def fold(x: Tensor, dim: int | None) -> Tensor:
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.movedim(0, -2).flatten(-2) if indexed else x.flatten(0, 1)

        def unfold(x: Tensor) -> Tensor:
            return x.unflatten(-1 if indexed else 0, (info.batch_size, -1))

        folded = [
            fold(x, dim) if isinstance(x, Tensor) and at != index_at else x
            for at, (x, dim) in enumerate(zip(args, in_dims, strict=True))
        ]
        outputs = tuple(unfold(x) for x in operator(*folded))
        return outputs, tuple(-2 if indexed else 0 for _ in outputs)

    torch.library.register_vmap(f"torch_ext::{name}", rule)


def _register_conv(name: str, index: str) -> None:
    """Parameters have no batch: where they have the dimension, or where the result has one per
    parameter, as in the backward, it is folded into the channels, like where an index names rows."""
    operator = getattr(torch.ops.torch_ext, name)
    arguments = [argument.name for argument in operator.default._schema.arguments]
    index_at = arguments.index(index)
    parameters = [arguments.index("weight"), arguments.index("bias")]
    states = [at for at, argument in enumerate(arguments) if "state" in argument and at != index_at]
    backward = name.endswith("_backward")

    def rule(info, in_dims, *args):
        indexed = len(args) > index_at and args[index_at] is not None
        if indexed and in_dims[index_at] is not None:
            raise ValueError(
                f"{name}: {index} has a vmap dimension, expected none: "
                "it has to be the same for all that vmap runs over"
            )
        own = any(at < len(args) and in_dims[at] is not None for at in parameters)
        by_channels = indexed or own or backward

        def fold(at: int, x: Tensor, dim: int | None) -> Tensor:
            if at in parameters and not by_channels:
                return x
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            if at in parameters or not by_channels:
                return x.flatten(0, 1)  # (D, W) and (D,) begin with the channels
            place = -3 if at in states else -2
            return x.movedim(0, place).flatten(place, place + 1)

        def unfold(x: Tensor, place: int) -> Tensor:
            return x.unflatten(place, (info.batch_size, -1))

        folded = [
            fold(at, x, dim) if isinstance(x, Tensor) and at != index_at else x
            for at, (x, dim) in enumerate(zip(args, in_dims, strict=True))
        ]
        # Where the channels are in y (or x), the weight, the bias and the state.
        places = (-1, 0, 0, -2) if backward else (-1, -2)
        if not by_channels:
            places = (0, 0)
        outputs = tuple(unfold(x, at) for x, at in zip(operator(*folded), places, strict=True))
        return outputs, tuple(at - 1 if at < 0 else at for at in places)

    torch.library.register_vmap(f"torch_ext::{name}", rule)


_register_conv("causal_conv1d", "cu_seqlens")
_register_conv("causal_conv1d_backward", "cu_seqlens")
_register_conv("causal_conv1d_step", "state_indices")

for _name in DIAGONAL:
    _register(_name, "cu_seqlens")
    _register(_name + "_backward", "cu_seqlens")
    _register(_name + "_step", "state_indices")
