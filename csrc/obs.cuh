// Optimal Brain Surgeon within blocks of weights; H is the inverse of a block.
//
// obs_eliminate: until nothing is left,
//   q = argmin w_q^2 / (2 H_qq);   u = H[:, q];   w -= u w_q / u_q;   H -= u u^T / u_q.
// obs_compensate: the same steps for all q of a given set P, in order of their indices, which comes
// to w - H[:, P] (H[P, P])^-1 w_P.
//
// H lies in the registers of one thread block, or of one warp where B <= 56 (symmetric_tiles.cuh).
// Every warp keeps a copy of w and diag H, a few entries a lane, and finds q from it by itself, so
// that one barrier a step suffices, after those threads that hold row q have written it out; it
// goes to two places in turn, one read while the other is written.
//
// Device memory, per weight: half of its row of H, 2 B bytes in float32, a weight and a flag are
// read; a value and an int are written. Of an inverse that all blocks share there is one copy,
// small beside L2. Arithmetic: B steps over half of a block, B^2 FLOP per weight. Shared memory:
// 2 / kTile of an entry for each multiply-add.
//
// obs_eliminate_panel: the same elimination where a block is too large for registers, as a row of a
// layer is whose inverse all rows share. One thread block for each block of weights goes on for as
// many steps as there is room for columns v = u / sqrt(u_q), and what is left of the inverse is
// H - columns^T columns, of which only row q and the diagonal are formed. The caller subtracts the
// columns, one matrix product for all blocks, before it calls again. With panels of P columns an
// elimination to the end moves 8 B^2 / P bytes a weight for the products (in float32), 2 B P for
// the columns, which stay in cache, and 4 B for the rows; keeping all columns and never subtracting
// them would move 2 B^2. The products are 2 B^2 FLOP a weight. A shared inverse is read as it is
// until the first panel is full.
//
// Invariants: every warp does the same arithmetic on the same numbers, so that all threads agree on
// q and on the end. Entries with a dead row or column are 0 and never loaded, unless dead_first.
// Rows of what was eliminated are left as they come: they hold zeros but for rounding, and nothing
// that is pending ever reads them.
#pragma once

#include <cstdint>

#include "damping.cuh"
#include "symmetric_tiles.cuh"

namespace fishleg_ext {

// What an elimination is asked to do, beside its arrays.
template <typename T>
struct EliminateOptions {
  int64_t num_blocks;      // K
  int size;                // B
  int64_t inverse_stride;  // elements from one block's inverse to the next; 0 where all share one
  int n, m;                // keep n of each m weights; m = 0 where there is no such pattern
  T stop;                  // a block ends when its next cost exceeds this
  bool dead_first;         // the inverse is that of the whole block: eliminate the dead first
};

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

// The weights of a block and the diagonal of H, a copy in every warp: entry j in lane j % 32.
template <typename Tiles>
struct Weights {
  using T = typename Tiles::Entry;
  static constexpr int kHeld = Tiles::kHeld;

  int lane;
  T weight[kHeld], variance[kHeld];  // a variance that is not positive: not to be eliminated
  int left[kHeld];                   // pending weights in the group of m that entry j is in

  __device__ __forceinline__ int index(int s) const { return s * kWarpSize + lane; }

  __device__ __forceinline__ void load(const T* weights, const T* inverse, const bool* alive,
                                       int size, int m, bool dead_first) {
    lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
      const int j = index(s);
      const bool pending = j < size && alive[j];
      weight[s] = pending ? weights[j] : T(0);
      variance[s] = pending || (j < size && dead_first) ? inverse[j * size + j] : T(0);
      left[s] = 0;
      if (m > 0 && j < size) {
        for (int i = j / m * m, end = i + m; i < end; ++i) left[s] += alive[i];
      }
    }
  }

  // Entry q of an array that is spread over the lanes.
  __device__ __forceinline__ static T entry(const T (&values)[kHeld], int q) {
    T value = values[0];
#pragma unroll
    for (int s = 1; s < kHeld; ++s) value = q / kWarpSize == s ? values[s] : value;
    return __shfl_sync(0xffffffffu, value, q % kWarpSize);
  }

