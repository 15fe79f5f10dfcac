#include "obs.cuh"

#include "arguments.h"

using namespace fishleg_ext;

template <typename T>
void run(Arguments& arguments, const Tensor& weight) {
  const Tensor inverse = arguments.tensor(), alive = arguments.tensor();
  const int size = static_cast<int>(weight.sizes[1]);
  EliminateOptions<T> options{};
  options.num_blocks = weight.sizes[0];
  options.size = size;
  options.inverse_stride = inverse.sizes[0] == 1 ? 0 : int64_t{size} * size;
  options.group = static_cast<int>(arguments.integer());
  options.n = static_cast<int>(arguments.integer());
  options.m = static_cast<int>(arguments.integer());
  options.stop = static_cast<T>(arguments.real());
  options.dead_first = arguments.integer() != 0;
  const Tensor rank = arguments.tensor(), cost = arguments.tensor();
  // What is dead is not read.
  for (int64_t k = 0; k < weight.sizes[0] && !options.dead_first; ++k) {
    const bool* mine = alive.data<bool>() + k * size;
    for (int64_t i = 0; i < size; ++i) {
      if (!mine[i]) weight.forbid(k * size + i);
      for (int64_t j = 0; j < size && options.inverse_stride > 0; ++j) {
        if (!mine[i] || !mine[j]) inverse.forbid(k * options.inverse_stride + i * size + j);
      }
    }
  }
  with_group(options.group, [&](auto group) {
    with_tiles<T>(size, [&](auto type) {
      using Tiles = typename decltype(type)::type;
      cuda_on_host::launch(Tiles::blocks(weight.sizes[0]), Tiles::kBlockThreads,
                           Tiles::shared_bytes(2 * Tiles::kSize),
                           obs_eliminate_kernel<Tiles, group>, weight.data<T>(), inverse.data<T>(),
                           alive.data<bool>(), rank.data<int32_t>(), cost.data<T>(), options);
    });
  });
  arguments.give_back(rank);
  arguments.give_back(cost);
}

int main(int count, char** values) {
  Arguments arguments(count, values);
  const Tensor weight = arguments.tensor();
  weight.element_size == 8 ? run<double>(arguments, weight) : run<float>(arguments, weight);
}
