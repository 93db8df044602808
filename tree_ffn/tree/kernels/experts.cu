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
constexpr int kItem = 128;      // pairs of one expert that a block of Units multiplies
constexpr int kInner = 64;      // columns that it loads at a time
constexpr int kParts = 8;       // of the tokens of a tile: the warps of Slab that multiply
constexpr int kMostRows = 192;  // tokens of a part at most: the sums of all fill the shared memory
constexpr int kColumns = 32;    // that a block of Slab adds up
constexpr int kStep = 56;       // pairs of one expert and tile that it multiplies at a time
constexpr int kStepWords = 8;   // of a step: see Step
constexpr int kPairs = 32;      // that a block of Grads loads at a time

// ---- Instructions ----

__device__ uint32_t Address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// 16 bytes from global to shared memory; zeros unless `there`.
__device__ void Load16(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(Address(shared)), "l"(global), "r"(there ? 16 : 0));
}

__device__ void Load4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(Address(shared)), "l"(global));
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

// ---- Plan: where the pairs of an expert and of a part of the tokens stand ----

constexpr int kSome = 512;             // experts that a block looks at together
constexpr int kWords = kMostRows / 32;  // of 32 tokens, a part's

// A part's tokens that chose expert e0 + i, bit by bit: words[.][i]. Whoever comes first, bits are the same.
__device__ void Mark(const int* ids_TK, int T, int K, int sub, int experts, int e0, uint32_t (*words)[kSome]) {
  const int base = blockIdx.x * sub, n = max(0, min(sub, T - base)) * K;
  for (int i = threadIdx.x; i < kWords * kSome; i += blockDim.x) words[0][i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const int e = min(max(ids_TK[static_cast<int64_t>(base) * K + i], 0), experts - 1) - e0, row = i / K;
    if (e >= 0 && e < kSome) atomicOr(&words[row / 32][e], 1u << row % 32);
  }
  __syncthreads();
}

// starts[e subs + s]: how many tokens of part s chose expert e.
__global__ void Count(const int* ids_TK, int T, int K, int sub, int subs, int experts, int* starts) {
  __shared__ uint32_t words[kWords][kSome];
  for (int e0 = 0; e0 < experts; e0 += kSome) {
    Mark(ids_TK, T, K, sub, experts, e0, words);
    for (int e = threadIdx.x; e < min(kSome, experts - e0); e += blockDim.x) {
      int n = 0;
      for (int w = 0; w < kWords; ++w) n += __popc(words[w][e]);
      starts[static_cast<int64_t>(e0 + e) * subs + blockIdx.x] = n;
    }
    __syncthreads();
  }
}

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

// From counts to the first pair of every expert and part; at the end the number of pairs. One block.
__global__ void Sum(int4* starts, int fours) {
  constexpr int kMine = 4;
  int total = 0;
  for (int first = 0; first < fours; first += kMine * blockDim.x) {
    const int mine = first + kMine * threadIdx.x;
    int4 v[kMine];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      v[i] = mine + i < fours ? starts[mine + i] : int4{};
      sum += v[i].x + v[i].y + v[i].z + v[i].w;
    }
    const int2 before = Before(sum);
    int at = total + before.x;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int b = at + v[i].x, c = b + v[i].y, d = c + v[i].z;
      if (mine + i < fours) starts[mine + i] = make_int4(at, b, c, d);
      at = d + v[i].w;
    }
    total += before.y;
  }
  if (threadIdx.x == 0) reinterpret_cast<int*>(starts + fours)[0] = total;
}

// Where the pairs of a part of the tokens stand. A token that names an expert twice has it once.
__device__ void Place(const int* ids_TK, int T, int K, int sub, int subs, int experts, const int* starts, int* pair_N,
                      int* token_N, int* slot_TK) {
  __shared__ uint32_t words[kWords][kSome];
  const int base = blockIdx.x * sub, n = max(0, min(sub, T - base)) * K;
  for (int e0 = 0; e0 < experts; e0 += kSome) {
    Mark(ids_TK, T, K, sub, experts, e0, words);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const int pair = base * K + i, row = i / K, e = min(max(ids_TK[pair], 0), experts - 1);
      if (e < e0 || e >= e0 + kSome) continue;
      int at = starts[static_cast<int64_t>(e) * subs + blockIdx.x];
      for (int w = 0; w < row / 32; ++w) at += __popc(words[w][e - e0]);
      at += __popc(words[row / 32][e - e0] & ((1u << row % 32) - 1));
      pair_N[at] = pair, token_N[at] = base + row, slot_TK[pair] = at;
    }
    __syncthreads();
  }
}

