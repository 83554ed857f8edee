// Made by tilewright VERSION from templates/moe_gemm/cpu/integer.cpp.jinja for x86_64_avx512_vnni.
// moe_gemm stage=down experts=128 n=2050 k=768 top_k=8 activation=none bias=True x_dtype=fp32 w_dtype=fp32
// out_dtype=fp32
// block_m=192 block_rows=4 chunk_groups=2 combine=partials fetch_next=False gate_up=none pack_x=True
// precision=int8g128_a8 prefetch=0 schedule=static streams=3 unroll=1 vectors=1
// Grouped GEMM of integers: rows of x are rounded to int8 first, then register tiles of 4 rows by 3 vectors.

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
constexpr int kVectors = 1;  // vectors in a row of a weight panel
constexpr int kPanel = kVectors * kLanes;  // columns of a weight panel
constexpr int kOutVectors = kVectors / kHalves;
constexpr int kOutPanel = kOutVectors * kLanes;  // output columns of a panel
constexpr int64_t kPanels = (kN + kOutPanel - 1) / kOutPanel;
constexpr int64_t kChunkPanels = 6;  // panels of one task
constexpr int64_t kChunks = (kPanels + kChunkPanels - 1) / kChunkPanels;
constexpr int64_t kBlockM = 192;  // rows of one task
constexpr int kRows = 4;  // rows of a register tile
constexpr int kStreams = 3;  // neighbouring panels of a register tile

constexpr int kSteps = 4;  // steps of k in a word
constexpr int64_t kRow = 16;  // words of a row of a panel
constexpr int64_t kPanelRows = 198;  // of elements and of their scales
constexpr int64_t kVectorStride = kLanes;  // words between vectors of a row
constexpr int64_t kGroup = 128;  // steps of k that share a scale
constexpr int64_t kGroups = kK / kGroup;
constexpr int64_t kGroupRows = (kGroup + kSteps - 1) / kSteps;
constexpr int64_t kScalesPerRow = 1;  // groups whose scales share a row

typedef int32_t words __attribute__((vector_size(64), aligned(4), may_alias));

INLINE words load_words(const int32_t *p) { return *(const words *)p; }

// First row of a group's elements.
INLINE const int32_t *group_rows(const int32_t *panel, int64_t group) {
  return panel + (group * kGroupRows + group / kScalesPerRow + 1) * kRow;
}

// The elements of step t of a row of words; t is a constant once loops are unrolled.
INLINE vec unpack(words w, int t) {
  return __builtin_convertvector((w << (24 - 8 * t)) >> 24, vec);
}

// Words with the scales of a group.
INLINE words load_scales(const int32_t *panel, int64_t group) {
  return load_words(panel + group / kScalesPerRow * (kScalesPerRow * kGroupRows + 1) * kRow);
}

INLINE vec scale_of(words w, int64_t) { return (vec)w; }

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
  int32_t *quantised;
  float *x_scales;
  int32_t *x_sums;
  int64_t segment_count, tasks, units;
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t threads_started;
  alignas(64) int64_t next_unit;
  alignas(64) int64_t units_done;
  alignas(64) int64_t next_token;
  alignas(64) int64_t next_row;
  alignas(64) int64_t rows_done;
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

typedef int8_t small __attribute__((may_alias));  // of an activation
constexpr int64_t kXWords = 1;  // of activations beside one word of weights

typedef words Factors;

// The instruction takes one factor without a sign, so weights have 128 added, of which sums are freed by how they begin.
INLINE Factors factors(words w) { return w ^ (int32_t)0x80808080; }

// Where step k of a row of x lies.
INLINE int64_t place(int64_t k) { return k; }

// sum += the products of a word's four steps
INLINE void add_products(words &sum, Factors w, const int32_t *x) {
  const words splat = *x - words{};
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(splat));
}

// To the nearest whole number, ties to even; an instruction of its own, since a product and a sum would become one.
INLINE ivec nearest(vec v) {
  ivec whole;
  asm("vcvtps2dq %1, %0" : "=v"(whole) : "v"(v));
  return whole;
}

constexpr int64_t kXRow = kGroups * kGroupRows * kXWords;  // words of a row of x
constexpr float kTiny = 0x1p-100f;  // a row whose largest value is smaller counts as zeros

// kLanes values of a row of x from k on; zeros behind its end.
INLINE vec load_part(const float *x, int64_t k) {
  if (kK % kLanes == 0 || k + kLanes <= kK) return load(x + k);
  float part[kLanes] = {};
  for (int64_t l = 0; l < kK - k; l++) part[l] = x[k + l];
  return load(part);
}

