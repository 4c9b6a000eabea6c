// Which kernel of matrix_memory.cuh runs how, decided from shapes alone: the same call always adds in the same order.
#include "matrix_memory.h"

#include "matrix_memory.cuh"

namespace torch_ext::cuda {
namespace {

bool matrix_keys_inside = true; // a variable for tests alone

int64_t matrix_divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

MatrixElement matrix_element(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return MatrixElement::bf16;
    case DType::f16:
      return MatrixElement::f16;
    case DType::f64:
      return MatrixElement::f64;
    default:
      return MatrixElement::f32;
  }
}
DType matrix_state_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }
int64_t matrix_bytes(MatrixElement element) {
  return element == MatrixElement::f64 ? 8 : element == MatrixElement::f32 ? 4 : 2;
}

// Is every row of every head a number of whole pieces, at an address that such pieces may have?
template <class Data>
bool in_pieces(const OverHeads<Data>& x, MatrixElement element, int64_t size, int64_t piece) {
  const int64_t bytes = matrix_bytes(element), each = piece / bytes;
  return x.channel == 1 && size % each == 0 && x.sequence % each == 0 && x.time % each == 0 &&
         x.head % each == 0 && reinterpret_cast<uintptr_t>(x.data) % uintptr_t(piece) == 0;
}
} // namespace

MatrixLayout matrix_layout(DType dtype, const MatrixMemoryProblem& p) {
  MatrixLayout y;
  y.values = matrix_element(dtype);
  y.keys = p.wide_keys ? matrix_element(matrix_state_dtype(dtype)) : y.values;
  y.q = in_pieces(p.q, y.keys, p.key_size, 16);
  y.k = in_pieces(p.k, y.keys, p.key_size, 16);
  y.v = in_pieces(p.v, y.values, p.value_size, 16);
  return y;
}

namespace {

MatrixOutput matrix_output(DType dtype, const MatrixMemoryForward& p) {
  MatrixOutput y;
  y.element = matrix_element(p.wide_h ? matrix_state_dtype(dtype) : dtype);
  y.pieces = in_pieces(p.h, y.element, p.value_size, 4 * matrix_bytes(y.element));
  return y;
}

} // namespace

int matrix_parts(DType dtype, const MatrixMemoryProblem& p, int wanted) {
  if (dtype == DType::f32) return wanted;
  return dtype == DType::bf16 && !p.wide_keys ? 1 : 2;
}

namespace {

bool matrix_in_place(const MatrixMemoryForward& p) {
  const auto same = [](const void* x, const void* y) { return x && x == y; };
  return same(p.initial_state.C, p.final_state.C) || same(p.initial_state.n, p.final_state.n) ||
         same(p.initial_state.m, p.final_state.m);
}
// A step at a time?
bool matrix_recurrent(DType dtype, const MatrixMemoryForward& p) {
  return dtype == DType::f64 || p.state_rows || (!p.cu_seqlens && p.num_steps == 1) ||
         matrix_in_place(p) || !has_matrix_products();
}

// Where the states at the starts of chunks lie in a workspace; how many bytes they take.
int64_t matrix_states(const MatrixMemoryProblem& p, bool wide, void* workspace, MatrixStates& y) {
  y.wide = wide;
  y.keys = matrix_memory_padded(p.key_size), y.values = matrix_memory_padded(p.value_size);
  const bool starts = p.initial_state.C || p.initial_state.n || p.initial_state.m;
  if (!starts && p.num_steps <= kMatrixChunk) return 0; // none that is not zero
  const int64_t all = matrix_slots(p) * p.num_heads;
  int64_t bytes = 0;
  const auto take = [&](auto*& to, int64_t size) {
    using T = std::remove_reference_t<decltype(to)>;
    to = workspace ? reinterpret_cast<T>(static_cast<char*>(workspace) + bytes) : nullptr;
    bytes += matrix_divide_up(size, 256) * 256;
  };
  char* C = nullptr;
  take(C, all * y.keys * y.values * (wide ? 4 : 2));
  y.C = C;
  if (p.normalizer != Normalizer::none) take(y.n, all * y.keys * 4);
  if (p.normalizer == Normalizer::stabilized) take(y.m, all * 8);
  return bytes;
}

template <int kParts, int kKeys, int kValues>
void matrix_run_states(
    const MatrixMemoryProblem& p, const MatrixLayout& layout, const MatrixStates& states,
    const MatrixState<void*>& final_state, cudaStream_t stream) {
  const auto slices = [](int64_t size, int64_t of) {
    return size > of ? matrix_divide_up(size, of) : 1;
  };
  const int64_t blocks =
      p.num_sequences * p.num_heads * slices(p.key_size, kKeys) * slices(p.value_size, kValues);
  if (blocks > 0)
    launch(
        matrix_memory_states_kernel<kParts, kKeys, kValues>, dim3(unsigned(blocks)), kMatrixThreads,
        MatrixStatesShared<kParts, kKeys, kValues>::kBytes, stream, p, layout, states, final_state);
}
} // namespace

