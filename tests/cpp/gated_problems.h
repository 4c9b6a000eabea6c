// Random problems for the driver of gated recurrences, and their answers: the recurrence as a plain loop in double, whose
// gradients come from a tape of its operations. No line is shared with csrc.
#pragma once
#include <math.h>

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cells/all.h"
#include "core/gated_problem.h"
#include "diagonal_problems.h"

namespace torch_ext::test {

// ---- a tape: numbers with the slopes by the numbers they are made of ----

struct Tape {
  struct Edge {
    int to;
    double slope;
  };
  std::vector<double> value, limit; // limit: a gradient that reaches the number is clamped to it
  std::vector<size_t> end;          // of the number's edges
  std::vector<Edge> edges;

  std::vector<double> backward(std::vector<double> d) const {
    for (size_t i = value.size(); i-- > 0;) {
      d[i] = std::clamp(d[i], -limit[i], limit[i]);
      for (size_t e = i ? end[i - 1] : 0; e < end[i]; ++e)
        if (edges[e].slope != 0) d[size_t(edges[e].to)] += edges[e].slope * d[i];
    }
    return d;
  }
};
struct Number {
  Tape* tape = nullptr;
  int id = -1;
  double value() const { return tape->value[size_t(id)]; }
};
inline Number on_tape(Tape& t, double value, std::initializer_list<Tape::Edge> edges = {}) {
  t.edges.insert(t.edges.end(), edges);
  t.value.push_back(value);
  t.limit.push_back(HUGE_VAL);
  t.end.push_back(t.edges.size());
  return {&t, int(t.value.size()) - 1};
}
inline Number operator+(Number x, Number y) {
  return on_tape(*x.tape, x.value() + y.value(), {{x.id, 1}, {y.id, 1}});
}
inline Number operator-(Number x, Number y) {
  return on_tape(*x.tape, x.value() - y.value(), {{x.id, 1}, {y.id, -1}});
}
inline Number operator*(Number x, Number y) {
  return on_tape(*x.tape, x.value() * y.value(), {{x.id, y.value()}, {y.id, x.value()}});
}
inline Number operator/(Number x, Number y) {
  const double q = x.value() / y.value();
  return on_tape(*x.tape, q, {{x.id, 1 / y.value()}, {y.id, -q / y.value()}});
}
inline Number operator*(double c, Number x) { return on_tape(*x.tape, c * x.value(), {{x.id, c}}); }
inline Number operator+(Number x, double c) { return on_tape(*x.tape, x.value() + c, {{x.id, 1}}); }
inline Number of_tanh(Number x) {
  const double y = ::tanh(x.value());
  return on_tape(*x.tape, y, {{x.id, 1 - y * y}});
}
inline Number of_sigmoid(Number x) {
  return on_tape(*x.tape, plain_sigmoid(x.value()), {{x.id, plain_dsigmoid(x.value())}});
}
inline Number of_log_sigmoid(Number x) {
  const double v = x.value();
  return on_tape(
      *x.tape, v >= 0 ? -log1p(::exp(-v)) : v - log1p(::exp(v)), {{x.id, plain_sigmoid(-v)}});
}
inline Number of_exp(Number x) { // of what is 0 at most
  const double y = ::exp(std::min(x.value(), 0.));
  return on_tape(*x.tape, y, {{x.id, x.value() < 0 ? y : 0}});
}
inline Number of_relu(Number x) {
  return on_tape(*x.tape, std::max(x.value(), 0.), {{x.id, x.value() > 0 ? 1. : 0.}});
}
inline Number of_inverse_root(Number x) {
  const double y = 1 / sqrt(x.value());
  return on_tape(*x.tape, y, {{x.id, -y / (2 * x.value())}});
}
inline Number sum_of(
    Tape& t, const std::vector<Number>& x, const std::function<double(size_t)>& w) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    sum += w(i) * x[i].value();
    t.edges.push_back({x[i].id, w(i)});
  }
  return on_tape(t, sum);
}

// ---- arrays of any layout ----

