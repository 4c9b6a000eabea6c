// The CUDA driver of gated recurrences, as their operator calls it. No tensor library.
#pragma once
#include "../core/gated_problem.h"

namespace torch_ext::cuda {

inline constexpr int64_t kGatedWidest = 128; // units of a head

// Heads of up to so many units, or any width where there is no product, without norms and projection.
bool gated_supported(const GatedProblem& problem);

// stream: a cudaStream_t. Pointers are device pointers; reset, updates and masks have any strides.
void gated(DType dtype, const GatedForward& problem, void* stream);
void gated(DType dtype, const GatedBackward& problem, void* stream);

} // namespace torch_ext::cuda
