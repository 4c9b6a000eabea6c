// Which kernel of causal_conv1d.cuh runs how, decided from shapes alone: the same call always adds in the same order.
#include "causal_conv1d.h"

#include "causal_conv1d.cuh"

namespace torch_ext::cuda {
namespace {

int64_t conv_enough_blocks = kConvEnoughBlocks; // a variable for tests alone

int64_t conv_divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }
dim3 conv_blocks(int64_t threads) { return dim3(unsigned(conv_divide_up(threads, kConvThreads))); }

template <class S>
struct ConvDriver {
  using Lane = typename Stored<S>::Lane;

  static int64_t channels(const CausalConv1dProblem& p) { return p.num_sequences * p.width; }
  static int64_t tokens(const CausalConv1dProblem& p) {
    return (p.cu_seqlens ? 1 : p.num_sequences) * p.num_steps;
  }
  static bool is_wide(const CausalConv1dProblem& p) { return p.window > 8; }
  // f(ConvTile) of the window.
  template <class F>
  static void with_tile(const CausalConv1dProblem& p, F f) {
    if (p.window <= 4)
      f(ConvTile<S, 4>());
    else
      f(ConvTile<S, 8>());
  }
  template <class L>
  static ConvSchedule schedule(const CausalConv1dProblem& p) {
    ConvSchedule q;
    q.groups = unsigned(conv_divide_up(p.width, L::kChannels));
    q.tiles = unsigned(conv_divide_up(p.num_steps, L::kTime));
    q.total = unsigned(p.cu_seqlens ? q.tiles : p.num_sequences * q.tiles);
    const int64_t run = int64_t(q.total) * q.groups / conv_enough_blocks;
    q.run = unsigned(run < 1 ? 1 : run < kConvTiles ? run : kConvTiles);
    q.parts = unsigned(conv_divide_up(q.total, q.run));
    q.blocks = q.parts * q.groups;
    return q;
  }
  // Steps for a thread that sums up the weight's gradient, so that enough threads do to fill a GPU.
  static int64_t wide_steps(const CausalConv1dProblem& p) {
    const int64_t threads = int64_t(conv_enough_blocks) * kConvThreads;
    const int64_t parts = conv_divide_up(threads, (p.window + 1) * p.width);
    const int64_t steps = conv_divide_up(tokens(p), parts);
    return steps < 256 ? 256 : steps;
  }
  static int64_t wide_parts(const CausalConv1dProblem& p) {
    return conv_divide_up(tokens(p), wide_steps(p));
  }
  // Workspace: the parts' sums of the weight's gradient, then, for wide windows, g of all steps.
  static int64_t sum_bytes(const CausalConv1dProblem& p) {
    int64_t parts = 0;
    if (is_wide(p))
      parts = wide_parts(p);
    else
      with_tile(p, [&](auto tile) { parts = schedule<decltype(tile)>(p).parts; });
    return conv_divide_up(parts * (p.window + 1) * p.width * int64_t(sizeof(Lane)), 256) * 256;
  }
  static int64_t workspace(const CausalConv1dForward&) { return 0; }
  static int64_t workspace(const CausalConv1dBackward& p) {
    if (!p.grad_y.data || tokens(p) * p.width == 0) return 0;
    return sum_bytes(p) + (is_wide(p) ? tokens(p) * p.width * int64_t(sizeof(Lane)) : 0);
  }

  static void run(const CausalConv1dForward& p, void*, cudaStream_t stream) {
    if (channels(p) == 0) return;
    if (!p.cu_seqlens && p.num_steps == 1) return run_step(p, stream);
    if (is_wide(p))
      return launch(
          causal_conv1d_wide_forward_kernel<S>, conv_blocks(tokens(p) * p.width + channels(p)),
          kConvThreads, 0, stream, p);
    const unsigned edges = p.window > 1 ? conv_blocks(channels(p)).x : 0;
    with_tile(p, [&]<class L>(L) {
      const ConvSchedule q = schedule<L>(p);
      if (q.blocks + edges > 0)
        launch(
            causal_conv1d_forward_kernel<S, L::kWindow>, dim3(q.blocks + edges), kConvThreads,
            L::kForwardBytes, stream, p, q);
    });
  }
  static void run_step(const CausalConv1dForward& p, cudaStream_t stream) {
    constexpr int kVector = 16 / int(sizeof(S));
    const int64_t before = p.window - 1;
    const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
    const bool vectors = aligned(p.x.data) && aligned(p.y) && aligned(p.final_state) &&
                         p.initial_state.data && aligned(p.initial_state.data) && p.x.width == 1 &&
                         p.width % kVector == 0 && p.x.sequence % kVector == 0 &&
                         p.initial_state.tap == 1 && p.initial_state.width == before &&
                         p.initial_state.row == p.width * before;
    const auto by_vectors = [&](auto kernel) {
      launch(kernel, conv_blocks(channels(p) / kVector), kConvThreads, 0, stream, p);
    };
    if (vectors && p.window == 2) return by_vectors(causal_conv1d_step_vectors_kernel<S, 2>);
    if (vectors && p.window == 3) return by_vectors(causal_conv1d_step_vectors_kernel<S, 3>);
    if (vectors && p.window == 4) return by_vectors(causal_conv1d_step_vectors_kernel<S, 4>);
    launch(causal_conv1d_step_kernel<S>, conv_blocks(channels(p)), kConvThreads, 0, stream, p);
  }

