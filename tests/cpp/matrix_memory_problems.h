// Random problems for the drivers of matrix memories, and their answers: the recurrence of core/matrix_memory_problem.h step
// by step in double precision, and its gradient backwards through the same steps. Every number of an answer carries a bound
// of what rounding may make of it, so that small numbers are checked as sharply as large ones.
#pragma once
#include <math.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "core/matrix_memory_problem.h"
#include "selective_scan_problems.h"

namespace torch_ext::test {

// ---- numbers that know how exact they can be ----

// An error of one unit in every number that went in is, to first order, an error of at most `size` units here: of whatever
// order sums are made in.
struct Sized {
  double value = 0, size = 0;
};
inline Sized sized(double x) { return {x, fabs(x)}; }
inline Sized operator+(Sized x, Sized y) { return {x.value + y.value, x.size + y.size}; }
inline Sized operator-(Sized x) { return {-x.value, x.size}; }
inline Sized operator*(Sized x, Sized y) {
  return {x.value * y.value, fabs(x.value) * y.size + x.size * fabs(y.value)};
}
inline Sized operator/(Sized x, Sized y) {
  if (isinf(y.value)) return {};
  return {x.value / y.value, (x.size + fabs(x.value / y.value) * y.size) / fabs(y.value)};
}
inline Sized& operator+=(Sized& x, Sized y) { return x = x + y; }
// e^(x + y - z), where the exponent is off by a unit: a factor of many that drivers make into one, of the sum of their
// exponents. `units`: by so many more.
inline Sized exp_of(double x, double y, double z, double units = 0) {
  const double exponent = x + y - z, e = ::exp(exponent);
  return {e, e > 0 ? e * (fabs(exponent) + units) : 0};
}

struct SizedArray {
  std::vector<int64_t> size; // empty: there is no such array
  std::vector<Sized> at;
  explicit SizedArray(std::vector<int64_t> s = {}) : size(std::move(s)) {
    int64_t n = size.empty() ? 0 : 1;
    for (const int64_t each : size) n *= each;
    at.resize(size_t(n));
  }
  Sized& operator()(int64_t i, int64_t j, int64_t k = 0, int64_t l = 0) {
    int64_t n = 0;
    const int64_t place[] = {i, j, k, l};
    for (size_t d = 0; d < size.size(); ++d) n = n * size[d] + place[d];
    return at[size_t(n)];
  }
};

// ---- one problem ----

struct MatrixShape {
  int64_t S = 1, T = 1, H = 1, G = 1, K = 1, V = 1; // H is a multiple of G
};

struct MatrixCase : MatrixShape {
  enum Input { q, k, v, log_decay, log_input, input_scale, C, n, m, kInputs };
  enum Output { h, final_C, final_n, final_m, kOutputs };
  static const char* name(size_t i) {
    static const char* const names[] = {"q",           "k", "v", "log_decay", "log_input",
                                        "input_scale", "C", "n", "m"};
    return names[i];
  }
  static const char* output_name(size_t i) {
    static const char* const names[] = {"h", "final C", "final n", "final m"};
    return names[i];
  }

  DType dtype = DType::f32;
  Normalizer normalizer = Normalizer::none;
  bool exact = true, reverse = false, wide_keys = false, wide_h = false;
  double scale = 1, eps = 0;
  Order order = kNatural;
  std::vector<int64_t> cu_seqlens;          // empty: not packed
  std::array<Dense, kInputs> in;            // those without a size are not there
  std::array<unsigned, kInputs> repeated{}; // bit d: the same along dimension d, whose stride is 0
  std::array<Dense, kOutputs> grad;         // of the outputs

