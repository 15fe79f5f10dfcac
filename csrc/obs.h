// Launchers of csrc/obs.cu. Plain pointers and sizes, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fishleg_ext {

// See the kernels of the same names. T: float or double. `num_blocks` and `size` at least 1. An
// error where blocks are too large.
template <typename T>
cudaError_t obs_eliminate(const T* weight, const T* inverse, int64_t inverse_stride,
                          const bool* alive, int32_t* rank, T* cost, int64_t num_blocks, int size,
                          int n, int m, T stop, bool dead_first, cudaStream_t stream);
// Tensors [K, B] of T, bool or int32, [K] and, for columns, [K, panel, B]; see PanelState.
struct PanelTensors {
  void *weight, *variance;
  bool* pending;
  int32_t* next;
  void* columns;
  int32_t* rank;
  void* cost;
};

template <typename T>
cudaError_t obs_eliminate_panel(const T* inverse, int64_t inverse_stride, const bool* alive,
                                const PanelTensors& state, int panel, bool dead, int64_t num_blocks,
                                int size, int n, int m, T stop, bool dead_first,
                                cudaStream_t stream);
template <typename T>
cudaError_t obs_compensate(const T* weight, const T* inverse, int64_t inverse_stride,
                           const bool* pruned, T* out, int64_t num_blocks, int size,
                           cudaStream_t stream);

}  // namespace fishleg_ext
