// Runs of rows that each token names, read where they lie. tree_ffn/tree/kernels/__init__.py says what is computed.
//
// XLA gathers such rows into a new array and then multiplies; on a CPU that copy costs more than the products.
// Every sum has one order, whatever the number of threads and of tokens.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kLanes = 64;           // sums side by side: four registers of 16 numbers, or eight of 8
constexpr int64_t kPiece = 1 << 15;  // numbers that a piece of work reads: fewer are not worth another thread
constexpr int64_t kColumns = 256;    // of a token's sum that one thread adds up

// What most of the time goes to is compiled for three kinds of x86-64 processors; the loader takes the best.
#if defined(__x86_64__) && defined(__linux__)
#define WIDEST __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define WIDEST
#endif

// <a, b>.
WIDEST float Dot(const float* a, const float* b, int64_t n) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  for (; i < n; ++i) sums[0] += a[i] * b[i];
  return sums[0];
}

// sum += h row.
WIDEST void Add(float* sum, float h, const float* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += h * row[i];
}

void Prefetch(const float* row, int64_t n) {
  for (int64_t i = 0; i < std::min(n, kColumns); i += 16) __builtin_prefetch(row + i);
}

// Pieces of a range, taken by the calling thread and by those of the pool that come in time.
struct Shared {
  std::atomic<int64_t> next{0}, done{0};
};

// work(begin, end) over [0, n), `numbers` read for each. The caller takes pieces too and waits for none that no
// thread has taken: where the pool is busy, or this thread is all of it, nothing waits for ever.
template <typename Work>
void Split(ffi::ThreadPool& pool, int64_t n, int64_t numbers, Work work) {
  const int64_t piece = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, numbers));
  const int64_t pieces = (n + piece - 1) / piece;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), pieces) - 1;
  if (helpers <= 0) return work(int64_t{0}, n);
  auto shared = std::make_shared<Shared>();
  auto take = [shared, n, piece, pieces, work] {
    for (int64_t at; (at = shared->next.fetch_add(1)) < pieces; shared->done.fetch_add(1))
      work(at * piece, std::min(n, (at + 1) * piece));
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([take] { take(); });
  take();
  while (shared->done.load() < pieces) std::this_thread::yield();
}

}  // namespace

static ffi::Error Dots(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> rows,
                       ffi::Buffer<ffi::S32> start, ffi::ResultBuffer<ffi::F32> z) {
  const int64_t T = start.dimensions()[0], K = start.dimensions()[1], W = z->dimensions()[2], n = T * K;
  const int64_t E = rows.dimensions()[1];
  const float *x_TE = x.typed_data(), *rows_FE = rows.typed_data();
  const int32_t* start_TK = start.typed_data();
  float* z_TKW = z->typed_data();
  // Run by run: where each is another tree's, its rows stay in a near cache while all tokens meet them.
  auto row_of = [=](int64_t i) { return rows_FE + start_TK[(i % T) * K + i / T] * E; };
  Split(pool, n, W * E, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i % T, k = i / T;
      if (i + 1 < end) Prefetch(row_of(i + 1), E);
      for (int64_t w = 0; w < W; ++w) z_TKW[(t * K + k) * W + w] = Dot(x_TE + t * E, row_of(i) + w * E, E);
    }
  });
  return ffi::Error::Success();
}

static ffi::Error Sums(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> h, ffi::Buffer<ffi::F32> rows,
                       ffi::Buffer<ffi::S32> start, ffi::ResultBuffer<ffi::F32> s) {
  const int64_t T = start.dimensions()[0], K = start.dimensions()[1], W = h.dimensions()[2];
  const int64_t E = rows.dimensions()[1];
  const float *h_TKW = h.typed_data(), *rows_FE = rows.typed_data();
  const int32_t* start_TK = start.typed_data();
  float* s_TE = s->typed_data();
  // A piece is some columns of one token's sum: threads share one token's rows too.
  const int64_t columns = std::min(E, kColumns), parts = (E + columns - 1) / columns;
  Split(pool, T * parts, K * W * columns, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / parts, first = (i % parts) * columns, width = std::min(columns, E - first);
      float* sum = s_TE + t * E + first;
      std::fill(sum, sum + width, 0.0f);
      for (int64_t k = 0; k < K; ++k) {
        const float* row = rows_FE + start_TK[t * K + k] * E + first;
        if (k + 1 < K) Prefetch(rows_FE + start_TK[t * K + k + 1] * E + first, width);
        for (int64_t w = 0; w < W; ++w, row += E) Add(sum, h_TKW[(t * K + k) * W + w], row, width);
      }
    }
  });
  return ffi::Error::Success();
}

// Both take threads, numbers of the tokens, rows and where runs begin, and give numbers.
static auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Ret<ffi::Buffer<ffi::F32>>();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnDots, Dots, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(TreeFfnSums, Sums, Binding());
