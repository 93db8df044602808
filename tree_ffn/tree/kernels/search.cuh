// The beam of leaf/beam.py, and the gradient of what it finds: a warp takes a token.
//
// A token's row of logits is read once, into shared memory. The candidates of a level stand one to a lane, kC of
// them where there are more than 32; a bitonic sort of 64-bit keys puts the likeliest first. No atomics: each sum
// has one order.

#pragma once

#include "instructions.cuh"

namespace {

constexpr int kNodeBits = 25, kSlotBits = 7;  // of a key's lower half: the lower id first, then where it stood

// ---- Order, as in `leaf.order`: NaN and -inf are the lowest, ties go to the lower id ----

__device__ uint64_t Key(float score, int node, int slot) {
  const float least = -3.402823466e38f;
  const uint32_t bits = __float_as_uint((score > least ? score : least) + 0.0f);  // no -0
  const uint32_t ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  const uint32_t id = (1u << kNodeBits) - 1 - node;
  return static_cast<uint64_t>(ordered) << 32 | id << kSlotBits | slot;
}

// Largest first; element lane + 32 j is key[j].
template <int kC>
__device__ void Sort(uint64_t (&key)[kC], int lane) {
#pragma unroll
  for (int size = 2; size <= 32 * kC; size *= 2) {
#pragma unroll
    for (int step = size / 2; step > 0; step /= 2) {
      uint64_t other[kC];
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        other[j] = step >= 32 ? key[j ^ step / 32] : __shfl_xor_sync(~0u, key[j], step);
      }
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        const int e = lane + 32 * j;
        const bool larger = ((e & step) == 0) == ((e & size) == 0);
        key[j] = (other[j] > key[j]) == larger ? other[j] : key[j];
      }
    }
  }
}

// ---- Search ----

struct Tree {
  int tokens, rows, stride, trees, depth, top_k;  // R rows of logits, S of memory
};

__device__ float OfChild(float log_p, float r, int side) {
  const float both = log1pf(expf(-fabsf(r)));
  return log_p + (fminf(side ? r : -r, 0.0f) - both);
}

__device__ void Load(const float* from, float* to, int n, int lane) {
  for (int i = lane; i < n / 4; i += 32) {
    reinterpret_cast<float4*>(to)[i] = __ldcs(reinterpret_cast<const float4*>(from) + i);
  }
  __syncwarp();
}

template <int kC, bool kBalanced>
__global__ void Search(Tree tree, const float* r_TS, const float* b_R, const float* bias_R, int* ids_TK,
                       float* log_p_TK) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int token = blockIdx.x * (blockDim.x / 32) + warp;
  if (token >= tree.tokens) return;
  float* row = reinterpret_cast<float*>(Shared()) + warp * tree.stride;
  Load(r_TS + static_cast<int64_t>(token) * tree.stride, row, tree.stride, lane);
  int node[kC], count = tree.trees;
  float log_p[kC] = {}, score[kC] = {};
