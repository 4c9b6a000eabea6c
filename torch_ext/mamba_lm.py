r"""The residual block around Mamba, and the language model made of it.

.. math::
    x_0 &= \text{embedding}(\text{ids}) \\
    x_k &= x_{k-1} + \text{Mamba}(\text{norm}(x_{k-1})) \\
    \text{logits} &= \text{lm\_head}(\text{norm}(x_n))

Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752,
section 3.4 and appendix E.2. Parameters have the names, shapes and initial values of
``MambaLMHeadModel`` in the package mamba_ssm.
"""

import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import _checkpoint, _mamba_checkpoint
from ._language_model import LanguageModel, check_ids
from ._padding import last_step
from ._sequence_layer import shape_text
from .mamba import Mamba, State
from .mamba2 import Mamba2


class MambaBlock(nn.Module):
    r"""A residual around a norm and a :class:`torch_ext.Mamba`: ``y = x + mixer(norm(x))``.

    The numbers are those of mamba_ssm's block, which carries ``x`` and what is to be added to it as
    two tensors (add, norm, mixer): here their sum is handed on.

    Args:
        d_model: channels of ``x`` and ``y``.
        d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor,
            conv_bias, bias, layer_idx: see :class:`torch_ext.Mamba`.
        device: of the parameters.
        dtype: of the parameters but the mixer's ``A_log`` and ``D``.
        rms_norm: the norm is an RMSNorm; False makes it a LayerNorm.
        norm_eps: added to the variance in the norm.
        residual_in_fp32: ``y`` is float32 whatever ``x`` and the parameters are (float64 stays), so
            that many blocks do not round the sum each time. The norm sees it before any rounding.
            False keeps the dtype of ``x``.
        bidirectional: see :class:`torch_ext.Mamba`. It has ``forward`` alone.
        ssm_cfg: the mixer and its options by name, as mamba_ssm's configs have them: ``{"layer":
            "Mamba2", "d_state": 64}`` makes it a :class:`torch_ext.Mamba2`, whose norm takes
            ``norm_eps`` too; the arguments from ``d_state`` to ``bias`` are then left alone.

    Attributes:
        norm.weight: ``(d_model,)``; ``norm.bias`` in a LayerNorm.
        mixer: the :class:`torch_ext.Mamba` or :class:`torch_ext.Mamba2`.

    Example:
        >>> block = torch_ext.MambaBlock(16)
        >>> x = torch.randn(2, 10, 16)
        >>> y = block(x)
        >>> first, state = block.prefill(x[:, :9])
        >>> last, state = block.step(x[:, 9], state)
        >>> torch.allclose(torch.cat([first, last[:, None]], 1), y, atol=1e-5)
        True
    """

    __constants__ = ["residual_in_fp32"]

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        bidirectional: bool = False,
        ssm_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.norm = _make_norm(d_model, rms_norm, norm_eps, device, dtype)
        arguments = (
            d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor,
            conv_bias, bias,
        )  # fmt: skip
        given = dict(zip(_mamba_checkpoint.OPTIONS["Mamba1"], arguments, strict=True))
        layer, options = _mamba_checkpoint.layer_options("MambaBlock", given, ssm_cfg)
        factory = {"layer_idx": layer_idx, "device": device, "dtype": dtype}
        if layer == "Mamba2":
            if bidirectional:
                raise ValueError("MambaBlock: bidirectional is True, expected False with Mamba2")
            self.mixer = Mamba2(d_model, **options, **factory, norm_eps=norm_eps)
        else:
            self.mixer = Mamba(d_model, **options, **factory, bidirectional=bidirectional)

    def forward(self, x: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """Runs all steps, from zero states.

        Args:
            x: ``(B, T, d_model)``.
            lengths: number of steps of each row of a padded batch, integers, ``(B,)``. Padding
                changes no result of the others, whatever stands there; its own outputs are 0.
            padding: side on which the padding is, ``"right"`` or ``"left"``.

        Returns:
            ``(B, T, d_model)``.
        """
        x = self._residual(x, lengths, padding)
        return x + self.mixer(self.norm(x), lengths, padding)

    @torch.jit.export
    def prefill(
        self,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        padding: str = "right",
    ) -> tuple[Tensor, State]:
        """``forward`` from a state to a state: see :meth:`torch_ext.Mamba.prefill`."""
        x = self._residual(x, lengths, padding)
        y, state = self.mixer.prefill(self.norm(x), state, lengths, padding)
        return x + y, state

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: see :meth:`torch_ext.Mamba.init_state`."""
        return self.mixer.init_state(batch_size)

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: ``x`` ``(B, d_model)`` and a state to ``(B, d_model)`` and the next state."""
        if x.dim() != 2 or x.shape[1] != self.mixer.d_model:
            raise ValueError(
                f"MambaBlock.step: x has shape {shape_text(x)}, expected "
                f"(B, d_model={self.mixer.d_model})"
            )
        x = self._widen(x)
        y, state = self.mixer.step(self.norm(x), state)
        return x + y, state

    def _widen(self, x: Tensor) -> Tensor:
        return x.float() if self.residual_in_fp32 and x.dtype != torch.float64 else x

    def _residual(self, x: Tensor, lengths: Tensor | None, padding: str) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.mixer.d_model:
            raise ValueError(
                f"MambaBlock: x has shape {shape_text(x)}, expected "
                f"(B, T, d_model={self.mixer.d_model})"
            )
        x = self._widen(x)
        valid = self.mixer._valid(x, lengths, padding)
        # Before the norm, whose gradient would be NaN where the padding is.
        return x if valid is None else torch.where(valid, x, 0.0)


class MambaBackbone(nn.Module):
    """Embedding, blocks and the last norm: what :class:`MambaLM` has as ``backbone``."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layer: int,
        rms_norm: bool,
        norm_eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        activation_checkpointing: bool,
        **block: Any,
    ) -> None:
        super().__init__()
        norm = {"rms_norm": rms_norm, "norm_eps": norm_eps}
        factory = {"device": device, "dtype": dtype}
        self.activation_checkpointing = activation_checkpointing
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        self.layers = nn.ModuleList(
            MambaBlock(d_model, layer_idx=k, **norm, **factory, **block) for k in range(n_layer)
        )
        self.norm_f = _make_norm(d_model, rms_norm, norm_eps, device, dtype)

    def forward(self, ids: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """``ids`` ``(B, T)`` to hidden states ``(B, T, d_model)``, zero in the padding."""
        x, valid = self._embed(ids, lengths, padding)
        # Through each block's forward, where hooks, wrappers and sharding take hold.
        for layer in self.layers:
            if torch.jit.is_scripting():
                x = layer(x, lengths, padding)
            elif self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, lengths, padding, use_reentrant=False)
            else:
                x = layer(x, lengths, padding)
        x = self.norm_f(x)
        return x if valid is None else torch.where(valid, x, 0.0)

    @torch.jit.export
    def prefill(
        self,
        ids: Tensor,
        state: list[State] | None = None,
        lengths: Tensor | None = None,
        padding: str = "right",
        last_only: bool = False,
    ) -> tuple[Tensor, list[State]]:
        """``forward`` from a state to a state; hidden states ``(B, d_model)`` if ``last_only``."""
        if last_only and ids.dim() == 2 and ids.shape[1] == 0:
            raise ValueError("MambaLM: ids has no steps, expected T >= 1 with last_only")
        x, valid = self._embed(ids, lengths, padding)
        if state is not None:
            self._check_state(state)
        new_state: list[State] = []
        for k, layer in enumerate(self.layers):
            layer_state: State | None = None
            if state is not None:
                layer_state = state[k]
            x, after = layer.prefill(x, layer_state, lengths, padding)
            new_state.append(after)
        if last_only:
            x = last_step(x, lengths, padding)
            if valid is not None and lengths is not None:
                valid = (lengths.to(x.device) > 0).unsqueeze(1)
        x = self.norm_f(x)
        if valid is not None:
            x = torch.where(valid, x, 0.0)
        return x, new_state

    @torch.jit.export
    def init_state(self, batch_size: int) -> list[State]:
        state: list[State] = []
        for layer in self.layers:
            state.append(layer.init_state(batch_size))
        return state

    @torch.jit.export
    def step(self, ids: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """One token of each sequence, ``(B,)``, to hidden states ``(B, d_model)`` and a state."""
        if ids.dim() != 1:
            raise ValueError(f"MambaLM.step: ids has shape {shape_text(ids)}, expected (B,)")
        self._check_state(state)
        x = self.embedding(ids)
        new_state: list[State] = []
        for k, layer in enumerate(self.layers):
            x, after = layer.step(x, state[k])
            new_state.append(after)
        return self.norm_f(x), new_state

    def _check_state(self, state: list[State]) -> None:
        if not torch.jit.is_scripting() and not isinstance(state, list | tuple):
            raise TypeError(
                f"MambaLM: state is {type(state).__name__}, expected a list with the state of each "
                f"layer, as init_state makes it"
            )
        if len(state) != len(self.layers):
            raise ValueError(
                f"MambaLM: state has {len(state)} entries, expected n_layer={len(self.layers)}"
            )

    def _embed(
        self, ids: Tensor, lengths: Tensor | None, padding: str
    ) -> tuple[Tensor, Tensor | None]:
        if ids.dim() != 2:
            raise ValueError(f"MambaLM: ids has shape {shape_text(ids)}, expected (B, T)")
        if ids.dtype != torch.int64 and ids.dtype != torch.int32:
            raise TypeError(f"MambaLM: ids has dtype {ids.dtype}, expected torch.int64 or int32")
        valid = self.layers[0].mixer._valid(ids, lengths, padding)
        if valid is not None:
            ids = torch.where(valid.squeeze(2), ids, 0)
        if not torch.jit.is_scripting():
            check_ids("MambaLM", ids, self.embedding.num_embeddings)
        return self.embedding(ids), valid


class MambaLM(LanguageModel):
    r"""A language model of :class:`MambaBlock`: embedding, blocks, norm, logits.

    Args:
        vocab_size: number of tokens.
        d_model: channels of the blocks.
        n_layer: number of blocks.
        d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor,
            conv_bias, bias: see :class:`torch_ext.Mamba`.
        rms_norm, norm_eps, residual_in_fp32: see :class:`MambaBlock`.
        tie_embeddings: ``lm_head.weight`` is ``backbone.embedding.weight``, one parameter.
        pad_vocab_size_multiple: embedding and logits get as many more rows as make their number
            ``V`` a multiple of this. No token has those; ``generate`` never draws them.
        activation_checkpointing: ``forward`` keeps the blocks' inputs alone for the backward and
            computes the rest again (see :mod:`torch.utils.checkpoint`). An attribute of
            ``backbone``, which can be changed at any time.
        ssm_cfg: the layers and their options by name, as mamba_ssm's configs have them: ``{"layer":
            "Mamba2", "d_state": 64}`` makes them :class:`torch_ext.Mamba2`; the arguments from
            ``d_state`` to ``bias`` are then left alone.
        device: of the parameters.
        dtype: of the parameters but the mixers' ``A_log`` and ``D``, which are float32 or wider.

    Attributes:
        backbone.embedding.weight: ``(V, d_model)``, drawn from N(0, 0.02^2).
        backbone.layers.{i}: the blocks; each ``mixer.out_proj.weight`` begins divided by
            ``sqrt(n_layer)``, biases of its projections are 0.
        backbone.norm_f: the last norm.
        lm_head.weight: ``(V, d_model)``.
        config: the arguments above by name, but for ``device`` and ``dtype``.

    Example:
        >>> model = torch_ext.MambaLM(vocab_size=256, d_model=16, n_layer=2)
        >>> prompt = torch.tensor([list(b"Mamba is")])
        >>> model(prompt).shape
        torch.Size([1, 8, 256])
        >>> model.generate(prompt, max_new_tokens=4).shape
        torch.Size([1, 12])
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layer: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        tie_embeddings: bool = True,
        pad_vocab_size_multiple: int = 8,
        *,
        activation_checkpointing: bool = False,
        ssm_cfg: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for argument, value in [
            ("vocab_size", vocab_size),
            ("n_layer", n_layer),
            ("pad_vocab_size_multiple", pad_vocab_size_multiple),
        ]:
            if value < 1:
                raise ValueError(f"MambaLM: {argument} is {value}, expected at least 1")
        given = {
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "dt_rank": dt_rank,
            "dt_min": dt_min,
            "dt_max": dt_max,
            "dt_init": dt_init,
            "dt_scale": dt_scale,
            "dt_init_floor": dt_init_floor,
            "conv_bias": conv_bias,
            "bias": bias,
        }
        layer, options = _mamba_checkpoint.layer_options("MambaLM", given, ssm_cfg)
        if layer == "Mamba2":
            options = {"ssm_cfg": {"layer": layer, **options}}
        block: dict[str, Any] = {**options, "residual_in_fp32": residual_in_fp32}
        self.config = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_layer": n_layer,
            **block,
            "rms_norm": rms_norm,
            "norm_eps": norm_eps,
            "tie_embeddings": tie_embeddings,
            "pad_vocab_size_multiple": pad_vocab_size_multiple,
            "activation_checkpointing": activation_checkpointing,
        }
        self.vocab_size = vocab_size
        rows = math.ceil(vocab_size / pad_vocab_size_multiple) * pad_vocab_size_multiple
        self.backbone = MambaBackbone(
            rows, d_model, n_layer, rms_norm, norm_eps, device, dtype, activation_checkpointing,
            **block,
        )  # fmt: skip
        self.lm_head = nn.Linear(d_model, rows, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(
        self, initializer_range: float = 0.02, rescale_prenorm_residual: bool = True
    ) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``.

        Args:
            initializer_range: standard deviation of the embedding.
            rescale_prenorm_residual: divide ``out_proj.weight`` by ``sqrt(n_layer)``, so that the
                residual's variance at the end does not grow with the number of blocks.
        """
        layers = self.backbone.layers
        for layer in layers:
            mixer = layer.mixer
            layer.norm.reset_parameters()
            mixer.reset_parameters()
            for linear in (mixer.in_proj, mixer.out_proj):
                if linear.bias is not None:
                    linear.bias.zero_()
            if rescale_prenorm_residual:
                mixer.out_proj.weight.div_(math.sqrt(len(layers)))
        self.backbone.norm_f.reset_parameters()
        self.backbone.embedding.weight.normal_(std=initializer_range)
        if self.config["tie_embeddings"]:
            self.lm_head.weight = self.backbone.embedding.weight
        else:
            self.lm_head.reset_parameters()

    def forward(self, ids: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """Logits of the token after each of ``ids``.

        Args:
            ids: ``(B, T)``, int64 or int32.
            lengths: number of tokens of each row of a padded batch, integers, ``(B,)``. Padding
                changes no result of the others, whatever number stands there; its own logits are 0.
            padding: side on which the padding is, ``"right"`` or ``"left"``.

        Returns:
            ``(B, T, V)``, in the dtype of the parameters.
        """
        return self.lm_head(self.backbone(ids, lengths, padding))

    @torch.jit.export
    def prefill(
        self,
        ids: Tensor,
        state: list[State] | None = None,
        lengths: Tensor | None = None,
        padding: str = "right",
        last_only: bool = False,
    ) -> tuple[Tensor, list[State]]:
        """``forward`` from a state to a state: for prompts, streams, truncated backpropagation.

        Args:
            ids: the next tokens of each sequence, ``(B, T)``.
            state: see ``init_state``. Zeros if omitted; it has to be where padding is on the left.
            lengths: as in ``forward``. The state is that after the last token of each row.
            padding: as in ``forward``.
            last_only: logits after the last token of each row alone, which takes ``B * V`` numbers
                of memory in place of ``B * T * V``. They are 0 in rows without tokens.

        Returns:
            Logits ``(B, T, V)``, or ``(B, V)`` if ``last_only``, and the state.

        Example:
            >>> model = torch_ext.MambaLM(vocab_size=256, d_model=16, n_layer=2)
            >>> _, state = model.prefill(torch.zeros(1, 6, dtype=torch.long))
            >>> logits, state = model.prefill(torch.ones(1, 5, dtype=torch.long), state)
            >>> logits, state = model.step(logits[:, -1].argmax(-1), state)
        """
        x, new_state = self.backbone.prefill(ids, state, lengths, padding, last_only)
        return self.lm_head(x), new_state

    @torch.jit.export
    def init_state(self, batch_size: int) -> list[State]:
        """Zeros: a state of :class:`torch_ext.Mamba` for each block, in a list."""
        return self.backbone.init_state(batch_size)

    @torch.jit.export
    def step(self, ids: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """One token of each sequence, ``(B,)``, to logits ``(B, V)`` and the next state."""
        x, new_state = self.backbone.step(ids, state)
        return self.lm_head(x), new_state

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "MambaLM":
        """Loads a checkpoint from a local folder.

        The folder has ``config.json`` and the weights, ``model.safetensors`` or
        ``pytorch_model.bin``, or several such files and their ``.index.json``, in the layout of
        mamba_ssm's ``MambaLMHeadModel`` (Mamba-1 or Mamba-2), or of transformers'
        ``MambaForCausalLM`` or ``Mamba2ForCausalLM``. No package is needed to read them, and no
        code in them is run.

        Args:
            folder: path.
            device: where the parameters are put.
            dtype: of the parameters, see the constructor. That of the checkpoint if omitted.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ValueError: the files are damaged, or describe another model.

        Example:
            >>> import tempfile
            >>> model = torch_ext.MambaLM(vocab_size=256, d_model=16, n_layer=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_pretrained(folder)
            ...     again = torch_ext.MambaLM.from_pretrained(folder, dtype=torch.bfloat16)
            >>> again.lm_head.weight.dtype
            torch.bfloat16
        """
        name = f"{cls.__name__}.from_pretrained"
        config, weights = _mamba_checkpoint.read(name, Path(folder))
        embedding = weights.get("backbone.embedding.weight")
        if dtype is None and embedding is not None and embedding.is_floating_point():
            dtype = embedding.dtype
        with torch.device("meta"):  # nothing is drawn, nor held twice
            model = cls(**config, dtype=dtype)
        tied = {"lm_head.weight": "backbone.embedding.weight"} if config["tie_embeddings"] else {}
        _checkpoint.load(name, model, weights, tied, device)
        return model

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        layout: str = "transformers",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint that :meth:`from_pretrained` and other packages load.

        Args:
            folder: path; made if it is not there.
            layout: ``"transformers"`` writes ``config.json`` and ``model.safetensors`` for
                ``MambaForCausalLM`` or ``Mamba2ForCausalLM``, ``"mamba_ssm"`` ``config.json`` and
                ``pytorch_model.bin`` for ``MambaLMHeadModel``.
            extra: further entries of ``config.json``, such as ``{"eos_token_id": 0}``.

        Raises:
            ValueError: ``layout`` is unknown, or has no room for the model: transformers' Mamba has
                an RMSNorm and a whole number ``expand``, its Mamba2 moreover a norm behind the gate and
                all channels in the scan, mamba_ssm's a ``norm_eps`` of 1e-5.
        """
        name = f"{type(self).__name__}.save_pretrained"
        _mamba_checkpoint.write(name, Path(folder), self, self.config, layout, extra)


class _RMSNorm(nn.RMSNorm):
    """Reads the residual as it is, which may be wider than the parameters, and returns theirs."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        y = F.rms_norm(x, self.normalized_shape, weight.to(x.dtype), self.eps)
        return y.to(weight.dtype)


class _LayerNorm(nn.LayerNorm):
    """See :class:`_RMSNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return y.to(self.weight.dtype)


def _make_norm(
    d_model: int,
    rms_norm: bool,
    norm_eps: float,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    make = _RMSNorm if rms_norm else _LayerNorm
    return make(d_model, eps=norm_eps, device=device, dtype=dtype)
