// Matrix memories with a scalar decay, chunk by chunk: what crosses a chunk goes through the state at its start, what stays
// in it through the products of its queries and keys, and both are matrix products.
//
// In a chunk, with F[t] the sum of its log decays up to t, m0 and m the stabiliser (0 where there is none):
//
//   W[t][j]  = exp(F[t] - F[j] + log_input[j] - m[t]), j <= t       carry[t] = exp(F[t] + m0 - m[t])
//   G        = scale q k^T             P = G o W o input_scale
//   numerator = P v + carry o (scale q C0)          r = P 1 + carry o (scale q n0)
//   C        = carry[end] C0 + (W[end] o input_scale o k)^T v         likewise n, with 1 for v
//
// F, m and their differences are sums in double, kept as two numbers where kernels compute in float: gates of -1e4 in a
// chunk would take the last digits of all differences after them. A task is a sequence and some heads that share queries and
// keys; nothing depends on how many tasks there are at once.
#pragma once
#include <math.h>
#include <stdlib.h>
#include <initializer_list>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

// ---- matrix products ----

// a(i, k) = data[i row + k depth].
template <class R>
struct Left {
  const R* data;
  int64_t row, depth;
};
// Rows that are read next, asked for while products of other numbers are computed: rows of one head lie apart, so that the
// machine does not see by itself where they go on, and all at once they would wait for each other.
struct Ahead {
  struct Rows {
    const char* data;
    int64_t step, bytes, count;
  };
  Rows rows[6];
  int used = 0, now = 0;
  int64_t row = 0, byte = 0, lines = 0, at_once = 0;
  void clear() { used = now = 0, row = byte = lines = 0; }
  void add(const Rows& r) {
    if (r.count <= 0 || r.bytes <= 0) return;
    rows[used++] = r;
    lines += r.count * ((r.bytes + 63) / 64);
  }
  // That many calls of some() come.
  void spread_over(int64_t calls) { at_once = lines / (calls > 0 ? calls : 1) + 1; }
  void some() {
    for (int64_t i = 0; i < at_once && now < used; ++i) {
      const Rows& r = rows[now];
      __builtin_prefetch(r.data + row * r.step + byte);
      if ((byte += 64) < r.bytes) continue;
      byte = 0;
      if (++row == r.count) row = 0, ++now;
    }
  }
};

// What a product sums over: all depths, those before the end of its rows, or those from their beginning.
enum class Part { all, lower, upper };

// Numbers, the largest first, in which a count of rows or vectors is made up.
template <int... kSizes>
struct Sizes {
  // body(size, where) for each; a size is a constant.
  template <class Body>
  static void for_each(int64_t n, const Body& body) {
    int64_t at = 0;
    const auto with = [&](auto size) __attribute__((always_inline)) {
      for (; at + size() <= n; at += size()) body(size, at);
    };
    (with(std::integral_constant<int, kSizes>{}), ...);
  }
};

// Instead of the factor that what is there is kept by, which is never negative.
template <class R>
inline constexpr R kOverwrite = -1;

// Products, cut into blocks. Blocks: what a Term is, and block(), which makes some rows and vectors of y in registers.
template <class Blocks>
struct InBlocks : Blocks {
  using Blocks::kLanes, Blocks::kRows, Blocks::kVectors;
  using typename Blocks::Number;
  using typename Blocks::Term;

  // each: row by row. Together, rows meet numbers that only some of them are to meet, times zero.
  template <int kV>
  static void rows_of(
      int64_t rows, const Term& x, const Term& z, int64_t column, Number* y, int64_t y_row,
      Number keep, bool each) {
    if (each) {
      for (int64_t i = 0; i < rows; ++i)
        Blocks::template block<1, kV>(x, z, i, column, y, y_row, keep);
      return;
    }
    Blocks::RowsOfBlocks::for_each(
        rows, [&](auto size, int64_t i) __attribute__((always_inline)) {
          Blocks::template block<size(), kV>(x, z, i, column, y, y_row, keep);
        });
  }
  static int64_t blocks(int64_t rows, int64_t columns) {
    return (rows + kRows - 1) / kRows * ((columns + kVectors * kLanes - 1) / (kVectors * kLanes));
  }
  // y = z.factors o (x.factors o (x.a x.b) + z.a z.b) + keep y. columns: whole vectors. y is not read where keep is
  // kOverwrite; where it is 0, NaN and infinity in y stay.
  static void multiply(
      int64_t rows, int64_t columns, const Term& x, const Term& z, Number* y, int64_t y_row,
      Number keep, bool each = false) {
    Blocks::VectorsOfBlocks::for_each(
        columns / kLanes, [&](auto size, int64_t v) __attribute__((always_inline)) {
          rows_of<size()>(rows, x, z, v * kLanes, y, y_row, keep, each);
        });
  }
  static void multiply(
      int64_t rows, int64_t columns, const Term& x, Number* y, int64_t y_row,
      Number keep = kOverwrite<Number>, bool each = false) {
    multiply(rows, columns, x, Term{}, y, y_row, keep, each);
  }
  // Of a square the part on and below the diagonal, and what of that is in the same vectors.
  static void multiply_lower(int64_t rows, const Term& x, Number* y, int64_t y_row) {
    constexpr int64_t kSome = kRows * 2;
    for (int64_t i = 0; i < rows; i += kSome) {
      const int64_t n = rows - i < kSome ? rows - i : kSome;
      multiply(n, (i + n + kLanes - 1) / kLanes * kLanes, x.from_row(i), y + i * y_row, y_row);
    }
  }
};

template <class R>
struct NumberBlocks {
  using Number = R;
  using V = Vec<R>;
  using M = Stored<R>;
  static constexpr int kLanes = V::kLanes;
  using RowsOfBlocks = Sizes<6, 5, 4, 3, 2, 1>;
#if defined(__AVX512F__)
  static constexpr int kRows = 6, kVectors = 4;
  using VectorsOfBlocks = Sizes<4, 3, 2, 1>;
#else
  static constexpr int kRows = 6, kVectors = 2;
  using VectorsOfBlocks = Sizes<2, 1>;
#endif
  // factors[i] sum over depths of a(i, k) b[k]
  struct Term {
    Left<R> a{};
    const R* b = nullptr;
    int64_t b_row = 0, depth = 0;
    const R* factors = nullptr;
    Part part = Part::all;
    Ahead* ahead = nullptr;
    Term from_row(int64_t row) const {
      Term rest = *this;
      rest.a.data += row * a.row;
      return rest;
    }
  };

  template <int kR, int kV>
  static void block(
      const Term& x, const Term& z, int64_t first, int64_t column, R* y, int64_t y_row, R keep) {
    V sums[kR][kV];
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) sums[i][v] = V(R(0));
    const auto add = [&](const Term& term) __attribute__((always_inline)) {
      const int64_t begin = term.part == Part::upper ? first : 0,
                    end = term.part == Part::lower ? first + kR : term.depth;
      const R* a = term.a.data + first * term.a.row + begin * term.a.depth;
      const R* b = term.b + begin * term.b_row + column;
      for (int64_t k = begin; k < end; ++k, a += term.a.depth, b += term.b_row) {
        V row[kV];
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) row[v] = M::load(b + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kR; ++i) {
          const V of_row(a[i * term.a.row]);
#pragma GCC unroll 4
          for (int v = 0; v < kV; ++v) sums[i][v] = fused(of_row, row[v], sums[i][v]);
        }
      }
      if (term.factors)
#pragma GCC unroll 8
        for (int i = 0; i < kR; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < kV; ++v) sums[i][v] = V(term.factors[first + i]) * sums[i][v];
    };
    if (x.ahead) x.ahead->some();
    add(x);
    if (z.b) add(z);
    y += first * y_row + column;
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        R* const to = y + i * y_row + v * kLanes;
        M::store(to, keep == kOverwrite<R> ? sums[i][v] : fused(V(keep), M::load(to), sums[i][v]));
      }
  }
};
template <class R>
using Products = InBlocks<NumberBlocks<R>>;

#if defined(__AVX512F__)
// The same for bfloat16 in pairs of depths (AVX512-BF16): sums stay float, two products to an instruction. Of the left side
// two depths lie side by side, data[i row + k]; of the right one they share 32 bits, pairs[k / 2][column].
struct PairBlocks {
  using Number = float;
  using V = Vec<float>;
  static constexpr int kLanes = V::kLanes, kRows = 6, kVectors = 4;
  using RowsOfBlocks = Sizes<6, 4, 2, 1>;
  using VectorsOfBlocks = Sizes<4, 2, 1>;
  struct Term {
    const BFloat16* a = nullptr;
    int64_t row = 0;
    const uint32_t* b = nullptr;
    int64_t b_row = 0, depth = 0; // even
    const float* factors = nullptr;
    Part part = Part::all;
    Ahead* ahead = nullptr;
    Term from_row(int64_t from) const {
      Term rest = *this;
      rest.a += from * row;
      return rest;
    }
  };

  template <int kR, int kV>
  static void block(
      const Term& x, const Term& z, int64_t first, int64_t column, float* y, int64_t y_row,
      float keep) {
    V sums[kR][kV];
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) sums[i][v] = V(0.f);
    const auto add = [&](const Term& term) __attribute__((always_inline)) {
      const int64_t end = term.part == Part::lower ? first + kR : term.depth;
      const BFloat16* a = term.a + first * term.row;
      const uint32_t* b = term.b + column;
      for (int64_t k = 0; k < end; k += 2, a += 2, b += term.b_row) {
        __m512i row[kV];
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) row[v] = _mm512_loadu_si512(b + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kR; ++i) {
          int32_t pair;
          memcpy(&pair, a + i * term.row, sizeof pair);
          const __m512i of_row = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
          for (int v = 0; v < kV; ++v)
            __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums[i][v].v) : "v"(of_row), "v"(row[v]));
        }
      }
      if (term.factors)
#pragma GCC unroll 8
        for (int i = 0; i < kR; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < kV; ++v) sums[i][v] = V(term.factors[first + i]) * sums[i][v];
    };
    if (x.ahead) x.ahead->some();
    add(x);
    if (z.b) add(z);
    y += first * y_row + column;
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        float* const to = y + i * y_row + v * kLanes;
        Stored<float>::store(
            to, keep == kOverwrite<float> ? sums[i][v]
                                          : fused(V(keep), Stored<float>::load(to), sums[i][v]));
      }
  }
  // Two rows of numbers as one of pairs.
  static __m512i pairs_of(U16 first, U16 second) {
    return _mm512_or_si512(
        _mm512_cvtepu16_epi32((__m256i)first),
        _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)second), 16));
  }
  // Rows of floats, two by two; past the last one are zeros.
  static void pair_rows(
      const float* from, int64_t from_row, int64_t rows, int64_t columns, uint32_t* to,
      int64_t to_row) {
    for (int64_t k = 0; k < rows; k += 2, to += to_row)
      for (int64_t i = 0; i < columns; i += kLanes) {
        const float* const at = from + k * from_row + i;
        const U16 first = narrow(Stored<float>::load(at), BFloat16{}),
                  second =
                      k + 1 < rows ? narrow(Stored<float>::load(at + from_row), BFloat16{}) : U16{};
        _mm512_storeu_si512(to + i, pairs_of(first, second));
      }
  }
};
using PairProducts = InBlocks<PairBlocks>;
#endif

// to[c][r] = from[r][c]. Rows and columns are padded to whole vectors in both.
template <class R>
void turn(const R* from, int64_t from_row, int64_t rows, int64_t columns, R* to, int64_t to_row) {
  constexpr int n = Vec<R>::kLanes;
  for (int64_t r = 0; r < rows; r += n)
    for (int64_t c = 0; c < columns; c += n) {
      Vec<R> x[n];
      for (int i = 0; i < n; ++i) x[i] = Stored<R>::load(from + (r + i) * from_row + c);
      transpose<R>(x);
      for (int i = 0; i < n; ++i) Stored<R>::store(to + (c + i) * to_row + r, x[i]);
    }
}

