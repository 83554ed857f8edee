// Made by tilewright VERSION from templates/gating/cpu/insert.cpp.jinja for x86_64_avx2.
// gating experts=8 top_k=2 score=softmax renormalize=True bias=False groups=1 top_groups=1 scale=1.0 order=blocks
// block_size=64
// check=2 grain=32 insertion=selects scatter=parallel
// Gating by insertion: keys that beat the worst of the best so far are found by vectors, and inserted one by one.

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

INLINE uint64_t lane_mask(ivec comparison) {
  typedef float plain __attribute__((vector_size(32)));
  return (uint32_t)__builtin_ia32_movmskps256((plain)comparison);
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

constexpr int kExperts = 8;
constexpr int kTopK = 2;
constexpr float kScale = 1.0f;  // of all weights
constexpr float kInfinity = __builtin_inff();
constexpr int64_t kCounts = 16;  // counters of a unit: whole cache lines
constexpr int64_t kBlock = 64;  // rows of a block

struct Job {
  // Arguments of the call.
  const float *logits;
  int32_t *topk_ids;
  float *topk_weights;
  int32_t *expert_offsets;
  int32_t *row_token;
  int32_t *slot_row;
  int32_t *sorted_slots;
  int32_t *block_experts;
  int32_t *padded_rows;
  int64_t tokens;
  int64_t padded;
  int64_t blocks;
  int32_t *counts;  // [units, kCounts] choices of every expert; after summing, the row of the next one
  int32_t *shifts;  // [kExperts] from an expert's rows to its padded rows
  int64_t units;
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t next_unit;
  alignas(64) int64_t next_scatter;
};

INLINE int64_t claim(int64_t &counter) { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }
INLINE vec larger(vec a, vec b) { return a > b ? a : b; }
INLINE vec smaller(vec a, vec b) { return a < b ? a : b; }

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

// Puts a key of a later expert among the best, which are sorted and hold any.
INLINE void insert(float key, int expert, float *best, int32_t *ids) {
#pragma GCC unroll 16
  for (int at = kTopK - 1; at > 0; at--) {
    const bool before = key > best[at - 1], here = key > best[at];
    ids[at] = before ? ids[at - 1] : here ? expert : ids[at];
    best[at] = before ? best[at - 1] : here ? key : best[at];
  }
  ids[0] = key > best[0] ? expert : ids[0];
  best[0] = key > best[0] ? key : best[0];
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

constexpr int kCheck = 2;  // vectors that one branch decides about
constexpr int kStep = kCheck * kLanes;
constexpr int kAligned = (kTopK + kStep - 1) / kStep * kStep;  // where whole steps begin

void choose_best(const float *keys, int32_t *ids) {
  float best[kTopK];
  insert_first(keys, best, ids);
  for (int e = kTopK; e < kAligned && e < kExperts; e++) {
    if (keys[e] > best[kTopK - 1]) insert(keys[e], e, best, ids);
  }
  for (int e = kAligned; e < kPadded; e += kStep) {
    const vec worst = splat(best[kTopK - 1]);
    uint64_t found = 0;
#pragma GCC unroll 4
    for (int v = 0; v < kCheck; v++) {
      if (kVectors % kCheck && e + v * kLanes >= kPadded) break;
      found |= lane_mask((ivec)(load(keys + e + v * kLanes) > worst)) << (v * kLanes);
    }
    for (; found; found &= found - 1) {
      const int expert = e + __builtin_ctzll(found);
      if (keys[expert] > best[kTopK - 1]) insert(keys[expert], expert, best, ids);
    }
  }
}

INLINE void weigh(const float *logits, const int32_t *ids, float *weights) {
  alignas(64) float chosen[kChosen * kLanes];
  for (int j = 0; j < kTopK; j++) chosen[j] = logits[ids[j]];
  for (int j = kTopK; j < kChosen * kLanes; j++) chosen[j] = -kInfinity;
  // The first expert has the largest logit of all. What pads has a weight of e^-87.
  const vec largest = splat(chosen[0]);
  vec total = {};
  for (int j = 0; j < kChosen; j++) {
    const vec weight = exponential(load(chosen + j * kLanes) - largest);
    store(chosen + j * kLanes, weight);
    total += weight;
  }
  const float factor = kScale / sum_of(total);
  for (int j = 0; j < kTopK; j++) weights[j] = chosen[j] * factor;
}

void choose(const Job &job, int64_t token, int64_t end) {
  for (; token < end; token++) {
    const float *logits = job.logits + token * kExperts;
    const float *keys = logits;
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

// Padding, and the expert of every block. False when there is no room.
bool pad(const Job &job) {
  int64_t row = 0, block = 0;
  for (int e = 0; e < kExperts; e++) {
    const int64_t rows = job.expert_offsets[e + 1] - job.expert_offsets[e];
    const int64_t end = row + (rows + kBlock - 1) / kBlock * kBlock;
    if (end > job.padded || end / kBlock > job.blocks) return false;
    job.shifts[e] = row - job.expert_offsets[e];
    for (row += rows; row < end; row++) job.sorted_slots[row] = job.tokens * kTopK;
    for (; block < end / kBlock; block++) job.block_experts[block] = e;
  }
  *job.padded_rows = row;
  for (; row < job.padded; row++) job.sorted_slots[row] = job.tokens * kTopK;
  for (; block < job.blocks; block++) job.block_experts[block] = 0;
  return true;
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
        job.sorted_slots[row + job.shifts[expert]] = slot;
      }
    }
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int32_t tilewright_gating(const tw_host *host, const int64_t *args) {
  Job job = {};
  job.logits = (const float *)args[0];
  job.topk_ids = (int32_t *)args[1];
  job.topk_weights = (float *)args[2];
  job.expert_offsets = (int32_t *)args[3];
  job.row_token = (int32_t *)args[4];
  job.slot_row = (int32_t *)args[5];
  job.sorted_slots = (int32_t *)args[6];
  job.block_experts = (int32_t *)args[7];
  job.padded_rows = (int32_t *)args[8];
  job.tokens = (int64_t)args[9];
  job.padded = (int64_t)args[10];
  job.blocks = (int64_t)args[11];
  job.counts = (int32_t *)args[12];
  const int64_t most = job.tokens / 32;  // units worth a thread
  const int64_t threads = host->fork && host->threads > 1 ? host->threads : 1;
  job.units = most < 1 ? 1 : most < threads ? most : threads;
  job.shifts = job.counts + job.units * kCounts;
  if (job.units > 1) {
    host->fork(run, &job, job.units, 0);
  } else {
    run(&job);
  }
  sum_counts(job);
  if (!pad(job)) return 1;
  if (job.units > 1) {
    host->fork(scatter, &job, job.units, 0);
    return 0;
  }
  scatter(&job);
  return 0;
}
