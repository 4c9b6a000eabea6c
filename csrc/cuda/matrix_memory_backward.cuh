// The backward of a matrix memory on a GPU (core/matrix_memory_problem.h; the formulas: cpu/matrix_memory.h, whose
// words are used here). Products are those of tensor cores, of bfloat16 with sums in float32; no atomics, and every
// sum has an order that follows from shapes alone.
//
// A chunk has 64 steps. With the states at the starts of chunks there (C0, n0, m0: matrix_memory.cuh), four kernels
// run one after the other:
//
//   queries  a block per chunk and group of heads: scores G = q k^T, U = g v^T and Z = g C0^T, the divisor d and the
//            gradient e of its r, the gradient of q, and what the gates' gradients have of the scores
//   states   a block per tile of 64 x 64 numbers of a state, from the last chunk to the first: the gradients of the
//            states at the ends of chunks, and of the first one
//   keys     a block per chunk and group of heads: the same scores turned over, the gradients of k and v, and of the
//            gates
//   maxima   a warp per head and sequence, where there is a stabiliser: its gradient goes back to where each maximum was
//
// Operands lie in shared memory as tiles of 64 x 64 bfloat16, in parts as mma.cuh has them. A number in memory has so
// many as hold it whole (bfloat16 one, float16 two), weights and gradients so many as the call wants; that is a number
// at run time, but for calls of one part, whose kernels load a product's tiles while the one before is made. A warp has
// 16 rows of 64 columns of a product in registers; rows and columns that cannot count (after the end, above the
// diagonal) are left out by sixteens. What scales a row of a product is multiplied to its sums, not to operands: of
// bfloat16 tokens only weights, states, their gradients and the queries that make those are rounded.
//
// The gradients of the decays: log_decay[t] gets sum over t' >= t > j of what step t' has from step j. A reverse sum
// of q dq - k dk takes what has been added up before t from all of it, and leaves the rounding of the large ones.
// Here, as on the CPU, what has passed t inside of the chunk, from the state at its start, to the state at its end,
// and from one to the other are sums of their own of nothing else.
#pragma once
#include <math.h>

#include "matrix_memory.cuh"

namespace torch_ext::cuda {

inline constexpr int kGradThreads = 128, kGradWarps = kGradThreads / 32;
inline constexpr int kGradSteps = 64; // of a chunk; rows and columns of a tile
inline constexpr int kGradRow = matrix_tile_pitch(kGradSteps); // from row to row of a tile
inline constexpr int kGradPart = kGradSteps * kGradRow;
inline constexpr int kGradSlices = 2;               // of 64 keys each: Z of so many is in registers
inline constexpr int kGradSumsRow = kGradSteps + 1; // of a tile of float32

// How a call is cut, and its workspace.
struct MatrixGradPlan {
  int parts = 1;
  MatrixElement element = MatrixElement::f32; // of v; of h and q, k unless they are wide
  int64_t slots = 0;                          // of chunks; packed, some are nobody's
  int sets = 1, set_heads = 1;                // of the heads that share queries and keys
  int64_t row = 0;                            // numbers from key to key of a state
  MatrixStates states;                        // at the starts of chunks
  // The gradients of C and n at the ends of chunks: [slot][head][part][key][row], [slot][head][key].
  BFloat16* grad_C = nullptr;
  float* grad_n = nullptr;
  // [field][slot][head][step], fields as below; [slot][head].
  float *fields = nullptr, *decay = nullptr;
  // C . grad_C + n . grad_n: what a chunk's start and end have in common, [slot][head][tile][warp]; at sequences' starts,
  // [sequence][head][tile][warp]; at their ends, [sequence][head].
  float *through = nullptr, *at_start = nullptr, *at_end = nullptr;
  // Of q and k, where heads share them: [q, k][set][row of tokens][group][key].
  float* shares = nullptr;
};
// What kernels leave for each other of a step.
enum MatrixGradField {
  kGradInverse, // 1 / d
  kGradE,       // the gradient of r
  kGradOfM,     // of m, through eps
  kGradDecayed, // 1 where m is that of the step before, decayed
  kGradInside,  // of log_decay, but for what goes to the end
  kGradOwn,     // of input_scale, likewise
  kGradOfC,     // of q u^T in the gradient of the state at the start, and of q e in n's
  kGradOfN,
  kGradFields
};

TORCH_EXT_HOST_DEVICE int grad_slices(int64_t size) { // of 64, at least one
  return int(size > kGradSteps ? (size + kGradSteps - 1) / kGradSteps : 1);
}

// ---- places ----

// A chunk of a sequence, in the order of time.
struct MatrixGradChunk {
  MatrixSequence s;
  int64_t slot = 0, first = 0; // of the chunk's states; its first step
  int count = 0;               // of its steps; not positive where a slot is nobody's

  TORCH_EXT_DEVICE MatrixGradChunk(const MatrixMemoryProblem& p, int64_t sequence)
      : s(p, sequence) {
    // Offsets are not checked, as that would wait for the device: whatever they are, tokens are those that are there.
    s.begin = within(s.begin, 0, p.num_steps), s.steps = within(s.steps, 0, p.num_steps - s.begin);
  }
  TORCH_EXT_DEVICE static MatrixGradChunk of_slot(const MatrixMemoryProblem& p, int64_t slot) {
    if (!p.cu_seqlens) {
      const int64_t chunks = (p.num_steps + kGradSteps - 1) / kGradSteps;
      MatrixGradChunk c(p, slot / chunks);
      c.move_to(p, slot % chunks);
      return c;
    }
    int64_t low = 0, high = p.num_sequences; // the last sequence that starts at this slot or before
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2,
                    begin = within(load_global(p.cu_seqlens + middle), 0, p.num_steps);
      (matrix_memory_chunks_before(p, kGradSteps, middle, begin) <= slot ? low : high) = middle;
    }
    MatrixGradChunk c(p, low);
    c.move_to(p, slot - matrix_memory_chunks_before(p, kGradSteps, low, c.s.begin));
    return c;
  }
  TORCH_EXT_DEVICE void move_to(const MatrixMemoryProblem& p, int64_t chunk) {
    slot = matrix_memory_chunks_before(p, kGradSteps, s.index, s.begin) + chunk;
    first = chunk * kGradSteps;
    const int64_t rest = s.steps - first;
    count = int(rest < kGradSteps ? rest : int64_t(kGradSteps));
  }
  TORCH_EXT_DEVICE int64_t chunks() const { return (s.steps + kGradSteps - 1) / kGradSteps; }
  TORCH_EXT_DEVICE bool is_last() const { return first + kGradSteps >= s.steps; }
  // Is the state at its start zero, and not written?
  TORCH_EXT_DEVICE bool starts_empty(const MatrixMemoryProblem& p) const {
    return matrix_starts_empty(p, first);
  }
  TORCH_EXT_DEVICE int64_t token(int64_t t) const { return s.token(first + t); }
  // The elements of an array between the row's first one and those of a step.
  template <class Array>
  TORCH_EXT_DEVICE int64_t place(const Array& x, int64_t t, int64_t head) const {
    return s.row * x.sequence + token(t) * x.time + head * x.head;
  }

 private:
  TORCH_EXT_DEVICE static int64_t within(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
  }
};

// Rows of numbers, of one head's steps or of a state.
struct MatrixRows {
  const void* data;
  int64_t step, channel;
  MatrixElement type;

