// s[p] = sum over u of c[p, u] w[expert, u], rounded; then y[t] = sum over the pairs p of token t of s[p]

#pragma once

#include "both.cuh"
#include "experts_units.cuh"

namespace {

constexpr int kBlock = 64;      // columns that a warp multiplies at a time
constexpr int kSumThreads = 256;

// The products of an item's pairs with some columns, from `column` on; s has `columns` of them. A matrix of 8
// columns takes every eighth of 64, so that a thread loads 16 bytes of a row and four write 64 bytes in a row.
template <int U>
__global__ void __launch_bounds__(kThreads) Products(const bf16* c_NU, const bf16* w_XWE, const int* counts,
                                                     const int4* items, int E, int W, int column, int columns,
                                                     bf16* s_NC) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int mine = (blockIdx.y * kWarps + warp) * kBlock;
  if (blockIdx.x >= *counts || mine >= columns) return;
  const int4 item = items[blockIdx.x];
  const int64_t first = item.y;
  constexpr int kSteps = (U + 15) / 16;
  uint32_t low[kSteps][8], high[kSteps][8];
  const bf16* weights = w_XWE + static_cast<int64_t>(item.x) * W * E + column + mine + 8 * (g / 2 + g % 2 * 4);
  auto row = [&](int u) {
    return u < W ? __ldg(reinterpret_cast<const uint4*>(weights + static_cast<int64_t>(u) * E)) : uint4{};
  };
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const uint4 w[4] = {row(16 * k + 2 * t), row(16 * k + 2 * t + 1), U > 8 ? row(16 * k + 8 + 2 * t) : uint4{},
                        U > 8 ? row(16 * k + 9 + 2 * t) : uint4{}};
#pragma unroll
    for (int j = 0; j < 8; ++j) low[k][j] = Both(w[0], w[1], j), high[k][j] = Both(w[2], w[3], j);
  }
  uint32_t a[kSteps][4];  // of the next 16 pairs
  auto load = [&](int m) {
    const bool upper = m + g < item.z, lower = m + g + 8 < item.z;
    const auto* c = reinterpret_cast<const uint32_t*>(c_NU + (first + m + g) * U) + t;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      a[k][0] = upper ? c[8 * k] : 0, a[k][1] = lower ? c[4 * U + 8 * k] : 0;
      if constexpr (U > 8) a[k][2] = upper ? c[8 * k + 4] : 0, a[k][3] = lower ? c[4 * U + 8 * k + 4] : 0;
    }
  };
  load(0);
  for (int m = 0; m < item.z; m += 16) {
    float sum[8][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if constexpr (U == 8)
          Multiply8(sum[j], a[k][0], a[k][1], low[k][j]);
        else
          Multiply(sum[j], a[k], low[k][j], high[k][j]);
      }
    load(m + 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto* to = reinterpret_cast<uint4*>(s_NC + (first + m + g + 8 * half) * columns + mine + 8 * t);
      if (m + g + 8 * half >= item.z) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = 2 * half + i;
        to[4 * i] = make_uint4(Packed(sum[0][n], sum[1][n]), Packed(sum[2][n], sum[3][n]),
                               Packed(sum[4][n], sum[5][n]), Packed(sum[6][n], sum[7][n]));
      }
    }
  }
}

// `columns` of y, from `column` on. A thread adds up 8 of a token.
__global__ void __launch_bounds__(kSumThreads) Sums(const bf16* s_NC, const int* slot_TK, int T, int K, int E,
                                                    int column, int columns, bf16* y_TE) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int chunks = columns / 8, token = i / chunks, chunk = i % chunks;
  if (token >= T) return;
  const int* slots = slot_TK + static_cast<int64_t>(token) * K;
  float sum[8] = {};
#pragma unroll 8
  for (int k = 0; k < K; ++k) {
    const int slot = slots[k];  // negative: it came before
    const auto* from = reinterpret_cast<const uint4*>(s_NC + static_cast<int64_t>(slot) * columns) + chunk;
    const uint4 v = slot < 0 ? uint4{} : __ldcs(from);
    const uint32_t two[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += Number(two[j / 2], j % 2);
  }
  *reinterpret_cast<uint4*>(y_TE + static_cast<int64_t>(token) * E + column + chunk * 8) = make_uint4(
      Packed(sum[0], sum[1]), Packed(sum[2], sum[3]), Packed(sum[4], sum[5]), Packed(sum[6], sum[7]));
}

}  // namespace
