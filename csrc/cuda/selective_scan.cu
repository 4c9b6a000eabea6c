// Which kernel of selective_scan.cuh and selective_scan_wide.cuh runs how, decided from shapes alone: the same call always
// adds in the same order.
#include "selective_scan.h"

#include "selective_scan_wide.cuh"

namespace torch_ext::cuda {
namespace {

// Variables for tests alone.
int64_t scan_enough_blocks = kScanEnoughBlocks, scan_least_steps = kScanLeastSteps,
        scan_enough_wide_blocks = kScanEnoughBlocks;

int64_t scan_divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

template <class S, bool kComplex>
struct ScanDriver {
  using Types = ScanTypes<S, kComplex>;
  using R = typename Types::R;
  using H = typename Types::H;
  using Forward = SelectiveScanForward;
  using Backward = SelectiveScanBackward;
  static constexpr int K = Pack<H>::kSize;
  // Are there kernels for what nearly all calls are? Some more to compile.
  static constexpr bool kHasPlain = !kComplex && sizeof(R) == 4;

  // Lanes and passes, where a lane has so many states.
  static void spread_states(ScanPlan& q, int64_t num_states, int states) {
    q.log_lanes = sizeof(R) > 4; // or the tile of so many channels would not fit in shared memory
    while (q.log_lanes < 5 && int64_t(states) << q.log_lanes < num_states) ++q.log_lanes;
    q.passes = int(scan_divide_up(num_states, int64_t(states) << q.log_lanes));
  }
  static void spread_channels(ScanPlan& q, const SelectiveScanProblem& p, int turns) {
    q.turns = turns;
    q.channels = (kScanThreads >> q.log_lanes) * turns;
    for (q.log_channels = 0; 1 << q.log_channels < q.channels;) ++q.log_channels;
    q.blocks_per_group = scan_divide_up(p.width / p.num_groups, q.channels);
  }
  static int64_t blocks(const ScanPlan& q, const SelectiveScanProblem& p, int64_t segments = 1) {
    return q.rows * segments * p.num_groups * q.blocks_per_group;
  }
  static void cut_time(ScanPlan& q, const SelectiveScanProblem& p) {
    const int64_t there = blocks(q, p);
    q.segments = 1, q.segment_steps = p.num_steps;
    if (there == 0 || there >= scan_enough_blocks || p.num_steps == 0) return;
    const int64_t steps = scan_divide_up(p.num_steps, scan_divide_up(scan_enough_blocks, there));
    const int64_t intervals =
        scan_divide_up(steps < scan_least_steps ? scan_least_steps : steps, q.interval);
    const int64_t segments = scan_divide_up(p.num_steps, intervals * q.interval);
    if (segments < 3) return; // twice the work for twice the blocks
    q.segments = segments, q.segment_steps = intervals * q.interval;
  }
  static ScanPlan basic(const SelectiveScanProblem& p) {
    ScanPlan q;
    q.interval = selective_scan_interval(p.num_states, kComplex);
    q.rows = p.cu_seqlens ? 1 : p.num_sequences;
    return q;
  }
  static ScanPlan plan(const Forward& p) {
    ScanPlan q = basic(p);
    spread_states(q, p.num_states, kForwardPacks * K);
    spread_channels(q, p, 1);
    if (p.state_rows) {
      q.segment_steps = p.num_steps;
      return q;
    }
    cut_time(q, p);
    return wide_or(q, p, 2);
  }
  static ScanPlan plan(const Backward& p) {
    ScanPlan q = basic(p);
    spread_states(q, p.num_states, K);
    int turns = 1 << q.log_lanes < kScanMostTurns ? 1 << q.log_lanes : kScanMostTurns;
    spread_channels(q, p, turns);
    const auto shared = [&] {
      return scan_backward_shared<Types>(q, p.B.constant, p.C.constant).bytes;
    };
    while (turns > 1 && (blocks(q, p) < scan_enough_blocks || shared() > kScanMostShared))
      spread_channels(q, p, turns /= 2);
    cut_time(q, p);
    return wide_or(q, p, kScanMostTurns);
  }
  // The plan of the kernels for what nearly all calls are, where there is one: it has fewer blocks for the same work. Are
  // they enough, and is nothing done twice to have them?
  static ScanPlan wide_or(const ScanPlan& q, const SelectiveScanProblem& p, int turns) {
    if (!kHasPlain || p.cu_seqlens || p.B.constant || p.C.constant || p.num_states != 16) return q;
    ScanPlan wide = q;
    spread_channels(wide, p, turns);
    cut_time(wide, p);
    wide.wide = blocks(wide, p, wide.segments) >= scan_enough_wide_blocks &&
                (wide.segments == 1 || q.segments > 1);
    return wide.wide ? wide : q;
  }
  // Of the kernel that finds what segments do from zero.
  static ScanPlan effect_plan(ScanPlan q, const SelectiveScanProblem& p) {
    spread_states(q, p.num_states, kForwardPacks * K);
    spread_channels(q, p, 1);
    return q;
  }

