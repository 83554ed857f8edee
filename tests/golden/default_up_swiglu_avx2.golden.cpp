// Made by tilewright VERSION from templates/moe_gemm/cpu/blocked.cpp.jinja for x86_64_avx2.
// moe_gemm stage=up experts=8 n=1792 k=4096 top_k=2 activation=swiglu bias=False x_dtype=fp32 w_dtype=fp32
// out_dtype=fp32
// block_m=96 block_rows=6 chunk_groups=4 combine=none fetch_next=False gate_up=interleaved k_block=256
// order=panel_outer pack_x=True precision=fp32 prefetch=0 schedule=dynamic streams=1 unroll=4 vectors=2
// Blocked grouped GEMM: register tiles of 6 rows by 2 vectors, k in blocks of 256.

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
constexpr int64_t kStepK = kPanel;  // floats between steps of k
constexpr int64_t kStepVector = kLanes;  // floats between vectors of a step
constexpr int kOutVectors = kVectors / kHalves;
constexpr int kOutPanel = kOutVectors * kLanes;  // output columns of a panel
constexpr int64_t kPanels = (kN + kOutPanel - 1) / kOutPanel;
constexpr int64_t kChunkPanels = 4;  // panels of one task
constexpr int64_t kChunks = (kPanels + kChunkPanels - 1) / kChunkPanels;
constexpr int64_t kBlockM = 96;  // rows of one task
constexpr int kRows = 6;  // rows of a register tile
constexpr int kStreams = 1;  // neighbouring panels of a register tile
constexpr int64_t kBlockK = 256;  // steps of k between visits to the accumulators

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
  const float *weight;
  const int32_t *row_token;
  const int32_t *expert_offsets;
  float *out;
  int64_t tokens;
  int64_t rows;
  // Parts of the workspace.
  Segment *segments;
  float *packed;
  float *accumulators;
  int64_t segment_count, tasks, units;
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t threads_started;
  alignas(64) int64_t next_unit;
  alignas(64) int64_t next_block;
  alignas(64) int64_t blocks_done;
};

INLINE int64_t claim(int64_t &counter) { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }

// Every unit was claimed by a running thread, so this ends whatever the number of threads.
INLINE void wait_for(int64_t &counter, int64_t value) {
  while (__atomic_load_n(&counter, __ATOMIC_ACQUIRE) < value) {
    asm volatile("pause");
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

// sums[s][i][j] += x[i][k] * panels[s][k][j] over `depth` steps of k.
template <int M, int S>
INLINE void multiply(vec (&sums)[S][M][kVectors], const float *x, const float *panel, int64_t depth) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++) {
    vec b[S][kVectors];
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) {
      const float *w = panel + s * kK * kPanel;
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; j++) b[s][j] = load(w + k * kStepK + j * kStepVector);
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      const vec a = splat(x[k * M + i]);
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) {
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; j++) sums[s][i][j] += a * b[s][j];
      }
    }
  }
}

// Visits every vector of a register tile and its place among the accumulators.
template <int M, int S, typename Visit>
INLINE void each_vector(vec (&sums)[S][M][kVectors], float *accumulators, Visit visit) {
#pragma GCC unroll 16
  for (int s = 0; s < S; s++) {
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; j++) visit(sums[s][i][j], accumulators + ((s * M + i) * kVectors + j) * kLanes);
    }
  }
}

template <int M, int S>
INLINE void tile(const Job &job, int64_t expert, int64_t row, int64_t panel, int64_t k0, float *accumulators) {
  const int64_t depth = kK - k0 < kBlockK ? kK - k0 : kBlockK;
  const float *weights = weight_panel(job, expert, panel) + k0 * kStepK;
  const float *x = job.packed + row * kK + k0 * M;
  vec sums[S][M][kVectors] = {};
  if (k0) each_vector(sums, accumulators, [](vec &sum, float *at) { sum = load(at); });
  multiply<M, S>(sums, x, weights, depth);
  if (k0 + depth < kK) return each_vector(sums, accumulators, [](vec &sum, float *at) { store(at, sum); });
#pragma GCC unroll 16
  for (int s = 0; s < S; s++) finish_tile<M>(job, expert, row, panel + s, sums[s]);
}

