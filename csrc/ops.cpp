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

#include "obs.h"

// Missing from a PyTorch built without CUDA, where this file must load all the same; no op is
// called there.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

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

template <typename T>
void obs_eliminate_of(const Tensor& weight, const Tensor& inverse, const Tensor& alive, int64_t n,
                      int64_t m, double stop, bool dead_first, const Tensor& rank,
                      const Tensor& cost) {
  const int64_t size = weight.size(1);
  check(
      "obs_eliminate",
      fishleg_ext::obs_eliminate<T>(
          static_cast<const T*>(weight.const_data_ptr()),
          static_cast<const T*>(inverse.const_data_ptr()), inverse.size(0) == 1 ? 0 : size * size,
          static_cast<const bool*>(alive.const_data_ptr()),
          static_cast<int32_t*>(rank.mutable_data_ptr()), static_cast<T*>(cost.mutable_data_ptr()),
          weight.size(0), static_cast<int>(size), static_cast<int>(n), static_cast<int>(m),
          static_cast<T>(stop), dead_first, current_stream(weight)));
}

void obs_eliminate_out(Tensor weight, Tensor inverse, Tensor alive, int64_t n, int64_t m,
                       double stop, bool dead_first, Tensor rank, Tensor cost) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const auto launch = weight.scalar_type() == ScalarType::Double ? obs_eliminate_of<double>
                                                                 : obs_eliminate_of<float>;
  launch(weight, inverse, alive, n, m, stop, dead_first, rank, cost);
}

int64_t obs_eliminate_shared_bytes(int64_t size, int64_t element_size) {
  return fishleg_ext::obs_eliminate_shared_bytes(static_cast<int>(size),
                                                 static_cast<int>(element_size));
}

// The most dynamic shared memory that a thread block of this device may ask for.
int64_t shared_bytes_per_block(int64_t device) {
  int bytes = 0;
  check("shared_bytes_per_block",
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                               static_cast<int>(device)));
  return bytes;
}

}  // namespace

STABLE_TORCH_LIBRARY(fishleg_ext_cuda, library) {
  library.def(
      "obs_eliminate_out(Tensor weight, Tensor inverse, Tensor alive, int n, int m, float stop, "
      "bool dead_first, "
      "Tensor(a!) rank, Tensor(b!) cost) -> ()");
  library.def("obs_eliminate_shared_bytes(int size, int element_size) -> int");
  library.def("shared_bytes_per_block(int device) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fishleg_ext_cuda, CUDA, library) {
  library.impl("obs_eliminate_out", TORCH_BOX(&obs_eliminate_out));
}

STABLE_TORCH_LIBRARY_IMPL(fishleg_ext_cuda, CompositeExplicitAutograd, library) {
  library.impl("obs_eliminate_shared_bytes", TORCH_BOX(&obs_eliminate_shared_bytes));
  library.impl("shared_bytes_per_block", TORCH_BOX(&shared_bytes_per_block));
}
