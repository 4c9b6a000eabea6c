// A diagonal cell, h <- a h + b, over time on a GPU.
//
// A block owns a group of neighbouring channels of one sequence, one or two per lane, and takes tiles of consecutive
// steps: each of its warps a few of them. From a tile's inputs every warp first finds what its steps do to a state,
// h -> A h + H, then the state that reaches it by folding what the warps before it do, and then walks its steps from that
// state. So the gates are computed side by side, the recurrence itself is still stepped through, and the order of all
// operations is fixed.
//
// Enough groups to fill a GPU: a block walks through all tiles, the next ones arriving in shared memory meanwhile. Too
// few: a block per tile. It publishes its A and H, and folds those of the tiles before it, from the last multiple of
// kChain on, where the folded state itself is published. Blocks take tiles from a counter, so those that are waited for are
// running.
//
// Time is counted in positions, 0, 1, ... in the order of processing: forward in the order of the recurrence, backward
// against it. Packed sequences are one row; a position may start a sequence, which replaces the state, and end one.
#pragma once
#include "../cells/diagonal.h"
#include "../core/diagonal_problem.h"
#include "device.cuh"

namespace torch_ext::cuda {

// Tiles in shared memory at once: one being computed, the others arriving.
inline constexpr int kStages = 3;
// Tiles that are folded before their result is published: one per lane.
inline constexpr int kChain = 32;
// Up to so many steps a thread simply walks through its channel's time.
inline constexpr int kShortSteps = 16;
inline constexpr int kShortThreads = 128;
// So many blocks fill a GPU. Not asked of the device: results would depend on it.
inline constexpr int kEnoughBlocks = 256;

// How S's channels are laid out over a warp's lanes and in shared memory, for a tile of kArrays arrays.
template <class S, int kArrays>
struct Tile {
  static constexpr int kPerLane = sizeof(S) == 2 ? 2 : 1;
  static constexpr int kChannels = 32 * kPerLane;
  static constexpr int kRowBytes = kChannels * int(sizeof(S));
  // Of a warp: all in registers at once.
  static constexpr int kSteps = sizeof(S) > 4 ? 32 / int(sizeof(S)) : 8;
  // 16 bytes more than a row: accesses along a column then meet in fewer banks.
  static constexpr int kPitch = kRowBytes + 16;
  static constexpr int fit(int bytes) { return bytes < 1 ? 1 : bytes > 8 ? 8 : bytes; }
  static constexpr int kWarps = fit(16384 / (kArrays * kRowBytes * kSteps));
  static constexpr int kThreads = 32 * kWarps;
  // Blocks on a multiprocessor: bounds the registers of a thread, so that none are spilled.
  static constexpr int kBlocks = (kArrays > 3 ? 384 : 512) / kThreads;
  static constexpr int kTime = kWarps * kSteps;
  static constexpr int kArrayBytes = kTime * kPitch;
  static constexpr int kStageBytes = kArrays * kArrayBytes;
};

// What blocks tell each other when there is a block per tile. A column is one group of channels of one sequence. Flags are
// 0 until what they speak of is there.
struct Chain {
  unsigned* ticket = nullptr; // null: a block walks through all tiles
  int* tile_flags = nullptr;  // [tile][column]: 1, or 2 where a sequence starts in the tile
  int* link_flags = nullptr;  // [tile / kChain][column]: 1
  void* effects = nullptr;    // [tile][column][2][channel]: the tile's A and H
  void* links =
      nullptr; // [tile / kChain][column][channel]: the state before the first of these tiles
};

struct Schedule {
  int64_t groups = 0, columns = 0, tiles = 0; // columns = sequences * groups
  Chain chain;
};

// ---- time ----

// The row of an array that a position stands for, and the sequences of a packed row.
struct Time {
  int64_t count; // positions
  int64_t first, direction;
  const int64_t* cu_seqlens; // null: the row is one sequence
  int64_t sequence, num_sequences;

  TORCH_EXT_DEVICE Time(const DiagonalProblem& p, int64_t row_of_batch, bool backward)
      : count(p.num_steps),
        direction(p.reverse != backward ? -1 : 1),
        cu_seqlens(p.cu_seqlens),
        sequence(row_of_batch),
        num_sequences(p.num_sequences) {
    first = direction < 0 ? count - 1 : 0;
  }
  TORCH_EXT_DEVICE int64_t row(int64_t position) const { return first + position * direction; }

