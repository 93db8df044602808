// What chosen experts add up to and its gradients, in bfloat16 with float32 sums, for NVIDIA GPUs from Ampere on.
// experts.py says what is computed; W is an expert's units, U the same filled up to 8, 16, 32, 64 or 128.
//
// Pairs of a token and an expert are sorted by expert, then by token. Rows of tokens are gathered while they are
// loaded and never copied; a tile of tokens adds up some columns in shared memory. No atomics: each sum has one order.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using bf16 = __nv_bfloat16;

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kItem = 128;     // pairs of one expert that a block of Units multiplies
constexpr int kInner = 64;     // columns that it loads at a time
constexpr int kStep = 16;      // pairs of one expert that a warp of Slab multiplies at a time
constexpr int kColumns = 32;   // that a block of Slab adds up
constexpr int kMostRows = 384; // tokens of a warp of Slab: their sums fill its shared memory
constexpr int kPairs = 32;     // that a block of Grads loads at a time
constexpr int kStepWords = 8;  // of a step: the expert, then for each warp 32 first + count

// ---- Instructions ----

__device__ uint32_t Address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// 16 bytes from global to shared memory; zeros unless `there`.
__device__ void Load16(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(Address(shared)), "l"(global), "r"(there ? 16 : 0));
}

__device__ void Commit() { asm volatile("cp.async.commit_group;"); }

template <int kPending>
__device__ void Wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}

__device__ void Matrices4(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row));
}

__device__ void Transposed4(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row));
}

// c += a b for 16 rows, 8 columns and 16 products a sum.
__device__ void Multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for 8 products a sum.
__device__ void Multiply8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}

__device__ uint32_t Packed(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}

// ---- Plan: where the pairs of an expert and of a tile stand ----

// starts[e * subs + s]: the first pair of expert e or later whose token is in part s of the tokens or later.
__global__ void Bounds(const uint32_t* key_N, int n, int shift, int top_k, int sub, int subs, int experts,
                       int* token_N, int* starts) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i > n) return;
  auto token = [=](int j) { return static_cast<int>(key_N[j] & ((1u << shift) - 1)) / top_k; };
  auto bucket = [=](int j) { return min(static_cast<int>(key_N[j] >> shift), experts - 1) * subs + token(j) / sub; };
  const int last = i == n ? experts * subs : bucket(i);
  for (int b = i ? bucket(i - 1) + 1 : 0; b <= last; ++b) starts[b] = i;
  if (i < n) token_N[i] = token(i);
}

// Lists what blocks do: of every tile, the steps of Slab; after these, by the last block, the items of Units.
__global__ void Lists(const int* starts, int subs, int experts, int tiles, int most_steps, int* counts, int4* items,
                      int* steps) {
  __shared__ int sums[32];
  const int tile = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int written = 0;
  for (int e0 = 0; e0 < experts; e0 += blockDim.x) {
    const int e = e0 + threadIdx.x;
    int first[kWarps] = {}, count[kWarps] = {}, n = 0;
    if (e < experts && tile == tiles) {
      first[0] = starts[e * subs], count[0] = starts[(e + 1) * subs] - first[0];
      n = (count[0] + kItem - 1) / kItem;
    } else if (e < experts) {
      for (int w = 0; w < kWarps; ++w) {
        const int at = e * subs + tile * kWarps + w;
        first[w] = starts[at], count[w] = starts[at + 1] - first[w];
        n = max(n, (count[w] + kStep - 1) / kStep);
      }
    }
    int before = n;  // the sum of n up to this thread
    for (int far = 1; far < 32; far *= 2) {
      const int other = __shfl_up_sync(~0u, before, far);
      before += lane >= far ? other : 0;
    }
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    int total = 0;
    for (int w = 0; w < warps; ++w) {
      before += w < warp ? sums[w] : 0;
      total += sums[w];
    }
    __syncthreads();
    for (int i = 0, at = written + before - n; i < n; ++i, ++at) {
      if (tile == tiles) {  // even shares
        const int begin = static_cast<int64_t>(count[0]) * i / n, end = static_cast<int64_t>(count[0]) * (i + 1) / n;
        items[at] = make_int4(e, first[0] + begin, end - begin, 0);
        continue;
      }
      int* step = steps + (static_cast<int64_t>(tile) * most_steps + at) * kStepWords;
      step[0] = e;
      for (int w = 0; w < kWarps; ++w)
        step[1 + w] = (first[w] + min(i * kStep, count[w])) * 32 + max(0, min(kStep, count[w] - i * kStep));
    }
    written += total;
  }
  if (threadIdx.x == 0) counts[tile] = written;
}

