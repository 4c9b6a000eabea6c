// Which kernel of diagonal.cuh runs how, decided from shapes alone: the same call always adds in the same order.
#include "diagonal.h"

#include "../cells/all.h"
#include "diagonal.cuh"

namespace torch_ext::cuda {
namespace {

int64_t enough_blocks = kEnoughBlocks; // a variable for tests alone

int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }
int64_t aligned(int64_t bytes) { return divide_up(bytes, 256) * 256; }

template <class Walk>
struct Driver {
  using Problem = typename Walk::Problem;
  using Lane = typename Walk::Lane;
  using L = LayoutOf<Walk>;

  static bool is_short(const Problem& p) {
    return p.state_rows || (!p.cu_seqlens && p.num_steps <= kShortSteps);
  }
  static Schedule schedule(const Problem& p) {
    Schedule q;
    q.groups = divide_up(p.width, L::kChannels);
    q.columns = (p.cu_seqlens ? 1 : p.num_sequences) * q.groups;
    q.tiles = divide_up(p.num_steps, L::kTime);
    return q;
  }
  static bool is_chained(const Schedule& q) { return q.columns < enough_blocks && q.tiles > 1; }

  // The parts of the workspace, each aligned; what has to be zero comes first.
  struct Parts {
    int64_t tile_flags, link_flags, zeros, effects, links, bytes;
  };
  static Parts parts(const Schedule& q) {
    const int64_t links = divide_up(q.tiles, kChain), flag = sizeof(int);
    const int64_t row = L::kChannels * int64_t(sizeof(Lane));
    Parts x;
    x.tile_flags = 256; // behind the ticket
    x.link_flags = x.tile_flags + aligned(q.tiles * q.columns * flag);
    x.zeros = x.effects = x.link_flags + aligned(links * q.columns * flag);
    x.links = x.effects + aligned(q.tiles * q.columns * 2 * row);
    x.bytes = x.links + aligned(links * q.columns * row);
    return x;
  }

  static int64_t workspace(const Problem& p) {
    const Schedule q = schedule(p);
    return p.num_sequences * p.width == 0 || is_short(p) || !is_chained(q) ? 0 : parts(q).bytes;
  }

  static void run(const Problem& p, void* workspace, cudaStream_t stream) {
    const int64_t channels = p.num_sequences * p.width;
    if (channels == 0) return;
    const dim3 blocks(unsigned(divide_up(channels, kShortThreads)));
    if (p.cu_seqlens || p.num_steps == 0)
      launch(diagonal_empty_kernel<Walk>, blocks, kShortThreads, 0, stream, p);
    if (p.num_steps == 0) return;
    if (is_short(p))
      return launch(diagonal_short_kernel<Walk>, blocks, kShortThreads, 0, stream, p);
    Schedule q = schedule(p);
    const bool chained = is_chained(q);
    if (chained) {
      const Parts at = parts(q);
      char* const base = static_cast<char*>(workspace);
      zero(base, at.zeros, stream);
      q.chain = {
          reinterpret_cast<unsigned*>(base), reinterpret_cast<int*>(base + at.tile_flags),
          reinterpret_cast<int*>(base + at.link_flags), base + at.effects, base + at.links};
    }
    launch(
        diagonal_tiles_kernel<Walk>, dim3(unsigned(chained ? q.tiles * q.columns : q.columns)),
        L::kThreads, shared_bytes<Walk>(chained), stream, p, q);
  }
};

// f(Driver) of the cell and dtype.
template <template <class, class> class Walk, class F, class... Cell>
void dispatch(Cells<Cell...>, int cell, DType dtype, F f) {
  const auto by_dtype = [&]<class C>(Cells<C>) {
    if (dtype == DType::f32) f(Driver<Walk<C, float>>{});
    if (dtype == DType::f64) f(Driver<Walk<C, double>>{});
    if (dtype == DType::bf16) f(Driver<Walk<C, BFloat16>>{});
    if (dtype == DType::f16) f(Driver<Walk<C, Half>>{});
    if constexpr (C::complex) {
      if (dtype == DType::c64) f(Driver<Walk<C, Complex<float>>>{});
      if (dtype == DType::c128) f(Driver<Walk<C, Complex<double>>>{});
    }
  };
  int i = 0;
  ((i++ == cell ? by_dtype(Cells<Cell>{}) : void()), ...);
}
template <template <class, class> class Walk, class Problem>
int64_t workspace_of(int cell, DType dtype, const Problem& p) {
  int64_t bytes = 0;
  dispatch<Walk>(DiagonalCells{}, cell, dtype, [&](auto driver) { bytes = driver.workspace(p); });
  return bytes;
}
template <template <class, class> class Walk, class Problem>
void run(int cell, DType dtype, const Problem& p, void* workspace, void* stream) {
  dispatch<Walk>(DiagonalCells{}, cell, dtype, [&](auto driver) {
    driver.run(p, workspace, static_cast<cudaStream_t>(stream));
  });
}

} // namespace

int64_t diagonal_workspace(int cell, DType dtype, const DiagonalForward& p) {
  return workspace_of<ForwardWalk>(cell, dtype, p);
}
int64_t diagonal_workspace(int cell, DType dtype, const DiagonalBackward& p) {
  return workspace_of<BackwardWalk>(cell, dtype, p);
}
void diagonal(int cell, DType dtype, const DiagonalForward& p, void* workspace, void* stream) {
  run<ForwardWalk>(cell, dtype, p, workspace, stream);
}
void diagonal(int cell, DType dtype, const DiagonalBackward& p, void* workspace, void* stream) {
  run<BackwardWalk>(cell, dtype, p, workspace, stream);
}

} // namespace torch_ext::cuda
