"""mamba_ssm's language model by its own names: ``MambaLMHeadModel`` and what belongs to it.

``forward``, ``generate`` and the caches have the peer's arguments, results and layouts; parameters
have its names, so that its ``state_dict`` loads as it is. Where it differs:

* A prompt of more than one token after the first one (``seqlen_offset > 0``) continues from the
  caches, which the peer's Mamba-1 refuses.
* The scan's states are float32 whatever the parameters are, unless ``allocate_inference_cache`` is
  given a dtype.
* ``from_pretrained`` reads local folders alone, transformers' layout as well.
"""

from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _mamba_checkpoint
from .._sampling import sample
from ..mamba import Mamba
from ..mamba2 import Mamba2
from ..mamba_lm import MambaBackbone, MambaLM
from ._mamba_ssm_layer import run_packed

__all__ = ["InferenceParams", "MambaConfig", "MambaLMHeadModel"]

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])
Cache = tuple[Tensor, Tensor]


@dataclass
class MambaConfig:
    """mamba_ssm's ``MambaConfig``, by its field names and defaults."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


@dataclass
class InferenceParams:
    """mamba_ssm's ``InferenceParams``: how far generation is, and each layer's cache by its number.

    ``key_value_memory_dict[k]`` is ``(conv_state (B, d_inner, d_conv), ssm_state (B, d_inner,
    d_state))``, changed in place. The caller adds to ``seqlen_offset``.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Cache] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """For another generation with the same caches."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class GenerateOutput:
    """What ``generate(return_dict_in_generate=True)`` returns.

    Attributes:
        sequences: prompt and new tokens, ``(B, max_length)`` or less.
        scores: logits ``(B, vocab_size)`` of each new token, None without ``output_scores``.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


