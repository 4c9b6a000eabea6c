// Gated recurrences on the CPU: state <- cell(x, R h, state), one step after the other, forward and backward.
//
// Lanes are units of a head. Per step there is a product of R with all rows, then the cell's arithmetic over the units that
// a thread owns, some at a time where nothing needs all of a head: what the product yields is still in the first caches
// then. So R, packed once per call, is walked through as one stream, and stays in the cache of the core that owns its part.
// Threads either have rows or heads of their own and never wait, or share the units of each head and meet once per step (and
// once more for every sum over the units of a head: layer norms, a second product, a projection).
//
// Each output of a product is one chain of multiply-adds in the order of its inputs, whatever rows and units are computed
// beside it: results do not depend on threads, rows or packing. But for up to 16 tokens in all (a step) nothing is packed:
// then lanes are inputs, and results differ by rounding.
#pragma once
#include "../cells/all.h"
#include "kernels.h"
#include "simd.h"
#include "team.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

// ---- products with a packed matrix ----

// W: how its elements lie; A: what is added up.
template <class A, class W>
struct GatedProduct {
  using V = Vec<A>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kSums = kVectorBytes == 64 ? 24 : 12; // vector registers for sums
  static constexpr bool kPairs =
      sizeof(W) == 2; // two inputs' elements side by side, as one number of 32 bits

  // kRows rows, `in` one of them, times one block: sums to out + row * out_row + gate * out_gate. With kAdd the operands of
  // gate g are at in + g * in_gate, and one sum goes over all gates, input by input. The first `valid` vectors of each gate
  // exist. `inputs` of the block from `first` on; sums go on from what `out` has unless they are the first.
  template <int kGates, int kVectors, int kRows, bool kAdd>
  static void tile(
      const W* block, int64_t first, int64_t inputs, const A* in, int64_t in_row, int64_t in_gate,
      A* out, int64_t out_row, int64_t out_gate, int valid) {
    constexpr int kAll = kGates * kVectors, kHeld = kAdd ? kVectors : kAll;
    V sum[kRows][kHeld];
    const auto each_sum = [&](const auto& f) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          if (v >= valid) break;
#pragma GCC unroll 4
          for (int g = 0; g < kHeld / kVectors; ++g)
            f(sum[r][g * kVectors + v], out + r * out_row + g * out_gate + v * kLanes);
        }
    };
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kHeld; ++v) sum[r][v] = V(A(0));
    if (first > 0)
      each_sum([](V & x, const A* from)
                   __attribute__((always_inline)) { x = Stored<A>::load(from); });
    in += first;
    block += first * kAll * kLanes;
    const auto add = [&](int64_t k, auto weight) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int g = 0; g < (kAdd ? kGates : 1); ++g) {
        const auto operand = [&](int r) __attribute__((always_inline)) {
          return V(in[r * in_row + g * in_gate + k]);
        };
        if constexpr (kRows > kHeld) { // the fewer of both stay in registers
          V w[kHeld];
#pragma GCC unroll 8
          for (int v = 0; v < kHeld; ++v) w[v] = weight(g * kVectors + v);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const V x = operand(r);
#pragma GCC unroll 8
            for (int v = 0; v < kHeld; ++v) sum[r][v] = fused(x, w[v], sum[r][v]);
          }
        } else {
          V x[kRows];
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) x[r] = operand(r);
#pragma GCC unroll 8
          for (int v = 0; v < kHeld; ++v) {
            const V w = weight(g * kVectors + v);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) sum[r][v] = fused(x[r], w, sum[r][v]);
          }
        }
      }
    };
    if constexpr (kPairs) {
      for (int64_t k = 0; k < inputs; k += 2, block += 2 * kAll * kLanes) {
        typename Vec<float>::Int raw[kAll];
        memcpy(raw, block, sizeof raw);
        add(
            k, [&](int v)
                   __attribute__((always_inline)) { return V((typename V::Raw)(raw[v] << 16)); });
        if (k + 1 < inputs)
          add(
              k + 1, [&](int v) __attribute__((always_inline)) {
                return V((typename V::Raw)(raw[v] & int32_t(0xffff0000)));
              });
      }
    } else {
      for (int64_t k = 0; k < inputs; ++k, block += kAll * kLanes)
        add(
            k, [&](int v)
                   __attribute__((always_inline)) { return Stored<A>::load(block + v * kLanes); });
    }
    each_sum([](const V& x, A* to) __attribute__((always_inline)) { Stored<A>::store(to, x); });
  }

  template <int kGates, int kVectors, bool kAdd>
  static void all_rows(
      const W* block, int64_t rows, int64_t inputs, const A* in, int64_t in_row, int64_t in_gate,
      A* out, int64_t out_row, int64_t out_gate, int valid) {
    constexpr int kAll = kGates * kVectors;
    constexpr int kFit = kSums / (kAdd ? kVectors : kAll), kMost = kFit > 6   ? 6
                                                                   : kFit < 1 ? 1
                                                                              : kFit;
    // Of a block as much as the first cache holds besides, for all rows.
    constexpr int64_t kResident = (16 << 10) / (kAll * kLanes * int64_t(sizeof(W))) / 2 * 2;
    const int64_t together = rows > kMost || inputs == 0 ? kResident : inputs;
    for (int64_t first = 0; first == 0 || first < inputs; first += together) {
      const int64_t n = inputs - first < together ? inputs - first : together;
      int64_t r = 0;
      const auto some = [&]<int kRows>() __attribute__((always_inline)) {
        for (; r + kRows <= rows; r += kRows)
          tile<kGates, kVectors, kRows, kAdd>(
              block, first, n, in + r * in_row, in_row, in_gate, out + r * out_row, out_row,
              out_gate, valid);
      };
      some.template operator()<kMost>();
      if constexpr (kMost > 2) some.template operator()<2>();
      if constexpr (kMost > 1) some.template operator()<1>();
    }
  }

  // Block b of all heads' blocks: the first `rows` rows.
  template <bool kAdd>
  static void block(
      const GatedPanel& p, int64_t b, int64_t rows, const A* in, int64_t in_row, int64_t in_gate,
      A* out, int64_t out_row, int64_t out_gate) {
    const W* data = static_cast<const W*>(p.data) + b * p.size;
    const int64_t left = (p.outputs + kLanes - 1) / kLanes - b % p.blocks * p.vectors;
    const int valid = int(left < p.vectors ? left : p.vectors);
    const auto of_gates = [&]<int kGates>() __attribute__((always_inline)) {
      const auto run = [&]<int kVectors>() __attribute__((always_inline)) {
        all_rows<kGates, kVectors, kAdd>(
            data, rows, p.inputs, in, in_row, in_gate, out, out_row, out_gate, valid);
      };
      if (p.vectors == 1) return run.template operator()<1>();
      if (p.vectors == 2) return run.template operator()<2>();
      if constexpr (kAdd || kGates == 1) run.template operator()<4>();
    };
    if (p.gates == 1) return of_gates.template operator()<1>();
    if (p.gates == 2) return of_gates.template operator()<2>();
    if (p.gates == 3) return of_gates.template operator()<3>();
    of_gates.template operator()<4>();
  }
};

template <bool kFirst, class X, class Y>
struct GatedChoose {
  using Type = X;
};
template <class X, class Y>
struct GatedChoose<false, X, Y> {
  using Type = Y;
};

// R (gate, head, outputs, inputs) of W, or with `transposed` (gate, head, inputs, outputs), packed: blocks begin .. end.
template <class W>
struct GatedPacking {
  // What lanes are moved as: one number of W, or two.
  using Number = typename GatedChoose<sizeof(W) == 8, double, float>::Type;
  using V = Vec<Number>;
  static constexpr int kLanes = V::kLanes, kEach = sizeof(W) == 2 ? 2 : 1;

