// CUDA on the host, for tests: what kernels use of CUDA and of csrc/cuda/device.cuh, in plain C++. A launch runs every
// CUDA thread as a fiber of the calling thread, and ends with an Error that names file and line where the kernel does
// what a GPU would let pass or answer with garbage: races on shared memory and reads of what nobody wrote there,
// accesses that are out of bounds or misaligned, wrong masks, divergent barriers, deadlocks. It is stricter than GPUs
// are: what their documentation leaves undefined is an error.
//
// Not seen: races on global memory, and there the lack of a fence, an acquire or a release (all of it happens at once,
// in one order); shared memory counts as ordered by block_sync and warp_sync alone. Limits of registers are not known.
//
// Kernels see the global names below and namespace torch_ext::cuda; torch_ext::emulator is for tests. Only one thread
// of the host may launch.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <bit>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
using cudaStream_t = struct CUstream_st*;

namespace torch_ext::emulator {

// Where a kernel calls one of the functions below: their last parameter, never given. clang 14 has no
// std::source_location.
struct Location {
  const char* file = nullptr;
  int line = 0;
  static constexpr Location current(
      const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Location& other) const {
    return line == other.line && (file == other.file || !strcmp(file, other.file));
  }
};
std::string to_string(Location at); // "file:line", as in the messages of errors

#if defined(__SANITIZE_ADDRESS__)
#define TORCH_EXT_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TORCH_EXT_ADDRESS_SANITIZER 1
#endif
#endif
#ifndef TORCH_EXT_ADDRESS_SANITIZER
#define TORCH_EXT_ADDRESS_SANITIZER 0
#endif

struct Options {
  enum Order { forward, reversed, random };
  Order order = forward;     // in which threads of a block run between barriers, and blocks start
  uint64_t seed = 0;         // of the random order; every launch starts from it anew
  double switching = 1. / 8; // random order: how likely another thread goes on at an access
  int resident = 4;          // blocks that run at once
  size_t stack = size_t(TORCH_EXT_ADDRESS_SANITIZER ? 256 : 64) << 10; // bytes of each thread
  bool poison = true;           // shared memory starts as bytes 0x7f
  int64_t patience = 1'000'000; // switches of threads without progress that are a deadlock
};
Options& options();

// "kind: what at file:line by thread and block". Thrown through the thread that met it and out of the launch; all other
// threads are abandoned where they are, and their stacks are not unwound: kernels hold nothing that needs it.
class Error : public std::runtime_error {
  using runtime_error::runtime_error;
};

// ---- what the functions for kernels are made of ----

void run(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel);
[[noreturn]] void fail(const std::string& kind, const std::string& what, Location at);
void block_sync(Location at);
// Waits for all lanes of the mask; the last one calls finish with the pointers of every lane in the mask, for all of
// them. Without finish it is a warp_sync, which orders memory.
using Finish = void (*)(unsigned mask, const void* const* in, void* const* out);
void collective(
    const char* name, unsigned mask, const void* in, void* out, Finish finish, Location at);
void check_source(const char* name, unsigned mask, int source, Location at);
void shared_load(int64_t byte, void* to, int size, Location at);
void shared_store(int64_t byte, const void* from, int size, Location at);
void copy_async(int64_t byte, const void* from, int valid_bytes, Location at);
void copy_async_commit(Location at);
void copy_async_wait(int groups, Location at);
void pause(Location at);
enum class Effect { acquires, changes, orders };
void synchronizes(Effect effect, Location at); // before such an access to global memory
void progress(); // another thread may be waiting for what this one has just done

template <class T>
inline constexpr bool accessible =
    std::is_trivially_copyable_v<T>&& std::has_single_bit(sizeof(T)) && sizeof(T) <= 16;
inline void check_aligned(const void* p, size_t size, Location at) {
  if (reinterpret_cast<uintptr_t>(p) % size)
    fail("misaligned access", "global memory, of " + std::to_string(size) + " bytes", at);
}

} // namespace torch_ext::emulator

