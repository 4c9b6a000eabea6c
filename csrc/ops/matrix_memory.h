// What the members of the family of matrix memories (mlstm.cpp, ...) are made of: one operator, torch_ext::matrix_memory,
// which has all kernels and derivatives. A member checks its own arguments, states its log decay, its input scale and what
// divides (core/matrix_memory_problem.h), and calls it.
#pragma once
#include "../core/matrix_memory_problem.h"
#include "diagonal.h"

namespace torch_ext {

struct MatrixMemory {
  Tensor q, k, v;                        // (B, T, G, K) twice, (B, T, H, V)
  Opt log_decay, log_input, input_scale; // (B, T, H)
  Opt C, n, m;                           // (rows, H, K, V), (rows, H, K), (rows, H)
  Opt cu_seqlens;
  double scale = 1, eps = 0;
  Normalizer normalizer = Normalizer::none;
  bool exact = true, reverse = false;
  bool wide_h = false;              // h has the states' dtype, not that of v
  const char* op = "matrix_memory"; // whose call it is, for what is wrong with contents
};
struct MatrixMemoryOutputs {
  Tensor h, C, n, m; // n and m are empty where there is none
};

// Through the dispatcher.
MatrixMemoryOutputs call_matrix_memory(const MatrixMemory& x);
// One step for every row, in place: x has no time, C, n and m are the pool of states.
Tensor call_matrix_memory_step_(const MatrixMemory& x, const Opt& state_indices);

// A member's own operator, with its dispatch keys, for C++ callers (torch_ext/ops.h).
template <class F>
auto member(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("torch_ext::") + name).c_str(), "")
      .typed<F>();
}

// ---- checks of a member's arguments, in the words of its caller ----

struct MatrixMemoryNames {
  const char *q = "q", *k = "k", *v = "v";
  const char *C = "C", *n = "n", *m = "m"; // states
  const char *K = "K", *V = "V";           // sizes
};
// q and k (B, T, G, K), v (B, T, H, V), where G divides H; without T in a step.
void check_heads(
    const char* op, const MatrixMemoryNames& names, const Tensor& q, const Tensor& k,
    const Tensor& v, bool step, bool wide_keys = false);
// One number per head and step, (B, T, H); `half`: of the dtype of v as well as of the states'.
void check_gate(const char* op, const char* name, const Tensor& gate, const Tensor& v, bool half);
void check_cu_seqlens(const char* op, const MatrixMemoryNames& names, const MatrixMemory& x);
// cu_seqlens, and C, n and m: of the sequences, or the rows of a pool where there are state_indices.
void check_states(
    const char* op, const MatrixMemoryNames& names, const MatrixMemory& x, bool step,
    const Opt& state_indices);
void check_no_grad(const char* op, const variable_list& tensors);

// One step that is not in place: of x without time and with its states, or of the pools' rows.
MatrixMemoryOutputs matrix_memory_step(
    const char* op, const MatrixMemory& x, const Opt& state_indices);

// Tensors that run over time meet in the widest dtype of them under autocast.
template <c10::DeviceType Device, class... T>
void autocast_together(T&... tensors) {
  at::ScalarType widest = at::kHalf;
  bool first = true;
  for (const Tensor& t : {static_cast<const Tensor&>(tensors)...}) {
    widest = first ? t.scalar_type() : at::promote_types(widest, t.scalar_type());
    first = false;
  }
  ((tensors = at::autocast::cached_cast(widest, tensors, Device)), ...);
}
template <c10::DeviceType Device>
void autocast_state(Opt& state, const Tensor& q) {
  if (defined(state))
    state = at::autocast::cached_cast(state_dtype(q.scalar_type()), *state, Device);
}

} // namespace torch_ext
