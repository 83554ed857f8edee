// Made by tilewright VERSION from templates/attention/cpu/prefill.cpp.jinja for aarch64_neon.
// attention stage=prefill heads=32 kv_heads=8 head_dim=80 value_dim=80 scale=0.11180339887498948 window=0 sinks=False
// page_size=0 kv_layout= q_dtype=fp32 kv_dtype=fp32 out_dtype=fp32
// block_keys=128 block_rows=64 key_panel=2 tile_rows=8 unroll=1 value_panel=3
// Prefill by a running softmax (FlashAttention, arXiv 2205.14135): 64 queries against 128 tokens at a time, in tiles of
// 8 rows. Keys and values are packed first, in panels of 2 and 3 vectors.

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

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

INLINE vec fold_2(vec a, vec b) {
  return SHUFFLE(a, b, 0, 1, 4, 5) +
         SHUFFLE(a, b, 2, 3, 6, 7);
}
INLINE vec fold_1(vec a, vec b) {
  return SHUFFLE(a, b, 0, 2, 4, 6) +
         SHUFFLE(a, b, 1, 3, 5, 7);
}

INLINE vec power_of_two(vec x) {
  const ivec vanishes = x < -126.0f;
  x = vanishes ? splat(-126.0f) : x;
  const vec rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  const vec shifted = x + rounder;
  const vec r = x - (shifted - rounder);
  vec p = splat(1.5403530e-4f);
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return vanishes ? vec{} : (vec)((ivec)p + ((ivec)shifted << 23));
}

INLINE vec larger(vec a, vec b) { return a > b ? a : b; }
INLINE vec largest_of(vec v) {
  v = larger(v, SHUFFLE(v, v, 2, 3, 0, 1));
  v = larger(v, SHUFFLE(v, v, 1, 0, 3, 2));
  return v;
}

INLINE vec sum_of(vec v) {
  v = v + SHUFFLE(v, v, 2, 3, 0, 1);
  v = v + SHUFFLE(v, v, 1, 0, 3, 2);
  return v;
}

constexpr int kHeads = 32;
constexpr int kKvHeads = 8;
constexpr int kGroup = 4;  // query heads of a key/value head
constexpr int kHeadDim = 80;
constexpr int kValueDim = 80;
constexpr int kValueVectors = 20;  // of a value
constexpr int kOutput = kValueVectors * kLanes;  // room for an output row, in whole vectors
constexpr float kScale = 0.16129820911147805f;  // of scores, so that their softmax takes powers of two
constexpr float kLowest = -1e30f;  // stands for the largest of no scores
constexpr float kHidden = -3e38f;  // score of a token that is not seen: nothing beside kLowest
constexpr int kRows = 8;  // queries of a register tile
constexpr int kKeys = 2 * kLanes;  // tokens of a panel of keys
constexpr int kValues = 3;  // vectors of a panel of values
constexpr int kValuePanels = (kValueVectors + kValues - 1) / kValues;
constexpr int kBlockRows = 64;  // queries of a block: tokens by heads of a group
constexpr int kBlockKeys = 128;  // tokens between two visits to the softmax
constexpr int64_t kPackTokens = 64;  // tokens that a thread packs at a time

struct Job {
  // Arguments of the call.
  const float *q;
  const float *k;
  const float *v;
  const int32_t *cu_seqlens;
  float *out;
  int64_t tokens;
  int64_t boundaries;
  char *workspace;
  float *keys;  // [kKvHeads, key_panels, kHeadDim, kKeys]; every sequence begins a panel
  float *values;  // [kKvHeads, kValuePanels, tokens, kValues * kLanes]
  char *scratch;  // [threads]
  int64_t key_panels;
  int64_t pack_units;
  int64_t row_blocks;  // of all sequences
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t next_pack;
  alignas(64) int64_t next_unit;
  alignas(64) int64_t next_thread;
};

