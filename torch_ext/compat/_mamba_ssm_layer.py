"""mamba_ssm's ``Mamba`` and ``Mamba2``: ours with the peer's ``forward``, ``step`` and caches."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mamba import Mamba as _Mamba
from ..mamba2 import Mamba2 as _Mamba2
from ..mamba2 import limited_steps
from ._common import check_indices, check_shape
from ._mamba_ssm_ops import selective_state_update
from ._mamba_ssm_ssd import packed
from .causal_conv1d import causal_conv1d_update

__all__ = ["Mamba", "Mamba2"]


class _Cached:
    """The peer's caches, for a layer with ``init_state``, ``prefill`` and the peer's ``step``."""

    def _continue(self, hidden_states: Tensor, inference_params: Any) -> Tensor:
        name = type(self).__name__
        check_shape(name, "hidden_states", hidden_states, B=None, L=None, d_model=self.d_model)
        batch_size, steps, _ = hidden_states.shape
        conv_state, ssm_state = self._get_states_from_cache(inference_params, batch_size)
        first = inference_params.seqlen_offset == 0
        if not first and steps == 1:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        if steps == 0:
            return hidden_states
        state = self.init_state(batch_size)
        if first:
            conv_state.zero_()
        else:
            # Copies, as the backward needs them, where there is one.
            state = (
                conv_state[..., 1:].to(state[0].dtype, copy=True),
                ssm_state.to(state[1].dtype, copy=True),
            )
        y, (conv, scan) = self.prefill(hidden_states, state)
        # The input that only the cache has.
        if steps >= self.d_conv:
            oldest = self._conv_inputs(hidden_states[:, steps - self.d_conv])
        else:
            oldest = conv_state[..., steps].clone()
        conv_state.copy_(torch.cat([oldest[..., None].to(conv.dtype), conv], -1))
        ssm_state.copy_(scan)
        return y

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Zeros: ``conv_state`` and ``ssm_state``. Their size does not depend on ``max_seqlen``."""
        conv, scan = self.init_state(batch_size)
        shape = (*conv.shape[:2], self.d_conv)
        return conv.new_zeros(shape, dtype=dtype or self.conv1d.weight.dtype), scan.to(
            dtype or scan.dtype
        )

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        name = type(self).__name__
        if self.layer_idx is None:
            raise ValueError(
                f"{name}: layer_idx is None, expected a number beside inference_params"
            )
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        conv_state, ssm_state = caches[self.layer_idx]
        if conv_state.shape[0] != batch_size:
            raise ValueError(
                f"{name}: hidden_states has B={batch_size}, expected that of the cache, "
                f"{conv_state.shape[0]}"
            )
        if initialize_states:
            conv_state.zero_()
            ssm_state.zero_()
        return conv_state, ssm_state


