// Gram matrices and inverses of blocks: one half of what is symmetric is computed, and mirrored.
//
// Gram matrices: some gradients at a time are packed column by column, kTileColumns side by side
// and zeros at the end, whatever their strides; tiles of the lower half are then summed in
// registers over all of them, so that the Gram matrix is read and written once for each kDepth
// gradients.
//
// Inverses: some rows K at a time are swept (Gauss and Jordan). With A_KK = L L^T and
// U = L^-1 [A_K*, with the identity in the place of A_KK], zeros take the place of the rows and
// columns K, and U^T U is subtracted from the whole matrix. That puts -A_KK^-1 and -A_KK^-1 A_K* in
// their places; once all are swept, -A^-1 is left, after B^3 operations. The pivots are those of
// the Cholesky factorisation.

#include "cpu_block_fisher.h"

#include <cmath>

#include "cpu_panels.h"

namespace fishleg_ext {
namespace FISHLEG_EXT_INSTRUCTION_SET {
namespace {

constexpr int kDepth = 128;  // gradients that are packed at a time
constexpr int kSweep = 16;   // rows that are swept at a time, of blocks that fit into a cache

// Packs columns `begin` to before `end` of some gradients, `width` side by side: [columns / width,
// depth, width].
template <typename T, int width>
void pack(const T* from, int64_t row_stride, int64_t column_stride, int depth, int begin, int end,
          T* to) {
  for (int c = begin; c < end; c += width, to += int64_t{depth} * width) {
    const int here = end - c < width ? end - c : width;
    const T* first = from + c * column_stride;
    if (here < width) std::memset(to, 0, sizeof(T) * depth * width);
    if (column_stride == 1 && here == width) {
      for (int p = 0; p < depth; ++p) {  // of a size that the compiler knows
        std::memcpy(to + p * width, first + p * row_stride, width * sizeof(T));
      }
    } else {
      for (int j = 0; j < here; ++j) {
        const T* column = first + j * column_stride;
        for (int p = 0; p < depth; ++p) to[p * width + j] = column[p * row_stride];
      }
    }
  }
}

template <typename T>
bool finite(const T* values, int64_t count) {
  constexpr int lanes = Vec<T>::kLanes;
  typename Vec<T>::Type differences = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) differences += load(values + i) - load(values + i);
  T sum = 0;
  for (; i < count; ++i) sum += values[i] - values[i];
  for (int lane = 0; lane < lanes; ++lane) sum += differences[lane];
  return sum == 0;  // else it is NaN
}

// Factorises a [size, kPanel] = L L^T in place: the rows of the lower half are those of L, and the
// diagonal is 1 / L_ii. False where it is not positive definite.
template <typename T>
bool factorise(T (*a)[kPanel], int size) {
  for (int j = 0; j < size; ++j) {
    const T pivot = a[j][j];
    if (!(pivot > 0 && pivot < static_cast<T>(INFINITY))) return false;
    const T scale = 1 / std::sqrt(pivot);
    T column[kPanel];
    for (int r = j + 1; r < size; ++r) column[r] = a[r][j] *= scale;
    a[j][j] = scale;
    for (int r = j + 1; r < size; ++r) {
      for (int c = j + 1; c <= r; ++c) a[r][c] -= column[r] * column[c];
    }
  }
  return true;
}

// A thread's arrays for one inversion.
template <typename T>
struct Sweep {
  Sweep(Workspace& workspace, int size)
      : ld(leading_dimension<T>(size)),
        h(workspace.take<T>(size * ld)),
        u(workspace.take<T>(kPanel * ld)),
        packed(workspace.take<T>(packed_elements<T>(size))) {}

