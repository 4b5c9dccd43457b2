/* y = x @ weight.T for packed weights of every format.
 *
 * A tile is R rows times C panels (2 * C vectors of outputs): its R * 2 * C sums stay in registers while the
 * panel streams by once. R is 12 with AVX-512 (24 sums, 2 weights, 1 broadcast of 32 registers), 6 with AVX2. Few rows
 * take several panels at once, so that enough sums are in flight to hide the latency of a multiply-add, and enough
 * reads that of the memory. Many rows are multiplied a stretch of inputs at a time; compact panels (compact.h) are
 * expanded by the first tile, in registers.
 *
 * Each output is summed over the inputs in one fixed order, whatever R and C are: a row has the same bits in any
 * batch.
 */
#include <string.h>

#include "layer.h"
#if LANES == 16
#include "compact.h"
#endif

#if LANES == 16
enum { MAX_TILE_ROWS = 12, FEW_ROWS = 3, SOME_ROWS = 6 };
#else
enum { MAX_TILE_ROWS = 6, FEW_ROWS = 1, SOME_ROWS = 1 };
#endif
enum { FEW_ROWS_PANELS = 4, SOME_ROWS_PANELS = 2 };
enum { STRETCH_BYTES = 16 << 10 }; /* of plain panels */
enum { FETCHED_BYTES = 16 << 10 }; /* of compact panels, ahead of what is read */
enum { PAIRS = INT4 + 1, COMPACT }; /* kinds of tiles beside the formats: bf16 weights and inputs; what compact adds */
enum { STRIPS = 16 / LANES }; /* one pass covers outputs [s, s + LANES) and [16 + s, 16 + s + LANES) of a panel */

/* Bytes of a panel for the inputs that stand side by side. */
static int step_bytes(int format) { return format == FLOAT16 || format == INT4 ? 2 * PANEL : 4 * PANEL; }

static size_t panel_bytes(const struct weight *w) {
    size_t plain = (size_t)padded_inputs(w) / inputs_together(w->format) * step_bytes(w->format);
    return w->codebooks ? plain * 3 / 4 : plain;
}

/* ---- packing activations ---- */

/* The sizes of packed rows, without memory. Tiles are as even as possible: 13 rows are 7 + 6 (+ 1 of zeros). */
static struct packed_rows arrange(const struct weight *w, int num_rows) {
    struct packed_rows rows = {.num_rows = num_rows, .run = is_integer(w) ? 4 : 1};
    int most = MAX_TILE_ROWS;
#ifdef __AMX_TILE__
    if (amx_run(w, num_rows)) {
        rows.run = amx_run(w, num_rows);
        most = AMX_TILE_ROWS;
    }
#endif
    rows.tile_rows = ceil_div(num_rows, ceil_div(num_rows, most));
    rows.num_tiles = ceil_div(num_rows, rows.tile_rows);
    return rows;
}

/* Whether bf16 inputs are multiplied as they are, two at a time. */
static int takes_pairs(const struct weight *w) {
#ifdef __AVX512BF16__
    return w->format == BFLOAT16 && w->bfloat16_inputs;
#else
    (void)w;
    return 0;
#endif
}

/* Of one tile's values. */
static size_t tile_bytes(const struct weight *w, const struct packed_rows *rows) {
    int input_bytes = is_integer(w) ? 1 : takes_pairs(w) ? 2 : 4;
#ifdef __AMX_TILE__
    if (w->format == BFLOAT16 && rows->run > 1) input_bytes = 2 * amx_parts(w);
#endif
    return (size_t)rows->tile_rows * padded_inputs(w) * input_bytes;
}

size_t AT_LEVEL(packed_rows_bytes)(const struct weight *w, int num_rows) {
    struct packed_rows rows = arrange(w, num_rows);
    size_t values = rows.num_tiles * tile_bytes(w, &rows);
    if (!is_integer(w)) return values;
    return values + (size_t)rows.num_tiles * rows.tile_rows * ceil_div(w->num_inputs, w->block_size) * 8 + 3 * 64;
}

/* Quantize n <= block_size inputs (a multiple of LANES, padded with zeros) to [-127, 127]. Returns the scale, NaN where
 * an input is. */
