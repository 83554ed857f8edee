// Made by tilewright VERSION from templates/gating/cpu/threshold.cpp.jinja for x86_64_avx512.
// gating experts=256 top_k=8 score=sigmoid renormalize=True bias=True groups=8 top_groups=4 scale=2.5 order=rows
// block_size=0
// columns=1 grain=8 insertion=branches scatter=serial
// Gating by threshold: the kTopK-th largest of column maxima bounds the kTopK-th largest key from below; the few keys
// that reach the bound are ranked by counting who comes before them.

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

INLINE uint64_t lane_mask(ivec comparison) {
  typedef int plain __attribute__((vector_size(64)));
  return (uint16_t)__builtin_ia32_cvtd2mask512((plain)comparison);
}

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

constexpr int kExperts = 256;
constexpr int kTopK = 8;
constexpr float kScale = 2.5f;  // of all weights
constexpr float kInfinity = __builtin_inff();
constexpr int64_t kCounts = 256;  // counters of a unit: whole cache lines

struct Job {
  // Arguments of the call.
  const float *logits;
  const float *bias;
  int32_t *topk_ids;
  float *topk_weights;
  int32_t *expert_offsets;
  int32_t *row_token;
  int32_t *slot_row;
  int64_t tokens;
  int32_t *counts;  // [units, kCounts] choices of every expert; after summing, the row of the next one
  int64_t units;
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t next_unit;
  alignas(64) int64_t next_scatter;
};

INLINE int64_t claim(int64_t &counter) { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }
INLINE vec larger(vec a, vec b) { return a > b ? a : b; }
INLINE vec smaller(vec a, vec b) { return a < b ? a : b; }
INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

constexpr int kVectors = (kExperts + kLanes - 1) / kLanes;
constexpr int kPadded = kVectors * kLanes;  // keys of a token, in whole vectors
constexpr int kChosen = (kTopK + kLanes - 1) / kLanes;  // vectors of weights

INLINE float sum_of(vec v) {
  alignas(64) float lane[kLanes];
  store(lane, v);
#pragma GCC unroll 16
  for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma GCC unroll 16
    for (int l = 0; l < step; l++) lane[l] = lane[l] + lane[l + step];
  }
  return lane[0];
}

constexpr int kGroups = 8;
constexpr int kTopGroups = 4;
constexpr int kGroupSize = 32;

// Keys of experts outside of the best groups become -inf.
INLINE void rule_out_groups(float *keys) {
  float scores[kGroups];
  for (int g = 0; g < kGroups; g++) {
    const float *group = keys + g * kGroupSize;
    // Per lane, then over the lanes: the best and the second best.
    alignas(64) float first[kLanes], second[kLanes];
    vec best = load(group), next = splat(-kInfinity);
#pragma GCC unroll 8
    for (int e = kLanes; e < kGroupSize; e += kLanes) {
      const vec key = load(group + e);
      next = larger(next, smaller(best, key));
      best = larger(best, key);
    }
    store(first, best);
    store(second, next);
#pragma GCC unroll 16
    for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma GCC unroll 16
      for (int l = 0; l < step; l++) {
        const float a = first[l], b = first[l + step];
        const float other = second[l] > second[l + step] ? second[l] : second[l + step], lower = a < b ? a : b;
        second[l] = other > lower ? other : lower;
        first[l] = a > b ? a : b;
      }
    }
    scores[g] = first[0] + second[0];
  }
  for (int g = 0; g < kGroups; g++) {
    int better = 0;  // groups that come before this one
    for (int h = 0; h < kGroups; h++) better += (scores[h] > scores[g]) | ((scores[h] == scores[g]) & (h < g));
    if (better < kTopGroups) continue;
    for (int e = 0; e < kGroupSize; e++) keys[g * kGroupSize + e] = -kInfinity;
  }
}

// What experts are ranked by, in whole vectors: those beyond the last expert are -inf.
INLINE void make_keys(const Job &job, const float *logits, float *keys) {
  __builtin_memcpy(keys, logits, kExperts * sizeof(float));
  for (int e = kExperts; e < kPadded; e++) keys[e] = 0;
  for (int e = 0; e < kPadded; e += kLanes) store(keys + e, sigmoid(load(keys + e)));
  for (int e = 0; e < kExperts; e++) keys[e] += job.bias[e];
  for (int e = kExperts; e < kPadded; e++) keys[e] = -kInfinity;
  rule_out_groups(keys);
}

