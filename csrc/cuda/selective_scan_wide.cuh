// The selective scan as nearly all calls are: 16 real states, B and C per token, one sequence per row, no pool, and work
// enough for all blocks. What selective_scan.cuh does, with its words and its steps (cells/selective_scan.h); but a thread
// loads 16 bytes at a time, which lie along channels or along time, and what is known here is not asked for: forward a lane
// has eight states of two channels, so that what it loads of B and C serves twice; backward four lanes share a channel.
#pragma once
#include "selective_scan.cuh"

namespace torch_ext::cuda {

// ---- forward ----

// A real number that never has a positive product with a time step: exp2 needs no bound on that. The states of a scan_step
// where all of A and all time steps say so.
struct Falling {
  float x;
  friend TORCH_EXT_DEVICE Falling decay(float time_step, Falling A) {
    return {exp2_bounded(time_step * A.x)};
  }
  friend TORCH_EXT_DEVICE Falling fused(Falling x, Falling y, Falling z) {
    return {torch_ext::fused(x.x, y.x, z.x)};
  }
  friend TORCH_EXT_DEVICE Falling scaled(float x, Falling y) { return {x * y.x}; }
};
template <bool kFalls>
TORCH_EXT_DEVICE ScanStep<float, float> next_state(
    float time_step, float input, float A, float B, float h) {
  if constexpr (kFalls) {
    const ScanStep<float, Falling> s =
        scan_step(time_step, input, Falling{A}, Falling{B}, Falling{h});
    return {s.decay.x, s.h.x};
  } else {
    return scan_step(time_step, input, A, B, h);
  }
}

// Where a tile's (step, channel) elements lie, for 16 states, B and C per token and one sequence per row. A thread loads
// 16 bytes that lie side by side: channels of one step, or steps of one channel. kShare channels share 16 bytes of shared
// memory, a slot, for what goes into the steps and then for what comes out. Slots are in such an order that what threads
// write at once falls on all banks.
template <class Types, int kShare>
struct ScanWide {
  using S = typename Types::S;
  using R = typename Types::R;
  static constexpr int kStates = 16, kVector = 16 / int(sizeof(S)), kLogChannels = 7,
                       kChannels = 1 << kLogChannels, kSlots = kChannels / kShare;
  static constexpr int kVectors = kScanTile / kVector;       // of a thread
  static constexpr int kAhead = kVectors < 2 ? kVectors : 2; // of them on their way at once
  static constexpr int kRows =
      kScanTile / kVectors; // steps that all threads load at once, where channels lie side by side
  static constexpr int kNextSlot =
      kSlots / (kVector / kShare); // and how far a vector's slots are from each other
  static_assert(kChannels == kScanThreads && kRows == kVector);
  using Vector = SideBySide<S>;

