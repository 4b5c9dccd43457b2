/* What the two files about AMX tiles share. */
#ifndef EXPERTMESH_AMX_H
#define EXPERTMESH_AMX_H

#include "linear.h"

enum { SUMS = 16 * 16, WEIGHT_STRIDE = 4 * PANEL, STEP_BYTES = 16 * WEIGHT_STRIDE };

/* 32 numbers of a row as the sum of `parts` bf16 numbers each, of which the parts lie part_bytes apart. */
INLINE void split(vec low, vec high, void *out, long part_bytes, int parts) {
    for (int part = 0; part < parts; part++, out = (char *)out + part_bytes) {
        __m512i nearest = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(out, nearest);
        low -= (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(nearest)), 16); /* exact */
        high -= (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(nearest, 1)), 16);
    }
}

/* The products of the parts of rows in tiles 4 and 5 with a tile of weights, to a tile of sums: the compiler must know
 * the tiles' numbers. */
#define ADD_PRODUCTS(sums, tile, weights, stride, parts) \
    _tile_loadd(tile, weights, stride);                  \
    _tile_dpbf16ps(sums, 4, tile);                       \
    if (parts == 2) _tile_dpbf16ps(sums, 5, tile);

/* Tiles of num_rows rows and of run_bytes of inputs. */
void amx_configure(int num_rows, int run_bytes);

/* Up to `most` tiles of `rows`, from `first` on. */
struct packed_rows amx_some_tiles(const struct weight *w, const struct packed_rows *rows, long tile_bytes, int first,
                                  int most);

/* `amx_multiply` for a BFLOAT16 weight. */
void amx_multiply_bfloat16(const struct weight *w, const struct packed_rows *rows, const float *bias, float *y,
                           int first_panel, int last_panel);

#endif
