/* Causal attention over a paged KV cache: one path for decode and for prefill chunks.
 *
 * A task is a sequence, a key-value head, and up to MAX_TILE of its query rows: the query heads that share the
 * key-value head are folded into the rows (row = token * heads_per_kv + head), so decode with grouped heads reads each
 * key once. Keys come in spans of 64 that start at multiples of 64 in the sequence:
 *
 *   scores [rows][64] = queries [rows][D] . keys^T [D][64]       (keys lie transposed in their blocks, 16 together)
 *   softmax online: running maximum and sum of each row
 *   out    [rows][D] += probabilities [rows][64] . values [64][D]
 *
 * Spans don't depend on the batch or on the chunk, sums run in one order, and masked keys add an exact zero: a token's
 * output has the same bits alone, in a batch, in prefill and in decode.
 */
#include <stdlib.h>
#include <string.h>

#include "layer.h"
#ifdef __AMX_TILE__
#include "amx.h"
#endif

#if LANES == 16
enum { GEMM_ROWS = 12 };
#else
enum { GEMM_ROWS = 6 };
#endif
enum { SPAN = 64, MAX_TILE = 192, MAX_HEAD_DIM = 256 };
/* Up to here, values are used where they lie instead of being copied first, and the span that comes next is fetched
 * line by line: so many reads at once would hold up the others. */
enum { FEW_ROWS = 8 };
enum { WIDE_ROWS = LANES == 16 ? 6 : 2, WIDE = 4 }; /* up to here, a tile has so many vectors of columns, otherwise 2 */

struct task {
    int32_t sequence, kv_head, first_row, num_rows;
    int32_t first_key, last_key; /* its rows see keys within [first_key, last_key) */
};

struct attention_job {
    const struct attention_call *call;
    const struct task *tasks;
    int num_tasks;
};

/* Working memory of one task. The row strides are constants, so that one register addresses all rows of a gemm. */
struct workspace {
    float queries[MAX_TILE][MAX_HEAD_DIM];
    float scores[MAX_TILE][SPAN];
    float out[MAX_TILE][MAX_HEAD_DIM];
    float values[SPAN * MAX_HEAD_DIM];       /* [64][padded D] */
    float maxima[MAX_TILE], sums[MAX_TILE];
    int first_key[MAX_TILE], last_key[MAX_TILE]; /* a row sees keys [first_key, last_key) */
};

INLINE int first_key_seen(const struct attention_call *call, int position) {
    return call->window > 0 && position + 1 > call->window ? position + 1 - call->window : 0;
}

INLINE vec load_kv(const char *p, long i, int is_bfloat16) {
    return is_bfloat16 ? load_bf16((const uint16_t *)p + i) : load((const float *)p + i);
}

/* Keys and values of 64 positions, 16 together: keys transposed, [D] vectors of float32 or [D / 2] of pairs of bf16;
 * values [16][D]. */
struct span {
    const char *keys[SPAN / 16], *values[SPAN / 16];
};

/* scores [R][SPAN], C vectors of them from vector v on, = queries [R][D] . keys. Meanwhile `next`, if any, is
 * fetched. */
INLINE void score_tile(float *scores, const float *queries, const struct span *span, const struct span *next, int v,
                       int D, int is_bfloat16, const int R, const int C) {
    const char *keys[WIDE];
    vec sums[GEMM_ROWS][WIDE];
    const int together = is_bfloat16 ? 2 : 1;
    for (int c = 0; c < C; c++) keys[c] = span->keys[(v + c) * LANES / 16] + (v + c) * LANES % 16 * 4;
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) sums[r][c] = broadcast(0.0f);
    for (int d = 0; d < D; d += together) {
        if (next)
            for (int i = 0; i < C * LANES / 16; i++)
                _mm_prefetch(next->keys[v * LANES / 16 + i] + (long)d / together * 64, _MM_HINT_T1);
#pragma GCC unroll 2
        for (int i = 0; i < together; i++) {
            vec key[WIDE];
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
                const char *at = keys[c] + (long)d / together * 64;
                key[c] = is_bfloat16 ? load_bf16_half(at, i) : load((const float *)at);
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                vec input = broadcast(queries[r * MAX_HEAD_DIM + d + i]);
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) sums[r][c] = fma_add(input, key[c], sums[r][c]);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) store(scores + r * SPAN + (v + c) * LANES, sums[r][c]);
}

