// Optimal Brain Surgeon within blocks of weights; H is the inverse of a block.
//
// obs_eliminate: until nothing is left,
//   q = argmin w_q^2 / (2 H_qq);   u = H[:, q];   w -= u w_q / u_q;   H -= u u^T / u_q.
// obs_compensate: the same steps for all q of a given set P, in order of their indices, which comes
// to w - H[:, P] (H[P, P])^-1 w_P.
//
// Or groups of weights, together: the one of lowest joint cost 1/2 w_G^T (H_GG)^-1 w_G, its members
// in turn. For n:m, only where more than n of m are left.
//
// obs_panel.cuh has the elimination of blocks that are too large for registers.
//
// H lies in the registers of one thread block, or of one warp where B <= 56 (symmetric_tiles.cuh).
// Every warp keeps a copy of w and what is on the diagonal of H, a few groups a lane, and finds q
// from it by itself, so that one barrier a step suffices, after those threads that hold row q have
// written it out; it goes to two places in turn, one read while the other is written.
//
// Device memory, per weight: half of its row of H, 2 B bytes in float32, a weight and a flag are
// read; a value and an int are written. Of an inverse that all blocks share there is one copy,
// small beside L2. Arithmetic: B steps over half of a block, B^2 FLOP per weight. Shared memory:
// 2 / kTile of an entry for each multiply-add.
//
// Invariants: every warp does the same arithmetic on the same numbers, so that all threads agree on
// q and on the end. Entries with a dead row or column are 0 and never loaded, unless dead_first.
// Rows of what was eliminated are left as they come: they hold zeros but for rounding, and nothing
// that is pending ever reads them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "damping.cuh"
#include "obs_types.h"
#include "symmetric_tiles.cuh"

namespace fishleg_ext {

// The lowest of the lanes' costs, none of which is negative or NaN, and of ties the lowest index.
__device__ __forceinline__ void warp_lowest(float& cost, int& index) {
  const unsigned bits = __float_as_uint(cost), lowest = __reduce_min_sync(0xffffffffu, bits);
  index = static_cast<int>(
      __reduce_min_sync(0xffffffffu, bits == lowest ? static_cast<unsigned>(index) : 0x7fffffffu));
  cost = __uint_as_float(lowest);
}

__device__ __forceinline__ void warp_lowest(double& cost, int& index) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const double other_cost = __shfl_xor_sync(0xffffffffu, cost, offset);
    const int other = __shfl_xor_sync(0xffffffffu, index, offset);
    if (other_cost < cost || (other_cost == cost && other < index)) {
      cost = other_cost;
      index = other;
    }
  }
}

// What it costs to lose those weights z of a group that are in `pending`, bit by bit, H being h
// between them: 1/2 z^T h^-1 z, as each is eliminated in turn and what is left follows. Infinite
// where h is not positive definite, and where the cost is NaN. Both are overwritten.
template <typename T, int kGroup>
__device__ __forceinline__ T joint_cost(T (&z)[kGroup], T (&h)[kGroup][kGroup], unsigned pending) {
  T cost = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (kGroup > 1 && !(pending >> i & 1)) continue;
    const T variance = h[i][i];
    // As the reference: for a group z^2 may be out of range where the cost is not.
    const T alone = kGroup == 1 ? z[i] * z[i] / (2 * variance) : z[i] * (z[i] / (2 * variance));
    cost += variance > 0 ? alone : static_cast<T>(INFINITY);
    const T inverse_variance = 1 / variance;
#pragma unroll
    for (int r = i + 1; r < kGroup; ++r) {
      const T factor = h[r][i] * inverse_variance;
      z[r] -= factor * z[i];
#pragma unroll
      for (int c = i + 1; c <= r; ++c) h[r][c] -= factor * h[c][i];
    }
  }
  return cost < static_cast<T>(INFINITY) ? cost : static_cast<T>(INFINITY);
}

