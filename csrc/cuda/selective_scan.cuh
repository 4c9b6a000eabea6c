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

// ---- forward, as nearly all calls are ----

// A real number that never has a positive product with a time step: exp2 needs no bound on that. The states of a scan_step
// where all of A and all time steps say so.
struct Falling {
  float x;
  friend TORCH_EXT_DEVICE Falling decay(float time_step, Falling A) {
    return {exp2_bounded(time_step * A.x)};
  }
  friend TORCH_EXT_DEVICE Falling fused(Falling x, Falling y, Falling z) {
    return {torch_ext::fused(x.x, y.x, z.x)};
  }
  friend TORCH_EXT_DEVICE Falling scaled(float x, Falling y) { return {x * y.x}; }
};
template <bool kFalls>
TORCH_EXT_DEVICE ScanStep<float, float> next_state(
    float time_step, float input, float A, float B, float h) {
  if constexpr (kFalls) {
    const ScanStep<float, Falling> s =
        scan_step(time_step, input, Falling{A}, Falling{B}, Falling{h});
    return {s.decay.x, s.h.x};
  } else {
    return scan_step(time_step, input, A, B, h);
  }
}

// Elements that lie side by side in memory. 16-bit ones are kept as words, of which registers are made.
template <class S, int kCount>
struct alignas(sizeof(S) * kCount) ScanVector {
  using R = typename Stored<S>::Lane;
  uint32_t words[kCount * sizeof(S) / 4];
  TORCH_EXT_DEVICE R widen(int i) const {
    if constexpr (sizeof(S) == 2) {
      return Stored<S>::widen(S{uint16_t(words[i / 2] >> (16 * (i % 2)))});
    } else {
      R x;
      memcpy(&x, words + i, sizeof x);
      return x;
    }
  }
  TORCH_EXT_DEVICE static ScanVector narrow(const R* x) {
    ScanVector y;
    if constexpr (sizeof(S) == 2) {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) y.words[i] = pack_pair<S>(x[2 * i], x[2 * i + 1]);
    } else {
      memcpy(y.words, x, sizeof y);
    }
    return y;
  }
};

// Where a tile's (step, channel) elements lie, for 16 states, B and C per token and one sequence per row. A thread loads
// 16 bytes that lie side by side: channels of one step, or steps of one channel. kShare channels share 16 bytes of shared
// memory, a slot, for what goes into the steps and then for what comes out. Slots are in such an order that what threads
// write at once falls on all banks.
template <class Types, int kShare>
struct ScanWide {
  using S = typename Types::S;
  using R = typename Types::R;
  static constexpr int kStates = 16, kVector = 16 / int(sizeof(S)), kLogChannels = 7,
                       kChannels = 1 << kLogChannels, kSlots = kChannels / kShare;
  static constexpr int kVectors = kScanTile / kVector;       // of a thread
  static constexpr int kAhead = kVectors < 2 ? kVectors : 2; // of them on their way at once
  static constexpr int kRows =
      kScanTile / kVectors; // steps that all threads load at once, where channels lie side by side
  static constexpr int kNextSlot =
      kSlots / (kVector / kShare); // and how far a vector's slots are from each other
  static_assert(kChannels == kScanThreads && kRows == kVector);
  using Vector = ScanVector<S, kVector>;

  bool along_time;
  TORCH_EXT_DEVICE int slot_of(int channel) const {
    const int i = channel / kShare;
    return along_time ? i : i % (kVector / kShare) * kNextSlot + channel / kVector;
  }
  TORCH_EXT_DEVICE int channel_of(int slot) const {
    const int i = along_time ? slot : slot % kNextSlot * (kVector / kShare) + slot / kNextSlot;
    return i * kShare;
  }
  // Of a thread's vectors.
  template <bool kTime>
  TORCH_EXT_DEVICE static int step(int vector) {
    return kTime ? vector * kVector : int(threadIdx.x) / (kChannels / kVector) + vector * kRows;
  }
  template <bool kTime>
  TORCH_EXT_DEVICE static int channel() {
    return kTime ? int(threadIdx.x) : int(threadIdx.x) % (kChannels / kVector) * kVector;
  }
  // Can an array be loaded so, from this channel on?
  template <class Data>
  TORCH_EXT_DEVICE bool fits(
      const OverTime<Data>& x, const SelectiveScanProblem& p, int64_t d0) const {
    constexpr int64_t kMost = 1 << 24; // of a stride, for offsets of 32 bits inside a tile
    const int64_t side = along_time ? x.time : x.channel, far = along_time ? x.channel : x.time;
    return !x.data ||
           (side == 1 && !(along_time && p.reverse) && far % kVector == 0 &&
            x.sequence % kVector == 0 && kMost > far && kMost > -far &&
            reinterpret_cast<uintptr_t>(static_cast<const S*>(x.data) + d0 * x.channel) % 16 == 0);
  }
  // From a tile's first element to the thread's first, and from there to its next one.
  template <class Data>
  TORCH_EXT_DEVICE int first(const OverTime<Data>& x, int direction) const {
    return along_time ? channel<true>() * int(x.channel)
                      : step<false>(0) * direction * int(x.time) + channel<false>();
  }
  template <class Data>
  TORCH_EXT_DEVICE int next(const OverTime<Data>& x, int direction) const {
    return along_time ? kVector : kRows * direction * int(x.time);
  }
  // Of each of a vector's elements the channel's value.
  template <bool kTime>
  TORCH_EXT_DEVICE static void load_values(Shared<R> values, R* to) {
    if constexpr (kTime) {
      const R x = values.load(channel<true>());
#pragma unroll
      for (int j = 0; j < kVector; ++j) to[j] = x;
    } else {
#pragma unroll
      for (int j = 0; j < kVector; j += Pack<R>::kSize) {
        const Pack<R> x =
            (values + channel<false>()).template view<Pack<R>>().load(j / Pack<R>::kSize);
#pragma unroll
        for (int i = 0; i < Pack<R>::kSize; ++i) to[j + i] = x.x[i];
      }
    }
  }
};
// A thread's vectors of a tile of an array.
template <class Wide, class Data>
struct ScanVectors {
  using S = typename Wide::S;
  using Vector = typename Wide::Vector;
  using Number = std::conditional_t<std::is_const_v<std::remove_pointer_t<Data>>, const S, S>;
  Number* at = nullptr;
  int next = 0;
  ScanVectors() = default;
  // tile: where the tile begins. Not for arrays that are not there.
  TORCH_EXT_DEVICE ScanVectors(
      const Wide& wide, const OverTime<Data>& x, const SelectiveScanProblem& p, Number* tile) {
    const int direction = p.reverse ? -1 : 1;
    at = tile + wide.first(x, direction), next = wide.next(x, direction);
  }
  TORCH_EXT_DEVICE static Number* tile(
      const OverTime<Data>& x, int64_t sequence, int64_t token, int64_t d0) {
    if (!x.data) return nullptr;
    return static_cast<Number*>(x.data) + sequence * x.sequence + token * x.time + d0 * x.channel;
  }
  TORCH_EXT_DEVICE Vector load(int k) const {
    return load_global(reinterpret_cast<const Vector*>(at + k * next));
  }
  TORCH_EXT_DEVICE void store(int k, const typename Wide::R* x) const {
    store_global(reinterpret_cast<Vector*>(at + k * next), Vector::narrow(x));
  }
  TORCH_EXT_DEVICE void next_tile() { at += Wide::kVectors * next; }
};

