// Made by tilewright VERSION from templates/moe_gemm/cpu/blocked.cpp.jinja for aarch64_neon.
// moe_gemm stage=down experts=128 n=2050 k=768 top_k=8 activation=none bias=True x_dtype=fp32 w_dtype=fp32
// out_dtype=fp32
// block_m=96 block_rows=4 chunk_groups=8 combine=direct fetch_next=True gate_up=none k_block=768 order=panel_outer
// pack_x=False precision=fp32 prefetch=0 schedule=static streams=2 unroll=1 vectors=2
// Blocked grouped GEMM: register tiles of 4 rows by 4 vectors.

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

constexpr int64_t kExperts = 128;
constexpr int64_t kN = 2050;  // output columns
constexpr int64_t kK = 768;
constexpr int64_t kTopK = 8;
constexpr int kHalves = 1;  // 2: every output needs a gate and an up column
constexpr int kVectors = 2;  // vectors in a row of a weight panel
constexpr int kPanel = kVectors * kLanes;  // columns of a weight panel
constexpr int64_t kStepK = kPanel;  // floats between steps of k
constexpr int64_t kStepVector = kLanes;  // floats between vectors of a step
constexpr int kOutVectors = kVectors / kHalves;
constexpr int kOutPanel = kOutVectors * kLanes;  // output columns of a panel
constexpr int64_t kPanels = (kN + kOutPanel - 1) / kOutPanel;
constexpr int64_t kChunkPanels = 16;  // panels of one task
constexpr int64_t kChunks = (kPanels + kChunkPanels - 1) / kChunkPanels;
constexpr int64_t kBlockM = 96;  // rows of one task
constexpr int kRows = 4;  // rows of a register tile
constexpr int kStreams = 2;  // neighbouring panels of a register tile

// Rows [row, row + rows) of the sorted order, all of one expert.
struct Segment { int32_t expert, row, rows; };

struct Job {
  // Arguments of the call.
  const float *x;
  const float *weight;
  const float *bias;
  const int32_t *expert_offsets;
  const int32_t *slot_row;
  const float *topk_weights;
  float *out;
  int64_t tokens;
  int64_t rows;
  // Parts of the workspace.
  Segment *segments;
  int32_t *row_slot;
  int64_t segment_count, tasks, units;
  int64_t others;  // panels that other threads take between two tasks of one thread
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t threads_started;
  alignas(64) int64_t next_unit;
};

INLINE int64_t claim(int64_t &counter) { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }

INLINE const float *input_row(const Job &job, int64_t row) {
  return job.x + row * kK;
}

INLINE const float *weight_panel(const Job &job, int64_t expert, int64_t panel) {
  return job.weight + (expert * kPanels + panel) * kK * kPanel;
}

// Writes the valid columns of one row of a finished tile.
INLINE void emit(float *to, const vec (&values)[kOutVectors], int64_t column, float scale, bool add) {
  to += column;
  if (column + kOutPanel > kN) {
    float tail[kOutPanel];
    for (int j = 0; j < kOutVectors; j++) store(tail + j * kLanes, values[j]);
    for (int64_t j = 0; j < kN - column; j++) to[j] = add ? to[j] + scale * tail[j] : scale * tail[j];
    return;
  }
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
    for (int64_t j = 0; j < kPanel && column + j < kN; j++) sums[j] += job.bias[expert * kN + column + j];
    vec values[kOutVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kOutVectors; j++) {
      values[j] = load(sums + j * kLanes);
    }
    const int32_t slot = job.row_slot[row + i];
    if (slot >= 0) emit(job.out + slot / kTopK * kN, values, column, job.topk_weights[slot], true);
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

constexpr int64_t kLine = 64;  // bytes

// What a pass over the rows fetches of the panels that come next: `lines` from `from` on, one every 2^shift steps of k.
// A pass that fetched them all in its first steps would wait for memory there, and leave it idle in the others.
struct Next { const char *from; int64_t lines, shift; };

// Into the second-level cache. Where the panels end earlier, the lines behind them, which does no harm.
INLINE void fetch(const Next &next, int64_t k) {
  if (k & ((1 << next.shift) - 1) || (k >> next.shift) >= next.lines) return;
  __builtin_prefetch(next.from + (k >> next.shift) * kLine, 0, 2);
}

// sums[s][i][j] += x[i][k] * panels[s][k][j] over `depth` steps of k.
template <int M, int S>
INLINE void multiply(vec (&sums)[S][M][kVectors], const float *const (&x)[M], const float *panel, int64_t depth, const Next &next) {
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; k++) {
    vec b[S][kVectors];
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) {
      const float *w = panel + s * kK * kPanel;
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; j++) b[s][j] = load(w + k * kStepK + j * kStepVector);
    }
    fetch(next, k);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      const vec a = splat(x[i][k]);
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) {
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; j++) sums[s][i][j] += a * b[s][j];
      }
    }
  }
}

