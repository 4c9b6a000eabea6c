// How an operator gets its derivatives, alike for eager, torch.func, torch.compile, compiled autograd and C++.
//
// torch's own torch::autograd::Function<T>::apply refuses torch.func, turns grad mode off (so that an outer torch.func
// level would record nothing, and yield zeros without a word), and has no forward mode. apply_op<T> is the same without
// these three. T derives from torch::autograd::Function<T> and has
//   static constexpr bool is_traceable = true;       compiled autograd traces `backward` into its graph
//   forward(ctx, args...)                            calls the same operator again under BelowAutograd; saves for backward
//   backward(ctx, gradients)                         calls operators only
//   jvp(ctx, inputs, tangents, outputs) -> tangents  optional: forward mode; calls operators only
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "compat.h"

namespace torch_ext {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Opt = std::optional<Tensor>;

inline Opt opt(const Tensor& t) { return t.defined() ? Opt(t) : Opt(); }
inline bool defined(const Opt& t) { return t && t->defined(); }

inline bool has_tangent(const Tensor& t) {
  return t.defined() && t._fw_grad(/*level=*/0).defined();
}
inline bool has_tangent(const Opt& t) { return t && has_tangent(*t); }
template <class T>
bool has_tangent(const T&) {
  return false;
}

// Stands around the call of the same operator in T::forward. Grad mode stays as the caller had it.
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

template <class T, class... Args>
variable_list apply_op(const Args&... args) {
  using namespace torch::autograd;
  const auto node = make_node<CppNode<T>>();
  variable_list inputs;
  extract_vars(node->is_variable_input_, inputs, args...);
  const bool record = at::GradMode::is_enabled() && any_variable_requires_grad(inputs);
  node->set_ctx_grad_fn(node);
  node->set_next_edges(record ? collect_next_edges(inputs) : edge_list());
  node->clear_input_metadata();
  // None, which the operator itself refuses in words, has no device.
  for (const Tensor& v : inputs)
    node->input_info_.push_back(v.defined() ? VariableInfo(v) : VariableInfo());

  const variable_list raw = T::forward(&node->ctx_, args...);

  // Runs when an input has a tangent, whether or not anything is recorded.
  const _jvp_fn_t jvp = [&](variable_list in, variable_list tangents) -> variable_list {
    if constexpr (requires { T::jvp(&node->ctx_, in, tangents, raw); }) {
      c10::AutoFwGradMode on(true); // _wrap_outputs turns it off, which would cut an outer jvp
      for (size_t i = 0; i < in.size(); ++i) {
        in[i] = in[i]._fw_primal(/*level=*/0);
        if (!tangents[i].defined()) tangents[i] = at::zeros_like(in[i]);
      }
      return T::jvp(&node->ctx_, in, tangents, raw);
    } else {
      TORCH_CHECK(false, "this operator has no forward-mode derivative of its own");
    }
  };
  NodePtr attached;
  const auto wrapped = wrap_outputs(
      inputs, {raw.begin(), raw.end()}, record ? NodePtr(node) : NodePtr(), jvp, attached);
  variable_list out;
  for (const auto& o : wrapped) out.push_back(o.value());
  if (record) {
    for (const Tensor& o : out) node->output_info_.emplace_back(o);
    node->save_variables_to_ctx(); // after the tangents are set: forward-over-reverse reads them from saved outputs
    node_created(attached);
  }
  return out;
}

// The backward of a backward operator: differentiates its composite, the same gradients as differentiable tensor code made
// by composite(tensors), by the first `count` of these tensors. Those that are undefined, and a composite's output that
// depends on none of them, take no part. out: the derivatives, in the order of the tensors.
template <class Composite>
void differentiate_composite(
    variable_list tensors, size_t count, const variable_list& grads, Composite composite,
    variable_list& out) {
  bool any = false;
  for (const Tensor& g : grads) any = any || g.defined();
  if (!any) return;
  const bool create_graph = at::GradMode::is_enabled();
  at::AutoGradMode on(true);
  variable_list leaves, y, gy;
  for (size_t i = 0; i < count; ++i) {
    Tensor& t = tensors[i];
    if (!t.defined()) continue;
    t = t.requires_grad() ? t.view_as(t) : t.detach().requires_grad_();
    leaves.push_back(t);
  }
  const variable_list outputs = composite(tensors);
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].defined() || !outputs[i].requires_grad()) continue;
    y.push_back(outputs[i]);
    gy.push_back(grads[i]);
  }
  if (y.empty()) return;
  const variable_list d =
      torch::autograd::grad(y, leaves, gy, std::nullopt, create_graph, /*allow_unused=*/true);
  for (size_t i = 0, k = 0; i < count; ++i)
    if (tensors[i].defined()) out[i] = d[k++];
}

} // namespace torch_ext
