#include "obs.cuh"

#include "arguments.h"

using namespace fishleg_ext;

template <typename T>
void run(Arguments& arguments, const Tensor& weight) {
  const Tensor inverse = arguments.tensor(), pruned = arguments.tensor(), out = arguments.tensor();
  const int size = static_cast<int>(weight.sizes[1]);
  const int64_t stride = inverse.sizes[0] == 1 ? 0 : int64_t{size} * size;
  with_tiles<T>(size, [&](auto type) {
    using Tiles = typename decltype(type)::type;
    cuda_on_host::launch(Tiles::blocks(weight.sizes[0]), Tiles::kBlockThreads,
                         Tiles::shared_bytes(2 * Tiles::kSize), obs_compensate_kernel<Tiles>,
                         weight.data<T>(), inverse.data<T>(), stride, pruned.data<bool>(),
                         out.data<T>(), weight.sizes[0], size);
  });
  arguments.give_back(out);
}

int main(int count, char** values) {
  Arguments arguments(count, values);
  const Tensor weight = arguments.tensor();
  weight.element_size == 8 ? run<double>(arguments, weight) : run<float>(arguments, weight);
}
