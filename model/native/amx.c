/* Rows times a packed weight in AMX tiles: 16 rows x 64 bytes of inputs times as many inputs x 16 outputs at a time.
 *
 * INT8, INT4: the sum over a block of inputs is an exact integer, so a row has the bits of the other levels.
 * BFLOAT16: a float32 input is taken as the sum of two bf16 numbers, each in a tile of its own, whose products add up in
 * the same sums: 16 of its 24 bits. Results are off by 2.5e-6 of their size, where the sums of 2,000 products in
 * float32 are by 0.8e-6 (and bfloat16 inputs would be by 2e-3); a third part would mend that and make prefill half as
 * slow again. The hardware adds in an order of its own, in which no other row has a part: a row has the same bits in
 * any batch, though not those of the other levels.
 *
 * Tiles: 0-3 sums, 4-5 rows, 6-7 weights of outputs 0-15 and 16-31 of a panel. A panel's inputs are its tiles' rows as
 * they lie, 128 bytes apart (see native.h); INT4 is unpacked to the same layout, a block at a time.
 */
#include <string.h>

#include "linear.h"

enum { SUMS = 16 * 16, WEIGHT_STRIDE = 4 * PANEL, STEP_BYTES = 16 * WEIGHT_STRIDE };
enum { FEW_INT8_ROWS = 3, FEW_INT4_ROWS = 6 }; /* vectors are as fast with so many */
enum { GROUP_BYTES = 1200 << 10 }; /* of packed rows, which stay in the second-level cache for all panels */
enum { STEPS_AT_A_TIME = 8 };  /* whose weights, 16 KB, stay in the first-level cache for all rows */

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

/* ---- bfloat16 ---- */

/* 16 inputs of a row, in AMX_PARTS parts. */
INLINE void split(const float *x, char *out, long part_bytes) {
    vec rest = load(x);
    for (int part = 0; part < AMX_PARTS; part++, out += part_bytes) {
        __m256i nearest = (__m256i)_mm512_cvtneps_pbh(rest);
        _mm256_storeu_si256((__m256i *)out, nearest);
        rest -= _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(nearest), 16)); /* exact */
    }
}

void amx_pack_tile(const struct packed_rows *rows, const float *x, const int32_t *row_ids, int num_inputs, int tile) {
    int R = rows->tile_rows, num_rows = at_most(R, rows->num_rows - tile * R);
    long part_bytes = (long)R * 64;
    char *out = rows->values + tile * part_bytes * AMX_PARTS * (num_inputs / 32);
    const float *from[AMX_TILE_ROWS];
    for (int r = 0; r < num_rows; r++) {
        int i = tile * R + r;
        from[r] = x + (long)(row_ids ? row_ids[i] : i) * num_inputs;
    }
    for (int k = 0; k < num_inputs; k += 32, out += part_bytes * AMX_PARTS)
        for (int r = 0; r < num_rows; r++) {
            split(from[r] + k, out + r * 64, part_bytes);
            split(from[r] + k + 16, out + r * 64 + 32, part_bytes);
        }
}

INLINE void begin_sums(const float *sums, const int is_first, const int two) {
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + SUMS, 64);
    if (!two) return;
    _tile_loadd(2, sums + 2 * SUMS, 64);
    _tile_loadd(3, sums + 3 * SUMS, 64);
}

INLINE void end_sums(float *sums, const int two) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SUMS, 64);
    if (!two) return;
    _tile_stored(2, sums + 2 * SUMS, 64);
    _tile_stored(3, sums + 3 * SUMS, 64);
}

/* Steps [first, last) of tile t and, if `two`, of t + 1. sums: [tile][half of the panel][16][16]. Meanwhile `num_ahead`
 * lines of the weights `ahead` bytes on are fetched in each step. */
