// The CPU driver of the causal convolution.
//
// Unlike a recurrence it may be cut along time: an item is a range of rows (the tokens of all sequences, end to end) times a
// block of channels, and reads the W - 1 rows before its own, or the state. Rows are taken kRows at a time, so that what
// several of them need, an input or a weight, is loaded once. All arithmetic is lane by lane and in the same order however
// rows are cut, so every split yields the same bits.
//
// The backward walks up in time as well. A row yields the gradient g of its pre-activation (which is computed again: nothing
// was saved), a share of the weight's gradient, and the gradient of the input W - 1 rows before, to which it is the last to
// contribute; only g of the last W - 1 rows is kept. The weight's gradient is summed over a window of rows, those over the
// item, and those in the order of the items: no number depends on threads or layouts.
#pragma once
#include "../cells/silu.h"
#include "../core/causal_conv1d_problem.h"
#include "diagonal.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

using torch_ext::silu; // of any lane, beside simd.h's of float lanes
using torch_ext::silu_derivative;

// ---- time-contiguous arrays, turned into rows of channels by squares of 16 bytes' side ----

template <int kBytes>
struct Unsigned;
template <>
struct Unsigned<2> {
  using type = uint16_t;
};
template <>
struct Unsigned<4> {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
};

template <class S>
struct Turn {
  static constexpr int kSide = 16 / int(sizeof(S));
  typedef typename Unsigned<int(sizeof(S))>::type Row __attribute__((vector_size(16)));

  // x0 y0 x1 y1 ..., the lower and the upper half.
  TORCH_EXT_HD static void interleave(Row x, Row y, Row& low, Row& high) {
    if constexpr (kSide == 2) {
      low = __builtin_shufflevector(x, y, 0, 2);
      high = __builtin_shufflevector(x, y, 1, 3);
    } else if constexpr (kSide == 4) {
      low = __builtin_shufflevector(x, y, 0, 4, 1, 5);
      high = __builtin_shufflevector(x, y, 2, 6, 3, 7);
    } else {
      low = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
      high = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
    }
  }
  TORCH_EXT_HD static void square(S* to, int64_t to_step, const S* from, int64_t from_step) {
    Row x[kSide], y[kSide];
#pragma GCC unroll 8
    for (int i = 0; i < kSide; ++i) memcpy(&x[i], from + i * from_step, sizeof x[i]);
#pragma GCC unroll 3
    for (int n = 1; n < kSide;
         n *= 2) { // each round brings one bit of the place from the row to the column
#pragma GCC unroll 4
      for (int i = 0; i < kSide / 2; ++i)
        interleave(x[i], x[i + kSide / 2], y[2 * i], y[2 * i + 1]);
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) x[i] = y[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kSide; ++i) memcpy(to + i * to_step, &x[i], sizeof x[i]);
  }
  // to[t * to_step + d] = from[d * from_step + t].
  static void rows(
      S* to, int64_t to_step, const S* from, int64_t from_step, int64_t width, int64_t count) {
    for (int64_t d = 0; d < width; d += kSide) {
      int64_t t = 0;
      if (d + kSide <= width)
        for (; t + kSide <= count; t += kSide)
          square(to + t * to_step + d, to_step, from + d * from_step + t, from_step);
      for (; t < count; ++t)
        for (int64_t e = d; e < d + kSide && e < width; ++e)
          to[t * to_step + e] = from[e * from_step + t];
    }
  }
};

// ---- rows ----

// Rows of one sequence: row t lies at data + t * step, and what comes before the first one at `head`: row -1 is the last
// of its `num_head` rows.
template <class S>
struct SequenceRows {
  const S *data = nullptr, *head = nullptr;
  int64_t step = 0, head_step = 0, num_head = 0;
  const S* operator()(int64_t t) const {
    return t < 0 ? head + (num_head + t) * head_step : data + t * step;
  }
};

// Tokens t0 .. t1 of a sequence that has `count`; its token 0 is row `row` of the arrays that are contiguous.
struct Segment {
  int64_t sequence, t0, t1, count, row;
};

