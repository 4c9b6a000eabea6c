// The causal convolution on a GPU.
//
// Unlike a recurrence it may be cut along time: a block takes tiles, some steps of a sequence times 128 bytes of
// neighbouring channels, and brings the steps that a tile reads into shared memory, whatever their layout: its own, and
// those before them, which the tile before reads as well, or the initial state. From there a thread takes kConvRows
// consecutive steps of the channels of one vector, all in registers. Nothing is carried from tile to tile, so blocks hide
// each other's waiting for memory, and every split of time yields the same bits.
//
// The backward computes the gradient g of the pre-activation again. A step's input is seen by the outputs of the next W - 1
// steps as well: their g comes from the threads that own these steps, through shared memory, or at the end of a tile is
// computed twice. The weight's gradient is summed over a thread's steps, over the threads of a block, and over blocks by a
// kernel of its own, each in a fixed order. What depends on a sequence's edges (states, and gradients that come from or go
// to them) is a few steps, which more blocks of the same launch compute channel by channel.
//
// Packed sequences are one row; a block takes the piece of each sequence in its tiles in turn. The order of all operations
// follows from shapes (and, packed, from offsets).
//
// Taps are counted here by their distance in time: tap 0 is the one of the present step, the last of the filter in memory.
#pragma once
#include "../cells/silu.h"
#include "../core/causal_conv1d_problem.h"
#include "device.cuh"

namespace torch_ext::cuda {

inline constexpr int kConvThreads = 128;
inline constexpr int kConvSumThreads = 256;
inline constexpr int kConvRows = 8;       // steps of a thread
inline constexpr int kConvRowBytes = 128; // channels of a tile
inline constexpr int kConvControlBytes = 256;
// So many blocks fill a GPU, some times over. Not asked of the device: results would depend on it.
inline constexpr int kConvEnoughBlocks = 4096;
// Tiles of a block at most.
inline constexpr int kConvTiles = 8;

// How a tile lies over a block's threads, for windows of up to kWindow taps.
template <class S_, int kWindow_>
struct ConvTile {
  using S = S_;
  using Lane = typename Stored<S>::Lane;
  static constexpr int kWindow = kWindow_, kHalo = kWindow - 1;
  // More taps of fewer channels: as many registers.
  static constexpr int kVectorBytes = kWindow > 4 ? 8 : 16;
  using Vector = SideBySide<S, kVectorBytes>;
  static constexpr int kPerLane = Vector::kCount;
  static constexpr int kChannels = kConvRowBytes / int(sizeof(S));
  static constexpr int kVectors = kConvRowBytes / kVectorBytes; // threads side by side
  static constexpr int kGroups = kConvThreads / kVectors;       // and one after the other
  static constexpr int kTime = kGroups * kConvRows;
  static constexpr int kTapBytes = kChannels * int(sizeof(Lane)); // a number per channel
  // Shared memory: ConvControl; the taps and the bias; x; backward, the gradient of y and g of each group's first steps.
  // The threads' sums of the weight's gradient take the place of x in the end.
  static constexpr int kWeightBytes = (kWindow + 1) * kTapBytes;
  static constexpr int kForwardBytes =
      kConvControlBytes + kWeightBytes + (kHalo + kTime) * kConvRowBytes;
  static constexpr int kInputBytes = (kHalo + kTime + kHalo) * kConvRowBytes;
  static constexpr int kGradBytes = (kTime + kHalo) * kConvRowBytes;
  static constexpr int kSumBytes = kGroups * (kWindow + 1) * kTapBytes;
  static constexpr int kExchangeBytes = kGroups * kHalo * kTapBytes;
  static constexpr int kBackwardBytes =
      kConvControlBytes + kWeightBytes + kInputBytes + kGradBytes + kExchangeBytes;
  static_assert(kSumBytes <= kInputBytes + kGradBytes);
};

// How tiles are shared out. Tiles of 64 steps or more, each of 2 bytes at least: their number fits into 32 bits.
struct ConvSchedule {
  unsigned groups = 0;  // of channels
  unsigned tiles = 0;   // of a sequence, or of the packed row
  unsigned total = 0;   // tiles of all sequences
  unsigned run = 1;     // tiles of a block, one after the other
  unsigned parts = 0;   // blocks for a group of channels
  unsigned blocks = 0;  // parts * groups; the blocks behind them are for the edges
  void* sums = nullptr; // backward: [part][tap, bias last][channel]
};

// ---- sequences ----

// Steps first .. last of a sequence that has `count`; its step 0 is row `row` of the arrays that are contiguous.
struct ConvPiece {
  int64_t sequence, row, count, first, last;
};

// The last sequence of a packed row that begins at or before the token. Offsets are not checked here: that would wait for
// the device. Whatever they are, the sequence is one of those that are there, and the token in it.
TORCH_EXT_DEVICE ConvPiece find_sequence(const CausalConv1dProblem& p, int64_t token) {
  int64_t low = 0, high = p.num_sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (p.cu_seqlens[middle] <= token)
      low = middle;
    else
      high = middle;
  }
  int64_t begin = p.cu_seqlens[low], end = p.cu_seqlens[low + 1];
  begin = begin < 0 ? 0 : begin > token ? token : begin;
  end = end > p.num_steps ? p.num_steps : end <= token ? token + 1 : end;
  return {low, begin, end - begin, token - begin, end - begin};
}

// ---- memory ----

// An array of steps by channels.
template <class S>
struct ConvArray {
  const S* data;
  int64_t sequence, time, width;
  enum Path { elements, vectors, along_time } path;

