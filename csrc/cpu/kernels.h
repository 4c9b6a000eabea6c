// The table of kernels that one instruction set provides, and the plan by which work is cut into items.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include "../core/causal_conv1d_problem.h"
#include "../core/diagonal_problem.h"
#include "../core/matrix_memory_problem.h"
#include "../core/selective_scan_problem.h"

namespace torch_ext::cpu {

inline constexpr int kMaxCells = 8;

struct Item {
  int64_t sequence, d0, width;
};

// How a call is cut up. Decided from shapes alone, in dispatch.cpp.
struct Plan {
  int64_t block = 0, num_blocks = 0; // channels of an item; the last block may be smaller
  int64_t tile = 0;                  // steps of a tile
  bool sequences_inside =
      false;         // neighbouring items: the same block of the next sequence, not the next block
  bool rows = false; // a tile step by step, not channels by channels
  bool stream = false; // store around the cache; only by rows

  Item item(int64_t i, const DiagonalProblem& p) const {
    const int64_t sequence = sequences_inside ? i % p.num_sequences : i / num_blocks;
    const int64_t d0 = (sequences_inside ? i / p.num_sequences : i % num_blocks) * block;
    return {sequence, d0, p.width - d0 < block ? p.width - d0 : block};
  }
};

using ForwardKernel = void (*)(const DiagonalForward&, const Plan&, int64_t begin, int64_t end);
using BackwardKernel = void (*)(const DiagonalBackward&, const Plan&, int64_t begin, int64_t end);

// How a causal convolution is cut up: groups of rows times blocks of channels. Decided from shapes alone.
struct CausalConv1dPlan {
  int64_t num_rows = 0, group = 0, num_groups = 0; // rows: the tokens of all sequences, end to end
  int64_t block = 0, num_blocks = 0;
  bool stream = false; // store around the cache
  void* shares =
      nullptr; // backward: each group's share of the weight's gradient, (group, window + 1, width)

  struct Item {
    int64_t group, begin, end, d0, width; // rows begin .. end
  };
  Item item(int64_t i, const CausalConv1dProblem& p)
      const { // neighbours: the same channels of the next rows
    const int64_t g = i % num_groups, d0 = i / num_groups * block, begin = g * group;
    return {
        g, begin, num_rows - begin < group ? num_rows : begin + group, d0,
        p.width - d0 < block ? p.width - d0 : block};
  }
};
using CausalConv1dForwardKernel =
    void (*)(const CausalConv1dForward&, const CausalConv1dPlan&, int64_t begin, int64_t end);
using CausalConv1dBackwardKernel =
    void (*)(const CausalConv1dBackward&, const CausalConv1dPlan&, int64_t begin, int64_t end);

// How a selective scan is cut up: a slot is a vector of channels of one group, an item a block of slots and some sequences.
// Backward, blocks and parts follow from shapes alone, as the order of sums depends on them.
struct SelectiveScanPlan {
  int64_t block = 0, blocks_per_group = 0; // slots of a block; the last of a group may be smaller
  int64_t slots_per_group = 0;
  bool columns = false;        // tokens lie side by side: one slot after the other
  bool stream = false;         // forward: checkpoints are stored around the cache
  int64_t parts = 1;           // backward: of the sequences
  int64_t blocks_together = 1; // backward: walked by one thread at once, at most
  // Backward: sums over tokens, slot_bytes of vectors for every part and slot; and sums over channels.
  int64_t slot_bytes = 0;
  void *by_channel = nullptr, *by_token = nullptr;
};
using SelectiveScanForwardKernel =
    void (*)(const SelectiveScanForward&, const SelectiveScanPlan&, int64_t begin, int64_t end);
using SelectiveScanBackwardKernel =
    void (*)(const SelectiveScanBackward&, const SelectiveScanPlan&, int64_t begin, int64_t end);
struct SelectiveScanKernels {
  SelectiveScanForwardKernel forward = nullptr;
  // Over items (part by part, in it block by block), then over slots, and over tokens.
  SelectiveScanBackwardKernel backward = nullptr, reduce_channels = nullptr,
                              reduce_tokens = nullptr;
};

// Numbers of a state's gradient, backward in passes: C in rows of whole cache lines, n, m (a double).
constexpr int64_t matrix_memory_grad_state_size(int64_t key_size, int64_t value_size) {
  return key_size * (matrix_memory_padded(value_size) + 16) + matrix_memory_padded(key_size) + 16;
}
// Of a chunk and a head of a matrix memory, backward: what its queries leave to its keys, its values and the state before
// it.
template <class R>
struct MatrixMemoryWeights {
  static constexpr int64_t kChunk = 64;                 // at most
  alignas(64) R P[kChunk * kChunk], E[kChunk * kChunk]; // of values; of queries and keys
  alignas(64) R d[kChunk], e[kChunk];                   // divisors; gradients of r
  R columns[kChunk];                                    // sums of G o E
  double rows[kChunk], of_m[kChunk]; // what decays meet of these steps; gradients of stabilisers
  double of_last_m; // of the last chunk: what C and n, which are divided by e^m, add to that
  bool each;
};

// How a matrix memory is cut up: an item is a sequence and up to `heads` heads of one group. Backward, the gradients of
// queries and keys of more than one block are added up in order; `heads` follows from shapes alone.
inline constexpr int64_t kMatrixMemoryHeads = 8;
struct MatrixMemoryPlan {
  int64_t chunk = 0,
          few = 0; // steps of a chunk; of sequences up to which the recurrence goes step by step
  // Few heads: states at the starts of all chunks first, an item being `keys` rows of a state; then outputs, an item being
  // one of those of `all` and a chunk. Backward: first what no gradient of a state goes into (gradients of queries), then
  // those gradients, then what they go into.
  enum class Pass { all, states, outputs, queries, values } pass = Pass::all;
  bool stream = false; // kept states and gradients are stored around the cache
  int64_t keys = 0;
  int64_t heads = 1, blocks = 1;                       // of a block; blocks of a group
  int64_t rows = 0;                                    // tokens of all sequences
  void *shares_of_q = nullptr, *shares_of_k = nullptr; // (block, row, group, padded key)
  // Backward in passes, over some chunks at a time: gradients of states, from that at their start to that at their end, and
  // MatrixMemoryWeights.
  int64_t first_chunk = 0, end_chunk = 0;
  void *grad_states = nullptr,
       *weights = nullptr; // (chunk and one more, sequence, head); (chunk, sequence, head)

