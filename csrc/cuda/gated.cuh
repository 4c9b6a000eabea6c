// Gated recurrences on a GPU, for heads that a block holds whole: state <- cell(x, R h, state), forward and backward.
//
// A block has one head of kGatedRows sequences and walks through time with one barrier per step. A thread has one unit, and
// of R's inputs every other chunk of 16 bytes: the products of all gates with the h of all rows, which lies in shared memory
// twice, for this step and the next. Of its weights it keeps kHeld per gate in registers, from the first step to the last;
// what is beyond comes from memory in every step. Neighbouring lanes, which have the same unit and the other chunks, then
// exchange their sums so that each has all gates of one row: the cell, the state and the sums of the parameters' gradients
// of a unit and a row are in the registers of one thread and never leave them.
//
// The backward walks against time with the gates' pre-activations and the states before each step, which the forward has
// kept: what is sequential in it is the gradient of h alone, a product with the transpose of R of the same shape. R's own
// gradient is a product over all tokens, afterwards and elsewhere.
//
// Sums are added in an order that follows from shapes alone.
#pragma once
#include "../cells/all.h"
#include "../core/gated_problem.h"
#include "device.cuh"

namespace torch_ext::cuda {

inline constexpr int kGatedThreads = 256;
inline constexpr int kGatedRows = 2; // of a block; as many lanes have a unit together
inline constexpr int kGatedUnits = kGatedThreads / kGatedRows;
static_assert(kGatedRows == 2, "sums are exchanged between two lanes");

// The arrays' dtype: a branch that is the same for all threads, and one load or store of many instructions.
template <class A>
TORCH_EXT_DEVICE A gated_load(const void* data, int64_t at, DType dtype) {
  if constexpr (sizeof(A) == 8)
    return load_global(static_cast<const double*>(data) + at);
  else {
    if (dtype == DType::bf16) return to_float(load_global(static_cast<const BFloat16*>(data) + at));
    if (dtype == DType::f16) return to_float(load_global(static_cast<const Half*>(data) + at));
    return load_global(static_cast<const float*>(data) + at);
  }
}
template <class A>
TORCH_EXT_DEVICE void gated_store(void* data, int64_t at, A x, DType dtype) {
  if constexpr (sizeof(A) == 8)
    store_global(static_cast<double*>(data) + at, x);
  else {
    if (dtype == DType::bf16)
      store_global(static_cast<BFloat16*>(data) + at, to_bfloat16(x));
    else if (dtype == DType::f16)
      store_global(static_cast<Half*>(data) + at, to_half(x));
    else
      store_global(static_cast<float*>(data) + at, x);
  }
}

// What forward and backward share. kHeld: weights per gate in registers.
template <class Cell, class A, int kHeld>
struct GatedBlock {
  static constexpr int kGates = num_gates<Cell>, kStates = num_states<Cell>,
                       kFromX = num_from_x<Cell>, kFromH = num_from_h<Cell>,
                       kWeights = num_weights<Cell>;
  static constexpr int kFirst = kFromH - Cell::two_products; // gates of the first product
  static constexpr int kChunk = 16 / int(sizeof(A));
  static constexpr int kHeldChunks = kHeld / kChunk;
  using Chunk = SideBySide<A>;
  using Gates = typename Cell::template Gates<A>;
  using State = typename Cell::template State<A>;
  using Weights = typename Cell::template Weights<A>;

  const GatedProblem& p;
  const DType dtype;
  const Cell cell;
  int head, unit;
  int slice;  // which chunks, and the row of which the thread has the cell
  bool there; // such a unit and such a row
  int padded; // units, in whole chunks for every lane
  int64_t first = 0, length = 0, sequence = 0, state_row = 0; // of the row
  int64_t steps = 0;                                          // of the block's longest row

