// Made by tilewright VERSION from templates/moe_gemm/cpu/integer.cpp.jinja for x86_64_avx2.
// moe_gemm stage=up experts=8 n=1792 k=4096 top_k=2 activation=swiglu bias=False x_dtype=fp32 w_dtype=fp32
// out_dtype=fp32
// block_m=96 block_rows=6 chunk_groups=4 combine=none fetch_next=False gate_up=interleaved pack_x=True
// precision=int8_a8 prefetch=16 schedule=dynamic streams=1 unroll=1 vectors=2
// Grouped GEMM of integers: rows of x are rounded to int8 first, then register tiles of 6 rows by 2 vectors.

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
constexpr int64_t kChunkPanels = 4;  // panels of one task
constexpr int64_t kChunks = (kPanels + kChunkPanels - 1) / kChunkPanels;
constexpr int64_t kBlockM = 96;  // rows of one task
constexpr int kRows = 6;  // rows of a register tile
constexpr int kStreams = 1;  // neighbouring panels of a register tile

constexpr int kSteps = 4;  // steps of k in a word
constexpr int64_t kRow = 16;  // words of a row of a panel
constexpr int64_t kPanelRows = 1025;  // of elements and of their scales
constexpr int64_t kVectorStride = kLanes;  // words between vectors of a row
constexpr int64_t kGroup = 4096;  // steps of k that share a scale
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
  return __builtin_convertvector((w << (24 - 8 * t)) >> 24, vec);
}

// Words with the scales of a group.
INLINE words load_scales(const int32_t *panel, int64_t group) {
  return load_words(panel + group / kScalesPerRow * (kScalesPerRow * kGroupRows + 1) * kRow);
}

INLINE vec scale_of(words w, int64_t) { return (vec)w; }

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
  int32_t *quantised;
  float *x_scales;
  int64_t segment_count, tasks, units;
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t threads_started;
  alignas(64) int64_t next_unit;
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

// Fetches the 16th row after this one.
INLINE void prefetch(const int32_t *row) {
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; j += 16 / kLanes) {  // one per cache line
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

typedef int16_t halves __attribute__((vector_size(32)));
typedef int16_t small __attribute__((may_alias));  // of an activation
constexpr int64_t kXWords = 2;  // of activations beside one word of weights

// A word's even bytes and its odd ones, as words of 16 bits: no sum of two products exceeds 32 bits.
struct Factors { words even, odd; };

INLINE Factors factors(words w) { return {(words)(((halves)w << 8) >> 8), (words)((halves)w >> 8)}; }

// Where step k of a row of x lies: even steps of four, then odd ones.
INLINE int64_t place(int64_t k) { return k / 4 * 4 + k % 2 * 2 + k % 4 / 2; }

INLINE words pair_products(words a, words b) {
  words sums;
  asm("vpmaddwd %2, %1, %0" : "=x"(sums) : "x"(a), "x"(b));
  return sums;
}

// sum += the products of a word's four steps
INLINE void add_products(words &sum, Factors w, const int32_t *x) {
  sum += pair_products(w.even, x[0] - words{});
  sum += pair_products(w.odd, x[1] - words{});
}

// To the nearest whole number, ties to even; an instruction of its own, since a product and a sum would become one.
INLINE ivec nearest(vec v) {
  ivec whole;
  asm("vcvtps2dq %1, %0" : "=x"(whole) : "x"(v));
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
  for (int64_t k = 0; k < end; k += kLanes) {
    const ivec whole = nearest(load_part(x, k) * inverse);
    for (int l = 0; l < kLanes && k + l < end; l++) to[place(k + l)] = whole[l];
  }
}

// sums[s][i][j] += the products of one row of words of each panel.
template <int M, int S>
INLINE void multiply(words (&sums)[S][M][kVectors], const int32_t *const (&x)[M], int64_t at, const int32_t *row) {
#pragma GCC unroll 16
  for (int s = 0; s < S; s++) {
    const int32_t *from = row + s * kPanelRows * kPanel;
    prefetch(from);
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
    x_row[i] = job.row_token[row + i];
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
        for (int j = 0; j < kVectors; j++) sums[s][i][j] = words{};
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
    case 5: return tile<5, S>(job, expert, row, panel);
    case 6: return tile<6, S>(job, expert, row, panel);
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

void run(void *data) {
  Job &job = *(Job *)data;
  const int64_t thread = claim(job.threads_started);
  const int64_t x_rows = job.tokens;
  for (int64_t row; (row = claim(job.next_row)) < x_rows;) {
    quantise_row(job, row);
    __atomic_fetch_add(&job.rows_done, 1, __ATOMIC_RELEASE);
  }
  wait_for(job.rows_done, x_rows);
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
  workspace += (12 * (8 + job.rows / 96) + 63) / 64 * 64;
  job.quantised = (int32_t *)workspace;
  workspace += (4 * job.tokens * 2048 + 63) / 64 * 64;
  job.x_scales = (float *)workspace;
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
