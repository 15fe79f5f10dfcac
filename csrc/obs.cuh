// Optimal Brain Surgeon within blocks of weights.
//
// obs_eliminate: one thread block for each block of B weights, with its inverse H in shared memory.
// Until nothing is left:
//   q = argmin w_q^2 / (2 H_qq);   u = H[:, q] / sqrt(H_qq);
//   w -= u w_q / sqrt(H_qq);       H -= u u^T.
//
// Every warp finds q by itself from w and the diagonal, and forms its own copy of u, so that one
// barrier a step suffices: of w, the diagonal and what is pending there are two copies, one read in
// a step and one written for the next, and row q, from which u is read, is the one row that the
// step leaves alone. Rows of H are dealt out to the warps; a lane holds its columns of u in
// registers. Only rows that are still pending are updated.
//
// Device memory, per weight: B + 1 values and a byte are read, a value and an int are written; of
// an inverse that all blocks share there is one copy, small beside L2. Shared memory: a step reads
// and writes the pending rows of H, B^3 values in all. Arithmetic: B^3 FLOP.
//
// Invariants: entries of H with a dead row or column are 0 and never loaded, unless dead_first; H
// stays symmetric to the bit, so that row q is column q; every warp computes the same q, so that
// the loop ends for all threads at once.
#pragma once

#include <cstdint>

#include "memory.cuh"

namespace fishleg_ext {

constexpr int kWarpSize = 32;
constexpr int kMaxEliminateThreads = 256;
// The longest row that a warp holds in registers; one of so many floats takes more shared memory
// than there is.
constexpr int kMaxEliminateSize = 256;

// What an elimination is asked to do, beside its arrays.
template <typename T>
struct EliminateOptions {
  int size;                // B
  int64_t inverse_stride;  // elements from one block's inverse to the next; 0 where all share one
  int n, m;                // keep n of each m weights; m = 0 where there is no such pattern
  T stop;                  // a block ends when its next cost exceeds this
  bool dead_first;         // the inverse is that of the whole block: eliminate the dead first
};

// More warps for larger blocks.
constexpr int eliminate_threads(int size) {
  return size > 64 ? kMaxEliminateThreads : size > 32 ? 128 : 64;
}

// Rows begin at multiples of 16 bytes.
template <typename T>
__host__ __device__ constexpr int eliminate_row(int size) {
  return (size + Vector<T>::kSize - 1) / Vector<T>::kSize * Vector<T>::kSize;
}

// H, a copy of u for each warp, two copies of weights and diagonal, two of the pending flags.
template <typename T>
constexpr int64_t eliminate_shared_bytes(int size) {
  const int64_t row = eliminate_row<T>(size);
  const int64_t warps = eliminate_threads(size) / kWarpSize;
  return (row * size + warps * row + 4 * row) * static_cast<int64_t>(sizeof(T)) + 2 * row;
}

// One block of weights in shared memory, as one thread sees it.
template <typename T>
struct Elimination {
  static constexpr int kVector = Vector<T>::kSize;
  // Vectors of a row that one lane holds.
  static constexpr int kHeld = kMaxEliminateSize / (kWarpSize * kVector);

  int size, row, lane, warp, warps;
  int now;        // which copy of weights, diagonal and pending is read
  T* h;           // [size, row]
  T* u;           // [row], this warp's own
  T* weights;     // [2, row]
  T* diagonal;    // [2, row]
  bool* pending;  // [2, row]: moved by eliminations, and read by them

  __device__ __forceinline__ explicit Elimination(int block_size)
      : size(block_size), row(eliminate_row<T>(size)), now(0) {
    lane = threadIdx.x % kWarpSize;
    warp = threadIdx.x / kWarpSize;
    warps = blockDim.x / kWarpSize;
    h = reinterpret_cast<T*>(dynamic_shared_memory());
    u = h + row * (size + warp);
    weights = h + row * (size + warps);
    diagonal = weights + 2 * row;
    pending = reinterpret_cast<bool*>(diagonal + 2 * row);
  }

  // Copy what may be read of a block, and 0 for all else.
  __device__ __forceinline__ void load(const T* weight, const T* inverse, const bool* alive,
                                       bool dead_first) {
    for (int j = threadIdx.x; j < row; j += blockDim.x) {
      const bool inside = j < size;
      const bool mine = inside && alive[j];
      const bool read = mine || (inside && dead_first);
      weights[j] = mine ? weight[j] : T(0);
      diagonal[j] = read ? inverse[static_cast<int64_t>(j) * size + j] : T(0);
      pending[j] = read;
    }
    for (int i = warp; i < size; i += warps) {
      const bool row_read = dead_first || alive[i];
      for (int j = lane; j < row; j += kWarpSize) {
        const bool read = row_read && j < size && (dead_first || alive[j]);
        h[i * row + j] = read ? inverse[static_cast<int64_t>(i) * size + j] : T(0);
      }
    }
    __syncthreads();
  }