INLINE int64_t claim(int64_t &counter) { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// What one thread works on.
struct alignas(64) Scratch {
  float q[kBlockRows * kHeadDim];  // tile by tile, the rows of a tile side by side
  float scores[kBlockRows * kBlockKeys];
  float sums[kBlockRows * kOutput];
  vec totals[kBlockRows];  // of exponentials, a share in each lane
  float largest[kBlockRows], factors[kBlockRows];
};
static_assert(sizeof(Scratch) <= 75520, "the recipe asks for too little");

// A block of queries and the part of its sequence that it sees.
struct Block {
  int64_t begin;  // first token of the sequence
  int64_t head;  // of keys and values
  int64_t row;  // first of the block, counted from the sequence's first query
  int64_t rows;
  int64_t panel;  // first panel of keys of the sequence
  int64_t token(int64_t r) const { return (row + r) / kGroup; }
  int64_t query(int64_t r) const { return (begin + token(r)) * kHeads + head * kGroup + (row + r) % kGroup; }
};

// The tokens that a query, or the queries of a tile together, see: [first, end).
struct Span { int64_t first, end; };

INLINE int64_t first_seen(int64_t token) {
  (void)token;
  return 0;
}

// What the tile from row r on sees of a block of keys; its beginning is that of a vector.
INLINE Span span_of(const Block &block, int64_t r, int64_t token) {
  const int64_t last = block.token(least(r + kRows, block.rows) - 1);
  const int64_t first = most(token, first_seen(block.token(r)) / kLanes * kLanes);
  return Span{first, least(token + kBlockKeys, last + 1)};
}

INLINE int64_t panels_of(int64_t tokens) { return (tokens + kKeys - 1) / kKeys; }

// Keys with tokens side by side, values in panels of columns.
void pack(const Job &job, int64_t head, int64_t sequence, int64_t panel, int64_t first, int64_t end) {
  const int64_t begin = job.cu_seqlens[sequence];
  for (int64_t token = first; token < end; token++) {
    const float *key = job.k + ((begin + token) * kKvHeads + head) * kHeadDim;
    float *to = job.keys + (head * job.key_panels + panel + token / kKeys) * kHeadDim * kKeys + token % kKeys;
    for (int d = 0; d < kHeadDim; d++) to[d * kKeys] = key[d];
    const float *value = job.v + ((begin + token) * kKvHeads + head) * kValueDim;
    float *row = job.values + (head * kValuePanels * job.tokens + begin + token) * kValues * kLanes;
    for (int p = 0; p < kValuePanels; p++, row += job.tokens * kValues * kLanes) {
      const int left = kValueDim - p * kValues * kLanes;
      for (int c = 0; c < kValues * kLanes; c++) row[c] = c < left ? value[p * kValues * kLanes + c] : 0;
    }
  }
}

void pack_all(void *data) {
  Job &job = *(Job *)data;
  int64_t sequence = 0, before = 0, panel = 0;
  for (;;) {
    const int64_t unit = claim(job.next_pack);
    if (unit >= job.pack_units * kKvHeads) return;
    // Heads of the same tokens follow each other.
    int64_t part = unit / kKvHeads, length;
    for (;; sequence++) {
      length = job.cu_seqlens[sequence + 1] - job.cu_seqlens[sequence];
      const int64_t parts = (length + kPackTokens - 1) / kPackTokens;
      if (part < before + parts) break;
      before += parts;
      panel += panels_of(length);
    }
    const int64_t first = (part - before) * kPackTokens;
    pack(job, unit % kKvHeads, sequence, panel, first, least(length, first + kPackTokens));
  }
}

// The queries of a block, scaled; rows that fill up the last tile are 0.
void load_queries(const Job &job, const Block &block, float *q) {
  for (int64_t r = 0; r < block.rows; r++) {
    const float *from = job.q + block.query(r) * kHeadDim;
    float *to = q + r / kRows * kRows * kHeadDim + r % kRows;
    for (int d = 0; d < kHeadDim; d++) to[d * kRows] = from[d] * kScale;
  }
  for (int64_t r = block.rows; r % kRows; r++) {
    float *to = q + r / kRows * kRows * kHeadDim + r % kRows;
    for (int d = 0; d < kHeadDim; d++) to[d * kRows] = 0;
  }
}

// Scores of a tile of queries with a panel of keys.
INLINE void score(const float *q, const float *panel, float *scores) {
  vec sums[kRows][2] = {};
#pragma GCC unroll 1
  for (int d = 0; d < kHeadDim; d++) {
    vec k[2];
#pragma GCC unroll 16
    for (int j = 0; j < 2; j++) k[j] = load(panel + d * kKeys + j * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) {
      const vec x = splat(q[d * kRows + m]);
#pragma GCC unroll 16
      for (int j = 0; j < 2; j++) sums[m][j] += x * k[j];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 16
    for (int j = 0; j < 2; j++) store(scores + m * kBlockKeys + j * kLanes, sums[m][j]);
  }
}

// sums[m] = factors[m] * sums[m] + weights[m] * values, the first V vectors of a panel of values.
template <int V>
INLINE void add_values(const float *values, int64_t count, const float *weights, const float *factors, float *sums) {
  vec total[kRows][V];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
    const vec factor = splat(factors[m]);
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) total[m][j] = factor * load(sums + m * kOutput + j * kLanes);
  }
#pragma GCC unroll 1
  for (int64_t t = 0; t < count; t++) {
    vec v[V];
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) v[j] = load(values + t * kValues * kLanes + j * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) {
      const vec weight = splat(weights[m * kBlockKeys + t]);
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) total[m][j] += weight * v[j];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) store(sums + m * kOutput + j * kLanes, total[m][j]);
  }
}

