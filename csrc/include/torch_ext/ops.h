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

// xLSTM's matrix memory. f = sigmoid(f), i = exp(i) or sigmoid(i); C[t] = f[t] C[t-1] + i[t] k[t] v[t]^T, n[t] = f[t] n[t-1]
// + i[t] k[t]; h[t] = C[t]^T (scale q[t]) / (max(|n[t] . (scale q[t])|, 1) + eps e^m[t]), where with input_gate "exp" C and
// n are kept divided by e^m[t], the largest weight so far; scale 1 / sqrt(K) by default. q, k (B, T, G, K), v (B, T, H, V),
// i, f (B, T, H); C (B, H, K, V), n (B, H, K), m (B, H). A step takes them without T.
using MLSTMState = std::tuple<at::Tensor, at::Tensor, at::Tensor>; // C, n, m
TORCH_EXT_API std::tuple<at::Tensor, MLSTMState> mlstm(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& i,
    const at::Tensor& f, const std::optional<MLSTMState>& initial_state = {},
    std::optional<double> scale = {}, double eps = 1e-6, std::string_view input_gate = "exp",
    bool normalize = true, bool normalizer_grad = true, const OptionalTensor& cu_seqlens = {},
    bool reverse = false);
TORCH_EXT_API std::tuple<at::Tensor, MLSTMState> mlstm_step(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& i,
    const at::Tensor& f, const MLSTMState& state, const OptionalTensor& state_indices = {},
    std::optional<double> scale = {}, double eps = 1e-6, std::string_view input_gate = "exp",
    bool normalize = true, bool normalizer_grad = true);
TORCH_EXT_API at::Tensor mlstm_step_(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& i,
    const at::Tensor& f, MLSTMState& state, const OptionalTensor& state_indices = {},
    std::optional<double> scale = {}, double eps = 1e-6, std::string_view input_gate = "exp",
    bool normalize = true);

// S[t] = S[t-1] + phi(k[t]) v[t]^T, z[t] = z[t-1] + phi(k[t]); h[t] = S[t]^T (scale phi(q[t])) / (z[t] . (scale phi(q[t])) +
// eps), or not divided; phi by feature_map: "elu" (elu(x) + 1), "relu" or "identity". q, k (B, T, G, K), v (B, T, H, V); S
// (B, H, K, V), z (B, H, K).
TORCH_EXT_API std::tuple<at::Tensor, TensorPair> linear_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<TensorPair>& initial_state = {}, double scale = 1.0,
    std::string_view feature_map = "elu", bool normalize = true, double eps = 1e-6,
    const OptionalTensor& cu_seqlens = {}, bool reverse = false);
TORCH_EXT_API std::tuple<at::Tensor, TensorPair> linear_attention_step(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const TensorPair& state,
    const OptionalTensor& state_indices = {}, double scale = 1.0,
    std::string_view feature_map = "elu", bool normalize = true, double eps = 1e-6);
TORCH_EXT_API at::Tensor linear_attention_step_(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, TensorPair& state,
    const OptionalTensor& state_indices = {}, double scale = 1.0,
    std::string_view feature_map = "elu", bool normalize = true, double eps = 1e-6);

// S[t] = decay S[t-1] + k[t] v[t]^T, h[t] = S[t]^T (scale q[t]); decay (H,), 1 - 2^(-5 - head) by default, scale 1 /
// sqrt(K). q, k (B, T, G, K), v (B, T, H, V), states (B, H, K, V).
TORCH_EXT_API TensorPair retention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& decay = {},
    const OptionalTensor& initial_state = {}, std::optional<double> scale = {},
    const OptionalTensor& cu_seqlens = {}, bool reverse = false);
TORCH_EXT_API TensorPair retention_step(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& decay,
    const at::Tensor& state, const OptionalTensor& state_indices = {},
    std::optional<double> scale = {});
TORCH_EXT_API at::Tensor retention_step_(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& decay,
    at::Tensor& state, const OptionalTensor& state_indices = {}, std::optional<double> scale = {});

// Mamba-2's scan. d = softplus(dt + dt_bias) or dt + dt_bias; S[t] = exp(d[t] A) S[t-1] + d[t] x[t] B[t]^T;
// y[t] = (S[t] C[t] + D x[t]) silu(z[t]). x, z (B, T, H, P); dt (B, T, H); A, dt_bias (H,); D (H,) or (H, P); B, C (B, T, G,
// N); states (B, H, P, N). A step takes them without T.
TORCH_EXT_API TensorPair
ssd(const at::Tensor& x, const at::Tensor& dt, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const OptionalTensor& D = {}, const OptionalTensor& z = {},
    const OptionalTensor& dt_bias = {}, const OptionalTensor& initial_state = {},
    bool dt_softplus = false, const OptionalTensor& cu_seqlens = {}, bool reverse = false);
TORCH_EXT_API TensorPair ssd_step(
    const at::Tensor& x, const at::Tensor& dt, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& dt_bias, const at::Tensor& state,
    const OptionalTensor& state_indices = {}, bool dt_softplus = false);
TORCH_EXT_API at::Tensor ssd_step_(
    const at::Tensor& x, const at::Tensor& dt, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& dt_bias, at::Tensor& state, const OptionalTensor& state_indices = {},
    bool dt_softplus = false);

} // namespace torch_ext