  bool along_time;
  TORCH_EXT_DEVICE int slot_of(int channel) const {
    const int i = channel / kShare;
    return along_time ? i : i % (kVector / kShare) * kNextSlot + channel / kVector;
  }
  TORCH_EXT_DEVICE int channel_of(int slot) const {
    const int i = along_time ? slot : slot % kNextSlot * (kVector / kShare) + slot / kNextSlot;
    return i * kShare;
  }
  // Of a thread's vectors.
  template <bool kTime>
  TORCH_EXT_DEVICE static int step(int vector) {
    return kTime ? vector * kVector : int(threadIdx.x) / (kChannels / kVector) + vector * kRows;
  }
  template <bool kTime>
  TORCH_EXT_DEVICE static int channel() {
    return kTime ? int(threadIdx.x) : int(threadIdx.x) % (kChannels / kVector) * kVector;
  }
  // Can an array be loaded so, from this channel on?
  template <class Data>
  TORCH_EXT_DEVICE bool fits(
      const OverTime<Data>& x, const SelectiveScanProblem& p, int64_t d0) const {
    constexpr int64_t kMost = 1 << 24; // of a stride, for offsets of 32 bits inside a tile
    const int64_t side = along_time ? x.time : x.channel, far = along_time ? x.channel : x.time;
    return !x.data ||
           (side == 1 && !(along_time && p.reverse) && far % kVector == 0 &&
            x.sequence % kVector == 0 && kMost > far && kMost > -far &&
            reinterpret_cast<uintptr_t>(static_cast<const S*>(x.data) + d0 * x.channel) % 16 == 0);
  }
  // From a tile's first element to the thread's first, and from there to its next one.
  template <class Data>
  TORCH_EXT_DEVICE int first(const OverTime<Data>& x, int direction) const {
    return along_time ? channel<true>() * int(x.channel)
                      : step<false>(0) * direction * int(x.time) + channel<false>();
  }
  template <class Data>
  TORCH_EXT_DEVICE int next(const OverTime<Data>& x, int direction) const {
    return along_time ? kVector : kRows * direction * int(x.time);
  }
  // Of each of a vector's elements the channel's value.
  template <bool kTime>
  TORCH_EXT_DEVICE static void load_values(Shared<R> values, R* to) {
    if constexpr (kTime) {
      const R x = values.load(channel<true>());
#pragma unroll
      for (int j = 0; j < kVector; ++j) to[j] = x;
    } else {
#pragma unroll
      for (int j = 0; j < kVector; j += Pack<R>::kSize) {
        const Pack<R> x =
            (values + channel<false>()).template view<Pack<R>>().load(j / Pack<R>::kSize);
#pragma unroll
        for (int i = 0; i < Pack<R>::kSize; ++i) to[j + i] = x.x[i];
      }
    }
  }
};
// A thread's vectors of a tile of an array.
template <class Wide, class Data>
struct ScanVectors {
  using S = typename Wide::S;
  using Vector = typename Wide::Vector;
  using Number = std::conditional_t<std::is_const_v<std::remove_pointer_t<Data>>, const S, S>;
  Number* at = nullptr;
  int next = 0;
  ScanVectors() = default;
  // tile: where the tile begins. Not for arrays that are not there.
  TORCH_EXT_DEVICE ScanVectors(
      const Wide& wide, const OverTime<Data>& x, const SelectiveScanProblem& p, Number* tile) {
    const int direction = p.reverse ? -1 : 1;
    at = tile + wide.first(x, direction), next = wide.next(x, direction);
  }
  TORCH_EXT_DEVICE static Number* tile(
      const OverTime<Data>& x, int64_t sequence, int64_t token, int64_t d0) {
    if (!x.data) return nullptr;
    return static_cast<Number*>(x.data) + sequence * x.sequence + token * x.time + d0 * x.channel;
  }
  TORCH_EXT_DEVICE Vector load(int k) const {
    return load_global(reinterpret_cast<const Vector*>(at + k * next));
  }
  TORCH_EXT_DEVICE void store(int k, const typename Wide::R* x) const {
    store_global(reinterpret_cast<Vector*>(at + k * next), Vector::narrow(x));
  }
  TORCH_EXT_DEVICE void next_tile() { at += Wide::kVectors * next; }
};

// A tile of B and C into shared memory, (step, state). Half of the threads load B, and half C: four states each.
template <class Types>
struct ScanWideCoefficients {
  using S = typename Types::S;
  using R = typename Types::R;
  const S* at = nullptr;
  bool vectors; // do they lie so?
  TORCH_EXT_DEVICE static bool loads_C() {
    return recomputed(int(threadIdx.x)) >= kScanThreads / 2;
  }
  TORCH_EXT_DEVICE static int item() { return recomputed(int(threadIdx.x)) % (kScanThreads / 2); }
  TORCH_EXT_DEVICE ScanWideCoefficients(
      const SelectiveScanProblem& p, int64_t row, int64_t group, int64_t token) {
    const int direction = p.reverse ? -1 : 1;
    const auto fits = [](const Coefficient<const void*>& x) {
      return x.state == 1 && x.time % 4 == 0 && x.sequence % 4 == 0 && x.group % 4 == 0 &&
             reinterpret_cast<uintptr_t>(x.data) % (4 * sizeof(S)) == 0;
    };
    const auto start = [&](const Coefficient<const void*>& x) {
      return static_cast<const S*>(x.data) + row * x.sequence + group * x.group +
             (token + item() / 4 * direction) * x.time + item() % 4 * 4;
    };
    vectors = fits(p.B) && fits(p.C);
    if (!vectors) return;
    if (loads_C())
      at = start(p.C);
    else
      at = start(p.B);
  }
  TORCH_EXT_DEVICE void stage(
      const SelectiveScanProblem& p, const ScanBlock& block, const auto& token, int count,
      Shared<R> B, Shared<R> C) const {
    if (vectors && count == kScanTile) {
      const auto x = load_global(reinterpret_cast<const SideBySide<S, 4 * sizeof(S)>*>(at));
      (loads_C() ? C : B)
          .template view<Pack<R>>()
          .store(item(), {x.widen(0), x.widen(1), x.widen(2), x.widen(3)});
    } else {
      ScanCoefficient<Types>{p.B, B}.stage(p, block.row(), token(), count, block.group(), 0, 4);
      ScanCoefficient<Types>{p.C, C}.stage(p, block.row(), token(), count, block.group(), 0, 4);
    }
  }
  TORCH_EXT_DEVICE void advance(const SelectiveScanProblem& p, int steps) {
    if (vectors) at += (p.reverse ? -steps : steps) * (loads_C() ? p.C.time : p.B.time);
  }
};

template <class Types>
TORCH_EXT_HOST_DEVICE int scan_wide_shared() {
  using Wide = ScanWide<Types, 2>;
  return 2 * kScanTile * Wide::kStates * int(sizeof(float)) + kScanTile * Wide::kSlots * 16 +
         2 * Wide::kChannels * int(sizeof(float)) + int(ScanBlock::kWords) * int(sizeof(int64_t));
}

// So many blocks share a multiprocessor's registers. Turing's code needs some more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr int kScanWideBlocks = 2;
#else
inline constexpr int kScanWideBlocks = 4;
#endif

// Two lanes share two channels, each with eight states of both: what they load of B and C is used twice.
template <class Types>
__global__ void __launch_bounds__(kScanThreads, kScanWideBlocks)
    selective_scan_wide_kernel(const SelectiveScanForward p, const ScanPlan q) {
  using S = typename Types::S;
  using R = typename Types::R;
  using Wide = ScanWide<Types, 2>;
  using Vector = typename Wide::Vector;
  using Four = Pack<R>;
  static_assert(Four::kSize == 4);
  struct alignas(8) Two {
    R x[2];
  };
  constexpr int kStates = Wide::kStates, kSlots = Wide::kSlots, kVector = Wide::kVector;
  const int thread = int(threadIdx.x);
  const Shared<R> Bs = shared_memory<R>(), Cs = Bs + kScanTile * kStates;
  const Shared<Four> slots = (Cs + kScanTile * kStates).template view<Four>();
  const Shared<R> bias = (slots + kScanTile * kSlots).template view<R>(),
                  skip = bias + Wide::kChannels;
  const ScanBlock block(p, q, q.segments, (skip + Wide::kChannels).template view<int64_t>());
  const int64_t d0 = block.d0(), row = block.row();
  const int channels = block.channels();
  {
    const bool in = thread < channels;
    const auto get = [&](const OverChannels<const void*>& x) {
      return in && x.data ? load_global(static_cast<const R*>(x.data) + (d0 + thread) * x.channel)
                          : R(0);
    };
    bias.store(thread, get(p.delta_bias)), skip.store(thread, get(p.D));
  }
  const Wide wide{runs_along_time(p.delta)};
  const bool vectors = channels == Wide::kChannels && wide.fits(p.u, p, d0) &&
                       wide.fits(p.delta, p, d0) && wide.fits(p.z, p, d0) &&
                       wide.fits(p.out, p, d0);
  // ---- where the segment lies ----
  const int64_t begin = block.segment() * q.segment_steps, left = p.num_steps - begin,
                steps = left < q.segment_steps ? left : q.segment_steps;
  int tiles = int((steps + kScanTile - 1) / kScanTile);
  const int all_tiles = tiles, last_count = int(steps - int64_t(tiles - 1) * kScanTile);
  const auto token = [&] { // of the tile's first step; found again where it is wanted: seldom
    const int64_t step = block.segment() * q.segment_steps + int64_t(all_tiles - tiles) * kScanTile;
    return p.reverse ? p.num_steps - 1 - step : step;
  };
  using Read = ScanVectors<Wide, const void*>;
  using Write = ScanVectors<Wide, void*>;
  const bool gate = p.z.data;
  Read delta, u, z;
  Write out;
  if (vectors) {
    const auto read = [&](const OverTime<const void*>& x) {
      return Read(wide, x, p, Read::tile(x, row, token(), d0));
    };
    delta = read(p.delta), u = read(p.u);
    if (gate) z = read(p.z);
    out = Write(wide, p.out, p, Write::tile(p.out, row, token(), d0));
  }
  ScanWideCoefficients<Types> coefficients(p, row, block.group(), token());

  // ---- states ----
  const int half = thread & 1, my_slot = thread >> 1, c0 = wide.channel_of(my_slot);
  R A[2][8], h[2][8];
  const auto load = [&](R(*to)[8], const auto& from, int64_t r) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const Four x = from.load(r, block.d0() + c0 + c, half * 8 + v * 4, c0 + c < channels);
#pragma unroll
        for (int j = 0; j < 4; ++j) to[c][v * 4 + j] = x.x[j];
      }
    }
  };
  const auto store = [&](const ScanStates<R, void*>& to, int64_t r) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        Four x;
