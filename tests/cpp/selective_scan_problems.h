// Random problems for the drivers of the selective scan, and their answers: the formulas run in a plain loop, over random
// shapes, layouts and options; gradients against central differences of it.
#pragma once
#include <math.h>

#include <algorithm>
#include <complex>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "core/selective_scan_problem.h"
#include "diagonal_problems.h"

namespace torch_ext::test {

// ---- arrays of up to four dimensions: as numbers, and as memory in some layout ----

struct Dense {
  std::vector<int64_t> size; // empty: there is no such array
  std::vector<Value> at;
  explicit operator bool() const { return !size.empty(); }
  int64_t index(int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) const {
    const int64_t place[] = {i, j, k, l};
    int64_t n = 0;
    for (size_t d = 0; d < size.size(); ++d) n = n * size[d] + place[d];
    return n;
  }
  Value& operator()(int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) {
    return at[size_t(index(i, j, k, l))];
  }
  Value operator()(int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) const {
    return at[size_t(index(i, j, k, l))];
  }
};
inline Dense zeros(std::vector<int64_t> size) {
  int64_t n = 1;
  for (const int64_t each : size) n *= each;
  return {size, std::vector<Value>(size_t(n))};
}

struct Memory {
  DType dtype = DType::f32;
  std::vector<int64_t> size, stride;
  int64_t offset = 0;
  Array array;

  void* data() {
    return size.empty() ? nullptr : static_cast<char*>(array.data()) + offset * info_of(dtype).size;
  }
  int64_t place(int64_t n) const { // of the n-th in Dense's order
    int64_t at = offset;
    for (size_t d = size.size(); d-- > 0; n /= size[d]) at += n % size[d] * stride[d];
    return at;
  }
  int64_t step(size_t d) const { return d < stride.size() ? stride[d] : 0; }
  void write(const Dense& x) {
    for (size_t i = 0; i < x.at.size(); ++i) array.set(place(int64_t(i)), x.at[i]);
  }
  Dense read() const {
    if (size.empty()) return {};
    Dense x = zeros(size);
    for (size_t i = 0; i < x.at.size(); ++i) x.at[i] = array.get(place(int64_t(i)));
    return x;
  }
};

enum Order {
  kNatural,
  kTimeInside,
  kShuffled
}; // kTimeInside: the last dimension but one has stride 1
// `channels_inside`: the last dimension has stride 1 whatever the order is.
inline Memory memory(
    Random& random, DType dtype, const std::vector<int64_t>& size, Order order, bool output,
    bool channels_inside = false) {
  Memory m;
  m.dtype = dtype;
  m.size = size;
  if (size.empty()) return m;
  std::vector<size_t> inwards;
  for (size_t d = 0; d < size.size(); ++d) inwards.push_back(d);
  int64_t pad = 0;
  if (order == kTimeInside && size.size() > 2 && !channels_inside)
    std::swap(inwards[inwards.size() - 1], inwards[inwards.size() - 2]);
  if (order == kShuffled) {
    for (size_t d = size.size() - channels_inside; d > 1; --d)
      std::swap(inwards[d - 1], inwards[size_t(random.integer(0, int64_t(d) - 1))]);
    pad = random.integer(0, 3);
    m.offset = random.integer(0, 2);
  }
  m.stride.resize(size.size());
  int64_t count = order == kShuffled && !channels_inside ? random.integer(1, 2) : 1;
  for (size_t d = size.size(); d-- > 0;) {
    m.stride[inwards[d]] = count;
    count = count * size[inwards[d]] + (d > 0 ? pad : 0);
  }
  m.array = Array(dtype, count + m.offset, output);
  return m;
}

// ---- one problem ----

struct Types {
  DType call, time, per_token, parameter, state;
};
inline Types types_of(DType call) {
  switch (call) {
    case DType::c64:
      return {call, DType::f32, DType::c64, DType::f32, DType::c64};
    case DType::c128:
      return {call, DType::f64, DType::c128, DType::f64, DType::c128};
    default:
      return {call, call, call, info_of(call).state, info_of(call).state};
  }
}

struct Problem3 {
  DType dtype = DType::f32;
  int64_t S = 1, T = 1, D = 1, N = 1, G = 1;
  bool reverse = false, softplus = false;
  Order order = kNatural;
  std::vector<int64_t> cu_seqlens; // empty: not packed
  Dense u, delta, z, A, B, C, skip, bias, initial, grad_out, grad_final;

