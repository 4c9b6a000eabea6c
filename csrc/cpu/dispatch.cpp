#include "dispatch.h"

#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
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

} // namespace

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

// at_once: bytes of a row that an item takes.
CausalConv1dPlan plan_of(
    const CausalConv1dProblem& p, DType dtype, int64_t smallest_group, int64_t at_once,
    const KernelTable& t) {
  constexpr int64_t kMostGroups = 64; // of each the backward keeps a share of the weight's gradient
  const int64_t lanes = t.vector_bytes / (dtype == DType::f64 ? 8 : 4);
  CausalConv1dPlan plan;
  plan.num_rows = p.num_steps * (p.cu_seqlens ? 1 : p.num_sequences);
  plan.group = std::max(smallest_group, (plan.num_rows + kMostGroups - 1) / kMostGroups);
  plan.num_groups = std::max<int64_t>(1, (plan.num_rows + plan.group - 1) / plan.group);
  plan.block = std::min(round_up(p.width, lanes), round_up(at_once / size_of(dtype), lanes));
  plan.num_blocks = p.width ? (p.width + plan.block - 1) / plan.block : 0;
  return plan;
}

// Whether `out` is too large to stay in the cache, and its vectors are aligned.
bool streams(
    const CausalConv1dProblem& p, const CausalConv1dPlan& plan, DType dtype, const void* out,
    const KernelTable& t, int threads) {
  const int64_t row = p.width * size_of(dtype);
  const int64_t store = t.vector_bytes * size_of(dtype) / (dtype == DType::f64 ? 8 : 4);
  return plan.num_rows * row / std::max(threads, 1) > l2_bytes() && row % store == 0 &&
         aligned(out, store);
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
  CausalConv1dPlan plan = plan_of(p, dtype, 16, 8192, t);
  plan.stream = streams(p, plan, dtype, p.y, t, parallel.threads);
  run(kernel, p, plan, 20000, parallel);
  return true;
}

bool causal_conv1d_backward(DType dtype, const CausalConv1dBackward& p, Parallel parallel) {
  const KernelTable& t = table();
  const CausalConv1dBackwardKernel kernel = t.conv_backward[int(dtype)];
  if (!kernel) return false;
  CausalConv1dPlan plan = plan_of(p, dtype, 64, 1024, t);
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