  struct Place {
    int64_t sequence;
    bool starts, ends; // the sequence's first and last position
  };
  // Of a packed row.
  TORCH_EXT_DEVICE Place place(int64_t position) const {
    // The last sequence that begins at or before the row. Offsets are not checked here: that would wait for the device.
    // Whatever they are, the sequence found is one of those that are there.
    const int64_t token = row(position);
    int64_t low = 0, high = num_sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (cu_seqlens[middle] <= token)
        low = middle;
      else
        high = middle;
    }
    const bool begins = token == cu_seqlens[low], finishes = token == cu_seqlens[low + 1] - 1;
    return direction > 0 ? Place{low, begins, finishes} : Place{low, finishes, begins};
  }
};

// The places of a warp's positions, one per lane.
struct Places {
  unsigned starts, ends; // bit k: position k does
  int64_t sequence;      // of this lane's position

  TORCH_EXT_DEVICE Places(const Time& time, int64_t position, int steps) {
    if (!time.cu_seqlens) {
      starts = position == 0 && steps > 0;
      ends = steps > 0 && position + steps == time.count ? 1u << (steps - 1) : 0;
      sequence = time.sequence;
      return;
    }
    Time::Place p{0, false, false};
    if (lane() < steps) p = time.place(position + lane());
    starts = ballot(~0u, p.starts);
    ends = ballot(~0u, p.ends);
    sequence = p.sequence;
  }
  TORCH_EXT_DEVICE int64_t sequence_of(int k) const { return shuffle(~0u, sequence, k); }
};

template <class State>
TORCH_EXT_DEVICE State state_at(const Strided& x, int64_t row, int64_t d) {
  return x.data ? static_cast<const State*>(x.data)[row * x.sequence + d * x.width] : State{};
}

// ---- inputs on their way into shared memory ----

// One array from some position on: its element of that position and channel 0, strides in elements, positions that it has
// from there on. For the next tile to be fetched a block keeps it in shared memory, where one thread takes it from tile to
// tile: in registers it would crowd out the steps.
inline constexpr int kSourceWords = 5;
template <class S>
struct Source {
  const S* data;
  int64_t time, width, count;
  enum Path { elements, vectors, along_time } path;

  TORCH_EXT_DEVICE void put(Shared<int64_t> to) const {
    to.store(0, reinterpret_cast<int64_t>(data));
    to.store(1, time), to.store(2, width), to.store(3, count), to.store(4, path);
  }
  TORCH_EXT_DEVICE static Source get(Shared<int64_t> from) {
    return {
        reinterpret_cast<const S*>(from.load(0)), from.load(1), from.load(2), from.load(3),
        Path(from.load(4))};
  }
  TORCH_EXT_DEVICE void advance(int64_t positions) { data += positions * time, count -= positions; }
};

template <class S>
TORCH_EXT_DEVICE Source<S> source(
    const DiagonalProblem& p, const Strided& x, int64_t sequence, const Time& time,
    int64_t positions_ahead = 0) {
  Source<S> s;
  s.data = static_cast<const S*>(x.data) + (p.cu_seqlens ? 0 : sequence * x.sequence) +
           (time.first + positions_ahead * time.direction) * x.time;
  s.time = time.direction * x.time;
  s.width = x.width;
  s.count = x.data ? time.count - positions_ahead : 0;
  const bool aligned = reinterpret_cast<uintptr_t>(s.data) % 16 == 0 &&
                       s.time * int64_t(sizeof(S)) % 16 == 0 && x.width == 1 &&
                       p.width * int64_t(sizeof(S)) % 16 == 0;
  s.path = aligned                                         ? Source<S>::vectors
           : x.width != 1 && (x.time == 1 || p.width == 1) ? Source<S>::along_time
                                                           : Source<S>::elements;
  return s;
}