/* out [R][C * LANES] += probabilities [R][depth] . values [depth][stride]. Meanwhile `next`, if any, is fetched. */
INLINE void value_tile(float *out, const float *probabilities, const char *values, const char *next, int depth,
                       int stride, int is_bfloat16, const int R, const int C) {
    vec sums[GEMM_ROWS][WIDE];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) sums[r][c] = load(out + r * MAX_HEAD_DIM + c * LANES);
    for (int i = 0; i < depth; i++) {
        const int row_bytes = C * LANES * (is_bfloat16 ? 2 : 4);
        vec value[WIDE];
        if (next)
            for (int line = 0; line < row_bytes; line += 64)
                _mm_prefetch(next + (long)i * stride * (is_bfloat16 ? 2 : 4) + line, _MM_HINT_T1);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) value[c] = load_kv(values, (long)i * stride + c * LANES, is_bfloat16);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            vec input = broadcast(probabilities[r * SPAN + i]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sums[r][c] = fma_add(input, value[c], sums[r][c]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) store(out + r * MAX_HEAD_DIM + c * LANES, sums[r][c]);
}

/* One case for each number of rows that a tile of C vectors may have. */
#define CASE(tile, R, C) case R: tile(R, C); break;
#if LANES == 16
#define WIDE_CASES(tile)                                       \
    CASE(tile, 6, WIDE) CASE(tile, 5, WIDE) CASE(tile, 4, WIDE) \
    CASE(tile, 3, WIDE) CASE(tile, 2, WIDE) CASE(tile, 1, WIDE)
#define CASES(tile)                                                                                            \
    CASE(tile, 12, 2) CASE(tile, 11, 2) CASE(tile, 10, 2) CASE(tile, 9, 2) CASE(tile, 8, 2) CASE(tile, 7, 2)   \
    CASE(tile, 6, 2) CASE(tile, 5, 2) CASE(tile, 4, 2) CASE(tile, 3, 2) CASE(tile, 2, 2) CASE(tile, 1, 2)
#else
#define WIDE_CASES(tile) CASE(tile, 2, WIDE) CASE(tile, 1, WIDE)
#define CASES(tile) \
    CASE(tile, 6, 2) CASE(tile, 5, 2) CASE(tile, 4, 2) CASE(tile, 3, 2) CASE(tile, 2, 2) CASE(tile, 1, 2)
#endif

INLINE void compute_scores(struct workspace *w, const struct span *span, const struct span *next, int num_rows, int D,
                           int is_bfloat16) {
#define TILE(R, C) score_tile(w->scores[row], w->queries[row], span, next, v, D, is_bfloat16, R, C)
    int row = 0;
    if (num_rows <= WIDE_ROWS)
        for (int v = 0; v < SPAN / LANES; v += WIDE) switch (num_rows) { WIDE_CASES(TILE) }
    else
        for (; row < num_rows; row += GEMM_ROWS)
            for (int v = 0; v < SPAN / LANES; v += 2) switch (at_most(GEMM_ROWS, num_rows - row)) { CASES(TILE) }
#undef TILE
}

/* out += probabilities of keys [key, key + depth) . values [depth][stride] */
INLINE void add_values(struct workspace *w, int num_rows, int key, const char *values, const char *next,
                       int is_bfloat16, int depth, int stride) {
#define TILE(R, C)                                                                                                 \
    value_tile(w->out[row] + d, w->scores[row] + key, values + at, next ? next + at : NULL, depth, stride,         \
               is_bfloat16, R, C)
    int element_size = is_bfloat16 ? 2 : 4, row = 0, d = 0;
    if (num_rows <= WIDE_ROWS)
        for (; d + WIDE * LANES <= stride; d += WIDE * LANES) {
            long at = (long)d * element_size;
            switch (num_rows) { WIDE_CASES(TILE) }
        }
    for (; d < stride; d += 2 * LANES)
        for (row = 0; row < num_rows; row += GEMM_ROWS) {
            long at = (long)d * element_size;
            switch (at_most(GEMM_ROWS, num_rows - row)) { CASES(TILE) }
        }
#undef TILE
}

