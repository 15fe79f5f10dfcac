// Gradients [m, K, B] as kernels take them.
#pragma once

#include "arguments.h"
#include "block_fisher.cuh"

namespace fishleg_ext {

template <typename Source>
Gradients<Source> typed(const Tensor& grads) {
  return {grads.data<Source>(), grads.sizes[0], grads.strides[0], grads.strides[1],
          grads.strides[2]};
}

// Calls run(Gradients<...>) for gradients that go with T.
template <typename T, typename Run>
void with_gradients(const Tensor& grads, Run run) {
  if constexpr (sizeof(T) == 8) {
    if (grads.element_size == 8) return run(typed<double>(grads));
  } else {
    if (grads.kind == 1) return run(typed<Half>(grads));
    if (grads.kind == 2) return run(typed<BFloat16>(grads));
  }
  run(typed<float>(grads));
}

}  // namespace fishleg_ext