  TORCH_EXT_DEVICE GatedBlock(const GatedProblem& problem, DType data, const int64_t* state_rows)
      : p(problem), dtype(data), cell(problem.flags) {
    const int tiles = kFromH ? 1 : int((p.width + kGatedUnits - 1) / kGatedUnits),
              parts = int(p.num_heads) * tiles, part = int(blockIdx.x) % parts,
              group = int(blockIdx.x) / parts;
    head = part / tiles;
    unit = part % tiles * kGatedUnits + int(threadIdx.x) / kGatedRows;
    slice = int(threadIdx.x) % kGatedRows;
    padded = padded_of(p.width);
    for (int r = 0; r < kGatedRows; ++r) {
      const int64_t s = int64_t(group) * kGatedRows + r;
      if (s >= p.num_sequences) break;
      const int64_t row = state_rows ? load_global(state_rows + s) : s;
      const int64_t begin = p.cu_seqlens ? load_global(p.cu_seqlens + s) : s * p.num_steps,
                    n = p.cu_seqlens ? load_global(p.cu_seqlens + s + 1) - begin : p.num_steps;
      if (row < 0) continue;
      if (n > steps) steps = n;
      if (r == slice) sequence = s, first = begin, length = n, state_row = row, exists = true;
    }
    there = exists && unit < p.width;
  }
  bool exists = false;

  TORCH_EXT_HOST_DEVICE static int padded_of(int64_t width) {
    constexpr int kWhole = kChunk * kGatedRows;
    return int((width + kWhole - 1) / kWhole) * kWhole;
  }
  // Shared memory: `vectors` of each row, padded, twice.
  TORCH_EXT_DEVICE Shared<A> row(int buffer, int vector, int vectors, int r) const {
    return shared_memory<A>() + ((buffer * vectors + vector) * kGatedRows + r) * padded;
  }

  // ---- a step of the thread's row ----

  struct Place {
    int64_t sequence, time, token;
  };
  TORCH_EXT_DEVICE Place place(int64_t t) const {
    const int64_t at = first + (p.reverse ? length - 1 - t : t);
    return {p.cu_seqlens ? 0 : sequence, p.cu_seqlens ? at : at - first, at};
  }
  TORCH_EXT_DEVICE bool resets(int64_t t) const {
    if (!p.reset || t >= length) return false;
    const Place at = place(t);
    return load_global(
        p.reset + at.sequence * p.reset_sequence + at.time * p.reset_time + head * p.reset_head);
  }
  template <class Data>
  TORCH_EXT_DEVICE int64_t at_unit(const OverUnits<Data>& x, Place at, int64_t gate) const {
    return at.sequence * x.sequence + at.time * x.time + gate * x.gate + head * x.head +
           unit * x.unit;
  }
  TORCH_EXT_DEVICE A update_of(const OverUnits<const void*>& x, Place at) const {
    return load_global(static_cast<const A*>(x.data) + at_unit(x, at, 0));
  }
  TORCH_EXT_DEVICE A read_state(const UnitState<const void*>& s, int64_t row) const {
    return s.data ? load_global(
                        static_cast<const A*>(s.data) + row * s.row + head * s.head + unit * s.unit)
                  : A(0);
  }
  TORCH_EXT_DEVICE void write_state(const UnitState<void*>& s, A x) const {
    if (s.data)
      store_global(static_cast<A*>(s.data) + state_row * s.row + head * s.head + unit * s.unit, x);
  }
  TORCH_EXT_DEVICE A masked(A h) const {
    return p.mask.data ? h * read_state(p.mask, sequence) : h;
  }
  TORCH_EXT_DEVICE A parameter(const void* data, int64_t which) const {
    return load_global(static_cast<const A*>(data) + (which * p.num_heads + head) * p.width + unit);
  }
  TORCH_EXT_DEVICE Weights weights() const {
    A w[kWeights + 1];
    for (int i = 0; i < kWeights; ++i) w[i] = p.weights && there ? parameter(p.weights, i) : A(0);
    return to_fields<Cell::template Weights, A>(w);
  }
  TORCH_EXT_DEVICE int64_t kept_at(const GatedKept& kept, int64_t token, int64_t part) const {
    return token * kept.size + (part * p.num_heads + head) * kept.width + unit;
  }

  // ---- products ----

  // R of gate g, output o, input i; 0 beyond the head.
  TORCH_EXT_DEVICE A weight(int g, int o, int i) const {
    if (o >= p.width || i >= p.width) return A(0);
    const int64_t at = ((g * p.num_heads + head) * p.width + o) * p.width + i;
    if constexpr (sizeof(A) == 4) {
      if (p.R_dtype == DType::bf16)
        return to_float(load_global(static_cast<const BFloat16*>(p.R) + at));
    }
    return load_global(static_cast<const A*>(p.R) + at);
  }
  // The thread's inputs: chunk c of them.
  TORCH_EXT_DEVICE int input(int c) const { return (c * kGatedRows + slice) * kChunk; }

