/* Which of the two compiled widths this CPU and its kernel can run. */

/* 2: AVX-512 with VNNI; 1: AVX2; 0: neither. */
int cpu_level(void) {
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512vnni");
    return avx2 && avx512 ? 2 : avx2;
}
