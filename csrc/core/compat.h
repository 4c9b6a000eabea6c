// What differs between the torch versions we support (2.11 and newer), in one place.
#pragma once
#include <torch/csrc/autograd/custom_function.h>
#include <torch/headeronly/version.h>

#define TORCH_EXT_TORCH_AT_LEAST(major, minor) \
  (TORCH_VERSION_MAJOR > (major) ||            \
   (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR >= (minor)))

static_assert(TORCH_EXT_TORCH_AT_LEAST(2, 11), "torch_ext needs torch 2.11 or newer");

namespace torch_ext {

// Autograd nodes are held by std::shared_ptr up to 2.12, by c10::intrusive_ptr since.
#if TORCH_EXT_TORCH_AT_LEAST(2, 13)
using NodePtr = c10::intrusive_ptr<torch::autograd::Node>;
template <class N>
auto make_node() {
  return c10::make_intrusive<N>();
}
#else
using NodePtr = std::shared_ptr<torch::autograd::Node>;
template <class N>
auto make_node() {
  return std::shared_ptr<N>(new N(), torch::autograd::deleteNode);
}
#endif

// torch::autograd::_wrap_outputs, which has an argument more in newer versions, and the hooks that go with it.
template <class Ptr> // NodePtr; a template, so that only the call that this torch has is compiled
std::vector<std::optional<at::Tensor>> wrap_outputs(
    const torch::autograd::variable_list& inputs, const std::vector<std::optional<at::Tensor>>& raw,
    const Ptr& node, const torch::autograd::_jvp_fn_t& jvp, Ptr& attached) {
  const torch::autograd::_view_as_self_fn_t view_as_self = [](const at::Tensor& x) {
    return x.view_as(x);
  };
  const auto call = [&]<class... Extra>(Extra&... extra) -> decltype(torch::autograd::_wrap_outputs(
                                                             inputs, {}, {}, raw, node, jvp, {},
                                                             view_as_self, false, extra...)) {
    return torch::autograd::_wrap_outputs(
        inputs, {}, {}, raw, node, jvp, {}, view_as_self, false, extra...);
  };
  if constexpr (requires { call(attached); }) {
    return call(attached);
  } else {
    return call();
  }
}
template <class P>
void node_created(const P& node) {
  if constexpr (requires { fire_node_creation_hooks(node); }) {
    if (node) fire_node_creation_hooks(node);
  }
}

} // namespace torch_ext