  // The weight of lowest cost, of ties the lowest index, the same in every thread: `size` and
  // infinity where there is none.
  __device__ __forceinline__ int cheapest(int n, int m, T* lowest) const {
    T best = static_cast<T>(INFINITY);
    int index = size;
    for (int j = lane; j < size; j += kWarpSize) {
      const T w = weights[now * row + j], variance = diagonal[now * row + j];
      if (!pending[now * row + j] || !(variance > 0) || (m > 0 && left_of_group(j, m) <= n))
        continue;
      const T cost = w * w / (2 * variance);
      if (cost < best) {  // NaN is never the cheapest
        best = cost;
        index = j;
      }
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const T cost = __shfl_xor_sync(0xffffffffu, best, offset);
      const int other = __shfl_xor_sync(0xffffffffu, index, offset);
      if (cost < best || (cost == best && other < index)) {
        best = cost;
        index = other;
      }
    }
    *lowest = best;
    return index;
  }

  // How many of the m weights among which weight j is are pending.
  __device__ __forceinline__ int left_of_group(int j, int m) const {
    int left = 0;
    for (int i = j / m * m, end = i + m; i < end; ++i) left += pending[now * row + i];
    return left;
  }

  // Remove weight q and move the others.
  __device__ __forceinline__ void eliminate(int q) {
    const T variance = diagonal[now * row + q];
    const bool moves = variance > 0;  // a weight that nothing compensates for moves no other
    const T root = moves ? sqrt(variance) : T(1);
    const T share = moves ? weights[now * row + q] / root : T(0);

    Vector<T> held[kHeld];  // u, this lane's columns
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
      const int column = (s * kWarpSize + lane) * kVector;
      if (column >= row) break;
      held[s] = vector_at(h + q * row + column);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const int j = column + e;
        held[s].at[e] = moves && j != q && pending[now * row + j] ? held[s].at[e] / root : T(0);
      }
      vector_at(u + column) = held[s];
    }
    __syncwarp();

    for (int i = warp; i < size; i += warps) {
      const T factor = u[i];
      if (factor == 0) continue;  // gone, or q itself, from which other warps still read
#pragma unroll
      for (int s = 0; s < kHeld; ++s) {
        const int column = (s * kWarpSize + lane) * kVector;
        if (column >= row) break;
        Vector<T> values = vector_at(h + i * row + column);
#pragma unroll
        for (int e = 0; e < kVector; ++e) values.at[e] -= factor * held[s].at[e];
        vector_at(h + i * row + column) = values;
      }
    }
    const int next = 1 - now;
    for (int j = threadIdx.x; j < row; j += blockDim.x) {
      weights[next * row + j] = weights[now * row + j] - u[j] * share;
      diagonal[next * row + j] = diagonal[now * row + j] - u[j] * u[j];
      pending[next * row + j] = pending[now * row + j] && j != q;
    }
    now = next;
    __syncthreads();
  }
};

// weight [K, B], inverse [K or 1, B, B], alive [K, B] -> rank [K, B], cost [K, B]. Block k of the
// grid takes block k of the weights, with eliminate_threads(B) threads and
// eliminate_shared_bytes<T>(B) of dynamic shared memory.
template <typename T>  // T: float or double, of weights, inverse and cost
__global__ void __launch_bounds__(kMaxEliminateThreads)
    obs_eliminate_kernel(const T* __restrict__ weight, const T* __restrict__ inverse,
                         const bool* __restrict__ alive, int32_t* __restrict__ rank,
                         T* __restrict__ cost, EliminateOptions<T> options) {
  static_assert(kMaxEliminateThreads % kWarpSize == 0, "warps are whole");
  const int size = options.size;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * size;
  weight += first;
  alive += first;
  rank += first;
  cost += first;
  inverse += blockIdx.x * options.inverse_stride;

  Elimination<T> block(size);
  block.load(weight, inverse, alive, options.dead_first);
  for (int j = threadIdx.x; j < size; j += blockDim.x) {
    rank[j] = alive[j] ? size : -1;
    cost[j] = static_cast<T>(INFINITY);
  }
  if (options.dead_first) {
    for (int q = 0; q < size; ++q) {
      if (!alive[q]) block.eliminate(q);
    }
  }
  for (int step = 0; step < size; ++step) {
    T lowest;
    const int q = block.cheapest(options.n, options.m, &lowest);
    if (q == size || !(lowest <= options.stop)) break;
    if (q % blockDim.x == threadIdx.x) {  // the thread that set them to begin with
      rank[q] = step;
      cost[q] = lowest;
    }
    block.eliminate(q);
  }
}

}  // namespace fishleg_ext
