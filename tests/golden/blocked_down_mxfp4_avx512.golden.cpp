// Made by tilewright VERSION from templates/moe_gemm/cpu/blocked.cpp.jinja for x86_64_avx512.
// moe_gemm stage=down experts=128 n=2050 k=768 top_k=8 activation=none bias=True x_dtype=fp32 w_dtype=fp32
// out_dtype=fp32
// block_m=96 block_rows=6 chunk_groups=2 combine=partials fetch_next=False gate_up=none k_block=256 order=panel_outer
// pack_x=True precision=mxfp4 prefetch=0 schedule=dynamic streams=2 unroll=4 vectors=2
// Blocked grouped GEMM: register tiles of 6 rows by 4 vectors, k in blocks of 256.

#include <stdint.h>

extern "C" {
// GOMP_parallel's own signature, so that a kernel runs on the thread pool that torch already has.
// Null: run everything on the calling thread. It may start fewer threads than asked for.
typedef void (*tw_fork_fn)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
struct tw_host { int32_t abi_version; int32_t threads; tw_fork_fn fork; };
__attribute__((visibility("default"))) int32_t tilewright_abi_version() { return 1; }
}

namespace {

constexpr int kLanes = 64 / sizeof(float);
// Loads and stores need no more than element alignment; compilers pick the same instructions as for aligned data.
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64)));

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
constexpr int kOutVectors = kVectors / kHalves;
constexpr int kOutPanel = kOutVectors * kLanes;  // output columns of a panel
constexpr int64_t kPanels = (kN + kOutPanel - 1) / kOutPanel;
constexpr int64_t kChunkPanels = 4;  // panels of one task
constexpr int64_t kChunks = (kPanels + kChunkPanels - 1) / kChunkPanels;
constexpr int64_t kBlockM = 96;  // rows of one task
constexpr int64_t kStepK = kPanel;  // floats between steps of k, once they are unpacked
constexpr int64_t kStepVector = kLanes;  // floats between vectors of a step
constexpr int64_t kUnpackedSteps = 256;  // room for a block of k and the rest of its last word
constexpr int kRows = 6;  // rows of a register tile
constexpr int kStreams = 2;  // neighbouring panels of a register tile
constexpr int64_t kBlockK = 256;  // steps of k between visits to the accumulators

constexpr int kSteps = 8;  // steps of k in a word
constexpr int64_t kRow = 32;  // words of a row of a panel
constexpr int64_t kPanelRows = 102;  // of elements and of their scales
constexpr int64_t kVectorStride = kLanes;  // words between vectors of a row
constexpr int64_t kGroup = 32;  // steps of k that share a scale
constexpr int64_t kGroups = kK / kGroup;
constexpr int64_t kGroupRows = (kGroup + kSteps - 1) / kSteps;
constexpr int64_t kScalesPerRow = 4;  // groups whose scales share a row

typedef int32_t words __attribute__((vector_size(64), aligned(4), may_alias));

INLINE words load_words(const int32_t *p) { return *(const words *)p; }

// First row of a group's elements.
INLINE const int32_t *group_rows(const int32_t *panel, int64_t group) {
  return panel + (group * kGroupRows + group / kScalesPerRow + 1) * kRow;
}

// Bytes of a table of 16 by the four low bits of each byte; the others must be zero.
INLINE words lookup(words table, words index) {
  words found;
  asm("vpshufb %2, %1, %0" : "=v"(found) : "v"(table), "v"(index));
  return found;
}

// The elements of step t of a row of words; t is a constant once loops are unrolled.
INLINE vec unpack(words w, int t) {
  // Twice the value is a whole number, so that a byte holds it.
  const words twice = {
      0x03020100, 0x0c080604, (int32_t)0xfdfeff00, (int32_t)0xf4f8fafc,
      0x03020100, 0x0c080604, (int32_t)0xfdfeff00, (int32_t)0xf4f8fafc,
      0x03020100, 0x0c080604, (int32_t)0xfdfeff00, (int32_t)0xf4f8fafc,
      0x03020100, 0x0c080604, (int32_t)0xfdfeff00, (int32_t)0xf4f8fafc,
  };
  const words found = lookup(twice, (t % 2 ? w >> 4 : w) & 0x0f0f0f0f);
  return __builtin_convertvector((found << (24 - t / 2 * 8)) >> 24, vec);
}

// Words with the scales of a group.
INLINE words load_scales(const int32_t *panel, int64_t group) {
  return load_words(panel + group / kScalesPerRow * (kScalesPerRow * kGroupRows + 1) * kRow);
}

// A power of two, halved because elements are doubled.
INLINE vec scale_of(words w, int64_t group) { return (vec)((w >> (int)(group % kScalesPerRow * 8) & 0xff) << 23) * 0.5f; }

// Rows [row, row + rows) of the sorted order, all of one expert.
struct Segment { int32_t expert, row, rows; };

struct Job {
  // Arguments of the call.
  const float *x;
  const int32_t *weight;
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
  float *partial;
  float *packed;
  float *unpacked;
  float *accumulators;
  int64_t segment_count, tasks, units;
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t threads_started;
  alignas(64) int64_t next_unit;
  alignas(64) int64_t units_done;
  alignas(64) int64_t next_token;
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
  return job.x + row * kK;
}