// The weights of a block and what is on the diagonal of H, a copy in every warp: group j of kGroup
// weights in lane j % 32.
template <typename Tiles, int kGroup>
struct Weights {
  using T = typename Tiles::Entry;
  static constexpr int kHeld = (Tiles::kSize + kWarpSize * kGroup - 1) / (kWarpSize * kGroup);
  static_assert(Tiles::kSize % kGroup == 0, "whole groups");

  int lane;
  T weight[kHeld][kGroup];
  T variance[kHeld][kGroup][kGroup];  // of H, the lower half
  unsigned pending;                   // which of these weights, a bit for each
  int left[kHeld];  // of the m weights of a pattern, those pending; not for groups

  // The first weight of a group.
  __device__ __forceinline__ int index(int s) const { return (s * kWarpSize + lane) * kGroup; }
  // Which weights of a group are pending.
  __device__ __forceinline__ unsigned pending_in(int s) const {
    return pending >> s * kGroup & ((1u << kGroup) - 1);
  }
  __device__ __forceinline__ bool holds(int q) const { return q / kGroup % kWarpSize == lane; }

  __device__ __forceinline__ void load(const T* weights, const T* inverse, const bool* alive,
                                       int size, int m, bool dead_first) {
    lane = threadIdx.x % kWarpSize;
    pending = 0;
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
      const int first = index(s);
      left[s] = 0;
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        const bool mine = first < size && alive[first + r];
        pending |= static_cast<unsigned>(mine) << (s * kGroup + r);
        weight[s][r] = mine ? weights[first + r] : T(0);
#pragma unroll
        for (int c = 0; c <= r; ++c) {
          const bool read = (mine && alive[first + c]) || (first < size && dead_first);
          variance[s][r][c] = read ? inverse[(first + r) * size + first + c] : T(0);
        }
      }
      if (kGroup == 1 && m > 0 && first < size) {
        for (int i = first / m * m, end = i + m; i < end; ++i) left[s] += alive[i];
      }
    }
  }

  // Of group q / kGroup, what `get` (int s, int r) -> value gives, r being q % kGroup.
  template <typename Get>
  __device__ __forceinline__ static auto entry(int q, Get get) {
    auto value = get(0, 0);
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        // Always read, or the compiler computes s from q and the arrays are no longer registers.
        const auto other = get(s, r);
        value = q / kGroup / kWarpSize == s && q % kGroup == r ? other : value;
      }
    }
    return __shfl_sync(0xffffffffu, value, q / kGroup % kWarpSize);
  }
  __device__ __forceinline__ unsigned members_of(int q) const {  // pending ones
    return entry(q, [&](int s, int) { return pending_in(s); });
  }
  __device__ __forceinline__ T variance_of(int q) const {
    return entry(q, [&](int s, int r) { return variance[s][r][r]; });
  }

  // The first weight of the group of lowest cost, of ties the lowest, the same in every thread: B
  // or more, and infinity, where there is none.
  __device__ __forceinline__ int cheapest(int size, int n, int m, T* lowest) const {
    T best = static_cast<T>(INFINITY);
    int q = size;
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
      T z[kGroup], h[kGroup][kGroup];
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        z[r] = weight[s][r];
#pragma unroll
        for (int c = 0; c <= r; ++c) h[r][c] = variance[s][r][c];
      }
      const T cost = joint_cost(z, h, pending_in(s));
      if (cost < best && pending_in(s) && (kGroup > 1 || m == 0 || left[s] > n)) {
        best = cost;
        q = index(s);
      }
    }
    warp_lowest(best, q);
    *lowest = best;
    return q;
  }

  // The group that begins with weight q is no longer pending.
  __device__ __forceinline__ void close(int q) {
    const int s = q / kGroup / kWarpSize;
    if (holds(q)) pending &= ~(((1u << kGroup) - 1) << s * kGroup);
  }

  // Weight q is eliminated: u is row q of H, in shared memory, and `inverse_variance` is 1 / u_q.
  __device__ __forceinline__ void eliminate(const T* u, int q, T inverse_variance, int m) {
    const T share = entry(q, [&](int s, int r) { return weight[s][r]; }) * inverse_variance;
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
      const int first = index(s);
      if (first >= Tiles::kSize) break;
      T value[kGroup];
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        value[r] = u[Tiles::slot(first + r)];
        weight[s][r] -= value[r] * share;
#pragma unroll
        for (int c = 0; c <= r; ++c) variance[s][r][c] -= value[r] * (value[c] * inverse_variance);
      }
      if (kGroup == 1 && m > 0) left[s] -= first / m == q / m;
    }
  }
};

