/* Y = X Wᵀ and X W for many rows of X over INT8 codes, by AVX2's products of bytes.

   x f32 [M, J], y f32 [M, L] (written), scale f32, codes int8 in -127..127; all dense:
     along  (across = 0)  codes [L, J], scale [L]:  y[m, l] = scale[l] · Σj x[m, j] · codes[l, j]
     across (across = 1)  codes [J, L], scale [J]:  y[m, l] = Σj x[m, j] · scale[j] · codes[j, l]
   Each block of 64 along J of a row of X is rounded to 7 bits with a scale of its own:
   x ≈ s · (u - 64), u in 1..127. vpmaddubsw sums two products u · code to 16 bits, at most
   2 · 127 · 127 < 2¹⁵, and a block's 16-bit sums are added up modulo 2¹⁶. That is exact because s
   is chosen so that no sum of (u - 64) · code over a lane's 32 places can leave 16 bits: by Cauchy
   and Schwarz it is at most |u - 64| · |codes|, and s grows where that passes 32767. Widening once
   a block, not with every product (as a second multiplication by ones), is what makes this faster
   than floats on processors without VNNI. Blocks are added up in f32, in order: a row of Y follows
   from its row of X alone, whatever M and the number of threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "avx2.h"
#include "int4.h"

#define BLOCK 64 /* places of J that share a scale */
#define QUADS (BLOCK / 4)
#define COLUMNS 16 /* of Y in a strip: two registers of eight int32, each two 16-bit lanes */
#define ROWS 3     /* of X in a tile: with two strips of sums each, what 16 registers hold */
#define CHUNK 480  /* at most so many rows of X are a thread's share of a strip's work */

/* Where the parts of `work` lie; the first two are read as whole, aligned registers. */
struct work {
  int8_t *packed;   /* [strips, blocks, QUADS, COLUMNS, 4] codes in the order they are read */
  int16_t *offsets; /* [strips, blocks, COLUMNS, 2] 64 · (sum of a lane's codes) modulo 2¹⁶ */
  int32_t *norms;   /* [strips, blocks] the largest squared norm of a lane's codes */
  float *room;      /* [blocks] how long u - 64 may be before rounding */
  float *scales;    /* [M, blocks] s */
  int8_t *codes;    /* [rows of W, columns of W] where W is stored in 4 bits */
  uint8_t *u;       /* [M, blocks, BLOCK] */
};

static long lay_out(struct work *w, char *start, long M, long J, long L, long four_bits) {
  long blocks = (J + BLOCK - 1) / BLOCK, strips = (L + COLUMNS - 1) / COLUMNS, at = 0;
#define PART(name, count)                                                                          \
  (w->name = start ? (void *)(start + at) : 0, at += (count) * (long)sizeof *w->name)
  PART(packed, strips * blocks * BLOCK * COLUMNS);
  PART(offsets, strips * blocks * COLUMNS * 2);
  PART(norms, strips * blocks);
  PART(room, blocks);
  PART(scales, M * blocks);
  PART(codes, four_bits ? J * L : 0);
  PART(u, M * blocks * BLOCK);
  return at;
}

long minilora_blocks_bytes(long M, long J, long L, long four_bits) {
  struct work w;
  return lay_out(&w, 0, M, J, L, four_bits);
}

long minilora_has_blocks(void) { return has_avx2(); }

#if defined(HAS_AVX2)
#define UNROLL _Pragma("GCC unroll 4")

