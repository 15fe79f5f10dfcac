// How damping is raised where a matrix is not positive definite to rounding.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>

namespace fishleg_ext {

constexpr int kMaxRaises = 12;

// The damping of an attempt: `damping`, then ten times more each time; from 0 to eps * mean(diag),
// and then ten times more.
template <typename T>
__device__ __forceinline__ T raised_damping(T damping, T mean_diagonal, int raises) {
  if (raises == 0) return damping;
  const T eps = sizeof(T) == 8 ? static_cast<T>(DBL_EPSILON) : static_cast<T>(FLT_EPSILON);
  T value = damping > 0 ? 10 * damping : eps * mean_diagonal;
  for (int i = 1; i < raises; ++i) value *= 10;
  return value;
}

}  // namespace fishleg_ext
