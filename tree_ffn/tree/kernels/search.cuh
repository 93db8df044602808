// The beam of leaf/beam.py, and the gradient of what it finds: a warp takes a token.
//
// A token's row of logits is read once, into shared memory. The candidates of a level stand one to a lane, kC of
// them where there are more than 32, in the order of their ids; each counts those that are ahead of it. No atomics:
// each sum has one order.

#pragma once

#include "instructions.cuh"

namespace {

// ---- Order, as in `leaf.order`: NaN and -inf are the lowest, ties go to the lower id ----

// Of candidates in the order of their ids, how many are ahead of each; lane + 32 j is [j]. Unless `exactly`, only who
// is among the `best` is right.
template <int kC>
__device__ void Rank(const float (&score)[kC], int count, int best, bool exactly, int (&rank)[kC]) {
  const float least = -3.402823466e38f;
  const int lane = threadIdx.x % 32;
  float key[kC];
#pragma unroll
  for (int j = 0; j < kC; ++j) {
    key[j] = lane + 32 * j < count ? (score[j] > least ? score[j] : least) : -INFINITY;
    rank[j] = 0;
  }
#pragma unroll
  for (int slot = 0; slot < 32 * kC; ++slot) {
    const float other = __shfl_sync(~0u, key[slot / 32], slot % 32);
#pragma unroll
    for (int j = 0; j < kC; ++j) rank[j] += other > key[j];
  }
  int among = 0;  // more than `best` are, where the last of them are equal
#pragma unroll
  for (int j = 0; j < kC; ++j) among += __popc(__ballot_sync(~0u, rank[j] < best));
  if (among == best && !exactly) return;
#pragma unroll
  for (int slot = 0; slot < 32 * kC; ++slot) {
    const float other = __shfl_sync(~0u, key[slot / 32], slot % 32);
#pragma unroll
    for (int j = 0; j < kC; ++j) rank[j] += other == key[j] && slot < lane + 32 * j;
  }
}

// From the ranks of the best to their places in the order of their ids; of others to `best`.
template <int kC>
__device__ void Compact(int (&rank)[kC], int best) {
  int before = 0;
#pragma unroll
  for (int j = 0; j < kC; ++j) {
    const uint32_t among = __ballot_sync(~0u, rank[j] < best);
    const int place = before + __popc(among & ((1u << threadIdx.x % 32) - 1));
    rank[j] = rank[j] < best ? place : best;
    before += __popc(among);
  }
}

// ---- Search ----

struct Tree {
  int tokens, rows, stride, trees, depth, top_k;  // R rows of logits, S of memory
};

// A node that is kept, its log p, and what decides.
struct alignas(16) Kept {
  int node;
  float log_p, score;
};

// log s(r) to the right (side 1), log s(-r) to the left.
__device__ float LogS(float r, int side) {
  return fminf(side ? r : -r, 0.0f) - log1pf(expf(-fabsf(r)));
}

// The leaves that a token's search finds, the likeliest first. A warp's; `kept` is shared memory for top_k.
// of_child(node, side): what log p and, where the load is balanced, the score become less on that side.
template <int kC, bool kBalanced, typename OfChild>
__device__ void Beam(Tree tree, OfChild of_child, Kept* kept, int* ids_K, float* log_p_K) {
  const int lane = threadIdx.x % 32;
  for (int n = lane; n < tree.trees; n += 32) kept[n] = {n, 0.0f, 0.0f};
  for (int level = 0, count = tree.trees; level < tree.depth; ++level) {
    count *= 2;
    __syncwarp();
    int node[kC], to[kC];
    float p[kC], by[kC];
#pragma unroll
    for (int j = 0; j < kC; ++j) {  // slot e holds the child e % 2 of the node in slot e / 2
      const int slot = lane + 32 * j, side = lane & 1;
      node[j] = 0, p[j] = by[j] = 0.0f, to[j] = slot;
      if (slot < count) {
        const Kept above = kept[slot / 2];
        const float2 less = of_child(above.node, side);
        node[j] = 2 * above.node + tree.trees + side;
        p[j] = above.log_p + less.x;
        by[j] = kBalanced ? above.score + less.y : p[j];
      }
    }
    const bool last = level + 1 == tree.depth;
    if (count > tree.top_k) {
      Rank<kC>(by, count, tree.top_k, last, to);
      if (!last) Compact<kC>(to, tree.top_k);
      count = tree.top_k;
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      if (to[j] >= count) continue;
      if (last) {
        ids_K[to[j]] = node[j] - tree.rows, log_p_K[to[j]] = p[j];
      } else {
        kept[to[j]] = {node[j], p[j], by[j]};
      }
    }
  }
}

__device__ void Load(const float* from, float* to, int n, int lane) {
  for (int i = lane; i < n / 4; i += 32) {
    reinterpret_cast<float4*>(to)[i] = __ldcs(reinterpret_cast<const float4*>(from) + i);
  }
  __syncwarp();
}

// Bytes of shared memory of a warp of Search.
__host__ __device__ int SearchBytes(Tree tree) { return 4 * tree.stride + tree.top_k * sizeof(Kept); }

template <int kC, bool kBalanced>
__global__ void Search(Tree tree, const float* r_TS, const float* b_R, const float* bias_R, int* ids_TK,
                       float* log_p_TK) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t token = blockIdx.x * (blockDim.x / 32) + warp;
  if (token >= tree.tokens) return;
  float* row = reinterpret_cast<float*>(Shared() + warp * SearchBytes(tree));
  Load(r_TS + token * tree.stride, row, tree.stride, lane);
  auto of_child = [&](int node, int side) {
    const float r = row[node] + __ldg(b_R + node);
    return make_float2(LogS(r, side), kBalanced ? LogS(r + __ldg(bias_R + node), side) : 0.0f);
  };
  Beam<kC, kBalanced>(tree, of_child, reinterpret_cast<Kept*>(row + tree.stride), ids_TK + token * tree.top_k,
                      log_p_TK + token * tree.top_k);
}

