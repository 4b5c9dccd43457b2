/* Rows times a packed weight in AMX tiles: 16 rows x 64 bytes of inputs times as many inputs x 16 outputs at a time.
 *
 * INT8, INT4: the sum over a block of inputs is an exact integer, so a row has the bits of the other levels.
 * BFLOAT16: a float32 input is taken as the sum of two bf16 numbers, each in a tile of its own, whose products add up in
 * the same sums: 16 of its 24 bits. Results are off by 2.5e-6 of their size, where the sums of 2,000 products in
 * float32 are by 0.8e-6; a third part would mend that and make prefill half as slow again. With `bfloat16_inputs` there
 * is one part, and results are off by 2e-3. The hardware adds in an order of its own, in which no other row has a part:
 * a row has the same bits in any batch, though not those of the other levels.
 *
 * Tiles: 0-3 sums, 4-5 rows, 6-7 weights of outputs 0-15 and 16-31 of a panel. A panel's inputs are its tiles' rows as
 * they lie, 128 bytes apart (see native.h); INT4 is unpacked to the same layout, a block at a time.
 */
#include <string.h>

#include "linear.h"

enum { SUMS = 16 * 16, WEIGHT_STRIDE = 4 * PANEL, STEP_BYTES = 16 * WEIGHT_STRIDE };
enum { FEW_INT8_ROWS = 3, FEW_INT4_ROWS = 6 }; /* vectors are as fast with so many */
enum { GROUP_BYTES = 1200 << 10 }; /* of packed rows, which stay in the second-level cache for all panels */

int amx_run(const struct weight *w, int num_rows) {
    int K = w->num_inputs, block = at_most(w->block_size, K);
    if (w->format == BFLOAT16) return K % 32 ? 0 : 32;
    if (!is_integer(w) || num_rows <= (w->format == INT8 ? FEW_INT8_ROWS : FEW_INT4_ROWS)) return 0;
    for (int run = 64; run >= 32; run /= 2)
        if (K % run == 0 && block % run == 0) return run;
    return 0;
}

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t num_rows[16];
} __attribute__((packed));

static void configure(int num_rows, int run_bytes) {
    struct tile_config config = {.palette = 1};
    for (int i = 0; i < 4; i++) config.num_rows[i] = num_rows, config.row_bytes[i] = 64;
    for (int i = 4; i < 6; i++) config.num_rows[i] = num_rows, config.row_bytes[i] = run_bytes;
    for (int i = 6; i < 8; i++) config.num_rows[i] = run_bytes / 4, config.row_bytes[i] = 64;
    _tile_loadconfig(&config);
}

/* Rows of one tile, sums [half of the panel][16][16], to y, which begins with the first of them. */
static void store_rows(const struct weight *w, const float *sums, const float *bias, int panel, float *y,
                       int num_rows) {
    int first = panel * PANEL, n = at_most(PANEL, w->num_outputs - first);
    __mmask16 there[2] = {n < 16 ? (1 << n) - 1 : 0xffff, n > 16 ? (1 << (n - 16)) - 1 : 0};
    vec added[2] = {broadcast(0.0f), broadcast(0.0f)};
    if (bias)
        for (int half = 0; half < 2; half++) added[half] = _mm512_maskz_loadu_ps(there[half], bias + first + 16 * half);
    y += first;
    for (int r = 0; r < num_rows; r++, y += w->num_outputs) {
        _mm512_mask_storeu_ps(y, there[0], load(sums + r * 16) + added[0]);
        if (n > 16) _mm512_mask_storeu_ps(y + 16, there[1], load(sums + SUMS + r * 16) + added[1]);
    }
}

/* ---- bfloat16 ---- */

/* 16 inputs of a row, in parts. */
INLINE void split(const float *x, char *out, long part_bytes, int parts) {
    vec rest = load(x);
    for (int part = 0; part < parts; part++, out += part_bytes) {
        __m256i nearest = (__m256i)_mm512_cvtneps_pbh(rest);
        _mm256_storeu_si256((__m256i *)out, nearest);
        rest -= _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(nearest), 16)); /* exact */
    }
}