// Puts a key of a later expert among the best, which are sorted and hold a smaller one.
INLINE void insert(float key, int expert, float *best, int32_t *ids) {
  int at = kTopK - 1;
  for (; at > 0 && key > best[at - 1]; at--) {
    best[at] = best[at - 1];
    ids[at] = ids[at - 1];
  }
  best[at] = key;
  ids[at] = expert;
}

// The first kTopK keys in order.
INLINE void insert_first(const float *keys, float *best, int32_t *ids) {
  for (int e = 0; e < kTopK; e++) {
    int at = e;
    for (; at > 0 && keys[e] > best[at - 1]; at--) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = keys[e];
    ids[at] = e;
  }
}

INLINE float least_of(vec v) {
  alignas(64) float lane[kLanes];
  store(lane, v);
#pragma GCC unroll 16
  for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma GCC unroll 16
    for (int l = 0; l < step; l++) lane[l] = lane[l] < lane[l + step] ? lane[l] : lane[l + step];
  }
  return lane[0];
}

constexpr int kColumns = 1;  // vectors of column maxima
constexpr int kCandidates = 64;  // most keys that are ranked by counting
constexpr int kWordVectors = 64 / kLanes;  // vectors in a word of bits

// A key that at least kTopK keys reach.
INLINE vec lower_bound(const float *keys) {
  vec best[kColumns];
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; c++) best[c] = load(keys + c * kLanes);
  for (int v = kColumns; v < kVectors; v += kColumns) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) {
      if (kVectors % kColumns && v + c >= kVectors) break;
      best[c] = larger(best[c], load(keys + (v + c) * kLanes));
    }
  }
  alignas(64) float column[kColumns * kLanes];
  ivec larger_ones[kColumns] = {};
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; c++) store(column + c * kLanes, best[c]);
#pragma GCC unroll 8
  for (int i = 0; i < kColumns * kLanes; i++) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) larger_ones[c] -= (ivec)(splat(column[i]) > best[c]);
  }
  vec least = splat(kInfinity);
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; c++) least = smaller(least, larger_ones[c] < kTopK ? best[c] : splat(kInfinity));
  return splat(least_of(least));
}

// Sorted by inserting: for so many equal keys that counting takes no less.
__attribute__((noinline)) void insert_all(const float *keys, int32_t *ids) {
  float best[kTopK];
  insert_first(keys, best, ids);
  for (int e = kTopK; e < kExperts; e++) {
    if (keys[e] > best[kTopK - 1]) insert(keys[e], e, best, ids);
  }
}

void choose_best(const float *keys, int32_t *ids) {
  const vec bound = lower_bound(keys);
  uint64_t words[(kVectors + kWordVectors - 1) / kWordVectors] = {};
  int count = 0;
  for (int v = 0; v < kVectors; v += kWordVectors) {
    uint64_t word = 0;
#pragma GCC unroll 16
    for (int w = 0; w < kWordVectors; w++) {
      if (kVectors % kWordVectors && v + w >= kVectors) break;
      word |= lane_mask((ivec)(load(keys + (v + w) * kLanes) >= bound)) << (w * kLanes);
    }
    words[v / kWordVectors] = word;
    count += __builtin_popcountll(word);
  }
  if (count > kCandidates) return insert_all(keys, ids);
  alignas(64) float key[kCandidates + kLanes];
  alignas(64) int32_t expert[kCandidates + kLanes], ranked[kCandidates + kLanes], rank[kCandidates + kLanes];
  int found = 0;
  for (int w = 0; w * kWordVectors < kVectors; w++) {
    for (uint64_t word = words[w]; word; word &= word - 1, found++) {
      expert[found] = w * 64 + __builtin_ctzll(word);
      key[found] = keys[expert[found]];
    }
  }
  store(key + count, splat(-kInfinity));  // comes after all others
  for (int block = 0; block < count; block += kLanes) {
    const vec mine = load(key + block);
    ivec position, before = {};
    for (int l = 0; l < kLanes; l++) position[l] = block + l;
    for (int i = 0; i < count; i++) {
      const vec other = splat(key[i]);
      before -= (ivec)(other > mine) | ((ivec)(other == mine) & (ivec)(position > i));
    }
    __builtin_memcpy(rank + block, &before, sizeof before);
  }
  for (int i = 0; i < count; i++) ranked[rank[i]] = expert[i];
  __builtin_memcpy(ids, ranked, kTopK * sizeof(int32_t));
}

