// Matrix memories with a scalar decay on CUDA (core/matrix_memory_problem.h), chunk by chunk, from matrix products of 16-bit
// operands (mma.cuh) with float32 sums. Two kernels:
//
//   states    a block per sequence, head and part of the state, which steps from chunk to chunk and writes what it is at
// the start
//             of each; and the final state
//   outputs   a block per 64 steps, head and part of the values, all in parallel
//
// In a chunk, with F[t] the sum of its log decays up to t, m0 and m the stabiliser (0 where there is none):
//
//   W[t][j]  = exp(F[t] - F[j] + log_input[j] - m[t]), j <= t       carry[t] = exp(F[t] + m0 - m[t])
//   P        = scale q k^T o W o input_scale
//   numerator = P v + carry o (scale q C0)          r = P 1 + carry o (scale q n0)
//   C        = decay C0 + (to_end o k)^T v          likewise n, with 1 for v
//
// m[t] = F[t] + max(m0, max over j <= t of log_input[j] - F[j]): a running maximum of one number per step. In W a block
// of 16 columns below the diagonal has a factor per row and one per column; only blocks on the diagonal take an
// exponential per element.
//
// F, m and their differences are sums in double, kept as two floats: gates of -1e4 would take the last digits of what
// follows.
#pragma once
#include "../core/matrix_memory_problem.h"
#include "mma.cuh"

namespace torch_ext::cuda {

inline constexpr int kMatrixThreads = 128;
inline constexpr int kMatrixChunk = 128; // steps from state to state
inline constexpr int kMatrixRows = 64;   // steps of a tile

// ---- sequences and chunks ----

// A sequence's place, and the place of its t-th step in the order of the recurrence.
struct MatrixSequence {
  int64_t index, row, begin, steps;
  bool reverse;
  TORCH_EXT_DEVICE MatrixSequence(const MatrixMemoryProblem& p, int64_t s)
      : index(s), row(p.cu_seqlens ? 0 : s), begin(0), steps(p.num_steps), reverse(p.reverse) {
    if (p.cu_seqlens) {
      begin = load_global(p.cu_seqlens + s);
      steps = load_global(p.cu_seqlens + s + 1) - begin;
    }
  }
  TORCH_EXT_DEVICE int64_t token(int64_t t) const { return begin + (reverse ? steps - 1 - t : t); }
  TORCH_EXT_DEVICE int64_t chunks() const { return (steps + kMatrixChunk - 1) / kMatrixChunk; }
};
TORCH_EXT_HOST_DEVICE int64_t
matrix_chunks_before(const MatrixMemoryProblem& p, int64_t sequence, int64_t first_token) {
  return matrix_memory_chunks_before(p, kMatrixChunk, sequence, first_token);
}
// Slots for chunks, of all sequences. Where they are packed, some stay empty.
TORCH_EXT_HOST_DEVICE int64_t matrix_slots(const MatrixMemoryProblem& p) {
  return matrix_chunks_before(p, p.num_sequences, p.num_steps);
}
struct MatrixChunk {
  int64_t sequence, chunk; // which may lie behind the sequence's last
};
TORCH_EXT_DEVICE MatrixChunk matrix_chunk_of(const MatrixMemoryProblem& p, int64_t slot) {
  if (!p.cu_seqlens) {
    const int64_t each = (p.num_steps + kMatrixChunk - 1) / kMatrixChunk;
    return {slot / each, slot % each};
  }
  int64_t low = 0, high = p.num_sequences - 1; // the last whose slots begin here or before
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (matrix_chunks_before(p, middle, load_global(p.cu_seqlens + middle)) <= slot)
      low = middle;
    else
      high = middle - 1;
  }
  return {low, slot - matrix_chunks_before(p, low, load_global(p.cu_seqlens + low))};
}

// ---- states at the starts of chunks, in a workspace ----

struct MatrixStates {
  void* C = nullptr;               // (slot, head, key, value), bfloat16 or float
  float* n = nullptr;              // (slot, head, key)
  double* m = nullptr;             // (slot, head)
  bool wide = false;               // C is float
  int64_t keys = 0, values = 0;    // padded to 16, with zeros
  int64_t interval = kMatrixChunk; // steps from state to state: kMatrixRows, or twice as many
};
// Is the state at the start of this chunk zero, and therefore not written?
TORCH_EXT_DEVICE bool matrix_starts_empty(const MatrixMemoryProblem& p, int64_t chunk) {
  return chunk == 0 && !p.initial_state.C && !p.initial_state.n && !p.initial_state.m;
}

// ---- gates of a chunk ----

// e^x from 0 to infinity.
TORCH_EXT_DEVICE float exp_weight(float x) { return exp2_bounded(x * 1.44269504f); }

// In shared memory, floats: arrays over the steps of a chunk, then what it has one of per 16 steps, and one of. What
// lies behind the last step takes no part: weights and factors from and to it are 0.
struct MatrixGates {
  static constexpr int L = kMatrixChunk;
  static constexpr int kToEnd = 0;       // of step j, to the end, with its input scale
  static constexpr int kDecay = L;       // of the state at the start, to the end
  static constexpr int kEndSize = L + 4; // what the states' kernel needs
  static constexpr int kRow =
      L + 4; // exp(row[t] + column[j]) is W; each as a sum of two, the second L later
  static constexpr int kColumn = kRow + 2 * L;
  static constexpr int kBlock = kColumn + 2 * L; // the largest column of 16, likewise a sum of two
  static constexpr int kFactor =
      kBlock + L / 8; // exp(column[j] - block[j / 16]) with its input scale: at most that
  static constexpr int kCarry = kFactor + L;
  static constexpr int kLeast = kCarry + L; // of |r|
  static constexpr int kInput = kLeast + L; // input scales
  static constexpr int kSize = kInput + L;
  Shared<float> data;
};

TORCH_EXT_DEVICE double larger(double x, double y) { return y > x ? y : x; }
TORCH_EXT_DEVICE void store_split(Shared<float> to, int high, int low, double x) {
  const float first = float(x), rest = float(x - double(first));
  to.store(high, first);
  to.store(low, rest - rest == 0.f ? rest : 0.f);
}

