// Threads that walk through time together. C headers only, as files that are compiled once per instruction set include it.
#pragma once
#include <sched.h>
#include <stdint.h>

#include "../cells/numerics.h"

namespace torch_ext::cpu {

// Whoever runs pieces of the work joins, and learns who he is among how many. All pieces may come to one thread, when
// threads are taken elsewhere, and some late: those who are there by then begin without them, so nobody waits for a thread
// that does not come. That is why the number of members is known only after all have joined.
class Team {
 public:
  explicit Team(int64_t pieces) : pieces_(pieces) {}

  // My place, or -1 when the others have begun without me.
  int join(int64_t pieces) {
    uint64_t seen = __atomic_load_n(&joined_, __ATOMIC_ACQUIRE);
    do {
      if (seen & kClosed) return -1;
    } while (!__atomic_compare_exchange_n(
        &joined_, &seen, seen + (uint64_t(pieces) << 32) + 1, false, __ATOMIC_ACQ_REL,
        __ATOMIC_ACQUIRE));
    const int me = int(seen & kMembers);
    for (int64_t spins = 0;; ++spins) {
      seen = __atomic_load_n(&joined_, __ATOMIC_ACQUIRE);
      if (seen & kClosed) break;
      const bool all = int64_t(seen >> 32) >= pieces_;
      if (me == 0 && (all || spins > kPatience))
        __atomic_compare_exchange_n(
            &joined_, &seen, seen | kClosed, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
      else
        rest(spins);
    }
    return me;
  }
  int size() const { return int(__atomic_load_n(&joined_, __ATOMIC_RELAXED) & kMembers); }

  // Nobody goes on before all have come.
  void meet() {
    const int members = size();
    if (members == 1) return;
    const uint32_t round = __atomic_load_n(&round_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == uint32_t(members)) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
    } else {
      for (int64_t spins = 0; __atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round; ++spins)
        rest(spins);
    }
  }

 private:
  static constexpr uint64_t kClosed = uint64_t(1) << 31, kMembers = kClosed - 1;
  static constexpr int64_t kPatience = 20000; // spins, most of which give the processor away
  static void rest(int64_t spins) {
    if (spins > 2000) { // another thread may want this core
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const int64_t pieces_;
  uint64_t joined_ = 0; // pieces, closed, members
  alignas(64) uint32_t arrived_ = 0;
  alignas(64) uint32_t round_ = 0;
};

} // namespace torch_ext::cpu