struct Grid {
  std::shared_ptr<Array> array;
  std::vector<int64_t> size, stride;
  explicit operator bool() const { return array != nullptr; }
  int64_t count() const {
    return std::accumulate(size.begin(), size.end(), int64_t(1), std::multiplies<>());
  }
  int64_t at(std::initializer_list<int64_t> place) const {
    int64_t sum = 0;
    size_t d = 0;
    for (const int64_t each : place) sum += each * stride[d++];
    return sum;
  }
  double get(std::initializer_list<int64_t> place) const { return array->get(at(place)).real(); }
  // f(place in memory) in logical order.
  void each(const std::function<void(int64_t)>& f) const {
    for (int64_t n = 0; n < count(); ++n) {
      int64_t rest = n, sum = 0;
      for (size_t d = size.size(); d-- > 0; rest /= size[d]) sum += rest % size[d] * stride[d];
      f(sum);
    }
  }
  std::vector<double> values() const {
    std::vector<double> v;
    each([&](int64_t at) { v.push_back(array->get(at).real()); });
    return v;
  }
  void* data() const { return array ? array->data() : nullptr; }
};
// Contiguous, or with its dimensions in another order in memory.
inline Grid grid(DType dtype, std::vector<int64_t> size, bool guarded, Random* shuffled = nullptr) {
  Grid g;
  g.size = std::move(size);
  g.stride.resize(g.size.size());
  std::vector<size_t> order(g.size.size());
  std::iota(order.begin(), order.end(), size_t(0));
  if (shuffled && shuffled->integer(0, 2) == 0)
    for (size_t d = order.size(); d-- > 1;)
      std::swap(order[d], order[size_t(shuffled->integer(0, int64_t(d)))]);
  int64_t step = 1;
  for (size_t d = order.size(); d-- > 0;) {
    g.stride[order[d]] = step;
    step *= g.size[order[d]];
  }
  g.array = std::make_shared<Array>(dtype, step, guarded);
  return g;
}
template <class Data>
OverUnits<Data> over_units(const Grid& g) {
  if (!g) return {};
  return {g.data(), g.stride[0], g.stride[1], g.stride[2], g.stride[3], g.stride[4]};
}
template <class Data>
UnitState<Data> unit_state(const Grid& g) {
  if (!g) return {};
  return {g.data(), g.stride[0], g.stride[1], g.stride[2]};
}

// ---- problems ----

enum GatedCell { kLstm, kCoupledLstm, kGru, kGruResetBefore, kElman, kIndRnn, kSlstm };
static_assert(GatedCells::index<Lstm>() == kLstm && GatedCells::index<Slstm>() == kSlstm);
static_assert(GatedCells::index<GruResetBefore>() == kGruResetBefore && GatedCells::size == 7);
static_assert(GatedCells::index<IndRnn>() == kIndRnn && GatedCells::index<Elman>() == kElman);
inline const char* const kGatedNames[] = {"lstm",  "coupled lstm", "gru",  "gru, reset before",
                                          "elman", "ind_rnn",      "slstm"};

struct GatedShape {
  int64_t S, T, H, K, P;
};
struct GatedCase {
  int cell = 0;
  unsigned flags = 0;
  int64_t S = 0, T = 0, H = 0, K = 0, P = 0;
  std::vector<int64_t> cu;
  bool reverse = false;
  DType dtype = DType::f32, R_dtype = DType::f32;
  double eps = 0;
  std::optional<double> clip;
  Grid x, R, bias, weights, projection, norm_weight, cell_norm_weight, cell_norm_bias, h_update,
      c_update, mask, state[4], grad_h, grad_state[4];
  std::vector<char> reset; // (row, time)

  const GatedSizes& sizes() const { return kGatedSizes[cell]; }
  DType wide() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }
  bool packed() const { return !cu.empty(); }
  int64_t rows() const { return packed() ? 1 : S; }
  int64_t steps() const { return packed() ? cu.back() : T; }
  int64_t tokens() const { return rows() * steps(); }
  // (row, time) of the sequence's tokens as the recurrence meets them
  std::vector<std::pair<int64_t, int64_t>> tokens(int64_t s) const {
    std::vector<std::pair<int64_t, int64_t>> all;
    for (int64_t t = packed() ? cu[size_t(s)] : 0; t < (packed() ? cu[size_t(s) + 1] : T); ++t)
      all.push_back({packed() ? 0 : s, t});
    if (reverse) std::reverse(all.begin(), all.end());
    return all;
  }
  std::string text() const {
    std::ostringstream s;
    s << kGatedNames[cell] << " flags " << flags << " " << info_of(dtype).name << " S " << S
      << " T " << T << " H " << H << " K " << K << " P " << P;
    if (packed()) {
      s << " packed";
      for (const int64_t each : cu) s << " " << each;
    }
    const auto also = [&](bool there, const char* what) {
      if (there) s << " " << what;
    };
    also(reverse, "reverse"), also(R_dtype == DType::bf16, "bfloat16 R"), also(bool(bias), "bias");
    also(bool(weights), "weights"), also(bool(projection), "projection");
    also(bool(norm_weight), "norm"), also(bool(cell_norm_weight), "cell norm");
    also(bool(cell_norm_bias), "with bias"), also(bool(h_update), "h_update");
    also(bool(c_update), "c_update"), also(bool(mask), "mask"), also(!reset.empty(), "reset");
    also(clip.has_value(), "clip"), also(bool(state[0]), "state");
    return s.str();
  }
};

