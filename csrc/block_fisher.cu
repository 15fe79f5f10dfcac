#include "block_fisher.h"

#include "block_fisher.cuh"

namespace fishleg_ext {

int largest_block(int element_size) { return largest_in_tiles(element_size); }

template <typename Source>
Gradients<Source> typed(const StoredGradients& grads) {
  return {static_cast<const Source*>(grads.data), grads.count, grads.gradient_stride,
          grads.block_stride, grads.stride};
}

// Calls run(Gradients<...>) for gradients that go with T; false for others.
template <typename T, typename Run>
bool with_gradients(const StoredGradients& grads, Run run) {
  if constexpr (sizeof(T) == 8) {
    if (grads.stored == Stored::kDouble) return run(typed<double>(grads));
  } else {
    if (grads.stored == Stored::kHalf) return run(typed<Half>(grads));
    if (grads.stored == Stored::kBFloat16) return run(typed<BFloat16>(grads));
  }
  return grads.stored == Stored::kFloat && run(typed<float>(grads));
}

template <typename T>
cudaError_t block_gram(T* gram, const StoredGradients& grads, T alpha, int64_t num_blocks, int size,
                       cudaStream_t stream) {
  const bool launched = with_gradients<T>(grads, [&](auto typed_grads) {
    return with_tiles<T>(size, [&](auto type) {
      using Tiles = typename decltype(type)::type;
      block_gram_kernel<Tiles><<<Tiles::blocks(num_blocks), Tiles::kBlockThreads,
                                 Tiles::shared_bytes(kGramGradients * Tiles::kSize), stream>>>(
          gram, typed_grads, alpha, num_blocks, size);
    });
  });
  return launched ? cudaGetLastError() : cudaErrorInvalidValue;
}

template <typename T>
cudaError_t block_inverse(const T* gram, T damping, T* inverse, int32_t* info, int64_t num_blocks,
                          int size, cudaStream_t stream) {
  const bool launched = with_tiles<T>(size, [&](auto type) {
    using Tiles = typename decltype(type)::type;
    block_inverse_kernel<Tiles><<<Tiles::blocks(num_blocks), Tiles::kBlockThreads,
                                  Tiles::shared_bytes(2 * Tiles::kSize + 4), stream>>>(
        gram, damping, inverse, info, num_blocks, size);
  });
  return launched ? cudaGetLastError() : cudaErrorInvalidValue;
}

template <typename T>
cudaError_t woodbury_update(T* inverse, const StoredGradients& grads, T num_grads,
                            int64_t num_blocks, int size, cudaStream_t stream) {
  const bool launched = with_gradients<T>(grads, [&](auto typed_grads) {
    return with_tiles<T>(size, [&](auto type) {
      using Tiles = typename decltype(type)::type;
      constexpr int kVectors = kWoodburyGradients + Tiles::kParts + 1;
      woodbury_update_kernel<Tiles><<<Tiles::blocks(num_blocks), Tiles::kBlockThreads,
                                      Tiles::shared_bytes(kVectors * Tiles::kSize), stream>>>(
          inverse, typed_grads, num_grads, num_blocks, size);
    });
  });
  return launched ? cudaGetLastError() : cudaErrorInvalidValue;
}

#define INSTANTIATE(T)                                                                           \
  template cudaError_t block_gram<T>(T*, const StoredGradients&, T, int64_t, int, cudaStream_t); \
  template cudaError_t block_inverse<T>(const T*, T, T*, int32_t*, int64_t, int, cudaStream_t);  \
  template cudaError_t woodbury_update<T>(T*, const StoredGradients&, T, int64_t, int, cudaStream_t)

INSTANTIATE(float);
INSTANTIATE(double);

}  // namespace fishleg_ext