// The first kTime rows, or as many as there are, of channels d0 .. d0 + channels; what lies outside of the array stays as it
// is, but for the second channel of a lane's pair.
template <class Layout, class S>
TORCH_EXT_DEVICE void fetch(
    Shared<unsigned char> to, const Source<S>& from, int64_t d0, int channels) {
  const int thread = int(threadIdx.x);
  const int steps = int(from.count < Layout::kTime ? from.count : Layout::kTime);
  const S* data = from.data + d0 * from.width;
  if (from.path == Source<S>::vectors) {
    // A thread's pieces lie in one column.
    constexpr int kInVector = 16 / int(sizeof(S)), kVectors = Layout::kRowBytes / 16,
                  kRows = Layout::kThreads / kVectors;
    const int d = thread % kVectors * kInVector, first = thread / kVectors;
    if (d >= channels) return;
    const S* piece = data + first * from.time + d;
    const int64_t next = kRows * from.time;
    int place = first * Layout::kPitch + d * int(sizeof(S));
#pragma unroll
    for (int t = 0; t < Layout::kTime; t += kRows) {
      if (first + t < steps) copy_async16(to, place, piece);
      piece += next, place += kRows * Layout::kPitch;
    }
    return;
  }
  // Lanes run along whatever lies side by side in memory.
  const bool along_time = from.path == Source<S>::along_time;
  const int padded = (channels + Layout::kPerLane - 1) / Layout::kPerLane * Layout::kPerLane;
  const int fast = along_time ? steps : padded, slow = along_time ? padded : steps;
  const Shared<S> rows = to.template view<S>();
#pragma unroll 1
  for (int j = warp(); j < slow; j += Layout::kWarps) {
    for (int i = lane(); i < fast; i += 32) {
      const int t = along_time ? i : j, d = along_time ? j : i;
      const S x = d < channels ? load_global(data + t * from.time + d * from.width) : S{};
      rows.store(t * (Layout::kPitch / int(sizeof(S))) + d, x);
    }
  }
}

// A lane's channels of one row: one word.
template <class S, int kPerLane>
struct Channels {
  static_assert(kPerLane == 1);
  using Lane = typename Stored<S>::Lane;
  S x;
  TORCH_EXT_DEVICE S get(int) const { return x; }
  TORCH_EXT_DEVICE Lane widen(int) const { return Stored<S>::widen(x); }
  TORCH_EXT_DEVICE static Channels narrow(const Lane* x) { return {Stored<S>::narrow(x[0])}; }
};
template <class S>
struct Channels<S, 2> {
  static_assert(sizeof(S) == 2);
  uint32_t pair;
  TORCH_EXT_DEVICE S get(int v) const { return {uint16_t(pair >> (16 * v))}; }
  TORCH_EXT_DEVICE float widen(int v) const { return Stored<S>::widen(get(v)); }
  TORCH_EXT_DEVICE static Channels narrow(const float* x) { return {pack_pair<S>(x[0], x[1])}; }
};

// ---- the two directions ----

template <class Cell_, class S_>
struct ForwardWalk {
  using Problem = DiagonalForward;
  using Cell = Cell_;
  using S = S_;
  using Lane = typename Stored<S>::Lane;
  static constexpr bool kBackward = false;
  static constexpr int kInputs = num_inputs<Cell>, kArrays = kInputs, kOutputs = 1;

  const Problem& p;
  Cell cell;
  TORCH_EXT_DEVICE explicit ForwardWalk(const Problem& problem) : p(problem), cell(problem.flags) {}

  TORCH_EXT_DEVICE Source<S> find_source(int i, int64_t sequence, const Time& time) const {
    return source<S>(p, p.inputs[i], sequence, time);
  }
  TORCH_EXT_DEVICE bool present(int) const { return true; }
  // How many of the last positions an array lacks.
  TORCH_EXT_DEVICE int64_t missing(int) const { return 0; }
  TORCH_EXT_DEVICE S* output(int) const { return static_cast<S*>(p.h); }
  TORCH_EXT_DEVICE Lane start(int64_t sequence, int64_t d) const {
    return state_at<Lane>(p.initial_state, sequence, d);
  }
  TORCH_EXT_DEVICE void finish(int64_t sequence, int64_t d, Lane state) const {
    static_cast<Lane*>(p.final_state)[sequence * p.width + d] = state;
  }
  TORCH_EXT_DEVICE Affine<Lane> effect(const Lane* x) const {
    return cell.affine(pack<Cell, Lane>(x));
  }
  TORCH_EXT_DEVICE Lane
  step(const Lane*, Affine<Lane> f, Lane state, bool, int64_t, int64_t, Lane* out) const {
    out[0] = fused(f.a, state, f.b);
    return out[0];
  }
};