// By one warp, of the steps first .. first + count of a sequence; m0: the stabiliser before them. Returns the one after
// them. kAll: all of MatrixGates; else what it has first.
template <bool kAll>
TORCH_EXT_DEVICE double matrix_gates(
    const MatrixMemoryProblem& p, const MatrixSequence& s, int64_t first, int count, int64_t head,
    double m0, Shared<float> to) {
  constexpr int kSteps = kMatrixChunk / 32; // of a lane
  using G = MatrixGates;
  const bool stabilized = p.normalizer == Normalizer::stabilized;
  double F[kSteps], column[kSteps], most[kSteps];
  float input[kSteps];
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int t = lane() * kSteps + i;
    double decay = 0, log_input = -HUGE_VAL;
    input[i] = 0;
    if (t < count) {
      const int64_t token = s.token(first + t);
      const auto gate = [&](const PerHead<const void*>& g, float other) {
        if (!g.data) return other;
        return load_global(
            static_cast<const float*>(g.data) + s.row * g.sequence + token * g.time +
            head * g.head);
      };
      decay = double(gate(p.log_decay, 0.f));
      if (decay < -1e9) decay = -1e9; // F stays finite and its differences exact
      log_input = double(gate(p.log_input, 0.f));
      input[i] = gate(p.input_scale, 1.f);
    }
    sum += decay;
    F[i] = sum;
    column[i] = log_input;
  }
  double before = sum;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const double other = shuffle_up(~0u, before, delta);
    if (lane() >= delta) before += other;
  }
  before = shuffle_up(~0u, before, 1);
  if (lane() == 0) before = 0;
  double largest = -HUGE_VAL;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    F[i] += before;
    column[i] -= F[i];
    largest = larger(largest, column[i]);
    most[i] = largest;
  }
  double block = largest; // of 16 steps
  if constexpr (kAll) {
#pragma unroll
    for (int bits = 1; bits * kSteps < 16; bits *= 2)
      block = larger(block, shuffle_xor(~0u, block, bits));
    block = larger(block, -1e30);
  }
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const double other = shuffle_up(~0u, largest, delta);
    if (lane() >= delta) largest = larger(largest, other);
  }
  largest = shuffle_up(~0u, largest, 1);
  if (lane() == 0) largest = -HUGE_VAL;
  double m = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (!kAll && i + 1 < kSteps) continue; // of the last step alone
    const int t = lane() * kSteps + i;
    if (stabilized) m = F[i] + larger(m0, larger(largest, most[i]));
    if constexpr (kAll) {
      const double row = F[i] - larger(m, -1e30);
      const bool there = t < count;
      store_split(to, G::kRow + t, G::kRow + G::L + t, row);
      store_split(to, G::kColumn + t, G::kColumn + G::L + t, column[i]);
      to.store(G::kFactor + t, there ? input[i] * exp_weight(float(column[i] - block)) : 0.f);
      to.store(G::kCarry + t, there ? exp_weight(float(row + m0)) : 0.f);
      to.store(G::kLeast + t, stabilized ? exp_weight(float(-m)) : 1.f);
      to.store(G::kInput + t, input[i]);
    }
  }
  if constexpr (kAll)
    if (lane() % (16 / kSteps) == 0) {
      const int at = G::kBlock + lane() * kSteps / 16;
      store_split(to, at, at + G::L / 16, block);
    }
  // Behind the last step nothing decays and nothing is added. C and n are divided by an m that a float can be: it is a
  // state, too.
  m = double(float(shuffle(~0u, m, 31)));
  const double row = shuffle(~0u, F[kSteps - 1], 31) - larger(m, -1e30);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int t = lane() * kSteps + i;
    to.store(G::kToEnd + t, t < count ? input[i] * exp_weight(float(row + column[i])) : 0.f);
  }
  if (lane() == 0) to.store(G::kDecay, exp_weight(float(row + m0)));
  return stabilized ? m : 0.;
}

// ---- tiles from global memory ----

enum class MatrixElement : int { bf16, f16, f32, f64 };
// How q, k and v lie in memory.
struct MatrixLayout {
  MatrixElement keys = MatrixElement::f32, values = MatrixElement::f32; // of q and k; of v
  bool q = false, k = false, v = false;                                 // whole pieces of 16 bytes?
};
// Steps first .. first + rows of an array over heads, and its columns from `column` on.
struct MatrixSource {
  const char* data;
  int64_t row, column; // bytes from one to the next
  int rows, columns;   // what is there of the tile; zeros else
  MatrixElement element;
  bool pieces;
  TORCH_EXT_DEVICE MatrixSource(
      const OverHeads<const void*>& x, const MatrixSequence& s, int64_t first, int64_t count,
      int64_t head, int64_t from, int64_t size, MatrixElement element, bool pieces)
      : element(element), pieces(pieces) {
    const int64_t bytes = element == MatrixElement::f32 ? 4 : 2;
    row = x.time * (s.reverse ? -bytes : bytes), column = x.channel * bytes;
    rows = int(count < kMatrixRows ? count : int64_t(kMatrixRows));
    columns = int(size - from < 1024 ? size - from : int64_t(1024));
    data = static_cast<const char*>(x.data);
    if (rows > 0)
      data +=
          (s.row * x.sequence + s.token(first) * x.time + head * x.head + from * x.channel) * bytes;
  }
  // Of the state at the start of a chunk: some keys.
  TORCH_EXT_DEVICE MatrixSource(
      const MatrixStates& x, int64_t state, int64_t key, int64_t value, int count)
      : element(x.wide ? MatrixElement::f32 : MatrixElement::bf16), pieces(true) {
    column = x.wide ? 4 : 2, row = x.values * column;
    rows = int(x.keys - key < count ? x.keys - key : int64_t(count));
    columns = int(x.values - value < 1024 ? x.values - value : int64_t(1024));
    data = static_cast<const char*>(x.C) + ((state * x.keys + key) * x.values + value) * column;
  }
};
TORCH_EXT_DEVICE float load_element(const char* from, MatrixElement element) {
  if (element == MatrixElement::f32) return load_global(reinterpret_cast<const float*>(from));
  if (element == MatrixElement::f16)
    return to_float(load_global(reinterpret_cast<const Half*>(from)));
  return to_float(load_global(reinterpret_cast<const BFloat16*>(from)));
}
// By all threads, to rows and columns of a tile from its start on. Asynchronous where it can be: the caller commits and
// waits.
template <int kParts, int kRows, int kColumns>
TORCH_EXT_DEVICE void load_tile(const MatrixTile& to, const MatrixSource& from) {
  using Piece = SideBySide<BFloat16>;
  const int thread = int(threadIdx.x);
  if constexpr (kParts == 1) {
    if (from.pieces && from.element == MatrixElement::bf16) {
      constexpr int kAcross = kColumns / 8, kDown = kMatrixThreads / kAcross;
      static_assert(kRows % kDown == 0);
      const int column = thread % kAcross * 8;
      const bool inside = column < from.columns;
      const char* at = from.data + (thread / kAcross) * from.row + column * 2;
#pragma unroll
      for (int i = 0; i < kRows / kDown; ++i) {
        const int row = thread / kAcross + i * kDown;
        if (inside && row < from.rows)
          copy_async16(to.data, row * to.pitch + column, at);
        else
          (to.data + (row * to.pitch + column)).template view<Piece>().store(0, Piece{});
        at += kDown * from.row;
      }
      return;
    }
  }
  using Four = SideBySide<BFloat16, 8>;
  constexpr int kAcross = kColumns / 4;
#pragma unroll 4
  for (int i = thread; i < kRows * kAcross; i += kMatrixThreads) {
    const int row = i / kAcross, column = i % kAcross * 4;
    float x[4] = {0, 0, 0, 0};
    if (row < from.rows && column < from.columns) {
      const char* const at = from.data + row * from.row + column * from.column;
      if (from.pieces && from.element == MatrixElement::f32) {
        const auto four = load_global(reinterpret_cast<const SideBySide<float>*>(at));
#pragma unroll
        for (int k = 0; k < 4; ++k) x[k] = four.get(k);
      } else if (from.pieces) {
        const auto four = load_global(reinterpret_cast<const SideBySide<Half, 8>*>(at));
#pragma unroll
        for (int k = 0; k < 4; ++k)
          x[k] = from.element == MatrixElement::f16 ? four.widen(k)
                                                    : to_float(BFloat16{four.get(k).bits});
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (column + k < from.columns) x[k] = load_element(at + k * from.column, from.element);
      }
    }
    uint32_t first[kParts], second[kParts];
    split_pair<kParts>(x[0], x[1], first), split_pair<kParts>(x[2], x[3], second);
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      (to.data + (part * to.part + row * to.pitch + column))
          .template view<Four>()
          .store(0, Four{{first[part], second[part]}});
  }
}