  // Parts of the workspace, handed out one after the other.
  struct Parts {
    char* base;
    int64_t bytes = 0;
    template <class T>
    void take(T*& to, int64_t size) {
      to = base && size ? reinterpret_cast<T*>(base + bytes) : nullptr;
      bytes += scan_divide_up(size, 256) * 256;
    }
  };
  static void share_out(ScanPlan& q, const SelectiveScanProblem& p, bool carries, Parts& parts) {
    const int64_t all = q.rows * q.segments;
    parts.take(q.carry, carries ? all * p.width * p.num_states * int64_t(sizeof(H)) : 0);
    parts.take(q.sums, q.segments > 1 ? all * p.width * int64_t(sizeof(R)) : 0);
    parts.take(q.restarts, q.segments > 1 ? all * int64_t(sizeof(int)) : 0);
  }
  static int64_t share_out(ScanPlan& q, const Forward& p, void* workspace) {
    Parts parts{static_cast<char*>(workspace)};
    share_out(q, p, q.segments > 1 || q.passes > 1, parts);
    return parts.bytes;
  }
  static int64_t share_out(ScanPlan& q, const Backward& p, void* workspace) {
    Parts parts{static_cast<char*>(workspace)};
    share_out(q, p, q.segments > 1, parts);
    const int64_t all = q.rows * q.segments, number = sizeof(H);
    const bool constant = p.B.constant || p.C.constant;
    const bool per_token = (!p.B.constant && p.grad_B.data) || (!p.C.constant && p.grad_C.data);
    parts.take(
        q.by_token, per_token ? 2 * q.blocks_per_group * q.rows * p.num_steps * p.num_groups *
                                    p.num_states * number
                              : 0);
    parts.take(q.by_state, (constant ? 3 : 1) * all * p.width * p.num_states * number);
    parts.take(q.by_channel, 2 * all * p.width * int64_t(sizeof(R)));
    const int64_t packs =
        blocks(q, p, q.segments) * q.passes * q.turns * kScanThreads * int64_t(sizeof(Pack<H>));
    parts.take(q.starts, (q.interval / kScanTile - 1) * packs);
    parts.take(q.accumulators, q.passes > 1 ? scan_accumulators(constant) * packs : 0);
    return parts.bytes;
  }
  template <class Problem>
  static int64_t workspace(const Problem& p) {
    ScanPlan q = plan(p);
    return share_out(q, p, nullptr);
  }

  template <class Kernel, class... Args>
  static void for_all(Kernel kernel, int64_t items, cudaStream_t stream, const Args&... args) {
    if (items > 0)
      launch(
          kernel, dim3(unsigned(scan_divide_up(items, kScanThreads))), kScanThreads, 0, stream,
          args...);
  }
  template <ScanWalk kWalk, class Problem>
  static void walk(const Problem& p, const ScanPlan& q, int64_t segments, cudaStream_t stream) {
    launch(
        selective_scan_walk_kernel<Types, kWalk, Problem>, dim3(unsigned(blocks(q, p, segments))),
        kScanThreads, scan_walk_shared<Types, kWalk>(q, p.B.constant, p.C.constant), stream, p, q);
  }
  template <class Problem>
  static void empty_sequences(const Problem& p, cudaStream_t stream) {
    if (p.cu_seqlens || p.num_steps == 0)
      for_all(
          selective_scan_empty_kernel<Types, Problem>, p.num_sequences * p.width * p.num_states,
          stream, p);
  }