// ---- Gradient: each node's share of what arrives at the leaves below it ----

constexpr int kMostClimbing = 2;  // leaves of a lane

// Floats that a warp of Gradient has for the nodes and leaves.
__host__ __device__ int Nodes(Tree tree) { return (2 * tree.rows + tree.trees + 3) / 4 * 4; }

// Bytes of shared memory of a warp of Gradient.
template <typename Out>
__host__ __device__ int GradientBytes(Tree tree) {
  return 4 * (2 * tree.stride + Nodes(tree)) + sizeof(Out) * tree.stride;
}

// d r[n] = s(-r) right - s(r) left, where left and right are sums over the leaves found on the two sides.
// A leaf's gradient climbs to its root; where two meet, the left one goes on. Other nodes have none.
template <typename Out>
__global__ void Gradient(Tree tree, const float* r_TS, const float* b_R, const int* ids_TK, const float* d_TK,
                         Out* d_TS, float* d_BR) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, nodes = Nodes(tree);
  float* all = reinterpret_cast<float*>(Shared());
  float* sums = all + warp * tree.stride;  // of what rows got, over this warp's tokens
  float* r = all + (warps + warp) * tree.stride;
  float* d = all + 2 * warps * tree.stride + warp * nodes;  // what arrives; 0 between tokens, as is `row`
  Out* row = reinterpret_cast<Out*>(all + warps * (2 * tree.stride + nodes)) + warp * tree.stride;
  for (int n = lane; n < tree.stride; n += 32) sums[n] = 0.0f, row[n] = Rounded<Out>(0.0f);
  for (int n = lane; n < nodes; n += 32) d[n] = 0.0f;
  for (int token = blockIdx.x * warps + warp; token < tree.tokens; token += gridDim.x * warps) {
    const int64_t at = token;
    int node[kMostClimbing];  // -1: none is left
    float value[kMostClimbing];
#pragma unroll
    for (int j = 0; j < kMostClimbing; ++j) {
      const int k = lane + 32 * j;
      value[j] = k < tree.top_k ? d_TK[at * tree.top_k + k] : 0.0f;
      node[j] = value[j] != 0.0f ? tree.rows + ids_TK[at * tree.top_k + k] : -1;
    }
    Load(r_TS + at * tree.stride, r, tree.stride, lane);
#pragma unroll
    for (int j = 0; j < kMostClimbing; ++j)
      if (node[j] >= 0) d[node[j]] = value[j];
    __syncwarp();
    for (int level = 0; level < tree.depth; ++level) {
      float left[kMostClimbing], right[kMostClimbing];
#pragma unroll
      for (int j = 0; j < kMostClimbing; ++j) {
        const int first = node[j] - ((node[j] - tree.trees) & 1);  // of the two children
        left[j] = node[j] >= 0 ? d[first] : 0.0f, right[j] = node[j] >= 0 ? d[first + 1] : 0.0f;
        if (node[j] != first && left[j] != 0.0f) node[j] = -1;
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kMostClimbing; ++j) {
        if (node[j] < 0) continue;
        const int above = (node[j] - tree.trees) / 2;
        const float logit = r[above] + __ldg(b_R + above), p = isnan(logit) ? 0.5f : 1.0f / (1.0f + expf(-logit));
        const float got = (1.0f - p) * right[j] - p * left[j], sum = left[j] + right[j];
        sums[above] += got;
        row[above] = Rounded<Out>(got);
        d[2 * above + tree.trees] = d[2 * above + tree.trees + 1] = 0.0f;
        d[above] = sum;
        node[j] = sum != 0.0f ? above : -1;
      }
      __syncwarp();
    }
#pragma unroll
    for (int j = 0; j < kMostClimbing; ++j)
      if (node[j] >= 0) d[node[j]] = 0.0f;
    float2* to = reinterpret_cast<float2*>(d_TS + at * tree.stride);
    for (int n = lane; n < tree.stride * static_cast<int>(sizeof(Out)) / 8; n += 32) {
      to[n] = reinterpret_cast<float2*>(row)[n];
      reinterpret_cast<float2*>(row)[n] = float2{};
    }
    __syncwarp();
  }
  __syncthreads();
  for (int n = threadIdx.x; n < tree.rows; n += blockDim.x) {
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += all[w * tree.stride + n];
    d_BR[static_cast<int64_t>(blockIdx.x) * tree.rows + n] = sum;
  }
}

}  // namespace
