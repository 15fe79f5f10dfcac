// How the kernels see memory: dynamic shared memory as an array, and 16 bytes as one vector.
#pragma once

#include <cuda_runtime.h>

namespace fishleg_ext {

// The block's dynamic shared memory, aligned for 16-byte accesses.
#ifndef CUDA_ON_HOST
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}
#else
using cuda_on_host::dynamic_shared_memory;
#endif

// 16 bytes of T: loaded and stored by one instruction.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

template <typename T>
__device__ __forceinline__ Vector<T>& vector_at(T* address) {
  return *reinterpret_cast<Vector<T>*>(address);
}

}  // namespace fishleg_ext