  bool packed() const { return !cu_seqlens.empty(); }
  bool complex() const { return info_of(dtype).complex; }
  bool constant(const Dense& x) const { return x.size.size() == 2; }
  std::vector<Dense*> inputs() { return {&u, &delta, &z, &A, &B, &C, &skip, &bias, &initial}; }
  static const char* name(size_t i) {
    return std::vector<const char*>{"u",          "delta",        "z", "A", "B", "C", "D",
                                    "delta_bias", "initial_state"}[i];
  }
  std::vector<std::pair<int64_t, int64_t>> tokens(int64_t s) const {
    std::vector<std::pair<int64_t, int64_t>> all;
    const int64_t begin = packed() ? cu_seqlens[size_t(s)] : 0,
                  end = packed() ? cu_seqlens[size_t(s) + 1] : T;
    for (int64_t t = begin; t < end; ++t) all.emplace_back(packed() ? 0 : s, t);
    if (reverse) std::reverse(all.begin(), all.end());
    return all;
  }
  std::string text() const {
    const auto yes = [](const char* name, bool is) {
      return is ? std::string(" ") + name : std::string();
    };
    return std::string(info_of(dtype).name) + " S=" + std::to_string(S) +
           " T=" + std::to_string(T) + " D=" + std::to_string(D) + " N=" + std::to_string(N) +
           " G=" + std::to_string(G) + " order=" + std::to_string(order) + yes("packed", packed()) +
           yes("reverse", reverse) + yes("softplus", softplus) + yes("B constant", constant(B)) +
           yes("C constant", constant(C)) + yes("z", !!z) + yes("D", !!skip) +
           yes("delta_bias", !!bias) + yes("initial", !!initial) + yes("grad_out", !!grad_out) +
           yes("grad_final", !!grad_final);
  }
};

// Numbers that the dtype can hold.
inline Dense draw(
    Random& random, DType dtype, std::vector<int64_t> size, const std::function<double()>& number) {
  Dense x = zeros(size);
  Array one(dtype, 1, false);
  for (Value& each : x.at) {
    one.set(0, info_of(dtype).complex ? Value(number(), random.normal()) : Value(number()));
    each = one.get(0);
  }
  return x;
}

inline Problem3 draw_problem(
    Random& random, DType dtype, int64_t S, int64_t T, int64_t D, int64_t N, int64_t G) {
  Problem3 p;
  const Types types = types_of(dtype);
  p.dtype = dtype, p.S = S, p.T = T, p.D = D, p.N = N, p.G = G;
  const auto coin = [&] { return random.integer(0, 1) == 1; };
  p.reverse = coin(), p.softplus = coin();
  p.order = Order(random.integer(0, 2));
  if (S > 0 && random.integer(0, 3) == 0) {
    p.cu_seqlens = {0};
    for (int64_t s = 1; s < S; ++s) p.cu_seqlens.push_back(random.integer(0, T));
    std::sort(p.cu_seqlens.begin(), p.cu_seqlens.end());
    p.cu_seqlens.push_back(T);
  }
  const int64_t rows = p.packed() ? 1 : S;
  const auto normal = [&] { return random.normal(); };
  const auto over_time = [&] { return draw(random, types.time, {rows, T, D}, normal); };
  p.u = over_time();
  p.delta = draw(random, types.time, {rows, T, D}, [&] {
    if (!p.softplus) return random.uniform(0, 0.6);
    return random.integer(0, 20) ? random.normal(1) : random.integer(0, 1) ? 25. : -30.;
  });
  if (coin()) p.z = over_time();
  p.A = draw(random, types.state, {D, N}, [&] { return random.uniform(-3, 0); });
  const auto coefficient = [&] {
    return coin() ? draw(random, types.per_token, {rows, T, G, N}, normal)
                  : draw(random, types.state, {D, N}, normal);
  };
  p.B = coefficient(), p.C = coefficient();
  if (coin()) p.skip = draw(random, types.parameter, {D}, normal);
  if (coin()) p.bias = draw(random, types.parameter, {D}, [&] { return random.uniform(0, 0.3); });
  if (coin()) p.initial = draw(random, types.state, {S, D, N}, normal);
  if (random.integer(0, 3)) p.grad_out = over_time();
  if (coin()) p.grad_final = draw(random, types.state, {S, D, N}, normal);
  return p;
}

// The same options without packing: arrays over time drawn anew.
inline Problem3 reshaped(Random& random, Problem3 p) {
  for (Dense* x : {&p.u, &p.delta, &p.z, &p.B, &p.C, &p.grad_out}) {
    if (x->size.size() < 3) continue;
    std::vector<int64_t> size = x->size;
    size[0] = p.S;
    const DType dtype = size.size() == 4 ? types_of(p.dtype).per_token : types_of(p.dtype).time;
    *x = draw(random, dtype, size, [&] { return random.uniform(0, 1); });
  }
  return p;
}
inline Dense tokens_of(const Dense& x, int64_t begin, int64_t end) {
  std::vector<int64_t> size = x.size;
  int64_t inner = 1;
  for (size_t d = 2; d < size.size(); ++d) inner *= size[d];
  size[1] = end - begin;
  Dense piece = zeros(size);
  for (int64_t row = 0; row < size[0]; ++row)
    for (int64_t i = 0; i < size[1] * inner; ++i)
      piece.at[size_t(row * size[1] * inner + i)] =
          x.at[size_t((row * x.size[1] + begin) * inner + i)];
  return piece;
}

// ---- the formulas in a plain loop ----

struct Answer {
  Dense out, final_state;
};
inline Answer formula(const Problem3& p) {
  Answer r{zeros(p.u.size), zeros({p.S, p.D, p.N})};
  for (int64_t s = 0; s < p.S; ++s) {
    for (int64_t d = 0; d < p.D; ++d) {
      std::vector<Value> h(size_t(p.N), Value(0));
      for (int64_t n = 0; n < p.N && p.initial; ++n) h[size_t(n)] = p.initial(s, d, n);
      const int64_t group = d / (p.D / p.G);
      for (const auto& [row, t] : p.tokens(s)) {
        double step = p.delta(row, t, d).real() + (p.bias ? p.bias(d).real() : 0);
        if (p.softplus && step <= 20) step = log1p(::exp(step));
        const double u = p.u(row, t, d).real();
        Value y = 0;
        for (int64_t n = 0; n < p.N; ++n) {
          const Value B = p.constant(p.B) ? p.B(d, n) : p.B(row, t, group, n);
          const Value C = p.constant(p.C) ? p.C(d, n) : p.C(row, t, group, n);
          Value& state = h[size_t(n)];
          state = std::exp(step * p.A(d, n)) * state + step * u * B;
          y += C * state;
        }
        double out = (p.complex() ? 2 : 1) * y.real() + (p.skip ? p.skip(d).real() * u : 0);
        if (p.z) out *= p.z(row, t, d).real() / (1 + ::exp(-p.z(row, t, d).real()));
        r.out(row, t, d) = out;
      }
      for (int64_t n = 0; n < p.N; ++n) r.final_state(s, d, n) = h[size_t(n)];
    }
  }
  return r;
}
// What gradients are of.
inline double loss(const Problem3& p) {
  const Answer r = formula(p);
  double sum = 0;
  const auto add = [&](const Dense& x, const Dense& weight) {
    for (size_t i = 0; weight && i < x.at.size(); ++i) sum += (conj(weight.at[i]) * x.at[i]).real();
  };
  add(r.out, p.grad_out);
  add(r.final_state, p.grad_final);
  return sum;
}

// ---- what the driver makes of it ----

struct Result3 {
  Dense out, final_state;
  std::vector<Dense> grads; // in the order of Problem3::inputs
};
inline bool same(const Dense& x, const Dense& y) { // bit by bit: NaN is equal to itself
  return x.size == y.size &&
         (x.at.empty() || !memcmp(x.at.data(), y.at.data(), x.at.size() * sizeof(Value)));
}
inline bool same(const Result3& x, const Result3& y) {
  bool all =
      same(x.out, y.out) && same(x.final_state, y.final_state) && x.grads.size() == y.grads.size();
  for (size_t i = 0; all && i < x.grads.size(); ++i) all = same(x.grads[i], y.grads[i]);
  return all;
}

template <class Data>
OverTime<Data> over_time(Memory& m) {
  return {m.data(), m.step(0), m.step(1), m.step(2)};
}
template <class Data>
OverStates<Data> over_states(Memory& m) { // (row, channel, state), or (channel, state)
  const size_t skip = m.size.size() == 3;
  return {m.data(), skip ? m.step(0) : 0, m.step(skip), m.step(skip + 1)};
}
template <class Data>
Coefficient<Data> coefficient(Memory& m) {
  if (m.size.size() == 2) return {m.data(), true, 0, 0, 0, m.step(0), m.step(1)};
  return {m.data(), false, m.step(0), m.step(1), m.step(2), 0, m.step(3)};
}

// The inputs in memory.
struct Inputs {
  Problem3 p;
  std::vector<DType> dtypes;
  std::vector<Memory> in;

