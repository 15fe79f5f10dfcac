// Gram matrices: one half of each symmetric product is computed, and mirrored.
//
// Some gradients at a time are packed column by column, kTileColumns side by side and zeros at the
// end, whatever their strides; tiles of the lower half are then summed in registers over all of
// them, so that the Gram matrix is read and written once for each kDepth gradients.

#include "cpu_block_fisher.h"

#include "cpu_tiles.h"

namespace fishleg_ext {
namespace FISHLEG_EXT_INSTRUCTION_SET {
namespace {

constexpr int kDepth = 128;                // gradients that are packed at a time
constexpr int kRowBlock = 16 * kTileRows;  // rows whose gradients are packed at a time

// Packs columns `begin` to before `end` of some gradients, `width` side by side: [columns / width,
// depth, width].
template <typename T, int width>
void pack(const T* from, int64_t row_stride, int64_t column_stride, int depth, int begin, int end,
          T* to) {
  for (int c = begin; c < end; c += width, to += int64_t{depth} * width) {
    const int here = end - c < width ? end - c : width;
    const T* first = from + c * column_stride;
    if (here < width) std::memset(to, 0, sizeof(T) * depth * width);
    if (column_stride == 1) {
      for (int p = 0; p < depth; ++p) {
        std::memcpy(to + p * width, first + p * row_stride, here * sizeof(T));
      }
    } else {
      for (int j = 0; j < here; ++j) {
        const T* column = first + j * column_stride;
        for (int p = 0; p < depth; ++p) to[p * width + j] = column[p * row_stride];
      }
    }
  }
}

}  // namespace

template <typename T>
int64_t gram_workspace(int size) {
  Workspace workspace(nullptr);
  workspace.take<T>(kDepth * round_up(size, kTileColumns<T>));
  workspace.take<T>(kDepth * kRowBlock);
  return workspace.bytes();
}

template <typename T>
void add_gram(const CpuGram<T>& arrays, int64_t block, int begin, int end, void* memory) {
  constexpr int width = kTileColumns<T>;
  const int size = arrays.size;
  Workspace workspace(memory);
  T* columns = workspace.take<T>(kDepth * round_up(size, width));
  T* rows = workspace.take<T>(kDepth * kRowBlock);
  T* gram = arrays.gram + block * size * size;
  const auto [row_stride, block_stride, column_stride] = arrays.strides;
  for (int64_t done = 0; done < arrays.count; done += kDepth) {
    const int64_t left = arrays.count - done;
    const int depth = static_cast<int>(left < kDepth ? left : kDepth);
    const T* from = arrays.gradients + done * row_stride + block * block_stride;
    pack<T, width>(from, row_stride, column_stride, depth, 0, end, columns);
    for (int start = begin; start < end; start += kRowBlock) {
      const int stop = start + kRowBlock < end ? start + kRowBlock : end;
      pack<T, kTileRows>(from, row_stride, column_stride, depth, start, stop, rows);
      for (int c = 0; c < stop; c += width) {
        const int first = c < start ? start : start + (c - start) / kTileRows * kTileRows;
        for (int r = first; r < stop; r += kTileRows) {
          const T* own = rows + int64_t{r - start} * depth;
          const T* others = columns + int64_t{c} * depth;
          if (c + width <= r + 1 && r + kTileRows <= stop) {
            add_tile(gram + int64_t{r} * size + c, size, own, kTileRows, others, width, depth,
                     arrays.alpha);
            continue;
          }
          // Neither what is right of the diagonal nor what is below may be written to.
          T scratch[kTileRows * width] = {};
          add_tile(scratch, width, own, kTileRows, others, width, depth, arrays.alpha);
          for (int i = 0; i < kTileRows && r + i < stop; ++i) {
            for (int j = 0; j < width && c + j <= r + i; ++j) {
              gram[int64_t{r + i} * size + c + j] += scratch[i * width + j];
            }
          }
        }
      }
    }
  }
  constexpr int kSquare = 16;  // mirrored square by square, so that both sides stay in the cache
  for (int r0 = begin; r0 < end; r0 += kSquare) {
    for (int c0 = 0; c0 < r0 + kSquare; c0 += kSquare) {
      for (int r = r0; r < r0 + kSquare && r < end; ++r) {
        for (int c = c0; c < c0 + kSquare && c < r; ++c) {
          gram[int64_t{c} * size + r] = gram[int64_t{r} * size + c];
        }
      }
    }
  }
}

#define FISHLEG_EXT_INSTANTIATE(T)         \
  template int64_t gram_workspace<T>(int); \
  template void add_gram<T>(const CpuGram<T>&, int64_t, int, int, void*);
FISHLEG_EXT_INSTANTIATE(float)
FISHLEG_EXT_INSTANTIATE(double)

}  // namespace FISHLEG_EXT_INSTRUCTION_SET
}  // namespace fishleg_ext
