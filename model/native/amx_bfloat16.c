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
 * stream. Few rows are multiplied with two panels at a time instead. Compact panels (compact.h) are expanded there.
 */
#include "amx.h"
#include "compact.h"

enum { BLOCK_PANELS = 12, CHUNK_BYTES = 1 << 19, CHUNK_TILES = 32 }; /* of packed rows */
enum { STRETCH_STEPS = 16 }; /* with one part */
enum { FEW_BYTES = 1 << 20, RING = 2 }; /* of few rows; steps of two panels that they are multiplied with */
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
    const struct weight *w;
    int num_steps, step_bytes;
    int first, up;
};

static struct panels panels_of(const struct weight *w, int first, int up) {
    return (struct panels){w, w->num_inputs / 32, w->codebooks ? COMPACT_STEP_BYTES : STEP_BYTES, first, up};
}

INLINE int panel_idx(const struct panels *panels, int i) {
    return panels->up ? panels->first + i / 2 + i % 2 * panels->up : panels->first + i;
}

INLINE const char *step_at(const struct panels *panels, int i, int step) {
    return (const char *)panels->w->data + ((long)panel_idx(panels, i) * panels->num_steps + step) * panels->step_bytes;
}

/* A step of compact panels, plain. */
INLINE void expand(const struct panels *panels, int i, int step, char *out) {
    expand_panel(panels->w, panel_idx(panels, i), step, out);
}

/* Steps [first, last) of panel i, and what to fetch in each of them of the steps that are needed after. */
struct stretch {
    const struct panels *panels;
    int i, first, last;
    char *expanded; /* of compact panels */
    const char *ahead;
    int num_ahead; /* lines */
};

/* Whether rows are so few that weights rather come from memory in two streams than lie long in a cache: 6 tiles of one
 * part or 4 of two, which lie in the second-level cache whole. */
INLINE int are_few(int num_tiles, int parts, long tile_bytes) {
    return num_tiles * (1 + parts) <= 12 && num_tiles * tile_bytes <= FEW_BYTES;
}

/* Add the products of a pair of row tiles (or of one) with a stretch to `sums` [tile][half][16][16]. The first pair of
 * compact panels expands them for the others, a step ahead of its products. */
