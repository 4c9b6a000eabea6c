// The CPU driver of Mamba's selective scan (core/selective_scan_problem.h; a step: cells/selective_scan.h).
//
// Lanes are channels: a slot is one vector of them, all of one group. A slot is run over a tile of 16 tokens at a time: what
// a channel has one of per token (time step, input, output) is brought into L1 first; then a few states at a time are
// kept in registers over all of the tile's tokens. No sum over lanes is needed forward. Within a tile all slots of a
// block take their turns, so that memory is walked by rows; where tokens lie side by side one slot runs through the whole
// sequence before the next, and tiles are turned over in registers.
//
// Every channel meets the same instructions whatever the blocks are, and sums over channels, tokens and sequences are cut
// into parts by shapes alone: results do not depend on the threads.
#pragma once
#include "../cells/selective_scan.h"
#include "../core/selective_scan_problem.h"
#include "diagonal.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

using torch_ext::silu; // of any lane, beside simd.h's of float lanes

inline constexpr int kTile = int(kSelectiveScanTile);

// ---- slots: n vectors for n consecutive tokens (or states) of one vector of channels ----

// kLanes rows of kLanes tokens that lie side by side, turned over; and back. `backward`: the last token first. Arrays of
// registers may not be indexed by what is not known here, or they would live in memory.
template <bool kBackward, class S>
TORCH_EXT_HD void load_square(typename Stored<S>::Lane* to, const S* p, int64_t channel) {
  constexpr int kLanes = Stored<S>::kLanes;
  typename Stored<S>::Lane r[kLanes];
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; ++k) r[k] = Stored<S>::load(p + k * channel);
  transpose(r);
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; ++k) to[k] = r[kBackward ? kLanes - 1 - k : k];
}
template <bool kBackward, class S>
TORCH_EXT_HD void store_square(S* p, int64_t channel, const typename Stored<S>::Lane* from) {
  constexpr int kLanes = Stored<S>::kLanes;
  typename Stored<S>::Lane r[kLanes];
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; ++k) r[k] = from[kBackward ? kLanes - 1 - k : k];
  transpose(r);
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; ++k) Stored<S>::store(p + k * channel, r[k]);
}

// `some`: channels that exist; the other lanes are zero and not written.
template <class S>
void load_slot(
    typename Stored<S>::Lane* to, const S* p, int64_t step, int64_t channel, int64_t n, int some) {
  constexpr int kLanes = Stored<S>::kLanes;
  int64_t i = 0;
  if (channel == 1 && some == kLanes) {
    for (; i < n; ++i) to[i] = Stored<S>::load(p + i * step);
  } else if (channel == 1) {
    for (; i < n; ++i) to[i] = load_some(p + i * step, some);
  } else if (step == 1 && some == kLanes) {
    for (; i + kLanes <= n; i += kLanes) load_square<false>(to + i, p + i, channel);
  } else if (step == -1 && some == kLanes) {
    for (; i + kLanes <= n; i += kLanes) load_square<true>(to + i, p - (i + kLanes - 1), channel);
  }
  S lanes[kLanes] = {};
  for (; i < n; ++i) {
    for (int k = 0; k < some; ++k) lanes[k] = p[i * step + k * channel];
    to[i] = Stored<S>::load(lanes);
  }
}
template <class S>
void store_slot(
    S* p, int64_t step, int64_t channel, const typename Stored<S>::Lane* from, int64_t n,
    int some) {
  constexpr int kLanes = Stored<S>::kLanes;
  int64_t i = 0;
  if (channel == 1 && some == kLanes) {
    for (; i < n; ++i) Stored<S>::store(p + i * step, from[i]);
  } else if (channel == 1) {
    for (; i < n; ++i) store_some(p + i * step, from[i], some);
  } else if (step == 1 && some == kLanes) {
    for (; i + kLanes <= n; i += kLanes) store_square<false>(p + i, channel, from + i);
  } else if (step == -1 && some == kLanes) {
    for (; i + kLanes <= n; i += kLanes)
      store_square<true>(p - (i + kLanes - 1), channel, from + i);
  }
  S lanes[kLanes];
  for (; i < n; ++i) {
    Stored<S>::store(lanes, from[i]);
    for (int k = 0; k < some; ++k) p[i * step + k * channel] = lanes[k];
  }
}

// A slot's states, of which complex ones lie as re, im, re, im.
template <class R>
void load_slot_states(Vec<R>* to, const R* p, int64_t state, int64_t channel, int64_t n, int some) {
  load_slot(to, p, state, channel, n, some);
}
template <class R>
void load_slot_states(
    torch_ext::Complex<Vec<R>>* to, const torch_ext::Complex<R>* p, int64_t state, int64_t channel,
    int64_t n, int some) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = {Vec<R>(0), Vec<R>(0)};
    for (int k = 0; k < some; ++k) {
      const torch_ext::Complex<R> x = p[i * state + k * channel];
      to[i].re.v[k] = x.re, to[i].im.v[k] = x.im;
    }
  }
}
template <class R>
void store_slot_states(
    R* p, int64_t state, int64_t channel, const Vec<R>* from, int64_t n, int some) {
  store_slot(p, state, channel, from, n, some);
}
template <class R>
void store_slot_states(
    torch_ext::Complex<R>* p, int64_t state, int64_t channel,
    const torch_ext::Complex<Vec<R>>* from, int64_t n, int some) {
  for (int64_t i = 0; i < n; ++i)
    for (int k = 0; k < some; ++k) p[i * state + k * channel] = {from[i].re.v[k], from[i].im.v[k]};
}

// One number in every lane.
template <class R>
TORCH_EXT_HD Vec<R> broadcast(R x) {
  return x;
}
template <class R>
TORCH_EXT_HD torch_ext::Complex<Vec<R>> broadcast(torch_ext::Complex<R> x) {
  return {x.re, x.im};
}

template <bool kComplex, class T>
struct ComplexIf {
  using type = T;
};
template <class T>
struct ComplexIf<true, T> {
  using type = torch_ext::Complex<T>;
};

