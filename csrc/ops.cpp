// Registers the launchers with PyTorch, as private ops that write into what Python has allocated.
//
// Stable ABI of PyTorch 2.10: one binary is meant for that release and later ones, CUDA or not.
// Shapes, dtypes and contiguity are ensured by fishleg_ext/ops and fishleg_ext/cuda, which are the
// only callers.

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "block_fisher.h"
#include "obs.h"
#include "select.h"
#include "stable_tensors.h"

// Missing from a PyTorch built without CUDA, where this file must load all the same; no op is
// called there.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using fishleg_ext::read;
using fishleg_ext::write;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr ||
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != 0) {
    throw std::runtime_error("fishleg_ext: PyTorch gives no CUDA stream for device " +
                             std::to_string(tensor.get_device_index()));
  }
  return static_cast<cudaStream_t>(stream);
}

void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("fishleg_ext: ") + op + " failed: " +
                           cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// Calls run(T()) for the type of a tensor's elements, float or double, with its device current.
template <typename Run>
void on_device_of(const char* op, const Tensor& tensor, Run run) {
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  const bool is_double = tensor.scalar_type() == ScalarType::Double;
  check(op, is_double ? run(double()) : run(float()));
}

// Elements from one block's inverse to the next: [1, B, B] is shared by all.
int64_t stride_of(const Tensor& inverse) {
  return inverse.size(0) == 1 ? 0 : inverse.size(1) * inverse.size(1);
}

fishleg_ext::StoredGradients stored(const Tensor& grads) {
  using fishleg_ext::Stored;
  const ScalarType type = grads.scalar_type();
  const Stored as = type == ScalarType::Double     ? Stored::kDouble
                    : type == ScalarType::Half     ? Stored::kHalf
                    : type == ScalarType::BFloat16 ? Stored::kBFloat16
                                                   : Stored::kFloat;
  return {grads.const_data_ptr(), as, grads.size(0), grads.stride(0), grads.stride(1),
          grads.stride(2)};
}

template <typename T>
fishleg_ext::EliminateOptions<T> eliminate_options(const Tensor& weight, const Tensor& inverse,
                                                   int64_t group, int64_t n, int64_t m, double stop,
                                                   bool dead_first) {
  return {weight.size(0),       static_cast<int>(weight.size(1)),
          stride_of(inverse),   static_cast<int>(group),
          static_cast<int>(n),  static_cast<int>(m),
          static_cast<T>(stop), dead_first};
}

void obs_eliminate_out(Tensor weight, Tensor inverse, Tensor alive, int64_t group, int64_t n,
                       int64_t m, double stop, bool dead_first, Tensor rank, Tensor cost) {
  on_device_of("obs_eliminate", weight, [&](auto zero) {
    using T = decltype(zero);
    return fishleg_ext::obs_eliminate<T>(
        read<T>(weight), read<T>(inverse), read<bool>(alive), write<int32_t>(rank), write<T>(cost),
        eliminate_options<T>(weight, inverse, group, n, m, stop, dead_first),
        current_stream(weight));
  });
}

void obs_eliminate_panel_out(Tensor inverse, Tensor alive, int64_t group, int64_t n, int64_t m,
                             double stop, bool dead_first, bool dead, Tensor weight,
                             Tensor variance, Tensor pending, Tensor next, Tensor columns,
                             Tensor rank, Tensor cost) {
  on_device_of("obs_eliminate", weight, [&](auto zero) {
    using T = decltype(zero);
    const fishleg_ext::PanelState<T> state{write<T>(weight),     write<T>(variance),
                                           write<bool>(pending), write<int32_t>(next),
                                           write<T>(columns),    static_cast<int>(columns.size(1)),
                                           write<int32_t>(rank), write<T>(cost)};
    return fishleg_ext::obs_eliminate_panel<T>(
        read<T>(inverse), read<bool>(alive), state, dead,
        eliminate_options<T>(weight, inverse, group, n, m, stop, dead_first),
        current_stream(weight));
  });
}

void obs_compensate_out(Tensor weight, Tensor inverse, Tensor pruned, Tensor out) {
  on_device_of("obs_compensate", weight, [&](auto zero) {
    using T = decltype(zero);
    return fishleg_ext::obs_compensate<T>(read<T>(weight), read<T>(inverse), stride_of(inverse),
                                          read<bool>(pruned), write<T>(out), weight.size(0),
                                          static_cast<int>(weight.size(1)), current_stream(weight));
  });
}

void block_gram_out(Tensor grads, double alpha, Tensor gram) {
  on_device_of("block_gram_", gram, [&](auto zero) {
    using T = decltype(zero);
    return fishleg_ext::block_gram<T>(write<T>(gram), stored(grads), static_cast<T>(alpha),
                                      gram.size(0), static_cast<int>(gram.size(1)),
                                      current_stream(gram));
  });
}

void block_inverse_out(Tensor gram, double damping, Tensor inverse, Tensor info) {
  on_device_of("block_inverse", gram, [&](auto zero) {
    using T = decltype(zero);
    return fishleg_ext::block_inverse<T>(read<T>(gram), static_cast<T>(damping), write<T>(inverse),
                                         write<int32_t>(info), gram.size(0),
                                         static_cast<int>(gram.size(1)), current_stream(gram));
  });
}