// The same for any numbers of rows and columns.
template <class R>
void turn_any(
    const R* from, int64_t from_row, int64_t rows, int64_t columns, R* to, int64_t to_row) {
  constexpr int64_t n = Vec<R>::kLanes;
  const int64_t whole_rows = rows / n * n, whole_columns = columns / n * n;
  turn(from, from_row, whole_rows, whole_columns, to, to_row);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      to[c * to_row + r] = from[r * from_row + c];
}

// e^x from 0 to infinity, both ends included: simd.h's exp is bounded.
template <class R>
TORCH_EXT_HD Vec<R> exp_unbounded(Vec<R> x) {
  using V = Vec<R>;
  constexpr R kMost = R(kExpLimit<R>), kLeast = sizeof(R) == 8 ? R(-708.5) : R(-87.5);
  // In two factors where e^x leaves the range of `exp`: 2^64 and the rest.
  const V far = x.v > V(kMost).v ? V(R(44.361419555836498)).v : V(R(0)).v,
          scale = x.v > V(kMost).v ? V(R(18446744073709551616.)).v : V(R(1)).v;
  const V power = exp(x - far) * scale;
  return x.v < V(kLeast).v ? V(R(0)).v : power.v;
}

// A number as a sum of two of the kernel's: differences of such are as exact as one number.
template <class R>
struct Split {
  R high, low;
  explicit Split(double x) : high(R(x)), low(0) {
    if (sizeof(R) == 4 && isfinite(x) && isfinite(high)) low = R(x - double(high));
  }
};

template <class S>
struct MatrixMemory {
  using R = typename Stored<S>::Lane::Scalar;
  using V = Vec<R>;
  using M = Stored<R>;
  using Gemm = Products<R>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int64_t kChunk = 64;

  // ---- scratch memory ----

  struct Scratch {
    R* data;
    int64_t used = 0, size;
    explicit Scratch(int64_t n) : data(nullptr), size(n) {
      data = static_cast<R*>(aligned_alloc(64, size_t((n * int64_t(sizeof(R)) + 63) / 64 * 64)));
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() { free(data); }
    R* take(int64_t n) {
      R* const p = data + used;
      used += matrix_memory_padded(n);
      return p;
    }
  };

  static int64_t padded(int64_t n) { return matrix_memory_padded(n); }
  // From row to row of n numbers: an odd number of cache lines, as rows whose distance is a power of two share a few sets of
  // L1.
  static int64_t stride(int64_t n) {
    constexpr int64_t kLine = 64 / int64_t(sizeof(R));
    const int64_t lines = padded(n) / kLine;
    return (lines % 2 ? lines : lines + 1) * kLine;
  }

  // ---- tokens ----

  // A sequence's place, and the place of its t-th step in the order of the recurrence.
  struct Sequence {
    int64_t index, row, begin, steps;
    bool reverse;
    Sequence(const MatrixMemoryProblem& p, int64_t s)
        : index(s),
          row(p.cu_seqlens ? 0 : s),
          begin(p.cu_seqlens ? p.cu_seqlens[s] : 0),
          steps(p.cu_seqlens ? p.cu_seqlens[s + 1] - begin : p.num_steps),
          reverse(p.reverse) {}
    int64_t token(int64_t t) const { return begin + (reverse ? steps - 1 - t : t); }
  };

  // Steps first .. first + count of an array over heads, as rows of padded(size) numbers, stride(size) apart; rows up to a
  // multiple of 16 and what pads them are zero.
  static void pack(
      bool wide, const OverHeads<const void*>& x, const Sequence& s, int64_t first, int64_t count,
      int64_t head, int64_t size, R factor, R* to) {
    wide ? pack_of<R>(x, s, first, count, head, size, factor, to)
         : pack_of<S>(x, s, first, count, head, size, factor, to);
  }
  template <class E>
  static void pack_of(
      const OverHeads<const void*>& x, const Sequence& s, int64_t first, int64_t count,
      int64_t head, int64_t size, R factor, R* to) {
    const int64_t row = padded(size), step = stride(size);
    for (int64_t t = 0; t < count; ++t, to += step) {
      const E* const from = static_cast<const E*>(x.data) + s.row * x.sequence +
                            s.token(first + t) * x.time + head * x.head;
      const V f(factor);
      int64_t i = 0;
      if (x.channel == 1) {
        for (; i + kLanes <= size; i += kLanes) M::store(to + i, f * Stored<E>::load(from + i));
        if (i < size) M::store(to + i, f * load_some<E>(from + i, int(size - i))), i += kLanes;
      } else {
        for (; i < size; i += kLanes) {
          alignas(kVectorBytes) E some[kLanes] = {};
          for (int64_t k = 0; k < kLanes && i + k < size; ++k) some[k] = from[(i + k) * x.channel];
          M::store(to + i, f * Stored<E>::load(some));
        }
      }
      for (; i < row; i += kLanes) M::store(to + i, V(R(0)));
    }
    memset(to, 0, size_t((padded(count) - count) * step) * sizeof(R));
  }
  static void fetch(
      bool wide, const OverHeads<const void*>& x, const Sequence& s, int64_t first, int64_t count,
      int64_t head, int64_t size, Ahead& ahead) {
    if (!x.data || x.channel != 1 || first < 0 || first >= s.steps) return;
    const int64_t steps = s.steps - first < count ? s.steps - first : count,
                  number = wide ? sizeof(R) : sizeof(S);
    ahead.add(
        {static_cast<const char*>(x.data) +
             (s.row * x.sequence + s.token(first) * x.time + head * x.head) * number,
         (s.reverse ? -x.time : x.time) * number, size * number, steps});
  }
  // And back; channels of the array lie side by side.
  static void unpack(
      bool wide, const R* from, const OverHeads<void*>& x, const Sequence& s, int64_t first,
      int64_t count, int64_t head, int64_t size, R factor, bool stream = false) {
    wide ? unpack_to<R>(from, x, s, first, count, head, size, factor, stream)
         : unpack_to<S>(from, x, s, first, count, head, size, factor, stream);
  }
  template <class E>
  static void unpack_to(
      const R* from, const OverHeads<void*>& x, const Sequence& s, int64_t first, int64_t count,
      int64_t head, int64_t size, R factor, bool stream) {
    const int64_t step = stride(size);
    for (int64_t t = 0; t < count; ++t, from += step) {
      E* const to = static_cast<E*>(x.data) + s.row * x.sequence + s.token(first + t) * x.time +
                    head * x.head;
      const V f(factor);
      int64_t i = 0;
      if (stream && sizeof(E) == sizeof(R) && uintptr_t(to) % 64 == 0) {
        // Whole cache lines: one that is half streamed and half stored takes as long as memory does to answer.
        constexpr int64_t kLine = 64 / int64_t(sizeof(E));
        for (const int64_t whole = size / kLine * kLine; i < whole; i += kLanes)
          Stored<E>::stream(to + i, f * M::load(from + i));
      }
      for (; i + kLanes <= size; i += kLanes) Stored<E>::store(to + i, f * M::load(from + i));
      if (i < size) store_some<E>(to + i, f * M::load(from + i), int(size - i));
    }
  }
  static R gate(const PerHead<const void*>& g, const Sequence& s, int64_t t, int64_t head) {
    return static_cast<const R*>(g.data)[s.row * g.sequence + s.token(t) * g.time + head * g.head];
  }
  static void set_gate(const PerHead<void*>& g, const Sequence& s, int64_t t, int64_t head, R x) {
    if (g.data)
      static_cast<R*>(g.data)[s.row * g.sequence + s.token(t) * g.time + head * g.head] = x;
  }

  // ---- states ----

  struct State {
    R *C, *n; // (key, value), rows stride(value) apart; (key)
    double m = 0;
  };
  // Rows first_key .. first_key + keys of C and n: all of them, or the slice a task has.
  static void load_state(
      const MatrixMemoryProblem& p, const MatrixState<const void*>& from, int64_t row, int64_t head,
      State& to) {
    load_state(p, from, row, head, to, 0, p.key_size);
  }
  static void load_state(
      const MatrixMemoryProblem& p, const MatrixState<const void*>& from, int64_t row, int64_t head,
      State& to, int64_t first_key, int64_t keys, bool with_C = true) {
    const int64_t columns = stride(p.value_size);
    const R *const C = static_cast<const R*>(from.C), *const n = static_cast<const R*>(from.n),
                   *const m = static_cast<const R*>(from.m);
    if (with_C) memset(to.C, 0, size_t(keys * columns) * sizeof(R));
    const R* const of_head = C + row * from.C_row + head * from.C_head;
    if (C && with_C && from.C_key == 1) {
      turn_any(of_head + first_key, from.C_value, p.value_size, keys, to.C, columns);
    } else if (C && with_C) {
      for (int64_t k = 0; k < keys; ++k) {
        const R* const at = of_head + (first_key + k) * from.C_key;
        if (from.C_value == 1)
          memcpy(to.C + k * columns, at, size_t(p.value_size) * sizeof(R));
        else
          for (int64_t v = 0; v < p.value_size; ++v) to.C[k * columns + v] = at[v * from.C_value];
      }
    }
    for (int64_t k = 0; k < padded(keys); ++k)
      to.n[k] = n && k < keys
                    ? n[row * from.n_row + head * from.n_head + (first_key + k) * from.n_key]
                    : R(0);
    to.m = m && p.normalizer == Normalizer::stabilized
               ? double(m[row * from.m_row + head * from.m_head])
               : 0.;
  }
  static void store_state(
      const MatrixMemoryProblem& p, const State& from, const MatrixState<void*>& to, int64_t row,
      int64_t head) {
    store_state(p, from, to, row, head, 0, p.key_size);
  }
  static void store_state(
      const MatrixMemoryProblem& p, const State& from, const MatrixState<void*>& to, int64_t row,
      int64_t head, int64_t first_key, int64_t keys) {
    const int64_t columns = stride(p.value_size);
    R *const C = static_cast<R*>(to.C), *const n = static_cast<R*>(to.n),
             *const m = static_cast<R*>(to.m);
    R* const of_head = C + row * to.C_row + head * to.C_head;
    if (C && to.C_key == 1) {
      turn_any(from.C, columns, keys, p.value_size, of_head + first_key, to.C_value);
    } else if (C) {
      for (int64_t k = 0; k < keys; ++k) {
        R* const at = of_head + (first_key + k) * to.C_key;
        if (to.C_value == 1)
          memcpy(at, from.C + k * columns, size_t(p.value_size) * sizeof(R));
        else
          for (int64_t v = 0; v < p.value_size; ++v) at[v * to.C_value] = from.C[k * columns + v];
      }
    }
    if (n)
      for (int64_t k = 0; k < keys; ++k)
        n[row * to.n_row + head * to.n_head + (first_key + k) * to.n_key] = from.n[k];
    if (m && first_key == 0) m[row * to.m_row + head * to.m_head] = R(from.m);
  }
  // A kept state.
  static R* kept(
      const MatrixMemoryProblem& p, void* checkpoints, const Sequence& s, int64_t chunk,
      int64_t head, int64_t interval) {
    const int64_t slot = matrix_memory_chunks_before(p, interval, s.index, s.begin) + chunk;
    return static_cast<R*>(checkpoints) + (slot * p.num_heads + head) * matrix_memory_state_size(p);
  }

  // ---- gates of a chunk ----

  struct Gates {
    // Of step t the part of its row, of step j the part of its column: exp(row + column) is W.
    R row_high[kChunk], row_low[kChunk], column_high[kChunk], column_low[kChunk];
    R carry[kChunk];  // of the state at the start, to step t
    R end[kChunk];    // of step j, to the end
    R to_end[kChunk]; // the same with its input scale
    R input[kChunk];  // input scales
    R least[kChunk];  // of |r|
    double m[kChunk]; // stabilisers
    double log_decay[kChunk], log_input[kChunk];
    R decay; // of the state at the start, to the end