  static void run(const Forward& p, void* workspace, cudaStream_t stream) {
    empty_sequences(p, stream);
    ScanPlan q = plan(p);
    if (blocks(q, p) == 0 || p.num_steps == 0) return;
    share_out(q, p, workspace);
    if (q.segments > 1) {
      walk<ScanWalk::forward_effect>(p, effect_plan(q, p), q.segments - 1, stream);
      for_all(
          selective_scan_fold_kernel<Types, false, Forward>, q.rows * p.width * p.num_states,
          stream, p, q);
    }
    if constexpr (kHasPlain) {
      if (q.wide)
        return launch(
            selective_scan_wide_kernel<Types>, dim3(unsigned(blocks(q, p, q.segments))),
            kScanThreads, scan_wide_shared<Types>(), stream, p, q);
    }
    walk<ScanWalk::forward>(p, q, q.segments, stream);
  }
  static void run(const Backward& p, void* workspace, cudaStream_t stream) {
    empty_sequences(p, stream);
    ScanPlan q = plan(p);
    if (p.width == 0) return;
    share_out(q, p, workspace);
    if (p.num_steps == 0) q.rows = 0;
    if (q.rows > 0) {
      if (q.segments > 1) {
        walk<ScanWalk::backward_effect>(p, effect_plan(q, p), q.segments - 1, stream);
        for_all(
            selective_scan_fold_kernel<Types, true, Backward>, q.rows * p.width * p.num_states,
            stream, p, q);
      }
      const auto backward = [&](auto kernel, int shared) {
        launch(
            kernel, dim3(unsigned(blocks(q, p, q.segments))), kScanThreads, shared, stream, p, q);
      };
      const int shared = scan_backward_shared<Types>(q, p.B.constant, p.C.constant).bytes;
      bool plain = false;
      if constexpr (kHasPlain) {
        plain = q.passes == 1 && !p.B.constant && !p.C.constant;
        if (q.wide)
          backward(selective_scan_wide_backward_kernel<Types>, ScanWideBackward<Types>::kBytes);
        else if (plain)
          backward(selective_scan_backward_kernel<Types, true>, shared);
      }
      if (!plain) backward(selective_scan_backward_kernel<Types, false>, shared);
      if (q.by_token)
        for_all(
            selective_scan_tokens_kernel<Types>, q.rows * p.num_steps * p.num_groups * p.num_states,
            stream, p, q);
    }
    for_all(selective_scan_channels_kernel<Types>, p.width * p.num_states, stream, p, q);
  }
};

template <class F>
void scan_dispatch(DType dtype, F f) {
  if (dtype == DType::f32) f(ScanDriver<float, false>{});
  if (dtype == DType::f64) f(ScanDriver<double, false>{});
  if (dtype == DType::bf16) f(ScanDriver<BFloat16, false>{});
  if (dtype == DType::f16) f(ScanDriver<Half, false>{});
  if (dtype == DType::c64) f(ScanDriver<float, true>{});
  if (dtype == DType::c128) f(ScanDriver<double, true>{});
}
template <class Problem>
int64_t scan_workspace(DType dtype, const Problem& p) {
  int64_t bytes = 0;
  scan_dispatch(dtype, [&](auto driver) { bytes = driver.workspace(p); });
  return bytes;
}
template <class Problem>
void scan_run(DType dtype, const Problem& p, void* workspace, void* stream) {
  scan_dispatch(
      dtype, [&](auto driver) { driver.run(p, workspace, static_cast<cudaStream_t>(stream)); });
}

} // namespace

int64_t selective_scan_workspace(DType dtype, const SelectiveScanForward& p) {
  return scan_workspace(dtype, p);
}
int64_t selective_scan_workspace(DType dtype, const SelectiveScanBackward& p) {
  return scan_workspace(dtype, p);
}
void selective_scan(DType dtype, const SelectiveScanForward& p, void* workspace, void* stream) {
  scan_run(dtype, p, workspace, stream);
}
void selective_scan(DType dtype, const SelectiveScanBackward& p, void* workspace, void* stream) {
  scan_run(dtype, p, workspace, stream);
}

} // namespace torch_ext::cuda