#pragma unroll
        for (int j = 0; j < 4; ++j) x.x[j] = h[c][v * 4 + j];
        to.store(r, block.d0() + c0 + c, half * 8 + v * 4, c0 + c < channels, x);
      }
    }
  };
  load(A, ScanStates<R, const void*>(p.A, kStates), 0);
  bool falls = p.delta_softplus;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    A[i / 8][i % 8] = torch_ext::in_octaves(A[i / 8][i % 8]);
    falls = falls && A[i / 8][i % 8] <= R(0);
  }
  falls = ballot(~0u, falls) == ~0u;
  if (block.segment() == 0)
    load(h, ScanStates<R, const void*>(p.initial_state, kStates), row);
  else
    load(h, dense_states<R>(q.carry, p.width, kStates), row * q.segments + block.segment());
  R* kept = nullptr;
  if (p.checkpoints)
    kept = static_cast<R*>(p.checkpoints) +
           ((row * ((p.num_steps + kScanTile - 1) / kScanTile) + begin / kScanTile) * p.width + d0 +
            c0) *
               kStates +
           half * 8;

  // Of this tile, steps t .. t + kSteps.
  const auto walk = [&]<bool kFalls, int kSteps>(int t) __attribute__((always_inline)) {
    const Shared<Four> items = slots + (t * kSlots + my_slot);
    const Shared<Four> b_at = Bs.template view<Four>() + (t * 4 + half * 2),
                       c_at = Cs.template view<Four>() + (t * 4 + half * 2);
    Two y[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const Four item = items.load(i * kSlots);
      y[i] = {};
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const Four b = b_at.load(i * 4 + v), cc = c_at.load(i * 4 + v);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            R& state = h[c][v * 4 + j];
            state =
                next_state<kFalls>(item.x[2 * c], item.x[2 * c + 1], A[c][v * 4 + j], b.x[j], state)
                    .h;
            y[i].x[c] = add_real(state, cc.x[j], y[i].x[c]);
          }
        }
      }
    }
    warp_sync(); // the pair of lanes has read what it writes over
    const Shared<Two> ys = items.template view<Two>() + half;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) ys.store(i * kSlots * 2, y[i]);
  };

  block_sync();
#pragma unroll 1
  for (; tiles > 0; --tiles) {
    const int count = tiles == 1 ? last_count : kScanTile;
    const bool whole = vectors && count == kScanTile;
    const auto fill = [&]<bool kTime>() __attribute__((always_inline)) {
      const int slot = wide.slot_of(Wide::template channel<kTime>());
#pragma unroll 1
      for (int first = 0; first < Wide::kVectors; first += Wide::kAhead) {
        Vector deltas[Wide::kAhead], us[Wide::kAhead];
#pragma unroll
        for (int k = 0; k < Wide::kAhead; ++k)
          deltas[k] = delta.load(first + k), us[k] = u.load(first + k);
#pragma unroll
        for (int k = 0; k < Wide::kAhead; ++k) {
          R dt[kVector];
          Wide::template load_values<kTime>(bias, dt);
#pragma unroll
          for (int j = 0; j < kVector; ++j) dt[j] = deltas[k].widen(j) + dt[j];
          if (p.delta_softplus) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) dt[j] = time_step(dt[j], true);
          }
          const Shared<Four> to = slots + (Wide::template step<kTime>(first + k) * kSlots + slot);
          if constexpr (kTime) {
            const Shared<Two> half = to.template view<Two>() + thread % 2;
#pragma unroll
            for (int j = 0; j < kVector; ++j)
              half.store(j * kSlots * 2, {dt[j], dt[j] * us[k].widen(j)});
          } else {
#pragma unroll
            for (int j = 0; j < kVector; j += 2)
              to.store(
                  j / 2 * Wide::kNextSlot,
                  {dt[j], dt[j] * us[k].widen(j), dt[j + 1], dt[j + 1] * us[k].widen(j + 1)});
          }
        }
      }
    };
    if (whole && wide.along_time) {
      block_sync(); // all have read what stands in shared memory
      fill.template operator()<true>();
    } else if (whole) { // only what the thread has read itself
      fill.template operator()<false>();
    } else {
      block_sync(); // all have read what stands in shared memory
      const ScanItems items(Wide::kLogChannels, wide.along_time);
      ScanCursor<const S> delta(p.delta, p, block.row(), token(), block.d0(), items),
          u(p.u, p, block.row(), token(), block.d0(), items);
      int t = items.t, c = items.column;
#pragma unroll 1
      for (int i = 0; i < items.count; i += kScanAhead) {
        R step[kScanAhead], input[kScanAhead];
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          const bool in = t + k * items.t_next < count && c + k * items.column_next < channels;
          step[k] = delta.load(in), input[k] = u.load(in);
          delta.advance(), u.advance();
        }
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          const R dt = t < count ? time_step(step[k] + bias.load(c), p.delta_softplus) : R(0);
          (slots + (t * kSlots + wide.slot_of(c)))
              .template view<Two>()
              .store(c % 2, {dt, dt * input[k]});
          t += items.t_next, c += items.column_next;
        }
      }
    }
    coefficients.stage(p, block, token, count, Bs, Cs);
    if (p.checkpoints) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (c0 + i / 2 < channels) {
          Four x;
#pragma unroll
          for (int j = 0; j < 4; ++j) x.x[j] = h[i / 2][i % 2 * 4 + j];
          store_global(reinterpret_cast<Four*>(kept + i / 2 * kStates + i % 2 * 4), x);
        }
      }
      kept += p.width * kStates;
    }
    block_sync();
    constexpr int kAtOnce = 4;
    if (falls && count == kScanTile) {
#pragma unroll 1
      for (int t = 0; t < kScanTile; t += kAtOnce) walk.template operator()<true, kAtOnce>(t);
    } else {
      const int many = count / kAtOnce * kAtOnce;
#pragma unroll 1
      for (int t = 0; t < many; t += kAtOnce) walk.template operator()<false, kAtOnce>(t);
#pragma unroll 1
      for (int t = many; t < count; ++t) walk.template operator()<false, 1>(t);
    }
    block_sync();
    const auto finish = [&]<bool kTime>() __attribute__((always_inline)) {
      const int slot = wide.slot_of(Wide::template channel<kTime>());
#pragma unroll 1
      for (int first = 0; first < Wide::kVectors; first += Wide::kAhead) {
        Vector us[Wide::kAhead], gates[Wide::kAhead];
#pragma unroll
        for (int k = 0; k < Wide::kAhead; ++k) {
          us[k] = u.load(first + k);
          if (gate) gates[k] = z.load(first + k);
        }
#pragma unroll
        for (int k = 0; k < Wide::kAhead; ++k) {
          const Shared<Four> from = slots + (Wide::template step<kTime>(first + k) * kSlots + slot);
          R y[kVector], D[kVector];
          if constexpr (kTime) {
            const Shared<R> own = from.template view<R>() + thread % 2;
#pragma unroll
            for (int j = 0; j < kVector; ++j)
              y[j] = own.load(j * kSlots * 4) + own.load(j * kSlots * 4 + 2);
          } else {
#pragma unroll
            for (int j = 0; j < kVector; j += 2) {
              const Four parts = from.load(j / 2 * Wide::kNextSlot);
              y[j] = parts.x[0] + parts.x[2], y[j + 1] = parts.x[1] + parts.x[3];
            }
          }
          Wide::template load_values<kTime>(skip, D);
#pragma unroll
          for (int j = 0; j < kVector; ++j) y[j] = fused(D[j], us[k].widen(j), y[j]);
          if (gate) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) y[j] = y[j] * silu(gates[k].widen(j));
          }
          out.store(first + k, y);
        }
      }
      delta.next_tile(), u.next_tile(), out.next_tile();
      if (gate) z.next_tile();
    };
    if (whole && wide.along_time) {
      finish.template operator()<true>();
    } else if (whole) {
      finish.template operator()<false>();
    } else {
      const ScanItems items(Wide::kLogChannels, wide.along_time);
      ScanCursor<const S> u(p.u, p, block.row(), token(), block.d0(), items),
          z(p.z, p, block.row(), token(), block.d0(), items);
      ScanCursor<S> out(p.out, p, block.row(), token(), block.d0(), items);
      int t = items.t, c = items.column;
#pragma unroll 1
      for (int i = 0; i < items.count; i += kScanAhead) {
        R x[kScanAhead], gate[kScanAhead];
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          const bool in = t + k * items.t_next < count && c + k * items.column_next < channels;
          x[k] = u.load(in), gate[k] = z.load(in && z.any);
          u.advance(), z.advance();
        }
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          if (t < count && c < channels) {
            const Four parts = slots.load(t * kSlots + wide.slot_of(c));
            const R sum = c % 2 ? parts.x[1] + parts.x[3] : parts.x[0] + parts.x[2];
            R y = fused(skip.load(c), x[k], sum);
            if (z.any) y = y * silu(gate[k]);
            out.store(y);
          }
          t += items.t_next, c += items.column_next;
          out.advance();
        }
      }
    }
    coefficients.advance(p, kScanTile);
  }
  if (block.segment() == q.segments - 1)
    store(ScanStates<R, void*>(p.final_state, kStates), block.row());
}