void score_block(const Job &job, const Block &block, Scratch &scratch, int64_t token, int64_t end) {
  const float *panels = job.keys + (block.head * job.key_panels + block.panel) * kHeadDim * kKeys;
  for (int64_t at = token; at < end; at += kKeys) {
    for (int64_t r = 0; r < block.rows; r += kRows) {
      const Span span = span_of(block, r, token);
      if (at >= span.end || at + kKeys <= span.first) continue;
      score(scratch.q + r * kHeadDim, panels + at * kHeadDim, scratch.scores + r * kBlockKeys + at - token);
    }
  }
}

// From the scores of a tile to weights relative to the largest score so far, and the factors that this brings for what
// was summed up. Tokens of the tile's span that a row does not see get a weight of 0.
void weigh(const Block &block, Scratch &scratch, int64_t r, int64_t token, Span span) {
  for (int64_t m = r; m < r + kRows; m++) {
    float *scores = scratch.scores + m * kBlockKeys - token;
    const int64_t own = block.token(least(m, block.rows - 1));
    const int64_t padded = token + (span.end - token + kLanes - 1) / kLanes * kLanes;
    for (int64_t t = most(span.first, own + 1); t < padded; t++) scores[t] = kHidden;
    const vec before = splat(scratch.largest[m]);
    vec largest = before;
    for (int64_t t = span.first; t < padded; t += kLanes) largest = larger(largest, load(scores + t));
    largest = largest_of(largest);
    const vec factor = power_of_two(before - largest);
    vec total = scratch.totals[m] * factor;
    for (int64_t t = span.first; t < padded; t += kLanes) {
      const vec weight = power_of_two(load(scores + t) - largest);
      store(scores + t, weight);
      total += weight;
    }
    scratch.totals[m] = total;
    scratch.largest[m] = largest[0];
    scratch.factors[m] = factor[0];
  }
}

void add_block(const Job &job, const Block &block, Scratch &scratch, int64_t token) {
  for (int p = 0; p < kValuePanels; p++) {
    const float *panel = job.values + ((block.head * kValuePanels + p) * job.tokens + block.begin) * kValues * kLanes;
    for (int64_t r = 0; r < block.rows; r += kRows) {
      const Span span = span_of(block, r, token);
      if (span.first >= span.end) continue;
      const float *values = panel + span.first * kValues * kLanes;
      const float *weights = scratch.scores + r * kBlockKeys + span.first - token;
      float *sums = scratch.sums + r * kOutput + p * kValues * kLanes;
      if (p == kValuePanels - 1) {
        add_values<2>(values, span.end - span.first, weights, scratch.factors + r, sums);
        continue;
      }
      add_values<kValues>(values, span.end - span.first, weights, scratch.factors + r, sums);
    }
  }
}