// One row of x as integers times a scale: the largest is 127. Of a row that holds NaN or infinity all results are NaN.
void quantise_row(const Job &job, int64_t row) {
  const float *x = job.x + row * kK;
  const int32_t infinity = 0x7f800000;
  int32_t largest = 0;  // bits of a magnitude: they order as the numbers do, NaN behind infinity
  ivec most = {};
  for (int64_t k = 0; k < kK; k += kLanes) {
    const ivec bits = (ivec)load_part(x, k) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  for (int l = 0; l < kLanes; l++) largest = most[l] > largest ? most[l] : largest;
  float range;
  __builtin_memcpy(&range, &largest, sizeof range);
  const float inverse = range < kTiny ? 0.0f : 127.0f / range;
  job.x_scales[row] = range < kTiny ? 0.0f : largest < infinity ? range / 127.0f : __builtin_nanf("");
  small *to = (small *)(job.quantised + row * kXRow);
  const int64_t end = kXRow / kXWords * 4;
  int32_t *sums = job.x_sums + row * kGroups;
  for (int64_t g = 0; g < kGroups; g++) sums[g] = 0;
  for (int64_t k = 0; k < end; k += kLanes) {
    const ivec whole = nearest(load_part(x, k) * inverse);
    for (int l = 0; l < kLanes; l++) sums[k / kGroup] += (int8_t)whole[l];
    for (int l = 0; l < kLanes && k + l < end; l++) to[place(k + l)] = whole[l];
  }
}

// sums[s][i][j] += the products of one row of words of each panel.
template <int M, int S>
INLINE void multiply(words (&sums)[S][M][kVectors], const int32_t *const (&x)[M], int64_t at, const int32_t *row) {
#pragma GCC unroll 16
  for (int s = 0; s < S; s++) {
    const int32_t *from = row + s * kPanelRows * kPanel;
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; j++) {
      const Factors w = factors(load_words(from + j * kVectorStride));
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) add_products(sums[s][i][j], w, x[i] + at);
    }
  }
}

template <int M, int S>
INLINE void tile(const Job &job, int64_t expert, int64_t row, int64_t panel) {
  const int32_t *x[M];
  int64_t x_row[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) {
    x_row[i] = row + i;
    x[i] = job.quantised + x_row[i] * kXRow;
  }
  const int32_t *weights = weight_panel(job, expert, panel);
  vec results[S][M][kVectors] = {};
  for (int64_t g = 0; g < kGroups; g++) {
    words sums[S][M][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) {
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; j++) sums[s][i][j] = -128 * job.x_sums[x_row[i] * kGroups + g] - words{};
      }
    }
    const int32_t *from = group_rows(weights, g);
#pragma GCC unroll 1
    for (int64_t r = 0; r < kGroupRows; r++) multiply(sums, x, (g * kGroupRows + r) * kXWords, from + r * kRow);
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; j++) {
        const vec scale = scale_of(load_scales(weights + s * kPanelRows * kPanel + j * kVectorStride, g), g);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) results[s][i][j] += __builtin_convertvector(sums[s][i][j], vec) * scale;
      }
    }
  }
#pragma GCC unroll 16
  for (int s = 0; s < S; s++) {
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; j++) results[s][i][j] *= job.x_scales[x_row[i]];
    }
    finish_tile<M>(job, expert, row, panel + s, results[s]);
  }
}

template <int S>
void tile_of(int64_t rows, const Job &job, int64_t expert, int64_t row, int64_t panel) {
  switch (rows) {
    case 1: return tile<1, S>(job, expert, row, panel);
    case 2: return tile<2, S>(job, expert, row, panel);
    case 3: return tile<3, S>(job, expert, row, panel);
    case 4: return tile<4, S>(job, expert, row, panel);
  }
}

void compute(const Job &job, const Segment &segment, int64_t panel, int64_t end, int64_t) {
  for (; panel < end; panel += kStreams) {
    for (int64_t r = 0; r < segment.rows; r += kRows) {
      const int64_t rows = segment.rows - r < kRows ? segment.rows - r : kRows;
      tile_of<kStreams>(rows, job, segment.expert, segment.row + r, panel);
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
  const int64_t x_rows = job.rows;
  for (int64_t row; (row = claim(job.next_row)) < x_rows;) {
    quantise_row(job, row);
    __atomic_fetch_add(&job.rows_done, 1, __ATOMIC_RELEASE);
  }
  wait_for(job.rows_done, x_rows);
  for (int64_t unit; (unit = claim(job.next_unit)) < job.units;) {
    const int64_t end = (unit + 1) * job.tasks / job.units;
    for (int64_t task = unit * job.tasks / job.units; task < end; task++) run_task(job, task, thread);
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
  workspace += (12 * (128 + job.rows / 192) + 63) / 64 * 64;
  job.row_slot = (int32_t *)workspace;
  workspace += (4 * job.rows + 63) / 64 * 64;
  job.partial = (float *)workspace;
  workspace += (4 * job.rows * 2050 + 63) / 64 * 64;
  job.quantised = (int32_t *)workspace;
  workspace += (4 * job.rows * 192 + 63) / 64 * 64;
  job.x_scales = (float *)workspace;
  workspace += (4 * job.rows + 63) / 64 * 64;
  job.x_sums = (int32_t *)workspace;
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
  job.units = job.tasks < threads ? job.tasks : threads;
  if (threads > 1) {
    host->fork(run, &job, threads, 0);
  } else {
    run(&job);
  }
  return 0;
}