  TORCH_EXT_DEVICE ConvArray() {}
  TORCH_EXT_DEVICE ConvArray(const CausalConv1dProblem& p, const Strided& x)
      : data(static_cast<const S*>(x.data)),
        sequence(p.cu_seqlens ? 0 : x.sequence),
        time(x.time),
        width(x.width) {
    const auto whole = [](int64_t elements) { return elements * int64_t(sizeof(S)) % 16 == 0; };
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && whole(sequence);
    path = aligned && width == 1 && whole(time) && whole(p.width) ? vectors
           : aligned && time == 1 && whole(width)                 ? along_time
                                                                  : elements;
  }
  TORCH_EXT_DEVICE void put(Shared<int64_t> to) const {
    to.store(0, reinterpret_cast<int64_t>(data));
    to.store(1, sequence), to.store(2, time), to.store(3, width), to.store(4, path);
  }
  TORCH_EXT_DEVICE static ConvArray get(Shared<int64_t> from) {
    ConvArray x;
    x.data = reinterpret_cast<const S*>(from.load(0));
    x.sequence = from.load(1), x.time = from.load(2), x.width = from.load(3);
    x.path = Path(from.load(4));
    return x;
  }
  TORCH_EXT_DEVICE const S* step(
      const CausalConv1dProblem& p, const ConvPiece& piece, int64_t t) const {
    return data + piece.sequence * sequence + (p.cu_seqlens ? piece.row + t : t) * time;
  }
};

// What a block keeps in shared memory, as in registers it would crowd out the steps: its arrays, and the pieces of sequences
// in its tiles, one after the other. Its first thread writes.
template <class L>
struct ConvControl {
  using Array = ConvArray<typename L::S>;
  Shared<int64_t> words;
  // The present piece; then the tiles that are left, the next tile in its sequence and that sequence, and of a packed row
  // the tokens that are left of the present tile; then the arrays.
  static constexpr int kTiles = 5, kArrays = 10, kArrayWords = 5;
  static_assert((kArrays + 2 * kArrayWords) * 8 <= kConvControlBytes);

  TORCH_EXT_DEVICE void start(
      const CausalConv1dProblem& p, const ConvSchedule& q, unsigned part) const {
    const unsigned first = part * q.run;
    const unsigned sequence = p.cu_seqlens ? 0 : first / q.tiles;
    words.store(kTiles, q.total - first < q.run ? q.total - first : q.run);
    words.store(kTiles + 1, first - sequence * q.tiles);
    words.store(kTiles + 2, sequence);
    words.store(kTiles + 3, 0), words.store(kTiles + 4, 0);
    next(p, q);
  }
  TORCH_EXT_DEVICE void put(int i, const Array& x) const {
    x.put(words + (kArrays + i * kArrayWords));
  }
  TORCH_EXT_DEVICE Array array(int i) const {
    return Array::get(words + (kArrays + i * kArrayWords));
  }
  // Without steps after the last one.
  TORCH_EXT_DEVICE ConvPiece piece() const {
    return {words.load(0), words.load(1), words.load(2), words.load(3), words.load(4)};
  }
  TORCH_EXT_DEVICE void next(const CausalConv1dProblem& p, const ConvSchedule& q) const {
    ConvPiece piece{0, 0, 0, 0, 0};
    int64_t token = words.load(kTiles + 3), until = words.load(kTiles + 4);
    const int64_t left = words.load(kTiles);
    if (token == until && left > 0) {
      const int64_t tile = words.load(kTiles + 1), sequence = words.load(kTiles + 2);
      const bool sequence_ends = !p.cu_seqlens && tile + 1 == q.tiles;
      words.store(kTiles, left - 1);
      words.store(kTiles + 1, sequence_ends ? 0 : tile + 1);
      words.store(kTiles + 2, sequence_ends ? sequence + 1 : sequence);
      token = tile * L::kTime;
      until = p.num_steps - token < L::kTime ? p.num_steps : token + L::kTime;
      piece = {sequence, sequence * p.num_steps, p.num_steps, token, until};
    }
    if (p.cu_seqlens && token < until) {
      piece = find_sequence(p, token);
      if (until - piece.row < piece.last) piece.last = until - piece.row;
      words.store(kTiles + 3, piece.row + piece.last), words.store(kTiles + 4, until);
    }
    words.store(0, piece.sequence), words.store(1, piece.row), words.store(2, piece.count);
    words.store(3, piece.first), words.store(4, piece.last);
  }
};