// A tile of B and C into shared memory, (step, state). Half of the threads load B, and half C: four states each.
template <class Types>
struct ScanWideCoefficients {
  using S = typename Types::S;
  using R = typename Types::R;
  const S* at = nullptr;
  bool vectors; // do they lie so?
  TORCH_EXT_DEVICE static bool loads_C() {
    return recomputed(int(threadIdx.x)) >= kScanThreads / 2;
  }
  TORCH_EXT_DEVICE static int item() { return recomputed(int(threadIdx.x)) % (kScanThreads / 2); }
  TORCH_EXT_DEVICE ScanWideCoefficients(
      const SelectiveScanProblem& p, int64_t row, int64_t group, int64_t token) {
    const int direction = p.reverse ? -1 : 1;
    const auto fits = [](const Coefficient<const void*>& x) {
      return x.state == 1 && x.time % 4 == 0 && x.sequence % 4 == 0 && x.group % 4 == 0 &&
             reinterpret_cast<uintptr_t>(x.data) % (4 * sizeof(S)) == 0;
    };
    const auto start = [&](const Coefficient<const void*>& x) {
      return static_cast<const S*>(x.data) + row * x.sequence + group * x.group +
             (token + item() / 4 * direction) * x.time + item() % 4 * 4;
    };
    vectors = fits(p.B) && fits(p.C);
    if (!vectors) return;
    if (loads_C())
      at = start(p.C);
    else
      at = start(p.B);
  }
  TORCH_EXT_DEVICE void stage(
      const SelectiveScanProblem& p, const ScanBlock& block, const auto& token, int count,
      Shared<R> B, Shared<R> C) const {
    if (vectors && count == kScanTile) {
      const auto x = load_global(reinterpret_cast<const ScanVector<S, 4>*>(at));
      (loads_C() ? C : B)
          .template view<Pack<R>>()
          .store(item(), {x.widen(0), x.widen(1), x.widen(2), x.widen(3)});
    } else {
      ScanCoefficient<Types>{p.B, B}.stage(p, block.row(), token(), count, block.group(), 0, 4);
      ScanCoefficient<Types>{p.C, C}.stage(p, block.row(), token(), count, block.group(), 0, 4);
    }
  }
  TORCH_EXT_DEVICE void advance(const SelectiveScanProblem& p, int steps) {
    if (vectors) at += (p.reverse ? -steps : steps) * (loads_C() ? p.C.time : p.B.time);
  }
};

template <class Types>
TORCH_EXT_HOST_DEVICE int scan_wide_shared() {
  using Wide = ScanWide<Types, 2>;
  return 2 * kScanTile * Wide::kStates * int(sizeof(float)) + kScanTile * Wide::kSlots * 16 +
         2 * Wide::kChannels * int(sizeof(float)) + int(ScanBlock::kWords) * int(sizeof(int64_t));
}

// So many blocks share a multiprocessor's registers. Turing's code needs some more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr int kScanWideBlocks = 2;
#else
inline constexpr int kScanWideBlocks = 4;
#endif

// Two lanes share two channels, each with eight states of both: what they load of B and C is used twice.
template <class Types>
__global__ void __launch_bounds__(kScanThreads, kScanWideBlocks)
    selective_scan_wide_kernel(const SelectiveScanForward p, const ScanPlan q) {
  using S = typename Types::S;
  using R = typename Types::R;
  using Wide = ScanWide<Types, 2>;
  using Vector = typename Wide::Vector;
  using Four = Pack<R>;
  static_assert(Four::kSize == 4);
  struct alignas(8) Two {
    R x[2];
  };
  constexpr int kStates = Wide::kStates, kSlots = Wide::kSlots, kVector = Wide::kVector;
  const int thread = int(threadIdx.x);
  const Shared<R> Bs = shared_memory<R>(), Cs = Bs + kScanTile * kStates;
  const Shared<Four> slots = (Cs + kScanTile * kStates).template view<Four>();
  const Shared<R> bias = (slots + kScanTile * kSlots).template view<R>(),
                  skip = bias + Wide::kChannels;
  const ScanBlock block(p, q, q.segments, (skip + Wide::kChannels).template view<int64_t>());
  const int64_t d0 = block.d0(), row = block.row();
  const int channels = block.channels();
  {
    const bool in = thread < channels;
    const auto get = [&](const OverChannels<const void*>& x) {
      return in && x.data ? load_global(static_cast<const R*>(x.data) + (d0 + thread) * x.channel)
                          : R(0);
    };
    bias.store(thread, get(p.delta_bias)), skip.store(thread, get(p.D));
  }
  const Wide wide{runs_along_time(p.delta)};
  const bool vectors = channels == Wide::kChannels && wide.fits(p.u, p, d0) &&
                       wide.fits(p.delta, p, d0) && wide.fits(p.z, p, d0) &&
                       wide.fits(p.out, p, d0);
  // ---- where the segment lies ----
  const int64_t begin = block.segment() * q.segment_steps, left = p.num_steps - begin,
                steps = left < q.segment_steps ? left : q.segment_steps;
  int tiles = int((steps + kScanTile - 1) / kScanTile);
  const int all_tiles = tiles, last_count = int(steps - int64_t(tiles - 1) * kScanTile);
  const auto token = [&] { // of the tile's first step; found again where it is wanted: seldom
    const int64_t step = block.segment() * q.segment_steps + int64_t(all_tiles - tiles) * kScanTile;
    return p.reverse ? p.num_steps - 1 - step : step;
  };
  using Read = ScanVectors<Wide, const void*>;
  using Write = ScanVectors<Wide, void*>;
  const bool gate = p.z.data;
  Read delta, u, z;
  Write out;
  if (vectors) {
    const auto read = [&](const OverTime<const void*>& x) {
      return Read(wide, x, p, Read::tile(x, row, token(), d0));
    };
    delta = read(p.delta), u = read(p.u);
    if (gate) z = read(p.z);
    out = Write(wide, p.out, p, Write::tile(p.out, row, token(), d0));
  }
  ScanWideCoefficients<Types> coefficients(p, row, block.group(), token());

  // ---- states ----
  const int half = thread & 1, my_slot = thread >> 1, c0 = wide.channel_of(my_slot);
  R A[2][8], h[2][8];
  const auto load = [&](R(*to)[8], const auto& from, int64_t r) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const Four x = from.load(r, block.d0() + c0 + c, half * 8 + v * 4, c0 + c < channels);
#pragma unroll
        for (int j = 0; j < 4; ++j) to[c][v * 4 + j] = x.x[j];
      }
    }
  };
  const auto store = [&](const ScanStates<R, void*>& to, int64_t r) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        Four x;