/* Codes of one block and strip, `from` [depth, columns] or [columns, depth] in steps of `step`. */
AVX2 static void pack(const int8_t *from, long step, long depth, long columns, long across,
                      int8_t *to) {
  if (depth < BLOCK || columns < COLUMNS) memset(to, 0, BLOCK * COLUMNS);
  if (depth < BLOCK || columns < COLUMNS)
    for (long j = 0; j < depth; j++)
      for (long c = 0; c < columns; c++)
        to[(j / 4 * COLUMNS + c) * 4 + j % 4] = across ? from[j * step + c] : from[c * step + j];
  else if (across)
    for (long q = 0; q < QUADS; q++) {
      __m128i row[4], *out = (__m128i *)(to + q * 4 * COLUMNS);
      for (int i = 0; i < 4; i++)
        row[i] = _mm_loadu_si128((const __m128i *)(from + (4 * q + i) * step));
      __m128i low[2] = {_mm_unpacklo_epi8(row[0], row[1]), _mm_unpacklo_epi8(row[2], row[3])};
      __m128i high[2] = {_mm_unpackhi_epi8(row[0], row[1]), _mm_unpackhi_epi8(row[2], row[3])};
      out[0] = _mm_unpacklo_epi16(low[0], low[1]);
      out[1] = _mm_unpackhi_epi16(low[0], low[1]);
      out[2] = _mm_unpacklo_epi16(high[0], high[1]);
      out[3] = _mm_unpackhi_epi16(high[0], high[1]);
    }
  else
    for (long c = 0; c < COLUMNS; c++)
      for (long q = 0; q < QUADS; q++)
        memcpy(to + (q * COLUMNS + c) * 4, from + c * step + 4 * q, 4);
}

/* Fill a block's offsets; return the largest squared norm of its lanes. */
AVX2 static int32_t lanes(const int8_t *packed, int16_t *offsets) {
  __m256i most = _mm256_setzero_si256();
  for (int h = 0; h < 2; h++) {
    __m256i sum = _mm256_setzero_si256(), squares[2] = {sum, sum};
    for (int q = 0; q < QUADS; q++) {
      __m256i codes = _mm256_load_si256((const __m256i *)(packed + q * 64 + 32 * h));
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_set1_epi8(64), codes));
      for (int i = 0; i < 2; i++) {
        __m128i half = i ? _mm256_extracti128_si256(codes, 1) : _mm256_castsi256_si128(codes);
        __m256i wide = _mm256_cvtepi8_epi16(half);
        squares[i] = _mm256_add_epi32(squares[i], _mm256_madd_epi16(wide, wide));
      }
    }
    _mm256_store_si256((__m256i *)(offsets + 16 * h), sum);
    most = _mm256_max_epi32(most, _mm256_max_epi32(squares[0], squares[1]));
  }
  int32_t each[8], largest = 0;
  _mm256_storeu_si256((__m256i *)each, most);
  for (int i = 0; i < 8; i++) largest = each[i] > largest ? each[i] : largest;
  return largest;
}

/* Round a block of a row; a value that is not finite makes its scale NaN. */
AVX2 static void quantize(const float *x, const float *times, long depth, float room, uint8_t *u,
                          float *scale) {
  float t[BLOCK], each[8], largest = 1e-35f, nan = 0; /* a block of zeros has a scale too */
  for (long j = 0; j < BLOCK; j++) t[j] = j < depth ? x[j] * (times ? times[j] : 1) : 0;
  __m256 most = _mm256_setzero_ps(), none = most, squares = most;
  for (int j = 0; j < BLOCK; j += 8) {
    __m256 v = _mm256_loadu_ps(t + j);
    none = _mm256_add_ps(none, _mm256_sub_ps(v, v));
    most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v));
  }
  _mm256_storeu_ps(each, none);
  for (int i = 0; i < 8; i++) nan += each[i];
  _mm256_storeu_ps(each, most);
  for (int i = 0; i < 8; i++) largest = each[i] > largest ? each[i] : largest;
  for (int j = 0; j < BLOCK; j += 8) { /* to at most 63 first: squares of x itself may overflow */
    __m256 v = _mm256_mul_ps(_mm256_loadu_ps(t + j), _mm256_set1_ps(63 / largest));
    _mm256_storeu_ps(t + j, v);
    squares = _mm256_fmadd_ps(v, v, squares);
  }
  _mm256_storeu_ps(each, squares);
  float even = each[0] + each[1] + each[4] + each[5], odd = each[2] + each[3] + each[6] + each[7];
  float norm = sqrtf(even > odd ? even : odd), shrink = norm > room ? norm / room : 1;
  *scale = largest / 63 * shrink + nan;
  for (int j = 0; j < BLOCK; j += 32) {
    __m256i q[4];
    for (int i = 0; i < 4; i++) {
      __m256 v = _mm256_mul_ps(_mm256_loadu_ps(t + j + 8 * i), _mm256_set1_ps(1 / shrink));
      q[i] = _mm256_cvtps_epi32(v);
    }
    __m256i two[2] = {_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])};
    __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* packing goes by halves */
    __m256i all = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(two[0], two[1]), order);
    _mm256_storeu_si256((__m256i *)(u + j), _mm256_add_epi8(all, _mm256_set1_epi8(64)));
  }
}

