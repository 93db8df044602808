// The instructions of tree_ffn/tree/kernels/instructions.cuh on a CPU: a thread of a block is a fiber of one thread.
//
// Blocks run one after the other, and the warps of a block in an order that changes. A barrier waits for all; what
// is loaded to shared memory is there when a thread waits for it, and not before; shared memory is NaN at first. An
// address out of range ends the process, and so do threads that would take turns at a bank of shared memory.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct __nv_bfloat16 { uint16_t bits; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

namespace {

using bf16 = __nv_bfloat16;
using std::isnan;
using std::max;
using std::min;

int2 make_int2(int x, int y) { return {x, y}; }
int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
float2 make_float2(float x, float y) { return {x, y}; }
uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
int __popc(uint32_t bits) { return __builtin_popcount(bits); }
template <typename T>
T __ldg(const T* at) { return *at; }
template <typename T>
T __ldcs(const T* at) { return *at; }
// Four of the eight bytes of two words, as four digits name them.
uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t both = low | static_cast<uint64_t>(high) << 32;
  uint32_t to = 0;
  for (int i = 0; i < 4; ++i) to |= (both >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
  return to;
}
template <typename T>
T atomicOr(T* at, T bits) { return std::exchange(*at, *at | bits); }

float FromBf16(uint32_t bits) {
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t ToBf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return value == value ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FFF;
}

// ---- Threads ----

constexpr int kMostShared = 232448;
alignas(128) unsigned char shared[kMostShared];

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool there;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::vector<std::vector<Copy>> groups{1};
  bool done = false;
};

struct Barrier {
  int arrived = 0, passed = 0;
};

dim3 blockIdx, blockDim, gridDim;
struct { int x; } threadIdx;
std::vector<Fiber> fibers;
std::vector<Barrier> barriers;  // of the block, of each warp
ucontext_t scheduler;
std::function<void()> body;
std::mt19937 random_order(1);

void Pause() {
  const int thread = threadIdx.x;
  swapcontext(&fibers[thread].context, &scheduler);
  threadIdx.x = thread;
}

void WaitAt(Barrier& barrier, int count) {
  const int round = barrier.passed;
  if (++barrier.arrived == count) barrier.arrived = 0, ++barrier.passed;
  while (barrier.passed == round) Pause();
}

void Run() {
  body();
  fibers[threadIdx.x].done = true;
  Pause();
}

// f() by every thread of every block.
template <typename F>
void Launch(dim3 grid, int threads, F f) {
  body = f, blockDim = {static_cast<unsigned>(threads)}, gridDim = grid;
  std::vector<int> warps(threads / 32);
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = i;
  for (unsigned block = 0; block < grid.x * grid.y * grid.z; ++block) {
    blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    std::memset(shared, 0xFF, sizeof(shared));
    barriers.assign(1 + threads / 32, {});
    fibers = std::vector<Fiber>(threads);
    for (int i = 0; i < threads; ++i) {
      fibers[i].stack.reset(new char[1 << 16]);
      getcontext(&fibers[i].context);
      fibers[i].context.uc_stack.ss_sp = fibers[i].stack.get(), fibers[i].context.uc_stack.ss_size = 1 << 16;
      fibers[i].context.uc_link = &scheduler;
      makecontext(&fibers[i].context, Run, 0);
    }
    for (bool more = true; more;) {
      more = false;
      std::shuffle(warps.begin(), warps.end(), random_order);
      for (int warp : warps)
        for (int i = 32 * warp; i < 32 * warp + 32; ++i)
          if (!fibers[i].done) {
            threadIdx.x = i, more = true;
            swapcontext(&scheduler, &fibers[i].context);
          }
    }
  }
}

void __syncthreads() { WaitAt(barriers[0], blockDim.x); }
void __syncwarp() { WaitAt(barriers[1 + threadIdx.x / 32], 32); }

// What each thread of the warp gives, for all of them.
template <typename T>
std::array<T, 32> OfWarp(T mine) {
  static std::vector<std::array<T, 32>> given(32);
  auto& ours = given[threadIdx.x / 32];
  ours[threadIdx.x % 32] = mine;
  __syncwarp();
  const auto all = ours;
  __syncwarp();
  return all;
}

template <typename T>
T __shfl_sync(uint32_t, T value, int lane) { return OfWarp(value)[lane]; }

