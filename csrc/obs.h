// Launchers of csrc/obs.cu. Plain pointers and sizes, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "obs_types.h"

namespace fishleg_ext {

// The most weights in a block that obs_eliminate takes, 0 where there is no kernel for groups of
// this size; obs_eliminate_panel takes blocks of any size.
int largest_to_eliminate(int element_size, int group);

// See the kernels of the same names. T: float or double. At least one block, of at least one
// weight. An error where blocks are too large, or where there is no kernel for the groups.
template <typename T>
cudaError_t obs_eliminate(const T* weight, const T* inverse, const bool* alive, int32_t* rank,
                          T* cost, const EliminateOptions<T>& options, cudaStream_t stream);
template <typename T>
cudaError_t obs_eliminate_panel(const T* inverse, const bool* alive, const PanelState<T>& state,
                                bool dead, const EliminateOptions<T>& options, cudaStream_t stream);
template <typename T>
cudaError_t obs_compensate(const T* weight, const T* inverse, int64_t inverse_stride,
                           const bool* pruned, T* out, int64_t num_blocks, int size,
                           cudaStream_t stream);

}  // namespace fishleg_ext
