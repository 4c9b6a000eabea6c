// Products of small matrices by a warp: m16n8k16 with bfloat16 operands and float32 sums, fed from tiles in shared memory.
//
// Fragments (PTX ISA), with g = lane / 4 and i = lane % 4; a word has two neighbours, the first in its low half:
//
//   A, 16 (m) x 16 (k)   r[0] (g, 2i..)   r[1] (g + 8, 2i..)   r[2] (g, 2i + 8..)   r[3] (g + 8, 2i + 8..)     pairs along k
//   B, 16 (k) x 8 (n)    r[0] (2i.., g)   r[1] (2i + 8.., g)                                                  pairs along k
//   D, 16 (m) x 8 (n)    d[0], d[1] (g, 2i), (g, 2i + 1)   d[2], d[3] (g + 8, 2i), (g + 8, 2i + 1)
//
// So two D side by side, 16 x 16, narrowed to pairs, are an A: r[0] = D0 (0, 1), r[1] = D0 (2, 3), r[2] = D1 (0, 1),
// r[3] = D1 (2, 3).
//
// A float32 operand is a sum of kParts bfloat16 ones, each the rounding of what the ones before leave; a product is the
// sum of the products of parts i and j with i + j < kParts: 1, 3 or 6, with the accuracy of about 8, 16 and 24 bits:
// PyTorch's "medium", "high" and "highest". float16 has 11 bits, and is exact in two parts.
#pragma once
#include "device.cuh"

namespace torch_ext::cuda {

// A tile in shared memory: rows of `pitch` elements, part p of kParts at p * part. The pitch is 8 more than a multiple
// of 16, so that eight rows of 16 bytes lie in different banks.
struct MatrixTile {
  Shared<BFloat16> data;
  int pitch, part;
};
constexpr TORCH_EXT_HOST_DEVICE int matrix_tile_pitch(int columns) { return columns + 8; }
// Elements of one part.
constexpr TORCH_EXT_HOST_DEVICE int matrix_tile_size(int rows, int columns) {
  return rows * matrix_tile_pitch(columns);
}

template <int kParts>
struct FragmentA {
  uint32_t r[kParts][4];
};
template <int kParts>
struct FragmentB { // of two neighbouring blocks of 8 columns
  uint32_t r[2][kParts][2];
};

// A(m, k) from a tile (m, k): rows row.., columns k...
template <int kParts>
TORCH_EXT_DEVICE void load_a(FragmentA<kParts>& a, const MatrixTile& x, int row, int k) {
  const int index = (row + lane() % 16) * x.pitch + k + lane() / 16 * 8;
#pragma unroll
  for (int p = 0; p < kParts; ++p) load_matrix_x4(a.r[p], x.data, index + p * x.part);
}
// A(m, k) from a tile (k, m).
template <int kParts>
TORCH_EXT_DEVICE void load_a_transposed(FragmentA<kParts>& a, const MatrixTile& x, int row, int k) {
  const int index = (k + lane() / 16 * 8 + lane() % 8) * x.pitch + row + lane() / 8 % 2 * 8;
#pragma unroll
  for (int p = 0; p < kParts; ++p) load_matrix_x4_transposed(a.r[p], x.data, index + p * x.part);
}
// B(k, n), 16 columns of it, from a tile (n, k).
template <int kParts>
TORCH_EXT_DEVICE void load_b_transposed(
    FragmentB<kParts>& b, const MatrixTile& x, int k, int column) {
  const int index = (column + lane() / 16 * 8 + lane() % 8) * x.pitch + k + lane() / 8 % 2 * 8;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    uint32_t r[4];
    load_matrix_x4(r, x.data, index + p * x.part);
    b.r[0][p][0] = r[0], b.r[0][p][1] = r[1], b.r[1][p][0] = r[2], b.r[1][p][1] = r[3];
  }
}
// B(k, n), 16 columns of it, from a tile (k, n).
template <int kParts>
TORCH_EXT_DEVICE void load_b(FragmentB<kParts>& b, const MatrixTile& x, int k, int column) {
  const int index = (k + lane() % 16) * x.pitch + column + lane() / 16 * 8;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    uint32_t r[4];
    load_matrix_x4_transposed(r, x.data, index + p * x.part);
    b.r[0][p][0] = r[0], b.r[0][p][1] = r[1], b.r[1][p][0] = r[2], b.r[1][p][1] = r[3];
  }
}

// d += a b, for block `half` of b's two. Small products first.
template <int kParts>
TORCH_EXT_DEVICE void multiply(
    float (&d)[4], const FragmentA<kParts>& a, const FragmentB<kParts>& b, int half) {
#pragma unroll
  for (int i = kParts - 1; i >= 0; --i)
#pragma unroll
    for (int j = kParts - 1 - i; j >= 0; --j) mma_m16n8k16(d, a.r[i], b.r[half][j], BFloat16{});
}

TORCH_EXT_DEVICE float low_half(uint32_t pair) { return to_float(BFloat16{uint16_t(pair)}); }
TORCH_EXT_DEVICE float high_half(uint32_t pair) { return to_float(BFloat16{uint16_t(pair >> 16)}); }
// Two neighbours as parts. What is not finite stands in the first part alone.
template <int kParts>
TORCH_EXT_DEVICE void split_pair(float first, float second, uint32_t (&words)[kParts]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    words[p] = pack_pair<BFloat16>(first, second);
    if (p + 1 == kParts) break;
    first -= low_half(words[p]), second -= high_half(words[p]);
    if (!(first - first == 0.f)) first = 0;
    if (!(second - second == 0.f)) second = 0;
  }
}
template <int kParts>
TORCH_EXT_DEVICE void join_pair(const uint32_t (&words)[kParts], float& first, float& second) {
  first = second = 0;
#pragma unroll
  for (int p = kParts - 1; p >= 0; --p) first += low_half(words[p]), second += high_half(words[p]);
}
// The fragment's k-th column times a factor: those of columns 2i, 2i + 1, 2i + 8, 2i + 9. `sums`: of rows g and g + 8,
// what is scaled is added.
template <int kParts>
TORCH_EXT_DEVICE void scale_columns(
    FragmentA<kParts>& a, const float (&factors)[4], float (&sums)[2]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    uint32_t words[kParts];
#pragma unroll
    for (int p = 0; p < kParts; ++p) words[p] = a.r[p][r];
    float first, second;
    join_pair<kParts>(words, first, second);
    first *= factors[r / 2 * 2], second *= factors[r / 2 * 2 + 1];
    sums[r % 2] += first + second;
    split_pair<kParts>(first, second, words);
#pragma unroll
    for (int p = 0; p < kParts; ++p) a.r[p][r] = words[p];
  }
}

} // namespace torch_ext::cuda
