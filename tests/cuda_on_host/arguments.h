// What a test hands to a kernel and takes back, through files: the arguments of a private op, one
// after the other. An int, a bool or a float is 8 bytes; a tensor is its bytes per element, a
// number for the kind of half precision, its number of dimensions, its sizes and strides, the
// number of elements from its first to its last, and these; a list of tensors is their number, and
// these.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

struct Tensor {
  int64_t element_size, kind;  // kind 1: float16, 2: bfloat16, 0: all others
  std::vector<int64_t> sizes, strides;
  int64_t count;                  // of elements in memory
  std::unique_ptr<char[]> bytes;  // an allocation of its own, so that an access beyond it is seen

  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(bytes.get());
  }

  // From now on AddressSanitizer reports a kernel that touches this element, if it has 8 bytes.
  void forbid(int64_t index) const {
#if defined(__SANITIZE_ADDRESS__)
    if (element_size == 8) ASAN_POISON_MEMORY_REGION(bytes.get() + 8 * index, 8);
#else
    (void)index;
#endif
  }
};

class Arguments {
 public:
  Arguments(int count, char** values) {
    if (count != 3 || !(in_ = std::fopen(values[1], "rb")) ||
        !(out_ = std::fopen(values[2], "wb"))) {
      std::fprintf(stderr, "usage: %s INPUT OUTPUT\n", values[0]);
      std::exit(2);
    }
  }
  ~Arguments() { std::fclose(in_), std::fclose(out_); }

  int64_t integer() { return scalar<int64_t>(); }
  double real() { return scalar<double>(); }
  Tensor tensor() {
    Tensor result{};
    result.element_size = integer();
    result.kind = integer();
    result.sizes.resize(integer());
    result.strides.resize(result.sizes.size());
    for (int64_t& size : result.sizes) size = integer();
    for (int64_t& stride : result.strides) stride = integer();
    result.count = integer();
    const int64_t bytes = result.count * result.element_size;
    result.bytes.reset(new char[bytes]);
    read(result.bytes.get(), bytes);
    return result;
  }
  std::vector<Tensor> tensors() {
    std::vector<Tensor> result(integer());
    for (Tensor& item : result) item = tensor();
    return result;
  }
  void give_back(const Tensor& tensor) {
    std::fwrite(tensor.bytes.get(), tensor.element_size, tensor.count, out_);
  }

 private:
  template <typename T>
  T scalar() {
    T value;
    read(&value, sizeof(T));
    return value;
  }
  void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, in_) != bytes) {
      std::fprintf(stderr, "the input is too short\n");
      std::exit(2);
    }
  }
  FILE* in_ = nullptr;
  FILE* out_ = nullptr;
};