void amx_pack_tile(const struct weight *w, const struct packed_rows *rows, const float *x, const int32_t *row_ids,
                   int tile) {
    int R = rows->tile_rows, num_rows = at_most(R, rows->num_rows - tile * R), num_inputs = w->num_inputs;
    int parts = amx_parts(w);
    long part_bytes = (long)R * 64;
    char *out = rows->values + tile * part_bytes * parts * (num_inputs / 32);
    const float *from[AMX_TILE_ROWS];
    for (int r = 0; r < num_rows; r++) {
        int i = tile * R + r;
        from[r] = x + (long)(row_ids ? row_ids[i] : i) * num_inputs;
    }
    for (int k = 0; k < num_inputs; k += 32, out += part_bytes * parts)
        for (int r = 0; r < num_rows; r++) {
            split(from[r] + k, out + r * 64, part_bytes, parts);
            split(from[r] + k + 16, out + r * 64 + 32, part_bytes, parts);
        }
}

/* The sums of a tile of rows, and of the next one if `two`, for a panel: in tiles 0 and 1, and in 2 and 3. Meanwhile
 * `num_ahead` lines of the weights `ahead` bytes on are fetched in each step, and those of y where the sums will go: a
 * store that misses the cache would hold up the tiles behind it. */
INLINE void tiles_by_panel(const struct packed_rows *rows, const char *x, const char *panel, int num_steps,
                           const int parts, const int two, long ahead, int num_ahead, const float *y, long row) {
    long part_bytes = (long)rows->tile_rows * 64;
    const char *next = x + num_steps * parts * part_bytes;
    _tile_zero(0);
    _tile_zero(1);
    if (two) _tile_zero(2);
    if (two) _tile_zero(3);
    for (int s = 0; s < num_steps; s++, panel += STEP_BYTES) {
        for (int i = 0; i < num_ahead; i++) _mm_prefetch(panel + ahead + 64 * i, _MM_HINT_T1);
        for (int half = 0; s < 2 * AMX_TILE_ROWS && half < 2; half++) __builtin_prefetch(y + s * row + 16 * half, 1);
        _tile_loadd(6, panel, WEIGHT_STRIDE);
        _tile_loadd(7, panel + 64, WEIGHT_STRIDE);
#pragma GCC unroll 2
        for (int part = 0; part < parts; part++, x += part_bytes, next += part_bytes) {
            _tile_loadd(4, x, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (!two) continue;
            _tile_loadd(5, next, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

/* The parts of the rows in tiles 4 and 5 times 16 outputs' weights: tiles have numbers that the compiler must know. */
#define ADD_PRODUCTS(sums, tile, weights)       \
    _tile_loadd(tile, weights, WEIGHT_STRIDE);  \
    _tile_dpbf16ps(sums, 4, tile);              \
    if (parts == 2) _tile_dpbf16ps(sums, 5, tile);

/* The sums of one tile of rows for a panel and the next one: two streams come faster from memory than one, and faster
 * still with what the next step needs asked for before this one's tiles wait. */
INLINE void tile_by_panels(const struct packed_rows *rows, const char *panel, int num_steps, const int parts) {
    long part_bytes = (long)rows->tile_rows * 64;
    const char *x = rows->values, *next = panel + (long)num_steps * STEP_BYTES;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < num_steps; s++, panel += STEP_BYTES, next += STEP_BYTES, x += parts * part_bytes) {
        for (int i = 0; i < STEP_BYTES; i += 64) {
            _mm_prefetch(panel + STEP_BYTES + i, _MM_HINT_T0);
            _mm_prefetch(next + STEP_BYTES + i, _MM_HINT_T0);
        }
        _tile_loadd(4, x, 64);
        if (parts == 2) _tile_loadd(5, x + part_bytes, 64);
        ADD_PRODUCTS(0, 6, panel)
        ADD_PRODUCTS(1, 7, panel + 64)
        ADD_PRODUCTS(2, 6, next)
        ADD_PRODUCTS(3, 7, next + 64)
    }
}

/* Tiles 0 and 1, or 2 and 3, to y, or by way of a buffer where a part of them is padding or gets a bias. */
INLINE void store_sums(const struct weight *w, const float *bias, int panel, float *y, int num_rows, const int second,
                       int tile_rows) {
    float sums[2 * SUMS] __attribute__((aligned(64)));
    int is_whole = num_rows == tile_rows && (panel + 1) * PANEL <= w->num_outputs && !bias;
    float *out = is_whole ? y + panel * PANEL : sums, *out_16 = is_whole ? out + 16 : sums + SUMS;
    long stride = is_whole ? (long)w->num_outputs * sizeof(float) : 64;
    if (second) {
        _tile_stored(2, out, stride);
        _tile_stored(3, out_16, stride);
    } else {
        _tile_stored(0, out, stride);
        _tile_stored(1, out_16, stride);
    }
    if (!is_whole) store_rows(w, sums, bias, panel, y, num_rows);
}

INLINE void bfloat16_panels(const struct weight *w, const struct packed_rows *rows, const float *bias, float *y,
                            int first_panel, int last_panel, const int parts) {
    int R = rows->tile_rows, num_steps = w->num_inputs / 32;
    long panel_bytes = (long)num_steps * STEP_BYTES, tile_bytes = (long)num_steps * parts * R * 64;
    int num_ahead = ceil_div(STEP_BYTES / 64, ceil_div(rows->num_tiles, 2)); /* every pair of tiles fetches its share */
    for (int i = first_panel; i < last_panel; i++) {
        const char *panel = (const char *)w->data + i * panel_bytes;
        if (rows->num_tiles == 1 && i + 1 < last_panel) {
            tile_by_panels(rows, panel, num_steps, parts);
            store_sums(w, bias, i, y, rows->num_rows, 0, R);
            store_sums(w, bias, ++i, y, rows->num_rows, 1, R);
            continue;
        }
        for (int t = 0; t < rows->num_tiles; t += 2) {
            const char *x = rows->values + t * tile_bytes;
            int num_rows = rows->num_rows - t * R, two = t + 1 < rows->num_tiles;
            long row = w->num_outputs, ahead = panel_bytes + 32 * t * num_ahead;
            float *out = y + t * R * row;
            if (two) tiles_by_panel(rows, x, panel, num_steps, parts, 1, ahead, num_ahead, out + i * PANEL, row);
            else tiles_by_panel(rows, x, panel, num_steps, parts, 0, ahead, num_ahead, out + i * PANEL, row);
            store_sums(w, bias, i, out, at_most(R, num_rows), 0, R);
            if (two) store_sums(w, bias, i, out + R * row, at_most(R, num_rows - R), 1, R);
        }
    }
}

/* ---- integers ---- */

/* 16 bytes of low and high nibbles -> the layout of INT8. */
static void unpack_nibbles(const char *from, int num_inputs, char *out) {
    for (int k = 0; k < num_inputs; k += 4, from += 64, out += WEIGHT_STRIDE) {
        ivec both = load_bytes(from);
        _mm512_storeu_si512(out, low_nibbles(both));
        _mm512_storeu_si512(out + 64, high_nibbles(both));
    }
}

/* Add a block's integer sums, scaled, to the totals [half of the panel][16][16] of a tile: the operations of
 * integer_tile in linear.c. */
INLINE void add_block(const int32_t *sums, const float *x_scales, const int32_t *x_sums, int R, int format,
                      const vec *scales, const vec *zeros, float *totals) {
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            ivec whole = load_bytes(sums + half * SUMS + r * 16);
            vec sum, scale = broadcast(x_scales[r]), total = load(totals + half * SUMS + r * 16);
            if (format == INT8) {
                sum = to_float(_mm512_sub_epi32(whole, ibroadcast(128 * x_sums[r])));
            } else {
                sum = fma_sub(zeros[half], broadcast((float)x_sums[r]), to_float(whole));
                scale = scale * scales[half];
            }
            store(totals + half * SUMS + r * 16, fma_add(sum, scale, total));
        }
}

/* Integer sums [half of the panel][16][16] of the rows of one tile over inputs [first, last). */
INLINE void multiply_block(const char *x, int R, int run, const char *weights, int first, int last, int32_t *sums) {
    _tile_zero(0);
    _tile_zero(1);
    for (int k = first; k < last; k += run, weights += (long)run * PANEL) {
        _tile_loadd(4, x + (long)k * R, run);
        _tile_loadd(6, weights, WEIGHT_STRIDE);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, weights + 64, WEIGHT_STRIDE);
        _tile_dpbsud(1, 4, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SUMS, 64);
}

/* Tiles are multiplied one ahead of adding their sums, which so need not be waited for. */
INLINE void integer_panel(const struct weight *w, const struct packed_rows *rows, int format, int panel_idx,
                          const char *panel, char *unpacked, float *totals) {
    int K = w->num_inputs, R = rows->tile_rows, num_tiles = rows->num_tiles, block = w->block_size;
    int num_blocks = ceil_div(K, block);
    int32_t sums[2][2 * SUMS] __attribute__((aligned(64)));
    vec scales[2], zeros[2];
    memset(totals, 0, (size_t)num_tiles * 2 * SUMS * sizeof(float));
    for (int i = 0; i <= num_blocks * num_tiles; i++) {
        if (i < num_blocks * num_tiles) {
            int b = i / num_tiles, t = i % num_tiles, first = b * block, last = at_most(K, first + block);
            const char *weights = format == INT4 ? unpacked : panel + (long)first * PANEL;
            if (format == INT4 && t == 0) unpack_nibbles(panel + (long)first * PANEL / 2, last - first, unpacked);
            multiply_block(rows->values + (long)t * R * K, R, rows->run, weights, first, last, sums[i % 2]);
        }
        if (i > 0) {
            int b = (i - 1) / num_tiles, t = (i - 1) % num_tiles;
            long at = ((long)t * num_blocks + b) * R;
            if (format == INT4 && t == 0)
                for (int half = 0; half < 2; half++) {
                    long group = ((long)panel_idx * num_blocks + b) * PANEL + 16 * half;
                    scales[half] = load_f16((const uint16_t *)w->scales + group);
                    zeros[half] = load_u8_as_float(w->zeros + group);
                }
            add_block(sums[(i - 1) % 2], rows->scales + at, rows->sums + at, R, format, scales, zeros,
                      totals + (long)t * 2 * SUMS);
        }
    }
    if (format == INT8)
        for (int i = 0; i < rows->num_rows; i++)
            for (int half = 0; half < 2; half++) {
                float *total = totals + (long)(i / R) * 2 * SUMS + half * SUMS + i % R * 16;
                store(total, load(total) * load((const float *)w->scales + panel_idx * PANEL + half * 16));
            }
}

INLINE void integer_panels(const struct weight *w, const struct packed_rows *rows, const float *bias, float *y,
                           int first_panel, int last_panel, int format) {
    int K = w->num_inputs, R = rows->tile_rows;
    size_t totals_bytes = (size_t)rows->num_tiles * 2 * SUMS * sizeof(float);
    size_t panel_bytes = (size_t)K * PANEL / (format == INT4 ? 2 : 1);
    char *memory = scratch(SCRATCH_TILES, totals_bytes + (size_t)at_most(w->block_size, K) * PANEL + 2 * 64);
    float *totals = take(&memory, totals_bytes);
    for (int i = first_panel; i < last_panel; i++) {
        integer_panel(w, rows, format, i, (const char *)w->data + i * panel_bytes, memory, totals);
        for (int t = 0; t < rows->num_tiles; t++)
            store_rows(w, totals + (long)t * 2 * SUMS, bias, i, y + (long)t * R * w->num_outputs,
                       at_most(R, rows->num_rows - t * R));
    }
}

/* ---- whole matrices ---- */

/* Some tiles of `rows`. */
static struct packed_rows some_tiles(const struct weight *w, const struct packed_rows *rows, long tile_bytes, int first,
                                     int most) {
    struct packed_rows some = *rows;
    int R = rows->tile_rows;
    some.num_tiles = at_most(most, rows->num_tiles - first);
    some.num_rows = at_most(some.num_tiles * R, rows->num_rows - first * R);
    some.values += first * tile_bytes;
    if (is_integer(w)) {
        long num_blocks = ceil_div(w->num_inputs, w->block_size);
        some.scales += first * R * num_blocks;
        some.sums += first * R * num_blocks;
    }
    return some;
}

void amx_multiply(const struct weight *w, const struct packed_rows *rows, const float *bias, float *y,
                  int first_panel, int last_panel) {
    int R = rows->tile_rows, is_bfloat16 = w->format == BFLOAT16, K = w->num_inputs;
    int tile_bytes = R * K * (is_bfloat16 ? 2 * amx_parts(w) : 1);
    int at_a_time = ceil_div(GROUP_BYTES / 2, tile_bytes) * 2; /* tiles: pairs */
    configure(R, is_bfloat16 ? 2 * rows->run : rows->run);
    for (int first = 0; first < rows->num_tiles; first += at_a_time) {
        struct packed_rows some = some_tiles(w, rows, tile_bytes, first, at_a_time);
        if (is_bfloat16 && amx_parts(w) == 2) bfloat16_panels(w, &some, bias, y, first_panel, last_panel, 2);
        else if (is_bfloat16) bfloat16_panels(w, &some, bias, y, first_panel, last_panel, 1);
        else if (w->format == INT8) integer_panels(w, &some, bias, y, first_panel, last_panel, INT8);
        else integer_panels(w, &some, bias, y, first_panel, last_panel, INT4);
        y += (long)some.num_rows * w->num_outputs;
    }
    _tile_release();
}
