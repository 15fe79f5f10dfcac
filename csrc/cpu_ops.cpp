// Registers the CPU kernels with PyTorch, as private ops that write into what Python has allocated.
//
// Stable ABI of PyTorch 2.10, and no CUDA: this library is built wherever there is a C++ compiler.
// Shapes, dtypes and contiguity are ensured by fishleg_ext/ops and fishleg_ext/cpu, which are the
// only callers.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu_block_fisher.h"
#include "cpu_obs.h"
#include "stable_tensors.h"

namespace {

using fishleg_ext::read;
using fishleg_ext::write;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct Kernels {
  decltype(&fishleg_ext::portable::obs_workspace<T>) workspace;
  decltype(&fishleg_ext::portable::obs_eliminate<T>) eliminate;
  decltype(&fishleg_ext::portable::masked_solve<T>) solve;
  decltype(&fishleg_ext::portable::gram_workspace<T>) gram_workspace;
  decltype(&fishleg_ext::portable::add_gram<T>) add_gram;
  decltype(&fishleg_ext::portable::inverse_workspace<T>) inverse_workspace;
  decltype(&fishleg_ext::portable::block_inverse<T>) invert;
};

#define FISHLEG_EXT_CHOOSE(instruction_set)                  \
  Kernels<T> {                                               \
    &fishleg_ext::instruction_set::obs_workspace<T>,         \
        &fishleg_ext::instruction_set::obs_eliminate<T>,     \
        &fishleg_ext::instruction_set::masked_solve<T>,      \
        &fishleg_ext::instruction_set::gram_workspace<T>,    \
        &fishleg_ext::instruction_set::add_gram<T>,          \
        &fishleg_ext::instruction_set::inverse_workspace<T>, \
        &fishleg_ext::instruction_set::block_inverse<T>      \
  }

// Those of the widest vectors that this machine has.
template <typename T>
Kernels<T> kernels() {
#ifdef FISHLEG_EXT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
    return FISHLEG_EXT_CHOOSE(avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return FISHLEG_EXT_CHOOSE(avx2);
  }
#endif
  return FISHLEG_EXT_CHOOSE(portable);
}

// Calls run(T()) for the type of a tensor's elements, float or double.
template <typename Run>
void by_type(const Tensor& tensor, Run run) {
  tensor.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

// [1, B, B] is shared by all blocks.
template <typename T>
fishleg_ext::CpuMatrices<T> matrices(const Tensor& tensor) {
  return {read<T>(tensor), tensor.size(0) == 1 ? 0 : tensor.stride(0), tensor.stride(1)};
}

// Calls run(begin, end, workspace) for parts of the blocks, in as many threads as PyTorch has.
template <typename Run>
void for_blocks(int64_t num_blocks, int64_t workspace_bytes, Run run) {
  constexpr size_t kAlignment = 64;
  const size_t bytes =
      (static_cast<size_t>(workspace_bytes) + kAlignment - 1) / kAlignment * kAlignment;
  // Fewer threads where each needs much.
  constexpr size_t kMostBytes = size_t{1} << 31;
  const int64_t most_threads =
      static_cast<int64_t>(kMostBytes / bytes > 1 ? kMostBytes / bytes : 1);
  const int64_t grain = (num_blocks + most_threads - 1) / most_threads;
  torch::stable::parallel_for(0, num_blocks, grain > 1 ? grain : 1,
                              [&](int64_t begin, int64_t end) {
                                const std::unique_ptr<void, decltype(&std::free)> workspace(
                                    std::aligned_alloc(kAlignment, bytes), &std::free);
                                if (workspace == nullptr) throw std::bad_alloc();
                                run(begin, end, workspace.get());
                              });
}

void obs_eliminate_out(Tensor weight, Tensor inverse, Tensor alive, int64_t group, int64_t n,
                       int64_t m, double stop, bool dead_first, Tensor rank, Tensor cost) {
  by_type(weight, [&](auto zero) {
    using T = decltype(zero);
    const fishleg_ext::CpuElimination<T> arrays{read<T>(weight), matrices<T>(inverse),
                                                read<bool>(alive), write<int32_t>(rank),
                                                write<T>(cost)};
    const fishleg_ext::EliminateOptions<T> options{weight.size(0),
                                                   static_cast<int>(weight.size(1)),
                                                   arrays.inverse.block_stride,
                                                   static_cast<int>(group),
                                                   static_cast<int>(n),
                                                   static_cast<int>(m),
                                                   static_cast<T>(stop),
                                                   dead_first};
    const Kernels<T> kernel = kernels<T>();
    for_blocks(options.num_blocks, kernel.workspace(options.size, options.group),
               [&](int64_t begin, int64_t end, void* workspace) {
                 kernel.eliminate(arrays, options, begin, end, workspace);
               });
  });
}

void masked_solve_out(Tensor matrix, Tensor set, Tensor rhs, Tensor x, Tensor solved) {
  by_type(rhs, [&](auto zero) {
    using T = decltype(zero);
    const fishleg_ext::CpuSystems<T> systems{matrices<T>(matrix), read<bool>(set), read<T>(rhs),
                                             write<T>(x), write<bool>(solved)};
    const int size = static_cast<int>(rhs.size(1));
    const Kernels<T> kernel = kernels<T>();
    for_blocks(rhs.size(0), kernel.workspace(size, 1),
               [&](int64_t begin, int64_t end, void* workspace) {
                 kernel.solve(systems, size, begin, end, workspace);
               });
  });
}

void block_gram_out(Tensor grads, double alpha, Tensor gram) {
  by_type(gram, [&](auto zero) {
    using T = decltype(zero);
    const int size = static_cast<int>(gram.size(1));
    const fishleg_ext::CpuGram<T> arrays{
        write<T>(gram), read<T>(grads),
        grads.size(0),  {grads.stride(0), grads.stride(1), grads.stride(2)},
        size,           static_cast<T>(alpha)};
    const Kernels<T> kernel = kernels<T>();
    // Few matrices are cut into rows, parts of equal area, so that each thread has some.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t parts = threads > 1 && gram.size(0) < 4 * threads ? 4 * threads : 1;
    const auto bound = [&](int64_t part) {
      return static_cast<int>(std::lround(size * std::sqrt(static_cast<double>(part) / parts)));
    };
    for_blocks(gram.size(0) * parts, kernel.gram_workspace(size),
               [&](int64_t begin, int64_t end, void* workspace) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t part = i % parts;
                   kernel.add_gram(arrays, i / parts, bound(part), bound(part + 1), workspace);
                 }
               });
  });
}