namespace torch_ext::cuda {

using emulator::Location;

template <class T>
requires std::is_integral_v<T>
constexpr T max(T a, T b) { return a < b ? b : a; }
template <class T>
requires std::is_integral_v<T>
constexpr T min(T a, T b) { return b < a ? b : a; }

// ---- barriers and warps ----

inline int lane() { return int(threadIdx.x % 32); }
inline int warp() { return int(threadIdx.x / 32); }

inline void block_sync(Location at = Location::current()) { emulator::block_sync(at); }
inline void warp_sync(unsigned mask = ~0u, Location at = Location::current()) {
  emulator::collective("warp_sync", mask, nullptr, nullptr, nullptr, at);
}

template <class T>
T shuffle_from(const char* name, unsigned mask, T value, int source, Location at) {
  static_assert(std::is_trivially_copyable_v<T>);
  struct In {
    T value;
    int source;
  };
  const In in{value, source};
  emulator::check_source(name, mask, source, at);
  emulator::collective(
      name, mask, &in, &value,
      [](unsigned mask, const void* const* in, void* const* out) {
        const auto of = [&](int lane) { return static_cast<const In*>(in[lane]); };
        for (int i = 0; i < 32; ++i)
          if (mask >> i & 1) *static_cast<T*>(out[i]) = of(of(i)->source)->value;
      },
      at);
  return value;
}
template <class T>
T shuffle(unsigned mask, T value, int from, Location at = Location::current()) {
  return shuffle_from("shuffle", mask, value, from & 31, at);
}
template <class T>
T shuffle_up(unsigned mask, T value, int delta, Location at = Location::current()) {
  if (unsigned(delta) > 31) emulator::fail("wrong shuffle", "delta is not in 0...31", at);
  return shuffle_from("shuffle_up", mask, value, lane() < delta ? lane() : lane() - delta, at);
}
template <class T>
T shuffle_down(unsigned mask, T value, int delta, Location at = Location::current()) {
  if (unsigned(delta) > 31) emulator::fail("wrong shuffle", "delta is not in 0...31", at);
  return shuffle_from(
      "shuffle_down", mask, value, lane() + delta > 31 ? lane() : lane() + delta, at);
}
template <class T>
T shuffle_xor(unsigned mask, T value, int bits, Location at = Location::current()) {
  if (unsigned(bits) > 31) emulator::fail("wrong shuffle", "bits are not in 0...31", at);
  return shuffle_from("shuffle_xor", mask, value, lane() ^ bits, at);
}

inline unsigned vote(const char* name, unsigned mask, bool value, Location at) {
  unsigned result = 0;
  emulator::collective(
      name, mask, &value, &result,
      [](unsigned mask, const void* const* in, void* const* out) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i)
          if (mask >> i & 1) votes |= unsigned(*static_cast<const bool*>(in[i])) << i;
        for (int i = 0; i < 32; ++i)
          if (mask >> i & 1) *static_cast<unsigned*>(out[i]) = votes;
      },
      at);
  return result;
}
inline unsigned ballot(unsigned mask, bool value, Location at = Location::current()) {
  return vote("ballot", mask, value, at);
}
inline bool any(unsigned mask, bool value, Location at = Location::current()) {
  return vote("any", mask, value, at) != 0;
}
inline bool all(unsigned mask, bool value, Location at = Location::current()) {
  return vote("all", mask, value, at) == mask;
}

// ---- shared memory ----

template <class T>
struct Shared {
  static_assert(emulator::accessible<T>);
  int64_t byte;
  T load(int i, Location at = Location::current()) const {
    T x;
    emulator::shared_load(address(i), &x, sizeof x, at);
    return x;
  }
  void store(int i, T x, Location at = Location::current()) const {
    emulator::shared_store(address(i), &x, sizeof x, at);
  }
  template <class U>
  Shared<U> view() const {
    return {byte};
  }
  Shared operator+(int offset) const { return {address(offset)}; }
  int64_t address(int i) const { return byte + i * int64_t(sizeof(T)); }
};
template <class T>
Shared<T> shared_memory(int byte_offset = 0) {
  return {byte_offset};
}

// ---- asynchronous copies ----

template <class T>
void copy_async16(
    Shared<T> to, int index, const void* from, int valid_bytes = 16,
    Location at = Location::current()) {
  emulator::copy_async(to.address(index), from, valid_bytes, at);
}
inline void copy_async_commit(Location at = Location::current()) {
  emulator::copy_async_commit(at);
}
template <int N>
void copy_async_wait(Location at = Location::current()) {
  static_assert(N >= 0);
  emulator::copy_async_wait(N, at);
}

// ---- global memory ----

