// Runs CUDA C++ kernels on the host, for tests: the compiler's include path finds this file in
// place of the CUDA one.
//
// Every CUDA thread of a block is a fiber (a stack of its own, switched to by hand) and blocks run
// one after the other, so a kernel is ordinary C++ to the sanitizers:
// - AddressSanitizer: dynamic shared memory is a heap allocation of exactly the bytes asked for.
// - ThreadSanitizer: every fiber is a thread to it, and nothing but __syncthreads and __syncwarp
//   orders their accesses, as on a GPU. A missing barrier is therefore a data race, reported with
//   file and line, whatever the order in which the fibers happen to run. Barriers use two
//   synchronisation objects in turn: with one, a thread that reaches the next barrier early would
//   be ordered before a thread that has yet to leave this one, and no race would ever be seen.
// Shared memory is filled with 0xff (NaN) before each block. A barrier that some thread never
// reaches ends the program.
//
// Not covered: tensor cores, asynchronous copies, inline PTX, clusters, partial warp masks, races
// between blocks.
#pragma once

#define CUDA_ON_HOST

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ static
// The machinery orders nothing by itself, and what it touches is no part of the kernel.
#define CUDA_ON_HOST_UNSEEN __attribute__((no_sanitize_thread, noinline))

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::exit(3);
}

// Switching between stacks.
#if defined(__x86_64__)
extern "C" void cuda_on_host_switch(void** from, void* to);
asm(R"(
.text
.globl cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch, .-cuda_on_host_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes);
    *--top = nullptr;  // where `entry` would return to, which it never does; aligns its frame
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  CUDA_ON_HOST_UNSEEN void switch_to(Context& other) {
    cuda_on_host_switch(&stack_pointer, other.stack_pointer);
  }
};
#else
struct Context {
  ucontext_t context;

  void prepare(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    makecontext(&context, entry, 0);
  }
  CUDA_ON_HOST_UNSEEN void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

enum class Waits { kNot, kBlock, kWarp, kShuffle, kDone };

struct Fiber {
  Context context;
  char* stack = nullptr;
  uint3 index{};
  Waits waits = Waits::kDone;
  unsigned block_barriers = 0, warp_barriers = 0;  // passed so far
  uint64_t exchanged[2] = {0, 0};                  // what other lanes read of this one, by parity
  void* tsan = nullptr;
};

// A block of threads.
struct Block {
  dim3 grid, shape;
  uint3 index{};
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  Context scheduler;
  void* scheduler_tsan = nullptr;
  std::unique_ptr<unsigned char[]> shared;
  std::function<void()> kernel;
  // Synchronisation objects, by parity; one for the order of blocks.
  char block_object[2], between_blocks;
  std::vector<char> warp_objects[2];