static __attribute__((noinline)) void compute_scores_float32(struct workspace *w, const struct span *span,
                                                             const struct span *next, int num_rows, int D) {
    compute_scores(w, span, next, num_rows, D, 0);
}

static __attribute__((noinline)) void compute_scores_bfloat16(struct workspace *w, const struct span *span,
                                                              const struct span *next, int num_rows, int D) {
    compute_scores(w, span, next, num_rows, D, 1);
}

static __attribute__((noinline)) void add_values_float32(struct workspace *w, int num_rows, int key, const char *values,
                                                         const char *next, int depth, int stride) {
    add_values(w, num_rows, key, values, next, 0, depth, stride);
}

static __attribute__((noinline)) void add_values_bfloat16(struct workspace *w, int num_rows, int key,
                                                          const char *values, const char *next, int depth, int stride) {
    add_values(w, num_rows, key, values, next, 1, depth, stride);
}

/* Where the 16 keys from `position` on lie in the caches, in elements. */
INLINE long offset_of(const struct attention_call *call, const struct task *task, int position) {
    long block = call->block_ids[(long)task->sequence * call->max_blocks + position / call->block_size];
    long row = (block * call->num_kv_heads + task->kv_head) * call->block_size + position % call->block_size;
    return row * call->head_dim;
}

/* The span that starts at position `start`. 16 keys of which the task sees none aren't read: others stand for them, and
 * their scores are masked. So are those of keys beyond the last one within 16. */
static struct span find_span(const struct attention_call *call, const struct task *task, int start) {
    struct span span;
    int element_size = call->kv_is_bfloat16 ? 2 : 4;
    int some = start < task->first_key ? (task->first_key - start) / 16 : 0;
    for (int i = 0; i < SPAN / 16; i++) {
        int key = start + 16 * i, is_seen = key + 16 > task->first_key && key < task->last_key;
        long at = offset_of(call, task, is_seen ? key : start + 16 * some) * element_size;
        span.keys[i] = call->k + at, span.values[i] = call->v + at;
    }
    return span;
}

static void fetch(const struct span *span, int D, int element_size) {
    for (int i = 0; i < SPAN / 16; i++)
        for (int line = 0; line < 16 * D * element_size; line += 64) {
            _mm_prefetch(span->keys[i] + line, _MM_HINT_T1);
            _mm_prefetch(span->values[i] + line, _MM_HINT_T1);
        }
}

/* out += probabilities of keys [first, last) . their values */
INLINE void use_values(struct workspace *w, const struct span *span, const struct span *next, int num_rows, int D,
                       int first, int last, int is_bfloat16) {
    int padded_dim = ceil_div(D, 2 * LANES) * 2 * LANES, is_copied = num_rows > FEW_ROWS || D != padded_dim;
    for (int key = first; key < last; key += 16) {
        const char *v = span->values[key / 16], *then = next->values[key / 16];
        if (!is_copied) {
            int depth = at_most(16, last - key);
            if (is_bfloat16) add_values_bfloat16(w, num_rows, key, v, then, depth, D);
            else add_values_float32(w, num_rows, key, v, then, depth, D);
            continue;
        }
        for (int i = 0; i < 16; i++)
            for (int d = 0; d < D; d += LANES)
                store(w->values + (key + i) * padded_dim + d, load_kv(v, (long)i * D + d, is_bfloat16));
    }
    const char *copied = (const char *)(w->values + first * padded_dim);
    if (is_copied) add_values_float32(w, num_rows, first, copied, NULL, last - first, padded_dim);
}

/* Turn a row's 64 scores into probabilities of keys [first, last), relative to the running maximum. Returns the factor
 * for what was summed so far. */