#pragma unroll
  for (int j = 0; j < kC; ++j) node[j] = lane + 32 * j;
  for (int level = 0; level < tree.depth; ++level) {
    count *= 2;
    int child[kC];
    float p[kC], by[kC];
#pragma unroll
    for (int j = 0; j < kC; ++j) {  // slot e holds the child e % 2 of the node in slot e / 2
      const int from = lane / 2 + 16 * (j & 1), side = lane & 1;
      const int parent = __shfl_sync(~0u, node[j / 2], from);
      const float above = __shfl_sync(~0u, log_p[j / 2], from);
      const float moved = kBalanced ? __shfl_sync(~0u, score[j / 2], from) : 0.0f;
      child[j] = 2 * parent + tree.trees + side;
      p[j] = by[j] = 0.0f;
      if (lane + 32 * j < count) {
        const float r = row[parent] + __ldg(b_R + parent);
        p[j] = OfChild(above, r, side);
        by[j] = kBalanced ? OfChild(moved, r + __ldg(bias_R + parent), side) : p[j];
      }
    }
    if (count <= tree.top_k) {
#pragma unroll
      for (int j = 0; j < kC; ++j) node[j] = child[j], log_p[j] = p[j], score[j] = by[j];
      continue;
    }
    uint64_t key[kC];
#pragma unroll
    for (int j = 0; j < kC; ++j) key[j] = lane + 32 * j < count ? Key(by[j], child[j], lane + 32 * j) : 0;
    Sort<kC>(key, lane);
    count = tree.top_k;
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      const uint32_t low = static_cast<uint32_t>(key[j]), slot = low & ((1u << kSlotBits) - 1);
      node[j] = (1 << kNodeBits) - 1 - static_cast<int>(low >> kSlotBits);
#pragma unroll
      for (int i = 0; i < kC; ++i) {
        const float a = __shfl_sync(~0u, p[i], slot % 32);
        const float b = kBalanced ? __shfl_sync(~0u, by[i], slot % 32) : a;
        if (slot / 32 == i) log_p[j] = a, score[j] = b;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kC; ++j) {
    const int e = lane + 32 * j;
    if (e >= tree.top_k) continue;
    ids_TK[static_cast<int64_t>(token) * tree.top_k + e] = node[j] - tree.rows;
    log_p_TK[static_cast<int64_t>(token) * tree.top_k + e] = log_p[j];
  }
}

// ---- Gradient: each node's share of what arrives at the leaves below it ----

// Numbers that a warp of Gradient has for nodes.
__host__ __device__ int Nodes(Tree tree) { return (2 * tree.rows + tree.trees + 4) / 4 * 4; }

// d r[n] = s(-r) right - s(r) left, where left and right are sums over the leaves found on the two sides.
template <typename Out>
__global__ void Gradient(Tree tree, const float* r_TS, const float* b_R, const int* ids_TK, const float* d_TK,
                         Out* d_TS, float* d_BR) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int leaves = tree.rows + tree.trees, nodes = Nodes(tree);
  float* all = reinterpret_cast<float*>(Shared());
  float* sums = all + warp * tree.stride;             // of what rows got, over this warp's tokens
  float* right = all + (warps + warp) * tree.stride;  // s(r)
  float* d = all + 2 * warps * tree.stride + warp * nodes + (tree.trees & 1);  // pairs of children are aligned
  for (int n = lane; n < tree.stride; n += 32) sums[n] = 0.0f;
  for (int token = blockIdx.x * warps + warp; token < tree.tokens; token += gridDim.x * warps) {
    const int64_t at = token;
    Load(r_TS + at * tree.stride, right, tree.stride, lane);
    for (int n = lane; n < leaves; n += 32) d[tree.rows + n] = 0.0f;
    for (int n = lane; n < tree.rows; n += 32) {
      const float r = right[n] + __ldg(b_R + n);
      right[n] = isnan(r) ? 0.5f : 1.0f / (1.0f + expf(-r));
    }
    __syncwarp();
    for (int k = lane; k < tree.top_k; k += 32) {
      d[tree.rows + ids_TK[at * tree.top_k + k]] = d_TK[at * tree.top_k + k];
    }
    for (int level = tree.depth - 1; level >= 0; --level) {
      __syncwarp();
      const int first = tree.trees * ((1 << level) - 1), wide = tree.trees << level;
      for (int n = first + lane; n < first + wide; n += 32) {
        const float2 both = *reinterpret_cast<const float2*>(d + 2 * n + tree.trees);
        const float p = right[n], got = (1.0f - p) * both.y - p * both.x;
        d[n] = both.x + both.y;
        sums[n] += got;
        d_TS[at * tree.stride + n] = Rounded<Out>(got);
      }
    }
    for (int n = tree.rows + lane; n < tree.stride; n += 32) d_TS[at * tree.stride + n] = Rounded<Out>(0.0f);
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
