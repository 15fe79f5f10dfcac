// Elements of PyTorch's tensors by their type, for the files that register ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fishleg_ext {

template <typename T>
const T* read(const torch::stable::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace fishleg_ext