class MambaLMHeadModel(nn.Module):
    """mamba_ssm's ``MambaLMHeadModel``, of Mamba-1 or Mamba-2 layers.

    Args:
        config: a :class:`MambaConfig`.
        initializer_cfg: ``initializer_range`` of the embedding (0.02) and
            ``rescale_prenorm_residual`` (True).
        device: of the parameters.
        dtype: of the parameters but ``A_log`` and ``D``.

    Raises:
        ValueError: the config has attention layers, MLPs, or layers other than Mamba-1 and Mamba-2.

    Example:
        >>> from torch_ext.compat._mamba_ssm_models import MambaConfig, MambaLMHeadModel
        >>> model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=256))
        >>> prompt = torch.tensor([list(b"Mamba is")])
        >>> model(prompt).logits.shape
        torch.Size([1, 8, 256])
        >>> model.generate(prompt, max_length=12).shape
        torch.Size([1, 12])
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        arguments = _mamba_checkpoint.read_mamba_ssm_config(
            "MambaLMHeadModel: config", vars(config)
        )
        model = MambaLM(**arguments, device=device, dtype=dtype)
        options = dict(initializer_cfg or {})
        # Blocks without an MLP have one residual each.
        if options.pop("n_residuals_per_layer", 1) != 1:
            raise ValueError("MambaLMHeadModel: n_residuals_per_layer is not 1, expected 1")
        if options:
            model.reset_parameters(**options)
        self._take(model, config)

    def _take(self, model: MambaLM, config: MambaConfig) -> None:
        self.config = config
        self.backbone: MambaBackbone = model.backbone
        self.lm_head = model.lm_head
        self._arguments = model.config

    def tie_weights(self) -> None:
        """Makes the head the embedding again, where the config ties them."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Logits of the token after each of ``input_ids``.

        Args:
            input_ids: ``(B, T)``.
            position_ids: taken and ignored, as by the peer.
            inference_params: caches to fill (``seqlen_offset == 0``) or to continue from.
            num_last_tokens: logits of the last so many tokens alone; 0 means all.
            mixer_kwargs: ``seq_idx`` or ``cu_seqlens`` for Mamba-2 layers, without
                ``inference_params``; none is known to Mamba-1 layers.

        Returns:
            A named tuple with ``logits``, ``(B, T, V)`` or ``(B, num_last_tokens, V)``.
        """
        packing = {key: mixer_kwargs.pop(key, None) for key in ("seq_idx", "cu_seqlens")}
        packing = {key: value for key, value in packing.items() if value is not None}
        mamba2 = isinstance(self.backbone.layers[0].mixer, Mamba2)
        unknown = sorted([*mixer_kwargs, *(() if mamba2 else packing)])
        if unknown:
            kind = "Mamba-2" if mamba2 else "Mamba-1"
            raise TypeError(f"MambaLMHeadModel: {kind} layers take no {', '.join(unknown)}")
        if packing and inference_params is not None:
            raise ValueError(
                "MambaLMHeadModel: inference_params is given, expected None beside seq_idx or "
                "cu_seqlens"
            )
        if packing:
            x, _ = self.backbone._embed(input_ids, None, "right")
            for layer in self.backbone.layers:
                x = layer._widen(x)
                x = x + run_packed(
                    layer.mixer, layer.norm(x), packing.get("seq_idx"), packing.get("cu_seqlens")
                )
            x = self.backbone.norm_f(x)
            if num_last_tokens > 0:
                x = x[:, -num_last_tokens:]
        elif inference_params is None:
            x = self.backbone(input_ids)
            if num_last_tokens > 0:
                x = x[:, -num_last_tokens:]
        else:
            x = self._continue(input_ids, inference_params)
            if num_last_tokens > 0:
                x = x[:, -num_last_tokens:]
            x = self.backbone.norm_f(x)
        return CausalLMOutput(logits=self.lm_head(x))

    def _continue(self, ids: Tensor, inference_params: InferenceParams) -> Tensor:
        """The residual after the last block; the caches are changed in place."""
        caches = inference_params.key_value_memory_dict
        x, _ = self.backbone._embed(ids, None, "right")
        for k, layer in enumerate(self.backbone.layers):
            if k not in caches:
                caches[k] = self._allocate(k, ids.shape[0], None)
            x = layer._widen(x)
            x = x + _mix(k, layer.mixer, layer.norm(x), caches[k], inference_params.seqlen_offset)
        return x

    def _allocate(self, k: int, batch_size: int, dtype: torch.dtype | None) -> Cache:
        mixer = self.backbone.layers[k].mixer
        scan = mixer.init_state(batch_size)[1]
        conv = scan.new_zeros(
            batch_size, mixer.conv_dim, mixer.d_conv, dtype=dtype or mixer.conv1d.weight.dtype
        )
        return conv, scan.to(dtype or scan.dtype)

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> dict[int, Cache]:
        """Zeros for ``InferenceParams.key_value_memory_dict``. ``max_seqlen`` is ignored: the
        caches' size does not depend on it."""
        return {k: self._allocate(k, batch_size, dtype) for k in range(len(self.backbone.layers))}

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        *,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        teacher_outputs: Tensor | None = None,
        vocab_size: int | None = None,
        cg: bool = False,
        enable_timing: bool = False,
        streamer: Any = None,
    ) -> Tensor | GenerateOutput:
        """Continues ``input_ids`` ``(B, T)`` up to ``max_length`` tokens, the prompt included.

        Args:
            input_ids: the beginning of each sequence, all of one length.
            max_length: of the result.
            top_k: draw from the ``top_k`` most likely tokens; 1 takes the most likely, 0 draws from
                all.
            top_p: draw from the fewest tokens that have this probability together; 0 for all.
            min_p: draw from tokens at least ``min_p`` times as likely as the most likely; 0 for
                all.
            temperature: divides the logits.
            return_dict_in_generate: return an object with ``sequences`` and ``scores``.
            output_scores: keep each step's logits.
            repetition_penalty: logits of tokens that were there are divided by it (multiplied if
                negative).
            eos_token_id: ends generation once every row draws it in the same step.
            teacher_outputs: ``(B, T')``, tokens to take at their places in place of drawn ones.
            vocab_size: tokens from here on are never drawn.
            cg, enable_timing: taken and ignored: the peer's CUDA graphs and timing printouts.
            streamer: an object with ``put(ids)`` and ``end()``, such as transformers' streamers.
        """
        params = InferenceParams(max_seqlen=max_length, max_batch_size=input_ids.shape[0])
        sequences, scores, length = [input_ids], [], input_ids.shape[1]
        if streamer is not None:
            streamer.put(input_ids.cpu())
        token, seen = input_ids, input_ids
        while length < max_length:
            logits = self(token, inference_params=params, num_last_tokens=1).logits[:, -1]
            params.seqlen_offset += token.shape[1]
            if vocab_size is not None:
                logits = logits[:, :vocab_size]
            if repetition_penalty != 1.0:
                logits = _penalise(logits, seen, repetition_penalty)
            if output_scores:
                scores.append(logits)
            if teacher_outputs is not None and length < teacher_outputs.shape[1]:
                token = teacher_outputs[:, length]
            else:
                token = _draw(logits, top_k, top_p, min_p, temperature)
            token = token.to(input_ids.dtype).unsqueeze(1)
            sequences.append(token)
            length += 1
            if repetition_penalty != 1.0:
                seen = torch.cat([seen, token], 1)
            if streamer is not None:
                streamer.put(token.cpu())
            if eos_token_id is not None and bool((token == eos_token_id).all()):
                break
        if streamer is not None:
            streamer.end()
        output = torch.cat(sequences, 1)
        if not return_dict_in_generate:
            return output
        return GenerateOutput(output, tuple(scores) if output_scores else None)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> "MambaLMHeadModel":
        """Loads a local folder: see :meth:`torch_ext.MambaLM.from_pretrained`."""
        if kwargs:
            raise TypeError(
                f"MambaLMHeadModel.from_pretrained: the config is the folder's, got also "
                f"{', '.join(sorted(kwargs))}"
            )
        lm = MambaLM.from_pretrained(pretrained_model_name, device, dtype)
        config = _mamba_checkpoint.mamba_ssm_config(lm.config)
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._take(lm, MambaConfig(**config))
        return model

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Writes ``config.json`` and ``pytorch_model.bin``, which mamba_ssm loads as well."""
        name = "MambaLMHeadModel.save_pretrained"
        folder = Path(save_directory)
        _mamba_checkpoint.write(name, folder, self, self._arguments, "mamba_ssm")


def _mix(k: int, mixer: Mamba | Mamba2, x: Tensor, cache: Cache, seqlen_offset: int) -> Tensor:
    """Layer ``k`` on ``x`` ``(B, T, d_model)``. Its cache is changed in place, as captured CUDA
    graphs want it; its convolution's part has one input more than will be needed."""
    conv, scan = cache
    T, W = x.shape[1], mixer.d_conv
    state = mixer.init_state(x.shape[0])
    shapes = ((*state[0].shape[:2], W), tuple(state[1].shape))
    if (tuple(conv.shape), tuple(scan.shape)) != shapes:
        raise ValueError(
            f"MambaLMHeadModel: key_value_memory_dict[{k}] has shapes {tuple(conv.shape)} and "
            f"{tuple(scan.shape)}, expected {shapes[0]} and {shapes[1]}"
        )
    if seqlen_offset > 0:
        state = (conv[:, :, 1:].to(state[0].dtype), scan.to(state[1].dtype))
    if T == 1:
        y, after = mixer.step(x[:, 0], state)
        y = y.unsqueeze(1)
    else:
        y, after = mixer.prefill(x, state)
    # Column T - 1 of the state's inputs and these, of which the last W are kept.
    oldest = state[0][:, :, T - 1] if T < W else mixer._conv_inputs(x[:, T - W])
    oldest = oldest.to(after[0].dtype).unsqueeze(2)
    conv.copy_(torch.cat([oldest, after[0]], 2))
    scan.copy_(after[1])
    return y


def _penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    at = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(at < 0, at * penalty, at / penalty))


def _draw(logits: Tensor, top_k: int, top_p: float, min_p: float, temperature: float) -> Tensor:
    if top_k == 1:
        return logits.argmax(-1)
    if min_p > 0.0:
        p = (logits.float() / temperature).softmax(-1)
        low = p < min_p * p.max(-1, keepdim=True)[0]
        logits = logits.masked_fill(low, -float("inf"))
    return sample(logits, temperature, top_k or None, top_p or None, None)