template <int S>
void tile_of(int64_t rows, const Job &job, int64_t expert, int64_t row, int64_t panel, int64_t k0, float *accumulators) {
  switch (rows) {
    case 1: return tile<1, S>(job, expert, row, panel, k0, accumulators);
    case 2: return tile<2, S>(job, expert, row, panel, k0, accumulators);
    case 3: return tile<3, S>(job, expert, row, panel, k0, accumulators);
    case 4: return tile<4, S>(job, expert, row, panel, k0, accumulators);
    case 5: return tile<5, S>(job, expert, row, panel, k0, accumulators);
    case 6: return tile<6, S>(job, expert, row, panel, k0, accumulators);
  }
}

// Panels [panel, end) of a segment over one block of k.
INLINE void compute_block(const Job &job, const Segment &segment, int64_t panel, int64_t end, int64_t k0, float *accumulators) {
  for (int64_t p = panel; p < end; p += kStreams) {
    for (int64_t r = 0; r < segment.rows; r += kRows) {
      const int64_t rows = segment.rows - r < kRows ? segment.rows - r : kRows;
      const int64_t row = segment.row + r;
      float *const tile_sums = accumulators + ((p - panel) * kBlockM + r * kStreams) * kPanel;
      tile_of<kStreams>(rows, job, segment.expert, row, p, k0, tile_sums);
    }
  }
}

void compute(const Job &job, const Segment &segment, int64_t panel, int64_t end, int64_t thread) {
  float *accumulators = job.accumulators + thread * kBlockM * kChunkPanels * kPanel;
  for (int64_t k0 = 0; k0 < kK; k0 += kBlockK) compute_block(job, segment, panel, end, k0, accumulators);
}

// Rows of one register tile, k-major, so that a step of k reads neighbouring floats.
void pack_block(Job &job, int64_t block) {
  int64_t s = 0;
  for (; block >= (job.segments[s].rows + kRows - 1) / kRows; s++) block -= (job.segments[s].rows + kRows - 1) / kRows;
  const Segment &segment = job.segments[s];
  const int64_t row = segment.row + block * kRows;
  const int64_t left = segment.row + segment.rows - row;
  const int64_t rows = left < kRows ? left : kRows;
  for (int64_t i = 0; i < rows; i++) {
    const float *from = input_row(job, row + i);
    float *to = job.packed + row * kK + i;
    for (int64_t k = 0; k < kK; k++) to[k * rows] = from[k];
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
  int64_t blocks = 0;
  for (int64_t s = 0; s < job.segment_count; s++) blocks += (job.segments[s].rows + kRows - 1) / kRows;
  for (int64_t block; (block = claim(job.next_block)) < blocks;) {
    pack_block(job, block);
    __atomic_fetch_add(&job.blocks_done, 1, __ATOMIC_RELEASE);
  }
  wait_for(job.blocks_done, blocks);
  for (int64_t unit; (unit = claim(job.next_unit)) < job.units;) {
    run_task(job, unit, thread);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int32_t tilewright_moe_gemm(const tw_host *host, const int64_t *args) {
  Job job = {};
  job.x = (const float *)args[0];
  job.weight = (const float *)args[1];
  job.row_token = (const int32_t *)args[2];
  job.expert_offsets = (const int32_t *)args[3];
  job.out = (float *)args[4];
  job.tokens = (int64_t)args[5];
  job.rows = (int64_t)args[6];
  char *workspace = (char *)args[7];
  job.segments = (Segment *)workspace;
  workspace += (12 * (8 + job.rows / 96) + 63) / 64 * 64;
  job.packed = (float *)workspace;
  workspace += (4 * job.rows * 4096 + 63) / 64 * 64;
  job.accumulators = (float *)workspace;
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