INLINE float softmax_span(float *scores, int first, int last, float scale, float *maximum, float *sum) {
    vec s[SPAN / LANES], largest = broadcast(-INFINITY);
    for (int i = 0; i < SPAN / LANES; i++) {
        vec scaled = load(scores + i * LANES) * broadcast(scale);
        s[i] = keep_range(scaled, first - i * LANES, last - i * LANES, broadcast(-INFINITY));
        largest = vmax(largest, s[i]);
    }
    float old_maximum = *maximum, new_maximum = fmaxf(old_maximum, max_of_lanes(largest));
    if (new_maximum == -INFINITY) {
        memset(scores, 0, SPAN * sizeof(float));
        return 1.0f;
    }
    vec partial[16 / LANES];
    for (int i = 0; i < 16 / LANES; i++) partial[i] = broadcast(0.0f);
    for (int i = 0; i < SPAN / LANES; i++) {
        vec p = exponential(s[i] - broadcast(new_maximum));
        store(scores + i * LANES, p);
        partial[i % (16 / LANES)] += p;
    }
    float factor[LANES];
    store(factor, exponential(broadcast(old_maximum - new_maximum)));
    *maximum = new_maximum;
    *sum = *sum * factor[0] + sum_of_16(partial);
    return factor[0];
}

/* Where each row lies in q and out, and the keys that it sees. */
static void begin_rows(const struct attention_call *call, const struct task *task, long *offsets, int *first_key,
                       int *last_key) {
    int heads_per_kv = call->num_heads / call->num_kv_heads, first_token = call->query_starts[task->sequence];
    int first_position = call->context_lens[task->sequence] - (call->query_starts[task->sequence + 1] - first_token);
    for (int r = 0; r < task->num_rows; r++) {
        int token = (task->first_row + r) / heads_per_kv, head = (task->first_row + r) % heads_per_kv;
        long row = (long)(first_token + token) * call->num_heads + task->kv_head * heads_per_kv + head;
        offsets[r] = row * call->head_dim;
        last_key[r] = first_position + token + 1;
        first_key[r] = first_key_seen(call, first_position + token);
    }
}

/* out = sums of values [num_rows][MAX_HEAD_DIM] / sums of probabilities */
static void end_rows(const struct attention_call *call, const struct task *task, const long *offsets,
                     const float *values, const float *sums) {
    for (int r = 0; r < task->num_rows; r++)
        for (int d = 0; d < call->head_dim; d += LANES)
            store(call->out + offsets[r] + d, load(values + r * MAX_HEAD_DIM + d) / broadcast(sums[r]));
}

/* next: the task that follows, whose first keys are asked for in time. */
INLINE void attend(const struct attention_call *call, const struct task *task, const struct task *next, int is_bfloat16,
                   struct workspace *w) {
    int D = call->head_dim, padded_dim = ceil_div(D, 2 * LANES) * 2 * LANES, num_rows = task->num_rows;
    long offsets[MAX_TILE];
    begin_rows(call, task, offsets, w->first_key, w->last_key);
    for (int r = 0; r < num_rows; r++) {
        memcpy(w->queries[r], call->q + offsets[r], D * sizeof(float));
        memset(w->out[r], 0, padded_dim * sizeof(float));
        w->maxima[r] = -INFINITY, w->sums[r] = 0.0f;
    }
    struct span span = find_span(call, task, task->first_key / SPAN * SPAN), then;
    for (int start = task->first_key / SPAN * SPAN; start < task->last_key; start += SPAN, span = then) {
        /* Whole groups of 16 before the window are not read: their blocks may have been given back. */
        int first = start < task->first_key ? (task->first_key - start) / 16 * 16 : 0;
        int last = at_most(SPAN, task->last_key - start);
        then = start + SPAN < task->last_key ? find_span(call, task, start + SPAN)
                                             : find_span(call, next, next->first_key / SPAN * SPAN);
        if (num_rows > FEW_ROWS) fetch(&then, D, is_bfloat16 ? 2 : 4);
        const struct span *fetched = num_rows > FEW_ROWS ? NULL : &then;
        if (is_bfloat16) compute_scores_bfloat16(w, &span, fetched, num_rows, D);
        else compute_scores_float32(w, &span, fetched, num_rows, D);
        for (int r = 0; r < num_rows; r++) {
            float factor = softmax_span(w->scores[r], w->first_key[r] - start, w->last_key[r] - start, call->scale,
                                        &w->maxima[r], &w->sums[r]);
            if (factor == 1.0f) continue;
            for (int d = 0; d < D; d += LANES) store(&w->out[r][d], load(&w->out[r][d]) * broadcast(factor));
        }
        use_values(w, &span, &then, num_rows, D, first, last, is_bfloat16);
    }
    end_rows(call, task, offsets, w->out[0], w->sums);
}

