// Selection of an exact number of the lowest scores of many tensors.
//
// keep_mask: radix selection. A score becomes an unsigned integer that sorts as it does, its key
// (-0 as 0; NaN, whichever, as the largest). For each byte of the key, from the highest on, one
// pass counts how often each digit comes among the keys that begin as the threshold does; the digit
// at which the number of lower ones reaches `num_pruned` is the threshold's next. What is below the
// threshold goes; of what equals it, the first in their order, as many as are lacking. If there are
// any, one more pass counts them in each tile of scores, to find the tile in which they end.
//
// Per score of 4 bytes: 4 passes that read it, perhaps one for ties, and one that reads it and
// writes a byte, 21 to 25 bytes; 2 of these passes fewer for 2 bytes, 4 more for 8.
//
// A warp has one column of counters for each of its lanes, in shared memory banks of their own, so
// that equal digits, and in the first pass nearly all are equal, cost no more than others.
//
// Nothing is decided on the host: each kernel finds the digit of the pass before it from the counts
// in device memory, in all of its blocks alike. Sums of integers: the same bits in every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "memory.cuh"
#include "select_types.h"

namespace fishleg_ext {

constexpr int kSelectTile = 4096;  // scores that a block of threads takes at a time
constexpr int kSelectThreads = 256, kDigits = 256, kDigitBits = 8, kLanes = 32;
constexpr int kSelectWarps = kSelectThreads / kLanes;
constexpr int kScoresPerThread = kSelectTile / kSelectThreads;
constexpr int kCounterBytes = kDigits * kLanes * sizeof(unsigned);
constexpr int kScratch = kSelectWarps + 2;  // of 8 bytes each, for `block_scan` and `next_digit`
constexpr int kMostTensors = 100;           // in one launch: they are among its arguments

// Some of the tensors. Tiles are numbered through all tensors.
template <typename Key>
struct SelectChunk {
  const Key* scores[kMostTensors];
  bool* masks[kMostTensors];
  int64_t sizes[kMostTensors];
  int64_t first_tile[kMostTensors + 1];
  int count;
};

// What is known of the threshold after some passes.
struct Threshold {
  unsigned long long prefix;  // its highest digits
  long long remaining;        // how many of the keys that begin so go, but never all of them
};

// Which of the scores that equal the threshold go; see find_boundary_kernel.
struct Boundary {
  long long tile, rest;
};

// Key: the unsigned integer of a score's width, also what it is loaded as.
template <typename Key>
__device__ __forceinline__ Key key_of(Key bits, Key infinity) {
  constexpr Key kSign = static_cast<Key>(Key(1) << (8 * sizeof(Key) - 1));
  const Key magnitude = static_cast<Key>(bits & ~kSign);
  if (magnitude > infinity) return static_cast<Key>(~Key(0));
  const bool negative = (bits & kSign) && magnitude;
  return static_cast<Key>(negative ? ~bits : bits | kSign);
}

// Of every thread's value the sum over the threads before it.
__device__ __forceinline__ long long block_scan(long long value, long long* scratch) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  long long sum = value;
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    const long long before = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += before;
  }
  if (lane == kLanes - 1) scratch[warp] = sum;
  __syncthreads();
  for (int other = 0; other < warp; ++other) sum += scratch[other];
  return sum - value;
}

// The threshold with one more digit, from how often each comes.
__device__ __forceinline__ Threshold next_digit(Threshold known, const long long* counts, int shift,
                                                long long* scratch) {
  long long* const found = scratch + kSelectWarps;
  const long long count = counts[threadIdx.x];
  const long long lower = block_scan(count, scratch);
  if (lower <= known.remaining && known.remaining < lower + count) {
    found[0] = threadIdx.x;
    found[1] = lower;
  }
  __syncthreads();
  const auto digit = static_cast<unsigned long long>(found[0]);
  return {known.prefix | digit << shift, known.remaining - found[1]};
}

// The threshold before pass `pass`, found by all threads of all blocks and kept by one.
// `thresholds` has an entry for each pass, and one for what is known after all of them.
template <typename Key>
__device__ __forceinline__ Threshold threshold_before(int pass, int64_t num_pruned,
                                                      const long long* counts,
                                                      Threshold* thresholds, long long* scratch) {
  if (pass == 0) return {0, num_pruned};
  const Threshold known = pass == 1 ? Threshold{0, num_pruned} : thresholds[pass - 1];
  const int shift = 8 * sizeof(Key) - kDigitBits * pass;
  const Threshold now = next_digit(known, counts + (pass - 1) * kDigits, shift, scratch);
  if (blockIdx.x == 0 && threadIdx.x == 0) thresholds[pass] = now;
  return now;
}

// Calls run(tile, tensor, first score of the tile, scores in it) for every tile that is this
// block's.
template <typename Key, typename Run>
__device__ __forceinline__ void for_tiles(const SelectChunk<Key>& chunk, Run run) {
  int tensor = 0;
  for (int64_t tile = chunk.first_tile[0] + blockIdx.x; tile < chunk.first_tile[chunk.count];
       tile += gridDim.x) {
    while (tile >= chunk.first_tile[tensor + 1]) ++tensor;
    const int64_t first = (tile - chunk.first_tile[tensor]) * kSelectTile;
    const int64_t left = chunk.sizes[tensor] - first;
    run(tile, tensor, first, static_cast<int>(left < kSelectTile ? left : kSelectTile));
  }
}