  int64_t ld;
  T* h;       // [size, ld], the lower half of what is swept so far
  T* u;       // [kPanel, ld]
  T* packed;  // for subtract_panel
};

// Inverts one block; false where it is not positive definite to rounding, or not finite.
template <typename T>
bool invert(const T* matrix, T damping, T* inverse, int size, Workspace workspace) {
  const Sweep<T> arrays(workspace, size);
  const auto [ld, h, u, packed] = arrays;
  const int panel = size > kLargeBlock ? kPanel : kSweep;
  if (!finite(matrix, int64_t{size} * size)) return false;
  for (int r = 0; r < size; ++r) {
    std::memcpy(h + r * ld, matrix + int64_t{r} * size, (r + 1) * sizeof(T));
    h[r * ld + r] += damping;
  }
  std::memset(u, 0, sizeof(T) * panel * ld);
  for (int first = 0; first < size; first += panel) {
    const int depth = size - first < panel ? size - first : panel;
    T a[kPanel][kPanel];
    for (int i = 0; i < depth; ++i) {
      T* row = h + (first + i) * ld;
      std::memcpy(u + i * ld, row, first * sizeof(T));
      std::memcpy(a[i], row + first, (i + 1) * sizeof(T));
      std::memset(u + i * ld + first, 0, depth * sizeof(T));
      u[i * ld + first + i] = 1;
      std::memset(row, 0, (first + i + 1) * sizeof(T));
    }
    for (int r = first + depth; r < size; ++r) {
      T* row = h + r * ld + first;
      for (int i = 0; i < depth; ++i) {
        u[i * ld + r] = row[i];
        row[i] = 0;
      }
    }
    if (!factorise(a, depth)) return false;
    for (int i = 0; i < depth; ++i) {
      T* row = u + i * ld;
      subtract_rows(row, u, ld, a[i], i, size);
      for (int c = 0; c < size; ++c) row[c] *= a[i][i];
    }
    subtract_panel(h, ld, u, ld, depth, size, packed);
  }
  mirror(h, ld, inverse, size, 0, size, T{-1});
  return true;
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
          // What is right of the diagonal is written, too, and then overwritten by the mirror
          // image; what is right of `end` or below is not to be.
          if (c + width <= end && r + kTileRows <= stop) {
            add_tile(gram + int64_t{r} * size + c, size, own, kTileRows, others, width, depth,
                     arrays.alpha);
            continue;
          }
          T scratch[kTileRows * width] = {};
          add_tile(scratch, width, own, kTileRows, others, width, depth, arrays.alpha);
          const int here = c + width <= end ? width : end - c;
          for (int i = 0; i < kTileRows && r + i < stop; ++i) {
            T* to = gram + int64_t{r + i} * size + c;
            for (int j = 0; j < here; ++j) to[j] += scratch[i * width + j];
          }
        }
      }
    }
  }
  mirror(gram, size, gram, size, begin, end, T{1});
}

template <typename T>
int64_t inverse_workspace(int size) {
  Workspace workspace(nullptr);
  Sweep<T>(workspace, size);
  return workspace.bytes();
}

template <typename T>
void block_inverse(const CpuInversion<T>& arrays, int64_t begin, int64_t end, void* memory) {
  const int64_t elements = int64_t{arrays.size} * arrays.size;
  for (int64_t k = begin; k < end; ++k) {
    arrays.inverted[k] = invert(arrays.matrix + k * elements, arrays.damping,
                                arrays.inverse + k * elements, arrays.size, Workspace(memory));
  }
}

#define FISHLEG_EXT_INSTANTIATE(T)                                        \
  template int64_t gram_workspace<T>(int);                                \
  template void add_gram<T>(const CpuGram<T>&, int64_t, int, int, void*); \
  template int64_t inverse_workspace<T>(int);                             \
  template void block_inverse<T>(const CpuInversion<T>&, int64_t, int64_t, void*);
FISHLEG_EXT_INSTANTIATE(float)
FISHLEG_EXT_INSTANTIATE(double)

}  // namespace FISHLEG_EXT_INSTRUCTION_SET
}  // namespace fishleg_ext