// Calls f(Segment) for each piece of a sequence among the rows begin .. end.
template <class F>
void over_segments(const CausalConv1dProblem& p, int64_t begin, int64_t end, F f) {
  if (begin >= end) return;
  int64_t s = 0;
  if (p.cu_seqlens) { // the last sequence that starts at `begin` or before, of which only the last has tokens
    int64_t after = p.num_sequences;
    while (after - s > 1) {
      const int64_t middle = s + (after - s) / 2;
      (p.cu_seqlens[middle] <= begin ? s : after) = middle;
    }
  } else {
    s = begin / p.num_steps;
  }
  for (int64_t n = begin; n < end; ++s) {
    const int64_t row = p.cu_seqlens ? p.cu_seqlens[s] : s * p.num_steps;
    const int64_t count = p.cu_seqlens ? p.cu_seqlens[s + 1] - row : p.num_steps;
    const int64_t t1 = row + count < end ? count : end - row;
    if (t1 > n - row) f(Segment{s, n - row, t1, count, row});
    n = row + t1;
  }
}

template <class S>
struct CausalConv1d {
  using Lane = typename Stored<S>::Lane;
  using Scalar = typename Lane::Scalar;
  using Wide = Stored<Scalar>; // weights, and what is accumulated
  static constexpr int kLanes = Stored<S>::kLanes;
  static constexpr int kRows = 4;
  static constexpr int64_t kWindow =
      64; // rows that are turned at once, and whose share of the weight's gradient is summed

  // ---- memory of one call on one thread ----

