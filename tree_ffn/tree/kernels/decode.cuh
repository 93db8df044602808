// A leaf layer behind trees for few tokens, in bfloat16 with float32 sums: leaf/layer.py says what is computed.
//
//     Logits   products of routers and tokens
//     Choose   each token's experts and gates, a block a token; of one token each block of Units does it
//     Units    of 16 units of an expert and all tokens that chose it a block: their coefficients g act(z); of one
//              token parts of z, so that all multiprocessors have some
//     Outputs  y: a block takes 64 columns and a group of experts, whose sums XLA adds up
//
// A kernel starts while the one before it ends, and waits for its results. Weights are read once, in pieces of 16
// bytes, straight into the operands of small matrix products. No float atomics: each sum has one order.

#pragma once

#include "both.cuh"
#include "decode_choice.cuh"

namespace {

constexpr int kColumns = 64;  // of y, a block's
constexpr int kChunk = 32;    // products of a sum at a time

// ---- Products of 16 rows with tokens: of Logits and of Units ----

// sum[q] += the products of rows and tokens 8 q to 8 q + 7 of this warp's share of chunks begin to end.
// In which order the products of a sum are does not matter: a thread loads 8 neighbours of each operand.
template <int kGroups, typename TokenOf>
__device__ void Products(const bf16* rows, int n_rows, int width, int begin, int end, int columns, TokenOf token_of,
                         float (&sum)[kGroups][4]) {
  constexpr int kAtOnce = 4;  // chunks on their way
  const int lane = threadIdx.x % 32, g = lane / 4, at = lane % 4 * 8;
  const bf16* x[kGroups];
#pragma unroll
  for (int q = 0; q < kGroups; ++q) x[q] = 8 * q + g < columns ? token_of(8 * q + g) + at : nullptr;
  const bf16 *row = rows + static_cast<int64_t>(g) * width + at, *other = row + 8 * static_cast<int64_t>(width);
  for (int first = begin + threadIdx.x / 32; first < end; first += kAtOnce * kWarps) {
    uint4 a[kAtOnce], b[kAtOnce], v[kAtOnce][kGroups];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int chunk = first + i * kWarps;
      a[i] = chunk < end && g < n_rows ? Fixed16(row + chunk * kChunk) : uint4{};
      b[i] = chunk < end && g + 8 < n_rows ? Fixed16(other + chunk * kChunk) : uint4{};
#pragma unroll
      for (int q = 0; q < kGroups; ++q) v[i][q] = chunk < end && x[q] ? Fixed16(x[q] + chunk * kChunk) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int q = 0; q < kGroups; ++q) {
        Multiply(sum[q], {a[i].x, b[i].x, a[i].y, b[i].y}, v[i][q].x, v[i][q].y);
        Multiply(sum[q], {a[i].z, b[i].z, a[i].w, b[i].w}, v[i][q].z, v[i][q].w);
      }
  }
}

constexpr int kColumn = kRows + 4;  // floats from one column to the next, for free banks

template <int kGroups>
using Sums = float[kWarps][8 * kGroups][kColumn];

// Adds up the warps' sums; put(row, column, sum) of each.
template <int kGroups, typename Put>
__device__ void AddUp(const float (&sum)[kGroups][4], int columns, Sums<kGroups>& shared, Put put) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int q = 0; q < kGroups; ++q)
#pragma unroll
    for (int i = 0; i < 4; ++i) shared[threadIdx.x / 32][8 * q + 2 * t + i % 2][g + i / 2 * 8] = sum[q][i];
  __syncthreads();
  const int row = threadIdx.x % kRows, column = threadIdx.x / kRows;  // there are 16 columns at most
  if (column < columns) {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += shared[warp][column][row];
    put(row, column, total);
  }
  __syncthreads();
}

// The first chunk of part `part` of `parts`.
__device__ int Begin(int width, int part, int parts) { return width / kChunk * part / parts; }

// r[p][t][n], the part p of the logit of router n for token t. Blocks: tiles of routers, parts.
template <int kGroups>
__global__ void __launch_bounds__(kThreads) Logits(Layer layer, const bf16* x_TE, const bf16* w_RE, float* r_PTS) {
  __shared__ Sums<kGroups> sums;
  LetNextStart();
  const int first = blockIdx.x * kRows, part = blockIdx.y, E = layer.width, T = layer.tree.tokens;
  float sum[kGroups][4] = {};
  Products(w_RE + static_cast<int64_t>(first) * E, min(kRows, layer.tree.rows - first), E,
           Begin(E, part, layer.parts), Begin(E, part + 1, layer.parts), T,
           [=](int token) { return x_TE + static_cast<int64_t>(token) * E; }, sum);
  AddUp(sum, T, sums, [=](int row, int token, float r) {
    r_PTS[(static_cast<int64_t>(part) * T + token) * layer.tree.stride + first + row] = r;
  });
}