// Thread by thread a state of a row: from what segments do, the state that reaches each of them.
template <class Types, bool kBack, class Problem>
__global__ void __launch_bounds__(kScanThreads)
    selective_scan_fold_kernel(const Problem p, const ScanPlan q) {
  using R = typename Types::R;
  using H = typename Types::H;
  const int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x, own = p.width * p.num_states;
  if (i >= q.rows * own) return;
  const int64_t row = i / own, state = i % own, d = state / p.num_states, n = state % p.num_states;
  const H A = torch_ext::in_octaves(
      load_global(static_cast<const H*>(p.A.data) + d * p.A.channel + n * p.A.state));
  H running{};
#pragma unroll 4
  for (int64_t k = 0; k < q.segments; ++k) {
    const int64_t at = row * q.segments + (kBack ? q.segments - 1 - k : k);
    H* const slot = static_cast<H*>(q.carry) + at * own + state;
    if (k + 1 == q.segments) return store_global(slot, running);
    const H effect = load_global(slot);
    H a = decay(load_global(static_cast<const R*>(q.sums) + at * p.width + d), A);
    if (kBack) a = conj(a);
    store_global(slot, running);
    running = load_global(q.restarts + at) ? effect : fused(a, running, effect);
  }
}

// Sequences without a step: what starts is what is left. A thread per state.
template <class Types, class Problem>
__global__ void __launch_bounds__(kScanThreads) selective_scan_empty_kernel(const Problem p) {
  using H = typename Types::H;
  const int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x, own = p.width * p.num_states;
  if (i >= p.num_sequences * own) return;
  const int64_t s = i / own, d = i % own / p.num_states, n = i % p.num_states;
  if (p.num_steps > 0 && p.cu_seqlens[s] < p.cu_seqlens[s + 1]) return;
  const auto copy = [&](const OverStates<const void*>& from, const OverStates<void*>& to) {
    if (!to.data) return;
    const H x = from.data ? load_global(
                                static_cast<const H*>(from.data) + s * from.row + d * from.channel +
                                n * from.state)
                          : H{};
    store_global(static_cast<H*>(to.data) + s * to.row + d * to.channel + n * to.state, x);
  };
  if constexpr (requires { p.grad_out; })
    copy(p.grad_final_state, p.grad_initial_state);
  else
    copy(p.initial_state, p.final_state);
}

// ---- backward ----

// Shared memory, in bytes from its start.
template <class Types>
struct ScanWideBackward {
  using Wide = ScanWide<Types, 1>;
  static constexpr int kLanes = 4, kTurns = Wide::kChannels * kLanes / kScanThreads;
  static constexpr int kCoefficient = kScanTile * Wide::kStates * 4,
                       kPerThread = kTurns * kScanThreads * 16;
  static constexpr int kB = 0, kC = kB + kCoefficient, kSlots = kC + kCoefficient,
                       kA = kSlots + kScanTile * Wide::kSlots * 16,
                       kGradH = kA + Wide::kChannels * Wide::kStates * 4,
                       kGradA = kGradH + kPerThread, kWarps = kGradA + kPerThread,
                       kBias = kWarps + kScanWarps * 2 * kScanHalf * Wide::kStates * 4,
                       kSkip = kBias + Wide::kChannels * 4, kPlace = kSkip + Wide::kChannels * 4,
                       kTiles = kPlace + int(ScanBlock::kWords) * 8, kBytes = kTiles + 9 * 8;
};