static float quantize_block(const float *x, int n, int8_t *out, int32_t *sum) {
    vec largest = broadcast(0.0f);
    int has_nan = 0;
    for (int i = 0; i < n; i += LANES) {
        vec inputs = load(x + i);
        largest = vmax(largest, absolute(inputs)); /* which drops a NaN */
        has_nan |= any_nan(inputs);
    }
    float max = has_nan ? NAN : max_of_lanes(largest);
    vec inverse = broadcast(max > 0.0f ? 127.0f / max : 0.0f);
    ivec total = ibroadcast(0);
    for (int i = 0; i < n; i += LANES) {
        ivec whole = to_int(load(x + i) * inverse);
        store_as_i8(out + i, whole);
        total = add_ints(total, whole);
    }
    *sum = sum_of_ints(total);
    return max / 127.0f;
}

/* A row's values [input / run][R][run], scales and sums [block][R]. */
static void pack_integer_row(const struct weight *w, const float *x, int R, int run, int8_t *values, float *scales,
                             int32_t *sums) {
    int block = w->block_size, K = w->num_inputs;
    int padded_block = ceil_div(block, 16) * 16;
    float inputs[padded_block];
    int8_t quantized[padded_block];
    for (int b = 0; b * block < K; b++) {
        int n = at_most(block, K - b * block), padded = ceil_div(n, 16) * 16;
        const float *from = x + b * block;
        if (w->input_order != NULL || padded > n) {
            memset(inputs + n, 0, (padded - n) * sizeof(float));
            for (int i = 0; i < n; i++) inputs[i] = w->input_order ? x[w->input_order[b * block + i]] : from[i];
            from = inputs;
        }
        scales[b * R] = quantize_block(from, padded, quantized, sums + b * R);
        for (int i = 0; i < n; i += run) memcpy(values + (long)(b * block + i) * R, quantized + i, run);
    }
}

static void pack_integer_tile(const struct weight *w, const float *x, const int32_t *row_ids, int tile,
                              const struct packed_rows *rows) {
    int R = rows->tile_rows, run = rows->run, num_blocks = ceil_div(w->num_inputs, w->block_size);
    for (int r = 0; r < R; r++) {
        int i = tile * R + r;
        int8_t *values = (int8_t *)rows->values + tile * tile_bytes(w, rows) + run * r;
        float *scales = rows->scales + (long)tile * R * num_blocks + r;
        int32_t *sums = rows->sums + (long)tile * R * num_blocks + r;
        if (i < rows->num_rows) {
            pack_integer_row(w, x + (long)(row_ids ? row_ids[i] : i) * w->num_inputs, R, run, values, scales, sums);
        } else {
            for (int k = 0; k < padded_inputs(w); k += run) memset(values + (long)k * R, 0, run);
            for (int b = 0; b < num_blocks; b++) scales[b * R] = 0.0f, sums[b * R] = 0;
        }
    }
}

/* LANES words of 4 bytes of a row, from input k on: numbers, or pairs of bf16 numbers; zeros beyond the last one. */
INLINE vec load_words(const struct weight *w, const float *row, int k) {
    int K = w->num_inputs;
    vec first = load_some(row + k, K - k);
#ifdef __AVX512BF16__
    if (takes_pairs(w)) {
        vec second = load_some(row + k + LANES, K - k - LANES);
        return (vec)_mm512_cvtne2ps_pbh(second, first);
    }
#endif
    if (w->bfloat16_inputs) {
        uint16_t rounded[LANES];
        store_as_bf16(rounded, first);
        first = load_bf16(rounded);
    }
    return first;
}

static void pack_float_tile(const struct weight *w, const float *x, const int32_t *row_ids, int tile,
                            const struct packed_rows *rows) {
    int R = rows->tile_rows, num_rows = at_most(R, rows->num_rows - tile * R);
    int inputs_each = takes_pairs(w) ? 2 : 1, num_words = padded_inputs(w) / inputs_each;
    float *out = (float *)(rows->values + tile * tile_bytes(w, rows));
    for (int word = 0; word < num_words; word += LANES) {
        vec words[LANES];
        for (int r = 0; r < LANES; r++) {
            int i = tile * R + r;
            words[r] = broadcast(0.0f);
            if (r >= num_rows) continue;
            words[r] = load_words(w, x + (long)(row_ids ? row_ids[i] : i) * w->num_inputs, word * inputs_each);
        }
        transpose(words);
        for (int i = 0; i < at_most(LANES, num_words - word); i++) store_some(out + (long)(word + i) * R, words[i], R);
    }
}

