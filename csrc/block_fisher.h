// Launchers of csrc/block_fisher.cu. Plain pointers and sizes, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fishleg_ext {

// The most weights in a block, B, that the kernels of this and of obs.h hold in registers.
int largest_block(int element_size);

// How gradients are stored.
enum class Stored { kFloat, kDouble, kHalf, kBFloat16 };

// Gradients [m, K, B] of any strides, in elements.
struct StoredGradients {
  const void* data;
  Stored stored;
  int64_t count, gradient_stride, block_stride, stride;
};

// See the kernels of the same names. T: float or double. `num_blocks` and `size` at least 1. An
// error where blocks are too large, or where gradients of this kind do not go with T: doubles with
// float, half precision with double.
template <typename T>
cudaError_t block_gram(T* gram, const StoredGradients& grads, T alpha, int64_t num_blocks, int size,
                       cudaStream_t stream);
template <typename T>
cudaError_t block_inverse(const T* gram, T damping, T* inverse, int32_t* info, int64_t num_blocks,
                          int size, cudaStream_t stream);
template <typename T>
cudaError_t woodbury_update(T* inverse, const StoredGradients& grads, T num_grads,
                            int64_t num_blocks, int size, cudaStream_t stream);

}  // namespace fishleg_ext
