/* The formats of model/quantize.py from float32, bfloat16 or float16 rows: the same operations, and the same bits. */
#include <string.h>

#include "native.h"
#include "simd.h"

enum { SIDE = 16 }; /* rows are read in so many inputs, those beyond the end as zeros */

static size_t bytes_of(int format) { return format == FLOAT32 ? 4 : 2; }

/* Inputs [0, n) of a row as float32, padded to a multiple of SIDE. */
static void widen(const char *row, int format, int n, float *out) {
    size_t bytes = bytes_of(format);
    char last[4 * SIDE] = {0};
    for (int i = 0; i < n; i += LANES) {
        const void *from = row + i * bytes;
        if (i + LANES > n) from = memcpy(last, from, (n - i) * bytes);
        store(out + i, format == FLOAT32 ? load(from) : format == BFLOAT16 ? load_bf16(from) : load_f16(from));
    }
    for (int i = ceil_div(n, LANES) * LANES; i < ceil_div(n, SIDE) * SIDE; i++) out[i] = 0.0f;
}

static void quantize_int8_row(const float *row, int K, int8_t *values, float *scale) {
    vec largest = broadcast(0.0f);
    int has_nan = 0;
    for (int i = 0; i < K; i += LANES) {
        largest = vmax(largest, absolute(load(row + i)));
        has_nan |= any_nan(load(row + i));
    }
    *scale = has_nan ? NAN : max_of_lanes(largest) / 127.0f;
    vec divisor = vmax(broadcast(*scale), broadcast(1e-30f));
    for (int i = 0; i < K; i += LANES) {
        int8_t side[LANES];
        store_as_i8(side, to_int(load(row + i) / divisor));
        memcpy(values + i, side, at_most(LANES, K - i));
    }
}

/* One group of n inputs, padded with zeros, to steps of 0..15. */
static void quantize_int4_group(const float *inputs, int n, int8_t *steps, uint16_t *scale, uint8_t *zero) {
    vec high = broadcast(0.0f), low = broadcast(0.0f); /* its negative: only the greatest lane can be asked for */
    int has_nan = 0;
    for (int i = 0; i < n; i += LANES) {
        vec x = load(inputs + i);
        high = vmax(high, x);
        low = vmax(low, -x);
        has_nan |= any_nan(x);
    }
    float least = -max_of_lanes(low), width = (max_of_lanes(high) - least) / 15.0f;
    width = width < 0x1p-14f ? 0x1p-14f : width > 65504.0f ? 65504.0f : width; /* float16's normal numbers */
    *scale = _cvtss_sh(has_nan ? NAN : width, 0);
    vec divisor = broadcast(_cvtsh_ss(*scale)), last = broadcast(15.0f), none = broadcast(0.0f);
    vec origin = vmin(vmax(round_nearest(broadcast(-least) / divisor), none), last);
    *zero = (uint8_t)max_of_lanes(origin);
    for (int i = 0; i < n; i += LANES) {
        vec step = round_nearest(load(inputs + i) / divisor + origin);
        store_as_i8(steps + i, to_int(vmin(vmax(step, none), last)));
    }
}

/* values int8 [N, K], scales float32 [N] */
void AT_LEVEL(quantize_int8)(const void *matrix, int N, int K, int format, int8_t *values, float *scales) {
    float *row = scratch(SCRATCH_CALL, (size_t)ceil_div(K, SIDE) * SIDE * sizeof(float));
    for (int n = 0; n < N; n++) {
        widen((const char *)matrix + bytes_of(format) * n * K, format, K, row);
        quantize_int8_row(row, K, values + (size_t)n * K, scales + n);
    }
}

/* values uint8 [N, ceil(K / 2)], scales float16 [N, groups], zeros uint8 [N, groups] */
void AT_LEVEL(quantize_int4)(const void *matrix, int N, int K, int format, int group_size, uint8_t *values,
                             uint16_t *scales, uint8_t *zeros) {
    int num_groups = ceil_div(K, group_size), row_bytes = ceil_div(K, 2);
    int padded = ceil_div(group_size, SIDE) * SIDE;
    char *memory = scratch(SCRATCH_CALL, (size_t)padded * sizeof(float) + padded + K + 8 + 3 * 64);
    float *group = take(&memory, padded * sizeof(float));
    int8_t *steps = take(&memory, padded), *row = take(&memory, K + 8);
    for (int n = 0; n < N; n++, values += row_bytes) {
        const char *from = (const char *)matrix + bytes_of(format) * n * K;
        for (int g = 0; g < num_groups; g++) {
            int first = g * group_size, size = at_most(group_size, K - first);
            widen(from + bytes_of(format) * first, format, size, group);
            quantize_int4_group(group, size, steps, scales++, zeros++);
            memcpy(row + first, steps, size);
        }
        memset(row + K, 0, 8);
        for (int k = 0; k < K; k += 8) { /* the even input of two in the low nibble */
            uint64_t eight;
            memcpy(&eight, row + k, 8);
            eight = (eight | eight >> 4) & 0x00ff00ff00ff00ff;
            eight = (eight | eight >> 8) & 0x0000ffff0000ffff;
            eight |= eight >> 16;
            memcpy(values + k / 2, &eight, at_most(4, row_bytes - k / 2));
        }
    }
}