// S: what u, delta, z and out are stored as.
template <class S, bool kComplex>
struct SelectiveScan {
  using R = typename StateOf<S>::type;
  using V = Vec<R>;
  using State = typename ComplexIf<kComplex, R>::type;
  using H = typename ComplexIf<kComplex, V>::type;
  using PerToken = typename ComplexIf<kComplex, S>::type; // B and C, where they are not constant
  static constexpr int W = V::kLanes;

  // ---- what a call is made of ----

  struct Block { // some slots of one group
    int64_t group, channel, slots, channels;
    // The i-th block of the plan, and as many of those that follow in its group.
    Block(
        const SelectiveScanProblem& p, const SelectiveScanPlan& plan, int64_t i,
        int64_t blocks = 1) {
      const int64_t width = p.width / p.num_groups,
                    first = i % plan.blocks_per_group * plan.block * W;
      const int64_t most = blocks * plan.block * W;
      group = i / plan.blocks_per_group;
      channel = group * width + first;
      channels = width - first < most ? width - first : most;
      slots = (channels + W - 1) / W;
    }
    int some(int64_t slot) const { return channels - slot * W < W ? int(channels - slot * W) : W; }
  };
  struct
      Run { // a sequence's tokens in the order of time: token n is `row` first + n * direction of the arrays
    int64_t sequence, first, direction, count;
    Run(const SelectiveScanProblem& p, int64_t s) {
      const int64_t begin = p.cu_seqlens ? p.cu_seqlens[s] : 0;
      sequence = p.cu_seqlens ? 0 : s;
      count = (p.cu_seqlens ? p.cu_seqlens[s + 1] : p.num_steps) - begin;
      first = p.reverse ? begin + count - 1 : begin;
      direction = p.reverse ? -1 : 1;
    }
  };
  static int64_t kept_before(const SelectiveScanProblem& p, int64_t interval, int64_t s) {
    return selective_scan_states_before(p, interval, s, p.cu_seqlens ? p.cu_seqlens[s] : 0);
  }

  // Tokens n .. n + count of one slot of an array over time.
  static void load_tokens(
      V* to, const OverTime<const void*>& x, const Run& run, int64_t n, int64_t count, int64_t d,
      int some) {
    const S* data = static_cast<const S*>(x.data) + run.sequence * x.sequence +
                    (run.first + n * run.direction) * x.time + d * x.channel;
    load_slot(to, data, run.direction * x.time, x.channel, count, some);
  }
  // What the next slot will need, fetched little by little while this one computes: the machine follows a few streams by
  // itself, but not a row per token, and fetched all at once they would fill its queue of misses.
  struct Ahead {
    static constexpr int kMost = 16 * kTile;
    const void* at[kMost];
    int count = 0, next = 0, per_step = 0;
    template <class Data>
    void add(
        const OverTime<Data>& x, const Run& run, int64_t n, int64_t tokens, int64_t d, int some) {
      if (!x.data || tokens <= 0) return;
      const S* data = static_cast<const S*>(x.data) + run.sequence * x.sequence +
                      (run.first + n * run.direction) * x.time + d * x.channel;
      const bool rows = x.channel == 1;
      const int64_t lines = rows ? tokens : some, step = rows ? run.direction * x.time : x.channel;
      for (int64_t i = 0; i < lines && count < kMost; ++i) at[count++] = data + i * step;
    }
    void add(const void* first, int64_t bytes) {
      for (int64_t i = 0; i < bytes && count < kMost; i += 64)
        at[count++] = static_cast<const char*>(first) + i;
    }
    TORCH_EXT_HD void fetch() {
      for (int i = 0; i < per_step && next < count; ++i) __builtin_prefetch(at[next++], 0, 3);
    }
    void spread(int64_t steps) { per_step = steps > 0 ? int((count + steps - 1) / steps) : 0; }
  };
  static void store_tokens(
      const OverTime<void*>& x, const Run& run, int64_t n, int64_t count, int64_t d, int some,
      const V* from) {
    S* data = static_cast<S*>(x.data) + run.sequence * x.sequence +
              (run.first + n * run.direction) * x.time + d * x.channel;
    store_slot(data, run.direction * x.time, x.channel, from, count, some);
  }
  // A block's states, slot by slot.
  static void load_states(
      H* to, const OverStates<const void*>& x, int64_t row, const Block& b, int64_t N) {
    const State* data = static_cast<const State*>(x.data);
    for (int64_t i = 0; i < b.slots; ++i) {
      if (data) {
        load_slot_states(
            to + i * N, data + row * x.row + (b.channel + i * W) * x.channel, x.state, x.channel, N,
            b.some(i));
      } else {
        memset(static_cast<void*>(to + i * N), 0, size_t(N) * sizeof(H));
      }
    }
  }
  static void store_states(
      const OverStates<void*>& x, int64_t row, const Block& b, int64_t N, const H* from) {
    State* data = static_cast<State*>(x.data);
    if (!data) return;
    for (int64_t i = 0; i < b.slots; ++i)
      store_slot_states(
          data + row * x.row + (b.channel + i * W) * x.channel, x.state, x.channel, from + i * N, N,
          b.some(i));
  }
  static V load_channels(const OverChannels<const void*>& x, int64_t d, int some) {
    V v(0);
    if (x.data) load_slot(&v, static_cast<const R*>(x.data) + d * x.channel, 1, x.channel, 1, some);
    return v;
  }
  // Checkpoints lie slot by slot, one after the other without gaps, and in a slot state by state.
  static State* checkpoint(
      const void* all, const SelectiveScanProblem& p, int64_t index, int64_t channel) {
    return static_cast<State*>(const_cast<void*>(all)) + (index * p.width + channel) * p.num_states;
  }
  static constexpr int64_t kVectorsOfState = int64_t(sizeof(H) / sizeof(V));
  static void load_checkpoint(H* states, const State* memory, int64_t N, int some) {
    load_slot(
        reinterpret_cast<V*>(states), reinterpret_cast<const R*>(memory), some, 1,
        N * kVectorsOfState, some);
  }
  // `stream`: around the cache, where the memory is aligned. Nothing reads it before the backward.
  static void store_checkpoint(State* memory, const H* states, int64_t N, int some, bool stream) {
    R* at = reinterpret_cast<R*>(memory);
    const V* vectors = reinterpret_cast<const V*>(states);
    if (!stream || some != W || reinterpret_cast<uintptr_t>(at) % kVectorBytes != 0)
      return store_slot(at, some, 1, vectors, N * kVectorsOfState, some);
    for (int64_t i = 0; i < N * kVectorsOfState; ++i) Stored<R>::stream(at + i * W, vectors[i]);
  }

