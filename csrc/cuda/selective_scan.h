// The CUDA driver of the selective scan, as its operator calls it. No tensor library.
#pragma once
#include "../core/selective_scan_problem.h"
#include "../core/types.h"

namespace torch_ext::cuda {

// Bytes of device memory, aligned to 256, that the call below needs as its workspace. From shapes alone, and from which
// arrays there are.
int64_t selective_scan_workspace(DType dtype, const SelectiveScanForward& problem);
int64_t selective_scan_workspace(DType dtype, const SelectiveScanBackward& problem);

// stream: a cudaStream_t. Pointers are device pointers.
void selective_scan(
    DType dtype, const SelectiveScanForward& problem, void* workspace, void* stream);
void selective_scan(
    DType dtype, const SelectiveScanBackward& problem, void* workspace, void* stream);

} // namespace torch_ext::cuda