// ---- the states' kernel ----

template <int kParts, int kKeys, int kValues>
struct MatrixStatesShared { // bytes
  static constexpr int kStages = kParts == 1 ? 2 : 1;
  static constexpr int kKeyTile = matrix_tile_size(kMatrixRows, kKeys),
                       kValueTile = matrix_tile_size(kMatrixRows, kValues);
  static constexpr int kStage = (kKeyTile + kValueTile) * kParts * 2;
  static constexpr int kM = kStage * kStages; // doubles, of two chunks
  static constexpr int kGates = kM + 16;      // of two chunks
  static constexpr int kBytes = kGates + 2 * MatrixGates::kEndSize * 4;
};

// A block: a sequence, a head, kKeys keys and kValues values of the state, which is in registers. Null arrays are not
// written.
template <int kParts, int kKeys, int kValues>
__global__ void __launch_bounds__(kMatrixThreads, 2) matrix_memory_states_kernel(
    MatrixMemoryProblem p, MatrixLayout layout, MatrixStates states,
    MatrixState<void*> final_state) {
  using Memory = MatrixStatesShared<kParts, kKeys, kValues>;
  using G = MatrixGates;
  constexpr int kKeyWarps = kKeys / 32, kValueWarps = 4 / kKeyWarps,
                kWarpValues = kValues / kValueWarps, kBlocks = kWarpValues / 8;
  const int64_t key_slices =
                    (p.key_size + kKeys - 1) / kKeys > 1 ? (p.key_size + kKeys - 1) / kKeys : 1,
                value_slices = (p.value_size + kValues - 1) / kValues > 1
                                   ? (p.value_size + kValues - 1) / kValues
                                   : 1;
  int64_t item = blockIdx.x;
  const int64_t first_value = item % value_slices * kValues;
  item /= value_slices;
  const int64_t first_key = item % key_slices * kKeys;
  item /= key_slices;
  const int64_t head = item % p.num_heads;
  const MatrixSequence s(p, item / p.num_heads);
  const int64_t group = head / (p.num_heads / p.num_groups);
  const int64_t first_slot = matrix_memory_chunks_before(p, states.interval, s.index, s.begin);
  const int64_t tiles = (s.steps + kMatrixRows - 1) / kMatrixRows;
  const bool with_n = p.normalizer != Normalizer::none && first_value == 0,
             with_m = p.normalizer == Normalizer::stabilized;

  const int g = lane() / 4, pair = lane() % 4 * 2;
  const int warp_key = warp() % kKeyWarps * 32, warp_value = warp() / kKeyWarps * kWarpValues;
  const Shared<double> shared_m = shared_memory<double>(Memory::kM);
  const Shared<float> shared_gates = shared_memory<float>(Memory::kGates);
  const auto tile = [&](int stage, bool values) {
    return MatrixTile{
        shared_memory<BFloat16>(
            stage * Memory::kStage + (values ? Memory::kKeyTile * kParts * 2 : 0)),
        matrix_tile_pitch(values ? kValues : kKeys),
        values ? Memory::kValueTile : Memory::kKeyTile};
  };
  const auto issue = [&](int64_t t) {
    const int stage = int(t % Memory::kStages);
    const int64_t first = t * kMatrixRows;
    load_tile<kParts, kMatrixRows, kKeys>(
        tile(stage, false),
        MatrixSource(
            p.k, s, first, s.steps - first, group, first_key, p.key_size, layout.keys, layout.k));
    load_tile<kParts, kMatrixRows, kValues>(
        tile(stage, true), MatrixSource(
                               p.v, s, first, s.steps - first, head, first_value, p.value_size,
                               layout.values, layout.v));
  };
  const auto gates_of = [&](int64_t chunk, double m0) { // by one warp
    const int64_t first = chunk * states.interval;
    const int64_t count = s.steps - first;
    const double m = matrix_gates<false>(
        p, s, first, int(count < states.interval ? count : states.interval), head, m0,
        shared_gates + int(chunk % 2) * G::kEndSize);
    if (lane() == 0) shared_m.store(int(chunk % 2), m);
  };

  // The state: of key warp_key + 16 a + g (and + 8) and value warp_value + 8 b + pair (and + 1). n: a lane's share of a
  // sum over four lanes.
  float C[2][kBlocks][4], n[2][2];
  double m0 = 0;
  if (tiles > 0 && warp() == 0) {
    if (with_m && p.initial_state.m)
      m0 = double(load_global(
          static_cast<const float*>(p.initial_state.m) + s.index * p.initial_state.m_row +
          head * p.initial_state.m_head));
    gates_of(0, m0);
  }
  if constexpr (Memory::kStages == 2) {
    if (tiles > 0) issue(0);
    copy_async_commit();
  }
  const auto each = [&](auto f) { // of the lane's elements: f(key, value, element)
#pragma unroll
    for (int a = 0; a < 2; ++a)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          f(first_key + warp_key + 16 * a + g + i / 2 * 8,
            first_value + warp_value + 8 * b + pair + i % 2, C[a][b][i]);
  };
  const auto each_n = [&](auto f) {
#pragma unroll
    for (int a = 0; a < 2; ++a)
#pragma unroll
      for (int i = 0; i < 2; ++i) f(first_key + warp_key + 16 * a + g + 8 * i, n[a][i]);
  };
  {
    const auto& from = p.initial_state;
    each([&](int64_t key, int64_t value, float& x) {
      x = 0;
      if (from.C && key < p.key_size && value < p.value_size)
        x = load_global(
            static_cast<const float*>(from.C) + s.index * from.C_row + head * from.C_head +
            key * from.C_key + value * from.C_value);
    });
    each_n([&](int64_t key, float& x) {
      x = 0;
      if (from.n && with_n && key < p.key_size && lane() % 4 == 0)
        x = load_global(
            static_cast<const float*>(from.n) + s.index * from.n_row + head * from.n_head +
            key * from.n_key);
    });
  }
  const auto sum_of_four = [](float x) {
    x += shuffle_xor(~0u, x, 1);
    return x + shuffle_xor(~0u, x, 2);
  };
  // What of n and m this block and this lane write.
  const bool writes_n = with_n && warp_value == 0,
             writes_m = first_key == 0 && first_value == 0 && threadIdx.x == 0;

  double m = 0; // before the chunk; thread 0 alone knows it
  if (threadIdx.x == 0) m = m0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t chunk = t * kMatrixRows / states.interval;
    const bool starts = t * kMatrixRows % states.interval == 0;
    if constexpr (Memory::kStages == 2) {
      if (t + 1 < tiles) issue(t + 1);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      issue(t);
    }
    block_sync();
    const Shared<float> gates = shared_gates + int(chunk % 2) * G::kEndSize;
    if (starts) {
      if (states.C && !matrix_starts_empty(p, chunk)) {
        const int64_t at = (first_slot + chunk) * p.num_heads + head;
#pragma unroll
        for (int a = 0; a < 2; ++a)
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int64_t key = first_key + warp_key + 16 * a + g + 8 * i,
                            value = first_value + warp_value + 8 * b + pair;
              if (key >= states.keys || value >= states.values) continue;
              const int64_t to = (at * states.keys + key) * states.values + value;
              const float first = C[a][b][2 * i], second = C[a][b][2 * i + 1];
              if (states.wide) {
                const float both[] = {first, second};
                store_global(
                    reinterpret_cast<SideBySide<float, 8>*>(static_cast<float*>(states.C) + to),
                    SideBySide<float, 8>::narrow(both));
              } else {
                store_global(
                    reinterpret_cast<uint32_t*>(static_cast<BFloat16*>(states.C) + to),
                    pack_pair<BFloat16>(first, second));
              }
            }
        if (writes_n)
          each_n([&](int64_t key, float x) {
            x = sum_of_four(x);
            if (key < states.keys && lane() % 4 == 0)
              store_global(states.n + at * states.keys + key, x);
          });
        if (writes_m && states.m) store_global(states.m + at, m);
      }
      // The next chunk's gates, beside this one's products.
      if (warp() == int(chunk % 4) && (chunk + 1) * states.interval < s.steps)
        gates_of(chunk + 1, shared_m.load(int(chunk % 2)));
      if (threadIdx.x == 0) m = shared_m.load(int(chunk % 2));
      const float decay = gates.load(G::kDecay);
      each([&](int64_t, int64_t, float& x) { x *= decay; });
      each_n([&](int64_t, float& x) { x *= decay; });
    }
    const int stage = int(t % Memory::kStages);
    const MatrixTile keys = tile(stage, false), values = tile(stage, true);
    const int first = int(t * kMatrixRows % states.interval);
