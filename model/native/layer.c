/* What stands between the products of a layer: norm, rotary embedding, the choice of experts, SwiGLU and the shared
 * expert's gate.
 *
 * Rows are computed each for itself, and in the same order at every width: a row has the same bits in any batch.
 */
#include <math.h>
#include <string.h>

#include "layer.h"

enum { ROWS_EACH = 16 }; /* of a task */

struct rows_job {
    void (*body)(const void *call, int row);
    const void *call;
    int num_rows;
};

static void run_rows(void *context, int i) {
    const struct rows_job *job = context;
    for (int row = i * ROWS_EACH; row < at_most((i + 1) * ROWS_EACH, job->num_rows); row++) job->body(job->call, row);
}

static void for_each_row(void (*body)(const void *call, int row), const void *call, int num_rows, int num_threads) {
    struct rows_job job = {body, call, num_rows};
    parallel_for(run_rows, &job, ceil_div(num_rows, ROWS_EACH), num_rows < ROWS_WORTH_A_THREAD ? 1 : num_threads);
}

/* ---- RMSNorm ---- */

struct norm_call {
    float *x;
    const float *delta, *weight;
    float *y;
    int width;
    float eps;
};

static void norm_row(const void *context, int row) {
    const struct norm_call *call = context;
    int H = call->width;
    float *x = call->x + (long)row * H, *y = call->y + (long)row * H;
    const float *delta = call->delta ? call->delta + (long)row * H : NULL;
    vec squares[16 / LANES];
    for (int i = 0; i < 16 / LANES; i++) squares[i] = broadcast(0.0f);
    for (int h = 0; h < H; h += LANES) {
        vec a = load_some(x + h, H - h);
        if (delta) {
            a += load_some(delta + h, H - h);
            store_some(x + h, a, H - h);
        }
        squares[h / LANES % (16 / LANES)] = fma_add(a, a, squares[h / LANES % (16 / LANES)]);
    }
    vec scale = broadcast(1.0f / sqrtf(sum_of_16(squares) / H + call->eps));
    for (int h = 0; h < H; h += LANES)
        store_some(y + h, load_some(x + h, H - h) * scale * load_some(call->weight + h, H - h), H - h);
}

void AT_LEVEL(add_norm)(float *x, const float *delta, const float *weight, float eps, int num_rows, int width,
                        float *y, int num_threads) {
    struct norm_call call = {x, delta, weight, y, width, eps};
    for_each_row(norm_row, &call, num_rows, num_threads);
}

/* ---- rotary embedding, and keys and values into their cache ---- */

/* D numbers as the cache has them. */
static void to_cache(char *to, const float *x, const struct rotate_call *call) {
    int D = call->head_dim;
    if (!call->kv_is_bfloat16) {
        memcpy(to, x, D * sizeof(float));
        return;
    }
    uint16_t *out = (uint16_t *)to;
    for (int d = 0; d < D; d += LANES) {
        uint16_t rounded[LANES];
        int n = at_most(LANES, D - d);
        store_as_bf16(n == LANES ? out + d : rounded, load_some(x + d, n));
        if (n < LANES) memcpy(out + d, rounded, n * sizeof(uint16_t));
    }
}

/* A key's words of 4 bytes to their places among those of the keys that lie together. */
static void write_key(int64_t row, const float *x, const struct rotate_call *call) {
    int together = keys_together(call->block_size), num_words = call->head_dim / (call->kv_is_bfloat16 ? 2 : 1);
    uint32_t words[num_words], *out = (uint32_t *)call->k + row / together * together * num_words + row % together;
    to_cache((char *)words, x, call);
    for (int i = 0; i < num_words; i++) out[(long)i * together] = words[i];
}

static void rotate_head(const float *x, const float *cos, const float *sin, int D, float *out) {
    int half = D / 2;
    for (int d = 0; d < half; d += LANES) {
        int n = half - d;
        vec a = load_some(x + d, n), b = load_some(x + half + d, n);
        store_some(out + d, fma_add(b, load_some(sin + d, n), a * load_some(cos + d, n)), n);
        store_some(out + half + d, fma_add(a, load_some(sin + half + d, n), b * load_some(cos + half + d, n)), n);
    }
}

static void rotate_row(const void *context, int row) {
    const struct rotate_call *call = context;
    int A = call->num_heads, G = call->num_kv_heads, D = call->head_dim;
    const float *x = call->qkv + (long)row * (A + 2 * G) * D, *cos = call->cos + (long)row * D;
    const float *sin = call->sin + (long)row * D;
    float key[D];
    for (int a = 0; a < A; a++) rotate_head(x + a * D, cos, sin, D, call->q + ((long)row * A + a) * D);
    for (int g = 0; g < G; g++) {
        int64_t cache_row = call->cache_rows[(long)row * G + g];
        rotate_head(x + (A + g) * D, cos, sin, D, key);
        write_key(cache_row, key, call);
        to_cache(call->v + cache_row * D * (call->kv_is_bfloat16 ? 2 : 4), x + (A + G + g) * D, call);
    }
}

