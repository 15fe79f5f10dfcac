#include "select.h"

#include "select.cuh"

namespace fishleg_ext {

constexpr int kBlocksPerMultiprocessor = 4;

int64_t select_tiles(int64_t size) { return (size + kSelectTile - 1) / kSelectTile; }
int64_t select_counts_of(int element_size) { return select_counts(element_size); }

cudaError_t keep_mask(const SelectTensor* tensors, int64_t num_tensors, int element_size,
                      int64_t infinity, int64_t num_pruned, int64_t* counts, int64_t* ties,
                      int device, cudaStream_t stream) {
  int multiprocessors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const SelectCall call{tensors,
                        num_tensors,
                        infinity,
                        num_pruned,
                        reinterpret_cast<long long*>(counts),
                        reinterpret_cast<long long*>(ties),
                        kBlocksPerMultiprocessor * multiprocessors};
  const bool launched = with_key(element_size, [&](auto key) {
    launch_keep_mask<decltype(key)>(
        call, [&](auto kernel, unsigned blocks, int shared_bytes, const auto&... arguments) {
          kernel<<<blocks, kSelectThreads, shared_bytes, stream>>>(arguments...);
        });
  });
  return launched ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace fishleg_ext
