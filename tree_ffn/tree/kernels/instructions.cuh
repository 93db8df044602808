// The instructions that kernels are made of: tests/tree/emulated.h has the same for a CPU.

#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

using bf16 = __nv_bfloat16;

// What a launch gave a block of it.
__device__ unsigned char* Shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ uint32_t Address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// 16 bytes from global to shared memory; zeros unless `there`.
__device__ void Load16(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(Address(shared)), "l"(global),
               "r"(there ? 16 : 0));
}

// The same of 4 bytes.
__device__ void Load4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(Address(shared)), "l"(global));
}

// Closes a group of loads.
__device__ void Commit() { asm volatile("cp.async.commit_group;"); }

// Until all but the last kPending groups of this thread are there.
template <int kPending>
__device__ void Wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}

// Four 8 x 8 matrices; thread i names row i % 8 of matrix i / 8, and gets two numbers of row i / 4 of each.
__device__ void Matrices4(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row));
}

// The same; a thread gets two numbers of column i / 4.
__device__ void Transposed4(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row));
}

// c += a b for 16 rows, 8 columns and 16 products a sum.
__device__ void Multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for 8 products a sum.
__device__ void Multiply8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}

__device__ uint32_t Packed(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}

__device__ uint32_t Word(uint32_t shared) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(shared));
  return word;
}

// Adds v to two chunks of 4 floats in shared memory, where they are `there`.
__device__ void AddIf(bool there, uint32_t first, uint32_t second, const float (&v)[8]) {
  asm volatile(
      "{ .reg .pred p; .reg .f32 a<4>, b<4>; setp.ne.b32 p, %2, 0;"
      "mov.f32 a0, 0f00000000; mov.f32 a1, a0; mov.f32 a2, a0; mov.f32 a3, a0;"
      "mov.f32 b0, a0; mov.f32 b1, a0; mov.f32 b2, a0; mov.f32 b3, a0;"
      "@p ld.shared.v4.f32 {a0, a1, a2, a3}, [%0]; @p ld.shared.v4.f32 {b0, b1, b2, b3}, [%1];"
      "add.f32 a0, a0, %3; add.f32 a1, a1, %4; add.f32 a2, a2, %5; add.f32 a3, a3, %6;"
      "add.f32 b0, b0, %7; add.f32 b1, b1, %8; add.f32 b2, b2, %9; add.f32 b3, b3, %10;"
      "@p st.shared.v4.f32 [%0], {a0, a1, a2, a3}; @p st.shared.v4.f32 [%1], {b0, b1, b2, b3}; }" ::"r"(first),
      "r"(second), "r"(static_cast<int>(there)), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "f"(v[4]), "f"(v[5]),
      "f"(v[6]), "f"(v[7]));
}

// The nearest number of a type.
template <typename T>
__device__ T Rounded(float value) {
  return T(value);
}

// A barrier of some warps of a block, kCount threads.
template <int kCount>
__device__ void SyncLoaders() {
  asm volatile("bar.sync 1, %0;" ::"n"(kCount) : "memory");
}

}  // namespace
