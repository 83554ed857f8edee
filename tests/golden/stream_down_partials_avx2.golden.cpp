// Made by tilewright VERSION from templates/moe_gemm/cpu/stream.cpp.jinja for x86_64_avx2.
// moe_gemm stage=down experts=8 n=4096 k=1792 top_k=2 activation=none bias=False x_dtype=fp32 w_dtype=fp32
// out_dtype=fp32
// block_rows=3 chunk_groups=2 combine=partials gate_up=none precision=fp32 prefetch=64 schedule=dynamic streams=6
// unroll=4 vectors=1
// Streaming grouped GEMM for few tokens: up to 6 weight panels read side by side, up to 3 rows at once.

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
constexpr int64_t kN = 4096;  // output columns
constexpr int64_t kK = 1792;
constexpr int64_t kTopK = 2;
constexpr int kHalves = 1;  // 2: every output needs a gate and an up column
constexpr int kVectors = 1;  // vectors in a row of a weight panel
constexpr int kPanel = kVectors * kLanes;  // columns of a weight panel
constexpr int64_t kStepK = kPanel;  // floats between steps of k
constexpr int64_t kStepVector = kLanes;  // floats between vectors of a step
constexpr int kOutVectors = kVectors / kHalves;
constexpr int kOutPanel = kOutVectors * kLanes;  // output columns of a panel
constexpr int64_t kPanels = (kN + kOutPanel - 1) / kOutPanel;
constexpr int64_t kChunkPanels = 12;  // panels of one task
constexpr int64_t kChunks = (kPanels + kChunkPanels - 1) / kChunkPanels;
constexpr int64_t kBlockM = 4096;  // rows of one task
constexpr int kRows = 3;  // rows that share one pass over the weights

// Rows [row, row + rows) of the sorted order, all of one expert.
struct Segment { int32_t expert, row, rows; };

struct Job {
  // Arguments of the call.
  const float *x;
  const float *weight;
  const int32_t *expert_offsets;
  const int32_t *slot_row;
  const float *topk_weights;
  float *out;
  int64_t tokens;
  int64_t rows;
  // Parts of the workspace.
  Segment *segments;
  int32_t *row_slot;
  float *partial;
  int64_t segment_count, tasks, units;
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t threads_started;
  alignas(64) int64_t next_unit;
  alignas(64) int64_t units_done;
  alignas(64) int64_t next_token;
};

INLINE int64_t claim(int64_t &counter) { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }

// Every unit was claimed by a running thread, so this ends whatever the number of threads.
INLINE void wait_for(int64_t &counter, int64_t value) {
  while (__atomic_load_n(&counter, __ATOMIC_ACQUIRE) < value) {
    asm volatile("pause");
  }
}

// Fetches step k + 64 of a panel.
INLINE void prefetch(const float *panel, int64_t k) {
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; j += 16 / kLanes) {  // one per cache line
    __builtin_prefetch(panel + (k + 64) * kStepK + j * kStepVector);
  }
}

INLINE const float *input_row(const Job &job, int64_t row) {
  return job.x + row * kK;
}

INLINE const float *weight_panel(const Job &job, int64_t expert, int64_t panel) {
  return job.weight + (expert * kPanels + panel) * kK * kPanel;
}

// Writes the valid columns of one row of a finished tile.
INLINE void emit(float *to, const vec (&values)[kOutVectors], int64_t column, float scale, bool add) {
  to += column;
#pragma GCC unroll 16
  for (int j = 0; j < kOutVectors; j++) {
    const vec scaled = values[j] * scale;
    store(to + j * kLanes, add ? load(to + j * kLanes) + scaled : scaled);
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
      values[j] = load(sums + j * kLanes);
    }
    const int32_t slot = job.row_slot[row + i];
    emit(job.partial + (row + i) * kN, values, column, slot >= 0 ? job.topk_weights[slot] : 0.0f, false);
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
#pragma GCC unroll 4
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
      case 1: stream_rows<1, 6>(job, segment.expert, segment.row + r, panel, end); break;
      case 2: stream_rows<2, 6>(job, segment.expert, segment.row + r, panel, end); break;
      case 3: stream_rows<3, 4>(job, segment.expert, segment.row + r, panel, end); break;
    }
  }
}

void run_task(Job &job, int64_t task, int64_t thread) {
  const int64_t panel = task % kChunks * kChunkPanels;
  const int64_t end = panel + kChunkPanels < kPanels ? panel + kChunkPanels : kPanels;
  compute(job, job.segments[task / kChunks], panel, end, thread);
}

void combine_token(const Job &job, int64_t token) {
  float *to = job.out + token * kN;
  bool first = true;
  for (int64_t j = 0; j < kTopK; j++) {
    const int32_t row = job.slot_row[token * kTopK + j];
    if (row < 0) continue;
    const float *from = job.partial + (int64_t)row * kN;
    if (first) {
      for (int64_t c = 0; c < kN; c++) to[c] = from[c];
    } else {
      for (int64_t c = 0; c < kN; c++) to[c] += from[c];
    }
    first = false;
  }
  if (first) __builtin_memset(to, 0, kN * sizeof(float));
}

void run(void *data) {
  Job &job = *(Job *)data;
  const int64_t thread = claim(job.threads_started);
  for (int64_t unit; (unit = claim(job.next_unit)) < job.units;) {
    run_task(job, unit, thread);
    __atomic_fetch_add(&job.units_done, 1, __ATOMIC_RELEASE);
  }
  wait_for(job.units_done, job.units);
  for (int64_t token; (token = claim(job.next_token)) < job.tokens;) combine_token(job, token);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int32_t tilewright_moe_gemm(const tw_host *host, const int64_t *args) {
  Job job = {};
  job.x = (const float *)args[0];
  job.weight = (const float *)args[1];
  job.expert_offsets = (const int32_t *)args[2];
  job.slot_row = (const int32_t *)args[3];
  job.topk_weights = (const float *)args[4];
  job.out = (float *)args[5];
  job.tokens = (int64_t)args[6];
  job.rows = (int64_t)args[7];
  char *workspace = (char *)args[8];
  job.segments = (Segment *)workspace;
  workspace += (12 * (8 + job.rows / 4096) + 63) / 64 * 64;
  job.row_slot = (int32_t *)workspace;
  workspace += (4 * job.rows + 63) / 64 * 64;
  job.partial = (float *)workspace;
  for (int64_t r = 0; r < job.rows; r++) job.row_slot[r] = -1;
  for (int64_t s = 0; s < job.tokens * kTopK; s++) {
    if (job.slot_row[s] >= 0) job.row_slot[job.slot_row[s]] = s;
  }
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
