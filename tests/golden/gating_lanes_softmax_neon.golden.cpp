// Made by tilewright VERSION from templates/gating/cpu/lanes.cpp.jinja for aarch64_neon.
// gating experts=60 top_k=4 score=softmax renormalize=False bias=False groups=1 top_groups=1 scale=1.0 order=none
// block_size=0
// grain=128 scatter=none skip=True vectors=2
// Gating with a token in every lane: each expert's keys of 8 tokens go down a sorted list at once, without branches but one.

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

INLINE uint64_t lane_mask(ivec comparison) {
  uint64_t bits = 0;
  for (int l = 0; l < kLanes; l++) bits |= (uint64_t)(comparison[l] & 1) << l;
  return bits;
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

constexpr int kExperts = 60;
constexpr int kTopK = 4;
constexpr float kScale = 1.0f;  // of all weights
constexpr float kInfinity = __builtin_inff();

struct Job {
  // Arguments of the call.
  const float *logits;
  int32_t *topk_ids;
  float *topk_weights;
  int64_t tokens;
  int64_t units;
  // Counters that threads claim work from; each on a cache line of its own.
  alignas(64) int64_t next_unit;
};

INLINE int64_t claim(int64_t &counter) { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }
INLINE vec larger(vec a, vec b) { return a > b ? a : b; }
INLINE vec smaller(vec a, vec b) { return a < b ? a : b; }

constexpr int kVectors = 2;
constexpr int kTokens = kVectors * kLanes;  // that are processed together

// Puts keys of a later expert in their place among the best, which are sorted; NaN stands for none yet.
INLINE void insert(vec key, int32_t expert, vec (&best)[kTopK], ivec (&ids)[kTopK]) {
  const ivec id = expert - ivec{};
  ivec stays = (ivec)(key <= best[kTopK - 1]);
  if (lane_mask(stays) == 0xf) return;
#pragma GCC unroll 16
  for (int j = kTopK - 1; j > 0; j--) {
    const ivec stays_before = (ivec)(key <= best[j - 1]);
    best[j] = stays ? best[j] : stays_before ? key : best[j - 1];
    ids[j] = stays ? ids[j] : stays_before ? id : ids[j - 1];
    stays = stays_before;
  }
  best[0] = stays ? best[0] : key;
  ids[0] = stays ? ids[0] : id;
}

// Up to kTokens tokens; the last one fills lanes that are left.
void choose_together(const Job &job, int64_t token, int64_t count) {
  const float *rows[kTokens];
  for (int l = 0; l < kTokens; l++) rows[l] = job.logits + (token + (l < count ? l : count - 1)) * kExperts;
  vec best[kVectors][kTopK];
  ivec ids[kVectors][kTopK] = {};
  for (int v = 0; v < kVectors; v++) {
    for (int j = 0; j < kTopK; j++) best[v][j] = splat(__builtin_nanf(""));
  }
  vec logits[kExperts][kVectors];
  for (int e = 0; e < kExperts; e++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      vec key;
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; l++) key[l] = rows[v * kLanes + l][e];
      logits[e][v] = key;
      insert(key, e, best[v], ids[v]);
    }
  }
  for (int v = 0; v < kVectors; v++) {
    vec weights[kTopK];
    alignas(64) int32_t id[kTopK][kLanes];
    __builtin_memcpy(id, ids[v], sizeof id);
    for (int j = 0; j < kTopK; j++) {
      weights[j] = exponential(best[v][j] - best[v][0]);
    }
    vec total = {};
    for (int e = 0; e < kExperts; e++) total += exponential(logits[e][v] - best[v][0]);
    const vec factor = kScale / total;
    alignas(64) float weight[kTopK][kLanes];
    for (int j = 0; j < kTopK; j++) store(weight[j], weights[j] * factor);
    for (int l = 0; l < kLanes && v * kLanes + l < count; l++) {
      const int64_t slot = (token + v * kLanes + l) * kTopK;
      for (int j = 0; j < kTopK; j++) {
        job.topk_ids[slot + j] = id[j][l];
        job.topk_weights[slot + j] = weight[j][l];
      }
    }
  }
}

void choose(const Job &job, int64_t token, int64_t end) {
  for (; token < end; token += kTokens) choose_together(job, token, end - token < kTokens ? end - token : kTokens);
}

INLINE int64_t first_token(const Job &job, int64_t unit) { return unit * job.tokens / job.units; }

void run(void *data) {
  Job &job = *(Job *)data;
  for (int64_t unit; (unit = claim(job.next_unit)) < job.units;) {
    const int64_t token = first_token(job, unit), end = first_token(job, unit + 1);
    choose(job, token, end);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int32_t tilewright_gating(const tw_host *host, const int64_t *args) {
  Job job = {};
  job.logits = (const float *)args[0];
  job.topk_ids = (int32_t *)args[1];
  job.topk_weights = (float *)args[2];
  job.tokens = (int64_t)args[3];
  const int64_t most = job.tokens / 128;  // units worth a thread
  const int64_t threads = host->fork && host->threads > 1 ? host->threads : 1;
  job.units = most < 1 ? 1 : most < threads ? most : threads;
  if (job.units > 1) {
    host->fork(run, &job, job.units, 0);
  } else {
    run(&job);
  }
  return 0;
}