#pragma unroll
        for (int j = 0; j < 4; ++j) x.x[j] = h[c][v * 4 + j];
        to.store(r, block.d0() + c0 + c, half * 8 + v * 4, c0 + c < channels, x);
      }
    }
  };
  load(A, ScanStates<R, const void*>(p.A, kStates), 0);
  bool falls = p.delta_softplus;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    A[i / 8][i % 8] = torch_ext::in_octaves(A[i / 8][i % 8]);
    falls = falls && A[i / 8][i % 8] <= R(0);
  }
  falls = ballot(~0u, falls) == ~0u;
  if (block.segment() == 0)
    load(h, ScanStates<R, const void*>(p.initial_state, kStates), row);
  else
    load(h, dense_states<R>(q.carry, p.width, kStates), row * q.segments + block.segment());
  R* kept = nullptr;
  if (p.checkpoints)
    kept = static_cast<R*>(p.checkpoints) +
           ((row * ((p.num_steps + kScanTile - 1) / kScanTile) + begin / kScanTile) * p.width + d0 +
            c0) *
               kStates +
           half * 8;

  // Of this tile, steps t .. t + kSteps.
  const auto walk = [&]<bool kFalls, int kSteps>(int t) __attribute__((always_inline)) {
    const Shared<Four> items = slots + (t * kSlots + my_slot);
    const Shared<Four> b_at = Bs.template view<Four>() + (t * 4 + half * 2),
                       c_at = Cs.template view<Four>() + (t * 4 + half * 2);
    Two y[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const Four item = items.load(i * kSlots);
      y[i] = {};
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const Four b = b_at.load(i * 4 + v), cc = c_at.load(i * 4 + v);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            R& state = h[c][v * 4 + j];
            state =
                next_state<kFalls>(item.x[2 * c], item.x[2 * c + 1], A[c][v * 4 + j], b.x[j], state)
                    .h;
            y[i].x[c] = add_real(state, cc.x[j], y[i].x[c]);
          }
        }
      }
    }
    warp_sync(); // the pair of lanes has read what it writes over
    const Shared<Two> ys = items.template view<Two>() + half;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) ys.store(i * kSlots * 2, y[i]);
  };

  block_sync();
