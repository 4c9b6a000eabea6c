// torch_ext::linear_attention (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236): no decay; keys and queries go
// through a feature map, and what is read is divided by the sum of the weights.
#include "matrix_memory.h"
#include "torch_ext/ops.h"

namespace torch_ext {
namespace {

using Text = c10::string_view;
using Three = std::tuple<Tensor, Tensor, Tensor>; // h, S, z

constexpr MatrixMemoryNames kNames{.C = "S", .n = "z"};

// Features of half precision are float32: rounded again, they would not be those of their inputs.
Tensor features(const char* op, const Tensor& given, Text feature_map) {
  const Tensor x = given.to(state_dtype(given.scalar_type()));
  if (feature_map == "elu") { // stays positive where elu rounds to -1
    const Tensor above = x.gt(0);
    return at::where(above, x + 1, at::exp(at::where(above, at::zeros_like(x), x)));
  }
  if (feature_map == "relu") return at::relu(x);
  TORCH_CHECK_VALUE(
      feature_map == "identity", op, ": feature_map is '", feature_map,
      "', expected 'elu', 'relu' or 'identity'");
  return x;
}

MatrixMemory prepare(
    const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Opt& S, const Opt& z,
    const Opt& cu_seqlens, double scale, Text feature_map, bool normalize, double eps, bool reverse,
    bool step, const Opt& state_indices) {
  check_heads(op, kNames, q, k, v, step);
  MatrixMemory x{q, k, v, {}, {}, {}, S, z, {}, cu_seqlens};
  x.op = op;
  x.scale = scale;
  x.eps = eps;
  x.reverse = reverse;
  x.normalizer = Normalizer::sum;
  check_states(op, kNames, x, step, state_indices);
  x.q = features(op, q, feature_map);
  x.k = features(op, k, feature_map);
  if (!normalize) x.normalizer = Normalizer::none, x.n.reset();
  return x;
}
Three finish(const MatrixMemoryOutputs& out, const MatrixMemory& x, const Opt& z) {
  if (x.normalizer == Normalizer::sum) return {out.h, out.C, out.n};
  return {
      out.h, out.C,
      defined(z) ? z->clone(at::MemoryFormat::Contiguous)
                 : at::zeros_symint(out.C.sym_sizes().slice(0, 3), out.C.options())};
}

Three forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& S, const Opt& z,
    const Opt& cu_seqlens, double scale, Text feature_map, bool normalize, double eps,
    bool reverse) {
  const MatrixMemory x = prepare(
      "linear_attention", q, k, v, S, z, cu_seqlens, scale, feature_map, normalize, eps, reverse,
      /*step=*/false, {});
  return finish(call_matrix_memory(x), x, z);
}
Three step(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& S, const Tensor& z,
    const Opt& state_indices, double scale, Text feature_map, bool normalize, double eps) {
  const MatrixMemory x = prepare(
      "linear_attention_step", q, k, v, S, z, {}, scale, feature_map, normalize, eps,
      /*reverse=*/false, /*step=*/true, state_indices);
  return finish(matrix_memory_step("linear_attention", x, state_indices), x, z);
}
Tensor step_(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& S, const Tensor& z,
    const Opt& state_indices, double scale, Text feature_map, bool normalize, double eps) {
  check_no_grad("linear_attention_step_", {q, k, v, S, z});
  const MatrixMemory x = prepare(
      "linear_attention_step_", q, k, v, S, z, {}, scale, feature_map, normalize, eps,
      /*reverse=*/false, /*step=*/true, state_indices);
  return call_matrix_memory_step_(x, state_indices);
}

template <c10::DispatchKey Key, c10::DeviceType Device>
Three autocast(
    const Tensor& q, const Tensor& k, const Tensor& v, const Opt& S, const Opt& z,
    const Opt& cu_seqlens, double scale, Text feature_map, bool normalize, double eps,
    bool reverse) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  Tensor a = q, b = k, c = v;
  autocast_together<Device>(a, b, c);
  Opt S0 = S, z0 = z;
  for (Opt* s : {&S0, &z0}) autocast_state<Device>(*s, a);
  return forward(a, b, c, S0, z0, cu_seqlens, scale, feature_map, normalize, eps, reverse);
}