  // Of what a decay's exponent is a product: bounds within which it is a number, in float too, whose 2^-inf would be NaN.
  static V bounded(V x) {
    if constexpr (sizeof(R) == sizeof(float)) return at_least(at_most(x, 1e18), -1e18);
    return x;
  }
  static torch_ext::Complex<V> bounded(torch_ext::Complex<V> x) { return {bounded(x.re), x.im}; }

  // What stays the same over a block's tokens. Constant B and C are needed as vectors; and then the other one too, so that
  // there are two kernels and not four.
  struct Parameters {
    int64_t N;
    bool lanes; // B and C come as vectors
    Scratch<H> A, B, C;
    Parameters(const SelectiveScanProblem& p, int64_t slots)
        : N(p.num_states),
          lanes(p.B.constant || p.C.constant),
          A(slots * N),
          B(p.B.constant ? slots * N : 0),
          C(p.C.constant ? slots * N : 0) {}
    void load(const SelectiveScanProblem& p, const Block& b) {
      load_states(A.data, p.A, 0, b, N);
      for (int64_t i = 0; i < b.slots * N; ++i) A.data[i] = bounded(in_octaves(A.data[i]));
      const auto constant = [&](H* to, const Coefficient<const void*>& x) {
        if (x.constant) load_states(to, {x.data, 0, x.channel, x.state}, 0, b, N);
      };
      constant(B.data, p.B);
      constant(C.data, p.C);
    }
  };

  // B or C of a tile's tokens. At (t, n): the t * step + n-th of `data`, numbers or vectors.
  struct Tokens {
    Scratch<State> numbers;
    Scratch<H> vectors;
    const void* data = nullptr;
    int64_t step = 0;
    Tokens(const Coefficient<const void*>& x, bool lanes, int64_t N)
        : numbers(x.constant ? 0 : kTile * N + W), vectors(!x.constant && lanes ? kTile * N : 0) {}
    void load(
        const Coefficient<const void*>& x, bool lanes, const Run& run, int64_t n, int64_t count,
        int64_t group, int64_t N) {
      if (x.constant) return;
      const PerToken* from = static_cast<const PerToken*>(x.data) + run.sequence * x.sequence +
                             (run.first + n * run.direction) * x.time + group * x.group;
      for (int64_t t = 0; t < count; ++t, from += run.direction * x.time) {
        State* to = numbers.data + t * N;
        if constexpr (sizeof(PerToken) == sizeof(State)) {
          for (int64_t k = 0; k < N; ++k) to[k] = from[k * x.state];
        } else {
          PerToken some[W];
          for (int64_t k = 0; k < N; k += W) { // numbers has room for a vector too many
            const int many = N - k < W ? int(N - k) : W;
            for (int j = 0; j < many; ++j) some[j] = from[(k + j) * x.state];
            for (int j = many; j < W; ++j) some[j] = {};
            Stored<R>::store(to + k, Stored<PerToken>::load(some));
          }
        }
      }
      data = numbers.data, step = N;
      if (!lanes) return;
      for (int64_t i = 0; i < count * N; ++i) vectors.data[i] = broadcast(numbers.data[i]);
      data = vectors.data;
    }
    const void* at(const Coefficient<const void*>& x, const H* constant) const {
      return x.constant ? constant : data;
    }
  };
  template <bool kLanes>
  TORCH_EXT_HD static H coefficient(const void* p, int64_t i) {
    if constexpr (kLanes) return static_cast<const H*>(p)[i];
    return broadcast(static_cast<const State*>(p)[i]);
  }

  // Calls f<NB>(n) for all N states, eight at a time as long as there are eight, or as many as kMost.
  template <int kMost, class F>
  TORCH_EXT_HD static void over_states(int64_t N, F f) {
    int64_t n = 0;
    for (; n + kMost <= N; n += kMost) f.template operator()<kMost>(n);
    if constexpr (kMost > 1) {
      if (kMost > 4 && n + 4 <= N) f.template operator()<4>(n), n += 4;
      if (kMost > 2 && n + 2 <= N) f.template operator()<2>(n), n += 2;
      if (n < N) f.template operator()<1>(n);
    }
  }

  // ---- forward ----

  struct Tile { // one slot's tokens, in L1
    V step[kTile], input[kTile], y[kTile];
  };

