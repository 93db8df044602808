// The instructions that kernels are made of: tests/tree/emulated/instructions.cuh has them for a CPU.

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

// 16 bytes of global memory that no kernel at work writes.
__device__ uint4 Fixed16(const void* global) { return __ldg(static_cast<const uint4*>(global)); }

// Makes a line of global memory come into the L2 cache.
__device__ void Prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// The next kernel of the stream may start, if it was launched to start early; it waits for our results itself.
__device__ void LetNextStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until the last kernel of the stream is done, where this one was launched to start early.
__device__ void WaitForLast() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
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

// One of the two numbers of a word.
__device__ float Number(uint32_t two, int which) { return __uint_as_float(which ? two & 0xFFFF0000 : two << 16); }

__device__ float Widened(bf16 value) { return __bfloat162float(value); }

// The nearest number of a type.
template <typename T>
__device__ T Rounded(float value) {
  return T(value);
}

}  // namespace