// The state is the gradient that reaches the step before: c <- conj(a) (dh + c).
template <class Cell_, class S_>
struct BackwardWalk {
  using Problem = DiagonalBackward;
  using Cell = Cell_;
  using S = S_;
  using Lane = typename Stored<S>::Lane;
  static constexpr bool kBackward = true;
  static constexpr int kInputs = num_inputs<Cell>, kOutputs = kInputs;
  // The arrays: the inputs that the gradient reads, h before the step, the gradient of h.
  static constexpr int kRead = [] {
    int count = 0;
    for (int i = 0; i < kInputs; ++i) count += gradient_reads<Cell>(i);
    return count;
  }();
  static constexpr int kArrays = kRead + 2, kBefore = kRead, kGrad = kRead + 1;

  const Problem& p;
  Cell cell;
  TORCH_EXT_DEVICE explicit BackwardWalk(const Problem& problem)
      : p(problem), cell(problem.flags) {}

  TORCH_EXT_DEVICE Source<S> find_source(int i, int64_t sequence, const Time& time) const {
    if (i == kGrad) return source<S>(p, p.grad_h, sequence, time);
    if (i == kBefore)
      return source<S>(p, p.h, sequence, time, 1); // h before a step stands at the next position
    int input = 0;
    for (int k = 0; k < kInputs; ++k) {
      if (!gradient_reads<Cell>(k)) continue;
      if (i-- == 0) input = k;
    }
    return source<S>(p, p.inputs[input], sequence, time);
  }
  // The inputs of the cell; one that is not read is 0.
  TORCH_EXT_DEVICE typename Cell::template Input<Lane> inputs_of(const Lane* x) const {
    Lane all[kInputs];
    int slot = 0;
#pragma unroll
    for (int k = 0; k < kInputs; ++k) all[k] = gradient_reads<Cell>(k) ? x[slot++] : Lane{};
    return pack<Cell, Lane>(all);
  }
  TORCH_EXT_DEVICE bool present(int i) const { return i != kGrad || p.grad_h.data; }
  TORCH_EXT_DEVICE int64_t missing(int i) const { return i == kBefore ? 1 : 0; }
  TORCH_EXT_DEVICE S* output(int i) const { return static_cast<S*>(p.grad_inputs[i]); }
  TORCH_EXT_DEVICE Lane start(int64_t sequence, int64_t d) const {
    return state_at<Lane>(p.grad_final_state, sequence, d);
  }
  TORCH_EXT_DEVICE void finish(int64_t sequence, int64_t d, Lane carry) const {
    static_cast<Lane*>(p.grad_initial_state)[sequence * p.width + d] = carry;
  }
  TORCH_EXT_DEVICE Affine<Lane> effect(const Lane* x) const {
    const Lane a = conj(cell.affine(inputs_of(x)).a);
    return {a, a * x[kGrad]};
  }
  // ends: the sequence's first step in time.
  TORCH_EXT_DEVICE Lane step(
      const Lane* x, Affine<Lane>, Lane carry, bool ends, int64_t sequence, int64_t d,
      Lane* out) const {
    const Lane before = ends ? state_at<Lane>(p.initial_state, sequence, d) : x[kBefore];
    const auto g = step_vjp(cell, inputs_of(x), before, x[kGrad] + carry);
    unpack<Cell, Lane>(g.dx, out);
    return g.dh_before;
  }
};

template <class Walk>
using LayoutOf = Tile<typename Walk::S, Walk::kArrays>;