  // n numbers of W, at most a vector; zeros behind them.
  static V some(const W* from, int64_t n) {
    V x(Number(0));
    constexpr int64_t kMost = kEach * kLanes;
    if (n > 0) memcpy(&x.v, from, size_t(n < kMost ? n : kMost) * sizeof(W));
    return x;
  }
  static void pack(
      const GatedPanel& p, const void* matrix, int64_t first_gate, int64_t heads, bool transposed,
      int64_t begin, int64_t end) {
    const W* R = static_cast<const W*>(matrix);
    const int64_t all = p.gates * p.vectors, steps = (p.inputs + kEach - 1) / kEach;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t head = b / p.blocks, unit = b % p.blocks * p.vectors * kLanes;
      W* block = static_cast<W*>(p.data) + b * p.size;
      for (int64_t g = 0; g < p.gates; ++g)
        for (int64_t v = 0; v < p.vectors; ++v) {
          const W* from = R + ((first_gate + g) * heads + head) * p.inputs * p.outputs;
          const int64_t o = unit + v * kLanes, outputs = p.outputs - o;
          const auto to = [&](int64_t k) {
            return block + (k * all + g * p.vectors + v) * kLanes * kEach;
          };
          if (transposed) {
            for (int64_t k = 0; k < steps; ++k) put_row(p, from, k, o, outputs, to(k));
            continue;
          }
          for (int64_t k = 0; k < steps; k += kLanes) {
            V rows[kLanes];
            for (int i = 0; i < kLanes; ++i)
              rows[i] = some(
                  from + (o + i) * p.inputs + k * kEach, i < outputs ? p.inputs - k * kEach : 0);
            transpose<Number>(rows);
            for (int64_t i = 0; i < kLanes && k + i < steps; ++i)
              memcpy(to(k + i), &rows[i].v, sizeof(V));
          }
        }
    }
  }
  // Where the outputs lie side by side.
  static void put_row(
      const GatedPanel& p, const W* from, int64_t k, int64_t o, int64_t outputs, W* to) {
    if constexpr (kEach == 1) {
      const V x = some(from + k * p.outputs + o, outputs);
      memcpy(to, &x.v, sizeof x);
    } else {
      for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < 2; ++j) {
          const bool there = i < outputs && 2 * k + j < p.inputs;
          to[2 * i + j] = there ? from[(2 * k + j) * p.outputs + o + i] : W{};
        }
    }
  }
};

// ---- a run over time ----

// What forward and backward share: the thread's part of the work, and access to arrays by (row, head, vector of units).
template <class Cell, class A>
struct GatedRun {
  using V = Vec<A>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kGates = num_gates<Cell>, kStates = num_states<Cell>,
                       kFromX = num_from_x<Cell>, kFromH = num_from_h<Cell>,
                       kWeights = num_weights<Cell>;
  using Gates = typename Cell::template Gates<V>;
  using State = typename Cell::template State<V>;
  using Weights = typename Cell::template Weights<V>;

  const GatedProblem& p;
  const GatedPlan& plan;
  const Cell cell;
  const DType dtype;
  const int64_t heads, wide, all; // units of a head, padded; of all heads
  int64_t row_begin = 0, row_end = 0, head_begin = 0, head_end = 0;
  int64_t block_begin = 0, block_end = 0;
  int me = 0, members = 1;

  GatedRun(const GatedProblem& problem, const GatedPlan& of, DType data, int64_t begin, int64_t end)
      : p(problem),
        plan(of),
        cell(problem.flags),
        dtype(data),
        heads(problem.num_heads),
        wide(of.kept.width),
        all(problem.num_heads * of.kept.width) {
    row_end = plan.num_rows, head_end = heads;
    if (plan.team) {
      me = plan.team->join(end - begin);
      members = plan.team->size();
    } else if (plan.split_rows) {
      row_begin = begin, row_end = end;
    } else {
      head_begin = begin, head_end = end;
    }
    if (kFromH == 0 && !plan.team) head_begin = 0, head_end = heads;
    block_begin = begin, block_end = end;
  }
  void meet() const {
    if (plan.team) plan.team->meet();
  }

  // The blocks of a panel that are this thread's.
  struct Blocks {
    int64_t begin, end;
  };
  Blocks own(const GatedPanel& panel) const {
    if (kFromH == 0) return {block_begin, block_end};
    const int64_t first = head_begin * panel.blocks, n = (head_end - head_begin) * panel.blocks;
    return {first + n * me / members, first + n * (me + 1) / members};
  }
  // f(head, begin, end) for the units of each head that they cover.
  template <class F>
  void own_units(const GatedPanel& panel, const F& f) const {
    units_of(panel, own(panel), f);
  }
  template <class F>
  static void units_of(const GatedPanel& panel, Blocks b, const F& f) {
    const int64_t step = panel.vectors * kLanes;
    for (int64_t at = b.begin; at < b.end;) {
      const int64_t head = at / panel.blocks,
                    last = b.end < (head + 1) * panel.blocks ? b.end : (head + 1) * panel.blocks;
      const int64_t begin = (at - head * panel.blocks) * step,
                    end = (last - head * panel.blocks) * step;
      f(head, begin, end < panel.outputs ? end : panel.outputs);
      at = last;
    }
  }
  // f(blocks), some of this thread's at a time: what their products yield is still near when the cell wants it.
  template <class F>
  void own_groups(const GatedPanel& panel, const F& f) const {
    const Blocks b = own(panel);
    const int64_t units = panel.vectors * kLanes, together = units < 64 ? 64 / units : 1;
    for (int64_t at = b.begin; at < b.end; at += together)
      f(Blocks{at, at + together < b.end ? at + together : b.end});
  }
  template <bool kAdd>
  void product(
      const GatedPanel& panel, int64_t rows, const A* in, int64_t in_gate, A* out,
      int64_t out_gate) const {
    product<kAdd>(panel, own(panel), rows, in, in_gate, out, out_gate);
  }
  template <bool kAdd>
  void product(
      const GatedPanel& panel, Blocks b, int64_t rows, const A* in, int64_t in_gate, A* out,
      int64_t out_gate) const {
    for (int64_t at = b.begin; at < b.end; ++at) {
      const int64_t head = at / panel.blocks, unit = at % panel.blocks * panel.vectors * kLanes;
      const A* from = in + head * wide;
      A* to = out + head * wide + unit;
      const auto run = [&]<class W>(W) {
        if (!kAdd && panel.given) {
          dot_products<W>(panel, head, unit, rows, from, to, out_gate);
          return;
        }
        GatedProduct<A, W>::template block<kAdd>(
            panel, at, rows, from, plan.scratch_row, in_gate, to, plan.scratch_row, out_gate);
      };
      if constexpr (sizeof(A) == 4) {
        if (panel.packed == DType::bf16) {
          run(BFloat16{});
          continue;
        }
      }
      run(A{});
    }
  }

  // A block of a matrix that is not packed: lanes are inputs.
  template <class W>
  void dot_products(
      const GatedPanel& panel, int64_t head, int64_t unit, int64_t rows, const A* in, A* out,
      int64_t out_gate) const {
    const int64_t left = panel.outputs - unit, inputs = panel.inputs,
                  whole = inputs / kLanes * kLanes,
                  outputs = left < panel.vectors * kLanes ? left : panel.vectors * kLanes;
    for (int64_t g = 0; g < panel.gates; ++g) {
      const W* R = static_cast<const W*>(panel.given) +
                   (((panel.first_gate + g) * heads + head) * panel.outputs + unit) * inputs;
      const auto some_outputs = [&]<int kOutputs>(int64_t o) __attribute__((always_inline)) {
        for (int64_t r = 0; r < rows; ++r) {
          const A* x = in + r * plan.scratch_row;
          const W* weights = R + o * inputs;
          V sum[kOutputs];
#pragma GCC unroll 4
          for (int i = 0; i < kOutputs; ++i) sum[i] = V(A(0));
          for (int64_t k = 0; k < whole; k += kLanes) {
            const V of_x = get(x + k);
#pragma GCC unroll 4
            for (int i = 0; i < kOutputs; ++i)
              sum[i] = fused(of_x, Stored<W>::load(weights + i * inputs + k), sum[i]);
          }
          if (whole < inputs) {
            const int n = int(inputs - whole);
            const V of_x = load_some<A>(x + whole, n);
            for (int i = 0; i < kOutputs; ++i)
              sum[i] = fused(of_x, load_some<W>(weights + i * inputs + whole, n), sum[i]);
          }
          for (int i = 0; i < kOutputs; ++i)
            out[r * plan.scratch_row + g * out_gate + o + i] = lanes_sum(sum[i]);
        }
      };
      int64_t o = 0;
      for (; o + 4 <= outputs; o += 4) some_outputs.template operator()<4>(o);
      for (; o < outputs; ++o) some_outputs.template operator()<1>(o);
      for (; o % kLanes != 0; ++o) // zeros beyond the last unit, as a packed matrix yields
        for (int64_t r = 0; r < rows; ++r) out[r * plan.scratch_row + g * out_gate + o] = A(0);
    }
  }

