// XLA's calls of search.cuh.

#include <algorithm>
#include <type_traits>

#include "calls.cuh"
#include "search.cuh"

namespace {

constexpr int kShared = 96 << 10;  // bytes of shared memory that a block may have on any GPU since Ampere

// Warps of a block that has `bytes` of shared memory for each.
int Warps(int bytes, int most) { return std::max(1, std::min(most, kShared / bytes)); }

template <typename Kernel, typename... Args>
ffi::Error Launch(Kernel kernel, int blocks, int warps, int bytes, cudaStream_t stream, Args... args) {
  cudaError_t error = cudaSuccess;
  if (bytes > (48 << 10)) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && blocks > 0) {
    kernel<<<blocks, 32 * warps, bytes, stream>>>(args...);
    error = cudaGetLastError();
  }
  return Launched(error);
}

Tree Shape(F32 r_TS, int64_t rows, int64_t trees, int64_t depth, int64_t top_k) {
  auto size = r_TS.dimensions();
  auto whole = [](int64_t n) { return static_cast<int>(n); };
  return {whole(size[0]), whole(rows), whole(size[1]), whole(trees), whole(depth), whole(top_k)};
}

ffi::Error RunSearch(cudaStream_t stream, F32 r_TS, F32 b_R, F32 bias_R, int64_t trees, int64_t depth, int64_t top_k,
                     ffi::ResultBuffer<ffi::S32> ids_TK, ffi::ResultBuffer<ffi::F32> log_p_TK) {
  const Tree tree = Shape(r_TS, b_R.element_count(), trees, depth, top_k);
  const int own = SearchBytes(tree), warps = Warps(own, tree.tokens < 4096 ? 4 : 8);
  auto run = [&](auto kernel) {
    return Launch(kernel, (tree.tokens + warps - 1) / warps, warps, warps * own, stream, tree, r_TS.typed_data(),
                  b_R.typed_data(), bias_R.typed_data(), ids_TK->typed_data(), log_p_TK->typed_data());
  };
  const bool balanced = bias_R.element_count() > 0;
  if (top_k <= 16) return balanced ? run(Search<1, true>) : run(Search<1, false>);
  if (top_k <= 32) return balanced ? run(Search<2, true>) : run(Search<2, false>);
  return balanced ? run(Search<4, true>) : run(Search<4, false>);
}

ffi::Error RunGradient(cudaStream_t stream, F32 r_TS, F32 b_R, S32 ids_TK, F32 d_TK, int64_t trees, int64_t depth,
                       ffi::Result<ffi::AnyBuffer> d_TS, ffi::ResultBuffer<ffi::F32> d_BR) {
  const Tree tree = Shape(r_TS, b_R.element_count(), trees, depth, ids_TK.dimensions()[1]);
  auto run = [&](auto* to) {
    using Out = std::remove_pointer_t<decltype(to)>;
    const int own = GradientBytes<Out>(tree), warps = Warps(own, 8), blocks = d_BR->dimensions()[0];
    return Launch(Gradient<Out>, blocks, warps, warps * own, stream, tree, r_TS.typed_data(), b_R.typed_data(),
                  ids_TK.typed_data(), d_TK.typed_data(), to, d_BR->typed_data());
  };
  if (d_TS->element_type() == ffi::BF16) return run(static_cast<__nv_bfloat16*>(d_TS->untyped_data()));
  return run(static_cast<float*>(d_TS->untyped_data()));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnSearch, RunSearch,
                              Binding()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Attr<int64_t>("trees")
                                  .Attr<int64_t>("depth")
                                  .Attr<int64_t>("top_k")
                                  .Ret<S32>()
                                  .Ret<F32>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnSearchGradient, RunGradient,
                              Binding()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Arg<F32>()
                                  .Attr<int64_t>("trees")
                                  .Attr<int64_t>("depth")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32>(),
                              {ffi::Traits::kCmdBufferCompatible});
