// What subtracts a few columns at a time from the lower half of a symmetric matrix: elimination and
// inversion alike.
#pragma once

#include "cpu_tiles.h"

namespace fishleg_ext {
namespace FISHLEG_EXT_INSTRUCTION_SET {
namespace {

// Columns between two updates: more for large blocks, which do not fit into caches.
constexpr int kPanel = 64, kSmallPanel = 32, kLargeBlock = 768;
constexpr int kRowBlock = 16 * kTileRows;      // rows whose multipliers are in the L2 cache
constexpr int64_t kUnpackedBytes = 64 * 1024;  // of a panel that is used as it lies

// Elements from one row of a square array to the next: an odd number of cache lines, so that
// columns do not fall into few sets of a cache.
template <typename T>
int64_t leading_dimension(int size) {
  constexpr int64_t line = kCacheLine / sizeof(T);
  const int64_t padded = round_up(size + kTileRows, kRowVectors * Vec<T>::kLanes);
  return padded / line % 2 ? padded : padded + line;
}

// Subtracts U^T U, U [depth, size], from the lower half of h [size, size]. Writes to the right of
// the diagonal, too, up to a multiple of the width of a tile.
template <typename T>
void subtract_panel(T* h, int64_t ld, const T* u, int64_t u_stride, int depth, int size,
                    T* packed) {
  constexpr int64_t width = kTileColumns<T>;
  const bool pack = int64_t{size} * depth * static_cast<int64_t>(sizeof(T)) > kUnpackedBytes;
  T* packed_rows = packed + round_up(size, width) * depth;
  for (int64_t c = 0; pack && c < size; c += width) {
    for (int p = 0; p < depth; ++p) {
      std::memcpy(packed + c * depth + p * width, u + p * u_stride + c, width * sizeof(T));
    }
  }
  for (int64_t start = 0; start < size; start += kRowBlock) {
    const int64_t end = start + kRowBlock < size ? start + kRowBlock : size;
    for (int64_t r = start; pack && r < end; r += kTileRows) {
      for (int p = 0; p < depth; ++p) {
        std::memcpy(packed_rows + (r - start) * depth + p * kTileRows, u + p * u_stride + r,
                    kTileRows * sizeof(T));
      }
    }
    for (int64_t c = 0; c < end; c += width) {
      const T* columns = pack ? packed + c * depth : u + c;
      const int64_t column_stride = pack ? width : u_stride;
      const int64_t diagonal = c / kTileRows * kTileRows;
      for (int64_t r = diagonal > start ? diagonal : start; r < end; r += kTileRows) {
        const T* rows = pack ? packed_rows + (r - start) * depth : u + r;
        const int64_t row_stride = pack ? kTileRows : u_stride;
        T* tile = h + r * ld + c;
        if (r + kTileRows <= end) {
          add_tile(tile, ld, rows, row_stride, columns, column_stride, depth, T{-1});
        } else {  // what is below is not to be written to
          T scratch[kTileRows * width] = {};
          for (int64_t i = 0; i < end - r; ++i) {
            std::memcpy(scratch + i * width, tile + i * ld, width * sizeof(T));
          }
          add_tile(scratch, width, rows, row_stride, columns, column_stride, depth, T{-1});
          for (int64_t i = 0; i < end - r; ++i) {
            std::memcpy(tile + i * ld, scratch + i * width, width * sizeof(T));
          }
        }
      }
    }
  }
}

// Elements that `subtract_panel` packs for blocks of `size`.
template <typename T>
int64_t packed_elements(int size) {
  return (round_up(size, kTileColumns<T>) + kRowBlock) * kPanel;
}

// column[c] -= sum over p of factors[p] * u[p][c], for c < size.
template <typename T>
inline void subtract_rows(T* column, const T* u, int64_t u_stride, const T* factors, int depth,
                          int size) {
  using V = typename Vec<T>::Type;
  constexpr int lanes = Vec<T>::kLanes, vectors = kRowVectors;
  for (int c = 0; c < size; c += vectors * lanes) {  // rows are padded
    V sums[vectors];
    for (int j = 0; j < vectors; ++j) sums[j] = load(column + c + j * lanes);
    for (int p = 0; p < depth; ++p) {
      const V factor = factors[p] - V{};
      for (int j = 0; j < vectors; ++j) sums[j] -= factor * load(u + p * u_stride + c + j * lanes);
    }
    for (int j = 0; j < vectors; ++j) store(column + c + j * lanes, sums[j]);
  }
}

}  // namespace
}  // namespace FISHLEG_EXT_INSTRUCTION_SET
}  // namespace fishleg_ext
