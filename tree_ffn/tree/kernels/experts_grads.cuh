// dw[e, u] = sum over the pairs p of expert e of c[p, u] rows[token[p]], db[e, u] = sum of c[p, u]
//
// A block adds up some pairs. Experts of more pairs have parts, float32, which are added in their order.

#pragma once

#include "experts_units.cuh"

namespace {

constexpr int kPairs = 32;      // that a block of Grads loads at a time

constexpr int kGradsStages = 3;

template <int U>
struct GradsStage {
  static constexpr int kBlocks = U <= 32 ? 4 : 2;            // of 16 columns, a warp's
  static constexpr int kWidth = kBlocks * 16 * kWarps;       // columns of a block
  static constexpr int kChunks = U / 8;                      // of 8 units
  bf16 rows[kPairs][kWidth], c[kPairs][U];
};

__device__ void Write8(float* to, const float* from) {
  reinterpret_cast<float4*>(to)[0] = reinterpret_cast<const float4*>(from)[0];
  reinterpret_cast<float4*>(to)[1] = reinterpret_cast<const float4*>(from)[1];
}

__device__ void Write8(bf16* to, const float* from) {
  *reinterpret_cast<uint4*>(to) = make_uint4(Packed(from[0], from[1]), Packed(from[2], from[3]),
                                             Packed(from[4], from[5]), Packed(from[6], from[7]));
}

template <typename Out>
struct Gradients {  // of weights and of biases, [X, W, E] and [X, W]
  Out* dw;
  float* db;
};

template <int U, typename Out>
__global__ void __launch_bounds__(kThreads) Grads(const bf16* c_NU, const bf16* rows_TE, const int* token_N,
                                                  const int* counts, const int4* jobs, int E, int W,
                                                  Gradients<float> parts, Gradients<Out> whole) {
  unsigned char* shared = Shared();
  if (blockIdx.x >= counts[1]) return;
  using Stage = GradsStage<U>;
  constexpr int kWidth = Stage::kWidth, kBlocks = Stage::kBlocks;
  auto* stages = reinterpret_cast<Stage*>(shared);
  const int4 job = jobs[blockIdx.x];
  const int column = blockIdx.y * kWidth, begin = job.y, end = job.y + job.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int rounds = (end - begin + kPairs - 1) / kPairs;
  constexpr int kRowChunks = kWidth / 8, kLines = kThreads / kRowChunks, kMine = kPairs / kLines;
  const int chunk = threadIdx.x % kRowChunks, line = threadIdx.x / kRowChunks;
  const bool inside = column + chunk * 8 < E;
  int token[kMine];  // of the round that is loaded next
  auto tokens = [&](int round) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int p = begin + round * kPairs + line + i * kLines;
      token[i] = p < end ? __ldg(token_N + p) : -1;
    }
  };
  auto load = [&](int round) {
    if (round < rounds) {
      Stage& to = stages[round % kGradsStages];
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const int row = line + i * kLines;
        const bf16* from = rows_TE + static_cast<int64_t>(max(token[i], 0)) * E + (inside ? column + chunk * 8 : 0);
        Load16(&to.rows[row][(chunk ^ (row % 8)) * 8], from, inside && token[i] >= 0);
      }
      for (int i = threadIdx.x; i < kPairs * Stage::kChunks; i += kThreads) {
        const int row = i / Stage::kChunks, at = i % Stage::kChunks, p = begin + round * kPairs + row;
        const bf16* from = c_NU + static_cast<int64_t>(p < end ? p : begin) * U + at * 8;
        Load16(&to.c[row][Swapped<U / 8>(row, at) * 8], from, p < end);
      }
      tokens(round + 1);
    }
    Commit();
  };
  const bool sums_biases = blockIdx.y == 0 && warp == 0;
  const uint32_t one = 0x3F803F80, ones[4] = {one, one, one, one};
  float sum[kBlocks][U / 8][4] = {}, bias[U / 8][4] = {};
  tokens(0);
  for (int round = 0; round < kGradsStages - 1; ++round) load(round);
  for (int round = 0; round < rounds; ++round) {
    Wait<kGradsStages - 2>();
    __syncthreads();
    load(round + kGradsStages - 1);
    const Stage& stage = stages[round % kGradsStages];
#pragma unroll
    for (int k = 0; k < kPairs; k += 16) {
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        const int row = k + lane / 16 * 8 + lane % 8, at = (warp * kBlocks + m) * 2 + lane / 8 % 2;
        Transposed4(a[m], Address(&stage.rows[row][(at ^ (row % 8)) * 8]));
      }
#pragma unroll
      for (int n = 0; n < U / 8; n += 2) {
        uint32_t b[4];
        // Where U is 8, its units come twice and count once.
        const int row = k + lane / 8 % 2 * 8 + lane % 8, at = (n + lane / 16) % Stage::kChunks;
        Transposed4(b, Address(&stage.c[row][Swapped<U / 8>(row, at) * 8]));
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          Multiply(sum[m][n], a[m], b[0], b[1]);
          if (n + 1 < U / 8) Multiply(sum[m][(n + 1) % (U / 8)], a[m], b[2], b[3]);
        }
        if (sums_biases) {
          Multiply(bias[n], ones, b[0], b[1]);
          if (n + 1 < U / 8) Multiply(bias[(n + 1) % (U / 8)], ones, b[2], b[3]);
        }
      }
    }
  }
  Wait<0>();
  __syncthreads();
  // By shared memory, for whole rows: [U][kWidth], with 4 numbers more a row against bank conflicts.
  constexpr int kPitch = kWidth + 4;
  float* out = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int n = 0; n < U / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        out[(n * 8 + 2 * t + i % 2) * kPitch + (warp * kBlocks + m) * 16 + i / 2 * 8 + g] = sum[m][n][i];
  __syncthreads();
  const bool is_part = job.w >= 0;
  const int64_t unit = static_cast<int64_t>(is_part ? job.w : job.x) * W;
  for (int u = line; u < W && inside; u += kLines) {
    const int64_t at = (unit + u) * E + column + chunk * 8;
    const float* from = out + u * kPitch + chunk * 8;
    is_part ? Write8(parts.dw + at, from) : Write8(whole.dw + at, from);
  }
  if (!sums_biases || g) return;
#pragma unroll
  for (int n = 0; n < U / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (const int u = n * 8 + 2 * t + i; u < W) (is_part ? parts.db : whole.db)[unit + u] = bias[n][i];
}

constexpr int kAddThreads = 256;

// Adds up the parts of experts that have some: ranges [X] are of their first part and their number.
template <typename Out>
__global__ void __launch_bounds__(kAddThreads) Add(const int2* ranges, int64_t E, int W, Gradients<float> parts,
                                                   Gradients<Out> whole) {
  const int expert = blockIdx.x, first = ranges[expert].x, end = first + ranges[expert].y;
  if (first == end) return;
  const int64_t mine = (static_cast<int64_t>(blockIdx.y) * kAddThreads + threadIdx.x) * 8;
  if (mine < W * E) {
    float sum[8] = {};
    for (int part = first; part < end; ++part)
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += parts.dw[part * W * E + mine + i];
    Write8(whole.dw + expert * W * E + mine, sum);
  }
  if (blockIdx.y == 0 && threadIdx.x < W) {
    float sum = 0;
    for (int part = first; part < end; ++part) sum += parts.db[part * W + threadIdx.x];
    whole.db[expert * W + threadIdx.x] = sum;
  }
}

}  // namespace