// Steps t0 .. t1, which the sequence has, of `channels` channels from d0 on, into rows of shared memory. Of a vector that
// has channels, and others beyond the last one, those become 0.
template <class L>
TORCH_EXT_DEVICE void fetch(
    Shared<unsigned char> to, const CausalConv1dProblem& p, const ConvArray<typename L::S>& x,
    const ConvPiece& piece, int64_t t0, int64_t t1, int64_t d0, int channels) {
  using S = typename L::S;
  const int thread = int(threadIdx.x), rows = int(t1 - t0);
  const S* const from = x.step(p, piece, t0) + d0 * x.width;
  constexpr int kPieces = kConvRowBytes / 16, kInPiece = 16 / int(sizeof(S));
  if (x.path == ConvArray<S>::vectors) {
    constexpr int kRows = kConvThreads / kPieces;
    const int d = thread % kPieces * kInPiece, first = thread / kPieces;
    if (d >= channels) return;
    const S* piece_at = from + first * x.time + d;
    const int64_t next = kRows * x.time;
    int place = first * kConvRowBytes + thread % kPieces * 16;
#pragma unroll
    for (int t = 0; t < L::kTime + 2 * L::kHalo; t += kRows) {
      if (first + t < rows) copy_async16(to, place, piece_at);
      piece_at += next, place += kRows * kConvRowBytes;
    }
    return;
  }
  const Shared<S> elements = to.template view<S>();
  const int padded = (channels + L::kPerLane - 1) / L::kPerLane * L::kPerLane;
  // Lanes run along channels, so that their stores do not meet in a bank.
  if (x.path == ConvArray<S>::along_time) {
    using Steps = SideBySide<S>;
    // From the last multiple of a vector on: of the row for packed sequences, of the sequence else.
    const int64_t row = (p.cu_seqlens ? piece.row : 0) + t0;
    const int before = int(row % kInPiece);
    const int count = (before + rows + kInPiece - 1) / kInPiece;
#pragma unroll 1
    for (int i = thread; i < count * L::kChannels; i += kConvThreads) {
      const int d = i % L::kChannels, t = i / L::kChannels * kInPiece - before;
      if (d >= padded) continue;
      const S* steps = from + t + d * x.width; // time side by side
      // The last vector may reach beyond the array.
      if (d < channels && row + t + kInPiece <= p.num_steps) {
        const Steps some = load_global(reinterpret_cast<const Steps*>(steps));
#pragma unroll
        for (int k = 0; k < kInPiece; ++k)
          if (t + k >= 0 && t + k < rows) elements.store((t + k) * L::kChannels + d, some.get(k));
      } else {
#pragma unroll 1
        for (int k = t < 0 ? -t : 0; k < kInPiece && t + k < rows; ++k)
          elements.store((t + k) * L::kChannels + d, d < channels ? load_global(steps + k) : S{});
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = thread; i < rows * L::kChannels; i += kConvThreads) {
    const int d = i % L::kChannels, t = i / L::kChannels;
    if (d < padded)
      elements.store(i, d < channels ? load_global(from + t * x.time + d * x.width) : S{});
  }
}

template <class S>
TORCH_EXT_DEVICE S state_at(const ConvState& state, int64_t row, int64_t d, int64_t tap) {
  return state.data ? load_global(
                          static_cast<const S*>(state.data) + row * state.row + d * state.width +
                          tap * state.tap)
                    : S{};
}

// x of the steps that a piece sees before its first one, from the state where the sequence has none, and of its own up to
// `last`. Row 0 is kHalo steps before its first.
template <class L>
TORCH_EXT_DEVICE void fetch_inputs(
    Shared<unsigned char> to, const CausalConv1dProblem& p, const ConvArray<typename L::S>& x,
    const ConvPiece& piece, int64_t last, int64_t state_row, int64_t d0, int channels) {
  using S = typename L::S;
  const int before = int(p.window) - 1;
  const int missing = piece.first < before ? before - int(piece.first) : 0;
  const int first_row = L::kHalo - before;
  fetch<L>(
      to + (first_row + missing) * kConvRowBytes, p, x, piece, piece.first - before + missing, last,
      d0, channels);
  const Shared<S> rows = (to + first_row * kConvRowBytes).template view<S>();
  const int padded = (channels + L::kPerLane - 1) / L::kPerLane * L::kPerLane;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < missing * L::kChannels; i += kConvThreads) {
    const int d = i % L::kChannels, tap = int(piece.first) + i / L::kChannels;
    if (d < padded)
      rows.store(i, d < channels ? state_at<S>(p.initial_state, state_row, d0 + d, tap) : S{});
  }
}

// Taps by distance, then the bias, in rows of channels; 0 beyond the last channel.
template <class L>
TORCH_EXT_DEVICE void fetch_weight(
    Shared<unsigned char> to, const CausalConv1dProblem& p, int64_t d0, int channels) {
  using Lane = typename L::Lane;
  const Shared<Lane> rows = to.template view<Lane>();
  const Lane *weight = static_cast<const Lane*>(p.weight) + d0 * p.window,
             *bias = static_cast<const Lane*>(p.bias);
  const int window = int(p.window);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < window * L::kChannels; i += kConvThreads) {
    const int d = i / window, k = i - d * window;
    rows.store(
        (window - 1 - k) * L::kChannels + d, d < channels ? load_global(weight + i) : Lane{});
  }
#pragma unroll 1
  for (int d = int(threadIdx.x); d < L::kChannels; d += kConvThreads)
    rows.store(
        L::kWindow * L::kChannels + d, bias && d < channels ? load_global(bias + d0 + d) : Lane{});
}

// A number for each of a thread's channels, in as few accesses as there can be.
template <class L>
struct ConvLanes {
  using Lane = typename L::Lane;
  static constexpr int kBytes = L::kPerLane * int(sizeof(Lane)) < 16 ? 8 : 16;
  using Vector = SideBySide<Lane, kBytes>;
  static_assert(L::kPerLane % Vector::kCount == 0);

  TORCH_EXT_DEVICE static void load(Shared<Lane> from, Lane* x) {
#pragma unroll
    for (int v = 0; v < L::kPerLane; ++v)
      if (v % Vector::kCount == 0) {
        const Vector some = from.template view<Vector>().load(v / Vector::kCount);
#pragma unroll
        for (int k = 0; k < Vector::kCount; ++k) x[v + k] = some.get(k);
      }
  }
  TORCH_EXT_DEVICE static void store(Shared<Lane> to, const Lane* x) {
#pragma unroll
    for (int i = 0; i < L::kPerLane / Vector::kCount; ++i)
      to.template view<Vector>().store(i, Vector::of(x + i * Vector::kCount));
  }
};

// A thread's taps, once they are there, and where its bias is.
template <class L>
struct ConvWeight {
  using Lane = typename L::Lane;
  Lane tap[L::kWindow][L::kPerLane];
  Shared<Lane> bias;

