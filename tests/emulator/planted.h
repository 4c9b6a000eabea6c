// Small kernels of 64 threads, each with one bug to plant. Without it a kernel gives out[i] = in[source(i)] in every
// order; with it the emulator must say so, and where: at the lines that the kernel marks with here(), which the report
// names.
#pragma once
#include "emulator.h"

namespace torch_ext::planted {

using namespace cuda;

inline constexpr int kThreads = 64;
inline constexpr int kSharedBytes = 2 * kThreads * int(sizeof(int));

// Lines that a report has to name: those of the calls of here<0>() and, for races, here<1>().
inline int marked_lines[2];
template <int kPlace = 0>
void here(Location at = Location::current()) {
  marked_lines[kPlace] = at.line;
}

struct Arguments {
  const int* in;
  int* out;
  unsigned* flag; // zero
};

inline int itself(int i) { return i; }
inline int mirrored(int i) { return kThreads - 1 - i; }
inline int neighbour(int i) { return i ^ 1; }
inline int lane_zero(int i) { return i & ~31; }

// ---- shared memory ----

// Two threads write one element.
template <bool kBug>
__global__ void race_of_stores(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  here<0>(), here<1>(), tile.store(kBug ? i / 2 : i, p.in[i]);
  block_sync();
  p.out[i] = kBug ? 0 : tile.load(mirrored(i));
}

// Half of the threads write what the others read.
template <bool kBug>
__global__ void missing_barrier(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  tile.store(i, 0);
  block_sync();
  here<0>(), tile.store(i, p.in[i]);
  if (!kBug) block_sync();
  here<1>(), p.out[i] = tile.load(mirrored(i));
}

// A tile is used again before everyone has read it.
template <bool kBug>
__global__ void missing_barrier_before_reuse(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  int sum = 0;
  for (int k = 0; k < 2; ++k) {
    here<0>(), tile.store(i, k ? p.in[i] : 0);
    block_sync();
    here<1>(), sum += tile.load(mirrored(i));
    if (!kBug) block_sync();
  }
  p.out[i] = sum;
}

// All threads read an element, then one writes it: many readers to remember.
template <bool kBug>
__global__ void missing_barrier_after_broadcast(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  if (i == 0) tile.store(0, p.in[0]);
  block_sync();
  here<0>(), p.out[i] = p.in[i] + 0 * tile.load(0);
  if (!kBug) block_sync();
  here<1>(), i == 37 ? tile.store(0, 1) : void();
}

// The same with a barrier that the writer's own warp alone waits for.
template <bool kBug>
__global__ void warp_sync_after_broadcast(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  if (i == 0) tile.store(0, p.in[0]);
  block_sync();
  here<0>(), p.out[i] = p.in[i] + 0 * tile.load(0);
  if (kBug) {
    warp_sync();
  } else {
    block_sync();
  }
  here<1>(), i == 37 ? tile.store(0, 1) : void();
}

// Bytes of one word belong to different threads; the bug is one byte further.
template <bool kBug>
__global__ void race_of_bytes(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<char> tile = shared_memory<char>();
  here<0>(), here<1>(), tile.store(kBug && i == 5 ? 6 : i, char(i));
  block_sync();
  p.out[i] = p.in[kBug ? 0 : tile.load(i)];
}

template <bool kBug>
__global__ void missing_warp_sync(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  tile.store(i, 0);
  warp_sync();
  here<0>(), tile.store(i, p.in[i]);
  if (!kBug) warp_sync();
  here<1>(), p.out[i] = tile.load(neighbour(i));
}

// A shuffle makes lanes wait for each other, but orders no memory.
template <bool kBug>
__global__ void shuffle_as_barrier(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  here<0>(), tile.store(i, p.in[i]);
  if (kBug) {
    shuffle(~0u, 0, 0);
  } else {
    warp_sync();
  }
  here<1>(), p.out[i] = tile.load(neighbour(i));
}

// Lanes synchronise, but not with those whose elements they read.
template <bool kBug>
__global__ void warp_sync_of_others(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  tile.store(i, 0);
  warp_sync();
  here<0>(), tile.store(i, p.in[i]);
  const unsigned even = 0x55555555u;
  const unsigned pair = 3u << (lane() & ~1), same = lane() % 2 ? ~even : even;
  warp_sync(kBug ? same : pair);
  here<1>(), p.out[i] = tile.load(neighbour(i));
}

// warp_sync orders a warp alone.
template <bool kBug>
__global__ void warp_sync_across_warps(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  tile.store(i, 0);
  block_sync();
  here<0>(), tile.store(i, p.in[i]);
  if (kBug) {
    warp_sync();
  } else {
    block_sync();
  }
  here<1>(), p.out[i] = tile.load(mirrored(i));
}

template <bool kBug>
__global__ void out_of_bounds(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  here(), tile.store(kBug ? 2 * i + 2 : i, p.in[i]);
  block_sync();
  p.out[i] = kBug ? 0 : tile.load(i);
}

template <bool kBug>
__global__ void before_the_beginning(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  tile.store(i, p.in[i]);
  block_sync();
  here(), p.out[i] = tile.load(kBug ? i - 1 : i);
}

template <bool kBug>
__global__ void uninitialised(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  if (!kBug || i != 40) tile.store(i, p.in[i]);
  block_sync();
  here(), p.out[i] = tile.load(mirrored(i));
}

template <bool kBug>
__global__ void misaligned(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  tile.store(i, p.in[i]);
  tile.store(kThreads + i, 0);
  block_sync();
  const Shared<int64_t> pairs = (tile + (kBug ? 1 : 0)).view<int64_t>();
  here(), p.out[i] = int(pairs.load(i / 2) >> (i % 2 * 32));
}

template <bool kBug>
__global__ void misaligned_global(Arguments p) {
  const int i = int(threadIdx.x);
  const int* from = p.in + i / 2 * 2 + (kBug && i == 9);
  here(), p.out[i] = int(load_global(reinterpret_cast<const int64_t*>(from)) >> (i % 2 * 32));
}

// ---- asynchronous copies ----

template <bool kBug>
__global__ void missing_copy_wait(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  if (i < kThreads / 4) {
    here<0>(), copy_async16(tile, 4 * i, p.in + 4 * i);
    copy_async_commit();
  }
  if (!kBug) copy_async_wait<0>();
  block_sync();
  here<1>(), p.out[i] = tile.load(mirrored(i));
}

// What is not committed is not waited for.
template <bool kBug>
__global__ void missing_copy_commit(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  if (i < kThreads / 4) here<0>(), copy_async16(tile, 4 * i, p.in + 4 * i);
  if (!kBug) copy_async_commit();
  copy_async_wait<0>();
  block_sync();
  here<1>(), p.out[i] = tile.load(mirrored(i));
}

// One group too many is left pending.
template <bool kBug>
__global__ void copy_wait_for_too_few(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  if (i < kThreads / 4) here<0>(), copy_async16(tile, 4 * i, p.in + 4 * i);
  copy_async_commit();
  copy_async_commit(); // empty
  copy_async_wait<kBug ? 2 : 1>();
  block_sync();
  here<1>(), p.out[i] = tile.load(mirrored(i));
}

// The wait makes a copy visible to the thread that waits, not to others.
template <bool kBug>
__global__ void missing_barrier_after_copy_wait(Arguments p) {
  const int i = int(threadIdx.x), k = i / 4;
  const Shared<int> tile = shared_memory<int>();
  tile.store(i, 0);
  block_sync();
  if (i % 4 == 0) here<0>(), copy_async16(tile, 4 * k, p.in + 4 * k);
  copy_async_commit();
  copy_async_wait<0>();
  if (!kBug) block_sync();
  here<1>(), p.out[i] = tile.load(mirrored(i));
}

// A copy begins before everyone has read what it overwrites.
template <bool kBug>
__global__ void missing_barrier_before_copy(Arguments p) {
  const int i = int(threadIdx.x), k = i / 4;
  const Shared<int> tile = shared_memory<int>();
  tile.store(i, p.in[i]);
  block_sync();
  here<0>(), p.out[i] = tile.load(mirrored(i));
  if (!kBug) block_sync();
  if (i % 4 == 0) here<1>(), copy_async16(tile, 4 * k, p.in + 4 * k);
  copy_async_commit();
}

// ---- barriers, shuffles, votes ----

template <bool kBug>
__global__ void divergent_barrier(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  tile.store(i, p.in[i]);
  if (kBug && i < 20) {
    here<0>(), block_sync();
  } else {
    here<1>(), block_sync();
  }
  p.out[i] = tile.load(mirrored(i));
}

template <bool kBug>
__global__ void barrier_of_some(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<int> tile = shared_memory<int>();
  tile.store(i, p.in[i]);
  if (kBug && i == 63) return;
  here(), block_sync();
  p.out[i] = tile.load(i);
}

// One lane waits for its warp, the warp for the block.
template <bool kBug>
__global__ void barrier_against_shuffle(Arguments p) {
  const int i = int(threadIdx.x);
  p.out[i] = p.in[i];
  if (kBug && i == 3) here<0>(), warp_sync();
  if (!kBug || i != 3) here<1>(), block_sync();
  if (!kBug) return;
  warp_sync();
}

template <bool kBug>
__global__ void wrong_mask(Arguments p) {
  const int i = int(threadIdx.x);
  here(), p.out[i] = shuffle(kBug ? 0x7fffffffu : ~0u, p.in[i], 0);
}

template <bool kBug>
__global__ void different_masks(Arguments p) {
  const int i = int(threadIdx.x);
  const unsigned mask = kBug && i % 32 < 3 ? 0xffu : ~0u;
  here(), p.out[i] = shuffle(mask, p.in[i], 0);
}

template <bool kBug>
__global__ void different_shuffles(Arguments p) {
  const int i = int(threadIdx.x);
  if (kBug && i % 2) {
    here<0>(), p.out[i] = shuffle(~0u, p.in[i], 0);
  } else {
    here<1>(), p.out[i] = shuffle(~0u, p.in[i], 0);
  }
}

// Lane 0 waits for 1, 1 for 2, and 2 for 0.
template <bool kBug>
__global__ void masks_in_a_circle(Arguments p) {
  const int i = int(threadIdx.x);
  p.out[i] = p.in[i];
  const unsigned first[] = {0b011, kBug ? 0b110 : 0b011, kBug ? 0b101 : 0b110};
  const unsigned second[] = {0b101, kBug ? 0b011 : 0b110, kBug ? 0b110 : 0b101};
  if (lane() > 2) return;
  for (const unsigned* masks : {first, second}) here(), warp_sync(masks[lane()]);
}

template <bool kBug>
__global__ void lane_that_ended(Arguments p) {
  const int i = int(threadIdx.x);
  p.out[i] = p.in[i];
  if (kBug && i == 35) return;
  here(), all(~0u, true);
}

template <bool kBug>
__global__ void source_outside_of_mask(Arguments p) {
  const int i = int(threadIdx.x);
  const unsigned mask = i & 16 ? 0xffff0000u : 0x0000ffffu;
  here(), p.out[i] = shuffle_xor(mask, p.in[i], kBug ? 17 : 1);
}

// ---- waiting for other threads ----

template <bool kBug>
__global__ void deadlock(Arguments p) {
  const int i = int(threadIdx.x);
  p.out[i] = p.in[i];
  if (!kBug && i == 50) store_release(p.flag, 1);
  while (load_acquire(p.flag) == 0) here(), pause();
}

// The same, with the whole block in the loop.
template <bool kBug>
__global__ void deadlock_with_barriers(Arguments p) {
  const int i = int(threadIdx.x);
  const Shared<unsigned> seen = shared_memory<unsigned>();
  p.out[i] = p.in[i];
  for (unsigned done = 0; !done;) {
    if (!kBug && i == 50) store_release(p.flag, 1);
    if (i == 0) seen.store(0, load_acquire(p.flag));
    block_sync();
    done = seen.load(0);
    if (i == 0 && !done) here(), pause();
    block_sync();
  }
}

template <bool kBug>
__global__ void spin_without_pause(Arguments p) {
  const int i = int(threadIdx.x);
  p.out[i] = p.in[i];
  if (i == 0) store_release(p.flag, 1);
  while (here(), load_acquire(p.flag) == unsigned(kBug)) kBug ? void() : pause();
}

} // namespace torch_ext::planted
