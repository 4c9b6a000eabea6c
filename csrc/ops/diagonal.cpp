// The parts of diagonal.h that do not depend on the cell.
#include "diagonal.h"

#include <algorithm>
#include <utility>

namespace torch_ext {

Tensor state_before(
    const Tensor& h, const Opt& initial_state, const Opt& cu_seqlens, bool reverse) {
  const auto num_steps = h.sym_size(1), width = h.sym_size(2);
  const auto rows = cu_seqlens ? cu_seqlens->sym_size(0) - 1 : h.sym_size(0);
  const Tensor start =
      defined(initial_state) ? *initial_state : at::zeros_symint({rows, width}, h.options());
  const auto shifted = [&](const Tensor& first) {
    return reverse ? at::cat({h, first}, 1).narrow_symint(1, 1, num_steps)
                   : at::cat({first, h}, 1).narrow_symint(1, 0, num_steps);
  };
  if (!cu_seqlens) return shifted(start.unsqueeze(1));
  // Packed: each token's sequence, whether it is that sequence's first in time, and then the sequence's own start.
  const Tensor offsets = cu_seqlens->to(h.device(), at::kLong),
               begin = offsets.narrow_symint(0, 0, rows), end = offsets.narrow_symint(0, 1, rows);
  const Tensor token = at::arange(at::Scalar(num_steps), offsets.options());
  const Tensor sequence = at::searchsorted(end, token, /*out_int32=*/false, /*right=*/true);
  const Tensor first =
      reverse ? end.index_select(0, sequence) - 1 : begin.index_select(0, sequence);
  return at::where(
      (token == first).view_symint({1, num_steps, 1}), start.index_select(0, sequence).unsqueeze(0),
      shifted(at::zeros_symint({1, 1, width}, h.options())));
}

Tensor sequence_offsets(
    const char* op, const Tensor& cu_seqlens, int64_t num_steps, at::Device device) {
  const Tensor offsets = cu_seqlens.to(at::kLong).contiguous();
  if (offsets.is_cpu()) {
    const int64_t* o = offsets.const_data_ptr<int64_t>();
    const int64_t last = offsets.size(0) - 1;
    TORCH_CHECK_VALUE(o[0] == 0, op, ": cu_seqlens starts at ", o[0], ", expected 0");
    for (int64_t i = 0; i < last; ++i)
      TORCH_CHECK_VALUE(
          o[i] <= o[i + 1], op, ": cu_seqlens descends from ", o[i], " to ", o[i + 1],
          " at position ", i + 1, ", expected ascending offsets");
    TORCH_CHECK_VALUE(
        o[last] == num_steps, op, ": cu_seqlens ends at ", o[last], ", expected T=", num_steps,
        ", the number of tokens");
  }
  return offsets.to(device);
}

Tensor state_rows(
    const char* op_name, const Opt& state_indices, int64_t batch, int64_t num_rows,
    at::Device device) {
  if (!defined(state_indices)) return {};
  const std::string op = std::string(op_name) + "_step";
  const Tensor rows = state_indices->to(at::kLong).contiguous();
  if (rows.is_cpu()) {
    std::vector<int64_t> used;
    for (int64_t i = 0; i < batch; ++i) {
      const int64_t row = rows.const_data_ptr<int64_t>()[i];
      TORCH_CHECK_VALUE(
          row < num_rows, op, ": state_indices[", i, "] is ", row, ", expected less than ",
          num_rows, ", the rows of state (negative: no state)");
      if (row >= 0) used.push_back(row);
    }
    std::sort(used.begin(), used.end());
    const auto twice = std::adjacent_find(used.begin(), used.end());
    TORCH_CHECK_VALUE(
        twice == used.end(), op, ": state_indices has ", *twice,
        " twice, expected each row of state at most once");
  }
  return rows.to(device);
}

void check_inputs(
    const char* op, at::ArrayRef<const char*> names, at::TensorList x, bool complex,
    std::initializer_list<const char*> letters) {
  const Tensor& first = x[0];
  const at::ScalarType dtype = first.scalar_type();
  const bool real =
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
  TORCH_CHECK_TYPE(
      real || (complex && (dtype == at::kComplexFloat || dtype == at::kComplexDouble)), op, ": ",
      names[0], " has dtype ", dtype_text(dtype), ", expected float32, float64, bfloat16",
      complex ? ", float16, complex64 or complex128" : " or float16");
  TORCH_CHECK_VALUE(
      size_t(first.dim()) == letters.size(), op, ": ", names[0], " has shape ",
      shape_text(first.sym_sizes()), ", expected ", letters.size() == 3 ? "(B, T, D)" : "(B, D)");
  const std::string of_first = std::string("of ") + names[0];
  for (size_t i = 1; i < x.size(); ++i) {
    check_dtype(op, names[i], x[i], dtype, "the dtype " + of_first);
    check_device(op, names[i], x[i], first.device(), "the device " + of_first);
    check_shape(op, names[i], x[i], letters, first.sym_sizes(), "the shape " + of_first);
  }
}
void check_index_dtype(const char* op, const char* name, const Tensor& x) {
  TORCH_CHECK_TYPE(
      x.scalar_type() == at::kInt || x.scalar_type() == at::kLong, op, ": ", name, " has dtype ",
      dtype_text(x.scalar_type()), ", expected int32 or int64");
}
void check_index_device(const char* op, const char* name, const Tensor& x, at::Device device) {
  TORCH_CHECK(
      x.device() == device || x.is_cpu(), op, ": ", name, " is on ", x.device(), ", expected ",
      device, ", the device of the inputs, or cpu");
}
namespace {

std::string state_reason(const Tensor& first) {
  return "the state's dtype for " + dtype_text(first.scalar_type()) + " inputs";
}

} // namespace

void check_sequences(
    const char* op, at::ArrayRef<const char*> names, at::TensorList x, bool complex,
    const Opt& initial_state, const Opt& cu_seqlens) {
  check_inputs(op, names, x, complex, {"B", "T", "D"});
  const Tensor& first = x[0];
  c10::SymInt rows = first.sym_size(0);
  if (defined(cu_seqlens)) {
    check_index_dtype(op, "cu_seqlens", *cu_seqlens);
    check_index_device(op, "cu_seqlens", *cu_seqlens, first.device());
    TORCH_CHECK_VALUE(
        cu_seqlens->dim() == 1, op, ": cu_seqlens has shape ", shape_text(cu_seqlens->sym_sizes()),
        ", expected (num_sequences + 1,)");
    TORCH_CHECK_VALUE(
        cu_seqlens->sym_size(0).sym_ge(1).expect_true(__FILE__, __LINE__), op,
        ": cu_seqlens is empty, expected (num_sequences + 1,) offsets");
    TORCH_CHECK_VALUE(
        equal(rows, 1), op, ": ", names[0], " has shape ", shape_text(first.sym_sizes()),
        ", expected B=1 with cu_seqlens: sequences lie end to end in one row");
    rows = cu_seqlens->sym_size(0) - 1;
  }
  if (defined(initial_state)) {
    check_dtype(
        op, "initial_state", *initial_state, state_dtype(first.scalar_type()), state_reason(first));
    check_device(
        op, "initial_state", *initial_state, first.device(),
        std::string("the device of ") + names[0]);
    check_shape(
        op, "initial_state", *initial_state, {defined(cu_seqlens) ? "num_sequences" : "B", "D"},
        {rows, first.sym_size(2)}, "one state per sequence");
  }
}

void check_step(
    const char* op_name, at::ArrayRef<const char*> names, at::TensorList x, bool complex,
    const Tensor& state, const Opt& state_indices) {
  const std::string op = std::string(op_name) + "_step";
  check_inputs(op.c_str(), names, x, complex, {"B", "D"});
  const Tensor& first = x[0];
  check_dtype(op.c_str(), "state", state, state_dtype(first.scalar_type()), state_reason(first));
  check_device(
      op.c_str(), "state", state, first.device(), std::string("the device of ") + names[0]);
  if (!defined(state_indices)) {
    check_shape(
        op.c_str(), "state", state, {"B", "D"}, first.sym_sizes(),
        std::string("the shape of ") + names[0]);
    return;
  }
  check_index_dtype(op.c_str(), "state_indices", *state_indices);
  check_index_device(op.c_str(), "state_indices", *state_indices, first.device());
  check_shape(
      op.c_str(), "state_indices", *state_indices, {"B"}, {first.sym_size(0)},
      std::string("one index per row of ") + names[0]);
  TORCH_CHECK_VALUE(
      state.dim() == 2 && equal(state.sym_size(1), first.sym_size(1)), op, ": state has shape ",
      shape_text(state.sym_sizes()), ", expected (num_rows, D=", first.sym_size(1),
      "), a pool of states as wide as ", names[0]);
}

void check_no_overlap(const char* op, const Tensor& state) {
  std::vector<int64_t> dims;
  for (int64_t i = 0; i < state.dim(); ++i)
    if (state.size(i) > 1) dims.push_back(i);
  std::sort(dims.begin(), dims.end(), [&](int64_t i, int64_t j) {
    return state.stride(i) < state.stride(j);
  });
  // Each stride steps over all that the smaller ones reach.
  bool apart = true;
  int64_t reach = 0;
  for (const int64_t i : dims) {
    apart = apart && state.stride(i) > reach;
    reach += state.stride(i) * (state.size(i) - 1);
  }
  TORCH_CHECK_VALUE(
      apart || state.numel() == 0, op, "_step_: state has shape ", shape_text(state.sym_sizes()),
      " and strides ", shape_text(state.sym_strides()),
      ", expected memory in which no two elements share a place, since it is written");
}

std::pair<Tensor, variable_list> step_in_pools(
    const char* op, const variable_list& pools, const Tensor& state_indices,
    const std::function<std::pair<Tensor, variable_list>(const variable_list&)>& run) {
  // Rows without a state read and write one row more at the pool's end.
  const auto num_rows = pools[0].sym_size(0);
  Tensor rows = state_indices.to(at::kLong);
  if (rows.is_cpu() && rows.unsafeGetTensorImpl()->has_storage() &&
      !rows.key_set().has_any(
          c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched})))
    state_rows(
        op, state_indices, rows.numel(), num_rows.guard_int(__FILE__, __LINE__), rows.device());
  const Tensor has_state = rows.ge(0);
  rows = at::where(has_state, rows, at::full_symint({}, at::Scalar(num_rows), rows.options()));
  variable_list longer, before;
  for (const Tensor& pool : pools) {
    auto one_row = pool.sym_sizes().vec();
    one_row[0] = 1;
    longer.push_back(at::cat({pool, at::zeros_symint(one_row, pool.options())}, 0));
    before.push_back(longer.back().index_select(0, rows));
  }
  auto [y, next] = run(before);
  std::vector<int64_t> over_rows(size_t(y.dim()), 1);
  over_rows[0] = -1;
  y = at::where(has_state.view(over_rows), y, at::zeros_like(y));
  variable_list after;
  for (size_t i = 0; i < pools.size(); ++i)
    after.push_back(
        at::index_copy(longer[i], 0, rows, next[i]).narrow_symint(0, 0, num_rows).clone());
  return {y, after};
}

