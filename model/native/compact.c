/* Making compact panels (see compact.h) of plain ones. */
#include "compact.h"

enum { ENOUGH_STEPS = 16 }; /* to be counted for a codebook */

/* The eight values that bits 8 to 14 of a panel's weights have most often. */
static void make_codebook(const uint16_t *panel, int num_steps, uint8_t *codebook) {
    int32_t counts[2][128] = {{0}}; /* two, or each count would wait for the one before */
    for (int s = 0; s < num_steps; s += ceil_div(num_steps, ENOUGH_STEPS))
        for (int i = 0; i < STEP_WEIGHTS; i += 2) {
            counts[0][panel[(long)s * STEP_WEIGHTS + i] >> 8 & 127]++;
            counts[1][panel[(long)s * STEP_WEIGHTS + i + 1] >> 8 & 127]++;
        }
    for (int place = 0; place < 8; place++) {
        int most = 0;
        for (int value = 1; value < 128; value++)
            if (counts[0][value] + counts[1][value] > counts[0][most] + counts[1][most]) most = value;
        codebook[place] = most, codebook[8 + place] = most | 128;
        counts[0][most] = -1, counts[1][most] = 0;
    }
}

/* Codes of 64 high bytes; those that the codebook lacks get some code. */
INLINE ivec codes_of(ivec high, const uint8_t *codebook) {
    ivec exponents = _mm512_and_si512(high, _mm512_set1_epi8(127)), codes = _mm512_setzero_si512();
    for (int place = 1; place < 8; place++) {
        __mmask64 found = _mm512_cmpeq_epi8_mask(exponents, _mm512_set1_epi8((char)codebook[place]));
        codes = _mm512_mask_mov_epi8(codes, found, _mm512_set1_epi8((char)place));
    }
    return _mm512_or_si512(codes, _mm512_and_si512(_mm512_srli_epi16(high, 4), _mm512_set1_epi8(8))); /* and the sign */
}

static void compact_step(const char *plain, const uint8_t *codebook, char *out) {
    char *low = out + STEP_WEIGHTS / 2;
    ivec low_byte = _mm512_set1_epi16(255);
    for (int group = 0; group < 8; group++, plain += 256, out += 64, low += 128) {
        ivec codes[2];
        for (int half = 0; half < 2; half++) {
            ivec a = load_bytes(plain + 128 * half), b = load_bytes(plain + 128 * half + 64);
            ivec lows = _mm512_packus_epi16(_mm512_and_si512(a, low_byte), _mm512_and_si512(b, low_byte));
            _mm512_storeu_si512(low + 64 * half, lows);
            codes[half] = codes_of(_mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)), codebook);
        }
        _mm512_storeu_si512(out, _mm512_or_si512(codes[0], _mm512_slli_epi16(codes[1], 4)));
    }
}

/* Write compact panels and for each of them a codebook of 16 bytes, where each step's exceptions start among the
 * panel's and, behind the last one, end, and up to `most` exceptions. Every step is expanded again and compared.
 * -> whether that was enough for every panel. */
int AT_LEVEL(compact)(const char *plain, int num_panels, int num_steps, char *panels, uint8_t *codebooks,
                      int32_t *starts, uint32_t *exceptions, int most) {
    for (int p = 0; p < num_panels; p++, codebooks += 16, exceptions += most) {
        make_codebook((const uint16_t *)plain, num_steps, codebooks);
        ivec codebook = load_codebook(codebooks);
        int count = 0;
        for (int s = 0; s < num_steps; s++, plain += 2 * STEP_WEIGHTS, panels += COMPACT_STEP_BYTES) {
            char again[2 * STEP_WEIGHTS] __attribute__((aligned(64)));
            compact_step(plain, codebooks, panels);
            expand_step(panels, codebook, NULL, 0, again);
            *starts++ = count;
            for (int i = 0; i < STEP_WEIGHTS; i += 32) {
                ivec wanted = load_bytes(plain + 2 * i);
                __mmask32 other = _mm512_cmpneq_epi16_mask(wanted, load_bytes(again + 2 * i));
                for (; other; other &= other - 1) {
                    int at = i + __builtin_ctz(other);
                    uint16_t weight;
                    if (count == most) return 0;
                    memcpy(&weight, plain + 2 * at, 2);
                    exceptions[count++] = (uint32_t)at << 16 | weight;
                }
            }
        }
        *starts++ = count;
    }
    return 1;
}