  Inputs(Random& random, const Problem3& problem) : p(problem) {
    const Types types = types_of(p.dtype);
    const DType of_B = p.constant(p.B) ? types.state : types.per_token;
    const DType of_C = p.constant(p.C) ? types.state : types.per_token;
    dtypes = {types.time, types.time,      types.time,      types.state, of_B,
              of_C,       types.parameter, types.parameter, types.state};
    for (size_t i = 0; i < dtypes.size(); ++i) {
      in.push_back(memory(random, dtypes[i], p.inputs()[i]->size, p.order, false));
      in.back().write(*p.inputs()[i]);
    }
  }
  void describe(SelectiveScanProblem& q) {
    q.num_sequences = p.S, q.num_steps = p.T, q.width = p.D, q.num_states = p.N, q.num_groups = p.G;
    q.cu_seqlens = p.packed() ? p.cu_seqlens.data() : nullptr;
    q.reverse = p.reverse, q.delta_softplus = p.softplus;
    q.u = over_time<const void*>(in[0]), q.delta = over_time<const void*>(in[1]);
    q.z = over_time<const void*>(in[2]);
    q.A = over_states<const void*>(in[3]);
    q.B = coefficient<const void*>(in[4]), q.C = coefficient<const void*>(in[5]);
    q.D = {in[6].data(), in[6].step(0)}, q.delta_bias = {in[7].data(), in[7].step(0)};
    q.initial_state = over_states<const void*>(in[8]);
  }
};

// `few`: of the gradients only those that are always wanted.
// forward(dtype, SelectiveScanForward) and backward(dtype, SelectiveScanBackward) run a driver.
template <class Forward, class Backward>
Result3 run(
    const Problem3& problem, Forward run_forward, Backward run_backward, bool backward = true,
    bool few = false) {
  Random random;
  Inputs inputs(random, problem);
  Problem3& p = inputs.p;
  const std::vector<DType>& dtypes = inputs.dtypes;
  const Types types = types_of(p.dtype);
  const auto describe = [&](SelectiveScanProblem& q) { inputs.describe(q); };
  Memory out = memory(random, types.time, p.u.size, p.order, true);
  Memory final_state = memory(random, types.state, {p.S, p.D, p.N}, p.order, true);
  SelectiveScanForward f;
  describe(f);
  f.out = over_time<void*>(out);
  f.final_state = over_states<void*>(final_state);
  Array checkpoints(types.state, selective_scan_checkpoints(f, p.complex()), true);
  if (backward) f.checkpoints = checkpoints.data();
  run_forward(p.dtype, f);
  EXPECT_TRUE(
      out.array.guards_intact() && final_state.array.guards_intact() &&
      checkpoints.guards_intact());
  Result3 result{out.read(), final_state.read(), {}};
  if (!backward) return result;

  Memory grad_out = memory(random, types.time, p.grad_out.size, p.order, false);
  Memory grad_final = memory(random, types.state, p.grad_final.size, p.order, false);
  grad_out.write(p.grad_out), grad_final.write(p.grad_final);
  std::vector<Memory> grads;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    std::vector<int64_t> size = p.inputs()[i]->size;
    if (i == 8) size = {p.S, p.D, p.N}; // there is a gradient of the zeros that stand for it, too
    grads.push_back(memory(random, dtypes[i], size, p.order, true));
  }
  SelectiveScanBackward b;
  describe(b);
  b.checkpoints = checkpoints.data();
  b.grad_out = over_time<const void*>(grad_out);
  b.grad_final_state = over_states<const void*>(grad_final);
  b.grad_u = over_time<void*>(grads[0]), b.grad_delta = over_time<void*>(grads[1]);
  if (!few) {
    b.grad_z = over_time<void*>(grads[2]);
    b.grad_A = over_states<void*>(grads[3]);
    b.grad_B = coefficient<void*>(grads[4]), b.grad_C = coefficient<void*>(grads[5]);
    b.grad_D = {grads[6].data(), grads[6].step(0)},
    b.grad_delta_bias = {grads[7].data(), grads[7].step(0)};
    b.grad_initial_state = over_states<void*>(grads[8]);
  }
  run_backward(p.dtype, b);
  for (const Memory& each : grads) {
    EXPECT_TRUE(each.size.empty() || each.array.guards_intact()) << "writes out of bounds";
    result.grads.push_back(each.read());
  }
  return result;
}