  TORCH_EXT_DEVICE float at(int64_t row, int64_t column) const {
    const int64_t i = row * step + column * channel;
    if (type == MatrixElement::f32) return load_global(static_cast<const float*>(data) + i);
    if (type == MatrixElement::bf16)
      return to_float(load_global(static_cast<const BFloat16*>(data) + i));
    return to_float(load_global(static_cast<const Half*>(data) + i));
  }
  TORCH_EXT_DEVICE int size() const { return type == MatrixElement::f32 ? 4 : 2; }
  TORCH_EXT_DEVICE bool by_sixteen_bytes() const {
    return channel == 1 && (reinterpret_cast<uintptr_t>(data) | uintptr_t(step * size())) % 16 == 0;
  }
  TORCH_EXT_DEVICE MatrixRows from(int64_t row) const {
    return {static_cast<const char*>(data) + row * step * size(), step, channel, type};
  }
};
// How many parts hold a number whole, at most so many.
TORCH_EXT_DEVICE int parts_of(MatrixElement type, int most) {
  const int all = type == MatrixElement::f32 ? 3 : type == MatrixElement::bf16 ? 1 : 2;
  return all < most ? all : most;
}
TORCH_EXT_DEVICE MatrixRows matrix_rows(
    const OverHeads<const void*>& x, const MatrixGradChunk& c, int64_t head, MatrixElement type) {
  MatrixRows r{x.data, c.s.reverse ? -x.time : x.time, x.channel, type};
  if (x.data) r.data = static_cast<const char*>(x.data) + c.place(x, 0, head) * r.size();
  return r;
}
// And where they are stored.
struct MatrixOut {
  void* data;
  int64_t step, channel;
  MatrixElement type;
  TORCH_EXT_DEVICE MatrixOut(void* x, int64_t a_step, int64_t a_channel, MatrixElement an_element)
      : data(x), step(a_step), channel(a_channel), type(an_element) {}
  TORCH_EXT_DEVICE MatrixOut(
      const OverHeads<void*>& x, const MatrixGradChunk& c, int64_t head, MatrixElement an_element)
      : step(c.s.reverse ? -x.time : x.time), channel(x.channel), type(an_element) {
    data = static_cast<char*>(x.data) + c.place(x, 0, head) * (type == MatrixElement::f32 ? 4 : 2);
  }
  TORCH_EXT_DEVICE void put(int64_t row, int64_t column, float x) const {
    const int64_t i = row * step + column * channel;
    if (type == MatrixElement::f32)
      store_global(static_cast<float*>(data) + i, x);
    else if (type == MatrixElement::bf16)
      store_global(static_cast<BFloat16*>(data) + i, to_bfloat16(x));
    else
      store_global(static_cast<Half*>(data) + i, to_half(x));
  }
  // Two neighbours, the first of them an even one; of the second one only if it is there.
  TORCH_EXT_DEVICE void put_pair(
      int64_t row, int64_t column, int64_t size, float x, float y) const {
    if (channel == 1 && column + 1 < size && type != MatrixElement::f32 && step % 2 == 0 &&
        reinterpret_cast<uintptr_t>(data) % 4 == 0) {
      const uint32_t word =
          type == MatrixElement::bf16 ? pack_pair<BFloat16>(x, y) : pack_pair<Half>(x, y);
      store_global(
          reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(data) + row * step + column), word);
      return;
    }
    if (column < size) put(row, column, x);
    if (column + 1 < size) put(row, column + 1, y);
  }
};
TORCH_EXT_DEVICE void put_gate(
    const PerHead<void*>& g, const MatrixGradChunk& c, int t, int64_t head, float x) {
  if (g.data) store_global(static_cast<float*>(g.data) + c.place(g, t, head), x);
}

// ---- tiles ----

using MatrixWords = SideBySide<BFloat16>;
struct MatrixOperand {
  MatrixTile tile;
  TORCH_EXT_DEVICE explicit MatrixOperand(int byte_offset)
      : tile{shared_memory<BFloat16>(byte_offset), kGradRow, kGradPart} {}
  TORCH_EXT_DEVICE MatrixTile part(int i) const {
    return {tile.data + i * kGradPart, kGradRow, kGradPart};
  }
};
// Parts of both operands of a product, and how many its parts' numbers add up to less than.
struct MatrixParts {
  int left, right, sum;
};
// Packs two numbers as bfloat16 and leaves what that has lost; of what is not finite, nothing.
TORCH_EXT_DEVICE uint32_t take_part(float& x, float& y) {
  const uint32_t pair = pack_pair<BFloat16>(x, y);
  x -= low_half(pair), y -= high_half(pair);
  if (!(x - x == 0)) x = 0;
  if (!(y - y == 0)) y = 0;
  return pair;
}

TORCH_EXT_DEVICE int sixteens(int64_t n) { return int((n + 15) / 16); }
TORCH_EXT_DEVICE int slice_of(
    int64_t size, int64_t first) { // how much of 64 from there on is there
  return int(size - first < kGradSteps ? size - first : kGradSteps);
}

// Rows 0 .. rows, columns first .. first + 64 of x, those below `size`; zeros up to the next sixteen of both. By all
// threads; it is there when copies have come and the block is synchronised.
TORCH_EXT_DEVICE void stage(
    const MatrixOperand& to, const MatrixRows& x, int rows, int first, int size, int parts) {
  const int own = parts_of(x.type, parts);
  const int pieces = sixteens(slice_of(size, first)) * 2; // of 8 columns
  const bool wide = x.data && x.by_sixteen_bytes() && first % 8 == 0,
             copied = wide && x.type == MatrixElement::bf16;
#pragma unroll 2
  for (int i = int(threadIdx.x); i < sixteens(rows) * 16 * 8; i += kGradThreads) {
    const int row = i / 8, piece = i % 8;
    if (piece >= pieces) continue;
    const int column = first + piece * 8;
    const int index = row * kGradRow + piece * 8;
    const bool there = x.data && row < rows && column < size,
               whole = there && wide && column + 8 <= size;
    if (copied && whole) {
      copy_async16(
          to.tile.data, index, static_cast<const BFloat16*>(x.data) + row * x.step + column);
      continue;
    }
    float number[8];
    if (whole) {
      if (x.type == MatrixElement::f32) {
        const float* const from = static_cast<const float*>(x.data) + row * x.step + column;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto four = load_global(reinterpret_cast<const SideBySide<float>*>(from) + half);
#pragma unroll
          for (int k = 0; k < 4; ++k) number[half * 4 + k] = four.widen(k);
        }
      } else {
        const auto words = load_global(reinterpret_cast<const MatrixWords*>(
            static_cast<const uint16_t*>(x.data) + row * x.step + column));
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const uint16_t bits = uint16_t(words.words[k / 2] >> (16 * (k % 2)));
          number[k] =
              x.type == MatrixElement::bf16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        number[k] = there && column + k < size ? x.at(row, column + k) : 0.f;
    }
    for (int part = 0; part < own; ++part) {
      MatrixWords words;
#pragma unroll
      for (int k = 0; k < 4; ++k) words.words[k] = take_part(number[2 * k], number[2 * k + 1]);
      to.tile.data.view<MatrixWords>().store((part * kGradPart + index) / 8, words);
    }
  }
}
// The same of the gradient of a state, which lies in its parts: keys first_key .. + 64, values first .. + 64.
TORCH_EXT_DEVICE void stage_parts(
    const MatrixOperand& to, const MatrixRows& from, int keys, int first_key, int first,
    int parts) {
  const int rows = slice_of(keys, first_key), pieces = sixteens(slice_of(from.step, first)) * 2;
  for (int i = int(threadIdx.x); i < sixteens(rows) * 16 * 8; i += kGradThreads) {
    const int row = i / 8, piece = i % 8;
    if (piece >= pieces) continue;
    for (int part = 0; part < parts; ++part) {
      const int index = part * kGradPart + row * kGradRow + piece * 8;
      if (row < rows)
        copy_async16(
            to.tile.data, index,
            static_cast<const BFloat16*>(from.data) +
                (int64_t(part) * keys + first_key + row) * from.step + first + piece * 8);
      else
        to.tile.data.view<MatrixWords>().store(index / 8, MatrixWords{});
    }
  }
}
// Products one after the other, of tiles that are on their way while the one before is made, where there is room for
// two: of one part. issue(i) stages what product i needs and no product before has, use(i) makes it; first() runs
// beside the first tiles' way.
template <int kParts>
inline constexpr int grad_stages = kParts == 1 ? 2 : 1;
template <int kParts, class Issue, class First, class Use>
TORCH_EXT_DEVICE void in_turn(int items, Issue issue, First first, Use use) {
  constexpr bool kAhead = grad_stages<kParts> == 2;
#pragma unroll 1
  for (int i = -1; i < items; ++i) {
    const int next = kAhead || i < 0 ? i + 1 : i;
    if (next < items && (kAhead || i >= 0)) issue(next);
    copy_async_commit();
    if (i < 0) {
      first();
      continue;
    }
    copy_async_wait<kAhead ? 1 : 0>();
    block_sync();
    use(i);
    block_sync();
  }
}

