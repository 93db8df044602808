// Sums over the threads of a block that come before one.

#pragma once

#include "instructions.cuh"

namespace {

// The sum of `mine` over the threads before this one, and over all. For blocks of whole warps.
__device__ int2 Before(int mine) {
  __shared__ int sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int sum = mine;
  for (int far = 1; far < 32; far *= 2) {
    const int other = __shfl_up_sync(~0u, sum, far);
    sum += lane >= far ? other : 0;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int before = sum - mine, total = 0;
  for (int w = 0; w < warps; ++w) {
    before += w < warp ? sums[w] : 0;
    total += sums[w];
  }
  __syncthreads();
  return make_int2(before, total);
}

}  // namespace
