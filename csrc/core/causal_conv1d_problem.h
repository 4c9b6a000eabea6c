// One call of the causal convolution, as plain pointers and strides: what the operator hands to a kernel.
#pragma once
#include <stdint.h>

#include "diagonal_problem.h"

namespace torch_ext {

// States, (row, width, window - 1), oldest input first; strides count elements. data is null where there is none: zeros.
struct ConvState {
  const void* data = nullptr;
  int64_t row = 0, width = 0, tap = 0;
};

struct CausalConv1dProblem {
  int64_t num_sequences = 0, num_steps = 0, width = 0;
  int64_t window = 1; // taps of a channel's filter, W
  // Packed: sequence s is the tokens cu_seqlens[s] .. cu_seqlens[s + 1] of the one row, and num_steps the row's length.
  const int64_t* cu_seqlens = nullptr;
  // Sequence s has its state in this row of the state arrays; negative: it has none, its outputs are 0. Null: row s.
  const int64_t* state_rows = nullptr;
  bool silu = false;
  Strided x;
  const void* weight =
      nullptr; // contiguous (width, window), float32, or float64 for float64 x; so is bias
  const void* bias = nullptr; // (width,); null: zeros
  ConvState initial_state;    // the dtype of x
};

struct CausalConv1dForward : CausalConv1dProblem {
  void* y = nullptr; // contiguous (sequence, time, width)
  void* final_state =
      nullptr; // contiguous (row, width, window - 1); may be initial_state if there is one step
};

struct CausalConv1dBackward : CausalConv1dProblem {
  Strided grad_y;                     // null: zeros
  ConvState grad_final_state;         // the dtype of x
  void* grad_x = nullptr;             // contiguous (sequence, time, width)
  void* grad_weight = nullptr;        // contiguous (width, window), the dtype of weight
  void* grad_bias = nullptr;          // (width,), likewise
  void* grad_initial_state = nullptr; // contiguous (sequence, width, window - 1), the dtype of x
};

} // namespace torch_ext
