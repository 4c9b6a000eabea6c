// Random problems for the drivers of the diagonal family, and their answers: the formulas run in a plain loop, over random
// shapes, layouts and options. Outputs are poisoned and lie between guard bands; inputs are allocated to the byte, so that
// AddressSanitizer sees what reads beyond them.
#pragma once
#include <math.h>
#include <string.h>

#include <algorithm>
#include <complex>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cells/all.h"
#include "core/diagonal_problem.h"
#include "formulas.h"
#include "random.h"
#include "sixteen_bits.h"

namespace torch_ext::test {

using Value = std::complex<double>;

struct DTypeInfo {
  DType dtype, state;
  const char* name;
  int64_t size;
  bool complex;
  double epsilon,
      state_epsilon; // relative error of what is stored, and of the state and the arithmetic
};
inline const DTypeInfo kDTypes[] = {
    {DType::f32, DType::f32, "float32", 4, false, 6e-8, 6e-8},
    {DType::f64, DType::f64, "float64", 8, false, 1.2e-16, 1.2e-16},
    {DType::bf16, DType::f32, "bfloat16", 2, false, 3.95e-3, 6e-8},
    {DType::f16, DType::f32, "float16", 2, false, 4.9e-4, 6e-8},
    {DType::c64, DType::c64, "complex64", 8, true, 6e-8, 6e-8},
    {DType::c128, DType::c128, "complex128", 16, true, 1.2e-16, 1.2e-16},
};
inline const DTypeInfo& info_of(DType dtype) { return kDTypes[int(dtype)]; }

// ---- memory ----

class Array {
 public:
  static constexpr int64_t kGuard = 256;
  Array() = default;
  // With guards of `skew` + kGuard bytes on both sides for outputs, none for inputs.
  Array(DType dtype, int64_t count, bool guarded, int64_t skew = 0)
      : dtype_(dtype), count_(count), begin_(guarded ? kGuard + skew : 0) {
    memory_.resize(size_t(count * info_of(dtype).size + (guarded ? 2 * kGuard + skew : 0)));
    std::fill(memory_.begin(), memory_.end(), kPoison);
    memory_.shrink_to_fit();
  }
  void* data() { return memory_.data() + begin_; }
  int64_t count() const { return count_; }
  bool guards_intact() const {
    const auto is_poison = [](char c) { return c == kPoison; };
    return std::all_of(memory_.begin(), memory_.begin() + begin_, is_poison) &&
           std::all_of(
               memory_.begin() + begin_ + count_ * info_of(dtype_).size, memory_.end(), is_poison);
  }
  bool same_bytes(const Array& other) const {
    return count_ == other.count_ &&
           !memcmp(
               memory_.data() + begin_, other.memory_.data() + other.begin_,
               size_t(count_ * info_of(dtype_).size));
  }
  Value get(int64_t i) const {
    const char* at = memory_.data() + begin_ + i * info_of(dtype_).size;
    switch (dtype_) {
      case DType::f32:
        return read<float>(at);
      case DType::f64:
        return read<double>(at);
      case DType::bf16:
        return decode(read<uint16_t>(at), 8);
      case DType::f16:
        return decode(read<uint16_t>(at), 5);
      case DType::c64:
        return Value(read<std::complex<float>>(at));
      default:
        return read<Value>(at);
    }
  }
  void set(int64_t i, Value x) {
    char* at = memory_.data() + begin_ + i * info_of(dtype_).size;
    switch (dtype_) {
      case DType::f32:
        return write(at, float(x.real()));
      case DType::f64:
        return write(at, x.real());
      case DType::bf16:
        return write(at, encode(float(x.real()), 8));
      case DType::f16:
        return write(at, encode(float(x.real()), 5));
      case DType::c64:
        return write(at, std::complex<float>(x));
      default:
        return write(at, x);
    }
  }