// Besides what the dtype can hold: rounding errors of sums, relative to the largest number, or to `largest` if that is more.
inline void expect_close(
    const Dense& got, const Dense& want, DType dtype, double terms, const std::string& what,
    double largest = 1) {
  ASSERT_EQ(got.size, want.size) << what;
  for (const Value& each : want.at) largest = std::max(largest, abs(each));
  const DTypeInfo& info = info_of(dtype);
  for (size_t i = 0; i < want.at.size(); ++i)
    ASSERT_LE(
        abs(got.at[i] - want.at[i]),
        terms * info.state_epsilon * largest + info.epsilon * abs(want.at[i]))
        << what << " at " << i << ": " << got.at[i] << " instead of " << want.at[i];
}

// Some gradients of each input against central differences of the plain loop.
inline void check_differences(Problem3 p, const Result3& result) {
  Random random;
  if (p.S * p.T * p.D * p.N > 40000) return;
  if (!p.initial) p.initial = zeros({p.S, p.D, p.N});
  for (size_t i = 0; i < result.grads.size(); ++i) {
    Dense& x = *p.inputs()[i];
    ASSERT_EQ(result.grads[i].size, x.size) << Problem3::name(i);
    for (int sample = 0; sample < 3 && !x.at.empty(); ++sample) {
      const size_t at = size_t(random.integer(0, int64_t(x.at.size()) - 1));
      const bool complex = p.complex() && (i == 3 || i == 4 || i == 5 || i == 8);
      const Value before = x.at[at];
      const auto slope = [&](Value direction) {
        constexpr double kEpsilon = 1e-5;
        x.at[at] = before + kEpsilon * direction;
        const double high = loss(p);
        x.at[at] = before - kEpsilon * direction;
        const double low = loss(p);
        x.at[at] = before;
        return (high - low) / (2 * kEpsilon);
      };
      const Value want(slope(1), complex ? slope(Value(0, 1)) : 0);
      ASSERT_LE(abs(result.grads[i].at[at] - want), 2e-6 * (1 + abs(want) + 1e-2 * fabs(loss(p))))
          << "gradient of " << Problem3::name(i) << " at " << at << ": " << result.grads[i].at[at]
          << " instead of " << want;
    }
  }
}

