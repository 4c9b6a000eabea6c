"""What the layers and blocks of xLSTM have in common: small modules, initial values, checks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._sequence_layer import shape_text
from .linear_scan import state_dtype

# Of one layer or block, in the order that its init_state says.
State = list[Tensor]


class HeadwiseLinear(nn.Module):
    """A linear map of each group of channels: ``weight`` ``(groups, out, in)``."""

    def __init__(
        self,
        channels: int,
        blocksize: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        shape = (channels // blocksize, blocksize, blocksize)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        groups, _, width = self.weight.shape
        y = torch.einsum("...gi,goi->...go", x.unflatten(-1, [groups, width]), self.weight)
        y = y.flatten(-2)
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)  # autocast rounds y alone


class CausalConv1d(nn.Module):
    """What holds the convolution's parameters, as ``conv.weight`` and ``conv.bias``."""

    def __init__(
        self,
        channels: int,
        width: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv1d(
            channels, channels, width, groups=channels, padding=width - 1, **factory
        )


class LayerNorm(nn.LayerNorm):
    """Without a bias, and with ``1 + weight`` as its scale."""

    def __init__(
        self, dim: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__(dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, None, self.eps)


class RMSNorm(nn.Module):
    """Root mean square in float32, then rounded, then scaled."""

    __constants__ = ["eps", "wide"]

    def __init__(
        self,
        dim: int,
        eps: float,
        bias: bool,
        wide: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.wide = wide
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.wide:
            x = x.to(state_dtype(dtype))
        y = F.rms_norm(x, [x.shape[-1]], None, self.eps).to(dtype) * self.weight
        bias = self.bias
        return y if bias is None else y + bias


class MultiHeadNorm(nn.Module):
    """A layer norm of each head: ``(..., H, V)`` to ``(..., H * V)``.

    Args:
        channels: ``H * V``.
        eps: added to the variance.
        residual: the scale is ``1 + weight``, not ``weight``.
        bias: add one.
        wide: compute in float32 where ``x`` is of half precision.
        device: of the parameters.
        dtype: of the parameters.
        weight: have a scale.
    """

    __constants__ = ["eps", "residual", "wide"]

    def __init__(
        self,
        channels: int,
        eps: float,
        residual: bool,
        bias: bool,
        wide: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        weight: bool = True,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.residual = residual
        self.wide = wide
        if weight:
            self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.residual else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.wide:
            x = x.to(state_dtype(dtype))
        y = F.layer_norm(x, [x.shape[-1]], None, None, self.eps).to(dtype).flatten(-2)
        weight = self.weight
        if weight is not None:
            y = y * (1 + weight if self.residual else weight)
        bias = self.bias
        return y if bias is None else y + bias


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)``: near 0 as it is, never beyond ``cap``."""
    return x if cap is None else cap * torch.tanh(x / cap)


def small_init_(weight: Tensor, dim: int) -> None:
    """Nguyen & Salazar 2019, "Transformers without Tears", arXiv:1910.05895."""
    nn.init.normal_(weight, std=math.sqrt(2 / (5 * dim)))


def wang_init_(weight: Tensor, dim: int, num_blocks: int) -> None:
    """For what is added to the residual: smaller, the more blocks there are."""
    nn.init.normal_(weight, std=2 / num_blocks / math.sqrt(dim))


def zero_bias_(*modules: nn.Module) -> None:
    for module in modules:
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_layer_state(name: str, state: State, shapes: list[list[int]], names: list[str]) -> None:
    """That ``state`` is a list of tensors of these shapes, whose ``names`` errors say."""
    if not torch.jit.is_scripting():
        _check_types(name, state, names)
    for k, shape in enumerate(shapes):
        if list(state[k].shape) != shape:
            expected = ", ".join([str(size) for size in shape])
            raise ValueError(
                f"{name}: state[{k}] has shape {shape_text(state[k])}, expected {names[k]} of shape "
                f"({expected})"
            )


@torch.jit.unused
def _check_types(name: str, state: object, names: list[str]) -> None:
    many = isinstance(state, list | tuple)
    if many and len(state) == len(names) and all(isinstance(part, Tensor) for part in state):
        return
    came = type(state).__name__
    if many:
        came = f"[{', '.join(type(part).__name__ for part in state)}]"
    raise TypeError(
        f"{name}: state is {came}, expected a list of {len(names)} tensors ({', '.join(names)}), as "
        "init_state makes it"
    )


def check_sequence(name: str, x: Tensor, dim: int) -> None:
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(
            f"{name}: x has shape {shape_text(x)}, expected (B, T, embedding_dim={dim})"
        )


def check_step(name: str, x: Tensor, dim: int) -> None:
    if x.dim() != 2 or x.shape[1] != dim:
        raise ValueError(
            f"{name}.step: x has shape {shape_text(x)}, expected (B, embedding_dim={dim})"
        )


def no_state_before_padding(name: str, state: State | None, padding: str) -> None:
    if state is not None and padding == "left":
        raise ValueError(
            f"{name}.prefill: state is given, expected None with padding on the left, which would "
            "stand between the state and the first step"
        )


def close_gates(i: Tensor, f: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """In the padding nothing is written and nothing forgotten."""
    if valid is None:
        return i, f
    return torch.where(valid, i, -1e4), torch.where(valid, f, 1e4)
