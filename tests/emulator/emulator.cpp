// The emulator's scheduler of fibers and its shadow of shared memory: see emulator.h.
#include "emulator.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <deque>
#include <exception>
#include <random>
#include <vector>

#if TORCH_EXT_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace torch_ext::emulator {
namespace {

// ---- fibers ----

struct Fiber {
  ucontext_t context;
  void* fake_stack = nullptr; // AddressSanitizer's
  const void* bottom = nullptr;
  size_t size = 0;
};

// Stacks outlive launches: a mapping costs more than a small kernel. Below each is a page that nobody may touch.
std::vector<void*> spare_stacks;
size_t spare_size = 0;

void* take_stack(size_t size) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  if (size != spare_size) {
    for (void* p : spare_stacks) munmap(static_cast<char*>(p) - page, spare_size + page);
    spare_stacks.clear();
    spare_size = size;
  }
  if (spare_stacks.empty()) {
    void* p = mmap(
        nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
        -1, 0);
    if (p == MAP_FAILED || mprotect(p, page, PROT_NONE)) throw std::bad_alloc();
    return static_cast<char*>(p) + page;
  }
  void* p = spare_stacks.back();
  spare_stacks.pop_back();
  return p;
}

// ---- what is known of each byte of shared memory ----

struct Access {
  uint32_t epoch = 0; // barriers of the block so far, from 1; 0: none
  uint32_t clock = 0; // of the thread, see Thread::clock
  uint32_t site = 0;
  uint16_t thread = 0;
  // Of a write: an asynchronous copy is pending. Of a read: clock is a place in Block::read_sets.
  uint16_t flag = 0;
};
// The last write, and the reads since then: only those of the present epoch matter, and of those ordered one after
// another only the last.
struct Cell {
  Access write, read;
};
// Reads of one byte in one epoch by several threads: the last of each lane of one warp, and one of any other warp. More
// are not needed: whoever writes in this epoch is in another warp than one of them.
struct ReadSet {
  struct Read {
    uint32_t clock = 0, site = 0;
  };
  int warp = 0;
  std::array<Read, 32> lanes;
  Access other;
  void add(const Access& read) {
    if (read.thread / 32 == warp) {
      lanes[read.thread % 32] = {read.clock, read.site};
    } else {
      other = read;
    }
  }
};

// ---- threads, blocks, and the machine ----

struct Block;

struct Copy {
  int64_t byte;
  const char* from;
  int valid_bytes, group;
  Location at;
};

struct Thread {
  enum State { ready, at_barrier, in_warp, ended };
  Fiber fiber;
  void* stack = nullptr;
  Block* block = nullptr;
  int index = 0;
  State state = ready;
  // The call it waits in.
  const char* call = nullptr;
  Location at;
  unsigned mask = 0;
  const void* in = nullptr;
  void* out = nullptr;
  // A vector clock over the lanes of its warp: accesses of lane i up to clock[i] come before what this thread does
  // next. Its own entry counts its warp_syncs. Threads of different warps are ordered by the block's epoch alone.
  std::array<uint32_t, 32> clock;
  std::deque<Copy> copies; // pending
  int groups = 0;          // committed
  int64_t acquires = 0;    // since it last waited or changed anything

  int lane() const { return index % 32; }
};

struct Block {
  uint3 index = {};
  std::vector<Thread> threads;
  int waiting = 0, ended = 0; // threads at the barrier, and those that are through
  Location barrier;           // where the first one waits
  int calm = 0;               // barriers and collectives since anyone called pause()
  uint32_t epoch = 1;
  std::vector<char> shared;
  std::vector<Cell> cells;
  // Of the present epoch, and which of them are free again.
  std::vector<ReadSet> read_sets;
  std::vector<uint32_t> spare_sets;

  explicit Block(int count) : threads(size_t(count)), ended(count) {}
  int size() const { return int(threads.size()); }
  Thread* lane_of(int warp, int lane) { // null: the block ends within the warp
    const int i = warp * 32 + lane;
    return i < size() ? &threads[size_t(i)] : nullptr;
  }
};

