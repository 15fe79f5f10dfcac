#include "block_fisher.cuh"

#include "gradients.h"

using namespace fishleg_ext;

template <typename T>
void run(const Tensor& grads, T alpha, const Tensor& gram) {
  const int size = static_cast<int>(gram.sizes[1]);
  with_gradients<T>(grads, [&](auto typed_grads) {
    with_tiles<T>(size, [&](auto type) {
      using Tiles = typename decltype(type)::type;
      using Source = std::remove_const_t<std::remove_pointer_t<decltype(typed_grads.data)>>;
      cuda_on_host::launch(Tiles::blocks(gram.sizes[0]), Tiles::kBlockThreads,
                           Tiles::shared_bytes(kGramGradients * Tiles::kSize),
                           block_gram_kernel<Tiles, Source>, gram.data<T>(), typed_grads, alpha,
                           gram.sizes[0], size);
    });
  });
}

int main(int count, char** values) {
  Arguments arguments(count, values);
  const Tensor grads = arguments.tensor();
  const double alpha = arguments.real();
  const Tensor gram = arguments.tensor();
  gram.element_size == 8 ? run<double>(grads, alpha, gram)
                         : run<float>(grads, static_cast<float>(alpha), gram);
  arguments.give_back(gram);
}