void attend(const Job &job, const Block &block, Scratch &scratch) {
  load_queries(job, block, scratch.q);
  __builtin_memset(scratch.sums, 0, sizeof(scratch.sums));
  for (int64_t r = 0; r < kBlockRows; r++) {
    scratch.largest[r] = kLowest;
    scratch.totals[r] = vec{};
  }
  const int64_t end = block.token(block.rows - 1) + 1;
  // Blocks of keys begin where they do for every query, so that a token's sums do not depend on its block of queries.
  for (int64_t token = first_seen(block.token(0)) / kBlockKeys * kBlockKeys; token < end; token += kBlockKeys) {
    score_block(job, block, scratch, token, least(token + kBlockKeys, end));
    for (int64_t r = 0; r < block.rows; r += kRows) {
      const Span span = span_of(block, r, token);
      if (span.first < span.end) weigh(block, scratch, r, token, span);
    }
    add_block(job, block, scratch, token);
  }
  for (int64_t r = 0; r < block.rows; r++) {
    const float factor = 1 / sum_of(scratch.totals[r])[0];
    float *out = job.out + block.query(r) * kValueDim;
    for (int d = 0; d < kValueDim; d++) out[d] = scratch.sums[r * kOutput + d] * factor;
  }
}

INLINE int64_t blocks_of(int64_t length) { return (length * kGroup + kBlockRows - 1) / kBlockRows; }

// Claims blocks of queries: head after head, of each the blocks that see most first, so that threads end together.
void run(void *data) {
  Job &job = *(Job *)data;
  const int64_t thread = claim(job.next_thread);
  Scratch &scratch = *(Scratch *)(job.scratch + thread * 75520);
  for (;;) {
    const int64_t unit = claim(job.next_unit);
    if (unit >= job.row_blocks * kKvHeads) return;
    Block block = {};
    block.head = unit / job.row_blocks;
    int64_t left = unit % job.row_blocks, sequence = 0, length;
    for (;; sequence++) {
      length = job.cu_seqlens[sequence + 1] - job.cu_seqlens[sequence];
      if (left < blocks_of(length)) break;
      left -= blocks_of(length);
      block.panel += panels_of(length);
    }
    block.begin = job.cu_seqlens[sequence];
    block.row = (blocks_of(length) - 1 - left) * kBlockRows;
    block.rows = least(kBlockRows, length * kGroup - block.row);
    attend(job, block, scratch);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int32_t tilewright_attention(const tw_host *host, const int64_t *args) {
  Job job = {};
  job.q = (const float *)args[0];
  job.k = (const float *)args[1];
  job.v = (const float *)args[2];
  job.cu_seqlens = (const int32_t *)args[3];
  job.out = (float *)args[4];
  job.tokens = (int64_t)args[5];
  job.boundaries = (int64_t)args[6];
  job.workspace = (char *)args[7];
  const int64_t threads = host->fork && host->threads > 1 ? host->threads : 1;
  for (int64_t s = 0; s + 1 < job.boundaries; s++) {
    const int64_t length = job.cu_seqlens[s + 1] - job.cu_seqlens[s];
    job.pack_units += (length + kPackTokens - 1) / kPackTokens;
    job.row_blocks += blocks_of(length);
    job.key_panels += panels_of(length);
  }
  job.scratch = job.workspace;
  job.keys = (float *)(job.scratch + threads * 75520);
  job.values = job.keys + kKvHeads * job.key_panels * kHeadDim * kKeys;
  const int64_t workers = least(threads, job.row_blocks * kKvHeads);
  if (workers > 1) {
    host->fork(pack_all, &job, workers, 0);
    host->fork(run, &job, workers, 0);
  } else {
    pack_all(&job);
    run(&job);
  }
  return 0;
}