// ---- Units ----

// As in activations.py, in its order.
__device__ float Activated(float z, int activation) {
  switch (activation) {
    case 0: return 0.5f * z * erfcf(-z * 0.70710678f);
    case 1: return 0.5f * z * (1.0f + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
    case 2: return isnan(z) ? z : fmaxf(z, 0.0f);
    case 3: return isnan(z) ? z : fmaxf(z, 0.0f) * fmaxf(z, 0.0f);
    case 4: return z >= 0.0f ? z : 0.01f * z;
    case 5: return z / (1.0f + expf(-z));
    case 6: return tanhf(z);
    case 7: return z;
    case 8: return fabsf(z);
    default: return isnan(z) ? z : fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z)));
  }
}

// One token. z[p][k][u], the part p of <w_in, x> of unit u of the k-th expert. Blocks: experts, tiles, parts.
__global__ void __launch_bounds__(kThreads)
    UnitsOfOne(Layer layer, const bf16* x_E, const bf16* w_in, const bf16* w_out, const float* r_PTS, int* ids_K,
               float* gates_K, float* z_PKU) {
  __shared__ Chosen chosen;
  __shared__ Sums<1> sums;
  LetNextStart();
  const int k = blockIdx.x, tile = blockIdx.y, part = blockIdx.z, K = layer.tree.top_k;
  const int E = layer.width, W = layer.units, tiles = layer.Tiles(), n_rows = min(kRows, W - tile * kRows);
  const int begin = Begin(E, part, layer.unit_parts), end = Begin(E, part + 1, layer.unit_parts);
  layer.b_R.PrefetchSome(0, layer.tree.rows, threadIdx.x);
  WaitForLast();
  ChooseOf(layer, r_PTS, 0, chosen);
  if (k + tile + part == 0 && threadIdx.x < K) {
    ids_K[threadIdx.x] = chosen.ids[threadIdx.x], gates_K[threadIdx.x] = chosen.gates[threadIdx.x];
  }
  const int64_t row = static_cast<int64_t>(chosen.ids[k]) * W + tile * kRows;
  // Outputs will read them: lines of 128 bytes.
  layer.b_XW.PrefetchSome(row, n_rows, threadIdx.x);
  const int lines = (end - begin + 1) / 2;
  for (int i = threadIdx.x; i < n_rows * lines; i += kThreads)
    Prefetch(w_out + (row + i / lines) * E + begin * kChunk + i % lines * 64);
  float sum[1][4] = {};
  Products(w_in + row * E, n_rows, E, begin, end, 1, [=](int) { return x_E; }, sum);
  AddUp(sum, 1, sums, [=](int unit, int, float z) {
    z_PKU[((static_cast<int64_t>(part) * K + k) * tiles + tile) * kRows + unit] = z;
  });
}

// c[i][u], the coefficient of unit u, of the expert and the token of pair i. Blocks: as many as there are.
template <int kGroups>
__global__ void __launch_bounds__(kThreads)
    Units(Layer layer, const bf16* x_TE, const bf16* w_in, const int* ids_TK, const float* gates_TK, int* number,
          Picked* all_picked, bf16* c_NU) {
  __shared__ Listed listed;
  __shared__ Sums<kGroups> sums;
  LetNextStart();
  const int E = layer.width, W = layer.units, tiles = layer.Tiles();
  WaitForLast();
  const int n = List(layer, ids_TK, gates_TK, listed);
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) *number = n;
    if (threadIdx.x < n) all_picked[threadIdx.x] = listed.all_picked[threadIdx.x];
  }
  for (int item = blockIdx.x; item < n * tiles; item += gridDim.x) {
    const Picked picked = listed.all_picked[item / tiles];
    const int first = item % tiles * kRows;
    const int64_t row = static_cast<int64_t>(picked.expert) * W + first;
    float sum[kGroups][4] = {};
    Products(w_in + row * E, min(kRows, W - first), E, 0, E / kChunk, picked.Count(),
             [&](int column) { return x_TE + static_cast<int64_t>(listed.tokens[picked.first + column]) * E; }, sum);
    AddUp(sum, picked.Count(), sums, [&](int unit, int column, float z) {
      const int place = picked.first + column;
      const bool there = first + unit < W;  // what fills up the tile adds nothing
      const float h = there ? listed.gates[place] * Activated(z + layer.b_XW[row + unit], layer.activation) : 0.0f;
      c_NU[static_cast<int64_t>(place) * tiles * kRows + first + unit] = Rounded<bf16>(h);
    });
  }
}

// ---- Outputs ----

