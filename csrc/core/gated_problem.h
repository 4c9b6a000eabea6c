// One call of a gated recurrence, as plain pointers and strides: what an operator hands to the CPU driver.
//
//   a[t] = R (mask h[t-1]), per head; where there are norm_weights, normalised over the gates and units of a head;  + bias
//   state[t] = cell(x[t], a[t], state[t-1])                     cells/gated.h; the cell is an index into GatedCells
//   c = c_update c + (1 - c_update) c[t-1],  h = h_update h + (1 - h_update) h[t-1]
//   h = projection h, before its update, where there is one
// and, head by head, zeros instead of state[t-1] where reset[t] is true.
//
// Arrays over time have the dtype the driver is called with. Parameters, states and their gradients are double for double
// and else float, contiguous in the order that is written beside them; R is that or BFloat16. All strides count elements and
// may be anything for inputs.
#pragma once
#include <stdint.h>

#include "types.h"

namespace torch_ext {

// Data is const void* for what is read, void* for what is written; null where there is no such array.
template <class Data>
struct OverUnits { // (sequence, time, gate, head, unit)
  Data data = nullptr;
  int64_t sequence = 0, time = 0, gate = 0, head = 0, unit = 1;
};
template <class Data>
struct UnitState { // (row, head, unit)
  Data data = nullptr;
  int64_t row = 0, head = 0, unit = 1;
};

inline constexpr int kGatedStates = 4;  // at most: h and three more
inline constexpr int kGatedWeights = 3; // at most

struct GatedProblem {
  int cell = 0;
  unsigned flags = 0;
  int64_t num_sequences = 0, num_steps = 0, num_heads = 0;
  int64_t width = 0, h_width = 0; // units of a head; of h: fewer or more with a projection
  // Packed: sequence s is the tokens cu_seqlens[s] .. cu_seqlens[s + 1] of the one row, and num_steps the row's length; the
  // sequences cover the row. Null: sequence s is row s.
  const int64_t* cu_seqlens = nullptr;
  bool reverse = false;       // from the last step to the first
  DType R_dtype = DType::f32; // f32, f64, bf16
  double norm_eps = 0;
  OverUnits<const void*> x;
  const void* R = nullptr;           // (gate, head, width, h_width)
  const void* bias = nullptr;        // (gate, head, width)
  const void* weights = nullptr;     // the cell's (weight, head, width)
  const void* projection = nullptr;  // (head, h_width, width)
  const void* norm_weight = nullptr; // (gate, head, width)
  const void *cell_norm_weight = nullptr, *cell_norm_bias = nullptr; // (head, width)
  OverUnits<const void*> h_update, c_update; // gate is not used; of the parameters' dtype
  UnitState<const void*> mask;
  const bool* reset = nullptr; // (sequence, time, head)
  int64_t reset_sequence = 0, reset_time = 0, reset_head = 0;
  UnitState<const void*> initial_state[kGatedStates]; // null: zeros

  int64_t num_tokens() const { return cu_seqlens ? num_steps : num_sequences * num_steps; }
};

struct GatedForward : GatedProblem {
  OverUnits<void*> h; // gate is not used
  // Sequence s has its state in this row of both state arrays; negative: it has none, and its outputs are left alone. Null:
  // row s.
  const int64_t* state_rows = nullptr;
  UnitState<void*> final_state[kGatedStates]; // may be initial_state itself, with the same strides
  // Of each token what the backward needs, gated_kept() numbers of the parameters' dtype. Null: not wanted.
  void* kept = nullptr;
};

struct GatedBackward : GatedProblem {
  const void* kept = nullptr;
  bool clips = false;
  double clip = 0;
  OverUnits<const void*> grad_h;                         // null: zeros
  UnitState<const void*> grad_final_state[kGatedStates]; // null: zeros
  OverUnits<void*> grad_x;
  // What R's gradient is made of, (token, gate, head, width) of the parameters' dtype: of R h, before bias and norm.
  void* grad_a = nullptr;
  void* operand =
      nullptr; // of a cell with two products, what the second one sees: (token, head, h_width)
  void* grad_projected = nullptr; // with a projection, of what it yields: (token, head, h_width)
  // One share per sequence, each (sequence, ...) as the parameter; null: not wanted. They begin as zeros.
  void *grad_bias = nullptr, *grad_weights = nullptr, *grad_norm_weight = nullptr,
       *grad_cell_norm_weight = nullptr, *grad_cell_norm_bias = nullptr;
  UnitState<void*> grad_initial_state[kGatedStates];
};

// Units of a head in rows that kernels write for themselves: whole vectors of any instruction set.
constexpr int64_t gated_padded(int64_t width) { return (width + 15) / 16 * 16; }

// What is kept of a token: (part, head, padded unit). Parts: the gates' pre-activations; the states before the step; with
// norm_weight, R h itself; with cell_norm_weight, the second state after the step; with a projection, h before it.
struct GatedKept {
  int64_t states = 0, products = 0, after = 0,
          unprojected = 0; // where these parts begin; gates at 0
  int64_t width = 0;       // of a part's head, padded
  int64_t size = 0;        // numbers of a token
};
inline GatedKept gated_kept(const GatedProblem& p, int gates, int states, int from_h) {
  GatedKept k;
  k.width = gated_padded(p.width < p.h_width ? p.h_width : p.width);
  k.states = gates;
  k.products = k.states + states;
  k.after = k.products + (p.norm_weight ? from_h : 0);
  k.unprojected = k.after + (p.cell_norm_weight ? 1 : 0);
  k.size = (k.unprojected + (p.projection ? 1 : 0)) * p.num_heads * k.width;
  return k;
}

} // namespace torch_ext
