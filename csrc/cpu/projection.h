// y = x W^T + bias for a few rows of x: what a decoding step is made of. Such a product takes as long as reading W, if W is
// read as one stream by all threads.
//
// Lanes run along the inputs. As many outputs as a vector has lanes are summed one after the other, their lanes then added
// up all at once. The order of all sums follows from the numbers of inputs and of rows.
#pragma once
#include "diagonal.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class S>
struct ProjectionKernel {
  using Lane = typename Stored<S>::Lane;
  using Wide = Stored<typename Lane::Scalar>;
  static constexpr int kLanes = Lane::kLanes;

  // So many outputs at a time, from places of W far from each other: a core reads several streams faster than one.
  template <int kRows>
  static constexpr int kStreams = kRows <= 2           ? 4
                                  : kVectorBytes == 64 ? 16 / kRows
                                                       : 8 / kRows; // sums in registers
  template <int kRows>
  static constexpr int kChains =
      kRows == 1 ? 2 : 1; // of a sum; its order does not depend on streams

  // kRows rows of x, widened, at x + r * x_step; the outputs begin .. end.
  template <int kRows>
  static void rows(
      const Projection& p, const typename Lane::Scalar* x, int64_t x_step, int64_t row,
      int64_t begin, int64_t end) {
    const int64_t each = (end - begin) / (kStreams<kRows> * kLanes) * kLanes;
    for (int64_t o = begin; o < begin + each; o += kLanes)
      outputs<kRows, kStreams<kRows>>(p, x, x_step, row, o, each, kLanes);
    for (int64_t o = begin + each * kStreams<kRows>; o < end; o += kLanes)
      outputs<kRows, 1>(p, x, x_step, row, o, 0, end - o < kLanes ? int(end - o) : kLanes);
  }
  // The outputs first .. first + some, and those that lie `next` further on, and so on.
  template <int kRows, int kOutputs>
  static void outputs(
      const Projection& p, const typename Lane::Scalar* x, int64_t x_step, int64_t row,
      int64_t first, int64_t next, int some) {
    constexpr int kEach = kChains<kRows>;
    const S *weight = static_cast<const S*>(p.weight), *bias = static_cast<const S*>(p.bias);
    const int64_t inputs = p.inputs, whole = inputs / (kEach * kLanes) * (kEach * kLanes);
    Lane sums[kOutputs][kRows][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      Lane sum[kOutputs][kRows][kEach];
      const S* w[kOutputs];
#pragma GCC unroll 4
      for (int k = 0; k < kOutputs; ++k) {
        w[k] = weight + (first + k * next + i) * p.weight_row;
        for (int r = 0; r < kRows; ++r)
          for (int c = 0; c < kEach; ++c) sum[k][r][c] = Lane(0);
      }
      for (int64_t n = 0; i < some && n < whole; n += kEach * kLanes) {
#pragma GCC unroll 4
        for (int c = 0; c < kEach; ++c) {
          Lane v[kOutputs];
#pragma GCC unroll 4
          for (int k = 0; k < kOutputs; ++k) {
            v[k] = Stored<S>::load(w[k] + n + c * kLanes);
            // Into L2: on its way to L1 a line takes one of the few places that loads wait in. Beyond the array it is
            // harmless.
            __builtin_prefetch(w[k] + n + c * kLanes + 2048 / sizeof(S), 0, 2);
          }
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const Lane from = Wide::load(x + r * x_step + n + c * kLanes);
#pragma GCC unroll 4
            for (int k = 0; k < kOutputs; ++k) sum[k][r][c] = fused(v[k], from, sum[k][r][c]);
          }
        }
      }
      for (int64_t n = whole; i < some && n < inputs; n += kLanes) {
#pragma GCC unroll 4
        for (int k = 0; k < kOutputs; ++k) {
          const Lane v = inputs - n < kLanes ? load_some(w[k] + n, int(inputs - n))
                                             : Stored<S>::load(w[k] + n);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
            sum[k][r][0] = fused(v, Wide::load(x + r * x_step + n), sum[k][r][0]);
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < kOutputs; ++k)
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          for (int c = 1; c < kEach; ++c) sum[k][r][0] = sum[k][r][0] + sum[k][r][c];
          sums[k][r][i] = sum[k][r][0];
        }
    }
    for (int k = 0; k < kOutputs; ++k) {
      const int64_t o = first + k * next;
      for (int r = 0; r < kRows; ++r) {
        Lane y = sums_of(sums[k][r]);
        if (bias) y = y + (some < kLanes ? load_some(bias + o, some) : Stored<S>::load(bias + o));
        S* to = static_cast<S*>(p.y) + (row + r) * p.outputs + o;
        if (some < kLanes) {
          store_some(to, y, some);
        } else {
          Stored<S>::store(to, y);
        }
      }
    }
  }

  static void run(const Projection& p, int64_t begin, int64_t end) {
    using R = typename Lane::Scalar;
    const int64_t step = (p.inputs + kLanes - 1) / kLanes * kLanes;
    Scratch<R> x(p.rows * step);
    for (int64_t r = 0; r < p.rows; ++r) {
      const S* from = static_cast<const S*>(p.x) + r * p.x_row;
      for (int64_t k = 0; k < p.inputs; k += kLanes)
        Wide::store(
            x.data + r * step + k, p.inputs - k < kLanes ? load_some(from + k, int(p.inputs - k))
                                                         : Stored<S>::load(from + k));
    }
    for (int64_t r = 0; r < p.rows;) {
      const R* at = x.data + r * step;
      if (p.rows - r >= 8) {
        rows<8>(p, at, step, r, begin, end), r += 8;
      } else if (p.rows - r >= 4) {
        rows<4>(p, at, step, r, begin, end), r += 4;
      } else if (p.rows - r >= 2) {
        rows<2>(p, at, step, r, begin, end), r += 2;
      } else {
        rows<1>(p, at, step, r, begin, end), r += 1;
      }
    }
  }
};

} // namespace torch_ext::cpu::TORCH_EXT_ISA