#pragma unroll 1
    for (int k = 0; k < kMatrixRows; k += 16) {
      const int at = G::kToEnd + first + k + pair;
      const float factors[] = {
          gates.load(at), gates.load(at + 1), gates.load(at + 8), gates.load(at + 9)};
      FragmentA<kParts> a[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_a_transposed(a[i], keys, warp_key + 16 * i, k);
        scale_columns(a[i], factors, n[i]);
      }
#pragma unroll
      for (int b = 0; b < kBlocks; b += 2) {
        FragmentB<kParts> two;
        load_b(two, values, k, warp_value + 8 * b);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) multiply(C[i][b + half], a[i], two, half);
      }
    }
    block_sync();
  }

  each([&](int64_t key, int64_t value, float x) {
    if (final_state.C && key < p.key_size && value < p.value_size)
      store_global(
          static_cast<float*>(final_state.C) + s.index * final_state.C_row +
              head * final_state.C_head + key * final_state.C_key + value * final_state.C_value,
          x);
  });
  if (writes_n && final_state.n)
    each_n([&](int64_t key, float x) {
      x = sum_of_four(x);
      if (key < p.key_size && lane() % 4 == 0)
        store_global(
            static_cast<float*>(final_state.n) + s.index * final_state.n_row +
                head * final_state.n_head + key * final_state.n_key,
            x);
    });
  if (writes_m && final_state.m) {
    if (tiles == 0 && with_m && p.initial_state.m)
      m = double(load_global(
          static_cast<const float*>(p.initial_state.m) + s.index * p.initial_state.m_row +
          head * p.initial_state.m_head));
    store_global(
        static_cast<float*>(final_state.m) + s.index * final_state.m_row +
            head * final_state.m_head,
        float(m));
  }
}

// ---- the outputs' kernel ----

template <int kParts, int kValues>
struct MatrixOutputsShared {                          // bytes
  static constexpr int kKeys = kParts == 1 ? 64 : 32; // of a tile
  static constexpr int kStages = kParts == 1 ? 2 : 1;
  static constexpr int kKeyTile = matrix_tile_size(kMatrixRows, kKeys),
                       kStateTile = matrix_tile_size(kKeys, kValues),
                       kValueTile = matrix_tile_size(kMatrixRows, kValues),
                       kWeightTile = matrix_tile_size(kMatrixRows, kMatrixRows);
  // q, k and the state, and behind them n; or v; or all outputs, as floats.
  static constexpr int kInputs = 2 * kKeyTile + kStateTile;
  static constexpr int kN = (kInputs > kValueTile ? kInputs : kValueTile) * kParts * 2;
  static constexpr int kStage = kN + kKeys * 4;
  static constexpr int kWeights = kStage * kStages;
  static constexpr int kGates = kWeights + kWeightTile * kParts * 2;
  static constexpr int kSums = kGates + MatrixGates::kSize * 4; // of two halves of a row
  static constexpr int kFlags = kSums + 2 * kMatrixRows * 4;    // of warps
  static constexpr int kBytes = kFlags + 16;
  static constexpr int kOutputPitch = kValues + 4;
  static_assert(kMatrixRows * kOutputPitch * 4 <= kStage * kStages);
};

struct MatrixOutput {
  MatrixElement element = MatrixElement::f32;
  bool pieces = false; // whole pieces of four
};
TORCH_EXT_DEVICE void store_four(void* to, MatrixElement element, const float (&x)[4]) {
  if (element == MatrixElement::f32)
    store_global(static_cast<SideBySide<float>*>(to), SideBySide<float>::narrow(x));
  else if (element == MatrixElement::f16)
    store_global(static_cast<SideBySide<Half, 8>*>(to), SideBySide<Half, 8>::narrow(x));
  else
    store_global(static_cast<SideBySide<BFloat16, 8>*>(to), SideBySide<BFloat16, 8>::narrow(x));
}
TORCH_EXT_DEVICE void store_element(void* to, MatrixElement element, float x) {
  if (element == MatrixElement::f32)
    store_global(static_cast<float*>(to), x);
  else if (element == MatrixElement::f16)
    store_global(static_cast<Half*>(to), to_half(x));
  else
    store_global(static_cast<BFloat16*>(to), to_bfloat16(x));
}
TORCH_EXT_DEVICE bool matrix_finite(float x) { return x - x == 0.f; }

