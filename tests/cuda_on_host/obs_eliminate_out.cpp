#include "obs.cuh"

#include "arguments.h"

using namespace fishleg_ext;

template <typename T>
void run(Arguments& arguments, const Tensor& weight) {
  const Tensor inverse = arguments.tensor(), alive = arguments.tensor();
  const int size = static_cast<int>(weight.sizes[1]);
  EliminateOptions<T> options{};
  options.size = size;
  options.inverse_stride = inverse.sizes[0] == 1 ? 0 : int64_t{size} * size;
  options.n = static_cast<int>(arguments.integer());
  options.m = static_cast<int>(arguments.integer());
  options.stop = static_cast<T>(arguments.real());
  options.dead_first = arguments.integer() != 0;
  const Tensor rank = arguments.tensor(), cost = arguments.tensor();
  cuda_on_host::launch(static_cast<unsigned>(weight.sizes[0]), eliminate_threads(size),
                       eliminate_shared_bytes<T>(size), obs_eliminate_kernel<T>, weight.data<T>(),
                       inverse.data<T>(), alive.data<bool>(), rank.data<int32_t>(), cost.data<T>(),
                       options);
  arguments.give_back(rank);
  arguments.give_back(cost);
}

int main(int count, char** values) {
  Arguments arguments(count, values);
  const Tensor weight = arguments.tensor();
  weight.element_size == 8 ? run<double>(arguments, weight) : run<float>(arguments, weight);
}