struct Machine {
  const Options options = emulator::options();
  const std::function<void()>& kernel;
  int shared_bytes;
  std::deque<Block> blocks; // resident
  std::deque<Thread*> ready;
  std::mt19937_64 random{options.seed};
  uint64_t switch_below = uint64_t(options.switching * 0x1p32);
  Fiber main;
  Fiber* previous = nullptr; // ran before the present one
  Thread* current = nullptr; // null: main
  int64_t idle = 0;          // switches since the last progress
  std::exception_ptr error;

  Machine(int threads, int shared_bytes, const std::function<void()>& kernel)
      : kernel(kernel), shared_bytes(shared_bytes) {
    const uint64_t count = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
    const uint64_t resident = std::min(count, uint64_t(std::max(1, options.resident)));
    for (uint64_t i = 0; i < resident; ++i) blocks.emplace_back(threads);
  }
  ~Machine() {
    for (Block& block : blocks)
      for (Thread& thread : block.threads)
        if (thread.stack) spare_stacks.push_back(thread.stack);
  }
  Machine(const Machine&) = delete;

  void run(dim3 grid);
  void start(Block& block, uint64_t index);
  void switch_to(Thread* to);
  void yield();
  void release(Block& block, int first, unsigned mask);
  void release_all(Block& block);
  void completed(Block& block);
  void maybe_switch();
  std::string summary();
};
Machine* machine = nullptr;

std::string name_of(uint3 block) {
  return "block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
         std::to_string(block.z) + ")";
}
std::string name_of(int thread) { return "thread " + std::to_string(thread); }

// Shared memory remembers where each byte was used: places as numbers.
std::vector<const char*> site_files;
uint32_t site_of(Location at) {
  static size_t last = 0;
  if (last >= site_files.size() || site_files[last] != at.file) {
    last = size_t(std::find(site_files.begin(), site_files.end(), at.file) - site_files.begin());
    if (last == site_files.size()) site_files.push_back(at.file);
  }
  return uint32_t(last) << 20 | uint32_t(at.line & 0xfffff);
}
std::string site_name(uint32_t site) {
  return to_string(Location{site_files[site >> 20], int(site & 0xfffff)});
}

Thread& thread_calling(const char* name, Location at) {
  if (!machine || !machine->current) fail("no kernel", std::string(name) + " on the host", at);
  return *machine->current;
}

// ---- scheduling ----

void end_thread();

void enter() {
#if TORCH_EXT_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &machine->previous->bottom, &machine->previous->size);
#endif
  try {
    machine->kernel();
    end_thread();
  } catch (...) { // no switch in here: the exception would never be let go
    machine->error = std::current_exception();
  }
  const Block& block = *machine->current->block;
  if (machine->error || block.ended == block.size()) machine->switch_to(nullptr);
  machine->yield();
}

void Machine::switch_to(Thread* to) {
  Thread* const thread = current;
  if (thread == to) return;
  Fiber &from = thread ? thread->fiber : main, &next = to ? to->fiber : main;
  current = to;
  previous = &from;
  if (to) {
    threadIdx = {unsigned(to->index), 0, 0};
    blockIdx = to->block->index;
  }
#if TORCH_EXT_ADDRESS_SANITIZER
  const bool last = thread && thread->state == Thread::ended;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, next.bottom, next.size);
#endif
  swapcontext(&from.context, &next.context);
#if TORCH_EXT_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// To the next thread that can run, the present one if it is the only one, or back to run() if there is none.
void Machine::yield() {
  ++idle;
  if (ready.empty()) return switch_to(nullptr);
  if (options.order == Options::random) std::swap(ready.front(), ready[random() % ready.size()]);
  Thread* next = ready.front();
  ready.pop_front();
  switch_to(next);
}

void Machine::release(Block& block, int first, unsigned mask) { // bits of threads from first on
  for (int i = 0; i < 32; ++i) {
    const int bit = options.order == Options::reversed ? 31 - i : i;
    if (!(mask >> bit & 1)) continue;
    Thread& thread = block.threads[size_t(first + bit)];
    thread.state = Thread::ready;
    thread.call = nullptr;
    ready.push_back(&thread);
  }
}