static void pack_tile(const struct weight *w, const struct packed_rows *rows, const float *x, const int32_t *row_ids,
                      int tile) {
    if (is_integer(w)) pack_integer_tile(w, x, row_ids, tile, rows);
#ifdef __AMX_TILE__
    else if (rows->run > 1) amx_pack_tile(w, rows, x, row_ids, tile);
#endif
    else pack_float_tile(w, x, row_ids, tile, rows);
}

/* `arrange`, and where in memory of packed_rows_bytes everything goes. */
static struct packed_rows lay_out(const struct weight *w, int num_rows, char *memory) {
    struct packed_rows rows = arrange(w, num_rows);
    int num_blocks = is_integer(w) ? ceil_div(w->num_inputs, w->block_size) : 0;
    size_t num_scales = (size_t)rows.num_tiles * rows.tile_rows * num_blocks;
    rows.values = take(&memory, rows.num_tiles * tile_bytes(w, &rows));
    rows.scales = take(&memory, num_scales * sizeof(float));
    rows.sums = take(&memory, num_scales * sizeof(int32_t));
    return rows;
}

struct pack_call {
    const struct weight *w;
    const struct packed_rows *rows;
    const float *x;
    const int32_t *row_ids;
};

static void pack_part(void *context, int tile) {
    const struct pack_call *call = context;
    pack_tile(call->w, call->rows, call->x, call->row_ids, tile);
}

struct packed_rows AT_LEVEL(pack_rows)(const struct weight *w, const float *x, const int32_t *row_ids, int num_rows,
                                       char *memory, int num_threads) {
    struct packed_rows rows = lay_out(w, num_rows, memory);
    struct pack_call call = {w, &rows, x, row_ids};
    parallel_for(pack_part, &call, rows.num_tiles, num_rows < ROWS_WORTH_A_THREAD ? 1 : num_threads);
    return rows;
}

/* ---- one tile ---- */

struct tile {
    const struct weight *w;
    const char *panel;     /* first of C panels */
    size_t panel_bytes;
    int first_output;
    const char *values;    /* the packed rows of this tile */
    int first, last;       /* float formats: panel and values hold these inputs, */
    float *so_far;         /* whose products are added to sums [R][2 * C] */
    char *expanded;        /* of a compact panel, these inputs plain: where the first tile leaves them for the others */
    const float *scales;   /* integer formats: of the rows */
    const int32_t *sums;
    const float *bias;     /* [num_outputs] or NULL */
    float *y;              /* first row of the tile */
    int num_rows;          /* rows to write; the others are padding */
};

/* Write a tile's sums [R][2 * C] to y, with bias, without what is padding. */
static __attribute__((noinline)) void store_tile(const struct tile *t, int strip, const vec *sums, int C) {
    for (int r = 0; r < t->num_rows; r++) {
        float *y = t->y + (long)r * t->w->num_outputs;
        for (int c = 0; c < 2 * C; c++) {
            int first = t->first_output + 16 * c + strip, n = t->w->num_outputs - first;
            float buffer[LANES];
            if (n >= LANES) {
                vec sum = sums[r * 2 * C + c];
                if (t->bias) sum += load(t->bias + first);
                store(y + first, sum);
                continue;
            }
            store(buffer, sums[r * 2 * C + c]);
            for (int i = 0; i < n; i++) y[first + i] = t->bias ? buffer[i] + t->bias[first + i] : buffer[i];
        }
    }
}

/* The weights of one input, the `second` of its pair or not, for two vectors of outputs; of PAIRS, of both inputs. */
INLINE void load_weights(const char *p, int strip, int kind, int second, vec *a, vec *b) {
    const float *f32 = (const float *)p + strip;
    const uint16_t *f16 = (const uint16_t *)p + strip;
    if (kind == FLOAT16) *a = load_f16(f16), *b = load_f16(f16 + 16);
    else if (kind == BFLOAT16) *a = load_bf16_half(f32, second), *b = load_bf16_half(f32 + 16, second);
    else *a = load(f32), *b = load(f32 + 16);
}

INLINE vec add_product(int kind, vec sum, vec w, vec x) {
#ifdef __AVX512BF16__
    if (kind == PAIRS) return dot_pairs(sum, w, x);
#endif
    (void)kind;
    return fma_add(x, w, sum);
}