// Inline, so that AddressSanitizer names the kernel.
template <class T>
T load_global(const T* p, Location at = Location::current()) {
  static_assert(emulator::accessible<T>);
  emulator::check_aligned(p, sizeof(T), at);
  return *p;
}
template <class T>
void store_global(T* p, std::type_identity_t<T> x, Location at = Location::current()) {
  static_assert(emulator::accessible<T>);
  emulator::check_aligned(p, sizeof(T), at);
  *p = x;
  emulator::progress();
}
template <class T>
T load_streaming(const T* p, Location at = Location::current()) {
  return load_global(p, at);
}
template <class T>
void store_streaming(T* p, std::type_identity_t<T> x, Location at = Location::current()) {
  store_global(p, x, at);
}

template <class T>
inline constexpr bool is_flag = std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);
template <class T>
T load_acquire(const T* p, Location at = Location::current()) {
  static_assert(is_flag<T>);
  emulator::check_aligned(p, sizeof(T), at);
  emulator::synchronizes(emulator::Effect::acquires, at);
  return *static_cast<const volatile T*>(p);
}
template <class T>
void store_release(T* p, std::type_identity_t<T> x, Location at = Location::current()) {
  static_assert(is_flag<T>);
  emulator::check_aligned(p, sizeof(T), at);
  emulator::synchronizes(emulator::Effect::changes, at);
  *p = x;
}
template <class T>
T atomic_add_to(T* p, T x, Location at) {
  emulator::check_aligned(p, sizeof(T), at);
  using enum emulator::Effect;
  emulator::synchronizes(x == T(0) ? acquires : changes, at);
  const T before = *p;
  *p = before + x;
  return before;
}
inline unsigned atomic_add(unsigned* p, unsigned x, Location at = Location::current()) {
  return atomic_add_to(p, x, at);
}
inline float atomic_add(float* p, float x, Location at = Location::current()) {
  return atomic_add_to(p, x, at);
}
inline void fence_device(Location at = Location::current()) {
  emulator::synchronizes(emulator::Effect::orders, at);
}
inline void pause(Location at = Location::current()) { emulator::pause(at); }

// ---- numbers ----

// NaN becomes the one NaN that the GPU's conversions give.
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline BFloat16 to_bfloat16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u << 1) > 0xff000000u) return {0x7fff};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff);
  uint32_t u;
  if (magnitude >= 0x7c00) {
    u = (magnitude << 13) | 0x7f800000;
  } else if (magnitude >= 0x400) {
    u = (magnitude << 13) + (112u << 23);
  } else { // denormal: an integer times 2^-24
    u = std::bit_cast<uint32_t>(float(magnitude) * 0x1p-24f);
  }
  return std::bit_cast<float>(u | sign);
}
inline Half to_half(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000, m = u & 0x7fffffff;
  uint32_t r;
  if (m > 0x7f800000) return {0x7fff};
  if (m >= 0x477ff000) { // from the middle between the largest number and the next power of two
    r = 0x7c00;
  } else if (m >= 0x38800000) {
    r = (m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13;
  } else { // below 2^-14: adding 0.5 leaves the denormal, rounded to even, in the low bits
    r = std::bit_cast<uint32_t>(std::bit_cast<float>(m) + 0.5f) - 0x3f000000;
  }
  return {uint16_t(r | sign)};
}

template <class S>
uint32_t pack_pair(float first, float second) {
  if constexpr (std::is_same_v<S, BFloat16>)
    return to_bfloat16(first).bits | uint32_t(to_bfloat16(second).bits) << 16;
  else
    return to_half(first).bits | uint32_t(to_half(second).bits) << 16;
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.f / x; }

// ---- matrices: fragments as in the PTX ISA; all 32 lanes take part ----

// d += a b. Products are exact and their sum is rounded once, which no GPU promises.
void mma_m16n8k16(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16,
    Location at = Location::current());
void mma_m16n8k16(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half,
    Location at = Location::current());

// A row counts as read both by the lane that gives its address and by the lanes that get its elements: neither barrier
// nor order of memory comes with it.
void load_matrix_bytes(uint32_t (&r)[4], int64_t row_byte, bool transposed, Location at);
template <class T>
void load_matrix_x4(
    uint32_t (&r)[4], Shared<T> rows, int index, Location at = Location::current()) {
  load_matrix_bytes(r, rows.address(index), false, at);
}
template <class T>
void load_matrix_x4_transposed(
    uint32_t (&r)[4], Shared<T> rows, int index, Location at = Location::current()) {
  load_matrix_bytes(r, rows.address(index), true, at);
}

// ---- launch ----

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t, Args... args) {
  static_assert((0 + ... + sizeof(Args)) <= 4096, "more than a kernel's parameters may have");
  emulator::run(grid, threads, shared_bytes, [&] { kernel(args...); });
}

} // namespace torch_ext::cuda