void Machine::release_all(Block& block) {
  const int warps = (block.size() + 31) / 32;
  for (int i = 0; i < warps; ++i) {
    const int first = 32 * (options.order == Options::reversed ? warps - 1 - i : i);
    release(block, first, ~0u >> (32 - std::min(32, block.size() - first)));
  }
}

// A barrier or collective is progress, but not where a block spins with barriers in the loop.
void Machine::completed(Block& block) {
  if (++block.calm > 2 * block.size()) idle = 0;
}

void Machine::maybe_switch() {
  if (options.order != Options::random || (random() & 0xffffffff) >= switch_below) return;
  ready.push_back(current);
  yield();
}

void Machine::start(Block& block, uint64_t index) {
  block.index = {
      unsigned(index % gridDim.x), unsigned(index / gridDim.x % gridDim.y),
      unsigned(index / gridDim.x / gridDim.y)};
  block.waiting = block.ended = block.calm = 0;
  block.epoch = 1;
  block.read_sets.clear();
  block.spare_sets.clear();
  block.cells.assign(size_t(shared_bytes), Cell());
  block.shared.resize(size_t(shared_bytes));
  if (options.poison) std::fill(block.shared.begin(), block.shared.end(), 0x7f);
  for (int i = 0; i < block.size(); ++i) {
    Thread& thread = block.threads[size_t(i)];
    thread.block = &block;
    thread.index = i;
    thread.call = nullptr;
    thread.clock = {};
    thread.clock[size_t(thread.lane())] = 1;
    thread.copies.clear();
    thread.groups = 0;
    thread.acquires = 0;
    if (!thread.stack) thread.stack = take_stack(options.stack);
    Fiber& fiber = thread.fiber;
    fiber.bottom = thread.stack;
    fiber.size = options.stack;
#if TORCH_EXT_ADDRESS_SANITIZER
    __asan_unpoison_memory_region(thread.stack, options.stack); // of a thread that was abandoned
#endif
    getcontext(&fiber.context);
    fiber.context.uc_link = nullptr;
    fiber.context.uc_stack.ss_sp = thread.stack;
    fiber.context.uc_stack.ss_size = options.stack;
    makecontext(&fiber.context, enter, 0);
    // AddressSanitizer would forget what it knows of a context's stack at every switch.
    fiber.context.uc_stack.ss_sp = nullptr;
    fiber.context.uc_stack.ss_size = 0;
  }
  release_all(block);
  idle = 0;
}

void Machine::run(dim3 grid) {
  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  if (options.order == Options::reversed) std::reverse(order.begin(), order.end());
  if (options.order == Options::random) std::shuffle(order.begin(), order.end(), random);
  size_t started = 0;
  while (true) {
    bool running = false;
    for (Block& block : blocks) {
      if (block.ended == block.size() && started < order.size()) start(block, order[started++]);
      running |= block.ended < block.size();
    }
    if (!running) return;
    if (ready.empty()) {
      bool barrier = false;
      for (Block& block : blocks) barrier |= block.waiting > 0;
      fail(barrier ? "divergent barrier" : "wrong mask", "nobody can go on" + summary(), {});
    }
    yield();
    if (error) std::rethrow_exception(error);
  }
}

// Where the threads of all resident blocks are.
std::string Machine::summary() {
  std::string text;
  for (Block& block : blocks) {
    if (block.ended == block.size()) continue;
    text += "; " + name_of(block.index) + ":";
    for (int i = 0, end; i < block.size(); i = end) {
      const auto where = [&](int k) {
        const Thread& t = block.threads[size_t(k)];
        if (t.state == Thread::ended) return std::string(" ended");
        if (!t.call) return std::string(" can go on");
        return std::string(t.state == Thread::ready ? " spins with " : " waits in ") + t.call +
               " at " + to_string(t.at);
      };
      const std::string here = where(i);
      for (end = i + 1; end < block.size() && where(end) == here;) ++end;
      text += (i ? ", " : " ") + name_of(i) + (end > i + 1 ? "..." + std::to_string(end - 1) : "") +
              here;
      if (text.size() > 2000) return text + ", ...";
    }
  }
  return text;
}