INLINE const int32_t *weight_panel(const Job &job, int64_t expert, int64_t panel) {
  return job.weight + (expert * kPanels + panel) * kPanelRows * kPanel;
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

// Panels [panel, end), `depth` steps of k from k0 on, as floats that many rows can read.
__attribute__((noinline)) void unpack_panels(const Job &job, int64_t expert, int64_t panel, int64_t end, int64_t k0,
                                             int64_t depth, float *to) {
  for (; panel < end; panel++, to += kUnpackedSteps * kPanel) {
    const int32_t *weights = weight_panel(job, expert, panel);
    for (int64_t k = k0, stop; k < k0 + depth; k = stop) {
      const int64_t group = k / kGroup;
      stop = (group + 1) * kGroup < k0 + depth ? (group + 1) * kGroup : k0 + depth;
      const int32_t *rows = group_rows(weights, group) - group * kGroupRows * kRow;
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; j++) {
        const words scales = load_scales(weights + j * kVectorStride, group);
        const vec scale = scale_of(scales, group);
        for (int64_t r = k / kSteps; r * kSteps < stop; r++) {
          const words w = load_words(rows + r * kRow + j * kVectorStride);
#pragma GCC unroll 16
          for (int t = 0; t < kSteps; t++) {
            store(to + (r * kSteps - k0 + t) * kPanel + j * kLanes, unpack(w, t) * scale);
          }
        }
      }
    }
  }
}

// sums[s][i][j] += x[i][k] * panels[s][k][j] over `depth` steps of k.
template <int M, int S>
INLINE void multiply(vec (&sums)[S][M][kVectors], const float *x, const float *panel, int64_t depth) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++) {
    vec b[S][kVectors];
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) {
      const float *w = panel + s * kUnpackedSteps * kPanel;
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
INLINE void tile(const Job &job, int64_t expert, int64_t row, int64_t panel,
             const float *weights, int64_t k0, float *accumulators) {
  const int64_t depth = kK - k0 < kBlockK ? kK - k0 : kBlockK;
  const float *x = job.packed + row * kK + k0 * M;
  vec sums[S][M][kVectors] = {};
  if (k0) each_vector(sums, accumulators, [](vec &sum, float *at) { sum = load(at); });
  multiply<M, S>(sums, x, weights, depth);
  if (k0 + depth < kK) return each_vector(sums, accumulators, [](vec &sum, float *at) { store(at, sum); });
#pragma GCC unroll 16
  for (int s = 0; s < S; s++) finish_tile<M>(job, expert, row, panel + s, sums[s]);
}

template <int S>
void tile_of(int64_t rows, const Job &job, int64_t expert, int64_t row, int64_t panel,
             const float *weights, int64_t k0, float *accumulators) {
  switch (rows) {
    case 1: return tile<1, S>(job, expert, row, panel, weights, k0, accumulators);
    case 2: return tile<2, S>(job, expert, row, panel, weights, k0, accumulators);
    case 3: return tile<3, S>(job, expert, row, panel, weights, k0, accumulators);
    case 4: return tile<4, S>(job, expert, row, panel, weights, k0, accumulators);
    case 5: return tile<5, S>(job, expert, row, panel, weights, k0, accumulators);
    case 6: return tile<6, S>(job, expert, row, panel, weights, k0, accumulators);
  }
}

// Panels [panel, end) of a segment over one block of k.
INLINE void compute_block(const Job &job, const Segment &segment, int64_t panel, int64_t end,
                          float *unpacked, int64_t k0, float *accumulators) {
  for (int64_t p = panel; p < end; p += kStreams) {
    const int64_t last = p + kStreams < end ? p + kStreams : end;
    unpack_panels(job, segment.expert, p, last, k0, kK - k0 < kBlockK ? kK - k0 : kBlockK, unpacked);
    for (int64_t r = 0; r < segment.rows; r += kRows) {
      const int64_t rows = segment.rows - r < kRows ? segment.rows - r : kRows;
      const int64_t row = segment.row + r;
      float *const tile_sums = accumulators + ((p - panel) * kBlockM + r * kStreams) * kPanel;
      if (p + kStreams > end) {
        for (int64_t q = p; q < end; q++) tile_of<1>(rows, job, segment.expert, row, q,
                                                  unpacked + (q - p) * kUnpackedSteps * kPanel, k0, tile_sums + (q - p) * kRows * kPanel);
        continue;
      }
      tile_of<kStreams>(rows, job, segment.expert, row, p, unpacked, k0, tile_sums);
    }
  }
}

void compute(const Job &job, const Segment &segment, int64_t panel, int64_t end, int64_t thread) {
  float *unpacked = job.unpacked + thread * kStreams * kUnpackedSteps * kPanel;
  float *accumulators = job.accumulators + thread * kBlockM * kChunkPanels * kPanel;
  for (int64_t k0 = 0; k0 < kK; k0 += kBlockK) compute_block(job, segment, panel, end, unpacked, k0, accumulators);
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
  int64_t blocks = 0;
  for (int64_t s = 0; s < job.segment_count; s++) blocks += (job.segments[s].rows + kRows - 1) / kRows;
  for (int64_t block; (block = claim(job.next_block)) < blocks;) {
    pack_block(job, block);
    __atomic_fetch_add(&job.blocks_done, 1, __ATOMIC_RELEASE);
  }
  wait_for(job.blocks_done, blocks);
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
  job.weight = (const int32_t *)args[1];
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
  workspace += (4 * job.rows + 63) / 64 * 64;
  job.partial = (float *)workspace;
  workspace += (4 * job.rows * 2050 + 63) / 64 * 64;
  job.packed = (float *)workspace;
  workspace += (4 * job.rows * 768 + 63) / 64 * 64;
  job.unpacked = (float *)workspace;
  workspace += (4 * host->threads * 16384 + 63) / 64 * 64;
  job.accumulators = (float *)workspace;
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