// ---- Units: z[p, u] = <rows[token[p]], w[expert, u]> + bias[expert, u] ----

template <int U>
struct UnitsStage {
  bf16 rows[kItem][kInner], weights[U][kInner];
};

constexpr int kUnitsStages = 3;

template <int U>
__global__ void __launch_bounds__(kThreads) Units(const bf16* rows_TE, const bf16* w_XWE, const float* bias_XW,
                                                  const int* token_N, const int* counts, const int4* items, int E,
                                                  int W, float* z_NU) {
  extern __shared__ __align__(128) unsigned char shared[];
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

// ---- Slab: y[t] = sum over the pairs p of token t and over u of c[p, u] w[expert, u] ----

// Steps between two barriers, so that 128 threads load at least 16 bytes each.
template <int U>
constexpr int kGroup = U == 8 ? 4 : U <= 32 ? 2 : 1;
constexpr int kSlabStages = 4;

// What a thread multiplies: of pairs g and g + 8 of a step, units [t U / 4, (t + 1) U / 4), and their tokens' rows.
template <int U>
struct Coefficients {
  uint32_t low[U / 8], high[U / 8];
  int row_low, row_high;

  __device__ void Read(const bf16* c_NU, const int* token_N, int place, int n_pairs, int base, int g, int t) {
    const int first = place / 32, count = place % 32;
    const int64_t p = min(first + g, n_pairs - 1), q = min(first + g + 8, n_pairs - 1);
    Copy(low, c_NU + p * U + t * (U / 4));
    Copy(high, c_NU + q * U + t * (U / 4));
    row_low = g < count ? token_N[p] - base : -1;
    row_high = g + 8 < count ? token_N[q] - base : -1;
  }

  __device__ static void Copy(uint32_t (&to)[U / 8], const bf16* from) {
    if constexpr (U == 8) to[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
    if constexpr (U == 16) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
      to[0] = v.x, to[1] = v.y;
    }
    if constexpr (U >= 32) {
#pragma unroll
      for (int i = 0; i < U / 32; ++i) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(from) + i);
        to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
      }
    }
  }
};

// Adds 8 numbers of one row of sums, in which a thread owns two chunks of 4. Neighbouring rows of a warp take them
// in opposite order: any two rows then meet different banks.
__device__ void AddTo(float* sums, int row, int g, int t, const float (&c)[4][4], int half) {
  if (row < 0) return;
  float4* chunk = reinterpret_cast<float4*>(sums + row * kColumns) + 2 * t;
  const bool odd = g & 1;
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = c[i / 2][2 * half + i % 2];
  float4 a = chunk[odd], b = chunk[!odd];
  a.x += odd ? v[4] : v[0], a.y += odd ? v[5] : v[1], a.z += odd ? v[6] : v[2], a.w += odd ? v[7] : v[3];
  b.x += odd ? v[0] : v[4], b.y += odd ? v[1] : v[5], b.z += odd ? v[2] : v[6], b.w += odd ? v[3] : v[7];
  chunk[odd] = a, chunk[!odd] = b;
}