template <typename T>
T __shfl_xor_sync(uint32_t, T value, int mask) { return OfWarp(value)[threadIdx.x % 32 ^ mask]; }

uint32_t __ballot_sync(uint32_t, bool mine) {
  const auto all = OfWarp(mine);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= uint32_t{all[i]} << i;
  return bits;
}

int __shfl_up_sync(uint32_t, int value, int far) {
  const int lane = threadIdx.x % 32;
  return OfWarp(value)[lane < far ? lane : lane - far];
}

// ---- Shared memory ----

unsigned char* Shared() { return shared; }

void Check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

uint32_t Address(const void* at) { return static_cast<uint32_t>(static_cast<const unsigned char*>(at) - shared); }

unsigned char* At(uint32_t address, int bytes) {
  Check(address % bytes == 0 && address + bytes <= kMostShared, "shared memory: no such address");
  return shared + address;
}

uint4 Fixed16(const void* from) {
  Check(reinterpret_cast<uintptr_t>(from) % 16 == 0, "global memory: not aligned");
  return *static_cast<const uint4*>(from);
}

// A line that is not there ends the process.
void Prefetch(const void* from) { static_cast<void>(*static_cast<const volatile unsigned char*>(from)); }

// Kernels run one after the other.
void LetNextStart() {}
void WaitForLast() {}

void Load(void* to, const void* from, int bytes, bool there) {
  At(Address(to), bytes);
  Check(!there || reinterpret_cast<uintptr_t>(from) % bytes == 0, "global memory: not aligned");
  fibers[threadIdx.x].groups.back().push_back({to, from, bytes, there});
}

void Load16(void* to, const void* from, bool there) { Load(to, from, 16, there); }
void Commit() { fibers[threadIdx.x].groups.emplace_back(); }

template <int kPending>
void Wait() {
  auto& groups = fibers[threadIdx.x].groups;
  while (groups.size() > kPending + 1) {
    for (const Copy& copy : groups.front())
      copy.there ? std::memcpy(copy.to, copy.from, copy.bytes) : std::memset(copy.to, 0, copy.bytes);
    groups.erase(groups.begin());
  }
}

// Eight threads read 16 bytes each at once where these are all 128 bytes of banks.
void CheckBanks(const uint32_t* addresses) {
  bool taken[8] = {};
  for (int i = 0; i < 8; ++i)
    Check(!std::exchange(taken[addresses[i] / 16 % 8], true), "banks are not free");
}

// ---- Matrices ----

uint16_t Entry(uint32_t row, int column) {
  uint16_t number;
  std::memcpy(&number, At(row, 16) + 2 * column, 2);
  return number;
}

void Matrices(uint32_t (&to)[4], uint32_t row, bool transposed) {
  const auto rows = OfWarp(row);
  for (int i = 0; i < 32; i += 8) CheckBanks(&rows[i]);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = transposed ? Entry(rows[8 * i + 2 * t], g) : Entry(rows[8 * i + g], 2 * t);
    const uint32_t high = transposed ? Entry(rows[8 * i + 2 * t + 1], g) : Entry(rows[8 * i + g], 2 * t + 1);
    to[i] = low | high << 16;
  }
}

void Matrices4(uint32_t (&to)[4], uint32_t row) { Matrices(to, row, false); }
void Transposed4(uint32_t (&to)[4], uint32_t row) { Matrices(to, row, true); }

float Number(uint32_t two, int which) { return FromBf16(two >> 16 * which & 0xFFFF); }

void Multiply8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const auto all = OfWarp(std::array<uint32_t, 3>{a0, a1, b});
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 8; ++k)
      c[i] += Number(all[4 * g + k / 2][i / 2], k % 2) * Number(all[4 * (2 * t + i % 2) + k / 2][2], k % 2);
}

void Multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Multiply8(c, a[0], a[1], b0);
  Multiply8(c, a[2], a[3], b1);
}

float Widened(bf16 value) { return FromBf16(value.bits); }

template <typename T>
T Rounded(float value);
template <>
float Rounded<float>(float value) { return value; }
template <>
bf16 Rounded<bf16>(float value) { return {static_cast<uint16_t>(ToBf16(value))}; }

uint32_t Packed(float low, float high) { return ToBf16(low) | ToBf16(high) << 16; }

}  // namespace
