#include "obs_panel.cuh"

#include "arguments.h"

using namespace fishleg_ext;

template <typename T>
void run(Arguments& arguments, const Tensor& inverse) {
  const Tensor alive = arguments.tensor();
  EliminateOptions<T> options{};
  options.group = static_cast<int>(arguments.integer());
  options.n = static_cast<int>(arguments.integer());
  options.m = static_cast<int>(arguments.integer());
  options.stop = static_cast<T>(arguments.real());
  options.dead_first = arguments.integer() != 0;
  const bool dead = arguments.integer() != 0;
  const Tensor weight = arguments.tensor(), variance = arguments.tensor(),
               pending = arguments.tensor(), next = arguments.tensor(),
               columns = arguments.tensor(), rank = arguments.tensor(), cost = arguments.tensor();
  options.num_blocks = weight.sizes[0];
  options.size = static_cast<int>(weight.sizes[1]);
  options.inverse_stride = inverse.sizes[0] == 1 ? 0 : int64_t{options.size} * options.size;
  const PanelState<T> state{weight.data<T>(),     variance.data<T>(),
                            pending.data<bool>(), next.data<int32_t>(),
                            columns.data<T>(),    static_cast<int>(columns.sizes[1]),
                            rank.data<int32_t>(), cost.data<T>()};
  constexpr int kThreads = 64;  // few: each takes its time on the host
  with_group(options.group, [&](auto group) {
    cuda_on_host::launch(static_cast<unsigned>(options.num_blocks), kThreads,
                         panel_shared_bytes<T>(), obs_eliminate_panel_kernel<T, group>,
                         inverse.data<T>(), alive.data<bool>(), state, dead, options);
  });
  for (const Tensor* written : {&weight, &variance, &pending, &next, &columns, &rank, &cost}) {
    arguments.give_back(*written);
  }
}

int main(int count, char** values) {
  Arguments arguments(count, values);
  const Tensor inverse = arguments.tensor();
  inverse.element_size == 8 ? run<double>(arguments, inverse) : run<float>(arguments, inverse);
}