// What a block of Slab does at a time: pairs of one expert, of each part of the tile from a place on.
struct alignas(16) Step {
  int expert, first, count, none;
  uint16_t parts[kParts];  // begin + 256 count
};
static_assert(sizeof(Step) == kStepWords * sizeof(int));

// Lists what blocks do: of every tile, the steps of Slab; after these, by the last block, the items of Units.
__device__ void List(int tile, const int* starts, int subs, int experts, int tiles, int most_steps, int* counts,
                     int4* items, int* steps) {
  int written = 0;
  for (int e0 = 0; e0 < experts; e0 += blockDim.x) {
    const int e = e0 + threadIdx.x, at0 = tile == tiles ? 0 : tile * kParts, most = tile == tiles ? kItem : kStep;
    int start[kParts + 1] = {}, n = 0;
    if (e < experts) {
#pragma unroll
      for (int part = 0; part <= kParts; ++part) start[part] = starts[static_cast<int64_t>(e) * subs + at0 + part];
      if (tile == tiles) start[kParts] = starts[static_cast<int64_t>(e + 1) * subs];
      n = (start[kParts] - start[0] + most - 1) / most;
    }
    const int count = start[kParts] - start[0];
    const int2 sum = Before(n);
    for (int i = 0, at = written + sum.x; i < n; ++i, ++at) {
      // Even shares.
      const int begin = static_cast<int64_t>(count) * i / n, end = static_cast<int64_t>(count) * (i + 1) / n;
      if (tile == tiles) {
        items[at] = make_int4(e, start[0] + begin, end - begin, 0);
        continue;
      }
      Step step = {e, start[0] + begin, end - begin};
      auto place = [&](int part) { return min(max(start[part] - start[0], begin), end) - begin; };
#pragma unroll
      for (int part = 0; part < kParts; ++part) step.parts[part] = place(part) + 256 * (place(part + 1) - place(part));
      int4* to = reinterpret_cast<int4*>(steps + (static_cast<int64_t>(tile) * most_steps + at) * kStepWords);
      to[0] = reinterpret_cast<const int4*>(&step)[0], to[1] = reinterpret_cast<const int4*>(&step)[1];
    }
    written += sum.y;
  }
  if (threadIdx.x == 0) counts[tile] = written;
}

// Its first blocks place the pairs of a part each; the next list.
__global__ void Spread(const int* ids_TK, int T, int K, int sub, int subs, int experts, int tiles, int most_steps,
                       const int* starts, int* pair_N, int* token_N, int* slot_TK, int* counts, int4* items,
                       int* steps) {
  if (blockIdx.x < subs)
    Place(ids_TK, T, K, sub, subs, experts, starts, pair_N, token_N, slot_TK);
  else
    List(blockIdx.x - subs, starts, subs, experts, tiles, most_steps, counts, items, steps);
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

// Where a chunk of 8 numbers of a row of `chunks` stands: 8 rows of one column meet all banks.
template <int kChunks>
__device__ int Swapped(int row, int chunk) {
  constexpr int kShare = kChunks >= 8 ? 1 : 8 / kChunks;  // rows in 128 bytes
  return chunk ^ (row / kShare % (kChunks < 8 ? kChunks : 8));
}

// What a block needs for some steps. Groups of steps are loaded kGroups - 1 ahead, words of steps twice as far.
template <int U>
struct SlabGroup {
  static constexpr int kSteps = U <= 16 ? 4 : U == 32 ? 2 : 1;
  static constexpr int kGroups = U == 16 ? 3 : U == 128 ? 2 : 4;
  static constexpr int kPitch = U == 8 ? 8 : U + 8;  // 8 rows of c, from any on, meet all banks
  bf16 weights[kSteps][U][kColumns], c[kSteps][kStep][kPitch];
  int token[kSteps][kStep];
};

template <int U>
struct alignas(128) SlabRing {
  SlabGroup<U> groups[SlabGroup<U>::kGroups];
  Step steps[2 * SlabGroup<U>::kGroups][SlabGroup<U>::kSteps];
};

// c of 16 pairs times the 32 columns of U units; c and weights are addresses, this thread's own in the first rows.
template <int U>
__device__ void Product(float (&sum)[4][4], uint32_t c, uint32_t weights0, uint32_t weights2) {
  constexpr int kPitch = SlabGroup<U>::kPitch * sizeof(bf16);
  if constexpr (U == 8) {
    uint32_t low, high, b[4];
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(low) : "r"(c));
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(high) : "r"(c + 8 * kPitch));
    Transposed4(b, weights0);
#pragma unroll
    for (int n = 0; n < 4; ++n) Multiply8(sum[n], low, high, b[n]);
  } else {
#pragma unroll
    for (int k = 0; k < U / 16; ++k) {
      uint32_t a[4], b[4], d[4];
      Matrices4(a, c + 32 * k);
      Transposed4(b, weights0 + k * 16 * kColumns * sizeof(bf16));
      Transposed4(d, weights2 + k * 16 * kColumns * sizeof(bf16));
      Multiply(sum[0], a, b[0], b[1]);
      Multiply(sum[1], a, b[2], b[3]);
      Multiply(sum[2], a, d[0], d[1]);
      Multiply(sum[3], a, d[2], d[3]);
    }
  }
}