  // The weight of lowest cost, of ties the lowest index, the same in every thread: B or more, and
  // infinity, where there is none.
  __device__ __forceinline__ int cheapest(int size, int n, int m, T* lowest) const {
    T best = static_cast<T>(INFINITY);
    int q = size;
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
      const T cost = weight[s] * weight[s] / (2 * variance[s]);
      // NaN is never the cheapest.
      if (variance[s] > 0 && cost < best && (m == 0 || left[s] > n)) {
        best = cost;
        q = index(s);
      }
    }
    warp_lowest(best, q);
    *lowest = best;
    return q;
  }

  // Weight q goes: u is row q of H, in shared memory, and `inverse_variance` is 1 / u_q.
  __device__ __forceinline__ void eliminate(const T* u, int q, T inverse_variance, int m) {
    const T share = entry(weight, q) * inverse_variance;
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
      const int j = index(s);
      if (j >= Tiles::kSize) break;
      const T value = u[Tiles::slot(j)];
      weight[s] -= value * share;
      variance[s] = j == q ? T(0) : variance[s] - value * (value * inverse_variance);
      if (m > 0) left[s] -= j / m == q / m;
    }
  }
};

// How many of the m weights among which weight j is are pending; all are where there is no pattern.
__device__ __forceinline__ int left_of_group(const bool* pending, int j, int m) {
  if (m == 0) return 1 << 30;
  int left = 0;
  for (int i = j / m * m, end = i + m; i < end; ++i) left += pending[i];
  return left;
}

// weight [K, B], inverse [K or 1, B, B], alive [K, B] -> rank [K, B], cost [K, B]. Threads and
// shared memory as of Tiles, for two vectors.
template <typename Tiles>  // a SymmetricTiles that holds B rows
__global__ void __launch_bounds__(Tiles::kBlockThreads, Tiles::kMinBlocks)
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
  Weights<Tiles> weights;
  weights.load(weight, inverse, alive, size, options.m, options.dead_first);
  const bool writes = h.thread < kWarpSize;  // the first warp
#pragma unroll
  for (int s = 0; s < Tiles::kHeld; ++s) {
    const int j = weights.index(s);
    if (!writes || j >= size) break;
    rank[j] = alive[j] ? size : -1;
    cost[j] = static_cast<T>(INFINITY);
  }

  T* const rows = h.shared(2 * Tiles::kSize);
  int now = 0;  // which of the two rows
  auto eliminate = [&](int q, T variance, int m) {
    T* const u = rows + now * Tiles::kSize;
    now = 1 - now;
    h.row(q, u);
    h.sync();
    const T inverse_variance = 1 / variance;
    h.add_outer(u, -inverse_variance);
    weights.eliminate(u, q, inverse_variance, m);
  };
  if (options.dead_first) {
    for (int q = 0; q < size; ++q) {
      if (alive[q]) continue;
      const T variance = weights.entry(weights.variance, q);
      if (variance > 0) eliminate(q, variance, 0);
    }
#pragma unroll
    for (int s = 0; s < Tiles::kHeld; ++s) {
      const int j = weights.index(s);
      if (j < size && !alive[j]) weights.variance[s] = 0;
    }
  }
  for (int step = 0; step < size; ++step) {
    T lowest;
    const int q = weights.cheapest(size, options.n, options.m, &lowest);
    if (q >= size || !(lowest <= options.stop)) break;
    if (writes && q % kWarpSize == weights.lane) {  // the thread that set them to begin with
      rank[q] = step;
      cost[q] = lowest;
    }
    eliminate(q, weights.entry(weights.variance, q), options.m);
  }
}