// Two neighbours in a row of a tile, the first an even one.
struct MatrixPair {
  float first = 0, second = 0;
  TORCH_EXT_DEVICE MatrixPair(const MatrixOperand& x, int parts, int row, int column) {
    for (int part = parts - 1; part >= 0; --part) {
      const uint32_t words = x.part(part).data.view<uint32_t>().load((row * kGradRow + column) / 2);
      first += low_half(words), second += high_half(words);
    }
  }
};

// ---- products: y of this warp's 16 rows and of 64 columns ----
//
// Of thread `lane`, y[n][0], y[n][1] are columns 8 n + 2 (lane % 4) and its neighbour of row lane / 4, y[n][2],
// y[n][3] those of row lane / 4 + 8. Columns and depths are counted by sixteens.

using MatrixSums = float[8][4];
struct MatrixRange {
  int begin, end;
  TORCH_EXT_DEVICE bool has(int i) const { return i >= begin && i < end; }
};
TORCH_EXT_DEVICE void clear(MatrixSums& y) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) y[n][i] = 0;
}
// y += A B, of which a tile may hold the one or the other turned over.
enum class MatrixTurned { neither, left, right };

template <MatrixTurned kTurned>
TORCH_EXT_DEVICE void add_products(
    MatrixSums& y, const FragmentA<1>& a, const MatrixTile& right, int depth, MatrixRange columns) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    if (!columns.has(pair)) continue;
    FragmentB<1> b;
    if constexpr (kTurned == MatrixTurned::right)
      load_b_transposed<1>(b, right, depth * 16, pair * 16);
    else
      load_b<1>(b, right, depth * 16, pair * 16);
    multiply<1>(y[2 * pair], a, b, 0);
    multiply<1>(y[2 * pair + 1], a, b, 1);
  }
}
template <MatrixTurned kTurned, int kParts>
TORCH_EXT_DEVICE void multiply_tiles(
    MatrixSums& y, const MatrixOperand& left, const MatrixOperand& right, MatrixParts parts,
    int depths, MatrixRange columns) {
  const auto load = [&](FragmentA<1>& a, int part, int depth) {
    if constexpr (kTurned == MatrixTurned::left)
      load_a_transposed<1>(a, left.part(part), 16 * warp(), depth * 16);
    else
      load_a<1>(a, left.part(part), 16 * warp(), depth * 16);
  };
  FragmentA<1> a;
  if constexpr (kParts == 1) {
#pragma unroll 2
    for (int depth = 0; depth < 4; ++depth) {
      if (depth >= depths) break;
      load(a, 0, depth);
      add_products<kTurned>(y, a, right.tile, depth, columns);
    }
  } else {
#pragma unroll 1
    for (int depth = 0; depth < depths; ++depth)
#pragma unroll 1
      for (int i = 0; i < parts.left; ++i) {
        load(a, i, depth);
#pragma unroll 1
        for (int j = 0; j < parts.right && i + j < parts.sum; ++j)
          add_products<kTurned>(y, a, right.part(j), depth, columns);
      }
  }
}
// The same where A is what this warp has in registers.
template <int kParts>
TORCH_EXT_DEVICE void multiply_sums(
    MatrixSums& y, const MatrixSums& left, const MatrixOperand& right, MatrixParts parts,
    MatrixRange depths, MatrixRange columns) {
#pragma unroll
  for (int depth = 0; depth < 4; ++depth) {
    if (!depths.has(depth)) continue;
    float rest[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rest[0][i] = left[2 * depth][i], rest[1][i] = left[2 * depth + 1][i];
#pragma unroll 1
    for (int i = 0; i < (kParts == 1 ? 1 : parts.left); ++i) {
      FragmentA<1> a;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        a.r[0][k] = take_part(rest[k / 2][k % 2 * 2], rest[k / 2][k % 2 * 2 + 1]);
#pragma unroll 1
      for (int j = 0; j < (kParts == 1 ? 1 : parts.right) && (kParts == 1 || i + j < parts.sum);
           ++j)
        add_products<MatrixTurned::neither>(y, a, right.part(j), depth, columns);
    }
  }
}
// The row and the first column of y[n][i] and y[n][i + 1], i even.
TORCH_EXT_DEVICE int row_of(int i) { return 16 * warp() + lane() / 4 + i / 2 * 8; }
TORCH_EXT_DEVICE int column_of(int n, int i) { return 8 * n + lane() % 4 * 2 + i % 2; }
// Over the four lanes that have a row.
TORCH_EXT_DEVICE float sum_of_row(float x) {
  x += shuffle_xor(~0u, x, 1);
  return x + shuffle_xor(~0u, x, 2);
}
TORCH_EXT_DEVICE float sum_of_warp(float x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += shuffle_xor(~0u, x, bits);
  return x;
}

// ---- what there is of a chunk's steps, in shared memory ----

struct MatrixGradSteps {
  using Gates = MatrixGates;
  enum Field {
    kInverse = Gates::kSize,
    kE = kInverse + kGradSteps,
    kMore = kE + kGradSteps,
    kSize = kMore + kGradSteps
  };
  Shared<float> at;
  TORCH_EXT_DEVICE float load(int field, int t) const { return at.load(field + t); }
  TORCH_EXT_DEVICE void store(int field, int t, float x) const { at.store(field + t, x); }
  // The gates, by the first warp. The block is synchronised before they are read.
  TORCH_EXT_DEVICE void make(
      const MatrixMemoryProblem& p, const MatrixGradChunk& c, int64_t head,
      const MatrixStates& states) const {
    if (warp() != 0) return;
    double m0 = 0;
    if (p.normalizer == Normalizer::stabilized && !c.starts_empty(p))
      m0 = load_global(states.m + c.slot * p.num_heads + head);
    matrix_gates<true>(p, c.s, c.first, c.count, head, m0, at);
    warp_sync();
    // Is m that of the step before, decayed? Row and column but for F: m of the step before, and log_input.
    for (int t = lane(); t < kGradSteps; t += 32) {
      const auto number = [&](int field, int i) {
        return double(at.load(field + i)) + double(at.load(field + Gates::L + i));
      };
      const double before = t > 0 ? -number(Gates::kRow, t - 1) : m0;
      store(kMore, t, t >= c.count || before >= number(Gates::kColumn, t));
    }
  }
};
// What a thread has of a step as a row of W, and as a column.
struct MatrixFactor {
  float high, low;
  TORCH_EXT_DEVICE static MatrixFactor of(const MatrixGradSteps& s, int field, int t) {
    return {s.load(field, t), s.load(field + MatrixGates::L, t)};
  }
};
TORCH_EXT_DEVICE float weight_of(MatrixFactor row, MatrixFactor column) {
  return exp_weight((row.high + column.high) + (row.low + column.low));
}

// What a block of a chunk knows of its place and its arrays, in shared memory: in registers it would crowd out sums.
// A thread writes it.
struct MatrixGradBlock {
  // kState: the slot of the chunk and a head.
  enum Word { kIndex, kRow, kBegin, kSteps, kSlot, kFirst, kCount, kN, kState, kHead, kArrays };
  enum Array { kQ, kK, kV, kG, kC, kOutKeys, kOutValues, kShare, kArrayCount };
  static constexpr int kBytes = (kArrays + 4 * kArrayCount) * 8;
  Shared<int64_t> words;

  TORCH_EXT_DEVICE void put(const MatrixGradChunk& c) const {
    words.store(kIndex, c.s.index), words.store(kRow, c.s.row), words.store(kBegin, c.s.begin);
    words.store(kSteps, c.s.steps), words.store(kSlot, c.slot), words.store(kFirst, c.first);
    words.store(kCount, c.count);
  }
  TORCH_EXT_DEVICE MatrixGradChunk chunk(const MatrixMemoryProblem& p) const {
    MatrixGradChunk c(p, 0);
    c.s.index = words.load(kIndex), c.s.row = words.load(kRow), c.s.begin = words.load(kBegin);
    c.s.steps = words.load(kSteps), c.slot = words.load(kSlot), c.first = words.load(kFirst);
    c.count = int(words.load(kCount));
    return c;
  }
  TORCH_EXT_DEVICE void put_n(const float* n) const {
    words.store(kN, int64_t(reinterpret_cast<uintptr_t>(n)));
  }
  TORCH_EXT_DEVICE const float* n() const {
    return reinterpret_cast<const float*>(uintptr_t(words.load(kN)));
  }
  TORCH_EXT_DEVICE void put(
      Array i, const void* data, int64_t step, int64_t channel, MatrixElement type) const {
    const int at = kArrays + 4 * i;
    words.store(at, int64_t(reinterpret_cast<uintptr_t>(data)));
    words.store(at + 1, step), words.store(at + 2, channel), words.store(at + 3, int64_t(type));
  }
  TORCH_EXT_DEVICE void put(Array i, const MatrixRows& x) const {
    put(i, x.data, x.step, x.channel, x.type);
  }
  TORCH_EXT_DEVICE void put(Array i, const MatrixOut& x) const {
    put(i, x.data, x.step, x.channel, x.type);
  }
  TORCH_EXT_DEVICE MatrixRows rows(int i) const {
    const int at = kArrays + 4 * i;
    return {
        reinterpret_cast<const void*>(uintptr_t(words.load(at))), words.load(at + 1),
        words.load(at + 2), MatrixElement(words.load(at + 3))};
  }
  TORCH_EXT_DEVICE MatrixOut out(Array i) const {
    const MatrixRows x = rows(i);
    return {const_cast<void*>(x.data), x.step, x.channel, x.type};
  }
};

// Where a block's arrays lie in shared memory, in bytes.
struct MatrixGradShared {
  int block, tile, scores, sums, steps, bytes; // tile: of one
  TORCH_EXT_HOST_DEVICE MatrixGradShared(int parts, bool with_scores, bool with_sums) {
    tile = parts * kGradPart * 2;
    scores =
        2 * (parts == 1
                 ? grad_stages<1>
                 : grad_stages<0>)*tile; // G, each number by the thread that has it in a product
    sums = scores + (with_scores ? kGradThreads * 32 * 4 : 0);
    steps = sums + (with_sums ? kGradSteps * kGradSumsRow * 4 : 0);
    block = (steps + MatrixGradSteps::kSize * 4 + 7) / 8 * 8;
    bytes = block + MatrixGradBlock::kBytes;
  }
};
TORCH_EXT_DEVICE void keep(Shared<float> to, const MatrixSums& y, float scale) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int x = 0; x < 4; ++x)
      to.store((4 * n + x) * kGradThreads + int(threadIdx.x), scale * y[n][x]);
}
TORCH_EXT_DEVICE float kept(Shared<float> from, int n, int x) {
  return from.load((4 * n + x) * kGradThreads + int(threadIdx.x));
}

