// The kernels of decode.cu, called for host memory.

#include "decode.cuh"

namespace {

// The grid's numbers are not negative.
dim3 Grid(int x, int y = 1, int z = 1) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

}  // namespace

extern "C" {

void DecodeOf(int T, int E, int X, int W, int P, int D, int K, int stride, int parts, int unit_parts, int groups,
              int blocks, int norm, int activation, const bf16* x, const bf16* w_router, const void* b_router,
              const bf16* w_in, const void* b_in, const bf16* w_out, int halves, float* y, int* ids, float* gates,
              float* r, float* z, int* lists) {
  const Tree tree = {T, X - P, stride, P, D, K};
  const Layer layer = {tree, E, W, X, parts, unit_parts, activation, static_cast<Norm>(norm),
                       {b_router, halves != 0}, {b_in, halves != 0}};
  Picked* all_picked = reinterpret_cast<Picked*>(lists + 4);
  bf16* c = reinterpret_cast<bf16*>(z);
  const Coefficients of = {ids, lists, all_picked, gates, z, c};
  const dim3 routers = Grid((X - P + kRows - 1) / kRows, parts), pieces = Grid(E / kColumns, groups);
  if (T == 1) {
    Launch(routers, kThreads, [=] { Logits<1>(layer, x, w_router, r); });
    const dim3 units = Grid(K, layer.Tiles(), unit_parts);
    Launch(units, kThreads, [=] { UnitsOfOne(layer, x, w_in, w_out, r, ids, gates, z); });
    return Launch(pieces, kThreads, [=] { Outputs<true>(layer, w_out, of, y); });
  }
  const auto logits = T > 8 ? Logits<2> : Logits<1>;
  const auto units = T > 8 ? Units<2> : Units<1>;
  Launch(routers, kThreads, [=] { logits(layer, x, w_router, r); });
  Launch(Grid(T), kThreads, [=] { Choose(layer, r, ids, gates); });
  Launch(Grid(blocks), kThreads, [=] { units(layer, x, w_in, ids, gates, lists, all_picked, c); });
  Launch(pieces, kThreads, [=] { Outputs<false>(layer, w_out, of, y); });
}

}