 private:
  static constexpr char kPoison = char(0xff); // NaN in every dtype
  template <class T>
  static T read(const char* at) {
    T x;
    memcpy(&x, at, sizeof x);
    return x;
  }
  template <class T>
  static void write(char* at, T x) {
    memcpy(at, &x, sizeof x);
  }
  DType dtype_ = DType::f32;
  int64_t count_ = 0, begin_ = 0;
  std::vector<char> memory_;
};

// A (sequence, time, width) array in some layout.
struct Sequence {
  std::shared_ptr<Array> array;
  int64_t offset = 0, sequence = 0, time = 0, width = 0;
  DType dtype = DType::f32;

  explicit operator bool() const { return array != nullptr; }
  int64_t at(int64_t s, int64_t t, int64_t d) const {
    return offset + s * sequence + t * time + d * width;
  }
  Value get(int64_t s, int64_t t, int64_t d) const { return array->get(at(s, t, d)); }
  Strided strided() const {
    if (!array) return {};
    return {
        static_cast<char*>(array->data()) + offset * info_of(dtype).size, sequence, time, width};
  }
};

enum Layout {
  kContiguous,
  kSliced,
  kTimeContiguous,
  kTimeFirst,
  kSameSequence,
  kSameTime,
  kSameWidth,
  kLayouts
};

inline Sequence make(
    Random& random, DType dtype, int64_t S, int64_t T, int64_t D, Layout layout,
    const std::function<double(Random&)>& draw) {
  Sequence x;
  x.dtype = dtype;
  int64_t count = S * T * D;
  x.sequence = T * D, x.time = D, x.width = 1;
  if (layout == kSliced) {
    x.offset = 2, x.time = D + 3, x.sequence = T * x.time + 1;
    count = S && T ? x.at(S - 1, T - 1, D) : 0;
  } else if (layout == kTimeContiguous) {
    x.time = 1, x.width = T;
  } else if (layout == kTimeFirst) {
    x.sequence = D, x.time = S * D;
  } else if (layout == kSameSequence) {
    x.sequence = 0, count = T * D;
  } else if (layout == kSameTime) {
    x.time = 0, x.sequence = D, count = S * D;
  } else if (layout == kSameWidth) {
    x.width = 0, x.time = 1, x.sequence = T, count = S * T;
  }
  x.array = std::make_shared<Array>(dtype, count, false);
  for (int64_t i = 0; i < count; ++i) {
    x.array->set(
        i, info_of(dtype).complex ? Value(draw(random), draw(random)) : Value(draw(random)));
  }
  return x;
}

// ---- cells ----

struct CellCase {
  int index;
  const char* name;
  unsigned flags;
  int num_inputs;
  bool complex;
  Step<double> (*step)(const std::vector<double>&, unsigned);
};
template <class Cell>
CellCase cell_case(unsigned flags, Step<double> (*step)(const std::vector<double>&, unsigned)) {
  return {DiagonalCells::index<Cell>(), Cell::name, flags, num_inputs<Cell>, Cell::complex, step};
}
inline const std::vector<CellCase>& cell_cases() {
  static const std::vector<CellCase> all = {
      cell_case<LinearScan>(0, linear_scan_step<double>),
      cell_case<MinGru>(0, min_gru_step),
      cell_case<MinGru>(1, min_gru_step),
      cell_case<MinLstm>(0, min_lstm_step),
      cell_case<MinLstm>(1, min_lstm_step),
      cell_case<MinLstm>(2, min_lstm_step),
      cell_case<MinLstm>(3, min_lstm_step),
  };
  return all;
}

inline Step<Value> apply(const CellCase& cell, const std::vector<Value>& x) {
  if (cell.complex) return linear_scan_step<Value>(x, cell.flags);
  std::vector<double> real;
  for (const Value& each : x) real.push_back(each.real());
  const Step<double> s = cell.step(real, cell.flags);
  return {s.a, s.b, {s.da.begin(), s.da.end()}, {s.db.begin(), s.db.end()}};
}

// ---- one problem ----

struct Problem {
  CellCase cell;
  DType dtype;
  int64_t S, T, D; // sequences; steps of each, or of the packed row
  bool reverse;
  std::vector<int64_t> cu_seqlens; // empty: not packed
  std::vector<Sequence> inputs;
  Sequence initial_state, grad_h, grad_final_state; // may be absent
  int64_t skew;                                     // of outputs, in bytes