template <int M, int S>
INLINE void tile(const Job &job, int64_t expert, int64_t row, int64_t panel, const Next &next) {
  const float *weights = weight_panel(job, expert, panel);
  const float *x[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) x[i] = input_row(job, row + i);
  vec sums[S][M][kVectors] = {};
  multiply<M, S>(sums, x, weights, kK, next);
#pragma GCC unroll 16
  for (int s = 0; s < S; s++) finish_tile<M>(job, expert, row, panel + s, sums[s]);
}

template <int S>
void tile_of(int64_t rows, const Job &job, int64_t expert, int64_t row, int64_t panel, const Next &next) {
  switch (rows) {
    case 1: return tile<1, S>(job, expert, row, panel, next);
    case 2: return tile<2, S>(job, expert, row, panel, next);
    case 3: return tile<3, S>(job, expert, row, panel, next);
    case 4: return tile<4, S>(job, expert, row, panel, next);
  }
}

// First weights of what this thread probably computes after panels [panel, end) of a segment; null: nothing that is known.
INLINE const float *weights_after(const Job &job, const Segment &segment, int64_t panel, int64_t end) {
  const Segment *next = &segment + 1 < job.segments + job.segment_count ? &segment + 1 : nullptr;
  if (next) return weight_panel(job, next->expert, panel);
  return end + job.others < kPanels ? weight_panel(job, job.segments[0].expert, end + job.others) : nullptr;
}

// The part of the next panels that the given pass over the rows fetches.
INLINE Next part_of(const float *panels, int64_t pass, int64_t passes) {
  const int64_t lines = (kStreams * kK * kPanel * (int64_t)sizeof(float) / kLine + passes - 1) / passes;
  const int64_t shift = lines < kK ? 63 - __builtin_clzll(kK / lines) : 0;
  return Next{(const char *)panels + pass * lines * kLine, panels ? lines : 0, shift};
}

// Panels [panel, end) of a segment.
INLINE void compute_block(const Job &job, const Segment &segment, int64_t panel, int64_t end) {
  const int64_t passes = (segment.rows + kRows - 1) / kRows;
  const float *const after = weights_after(job, segment, panel, end);
  for (int64_t p = panel; p < end; p += kStreams) {
    for (int64_t r = 0; r < segment.rows; r += kRows) {
      const int64_t rows = segment.rows - r < kRows ? segment.rows - r : kRows;
      const int64_t row = segment.row + r;
      const Next next = part_of(p + kStreams < end ? weight_panel(job, segment.expert, p + kStreams) : after, r / kRows, passes);
      if (p + kStreams > end) {
        for (int64_t q = p; q < end; q++) tile_of<1>(rows, job, segment.expert, row, q, next);
        continue;
      }
      tile_of<kStreams>(rows, job, segment.expert, row, p, next);
    }
  }
}

void compute(const Job &job, const Segment &segment, int64_t panel, int64_t end, int64_t) {
  compute_block(job, segment, panel, end);
}

void run_task(Job &job, int64_t task, int64_t thread) {
  // One thread owns these columns of every token, so sums need neither locks nor partial results,
  // and their order does not depend on the number of threads.
  const int64_t panel = task * kChunkPanels;
  const int64_t end = panel + kChunkPanels < kPanels ? panel + kChunkPanels : kPanels;
  const int64_t columns = (end * kOutPanel < kN ? end * kOutPanel : kN) - panel * kOutPanel;
  for (int64_t t = 0; t < job.tokens; t++) {
    __builtin_memset(job.out + t * kN + panel * kOutPanel, 0, columns * sizeof(float));
  }
  for (int64_t s = 0; s < job.segment_count; s++) compute(job, job.segments[s], panel, end, thread);
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
  job.expert_offsets = (const int32_t *)args[3];
  job.slot_row = (const int32_t *)args[4];
  job.topk_weights = (const float *)args[5];
  job.out = (float *)args[6];
  job.tokens = (int64_t)args[7];
  job.rows = (int64_t)args[8];
  char *workspace = (char *)args[9];
  job.segments = (Segment *)workspace;
  workspace += (12 * (128 + job.rows / 96) + 63) / 64 * 64;
  job.row_slot = (int32_t *)workspace;
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
  job.tasks = kChunks;
  job.units = job.tasks < threads ? job.tasks : threads;
  job.others = 0;
  if (threads > 1) {
    host->fork(run, &job, threads, 0);
  } else {
    run(&job);
  }
  return 0;
}
