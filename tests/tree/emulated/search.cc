// The kernels of search.cu, called for host memory.

#include "search.cuh"

namespace {

template <int kC>
void SearchWith(Tree tree, int warps, const float* r, const float* b, const float* bias, int* ids, float* log_p) {
  const unsigned blocks = (tree.tokens + warps - 1) / warps;
  Check(warps * SearchBytes(tree) <= kMostShared, "too much shared");
  if (bias) return Launch({blocks}, 32 * warps, [=] { Search<kC, true>(tree, r, b, bias, ids, log_p); });
  Launch({blocks}, 32 * warps, [=] { Search<kC, false>(tree, r, b, bias, ids, log_p); });
}

}  // namespace

extern "C" {

void SearchOf(int T, int R, int S, int P, int D, int K, int warps, const float* r, const float* b, const float* bias,
              int* ids, float* log_p) {
  const Tree tree = {T, R, S, P, D, K};
  const auto run = K <= 16 ? SearchWith<1> : K <= 32 ? SearchWith<2> : SearchWith<4>;
  run(tree, warps, r, b, bias, ids, log_p);
}

void GradientOf(int T, int R, int S, int P, int D, int K, int warps, int blocks, const float* r, const float* b,
                const int* ids, const float* d, float* dr, bf16* rounded, float* db) {
  const Tree tree = {T, R, S, P, D, K};
  Check(warps * GradientBytes<float>(tree) <= kMostShared, "too much shared");
  const dim3 grid = {static_cast<unsigned>(blocks)};
  Launch(grid, 32 * warps, [=] { Gradient<float>(tree, r, b, ids, d, dr, db); });
  Launch(grid, 32 * warps, [=] { Gradient<bf16>(tree, r, b, ids, d, rounded, db); });
}

}
