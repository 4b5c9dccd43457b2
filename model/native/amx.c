/* Rows times a packed weight in AMX tiles: 16 rows x 64 bytes of inputs times as many inputs x 16 outputs at a time.
 * Here are the integers, and what they share with amx_bfloat16.c.
 *
 * INT8, INT4: the sum over a block of inputs is an exact integer, so a row has the bits of the other levels.
 *
 * Tiles: 0-3 sums, 4-5 rows, 6-7 weights of outputs 0-15 and 16-31 of a panel. A panel's inputs are its tiles' rows as
 * they lie, 128 bytes apart (see native.h); INT4 is unpacked to the same layout, a block at a time.
 */
#include <string.h>

#include "amx.h"

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

struct packed_rows amx_some_tiles(const struct weight *w, const struct packed_rows *rows, long tile_bytes, int first,
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

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t num_rows[16];
} __attribute__((packed));

void amx_configure(int num_rows, int run_bytes) {
    struct tile_config config = {.palette = 1};
    for (int i = 0; i < 4; i++) config.num_rows[i] = num_rows, config.row_bytes[i] = 64;
    for (int i = 4; i < 6; i++) config.num_rows[i] = num_rows, config.row_bytes[i] = run_bytes;
    for (int i = 6; i < 8; i++) config.num_rows[i] = run_bytes / 4, config.row_bytes[i] = 64;
    __asm__ volatile("" : : "m"(config)); /* gcc's intrinsic says that it reads 8 bytes; it reads all */
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

static void integers(const struct weight *w, const struct packed_rows *rows, const float *bias, float *y,
                     int first_panel, int last_panel) {
    long tile_bytes = (long)rows->tile_rows * w->num_inputs;
    int at_a_time = ceil_div(GROUP_BYTES, tile_bytes);
    amx_configure(rows->tile_rows, rows->run);
    for (int first = 0; first < rows->num_tiles; first += at_a_time) {
        struct packed_rows some = amx_some_tiles(w, rows, tile_bytes, first, at_a_time);
        if (w->format == INT8) integer_panels(w, &some, bias, y, first_panel, last_panel, INT8);
        else integer_panels(w, &some, bias, y, first_panel, last_panel, INT4);
        y += (long)some.num_rows * w->num_outputs;
    }
    _tile_release();
}

void amx_multiply(const struct weight *w, const struct packed_rows *rows, const float *bias, float *y,
                  int first_panel, int last_panel) {
    if (w->format == BFLOAT16) amx_multiply_bfloat16(w, rows, bias, y, first_panel, last_panel);
    else integers(w, rows, bias, y, first_panel, last_panel);
}
