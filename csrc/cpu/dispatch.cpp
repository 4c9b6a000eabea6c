#include "dispatch.h"

#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <thread>

#include "../cells/all.h"

namespace torch_ext::cpu {

namespace generic {
extern const KernelTable kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
#endif

#if defined(__x86_64__)
extern const bool has_bfloat16; // simd.h's
const bool has_bfloat16 = __builtin_cpu_supports("avx512bf16");
#endif

namespace {

// The sets compiled in, best last, each with torch's name for it and whether this machine runs it.
struct Set {
  const KernelTable* table;
  const char* aten_name;
  bool supported;
};
const std::vector<Set>& sets() {
  static const std::vector<Set> all = {
    {&generic::kTable, "default", true},
#if defined(__x86_64__)
    {&avx2::kTable, "avx2",
     __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c")},
    {&avx512::kTable, "avx512",
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("f16c")},
#endif
  };
  return all;
}

const KernelTable* automatic() {
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const KernelTable* best = sets().front().table;
  for (const Set& s : sets()) {
    if (s.supported) best = s.table;
    if (limit && !std::strcmp(limit, s.aten_name)) break;
  }
  return best;
}

std::atomic<const KernelTable*> forced{nullptr};

const KernelTable& table() {
  if (const KernelTable* t = forced.load(std::memory_order_relaxed)) return *t;
  static const KernelTable* const chosen = automatic();
  return *chosen;
}

int64_t l2_bytes() {
  static const int64_t bytes = [] {
    long n = -1;
#ifdef _SC_LEVEL2_CACHE_SIZE
    n = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return int64_t(n > 0 ? n : 1 << 20);
  }();
  return bytes;
}

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::f32:
      return 4;
    case DType::f64:
    case DType::c64:
      return 8;
    default:
      return 16;
  }
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
bool aligned(const void* p, int64_t to) {
  return reinterpret_cast<uintptr_t>(p) % uint64_t(to) == 0;
}

// num_in, num_out: arrays over time that are read and written. `out` are the written ones.
Plan plan_of(
    const DiagonalProblem& p, DType dtype, int num_in, int num_out, void* const* out,
    const KernelTable& t, int threads) {
  // Channels move in groups of four vectors; an item takes whole groups, so that a channel meets the same instructions
  // however many threads there are.
  const int64_t group = 4 * t.vector_bytes / (dtype == DType::f64 || dtype == DType::c128 ? 8 : 4);
  constexpr int64_t kMaxBlock = 16384; // bounds the scratch memory
  Plan plan;
  const int64_t steps = p.num_steps * (p.cu_seqlens ? 1 : p.num_sequences); // of all sequences
  const int64_t bytes = steps * p.width * size_of(dtype);                   // of one array
  plan.sequences_inside =
      p.cu_seqlens != nullptr; // sequences differ in length: give every thread some channels of all
  int64_t blocks = 1;
  if (plan.sequences_inside || p.num_sequences < threads) blocks = threads;
  plan.block = round_up((p.width + blocks - 1) / blocks, group);
  if (plan.block > kMaxBlock) plan.block = kMaxBlock;
  if (plan.block < 1) plan.block = group;
  plan.num_blocks = (p.width + plan.block - 1) / plan.block;
  const int64_t per_thread = bytes * (num_in + num_out) / threads;
  plan.rows = per_thread > l2_bytes();
  plan.tile = plan.rows ? 16 : 64;
  const int64_t store =
      t.vector_bytes * size_of(dtype) / (dtype == DType::f64 || dtype == DType::c128 ? 8 : 4);
  plan.stream = plan.rows && bytes * num_out / threads > l2_bytes() / 2 &&
                p.width * size_of(dtype) % store == 0;
  for (int i = 0; i < num_out; ++i) plan.stream = plan.stream && aligned(out[i], store);
  return plan;
}

template <class Problem>
void run(
    void (*kernel)(const Problem&, const Plan&, int64_t, int64_t), const Problem& p,
    const Plan& plan, int num_arrays, Parallel parallel) {
  const int64_t items = p.num_sequences * plan.num_blocks;
  if (items == 0) return;
  struct Call {
    void (*kernel)(const Problem&, const Plan&, int64_t, int64_t);
    const Problem& p;
    const Plan& plan;
  } call{kernel, p, plan};
  const auto body = [](int64_t begin, int64_t end, void* ctx) {
    const Call& c = *static_cast<const Call*>(ctx);
    c.kernel(c.p, c.plan, begin, end);
  };
  // A thread is worth waking for some five microseconds of work: about 5e4 array elements.
  const int64_t steps = p.num_steps * (p.cu_seqlens ? 1 : p.num_sequences);
  const int64_t per_item = 1 + steps * p.width / items * num_arrays;
  const int64_t grain = 1 + 50000 / per_item;
  if (parallel.run && parallel.threads > 1 && items > grain) {
    parallel.run(items, grain, body, &call);
  } else {
    body(0, items, &call);
  }
}

// ---- selective scan ----

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
std::unique_ptr<void, Free> allocate(int64_t bytes) {
  void* memory = std::aligned_alloc(64, size_t(round_up(bytes + 64, 64)));
  if (!memory) throw std::bad_alloc();
  return std::unique_ptr<void, Free>(memory);
}

// Runs body(begin, end) over items that make `work` state updates together.
template <class Body>
void run_items(int64_t items, int64_t work, Parallel parallel, const Body& body) {
  constexpr int64_t kWorth = 50000; // a thread is worth waking for some ten microseconds of work
  const int64_t grain = 1 + kWorth * items / (work + 1);
  if (parallel.run && parallel.threads > 1 && items > grain) {
    parallel.run(
        items, grain,
        [](int64_t begin, int64_t end, void* ctx) { (*static_cast<const Body*>(ctx))(begin, end); },
        const_cast<Body*>(&body));
  } else {
    body(0, items);
  }
}

// Slots of a group, and bytes of one state of a slot.
int64_t slots_of(const SelectiveScanProblem& p, DType dtype, const KernelTable& t) {
  const int64_t lanes = t.vector_bytes / (dtype == DType::f64 || dtype == DType::c128 ? 8 : 4);
  return (p.width / p.num_groups + lanes - 1) / lanes;
}

SelectiveScanPlan forward_plan(
    const SelectiveScanForward& p, DType dtype, const KernelTable& t, int threads) {
  SelectiveScanPlan plan;
  const int64_t slots = slots_of(p, dtype, t);
  // Every thread gets some channels of all sequences, unless there are sequences enough that differ little.
  const bool split = p.cu_seqlens || (p.num_sequences % threads && p.num_sequences < 8 * threads);
  const int64_t blocks = split ? (threads + p.num_groups - 1) / p.num_groups : 1;
  plan.block = (slots + blocks - 1) / blocks;
  // A block's A and states stay in L2.
  const int64_t state_bytes =
      t.vector_bytes * (dtype == DType::c64 || dtype == DType::c128 ? 2 : 1);
  plan.block =
      std::min(plan.block, std::max<int64_t>(8, l2_bytes() / (3 * p.num_states * state_bytes)));
  // A few steps: scratch memory that a call does not have to ask the system for.
  const int64_t steps = p.cu_seqlens ? p.num_steps / p.num_sequences : p.num_steps;
  if (steps < 8) plan.block = std::min<int64_t>(plan.block, 8);
  plan.blocks_per_group = (slots + plan.block - 1) / plan.block;
  const bool complex = dtype == DType::c64 || dtype == DType::c128;
  plan.stream = p.checkpoints &&
                selective_scan_checkpoints(p, complex) *
                        size_of(dtype == DType::bf16 || dtype == DType::f16 ? DType::f32 : dtype) >
                    l2_bytes();
  plan.columns = p.num_steps > 1 && p.u.channel != 1 && p.delta.channel != 1;
  return plan;
}

SelectiveScanPlan backward_plan(const SelectiveScanBackward& p, DType dtype, const KernelTable& t) {
  SelectiveScanPlan plan;
  const int64_t number = dtype == DType::f64 || dtype == DType::c128 ? 8 : 4,
                lanes = t.vector_bytes / number;
  const int64_t numbers = dtype == DType::c64 || dtype == DType::c128 ? 2 : 1; // of a state
  const int64_t width = p.width / p.num_groups;
  plan.slots_per_group = slots_of(p, dtype, t);
  // Each block has its own sums over channels, N for every token: wide enough that they are a quarter of u at most, and that
  // adding up the lanes takes no time; but so that there are eight blocks.
  const int64_t channels = std::max<int64_t>(256, std::min(8 * p.num_states, (width + 7) / 8));
  plan.block = std::min(plan.slots_per_group, (channels + lanes - 1) / lanes);
  plan.blocks_per_group = (plan.slots_per_group + plan.block - 1) / plan.block;
  plan.block =
      (plan.slots_per_group + plan.blocks_per_group - 1) / plan.blocks_per_group; // of like size
  plan.blocks_per_group = (plan.slots_per_group + plan.block - 1) / plan.block;
  plan.parts = std::min<int64_t>(p.num_sequences, 16);
  plan.columns = p.u.channel != 1 && p.delta.channel != 1;
  // What blocks walked together keep (A, states, their gradients) stays in L2.
  const int64_t kept = 4 * plan.block * p.num_states * numbers * t.vector_bytes;
  plan.blocks_together =
      plan.columns ? 1 : std::clamp<int64_t>(l2_bytes() / kept, 1, plan.blocks_per_group);
  plan.slot_bytes =
      t.vector_bytes * (2 + p.num_states * numbers * (1 + p.B.constant + p.C.constant));
  return plan;
}

} // namespace

bool selective_scan_forward(DType dtype, const SelectiveScanForward& p, Parallel parallel) {
  const KernelTable& t = table();
  const SelectiveScanKernels& kernels = t.selective_scan[int(dtype)];
  if (!kernels.forward) return false;
  if (p.num_sequences == 0 || p.width == 0) return true;
  const SelectiveScanPlan plan = forward_plan(p, dtype, t, parallel.threads);
  const int64_t tokens = p.num_steps * (p.cu_seqlens ? 1 : p.num_sequences);
  run_items(
      p.num_sequences * plan.blocks_per_group * p.num_groups, tokens * p.width * p.num_states,
      parallel, [&](int64_t begin, int64_t end) { kernels.forward(p, plan, begin, end); });
  return true;
}

bool selective_scan_backward(DType dtype, const SelectiveScanBackward& p, Parallel parallel) {
  const KernelTable& t = table();
  const SelectiveScanKernels& kernels = t.selective_scan[int(dtype)];
  if (!kernels.backward) return false;
  if (p.width == 0) return true;
  SelectiveScanPlan plan = backward_plan(p, dtype, t);
  const int64_t tokens = p.num_steps * (p.cu_seqlens ? 1 : p.num_sequences);
  const int64_t slots = plan.slots_per_group * p.num_groups;
  const int64_t number = dtype == DType::f64 || dtype == DType::c128 ? 8 : 4;
  const int64_t numbers =
      p.num_groups * p.num_states * (dtype == DType::c64 || dtype == DType::c128 ? 2 : 1);
  // Without sequences there is one part, which is zero.
  const bool nothing = p.num_sequences == 0;
  plan.parts = std::max<int64_t>(plan.parts, 1);
  const auto by_channel = allocate(plan.parts * slots * plan.slot_bytes);
  const auto by_token = allocate(plan.blocks_per_group * 2 * tokens * numbers * number);
  plan.by_channel = by_channel.get(), plan.by_token = by_token.get();
  if (nothing) std::memset(plan.by_channel, 0, size_t(slots * plan.slot_bytes));
  const int64_t work = tokens * p.width * p.num_states;
  const auto run = [&](SelectiveScanBackwardKernel kernel, int64_t items, int64_t updates) {
    run_items(
        items, updates, parallel, [&](int64_t begin, int64_t end) { kernel(p, plan, begin, end); });
  };
  if (!nothing) run(kernels.backward, plan.parts * plan.blocks_per_group * p.num_groups, 3 * work);
  run(kernels.reduce_channels, slots, plan.parts * p.width * p.num_states);
  if (tokens) run(kernels.reduce_tokens, tokens, plan.blocks_per_group * tokens * numbers);
  return true;
}

namespace {

MatrixMemoryPlan matrix_memory_plan(DType dtype, const MatrixMemoryProblem& p, int64_t threads) {
  MatrixMemoryPlan plan;
  plan.chunk = matrix_memory_chunk(p.key_size, p.value_size);
  // Measured, float32 with AVX-512: step by step takes half a chunk's time at 16 x 16, as long at 64 x 64, 1.2 times as long
  // at 128 x 64; for 16 steps or fewer it is the faster one up to 128 x 256. Products of bfloat16 take 0.7 of its time at 64
  // x 64. One or two heads are left to chunks, which more threads can share.
  const int64_t size = p.key_size * p.value_size;
  const bool pairs = dtype == DType::bf16 && has_bfloat16 && !p.wide_keys;
  if (size <= (pairs ? 32 * 32 : 64 * 64) && p.num_sequences * p.num_heads > 2)
    plan.few = std::numeric_limits<int64_t>::max();
  else
    plan.few = size <= 128 * 256 ? 16 : 6;
  const int64_t of_group = p.num_heads / p.num_groups;
  // What the heads of a block share costs a third of a head's own work.
  double best = std::numeric_limits<double>::infinity();
  for (int64_t heads = 1; heads <= std::min(kMatrixMemoryHeads, of_group); ++heads) {
    const int64_t items = p.num_sequences * p.num_groups * ((of_group + heads - 1) / heads);
    const double time = double((items + threads - 1) / threads) * (double(heads) + 1. / 3);
    if (time <= best) best = time, plan.heads = heads;
  }
  plan.blocks = (of_group + plan.heads - 1) / plan.heads;
  plan.rows = p.num_steps * (p.cu_seqlens ? 1 : p.num_sequences);
  return plan;
}
// Rows of states that are an item, where there are to be `items`.
int64_t matrix_memory_slice(const MatrixMemoryProblem& p, int64_t items) {
  const int64_t heads = p.num_sequences * p.num_heads,
                slices = std::min((p.key_size + 15) / 16, (items + heads - 1) / heads);
  return round_up((p.key_size + slices - 1) / slices, 16);
}
int64_t matrix_memory_work(const MatrixMemoryProblem& p, const MatrixMemoryPlan& plan) {
  return plan.rows * p.num_heads * (p.key_size + 1) * (p.value_size + 1) / 8;
}

} // namespace

bool matrix_memory_forward(DType dtype, const MatrixMemoryForward& p, Parallel parallel) {
  const MatrixMemoryKernels& kernels = table().matrix_memory[int(dtype)];
  if (!kernels.forward) return false;
  if (p.num_sequences == 0 || p.num_heads == 0) return true;
  MatrixMemoryPlan plan = matrix_memory_plan(dtype, p, std::max(parallel.threads, 1));
  const int64_t items = p.num_sequences * p.num_groups * plan.blocks,
                chunks = (p.num_steps + plan.chunk - 1) / plan.chunk,
                work = matrix_memory_work(p, plan), number = dtype == DType::f64 ? 8 : 4;
  plan.stream = p.checkpoints && matrix_memory_checkpoints(p) * number > l2_bytes() / 2 &&
                reinterpret_cast<uintptr_t>(p.checkpoints) % 64 == 0;
  const auto run = [&](const MatrixMemoryForward& part, int64_t parts) {
    run_items(parts, work, parallel, [&](int64_t begin, int64_t end) {
      kernels.forward(part, plan, begin, end);
    });
  };
  const bool in_place = p.final_state.m && p.final_state.m == p.initial_state.m;
  if (items >= parallel.threads || chunks < 4 || p.num_steps <= plan.few || p.key_size == 0 ||
      p.cu_seqlens || in_place) {
    run(p, items);
    return true;
  }
  // Fewer heads than threads: two passes, the same sums.
  MatrixMemoryForward both = p;
  std::unique_ptr<void, Free> states;
  if (!both.checkpoints) {
    states = allocate(matrix_memory_checkpoints(p) * number);
    both.checkpoints = states.get();
  }
  plan.keys = matrix_memory_slice(p, 2 * parallel.threads);
  plan.pass = MatrixMemoryPlan::Pass::states;
  run(both, p.num_sequences * p.num_heads * ((p.key_size + plan.keys - 1) / plan.keys));
  plan.pass = MatrixMemoryPlan::Pass::outputs;
  run(both, items * chunks);
  return true;
}

bool matrix_memory_backward(DType dtype, const MatrixMemoryBackward& p, Parallel parallel) {
  const MatrixMemoryKernels& kernels = table().matrix_memory[int(dtype)];
  if (!kernels.backward) return false;
  if (p.num_sequences == 0 || p.num_heads == 0) return true;
  MatrixMemoryPlan plan =
      matrix_memory_plan(dtype, p, 8); // whatever threads there are: heads are added up by blocks
  plan.stream = plan.rows * p.num_heads * p.value_size * 4 > l2_bytes();
  std::unique_ptr<void, Free> shares;
  if (plan.blocks > 1) {
    const int64_t bytes = plan.blocks * plan.rows * p.num_groups *
                          matrix_memory_padded(p.key_size) * (dtype == DType::f64 ? 8 : 4);
    shares = allocate(2 * round_up(bytes, 64));
    plan.shares_of_q = shares.get();
    plan.shares_of_k = static_cast<char*>(shares.get()) + round_up(bytes, 64);
  }
  const int64_t items = p.num_sequences * p.num_groups * plan.blocks,
                chunks = (p.num_steps + plan.chunk - 1) / plan.chunk,
                heads = p.num_sequences * p.num_heads, number = dtype == DType::f64 ? 8 : 4;
  const int64_t work = matrix_memory_work(p, plan);
  const auto run = [&](int64_t parts, int64_t updates) {
    run_items(parts, updates, parallel, [&](int64_t begin, int64_t end) {
      kernels.backward(p, plan, begin, end);
    });
  };
  // In passes over chunks the same sums take 1.2 to 1.5 times as long on one thread, but no thread waits for heads.
  const auto rounds = [&](int64_t parts) {
    return double((parts + parallel.threads - 1) / std::max(parallel.threads, 1));
  };
  // Less work than that is not worth waking threads three times.
  const bool passes = parallel.threads > 1 && chunks >= 4 && p.key_size > 0 && !p.cu_seqlens &&
                      work > 100000 &&
                      1.4 * rounds(items * chunks) < double(chunks) * rounds(items);
  if (!passes) {
    run(items, 3 * work);
  } else {
    // Some chunks at a time, so that what goes from pass to pass stays in the cache.
    const int64_t state = heads * matrix_memory_grad_state_size(p.key_size, p.value_size) * number,
                  weight = heads * int64_t(
                                       number == 8 ? sizeof(MatrixMemoryWeights<double>)
                                                   : sizeof(MatrixMemoryWeights<float>)),
                  together = std::min<int64_t>(
                      chunks,
                      std::max<int64_t>(4 * parallel.threads, (4 << 20) / (state + weight)));
    const auto grad_states = allocate((together + 1) * state),
               weights = allocate(together * weight);
    plan.grad_states = grad_states.get(), plan.weights = weights.get();
    plan.keys = matrix_memory_slice(p, parallel.threads);
    for (plan.end_chunk = chunks; plan.end_chunk > 0; plan.end_chunk = plan.first_chunk) {
      plan.first_chunk = std::max<int64_t>(plan.end_chunk - together, 0);
      const int64_t n = plan.end_chunk - plan.first_chunk, updates = work * n / chunks;
      plan.pass = MatrixMemoryPlan::Pass::queries;
      run(items * n, updates);
      plan.pass = MatrixMemoryPlan::Pass::states;
      run(heads * ((p.key_size + plan.keys - 1) / plan.keys), updates / 2);
      plan.pass = MatrixMemoryPlan::Pass::values;
      run(items * n, updates);
    }
  }
  if (plan.blocks > 1 && plan.rows)
    run_items(
        plan.rows, 2 * plan.rows * plan.blocks * p.num_groups * p.key_size, parallel,
        [&](int64_t begin, int64_t end) { kernels.reduce(p, plan, begin, end); });
  return true;
}

bool project(DType dtype, const Projection& p, Parallel parallel) {
  const ProjectionKernelPointer kernel = table().projection[int(dtype)];
  if (!kernel) return false;
  constexpr int64_t kOutputs = 16; // of an item
  run_items(
      (p.outputs + kOutputs - 1) / kOutputs, p.outputs * p.inputs * p.rows, parallel,
      [&](int64_t begin, int64_t end) {
        kernel(p, begin * kOutputs, std::min(end * kOutputs, p.outputs));
      });
  return true;
}

bool diagonal_forward(int cell, DType dtype, const DiagonalForward& problem, Parallel parallel) {
  const KernelTable& t = table();
  const ForwardKernel kernel = t.forward[cell][int(dtype)];
  if (!kernel) return false;
  void* out[] = {problem.h};
  const Plan plan =
      plan_of(problem, dtype, DiagonalCells::inputs[cell], 1, out, t, parallel.threads);
  run(kernel, problem, plan, DiagonalCells::inputs[cell] + 1, parallel);
  return true;
}

bool diagonal_backward(int cell, DType dtype, const DiagonalBackward& problem, Parallel parallel) {
  const KernelTable& t = table();
  const BackwardKernel kernel = t.backward[cell][int(dtype)];
  if (!kernel) return false;
  const Plan plan = plan_of(
      problem, dtype, DiagonalCells::inputs[cell] + 2, DiagonalCells::inputs[cell],
      problem.grad_inputs, t, parallel.threads);
  run(kernel, problem, plan, 2 * DiagonalCells::inputs[cell] + 2, parallel);
  return true;
}

namespace {

// Rows are whole where they can be: the machine fetches ahead along them. Not where they have to be turned first, nor where
// threads would be left without work. Groups, on which the order of sums depends, follow from shapes alone.
CausalConv1dPlan plan_of(
    const CausalConv1dProblem& p, DType dtype, int64_t smallest_group, bool turned,
    const KernelTable& t, int threads) {
  constexpr int64_t kMostGroups = 64; // of each the backward keeps a share of the weight's gradient
  const int64_t lanes = t.vector_bytes / (dtype == DType::f64 ? 8 : 4);
  CausalConv1dPlan plan;
  plan.num_rows = p.num_steps * (p.cu_seqlens ? 1 : p.num_sequences);
  plan.group = std::max(smallest_group, (plan.num_rows + kMostGroups - 1) / kMostGroups);
  plan.num_groups = std::max<int64_t>(1, (plan.num_rows + plan.group - 1) / plan.group);
  const int64_t smallest = round_up(1024 / size_of(dtype), lanes);
  plan.block =
      std::min(round_up(p.width, lanes), round_up((turned ? 2048 : 8192) / size_of(dtype), lanes));
  while (plan.block > smallest &&
         plan.num_groups * ((p.width + plan.block - 1) / plan.block) < 4 * std::max(threads, 1) &&
         threads > 1)
    plan.block = std::max(smallest, round_up(plan.block / 2, lanes));
  plan.num_blocks = p.width ? (p.width + plan.block - 1) / plan.block : 0;
  return plan;
}

// Whether `out` is too large to stay in the cache, and its vectors are aligned. Several rows are written at a time: smaller
// stores would leave lines behind that are not yet full.
bool streams(
    const CausalConv1dProblem& p, const CausalConv1dPlan& plan, DType dtype, const void* out,
    const KernelTable& t, int threads) {
  const int64_t row = p.width * size_of(dtype);
  const int64_t store = t.vector_bytes * size_of(dtype) / (dtype == DType::f64 ? 8 : 4);
  return store >= 32 && plan.num_rows * row / std::max(threads, 1) > l2_bytes() &&
         row % store == 0 && aligned(out, store);
}

template <class Problem>
void run(
    void (*kernel)(const Problem&, const CausalConv1dPlan&, int64_t, int64_t), const Problem& p,
    const CausalConv1dPlan& plan, int64_t rows_worth_waking, Parallel parallel) {
  const int64_t items = plan.num_groups * plan.num_blocks;
  struct Call {
    void (*kernel)(const Problem&, const CausalConv1dPlan&, int64_t, int64_t);
    const Problem& p;
    const CausalConv1dPlan& plan;
  } call{kernel, p, plan};
  const auto body = [](int64_t begin, int64_t end, void* ctx) {
    const Call& c = *static_cast<const Call*>(ctx);
    c.kernel(c.p, c.plan, begin, end);
  };
  const int64_t grain = 1 + rows_worth_waking / (1 + plan.group * plan.block);
  if (parallel.run && parallel.threads > 1 && items > grain) {
    parallel.run(items, grain, body, &call);
  } else if (items > 0) {
    body(0, items, &call);
  }
}

// The groups' shares, (group, window + 1, width), added in their order.
template <class Scalar>
void add_shares(const CausalConv1dBackward& p, const Scalar* shares, int64_t num_groups) {
  const int64_t n = p.window, size = (n + 1) * p.width;
  std::vector<Scalar> sum(shares, shares + size);
  for (int64_t g = 1; g < num_groups; ++g)
    for (int64_t i = 0; i < size; ++i) sum[size_t(i)] += shares[g * size + i];
  for (int64_t d = 0; d < p.width; ++d) {
    for (int64_t k = 0; k < n; ++k)
      static_cast<Scalar*>(p.grad_weight)[d * n + k] = sum[size_t(k * p.width + d)];
    static_cast<Scalar*>(p.grad_bias)[d] = sum[size_t(n * p.width + d)];
  }
}

} // namespace

bool causal_conv1d_forward(DType dtype, const CausalConv1dForward& p, Parallel parallel) {
  const KernelTable& t = table();
  const CausalConv1dForwardKernel kernel = t.conv_forward[int(dtype)];
  if (!kernel) return false;
  CausalConv1dPlan plan = plan_of(p, dtype, 16, false, t, parallel.threads);
  plan.stream = streams(p, plan, dtype, p.y, t, parallel.threads);
  run(kernel, p, plan, 20000, parallel);
  return true;
}

bool causal_conv1d_backward(DType dtype, const CausalConv1dBackward& p, Parallel parallel) {
  const KernelTable& t = table();
  const CausalConv1dBackwardKernel kernel = t.conv_backward[int(dtype)];
  if (!kernel) return false;
  CausalConv1dPlan plan = plan_of(
      p, dtype, 256, p.x.width != 1 || (p.grad_y.data && p.grad_y.width != 1), t, parallel.threads);
  plan.stream = streams(p, plan, dtype, p.grad_x, t, parallel.threads);
  const auto with_shares = [&]<class Scalar>(Scalar) {
    std::vector<Scalar> shares(size_t(plan.num_groups * (p.window + 1) * p.width));
    plan.shares = shares.data();
    run(kernel, p, plan, 10000, parallel);
    add_shares(p, shares.data(), plan.num_groups);
  };
  if (dtype == DType::f64) {
    with_shares(double{});
  } else {
    with_shares(float{});
  }
  return true;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Set& s : sets()) names.push_back(s.table->name);
  return names;
}
std::string chosen_isa() { return table().name; }
bool force_isa(const std::string& name) {
  if (name.empty()) return forced = nullptr, true;
  for (const Set& s : sets())
    if (s.supported && name == s.table->name) return forced = s.table, true;
  return false;
}

double calibrate(
    const std::string& kind, int64_t elements, bool stream, int threads, double seconds) {
  const KernelTable& t = table();
  const bool copy = kind == "copy", triad = kind == "triad", exponentials = kind == "exp",
             fma = kind == "fma";
  if (!(copy || triad || exponentials || fma) || elements < 1 || threads < 1) return -1;
  constexpr int64_t kResident = 2048; // elements, in L1
  const int64_t share =
      copy || triad ? round_up((elements + threads - 1) / threads, 256) : kResident;
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<float, Free>> memory;
  for (int i = 0; i < 3; ++i)
    memory.emplace_back(
        static_cast<float*>(std::aligned_alloc(4096, size_t(round_up(share * threads * 4, 4096)))));
  std::atomic<int64_t> barrier{0};
  const auto meet = [&](int64_t round) {
    ++barrier;
    while (barrier.load() < round * threads) {
    }
  };
  std::atomic<bool> more{true};
  double elapsed = 0, fastest = 1e30;
  const auto work = [&](int me) {
    using Clock = std::chrono::steady_clock;
    float *to = memory[0].get() + me * share, *x = memory[1].get() + me * share,
          *y = memory[2].get() + me * share;
    for (int64_t i = 0; i < share; ++i) to[i] = 0, x[i] = 0.25f, y[i] = 0.5f;
    const int64_t inner =
        std::max<int64_t>(1, 200000 / share); // short calls are repeated between two clock readings
    int64_t round = 0;
    while (true) {
      meet(++round);
      const auto start = Clock::now();
      for (int64_t r = 0; r < inner; ++r) {
        if (copy) t.copy(to, x, share, stream);
        if (triad) t.triad(to, x, y, share, stream);
        if (exponentials) t.exponentials(to, x, share);
        if (fma) t.multiply_adds(x, share);
      }
      meet(++round);
      if (me == 0) {
        const double s = std::chrono::duration<double>(Clock::now() - start).count();
        elapsed += s;
        fastest = std::min(fastest, s / double(inner));
        more = elapsed < seconds;
      }
      meet(++round);
      if (!more) return;
    }
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work, i);
  work(0);
  for (std::thread& p : pool) p.join();
  const double n = double(share) * threads;
  if (copy) return n * 8 / fastest / 1e9;
  if (triad) return n * 12 / fastest / 1e9;
  if (exponentials) return n / fastest / 1e9;
  return n * kMultiplyAdds * (t.vector_bytes / 4) / fastest / 1e9;
}

} // namespace torch_ext::cpu