  A* scratch() const { return static_cast<A*>(plan.scratch) + row_begin * plan.scratch_row; }

  // A step of a row.
  struct Place {
    int64_t row = 0;                // of scratch memory, from row_begin on
    int64_t sequence = 0, time = 0; // of arrays over time
    int64_t token = 0;              // of what is kept
    int64_t state = 0;              // the row of states
    bool last = false;
    bool reset_before = false,
         reset_after = false; // is the state before this step, or the next one, replaced?
  };
  Place place(int64_t row, int64_t t, int64_t head) const {
    const GatedPlan::Row& r = plan.rows[row];
    const auto token = [&](int64_t step) {
      return r.first + (p.reverse ? r.length - 1 - step : step);
    };
    const auto resets = [&](int64_t step) {
      if (!p.reset || step >= r.length) return false;
      const int64_t at = token(step);
      return p.reset
          [(p.cu_seqlens ? at * p.reset_time
                         : r.sequence * p.reset_sequence + (at - r.first) * p.reset_time) +
           head * p.reset_head];
    };
    const int64_t at = token(t);
    return {
        row - row_begin,
        p.cu_seqlens ? 0 : r.sequence,
        p.cu_seqlens ? at : at - r.first,
        at,
        r.state,
        t + 1 == r.length,
        resets(t),
        resets(t + 1)};
  }
  // How many of this thread's rows are longer than t. They are sorted.
  int64_t longer_than(int64_t t) const {
    int64_t n = row_end - row_begin;
    while (n > 0 && plan.rows[row_begin + n - 1].length <= t) --n;
    return n;
  }

  static int some(int64_t unit, int64_t width) {
    return width - unit < kLanes ? int(width - unit) : kLanes;
  }
  template <class S>
  static V read(const void* data, int64_t at, int64_t stride, int n) {
    const S* from = static_cast<const S*>(data) + at;
    if (stride == 1) return n == kLanes ? Stored<S>::load(from) : load_some<S>(from, n);
    S each[kLanes] = {};
    for (int i = 0; i < n; ++i) each[i] = from[i * stride];
    return Stored<S>::load(each);
  }
  template <class S>
  static void write(void* data, int64_t at, int64_t stride, V x, int n) {
    S* to = static_cast<S*>(data) + at;
    if (stride == 1) {
      if (n == kLanes)
        Stored<S>::store(to, x);
      else
        store_some<S>(to, x, n);
      return;
    }
    S each[kLanes];
    Stored<S>::store(each, x);
    for (int i = 0; i < n; ++i) to[i * stride] = each[i];
  }
  V read_over_time(
      const OverUnits<const void*>& x, const Place& at, int64_t gate, int64_t head, int64_t unit,
      int n) const {
    const int64_t from =
        at.sequence * x.sequence + at.time * x.time + gate * x.gate + head * x.head + unit * x.unit;
    if constexpr (sizeof(A) == 8) {
      return read<double>(x.data, from, x.unit, n);
    } else {
      switch (dtype) {
        case DType::bf16:
          return read<BFloat16>(x.data, from, x.unit, n);
        case DType::f16:
          return read<Half>(x.data, from, x.unit, n);
        default:
          return read<float>(x.data, from, x.unit, n);
      }
    }
  }
  V read_update(
      const OverUnits<const void*>& x, const Place& at, int64_t head, int64_t unit, int n) const {
    const int64_t from =
        at.sequence * x.sequence + at.time * x.time + head * x.head + unit * x.unit;
    return read<A>(x.data, from, x.unit, n);
  }
  void write_over_time(
      const OverUnits<void*>& x, const Place& at, int64_t gate, int64_t head, int64_t unit, V value,
      int n) const {
    const int64_t to =
        at.sequence * x.sequence + at.time * x.time + gate * x.gate + head * x.head + unit * x.unit;
    if constexpr (sizeof(A) == 8) {
      write<double>(x.data, to, x.unit, value, n);
    } else {
      switch (dtype) {
        case DType::bf16:
          return write<BFloat16>(x.data, to, x.unit, value, n);
        case DType::f16:
          return write<Half>(x.data, to, x.unit, value, n);
        default:
          return write<float>(x.data, to, x.unit, value, n);
      }
    }
  }
  static V read_state(
      const UnitState<const void*>& s, int64_t row, int64_t head, int64_t unit, int n) {
    return s.data ? read<A>(s.data, row * s.row + head * s.head + unit * s.unit, s.unit, n)
                  : V(A(0));
  }
  static void write_state(
      const UnitState<void*>& s, int64_t row, int64_t head, int64_t unit, V x, int n) {
    if (s.data) write<A>(s.data, row * s.row + head * s.head + unit * s.unit, s.unit, x, n);
  }
  // Of a parameter (which, head, width).
  V parameter(const void* data, int64_t which, int64_t head, int64_t unit, int n) const {
    return read<A>(data, (which * heads + head) * p.width + unit, 1, n);
  }
  Weights weights(int64_t head, int64_t unit, int n) const {
    V w[kWeights + 1];
    for (int i = 0; i < kWeights; ++i)
      w[i] = p.weights ? parameter(p.weights, i, head, unit, n) : V(A(0));
    return to_fields<Cell::template Weights, V>(w);
  }
  A* kept(const Place& at, int64_t part, int64_t head, int64_t unit) const {
    A* data = static_cast<A*>(kept_data());
    return data + at.token * plan.kept.size + (part * heads + head) * wide + unit;
  }
  void* kept_data_ = nullptr;
  void* kept_data() const { return kept_data_; }

  TORCH_EXT_HD static V get(const A* from) { return Stored<A>::load(from); }
  TORCH_EXT_HD static void set(A* to, V x) { Stored<A>::store(to, x); }
  // Nothing but cell and products, and units side by side: most calls, which have loops of their own. They do what the
  // others do, in the same order.
  bool plain(const OverUnits<const void*>& beside, int64_t unit) const {
    return !p.mask.data && !p.h_update.data && !p.c_update.data && !p.norm_weight &&
           !p.cell_norm_weight && !p.projection && !p.reset && p.x.unit == 1 && unit == 1 &&
           (!beside.data || beside.unit == 1) && dtype != DType::f16;
  }
  // f(S()) for the dtype S of arrays over time.
  template <class F>
  void with_dtype(const F& f) const {
    if constexpr (sizeof(A) == 4) {
      if (dtype == DType::bf16) return f(BFloat16{});
    }
    f(A{});
  }
  template <class S, class Data>
  static S* at_units(const OverUnits<Data>& x, const Place& here, int64_t head) {
    return static_cast<S*>(x.data) + here.sequence * x.sequence + here.time * x.time +
           head * x.head;
  }

  // 1 in the first n lanes, else 0.
  static V there(int n) {
    static constexpr struct Table {
      A number[2 * kLanes];
      constexpr Table() : number() {
        for (int i = 0; i < kLanes; ++i) number[i] = 1;
      }
    } kTable;
    return get(kTable.number + kLanes - n);
  }

  // Mean and 1 / standard deviation of `gates` times the units of a head, at from + gate * gate_step + unit. Lanes are added
  // up last: the order is that of units and gates.
  struct Moments {
    A mean, scale;
  };
  static A lanes_sum(V x) {
    A sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += x.v[i];
    return sum;
  }
  template <class F>
  static A sum_over(int gates, int64_t width, const F& value) {
    V sum(A(0));
    for (int g = 0; g < gates; ++g)
      for (int64_t unit = 0; unit < width; unit += kLanes) {
        const int n = some(unit, width);
        const V x = value(g, unit);
        sum = sum + (n == kLanes ? x : x * there(n));
      }
    return lanes_sum(sum);
  }
  Moments moments(const A* from, int64_t gate_step, int gates) const {
    const A count = A(gates) * A(p.width);
    const A mean =
        sum_over(
            gates, p.width, [&](int g, int64_t unit) { return get(from + g * gate_step + unit); }) /
        count;
    const A variance = sum_over(
                           gates, p.width,
                           [&](int g, int64_t unit) {
                             const V d = get(from + g * gate_step + unit) - V(mean);
                             return d * d;
                           }) /
                       count;
    const A x = variance + A(p.norm_eps);
    return {
        mean,
        A(1) / (sizeof(A) == 8 ? A(__builtin_sqrt(double(x))) : A(__builtin_sqrtf(float(x))))};
  }
};

