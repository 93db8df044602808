// XLA's call of decode.cuh.

#include <algorithm>

#include "calls.cuh"
#include "decode.cuh"

namespace {

using F32s = ffi::ResultBuffer<ffi::F32>;
using S32s = ffi::ResultBuffer<ffi::S32>;

constexpr int kMostBlocks = 512;  // of Units: about four on each of Hopper's multiprocessors

// Launches of a stream: each kernel but the first starts while the last one ends.
struct Launches {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;
  bool early = false;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, Arguments... arguments) {
    if (error != cudaSuccess) return;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    const cudaLaunchConfig_t config = {grid, dim3(kThreads), 0, stream, &attribute, early ? 1u : 0u};
    error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    early = true;
  }
};

Numbers Of(ffi::AnyBuffer buffer) { return {buffer.untyped_data(), buffer.element_type() == ffi::BF16}; }

const bf16* Data(Bf16 buffer) { return static_cast<const bf16*>(buffer.untyped_data()); }

ffi::Error Decode(cudaStream_t stream, Bf16 x, Bf16 w_router, ffi::AnyBuffer b_router, Bf16 w_in, ffi::AnyBuffer b_in,
                  Bf16 w_out, int64_t trees, int64_t depth, int64_t norm, int64_t activation, F32s y, S32s ids,
                  F32s gates, F32s r, F32s z, S32s lists) {
  const int T = x.dimensions()[0], E = x.dimensions()[1], R = w_router.dimensions()[0], K = ids->dimensions()[1];
  const int X = w_in.dimensions()[0], W = w_in.dimensions()[1], N = T * K;
  const int parts = r->dimensions()[0], stride = r->dimensions()[2], unit_parts = z->dimensions()[0];
  if (T < 1 || T > kTokens || K > kMostTop || X > kMostExperts || E % kColumns || stride % kRows || stride < R ||
      R + trees != X || parts > kMostParts || unit_parts > kMostParts)
    return Bad("a layer's sizes do not fit.");
  const Tree tree = {T, R, stride, static_cast<int>(trees), static_cast<int>(depth), K};
  const Layer layer = {tree, E, W, X, parts, unit_parts, static_cast<int>(activation), static_cast<Norm>(norm),
                       Of(b_router), Of(b_in)};
  const int tiles = layer.Tiles(), groups = y->dimensions()[0];
  if (z->dimensions()[1] != N || z->dimensions()[2] != tiles * kRows || lists->element_count() != 4 + 4 * N ||
      y->dimensions()[1] != T || y->dimensions()[2] != E)
    return Bad("results' sizes do not fit.");
  int* number = lists->typed_data();
  Picked* all_picked = reinterpret_cast<Picked*>(number + 4);
  bf16* c = reinterpret_cast<bf16*>(z->untyped_data());
  const Coefficients of = {ids->typed_data(), number, all_picked, gates->typed_data(), z->typed_data(), c};
  const dim3 routers((R + kRows - 1) / kRows, parts), pieces(E / kColumns, groups);
  Launches launch = {stream};
  auto several = [&](auto n) {
    constexpr int kGroups = n;
    launch(Logits<kGroups>, routers, layer, Data(x), Data(w_router), r->typed_data());
    launch(Choose, T, layer, r->typed_data(), ids->typed_data(), gates->typed_data());
    launch(Units<kGroups>, std::min(N * tiles, kMostBlocks), layer, Data(x), Data(w_in), ids->typed_data(),
           gates->typed_data(), number, all_picked, c);
    launch(Outputs<false>, pieces, layer, Data(w_out), of, y->typed_data());
  };
  if (T > 8) {
    several(std::integral_constant<int, 2>());
  } else if (T > 1) {
    several(std::integral_constant<int, 1>());
  } else {
    launch(Logits<1>, routers, layer, Data(x), Data(w_router), r->typed_data());
    launch(UnitsOfOne, dim3(K, tiles, unit_parts), layer, Data(x), Data(w_in), Data(w_out), r->typed_data(),
           ids->typed_data(), gates->typed_data(), z->typed_data());
    launch(Outputs<true>, pieces, layer, Data(w_out), of, y->typed_data());
  }
  return Launched(launch.error);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnDecode, Decode,
                              Binding()
                                  .Arg<Bf16>()
                                  .Arg<Bf16>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Bf16>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Bf16>()
                                  .Attr<int64_t>("trees")
                                  .Attr<int64_t>("depth")
                                  .Attr<int64_t>("norm")
                                  .Attr<int64_t>("activation")
                                  .Ret<F32>()
                                  .Ret<S32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<S32>(),
                              {ffi::Traits::kCmdBufferCompatible});