// Shared memory: the stages; A and H of each warp's steps; the state between tiles, two of them taken in turn; where the
// inputs lie; whether a sequence starts among a warp's steps; the block's tile.
template <class Walk>
TORCH_EXT_HOST_DEVICE constexpr int shared_bytes(bool chained) {
  using L = LayoutOf<Walk>;
  return (chained ? 1 : kStages) * L::kStageBytes +
         (L::kWarps + 1) * 2 * L::kChannels * int(sizeof(typename Walk::Lane)) +
         Walk::kArrays * kSourceWords * int(sizeof(int64_t)) + 2 * int(sizeof(int64_t));
}

// ---- between blocks ----

// Of warp 0: publishes what the tile does (a, b; restarts: a sequence starts in it), and yields the state before it.
template <class Lane, int V>
TORCH_EXT_DEVICE void exchange_with_blocks(
    const Chain& chain, int64_t columns, int64_t column, int64_t tile, bool last, const Lane* a,
    const Lane* b, bool restarts, Lane* state) {
  const auto write = [](Lane* to, const Lane* from) {
#pragma unroll
    for (int v = 0; v < V; ++v) store_global(to + lane() * V + v, from[v]);
  };
  const auto read = [](Lane* to, const Lane* from) {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = load_written_by_blocks(from + lane() * V + v);
  };
  const auto publish = [](int* flag, int value) {
    fence_device();
    warp_sync();
    if (lane() == 0) store_release(flag, value);
  };
  const auto fold = [&](bool starts, const Lane* a, const Lane* b) {
#pragma unroll
    for (int v = 0; v < V; ++v) state[v] = starts ? b[v] : fused(a[v], state[v], b[v]);
  };
  constexpr int64_t kChannels = 32 * V;
  Lane* const effects = static_cast<Lane*>(chain.effects);
  Lane* const links = static_cast<Lane*>(chain.links);
  const auto effect_of = [&](int64_t t) {
    return effects + (t * columns + column) * 2 * kChannels;
  };
  write(effect_of(tile), a);
  write(effect_of(tile) + kChannels, b);
  publish(chain.tile_flags + tile * columns + column, restarts ? 2 : 1);

  const int64_t link = tile / kChain, first = link * kChain;
  const int before = int(tile - first);
  const auto wait = [](const int* flag) {
    int x;
    while ((x = load_acquire(flag)) == 0) pause();
    return x;
  };
  int flag = 0;
  if (lane() < before) flag = wait(chain.tile_flags + (first + lane()) * columns + column);
  if (link > 0 && lane() == before) wait(chain.link_flags + link * columns + column);
  fence_device();
  const unsigned starts = ballot(~0u, flag == 2);
  warp_sync();
#pragma unroll
  for (int v = 0; v < V; ++v) state[v] = Lane{};
  if (link > 0) read(state, links + (link * columns + column) * kChannels);
  for (int i = 0; i < before; ++i) {
    Lane other_a[V], other_b[V];
    read(other_a, effect_of(first + i));
    read(other_b, effect_of(first + i) + kChannels);
    fold(starts >> i & 1, other_a, other_b);
  }
  if (before == kChain - 1 && !last) {
    Lane mine[V];
#pragma unroll
    for (int v = 0; v < V; ++v) mine[v] = state[v];
    fold(restarts, a, b);
    write(links + ((link + 1) * columns + column) * kChannels, state);
    publish(chain.link_flags + (link + 1) * columns + column, 1);
#pragma unroll
    for (int v = 0; v < V; ++v) state[v] = mine[v];
  }
}

// ---- the kernels ----