// Of a head, too: slot is that of the chunk times the number of heads and the head.
TORCH_EXT_DEVICE float* field_of(
    const MatrixGradPlan& q, const MatrixMemoryProblem& p, int field, int64_t slot) {
  return q.fields + (field * q.slots * p.num_heads + slot) * kGradSteps;
}
TORCH_EXT_DEVICE float divisor_slope_of(const MatrixMemoryProblem& p, float r, float least) {
  if (p.normalizer == Normalizer::none) return 0;
  if (p.normalizer == Normalizer::sum) return 1;
  return r > least ? 1.f : -r > least ? -1.f : 0.f;
}

TORCH_EXT_DEVICE MatrixRows rows_of(const MatrixStates& x, int64_t slot) {
  return {
      static_cast<const char*>(x.C) + slot * x.keys * x.values * (x.wide ? 4 : 2), x.values, 1,
      x.wide ? MatrixElement::f32 : MatrixElement::bf16};
}
// Of heads that share queries and keys, what a set of them has of the gradient of q (0) or k (1); null where none do.
TORCH_EXT_DEVICE float* share_of(
    const MatrixGradPlan& q, const MatrixMemoryProblem& p, int which, int64_t set) {
  const int64_t tokens = (p.cu_seqlens ? 1 : p.num_sequences) * p.num_steps;
  return q.shares ? q.shares + (which * q.sets + set) * tokens * p.num_groups * p.key_size
                  : nullptr;
}
// The same as rows of a chunk's steps.
TORCH_EXT_DEVICE MatrixOut share_rows(
    const MatrixGradPlan& q, const MatrixMemoryProblem& p, const MatrixGradChunk& c, int64_t group,
    int which, int64_t set) {
  float* const share = share_of(q, p, which, set);
  const int64_t step = p.num_groups * p.key_size,
                at = ((c.s.row * p.num_steps + c.token(0)) * p.num_groups + group) * p.key_size;
  return {share ? share + at : nullptr, c.s.reverse ? -step : step, 1, MatrixElement::f32};
}
// Stores a product of steps and channels from `first` on; `more`: adds to what is there, of float.
TORCH_EXT_DEVICE void put_sums(
    const MatrixSums& y, const MatrixOut& out, int count, int first, int size, float factor,
    bool more = false) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int x = 0; x < 4; x += 2) {
      const int t = row_of(x), column = first + column_of(n, x);
      if (t >= count) continue;
      float before[2] = {};
      if (more) {
        const float* const at = static_cast<const float*>(out.data) + t * out.step + column;
        if (column < size) before[0] = load_global(at);
        if (column + 1 < size) before[1] = load_global(at + 1);
      }
      out.put_pair(t, column, size, factor * y[n][x] + before[0], factor * y[n][x + 1] + before[1]);
    }
}

// ---- gradients of q, and of r ----