#pragma unroll 1
  for (; tiles > 0; --tiles) {
    const int count = tiles == 1 ? last_count : kScanTile;
    const bool whole = vectors && count == kScanTile;
    const auto fill = [&]<bool kTime>() __attribute__((always_inline)) {
      const int slot = wide.slot_of(Wide::template channel<kTime>());
#pragma unroll 1
      for (int first = 0; first < Wide::kVectors; first += Wide::kAhead) {
        Vector deltas[Wide::kAhead], us[Wide::kAhead];
#pragma unroll
        for (int k = 0; k < Wide::kAhead; ++k)
          deltas[k] = delta.load(first + k), us[k] = u.load(first + k);
#pragma unroll
        for (int k = 0; k < Wide::kAhead; ++k) {
          R dt[kVector];
          Wide::template load_values<kTime>(bias, dt);
#pragma unroll
          for (int j = 0; j < kVector; ++j) dt[j] = deltas[k].widen(j) + dt[j];
          if (p.delta_softplus) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) dt[j] = time_step(dt[j], true);
          }
          const Shared<Four> to = slots + (Wide::template step<kTime>(first + k) * kSlots + slot);
          if constexpr (kTime) {
            const Shared<Two> half = to.template view<Two>() + thread % 2;
#pragma unroll
            for (int j = 0; j < kVector; ++j)
              half.store(j * kSlots * 2, {dt[j], dt[j] * us[k].widen(j)});
          } else {
#pragma unroll
            for (int j = 0; j < kVector; j += 2)
              to.store(
                  j / 2 * Wide::kNextSlot,
                  {dt[j], dt[j] * us[k].widen(j), dt[j + 1], dt[j + 1] * us[k].widen(j + 1)});
          }
        }
      }
    };
    if (whole && wide.along_time) {
      block_sync(); // all have read what stands in shared memory
      fill.template operator()<true>();
    } else if (whole) { // only what the thread has read itself
      fill.template operator()<false>();
    } else {
      block_sync(); // all have read what stands in shared memory
      const ScanItems items(Wide::kLogChannels, wide.along_time);
      ScanCursor<const S> delta(p.delta, p, block.row(), token(), block.d0(), items),
          u(p.u, p, block.row(), token(), block.d0(), items);
      int t = items.t, c = items.column;
#pragma unroll 1
      for (int i = 0; i < items.count; i += kScanAhead) {
        R step[kScanAhead], input[kScanAhead];
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          const bool in = t + k * items.t_next < count && c + k * items.column_next < channels;
          step[k] = delta.load(in), input[k] = u.load(in);
          delta.advance(), u.advance();
        }
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          const R dt = t < count ? time_step(step[k] + bias.load(c), p.delta_softplus) : R(0);
          (slots + (t * kSlots + wide.slot_of(c)))
              .template view<Two>()
              .store(c % 2, {dt, dt * input[k]});
          t += items.t_next, c += items.column_next;
        }
      }
    }
    coefficients.stage(p, block, token, count, Bs, Cs);
    if (p.checkpoints) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (c0 + i / 2 < channels) {
          Four x;
#pragma unroll
          for (int j = 0; j < 4; ++j) x.x[j] = h[i / 2][i % 2 * 4 + j];
          store_global(reinterpret_cast<Four*>(kept + i / 2 * kStates + i % 2 * 4), x);
        }
      }
      kept += p.width * kStates;
    }
    block_sync();
    constexpr int kAtOnce = 4;
    if (falls && count == kScanTile) {
#pragma unroll 1
      for (int t = 0; t < kScanTile; t += kAtOnce) walk.template operator()<true, kAtOnce>(t);
    } else {
      const int many = count / kAtOnce * kAtOnce;
#pragma unroll 1
      for (int t = 0; t < many; t += kAtOnce) walk.template operator()<false, kAtOnce>(t);
#pragma unroll 1
      for (int t = many; t < count; ++t) walk.template operator()<false, 1>(t);
    }
    block_sync();
    const auto finish = [&]<bool kTime>() __attribute__((always_inline)) {
      const int slot = wide.slot_of(Wide::template channel<kTime>());
#pragma unroll 1
      for (int first = 0; first < Wide::kVectors; first += Wide::kAhead) {
        Vector us[Wide::kAhead], gates[Wide::kAhead];
#pragma unroll
        for (int k = 0; k < Wide::kAhead; ++k) {
          us[k] = u.load(first + k);
          if (gate) gates[k] = z.load(first + k);
        }
#pragma unroll
        for (int k = 0; k < Wide::kAhead; ++k) {
          const Shared<Four> from = slots + (Wide::template step<kTime>(first + k) * kSlots + slot);
          R y[kVector], D[kVector];
          if constexpr (kTime) {
            const Shared<R> own = from.template view<R>() + thread % 2;
#pragma unroll
            for (int j = 0; j < kVector; ++j)
              y[j] = own.load(j * kSlots * 4) + own.load(j * kSlots * 4 + 2);
          } else {
#pragma unroll
            for (int j = 0; j < kVector; j += 2) {
              const Four parts = from.load(j / 2 * Wide::kNextSlot);
              y[j] = parts.x[0] + parts.x[2], y[j + 1] = parts.x[1] + parts.x[3];
            }
          }
          Wide::template load_values<kTime>(skip, D);
#pragma unroll
          for (int j = 0; j < kVector; ++j) y[j] = fused(D[j], us[k].widen(j), y[j]);
          if (gate) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) y[j] = y[j] * silu(gates[k].widen(j));
          }
          out.store(first + k, y);
        }
      }
      delta.next_tile(), u.next_tile(), out.next_tile();
      if (gate) z.next_tile();
    };
    if (whole && wide.along_time) {
      finish.template operator()<true>();
    } else if (whole) {
      finish.template operator()<false>();
    } else {
      const ScanItems items(Wide::kLogChannels, wide.along_time);
      ScanCursor<const S> u(p.u, p, block.row(), token(), block.d0(), items),
          z(p.z, p, block.row(), token(), block.d0(), items);
      ScanCursor<S> out(p.out, p, block.row(), token(), block.d0(), items);
      int t = items.t, c = items.column;
#pragma unroll 1
      for (int i = 0; i < items.count; i += kScanAhead) {
        R x[kScanAhead], gate[kScanAhead];
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          const bool in = t + k * items.t_next < count && c + k * items.column_next < channels;
          x[k] = u.load(in), gate[k] = z.load(in && z.any);
          u.advance(), z.advance();
        }
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          if (t < count && c < channels) {
            const Four parts = slots.load(t * kSlots + wide.slot_of(c));
            const R sum = c % 2 ? parts.x[1] + parts.x[3] : parts.x[0] + parts.x[2];
            R y = fused(skip.load(c), x[k], sum);
            if (z.any) y = y * silu(gate[k]);
            out.store(y);
          }
          t += items.t_next, c += items.column_next;
          out.advance();
        }
      }
    }
    coefficients.advance(p, kScanTile);
  }
  if (block.segment() == q.segments - 1)
    store(ScanStates<R, void*>(p.final_state, kStates), block.row());
}

// Thread by thread a state of a row: from what segments do, the state that reaches each of them.
template <class Types, bool kBack, class Problem>
__global__ void __launch_bounds__(kScanThreads)
    selective_scan_fold_kernel(const Problem p, const ScanPlan q) {
  using R = typename Types::R;
  using H = typename Types::H;
  const int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x, own = p.width * p.num_states;
  if (i >= q.rows * own) return;
  const int64_t row = i / own, state = i % own, d = state / p.num_states, n = state % p.num_states;
  const H A = torch_ext::in_octaves(
      load_global(static_cast<const H*>(p.A.data) + d * p.A.channel + n * p.A.state));
  H running{};
#pragma unroll 4
  for (int64_t k = 0; k < q.segments; ++k) {
    const int64_t at = row * q.segments + (kBack ? q.segments - 1 - k : k);
    H* const slot = static_cast<H*>(q.carry) + at * own + state;
    if (k + 1 == q.segments) return store_global(slot, running);
    const H effect = load_global(slot);
    H a = decay(load_global(static_cast<const R*>(q.sums) + at * p.width + d), A);
    if (kBack) a = conj(a);
    store_global(slot, running);
    running = load_global(q.restarts + at) ? effect : fused(a, running, effect);
  }
}