// What the last kernel leaves.
struct Coefficients {
  const int *ids_K, *number;  // of one token; of several how many experts there are, and which
  const Picked* all_picked;
  const float *gates_K, *z_PKU;
  const bf16* c_NU;

  // Of tile `item` of all.
  template <bool kOne>
  __device__ Picked PickedOf(int item, int tiles) const {
    return kOne ? Picked{ids_K[item / tiles], item / tiles, 1, 0} : all_picked[item / tiles];
  }

  // g act(z) of four units of the k-th expert of one token.
  __device__ uint2 OfOne(const Layer& layer, int64_t row, int k, int unit) const {
    const int stride = layer.Tiles() * kRows;
    float4 part[kMostParts];
#pragma unroll
    for (int p = 0; p < kMostParts; ++p) {
      const float* at = z_PKU + (static_cast<int64_t>(p) * layer.tree.top_k + k) * stride + unit;
      part[p] = p < layer.unit_parts ? *reinterpret_cast<const float4*>(at) : float4{};
    }
    float h[4] = {};
#pragma unroll
    for (int p = 0; p < kMostParts; ++p)
      h[0] += part[p].x, h[1] += part[p].y, h[2] += part[p].z, h[3] += part[p].w;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool there = unit + i < layer.units;
      h[i] = there ? gates_K[k] * Activated(h[i] + layer.b_XW[row + i], layer.activation) : 0.0f;
    }
    return {Packed(h[0], h[1]), Packed(h[2], h[3])};
  }
};

// Of 16 units: rows of w_out and, of each token, coefficients. A thread has four units, which are four rows, and
// eight columns: in which order products and columns are does not matter.
struct Operands {
  uint4 w[4];
  uint2 c[2];  // of tokens g and g + 8

  template <bool kOne>
  __device__ void Load(const Layer& layer, const Picked& picked, int tile, const bf16* w_out, int column,
                       const Coefficients& from) {
    const int lane = threadIdx.x % 32, g = lane / 4, unit = tile * kRows + lane % 4 * 4;
    const int64_t row = static_cast<int64_t>(picked.expert) * layer.units + unit, E = layer.width;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      w[i] = unit + i < layer.units ? Fixed16(w_out + (row + i) * E + column + 8 * g) : uint4{};
    c[0] = c[1] = uint2{};
    if (kOne) {
      if (g == 0) c[0] = from.OfOne(layer, row, picked.first, unit);
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t place = picked.Place(8 * half + g);
      if (picked.Has(8 * half + g))
        c[half] = *reinterpret_cast<const uint2*>(from.c_NU + place * layer.Tiles() * kRows + unit);
    }
  }
};

// y[j][t], of the experts of group j. Blocks: pieces of kColumns columns, groups.
template <bool kOne>
__global__ void __launch_bounds__(kThreads, 2)
    Outputs(Layer layer, const bf16* w_out, Coefficients from, float* y_JTE) {
  __shared__ float all[kWarps][kTokens][kColumns + 8];  // 8 more: for free banks
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int T = layer.tree.tokens, tiles = layer.Tiles(), most = min(layer.Pairs(), layer.experts) * tiles;
  const int column = blockIdx.x * kColumns, step = gridDim.y * kWarps;
  float sum[8][4] = {};
  int item = blockIdx.y + gridDim.y * warp;
  WaitForLast();
  auto picked_of = [&](int item) { return from.PickedOf<kOne>(min(item, most - 1), tiles); };
  Picked picked = picked_of(item);  // before it is known whether there are so many
  const int n = kOne ? most : *from.number * tiles;
  Operands now, next = {};
  if (item < n) now.Load<kOne>(layer, picked, item % tiles, w_out, column, from);
  picked = picked_of(item + step);
  for (; item < n; item += step) {
    if (item + step < n) next.Load<kOne>(layer, picked, (item + step) % tiles, w_out, column, from);
    picked = picked_of(item + 2 * step);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      Multiply(sum[j], {now.c[0].x, now.c[1].x, now.c[0].y, now.c[1].y}, Both(now.w[0], now.w[1], j),
               Both(now.w[2], now.w[3], j));
    now = next;
  }
  // Column 8 n + j of the piece, which is column n of product j, stands at 8 j + n.
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (8 * half + g < T)
        *reinterpret_cast<float2*>(&all[warp][8 * half + g][8 * j + 2 * t]) =
            make_float2(sum[j][2 * half], sum[j][2 * half + 1]);
  __syncthreads();
  for (int k = threadIdx.x; k < T * kColumns; k += kThreads) {
    const int token = k / kColumns, c = k % kColumns;
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += all[warp][token][c % 8 * 8 + c / 8];
    y_JTE[(static_cast<int64_t>(blockIdx.y) * T + token) * layer.width + column + c] = total;
  }
}

}  // namespace
