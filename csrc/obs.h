// Launchers of csrc/obs.cu. Plain pointers and sizes, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fishleg_ext {

// Bytes of shared memory that obs_eliminate takes for blocks of `size` weights of `element_size`
// bytes, 4 or 8.
int64_t obs_eliminate_shared_bytes(int size, int element_size);

// See obs_eliminate_kernel. T: float or double. `num_blocks` and `size` at least 1.
template <typename T>
cudaError_t obs_eliminate(const T* weight, const T* inverse, int64_t inverse_stride,
                          const bool* alive, int32_t* rank, T* cost, int64_t num_blocks, int size,
                          int n, int m, T stop, bool dead_first, cudaStream_t stream);

}  // namespace fishleg_ext
