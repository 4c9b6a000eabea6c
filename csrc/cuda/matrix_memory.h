// The CUDA driver of matrix memories, as their operator calls it. No tensor library.
#pragma once
#include "../core/matrix_memory_problem.h"
#include "../core/types.h"

namespace torch_ext::cuda {

// dtype: of v. parts: bfloat16 parts of a float32 operand of a matrix product, 1 to 3, which are good for 8, 16 and 24
// bits; other dtypes know by themselves. Checkpoints are not written: a backward makes the states at the starts of
// chunks itself.

// Bytes of device memory, aligned to 256, that the call below needs as its workspace. From shapes alone, and from which
// arrays there are.
int64_t matrix_memory_workspace(DType dtype, const MatrixMemoryForward& problem, int parts);
int64_t matrix_memory_workspace(DType dtype, const MatrixMemoryBackward& problem, int parts);
// stream: a cudaStream_t. Pointers are device pointers.
void matrix_memory(
    DType dtype, const MatrixMemoryForward& problem, int parts, void* workspace, void* stream);

void matrix_memory(
    DType dtype, const MatrixMemoryBackward& problem, int parts, void* workspace, void* stream);
// Is there a backward, on the current device? Not in double precision, and not on GPUs without products of bfloat16.
bool matrix_memory_has_backward(DType dtype);

} // namespace torch_ext::cuda
