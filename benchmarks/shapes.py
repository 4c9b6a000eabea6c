"""The one table of what is timed: operators, what they must move, shapes, peers, goals."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Operator:
    """What a fused operator cannot avoid, counted per (batch, time, channel) element.

    Tensors are counted, not bytes, so that one entry serves every dtype. States are left out: they
    are one time step among thousands.
    """

    function: str
    inputs: tuple[str, ...]  # in the order of the function's arguments
    backward_tensors: int  # read: the inputs it needs, h, grad_h; written: one gradient per input
    exps: int  # exponentials per element, forward; the backward recomputes the gates, so the same
    options: tuple[tuple[str, str], ...] = ()

    @property
    def forward_tensors(self) -> int:
        return len(self.inputs) + 1

    def tensors_moved(self, mode: str) -> int:
        return {
            "forward": self.forward_tensors,
            "backward": self.backward_tensors,
            "forward+backward": self.forward_tensors + self.backward_tensors,
        }[mode]

    def tensors_alive(self, mode: str) -> int:
        """The working set: inputs and h, and with a backward grad_h and the inputs' gradients."""
        if mode == "forward":
            return self.forward_tensors
        return 2 * len(self.inputs) + 2

    def step_bytes(self, itemsize: int, state_itemsize: int) -> int:
        """One token and channel: the inputs and h once, the state read and written."""
        return itemsize * (len(self.inputs) + 1) + 2 * state_itemsize

    def exps_needed(self, mode: str) -> int:
        return self.exps * (2 if mode == "forward+backward" else 1)


OPERATORS = {
    # The backward of linear_scan does not need b: a, h, grad_h in, two gradients out.
    "linear_scan": Operator("linear_scan", ("a", "b"), 5, 0),
    "min_gru": Operator("min_gru", ("gate", "candidate"), 6, 1),
    "min_gru[g]": Operator("min_gru", ("gate", "candidate"), 6, 2, (("activation", "g"),)),
    "min_lstm": Operator("min_lstm", ("forget_gate", "input_gate", "candidate"), 8, 2),
    "min_lstm[g]": Operator(
        "min_lstm", ("forget_gate", "input_gate", "candidate"), 8, 3, (("activation", "g"),)
    ),
}
DEFAULT_OPERATORS = ("linear_scan", "min_gru", "min_gru[g]", "min_lstm")
PASSES = ("forward", "backward", "forward+backward")
MODES = (*PASSES, "step", "layer", "memory", "model")
DEFAULT_MODES = {
    "cpu": ("forward", "forward+backward", "step", "layer", "memory", "model"),
    "cuda": (*PASSES, "step", "layer", "memory"),
}
DEFAULT_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float32")}

# (B, T, D). "in-L2" has no fixed width: two rows per thread of 64 steps, and as many channels (a
# multiple of 64) as let everything the call touches fit into half of each core's L2.
SHAPES: dict[str, tuple[int, int, int] | None] = {
    "8x2048x1024": (8, 2048, 1024),
    "32x1024x1024": (32, 1024, 1024),
    "in-L2": None,
}
# On a GPU: many channels; few channels and many steps, where time must be split; many rows.
GPU_SHAPES = {
    "8x4096x1024": (8, 4096, 1024),
    "1x65536x512": (1, 65536, 512),
    "32x1024x1024": (32, 1024, 1024),
}
DEFAULT_SHAPES = {"cpu": tuple(SHAPES), "cuda": tuple(GPU_SHAPES)}
L2_ROWS_PER_THREAD = 2
L2_TIME = 64

# Smallest shares of triad bandwidth that we accept: data larger than L2, data in L2.
GOALS = {"streamed": 0.85, "in-L2": 0.75}

