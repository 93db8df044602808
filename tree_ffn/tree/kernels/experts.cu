// What chosen experts add up to and its gradients, in bfloat16 with float32 sums, for NVIDIA GPUs like Hopper.
// experts.py says what is computed; W is an expert's units, U the same filled up to 8, 16, 32, 64 or 128.
//
// Pairs of a token and an expert are sorted by expert, then by token. Rows of tokens are gathered while they are
// loaded and never copied. What a pair adds to its token is written, some columns of all pairs at a time, and read
// again by the token. Each sum has one order.

#include <algorithm>
#include <cstdint>

#include "calls.cuh"
#include "experts_grads.cuh"
#include "experts_plan.cuh"
#include "experts_sums.cuh"
#include "experts_units.cuh"

namespace {

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
  const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
  return cudaFuncSetAttribute(kernel, most, static_cast<int>(bytes)) == cudaSuccess;
}

const bf16* Data(const Bf16& buffer) { return reinterpret_cast<const bf16*>(buffer.untyped_data()); }

ffi::Error Plan(cudaStream_t stream, S32 ids, int64_t experts, int64_t siblings, int64_t sub, int64_t job,
                ffi::ResultBuffer<ffi::S32> token, ffi::ResultBuffer<ffi::S32> slot,
                ffi::ResultBuffer<ffi::S32> starts, ffi::ResultBuffer<ffi::S32> counts,
                ffi::ResultBuffer<ffi::S32> items, ffi::ResultBuffer<ffi::S32> jobs,
                ffi::ResultBuffer<ffi::S32> ranges) {
  const int64_t n = ids.element_count(), T = ids.dimensions()[0], K = ids.dimensions()[1];
  const int64_t subs = experts < 1 ? 0 : (starts->element_count() - 1) / experts;
  if (n < 1 || n > 1 << 26 || siblings < 1 || job < 1 || subs < 1 || sub < 1 || sub > kMostRows || sub * subs < T)
    return Bad("a plan's numbers do not fit.");
  for (auto one : {token, slot})
    if (static_cast<int64_t>(one->element_count()) != n) return Bad("a plan has each pair once.");
  if (static_cast<int64_t>(starts->element_count()) != experts * subs + 1 || experts * subs % 4 ||
      experts * subs > 1 << 30)
    return Bad("a plan's starts do not fit.");
  if (items->dimensions()[0] < n / kItem + experts || jobs->dimensions()[0] < n / job + experts ||
      ranges->dimensions()[0] < experts || counts->element_count() != 2)
    return Bad("a plan's lists are too short.");
  int* first = starts->typed_data();
  const Choices chosen{ids.typed_data(), static_cast<int>(T), static_cast<int>(K), static_cast<int>(siblings),
                       static_cast<int>(experts)};
  Count<<<subs, 1024, 0, stream>>>(chosen, sub, subs, first);
  Sum<<<1, 1024, 0, stream>>>(reinterpret_cast<int4*>(first), experts * subs / 4);
  const Lists lists{counts->typed_data(), reinterpret_cast<int4*>(items->typed_data()),
                    reinterpret_cast<int4*>(jobs->typed_data()), reinterpret_cast<int2*>(ranges->typed_data())};
  Spread<<<subs + 2, 1024, 0, stream>>>(chosen, sub, subs, job, first, token->typed_data(), slot->typed_data(), lists);
  return Launched();
}

ffi::Error UnitsCall(cudaStream_t stream, Bf16 rows, Bf16 w, F32 bias, S32 token, S32 counts, S32 items,
                     ffi::ResultBuffer<ffi::F32> z) {
  const int E = rows.dimensions()[1], W = w.dimensions()[1];
  if (E % kInner || w.dimensions()[2] != E || W > z->dimensions()[1] || bias.element_count() != w.dimensions()[0] * W)
    return Bad("rows and units do not fit.");
  if (z->dimensions()[0] != static_cast<int64_t>(token.element_count())) return Bad("there is one token a pair.");
  return With(z->dimensions()[1], [&](auto units) {
    constexpr int U = units;
    const size_t bytes = kUnitsStages * sizeof(UnitsStage<U>);
    if (!MayShare(Units<U>, bytes)) return Launched();
    Units<U><<<items.dimensions()[0], kThreads, bytes, stream>>>(
        Data(rows), Data(w), bias.typed_data(), token.typed_data(), counts.typed_data(),
        reinterpret_cast<const int4*>(items.typed_data()), E, W, z->typed_data());
    return Launched();
  });
}

