// A symmetric matrix in registers: what Gram matrices, inverses and eliminations are made of.
//
// Of a B x B matrix the lower half is kept, cut into tiles of kTile x kTile, one to a thread:
// kGrid (kGrid + 1) / 2 threads hold up to kGrid * kTile rows. Tiles on the diagonal are kept in
// full. All that is ever done to it is to read a row, and to add a multiple of v v^T, for which a
// thread takes its 2 kTile entries of v from shared memory in 16-byte loads and does kTile^2
// multiply-adds: the matrix itself moves neither through device nor through shared memory.
//
// A matrix whose threads are one warp needs no other warp, so kMatricesPerBlock of them share a
// thread block; larger ones have one of their own.
//
// Invariants: entries beyond B are 0 and never loaded or stored; threads beyond the last tile go
// along with a copy of it that they give to nobody.
#pragma once

#include <cstdint>

#include "memory.cuh"

namespace fishleg_ext {

constexpr int kWarpSize = 32;

// T: float or double, of the entries. kGrid: tiles along a side. kTile: entries along a tile's.
// kMinThreadBlocks: that a multiprocessor is to have room for, which bounds the registers of each.
template <typename T, int kGrid, int kTile, int kMinThreadBlocks>
struct SymmetricTiles {
  using Entry = T;
  static constexpr int kVector = Vector<T>::kSize;
  static constexpr int kMinBlocks = kMinThreadBlocks;
  static_assert(kTile % kVector == 0, "16-byte loads");
  static constexpr int kSize = kGrid * kTile;  // the largest B
  static constexpr int kTiles = kGrid * (kGrid + 1) / 2;
  static constexpr int kParts = kGrid;  // see `multiply`
  static constexpr int kThreads = (kTiles + kWarpSize - 1) / kWarpSize * kWarpSize;
  static constexpr bool kOneWarp = kThreads == kWarpSize;
  static constexpr int kMatricesPerBlock = kOneWarp ? 4 : 1;
  static constexpr int kBlockThreads = kThreads * kMatricesPerBlock;
  static constexpr int kHeld = (kSize + kWarpSize - 1) / kWarpSize;  // entries of v for each lane

  int size;        // B
  int64_t matrix;  // which of all matrices
  int thread;      // among those of this matrix
  int tile_row, tile_column;
  bool mine;  // this thread has a tile
  T at[kTile][kTile];

  __device__ __forceinline__ explicit SymmetricTiles(int matrix_size) : size(matrix_size) {
    matrix = static_cast<int64_t>(blockIdx.x) * kMatricesPerBlock + threadIdx.x / kThreads;
    thread = threadIdx.x % kThreads;
    mine = thread < kTiles;
    int rest = mine ? thread : kTiles - 1;
    tile_row = 0;
    while (rest > tile_row) rest -= ++tile_row;
    tile_column = rest;
  }

  // Thread blocks for so many matrices.
  static unsigned blocks(int64_t matrices) {
    return static_cast<unsigned>((matrices + kMatricesPerBlock - 1) / kMatricesPerBlock);
  }

  // This matrix's part of shared memory, of which each has `count` values.
  __device__ __forceinline__ T* shared(int count) const {
    return reinterpret_cast<T*>(dynamic_shared_memory()) + threadIdx.x / kThreads * count;
  }
  static constexpr int shared_bytes(int count) {
    return static_cast<int>(sizeof(T)) * count * kMatricesPerBlock;
  }

  // Until here, for all threads of this matrix.
  __device__ __forceinline__ void sync() const {
    if constexpr (kOneWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Where entry j of a vector lies in shared memory: the first 16 bytes of all tiles, then the
  // next, so that threads with tiles side by side read 16 bytes side by side.
  static __device__ __forceinline__ int slot(int j) {
    const int inside = j % kTile;
    return (inside / kVector * kGrid + j / kTile) * kVector + inside % kVector;
  }

  // The entries of a vector in shared memory that belong to a tile.
  static __device__ __forceinline__ void entries(T* vector, int tile, T (&out)[kTile]) {
#pragma unroll
    for (int part = 0; part < kTile / kVector; ++part) {
      const Vector<T> values = vector_at(vector + (part * kGrid + tile) * kVector);
#pragma unroll
      for (int e = 0; e < kVector; ++e) out[part * kVector + e] = values.at[e];
    }
  }

  // Every entry of the matrix becomes `change` of its place and of what it was; 0 beyond the
  // matrix.
  template <typename Change>  // (int i, int j, T value) -> T
  __device__ __forceinline__ void set(Change change) {
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      const int i = tile_row * kTile + r;
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        const int j = tile_column * kTile + c;
        at[r][c] = i < size && j < size ? change(i, j, at[r][c]) : T(0);
      }
    }
  }

