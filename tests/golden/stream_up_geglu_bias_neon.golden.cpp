// Made by tilewright VERSION from templates/moe_gemm/cpu/stream.cpp.jinja for aarch64_neon.
// moe_gemm stage=up experts=4 n=100 k=512 top_k=1 activation=geglu bias=True x_dtype=fp32 w_dtype=fp32 out_dtype=fp32
// block_rows=2 chunk_groups=1 combine=none gate_up=apart precision=fp32 prefetch=16 schedule=static streams=4 unroll=1
// vectors=2
// Streaming grouped GEMM for few tokens: up to 4 weight panels read side by side, up to 2 rows at once.

#include <stdint.h>

extern "C" {
// GOMP_parallel's own signature, so that a kernel runs on the thread pool that torch already has.
// Null: run everything on the calling thread. It may start fewer threads than asked for.
typedef void (*tw_fork_fn)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
struct tw_host { int32_t abi_version; int32_t threads; tw_fork_fn fork; };
__attribute__((visibility("default"))) int32_t tilewright_abi_version() { return 1; }
}

namespace {

constexpr int kLanes = 16 / sizeof(float);
// Loads and stores need no more than element alignment; compilers pick the same instructions as for aligned data.
typedef float vec __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec splat(float v) { return v - vec{}; }  // v - 0 is v for every v; v + 0 is not (-0), and costs an addition

constexpr int64_t kExperts = 4;
constexpr int64_t kN = 100;  // output columns
constexpr int64_t kK = 512;
constexpr int kHalves = 2;  // 2: every output needs a gate and an up column
constexpr int kVectors = 2;  // vectors in a row of a weight panel
constexpr int kPanel = kVectors * kLanes;  // columns of a weight panel
// Gate and up columns of a panel are two streams of their own.
constexpr int64_t kStepK = kLanes;  // floats between steps of k
constexpr int64_t kStepVector = kK * kLanes;  // floats between vectors of a step
constexpr int kOutVectors = kVectors / kHalves;
constexpr int kOutPanel = kOutVectors * kLanes;  // output columns of a panel
constexpr int64_t kPanels = (kN + kOutPanel - 1) / kOutPanel;
constexpr int64_t kChunkPanels = 4;  // panels of one task
constexpr int64_t kChunks = (kPanels + kChunkPanels - 1) / kChunkPanels;
constexpr int64_t kBlockM = 4096;  // rows of one task
constexpr int kRows = 2;  // rows that share one pass over the weights

INLINE vec exponential(vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const vec rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves round(n) in the low mantissa bits
  const vec shifted = x * 1.44269504f + rounder;
  const vec n = shifted - rounder;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (vec)((ivec)p + ((ivec)shifted << 23));
}

// gelu(gate) * up, in its tanh form: 0.5 (1 + tanh u) = 1 / (1 + e^-2u)
INLINE vec activate(vec gate, vec up) {
  const vec u = 0.79788456f * (gate + 0.044715f * gate * gate * gate);
  return gate / (1.0f + exponential(-2.0f * u)) * up;
}

// Rows [row, row + rows) of the sorted order, all of one expert.
struct Segment { int32_t expert, row, rows; };

struct Job {
  // Arguments of the call.
  const float *x;
  const float *weight;
  const float *bias;
  const int32_t *row_token;
  const int32_t *expert_offsets;
  float *out;
  int64_t tokens;
  int64_t rows;
  // Parts of the workspace.
  Segment *segments;
  int64_t segment_count, tasks, units;
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t threads_started;
  alignas(64) int64_t next_unit;
};

INLINE int64_t claim(int64_t &counter) { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }

// Fetches step k + 16 of a panel.
INLINE void prefetch(const float *panel, int64_t k) {
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; j += 1) {  // one per cache line
    __builtin_prefetch(panel + (k + 16) * kStepK + j * kStepVector);
  }
}

INLINE const float *input_row(const Job &job, int64_t row) {
  return job.x + (int64_t)job.row_token[row] * kK;
}

INLINE const float *weight_panel(const Job &job, int64_t expert, int64_t panel) {
  return job.weight + (expert * kPanels + panel) * kK * kPanel;
}

// Writes the valid columns of one row of a finished tile.
INLINE void emit(float *to, const vec (&values)[kOutVectors], int64_t column) {
  to += column;
#pragma GCC unroll 16
  for (int j = 0; j < kOutVectors; j++) {
    store(to + j * kLanes, values[j]);
  }
}

