// Optimal Brain Surgeon in panels, for blocks of weights that are too large for registers.
//
// obs_eliminate_panel: the same elimination where a block is too large for registers, as a row of a
// layer is whose inverse all rows share. One thread block for each block of weights goes on for as
// many steps as there is room for columns v = u / sqrt(u_q), and what is left of the inverse is
// H - columns^T columns, of which only row q and what is on the diagonal are formed. The caller
// subtracts the columns, one matrix product for all blocks, before it calls again, of all weights
// or of those alone that are pending, whose rows and columns it has gathered. Without gathering,
// panels of P columns move 8 B^2 / P bytes a weight for the products (in float32), 2 B P for the
// columns, which stay in cache, and 4 B for the rows; keeping all columns and never subtracting
// them would move 2 B^2. The products are 2 B^2 FLOP a weight. A shared inverse is read as it is
// until the first panel is full.
#pragma once

#include <cstdint>

#include "obs.cuh"

namespace fishleg_ext {

constexpr int kPanelThreads = 512;  // at most; whole warps

// A cost and an index for each warp.
template <typename T>
constexpr int panel_shared_bytes() {
  return kWarpSize * static_cast<int>(sizeof(T) + sizeof(int));
}

// One panel of P steps. With `dead`, it is those not in `alive` that are eliminated, in order of
// their indices and without ranks. Needs panel_shared_bytes.
template <typename T, int kGroup>  // T: float or double
__global__ void __launch_bounds__(kPanelThreads, 1)
    obs_eliminate_panel_kernel(const T* __restrict__ inverse, const bool* __restrict__ alive,
                               PanelState<T> state, bool dead, EliminateOptions<T> options) {
  const int size = options.size;
  const int64_t block = blockIdx.x, first_row = block * size;
  inverse += block * options.inverse_stride;
  alive += first_row;
  T* const weight = state.weight + first_row;
  T* const variance = state.variance + first_row * kGroup;
  bool* const pending = state.pending + first_row;
  T* const columns = state.columns + first_row * state.panel;
  // The lowest cost of each warp, and where it is.
  T* const lowest_costs = reinterpret_cast<T*>(dynamic_shared_memory());
  int* const lowest_indices = reinterpret_cast<int*>(lowest_costs + kWarpSize);
  if (threadIdx.x < kWarpSize) {
    lowest_costs[threadIdx.x] = static_cast<T>(INFINITY);
    lowest_indices[threadIdx.x] = size;
  }
  const int32_t next = state.next[block];
  __syncthreads();

  // Weights that are eliminated together, and to which each thread keeps: it alone writes what
  // belongs to them.
  const int together = dead ? 1 : kGroup, mine = threadIdx.x * together;
  const int stride = blockDim.x * together;
  auto variance_of = [&](int j) { return variance[j * kGroup + j % kGroup]; };
  // What it costs to lose weight j or the group that it is the first of.
  auto cost_of = [&](int j) {
    if (dead) return !alive[j] && variance_of(j) > 0 ? T(0) : static_cast<T>(INFINITY);
    if (kGroup == 1 && left_of_pattern(pending, j, options.m) <= options.n)
      return static_cast<T>(INFINITY);
    unsigned members = 0;
    T z[kGroup], h[kGroup][kGroup];
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      members |= static_cast<unsigned>(pending[j + r]) << r;
      z[r] = weight[j + r];
#pragma unroll
      for (int c = 0; c <= r; ++c) h[r][c] = variance[(j + r) * kGroup + c];
    }
    return members ? joint_cost(z, h, members) : static_cast<T>(INFINITY);
  };

  int step = 0;
  while (step + together <= state.panel) {
    T best = static_cast<T>(INFINITY);
    int first = size;
    for (int j = mine; j < size; j += stride) {
      const T cost = cost_of(j);
      if (cost < best) {
        best = cost;
        first = j;
      }
    }
    warp_lowest(best, first);
    if (threadIdx.x % kWarpSize == 0) {
      lowest_costs[threadIdx.x / kWarpSize] = best;
      lowest_indices[threadIdx.x / kWarpSize] = first;
    }
    __syncthreads();
    best = lowest_costs[threadIdx.x % kWarpSize];
    first = lowest_indices[threadIdx.x % kWarpSize];
    warp_lowest(best, first);
    if (first >= size || !(best <= options.stop)) break;

    int members = 0;
    for (int q = first; q < first + together; ++q) members += alive[q] != dead;
    for (int q = first; q < first + together; ++q) {
      if (alive[q] == dead) continue;
      if (q > first) __syncthreads();  // the one before has left its mark on weight q
      // A weight that nothing compensates moves no other: its column is 0.
      const T root = variance_of(q) > 0 ? sqrt(variance_of(q)) : static_cast<T>(INFINITY);
      const T share = weight[q] / root;
      if (threadIdx.x == 0 && !dead) {
        state.rank[first_row + q] = next + step;
        state.cost[first_row + q] = best / members;
        pending[q] = false;
      }
      T* const column = columns + static_cast<int64_t>(step) * size;
      for (int j = threadIdx.x; j < size; j += blockDim.x) {
        const bool read = options.dead_first || alive[j];
        T value = read ? inverse[static_cast<int64_t>(q) * size + j] : T(0);
        for (int c = 0; c < step && read; ++c) {
          const T* before = columns + static_cast<int64_t>(c) * size;
          value -= before[q] * before[j];
        }
        column[j] = value / root;
      }
      __syncthreads();  // all have read weight q and its variance
      for (int j = mine; j < size; j += stride) {
        for (int i = j; i < j + together; ++i) {
          const int member = i % kGroup;
          weight[i] -= column[i] * share;
          for (int c = 0; c <= member; ++c) {
            variance[i * kGroup + c] -= column[i] * column[i - member + c];
          }
          if (i == q) variance[i * kGroup + member] = 0;
        }
      }
      ++step;
    }
  }
  if (threadIdx.x == 0 && !dead) state.next[block] = next + step;
  for (; step < state.panel; ++step) {
    for (int j = threadIdx.x; j < size; j += blockDim.x) {
      columns[static_cast<int64_t>(step) * size + j] = 0;
    }
  }
}

}  // namespace fishleg_ext
