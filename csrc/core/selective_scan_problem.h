// One call of Mamba's selective scan, as plain pointers and strides: what an operator hands to the CPU driver.
//
//   time_step = delta + delta_bias, through softplus if asked            (sequence, time, channel)
//   h[t] = exp(time_step[t] A) h[t - 1] + time_step[t] B[t] u[t]         (sequence, time, channel, state)
//   y[t] = sum of C[t] h[t] over the states + D u[t]                     complex: twice the real part of the sum
//   out[t] = y[t] silu(z[t]), or y[t] where there is no z
//
// dtypes, by the DType a driver is called with:
//
//   called with        f32     f64      bf16      f16     c64               c128
//   u, delta, z, out   float   double   BFloat16  Half    float             double
//   B, C per token     float   double   BFloat16  Half    Complex<float>    Complex<double>
//   D, delta_bias      float   double   float     float   float             double
//   A, states, and
//   B, C constant      float   double   float     float   Complex<float>    Complex<double>
//
// A gradient has the dtype of what it is the gradient of. Complex gradients follow torch: dL/dRe + i dL/dIm.
// Every array has strides of its own, which count elements and may be zero or negative for inputs. Fast are arrays over
// time whose channels or whose tokens lie side by side, and (channel, state) arrays of which either index has stride 1.
#pragma once
#include <stdint.h>

namespace torch_ext {

// Data is const void* for what is read, void* for what is written. data is null where there is no such array.
template <class Data>
struct OverTime { // (sequence, time, channel)
  Data data = nullptr;
  int64_t sequence = 0, time = 0, channel = 0;
};
template <class Data>
struct OverStates { // (row, channel, state)
  Data data = nullptr;
  int64_t row = 0, channel = 0, state = 0;
};
template <class Data>
struct OverChannels { // (channel)
  Data data = nullptr;
  int64_t channel = 0;
};
// B and C: (sequence, time, group, state), where channel d belongs to group d / (width / num_groups); or, if `constant`,
// (channel, state), and then `channel` takes the place of the other strides.
template <class Data>
struct Coefficient {
  Data data = nullptr;
  bool constant = false;
  int64_t sequence = 0, time = 0, group = 0, channel = 0, state = 0;
};

struct SelectiveScanProblem {
  int64_t num_sequences = 0, num_steps = 0, width = 0;
  int64_t num_states = 1, num_groups = 1; // num_groups divides width
  // Packed: sequence s is the tokens cu_seqlens[s] .. cu_seqlens[s + 1] of the one row, and num_steps the row's length; the
  // sequences cover the row. Null: sequence s is row s.
  const int64_t* cu_seqlens = nullptr;
  bool reverse = false; // from the last step to the first
  bool delta_softplus = false;
  OverTime<const void*> u, delta, z;       // z null: no gate
  OverStates<const void*> A;               // row is ignored
  Coefficient<const void*> B, C;           //
  OverChannels<const void*> D, delta_bias; // null: zeros
  OverStates<const void*> initial_state;   // null: zeros
};

struct SelectiveScanForward : SelectiveScanProblem {
  // Sequence s has its state in this row of both state arrays; negative: it has none, its outputs are 0. Null: row s.
  const int64_t* state_rows = nullptr;
  OverTime<void*> out;
  OverStates<void*> final_state; // may be initial_state itself, with the same strides
  // The states from which the backward starts again: selective_scan_checkpoints() elements of the state's dtype, in an order
  // that only the backward on the same instruction set knows. Null: not wanted.
  void* checkpoints = nullptr;
};

// state_rows have no backward: pools belong to generation. Null outputs are not wanted, except grad_u and grad_delta.
struct SelectiveScanBackward : SelectiveScanProblem {
  const void* checkpoints = nullptr;
  OverTime<const void*> grad_out;           // null: zeros
  OverStates<const void*> grad_final_state; // null: zeros
  OverTime<void*> grad_u, grad_delta, grad_z;
  OverStates<void*> grad_A; // row is ignored
  Coefficient<void*> grad_B, grad_C;
  OverChannels<void*> grad_D, grad_delta_bias;
  OverStates<void*> grad_initial_state;
};

// A state is kept every so many steps, counted in the order of time from the start of each sequence. No fewer steps than
// numbers in a channel's state, so that all checkpoints together are no larger than one (sequence, time, channel) array.
inline constexpr int64_t kSelectiveScanTile = 16;
inline int64_t selective_scan_interval(int64_t num_states, bool complex) {
  const int64_t numbers = num_states * (complex ? 2 : 1);
  return (numbers + kSelectiveScanTile - 1) / kSelectiveScanTile * kSelectiveScanTile;
}
// How many states are kept before those of this sequence, and with sequence = num_sequences: in all. Packed, that is a bound
// which needs no look at the sequences before, and so is known without cu_seqlens.
inline int64_t selective_scan_states_before(
    const SelectiveScanProblem& p, int64_t interval, int64_t sequence, int64_t first_token) {
  if (p.cu_seqlens) return first_token / interval + sequence;
  return sequence * ((p.num_steps + interval - 1) / interval);
}
inline int64_t selective_scan_checkpoints(const SelectiveScanProblem& p, bool complex) {
  const int64_t interval = selective_scan_interval(p.num_states, complex);
  return selective_scan_states_before(p, interval, p.num_sequences, p.num_steps) * p.width *
         p.num_states;
}

} // namespace torch_ext