// What the backward reads of a tile that is not whole, or does not lie so that vectors could be loaded: a thread's elements,
// one after the other.
template <class Types>
struct ScanBackwardItems : ScanItems {
  using S = typename Types::S;
  using R = typename Types::R;
  const SelectiveScanBackward& p;
  int64_t row, token, d0;
  ScanCursor<const S> delta, u, z, grad;
  TORCH_EXT_DEVICE ScanBackwardItems(
      const SelectiveScanBackward& p, const ScanBlock& block, int64_t token, bool along_time)
      : ScanItems(ScanWideBackward<Types>::Wide::kLogChannels, along_time),
        p(p),
        row(block.row()),
        token(token),
        d0(block.d0()),
        delta(cursor<const S>(p.delta)),
        u(cursor<const S>(p.u)),
        z(cursor<const S>(p.z)),
        grad(cursor<const S>(p.grad_out)) {}
  template <class Element, class Data>
  TORCH_EXT_DEVICE ScanCursor<Element> cursor(const OverTime<Data>& x) const {
    return {x, p, row, token, d0, *this};
  }
  // The next ones; zeros where there are none.
  template <int kCount>
  TORCH_EXT_DEVICE void load(
      int steps, int channels, R (&deltas)[kCount], R (&us)[kCount], R (&gates)[kCount],
      R (&grads)[kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const bool in = t + k * t_next < steps && column + k * column_next < channels;
      deltas[k] = delta.load(in), us[k] = u.load(in);
      gates[k] = z.load(in && z.any), grads[k] = grad.load(in && grad.any);
      delta.advance(), u.advance(), z.advance(), grad.advance();
    }
  }
  TORCH_EXT_DEVICE void advance() { t += t_next, column += column_next; }
};

