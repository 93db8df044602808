// The kernels of experts.cu, called for host memory.

#include "experts_grads.cuh"
#include "experts_plan.cuh"
#include "experts_sums.cuh"
#include "experts_units.cuh"

namespace {

template <typename F>
void With(int units, F f) {
  if (units == 8) f(std::integral_constant<int, 8>());
  if (units == 16) f(std::integral_constant<int, 16>());
  if (units == 32) f(std::integral_constant<int, 32>());
  if (units == 64) f(std::integral_constant<int, 64>());
  if (units == 128) f(std::integral_constant<int, 128>());
}

}  // namespace

extern "C" {

void PlanOf(const int* ids, int T, int K, int siblings, int experts, int sub, int subs, int job, int* token, int* slot,
            int* starts, int* counts, int* items, int* jobs, int* ranges) {
  const Choices chosen{ids, T, K, siblings, experts};
  const Lists lists{counts, reinterpret_cast<int4*>(items), reinterpret_cast<int4*>(jobs),
                    reinterpret_cast<int2*>(ranges)};
  Launch({static_cast<unsigned>(subs)}, 64, [=] { Count(chosen, sub, subs, starts); });
  Launch({1}, 64, [=] { Sum(reinterpret_cast<int4*>(starts), experts * subs / 4); });
  Launch({static_cast<unsigned>(subs + 2)}, 64,
         [=] { Spread(chosen, sub, subs, job, starts, token, slot, lists); });
}

void UnitsOf(int U, const bf16* rows, const bf16* w, const float* bias, const int* token, const int* count,
             const int* items, int n_items, int E, int W, float* z) {
  With(U, [&](auto units) {
    Launch({static_cast<unsigned>(n_items)}, kThreads, [=] {
      Units<decltype(units)::value>(rows, w, bias, token, count, reinterpret_cast<const int4*>(items), E, W, z);
    });
  });
}

void SumsOf(int U, const bf16* c, const bf16* w, const int* slot, const int* count, const int* items, int n_items,
            int T, int K, int E, int W, int most, bf16* s, bf16* y) {
  With(U, [&](auto units) {
    for (int column = 0; column < E; column += most) {
      const int columns = min(most, E - column), across = kWarps * kBlock;
      Launch({static_cast<unsigned>(n_items), static_cast<unsigned>((columns + across - 1) / across)}, kThreads, [=] {
        Products<decltype(units)::value>(c, w, count, reinterpret_cast<const int4*>(items), E, W, column, columns, s);
      });
      Launch({static_cast<unsigned>((T * columns / 8 + kSumThreads - 1) / kSumThreads)}, kSumThreads,
             [=] { Sums(s, slot, T, K, E, column, columns, y); });
    }
  });
}

void GradsOf(int U, const bf16* c, const bf16* rows, const int* token, const int* counts, const int* jobs, int n_jobs,
             const int* ranges, int X, int E, int W, float* part_dw, float* part_db, float* dw, float* db) {
  With(U, [&](auto units) {
    constexpr int kWidth = GradsStage<decltype(units)::value>::kWidth;
    const Gradients<float> parts{part_dw, part_db}, whole{dw, db};
    Launch({static_cast<unsigned>(n_jobs), static_cast<unsigned>((E + kWidth - 1) / kWidth)}, kThreads, [=] {
      Grads<decltype(units)::value, float>(c, rows, token, counts, reinterpret_cast<const int4*>(jobs), E, W, parts,
                                           whole);
    });
    Launch({static_cast<unsigned>(X), static_cast<unsigned>((W * E + 8 * kAddThreads - 1) / (8 * kAddThreads))},
           kAddThreads, [=] { Add<float>(reinterpret_cast<const int2*>(ranges), E, W, parts, whole); });
  });
}

}
