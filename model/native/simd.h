/* The vector operations that the kernels are written in, for AVX-512 (16 lanes) and for AVX2 (8 lanes).
 *
 * Every kernel is compiled for each level from the same source. Additions happen in the same order at both widths, so
 * both give the same bits: a router with AVX2 can take over a request from one with AVX-512. The level AVX512BF16 is
 * AVX-512 with an instruction for bf16 weights and inputs (Zen 4, Cooper Lake and later), the level AMX is that with
 * tiles (amx.c) where a weight allows.
 */
#ifndef EXPERTMESH_SIMD_H
#define EXPERTMESH_SIMD_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__

#ifdef __AMX_TILE__
#define AT_LEVEL(name) name##_amx
#elif defined(__AVX512BF16__)
#define AT_LEVEL(name) name##_avx512bf16
#else
#define AT_LEVEL(name) name##_avx512
#endif
#define LANES 16
typedef __m512 vec;
typedef __m512i ivec;

INLINE vec load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, vec a) { _mm512_storeu_ps(p, a); }
INLINE vec broadcast(float a) { return _mm512_set1_ps(a); }
INLINE vec fma_add(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }  /* a * b + c, rounded once */
INLINE vec fma_sub(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a * b, rounded once */
INLINE vec vmax(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec vmin(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec round_nearest(vec a) { return _mm512_roundscale_ps(a, 0); }
INLINE vec absolute(vec a) { return _mm512_abs_ps(a); }
INLINE ivec to_int(vec a) { return _mm512_cvtps_epi32(a); }
INLINE vec to_float(ivec a) { return _mm512_cvtepi32_ps(a); }
INLINE vec power_of_two(ivec n) { /* 2^n for -126 <= n <= 127 */
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

/* Lane i of a where first <= i < last, else `otherwise`. */
INLINE vec keep_range(vec a, int first, int last, vec otherwise) {
    ivec i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __mmask16 keep = _mm512_cmpge_epi32_mask(i, _mm512_set1_epi32(first)) &
                     _mm512_cmplt_epi32_mask(i, _mm512_set1_epi32(last));
    return _mm512_mask_blend_ps(keep, otherwise, a);
}
INLINE vec zero_below(vec a, vec x, float limit) { /* a where x > limit, else 0 */
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_GT_OQ), a);
}

/* The first n lanes; n may be beyond them, or below 0. */
INLINE __mmask16 first_lanes(int n) {
    ivec i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_cmplt_epi32_mask(i, _mm512_set1_epi32(n));
}
INLINE vec load_some(const float *p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); } /* the others are 0 */
INLINE void store_some(float *p, vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
INLINE vec load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vec load_bf16(const uint16_t *p) {
    ivec wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
/* LANES pairs of bf16 numbers: the first or the second of each. */
INLINE vec bf16_half(ivec both, int second) {
    return _mm512_castsi512_ps(second ? _mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000))
                                      : _mm512_slli_epi32(both, 16));
}
INLINE vec load_bf16_half(const void *p, int second) { return bf16_half(_mm512_loadu_si512(p), second); }

INLINE ivec ibroadcast(int32_t a) { return _mm512_set1_epi32(a); }
INLINE ivec load_bytes(const void *p) { return _mm512_loadu_si512(p); }
INLINE ivec low_nibbles(ivec a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE ivec high_nibbles(ivec a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
INLINE vec load_u8_as_float(const uint8_t *p) {
    return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE void store_as_i8(int8_t *p, ivec a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }
INLINE void store_as_bf16(uint16_t *p, vec a) { /* to nearest, ties to even */
    ivec bits = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    ivec rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(rounded));
}
/* Each int32 lane: acc + the dot product of its four bytes, unsigned in w and signed in x. Exact. */
INLINE ivec dot_bytes(ivec acc, ivec w, ivec x) {
    /* In assembly, since GCC 12 copies and spills the sums around the intrinsic: a quarter slower. */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
}

/* Each lane: acc + w * x of the second of two bf16 numbers, then of the first, each rounded; below 1.2e-38 all is 0. */
#ifdef __AVX512BF16__
INLINE vec dot_pairs(vec acc, vec w, vec x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
#endif

INLINE ivec add_ints(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
INLINE int32_t sum_of_ints(ivec a) { return _mm512_reduce_add_epi32(a); }
INLINE float max_of_lanes(vec a) { return _mm512_reduce_max_ps(a); }
INLINE int any_nan(vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); } /* a bit for each */
INLINE void add_to_doubles(double *y, vec a) {
    _mm512_storeu_pd(y, _mm512_loadu_pd(y) + _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
    _mm512_storeu_pd(y + 8, _mm512_loadu_pd(y + 8) + _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
}
INLINE vec load_doubles(const double *y) { /* rounded */
    __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_loadu_pd(y)));
    return _mm512_insertf32x8(low, _mm512_cvtpd_ps(_mm512_loadu_pd(y + 8)), 1);
}

/* rows[i] lane j -> rows[j] lane i. */
INLINE void transpose(vec rows[LANES]) {
#define PAIRS(f, a, b) _mm512_castpd_ps(_mm512_##f##_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)))
    vec t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        rows[i] = PAIRS(unpacklo, t[i], t[i + 2]);
        rows[i + 1] = PAIRS(unpackhi, t[i], t[i + 2]);
        rows[i + 2] = PAIRS(unpacklo, t[i + 1], t[i + 3]);
        rows[i + 3] = PAIRS(unpackhi, t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* each 128-bit lane now holds four rows of one column: transpose the lanes */
        t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
#undef PAIRS
}

#else /* AVX2 */

#define AT_LEVEL(name) name##_avx2
#define LANES 8
typedef __m256 vec;
typedef __m256i ivec;

INLINE vec load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, vec a) { _mm256_storeu_ps(p, a); }
INLINE vec broadcast(float a) { return _mm256_set1_ps(a); }
INLINE vec fma_add(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec fma_sub(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vec vmax(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec vmin(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE vec round_nearest(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec absolute(vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE ivec to_int(vec a) { return _mm256_cvtps_epi32(a); }
INLINE vec to_float(ivec a) { return _mm256_cvtepi32_ps(a); }
INLINE vec power_of_two(ivec n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

INLINE vec keep_range(vec a, int first, int last, vec otherwise) {
    ivec i = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    ivec keep = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), i),
                                    _mm256_cmpgt_epi32(_mm256_set1_epi32(last), i));
    return _mm256_blendv_ps(otherwise, a, _mm256_castsi256_ps(keep));
}
INLINE vec zero_below(vec a, vec x, float limit) {
    return _mm256_and_ps(a, _mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_GT_OQ));
}

INLINE ivec first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
INLINE vec load_some(const float *p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
INLINE void store_some(float *p, vec a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a); }
INLINE vec load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec load_bf16(const uint16_t *p) {
    ivec wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE vec load_bf16_half(const void *p, int second) {
    ivec both = _mm256_loadu_si256((const __m256i *)p);
    return _mm256_castsi256_ps(second ? _mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000))
                                      : _mm256_slli_epi32(both, 16));
}

INLINE ivec ibroadcast(int32_t a) { return _mm256_set1_epi32(a); }
INLINE ivec load_bytes(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE ivec low_nibbles(ivec a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
INLINE ivec high_nibbles(ivec a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
INLINE vec load_u8_as_float(const uint8_t *p) {
    return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE void store_as_i8(int8_t *p, ivec a) {
    int32_t lanes[8];
    _mm256_storeu_si256((__m256i *)lanes, a);
    for (int i = 0; i < 8; i++) p[i] = (int8_t)lanes[i];
}
INLINE void store_as_bf16(uint16_t *p, vec a) {
    ivec bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    ivec rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    ivec is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(rounded),
                                                    _mm256_extracti128_si256(rounded, 1)));
}
INLINE ivec dot_bytes(ivec acc, ivec w, ivec x) { /* through 16 bits: u8 * s8 sums don't fit maddubs' saturation */
    ivec w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), w_odd = _mm256_srli_epi16(w, 8);
    ivec x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(w_even, x_even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w_odd, x_odd));
}

INLINE ivec add_ints(ivec a, ivec b) { return _mm256_add_epi32(a, b); }
INLINE int32_t sum_of_ints(ivec a) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
INLINE int any_nan(vec a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
INLINE float max_of_lanes(vec a) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE void add_to_doubles(double *y, vec a) {
    _mm256_storeu_pd(y, _mm256_loadu_pd(y) + _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
    _mm256_storeu_pd(y + 4, _mm256_loadu_pd(y + 4) + _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
}
INLINE vec load_doubles(const double *y) {
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(y + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(y)));
}

INLINE void transpose(vec rows[LANES]) {
    vec t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        rows[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        rows[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        rows[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        rows[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) rows[i] = t[i];
}

#endif

/* The sum of 16 numbers held in 16 / LANES vectors, in the same order at both widths. */
INLINE float sum_of_16(const vec a[16 / LANES]) {
#if LANES == 16
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a[0]), _mm512_extractf32x8_ps(a[0], 1));
#else
    __m256 eight = _mm256_add_ps(a[0], a[1]);
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* e^x within 2 ulp for x <= 88; 0 where x <= -87. Cephes' expf polynomial. */
INLINE vec exponential(vec x) {
    vec n = round_nearest(x * broadcast(1.44269504f));
    n = vmax(n, broadcast(-126.0f));
    vec r = fma_sub(n, broadcast(0.693359375f), x);
    r = fma_sub(n, broadcast(-2.12194440e-4f), r);
    vec p = broadcast(1.9875691500e-4f);
    p = fma_add(p, r, broadcast(1.3981999507e-3f));
    p = fma_add(p, r, broadcast(8.3334519073e-3f));
    p = fma_add(p, r, broadcast(4.1665795894e-2f));
    p = fma_add(p, r, broadcast(1.6666665459e-1f));
    p = fma_add(p, r, broadcast(5.0000001201e-1f));
    p = fma_add(r * r, p, r + broadcast(1.0f));
    return zero_below(p * power_of_two(to_int(n)), x, -87.0f);
}

/* silu(gate) * up */
INLINE vec silu_times(vec gate, vec up) {
    vec e = exponential(vmin(broadcast(0.0f) - gate, broadcast(87.0f)));
    return gate / (broadcast(1.0f) + e) * up;
}

#endif