// How many of the m weights among which weight j is are pending; all are where there is no pattern.
__device__ __forceinline__ int left_of_pattern(const bool* pending, int j, int m) {
  if (m == 0) return 1 << 30;
  int left = 0;
  for (int i = j / m * m, end = i + m; i < end; ++i) left += pending[i];
  return left;
}

// weight [K, B], inverse [K or 1, B, B], alive [K, B] -> rank [K, B], cost [K, B]. Threads and
// shared memory as of Tiles, for two vectors.
template <typename Tiles, int kGroup>  // Tiles: a SymmetricTiles that holds B rows
__global__ void __launch_bounds__(Tiles::kBlockThreads, kGroup == 1 ? Tiles::kMinBlocks : 1)
    obs_eliminate_kernel(const typename Tiles::Entry* __restrict__ weight,
                         const typename Tiles::Entry* __restrict__ inverse,
                         const bool* __restrict__ alive, int32_t* __restrict__ rank,
                         typename Tiles::Entry* __restrict__ cost,
                         EliminateOptions<typename Tiles::Entry> options) {
  using T = typename Tiles::Entry;
  const int size = options.size;
  Tiles h(size);
  if (h.matrix >= options.num_blocks) return;
  weight += h.matrix * size;
  alive += h.matrix * size;
  rank += h.matrix * size;
  cost += h.matrix * size;
  inverse += h.matrix * options.inverse_stride;

  h.set([&](int i, int j, T) {
    return options.dead_first || (alive[i] && alive[j]) ? inverse[i * size + j] : T(0);
  });
  using Held = Weights<Tiles, kGroup>;
  Held weights;
  weights.load(weight, inverse, alive, size, options.m, options.dead_first);
  const bool writes = h.thread < kWarpSize;  // the first warp
#pragma unroll
  for (int s = 0; s < Held::kHeld; ++s) {
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      const int j = weights.index(s) + r;
      if (!writes || j >= size) break;
      rank[j] = alive[j] ? size : -1;
      cost[j] = static_cast<T>(INFINITY);
    }
  }

  T* const rows = h.shared(2 * Tiles::kSize);
  int now = 0;  // which of the two rows
  auto eliminate = [&](int q, int m) {
    const T variance = weights.variance_of(q);
    if (!(variance > 0)) return;  // nothing compensates it
    const T inverse_variance = 1 / variance;
    T* const u = rows + now * Tiles::kSize;
    now = 1 - now;
    h.row(q, u);
    h.sync();
    h.add_outer(u, -inverse_variance);
    weights.eliminate(u, q, inverse_variance, m);
  };
  for (int q = 0; q < size && options.dead_first; ++q) {
    if (!alive[q]) eliminate(q, 0);
  }
  for (int step = 0; step < size;) {
    T lowest;
    const int group = weights.cheapest(size, options.n, options.m, &lowest);
    if (group >= size || !(lowest <= options.stop)) break;
    const unsigned members = kGroup == 1 ? 1u : weights.members_of(group);
    const T share = lowest / __popc(members);
    weights.close(group);
#pragma unroll 1
    for (int q = group; q < group + kGroup; ++q) {
      if (!(members >> (q - group) & 1)) continue;
      if (writes && weights.holds(q)) {  // the thread that set them to begin with
        rank[q] = step;
        cost[q] = share;
      }
      eliminate(q, options.m);
      ++step;
    }
  }
}