// What an elimination in panels keeps between panels, for K blocks of B weights.
template <typename T>
struct PanelState {
  T* weight;      // [K, B], 0 where dead
  T* variance;    // [K, B], the diagonal of what is left of H
  bool* pending;  // [K, B]
  int32_t* next;  // [K], ranks given so far
  T* columns;     // [K, P, B], written from the first on, zeros at the end
  int32_t* rank;  // [K, B]
  T* cost;        // [K, B]
};

constexpr int kPanelThreads = 512;  // at most; whole warps

// A cost and an index for each warp.
template <typename T>
constexpr int panel_shared_bytes() {
  return kWarpSize * static_cast<int>(sizeof(T) + sizeof(int));
}

// One panel of P steps. With `dead`, it is those not in `alive` that are eliminated, in order of
// their indices and without ranks. Needs panel_shared_bytes.
template <typename T>  // T: float or double
__global__ void __launch_bounds__(kPanelThreads, 1)
    obs_eliminate_panel_kernel(const T* __restrict__ inverse, const bool* __restrict__ alive,
                               PanelState<T> state, int panel, bool dead,
                               EliminateOptions<T> options) {
  const int size = options.size, thread = threadIdx.x, threads = blockDim.x;
  const int64_t block = blockIdx.x, first = block * size;
  inverse += block * options.inverse_stride;
  alive += first;
  T* const weight = state.weight + first;
  T* const variance = state.variance + first;
  bool* const pending = state.pending + first;
  T* const columns = state.columns + first * panel;
  // The lowest cost of each warp, and where it is.
  T* const lowest_costs = reinterpret_cast<T*>(dynamic_shared_memory());
  int* const lowest_indices = reinterpret_cast<int*>(lowest_costs + kWarpSize);
  if (thread < kWarpSize) {
    lowest_costs[thread] = static_cast<T>(INFINITY);
    lowest_indices[thread] = size;
  }
  const int32_t next = state.next[block];
  __syncthreads();

  int step = 0;
  for (; step < panel; ++step) {
    T best = static_cast<T>(INFINITY);
    int q = size;
    for (int j = thread; j < size; j += threads) {
      if (!(variance[j] > 0) || alive[j] == dead) continue;
      if (!dead && (!pending[j] || left_of_group(pending, j, options.m) <= options.n)) continue;
      const T cost = dead ? T(0) : weight[j] * weight[j] / (2 * variance[j]);
      if (cost < best) {  // NaN is never the cheapest
        best = cost;
        q = j;
      }
    }
    warp_lowest(best, q);
    if (thread % kWarpSize == 0) {
      lowest_costs[thread / kWarpSize] = best;
      lowest_indices[thread / kWarpSize] = q;
    }
    __syncthreads();
    best = lowest_costs[thread % kWarpSize];
    q = lowest_indices[thread % kWarpSize];
    warp_lowest(best, q);
    if (q >= size || !(best <= options.stop)) break;

    const T root = sqrt(variance[q]), share = weight[q] / root;
    if (thread == 0 && !dead) {
      state.rank[first + q] = next + step;
      state.cost[first + q] = best;
      pending[q] = false;
    }
    T* const mine = columns + static_cast<int64_t>(step) * size;
    for (int j = thread; j < size; j += threads) {
      const bool read = options.dead_first || alive[j];
      T value = read ? inverse[static_cast<int64_t>(q) * size + j] : T(0);
      for (int c = 0; c < step && read; ++c) {
        const T* column = columns + static_cast<int64_t>(c) * size;
        value -= column[q] * column[j];
      }
      mine[j] = value / root;
    }
    __syncthreads();  // all have read weight q and its variance
    for (int j = thread; j < size; j += threads) {
      const T value = mine[j];
      weight[j] -= value * share;
      variance[j] = j == q ? T(0) : variance[j] - value * value;
    }
  }
  if (thread == 0 && !dead) state.next[block] = next + step;
  for (; step < panel; ++step) {
    for (int j = thread; j < size; j += threads) columns[static_cast<int64_t>(step) * size + j] = 0;
  }
}

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
      const T share = Weights<Tiles>::entry(moved, q) / variance;
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
