#include "obs.h"

#include "obs.cuh"

namespace fishleg_ext {

template <typename T>
cudaError_t obs_eliminate(const T* weight, const T* inverse, int64_t inverse_stride,
                          const bool* alive, int32_t* rank, T* cost, int64_t num_blocks, int size,
                          int n, int m, T stop, bool dead_first, cudaStream_t stream) {
  const EliminateOptions<T> options{num_blocks, size, inverse_stride, n, m, stop, dead_first};
  const bool launched = with_tiles<T>(size, [&](auto type) {
    using Tiles = typename decltype(type)::type;
    obs_eliminate_kernel<Tiles>
        <<<Tiles::blocks(num_blocks), Tiles::kBlockThreads, Tiles::shared_bytes(2 * Tiles::kSize),
           stream>>>(weight, inverse, alive, rank, cost, options);
  });
  return launched ? cudaGetLastError() : cudaErrorInvalidValue;
}

template <typename T>
cudaError_t obs_eliminate_panel(const T* inverse, int64_t inverse_stride, const bool* alive,
                                const PanelTensors& state, int panel, bool dead, int64_t num_blocks,
                                int size, int n, int m, T stop, bool dead_first,
                                cudaStream_t stream) {
  const EliminateOptions<T> options{num_blocks, size, inverse_stride, n, m, stop, dead_first};
  const PanelState<T> typed{static_cast<T*>(state.weight),
                            static_cast<T*>(state.variance),
                            state.pending,
                            state.next,
                            static_cast<T*>(state.columns),
                            state.rank,
                            static_cast<T*>(state.cost)};
  obs_eliminate_panel_kernel<T>
      <<<static_cast<unsigned>(num_blocks), kPanelThreads, panel_shared_bytes<T>(), stream>>>(
          inverse, alive, typed, panel, dead, options);
  return cudaGetLastError();
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

#define INSTANTIATE(T)                                                                             \
  template cudaError_t obs_eliminate<T>(const T*, const T*, int64_t, const bool*, int32_t*, T*,    \
                                        int64_t, int, int, int, T, bool, cudaStream_t);            \
  template cudaError_t obs_eliminate_panel<T>(const T*, int64_t, const bool*, const PanelTensors&, \
                                              int, bool, int64_t, int, int, int, T, bool,          \
                                              cudaStream_t);                                       \
  template cudaError_t obs_compensate<T>(const T*, const T*, int64_t, const bool*, T*, int64_t,    \
                                         int, cudaStream_t)

INSTANTIATE(float);
INSTANTIATE(double);

}  // namespace fishleg_ext
