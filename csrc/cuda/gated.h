// The CUDA driver of gated recurrences, as their operator calls it. No tensor library.
#pragma once
#include "../core/gated_problem.h"

namespace torch_ext::cuda {

// Heads of up to 128 units, without norms and projection. What is not supported goes step by step through torch's operators.
bool gated_supported(const GatedProblem& problem);

// stream: a cudaStream_t. Pointers are device pointers; reset, updates and masks have any strides.
void gated(DType dtype, const GatedForward& problem, void* stream);
void gated(DType dtype, const GatedBackward& problem, void* stream);

} // namespace torch_ext::cuda