// What divides, of the sum r.
template <class R>
TORCH_EXT_DEVICE R matrix_divisor(Normalizer normalizer, R eps, R least, R r) {
  if (normalizer == Normalizer::none) return R(1);
  if (normalizer == Normalizer::sum) return r + eps;
  const R size = r < R(0) ? -r : r;
  return (size > least || r != r ? size : least) + eps;
}

// A block: 64 steps of a chunk, a head, kValues values. Warps are two by two: 32 steps times half of the columns. What
// comes to shared memory is a sequence of items: for each 64 steps of the chunk up to the block's own, q and k, some
// keys at a time (at first with the state of those keys), then v.
template <int kParts, int kValues>
__global__ void __launch_bounds__(kMatrixThreads, 2) matrix_memory_outputs_kernel(
    MatrixMemoryProblem p, MatrixLayout layout, MatrixStates states, OverHeads<void*> h,
    MatrixOutput output) {
  using Memory = MatrixOutputsShared<kParts, kValues>;
  using G = MatrixGates;
  constexpr int kKeys = Memory::kKeys, kTiles = kMatrixChunk / kMatrixRows, kHalf = kValues / 2,
                kBlocks = kHalf / 8, kColumns = kMatrixRows / 2;
  const int64_t slices = p.value_size > kValues ? (p.value_size + kValues - 1) / kValues : 1;
  int64_t place = blockIdx.x;
  const int64_t first_value = place % slices * kValues;
  place /= slices;
  const int own = int(place % kTiles); // of the chunk's tiles
  place /= kTiles;
  const int64_t head = place % p.num_heads, slot = place / p.num_heads;
  const MatrixChunk at = matrix_chunk_of(p, slot);
  const MatrixSequence s(p, at.sequence);
  const int64_t first = at.chunk * kMatrixChunk, own_first = first + own * kMatrixRows;
  if (own_first >= s.steps) return;
  const int64_t group = head / (p.num_heads / p.num_groups);
  const bool empty = matrix_starts_empty(p, at.chunk),
             normalizes = p.normalizer != Normalizer::none;
  const int64_t state = slot * p.num_heads + head;
  const int key_tiles = int((p.key_size + kKeys - 1) / kKeys), items = (own + 1) * (key_tiles + 1);
  const float scale = float(p.scale);

  const int g = lane() / 4, pair = lane() % 4 * 2;
  const int down = warp() / 2, across = warp() % 2, first_row = 32 * down + g;
  const Shared<float> gates = shared_memory<float>(Memory::kGates),
                      sums = shared_memory<float>(Memory::kSums);
  const Shared<int> flags = shared_memory<int>(Memory::kFlags);
  const MatrixTile weights{
      shared_memory<BFloat16>(Memory::kWeights), matrix_tile_pitch(kMatrixRows),
      Memory::kWeightTile};
  const auto key_tile = [&](int stage, bool second) {
    return MatrixTile{
        shared_memory<BFloat16>(
            stage * Memory::kStage + (second ? Memory::kKeyTile * kParts * 2 : 0)),
        matrix_tile_pitch(kKeys), Memory::kKeyTile};
  };
  const auto state_tile = [&](int stage) {
    return MatrixTile{
        shared_memory<BFloat16>(stage * Memory::kStage + 2 * Memory::kKeyTile * kParts * 2),
        matrix_tile_pitch(kValues), Memory::kStateTile};
  };
  const auto value_tile = [&](int stage) {
    return MatrixTile{
        shared_memory<BFloat16>(stage * Memory::kStage), matrix_tile_pitch(kValues),
        Memory::kValueTile};
  };
  const auto n_tile = [&](int stage) {
    return shared_memory<float>(stage * Memory::kStage + Memory::kN);
  };
  const auto values_of = [&](int tile) {
    const int64_t from = first + tile * kMatrixRows;
    return MatrixSource(
        p.v, s, from, s.steps - from, head, first_value, p.value_size, layout.values, layout.v);
  };
  const auto issue = [&](int item) {
    const int tile = item / (key_tiles + 1), part = item % (key_tiles + 1),
              stage = item % Memory::kStages;
    if (part == key_tiles)
      return load_tile<kParts, kMatrixRows, kValues>(value_tile(stage), values_of(tile));
    const int64_t key = part * kKeys, from = first + tile * kMatrixRows;
    load_tile<kParts, kMatrixRows, kKeys>(
        key_tile(stage, false),
        MatrixSource(
            p.q, s, own_first, s.steps - own_first, group, key, p.key_size, layout.keys, layout.q));
    load_tile<kParts, kMatrixRows, kKeys>(
        key_tile(stage, true),
        MatrixSource(p.k, s, from, s.steps - from, group, key, p.key_size, layout.keys, layout.k));
    if (tile > 0 || empty) return;
    load_tile<kParts, kKeys, kValues>(
        state_tile(stage), MatrixSource(states, state, key, first_value, kKeys));
    if (const int i = int(threadIdx.x) * 4; normalizes && i < kKeys) {
      if (key + i < states.keys)
        copy_async16(n_tile(stage), i, states.n + state * states.keys + key + i);
      else
        (n_tile(stage) + i).template view<SideBySide<float>>().store(0, SideBySide<float>{});
    }
  };

  float O[2][kBlocks][4], S[2][kColumns / 8][4], sum[2][2];
  for (bool careful = false;; careful = true) {
    if constexpr (Memory::kStages == 2) {
      issue(0);
      copy_async_commit();
    }
    if (!careful && warp() == 0) {
      double m0 = 0;
      if (p.normalizer == Normalizer::stabilized && !empty) m0 = load_global(states.m + state);
      const int64_t left = s.steps - first, wanted = (own + 1) * kMatrixRows;
      matrix_gates<true>(p, s, first, int(left < wanted ? left : wanted), head, m0, gates);
    }
#pragma unroll
    for (int a = 0; a < 2; ++a) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i) O[a][b][i] = 0;
#pragma unroll
      for (int b = 0; b < kColumns / 8; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i) S[a][b][i] = 0;
      sum[a][0] = sum[a][1] = 0;
    }
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
      const int tile = item / (key_tiles + 1), part = item % (key_tiles + 1),
                stage = item % Memory::kStages;
      if constexpr (Memory::kStages == 2) {
        if (item + 1 < items) issue(item + 1);
        copy_async_commit();
        copy_async_wait<1>();
      } else {
        issue(item);
        copy_async_commit();
        copy_async_wait<0>();
      }
      block_sync();
      const bool diagonal = tile == own;
      if (part < key_tiles) {
        const bool with_scores = !diagonal || across <= down, with_state = tile == 0 && !empty;
        const MatrixTile q = key_tile(stage, false), k = key_tile(stage, true),
                         C = state_tile(stage);
#pragma unroll 1
        for (int at = 0; at < kKeys; at += 16) {
          FragmentA<kParts> a[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) load_a(a[i], q, 32 * down + 16 * i, at);
          if (with_scores) {
#pragma unroll
            for (int b = 0; b < kColumns / 8; b += 2) {
              FragmentB<kParts> two;
              load_b_transposed(two, k, at, kColumns * across + 8 * b);
#pragma unroll
              for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) multiply(S[i][b + half], a[i], two, half);
            }
          }
          if (!with_state) continue;
#pragma unroll
          for (int b = 0; b < kBlocks; b += 2) {
            FragmentB<kParts> two;
            load_b(two, C, at, kHalf * across + 8 * b);
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int half = 0; half < 2; ++half) multiply(O[i][b + half], a[i], two, half);
          }
          if (normalizes &&
              at / 16 % 2 == across) { // the other half of the columns adds the others
            const Shared<float> n = n_tile(stage) + (at + pair);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const float n0 = n.load(r / 2 * 8), n1 = n.load(r / 2 * 8 + 1);
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                uint32_t words[kParts];
#pragma unroll
                for (int x = 0; x < kParts; ++x) words[x] = a[i].r[x][r];
                float q0, q1;
                join_pair<kParts>(words, q0, q1);
                sum[i][r % 2] += q0 * n0 + q1 * n1;
              }
            }
          }
        }
      } else {
        // What follows from it would wait in registers through all items.
        const int row = recomputed(first_row), pair = recomputed(lane() % 4 * 2);
        if (tile == 0 && !empty) {
#pragma unroll
          for (int a = 0; a < 2; ++a)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float carry =
                  scale * gates.load(G::kCarry + own * kMatrixRows + row + 16 * a + 8 * i);
              sum[a][i] *= carry;
#pragma unroll
              for (int b = 0; b < kBlocks; ++b)
                O[a][b][2 * i] *= carry, O[a][b][2 * i + 1] *= carry;
            }
        }
        // P, as operands.