// c of 16 pairs times the 32 columns of U units in shared memory, rows of 4 chunks of which row r has its own order.
template <int U>
__device__ void Product(float (&c)[4][4], const Coefficients<U>& a, const bf16* weights, int lane) {
  constexpr int kQuarter = U / 4;
  const int k = lane % 8, part = lane / 8;
  auto at = [&](int u, int chunk) { return Address(weights + u * kColumns + (chunk ^ (u / kQuarter)) * 8); };
  if constexpr (U == 8) {
    uint32_t b[4];
    Transposed4(b, at(k, part));
#pragma unroll
    for (int n = 0; n < 4; ++n) Multiply8(c[n], a.low[0], a.high[0], b[n]);
  } else {
#pragma unroll
    for (int s = 0; s < U / 16; ++s) {
      const int u = k / 2 * kQuarter + 4 * s + k % 2 + part % 2 * 2;  // the unit that thread t has there
      const uint32_t four[4] = {a.low[2 * s], a.high[2 * s], a.low[2 * s + 1], a.high[2 * s + 1]};
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t b[4];
        Transposed4(b, at(u, n + part / 2));
        Multiply(c[n], four, b[0], b[1]);
        Multiply(c[n + 1], four, b[2], b[3]);
      }
    }
  }
}

template <int U>
__global__ void __launch_bounds__(kThreads, 1) Slab(const bf16* c_NU, const bf16* w_XWE, const int* token_N,
                                                    const int* counts, const int* steps, int most_steps, int n_pairs,
                                                    int T, int E, int W, int sub, bf16* y_TE) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int G = kGroup<U>, kStage = G * U * kColumns;
  bf16* ring = reinterpret_cast<bf16*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  float* sums = reinterpret_cast<float*>(shared + kSlabStages * kStage * sizeof(bf16)) + warp * sub * kColumns;
  const int tile = blockIdx.x, column = blockIdx.y * kColumns, base = (tile * kWarps + warp) * sub;
  const int n = counts[tile], groups = (n + G - 1) / G;
  steps += static_cast<int64_t>(tile) * most_steps * kStepWords;
  for (int i = lane; i < sub * kColumns / 4; i += 32) reinterpret_cast<float4*>(sums)[i] = float4{};

  // Read ahead: words of steps by four groups, what they name by three.
  constexpr int kChunks = G * U * 4, kMine = (kChunks + kThreads - 1) / kThreads;
  int expert[kSlabStages][kMine], place[kSlabStages][G];
  Coefficients<U> coefficients[kSlabStages][G];
  auto step_words = [&](int group, int slot) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int s = group * G + (threadIdx.x + i * kThreads) / (U * 4);
      expert[slot][i] = s < n ? __ldg(steps + s * kStepWords) : -1;
    }
#pragma unroll
    for (int j = 0; j < G; ++j) {
      const int s = group * G + j;
      place[slot][j] = s < n ? __ldg(steps + s * kStepWords + 1 + warp) : 0;
    }
  };
  auto load = [&](int group, int slot) {
    if (group < groups) {
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const int at = threadIdx.x + i * kThreads, u = at / 4 % U, chunk = at % 4, e = max(expert[slot][i], 0);
        bf16* to = ring + slot * kStage + at / 4 * kColumns + (chunk ^ (u / (U / 4))) * 8;
        const int64_t row = static_cast<int64_t>(e) * W + (u < W ? u : 0);
        Load16(to, w_XWE + row * E + column + chunk * 8, u < W && expert[slot][i] >= 0);
      }
#pragma unroll
      for (int j = 0; j < G; ++j)
        coefficients[slot][j].Read(c_NU, token_N, place[slot][j], n_pairs, base, g, t);
    }
    Commit();
  };
#pragma unroll
  for (int slot = 0; slot < kSlabStages; ++slot) step_words(slot, slot);
