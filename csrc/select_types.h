// What select.h and select.cuh share.
#pragma once

#include <cstdint>

namespace fishleg_ext {

// Where a tensor's scores are, of 2, 4 or 8 bytes each, and where its mask goes.
struct SelectTensor {
  const void* scores;
  bool* mask;
  int64_t size;
};

}  // namespace fishleg_ext
