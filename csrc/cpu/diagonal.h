// The CPU driver of the diagonal family: how a cell is run over time, forward and backward.
//
// Work comes as items: one sequence times one block of channels. An item is walked in tiles of time, a tile in one of
// two orders. Data that fits in the cache is walked by columns: groups of kGroup vectors of channels keep their state in
// registers over all of the tile's steps. Larger data is walked by rows, step by step with the state in L1, and a row in
// the direction in which rows follow each other: then every array is one stream up or down through memory, which the
// machine fetches ahead by itself; results are stored around the cache. Inputs whose channels are not contiguous are
// first copied, a tile at a time.
// Every channel is computed by the same instructions whatever the blocks are: results do not depend on the threads.
#pragma once
#include "../cells/all.h"
#include "../core/diagonal_problem.h"
#include "kernels.h"
#include "simd.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class S>
struct StateOf {
  using type = typename Stored<S>::Lane::Scalar;
};
template <class R>
struct StateOf<torch_ext::Complex<R>> {
  using type = torch_ext::Complex<R>;
};

// Memory of one call on one thread. (No containers here: see simd.h.)
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t n)
      : data(static_cast<T*>(aligned_alloc(64, (size_t(n) * sizeof(T) + 127) / 64 * 64))) {
    if (!data) abort();
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
};

// A sequence's tokens in the order in which time runs: token n is row first + n * direction of the arrays.
struct Tokens {
  int64_t first, direction, count;
};
inline Tokens tokens_of(const DiagonalProblem& p, int64_t sequence) {
  const int64_t begin = p.cu_seqlens ? p.cu_seqlens[sequence] : 0;
  const int64_t count = (p.cu_seqlens ? p.cu_seqlens[sequence + 1] : p.num_steps) - begin;
  return p.reverse ? Tokens{begin + count - 1, -1, count} : Tokens{begin, 1, count};
}

// Rows of channels d0 .. of one array, for consecutive tokens.
template <class S>
struct Rows {
  const S* data;
  int64_t step; // from one token to the next
};

// Rows of an array for the tokens n .. n + count in time order, backwards if `backward`; copied to scratch where channels
// do not lie side by side.
template <class S>
Rows<S> rows_of(
    const DiagonalProblem& p, const Strided& x, int64_t sequence, Tokens tokens, int64_t n,
    int64_t count, bool backward, int64_t d0, int64_t width, S* scratch) {
  const int64_t row = tokens.first + n * tokens.direction;
  const S* data = static_cast<const S*>(x.data) + (p.cu_seqlens ? 0 : sequence * x.sequence) +
                  row * x.time + d0 * x.width;
  const int64_t step = x.time * tokens.direction * (backward ? -1 : 1);
  if (x.width == 1 || width == 1) return {data, step};
  // Time-contiguous memory is read along time, in pieces of one cache line.
  constexpr int64_t kPiece = 16;
  for (int64_t t0 = 0; t0 < count; t0 += kPiece)
    for (int64_t d = 0; d < width; ++d)
      for (int64_t t = t0; t < count && t < t0 + kPiece; ++t)
        scratch[t * width + d] = data[t * step + d * x.width];
  return {scratch, width};
}

template <class S>
void copy_state(
    typename StateOf<S>::type* to, const Strided& from, int64_t row, int64_t d0, int64_t width) {
  using State = typename StateOf<S>::type;
  const State* source = static_cast<const State*>(from.data);
  if (source) source += row * from.sequence + d0 * from.width;
  if (source == to) return;
  for (int64_t d = 0; d < width; ++d) to[d] = source ? source[d * from.width] : State{};
}

// kSome: only the first n lanes exist.
template <bool kSome, class S>
TORCH_EXT_HD typename Stored<S>::Lane get(const S* p, int n) {
  if constexpr (kSome) return load_some(p, n);
  return Stored<S>::load(p);
}
template <bool kSome, bool kStream = false, class S>
TORCH_EXT_HD void put(S* p, typename Stored<S>::Lane x, int n) {
  if constexpr (kSome) {
    store_some(p, x, n);
  } else if constexpr (kStream) {
    Stored<S>::stream(p, x);
  } else {
    Stored<S>::store(p, x);
  }
}