template <class Walk>
__global__ void __launch_bounds__(LayoutOf<Walk>::kThreads, LayoutOf<Walk>::kBlocks)
    diagonal_tiles_kernel(const typename Walk::Problem p, const Schedule q) {
  using S = typename Walk::S;
  using Lane = typename Walk::Lane;
  using L = LayoutOf<Walk>;
  constexpr int V = L::kPerLane, kArrays = Walk::kArrays, kOutputs = Walk::kOutputs;
  using Row = Channels<S, V>;
  const bool chained = q.chain.ticket != nullptr;
  const int stages = chained ? 1 : kStages;
  const Shared<unsigned char> inputs = shared_memory<unsigned char>();
  const Shared<Lane> effects = shared_memory<Lane>(stages * L::kStageBytes),
                     states = effects + L::kWarps * 2 * L::kChannels;
  const Shared<int64_t> sources = (states + 2 * L::kChannels).template view<int64_t>();
  const Shared<int64_t> restarts = sources + kArrays * kSourceWords; // a byte per warp
  const Shared<int> ticket = (restarts + 1).template view<int>();

  int64_t column = blockIdx.x, first_tile = 0, last_tile = q.tiles - 1;
  if (chained) {
    if (threadIdx.x == 0) ticket.store(0, int(atomic_add(q.chain.ticket, 1u)));
    block_sync();
    const int64_t mine = unsigned(ticket.load(0));
    column = mine % q.columns;
    first_tile = last_tile = mine / q.columns;
  }
  const Walk walk(p);
  const int64_t batch = column / q.groups, d0 = column % q.groups * L::kChannels;
  const int64_t d = d0 + lane() * V;
  const int mine = p.width - d >= V  ? V
                   : p.width - d > 0 ? int(p.width - d)
                                     : 0; // this lane's channels
  const Time time(p, batch, Walk::kBackward);
  const int channels = int(p.width - d0 < L::kChannels ? p.width - d0 : L::kChannels);
  const Shared<int64_t> my_source = sources + int(threadIdx.x) * kSourceWords;
  if (threadIdx.x < kArrays) {
    Source<S> first = walk.find_source(int(threadIdx.x), batch, time);
    first.advance(first_tile * L::kTime);
    first.put(my_source);
  }
  if (threadIdx.x == 0) restarts.store(0, 0);
  block_sync();
  const auto fetch_tile = [&](int stage) {
#pragma unroll 1
    for (int i = 0; i < kArrays; ++i)
      fetch<L>(
          inputs + (stage * L::kStageBytes + i * L::kArrayBytes),
          Source<S>::get(sources + i * kSourceWords), d0, channels);
    copy_async_commit();
  };
  const auto next_sources = [&] {
    if (threadIdx.x < kArrays) {
      Source<S> next = Source<S>::get(my_source);
      next.advance(L::kTime);
      next.put(my_source);
    }
  };
  S* out[kOutputs]; // of the warp's first position in the tile
#pragma unroll
  for (int i = 0; i < kOutputs; ++i)
    out[i] = walk.output(i) + ((p.cu_seqlens ? 0 : batch * p.num_steps) + time.first) * p.width + d;
  const int64_t out_step = time.direction * p.width;
  // Both channels of a pair go out in one access, where all rows allow it.
  bool whole_rows = p.width % V == 0;
#pragma unroll
  for (int i = 0; i < kOutputs; ++i)
    whole_rows = whole_rows && reinterpret_cast<uintptr_t>(walk.output(i)) % sizeof(Row) == 0;
  // The lanes beyond the last channel compute along with the first one's inputs.
  const int lane_row = mine > 0 ? lane() : 0;
  int stage = 0, next_stage = 0;
  for (int64_t tile = first_tile - (stages - 1); tile <= last_tile; ++tile) {
    // The stage that is overwritten was read before the barrier at which the tile before exchanged its effects.
    fetch_tile(next_stage);
    next_stage = next_stage + 1 >= stages ? 0 : next_stage + 1;
    if (tile < first_tile) {
      block_sync(); // all have read where the tile lies
      next_sources();
      block_sync();
      continue;
    }
    if (chained)
      copy_async_wait<0>();
    else
      copy_async_wait<kStages - 1>();
    block_sync(); // the tile is there, and so is the state before it
    next_sources();

    const int64_t position = tile * L::kTime + warp() * L::kSteps, left = time.count - position;
    const int steps = left < 0 ? 0 : left < L::kSteps ? int(left) : L::kSteps;
    const Places places(time, position, steps);
    const Shared<Row> rows =
        (inputs + (stage * L::kStageBytes + warp() * L::kSteps * L::kPitch)).template view<Row>() +
        lane_row;
    // Almost all of a warp's steps are plain: all there, and no sequence starts or ends among them.
    bool plain = steps == L::kSteps && !(places.starts | places.ends) && whole_rows;
    int steps_there[kArrays];
#pragma unroll
    for (int i = 0; i < kArrays; ++i) {
      const int64_t there = left - walk.missing(i);
      steps_there[i] = there < 0 ? 0 : there < steps ? int(there) : steps;
      plain = plain && (steps_there[i] == L::kSteps || !walk.present(i));
    }
    Row x[L::kSteps][kArrays];
    Affine<Lane> f[L::kSteps][V];
    Lane a[V], b[V];
#pragma unroll
    for (int v = 0; v < V; ++v) a[v] = one<Lane>(), b[v] = Lane{};
    const auto find_effect = [&]<bool kPlain>() __attribute__((always_inline)) {
#pragma unroll
      for (int k = 0; k < L::kSteps; ++k) {
        if (!kPlain && k >= steps) break;
#pragma unroll
        for (int i = 0; i < kArrays; ++i) {
          constexpr int kRowsApart = L::kPitch / int(sizeof(Row));
          const bool there = walk.present(i) && (kPlain || k < steps_there[i]);
          x[k][i] =
              there ? rows.load(i * (L::kArrayBytes / int(sizeof(Row))) + k * kRowsApart) : Row{};
        }
        if (!kPlain && (places.starts >> k & 1)) {
          const int64_t sequence = places.sequence_of(k);
#pragma unroll
          for (int v = 0; v < V; ++v) b[v] = v < mine ? walk.start(sequence, d + v) : Lane{};
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          Lane y[kArrays];
#pragma unroll
          for (int i = 0; i < kArrays; ++i) y[i] = x[k][i].widen(v);
          f[k][v] = walk.effect(y);
          a[v] = f[k][v].a * a[v];
          b[v] = fused(f[k][v].a, b[v], f[k][v].b);
        }
      }
    };
    if (plain)
      find_effect.template operator()<true>();
    else
      find_effect.template operator()<false>();
#pragma unroll
    for (int v = 0; v < V; ++v) {
      effects.store((warp() * 2 + 0) * L::kChannels + lane() * V + v, a[v]);
      effects.store((warp() * 2 + 1) * L::kChannels + lane() * V + v, b[v]);
    }
    if (lane() == 0) restarts.template view<unsigned char>().store(warp(), places.starts != 0);
    block_sync();

    // The state after the first `count` warps, from the one before the tile.
    const uint64_t all_restarts = uint64_t(restarts.load(0));
    const auto fold_warps = [&](int count, Lane* to_a, Lane* to_b) {
#pragma unroll
      for (int w = 0; w < L::kWarps; ++w) {
        if (w >= count) break;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const Lane wa = effects.load((w * 2 + 0) * L::kChannels + lane() * V + v),
                     wb = effects.load((w * 2 + 1) * L::kChannels + lane() * V + v);
          if (to_a) to_a[v] = wa * to_a[v];
          to_b[v] = all_restarts >> (8 * w) & 1 ? wb : fused(wa, to_b[v], wb);
        }
      }
    };
    const Shared<Lane> before = states + int(tile % 2) * L::kChannels,
                       after = states + int((tile + 1) % 2) * L::kChannels;
    if (chained) {
      if (warp() == 0) {
        Lane whole_a[V], whole_b[V], state[V];
#pragma unroll
        for (int v = 0; v < V; ++v) whole_a[v] = one<Lane>(), whole_b[v] = Lane{};
        fold_warps(L::kWarps, whole_a, whole_b);
        exchange_with_blocks<Lane, V>(
            q.chain, q.columns, column, tile, tile == q.tiles - 1, whole_a, whole_b,
            all_restarts != 0, state);
#pragma unroll
        for (int v = 0; v < V; ++v) before.store(lane() * V + v, state[v]);
      }
      block_sync();
    }
    Lane state[V];
#pragma unroll
    for (int v = 0; v < V; ++v) state[v] = tile > 0 ? before.load(lane() * V + v) : Lane{};
    fold_warps(warp(), nullptr, state);

    S* to[kOutputs];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) to[i] = out[i] + position * out_step;
    const auto walk_steps = [&]<bool kPlain>() __attribute__((always_inline)) {
#pragma unroll
      for (int k = 0; k < L::kSteps; ++k) {
        if (!kPlain && k >= steps) break;
        const bool starts = !kPlain && (places.starts >> k & 1),
                   ends = !kPlain && (places.ends >> k & 1);
        const int64_t sequence = starts || ends ? places.sequence_of(k) : 0;
        if (starts) {
#pragma unroll
          for (int v = 0; v < V; ++v) state[v] = v < mine ? walk.start(sequence, d + v) : Lane{};
        }
        Lane y[kOutputs][V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          Lane in[kArrays], results[kOutputs];
#pragma unroll
          for (int i = 0; i < kArrays; ++i) in[i] = x[k][i].widen(v);
          state[v] = walk.step(in, f[k][v], state[v], ends && v < mine, sequence, d + v, results);
#pragma unroll
          for (int i = 0; i < kOutputs; ++i) y[i][v] = results[i];
        }
        if (ends) {
#pragma unroll
          for (int v = 0; v < V; ++v)
            if (v < mine) walk.finish(sequence, d + v, state[v]);
        }
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
          const Row row = Row::narrow(y[i]);
          if (kPlain || whole_rows) {
            if (mine > 0) store_global(reinterpret_cast<Row*>(to[i]), row);
          } else {
#pragma unroll
            for (int v = 0; v < V; ++v)
              if (v < mine) store_global(to[i] + v, row.get(v));
          }
          to[i] += out_step;
        }
      }
    };
    if (plain)
      walk_steps.template operator()<true>();
    else
      walk_steps.template operator()<false>();
    if (!chained && warp() == L::kWarps - 1) {
#pragma unroll
      for (int v = 0; v < V; ++v) after.store(lane() * V + v, state[v]);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
}