  struct Held {
    A w[kFromH ? kFromH : 1][kHeld ? kHeld : 1];
  };
  template <bool kTransposed>
  TORCH_EXT_DEVICE void hold(Held& held) const {
#pragma unroll
    for (int g = 0; g < kFromH; ++g)
#pragma unroll
      for (int c = 0; c < kHeldChunks; ++c)
#pragma unroll
        for (int e = 0; e < kChunk; ++e)
          held.w[g][c * kChunk + e] =
              kTransposed ? weight(g, input(c) + e, unit) : weight(g, unit, input(c) + e);
  }
  // sum[g - kBegin][r] += the weights of gate g times row r of `vector(g)`, for gates kBegin .. kEnd.
  template <bool kTransposed, int kBegin, int kEnd, int kSums, class Vector>
  TORCH_EXT_DEVICE void multiply(
      const Held& held, A (&sum)[kSums][kGatedRows], const Vector& vector) const {
    const int chunks = padded / (kChunk * kGatedRows);
    const auto add = [&](int c, const auto& weight_of) {
#pragma unroll
      for (int g = kBegin; g < kEnd; ++g) {
#pragma unroll
        for (int r = 0; r < kGatedRows; ++r) {
          const Chunk x = (vector(g, r) + input(c)).template view<Chunk>().load(0);
#pragma unroll
          for (int e = 0; e < kChunk; ++e) {
            A& to = sum[kSums == 1 ? 0 : g - kBegin][r];
            to = fused(weight_of(g, e), x.widen(e), to);
          }
        }
      }
    };
#pragma unroll
    for (int c = 0; c < kHeldChunks; ++c)
      if (c < chunks) add(c, [&](int g, int e) { return held.w[g][c * kChunk + e]; });
    for (int c = kHeldChunks; c < chunks; ++c)
      add(c, [&](int g, int e) {
        return kTransposed ? weight(g, input(c) + e, unit) : weight(g, unit, input(c) + e);
      });
  }
  // Of both lanes' sums the one of the thread's row.
  TORCH_EXT_DEVICE A exchanged(const A (&sum)[kGatedRows]) const {
    const A mine = slice ? sum[1] : sum[0], theirs = slice ? sum[0] : sum[1];
    return mine + shuffle_xor(~0u, theirs, 1);
  }
};

template <class Cell, class A, int kHeld>
__global__ void __launch_bounds__(kGatedThreads)
    gated_forward_kernel(GatedForward p, DType dtype, GatedKept layout) {
  using Block = GatedBlock<Cell, A, kHeld>;
  constexpr int kGates = Block::kGates, kStates = Block::kStates, kFromX = Block::kFromX,
                kFromH = Block::kFromH, kFirst = Block::kFirst;
  constexpr auto x_gate = Cell::from_x;
  constexpr auto h_gate = Cell::from_h;
  // Of each row: h of this step and the next, and with two products the second one's operand.
  constexpr int kVectors = 1;
  const Block b(p, dtype, p.state_rows);
  const int operand_buffer = 2;
  typename Block::Held held;
  if constexpr (kFromH > 0) b.template hold<false>(held);
  const typename Block::Weights w = b.weights();
  A bias[kFromH ? kFromH : 1], state[kStates];
#pragma unroll
  for (int i = 0; i < kFromH; ++i)
    bias[i] = p.bias && b.unit < p.width ? b.parameter(p.bias, i) : A(0);
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    state[i] = b.there ? b.read_state(p.initial_state[i], b.state_row) : A(0);
    if (b.there && b.length == 0) b.write_state(p.final_state[i], state[i]);
  }
  const auto shown = [&](int64_t t, A h) { // to the products of step t
    if constexpr (kFromH > 0)
      if (b.unit < b.padded)
        b.row(int(t & 1), 0, kVectors, b.slice).store(b.unit, b.there ? b.masked(h) : A(0));
  };
  if (b.there && b.resets(0))
#pragma unroll
    for (int i = 0; i < kStates; ++i) state[i] = A(0);
  shown(0, state[0]);
  if constexpr (kFromH > 0) block_sync();

