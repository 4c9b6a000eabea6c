// Mamba's selective scan on a GPU (core/selective_scan_problem.h; a step: cells/selective_scan.h).
//
// A few lanes share a channel, each with some of its states in registers, and step through time: no scan, no atomics.
// A block owns neighbouring channels of one group. It takes tiles of 16 steps: what a channel has one of per token (time
// step, input, gate) is made once and laid into shared memory, as numbers of the kind it is computed with, and so are B
// and C, which all of the block's channels share. Then the lanes step through the tile; what they add up over a channel's
// states is added up between lanes; and all threads together finish the tile's outputs.
//
// A tile lies in one sequence. Packed, the sequences of the row follow each other; steps are counted from each one's start,
// in the order of time. Where blocks would be too few, a row is cut into segments, a block for each: first they walk from
// zero, then the states between them are folded in order, by the decay over a whole segment, which is that over the sum
// of its time steps; then they walk again from there. A segment owns the intervals (between two kept states) that start
// in it.
//
// Backward, tiles are taken from the last to the first. From the kept state before it, eight steps at a time are
// computed again, decays and states in registers, and walked back over. The sums over channels (of B, C) stay in registers
// while the lanes go through the block's channels a few at a time; they leave as one number per block, and those over
// tokens (of A, D, ...) as one per segment; other kernels add them up in order.
//
// Nearly all calls have 16 real states, B and C per token and a row for each sequence. Where channels are enough, they have
// kernels of their own, the wide ones, in which these numbers are constants: forward, a lane has two channels; arrays are
// loaded by 16 bytes; and where softplus makes time steps and no A is positive, exponents need no bound. What does not lie
// so, and tiles that are not whole, are taken number by number.
#pragma once
#include <type_traits>

#include "../cells/selective_scan.h"
#include "../core/selective_scan_problem.h"
#include "device.cuh"

namespace torch_ext::cuda {

inline constexpr int kScanThreads = 128, kScanWarps = kScanThreads / 32;
inline constexpr int kScanTile = int(kSelectiveScanTile);
// Of a tile, backward: so many steps are in registers.
inline constexpr int kScanHalf = 8;
// The block's channels come in at most so many turns, backward.
inline constexpr int kScanMostTurns = 4;
// Bytes of shared memory that every GPU from compute capability 7.5 on has for a block.
inline constexpr int kScanMostShared = 64 << 10;
// So many blocks fill a GPU, and with fewer steps a segment costs more than it gains. Not asked of the device: results
// would depend on it.
inline constexpr int kScanEnoughBlocks = 256, kScanLeastSteps = 64;

// 16 bytes of states: what a lane has in one place of memory.
template <class H>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / int(sizeof(H));
  H x[kSize];
};
// How many of them a lane has of a channel.
inline constexpr int kForwardPacks = 2;

// The types of a call: S of what runs over time, R to compute with, H of states, PerToken of B and C over time.
template <class S_, bool kComplex>
struct ScanTypes {
  using S = S_;
  using R = typename Stored<S>::Lane;
  using H = std::conditional_t<kComplex, Complex<R>, R>;
  using PerToken = std::conditional_t<kComplex, H, S>;
};

// How a call is cut, from shapes alone; and its workspace.
struct ScanPlan {
  int log_lanes = 0; // lanes of a channel: a power of two
  int passes = 1;    // over a channel's states, so many at a time as its lanes hold
  int turns = 1;     // backward: the block's channels at a time
  bool wide = false; // the kernels for what nearly all calls are
  int channels = 0;  // of a block: a power of two, and no more than it has threads
  int log_channels = 0;
  int64_t interval = 0; // between kept states
  int64_t rows = 0, segments = 1, segment_steps = 0, blocks_per_group = 0;
  // Between segments, and between tiles where there are several passes: [row][segment][channel][state]. First a
  // segment's effect from zero, then the state that reaches it.
  void* carry = nullptr;
  void* sums = nullptr;    // of time steps: [row][segment][channel]
  int* restarts = nullptr; // [row][segment]: does its effect know of nothing before it?
  // Backward. Sums over channels: [B, C][block of the group][row][token][group][state].
  void* by_token = nullptr;
  // Sums over tokens: [A, B, C][row][segment][channel][state], and [D, bias][row][segment][channel].
  void *by_state = nullptr, *by_channel = nullptr;
  // Of one thread each: [block][slot][thread] packs.
  void* starts = nullptr;       // states before tiles
  void* accumulators = nullptr; // what shared memory has no room for
};

// ---- blocks, sequences ----

// What a block works on, in shared memory: in registers it would crowd out states.
struct ScanBlock {
  enum Word { kRow, kSegment, kGroup, kBlockOfGroup, kFirstChannel, kChannels, kWords };
  Shared<int64_t> words;
  TORCH_EXT_DEVICE ScanBlock(
      const SelectiveScanProblem& p, const ScanPlan& q, int64_t segments, Shared<int64_t> to)
      : words(to) {
    if (threadIdx.x == 0) {
      int64_t i = blockIdx.x;
      const int64_t block = i % q.blocks_per_group;
      i /= q.blocks_per_group;
      const int64_t group = i % p.num_groups;
      i /= p.num_groups;
      words.store(kSegment, i % segments), words.store(kRow, i / segments);
      const int64_t own = p.width / p.num_groups, first = block * q.channels;
      words.store(kGroup, group), words.store(kBlockOfGroup, block);
      words.store(kFirstChannel, group * own + first);
      words.store(kChannels, own - first < q.channels ? own - first : q.channels);
    }
    block_sync();
  }
  TORCH_EXT_DEVICE int64_t row() const { return words.load(kRow); }
  TORCH_EXT_DEVICE int64_t segment() const { return words.load(kSegment); }
  TORCH_EXT_DEVICE int64_t group() const { return words.load(kGroup); }
  TORCH_EXT_DEVICE int64_t block_of_group() const { return words.load(kBlockOfGroup); }
  TORCH_EXT_DEVICE int64_t d0() const { return words.load(kFirstChannel); }
  TORCH_EXT_DEVICE int channels() const { return int(words.load(kChannels)); }
};

// A place in a row: `offset` steps from the start of a sequence, in the order of time. Offsets of sequences are not
// checked, as that would wait for the device: whatever they are, tokens are those that are there.
struct ScanPlace {
  const SelectiveScanProblem& p;
  const int64_t interval;
  int64_t sequence, begin = 0, length; // where it begins in the row
  int64_t kept = 0;                    // kept states before the sequence's first
  int64_t index = 0, offset = 0;       // of an interval: its number and first step

