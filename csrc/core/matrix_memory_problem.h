// One call of a matrix memory with a scalar decay, as plain pointers and strides: what an operator hands to the CPU driver.
//
//   C[t] = f[t] C[t-1] + i[t] k[t] v[t]^T        n[t] = f[t] n[t-1] + i[t] k[t]        per head
//   f = exp(log_decay),  i = input_scale exp(log_input)
//   h[t] = C[t]^T (scale q[t]) / d[t],           r[t] = n[t] . (scale q[t])
//
// What divides it, d (Normalizer):
//
//   none         1
//   sum          r + eps                          n is the sum of the keys
//   at_least_one max(|r|, 1) + eps
//   stabilized   max(|r|, 1) + eps e^m            in the numbers above; but C and n are kept divided by e^m, m[t] =
//                                                 max(log_decay[t] + m[t-1], log_input[t]), so that none
//                                                 overflows: d = max(|r|, e^-m) + eps for the r of the n that is kept
//
// Only `stabilized` has log_input and m. Arrays over time have the dtype the driver is called with (float, double, BFloat16,
// Half); gates, states, and their gradients are double for double and else float. All strides count elements and may be
// anything for inputs.
#pragma once
#include <stdint.h>

namespace torch_ext {

enum class Normalizer : int { none, sum, at_least_one, stabilized, count };

// Data is const void* for what is read, void* for what is written; null where there is no such array.
template <class Data>
struct OverHeads { // (sequence, time, head, channel)
  Data data = nullptr;
  int64_t sequence = 0, time = 0, head = 0, channel = 0;
};
template <class Data>
struct PerHead { // (sequence, time, head)
  Data data = nullptr;
  int64_t sequence = 0, time = 0, head = 0;
};
template <class Data>
struct MatrixState { // C (row, head, key, value), n (row, head, key), m (row, head)
  Data C = nullptr, n = nullptr, m = nullptr;
  int64_t C_row = 0, C_head = 0, C_key = 0, C_value = 0;
  int64_t n_row = 0, n_head = 0, n_key = 0;
  int64_t m_row = 0, m_head = 0;
};

struct MatrixMemoryProblem {
  int64_t num_sequences = 0, num_steps = 0;
  int64_t num_heads = 0,
          num_groups = 0; // heads of v; of q and k, which num_heads / num_groups heads of v share
  int64_t key_size = 0, value_size = 0;
  // Packed: sequence s is the tokens cu_seqlens[s] .. cu_seqlens[s + 1] of the one row, and num_steps the row's length; the
  // sequences cover the row. Null: sequence s is row s.
  const int64_t* cu_seqlens = nullptr;
  bool reverse = false; // from the last step to the first
  Normalizer normalizer = Normalizer::none;
  bool wide_keys =
      false; // q, k and their gradients have the states' dtype: features that are not rounded
  bool wide_h = false; // h and its gradient have: what is still to be worked on
  bool exact = true;   // backward: through the normaliser, too; else it is taken as a constant
  double scale = 1, eps = 0;
  OverHeads<const void*> q, k, v;
  PerHead<const void*> log_decay, log_input, input_scale; // null: 0, 0, 1
  MatrixState<const void*> initial_state;                 // null: zeros
};

struct MatrixMemoryForward : MatrixMemoryProblem {
  // Sequence s has its state in this row of both state arrays; negative: it has none, its outputs are 0. Null: row s.
  const int64_t* state_rows = nullptr;
  OverHeads<void*> h;
  MatrixState<void*> final_state; // may be initial_state itself, with the same strides
  // States at the starts of chunks, for the backward: matrix_memory_checkpoints() numbers of the state's dtype. Null: not
  // wanted.
  void* checkpoints = nullptr;
};

// Null outputs are not wanted, except those of q, k and v.
struct MatrixMemoryBackward : MatrixMemoryProblem {
  const void* checkpoints = nullptr;
  OverHeads<const void*> grad_h;             // null: zeros
  MatrixState<const void*> grad_final_state; // null: zeros
  OverHeads<void*> grad_q, grad_k, grad_v;
  PerHead<void*> grad_log_decay, grad_log_input, grad_input_scale;
  MatrixState<void*> grad_initial_state;
};

// Steps of a chunk, from shapes alone. What crosses it costs 2 K V products per step whatever its length, what stays in it
// (K + V) / 2 per step of it; and reading and writing the state once per chunk costs as much as some 16 steps.
constexpr int64_t matrix_memory_chunk(int64_t key_size, int64_t value_size) {
  return key_size * value_size >= 64 * (key_size + value_size) / 2 ? 64 : 32;
}
// A kept state: C with its rows padded to 16 numbers, n, m.
constexpr int64_t matrix_memory_padded(int64_t size) { return (size + 15) / 16 * 16; }
constexpr int64_t matrix_memory_state_size(const MatrixMemoryProblem& p) {
  return p.key_size * matrix_memory_padded(p.value_size) + matrix_memory_padded(p.key_size) + 16;
}
// How many chunks are kept before those of this sequence, and with sequence = num_sequences: in all. Packed, that is a bound
// which needs no look at the sequences before.
constexpr int64_t matrix_memory_chunks_before(
    const MatrixMemoryProblem& p, int64_t chunk, int64_t sequence, int64_t first_token) {
  if (p.cu_seqlens) return first_token / chunk + sequence;
  return sequence * ((p.num_steps + chunk - 1) / chunk);
}
inline int64_t matrix_memory_checkpoints(const MatrixMemoryProblem& p) {
  const int64_t chunk = matrix_memory_chunk(p.key_size, p.value_size);
  return matrix_memory_chunks_before(p, chunk, p.num_sequences, p.num_steps) * p.num_heads *
         matrix_memory_state_size(p);
}

} // namespace torch_ext