void end_thread() {
  Thread& thread = *machine->current;
  Block& block = *thread.block;
  if (block.waiting)
    fail(
        "divergent barrier", name_of(thread.index) + " has ended, others wait in the block_sync",
        block.barrier);
  for (int i = 0; i < 32; ++i) {
    const Thread* other = block.lane_of(thread.index / 32, i);
    if (other && other->state == Thread::in_warp && (other->mask >> thread.lane() & 1))
      fail(
          "wrong mask",
          std::string(other->call) + " of " + name_of(other->index) + " names lane " +
              std::to_string(thread.lane()) + ", which has ended",
          other->at);
  }
  thread.state = Thread::ended;
  machine->idle = 0;
  ++block.ended;
}

// ---- happens-before ----

bool ordered(const Access& before, const Thread& thread) {
  return before.epoch < thread.block->epoch || (before.thread / 32 == thread.index / 32 &&
                                                before.clock <= thread.clock[before.thread % 32]);
}

[[noreturn]] void fail_race(
    int64_t byte, const char* what, const Access& before, const char* now, Location at) {
  fail(
      "race",
      "byte " + std::to_string(byte) + " of shared memory, no barrier between the " + what +
          " by thread " + std::to_string(before.thread) + " at " + site_name(before.site) +
          " and the " + now,
      at);
}

[[noreturn]] void fail_pending(int64_t byte, const char* now, Location at) {
  for (const Thread& thread : machine->current->block->threads)
    for (const Copy& copy : thread.copies)
      if (byte >= copy.byte && byte < copy.byte + 16)
        fail(
            "race",
            "byte " + std::to_string(byte) + " of shared memory, the asynchronous copy by " +
                name_of(thread.index) + " at " + to_string(copy.at) + " is pending at the " + now,
            at);
  abort();
}

void check_read(Thread& thread, int64_t byte, const Access& me, Location at) {
  Block& block = *thread.block;
  Cell& cell = block.cells[size_t(byte)];
  if (cell.write.flag) fail_pending(byte, "load", at);
  if (!cell.write.epoch)
    fail("uninitialised read", "byte " + std::to_string(byte) + " of shared memory", at);
  if (!ordered(cell.write, thread)) fail_race(byte, "store", cell.write, "load", at);
  if (cell.read.epoch == block.epoch && cell.read.flag) {
    block.read_sets[cell.read.clock].add(me);
  } else if (cell.read.epoch != block.epoch || ordered(cell.read, thread)) {
    cell.read = me;
  } else {
    if (block.spare_sets.empty()) {
      block.spare_sets.push_back(uint32_t(block.read_sets.size()));
      block.read_sets.emplace_back();
    }
    const uint32_t place = block.spare_sets.back();
    block.spare_sets.pop_back();
    ReadSet& set = block.read_sets[place];
    set = {};
    set.warp = cell.read.thread / 32;
    set.add(cell.read);
    set.add(me);
    cell.read.clock = place;
    cell.read.flag = 1;
  }
}

void check_write(Thread& thread, int64_t byte, Location at) {
  Block& block = *thread.block;
  const Cell& cell = block.cells[size_t(byte)];
  if (cell.write.flag) fail_pending(byte, "store", at);
  if (!ordered(cell.write, thread)) fail_race(byte, "store", cell.write, "store", at);
  if (cell.read.epoch != block.epoch) return;
  if (!cell.read.flag) {
    if (!ordered(cell.read, thread)) fail_race(byte, "load", cell.read, "store", at);
    return;
  }
  const ReadSet& set = block.read_sets[cell.read.clock];
  for (int i = 0; i < 32; ++i) {
    const ReadSet::Read& read = set.lanes[size_t(i)];
    const Access access{block.epoch, read.clock, read.site, uint16_t(set.warp * 32 + i)};
    if (read.clock && !ordered(access, thread)) fail_race(byte, "load", access, "store", at);
  }
  if (set.other.epoch && !ordered(set.other, thread))
    fail_race(byte, "load", set.other, "store", at);
  block.spare_sets.push_back(cell.read.clock); // nobody looks at these reads any more
}

