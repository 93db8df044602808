// Numbers of two rows side by side, as operands of products have them.

#pragma once

#include "instructions.cuh"

namespace {

// The j-th of 8 numbers of two rows.
__device__ uint32_t Both(const uint4& low, const uint4& high, int j) {
  const uint32_t a = j < 2 ? low.x : j < 4 ? low.y : j < 6 ? low.z : low.w;
  const uint32_t b = j < 2 ? high.x : j < 4 ? high.y : j < 6 ? high.z : high.w;
  return __byte_perm(a, b, j % 2 ? 0x7632 : 0x5410);
}

}  // namespace
