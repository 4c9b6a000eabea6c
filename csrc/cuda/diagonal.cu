// A diagonal cell over time on a GPU: one thread per channel of a sequence, serial in time, neighbouring threads on
// neighbouring channels. kAhead steps are loaded before they are used, so that their latencies overlap.
#include "diagonal.h"

#include "../cells/all.h"
#include "device.cuh"

namespace torch_ext::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 8;

// The tokens of a sequence in the order in which time runs: token n is row first + n * direction.
struct Tokens {
  int64_t first, direction, count;
};
__device__ __forceinline__ Tokens tokens_of(const DiagonalProblem& p, int64_t sequence) {
  int64_t begin = 0, end = p.num_steps;
  if (p.cu_seqlens) { // offsets outside of the row are not checked on the host: that would wait for the device
    begin = max(int64_t(0), min(p.num_steps, p.cu_seqlens[sequence]));
    end = max(begin, min(p.num_steps, p.cu_seqlens[sequence + 1]));
  }
  return p.reverse ? Tokens{end - 1, -1, end - begin} : Tokens{begin, 1, end - begin};
}

// One channel of an array over the tokens of its sequence.
template <class S>
struct Column {
  const S* data;
  int64_t step;
  __device__ __forceinline__ typename Stored<S>::Lane at(int64_t n) const {
    return Stored<S>::load(data + n * step);
  }
};
template <class S>
__device__ __forceinline__ Column<S> column(
    const DiagonalProblem& p, const Strided& x, int64_t sequence, int64_t d, Tokens tokens) {
  return {
      static_cast<const S*>(x.data) + (p.cu_seqlens ? 0 : sequence * x.sequence) +
          tokens.first * x.time + d * x.width,
      tokens.direction * x.time};
}
template <class State>
__device__ __forceinline__ State state_at(const Strided& x, int64_t row, int64_t d) {
  return x.data ? static_cast<const State*>(x.data)[row * x.sequence + d * x.width] : State{};
}

template <class Cell, class S>
__global__ void __launch_bounds__(kThreads) diagonal_forward_kernel(const DiagonalForward p) {
  using Lane = typename Stored<S>::Lane;
  constexpr int N = num_inputs<Cell>;
  const int64_t channel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= p.num_sequences * p.width) return;
  const int64_t sequence = channel / p.width, d = channel % p.width;
  const Cell cell(p.flags);
  const Tokens tokens = tokens_of(p, sequence);
  S* h = static_cast<S*>(p.h) +
         ((p.cu_seqlens ? 0 : sequence * p.num_steps) + tokens.first) * p.width + d;
  const int64_t h_step = tokens.direction * p.width;
  const int64_t row = p.state_rows ? p.state_rows[sequence] : sequence;
  if (row < 0) {
    for (int64_t n = 0; n < tokens.count; ++n) Stored<S>::store(h + n * h_step, Lane{});
    return;
  }
  Column<S> x[N];
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = column<S>(p, p.inputs[i], sequence, d, tokens);
  Lane state = state_at<Lane>(p.initial_state, row, d);
  int64_t n = 0;
  for (; n + kAhead <= tokens.count; n += kAhead) {
    Lane v[kAhead][N];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] = x[i].at(n + k);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      state = step(cell, pack<Cell, Lane>(v[k]), state);
      Stored<S>::store(h + (n + k) * h_step, state);
    }
  }
  for (; n < tokens.count; ++n) {
    Lane v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = x[i].at(n);
    state = step(cell, pack<Cell, Lane>(v), state);
    Stored<S>::store(h + n * h_step, state);
  }
  static_cast<Lane*>(p.final_state)[row * p.width + d] = state;
}