// By rows: fetches what vector k of a group will need `bytes` further on, once per cache line. The machine's own fetching
// ahead is enough unless the arrays lie a power of two apart, as tensors of such shapes often do, and displace each other
// in its tables: then this saves a half of the time. An address outside of the array is harmless.
template <bool kStream, int kLevel, class S>
TORCH_EXT_HD void fetch_ahead(const S* p, int k, int64_t bytes) {
  if (kStream && k * Stored<S>::kLanes * sizeof(S) % 64 == 0)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + bytes, 0, kLevel);
}

template <class Cell, class S>
struct Diagonal {
  static constexpr int N = num_inputs<Cell>;
  using State = typename StateOf<S>::type;
  using Lane = typename Stored<S>::Lane;
  static constexpr int kLanes = Stored<S>::kLanes;
  static constexpr int kGroup =
      sizeof(Lane) > kVectorBytes ? 2 : 4; // complex lanes are two registers

  // Calls f<K, kSome>(d, n) for every group of K vectors of channels, from channel d on; kSome: one vector, of which only
  // n lanes exist.
  template <class F>
  TORCH_EXT_HD static void over_channels(int64_t width, bool downwards, F f) {
    constexpr int64_t kStep = kGroup * kLanes;
    const int64_t groups = width - width % kStep, vectors = width - width % kLanes;
    if (downwards) {
      if (vectors < width) f.template operator()<1, true>(vectors, int(width - vectors));
      for (int64_t d = vectors; d > groups;) f.template operator()<1, false>(d -= kLanes, kLanes);
      for (int64_t d = groups; d > 0;) f.template operator()<kGroup, false>(d -= kStep, kLanes);
    } else {
      for (int64_t d = 0; d < groups; d += kStep) f.template operator()<kGroup, false>(d, kLanes);
      for (int64_t d = groups; d < vectors; d += kLanes) f.template operator()<1, false>(d, kLanes);
      if (vectors < width) f.template operator()<1, true>(vectors, int(width - vectors));
    }
  }

  // ---- forward ----

