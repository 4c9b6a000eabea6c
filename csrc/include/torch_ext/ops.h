// The operators as C++ functions: the same names, arguments and defaults as in Python (torch_ext.NAME), where each is
// described. All are differentiable unless their name ends in an underscore.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "torch_ext.h"

namespace torch_ext {

using OptionalTensor = std::optional<at::Tensor>;
using TensorPair =
    std::tuple<at::Tensor, at::Tensor>; // h (B, T, D) or (B, D), and the state after the last step

// h[t] = a[t] h[t-1] + b[t], over (B, T, D).
TORCH_EXT_API TensorPair linear_scan(
    const at::Tensor& a, const at::Tensor& b, const OptionalTensor& initial_state = {},
    const OptionalTensor& cu_seqlens = {}, bool reverse = false);
TORCH_EXT_API TensorPair linear_scan_step(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& state,
    const OptionalTensor& state_indices = {});
TORCH_EXT_API at::Tensor linear_scan_step_(
    const at::Tensor& a, const at::Tensor& b, at::Tensor& state,
    const OptionalTensor& state_indices = {});

// z = sigmoid(gate), h[t] = (1 - z) h[t-1] + z act(candidate).
TORCH_EXT_API TensorPair min_gru(
    const at::Tensor& gate, const at::Tensor& candidate, const OptionalTensor& initial_state = {},
    std::string_view activation = "identity", const OptionalTensor& cu_seqlens = {},
    bool reverse = false);
TORCH_EXT_API TensorPair min_gru_step(
    const at::Tensor& gate, const at::Tensor& candidate, const at::Tensor& state,
    const OptionalTensor& state_indices = {}, std::string_view activation = "identity");
TORCH_EXT_API at::Tensor min_gru_step_(
    const at::Tensor& gate, const at::Tensor& candidate, at::Tensor& state,
    const OptionalTensor& state_indices = {}, std::string_view activation = "identity");

// f = sigmoid(forget_gate), i = sigmoid(input_gate), both divided by f + i if `normalize`;
// h[t] = f h[t-1] + i act(candidate).
TORCH_EXT_API TensorPair min_lstm(
    const at::Tensor& forget_gate, const at::Tensor& input_gate, const at::Tensor& candidate,
    const OptionalTensor& initial_state = {}, std::string_view activation = "identity",
    bool normalize = true, const OptionalTensor& cu_seqlens = {}, bool reverse = false);
TORCH_EXT_API TensorPair min_lstm_step(
    const at::Tensor& forget_gate, const at::Tensor& input_gate, const at::Tensor& candidate,
    const at::Tensor& state, const OptionalTensor& state_indices = {},
    std::string_view activation = "identity", bool normalize = true);
TORCH_EXT_API at::Tensor min_lstm_step_(
    const at::Tensor& forget_gate, const at::Tensor& input_gate, const at::Tensor& candidate,
    at::Tensor& state, const OptionalTensor& state_indices = {},
    std::string_view activation = "identity", bool normalize = true);

// y[t] = act(bias + sum over k of weight[:, k] x[t - W + 1 + k]), x (B, T, D), weight (D, W); activation none or "silu". The
// state, (B, D, W - 1), is the inputs before the first, oldest first.
TORCH_EXT_API TensorPair causal_conv1d(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias = {},
    const OptionalTensor& initial_state = {}, std::optional<std::string_view> activation = {},
    const OptionalTensor& cu_seqlens = {});
TORCH_EXT_API TensorPair causal_conv1d_step(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
    const at::Tensor& state, const OptionalTensor& state_indices = {},
    std::optional<std::string_view> activation = {});
TORCH_EXT_API at::Tensor causal_conv1d_step_(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, at::Tensor& state,
    const OptionalTensor& state_indices = {}, std::optional<std::string_view> activation = {});

// d = softplus(delta + delta_bias) or delta + delta_bias; h[t] = exp(d[t] A) h[t-1] + d[t] B[t] u[t];
// y[t] = (sum over the states of C[t] h[t] + D u[t]) silu(z[t]). u, delta, z (B, T, D); A (D, N), real or complex; B, C
// (B, T, N), (B, T, G, N) or (D, N); D, delta_bias (D,); states (B, D, N). A step takes B, C as (B, N) or (B, G, N).
TORCH_EXT_API TensorPair selective_scan(
    const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const OptionalTensor& D = {}, const OptionalTensor& z = {},
    const OptionalTensor& delta_bias = {}, const OptionalTensor& initial_state = {},
    bool delta_softplus = false, const OptionalTensor& cu_seqlens = {}, bool reverse = false);
TORCH_EXT_API TensorPair selective_scan_step(
    const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& delta_bias, const at::Tensor& state,
    const OptionalTensor& state_indices = {}, bool delta_softplus = false);
TORCH_EXT_API at::Tensor selective_scan_step_(
    const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& delta_bias, at::Tensor& state, const OptionalTensor& state_indices = {},
    bool delta_softplus = false);

// One step of a whole Mamba layer (torch_ext.Mamba): x (B, d_model); weights as the layer's parameters, conv_weight
// (d_inner, W); conv_state (B, d_inner, W - 1), scan_state (B, d_inner, N). Returns y and the next states; in place, y.
TORCH_EXT_API std::tuple<at::Tensor, at::Tensor, at::Tensor> mamba_step(
    const at::Tensor& x, const at::Tensor& in_proj_weight, const OptionalTensor& in_proj_bias,
    const at::Tensor& conv_weight, const OptionalTensor& conv_bias, const at::Tensor& x_proj_weight,
    const at::Tensor& dt_proj_weight, const OptionalTensor& dt_proj_bias, const at::Tensor& A_log,
    const OptionalTensor& D, const at::Tensor& out_proj_weight, const OptionalTensor& out_proj_bias,
    const at::Tensor& conv_state, const at::Tensor& scan_state,
    const OptionalTensor& state_indices = {});
TORCH_EXT_API at::Tensor mamba_step_(
    const at::Tensor& x, const at::Tensor& in_proj_weight, const OptionalTensor& in_proj_bias,
    const at::Tensor& conv_weight, const OptionalTensor& conv_bias, const at::Tensor& x_proj_weight,
    const at::Tensor& dt_proj_weight, const OptionalTensor& dt_proj_bias, const at::Tensor& A_log,
    const OptionalTensor& D, const at::Tensor& out_proj_weight, const OptionalTensor& out_proj_bias,
    at::Tensor& conv_state, at::Tensor& scan_state, const OptionalTensor& state_indices = {});

} // namespace torch_ext
