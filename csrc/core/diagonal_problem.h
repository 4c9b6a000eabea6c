// One call of a diagonal recurrence, as plain pointers and strides: what operators hand to the CPU and CUDA drivers.
#pragma once
#include <stdint.h>

#include "types.h"

namespace torch_ext {

// A (sequence, time, width) or (sequence, width) array; strides count elements. data is null where there is none.
struct Strided {
  const void* data = nullptr;
  int64_t sequence = 0, time = 0, width = 0;
};

struct DiagonalProblem {
  int64_t num_sequences = 0, num_steps = 0, width = 0;
  // Packed: sequence s is the tokens cu_seqlens[s] .. cu_seqlens[s + 1] of the one row, and num_steps the row's length.
  // Null: sequence s is row s. On the device where the kernel runs.
  const int64_t* cu_seqlens = nullptr;
  // Sequence s has its state in this row of the state arrays; negative: it has none, its outputs are 0. Null: row s.
  const int64_t* state_rows = nullptr;
  bool reverse = false;  // from the last step to the first
  unsigned flags = 0;    // the cell's options
  Strided inputs[4];     // the cell's, in order
  Strided initial_state; // state dtype; null: zeros
};

struct DiagonalForward : DiagonalProblem {
  void* h = nullptr;           // contiguous (sequence, time, width), the inputs' dtype
  void* final_state = nullptr; // contiguous (rows, width), state dtype; may be initial_state itself
};

struct DiagonalBackward : DiagonalProblem {
  Strided h, grad_h;                                           // grad_h null: zeros
  Strided grad_final_state;                                    // state dtype; null: zeros
  void* grad_inputs[4] = {nullptr, nullptr, nullptr, nullptr}; // contiguous, like the inputs
  void* grad_initial_state = nullptr; // contiguous (sequence, width), state dtype
};

} // namespace torch_ext