#ifdef __AMX_TILE__

/* ---- the same in AMX tiles, for keys and values in bfloat16 ----
 *
 * Queries and probabilities are taken as the sum of two bf16 numbers, 16 of their 24 bits, so the result is that of the
 * vectors but for their last bits; the tiles are so fast that the softmax takes most of the time either way.
 */

enum { ROWS = AMX_TILE_ROWS, PARTS = 2 };

struct amx_workspace {
    uint16_t queries[MAX_TILE / ROWS][MAX_HEAD_DIM / 32][PARTS][ROWS][32];
    uint16_t values[SPAN / 32][MAX_HEAD_DIM / 16][16][32]; /* a row: 16 elements of each of 2 values */
    uint16_t probabilities[2][SPAN / 32][PARTS][ROWS][32]; /* of two tiles in turn */
    float scores[2][ROWS][SPAN];
    float out[MAX_TILE][MAX_HEAD_DIM];
    float maxima[MAX_TILE], sums[MAX_TILE][16]; /* each row's in 16 parts */
    int first_key[MAX_TILE], last_key[MAX_TILE];
};

/* The first `num_valid` of 16 values [16][D], and zeros for the others, which may be anything. */
INLINE void lay_out_values(struct amx_workspace *w, const uint16_t *v, int group, int num_valid, int D) {
    const ivec low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                      36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const ivec high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int i = 0; i < 16; i += 2)
        for (int d = 0; d < D; d += 32) {
            ivec one = i < num_valid ? load_bytes(v + (long)i * D + d) : ibroadcast(0);
            ivec other = i + 1 < num_valid ? load_bytes(v + (long)(i + 1) * D + d) : ibroadcast(0);
            uint16_t *to = w->values[group / 2][d / 16][group % 2 * 8 + i / 2];
            _mm512_store_si512(to, _mm512_permutex2var_epi16(one, low, other));
            _mm512_store_si512(to + 16 * 32, _mm512_permutex2var_epi16(one, high, other));
        }
}

/* Scores of a tile of queries. A group of keys lies as tiles want it: a row has 2 elements of each of 16 keys. */
INLINE void amx_scores(struct amx_workspace *w, const struct span *span, int tile, int D) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < D / 32; i++) {
        _tile_loadd(4, w->queries[tile][i][0], 64);
        _tile_loadd(5, w->queries[tile][i][1], 64);
        ADD_PRODUCTS(0, 6, span->keys[0] + 1024 * i, 64, PARTS)
        ADD_PRODUCTS(1, 7, span->keys[1] + 1024 * i, 64, PARTS)
        ADD_PRODUCTS(2, 6, span->keys[2] + 1024 * i, 64, PARTS)
        ADD_PRODUCTS(3, 7, span->keys[3] + 1024 * i, 64, PARTS)
    }
    float *scores = w->scores[tile % 2][0];
    _tile_stored(0, scores, SPAN * sizeof(float));
    _tile_stored(1, scores + 16, SPAN * sizeof(float));
    _tile_stored(2, scores + 32, SPAN * sizeof(float));
    _tile_stored(3, scores + 48, SPAN * sizeof(float));
}