    Gates(
        const MatrixMemoryProblem& p, const Sequence& s, int64_t first, int64_t count, int64_t head,
        double m0) {
      const bool stabilized = p.normalizer == Normalizer::stabilized;
      double F = 0, most = -HUGE_VAL;
      R lift[kChunk], minus_m[kChunk];
      for (int64_t t = 0; t < kChunk; ++t) {
        row_high[t] = row_low[t] = column_low[t] = carry[t] = end[t] = to_end[t] = input[t] = R(0);
        column_high[t] = R(-HUGE_VAL), lift[t] = minus_m[t] = R(0);
        least[t] = R(1), m[t] = 0;
      }
      double shift = 0; // m of the last step, bounded
      for (int64_t t = 0; t < count; ++t) {
        double f = p.log_decay.data ? double(gate(p.log_decay, s, first + t, head)) : 0;
        if (f < -1e9) f = -1e9; // F stays finite and its differences exact
        const double i = p.log_input.data ? double(gate(p.log_input, s, first + t, head)) : 0;
        F += f;
        log_decay[t] = f, log_input[t] = i;
        input[t] = p.input_scale.data ? gate(p.input_scale, s, first + t, head) : R(1);
        const Split<R> column(i - F);
        column_high[t] = column.high, column_low[t] = column.low;
        most = i - F > most || i != i ? i - F : most; // NaN stays
        if (stabilized) {
          m[t] = F + (m0 > most || m0 != m0 ? m0 : most);
          if (t == count - 1) m[t] = double(R(m[t])); // as it is kept: C is divided by e^m of that
          shift = m[t] < -1e30 ? -1e30 : m[t];
          minus_m[t] = R(-m[t]);
        }
        const Split<R> row(F - shift);
        row_high[t] = row.high, row_low[t] = row.low;
        lift[t] = R(F - shift + m0);
      }
      for (int64_t t = 0; t < kChunk; t += kLanes) {
        M::store(carry + t, exp_unbounded(M::load(lift + t)));
        if (stabilized) M::store(least + t, exp_unbounded(M::load(minus_m + t)));
      }
      decay = count > 0 ? carry[count - 1] : R(1);
      if (count > 0)
        for (int64_t t = 0; t < kChunk; t += kLanes) {
          M::store(end + t, weights(count - 1, t));
          M::store(to_end + t, M::load(input + t) * M::load(end + t));
        }
      // What lies behind the last step takes no part.
      for (int64_t t = count; t < kChunk; ++t) end[t] = to_end[t] = carry[t] = R(0);
    }
    // W of step t and some columns.
    V weights(int64_t t, int64_t j) const {
      return exp_unbounded(
          (V(row_high[t]) + M::load(column_high + j)) + (V(row_low[t]) + M::load(column_low + j)));
    }
  };

  // x in the lanes up to `last`, zero in the others.
  static V up_to(V x, int64_t last) {
    typename V::Int lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    return V(lanes <= typename V::Int{} + decltype(lanes[0] + 0)(last) ? x.v : typename V::Raw{});
  }
  static R sum_of(V x) {
    R sum = x.v[0];
    for (int i = 1; i < kLanes; ++i) sum += x.v[i];
    return sum;
  }
  static bool all_finite(const R* x, int64_t rows, int64_t columns, int64_t row) {
    V sum(R(0));
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t i = 0; i < columns; i += kLanes)
        sum = fused(M::load(x + t * row + i), V(R(0)), sum);
    return sum_of(sum) == R(0);
  }
  static R dot(const R* x, const R* y, int64_t n) {
    V sum(R(0));
    for (int64_t i = 0; i < n; i += kLanes) sum = fused(M::load(x + i), M::load(y + i), sum);
    return sum_of(sum);
  }

  // The divisor of a step, whose sum is r; least: of |r|.
  static R divisor(const MatrixMemoryProblem& p, R least, R r) {
    switch (p.normalizer) {
      case Normalizer::none:
        return R(1);
      case Normalizer::sum:
        return r + R(p.eps);
      default: {
        const R size = r < R(0) ? -r : r;
        return (size > least || r != r ? size : least) + R(p.eps);
      }
    }
  }
  // Its derivative by r.
  static R divisor_slope(const MatrixMemoryProblem& p, const Gates& g, int64_t t, R r) {
    switch (p.normalizer) {
      case Normalizer::none:
        return R(0);
      case Normalizer::sum:
        return R(1);
      default:
        return r > g.least[t] ? R(1) : -r > g.least[t] ? R(-1) : R(0);
    }
  }

  // What heads that share queries and keys share of a chunk. Rows of q and k are key_row apart, those of kT and G `columns`.
  struct Shared {
    R *q, *k, *kT, *G; // q scaled
    int64_t key_row, columns = 0;
    Shared(const MatrixMemoryProblem& p, Scratch& scratch)
        : q(scratch.take(kChunk * stride(p.key_size))),
          k(scratch.take(kChunk * stride(p.key_size))),
          kT(scratch.take(kChunk * padded(p.key_size))),
          G(scratch.take(kChunk * kChunk)),
          key_row(stride(p.key_size)) {}
    void load_keys(
        const MatrixMemoryProblem& p, const Sequence& s, int64_t first, int64_t count,
        int64_t group) {
      columns = padded(count);
      pack(p.wide_keys, p.k, s, first, count, group, p.key_size, R(1), k);
      turn(k, key_row, columns, padded(p.key_size), kT, columns);
    }
    void load(
        const MatrixMemoryProblem& p, const Sequence& s, int64_t first, int64_t count,
        int64_t group) {
      load_keys(p, s, first, count, group);
      pack(p.wide_keys, p.q, s, first, count, group, p.key_size, R(p.scale), q);
      Gemm::multiply_lower(count, {{q, key_row, 1}, kT, columns, p.key_size}, G, columns);
    }
    static int64_t size(const MatrixMemoryProblem& p) {
      return 2 * kChunk * stride(p.key_size) + kChunk * padded(p.key_size) + kChunk * kChunk;
    }
  };

  // Rows first_key .. last_key of C and n after the chunk; kT: of those rows. `weighted`: as large as kT, scratch.
  static void advance(
      const MatrixMemoryProblem& p, const Gates& g, const R* kT, int64_t keys, int64_t n,
      int64_t count, const R* v, R* weighted, State& state, Ahead* ahead = nullptr) {
    for (int64_t k = 0; k < keys; k += kLanes) {
      V sums[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        sums[i] = V(R(0));
        if (k + i >= keys) continue;
        const R* const from = kT + (k + i) * n;
        R* const to = weighted + (k + i) * n;
        for (int64_t j = 0; j < n; j += kLanes) {
          const V x = M::load(from + j) * M::load(g.to_end + j);
          M::store(to + j, x);
          sums[i] = sums[i] + x;
        }
      }
      if (p.normalizer != Normalizer::none)
        M::store(state.n + k, fused(V(g.decay), M::load(state.n + k), sums_of<R>(sums)));
    }
    const int64_t row = stride(p.value_size);
    Gemm::multiply(
        keys, padded(p.value_size), {{weighted, n, 1}, v, row, count, nullptr, Part::all, ahead},
        state.C, row, g.decay);
    if (p.normalizer == Normalizer::stabilized && count > 0) state.m = g.m[count - 1];
  }

  // P and the sums of its rows, and W where it is wanted. Behind the diagonal P has zeros as far as a product of some rows
  // may read, and W whatever fills its vectors.
  static void scores(
      const Gates& g, const R* G, int64_t n, const R* input, int64_t count, R* P, R* r,
      R* W = nullptr) {
    for (int64_t first = 0; first < count; first += kLanes) {
      V sums[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t t = first + i;
        V sum(R(0));
        if (t < count) {
          const auto product = [&](int64_t j) {
            const V w = g.weights(t, j);
            if (W) M::store(W + t * n + j, w);
            return M::load(G + t * n + j) * (w * M::load(input + j));
          };
          for (int64_t j = 0; j < first; j += kLanes) {
            const V y = product(j);
            M::store(P + t * n + j, y);
            sum = sum + y;
          }
          const V y = up_to(product(first), i);
          M::store(P + t * n + first, y);
          sum = sum + y;
          for (int64_t j = first + kLanes; j < n && j < first + kLanes + 8; j += kLanes)
            M::store(P + t * n + j, V(R(0)));
        }
        sums[i] = sum;
      }
      M::store(r + first, sums_of<R>(sums));
    }
  }
  // x[t] . n for all rows of x.
  template <class E>
  static void dots(const E* x, int64_t row, const R* n, int64_t size, int64_t count, R* to) {
    for (int64_t first = 0; first < count; first += kLanes) {
      V sums[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        sums[i] = V(R(0));
        if (first + i >= count) continue;
        for (int64_t k = 0; k < size; k += kLanes)
          sums[i] = fused(Stored<E>::load(x + (first + i) * row + k), M::load(n + k), sums[i]);
      }
      M::store(to + first, sums_of<R>(sums));
    }
  }

  // ---- few steps ---- The recurrence as it stands: some numbers of C stay in registers over some steps, three instructions
  // per number and step, and C is read and written once. Where a chunk's preparations do not pay: plan.few.
  struct Few {
    // The stabiliser, step by step by the formula of Gates from the chunk's start on: the backward, which goes by chunks,
    // divides by the same e^m at their ends, to the last bit.
    struct Running {
      double m0, F = 0, most = -HUGE_VAL, m;
      explicit Running(double m = 0) : m0(m), m(m) {}
    };
    Running running[kMatrixMemoryHeads];
    static constexpr int kRows = 4;
    static constexpr int64_t kSteps = 16; // at most
    R *q, *k, *v, *y;
    int64_t key_row, value_row, first = 0, steps = 0;
    alignas(64) R decay[kSteps], input[kSteps], least[kSteps], by[kSteps];
    Few(const MatrixMemoryProblem& p, Scratch& scratch)
        : q(scratch.take(kSteps * stride(p.key_size))),
          k(scratch.take(kSteps * stride(p.key_size))),
          v(scratch.take(kSteps * stride(p.value_size))),
          y(scratch.take(kSteps * stride(p.value_size))),
          key_row(stride(p.key_size)),
          value_row(stride(p.value_size)) {}
    static int64_t size(const MatrixMemoryProblem& p) {
      return 2 * kSteps * (stride(p.key_size) + stride(p.value_size));
    }

    void load(
        const MatrixMemoryProblem& p, const Sequence& s, int64_t from, int64_t count,
        int64_t group) {
      first = from, steps = count;
      pack(p.wide_keys, p.q, s, first, steps, group, p.key_size, R(p.scale), q);
      pack(p.wide_keys, p.k, s, first, steps, group, p.key_size, R(1), k);
    }

    // Numbers of C in registers: kR rows, kV vectors, of the last one `some` lanes.
    template <int kR, int kV, bool kWhole>
    void block(
        const R* from, int64_t from_row, R* to, int64_t to_row, int64_t key, int64_t column,
        int some) const {
      V c[kR][kV];
#pragma GCC unroll 4
      for (int i = 0; i < kR; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kV; ++j)
          c[i][j] = !from    ? V(R(0))
                    : kWhole ? M::load(from + i * from_row + j * kLanes)
                             : load_some<R>(from + i * from_row + j * kLanes, some);
      for (int64_t t = 0; t < steps; ++t) {
        const R *const k_t = k + t * key_row + key, *const q_t = q + t * key_row + key,
                       *const v_t = v + t * value_row + column;
        R* const y_t = y + t * value_row + column;
        const V f(decay[t]);
        V value[kV], sum[kV];
#pragma GCC unroll 4
        for (int j = 0; j < kV; ++j)
          value[j] = M::load(v_t + j * kLanes), sum[j] = M::load(y_t + j * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kR; ++i) {
          const V of_k(k_t[i]), of_q(q_t[i]);
#pragma GCC unroll 4
          for (int j = 0; j < kV; ++j) {
            c[i][j] = fused(of_k, value[j], f * c[i][j]);
            sum[j] = fused(of_q, c[i][j], sum[j]);
          }
        }
#pragma GCC unroll 4
        for (int j = 0; j < kV; ++j) M::store(y_t + j * kLanes, sum[j]);
      }
      if (!to) return;
#pragma GCC unroll 4
      for (int i = 0; i < kR; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kV; ++j)
          kWhole ? M::store(to + i * to_row + j * kLanes, c[i][j])
                 : store_some<R>(to + i * to_row + j * kLanes, c[i][j], some);
    }
    template <int kV, bool kWhole>
    void rows(
        int64_t keys, const R* from, int64_t from_row, R* to, int64_t to_row, int64_t column,
        int some = 0) const {
      int64_t key = 0;
      const auto at = [&](auto* C, int64_t row) { return C ? C + key * row + column : nullptr; };
      for (; key + kRows <= keys; key += kRows)
        block<kRows, kV, kWhole>(
            at(from, from_row), from_row, at(to, to_row), to_row, key, column, some);
      for (; key < keys; ++key)
        block<1, kV, kWhole>(
            at(from, from_row), from_row, at(to, to_row), to_row, key, column, some);
    }