  for (int64_t t = 0; t < b.steps; ++t) {
    const bool live = b.there && t < b.length;
    const typename Block::Place at = b.place(t);
    A gate[kGates];
#pragma unroll
    for (int i = 0; i < kGates; ++i) gate[i] = A(0);
    if (live)
#pragma unroll
      for (int i = 0; i < kFromX; ++i)
        gate[x_gate[i]] = gated_load<A>(p.x.data, b.at_unit(p.x, at, i), dtype);
    if constexpr (kFirst > 0) {
      A sum[kFirst][kGatedRows];
#pragma unroll
      for (int i = 0; i < kFirst; ++i)
#pragma unroll
        for (int r = 0; r < kGatedRows; ++r) sum[i][r] = A(0);
      b.template multiply<false, 0, kFirst>(
          held, sum, [&](int, int r) { return b.row(int(t & 1), 0, kVectors, r); });
#pragma unroll
      for (int i = 0; i < kFirst; ++i) {
        A& to = gate[h_gate[i]];
        to = to + (b.exchanged(sum[i]) + bias[i]);
      }
    }
    if constexpr (Cell::two_products) {
      const A h = b.there ? b.masked(state[0]) : A(0);
      if (b.unit < b.padded)
        b.row(operand_buffer, 0, kVectors, b.slice)
            .store(
                b.unit, live ? b.cell.operand(to_fields<Cell::template Gates, A>(gate), h) : A(0));
      block_sync();
      A sum[1][kGatedRows];
#pragma unroll
      for (int r = 0; r < kGatedRows; ++r) sum[0][r] = A(0);
      b.template multiply<false, kFirst, kFromH>(
          held, sum, [&](int, int r) { return b.row(operand_buffer, 0, kVectors, r); });
      A& to = gate[h_gate[kFirst]];
      to = to + (b.exchanged(sum[0]) + bias[kFirst]);
    }
    if (live) {
      const auto g = to_fields<Cell::template Gates, A>(gate);
      const auto s = to_fields<Cell::template State, A>(state);
      const auto after = b.cell.update(g, s, w);
      A next[kStates];
      to_array<Cell::template State, A>(after, next);
      const A seen = kFromH == 0 ? b.masked(state[0]) : next[kStates > 1 ? 1 : 0];
      A h = b.cell.output(g, s, after, seen, w);
      if (p.kept) {
        A* const kept = static_cast<A*>(p.kept);
#pragma unroll
        for (int i = 0; i < kGates; ++i)
          store_global(kept + b.kept_at(layout, at.token, i), gate[i]);
#pragma unroll
        for (int i = 0; i < kStates; ++i)
          store_global(kept + b.kept_at(layout, at.token, layout.states + i), state[i]);
      }
      if (p.h_update.data) {
        const A u = b.update_of(p.h_update, at);
        h = fused(u, h, (1 - u) * state[0]);
      }
      if constexpr (kStates > 1) {
        if (p.c_update.data) {
          const A u = b.update_of(p.c_update, at);
          next[1] = fused(u, next[1], (1 - u) * state[1]);
        }
      }
      next[0] = h;
      gated_store<A>(p.h.data, b.at_unit(p.h, at, 0), h, dtype);
      const bool last = t + 1 == b.length, reset = b.resets(t + 1);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        if (last) b.write_state(p.final_state[i], next[i]);
        state[i] = reset ? A(0) : next[i];
      }
    }
    shown(t + 1, state[0]);
    if constexpr (kFromH > 0) block_sync();
  }
}

