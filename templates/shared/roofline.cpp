// Prints the fp32 peak (GFLOP/s) and the read bandwidth (GB/s) that `threads` threads of this machine reach together.
// Usage: roofline THREADS BUFFER_BYTES.  Built by tilewright.tuner.roofline for the machine it runs on.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#define IN_REGISTER(v) asm volatile("" : "+v"(v))
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#define IN_REGISTER(v) asm volatile("" : "+x"(v))
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
#define IN_REGISTER(v) asm volatile("" : "+w"(v))
#elif defined(__x86_64__)
constexpr int kVectorBytes = 16;
#define IN_REGISTER(v) asm volatile("" : "+x"(v))
#else
#error "the roofline program knows x86-64 and AArch64 only"
#endif

typedef float Vector __attribute__((vector_size(kVectorBytes)));
constexpr std::size_t kLanes = kVectorBytes / sizeof(float);
constexpr std::size_t kLineBytes = 64;
constexpr std::size_t kLineFloats = kLineBytes / sizeof(float);

// The threads start together; seconds run from the common start until the last one is done.
template <class Work>
double seconds_together(int threads, Work work) {
  std::atomic<int> waiting{threads};
  std::vector<double> started(threads), finished(threads);
  auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  auto body = [&](int thread) {
    waiting.fetch_sub(1);
    while (waiting.load() > 0) {
    }
    started[thread] = now();
    work(thread);
    finished[thread] = now();
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
  body(0);
  for (auto& other : others) other.join();
  return *std::max_element(finished.begin(), finished.end()) - *std::min_element(started.begin(), started.end());
}

// 12 independent sums hide the latency of the multiply-add and leave registers for its other two operands. The barrier keeps
// every sum in a register and hides its value from the compiler, so that no iteration can be folded into another. The sums
// are spelled out by a fold expression because g++ unrolls a loop over an array too late to keep the array in registers.
constexpr std::size_t kSums = 12;

inline void one_step(Vector& sum, const Vector& a, const Vector& b) {
  sum = sum * a + b;
  IN_REGISTER(sum);
}

template <std::size_t... Index>
__attribute__((noinline)) void multiply_add(std::int64_t iterations, float factor, float term, std::index_sequence<Index...>) {
  const Vector a = factor - Vector{}, b = term - Vector{};
  Vector sum[kSums] = {b * static_cast<float>(Index)...};
  for (std::int64_t n = 0; n < iterations; ++n) (one_step(sum[Index], a, b), ...);
}

double peak_gflops(int threads, float factor, float term) {
  constexpr std::int64_t kIterations = 400'000;
  constexpr int kRepeats = 60;
  const double flops = 2.0 * kLanes * kSums * kIterations * threads;
  double best = 0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const double seconds = seconds_together(threads, [&](int) { multiply_add(kIterations, factor, term, std::make_index_sequence<kSums>{}); });
    best = std::max(best, flops / seconds * 1e-9);
  }
  return best;
}

// Reads `floats` values as kStreams sequential streams, one cache line of each in turn.
template <int kStreams, int kPrefetchLines>
__attribute__((noinline)) void read_streams(const float* data, std::size_t floats) {
  const std::size_t stream_floats = floats / kStreams / kLineFloats * kLineFloats;
  Vector sum[8] = {};
  for (std::size_t i = 0; i < stream_floats; i += kLineFloats) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      const float* line = data + s * stream_floats + i;
      if (kPrefetchLines > 0) __builtin_prefetch(line + kPrefetchLines * kLineFloats, 0, 3);
#pragma GCC unroll 4
      for (std::size_t part = 0; part < kLineFloats; part += kLanes) {
        sum[(s * (kLineFloats / kLanes) + part / kLanes) % 8] += *reinterpret_cast<const Vector*>(line + part);
      }
    }
  }
  for (Vector& each : sum) IN_REGISTER(each);
}

template <int kStreams, int kPrefetchLines>
double read_gbps(int threads, const float* data, std::size_t floats) {
  constexpr int kRepeats = 5;
  const std::size_t share = floats / threads / kLineFloats * kLineFloats;
  double best = 0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const double seconds = seconds_together(
        threads, [&](int thread) { read_streams<kStreams, kPrefetchLines>(data + thread * share, share); });
    best = std::max(best, static_cast<double>(share) * threads * sizeof(float) / seconds * 1e-9);
  }
  return best;
}

double bandwidth_gbps(int threads, std::size_t bytes) {
  constexpr std::size_t kHugePage = std::size_t{2} << 20;
  bytes = bytes / kHugePage * kHugePage;
  void* memory = std::aligned_alloc(kHugePage, bytes);
  if (memory == nullptr) {
    std::fprintf(stderr, "no memory for a buffer of %zu bytes\n", bytes);
    std::exit(1);
  }
#if defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: without it the pages are small and the result is lower, not wrong
#endif
  float* data = static_cast<float*>(memory);
  const std::size_t floats = bytes / sizeof(float);
  const std::size_t share = floats / threads / kLineFloats * kLineFloats;
  // Each thread writes its own part first, so that its pages are real and lie near it.
  seconds_together(threads, [&](int thread) { std::fill_n(data + thread * share, share, 1.0f); });
  const double best = std::max({
      read_gbps<1, 0>(threads, data, floats), read_gbps<2, 0>(threads, data, floats),
      read_gbps<4, 0>(threads, data, floats), read_gbps<8, 0>(threads, data, floats),
      read_gbps<1, 8>(threads, data, floats), read_gbps<2, 8>(threads, data, floats),
      read_gbps<4, 8>(threads, data, floats), read_gbps<8, 8>(threads, data, floats),
  });
  std::free(memory);
  return best;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s THREADS BUFFER_BYTES\n", argv[0]);
    return 2;
  }
  const int threads = std::atoi(argv[1]);
  const std::size_t bytes = std::strtoull(argv[2], nullptr, 10);
  // The operands come from run-time values: a factor just below one keeps the sums finite and normal.
  const float factor = 1.0f - 1e-3f * argc, term = 1e-3f * argc;
  const double gflops = peak_gflops(threads, factor, term);
  const double gbps = bandwidth_gbps(threads, bytes);
  std::printf("{\"peak_gflops\": %.3f, \"bandwidth_gbps\": %.3f}\n", gflops, gbps);
}
