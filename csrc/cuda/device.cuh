// Every CUDA intrinsic behind a name. Kernels use these names alone, so that the same source compiles for the host, where
// tests/emulator runs it thread by thread and checks what it does.
#pragma once
#include <stdint.h>

#include "../cells/numerics.h"
#include "../core/types.h"

#ifdef TORCH_EXT_EMULATE
#include "emulator/emulator.h"

#define TORCH_EXT_DEVICE inline
#define TORCH_EXT_HOST_DEVICE inline

namespace torch_ext::cuda {
template <class T>
T load_written_by_blocks(const T* p) {
  return load_global(p);
}
inline void zero(void* p, int64_t bytes, cudaStream_t) { memset(p, 0, size_t(bytes)); }
template <class T>
T recomputed(T x) {
  return x;
}
inline float exp2_bounded(float x) { return exp2f(x); }
inline bool has_matrix_products() { return true; }
} // namespace torch_ext::cuda
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <string.h>

#define TORCH_EXT_DEVICE __device__ __forceinline__
#define TORCH_EXT_HOST_DEVICE __host__ __device__ __forceinline__

namespace torch_ext::cuda {

// ---- threads ----

TORCH_EXT_DEVICE int lane() { return int(threadIdx.x % 32); }
TORCH_EXT_DEVICE int warp() { return int(threadIdx.x / 32); }
TORCH_EXT_DEVICE void block_sync() { __syncthreads(); }
TORCH_EXT_DEVICE void warp_sync(unsigned mask = ~0u) { __syncwarp(mask); }
TORCH_EXT_DEVICE unsigned ballot(unsigned mask, bool x) { return __ballot_sync(mask, x); }
template <class T>
TORCH_EXT_DEVICE T shuffle(unsigned mask, T x, int from) {
  return __shfl_sync(mask, x, from);
}
template <class T>
TORCH_EXT_DEVICE T shuffle_up(unsigned mask, T x, int delta) { // the first lanes keep theirs
  return __shfl_up_sync(mask, x, unsigned(delta));
}
template <class T>
TORCH_EXT_DEVICE T shuffle_xor(unsigned mask, T x, int bits) {
  return __shfl_xor_sync(mask, x, bits);
}

// x itself. What depends on it is computed where it stands: ahead of a loop it would wait in registers that the loop needs.
TORCH_EXT_DEVICE int recomputed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
TORCH_EXT_DEVICE int64_t recomputed(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

// ---- shared memory: dynamic, through views ----

extern __shared__ __align__(16) unsigned char dynamic_shared[];

template <class T>
struct Shared {
  T* data;
  TORCH_EXT_DEVICE T load(int i) const { return data[i]; }
  TORCH_EXT_DEVICE void store(int i, T x) const { data[i] = x; }
  TORCH_EXT_DEVICE Shared operator+(int offset) const { return {data + offset}; }
  template <class U>
  TORCH_EXT_DEVICE Shared<U> view() const {
    return {reinterpret_cast<U*>(data)};
  }
};
template <class T>
TORCH_EXT_DEVICE Shared<T> shared_memory(int byte_offset = 0) {
  return {reinterpret_cast<T*>(dynamic_shared + byte_offset)};
}

// 16 bytes from global memory to element `index`. They arrive at the latest when copy_async_wait<N> returns with the group
// among all but the thread's N latest.
template <class T>
TORCH_EXT_DEVICE void copy_async16(Shared<T> to, int index, const void* from) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = unsigned(__cvta_generic_to_shared(to.data + index));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
  *reinterpret_cast<int4*>(to.data + index) = *static_cast<const int4*>(from);
#endif
}
TORCH_EXT_DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
TORCH_EXT_DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- global memory ----

template <class T>
TORCH_EXT_DEVICE T load_global(const T* p) {
  return *p;
}
template <class T>
TORCH_EXT_DEVICE void store_global(T* p, T x) {
  *p = x;
}

// Between blocks: what a block wrote before store_release is seen by a block whose load_acquire reads the flag.
// load_written_by_blocks reads such data: past the first cache, which other blocks' writes do not reach.
TORCH_EXT_DEVICE int load_acquire(const int* p) {
#if __CUDA_ARCH__ >= 700
  int x;
  asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
#else
  return 0;
#endif
}
TORCH_EXT_DEVICE void store_release(int* p, int x) {
#if __CUDA_ARCH__ >= 700
  asm volatile("st.release.gpu.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
#endif
}
template <class T>
TORCH_EXT_DEVICE T load_written_by_blocks(const T* p) {
  static_assert(sizeof(T) % 4 == 0);
  T x;
  unsigned words[sizeof(T) / 4];
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 4); ++i)
    words[i] = __ldcg(reinterpret_cast<const unsigned*>(p) + i);
  memcpy(&x, words, sizeof x);
  return x;
}
TORCH_EXT_DEVICE unsigned atomic_add(unsigned* p, unsigned x) { return atomicAdd(p, x); }
TORCH_EXT_DEVICE void fence_device() { __threadfence(); }
TORCH_EXT_DEVICE void pause() { __nanosleep(20); }