template <class Cell, class A, int kHeld>
__global__ void __launch_bounds__(kGatedThreads)
    gated_backward_kernel(GatedBackward p, DType dtype, GatedKept layout) {
  using Block = GatedBlock<Cell, A, kHeld>;
  constexpr int kGates = Block::kGates, kStates = Block::kStates, kFromX = Block::kFromX,
                kFromH = Block::kFromH, kFirst = Block::kFirst, kWeights = Block::kWeights;
  constexpr auto x_gate = Cell::from_x;
  constexpr auto h_gate = Cell::from_h;
  const Block b(p, dtype, nullptr);
  typename Block::Held held;
  if constexpr (kFromH > 0) b.template hold<true>(held);
  const typename Block::Weights w = b.weights();
  const A* const kept = static_cast<const A*>(p.kept);
  // d[0]: of h after the step, but for what comes through R; the others of the states after it.
  A d[kStates], bias[kFromH ? kFromH : 1], weights[kWeights ? kWeights : 1], beside = A(0);
#pragma unroll
  for (int i = 0; i < kFromH; ++i) bias[i] = A(0);
#pragma unroll
  for (int i = 0; i < kWeights; ++i) weights[i] = A(0);
  const auto read = [&](int64_t token, int64_t part) {
    return load_global(kept + b.kept_at(layout, token, part));
  };
  struct Before {
    typename Block::Gates g;
    typename Block::State s, after;
    A seen;
  };
  const auto before = [&](int64_t token) {
    A gate[kGates], s[kStates], after[kStates];
#pragma unroll
    for (int i = 0; i < kGates; ++i) gate[i] = read(token, i);
#pragma unroll
    for (int i = 0; i < kStates; ++i) s[i] = read(token, layout.states + i);
    Before x;
    x.g = to_fields<Cell::template Gates, A>(gate);
    x.s = to_fields<Cell::template State, A>(s);
    x.after = b.cell.update(x.g, x.s, w);
    to_array<Cell::template State, A>(x.after, after);
    x.seen = kFromH == 0 ? b.masked(s[0]) : after[kStates > 1 ? 1 : 0];
    return x;
  };
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    d[i] = b.there ? b.read_state(p.grad_final_state[i], b.state_row) : A(0);
  if constexpr (requires { Cell::enter(typename Block::State{}, typename Block::State{}); }) {
    if (b.there && b.length > 0)
      to_array<Cell::template State, A>(
          Cell::enter(
              before(b.place(b.length - 1).token).after, to_fields<Cell::template State, A>(d)),
          d);
  }
  const auto show = [&](int64_t t, int i, A x) { // gradient i of R h at step t
    if (b.unit < b.padded) b.row(int(t & 1), i, kFromH, b.slice).store(b.unit, b.there ? x : A(0));
  };
  if constexpr (kFromH > 0) {
#pragma unroll
    for (int i = 0; i < kFromH; ++i) show(b.steps, i, A(0));
    block_sync();
  }
  // Of h before step t + 1, through R.
  const auto recurrent = [&](int64_t t) {
    if constexpr (kFirst > 0) {
      A sum[1][kGatedRows];
#pragma unroll
      for (int r = 0; r < kGatedRows; ++r) sum[0][r] = A(0);
      b.template multiply<true, 0, kFirst>(
          held, sum, [&](int g, int r) { return b.row(int((t + 1) & 1), g, kFromH, r); });
      return b.exchanged(sum[0]);
    }
    return A(0);
  };
  const auto through_R = [&](A of_first) {
    A x = of_first;
    if (Cell::two_products || kFromH == 0) x = x + beside;
    x = b.masked(x);
    return p.clips ? at_least(at_most(x, p.clip), -p.clip) : x;
  };
  const auto put = [&](void* data, int64_t token, int64_t which, int64_t count, A x) {
    if (data)
      store_global(
          static_cast<A*>(data) + ((token * count + which) * p.num_heads + b.head) * p.width +
              b.unit,
          x);
  };

  for (int64_t t = b.steps - 1; t >= 0; --t) {
    const bool live = b.there && t < b.length;
    const A of_first = recurrent(t);
    const typename Block::Place at = b.place(t);
    A gate[kGates];
#pragma unroll
    for (int i = 0; i < kGates; ++i) gate[i] = A(0);
    if (live) {
      const bool last = t + 1 == b.length, reset_after = b.resets(t + 1);
      A dh = reset_after ? A(0) : d[0];
      if (!last && !reset_after) dh = dh + through_R(of_first);
      if (p.grad_h.data) dh = dh + gated_load<A>(p.grad_h.data, b.at_unit(p.grad_h, at, 0), dtype);
      A past_h = A(0);
      if (p.h_update.data) {
        const A u = b.update_of(p.h_update, at);
        past_h = (1 - u) * dh;
        dh = u * dh;
      }
      const Before x = before(at.token);
      const OutputGradient<Cell, A> o = b.cell.output_vjp(x.g, x.s, x.after, x.seen, w, dh);
      A after[kStates], past[kStates], d_before[kStates], u_before[kStates], of_update[kGates];
      to_array<Cell::template State, A>(o.after, after);
      after[0] = A(0);
#pragma unroll
      for (int i = 1; i < kStates; ++i) {
        A each = reset_after ? A(0) : d[i];
        past[i] = A(0);
        if (i == 1 && p.c_update.data) {
          const A u = b.update_of(p.c_update, at);
          past[i] = (1 - u) * each;
          each = u * each;
        }
        after[i] = after[i] + each;
      }
      if constexpr (kStates > 1) after[1] = after[1] + o.seen;
      if constexpr (kFromH == 0) beside = o.seen;
      const UpdateGradient<Cell, A> u =
          b.cell.update_vjp(x.g, x.s, x.after, w, to_fields<Cell::template State, A>(after));
      to_array<Cell::template Gates, A>(o.gates, gate);
      to_array<Cell::template Gates, A>(u.gates, of_update);
#pragma unroll
      for (int i = 0; i < kGates; ++i) gate[i] = gate[i] + of_update[i];
      to_array<Cell::template State, A>(o.before, d_before);
      to_array<Cell::template State, A>(u.before, u_before);
      d[0] = past_h + (d_before[0] + u_before[0]);
#pragma unroll
      for (int i = 1; i < kStates; ++i) d[i] = d_before[i] + u_before[i] + past[i];
      if constexpr (kWeights > 0) {
        A of_o[kWeights], of_u[kWeights];
        to_array<Cell::template Weights, A>(o.weights, of_o);
        to_array<Cell::template Weights, A>(u.weights, of_u);
#pragma unroll
        for (int i = 0; i < kWeights; ++i) weights[i] = weights[i] + (of_o[i] + of_u[i]);
      }
    }
    if constexpr (Cell::two_products) {
      // Of the second product's operand, then of the gates in it.
      show(t, kFirst, gate[h_gate[kFirst]]);
      block_sync();
      A sum[1][kGatedRows];
#pragma unroll
      for (int r = 0; r < kGatedRows; ++r) sum[0][r] = A(0);
      b.template multiply<true, kFirst, kFromH>(
          held, sum, [&](int g, int r) { return b.row(int(t & 1), g, kFromH, r); });
      const A of_operand = b.exchanged(sum[0]);
      if (live) {
        A g[kGates];
#pragma unroll
        for (int i = 0; i < kGates; ++i) g[i] = read(at.token, i);
        const auto gates = to_fields<Cell::template Gates, A>(g);
        const A h = b.masked(read(at.token, layout.states));
        put(p.operand, at.token, 0, 1, b.cell.operand(gates, h));
        const auto of = b.cell.operand_vjp(gates, h, of_operand);
        beside = of.h;
        gate[0] = gate[0] + of.r; // r is the first of all
      }
    }
    if (live) {
#pragma unroll
      for (int i = 0; i < kFromX; ++i)
        gated_store<A>(p.grad_x.data, b.at_unit(p.grad_x, at, i), gate[x_gate[i]], dtype);
#pragma unroll
      for (int i = 0; i < kFromH; ++i) {
        const A x = gate[h_gate[i]];
        bias[i] = bias[i] + x;
        put(p.grad_a, at.token, i, kFromH, x);
      }
    }
    if constexpr (kFromH > 0) {
#pragma unroll
      for (int i = 0; i < kFirst; ++i) show(t, i, gate[h_gate[i]]);
      block_sync();
    }
  }

  const A of_first = recurrent(-1);
  if (!b.there) return;
  if (b.length > 0) {
    const bool reset = b.resets(0);
    A s[kStates];
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      s[i] = b.read_state(p.initial_state[i], b.state_row);
      if (reset) d[i] = A(0);
    }
    if (!reset) {
      d[0] = d[0] + through_R(of_first);
      if constexpr (requires { Cell::leave(typename Block::State{}, typename Block::State{}); })
        to_array<Cell::template State, A>(
            Cell::leave(
                to_fields<Cell::template State, A>(s), to_fields<Cell::template State, A>(d)),
            d);
    }
  }
#pragma unroll
  for (int i = 0; i < kStates; ++i) b.write_state(p.grad_initial_state[i], d[i]);
#pragma unroll
  for (int i = 0; i < kFromH; ++i) put(p.grad_bias, b.sequence, i, kFromH, bias[i]);
#pragma unroll
  for (int i = 0; i < kWeights; ++i) put(p.grad_weights, b.sequence, i, kWeights, weights[i]);
}

} // namespace torch_ext::cuda