    // The same on a C whose rows are values: blocks are turned in registers, so that sums run over the keys in the same
    // order.
    void turned_block(
        const R* from, int64_t from_row, R* to, int64_t to_row, int64_t key, int64_t column,
        int keys, int values) const {
      V c[kLanes];
      const bool whole = keys == kLanes && values == kLanes;
      if (whole && from && to && steps == 1) { // C as it lies, and turned for the sum alone
        const V f(decay[0]), of_k = M::load(k + key);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const V x = M::load(from + (column + i) * from_row + key);
          c[i] = fused(of_k, V(v[column + i]), f * x);
          M::store(to + (column + i) * to_row + key, c[i]);
        }
        transpose<R>(c);
        V sum = M::load(y + column);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) sum = fused(V(q[key + i]), c[i], sum);
        M::store(y + column, sum);
        return;
      }
      if (whole && from) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) c[i] = M::load(from + (column + i) * from_row + key);
      } else {
        for (int i = 0; i < kLanes; ++i)
          c[i] = from && i < values ? load_some<R>(from + (column + i) * from_row + key, keys)
                                    : V(R(0));
      }
      transpose<R>(c);
      for (int64_t t = 0; t < steps; ++t) {
        const R *const k_t = k + t * key_row + key, *const q_t = q + t * key_row + key;
        R* const y_t = y + t * value_row + column;
        const V f(decay[t]), value = M::load(v + t * value_row + column);
        V sum = M::load(y_t);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) { // zeros stand behind the last key
          c[i] = fused(V(k_t[i]), value, f * c[i]);
          sum = fused(V(q_t[i]), c[i], sum);
        }
        M::store(y_t, sum);
      }
      if (!to) return;
      transpose<R>(c);
      if (whole) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) M::store(to + (column + i) * to_row + key, c[i]);
      } else {
        for (int i = 0; i < values; ++i)
          store_some<R>(to + (column + i) * to_row + key, c[i], keys);
      }
    }
    void turned(
        const MatrixMemoryProblem& p, const R* from, int64_t from_row, R* to,
        int64_t to_row) const {
      const auto left = [](int64_t size, int64_t i) {
        return size - i < kLanes ? int(size - i) : kLanes;
      };
      // Two sums at a time, which do not wait for each other.
      for (int64_t first = 0; first < p.value_size; first += 2 * kLanes)
        for (int64_t j = 0; j < p.key_size; j += kLanes)
          for (int64_t i = first; i < p.value_size && i < first + 2 * kLanes; i += kLanes)
            turned_block(
                from, from_row, to, to_row, j, i, left(p.key_size, j), left(p.value_size, i));
    }

    // These steps of a head, from one C to another or the same (null: from zeros, and to nowhere), on its n and m.
    void run(
        const MatrixMemoryForward& p, const Sequence& s, int64_t head, const R* from,
        int64_t from_row, R* to, int64_t to_row, R* n, Running& run, bool ends_chunk,
        bool by_values = false) {
      const bool stabilized = p.normalizer == Normalizer::stabilized;
      for (int64_t t = 0; t < kSteps; ++t) decay[t] = input[t] = least[t] = R(0);
      for (int64_t t = 0; t < steps; ++t) {
        double f = p.log_decay.data ? double(gate(p.log_decay, s, first + t, head)) : 0;
        if (f < -1e9) f = -1e9;
        const double i = p.log_input.data ? double(gate(p.log_input, s, first + t, head)) : 0;
        double next = 0;
        if (stabilized) {
          run.F += f;
          run.most = i - run.F > run.most || i != i ? i - run.F : run.most;
          next = run.F + (run.m0 > run.most || run.m0 != run.m0 ? run.m0 : run.most);
          if (ends_chunk && t == steps - 1) next = double(R(next));
        }
        const double shift = next < -1e30 ? -1e30 : next;
        decay[t] = R(f + run.m - shift), input[t] = R(i - shift), least[t] = R(-next);
        run.m = next;
      }
      for (int64_t t = 0; t < kSteps; t += kLanes) {
        M::store(decay + t, exp_unbounded(M::load(decay + t)));
        M::store(input + t, exp_unbounded(M::load(input + t)));
        M::store(least + t, stabilized ? exp_unbounded(M::load(least + t)) : V(R(1)));
      }
      if (p.input_scale.data)
        for (int64_t t = 0; t < steps; ++t) input[t] *= gate(p.input_scale, s, first + t, head);

      if (p.normalizer != Normalizer::none) {
        V sums[kSteps];
        for (int64_t t = 0; t < kSteps; ++t) sums[t] = V(R(0));
        for (int64_t i = 0; i < padded(p.key_size); i += kLanes) {
          V x = M::load(n + i);
          for (int64_t t = 0; t < steps; ++t) {
            x = fused(V(input[t]), M::load(k + t * key_row + i), V(decay[t]) * x);
            sums[t] = fused(M::load(q + t * key_row + i), x, sums[t]);
          }
          M::store(n + i, x);
        }
        for (int64_t t = 0; t < kSteps; t += kLanes) M::store(by + t, sums_of<R>(sums + t));
        for (int64_t t = 0; t < steps; ++t) by[t] = R(1) / divisor(p, least[t], by[t]);
      }

      pack(false, p.v, s, first, steps, head, p.value_size, R(1), v);
      for (int64_t t = 0; t < steps; ++t)
        for (int64_t i = 0; i < padded(p.value_size); i += kLanes) {
          M::store(v + t * value_row + i, V(input[t]) * M::load(v + t * value_row + i));
          M::store(y + t * value_row + i, V(R(0)));
        }
      constexpr int kVectors = Gemm::kVectors;
      int64_t column = 0;
      if (by_values) {
        turned(p, from, from_row, to, to_row);
        column = p.value_size;
      }
      for (; column + kVectors * kLanes <= p.value_size; column += kVectors * kLanes)
        rows<kVectors, true>(p.key_size, from, from_row, to, to_row, column);
      for (; column + kLanes <= p.value_size; column += kLanes)
        rows<1, true>(p.key_size, from, from_row, to, to_row, column);
      if (column < p.value_size)
        rows<1, false>(p.key_size, from, from_row, to, to_row, column, int(p.value_size - column));
      if (p.normalizer != Normalizer::none)
        for (int64_t t = 0; t < steps; ++t)
          for (int64_t i = 0; i < padded(p.value_size); i += kLanes)
            M::store(y + t * value_row + i, V(by[t]) * M::load(y + t * value_row + i));
      unpack(p.wide_h, y, p.h, s, first, steps, head, p.value_size, R(1));
    }

    // All steps of a head, which are no more than fit; C goes from one array into the other.
    void whole(
        const MatrixMemoryForward& p, const Sequence& s, int64_t row, int64_t head, State& state) {
      const MatrixState<const void*>& x = p.initial_state;
      const MatrixState<void*>& y = p.final_state;
      const bool by_values = x.C && y.C && x.C_key == 1 && y.C_key == 1 && x.C_value != 1;
      if (!by_values && ((x.C && x.C_value != 1) || (y.C && y.C_value != 1))) {
        const int64_t step = stride(p.value_size);
        load_state(p, x, row, head, state);
        Running m(state.m);
        run(p, s, head, state.C, step, state.C, step, state.n, m, true);
        state.m = m.m;
        return store_state(p, state, y, row, head);
      }
      MatrixState<const void*> vectors = x;
      vectors.C = nullptr;
      load_state(p, vectors, row, head, state, 0, p.key_size, false);
      const R* const from = static_cast<const R*>(x.C);
      R* const to = static_cast<R*>(y.C);
      Running m(state.m);
      run(p, s, head, from ? from + row * x.C_row + head * x.C_head : nullptr,
          by_values ? x.C_value : x.C_key, to ? to + row * y.C_row + head * y.C_head : nullptr,
          by_values ? y.C_value : y.C_key, state.n, m, true, by_values);
      state.m = m.m;
      MatrixState<void*> updated = y;
      updated.C = nullptr;
      store_state(p, state, updated, row, head);
    }
  };

  // ---- forward ----

  // Which part of the work a call does: plan.pass.
  static void forward(
      const MatrixMemoryForward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    switch (plan.pass) {
      case MatrixMemoryPlan::Pass::states:
        make_states(p, plan, begin, end);
        break;
      case MatrixMemoryPlan::Pass::outputs:
        make_outputs(p, plan, begin, end);
        break;
      default:
        all_in_one(p, plan, begin, end);
    }
    if (plan.stream) fence_streams();
  }

  static void no_outputs(const MatrixMemoryForward& p, const Sequence& s, int64_t head) {
    R zeros[kLanes] = {};
    for (int64_t t = 0; t < s.steps; ++t)
      for (int64_t i = 0; i < p.value_size; i += kLanes) {
        OverHeads<void*> h = p.h;
        const int64_t n = p.value_size - i < kLanes ? p.value_size - i : kLanes;
        h.data = static_cast<char*>(h.data) + i * int64_t(p.wide_h ? sizeof(R) : sizeof(S));
        unpack(p.wide_h, zeros, h, s, t, 1, head, n, R(1));
      }
  }

  // Sequences and heads, all steps of them.
  static void all_in_one(
      const MatrixMemoryForward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
    const int64_t K = p.key_size, columns = padded(p.value_size), value_row = stride(p.value_size),
                  interval = plan.chunk, shares = p.num_heads / p.num_groups,
                  state_size = K * value_row + padded(K);
    Scratch scratch(
        Shared::size(p) + plan.heads * (state_size + 32) + Outputs::size(p) + Few::size(p) +
        Pairs::size(p) + kChunk * padded(K) + 128);
    Shared shared(p, scratch);
    Outputs work(p, scratch);
    Few few(p, scratch);
    [[maybe_unused]] const bool pairs = in_pairs(p);
    [[maybe_unused]] Pairs half(p, scratch, pairs);
    R *const weighted = scratch.take(kChunk * padded(K)), *const states =
                                                              scratch.take(plan.heads * state_size);
    for (int64_t item = begin; item < end; ++item) {
      const MatrixMemoryPlan::Item it = plan.item(item, p);
      const Sequence s(p, it.sequence);
      const int64_t row = p.state_rows ? p.state_rows[it.sequence] : it.sequence;
      const int64_t heads = it.heads, group = it.head / shares;
      if (row < 0) {
        for (int64_t h = 0; h < heads; ++h) no_outputs(p, s, it.head + h);
        continue;
      }
      if (s.steps <= Few::kSteps && s.steps <= plan.few && !p.checkpoints) {
        few.load(p, s, 0, s.steps, group);
        for (int64_t h = 0; h < heads; ++h) {
          State state{states, states + K * value_row};
          few.whole(p, s, row, it.head + h, state);
        }
        continue;
      }
      Ahead ahead;
      double m[kMatrixMemoryHeads];
      const auto state_of = [&](int64_t h) {
        State state{states + h * state_size, states + h * state_size + K * value_row};
        state.m = m[h];
        return state;
      };
      for (int64_t h = 0; h < heads; ++h) {
        State state = state_of(h);
        load_state(p, p.initial_state, row, it.head + h, state);
        m[h] = state.m;
      }
      for (int64_t first = 0, chunk = 0; first < s.steps; first += interval, ++chunk) {
        const int64_t count = s.steps - first < interval ? s.steps - first : interval;
        if (p.checkpoints)
          for (int64_t h = 0; h < heads; ++h)
            keep_state(
                p, plan, state_of(h), 0, K,
                kept(p, p.checkpoints, s, chunk, it.head + h, interval));
        if (s.steps <= plan.few) {
          typename Few::Running* const running = few.running;
          for (int64_t h = 0; h < heads; ++h) running[h] = typename Few::Running(m[h]);
          for (int64_t t = 0; t < count; t += Few::kSteps) {
            few.load(p, s, first + t, count - t < Few::kSteps ? count - t : Few::kSteps, group);
            for (int64_t h = 0; h < heads; ++h) {
              State x = state_of(h);
              few.run(
                  p, s, it.head + h, x.C, value_row, x.C, value_row, x.n, running[h],
                  t + Few::kSteps >= count);
              m[h] = running[h].m;
            }
          }
          continue;
        }
        bool loaded = false;
        if constexpr (kPairs)
          if (pairs) half.load(p, s, first, count, group);
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t head = it.head + h;
          State state = state_of(h);
          const Gates g(p, s, first, count, head, state.m);
          const bool last = h == heads - 1;
          const int64_t next = last ? first + interval : first;
          ahead.clear();
          if (last) fetch(p.wide_keys, p.k, s, next, interval, group, K, ahead);
          if (last) fetch(p.wide_keys, p.q, s, next, interval, group, K, ahead);
          fetch(false, p.v, s, next, interval, last ? it.head : head + 1, p.value_size, ahead);
          ahead.spread_over(Gemm::blocks(count, columns) + Gemm::blocks(K, columns));
          if constexpr (kPairs)
            if (pairs && half.load_values(p, s, first, count, head)) {
              half.make(p, g, s, first, count, head, state.C, value_row, state.n, &ahead);
              half.advance(p, g, 0, K, count, state, &ahead);
              m[h] = state.m;
              continue;
            }
          if (!loaded) shared.load(p, s, first, count, group), loaded = true;
          work.make(p, g, shared, s, first, count, head, state.C, value_row, state.n, &ahead);
          advance(p, g, shared.kT, K, shared.columns, count, work.v, weighted, state, &ahead);
          m[h] = state.m;
        }
      }
      for (int64_t h = 0; h < heads; ++h)
        store_state(p, state_of(h), p.final_state, row, it.head + h);
    }
  }

  static void put(bool stream, R* to, V x) { stream ? M::stream(to, x) : M::store(to, x); }
  // Rows first .. last of a state into its place among those that are kept.
  static void keep_state(
      const MatrixMemoryProblem& p, const MatrixMemoryPlan& plan, const State& state, int64_t first,
      int64_t last, R* to) {
    const int64_t columns = padded(p.value_size), row = stride(p.value_size);
    R* const n = to + p.key_size * columns;
    for (int64_t k = first; k < last; ++k)
      for (int64_t i = 0; i < columns; i += kLanes)
        put(plan.stream, to + k * columns + i, M::load(state.C + (k - first) * row + i));
    memcpy(n + first, state.n, size_t(last - first) * sizeof(R));
    if (last == p.key_size) memset(n + last, 0, size_t(padded(last) - last) * sizeof(R));
    if (first == 0) n[padded(p.key_size)] = R(state.m);
  }

  // The outputs of a chunk from the state at its start.
  struct Outputs {
    R *P, *v, *y;
    Outputs(const MatrixMemoryProblem& p, Scratch& scratch)
        : P(scratch.take(kChunk * kChunk)),
          v(scratch.take(kChunk * stride(p.value_size))),
          y(scratch.take(kChunk * stride(p.value_size))) {}
    static int64_t size(const MatrixMemoryProblem& p) {
      return kChunk * kChunk + 2 * kChunk * stride(p.value_size);
    }
    void make(
        const MatrixMemoryForward& p, const Gates& g, const Shared& x, const Sequence& s,
        int64_t first, int64_t count, int64_t head, const R* C, int64_t C_row, const R* n,
        Ahead* ahead = nullptr) {
      const int64_t columns = padded(p.value_size), row = stride(p.value_size);
      pack(false, p.v, s, first, count, head, p.value_size, R(1), v);
      alignas(64) R r[kChunk], carry[kChunk], by[kChunk];
      scores(g, x.G, x.columns, g.input, count, P, r);
      const R *factors = g.carry, *divisors = nullptr;
      if (p.normalizer != Normalizer::none) {
        dots(x.q, x.key_row, n, padded(p.key_size), count, carry);
        for (int64_t t = 0; t < count; ++t)
          by[t] = R(1) / divisor(p, g.least[t], torch_ext::fused(g.carry[t], carry[t], r[t]));
        divisors = by;
      }
      // Straight into the output where it is as the products want it.
      const bool direct = (p.wide_h || sizeof(S) == sizeof(R)) && columns == p.value_size;
      R* const to = direct ? static_cast<R*>(p.h.data) + s.row * p.h.sequence +
                                 s.token(first) * p.h.time + head * p.h.head
                           : y;
      const int64_t to_row = !direct ? row : s.reverse ? -p.h.time : p.h.time;
      const typename Gemm::Term carried{{x.q, x.key_row, 1}, C,    C_row, p.key_size, factors,
                                        Part::all,           ahead};
      const typename Gemm::Term inside{{P, x.columns, 1}, v, row, count, divisors, Part::lower};
      // Zeros above the diagonal times infinity would be NaN in steps before it: then each row by itself.
      Gemm::multiply(
          count, columns, carried, inside, to, to_row, kOverwrite<R>,
          !all_finite(v, count, columns, row));
      if (!direct) unpack(p.wide_h, y, p.h, s, first, count, head, p.value_size, R(1));
    }
  };

  // ---- forward in bfloat16, where the machine multiplies that ---- Queries, keys and values are what they are; weights,
  // and the state where queries meet it, are rounded to bfloat16. The state itself and every sum are float.
  static constexpr bool kPairs =