  bool packed() const { return !cu_seqlens.empty(); }
  bool normalizes() const { return normalizer != Normalizer::none; }
  bool stabilizes() const { return normalizer == Normalizer::stabilized; }
  int64_t rows() const { return packed() ? 1 : S; }
  DType wide() const { return info_of(dtype).state; }
  DType dtype_of(size_t input) const {
    return input <= k ? (wide_keys ? wide() : dtype) : input == v ? dtype : wide();
  }
  DType dtype_of_output(size_t output) const { return output == h && !wide_h ? dtype : wide(); }
  std::vector<int64_t> size_of(size_t input) const {
    if (input <= k) return {rows(), T, G, K};
    if (input == v) return {rows(), T, H, V};
    if (input < C) return {rows(), T, H};
    if (input == C) return {S, H, K, V};
    if (input == n) return normalizes() ? std::vector<int64_t>{S, H, K} : std::vector<int64_t>{};
    return stabilizes() ? std::vector<int64_t>{S, H} : std::vector<int64_t>{};
  }
  std::vector<int64_t> size_of_output(size_t output) const {
    return output == h ? size_of(v) : size_of(C + output - final_C);
  }
  // Places of a sequence's steps, in the order of the recurrence: the row and the token in it.
  std::vector<std::pair<int64_t, int64_t>> tokens(int64_t s) const {
    std::vector<std::pair<int64_t, int64_t>> all;
    const int64_t begin = packed() ? cu_seqlens[size_t(s)] : 0,
                  end = packed() ? cu_seqlens[size_t(s) + 1] : T;
    for (int64_t t = begin; t < end; ++t) all.emplace_back(packed() ? 0 : s, t);
    if (reverse) std::reverse(all.begin(), all.end());
    return all;
  }
  double gate(size_t input, int64_t row, int64_t t, int64_t head) const {
    if (!in[input]) return input == input_scale ? 1 : 0;
    return in[input](row, t, head).real();
  }
  double initial_m(int64_t s, int64_t head) const { return in[m] ? in[m](s, head).real() : 0; }

