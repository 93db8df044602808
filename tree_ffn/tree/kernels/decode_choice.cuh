// Which experts few tokens choose, and the list of these: the first half of decode.cuh.

#pragma once

#include "before.cuh"
#include "search.cuh"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 16;           // rows of weights that a warp multiplies at a time
constexpr int kTokens = 16;         // at most
constexpr int kMostTop = 16;        // experts of a token: their 32 candidates have a lane each
constexpr int kMostExperts = 1024;  // of a layer
constexpr int kMostPairs = kTokens * kMostTop;
constexpr int kMostParts = 8;  // of a sum of E products

// A number of an array of float32 or bfloat16.
struct Numbers {
  const void* at;
  bool halves;
  __device__ float operator[](int64_t i) const {
    return halves ? Widened(static_cast<const bf16*>(at)[i]) : static_cast<const float*>(at)[i];
  }
  // Lets n from i on come nearer, by thread as many as there are lines of 128 bytes.
  __device__ void PrefetchSome(int64_t i, int n, int thread) const {
    const int size = halves ? 2 : 4;
    if (128 * thread < size * n) Prefetch(static_cast<const char*>(at) + size * i + 128 * thread);
  }
};

enum class Norm { kNone, kL1, kL2, kRms };

struct Layer {
  Tree tree;
  int width, units, experts;  // E, W, X
  int parts;                  // of the sums of Logits, each of some of the E products
  int unit_parts;             // the same of Units, of one token
  int activation;
  Norm norm;
  Numbers b_R, b_XW;

  __host__ __device__ int Tiles() const { return (units + kRows - 1) / kRows; }
  __host__ __device__ int Pairs() const { return tree.tokens * tree.top_k; }
};

// ---- Search ----

// What a block knows of the token that it searches for.
struct alignas(16) Chosen {
  float sides[2 * kMostExperts];  // log s(-r) and log s(r) of every router
  Kept kept[kMostTop];
  int ids[kMostTop];
  float gates[kMostTop];
};

// exp of log p - its norm: a lane has an expert.
__device__ float Gate(float log_p, int top_k, Norm norm) {
  const float power = norm == Norm::kL1 ? 1.0f : 2.0f;
  const bool there = threadIdx.x % 32 < top_k;
  float most = there ? log_p : -INFINITY;
  for (int far = kMostTop / 2; far > 0; far /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, far));
  float sum = there ? expf(power * (log_p - most)) : 0.0f;
  for (int far = kMostTop / 2; far > 0; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
  if (norm == Norm::kNone) return expf(log_p);
  const float length = most + logf(sum) / power;
  return expf(log_p - length + (norm == Norm::kRms ? 0.5f * logf(top_k) : 0.0f));
}

// Experts and gates of a token, the likeliest first, to `chosen`. All threads of a block.
__device__ void ChooseOf(const Layer& layer, const float* r_PTS, int token, Chosen& chosen) {
  const Tree& tree = layer.tree;
  const int lane = threadIdx.x % 32, K = tree.top_k;
  for (int node = 2 * threadIdx.x; node < tree.rows; node += 2 * kThreads) {
    float2 part[kMostParts];  // all of them are on their way at once
#pragma unroll
    for (int p = 0; p < kMostParts; ++p) {
      const int64_t at = (static_cast<int64_t>(p) * tree.tokens + token) * tree.stride + node;
      part[p] = p < layer.parts ? *reinterpret_cast<const float2*>(r_PTS + at) : make_float2(0.0f, 0.0f);
    }
    float r[2] = {layer.b_R[node], node + 1 < tree.rows ? layer.b_R[node + 1] : 0.0f};
#pragma unroll
    for (int p = 0; p < kMostParts; ++p) r[0] += part[p].x, r[1] += part[p].y;
#pragma unroll
    for (int i = 0; i < 4; ++i) chosen.sides[2 * node + i] = LogS(r[i / 2], i % 2);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    auto of_child = [&](int node, int side) { return make_float2(chosen.sides[2 * node + side], 0.0f); };
    Beam<1, false>(tree, of_child, chosen.kept, chosen.ids, chosen.gates);
    __syncwarp();
    const float gate = Gate(lane < K ? chosen.gates[lane] : 0.0f, K, layer.norm);
    if (lane < K) chosen.gates[lane] = gate;
  }
  __syncthreads();
}

// Blocks: tokens.
__global__ void __launch_bounds__(kThreads) Choose(Layer layer, const float* r_PTS, int* ids_TK, float* gates_TK) {
  __shared__ Chosen chosen;
  LetNextStart();
  layer.b_R.PrefetchSome(0, layer.tree.rows, threadIdx.x);
  WaitForLast();
  ChooseOf(layer, r_PTS, blockIdx.x, chosen);
  const int at = blockIdx.x * layer.tree.top_k + threadIdx.x;
  if (threadIdx.x < layer.tree.top_k) ids_TK[at] = chosen.ids[threadIdx.x], gates_TK[at] = chosen.gates[threadIdx.x];
}

// ---- The list of what several tokens chose ----

// An expert that was chosen: by whom, bit by bit, and the place of its first pair with a token.
struct alignas(16) Picked {
  int expert, first;
  uint32_t tokens, none;
  __device__ int Count() const { return __popc(tokens); }
  __device__ bool Has(int token) const { return tokens >> token & 1; }
  __device__ int Place(int token) const { return first + __popc(tokens & ((1u << token) - 1)); }
};

struct Listed {
  Picked all_picked[kMostPairs];
  uint32_t by[kMostExperts];  // which tokens chose an expert
  uint16_t first[kMostExperts];
  float gates[kMostPairs];    // of pairs in their places, as the next
  uint8_t tokens[kMostPairs];
};

// Pairs of a token and an expert by expert. Returns how many experts were chosen. All threads of a block.
__device__ int List(const Layer& layer, const int* ids_TK, const float* gates_TK, Listed& listed) {
  const int i = threadIdx.x, token = i / layer.tree.top_k, X = layer.experts;  // a thread has a pair
  const bool there = i < layer.Pairs();
  const int expert = there ? ids_TK[i] : 0;
  for (int e = threadIdx.x; e < X; e += kThreads) listed.by[e] = 0;
  __syncthreads();
  if (there) atomicOr(listed.by + expert, 1u << token);
  __syncthreads();
  int before = 0;  // experts, and pairs in the lower half
  for (int e0 = 0; e0 < X; e0 += kThreads) {
    const int e = e0 + threadIdx.x;
    const uint32_t tokens = e < X ? listed.by[e] : 0;
    const int2 sum = Before((tokens ? 1 << 16 : 0) + __popc(tokens));
    const int at = before + sum.x;
    if (tokens) {
      listed.all_picked[at >> 16] = {e, at & 0xffff, tokens, 0};
      listed.first[e] = at & 0xffff;
    }
    before += sum.y;
  }
  __syncthreads();
  if (there) {
    const int place = Picked{expert, listed.first[expert], listed.by[expert], 0}.Place(token);
    listed.tokens[place] = token, listed.gates[place] = gates_TK[i];
  }
  __syncthreads();
  return before >> 16;
}

}  // namespace
