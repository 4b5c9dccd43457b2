/* Multiplying rows with a packed weight, for the kernels built on it. */
#ifndef EXPERTMESH_LINEAR_H
#define EXPERTMESH_LINEAR_H

#include "native.h"
#include "simd.h"

/* Rows of activations, packed for a weight's format in tiles of `tile_rows` rows (the last one padded with zeros):
 *   float formats   values [tile][input][row] float32
 *   BFLOAT16, pairs values [tile][input / 2][row][2] bf16: its inputs where AVX-512 multiplies them as they are
 *   INT8, INT4      values [tile][input / run][row][run] int8, scales [tile][block][row], sums [tile][block][row]
 *   BFLOAT16, AMX   values [tile][input / run][part][row][run] bf16, whose parts add up to the input
 */
struct packed_rows {
    int num_rows, tile_rows, num_tiles;
    int run;        /* inputs of a row side by side: 1 or 4, with AMX a tile's 32 or 64 */
    char *values;
    float *scales;  /* row input = scales * value */
    int32_t *sums;  /* of the block's values */
};

enum { ROWS_WORTH_A_THREAD = 64 }; /* what takes little time for each is shared among threads from here on */

size_t AT_LEVEL(packed_rows_bytes)(const struct weight *w, int num_rows);

/* Pack x[row_ids[i]] for i in [0, num_rows) (row i itself when row_ids is NULL) into memory of packed_rows_bytes. */
struct packed_rows AT_LEVEL(pack_rows)(const struct weight *w, const float *x, const int32_t *row_ids, int num_rows,
                                       char *memory, int num_threads);

/* y [num_rows, num_outputs] = sums over inputs + bias (or NULL). */
void AT_LEVEL(multiply)(const struct weight *w, const struct packed_rows *rows, const float *bias, float *y,
                        int num_threads);

/* What `activate` needs for so many rows. */
size_t AT_LEVEL(activated_bytes)(const struct weight *gate_up, const struct weight *down, int num_rows);

/* swiglu(rows times gate_up), packed for `down` into memory of activated_bytes. */
struct packed_rows AT_LEVEL(activate)(const struct weight *gate_up, const struct weight *down,
                                      const struct packed_rows *rows, char *memory, int num_threads);

#ifdef __AMX_TILE__

enum { AMX_TILE_ROWS = 16 };

/* bf16 numbers that an input of a BFLOAT16 weight is split in. */
static inline int amx_parts(const struct weight *w) { return w->bfloat16_inputs ? 1 : 2; }

/* Inputs that a tile takes at once of so many rows times this weight; 0 where vectors do it. */
int amx_run(const struct weight *w, int num_rows);

/* One tile of `pack_rows` for BFLOAT16. */
void amx_pack_tile(const struct weight *w, const struct packed_rows *rows, const float *x, const int32_t *row_ids,
                   int tile);

/* Whether a SwiGLU's results can go straight into the packed rows of the product that follows it. */
int amx_activates(const struct weight *gate_up, const struct weight *down);

/* silu(gate) * up of rows times gate_up, for the inputs of panels [first_panel, last_panel) of `activated`. */
void amx_activate(const struct weight *gate_up, const struct packed_rows *rows, const struct packed_rows *activated,
                  int first_panel, int last_panel);

/* `multiply` for rows that were packed with amx_run, and for the outputs of panels [first_panel, last_panel). */
void amx_multiply(const struct weight *w, const struct packed_rows *rows, const float *bias, float *y,
                  int first_panel, int last_panel);

#endif

#endif
