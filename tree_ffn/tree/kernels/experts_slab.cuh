// y[t] = sum over the pairs p of token t and over u of c[p, u] w[expert, u]

#pragma once

#include "experts_units.cuh"

namespace {

constexpr int kColumns = 32;    // that a block of Slab adds up

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
    const uint32_t low = Word(c), high = Word(c + 8 * kPitch);
    uint32_t b[4];
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
  float w[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) w[i] = odd ? v[(i + 4) % 8] : v[i];
  AddIf(there, at, at ^ 16, w);
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
  SyncLoaders<kThreads>();
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
  unsigned char* shared = Shared();
  using Group = SlabGroup<U>;
  constexpr int kSteps = Group::kSteps, kGroups = Group::kGroups;
  constexpr int kMost = U == 8 ? kMostRows : 172;  // as in experts.py
  static_assert(sizeof(SlabRing<U>) + kParts * kMost * kColumns * sizeof(float) <= 227 * 1024);
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

}  // namespace