Pair step_in_pool(
    const char* op, const Tensor& pool, const Tensor& state_indices,
    const std::function<Pair(const Tensor&)>& run) {
  const auto [y, after] = step_in_pools(
      op, {pool}, state_indices,
      [&](const variable_list& rows) -> std::pair<Tensor, variable_list> {
        const auto [h, next] = run(rows[0]);
        return {h, {next}};
      });
  return {y, after[0]};
}

void no_cuda_kernel(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().operator_name().name.substr(strlen("torch_ext::")),
      ": its inputs are on a CUDA device, for which this build has no kernel; expected cpu");
}

void resolve_lazy(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  std::vector<std::pair<Tensor, Tensor>> written; // a tensor, and what is written in its place
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    const Tensor tensor = value.toTensor();
    if (!tensor.is_conj() && !tensor.is_neg()) continue;
    const Tensor resolved = tensor.resolve_conj().resolve_neg();
    if (const auto* alias = arguments[i].alias_info(); alias && alias->isWrite())
      written.emplace_back(tensor, resolved);
    value = resolved;
  }
  op.callBoxed(stack);
  for (const auto& [to, from] : written) to.copy_(from);
}

Strided strided(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return {
      x.const_data_ptr(), x.stride(0), x.dim() == 3 ? x.stride(1) : 0,
      x.size(last) > 1 ? x.stride(last) : 1};
}
Strided strided(const Opt& x) { return defined(x) ? strided(*x) : Strided{}; }

DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    case at::kComplexFloat:
      return DType::c64;
    case at::kComplexDouble:
      return DType::c128;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for ", dtype);
  }
}

} // namespace torch_ext