/* R rows of X times a strip; R is a constant wherever this is inlined. The products are written
   as assembler because compilers move them ahead of the sums, which then spill. */
INLINE void tile(const uint8_t *u, const float *scales, long blocks, const int8_t *packed,
                 const int16_t *offsets, const float *times, float *y, long L, long columns,
                 const int R) {
  __m256 sum[ROWS][2];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int h = 0; h < 2; h++)
    sum[r][h] = _mm256_setzero_ps();
  for (long b = 0; b < blocks; b++) {
    __m256i part[ROWS][2], product, four;
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int h = 0; h < 2; h++)
      part[r][h] = _mm256_setzero_si256();
    for (int q = 0; q < QUADS; q++, packed += 4 * COLUMNS, u += 4)
      UNROLL for (int r = 0; r < R; r++) {
        __asm__ volatile("vpbroadcastd %1, %0"
                         : "=x"(four)
                         : "m"(*(const int32_t *)(u + r * blocks * BLOCK)));
        UNROLL for (int h = 0; h < 2; h++)
          __asm__ volatile("vpmaddubsw %3, %2, %0\n\tvpaddw %0, %1, %1"
                           : "=&x"(product), "+x"(part[r][h])
                           : "x"(four), "m"(*(const __m256i *)(packed + 32 * h)));
      }
    UNROLL for (int h = 0; h < 2; h++) {
      __m256i offset = _mm256_load_si256((const __m256i *)(offsets + (b * 2 + h) * 16));
      UNROLL for (int r = 0; r < R; r++) {
        __m256i lanes = _mm256_sub_epi16(part[r][h], offset);
        __m256 both = _mm256_cvtepi32_ps(_mm256_madd_epi16(lanes, _mm256_set1_epi16(1)));
        sum[r][h] = _mm256_fmadd_ps(both, _mm256_set1_ps(scales[r * blocks + b]), sum[r][h]);
      }
    }
  }
  if (columns == COLUMNS)
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int h = 0; h < 2; h++) {
      __m256 all = times ? _mm256_mul_ps(sum[r][h], _mm256_loadu_ps(times + 8 * h)) : sum[r][h];
      _mm256_storeu_ps(y + r * L + 8 * h, all);
    }
  else {
    float line[ROWS][COLUMNS];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int h = 0; h < 2; h++)
      _mm256_storeu_ps(line[r] + 8 * h, sum[r][h]);
    for (int r = 0; r < R; r++)
      for (long c = 0; c < columns; c++) y[r * L + c] = line[r][c] * (times ? times[c] : 1);
  }
}

AVX2 static void strip(const struct work *w, long s, long m, long end, long blocks,
                       const float *times, float *y, long L) {
  long columns = L - s * COLUMNS < COLUMNS ? L - s * COLUMNS : COLUMNS, at = s * blocks;
#define TILE(R)                                                                                    \
  tile(w->u + m * blocks * BLOCK, w->scales + m * blocks, blocks,                                  \
       w->packed + at * BLOCK * COLUMNS, w->offsets + at * COLUMNS * 2,                            \
       times ? times + s * COLUMNS : 0, y + m * L + s * COLUMNS, L, columns, R)
  for (; m + ROWS <= end; m += ROWS) TILE(ROWS);
  if (end - m == 2) TILE(2);
  if (end - m == 1) TILE(1);
}