// scale: of the recurrent weights; options: which there are, one in `of` cases each.
inline GatedCase draw_gated_case(
    Random& random, DType dtype, int cell, const GatedShape& shape, int64_t of = 2) {
  GatedCase p;
  p.cell = cell, p.dtype = dtype;
  const auto maybe = [&] { return random.integer(1, of) == 1; };
  p.H = cell == kIndRnn ? 1 : shape.H, p.S = shape.S, p.T = shape.T, p.K = shape.K;
  const bool is_lstm = cell == kLstm || cell == kCoupledLstm, project = is_lstm && maybe();
  p.P = project ? shape.P : shape.K;
  const GatedSizes& n = p.sizes();
  if (maybe()) {
    p.cu = {0};
    for (int64_t s = 0; s < p.S; ++s)
      p.cu.push_back(p.cu.back() + (random.integer(0, 3) ? random.integer(0, p.T) : 0));
  }
  p.reverse = maybe();
  if (cell == kSlstm) p.flags = unsigned(random.integer(0, 3));
  if (cell == kElman || cell == kIndRnn) p.flags = unsigned(random.integer(0, 1));
  const DType wide = p.wide();
  p.R_dtype = dtype != DType::f64 && maybe() ? DType::bf16 : wide;
  p.eps = 0.05;
  const auto fill = [&](const Grid& g, double scale, double offset = 0) {
    g.each([&](int64_t at) { g.array->set(at, offset + random.normal(scale)); });
    return g;
  };
  const auto over_time = [&](int64_t gates, int64_t width, DType of_what) {
    return grid(of_what, {p.rows(), p.steps(), gates, p.H, width}, false, &random);
  };
  p.x = fill(over_time(n.from_x, p.K, dtype), 1);
  if (n.from_h) {
    p.R = fill(grid(p.R_dtype, {n.from_h, p.H, p.K, p.P}, false), 0.8 / sqrt(double(p.P)));
    if (maybe()) p.bias = fill(grid(wide, {n.from_h, p.H, p.K}, false), 0.5);
    if (cell != kGruResetBefore && maybe())
      p.norm_weight = fill(grid(wide, {n.from_h, p.H, p.K}, false), 0.5, 0.5);
  }
  if (cell == kIndRnn || (is_lstm && maybe())) {
    p.weights = fill(grid(wide, {n.weights, p.H, p.K}, false), 0.5);
    if (is_lstm) p.flags = 1;
  }
  if (project) p.projection = fill(grid(wide, {p.H, p.P, p.K}, false), 1 / sqrt(double(p.K)));
  if (is_lstm && maybe()) {
    p.cell_norm_weight = fill(grid(wide, {p.H, p.K}, false), 0.5, 1);
    if (maybe()) p.cell_norm_bias = fill(grid(wide, {p.H, p.K}, false), 0.5);
  }
  const auto update = [&](int64_t width) { // zeros, ones and numbers between
    const Grid g = over_time(1, width, wide);
    g.each([&](int64_t at) {
      const int64_t kind = random.integer(0, 2);
      g.array->set(at, kind < 2 ? double(kind) : random.uniform(0, 1));
    });
    return g;
  };
  if (maybe()) p.h_update = update(p.P);
  if (is_lstm && maybe()) p.c_update = update(p.K);
  if (maybe()) {
    p.mask = grid(wide, {p.S, p.H, p.P}, false, &random);
    p.mask.each([&](int64_t at) { p.mask.array->set(at, random.integer(0, 2) ? 1.5 : 0); });
  }
  if (maybe()) {
    p.reset.resize(size_t(p.tokens()));
    for (char& each : p.reset) each = random.integer(0, 3) == 0;
  }
  if (maybe()) p.clip = random.integer(0, 4) ? random.uniform(0.05, 0.5) : 0;
  const bool with_state = random.integer(0, 3) > 0;
  p.grad_h = fill(over_time(1, p.P, dtype), 1);
  for (int i = 0; i < n.states; ++i) {
    const auto of_state = [&] {
      return grid(wide, {p.S, p.H, i == 0 ? p.P : p.K}, false, &random);
    };
    if (with_state) p.state[i] = fill(of_state(), 1);
    if (random.integer(0, 3)) p.grad_state[i] = fill(of_state(), 1);
  }
  if (cell == kSlstm && with_state) // n > 0, or nothing there yet
    for (int64_t s = 0; s < p.S; ++s)
      for (int64_t head = 0; head < p.H; ++head)
        for (int64_t k = 0; k < p.K; ++k) {
          const bool nothing = random.integer(0, 4) == 0;
          const auto set = [&](int i, double value) {
            p.state[i].array->set(p.state[i].at({s, head, k}), nothing ? 0 : value);
          };
          const double size = exp(random.normal());
          set(1, size * random.normal()), set(2, size), set(3, random.normal());
          if (nothing && random.integer(0, 1))
            p.state[3].array->set(p.state[3].at({s, head, k}), -HUGE_VAL);
        }
  return p;
}

