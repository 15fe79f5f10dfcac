// Runs count_digits_kernel, count_ties_kernel, find_boundary_kernel and write_masks_kernel as
// launch_keep_mask does, on few blocks, so that each has several tiles.
#include "select.cuh"

#include "arguments.h"

using namespace fishleg_ext;

int main(int count, char** values) {
  Arguments arguments(count, values);
  const std::vector<Tensor> scores = arguments.tensors();
  const int64_t infinity = arguments.integer(), num_pruned = arguments.integer();
  const std::vector<Tensor> masks = arguments.tensors();
  const Tensor counts = arguments.tensor(), ties = arguments.tensor();
  std::vector<SelectTensor> tensors;
  for (size_t i = 0; i < scores.size(); ++i) {
    tensors.push_back({scores[i].bytes.get(), masks[i].data<bool>(), scores[i].count});
  }
  const SelectCall call{tensors.data(),
                        static_cast<int64_t>(tensors.size()),
                        infinity,
                        num_pruned,
                        counts.data<long long>(),
                        ties.data<long long>(),
                        3};
  with_key(scores[0].element_size, [&](auto key) {
    launch_keep_mask<decltype(key)>(
        call, [](auto kernel, unsigned blocks, int shared_bytes, auto... of_kernel) {
          cuda_on_host::launch(blocks, kSelectThreads, shared_bytes, kernel, of_kernel...);
        });
  });
  for (const Tensor& mask : masks) arguments.give_back(mask);
  arguments.give_back(counts);
  arguments.give_back(ties);
}