void block_inverse_out(Tensor gram, double damping, Tensor inverse, Tensor inverted) {
  by_type(gram, [&](auto zero) {
    using T = decltype(zero);
    const int size = static_cast<int>(gram.size(1));
    const fishleg_ext::CpuInversion<T> arrays{read<T>(gram), write<T>(inverse),
                                              write<bool>(inverted), size, static_cast<T>(damping)};
    const Kernels<T> kernel = kernels<T>();
    for_blocks(gram.size(0), kernel.inverse_workspace(size),
               [&](int64_t begin, int64_t end, void* workspace) {
                 kernel.invert(arrays, begin, end, workspace);
               });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(fishleg_ext_cpu, library) {
  library.def(
      "obs_eliminate_out(Tensor weight, Tensor inverse, Tensor alive, int group, int n, int m, "
      "float stop, bool dead_first, Tensor(a!) rank, Tensor(b!) cost) -> ()");
  library.def(
      "masked_solve_out(Tensor matrix, Tensor set, Tensor rhs, Tensor(a!) x, Tensor(b!) solved) "
      "-> ()");
  library.def("block_gram_out(Tensor grads, float alpha, Tensor(a!) gram) -> ()");
  library.def(
      "block_inverse_out(Tensor gram, float damping, Tensor(a!) inverse, Tensor(b!) inverted) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(fishleg_ext_cpu, CPU, library) {
  library.impl("obs_eliminate_out", TORCH_BOX(&obs_eliminate_out));
  library.impl("masked_solve_out", TORCH_BOX(&masked_solve_out));
  library.impl("block_gram_out", TORCH_BOX(&block_gram_out));
  library.impl("block_inverse_out", TORCH_BOX(&block_inverse_out));
}