// s holds what pairs add to as many columns as it has; then come the next.
ffi::Error SumsCall(cudaStream_t stream, Bf16 c, Bf16 w, S32 slot, S32 counts, S32 items,
                    ffi::ResultBuffer<ffi::BF16> y, ffi::ResultBuffer<ffi::BF16> s) {
  const int T = y->dimensions()[0], E = y->dimensions()[1], W = w.dimensions()[1], most = s->dimensions()[1];
  const int64_t n = slot.element_count();
  if (E % kBlock || most < kBlock || most % kBlock || w.dimensions()[2] != E || W > c.dimensions()[1] ||
      slot.dimensions()[0] != T || c.dimensions()[0] != n || s->dimensions()[0] != n)
    return Bad("coefficients and units do not fit.");
  auto* pairs = reinterpret_cast<bf16*>(s->untyped_data());
  auto* sums = reinterpret_cast<bf16*>(y->untyped_data());
  return With(c.dimensions()[1], [&](auto units) {
    for (int column = 0; column < E; column += most) {
      const int columns = std::min(most, E - column), across = kWarps * kBlock;
      Products<decltype(units)::value>
          <<<dim3(items.dimensions()[0], (columns + across - 1) / across), kThreads, 0, stream>>>(
              Data(c), Data(w), counts.typed_data(), reinterpret_cast<const int4*>(items.typed_data()), E, W, column,
              columns, pairs);
      const int64_t blocks = (static_cast<int64_t>(T) * columns / 8 + kSumThreads - 1) / kSumThreads;
      Sums<<<blocks, kSumThreads, 0, stream>>>(pairs, slot.typed_data(), T, n / T, E, column, columns, sums);
    }
    return Launched();
  });
}

template <typename Out>
ffi::Error GradsOf(cudaStream_t stream, Bf16 c, Bf16 rows, S32 token, S32 counts, S32 jobs, S32 ranges,
                   Gradients<Out> whole, Gradients<float> parts, int64_t W) {
  const int X = ranges.dimensions()[0], E = rows.dimensions()[1];
  return With(c.dimensions()[1], [&](auto units) {
    constexpr int U = units, kWidth = GradsStage<U>::kWidth;
    const size_t bytes = std::max(kGradsStages * sizeof(GradsStage<U>), U * (kWidth + 4) * sizeof(float));
    if (!MayShare(Grads<U, Out>, bytes)) return Launched();
    Grads<U, Out><<<dim3(jobs.dimensions()[0], (E + kWidth - 1) / kWidth), kThreads, bytes, stream>>>(
        Data(c), Data(rows), token.typed_data(), counts.typed_data(),
        reinterpret_cast<const int4*>(jobs.typed_data()), E, W, parts, whole);
    const int64_t across = 8 * kAddThreads;
    Add<Out><<<dim3(X, (W * E + across - 1) / across), kAddThreads, 0, stream>>>(
        reinterpret_cast<const int2*>(ranges.typed_data()), E, W, parts, whole);
    return Launched();
  });
}

ffi::Error GradsCall(cudaStream_t stream, Bf16 c, Bf16 rows, S32 token, S32 counts, S32 jobs, S32 ranges,
                     ffi::Result<ffi::AnyBuffer> dw, ffi::ResultBuffer<ffi::F32> db,
                     ffi::ResultBuffer<ffi::F32> part_dw, ffi::ResultBuffer<ffi::F32> part_db) {
  if (dw->dimensions().size() != 3 || dw->dimensions()[1] > c.dimensions()[1] || dw->dimensions()[2] % 8 ||
      dw->dimensions()[2] != rows.dimensions()[1] || token.element_count() != static_cast<size_t>(c.dimensions()[0]) ||
      ranges.dimensions()[0] != dw->dimensions()[0])
    return Bad("coefficients and rows do not fit.");
  const int64_t W = dw->dimensions()[1];
  const Gradients<float> parts{part_dw->typed_data(), part_db->typed_data()};
  const auto of = [&](auto* first) {
    using Out = std::remove_pointer_t<decltype(first)>;
    const Gradients<Out> whole{reinterpret_cast<Out*>(dw->untyped_data()), db->typed_data()};
    return GradsOf<Out>(stream, c, rows, token, counts, jobs, ranges, whole, parts, W);
  };
  if (dw->element_type() == ffi::BF16) return of(static_cast<bf16*>(nullptr));
  if (dw->element_type() == ffi::F32) return of(static_cast<float*>(nullptr));
  return Bad("gradients are bfloat16 or float32.");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnPlan, Plan,
                              Binding()
                                  .Arg<S32>()
                                  .Attr<int64_t>("experts")
                                  .Attr<int64_t>("siblings")
                                  .Attr<int64_t>("sub")
                                  .Attr<int64_t>("job")
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnSums, SumsCall,
                              Binding()
                                  .Arg<Bf16>()
                                  .Arg<Bf16>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Ret<Bf16>()
                                  .Ret<Bf16>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnGrads, GradsCall,
                              Binding()
                                  .Arg<Bf16>()
                                  .Arg<Bf16>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>(),
                              {ffi::Traits::kCmdBufferCompatible});