/* The second input of a pair first, as vdpbf16ps does: so all levels have the same bits. */
INLINE void float_tile(const struct tile *t, int kind, const int R, const int C) {
    const int format = kind == PAIRS ? BFLOAT16 : kind, together = inputs_together(format), step = step_bytes(format);
    const int values_each = kind == PAIRS ? 1 : together; /* of a row and a step */
    for (int strip = 0; strip < 16; strip += LANES) {
        const float *x = (const float *)t->values;
        const char *p = t->panel;
        float *so_far = t->so_far + R * 2 * C * strip;
        vec sums[MAX_TILE_ROWS][2 * FEW_ROWS_PANELS];
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < 2 * C; c++)
                sums[r][c] = t->first ? load(so_far + (r * 2 * C + c) * LANES) : broadcast(0.0f);
        for (int k = t->first; k < t->last; k += together, p += step, x += values_each * R)
#pragma GCC unroll 2
            for (int i = values_each - 1; i >= 0; i--) {
                vec w[2 * FEW_ROWS_PANELS];
#pragma GCC unroll 4
                for (int c = 0; c < C; c++)
                    load_weights(p + c * t->panel_bytes, strip, kind, i, &w[2 * c], &w[2 * c + 1]);
#pragma GCC unroll 12
                for (int r = 0; r < R; r++) {
                    vec input = broadcast(x[i * R + r]);
#pragma GCC unroll 8
                    for (int c = 0; c < 2 * C; c++) sums[r][c] = add_product(kind, sums[r][c], w[c], input);
                }
            }
        if (t->last < padded_inputs(t->w)) {
#pragma GCC unroll 12
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int c = 0; c < 2 * C; c++) store(so_far + (r * 2 * C + c) * LANES, sums[r][c]);
            continue;
        }
        vec result[R * 2 * C];
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < 2 * C; c++) result[r * 2 * C + c] = sums[r][c];
        store_tile(t, strip, result, C);
    }
}

#if LANES == 16

/* float_tile for a compact panel, expanded in registers. What is needed next is fetched into the second-level cache:
 * into the first-level one too few lines can be on their way. */
INLINE void compact_tile(const struct tile *t, int kind, const int R, const int C) {
    const struct weight *w = t->w;
    const float *x = (const float *)t->values;
    const char *p = t->panel;
    char here[2 * STEP_WEIGHTS] __attribute__((aligned(64))), *expanded = t->expanded ? t->expanded : here;
    int panel = t->first_output / PANEL, num_steps = w->num_inputs / 32;
    const int32_t *starts = w->exception_starts + (long)panel * (num_steps + 1);
    const int values_each = kind == PAIRS ? 1 : 2; /* of a row and a pair */
    ivec codebook = load_codebook(w->codebooks + 16 * panel);
    vec sums[MAX_TILE_ROWS][2], result[2 * R];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
            sums[r][half] = t->first ? load(t->so_far + (2 * r + half) * LANES) : broadcast(0.0f);
    for (int s = t->first / 32; s < t->last / 32; s++, p += COMPACT_STEP_BYTES) {
        int has_exceptions = starts[s] != starts[s + 1];
        if (has_exceptions) expand_panel(w, panel, s, expanded);
        for (int group = 0; group < 8; group++, x += 2 * values_each * R) {
            vec pairs[4];
            float *plain = (float *)(expanded + 256 * group);
            for (int i = 0; i < 3; i++) _mm_prefetch(p + FETCHED_BYTES + 192 * group + 64 * i, _MM_HINT_T1);
            if (has_exceptions) {
                for (int i = 0; i < 4; i++) pairs[i] = load(plain + 16 * i);
            } else {
                expand_group(p, group, codebook, pairs);
                if (t->expanded)
                    for (int i = 0; i < 4; i++) store(plain + 16 * i, pairs[i]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 2 * values_each; i++) {
                int pair = i / values_each, second = values_each - 1 - i % values_each;
                vec weights[2] = {pairs[2 * pair], pairs[2 * pair + 1]};
                if (kind == BFLOAT16)
                    for (int half = 0; half < 2; half++) weights[half] = bf16_half((ivec)weights[half], second);
#pragma GCC unroll 12
                for (int r = 0; r < R; r++) {
                    vec input = broadcast(x[(pair * values_each + second) * R + r]);
                    sums[r][0] = add_product(kind, sums[r][0], weights[0], input);
                    sums[r][1] = add_product(kind, sums[r][1], weights[1], input);
                }
            }
        }
        if (t->expanded) expanded += 2 * STEP_WEIGHTS;
    }
    float *to = t->last < w->num_inputs ? t->so_far : (float *)result;
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) store(to + (2 * r + half) * LANES, sums[r][half]);
    if (t->last == w->num_inputs) store_tile(t, 0, result, C);
}