Access access_by(const Thread& thread, Location at) {
  return {
      thread.block->epoch, thread.clock[size_t(thread.lane())], site_of(at),
      uint16_t(thread.index)};
}

} // namespace

// ---- the interface ----

Options& options() {
  static Options value;
  return value;
}

std::string to_string(Location at) {
  return at.file ? std::string(at.file) + ":" + std::to_string(at.line) : std::string();
}

void fail(const std::string& kind, const std::string& what, Location at) {
  std::string text = kind + ": " + what;
  if (at.file) text += " at " + to_string(at);
  Thread* const thread = machine ? machine->current : nullptr;
  if (thread) text += " by " + name_of(thread->index) + " of " + name_of(thread->block->index);
  if (machine) {
    const char* const names[] = {"forward", "reversed", "random"};
    text += std::string(" (") + names[machine->options.order] + " order";
    if (machine->options.order == Options::random)
      text += ", seed " + std::to_string(machine->options.seed);
    text += ")";
  }
  throw Error(text);
}

void run(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (machine) fail("wrong launch", "from within a kernel", {});
  const auto check = [](bool right, const char* what) {
    if (!right) fail("wrong launch", what, {});
  };
  check(threads >= 1 && threads <= 1024, "1 to 1024 threads a block");
  check(shared_bytes >= 0 && shared_bytes <= 227 << 10, "up to 227 KiB of shared memory");
  check(grid.x >= 1 && grid.y >= 1 && grid.z >= 1, "no blocks");
  check(grid.x < 1u << 31 && grid.y <= 65535 && grid.z <= 65535, "too many blocks");
  gridDim = grid;
  blockDim = dim3(unsigned(threads));
  Machine state(threads, shared_bytes, kernel);
  struct Running {
    explicit Running(Machine* state) { machine = state; }
    ~Running() { machine = nullptr; }
  } running(&state);
  state.run(grid);
}

void block_sync(Location at) {
  Thread& thread = thread_calling("block_sync", at);
  Block& block = *thread.block;
  if (block.ended || (block.waiting && !(block.barrier == at)))
    for (const Thread& other : block.threads) {
      if (other.state == Thread::ended)
        fail("divergent barrier", name_of(other.index) + " has ended before the block_sync", at);
      if (other.state == Thread::at_barrier)
        fail(
            "divergent barrier",
            name_of(other.index) + " waits in the block_sync at " + to_string(other.at) +
                ", not in the one",
            at);
    }
  block.barrier = at;
  thread.state = Thread::at_barrier;
  thread.acquires = 0;
  thread.call = "block_sync";
  thread.at = at;
  if (++block.waiting == block.size()) {
    block.waiting = 0;
    ++block.epoch;
    block.read_sets.clear();
    block.spare_sets.clear();
    machine->completed(block);
    machine->release_all(block);
  }
  machine->yield();
}

