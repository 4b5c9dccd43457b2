/* What the two files about AMX tiles share. */
#ifndef EXPERTMESH_AMX_H
#define EXPERTMESH_AMX_H

#include "linear.h"

enum { SUMS = 16 * 16, WEIGHT_STRIDE = 4 * PANEL, STEP_BYTES = 16 * WEIGHT_STRIDE };

/* Tiles of num_rows rows and of run_bytes of inputs. */
void amx_configure(int num_rows, int run_bytes);

/* Up to `most` tiles of `rows`, from `first` on. */
struct packed_rows amx_some_tiles(const struct weight *w, const struct packed_rows *rows, long tile_bytes, int first,
                                  int most);

/* `amx_multiply` for a BFLOAT16 weight. */
void amx_multiply_bfloat16(const struct weight *w, const struct packed_rows *rows, const float *bias, float *y,
                           int first_panel, int last_panel);

#endif
