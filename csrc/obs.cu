#include "obs.h"

#include "obs.cuh"

namespace fishleg_ext {

int64_t obs_eliminate_shared_bytes(int size, int element_size) {
  return element_size == 8 ? eliminate_shared_bytes<double>(size)
                           : eliminate_shared_bytes<float>(size);
}

template <typename T>
cudaError_t obs_eliminate(const T* weight, const T* inverse, int64_t inverse_stride,
                          const bool* alive, int32_t* rank, T* cost, int64_t num_blocks, int size,
                          int n, int m, T stop, bool dead_first, cudaStream_t stream) {
  if (size > kMaxEliminateSize) return cudaErrorInvalidValue;
  const int bytes = static_cast<int>(eliminate_shared_bytes<T>(size));
  const cudaError_t error = cudaFuncSetAttribute(
      obs_eliminate_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const EliminateOptions<T> options{size, inverse_stride, n, m, stop, dead_first};
  obs_eliminate_kernel<T>
      <<<static_cast<unsigned>(num_blocks), eliminate_threads(size), bytes, stream>>>(
          weight, inverse, alive, rank, cost, options);
  return cudaGetLastError();
}

template cudaError_t obs_eliminate<float>(const float*, const float*, int64_t, const bool*,
                                          int32_t*, float*, int64_t, int, int, int, float, bool,
                                          cudaStream_t);
template cudaError_t obs_eliminate<double>(const double*, const double*, int64_t, const bool*,
                                           int32_t*, double*, int64_t, int, int, int, double, bool,
                                           cudaStream_t);

}  // namespace fishleg_ext