void collective(
    const char* name, unsigned mask, const void* in, void* out, Finish finish, Location at) {
  Thread& thread = thread_calling(name, at);
  Block& block = *thread.block;
  const int warp = thread.index / 32;
  const auto lane_name = [](int lane) { return "lane " + std::to_string(lane); };
  if (!(mask >> thread.lane() & 1))
    fail(
        "wrong mask", std::string(name) + " by " + lane_name(thread.lane()) + ", not in its mask",
        at);
  unsigned arrived = 1u << thread.lane();
  for (int i = 0; i < 32; ++i) {
    const Thread* other = block.lane_of(warp, i);
    const bool named = mask >> i & 1;
    if (named && (!other || other->state == Thread::ended))
      fail(
          "wrong mask",
          std::string(name) + " names " + lane_name(i) + ", which " +
              (other ? "has ended" : "is none"),
          at);
    if (!other || other == &thread || other->state != Thread::in_warp) continue;
    // One that is not named, or does not name this one, may come to the other's call later.
    if (!named || !(other->mask >> thread.lane() & 1)) continue;
    if (other->mask != mask || !(other->at == at) || strcmp(other->call, name))
      fail(
          "wrong mask",
          std::string(other->call) + " by " + lane_name(i) + " at " + to_string(other->at) +
              " does not match, in " +
              (other->mask != mask ? "its mask, " : "where it is called, ") + name + " by " +
              lane_name(thread.lane()),
          at);
    arrived |= 1u << i;
  }
  thread.state = Thread::in_warp;
  thread.acquires = 0;
  thread.call = name;
  thread.at = at;
  thread.mask = mask;
  thread.in = in;
  thread.out = out;
  if (arrived == mask) {
    std::array<const void*, 32> inputs = {};
    std::array<void*, 32> outputs = {};
    std::array<uint32_t, 32> latest = {};
    for (size_t i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      const Thread& other = *block.lane_of(warp, int(i));
      inputs[i] = other.in;
      outputs[i] = other.out;
      for (size_t k = 0; !finish && k < 32; ++k) latest[k] = std::max(latest[k], other.clock[k]);
    }
    for (size_t i = 0; !finish && i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      Thread& other = *block.lane_of(warp, int(i));
      other.clock = latest;
      ++other.clock[i]; // what it does from now on, the others have not waited for
    }
    if (finish) finish(mask, inputs.data(), outputs.data());
    machine->completed(block);
    machine->release(block, warp * 32, mask);
  }
  machine->yield();
}

void check_source(const char* name, unsigned mask, int source, Location at) {
  const Thread& thread = thread_calling(name, at);
  if ((mask >> thread.lane() & 1) && !(mask >> source & 1))
    fail(
        "wrong shuffle",
        std::string(name) + " by lane " + std::to_string(thread.lane()) + " from lane " +
            std::to_string(source) + ", which is not in the mask",
        at);
}

void check_shared(int64_t byte, int size, Location at) {
  if (byte < 0 || byte + size > machine->shared_bytes)
    fail(
        "out of bounds",
        "bytes " + std::to_string(byte) + " to " + std::to_string(byte + size) + " of " +
            std::to_string(machine->shared_bytes) + " of shared memory",
        at);
  if (byte % size)
    fail(
        "misaligned access",
        "byte " + std::to_string(byte) + " of shared memory, of " + std::to_string(size) + " bytes",
        at);
}

void shared_load(int64_t byte, void* to, int size, Location at) {
  Thread& thread = thread_calling("load", at);
  machine->maybe_switch();
  check_shared(byte, size, at);
  const Access me = access_by(thread, at);
  for (int i = 0; i < size; ++i) check_read(thread, byte + i, me, at);
  memcpy(to, thread.block->shared.data() + byte, size_t(size));
}

void shared_store(int64_t byte, const void* from, int size, Location at) {
  Thread& thread = thread_calling("store", at);
  machine->maybe_switch();
  check_shared(byte, size, at);
  const Access me = access_by(thread, at);
  for (int i = 0; i < size; ++i) {
    check_write(thread, byte + i, at);
    thread.block->cells[size_t(byte + i)] = {me, {}};
  }
  memcpy(thread.block->shared.data() + byte, from, size_t(size));
}

// The copy may happen at any time from now to its wait: what is wrong at either end or in between is an error. It is
// done at the wait.
void copy_async(int64_t byte, const void* from, int valid_bytes, Location at) {
  Thread& thread = thread_calling("copy_async16", at);
  machine->maybe_switch();
  check_shared(byte, 16, at);
  check_aligned(from, 16, at);
  if (valid_bytes < 0 || valid_bytes > 16)
    fail("out of bounds", "valid_bytes is " + std::to_string(valid_bytes) + ", not 0...16", at);
  for (int i = 0; i < 16; ++i) {
    check_write(thread, byte + i, at);
    thread.block->cells[size_t(byte + i)].write.flag = 1;
  }
  thread.copies.push_back({byte, static_cast<const char*>(from), valid_bytes, thread.groups, at});
}

