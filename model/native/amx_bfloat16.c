/* Rows times a packed bfloat16 weight in AMX tiles.
 *
 * A float32 input is taken as the sum of two bf16 numbers, each in a tile of its own, whose products add up in the
 * same sums: 16 of its 24 bits. Results are off by 2.5e-6 of their size, where the sums of 2,000 products in float32
 * are by 0.8e-6; a third part would mend that and make prefill half as slow again. With `bfloat16_inputs` there is one
 * part, and results are off by 2e-3. The hardware adds in an order of its own, in which no other row has a part: a row
 * has the same bits in any batch, though not those of the other levels.
 *
 * What is used again lies in a cache. Panels go in blocks, whose sums lie in a buffer, and inputs in chunks, of which
 * those of all rows lie in the second-level cache; so weights come from memory once. Within a chunk, a stretch of a
 * panel is multiplied with all rows before the next one: its weights lie in the first-level cache, past which the rows
 * stream.
 */
#include "amx.h"

enum { BLOCK_PANELS = 8, CHUNK_BYTES = 1 << 20, CHUNK_TILES = 32 }; /* of packed rows */
enum { STRETCH_STEPS = 16, STRETCH_TILES = 6 }; /* steps with one part; tiles that stretches are worth it for */
enum { STREAMED_BYTES = 2 << 20 }; /* of results that no cache would hold until they are read */

/* ---- rows ---- */

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
        for (int r = 0; r < num_rows; r++)
            split(load(from[r] + k), load(from[r] + k + 16), out + r * 64, part_bytes, parts);
}

/* ---- tiles ---- */

/* The panels of a call, one after the other: all from `first` on; or, where `up` is not 0, each gate's and then its
 * up's, which is `up` panels further. */
struct panels {
    const char *data;
    long panel_bytes;
    int first, up;
};

INLINE const char *panel_at(const struct panels *panels, int i) {
    int panel = panels->up ? panels->first + i / 2 + i % 2 * panels->up : panels->first + i;
    return panels->data + panel * panels->panel_bytes;
}

/* Add the products of a pair of row tiles (or of one) with a stretch of a panel to `sums` [tile][half][16][16]. In each
 * step, num_ahead lines of weights that are needed next are fetched. */
