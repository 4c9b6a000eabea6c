// The CUDA driver of the causal convolution, as the operator calls it. No tensor library.
#pragma once
#include "../core/causal_conv1d_problem.h"

namespace torch_ext::cuda {

// Bytes of device memory, aligned to 256, that the call below needs as its workspace. From shapes alone.
int64_t causal_conv1d_workspace(DType dtype, const CausalConv1dForward& problem);
int64_t causal_conv1d_workspace(DType dtype, const CausalConv1dBackward& problem);

// stream: a cudaStream_t. Pointers are device pointers. Of dtypes the real ones.
void causal_conv1d(DType dtype, const CausalConv1dForward& problem, void* workspace, void* stream);
void causal_conv1d(DType dtype, const CausalConv1dBackward& problem, void* workspace, void* stream);

} // namespace torch_ext::cuda