#pragma unroll
        for (int a = 0; a < 2; ++a)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int t = row + 16 * a + 8 * i, at = G::kRow + own * kMatrixRows + t;
            const float high = gates.load(at), low = gates.load(at + G::L);
#pragma unroll
            for (int half = 0; half < kColumns / 16; ++half) { // of 16 columns
              const int j = kColumns * across + 16 * half, block = tile * kMatrixRows + j;
              const bool below = !diagonal || j < 32 * down + 16 * a,
                         on = diagonal && j == 32 * down + 16 * a;
              float factor = 0;
              if (below) {
                const int at = G::kBlock + block / 16;
                factor = scale *
                         exp_weight((high + gates.load(at)) + (low + gates.load(at + G::L / 16)));
              }
#pragma unroll
              for (int b = 0; b < 2; ++b) {
                float x[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                  const int column = 8 * b + pair + c;
                  float& score = S[a][2 * half + b][2 * i + c];
                  x[c] = 0;
                  if (below) {
                    x[c] = score * (factor * gates.load(G::kFactor + block + column));
                  } else if (on && j + column <= t) {
                    const int at = G::kColumn + block + column;
                    x[c] = score *
                           (scale * gates.load(G::kInput + block + column) *
                            exp_weight((high + gates.load(at)) + (low + gates.load(at + G::L))));
                  }
                  score = 0;
                }
                sum[a][i] += x[0] + x[1];
                uint32_t words[kParts];
                split_pair<kParts>(x[0], x[1], words);
#pragma unroll
                for (int part = 0; part < kParts; ++part)
                  (weights.data + (part * weights.part + t * weights.pitch + j + 8 * b + pair))
                      .template view<uint32_t>()
                      .store(0, words[part]);
              }
            }
          }
        const MatrixTile v = value_tile(stage);
        if (careful) // zeros for now
          for (int i = int(threadIdx.x); i < kParts * Memory::kValueTile; i += kMatrixThreads)
            if (i % v.pitch < kValues && !matrix_finite(to_float(v.data.load(i))))
              v.data.store(i, BFloat16{0});
        block_sync();
        const int depth = diagonal ? 32 * (down + 1) : kMatrixRows;
#pragma unroll 1
        for (int at = 0; at < depth; at += 16) {
          FragmentA<kParts> a[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) load_a(a[i], weights, 32 * down + 16 * i, at);
#pragma unroll
          for (int b = 0; b < kBlocks; b += 2) {
            FragmentB<kParts> two;
            load_b(two, v, at, kHalf * across + 8 * b);
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int half = 0; half < 2; ++half) multiply(O[i][b + half], a[i], two, half);
          }
        }
        if (careful) { // and now what is not finite, for the steps that it reaches
          const MatrixSource from = values_of(tile);
#pragma unroll 1
          for (int j = 0; j < from.rows; ++j)
#pragma unroll
            for (int b = 0; b < kBlocks; ++b)
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                const int column = kHalf * across + 8 * b + pair + c;
                if (column >= from.columns) continue;
                const float x =
                    load_element(from.data + j * from.row + column * from.column, from.element);
                if (matrix_finite(x)) continue;
#pragma unroll
                for (int a = 0; a < 2; ++a)
#pragma unroll
                  for (int i = 0; i < 2; ++i) {
                    const int t = row + 16 * a + 8 * i;
                    if (diagonal && j > t) continue;
                    float P = 0;
#pragma unroll
                    for (int part = 0; part < kParts; ++part)
                      P += to_float(weights.data.load(part * weights.part + t * weights.pitch + j));
                    O[a][b][2 * i + c] += P * x;
                  }
              }
        }
      }
      block_sync();
    }
    // Zeros above the diagonal times what is not finite are NaN in steps before it: then once more, with care.
    float zero = 0;
#pragma unroll
    for (int a = 0; a < 2; ++a)
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i) zero += O[a][b][i] * 0.f;
    if (careful) break;
    const unsigned spoilt = ballot(~0u, !(zero == 0.f));
    if (lane() == 0) flags.store(warp(), int(spoilt != 0));
    block_sync();
    if (!(flags.load(0) | flags.load(1) | flags.load(2) | flags.load(3))) break;
    block_sync();
  }

  const int row = recomputed(first_row);
  if (normalizes) {
#pragma unroll
    for (int a = 0; a < 2; ++a)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x = sum[a][i];
        x += shuffle_xor(~0u, x, 1);
        x += shuffle_xor(~0u, x, 2);
        if (lane() % 4 == 0) sums.store(across * kMatrixRows + row + 16 * a + 8 * i, x);
      }
    block_sync();
  }
  const Shared<float> out = shared_memory<float>();