#if defined(__AVX512F__)
      std::is_same_v<S, BFloat16>;
#else
      false;
#endif
  static bool in_pairs(const MatrixMemoryProblem& p) {
    return kPairs && has_bfloat16 && !p.wide_keys;
  }
  struct Pairs {
    BFloat16 *q, *k, *weighted, *P; // weighted: keys over tokens, with the weights to the end
    uint32_t *k_pairs, *v_pairs, *C_pairs;
    R *G, *float_P, *y;
    int64_t key_row, value_row, columns = 0;
    static int64_t even(int64_t n) { return (n + 1) / 2 * 2; }
    static BFloat16* halves(Scratch& scratch, int64_t n) {
      return reinterpret_cast<BFloat16*>(scratch.take((n + 1) / 2));
    }
    static uint32_t* words(Scratch& scratch, int64_t n) {
      return reinterpret_cast<uint32_t*>(scratch.take(n));
    }
    Pairs(const MatrixMemoryProblem& p, Scratch& scratch, bool wanted)
        : key_row(2 * stride((p.key_size + 1) / 2)), value_row(stride(p.value_size)) {
      if (!wanted) return;
      q = halves(scratch, kChunk * key_row), k = halves(scratch, kChunk * key_row);
      weighted = halves(scratch, padded(p.key_size) * kChunk);
      P = halves(scratch, kChunk * kChunk);
      k_pairs = words(scratch, padded((p.key_size + 1) / 2) * kChunk);
      v_pairs = words(scratch, kChunk / 2 * value_row);
      C_pairs = words(scratch, even(p.key_size) / 2 * value_row);
      G = scratch.take(kChunk * kChunk), float_P = scratch.take(kChunk * kChunk);
      y = scratch.take(kChunk * value_row);
    }
    static int64_t size(const MatrixMemoryProblem& p) {
      if (!in_pairs(p)) return 0;
      const int64_t key_row = 2 * stride((p.key_size + 1) / 2), value_row = stride(p.value_size);
      return kChunk * (key_row + padded(p.key_size) + 2 * value_row) + 3 * kChunk * kChunk +
             kChunk * padded((p.key_size + 1) / 2) + even(p.key_size) / 2 * value_row + 256;
    }

    // Rows of bfloat16; what pads a row and the last rows is zero.
    static void rows_of(
        const OverHeads<const void*>& x, const Sequence& s, int64_t first, int64_t count,
        int64_t head, int64_t size, BFloat16* to, int64_t row) {
      for (int64_t t = 0; t < padded(count); ++t, to += row) {
        int64_t i = 0;
        if (t < count) {
          const BFloat16* const from = static_cast<const BFloat16*>(x.data) + s.row * x.sequence +
                                       s.token(first + t) * x.time + head * x.head;
          if (x.channel == 1)
            memcpy(to, from, size_t(size) * sizeof(BFloat16));
          else
            for (; i < size; ++i) to[i] = from[i * x.channel];
          i = size;
        }
        memset(static_cast<void*>(to + i), 0, size_t(row - i) * sizeof(BFloat16));
      }
    }
#if defined(__AVX512F__)
    void load_keys(
        const MatrixMemoryProblem& p, const Sequence& s, int64_t first, int64_t count,
        int64_t group) {
      columns = padded(count);
      rows_of(p.k, s, first, count, group, p.key_size, k, key_row);
      // Two numbers of a key are one of 32 bits.
      turn(
          reinterpret_cast<const float*>(k), key_row / 2, columns, padded((p.key_size + 1) / 2),
          reinterpret_cast<float*>(k_pairs), columns);
    }
    void load(
        const MatrixMemoryProblem& p, const Sequence& s, int64_t first, int64_t count,
        int64_t group) {
      load_keys(p, s, first, count, group);
      rows_of(p.q, s, first, count, group, p.key_size, q, key_row);
      PairProducts::multiply_lower(
          count, {q, key_row, k_pairs, columns, even(p.key_size)}, G, columns);
    }
    // False: not all of them are finite, which zeros would not leave out of sums.
    bool load_values(
        const MatrixMemoryProblem& p, const Sequence& s, int64_t first, int64_t count,
        int64_t head) {
      __m512i bad = _mm512_setzero_si512();
      for (int64_t t = 0; t < columns; t += 2)
        for (int64_t i = 0; i < p.value_size; i += kLanes) {
          const auto row = [&](int64_t at) {
            if (at >= count) return U16{};
            const BFloat16* const from = static_cast<const BFloat16*>(p.v.data) +
                                         s.row * p.v.sequence + s.token(first + at) * p.v.time +
                                         head * p.v.head + i * p.v.channel;
            U16 x{};
            if (p.v.channel == 1 && i + kLanes <= p.value_size)
              memcpy(&x, from, sizeof x);
            else
              for (int64_t c = 0; c < kLanes && i + c < p.value_size; ++c)
                x[c] = from[c * p.v.channel].bits;
            return x;
          };
          const __m512i pair = PairProducts::pairs_of(row(t), row(t + 1));
          const __m512i exponents = _mm512_set1_epi16(0x7f80);
          bad = _mm512_or_si512(
              bad, _mm512_movm_epi16(
                       _mm512_cmpeq_epi16_mask(_mm512_and_si512(pair, exponents), exponents)));
          _mm512_storeu_si512(v_pairs + t / 2 * value_row + i, pair);
        }
      return _mm512_test_epi32_mask(bad, bad) == 0;
    }

    // As Outputs::make and advance() do it.
    void make(
        const MatrixMemoryForward& p, const Gates& g, const Sequence& s, int64_t first,
        int64_t count, int64_t head, const R* C, int64_t C_row, const R* n, Ahead* ahead) {
      const int64_t values = padded(p.value_size);
      alignas(64) R r[kChunk], carry[kChunk], input[kChunk], by[kChunk];
      for (int64_t t = 0; t < kChunk; ++t)
        carry[t] = g.carry[t] * R(p.scale), input[t] = g.input[t] * R(p.scale);
      MatrixMemory::scores(g, G, columns, input, count, float_P, r);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t j = 0; j < columns; j += kLanes)
          Stored<BFloat16>::store(P + t * columns + j, M::load(float_P + t * columns + j));
      const R* divisors = nullptr;
      if (p.normalizer != Normalizer::none) {
        dots(q, key_row, n, padded(p.key_size), count, by);
        for (int64_t t = 0; t < count; ++t)
          by[t] = R(1) / divisor(p, g.least[t], torch_ext::fused(carry[t], by[t], r[t]));
        divisors = by;
      }
      PairProducts::pair_rows(C, C_row, p.key_size, values, C_pairs, value_row);
      PairProducts::multiply(
          count, values,
          {q, key_row, C_pairs, value_row, even(p.key_size), carry, Part::all, ahead},
          {P, columns, v_pairs, value_row, even(count), divisors, Part::lower}, y, value_row,
          kOverwrite<float>);
      unpack(p.wide_h, y, p.h, s, first, count, head, p.value_size, R(1));
    }
    void advance(
        const MatrixMemoryProblem& p, const Gates& g, int64_t first_key, int64_t keys,
        int64_t count, State& state, Ahead* ahead) {
      for (int64_t i = 0; i < keys; i += kLanes) {
        V sums[kLanes];
        for (int64_t l = 0; l < kLanes; ++l) sums[l] = V(R(0));
        for (int64_t l = 0; l < kLanes && i + l < keys; l += 2) {
          const uint32_t* const from = k_pairs + (first_key + i + l) / 2 * columns;
          BFloat16* const to = weighted + (i + l) * columns;
          for (int64_t j = 0; j < columns; j += kLanes) {
            const __m512i pair = _mm512_loadu_si512(from + j);
            const V weight = M::load(g.to_end + j),
                    x = V(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16))) * weight,
                    y = V(_mm512_castsi512_ps(
                            _mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000))))) *
                        weight;
            Stored<BFloat16>::store(to + j, x);
            Stored<BFloat16>::store(to + columns + j, y);
            sums[l] = sums[l] + x, sums[l + 1] = sums[l + 1] + y;
          }
        }
        if (p.normalizer != Normalizer::none)
          M::store(state.n + i, fused(V(g.decay), M::load(state.n + i), sums_of<R>(sums)));
      }
      PairProducts::multiply(
          keys, padded(p.value_size),
          {weighted, columns, v_pairs, value_row, even(count), nullptr, Part::all, ahead}, state.C,
          value_row, g.decay);
      if (p.normalizer == Normalizer::stabilized && count > 0) state.m = g.m[count - 1];
    }
