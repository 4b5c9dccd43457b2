/* Row-major matrices to the panels of native.h, at about the speed of a copy. */
#include <string.h>

#include "native.h"

/* Inputs at a time: what is written of a panel meanwhile stays in the first-level cache. */
enum { INPUTS_AT_A_TIME = 128 };

#define PACK_FLOATS(name, type)                                                                                    \
    static void name(const type *rows, int num_rows, int K, type *panel) {                                         \
        if (num_rows < PANEL) memset(panel, 0, (size_t)K * PANEL * sizeof(type));                                  \
        for (int first = 0; first < K; first += INPUTS_AT_A_TIME)                                                  \
            for (int o = 0; o < num_rows; o++) {                                                                   \
                int last = at_most(K, first + INPUTS_AT_A_TIME);                                                   \
                for (int k = first; k < last; k++) panel[(long)k * PANEL + o] = rows[(long)o * K + k];             \
            }                                                                                                      \
    }
PACK_FLOATS(pack_float32, uint32_t)
PACK_FLOATS(pack_float16, uint16_t)

static void pack_bfloat16(const uint16_t *rows, int num_rows, int K, uint16_t *panel) {
    if (num_rows < PANEL || K % 2) memset(panel, 0, (size_t)ceil_div(K, 2) * 2 * PANEL * sizeof(uint16_t));
    for (int first = 0; first < K; first += INPUTS_AT_A_TIME)
        for (int o = 0; o < num_rows; o++) {
            const uint16_t *row = rows + (long)o * K;
            int last = at_most(K, first + INPUTS_AT_A_TIME), k = first;
            for (; k + 2 <= last; k += 2) memcpy(panel + (long)k * PANEL + 2 * o, row + k, 2 * sizeof(uint16_t));
            if (k < last) panel[(long)k * PANEL + 2 * o] = row[k];
        }
}

/* The integer formats keep four inputs of an output side by side: `quad` is where those of output 0 go. */
static void pack_int8(const int8_t *rows, int num_rows, int K, uint8_t *panel) {
    memset(panel, 128, (size_t)ceil_div(K, 4) * 4 * PANEL);
    for (int first = 0; first < K; first += INPUTS_AT_A_TIME)
        for (int o = 0; o < num_rows; o++)
            for (int k = first; k < at_most(K, first + INPUTS_AT_A_TIME); k += 4) {
                uint8_t *quad = panel + (long)k * PANEL;
                uint32_t four = 0;
                if (k + 4 <= K) memcpy(&four, rows + (long)o * K + k, 4);
                else memcpy(&four, rows + (long)o * K + k, K - k);
                four ^= 0x80808080u; /* + 128 in each byte */
                memcpy(quad + 4 * o, &four, 4);
            }
}

/* Rows of ceil(K / 2) bytes: input 2j in the low nibble of byte j, input 2j + 1 in the high one. */
static void pack_int4(const uint8_t *rows, int num_rows, int K, uint8_t *panel) {
    int row_bytes = ceil_div(K, 2);
    memset(panel, 0, (size_t)ceil_div(K, 4) * 2 * PANEL);
    for (int first = 0; first < K; first += INPUTS_AT_A_TIME)
        for (int o = 0; o < num_rows; o++)
            for (int k = first; k < at_most(K, first + INPUTS_AT_A_TIME); k += 4) {
                uint8_t *quad = panel + (long)k / 2 * PANEL;
                const uint8_t *two = rows + (long)o * row_bytes + k / 2;
                uint32_t low = two[0], high = k + 2 < K ? two[1] : 0, four;
                memcpy(&four, quad + o % 16 * 4, 4);
                four |= ((low & 15) | (low >> 4) << 8 | (high & 15) << 16 | (high >> 4) << 24) << (o / 16 * 4);
                memcpy(quad + o % 16 * 4, &four, 4);
            }
}

/* Pack the row-major matrix [N, K] (INT4: two to a byte) into `packed`. */
void pack(const void *matrix, int N, int K, int format, void *packed) {
    const char *rows = matrix;
    char *panel = packed;
    int bits = format == FLOAT32 ? 32 : format == INT8 ? 8 : format == INT4 ? 4 : 16;
    size_t row_bytes = format == INT4 ? (size_t)ceil_div(K, 2) : (size_t)K * (bits / 8);
    int together = inputs_together(format);
    size_t panel_bytes = (size_t)ceil_div(K, together) * together * PANEL * bits / 8;
    for (int first = 0; first < N; first += PANEL, rows += PANEL * row_bytes, panel += panel_bytes) {
        int num_rows = at_most(PANEL, N - first);
        if (format == FLOAT32) pack_float32((const uint32_t *)rows, num_rows, K, (uint32_t *)panel);
        else if (format == INT8) pack_int8((const int8_t *)rows, num_rows, K, (uint8_t *)panel);
        else if (format == INT4) pack_int4((const uint8_t *)rows, num_rows, K, (uint8_t *)panel);
        else if (format == BFLOAT16) pack_bfloat16((const uint16_t *)rows, num_rows, K, (uint16_t *)panel);
        else pack_float16((const uint16_t *)rows, num_rows, K, (uint16_t *)panel);
    }
}