  struct Item {
    int64_t sequence, block, head, heads;
  };
  Item item(int64_t i, const MatrixMemoryProblem& p) const {
    const int64_t of_group = p.num_heads / p.num_groups, block = i % blocks,
                  group = i / blocks % p.num_groups, first = block * heads;
    return {
        i / blocks / p.num_groups, block, group * of_group + first,
        of_group - first < heads ? of_group - first : heads};
  }
};
using MatrixMemoryForwardKernel =
    void (*)(const MatrixMemoryForward&, const MatrixMemoryPlan&, int64_t begin, int64_t end);
using MatrixMemoryBackwardKernel =
    void (*)(const MatrixMemoryBackward&, const MatrixMemoryPlan&, int64_t begin, int64_t end);
struct MatrixMemoryKernels {
  MatrixMemoryForwardKernel forward = nullptr;
  MatrixMemoryBackwardKernel backward = nullptr, reduce = nullptr; // over items; over rows
};

// y = x W^T + bias: x (rows, inputs) and W (outputs, inputs) with inputs side by side, y (rows, outputs) contiguous.
struct Projection {
  int64_t rows = 0, inputs = 0, outputs = 0, x_row = 0, weight_row = 0;
  const void *x = nullptr, *weight = nullptr, *bias = nullptr; // bias (outputs,); null: zeros
  void* y = nullptr;
};
using ProjectionKernelPointer =
    void (*)(const Projection&, int64_t begin, int64_t end); // over outputs

struct KernelTable {
  const char* name;
  int vector_bytes;
  ForwardKernel forward[kMaxCells]
                       [int(DType::count)]; // by the cell's place in the list; null: no such kernel
  BackwardKernel backward[kMaxCells][int(DType::count)];
  CausalConv1dForwardKernel conv_forward[int(DType::count)];
  CausalConv1dBackwardKernel conv_backward[int(DType::count)];
  void (*copy)(float* to, const float* from, int64_t n, bool stream);
  void (*triad)(float* to, const float* x, const float* y, int64_t n, bool stream);
  void (*exponentials)(float* to, const float* x, int64_t n); // for calibration
  void (*multiply_adds)(float* x, int64_t repeats); // repeats * kMultiplyAdds vector multiply-adds
  SelectiveScanKernels selective_scan[int(DType::count)] = {};
  MatrixMemoryKernels matrix_memory[int(DType::count)] = {};
  ProjectionKernelPointer projection[int(DType::count)] = {};
};
inline constexpr int kMultiplyAdds =
    12; // sums that 16 registers hold, enough to hide their latency

} // namespace torch_ext::cpu