INLINE void weigh(const float *logits, const int32_t *ids, float *weights) {
  alignas(64) float chosen[kChosen * kLanes];
  for (int j = 0; j < kTopK; j++) chosen[j] = logits[ids[j]];
  for (int j = kTopK; j < kChosen * kLanes; j++) chosen[j] = -kInfinity;
  vec total = {};
  for (int j = 0; j < kChosen; j++) {
    const vec weight = sigmoid(load(chosen + j * kLanes));
    store(chosen + j * kLanes, weight);
    total += weight;
  }
  const float factor = kScale / sum_of(total);
  for (int j = 0; j < kTopK; j++) weights[j] = chosen[j] * factor;
}

void choose(const Job &job, int64_t token, int64_t end) {
  for (; token < end; token++) {
    const float *logits = job.logits + token * kExperts;
    alignas(64) float keys[kPadded];
    make_keys(job, logits, keys);
    int32_t ids[kTopK];
    choose_best(keys, ids);
    for (int j = 0; j < kTopK; j++) job.topk_ids[token * kTopK + j] = ids[j];
    weigh(logits, ids, job.topk_weights + token * kTopK);
  }
}

INLINE int64_t first_token(const Job &job, int64_t unit) { return unit * job.tokens / job.units; }

void run(void *data) {
  Job &job = *(Job *)data;
  for (int64_t unit; (unit = claim(job.next_unit)) < job.units;) {
    const int64_t token = first_token(job, unit), end = first_token(job, unit + 1);
    choose(job, token, end);
    int32_t *counts = job.counts + unit * kCounts;
    __builtin_memset(counts, 0, kExperts * sizeof(int32_t));
    for (int64_t slot = token * kTopK; slot < end * kTopK; slot++) counts[job.topk_ids[slot]]++;
  }
}

// From counts to the row at which each unit's choices of an expert begin.
void sum_counts(const Job &job) {
  int32_t row = 0;
  for (int e = 0; e < kExperts; e++) {
    job.expert_offsets[e] = row;
    for (int64_t unit = 0; unit < job.units; unit++) {
      const int32_t count = job.counts[unit * kCounts + e];
      job.counts[unit * kCounts + e] = row;
      row += count;
    }
  }
  job.expert_offsets[kExperts] = row;
}

void scatter(void *data) {
  Job &job = *(Job *)data;
  for (int64_t unit; (unit = claim(job.next_scatter)) < job.units;) {
    int32_t *next_row = job.counts + unit * kCounts;
    const int64_t end = first_token(job, unit + 1);
    for (int64_t token = first_token(job, unit); token < end; token++) {
      for (int64_t slot = token * kTopK; slot < (token + 1) * kTopK; slot++) {
        const int32_t expert = job.topk_ids[slot], row = next_row[expert]++;
        job.slot_row[slot] = row;
        job.row_token[row] = token;
      }
    }
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int32_t tilewright_gating(const tw_host *host, const int64_t *args) {
  Job job = {};
  job.logits = (const float *)args[0];
  job.bias = (const float *)args[1];
  job.topk_ids = (int32_t *)args[2];
  job.topk_weights = (float *)args[3];
  job.expert_offsets = (int32_t *)args[4];
  job.row_token = (int32_t *)args[5];
  job.slot_row = (int32_t *)args[6];
  job.tokens = (int64_t)args[7];
  job.counts = (int32_t *)args[8];
  const int64_t most = job.tokens / 8;  // units worth a thread
  const int64_t threads = host->fork && host->threads > 1 ? host->threads : 1;
  job.units = most < 1 ? 1 : most < threads ? most : threads;
  if (job.units > 1) {
    host->fork(run, &job, job.units, 0);
  } else {
    run(&job);
  }
  sum_counts(job);
  scatter(&job);
  return 0;
}