  TORCH_EXT_DEVICE ConvWeight(Shared<unsigned char> from, int window, int d)
      : bias(from.template view<Lane>() + (L::kWindow * L::kChannels + d)) {
#pragma unroll
    for (int j = 0; j < L::kWindow; ++j) {
      if (j < window) {
        ConvLanes<L>::load(from.template view<Lane>() + (j * L::kChannels + d), tap[j]);
      } else {
#pragma unroll
        for (int v = 0; v < L::kPerLane; ++v) tap[j][v] = 0;
      }
    }
  }
  // The pre-activation of a step from the inputs, of which x[0] is the present one.
  TORCH_EXT_DEVICE void apply(const typename L::Vector* x, int window, Lane* sum) const {
    ConvLanes<L>::load(bias, sum);
#pragma unroll
    for (int j = L::kHalo; j >= 0; --j) {
      if (j >= window) continue;
#pragma unroll
      for (int v = 0; v < L::kPerLane; ++v) sum[v] = fused(tap[j][v], x[-j].widen(v), sum[v]);
    }
  }
};

// A row of a contiguous array, or as much of it as there is.
template <class L>
TORCH_EXT_DEVICE void put_row(
    typename L::S* to, const typename L::Lane* x, bool whole, int channels) {
  using Vector = typename L::Vector;
  const Vector y = Vector::narrow(x);
  if (whole) {
    store_global(reinterpret_cast<Vector*>(to), y);
  } else {
#pragma unroll
    for (int v = 0; v < L::kPerLane; ++v)
      if (v < channels) store_global(to + v, y.get(v));
  }
}
template <class L>
TORCH_EXT_DEVICE bool whole_rows(const void* to, int64_t width) {
  return reinterpret_cast<uintptr_t>(to) % L::kVectorBytes == 0 && width % L::kPerLane == 0;
}

// What a thread is to do in its block.
template <class L>
struct ConvPlace {
  int64_t d0; // the block's first channel
  int channels, d, mine, group;
  unsigned part;

  TORCH_EXT_DEVICE ConvPlace(const CausalConv1dProblem& p, const ConvSchedule& q) {
    part = blockIdx.x / q.groups;
    d0 = int64_t(blockIdx.x - part * q.groups) * L::kChannels;
    channels = p.width - d0 < L::kChannels ? int(p.width - d0) : L::kChannels;
    group = int(threadIdx.x) / L::kVectors;
    d = int(threadIdx.x) % L::kVectors * L::kPerLane;
    mine = channels - d < 0 ? 0 : channels - d < L::kPerLane ? channels - d : L::kPerLane;
  }
};

// ---- one channel of one sequence, by one thread: few steps, any window ----

template <class S>
struct ConvChannel {
  using Lane = typename Stored<S>::Lane;
  const CausalConv1dProblem& p;
  int64_t sequence, row, count, d, state_row;

  // `channel` counts the channels of all sequences.
  TORCH_EXT_DEVICE ConvChannel(const CausalConv1dProblem& problem, int64_t channel)
      : p(problem), sequence(channel / p.width), d(channel - sequence * p.width) {
    row = p.cu_seqlens ? p.cu_seqlens[sequence] : sequence * p.num_steps;
    count = p.cu_seqlens ? p.cu_seqlens[sequence + 1] - row : p.num_steps;
    state_row = p.state_rows ? p.state_rows[sequence] : sequence;
  }
  TORCH_EXT_DEVICE ConvChannel(
      const CausalConv1dProblem& problem, const ConvPiece& piece, int64_t d)
      : p(problem),
        sequence(piece.sequence),
        row(piece.row),
        count(piece.count),
        d(d),
        state_row(p.state_rows ? p.state_rows[sequence] : sequence) {}

  TORCH_EXT_DEVICE S at(const Strided& x, int64_t t) const {
    return load_global(
        static_cast<const S*>(x.data) +
        (p.cu_seqlens ? (row + t) * x.time : sequence * x.sequence + t * x.time) + d * x.width);
  }
  TORCH_EXT_DEVICE S input(int64_t t) const {
    return t >= 0 ? at(p.x, t) : state_at<S>(p.initial_state, state_row, d, p.window - 1 + t);
  }
  TORCH_EXT_DEVICE Lane tap(int64_t distance) const {
    return load_global(static_cast<const Lane*>(p.weight) + (d + 1) * p.window - 1 - distance);
  }
  TORCH_EXT_DEVICE Lane before_activation(int64_t t) const {
    Lane sum = p.bias ? load_global(static_cast<const Lane*>(p.bias) + d) : Lane(0);
#pragma unroll 1
    for (int64_t j = p.window - 1; j >= 0; --j)
      sum = fused(tap(j), Stored<S>::widen(input(t - j)), sum);
    return sum;
  }
  TORCH_EXT_DEVICE Lane output(int64_t t) const {
    const Lane sum = before_activation(t);
    return p.silu ? silu(sum) : sum;
  }
  // g, the gradient of the pre-activation.
  TORCH_EXT_DEVICE Lane gradient(const Strided& grad_y, int64_t t) const {
    const Lane g = Stored<S>::widen(at(grad_y, t));
    return p.silu ? g * silu_derivative(before_activation(t)) : g;
  }
  // The gradient of an input, t >= 1 - W, which may lie in the initial state, from g(step).
  template <class F>
  TORCH_EXT_DEVICE Lane input_gradient(const ConvState& grad_final, int64_t t, F g) const {
    Lane sum = 0;
    const int64_t last = t + p.window < count ? t + p.window : count;
#pragma unroll 1
    for (int64_t u = t < 0 ? 0 : t; u < last; ++u) sum = fused(tap(u - t), g(u), sum);
    const int64_t final_tap = t - (count - (p.window - 1)); // its place in the final state
    if (final_tap >= 0)
      sum = sum + Stored<S>::widen(state_at<S>(grad_final, sequence, d, final_tap));
    return sum;
  }
};