INLINE void add_products(const char *x, long tile_bytes, long part_bytes, const char *panel, int num_steps,
                         const int parts, const int two, float *sums, int is_first, const char *ahead, int num_ahead) {
    const char *next = x + tile_bytes;
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        if (two) _tile_zero(2);
        if (two) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + SUMS, 64);
        if (two) _tile_loadd(2, sums + 2 * SUMS, 64);
        if (two) _tile_loadd(3, sums + 3 * SUMS, 64);
    }
    for (int s = 0; s < num_steps; s++, panel += STEP_BYTES, ahead += STEP_BYTES) {
        for (int i = 0; i < num_ahead; i++) _mm_prefetch(ahead + 64 * i, _MM_HINT_T1);
        _tile_loadd(6, panel, WEIGHT_STRIDE);
        _tile_loadd(7, panel + 64, WEIGHT_STRIDE);
#pragma GCC unroll 2
        for (int part = 0; part < parts; part++, x += part_bytes, next += part_bytes) {
            _tile_stream_loadd(4, x, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (!two) continue;
            _tile_stream_loadd(5, next, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SUMS, 64);
    if (two) _tile_stored(2, sums + 2 * SUMS, 64);
    if (two) _tile_stored(3, sums + 3 * SUMS, 64);
}

/* The sums of one tile of rows for two panels: two streams come faster from memory than one, and faster still with what
 * the next step needs asked for before this one's tiles wait. Each panel's sums take the room of a pair of tiles. */
INLINE void two_panels(const char *x, long part_bytes, const char *panel, const char *other, int num_steps,
                       const int parts, float *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < num_steps; s++, panel += STEP_BYTES, other += STEP_BYTES, x += parts * part_bytes) {
        for (int i = 0; i < STEP_BYTES; i += 64) {
            _mm_prefetch(panel + STEP_BYTES + i, _MM_HINT_T0);
            _mm_prefetch(other + STEP_BYTES + i, _MM_HINT_T0);
        }
        _tile_loadd(4, x, 64);
        if (parts == 2) _tile_loadd(5, x + part_bytes, 64);
        ADD_PRODUCTS(0, 6, panel, WEIGHT_STRIDE, parts)
        ADD_PRODUCTS(1, 7, panel + 64, WEIGHT_STRIDE, parts)
        ADD_PRODUCTS(2, 6, other, WEIGHT_STRIDE, parts)
        ADD_PRODUCTS(3, 7, other + 64, WEIGHT_STRIDE, parts)
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SUMS, 64);
    _tile_stored(2, sums + 4 * SUMS, 64);
    _tile_stored(3, sums + 5 * SUMS, 64);
}

/* The sums of panels [first, last) and all rows, [panel][pair of row tiles][tile][half][16][16]. */
INLINE void sums_of_block(const struct panels *panels, int first, int last, const struct packed_rows *rows,
                          int num_steps, const int parts, float *sums) {
    int num_tiles = rows->num_tiles, num_pairs = ceil_div(num_tiles, 2);
    long part_bytes = (long)rows->tile_rows * 64, tile_bytes = num_steps * parts * part_bytes;
    if (num_tiles == 1)
        for (; first + 1 < last; first += 2, sums += 8 * SUMS)
            two_panels(rows->values, part_bytes, panel_at(panels, first), panel_at(panels, first + 1), num_steps, parts,
                       sums);
    int chunk = even_part(num_steps, CHUNK_BYTES / (num_tiles * parts * part_bytes));
    int stretch = num_tiles < STRETCH_TILES ? chunk : even_part(chunk, STRETCH_STEPS / parts);
    int num_ahead = ceil_div(STEP_BYTES / 64, num_pairs); /* every pair of tiles fetches its share */
    for (int from = 0, end; from < num_steps; from = end) {
        end = at_most(from + chunk, num_steps);
        for (int i = first; i < last; i++)
            for (int step = from, stop; step < end; step = stop) {
                stop = at_most(step + stretch, end);
                const char *panel = panel_at(panels, i), *next = panel + (long)stop * STEP_BYTES;
                if (stop == end && i + 1 < last) next = panel_at(panels, i + 1) + (long)from * STEP_BYTES;
                else if (stop == end && end < num_steps) next = panel_at(panels, first) + (long)end * STEP_BYTES;
                else if (stop == end) next = panel_at(panels, last);
                for (int t = 0; t < num_tiles; t += 2) {
                    const char *x = rows->values + t * tile_bytes + step * parts * part_bytes;
                    const char *weights = panel + (long)step * STEP_BYTES, *ahead = next + 32 * t * num_ahead;
                    float *to = sums + ((i - first) * num_pairs + t / 2) * 4 * SUMS;
                    if (t + 1 < num_tiles)
                        add_products(x, tile_bytes, part_bytes, weights, stop - step, parts, 1, to, step == 0, ahead,
                                     num_ahead);
                    else
                        add_products(x, tile_bytes, part_bytes, weights, stop - step, parts, 0, to, step == 0, ahead,
                                     num_ahead);
                }
            }
    }
}

static void block_of_panels(const struct panels *panels, int first, int last, const struct packed_rows *rows,
                            int num_steps, int parts, float *sums) {
    if (parts == 2) sums_of_block(panels, first, last, rows, num_steps, 2, sums);
    else sums_of_block(panels, first, last, rows, num_steps, 1, sums);
}

/* Where a row's sums of the first half of a block's first panel lie. */
INLINE const float *sums_of_row(const float *sums, const struct packed_rows *rows, int row) {
    return sums + row / rows->tile_rows * 2 * SUMS + row % rows->tile_rows * 16;
}

/* ---- results ---- */

/* The sums of panels [first, last) and a bias to y. Rows are written one after the other, each in one piece. */
static void store_block(const struct weight *w, const struct packed_rows *rows, const float *sums, const float *bias,
                        float *y, int first, int last) {
    long panel_sums = ceil_div(rows->num_tiles, 2) * 4 * SUMS;
    int is_streamed = (size_t)rows->num_rows * w->num_outputs * sizeof(float) > STREAMED_BYTES &&
                      w->num_outputs % 16 == 0 && (uintptr_t)y % 64 == 0;
    for (int r = 0; r < rows->num_rows; r++) {
        const float *from = sums_of_row(sums, rows, r);
        float *out = y + (long)r * w->num_outputs;
        for (int i = first; i < last; i++, from += panel_sums)
            for (int half = 0; half < 2; half++) {
                int output = i * PANEL + half * 16, n = w->num_outputs - output;
                if (n <= 0) continue;
                __mmask16 there = n < 16 ? (1 << n) - 1 : 0xffff;
                vec sum = load(from + half * SUMS);
                if (bias) sum += _mm512_maskz_loadu_ps(there, bias + output);
                if (is_streamed) _mm512_stream_ps(out + output, sum);
                else _mm512_mask_storeu_ps(out + output, there, sum);
            }
    }
    _mm_sfence();
}

void amx_multiply_bfloat16(const struct weight *w, const struct packed_rows *rows, const float *bias, float *y,
                           int first_panel, int last_panel) {
    int parts = amx_parts(w), num_steps = w->num_inputs / 32;
    long tile_bytes = (long)num_steps * parts * rows->tile_rows * 64;
    struct panels panels = {w->data, (long)num_steps * STEP_BYTES, 0, 0};
    float *sums = scratch(SCRATCH_TILES, (size_t)BLOCK_PANELS * CHUNK_TILES * 2 * SUMS * sizeof(float));
    amx_configure(rows->tile_rows, 64);
    for (int tile = 0; tile < rows->num_tiles; tile += CHUNK_TILES) {
        struct packed_rows some = amx_some_tiles(w, rows, tile_bytes, tile, CHUNK_TILES);
        for (int first = first_panel; first < last_panel; first += BLOCK_PANELS) {
            int last = at_most(first + BLOCK_PANELS, last_panel);
            block_of_panels(&panels, first, last, &some, num_steps, parts, sums);
            store_block(w, &some, sums, bias, y + (long)tile * rows->tile_rows * w->num_outputs, first, last);
        }
    }
    _tile_release();
}

int amx_activates(const struct weight *gate_up, const struct weight *down) {
    return gate_up->format == BFLOAT16 && down->format == BFLOAT16 && gate_up->num_inputs % 32 == 0 &&
           down->num_inputs % 32 == 0 && amx_parts(gate_up) == amx_parts(down);
}

/* The sums of `count` gates and ups to their places among the inputs of the next product. */
static void activate_block(const struct packed_rows *rows, const float *sums, int count, int parts,
                           const struct packed_rows *activated, long tile_bytes, int first) {
    long part_bytes = (long)rows->tile_rows * 64, panel_sums = ceil_div(rows->num_tiles, 2) * 4 * SUMS;
    for (int r = 0; r < rows->num_rows; r++) {
        const float *gate = sums_of_row(sums, rows, r);
        int tile = r / rows->tile_rows, row = r % rows->tile_rows;
        char *out = activated->values + tile * tile_bytes + first * parts * part_bytes + row * 64;
        for (int i = 0; i < count; i++, gate += 2 * panel_sums, out += parts * part_bytes) {
            vec low = silu_times(load(gate), load(gate + panel_sums));
            vec high = silu_times(load(gate + SUMS), load(gate + SUMS + panel_sums));
            split(low, high, out, part_bytes, parts);
        }
    }
}

void amx_activate(const struct weight *gate_up, const struct packed_rows *rows, const struct packed_rows *activated,
                  int first_panel, int last_panel) {
    int parts = amx_parts(gate_up), num_steps = gate_up->num_inputs / 32, inner = gate_up->num_outputs / 2;
    struct panels panels = {gate_up->data, (long)num_steps * STEP_BYTES, first_panel, inner / PANEL};
    long in_tile_bytes = (long)num_steps * parts * rows->tile_rows * 64;
    long out_tile_bytes = (long)inner / 32 * parts * rows->tile_rows * 64;
    float *sums = scratch(SCRATCH_TILES, (size_t)BLOCK_PANELS * CHUNK_TILES * 2 * SUMS * sizeof(float));
    amx_configure(rows->tile_rows, 64);
    for (int tile = 0; tile < rows->num_tiles; tile += CHUNK_TILES) {
        struct packed_rows some = amx_some_tiles(gate_up, rows, in_tile_bytes, tile, CHUNK_TILES);
        struct packed_rows out = *activated;
        out.values += tile * out_tile_bytes;
        for (int first = 0; first < 2 * (last_panel - first_panel); first += BLOCK_PANELS) {
            int last = at_most(first + BLOCK_PANELS, 2 * (last_panel - first_panel));
            block_of_panels(&panels, first, last, &some, num_steps, parts, sums);
            activate_block(&some, sums, (last - first) / 2, parts, &out, out_tile_bytes, first_panel + first / 2);
        }
    }
    _tile_release();
}