  // Gives every entry of the lower half with its place to `take`; off the diagonal once more, with
  // the place across it.
  template <typename Take>  // (int i, int j, T value) -> void
  __device__ __forceinline__ void store(Take take) const {
    if (!mine) return;
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      const int i = tile_row * kTile + r;
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        const int j = tile_column * kTile + c;
        if (i >= size || j > i) continue;
        take(i, j, at[r][c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
      const int j = tile_column * kTile + c;
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
        const int i = tile_row * kTile + r;
        if (i >= size || j >= i) continue;
        take(j, i, at[r][c]);
      }
    }
  }

  // Row q, which is column q, into a vector in shared memory. Not in order with what follows.
  __device__ __forceinline__ void row(int q, T* vector) const {
    const int tile = q / kTile, inside = q % kTile;
    if (!mine) return;
    if (tile_row == tile) {
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
        if (r != inside) continue;
#pragma unroll
        for (int c = 0; c < kTile; ++c) vector[slot(tile_column * kTile + c)] = at[r][c];
      }
    } else if (tile_column == tile) {
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        if (c != inside) continue;
#pragma unroll
        for (int r = 0; r < kTile; ++r) vector[slot(tile_row * kTile + r)] = at[r][c];
      }
    }
  }

  // Whether this thread has entry (q, q), which it is the one to write in `row`.
  __device__ __forceinline__ bool holds_diagonal(int q) const {
    return mine && tile_row == q / kTile && tile_column == q / kTile;
  }

  // Row and column q become 0.
  __device__ __forceinline__ void clear(int q) {
    const int r_clear = q - tile_row * kTile, c_clear = q - tile_column * kTile;
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        if (r == r_clear || c == c_clear) at[r][c] = 0;
      }
    }
  }

  // Add factor * v v^T, v in shared memory.
  __device__ __forceinline__ void add_outer(T* vector, T factor) {
    T right[kTile];
    entries(vector, tile_column, right);
#pragma unroll
    for (int c = 0; c < kTile; ++c) right[c] *= factor;
#pragma unroll
    for (int part = 0; part < kTile / kVector; ++part) {
      const Vector<T> left = vector_at(vector + (part * kGrid + tile_row) * kVector);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
#pragma unroll
        for (int c = 0; c < kTile; ++c) at[part * kVector + e][c] += left.at[e] * right[c];
      }
    }
  }

  // The product with a vector in shared memory, in as many parts as there are tiles along a side:
  // `parts` is kGrid vectors, which add up to it. Not in order with what follows.
  __device__ __forceinline__ void multiply(T* vector, T* parts) const {
    T left[kTile], right[kTile];
    entries(vector, tile_row, left);
    entries(vector, tile_column, right);
    if (!mine) return;
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      T sum = 0;
#pragma unroll
      for (int c = 0; c < kTile; ++c) sum += at[r][c] * right[c];
      parts[tile_column * kSize + slot(tile_row * kTile + r)] = sum;
    }
    if (tile_row == tile_column) return;  // it is there in full
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
      T sum = 0;
#pragma unroll
      for (int r = 0; r < kTile; ++r) sum += at[r][c] * left[r];
      parts[tile_row * kSize + slot(tile_column * kTile + c)] = sum;
    }
  }
};

// Names a type to a generic lambda.
template <typename Named>
struct Type {
  using type = Named;
};

// Calls run(Type<SymmetricTiles<T, kGrid, kTile>>) for those that hold B rows of T in the fewest
// threads and registers; false where none do.
//
//   B up to      28   56   64  128  192 (double: 176)
//   threads      32   32  160  160  320 (double: 256)
template <typename T, typename Run>
bool with_tiles(int size, Run run) {
  if constexpr (sizeof(T) == 8) {
    if (size <= 28) return run(Type<SymmetricTiles<T, 7, 4, 5>>()), true;
    if (size <= 56) return run(Type<SymmetricTiles<T, 7, 8, 2>>()), true;
    if (size <= 64) return run(Type<SymmetricTiles<T, 16, 4, 3>>()), true;
    if (size <= 128) return run(Type<SymmetricTiles<T, 16, 8, 1>>()), true;
    if (size <= 176) return run(Type<SymmetricTiles<T, 22, 8, 1>>()), true;
  } else {
    if (size <= 28) return run(Type<SymmetricTiles<T, 7, 4, 6>>()), true;
    if (size <= 56) return run(Type<SymmetricTiles<T, 7, 8, 3>>()), true;
    if (size <= 64) return run(Type<SymmetricTiles<T, 16, 4, 4>>()), true;
    if (size <= 128) return run(Type<SymmetricTiles<T, 16, 8, 2>>()), true;
    if (size <= 192) return run(Type<SymmetricTiles<T, 24, 8, 1>>()), true;
  }
  return false;
}

// The largest B that `with_tiles` has tiles for.
constexpr int largest_in_tiles(int element_size) { return element_size == 8 ? 176 : 192; }

}  // namespace fishleg_ext