  TORCH_EXT_DEVICE ScanPlace(const SelectiveScanProblem& problem, int64_t an_interval, int64_t row)
      : p(problem), interval(an_interval), sequence(row), length(p.num_steps) {
    if (!p.cu_seqlens) kept = row * ((p.num_steps + interval - 1) / interval);
  }
  // Shared memory holds it, where one thread takes it from interval to interval: in registers it would crowd out states.
  enum Word { kSequence, kBegin, kLength, kKept, kIndex, kOffset, kMore, kVisited, kWords };
  TORCH_EXT_DEVICE void put(Shared<int64_t> to, bool more) const {
    to.store(kSequence, sequence), to.store(kBegin, begin), to.store(kLength, length);
    to.store(kKept, kept), to.store(kIndex, index), to.store(kOffset, offset);
    to.store(kMore, more);
  }
  TORCH_EXT_DEVICE void get(Shared<int64_t> from) {
    sequence = from.load(kSequence), begin = from.load(kBegin), length = from.load(kLength);
    kept = from.load(kKept), index = from.load(kIndex), offset = from.load(kOffset);
  }
  TORCH_EXT_DEVICE static int64_t clamped(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
  }
  TORCH_EXT_DEVICE void enter(int64_t s) {
    sequence = s, length = 0;
    if (s < 0 || s >= p.num_sequences) return;
    begin = clamped(p.cu_seqlens[s], 0, p.num_steps);
    length = clamped(p.cu_seqlens[s + 1], begin, p.num_steps) - begin;
    kept = begin / interval + s;
  }
  TORCH_EXT_DEVICE void enter_at(int64_t position) {
    int64_t low = 0, high = p.num_sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (p.cu_seqlens[middle] <= position)
        low = middle;
      else
        high = middle;
    }
    enter(low);
  }
  TORCH_EXT_DEVICE void go_to(int64_t number) { index = number, offset = number * interval; }
  TORCH_EXT_DEVICE int64_t position() const { return begin + offset; }
  // The interval at or after a position; is it before `end`?
  TORCH_EXT_DEVICE bool first(int64_t from, int64_t end) {
    if (p.cu_seqlens) enter_at(from);
    go_to(from > begin ? (from - begin + interval - 1) / interval : 0);
    return offset < length ? position() < end : next_sequence(end);
  }
  TORCH_EXT_DEVICE bool next(int64_t end) {
    ++index, offset += interval;
    return offset < length ? position() < end : next_sequence(end);
  }
  TORCH_EXT_DEVICE bool next_sequence(int64_t end) {
    go_to(0);
    if (!p.cu_seqlens) return false;
    do enter(sequence + 1);
    while (length == 0 && sequence < p.num_sequences);
    return sequence < p.num_sequences && position() < end;
  }
  // The last interval that starts before `end`; does it start at or after `from`?
  TORCH_EXT_DEVICE bool last(int64_t from, int64_t end) {
    if (p.cu_seqlens) enter_at(end - 1);
    if (length == 0) return previous_sequence(from);
    go_to(clamped(end - 1 - begin, 0, length - 1) / interval);
    return position() >= from;
  }
  TORCH_EXT_DEVICE bool previous(int64_t from) {
    --index, offset -= interval;
    return offset >= 0 ? position() >= from : previous_sequence(from);
  }
  TORCH_EXT_DEVICE bool previous_sequence(int64_t from) {
    if (!p.cu_seqlens) return false;
    do enter(sequence - 1);
    while (length == 0 && sequence > 0);
    if (length == 0) return false;
    go_to((length - 1) / interval);
    return position() >= from;
  }
};

inline constexpr int kScanWords = int(ScanPlace::kWords) + int(ScanBlock::kWords);

// What a block's threads see of an interval.
struct ScanInterval {
  const SelectiveScanProblem& p;
  int64_t interval;
  Shared<int64_t> at;
  TORCH_EXT_DEVICE int64_t sequence() const { return at.load(ScanPlace::kSequence); }
  TORCH_EXT_DEVICE int64_t offset() const { return at.load(ScanPlace::kOffset); }
  TORCH_EXT_DEVICE int64_t rest() const { return at.load(ScanPlace::kLength) - offset(); }
  // Of the state before its first step.
  TORCH_EXT_DEVICE int64_t kept() const {
    return at.load(ScanPlace::kKept) + at.load(ScanPlace::kIndex);
  }
  TORCH_EXT_DEVICE bool first() const { return offset() == 0; } // of its sequence
  TORCH_EXT_DEVICE bool last() const { return rest() <= interval; }
  TORCH_EXT_DEVICE int steps() const { return int(last() ? rest() : interval); }
  TORCH_EXT_DEVICE int64_t token_of(int step) const {
    const int64_t begin = at.load(ScanPlace::kBegin);
    return p.reverse ? begin + rest() - 1 - step : begin + offset() + step;
  }
};

// ---- memory ----

// The elements of a (step, column) tile that a thread takes, lanes along whatever lies side by side in memory. columns: a
// power of two, at most as many as there are threads.
struct ScanItems {
  int t, column, t_next, column_next, count;
  TORCH_EXT_DEVICE ScanItems(int log_columns, bool along_time) {
    const int i = recomputed(int(threadIdx.x));
    if (along_time) {
      t = i % kScanTile, column = i / kScanTile;
      t_next = 0, column_next = kScanThreads / kScanTile;
      count = ((1 << log_columns) + column_next - 1) / column_next;
    } else {
      t = i >> log_columns, column = i & ((1 << log_columns) - 1);
      t_next = kScanThreads >> log_columns, column_next = 0;
      count = (kScanTile + t_next - 1) / t_next;
    }
  }
  TORCH_EXT_DEVICE int64_t first(int64_t time, int64_t stride) const {
    return t * time + column * stride;
  }
  TORCH_EXT_DEVICE int64_t next(int64_t time, int64_t stride) const {
    return t_next * time + column_next * stride;
  }
};

// A thread's elements of an array over time, one after the other; where there is no array, zeros.
template <class S>
struct ScanCursor {
  using Number = std::remove_const_t<S>;
  using R = typename Stored<Number>::Lane;
  S* at = nullptr;
  int64_t next = 0;
  bool any = false;
  ScanCursor() = default;
  template <class Data>
  TORCH_EXT_DEVICE ScanCursor(
      const OverTime<Data>& x, const SelectiveScanProblem& p, int64_t row, int64_t token,
      int64_t d0, const ScanItems& items) {
    const int64_t time = x.time * recomputed(p.reverse ? -1 : 1);
    any = x.data;
    at = static_cast<S*>(x.data) + row * x.sequence + token * x.time + d0 * x.channel +
         items.first(time, x.channel);
    next = items.next(time, x.channel);
  }
  TORCH_EXT_DEVICE R load(bool there) const {
    return there ? Stored<Number>::widen(load_global(at)) : R(0);
  }
  TORCH_EXT_DEVICE void store(R x) const { store_global(at, Stored<Number>::narrow(x)); }
  TORCH_EXT_DEVICE void advance() { at += next; }
};
// So many elements are on their way at once.
inline constexpr int kScanAhead = 4;
TORCH_EXT_DEVICE bool runs_along_time(const OverTime<const void*>& x) {
  return x.channel != 1 && (x.time == 1 || x.time == -1);
}

// A lane's states of one channel; those beyond the last are zero, and not written.
template <class H, class Data>
struct ScanStates {
  H* data;
  int64_t row, channel, state, count;
  bool packed;
  TORCH_EXT_DEVICE ScanStates(const OverStates<Data>& x, int64_t num_states)
      : data(static_cast<H*>(const_cast<void*>(static_cast<const void*>(x.data)))),
        row(x.row),
        channel(x.channel),
        state(x.state),
        count(num_states) {
    constexpr int K = Pack<H>::kSize;
    packed = state == 1 && count % K == 0 && row % K == 0 && channel % K == 0 &&
             reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
  TORCH_EXT_DEVICE Pack<H> load(int64_t r, int64_t d, int64_t n, bool there) const {
    Pack<H> to{};
    if (!data || !there || n >= count) return to;
    const H* from = data + r * row + d * channel + n * state;
    if (packed) return load_global(reinterpret_cast<const Pack<H>*>(from));
#pragma unroll
    for (int j = 0; j < Pack<H>::kSize; ++j)
      if (n + j < count) to.x[j] = load_global(from + j * state);
    return to;
  }
  TORCH_EXT_DEVICE void store(int64_t r, int64_t d, int64_t n, bool there, Pack<H> from) const {
    if (!data || !there || n >= count) return;
    H* to = data + r * row + d * channel + n * state;
    if (packed) return store_global(reinterpret_cast<Pack<H>*>(to), from);
#pragma unroll
    for (int j = 0; j < Pack<H>::kSize; ++j)
      if (n + j < count) store_global(to + j * state, from.x[j]);
  }
};
// [row][channel][state] without gaps.
template <class H>
TORCH_EXT_DEVICE ScanStates<H, void*> dense_states(void* data, int64_t width, int64_t num_states) {
  return {OverStates<void*>{data, width * num_states, num_states, 1}, num_states};
}
template <class H>
TORCH_EXT_DEVICE Pack<H> in_octaves(Pack<H> A) {
#pragma unroll
  for (int j = 0; j < Pack<H>::kSize; ++j) A.x[j] = torch_ext::in_octaves(A.x[j]);
  return A;
}

// B or C of a block in shared memory: (step, state) of a tile, or (channel, state) where they are constant.
template <class Types>
struct ScanCoefficient {
  using H = typename Types::H;
  using PerToken = typename Types::PerToken;
  const Coefficient<const void*> x;
  Shared<H> to;

