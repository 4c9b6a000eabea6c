// The CPU driver of the diagonal family: how a cell is run over time, forward and backward.
//
// Work comes as items: one sequence times one block of channels. An item is walked in tiles of time; in a tile, groups
// of kGroup vectors of channels keep their state in registers over all of the tile's steps. Data larger than the cache
// takes short tiles, so that memory is walked nearly row by row as prefetchers like it, and stores around the cache;
// data in the cache takes one long tile. Inputs whose channels are not contiguous are first copied, a tile at a time.
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

// Data larger than the cache: fetch what the next tile will read, while this one computes. Once per cache line; k is
// the vector's number in its group. Into L2, since rows of 4 KiB all fall into one set of L1. An address behind the
// array's end is harmless.
template <bool kStream, class S>
TORCH_EXT_HD void fetch_ahead(const S* p, int k, int64_t ahead) {
  if (kStream && k * Stored<S>::kLanes * sizeof(S) % 64 == 0) __builtin_prefetch(p + ahead, 0, 2);
}

template <class Cell, class S>
struct Diagonal {
  static constexpr int N = num_inputs<Cell>;
  using State = typename StateOf<S>::type;
  using Lane = typename Stored<S>::Lane;
  static constexpr int kLanes = Stored<S>::kLanes;
  static constexpr int kGroup =
      sizeof(Lane) > kVectorBytes ? 2 : 4; // complex lanes are two registers

  // ---- forward ----

