// Which kernel of matrix_memory_backward.cuh runs how, decided from shapes alone: the same call always adds in the
// same order.
#include "matrix_memory_backward.cuh"

#include "matrix_memory.h"

namespace torch_ext::cuda {
namespace {

// So many blocks fill a GPU. A variable for tests alone.
inline constexpr int64_t kGradEnoughBlocks = 512;
int64_t grad_enough_blocks = kGradEnoughBlocks;

int64_t grad_divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

struct GradDriver {
  // Where h is wide, its gradient has two parts as well.
  static int parts_of(DType dtype, const MatrixMemoryProblem& p, int wanted) {
    const int parts = matrix_parts(dtype, p, wanted);
    return p.wide_h && parts < 2 && dtype != DType::f32 ? 2 : parts;
  }
  static MatrixGradPlan plan(DType dtype, const MatrixMemoryBackward& p, int parts) {
    MatrixGradPlan q;
    q.parts = parts_of(dtype, p, parts), q.element = matrix_layout(dtype, p).values;
    q.slots = p.cu_seqlens ? p.num_steps / kGradSteps + p.num_sequences
                           : p.num_sequences * grad_divide_up(p.num_steps, kGradSteps);
    q.row = matrix_memory_padded(p.value_size);
    q.states.wide = q.parts > 1, q.states.interval = kGradSteps;
    q.states.keys = matrix_memory_padded(p.key_size), q.states.values = q.row;
    const int64_t heads = p.num_heads / p.num_groups, blocks = q.slots * p.num_groups;
    int64_t sets = blocks > 0 ? grad_divide_up(grad_enough_blocks, blocks) : 1;
    if (sets > heads) sets = heads;
    q.sets = q.set_heads = 0;
    if (heads == 0) return q;
    q.set_heads = int(grad_divide_up(heads, sets));
    q.sets = int(grad_divide_up(heads, q.set_heads));
    return q;
  }
  // Do heads share queries and keys? No heads: their gradients are sums of nothing.
  static bool shared(const MatrixMemoryProblem& p) { return p.num_heads != p.num_groups; }

  // Parts of the workspace, handed out one after the other.
  struct Parts {
    char* base;
    int64_t bytes = 0;
    template <class T>
    void take(T*& to, int64_t numbers) {
      to = base && numbers ? reinterpret_cast<T*>(base + bytes) : nullptr;
      bytes += grad_divide_up(numbers * int64_t(sizeof(T)), 256) * 256;
    }
  };
  static int64_t share_out(MatrixGradPlan& q, const MatrixMemoryBackward& p, void* workspace) {
    Parts parts{static_cast<char*>(workspace)};
    const int64_t slots = q.slots * p.num_heads, K = p.key_size,
                  tiles = grad_slices(K) * grad_slices(p.value_size),
                  states = p.num_sequences * p.num_heads, rows = p.cu_seqlens ? 1 : p.num_sequences;
    char* C = nullptr;
    parts.take(C, slots * q.states.keys * q.states.values * (q.states.wide ? 4 : 2));
    q.states.C = C;
    parts.take(q.states.n, slots * q.states.keys);
    parts.take(q.states.m, slots);
    parts.take(q.grad_C, slots * q.parts * K * q.row);
    parts.take(q.grad_n, slots * K);
    parts.take(q.fields, slots * kGradFields * kGradSteps);
    parts.take(q.decay, slots);
    parts.take(q.through, slots * tiles * kGradWarps);
    parts.take(q.at_start, states * tiles * kGradWarps);
    parts.take(q.at_end, states);
    parts.take(
        q.shares, p.num_heads > p.num_groups
                      ? 2 * int64_t(q.sets) * rows * p.num_steps * p.num_groups * K
                      : 0);
    return parts.bytes;
  }

  template <int kParts>
  static void run(const MatrixMemoryBackward& p, const MatrixGradPlan& q, cudaStream_t stream) {
    const int64_t tiles = grad_slices(p.key_size) * grad_slices(p.value_size),
                  states = p.num_sequences * p.num_heads;
    const dim3 chunks{unsigned(q.slots), unsigned(p.num_groups * q.sets)};
    const auto over_chunks = [&](auto kernel, const MatrixGradShared& shared) {
      if (q.slots > 0 && q.sets > 0)
        launch(kernel, chunks, kGradThreads, shared.bytes, stream, p, q);
    };
    over_chunks(matrix_grad_queries_kernel<kParts>, MatrixGradShared(q.parts, true, true));
    if (states > 0)
      launch(
          matrix_grad_states_kernel<kParts>, dim3(unsigned(tiles * states)), kGradThreads,
          MatrixGradShared(q.parts, false, false).bytes, stream, p, q);
    over_chunks(matrix_grad_keys_kernel<kParts>, MatrixGradShared(q.parts, true, false));
  }
  static void run(
      DType dtype, const MatrixMemoryBackward& p, MatrixGradPlan q, void* workspace,
      cudaStream_t stream) {
    share_out(q, p, workspace);
    const int64_t states = p.num_sequences * p.num_heads;
    matrix_run_states(q.parts, p, matrix_layout(dtype, p), q.states, {}, stream);
    q.parts == 1 ? run<1>(p, q, stream) : run<0>(p, q, stream);
    if (p.normalizer == Normalizer::stabilized && states > 0)
      launch(matrix_grad_maxima_kernel, dim3(unsigned(states)), 32, 0, stream, p, q);
    const int64_t keys =
        (p.cu_seqlens ? 1 : p.num_sequences) * p.num_steps * p.num_groups * p.key_size;
    if (shared(p) && keys > 0)
      launch(
          matrix_grad_shared_kernel, dim3(unsigned(grad_divide_up(keys, kGradThreads))),
          kGradThreads, 0, stream, p, q);
  }
};

} // namespace

int64_t matrix_memory_workspace(DType dtype, const MatrixMemoryBackward& p, int parts) {
  MatrixGradPlan q = GradDriver::plan(dtype, p, parts);
  return GradDriver::share_out(q, p, nullptr);
}
void matrix_memory(
    DType dtype, const MatrixMemoryBackward& p, int parts, void* workspace, void* stream) {
  GradDriver::run(
      dtype, p, GradDriver::plan(dtype, p, parts), workspace, static_cast<cudaStream_t>(stream));
}
bool matrix_memory_has_backward(DType dtype) {
  return dtype != DType::f64 && has_matrix_products();
}

} // namespace torch_ext::cuda