#endif

INLINE void integer_tile(const struct tile *t, int format, const int R, const int C) {
    const struct weight *w = t->w;
    int K = w->num_inputs, block = w->block_size, num_groups = ceil_div(K, block);
    int step = step_bytes(format), first_panel = t->first_output / PANEL;
    for (int strip = 0; strip < 16; strip += LANES) {
        const char *x = t->values, *p = t->panel + 4 * strip;
        vec totals[R * 2 * C];
        for (int i = 0; i < R * 2 * C; i++) totals[i] = broadcast(0.0f);
        for (int b = 0; b < num_groups; b++) {
            const float *x_scales = t->scales + b * R;
            const int32_t *x_sums = t->sums + b * R;
            ivec sums[MAX_TILE_ROWS][2 * FEW_ROWS_PANELS];
#pragma GCC unroll 12
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int c = 0; c < 2 * C; c++) sums[r][c] = ibroadcast(format == INT8 ? -128 * x_sums[r] : 0);
            for (int k = b * block; k < at_most(K, (b + 1) * block); k += 4, p += step, x += 4 * R) {
                ivec weights[2 * FEW_ROWS_PANELS];
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) {
                    ivec low = load_bytes(p + c * t->panel_bytes);
                    weights[2 * c] = format == INT8 ? low : low_nibbles(low);
                    weights[2 * c + 1] = format == INT8 ? load_bytes(p + c * t->panel_bytes + 64) : high_nibbles(low);
                }
#pragma GCC unroll 12
                for (int r = 0; r < R; r++) {
                    int32_t four;
                    memcpy(&four, x + 4 * r, 4);
                    ivec inputs = ibroadcast(four);
#pragma GCC unroll 8
                    for (int c = 0; c < 2 * C; c++) sums[r][c] = dot_bytes(sums[r][c], weights[c], inputs);
                }
            }
#pragma GCC unroll 8
            for (int c = 0; c < 2 * C; c++) {
                long at = ((long)(first_panel + c / 2) * num_groups + b) * PANEL + 16 * (c % 2) + strip;
                vec scale = format == INT4 ? load_f16((const uint16_t *)w->scales + at) : broadcast(1.0f);
                vec zero = format == INT4 ? load_u8_as_float(w->zeros + at) : broadcast(0.0f);
#pragma GCC unroll 12
                for (int r = 0; r < R; r++) {
                    vec sum = to_float(sums[r][c]), x_scale = broadcast(x_scales[r]);
                    if (format == INT4) {
                        sum = fma_sub(zero, broadcast((float)x_sums[r]), sum);
                        x_scale = x_scale * scale;
                    }
                    totals[r * 2 * C + c] = fma_add(sum, x_scale, totals[r * 2 * C + c]);
                }
            }
        }
        if (format == INT8)
            for (int i = 0; i < R * 2 * C; i++)
                totals[i] *= load((const float *)w->scales + t->first_output + 16 * (i % (2 * C)) + strip);
        store_tile(t, strip, totals, C);
    }
}

/* One function for each format, with R and C known to the compiler in every case. */
#define TILE(function, format, R, C) \
    case (R) * 8 + (C): function(t, format, R, C); break;
#define TILES_FOR(name, function, format)                       \
    static void name(const struct tile *t, int R, int C) {      \
        switch (R * 8 + C) { ALL_TILES(function, format) }      \
    }
#if LANES == 16
#define ALL_TILES(f, format)                                                                                       \
    TILE(f, format, 1, 4) TILE(f, format, 2, 4) TILE(f, format, 3, 4) TILE(f, format, 4, 2) TILE(f, format, 5, 2)  \
    TILE(f, format, 6, 2) TILE(f, format, 1, 1) TILE(f, format, 2, 1) TILE(f, format, 3, 1) TILE(f, format, 4, 1)  \
    TILE(f, format, 5, 1) TILE(f, format, 6, 1) TILE(f, format, 7, 1) TILE(f, format, 8, 1) TILE(f, format, 9, 1)  \
    TILE(f, format, 10, 1) TILE(f, format, 11, 1) TILE(f, format, 12, 1)
