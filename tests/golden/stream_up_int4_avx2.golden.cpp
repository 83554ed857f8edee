// Made by tilewright VERSION from templates/moe_gemm/cpu/stream.cpp.jinja for x86_64_avx2.
// moe_gemm stage=up experts=8 n=1792 k=4096 top_k=2 activation=swiglu bias=False x_dtype=fp32 w_dtype=fp32
// out_dtype=fp32
// block_rows=2 chunk_groups=4 combine=none gate_up=apart precision=int4g32 prefetch=16 schedule=dynamic streams=3
// unroll=1 vectors=2
// Streaming grouped GEMM for few tokens: up to 3 weight panels read side by side, up to 2 rows at once.

#include <stdint.h>

extern "C" {
// GOMP_parallel's own signature, so that a kernel runs on the thread pool that torch already has.
// Null: run everything on the calling thread. It may start fewer threads than asked for.
typedef void (*tw_fork_fn)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
struct tw_host { int32_t abi_version; int32_t threads; tw_fork_fn fork; };
__attribute__((visibility("default"))) int32_t tilewright_abi_version() { return 1; }
}

namespace {

constexpr int kLanes = 32 / sizeof(float);
// Loads and stores need no more than element alignment; compilers pick the same instructions as for aligned data.
typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec splat(float v) { return v - vec{}; }  // v - 0 is v for every v; v + 0 is not (-0), and costs an addition

constexpr int64_t kExperts = 8;
constexpr int64_t kN = 1792;  // output columns
constexpr int64_t kK = 4096;
constexpr int kHalves = 2;  // 2: every output needs a gate and an up column
constexpr int kVectors = 2;  // vectors in a row of a weight panel
constexpr int kPanel = kVectors * kLanes;  // columns of a weight panel
constexpr int kOutVectors = kVectors / kHalves;
constexpr int kOutPanel = kOutVectors * kLanes;  // output columns of a panel
constexpr int64_t kPanels = (kN + kOutPanel - 1) / kOutPanel;
constexpr int64_t kChunkPanels = 12;  // panels of one task
constexpr int64_t kChunks = (kPanels + kChunkPanels - 1) / kChunkPanels;
constexpr int64_t kBlockM = 4096;  // rows of one task
constexpr int kRows = 2;  // rows that share one pass over the weights

constexpr int kSteps = 8;  // steps of k in a word
constexpr int64_t kRow = 8;  // words of a row of a panel
constexpr int64_t kPanelRows = 640;  // of elements and of their scales
constexpr int64_t kVectorStride = kPanelRows * kRow;  // words between vectors of a row
constexpr int64_t kGroup = 32;  // steps of k that share a scale
constexpr int64_t kGroups = kK / kGroup;
constexpr int64_t kGroupRows = (kGroup + kSteps - 1) / kSteps;
constexpr int64_t kScalesPerRow = 1;  // groups whose scales share a row

typedef int32_t words __attribute__((vector_size(32), aligned(4), may_alias));

INLINE words load_words(const int32_t *p) { return *(const words *)p; }

// First row of a group's elements.
INLINE const int32_t *group_rows(const int32_t *panel, int64_t group) {
  return panel + (group * kGroupRows + group / kScalesPerRow + 1) * kRow;
}

// The elements of step t of a row of words; t is a constant once loops are unrolled.
INLINE vec unpack(words w, int t) {
  return __builtin_convertvector((w << (28 - 4 * t)) >> 28, vec);
}

// Words with the scales of a group.
INLINE words load_scales(const int32_t *panel, int64_t group) {
  return load_words(panel + group / kScalesPerRow * (kScalesPerRow * kGroupRows + 1) * kRow);
}

INLINE vec scale_of(words w, int64_t) { return (vec)(w << 16); }
INLINE vec offset_of(words w) { return (vec)(w & (int32_t)0xffff0000); }

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

// silu(gate) * up
INLINE vec activate(vec gate, vec up) { return gate / (1.0f + exponential(-gate)) * up; }

// Rows [row, row + rows) of the sorted order, all of one expert.
struct Segment { int32_t expert, row, rows; };

struct Job {
  // Arguments of the call.
  const float *x;
  const int32_t *weight;
  const int32_t *row_token;
  const int32_t *expert_offsets;
  float *out;
  int64_t tokens;
  int64_t rows;
  // Parts of the workspace.
  Segment *segments;
  float *x_sums;
  float *x_divided;
  int64_t segment_count, tasks, units;
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t threads_started;
  alignas(64) int64_t next_unit;
};

INLINE int64_t claim(int64_t &counter) { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }

// Fetches the 16th row after this one.
INLINE void prefetch(const int32_t *row) {
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; j += 1) {  // one per cache line
    __builtin_prefetch(row + 16 * kRow + j * kVectorStride);
  }
}

INLINE const float *input_row(const Job &job, int64_t row) {
  return job.x + (int64_t)job.row_token[row] * kK;
}