// Adds 8 numbers of a row of sums, two chunks of 4 that a thread owns; `at` is the second's address where it is odd.
// Threads of neighbouring rows take them in opposite order: any two rows then meet different banks.
__device__ void AddTo(uint32_t at, bool there, bool odd, const float (&sum)[4][4], int half) {
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = sum[i / 2][2 * half + i % 2];
  asm volatile(
      "{ .reg .pred p; .reg .f32 a<4>, b<4>; setp.ne.b32 p, %2, 0;"
      "mov.f32 a0, 0f00000000; mov.f32 a1, a0; mov.f32 a2, a0; mov.f32 a3, a0;"
      "mov.f32 b0, a0; mov.f32 b1, a0; mov.f32 b2, a0; mov.f32 b3, a0;"
      "@p ld.shared.v4.f32 {a0, a1, a2, a3}, [%0]; @p ld.shared.v4.f32 {b0, b1, b2, b3}, [%1];"
      "add.f32 a0, a0, %3; add.f32 a1, a1, %4; add.f32 a2, a2, %5; add.f32 a3, a3, %6;"
      "add.f32 b0, b0, %7; add.f32 b1, b1, %8; add.f32 b2, b2, %9; add.f32 b3, b3, %10;"
      "@p st.shared.v4.f32 [%0], {a0, a1, a2, a3}; @p st.shared.v4.f32 [%1], {b0, b1, b2, b3}; }" ::"r"(at),
      "r"(at ^ 16), "r"(static_cast<int>(there)), "f"(odd ? v[4] : v[0]), "f"(odd ? v[5] : v[1]),
      "f"(odd ? v[6] : v[2]), "f"(odd ? v[7] : v[3]), "f"(odd ? v[0] : v[4]), "f"(odd ? v[1] : v[5]),
      "f"(odd ? v[2] : v[6]), "f"(odd ? v[3] : v[7]));
}

