#include "selftest.cuh"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

// The test named is the one that runs; exit status 0 where it gives what it must.
int main(int count, char** values) {
  const char* test = count == 2 ? values[1] : "";
  std::vector<int> in(128), out(128);
  for (int i = 0; i < 128; ++i) in[i] = i;
  bool right = true;
  if (!std::strcmp(test, "exchange")) {
    cuda_on_host::launch(2, 64, 64 * sizeof(int), exchange_kernel, in.data(), out.data());
    for (int i = 0; i < 128; ++i) {
      const int thread = i % 64, other = 63 - thread;
      right &= out[i] == i / 64 * 64 + other / 32 * 32 + (other + 1) % 32;
    }
  } else if (!std::strcmp(test, "collective")) {
    int total = 0;
    cuda_on_host::launch(1, dim3(16, 4), 0, collective_kernel, in.data(), out.data(), &total);
    for (int i = 0; i < 64; ++i) {
      const int sum = i < 32 ? 496 : 1520, before = i % 32 ? i - 1 : i;
      right &= out[i] == sum * 1000 + before * 100 + 1;
    }
    right &= total == 2016;
  } else if (!std::strcmp(test, "bounds") || !std::strcmp(test, "shared") ||
             !std::strcmp(test, "global")) {
    cuda_on_host::launch(1, 128, 128 * sizeof(int), bounds_kernel, in.data(), out.data(),
                         test[0] == 's', test[0] == 'g');
    right = in == out;
  } else if (!std::strcmp(test, "deadlock")) {
    cuda_on_host::launch(1, 64, 0, deadlock_kernel);
  } else {
    std::fprintf(stderr, "there is no test '%s'\n", test);
    return 2;
  }
  return right ? 0 : 1;
}