template <int kParts>
__global__ void __launch_bounds__(kGradThreads, 2)
    matrix_grad_queries_kernel(MatrixMemoryBackward p, MatrixGradPlan q) {
  using Gates = MatrixGates;
  using Steps = MatrixGradSteps;
  const int parts = kParts == 1 ? 1 : q.parts;
  const MatrixGradShared shared(parts, true, true);
  const MatrixGradBlock block{shared_memory<int64_t>(shared.block)};
  const MatrixElement of_keys = p.wide_keys ? MatrixElement::f32 : q.element,
                      of_h = p.wide_h ? MatrixElement::f32 : q.element;
  int count;
  bool empty;
  {
    const MatrixGradChunk c = MatrixGradChunk::of_slot(p, blockIdx.x);
    if (c.count <= 0) return;
    count = c.count, empty = c.starts_empty(p);
    if (threadIdx.x == 0) {
      const int group = int(blockIdx.y) / q.sets, set = int(blockIdx.y) % q.sets;
      block.put(c);
      block.put(block.kQ, matrix_rows(p.q, c, group, of_keys));
      block.put(block.kK, matrix_rows(p.k, c, group, of_keys));
      const MatrixOut out(p.grad_q, c, group, of_keys), share = share_rows(q, p, c, group, 0, set);
      block.put(block.kOutKeys, share.data ? share : out);
    }
    block_sync();
  }
  const int K = int(p.key_size), V = int(p.value_size);
  const Shared<float> scores = shared_memory<float>(shared.scores),
                      sums = shared_memory<float>(shared.sums);
  const Steps s{shared_memory<float>(shared.steps)};
  const float scale = float(p.scale);
  // Of scores the columns up to the diagonal.
  const bool works = 16 * warp() < count;
  const MatrixRange lower{0, works ? warp() + 1 : 0};

  const auto left = [&](int i) { return MatrixOperand(i % grad_stages<kParts> * shared.tile); };
  const auto right = [&](int i) {
    return MatrixOperand((grad_stages<kParts> + i % grad_stages<kParts>)*shared.tile);
  };
  const auto depths_of = [&](int64_t size, int slice) {
    return works ? sixteens(slice_of(size, slice * kGradSteps)) : 0;
  };

  MatrixSums U;
  clear(U);
  in_turn<kParts>(
      grad_slices(K),
      [&](int i) {
        stage(left(i), block.rows(block.kQ), count, i * kGradSteps, K, parts);
        stage(right(i), block.rows(block.kK), count, i * kGradSteps, K, parts);
      },
      [] {},
      [&](int i) {
        multiply_tiles<MatrixTurned::right, kParts>(
            U, left(i), right(i), {parts_of(of_keys, parts), parts_of(of_keys, parts), parts},
            depths_of(K, i), lower);
      });
  keep(scores, U, scale);
#pragma unroll 1
  for (int of_set = 0; of_set < q.set_heads; ++of_set) {
    {
      const int place = recomputed(int(blockIdx.y)), heads = int(p.num_heads / p.num_groups),
                of_group = place % q.sets * q.set_heads + of_set;
      if (of_group >= heads) break;
      if (threadIdx.x == 0) block.words.store(block.kHead, place / q.sets * heads + of_group);
    }
    if (threadIdx.x == 0) {
      const MatrixGradChunk c = block.chunk(p);
      const int64_t head = block.words.load(block.kHead), slot = c.slot * p.num_heads + head;
      block.words.store(block.kState, slot);
      block.put(block.kG, matrix_rows(p.grad_h, c, head, of_h));
      block.put(block.kV, matrix_rows(p.v, c, head, q.element));
      block.put(block.kC, rows_of(q.states, slot));
      block.put_n(
          p.normalizer != Normalizer::none && !empty ? q.states.n + slot * q.states.keys : nullptr);
    }
    block_sync();

    // U = g v^T, Z = g C0^T: of so many keys at a time. Where there are more, first e is found, then Z made again.
    const int all = grad_slices(K), passes = (all + kGradSlices - 1) / kGradSlices,
              turns = passes > 1 ? 2 * passes : 1;
    MatrixSums Z[kGradSlices];
    clear(U);
    float q_carried[2] = {}, r_carried[2] = {};
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      const int first = turn % passes * kGradSlices,
                slices = all - first < kGradSlices ? all - first : kGradSlices;
      // For each slice of values U's product, in the first turn, and those of Z; what queries meet of the state, in
      // the turns up to that which finds e; then the products of the scores' gradient.
      const int of_U = turn == 0, each = of_U + (empty ? 0 : slices),
                products = each * grad_slices(V),
                met_all = products + (turn < passes && !empty ? slices : 0),
                last = turn < turns - passes ? 0 : slices;
      const auto find_gradients = [&] {
        const int64_t slot = block.words.load(block.kState);
        const int rows[] = {row_of(0), row_of(2)};
        float r[2] = {}, met[2] = {}, inverse[2], e[2] = {}; // sums of P, and of P U
        const MatrixFactor row[] = {
            MatrixFactor::of(s, Gates::kRow, rows[0]), MatrixFactor::of(s, Gates::kRow, rows[1])};
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const int j = column_of(n, x), t = rows[x / 2];
            if (j > t || t >= count) continue;
            const float weight = weight_of(row[x / 2], MatrixFactor::of(s, Gates::kColumn, j)) *
                                 s.load(Gates::kInput, j) * kept(scores, n, x);
            r[x / 2] += weight;
            met[x / 2] += weight * U[n][x];
          }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int t = rows[half];
          const float carry = s.load(Gates::kCarry, t) * scale, least = s.load(Gates::kLeast, t);
          r_carried[half] = sum_of_row(r_carried[half]) * carry;
          r[half] = sum_of_row(r[half]) + r_carried[half];
          inverse[half] = 1 / matrix_divisor(p.normalizer, float(p.eps), least, r[half]);
          q_carried[half] = sum_of_row(q_carried[half]) * (carry * inverse[half]);
          const float through = sum_of_row(met[half]) * inverse[half] + q_carried[half],
                      slope = divisor_slope_of(p, r[half], least);
          float of_m = 0;
          if (p.exact) {
            e[half] = slope == 0 ? 0 : -slope * through * inverse[half];
            if (p.normalizer == Normalizer::stabilized)
              of_m = -through * float(p.eps) * inverse[half];
          }
          if (t >= count) inverse[half] = e[half] = 0;
          if (lane() % 4 == 0) {
            s.store(Steps::kInverse, t, inverse[half]);
            s.store(Steps::kE, t, e[half]);
          }
          if (lane() % 4 == 0 && t < count) {
            const auto put = [&](int field, float x) {
              store_global(field_of(q, p, field, slot) + t, x);
            };
            put(kGradInverse, inverse[half]), put(kGradE, e[half]), put(kGradOfM, of_m);
            put(kGradDecayed, s.load(Steps::kMore, t));
            put(kGradOfC, carry * inverse[half]), put(kGradOfN, carry * e[half]);
            s.store(Steps::kMore, t, q_carried[half] + e[half] * r_carried[half]);
          }
        }
        // From here on U is the gradient of the scores.
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const int j = column_of(n, x), t = rows[x / 2];
            if (j > t || t >= count) {
              U[n][x] = 0;
              continue;
            }
            const float of_score = (U[n][x] * inverse[x / 2] + e[x / 2]) *
                                   weight_of(row[x / 2], MatrixFactor::of(s, Gates::kColumn, j));
            sums.store(t * kGradSumsRow + j, kept(scores, n, x) * of_score);
            U[n][x] = of_score * s.load(Gates::kInput, j);
          }
        block_sync();
        // Of the decays: sums over rows from t on, then over columns before t. Nothing is taken from them again.
        const int i = int(threadIdx.x);
        if (i < count) {
          float sum = 0;
          for (int t = count - 1; t >= i; --t) {
            sum += sums.load(t * kGradSumsRow + i);
            sums.store(t * kGradSumsRow + i, sum);
          }
          store_global(field_of(q, p, kGradOwn, slot) + i, sum);
        }
        block_sync();
        if (i < count) {
          float sum = 0, carried = 0;
          for (int j = 0; j < count; ++j) {
            if (j < i)
              sum += sums.load(i * kGradSumsRow + j) * s.load(Gates::kInput, j);
            else
              carried += s.load(Steps::kMore, j);
          }
          store_global(field_of(q, p, kGradInside, slot) + i, sum + carried);
        }
        if (i == 0) store_global(q.decay + slot, s.load(Gates::kDecay, 0));
      };

#pragma unroll
      for (int i = 0; i < kGradSlices; ++i) clear(Z[i]);
      in_turn<kParts>(
          met_all + last,
          [&](int i) {
            int array = block.kK, row = 0, rows = count,
                column = (first + i - met_all) * kGradSteps, size = K;
            if (i >= products && i < met_all) {
              array = block.kQ, column = (first + i - products) * kGradSteps;
            } else if (i < products) {
              const int kind = i % each - of_U;
              column = i / each * kGradSteps, size = V;
              if (kind + of_U == 0)
                stage(left(i / each), block.rows(block.kG), count, column, V, parts);
              array = kind < 0 ? block.kV : block.kC;
              if (kind >= 0) {
                row = (first + kind) * kGradSteps;
                rows = slice_of(K, row), size = int(q.states.values);
              }
            }
            stage(right(i), block.rows(array).from(row), rows, column, size, parts);
          },
          [&] {
            if (turn == 0) s.make(p, block.chunk(p), block.words.load(block.kHead), q.states);
          },
          [&](int i) {
            if (i < products) {
              const int v = i / each, kind = i % each - of_U;
              if (kind < 0)
                multiply_tiles<MatrixTurned::right, kParts>(
                    U, left(v), right(i),
                    {parts_of(of_h, parts), parts_of(q.element, parts), parts}, depths_of(V, v),
                    lower);
#pragma unroll
              for (int slice = 0; slice < kGradSlices; ++slice)
                if (kind == slice)
                  multiply_tiles<MatrixTurned::right, kParts>(
                      Z[slice], left(v), right(i), {parts_of(of_h, parts), parts, parts},
                      depths_of(V, v), {0, depths_of(K, first + slice)});
            }
#pragma unroll
            for (int slice = 0; slice < kGradSlices; ++slice) {
              if (i >= met_all || i - products != slice) continue;
              const float* const n0 = block.n();
#pragma unroll
              for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int x = 0; x < 4; x += 2) {
                  const int k = column_of(n, x), key = (first + slice) * kGradSteps + k;
                  if (key >= K || row_of(x) >= count) continue;
                  const MatrixPair of_q(right(i), parts_of(of_keys, parts), row_of(x), k);
                  q_carried[x / 2] +=
                      of_q.first * Z[slice][n][x] + of_q.second * Z[slice][n][x + 1];
                  if (n0) // padded
                    r_carried[x / 2] += of_q.first * load_global(n0 + key) +
                                        of_q.second * load_global(n0 + key + 1);
                }
            }
            if (i == met_all - 1 && turn == (empty ? 0 : passes - 1)) find_gradients();
#pragma unroll
            for (int slice = 0; slice < kGradSlices; ++slice) {
              if (i - met_all != slice) continue;
              const int first_key = (first + slice) * kGradSteps;
              const float* const n0 = block.n();
              float carry[2], inverse[2], e[2];
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const int t = row_of(2 * half);
                carry[half] = s.load(Gates::kCarry, t), e[half] = s.load(Steps::kE, t);
                inverse[half] = s.load(Steps::kInverse, t);
              }
#pragma unroll
              for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int x = 0; x < 4; ++x) {
                  const int k = first_key + column_of(n, x);
                  const float of_n = n0 && k < K ? e[x / 2] * load_global(n0 + k) : 0;
                  Z[slice][n][x] = carry[x / 2] * (inverse[x / 2] * Z[slice][n][x] + of_n);
                }
              multiply_sums<kParts>(
                  Z[slice], U, right(i), {parts, parts_of(of_keys, parts), parts}, lower,
                  {0, depths_of(K, first + slice)});
              put_sums(
                  Z[slice], block.out(block.kOutKeys), count, first_key, K, scale,
                  q.shares && of_set > 0);
            }
          });
    }
  }
}

