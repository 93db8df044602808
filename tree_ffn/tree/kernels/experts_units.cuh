// Products of the rows of pairs and their experts' units, and what is made of them at once.
//
//     Hidden  z[p, u] = <x[token[p]], w_in[expert, u]> + b_in[expert, u],   c[p, u] = g[p, u] act(z[p, u])
//     Moved   dc[p, u] = <dy[token[p]], w_out[expert, u]>,   dz = g dc act'(z),   dg = sum of dc act(z), and c again

#pragma once

#include "activation.cuh"
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

// Bytes of shared memory of a block of Units.
template <int U>
constexpr size_t kUnitsBytes = kUnitsStages * sizeof(UnitsStage<U>);
static_assert(kUnitsBytes<8> >= kItem * 9 * sizeof(float) && kUnitsBytes<128> >= kItem * 129 * sizeof(float));

// Gates of pairs: of each of the `siblings` that a pair has, whose units are `width` in a row.
struct Gates {
  const float* gate_NG;
  int siblings, width;

  __device__ float operator()(int64_t pair, int u) const {
    const int sibling = u / width;
    return sibling < siblings ? gate_NG[pair * siblings + sibling] : 0.0f;
  }
};

// A unit of gate 0 adds nothing, though it be no number.
__device__ float Felt(float gate, float value) { return gate == 0.0f ? 0.0f : gate * value; }

struct Hidden {
  Gates gates;
  int activation;
  const float* bias_XW;
  float* z_NU;  // null: it is not kept
  bf16* c_NU;

  // Takes what units u and u + 1 of a pair are without biases; `row` counts the pairs of the item.
  template <int U>
  __device__ void Take(const int4& item, int row, int u, const float (&sum)[2], float*) const {
    const int W = gates.siblings * gates.width;
    const int64_t pair = item.y + row;
    float z[2], c[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      z[i] = sum[i] + (u + i < W ? bias_XW[item.x * W + u + i] : 0.0f);
      c[i] = Felt(gates(pair, u + i), Activated(z[i], activation));
    }
    if (z_NU) *reinterpret_cast<float2*>(z_NU + pair * U + u) = make_float2(z[0], z[1]);
    *reinterpret_cast<uint32_t*>(c_NU + pair * U + u) = Packed(c[0], c[1]);
  }

  template <int U>
  __device__ void End(const int4&, const float*) const {}
};

struct Moved {
  Gates gates;
  int activation;
  const float* z_NU;
  bf16 *c_NU, *dz_NU;
  float* d_gate_NG;

  template <int U>
  __device__ void Take(const int4& item, int row, int u, const float (&dc)[2], float* d_gates) const {
    const int64_t pair = item.y + row;
    const float2 both = *reinterpret_cast<const float2*>(z_NU + pair * U + u);
    const float z[2] = {both.x, both.y};
    float c[2], dz[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float gate = gates(pair, u + i), h = Activated(z[i], activation);
      c[i] = Felt(gate, h);
      dz[i] = Felt(gate, dc[i] * Slope(z[i], activation));
      d_gates[row * (U + 1) + u + i] = h * dc[i];  // 1 more: for free banks
    }
    *reinterpret_cast<uint32_t*>(c_NU + pair * U + u) = Packed(c[0], c[1]);
    *reinterpret_cast<uint32_t*>(dz_NU + pair * U + u) = Packed(dz[0], dz[1]);
  }

  template <int U>
  __device__ void End(const int4& item, const float* d_gates) const {
    __syncthreads();
    for (int i = threadIdx.x; i < item.z * gates.siblings; i += kThreads) {
      const float* of = d_gates + i / gates.siblings * (U + 1) + i % gates.siblings * gates.width;
      float sum = 0.0f;
      for (int u = 0; u < gates.width; ++u) sum += of[u];
      d_gate_NG[static_cast<int64_t>(item.y) * gates.siblings + i] = sum;
    }
  }
};

template <int U, typename Taker>
__global__ void __launch_bounds__(kThreads) Units(const bf16* rows_TE, const bf16* w_XWE, const int* token_N,
                                                  const int* counts, const int4* items, int E, int W, Taker taker) {
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
  __syncthreads();  // stages are free
  auto* free = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < U / 8; ++n)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 32 + m * 16 + half * 8 + g;
        const float two[2] = {sum[m][n][2 * half], sum[m][n][2 * half + 1]};
        if (row < count) taker.template Take<U>(item, row, n * 8 + 2 * t, two, free);
      }
  taker.template End<U>(item, free);
}

}  // namespace