// Sequences without a step: what starts is what is left. A thread per state.
template <class Types, class Problem>
__global__ void __launch_bounds__(kScanThreads) selective_scan_empty_kernel(const Problem p) {
  using H = typename Types::H;
  const int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x, own = p.width * p.num_states;
  if (i >= p.num_sequences * own) return;
  const int64_t s = i / own, d = i % own / p.num_states, n = i % p.num_states;
  if (p.num_steps > 0 && p.cu_seqlens[s] < p.cu_seqlens[s + 1]) return;
  const auto copy = [&](const OverStates<const void*>& from, const OverStates<void*>& to) {
    if (!to.data) return;
    const H x = from.data ? load_global(
                                static_cast<const H*>(from.data) + s * from.row + d * from.channel +
                                n * from.state)
                          : H{};
    store_global(static_cast<H*>(to.data) + s * to.row + d * to.channel + n * to.state, x);
  };
  if constexpr (requires { p.grad_out; })
    copy(p.grad_final_state, p.grad_initial_state);
  else
    copy(p.initial_state, p.final_state);
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

// ---- backward, as nearly all calls are ----

// Shared memory, in bytes from its start.
template <class Types>
struct ScanWideBackward {
  using Wide = ScanWide<Types, 1>;
  static constexpr int kLanes = 4, kTurns = Wide::kChannels * kLanes / kScanThreads;
  static constexpr int kCoefficient = kScanTile * Wide::kStates * 4,
                       kPerThread = kTurns * kScanThreads * 16;
  static constexpr int kB = 0, kC = kB + kCoefficient, kSlots = kC + kCoefficient,
                       kA = kSlots + kScanTile * Wide::kSlots * 16,
                       kGradH = kA + Wide::kChannels * Wide::kStates * 4,
                       kGradA = kGradH + kPerThread, kWarps = kGradA + kPerThread,
                       kBias = kWarps + kScanWarps * 2 * kScanHalf * Wide::kStates * 4,
                       kSkip = kBias + Wide::kChannels * 4, kPlace = kSkip + Wide::kChannels * 4,
                       kTiles = kPlace + int(ScanBlock::kWords) * 8, kBytes = kTiles + 9 * 8;
};

// Four lanes share a channel, and a block's channels come in four turns.
template <class Types>
__global__ void __launch_bounds__(kScanThreads, 2)
    selective_scan_wide_backward_kernel(const SelectiveScanBackward p, const ScanPlan q) {
  using S = typename Types::S;
  using R = typename Types::R;
  using At = ScanWideBackward<Types>;
  using Wide = typename At::Wide;
  using Vector = typename Wide::Vector;
  using Four = Pack<R>;
  static_assert(Four::kSize == 4);
  struct alignas(8) Two {
    R x[2];
  };
  constexpr int kStates = Wide::kStates, kSlots = Wide::kSlots, kVector = Wide::kVector,
                kHalf = kScanHalf, kLanes = At::kLanes, kAtOnce = kScanThreads / kLanes;
  const int thread = int(threadIdx.x), my_lane = thread % kLanes;
  const Shared<R> Bs = shared_memory<R>(At::kB), Cs = shared_memory<R>(At::kC),
                  bias = shared_memory<R>(At::kBias), skip = shared_memory<R>(At::kSkip),
                  warps = shared_memory<R>(At::kWarps);
  // Of a slot: time step, input, gradient of y; then time step, gradient of the input, gradient of the time step through the
  // decays, y; and in the end a channel's sums of the gradients of D and the bias.
  const Shared<Four> slots = shared_memory<Four>(At::kSlots);
  const Shared<Four> packs_of_A = shared_memory<Four>(At::kA) + thread,
                     own_h = shared_memory<Four>(At::kGradH) + thread,
                     own_A = shared_memory<Four>(At::kGradA) + thread;
  const ScanBlock block(p, q, q.segments, shared_memory<int64_t>(At::kPlace));
  const int64_t d0 = block.d0(), row = block.row();
  const auto part = [&] { return block.row() * q.segments + block.segment(); };
  const int channels = block.channels();
  const bool in_block = thread < channels;
  {
    const auto get = [&](const OverChannels<const void*>& x) {
      return in_block && x.data
                 ? load_global(static_cast<const R*>(x.data) + (d0 + thread) * x.channel)
                 : R(0);
    };
    bias.store(thread, get(p.delta_bias)), skip.store(thread, get(p.D));
  }
  const Wide wide{runs_along_time(p.delta)};
  const bool gate = p.z.data;
  // ---- what a lane has of each turn's channel ----
  const auto slot_of_turn = [&](int turn) { return turn * kAtOnce + thread / kLanes; };
  const auto over_turns = [&](auto f) { // f(turn, channel)
#pragma unroll 1
    for (int turn = 0; turn < At::kTurns; ++turn) f(turn, wide.channel_of(slot_of_turn(turn)));
  };
  bool falls = p.delta_softplus;
  {
    const ScanStates<R, const void*> A(p.A, kStates), last(p.grad_final_state, kStates);
    const ScanStates<R, void*> carry = dense_states<R>(q.carry, p.width, kStates);
    over_turns([&](int turn, int c) {
      const bool there = c < channels;
      const Four a = in_octaves(A.load(0, d0 + c, my_lane * 4, there));
#pragma unroll
      for (int j = 0; j < 4; ++j) falls = falls && a.x[j] <= R(0);
      packs_of_A.store(turn * kScanThreads, a);
      own_A.store(turn * kScanThreads, Four{});
      own_h.store(
          turn * kScanThreads, block.segment() == q.segments - 1
                                   ? last.load(row, d0 + c, my_lane * 4, there)
                                   : carry.load(part(), d0 + c, my_lane * 4, there));
    });
  }
  falls = ballot(~0u, falls) == ~0u;

  // ---- where the segment's last tile lies ----
  const int64_t begin = block.segment() * q.segment_steps, left = p.num_steps - begin,
                steps = left < q.segment_steps ? left : q.segment_steps;
  int tiles = int((steps + kScanTile - 1) / kScanTile);
  int count = int(steps - int64_t(tiles - 1) * kScanTile);
  const int direction = p.reverse ? -1 : 1;
  const int64_t last_step = begin + int64_t(tiles - 1) * kScanTile;
  const auto token = [&] { // of the tile's first step; found again where it is wanted: seldom
    const int64_t step = block.segment() * q.segment_steps + int64_t(tiles - 1) * kScanTile;
    return p.reverse ? p.num_steps - 1 - step : step;
  };
  const bool vectors = channels == Wide::kChannels && wide.fits(p.u, p, d0) &&
                       wide.fits(p.delta, p, d0) && wide.fits(p.z, p, d0) &&
                       wide.fits(p.grad_out, p, d0) && wide.fits(p.grad_u, p, d0) &&
                       wide.fits(p.grad_delta, p, d0) && wide.fits(p.grad_z, p, d0);
  // Where arrays' tiles begin, in shared memory.
  enum { kDelta, kU, kZ, kGrad, kGradU, kGradDelta, kGradZ, kGradB, kGradC, kArrays };
  const Shared<int64_t> tile_of = shared_memory<int64_t>(At::kTiles);
  using Read = ScanVectors<Wide, const void*>;
  using Write = ScanVectors<Wide, void*>;
  if (thread == 0) {
    const auto put = [&](int i, const auto* at) {
      tile_of.store(i, int64_t(reinterpret_cast<uintptr_t>(at)));
    };
    const auto reads = [&](int i, const OverTime<const void*>& x) {
      put(i, Read::tile(x, row, token(), d0));
    };
    const auto writes = [&](int i, const OverTime<void*>& x) {
      put(i, Write::tile(x, row, token(), d0));
    };
    reads(kDelta, p.delta), reads(kU, p.u), reads(kZ, p.z), reads(kGrad, p.grad_out);
    for (int which = 0; which < 2; ++which) // sums over the block's channels
      put(kGradB + which,
          (which ? p.grad_C.data : p.grad_B.data)
              ? static_cast<R*>(q.by_token) +
                    ((((which * q.blocks_per_group + block.block_of_group()) * q.rows + row) *
                          p.num_steps +
                      token()) *
                         p.num_groups +
                     block.group()) *
                        kStates
              : nullptr);
    writes(kGradU, p.grad_u), writes(kGradDelta, p.grad_delta), writes(kGradZ, p.grad_z);
  }
  const auto read = [&](const OverTime<const void*>& x, int i) {
    return !x.data ? Read()
                   : Read(wide, x, p, reinterpret_cast<const S*>(uintptr_t(tile_of.load(i))));
  };
  const auto write = [&](const OverTime<void*>& x, int i) {
    return !x.data ? Write() : Write(wide, x, p, reinterpret_cast<S*>(uintptr_t(tile_of.load(i))));
  };
  ScanWideCoefficients<Types> coefficients(p, row, block.group(), token());
  const R* kept =
      static_cast<const R*>(p.checkpoints) +
      ((row * ((p.num_steps + kScanTile - 1) / kScanTile) + last_step / kScanTile) * p.width + d0) *
          kStates +
      my_lane * 4;
  // The thread-th channel's sums of D and bias: in global memory, where they take no registers.
  const auto add_to_channel = [&](R of_D, R of_bias, bool first) {
    if (thread >= channels) return;
    R* const to = static_cast<R*>(q.by_channel) + part() * p.width + block.d0() + thread;
    R* const other = to + q.rows * q.segments * p.width;
    store_global(to, first ? of_D : load_global(to) + of_D);
    store_global(other, first ? of_bias : load_global(other) + of_bias);
  };
  add_to_channel(R(0), R(0), true);

  block_sync();
#pragma unroll 1
  for (; tiles > 0; --tiles, count = kScanTile) {
    const bool whole = vectors && count == kScanTile;
    // ---- time steps, inputs, gradients of y ----
    const auto fill = [&]<bool kTime>() __attribute__((always_inline)) {
      const Read delta = read(p.delta, kDelta), u = read(p.u, kU), z = read(p.z, kZ),
                 grad = read(p.grad_out, kGrad);
      const int slot = wide.slot_of(Wide::template channel<kTime>());
#pragma unroll 1
      for (int first = 0; first < Wide::kVectors; first += Wide::kAhead) {
        Vector deltas[Wide::kAhead], us[Wide::kAhead], gates[Wide::kAhead], grads[Wide::kAhead];
#pragma unroll
        for (int k = 0; k < Wide::kAhead; ++k) {
          deltas[k] = delta.load(first + k), us[k] = u.load(first + k);
          if (gate) gates[k] = z.load(first + k);
          grads[k] = p.grad_out.data ? grad.load(first + k) : Vector{};
        }
#pragma unroll
        for (int k = 0; k < Wide::kAhead; ++k) {
          R dt[kVector], g[kVector];
          Wide::template load_values<kTime>(bias, dt);
#pragma unroll
          for (int j = 0; j < kVector; ++j)
            dt[j] = deltas[k].widen(j) + dt[j], g[j] = grads[k].widen(j);
          if (p.delta_softplus) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) dt[j] = time_step(dt[j], true);
          }
          if (gate) {
#pragma unroll
            for (int j = 0; j < kVector; ++j)
              g[j] = g[j] * silu_with_slope(gates[k].widen(j)).value;
          }
          const Shared<Four> to = slots + (Wide::template step<kTime>(first + k) * kSlots + slot);
#pragma unroll
          for (int j = 0; j < kVector; ++j)
            to.store(
                j * (kTime ? kSlots : Wide::kNextSlot),
                {dt[j], dt[j] * us[k].widen(j), g[j], R(0)});
        }
      }
    };
    if (whole && wide.along_time) {
      fill.template operator()<true>();
    } else if (whole) {
      fill.template operator()<false>();
    } else {
      const ScanItems items(Wide::kLogChannels, wide.along_time);
      const auto cursor = [&](const OverTime<const void*>& x) {
        return ScanCursor<const S>(x, p, block.row(), token(), block.d0(), items);
      };
      ScanCursor<const S> delta = cursor(p.delta), u = cursor(p.u), z = cursor(p.z),
                          grad = cursor(p.grad_out);
      int t = items.t, c = items.column;
#pragma unroll 1
      for (int i = 0; i < items.count; i += kScanAhead) {
        R step[kScanAhead], input[kScanAhead], gates[kScanAhead], g[kScanAhead];
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          const bool in = t + k * items.t_next < count && c + k * items.column_next < channels;
          step[k] = delta.load(in), input[k] = u.load(in);
          gates[k] = z.load(in && z.any), g[k] = grad.load(in && grad.any);
          delta.advance(), u.advance(), z.advance(), grad.advance();
        }
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          if (gate) g[k] = g[k] * silu_with_slope(gates[k]).value;
          const R dt = t < count ? time_step(step[k] + bias.load(c), p.delta_softplus) : R(0);
          slots.store(t * kSlots + wide.slot_of(c), {dt, dt * input[k], g[k], R(0)});
          t += items.t_next, c += items.column_next;
        }
      }
    }
    coefficients.stage(p, block, token, count, Bs, Cs);
    block_sync();

    // ---- through the steps, and back ----
