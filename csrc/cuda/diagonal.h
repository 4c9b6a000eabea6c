// The CUDA driver of the diagonal family, as operators call it. No tensor library.
#pragma once
#include "../core/diagonal_problem.h"

namespace torch_ext::cuda {

// Bytes of device memory, aligned to 256, that the call below needs as its workspace. From shapes alone.
int64_t diagonal_workspace(int cell, DType dtype, const DiagonalForward& problem);
int64_t diagonal_workspace(int cell, DType dtype, const DiagonalBackward& problem);

// cell: its place in cells/all.h's DiagonalCells. stream: a cudaStream_t. Pointers are device pointers.
void diagonal(int cell, DType dtype, const DiagonalForward& problem, void* workspace, void* stream);
void diagonal(
    int cell, DType dtype, const DiagonalBackward& problem, void* workspace, void* stream);

} // namespace torch_ext::cuda