  // K vectors of channels from d on, over the tile's `count` steps. kSome: one vector, of which `some` lanes exist.
  template <int K, bool kSome, bool kStream>
  TORCH_EXT_HD static void forward_group(
      Cell cell, const Rows<S>* x, int64_t d, S* h, int64_t h_step, State* state, int64_t count,
      int some) {
    Lane s[K];
    const S* in[N];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) s[k] = get<kSome>(state + d + k * kLanes, some);
    for (int i = 0; i < N; ++i) in[i] = x[i].data + d;
    h += d;
    for (int64_t t = 0; t < count; ++t) {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        Lane v[N];
        for (int i = 0; i < N; ++i) {
          v[i] = get<kSome>(in[i] + k * kLanes, some);
          fetch_ahead<kStream>(in[i] + k * kLanes, k, count * x[i].step);
        }
        const Affine<Lane> f = cell.affine(pack<Cell, Lane>(v));
        s[k] = f.a * s[k] + f.b;
        put<kSome, kStream>(h + k * kLanes, s[k], some);
      }
      for (int i = 0; i < N; ++i) in[i] += x[i].step;
      h += h_step;
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) put<kSome>(state + d + k * kLanes, s[k], some);
  }

  static void forward(const DiagonalForward& p, const Plan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const Cell cell(p.flags);
    Scratch<S> scratch(N * plan.tile * plan.block);
    for (int64_t item = begin; item < end; ++item) {
      const Item i = plan.item(item, p);
      const Tokens tokens = tokens_of(p, i.sequence);
      const int64_t state_row = p.state_rows ? p.state_rows[i.sequence] : i.sequence;
      S* h = static_cast<S*>(p.h) +
             ((p.cu_seqlens ? 0 : i.sequence * p.num_steps) + tokens.first) * p.width + i.d0;
      if (state_row < 0) {
        for (int64_t t = 0; t < tokens.count; ++t)
          memset(h + t * tokens.direction * p.width, 0, size_t(i.width) * sizeof(S));
        continue;
      }
      State* state = static_cast<State*>(p.final_state) + state_row * p.width + i.d0;
      copy_state<S>(state, p.initial_state, state_row, i.d0, i.width);
      for (int64_t n = 0; n < tokens.count; n += plan.tile) {
        const int64_t count = tokens.count - n < plan.tile ? tokens.count - n : plan.tile;
        Rows<S> x[N];
        for (int k = 0; k < N; ++k)
          x[k] = rows_of<S>(
              p, p.inputs[k], i.sequence, tokens, n, count, false, i.d0, i.width,
              scratch.data + k * plan.tile * plan.block);
        const int64_t step = tokens.direction * p.width;
        S* out = h + n * step;
        int64_t d = 0;
        const auto groups = [&]<bool kStream> {
          for (; d + kGroup * kLanes <= i.width; d += kGroup * kLanes)
            forward_group<kGroup, false, kStream>(cell, x, d, out, step, state, count, kLanes);
        };
        if (plan.stream) {
          groups.template operator()<true>();
        } else {
          groups.template operator()<false>();
        }
        for (; d + kLanes <= i.width; d += kLanes)
          forward_group<1, false, false>(cell, x, d, out, step, state, count, kLanes);
        if (d < i.width)
          forward_group<1, true, false>(cell, x, d, out, step, state, count, int(i.width - d));
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

  template <int K, bool kSome, bool kStream>
  TORCH_EXT_HD static void backward_group(
      Cell cell, const Tile& tile, int64_t d, State* carry, int some) {
    Lane c[K];
    const S *in[N], *before = tile.h_before.data + d, *grad = tile.grad_h.data + d;
    S* out[N];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) c[k] = get<kSome>(carry + d + k * kLanes, some);
    for (int i = 0; i < N; ++i) in[i] = tile.x[i].data + d, out[i] = tile.dx[i] + d;
    const auto step = [&](int k, Lane h_before) __attribute__((always_inline)) {
      Lane v[N];
      for (int i = 0; i < N; ++i) {
        v[i] = get<kSome>(in[i] + k * kLanes, some);
        fetch_ahead<kStream>(in[i] + k * kLanes, k, tile.count * tile.x[i].step);
      }
      fetch_ahead<kStream>(before + k * kLanes, k, tile.count * tile.h_before.step);
      fetch_ahead<kStream>(grad + k * kLanes, k, tile.count * tile.grad_h.step);
      const Lane dh = get<kSome>(grad + k * kLanes, some) + c[k];
      const Gradient<Lane, Cell::template Input> g =
          step_vjp(cell, pack<Cell, Lane>(v), h_before, dh);
      c[k] = conj(g.a) * dh;
      unpack<Cell, Lane>(g.dx, v);
      for (int i = 0; i < N; ++i) put<kSome, kStream>(out[i] + k * kLanes, v[i], some);
    };
    const int64_t with_row = tile.start ? tile.count - 1 : tile.count;
    for (int64_t t = 0; t < with_row; ++t) {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) step(k, get<kSome>(before + k * kLanes, some));
      for (int i = 0; i < N; ++i) in[i] += tile.x[i].step, out[i] += tile.dx_step;
      before += tile.h_before.step;
      grad += tile.grad_h.step;
    }
    if (tile.start) {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) step(k, get<kSome>(tile.start + d + k * kLanes, some));
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) put<kSome>(carry + d + k * kLanes, c[k], some);
  }

  static void backward(const DiagonalBackward& p, const Plan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const Cell cell(p.flags);
    const int64_t piece = plan.tile * plan.block;
    Scratch<S> scratch((N + 2) * piece + plan.block);
    Scratch<State> start(plan.block);
    S* zeros = scratch.data + (N + 2) * piece;
    memset(zeros, 0, size_t(plan.block) * sizeof(S));
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
        for (int k = 0; k < N; ++k) tile.x[k] = rows(p.inputs[k], last - 1, tile.count, k);
        const int64_t with_row = tile.count - (first ? 0 : 1);
        tile.h_before = with_row ? rows(p.h, last - 2, with_row, N) : Rows<S>{zeros, 0};
        tile.grad_h =
            p.grad_h.data ? rows(p.grad_h, last - 1, tile.count, N + 1) : Rows<S>{zeros, 0};
        tile.dx_step = -tokens.direction * p.width;
        const int64_t row = (p.cu_seqlens ? 0 : i.sequence * p.num_steps) + tokens.first +
                            (last - 1) * tokens.direction;
        for (int k = 0; k < N; ++k)
          tile.dx[k] = static_cast<S*>(p.grad_inputs[k]) + row * p.width + i.d0;
        int64_t d = 0;
        const auto groups = [&]<bool kStream> {
          for (; d + kGroup * kLanes <= i.width; d += kGroup * kLanes)
            backward_group<kGroup, false, kStream>(cell, tile, d, carry, kLanes);
        };
        if (plan.stream) {
          groups.template operator()<true>();
        } else {
          groups.template operator()<false>();
        }
        for (; d + kLanes <= i.width; d += kLanes)
          backward_group<1, false, false>(cell, tile, d, carry, kLanes);
        if (d < i.width) backward_group<1, true, false>(cell, tile, d, carry, int(i.width - d));
      }
    }
    if (plan.stream) fence_streams();
  }
};

} // namespace torch_ext::cpu::TORCH_EXT_ISA