  std::string text() const {
    static const char* const normalizers[] = {"none", "sum", "at_least_one", "stabilized"};
    std::string all = std::string(info_of(dtype).name) + " S=" + std::to_string(S) +
                      " T=" + std::to_string(T) + " H=" + std::to_string(H) +
                      " G=" + std::to_string(G) + " K=" + std::to_string(K) +
                      " V=" + std::to_string(V) + " normalizer=" + normalizers[int(normalizer)] +
                      " eps=" + std::to_string(eps) + " order=" + std::to_string(order);
    const auto add = [&](const std::string& what, bool is) { all += is ? " " + what : ""; };
    add("not exact", !exact), add("reverse", reverse), add("wide_keys", wide_keys);
    add("wide_h", wide_h), add("packed", packed());
    for (size_t i = log_decay; i < kInputs; ++i) add(name(i), !!in[i]);
    for (size_t i = 0; i < kInputs; ++i) add(std::string("repeated ") + name(i), repeated[i] > 0);
    for (size_t i = 0; i < kOutputs; ++i) add(std::string("grad of ") + output_name(i), !!grad[i]);
    return all;
  }
};

// Takes a problem away from places where the gradient jumps, or where a divisor is so small beside what it is the sum of
// that rounding decides on it: inputs of a stabiliser that are almost equal, and a |r| almost 1.
inline void settle(Random& random, MatrixCase& p) {
  using In = MatrixCase;
  if (!p.normalizes() || p.normalizer == Normalizer::sum) return;
  for (int64_t s = 0; s < p.S; ++s) {
    const auto tokens = p.tokens(s);
    const size_t H = size_t(p.H), K = size_t(p.K);
    std::vector<double> n(H * K), added(H * K); // n, and the sizes of what it is the sum of
    std::vector<double> m(H, 0.);
    for (int64_t h = 0; h < p.H; ++h) {
      m[size_t(h)] = p.initial_m(s, h);
      for (int64_t k = 0; k < p.K && p.in[In::n]; ++k) {
        n[size_t(h * p.K + k)] = p.in[In::n](s, h, k).real();
        added[size_t(h * p.K + k)] = fabs(n[size_t(h * p.K + k)]);
      }
    }
    for (const auto& [row, t] : tokens) {
      for (int64_t h = 0; h < p.H; ++h) {
        const double decay = p.gate(In::log_decay, row, t, h), before = m[size_t(h)];
        double input = p.gate(In::log_input, row, t, h), after = 0;
        if (p.stabilizes()) {
          if (p.in[In::log_input] &&
              fabs(decay + before - input) < 1e-3 * (1 + fabs(decay) + fabs(before)))
            p.in[In::log_input](row, t, h) = input = float(input + 1 + 0.01 * fabs(input));
          after = std::max(decay + before, input);
        }
        const double f = ::exp(decay + before - after),
                     i = p.gate(In::input_scale, row, t, h) * ::exp(input - after);
        for (int64_t k = 0; k < p.K; ++k) {
          const double x = i * p.in[In::k](row, t, h / (p.H / p.G), k).real();
          const size_t at = size_t(h * p.K + k);
          n[at] = f * n[at] + x, added[at] = f * added[at] + fabs(x);
        }
        m[size_t(h)] = after;
      }
      for (int64_t g = 0; g < p.G; ++g) {
        for (int attempt = 0; attempt <= 31; ++attempt) {
          bool safe = true;
          for (int64_t h = g * (p.H / p.G); h < (g + 1) * (p.H / p.G); ++h) {
            double r = 0, sizes = 0;
            for (int64_t k = 0; k < p.K; ++k) {
              const double x = p.scale * p.in[In::q](row, t, g, k).real();
              r += n[size_t(h * p.K + k)] * x, sizes += added[size_t(h * p.K + k)] * fabs(x);
            }
            const double least = p.stabilizes() ? ::exp(-m[size_t(h)]) : 1, size = fabs(r);
            safe = safe && (size < 0.9 * least || (size > 1.1 * least && size > 0.05 * sizes));
          }
          if (safe) break;
          Array one(p.dtype_of(In::q), 1, false);
          for (int64_t k = 0; k < p.K; ++k) {
            one.set(0, attempt < 30 ? random.normal() + (attempt & 1 ? 0.5 : -0.5) : 0.);
            p.in[In::q](row, t, g, k) = one.get(0);
          }
        }
      }
    }
  }
}

// The options that any kernel has to serve, at random.
inline MatrixCase draw_matrix_case(
    Random& random, DType dtype, const MatrixShape& shape, Normalizer normalizer) {
  using In = MatrixCase;
  MatrixCase p;
  static_cast<MatrixShape&>(p) = shape;
  p.dtype = dtype, p.normalizer = normalizer;
  const auto coin = [&] { return random.integer(0, 1) == 1; };
  p.exact = random.integer(0, 3) > 0, p.reverse = coin();
  p.wide_keys = random.integer(0, 2) == 0, p.wide_h = random.integer(0, 2) == 0;
  p.order = Order(random.integer(0, 2));
  p.scale = coin() ? 1 / sqrt(double(p.K)) : random.uniform(0.2, 1.5);
  p.eps = p.normalizes() ? pick(random, std::vector<double>{0, 1e-6, 0.01, 0.5}) : 0;
  if (p.S > 0 && random.integer(0, 3) == 0) {
    p.cu_seqlens = {0};
    for (int64_t s = 1; s < p.S; ++s) p.cu_seqlens.push_back(random.integer(0, p.T));
    std::sort(p.cu_seqlens.begin(), p.cu_seqlens.end());
    p.cu_seqlens.push_back(p.T);
  }
  const bool positive = normalizer == Normalizer::sum; // what divides is a sum of products
  const auto normal = [&] { return random.normal(); };
  const auto key = [&] { return positive ? random.uniform(0.1, 1.5) : 0.5 + random.normal(); };
  const double strength = random.uniform(-6, 2), forget = random.uniform(-3, 6);
  const auto put = [&](size_t i, const std::function<double()>& number) {
    p.in[i] = draw(random, p.dtype_of(i), p.size_of(i), number);
  };
  put(In::q, key), put(In::k, key), put(In::v, normal);
  if (!positive) // either sign of r
    for (int64_t t = 0; t < p.rows() * p.T * p.G; ++t)
      for (int64_t k = 0, negative = coin(); k < p.K && negative; ++k)
        p.in[In::q].at[size_t(t * p.K + k)] *= -1;
  if (random.integer(0, 3))
    put(In::log_decay, [&] { return -log1p(::exp(-random.normal(2) - forget)); });
  if (p.stabilizes() && random.integer(0, 4))
    put(In::log_input, [&] { return strength + random.normal(2); });
  if (coin()) put(In::input_scale, [&] { return random.uniform(0.05, 1) * ::exp(strength); });
  if (coin()) put(In::C, normal);
  if (p.normalizes() && coin()) put(In::n, positive ? std::function<double()>(key) : normal);
  if (p.stabilizes() && coin()) put(In::m, [&] { return random.normal(2); });
  // Some inputs are the same for all tokens, or heads: expanded.
  for (size_t i : {In::k, In::v, In::log_decay, In::input_scale}) {
    Dense& x = p.in[i];
    if (!x || random.integer(0, 3)) continue;
    p.repeated[i] = unsigned(random.integer(1, 7)); // of rows, tokens and heads
    const Dense from = x;
    for (int64_t at = 0; at < int64_t(x.at.size()); ++at) {
      int64_t rest = at, place = 0, count = 1;
      for (size_t d = x.size.size(); d-- > 0; rest /= x.size[d], count *= x.size[d])
        if (!(p.repeated[i] >> d & 1)) place += rest % x.size[d] * count;
      x.at[size_t(at)] = from.at[size_t(place)];
    }
  }
  for (size_t i = 0; i < In::kOutputs; ++i)
    if (!p.size_of_output(i).empty() && (i == In::h ? random.integer(0, 4) > 0 : coin()))
      p.grad[i] = draw(random, p.dtype_of_output(i), p.size_of_output(i), normal);
  settle(random, p);
  return p;
}

// ---- the recurrence and its gradient, one step after the other ----

struct MatrixAnswer {
  std::array<SizedArray, MatrixCase::kOutputs> out;
  std::array<SizedArray, MatrixCase::kInputs> grads; // of inputs that are not there, too
};
// `sums`: the relative error of sums of log decays, of whose differences weights are made. As long as they are sums of
// doubles, only doubles see it.
inline MatrixAnswer formula(const MatrixCase& p, bool backward = true, double sums = 1.2e-16) {
  using In = MatrixCase;
  sums /= info_of(p.dtype).state_epsilon;
  MatrixAnswer answer;
  for (size_t i = 0; i < In::kOutputs; ++i) answer.out[i] = SizedArray(p.size_of_output(i));
  for (size_t i = 0; i < In::kInputs; ++i) answer.grads[i] = SizedArray(p.size_of(i));
  const size_t K = size_t(p.K), V = size_t(p.V);
  const Sized scale = sized(p.scale);
  const auto upstream = [&](size_t i, int64_t a, int64_t b, int64_t c = 0, int64_t d = 0) {
    return p.grad[i] ? sized(p.grad[i](a, b, c, d).real()) : Sized();
  };
  for (int64_t s = 0; s < p.S; ++s) {
    for (int64_t head = 0; head < p.H; ++head) {
      const int64_t group = head / (p.H / p.G);
      const auto tokens = p.tokens(s);
      const size_t T = tokens.size();
      const auto number = [&](size_t i, size_t step, int64_t of, size_t channel) {
        return sized(p.in[i](tokens[step].first, tokens[step].second, of, int64_t(channel)).real());
      };
      // States before step t at t, and after the last.
      std::vector<std::vector<Sized>> C(T + 1, std::vector<Sized>(K * V)),
          n(T + 1, std::vector<Sized>(K)), h(T, std::vector<Sized>(V));
      std::vector<double> m(T + 1, p.stabilizes() ? p.initial_m(s, head) : 0);
      double m_size = fabs(m[0]), decays = 0;
      std::vector<Sized> f(T), i(T), gain(T), r(T), d(T, sized(1)), eps(T); // i = input_scale gain
      for (size_t a = 0; a < K; ++a) {
        for (size_t b = 0; b < V && p.in[In::C]; ++b)
          C[0][a * V + b] = sized(p.in[In::C](s, head, int64_t(a), int64_t(b)).real());
        if (p.in[In::n]) n[0][a] = sized(p.in[In::n](s, head, int64_t(a)).real());
      }
      for (size_t t = 0; t < T; ++t) {
        const auto [row, token] = tokens[t];
        const double decay = p.gate(In::log_decay, row, token, head),
                     input = p.gate(In::log_input, row, token, head);
        decays += fabs(decay);
        if (p.stabilizes()) {
          m[t + 1] = std::max(decay + m[t], input);
          m_size = input > decay + m[t] ? fabs(input) : m_size + fabs(decay);
        }
        f[t] = exp_of(decay, m[t], m[t + 1], sums * fabs(decay));
        gain[t] = exp_of(input, 0, m[t + 1], sums * decays);
        i[t] = sized(p.gate(In::input_scale, row, token, head)) * gain[t];
        for (size_t a = 0; a < K; ++a) {
          const Sized x = scale * number(In::q, t, group, a), y = i[t] * number(In::k, t, group, a);
          n[t + 1][a] = f[t] * n[t][a] + y;
          r[t] += n[t + 1][a] * x;
          for (size_t b = 0; b < V; ++b) {
            C[t + 1][a * V + b] = f[t] * C[t][a * V + b] + y * number(In::v, t, head, b);
            h[t][b] += C[t + 1][a * V + b] * x;
          }
        }
        eps[t] = {
            p.eps, p.eps * (1 + m_size + sums * decays)}; // beside numbers that are divided by e^m
        const Sized least = exp_of(0, 0, m[t + 1], sums * decays),
                    size = r[t].value < 0 ? -r[t] : r[t];
        if (p.normalizer == Normalizer::sum)
          d[t] = r[t] + eps[t];
        else if (p.normalizes())
          d[t] = (size.value > least.value ? size : least) + eps[t];
        for (size_t b = 0; b < V; ++b) {
          h[t][b] = h[t][b] / d[t];
          answer.out[In::h](row, token, head, int64_t(b)) = h[t][b];
        }
      }
      const Sized at_m{1, sums * m_size}; // this loop's own m is such a sum
      for (size_t a = 0; a < K; ++a) {
        for (size_t b = 0; b < V; ++b)
          answer.out[In::final_C](s, head, int64_t(a), int64_t(b)) = at_m * C[T][a * V + b];
        if (p.normalizes()) answer.out[In::final_n](s, head, int64_t(a)) = at_m * n[T][a];
      }
      if (p.stabilizes()) answer.out[In::final_m](s, head) = {m[T], m_size + sums * decays};
      if (!backward) continue;

      // Gradients of the states as they are kept. What m divides is itself multiplied by e^m again, so that m has a gradient
      // only through eps, and through the states at both ends.
      std::vector<Sized> gC(K * V), gn(K);
      Sized gm;
      const auto state_product = [&](size_t t) {
        Sized sum;
        for (size_t a = 0; a < K; ++a) {
          if (p.normalizes()) sum += n[t][a] * gn[a];
          for (size_t b = 0; b < V; ++b) sum += C[t][a * V + b] * gC[a * V + b];
        }
        return sum;
      };
      const Sized one{1, m_size + sums * decays}; // e^m by e^m, as the state is kept
      for (size_t a = 0; a < K; ++a) {
        if (p.normalizes()) gn[a] = one * upstream(In::final_n, s, head, int64_t(a));
        for (size_t b = 0; b < V; ++b)
          gC[a * V + b] = one * upstream(In::final_C, s, head, int64_t(a), int64_t(b));
      }
      if (p.stabilizes()) {
        gm = upstream(In::final_m, s, head);
        if (T > 0) gm += -state_product(T);
      }
      for (size_t t = T; t-- > 0;) {
        const auto [row, token] = tokens[t];
        const auto to = [&](size_t input, int64_t of, size_t channel) -> Sized& {
          return answer.grads[input](row, token, of, int64_t(channel));
        };
        // h = C^T x / d, x = scale q
        std::vector<Sized> u(V);
        Sized of_d, of_r;
        for (size_t b = 0; b < V; ++b) {
          const Sized g = upstream(In::h, row, token, head, int64_t(b));
          u[b] = g / d[t];
          of_d += -(u[b] * h[t][b]);
        }
        if (p.exact && p.normalizes()) {
          if (p.normalizer == Normalizer::sum)
            of_r = of_d;
          else if (fabs(r[t].value) > ::exp(-m[t + 1]))
            of_r = r[t].value < 0 ? -of_d : of_d;
          if (p.stabilizes()) gm += of_d * eps[t];
        }
        for (size_t a = 0; a < K; ++a) {
          const Sized x = scale * number(In::q, t, group, a);
          Sized of_x;
          for (size_t b = 0; b < V; ++b) {
            of_x += C[t + 1][a * V + b] * u[b];
            gC[a * V + b] += x * u[b];
          }
          if (p.normalizes()) of_x += n[t + 1][a] * of_r, gn[a] += x * of_r;
          to(In::q, group, a) += scale * of_x;
        }
        // C = f C + i k v^T
        Sized of_i;
        for (size_t a = 0; a < K; ++a) {
          const Sized k = number(In::k, t, group, a);
          Sized of_k = gn[a];
          for (size_t b = 0; b < V; ++b) {
            const Sized g = gC[a * V + b];
            of_k += g * number(In::v, t, head, b);
            to(In::v, head, b) += i[t] * k * g;
          }
          of_i += k * of_k;
          to(In::k, group, a) += i[t] * of_k;
        }
        Sized of_decay = f[t] * state_product(t), of_input = i[t] * of_i;
        to(In::input_scale, head, 0) = gain[t] * of_i;
        if (p.stabilizes()) { // on equal terms m comes from the decay
          const bool decayed = p.gate(In::log_decay, row, token, head) + m[t] >=
                               p.gate(In::log_input, row, token, head);
          (decayed ? of_decay : of_input) += gm;
          if (!decayed) gm = {};
        }
        to(In::log_decay, head, 0) = of_decay, to(In::log_input, head, 0) = of_input;
        for (Sized& g : gC) g = f[t] * g;
        for (Sized& g : gn) g = f[t] * g;
      }
      if (p.stabilizes() && T > 0) gm += state_product(0);
      for (size_t a = 0; a < K; ++a) {
        if (p.normalizes()) answer.grads[In::n](s, head, int64_t(a)) = gn[a];
        for (size_t b = 0; b < V; ++b)
          answer.grads[In::C](s, head, int64_t(a), int64_t(b)) = gC[a * V + b];
      }
      if (p.stabilizes()) answer.grads[In::m](s, head) = gm;
    }
  }
  return answer;
}

// What gradients are of.
inline double loss(const MatrixCase& p) {
  const MatrixAnswer answer = formula(p, false);
  double sum = 0;
  for (size_t i = 0; i < MatrixCase::kOutputs; ++i)
    for (size_t j = 0; j < p.grad[i].at.size(); ++j)
      sum += p.grad[i].at[j].real() * answer.out[i].at[j].value;
  return sum;
}

// ---- what a driver makes of it ----

struct MatrixResult {
  std::array<Dense, MatrixCase::kOutputs> out;
  std::array<Dense, MatrixCase::kInputs> grads; // without a size: not asked for
};
inline bool same(const MatrixResult& x, const MatrixResult& y) { // bit by bit
  bool all = true;
  for (size_t i = 0; i < x.out.size(); ++i) all = all && same(x.out[i], y.out[i]);
  for (size_t i = 0; i < x.grads.size(); ++i) all = all && same(x.grads[i], y.grads[i]);
  return all;
}

template <class Data>
OverHeads<Data> over_heads(Memory& m) {
  return {m.data(), m.step(0), m.step(1), m.step(2), m.step(3)};
}
template <class Data>
PerHead<Data> per_head(Memory& m) {
  return {m.data(), m.step(0), m.step(1), m.step(2)};
}
template <class Data>
MatrixState<Data> matrix_state(Memory& C, Memory& n, Memory& m) {
  return {C.data(),  n.data(),  m.data(),  C.step(0), C.step(1), C.step(2),
          C.step(3), n.step(0), n.step(1), n.step(2), m.step(0), m.step(1)};
}

// The inputs in memory.
struct MatrixInputs {
  MatrixCase p;
  std::vector<Memory> in;

