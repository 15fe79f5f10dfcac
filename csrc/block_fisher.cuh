// Blocks of the empirical Fisher matrix: Gram matrices, their inverses, inverses kept up to date.
//
// All three hold a block in registers (symmetric_tiles.cuh) and add outer products to it.
//
// block_gram_: gram += alpha sum_s g_s g_s^T.
//
// block_inverse: the sweep operator on every pivot k in turn,
//   u = row k of A, p = u_k;  A -= u u^T / p;  then row and column k become u / p, and A_kk -1 / p,
// which turns A = gram + damping I into -A^-1. The pivots are the squares of the diagonal of the
// Cholesky factor, so a matrix is refused where Cholesky refuses it.
//
// woodbury_update_: H -= (H g)(H g)^T / (num_grads + g^T H g) for one gradient after the other.
//
// Per weight, in float32:
//                    device memory                               arithmetic
// block_gram_        m gradients as they are, 6 B bytes of gram  m B FLOP
// block_inverse      2 B bytes read, 4 B written                 B^2 FLOP
// woodbury_update_   m gradients as they are, 6 B bytes          3 m B FLOP
// Of gram or inverse only the lower half and the tiles on the diagonal are read; both halves are
// written, so that results are symmetric to the bit.
#pragma once

#include <cstdint>

#include "damping.cuh"
#include "symmetric_tiles.cuh"

namespace fishleg_ext {

// Gradients [m, K, B].
template <typename Source>  // what they are stored as
struct Gradients {
  const Source* data;
  int64_t count;                                  // m
  int64_t gradient_stride, block_stride, stride;  // elements from one of m, K, B to the next
};

constexpr int kGramGradients = 16, kWoodburyGradients = 4;  // that wait in shared memory

// kCount gradients of this matrix's block, from number `first` on, into shared memory; zeros beyond
// the last gradient and the last weight.
template <int kCount, typename Tiles, typename Source>
__device__ __forceinline__ void fetch(const Tiles& matrix, const Gradients<Source>& grads,
                                      int64_t first, typename Tiles::Entry* to) {
  using T = typename Tiles::Entry;
  const Source* block = grads.data + matrix.matrix * grads.block_stride;
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    const Source* gradient = block + (first + s) * grads.gradient_stride;
    for (int j = matrix.thread; j < Tiles::kSize; j += Tiles::kThreads) {
      const bool inside = first + s < grads.count && j < matrix.size;
      to[s * Tiles::kSize + Tiles::slot(j)] =
          inside ? static_cast<T>(wide(gradient[j * grads.stride])) : T(0);
    }
  }
}

// gram [K, B, B] is added to. Shared memory for kGramGradients vectors.
template <typename Tiles, typename Source>  // a SymmetricTiles that holds B rows; see Gradients
__global__ void __launch_bounds__(Tiles::kBlockThreads, Tiles::kMinBlocks)
    block_gram_kernel(typename Tiles::Entry* __restrict__ gram, Gradients<Source> grads,
                      typename Tiles::Entry alpha, int64_t num_blocks, int size) {
  using T = typename Tiles::Entry;
  Tiles sum(size);
  if (sum.matrix >= num_blocks) return;
  gram += sum.matrix * size * size;
  T* const vectors = sum.shared(kGramGradients * Tiles::kSize);
  sum.set([](int, int, T) { return T(0); });
  for (int64_t first = 0; first < grads.count; first += kGramGradients) {
    fetch<kGramGradients>(sum, grads, first, vectors);
    sum.sync();
#pragma unroll 1
    for (int s = 0; s < kGramGradients; ++s) sum.add_outer(vectors + s * Tiles::kSize, T(1));
    sum.sync();  // before they are overwritten
  }
  // Of an entry's two places the lower one is read, by the thread that writes to both.
  sum.set([&](int i, int j, T value) { return gram[i * size + j] + alpha * value; });
  sum.store([&](int i, int j, T value) { gram[i * size + j] = value; });
}