void AT_LEVEL(rotate_into_cache)(const struct rotate_call *call, int num_rows, int num_threads) {
    for_each_row(rotate_row, call, num_rows, num_threads);
}

/* ---- the choice of experts ---- */

struct topk_call {
    const float *logits;
    int64_t *ids;
    float *weights, *shared_gate;
    int num_experts, top_k, normalize;
};

/* probabilities [num_experts, rounded up to 16 with zeros]; all NaN if one logit is. */
static void softmax(const float *logits, int num_experts, float *probabilities) {
    vec largest = broadcast(-INFINITY), sums[16 / LANES];
    int is_nan = 0;
    for (int e = 0; e < num_experts; e += LANES) {
        vec a = load_some(logits + e, num_experts - e);
        is_nan |= any_nan(a);
        largest = vmax(largest, keep_range(a, 0, num_experts - e, broadcast(-INFINITY)));
    }
    vec maximum = broadcast(max_of_lanes(largest));
    for (int i = 0; i < 16 / LANES; i++) sums[i] = broadcast(0.0f);
    for (int e = 0; e < num_experts; e += LANES) {
        vec p = exponential(load_some(logits + e, num_experts - e) - maximum);
        p = keep_range(p, 0, num_experts - e, broadcast(0.0f));
        store(probabilities + e, p);
        sums[e / LANES % (16 / LANES)] += p;
    }
    vec sum = broadcast(is_nan ? NAN : sum_of_16(sums));
    for (int e = 0; e < num_experts; e += LANES) store(probabilities + e, load(probabilities + e) / sum);
}

static void choose_experts(const void *context, int row) {
    const struct topk_call *call = context;
    int E = call->num_experts, K = call->top_k, num_found = 0;
    const float *logits = call->logits + (long)row * (E + 1);
    int64_t *ids = call->ids + (long)row * K;
    float *weights = call->weights + (long)row * K, probabilities[ceil_div(E, 16) * 16], sum = 0.0f;
    softmax(logits, E, probabilities);
    for (int e = 0; e < E; e++) { /* with NaN, which is not greater than anything, the first K */
        float p = probabilities[e];
        if (num_found == K && !(p > weights[K - 1])) continue;
        int place = num_found < K ? num_found++ : K - 1;
        for (; place > 0 && p > weights[place - 1]; place--)
            weights[place] = weights[place - 1], ids[place] = ids[place - 1];
        weights[place] = p, ids[place] = e;
    }
    call->shared_gate[row] = logits[E];
    if (!call->normalize) return;
    for (int k = 0; k < K; k++) sum += weights[k];
    for (int k = 0; k < K; k++) weights[k] /= sum;
}

void AT_LEVEL(topk_softmax)(const float *logits, int num_rows, int num_experts, int top_k, int normalize, int64_t *ids,
                            float *weights, float *shared_gate, int num_threads) {
    struct topk_call call = {logits, ids, weights, shared_gate, num_experts, top_k, normalize};
    for_each_row(choose_experts, &call, num_rows, num_threads);
}

/* ---- SwiGLU ---- */

struct swiglu_call {
    const float *h;
    float *out;
    int inner;
};

/* out [inner] = silu(h[0..inner)) * h[inner..2 inner) */
static void swiglu_row(const float *h, int inner, float *out) {
    for (int i = 0; i < inner; i += LANES) {
        int n = inner - i;
        store_some(out + i, silu_times(load_some(h + i, n), load_some(h + inner + i, n)), n);
    }
}

static void swiglu_of_row(const void *context, int row) {
    const struct swiglu_call *call = context;
    swiglu_row(call->h + (long)row * 2 * call->inner, call->inner, call->out + (long)row * call->inner);
}

void AT_LEVEL(swiglu)(const float *h, int num_rows, int inner, float *out, int num_threads) {
    struct swiglu_call call = {h, out, inner};
    for_each_row(swiglu_of_row, &call, num_rows, num_threads);
}

/* ---- the shared expert's gate ---- */

struct gated_call {
    float *y;
    const float *x, *gate;
    int width;
};

static void add_gated_row(const void *context, int row) {
    const struct gated_call *call = context;
    int H = call->width;
    float *y = call->y + (long)row * H;
    const float *x = call->x + (long)row * H;
    vec scale = broadcast((float)(1.0 / (1.0 + exp(-(double)call->gate[row]))));
    for (int h = 0; h < H; h += LANES) {
        vec sum = load_some(y + h, H - h) + load_some(x + h, H - h) * scale;
        store_some(y + h, sum, H - h);
    }
}

/* y [num_rows, width] += x * sigmoid(gate [num_rows]) */
void AT_LEVEL(add_gated)(float *y, const float *x, const float *gate, int num_rows, int width, int num_threads) {
    struct gated_call call = {y, x, gate, width};
    for_each_row(add_gated_row, &call, num_rows, num_threads);
}