// A driver's outputs and gradients, by run(problem), which also has to run in double precision.
template <class Run>
void check_problem(const Problem3& p, Run run, Result3& got) {
  const double terms = 300 + 5 * double(p.T + p.N);
  got = run(p);
  const Answer want = formula(p);
  ASSERT_NO_FATAL_FAILURE(expect_close(got.out, want.out, types_of(p.dtype).time, terms, "out"));
  ASSERT_NO_FATAL_FAILURE(expect_close(
      got.final_state, want.final_state, types_of(p.dtype).state, terms, "final state"));
  Problem3 precise = p;
  precise.dtype = p.complex() ? DType::c128 : DType::f64;
  const bool is_precise = p.dtype == precise.dtype;
  const Result3 gradients = is_precise ? got : run(precise);
  ASSERT_NO_FATAL_FAILURE(check_differences(precise, gradients));
  const Types types = types_of(p.dtype);
  // The bias's gradient is a sum of delta's over tokens, which may cancel: its errors are relative to what is added up.
  std::vector<double> added(size_t(p.D), 1.);
  for (size_t i = 0; i < gradients.grads[1].at.size(); ++i)
    added[i % added.size()] += abs(gradients.grads[1].at[i]);
  const double most_added = *std::max_element(added.begin(), added.end());
  for (size_t i = 0; i < got.grads.size() && !is_precise; ++i) {
    const bool parameter =
        i == 3 || i > 5 || ((i == 4 || i == 5) && precise.constant(*precise.inputs()[i]));
    ASSERT_NO_FATAL_FAILURE(expect_close(
        got.grads[i], gradients.grads[i],
        parameter ? types.state
        : i < 3   ? types.time
                  : types.per_token,
        terms, std::string("gradient of ") + Problem3::name(i), i == 7 ? most_added : 1));
  }
}

