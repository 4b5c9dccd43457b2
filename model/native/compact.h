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

/* One step as it lies in plain panels: 2048 bytes. Exceptions: the place in the step and the weight, 16 bits each. */
INLINE void expand_step(const char *step, ivec codebook, const uint32_t *exceptions, int num_exceptions, char *out) {
    const char *low = step + STEP_WEIGHTS / 2;
#pragma GCC unroll 2
    for (int group = 0; group < 8; group++, step += 64, low += 128, out += 256) {
        ivec codes = load_bytes(step), first = load_bytes(low), second = load_bytes(low + 64);
        ivec first_high = _mm512_shuffle_epi8(codebook, low_nibbles(codes));
        ivec second_high = _mm512_shuffle_epi8(codebook, high_nibbles(codes));
        _mm512_store_si512(out, _mm512_unpacklo_epi8(first, first_high));
        _mm512_store_si512(out + 64, _mm512_unpackhi_epi8(first, first_high));
        _mm512_store_si512(out + 128, _mm512_unpacklo_epi8(second, second_high));
        _mm512_store_si512(out + 192, _mm512_unpackhi_epi8(second, second_high));
    }
    out -= 2 * STEP_WEIGHTS;
    for (int i = 0; i < num_exceptions; i++) {
        uint16_t weight = exceptions[i] & 0xffff;
        memcpy(out + 2 * (exceptions[i] >> 16), &weight, 2);
    }
}

#endif