// ---- gradients of the states ----

template <int kParts>
__global__ void __launch_bounds__(kGradThreads, 3)
    matrix_grad_states_kernel(MatrixMemoryBackward p, MatrixGradPlan q) {
  const int K = int(p.key_size), V = int(p.value_size), across = grad_slices(V),
            tiles = grad_slices(K) * across, tile = int(blockIdx.x) % tiles,
            first_key = tile / across * kGradSteps, first = tile % across * kGradSteps;
  const int64_t state = int(blockIdx.x) / tiles, head = state % p.num_heads,
                group = head / (p.num_heads / p.num_groups);
  MatrixGradChunk c(p, state / p.num_heads);
  const int parts = kParts == 1 ? 1 : q.parts;
  const MatrixGradShared shared(parts, false, false);
  const Shared<float> factors =
      shared_memory<float>(shared.steps); // of steps, [stage][of C, of n][step]
  const auto left = [&](int i) { return MatrixOperand(i % grad_stages<kParts> * shared.tile); };
  const auto right = [&](int i) {
    return MatrixOperand((grad_stages<kParts> + i % grad_stages<kParts>)*shared.tile);
  };
  const MatrixElement of_keys = p.wide_keys ? MatrixElement::f32 : q.element,
                      of_h = p.wide_h ? MatrixElement::f32 : q.element;
  const bool normalizes = p.normalizer != Normalizer::none,
             works = 16 * warp() < slice_of(K, first_key);
  const bool has_n = normalizes && first == 0;
  const MatrixRange columns{0, sixteens(slice_of(V, first))};

  // Of n a lane has a share of rows lane / 4 and lane / 4 + 8.
  MatrixSums y;
  float n[2] = {};
  const auto each_n = [&](auto f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t k = first_key + row_of(2 * half);
      if (has_n && k < K && lane() % 4 == 0) f(half, k);
    }
  };
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int64_t k = first_key + row_of(x), v = first + column_of(i, x);
        if (k < K && v < V) f(y[i][x], k, v);
      }
  };
  clear(y);
  const auto& last = p.grad_final_state;
  if (last.C)
    each([&](float& x, int64_t k, int64_t v) {
      x = load_global(
          static_cast<const float*>(last.C) + c.s.index * last.C_row + head * last.C_head +
          k * last.C_key + v * last.C_value);
    });
  if (last.n)
    each_n([&](int half, int64_t k) {
      n[half] = load_global(
          static_cast<const float*>(last.n) + c.s.index * last.n_row + head * last.n_head +
          k * last.n_key);
    });
  // C . grad_C + n . grad_n at the start of a chunk, this warp's share; n is whole.
  const auto with_state = [&](const MatrixGradChunk& at) {
    float sum = 0;
    if (at.starts_empty(p)) return sum;
    const int64_t slot = at.slot * p.num_heads + head;
    const MatrixRows C = rows_of(q.states, slot);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int x = 0; x < 4; x += 2) {
        const int64_t k = first_key + row_of(x), v = first + column_of(i, x);
        if (k >= K || v >= V) continue; // values are padded
        const int64_t place = k * C.step + v;
        if (q.states.wide) {
          const auto two = load_global(reinterpret_cast<const SideBySide<float, 8>*>(
              static_cast<const float*>(C.data) + place));
          sum += y[i][x] * two.get(0) + y[i][x + 1] * two.get(1);
        } else {
          const uint32_t two = load_global(
              reinterpret_cast<const uint32_t*>(static_cast<const BFloat16*>(C.data) + place));
          sum += y[i][x] * low_half(two) + y[i][x + 1] * high_half(two);
        }
      }
    each_n([&](int half, int64_t k) {
      sum += n[half] * load_global(q.states.n + slot * q.states.keys + k);
    });
    return sum_of_warp(sum);
  };
  const auto whole_n = [&] {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      n[half] = sum_of_row(n[half]);
      if (lane() % 4) n[half] = 0;
    }
  };

  const int chunks = int(c.chunks());
  const int q_parts = parts_of(of_keys, parts), h_parts = parts_of(of_h, parts);
  in_turn<kParts>(
      chunks,
      [&](int i) {
        MatrixGradChunk at = c;
        at.move_to(p, chunks - 1 - i);
        if (threadIdx.x < 32) { // fields of C and n, whole
          const int piece = int(threadIdx.x) * 4;
          copy_async16(
              factors, i % grad_stages<kParts> * 2 * kGradSteps + piece,
              field_of(
                  q, p, piece < kGradSteps ? kGradOfC : kGradOfN, at.slot * p.num_heads + head) +
                  piece % kGradSteps);
        }
        stage(left(i), matrix_rows(p.q, at, group, of_keys), at.count, first_key, K, parts);
        stage(right(i), matrix_rows(p.grad_h, at, head, of_h), at.count, first, V, parts);
      },
      [] {},
      [&](int i) {
        MatrixGradChunk at = c;
        at.move_to(p, chunks - 1 - i);
        const int64_t slot = at.slot * p.num_heads + head;
        whole_n();
        const float decay = load_global(q.decay + slot), through = decay * with_state(at);
        if (lane() == 0)
          store_global(q.through + (slot * tiles + tile) * kGradWarps + warp(), through);
        // As it is: a product's operand.
        BFloat16* const to = q.grad_C + slot * parts * K * q.row;
#pragma unroll
        for (int b = 0; b < 8; ++b)
#pragma unroll
          for (int x = 0; x < 4; x += 2) {
            const int64_t k = first_key + row_of(x), v = first + column_of(b, x);
            if (k >= K || v >= q.row) continue;
            float one = y[b][x], two = y[b][x + 1];
            for (int part = 0; part < parts; ++part)
              store_global(
                  reinterpret_cast<uint32_t*>(to + (part * K + k) * q.row + v),
                  take_part(one, two));
          }
        each_n([&](int half, int64_t k) { store_global(q.grad_n + slot * K + k, n[half]); });
#pragma unroll
        for (int b = 0; b < 8; ++b)
#pragma unroll
          for (int x = 0; x < 4; ++x) y[b][x] *= decay;
        n[0] *= decay, n[1] *= decay;
        // The turned q, times its steps' factors.
        const Shared<float> of_C = factors + i % grad_stages<kParts> * 2 * kGradSteps,
                            of_n = of_C + kGradSteps;
        const int depths = works ? sixteens(at.count) : 0;
#pragma unroll 1
        for (int depth = 0; depth < depths; ++depth) {
          float of_q[4][2] = {};
#pragma unroll
          for (int part = (kParts == 1 ? 1 : 3) - 1; part >= 0; --part) {
            if (part >= q_parts) continue;
            FragmentA<1> a;
            load_a_transposed<1>(a, left(i).part(part), 16 * warp(), depth * 16);
#pragma unroll
            for (int word = 0; word < 4; ++word) {
              of_q[word][0] += low_half(a.r[0][word]);
              of_q[word][1] += high_half(a.r[0][word]);
            }
          }
#pragma unroll
          for (int word = 0; word < 4; ++word)
#pragma unroll
            for (int one = 0; one < 2; ++one) {
              const int t = depth * 16 + lane() % 4 * 2 + word / 2 * 8 + one;
              const bool there = t < at.count;
              if (there) n[word % 2] += of_q[word][one] * of_n.load(t);
              of_q[word][one] *= there ? of_C.load(t) : 0.f;
            }
#pragma unroll 1
          for (int part = 0; part < (kParts == 1 ? 1 : parts); ++part) {
            FragmentA<1> a;
#pragma unroll
            for (int word = 0; word < 4; ++word)
              a.r[0][word] = take_part(of_q[word][0], of_q[word][1]);
#pragma unroll 1
            for (int j = 0; j < (kParts == 1 ? 1 : h_parts) && (kParts == 1 || part + j < parts);
                 ++j)
              add_products<MatrixTurned::neither>(y, a, right(i).part(j), depth, columns);
          }
        }
      });
  whole_n();

  const auto& start = p.grad_initial_state;
  if (start.C)
    each([&](float& x, int64_t k, int64_t v) {
      store_global(
          static_cast<float*>(start.C) + c.s.index * start.C_row + head * start.C_head +
              k * start.C_key + v * start.C_value,
          x);
    });
  if (start.n)
    each_n([&](int half, int64_t k) {
      store_global(
          static_cast<float*>(start.n) + c.s.index * start.n_row + head * start.n_head +
              k * start.n_key,
          n[half]);
    });
  if (p.normalizer != Normalizer::stabilized || c.s.steps <= 0) return;
  c.move_to(p, 0);
  const float met = with_state(c);
  if (lane() == 0) store_global(q.at_start + (state * tiles + tile) * kGradWarps + warp(), met);
}