// The warps of Slab that load for the others, kWarps of them.
template <int U>
__device__ void LoadSlab(SlabRing<U>& ring, const bf16* c_NU, const bf16* w_XWE, const int* token_N, const int* steps,
                         int n, int E, int W) {
  using Group = SlabGroup<U>;
  constexpr int kSteps = Group::kSteps, kGroups = Group::kGroups, kAhead = kGroups - 1, kWordGroups = 2 * kGroups;
  const int thread = threadIdx.x - 32 * kParts, groups = (n + kSteps - 1) / kSteps;
  auto load_steps = [&](int group) {  // past the last, zeros: no pairs
    if (thread < 2 * kSteps) {
      const bool there = group * kSteps + thread / 2 < n;
      Load16(reinterpret_cast<int4*>(ring.steps[group % kWordGroups]) + thread,
             steps + (there ? group * kSteps * kStepWords + 4 * thread : 0), there);
    }
  };
  auto load = [&](int group) {
    if (group < groups) {
      Group& to = ring.groups[group % kGroups];
      const auto& now = ring.steps[group % kWordGroups];
#pragma unroll
      for (int i = 0; i < (kSteps * U * 4 + kThreads - 1) / kThreads; ++i) {
        const int at = thread + i * kThreads, j = at / (U * 4), u = at / 4 % U, chunk = at % 4;
        const int row = now[j].expert * W + (u < W ? u : 0);
        Load16(&to.weights[j][u][Swapped<4>(u, chunk) * 8], w_XWE + static_cast<int64_t>(row) * E + chunk * 8, u < W);
      }
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const int first = now[j].first, count = now[j].count;
        const bf16* from = c_NU + static_cast<int64_t>(first) * U;
#pragma unroll
        for (int i = 0; i < (kStep * U / 8 + kThreads - 1) / kThreads; ++i) {
          const int at = thread + i * kThreads, pair = at / (U / 8), chunk = at % (U / 8);
          if (pair < count) Load16(&to.c[j][pair][chunk * 8], from + at * 8, true);
        }
        if (thread < count) Load4(&to.token[j][thread], token_N + first + thread);
      }
    }
    Commit();
  };
  for (int group = 0; group < 2 * kAhead; ++group) load_steps(group);
  Commit();
  Wait<0>();
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
  for (int group = 0; group < kAhead; ++group) load(group);
  for (int group = 0; group < groups; ++group) {
    Wait<kAhead - 1>();
    __syncthreads();
    load_steps(group + 2 * kAhead);
    load(group + kAhead);
  }
  Wait<0>();
}

// Its first kParts warps multiply and add, each to the tokens of its own part.
template <int U>
__global__ void __launch_bounds__(32 * (kParts + kWarps), 1)
    Slab(const bf16* c_NU, const bf16* w_XWE, const int* token_N, const int* counts, const int* steps, int most_steps,
         int T, int E, int W, int sub, bf16* y_TE) {
  extern __shared__ __align__(128) unsigned char shared[];
  using Group = SlabGroup<U>;
  constexpr int kSteps = Group::kSteps, kGroups = Group::kGroups;
  auto& ring = *reinterpret_cast<SlabRing<U>*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tile = blockIdx.x, column = blockIdx.y * kColumns, base = (tile * kParts + warp) * sub;
  const int n = counts[tile], groups = (n + kSteps - 1) / kSteps;
  if (warp >= kParts) {
    steps += static_cast<int64_t>(tile) * most_steps * kStepWords;
    return LoadSlab<U>(ring, c_NU, w_XWE + column, token_N, steps, n, E, W);
  }
  float* sums = reinterpret_cast<float*>(shared + sizeof(SlabRing<U>)) + warp * sub * kColumns;
  for (int i = lane; i < sub * kColumns / 4; i += 32) reinterpret_cast<float4*>(sums)[i] = float4{};
  // What a thread reads and where it adds, as far as it is the same for all steps.
  constexpr int kRow = kColumns * sizeof(float), kUnit = kColumns * sizeof(bf16), kPitch = Group::kPitch * sizeof(bf16);
  const bool odd = g % 2;
  const uint32_t to = Address(sums) - base * kRow + (2 * t + odd) * 16;
  const uint32_t mine = U == 8 ? g * kPitch + 4 * t : lane % 16 * kPitch + lane / 16 * 16;
  const int unit = U == 8 ? lane % 8 : lane % 16, chunk = U == 8 ? lane / 8 : lane / 16;
  const uint32_t weights0 = unit * kUnit + Swapped<4>(unit, chunk) * 16;
  const uint32_t weights2 = unit * kUnit + Swapped<4>(unit, (chunk + 2) % 4) * 16;
  for (int group = 0; group < groups; ++group) {
    __syncthreads();
    const Group& now = ring.groups[group % kGroups];
    const uint32_t c = Address(now.c) + mine, weights = Address(now.weights);
    int begin[kSteps], count[kSteps];
    float sum[kSteps][4][4] = {};
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int part = ring.steps[group % (2 * kGroups)][j].parts[warp];
      begin[j] = part % 256, count[j] = part / 256;
    }
    auto product = [&](float (&sum)[4][4], int j, int first) {
      const uint32_t these = weights + j * U * kUnit;
      Product<U>(sum, c + (j * kStep + first) * kPitch, these + weights0, these + weights2);
    };
    auto add = [&](const float (&sum)[4][4], int j, int first, int n) {
      const int low = now.token[j][first + g];
      AddTo(to + low * kRow, g < n, odd, sum, 0);
      if (n > 8) AddTo(to + now.token[j][first + g + 8] * kRow, g + 8 < n, odd, sum, 1);
      __syncwarp();
    };
#pragma unroll
    for (int j = 0; j < kSteps; ++j) product(sum[j], j, begin[j]);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      add(sum[j], j, begin[j], count[j]);
      for (int more = 16; more < count[j]; more += 16) {
        float rest[4][4] = {};
        product(rest, j, begin[j] + more);
        add(rest, j, begin[j] + more, count[j] - more);
      }
    }
  }
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