  // K vectors of channels from d on, over the steps `begin` .. `end` of a tile.
  template <int K, bool kSome, bool kStream>
  TORCH_EXT_HD static void forward_group(
      Cell cell, const Rows<S>* x, S* h, int64_t h_step, State* state, int64_t d, int some,
      int64_t begin, int64_t end) {
    Lane s[K];
    const S* in[N];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) s[k] = get<kSome>(state + d + k * kLanes, some);
    for (int i = 0; i < N; ++i) in[i] = x[i].data + begin * x[i].step + d;
    h += begin * h_step + d;
    for (int64_t t = begin; t < end; ++t) {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        Lane v[N];
        for (int i = 0; i < N; ++i) {
          v[i] = get<kSome>(in[i] + k * kLanes, some);
          fetch_ahead<kStream, 3>(in[i] + k * kLanes, k, h_step < 0 ? -256 : 256);
        }
        s[k] = step(cell, pack<Cell, Lane>(v), s[k]);
        put<kSome, kStream>(h + k * kLanes, s[k], some);
      }
      for (int i = 0; i < N; ++i) in[i] += x[i].step;
      h += h_step;
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) put<kSome>(state + d + k * kLanes, s[k], some);
  }
  static void forward_columns(
      Cell cell, const Rows<S>* x, S* h, int64_t h_step, State* state, int64_t width,
      int64_t count) {
    over_channels(
        width, false, [&]<int K, bool kSome>(int64_t d, int some) __attribute__((always_inline)) {
          forward_group<K, kSome, false>(cell, x, h, h_step, state, d, some, 0, count);
        });
  }
  template <bool kStream>
  static void forward_rows(
      Cell cell, const Rows<S>* x, S* h, int64_t h_step, State* state, int64_t width,
      int64_t count) {
    for (int64_t t = 0; t < count; ++t)
      over_channels(
          width,
          h_step < 0, [&]<int K, bool kSome>(int64_t d, int some) __attribute__((always_inline)) {
            forward_group<K, kSome, kStream>(cell, x, h, h_step, state, d, some, t, t + 1);
          });
  }

  static void forward(const DiagonalForward& p, const Plan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const Cell cell(p.flags);
    const auto run = !plan.rows    ? forward_columns
                     : plan.stream ? forward_rows<true>
                                   : forward_rows<false>;
    bool copies = false;
    for (const Strided& x : p.inputs) copies = copies || (x.data && x.width != 1);
    Scratch<S> scratch(copies ? N * plan.tile * plan.block : 0);
    for (int64_t item = begin; item < end; ++item) {
      const Item i = plan.item(item, p);
      const Tokens tokens = tokens_of(p, i.sequence);
      const int64_t state_row = p.state_rows ? p.state_rows[i.sequence] : i.sequence;
      State* state = nullptr;
      if (state_row >= 0) {
        state = static_cast<State*>(p.final_state) + state_row * p.width + i.d0;
        copy_state<S>(state, p.initial_state, state_row, i.d0, i.width);
      }
      if (tokens.count == 0) continue; // h may be nowhere
      S* h = static_cast<S*>(p.h) +
             ((p.cu_seqlens ? 0 : i.sequence * p.num_steps) + tokens.first) * p.width + i.d0;
      if (!state) {
        for (int64_t t = 0; t < tokens.count; ++t)
          memset(h + t * tokens.direction * p.width, 0, size_t(i.width) * sizeof(S));
        continue;
      }
      const int64_t h_step = tokens.direction * p.width;
      for (int64_t n = 0; n < tokens.count; n += plan.tile) {
        const int64_t count = tokens.count - n < plan.tile ? tokens.count - n : plan.tile;
        Rows<S> x[N];
        for (int k = 0; k < N; ++k)
          x[k] = rows_of<S>(
              p, p.inputs[k], i.sequence, tokens, n, count, false, i.d0, i.width,
              scratch.data + k * plan.tile * plan.block);
        run(cell, x, h + n * h_step, h_step, state, i.width, count);
      }
    }
    if (plan.stream) fence_streams();
  }

  // ---- backward: time runs the other way, the carry is the gradient that reaches the step before ----

  struct Tile {
    Rows<S> x[N], h_before, grad_h;
    S* dx[N];
    int64_t dx_step, count;
    const State*
        start; // the state before the tile's last step, where that is the sequence's first; else null
  };

  // K vectors of channels from d on, over the tile's steps `begin` .. `end`, of which the last may start from `start`.
  template <int K, bool kSome, bool kStream>
  TORCH_EXT_HD static void backward_group(
      Cell cell, const Tile& tile, State* carry, int64_t d, int some, int64_t begin, int64_t end,
      const State* start) {
    Lane c[K];
    const S *in[N], *before = tile.h_before.data + begin * tile.h_before.step + d,
                    *grad = tile.grad_h.data + begin * tile.grad_h.step + d;
    S* out[N];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) c[k] = get<kSome>(carry + d + k * kLanes, some);
    for (int i = 0; i < N; ++i)
      in[i] = tile.x[i].data + begin * tile.x[i].step + d,
      out[i] = tile.dx[i] + begin * tile.dx_step + d;
    const auto step = [&](int k, Lane h_before) __attribute__((always_inline)) {
      Lane v[N];
      const int64_t ahead = tile.dx_step < 0 ? -512 : 512;
      for (int i = 0; i < N; ++i) {
        if (!gradient_reads<Cell>(i)) {
          v[i] = Lane{};
          continue;
        }
        v[i] = get<kSome>(in[i] + k * kLanes, some);
        fetch_ahead<kStream, 2>(in[i] + k * kLanes, k, ahead);
      }
      fetch_ahead<kStream, 2>(before + k * kLanes, k, ahead);
      fetch_ahead<kStream, 2>(grad + k * kLanes, k, ahead);
      const Lane dh = get<kSome>(grad + k * kLanes, some) + c[k];
      const Gradient<Lane, Cell::template Input> g =
          step_vjp(cell, pack<Cell, Lane>(v), h_before, dh);
      c[k] = g.dh_before;
      unpack<Cell, Lane>(g.dx, v);
      for (int i = 0; i < N; ++i) put<kSome, kStream>(out[i] + k * kLanes, v[i], some);
    };
    for (int64_t t = begin; t < (start ? end - 1 : end); ++t) {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) step(k, get<kSome>(before + k * kLanes, some));
      for (int i = 0; i < N; ++i) in[i] += tile.x[i].step, out[i] += tile.dx_step;
      before += tile.h_before.step;
      grad += tile.grad_h.step;
    }
    if (start) {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) step(k, get<kSome>(start + d + k * kLanes, some));
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) put<kSome>(carry + d + k * kLanes, c[k], some);
  }
  static void backward_columns(Cell cell, const Tile& tile, State* carry, int64_t width) {
    over_channels(
        width, false, [&]<int K, bool kSome>(int64_t d, int some) __attribute__((always_inline)) {
          backward_group<K, kSome, false>(cell, tile, carry, d, some, 0, tile.count, tile.start);
        });
  }
  template <bool kStream>
  static void backward_rows(Cell cell, const Tile& tile, State* carry, int64_t width) {
    const int64_t with_row = tile.start ? tile.count - 1 : tile.count;
    for (int64_t t = 0; t < with_row; ++t)
      over_channels(
          width, tile.dx_step < 0,
          [&]<int K, bool kSome>(int64_t d, int some) __attribute__((always_inline)) {
            backward_group<K, kSome, kStream>(cell, tile, carry, d, some, t, t + 1, nullptr);
          });
    if (tile.start)
      over_channels(
          width, tile.dx_step < 0,
          [&]<int K, bool kSome>(int64_t d, int some) __attribute__((always_inline)) {
            backward_group<K, kSome, kStream>(
                cell, tile, carry, d, some, with_row, tile.count, tile.start);
          });
  }

  static void backward(const DiagonalBackward& p, const Plan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const Cell cell(p.flags);
    const auto run = !plan.rows    ? backward_columns
                     : plan.stream ? backward_rows<true>
                                   : backward_rows<false>;
    bool copies = p.h.width != 1 || (p.grad_h.data && p.grad_h.width != 1);
    for (const Strided& x : p.inputs) copies = copies || (x.data && x.width != 1);
    const int64_t piece = plan.tile * plan.block;
    Scratch<S> scratch(copies ? (N + 2) * piece : 0), zeros(plan.block);
    Scratch<State> start(plan.block);
    memset(zeros.data, 0, size_t(plan.block) * sizeof(S));
    for (int64_t item = begin; item < end; ++item) {
      const Item i = plan.item(item, p);
      const Tokens tokens = tokens_of(p, i.sequence);
      State* carry = static_cast<State*>(p.grad_initial_state) + i.sequence * p.width + i.d0;
      copy_state<S>(carry, p.grad_final_state, i.sequence, i.d0, i.width);
      copy_state<S>(start.data, p.initial_state, i.sequence, i.d0, i.width);
      for (int64_t last = tokens.count; last > 0;
           last -= plan.tile) { // the tile: tokens first .. last, taken backwards
        const int64_t first = last < plan.tile ? 0 : last - plan.tile;
        Tile tile;
        tile.count = last - first;
        tile.start = first ? nullptr : start.data;
        const auto rows = [&](const Strided& x, int64_t n, int64_t count, int slot) {
          return rows_of<S>(
              p, x, i.sequence, tokens, n, count, true, i.d0, i.width, scratch.data + slot * piece);
        };
        for (int k = 0; k < N; ++k)
          tile.x[k] = gradient_reads<Cell>(k) ? rows(p.inputs[k], last - 1, tile.count, k)
                                              : Rows<S>{zeros.data, 0};
        const int64_t with_row = tile.count - (first ? 0 : 1);
        tile.h_before = with_row ? rows(p.h, last - 2, with_row, N) : Rows<S>{zeros.data, 0};
        tile.grad_h =
            p.grad_h.data ? rows(p.grad_h, last - 1, tile.count, N + 1) : Rows<S>{zeros.data, 0};
        tile.dx_step = -tokens.direction * p.width;
        const int64_t row = (p.cu_seqlens ? 0 : i.sequence * p.num_steps) + tokens.first +
                            (last - 1) * tokens.direction;
        for (int k = 0; k < N; ++k)
          tile.dx[k] = static_cast<S*>(p.grad_inputs[k]) + row * p.width + i.d0;
        run(cell, tile, carry, i.width);
      }
    }
    if (plan.stream) fence_streams();
  }
};

} // namespace torch_ext::cpu::TORCH_EXT_ISA
