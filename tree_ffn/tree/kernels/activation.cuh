// The activations of activations.py and their derivatives, in the order of cuda.ACTIVATIONS.

#pragma once

#include "instructions.cuh"

namespace {

constexpr float kTanhOfGelu = 0.79788456f;  // sqrt(2 / pi)

__device__ float Activated(float z, int activation) {
  switch (activation) {
    case 0: return 0.5f * z * erfcf(-z * 0.70710678f);
    case 1: return 0.5f * z * (1.0f + tanhf(kTanhOfGelu * (z + 0.044715f * z * z * z)));
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

// Its derivative; where there is none, the one that JAX takes.
__device__ float Slope(float z, int activation) {
  const float s = 1.0f / (1.0f + expf(-z));
  switch (activation) {
    case 0: return 0.5f * erfcf(-z * 0.70710678f) + 0.39894228f * z * expf(-0.5f * z * z);
    case 1: {
      const float t = tanhf(kTanhOfGelu * (z + 0.044715f * z * z * z));
      return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * kTanhOfGelu * (1.0f + 0.134145f * z * z);
    }
    case 2: return z > 0.0f ? 1.0f : 0.0f;
    case 3: return 2.0f * fmaxf(z, 0.0f);
    case 4: return z >= 0.0f ? 1.0f : 0.01f;
    case 5: return s * (1.0f + z * (1.0f - s));
    case 6: {
      const float t = tanhf(z);
      return 1.0f - t * t;
    }
    case 7: return 1.0f;
    case 8: return z > 0.0f ? 1.0f : z < 0.0f ? -1.0f : 0.0f;
    default: return s;
  }
}

}  // namespace