// ---- numbers ----

// 2^x where the caller knows that x is below 128: one instruction.
TORCH_EXT_DEVICE float exp2_bounded(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

TORCH_EXT_DEVICE float to_float(BFloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
TORCH_EXT_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
TORCH_EXT_DEVICE BFloat16 to_bfloat16(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
TORCH_EXT_DEVICE Half to_half(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
// Two neighbours in a word, the first in its low half: one instruction.
template <class S>
TORCH_EXT_DEVICE uint32_t pack_pair(float first, float second);
template <>
TORCH_EXT_DEVICE uint32_t pack_pair<BFloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
template <>
TORCH_EXT_DEVICE uint32_t pack_pair<Half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// ---- matrices: fragments as in the PTX ISA, spelt out in mma.cuh; all 32 lanes take part. From sm_80 on ----

// d += a b.
TORCH_EXT_DEVICE void mma_m16n8k16(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
TORCH_EXT_DEVICE void mma_m16n8k16(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// Four 8 by 8 matrices of 16-bit numbers. Lanes 8 i to 8 i + 7 give the addresses of the rows of the i-th, 16 aligned
// bytes each; lane l gets elements 2 (l % 4) and the next of row l / 4; transposed, of column l / 4.
template <class T>
TORCH_EXT_DEVICE void load_matrix_x4(uint32_t (&r)[4], Shared<T> rows, int index) {
#if __CUDA_ARCH__ >= 750
  const unsigned address = unsigned(__cvta_generic_to_shared(rows.data + index));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}
template <class T>
TORCH_EXT_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], Shared<T> rows, int index) {
#if __CUDA_ARCH__ >= 750
  const unsigned address = unsigned(__cvta_generic_to_shared(rows.data + index));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

// ---- launches ----

template <class Kernel, class... Args>
void launch(
    Kernel kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t stream, Args... args) {
  if (shared_bytes > 48 * 1024) // an error of this call shows at the launch
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  kernel<<<grid, threads, shared_bytes, stream>>>(args...);
}
// Does the current device run what this file says of matrices?
inline bool has_matrix_products() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 8;
}
inline void zero(void* p, int64_t bytes, cudaStream_t stream) {
  cudaMemsetAsync(p, 0, size_t(bytes), stream);
}

} // namespace torch_ext::cuda
#endif

namespace torch_ext::cuda {

template <class Lane>
TORCH_EXT_DEVICE Lane one() {
  if constexpr (requires { Lane{}.re; })
    return {1, 0};
  else
    return 1;
}

// S as it lies in memory; Lane as a cell computes with it, which is also the type of the state.
template <class S>
struct Stored {
  using Lane = S;
  TORCH_EXT_DEVICE static Lane widen(S x) { return x; }
  TORCH_EXT_DEVICE static S narrow(Lane x) { return x; }
};
template <>
struct Stored<BFloat16> {
  using Lane = float;
  TORCH_EXT_DEVICE static Lane widen(BFloat16 x) { return to_float(x); }
  TORCH_EXT_DEVICE static BFloat16 narrow(Lane x) { return to_bfloat16(x); }
};
template <>
struct Stored<Half> {
  using Lane = float;
  TORCH_EXT_DEVICE static Lane widen(Half x) { return to_float(x); }
  TORCH_EXT_DEVICE static Half narrow(Lane x) { return to_half(x); }
};

// Elements that lie side by side in memory: one access of 16 or 8 bytes. Kept as words, of which registers are made.
template <class S, int kBytes = 16>
struct alignas(kBytes) SideBySide {
  static constexpr int kCount = kBytes / int(sizeof(S));
  using Lane = typename Stored<S>::Lane;
  uint32_t words[kBytes / 4];

  TORCH_EXT_DEVICE S get(int i) const {
    if constexpr (sizeof(S) == 2) {
      return {uint16_t(words[i / 2] >> (16 * (i % 2)))};
    } else {
      S x;
      memcpy(&x, words + i * (int(sizeof(S)) / 4), sizeof x);
      return x;
    }
  }
  TORCH_EXT_DEVICE Lane widen(int i) const { return Stored<S>::widen(get(i)); }
  TORCH_EXT_DEVICE static SideBySide of(const S* x) {
    SideBySide y;
    if constexpr (sizeof(S) == 2) {
#pragma unroll
      for (int i = 0; i < kBytes / 4; ++i)
        y.words[i] = uint32_t(x[2 * i].bits) | uint32_t(x[2 * i + 1].bits) << 16;
    } else {
      memcpy(y.words, x, kBytes);
    }
    return y;
  }
  TORCH_EXT_DEVICE static SideBySide narrow(const Lane* x) {
    SideBySide y;
    if constexpr (sizeof(S) == 2) {
#pragma unroll
      for (int i = 0; i < kBytes / 4; ++i) y.words[i] = pack_pair<S>(x[2 * i], x[2 * i + 1]);
    } else {
      memcpy(y.words, x, kBytes);
    }
    return y;
  }
};

} // namespace torch_ext::cuda
