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
constexpr int kMostSiblings = 8;  // of a pair

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

// Gates of pairs, of each of the `siblings` that a pair has; a sibling's units are `width` in a row.
struct Gates {
  const float* gate_NG;
  int siblings, width;
};

// What the gate of a sibling is that its token did not choose: a NaN that no arithmetic gives.
constexpr uint32_t kNotChosen = 0xFFFFFFFF;

// A unit of gate 0 adds nothing, though it be no number.
__device__ float Felt(float gate, float value) { return gate == 0.0f ? 0.0f : gate * value; }

// Takes the units of a chosen sibling: `w` is their place among those of all experts, `at` that of the pair's in
// [N, U], `slot` that of the gate. Each word of `units` has a sum, and gets two results.
struct Hidden {
  Gates gates;
  int activation;
  const float* bias_XW;
  float* z_NU;  // null: it is not kept
  bf16* c_NU;

  __device__ void Take(float* units, int64_t w, int64_t at, int64_t slot, float gate) const {
    for (int i = 0; i < gates.width; ++i) {
      const float z = units[i] + bias_XW[w + i];
      if (z_NU) z_NU[at + i] = z;
      units[i] = __uint_as_float(Packed(Felt(gate, Activated(z, activation)), 0.0f));
    }
  }

  __device__ void Store(int64_t at, const uint4& low, const uint4&) const {
    *reinterpret_cast<uint4*>(c_NU + at) = low;
  }
};

struct Moved {
  Gates gates;
  int activation;
  const float* z_NU;
  bf16 *c_NU, *dz_NU;
  float* d_gate_NG;

  __device__ void Take(float* units, int64_t, int64_t at, int64_t slot, float gate) const {
    float d_gate = 0.0f;
    for (int i = 0; i < gates.width; ++i) {
      const float2 h = WithSlope(z_NU[at + i], activation);
      d_gate += h.x * units[i];
      units[i] = __uint_as_float(Packed(Felt(gate, h.x), Felt(gate, h.y * units[i])));
    }
    d_gate_NG[slot] = d_gate;
  }

  __device__ void Store(int64_t at, const uint4& low, const uint4& high) const {
    *reinterpret_cast<uint4*>(c_NU + at) = low;
    *reinterpret_cast<uint4*>(dz_NU + at) = high;
  }
};

// The siblings of an item's pairs that were chosen are listed, and a thread takes one: others are most of them, and
// cost nothing.
template <int U, typename Taker>
__device__ void TakeChosen(const Taker& taker, const int4& item, int W, float (*units)[U + 1], uint16_t* list, int* n) {
  const auto [gate_NG, siblings, width] = taker.gates;
  const int slots = item.z * siblings;
  if (threadIdx.x == 0) *n = 0;
  __syncthreads();
  for (int first = 0; first < slots; first += kThreads) {
    const int slot = first + threadIdx.x;
    const bool chosen =
        slot < slots && __float_as_uint(gate_NG[static_cast<int64_t>(item.y) * siblings + slot]) != kNotChosen;
    if (chosen) list[atomicAdd(n, 1)] = slot;
    if (!chosen && slot < slots)
      for (int i = 0; i < width; ++i) units[slot / siblings][slot % siblings * width + i] = 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < *n; i += kThreads) {
    const int row = list[i] / siblings, first = list[i] % siblings * width;
    const int64_t pair = item.y + row, slot = static_cast<int64_t>(item.y) * siblings + list[i];
    taker.Take(&units[row][first], static_cast<int64_t>(item.x) * W + first, pair * U + first, slot, gate_NG[slot]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < item.z * (U / 8); i += kThreads) {
    const int row = i / (U / 8), u = i % (U / 8) * 8;
    uint32_t word[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) word[j] = u + j < W ? __float_as_uint(units[row][u + j]) : 0;
    uint32_t both[2][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      both[0][j] = __byte_perm(word[2 * j], word[2 * j + 1], 0x5410);
      both[1][j] = __byte_perm(word[2 * j], word[2 * j + 1], 0x7632);
    }
    taker.Store((static_cast<int64_t>(item.y) + row) * U + u,
                make_uint4(both[0][0], both[0][1], both[0][2], both[0][3]),
                make_uint4(both[1][0], both[1][1], both[1][2], both[1][3]));
  }
}

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
  auto* units = reinterpret_cast<float(*)[U + 1]>(shared);  // 1 more: for free banks
#pragma unroll
  for (int n = 0; n < U / 8; ++n)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) units[warp * 32 + m * 16 + i / 2 * 8 + g][n * 8 + 2 * t + i % 2] = sum[m][n][i];
  __shared__ uint16_t list[kItem * kMostSiblings];
  __shared__ int n_listed;
  TakeChosen<U>(taker, item, W, units, list, &n_listed);
}

}  // namespace