// Calls run(std::integral_constant<int, g>()) for groups of g weights; false where no kernel takes
// them.
template <typename Run>
bool with_group(int group, Run run) {
  if (group == 1) return run(std::integral_constant<int, 1>()), true;
  if (group == 4) return run(std::integral_constant<int, 4>()), true;
  return false;
}

// The largest B of which obs_eliminate_kernel holds a block in registers: groups of doubles need
// too many.
template <typename T, int kGroup>
constexpr int kLargestToEliminate =
    sizeof(T) == 8 && kGroup > 1 ? 128 : largest_in_tiles(sizeof(T));

// weight [K, B], inverse [K or 1, B, B], pruned [K, B] -> out [K, B]. Where H[P, P] is not positive
// definite to rounding it is damped more and more, from eps * mean(diag) on, as in block_inverse;
// in vain, and what is kept is NaN. Threads and shared memory as of Tiles, for two vectors.
template <typename Tiles>  // a SymmetricTiles that holds B rows
__global__ void __launch_bounds__(Tiles::kBlockThreads, Tiles::kMinBlocks)
    obs_compensate_kernel(const typename Tiles::Entry* __restrict__ weight,
                          const typename Tiles::Entry* __restrict__ inverse, int64_t inverse_stride,
                          const bool* __restrict__ pruned, typename Tiles::Entry* __restrict__ out,
                          int64_t num_blocks, int size) {
  using T = typename Tiles::Entry;
  Tiles h(size);
  if (h.matrix >= num_blocks) return;
  weight += h.matrix * size;
  pruned += h.matrix * size;
  out += h.matrix * size;
  inverse += h.matrix * inverse_stride;

  auto in_set = [&](int q) { return pruned[q] && inverse[q * size + q] != 0; };
  T* const rows = h.shared(2 * Tiles::kSize);
  const int lane = threadIdx.x % kWarpSize;
  T moved[Tiles::kHeld];  // as Weights::weight
  bool solved = false;
  for (int raises = 0; raises <= kMaxRaises && !solved; ++raises) {
    h.set([&](int i, int j, T) { return inverse[i * size + j]; });
    if (raises > 0) {  // from eps times the mean diagonal of H[P, P] on, with ones for all else
      T trace = 0;
      for (int q = 0; q < size; ++q) trace += in_set(q) ? inverse[q * size + q] : T(1);
      const T shift = raised_damping(T(0), trace / size, raises);
      h.set([&](int i, int j, T value) { return i == j && in_set(i) ? value + shift : value; });
    }
#pragma unroll
    for (int s = 0; s < Tiles::kHeld; ++s) {
      const int j = s * kWarpSize + lane;
      moved[s] = j < size && (!pruned[j] || in_set(j)) ? weight[j] : T(0);
    }
    solved = true;
    int now = 0;  // which of the two rows
    for (int q = 0; q < size && solved; ++q) {
      if (!in_set(q)) continue;
      T* const u = rows + now * Tiles::kSize;
      now = 1 - now;
      h.row(q, u);
      h.sync();
      const T variance = u[Tiles::slot(q)];
      solved = variance > 0 && variance < static_cast<T>(INFINITY);
      h.add_outer(u, -1 / variance);
      const T share = Weights<Tiles, 1>::entry(q, [&](int s, int) { return moved[s]; }) / variance;
#pragma unroll
      for (int s = 0; s < Tiles::kHeld; ++s) {
        const int j = s * kWarpSize + lane;
        if (j < Tiles::kSize) moved[s] -= u[Tiles::slot(j)] * share;
      }
    }
    h.sync();  // before a next attempt writes to the row that is still read
  }
  if (h.thread >= kWarpSize) return;
#pragma unroll
  for (int s = 0; s < Tiles::kHeld; ++s) {
    const int j = s * kWarpSize + lane;
    if (j >= size) break;
    out[j] = pruned[j] ? T(0) : solved ? moved[s] : static_cast<T>(NAN);
  }
}

}  // namespace fishleg_ext
