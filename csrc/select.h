// Launcher of csrc/select.cu. Plain pointers and sizes, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "select_types.h"

namespace fishleg_ext {

// How many tiles a tensor of so many scores has, and how many counts scores of so many bytes need.
int64_t select_tiles(int64_t size);
int64_t select_counts_of(int element_size);

// See select.cuh. Tensors that are not empty, `num_pruned` less than their sizes' sum, `infinity`
// as the bits of a score, `counts` zeros, an entry of `ties` for each tile. An error for scores of
// another size.
cudaError_t keep_mask(const SelectTensor* tensors, int64_t num_tensors, int element_size,
                      int64_t infinity, int64_t num_pruned, int64_t* counts, int64_t* ties,
                      int device, cudaStream_t stream);

}  // namespace fishleg_ext