// ---- gradients of k, v and the gates ----

template <int kParts>
__global__ void __launch_bounds__(kGradThreads, 2)
    matrix_grad_keys_kernel(MatrixMemoryBackward p, MatrixGradPlan q) {
  using Gates = MatrixGates;
  using Steps = MatrixGradSteps;
  const int group = int(blockIdx.y) / q.sets, set = int(blockIdx.y) % q.sets,
            heads = int(p.num_heads / p.num_groups);
  const int parts = kParts == 1 ? 1 : q.parts;
  const MatrixGradShared shared(parts, true, false);
  const MatrixGradBlock block{shared_memory<int64_t>(shared.block)};
  const MatrixElement of_keys = p.wide_keys ? MatrixElement::f32 : q.element,
                      of_h = p.wide_h ? MatrixElement::f32 : q.element;
  int count;
  {
    const MatrixGradChunk c = MatrixGradChunk::of_slot(p, blockIdx.x);
    if (c.count <= 0) return;
    count = c.count;
    if (threadIdx.x == 0) {
      block.put(c);
      block.put(block.kQ, matrix_rows(p.q, c, group, of_keys));
      block.put(block.kK, matrix_rows(p.k, c, group, of_keys));
      const MatrixOut out(p.grad_k, c, group, of_keys), share = share_rows(q, p, c, group, 1, set);
      block.put(block.kOutKeys, share.data ? share : out);
    }
    block_sync();
  }
  const int K = int(p.key_size), V = int(p.value_size);
  const Shared<float> scores = shared_memory<float>(shared.scores);
  const Steps s{shared_memory<float>(shared.steps)};
  // Rows are steps j, columns steps t: what counts is on the diagonal and above it.
  const bool works = 16 * warp() < count;
  const MatrixRange upper{warp(), works ? sixteens(count) : 0};
  const int rows[] = {row_of(0), row_of(2)};

  const auto left = [&](int i) { return MatrixOperand(i % grad_stages<kParts> * shared.tile); };
  const auto right = [&](int i) {
    return MatrixOperand((grad_stages<kParts> + i % grad_stages<kParts>)*shared.tile);
  };
  const auto depths_of = [&](int64_t size, int slice) {
    return works ? sixteens(slice_of(size, slice * kGradSteps)) : 0;
  };
  const int across_K = grad_slices(K), across_V = grad_slices(V), of_q = parts_of(of_keys, parts),
            of_k = of_q, of_g = parts_of(of_h, parts), of_v = parts_of(q.element, parts);

  MatrixSums U, P, y;
  clear(U);
  in_turn<kParts>(
      across_K,
      [&](int i) {
        stage(left(i), block.rows(block.kK), count, i * kGradSteps, K, parts);
        stage(right(i), block.rows(block.kQ), count, i * kGradSteps, K, parts);
      },
      [] {},
      [&](int i) {
        multiply_tiles<MatrixTurned::right, kParts>(
            U, left(i), right(i), {of_k, of_q, parts}, depths_of(K, i), upper);
      });
  keep(scores, U, float(p.scale));
#pragma unroll 1
  for (int of_set = 0; of_set < q.set_heads; ++of_set) {
    const int of_group = set * q.set_heads + of_set, head = group * heads + of_group;
    if (of_group >= heads) break;
    if (threadIdx.x == 0) {
      const MatrixGradChunk c = block.chunk(p);
      const int64_t slot = c.slot * p.num_heads + head;
      block.put(block.kG, matrix_rows(p.grad_h, c, head, of_h));
      block.put(block.kV, matrix_rows(p.v, c, head, q.element));
      block.put(block.kC, q.grad_C + slot * parts * K * q.row, q.row, 1, MatrixElement::bf16);
      block.put(block.kOutValues, MatrixOut(p.grad_v, c, head, q.element));
      block.put_n(p.normalizer != Normalizer::none ? q.grad_n + slot * K : nullptr);
    }
    block_sync();
    float end[2] = {}, to_end[2] = {}; // without and with the input scale
    float k_end[2] = {};               // what keys meet of the gradient of the state at the end

    const auto find_scores = [&] {
      const MatrixFactor last = MatrixFactor::of(s, Gates::kRow, count - 1),
                         column[] = {
                             MatrixFactor::of(s, Gates::kColumn, rows[0]),
                             MatrixFactor::of(s, Gates::kColumn, rows[1])};
      float input[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool there = rows[half] < count;
        input[half] = s.load(Gates::kInput, rows[half]);
        end[half] = there ? weight_of(last, column[half]) : 0;
        to_end[half] = end[half] * input[half];
      }
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const int t = column_of(n, x), j = rows[x / 2];
          if (t < j || t >= count) {
            P[n][x] = U[n][x] = 0;
            continue;
          }
          const float weight = weight_of(MatrixFactor::of(s, Gates::kRow, t), column[x / 2]) *
                               input[x / 2],
                      inverse = s.load(Steps::kInverse, t);
          P[n][x] = weight * kept(scores, n, x) * inverse;
          U[n][x] = weight * float(p.scale) * (U[n][x] * inverse + s.load(Steps::kE, t));
        }
    };

    // For each slice of values U's product; for each slice of values those of keys and the gradient at the end, then
    // that of P; for each slice of keys those of values and that gradient, then that of U.
    const int for_v = across_K + 1, for_k = across_V + 1, first_v = across_V,
              first_k = first_v + across_V * for_v, items = first_k + across_K * for_k;
    clear(U);
    in_turn<kParts>(
        items,
        [&](int i) {
          int of_left = block.kV, from_left = i * kGradSteps, of_right = block.kG,
              from_right = from_left, key = -1; // of the gradient at the end, if it comes
          if (i >= first_k) {
            const int k = (i - first_k) / for_k * kGradSteps,
                      v = (i - first_k) % for_k * kGradSteps;
            from_left = from_right = v, key = k;
            if (v == across_V * kGradSteps) of_left = key = -1, of_right = block.kQ, from_right = k;
          } else if (i >= first_v) {
            const int v = (i - first_v) / for_v * kGradSteps,
                      k = (i - first_v) % for_v * kGradSteps;
            of_left = block.kK, from_left = key = k, from_right = v;
            if (k == across_K * kGradSteps) of_left = key = -1;
          }
          if (key < 0 && i >= first_k) of_left = block.kK, from_left = from_right;
          if (of_left >= 0)
            stage(
                left(i), block.rows(of_left), count, from_left, of_left == block.kV ? V : K, parts);
          if (key >= 0)
            stage_parts(right(i), block.rows(block.kC), K, key, from_right, parts);
          else
            stage(
                right(i), block.rows(of_right), count, from_right, of_right == block.kG ? V : K,
                parts);
        },
        [&] {
          const MatrixGradChunk c = block.chunk(p);
          s.make(p, c, head, q.states);
          if (int(threadIdx.x) < count) {
            const auto load = [&](int field) {
              return load_global(field_of(q, p, field, c.slot * p.num_heads + head) + threadIdx.x);
            };
            s.store(Steps::kInverse, int(threadIdx.x), load(kGradInverse));
            s.store(Steps::kE, int(threadIdx.x), load(kGradE));
          }
        },
        [&](int i) {
          if (i < first_v) {
            multiply_tiles<MatrixTurned::right, kParts>(
                U, left(i), right(i), {of_v, of_g, parts}, depths_of(V, i), upper);
            if (i == first_v - 1) find_scores();
          } else if (i < first_k) {
            const int v = (i - first_v) / for_v, k = (i - first_v) % for_v;
            const MatrixRange columns{0, depths_of(V, v)};
            if (k == 0) clear(y);
            if (k < across_K)
              return multiply_tiles<MatrixTurned::neither, kParts>(
                  y, left(i), right(i), {of_k, parts, parts}, depths_of(K, k), columns);
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
              for (int x = 0; x < 4; ++x) y[n][x] *= to_end[x / 2];
            multiply_sums<kParts>(y, P, right(i), {parts, of_g, parts}, upper, columns);
            put_sums(y, block.out(block.kOutValues), count, v * kGradSteps, V, 1);
          } else {
            const int k = (i - first_k) / for_k, v = (i - first_k) % for_k;
            const MatrixRange columns{0, depths_of(K, k)};
            if (v == 0) clear(y);
            if (v < across_V)
              return multiply_tiles<MatrixTurned::right, kParts>(
                  y, left(i), right(i), {of_v, parts, parts}, depths_of(V, v), columns);
            const float* const of_n = block.n();
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
              for (int x = 0; x < 4; x += 2) {
                const int column = column_of(n, x), key = k * kGradSteps + column;
                if (key < K && rows[x / 2] < count) {
                  const MatrixPair pair(left(i), of_k, rows[x / 2], column);
                  if (of_n) {
                    y[n][x] += load_global(of_n + key);
                    if (key + 1 < K) y[n][x + 1] += load_global(of_n + key + 1);
                  }
                  k_end[x / 2] += y[n][x] * pair.first + y[n][x + 1] * pair.second;
                }
                y[n][x] *= to_end[x / 2], y[n][x + 1] *= to_end[x / 2];
              }
            multiply_sums<kParts>(y, U, right(i), {parts, of_q, parts}, upper, columns);
            put_sums(
                y, block.out(block.kOutKeys), count, k * kGradSteps, K, 1, q.shares && of_set > 0);
          }
        });
    // From here on: what a step has of the state's end, and of it what the input scale has.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = sum_of_row(k_end[half]);
      if (lane() % 4 == 0 && rows[half] < count) {
        s.store(Steps::kE, rows[half], end[half] * sum);
        s.store(Steps::kMore, rows[half], to_end[half] * sum);
      }
    }
    block_sync();
    const int t = int(threadIdx.x);
    if (t < count) {
      const MatrixGradChunk c = block.chunk(p);
      const int64_t slot = c.slot * p.num_heads + head;
      const int64_t shares = grad_slices(K) * grad_slices(V) * kGradWarps;
      float through = 0;
      for (int64_t i = 0; i < shares; ++i) through += load_global(q.through + slot * shares + i);
      float ended = 0, before = 0; // by all steps, and by those before this one
      for (int j = 0; j < count; ++j) {
        if (j == t) before = ended;
        ended += s.load(Steps::kMore, j);
      }
      if (t == 0 && c.is_last())
        store_global(q.at_end + c.s.index * p.num_heads + head, through + ended);
      const float own = load_global(field_of(q, p, kGradOwn, slot) + t) + s.load(Steps::kE, t);
      put_gate(p.grad_input_scale, c, t, head, own);
      put_gate(p.grad_log_input, c, t, head, own * s.load(Gates::kInput, t));
      put_gate(
          p.grad_log_decay, c, t, head,
          load_global(field_of(q, p, kGradInside, slot) + t) + before + through);
    }
    block_sync(); // the next head's gates
  }
}