// How a row's scratch memory is cut up, in numbers.
template <class Cell>
struct GatedForwardScratch {
  int64_t operand, state, products, second, seen, unprojected, size;
  GatedForwardScratch(const GatedProblem& p, const GatedPlan& plan) {
    const int64_t all = p.num_heads * plan.kept.width;
    int64_t at = 0;
    const auto take = [&](int64_t parts) {
      const int64_t here = at;
      at += parts * all;
      return here;
    };
    operand = take(2);
    state = take(num_states<Cell>);
    products = take(num_from_h<Cell>);
    second = take(Cell::two_products);
    seen = take(p.cell_norm_weight ? num_states<Cell> : 0);
    unprojected = take(p.projection ? 2 : 0);
    size = at + 16; // so that rows do not lie a power of two apart
  }
};

template <class Cell, class A>
struct GatedForwardRun : GatedRun<Cell, A> {
  using Run = GatedRun<Cell, A>;
  using Run::all, Run::cell, Run::get, Run::heads, Run::kFromH, Run::kFromX, Run::kGates,
      Run::kLanes, Run::kStates, Run::plan, Run::set, Run::some, Run::wide;
  using typename Run::Blocks;
  using typename Run::Gates;
  using typename Run::Moments;
  using typename Run::Place;
  using typename Run::State;
  using typename Run::V;
  using typename Run::Weights;
  const GatedForward& p;
  const GatedForwardScratch<Cell> at;

  GatedForwardRun(
      const GatedForward& problem, const GatedPlan& of, DType dtype, int64_t begin, int64_t end)
      : Run(problem, of, dtype, begin, end), p(problem), at(problem, of) {
    this->kept_data_ = problem.kept;
  }

  A* row(int64_t r, int64_t part, int64_t head, int64_t unit) const {
    return this->scratch() + r * plan.scratch_row + part + head * wide + unit;
  }
  const GatedPanel& of_h() const { return p.projection ? plan.projection : plan.first; }