void copy_async_commit(Location at) { ++thread_calling("copy_async_commit", at).groups; }

void copy_async_wait(int groups, Location at) {
  Thread& thread = thread_calling("copy_async_wait", at);
  machine->maybe_switch();
  while (!thread.copies.empty() && thread.copies.front().group < thread.groups - groups) {
    const Copy copy = thread.copies.front();
    thread.copies.pop_front();
    const Access me = access_by(thread, copy.at);
    for (int i = 0; i < 16; ++i) {
      thread.block->shared[size_t(copy.byte + i)] = i < copy.valid_bytes ? copy.from[i] : char(0);
      thread.block->cells[size_t(copy.byte + i)] = {me, {}};
    }
  }
}

void pause(Location at) {
  Thread& thread = thread_calling("pause", at);
  thread.call = "pause";
  thread.at = at;
  thread.block->calm = 0;
  if (machine->idle > machine->options.patience)
    fail("deadlock", "all spin or wait" + machine->summary() + "; found in pause", at);
  thread.acquires = 0;
  machine->ready.push_back(&thread);
  machine->yield();
  thread.call = nullptr;
}

void progress() {
  if (machine) machine->idle = 0;
}

void synchronizes(Effect effect, Location at) {
  Thread& thread = thread_calling("an access that orders memory", at);
  machine->maybe_switch();
  if (effect == Effect::changes) machine->idle = thread.acquires = 0;
  if (effect == Effect::acquires && ++thread.acquires > machine->options.patience)
    fail("deadlock", "a spin without pause()", at);
}

} // namespace torch_ext::emulator

namespace torch_ext::cuda {
namespace {

struct Fragments {
  uint32_t a[4], b[2];
};

template <class T>
void multiply(unsigned, const void* const* in, void* const* out) {
  const auto value = [](uint32_t pair, int k) {
    return double(to_float(T{uint16_t(k & 1 ? pair >> 16 : pair)}));
  };
  const auto of = [&](int lane) { return static_cast<const Fragments*>(in[lane]); };
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float& d = static_cast<float*>(out[row % 8 * 4 + column / 2])[row / 8 * 2 + column % 2];
      double sum = d;
      for (int k = 0; k < 16; ++k) {
        const uint32_t a = of(row % 8 * 4 + k % 8 / 2)->a[row / 8 + k / 8 * 2];
        const uint32_t b = of(column * 4 + k % 8 / 2)->b[k / 8];
        sum += value(a, k) * value(b, k);
      }
      d = float(sum);
    }
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location at) {
  const Fragments in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulator::collective("mma_m16n8k16", ~0u, &in, d, multiply<T>, at);
}

} // namespace

void mma_m16n8k16(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16, Location at) {
  mma<BFloat16>(d, a, b, at);
}
void mma_m16n8k16(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half, Location at) {
  mma<Half>(d, a, b, at);
}

void load_matrix_bytes(uint32_t (&r)[4], int64_t row_byte, bool transposed, Location at) {
  struct Row {
    uint16_t elements[8];
  } row;
  emulator::shared_load(row_byte, &row, sizeof row, at);
  std::array<int64_t, 32> rows;
  emulator::collective(
      transposed ? "load_matrix_x4_transposed" : "load_matrix_x4", ~0u, &row_byte, &rows,
      [](unsigned, const void* const* in, void* const* out) {
        for (int i = 0; i < 32; ++i)
          for (size_t k = 0; k < 32; ++k)
            (*static_cast<std::array<int64_t, 32>*>(out[i]))[k] =
                *static_cast<const int64_t*>(in[k]);
      },
      at);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int along = lane() % 4 * 2 + i, across = lane() / 4;
      const int from = transposed ? along : across, element = transposed ? across : along;
      emulator::shared_load(rows[size_t(matrix * 8 + from)] + element * 2, &pair[i], 2, at);
    }
    r[matrix] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
  }
}

} // namespace torch_ext::cuda