#pragma unroll 1
    for (int half = (count - 1) / kHalf * kHalf; half >= 0; half -= kHalf) {
      R grad_B[kHalf * 4], grad_C[kHalf * 4];
#pragma unroll
      for (int i = 0; i < kHalf * 4; ++i) grad_B[i] = grad_C[i] = R(0);
      const auto pass = [&]<bool kFalls>() __attribute__((always_inline)) {
        const Shared<Four> packs_of_B = Bs.template view<Four>() + my_lane,
                           packs_of_C = Cs.template view<Four>() + my_lane;
#pragma unroll 1
        for (int turn = 0; turn < At::kTurns; ++turn) {
          const int slot = slot_of_turn(turn);
          const Four A = packs_of_A.load(turn * kScanThreads);
          R decays[kHalf][4], states[kHalf + 1][4];
          {
            Four h{};
            const int c = wide.channel_of(slot);
            if (c < channels) h = load_global(reinterpret_cast<const Four*>(kept + c * kStates));
            if (half > 0) {
#pragma unroll
              for (int t = 0; t < kHalf; ++t) {
                const Two x = slots.template view<Two>().load((t * kSlots + slot) * 2);
                const Four b = packs_of_B.load(t * 4);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                  h.x[j] = next_state<kFalls>(x.x[0], x.x[1], A.x[j], b.x[j], h.x[j]).h;
              }
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) states[0][j] = h.x[j];
          }
          const Shared<Four> items = slots + (half * kSlots + slot), b_at = packs_of_B + half * 4,
                             c_at = packs_of_C + half * 4;
#pragma unroll
          for (int t = 0; t < kHalf; ++t) {
            const Two x = items.template view<Two>().load(t * kSlots * 2);
            const Four b = b_at.load(t * 4);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const ScanStep<R, R> s =
                  next_state<kFalls>(x.x[0], x.x[1], A.x[j], b.x[j], states[t][j]);
              decays[t][j] = s.decay, states[t + 1][j] = s.h;
            }
          }
          warp_sync(); // what the steps read is loaded again: kept, it would take the registers of the sums
          Four g = own_h.load(turn * kScanThreads), gA = own_A.load(turn * kScanThreads);
          R sums[3 * kHalf]; // of the gradient of the input, of the time step; of y
#pragma unroll
          for (int t = kHalf - 1; t >= 0; --t) {
            const Four x = items.load(t * kSlots), b = b_at.load(t * 4), cc = c_at.load(t * 4);
            ScanSums<R, R> sum{};
            R y = R(0);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              scan_step_vjp(
                  x.x[0], x.x[1], A.x[j], b.x[j], cc.x[j], decays[t][j], states[t][j],
                  states[t + 1][j], x.x[2], g.x[j], gA.x[j], grad_B[t * 4 + j], grad_C[t * 4 + j],
                  sum);
              if (gate) y = add_real(states[t + 1][j], cc.x[j], y);
            }
            sums[t] = sum.input, sums[kHalf + t] = sum.parts;
            sums[2 * kHalf + t] = y;
          }
          own_h.store(turn * kScanThreads, g), own_A.store(turn * kScanThreads, gA);
          warp_sync(); // all lanes of the channel have read what is written over
          const auto put = [&](int word) {
            sum_over_lanes<kHalf>(
                sums + (word - 1) * kHalf, kLanes / 2, 1, 0, true,
                [&](int t, R sum) { items.template view<R>().store(t * kSlots * 4 + word, sum); });
          };
          put(1), put(2);
          if (gate) put(3);
        }
      };
      if (falls)
        pass.template operator()<true>();
      else
        pass.template operator()<false>();
      // ---- over the channels ----
      const auto gather = [&](int which, R* v) {
        sum_over_lanes<kHalf * 4>(v, 32 / kLanes / 2, kLanes, 0, true, [&](int i, R sum) {
          warps.store(((warp() * 2 + which) * kHalf + i / 4) * kStates + my_lane * 4 + i % 4, sum);
        });
      };
      gather(0, grad_B), gather(1, grad_C);
      block_sync();
      // Half of the threads leave B's, and half C's: two states of a step each.
      {
        constexpr int kEach = kHalf * kStates;
        const int leaves_C = thread / (kScanThreads / 2), leave_i = thread % (kScanThreads / 2) * 2;
        R* const leave = reinterpret_cast<R*>(uintptr_t(tile_of.load(kGradB + leaves_C)));
        const int step = half + leave_i / kStates;
        const Shared<Two> of_warps = (warps + (leaves_C * kEach + leave_i)).template view<Two>();
        Two sum = of_warps.load(0);
#pragma unroll
        for (int w = 1; w < kScanWarps; ++w) {
          const Two other = of_warps.load(w * kEach);
          sum.x[0] = sum.x[0] + other.x[0], sum.x[1] = sum.x[1] + other.x[1];
        }
        if (leave && step < count)
          store_global(
              reinterpret_cast<Two*>(
                  leave + step * direction * p.num_groups * kStates + leave_i % kStates),
              sum);
      }
      block_sync();
    }

    // ---- outputs ----
    const auto finish = [&]<bool kTime>() __attribute__((always_inline)) {
      const Read delta = read(p.delta, kDelta), u = read(p.u, kU), z = read(p.z, kZ),
                 grad = read(p.grad_out, kGrad);
      const Write grad_u = write(p.grad_u, kGradU), grad_delta = write(p.grad_delta, kGradDelta),
                  grad_z = write(p.grad_z, kGradZ);
      const int slot = wide.slot_of(Wide::template channel<kTime>());
      constexpr int kNext = kTime ? kSlots : Wide::kNextSlot;
      Two sums[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[j] = {};
#pragma unroll 1
      for (int k = 0; k < Wide::kVectors; ++k) {
        const Vector deltas = delta.load(k), us = u.load(k), gates = gate ? z.load(k) : Vector{},
                     grads = p.grad_out.data ? grad.load(k) : Vector{};
        const Shared<Four> from = slots + (Wide::template step<kTime>(k) * kSlots + slot);
        R x[kVector], g[kVector], D[kVector], u_out[kVector], delta_out[kVector], z_out[kVector];
        Wide::template load_values<kTime>(skip, D);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const Four item = from.load(j * kNext);
          x[j] = us.widen(j), g[j] = grads.widen(j);
          u_out[j] = item.x[1] * item.x[0],
          delta_out[j] = fused(item.x[1], x[j], out_of_octaves(item.x[2]));
          z_out[j] = fused(D[j], x[j], item.x[3]);
        }
        if (gate) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            const Gate<R> silu = silu_with_slope(gates.widen(j));
            z_out[j] = g[j] * silu.slope * z_out[j], g[j] = g[j] * silu.value;
          }
          if (p.grad_z.data) grad_z.store(k, z_out);
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) u_out[j] = fused(D[j], g[j], u_out[j]);
        grad_u.store(k, u_out);
        if (p.delta_softplus) {
          R before[kVector];
          Wide::template load_values<kTime>(bias, before);
#pragma unroll
          for (int j = 0; j < kVector; ++j)
            delta_out[j] = delta_out[j] * time_step_slope(deltas.widen(j) + before[j], true);
        }
        grad_delta.store(k, delta_out);
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          sums[j].x[0] = fused(g[j], x[j], sums[j].x[0]),
          sums[j].x[1] = sums[j].x[1] + delta_out[j];
      }
      const Shared<Two> to =
          (slots + (Wide::template step<kTime>(0) * kSlots + slot)).template view<Two>();