INLINE const int32_t *weight_panel(const Job &job, int64_t expert, int64_t panel) {
  return job.weight + (expert * kPanels + panel) * kPanelRows * kPanel;
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

// Elements of four bits are masked where they lie, as whole numbers from 0 to 15 times 16^t; x is divided by 16^t
// beforehand, which is exact, and what is added to the elements comes off the offset. That saves a shift in three steps.
INLINE words load_elements(const int32_t *p) { return load_words(p) ^ (int32_t)0x88888888; }
INLINE vec unpack_in_place(words w, int t) {
  return __builtin_convertvector(t == 7 ? (w >> 28) & 15 : w & (15 << 4 * (t & 7)), vec);
}

// One row of x divided, and its sums over each group of k, which the groups' offsets are multiplied with.
INLINE void prepare_row(const float *x, float *divided, float *sums) {
  alignas(64) static const float factors[16] = {
      1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1,
      1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1,
  };
  for (int64_t g = 0; g < kGroups; g++, x += kGroup, divided += kGroup) {
    vec lanes = {};
    for (int64_t k = 0; k < kGroup; k += kLanes) {
      const vec each = load(x + k);
      lanes += each;
      store(divided + k, each * load(factors + k % 8));
    }
    sums[g] = 0;
    for (int l = 0; l < kLanes; l++) sums[g] += lanes[l];
  }
}

// sums[s][i][j] += x[i][k + t] * step t of a row of words, for T steps.
template <int T, int M, int S>
INLINE void multiply(vec (&sums)[S][M][kVectors], const float *const (&x)[M], int64_t k, const int32_t *row) {
  words w[S][kVectors];
#pragma GCC unroll 16
  for (int s = 0; s < S; s++) {
    const int32_t *from = row + s * kPanelRows * kPanel;
    prefetch(from);
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; j++) w[s][j] = load_elements(from + j * kVectorStride);
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; t++) {
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; j++) {
        const vec b = unpack_in_place(w[s][j], t);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) sums[s][i][j] += splat(x[i][k + t]) * b;
      }
    }
  }
}

// sums += x * one group's elements, not scaled.
template <int M, int S>
INLINE void multiply_group(vec (&sums)[S][M][kVectors], const float *const (&x)[M], const int32_t *panel, int64_t group) {
  const int32_t *row = group_rows(panel, group);
  int64_t k = group * kGroup;
#pragma GCC unroll 1
  for (int64_t r = 0; r < kGroup / kSteps; r++, k += kSteps, row += kRow) multiply<kSteps>(sums, x, k, row);
  if constexpr (kGroup % kSteps != 0) multiply<kGroup % kSteps>(sums, x, k, row);
}

template <int M, int S>
INLINE void stream(const Job &job, int64_t expert, int64_t row, int64_t panel, const float *x_sums, const float *x_divided) {
  const float *x[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) x[i] = x_divided + i * kK;
  const int32_t *weights = weight_panel(job, expert, panel);
  vec sums[S][M][kVectors] = {};
  for (int64_t g = 0; g < kGroups; g++) {
    vec part[S][M][kVectors] = {};
    multiply_group(part, x, weights, g);
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; j++) {
        const words w = load_scales(weights + s * kPanelRows * kPanel + j * kVectorStride, g);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
          sums[s][i][j] += part[s][i][j] * scale_of(w, g) + x_sums[i * kGroups + g] * (offset_of(w) - 8 * scale_of(w, g));
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int s = 0; s < S; s++) finish_tile<M>(job, expert, row, panel + s, sums[s]);
}

// S panels side by side: as many as the registers allow beside M rows.
template <int M, int S>
void stream_rows(const Job &job, int64_t expert, int64_t row, int64_t panel, int64_t end, const float *x_sums, const float *x_divided) {
  for (; panel + S <= end; panel += S) stream<M, S>(job, expert, row, panel, x_sums, x_divided);
  if constexpr (S > 1) {
    for (; panel < end; panel++) stream<M, 1>(job, expert, row, panel, x_sums, x_divided);
  }
}

void compute(const Job &job, const Segment &segment, int64_t panel, int64_t end, int64_t thread) {
  float *x_sums = job.x_sums + thread * kRows * kGroups;
  float *x_divided = job.x_divided + thread * kRows * kK;
  for (int64_t r = 0; r < segment.rows; r += kRows) {
    const int64_t rows = segment.rows - r < kRows ? segment.rows - r : kRows;
    for (int64_t i = 0; i < rows; i++) {
      prepare_row(input_row(job, segment.row + r + i), x_divided + i * kK, x_sums + i * kGroups);
    }
    switch (rows) {
      case 1: stream_rows<1, 3>(job, segment.expert, segment.row + r, panel, end, x_sums, x_divided); break;
      case 2: stream_rows<2, 3>(job, segment.expert, segment.row + r, panel, end, x_sums, x_divided); break;
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
    run_task(job, unit, thread);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int32_t tilewright_moe_gemm(const tw_host *host, const int64_t *args) {
  Job job = {};
  job.x = (const float *)args[0];
  job.weight = (const int32_t *)args[1];
  job.row_token = (const int32_t *)args[2];
  job.expert_offsets = (const int32_t *)args[3];
  job.out = (float *)args[4];
  job.tokens = (int64_t)args[5];
  job.rows = (int64_t)args[6];
  char *workspace = (char *)args[7];
  job.segments = (Segment *)workspace;
  workspace += (12 * (8 + job.rows / 4096) + 63) / 64 * 64;
  job.x_sums = (float *)workspace;
  workspace += (4 * host->threads * 256 + 63) / 64 * 64;
  job.x_divided = (float *)workspace;
  for (int32_t e = 0; e < kExperts; e++) {
    for (int32_t row = job.expert_offsets[e]; row < job.expert_offsets[e + 1]; row += kBlockM) {
      const int32_t left = job.expert_offsets[e + 1] - row;
      job.segments[job.segment_count++] = Segment{e, row, left < kBlockM ? left : (int32_t)kBlockM};
    }
  }
  const int32_t threads = host->fork && host->threads > 1 ? host->threads : 1;
  job.tasks = job.segment_count * kChunks;
  job.units = job.tasks;
  if (threads > 1) {
    host->fork(run, &job, threads, 0);
  } else {
    run(&job);
  }
  return 0;
}
