/* Which of the compiled levels this CPU and its kernel can run. */
#include <sys/syscall.h>
#include <unistd.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

/* Linux lets a process use tiles once it has asked; threads inherit it. */
static int has_amx(void) {
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
           __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* 4: AMX beside what is below; 3: AVX-512 with products of bf16; 2: AVX-512 with VNNI; 1: AVX2; 0: none. */
int cpu_level(void) {
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512vnni");
    if (!avx2 || !avx512) return avx2;
    if (!__builtin_cpu_supports("avx512bf16")) return 2;
    return has_amx() ? 4 : 3;
}
