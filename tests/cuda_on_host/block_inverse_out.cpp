#include "block_fisher.cuh"

#include "arguments.h"

using namespace fishleg_ext;

template <typename T>
void run(Arguments& arguments, const Tensor& gram) {
  const T damping = static_cast<T>(arguments.real());
  const Tensor inverse = arguments.tensor(), info = arguments.tensor();
  const int size = static_cast<int>(gram.sizes[1]);
  with_tiles<T>(size, [&](auto type) {
    using Tiles = typename decltype(type)::type;
    cuda_on_host::launch(Tiles::blocks(gram.sizes[0]), Tiles::kBlockThreads,
                         Tiles::shared_bytes(2 * Tiles::kSize + 4), block_inverse_kernel<Tiles>,
                         gram.data<T>(), damping, inverse.data<T>(), info.data<int32_t>(),
                         gram.sizes[0], size);
  });
  arguments.give_back(inverse);
  arguments.give_back(info);
}

int main(int count, char** values) {
  Arguments arguments(count, values);
  const Tensor gram = arguments.tensor();
  gram.element_size == 8 ? run<double>(arguments, gram) : run<float>(arguments, gram);
}
