/* AVX2 where the processor has it, whatever the compiler was asked for; with PLAIN, for tests, never. */
#if defined(__x86_64__) && !defined(PLAIN)
#define HAS_AVX2
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE __attribute__((target("avx2,fma"), always_inline)) static inline
static inline int has_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
static inline int has_avx2(void) { return 0; }
#endif
