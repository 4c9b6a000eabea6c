// y = x W^T + bias for a few rows of x: what a decoding step is made of. Such a product takes as long as reading W, if W is
// read as one stream by all threads.
//
// Lanes run along the inputs. As many outputs as a vector has lanes are summed one after the other, their lanes then added
// up all at once. The order of all sums follows from the number of inputs.
#pragma once
#include "diagonal.h"

namespace torch_ext::cpu::TORCH_EXT_ISA {

template <class S>
struct ProjectionKernel {
  using Lane = typename Stored<S>::Lane;
  using Wide = Stored<typename Lane::Scalar>;
  static constexpr int kLanes = Lane::kLanes;

  // kRows rows of x, widened, at x + r * x_step; the outputs begin .. end.
  template <int kRows>
  static void rows(
      const Projection& p, const typename Lane::Scalar* x, int64_t x_step, int64_t row,
      int64_t begin, int64_t end) {
    constexpr int kChains = kRows == 1 ? 4 : kRows == 2 ? 2 : 1; // additions on their way at a time
    const S *weight = static_cast<const S*>(p.weight), *bias = static_cast<const S*>(p.bias);
    const int64_t inputs = p.inputs, whole = inputs / (kChains * kLanes) * (kChains * kLanes);
    for (int64_t o = begin; o < end; o += kLanes) {
      const int some = end - o < kLanes ? int(end - o) : kLanes;
      Lane sums[kRows][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        Lane sum[kRows][kChains];
        for (int r = 0; r < kRows; ++r)
          for (int c = 0; c < kChains; ++c) sum[r][c] = Lane(0);
        const S* w = weight + (o + i) * p.weight_row;
        for (int64_t k = 0; i < some && k < whole; k += kChains * kLanes) {
#pragma GCC unroll 4
          for (int c = 0; c < kChains; ++c) {
            const Lane v = Stored<S>::load(w + k + c * kLanes);
            __builtin_prefetch(
                w + k + c * kLanes + 2048 / sizeof(S)); // beyond the array it is harmless
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r)
              sum[r][c] = fused(v, Wide::load(x + r * x_step + k + c * kLanes), sum[r][c]);
          }
        }
        for (int64_t k = whole; i < some && k < inputs; k += kLanes) {
          const Lane v =
              inputs - k < kLanes ? load_some(w + k, int(inputs - k)) : Stored<S>::load(w + k);
          for (int r = 0; r < kRows; ++r)
            sum[r][0] = fused(v, Wide::load(x + r * x_step + k), sum[r][0]);
        }
        for (int r = 0; r < kRows; ++r) {
          for (int c = 1; c < kChains; ++c) sum[r][0] = sum[r][0] + sum[r][c];
          sums[r][i] = sum[r][0];
        }
      }
      for (int r = 0; r < kRows; ++r) {
        Lane y = sums_of(sums[r]);
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
      if (p.rows - r >= 4) {
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
