// Gram matrices of gradients and inverses of blocks, on a CPU; no PyTorch here. See cpu_obs.h for
// instruction sets.
#pragma once

#include <cstdint>

namespace fishleg_ext {

// Gradients [m, K, B] by strides, added to symmetric matrices [K, B, B]: both halves.
template <typename T>
struct CpuGram {
  T* gram;  // [K, B, B]
  const T* gradients;
  int64_t count;  // m
  int64_t strides[3];
  int size;  // B
  T alpha;
};

// Symmetric positive definite matrices, [K, B, B]; of their upper halves it is only read whether
// they are finite.
template <typename T>
struct CpuInversion {
  const T* matrix;
  T* inverse;      // [K, B, B], of matrix + damping * I; both halves
  bool* inverted;  // [K], false where there is none, and then nothing is written to it
  int size;        // B
  T damping;
};

#define FISHLEG_EXT_CPU_BLOCK_FISHER(instruction_set)                                             \
  namespace instruction_set {                                                                     \
  template <typename T>                                                                           \
  int64_t gram_workspace(int size);                                                               \
  /* Adds alpha * sum g g^T to rows `begin` to before `end` of one block, and their mirror image. \
   */                                                                                             \
  template <typename T>                                                                           \
  void add_gram(const CpuGram<T>& arrays, int64_t block, int begin, int end, void* workspace);    \
  template <typename T>                                                                           \
  int64_t inverse_workspace(int size);                                                            \
  template <typename T>                                                                           \
  void block_inverse(const CpuInversion<T>& arrays, int64_t begin, int64_t end, void* workspace); \
  }

FISHLEG_EXT_CPU_BLOCK_FISHER(portable)
FISHLEG_EXT_CPU_BLOCK_FISHER(avx2)
FISHLEG_EXT_CPU_BLOCK_FISHER(avx512)

}  // namespace fishleg_ext
