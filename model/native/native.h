/* What the kernels share: the packed weight, parallel_for and scratch memory. */
#ifndef EXPERTMESH_NATIVE_H
#define EXPERTMESH_NATIVE_H

#include <stddef.h>
#include <stdint.h>

/* A weight matrix [num_outputs, num_inputs], packed in panels of 32 outputs (the last one padded with zeros).
 * Within a panel the inputs come one after the other, each with its 32 outputs side by side, so that a multiply
 * reads a panel from one end to the other and needs no sum across lanes:
 *
 *   FLOAT32, FLOAT16   [panel][input][32]
 *   BFLOAT16           [panel][input / 2][32][2]    two inputs side by side: one load widens to two vectors, or is
 *                                                   multiplied as it is; AVX-512 and AMX read compact panels too
 *                                                   (compact.h)
 *   INT8               [panel][input / 4][32][4]    weight + 128 as uint8; four inputs side by side for VNNI and AMX
 *   INT4               [panel][input / 4][16][4]    low nibble: output o, high nibble: output 16 + o; 0..15
 *
 * INT8: weight = scales[output] * (byte - 128).
 * INT4: weight = scales[panel][group][32] * (nibble - zeros[panel][group][32]), groups of `block_size` inputs.
 * Scales are float32 for INT8, float16 for INT4, which has many.
 * Inputs of INT8 and INT4 are quantized to 8 bits with one scale for each row and each `block_size` inputs.
 * input_order, if any: packed input k is input input_order[k] of the layer (GPTQ's act-order).
 */
enum format { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, INT4 = 4 };
enum { PANEL = 32 };

struct weight {
    const void *data;
    const void *scales;
    const uint8_t *zeros;
    const int32_t *input_order;
    const uint8_t *codebooks;        /* of compact panels [panel][16]; NULL: the panels are plain */
    const int32_t *exception_starts; /* [panel][step + 1] */
    const uint32_t *exceptions;      /* [panel][most_exceptions] */
    int32_t format;
    int32_t num_outputs;
    int32_t num_inputs;
    int32_t block_size;
    int32_t bfloat16_inputs; /* BFLOAT16: inputs are rounded to bfloat16 first */
    int32_t most_exceptions; /* of a compact panel */
};

static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
static inline int at_most(int a, int b) { return a < b ? a : b; }
/* Of even parts of `whole` that are no more than `most` each. */
static inline int even_part(int whole, int most) {
    return whole > most ? ceil_div(whole, ceil_div(whole, most)) : whole;
}
static inline int is_integer(const struct weight *w) { return w->format >= INT8; }
/* Inputs that stand side by side in a panel; a number of inputs that it doesn't divide is padded with zeros. */
static inline int inputs_together(int format) { return format >= INT8 ? 4 : format == BFLOAT16 ? 2 : 1; }
static inline int padded_inputs(const struct weight *w) {
    int together = inputs_together(w->format);
    return ceil_div(w->num_inputs, together) * together;
}
static inline int num_panels(const struct weight *w) { return ceil_div(w->num_outputs, PANEL); }

/* Call body(context, i) for i in [0, count), on up to num_threads threads. */
void parallel_for(void (*body)(void *context, int i), void *context, int count, int num_threads);

/* Whether others would begin at once with what is theirs of a parallel_for, instead of being woken first. */
int threads_are_awake(void);

/* At least num_bytes of memory owned by the calling thread, aligned to 64 bytes, valid until its next call with the
 * same slot. Kept until the thread ends: steps of one model need the same sizes again and again. */
enum scratch_slot { SCRATCH_LAYER, SCRATCH_CALL, SCRATCH_BODY, SCRATCH_TILES, NUM_SCRATCH_SLOTS };
void *scratch(enum scratch_slot slot, size_t num_bytes);

/* Cut the next num_bytes, rounded up to 64, off a block of scratch memory. */
static inline void *take(char **memory, size_t num_bytes) {
    void *start = *memory;
    *memory += (num_bytes + 63) / 64 * 64;
    return start;
}

#endif
