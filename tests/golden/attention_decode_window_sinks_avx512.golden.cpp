// Made by tilewright VERSION from templates/attention/cpu/decode.cpp.jinja for x86_64_avx512.
// attention stage=decode heads=64 kv_heads=8 head_dim=64 value_dim=64 scale=0.125 window=128 sinks=True page_size=16
// kv_layout=hnd q_dtype=fp32 kv_dtype=fp32 out_dtype=fp32
// block=64 chunk=512 grain=64 prefetch=along streams=2 tile_keys=4 tile_rows=4 tile_values=4 unroll=1
// Decoding: the 8 query heads of a key/value head read 4 keys together, in blocks of 64 that a softmax follows.

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

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

INLINE vec fold_8(vec a, vec b) {
  return SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
INLINE vec fold_4(vec a, vec b) {
  return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
INLINE vec fold_2(vec a, vec b) {
  return SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
         SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}
INLINE vec fold_1(vec a, vec b) {
  return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
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
  v = larger(v, SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = larger(v, SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = larger(v, SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = larger(v, SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return v;
}

INLINE vec sum_of(vec v) {
  v = v + SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v = v + SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v = v + SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  v = v + SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return v;
}

constexpr int kHeads = 64;
constexpr int kKvHeads = 8;
constexpr int kGroup = 8;  // query heads of a key/value head
constexpr int kHeadDim = 64;
constexpr int kValueDim = 64;
constexpr int kValueVectors = 4;  // of a value
constexpr int kOutput = kValueVectors * kLanes;  // room for an output row, in whole vectors
constexpr float kScale = 0.18033688011112042f;  // of scores, so that their softmax takes powers of two
constexpr int64_t kWindow = 128;  // tokens that a query sees
constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -1e30f;  // stands for the largest of no scores
constexpr float kHidden = -3e38f;  // score of a token that is not seen: nothing beside kLowest
constexpr int kPageSize = 16;
constexpr int64_t kTokenRows = 1;  // rows of the cache from a token to the next
constexpr int kKeyVectors = 4;  // of a key
constexpr int kQuery = kKeyVectors * kLanes;  // room for a query, in whole vectors
constexpr int kRows = 4;  // queries of a register tile
constexpr int64_t kStreams = 2;  // places of a block that are read in turn
constexpr int kKeys = 4;  // keys of a register tile
constexpr int kBlock = 64;  // tokens between two visits to the softmax
constexpr int64_t kChunk = 512;  // tokens of a sequence that one thread computes; part of the result's rounding
constexpr int64_t kGrain = 64;  // rows of the cache that are worth another thread
constexpr int64_t kPartial = kGroup * (kOutput + 2);  // floats of a chunk's result

struct Job {
  // Arguments of the call.
  const float *q;
  const float *k_cache;
  const float *v_cache;
  const int32_t *block_table;
  const int32_t *lengths;
  const float *sinks;
  float *out;
  int64_t tokens;
  int64_t table_pages;
  char *workspace;
  int32_t *finished;  // [tokens, kKvHeads] chunks that are done
  char *scratch;  // [threads]
  float *partials;  // [tokens, kKvHeads, most_chunks, kPartial]
  int64_t most_chunks;
  int64_t threads;
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t next_unit;
  alignas(64) int64_t next_thread;
};

INLINE int64_t claim(int64_t &counter) { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// What one thread works on.
struct alignas(64) Scratch {
  float q[kGroup * kQuery];
  float scores[kGroup * kBlock];
  float sums[kGroup * kOutput];
  vec totals[kGroup];  // of exponentials, a share in each lane
  float largest[kGroup], factors[kGroup];
  int64_t rows[2][kBlock];  // of the cache, for the tokens of this block and of the next
};
static_assert(sizeof(Scratch) <= 8000, "the recipe asks for too little");

struct Chunks { int64_t first, count; };

INLINE int64_t first_token(int64_t length) {
  return length > kWindow ? length - kWindow : 0;
}

INLINE Chunks chunks_of(int64_t length) {
  const int64_t first = first_token(length) / kChunk;
  return Chunks{first, (length - 1) / kChunk + 1 - first};
}

// The rows of the cache that hold tokens [token, end) of a sequence, kStreams apart.
INLINE void walk(const int32_t *table, int64_t head, int64_t token, int64_t end, int64_t *rows) {
  while (token < end) {
    const int64_t page = token / kPageSize, stop = least(end, (page + 1) * kPageSize);
    int64_t row = ((int64_t)table[page] * kKvHeads + head) * kPageSize + token % kPageSize * kTokenRows;
    for (; token < stop; token++, row += kTokenRows, rows += kStreams) *rows = row;
  }
}

// The same of a block, in the order in which they are read: from 2 places in turn, which memory serves faster than one. Padded to
// whole tiles with the last one.
INLINE void find_rows(const int32_t *table, int64_t head, int64_t token, int64_t end, int64_t *rows) {
  int64_t count = end - token;
  const int64_t run = count / kStreams;
  for (int64_t s = 0; s < kStreams; s++, token += run) walk(table, head, token, token + run, rows + s);
  for (int64_t at = run * kStreams; at < count; at++, token++) walk(table, head, token, token + 1, rows + at);
  for (; count % kKeys; count++) rows[count] = rows[count - 1];
}

// Scaled queries; whole vectors.
INLINE void load_queries(const float *from, float *q) {
  for (int r = 0; r < kGroup; r++) {
    for (int d = 0; d < kHeadDim; d++) q[r * kQuery + d] = from[r * kHeadDim + d] * kScale;
  }
}

// Where vector i of a key or a value begins: the last one may overlap the one before.
INLINE int key_column(int i) { return i * kLanes; }
INLINE int value_column(int i) { return i * kLanes; }

// Reads a row from end to end, for the cache: hardware sees streams coming in such reads, not in those of columns.
INLINE void read(const float *row, int floats) {
#pragma GCC unroll 16
  for (int i = 0; i < floats; i += 16) (void)*(const volatile float *)(row + i);
}

// Sums of the lanes of every vector, to neighbouring floats.
INLINE void store_sums(vec (&v)[kKeys], float *to) {
  v[0] = fold_8(v[0], v[1]);
  v[1] = fold_8(v[2], v[3]);
  v[0] = fold_4(v[0], v[1]);
  v[0] = fold_2(v[0], v[0]);
  v[0] = fold_1(v[0], v[0]);
  __builtin_memcpy(to, v, kKeys * sizeof(float));
}

// Scores of M queries with kKeys keys.
template <int M>
INLINE void score(const float *q, const float *const (&keys)[kKeys], float *scores) {
  vec sums[M][kKeys] = {};
#pragma GCC unroll 1
  for (int i = 0; i < kKeyVectors; i++) {
    vec k[kKeys];
#pragma GCC unroll 16
    for (int n = 0; n < kKeys; n++) k[n] = load(keys[n] + key_column(i));
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const vec x = load(q + m * kQuery + i * kLanes);
#pragma GCC unroll 16
      for (int n = 0; n < kKeys; n++) sums[m][n] += x * k[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) store_sums(sums[m], scores + m * kBlock);
}

// sums[m] = factors[m] * sums[m] + weights[m] * values, V vectors of M rows.
template <int M, int V>
INLINE void add_values(const float *values, const int64_t *rows, int64_t count, int first, const float *weights,
                       const float *factors, float *sums) {
  vec total[M][V];
  int columns[V];
#pragma GCC unroll 16
  for (int j = 0; j < V; j++) columns[j] = value_column(first + j);
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
    const vec factor = splat(factors[m]);
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) total[m][j] = factor * load(sums + m * kOutput + (first + j) * kLanes);
  }
#pragma GCC unroll 1
  for (int64_t t = 0; t < count; t++) {
    const float *row = values + rows[t] * kValueDim;
    vec v[V];
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) v[j] = load(row + columns[j]);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const vec weight = splat(weights[m * kBlock + t]);
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) total[m][j] += weight * v[j];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) store(sums + m * kOutput + (first + j) * kLanes, total[m][j]);
  }
}

void score_block(const Job &job, Scratch &scratch, const int64_t *rows, int64_t count) {
  for (int64_t t = 0; t < count; t += kKeys) {
    const float *keys[kKeys];
#pragma GCC unroll 16
    for (int n = 0; n < kKeys; n++) {
      keys[n] = job.k_cache + rows[t + n] * kHeadDim;
      read(job.v_cache + rows[t + n] * kValueDim, kValueDim);
    }
    int r = 0;
    for (; r + kRows <= kGroup; r += kRows) score<kRows>(scratch.q + r * kQuery, keys, scratch.scores + r * kBlock + t);
  }
}

// From scores to weights relative to the largest score so far, and the factors that this brings for what was summed up.
void weigh_block(Scratch &scratch, int64_t count) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int r = 0; r < kGroup; r++) {
    float *scores = scratch.scores + r * kBlock;
    for (int64_t t = count; t < padded; t++) scores[t] = kHidden;
    const vec before = splat(scratch.largest[r]);
    vec largest = before;
    for (int64_t t = 0; t < padded; t += kLanes) largest = larger(largest, load(scores + t));
    largest = largest_of(largest);
    const vec factor = power_of_two(before - largest);
    vec total = scratch.totals[r] * factor;
    for (int64_t t = 0; t < padded; t += kLanes) {
      const vec weight = power_of_two(load(scores + t) - largest);
      store(scores + t, weight);
      total += weight;
    }
    scratch.totals[r] = total;
    scratch.largest[r] = largest[0];
    scratch.factors[r] = factor[0];
  }
}

void add_block(const Job &job, Scratch &scratch, const int64_t *rows, int64_t count) {
  int r = 0;
  for (; r + kRows <= kGroup; r += kRows) {
    int j = 0;
    for (; j + 4 <= kValueVectors; j += 4) {
      add_values<kRows, 4>(job.v_cache, rows, count, j, scratch.scores + r * kBlock, scratch.factors + r,
                       scratch.sums + r * kOutput);
    }
  }
}

INLINE void write(const float *sums, float factor, float *out) {
  for (int j = 0; j < kValueVectors; j++) store(out + value_column(j), load(sums + j * kLanes) * factor);
}

// Puts the chunks of a sequence together, in their order, whoever computed them.
void combine(const float *partials, int64_t count, float *out) {
  for (int r = 0; r < kGroup; r++) {
    const float *largest = partials + kGroup * kOutput + r, *totals = largest + kGroup;
    float highest = kLowest;
    for (int64_t c = 0; c < count; c++) highest = largest[c * kPartial] > highest ? largest[c * kPartial] : highest;
    float total = 0;
    vec sums[kValueVectors] = {};
    for (int64_t c = 0; c < count; c++) {
      const float weight = power_of_two(splat(largest[c * kPartial] - highest))[0];
      total += weight * totals[c * kPartial];
      const float *from = partials + c * kPartial + r * kOutput;
      for (int j = 0; j < kValueVectors; j++) sums[j] += weight * load(from + j * kLanes);
    }
    float *to = out + r * kValueDim;
    for (int j = 0; j < kValueVectors; j++) store(to + value_column(j), sums[j] * (1 / total));
  }
}

void attend(const Job &job, Scratch &scratch, int64_t sequence, int64_t head, int64_t chunk) {
  const int64_t length = job.lengths[sequence];
  const Chunks chunks = chunks_of(length);
  const int32_t *table = job.block_table + sequence * job.table_pages;
  const int64_t start = most(first_token(length), (chunks.first + chunk) * kChunk);
  const int64_t end = least(length, (chunks.first + chunk + 1) * kChunk);
  load_queries(job.q + (sequence * kHeads + head * kGroup) * kHeadDim, scratch.q);
  __builtin_memset(scratch.sums, 0, sizeof(scratch.sums));
  for (int r = 0; r < kGroup; r++) {
    // A sink is a score without a value; one chunk has it.
    scratch.largest[r] = chunk ? kLowest : job.sinks[head * kGroup + r] * kLog2E;
    scratch.totals[r] = splat(chunk ? 0 : 1.0f / kLanes);
  }
  find_rows(table, head, start, least(start + kBlock, end), scratch.rows[0]);
  int side = 0;
  for (int64_t token = start; token < end; token += kBlock, side ^= 1) {
    const int64_t count = least(kBlock, end - token), next = token + kBlock;
    int64_t *const rows = scratch.rows[side];
    if (next < end) find_rows(table, head, next, least(next + kBlock, end), scratch.rows[side ^ 1]);
    score_block(job, scratch, rows, count);
    weigh_block(scratch, count);
    add_block(job, scratch, rows, count);
  }
  float *out = job.out + (sequence * kHeads + head * kGroup) * kValueDim;
  if (chunks.count == 1) {
    for (int r = 0; r < kGroup; r++) {
      write(scratch.sums + r * kOutput, 1 / sum_of(scratch.totals[r])[0], out + r * kValueDim);
    }
    return;
  }
  const int64_t pair = sequence * kKvHeads + head;
  float *partials = job.partials + pair * job.most_chunks * kPartial, *mine = partials + chunk * kPartial;
  __builtin_memcpy(mine, scratch.sums, sizeof(scratch.sums));
  for (int r = 0; r < kGroup; r++) {
    mine[kGroup * kOutput + r] = scratch.largest[r];
    mine[kGroup * (kOutput + 1) + r] = sum_of(scratch.totals[r])[0];
  }
  if (__atomic_add_fetch(&job.finished[pair], 1, __ATOMIC_ACQ_REL) == chunks.count) combine(partials, chunks.count, out);
}

// Claims chunks: of a sequence after the other, the heads of a chunk together, for their pages are neighbours.
void run(void *data) {
  Job &job = *(Job *)data;
  const int64_t thread = claim(job.next_thread);
  if (thread >= job.threads) return;
  Scratch &scratch = *(Scratch *)(job.scratch + thread * 8000);
  int64_t sequence = 0, before = 0;
  for (;;) {
    const int64_t unit = claim(job.next_unit);
    for (int64_t count; sequence < job.tokens; sequence++, before += count) {
      count = chunks_of(job.lengths[sequence]).count * kKvHeads;
      if (unit < before + count) break;
    }
    if (sequence == job.tokens) return;
    attend(job, scratch, sequence, (unit - before) % kKvHeads, (unit - before) / kKvHeads);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int32_t tilewright_attention(const tw_host *host, const int64_t *args) {
  Job job = {};
  job.q = (const float *)args[0];
  job.k_cache = (const float *)args[1];
  job.v_cache = (const float *)args[2];
  job.block_table = (const int32_t *)args[3];
  job.lengths = (const int32_t *)args[4];
  job.sinks = (const float *)args[5];
  job.out = (float *)args[6];
  job.tokens = (int64_t)args[7];
  job.table_pages = (int64_t)args[8];
  job.workspace = (char *)args[9];
  const int64_t threads = host->fork && host->threads > 1 ? host->threads : 1;
  job.most_chunks = (job.table_pages * kPageSize + kChunk - 1) / kChunk;
  const int64_t pairs = job.tokens * kKvHeads;
  job.finished = (int32_t *)job.workspace;
  job.scratch = job.workspace + (pairs + 15) / 16 * 64;
  job.partials = (float *)(job.scratch + threads * 8000);
  __builtin_memset(job.finished, 0, pairs * sizeof(int32_t));
  int64_t units = 0, rows = 0;
  for (int64_t sequence = 0; sequence < job.tokens; sequence++) {
    const int64_t length = job.lengths[sequence];
    units += chunks_of(length).count * kKvHeads;
    rows += (length - first_token(length)) * kKvHeads;
  }
  job.threads = least(least(threads, units), 1 + rows / kGrain);
  if (job.threads > 1) {
    host->fork(run, &job, job.threads, 0);
  } else {
    run(&job);
  }
  return 0;
}