// ---- results, each in logical order ----

struct GatedPart {
  std::string name;
  bool over_time; // stored as the arrays over time are
  std::vector<double> at;
};
using GatedResult = std::vector<GatedPart>;
inline bool same(const GatedResult& x, const GatedResult& y) {
  if (x.size() != y.size()) return false;
  for (size_t i = 0; i < x.size(); ++i)
    if (x[i].at.size() != y[i].at.size() ||
        memcmp(x[i].at.data(), y[i].at.data(), x[i].at.size() * sizeof(double)))
      return false;
  return true;
}

inline void fill_problem(const GatedCase& p, GatedProblem& f) {
  f.cell = p.cell, f.flags = p.flags;
  f.num_sequences = p.S, f.num_steps = p.steps(), f.num_heads = p.H, f.width = p.K, f.h_width = p.P;
  f.cu_seqlens = p.packed() ? p.cu.data() : nullptr;
  f.reverse = p.reverse, f.R_dtype = p.R_dtype, f.norm_eps = p.eps;
  f.x = over_units<const void*>(p.x);
  f.R = p.R.data(), f.bias = p.bias.data(), f.weights = p.weights.data();
  f.projection = p.projection.data(), f.norm_weight = p.norm_weight.data();
  f.cell_norm_weight = p.cell_norm_weight.data(), f.cell_norm_bias = p.cell_norm_bias.data();
  f.h_update = over_units<const void*>(p.h_update);
  f.c_update = over_units<const void*>(p.c_update);
  f.mask = unit_state<const void*>(p.mask);
  if (!p.reset.empty()) {
    f.reset = reinterpret_cast<const bool*>(p.reset.data());
    f.reset_sequence = p.steps(), f.reset_time = 1;
  }
  for (int i = 0; i < p.sizes().states; ++i)
    f.initial_state[i] = unit_state<const void*>(p.state[i]);
}

struct GatedWanted {
  bool backward = true, in_place = false;
  bool few = false; // backward: only the gradient of x
};
using GatedCalls = std::pair<
    std::function<void(DType, const GatedForward&)>,
    std::function<void(DType, const GatedBackward&)>>;

