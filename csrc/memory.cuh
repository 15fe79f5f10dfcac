// How the kernels see memory: dynamic shared memory as an array, 16 bytes as one vector, narrow
// numbers as what they stand for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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

// 16-bit floating point, as it is stored.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Any floating-point value in single precision, or in double if that is what it is.
__device__ __forceinline__ float wide(float value) { return value; }
__device__ __forceinline__ double wide(double value) { return value; }
__device__ __forceinline__ float wide(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ __forceinline__ float wide(Half value) {
  const unsigned magnitude = (value.bits & 0x7fffu) << 13;
  // The exponents' biases differ by 112; the product is exact, of subnormal numbers, too.
  const float scaled = __uint_as_float(magnitude) * __uint_as_float((127u + 112u) << 23);
  const bool finite = magnitude < 0x7c00u << 13;
  const unsigned bits = finite ? __float_as_uint(scaled) : magnitude | 0x7f800000u;
  return __uint_as_float(bits | (value.bits & 0x8000u) << 16);
}

}  // namespace fishleg_ext