// A pool of states: rows in any order, some skipped, written in place. And one step: what generation does.
template <class Forward>
void check_pool(Random& random, DType dtype, int64_t T, int64_t D, int64_t N, Forward forward) {
  const std::vector<int64_t> rows = {5, -1, 0, 6, -3};
  const int64_t S = int64_t(rows.size()), slots = 7;
  Problem3 p = draw_problem(random, dtype, S, T, D, N, 1);
  p.cu_seqlens.clear();
  p = reshaped(random, p);
  SCOPED_TRACE(p.text());
  const Types types = types_of(dtype);
  p.initial = draw(random, types.state, {S, D, p.N}, [&] { return random.normal(); });
  const Result3 want = run(
      p, forward, [](DType, const SelectiveScanBackward&) {}, false);
  Inputs in(random, p);
  Memory out = memory(random, types.time, p.u.size, kNatural, true);
  Memory pool = memory(random, types.state, {slots, D, p.N}, kNatural, true);
  Dense before = draw(random, types.state, pool.size, [&] { return random.normal(); });
  for (int64_t s = 0; s < S; ++s)
    for (int64_t i = 0; i < D * p.N && rows[size_t(s)] >= 0; ++i)
      before.at[size_t(rows[size_t(s)] * D * p.N + i)] = p.initial.at[size_t(s * D * p.N + i)];
  pool.write(before);
  SelectiveScanForward f;
  in.describe(f);
  f.state_rows = rows.data();
  f.initial_state = over_states<const void*>(pool);
  f.final_state = over_states<void*>(pool);
  f.out = over_time<void*>(out);
  forward(dtype, f);
  Dense want_out = want.out, want_pool = before;
  for (int64_t s = 0; s < S; ++s) {
    const int64_t row = rows[size_t(s)];
    for (int64_t i = 0; i < T * D && row < 0; ++i) want_out.at[size_t(s * T * D + i)] = 0;
    for (int64_t i = 0; i < D * p.N && row >= 0; ++i)
      want_pool.at[size_t(row * D * p.N + i)] = want.final_state.at[size_t(s * D * p.N + i)];
  }
  ASSERT_TRUE(same(out.read(), want_out));
  ASSERT_TRUE(same(pool.read(), want_pool));
  ASSERT_TRUE(out.array.guards_intact() && pool.array.guards_intact());
}

} // namespace torch_ext::test
