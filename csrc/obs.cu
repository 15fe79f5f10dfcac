#include "obs.h"

#include "obs.cuh"
#include "obs_panel.cuh"

namespace fishleg_ext {

int largest_to_eliminate(int element_size, int group) {
  int largest = 0;
  with_group(group, [&](auto g) {
    largest = element_size == 8 ? kLargestToEliminate<double, g> : kLargestToEliminate<float, g>;
  });
  return largest;
}

template <typename T>
cudaError_t obs_eliminate(const T* weight, const T* inverse, const bool* alive, int32_t* rank,
                          T* cost, const EliminateOptions<T>& options, cudaStream_t stream) {
  bool launched = false;
  with_group(options.group, [&](auto group) {
    with_tiles<T>(options.size, [&](auto type) {
      using Tiles = typename decltype(type)::type;
      if constexpr (Tiles::kSize <= kLargestToEliminate<T, group>) {
        obs_eliminate_kernel<Tiles, group>
            <<<Tiles::blocks(options.num_blocks), Tiles::kBlockThreads,
               Tiles::shared_bytes(2 * Tiles::kSize), stream>>>(weight, inverse, alive, rank, cost,
                                                                options);
        launched = true;
      }
    });
  });
  return launched ? cudaGetLastError() : cudaErrorInvalidValue;
}

template <typename T>
cudaError_t obs_eliminate_panel(const T* inverse, const bool* alive, const PanelState<T>& state,
                                bool dead, const EliminateOptions<T>& options,
                                cudaStream_t stream) {
  const bool launched = with_group(options.group, [&](auto group) {
    obs_eliminate_panel_kernel<T, group>
        <<<static_cast<unsigned>(options.num_blocks), kPanelThreads, panel_shared_bytes<T>(),
           stream>>>(inverse, alive, state, dead, options);
  });
  return launched ? cudaGetLastError() : cudaErrorInvalidValue;
}

template <typename T>
cudaError_t obs_compensate(const T* weight, const T* inverse, int64_t inverse_stride,
                           const bool* pruned, T* out, int64_t num_blocks, int size,
                           cudaStream_t stream) {
  const bool launched = with_tiles<T>(size, [&](auto type) {
    using Tiles = typename decltype(type)::type;
    obs_compensate_kernel<Tiles>
        <<<Tiles::blocks(num_blocks), Tiles::kBlockThreads, Tiles::shared_bytes(2 * Tiles::kSize),
           stream>>>(weight, inverse, inverse_stride, pruned, out, num_blocks, size);
  });
  return launched ? cudaGetLastError() : cudaErrorInvalidValue;
}

#define INSTANTIATE(T)                                                                           \
  template cudaError_t obs_eliminate<T>(const T*, const T*, const bool*, int32_t*, T*,           \
                                        const EliminateOptions<T>&, cudaStream_t);               \
  template cudaError_t obs_eliminate_panel<T>(const T*, const bool*, const PanelState<T>&, bool, \
                                              const EliminateOptions<T>&, cudaStream_t);         \
  template cudaError_t obs_compensate<T>(const T*, const T*, int64_t, const bool*, T*, int64_t,  \
                                         int, cudaStream_t)

INSTANTIATE(float);
INSTANTIATE(double);

}  // namespace fishleg_ext