#pragma unroll
  for (int slot = 0; slot < kSlabStages - 1; ++slot) load(slot, slot);

  for (int first = 0; first < groups; first += kSlabStages) {
#pragma unroll
    for (int slot = 0; slot < kSlabStages; ++slot) {
      const int group = first + slot;
      if (group >= groups) break;
      Wait<kSlabStages - 2>();
      __syncthreads();
      load(group + kSlabStages - 1, (slot + kSlabStages - 1) % kSlabStages);
      step_words(group + kSlabStages, slot);
#pragma unroll
      for (int j = 0; j < G; ++j) {
        const Coefficients<U>& a = coefficients[slot][j];
        float c[4][4] = {};
        Product<U>(c, a, ring + slot * kStage + j * U * kColumns, lane);
        AddTo(sums, a.row_low, g, t, c, 0);
        AddTo(sums, a.row_high, g, t, c, 1);
        __syncwarp();
      }
    }
  }
  Wait<0>();
  __syncwarp();
  // A row of sums stands by thread: columns 2 t and 2 t + 1 of the four groups of 8, then those of t + 1.
  for (int row = g; row < sub && base + row < T; row += 8) {
    const float2* from = reinterpret_cast<const float2*>(sums + row * kColumns);
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = from[4 * i + t];
      v[i] = Packed(pair.x, pair.y);
    }
    *reinterpret_cast<uint4*>(y_TE + static_cast<int64_t>(base + row) * E + column + 8 * t) =
        make_uint4(v[0], v[1], v[2], v[3]);
  }
}

// ---- Grads: dw[e, u] = sum over the pairs p of expert e of c[p, u] rows[token[p]], db[e, u] = sum of c[p, u] ----

constexpr int kGradsStages = 3;

template <int U>
struct GradsStage {
  static constexpr int kBlocks = U <= 32 ? 4 : 2;            // of 16 columns, a warp's
  static constexpr int kWidth = kBlocks * 16 * kWarps;       // columns of a block
  static constexpr int kChunks = U / 8;                      // of 8 units
  static constexpr int kShare = U >= 64 ? 1 : 64 / U;        // rows of c in 128 bytes
  bf16 rows[kPairs][kWidth], c[kPairs][U];

  static __device__ int Chunk(int pair, int chunk) { return chunk ^ (pair / kShare % (kChunks < 8 ? kChunks : 8)); }
};

__device__ void Write8(float* to, const float* from) {
  reinterpret_cast<float4*>(to)[0] = reinterpret_cast<const float4*>(from)[0];
  reinterpret_cast<float4*>(to)[1] = reinterpret_cast<const float4*>(from)[1];
}

__device__ void Write8(bf16* to, const float* from) {
  *reinterpret_cast<uint4*>(to) = make_uint4(Packed(from[0], from[1]), Packed(from[2], from[3]),
                                             Packed(from[4], from[5]), Packed(from[6], from[7]));
}

template <int U, typename Out>
__global__ void __launch_bounds__(kThreads) Grads(const bf16* c_NU, const bf16* rows_TE, const int* token_N,
                                                  const int* starts, int subs, int E, int W, Out* dw_XWE,
                                                  float* db_XW) {
  extern __shared__ __align__(128) unsigned char shared[];
  using Stage = GradsStage<U>;
  constexpr int kWidth = Stage::kWidth, kBlocks = Stage::kBlocks;
  auto* stages = reinterpret_cast<Stage*>(shared);
  const int expert = blockIdx.x, column = blockIdx.y * kWidth;
  const int begin = starts[expert * subs], end = starts[(expert + 1) * subs];
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
        Load16(&to.c[row][Stage::Chunk(row, at) * 8], from, p < end);
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
        Transposed4(b, Address(&stage.c[row][Stage::Chunk(row, at) * 8]));
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
  for (int u = line; u < W; u += kLines)
    if (inside)
      Write8(dw_XWE + (static_cast<int64_t>(expert) * W + u) * E + column + chunk * 8, out + u * kPitch + chunk * 8);
  if (!sums_biases || g) return;
#pragma unroll
  for (int n = 0; n < U / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (const int u = n * 8 + 2 * t + i; u < W) db_XW[expert * W + u] = bias[n][i];
}

// ---- What XLA calls ----

ffi::Error Bad(const char* what) { return ffi::Error::InvalidArgument(std::string("tree_ffn: ") + what); }

ffi::Error Launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
}

