// Small kernels that use everything cuda_runtime.h offers, to test the tool itself.
#pragma once

#include "memory.cuh"

// Every thread reads what another has written: those of its warp, then all of its block.
__global__ void exchange_kernel(const int* in, int* out) {
  __shared__ int all[64];
  int* mine = reinterpret_cast<int*>(fishleg_ext::dynamic_shared_memory());
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  mine[thread] = in[blockIdx.x * blockDim.x + thread];
  __syncwarp();
  const int neighbour = mine[warp * 32 + (lane + 1) % 32];
  all[thread] = neighbour;
  __syncthreads();
  out[blockIdx.x * blockDim.x + thread] = all[blockDim.x - 1 - thread];
}

// Sums and votes that need no memory.
__global__ void collective_kernel(const int* in, int* out, int* total) {
  const int thread = threadIdx.x + blockDim.x * threadIdx.y;
  const int value = in[thread];
  int sum = value;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  sum = __shfl_sync(0xffffffffu, sum, 0);
  const int before = __shfl_up_sync(0xffffffffu, value, 1);
  const unsigned odd = __ballot_sync(0xffffffffu, value % 2 != 0);
  out[thread] = sum * 1000 + before * 100 + (odd == 0xaaaaaaaau);
  if (thread % 32 == 0) atomicAdd(total, sum);
}

// `beyond` is 0 where everything is in bounds.
__global__ void bounds_kernel(const int* in, int* out, int beyond_shared, int beyond_global) {
  int* mine = reinterpret_cast<int*>(fishleg_ext::dynamic_shared_memory());
  mine[threadIdx.x + beyond_shared] = in[threadIdx.x + beyond_global];
  out[threadIdx.x] = mine[threadIdx.x + beyond_shared];
}

// Only half of the threads reach the barrier, and the others wait for their warp.
__global__ void deadlock_kernel() {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