#pragma unroll
      for (int j = 0; j < kVector; ++j) to.store(j * kNext * 2, sums[j]);
    };
    if (whole && wide.along_time) {
      finish.template operator()<true>();
    } else if (whole) {
      finish.template operator()<false>();
    } else {
      const ScanItems items(Wide::kLogChannels, wide.along_time);
      const auto cursor = [&](const OverTime<const void*>& x) {
        return ScanCursor<const S>(x, p, block.row(), token(), block.d0(), items);
      };
      const auto output = [&](const OverTime<void*>& x) {
        return ScanCursor<S>(x, p, block.row(), token(), block.d0(), items);
      };
      ScanCursor<const S> delta = cursor(p.delta), u = cursor(p.u), z = cursor(p.z),
                          grad = cursor(p.grad_out);
      ScanCursor<S> grad_u = output(p.grad_u), grad_delta = output(p.grad_delta),
                    grad_z = output(p.grad_z);
      int t = items.t, c = items.column;
      constexpr int kAhead = 2;
#pragma unroll 1
      for (int i = 0; i < items.count; i += kAhead) {
        R step[kAhead], x[kAhead], gates[kAhead], g[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const bool in = t + k * items.t_next < count && c + k * items.column_next < channels;
          step[k] = delta.load(in), x[k] = u.load(in), gates[k] = z.load(in && z.any);
          g[k] = grad.load(in && grad.any);
          delta.advance(), u.advance(), z.advance(), grad.advance();
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const int at = t * kSlots + wide.slot_of(c);
          Two sum{};
          if (t < count && c < channels) {
            const Four item = slots.load(at);
            const R D = skip.load(c);
            if (gate) {
              const Gate<R> silu = silu_with_slope(gates[k]);
              if (grad_z.any) grad_z.store(g[k] * silu.slope * fused(D, x[k], item.x[3]));
              g[k] = g[k] * silu.value;
            }
            sum.x[0] = g[k] * x[k];
            sum.x[1] = fused(item.x[1], x[k], out_of_octaves(item.x[2])) *
                       time_step_slope(step[k] + bias.load(c), p.delta_softplus);
            grad_delta.store(sum.x[1]);
            grad_u.store(fused(item.x[1], item.x[0], D * g[k]));
          }
          slots.template view<Two>().store(at * 2, sum);
          t += items.t_next, c += items.column_next;
          grad_u.advance(), grad_delta.advance(), grad_z.advance();
        }
      }
    }
    block_sync();
    const Shared<Two> column = (slots + wide.slot_of(thread)).template view<Two>();
    R of_D = R(0), of_bias = R(0);
    const auto add = [&](int t) {
      const Two sum = column.load(t * kSlots * 2);
      of_D = of_D + sum.x[0], of_bias = of_bias + sum.x[1];
    };
    if (!whole) { // else each thread has added up its vectors
#pragma unroll 1
      for (int t = kScanTile - 1; t >= Wide::kRows; --t) add(t);
    }