#endif
  };

  // In two passes, for few heads: first the states at the starts of all chunks, by rows of C, which are independent; then
  // the outputs of all chunks.
  static void make_states(
      const MatrixMemoryForward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
    const int64_t K = p.key_size, value_row = stride(p.value_size), interval = plan.chunk,
                  shares = p.num_heads / p.num_groups;
    Scratch scratch(
        Shared::size(p) + Pairs::size(p) + plan.keys * value_row + padded(plan.keys) +
        kChunk * (value_row + padded(plan.keys)) + 256);
    Shared shared(p, scratch);
    [[maybe_unused]] const bool pairs = in_pairs(p);
    [[maybe_unused]] Pairs half(p, scratch, pairs);
    R *const v = scratch.take(kChunk * value_row), *const weighted =
                                                       scratch.take(kChunk * padded(plan.keys));
    State state{scratch.take(plan.keys * value_row), scratch.take(plan.keys)};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t slices = (K + plan.keys - 1) / plan.keys, head = item / slices % p.num_heads,
                    first_key = item % slices * plan.keys,
                    keys = K - first_key < plan.keys ? K - first_key : plan.keys;
      const Sequence s(p, item / slices / p.num_heads);
      const int64_t row = p.state_rows ? p.state_rows[s.index] : s.index;
      if (row < 0) continue;
      load_state(p, p.initial_state, row, head, state, first_key, keys);
      for (int64_t first = 0, chunk = 0; first < s.steps; first += interval, ++chunk) {
        const int64_t count = s.steps - first < interval ? s.steps - first : interval;
        keep_state(
            p, plan, state, first_key, first_key + keys,
            kept(p, p.checkpoints, s, chunk, head, interval));
        const Gates g(p, s, first, count, head, state.m);
        if constexpr (kPairs)
          if (pairs) {
            half.load_keys(p, s, first, count, head / shares);
            if (half.load_values(p, s, first, count, head)) {
              half.advance(p, g, first_key, keys, count, state, nullptr);
              continue;
            }
          }
        shared.load_keys(p, s, first, count, head / shares);
        pack(false, p.v, s, first, count, head, p.value_size, R(1), v);
        advance(
            p, g, shared.kT + first_key * shared.columns, keys, shared.columns, count, v, weighted,
            state);
      }
      store_state(p, state, p.final_state, row, head, first_key, keys);
    }
  }
  static void make_outputs(
      const MatrixMemoryForward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
    const int64_t interval = plan.chunk, chunks = (p.num_steps + interval - 1) / interval,
                  columns = padded(p.value_size);
    Scratch scratch(Shared::size(p) + Outputs::size(p) + Pairs::size(p));
    Shared shared(p, scratch);
    Outputs work(p, scratch);
    [[maybe_unused]] const bool pairs = in_pairs(p);
    [[maybe_unused]] Pairs half(p, scratch, pairs);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t chunk = item % chunks, first = chunk * interval;
      const MatrixMemoryPlan::Item it = plan.item(item / chunks, p);
      const Sequence s(p, it.sequence);
      if (first >= s.steps) continue;
      const int64_t count = s.steps - first < interval ? s.steps - first : interval;
      if (p.state_rows && p.state_rows[s.index] < 0) {
        for (int64_t h = 0; h < it.heads && chunk == 0; ++h) no_outputs(p, s, it.head + h);
        continue;
      }
      const int64_t group = it.head / (p.num_heads / p.num_groups);
      bool loaded = false;
      if constexpr (kPairs)
        if (pairs) half.load(p, s, first, count, group);
      for (int64_t h = 0; h < it.heads; ++h) {
        const R* const C = kept(p, p.checkpoints, s, chunk, it.head + h, interval);
        const R* const n = C + p.key_size * columns;
        const Gates g(p, s, first, count, it.head + h, double(n[padded(p.key_size)]));
        if constexpr (kPairs)
          if (pairs && half.load_values(p, s, first, count, it.head + h)) {
            half.make(p, g, s, first, count, it.head + h, C, columns, n, nullptr);
            continue;
          }
        if (!loaded) shared.load(p, s, first, count, group), loaded = true;
        work.make(p, g, shared, s, first, count, it.head + h, C, columns, n);
      }
    }
  }

  // ---- backward ----

  // Which part of the work a call does: plan.pass.
  static void backward(
      const MatrixMemoryBackward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    switch (plan.pass) {
      case MatrixMemoryPlan::Pass::queries:
        back_to_queries(p, plan, begin, end);
        break;
      case MatrixMemoryPlan::Pass::states:
        back_to_states(p, plan, begin, end);
        break;
      case MatrixMemoryPlan::Pass::values:
        back_to_values(p, plan, begin, end);
        break;
      default:
        all_back(p, plan, begin, end);
    }
    if (plan.stream) fence_streams();
  }

  using Weights = MatrixMemoryWeights<R>;
  static_assert(Weights::kChunk == kChunk);
  static State kept_state(
      const MatrixMemoryBackward& p, const Sequence& s, int64_t chunk, int64_t head,
      int64_t interval) {
    State state;
    state.C = kept(p, const_cast<void*>(p.checkpoints), s, chunk, head, interval);
    state.n = state.C + p.key_size * padded(p.value_size);
    state.m = double(state.n[padded(p.key_size)]);
    return state;
  }

  // The gradients of a chunk: of its queries, which the state at its start goes into; of its keys, values and gates, which
  // the gradient of the state at its end goes into; and of the state at its start.
  struct Gradients {
    const MatrixMemoryBackward& p;
    const MatrixMemoryPlan& plan;
    const int64_t K, keys, key_row, columns, value_row;
    Shared x;
    R *W, *U, *qT, *carried_q, *Z, *Y, *gq, *gk, *v, *vT, *u, *uT, *gv;
    Ahead ahead;
    // The chunk.
    const Sequence* s = nullptr;
    int64_t first = 0, count = 0, n = 0;
    static int64_t size(const MatrixMemoryProblem& p) {
      return Shared::size(p) + 2 * kChunk * kChunk + 6 * kChunk * stride(p.key_size) +
             5 * kChunk * stride(p.value_size) + 256;
    }
    Gradients(const MatrixMemoryBackward& of, const MatrixMemoryPlan& by, Scratch& scratch)
        : p(of),
          plan(by),
          K(p.key_size),
          keys(padded(K)),
          key_row(stride(K)),
          columns(padded(p.value_size)),
          value_row(stride(p.value_size)),
          x(p, scratch),
          W(scratch.take(kChunk * kChunk)),
          U(scratch.take(kChunk * kChunk)) {
      for (R** each : {&qT, &carried_q, &Z, &Y, &gq, &gk}) *each = scratch.take(kChunk * key_row);
      for (R** each : {&v, &vT, &u, &uT, &gv}) *each = scratch.take(kChunk * value_row);
    }

    void at(const Sequence& sequence, int64_t from, int64_t steps) {
      s = &sequence, first = from, count = steps, n = padded(steps);
    }
    void load(int64_t group) { x.load(p, *s, first, count, group); }
    void load_keys(int64_t group) { x.load_keys(p, *s, first, count, group); }
    void load_queries(int64_t group) {
      pack(p.wide_keys, p.q, *s, first, count, group, K, R(p.scale), x.q);
    }
    void turn_queries(int64_t first_key, int64_t rows) {
      turn(x.q + first_key, key_row, n, padded(rows), qT, n);
    }
    void load_values(int64_t head) {
      pack(false, p.v, *s, first, count, head, p.value_size, R(1), v);
      turn(v, value_row, n, columns, vT, n);
    }
    void load_upstream(int64_t head) {
      if (p.grad_h.data)
        pack(p.wide_h, p.grad_h, *s, first, count, head, p.value_size, R(1), u);
      else
        memset(u, 0, size_t(n * value_row) * sizeof(R));
    }
    void divide_upstream(const R* d) {
      if (p.normalizer == Normalizer::none) return;
      for (int64_t t = 0; t < count; ++t) {
        const V by(R(1) / d[t]);
        for (int64_t i = 0; i < columns; i += kLanes)
          M::store(u + t * value_row + i, M::load(u + t * value_row + i) * by);
      }
    }

    // What is read next, while products run: another head of the chunk, or one of another chunk, and with it the queries and
    // keys.
    void fetch_next(int64_t next, int64_t head, bool of_chunk, int64_t group) {
      ahead.clear();
      if (next < 0 || next >= s->steps) return;
      const int64_t row = columns * int64_t(sizeof(R));
      const State before = kept_state(p, *s, next / plan.chunk, head, plan.chunk);
      fetch(false, p.v, *s, next, plan.chunk, head, p.value_size, ahead);
      fetch(p.wide_h, p.grad_h, *s, next, plan.chunk, head, p.value_size, ahead);
      ahead.add({reinterpret_cast<const char*>(before.C), row, row, K});
      if (of_chunk) fetch(p.wide_keys, p.k, *s, next, plan.chunk, group, K, ahead);
      if (of_chunk) fetch(p.wide_keys, p.q, *s, next, plan.chunk, group, K, ahead);
    }

    // From what has been loaded: the divisors, by which the gradients of outputs are divided, the weights, and gq of this
    // head, added up. before: the state at the start.
    void to_queries(const Gates& g, const State& before, Weights& w) {
      R *const P = w.P, *const E = w.E, *const e = w.e;
      // The forward's weights, products and sums.
      alignas(64) R r[kChunk], r_carried[kChunk];
      for (int64_t t = 0; t < kChunk; ++t) r[t] = r_carried[t] = R(0), w.d[t] = R(1);
      scores(g, x.G, n, g.input, count, P, r, W);
      if (p.normalizer != Normalizer::none) {
        dots(x.q, key_row, before.n, keys, count, r_carried);
        for (int64_t t = 0; t < count; ++t) {
          r_carried[t] *= g.carry[t];
          r[t] += r_carried[t];
          w.d[t] = divisor(p, g.least[t], r[t]);
        }
        divide_upstream(w.d);
      }
      w.each =
          !(all_finite(u, count, columns, value_row) && all_finite(x.q, count, keys, key_row) &&
            all_finite(x.k, count, keys, key_row));
      turn(u, value_row, n, columns, uT, n);

      // u v^T, and what u meets of the state at the start.
      Gemm::multiply_lower(count, {{u, value_row, 1}, vT, n, p.value_size}, U, n);
      Gemm::multiply(
          K, n, {{before.C, columns, 1}, uT, n, p.value_size, nullptr, Part::all, &ahead}, Z, n);
      R q_carried[kChunk]; // q . C0 u, as it comes to step t
      for (int64_t t = 0; t < n; t += kLanes) {
        V sum(R(0));
        for (int64_t k = 0; k < K; ++k)
          sum = fused(M::load(qT + k * n + t), M::load(Z + k * n + t), sum);
        M::store(q_carried + t, sum * M::load(g.carry + t));
      }

      // The gradients of r and of the stabiliser; E: of G, but for the weights of its elements.
      for (int64_t t = 0; t < kChunk; ++t) e[t] = R(0), w.of_m[t] = 0;
      for (int64_t t = 0; t < count; ++t) {
        const R u_numerator = dot_up_to(P + t * n, U + t * n, t) + q_carried[t];
        const R slope = divisor_slope(p, g, t, r[t]);
        if (p.exact) {
          e[t] = -slope * u_numerator / w.d[t];
          if (slope == R(0)) e[t] = R(0);
          if (p.normalizer == Normalizer::stabilized)
            w.of_m[t] = -double(u_numerator) * p.eps / double(w.d[t]);
        }
        for (int64_t j = 0; j < n; j += kLanes) {
          const V weighted =
              j > t ? V(R(0))
                    : up_to((M::load(U + t * n + j) + V(e[t])) * M::load(W + t * n + j), t - j);
          M::store(E + t * n + j, weighted);
        }
      }

      // What decays and inputs meet inside the chunk: sums over the rows from t on.
      for (int64_t t = 0; t < kChunk; ++t) w.columns[t] = R(0);
      double carried = 0;
      for (int64_t t = count - 1; t >= 0; --t) {
        V inside(R(0));
        for (int64_t j = 0; j <= t; j += kLanes) {
          const V sum = M::load(w.columns + j) +
                        up_to(M::load(x.G + t * n + j) * M::load(E + t * n + j), t - j);
          M::store(w.columns + j, sum);
          inside = inside + up_to(sum * M::load(g.input + j), t - 1 - j);
        }
        carried += double(q_carried[t]) + double(e[t]) * double(r_carried[t]);
        w.rows[t] = double(sum_of(inside)) + carried;
      }

      for (int64_t t = 0; t < count; ++t)
        for (int64_t j = 0; j <= t; j += kLanes)
          M::store(E + t * n + j, M::load(E + t * n + j) * M::load(g.input + j));
      for (int64_t k = 0; k < K; ++k)
        for (int64_t t = 0; t < n; t += kLanes) {
          const V z = fused(M::load(e + t), V(before.n[k]), M::load(Z + k * n + t));
          M::store(Z + k * n + t, M::load(g.carry + t) * z);
        }
      add_turned(Z, K, n, gq, key_row);
      Gemm::multiply(
          count, keys, {{E, n, 1}, x.k, key_row, count, nullptr, Part::lower, &ahead}, gq, key_row,
          R(1), w.each);
    }

    // What steps meet of the gradient of the state at the end, and that of the state at the start.
    struct End {
      alignas(64) R k[kChunk];
      double through, ended[kChunk + 1]; // before step j
    };
    void meet_end(const Gates& g, const State& before, const State& grad, End& end) {
      Gemm::multiply(
          K, n, {{grad.C, value_row, 1}, vT, n, p.value_size, nullptr, Part::all, &ahead}, Y, n);
      for (int64_t j = 0; j < n; j += kLanes) {
        V sum(R(0));
        for (int64_t k = 0; k < K; ++k) {
          const V y = M::load(Y + k * n + j) + V(grad.n[k]);
          sum = fused(M::load(x.kT + k * n + j), y, sum);
          M::store(Y + k * n + j, y * M::load(g.to_end + j));
        }
        M::store(end.k + j, sum);
      }
      end.through = double(g.decay) *
                    (dot_of_states(p, before.C, grad.C) + double(dot(before.n, grad.n, keys)));
      end.ended[0] = 0;
      for (int64_t j = 0; j < count; ++j)
        end.ended[j + 1] = end.ended[j] + double(g.to_end[j]) * double(end.k[j]);
    }
    // The last C and n are divided by e^m.
    double of_last_m(const End& end) const { return -(end.through + end.ended[count]); }

    // Is the stabiliser of step t that of the step before it?
    static bool decayed(const Gates& g, double m0, int64_t t) {
      return g.log_decay[t] + (t > 0 ? g.m[t - 1] : m0) >= g.log_input[t];
    }
    // The gradients of gates; and m's, from the chunk's end to its start. Nothing is taken from what has been added up, so
    // small gradients of strong decays are as exact as large ones.
    void to_gates(
        const Gates& g, double m0, const Weights& w, const End& end, int64_t head, double& grad_m) {
      for (int64_t t = count - 1; t >= 0; --t) {
        double of_decay = w.rows[t] + end.ended[t] + end.through;
        const double own = double(w.columns[t]) + double(g.end[t]) * double(end.k[t]);
        double of_input = own * double(g.input[t]);
        set_gate(p.grad_input_scale, *s, first + t, head, R(own));
        if (p.normalizer == Normalizer::stabilized) {
          const double of_own = w.of_m[t] + grad_m;
          const bool from_before = decayed(g, m0, t);
          (from_before ? of_decay : of_input) += of_own;
          grad_m = from_before ? of_own : 0;
        }
        set_gate(p.grad_log_decay, *s, first + t, head, R(of_decay));
        set_gate(p.grad_log_input, *s, first + t, head, R(of_input));
      }
    }

    // The gradients of values, and gk of this head, added up. grad: of the state at the end, which has been met.
    void to_values(const Gates& g, const State& grad, const Weights& w, int64_t head) {
      Gemm::multiply(
          count, columns, {{x.k, key_row, 1}, grad.C, value_row, K, g.to_end, Part::all, &ahead},
          {{w.P, 1, n}, u, value_row, count, nullptr, Part::upper}, gv, value_row, kOverwrite<R>,
          w.each);
      unpack(false, gv, p.grad_v, *s, first, count, head, p.value_size, R(1), plan.stream);
      add_turned(Y, K, n, gk, key_row);
      Gemm::multiply(
          count, keys, {{w.E, 1, n}, x.q, key_row, count, nullptr, Part::upper, &ahead}, gk,
          key_row, R(1), w.each);
    }

    // From the gradient of some rows of the state at the end to that at the start; qT: of those rows.
    void to_state(const Gates& g, const R* e, int64_t rows, State& grad) {
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t t = 0; t < n; t += kLanes)
          M::store(carried_q + k * n + t, M::load(g.carry + t) * M::load(qT + k * n + t));
      Gemm::multiply(
          rows, columns, {{carried_q, n, 1}, u, value_row, count, nullptr, Part::all, &ahead},
          grad.C, value_row, g.decay);
      for (int64_t k = 0; k < rows; ++k)
        grad.n[k] = torch_ext::fused(g.decay, grad.n[k], dot(carried_q + k * n, e, n));
    }

    void clear(R* of_keys) { memset(of_keys, 0, size_t(n * key_row) * sizeof(R)); }
    void store(const MatrixMemoryPlan::Item& it, bool of_keys) const {
      store_shared(p, plan, it, *s, first, count, of_keys, of_keys ? gk : gq);
    }
  };

  // Sequences and heads, all steps of them.
  static void all_back(
      const MatrixMemoryBackward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
    const int64_t K = p.key_size, keys = padded(K), columns = padded(p.value_size),
                  value_row = stride(p.value_size), interval = plan.chunk,
                  shares = p.num_heads / p.num_groups, state_size = K * value_row + keys;
    constexpr int64_t kWeights = sizeof(Weights) / sizeof(R);
    Scratch scratch(Gradients::size(p) + kWeights + plan.heads * (state_size + 32) + 256);
    Gradients x(p, plan, scratch);
    Weights& w = *reinterpret_cast<Weights*>(scratch.take(kWeights));
    R* const grads = scratch.take(plan.heads * (state_size + 16)); // of the states
    for (int64_t item = begin; item < end; ++item) {
      const MatrixMemoryPlan::Item it = plan.item(item, p);
      const Sequence s(p, it.sequence);
      const int64_t group = it.head / shares;
      double grad_m[kMatrixMemoryHeads];
      const auto grad_of = [&](int64_t h) {
        return State{grads + h * state_size, grads + h * state_size + K * value_row};
      };
      for (int64_t h = 0; h < it.heads; ++h) {
        State g = grad_of(h);
        load_state(p, p.grad_final_state, it.sequence, it.head + h, g);
        grad_m[h] = g.m;
      }
      const int64_t chunks = (s.steps + interval - 1) / interval;
      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t first = chunk * interval,
                      count = s.steps - first < interval ? s.steps - first : interval;
        x.at(s, first, count);
        x.load(group);
        x.turn_queries(0, K);
        x.clear(x.gq), x.clear(x.gk);
        for (int64_t h = 0; h < it.heads; ++h) {
          const int64_t head = it.head + h;
          State grad = grad_of(h);
          const State before = kept_state(p, s, chunk, head, interval);
          const Gates g(p, s, first, count, head, before.m);
          x.load_values(head);
          x.load_upstream(head);

          const bool last = h == it.heads - 1;
          x.fetch_next(last ? first - interval : first, last ? it.head : head + 1, last, group);
          x.ahead.spread_over(
              2 * Gemm::blocks(K, x.n) + 2 * Gemm::blocks(count, keys) +
              Gemm::blocks(count, columns) + Gemm::blocks(K, columns));

          x.to_queries(g, before, w);
          typename Gradients::End met;
          x.meet_end(g, before, grad, met);
          if (p.normalizer == Normalizer::stabilized && chunk == chunks - 1)
            grad_m[h] += x.of_last_m(met);
          x.to_gates(g, before.m, w, met, head, grad_m[h]);
          x.to_values(g, grad, w, head);
          x.to_state(g, w.e, K, grad);
        }
        x.store(it, false), x.store(it, true);
      }
      for (int64_t h = 0; h < it.heads; ++h) {
        State g = grad_of(h);
        if (s.steps > 0) grad_m[h] += of_first_m(p, s, it.head + h, interval, g);
        g.m = grad_m[h];
        store_state(p, g, p.grad_initial_state, it.sequence, it.head + h);
      }
    }
  }
  // The initial C and n are divided by e^m; grad: of them.
  static double of_first_m(
      const MatrixMemoryBackward& p, const Sequence& s, int64_t head, int64_t interval,
      const State& grad) {
    if (p.normalizer != Normalizer::stabilized) return 0;
    const State before = kept_state(p, s, 0, head, interval);
    return dot_of_states(p, before.C, grad.C) + double(dot(before.n, grad.n, padded(p.key_size)));
  }

  // In three passes, for few heads, of which the first and the last go over all chunks, and the second one over rows of C,
  // which are independent: the same sums.
  static State grad_state(
      const MatrixMemoryBackward& p, const MatrixMemoryPlan& plan, const Sequence& s, int64_t chunk,
      int64_t head) {
    const int64_t place =
        ((chunk - plan.first_chunk) * p.num_sequences + s.index) * p.num_heads + head;
    State state;
    state.C = static_cast<R*>(plan.grad_states) +
              place * matrix_memory_grad_state_size(p.key_size, p.value_size);
    state.n = state.C + p.key_size * stride(p.value_size);
    return state;
  }
  static R* m_of(const MatrixMemoryBackward& p, const State& grad) {
    return grad.n + padded(p.key_size); // a double
  }
  static Weights& weights_of(
      const MatrixMemoryBackward& p, const MatrixMemoryPlan& plan, const Sequence& s, int64_t chunk,
      int64_t head) {
    const int64_t place =
        ((chunk - plan.first_chunk) * p.num_sequences + s.index) * p.num_heads + head;
    return static_cast<Weights*>(plan.weights)[place];
  }
  // body(item, sequence, chunk, first step, steps) of items that are those of `all` and a chunk.
  template <class Body>
  static void for_chunks(
      const MatrixMemoryBackward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end,
      const Body& body) {
    const int64_t chunks = plan.end_chunk - plan.first_chunk;
    for (int64_t i = begin; i < end; ++i) {
      const MatrixMemoryPlan::Item it = plan.item(i / chunks, p);
      const int64_t chunk = plan.first_chunk + i % chunks, first = chunk * plan.chunk,
                    left = p.num_steps - first;
      body(it, Sequence(p, it.sequence), chunk, first, left < plan.chunk ? left : plan.chunk);
    }
  }
  static void back_to_queries(
      const MatrixMemoryBackward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
    const int64_t shares = p.num_heads / p.num_groups;
    Scratch scratch(
        Gradients::size(p) + matrix_memory_grad_state_size(p.key_size, p.value_size) + 64);
    Gradients x(p, plan, scratch);
    for_chunks(
        p, plan, begin, end,
        [&](const MatrixMemoryPlan::Item& it, const Sequence& s, int64_t chunk, int64_t first,
            int64_t count) {
          x.at(s, first, count);
          x.load(it.head / shares);
          x.turn_queries(0, p.key_size);
          x.clear(x.gq);
          for (int64_t head = it.head; head < it.head + it.heads; ++head) {
            const State before = kept_state(p, s, chunk, head, plan.chunk);
            const Gates g(p, s, first, count, head, before.m);
            x.load_values(head);
            x.load_upstream(head);
            const bool last = head == it.head + it.heads - 1;
            x.fetch_next(
                last ? first + plan.chunk : first, last ? it.head : head + 1, last,
                it.head / shares);
            x.ahead.spread_over(Gemm::blocks(p.key_size, x.n) + Gemm::blocks(count, x.keys));
            Weights& w = weights_of(p, plan, s, chunk, head);
            x.to_queries(g, before, w);
            w.of_last_m = 0;
            if (p.normalizer != Normalizer::stabilized || first + count < s.steps) continue;
            R* const C = scratch.data + scratch.used;
            State grad{C, C + p.key_size * stride(p.value_size)};
            load_state(p, p.grad_final_state, s.index, head, grad);
            typename Gradients::End met;
            x.meet_end(g, before, grad, met);
            w.of_last_m = x.of_last_m(met);
          }
          x.store(it, false);
        });
  }
  static void back_to_states(
      const MatrixMemoryBackward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
    const int64_t K = p.key_size, value_row = stride(p.value_size), interval = plan.chunk,
                  shares = p.num_heads / p.num_groups, slices = (K + plan.keys - 1) / plan.keys;
    Scratch scratch(Gradients::size(p) + plan.keys * value_row + padded(plan.keys) + 64);
    Gradients x(p, plan, scratch);
    State grad{scratch.take(plan.keys * value_row), scratch.take(plan.keys)};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / slices % p.num_heads, first_key = item % slices * plan.keys,
                    keys = K - first_key < plan.keys ? K - first_key : plan.keys;
      const Sequence s(p, item / slices / p.num_heads);
      const bool with_m = first_key == 0 && p.normalizer == Normalizer::stabilized;
      if (plan.end_chunk * interval >= s.steps) {
        load_state(p, p.grad_final_state, s.index, head, grad, first_key, keys);
      } else { // where the chunks after these have come to
        const State from = grad_state(p, plan, s, plan.first_chunk, head);
        memcpy(grad.C, from.C + first_key * value_row, size_t(keys * value_row) * sizeof(R));
        memcpy(grad.n, from.n + first_key, size_t(padded(keys)) * sizeof(R));
        if (with_m) memcpy(&grad.m, m_of(p, from), sizeof grad.m);
      }
      const auto keep = [&](int64_t chunk) {
        const State to = grad_state(p, plan, s, chunk, head);
        memcpy(to.C + first_key * value_row, grad.C, size_t(keys * value_row) * sizeof(R));
        memcpy(to.n + first_key, grad.n, size_t(padded(keys)) * sizeof(R));
        if (with_m) memcpy(m_of(p, to), &grad.m, sizeof grad.m);
      };
      for (int64_t chunk = plan.end_chunk - 1; chunk >= plan.first_chunk; --chunk) {
        const int64_t first = chunk * interval,
                      count = s.steps - first < interval ? s.steps - first : interval;
        const Weights& w = weights_of(p, plan, s, chunk, head);
        const double m0 = kept_state(p, s, chunk, head, interval).m;
        const Gates g(p, s, first, count, head, m0);
        if (with_m) grad.m += w.of_last_m;
        keep(chunk + 1);
        x.at(s, first, count);
        x.load_queries(head / shares);
        x.turn_queries(first_key, keys);
        x.load_upstream(head);
        x.divide_upstream(w.d);
        x.ahead.clear();
        fetch(p.wide_h, p.grad_h, s, first - interval, interval, head, p.value_size, x.ahead);
        fetch(p.wide_keys, p.q, s, first - interval, interval, head / shares, K, x.ahead);
        x.ahead.spread_over(Gemm::blocks(keys, x.columns));
        x.to_state(g, w.e, keys, grad);
        for (int64_t t = count - 1; t >= 0 && with_m; --t)
          grad.m = Gradients::decayed(g, m0, t) ? w.of_m[t] + grad.m : 0;
      }
      keep(plan.first_chunk);
      if (plan.first_chunk > 0) continue;
      MatrixState<void*> to = p.grad_initial_state;
      to.m = nullptr; // all rows go into that
      store_state(p, grad, to, s.index, head, first_key, keys);
    }
  }
  static void back_to_values(
      const MatrixMemoryBackward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
    const int64_t shares = p.num_heads / p.num_groups;
    Scratch scratch(Gradients::size(p));
    Gradients x(p, plan, scratch);
    for_chunks(
        p, plan, begin, end,
        [&](const MatrixMemoryPlan::Item& it, const Sequence& s, int64_t chunk, int64_t first,
            int64_t count) {
          const int64_t group = it.head / shares;
          x.at(s, first, count);
          x.load_keys(group);
          x.load_queries(group);
          x.clear(x.gk);
          for (int64_t head = it.head; head < it.head + it.heads; ++head) {
            const State before = kept_state(p, s, chunk, head, plan.chunk),
                        grad = grad_state(p, plan, s, chunk + 1, head);
            const Weights& w = weights_of(p, plan, s, chunk, head);
            const Gates g(p, s, first, count, head, before.m);
            double grad_m = 0;
            if (p.normalizer == Normalizer::stabilized)
              memcpy(&grad_m, m_of(p, grad), sizeof grad_m);
            x.load_values(head);
            x.load_upstream(head);
            x.divide_upstream(w.d);
            const bool last = head == it.head + it.heads - 1;
            const int64_t next = last ? first + plan.chunk : first,
                          next_head = last ? it.head : head + 1;
            x.fetch_next(next, next_head, last, group);
            if (next < s.steps && next / plan.chunk < plan.end_chunk) {
              const int64_t row = x.columns * int64_t(sizeof(R));
              const State next_grad = grad_state(p, plan, s, next / plan.chunk + 1, next_head);
              x.ahead.add(
                  {reinterpret_cast<const char*>(next_grad.C), x.value_row * int64_t(sizeof(R)),
                   row, p.key_size});
            }
            x.ahead.spread_over(
                Gemm::blocks(p.key_size, x.n) + Gemm::blocks(count, x.columns) +
                Gemm::blocks(count, x.keys));
            typename Gradients::End met;
            x.meet_end(g, before, grad, met);
            x.to_gates(g, before.m, w, met, head, grad_m);
            x.to_values(g, grad, w, head);
            if (chunk == 0 && p.grad_initial_state.m) {
              State initial = grad_state(p, plan, s, 0, head);
              initial.m = grad_m + of_first_m(p, s, head, plan.chunk, initial);
              MatrixState<void*> only_m = p.grad_initial_state;
              only_m.C = only_m.n = nullptr;
              store_state(p, initial, only_m, s.index, head);
            }
          }
          x.store(it, true);
        });
  }

  // The gradients of queries and keys: of all heads that share them, or this task's share, added up by reduce().
  static R* share(
      const MatrixMemoryPlan& plan, void* shares, const MatrixMemoryProblem& p, int64_t block,
      int64_t row, int64_t group) {
    return static_cast<R*>(shares) +
           ((block * plan.rows + row) * p.num_groups + group) * padded(p.key_size);
  }
  static void store_shared(
      const MatrixMemoryBackward& p, const MatrixMemoryPlan& plan, const MatrixMemoryPlan::Item& it,
      const Sequence& s, int64_t first, int64_t count, bool of_keys, const R* from) {
    const int64_t group = it.head / (p.num_heads / p.num_groups), keys = padded(p.key_size);
    if (plan.blocks == 1)
      return unpack(
          p.wide_keys, from, of_keys ? p.grad_k : p.grad_q, s, first, count, group, p.key_size,
          R(of_keys ? 1 : p.scale), plan.stream);
    void* const to = of_keys ? plan.shares_of_k : plan.shares_of_q;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = s.row * p.num_steps + s.token(first + t);
      memcpy(
          share(plan, to, p, it.block, row, group), from + t * stride(p.key_size),
          size_t(keys) * sizeof(R));
    }
  }
  // Over rows: tokens of all sequences.
  static void reduce(
      const MatrixMemoryBackward& p, const MatrixMemoryPlan& plan, int64_t begin, int64_t end) {
    const FlushDenormals flush;
    const int64_t keys = padded(p.key_size);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t group = 0; group < p.num_groups; ++group)
        for (int which = 0; which < 2; ++which) {
          void* const shares = which ? plan.shares_of_k : plan.shares_of_q;
          const OverHeads<void*>& to = which ? p.grad_k : p.grad_q;
          R* const sum = share(plan, shares, p, 0, row, group);
          for (int64_t b = 1; b < plan.blocks; ++b) {
            const R* const other = share(plan, shares, p, b, row, group);
            for (int64_t i = 0; i < keys; i += kLanes)
              M::store(sum + i, M::load(sum + i) + M::load(other + i));
          }
          const Sequence whole = all_of(p, row / p.num_steps);
          unpack(
              p.wide_keys, sum, to, whole, row % p.num_steps, 1, group, p.key_size,
              which ? R(1) : R(p.scale));
        }
  }
  // A row of an array, as one sequence in its own order.
  static Sequence all_of(const MatrixMemoryProblem& p, int64_t row) {
    MatrixMemoryProblem q;
    q.num_steps = p.num_steps;
    return Sequence(q, row);
  }

  // The first is a kept one.
  static double dot_of_states(const MatrixMemoryProblem& p, const R* x, const R* y) {
    const int64_t columns = padded(p.value_size), row = stride(p.value_size);
    V sum(R(0));
    for (int64_t k = 0; k < p.key_size; ++k)
      for (int64_t i = 0; i < columns; i += kLanes)
        sum = fused(M::load(x + k * columns + i), M::load(y + k * row + i), sum);
    return double(sum_of(sum));
  }
  // to[t][k] += from[k][t]
  static void add_turned(const R* from, int64_t rows, int64_t n, R* to, int64_t row) {
    for (int64_t k = 0; k < padded(rows); k += kLanes)
      for (int64_t t = 0; t < n; t += kLanes) {
        V x[kLanes];
        for (int i = 0; i < kLanes; ++i)
          x[i] = k + i < rows ? M::load(from + (k + i) * n + t) : V(R(0));
        transpose<R>(x);
        for (int i = 0; i < kLanes; ++i) {
          R* const at = to + (t + i) * row + k;
          M::store(at, M::load(at) + x[i]);
        }
      }
  }
  static R dot_up_to(const R* x, const R* y, int64_t last) {
    V sum(R(0));
    for (int64_t j = 0; j <= last; j += kLanes)
      sum = sum + up_to(M::load(x + j) * M::load(y + j), last - j);
    return sum_of(sum);
  }
};

} // namespace torch_ext::cpu::TORCH_EXT_ISA