  struct Memory {
    const CausalConv1dProblem& p;
    int64_t n;     // W
    int64_t lanes; // of a block, whole vectors
    int64_t
        row_step; // of turned rows: a cache line more than the block, or a power of two would displace itself
    Scratch<Scalar> weight; // by vectors: taps 0 .. W - 1, then the bias
    Scratch<S> zeros, head, x, grad_y;
    Scratch<const S*> pointers;
    Memory(
        const CausalConv1dProblem& problem, const CausalConv1dPlan& plan, bool turn_x,
        bool turn_grad)
        : p(problem),
          n(problem.window),
          lanes((plan.block + kLanes - 1) / kLanes * kLanes),
          row_step(lanes + 64 / int64_t(sizeof(S))),
          weight((n + 1) * lanes),
          zeros(lanes),
          head((n - 1) * lanes),
          x(turn_x ? (kWindow + 2 * n) * row_step : 0),
          grad_y(turn_grad ? (kWindow + n) * row_step : 0),
          pointers(n + kRows) {
      memset(zeros.data, 0, size_t(lanes) * sizeof(S));
    }
    void take_weight(int64_t d0, int64_t width) {
      const Scalar *from = static_cast<const Scalar*>(p.weight) + d0 * n,
                   *bias = p.bias ? static_cast<const Scalar*>(p.bias) + d0 : nullptr;
      for (int64_t d = 0; d < lanes; ++d) {
        Scalar* to = weight.data + d / kLanes * (n + 1) * kLanes + d % kLanes;
        for (int64_t k = 0; k < n; ++k) to[k * kLanes] = d < width ? from[d * n + k] : 0;
        to[n * kLanes] = bias && d < width ? bias[d] : 0;
      }
    }
    // The rows of a state; those of zeros where there is none.
    SequenceRows<S> head_rows(const ConvState& state, int64_t row, int64_t d0, int64_t width) {
      SequenceRows<S> rows;
      rows.num_head = n - 1;
      rows.head = zeros.data;
      if (!state.data) return rows;
      const S* from = static_cast<const S*>(state.data) + row * state.row + d0 * state.width;
      for (int64_t d = 0; d < width; ++d)
        for (int64_t k = 0; k + 1 < n; ++k)
          head.data[k * lanes + d] = from[d * state.width + k * state.tap];
      rows.head = head.data;
      rows.head_step = lanes;
      return rows;
    }
  };
  static bool needs_turning(const Strided& x, int64_t width) {
    return x.data && x.width != 1 && width > 1;
  }
  // Rows t0 .. t1 of an array, as SequenceRows::data; turned to scratch where channels do not lie side by side.
  static void take_rows(
      SequenceRows<S>& rows, const CausalConv1dProblem& p, const Strided& x, const Segment& g,
      int64_t t0, int64_t t1, int64_t d0, int64_t width, S* scratch, int64_t scratch_step) {
    rows.data = static_cast<const S*>(x.data) +
                (p.cu_seqlens ? g.row * x.time : g.sequence * x.sequence) + d0 * x.width;
    rows.step = x.time;
    if (!needs_turning(x, p.width)) return;
    const S* from = rows.data + t0 * x.time;
    if (x.time == 1) {
      Turn<S>::rows(scratch, scratch_step, from, x.width, width, t1 - t0);
    } else {
      for (int64_t t = 0; t < t1 - t0; ++t)
        for (int64_t d = 0; d < width; ++d)
          scratch[t * scratch_step + d] = from[t * x.time + d * x.width];
    }
    rows.data = scratch - t0 * scratch_step;
    rows.step = scratch_step;
  }
  // A state from its rows, which are those that come before row `end`.
  static void put_state(S* to, const SequenceRows<S>& rows, int64_t n, int64_t end, int64_t width) {
    for (int64_t k = 0; k + 1 < n; ++k) {
      const S* row = rows(end - (n - 1) + k);
      for (int64_t d = 0; d < width; ++d) to[d * (n - 1) + k] = row[d];
    }
  }
  template <class F>
  TORCH_EXT_HD static void over_vectors(int64_t width, F f) {
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) f.template operator()<false>(d, kLanes);
    if (d < width) f.template operator()<true>(d, int(width - d));
  }
  // f<W>(), W the window where it is a number that kernels are compiled for, else 0.
  template <class F>
  static void with_window(int64_t window, F f) {
    switch (window) {
      case 1:
        return f.template operator()<1>();
      case 2:
        return f.template operator()<2>();
      case 3:
        return f.template operator()<3>();
      case 4:
        return f.template operator()<4>();
      case 5:
        return f.template operator()<5>();
      case 6:
        return f.template operator()<6>();
      case 7:
        return f.template operator()<7>();
      case 8:
        return f.template operator()<8>();
      default:
        return f.template operator()<0>();
    }
  }

  // ---- forward ----

  // R rows of outputs from the n - 1 + R rows of inputs that they see.
  template <int W, int R, bool kStream>
  static void forward_rows(
      const S* const* x, const Scalar* weight, S* y, int64_t y_step, int64_t width, int64_t window,
      bool activate) {
    const int n = W ? W : int(window);
    over_vectors(
        width, [&]<bool kSome>(int64_t d, int some) __attribute__((always_inline)) {
          const Scalar* w = weight + d * (n + 1);
          Lane sum[R];
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sum[r] = Wide::load(w + n * kLanes);
#pragma GCC unroll 11
          for (int i = 0; i < n - 1 + R; ++i) {
            const Lane v = get<kSome>(x[i] + d, some);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
              if (i - r >= 0 && i - r < n)
                sum[r] = fused(Wide::load(w + (i - r) * kLanes), v, sum[r]);
          }
          if constexpr (R > 1) {
            // Rows end too soon for the machine to see what comes next: the next rows into L2, these into L1. An address
            // beyond the array is harmless.
            const int64_t step = x[n - 2 + R] - x[n - 3 + R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              __builtin_prefetch(x[n - 2 + R] + (r + 1) * step + d, 0, 2);
              __builtin_prefetch(x[n - 1 + r] + d + 4 * kLanes);
            }
          }
          if (activate) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sum[r] = silu(sum[r]);
          }
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) put<kSome, kStream>(y + r * y_step + d, sum[r], some);
        });
  }
  template <int W, bool kStream>
  static void forward_segment(
      const SequenceRows<S>& x, Memory& m, S* y, int64_t t0, int64_t t1, int64_t width) {
    const CausalConv1dProblem& p = m.p;
    const int n = W ? W : int(p.window);
    const S** rows = m.pointers.data;
    for (int64_t t = t0; t < t1;) {
      const bool many = W && t + kRows <= t1;
      for (int i = 0; i < n - 1 + (many ? kRows : 1); ++i) rows[i] = x(t - (n - 1) + i);
      if (many) {
        forward_rows<W ? W : 1, kRows, kStream>(
            rows, m.weight.data, y + t * p.width, p.width, width, p.window, p.silu);
        t += kRows;
      } else {
        forward_rows<W, 1, kStream>(
            rows, m.weight.data, y + t * p.width, p.width, width, p.window, p.silu);
        t += 1;
      }
    }
  }
  static void forward(
      const CausalConv1dForward& p, const CausalConv1dPlan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const bool turned = needs_turning(p.x, p.width);
    Memory m(p, plan, turned, false);
    const int64_t n = p.window;
    int64_t block = -1;
    for (int64_t item = begin; item < end; ++item) {
      const auto i = plan.item(item, p);
      if (i.d0 != block) m.take_weight(block = i.d0, i.width);
      over_segments(p, i.begin, i.end, [&](const Segment& g) {
        S* y = static_cast<S*>(p.y) + g.row * p.width + i.d0;
        const int64_t state_row = p.state_rows ? p.state_rows[g.sequence] : g.sequence;
        if (state_row < 0) {
          for (int64_t t = g.t0; t < g.t1; ++t)
            memset(y + t * p.width, 0, size_t(i.width) * sizeof(S));
          return;
        }
        SequenceRows<S> x;
        if (g.t0 < n - 1) x = m.head_rows(p.initial_state, state_row, i.d0, i.width);
        x.num_head = n - 1;
        for (int64_t t0 = g.t0; t0 < g.t1;) {
          const int64_t t1 = turned && g.t1 - t0 > kWindow ? t0 + kWindow : g.t1;
          take_rows(
              x, p, p.x, g, t0 < n - 1 ? 0 : t0 - (n - 1), t1, i.d0, i.width, m.x.data, m.row_step);
          with_window(n, [&]<int W>() {
            if (plan.stream) {
              forward_segment<W, true>(x, m, y, t0, t1, i.width);
            } else {
              forward_segment<W, false>(x, m, y, t0, t1, i.width);
            }
          });
          t0 = t1;
        }
        if (g.t1 == g.count)
          put_state(
              static_cast<S*>(p.final_state) + (state_row * p.width + i.d0) * (n - 1), x, n,
              g.count, i.width);
      });
      if (i.begin == 0) // sequences without a token are in no item
        over_empty_sequences(p, [&](int64_t s) {
          put_state(
              static_cast<S*>(p.final_state) + (s * p.width + i.d0) * (n - 1),
              m.head_rows(p.initial_state, s, i.d0, i.width), n, 0, i.width);
        });
    }
    if (plan.stream) fence_streams();
  }
  template <class F>
  static void over_empty_sequences(const CausalConv1dProblem& p, F f) {
    if (!p.cu_seqlens && p.num_steps > 0) return;
    for (int64_t s = 0; s < p.num_sequences; ++s)
      if (!p.cu_seqlens || p.cu_seqlens[s] == p.cu_seqlens[s + 1]) f(s);
  }

  // ---- backward ----

  // What a block of channels carries along: by vectors, as the weight is.
  struct Carried {
    const Scalar* weight;
    Scalar* before; // g of the n - 1 rows before
    Scalar* sums;   // over this window: the gradient of the taps, then of the bias
    int64_t window;
    bool silu;
  };
  // kRows rows: x as in forward_rows, grad_y of each; grad_x is that of the inputs n - 1 rows before.
  template <int W, bool kStream>
  static void backward_rows(
      const S* const* x, const S* grad_y, int64_t grad_y_step, const Carried& c, S* grad_x,
      int64_t grad_x_step, int64_t width) {
    constexpr int n = W, R = kRows;
    over_vectors(
        width, [&]<bool kSome>(int64_t d, int some) __attribute__((always_inline)) {
          const Scalar* w = c.weight + d * (n + 1);
          Scalar *before = c.before + d * (n - 1), *sums = c.sums + d * (n + 1);
          Lane tap[n], g[n - 1 + R], v[n - 1 + R];
#pragma GCC unroll 8
          for (int k = 0; k < n; ++k)
            tap[k] = Wide::load(w + k * kLanes); // once: stores below might change them
#pragma GCC unroll 8
          for (int i = 0; i < n - 1; ++i) g[i] = Wide::load(before + i * kLanes);
#pragma GCC unroll 11
          for (int i = 0; i < n - 1 + R; ++i) v[i] = get<kSome>(x[i] + d, some);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            g[n - 1 + r] = get<kSome>(grad_y + r * grad_y_step + d, some);
            // As forward.
            __builtin_prefetch(grad_y + (R + r) * grad_y_step + d, 0, 2);
            __builtin_prefetch(
                x[n - 1 + R - 1] + (r + 1) * (x[n - 1 + R - 1] - x[n - 2 + R]) + d, 0, 2);
            __builtin_prefetch(grad_y + r * grad_y_step + d + 4 * kLanes);
            __builtin_prefetch(x[n - 1 + r] + d + 4 * kLanes);
          }
          if (c.silu) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              Lane sum = Wide::load(w + n * kLanes);
#pragma GCC unroll 8
              for (int k = 0; k < n; ++k) sum = fused(tap[k], v[r + k], sum);
              g[n - 1 + r] = g[n - 1 + r] * silu_derivative(sum);
            }
          }