# Smallest shares of copy bandwidth that we accept on a GPU, by shape, dtype and pass.
GPU_GOALS = {
    ("8x4096x1024", "bfloat16", "forward"): 0.85,
    ("8x4096x1024", "bfloat16", "backward"): 0.80,
    ("1x65536x512", "bfloat16", "forward"): 0.70,
    ("1x65536x512", "bfloat16", "backward"): 0.70,
}
# Peers that ours must not be slower than on a GPU, at any shape: the ratio must exceed 1.
GPU_PEERS_TO_BEAT = ("accelerated-scan", "accelerated-scan (Triton)", "fla-hgrn")

# One token: B x D.
STEP_BATCHES = (1, 32, 256)
STEP_DIM = 1024


def resolve_shape(
    name: str, operator: Operator, mode: str, threads: int, itemsize: int, l2_bytes: int
) -> tuple[int, int, int]:
    """The shape behind a name of the table, or behind "BxTxD"."""
    if name == "in-L2":
        rows = L2_ROWS_PER_THREAD * L2_TIME
        per_channel = rows * itemsize * operator.tensors_alive(mode)
        return L2_ROWS_PER_THREAD * threads, L2_TIME, max(64, l2_bytes // 2 // per_channel & ~63)
    if known := (SHAPES | GPU_SHAPES).get(name):
        return known
    return parse_shape(name)


def parse_shape(name: str) -> tuple[int, int, int]:
    """ "8x2048x1024" as B, T, D."""
    try:
        batch, time, dim = (int(size) for size in name.split("x"))
    except ValueError:
        raise SystemExit(
            f"run.py: unknown shape {name!r}: use one of {', '.join(SHAPES | GPU_SHAPES)}, "
            "or BxTxD such as 4x512x256"
        ) from None
    return batch, time, dim


# Peers: scans, gates and scan alone, and whole layers (dim = inner dim = D).
PEER_SHAPES = {"cpu": ("8x2048x1024",), "cuda": tuple(GPU_SHAPES)}
# Layer, shape, and the peers beside it (None: all that take part). nn.GRU and nn.LSTM need tens of
# seconds per step at the large shape on two cores.
LAYERS_TIMED = {
    "cpu": (
        ("MinGRU", "8x2048x1024", ("minGRU-pytorch", "minGRU-pytorch compiled")),
        ("MinGRU", "8x1024x512", ("torch.nn",)),
        ("MinLSTM", "8x1024x512", None),
    ),
    "cuda": (("MinGRU", "8x4096x1024", None), ("MinLSTM", "8x4096x1024", None)),
}
PEER_GOALS = {
    "min_gru: gates and scan, forward+backward": 100.0,
    "MinGRU: layer, training step": 3.5,
}  # beside minGRU-pytorch, CPU

# What the peak memory is taken at; in units of a tensor it hardly depends on that.
MEMORY_SHAPES = {"cpu": "8x1024x512", "cuda": "8x4096x1024"}

# The speed-ups that the minRNN paper reports ("Were RNNs All We Needed?", arXiv 2410.01201, batch
# 64, one T4 GPU) over an LSTM and a GRU written as Python loops. It does not state the width.
PAPER_BATCH = 64
PAPER_RATIOS = {
    ("min_gru", 512): 175.0,
    ("min_lstm", 512): 235.0,
    ("min_gru", 4096): 1324.0,
    ("min_lstm", 4096): 1361.0,
}
PAPER_TIMES = (512, 4096)

# --quick: only to see that everything works.
QUICK_SHAPES = ("2x256x256", "in-L2")
QUICK_PEER_SHAPE = "2x128x64"
QUICK_MEMORY_SHAPE = "4x1024x512"
QUICK_STEP_BATCHES = (1, 8)
QUICK_STEP_DIM = 128
QUICK_PAPER_TIMES = (32, 64)


# -- Mamba -----------------------------------------------------------------------------------------

MAMBA_STATES = 16  # N, states of each channel
MAMBA_TAPS = 4  # W, of the convolution
CHECKPOINT_STEPS = 16  # selective_scan keeps the states of every such step for its backward


@dataclass(frozen=True)
class Work:
    """What no implementation can avoid, per (batch, time, channel) element.

    `operations` are vector instructions beside the exponentials, of which a core starts as many as
    it starts multiply-adds: per state the shortest form of the recurrence; a reciprocal is an
    estimate and a Newton step (3), the logarithm of a softplus a series (14).
    """

    exps: int
    operations: int
    tensors: int  # of the operator's dtype, read or written
    float32s: int = 0  # more of them, whatever the dtype

    def bytes(self, itemsize: int) -> int:
        return self.tensors * itemsize + 4 * self.float32s


@dataclass(frozen=True)
class GpuWork:
    """What no implementation can avoid on a GPU, per (batch, time, channel) element.

    `special` are the results of the special function units (ex2, lg2, rcp, tanh), of which `movable`
    are exponentials that a polynomial could make as well; `issue` are all instructions.
    """

    special: int
    issue: int
    movable: int = 0


POLYNOMIAL = 9  # more instructions for a float32 exponential of degree 5 than for ex2


@dataclass(frozen=True)
class MambaOperator:
    function: str
    fused: bool = False  # with delta_bias, softplus, D and z
    time_last: bool = False  # tensors lie as (B, D, T)
    dtype: str | None = None  # None: what is asked for
    data: str = "normal"  # or "denormal": every second channel; "large": |A| delta up to 320
    beside: str | None = None  # the operator that its time is held against
    at_most: float | None = None  # ... and how many times that it may take

    def work(self, mode: str) -> Work:
        N, W = MAMBA_STATES, MAMBA_TAPS
        if self.function == "causal_conv1d":
            # SiLU is an exponential and 7; its derivative 10. Forward the taps once; backward for
            # the pre-activation, the input's gradient, and the weight's.
            return Work(1, W + 7, 2) if mode == "forward" else Work(1, 3 * W + 11, 3)
        if mode == "forward":
            # Per state: step A, step u B, h, y. Fused: softplus 17, SiLU 7, D and the gate.
            return Work(N + 2, 4 * N + 26, 4) if self.fused else Work(N, 4 * N, 3)
        # Per state: the decay and h again, and gradients of h, A, B, C, u and step. Fused: y again,
        # softplus and its slope, SiLU and its derivative. Read: the inputs, grad_y, kept states.
        kept = N // CHECKPOINT_STEPS
        if self.fused:
            return Work(N + 3, 12 * N + 40, 7, kept)
        return Work(N, 11 * N, 5, kept)

    def gpu_work(self, mode: str, itemsize: int) -> GpuWork:
        """Per state of a token and channel 5 instructions forward and 12 backward, the decay among
        them; the rest is once per token and channel: conversions, loads and stores, softplus (2 and
        5), its slope, SiLU and its derivative, D and the gate."""
        N, W = MAMBA_STATES, MAMBA_TAPS
        silu = (
            1 if itemsize == 2 else 2
        )  # by tanh, which is right for half precision, or by ex2, rcp
        if self.function == "causal_conv1d":
            return GpuWork(silu, W + 9) if mode == "forward" else GpuWork(silu, 3 * W + 17)
        if mode == "forward":
            return GpuWork(N + 2 + silu, 5 * N + 25, N) if self.fused else GpuWork(N, 5 * N + 8, N)
        return GpuWork(N + 3 + silu, 12 * N + 45, N) if self.fused else GpuWork(N, 12 * N + 15, N)

    def tensors_alive(self, mode: str) -> int:
        if self.function == "causal_conv1d":
            return 2 if mode == "forward" else 3
        return self.work(mode).tensors + (mode == "backward")

    @property
    def results(self) -> int:
        """(B, T, D) tensors that a forward and a backward give: y and the gradients."""
        return 2 if self.function == "causal_conv1d" else 4 if self.fused else 3


_SCAN = "selective_scan"
MAMBA_OPERATORS = {
    _SCAN: MambaOperator(_SCAN),
    f"{_SCAN}[fused]": MambaOperator(_SCAN, fused=True),
    f"{_SCAN}[B,D,T]": MambaOperator(_SCAN, time_last=True),
    f"{_SCAN}[bfloat16]": MambaOperator(_SCAN, dtype="bfloat16", beside=_SCAN, at_most=1.0),
    f"{_SCAN}[fused,bfloat16]": MambaOperator(
        _SCAN, fused=True, dtype="bfloat16", beside=f"{_SCAN}[fused]", at_most=1.0
    ),
    f"{_SCAN}[denormal]": MambaOperator(_SCAN, data="denormal", beside=_SCAN, at_most=1.2),
    f"{_SCAN}[large]": MambaOperator(_SCAN, data="large", beside=_SCAN, at_most=1.2),
    "causal_conv1d": MambaOperator("causal_conv1d"),
    "causal_conv1d[bfloat16]": MambaOperator(
        "causal_conv1d", dtype="bfloat16", beside="causal_conv1d", at_most=1.0
    ),
}

MAMBA_SHAPES = {
    _SCAN: ("1x2048x1536",),
    "causal_conv1d": ("1x2048x1536", "8x2048x1536"),  # the second is far beyond L3
}
# Smallest shares that we accept, by operator and pass, with AVX-512 and with less: of the roof for
# the scan, of copy bandwidth for the convolution.
MAMBA_GOALS = {
    (_SCAN, "forward"): (0.80, 0.75),
    (f"{_SCAN}[fused]", "forward"): (0.75, 0.75),
    (f"{_SCAN}[B,D,T]", "forward"): (0.72, 0.72),
    (_SCAN, "backward"): (0.65, 0.65),
    ("causal_conv1d", "forward"): (0.85, 0.85),
    ("causal_conv1d", "backward"): (0.75, 0.75),
}
MAMBA_BACKWARD_GOAL = 2.2  # the scan's backward, in multiples of its forward
MAMBA_SCALING_GOAL = 1.85  # the scan's time with one thread / with two
MAMBA_STEP_GOAL = 1.3  # a layer's step of one row, in multiples of reading its weights

# On a GPU, each in the dtypes that are asked for.
GPU_MAMBA_OPERATORS = (_SCAN, f"{_SCAN}[fused]", f"{_SCAN}[B,D,T]", "causal_conv1d")
# Many channels (the inner width of the 2.8B model); few channels and many steps, where time must be
# split (that of the 130M model).
GPU_MAMBA_SHAPES = {
    _SCAN: ("8x2048x5120", "1x8192x1536"),
    "causal_conv1d": ("8x2048x4096", "1x32768x2048"),
}
# Smallest shares in bfloat16, at both shapes: of the floor for the scan, of copy bandwidth for the
# convolution.
GPU_MAMBA_GOALS = {
    (name, mode): goal
    for mode, goal in (("forward", 0.60), ("backward", 0.45))
    for name in GPU_MAMBA_OPERATORS[:3]
} | {("causal_conv1d", "forward"): 0.85, ("causal_conv1d", "backward"): 0.85}
GPU_MAMBA_WIDTH = 2560  # d_model of the layer that takes a step; its inner width is twice that
GPU_MAMBA_STEP_BATCHES = (1, 128, 1024)
# Smallest shares of copy bandwidth, bfloat16, by function and batch: where the bytes take several
# times as long as a launch.
GPU_MAMBA_STEP_GOALS = {
    ("selective_scan_step_", 128): 0.80,
    ("selective_scan_step_", 1024): 0.80,
    ("causal_conv1d_step_", 1024): 0.80,
}
# Peers that ours must not be slower than at any shape, where they are installed; and beside what:
# in our layout and in theirs.
GPU_MAMBA_PEERS = ("mamba_ssm", "causal-conv1d")
GPU_MAMBA_COMPARED = {
    f"{_SCAN}[fused]": MAMBA_OPERATORS[f"{_SCAN}[fused]"],
    f"{_SCAN}[B,D,T]": MAMBA_OPERATORS[f"{_SCAN}[B,D,T]"],
    "causal_conv1d": MAMBA_OPERATORS["causal_conv1d"],
    "causal_conv1d[B,D,T]": MambaOperator("causal_conv1d", time_last=True),
}

MAMBA_WIDTH = 768  # d_model of the layer
# T, passes and peers of the layer, one row. transformers' backward grows with T squared.
MAMBA_LAYERS_TIMED = (
    (256, "training step", ("transformers", "mambapy", "associative_scan eager")),
    (2048, "forward", ("transformers", "mambapy", "associative_scan", "associative_scan eager")),
    (2048, "training step", ("mambapy", "associative_scan", "associative_scan eager")),
)
MAMBA_PEERS = ("transformers", "mambapy", "associative_scan", "associative_scan eager")
MAMBA_STEP_BATCHES = (1, 8)


@dataclass(frozen=True)
class ModelSizes:
    """MambaLM with `layers` blocks, and a transformer with half as many, which is as large."""

    width: int
    layers: int
    heads: int
    vocab: int
    prefill: tuple[int, ...]  # tokens of context
    decode: tuple[int, ...]


MODEL_SIZES = ModelSizes(768, 24, 12, 50280, (1024, 8192), (1024, 8192, 65536))
QUICK_MODEL_SIZES = ModelSizes(64, 2, 2, 512, (32, 64), (32, 64, 128))


@dataclass(frozen=True)
class LongInput:
    """A MambaLM that reads a long text, whole and in chunks."""

    width: int
    layers: int
    chunk: int
    whole: tuple[int, ...]  # tokens, at once: memory grows with them
    chunked: tuple[int, ...]


LONG_INPUT = LongInput(256, 4, 4096, (4096, 16384, 65536), (4096, 16384, 65536, 262144, 1048576))
QUICK_LONG_INPUT = LongInput(64, 2, 512, (512, 4096), (512, 4096, 16384))
LONG_VOCAB = 256

QUICK_MAMBA_SHAPE = "1x128x96"
QUICK_MAMBA_WIDTH = 32
QUICK_MAMBA_TIME = 32


# -- matrix memories -------------------------------------------------------------------------------

# B, T, H, K, V, G: rows, steps, heads, a head's keys and values, and the groups of heads that share
# queries and keys.
MatrixShape = tuple[int, int, int, int, int, int]
MATRIX_CHUNK = 64  # steps that are taken together, as products of matrices


@dataclass(frozen=True)
class MatrixOperator:
    function: str
    gates: int = 0  # numbers per step and head beside queries, keys and values
    dtype: str | None = None  # None: what is asked for
    beside: str | None = None  # as in MambaOperator
    at_most: float | None = None
    options: tuple[tuple[str, object], ...] = ()  # of the function, by name

    def products(self, mode: str, shape: MatrixShape) -> float:
        """Multiply-adds of matrix products for one step of one head, chunk by chunk.

        q C and k v^T, and among the steps of a chunk, half of which come before a step, q k^T and
        its product with v. Heads of a group share q k^T. The backward has twice as many of the
        first kind, and of the second q k^T again and the gradients of q, k, v and of the weights
        between.
        """
        if mode == "forward+backward":
            return self.products("forward", shape) + self.products("backward", shape)
        _, _, H, K, V, G = shape
        inside = MATRIX_CHUNK // 2
        if mode == "forward":
            return 2 * K * V + inside * (K * G / H + V)
        return 4 * K * V + inside * (K * (2 + G / H) + 2 * V)

    def operations(self, mode: str, shape: MatrixShape) -> float:
        """Vector instructions for one step of one head, of which a core starts as many as it starts
        multiply-adds, in the form that needs fewer: products, or step by step, where an element of
        the state is decayed, added to and read: 3, and 8 in the backward with the states given."""
        K, V = shape[3:5]
        return min(self.products(mode, shape), (3 if mode == "forward" else 8) * K * V)

    def bytes(self, mode: str, shape: MatrixShape, itemsize: int) -> int:
        """Inputs and h; backward the inputs, the gradient of h, and gradients of the inputs."""
        if mode == "forward+backward":
            return sum(self.bytes(one, shape, itemsize) for one in mode.split("+"))
        B, T, H, K, V, G = shape
        inputs = 2 * G * K + H * V + self.gates * H
        step = inputs + H * V if mode == "forward" else 2 * inputs + H * V
        return B * T * step * itemsize


def matrix_variants(function: str, gates: int) -> dict[str, MatrixOperator]:
    return {
        function: MatrixOperator(function, gates),
        f"{function}[bfloat16]": MatrixOperator(function, gates, "bfloat16", function, 1.0),
    }


MATRIX_OPERATORS = (
    matrix_variants("mlstm", 2)
    | matrix_variants("ssd", 1)
    | matrix_variants("retention", 0)
    | matrix_variants("linear_attention", 0)
)
# What `--op` also takes, and stands for.
GROUPS = {
    "diagonal": DEFAULT_OPERATORS,
    "mamba": tuple(MAMBA_OPERATORS),
    "matrix": tuple(MATRIX_OPERATORS),
}
# Where xLSTM's operators are compared with others; Mamba-2's shape; small states.
MLSTM_SHAPE = "1x1024x4x128x256"
MATRIX_SHAPES = {
    "mlstm": (MLSTM_SHAPE, "1x2048x8x64x64"),
    "ssd": ("1x512x24x128x64x1", "1x2048x24x128x64x1"),
    "retention": ("1x1024x8x64x128",),
    "linear_attention": ("1x2048x8x64x64",),
}
MATRIX_GOALS = {"forward": 0.65, "backward": 0.50}  # of the roof, every operator and dtype
MATRIX_STEP_BATCHES = (1, 32)
# ggml's Mamba-2 scan (float32, AVX-512) in ns per (step, head, K, V) by shape and threads; and what
# a multiply-add of one lane took on one core there. It was not measured in the run that names it.
GGML_SSD = {
    ("1x512x24x128x64x1", 1): 0.127,
    ("1x2048x24x128x64x1", 1): 0.131,
    ("1x2048x24x128x64x1", 2): 0.065,
}
GGML_FMA = 0.0114
GGML_GOAL = 3.0

# Passes of mlstm beside mlstm_kernels' plain PyTorch with exact gradients, at MLSTM_SHAPE: how many
# times faster than with its default chunk.
MLSTM_GOALS = {"forward": 2.5, "forward+backward": 5.0}
MLSTM_CHUNKS = (64, 32, 128, 256)  # the first is the default
# Layers: steps, width; and who takes part.
MATRIX_LAYERS_TIMED = (
    ("Mamba2", 256, 768),  # transformers' memory is gigabytes for each chunk of 256
    ("mLSTMLayer", 1024, 512),
    ("xLSTMLargeBlock", 1024, 512),
)
MATRIX_LAYER_PEERS = {
    "Mamba2": ("transformers mamba2", "transformers mamba2 compiled"),
    "mLSTMLayer": ("xlstm",),
    "xLSTMLargeBlock": ("transformers xlstm", "transformers xlstm compiled"),
}
XLSTM_HEADS = 4
XLSTM_SIZES = ModelSizes(512, 8, XLSTM_HEADS, 50304, (1024,), (1024,))
QUICK_XLSTM_SIZES = ModelSizes(64, 2, XLSTM_HEADS, 128, (32,), (32,))

# On a GPU: xLSTM 7B's heads, twice as wide ones, and few of them; Mamba-2's 2.7B, a small state of
# many tokens, and a hybrid model's eight groups.
GPU_MATRIX_SHAPES = {
    "mlstm": ("8x8192x16x128x256", "8x8192x8x256x512", "8x2048x4x256x512"),
    "ssd": ("8x2048x80x128x64x1", "8x8192x64x64x64x1", "1x8192x128x128x64x8"),
}
# float32's products by torch.set_float32_matmul_precision: how many of bfloat16 operands the time of
# one of them is at least ("high" may be TF32, at half the rate).
GPU_MATRIX_PRECISIONS = {"highest": 6, "high": 2, "medium": 1}
# What the authors of TFLA's Triton kernels measured on an H100 (https://github.com/NX-AI/mlstm_kernels,
# raw data of arXiv 2503.14376), 65536 tokens, bfloat16: seconds of the exponential gate's kernels and,
# at a shape of ssd, of mamba_ssm's with its convolution and its gate z.
GPU_MATRIX_PUBLISHED = {
    ("mlstm", "8x8192x16x128x256"): {"forward": 6.37e-3, "forward+backward": 15.2e-3},
    ("mlstm", "8x8192x8x256x512"): {"forward+backward": 21.1e-3},
    ("ssd", "8x8192x64x64x64x1"): {"forward": 3.6e-3, "forward+backward": 27e-3},
}
# How many times faster we want to be than those, and than the kernels themselves where they are installed.
GPU_MATRIX_GOALS = {"forward": 3.0, "backward": 2.5}
GPU_MATRIX_STEP_SHAPES = {"mlstm": "1x1x8x256x512", "ssd": "1x1x128x64x64x1"}
GPU_MATRIX_STEP_BATCHES = (1, 128, 1024)
GPU_MATRIX_STEP_GOALS = {128: 0.80, 1024: 0.80}  # of copy bandwidth, by batch
# Operators beside peers, as these have them: a divisor without a gradient; no divisor and a sigmoid.
GPU_MATRIX_COMPARED = {
    "mlstm[constant divisor]": MatrixOperator("mlstm", 2, options=(("normalizer_grad", False),)),
    "mlstm[sigmoid]": MatrixOperator(
        "mlstm", 2, options=(("input_gate", "sigmoid"), ("normalize", False))
    ),
    "ssd": MATRIX_OPERATORS["ssd"],
}
GPU_MATRIX_PEERS = {
    "mlstm[constant divisor]": ("mlstm_kernels xl_chunk", "mlstm_kernels limit_chunk"),
    "mlstm[sigmoid]": ("mlstm_kernels xl_chunk", "fla-simple-gla"),
    "ssd": ("mamba_ssm",),
}
GPU_MATRIX_STEP_PEERS = {"mlstm": "mlstm_kernels step", "ssd": "mamba_ssm"}


def gpu_matrix_goal(published: dict[str, float], mode: str) -> float | None:
    """Seconds that a pass may take, by those that somebody else's takes. Where theirs forward is not
    known, both passes are held to the lower goal."""
    both, forward = published.get("forward+backward"), published.get("forward")
    if mode == "forward":
        return forward and forward / GPU_MATRIX_GOALS["forward"]
    if mode != "forward+backward" or both is None:
        return None
    if forward is None:
        return both / min(GPU_MATRIX_GOALS.values())
    backward = (both - forward) / GPU_MATRIX_GOALS["backward"]
    return forward / GPU_MATRIX_GOALS["forward"] + backward


QUICK_MATRIX_SHAPE = "1x70x2x16x24"
QUICK_MLSTM_SHAPE = "1x256x2x16x32"  # a multiple of the peer's chunks
QUICK_MATRIX_WIDTH = 64
QUICK_MATRIX_TIME = 32


def parse_matrix_shape(name: str) -> MatrixShape:
    """ "1x1024x4x128x256" as B, T, H, K, V and G, which is H if it is not there."""
    try:
        sizes = tuple(int(size) for size in name.split("x"))
        batch, time, heads, K, V, groups = sizes if len(sizes) == 6 else (*sizes, sizes[2])
        if heads % groups:
            raise ValueError
    except (ValueError, IndexError, ZeroDivisionError):
        raise SystemExit(
            f"run.py: unknown shape {name!r}: matrix memories take BxTxHxKxV or BxTxHxKxVxG, where "
            "G divides H"
        ) from None
    return batch, time, heads, K, V, groups


def is_matrix_shape(name: str) -> bool:
    return name.count("x") >= 4