// The inputs that the next step will see.
template <class S>
TORCH_EXT_DEVICE void put_final_state(const CausalConv1dForward& p, int64_t channel) {
  if (channel >= p.num_sequences * p.width) return;
  const ConvChannel<S> c(p, channel);
  if (c.state_row < 0) return;
  const int64_t before = p.window - 1;
  S* const to = static_cast<S*>(p.final_state) + (c.state_row * p.width + c.d) * before;
#pragma unroll 1
  for (int64_t k = 0; k < before; ++k) store_global(to + k, c.input(c.count - before + k));
}

// Gradients of the initial state, and of the inputs that are in the final state, if that has a gradient.
template <class S>
TORCH_EXT_DEVICE void put_edge_gradients(const CausalConv1dBackward& p, int64_t channel) {
  if (channel >= p.num_sequences * p.width) return;
  const ConvChannel<S> c(p, channel);
  const int64_t before = p.window - 1;
  const auto gradient = [&](int64_t t) {
    const auto g = [&](int64_t u) {
      return p.grad_y.data ? c.gradient(p.grad_y, u) : typename ConvChannel<S>::Lane(0);
    };
    return Stored<S>::narrow(c.input_gradient(p.grad_final_state, t, g));
  };
#pragma unroll 1
  for (int64_t t = -before; t < 0; ++t)
    store_global(
        static_cast<S*>(p.grad_initial_state) + channel * before + before + t, gradient(t));
  if (!p.grad_final_state.data) return;
#pragma unroll 1
  for (int64_t t = c.count < before ? 0 : c.count - before; t < c.count; ++t)
    store_global(static_cast<S*>(p.grad_x) + (c.row + t) * p.width + c.d, gradient(t));
}

// ---- the kernels ----

template <class S, int kWindow>
__global__ void __launch_bounds__(kConvThreads, kWindow > 4 ? 4 : 5)
    causal_conv1d_forward_kernel(const CausalConv1dForward p, const ConvSchedule q) {
  using L = ConvTile<S, kWindow>;
  using Lane = typename L::Lane;
  using Vector = typename L::Vector;
  if (blockIdx.x >= q.blocks)
    return put_final_state<S>(
        p, int64_t(blockIdx.x - q.blocks) * kConvThreads + int64_t(threadIdx.x));
  const ConvControl<L> control{shared_memory<int64_t>()};
  const Shared<unsigned char> weights = shared_memory<unsigned char>(kConvControlBytes),
                              inputs = weights + L::kWeightBytes;
  const ConvPlace<L> at(p, q);
  const int window = int(p.window);
  if (threadIdx.x == 0) {
    control.put(0, ConvArray<S>(p, p.x));
    control.start(p, q, at.part);
  }
  fetch_weight<L>(weights, p, at.d0, at.channels);
  block_sync();
  // The threads beyond the last channel compute along with the first one's.
  const ConvWeight<L> weight(weights, window, at.mine > 0 ? at.d : 0);
  const bool whole = whole_rows<L>(p.y, p.width);
  const Shared<Vector> my_inputs =
      (inputs + at.group * kConvRows * kConvRowBytes).template view<Vector>() +
      (at.mine > 0 ? at.d / L::kPerLane : 0);

#pragma unroll 1
  for (;;) {
    const ConvPiece piece = control.piece();
    if (piece.first == piece.last) break;
    const int64_t left = piece.last - piece.first - at.group * kConvRows;
    const int rows = left < kConvRows ? int(left) : kConvRows;
    S* to = static_cast<S*>(p.y) + (piece.row + piece.first + at.group * kConvRows) * p.width +
            at.d0 + at.d;
    const int64_t state_row = p.state_rows ? p.state_rows[piece.sequence] : piece.sequence;
    if (state_row < 0) { // no state, no output
      const Lane zeros[L::kPerLane] = {};
#pragma unroll 1
      for (int r = 0; r < rows && at.mine > 0; ++r, to += p.width)
        put_row<L>(to, zeros, whole, at.mine);
    } else {
      fetch_inputs<L>(
          inputs, p, control.array(0), piece, piece.last, state_row, at.d0, at.channels);
    }
    copy_async_commit();
    copy_async_wait<0>();
    block_sync();
    if (threadIdx.x == 0) control.next(p, q);
    if (rows > 0 && at.mine > 0 && state_row >= 0) {
      Vector seen[L::kHalo + kConvRows];
#pragma unroll
      for (int i = 0; i <= L::kHalo; ++i)
        seen[i] = L::kHalo - i < window ? my_inputs.load(i * L::kVectors) : Vector{};
#pragma unroll
      for (int r = 0; r < kConvRows; ++r) {
        if (r >= rows) break;
        if (r + 1 < kConvRows) { // one step ahead
          const int i = L::kHalo + r + 1;
          seen[i] = r + 1 < rows ? my_inputs.load(i * L::kVectors) : Vector{};
        }
        Lane y[L::kPerLane];
        weight.apply(seen + L::kHalo + r, window, y);
        if (p.silu) {
#pragma unroll
          for (int v = 0; v < L::kPerLane; ++v) y[v] = silu(y[v]);
        }
        put_row<L>(to, y, whole, at.mine);
        to += p.width;
      }
    }
    block_sync(); // all have read where the next piece will lie
  }
}

