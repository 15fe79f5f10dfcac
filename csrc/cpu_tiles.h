// What the CPU kernels share: vectors of the instruction set that a file is compiled for, products
// of two panels whose tiles stay in registers, and a thread's workspace.
//
// Everything is in an unnamed namespace within that of the instruction set, and templates of the
// standard library stay out of it: the linker must not take a function from a file that was
// compiled for another machine.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#ifndef FISHLEG_EXT_INSTRUCTION_SET
#define FISHLEG_EXT_INSTRUCTION_SET portable
#endif

namespace fishleg_ext {
namespace FISHLEG_EXT_INSTRUCTION_SET {
namespace {

// A tile of kTileRows x (kTileVectors vectors) of sums, with what multiplies it, fills the
// registers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 12, kTileVectors = 2;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVectors = 2;
#else
constexpr int kVectorBytes = 16, kTileRows = 6, kTileVectors = 2;
#endif
constexpr int kRowVectors = 4;  // of a row, worked on at a time; rows are padded to that
constexpr int kCacheLine = 64;

template <typename T>
struct Vec {
  // Of the alignment of T: the address need not be that of a vector.
  typedef T Type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
};

template <typename T>
inline typename Vec<T>::Type load(const T* at) {
  return *reinterpret_cast<const typename Vec<T>::Type*>(at);
}

template <typename T>
inline void store(T* at, typename Vec<T>::Type values) {
  *reinterpret_cast<typename Vec<T>::Type*>(at) = values;
}

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <typename T>
constexpr int64_t kTileColumns = kTileVectors * Vec<T>::kLanes;

// h[r][c] += scale * sum over p of rows[p][r] * columns[p][c], a tile. A function of its own, so
// that no register is taken by what calls it.
template <typename T>
__attribute__((noinline)) void add_tile(T* h, int64_t ld, const T* rows, int64_t row_stride,
                                        const T* columns, int64_t column_stride, int depth,
                                        T scale) {
  using V = typename Vec<T>::Type;
  constexpr int lanes = Vec<T>::kLanes;
  V sums[kTileRows][kTileVectors] = {};
  for (int r = 0; r < kTileRows; ++r) __builtin_prefetch(h + r * ld, 1);
  for (int p = 0; p < depth; ++p) {
    V values[kTileVectors];
    for (int j = 0; j < kTileVectors; ++j)
      values[j] = load(columns + p * column_stride + j * lanes);
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r) {
      const V factor = rows[p * row_stride + r] - V{};
      for (int j = 0; j < kTileVectors; ++j) sums[r][j] += factor * values[j];
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int j = 0; j < kTileVectors; ++j) {
      T* at = h + r * ld + j * lanes;
      store(at, load(at) + scale * sums[r][j]);
    }
  }
}

// Transposes a square of vectors: rows i and i + kLanes / 2 are interleaved, log2(kLanes) times.
template <typename T>
inline void transpose(typename Vec<T>::Type (&rows)[Vec<T>::kLanes]) {
  using V = typename Vec<T>::Type;
  constexpr int lanes = Vec<T>::kLanes;
#ifdef __clang__  // which shuffles by constants alone
  V columns[lanes];
  for (int i = 0; i < lanes; ++i) {
    for (int j = 0; j < lanes; ++j) columns[j][i] = rows[i][j];
  }
  for (int i = 0; i < lanes; ++i) rows[i] = columns[i];
#else
  decltype(V{} < V{}) low, high;
  for (int i = 0; i < lanes; ++i) {
    low[i] = i / 2 + i % 2 * lanes;
    high[i] = low[i] + lanes / 2;
  }
  for (int stage = 1; stage < lanes; stage *= 2) {
    V interleaved[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      interleaved[2 * i] = __builtin_shuffle(rows[i], rows[i + lanes / 2], low);
      interleaved[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + lanes / 2], high);
    }
    for (int i = 0; i < lanes; ++i) rows[i] = interleaved[i];
  }
#endif
}

// Writes the lower half of rows `begin` to before `end` of a symmetric matrix, [end, end], times
// `scale`, to both halves of another, which may be the same.
template <typename T>
void mirror(const T* from, int64_t from_ld, T* to, int64_t to_ld, int begin, int end, T scale) {
  using V = typename Vec<T>::Type;
  constexpr int lanes = Vec<T>::kLanes;
  for (int r0 = begin; r0 < end; r0 += lanes) {
    const bool whole = r0 + lanes <= end;
    for (int c0 = 0; c0 < r0 + lanes && c0 < end; c0 += lanes) {
      if (whole && c0 + lanes <= r0) {
        V rows[lanes];
        for (int i = 0; i < lanes; ++i) {
          rows[i] = scale * load(from + (r0 + i) * from_ld + c0);
          store(to + (r0 + i) * to_ld + c0, rows[i]);
        }
        transpose<T>(rows);
        for (int i = 0; i < lanes; ++i) store(to + (c0 + i) * to_ld + r0, rows[i]);
        continue;
      }
      for (int r = r0; r < r0 + lanes && r < end; ++r) {
        for (int c = c0; c < c0 + lanes && c <= r; ++c) {
          to[c * to_ld + r] = to[r * to_ld + c] = scale * from[r * from_ld + c];
        }
      }
    }
  }
}

// Hands out parts of a thread's workspace, each at a cache line of its own; or counts its bytes.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename U>
  U* take(int64_t count) {
    char* part = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(U)), kCacheLine);
#ifdef __SANITIZE_ADDRESS__  // nothing may be read or written between two parts
    if (part != nullptr) __asan_poison_memory_region(memory_ + bytes_, kCacheLine);
    bytes_ += kCacheLine;
#endif
    return reinterpret_cast<U*>(part);
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace
}  // namespace FISHLEG_EXT_INSTRUCTION_SET
}  // namespace fishleg_ext