static void multiply(const float *x, const int8_t *codes, const float *scale, float *y,
                     struct work *w, long M, long J, long L, long across) {
  long blocks = (J + BLOCK - 1) / BLOCK, strips = (L + COLUMNS - 1) / COLUMNS;
  long chunks = (M + CHUNK - 1) / CHUNK, rows = (M + chunks - 1) / chunks; /* of equal length */
#define DEPTH(b) (J - (b) * BLOCK < BLOCK ? J - (b) * BLOCK : BLOCK)
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (long s = 0; s < strips; s++)
      for (long b = 0; b < blocks; b++) {
        long at = s * blocks + b, columns = L - s * COLUMNS;
        const int8_t *from = across ? codes + b * BLOCK * L + s * COLUMNS
                                    : codes + s * COLUMNS * J + b * BLOCK;
        pack(from, across ? L : J, DEPTH(b), columns < COLUMNS ? columns : COLUMNS, across,
             w->packed + at * BLOCK * COLUMNS);
        w->norms[at] = lanes(w->packed + at * BLOCK * COLUMNS, w->offsets + at * COLUMNS * 2);
      }
#pragma omp for schedule(static)
    for (long b = 0; b < blocks; b++) {
      int32_t most = 1;
      for (long s = 0; s < strips; s++)
        most = w->norms[s * blocks + b] > most ? w->norms[s * blocks + b] : most;
      /* Rounding adds at most half a step at each of 32 places, √32 / 2 < 2.83; 1e-4 of 32767 is
         left for what f32 rounds on the way. */
      w->room[b] = 32767 * .9999f / sqrtf((float)most) - 2.83f;
    }
#pragma omp for schedule(static)
    for (long m = 0; m < M; m++)
      for (long b = 0; b < blocks; b++)
        quantize(x + m * J + b * BLOCK, across ? scale + b * BLOCK : 0, DEPTH(b), w->room[b],
                 w->u + (m * blocks + b) * BLOCK, w->scales + m * blocks + b);
#pragma omp for collapse(2) schedule(static)
    for (long c = 0; c < chunks; c++)
      for (long s = 0; s < strips; s++)
        strip(w, s, c * rows, M < (c + 1) * rows ? M : (c + 1) * rows, blocks, across ? 0 : scale,
              y, L);
  }
}
#else
static void multiply(const float *x, const int8_t *codes, const float *scale, float *y,
                     struct work *w, long M, long J, long L, long across) {}
#endif

void minilora_int8_blocks(const float *x, const int8_t *codes, const float *scale, float *y,
                          char *work, long M, long J, long L, long across) {
  struct work w;
  lay_out(&w, work, M, J, L, 0);
  multiply(x, codes, scale, y, &w, M, J, L, across);
}

INT4_ROW(int4_row, int8_t)

/* INT4: W[n, k] = scale[n] · steps[n, k / group] · (q - 8), stored as in rows.c; `[N, K]` is
   [L, J] along and [J, L] across. */
void minilora_int4_blocks(const float *x, const unsigned char *stored, const unsigned char *steps,
                          const float *scale, float *y, char *work, long M, long J, long L,
                          long across, long group) {
  struct work w;
  long N = across ? J : L, K = across ? L : J;
  lay_out(&w, work, M, J, L, 1);
#pragma omp parallel for schedule(static)
  for (long n = 0; n < N; n++)
    int4_row(stored + n * (K / 2), steps + n * (K / group), w.codes + n * K, K, group);
  multiply(x, w.codes, scale, y, &w, M, J, L, across);
}