// counts [passes, kDigits]: of the digits of pass `pass`. Shared memory: counters and scratch.
template <typename Key>
__global__ void __launch_bounds__(kSelectThreads)
    count_digits_kernel(const __grid_constant__ SelectChunk<Key> chunk, Key infinity, int pass,
                        int64_t num_pruned, long long* counts, Threshold* thresholds) {
  unsigned* const counters = reinterpret_cast<unsigned*>(dynamic_shared_memory());
  long long* const scratch = reinterpret_cast<long long*>(dynamic_shared_memory() + kCounterBytes);
  const int shift = 8 * static_cast<int>(sizeof(Key)) - kDigitBits * (pass + 1);
  const int lane = threadIdx.x % kLanes;
  for (int i = threadIdx.x; i < kDigits * kLanes; i += kSelectThreads) counters[i] = 0;
  const Threshold known = threshold_before<Key>(pass, num_pruned, counts, thresholds, scratch);
  const Key prefix = static_cast<Key>(known.prefix);
  __syncthreads();
  for_tiles(chunk, [&](int64_t, int tensor, int64_t first, int size) {
    const Key* const scores = chunk.scores[tensor] + first;
#pragma unroll
    for (int k = 0; k < kScoresPerThread; ++k) {
      const int i = k * kSelectThreads + threadIdx.x;
      if (i >= size) break;
      const Key key = key_of(scores[i], infinity);
      // In two shifts, as there may be no digit before this one.
      const bool begins_so = (static_cast<Key>(key ^ prefix) >> shift) >> kDigitBits == 0;
      if (begins_so) atomicAdd(&counters[((key >> shift) % kDigits) * kLanes + lane], 1u);
    }
  });
  __syncthreads();
  long long sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += counters[threadIdx.x * kLanes + (i + lane) % kLanes];
  auto* const total = reinterpret_cast<unsigned long long*>(counts + pass * kDigits + threadIdx.x);
  if (sum > 0) atomicAdd(total, static_cast<unsigned long long>(sum));
}

// ties [tiles]: scores of each tile that equal the threshold, if some of these go. Shared memory:
// scratch.
template <typename Key>
__global__ void __launch_bounds__(kSelectThreads)
    count_ties_kernel(const __grid_constant__ SelectChunk<Key> chunk, Key infinity,
                      int64_t num_pruned, long long* counts, Threshold* thresholds,
                      long long* ties) {
  constexpr int kPasses = sizeof(Key);
  long long* const scratch = reinterpret_cast<long long*>(dynamic_shared_memory());
  const Threshold known = threshold_before<Key>(kPasses, num_pruned, counts, thresholds, scratch);
  if (known.remaining == 0) return;
  const Key threshold = static_cast<Key>(known.prefix);
  for_tiles(chunk, [&](int64_t tile, int tensor, int64_t first, int size) {
    const Key* const scores = chunk.scores[tensor] + first;
    int mine = 0;
#pragma unroll
    for (int k = 0; k < kScoresPerThread; ++k) {
      const int i = k * kSelectThreads + threadIdx.x;
      mine += i < size && key_of(scores[i], infinity) == threshold;
    }
    __syncthreads();  // before the scratch memory is used again
    const long long before = block_scan(mine, scratch);
    if (threadIdx.x == kSelectThreads - 1) ties[tile] = before + mine;
  });
}

// Where, of the scores that equal the threshold, those that go end: `rest` of them go in this tile,
// all of them in the tiles before it. One block. Shared memory: scratch.
__global__ void __launch_bounds__(kSelectThreads)
    find_boundary_kernel(const Threshold* threshold, const long long* ties, int64_t tiles,
                         Boundary* boundary) {
  const Threshold known = *threshold;
  if (known.remaining == 0) {
    if (threadIdx.x == 0) *boundary = {-1, 0};
    return;
  }
  const int64_t each = (tiles + kSelectThreads - 1) / kSelectThreads;
  const int64_t begin = each * threadIdx.x;
  const int64_t end = begin + each < tiles ? begin + each : tiles;
  long long sum = 0;
  for (int64_t tile = begin; tile < end; ++tile) sum += ties[tile];
  long long before = block_scan(sum, reinterpret_cast<long long*>(dynamic_shared_memory()));
  for (int64_t tile = begin; tile < end; ++tile) {
    const long long rest = known.remaining - before;
    if (rest >= 0 && rest < ties[tile]) *boundary = {tile, rest};
    before += ties[tile];
  }
}