// f(std::integral_constant<int, U>) of the U that is `units`.
template <typename F>
ffi::Error With(int64_t units, F f) {
  switch (units) {
    case 8: return f(std::integral_constant<int, 8>());
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
    case 64: return f(std::integral_constant<int, 64>());
    case 128: return f(std::integral_constant<int, 128>());
  }
  return Bad("units are filled up to 8, 16, 32, 64 or 128.");
}

template <typename Kernel>
bool MayShare(Kernel kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) == cudaSuccess;
}

using Bf16 = ffi::Buffer<ffi::BF16>;
using S32 = ffi::Buffer<ffi::S32>;
using F32 = ffi::Buffer<ffi::F32>;

const bf16* Data(const Bf16& buffer) { return reinterpret_cast<const bf16*>(buffer.untyped_data()); }

ffi::Error Plan(cudaStream_t stream, ffi::Buffer<ffi::U32> key, int64_t experts, int64_t shift, int64_t top_k,
                int64_t sub, ffi::ResultBuffer<ffi::S32> token, ffi::ResultBuffer<ffi::S32> starts,
                ffi::ResultBuffer<ffi::S32> counts, ffi::ResultBuffer<ffi::S32> items,
                ffi::ResultBuffer<ffi::S32> steps) {
  const int n = key.element_count(), tiles = counts->element_count() - 1, subs = tiles * kWarps;
  const int64_t tokens = top_k > 0 ? n / top_k : 0, most = steps->dimensions()[1];
  if (top_k < 1 || experts < 1 || sub < 1 || shift < 0 || shift > 31 || (int64_t{1} << shift) < n || sub * subs < tokens)
    return Bad("a plan's numbers do not fit.");
  if (n > 1 << 26 || token->element_count() != n || starts->element_count() != experts * subs + 1)
    return Bad("a plan's arrays do not fit.");
  if (items->dimensions()[0] < n / kItem + experts || most < experts + kWarps * sub * top_k / kStep + 1)
    return Bad("a plan's lists are too short.");
  Bounds<<<n / 256 + 1, 256, 0, stream>>>(key.typed_data(), n, shift, top_k, sub, subs, experts, token->typed_data(),
                                          starts->typed_data());
  Lists<<<tiles + 1, 256, 0, stream>>>(starts->typed_data(), subs, experts, tiles, most, counts->typed_data(),
                                       reinterpret_cast<int4*>(items->typed_data()), steps->typed_data());
  return Launched();
}

ffi::Error UnitsCall(cudaStream_t stream, Bf16 rows, Bf16 w, F32 bias, S32 token, S32 counts, S32 items,
                     ffi::ResultBuffer<ffi::F32> z) {
  const int E = rows.dimensions()[1], W = w.dimensions()[1], last = counts.element_count() - 1;
  if (E % kInner || w.dimensions()[2] != E || W > z->dimensions()[1] || bias.element_count() != w.dimensions()[0] * W)
    return Bad("rows and units do not fit.");
  if (z->dimensions()[0] != static_cast<int64_t>(token.element_count())) return Bad("there is one token a pair.");
  return With(z->dimensions()[1], [&](auto units) {
    constexpr int U = units;
    const size_t bytes = kUnitsStages * sizeof(UnitsStage<U>);
    if (!MayShare(Units<U>, bytes)) return Launched();
    Units<U><<<items.dimensions()[0], kThreads, bytes, stream>>>(
        Data(rows), Data(w), bias.typed_data(), token.typed_data(), counts.typed_data() + last,
        reinterpret_cast<const int4*>(items.typed_data()), E, W, z->typed_data());
    return Launched();
  });
}