// Four lanes share a channel, and a block's channels come in four turns.
template <class Types>
__global__ void __launch_bounds__(kScanThreads, 2)
    selective_scan_wide_backward_kernel(const SelectiveScanBackward p, const ScanPlan q) {
  using S = typename Types::S;
  using R = typename Types::R;
  using At = ScanWideBackward<Types>;
  using Wide = typename At::Wide;
  using Vector = typename Wide::Vector;
  using Four = Pack<R>;
  static_assert(Four::kSize == 4);
  struct alignas(8) Two {
    R x[2];
  };
  constexpr int kStates = Wide::kStates, kSlots = Wide::kSlots, kVector = Wide::kVector,
                kHalf = kScanHalf, kLanes = At::kLanes, kAtOnce = kScanThreads / kLanes;
  const int thread = int(threadIdx.x), my_lane = thread % kLanes;
  const Shared<R> Bs = shared_memory<R>(At::kB), Cs = shared_memory<R>(At::kC),
                  bias = shared_memory<R>(At::kBias), skip = shared_memory<R>(At::kSkip),
                  warps = shared_memory<R>(At::kWarps);
  // Of a slot: time step, input, gradient of y; then time step, gradient of the input, gradient of the time step through the
  // decays, y; and in the end a channel's sums of the gradients of D and the bias.
  const Shared<Four> slots = shared_memory<Four>(At::kSlots);
  const Shared<Four> packs_of_A = shared_memory<Four>(At::kA) + thread,
                     own_h = shared_memory<Four>(At::kGradH) + thread,
                     own_A = shared_memory<Four>(At::kGradA) + thread;
  const ScanBlock block(p, q, q.segments, shared_memory<int64_t>(At::kPlace));
  const int64_t d0 = block.d0(), row = block.row();
  const auto part = [&] { return block.row() * q.segments + block.segment(); };
  const int channels = block.channels();
  const bool in_block = thread < channels;
  {
    const auto get = [&](const OverChannels<const void*>& x) {
      return in_block && x.data
                 ? load_global(static_cast<const R*>(x.data) + (d0 + thread) * x.channel)
                 : R(0);
    };
    bias.store(thread, get(p.delta_bias)), skip.store(thread, get(p.D));
  }
  const Wide wide{runs_along_time(p.delta)};
  const bool gate = p.z.data;
  // ---- what a lane has of each turn's channel ----
  const auto slot_of_turn = [&](int turn) { return turn * kAtOnce + thread / kLanes; };
  const auto over_turns = [&](auto f) { // f(turn, channel)
#pragma unroll 1
    for (int turn = 0; turn < At::kTurns; ++turn) f(turn, wide.channel_of(slot_of_turn(turn)));
  };
  bool falls = p.delta_softplus;
  {
    const ScanStates<R, const void*> A(p.A, kStates), last(p.grad_final_state, kStates);
    const ScanStates<R, void*> carry = dense_states<R>(q.carry, p.width, kStates);
    over_turns([&](int turn, int c) {
      const bool there = c < channels;
      const Four a = in_octaves(A.load(0, d0 + c, my_lane * 4, there));
#pragma unroll
      for (int j = 0; j < 4; ++j) falls = falls && a.x[j] <= R(0);
      packs_of_A.store(turn * kScanThreads, a);
      own_A.store(turn * kScanThreads, Four{});
      own_h.store(
          turn * kScanThreads, block.segment() == q.segments - 1
                                   ? last.load(row, d0 + c, my_lane * 4, there)
                                   : carry.load(part(), d0 + c, my_lane * 4, there));
    });
  }
  falls = ballot(~0u, falls) == ~0u;

  // ---- where the segment's last tile lies ----
  const int64_t begin = block.segment() * q.segment_steps, left = p.num_steps - begin,
                steps = left < q.segment_steps ? left : q.segment_steps;
  int tiles = int((steps + kScanTile - 1) / kScanTile);
  int count = int(steps - int64_t(tiles - 1) * kScanTile);
  const int direction = p.reverse ? -1 : 1;
  const int64_t last_step = begin + int64_t(tiles - 1) * kScanTile;
  const auto token = [&] { // of the tile's first step; found again where it is wanted: seldom
    const int64_t step = block.segment() * q.segment_steps + int64_t(tiles - 1) * kScanTile;
    return p.reverse ? p.num_steps - 1 - step : step;
  };
  const bool vectors = channels == Wide::kChannels && wide.fits(p.u, p, d0) &&
                       wide.fits(p.delta, p, d0) && wide.fits(p.z, p, d0) &&
                       wide.fits(p.grad_out, p, d0) && wide.fits(p.grad_u, p, d0) &&
                       wide.fits(p.grad_delta, p, d0) && wide.fits(p.grad_z, p, d0);
  // Where arrays' tiles begin, in shared memory.
  enum { kDelta, kU, kZ, kGrad, kGradU, kGradDelta, kGradZ, kGradB, kGradC, kArrays };
  const Shared<int64_t> tile_of = shared_memory<int64_t>(At::kTiles);
  using Read = ScanVectors<Wide, const void*>;
  using Write = ScanVectors<Wide, void*>;
  if (thread == 0) {
    const auto put = [&](int i, const auto* at) {
      tile_of.store(i, int64_t(reinterpret_cast<uintptr_t>(at)));
    };
    const auto reads = [&](int i, const OverTime<const void*>& x) {
      put(i, Read::tile(x, row, token(), d0));
    };
    const auto writes = [&](int i, const OverTime<void*>& x) {
      put(i, Write::tile(x, row, token(), d0));
    };
    reads(kDelta, p.delta), reads(kU, p.u), reads(kZ, p.z), reads(kGrad, p.grad_out);
    for (int which = 0; which < 2; ++which) // sums over the block's channels
      put(kGradB + which,
          (which ? p.grad_C.data : p.grad_B.data)
              ? static_cast<R*>(q.by_token) +
                    ((((which * q.blocks_per_group + block.block_of_group()) * q.rows + row) *
                          p.num_steps +
                      token()) *
                         p.num_groups +
                     block.group()) *
                        kStates
              : nullptr);
    writes(kGradU, p.grad_u), writes(kGradDelta, p.grad_delta), writes(kGradZ, p.grad_z);
  }
  const auto read = [&](const OverTime<const void*>& x, int i) {
    return !x.data ? Read()
                   : Read(wide, x, p, reinterpret_cast<const S*>(uintptr_t(tile_of.load(i))));
  };
  const auto write = [&](const OverTime<void*>& x, int i) {
    return !x.data ? Write() : Write(wide, x, p, reinterpret_cast<S*>(uintptr_t(tile_of.load(i))));
  };
  ScanWideCoefficients<Types> coefficients(p, row, block.group(), token());
  const R* kept =
      static_cast<const R*>(p.checkpoints) +
      ((row * ((p.num_steps + kScanTile - 1) / kScanTile) + last_step / kScanTile) * p.width + d0) *
          kStates +
      my_lane * 4;
  // The thread-th channel's sums of D and bias: in global memory, where they take no registers.
  const auto add_to_channel = [&](R of_D, R of_bias, bool first) {
    if (thread >= channels) return;
    R* const to = static_cast<R*>(q.by_channel) + part() * p.width + block.d0() + thread;
    R* const other = to + q.rows * q.segments * p.width;
    store_global(to, first ? of_D : load_global(to) + of_D);
    store_global(other, first ? of_bias : load_global(other) + of_bias);
  };
  add_to_channel(R(0), R(0), true);

  block_sync();
#pragma unroll 1
  for (; tiles > 0; --tiles, count = kScanTile) {
    const bool whole = vectors && count == kScanTile;
    // ---- time steps, inputs, gradients of y ----
    const auto fill = [&]<bool kTime>() __attribute__((always_inline)) {
      const Read delta = read(p.delta, kDelta), u = read(p.u, kU), z = read(p.z, kZ),
                 grad = read(p.grad_out, kGrad);
      const int slot = wide.slot_of(Wide::template channel<kTime>());
#pragma unroll 1
      for (int first = 0; first < Wide::kVectors; first += Wide::kAhead) {
        Vector deltas[Wide::kAhead], us[Wide::kAhead], gates[Wide::kAhead], grads[Wide::kAhead];
#pragma unroll
        for (int k = 0; k < Wide::kAhead; ++k) {
          deltas[k] = delta.load(first + k), us[k] = u.load(first + k);
          if (gate) gates[k] = z.load(first + k);
          grads[k] = p.grad_out.data ? grad.load(first + k) : Vector{};
        }
#pragma unroll
        for (int k = 0; k < Wide::kAhead; ++k) {
          R dt[kVector], g[kVector];
          Wide::template load_values<kTime>(bias, dt);
#pragma unroll
          for (int j = 0; j < kVector; ++j)
            dt[j] = deltas[k].widen(j) + dt[j], g[j] = grads[k].widen(j);
          if (p.delta_softplus) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) dt[j] = time_step(dt[j], true);
          }
          if (gate) {
#pragma unroll
            for (int j = 0; j < kVector; ++j)
              g[j] = g[j] * silu_with_slope(gates[k].widen(j)).value;
          }
          const Shared<Four> to = slots + (Wide::template step<kTime>(first + k) * kSlots + slot);
#pragma unroll
          for (int j = 0; j < kVector; ++j)
            to.store(
                j * (kTime ? kSlots : Wide::kNextSlot),
                {dt[j], dt[j] * us[k].widen(j), g[j], R(0)});
        }
      }
    };
    if (whole && wide.along_time) {
      fill.template operator()<true>();
    } else if (whole) {
      fill.template operator()<false>();
    } else {
      ScanBackwardItems<Types> items(p, block, token(), wide.along_time);
#pragma unroll 1
      for (int i = 0; i < items.count; i += kScanAhead) {
        R step[kScanAhead], input[kScanAhead], gates[kScanAhead], g[kScanAhead];
        items.load(count, channels, step, input, gates, g);
#pragma unroll
        for (int k = 0; k < kScanAhead; ++k) {
          const int t = items.t, c = items.column;
          if (gate) g[k] = g[k] * silu_with_slope(gates[k]).value;
          const R dt = t < count ? time_step(step[k] + bias.load(c), p.delta_softplus) : R(0);
          slots.store(t * kSlots + wide.slot_of(c), {dt, dt * input[k], g[k], R(0)});
          items.advance();
        }
      }
    }
    coefficients.stage(p, block, token, count, Bs, Cs);
    block_sync();

    // ---- through the steps, and back ----
