/* What this machine can do at most: read memory, and multiply-add float32 and int8, with 1..N threads.
 *
 *     limits THREADS MEGABYTES     prints one JSON object
 */
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REPEATS = 9, ROUNDS = 1 << 22 };
typedef float vec __attribute__((vector_size(64)));
typedef int64_t ivec __attribute__((vector_size(64)));
static volatile float sink;

static void read_memory(const char *p, size_t n) { /* four sums, so that the adds hide behind the loads */
    ivec sums[4] = {{0}};
    for (size_t i = 0; i < n; i += 4 * sizeof(ivec))
        for (int u = 0; u < 4; u++) sums[u] ^= *(const ivec *)(p + i + u * sizeof(ivec));
    sink = (float)(sums[0] ^ sums[1] ^ sums[2] ^ sums[3])[0];
}

static double multiply_add(void) { /* 20 independent sums in registers; returns floating-point operations */
    vec sums[20], a, b; /* all different, or the compiler would keep one */
    for (int i = 0; i < 16; i++) a[i] = 0.999f, b[i] = 1e-3f;
#pragma GCC unroll 20
    for (int u = 0; u < 20; u++) sums[u] = a * (float)u;
    for (int i = 0; i < ROUNDS; i++) {
#pragma GCC unroll 20
        for (int u = 0; u < 20; u++) sums[u] = sums[u] * a + b;
        __asm__ volatile("" : "+v"(a)); /* a may have changed: nothing can be taken out of the loop */
    }
#pragma GCC unroll 20
    for (int u = 1; u < 20; u++) sums[0] += sums[u];
    sink = sums[0][0];
    return 2.0 * 16 * 20 * ROUNDS;
}

static double dot_bytes(void) { /* u8 * s8 in fours into int32; 0 where the CPU has no such instruction */
#ifdef __AVX512VNNI__
    __m512i sums[20], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(1);
#pragma GCC unroll 20
    for (int u = 0; u < 20; u++) sums[u] = _mm512_set1_epi32(u);
    for (int i = 0; i < ROUNDS; i++) {
#pragma GCC unroll 20
        for (int u = 0; u < 20; u++) sums[u] = _mm512_dpbusd_epi32(sums[u], a, b);
        __asm__ volatile("" : "+v"(a)); /* a may have changed: nothing can be taken out of the loop */
    }
#pragma GCC unroll 20
    for (int u = 1; u < 20; u++) sums[0] = _mm512_add_epi32(sums[0], sums[u]);
    sink = (float)_mm512_reduce_add_epi32(sums[0]);
    return 2.0 * 64 * 20 * ROUNDS;
#else
    return 0.0;
#endif
}

static int ascending(const void *a, const void *b) {
    double d = *(const double *)a - *(const double *)b;
    return (d > 0) - (d < 0);
}

int main(int count, char **words) {
    int num_threads = count > 1 ? atoi(words[1]) : 1;
    size_t part = ((size_t)(count > 2 ? atol(words[2]) : 1024) << 20) / num_threads / 65536 * 65536;
    char *memory = aligned_alloc(1 << 21, (part * num_threads + (2 << 20)) >> 21 << 21);
    double reads[REPEATS], floats[REPEATS], bytes[REPEATS], total;
    omp_set_num_threads(num_threads);
#pragma omp parallel
    memset(memory + part * omp_get_thread_num(), 1, part);
    for (int i = 0; i < REPEATS; i++) {
        double began = omp_get_wtime();
#pragma omp parallel
        read_memory(memory + part * omp_get_thread_num(), part);
        reads[i] = part * num_threads / (omp_get_wtime() - began);
        total = 0, began = omp_get_wtime();
#pragma omp parallel reduction(+ : total)
        total += multiply_add();
        floats[i] = total / (omp_get_wtime() - began);
        total = 0, began = omp_get_wtime();
#pragma omp parallel reduction(+ : total)
        total += dot_bytes();
        bytes[i] = total / (omp_get_wtime() - began);
    }
    qsort(reads, REPEATS, sizeof(double), ascending);
    qsort(floats, REPEATS, sizeof(double), ascending);
    qsort(bytes, REPEATS, sizeof(double), ascending);
    printf("{\"threads\": %d, \"read_gb_s\": %.2f, \"read_gb_s_best\": %.2f, \"float32_gflop_s\": %.1f, "
           "\"int8_gop_s\": %.1f}\n", num_threads, reads[REPEATS / 2] / 1e9, reads[REPEATS - 1] / 1e9,
           floats[REPEATS / 2] / 1e9, bytes[REPEATS / 2] / 1e9);
}
