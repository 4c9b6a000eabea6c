"""Teaches torch.func.vmap about the operators.

Rows of the batch and channels are independent in all of them, so the dimension that vmap adds is
folded into the batch, or, where the one row is made of packed sequences, into the channels; and
unfolded from every output.
"""

import torch
from torch import Tensor

OPERATORS = ["linear_scan", "min_gru", "min_lstm"]


def _register(name: str) -> None:
    operator = getattr(torch.ops.torch_ext, name)
    arguments = [argument.name for argument in operator.default._schema.arguments]
    packed_at = arguments.index("cu_seqlens")

    def rule(info, in_dims, *args):
        # Trailing arguments that have their default value may be absent.
        packed = len(args) > packed_at and args[packed_at] is not None
        if packed and in_dims[packed_at] is not None:
            raise ValueError(
                f"{name}: cu_seqlens has a vmap dimension, expected none: "
                "all sequences of a batch must be packed alike"
            )

        def fold(x: Tensor, dim: int | None) -> Tensor:
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.movedim(0, -2).flatten(-2) if packed else x.flatten(0, 1)

        def unfold(x: Tensor) -> Tensor:
            return x.unflatten(-1 if packed else 0, (info.batch_size, -1))

        folded = [
            fold(x, dim) if isinstance(x, Tensor) and at != packed_at else x
            for at, (x, dim) in enumerate(zip(args, in_dims, strict=True))
        ]
        outputs = tuple(unfold(x) for x in operator(*folded))
        return outputs, tuple(-2 if packed else 0 for _ in outputs)

    torch.library.register_vmap(f"torch_ext::{name}", rule)


for _name in OPERATORS:
    _register(_name)
    _register(_name + "_backward")