// ---- the gradient of the stabiliser ----

// Of m at a step where it is that of the step before, decayed, it goes on to that one and to the decay; else it ends
// at the input. A warp per head and sequence goes from the last steps to the first, 32 at a time.
__global__ void __launch_bounds__(32)
    matrix_grad_maxima_kernel(MatrixMemoryBackward p, MatrixGradPlan q) {
  MatrixGradChunk c(p, blockIdx.x / p.num_heads);
  const int64_t head = blockIdx.x % p.num_heads, state = c.s.index * p.num_heads + head;
  double m = 0; // the gradient that comes from later steps
  const auto& last = p.grad_final_state;
  if (last.m)
    m = load_global(
        static_cast<const float*>(last.m) + c.s.index * last.m_row + head * last.m_head);
  if (c.s.steps > 0)
    m -= double(load_global(q.at_end + state)); // the last C and n are divided by e^m
  for (int64_t chunk = c.chunks() - 1; chunk >= 0; --chunk) {
    c.move_to(p, chunk);
    for (int half = c.count > 32; half >= 0; --half) {
      const int t = half * 32 + lane();
      const bool there = t < c.count;
      const auto load = [&](int field) {
        return there ? load_global(field_of(q, p, field, c.slot * p.num_heads + head) + t) : 0.f;
      };
      const float own = load(kGradOfM);
      const bool decayed = !there || load(kGradDecayed) != 0;
      const unsigned goes_on = ballot(~0u, decayed);
      double mine = 0;
#pragma unroll
      for (int i = 31; i >= 0; --i) {
        m += double(shuffle(~0u, own, i));
        if (lane() == i) mine = m;
        if (!(goes_on >> i & 1)) m = 0;
      }
      const PerHead<void*>& to = decayed ? p.grad_log_decay : p.grad_log_input;
      if (there && to.data) {
        float* const at = static_cast<float*>(to.data) + c.place(to, t, head);
        store_global(at, float(double(load_global(at)) + mine));
      }
    }
  }
  const auto& start = p.grad_initial_state;
  if (lane() != 0 || !start.m) return;
  if (c.s.steps > 0) { // C0 and n0 are divided by e^m0
    const int64_t shares = grad_slices(p.key_size) * grad_slices(p.value_size) * kGradWarps;
    for (int64_t i = 0; i < shares; ++i) m += double(load_global(q.at_start + state * shares + i));
  }
  store_global(
      static_cast<float*>(start.m) + c.s.index * start.m_row + head * start.m_head, float(m));
}

// ---- sums over the heads that share queries and keys ----

__global__ void __launch_bounds__(kGradThreads)
    matrix_grad_shared_kernel(MatrixMemoryBackward p, MatrixGradPlan q) {
  const int64_t K = p.key_size,
                all = (p.cu_seqlens ? 1 : p.num_sequences) * p.num_steps * p.num_groups * K,
                i = int64_t(blockIdx.x) * kGradThreads + threadIdx.x;
  if (i >= all) return;
  const int64_t k = i % K, group = i / K % p.num_groups, token = i / K / p.num_groups;
  for (int which = 0; which < 2; ++which) {
    float sum = 0;
    for (int64_t set = 0; set < q.sets; ++set) sum += load_global(share_of(q, p, which, set) + i);
    const OverHeads<void*>& to = which ? p.grad_k : p.grad_q;
    MatrixOut out{to.data, 0, 0, p.wide_keys ? MatrixElement::f32 : q.element};
    out.step = token / p.num_steps * to.sequence + token % p.num_steps * to.time + group * to.head +
               k * to.channel;
    out.put(1, 0, sum);
  }
}

} // namespace torch_ext::cuda
