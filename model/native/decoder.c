/* The parts of a decoder layer, each in one call: attention, the way to the experts, and a SwiGLU MLP.
 *
 * Called one by one from Python, their dozen pieces cost a third of a small model's step. What lies between the pieces
 * stays in scratch memory, in groups of rows where it is wide.
 */
#include "layer.h"

enum { GROUP_BYTES = 24 << 20, LEAST_GROUP = 64 };

/* Rows of even groups, so that what is `width` wide for one of them takes some GROUP_BYTES at most. */
static int rows_of_a_group(int num_rows, int width) {
    int most = GROUP_BYTES / (4 * width);
    if (most < LEAST_GROUP) most = LEAST_GROUP;
    return num_rows == 0 ? 1 : ceil_div(num_rows, ceil_div(num_rows, most));
}

struct attention_layer {
    float *x;                    /* [T, H] */
    const float *delta;          /* [T, H] or NULL */
    const float *norm;           /* [H] */
    const struct weight *qkv;    /* [(A + 2G) D, H] */
    const float *qkv_bias;       /* or NULL */
    const struct weight *o;      /* [H, A D] */
    const float *cos, *sin;      /* as in rotate_call */
    const int64_t *cache_rows;
    char *k, *v;                 /* as in attention_call */
    const int32_t *block_ids, *query_starts, *context_lens;
    float *y;                    /* [T, H] */
    int32_t num_tokens, num_sequences, num_heads, num_kv_heads, head_dim, block_size, max_blocks;
    int32_t window, kv_is_bfloat16;
    float eps, scale;
};

/* x += delta; y = o(attention(norm(x))), with the new keys and values written into their cache. */
void AT_LEVEL(attention_layer)(const struct attention_layer *l, int num_threads) {
    int T = l->num_tokens, H = l->qkv->num_inputs, width = l->qkv->num_outputs, group = rows_of_a_group(T, width);
    int D = l->head_dim, heads_width = l->num_heads * D;
    size_t normed_bytes = (size_t)group * H * sizeof(float), qkv_bytes = (size_t)group * width * sizeof(float);
    size_t q_bytes = (size_t)T * heads_width * sizeof(float);
    char *memory = scratch(SCRATCH_LAYER, normed_bytes + qkv_bytes + 2 * q_bytes + 4 * 64);
    float *normed = take(&memory, normed_bytes), *qkv = take(&memory, qkv_bytes);
    float *q = take(&memory, q_bytes), *out = take(&memory, q_bytes);
    for (int first = 0; first < T; first += group) {
        int n = at_most(group, T - first);
        long row = (long)first * H;
        AT_LEVEL(add_norm)(l->x + row, l->delta ? l->delta + row : NULL, l->norm, l->eps, n, H, normed, num_threads);
        AT_LEVEL(linear)(l->qkv, normed, n, l->qkv_bias, qkv, num_threads);
        struct rotate_call rotate = {
            .q = q + (long)first * heads_width, .qkv = qkv, .cos = l->cos + (long)first * D,
            .sin = l->sin + (long)first * D, .cache_rows = l->cache_rows + (long)first * l->num_kv_heads,
            .k = l->k, .v = l->v, .num_heads = l->num_heads, .num_kv_heads = l->num_kv_heads, .head_dim = D,
            .block_size = l->block_size, .kv_is_bfloat16 = l->kv_is_bfloat16,
        };
        AT_LEVEL(rotate_into_cache)(&rotate, n, num_threads);
    }
    struct attention_call attention = {
        .out = out, .q = q, .k = l->k, .v = l->v, .block_ids = l->block_ids, .query_starts = l->query_starts,
        .context_lens = l->context_lens, .num_sequences = l->num_sequences, .num_heads = l->num_heads,
        .num_kv_heads = l->num_kv_heads, .head_dim = D, .block_size = l->block_size, .max_blocks = l->max_blocks,
        .window = l->window, .kv_is_bfloat16 = l->kv_is_bfloat16, .scale = l->scale,
    };
    AT_LEVEL(paged_attention)(&attention, num_threads);
    AT_LEVEL(linear)(l->o, out, T, NULL, l->y, num_threads);
}

struct route_call {
    float *x;                  /* [T, H] */
    const float *delta;        /* [T, H] or NULL */
    const float *norm;         /* [H] */
    const struct weight *gate; /* [E + 1, H], the shared expert's gate last */
    float *normed;             /* [T, H] */
    int64_t *ids;              /* [T, K] */
    float *weights;            /* [T, K] */
    float *shared_gate;        /* [T] */
    int32_t num_tokens, top_k, normalize;
    float eps;
};

/* x += delta; normed = norm(x); its experts and their weights, and the logit of the shared expert. */
void AT_LEVEL(route)(const struct route_call *call, int num_threads) {
    int T = call->num_tokens, num_logits = call->gate->num_outputs;
    float *logits = scratch(SCRATCH_LAYER, (size_t)T * num_logits * sizeof(float));
    AT_LEVEL(add_norm)(call->x, call->delta, call->norm, call->eps, T, call->gate->num_inputs, call->normed,
                       num_threads);
    AT_LEVEL(linear)(call->gate, call->normed, T, NULL, logits, num_threads);
    AT_LEVEL(topk_softmax)(logits, T, num_logits - 1, call->top_k, call->normalize, call->ids, call->weights,
                           call->shared_gate, num_threads);
}

/* y [num_rows, H] = down(swiglu(gate_up(x [num_rows, H]))) */
void AT_LEVEL(mlp)(const struct weight *gate_up, const struct weight *down, const float *x, int num_rows, float *y,
                   int num_threads) {
    int group = rows_of_a_group(num_rows, gate_up->num_outputs);
    size_t in_bytes = AT_LEVEL(packed_rows_bytes)(gate_up, group);
    char *memory = scratch(SCRATCH_LAYER, in_bytes + AT_LEVEL(activated_bytes)(gate_up, down, group) + 64);
    char *in_memory = take(&memory, in_bytes);
    for (int first = 0; first < num_rows; first += group) {
        const float *from = x + (long)first * gate_up->num_inputs;
        struct packed_rows rows, activated;
        rows = AT_LEVEL(pack_rows)(gate_up, from, NULL, at_most(group, num_rows - first), in_memory, num_threads);
        activated = AT_LEVEL(activate)(gate_up, down, &rows, memory, num_threads);
        AT_LEVEL(multiply)(down, &activated, NULL, y + (long)first * down->num_outputs, num_threads);
    }
}