  template <int NB, bool kLanes>
  __attribute__((noinline)) static void forward_states(
      Tile& tile, int64_t count, const H* A, const void* B, int64_t B_step, const void* C,
      int64_t C_step, H* states, Ahead& ahead) {
    H h[NB];
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) h[j] = states[j];
    for (int64_t t = 0; t < count; ++t) {
      const V step = tile.step[t], input = tile.input[t];
      V y[2] = {tile.y[t], V(0)}; // two chains
#pragma GCC unroll 8
      for (int j = 0; j < NB; ++j) {
        h[j] = scan_step(step, input, A[j], coefficient<kLanes>(B, t * B_step + j), h[j]).h;
        y[j & 1] = add_real(h[j], coefficient<kLanes>(C, t * C_step + j), y[j & 1]);
      }
      ahead.fetch();
      tile.y[t] = NB > 1 ? y[0] + y[1] : y[0];
    }
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) states[j] = h[j];
  }
  static void forward_all_states(
      Tile& tile, int64_t count, int64_t N, bool lanes, const H* A, const void* B, int64_t B_step,
      const void* C, int64_t C_step, H* states, Ahead& ahead) {
    over_states<8>(N, [&]<int NB>(int64_t n) {
      const auto run = lanes ? forward_states<NB, true> : forward_states<NB, false>;
      const int64_t size = lanes ? sizeof(H) : sizeof(State);
      run(tile, count, A + n, static_cast<const char*>(B) + n * size, B_step,
          static_cast<const char*>(C) + n * size, C_step, states + n, ahead);
    });
  }

  // One slot, one tile.
  static void forward_slot(
      const SelectiveScanForward& p, const Parameters& parameters, const Tokens& B, const Tokens& C,
      const Run& run, int64_t n, int64_t count, int64_t slot, int64_t d, int some, H* states,
      Ahead& ahead) {
    const int64_t N = p.num_states;
    Tile tile;
    V u[kTile], z[kTile];
    load_tokens(tile.step, p.delta, run, n, count, d, some);
    load_tokens(u, p.u, run, n, count, d, some);
    if (p.z.data) load_tokens(z, p.z, run, n, count, d, some);
    ahead.spread(count * ((N + 7) / 8));
    const V bias = load_channels(p.delta_bias, d, some);
    for (int64_t t = 0; t < count; ++t) {
      const V step = time_step(tile.step[t] + bias, p.delta_softplus);
      tile.step[t] = bounded(step);
      tile.input[t] = step * u[t];
      tile.y[t] = V(0);
    }
    forward_all_states(
        tile, count, N, parameters.lanes, parameters.A.data + slot * N,
        B.at(p.B, parameters.B.data + slot * N), B.step, C.at(p.C, parameters.C.data + slot * N),
        C.step, states, ahead);
    const V D = load_channels(p.D, d, some);
    for (int64_t t = 0; t < count; ++t) {
      V y = tile.y[t];
      if (kReadout<H> != 1) y = y * kReadout<H>;
      y = fused(D, u[t], y);
      tile.y[t] = p.z.data ? y * silu(z[t]) : y;
    }
    store_tokens(p.out, run, n, count, d, some, tile.y);
  }

  // A single token whose channels have their states side by side: lanes run along those, and of A and the states only the
  // next ones are turned over, to be added up in the order of every other layout.
  static constexpr int64_t kMostStepStates = 64;
  static bool along_states(const SelectiveScanForward& p) {
    const auto dense = [](const auto& x) { return !x.data || x.state == 1; };
    return !kComplex && p.num_states % W == 0 && p.num_states <= kMostStepStates &&
           !p.checkpoints && !p.B.constant && !p.C.constant && dense(p.A) &&
           dense(p.initial_state) && dense(p.final_state);
  }
  struct Channels {
    const R *A, *from;
    R* to;
    int64_t A_step, from_step, to_step;
    const R* B;
  };
  // The next states of a slot, turned over to h. kUsual: there are states to read and to write, and each is one vector.
  template <bool kUsual>
  __attribute__((noinline)) static void step_channels(
      const Channels m, const int64_t N, const int some, const R* times, const R* inputs,
      V* h) requires(!kComplex) {
    for (int64_t n = 0; n < (kUsual ? W : N); n += W) {
      const V B = Stored<R>::load(m.B + n);
      V next[W];
#pragma GCC unroll 4
      for (int k = 0; k < W; ++k) {
        next[k] = V(0);
        if (!kUsual && k >= some) continue;
        const V A = bounded(in_octaves(Stored<R>::load(m.A + k * m.A_step + n))),
                before = kUsual || m.from ? Stored<R>::load(m.from + k * m.from_step + n) : V(0);
        next[k] = scan_step(V(times[k]), V(inputs[k]), A, B, before).h;
        if (kUsual || m.to) Stored<R>::store(m.to + k * m.to_step + n, next[k]);
      }
      transpose(next);
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) h[n + k] = next[k];
    }
  }
  static void step(
      const SelectiveScanForward& p, const Tokens& B, const Tokens& C, const Run& run, int64_t row,
      const Block& b) requires(!kComplex) {
    constexpr int kMost =
        8; // slots at a time: what they have one of per token takes long, but not each for itself
    const int64_t N = p.num_states;
    V delta[kMost], u[kMost], z[kMost], y[kMost];
    R times[kMost * W], inputs[kMost * W];
    for (int64_t first = 0; first < b.slots; first += kMost) {
      const int count = b.slots - first < kMost ? int(b.slots - first) : kMost;
      const auto channel = [&](int i) { return b.channel + (first + i) * W; };
      const auto some = [&](int i) { return b.some(first + i); };
      for (int i = 0; i < count; ++i) {
        load_tokens(delta + i, p.delta, run, 0, 1, channel(i), some(i));
        load_tokens(u + i, p.u, run, 0, 1, channel(i), some(i));
        if (p.z.data) load_tokens(z + i, p.z, run, 0, 1, channel(i), some(i));
        delta[i] = delta[i] + load_channels(p.delta_bias, channel(i), some(i));
      }
      for (int i = 0; i < count; ++i) {
        const V time = time_step(delta[i], p.delta_softplus);
        Stored<R>::store(times + i * W, bounded(time));
        Stored<R>::store(inputs + i * W, time * u[i]);
      }
      for (int i = 0; i < count; ++i) {
        const auto at = [&](const auto& x, int64_t r) {
          return x.data ? static_cast<R*>(const_cast<void*>(static_cast<const void*>(x.data))) +
                              r * x.row + channel(i) * x.channel
                        : nullptr;
        };
        const Channels memory{at(p.A, 0),    at(p.initial_state, row), at(p.final_state, row),
                              p.A.channel,   p.initial_state.channel,  p.final_state.channel,
                              B.numbers.data};
        const bool usual = N == W && memory.from && memory.to && some(i) == W;
        V h[kMostStepStates];
        (usual ? step_channels<true>
               : step_channels<false>)(memory, N, some(i), times + i * W, inputs + i * W, h);
        y[i] = V(0);
        over_states<8>(N, [&]<int NB>(int64_t n) { // as in forward_states
          V sum[2] = {y[i], V(0)};
#pragma GCC unroll 8
          for (int j = 0; j < NB; ++j)
            sum[j & 1] = add_real(h[n + j], broadcast(C.numbers.data[n + j]), sum[j & 1]);
          y[i] = NB > 1 ? sum[0] + sum[1] : sum[0];
        });
      }
      for (int i = 0; i < count; ++i) {
        y[i] = fused(load_channels(p.D, channel(i), some(i)), u[i], y[i]);
        if (p.z.data) y[i] = y[i] * silu(z[i]);
        store_tokens(p.out, run, 0, 1, channel(i), some(i), y + i);
      }
    }
  }

  static void forward(
      const SelectiveScanForward& p, const SelectiveScanPlan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const int64_t N = p.num_states, interval = selective_scan_interval(N, kComplex);
    const bool steps = along_states(p);
    Parameters parameters(p, plan.block);
    Scratch<H> states(plan.block * N);
    Tokens B(p.B, parameters.lanes, N), C(p.C, parameters.lanes, N);
    int64_t loaded = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t s = item % p.num_sequences, index = item / p.num_sequences;
      const Block block(p, plan, index);
      const Run run(p, s);
      const int64_t row = p.state_rows ? p.state_rows[s] : s;
      if (row < 0) {
        const V zeros[kTile] = {};
        for (int64_t n = 0; n < run.count; n += kTile)
          for (int64_t i = 0; i < block.slots; ++i)
            store_tokens(
                p.out, run, n, run.count - n < kTile ? run.count - n : kTile, block.channel + i * W,
                block.some(i), zeros);
        continue;
      }
      if constexpr (!kComplex) {
        if (steps && run.count == 1) {
          B.load(p.B, false, run, 0, 1, block.group, N);
          C.load(p.C, false, run, 0, 1, block.group, N);
          step(p, B, C, run, row, block);
          continue;
        }
      }
      if (loaded != index) parameters.load(p, block), loaded = index;
      load_states(states.data, p.initial_state, row, block, N);
      const int64_t kept = kept_before(p, interval, s), together = plan.columns ? 1 : block.slots;
      for (int64_t first = 0; first < block.slots; first += together) {
        const int64_t last = first + together < block.slots ? first + together : block.slots;
        for (int64_t n = 0; n < run.count; n += kTile) {
          const int64_t count = run.count - n < kTile ? run.count - n : kTile;
          B.load(p.B, parameters.lanes, run, n, count, block.group, N);
          C.load(p.C, parameters.lanes, run, n, count, block.group, N);
          const bool keep = p.checkpoints && n % interval == 0;
          for (int64_t i = first; i < last; ++i) {
            const int64_t d = block.channel + i * W;
            H* h = states.data + i * N;
            if (keep)
              store_checkpoint(
                  checkpoint(p.checkpoints, p, kept + n / interval, d), h, N, block.some(i),
                  plan.stream);
            Ahead ahead;
            const bool turn = i + 1 == last; // on to the next tile
            const int64_t then = turn ? n + kTile : n, next = turn ? first : i + 1;
            const int64_t tokens = run.count - then < kTile ? run.count - then : kTile;
            const auto add = [&](const auto& x) {
              ahead.add(x, run, then, tokens, block.channel + next * W, block.some(next));
            };
            add(p.delta), add(p.u), add(p.z), add(p.out);
            forward_slot(p, parameters, B, C, run, n, count, i, d, block.some(i), h, ahead);
          }
        }
      }
      store_states(p.final_state, row, block, N, states.data);
    }
    if (plan.stream) fence_streams();
  }

  // ---- backward ----
  //
  // An item is a block of slots and a part of the sequences; neighbouring
  // blocks are walked together, row by row. From the last tile to the first: the tile's states are computed
  // again from the one before it, a few states at a time, into L1, and walked back over. Sums over tokens (A, D, ...) gather
  // lane by lane in the workspace, one for every part; sums over channels (B, C) gather lane by lane over the block's slots,
  // are then added up over the lanes, and leave one number for every block. reduce_* adds up parts and blocks, in order.

  static constexpr int kStates = kVectorBytes == 64 && !kComplex ? 4 : 2; // at a time, in registers

  struct Gradients { // one slot's sums over tokens, in the workspace
    H *A, *B, *C;    // N each; B and C only where they are constant
    V *D, *delta_bias;
    Gradients(
        const SelectiveScanProblem& p, const SelectiveScanPlan& plan, int64_t part, int64_t group,
        int64_t slot) {
      const int64_t N = p.num_states,
                    index = (part * p.num_groups + group) * plan.slots_per_group + slot;
      D = reinterpret_cast<V*>(static_cast<char*>(plan.by_channel) + index * plan.slot_bytes);
      delta_bias = D + 1;
      A = reinterpret_cast<H*>(D + 2);
      B = A + N;
      C = B + (p.B.constant ? N : 0);
    }
  };
  // The sums over one block's channels: (token, group, state) of B, and behind them those of C.
  static State* sums_of_block(
      const SelectiveScanProblem& p, const SelectiveScanPlan& plan, int64_t block, bool of_C) {
    const int64_t tokens = p.num_steps * (p.cu_seqlens ? 1 : p.num_sequences);
    return static_cast<State*>(plan.by_token) +
           (block * 2 + of_C) * tokens * p.num_groups * p.num_states;
  }

  struct Work { // one slot's tokens, in L1
    V step[kTile], input[kTile], grad_y[kTile], y[kTile], grad_input[kTile];
    H parts[kTile];
  };

  template <int NB, bool kLanes, bool kGate>
  __attribute__((noinline)) static void backward_states(
      Work& work, int64_t count, const H* A, const void* B, int64_t B_step, const void* C,
      int64_t C_step, const H* start, H* grad_h, H* grad_A, H* grad_B, int64_t grad_B_step,
      H* grad_C, int64_t grad_C_step, Ahead& ahead) {
    H decays[kTile][NB], h[kTile + 1][NB];
    {
      H state[NB];
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) h[0][j] = state[j] = start[j];
      for (int64_t t = 0; t < count; ++t) {
        const V step = work.step[t], input = work.input[t];
        V y = work.y[t];
#pragma GCC unroll 4
        for (int j = 0; j < NB; ++j) {
          const ScanStep<V, H> s =
              scan_step(step, input, A[j], coefficient<kLanes>(B, t * B_step + j), state[j]);
          decays[t][j] = s.decay;
          h[t + 1][j] = state[j] = s.h;
          if (kGate) y = add_real(s.h, coefficient<kLanes>(C, t * C_step + j), y);
        }
        if (kGate) work.y[t] = y;
      }
    }
    H g[NB], gA[NB], after[NB];
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) g[j] = grad_h[j], gA[j] = grad_A[j], after[j] = h[count][j];
    for (int64_t t = count - 1; t >= 0; --t) {
      const V step = work.step[t], input = work.input[t], grad_y = work.grad_y[t];
      ScanSums<V, H> sums{work.grad_input[t], work.parts[t]};
      H *const gB = grad_B + t * grad_B_step, *const gC = grad_C + t * grad_C_step;
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) {
        const H before = h[t][j];
        scan_step_vjp(
            step, input, A[j], coefficient<kLanes>(B, t * B_step + j),
            coefficient<kLanes>(C, t * C_step + j), decays[t][j], before, after[j], grad_y, g[j],
            gA[j], gB[j], gC[j], sums);
        after[j] = before;
      }
      work.grad_input[t] = sums.input, work.parts[t] = sums.parts;
      ahead.fetch();
    }
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) grad_h[j] = g[j], grad_A[j] = gA[j];
  }

  // The memory of one thread for one block.
  struct Backward {
    const SelectiveScanBackward& p;
    const SelectiveScanPlan& plan;
    const int64_t N, interval, most; // slots
    Parameters parameters;
    Tokens B, C;
    // starts: (tile of the interval, slot, state). Sums over channels: (states that are walked together, token, state), or
    // those few states of all tokens would lie in the same few sets of the cache.
    Scratch<H> grad_h, starts, grad_B, grad_C;
    Scratch<R> flat;

    Backward(const SelectiveScanBackward& problem, const SelectiveScanPlan& a_plan)
        : p(problem),
          plan(a_plan),
          N(p.num_states),
          interval(selective_scan_interval(N, kComplex)),
          most(plan.block * plan.blocks_together),
          parameters(p, most),
          B(p.B, parameters.lanes, N),
          C(p.C, parameters.lanes, N),
          grad_h(most * N),
          starts(interval / kTile * most * N),
          grad_B(p.B.constant ? 0 : kTile * N + W),
          grad_C(p.C.constant ? 0 : kTile * N + W),
          flat(2 * (kTile * N + W)) {}

    void load_coefficients(const Run& run, int64_t n, int64_t count, int64_t group) {
      B.load(p.B, parameters.lanes, run, n, count, group, N);
      C.load(p.C, parameters.lanes, run, n, count, group, N);
    }

    // What is added up over the lanes of grad_B or grad_C goes to the block's rows of those tokens.
    void put_sums(
        const H* lanes, State* to, const Run& run, int64_t n, int64_t count, int64_t group) {
      constexpr int kParts = int(sizeof(H) / sizeof(V));
      const V* vectors = reinterpret_cast<const V*>(lanes);
      for (int64_t i = 0; i < count * N * kParts; i += W) { // beyond the last there is room
        V r[W];
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) r[k] = vectors[i + k];
        Stored<R>::store(flat.data + i, sums_of(r));
      }
      const State* from = reinterpret_cast<const State*>(flat.data);
      over_states<kStates>(N, [&]<int NB>(int64_t j) {
        for (int64_t t = 0; t < count; ++t, from += NB) {
          const int64_t token = run.sequence * p.num_steps + run.first + (n + t) * run.direction;
          memcpy(to + (token * p.num_groups + group) * N + j, from, NB * sizeof(State));
        }
      });
    }

    State* kept_state(const Block& block, int64_t kept, int64_t n, int64_t i) const {
      return checkpoint(p.checkpoints, p, kept + n / interval, block.channel + i * W);
    }
    // The state before each tile but the first of an interval, from the one that the forward kept.
    void restart(const Run& run, const Block& block, int64_t kept, int64_t begin, int64_t end) {
      if (end - begin <= kTile) return;
      for (int64_t i = 0; i < block.slots; ++i)
        load_checkpoint(starts.data + i * N, kept_state(block, kept, begin, i), N, block.some(i));
      Ahead nothing;
      for (int64_t n = begin; n + kTile < end; n += kTile) {
        H* from = starts.data + (n - begin) / kTile * most * N;
        H* to = from + most * N;
        memcpy(static_cast<void*>(to), from, size_t(block.slots * N) * sizeof(H));
        load_coefficients(run, n, kTile, block.group);
        for (int64_t i = 0; i < block.slots; ++i) {
          const int64_t d = block.channel + i * W;
          const int some = block.some(i);
          Tile tile;
          load_tokens(tile.step, p.delta, run, n, kTile, d, some);
          load_tokens(tile.input, p.u, run, n, kTile, d, some);
          const V bias = load_channels(p.delta_bias, d, some);
          for (int t = 0; t < kTile; ++t) {
            const V step = time_step(tile.step[t] + bias, p.delta_softplus);
            tile.step[t] = bounded(step);
            tile.input[t] = step * tile.input[t];
            tile.y[t] = V(0);
          }
          forward_all_states(
              tile, kTile, N, parameters.lanes, parameters.A.data + i * N,
              B.at(p.B, parameters.B.data + i * N), B.step, C.at(p.C, parameters.C.data + i * N),
              C.step, to + i * N, nothing);
        }
      }
    }

    // One slot's tokens: everything but the sums over its states.
    struct Prepared {
      Work work;
      V delta[kTile], u[kTile], z[kTile], grad_out[kTile], slope[kTile];
    };
    void prepare(Prepared& x, const Run& run, int64_t n, int64_t count, int64_t d, int some) {
      const bool gate = p.z.data;
      load_tokens(x.delta, p.delta, run, n, count, d, some);
      load_tokens(x.u, p.u, run, n, count, d, some);
      if (gate) load_tokens(x.z, p.z, run, n, count, d, some);
      if (p.grad_out.data) load_tokens(x.grad_out, p.grad_out, run, n, count, d, some);
      const V bias = load_channels(p.delta_bias, d, some);
      for (int64_t t = 0; t < count; ++t) {
        x.delta[t] = x.delta[t] + bias;
        const V step = time_step(x.delta[t], p.delta_softplus);
        x.work.step[t] = bounded(step);
        x.work.input[t] = step * x.u[t];
        if (!p.grad_out.data) x.grad_out[t] = V(0);
        if (gate) {
          const Gate<V> g = silu_with_slope(x.z[t]);
          x.slope[t] = x.grad_out[t] * g.slope;
          x.grad_out[t] = x.grad_out[t] * g.value;
        }
        x.work.grad_y[t] = kReadout<H> != 1 ? x.grad_out[t] * kReadout<H> : x.grad_out[t];
        x.work.y[t] = x.work.grad_input[t] = V(0);
        memset(static_cast<void*>(x.work.parts + t), 0, sizeof(H));
      }
    }
    void finish(
        Prepared& x, const Gradients& sums, const Run& run, int64_t n, int64_t count, int64_t d,
        int some) {
      const V D = load_channels(p.D, d, some);
      V grad_D = *sums.D, grad_bias = *sums.delta_bias;
      for (int64_t t = 0; t < count; ++t) {
        const V grad_step = fused(x.work.grad_input[t], x.u[t], out_of_octaves(x.work.parts[t]));
        const V grad_delta = grad_step * time_step_slope(x.delta[t], p.delta_softplus);
        grad_bias = grad_bias + grad_delta;
        grad_D = fused(x.grad_out[t], x.u[t], grad_D);
        if (p.z.data) {
          const V y = kReadout<H> != 1 ? x.work.y[t] * kReadout<H> : x.work.y[t];
          x.z[t] = x.slope[t] * fused(D, x.u[t], y);
        }
        x.u[t] = fused(x.work.grad_input[t], x.work.step[t], D * x.grad_out[t]);
        x.delta[t] = grad_delta;
      }
      *sums.D = grad_D, *sums.delta_bias = grad_bias;
      store_tokens(p.grad_u, run, n, count, d, some, x.u);
      store_tokens(p.grad_delta, run, n, count, d, some, x.delta);
      if (p.grad_z.data) store_tokens(p.grad_z, run, n, count, d, some, x.z);
    }

    // The i-th slot, one tile, from the states `start`.
    void slot(
        const Run& run, const Block& block, int64_t part, int64_t first_slot, int64_t n,
        int64_t count, int64_t i, const H* start, Ahead& ahead) {
      const int64_t d = block.channel + i * W;
      const int some = block.some(i);
      Prepared prepared;
      prepare(prepared, run, n, count, d, some);
      const bool lanes = parameters.lanes, gate = p.z.data;
      const Gradients sums(p, plan, part, block.group, first_slot + i);
      const void *b = B.at(p.B, parameters.B.data + i * N),
                 *c = C.at(p.C, parameters.C.data + i * N);
      ahead.spread(count * ((N + kStates - 1) / kStates));
      over_states<kStates>(N, [&]<int NB>(int64_t j) {
        const auto step =
            lanes ? (gate ? backward_states<NB, true, true> : backward_states<NB, true, false>)
                  : (gate ? backward_states<NB, false, true> : backward_states<NB, false, false>);
        const int64_t size = lanes ? sizeof(H) : sizeof(State);
        step(
            prepared.work, count, parameters.A.data + i * N + j,
            static_cast<const char*>(b) + j * size, B.step, static_cast<const char*>(c) + j * size,
            C.step, start + j, grad_h.data + i * N + j, sums.A + j,
            p.B.constant ? sums.B + j : grad_B.data + j * count, p.B.constant ? 0 : NB,
            p.C.constant ? sums.C + j : grad_C.data + j * count, p.C.constant ? 0 : NB, ahead);
      });
      finish(prepared, sums, run, n, count, d, some);
    }

    void sequence(int64_t s, int64_t part, int64_t index, const Block& block) {
      const Run run(p, s);
      const int64_t kept = kept_before(p, interval, s), first_block = index % plan.blocks_per_group;
      const int64_t first_slot = first_block * plan.block;
      load_states(grad_h.data, p.grad_final_state, s, block, N);
      for (int64_t begin = (run.count - 1) / interval * interval; begin >= 0 && run.count > 0;
           begin -= interval) {
        const int64_t end = run.count - begin < interval ? run.count : begin + interval;
        restart(run, block, kept, begin, end);
        for (int64_t n = begin + (end - begin - 1) / kTile * kTile; n >= begin; n -= kTile) {
          const int64_t count = end - n < kTile ? end - n : kTile;
          load_coefficients(run, n, count, block.group);
          for (int64_t i = 0; i < block.slots; ++i) {
            if (i % plan.block == 0) {
              const size_t bytes = size_t(count * N) * sizeof(H);
              if (!p.B.constant) memset(static_cast<void*>(grad_B.data), 0, bytes);
              if (!p.C.constant) memset(static_cast<void*>(grad_C.data), 0, bytes);
            }
            H* const start = starts.data + ((n - begin) / kTile * most + i) * N;
            if (end - begin <= kTile)
              load_checkpoint(start, kept_state(block, kept, n, i), N, block.some(i));
            Ahead ahead;
            const bool turn = i + 1 == block.slots; // on to the tile before
            const int64_t then = turn ? n - kTile : n, tokens = turn ? kTile : count;
            const int64_t next = turn ? 0 : i + 1;
            if (then >= 0) {
              const auto add = [&](const auto& x) {
                ahead.add(x, run, then, tokens, block.channel + next * W, block.some(next));
              };
              if (interval == kTile)
                ahead.add(kept_state(block, kept, then, next), N * int64_t(sizeof(H)));
              add(p.delta), add(p.u), add(p.grad_out), add(p.z);
              add(p.grad_u), add(p.grad_delta), add(p.grad_z);
            }
            slot(run, block, part, first_slot, n, count, i, start, ahead);
            if ((i + 1) % plan.block && i + 1 < block.slots) continue; // this block goes on
            const int64_t b = first_block + i / plan.block;
            if (!p.B.constant)
              put_sums(grad_B.data, sums_of_block(p, plan, b, false), run, n, count, block.group);
            if (!p.C.constant)
              put_sums(grad_C.data, sums_of_block(p, plan, b, true), run, n, count, block.group);
          }
        }
      }
      store_states(p.grad_initial_state, s, block, N, grad_h.data);
    }
  };

  static void backward(
      const SelectiveScanBackward& p, const SelectiveScanPlan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    Backward work(p, plan);
    const int64_t blocks = plan.blocks_per_group * p.num_groups;
    for (int64_t item = begin, many; item < end; item += many) {
      const int64_t part = item / blocks, index = item % blocks;
      many = plan.blocks_per_group - index % plan.blocks_per_group;
      if (many > plan.blocks_together) many = plan.blocks_together;
      if (many > end - item) many = end - item;
      const Block block(p, plan, index, many);
      work.parameters.load(p, block);
      memset(
          static_cast<void*>(
              Gradients(p, plan, part, block.group, index % plan.blocks_per_group * plan.block).D),
          0, size_t(block.slots * plan.slot_bytes));
      const int64_t first = p.num_sequences * part / plan.parts,
                    last = p.num_sequences * (part + 1) / plan.parts;
      for (int64_t s = first; s < last; ++s) work.sequence(s, part, index, block);
    }
  }

  // Slots begin .. end of all groups: the sums over tokens, from all parts.
  static void reduce_channels(
      const SelectiveScanBackward& p, const SelectiveScanPlan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const int64_t N = p.num_states, vectors = plan.slot_bytes / int64_t(sizeof(V));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / plan.slots_per_group, slot = i % plan.slots_per_group,
                    width = p.width / p.num_groups;
      const int64_t d = group * width + slot * W;
      const int some = width - slot * W < W ? int(width - slot * W) : W;
      const Gradients all(p, plan, 0, group, slot);
      for (int64_t part = 1; part < plan.parts; ++part) {
        const V* more = Gradients(p, plan, part, group, slot).D;
        for (int64_t k = 0; k < vectors; ++k) all.D[k] = all.D[k] + more[k];
      }
      const auto put = [&](void* data, int64_t channel, int64_t state, const H* from) {
        if (data)
          store_slot_states(static_cast<State*>(data) + d * channel, state, channel, from, N, some);
      };
      put(p.grad_A.data, p.grad_A.channel, p.grad_A.state, all.A);
      if (p.B.constant) put(p.grad_B.data, p.grad_B.channel, p.grad_B.state, all.B);
      if (p.C.constant) put(p.grad_C.data, p.grad_C.channel, p.grad_C.state, all.C);
      const auto put_channels = [&](const OverChannels<void*>& x, const V* from) {
        if (x.data)
          store_slot(static_cast<R*>(x.data) + d * x.channel, 1, x.channel, from, 1, some);
      };
      put_channels(p.grad_D, all.D);
      put_channels(p.grad_delta_bias, all.delta_bias);
    }
  }

  // Tokens begin .. end of all rows: the sums over channels, from all blocks.
  static void reduce_tokens(
      const SelectiveScanBackward& p, const SelectiveScanPlan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const int64_t N = p.num_states, n = p.num_groups * N,
                  numbers = n * int64_t(sizeof(State) / sizeof(R));
    Scratch<R> sum(numbers + W);
    const auto reduce = [&](const Coefficient<void*>& x, bool of_C) {
      if (!x.data || x.constant) return;
      for (int64_t token = begin; token < end; ++token) {
        for (int64_t block = 0; block < plan.blocks_per_group; ++block) {
          const R* part =
              reinterpret_cast<const R*>(sums_of_block(p, plan, block, of_C) + token * n);
          for (int64_t k = 0; k < numbers; ++k)
            sum.data[k] = block ? sum.data[k] + part[k] : part[k];
        }
        const int64_t sequence = p.cu_seqlens ? 0 : token / p.num_steps;
        PerToken* to = static_cast<PerToken*>(x.data) + sequence * x.sequence +
                       (token - sequence * p.num_steps) * x.time;
        for (int64_t g = 0; g < p.num_groups; ++g) {
          const State* from = reinterpret_cast<const State*>(sum.data) + g * N;
          if constexpr (sizeof(PerToken) == sizeof(State)) {
            for (int64_t k = 0; k < N; ++k) to[g * x.group + k * x.state] = from[k];
          } else {
            PerToken some[W];
            for (int64_t k = 0; k < N; k += W) { // sum has room for a vector too many
              Stored<PerToken>::store(some, Stored<R>::load(from + k));
              for (int j = 0; j < W && k + j < N; ++j)
                to[g * x.group + (k + j) * x.state] = some[j];
            }
          }
        }
      }
    };
    reduce(p.grad_B, false);
    reduce(p.grad_C, true);
  }
};

} // namespace torch_ext::cpu::TORCH_EXT_ISA