// gram [K, B, B] -> inverse [K, B, B], info [K]. Shared memory for two vectors and four values.
template <typename Tiles>  // a SymmetricTiles that holds B rows
__global__ void __launch_bounds__(Tiles::kBlockThreads, Tiles::kMinBlocks)
    block_inverse_kernel(const typename Tiles::Entry* __restrict__ gram,
                         typename Tiles::Entry damping, typename Tiles::Entry* __restrict__ inverse,
                         int32_t* __restrict__ info, int64_t num_blocks, int size) {
  using T = typename Tiles::Entry;
  Tiles a(size);
  if (a.matrix >= num_blocks) return;
  gram += a.matrix * size * size;
  inverse += a.matrix * size * size;
  T* const rows = a.shared(2 * Tiles::kSize + 4);
  T* const pivots = rows + 2 * Tiles::kSize;  // of this step and the next, and
  T* const factors = pivots + 2;              // minus their reciprocals

  bool positive = false;
  int raises = 0;
  for (; raises <= kMaxRaises; ++raises) {
    T trace = 0;
    for (int k = 0; k < size && raises > 0; ++k) trace += gram[k * size + k];
    const T shift = raised_damping(damping, trace / size, raises);
    a.set([&](int i, int j, T) { return gram[i * size + j] + (i == j ? shift : T(0)); });
    positive = true;
    for (int k = 0; k < size && positive; ++k) {
      const int now = k % 2;
      T* const u = rows + now * Tiles::kSize;
      a.row(k, u);
      if (a.holds_diagonal(k)) {
        pivots[now] = u[Tiles::slot(k)];
        factors[now] = -1 / pivots[now];
        u[Tiles::slot(k)] = -1;  // from row and column of zeros it makes u / p, and -1 / p
      }
      a.clear(k);
      a.sync();
      positive = pivots[now] > 0 && pivots[now] < static_cast<T>(INFINITY);
      a.add_outer(u, factors[now]);
    }
    if (positive) break;
    a.sync();  // before the next attempt writes to the row that is still read
  }
  const T sign = positive ? T(-1) : static_cast<T>(NAN);
  a.store([&](int i, int j, T value) { inverse[i * size + j] = sign * value; });
  if (a.thread == 0) info[a.matrix] = positive ? raises : -1;
}

// inverse [K, B, B] is brought up to date. Shared memory for kWoodburyGradients + kGrid + 1
// vectors.
template <typename Tiles, typename Source>  // a SymmetricTiles that holds B rows; see Gradients
__global__ void __launch_bounds__(Tiles::kBlockThreads, Tiles::kMinBlocks)
    woodbury_update_kernel(typename Tiles::Entry* __restrict__ inverse, Gradients<Source> grads,
                           typename Tiles::Entry num_grads, int64_t num_blocks, int size) {
  using T = typename Tiles::Entry;
  Tiles h(size);
  if (h.matrix >= num_blocks) return;
  inverse += h.matrix * size * size;
  T* const vectors = h.shared(Tiles::kSize * (kWoodburyGradients + Tiles::kParts + 1));
  T* const parts = vectors + kWoodburyGradients * Tiles::kSize;
  T* const step = parts + Tiles::kParts * Tiles::kSize;  // H g
  h.set([&](int i, int j, T) { return inverse[i * size + j]; });
  for (int64_t first = 0; first < grads.count; first += kWoodburyGradients) {
    fetch<kWoodburyGradients>(h, grads, first, vectors);
    h.sync();
#pragma unroll 1
    for (int s = 0; s < kWoodburyGradients; ++s) {
      T* const gradient = vectors + s * Tiles::kSize;
      h.multiply(gradient, parts);
      h.sync();
      for (int j = h.thread; j < Tiles::kSize; j += Tiles::kThreads) {
        T sum = 0;
        for (int part = 0; part < Tiles::kParts; ++part) sum += parts[part * Tiles::kSize + j];
        step[j] = sum;
      }
      h.sync();
      T denominator = 0;  // every warp sums up all of it
      for (int j = threadIdx.x % kWarpSize; j < Tiles::kSize; j += kWarpSize) {
        denominator += gradient[j] * step[j];
      }
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        denominator += __shfl_xor_sync(0xffffffffu, denominator, offset);
      }
      h.add_outer(step, -1 / (num_grads + denominator));
    }
    h.sync();  // before the gradients are overwritten
  }
  h.store([&](int i, int j, T value) { inverse[i * size + j] = value; });
}

}  // namespace fishleg_ext