template <class S, int kWindow>
__global__ void __launch_bounds__(kConvThreads, 3)
    causal_conv1d_backward_kernel(const CausalConv1dBackward p, const ConvSchedule q) {
  using L = ConvTile<S, kWindow>;
  using Lane = typename L::Lane;
  using Vector = typename L::Vector;
  constexpr int V = L::kPerLane, kHalo = L::kHalo;
  if (blockIdx.x >= q.blocks)
    return put_edge_gradients<S>(
        p, int64_t(blockIdx.x - q.blocks) * kConvThreads + int64_t(threadIdx.x));
  const ConvControl<L> control{shared_memory<int64_t>()};
  const Shared<unsigned char> weights = shared_memory<unsigned char>(kConvControlBytes),
                              inputs = weights + L::kWeightBytes,
                              gradients = inputs + L::kInputBytes;
  const Shared<Lane> exchange = (gradients + L::kGradBytes).template view<Lane>();
  const ConvPlace<L> at(p, q);
  const int window = int(p.window), thread_d = at.mine > 0 ? at.d : 0;
  if (threadIdx.x == 0) {
    control.put(0, ConvArray<S>(p, p.x));
    control.put(1, ConvArray<S>(p, p.grad_y));
    control.start(p, q, at.part);
  }
  fetch_weight<L>(weights, p, at.d0, at.channels);
  block_sync();
  const ConvWeight<L> weight(weights, window, thread_d);
  const bool whole = whole_rows<L>(p.grad_x, p.width);
  const int first_row = at.group * kConvRows * kConvRowBytes;
  const Shared<Vector> my_inputs = (inputs + first_row).template view<Vector>() + thread_d / V,
                       my_gradients =
                           (gradients + first_row).template view<Vector>() + thread_d / V;
  Lane grad_tap[kWindow][V], grad_bias[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    grad_bias[v] = 0;
#pragma unroll
    for (int j = 0; j < kWindow; ++j) grad_tap[j][v] = 0;
  }

#pragma unroll 1
  for (;;) {
    const ConvPiece piece = control.piece();
    if (piece.first == piece.last) break;
    // g is needed of W - 1 steps more than the piece has.
    const int64_t seen_until =
        piece.count - piece.last < window - 1 ? piece.count : piece.last + window - 1;
    fetch_inputs<L>(
        inputs, p, control.array(0), piece, seen_until, piece.sequence, at.d0, at.channels);
    fetch<L>(gradients, p, control.array(1), piece, piece.first, seen_until, at.d0, at.channels);
    copy_async_commit();
    copy_async_wait<0>();
    block_sync();
    if (threadIdx.x == 0) control.next(p, q);
    const int64_t first = piece.first + at.group * kConvRows;
    // Steps from the thread's first on: its own, and those of which there is a g.
    const auto clamp = [](int64_t steps) {
      constexpr int kMost = kConvRows + kHalo;
      return steps < 0 ? 0 : steps < kMost ? int(steps) : kMost;
    };
    const int own = clamp(piece.last - first), there = clamp(seen_until - first);
    // The last steps are put where the final state's gradient is added to them.
    const int put = p.grad_final_state.data
                        ? clamp(
                              (piece.count - (window - 1) < piece.last ? piece.count - (window - 1)
                                                                       : piece.last) -
                              first)
                        : own;
    const bool last_group = at.group == L::kGroups - 1;
    Vector seen[kHalo + kConvRows + kHalo];
    Lane g[kConvRows + kHalo][V];
    S* to = static_cast<S*>(p.grad_x) + (piece.row + first) * p.width + at.d0 + at.d;

    const auto load_input = [&](int i, bool there) __attribute__((always_inline)) {
      seen[i] = there ? my_inputs.load(i * L::kVectors) : Vector{};
    };
    // g of step r, and its share of the weight's gradient if it is the thread's own.
    const auto find_gradient = [&](int r, bool count) __attribute__((always_inline)) {
      const Vector dy = my_gradients.load(r * L::kVectors);
#pragma unroll
      for (int v = 0; v < V; ++v) g[r][v] = dy.widen(v);
      if (p.silu) {
        Lane sum[V];
        weight.apply(seen + kHalo + r, window, sum);
#pragma unroll
        for (int v = 0; v < V; ++v) g[r][v] = g[r][v] * silu_derivative(sum[v]);
      }
      if (!count) return;
#pragma unroll
      for (int v = 0; v < V; ++v) grad_bias[v] = grad_bias[v] + g[r][v];
#pragma unroll
      for (int j = 0; j < kWindow; ++j) {
        if (j >= window) continue;
#pragma unroll
        for (int v = 0; v < V; ++v)
          grad_tap[j][v] = fused(g[r][v], seen[kHalo + r - j].widen(v), grad_tap[j][v]);
      }
    };
    const auto put_gradient = [&](int r) __attribute__((always_inline)) {
      if (r >= put) return;
      Lane dx[V];
#pragma unroll
      for (int v = 0; v < V; ++v) dx[v] = weight.tap[0][v] * g[r][v];
#pragma unroll
      for (int j = 1; j < kWindow; ++j) {
        if (j >= window) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) dx[v] = fused(weight.tap[j][v], g[r + j][v], dx[v]);
      }
      put_row<L>(to, dx, whole, at.mine);
      to += p.width;
    };

    if (there > 0 && at.mine > 0) {
#pragma unroll
      for (int i = 0; i < kHalo; ++i) load_input(i, kHalo - i < window);
#pragma unroll
      for (int r = 0; r < kConvRows; ++r) {
        load_input(kHalo + r, r < there);
        if (r < there) {
          find_gradient(r, r < own);
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v) g[r][v] = 0;
        }
        if (r < kHalo)
          ConvLanes<L>::store(exchange + ((at.group * kHalo + r) * L::kChannels + at.d), g[r]);
        if (r >= kHalo) put_gradient(r - kHalo);
      }
    }
    block_sync();
    if (own > 0 && at.mine > 0) {
#pragma unroll
      for (int i = kConvRows; i < kConvRows + 2 * kHalo; ++i) // again, not to keep them
        load_input(i, last_group && i - kHalo < there);
#pragma unroll
      for (int r = kConvRows; r < kConvRows + kHalo; ++r) {
        if (r < there && !last_group) {
          const int row = (at.group + 1) * kHalo + r - kConvRows;
          ConvLanes<L>::load(exchange + (row * L::kChannels + at.d), g[r]);
        } else if (r < there) {
          find_gradient(r, false);
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v) g[r][v] = 0;
        }
        put_gradient(r - kHalo);
      }
    }
    block_sync(); // all have read where the next piece will lie
  }

  // The threads' sums, one below the other; then those of a tap and channel by one thread.
  const Shared<Lane> sums = inputs.template view<Lane>();
  if (at.mine > 0) {
#pragma unroll
    for (int j = 0; j <= kWindow; ++j)
      ConvLanes<L>::store(
          sums + ((at.group * (kWindow + 1) + j) * L::kChannels + at.d),
          j == kWindow ? grad_bias : grad_tap[j < kWindow ? j : 0]);
  }
  block_sync();
  Lane* const out = static_cast<Lane*>(q.sums) + int64_t(at.part) * (window + 1) * p.width + at.d0;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < (window + 1) * L::kChannels; i += kConvThreads) {
    const int d = i % L::kChannels, row = i / L::kChannels;
    if (d >= at.channels) continue;
    const int j = row == window ? kWindow : row;
    Lane sum = 0;
#pragma unroll
    for (int group = 0; group < L::kGroups; ++group)
      sum = sum + sums.load((group * (kWindow + 1) + j) * L::kChannels + d);
    store_global(out + row * p.width + d, sum);
  }
}