  void run() {
    if (this->me < 0) return;
    begin_rows();
    this->meet();
    const int64_t steps = this->row_end > this->row_begin ? plan.rows[this->row_begin].length : 0;
    const bool is_plain = this->plain({}, p.h.unit);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t rows = this->longer_than(t), operand = at.operand + (t & 1) * all;
      A* base = this->scratch();
      if (is_plain && !Cell::two_products) {
        this->own_groups(plan.first, [&](Blocks blocks) {
          if (plan.first.data)
            this->template product<false>(
                plan.first, blocks, rows, base + operand, 0, base + at.products, all);
          this->with_dtype([&]<class S>(S) { plain_cells<S>(blocks, t, rows); });
        });
        this->meet();
        continue;
      }
      if (plan.first.data)
        this->template product<false>(plan.first, rows, base + operand, 0, base + at.products, all);
      if constexpr (Cell::two_products) {
        second_operands(t, rows, operand);
        this->meet();
        this->template product<false>(
            plan.second, rows, base + at.second, 0, base + at.products + (kFromH - 1) * all, all);
      }
      if (p.norm_weight) this->meet();
      if (p.cell_norm_weight) {
        cells<true, false>(t, rows);
        this->meet();
        cells<false, true>(t, rows);
      } else if (is_plain) {
        this->with_dtype([&]<class S>(S) { plain_cells<S>(this->own(plan.first), t, rows); });
      } else {
        cells<true, true>(t, rows);
      }
      if (p.projection) {
        this->meet();
        this->template product<false>(
            plan.projection, rows, base + at.unprojected, 0, base + at.unprojected + all, all);
        outputs(t, rows);
      }
      this->meet();
    }
  }

  // States before the first step, and all of rows without one.
  void begin_rows() {
    const auto load = [&](int first, int last, int64_t width) {
      return [=, this](int64_t head, int64_t begin, int64_t end) {
        for (int64_t r = this->row_begin; r < this->row_end; ++r) {
          const GatedPlan::Row& row_of = plan.rows[r];
          const bool empty = row_of.length == 0;
          Place here;
          if (!empty) here = this->place(r, 0, head);
          here.row = r - this->row_begin;
          for (int64_t unit = begin; unit < end; unit += kLanes) {
            const int n = some(unit, width);
            for (int s = first; s < last; ++s) {
              V x = this->read_state(p.initial_state[s], row_of.state, head, unit, n);
              if (empty) this->write_state(p.final_state[s], row_of.state, head, unit, x, n);
              if (here.reset_before) x = V(A(0));
              set(row(here.row, at.state + s * all, head, unit), x);
              if (s == 0)
                set(row(here.row, at.operand, head, unit),
                    masked(row_of.sequence, x, head, unit, n));
            }
          }
        }
      };
    };
    this->own_units(of_h(), load(0, 1, p.h_width));
    this->own_units(plan.first, load(1, kStates, p.width));
  }
  V masked(int64_t sequence, V h, int64_t head, int64_t unit, int n) const {
    return p.mask.data ? h * this->read_state(p.mask, sequence, head, unit, n) : h;
  }

  // R h + bias of gate i of from_h, normalised.
  V from_h(int64_t r, int i, int64_t head, int64_t unit, int n, Moments m) const {
    V a = get(row(r, at.products + i * all, head, unit));
    if (p.norm_weight)
      a = (a - V(m.mean)) * V(m.scale) * this->parameter(p.norm_weight, i, head, unit, n);
    return p.bias ? a + this->parameter(p.bias, i, head, unit, n) : a;
  }
  Gates gates(const Place& here, int64_t head, int64_t unit, int n, Moments m, int products) const {
    V g[kGates];
    for (int i = 0; i < kGates; ++i) g[i] = V(A(0));
    for (int i = 0; i < kFromX; ++i)
      g[Cell::from_x[i]] = this->read_over_time(p.x, here, i, head, unit, n);
    for (int i = 0; i < products; ++i) {
      V& gate = g[Cell::from_h[i]];
      gate = gate + from_h(here.row, i, head, unit, n, m);
    }
    return to_fields<Cell::template Gates, V>(g);
  }
  void second_operands(int64_t t, int64_t rows, int64_t operand) {
    if constexpr (Cell::two_products)
      this->own_units(plan.first, [&](int64_t head, int64_t begin, int64_t end) {
        for (int64_t r = 0; r < rows; ++r) {
          const Place here = this->place(this->row_begin + r, t, head);
          for (int64_t unit = begin; unit < end; unit += kLanes) {
            const int n = some(unit, p.width);
            const Gates g = gates(here, head, unit, n, {}, kFromH - 1);
            set(row(r, at.second, head, unit), cell.operand(g, get(row(r, operand, head, unit))));
          }
        }
      });
  }

  State before(int64_t r, int64_t head, int64_t unit) const {
    V s[kStates];
    for (int i = 0; i < kStates; ++i) s[i] = get(row(r, at.state + i * all, head, unit));
    return to_fields<Cell::template State, V>(s);
  }

  // kUpdate: all of the state but h; kOutput: h and what goes out. Both at once where nothing stands between them.
  template <bool kUpdate, bool kOutput>
  void cells(int64_t t, int64_t rows) {
    this->own_units(plan.first, [&](int64_t head, int64_t begin, int64_t end) {
      for (int64_t r = 0; r < rows; ++r) {
        const Place here = this->place(this->row_begin + r, t, head);
        Moments m{}, of_cell{};
        if (p.norm_weight) m = this->moments(row(r, at.products, head, 0), all, kFromH);
        if (kOutput && !kUpdate) of_cell = this->moments(row(r, at.seen + all, head, 0), all, 1);
        for (int64_t unit = begin; unit < end; unit += kLanes)
          one<kUpdate, kOutput>(here, t, head, unit, m, of_cell);
      }
    });
  }
  template <class S>
  void plain_cells(Blocks blocks, int64_t t, int64_t rows) {
    this->units_of(plan.first, blocks, [&](int64_t head, int64_t begin, int64_t end) {
      const int64_t whole = begin + (end - begin) / kLanes * kLanes;
      for (int64_t r = 0; r < rows; ++r) {
        const Place here = this->place(this->row_begin + r, t, head);
        const S* x = Run::template at_units<const S>(p.x, here, head);
        S* y = Run::template at_units<S>(p.h, here, head);
        const A *products = row(r, at.products, head, 0),
                *bias = static_cast<const A*>(p.bias) + (p.bias ? head * p.width : 0),
                *operand = row(r, at.operand + (t & 1) * all, head, 0);
        A *state = row(r, at.state, head, 0), *next = row(r, at.operand + (~t & 1) * all, head, 0),
          *kept = p.kept ? this->kept(here, 0, head, 0) : nullptr;
        for (int64_t unit = begin; unit < whole; unit += kLanes) {
          V g[kGates], old[kStates], parts[kStates];
          for (int i = 0; i < kGates; ++i) g[i] = V(A(0));
          for (int i = 0; i < kFromX; ++i)
            g[Cell::from_x[i]] = Stored<S>::load(x + i * p.x.gate + unit);
          for (int i = 0; i < kFromH; ++i) {
            V a = get(products + i * all + unit);
            if (bias) a = a + get(bias + i * heads * p.width + unit);
            V& gate = g[Cell::from_h[i]];
            gate = gate + a;
          }
          for (int i = 0; i < kStates; ++i) old[i] = get(state + i * all + unit);
          const Gates of_gates = to_fields<Cell::template Gates, V>(g);
          const State s = to_fields<Cell::template State, V>(old);
          const Weights w = this->weights(head, unit, kLanes);
          const State after = cell.update(of_gates, s, w);
          to_array<Cell::template State, V>(after, parts);
          const V h = cell.output(
              of_gates, s, after, kFromH == 0 ? get(operand + unit) : parts[kStates > 1 ? 1 : 0],
              w);
          parts[0] = h;
          if (kept) {
            for (int i = 0; i < kGates; ++i) set(kept + i * all + unit, g[i]);
            for (int i = 0; i < kStates; ++i)
              set(kept + (plan.kept.states + i) * all + unit, old[i]);
          }
          Stored<S>::store(y + unit, h);
          set(next + unit, h);
          for (int i = 0; i < kStates; ++i) {
            set(state + i * all + unit, parts[i]);
            if (here.last)
              this->write_state(p.final_state[i], here.state, head, unit, parts[i], kLanes);
          }
        }
        if (whole < end) one<true, true>(here, t, head, whole, {}, {});
      }
    });
  }
  template <bool kUpdate, bool kOutput>
  TORCH_EXT_HD void one(
      const Place& here, int64_t t, int64_t head, int64_t unit, Moments m, Moments of_cell) {
    const int n = some(unit, p.width);
    const int64_t r = here.row;
    const Gates g = gates(here, head, unit, n, m, kFromH);
    const State s = before(r, head, unit);
    const Weights w = this->weights(head, unit, n);
    State after;
    if constexpr (kUpdate)
      after = cell.update(g, s, w);
    else
      after = stored_after(r, head, unit);
    V parts[kStates];
    to_array<Cell::template State, V>(after, parts);
    if constexpr (kUpdate && !kOutput) {
      for (int i = 1; i < kStates; ++i) set(row(r, at.seen + i * all, head, unit), parts[i]);
      return;
    }
    V seen = kStates > 1 ? parts[kStates > 1 ? 1 : 0] : s.h;
    if constexpr (kFromH == 0) seen = get(row(r, at.operand + (t & 1) * all, head, unit));
    if constexpr (!kUpdate)
      seen = (seen - V(of_cell.mean)) * V(of_cell.scale) *
                 this->parameter(p.cell_norm_weight, 0, head, unit, n) +
             (p.cell_norm_bias ? this->parameter(p.cell_norm_bias, 0, head, unit, n) : V(A(0)));
    const V h = cell.output(g, s, after, seen, w);
    V old[kStates];
    to_array<Cell::template State, V>(s, old);
    if (p.kept) keep(here, head, unit, n, g, old, parts);
    for (int i = 1; i < kStates; ++i) {
      V x = parts[i];
      if (i == 1 && p.c_update.data) x = mixed(p.c_update, here, head, unit, x, old[1], n);
      if (here.last) this->write_state(p.final_state[i], here.state, head, unit, x, n);
      set(row(r, at.state + i * all, head, unit), here.reset_after ? V(A(0)) : x);
    }
    if (p.projection) {
      set(row(r, at.unprojected, head, unit), h);
      if (p.kept) set(this->kept(here, plan.kept.unprojected, head, unit), h);
    } else {
      output(here, t, head, unit, h);
    }
  }
  State stored_after(int64_t r, int64_t head, int64_t unit) const {
    V s[kStates];
    s[0] = V(A(0));
    for (int i = 1; i < kStates; ++i) s[i] = get(row(r, at.seen + i * all, head, unit));
    return to_fields<Cell::template State, V>(s);
  }
  void keep(
      const Place& here, int64_t head, int64_t unit, int n, const Gates& g, const V* old,
      const V* after) {
    V gate[kGates];
    to_array<Cell::template Gates, V>(g, gate);
    for (int i = 0; i < kGates; ++i) set(this->kept(here, i, head, unit), gate[i]);
    for (int i = 1; i < kStates; ++i)
      set(this->kept(here, plan.kept.states + i, head, unit), old[i]);
    if (p.norm_weight)
      for (int i = 0; i < kFromH; ++i)
        set(this->kept(here, plan.kept.products + i, head, unit),
            get(row(here.row, at.products + i * all, head, unit)) * this->there(n));
    if (p.cell_norm_weight)
      set(this->kept(here, plan.kept.after, head, unit), after[1] * this->there(n));
  }
  // update * x + (1 - update) * old
  V mixed(
      const OverUnits<const void*>& update, const Place& here, int64_t head, int64_t unit, V x,
      V old, int n) const {
    const V u = this->read_update(update, here, head, unit, n);
    return fused(u, x, (1 - u) * old);
  }
  // h as it comes out of the cell or the projection.
  void output(const Place& here, int64_t t, int64_t head, int64_t unit, V h) {
    const int n = some(unit, p.h_width);
    const int64_t r = here.row;
    const V old = get(row(r, at.state, head, unit));
    if (p.kept) set(this->kept(here, plan.kept.states, head, unit), old);
    if (p.h_update.data) h = mixed(p.h_update, here, head, unit, h, old, n);
    this->write_over_time(p.h, here, 0, head, unit, h, n);
    if (here.last) this->write_state(p.final_state[0], here.state, head, unit, h, n);
    const V next = here.reset_after ? V(A(0)) : h;
    set(row(r, at.state, head, unit), next);
    set(row(r, at.operand + (~t & 1) * all, head, unit),
        masked(plan.rows[this->row_begin + r].sequence, next, head, unit, n));
  }
  void outputs(int64_t t, int64_t rows) {
    this->own_units(plan.projection, [&](int64_t head, int64_t begin, int64_t end) {
      for (int64_t r = 0; r < rows; ++r) {
        const Place here = this->place(this->row_begin + r, t, head);
        for (int64_t unit = begin; unit < end; unit += kLanes)
          output(here, t, head, unit, get(row(r, at.unprojected + all, head, unit)));
      }
    });
  }
};

template <class Cell>
struct GatedBackwardScratch {
  int64_t grad_a, recurrent, state, beside, through_norm, of_h, through_cell_norm, unprojected;
  int64_t bias, weights, norm_weight, cell_norm_weight, cell_norm_bias, size;
  GatedBackwardScratch(const GatedBackward& p, const GatedPlan& plan) {
    const int64_t all = p.num_heads * plan.kept.width;
    int64_t at = 0;
    const auto take = [&](int64_t parts) {
      const int64_t here = at;
      at += parts * all;
      return here;
    };
    constexpr int kFromH = num_from_h<Cell>;
    grad_a = take(2 * kFromH);
    recurrent = take(1); // of h, through the product
    state =
        take(num_states<Cell>); // of the state after the step at hand, but for what comes through R
    beside = take(1); // of h, through the operand of the second product, or IndRNN's own weight
    through_norm = take(p.norm_weight ? kFromH : 0);
    of_h = take(p.projection ? 2 : 0); // of what the projection yields; of what it sees
    through_cell_norm = take(p.cell_norm_weight ? 1 : 0);
    unprojected = of_h + all;
    bias = take(p.grad_bias ? kFromH : 0);
    weights = take(p.grad_weights ? num_weights<Cell> : 0);
    norm_weight = take(p.grad_norm_weight ? kFromH : 0);
    cell_norm_weight = take(p.grad_cell_norm_weight ? 1 : 0);
    cell_norm_bias = take(p.grad_cell_norm_bias ? 1 : 0);
    size = at + 16;
  }
};