#pragma unroll
    for (int t = Wide::kRows - 1; t >= 0; --t) add(t);
    add_to_channel(of_D, of_bias, false);
    if (thread < kArrays) {
      const int64_t time = thread == kDelta   ? p.delta.time
                           : thread == kU     ? p.u.time
                           : thread == kZ     ? p.z.time
                           : thread == kGrad  ? p.grad_out.time
                           : thread == kGradU ? p.grad_u.time
                           : thread == kGradZ ? p.grad_z.time
                                              : p.grad_delta.time;
      const int64_t bytes =
          thread < kGradB ? time * int64_t(sizeof(S)) : p.num_groups * kStates * int64_t(sizeof(R));
      const int64_t at = tile_of.load(thread);
      tile_of.store(thread, at ? at - kScanTile * direction * bytes : 0);
    }
    block_sync();
    coefficients.advance(p, -kScanTile);
    kept -= p.width * kStates;
  }

  // ---- sums over tokens ----
  const ScanStates<R, void*> initial(p.grad_initial_state, kStates),
      by_state = dense_states<R>(q.by_state, p.width, kStates);
  over_turns([&](int turn, int c) {
    const bool there = c < channels;
    by_state.store(part(), block.d0() + c, my_lane * 4, there, own_A.load(turn * kScanThreads));
    initial.store(
        block.row(), block.d0() + c, my_lane * 4, there && block.segment() == 0,
        own_h.load(turn * kScanThreads));
  });
}

// Sums over channels, from all blocks: a thread per token, group and state.
template <class Types>
__global__ void __launch_bounds__(kScanThreads)
    selective_scan_tokens_kernel(const SelectiveScanBackward p, const ScanPlan q) {
  using H = typename Types::H;
  const int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x,
                of_token = p.num_groups * p.num_states, all = q.rows * p.num_steps * of_token;
  if (i >= all) return;
  const int64_t token = i / of_token, group = i % of_token / p.num_states, n = i % p.num_states,
                row = token / p.num_steps, t = token % p.num_steps;
  const auto add = [&](const Coefficient<void*>& x, int64_t which) {
    if (!x.data || x.constant) return;
    const H* from = static_cast<const H*>(q.by_token) + which * q.blocks_per_group * all + i;
    H sum = load_global(from);
#pragma unroll 4
    for (int64_t b = 1; b < q.blocks_per_group; ++b) sum = sum + load_global(from + b * all);
    const int64_t at = row * x.sequence + t * x.time + group * x.group + n * x.state;
    using PerToken = typename Types::PerToken;
    store_global(static_cast<PerToken*>(x.data) + at, Stored<PerToken>::narrow(sum));
  };
  add(p.grad_B, 0);
  add(p.grad_C, 1);
}

// Sums over tokens, from all segments of all rows: a thread per channel and state.
template <class Types>
__global__ void __launch_bounds__(kScanThreads)
    selective_scan_channels_kernel(const SelectiveScanBackward p, const ScanPlan q) {
  using R = typename Types::R;
  using H = typename Types::H;
  const int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x, own = p.width * p.num_states;
  if (i >= own) return;
  const int64_t parts = q.rows * q.segments, d = i / p.num_states, n = i % p.num_states;
  const auto sum = [&]<class X>(const X* from, int64_t count) {
    X sum{};
#pragma unroll 8
    for (int64_t k = 0; k < parts; ++k) sum = sum + load_global(from + k * count);
    return sum;
  };
  const auto add = [&](void* data, int64_t at, int64_t which) {
    if (data)
      store_global(
          static_cast<H*>(data) + at,
          sum(static_cast<const H*>(q.by_state) + which * parts * own + i, own));
  };
  add(p.grad_A.data, d * p.grad_A.channel + n * p.grad_A.state, 0);
  if (p.B.constant) add(p.grad_B.data, d * p.grad_B.channel + n * p.grad_B.state, 1);
  if (p.C.constant) add(p.grad_C.data, d * p.grad_C.channel + n * p.grad_C.state, 2);
  if (n > 0) return;
  const auto add_channel = [&](const OverChannels<void*>& x, int64_t which) {
    if (x.data)
      store_global(
          static_cast<R*>(x.data) + d * x.channel,
          sum(static_cast<const R*>(q.by_channel) + which * parts * p.width + d, p.width));
  };
  add_channel(p.grad_D, 0);
  add_channel(p.grad_delta_bias, 1);
}

} // namespace torch_ext::cuda
