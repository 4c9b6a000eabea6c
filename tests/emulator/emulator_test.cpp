// The emulator: what each function does against independent computations, and that it finds bugs planted in small
// kernels, names their lines, and finds none in the same kernels without them, in every order of threads.
#include "emulator.h"

#include <gtest/gtest.h>
#include <math.h>
#include <stdint.h>

#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "cpp/random.h"
#include "cpp/sixteen_bits.h"
#include "planted.h"

namespace torch_ext::test {
namespace {

using namespace cuda;
using emulator::Error;
using emulator::Options;

// Options for the time of a test.
struct With {
  Options before = emulator::options();
  explicit With(Options::Order order, uint64_t seed = 0, int resident = 4) {
    emulator::options().order = order;
    emulator::options().seed = seed;
    emulator::options().resident = resident;
  }
  ~With() { emulator::options() = before; }
};

// Forward, reversed, and a few random orders, with 1 to 4 blocks at once where a kernel does not need more.
template <class Run>
void in_every_order(Run run, int least_resident = 1) {
  Random random;
  const Options::Order orders[] = {Options::forward, Options::reversed, Options::random};
  for (int i = 0; i < 12; ++i) {
    const uint64_t seed = uint64_t(random.integer(0, 1'000'000'000));
    const int resident = int(random.integer(least_resident, 4));
    const With options(orders[std::min(i, 2)], seed, resident);
    SCOPED_TRACE(
        "order " + std::to_string(std::min(i, 2)) + ", seed " + std::to_string(seed) +
        ", resident " + std::to_string(resident));
    run();
  }
}

// The message of the error, or nothing.
template <class Run>
std::string error_of(Run run) {
  try {
    run();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}
bool starts_with(const std::string& text, const std::string& part) {
  return text.compare(0, part.size(), part) == 0;
}

// ---- launches ----

__global__ void where_am_i(unsigned* out, unsigned* dims) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * blockDim.x + threadIdx.x] += block * 1000 + unsigned(warp() * 32 + lane()) + 1;
  dims[0] = gridDim.x * 100 + gridDim.y * 10 + gridDim.z;
  dims[1] = blockDim.x * 100 + blockDim.y * 10 + blockDim.z + threadIdx.y + threadIdx.z;
}
TEST(Emulator, IndexesOfThreadsAndBlocks) {
  in_every_order([] {
    std::vector<unsigned> out(2 * 3 * 4 * 45), dims(2);
    launch(where_am_i, dim3(2, 3, 4), 45, 0, nullptr, out.data(), dims.data());
    for (unsigned b = 0; b < 24; ++b)
      for (unsigned i = 0; i < 45; ++i) ASSERT_EQ(out[b * 45 + i], b * 1000 + i + 1);
    EXPECT_EQ(dims[0], 234u);
    EXPECT_EQ(dims[1], 4511u);
  });
}

__global__ void nothing() {}
__global__ void throws() { throw std::runtime_error("from the kernel"); }
__global__ void launches() { launch(nothing, 1, 1, 0, nullptr); }
TEST(Emulator, WrongLaunches) {
  const auto launch_of = [](dim3 grid, int threads, int bytes) {
    return error_of([&] { launch(nothing, grid, threads, bytes, nullptr); });
  };
  EXPECT_EQ(launch_of(1, 1024, 227 << 10), "");
  EXPECT_TRUE(starts_with(launch_of(1, 0, 0), "wrong launch"));
  EXPECT_TRUE(starts_with(launch_of(1, 1025, 0), "wrong launch"));
  EXPECT_TRUE(starts_with(launch_of(0, 32, 0), "wrong launch"));
  EXPECT_TRUE(starts_with(launch_of(dim3(1, 65536), 32, 0), "wrong launch"));
  EXPECT_TRUE(starts_with(launch_of(1, 32, (227 << 10) + 1), "wrong launch"));
  EXPECT_TRUE(starts_with(error_of([] { launch(launches, 1, 32, 0, nullptr); }), "wrong launch"));
  EXPECT_THROW(launch(throws, 1, 32, 0, nullptr), std::runtime_error);
  EXPECT_TRUE(starts_with(error_of([] { block_sync(); }), "no kernel"));
  EXPECT_TRUE(starts_with(error_of([] { shared_memory<int>().load(0); }), "no kernel"));
  EXPECT_EQ(launch_of(1, 32, 0), ""); // and all of this left nothing behind
}

TEST(Emulator, LocationIsThatOfTheCall) {
  const emulator::Location here = emulator::Location::current();
  EXPECT_EQ(here.line, __LINE__ - 1);
  EXPECT_STREQ(here.file, __FILE__);
}

__global__ void copy_to_16(const void* in, int times, int valid) {
  for (int i = 0; i < times; ++i) copy_async16(shared_memory<char>(16), 0, in, valid);
}
TEST(Emulator, CopiesWithinSharedMemory) {
  alignas(16) const char in[16] = {};
  const auto copies = [&](int bytes, const char* from, int times, int valid = 0) {
    return error_of([&] { launch(copy_to_16, 1, 1, bytes, nullptr, from, times, valid); });
  };
  EXPECT_EQ(copies(32, in, 1), "");
  EXPECT_EQ(copies(32, in, 1, 16), "");
  EXPECT_TRUE(starts_with(copies(32, in, 1, 17), "out of bounds: valid_bytes is 17"));
  EXPECT_TRUE(starts_with(copies(32, in, 1, -1), "out of bounds: valid_bytes is -1"));
  EXPECT_TRUE(starts_with(copies(31, in, 1), "out of bounds: bytes 16 to 32 of 31"));
  EXPECT_TRUE(starts_with(copies(32, in + 8, 1), "misaligned access"));
  EXPECT_TRUE(contains(copies(32, in, 2), "asynchronous copy by thread 0"));
}

// ---- warps ----

struct Small {
  double x;
  char c;
};
struct Shuffled {
  int by_index, up, down, by_xor;
  float f;
  double d;
  Small s;
};
__global__ void shuffles(const int* in, Shuffled* out, int delta) {
  const int i = int(threadIdx.x), value = in[i];
  Shuffled& o = out[i];
  o.by_index = shuffle(~0u, value, value); // also beyond 31
  o.up = shuffle_up(~0u, value, delta);
  o.down = shuffle_down(~0u, value, delta);
  o.by_xor = shuffle_xor(~0u, value, delta);
  o.f = shuffle_xor(~0u, float(value) + 0.5f, 1);
  o.d = shuffle(~0u, value * 0.125, 7);
  o.s = shuffle_down(~0u, Small{value * 0.25, char(i)}, 1);
}
TEST(Emulator, Shuffles) {
  Random random;
  in_every_order([&] {
    std::vector<int> in(96);
    for (int& x : in) x = int(random.integer(0, 99));
    for (int delta : {0, 1, 2, 3, 8, 16, 31}) {
      std::vector<Shuffled> out(96);
      launch(shuffles, 1, 96, 0, nullptr, in.data(), out.data(), delta);
      for (int i = 0; i < 96; ++i) {
        const int first = i / 32 * 32, l = i % 32;
        const Shuffled& o = out[size_t(i)];
        const auto at = [&](int k) { return in[size_t(k)]; };
        ASSERT_EQ(o.by_index, at(first + at(i) % 32));
        ASSERT_EQ(o.up, at(l < delta ? i : i - delta));
        ASSERT_EQ(o.down, at(l + delta >= 32 ? i : i + delta));
        ASSERT_EQ(o.by_xor, at(first + (l ^ delta)));
        ASSERT_EQ(o.f, float(at(i ^ 1)) + 0.5f);
        ASSERT_EQ(o.d, at(first + 7) * 0.125);
        ASSERT_EQ(o.s.x, at(l == 31 ? i : i + 1) * 0.25);
        ASSERT_EQ(o.s.c, char(l == 31 ? i : i + 1));
      }
    }
  });
}

// Groups of a warp go their own ways: each of 8 lanes, as many rounds as its number says.
__global__ void groups_of_lanes(const int* in, int* sums, unsigned* votes) {
  const int i = int(threadIdx.x), group = lane() / 8;
  const unsigned mask = 0xffu << (8 * group);
  int sum = in[i];
  for (int round = 0; round <= group; ++round) {
    sum = in[i];
    for (int bits = 4; bits; bits /= 2) sum += shuffle_xor(mask, sum, bits);
  }
  sums[i] = sum;
  votes[3 * i] = ballot(mask, in[i] % 2);
  votes[3 * i + 1] = any(mask, in[i] % 8 == 0);
  votes[3 * i + 2] = all(mask, in[i] % 8 != 0);
}
TEST(Emulator, GroupsOfLanesAndVotes) {
  Random random;
  in_every_order([&] {
    std::vector<int> in(64), sums(64);
    std::vector<unsigned> votes(3 * 64);
    for (int& x : in) x = int(random.integer(0, 1000));
    launch(groups_of_lanes, 1, 64, 0, nullptr, in.data(), sums.data(), votes.data());
    for (int i = 0; i < 64; ++i) {
      const int first = i / 8 * 8;
      int sum = 0;
      unsigned odd = 0;
      bool any_eighth = false;
      for (int k = first; k < first + 8; ++k) {
        sum += in[size_t(k)];
        odd |= unsigned(in[size_t(k)] % 2) << (k % 32);
        any_eighth |= in[size_t(k)] % 8 == 0;
      }
      ASSERT_EQ(sums[size_t(i)], sum);
      ASSERT_EQ(votes[size_t(3 * i)], odd);
      ASSERT_EQ(votes[size_t(3 * i + 1)], any_eighth);
      ASSERT_EQ(votes[size_t(3 * i + 2)], !any_eighth);
    }
  });
}

__global__ void shuffle_by(int delta, int kind) {
  if (kind == 0) shuffle_up(~0u, 1, delta);
  if (kind == 1) shuffle_down(~0u, 1, delta);
  if (kind == 2) shuffle_xor(~0u, 1, delta);
}
__global__ void warp_sync_of_all_lanes() { warp_sync(); }
TEST(Emulator, WrongShuffles) {
  for (int kind = 0; kind < 3; ++kind)
    for (int delta : {-1, 32}) {
      const std::string error =
          error_of([&] { launch(shuffle_by, 1, 32, 0, nullptr, delta, kind); });
      EXPECT_TRUE(starts_with(error, "wrong shuffle")) << error;
    }
  const std::string error = error_of([] { launch(warp_sync_of_all_lanes, 1, 48, 0, nullptr); });
  EXPECT_TRUE(contains(error, "warp_sync names lane 16, which is none")) << error;
}

// ---- shared memory ----

// A block's inclusive sum: within warps by shuffles, across warps through shared memory, at several offsets and types.
__global__ void block_sum(const int* in, int* out, int count) {
  const Shared<int> totals = shared_memory<int>(64) + 8;
  for (int64_t base = int64_t(blockIdx.x) * blockDim.x; base < count;
       base += int64_t(gridDim.x) * blockDim.x) {
    const int64_t i = base + threadIdx.x;
    int sum = i < count ? load_global(in + i) : 0;
    for (int delta = 1; delta < 32; delta *= 2) {
      const int before = shuffle_up(~0u, sum, delta);
      if (lane() >= delta) sum += before;
    }
    if (lane() == 31) totals.store(warp(), sum);
    block_sync();
    for (int w = 0; w < warp(); ++w) sum += totals.load(w);
    block_sync();
    if (i < count) store_global(out + i, sum);
  }
}
TEST(Emulator, GridStrideKernelWithBarriers) {
  Random random;
  in_every_order([&] {
    const int count = int(random.integer(1, 3000)), threads = 32 * int(random.integer(1, 8));
    std::vector<int> in(static_cast<size_t>(count)), out(in.size(), -1);
    for (int& x : in) x = int(random.integer(-1000, 1000));
    launch(
        block_sum, dim3(unsigned(random.integer(1, 6))), threads, 64 + 32 + 4 * 8, nullptr,
        in.data(), out.data(), count);
    int sum = 0;
    for (int i = 0; i < count; ++i) {
      sum = (i % threads ? sum : 0) + in[size_t(i)];
      ASSERT_EQ(out[size_t(i)], sum) << i << " of " << count << " by " << threads;
    }
  });
}

__global__ void bytes_and_words(uint64_t* out) {
  struct alignas(16) Four {
    uint32_t x[4];
  };
  const int i = int(threadIdx.x);
  const Shared<Four> fours = shared_memory<Four>();
  fours.store(i, {{uint32_t(i), 1, 2, 0x01020304}});
  fours.view<uint16_t>().store(8 * i + 2, 0xffff); // in a word of its own thread
  warp_sync();
  out[3 * i] = (fours + 1).view<uint64_t>().load(2 * (i - 1));
  out[3 * i + 1] = fours.view<uint8_t>().load(16 * (i ^ 1) + 13);
  out[3 * i + 2] = fours.load(31 - i).x[0];
}
TEST(Emulator, ViewsOfSharedMemory) {
  in_every_order([] {
    std::vector<uint64_t> out(3 * 32);
    launch(bytes_and_words, 1, 32, 512, nullptr, out.data());
    for (uint64_t i = 0; i < 32; ++i) {
      ASSERT_EQ(out[3 * i], uint64_t(0xffff) << 32 | i);
      ASSERT_EQ(out[3 * i + 1], 3u);
      ASSERT_EQ(out[3 * i + 2], 31 - i);
    }
  });
}

// What warp_sync orders it orders for good: 0 -> 1 -> 2 by pairs, while 0 goes on.
__global__ void chain_of_pairs(int* out) {
  const Shared<int> tile = shared_memory<int>();
  if (lane() == 0) tile.store(0, 42);
  if (lane() < 2) warp_sync(0b011);
  if (lane() == 0) tile.store(1, 43); // not what the others read
  if (lane() == 1 || lane() == 2) warp_sync(0b110);
  if (lane() == 2) *out = tile.load(0);
}
TEST(Emulator, OrderOfMemoryIsTransitive) {
  in_every_order([] {
    int out = 0;
    launch(chain_of_pairs, 1, 32, 8, nullptr, &out);
    EXPECT_EQ(out, 42);
  });
}

// Random programs without branches, in phases: loads and stores, warp_sync of groups of lanes, block_sync. Whether two
// accesses are ordered does not depend on how threads happen to run, so the emulator must find a race in every order
// where two conflicting accesses are unordered, and in no order where there are none.
struct Step {
  int byte, size;
  bool writes;
};
struct Phase {
  enum Kind { accesses, warp_sync, block_sync } kind;
  std::vector<std::vector<Step>> steps; // of each thread
  std::vector<unsigned> masks;          // of each thread
};
using Program = std::vector<Phase>;
constexpr int kBytes = 16;

Program random_program(Random& random, int threads) {
  Program program;
  const int spread = int(random.integer(1, threads));
  for (int64_t left = random.integer(1, 12); left > 0; --left) {
    Phase phase;
    phase.kind = Phase::Kind(random.integer(0, 2));
    if (phase.kind == Phase::block_sync && random.integer(0, 1)) phase.kind = Phase::warp_sync;
    if (phase.kind == Phase::accesses) {
      phase.steps.resize(size_t(threads));
      for (int64_t count = random.integer(1, 5); count > 0; --count) {
        const int size = 1 << random.integer(0, 2), places = kBytes / size;
        phase.steps[size_t(random.integer(0, spread - 1))].push_back(
            {int(random.integer(0, places - 1)) * size, size, random.integer(0, 2) == 0});
      }
    } else if (phase.kind == Phase::warp_sync) { // lanes of a warp fall into up to three groups
      phase.masks.resize(size_t(threads));
      std::vector<int> group(static_cast<size_t>(threads));
      const int64_t groups = random.integer(1, 3);
      for (int& x : group) x = int(random.integer(0, groups - 1));
      for (int i = 0; i < threads; ++i)
        for (int k = i / 32 * 32; k < min(threads, i / 32 * 32 + 32); ++k)
          if (group[size_t(i)] == group[size_t(k)]) phase.masks[size_t(i)] |= 1u << (k % 32);
    }
    program.push_back(phase);
  }
  return program;
}

// With a clock for every pair of threads, and every pair of accesses compared.
bool has_race(const Program& program, int threads) {
  struct Done {
    Step step;
    int thread, clock;
  };
  std::vector<Done> done;
  const std::vector<int> none(static_cast<size_t>(threads));
  std::vector<std::vector<int>> clock(none.size(), none);
  const auto join = [&](const std::vector<int>& members) {
    std::vector<int> latest = none;
    for (int m : members)
      for (int i = 0; i < threads; ++i)
        latest[size_t(i)] = max(latest[size_t(i)], clock[size_t(m)][size_t(i)]);
    for (int m : members) clock[size_t(m)] = latest, ++clock[size_t(m)][size_t(m)];
  };
  for (int i = 0; i < threads; ++i) clock[size_t(i)][size_t(i)] = 1;
  for (const Phase& phase : program) {
    for (int i = 0; i < threads && phase.kind == Phase::accesses; ++i)
      for (const Step& step : phase.steps[size_t(i)]) {
        for (const Done& before : done) {
          const bool overlap = before.step.byte < step.byte + step.size &&
                               step.byte < before.step.byte + before.step.size;
          if (overlap && (before.step.writes || step.writes) && before.thread != i &&
              before.clock > clock[size_t(i)][size_t(before.thread)])
            return true;
        }
        done.push_back({step, i, clock[size_t(i)][size_t(i)]});
      }
    std::vector<int> all(static_cast<size_t>(threads));
    std::iota(all.begin(), all.end(), 0);
    if (phase.kind == Phase::block_sync) join(all);
    for (int first = 0; first < threads && phase.kind == Phase::warp_sync; first += 32)
      for (unsigned left = ~0u; left;) {
        std::vector<int> members;
        unsigned mask = 0;
        for (int i = first; i < min(threads, first + 32); ++i)
          if (left >> (i % 32) & 1 && (!mask || mask == phase.masks[size_t(i)])) {
            mask = phase.masks[size_t(i)];
            members.push_back(i);
          }
        if (members.empty()) break;
        join(members);
        left &= ~mask;
      }
  }
  return false;
}

__global__ void run_program(const Program* program) {
  const size_t i = threadIdx.x;
  const Shared<char> bytes = shared_memory<char>();
  const auto step = [&]<class T>(const Step& s, T) {
    const Shared<T> view = bytes.view<T>();
    s.writes ? view.store(s.byte / s.size, T(i)) : void(view.load(s.byte / s.size));
  };
  if (i < kBytes) bytes.store(int(i), 0);
  block_sync();
  for (const Phase& phase : *program) {
    if (phase.kind == Phase::block_sync) block_sync();
    if (phase.kind == Phase::warp_sync) warp_sync(phase.masks[i]);
    if (phase.kind != Phase::accesses) continue;
    for (const Step& s : phase.steps[i]) {
      if (s.size == 1) step(s, char());
      if (s.size == 2) step(s, int16_t());
      if (s.size == 4) step(s, int32_t());
    }
  }
}
TEST(Emulator, RacesOfRandomPrograms) {
  Random random;
  int races = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    const int threads = int(random.integer(kBytes, 72));
    const Program program = random_program(random, threads);
    const bool race = has_race(program, threads);
    races += race;
    for (Options::Order order : {Options::forward, Options::reversed, Options::random}) {
      const With options(order, uint64_t(trial));
      const std::string error = error_of([&] {
        launch(run_program, 1, threads, kBytes, nullptr, static_cast<const Program*>(&program));
      });
      ASSERT_EQ(starts_with(error, "race"), race) << "trial " << trial << ": " << error;
      ASSERT_EQ(error.empty(), !race) << error;
    }
  }
  EXPECT_GT(races, 400); // both kinds of programs occur
  EXPECT_LT(races, 1600);
}

// ---- asynchronous copies ----

// Tiles of 16 bytes a thread, three in flight; the last one is partly outside.
__global__ void pipeline(const uint8_t* in, int64_t count, uint64_t* sums) {
  constexpr int kStages = 3;
  const int i = int(threadIdx.x), bytes = int(blockDim.x) * 16;
  const int64_t tiles = (count + bytes - 1) / bytes;
  const Shared<uint8_t> stages = shared_memory<uint8_t>();
  const auto fetch = [&](int64_t tile) {
    const int64_t begin = tile * bytes + i * 16;
    const int valid = int(max(int64_t(0), min(int64_t(16), count - begin)));
    if (tile < tiles)
      copy_async16(stages, int(tile % kStages) * bytes + i * 16, valid ? in + begin : in, valid);
    copy_async_commit();
  };
  for (int k = 0; k < kStages - 1; ++k) fetch(k);
  uint64_t sum = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    copy_async_wait<kStages - 2>();
    block_sync();
    fetch(tile + kStages - 1);
    for (int k = 0; k < 16; ++k) // from 16 threads' copies
      sum += stages.load(int(tile % kStages) * bytes + (k * int(blockDim.x) + i));
  }
  sums[i] = sum;
}
TEST(Emulator, AsynchronousCopies) {
  Random random;
  in_every_order([&] {
    const int threads = 64;
    const int64_t count = random.integer(1, 8 * threads * 16);
    std::unique_ptr<uint8_t[]> in(new uint8_t[size_t(count)]);
    std::vector<uint64_t> expected(threads), sums(threads);
    for (int64_t i = 0; i < count; ++i) {
      in[size_t(i)] = uint8_t(random.integer(0, 255));
      expected[size_t(i % threads)] += in[size_t(i)];
    }
    launch(
        pipeline, 1, threads, 3 * threads * 16, nullptr, static_cast<const uint8_t*>(in.get()),
        count, sums.data());
    EXPECT_EQ(sums, expected);
  });
}

// The source is read no earlier than it must be: what is written to it before the wait is seen.
__global__ void late_copy(int* data, int* out) {
  const Shared<int> tile = shared_memory<int>();
  copy_async16(tile, 0, data);
  copy_async_commit();
  copy_async16(tile, 4, data);
  copy_async_commit();
  data[1] = 5;
  copy_async_wait<1>();
  data[1] = 6;
  copy_async_wait<0>();
  out[0] = tile.load(1);
  out[1] = tile.load(5);
}
TEST(Emulator, AsynchronousCopiesAreLate) {
  alignas(16) int data[4] = {1, 2, 3, 4};
  int out[2] = {};
  launch(late_copy, 1, 1, 32, nullptr, &data[0], &out[0]);
  EXPECT_EQ(out[0], 5);
  EXPECT_EQ(out[1], 6);
}

// ---- blocks that wait for each other ----

// A running sum of everything: each block adds its own part to what the block before it hands on. Blocks take their
// number from a counter, so that they may start in any order.
__global__ void chained_sum(
    const int* in, int64_t* out, unsigned* ticket, int64_t* prefix, unsigned* ready) {
  const Shared<int64_t> shared = shared_memory<int64_t>();
  const int i = int(threadIdx.x);
  if (i == 0) shared.store(0, int64_t(atomic_add(ticket, 1u)));
  block_sync();
  const int64_t block = shared.load(0);
  const int64_t value = in[block * blockDim.x + threadIdx.x];
  shared.store(1 + i, value);
  block_sync();
  if (i == 0) {
    while (block && !load_acquire(ready + block - 1)) pause();
    int64_t sum = block ? prefix[block - 1] : 0;
    for (int k = 0; k < int(blockDim.x); ++k) {
      sum += shared.load(1 + k);
      shared.store(1 + k, sum);
    }
    prefix[block] = sum;
    fence_device();
    store_release(ready + block, 1);
  }
  block_sync();
  store_streaming(out + block * blockDim.x + i, shared.load(1 + i));
}
TEST(Emulator, BlocksInAChain) {
  Random random;
  in_every_order([&] {
    const int blocks = int(random.integer(1, 12)), threads = int(random.integer(1, 96));
    const size_t count = size_t(blocks * threads);
    std::vector<int> in(count);
    for (int& x : in) x = int(random.integer(-100, 100));
    std::vector<int64_t> out(count), prefix(static_cast<size_t>(blocks)), expected(count);
    std::vector<unsigned> ready(prefix.size());
    unsigned ticket = 0;
    launch(
        chained_sum, dim3(unsigned(blocks)), threads, 8 * (threads + 1), nullptr, in.data(),
        out.data(), &ticket, prefix.data(), ready.data());
    std::partial_sum(
        in.begin(), in.end(), expected.begin(), [](int64_t a, int64_t b) { return a + b; });
    EXPECT_EQ(out, expected);
  });
}

// A block that waits for one that starts after it needs that one beside it.
__global__ void first_waits_for_last(unsigned* flag) {
  if (blockIdx.x == 0)
    while (!load_acquire(flag)) pause();
  if (blockIdx.x + 1 == gridDim.x) store_release(flag, 1);
}
TEST(Emulator, ResidentBlocks) {
  for (int resident : {1, 3, 4}) {
    const With options(Options::forward, 0, resident);
    emulator::options().patience = 10'000;
    unsigned flag = 0;
    const std::string error =
        error_of([&] { launch(first_waits_for_last, dim3(4), 32, 0, nullptr, &flag); });
    // With two at once, blocks 1 to 3 follow one another beside block 0.
    EXPECT_EQ(error.empty(), resident > 1) << error;
    EXPECT_EQ(starts_with(error, "deadlock"), resident == 1) << error;
  }
}

// One block works for long with barriers alone while another waits for it: no deadlock.
__global__ void long_work(unsigned* flag, int* out) {
  const Shared<int> tile = shared_memory<int>();
  if (blockIdx.x == 0) {
    int sum = 0;
    for (int k = 0; k < 3000; ++k) {
      tile.store(int(threadIdx.x), k);
      block_sync();
      sum += tile.load(63 - int(threadIdx.x));
      block_sync();
    }
    out[threadIdx.x] = sum;
    block_sync();
    if (threadIdx.x == 0) store_release(flag, 1);
  }
  while (!load_acquire(flag)) pause();
}
TEST(Emulator, LongWorkIsNoDeadlock) {
  const With options(Options::forward, 0, 2);
  emulator::options().patience = 20'000;
  unsigned flag = 0;
  std::vector<int> out(64);
  launch(long_work, dim3(2), 64, 256, nullptr, &flag, out.data());
  EXPECT_EQ(out, std::vector<int>(64, 3000 * 2999 / 2));
}

__global__ void atomics(unsigned* count, float* sum, unsigned* tickets) {
  tickets[atomic_add(count, 1u)] += 1;
  atomic_add(sum, 0.5f);
}
TEST(Emulator, Atomics) {
  in_every_order([] {
    unsigned count = 0;
    float sum = 1;
    std::vector<unsigned> tickets(5 * 64);
    launch(atomics, dim3(5), 64, 0, nullptr, &count, &sum, tickets.data());
    EXPECT_EQ(count, 5u * 64);
    EXPECT_EQ(sum, 1 + 0.5f * 5 * 64);
    EXPECT_EQ(tickets, std::vector<unsigned>(5 * 64, 1));
  });
}

// Orders differ, and a seed gives the same one again.
__global__ void sequence(unsigned* count, unsigned* order) {
  const unsigned at = atomic_add(count, 1u);
  order[at] = blockIdx.x * blockDim.x + threadIdx.x;
}
TEST(Emulator, Orders) {
  const auto order_of = [](Options::Order order, uint64_t seed) {
    const With options(order, seed, 1);
    unsigned count = 0;
    std::vector<unsigned> sequence_of(3 * 64);
    launch(sequence, dim3(3), 64, 0, nullptr, &count, sequence_of.data());
    return sequence_of;
  };
  std::vector<unsigned> expected(3 * 64);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(order_of(Options::forward, 0), expected);
  const std::vector<unsigned> random = order_of(Options::random, 1);
  EXPECT_NE(random, expected);
  EXPECT_EQ(random, order_of(Options::random, 1));
  EXPECT_NE(random, order_of(Options::random, 2));
  std::reverse(expected.begin(), expected.end());
  EXPECT_EQ(order_of(Options::reversed, 0), expected);
}

// ---- matrices ----

template <class T>
__global__ void multiply(const T* a, const T* b, const float* c, float* d) {
  const int group = lane() / 4, in_group = lane() % 4;
  const auto pair = [](T low, T high) { return low.bits | uint32_t(high.bits) << 16; };
  uint32_t fragment_a[4], fragment_b[2];
  float sum[4];
  for (int r = 0; r < 4; ++r) { // the PTX ISA's a0, a1 are fragment_a[0], and so on
    const int row = group + (r % 2 ? 8 : 0), column = in_group * 2 + (r >= 2 ? 8 : 0);
    fragment_a[r] = pair(a[row * 16 + column], a[row * 16 + column + 1]);
  }
  for (int r = 0; r < 2; ++r) {
    const int row = in_group * 2 + 8 * r;
    fragment_b[r] = pair(b[row * 8 + group], b[(row + 1) * 8 + group]);
  }
  for (int r = 0; r < 4; ++r) sum[r] = c[(group + (r >= 2 ? 8 : 0)) * 8 + in_group * 2 + r % 2];
  mma_m16n8k16(sum, fragment_a, fragment_b, T{});
  for (int r = 0; r < 4; ++r) d[(group + (r >= 2 ? 8 : 0)) * 8 + in_group * 2 + r % 2] = sum[r];
}
template <class T>
void test_multiply(T (*convert)(float)) {
  Random random;
  in_every_order([&] {
    std::vector<double> a(16 * 16), b(16 * 8), c(16 * 8);
    for (auto* m : {&a, &b, &c})
      for (double& x : *m) x = double(random.integer(-128, 128)); // exact in either type
    std::vector<T> a16, b16;
    for (double x : a) a16.push_back(convert(float(x)));
    for (double x : b) b16.push_back(convert(float(x)));
    const std::vector<float> start(c.begin(), c.end());
    std::vector<float> d(16 * 8, NAN);
    launch(
        multiply<T>, 1, 32, 0, nullptr, static_cast<const T*>(a16.data()),
        static_cast<const T*>(b16.data()), start.data(), d.data());
    for (size_t i = 0; i < 16; ++i)
      for (size_t j = 0; j < 8; ++j) {
        double sum = c[i * 8 + j];
        for (size_t k = 0; k < 16; ++k) sum += a[i * 16 + k] * b[k * 8 + j];
        ASSERT_EQ(d[i * 8 + j], sum) << i << " " << j;
      }
  });
}
TEST(Emulator, MatrixProductBFloat16) { test_multiply<BFloat16>(to_bfloat16); }
TEST(Emulator, MatrixProductHalf) { test_multiply<Half>(to_half); }

__global__ void load_matrices(const int* rows, uint32_t* out, bool transposed) {
  const Shared<Half> memory = shared_memory<Half>();
  for (int i = lane(); i < 64 * 8; i += 32) memory.store(i, Half{uint16_t(i)});
  warp_sync();
  uint32_t r[4];
  const Shared<Half> shifted = memory + 8;
  const int index = (rows[lane()] - 1) * 8;
  if (transposed) {
    load_matrix_x4_transposed(r, shifted, index);
  } else {
    load_matrix_x4(r, shifted, index);
  }
  for (int i = 0; i < 4; ++i) out[lane() * 4 + i] = r[i];
}
TEST(Emulator, LoadMatrix) {
  Random random;
  in_every_order([&] {
    for (bool transposed : {false, true}) {
      std::vector<int> rows(32); // lane i's row holds elements 8 rows[i] to 8 rows[i] + 7
      for (int& x : rows) x = int(random.integer(0, 63));
      std::vector<uint32_t> out(32 * 4);
      launch(load_matrices, 1, 32, 64 * 16, nullptr, rows.data(), out.data(), transposed);
      for (int matrix = 0; matrix < 4; ++matrix)
        for (int l = 0; l < 32; ++l)
          for (int half = 0; half < 2; ++half) {
            const int along = l % 4 * 2 + half, across = l / 4;
            const int row = transposed ? along : across, column = transposed ? across : along;
            const uint32_t pair = out[size_t(l * 4 + matrix)];
            ASSERT_EQ(
                half ? pair >> 16 : pair & 0xffff,
                uint32_t(rows[size_t(matrix * 8 + row)] * 8 + column));
          }
    }
  });
}

// ---- numbers ----

template <class T>
void test_conversions(T (*narrow)(float), int exponent_bits) {
  const auto check = [&](float x) {
    const uint16_t given = narrow(x).bits;
    if (isnan(x)) {
      ASSERT_TRUE(isnan(decode(given, exponent_bits)));
    } else {
      ASSERT_EQ(given, encode(x, exponent_bits)) << x;
    }
  };
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const float x = to_float(T{uint16_t(bits)}), expected = decode(uint16_t(bits), exponent_bits);
    if (isnan(expected)) {
      ASSERT_TRUE(isnan(x));
      check(x);
      continue;
    }
    ASSERT_EQ(std::bit_cast<uint32_t>(x), std::bit_cast<uint32_t>(expected)) << bits;
    ASSERT_EQ(narrow(x).bits, bits);
    // Halfway to the next number, and what is next to that.
    const float next = to_float(T{uint16_t(bits + 1)});
    if (!isfinite(x) || !isfinite(next)) continue;
    const float middle = float((double(x) + double(next)) / 2);
    for (float y : {middle, nextafterf(middle, INFINITY), nextafterf(middle, -INFINITY)}) check(y);
  }
  Random random;
  for (int i = 0; i < 100'000; ++i)
    check(std::bit_cast<float>(uint32_t(random.integer(0, 0xffffffff))));
  for (float x :
       {65519.99f, 65520.f, 3.3961775e38f, 3.4028235e38f, 2.98e-8f, 2.9802322e-8f, 1e-45f})
    check(x), check(-x);
}
TEST(Emulator, ConversionsBFloat16) { test_conversions<BFloat16>(to_bfloat16, 8); }
TEST(Emulator, ConversionsHalf) { test_conversions<Half>(to_half, 5); }

TEST(Emulator, FastMathematics) {
  for (float x : {-140.f, -3.25f, 0.f, 0.5f, 100.f}) {
    EXPECT_FLOAT_EQ(exp2_fast(x), float(pow(2., double(x))));
    EXPECT_FLOAT_EQ(reciprocal_fast(x + 7), float(1 / (double(x) + 7)));
  }
  EXPECT_EQ(max(int64_t(3), int64_t(-4)), 3);
  EXPECT_EQ(min(3u, 4u), 3u);
}

// ---- planted bugs ----

using planted::Arguments;
using planted::kThreads;

struct Planted {
  const char* name;
  void (*right)(Arguments);
  void (*wrong)(Arguments);
  int (*source)(int);
  std::string kind; // the message begins with it
  int places = 1;   // that it names
};
#define PLANTED(name) #name, planted::name < false>, planted::name < true>
const Planted kPlanted[] = {
    {PLANTED(race_of_stores), planted::mirrored, "race: byte", 2},
    {PLANTED(missing_barrier), planted::mirrored, "race: byte", 2},
    {PLANTED(missing_barrier_before_reuse), planted::mirrored, "race: byte", 2},
    {PLANTED(missing_barrier_after_broadcast), planted::itself, "race: byte 0", 2},
    {PLANTED(warp_sync_after_broadcast), planted::itself, "race: byte 0", 2},
    {PLANTED(race_of_bytes), planted::itself, "race: byte 6 ", 2},
    {PLANTED(missing_warp_sync), planted::neighbour, "race: byte", 2},
    {PLANTED(shuffle_as_barrier), planted::neighbour, "race: byte", 2},
    {PLANTED(warp_sync_of_others), planted::neighbour, "race: byte", 2},
    {PLANTED(warp_sync_across_warps), planted::mirrored, "race: byte", 2},
    {PLANTED(out_of_bounds), planted::itself, "out of bounds: bytes"},
    {PLANTED(before_the_beginning), planted::itself, "out of bounds: bytes -4 to 0 of"},
    {PLANTED(uninitialised), planted::mirrored, "uninitialised read: byte 160 "},
    {PLANTED(misaligned), planted::itself, "misaligned access: byte"},
    {PLANTED(misaligned_global), planted::itself, "misaligned access: global"},
    {PLANTED(missing_copy_wait), planted::mirrored, "race: byte", 2},
    {PLANTED(missing_copy_commit), planted::mirrored, "race: byte", 2},
    {PLANTED(copy_wait_for_too_few), planted::mirrored, "race: byte", 2},
    {PLANTED(missing_barrier_after_copy_wait), planted::mirrored, "race: byte", 2},
    {PLANTED(missing_barrier_before_copy), planted::mirrored, "race: byte", 2},
    {PLANTED(divergent_barrier), planted::mirrored, "divergent barrier: thread", 2},
    {PLANTED(barrier_of_some), planted::itself, "divergent barrier: thread 63 has ended"},
    {PLANTED(barrier_against_shuffle), planted::itself, "divergent barrier: nobody can go on", 2},
    {PLANTED(wrong_mask), planted::lane_zero, "wrong mask: shuffle"},
    {PLANTED(different_masks), planted::lane_zero, "wrong mask: shuffle"},
    {PLANTED(different_shuffles), planted::lane_zero, "wrong mask: shuffle", 2},
    {PLANTED(masks_in_a_circle), planted::itself, "wrong mask: nobody can go on"},
    {PLANTED(lane_that_ended), planted::itself, "wrong mask: all"},
    {PLANTED(source_outside_of_mask), planted::neighbour, "wrong shuffle: shuffle_xor"},
    {PLANTED(deadlock), planted::itself, "deadlock: all spin or wait"},
    {PLANTED(deadlock_with_barriers), planted::itself, "deadlock: all spin or wait"},
    {PLANTED(spin_without_pause), planted::itself, "deadlock: a spin without pause()"},
};
std::ostream& operator<<(std::ostream& stream, const Planted& bug) { return stream << bug.name; }

bool names_line(const std::string& error, int line) {
  const std::string name = "planted.h:" + std::to_string(line);
  for (size_t at = error.find(name); at != std::string::npos; at = error.find(name, at + 1))
    if (!isdigit(error[at + name.size()])) return true; // there is always more: "by thread"
  return false;
}

class PlantedBug : public ::testing::TestWithParam<Planted> {
 protected:
  PlantedBug() : in_(kThreads), out_(kThreads) {
    for (int& x : in_) x = int(random_.integer(1, 1'000'000'000));
  }
  void run(void (*kernel)(Arguments), unsigned blocks = 1) {
    std::fill(out_.begin(), out_.end(), -1);
    flag_ = 0;
    alignas(16) int in[kThreads];
    std::copy(in_.begin(), in_.end(), in);
    launch(
        kernel, dim3(blocks), kThreads, planted::kSharedBytes, nullptr,
        Arguments{in, out_.data(), &flag_});
  }
  Random random_;
  std::vector<int> in_, out_;
  unsigned flag_ = 0;
};

TEST_P(PlantedBug, WithoutItTheKernelIsRight) {
  in_every_order([&] {
    ASSERT_EQ(error_of([&] { run(GetParam().right); }), "");
    for (int i = 0; i < kThreads; ++i)
      ASSERT_EQ(out_[size_t(i)], in_[size_t(GetParam().source(i))]) << i;
  });
}

TEST_P(PlantedBug, IsFoundInEveryOrder) {
  in_every_order([&] {
    emulator::options().patience = 20'000;
    const std::string error = error_of([&] { run(GetParam().wrong); });
    ASSERT_TRUE(starts_with(error, GetParam().kind)) << error;
    for (int place = 0; place < GetParam().places; ++place)
      EXPECT_TRUE(names_line(error, planted::marked_lines[place]))
          << "line " << planted::marked_lines[place] << " is not in " << error;
    EXPECT_TRUE(contains(error, "thread ")) << error;
    EXPECT_TRUE(contains(error, "block (0, 0, 0)")) << error;
    ASSERT_EQ(error_of([&] { run(GetParam().right); }), ""); // nothing is left of it
  });
}

INSTANTIATE_TEST_SUITE_P(Emulator, PlantedBug, ::testing::ValuesIn(kPlanted), [](const auto& info) {
  return std::string(info.param.name);
});

// ---- memory that the emulator leaves to AddressSanitizer ----

#if TORCH_EXT_ADDRESS_SANITIZER
__global__ void beyond_global(const int* in, int* out, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i <= count) store_global(out + i, load_global(in + min(i, count - 1)));
}
__global__ void beyond_global_plain(const int* in, int* out, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = in[i + 1];
}
__attribute__((no_sanitize("undefined"))) __global__ void beyond_local(
    const int* in, int* out, int count) {
  int local[8];
  for (int i = 0; i < 8; ++i) local[i] = in[i];
  block_sync();
  out[0] = local[count]; // a stack of a fiber has the sanitizer's guards as well
}
TEST(EmulatorDeathTest, AddressSanitizerWatchesGlobalMemory) {
  const std::unique_ptr<int[]> in(new int[100]()), out(new int[100]);
  const int* const input = in.get();
  EXPECT_DEATH(
      launch(beyond_global, dim3(2), 64, 0, nullptr, input, out.get(), 100),
      "heap-buffer-overflow(.|\n)*WRITE of size 4(.|\n)*beyond_global");
  EXPECT_DEATH(
      launch(beyond_global_plain, dim3(2), 64, 0, nullptr, input, out.get(), 100),
      "heap-buffer-overflow(.|\n)*READ of size 4(.|\n)*beyond_global_plain");
  EXPECT_DEATH(
      launch(beyond_local, 1, 64, 0, nullptr, input, out.get(), 8), "stack-buffer-overflow");
}
#endif

// ---- speed ----

__global__ void many_accesses(int* out) {
  const Shared<int> tile = shared_memory<int>();
  const int i = int(threadIdx.x);
  tile.store(i, i);
  int sum = 0;
  for (int k = 0; k < 500; ++k) {
    sum += tile.load(i);
    tile.store(i, sum & 0xff);
  }
  out[i] = sum;
}
__global__ void many_barriers(int* out) {
  for (int k = 0; k < 100; ++k) {
    block_sync();
    out[threadIdx.x] += shuffle_xor(~0u, k, 1);
  }
}
TEST(Emulator, SpeedOfAccesses) { // the tests' report has the time, nothing is asserted
  std::vector<int> out(256);
  launch(many_accesses, 1, 256, 1024, nullptr, out.data());
}
TEST(Emulator, SpeedOfBarriersAndShuffles) {
  std::vector<int> out(256);
  launch(many_barriers, 1, 256, 0, nullptr, out.data());
}

} // namespace
} // namespace torch_ext::test
