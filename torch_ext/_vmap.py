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


def _register_selective_scan(name: str, index: str) -> None:
    """The dimension always goes into the channels: then parameters may have it or not. B and C that
    had one group of channels, or a number of them, have one or as many for each that vmap runs
    over."""
    operator = getattr(torch.ops.torch_ext, name)
    arguments = [argument.name for argument in operator.default._schema.arguments]
    index_at = arguments.index(index)
    step, backward = name.endswith("_step"), name.endswith("_backward")
    time_dims = 1 if step else 2  # B and T
    # Where the channels are, counted from the end.
    channels = dict.fromkeys(("grad_y", "u", "delta", "z", "D", "delta_bias"), 1)
    channels |= dict.fromkeys(("A", "grad_final_state", "initial_state", "state"), 2)

    def rule(info, in_dims, *args):
        given = dict(zip(arguments, args, strict=False))
        if given.get(index) is not None and in_dims[index_at] is not None:
            raise ValueError(
                f"{name}: {index} has a vmap dimension, expected none: "
                "it has to be the same for all that vmap runs over"
            )
        size = info.batch_size

        def fold(argument: str, x: Tensor, dim: int | None) -> Tensor:
            if argument == "kept":  # was kept by a call with other channels: it is made again
                return x.new_empty(0)
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            place = channels.get(argument)
            if place is None:  # B or C
                if x.dim() - 1 == 2 and not step:
                    return x.flatten(0, 1)
                grouped = x.dim() - 1 == time_dims + 2
                x = x.movedim(0, time_dims)
                return x.flatten(time_dims, time_dims + 1) if grouped else x
            at = x.dim() - 1 - place
            return x.movedim(0, at).flatten(at, at + 1)

        def unfold(x: Tensor, place: int) -> tuple[Tensor, int]:
            at = x.dim() - place
            return x.unflatten(at, (size, -1)), at

        def unfold_gradient(x: Tensor, argument: str) -> tuple[Tensor, int | None]:
            if argument == "z" and given["z"] is None:
                return x, None
            if argument not in ("B", "C"):
                return unfold(x, channels[argument])
            original = given[argument]
            dims = original.dim() - (in_dims[arguments.index(argument)] is not None)
            if dims == 3:
                return x, 2
            return x.unflatten(dims - 2, (size, -1)), dims - 2

        folded = {
            argument: fold(argument, x, dim) if isinstance(x, Tensor) and argument != index else x
            for argument, x, dim in zip(arguments, args, in_dims, strict=False)
            if argument != "checkpoints"
        }
        outputs = operator(**folded)
        if backward:
            of = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
            pairs = [unfold_gradient(x, a) for x, a in zip(outputs, of, strict=True)]
        else:
            pairs = [unfold(outputs[0], 1), unfold(outputs[1], 2)]
            pairs += [(x, None) for x in outputs[2:]]
        unfolded, dims = zip(*pairs, strict=True)
        return unfolded, dims

    torch.library.register_vmap(f"torch_ext::{name}", rule)


_register_selective_scan("selective_scan", "cu_seqlens")
_register_selective_scan("selective_scan_backward", "cu_seqlens")
_register_selective_scan("selective_scan_step", "state_indices")


def _register_matrix_memory(name: str) -> None:
    """Folded into the batch, or, where sequences are packed, into the heads."""
    operator = getattr(torch.ops.torch_ext, name)
    arguments = [argument.name for argument in operator.default._schema.arguments]
    index_at = arguments.index("cu_seqlens")
    # Where the heads are, counted from the end.
    of_heads = dict.fromkeys(("q", "k", "v", "grad_h", "n", "grad_n"), 2)
    of_heads |= dict.fromkeys(("C", "grad_C"), 3)
    gates = ("log_decay", "log_input", "input_scale")
    of_heads |= dict.fromkeys((*gates, "m", "grad_m"), 1)
    backward = name.endswith("_backward")
    outputs_of = (
        ("q", "k", "v", *gates, "C", "n", "m") if backward else ("v", "C", "n", "m", "kept")
    )

    def rule(info, in_dims, *args):
        packed = len(args) > index_at and args[index_at] is not None
        if packed and in_dims[index_at] is not None:
            raise ValueError(
                f"{name}: cu_seqlens has a vmap dimension, expected none: "
                "it has to be the same for all that vmap runs over"
            )
        size = info.batch_size

        def fold(argument: str, x: Tensor, dim: int | None) -> Tensor:
            if argument == "kept":  # was kept by a call of other sizes: it is made again
                return x.new_empty(0)
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            if x.numel() == 0 and x.dim() == 2 and argument.startswith("grad_"):
                return x[0]  # of a state that there is not
            if not packed:
                return x.flatten(0, 1)
            at = x.dim() - 1 - of_heads[argument]
            return x.movedim(0, at).flatten(at, at + 1)

        def unfold(argument: str, x: Tensor) -> tuple[Tensor, int | None]:
            if argument == "kept" or (x.dim() == 1 and x.numel() == 0):
                return x, None
            at = x.dim() - of_heads[argument] if packed else 0
            return x.unflatten(at, (size, -1)), at

        folded = {
            argument: fold(argument, x, dim)
            if isinstance(x, Tensor) and argument != "cu_seqlens"
            else x
            for argument, x, dim in zip(arguments, args, in_dims, strict=False)
            if argument != "checkpoints"
        }
        pairs = [
            unfold(argument, x) for argument, x in zip(outputs_of, operator(**folded), strict=True)
        ]
        unfolded, dims = zip(*pairs, strict=True)
        return unfolded, dims

    torch.library.register_vmap(f"torch_ext::{name}", rule)


_register_matrix_memory("matrix_memory")
_register_matrix_memory("matrix_memory_backward")
