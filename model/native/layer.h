/* What stands between the products of a layer, for the calls that run a whole part of one (decoder.c). */
#ifndef EXPERTMESH_LAYER_H
#define EXPERTMESH_LAYER_H

#include "linear.h"

struct rotate_call {
    float *q;                  /* [T, A, D] */
    const float *qkv;          /* [T, A + 2G, D] */
    const float *cos, *sin;    /* [T, D]; sin of the first half negative */
    const int64_t *cache_rows; /* [T, G] */
    char *k, *v;               /* as below; a row is a key of a head */
    int32_t num_heads, num_kv_heads, head_dim, block_size, kv_is_bfloat16;
};

/* As `model.kv_cache.keys_together`. */
static inline int keys_together(int block_size) { return block_size % 16 ? 1 : 16; }

struct attention_call {
    float *out;                  /* [T, A, D] */
    const float *q;              /* [T, A, D] */
    const char *k;               /* float32 or bfloat16 [num_blocks, G, block_size / 16, words, 16], words of 4 bytes */
    const char *v;               /* [num_blocks, G, block_size, D], of the same kind */
    const int32_t *block_ids;    /* [S, max_blocks] */
    const int32_t *query_starts; /* [S + 1] */
    const int32_t *context_lens; /* [S], the new tokens included */
    int32_t num_sequences, num_heads, num_kv_heads, head_dim, block_size, max_blocks;
    int32_t window;              /* keys a token sees, its own included; 0: all */
    int32_t kv_is_bfloat16;
    float scale;
};

/* x [num_rows, width] += delta (or NULL); y = x / sqrt(mean(x^2) + eps) * weight */
void AT_LEVEL(add_norm)(float *x, const float *delta, const float *weight, float eps, int num_rows, int width,
                        float *y, int num_threads);

/* Rotates queries and keys; keys and values go to their rows of the cache. */
void AT_LEVEL(rotate_into_cache)(const struct rotate_call *call, int num_rows, int num_threads);

/* head_dim a multiple of 16 up to 256, block_size a multiple of 16, num_heads / num_kv_heads at most 192. */
void AT_LEVEL(paged_attention)(const struct attention_call *call, int num_threads);

/* The experts of each row: logits [num_rows, num_experts + 1], of which the last is handed on as shared_gate
 * [num_rows]. ids and weights [num_rows, top_k], most probable first, the lower id among equals. */
void AT_LEVEL(topk_softmax)(const float *logits, int num_rows, int num_experts, int top_k, int normalize, int64_t *ids,
                            float *weights, float *shared_gate, int num_threads);

/* out [num_rows, inner] of h [num_rows, 2 inner] */
void AT_LEVEL(swiglu)(const float *h, int num_rows, int inner, float *out, int num_threads);

/* y [num_rows, num_outputs] = x [num_rows, num_inputs] @ weight.T + bias (or NULL). */
void AT_LEVEL(linear)(const struct weight *w, const float *x, int num_rows, const float *bias, float *y,
                      int num_threads);

#endif