INLINE void bfloat16_steps(const struct packed_rows *rows, const char *panel, int num_inputs, int t, const int two,
                           int first, int last, float *sums, int ahead, int num_ahead) {
    long part_bytes = (long)rows->tile_rows * 64, step_bytes = part_bytes * AMX_PARTS;
    const char *x = rows->values + t * step_bytes * (num_inputs / 32), *next = x + step_bytes * (num_inputs / 32);
    begin_sums(sums, first == 0, two);
    for (int s = first; s < last; s++) {
        const char *weights = panel + (long)s * STEP_BYTES;
        for (int i = 0; i < num_ahead; i++) _mm_prefetch(weights + ahead + 64 * i, _MM_HINT_T1);
        _tile_loadd(6, weights, WEIGHT_STRIDE);
        _tile_loadd(7, weights + 64, WEIGHT_STRIDE);
#pragma GCC unroll 2
        for (int part = 0; part < AMX_PARTS; part++) {
            _tile_loadd(4, x + s * step_bytes + part * part_bytes, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (!two) continue;
            _tile_loadd(5, next + s * step_bytes + part * part_bytes, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    end_sums(sums, two);
}

/* All steps of the only tile for a panel and the next one: two streams come faster from memory than one. */
static void two_bfloat16_panels(const struct packed_rows *rows, const char *panel, int num_inputs, float *sums) {
    long part_bytes = (long)rows->tile_rows * 64;
    const char *x = rows->values, *next = panel + (long)num_inputs * PANEL * 2;
    begin_sums(sums, 1, 1);
    for (int s = 0; s < num_inputs / 32; s++, panel += STEP_BYTES, next += STEP_BYTES)
#pragma GCC unroll 2
        for (int part = 0; part < AMX_PARTS; part++, x += part_bytes) {
            _tile_loadd(4, x, 64);
            _tile_loadd(6, panel, WEIGHT_STRIDE);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, panel + 64, WEIGHT_STRIDE);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(6, next, WEIGHT_STRIDE);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, next + 64, WEIGHT_STRIDE);
            _tile_dpbf16ps(3, 4, 7);
        }
    end_sums(sums, 1);
}

/* All tiles for a panel. sums: [tile][half of the panel][16][16]. */
static void bfloat16_panel(const struct packed_rows *rows, const char *panel, int num_inputs, float *sums) {
    int num_steps = num_inputs / 32, num_tiles = rows->num_tiles;
    int at_a_time = num_tiles > 2 ? STEPS_AT_A_TIME : num_steps;
    int num_ahead = ceil_div(STEP_BYTES / 64, ceil_div(num_tiles, 2)); /* every pair of tiles fetches its share */
    for (int first = 0; first < num_steps; first += at_a_time) {
        int last = at_most(first + at_a_time, num_steps), ahead = STEPS_AT_A_TIME * STEP_BYTES;
        float *of_pair = sums;
        for (int t = 0; t < num_tiles; t += 2, of_pair += 4 * SUMS, ahead += 64 * num_ahead)
            if (t + 1 < num_tiles)
                bfloat16_steps(rows, panel, num_inputs, t, 1, first, last, of_pair, ahead, num_ahead);
            else
                bfloat16_steps(rows, panel, num_inputs, t, 0, first, last, of_pair, ahead, num_ahead);
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

/* ---- whole matrices ---- */

/* totals: [tile][half of the panel][16][16] */
static void store_rows(const struct weight *w, const struct packed_rows *rows, const float *totals, const float *bias,
                       int panel, float *y) {
    int first = panel * PANEL, n = at_most(PANEL, w->num_outputs - first), R = rows->tile_rows;
    __mmask16 there[2] = {n < 16 ? (1 << n) - 1 : 0xffff, n > 16 ? (1 << (n - 16)) - 1 : 0};
    vec added[2] = {broadcast(0.0f), broadcast(0.0f)};
    if (bias)
        for (int half = 0; half < 2; half++) added[half] = _mm512_maskz_loadu_ps(there[half], bias + first + 16 * half);
    y += first;
    for (int i = 0; i < rows->num_rows; i += R, totals += 2 * SUMS)
        for (int r = 0; r < at_most(R, rows->num_rows - i); r++, y += w->num_outputs) {
            _mm512_mask_storeu_ps(y, there[0], load(totals + r * 16) + added[0]);
            if (n > 16) _mm512_mask_storeu_ps(y + 16, there[1], load(totals + SUMS + r * 16) + added[1]);
        }
}

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
    int tile_bytes = R * K * (is_bfloat16 ? 2 * AMX_PARTS : 1);
    int at_a_time = ceil_div(GROUP_BYTES / 2, tile_bytes) * 2; /* tiles: pairs */
    size_t totals_bytes = (size_t)at_a_time * 2 * SUMS * sizeof(float);
    char *memory = scratch(SCRATCH_TILES, totals_bytes + (size_t)at_most(w->block_size, K) * PANEL + 2 * 64);
    float *totals = take(&memory, totals_bytes);
    char *unpacked = memory;
    size_t panel_bytes = (size_t)K * PANEL * (is_bfloat16 ? 4 : w->format == INT8 ? 2 : 1) / 2;
    configure(R, is_bfloat16 ? 2 * rows->run : rows->run);
    for (int first = 0; first < rows->num_tiles; first += at_a_time) {
        struct packed_rows some = some_tiles(w, rows, tile_bytes, first, at_a_time);
        for (int i = first_panel, num_panels; i < last_panel; i += num_panels) {
            const char *panel = (const char *)w->data + i * panel_bytes;
            num_panels = is_bfloat16 && some.num_tiles == 1 && i + 1 < last_panel ? 2 : 1;
            if (num_panels == 2) two_bfloat16_panels(&some, panel, K, totals);
            else if (is_bfloat16) bfloat16_panel(&some, panel, K, totals);
            else if (w->format == INT8) integer_panel(w, &some, INT8, i, panel, unpacked, totals);
            else integer_panel(w, &some, INT4, i, panel, unpacked, totals);
            for (int p = 0; p < num_panels; p++) store_rows(w, &some, totals + p * 2 * SUMS, bias, i + p, y);
        }
        y += (long)some.num_rows * w->num_outputs;
    }
    _tile_release();
}