  // States first .. first + columns of a tile, columns side by side; channels of a block likewise.
  TORCH_EXT_DEVICE void stage(
      const SelectiveScanProblem& p, int64_t row, int64_t token, int steps, int64_t group,
      int64_t first, int log_columns) const {
    constexpr int kMost = 7; // kScanThreads columns
    static_assert(1 << kMost == kScanThreads);
    const int columns = 1 << log_columns, log_at_once = log_columns < kMost ? log_columns : kMost,
              at_once = 1 << log_at_once;
    const ScanItems items(log_at_once, x.state != 1 && (x.time == 1 || x.time == -1));
    const int64_t time = x.time * recomputed(p.reverse ? -1 : 1);
#pragma unroll 1
    for (int begin = 0; begin < columns; begin += at_once) {
      const PerToken* from = static_cast<const PerToken*>(x.data) + row * x.sequence +
                             token * x.time + group * x.group + (first + begin) * x.state +
                             items.first(time, x.state);
      const int64_t next = items.next(time, x.state);
      int t = items.t, n = begin + items.column;
#pragma unroll 1
      for (int i = 0; i < items.count; i += kScanAhead) {
        H value[kScanAhead];
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          const int tk = t + k * items.t_next, nk = n + k * items.column_next;
          value[k] = H{};
          if (tk < steps && nk < begin + at_once && first + nk < p.num_states)
            value[k] = Stored<PerToken>::widen(load_global(from + k * next));
        }
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          const int tk = t + k * items.t_next, nk = n + k * items.column_next;
          if (tk < kScanTile && nk < begin + at_once) to.store(tk * columns + nk, value[k]);
        }
        from += kScanAhead * next, t += kScanAhead * items.t_next,
            n += kScanAhead * items.column_next;
      }
    }
  }
  struct Same {
    TORCH_EXT_DEVICE H operator()(H x) const { return x; }
  };
  template <class Map = Same>
  TORCH_EXT_DEVICE void stage_constant(
      const SelectiveScanProblem& p, int64_t d0, int channels, int64_t first, int log_columns,
      int all_channels, Map map = {}) const {
    for (int i = int(threadIdx.x); i < all_channels << log_columns; i += kScanThreads) {
      const int c = i >> log_columns, n = i & ((1 << log_columns) - 1);
      H value{};
      if (c < channels && first + n < p.num_states)
        value = map(load_global(
            static_cast<const H*>(x.data) + (d0 + c) * x.channel + (first + n) * x.state));
      to.store(i, value);
    }
  }
};

// ---- sums over lanes ----

template <class X>
TORCH_EXT_DEVICE X exchange(X x, int bits) {
  if constexpr (requires { x.re; })
    return {shuffle_xor(~0u, x.re, bits), shuffle_xor(~0u, x.im, bits)};
  else
    return shuffle_xor(~0u, x, bits);
}
// kCount sums over `2 * step` lanes that lie `stride` apart: done(index, sum) on the one of them that a sum ends up on.
template <int kCount, class X, class Done>
TORCH_EXT_DEVICE void sum_over_lanes(X* v, int step, int stride, int index, bool mine, Done done) {
  if (step == 0) {
    if (mine) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) done(index + k, v[k]);
    }
    return;
  }
  const bool upper = (lane() & (step * stride)) != 0;
  if constexpr (kCount > 1) {
    constexpr int kLeft = kCount / 2;
#pragma unroll
    for (int k = 0; k < kLeft; ++k) {
      const X give = upper ? v[k] : v[k + kLeft], keep = upper ? v[k + kLeft] : v[k];
      v[k] = keep + exchange(give, step * stride);
    }
    sum_over_lanes<kLeft>(v, step / 2, stride, upper ? index + kLeft : index, mine, done);
  } else {
#pragma unroll 1
    for (; step > 0; step /= 2) {
      v[0] = v[0] + exchange(v[0], step * stride);
      mine = mine && !(lane() & (step * stride));
    }
    if (mine) done(index, v[0]);
  }
}

// ---- forward, and what a segment does from zero in either direction ----

enum class ScanWalk { forward, forward_effect, backward_effect };

// Shared memory: time steps, inputs and y of a tile's channels; B and C.
template <class Types, ScanWalk kWalk>
TORCH_EXT_HOST_DEVICE int scan_walk_shared(const ScanPlan& q, bool constant_B, bool constant_C) {
  using R = typename Types::R;
  using H = typename Types::H;
  const int columns = (kForwardPacks * Pack<H>::kSize) << q.log_lanes;
  const int arrays = kWalk == ScanWalk::forward ? 3 : 2;
  const auto coefficient = [&](bool constant) {
    return (constant ? q.channels : kScanTile) * columns * int(sizeof(H));
  };
  const int tile = arrays * kScanTile * (q.channels + 1) * int(sizeof(R));
  return (kWalk != ScanWalk::backward_effect ? coefficient(constant_B) : 0) +
         (kWalk != ScanWalk::forward_effect ? coefficient(constant_C) : 0) + (tile + 15) / 16 * 16 +
         2 * q.channels * int(sizeof(R)) + kScanWords * int(sizeof(int64_t));
}