INLINE void add_products(const char *x, long tile_bytes, long part_bytes, const struct stretch *stretch,
                         const int parts, const int two, const int expands, float *sums) {
    const char *next = x + tile_bytes, *ahead = stretch->ahead;
    const char *weights = stretch->expanded ? stretch->expanded : step_at(stretch->panels, stretch->i, stretch->first);
    if (expands) expand(stretch->panels, stretch->i, stretch->first, stretch->expanded);
    if (stretch->first == 0) {
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
    for (int s = stretch->first; s < stretch->last; s++, weights += STEP_BYTES, ahead += stretch->panels->step_bytes) {
        for (int i = 0; i < stretch->num_ahead; i++) _mm_prefetch(ahead + 64 * i, _MM_HINT_T1);
        _tile_loadd(6, weights, WEIGHT_STRIDE);
        _tile_loadd(7, weights + 64, WEIGHT_STRIDE);
        if (expands && s + 1 < stretch->last)
            expand(stretch->panels, stretch->i, s + 1, (char *)weights + STEP_BYTES);
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

/* Steps [first, last) of panels i and i + 1, in one of RING places each where compact ones are expanded, and what to
 * fetch in each of them of the steps of both panels that are needed after. */
struct two_panels {
    const struct panels *panels;
    int i, first, last;
    char (*expanded)[2][STEP_BYTES];
    const char *ahead[2];
    int num_ahead; /* lines */
};

/* Add the products of one tile of rows with two panels to their sums [half][16][16]: two streams come faster from
 * memory than one, and faster still with what is needed next asked for before this step's tiles wait. Compact steps are
 * expanded one ahead of their products, by the first tile for all others. `alone`: there are no others. */
INLINE void add_two_products(const char *x, long part_bytes, const struct two_panels *two, const int parts,
                             const int compact, const int expands, const int alone, float *sums, float *other_sums) {
    const struct panels *panels = two->panels;
    const char *panel = step_at(panels, two->i, two->first), *other = step_at(panels, two->i + 1, two->first);
    const char *ahead = two->ahead[0], *other_ahead = two->ahead[1];
    const int step_bytes = compact ? COMPACT_STEP_BYTES : STEP_BYTES;
    if (expands)
        for (int p = 0; p < 2; p++) expand(panels, two->i + p, two->first, two->expanded[two->first % RING][p]);
    if (two->first == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + SUMS, 64);
        _tile_loadd(2, other_sums, 64);
        _tile_loadd(3, other_sums + SUMS, 64);
    }
    for (int s = two->first; s < two->last; s++, x += parts * part_bytes) {
        if (alone) {
            for (int line = 0; line < step_bytes; line += 64) {
                _mm_prefetch(panel + (1 + compact) * step_bytes + line, _MM_HINT_T0);
                _mm_prefetch(other + (1 + compact) * step_bytes + line, _MM_HINT_T0);
            }
        } else {
            for (int line = 0; line < two->num_ahead; line++) {
                _mm_prefetch(ahead + 64 * line, _MM_HINT_T1);
                _mm_prefetch(other_ahead + 64 * line, _MM_HINT_T1);
            }
        }
        char(*expanded)[STEP_BYTES] = two->expanded[s % RING], (*next)[STEP_BYTES] = two->expanded[(s + 1) % RING];
        const char *weights = compact ? expanded[0] : panel, *others = compact ? expanded[1] : other;
        _tile_stream_loadd(4, x, 64);
        if (parts == 2) _tile_stream_loadd(5, x + part_bytes, 64);
        ADD_PRODUCTS(0, 6, weights, WEIGHT_STRIDE, parts)
        ADD_PRODUCTS(1, 7, weights + 64, WEIGHT_STRIDE, parts)
        if (expands && s + 1 < two->last) expand(panels, two->i, s + 1, next[0]);
        ADD_PRODUCTS(2, 6, others, WEIGHT_STRIDE, parts)
        ADD_PRODUCTS(3, 7, others + 64, WEIGHT_STRIDE, parts)
        if (expands && s + 1 < two->last) expand(panels, two->i + 1, s + 1, next[1]);
        panel += step_bytes, other += step_bytes, ahead += step_bytes, other_ahead += step_bytes;
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SUMS, 64);
    _tile_stored(2, other_sums, 64);
    _tile_stored(3, other_sums + SUMS, 64);
}

/* The sums of panels i and i + 1 and of few tiles of rows, as sums_of_block has them. */
INLINE void sums_of_two_panels(const struct panels *panels, int i, const struct packed_rows *rows, const int parts,
                               const int compact, float *sums) {
    char expanded[RING][2][STEP_BYTES] __attribute__((aligned(64)));
    struct two_panels two = {.panels = panels, .i = i, .last = panels->num_steps, .expanded = expanded};
    long part_bytes = (long)rows->tile_rows * 64, step_bytes = parts * part_bytes;
    float *other_sums = sums + ceil_div(rows->num_tiles, 2) * 4 * SUMS;
    if (rows->num_tiles == 1) {
        add_two_products(rows->values, part_bytes, &two, parts, compact, compact, 1, sums, other_sums);
        return;
    }
    two.num_ahead = ceil_div(panels->step_bytes / 64, rows->num_tiles);
    for (; two.first < panels->num_steps; two.first = two.last) {
        two.last = at_most(two.first + RING, panels->num_steps);
        int is_last = two.last == panels->num_steps;
        for (int t = 0; t < rows->num_tiles; t++) {
            const char *x = rows->values + ((long)t * panels->num_steps + two.first) * step_bytes;
            for (int p = 0; p < 2; p++)
                two.ahead[p] = step_at(panels, i + p + 2 * is_last, is_last ? 0 : two.last) + 64 * t * two.num_ahead;
            float *to = sums + t * 2 * SUMS, *other_to = other_sums + t * 2 * SUMS;
            if (compact && t == 0) add_two_products(x, part_bytes, &two, parts, 1, 1, 0, to, other_to);
            else add_two_products(x, part_bytes, &two, parts, compact, 0, 0, to, other_to);
        }
    }
}

/* The sums of panels [first, last) and all rows, [panel][pair of row tiles][tile][half][16][16]. */
INLINE void sums_of_block(const struct panels *panels, int first, int last, const struct packed_rows *rows,
                          const int parts, float *sums) {
    char expanded[STRETCH_STEPS * STEP_BYTES] __attribute__((aligned(64)));
    int is_compact = panels->w->codebooks != NULL, num_steps = panels->num_steps;
    int num_tiles = rows->num_tiles, num_pairs = ceil_div(num_tiles, 2);
    long part_bytes = (long)rows->tile_rows * 64, tile_bytes = num_steps * parts * part_bytes;
    if (are_few(num_tiles, parts, tile_bytes))
        for (; first + 1 < last; first += 2, sums += num_pairs * 8 * SUMS) {
            if (is_compact) sums_of_two_panels(panels, first, rows, parts, 1, sums);
            else sums_of_two_panels(panels, first, rows, parts, 0, sums);
        }
    int chunk = even_part(num_steps, CHUNK_BYTES / (num_tiles * parts * part_bytes));
    int most = even_part(chunk, STRETCH_STEPS / parts);
    struct stretch stretch = {.panels = panels, .expanded = is_compact ? expanded : NULL};
    stretch.num_ahead = ceil_div(panels->step_bytes / 64, num_pairs); /* every pair of tiles fetches its share */
    for (int from = 0, end; from < num_steps; from = end) {
        end = at_most(from + chunk, num_steps);
        for (int i = first; i < last; i++)
            for (int step = from; step < end; step = stretch.last) {
                stretch.i = i, stretch.first = step, stretch.last = at_most(step + most, end);
                const char *next = step_at(panels, i, stretch.last);
                if (stretch.last == end && i + 1 < last) next = step_at(panels, i + 1, from);
                else if (stretch.last == end && end < num_steps) next = step_at(panels, first, end);
                else if (stretch.last == end) next = step_at(panels, last, 0);
                for (int t = 0; t < num_tiles; t += 2) {
                    const char *x = rows->values + t * tile_bytes + step * parts * part_bytes;
                    float *to = sums + ((i - first) * num_pairs + t / 2) * 4 * SUMS;
                    int two = t + 1 < num_tiles, expands = is_compact && t == 0;
                    stretch.ahead = next + 32 * t * stretch.num_ahead;
                    if (two && expands) add_products(x, tile_bytes, part_bytes, &stretch, parts, 1, 1, to);
                    else if (two) add_products(x, tile_bytes, part_bytes, &stretch, parts, 1, 0, to);
                    else if (expands) add_products(x, tile_bytes, part_bytes, &stretch, parts, 0, 1, to);
                    else add_products(x, tile_bytes, part_bytes, &stretch, parts, 0, 0, to);
                }
            }
    }
}

static void block_of_panels(const struct panels *panels, int first, int last, const struct packed_rows *rows,
                            int parts, float *sums) {
    if (parts == 2) sums_of_block(panels, first, last, rows, 2, sums);
    else sums_of_block(panels, first, last, rows, 1, sums);
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
    struct panels panels = panels_of(w, 0, 0);
    float *sums = scratch(SCRATCH_TILES, (size_t)BLOCK_PANELS * CHUNK_TILES * 2 * SUMS * sizeof(float));
    amx_configure(rows->tile_rows, 64);
    for (int tile = 0; tile < rows->num_tiles; tile += CHUNK_TILES) {
        struct packed_rows some = amx_some_tiles(w, rows, tile_bytes, tile, CHUNK_TILES);
        for (int first = first_panel; first < last_panel; first += BLOCK_PANELS) {
            int last = at_most(first + BLOCK_PANELS, last_panel);
            block_of_panels(&panels, first, last, &some, parts, sums);
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
    struct panels panels = panels_of(gate_up, first_panel, inner / PANEL);
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
            block_of_panels(&panels, first, last, &some, parts, sums);
            activate_block(&some, sums, (last - first) / 2, parts, &out, out_tile_bytes, first_panel + first / 2);
        }
    }
    _tile_release();
}
