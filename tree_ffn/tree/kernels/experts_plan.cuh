// Where the pairs of an expert and of a part of the tokens stand, and what blocks of the other kernels do.

#pragma once

#include "before.cuh"

namespace {

constexpr int kItem = 128;      // pairs of one expert that a block of Units or Products multiplies
constexpr int kMostRows = 192;  // tokens of a part at most

constexpr int kSome = 512;              // experts that a block looks at together
constexpr int kWords = kMostRows / 32;  // of 32 tokens, a part's

// What tokens chose: ids [T, K] of experts, of which `siblings` in a row count as one; there are `experts` of these.
struct Choices {
  const int* ids_TK;
  int T, K, siblings, experts;

  __device__ int operator[](int64_t pair) const { return min(max(ids_TK[pair] / siblings, 0), experts - 1); }
};

// A part's tokens that chose expert e0 + i, bit by bit: words[.][i]. Whoever comes first, bits are the same.
__device__ void Mark(Choices chosen, int sub, int e0, uint32_t (*words)[kSome]) {
  const int base = blockIdx.x * sub, n = max(0, min(sub, chosen.T - base)) * chosen.K;
  for (int i = threadIdx.x; i < kWords * kSome; i += blockDim.x) words[i / kSome][i % kSome] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const int e = chosen[static_cast<int64_t>(base) * chosen.K + i] - e0, row = i / chosen.K;
    if (e >= 0 && e < kSome) atomicOr(&words[row / 32][e], 1u << row % 32);
  }
  __syncthreads();
}

// starts[e subs + s]: how many tokens of part s chose expert e.
__global__ void Count(Choices chosen, int sub, int subs, int* starts) {
  __shared__ uint32_t words[kWords][kSome];
  for (int e0 = 0; e0 < chosen.experts; e0 += kSome) {
    Mark(chosen, sub, e0, words);
    for (int e = threadIdx.x; e < min(kSome, chosen.experts - e0); e += blockDim.x) {
      int n = 0;
      for (int w = 0; w < kWords; ++w) n += __popc(words[w][e]);
      starts[static_cast<int64_t>(e0 + e) * subs + blockIdx.x] = n;
    }
    __syncthreads();
  }
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

// Where the pairs of a part of the tokens stand. What a token chose before stands there already: its place is
// given as ~place.
__device__ void Place(Choices chosen, int sub, int subs, const int* starts, int* token_N, int* slot_TK) {
  __shared__ uint32_t words[kWords][kSome];
  const int K = chosen.K, base = blockIdx.x * sub, n = max(0, min(sub, chosen.T - base)) * K;
  for (int e0 = 0; e0 < chosen.experts; e0 += kSome) {
    Mark(chosen, sub, e0, words);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const int64_t pair = static_cast<int64_t>(base) * K + i;
      const int row = i / K, e = chosen[pair];
      if (e < e0 || e >= e0 + kSome) continue;
      int at = starts[static_cast<int64_t>(e) * subs + blockIdx.x];
      for (int w = 0; w < row / 32; ++w) at += __popc(words[w][e - e0]);
      at += __popc(words[row / 32][e - e0] & ((1u << row % 32) - 1));
      bool again = false;
      for (int before = 1; before <= i % K; ++before) again |= chosen[pair - before] == e;
      token_N[at] = base + row, slot_TK[pair] = again ? ~at : at;
    }
    __syncthreads();
  }
}

// Lists what blocks do: at most `most` pairs of one expert each, in even shares. One block. Where there are ranges,
// experts without pairs are listed, too, and those that come more than once have parts from ranges[e].x on.
__device__ void List(const int* starts, int subs, int experts, int most, int* count, int4* list, int2* ranges) {
  int written = 0, parts = 0;
  for (int e0 = 0; e0 < experts; e0 += blockDim.x) {
    const int e = e0 + threadIdx.x;
    int start = 0, pairs = 0, n = 0;
    if (e < experts) {
      start = starts[static_cast<int64_t>(e) * subs];
      pairs = starts[static_cast<int64_t>(e + 1) * subs] - start;
      n = max((pairs + most - 1) / most, ranges ? 1 : 0);
    }
    const int2 listed = Before(n), parted = Before(n > 1 ? n : 0);
    const int at = written + listed.x, part = parts + parted.x;
    for (int i = 0; i < n; ++i) {
      const int begin = static_cast<int64_t>(pairs) * i / n, end = static_cast<int64_t>(pairs) * (i + 1) / n;
      list[at + i] = make_int4(e, start + begin, end - begin, n > 1 ? part + i : -1);
    }
    if (ranges && e < experts) ranges[e] = make_int2(part, n > 1 ? n : 0);
    written += listed.y, parts += parted.y;
  }
  if (threadIdx.x == 0) *count = written;
}

struct Lists {
  int* counts;  // of items, of jobs
  int4 *items, *jobs;
  int2* ranges;
};

// Its first blocks place the pairs of a part each; the last two list.
__global__ void Spread(Choices chosen, int sub, int subs, int most, const int* starts, int* token_N, int* slot_TK,
                       Lists lists) {
  if (blockIdx.x < subs)
    Place(chosen, sub, subs, starts, token_N, slot_TK);
  else if (blockIdx.x == subs)
    List(starts, subs, chosen.experts, kItem, lists.counts, lists.items, nullptr);
  else
    List(starts, subs, chosen.experts, most, lists.counts + 1, lists.jobs, lists.ranges);
}

}  // namespace