  bool packed() const { return !cu_seqlens.empty(); }
  int64_t rows() const { return packed() ? 1 : S; }
  // The row and the steps, in the order of time, of one sequence.
  std::vector<std::pair<int64_t, int64_t>> tokens(int64_t s) const {
    std::vector<std::pair<int64_t, int64_t>> all;
    const int64_t begin = packed() ? cu_seqlens[size_t(s)] : 0,
                  end = packed() ? cu_seqlens[size_t(s) + 1] : T;
    for (int64_t t = begin; t < end; ++t) all.emplace_back(packed() ? 0 : s, t);
    if (reverse) std::reverse(all.begin(), all.end());
    return all;
  }
  std::vector<Value> input(int64_t row, int64_t t, int64_t d) const {
    std::vector<Value> x;
    for (const Sequence& each : inputs) x.push_back(each.get(row, t, d));
    return x;
  }
  void describe(DiagonalProblem& p) const {
    p.num_sequences = S, p.num_steps = T, p.width = D;
    p.cu_seqlens = packed() ? cu_seqlens.data() : nullptr;
    p.reverse = reverse;
    p.flags = cell.flags;
    for (size_t i = 0; i < inputs.size(); ++i) p.inputs[i] = inputs[i].strided();
    p.initial_state = initial_state.strided();
  }
  std::string text() const {
    std::string s = std::string(cell.name) + " flags=" + std::to_string(cell.flags) + " " +
                    info_of(dtype).name + " S=" + std::to_string(S) + " T=" + std::to_string(T) +
                    " D=" + std::to_string(D) + (reverse ? " reverse" : "") +
                    (packed() ? " packed" : "") + (initial_state ? " with initial state" : "") +
                    " skew=" + std::to_string(skew);
    for (const Sequence& x : inputs) {
      s += " [" + std::to_string(x.sequence) + " " + std::to_string(x.time) + " " +
           std::to_string(x.width) + "]";
    }
    return s;
  }
};

template <class T>
const T& pick(Random& random, const std::vector<T>& from) {
  return from[size_t(random.integer(0, int64_t(from.size()) - 1))];
}

inline Problem draw_problem(
    Random& random, const CellCase& cell, DType dtype, int64_t S, int64_t T, int64_t D,
    bool any_layout) {
  Problem p{cell, dtype, S, T, D, random.integer(0, 1) == 1, {}, {}, {}, {}, {}, 0};
  if (any_layout && random.integer(0, 2) == 0) {
    p.cu_seqlens = {0};
    for (int64_t s = 1; s < S; ++s) p.cu_seqlens.push_back(random.integer(0, T));
    std::sort(p.cu_seqlens.begin(), p.cu_seqlens.end());
    if (S > 0) p.cu_seqlens.push_back(T);
  }
  const auto layout = [&] {
    return any_layout && random.integer(0, 1) ? Layout(random.integer(0, kLayouts - 1))
                                              : kContiguous;
  };
  const auto coefficient = [](Random& r) { return r.uniform(-0.7, 0.7); };
  const auto plain = [](Random& r) { return r.normal(); };
  const auto gate = [](Random& r) { return r.integer(0, 30) ? r.normal(3) : r.normal(3000); };
  for (int i = 0; i < cell.num_inputs; ++i) {
    const bool scan = !strcmp(cell.name, "linear_scan"), last = i + 1 == cell.num_inputs;
    p.inputs.push_back(
        last   ? make(random, dtype, p.rows(), T, D, layout(), plain)
        : scan ? make(random, dtype, p.rows(), T, D, layout(), coefficient)
               : make(random, dtype, p.rows(), T, D, layout(), gate));
  }
  // States are (sequence, width): one "step".
  const auto state = [&] {
    return make(
        random, info_of(dtype).state, S, 1, D,
        any_layout && random.integer(0, 1) ? kSliced : kContiguous, plain);
  };
  if (random.integer(0, 1)) p.initial_state = state();
  if (random.integer(0, 3)) p.grad_h = make(random, dtype, p.rows(), T, D, layout(), plain);
  if (random.integer(0, 1)) p.grad_final_state = state();
  p.skew = random.integer(0, 1) * info_of(dtype).size * random.integer(0, 15);
  return p;
}

// ---- what a driver has yielded ----

struct Result {
  Array h, final_state, grad_initial_state;
  std::vector<Array> grad_inputs;