ffi::Error SlabCall(cudaStream_t stream, Bf16 c, Bf16 w, S32 token, S32 counts, S32 steps, int64_t sub,
                    ffi::ResultBuffer<ffi::BF16> y) {
  const int T = y->dimensions()[0], E = y->dimensions()[1], W = w.dimensions()[1], n = c.dimensions()[0];
  const int tiles = counts.element_count() - 1;
  if (E % kColumns || w.dimensions()[2] != E || W > c.dimensions()[1] || sub > kMostRows || sub * tiles * kWarps < T)
    return Bad("coefficients and units do not fit.");
  return With(c.dimensions()[1], [&](auto units) {
    constexpr int U = units;
    const size_t bytes = kSlabStages * kGroup<U> * U * kColumns * sizeof(bf16) + kWarps * sub * kColumns * sizeof(float);
    if (!MayShare(Slab<U>, bytes)) return Launched();
    Slab<U><<<dim3(tiles, E / kColumns), kThreads, bytes, stream>>>(
        Data(c), Data(w), token.typed_data(), counts.typed_data(), steps.typed_data(), steps.dimensions()[1], n, T, E,
        W, sub, reinterpret_cast<bf16*>(y->untyped_data()));
    return Launched();
  });
}

template <typename Out>
ffi::Error GradsOf(cudaStream_t stream, Bf16 c, Bf16 rows, S32 token, S32 starts, ffi::Result<ffi::AnyBuffer> dw,
                   ffi::ResultBuffer<ffi::F32> db) {
  const int X = dw->dimensions()[0], W = dw->dimensions()[1], E = dw->dimensions()[2];
  const int subs = (starts.element_count() - 1) / X;
  return With(c.dimensions()[1], [&](auto units) {
    constexpr int U = units, kWidth = GradsStage<U>::kWidth;
    const size_t bytes = std::max(kGradsStages * sizeof(GradsStage<U>), U * (kWidth + 4) * sizeof(float));
    if (!MayShare(Grads<U, Out>, bytes)) return Launched();
    Grads<U, Out><<<dim3(X, (E + kWidth - 1) / kWidth), kThreads, bytes, stream>>>(
        Data(c), Data(rows), token.typed_data(), starts.typed_data(), subs, E, W,
        reinterpret_cast<Out*>(dw->untyped_data()), db->typed_data());
    return Launched();
  });
}

ffi::Error GradsCall(cudaStream_t stream, Bf16 c, Bf16 rows, S32 token, S32 starts, ffi::Result<ffi::AnyBuffer> dw,
                     ffi::ResultBuffer<ffi::F32> db) {
  if (dw->dimensions().size() != 3 || dw->dimensions()[1] > c.dimensions()[1] || dw->dimensions()[2] % 8 ||
      dw->dimensions()[2] != rows.dimensions()[1] || token.element_count() != static_cast<size_t>(c.dimensions()[0]))
    return Bad("coefficients and rows do not fit.");
  if (dw->element_type() == ffi::BF16) return GradsOf<bf16>(stream, c, rows, token, starts, dw, db);
  if (dw->element_type() == ffi::F32) return GradsOf<float>(stream, c, rows, token, starts, dw, db);
  return Bad("gradients are bfloat16 or float32.");
}

auto Binding() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnPlan, Plan,
                              Binding()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Attr<int64_t>("experts")
                                  .Attr<int64_t>("shift")
                                  .Attr<int64_t>("top_k")
                                  .Attr<int64_t>("sub")
                                  .Ret<S32>()
                                  .Ret<S32>()
                                  .Ret<S32>()
                                  .Ret<S32>()
                                  .Ret<S32>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnUnits, UnitsCall,
                              Binding().Arg<Bf16>().Arg<Bf16>().Arg<F32>().Arg<S32>().Arg<S32>().Arg<S32>().Ret<F32>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnSlab, SlabCall,
                              Binding().Arg<Bf16>().Arg<Bf16>().Arg<S32>().Arg<S32>().Arg<S32>().Attr<int64_t>("sub").Ret<Bf16>(),
    {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnGrads, GradsCall,
                              Binding().Arg<Bf16>().Arg<Bf16>().Arg<S32>().Arg<S32>().Ret<ffi::AnyBuffer>().Ret<F32>(),
                              {ffi::Traits::kCmdBufferCompatible});