#pragma unroll 1
    for (int half = (count - 1) / kHalf * kHalf; half >= 0; half -= kHalf) {
      R grad_B[kHalf * 4], grad_C[kHalf * 4];
#pragma unroll
      for (int i = 0; i < kHalf * 4; ++i) grad_B[i] = grad_C[i] = R(0);
      const auto pass = [&]<bool kFalls>() __attribute__((always_inline)) {
        const Shared<Four> packs_of_B = Bs.template view<Four>() + my_lane,
                           packs_of_C = Cs.template view<Four>() + my_lane;
#pragma unroll 1
        for (int turn = 0; turn < At::kTurns; ++turn) {
          const int slot = slot_of_turn(turn);
          const Four A = packs_of_A.load(turn * kScanThreads);
          R decays[kHalf][4], states[kHalf + 1][4];
          {
            Four h{};
            const int c = wide.channel_of(slot);
            if (c < channels) h = load_global(reinterpret_cast<const Four*>(kept + c * kStates));
            if (half > 0) {
#pragma unroll
              for (int t = 0; t < kHalf; ++t) {
                const Two x = slots.template view<Two>().load((t * kSlots + slot) * 2);
                const Four b = packs_of_B.load(t * 4);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                  h.x[j] = next_state<kFalls>(x.x[0], x.x[1], A.x[j], b.x[j], h.x[j]).h;
              }
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) states[0][j] = h.x[j];
          }
          const Shared<Four> items = slots + (half * kSlots + slot), b_at = packs_of_B + half * 4,
                             c_at = packs_of_C + half * 4;
#pragma unroll
          for (int t = 0; t < kHalf; ++t) {
            const Two x = items.template view<Two>().load(t * kSlots * 2);
            const Four b = b_at.load(t * 4);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const ScanStep<R, R> s =
                  next_state<kFalls>(x.x[0], x.x[1], A.x[j], b.x[j], states[t][j]);
              decays[t][j] = s.decay, states[t + 1][j] = s.h;
            }
          }
          warp_sync(); // what the steps read is loaded again: kept, it would take the registers of the sums
          Four g = own_h.load(turn * kScanThreads), gA = own_A.load(turn * kScanThreads);
          R sums[3 * kHalf]; // of the gradient of the input, of the time step; of y
#pragma unroll
          for (int t = kHalf - 1; t >= 0; --t) {
            const Four x = items.load(t * kSlots), b = b_at.load(t * 4), cc = c_at.load(t * 4);
            ScanSums<R, R> sum{};
            R y = R(0);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              scan_step_vjp(
                  x.x[0], x.x[1], A.x[j], b.x[j], cc.x[j], decays[t][j], states[t][j],
                  states[t + 1][j], x.x[2], g.x[j], gA.x[j], grad_B[t * 4 + j], grad_C[t * 4 + j],
                  sum);
              if (gate) y = add_real(states[t + 1][j], cc.x[j], y);
            }
            sums[t] = sum.input, sums[kHalf + t] = sum.parts;
            sums[2 * kHalf + t] = y;
          }
          own_h.store(turn * kScanThreads, g), own_A.store(turn * kScanThreads, gA);
          warp_sync(); // all lanes of the channel have read what is written over
          const auto put = [&](int word) {
            sum_over_lanes<kHalf>(
                sums + (word - 1) * kHalf, kLanes / 2, 1, 0, true,
                [&](int t, R sum) { items.template view<R>().store(t * kSlots * 4 + word, sum); });
          };
          put(1), put(2);
          if (gate) put(3);
        }
      };
      if (falls)
        pass.template operator()<true>();
      else
        pass.template operator()<false>();
      // ---- over the channels ----
      const auto gather = [&](int which, R* v) {
        sum_over_lanes<kHalf * 4>(v, 32 / kLanes / 2, kLanes, 0, true, [&](int i, R sum) {
          warps.store(((warp() * 2 + which) * kHalf + i / 4) * kStates + my_lane * 4 + i % 4, sum);
        });
      };
      gather(0, grad_B), gather(1, grad_C);
      block_sync();
      // Half of the threads leave B's, and half C's: two states of a step each.
      {
        constexpr int kEach = kHalf * kStates;
        const int leaves_C = thread / (kScanThreads / 2), leave_i = thread % (kScanThreads / 2) * 2;
        R* const leave = reinterpret_cast<R*>(uintptr_t(tile_of.load(kGradB + leaves_C)));
        const int step = half + leave_i / kStates;
        const Shared<Two> of_warps = (warps + (leaves_C * kEach + leave_i)).template view<Two>();
        Two sum = of_warps.load(0);
#pragma unroll
        for (int w = 1; w < kScanWarps; ++w) {
          const Two other = of_warps.load(w * kEach);
          sum.x[0] = sum.x[0] + other.x[0], sum.x[1] = sum.x[1] + other.x[1];
        }
        if (leave && step < count)
          store_global(
              reinterpret_cast<Two*>(
                  leave + step * direction * p.num_groups * kStates + leave_i % kStates),
              sum);
      }
      block_sync();
    }

    // ---- outputs ----
    const auto finish = [&]<bool kTime>() __attribute__((always_inline)) {
      const Read delta = read(p.delta, kDelta), u = read(p.u, kU), z = read(p.z, kZ),
                 grad = read(p.grad_out, kGrad);
      const Write grad_u = write(p.grad_u, kGradU), grad_delta = write(p.grad_delta, kGradDelta),
                  grad_z = write(p.grad_z, kGradZ);
      const int slot = wide.slot_of(Wide::template channel<kTime>());
      constexpr int kNext = kTime ? kSlots : Wide::kNextSlot;
      Two sums[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[j] = {};
#pragma unroll 1
      for (int k = 0; k < Wide::kVectors; ++k) {
        const Vector deltas = delta.load(k), us = u.load(k), gates = gate ? z.load(k) : Vector{},
                     grads = p.grad_out.data ? grad.load(k) : Vector{};
        const Shared<Four> from = slots + (Wide::template step<kTime>(k) * kSlots + slot);
        R x[kVector], g[kVector], D[kVector], u_out[kVector], delta_out[kVector], z_out[kVector];
        Wide::template load_values<kTime>(skip, D);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const Four item = from.load(j * kNext);
          x[j] = us.widen(j), g[j] = grads.widen(j);
          u_out[j] = item.x[1] * item.x[0],
          delta_out[j] = fused(item.x[1], x[j], out_of_octaves(item.x[2]));
          z_out[j] = fused(D[j], x[j], item.x[3]);
        }
        if (gate) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            const Gate<R> silu = silu_with_slope(gates.widen(j));
            z_out[j] = g[j] * silu.slope * z_out[j], g[j] = g[j] * silu.value;
          }
          if (p.grad_z.data) grad_z.store(k, z_out);
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) u_out[j] = fused(D[j], g[j], u_out[j]);
        grad_u.store(k, u_out);
        if (p.delta_softplus) {
          R before[kVector];
          Wide::template load_values<kTime>(bias, before);
#pragma unroll
          for (int j = 0; j < kVector; ++j)
            delta_out[j] = delta_out[j] * time_step_slope(deltas.widen(j) + before[j], true);
        }
        grad_delta.store(k, delta_out);
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          sums[j].x[0] = fused(g[j], x[j], sums[j].x[0]),
          sums[j].x[1] = sums[j].x[1] + delta_out[j];
      }
      const Shared<Two> to =
          (slots + (Wide::template step<kTime>(0) * kSlots + slot)).template view<Two>();