template <class Types, ScanWalk kWalk, class Problem>
__global__ void __launch_bounds__(kScanThreads, sizeof(typename Types::H) == 4 ? 4 : 2)
    selective_scan_walk_kernel(const Problem p, const ScanPlan q) {
  using S = typename Types::S;
  using R = typename Types::R;
  using H = typename Types::H;
  constexpr int K = Pack<H>::kSize, kPacks = kForwardPacks, kStates = kPacks * K;
  constexpr bool kFull = kWalk == ScanWalk::forward, kBack = kWalk == ScanWalk::backward_effect;
  constexpr int kLogStates = kStates == 8 ? 3 : kStates == 4 ? 2 : 1;
  static_assert(1 << kLogStates == kStates);
  const int log_lanes = q.log_lanes, lanes = 1 << log_lanes, log_columns = log_lanes + kLogStates,
            columns = 1 << log_columns;
  const int thread = int(threadIdx.x), my_lane = thread & (lanes - 1),
            my_channel = thread >> log_lanes, pitch = q.channels + 1;
  const Shared<int64_t> place_of = shared_memory<int64_t>(
      scan_walk_shared<Types, kWalk>(q, p.B.constant, p.C.constant) -
      kScanWords * int(sizeof(int64_t)));
  const ScanBlock block(
      p, q, kFull ? q.segments : q.segments - 1, place_of + int(ScanPlace::kWords));
  // Backward, the last segment's effect reaches all others, and the first's none.
  const auto segment = [&] { return block.segment() + (kBack ? 1 : 0); };
  const bool there = my_channel < block.channels();

  // ---- shared memory ----
  const int tile = kScanTile * pitch;
  Shared<H> next = shared_memory<H>();
  const auto take = [&](bool constant) {
    const Shared<H> taken = next;
    next = next + (constant ? q.channels : kScanTile) * columns;
    return taken;
  };
  const ScanCoefficient<Types> B{p.B, !kBack ? take(p.B.constant) : next};
  const ScanCoefficient<Types> C{p.C, kFull || kBack ? take(p.C.constant) : next};
  const Shared<R> bias = next.template view<R>(), skip = bias + q.channels,
                  steps_of = skip + q.channels, inputs = steps_of + tile, ys = inputs + tile;
  for (int i = thread; i < q.channels; i += kScanThreads) {
    const bool in = i < block.channels();
    const auto get = [&](const OverChannels<const void*>& x) {
      return in && x.data
                 ? load_global(static_cast<const R*>(x.data) + (block.d0() + i) * x.channel)
                 : R(0);
    };
    bias.store(i, get(p.delta_bias));
    if (kFull) skip.store(i, get(p.D));
  }
  const bool along_time = runs_along_time(p.delta);
  // Every thread has as many elements as the others, and all of them are there.
  const bool whole_block =
      block.channels() == q.channels && q.channels >= kScanAhead * kScanThreads / kScanTile;

  bool pooled = false; // states in a row of their own
  int64_t pool_row = 0;
  if constexpr (kFull) {
    pooled = p.state_rows != nullptr;
    if (pooled) pool_row = p.state_rows[block.row()];
    if (pool_row < 0) { // no state: outputs are 0
      for (int64_t i = thread; i < p.num_steps * block.channels(); i += kScanThreads)
        store_global(
            static_cast<S*>(p.out.data) + block.row() * p.out.sequence +
                i / block.channels() * p.out.time +
                (block.d0() + i % block.channels()) * p.out.channel,
            Stored<S>::narrow(R(0)));
      return;
    }
  }

  Pack<H> A[kPacks], h[kPacks];
  R sum = R(0); // of time steps
  const int64_t n0 = int64_t(my_lane) * kStates;
  const auto load = [&](Pack<H>* to, const auto& from, int64_t row, int64_t n) {
#pragma unroll
    for (int v = 0; v < kPacks; ++v)
      to[v] = from.load(row, block.d0() + recomputed(my_channel), n + v * K, there);
  };
  const auto store = [&](const auto& to, int64_t row, int64_t n) {
#pragma unroll
    for (int v = 0; v < kPacks; ++v)
      to.store(row, block.d0() + recomputed(my_channel), n + v * K, there, h[v]);
  };
  const auto load_A = [&](int64_t n) {
    load(A, ScanStates<H, const void*>(p.A, p.num_states), 0, n);
#pragma unroll
    for (int v = 0; v < kPacks; ++v) A[v] = in_octaves(A[v]);
  };
  const ScanStates<H, void*> carry = dense_states<H>(q.carry, p.width, p.num_states);
  const auto carried = [&] { return block.row() * q.segments + segment(); };
  if (q.passes == 1) load_A(n0);
#pragma unroll
  for (int v = 0; v < kPacks; ++v) h[v] = Pack<H>{};

  // Steps t .. t + kSteps of the tile; backward from the last to the first.
  const Shared<Pack<H>> packs_of_B =
                            B.to.template view<Pack<H>>() +
                            ((p.B.constant ? my_channel * columns : 0) / K + my_lane * kPacks),
                        packs_of_C =
                            C.to.template view<Pack<H>>() +
                            ((p.C.constant ? my_channel * columns : 0) / K + my_lane * kPacks);
  const int step_of_B = p.B.constant ? 0 : columns / K, step_of_C = p.C.constant ? 0 : columns / K;
  const auto walk = [&]<int kSteps>(int t, bool first_pass) __attribute__((always_inline)) {
    R y[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int k = t + (kBack ? kSteps - 1 - i : i);
      const R step = steps_of.load(k * pitch + my_channel),
              input = inputs.load(k * pitch + my_channel);
      y[i] = R(0);
      if (!kFull && first_pass) sum = sum + step;
#pragma unroll
      for (int v = 0; v < kPacks; ++v) {
        [[maybe_unused]] Pack<H> b, c;
        if constexpr (!kBack) b = packs_of_B.load(k * step_of_B + v);
        if constexpr (kFull || kBack) c = packs_of_C.load(k * step_of_C + v);
#pragma unroll
        for (int j = 0; j < K; ++j) {
          if constexpr (kBack) {
            const H all = add_scaled(input, conj(c.x[j]), h[v].x[j]);
            h[v].x[j] = all * conj(decay(step, A[v].x[j]));
          } else {
            h[v].x[j] = scan_step(step, input, A[v].x[j], b.x[j], h[v].x[j]).h;
            if constexpr (kFull) y[i] = add_real(h[v].x[j], c.x[j], y[i]);
          }
        }
      }
    }
    if constexpr (kFull) {
#pragma unroll 1
      for (int bits = 1; bits < lanes; bits *= 2) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) y[i] = y[i] + exchange(y[i], bits);
      }
      if (my_lane == 0) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const int at = (t + i) * pitch + my_channel;
          ys.store(at, first_pass ? y[i] : ys.load(at) + y[i]);
        }
      }
    }
  };

  // f(the place, the first position of the segment, the one behind its last): is there another interval?
  const auto move = [&](bool from_memory, auto f) {
    if (thread == 0) {
      const int64_t begin = segment() * q.segment_steps, left = p.num_steps - begin,
                    past = begin + (left < q.segment_steps ? left : q.segment_steps);
      ScanPlace place(p, q.interval, block.row());
      if (from_memory) place.get(place_of);
      place.put(place_of, f(place, begin, past));
    }
    block_sync();
  };
  move(false, [](ScanPlace& place, int64_t begin, int64_t past) {
    return kBack ? place.last(begin, past) : place.first(begin, past);
  });
  bool first_tile = true, restarted = false;