template <class Cell, class S>
__global__ void __launch_bounds__(kThreads) diagonal_backward_kernel(const DiagonalBackward p) {
  using Lane = typename Stored<S>::Lane;
  constexpr int N = num_inputs<Cell>;
  const int64_t channel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= p.num_sequences * p.width) return;
  const int64_t sequence = channel / p.width, d = channel % p.width;
  const Cell cell(p.flags);
  const Tokens tokens = tokens_of(p, sequence);
  Column<S> x[N];
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = column<S>(p, p.inputs[i], sequence, d, tokens);
  const Column<S> h = column<S>(p, p.h, sequence, d, tokens),
                  grad_h = column<S>(p, p.grad_h, sequence, d, tokens);
  const int64_t out = ((p.cu_seqlens ? 0 : sequence * p.num_steps) + tokens.first) * p.width + d;
  const int64_t out_step = tokens.direction * p.width;
  const Lane start = state_at<Lane>(p.initial_state, sequence, d);
  Lane carry = state_at<Lane>(p.grad_final_state, sequence, d);
  const auto backward_step = [&](int64_t n, const Lane* v, Lane before, Lane grad) {
    const Lane dh = grad + carry;
    const auto g = step_vjp(cell, pack<Cell, Lane>(v), before, dh);
    carry = g.dh_before;
    Lane dx[N];
    unpack<Cell, Lane>(g.dx, dx);
#pragma unroll
    for (int i = 0; i < N; ++i)
      Stored<S>::store(static_cast<S*>(p.grad_inputs[i]) + out + n * out_step, dx[i]);
  };
  int64_t n = tokens.count;
  for (; n >= kAhead; n -= kAhead) {
    Lane v[kAhead][N], before[kAhead], grad[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t t = n - 1 - k;
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] = x[i].at(t);
      before[k] = t ? h.at(t - 1) : start;
      grad[k] = p.grad_h.data ? grad_h.at(t) : Lane{};
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) backward_step(n - 1 - k, v[k], before[k], grad[k]);
  }
  for (; n > 0; --n) {
    Lane v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = x[i].at(n - 1);
    backward_step(n - 1, v, n > 1 ? h.at(n - 2) : start, p.grad_h.data ? grad_h.at(n - 1) : Lane{});
  }
  static_cast<Lane*>(p.grad_initial_state)[sequence * p.width + d] = carry;
}

template <class Cell, class S>
void launch(const DiagonalForward& p, unsigned blocks, cudaStream_t stream) {
  diagonal_forward_kernel<Cell, S><<<blocks, kThreads, 0, stream>>>(p);
}
template <class Cell, class S>
void launch(const DiagonalBackward& p, unsigned blocks, cudaStream_t stream) {
  diagonal_backward_kernel<Cell, S><<<blocks, kThreads, 0, stream>>>(p);
}

template <class Cell, class Problem>
void launch_dtype(DType dtype, const Problem& p, unsigned blocks, cudaStream_t stream) {
  if (dtype == DType::f32) launch<Cell, float>(p, blocks, stream);
  if (dtype == DType::f64) launch<Cell, double>(p, blocks, stream);
  if (dtype == DType::bf16) launch<Cell, BFloat16>(p, blocks, stream);
  if (dtype == DType::f16) launch<Cell, Half>(p, blocks, stream);
  if constexpr (Cell::complex) {
    if (dtype == DType::c64) launch<Cell, Complex<float>>(p, blocks, stream);
    if (dtype == DType::c128) launch<Cell, Complex<double>>(p, blocks, stream);
  }
}
template <class Problem, class... Cell>
void launch_cell(Cells<Cell...>, int cell, DType dtype, const Problem& p, cudaStream_t stream) {
  const int64_t blocks = (p.num_sequences * p.width + kThreads - 1) / kThreads;
  if (blocks == 0) return;
  int i = 0;
  ((i++ == cell ? launch_dtype<Cell>(dtype, p, unsigned(blocks), stream) : void()), ...);
}

} // namespace

void diagonal(int cell, DType dtype, const DiagonalForward& problem, void* stream) {
  launch_cell(DiagonalCells{}, cell, dtype, problem, static_cast<cudaStream_t>(stream));
}
void diagonal(int cell, DType dtype, const DiagonalBackward& problem, void* stream) {
  launch_cell(DiagonalCells{}, cell, dtype, problem, static_cast<cudaStream_t>(stream));
}

} // namespace torch_ext::cuda