void woodbury_update_out(Tensor grads, int64_t num_grads, Tensor inverse) {
  on_device_of("woodbury_update_", inverse, [&](auto zero) {
    using T = decltype(zero);
    return fishleg_ext::woodbury_update<T>(
        write<T>(inverse), stored(grads), static_cast<T>(num_grads), inverse.size(0),
        static_cast<int>(inverse.size(1)), current_stream(inverse));
  });
}

void keep_mask_out(std::vector<Tensor> scores, int64_t infinity, int64_t num_pruned,
                   std::vector<Tensor> masks, Tensor counts, Tensor ties) {
  std::vector<fishleg_ext::SelectTensor> tensors;
  for (size_t i = 0; i < scores.size(); ++i) {
    tensors.push_back({scores[i].const_data_ptr(), write<bool>(masks[i]), scores[i].numel()});
  }
  const torch::stable::accelerator::DeviceGuard guard(counts.get_device_index());
  check("keep_mask", fishleg_ext::keep_mask(
                         tensors.data(), static_cast<int64_t>(tensors.size()),
                         static_cast<int>(scores[0].element_size()), infinity, num_pruned,
                         write<int64_t>(counts), write<int64_t>(ties),
                         static_cast<int>(counts.get_device_index()), current_stream(counts)));
}

int64_t select_tiles(int64_t size) { return fishleg_ext::select_tiles(size); }

int64_t select_counts(int64_t element_size) {
  return fishleg_ext::select_counts_of(static_cast<int>(element_size));
}

int64_t largest_block(int64_t element_size) {
  return fishleg_ext::largest_block(static_cast<int>(element_size));
}

int64_t largest_to_eliminate(int64_t element_size, int64_t group) {
  return fishleg_ext::largest_to_eliminate(static_cast<int>(element_size), static_cast<int>(group));
}

// 10 * major + minor; throws where the driver does not serve this library.
int64_t compute_capability(int64_t device) {
  int major = 0, minor = 0;
  const int number = static_cast<int>(device);
  check("compute_capability",
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number));
  check("compute_capability",
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number));
  return 10 * major + minor;
}

}  // namespace

STABLE_TORCH_LIBRARY(fishleg_ext_cuda, library) {
  library.def(
      "obs_eliminate_out(Tensor weight, Tensor inverse, Tensor alive, int group, int n, int m, "
      "float stop, bool dead_first, Tensor(a!) rank, Tensor(b!) cost) -> ()");
  library.def(
      "obs_eliminate_panel_out(Tensor inverse, Tensor alive, int group, int n, int m, float stop, "
      "bool dead_first, bool dead, Tensor(a!) weight, Tensor(b!) variance, Tensor(c!) pending, "
      "Tensor(d!) next, Tensor(e!) columns, Tensor(f!) rank, Tensor(g!) cost) -> ()");
  library.def(
      "obs_compensate_out(Tensor weight, Tensor inverse, Tensor pruned, Tensor(a!) out) -> ()");
  library.def("block_gram_out(Tensor grads, float alpha, Tensor(a!) gram) -> ()");
  library.def(
      "block_inverse_out(Tensor gram, float damping, Tensor(a!) inverse, Tensor(b!) info) -> ()");
  library.def("woodbury_update_out(Tensor grads, int num_grads, Tensor(a!) inverse) -> ()");
  library.def(
      "keep_mask_out(Tensor[] scores, int infinity, int num_pruned, Tensor(a!)[] masks, "
      "Tensor(b!) counts, Tensor(c!) ties) -> ()");
  library.def("select_tiles(int size) -> int");
  library.def("select_counts(int element_size) -> int");
  library.def("largest_block(int element_size) -> int");
  library.def("largest_to_eliminate(int element_size, int group) -> int");
  library.def("compute_capability(int device) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fishleg_ext_cuda, CUDA, library) {
  library.impl("obs_eliminate_out", TORCH_BOX(&obs_eliminate_out));
  library.impl("obs_eliminate_panel_out", TORCH_BOX(&obs_eliminate_panel_out));
  library.impl("obs_compensate_out", TORCH_BOX(&obs_compensate_out));
  library.impl("block_gram_out", TORCH_BOX(&block_gram_out));
  library.impl("block_inverse_out", TORCH_BOX(&block_inverse_out));
  library.impl("woodbury_update_out", TORCH_BOX(&woodbury_update_out));
  library.impl("keep_mask_out", TORCH_BOX(&keep_mask_out));
}

STABLE_TORCH_LIBRARY_IMPL(fishleg_ext_cuda, CompositeExplicitAutograd, library) {
  library.impl("select_tiles", TORCH_BOX(&select_tiles));
  library.impl("select_counts", TORCH_BOX(&select_counts));
  library.impl("largest_block", TORCH_BOX(&largest_block));
  library.impl("largest_to_eliminate", TORCH_BOX(&largest_to_eliminate));
  library.impl("compute_capability", TORCH_BOX(&compute_capability));
}
