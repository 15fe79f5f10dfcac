// Optimal Brain Surgeon within blocks of weights, on a CPU; no PyTorch here.
//
// cpu_obs.cpp is compiled once for each instruction set, each into a namespace of its own; who
// calls chooses by what the machine has. Blocks are independent: callers share them among threads.
#pragma once

#include <cstdint>

#include "obs_types.h"

namespace fishleg_ext {

// Symmetric matrices [K, B, B], of which the lower halves are read.
template <typename T>
struct CpuMatrices {
  const T* first;
  int64_t block_stride;  // elements from one to the next; 0 where all blocks share one
  int64_t row_stride;
};

// The arrays of an elimination of K blocks of B weights.
template <typename T>
struct CpuElimination {
  const T* weight;  // [K, B]
  CpuMatrices<T> inverse;
  const bool* alive;  // [K, B]
  int32_t* rank;      // [K, B]
  T* cost;            // [K, B]
};

// Systems M[S, S] x[S] = rhs[S], one for each of K blocks.
template <typename T>
struct CpuSystems {
  CpuMatrices<T> matrix;
  const bool* set;  // S, [K, B]
  const T* rhs;     // [K, B]
  T* x;             // [K, B], zero outside S
  bool* solved;     // [K], false where M[S, S] is not positive definite to rounding
};

#define FISHLEG_EXT_CPU_KERNELS(instruction_set)                                               \
  namespace instruction_set {                                                                  \
  /* Bytes of workspace, aligned to 64, that one thread needs for blocks of `size` weights. */ \
  template <typename T>                                                                        \
  int64_t obs_workspace(int size, int group);                                                  \
  /* Eliminates blocks `begin` to before `end`. */                                             \
  template <typename T>                                                                        \
  void obs_eliminate(const CpuElimination<T>& arrays, const EliminateOptions<T>& options,      \
                     int64_t begin, int64_t end, void* workspace);                             \
  /* Solves systems `begin` to before `end`. */                                                \
  template <typename T>                                                                        \
  void masked_solve(const CpuSystems<T>& systems, int size, int64_t begin, int64_t end,        \
                    void* workspace);                                                          \
  }

FISHLEG_EXT_CPU_KERNELS(portable)
FISHLEG_EXT_CPU_KERNELS(avx2)
FISHLEG_EXT_CPU_KERNELS(avx512)

}  // namespace fishleg_ext
