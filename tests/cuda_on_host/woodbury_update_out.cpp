#include "block_fisher.cuh"

#include "gradients.h"

using namespace fishleg_ext;

template <typename T>
void run(const Tensor& grads, T num_grads, const Tensor& inverse) {
  const int size = static_cast<int>(inverse.sizes[1]);
  with_gradients<T>(grads, [&](auto typed_grads) {
    with_tiles<T>(size, [&](auto type) {
      using Tiles = typename decltype(type)::type;
      using Source = std::remove_const_t<std::remove_pointer_t<decltype(typed_grads.data)>>;
      constexpr int kVectors = kWoodburyGradients + Tiles::kParts + 1;
      cuda_on_host::launch(Tiles::blocks(inverse.sizes[0]), Tiles::kBlockThreads,
                           Tiles::shared_bytes(kVectors * Tiles::kSize),
                           woodbury_update_kernel<Tiles, Source>, inverse.data<T>(), typed_grads,
                           num_grads, inverse.sizes[0], size);
    });
  });
}

int main(int count, char** values) {
  Arguments arguments(count, values);
  const Tensor grads = arguments.tensor();
  const int64_t num_grads = arguments.integer();
  const Tensor inverse = arguments.tensor();
  inverse.element_size == 8 ? run<double>(grads, static_cast<double>(num_grads), inverse)
                            : run<float>(grads, static_cast<float>(num_grads), inverse);
  arguments.give_back(inverse);
}
