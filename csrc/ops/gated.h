// What the members of the gated family (slstm.cpp, lstm.cpp, ...) are made of: one operator, torch_ext::gated, which has all
// kernels and derivatives (core/gated_problem.h says what it computes). A member states its cell and calls it.
#pragma once
#include "../core/gated_problem.h"
#include "diagonal.h"
#include "torch_ext/ops.h"

namespace torch_ext {

// A call's tensors, in the order of the operator's schema. The first twelve are differentiable.
struct GatedTensors {
  Opt x, R, bias, weights, projection, norm_weight, cell_norm_weight, cell_norm_bias, h, c, n, m;
  Opt recurrent_mask, h_update, c_update, reset, cu_seqlens;
};
struct Gated : GatedTensors {
  int cell = 0;
  unsigned flags = 0;
  double norm_eps = 1e-5;
  std::optional<double> gradient_clip;
  bool reverse = false;
  const char* op =
      "gated"; // whose call it is, and what that calls its weights, for what is wrong with them
  const char* weights_name = "weights";
  const char* state_name = "h"; // of a cell's only state
};
struct GatedOutputs {
  Tensor y, h, c, n, m; // of a cell without them, states are empty
};

// Checks in the caller's words, then through the dispatcher.
GatedOutputs call_gated(const Gated& g);
// One step, of x without time; of rows of a pool where there are state_indices.
GatedOutputs gated_step(const char* op, const Gated& g, const Opt& state_indices);
// The same in place.
Tensor gated_step_(const char* op, const Gated& g, const Opt& state_indices);

// A state under autocast, which may have cast what it was made of.
template <c10::DeviceType Device>
Opt gated_autocast_state(const Opt& state, const Tensor& x) {
  if (!defined(state)) return {};
  return at::autocast::cached_cast(state_dtype(x.scalar_type()), *state, Device);
}

// reset (B, T), as the operator has it: (B, T, H), for x (B, T, G, H, K).
Opt reset_of_heads(const char* op, const Opt& reset, const Tensor& x);
// That a C++ caller sets no option which the operator does not have. A step has no time to run over.
void check_options(const char* op, const GatedOptions& options, bool step, bool cell, bool norms);

// A member's own operator, with its dispatch keys, for C++ callers (torch_ext/ops.h).
template <class F>
auto gated_member(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("torch_ext::") + name).c_str(), "")
      .typed<F>();
}

} // namespace torch_ext