#else
#define ALL_TILES(f, format)                                                                                      \
    TILE(f, format, 1, 4) TILE(f, format, 1, 1) TILE(f, format, 2, 1) TILE(f, format, 3, 1) TILE(f, format, 4, 1)  \
    TILE(f, format, 5, 1) TILE(f, format, 6, 1)
#endif
TILES_FOR(tile_f32, float_tile, FLOAT32)
TILES_FOR(tile_bf16, float_tile, BFLOAT16)
TILES_FOR(tile_f16, float_tile, FLOAT16)
TILES_FOR(tile_int8, integer_tile, INT8)
TILES_FOR(tile_int4, integer_tile, INT4)
#ifdef __AVX512BF16__
TILES_FOR(tile_pairs, float_tile, PAIRS)
TILES_FOR(tile_compact_pairs, compact_tile, PAIRS)
#else
#define tile_pairs NULL
#define tile_compact_pairs NULL
#endif
#if LANES == 16
TILES_FOR(tile_compact, compact_tile, BFLOAT16)
#else
#define tile_compact NULL
#endif
static void (*const TILE_OF_KIND[])(const struct tile *, int, int) = {
    [FLOAT32] = tile_f32, [BFLOAT16] = tile_bf16, [FLOAT16] = tile_f16, [INT8] = tile_int8, [INT4] = tile_int4,
    [PAIRS] = tile_pairs, [COMPACT + BFLOAT16] = tile_compact, [COMPACT + PAIRS] = tile_compact_pairs,
};

/* ---- whole matrices ---- */

struct multiply_call {
    const struct weight *w;
    const struct packed_rows *rows;
    const float *bias;
    float *y;
    int panels_each;
};

/* C panels times the rows of all tiles. Float formats go in stretches of inputs, whose weights lie in the first-level
 * cache for all tiles. */
static void multiply_panels(const struct multiply_call *call, int panel, int C) {
    const struct weight *w = call->w;
    const struct packed_rows *rows = call->rows;
    int K = padded_inputs(w), R = rows->tile_rows;
    int num_blocks = is_integer(w) ? ceil_div(w->num_inputs, w->block_size) : 0;
    int kind = takes_pairs(w) ? PAIRS : w->format, num_tiles = rows->num_tiles, stretch = K;
    int input_bytes = step_bytes(w->format) / inputs_together(w->format);
    long values_bytes = tile_bytes(w, rows), sums_each = (long)R * C * PANEL;
    struct tile t = {.w = w, .panel_bytes = panel_bytes(w), .first_output = panel * PANEL, .bias = call->bias};
    char expanded[STRETCH_BYTES] __attribute__((aligned(64)));
    float *so_far = NULL;
    if (num_tiles > 1 && !is_integer(w)) {
        stretch = STRETCH_BYTES / (C * input_bytes);
        so_far = scratch(SCRATCH_TILES, num_tiles * sums_each * sizeof(float));
        if (w->codebooks) t.expanded = expanded;
    }
    for (; t.first < K; t.first = t.last) {
        t.last = at_most(t.first + stretch, K);
        t.panel = (const char *)w->data + panel * t.panel_bytes + t.panel_bytes / K * t.first;
        for (int i = 0; i < num_tiles; i++) {
            t.values = rows->values + i * values_bytes + values_bytes / K * t.first;
            t.so_far = so_far + i * sums_each;
            t.scales = rows->scales + (long)i * R * num_blocks;
            t.sums = rows->sums + (long)i * R * num_blocks;
            t.y = call->y + (long)i * R * w->num_outputs;
            t.num_rows = at_most(R, rows->num_rows - i * R);
            TILE_OF_KIND[kind + (w->codebooks && i == 0 ? COMPACT : 0)](&t, R, C);
            if (w->codebooks) t.panel = expanded;
        }
    }
}

