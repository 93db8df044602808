// z[p, u] = <rows[token[p]], w[expert, u]> + bias[expert, u]

#pragma once

#include "experts_plan.cuh"

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kInner = 64;      // columns that it loads at a time

// Where a chunk of 8 numbers of a row of `chunks` stands: 8 rows of one column meet all banks.
template <int kChunks>
__device__ int Swapped(int row, int chunk) {
  constexpr int kShare = kChunks >= 8 ? 1 : 8 / kChunks;  // rows in 128 bytes
  return chunk ^ (row / kShare % (kChunks < 8 ? kChunks : 8));
}

template <int U>
struct UnitsStage {
  bf16 rows[kItem][kInner], weights[U][kInner];
};

constexpr int kUnitsStages = 3;

template <int U>
__global__ void __launch_bounds__(kThreads) Units(const bf16* rows_TE, const bf16* w_XWE, const float* bias_XW,
                                                  const int* token_N, const int* counts, const int4* items, int E,
                                                  int W, float* z_NU) {
  unsigned char* shared = Shared();
  if (blockIdx.x >= *counts) return;
  auto* stages = reinterpret_cast<UnitsStage<U>*>(shared);
  const int4 item = items[blockIdx.x];
  const int expert = item.x, first = item.y, count = item.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  // Eight threads load 128 bytes of a row, in 16-byte chunks whose place depends on the row: no bank conflicts.
  const int chunk = threadIdx.x % 8, line = threadIdx.x / 8, swapped = (chunk ^ (line % 8)) * 8;
  constexpr int kLines = kThreads / 8, kMine = kItem / kLines;
  const bf16* from[kMine];
  for (int i = 0; i < kMine; ++i) {
    const int row = line + i * kLines;
    from[i] = rows_TE + static_cast<int64_t>(row < count ? token_N[first + row] : 0) * E + chunk * 8;
  }
  const bf16* weights = w_XWE + static_cast<int64_t>(expert) * W * E + chunk * 8;
  const int rounds = E / kInner;
  auto load = [&](int round) {
    if (round < rounds) {
      UnitsStage<U>& to = stages[round % kUnitsStages];
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const int row = line + i * kLines;
        Load16(&to.rows[row][swapped], from[i] + round * kInner, row < count);
      }
#pragma unroll
      for (int u = line; u < U; u += kLines)
        Load16(&to.weights[u][swapped], weights + static_cast<int64_t>(u < W ? u : 0) * E + round * kInner, u < W);
    }
    Commit();
  };
  float sum[2][U / 8][4] = {};
  for (int round = 0; round < kUnitsStages - 1; ++round) load(round);
  for (int round = 0; round < rounds; ++round) {
    Wait<kUnitsStages - 2>();
    __syncthreads();
    load(round + kUnitsStages - 1);
    const UnitsStage<U>& stage = stages[round % kUnitsStages];
#pragma unroll
    for (int k = 0; k < kInner / 16; ++k) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int row = warp * 32 + m * 16 + lane % 16, at = 2 * k + lane / 16;
        Matrices4(a[m], Address(&stage.rows[row][(at ^ (row % 8)) * 8]));
      }
#pragma unroll
      for (int n = 0; n < U / 8; n += 2) {
        uint32_t b[4];
        // Where U is 8, its rows come twice and count once.
        const int u = (n * 8 + lane % 8 + lane / 16 * 8) % U, at = 2 * k + lane / 8 % 2;
        Matrices4(b, Address(&stage.weights[u][(at ^ (u % 8)) * 8]));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          Multiply(sum[m][n], a[m], b[0], b[1]);
          if (n + 1 < U / 8) Multiply(sum[m][(n + 1) % (U / 8)], a[m], b[2], b[3]);
        }
      }
    }
  }
  Wait<0>();
#pragma unroll
  for (int n = 0; n < U / 8; ++n) {
    const int u = n * 8 + 2 * t;
    const float bias0 = u < W ? bias_XW[expert * W + u] : 0, bias1 = u + 1 < W ? bias_XW[expert * W + u + 1] : 0;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 32 + m * 16 + half * 8 + g;
        const float2 z = make_float2(sum[m][n][2 * half] + bias0, sum[m][n][2 * half + 1] + bias1);
        if (row < count) *reinterpret_cast<float2*>(z_NU + static_cast<int64_t>(first + row) * U + u) = z;
      }
  }
}

}  // namespace