  static Block*& active() {
    static Block* block = nullptr;
    return block;
  }
};

CUDA_ON_HOST_UNSEEN inline Block& block() { return *Block::active(); }
CUDA_ON_HOST_UNSEEN inline Fiber& me() { return *block().current; }
CUDA_ON_HOST_UNSEEN inline int thread_number() {
  return static_cast<int>(&me() - block().fibers.data());
}

#if defined(__SANITIZE_THREAD__)
CUDA_ON_HOST_UNSEEN inline void release(char* object) { __tsan_release(object); }
CUDA_ON_HOST_UNSEEN inline void acquire(char* object) { __tsan_acquire(object); }
#else
inline void release(char*) {}
inline void acquire(char*) {}
#endif

// Back to the scheduler.
CUDA_ON_HOST_UNSEEN inline void yield() {
  Block& b = block();
  Fiber& fiber = *b.current;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(b.scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  fiber.context.switch_to(b.scheduler);
}

CUDA_ON_HOST_UNSEEN inline void wait_for_warp(Waits kind, unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp function was called with a partial mask");
  me().waits = kind;
  yield();
}

// All lanes deposit a value; the result is lane `source`'s.
template <typename T, typename Source>
CUDA_ON_HOST_UNSEEN inline T exchange(unsigned mask, T value, Source source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a register, or two");
  Fiber& fiber = me();
  const unsigned parity = fiber.warp_barriers++ % 2;
  std::memcpy(&fiber.exchanged[parity], &value, sizeof(T));
  wait_for_warp(Waits::kShuffle, mask);
  const int lane = thread_number() % kWarp;
  const int from = source(lane);
  if (from < 0 || from >= kWarp) return value;
  T result;
  std::memcpy(&result, &(&fiber - lane + from)->exchanged[parity], sizeof(T));
  return result;
}

CUDA_ON_HOST_UNSEEN inline const uint3& thread_index() { return me().index; }
CUDA_ON_HOST_UNSEEN inline const uint3& block_index() { return block().index; }
CUDA_ON_HOST_UNSEEN inline const dim3& block_shape() { return block().shape; }
CUDA_ON_HOST_UNSEEN inline const dim3& grid_shape() { return block().grid; }
CUDA_ON_HOST_UNSEEN inline unsigned char* dynamic_shared_memory() { return block().shared.get(); }

CUDA_ON_HOST_UNSEEN inline void fiber_main() {
  for (;;) {  // one turn for each block of the grid
    acquire(&block().between_blocks);
    block().kernel();
    release(&block().between_blocks);
    me().waits = Waits::kDone;
    yield();
  }
}

CUDA_ON_HOST_UNSEEN inline void resume(Fiber& fiber) {
  Block& b = block();
  b.current = &fiber;
  fiber.waits = Waits::kNot;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  b.scheduler.switch_to(fiber.context);
}

// Let the threads of a warp go on if all of them wait for each other.
CUDA_ON_HOST_UNSEEN inline bool release_warp(Fiber* lanes, int count) {
  const Waits kind = lanes[0].waits;
  if (kind != Waits::kWarp && kind != Waits::kShuffle) return false;
  for (int lane = 0; lane < count; ++lane) {
    if (lanes[lane].waits != kind) return false;
  }
  if (count != kWarp) fail("a warp function was called in a warp of less than 32 threads");
  for (int lane = 0; lane < count; ++lane) lanes[lane].waits = Waits::kNot;
  return true;
}

CUDA_ON_HOST_UNSEEN inline void run_block(std::mt19937& random) {
  Block& b = block();
  const int count = static_cast<int>(b.fibers.size());
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = i;
  for (Fiber& fiber : b.fibers)
    fiber.waits = Waits::kNot, fiber.block_barriers = fiber.warp_barriers = 0;
  for (;;) {
    for (int i = count - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
    for (int i : order) {
      if (b.fibers[i].waits == Waits::kNot) resume(b.fibers[i]);
    }
    bool progress = false;
    for (int first = 0; first < count; first += kWarp) {
      progress |= release_warp(&b.fibers[first], std::min(kWarp, count - first));
    }
    if (progress) continue;
    int done = 0, at_barrier = 0;
    for (const Fiber& fiber : b.fibers) {
      done += fiber.waits == Waits::kDone;
      at_barrier += fiber.waits == Waits::kBlock;
    }
    if (done == count) return;
    if (done + at_barrier != count)
      fail("deadlock: some threads wait for a barrier that others never reach");
    for (Fiber& fiber : b.fibers) {
      if (fiber.waits == Waits::kBlock) fiber.waits = Waits::kNot;
    }
  }
}

// Fibers that wait in fiber_main for a block; those of the last launch, if there are as many.
CUDA_ON_HOST_UNSEEN inline std::vector<Fiber> take_fibers(std::vector<Fiber>& kept, size_t count) {
  if (kept.size() == count) return std::move(kept);
  for (Fiber& fiber : kept) {
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(fiber.tsan);
#endif
    munmap(fiber.stack, kStackBytes);
  }
  std::vector<Fiber> fibers(count);
  for (Fiber& fiber : fibers) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for the threads' stacks");
    fiber.stack = static_cast<char*>(stack);
    fiber.context.prepare(fiber.stack, fiber_main);
#if defined(__SANITIZE_THREAD__)
    fiber.tsan = __tsan_create_fiber(0);
#endif
  }
  return fibers;
}

// kernel<<<grid, threads, shared_bytes>>>(arguments...), finished when this returns.
template <typename Kernel, typename... Arguments>
void launch(dim3 grid, dim3 threads, size_t shared_bytes, Kernel kernel, Arguments... arguments) {
  Block b;
  Block::active() = &b;
  b.grid = grid, b.shape = threads;
  b.kernel = [=] { kernel(arguments...); };
  const unsigned count = threads.x * threads.y * threads.z;
  static std::vector<Fiber>& kept = *new std::vector<Fiber>;
  b.fibers = take_fibers(kept, count);
  for (auto& objects : b.warp_objects) objects.resize(count / kWarp + 1);
#if defined(__SANITIZE_THREAD__)
  b.scheduler_tsan = __tsan_get_current_fiber();
#endif
  for (unsigned i = 0; i < count; ++i) {
    b.fibers[i].index = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
  }
  const char* seed = std::getenv("CUDA_ON_HOST_SEED");
  std::mt19937 random(seed ? std::atoi(seed) : 0);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        b.index = {x, y, z};
        b.shared.reset(new unsigned char[shared_bytes]);
        std::memset(b.shared.get(), 0xff, shared_bytes);
        release(&b.between_blocks);
        run_block(random);
        acquire(&b.between_blocks);
      }
    }
  }
  kept = std::move(b.fibers);
  Block::active() = nullptr;
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::thread_index())
#define blockIdx (cuda_on_host::block_index())
#define blockDim (cuda_on_host::block_shape())
#define gridDim (cuda_on_host::grid_shape())

CUDA_ON_HOST_UNSEEN inline void __syncthreads() {
  using namespace cuda_on_host;
  Fiber& fiber = me();
  char* object = &block().block_object[fiber.block_barriers++ % 2];
  release(object);
  fiber.waits = Waits::kBlock;
  yield();
  acquire(object);
}

CUDA_ON_HOST_UNSEEN inline void __syncwarp(unsigned mask = 0xffffffffu) {
  using namespace cuda_on_host;
  char* object = &block().warp_objects[me().warp_barriers++ % 2][thread_number() / kWarp];
  release(object);
  wait_for_warp(Waits::kWarp, mask);
  acquire(object);
}

// Shuffles and votes wait for the warp, but order no memory.
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_on_host::exchange(mask, value, [=](int) { return source % cuda_on_host::kWarp; });
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_on_host::exchange(mask, value, [=](int lane) { return lane ^ bits; });
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  return cuda_on_host::exchange(mask, value, [=](int lane) { return lane + static_cast<int>(by); });
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  return cuda_on_host::exchange(mask, value, [=](int lane) { return lane - static_cast<int>(by); });
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  unsigned votes = vote ? 1u << cuda_on_host::thread_number() % cuda_on_host::kWarp : 0u;
  for (int bits = 1; bits < cuda_on_host::kWarp; bits *= 2)
    votes |= __shfl_xor_sync(mask, votes, bits);
  return votes;
}

inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  for (int bits = 1; bits < cuda_on_host::kWarp; bits *= 2)
    value = std::min(value, __shfl_xor_sync(mask, value, bits));
  return value;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
inline T atomicAdd(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, old + value, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}