/* Scores to probabilities, and what was summed so far to the new maximum: `softmax_span` for a tile of rows. */
INLINE void amx_softmax(struct amx_workspace *w, int tile, int num_rows, int start, int D, float scale) {
    int first_row = tile * ROWS, n = at_most(ROWS, num_rows - first_row);
    float maxima[ROWS], factors[ROWS];
    for (int i = 0; i < n; i++) {
        float *scores = w->scores[tile % 2][i];
        int first = w->first_key[first_row + i] - start, last = w->last_key[first_row + i] - start;
        vec largest = broadcast(-INFINITY);
        for (int k = 0; k < SPAN; k += 16) {
            vec scaled = load(scores + k) * broadcast(scale);
            if (first > 0 || last < SPAN) scaled = keep_range(scaled, first - k, last - k, broadcast(-INFINITY));
            store(scores + k, scaled);
            largest = vmax(largest, scaled);
        }
        maxima[i] = max_of_lanes(largest);
    }
    vec before = load(w->maxima + first_row), now = vmax(before, load(maxima));
    store(w->maxima + first_row, now);
    now = zero_below(now, now, -INFINITY); /* where nothing was seen yet, any number does: all is 0 */
    store(maxima, now);
    store(factors, exponential(before - now));
    for (int i = 0; i < n; i++) {
        float *scores = w->scores[tile % 2][i], *out = w->out[first_row + i], *sums = w->sums[first_row + i];
        vec p[SPAN / 16];
#pragma GCC unroll 4
        for (int k = 0; k < SPAN / 16; k++) p[k] = exponential(load(scores + 16 * k) - broadcast(maxima[i]));
        for (int k = 0; k < SPAN / 32; k++)
            split(p[2 * k], p[2 * k + 1], w->probabilities[tile % 2][k][0][i], ROWS * 64, PARTS);
        store(sums, fma_add(load(sums), broadcast(factors[i]), (p[0] + p[1]) + (p[2] + p[3])));
        if (factors[i] == 1.0f) continue;
        for (int d = 0; d < D; d += LANES) store(out + d, load(out + d) * broadcast(factors[i]));
    }
}

/* out += probabilities . values, for 64 elements from d on, or 32. */
INLINE void amx_add_values(struct amx_workspace *w, int tile, int d, const int is_wide) {
    float *out = w->out[tile * ROWS] + d;
    long stride = sizeof(w->out[0]);
    _tile_loadd(0, out, stride);
    _tile_loadd(1, out + 16, stride);
    if (is_wide) _tile_loadd(2, out + 32, stride);
    if (is_wide) _tile_loadd(3, out + 48, stride);
    for (int i = 0; i < SPAN / 32; i++) {
        _tile_loadd(4, w->probabilities[tile % 2][i][0], 64);
        _tile_loadd(5, w->probabilities[tile % 2][i][1], 64);
        ADD_PRODUCTS(0, 6, w->values[i][d / 16], 64, PARTS)
        ADD_PRODUCTS(1, 7, w->values[i][d / 16 + 1], 64, PARTS)
        if (!is_wide) continue;
        ADD_PRODUCTS(2, 6, w->values[i][d / 16 + 2], 64, PARTS)
        ADD_PRODUCTS(3, 7, w->values[i][d / 16 + 3], 64, PARTS)
    }
    _tile_stored(0, out, stride);
    _tile_stored(1, out + 16, stride);
    if (is_wide) _tile_stored(2, out + 32, stride);
    if (is_wide) _tile_stored(3, out + 48, stride);
}