static void multiply_part(void *context, int part) {
    const struct multiply_call *call = context;
    int first_panel = part * call->panels_each, R = call->rows->tile_rows;
    int last_panel = at_most(first_panel + call->panels_each, num_panels(call->w));
#ifdef __AMX_TILE__
    if (call->rows->run > 4) {
        amx_multiply(call->w, call->rows, call->bias, call->y, first_panel, last_panel);
        return;
    }
#endif
    for (int panel = first_panel, C; panel < last_panel; panel += C) {
        C = R <= FEW_ROWS ? FEW_ROWS_PANELS : R <= SOME_ROWS ? SOME_ROWS_PANELS : 1;
        if (last_panel - panel < C || call->w->codebooks) C = 1;
        multiply_panels(call, panel, C);
    }
}

/* Waking a thread takes some 30 us, in which the first reads half a megabyte; one that is awake needs 2 us. */
enum { BYTES_WORTH_A_WAKE = 2 << 20, BYTES_WORTH_A_THREAD = 256 << 10 };
enum { PANELS_EACH = 8 };

static int threads_worth(const struct weight *w, int num_rows, int num_threads) {
    size_t least = threads_are_awake() ? BYTES_WORTH_A_THREAD : BYTES_WORTH_A_WAKE;
    return num_panels(w) * panel_bytes(w) * ceil_div(num_rows, 8) < least ? 1 : num_threads;
}

void AT_LEVEL(multiply)(const struct weight *w, const struct packed_rows *rows, const float *bias, float *y,
                        int num_threads) {
    num_threads = threads_worth(w, rows->num_rows, num_threads);
    struct multiply_call call = {w, rows, bias, y, num_threads > 1 ? PANELS_EACH : num_panels(w)};
    parallel_for(multiply_part, &call, ceil_div(num_panels(w), call.panels_each), num_threads);
}

void AT_LEVEL(linear)(const struct weight *w, const float *x, int num_rows, const float *bias, float *y,
                      int num_threads) {
    if (num_rows == 0) return;
    char *memory = scratch(SCRATCH_CALL, AT_LEVEL(packed_rows_bytes)(w, num_rows));
    struct packed_rows rows = AT_LEVEL(pack_rows)(w, x, NULL, num_rows, memory, num_threads);
    AT_LEVEL(multiply)(w, &rows, bias, y, num_threads);
}

/* ---- SwiGLU between two products ---- */

#ifdef __AMX_TILE__

struct activate_call {
    const struct weight *gate_up;
    const struct packed_rows *rows, *activated;
    int panels_each;
};

static void activate_part(void *context, int part) {
    const struct activate_call *call = context;
    int first_panel = part * call->panels_each, num_inner_panels = num_panels(call->gate_up) / 2;
    amx_activate(call->gate_up, call->rows, call->activated, first_panel,
                 at_most(first_panel + call->panels_each, num_inner_panels));
}

#endif

size_t AT_LEVEL(activated_bytes)(const struct weight *gate_up, const struct weight *down, int num_rows) {
    size_t packed_bytes = AT_LEVEL(packed_rows_bytes)(down, num_rows) + 64;
#ifdef __AMX_TILE__
    if (amx_activates(gate_up, down)) return packed_bytes;
#endif
    return packed_bytes + (size_t)num_rows * (gate_up->num_outputs + down->num_inputs) * sizeof(float) + 2 * 64;
}

struct packed_rows AT_LEVEL(activate)(const struct weight *gate_up, const struct weight *down,
                                      const struct packed_rows *rows, char *memory, int num_threads) {
    int num_rows = rows->num_rows, inner = down->num_inputs;
    char *packed = take(&memory, AT_LEVEL(packed_rows_bytes)(down, num_rows));
#ifdef __AMX_TILE__
    if (amx_activates(gate_up, down)) {
        struct packed_rows activated = lay_out(down, num_rows, packed);
        int num_inner_panels = num_panels(gate_up) / 2;
        num_threads = threads_worth(gate_up, num_rows, num_threads);
        struct activate_call call = {gate_up, rows, &activated, num_threads > 1 ? PANELS_EACH / 2 : num_inner_panels};
        parallel_for(activate_part, &call, ceil_div(num_inner_panels, call.panels_each), num_threads);
        return activated;
    }
#endif
    float *h = take(&memory, 2 * (size_t)num_rows * inner * sizeof(float)), *activated = (float *)memory;
    AT_LEVEL(multiply)(gate_up, rows, NULL, h, num_threads);
    AT_LEVEL(swiglu)(h, num_rows, inner, activated, num_threads);
    return AT_LEVEL(pack_rows)(down, activated, NULL, num_rows, packed, num_threads);
}