// Against time. What a token's step depended on is kept, so steps need nothing of their neighbours but gradients.
template <class Cell, class A>
struct GatedBackwardRun : GatedRun<Cell, A> {
  using Run = GatedRun<Cell, A>;
  using Run::all, Run::cell, Run::get, Run::heads, Run::kFromH, Run::kFromX, Run::kGates,
      Run::kLanes, Run::kStates, Run::kWeights, Run::plan, Run::set, Run::some, Run::wide;
  using typename Run::Blocks;
  using typename Run::Gates;
  using typename Run::Moments;
  using typename Run::Place;
  using typename Run::State;
  using typename Run::V;
  using typename Run::Weights;
  const GatedBackward& p;
  const GatedBackwardScratch<Cell> at;

  GatedBackwardRun(
      const GatedBackward& problem, const GatedPlan& of, DType dtype, int64_t begin, int64_t end)
      : Run(problem, of, dtype, begin, end), p(problem), at(problem, of) {
    this->kept_data_ = const_cast<void*>(problem.kept);
  }
  A* row(int64_t r, int64_t part, int64_t head, int64_t unit) const {
    return this->scratch() + r * plan.scratch_row + part + head * wide + unit;
  }
  // Units of the cell; of h, which without a projection are the same and the same thread's.
  const GatedPanel& of_cell() const { return p.projection ? plan.projection : plan.first; }
  static constexpr int kFirst = kFromH - Cell::two_products; // gates of the first product

  void run() {
    if (this->me < 0) return;
    begin_rows();
    const int64_t steps = this->row_end > this->row_begin ? plan.rows[this->row_begin].length : 0;
    A* base = this->scratch();
    const bool is_plain = this->plain(p.grad_h, p.grad_x.unit) && !p.clips && !p.grad_weights;
    this->meet();
    for (int64_t t = steps - 1; t >= -1; --t) {
      const int64_t rows = this->longer_than(t), further = this->longer_than(t + 1);
      const int64_t of_next = at.grad_a + ((t + 1) & 1) * kFromH * all,
                    of_this = at.grad_a + (t & 1) * kFromH * all;
      const auto through_first = [&](Blocks blocks) {
        if (plan.first.data && further)
          this->template product<true>(
              plan.first, blocks, further, base + of_next, all, base + at.recurrent, 0);
      };
      if (is_plain && t >= 0) {
        this->own_groups(plan.first, [&](Blocks blocks) {
          through_first(blocks);
          this->with_dtype([&]<class S>(S) { plain_cells<S>(blocks, rows, t, of_this); });
        });
      } else {
        through_first(this->own(plan.first));
      }
      if (t < 0) break;
      if (p.projection) {
        each(
            plan.first, rows, t, p.h_width,
            [&](const Place& here, int64_t head, int64_t unit, int n) {
              const V d = of_output(here, head, unit, n);
              set(row(here.row, at.of_h, head, unit), d);
              put(p.grad_projected, p.h_width, here, 0, 1, head, unit, d, n);
            });
        this->meet();
        this->template product<true>(
            plan.projection, rows, base + at.of_h, 0, base + at.unprojected, 0);
      }
      if (p.cell_norm_weight) {
        each(
            of_cell(), rows, t, p.width, [&](const Place& here, int64_t head, int64_t unit, int n) {
              through_cell_norm(here, head, unit, n);
            });
        this->meet();
      }
      if (!is_plain) cells(rows, t, of_this);
      if constexpr (Cell::two_products) {
        this->meet();
        this->template product<true>(
            plan.second, rows, base + of_this + kFirst * all, all, base + at.beside, 0);
        each(
            plan.first, rows, t, p.width,
            [&](const Place& here, int64_t head, int64_t unit, int n) {
              through_operand(here, head, unit, n, of_this);
            });
      }
      if (p.norm_weight) {
        this->meet();
        through_norm(rows, t, of_this);
      }
      this->meet();
    }
    end_rows();
  }

  // f(place, head, unit, lanes) for this thread's units of the rows at step t.
  template <class F>
  void each(const GatedPanel& panel, int64_t rows, int64_t t, int64_t width, const F& f) {
    this->own_units(panel, [&](int64_t head, int64_t begin, int64_t end) {
      for (int64_t r = 0; r < rows; ++r) {
        const Place here = this->place(this->row_begin + r, t, head);
        for (int64_t unit = begin; unit < end; unit += kLanes)
          f(here, head, unit, some(unit, width));
      }
    });
  }

  void begin_rows() {
    const auto load = [&](int first, int last, int64_t width) {
      return [=, this](int64_t head, int64_t begin, int64_t end) {
        for (int64_t r = 0; r < this->row_end - this->row_begin; ++r) {
          const GatedPlan::Row& of = plan.rows[this->row_begin + r];
          for (int64_t unit = begin; unit < end; unit += kLanes) {
            const int n = some(unit, width);
            V d[kStates];
            for (int i = 0; i < kStates; ++i) d[i] = V(A(0));
            for (int i = first; i < last; ++i)
              d[i] = this->read_state(p.grad_final_state[i], of.state, head, unit, n);
            if constexpr (requires { Cell::enter(State{}, State{}); }) {
              if (first > 0 && of.length > 0) {
                const Place end_of = this->place(this->row_begin + r, of.length - 1, head);
                to_array<Cell::template State, V>(
                    Cell::enter(
                        before(end_of, head, unit, n, {}).after,
                        to_fields<Cell::template State, V>(d)),
                    d);
              }
            }
            for (int i = first; i < last; ++i) {
              set(row(r, at.state + i * all, head, unit), d[i]);
              if (of.length == 0)
                this->write_state(p.grad_initial_state[i], of.state, head, unit, d[i], n);
            }
            if (first == 0) set(row(r, at.beside, head, unit), V(A(0)));
          }
        }
      };
    };
    for (int64_t r = 0; r < this->row_end - this->row_begin; ++r)
      this->own_units(of_cell(), [&](int64_t head, int64_t begin, int64_t end) {
        for (int64_t part = at.bias; part + all <= at.size; part += all)
          for (int64_t unit = begin; unit < end; unit += kLanes)
            set(row(r, part, head, unit), V(A(0)));
      });
    this->own_units(plan.first, load(0, 1, p.h_width));
    this->own_units(of_cell(), load(1, kStates, p.width));
  }

  // The gradient of h after the step, of all that saw it.
  V of_h(const Place& here, int64_t head, int64_t unit, int n) const {
    const A* direct = row(here.row, at.state, head, unit);
    V d = here.reset_after ? V(A(0)) : get(direct);
    if (!here.last && !here.reset_after) d = d + through_R(here.row, head, unit, n);
    return d;
  }
  V through_R(int64_t r, int64_t head, int64_t unit, int n) const {
    V d = V(A(0));
    if (plan.first.data) d = get(row(r, at.recurrent, head, unit));
    if (Cell::two_products || kFromH == 0) d = d + get(row(r, at.beside, head, unit));
    if (p.mask.data)
      d = d * this->read_state(p.mask, plan.rows[this->row_begin + r].sequence, head, unit, n);
    return p.clips ? at_least(at_most(d, p.clip), -p.clip) : d;
  }
  // Of what the cell or the projection yields; what goes past them stays for the step before.
  V of_output(const Place& here, int64_t head, int64_t unit, int n) {
    V d = of_h(here, head, unit, n), past = V(A(0));
    if (p.grad_h.data) d = d + this->read_over_time(p.grad_h, here, 0, head, unit, n);
    if (p.h_update.data) {
      const V u = this->read_update(p.h_update, here, head, unit, n);
      past = (1 - u) * d;
      d = u * d;
    }
    set(row(here.row, at.state, head, unit), past);
    return d;
  }
  // A number per token and unit, where it is wanted.
  void put(
      void* data, int64_t width, const Place& here, int64_t which, int64_t count, int64_t head,
      int64_t unit, V x, int n) const {
    if (data)
      this->template write<A>(
          data, ((here.token * count + which) * heads + head) * width + unit, 1, x, n);
  }