inline GatedResult run(const GatedCase& p, const GatedCalls& calls, GatedWanted wanted = {}) {
  GatedResult result;
  std::vector<Grid> outputs;
  const auto add = [&](const char* name, bool over_time, const Grid& g) {
    outputs.push_back(g);
    EXPECT_TRUE(g.array->guards_intact()) << name << ": " << p.text();
    result.push_back({name, over_time, g.values()});
  };
  Random layout;
  const DType wide = p.wide();
  const GatedSizes& n = p.sizes();
  GatedForward f;
  fill_problem(p, f);
  const Grid h = grid(p.dtype, {p.rows(), p.steps(), 1, p.H, p.P}, true, &layout);
  f.h = over_units<void*>(h);
  std::vector<Grid> final_state;
  for (int i = 0; i < n.states; ++i) {
    Grid g = grid(wide, {p.S, p.H, i == 0 ? p.P : p.K}, true, &layout);
    if (wanted.in_place) { // the layout of one for both
      std::vector<double> v(size_t(g.count()), 0.);
      if (p.state[i]) v = p.state[i].values();
      size_t at = 0;
      g.each([&](int64_t place) { g.array->set(place, v[at++]); });
      f.initial_state[i] = unit_state<const void*>(g);
    }
    f.final_state[i] = unit_state<void*>(g);
    final_state.push_back(g);
  }
  const int64_t size = gated_kept(f, n.gates, n.states, n.from_h).size;
  Array kept(wide, p.tokens() * size, true);
  if (wanted.backward) f.kept = kept.data();
  calls.first(p.dtype, f);
  EXPECT_TRUE(kept.guards_intact()) << p.text();
  const char* const kStates[] = {"h", "c", "n", "m"};
  add("h", true, h);
  for (int i = 0; i < n.states; ++i)
    add((std::string("final ") + kStates[i]).c_str(), false, final_state[size_t(i)]);
  if (!wanted.backward) return result;

  const GatedKept parts = gated_kept(f, n.gates, n.states, n.from_h);
  const auto of_kept = [&](const char* name, int64_t part, int64_t width) {
    std::vector<double> v;
    for (int64_t t = 0; t < p.tokens(); ++t)
      for (int64_t head = 0; head < p.H; ++head)
        for (int64_t k = 0; k < width; ++k)
          v.push_back(kept.get(t * size + (part * p.H + head) * parts.width + k).real());
    result.push_back({name, false, v});
  };
  of_kept("kept h before", parts.states, p.P); // the operator makes R's gradient of it
  if (p.projection) of_kept("kept h before the projection", parts.unprojected, p.K);

  GatedBackward b;
  fill_problem(p, b);
  b.kept = kept.data();
  b.clips = p.clip.has_value();
  b.clip = p.clip.value_or(0);
  b.grad_h = over_units<const void*>(p.grad_h);
  const auto share = [&](std::vector<int64_t> size) {
    size.insert(size.begin(), p.S);
    const Grid g = grid(wide, size, true);
    g.each([&](int64_t at) { g.array->set(at, 0); });
    return g;
  };
  const Grid grad_x = grid(p.dtype, {p.rows(), p.steps(), n.from_x, p.H, p.K}, true, &layout);
  b.grad_x = over_units<void*>(grad_x);
  for (int i = 0; i < n.states; ++i)
    b.grad_final_state[i] = unit_state<const void*>(p.grad_state[i]);
  std::vector<std::pair<std::string, Grid>> more;
  if (!wanted.few) {
    const auto want = [&](const char* name, void*& to, const Grid& g) {
      to = g.data();
      more.push_back({name, g});
    };
    const auto tokens = [&](std::vector<int64_t> size) {
      size.insert(size.begin(), p.tokens());
      return grid(wide, size, true);
    };
    if (n.from_h) want("gradient of a", b.grad_a, tokens({n.from_h, p.H, p.K}));
    if (n.two_products) want("operand", b.operand, tokens({p.H, p.P}));
    if (p.projection) want("gradient of the projected", b.grad_projected, tokens({p.H, p.P}));
    if (p.bias) want("gradient of bias", b.grad_bias, share({n.from_h, p.H, p.K}));
    if (p.weights) want("gradient of weights", b.grad_weights, share({n.weights, p.H, p.K}));
    if (p.norm_weight)
      want("gradient of norm_weight", b.grad_norm_weight, share({n.from_h, p.H, p.K}));
    if (p.cell_norm_weight)
      want("gradient of cell_norm_weight", b.grad_cell_norm_weight, share({p.H, p.K}));
    if (p.cell_norm_bias)
      want("gradient of cell_norm_bias", b.grad_cell_norm_bias, share({p.H, p.K}));
    for (int i = 0; i < n.states; ++i) {
      const Grid g = grid(wide, {p.S, p.H, i == 0 ? p.P : p.K}, true, &layout);
      b.grad_initial_state[i] = unit_state<void*>(g);
      more.push_back({std::string("gradient of initial ") + kStates[i], g});
    }
  }
  calls.second(p.dtype, b);
  add("gradient of x", true, grad_x);
  for (const auto& [name, g] : more) add(name.c_str(), false, g);
  return result;
}

// ---- the plain loop ----

struct GatedAnswer {
  GatedResult result;
  double margin = HUGE_VAL; // the least distance from where a slope jumps
};