// The weight's gradient from what `parts` blocks have summed: a block for 32 channels of a tap, or of the bias. Its warps
// take the parts a piece each.
template <class Lane>
__global__ void __launch_bounds__(kConvSumThreads)
    causal_conv1d_sum_kernel(const CausalConv1dBackward p, const void* sums, int64_t parts) {
  constexpr int kWarps = kConvSumThreads / 32;
  const int64_t blocks = (p.width + 31) / 32, tap = blockIdx.x / blocks;
  const int64_t d = (blockIdx.x - tap * blocks) * 32 + lane();
  const Shared<Lane> of_warps = shared_memory<Lane>();
  Lane sum = 0;
  if (d < p.width) {
    const int64_t end = parts * (warp() + 1) / kWarps;
    const int64_t step = (p.window + 1) * p.width;
    int64_t i = parts * warp() / kWarps;
    const Lane* from = static_cast<const Lane*>(sums) + i * step + tap * p.width + d;
#pragma unroll 8 // loads ahead
    for (; i < end; ++i) {
      sum = sum + load_global(from);
      from += step;
    }
  }
  of_warps.store(int(threadIdx.x), sum);
  block_sync();
  if (warp() > 0 || d >= p.width) return;
  sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum = sum + of_warps.load(w * 32 + lane());
  if (tap == p.window)
    store_global(static_cast<Lane*>(p.grad_bias) + d, sum);
  else
    store_global(static_cast<Lane*>(p.grad_weight) + (d + 1) * p.window - 1 - tap, sum);
}

// One step of each sequence: a thread per channel. The state may be overwritten by the next.
template <class S>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_step_kernel(const CausalConv1dForward p) {
  const int64_t channel = int64_t(blockIdx.x) * kConvThreads + threadIdx.x;
  if (channel >= p.num_sequences * p.width) return;
  const ConvChannel<S> c(p, channel);
  S* const y = static_cast<S*>(p.y) + channel;
  if (c.state_row < 0) return store_global(y, S{});
  store_global(y, Stored<S>::narrow(c.output(0)));
  const int64_t before = p.window - 1;
  S* const to = static_cast<S*>(p.final_state) + (c.state_row * p.width + c.d) * before;
#pragma unroll 1
  for (int64_t k = 0; k < before; ++k) store_global(to + k, c.input(k + 1 - before));
}

// The same for common windows, with states that are contiguous: a thread has the channels of a vector of x, whose states
// are W - 1 such vectors.
template <class S, int kWindow>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_step_vectors_kernel(const CausalConv1dForward p) {
  using Vector = SideBySide<S>;
  using Lane = typename Stored<S>::Lane;
  constexpr int V = Vector::kCount, kBefore = kWindow - 1;
  const int64_t vectors = p.width / V;
  const int64_t i = int64_t(blockIdx.x) * kConvThreads + threadIdx.x;
  if (i >= p.num_sequences * vectors) return;
  const int64_t sequence = i / vectors, d = (i - sequence * vectors) * V;
  const int64_t row = p.state_rows ? p.state_rows[sequence] : sequence;
  Vector* const y = reinterpret_cast<Vector*>(static_cast<S*>(p.y) + sequence * p.width + d);
  if (row < 0) return store_global(y, Vector{});
  const int64_t place = (row * p.width + d) * kBefore;
  const Vector* const from =
      reinterpret_cast<const Vector*>(static_cast<const S*>(p.initial_state.data) + place);
  const Vector x = load_global(reinterpret_cast<const Vector*>(
      static_cast<const S*>(p.x.data) + sequence * p.x.sequence + d));
  Vector state[kBefore], next[kBefore];
#pragma unroll
  for (int k = 0; k < kBefore; ++k) state[k] = load_global(from + k);
  const Lane* const weight = static_cast<const Lane*>(p.weight) + d * kWindow;
  const auto input = [&](int v, int k) {
    const int at = v * kBefore + k;
    return k == kBefore ? x.get(v) : state[at / V].get(at % V);
  };
  Lane out[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    Lane sum = p.bias ? load_global(static_cast<const Lane*>(p.bias) + d + v) : Lane(0);
#pragma unroll
    for (int k = 0; k < kWindow; ++k)
      sum = fused(load_global(weight + v * kWindow + k), Stored<S>::widen(input(v, k)), sum);
    out[v] = p.silu ? silu(sum) : sum;
  }
#pragma unroll
  for (int k = 0; k < kBefore; ++k) {
    S some[V];
#pragma unroll
    for (int e = 0; e < V; ++e) some[e] = input((k * V + e) / kBefore, (k * V + e) % kBefore + 1);
    next[k] = Vector::of(some);
  }
  store_global(y, Vector::narrow(out));
  Vector* const to = reinterpret_cast<Vector*>(static_cast<S*>(p.final_state) + place);
#pragma unroll
  for (int k = 0; k < kBefore; ++k) store_global(to + k, next[k]);
}

