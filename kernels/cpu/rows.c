/* Y = X Wᵀ for few rows of X, straight from a quantized W: no weight is decoded to memory.

   x f32 [M, K], y f32 [M, N] (written), scale f32 [N]; all dense, row by row.
     INT8   W[n, k] = scale[n] · codes[n, k]                     codes int8 [N, K]
     INT4   W[n, k] = scale[n] · steps[n, k / group] · (q − 8)   steps uint8 [N, K / group]
            q: column j low, column j + K/2 high nibble of packed uint8 [N, K/2]
   and W itself for many rows, which torch multiplies:
     NF4    out[i] = absmax[i / block] · pairs[2 · byte + (i & 1)]  two weights a byte
     INT4   out[n, k] = steps[n, k / group] · (q − 8), without the scale
   One token's product costs the bytes of W, read once for all rows of X. Sums run in f32, in an
   order that follows from K and the processor, not from M or the number of threads. */

#define ROWS 4     /* of X that share one conversion of the codes */
#define AHEAD 2048 /* bytes; the hardware's own prefetching stops at every page */

#include "avx2.h"
#include "int4.h"

#if defined(HAS_AVX2)
INLINE float total(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* R rows of X times one row of W; R is a constant wherever this is inlined. */
INLINE void int8_block(const float *x, const signed char *codes, float scale, float *y, long N,
                       long K, const int R) {
  __m256 sum[ROWS][2];
  for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
  long k = 0;
  for (; k + 16 <= K; k += 16) {
    _mm_prefetch((const char *)codes + k + AHEAD, _MM_HINT_T0);
    for (int h = 0; h < 2; h++) {
      __m128i eight = _mm_loadl_epi64((const __m128i *)(codes + k + 8 * h));
      __m256 w = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
      for (int r = 0; r < R; r++)
        sum[r][h] = _mm256_fmadd_ps(_mm256_loadu_ps(x + r * K + k + 8 * h), w, sum[r][h]);
    }
  }
  for (int r = 0; r < R; r++) {
    float all = total(_mm256_add_ps(sum[r][0], sum[r][1]));
    for (long rest = k; rest < K; rest++) all += x[r * K + rest] * (float)codes[rest];
    y[r * N] = all * scale;
  }
}

/* Likewise; half a row is a multiple of 16, and so is a group. */
INLINE void int4_block(const float *x, const unsigned char *packed, const unsigned char *steps,
                       float scale, float *y, long N, long K, long group, const int R) {
  const __m256i low = _mm256_set1_epi32(15), eight = _mm256_set1_epi32(8);
  long half = K / 2;
  __m256 sum[ROWS][2];
  for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
  for (long j = 0; j < half; j += 16) {
    _mm_prefetch((const char *)packed + j + AHEAD, _MM_HINT_T0);
    __m256 step[2] = {_mm256_set1_ps(steps[j / group]), _mm256_set1_ps(steps[(half + j) / group])};
    __m256 part[ROWS][2];
    for (int h = 0; h < 2; h++) {
      __m128i bytes = _mm_loadl_epi64((const __m128i *)(packed + j + 8 * h));
      __m256i both = _mm256_cvtepu8_epi32(bytes);
      __m256i q[2] = {_mm256_and_si256(both, low), _mm256_srli_epi32(both, 4)};
      for (int i = 0; i < 2; i++) {
        __m256 w = _mm256_cvtepi32_ps(_mm256_sub_epi32(q[i], eight));
        for (int r = 0; r < R; r++) {
          __m256 input = _mm256_loadu_ps(x + r * K + i * half + j + 8 * h);
          part[r][i] = h ? _mm256_fmadd_ps(input, w, part[r][i]) : _mm256_mul_ps(input, w);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 2; i++) sum[r][i] = _mm256_fmadd_ps(step[i], part[r][i], sum[r][i]);
  }
  for (int r = 0; r < R; r++) y[r * N] = total(_mm256_add_ps(sum[r][0], sum[r][1])) * scale;
}

AVX2 static void int8_avx2(const float *x, const signed char *codes, float scale, float *y, long M,
                           long N, long K) {
  long m = 0;
  for (; m + ROWS <= M; m += ROWS) int8_block(x + m * K, codes, scale, y + m * N, N, K, ROWS);
  for (; m < M; m++) int8_block(x + m * K, codes, scale, y + m * N, N, K, 1);
}

AVX2 static void int4_avx2(const float *x, const unsigned char *packed, const unsigned char *steps,
                           float scale, float *y, long M, long N, long K, long group) {
  long m = 0;
  for (; m + ROWS <= M; m += ROWS)
    int4_block(x + m * K, packed, steps, scale, y + m * N, N, K, group, ROWS);
  for (; m < M; m++) int4_block(x + m * K, packed, steps, scale, y + m * N, N, K, group, 1);
}
#else
#define int8_avx2 int8_plain
#define int4_avx2 int4_plain
#endif

static void int8_plain(const float *x, const signed char *codes, float scale, float *y, long M,
                       long N, long K) {
  for (long m = 0; m < M; m++) {
    float sum = 0;
    for (long k = 0; k < K; k++) sum += x[m * K + k] * (float)codes[k];
    y[m * N] = sum * scale;
  }
}

static void int4_plain(const float *x, const unsigned char *packed, const unsigned char *steps,
                       float scale, float *y, long M, long N, long K, long group) {
  long half = K / 2;
  for (long m = 0; m < M; m++) {
    float sum = 0;
    for (long k = 0; k < K; k++) {
      int q = k < half ? packed[k] & 15 : packed[k - half] >> 4;
      sum += x[m * K + k] * (float)(steps[k / group] * (q - 8));
    }
    y[m * N] = sum * scale;
  }
}

void minilora_int8_rows(const float *x, const signed char *codes, const float *scale, float *y,
                        long M, long N, long K) {
  int fast = has_avx2();
#pragma omp parallel for schedule(static)
  for (long n = 0; n < N; n++)
    (fast ? int8_avx2 : int8_plain)(x, codes + n * K, scale[n], y + n, M, N, K);
}

void minilora_int4_rows(const float *x, const unsigned char *packed, const unsigned char *steps,
                        const float *scale, float *y, long M, long N, long K, long group) {
  int fast = has_avx2() && K % 32 == 0 && group % 16 == 0;
#pragma omp parallel for schedule(static)
  for (long n = 0; n < N; n++)
    (fast ? int4_avx2 : int4_plain)(x, packed + n * (K / 2), steps + n * (K / group), scale[n],
                                    y + n, M, N, K, group);
}

/* pairs f32 [256, 2]: the two weights of each byte; block is even, n may be odd. */
void minilora_nf4_weights(const unsigned char *packed, const float *absmax, const float *pairs,
                          float *out, long n, long block) {
  long blocks = (n + block - 1) / block;
#pragma omp parallel for schedule(static)
  for (long b = 0; b < blocks; b++) {
    const unsigned char *bytes = packed + b * block / 2;
    float *line = out + b * block, scale = absmax[b];
    long rest = n - b * block, count = rest < block ? rest : block;
    for (long j = 0; j < count / 2; j++) {
      const float *two = pairs + 2 * bytes[j];
      line[2 * j] = two[0] * scale;
      line[2 * j + 1] = two[1] * scale;
    }
    if (count & 1) line[count - 1] = pairs[2 * bytes[count / 2]] * scale;
  }
}

INT4_ROW(int4_row, float)

void minilora_int4_weights(const unsigned char *packed, const unsigned char *steps, float *out,
                           long N, long K, long group) {
#pragma omp parallel for schedule(static)
  for (long n = 0; n < N; n++)
    int4_row(packed + n * (K / 2), steps + n * (K / group), out + n * K, K, group);
}
