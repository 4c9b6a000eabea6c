// Every CUDA intrinsic behind a name, and how stored types meet the lane types that cells compute in.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../cells/numerics.h"
#include "../core/types.h"

namespace torch_ext::cuda {

// S as it lies in memory; Lane as a cell computes with it, which is also the type of the state.
template <class S>
struct Stored {
  using Lane = S;
  static __device__ __forceinline__ Lane load(const S* p) { return *p; }
  static __device__ __forceinline__ void store(S* p, Lane x) { *p = x; }
};
template <>
struct Stored<BFloat16> {
  using Lane = float;
  static __device__ __forceinline__ Lane load(const BFloat16* p) {
    return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(p));
  }
  static __device__ __forceinline__ void store(BFloat16* p, Lane x) {
    *reinterpret_cast<__nv_bfloat16*>(p) = __float2bfloat16_rn(x);
  }
};
template <>
struct Stored<Half> {
  using Lane = float;
  static __device__ __forceinline__ Lane load(const Half* p) {
    return __half2float(*reinterpret_cast<const __half*>(p));
  }
  static __device__ __forceinline__ void store(Half* p, Lane x) {
    *reinterpret_cast<__half*>(p) = __float2half_rn(x);
  }
};

} // namespace torch_ext::cuda