// ---- windows that are too large for registers: a thread per number that is computed ----

// The sequence of a token, counted over all sequences, and the token's step in it.
TORCH_EXT_DEVICE ConvPiece find_token(const CausalConv1dProblem& p, int64_t token) {
  if (p.cu_seqlens) return find_sequence(p, token);
  const int64_t sequence = token / p.num_steps, row = sequence * p.num_steps;
  return {sequence, row, p.num_steps, token - row, p.num_steps};
}
TORCH_EXT_DEVICE int64_t tokens_of(const CausalConv1dProblem& p) {
  return (p.cu_seqlens ? 1 : p.num_sequences) * p.num_steps;
}

// First y, then the final states.
template <class S>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_wide_forward_kernel(const CausalConv1dForward p) {
  const int64_t i = int64_t(blockIdx.x) * kConvThreads + threadIdx.x;
  const int64_t tokens = tokens_of(p);
  if (i >= tokens * p.width) return put_final_state<S>(p, i - tokens * p.width);
  const ConvPiece piece = find_token(p, i / p.width);
  const ConvChannel<S> c(p, piece, i % p.width);
  store_global(
      static_cast<S*>(p.y) + i, c.state_row < 0 ? S{} : Stored<S>::narrow(c.output(piece.first)));
}

// g of all steps, contiguous.
template <class S>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_wide_gradient_kernel(const CausalConv1dBackward p, void* gradients) {
  const int64_t i = int64_t(blockIdx.x) * kConvThreads + threadIdx.x;
  if (i >= tokens_of(p) * p.width) return;
  const ConvPiece piece = find_token(p, i / p.width);
  const ConvChannel<S> c(p, piece, i % p.width);
  store_global(
      static_cast<typename Stored<S>::Lane*>(gradients) + i, c.gradient(p.grad_y, piece.first));
}

// The gradients of x, then those of the initial states.
template <class S>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_wide_input_kernel(const CausalConv1dBackward p, const void* gradients) {
  using Lane = typename Stored<S>::Lane;
  int64_t i = int64_t(blockIdx.x) * kConvThreads + threadIdx.x;
  const int64_t inputs = tokens_of(p) * p.width, before = p.window - 1;
  const auto gradient = [&](const ConvChannel<S>& c, int64_t t) {
    const Lane* g = static_cast<const Lane*>(gradients) + c.row * p.width + c.d;
    return Stored<S>::narrow(c.input_gradient(
        p.grad_final_state, t, [&](int64_t u) { return load_global(g + u * p.width); }));
  };
  if (i < inputs) {
    const ConvPiece piece = find_token(p, i / p.width);
    const ConvChannel<S> c(p, piece, i % p.width);
    store_global(static_cast<S*>(p.grad_x) + i, gradient(c, piece.first));
    return;
  }
  i -= inputs;
  if (i >= p.num_sequences * p.width * before) return;
  // Neighbouring threads: neighbouring channels.
  const int64_t sequence = i / (p.width * before), rest = i - sequence * p.width * before;
  const int64_t tap = rest / p.width, d = rest - tap * p.width;
  const ConvChannel<S> c(p, sequence * p.width + d);
  store_global(
      static_cast<S*>(p.grad_initial_state) + (sequence * p.width + d) * before + tap,
      gradient(c, tap - before));
}

// The weight's gradient of pieces of `steps` tokens, as causal_conv1d_backward_kernel leaves it: blocks for the channels of
// a tap, of all taps and the bias, and of all pieces.
template <class S>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_wide_weight_kernel(
    const CausalConv1dBackward p, const void* gradients, void* sums, int64_t steps) {
  using Lane = typename Stored<S>::Lane;
  const unsigned blocks = unsigned((p.width + kConvThreads - 1) / kConvThreads),
                 rows = unsigned(p.window) + 1;
  const unsigned row = blockIdx.x / blocks, part = row / rows;
  const int64_t distance = row - part * rows;
  const int64_t d = int64_t(blockIdx.x - row * blocks) * kConvThreads + threadIdx.x;
  if (d >= p.width) return;
  const int64_t tokens = tokens_of(p), begin = part * steps;
  const int64_t until = tokens - begin < steps ? tokens : begin + steps;
  Lane sum = 0;
#pragma unroll 1
  for (int64_t token = begin; token < until;) {
    const ConvPiece piece = find_token(p, token);
    const ConvChannel<S> c(p, piece, d);
    const int64_t end = piece.row + piece.count < until ? piece.row + piece.count : until;
#pragma unroll 1
    for (; token < end; ++token) {
      const Lane g = load_global(static_cast<const Lane*>(gradients) + token * p.width + d);
      sum = distance == p.window
                ? sum + g
                : fused(g, Stored<S>::widen(c.input(token - piece.row - distance)), sum);
    }
  }
  store_global(static_cast<Lane*>(sums) + int64_t(row) * p.width + d, sum);
}

} // namespace torch_ext::cuda