#pragma unroll 1
  while (place_of.load(ScanPlace::kMore)) {
    const ScanInterval interval{p, q.interval, place_of};
    const int interval_steps = interval.steps();
    const int tiles = (interval_steps + kScanTile - 1) / kScanTile;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      const int into = (kBack ? tiles - 1 - i : i) * kScanTile;
      const int count = interval_steps - into < kScanTile ? interval_steps - into : kScanTile;
      const int64_t token = interval.token_of(into);
      const bool to_end = interval.last() && into + count == interval_steps,
                 starts = kBack ? to_end : interval.first() && i == 0;
      block_sync(); // all have read what stands in shared memory
      {
        const ScanItems items(q.log_channels, along_time);
        const auto cursor = [&](const OverTime<const void*>& x) {
          return ScanCursor<const S>(x, p, block.row(), token, block.d0(), items);
        };
        ScanCursor<const S> delta = cursor(p.delta), other, z;
        if constexpr (kBack)
          other = cursor(p.grad_out), z = cursor(p.z);
        else
          other = cursor(p.u);
        const auto fill = [&]<bool kWhole>() __attribute__((always_inline)) {
          int t = items.t, c = items.column, at = t * pitch + c;
          const int at_next = items.t_next * pitch + items.column_next;
#pragma unroll 1
          for (int i = 0; i < items.count; i += kScanAhead) {
            R step[kScanAhead], input[kScanAhead], gate[kScanAhead];
#pragma unroll
            for (int k = 0; k < kScanAhead; ++k) {
              const int tk = t + k * items.t_next, ck = c + k * items.column_next;
              const bool in = kWhole || (tk < count && ck < block.channels());
              step[k] = delta.load(in), input[k] = other.load(in && (!kBack || other.any));
              if (kBack) gate[k] = z.load(in && z.any), z.advance();
              delta.advance(), other.advance();
            }
#pragma unroll
            for (int k = 0; k < kScanAhead; ++k) {
              if (kWhole || (t < kScanTile && c < q.channels)) {
                const R dt = time_step(step[k] + bias.load(c), p.delta_softplus);
                if constexpr (kBack) {
                  if (z.any) input[k] = input[k] * silu_with_slope(gate[k]).value;
                  input[k] = input[k] * R(kReadout<H>);
                } else {
                  input[k] = dt * input[k];
                }
                const bool in = kWhole || t < count;
                steps_of.store(at, in ? dt : R(0)), inputs.store(at, in ? input[k] : R(0));
              }
              t += items.t_next, c += items.column_next, at += at_next;
            }
          }
        };
        if (whole_block && count == kScanTile)
          fill.template operator()<true>();
        else
          fill.template operator()<false>();
      }
#pragma unroll 1
      for (int pass = 0; pass < q.passes; ++pass) {
        const int64_t n_first = int64_t(pass) * columns,
                      n = n_first + recomputed(my_lane) * kStates;
        if (pass > 0) block_sync();
        const auto stage = [&](const ScanCoefficient<Types>& x) {
          if (!x.x.constant)
            x.stage(p, block.row(), token, count, block.group(), n_first, log_columns);
          else if (first_tile || q.passes > 1)
            x.stage_constant(p, block.d0(), block.channels(), n_first, log_columns, q.channels);
        };
        if constexpr (!kBack) stage(B);
        if constexpr (kFull || kBack) stage(C);
        if (q.passes > 1) load_A(n);
        if (starts) {
          if constexpr (kBack) {
            load(
                h, ScanStates<H, const void*>(p.grad_final_state, p.num_states),
                interval.sequence(), n);
          } else {
            load(
                h, ScanStates<H, const void*>(p.initial_state, p.num_states),
                pooled ? pool_row : interval.sequence(), n);
          }
        } else if (!kFull && first_tile) {
#pragma unroll
          for (int v = 0; v < kPacks; ++v) h[v] = Pack<H>{};
        } else if (q.passes > 1 || first_tile) {
          load(h, carry, carried(), n);
        }
        if constexpr (kFull) {
          if (p.checkpoints && i == 0)
            store(dense_states<H>(p.checkpoints, p.width, p.num_states), interval.kept(), n);
        }
        block_sync();
        constexpr int kAtOnce = 4;
        const int whole = count / kAtOnce * kAtOnce;
        if constexpr (kBack) {
          for (int t = count - 1; t >= whole; --t) walk.template operator()<1>(t, pass == 0);
#pragma unroll 1
          for (int t = whole - kAtOnce; t >= 0; t -= kAtOnce)
            walk.template operator()<kAtOnce>(t, pass == 0);
        } else {
#pragma unroll 1
          for (int t = 0; t < whole; t += kAtOnce) walk.template operator()<kAtOnce>(t, pass == 0);
#pragma unroll 1
          for (int t = whole; t < count; ++t) walk.template operator()<1>(t, pass == 0);
        }
        if (q.passes > 1) store(carry, carried(), n);
        if constexpr (kFull) {
          if (to_end)
            store(
                ScanStates<H, void*>(p.final_state, p.num_states),
                pooled ? pool_row : interval.sequence(), n);
        }
      }
      restarted = restarted || starts;
      first_tile = false;
      if constexpr (kFull) {
        block_sync();
        const ScanItems items(q.log_channels, along_time);
        ScanCursor<const S> u(p.u, p, block.row(), token, block.d0(), items),
            z(p.z, p, block.row(), token, block.d0(), items);
        ScanCursor<S> out(p.out, p, block.row(), token, block.d0(), items);
        const auto finish = [&]<bool kWhole>() __attribute__((always_inline)) {
          int t = items.t, c = items.column, at = t * pitch + c;
          const int at_next = items.t_next * pitch + items.column_next;
#pragma unroll 1
          for (int i = 0; i < items.count; i += kScanAhead) {
            R x[kScanAhead], gate[kScanAhead];
#pragma unroll
            for (int k = 0; k < kScanAhead; ++k) {
              const bool in = kWhole || (t + k * items.t_next < count &&
                                         c + k * items.column_next < block.channels());
              x[k] = u.load(in), gate[k] = z.load(in && z.any);
              u.advance(), z.advance();
            }
#pragma unroll
            for (int k = 0; k < kScanAhead; ++k) {
              if (kWhole || (t < count && c < block.channels())) {
                R y = fused(skip.load(c), x[k], ys.load(at) * R(kReadout<H>));
                if (z.any) y = y * silu(gate[k]);
                out.store(y);
              }
              t += items.t_next, c += items.column_next, at += at_next;
              out.advance();
            }
          }
        };
        if (whole_block && count == kScanTile)
          finish.template operator()<true>();
        else
          finish.template operator()<false>();
      }
    }
    block_sync(); // all have read where the interval lies
    move(true, [](ScanPlace& place, int64_t begin, int64_t past) {
      return kBack ? place.previous(begin) : place.next(past);
    });
  }
  if constexpr (!kFull) {
    if (q.passes == 1 || first_tile) {
      for (int pass = 0; pass < q.passes; ++pass)
        store(carry, carried(), int64_t(pass) * columns + n0);
    }
    if (my_lane == 0 && there)
      store_global(static_cast<R*>(q.sums) + carried() * p.width + block.d0() + my_channel, sum);
    if (thread == 0) store_global(q.restarts + carried(), int(restarted));
  }
}

// ---- backward ----

// Shared memory of the backward, in bytes from its start. Offsets that are no array's own are another's.
struct ScanBackwardShared {
  int B, C, A, accumulators, warps, steps, inputs, grad_ys, ys, to_input, to_step, bias, skip,
      place, bytes;
};
// What lanes keep of each pass and turn: the gradient of the state, sums of A's, and where one is constant, of B's and C's.
TORCH_EXT_HOST_DEVICE int scan_accumulators(bool constant) { return constant ? 4 : 2; }

template <class Types>
TORCH_EXT_HOST_DEVICE ScanBackwardShared
scan_backward_shared(const ScanPlan& q, bool constant_B, bool constant_C) {
  using R = typename Types::R;
  using H = typename Types::H;
  const int columns = Pack<H>::kSize << q.log_lanes;
  const int constants = q.channels * columns * int(sizeof(H)),
            tokens = kScanTile * columns * int(sizeof(H)),
            array = kScanTile * (q.channels + 1) * int(sizeof(R));
  ScanBackwardShared at;
  int next = 0;
  const auto take = [&](int bytes) {
    const int taken = next;
    next += bytes;
    return taken;
  };
  at.B = take(constant_B ? constants : tokens);
  at.C = take(constant_C ? constants : tokens);
  at.A = take(constants);
  // Several passes: in global memory.
  at.accumulators = take(
      q.passes > 1 ? 0 : scan_accumulators(constant_B || constant_C) * q.turns * kScanThreads * 16);
  at.warps = take(kScanWarps * 2 * kScanHalf * columns * int(sizeof(H)));
  at.steps = take(array);
  at.inputs = take(array);
  at.grad_ys = take(array);
  at.ys = take(array);
  // A pass reads what the one before it would have written over.
  at.to_input = q.passes > 1 ? take(array) : at.inputs;
  at.to_step = q.passes > 1 ? take(array) : at.grad_ys;
  at.bias = take(q.channels * int(sizeof(R)));
  at.skip = take(q.channels * int(sizeof(R)));
  at.place = take(kScanWords * int(sizeof(int64_t)));
  at.bytes = next;
  return at;
}