// The masks. Shared memory: scratch.
template <typename Key>
__global__ void __launch_bounds__(kSelectThreads)
    write_masks_kernel(const __grid_constant__ SelectChunk<Key> chunk, Key infinity,
                       const Threshold* found, const Boundary* boundary) {
  const Key threshold = static_cast<Key>(found->prefix);
  const Boundary end = *boundary;
  for_tiles(chunk, [&](int64_t tile, int tensor, int64_t first, int size) {
    const Key* const scores = chunk.scores[tensor] + first;
    bool* const mask = chunk.masks[tensor] + first;
    if (tile != end.tile) {
      const bool keeps_ties = tile > end.tile;
#pragma unroll
      for (int k = 0; k < kScoresPerThread; ++k) {
        const int i = k * kSelectThreads + threadIdx.x;
        if (i >= size) break;
        const Key key = key_of(scores[i], infinity);
        mask[i] = key > threshold || (keeps_ties && key == threshold);
      }
      return;
    }
    // Scores that lie together are one thread's, so that one scan ranks the ties.
    const int start = threadIdx.x * kScoresPerThread;
    const int stop = start + kScoresPerThread < size ? start + kScoresPerThread : size;
    int mine = 0;
    for (int i = start; i < stop; ++i) mine += key_of(scores[i], infinity) == threshold;
    long long rank = block_scan(mine, reinterpret_cast<long long*>(dynamic_shared_memory()));
    for (int i = start; i < stop; ++i) {
      const Key key = key_of(scores[i], infinity);
      mask[i] = key > threshold || (key == threshold && rank >= end.rest);
      rank += key == threshold;
    }
  });
}

// What the kernels read and write. All but `tensors` is in device memory.
struct SelectCall {
  const SelectTensor* tensors;  // none of them empty
  int64_t num_tensors;
  int64_t infinity;    // as the bits of a score
  int64_t num_pruned;  // less than there are scores
  long long* counts;   // zeros, as many as select_counts() says
  long long* ties;     // an entry for each tile
  int blocks;          // at most, of each launch
};

// Long integers for counts, then thresholds, then the boundary.
constexpr int64_t select_counts(int element_size) {
  return element_size * kDigits +
         ((element_size + 1) * sizeof(Threshold) + sizeof(Boundary)) / sizeof(long long);
}

// All launches of keep_mask, one after the other, by launch(kernel, blocks, shared bytes, arguments
// of the kernel ...), which starts kSelectThreads in each block.
template <typename Key, typename Launch>
void launch_keep_mask(const SelectCall& call, Launch launch) {
  constexpr int kPasses = sizeof(Key);
  constexpr int kScratchBytes = kScratch * sizeof(long long);
  const Key infinity = static_cast<Key>(call.infinity);
  auto* const thresholds = reinterpret_cast<Threshold*>(call.counts + kPasses * kDigits);
  auto* const boundary = reinterpret_cast<Boundary*>(thresholds + kPasses + 1);
  int64_t tiles = 0;
  // Calls run(chunk, blocks) for as many tensors at a time as fit into the arguments of a kernel.
  const auto in_chunks = [&](auto run) {
    tiles = 0;
    for (int64_t begin = 0; begin < call.num_tensors; begin += kMostTensors) {
      SelectChunk<Key> chunk;
      const int64_t left = call.num_tensors - begin, first_tile = tiles;
      chunk.count = static_cast<int>(left < kMostTensors ? left : kMostTensors);
      chunk.first_tile[0] = tiles;
      for (int i = 0; i < chunk.count; ++i) {
        const SelectTensor& tensor = call.tensors[begin + i];
        chunk.scores[i] = static_cast<const Key*>(tensor.scores);
        chunk.masks[i] = tensor.mask;
        chunk.sizes[i] = tensor.size;
        tiles += (tensor.size + kSelectTile - 1) / kSelectTile;
        chunk.first_tile[i + 1] = tiles;
      }
      const int64_t in_chunk = tiles - first_tile;
      run(chunk, static_cast<unsigned>(in_chunk < call.blocks ? in_chunk : call.blocks));
    }
  };
  for (int pass = 0; pass < kPasses; ++pass) {
    in_chunks([&](const SelectChunk<Key>& chunk, unsigned blocks) {
      launch(count_digits_kernel<Key>, blocks, kCounterBytes + kScratchBytes, chunk, infinity, pass,
             call.num_pruned, call.counts, thresholds);
    });
  }
  in_chunks([&](const SelectChunk<Key>& chunk, unsigned blocks) {
    launch(count_ties_kernel<Key>, blocks, kScratchBytes, chunk, infinity, call.num_pruned,
           call.counts, thresholds, call.ties);
  });
  launch(find_boundary_kernel, 1u, kScratchBytes, thresholds + kPasses, call.ties, tiles, boundary);
  in_chunks([&](const SelectChunk<Key>& chunk, unsigned blocks) {
    launch(write_masks_kernel<Key>, blocks, kScratchBytes, chunk, infinity, thresholds + kPasses,
           boundary);
  });
}

// Calls run(Key()) for the key of a score of so many bytes; false if there is none.
template <typename Run>
bool with_key(int64_t element_size, Run run) {
  if (element_size == 2) run(uint16_t());
  if (element_size == 4) run(uint32_t());
  if (element_size == 8) run(uint64_t());
  return element_size == 2 || element_size == 4 || element_size == 8;
}

}  // namespace fishleg_ext