class Mamba(_Cached, _Mamba):
    """mamba_ssm's ``Mamba``: constructor and parameters as :class:`torch_ext.Mamba`.

    Its caches are ``conv_state`` ``(B, d_inner, d_conv)``, the last inputs of the convolution (one
    more than it needs), and ``ssm_state`` ``(B, d_inner, d_state)``, both overwritten. The scan's
    states are float32 whatever the parameters are, unless ``allocate_inference_cache`` is given a
    dtype.

    Example:
        >>> from torch_ext.compat.mamba_ssm import InferenceParams, Mamba
        >>> mamba, x = Mamba(16, layer_idx=0), torch.randn(2, 10, 16)
        >>> params = InferenceParams(max_seqlen=10, max_batch_size=2)
        >>> with torch.no_grad():
        ...     first = mamba(x[:, :9], inference_params=params)
        ...     params.seqlen_offset += 9
        ...     last = mamba(x[:, 9:], inference_params=params)
        ...     torch.allclose(torch.cat([first, last], 1), mamba(x), atol=1e-5)
        True
    """

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """Runs all steps.

        Args:
            hidden_states: ``(B, L, d_model)``.
            inference_params: an :class:`InferenceParams`. With ``seqlen_offset == 0`` the layer
                starts from zeros and fills its cache, otherwise it goes on from there, with one
                step or (unlike the peer) several.

        Returns:
            ``(B, L, d_model)``.
        """
        if inference_params is None:
            return super().forward(hidden_states)
        return self._continue(hidden_states, inference_params)

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step.

        Args:
            hidden_states: ``(B, 1, d_model)``.
            conv_state: ``(B, d_inner, d_conv)``, overwritten.
            ssm_state: ``(B, d_inner, d_state)``, overwritten.

        Returns:
            ``(B, 1, d_model)``, and the two states.
        """
        where, batch_size = "Mamba.step", conv_state.shape[0]
        if self.bidirectional:
            raise RuntimeError(
                "Mamba.step: the layer is bidirectional, expected one direction: "
                "the second one starts from the last step"
            )
        check_shape(where, "hidden_states", hidden_states, B=batch_size, L=1, d_model=self.d_model)
        check_shape(
            where, "conv_state", conv_state, B=None, d_inner=self.d_inner, d_conv=self.d_conv
        )
        check_shape(
            where, "ssm_state", ssm_state, B=batch_size, d_inner=self.d_inner, d_state=self.d_state
        )
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, -1)
        x = causal_conv1d_update(
            x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu"
        )
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        y = selective_state_update(
            ssm_state, x, F.linear(dt, self.dt_proj.weight), -torch.exp(self.A_log), B, C, self.D,
            z=z, dt_bias=self.dt_proj.bias, dt_softplus=True,
        )  # fmt: skip
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state


class Mamba2(_Cached, _Mamba2):
    """mamba_ssm's ``Mamba2``: constructor and parameters as :class:`torch_ext.Mamba2`.

    Its caches are ``conv_state`` ``(B, d_ssm + 2 * ngroups * d_state, d_conv)``, the last inputs of
    the convolution (one more than it needs), and ``ssm_state`` ``(B, H, headdim, d_state)``, both
    overwritten. The scan's states are float32 whatever the parameters are, unless
    ``allocate_inference_cache`` is given a dtype. Unlike the peer's, ``step`` keeps to ``dt_limit``
    and takes every option.

    Example:
        >>> from torch_ext.compat.mamba_ssm import InferenceParams, Mamba2
        >>> mamba, x = Mamba2(16, d_state=8, headdim=4, layer_idx=0), torch.randn(2, 10, 16)
        >>> params = InferenceParams(max_seqlen=10, max_batch_size=2)
        >>> with torch.no_grad():
        ...     first = mamba(x[:, :9], inference_params=params)
        ...     params.seqlen_offset += 9
        ...     last = mamba(x[:, 9:], inference_params=params)
        ...     torch.allclose(torch.cat([first, last], 1), mamba(x), atol=1e-5)
        True
    """

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Runs all steps.

        Args:
            u: ``(B, L, d_model)``, or ``(B * L, d_model)`` with ``seqlen``.
            seqlen: ``L``.
            seq_idx: number of the sequence to which each step belongs, where several stand in one
                row, int32 or int64, ``(B, L)``. A new sequence begins wherever it changes.
            cu_seqlens: where sequences stand end to end in the one row, int32 or int64,
                ``(num_sequences + 1,)``.
            inference_params: an :class:`InferenceParams`. With ``seqlen_offset == 0`` the layer
                starts from zeros and fills its cache, otherwise it goes on from there, with one
                step or (unlike the peer) several.

        Returns:
            As ``u``.
        """
        shape = u.shape
        if seqlen is not None:
            u = u.unflatten(0, (-1, seqlen))
        if inference_params is not None:
            if seq_idx is not None or cu_seqlens is not None:
                raise ValueError(
                    "Mamba2: inference_params is given, expected None beside seq_idx or cu_seqlens"
                )
            return self._continue(u, inference_params).view(shape)
        if seq_idx is None and cu_seqlens is None:
            return super().forward(u).view(shape)
        return run_packed(self, u, seq_idx, cu_seqlens).view(shape)

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step.

        Args:
            hidden_states: ``(B, 1, d_model)``.
            conv_state: ``(B, d_ssm + 2 * ngroups * d_state, d_conv)``, overwritten.
            ssm_state: ``(B, H, headdim, d_state)``, overwritten.

        Returns:
            ``(B, 1, d_model)``, and the two states.
        """
        where, batch_size = "Mamba2.step", conv_state.shape[0]
        check_shape(where, "hidden_states", hidden_states, B=batch_size, L=1, d_model=self.d_model)
        check_shape(
            where, "conv_state", conv_state, B=None, channels=self.conv_dim, d_conv=self.d_conv
        )
        check_shape(
            where, "ssm_state", ssm_state, B=batch_size, H=self.nheads, headdim=self.headdim,
            d_state=self.d_state,
        )  # fmt: skip
        projected = self.in_proj(hidden_states.squeeze(1))
        mlp, z, inner, dt = projected.split(self._parts, -1)
        u = causal_conv1d_update(
            inner, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu"
        )
        x, B, C = self._heads(u)
        dt, size = limited_steps(dt, self.dt_bias, True, self.dt_limit), ssm_state.shape
        A = -torch.exp(self.A_log)
        y = selective_state_update(
            ssm_state, x, dt[..., None].expand(x.shape), A.view(-1, 1, 1).expand(size[1:]), B, C,
            self.D.view(self.nheads, -1).expand(size[1:3]), self._gate(z),
        )  # fmt: skip
        y = self._finish(y.to(projected.dtype), z, mlp)
        return y.unsqueeze(1), conv_state, ssm_state


def run_packed(
    layer: _Mamba2, u: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The layer on several sequences in each row of ``u`` ``(B, L, d_model)``."""
    check_shape("Mamba2", "u", u, B=None, L=None, d_model=layer.d_model)
    if cu_seqlens is not None:
        check_indices("Mamba2", "cu_seqlens", cu_seqlens, **{"num_sequences + 1": None})
        if u.shape[0] != 1:
            raise ValueError(f"Mamba2: u has B={u.shape[0]}, expected 1 with cu_seqlens")
    else:
        check_indices("Mamba2", "seq_idx", seq_idx, B=u.shape[0], L=u.shape[1])
        cu_seqlens = packed(seq_idx)
    state = layer.init_state(len(cu_seqlens) - 1)
    return layer._run(u.flatten(0, 1).unsqueeze(0), state, None, cu_seqlens)[0].view(u.shape)