static void amx_attend(const struct attention_call *call, const struct task *task, const struct task *next,
                       struct amx_workspace *w) {
    int D = call->head_dim, num_rows = task->num_rows, num_tiles = ceil_div(num_rows, ROWS);
    long offsets[MAX_TILE];
    begin_rows(call, task, offsets, w->first_key, w->last_key);
    for (int r = 0; r < num_rows; r++) {
        for (int d = 0; d < D; d += 32)
            split(load(call->q + offsets[r] + d), load(call->q + offsets[r] + d + 16),
                  w->queries[r / ROWS][d / 32][0][r % ROWS], ROWS * 64, PARTS);
        memset(w->out[r], 0, D * sizeof(float));
        memset(w->sums[r], 0, sizeof(w->sums[r]));
        w->maxima[r] = -INFINITY;
    }
    amx_configure(at_most(ROWS, num_rows), 64);
    for (int start = task->first_key / SPAN * SPAN; start < task->last_key; start += SPAN) {
        struct span span = find_span(call, task, start), then;
        then = start + SPAN < task->last_key ? find_span(call, task, start + SPAN)
                                             : find_span(call, next, next->first_key / SPAN * SPAN);
        fetch(&then, D, sizeof(uint16_t));
        for (int group = 0; group < SPAN / 16; group++) {
            int key = start + 16 * group, num_valid = key + 16 > task->first_key ? task->last_key - key : 0;
            lay_out_values(w, (const uint16_t *)span.values[group], group, num_valid, D);
        }
        int first = 0, last = num_tiles; /* tiles with a row that sees a key of the span */
        while (first < last && w->last_key[at_most((first + 1) * ROWS, num_rows) - 1] <= start) first++;
        while (first < last && w->first_key[(last - 1) * ROWS] >= start + SPAN) last--;
        /* While one tile's scores are on their way, the softmax works on those before, and so on. */
        for (int tile = first; tile < last + 2; tile++) {
            if (tile < last) amx_scores(w, &span, tile, D);
            if (tile > first && tile <= last) amx_softmax(w, tile - 1, num_rows, start, D, call->scale);
            if (tile < first + 2) continue;
            int d = 0;
            for (; d + 64 <= D; d += 64) amx_add_values(w, tile - 2, d, 1);
            if (d < D) amx_add_values(w, tile - 2, d, 0);
        }
    }
    _tile_release();
    for (int r = 0; r < num_rows; r++) {
        vec sums = load(w->sums[r]);
        w->maxima[r] = sum_of_16(&sums);
    }
    end_rows(call, task, offsets, w->out[0], w->maxima);
}

#endif

static void run_task(void *context, int i) {
    const struct attention_job *job = context;
    const struct task *task = &job->tasks[i], *next = &job->tasks[at_most(i + 1, job->num_tasks - 1)];
#ifdef __AMX_TILE__
    if (job->call->kv_is_bfloat16 && job->call->head_dim % 32 == 0) {
        amx_attend(job->call, task, next, scratch(SCRATCH_BODY, sizeof(struct amx_workspace)));
        return;
    }
#endif
    struct workspace *w = scratch(SCRATCH_BODY, sizeof(struct workspace));
    if (job->call->kv_is_bfloat16) attend(job->call, task, next, 1, w);
    else attend(job->call, task, next, 0, w);
}

void AT_LEVEL(paged_attention)(const struct attention_call *call, int num_threads) {
    int heads_per_kv = call->num_heads / call->num_kv_heads, step = MAX_TILE / heads_per_kv * heads_per_kv;
    int max_tasks = 0, num_tasks = 0;
    for (int s = 0; s < call->num_sequences; s++) {
        int num_rows = (call->query_starts[s + 1] - call->query_starts[s]) * heads_per_kv;
        max_tasks += call->num_kv_heads * ceil_div(num_rows, step);
    }
    struct task *tasks = scratch(SCRATCH_CALL, max_tasks * sizeof(struct task));
    for (int s = 0; s < call->num_sequences; s++) {
        int num_tokens = call->query_starts[s + 1] - call->query_starts[s], num_rows = num_tokens * heads_per_kv;
        int first_position = call->context_lens[s] - num_tokens;
        for (int first = 0; first < num_rows; first += step) {
            int last = at_most(first + step, num_rows);
            int first_key = first_key_seen(call, first_position + first / heads_per_kv);
            int last_key = first_position + last / heads_per_kv;
            for (int head = 0; head < call->num_kv_heads; head++)
                tasks[num_tasks++] = (struct task){s, head, first, last - first, first_key, last_key};
        }
    }
    struct attention_job job = {call, tasks, num_tasks};
    parallel_for(run_task, &job, num_tasks, num_threads);
}