ffi::Error Plan(cudaStream_t stream, S32 ids, int64_t experts, int64_t sub, ffi::ResultBuffer<ffi::S32> pair,
                ffi::ResultBuffer<ffi::S32> token, ffi::ResultBuffer<ffi::S32> slot,
                ffi::ResultBuffer<ffi::S32> starts, ffi::ResultBuffer<ffi::S32> counts,
                ffi::ResultBuffer<ffi::S32> items, ffi::ResultBuffer<ffi::S32> steps) {
  const int64_t n = ids.element_count(), tiles = counts->element_count() - 1, subs = tiles * kParts;
  const int64_t T = ids.dimensions()[0], K = ids.dimensions()[1], most = steps->dimensions()[1];
  if (n < 1 || n > 1 << 26 || experts < 1 || sub < 1 || sub > kMostRows || sub * subs < T)
    return Bad("a plan's numbers do not fit.");
  for (auto one : {pair, token, slot})
    if (static_cast<int64_t>(one->element_count()) != n) return Bad("a plan has each pair once.");
  if (static_cast<int64_t>(starts->element_count()) != experts * subs + 1 || experts * subs > 1 << 30)
    return Bad("a plan's starts do not fit.");
  if (items->dimensions()[0] < n / kItem + experts || most < experts + kParts * sub * K / kStep)
    return Bad("a plan's lists are too short.");
  int* first = starts->typed_data();
  Count<<<subs, 1024, 0, stream>>>(ids.typed_data(), T, K, sub, subs, experts, first);
  Sum<<<1, 1024, 0, stream>>>(reinterpret_cast<int4*>(first), experts * subs / 4);
  Spread<<<subs + tiles + 1, 1024, 0, stream>>>(ids.typed_data(), T, K, sub, subs, experts, tiles, most, first,
                                               pair->typed_data(), token->typed_data(), slot->typed_data(),
                                               counts->typed_data(), reinterpret_cast<int4*>(items->typed_data()),
                                               steps->typed_data());
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
  const int T = y->dimensions()[0], E = y->dimensions()[1], W = w.dimensions()[1];
  const int tiles = counts.element_count() - 1;
  if (E % kColumns || w.dimensions()[2] != E || W > c.dimensions()[1] || sub * tiles * kParts < T ||
      c.dimensions()[0] != static_cast<int64_t>(token.element_count()))
    return Bad("coefficients and units do not fit.");
  return With(c.dimensions()[1], [&](auto units) {
    constexpr int U = units;
    const size_t bytes = sizeof(SlabRing<U>) + kParts * sub * kColumns * sizeof(float);
    if (!MayShare(Slab<U>, bytes)) return Launched();
    Slab<U><<<dim3(tiles, E / kColumns), 32 * (kParts + kWarps), bytes, stream>>>(
        Data(c), Data(w), token.typed_data(), counts.typed_data(), steps.typed_data(), steps.dimensions()[1], T, E, W,
        sub, reinterpret_cast<bf16*>(y->untyped_data()));
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
                                  .Arg<S32>()
                                  .Attr<int64_t>("experts")
                                  .Attr<int64_t>("sub")
                                  .Ret<S32>()
                                  .Ret<S32>()
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
