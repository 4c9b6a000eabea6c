r"""The language models of xLSTM: the paper's, and xLSTM-7B.

.. math::
    x_0 &= \text{embedding}(\text{ids}) \\
    x_k &= \text{block}_k(x_{k-1}) \\
    \text{logits} &= \text{lm\_head}(\text{norm}(x_n))

Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517 (:class:`xLSTMLM`);
Beck et al. 2025, "xLSTM 7B: A Recurrent LLM for Fast and Efficient Inference", arXiv:2503.13427
(:class:`xLSTMLarge`). Parameters have the names and shapes of the package xlstm.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _checkpoint, _xlstm_checkpoint
from ._language_model import LanguageModel, check_ids
from ._padding import valid_steps
from ._sequence_layer import shape_text
from ._xlstm_config import (
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    read_config,
    xLSTMLargeConfig,
    xLSTMLMModelConfig,
)
from .xlstm import (
    LargeBlockStack,
    State,
    read_large_config,
    small_init_,
    soft_cap,
    xLSTMBlockStack,
)


class XLSTMBase(LanguageModel):
    """What both kinds have in common: tokens in, logits out, states, checkpoints."""

    # Where the parts are, which have other names in each.
    def _embed(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def _blocks(self, x: Tensor, lengths: Tensor | None, padding: str) -> Tensor:
        raise NotImplementedError

    def _blocks_prefill(
        self,
        x: Tensor,
        state: list[State] | None,
        lengths: Tensor | None,
        padding: str,
        last_only: bool,
    ) -> tuple[Tensor, list[State]]:
        raise NotImplementedError

    def _blocks_step(self, x: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        raise NotImplementedError

    def _logits(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, ids: Tensor, lengths: Tensor | None = None, padding: str = "right") -> Tensor:
        """Logits of the token after each of ``ids``.

        Args:
            ids: ``(B, T)``, int64 or int32.
            lengths: number of tokens of each row of a padded batch, integers, ``(B,)``. Padding
                changes no result of the others, whatever number stands there; its own logits are 0.
            padding: side on which the padding is, ``"right"`` or ``"left"``.

        Returns:
            ``(B, T, vocab_size)``, in the dtype of the parameters.
        """
        x = self._embed(self._tokens(ids, lengths, padding))
        return self._logits(self._blocks(x, lengths, padding))

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
            Logits ``(B, T, vocab_size)``, or ``(B, vocab_size)`` if ``last_only``, and the state.
        """
        ids = self._tokens(ids, lengths, padding)
        if last_only and ids.shape[1] == 0:
            raise ValueError("xLSTM: ids has no steps, expected T >= 1 with last_only")
        x = self._embed(ids)
        x, new_state = self._blocks_prefill(x, state, lengths, padding, last_only)
        return self._logits(x), new_state

    @torch.jit.export
    def step(self, ids: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """One token of each sequence, ``(B,)``, to logits ``(B, vocab_size)`` and the next
        state."""
        return self._step(ids, state)

    def _step(self, ids: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        if ids.dim() != 1:
            raise ValueError(f"xLSTM.step: ids has shape {shape_text(ids)}, expected (B,)")
        x, new_state = self._blocks_step(self._embed(ids), state)
        return self._logits(x), new_state

    def _tokens(self, ids: Tensor, lengths: Tensor | None, padding: str) -> Tensor:
        """``ids``, with any token in the padding."""
        if ids.dim() != 2:
            raise ValueError(f"xLSTM: ids has shape {shape_text(ids)}, expected (B, T)")
        if ids.dtype != torch.int64 and ids.dtype != torch.int32:
            raise TypeError(f"xLSTM: ids has dtype {ids.dtype}, expected torch.int64 or int32")
        valid = valid_steps("xLSTM", ids, lengths, padding)
        if valid is not None:
            ids = torch.where(valid.squeeze(2), ids, 0)
        if not torch.jit.is_scripting():
            check_ids("xLSTM", ids, self.vocab_size)
        return ids

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight_mode: str | None = None,
    ) -> "xLSTMLM | xLSTMLarge":
        """Loads a checkpoint from a local folder.

        The folder has ``config.json`` or ``config.yaml`` and the weights, in one of three layouts:
        that of the package xlstm's ``xLSTMLMModel`` (the fields of its config, on their own or as
        ``model`` of a training's config), of its ``xLSTMLarge``, such as xLSTM-7B, or of
        transformers' ``xLSTMForCausalLM``. The weights are ``model.safetensors`` or
        ``pytorch_model.bin``, several such files and their ``.index.json``, or
        ``model_0.safetensors``, ``model_1.safetensors`` and so on, or one file of another name, such
        as ``model.pt``: a ``state_dict``, or a mapping with one as ``state_dict``,
        ``model_state_dict`` or ``model``. No package is needed to read them, and no code in them is
        run.

        Args:
            folder: path.
            device: where the parameters are put.
            dtype: of the parameters. That of the checkpoint if omitted.
            weight_mode: for :class:`xLSTMLarge`, ``"single"`` or ``"fused"``: matrices are put
                together or taken apart where the checkpoint has them otherwise. As the checkpoint
                has them if omitted.

        Returns:
            An :class:`xLSTMLM` or an :class:`xLSTMLarge`, whichever the checkpoint is of.
            ``xLSTMLarge.from_pretrained`` takes those of its kind alone.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ValueError: the files are damaged, or describe another model.
            NotImplementedError: a block is an sLSTM block.

        Example:
            >>> import tempfile
            >>> model = torch_ext.xLSTMLM(vocab_size=256, embedding_dim=16, num_blocks=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_pretrained(folder)
            ...     again = torch_ext.xLSTMLM.from_pretrained(folder, dtype=torch.bfloat16)
            >>> again.lm_head.weight.dtype
            torch.bfloat16
        """
        name = f"{cls.__name__}.from_pretrained"
        kind, config, weights = _xlstm_checkpoint.read(name, Path(folder))
        made = xLSTMLarge if kind == "xlstm_large" else xLSTMLM
        if cls is not xLSTMLM and not issubclass(cls, made):
            raise ValueError(f"{name}: {folder} has an {made.__name__}, expected an {cls.__name__}")
        made = cls if issubclass(cls, made) else made
        if weight_mode is not None and kind != "xlstm_large":
            raise ValueError(
                f"{name}: weight_mode is {weight_mode!r}, expected None: {folder} has an xLSTMLM, "
                "of which there is one mode"
            )
        here = config.get("weight_mode")
        if weight_mode is not None:
            config["weight_mode"] = weight_mode
        embedding = weights.get("embedding.weight", weights.get("token_embedding.weight"))
        if dtype is None and embedding is not None and embedding.is_floating_point():
            dtype = embedding.dtype
        with torch.device("meta"):  # nothing is drawn, nor held twice
            model = made.from_config(config, dtype=dtype)
        if here is not None and here != config["weight_mode"]:
            rows = _xlstm_checkpoint.block_rows(model.backbone.blocks[0])
            weights = _xlstm_checkpoint.convert(weights, config["weight_mode"], rows)
        tied = {}
        if kind == "xlstm" and model._config.tie_weights:
            tied = {"lm_head.weight": "token_embedding.weight"}
        _checkpoint.load(name, model, weights, tied, device)
        return model


class xLSTMLM(XLSTMBase):
    r"""The language model of the xLSTM paper: embedding, :class:`xLSTMBlockStack`, logits.

    Args:
        vocab_size: number of tokens.
        embedding_dim: channels of the blocks.
        num_blocks: number of blocks.
        num_heads, proj_factor, conv1d_kernel_size, qkv_proj_blocksize, bias, dropout,
            round_proj_up_dim_up, round_proj_up_to_multiple_of: see :class:`torch_ext.mLSTMLayer`.
        add_post_blocks_norm: False leaves out the norm after the blocks.
        tie_weights: ``lm_head.weight`` is ``token_embedding.weight``, one parameter.
        add_embedding_dropout: ``dropout`` acts on the embedding as well.
        slstm_at: numbers of the blocks that are sLSTM blocks.
        activation_checkpointing: ``forward`` keeps the blocks' inputs alone for the backward and
            computes the rest again (see :mod:`torch.utils.checkpoint`). An attribute of
            ``xlstm_block_stack``, which can be changed at any time.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        NotImplementedError: ``slstm_at`` is not empty.

    Attributes:
        xlstm_block_stack: ``blocks.{i}``, each an :class:`torch_ext.mLSTMBlock`, and
            ``post_blocks_norm``.
        token_embedding.weight: ``(vocab_size, embedding_dim)``, drawn from
            N(0, 2 / (5 embedding_dim)), as is:
        lm_head.weight: ``(vocab_size, embedding_dim)``.
        config: the arguments above by name, but for ``device`` and ``dtype``.

    Example:
        >>> model = torch_ext.xLSTMLM(vocab_size=256, embedding_dim=16, num_blocks=2)
        >>> prompt = torch.tensor([list(b"xLSTM is")])
        >>> model(prompt).shape
        torch.Size([1, 8, 256])
        >>> model.generate(prompt, max_new_tokens=4).shape
        torch.Size([1, 12])
    """

    _stack_class = xLSTMBlockStack

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        num_blocks: int,
        num_heads: int = 4,
        proj_factor: float = 2.0,
        conv1d_kernel_size: int = 4,
        qkv_proj_blocksize: int = 4,
        bias: bool = False,
        dropout: float = 0.0,
        add_post_blocks_norm: bool = True,
        tie_weights: bool = False,
        add_embedding_dropout: bool = False,
        slstm_at: Sequence[int] = (),
        round_proj_up_dim_up: bool = True,
        round_proj_up_to_multiple_of: int = 64,
        *,
        activation_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer = mLSTMLayerConfig(
            proj_factor=proj_factor,
            round_proj_up_dim_up=round_proj_up_dim_up,
            round_proj_up_to_multiple_of=round_proj_up_to_multiple_of,
            conv1d_kernel_size=conv1d_kernel_size,
            qkv_proj_blocksize=qkv_proj_blocksize,
            num_heads=num_heads,
        )
        config = xLSTMLMModelConfig(
            mlstm_block=mLSTMBlockConfig(mlstm=layer),
            num_blocks=num_blocks,
            embedding_dim=embedding_dim,
            add_post_blocks_norm=add_post_blocks_norm,
            bias=bias,
            dropout=dropout,
            slstm_at=list(slstm_at),
            vocab_size=vocab_size,
            tie_weights=tie_weights,
            add_embedding_dropout=add_embedding_dropout,
        )
        self._init(config, activation_checkpointing, device, dtype)

    def _init(
        self,
        config: xLSTMLMModelConfig,
        activation_checkpointing: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """The constructor, from the package's config."""
        nn.Module.__init__(self)
        name = type(self).__name__
        if config.vocab_size < 1:
            raise ValueError(f"{name}: vocab_size is {config.vocab_size}, expected at least 1")
        stack = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        for key in ("vocab_size", "tie_weights", "weight_decay_on_embedding"):
            del stack[key]
        del stack["add_embedding_dropout"]
        self._config = config
        self.vocab_size = config.vocab_size
        self.xlstm_block_stack = self._stack_class(
            stack, device=device, dtype=dtype, activation_checkpointing=activation_checkpointing
        )
        factory = {"device": device, "dtype": dtype}
        self.token_embedding = nn.Embedding(config.vocab_size, config.embedding_dim, **factory)
        self.emb_dropout = nn.Dropout(config.dropout if config.add_embedding_dropout else 0.0)
        self.lm_head = nn.Linear(config.embedding_dim, config.vocab_size, bias=False, **factory)
        layer = config.mlstm_block.mlstm
        self.config = {
            "vocab_size": config.vocab_size,
            "embedding_dim": config.embedding_dim,
            "num_blocks": config.num_blocks,
            "num_heads": layer.num_heads,
            "proj_factor": layer.proj_factor,
            "conv1d_kernel_size": layer.conv1d_kernel_size,
            "qkv_proj_blocksize": layer.qkv_proj_blocksize,
            "bias": config.bias,
            "dropout": config.dropout,
            "add_post_blocks_norm": config.add_post_blocks_norm,
            "tie_weights": config.tie_weights,
            "add_embedding_dropout": config.add_embedding_dropout,
            "slstm_at": list(config.slstm_at),
            "round_proj_up_dim_up": layer.round_proj_up_dim_up,
            "round_proj_up_to_multiple_of": layer.round_proj_up_to_multiple_of,
            "activation_checkpointing": activation_checkpointing,
        }
        self._reset_vocabulary()

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        activation_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "xLSTMLM":
        """The model of an ``xLSTMLMModelConfig`` of the package xlstm, or of any object or mapping
        with such fields.

        Example:
            >>> config = {"mlstm_block": {"mlstm": {"num_heads": 2}}, "num_blocks": 2}
            >>> config |= {"vocab_size": 256, "embedding_dim": 16}
            >>> torch_ext.xLSTMLM.from_config(config).config["num_heads"]
            2
        """
        model = cls.__new__(cls)
        config = read_config(xLSTMLMModelConfig, cls.__name__, config)
        model._init(config, activation_checkpointing, device, dtype)
        return model

    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``."""
        self.xlstm_block_stack.reset_parameters()
        self._reset_vocabulary()

    def _reset_vocabulary(self) -> None:
        dim = self._config.embedding_dim
        small_init_(self.token_embedding.weight, dim)
        if self._config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight
        else:
            small_init_(self.lm_head.weight, dim)

    @torch.jit.export
    def init_state(self, batch_size: int) -> list[State]:
        """Zeros: the state of each block, see :meth:`torch_ext.mLSTMLayer.init_state`."""
        return self.xlstm_block_stack.init_state(batch_size)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.emb_dropout(self.token_embedding(ids))

    def _blocks(self, x: Tensor, lengths: Tensor | None, padding: str) -> Tensor:
        return self.xlstm_block_stack(x, lengths, padding)

    def _blocks_prefill(
        self,
        x: Tensor,
        state: list[State] | None,
        lengths: Tensor | None,
        padding: str,
        last_only: bool,
    ) -> tuple[Tensor, list[State]]:
        return self.xlstm_block_stack.prefill(x, state, lengths, padding, last_only)

    def _blocks_step(self, x: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        return self.xlstm_block_stack._step(x, state)

    def _logits(self, x: Tensor) -> Tensor:
        return self.lm_head(x)

    def save_pretrained(
        self, folder: str | PathLike[str], extra: Mapping[str, Any] | None = None
    ) -> None:
        """Writes ``config.json``, with the fields of the package's ``xLSTMLMModelConfig``, and
        ``model.safetensors``, which its ``load_state_dict`` takes.

        Args:
            folder: path; made if it is not there.
            extra: further entries of ``config.json``, whose names begin with an underscore.
        """
        _xlstm_checkpoint.write_xlstm(Path(folder), self, self._config, extra or {})


class xLSTMLarge(XLSTMBase):
    r"""xLSTM-7B, in any size: embedding, :class:`torch_ext.xLSTMLargeBlock`, norm, capped logits.

    Args:
        vocab_size: number of tokens.
        embedding_dim: channels of the blocks.
        num_blocks: number of blocks.
        num_heads, qk_dim_factor, v_dim_factor, gate_soft_cap, ffn_proj_factor,
            ffn_round_up_to_multiple_of, use_bias, norm_eps, norm_reduction_force_float32, eps,
            weight_mode: see :class:`torch_ext.xLSTMLargeBlock`.
        add_out_norm: False leaves out the norm after the blocks.
        output_logit_soft_cap: logits are ``cap * tanh(logits / cap)``. None leaves it out.
        input_gate: ``"exp"``, or ``"sigmoid"``: see :func:`torch_ext.mlstm`.
        activation_checkpointing: ``forward`` keeps the blocks' inputs alone for the backward and
            computes the rest again (see :mod:`torch.utils.checkpoint`). An attribute of
            ``backbone``, which can be changed at any time.
        device: of the parameters.
        dtype: of the parameters. States are float32, and float64 if they are.

    Attributes:
        embedding.weight: ``(vocab_size, embedding_dim)``, drawn from N(0, 2 / (5 embedding_dim)), as
            is ``lm_head.weight``.
        backbone: ``blocks.{i}``, each a :class:`torch_ext.xLSTMLargeBlock`, and ``out_norm``.
        lm_head.weight: ``(vocab_size, embedding_dim)``.
        config: the arguments above by name, but for ``device`` and ``dtype``.

    Example:
        >>> model = torch_ext.xLSTMLarge(vocab_size=256, embedding_dim=16, num_blocks=2, num_heads=2)
        >>> prompt = torch.tensor([list(b"xLSTM is")])
        >>> model(prompt).shape
        torch.Size([1, 8, 256])
        >>> model.generate(prompt, max_new_tokens=4).shape
        torch.Size([1, 12])
    """

    _stack_class = LargeBlockStack
    output_logit_soft_cap: float | None

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        num_blocks: int,
        num_heads: int,
        qk_dim_factor: float = 0.5,
        v_dim_factor: float = 1.0,
        ffn_proj_factor: float = 2.6667,
        ffn_round_up_to_multiple_of: int = 64,
        gate_soft_cap: float | None = 15.0,
        output_logit_soft_cap: float | None = 30.0,
        use_bias: bool = False,
        add_out_norm: bool = True,
        norm_eps: float = 1e-6,
        norm_reduction_force_float32: bool = True,
        eps: float = 1e-6,
        weight_mode: str = "single",
        input_gate: str = "exp",
        *,
        activation_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernels = {
            "exp": "chunkwise--native_autograd",
            "sigmoid": "parallel--native_siging_autograd",
        }
        if input_gate not in kernels:
            raise ValueError(
                f'xLSTMLarge: input_gate is {input_gate!r}, expected "exp" or "sigmoid"'
            )
        config = xLSTMLargeConfig(
            embedding_dim=embedding_dim,
            num_heads=num_heads,
            num_blocks=num_blocks,
            vocab_size=vocab_size,
            use_bias=use_bias,
            norm_eps=norm_eps,
            norm_reduction_force_float32=norm_reduction_force_float32,
            add_out_norm=add_out_norm,
            qk_dim_factor=qk_dim_factor,
            v_dim_factor=v_dim_factor,
            chunkwise_kernel=kernels[input_gate],
            sequence_kernel="native_sequence__native",
            step_kernel="native",
            mode="inference",
            return_last_states=True,
            eps=eps,
            ffn_proj_factor=ffn_proj_factor,
            ffn_round_up_to_multiple_of=ffn_round_up_to_multiple_of,
            gate_soft_cap=gate_soft_cap,
            output_logit_soft_cap=output_logit_soft_cap,
            weight_mode=weight_mode,
        )
        self._init(config, activation_checkpointing, device, dtype)

    def _init(
        self,
        config: xLSTMLargeConfig,
        activation_checkpointing: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """The constructor, from the package's config."""
        nn.Module.__init__(self)
        name = type(self).__name__
        config = read_large_config(name, config, {})
        if config.vocab_size < 1:
            raise ValueError(f"{name}: vocab_size is {config.vocab_size}, expected at least 1")
        self._config = config
        self.vocab_size = config.vocab_size
        self.output_logit_soft_cap = config.output_logit_soft_cap
        factory = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim, **factory)
        self.backbone = self._stack_class(
            config, device=device, dtype=dtype, activation_checkpointing=activation_checkpointing
        )
        self.lm_head = nn.Linear(config.embedding_dim, config.vocab_size, bias=False, **factory)
        names = (
            "vocab_size", "embedding_dim", "num_blocks", "num_heads", "qk_dim_factor",
            "v_dim_factor", "ffn_proj_factor", "ffn_round_up_to_multiple_of", "gate_soft_cap",
            "output_logit_soft_cap", "use_bias", "add_out_norm", "norm_eps",
            "norm_reduction_force_float32", "eps", "weight_mode",
        )  # fmt: skip
        self.config = {
            **{key: getattr(config, key) for key in names},
            "input_gate": self.backbone.blocks[0].mlstm_layer.input_gate,
            "activation_checkpointing": activation_checkpointing,
        }
        self._reset_vocabulary()

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        activation_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "xLSTMLarge":
        """The model of an ``xLSTMLargeConfig`` of the package xlstm, or of any object or mapping
        with such fields.

        Example:
            >>> config = {"embedding_dim": 16, "num_heads": 2, "num_blocks": 2, "vocab_size": 256}
            >>> torch_ext.xLSTMLarge.from_config(config).config["weight_mode"]
            'single'
        """
        model = cls.__new__(cls)
        config = read_config(xLSTMLargeConfig, cls.__name__, config)
        model._init(config, activation_checkpointing, device, dtype)
        return model

    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does: also after ``to_empty``."""
        self.backbone.reset_parameters()
        self._reset_vocabulary()

    def _reset_vocabulary(self) -> None:
        small_init_(self.embedding.weight, self._config.embedding_dim)
        small_init_(self.lm_head.weight, self._config.embedding_dim)

    @torch.jit.export
    def init_state(self, batch_size: int) -> list[State]:
        """Zeros: the state of each block, see :meth:`torch_ext.xLSTMLargeLayer.init_state`."""
        return self.backbone.init_state(batch_size)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)

    def _blocks(self, x: Tensor, lengths: Tensor | None, padding: str) -> Tensor:
        return self.backbone(x, lengths, padding)

    def _blocks_prefill(
        self,
        x: Tensor,
        state: list[State] | None,
        lengths: Tensor | None,
        padding: str,
        last_only: bool,
    ) -> tuple[Tensor, list[State]]:
        return self.backbone.prefill(x, state, lengths, padding, last_only)

    def _blocks_step(self, x: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        return self.backbone._step(x, state)

    def _logits(self, x: Tensor) -> Tensor:
        return soft_cap(self.lm_head(x), self.output_logit_soft_cap)

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
                ``xLSTMForCausalLM``, always with ``weight_mode="single"``; ``"xlstm"`` writes
                ``config.yaml`` and ``model.safetensors`` for the package's
                ``load_from_pretrained``, which reads that mode alone.
            extra: further entries of the config, such as ``{"eos_token_id": 0}``.

        Raises:
            ValueError: ``layout`` is unknown, or has no room for the model: transformers' xLSTM has
                a norm without a bias after the blocks, and the input gate ``"exp"``.
        """
        name = f"{type(self).__name__}.save_pretrained"
        if layout == "transformers":
            _xlstm_checkpoint.write_transformers(name, Path(folder), self, self.config, extra or {})
        elif layout == "xlstm":
            _xlstm_checkpoint.write_xlstm(Path(folder), self, self._config, extra or {})
        else:
            raise ValueError(f'{name}: layout is {layout!r}, expected "transformers" or "xlstm"')
