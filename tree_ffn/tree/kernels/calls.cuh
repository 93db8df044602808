// XLA's calls of kernels: what they take, and what they say where sizes or a launch fail.

#pragma once

#include <cuda_runtime.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Bf16 = ffi::Buffer<ffi::BF16>;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

auto Binding() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>(); }

ffi::Error Bad(const char* what) { return ffi::Error::InvalidArgument(std::string("tree_ffn: ") + what); }

// What launches came to: the last error of this thread unless one is named.
ffi::Error Launched(cudaError_t error = cudaGetLastError()) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("tree_ffn: a kernel was not launched: ") + cudaGetErrorString(error));
}

}  // namespace