void matrix_run_states(
    int parts, const MatrixMemoryProblem& p, const MatrixLayout& layout, const MatrixStates& states,
    const MatrixState<void*>& final_state, cudaStream_t stream) {
  if (parts == 3) return matrix_run_states<3, 64, 64>(p, layout, states, final_state, stream);
  if (parts == 2) return matrix_run_states<2, 64, 64>(p, layout, states, final_state, stream);
  if (p.key_size > 64) return matrix_run_states<1, 128, 64>(p, layout, states, final_state, stream);
  matrix_run_states<1, 64, 64>(p, layout, states, final_state, stream);
}

namespace {

template <int kParts, int kValues>
void matrix_run_outputs(
    const MatrixMemoryForward& p, const MatrixLayout& layout, const MatrixOutput& output,
    const MatrixStates& states, cudaStream_t stream) {
  const int64_t blocks = matrix_slots(p) * p.num_heads * (kMatrixChunk / kMatrixRows) *
                         matrix_divide_up(p.value_size, kValues);
  if (blocks > 0)
    launch(
        matrix_memory_outputs_kernel<kParts, kValues>, dim3(unsigned(blocks)), kMatrixThreads,
        MatrixOutputsShared<kParts, kValues>::kBytes, stream,
        static_cast<const MatrixMemoryProblem&>(p), layout, states, p.h, output);
}

int matrix_power(int64_t x) { // of two, from x on
  int y = 1;
  while (y < x) y *= 2;
  return y;
}
template <class R>
void matrix_run_recurrent(DType dtype, const MatrixMemoryForward& p, cudaStream_t stream) {
  MatrixRecurrence plan;
  // Do keys lie side by side in the states, and values not?
  const auto inside = [](const auto& s) { return !s.C || (s.C_key == 1 && s.C_value != 1); };
  const bool keys_inside = matrix_keys_inside && inside(p.initial_state) && inside(p.final_state);
  const int64_t neighbours = keys_inside ? p.key_size : p.value_size;
  plan.across = matrix_power(matrix_divide_up(neighbours < 256 ? neighbours : int64_t(256), 4));
  plan.keeps = p.num_steps > 1 && !p.state_rows;
  const auto rows = [&] { return int64_t(kRecurrentThreads / plan.across) * kRecurrentRows; };
  if (plan.keeps) { // all keys at once
    if (!keys_inside)
      while (plan.across > 1 && p.key_size > rows()) plan.across /= 2;
    plan.keeps = p.key_size <= (keys_inside ? 4 * plan.across : rows());
  }
  const int64_t slices =
      matrix_divide_up(p.value_size, keys_inside ? rows() : int64_t(4) * plan.across);
  // Other blocks of a head must not find n and m changed, whether by what is written last or from step to step.
  const bool one = p.normalizer != Normalizer::none &&
                   (matrix_in_place(p) || (p.num_steps > 1 && p.key_size > kRecurrentThreads));
  plan.blocks = one || slices == 0 ? 1 : slices;
  plan.slices = one ? slices : slices == 0 ? 0 : 1;
  if (plan.slices != 1) plan.keeps = false;
  const auto pieces = [&](const auto& s) {
    const int64_t each = 16 / int64_t(sizeof(R));
    return !s.C || ((keys_inside ? s.C_key : s.C_value) == 1 && s.C_row % each == 0 &&
                    s.C_head % each == 0 && (keys_inside ? s.C_value : s.C_key) % each == 0 &&
                    reinterpret_cast<uintptr_t>(s.C) % 16 == 0);
  };
  plan.pieces = neighbours % 4 == 0 && pieces(p.initial_state) && pieces(p.final_state);
  const int64_t blocks = p.num_sequences * p.num_heads * plan.blocks;
  if (blocks == 0) return;
  const auto run = [&](auto kernel) {
    launch(
        kernel, dim3(unsigned(blocks)), kRecurrentThreads, matrix_recurrent_shared<R>, stream, p,
        matrix_layout(dtype, p), matrix_output(dtype, p), plan);
  };
  keys_inside ? run(matrix_memory_recurrent_kernel<R, true>)
              : run(matrix_memory_recurrent_kernel<R, false>);
}

} // namespace

int64_t matrix_memory_workspace(DType dtype, const MatrixMemoryForward& p, int parts) {
  if (matrix_recurrent(dtype, p)) return 0;
  MatrixStates states;
  return matrix_states(p, matrix_parts(dtype, p, parts) > 1, nullptr, states);
}
void matrix_memory(
    DType dtype, const MatrixMemoryForward& p, int wanted, void* workspace, void* to) {
  const cudaStream_t stream = static_cast<cudaStream_t>(to);
  if (dtype == DType::f64) return matrix_run_recurrent<double>(dtype, p, stream);
  if (matrix_recurrent(dtype, p)) return matrix_run_recurrent<float>(dtype, p, stream);
  const int parts = matrix_parts(dtype, p, wanted);
  const MatrixLayout layout = matrix_layout(dtype, p);
  const MatrixOutput output = matrix_output(dtype, p);
  MatrixStates states;
  matrix_states(p, parts > 1, workspace, states);
  matrix_run_states(parts, p, layout, states, p.final_state, stream);
  if (parts == 3) return matrix_run_outputs<3, 64>(p, layout, output, states, stream);
  if (parts == 2) return matrix_run_outputs<2, 64>(p, layout, output, states, stream);
  if (p.value_size > 64) return matrix_run_outputs<1, 128>(p, layout, output, states, stream);
  matrix_run_outputs<1, 64>(p, layout, output, states, stream);
}

} // namespace torch_ext::cuda
