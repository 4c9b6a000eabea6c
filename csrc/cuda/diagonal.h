// The CUDA driver of the diagonal family, as operators call it. No tensor library.
#pragma once
#include "../core/diagonal_problem.h"

namespace torch_ext::cuda {

// cell: its place in cells/all.h's DiagonalCells. stream: a cudaStream_t. Pointers are device pointers.
void diagonal(int cell, DType dtype, const DiagonalForward& problem, void* stream);
void diagonal(int cell, DType dtype, const DiagonalBackward& problem, void* stream);

} // namespace torch_ext::cuda
