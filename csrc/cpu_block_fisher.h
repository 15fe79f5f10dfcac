// Gram matrices of gradients, on a CPU; no PyTorch here. See cpu_obs.h for instruction sets.
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

#define FISHLEG_EXT_CPU_GRAM(instruction_set)                                                     \
  namespace instruction_set {                                                                     \
  template <typename T>                                                                           \
  int64_t gram_workspace(int size);                                                               \
  /* Adds alpha * sum g g^T to rows `begin` to before `end` of one block, and their mirror image. \
   */                                                                                             \
  template <typename T>                                                                           \
  void add_gram(const CpuGram<T>& arrays, int64_t block, int begin, int end, void* workspace);    \
  }

FISHLEG_EXT_CPU_GRAM(portable)
FISHLEG_EXT_CPU_GRAM(avx2)
FISHLEG_EXT_CPU_GRAM(avx512)

}  // namespace fishleg_ext
