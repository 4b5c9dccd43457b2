/* BFLOAT16 panels in three quarters of their bytes, without loss: the products that memory holds up read less.
 *
 * Weights of a matrix differ little in size, so their exponents carry some three bits of information in eight. Of the
 * 16 bits s eeeeeeee mmmmmmm the low byte is kept as it is; the high byte, s and the exponent's upper seven bits, takes
 * one of a few values: s and the place of the other seven in the panel's codebook of eight are a code of four bits.
 * A weight whose exponent is not in the codebook, one in thousands, stands in a list of exceptions.
 *
 * A step, 32 inputs of a panel, is 512 bytes of codes and 1024 low bytes, in eight groups of 128 weights:
 *   codes      [group][64]      low nibbles: the group's first 64 weights, high nibbles: its others
 *   low bytes  [group][2][64]
 * in the order in which 16-bit unpacking finds them (see expand_step).
 */
#ifndef EXPERTMESH_COMPACT_H
#define EXPERTMESH_COMPACT_H

#include <string.h>

#include "native.h"
#include "simd.h"

enum { STEP_WEIGHTS = 32 * PANEL, COMPACT_STEP_BYTES = STEP_WEIGHTS + STEP_WEIGHTS / 2 };

/* The eight high bytes without a sign, then the same with one. */
INLINE ivec load_codebook(const uint8_t *codebook) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)codebook));
}

/* A group of a step, but for exceptions: four vectors as they lie in plain panels. */
INLINE void expand_group(const char *step, int group, ivec codebook, vec *out) {
    const char *low = step + STEP_WEIGHTS / 2 + 128 * group;
    ivec codes = load_bytes(step + 64 * group), first = load_bytes(low), second = load_bytes(low + 64);
    ivec first_high = _mm512_shuffle_epi8(codebook, low_nibbles(codes));
    ivec second_high = _mm512_shuffle_epi8(codebook, high_nibbles(codes));
    out[0] = (vec)_mm512_unpacklo_epi8(first, first_high);
    out[1] = (vec)_mm512_unpackhi_epi8(first, first_high);
    out[2] = (vec)_mm512_unpacklo_epi8(second, second_high);
    out[3] = (vec)_mm512_unpackhi_epi8(second, second_high);
}

/* One step as it lies in plain panels: 2048 bytes. Exceptions: the place in the step and the weight, 16 bits each. */
INLINE void expand_step(const char *step, ivec codebook, const uint32_t *exceptions, int num_exceptions, char *out) {
#pragma GCC unroll 2
    for (int group = 0; group < 8; group++, out += 256) {
        vec vectors[4];
        expand_group(step, group, codebook, vectors);
        for (int i = 0; i < 4; i++) store((float *)(out + 64 * i), vectors[i]);
    }
    out -= 2 * STEP_WEIGHTS;
    for (int i = 0; i < num_exceptions; i++) {
        uint16_t weight = exceptions[i] & 0xffff;
        memcpy(out + 2 * (exceptions[i] >> 16), &weight, 2);
    }
}

/* A step of a panel of w. */
INLINE void expand_panel(const struct weight *w, int panel, int step, char *out) {
    int num_steps = w->num_inputs / 32;
    const int32_t *start = w->exception_starts + (long)panel * (num_steps + 1) + step;
    const uint32_t *exceptions = w->exceptions + (long)panel * w->most_exceptions + start[0];
    const char *data = (const char *)w->data + ((long)panel * num_steps + step) * COMPACT_STEP_BYTES;
    expand_step(data, load_codebook(w->codebooks + 16 * panel), exceptions, start[1] - start[0], out);
}

#endif