// Epilogue of one tile of sums [rows, kPanel]: bias, activation, and where the result goes. Not inlined: it costs
// little beside a tile's k steps, and one copy of it halves the time to compile.
__attribute__((noinline)) void finish(const Job &job, int64_t expert, int64_t row, int64_t rows, int64_t panel, float *sums) {
  const int64_t column = panel * kOutPanel;
  for (int64_t i = 0; i < rows; i++, sums += kPanel) {
    // Gate and up columns alternate by vector, as in the panel; the bias holds all gates, then all ups.
    for (int j = 0; j < kPanel; j++) {
      const int64_t c = column + j / (2 * kLanes) * kLanes + j % kLanes;
      if (c < kN) sums[j] += job.bias[(2 * expert + j / kLanes % 2) * kN + c];
    }
    vec values[kOutVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kOutVectors; j++) {
      values[j] = activate(load(sums + 2 * j * kLanes), load(sums + (2 * j + 1) * kLanes));
    }
    emit(job.out + (row + i) * kN, values, column);
  }
}

// Sums of a register tile, handed to the epilogue through memory.
template <int M>
INLINE void finish_tile(const Job &job, int64_t expert, int64_t row, int64_t panel, const vec (&sums)[M][kVectors]) {
  alignas(64) float tile[M * kPanel];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; j++) store(tile + i * kPanel + j * kLanes, sums[i][j]);
  }
  finish(job, expert, row, M, panel, tile);
}

template <int M, int S>
INLINE void stream(const Job &job, int64_t expert, int64_t row, int64_t panel) {
  const float *x[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) x[i] = input_row(job, row + i);
  const float *weights = weight_panel(job, expert, panel);
  vec sums[S][M][kVectors] = {};
#pragma GCC unroll 1
  for (int64_t k = 0; k < kK; k++) {
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) {
      const float *w = weights + s * kK * kPanel;
      prefetch(w, k);
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; j++) {
        const vec b = load(w + k * kStepK + j * kStepVector);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) sums[s][i][j] += splat(x[i][k]) * b;
      }
    }
  }
#pragma GCC unroll 16
  for (int s = 0; s < S; s++) finish_tile<M>(job, expert, row, panel + s, sums[s]);
}

// S panels side by side: as many as the registers allow beside M rows.
template <int M, int S>
void stream_rows(const Job &job, int64_t expert, int64_t row, int64_t panel, int64_t end) {
  for (; panel + S <= end; panel += S) stream<M, S>(job, expert, row, panel);
  if constexpr (S > 1) {
    for (; panel < end; panel++) stream<M, 1>(job, expert, row, panel);
  }
}

void compute(const Job &job, const Segment &segment, int64_t panel, int64_t end, int64_t) {
  for (int64_t r = 0; r < segment.rows; r += kRows) {
    const int64_t rows = segment.rows - r < kRows ? segment.rows - r : kRows;
    switch (rows) {
      case 1: stream_rows<1, 4>(job, segment.expert, segment.row + r, panel, end); break;
      case 2: stream_rows<2, 4>(job, segment.expert, segment.row + r, panel, end); break;
    }
  }
}

void run_task(Job &job, int64_t task, int64_t thread) {
  const int64_t panel = task % kChunks * kChunkPanels;
  const int64_t end = panel + kChunkPanels < kPanels ? panel + kChunkPanels : kPanels;
  compute(job, job.segments[task / kChunks], panel, end, thread);
}

void run(void *data) {
  Job &job = *(Job *)data;
  const int64_t thread = claim(job.threads_started);
  for (int64_t unit; (unit = claim(job.next_unit)) < job.units;) {
    const int64_t end = (unit + 1) * job.tasks / job.units;
    for (int64_t task = unit * job.tasks / job.units; task < end; task++) run_task(job, task, thread);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int32_t tilewright_moe_gemm(const tw_host *host, const int64_t *args) {
  Job job = {};
  job.x = (const float *)args[0];
  job.weight = (const float *)args[1];
  job.bias = (const float *)args[2];
  job.row_token = (const int32_t *)args[3];
  job.expert_offsets = (const int32_t *)args[4];
  job.out = (float *)args[5];
  job.tokens = (int64_t)args[6];
  job.rows = (int64_t)args[7];
  char *workspace = (char *)args[8];
  job.segments = (Segment *)workspace;
  for (int32_t e = 0; e < kExperts; e++) {
    for (int32_t row = job.expert_offsets[e]; row < job.expert_offsets[e + 1]; row += kBlockM) {
      const int32_t left = job.expert_offsets[e + 1] - row;
      job.segments[job.segment_count++] = Segment{e, row, left < kBlockM ? left : (int32_t)kBlockM};
    }
  }
  const int32_t threads = host->fork && host->threads > 1 ? host->threads : 1;
  job.tasks = job.segment_count * kChunks;
  job.units = job.tasks < threads ? job.tasks : threads;
  if (threads > 1) {
    host->fork(run, &job, threads, 0);
  } else {
    run(&job);
  }
  return 0;
}