  static void run(const CausalConv1dBackward& p, void* workspace, cudaStream_t stream) {
    const int64_t inputs = tokens(p) * p.width, states = channels(p) * (p.window - 1);
    const int64_t item = sizeof(S), wide = sizeof(Lane);
    if (p.width == 0) return;
    if (!p.grad_y.data || inputs == 0) {
      // g is 0, and is not to be multiplied with inputs, which may be infinite.
      if (inputs > 0) zero(p.grad_x, inputs * item, stream);
      zero(p.grad_weight, p.width * p.window * wide, stream);
      zero(p.grad_bias, p.width * wide, stream);
      if (states > 0) // no tiles, edges alone
        launch(
            causal_conv1d_backward_kernel<S, 8>, conv_blocks(channels(p)), kConvThreads, 0, stream,
            p, ConvSchedule());
      return;
    }
    int64_t parts = 0;
    if (is_wide(p)) {
      parts = wide_parts(p);
      void* const gradients = static_cast<char*>(workspace) + sum_bytes(p);
      launch(
          causal_conv1d_wide_gradient_kernel<S>, conv_blocks(inputs), kConvThreads, 0, stream, p,
          gradients);
      launch(
          causal_conv1d_wide_input_kernel<S>, conv_blocks(inputs + states), kConvThreads, 0, stream,
          p, static_cast<const void*>(gradients));
      launch(
          causal_conv1d_wide_weight_kernel<S>,
          dim3(unsigned(conv_divide_up(p.width, kConvThreads) * (p.window + 1) * parts)),
          kConvThreads, 0, stream, p, static_cast<const void*>(gradients), workspace,
          wide_steps(p));
    } else {
      with_tile(p, [&]<class L>(L) {
        ConvSchedule q = schedule<L>(p);
        q.sums = workspace;
        parts = q.parts;
        const unsigned edges = states > 0 ? conv_blocks(channels(p)).x : 0;
        launch(
            causal_conv1d_backward_kernel<S, L::kWindow>, dim3(q.blocks + edges), kConvThreads,
            L::kBackwardBytes, stream, p, q);
      });
    }
    launch(
        causal_conv1d_sum_kernel<Lane>,
        dim3(unsigned(conv_divide_up(p.width, 32) * (p.window + 1))), kConvSumThreads,
        kConvSumThreads * int(sizeof(Lane)), stream, p, static_cast<const void*>(workspace), parts);
  }
};

// f(ConvDriver) of the dtype.
template <class F>
void conv_dispatch(DType dtype, F f) {
  if (dtype == DType::f32) f(ConvDriver<float>{});
  if (dtype == DType::f64) f(ConvDriver<double>{});
  if (dtype == DType::bf16) f(ConvDriver<BFloat16>{});
  if (dtype == DType::f16) f(ConvDriver<Half>{});
}
template <class Problem>
int64_t conv_workspace(DType dtype, const Problem& p) {
  int64_t bytes = 0;
  conv_dispatch(dtype, [&](auto driver) { bytes = driver.workspace(p); });
  return bytes;
}
template <class Problem>
void conv_run(DType dtype, const Problem& p, void* workspace, void* stream) {
  conv_dispatch(
      dtype, [&](auto driver) { driver.run(p, workspace, static_cast<cudaStream_t>(stream)); });
}

} // namespace

int64_t causal_conv1d_workspace(DType dtype, const CausalConv1dForward& p) {
  return conv_workspace(dtype, p);
}
int64_t causal_conv1d_workspace(DType dtype, const CausalConv1dBackward& p) {
  return conv_workspace(dtype, p);
}
void causal_conv1d(DType dtype, const CausalConv1dForward& p, void* workspace, void* stream) {
  conv_run(dtype, p, workspace, stream);
}
void causal_conv1d(DType dtype, const CausalConv1dBackward& p, void* workspace, void* stream) {
  conv_run(dtype, p, workspace, stream);
}

} // namespace torch_ext::cuda