template <c10::DispatchKey Key, c10::DeviceType Device>
Three autocast_step(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& S, const Tensor& z,
    const Opt& state_indices, double scale, Text feature_map, bool normalize, double eps) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  Tensor a = q, b = k, c = v;
  autocast_together<Device>(a, b, c);
  const at::ScalarType wide = state_dtype(a.scalar_type());
  return step(
      a, b, c, at::autocast::cached_cast(wide, S, Device),
      at::autocast::cached_cast(wide, z, Device), state_indices, scale, feature_map, normalize,
      eps);
}
template <c10::DispatchKey Key, c10::DeviceType Device>
Tensor autocast_step_( // the states are written: they have their dtype, or are refused
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& S, const Tensor& z,
    const Opt& state_indices, double scale, Text feature_map, bool normalize, double eps) {
  c10::impl::ExcludeDispatchKeyGuard off(Key);
  Tensor a = q, b = k, c = v;
  autocast_together<Device>(a, b, c);
  return step_(a, b, c, S, z, state_indices, scale, feature_map, normalize, eps);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      torch::schema(
          "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? S=None, Tensor? z=None, "
          "Tensor? cu_seqlens=None, float scale=1.0, str feature_map=\"elu\", "
          "bool normalize=True, float eps=1e-6, bool reverse=False) -> (Tensor h, Tensor S, "
          "Tensor z)"),
      tags);
  m.def(
      torch::schema("linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor S, Tensor z, "
                    "Tensor? state_indices=None, float scale=1.0, str feature_map=\"elu\", "
                    "bool normalize=True, float eps=1e-6) -> (Tensor h, Tensor S, Tensor z)"),
      tags);
  m.def(
      torch::schema(
          "linear_attention_step_(Tensor q, Tensor k, Tensor v, Tensor(a!) S, Tensor(b!) z, "
          "Tensor? state_indices=None, float scale=1.0, str feature_map=\"elu\", "
          "bool normalize=True, float eps=1e-6) -> Tensor h"),
      tags);
}
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("linear_attention", &forward);
  m.impl("linear_attention_step", &step);
  m.impl("linear_attention_step_", &step_);
}
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatchedDecomposition, m) { // else vmap would loop
  m.impl("linear_attention", &forward);
  m.impl("linear_attention_step", &step);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) {
  m.impl("linear_attention", &autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("linear_attention_step", &autocast_step<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("linear_attention_step_", &autocast_step_<c10::DispatchKey::AutocastCPU, at::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) {
  m.impl("linear_attention", &autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("linear_attention_step", &autocast_step<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("linear_attention_step_", &autocast_step_<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

using Forward = decltype(forward);
using Step = decltype(step);
using StepInPlace = decltype(step_);

} // namespace

std::tuple<Tensor, TensorPair> linear_attention(
    const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<TensorPair>& initial_state, double scale, std::string_view feature_map,
    bool normalize, double eps, const OptionalTensor& cu_seqlens, bool reverse) {
  static const auto op = member<Forward>("linear_attention");
  Opt S0, z0;
  if (initial_state) std::tie(S0, z0) = *initial_state;
  auto [h, S, z] =
      op.call(q, k, v, S0, z0, cu_seqlens, scale, feature_map, normalize, eps, reverse);
  return {h, {S, z}};
}
std::tuple<Tensor, TensorPair> linear_attention_step(
    const Tensor& q, const Tensor& k, const Tensor& v, const TensorPair& state,
    const OptionalTensor& state_indices, double scale, std::string_view feature_map, bool normalize,
    double eps) {
  static const auto op = member<Step>("linear_attention_step");
  auto [h, S, z] = op.call(
      q, k, v, std::get<0>(state), std::get<1>(state), state_indices, scale, feature_map, normalize,
      eps);
  return {h, {S, z}};
}
Tensor linear_attention_step_(
    const Tensor& q, const Tensor& k, const Tensor& v, TensorPair& state,
    const OptionalTensor& state_indices, double scale, std::string_view feature_map, bool normalize,
    double eps) {
  static const auto op = member<StepInPlace>("linear_attention_step_");
  return op.call(
      q, k, v, std::get<0>(state), std::get<1>(state), state_indices, scale, feature_map, normalize,
      eps);
}

} // namespace torch_ext