#pragma unroll
      for (int j = 0; j < kVector; ++j) to.store(j * kNext * 2, sums[j]);
    };
    if (whole && wide.along_time) {
      finish.template operator()<true>();
    } else if (whole) {
      finish.template operator()<false>();
    } else {
      ScanBackwardItems<Types> items(p, block, token(), wide.along_time);
      auto grad_u = items.template cursor<S>(p.grad_u),
           grad_delta = items.template cursor<S>(p.grad_delta),
           grad_z = items.template cursor<S>(p.grad_z);
      constexpr int kAhead = 2;
#pragma unroll 1
      for (int i = 0; i < items.count; i += kAhead) {
        R step[kAhead], x[kAhead], gates[kAhead], g[kAhead];
        items.load(count, channels, step, x, gates, g);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const int t = items.t, c = items.column, at = t * kSlots + wide.slot_of(c);
          Two sum{};
          if (t < count && c < channels) {
            const Four item = slots.load(at);
            const R D = skip.load(c);
            if (gate) {
              const Gate<R> silu = silu_with_slope(gates[k]);
              if (grad_z.any) grad_z.store(g[k] * silu.slope * fused(D, x[k], item.x[3]));
              g[k] = g[k] * silu.value;
            }
            sum.x[0] = g[k] * x[k];
            sum.x[1] = fused(item.x[1], x[k], out_of_octaves(item.x[2])) *
                       time_step_slope(step[k] + bias.load(c), p.delta_softplus);
            grad_delta.store(sum.x[1]);
            grad_u.store(fused(item.x[1], item.x[0], D * g[k]));
          }
          slots.template view<Two>().store(at * 2, sum);
          items.advance();
          grad_u.advance(), grad_delta.advance(), grad_z.advance();
        }
      }
    }
    block_sync();
    const Shared<Two> column = (slots + wide.slot_of(thread)).template view<Two>();
    R of_D = R(0), of_bias = R(0);
    const auto add = [&](int t) {
      const Two sum = column.load(t * kSlots * 2);
      of_D = of_D + sum.x[0], of_bias = of_bias + sum.x[1];
    };
    if (!whole) { // else each thread has added up its vectors
#pragma unroll 1
      for (int t = kScanTile - 1; t >= Wide::kRows; --t) add(t);
    }
#pragma unroll
    for (int t = Wide::kRows - 1; t >= 0; --t) add(t);
    add_to_channel(of_D, of_bias, false);
    if (thread < kArrays) {
      const int64_t time = thread == kDelta   ? p.delta.time
                           : thread == kU     ? p.u.time
                           : thread == kZ     ? p.z.time
                           : thread == kGrad  ? p.grad_out.time
                           : thread == kGradU ? p.grad_u.time
                           : thread == kGradZ ? p.grad_z.time
                                              : p.grad_delta.time;
      const int64_t bytes =
          thread < kGradB ? time * int64_t(sizeof(S)) : p.num_groups * kStates * int64_t(sizeof(R));
      const int64_t at = tile_of.load(thread);
      tile_of.store(thread, at ? at - kScanTile * direction * bytes : 0);
    }
    block_sync();
    coefficients.advance(p, -kScanTile);
    kept -= p.width * kStates;
  }

  // ---- sums over tokens ----
  const ScanStates<R, void*> initial(p.grad_initial_state, kStates),
      by_state = dense_states<R>(q.by_state, p.width, kStates);
  over_turns([&](int turn, int c) {
    const bool there = c < channels;
    by_state.store(part(), block.d0() + c, my_lane * 4, there, own_A.load(turn * kScanThreads));
    initial.store(
        block.row(), block.d0() + c, my_lane * 4, there && block.segment() == 0,
        own_h.load(turn * kScanThreads));
  });
}

// Sums over channels, from all blocks: a thread per token, group and state.
template <class Types>
__global__ void __launch_bounds__(kScanThreads)
    selective_scan_tokens_kernel(const SelectiveScanBackward p, const ScanPlan q) {
  using H = typename Types::H;
  const int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x,
                of_token = p.num_groups * p.num_states, all = q.rows * p.num_steps * of_token;
  if (i >= all) return;
  const int64_t token = i / of_token, group = i % of_token / p.num_states, n = i % p.num_states,
                row = token / p.num_steps, t = token % p.num_steps;
  const auto add = [&](const Coefficient<void*>& x, int64_t which) {
    if (!x.data || x.constant) return;
    const H* from = static_cast<const H*>(q.by_token) + which * q.blocks_per_group * all + i;
    H sum = load_global(from);
#pragma unroll 4
    for (int64_t b = 1; b < q.blocks_per_group; ++b) sum = sum + load_global(from + b * all);
    const int64_t at = row * x.sequence + t * x.time + group * x.group + n * x.state;
    using PerToken = typename Types::PerToken;
    store_global(static_cast<PerToken*>(x.data) + at, Stored<PerToken>::narrow(sum));
  };
  add(p.grad_B, 0);
  add(p.grad_C, 1);
}

// Sums over tokens, from all segments of all rows: a thread per channel and state.
template <class Types>
__global__ void __launch_bounds__(kScanThreads)
    selective_scan_channels_kernel(const SelectiveScanBackward p, const ScanPlan q) {
  using R = typename Types::R;
  using H = typename Types::H;
  const int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x, own = p.width * p.num_states;
  if (i >= own) return;
  const int64_t parts = q.rows * q.segments, d = i / p.num_states, n = i % p.num_states;
  const auto sum = [&]<class X>(const X* from, int64_t count) {
    X sum{};
#pragma unroll 8
    for (int64_t k = 0; k < parts; ++k) sum = sum + load_global(from + k * count);
    return sum;
  };
  const auto add = [&](void* data, int64_t at, int64_t which) {
    if (data)
      store_global(
          static_cast<H*>(data) + at,
          sum(static_cast<const H*>(q.by_state) + which * parts * own + i, own));
  };
  add(p.grad_A.data, d * p.grad_A.channel + n * p.grad_A.state, 0);
  if (p.B.constant) add(p.grad_B.data, d * p.grad_B.channel + n * p.grad_B.state, 1);
  if (p.C.constant) add(p.grad_C.data, d * p.grad_C.channel + n * p.grad_C.state, 2);
  if (n > 0) return;
  const auto add_channel = [&](const OverChannels<void*>& x, int64_t which) {
    if (x.data)
      store_global(
          static_cast<R*>(x.data) + d * x.channel,
          sum(static_cast<const R*>(q.by_channel) + which * parts * p.width + d, p.width));
  };
  add_channel(p.grad_D, 0);
  add_channel(p.grad_delta_bias, 1);
}

} // namespace torch_ext::cuda
