r"""The residual block around minGRU and minLSTM, and the language model made of it.

.. math::
    x &\leftarrow x + W_\text{down}\, \text{minRNN}(\text{conv}(\text{norm}(x))) \\
    x &\leftarrow x + \text{MLP}(\text{norm}(x))

Feng, Tung, Ahmed, Bengio, Hajimirsadeghi 2024, "Were RNNs All We Needed?", arXiv:2410.01201v3: a
causal depthwise convolution over 4 steps, a minRNN whose state is wider than the block, a
projection back, and a multilayer perceptron, each pair with a norm before and a residual around.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._sampling import sample
from ._sequence_layer import GateBiasInit, check_state_type, shape_text
from .min_gru import MinGRU
from .min_lstm import MinLSTM

# Inputs of the convolution that it still needs, and the recurrence's state.
State = tuple[Tensor, Tensor]


class MinRNNBlock(nn.Module):
    r"""The paper's block: norm, convolution, minRNN, projection; norm, MLP; two residuals.

    Args:
        dim: channels of ``x`` and ``y``.
        layer: ``"min_gru"`` or ``"min_lstm"``.
        expansion: width of the recurrence's state, in multiples of ``dim``.
        conv_width: steps that the convolution sees, the current one included; 1 for none but it.
        mlp_ratio: width of the MLP, in multiples of ``dim``.
        norm: ``"layer_norm"`` or ``"rms_norm"``.
        dropout: probability of a zero in what is added to each residual, in training.
        activation: of the recurrence's candidate, see :class:`torch_ext.MinGRU`.
        gate_bias_init: see :class:`torch_ext.MinGRU` and :class:`torch_ext.MinLSTM`.
        device: of the parameters.
        dtype: of the parameters. States are float32, and float64 if they are, under autocast too.

    Attributes:
        norm, conv, rnn, down: the first half; ``conv.weight`` is ``(dim, 1, conv_width)``, ``rnn``
            a :class:`torch_ext.MinGRU` or :class:`torch_ext.MinLSTM` of one layer.
        mlp_norm, mlp_up, mlp_down: the second half.

    Example:
        >>> block = torch_ext.MinRNNBlock(16)
        >>> x = torch.randn(2, 10, 16)
        >>> y, state = block(x)
        >>> first, state = block(x[:, :7])
        >>> second, state = block(x[:, 7:], state)
        >>> torch.allclose(torch.cat([first, second], 1), y, atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        layer: str = "min_gru",
        expansion: float = 2.0,
        conv_width: int = 4,
        mlp_ratio: float = 4.0,
        norm: str = "layer_norm",
        dropout: float = 0.0,
        activation: str = "identity",
        gate_bias_init: GateBiasInit = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"MinRNNBlock: dim is {dim}, expected at least 1")
        layers = {"min_gru": MinGRU, "min_lstm": MinLSTM}
        if layer not in layers:
            raise ValueError(f'MinRNNBlock: layer is {layer!r}, expected "min_gru" or "min_lstm"')
        if conv_width < 1:
            raise ValueError(f"MinRNNBlock: conv_width is {conv_width}, expected at least 1")
        for option, value in [("expansion", expansion), ("mlp_ratio", mlp_ratio)]:
            if int(dim * value) < 1:
                raise ValueError(
                    f"MinRNNBlock: {option} is {value}, expected at least 1 / dim = 1 / {dim}"
                )
        self.dim = dim
        self.hidden_size = int(dim * expansion)
        self.conv_width = conv_width
        factory = {"device": device, "dtype": dtype}

        self.norm = make_norm(norm, dim, device, dtype)
        self.conv = nn.Conv1d(dim, dim, conv_width, groups=dim, **factory)
        self.rnn = layers[layer](
            dim,
            self.hidden_size,
            batch_first=True,
            activation=activation,
            gate_bias_init=gate_bias_init,
            **factory,
        )
        self.down = nn.Linear(self.hidden_size, dim, **factory)
        self.mlp_norm = make_norm(norm, dim, device, dtype)
        self.mlp_up = nn.Linear(dim, int(dim * mlp_ratio), **factory)
        self.mlp_down = nn.Linear(int(dim * mlp_ratio), dim, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs all steps.

        Args:
            x: ``(B, T, dim)``.
            state: see ``init_state``. Zeros if omitted.

        Returns:
            ``y`` ``(B, T, dim)`` and the state after the last step, with which the next steps of
            the same sequences give what they would have given in one call.
        """
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(
                f"MinRNNBlock: x has shape {shape_text(x)}, expected (B, T, dim={self.dim})"
            )
        if state is None:
            state = self.init_state(x.shape[0])
        elif not torch.jit.is_scripting():
            check_state_type("MinRNNBlock", state, 2)
        y, last_inputs = self._convolve(self.norm(x), state[0])
        y, h = self.rnn(y, state[1].unsqueeze(0))
        return self._finish(x, y), (last_inputs, h.squeeze(0))

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: the convolution's last inputs ``(B, dim, conv_width - 1)`` and ``(B, hidden)``."""
        h = self.rnn.init_state(batch_size).squeeze(0)
        return h.new_zeros([batch_size, self.dim, self.conv_width - 1]), h

    @torch.jit.export
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: ``x`` ``(B, dim)`` and a state to ``y`` ``(B, dim)`` and the next state."""
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"MinRNNBlock.step: x has shape {shape_text(x)}, expected (B, dim={self.dim})"
            )
        if not torch.jit.is_scripting():
            check_state_type("MinRNNBlock.step", state, 2)
        y, last_inputs = self._convolve(self.norm(x).unsqueeze(1), state[0])
        y, h = self.rnn.step(y.squeeze(1), state[1].unsqueeze(0))
        return self._finish(x, y), (last_inputs, h.squeeze(0))

    def _convolve(self, x: Tensor, last_inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution of ``x`` ``(B, T, dim)`` after ``last_inputs``."""
        if x.shape[1] == 0:  # torch's conv1d wants one output at least
            return x, last_inputs
        x = torch.cat([last_inputs.to(x.dtype), x.transpose(1, 2)], 2)
        y = F.conv1d(x, self.conv.weight, self.conv.bias, groups=self.dim)
        kept = x[:, :, x.shape[2] - (self.conv_width - 1) :]
        return y.transpose(1, 2), kept.to(last_inputs.dtype)

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Everything after the recurrence, which looks at one step at a time."""
        x = x + self.dropout(self.down(y))
        return x + self.dropout(self.mlp_down(F.gelu(self.mlp_up(self.mlp_norm(x)))))


class MinRNNLM(nn.Module):
    r"""A language model of :class:`MinRNNBlock`: embedding, blocks, norm, logits.

    Args:
        vocab_size: number of tokens.
        dim: channels of the blocks.
        num_layers: number of blocks.
        layer, expansion, conv_width, mlp_ratio, norm, dropout, activation, gate_bias_init: see
            :class:`MinRNNBlock`. The dropout also acts on the embedding.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        embedding, layers.{k}, norm, head: the parts, in that order.

    Example:
        >>> model = torch_ext.MinRNNLM(vocab_size=256, dim=16, num_layers=2)
        >>> model(torch.tensor([list(b"Were RNNs")])).shape
        torch.Size([1, 9, 256])
        >>> model.generate(torch.tensor([list(b"Were RNNs")]), max_new_tokens=4).shape
        torch.Size([1, 13])
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        *,
        layer: str = "min_gru",
        expansion: float = 2.0,
        conv_width: int = 4,
        mlp_ratio: float = 4.0,
        norm: str = "layer_norm",
        dropout: float = 0.0,
        activation: str = "identity",
        gate_bias_init: GateBiasInit = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for argument, value in [("vocab_size", vocab_size), ("num_layers", num_layers)]:
            if value < 1:
                raise ValueError(f"MinRNNLM: {argument} is {value}, expected at least 1")
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, dim, device=device, dtype=dtype)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            MinRNNBlock(
                dim,
                layer=layer,
                expansion=expansion,
                conv_width=conv_width,
                mlp_ratio=mlp_ratio,
                norm=norm,
                dropout=dropout,
                activation=activation,
                gate_bias_init=gate_bias_init,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )
        self.norm = make_norm(norm, dim, device, dtype)
        self.head = nn.Linear(dim, vocab_size, device=device, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(B, T, vocab_size)`` of the token after each of ``ids`` ``(B, T)``."""
        return self.prefill(ids, None)[0]

    @torch.jit.export
    def prefill(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``forward`` from a state to a state: for streams, and for truncated backpropagation.

        Args:
            ids: the next tokens of each sequence, ``(B, T)``.
            state: see ``init_state``. Zeros if omitted. ``tuple(s.detach() for s in state)``
                between two calls truncates the gradient there.

        Returns:
            Logits ``(B, T, vocab_size)`` and the state after the last token.

        Example:
            >>> model = torch_ext.MinRNNLM(vocab_size=256, dim=16, num_layers=2)
            >>> logits, state = model.prefill(torch.zeros(1, 6, dtype=torch.long))
            >>> logits, state = model.prefill(torch.zeros(1, 5, dtype=torch.long), state)
        """
        if ids.dim() != 2:
            raise ValueError(f"MinRNNLM: ids has shape {shape_text(ids)}, expected (B, T)")
        if state is None:
            state = self.init_state(ids.shape[0])
        elif not torch.jit.is_scripting():
            check_state_type("MinRNNLM", state, 2)
        x = self.dropout(self.embedding(ids))
        last_inputs: list[Tensor] = []
        h: list[Tensor] = []
        for k, layer in enumerate(self.layers):
            x, new_state = layer(x, (state[0][k], state[1][k]))
            last_inputs.append(new_state[0])
            h.append(new_state[1])
        return self.head(self.norm(x)), (torch.stack(last_inputs), torch.stack(h))

    @torch.jit.export
    def init_state(self, batch_size: int) -> State:
        """Zeros: the two states of :class:`MinRNNBlock`, each ``(num_layers, B, ...)``."""
        last_inputs: list[Tensor] = []
        h: list[Tensor] = []
        for layer in self.layers:
            state = layer.init_state(batch_size)
            last_inputs.append(state[0])
            h.append(state[1])
        return torch.stack(last_inputs), torch.stack(h)

    @torch.jit.export
    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """One token of each sequence, ``(B,)``, to logits ``(B, vocab_size)`` and a state."""
        if ids.dim() != 1:
            raise ValueError(f"MinRNNLM.step: ids has shape {shape_text(ids)}, expected (B,)")
        if not torch.jit.is_scripting():
            check_state_type("MinRNNLM.step", state, 2)
        x = self.dropout(self.embedding(ids))
        last_inputs: list[Tensor] = []
        h: list[Tensor] = []
        for k, layer in enumerate(self.layers):
            x, new_state = layer.step(x, (state[0][k], state[1][k]))
            last_inputs.append(new_state[0])
            h.append(new_state[1])
        return self.head(self.norm(x)), (torch.stack(last_inputs), torch.stack(h))

    @torch.jit.export
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Tensor:
        """Continues each sequence, one token at a time, in constant memory.

        Args:
            ids: the beginning of each sequence, ``(B, T)``, at least one token.
            max_new_tokens: how many tokens to append.
            temperature: divides the logits; 0 always takes the most likely token.
            top_k: sample from the ``top_k`` most likely tokens only.

        Returns:
            ``(B, T + max_new_tokens)``, beginning with ``ids``.

        Notes:
            Records no gradient. Call ``eval()`` before if the model has dropout.
        """
        if ids.dim() != 2 or ids.shape[1] < 1:
            raise ValueError(
                f"MinRNNLM.generate: ids has shape {shape_text(ids)}, expected (B, T) with T >= 1"
            )
        if max_new_tokens < 0:
            raise ValueError(
                f"MinRNNLM.generate: max_new_tokens is {max_new_tokens}, expected at least 0"
            )
        if temperature < 0:
            raise ValueError(
                f"MinRNNLM.generate: temperature is {temperature}, expected at least 0"
            )
        if top_k is not None and top_k < 1:
            raise ValueError(f"MinRNNLM.generate: top_k is {top_k}, expected at least 1")
        tokens = [ids]
        if max_new_tokens > 0:
            with torch.no_grad():
                logits, state = self.prefill(ids, None)
                tokens.append(sample(logits[:, -1], temperature, top_k).unsqueeze(1))
                for _ in range(max_new_tokens - 1):
                    logits, state = self.step(tokens[-1].squeeze(1), state)
                    tokens.append(sample(logits, temperature, top_k).unsqueeze(1))
        return torch.cat(tokens, 1)


def make_norm(
    name: str, dim: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    norms = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}
    if name not in norms:
        raise ValueError(f'MinRNNBlock: norm is {name!r}, expected "layer_norm" or "rms_norm"')
    return norms[name](dim, device=device, dtype=dtype)