// kPlain: one pass, and neither B nor C is constant. Else fewer steps at a time are in registers.
template <class Types, bool kPlain>
__global__ void __launch_bounds__(kScanThreads, 2)
    selective_scan_backward_kernel(const SelectiveScanBackward p, const ScanPlan q) {
  using S = typename Types::S;
  using R = typename Types::R;
  using H = typename Types::H;
  using Lanes = Pack<H>;
  constexpr int kHalf = kPlain ? kScanHalf : sizeof(R) == 4 ? kScanHalf / 2 : 1;
  constexpr int K = Lanes::kSize;
  constexpr int kLogStates = K == 4 ? 2 : K == 2 ? 1 : 0;
  static_assert(1 << kLogStates == K);
  const int log_lanes = q.log_lanes, lanes = 1 << log_lanes, log_columns = log_lanes + kLogStates,
            columns = 1 << log_columns;
  const int thread = int(threadIdx.x), my_lane = thread & (lanes - 1), pitch = q.channels + 1;
  const int at_once = kScanThreads >> log_lanes; // channels of a turn
  const ScanBackwardShared at =
      scan_backward_shared<Types>(q, !kPlain && p.B.constant, !kPlain && p.C.constant);
  const Shared<int64_t> place_of = shared_memory<int64_t>(at.place);
  const ScanBlock block(p, q, q.segments, place_of + int(ScanPlace::kWords));
  const auto part = [&] { return block.row() * q.segments + block.segment(); };
  const bool constant_B = !kPlain && p.B.constant, constant_C = !kPlain && p.C.constant,
             constant = constant_B || constant_C, gate = p.z.data;
  const int passes = kPlain ? 1 : q.passes;
  const ScanCoefficient<Types> B{p.B, shared_memory<H>(at.B)}, C{p.C, shared_memory<H>(at.C)};
  const Shared<H> As = shared_memory<H>(at.A), warps = shared_memory<H>(at.warps);
  const Shared<R> steps_of = shared_memory<R>(at.steps), inputs = shared_memory<R>(at.inputs),
                  grad_ys = shared_memory<R>(at.grad_ys), ys = shared_memory<R>(at.ys),
                  to_input = shared_memory<R>(at.to_input), to_step = shared_memory<R>(at.to_step),
                  bias = shared_memory<R>(at.bias), skip = shared_memory<R>(at.skip);
  for (int i = thread; i < q.channels; i += kScanThreads) {
    const bool in = i < block.channels();
    const auto get = [&](const OverChannels<const void*>& x) {
      return in && x.data
                 ? load_global(static_cast<const R*>(x.data) + (block.d0() + i) * x.channel)
                 : R(0);
    };
    bias.store(i, get(p.delta_bias)), skip.store(i, get(p.D));
  }
  const bool along_time = runs_along_time(p.delta);
  // Every thread has as many elements as the others, and all of them are there.
  const bool whole_block =
      block.channels() == q.channels && q.channels >= kScanAhead * kScanThreads / kScanTile;

  // ---- what is a lane's own ----
  enum { kGradH, kGradA, kGradB, kGradC };
  const int kinds = scan_accumulators(constant);
  const Shared<Lanes> own = shared_memory<Lanes>(at.accumulators) + thread;
  Lanes* const own_global = static_cast<Lanes*>(q.accumulators) +
                            int64_t(blockIdx.x) * passes * q.turns * kinds * kScanThreads + thread;
  const auto slot = [&](int pass, int turn, int kind) {
    return ((pass * q.turns + turn) * kinds + kind) * kScanThreads;
  };
  const auto get_own = [&](int pass, int turn, int kind) {
    return passes == 1 ? own.load(slot(pass, turn, kind))
                       : load_global(own_global + slot(pass, turn, kind));
  };
  const auto put_own = [&](int pass, int turn, int kind, const Lanes& x) {
    if (passes == 1)
      own.store(slot(pass, turn, kind), x);
    else
      store_global(own_global + slot(pass, turn, kind), x);
  };
  // The states before the tiles of an interval, but for the first, which is kept.
  const auto start_of = [&](int tile, int pass, int turn) {
    const int64_t before = int64_t(blockIdx.x) * (q.interval / kScanTile - 1) + tile - 1;
    return static_cast<Lanes*>(q.starts) +
           ((before * passes + pass) * q.turns + turn) * kScanThreads + recomputed(thread);
  };
  const auto channel_of = [&](int turn) { return turn * at_once + (thread >> log_lanes); };
  const ScanStates<H, void*> kept =
      dense_states<H>(const_cast<void*>(p.checkpoints), p.width, p.num_states);

  const auto over_own = [&](auto f) { // f(pass, turn, channel of the block, first state)
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
#pragma unroll 1
      for (int turn = 0; turn < q.turns; ++turn)
        f(pass, turn, channel_of(turn), int64_t(pass) * columns + my_lane * K);
    }
  };
  over_own([&](int pass, int turn, int, int64_t) {
    for (int kind = 0; kind < kinds; ++kind) put_own(pass, turn, kind, Lanes{});
  });

  const auto stage_constant = [&](int64_t first) {
    const ScanCoefficient<Types> A{{p.A.data, true, 0, 0, 0, p.A.channel, p.A.state}, As};
    A.stage_constant(p, block.d0(), block.channels(), first, log_columns, q.channels, [](H x) {
      return torch_ext::in_octaves(x);
    });
    if (constant_B)
      B.stage_constant(p, block.d0(), block.channels(), first, log_columns, q.channels);
    if (constant_C)
      C.stage_constant(p, block.d0(), block.channels(), first, log_columns, q.channels);
  };
  if (passes == 1) stage_constant(0);

  // Time steps and inputs of a tile, and with `all` the gradient of y.
  const auto stage_tile = [&](int64_t token, int count, bool all) {
    const ScanItems items(q.log_channels, along_time);
    ScanCursor<const S> delta(p.delta, p, block.row(), token, block.d0(), items),
        u(p.u, p, block.row(), token, block.d0(), items),
        z(p.z, p, block.row(), token, block.d0(), items),
        grad(p.grad_out, p, block.row(), token, block.d0(), items);
    const auto fill = [&]<bool kWhole>() __attribute__((always_inline)) {
      int t = items.t, c = items.column, at = t * pitch + c;
      const int at_next = items.t_next * pitch + items.column_next;
#pragma unroll 1
      for (int i = 0; i < items.count; i += kScanAhead) {
        R step[kScanAhead], input[kScanAhead], gates[kScanAhead], grad_y[kScanAhead];
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          const bool in = kWhole || (t + k * items.t_next < count &&
                                     c + k * items.column_next < block.channels());
          step[k] = delta.load(in), input[k] = u.load(in);
          gates[k] = z.load(in && all && z.any), grad_y[k] = grad.load(in && all && grad.any);
          delta.advance(), u.advance(), z.advance(), grad.advance();
        }
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          if (kWhole || (t < kScanTile && c < q.channels)) {
            const R dt =
                kWhole || t < count ? time_step(step[k] + bias.load(c), p.delta_softplus) : R(0);
            steps_of.store(at, dt), inputs.store(at, dt * input[k]);
            if (all) {
              if (gate) grad_y[k] = grad_y[k] * silu_with_slope(gates[k]).value;
              grad_ys.store(at, grad_y[k] * R(kReadout<H>));
            }
          }
          t += items.t_next, c += items.column_next, at += at_next;
        }
      }
    };
    if (whole_block && count == kScanTile)
      fill.template operator()<true>();
    else
      fill.template operator()<false>();
  };
  const auto stage_coefficients = [&](int64_t token, int count, int pass, bool all) {
    const int64_t first = int64_t(pass) * columns;
    if (passes > 1) stage_constant(first);
    if (!constant_B) B.stage(p, block.row(), token, count, block.group(), first, log_columns);
    if (all && !constant_C)
      C.stage(p, block.row(), token, count, block.group(), first, log_columns);
  };
  const Shared<Lanes> packs_of_A = As.template view<Lanes>() + my_lane,
                      packs_of_B = B.to.template view<Lanes>() + my_lane,
                      packs_of_C = C.to.template view<Lanes>() + my_lane;
  // B's pack of step t and channel c: the t * step + c * channel-th.
  const int step_of_B = constant_B ? 0 : lanes, channel_of_B = constant_B ? lanes : 0,
            step_of_C = constant_C ? 0 : lanes, channel_of_C = constant_C ? lanes : 0;
  // Through the first `count` steps of the tile.
  const auto replay = [&](Lanes& h, const Lanes& A, int c, int count) {
    Shared<Lanes> b_at = packs_of_B + c * channel_of_B;
    Shared<R> at_step = steps_of + c, at_input = inputs + c;
#pragma unroll 4
    for (int t = 0; t < count; ++t) {
      const R step = at_step.load(0), input = at_input.load(0);
      const Lanes b = b_at.load(0);
#pragma unroll
      for (int j = 0; j < K; ++j) h.x[j] = scan_step(step, input, A.x[j], b.x[j], h.x[j]).h;
      b_at = b_at + step_of_B, at_step = at_step + pitch, at_input = at_input + pitch;
    }
  };

  // The thread-th channel's sums of D and bias: in global memory, where they take no registers.
  const auto add_to_channel = [&](R of_D, R of_bias, bool first) {
    if (thread >= block.channels()) return;
    const int64_t all = q.rows * q.segments * p.width;
    R* const to =
        static_cast<R*>(q.by_channel) + part() * p.width + block.d0() + recomputed(thread);
    store_global(to, first ? R(0) : load_global(to) + of_D);
    store_global(to + all, first ? R(0) : load_global(to + all) + of_bias);
  };
  add_to_channel(R(0), R(0), true);
  const auto move = [&](bool from_memory, auto f) {
    if (thread == 0) {
      const int64_t begin = block.segment() * q.segment_steps, left = p.num_steps - begin,
                    past = begin + (left < q.segment_steps ? left : q.segment_steps);
      ScanPlace place(p, q.interval, block.row());
      if (from_memory) place.get(place_of);
      place.put(place_of, f(place, begin, past));
      place_of.store(ScanPlace::kVisited, from_memory); // is it not the block's first interval?
    }
    block_sync();
  };
  move(
      false, [](ScanPlace& place, int64_t begin, int64_t past) { return place.last(begin, past); });