  bool same_bytes(const Result& other) const {
    bool same = h.same_bytes(other.h) && final_state.same_bytes(other.final_state) &&
                grad_initial_state.same_bytes(other.grad_initial_state);
    for (size_t i = 0; i < grad_inputs.size(); ++i)
      same = same && grad_inputs[i].same_bytes(other.grad_inputs[i]);
    return same;
  }
  bool guards_intact() const {
    bool intact =
        h.guards_intact() && final_state.guards_intact() && grad_initial_state.guards_intact();
    for (const Array& each : grad_inputs) intact = intact && each.guards_intact();
    return intact;
  }
};

// Forward(DiagonalForward), then backward(DiagonalBackward) on its h.
template <class Forward, class Backward>
Result run(const Problem& p, Forward forward, Backward backward) {
  const int64_t count = p.rows() * p.T * p.D;
  Result r;
  r.h = Array(p.dtype, count, true, p.skew);
  const DType state = info_of(p.dtype).state;
  const int64_t state_skew = p.skew / info_of(p.dtype).size * info_of(state).size; // whole elements
  r.final_state = Array(state, p.S * p.D, true, state_skew);
  r.grad_initial_state = Array(state, p.S * p.D, true, state_skew);
  for (int i = 0; i < p.cell.num_inputs; ++i)
    r.grad_inputs.emplace_back(p.dtype, count, true, p.skew);

  DiagonalForward f;
  p.describe(f);
  f.h = r.h.data();
  f.final_state = r.final_state.data();
  forward(f);

  DiagonalBackward b;
  p.describe(b);
  b.h = {r.h.data(), p.T * p.D, p.D, 1};
  b.grad_h = p.grad_h.strided();
  b.grad_final_state = p.grad_final_state.strided();
  for (size_t i = 0; i < r.grad_inputs.size(); ++i) b.grad_inputs[i] = r.grad_inputs[i].data();
  b.grad_initial_state = r.grad_initial_state.data();
  backward(b);

  EXPECT_TRUE(r.guards_intact()) << "writes out of bounds";
  return r;
}

inline ::testing::AssertionResult close(Value got, Value want, double error) {
  if (abs(got - want) <= error) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << got << ", expected " << want << " within " << error;
}

// Compares with the loop over the paper's formulas, and follows how large rounding errors can have become on the way.
// The backward is judged on the h that the forward stored. `every`: looks at every n-th channel and the last ones only.
inline void check(const Problem& p, const Result& r, int64_t every = 1) {
  const DTypeInfo& dtype = info_of(p.dtype);
  const double epsilon = 16 * dtype.state_epsilon; // of one step: gates, product, sum
  const double tiny =
      dtype.state_epsilon > 1e-10 ? 1e-36 : 1e-300; // denormal numbers are flushed to zero
  const auto stored = [&](double error, Value x) {
    return error + dtype.epsilon * (abs(x) + error) + (p.dtype == DType::f16 ? 3e-8 : 0);
  };
  for (int64_t s = 0; s < p.S; ++s) {
    const auto tokens = p.tokens(s);
    for (int64_t d = 0; d < p.D; d += d + 4 < p.D - every ? every : 1) {
      const Value h0 = p.initial_state ? p.initial_state.get(s, 0, d) : Value(0);
      Value h = h0;
      double error = 0;
      std::vector<Step<Value>> step;
      std::vector<double> size; // of what a gate multiplies
      for (const auto& [row, t] : tokens) {
        const auto x = p.input(row, t, d);
        step.push_back(apply(p.cell, x));
        size.push_back(abs(h) + error + abs(x.back()) + 1);
        h = step.back().a * h + step.back().b;
        error = (abs(step.back().a) + epsilon) * error + epsilon * size.back() +
                tiny; // a itself is rounded
        ASSERT_TRUE(close(r.h.get((row * p.T + t) * p.D + d), h, stored(error, h)))
            << "h, s=" << s << " t=" << t << " d=" << d;
      }
      ASSERT_TRUE(close(r.final_state.get(s * p.D + d), h, error))
          << "final_state, s=" << s << " d=" << d;

      Value carry = p.grad_final_state ? p.grad_final_state.get(s, 0, d) : Value(0);
      error = 0;
      for (size_t n = tokens.size(); n-- > 0;) {
        const auto [row, t] = tokens[n];
        const Value dh = (p.grad_h ? p.grad_h.get(row, t, d) : Value(0)) + carry;
        Value before = h0;
        if (n > 0) before = r.h.get((tokens[n - 1].first * p.T + tokens[n - 1].second) * p.D + d);
        for (size_t i = 0; i < p.inputs.size(); ++i) {
          const Value slope = conj(before * step[n].da[i] + step[n].db[i]);
          const double all = error * abs(slope) +
                             epsilon * (abs(dh) + abs(carry) + error) * (size[n] + abs(before)) +
                             tiny;
          ASSERT_TRUE(close(
              r.grad_inputs[i].get((row * p.T + t) * p.D + d), dh * slope, stored(all, dh * slope)))
              << "gradient of input " << i << ", s=" << s << " t=" << t << " d=" << d
              << ", slope=" << abs(slope) << " dh=" << abs(dh) << " error=" << error;
        }
        error = (abs(step[n].a) + epsilon) * error + epsilon * (abs(dh) + abs(carry)) + tiny;
        carry = conj(step[n].a) * dh;
      }
      ASSERT_TRUE(close(r.grad_initial_state.get(s * p.D + d), carry, error))
          << "gradient of initial_state, s=" << s << " d=" << d;
    }
  }
}

// A step on a pool of states: rows in any order, some skipped, written in place. forward(Problem, DiagonalForward) runs it.
template <class Forward>
void check_state_pool(
    Random& random, const CellCase& cell, DType dtype, int64_t width, Forward forward) {
  constexpr int64_t kSlots = 7;
  const std::vector<int64_t> rows = {5, -1, 0, 6, -3};
  const int64_t S = int64_t(rows.size());
  Problem p = draw_problem(random, cell, dtype, S, 1, width, false);
  p.reverse = false;
  p.initial_state = {};
  SCOPED_TRACE(p.text());
  const DType state_dtype = info_of(dtype).state;
  Array pool(state_dtype, kSlots * width, true), h(dtype, S * width, true);
  for (int64_t i = 0; i < pool.count(); ++i) pool.set(i, random.normal());
  const Array before = pool;
  DiagonalForward f;
  p.describe(f);
  f.state_rows = rows.data();
  f.initial_state = {pool.data(), width, 0, 1};
  f.final_state = pool.data();
  f.h = h.data();
  forward(p, f);
  ASSERT_TRUE(h.guards_intact() && pool.guards_intact());
  Array want = before;
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t d = 0; d < width; ++d) {
      if (rows[size_t(s)] < 0) {
        ASSERT_EQ(h.get(s * width + d), Value(0));
        continue;
      }
      const int64_t at = rows[size_t(s)] * width + d;
      const auto x = p.input(s, 0, d);
      const Step<Value> step = apply(cell, x);
      const Value next = step.a * before.get(at) + step.b;
      const DTypeInfo& type = info_of(dtype);
      const double error = 16 * type.state_epsilon * (1 + abs(before.get(at)) + abs(x.back()));
      ASSERT_TRUE(close(h.get(s * width + d), next, error + type.epsilon * (abs(next) + error)));
      ASSERT_TRUE(close(pool.get(at), next, error));
      want.set(at, pool.get(at));
    }
  }
  ASSERT_TRUE(want.same_bytes(pool)) << "a row that no index names has changed";
}

} // namespace torch_ext::test