#pragma unroll
  for (int a = 0; a < 2; ++a)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = row + 16 * a + 8 * i;
      float by = 1;
      if (normalizes)
        by = 1.f / matrix_divisor(
                       p.normalizer, float(p.eps), gates.load(G::kLeast + own * kMatrixRows + t),
                       sums.load(t) + sums.load(kMatrixRows + t));
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const float both[] = {O[a][b][2 * i] * by, O[a][b][2 * i + 1] * by};
        (out + (t * Memory::kOutputPitch + kHalf * across + 8 * b + pair))
            .template view<SideBySide<float, 8>>()
            .store(0, SideBySide<float, 8>::narrow(both));
      }
    }
  block_sync();
  const int64_t bytes = output.element == MatrixElement::f32 ? 4 : 2;
  for (int i = int(threadIdx.x); i < kMatrixRows * kValues / 4; i += kMatrixThreads) {
    const int t = i / (kValues / 4), column = i % (kValues / 4) * 4;
    const int64_t value = first_value + column;
    if (own_first + t >= s.steps || value >= p.value_size) continue;
    const auto four =
        (out + (t * Memory::kOutputPitch + column)).template view<SideBySide<float>>().load(0);
    char* const to =
        static_cast<char*>(h.data) +
        (s.row * h.sequence + s.token(own_first + t) * h.time + head * h.head + value * h.channel) *
            bytes;
    const float x[] = {four.get(0), four.get(1), four.get(2), four.get(3)};
    if (output.pieces) {
      store_four(to, output.element, x);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (value + k < p.value_size)
          store_element(to + k * h.channel * bytes, output.element, x[k]);
    }
  }
}

// ---- step by step: single steps, double, and what has no matrix products ----

inline constexpr int kRecurrentThreads = 128, kRecurrentRows = 4;
// A thread has four neighbours in each of kRecurrentRows rows of the state at a time. Rows are keys, and neighbours
// values; or, where keys lie side by side in memory, the other way around.
struct MatrixRecurrence {
  int across = 1; // threads side by side over neighbours: a power of two
  // A block's slices, one after the other, and the blocks of a head: of 4 across values, or of all threads' rows of them.
  int64_t slices = 1, blocks = 1;
  bool pieces = false; // are both states read and written by 16 bytes?
  bool keeps = false;  // is a block's part of C in registers from step to step?
};

template <class R>
TORCH_EXT_DEVICE R load_as(const char* from, MatrixElement element) {
  if constexpr (sizeof(R) == 8)
    return load_global(reinterpret_cast<const double*>(from));
  else
    return load_element(from, element);
}
TORCH_EXT_DEVICE double exp_weight(double x) { return ::exp(x); }

template <class R>
inline constexpr int matrix_recurrent_shared = // sums of threads and of warps; keys and queries
    kRecurrentThreads*(3 * kRecurrentRows + 1) * int(sizeof(R));