#pragma unroll 1
  while (place_of.load(ScanPlace::kMore)) {
    const ScanInterval interval{p, q.interval, place_of};
    const int tiles = (interval.steps() + kScanTile - 1) / kScanTile;
    if (interval.last() || !place_of.load(ScanPlace::kVisited)) {
      const ScanStates<H, const void*> last(p.grad_final_state, p.num_states);
      const ScanStates<H, void*> carry = dense_states<H>(q.carry, p.width, p.num_states);
      over_own([&](int pass, int turn, int c, int64_t n) {
        const bool there = c < block.channels();
        put_own(
            pass, turn, kGradH,
            interval.last() ? last.load(interval.sequence(), block.d0() + c, n, there)
                            : carry.load(part(), block.d0() + c, n, there));
      });
    }
    // ---- the states before the interval's tiles ----
#pragma unroll 1
    for (int tile = 0; tile + 1 < tiles; ++tile) {
      const int64_t token = interval.token_of(tile * kScanTile);
      block_sync();
      stage_tile(token, kScanTile, false);
#pragma unroll 1
      for (int pass = 0; pass < passes; ++pass) {
        if (pass > 0) block_sync();
        stage_coefficients(token, kScanTile, pass, false);
        block_sync();
#pragma unroll 1
        for (int turn = 0; turn < q.turns; ++turn) {
          const int c = channel_of(turn);
          Lanes h = tile == 0 ? kept.load(
                                    interval.kept(), block.d0() + c,
                                    int64_t(pass) * columns + my_lane * K, c < block.channels())
                              : load_global(start_of(tile, pass, turn));
          replay(h, packs_of_A.load(c * lanes), c, kScanTile);
          store_global(start_of(tile + 1, pass, turn), h);
        }
      }
    }
    // ---- and back ----
#pragma unroll 1
    for (int tile = tiles - 1; tile >= 0; --tile) {
      const int64_t token = interval.token_of(tile * kScanTile);
      const int steps_left = interval.steps() - tile * kScanTile,
                count = steps_left < kScanTile ? steps_left : kScanTile;
      block_sync();
      stage_tile(token, count, true);
#pragma unroll 1
      for (int pass = 0; pass < passes; ++pass) {
        const int64_t n_first = int64_t(pass) * columns, n = n_first + my_lane * K;
        if (pass > 0) block_sync();
        stage_coefficients(token, count, pass, true);
        block_sync();
#pragma unroll 1
        for (int half = (count - 1) / kHalf * kHalf; half >= 0; half -= kHalf) {
          H grad_B[kHalf * K], grad_C[kHalf * K];
#pragma unroll
          for (int i = 0; i < kHalf * K; ++i) grad_B[i] = grad_C[i] = H{};
          const auto start = [&](int turn) {
            const int c = channel_of(turn);
            return tile == 0 ? kept.load(interval.kept(), block.d0() + c, n, c < block.channels())
                             : load_global(start_of(tile, pass, turn));
          };
#pragma unroll 1
          for (int turn = 0; turn < q.turns; ++turn) {
            const int c = recomputed(channel_of(turn));
            Lanes h = start(turn);
            const Lanes A = packs_of_A.load(c * lanes);
            replay(h, A, c, half);

            H decays[kHalf][K], states[kHalf + 1][K];
            R sums[3][kHalf]; // of the gradient of the input, of the time step; of y
#pragma unroll
            for (int j = 0; j < K; ++j) states[0][j] = h.x[j];
            const int from = half * pitch + c;
#pragma unroll
            for (int t = 0; t < kHalf; ++t) {
              const R step = steps_of.load(from + t * pitch), input = inputs.load(from + t * pitch);
              const Lanes b = packs_of_B.load((half + t) * step_of_B + c * channel_of_B);
#pragma unroll
              for (int j = 0; j < K; ++j) {
                const ScanStep<R, H> s = scan_step(step, input, A.x[j], b.x[j], states[t][j]);
                decays[t][j] = s.decay, states[t + 1][j] = s.h;
              }
            }
            warp_sync(); // what the steps read is loaded again: kept, it would take the registers of the sums
            Lanes g = get_own(pass, turn, kGradH), gA = get_own(pass, turn, kGradA);
#pragma unroll
            for (int t = kHalf - 1; t >= 0; --t) {
              const Lanes b = packs_of_B.load((half + t) * step_of_B + c * channel_of_B),
                          cc = packs_of_C.load((half + t) * step_of_C + c * channel_of_C);
              const R step = steps_of.load(from + t * pitch), input = inputs.load(from + t * pitch),
                      grad_y = grad_ys.load(from + t * pitch);
              ScanSums<R, H> sum{};
              R y = R(0);
#pragma unroll
              for (int j = 0; j < K; ++j) {
                scan_step_vjp(
                    step, input, A.x[j], b.x[j], cc.x[j], decays[t][j], states[t][j],
                    states[t + 1][j], grad_y, g.x[j], gA.x[j], grad_B[t * K + j], grad_C[t * K + j],
                    sum);
                if (gate) y = add_real(states[t + 1][j], cc.x[j], y);
              }
              sums[0][t] = sum.input, sums[1][t] = out_of_octaves(sum.parts), sums[2][t] = y;
            }
            put_own(pass, turn, kGradH, g), put_own(pass, turn, kGradA, gA);
            if (constant) {
              const auto fold = [&](int kind, H* v) {
                Lanes all = get_own(pass, turn, kind);
#pragma unroll
                for (int t = kHalf - 1; t >= 0; --t) {
#pragma unroll
                  for (int j = 0; j < K; ++j)
                    all.x[j] = all.x[j] + v[t * K + j], v[t * K + j] = H{};
                }
                put_own(pass, turn, kind, all);
              };
              if (constant_B) fold(kGradB, grad_B);
              if (constant_C) fold(kGradC, grad_C);
            }
            warp_sync(); // all lanes of the channel have read what is written over
            const auto put = [&](const Shared<R>& to, R* v) {
              sum_over_lanes<kHalf>(v, lanes / 2, 1, 0, true, [&](int t, R sum) {
                const int at = from + t * pitch;
                to.store(at, pass > 0 ? to.load(at) + sum : sum);
              });
            };
            put(to_input, sums[0]), put(to_step, sums[1]);
            if (gate) put(ys, sums[2]);
          }
          // ---- over the channels ----
          const auto gather = [&](int which, H* v) {
            sum_over_lanes<kHalf * K>(v, (32 >> log_lanes) / 2, lanes, 0, true, [&](int i, H sum) {
              warps.store(
                  ((warp() * 2 + which) * kHalf + i / K) * columns + my_lane * K + i % K, sum);
            });
          };
          const bool of_B = !constant_B && p.grad_B.data, of_C = !constant_C && p.grad_C.data;
          if (of_B) gather(0, grad_B);
          if (of_C) gather(1, grad_C);
          block_sync();
          const auto leave = [&](int which) {
            H* const slab = static_cast<H*>(q.by_token) +
                            (which * q.blocks_per_group + block.block_of_group()) * q.rows *
                                p.num_steps * p.num_groups * p.num_states;
            for (int i = thread; i < kHalf * columns; i += kScanThreads) {
              const int t = i >> log_columns, column = i & (columns - 1);
              if (half + t >= count || n_first + column >= p.num_states) continue;
              H sum = warps.load(which * kHalf * columns + i);
#pragma unroll
              for (int w = 1; w < kScanWarps; ++w)
                sum = sum + warps.load((w * 2 + which) * kHalf * columns + i);
              const int64_t step = half + t, to = block.row() * p.num_steps +
                                                  (p.reverse ? token - step : token + step);
              store_global(
                  slab + (to * p.num_groups + block.group()) * p.num_states + n_first + column,
                  sum);
            }
          };
          if (of_B) leave(0);
          if (of_C) leave(1);
          block_sync();
        }
      }
      // ---- outputs ----
      {
        const ScanItems items(q.log_channels, along_time);
        ScanCursor<const S> delta(p.delta, p, block.row(), token, block.d0(), items),
            u(p.u, p, block.row(), token, block.d0(), items),
            z(p.z, p, block.row(), token, block.d0(), items),
            grad(p.grad_out, p, block.row(), token, block.d0(), items);
        ScanCursor<S> grad_u(p.grad_u, p, block.row(), token, block.d0(), items),
            grad_delta(p.grad_delta, p, block.row(), token, block.d0(), items),
            grad_z(p.grad_z, p, block.row(), token, block.d0(), items);
        constexpr int kAhead = 2;
        const auto finish = [&]<bool kWhole>() __attribute__((always_inline)) {
          int t = items.t, c = items.column, at = t * pitch + c;
          const int at_next = items.t_next * pitch + items.column_next;
#pragma unroll 1
          for (int i = 0; i < items.count; i += kAhead) {
            R step[kAhead], x[kAhead], gates[kAhead], g[kAhead];
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
              const bool in = kWhole || (t + k * items.t_next < count &&
                                         c + k * items.column_next < block.channels());
              step[k] = delta.load(in), x[k] = u.load(in), gates[k] = z.load(in && z.any);
              g[k] = grad.load(in && grad.any);
              delta.advance(), u.advance(), z.advance(), grad.advance();
            }
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
              if (kWhole || (t < kScanTile && c < q.channels)) {
                R of_D = R(0), of_bias = R(0);
                if (kWhole || (t < count && c < block.channels())) {
                  const R by_input = to_input.load(at), D = skip.load(c);
                  if (gate) {
                    const Gate<R> silu = silu_with_slope(gates[k]);
                    const R y = ys.load(at) * R(kReadout<H>);
                    if (grad_z.any) grad_z.store(g[k] * silu.slope * fused(D, x[k], y));
                    g[k] = g[k] * silu.value;
                  }
                  of_D = g[k] * x[k];
                  of_bias = fused(by_input, x[k], to_step.load(at)) *
                            time_step_slope(step[k] + bias.load(c), p.delta_softplus);
                  grad_delta.store(of_bias);
                  grad_u.store(fused(by_input, steps_of.load(at), D * g[k]));
                }
                to_input.store(at, of_D), to_step.store(at, of_bias);
              }
              t += items.t_next, c += items.column_next, at += at_next;
              grad_u.advance(), grad_delta.advance(), grad_z.advance();
            }
          }
        };
        if (whole_block && count == kScanTile)
          finish.template operator()<true>();
        else
          finish.template operator()<false>();
      }
      block_sync();
      if (thread < q.channels) {
        R of_D = R(0), of_bias = R(0);
#pragma unroll
        for (int t = kScanTile - 1; t >= 0; --t) {
          of_D = of_D + to_input.load(t * pitch + thread);
          of_bias = of_bias + to_step.load(t * pitch + thread);
        }
        add_to_channel(of_D, of_bias, false);
      }
    }
    if (interval.first()) {
      const ScanStates<H, void*> to(p.grad_initial_state, p.num_states);
      over_own([&](int pass, int turn, int c, int64_t n) {
        to.store(
            interval.sequence(), block.d0() + c, n, c < block.channels(),
            get_own(pass, turn, kGradH));
      });
    }
    block_sync(); // all have read where the interval lies
    move(true, [](ScanPlace& place, int64_t begin, int64_t) { return place.previous(begin); });
  }
  // ---- sums over tokens ----
  const int64_t parts = q.rows * q.segments;
  over_own([&](int pass, int turn, int c, int64_t n) {
    const bool there = c < block.channels();
    const auto put = [&](int64_t kind, int from) {
      dense_states<H>(q.by_state, p.width, p.num_states)
          .store(kind * parts + part(), block.d0() + c, n, there, get_own(pass, turn, from));
    };
    put(0, kGradA);
    if (constant) put(1, kGradB), put(2, kGradC);
  });
}

} // namespace torch_ext::cuda
