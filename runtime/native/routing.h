/* Routing: which experts tokens go to, and the order in which experts compute them. */
#ifndef TILEWRIGHT_ROUTING_H
#define TILEWRIGHT_ROUTING_H

#include <stdbool.h>
#include <stdint.h>

/* Stable counting sort of picks by expert; -1 is a pick of another rank and gets no row. `ids` are int64 where
 * `wide`, else int32, [tokens, top_k]. Writes row_token [rows], expert_offsets [experts + 1], slot_row [tokens, top_k].
 * Returns the number of rows, or -1 when an id is out of range. */
int64_t tw_sort_tokens(const void *ids, bool wide, int64_t tokens, int64_t top_k, int64_t experts, int32_t *row_token,
                       int32_t *expert_offsets, int32_t *slot_row);

/* The top_k largest logits of each token, largest first, lower index first among equals, with their share of the
 * softmax over all experts (over the chosen ones where `renormalize`). Rows of `logits` are `row_stride` apart.
 * Returns -1, or the first token whose logits have no softmax (a NaN, +inf, or all -inf). */
int64_t tw_softmax_topk(const float *logits, int64_t row_stride, int64_t tokens, int64_t experts, int64_t top_k,
                        bool renormalize, int32_t *topk_ids, float *topk_weights);

#endif