#pragma GCC unroll 9
          for (int k = 0; k < n; ++k) {
            Lane sum = Wide::load(sums + k * kLanes);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sum = fused(g[n - 1 + r], v[r + k], sum);
            Wide::store(sums + k * kLanes, sum);
          }
          Lane total = Wide::load(sums + n * kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) total = total + g[n - 1 + r];
          Wide::store(sums + n * kLanes, total);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            Lane sum = tap[0] * g[n - 1 + r];
#pragma GCC unroll 8
            for (int k = 1; k < n; ++k) sum = fused(tap[k], g[n - 1 + r - k], sum);
            put<kSome, kStream>(grad_x + r * grad_x_step + d, sum, some);
          }
#pragma GCC unroll 8
          for (int i = 0; i < n - 1; ++i) Wide::store(before + i * kLanes, g[R + i]);
        });
  }
  // One row, of any window. x null: beyond the sequence's end, where g is 0 and grad_final_state adds to grad_x. grad_x
  // null: it is another item's. count: the row's share of the weight's gradient is this item's.
  static void backward_row(
      const S* const* x, const S* grad_y, const Carried& c, bool count, S* grad_x, const S* add,
      int64_t width) {
    const int64_t n = c.window;
    over_vectors(
        width, [&]<bool kSome>(int64_t d, int some) __attribute__((always_inline)) {
          const Scalar* w = c.weight + d * (n + 1);
          Scalar *before = c.before + d * (n - 1), *sums = c.sums + d * (n + 1);
          Lane g(Scalar(0));
          if (x) {
            g = get<kSome>(grad_y + d, some);
            if (c.silu) {
              Lane sum = Wide::load(w + n * kLanes);
              for (int64_t k = 0; k < n; ++k)
                sum = fused(Wide::load(w + k * kLanes), get<kSome>(x[k] + d, some), sum);
              g = g * silu_derivative(sum);
            }
            if (count) {
              for (int64_t k = 0; k < n; ++k)
                Wide::store(
                    sums + k * kLanes,
                    fused(g, get<kSome>(x[k] + d, some), Wide::load(sums + k * kLanes)));
              Wide::store(sums + n * kLanes, Wide::load(sums + n * kLanes) + g);
            }
          }
          if (grad_x) {
            Lane sum = Wide::load(w) * g;
            for (int64_t k = 1; k < n; ++k)
              sum =
                  fused(Wide::load(w + k * kLanes), Wide::load(before + (n - 1 - k) * kLanes), sum);
            if (add) sum = sum + get<kSome>(add + d, some);
            put<kSome>(grad_x + d, sum, some);
          }
          for (int64_t i = 0; i + 2 < n; ++i)
            Wide::store(before + i * kLanes, Wide::load(before + (i + 1) * kLanes));
          if (n > 1) Wide::store(before + (n - 2) * kLanes, g);
        });
  }
  // to += from, from = 0.
  static void move_sums(Scalar* to, Scalar* from, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
      Wide::store(to + i, Wide::load(to + i) + Wide::load(from + i));
      Wide::store(from + i, Lane(Scalar(0)));
    }
  }

  static void backward(
      const CausalConv1dBackward& p, const CausalConv1dPlan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const bool turn_x = needs_turning(p.x, p.width), turn_grad = needs_turning(p.grad_y, p.width);
    Memory m(p, plan, turn_x, turn_grad);
    const int64_t n = p.window;
    Scratch<Scalar> before((n - 1) * m.lanes), sums((n + 1) * m.lanes),
        item_sums((n + 1) * m.lanes);
    Scratch<S> final_rows((n - 1) * m.lanes), grad_head((n - 1) * m.lanes);
    memset(sums.data, 0, size_t((n + 1) * m.lanes) * sizeof(Scalar));
    // Without grad_y all g are 0, and x, which may be infinite, is not to be multiplied with them.
    const bool has_grad = p.grad_y.data != nullptr;
    const Carried carried{m.weight.data, before.data, sums.data, n, p.silu && has_grad};
    int64_t block = -1;
    for (int64_t item = begin; item < end; ++item) {
      const auto i = plan.item(item, p);
      if (i.d0 != block) m.take_weight(block = i.d0, i.width);
      memset(item_sums.data, 0, size_t((n + 1) * m.lanes) * sizeof(Scalar));
      // Gradients of a sequence's first n - 1 rows, which lie in its initial state.
      SequenceRows<S> to_head;
      to_head.head = grad_head.data, to_head.head_step = m.lanes, to_head.num_head = n - 1;
      const auto put_grad_state = [&](int64_t s) {
        put_state(
            static_cast<S*>(p.grad_initial_state) + (s * p.width + i.d0) * (n - 1), to_head, n, 0,
            i.width);
      };
      over_segments(p, i.begin, i.end, [&](const Segment& g) {
        S* grad_x = static_cast<S*>(p.grad_x) + g.row * p.width + i.d0;
        SequenceRows<S> x, grad_y, add;
        if (g.t0 < n - 1) x = m.head_rows(p.initial_state, g.sequence, i.d0, i.width);
        x.num_head = n - 1;
        grad_y.data = m.zeros.data;
        // Inputs first .. g.t1 get their gradient here. Its last contribution comes n - 1 rows later, and may be beyond
        // g.t1: those rows are computed again by the item that they belong to.
        const int64_t first = g.t0 == 0 ? 1 - n : g.t0, last = g.t1 + n - 1;
        memset(before.data, 0, size_t((n - 1) * m.lanes) * sizeof(Scalar));
        const int64_t with_token = last < g.count ? last : g.count;
        for (int64_t t0 = g.t0; t0 < with_token;) {
          const bool count = has_grad && t0 < g.t1;
          int64_t t1 = t0 + kWindow < with_token ? t0 + kWindow : with_token;
          if (t0 < g.t1 && t1 > g.t1) t1 = g.t1;
          take_rows(
              x, p, p.x, g, t0 < n - 1 ? 0 : t0 - (n - 1), t1, i.d0, i.width, m.x.data, m.row_step);
          if (has_grad)
            take_rows(grad_y, p, p.grad_y, g, t0, t1, i.d0, i.width, m.grad_y.data, m.row_step);
          with_window(n, [&]<int W>() {
            const S** rows = m.pointers.data;
            for (int64_t t = t0; t < t1;) {
              const int64_t u = t - (n - 1);
              const bool many = W && count && t + kRows <= t1 && u >= first && u >= 0;
              for (int64_t k = 0; k < n - 1 + (many ? kRows : 1); ++k) rows[k] = x(u + k);
              if (many) {
                if (plan.stream) {
                  backward_rows<W ? W : 1, true>(
                      rows, grad_y(t), grad_y.step, carried, grad_x + u * p.width, p.width,
                      i.width);
                } else {
                  backward_rows<W ? W : 1, false>(
                      rows, grad_y(t), grad_y.step, carried, grad_x + u * p.width, p.width,
                      i.width);
                }
                t += kRows;
              } else {
                S* to = u < first ? nullptr
                        : u < 0   ? grad_head.data + t * m.lanes
                                  : grad_x + u * p.width;
                backward_row(rows, grad_y(t), carried, count, to, nullptr, i.width);
                t += 1;
              }
            }
          });
          if (count) move_sums(item_sums.data, sums.data, (n + 1) * m.lanes);
          t0 = t1;
        }
        if (last > g.count) { // beyond the end: inputs that the final state holds
          if (p.grad_final_state.data) {
            add = m.head_rows(p.grad_final_state, g.sequence, i.d0, i.width);
          }
          for (int64_t t = g.count; t < last; ++t) {
            const int64_t u = t - (n - 1);
            backward_row(
                nullptr, nullptr, carried, false,
                u < first ? nullptr
                : u < 0   ? grad_head.data + t * m.lanes
                          : grad_x + u * p.width,
                add.head ? add.head + (t - g.count) * add.head_step : nullptr, i.width);
          }
        }
        if (g.t0 == 0) put_grad_state(g.sequence);
      });
      if (i.begin == 0)
        over_empty_sequences(p, [&](int64_t s) {
          const SequenceRows<S> rows = m.head_rows(p.grad_final_state, s, i.d0, i.width);
          put_state(
              static_cast<S*>(p.grad_initial_state) + (s * p.width + i.d0) * (n - 1), rows, n, 0,
              i.width);
        });
      // The item's share, as (tap or bias, channel).
      Scalar* to = static_cast<Scalar*>(plan.shares) + i.group * (n + 1) * p.width + i.d0;
      for (int64_t k = 0; k <= n; ++k)
        for (int64_t d = 0; d < i.width; ++d)
          to[k * p.width + d] =
              item_sums.data[d / kLanes * (n + 1) * kLanes + k * kLanes + d % kLanes];
    }
    if (plan.stream) fence_streams();
  }
};

} // namespace torch_ext::cpu::TORCH_EXT_ISA