  struct Before {
    Gates g;
    State s;
    Weights w;
    State after;
    V seen;
  };
  Before before(const Place& here, int64_t head, int64_t unit, int n, Moments m) const {
    V gate[kGates], s[kStates], after[kStates];
    for (int i = 0; i < kGates; ++i) gate[i] = get(this->kept(here, i, head, unit));
    for (int i = 0; i < kStates; ++i)
      s[i] = get(this->kept(here, plan.kept.states + i, head, unit));
    Before b;
    b.g = to_fields<Cell::template Gates, V>(gate);
    b.s = to_fields<Cell::template State, V>(s);
    b.w = this->weights(head, unit, n);
    b.after = cell.update(b.g, b.s, b.w);
    to_array<Cell::template State, V>(b.after, after);
    b.seen = after[kStates > 1 ? 1 : 0];
    if constexpr (kFromH == 0) {
      b.seen = s[0];
      if (p.mask.data)
        b.seen =
            b.seen *
            this->read_state(p.mask, plan.rows[this->row_begin + here.row].sequence, head, unit, n);
    }
    if (p.cell_norm_weight)
      b.seen = normal(b.seen, m) * this->parameter(p.cell_norm_weight, 0, head, unit, n) +
               (p.cell_norm_bias ? this->parameter(p.cell_norm_bias, 0, head, unit, n) : V(A(0)));
    return b;
  }
  static V normal(V x, Moments m) { return (x - V(m.mean)) * V(m.scale); }
  Moments moments_of_cell(const Place& here, int64_t head) const {
    return this->moments(this->kept(here, plan.kept.after, head, 0), 0, 1);
  }
  // The gradient of the cell's h, which is read once.
  V of_cell_output(const Place& here, int64_t head, int64_t unit, int n) {
    return p.projection ? get(row(here.row, at.unprojected, head, unit))
                        : of_output(here, head, unit, n);
  }

  // The gradient of the normalised state, for the sums that its norm's gradient needs; the one of h stays where it is read
  // again.
  void through_cell_norm(const Place& here, int64_t head, int64_t unit, int n) {
    const Moments m = moments_of_cell(here, head);
    const Before b = before(here, head, unit, n, m);
    const V dh = of_cell_output(here, head, unit, n);
    if (!p.projection) set(row(here.row, at.recurrent, head, unit), dh);
    const V d = cell.output_vjp(b.g, b.s, b.after, b.seen, b.w, dh).seen * this->there(n);
    set(row(here.row, at.through_cell_norm, head, unit), d);
  }
  V back_through_cell_norm(
      const Place& here, int64_t head, int64_t unit, int n, Moments m, A mean, A mean_normal) {
    const V d = get(row(here.row, at.through_cell_norm, head, unit)),
            x = normal(get(this->kept(here, plan.kept.after, head, unit)), m);
    accumulate(p.grad_cell_norm_weight, row(here.row, at.cell_norm_weight, head, unit), d * x);
    accumulate(p.grad_cell_norm_bias, row(here.row, at.cell_norm_bias, head, unit), d);
    const V w = this->parameter(p.cell_norm_weight, 0, head, unit, n);
    return V(m.scale) * (d * w - V(mean) - x * V(mean_normal));
  }
  static void accumulate(const void* wanted, A* sum, V x) {
    if (wanted) set(sum, get(sum) + x);
  }

  template <class S>
  void plain_cells(Blocks blocks, int64_t rows, int64_t t, int64_t of_this) {
    this->units_of(plan.first, blocks, [&](int64_t head, int64_t begin, int64_t end) {
      const int64_t whole = begin + (end - begin) / kLanes * kLanes;
      for (int64_t r = 0; r < rows; ++r) {
        const Place here = this->place(this->row_begin + r, t, head);
        const S* grad_h =
            p.grad_h.data ? Run::template at_units<const S>(p.grad_h, here, head) : nullptr;
        S* grad_x = Run::template at_units<S>(p.grad_x, here, head);
        const A *kept = this->kept(here, 0, head, 0), *recurrent = row(r, at.recurrent, head, 0);
        A *state = row(r, at.state, head, 0), *beside = row(r, at.beside, head, 0),
          *products = row(r, of_this, head, 0),
          *bias = p.grad_bias ? row(r, at.bias, head, 0) : nullptr,
          *grad_a = p.grad_a
                        ? static_cast<A*>(p.grad_a) + (here.token * kFromH * heads + head) * p.width
                        : nullptr;
        for (int64_t unit = begin; unit < whole; unit += kLanes) {
          V dh = get(state + unit);
          if (!here.last) {
            V d = V(A(0));
            if (plan.first.data) d = get(recurrent + unit);
            if (Cell::two_products || kFromH == 0) d = d + get(beside + unit);
            dh = dh + d;
          }
          if (grad_h) dh = dh + Stored<S>::load(grad_h + unit);
          V g[kGates], old[kStates], now[kStates];
          for (int i = 0; i < kGates; ++i) g[i] = get(kept + i * all + unit);
          for (int i = 0; i < kStates; ++i)
            old[i] = get(kept + (plan.kept.states + i) * all + unit);
          const Gates gates = to_fields<Cell::template Gates, V>(g);
          const State s = to_fields<Cell::template State, V>(old);
          const Weights w = this->weights(head, unit, kLanes);
          const State update = cell.update(gates, s, w);
          to_array<Cell::template State, V>(update, now);
          const V seen = kFromH == 0 ? old[0] : now[kStates > 1 ? 1 : 0];
          const OutputGradient<Cell, V> o = cell.output_vjp(gates, s, update, seen, w, dh);
          V after[kStates], gate[kGates], of_update[kGates], d_before[kStates], u_before[kStates];
          to_array<Cell::template State, V>(o.after, after);
          after[0] = V(A(0));
          for (int i = 1; i < kStates; ++i) after[i] = after[i] + get(state + i * all + unit);
          if constexpr (kStates > 1) after[1] = after[1] + o.seen;
          if constexpr (kFromH == 0) set(beside + unit, o.seen);
          const UpdateGradient<Cell, V> u =
              cell.update_vjp(gates, s, update, w, to_fields<Cell::template State, V>(after));
          to_array<Cell::template Gates, V>(o.gates, gate);
          to_array<Cell::template Gates, V>(u.gates, of_update);
          to_array<Cell::template State, V>(o.before, d_before);
          to_array<Cell::template State, V>(u.before, u_before);
          for (int i = 0; i < kGates; ++i) gate[i] = gate[i] + of_update[i];
          for (int i = 0; i < kStates; ++i) set(state + i * all + unit, d_before[i] + u_before[i]);
          for (int i = 0; i < kFromX; ++i)
            Stored<S>::store(grad_x + i * p.grad_x.gate + unit, gate[Cell::from_x[i]]);
          for (int i = 0; i < kFromH; ++i) {
            const V d = gate[Cell::from_h[i]];
            if (bias) set(bias + i * all + unit, get(bias + i * all + unit) + d);
            set(products + i * all + unit, d);
            if (grad_a) set(grad_a + i * heads * p.width + unit, d);
          }
        }
        if (whole < end) one(here, head, whole, {}, 0, 0, of_this);
      }
    });
  }
  void cells(int64_t rows, int64_t t, int64_t of_this) {
    this->own_units(of_cell(), [&](int64_t head, int64_t begin, int64_t end) {
      for (int64_t r = 0; r < rows; ++r) {
        const Place here = this->place(this->row_begin + r, t, head);
        Moments m{};
        A mean = 0, mean_normal = 0;
        if (p.cell_norm_weight) {
          m = moments_of_cell(here, head);
          const A* d = row(r, at.through_cell_norm, head, 0);
          const auto scaled = [&](int64_t unit) {
            return get(d + unit) *
                   this->parameter(p.cell_norm_weight, 0, head, unit, some(unit, p.width));
          };
          mean = this->sum_over(1, p.width, [&](int, int64_t unit) { return scaled(unit); }) /
                 A(p.width);
          mean_normal = this->sum_over(1, p.width, [&](int, int64_t unit) {
            return scaled(unit) * normal(get(this->kept(here, plan.kept.after, head, unit)), m);
          }) / A(p.width);
        }
        for (int64_t unit = begin; unit < end; unit += kLanes)
          one(here, head, unit, m, mean, mean_normal, of_this);
      }
    });
  }
  TORCH_EXT_HD void one(
      const Place& here, int64_t head, int64_t unit, Moments m, A mean, A mean_normal,
      int64_t of_this) {
    const int n = some(unit, p.width);
    const int64_t r = here.row;
    const Before b = before(here, head, unit, n, m);
    const V dh = p.cell_norm_weight && !p.projection ? get(row(r, at.recurrent, head, unit))
                                                     : of_cell_output(here, head, unit, n);
    const OutputGradient<Cell, V> o = cell.output_vjp(b.g, b.s, b.after, b.seen, b.w, dh);
    V after[kStates], past[kStates], d_before[kStates], u_before[kStates];
    to_array<Cell::template State, V>(o.after, after);
    after[0] = V(A(0));
    for (int i = 1; i < kStates; ++i) {
      V d = here.reset_after ? V(A(0)) : get(row(r, at.state + i * all, head, unit));
      past[i] = V(A(0));
      if (i == 1 && p.c_update.data) {
        const V u = this->read_update(p.c_update, here, head, unit, n);
        past[i] = (1 - u) * d;
        d = u * d;
      }
      after[i] = after[i] + d;
    }
    if constexpr (kStates > 1)
      after[1] = after[1] + (p.cell_norm_weight
                                 ? back_through_cell_norm(here, head, unit, n, m, mean, mean_normal)
                                 : o.seen);
    if constexpr (kFromH == 0) set(row(r, at.beside, head, unit), o.seen);
    const UpdateGradient<Cell, V> u =
        cell.update_vjp(b.g, b.s, b.after, b.w, to_fields<Cell::template State, V>(after));
    V gate[kGates], of_update[kGates];
    to_array<Cell::template Gates, V>(o.gates, gate);
    to_array<Cell::template Gates, V>(u.gates, of_update);
    for (int i = 0; i < kGates; ++i) gate[i] = gate[i] + of_update[i];
    to_array<Cell::template State, V>(o.before, d_before);
    to_array<Cell::template State, V>(u.before, u_before);
    if (!p.projection) { // else the cell does not see h; what went past it lies there already
      A* to = row(r, at.state, head, unit);
      set(to, get(to) + (d_before[0] + u_before[0]));
    }
    for (int i = 1; i < kStates; ++i)
      set(row(r, at.state + i * all, head, unit), d_before[i] + u_before[i] + past[i]);
    if constexpr (kWeights > 0) {
      if (p.grad_weights) {
        V x[kWeights], y[kWeights];
        to_array<Cell::template Weights, V>(o.weights, x);
        to_array<Cell::template Weights, V>(u.weights, y);
        for (int i = 0; i < kWeights; ++i)
          accumulate(p.grad_weights, row(r, at.weights + i * all, head, unit), x[i] + y[i]);
      }
    }
    for (int i = 0; i < kFromX; ++i)
      this->write_over_time(p.grad_x, here, i, head, unit, gate[Cell::from_x[i]], n);
    for (int i = 0; i < kFromH; ++i) {
      const V d = gate[Cell::from_h[i]] * this->there(n);
      accumulate(p.grad_bias, row(r, at.bias + i * all, head, unit), d);
      if (p.norm_weight) { // the products' gradients are made when the sums are known
        set(row(r, at.through_norm + i * all, head, unit), d);
      } else {
        set(row(r, of_this + i * all, head, unit), d);
        put(p.grad_a, p.width, here, i, kFromH, head, unit, d, n);
      }
    }
  }