inline GatedAnswer plain_gated(const GatedCase& p) {
  GatedAnswer answer;
  const GatedSizes& n = p.sizes();
  const size_t K = size_t(p.K), P = size_t(p.P), H = size_t(p.H);
  const auto part = [&](const std::string& name, bool over_time, int64_t count) {
    answer.result.push_back({name, over_time, std::vector<double>(size_t(count), 0.)});
    return answer.result.size() - 1;
  };
  const char* const kStates[] = {"h", "c", "n", "m"};
  const int64_t tokens = p.tokens(), of_h = p.H * p.P, of_c = p.H * p.K;
  size_t final_at[4], initial_at[4];
  const size_t h_at = part("h", true, tokens * of_h);
  for (int i = 0; i < n.states; ++i)
    final_at[i] = part(std::string("final ") + kStates[i], false, p.S * (i == 0 ? of_h : of_c));
  const size_t before_at = part("kept h before", false, tokens * of_h);
  size_t unprojected_at = 0, a_at = 0, operand_at = 0, projected_at = 0;
  if (p.projection) unprojected_at = part("kept h before the projection", false, tokens * of_c);
  const size_t x_at = part("gradient of x", true, tokens * n.from_x * of_c);
  if (n.from_h) a_at = part("gradient of a", false, tokens * n.from_h * of_c);
  if (n.two_products) operand_at = part("operand", false, tokens * of_h);
  if (p.projection) projected_at = part("gradient of the projected", false, tokens * of_h);
  struct Parameter {
    const Grid& g;
    const char* name;
    size_t at = 0;
    std::vector<Number> on = {};
    size_t count() const { return size_t(g.count()); }
  };
  Parameter bias{p.bias, "bias"}, weights{p.weights, "weights"}, norm{p.norm_weight, "norm_weight"},
      cell_norm{p.cell_norm_weight, "cell_norm_weight"},
      cell_bias{p.cell_norm_bias, "cell_norm_bias"};
  Parameter* const parameters[] = {&bias, &weights, &norm, &cell_norm, &cell_bias};
  for (Parameter* each : parameters)
    if (each->g)
      each->at =
          part(std::string("gradient of ") + each->name, false, p.S * int64_t(each->count()));
  for (int i = 0; i < n.states; ++i)
    initial_at[i] =
        part(std::string("gradient of initial ") + kStates[i], false, p.S * (i == 0 ? of_h : of_c));
  const std::vector<double> R = p.R ? p.R.values() : std::vector<double>(),
                            projection =
                                p.projection ? p.projection.values() : std::vector<double>();

  for (int64_t s = 0; s < p.S; ++s) {
    Tape tape;
    const auto leaf = [&](double v) { return on_tape(tape, v); };
    std::vector<std::pair<Number, double>> seeds;
    struct Wanted {
      size_t part, at;
      Number of;
    };
    std::vector<Wanted> gradients; // where the gradient of which number goes
    for (Parameter* each : parameters) {
      each->on.clear();
      if (!each->g) continue;
      for (const double v : each->g.values()) {
        gradients.push_back({each->at, size_t(s) * each->count() + each->on.size(), leaf(v)});
        each->on.push_back(gradients.back().of);
      }
    }
    std::vector<Number> state[4];
    for (int i = 0; i < n.states; ++i) {
      const size_t width = i == 0 ? P : K;
      for (size_t at = 0; at < H * width; ++at) {
        const double v =
            p.state[i] ? p.state[i].get({s, int64_t(at / width), int64_t(at % width)}) : 0;
        state[i].push_back(leaf(v));
        gradients.push_back({initial_at[i], size_t(s) * H * width + at, state[i].back()});
      }
    }
    for (const auto& [row, time] : p.tokens(s)) {
      const size_t token = size_t(row * p.steps() + time);
      if (!p.reset.empty() && p.reset[token])
        for (int i = 0; i < n.states; ++i)
          for (Number& each : state[i]) each = leaf(0);
      for (size_t head = 0; head < H; ++head) {
        const int64_t hd = int64_t(head);
        std::vector<Number> u, x, a, operand;
        for (size_t q = 0; q < P; ++q) {
          const Number before = state[0][head * P + q];
          answer.result[before_at].at[(token * H + head) * P + q] = before.value();
          Number clipped = before + 0.;
          if (p.clip) tape.limit[size_t(clipped.id)] = *p.clip;
          u.push_back((p.mask ? p.mask.get({s, hd, int64_t(q)}) : 1) * clipped);
        }
        for (int64_t g = 0; g < n.from_x; ++g)
          for (size_t k = 0; k < K; ++k) {
            x.push_back(leaf(p.x.get({row, time, g, hd, int64_t(k)})));
            gradients.push_back(
                {x_at, ((token * size_t(n.from_x) + size_t(g)) * H + head) * K + k, x.back()});
          }
        const auto gate = [&](int g, size_t k) { return x[size_t(g) * K + k]; };
        for (size_t g = 0; g < size_t(n.from_h); ++g) {
          const bool second = n.two_products && int(g) == n.from_h - 1;
          if (second)
            for (size_t k = 0; k < K; ++k) {
              Number r = gate(0, k) + a[k];
              operand.push_back(of_sigmoid(r) * u[k]);
              answer.result[operand_at].at[(token * H + head) * K + k] = operand.back().value();
            }
          for (size_t k = 0; k < K; ++k) {
            const double* row_of_R = R.data() + ((g * H + head) * K + k) * P;
            const Number product =
                sum_of(tape, second ? operand : u, [&](size_t q) { return row_of_R[q]; });
            gradients.push_back(
                {a_at, ((token * size_t(n.from_h) + g) * H + head) * K + k, product});
            a.push_back(product);
            if (bias.g && !p.norm_weight) a.back() = a.back() + bias.on[(g * H + head) * K + k];
          }
        }
        const auto normalized = [&](const std::vector<Number>& v) {
          const double share = 1. / double(v.size());
          const Number mean = sum_of(tape, v, [&](size_t) { return share; });
          std::vector<Number> d, squares;
          for (const Number each : v) {
            d.push_back(each - mean);
            squares.push_back(d.back() * d.back());
          }
          const Number scale =
              of_inverse_root(sum_of(tape, squares, [&](size_t) { return share; }) + p.eps);
          for (Number& each : d) each = each * scale;
          return d;
        };
        if (p.norm_weight) {
          a = normalized(a);
          for (size_t g = 0; g < size_t(n.from_h); ++g)
            for (size_t k = 0; k < K; ++k) {
              Number& each = a[g * K + k];
              each = each * norm.on[(g * H + head) * K + k];
              if (bias.g) each = each + bias.on[(g * H + head) * K + k];
            }
        }
        const auto z = [&](int g, size_t k) { return gate(g, k) + a[size_t(g) * K + k]; };
        const auto weight = [&](int g, size_t k) {
          return weights.on[(size_t(g) * H + head) * K + k];
        };
        const auto kink = [&](double distance) {
          answer.margin = std::min(answer.margin, fabs(distance));
        };
        const auto activation = [&](Number v) {
          if (!(p.flags & 1)) return of_tanh(v);
          kink(v.value());
          return of_relu(v);
        };
        std::vector<Number> after[4];
        for (int i = 1; i < n.states; ++i) after[i].resize(K);
        std::vector<Number> o(K), h(K);
        for (size_t k = 0; k < K; ++k) {
          const auto before = [&](int i) { return state[i][head * (i ? K : P) + k]; };
          switch (p.cell) {
            case kLstm:
            case kCoupledLstm: {
              const bool coupled = p.cell == kCoupledLstm, peephole = p.flags & 1;
              const int at = coupled ? 0 : 1; // of f
              Number f = z(at, k);
              if (peephole) f = f + weight(at, k) * before(1);
              Number i = coupled ? -1. * f : z(0, k);
              if (peephole && !coupled) i = i + weight(0, k) * before(1);
              after[1][k] = of_sigmoid(f) * before(1) + of_sigmoid(i) * of_tanh(z(at + 1, k));
              o[k] = z(at + 2, k);
              if (peephole) o[k] = o[k] + weight(at + 1, k) * after[1][k];
              break;
            }
            case kGru:
            case kGruResetBefore: {
              const Number n_of = p.cell == kGru ? gate(2, k) + of_sigmoid(z(0, k)) * a[2 * K + k]
                                                 : z(2, k),
                           keep = of_sigmoid(z(1, k));
              h[k] = (-1. * keep + 1.) * of_tanh(n_of) + keep * before(0);
              break;
            }
            case kElman:
              h[k] = activation(z(0, k));
              break;
            case kIndRnn:
              h[k] = activation(gate(0, k) + weight(0, k) * u[k] + weight(1, k));
              break;
            case kSlstm: {
              const Number i = z(0, k), f = p.flags & 1 ? z(1, k) : of_log_sigmoid(z(1, k)),
                           carried = f + before(3);
              const bool empty = before(2).value() == 0;
              if (!empty) kink(i.value() - carried.value());
              const Number m = empty || i.value() >= carried.value() ? i : carried;
              const Number i1 = of_exp(i - m), f1 = of_exp(carried - m);
              after[1][k] = f1 * before(1) + i1 * of_tanh(z(2, k));
              Number norm_of = f1 * before(2) + i1;
              if (p.flags & 2) {
                kink(norm_of.value() - 1);
                if (norm_of.value() < 1) norm_of = leaf(1);
              }
              after[2][k] = norm_of, after[3][k] = m;
              h[k] = of_sigmoid(z(3, k)) * (after[1][k] / norm_of);
              break;
            }
          }
        }
        if (p.cell == kLstm || p.cell == kCoupledLstm) {
          std::vector<Number> seen = after[1];
          if (p.cell_norm_weight) {
            seen = normalized(seen);
            for (size_t k = 0; k < K; ++k) {
              seen[k] = seen[k] * cell_norm.on[head * K + k];
              if (p.cell_norm_bias) seen[k] = seen[k] + cell_bias.on[head * K + k];
            }
          }
          for (size_t k = 0; k < K; ++k) h[k] = of_sigmoid(o[k]) * of_tanh(seen[k]);
        }
        if (p.projection) {
          std::vector<Number> projected;
          for (size_t k = 0; k < K; ++k)
            answer.result[unprojected_at].at[(token * H + head) * K + k] = h[k].value();
          for (size_t q = 0; q < P; ++q) {
            projected.push_back(
                sum_of(tape, h, [&](size_t k) { return projection[(head * P + q) * K + k]; }));
            gradients.push_back({projected_at, (token * H + head) * P + q, projected.back()});
          }
          h = projected;
        }
        const auto mix = [&](const Grid& update, std::vector<Number>& v, int i) {
          for (size_t k = 0; k < v.size(); ++k) {
            const double w = update.get({row, time, 0, hd, int64_t(k)});
            v[k] = w * v[k] + (1 - w) * state[i][head * v.size() + k];
          }
        };
        if (p.c_update) mix(p.c_update, after[1], 1);
        if (p.h_update) mix(p.h_update, h, 0);
        for (size_t q = 0; q < P; ++q) {
          answer.result[h_at].at[(token * H + head) * P + q] = h[q].value();
          seeds.push_back({h[q], p.grad_h.get({row, time, 0, hd, int64_t(q)})});
          state[0][head * P + q] = h[q];
        }
        for (int i = 1; i < n.states; ++i)
          for (size_t k = 0; k < K; ++k) state[i][head * K + k] = after[i][k];
      }
    }
    for (int i = 0; i < n.states; ++i) {
      const size_t width = i == 0 ? P : K;
      for (size_t at = 0; at < H * width; ++at) {
        answer.result[final_at[i]].at[size_t(s) * H * width + at] = state[i][at].value();
        if (p.grad_state[i])
          seeds.push_back(
              {state[i][at], p.grad_state[i].get({s, int64_t(at / width), int64_t(at % width)})});
      }
    }
    std::vector<double> d(tape.value.size(), 0.);
    for (const auto& [number, seed] : seeds) d[size_t(number.id)] += seed;
    d = tape.backward(std::move(d));
    for (const Wanted& each : gradients)
      answer.result[each.part].at[each.at] = d[size_t(each.of.id)];
  }
  return answer;
}

inline void check(const GatedCase& p, const GatedResult& got, const GatedResult& want) {
  ASSERT_EQ(got.size(), want.size());
  const DTypeInfo &stored = info_of(p.dtype), &wide = info_of(p.wide());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(got[i].name, want[i].name);
    ASSERT_EQ(got[i].at.size(), want[i].at.size()) << got[i].name;
    double size = 1;
    for (const double each : want[i].at)
      if (isfinite(each)) size = std::max(size, fabs(each));
    for (size_t k = 0; k < got[i].at.size(); ++k) {
      const double y = want[i].at[k];
      if (got[i].at[k] == y) continue; // infinities
      double tolerance = 400 * wide.epsilon * size;
      if (got[i].over_time) tolerance += stored.epsilon * fabs(y) + (p.dtype == DType::f16) * 6e-8;
      ASSERT_NEAR(got[i].at[k], y, tolerance) << got[i].name << " at " << k;
    }
  }
}

} // namespace torch_ext::test