// A block: a sequence, a head, and some of the values or all. Several blocks of a head where the states they write are
// not those they read.
template <class R, bool kKeysInside>
__global__ void __launch_bounds__(kRecurrentThreads, sizeof(R) == 4 ? 3 : 2)
    matrix_memory_recurrent_kernel(
        MatrixMemoryForward p, MatrixLayout layout, MatrixOutput output, MatrixRecurrence plan) {
  constexpr int kThreads = kRecurrentThreads, kRows = kRecurrentRows;
  using Piece = SideBySide<R>;
  const int64_t block = blockIdx.x % plan.blocks, item = blockIdx.x / plan.blocks,
                head = item % p.num_heads;
  const int K = int(p.key_size), V = int(p.value_size);
  const MatrixSequence s(p, item / p.num_heads);
  const int64_t group = head / (p.num_heads / p.num_groups),
                state = p.state_rows ? load_global(p.state_rows + s.index) : s.index;
  const int thread = int(threadIdx.x), down = kThreads / plan.across, my_row = thread / plan.across,
            mine = thread % plan.across;
  const Shared<R> parts = shared_memory<R>(), warps = parts + kThreads * kRows,
                  keys_there = warps + kThreads, queries = keys_there + kThreads * kRows;
  const bool normalizes = p.normalizer != Normalizer::none,
             stabilized = p.normalizer == Normalizer::stabilized, writes_n = block == 0;
  const int slice_values = kKeysInside ? kRows * down : 4 * plan.across;

  const auto bytes_of = [](MatrixElement element) -> int64_t {
    return element == MatrixElement::f64 ? 8 : element == MatrixElement::f32 ? 4 : 2;
  };
  const auto element_of = [&](const OverHeads<const void*>& x, MatrixElement element, int64_t token,
                              int64_t of, int64_t i) {
    return load_as<R>(
        static_cast<const char*>(x.data) +
            (s.row * x.sequence + token * x.time + of * x.head + i * x.channel) * bytes_of(element),
        element);
  };
  const auto gate = [&](const PerHead<const void*>& x, int64_t token, R other) {
    if (!x.data) return other;
    return load_global(
        static_cast<const R*>(x.data) + s.row * x.sequence + token * x.time + head * x.head);
  };
  const auto out = [&](int64_t token, int64_t value, R x) {
    char* const to = static_cast<char*>(p.h.data) + (s.row * p.h.sequence + token * p.h.time +
                                                     head * p.h.head + value * p.h.channel) *
                                                        bytes_of(output.element);
    if constexpr (sizeof(R) == 8)
      store_global(reinterpret_cast<double*>(to), x);
    else
      store_element(to, output.element, x);
  };
  if (state < 0) {
    for (int64_t t = 0; t < s.steps; ++t)
      for (int64_t v = block * kThreads + thread; v < V; v += plan.blocks * kThreads)
        out(s.token(t), v, R(0));
    return;
  }
  const auto& from = p.initial_state;
  const auto& to = p.final_state;
  const R* const C0 =
      from.C ? static_cast<const R*>(from.C) + state * from.C_row + head * from.C_head : nullptr;
  R* const C1 = static_cast<R*>(to.C) + state * to.C_row + head * to.C_head;
  const R* const n0 =
      from.n ? static_cast<const R*>(from.n) + state * from.n_row + head * from.n_head : nullptr;
  R* const n1 = to.n ? static_cast<R*>(to.n) + state * to.n_row + head * to.n_head : nullptr;
  const R* const m0 =
      from.m ? static_cast<const R*>(from.m) + state * from.m_row + head * from.m_head : nullptr;

  // Four neighbours of the state at first, or of the one that is written.
  const auto there = [&](int key, int value) { return key < K && value < V; };
  const auto load_four = [&](bool initial, int key, int value, R(&x)[4]) {
    x[0] = x[1] = x[2] = x[3] = 0;
    const R* const C = initial ? C0 : C1;
    if (!C || !there(key, value)) return;
    const int64_t outer = kKeysInside ? (initial ? from.C_value : to.C_value)
                                      : (initial ? from.C_key : to.C_key),
                  inner = plan.pieces   ? 1
                          : kKeysInside ? (initial ? from.C_key : to.C_key)
                                        : (initial ? from.C_value : to.C_value);
    const R* const at =
        C + (kKeysInside ? value : key) * outer + (kKeysInside ? key : value) * inner;
    if (plan.pieces) {
#pragma unroll
      for (int i = 0; i < 4 / Piece::kCount; ++i) {
        const Piece piece = load_global(reinterpret_cast<const Piece*>(at) + i);
#pragma unroll
        for (int k = 0; k < Piece::kCount; ++k) x[i * Piece::kCount + k] = piece.get(k);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (kKeysInside ? there(key + i, value) : there(key, value + i))
          x[i] = load_global(at + i * inner);
    }
  };
  const auto store_four_of = [&](int key, int value, const R(&x)[4]) {
    if (!there(key, value)) return;
    R* const at = C1 + key * to.C_key + value * to.C_value;
    if (plan.pieces) {
#pragma unroll
      for (int i = 0; i < 4 / Piece::kCount; ++i)
        store_global(reinterpret_cast<Piece*>(at) + i, Piece::narrow(x + i * Piece::kCount));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (kKeysInside ? there(key + i, value) : there(key, value + i))
          store_global(at + i * (kKeysInside ? to.C_key : to.C_value), x[i]);
    }
  };
  // All that the threads have at a time of a slice: f(key, value, i) of the first neighbour in a thread's i-th row.
  const int first_values = int(block * plan.slices) * slice_values;
  const auto rows = [&](int slice, int keys, auto f) {
    const int row = recomputed(my_row), neighbour = recomputed(4 * mine);
    const int value = first_values + slice * slice_values;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      kKeysInside ? f(keys + neighbour, value + i * down + row, i)
                  : f(keys + i * down + row, value + neighbour, i);
  };
  const int keys_at_once = kKeysInside ? 4 * plan.across : kRows * down;

  R C[kRows][4], n = 0, m = m0 && stabilized ? load_global(m0) : R(0);
  if (plan.keeps) rows(0, 0, [&](int key, int value, int i) { load_four(true, key, value, C[i]); });
  if (s.steps == 0) {
    for (int64_t i = block * kThreads + thread; i < int64_t(K) * V; i += plan.blocks * kThreads) {
      const int64_t key = i / V, value = i % V;
      store_global(
          C1 + key * to.C_key + value * to.C_value,
          C0 ? load_global(C0 + key * from.C_key + value * from.C_value) : R(0));
    }
    for (int key = thread; key < K && n1 && writes_n; key += kThreads)
      store_global(n1 + key * to.n_key, n0 ? load_global(n0 + key * from.n_key) : R(0));
  }
#pragma unroll 1
  for (int64_t t = 0; t < s.steps; ++t) {
    const int64_t token = s.token(t);
    const bool last = t + 1 == s.steps;
    const R log_decay = gate(p.log_decay, token, R(0)), log_input = gate(p.log_input, token, R(0));
    R decay, input = gate(p.input_scale, token, R(1)), least = 1;
    if (stabilized) {
      const R kept = log_decay + m;
      m = log_input > kept ? log_input : kept;
      const R shift = m > R(-1e30) ? m : R(-1e30);
      decay = exp_weight(kept - shift), input *= exp_weight(log_input - shift);
      least = exp_weight(-m);
    } else {
      decay = exp_weight(log_decay);
    }
    R by = 1;
    if (normalizes) {
      R r = 0;
#pragma unroll 1
      for (int key = thread; key < K; key += kThreads) {
        if (K > kThreads || t == 0) {
          n = 0;
          if (t > 0)
            n = load_global(n1 + key * to.n_key);
          else if (n0)
            n = load_global(n0 + key * from.n_key);
        }
        n = fused(decay, n, input * element_of(p.k, layout.keys, token, group, key));
        r = fused(n, R(p.scale) * element_of(p.q, layout.keys, token, group, key), r);
        if (writes_n && (last || K > kThreads)) store_global(n1 + key * to.n_key, n);
      }
#pragma unroll
      for (int bits = 16; bits > 0; bits /= 2) r += shuffle_xor(~0u, r, bits);
      if (lane() == 0) warps.store(warp(), r);
      block_sync();
      r = 0;
#pragma unroll
      for (int i = 0; i < kThreads / 32; ++i) r += warps.load(i);
      by = R(1) / matrix_divisor(p.normalizer, R(p.eps), least, r);
    }
#pragma unroll 1
    for (int slice = 0; slice < int(plan.slices); ++slice) {
      const int first_value = first_values + slice * slice_values;
      // While keys are gone through, values stand where sums will.
#pragma unroll 1
      for (int i = thread; i < slice_values && K > 0; i += kThreads)
        parts.store(
            i, first_value + i < V
                   ? input * element_of(p.v, layout.values, token, head, first_value + i)
                   : R(0));
      constexpr int kSums = kKeysInside ? kRows : 4;
      R sum[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] = 0;
#pragma unroll 1
      for (int keys = 0; keys < K; keys += keys_at_once) {
        if (!plan.keeps)
          rows(
              slice, keys, [&](int key, int value, int i) { load_four(t == 0, key, value, C[i]); });
#pragma unroll 1
        for (int i = thread; i < keys_at_once; i += kThreads) {
          const bool in = keys + i < K;
          keys_there.store(
              int(i), in ? element_of(p.k, layout.keys, token, group, keys + i) : R(0));
          queries.store(
              int(i),
              in ? R(p.scale) * element_of(p.q, layout.keys, token, group, keys + i) : R(0));
        }
        block_sync();
        rows(slice, keys, [&](int key, int value, int i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int at = int(key - keys) + (kKeysInside ? j : 0), sum_at = kKeysInside ? i : j;
            C[i][j] = fused(
                decay, C[i][j],
                keys_there.load(at) * parts.load(value - first_value + (kKeysInside ? 0 : j)));
            sum[sum_at] = fused(queries.load(at), C[i][j], sum[sum_at]);
          }
          if (!plan.keeps || last) store_four_of(key, value, C[i]);
        });
        block_sync();
      }
      // A value's sums lie apart by those of the values beside it; or, where keys are side by side, together.
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        parts.store(
            kKeysInside ? (i * down + my_row) * plan.across + mine : thread * 4 + i, sum[i]);
      block_sync();
      for (int value = thread; value < slice_values && first_value + value < V; value += kThreads) {
        R x = 0;
        if constexpr (kKeysInside)
#pragma unroll 1
          for (int i = 0; i < plan.across; ++i) x += parts.load(value * plan.across + i);
        else
#pragma unroll 1
          for (int i = 0; i < down; ++i) x += parts.load(i * slice_values + value);
        out(token, first_value + value, x * by);
      }
      block_sync();
    }
  }
  if (stabilized && writes_n && to.m && thread == 0)
    store_global(static_cast<R*>(to.m) + state * to.m_row + head * to.m_head, m);
}

// ---- what the drivers of both directions have in common: matrix_memory.cu ----

MatrixLayout matrix_layout(DType dtype, const MatrixMemoryProblem& p);
// Parts of an operand: float32 as wanted; float16 and, beside a shorter v, keys that are not rounded, in two.
int matrix_parts(DType dtype, const MatrixMemoryProblem& p, int wanted);
// The states at the starts of chunks, and the final one.
void matrix_run_states(
    int parts, const MatrixMemoryProblem& p, const MatrixLayout& layout, const MatrixStates& states,
    const MatrixState<void*>& final_state, cudaStream_t stream);

} // namespace torch_ext::cuda