  MatrixInputs(Random& random, const MatrixCase& problem) : p(problem) {
    for (size_t i = 0; i < MatrixCase::kInputs; ++i) {
      in.push_back(memory(random, p.dtype_of(i), p.in[i].size, p.order, false));
      for (size_t d = 0; d < in[i].stride.size(); ++d)
        if (p.repeated[i] >> d & 1) in[i].stride[d] = 0;
      in[i].write(p.in[i]);
    }
  }
  void describe(MatrixMemoryProblem& to) {
    using In = MatrixCase;
    to.num_sequences = p.S, to.num_steps = p.T, to.num_heads = p.H, to.num_groups = p.G;
    to.key_size = p.K, to.value_size = p.V;
    to.cu_seqlens = p.packed() ? p.cu_seqlens.data() : nullptr;
    to.reverse = p.reverse, to.normalizer = p.normalizer, to.exact = p.exact;
    to.wide_keys = p.wide_keys, to.wide_h = p.wide_h;
    to.scale = p.scale, to.eps = p.eps;
    to.q = over_heads<const void*>(in[In::q]), to.k = over_heads<const void*>(in[In::k]);
    to.v = over_heads<const void*>(in[In::v]);
    to.log_decay = per_head<const void*>(in[In::log_decay]);
    to.log_input = per_head<const void*>(in[In::log_input]);
    to.input_scale = per_head<const void*>(in[In::input_scale]);
    to.initial_state = matrix_state<const void*>(in[In::C], in[In::n], in[In::m]);
  }
};

struct Wanted {
  bool backward = true;
  bool few = false;      // only what is always wanted: h, and the gradients of q, k and v
  bool in_place = false; // final states take the place of the initial ones, where those are there
};

// forward(dtype, MatrixMemoryForward) and backward(dtype, MatrixMemoryBackward) run a driver. Of outputs over heads channels
// lie side by side; all else may lie in any way.
template <class Forward, class Backward>
MatrixResult run(
    const MatrixCase& problem, Forward run_forward, Backward run_backward, Wanted wanted = {}) {
  using In = MatrixCase;
  Random random;
  MatrixInputs inputs(random, problem);
  MatrixCase& p = inputs.p;
  MatrixResult result;
  std::vector<Memory> out;
  for (size_t i = 0; i < In::kOutputs; ++i) {
    const std::vector<int64_t> size =
        wanted.few && i != In::h ? std::vector<int64_t>{} : p.size_of_output(i);
    out.push_back(memory(random, p.dtype_of_output(i), size, p.order, true, i == In::h));
  }
  MatrixMemoryForward f;
  inputs.describe(f);
  f.h = over_heads<void*>(out[In::h]);
  Memory* final_states[3];
  for (size_t i = 0; i < 3; ++i) {
    const bool in_place = wanted.in_place && p.in[In::C + i];
    final_states[i] = in_place ? &inputs.in[In::C + i] : &out[In::final_C + i];
  }
  f.final_state = matrix_state<void*>(*final_states[0], *final_states[1], *final_states[2]);
  Array checkpoints(p.wide(), matrix_memory_checkpoints(f), true);
  if (wanted.backward) f.checkpoints = checkpoints.data();
  run_forward(p.dtype, f);
  EXPECT_TRUE(checkpoints.guards_intact()) << "checkpoints: writes out of bounds";
  for (size_t i = 0; i < In::kOutputs; ++i) {
    EXPECT_TRUE(out[i].size.empty() || out[i].array.guards_intact())
        << In::output_name(i) << ": writes out of bounds";
    result.out[i] = (i == In::h ? out[i] : *final_states[i - In::final_C]).read();
  }
  if (!wanted.backward) return result;

  std::vector<Memory> grad_out, grads;
  for (size_t i = 0; i < In::kOutputs; ++i) {
    grad_out.push_back(memory(random, p.dtype_of_output(i), p.grad[i].size, p.order, false));
    grad_out[i].write(p.grad[i]);
  }
  for (size_t i = 0; i < In::kInputs; ++i) {
    // There is a gradient of the zeros that stand for a state, but none of a gate that is not there.
    const bool is_wanted = i <= In::v || (!wanted.few && (i >= In::C || p.in[i]));
    grads.push_back(memory(
        random, p.dtype_of(i), is_wanted ? p.size_of(i) : std::vector<int64_t>{}, p.order, true,
        i <= In::v));
  }
  MatrixMemoryBackward b;
  inputs.describe(b);
  b.checkpoints = checkpoints.data();
  b.grad_h = over_heads<const void*>(grad_out[In::h]);
  b.grad_final_state = matrix_state<const void*>(
      grad_out[In::final_C], grad_out[In::final_n], grad_out[In::final_m]);
  b.grad_q = over_heads<void*>(grads[In::q]), b.grad_k = over_heads<void*>(grads[In::k]);
  b.grad_v = over_heads<void*>(grads[In::v]);
  b.grad_log_decay = per_head<void*>(grads[In::log_decay]);
  b.grad_log_input = per_head<void*>(grads[In::log_input]);
  b.grad_input_scale = per_head<void*>(grads[In::input_scale]);
  b.grad_initial_state = matrix_state<void*>(grads[In::C], grads[In::n], grads[In::m]);
  run_backward(p.dtype, b);
  for (size_t i = 0; i < In::kInputs; ++i) {
    EXPECT_TRUE(grads[i].size.empty() || grads[i].array.guards_intact())
        << "gradient of " << In::name(i) << ": writes out of bounds";
    result.grads[i] = grads[i].read();
  }
  return result;
}

// How exact a driver is.
struct Accuracy {
  double arithmetic; // relative error of a number that goes into a product
  // Of a gate's gradient, besides: relative to the largest bound among the steps of its sequence and head. For kernels that
  // make them from differences of sums over steps.
  double gates = 0;
  double tiny = 1e-30; // what underflows
};
inline Accuracy accuracy_of(
    const MatrixCase& p) { // sums of equal numbers are rounded to the same side
  const double epsilon = info_of(p.dtype).state_epsilon, units = 64 + double(p.T) / 8;
  return {units * epsilon, 0, epsilon < 1e-10 ? 1e-290 : 1e-30};
}

inline void expect_close(
    const Dense& got, const SizedArray& want, DType stored, double arithmetic, double tiny,
    const std::string& what) {
  ASSERT_EQ(got.size, want.size) << what;
  const double rounding = info_of(stored).epsilon;
  if (stored == DType::f16) tiny = std::max(tiny, 3e-8);
  for (size_t i = 0; i < want.at.size(); ++i) {
    const double error = arithmetic * want.at[i].size + tiny;
    ASSERT_LE(
        fabs(got.at[i].real() - want.at[i].value),
        error + rounding * (fabs(want.at[i].value) + error))
        << what << " at " << i << ": " << got.at[i].real() << " instead of " << want.at[i].value
        << ", where one unit of rounding is worth " << want.at[i].size << " units";
  }
}

inline void check(
    const MatrixCase& p, const MatrixResult& got, const MatrixAnswer& want,
    const Accuracy& accuracy) {
  using In = MatrixCase;
  for (size_t i = 0; i < In::kOutputs; ++i) {
    if (got.out[i].size.empty()) continue;
    Dense x = got.out[i];
    // C and n divided by e^m, where m is off by its rounding.
    if (p.stabilizes() && (i == In::final_C || i == In::final_n) && got.out[In::final_m]) {
      const size_t each = size_t(p.K * (i == In::final_C ? p.V : 1));
      for (size_t j = 0; j < x.at.size(); ++j)
        x.at[j] *= ::exp(
            got.out[In::final_m].at[j / each].real() - want.out[In::final_m].at[j / each].value);
    }
    ASSERT_NO_FATAL_FAILURE(expect_close(
        x, want.out[i], p.dtype_of_output(i), accuracy.arithmetic, accuracy.tiny,
        In::output_name(i)));
  }
  for (size_t i = 0; i < In::kInputs; ++i) {
    if (got.grads[i].size.empty()) continue;
    SizedArray bounds = want.grads[i];
    if (accuracy.gates > 0 && i >= In::log_decay && i <= In::input_scale)
      for (int64_t s = 0; s < p.S; ++s)
        for (int64_t head = 0; head < p.H; ++head) {
          double most = 0;
          for (const auto& [row, t] : p.tokens(s)) most = std::max(most, bounds(row, t, head).size);
          for (const auto& [row, t] : p.tokens(s))
            bounds(row, t, head).size += most * accuracy.gates / accuracy.arithmetic;
        }
    ASSERT_NO_FATAL_FAILURE(expect_close(
        got.grads[i], bounds, p.dtype_of(i), accuracy.arithmetic, accuracy.tiny,
        std::string("gradient of ") + In::name(i)));
  }
}

// A pool of states: rows in any order, some skipped, written in place.
template <class Forward>
void check_matrix_pool(
    Random& random, DType dtype, MatrixShape shape, Normalizer normalizer, Forward forward) {
  using In = MatrixCase;
  const std::vector<int64_t> rows = {5, -1, 0, 6, -3};
  const int64_t slots = 7;
  shape.S = int64_t(rows.size());
  MatrixCase p = draw_matrix_case(random, dtype, shape, normalizer);
  while (p.packed()) p = draw_matrix_case(random, dtype, shape, normalizer);
  for (size_t i = In::C; i < In::kInputs; ++i)
    if (!p.size_of(i).empty())
      p.in[i] = draw(random, p.wide(), p.size_of(i), [&] { return random.normal(); });
  SCOPED_TRACE(p.text());
  const MatrixResult want =
      run(p, forward, [](DType, const MatrixMemoryBackward&) {}, {.backward = false});
  MatrixInputs in(random, p);
  Memory h = memory(random, p.dtype_of_output(In::h), p.size_of_output(In::h), kNatural, true);
  std::vector<Memory> pools;
  std::vector<Dense> after;
  for (size_t i = In::C; i < In::kInputs; ++i) {
    std::vector<int64_t> size = p.size_of(i);
    if (!size.empty()) size[0] = slots;
    pools.push_back(memory(random, p.wide(), size, p.order, true));
    Dense pool = draw(random, p.wide(), size, [&] { return random.normal(); });
    if (size.empty()) pool = {};
    after.push_back(pool);
    const size_t each = pool.at.size() / slots;
    for (size_t s = 0; s < rows.size(); ++s)
      for (size_t j = 0; j < each && rows[s] >= 0; ++j) {
        pool.at[size_t(rows[s]) * each + j] = p.in[i].at[s * each + j];
        after.back().at[size_t(rows[s]) * each + j] =
            want.out[In::final_C + i - In::C].at[s * each + j];
      }
    pools.back().write(pool);
  }
  MatrixMemoryForward f;
  in.describe(f);
  f.state_rows = rows.data();
  f.initial_state = matrix_state<const void*>(pools[0], pools[1], pools[2]);
  f.final_state = matrix_state<void*>(pools[0], pools[1], pools[2]);
  f.h = over_heads<void*>(h);
  forward(dtype, f);
  Dense want_h = want.out[In::h];
  const size_t each = want_h.at.size() / rows.size();
  for (size_t s = 0; s < rows.size(); ++s)
    for (size_t j = 0; j < each && rows[s] < 0; ++j) want_h.at[s * each + j] = 0;
  ASSERT_TRUE(same(h.read(), want_h));
  ASSERT_TRUE(h.array.guards_intact());
  for (size_t i = 0; i < pools.size(); ++i) {
    ASSERT_TRUE(same(pools[i].read(), after[i])) << In::name(In::C + i);
    ASSERT_TRUE(pools[i].size.empty() || pools[i].array.guards_intact()) << In::name(In::C + i);
  }
}

} // namespace torch_ext::test