  // Of the second product's operand: the gates in it get their share, and so does h.
  void through_operand(const Place& here, int64_t head, int64_t unit, int n, int64_t of_this) {
    if constexpr (Cell::two_products) {
      V gate[kGates];
      for (int i = 0; i < kGates; ++i) gate[i] = get(this->kept(here, i, head, unit));
      const Gates g = to_fields<Cell::template Gates, V>(gate);
      V h = get(this->kept(here, plan.kept.states, head, unit));
      if (p.mask.data)
        h = h *
            this->read_state(p.mask, plan.rows[this->row_begin + here.row].sequence, head, unit, n);
      put(p.operand, p.h_width, here, 0, 1, head, unit, cell.operand(g, h), n);
      const auto d = cell.operand_vjp(g, h, get(row(here.row, at.beside, head, unit)));
      set(row(here.row, at.beside, head, unit), d.h);
      const V of_r = d.r * this->there(n); // r is the first of all
      A* to = row(here.row, of_this, head, unit);
      set(to, get(to) + of_r);
      accumulate(p.grad_bias, row(here.row, at.bias, head, unit), of_r);
      put(p.grad_a, p.width, here, 0, kFromH, head, unit, get(to), n);
      this->write_over_time(p.grad_x, here, 0, head, unit, get(to), n);
    }
  }

  void through_norm(int64_t rows, int64_t t, int64_t of_this) {
    this->own_units(of_cell(), [&](int64_t head, int64_t begin, int64_t end) {
      for (int64_t r = 0; r < rows; ++r) {
        const Place here = this->place(this->row_begin + r, t, head);
        const A* a = this->kept(here, plan.kept.products, head, 0);
        const Moments m = this->moments(a, all, kFromH);
        const auto scaled = [&](int g, int64_t unit) {
          return get(row(r, at.through_norm + g * all, head, unit)) *
                 this->parameter(p.norm_weight, g, head, unit, some(unit, p.width));
        };
        const A count = A(kFromH) * A(p.width);
        const A mean = this->sum_over(kFromH, p.width, scaled) / count,
                mean_normal = this->sum_over(kFromH, p.width, [&](int g, int64_t unit) {
                  return scaled(g, unit) * normal(get(a + g * all + unit), m);
                }) / count;
        for (int64_t unit = begin; unit < end; unit += kLanes) {
          const int n = some(unit, p.width);
          for (int g = 0; g < kFromH; ++g) {
            const V x = normal(get(a + g * all + unit), m);
            const V d =
                V(m.scale) * (scaled(g, unit) - V(mean) - x * V(mean_normal)) * this->there(n);
            accumulate(
                p.grad_norm_weight, row(r, at.norm_weight + g * all, head, unit),
                get(row(r, at.through_norm + g * all, head, unit)) * x);
            set(row(r, of_this + g * all, head, unit), d);
            put(p.grad_a, p.width, here, g, kFromH, head, unit, d, n);
          }
        }
      }
    });
  }

  void end_rows() {
    const auto states = [&](int first, int last, int64_t width) {
      return [=, this](int64_t head, int64_t begin, int64_t end) {
        for (int64_t r = 0; r < this->row_end - this->row_begin; ++r) {
          const GatedPlan::Row& of = plan.rows[this->row_begin + r];
          if (of.length == 0) continue;
          const bool reset = this->place(this->row_begin + r, 0, head).reset_before;
          for (int64_t unit = begin; unit < end; unit += kLanes) {
            const int n = some(unit, width);
            V d[kStates], s[kStates];
            for (int i = 0; i < kStates; ++i) s[i] = d[i] = V(A(0));
            for (int i = first; i < last; ++i) {
              s[i] = this->read_state(p.initial_state[i], of.state, head, unit, n);
              d[i] = reset ? V(A(0)) : get(row(r, at.state + i * all, head, unit));
            }
            if (first == 0 && !reset) d[0] = d[0] + through_R(r, head, unit, n);
            if constexpr (requires { Cell::leave(State{}, State{}); }) {
              if (first > 0 && !reset)
                to_array<Cell::template State, V>(
                    Cell::leave(
                        to_fields<Cell::template State, V>(s),
                        to_fields<Cell::template State, V>(d)),
                    d);
            }
            for (int i = first; i < last; ++i)
              this->write_state(p.grad_initial_state[i], of.state, head, unit, d[i], n);
          }
        }
      };
    };
    this->own_units(plan.first, states(0, 1, p.h_width));
    this->own_units(of_cell(), states(1, kStates, p.width));
    shares(p.grad_bias, at.bias, kFromH);
    shares(p.grad_weights, at.weights, kWeights);
    shares(p.grad_norm_weight, at.norm_weight, kFromH);
    shares(p.grad_cell_norm_weight, at.cell_norm_weight, 1);
    shares(p.grad_cell_norm_bias, at.cell_norm_bias, 1);
  }
  void shares(void* to, int64_t from, int parts) {
    if (!to) return;
    this->own_units(of_cell(), [&](int64_t head, int64_t begin, int64_t end) {
      for (int64_t r = 0; r < this->row_end - this->row_begin; ++r) {
        const int64_t sequence = plan.rows[this->row_begin + r].sequence;
        for (int i = 0; i < parts; ++i)
          for (int64_t unit = begin; unit < end; unit += kLanes)
            this->template write<A>(
                to, ((sequence * parts + i) * heads + head) * p.width + unit, 1,
                get(row(r, from + i * all, head, unit)), some(unit, p.width));
      }
    });
  }
};

} // namespace torch_ext::cpu::TORCH_EXT_ISA
