// The few calls of ggml that the benchmark needs, behind plain types: ggml's headers return structures by value.
#include <stdlib.h>
#include <string.h>

#include "ggml-cpu.h"
#include "ggml.h"

struct experts {
  struct ggml_context* context;
  struct ggml_tensor* weights;
};

// weights [count, out, in] fp32 are copied.
struct experts* experts_new(int count, int out, int in, const float* weights) {
  const size_t bytes = (size_t)count * out * in * sizeof(float);
  struct ggml_init_params parameters = {bytes + (1 << 20), NULL, false};
  struct experts* self = malloc(sizeof *self);
  self->context = ggml_init(parameters);
  self->weights = ggml_new_tensor_3d(self->context, GGML_TYPE_F32, in, out, count);
  memcpy(self->weights->data, weights, bytes);
  return self;
}

void experts_free(struct experts* self) {
  ggml_free(self->context);
  free(self);
}

struct product {
  struct ggml_context* context;
  struct ggml_tensor* output;
  struct ggml_cgraph* graph;
  struct ggml_threadpool* threads;
  struct ggml_cplan plan;
};

// output [tokens, top_k, out] = weights[ids[token, choice]] x[token].  x [tokens, in] and ids [tokens, top_k] are copied.
struct product* product_new(struct experts* experts, int tokens, int top_k, const float* x, const int* ids, int threads) {
  const int64_t in = experts->weights->ne[0], out = experts->weights->ne[1];
  const size_t bytes = ((size_t)tokens * in + (size_t)tokens * top_k * (out + 1)) * sizeof(float);
  struct ggml_init_params parameters = {bytes + (1 << 20), NULL, false};
  struct product* self = malloc(sizeof *self);
  self->context = ggml_init(parameters);
  struct ggml_tensor* x_tensor = ggml_new_tensor_3d(self->context, GGML_TYPE_F32, in, 1, tokens);
  struct ggml_tensor* ids_tensor = ggml_new_tensor_2d(self->context, GGML_TYPE_I32, top_k, tokens);
  memcpy(x_tensor->data, x, ggml_nbytes(x_tensor));
  memcpy(ids_tensor->data, ids, ggml_nbytes(ids_tensor));
  self->output = ggml_mul_mat_id(self->context, experts->weights, x_tensor, ids_tensor);
  memset(self->output->data, 0xff, ggml_nbytes(self->output));  // NaN until computed
  self->graph = ggml_new_graph(self->context);
  ggml_build_forward_expand(self->graph, self->output);

  // The least polling: its threads stay awake from call to call, and sleep within 2 ms when another contender runs.
  struct ggml_threadpool_params pool = ggml_threadpool_params_default(threads);
  pool.poll = 1;
  self->threads = ggml_threadpool_new(&pool);
  self->plan = ggml_graph_plan(self->graph, threads, self->threads);
  self->plan.work_data = malloc(self->plan.work_size + 64);
  return self;
}

int product_run(struct product* self) { return ggml_graph_compute(self->graph, &self->plan); }

float* product_output(struct product* self) { return self->output->data; }

void product_free(struct product* self) {
  ggml_threadpool_free(self->threads);
  free(self->plan.work_data);
  ggml_free(self->context);
  free(self);
}