// A thread per channel, which walks through its time: for few steps, and for states that lie in a pool.
template <class Walk>
__global__ void __launch_bounds__(kShortThreads)
    diagonal_short_kernel(const typename Walk::Problem p) {
  using S = typename Walk::S;
  using Lane = typename Walk::Lane;
  constexpr int kArrays = Walk::kArrays, kOutputs = Walk::kOutputs;
  const int64_t channel = int64_t(blockIdx.x) * kShortThreads + threadIdx.x;
  if (channel >= p.num_sequences * p.width) return;
  const int64_t sequence = channel / p.width, d = channel % p.width;
  const Walk walk(p);
  const Time time(p, sequence, Walk::kBackward);
  Source<S> sources[kArrays];
#pragma unroll
  for (int i = 0; i < kArrays; ++i) sources[i] = walk.find_source(i, sequence, time);
  int64_t at = (sequence * p.num_steps + time.first) * p.width + d;
  // A negative row: no state, outputs are 0. Only forward has rows.
  const int64_t row = p.state_rows ? p.state_rows[sequence] : sequence;
  Lane state = row < 0 ? Lane{} : walk.start(row, d);
#pragma unroll 1
  for (int64_t t = 0; t < p.num_steps; ++t) {
    Lane x[kArrays], y[kOutputs];
#pragma unroll
    for (int i = 0; i < kArrays; ++i)
      x[i] = t < sources[i].count
                 ? Stored<S>::widen(
                       load_global(sources[i].data + t * sources[i].time + d * sources[i].width))
                 : Lane{};
    state = walk.step(x, walk.effect(x), state, t == p.num_steps - 1, sequence, d, y);
#pragma unroll
    for (int i = 0; i < kOutputs; ++i)
      store_global(walk.output(i) + at, row < 0 ? S{} : Stored<S>::narrow(y[i]));
    at += time.direction * p.width;
  }
  if (row >= 0) walk.finish(row, d, state);
}

// Sequences without a step: what starts is what is left.
template <class Walk>
__global__ void __launch_bounds__(kShortThreads)
    diagonal_empty_kernel(const typename Walk::Problem p) {
  const int64_t channel = int64_t(blockIdx.x) * kShortThreads + threadIdx.x;
  if (channel >= p.num_sequences * p.width) return;
  const int64_t sequence = channel / p.width, d = channel % p.width;
  if (p.num_steps > 0 && p.cu_seqlens[sequence] < p.cu_seqlens[sequence + 1]) return;
  const Walk walk(p);
  walk.finish(sequence, d, walk.start(sequence, d));
}

} // namespace torch_ext::cuda
