/* The passes between products in bf16, each of which reads its operands once.

   All tensors bf16, rows dense; sums and functions in f32, rounded to the nearest, ties to even.
   What comes forward is rounded where torch's operations round (bf16 below), so that a model gives
   what it gives in transformers; gradients are rounded once.
     norm      u = x ρ,  ρ = 1 / sqrt(Σ x² / D + eps)
               weighted = 0:  y = w · bf16(u)         weighted = 1:  y = (w + offset) · u
     its gradient   h = G · w (or w + offset),  grad = ρ (h - u · Σ h u / D)
     gated     y = bf16(act(a)) · b,  gelu = 0:  act(a) = a σ(a)
               gelu = 1, its tanh form:  act(a) = a σ(2 √(2/π) (a + 0.044715 a³))
     its gradients  G · b · act'(a)  and  G · act(a)
     rotary    pairs (i, i + half) of the first 2 · half numbers of a head; the others are copied
   A row's result follows from the row alone, whatever the number of threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "avx2.h"

#if !defined(HAS_AVX2)
#define AVX2
#endif

#define EACH __attribute__((always_inline)) static inline
#define LANES 16   /* sums of a row side by side */
#define PIECE 4096 /* numbers of a gate that are one piece of work */

typedef uint16_t bf16;

long minilora_has_passes(void) {
#if defined(__x86_64__) && !defined(PLAIN)
  return has_avx2();
#else
  return 1;
#endif
}

EACH float wide(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

EACH bf16 narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x != x ? 0x7fc0 : (bf16)rounded;
}

/* 1 / (1 + exp(-x)), off by less than 1e-6 of it: 2^f by its Taylor series on [-0.5, 0.5]. Where x
   is below -87 it stays at 2^-126, and of NaN it is some number. The exponent is clamped by its bits: a loop that compares floats isn't
   vectorized. */
EACH float sigmoid(float x) {
  float t = x * -1.44269504f;
  uint32_t sign, size;
  memcpy(&size, &t, 4);
  sign = size & 0x80000000, size &= 0x7fffffff;
  size = size < 0x42fc0000 ? size : 0x42fc0000; /* 126 */
  size |= sign;
  memcpy(&t, &size, 4);
  float n = t + 12582912.0f; /* 1.5 · 2²³: the low bits hold the nearest integer */
  int32_t whole;
  memcpy(&whole, &n, 4);
  float f = t - (n - 12582912.0f);
  float p = 1.0f + f * (0.693147181f + f * (0.240226507f + f * (0.0555041087f +
            f * (0.00961812911f + f * (0.00133335581f + f * 0.000154035304f)))));
  int32_t bits;
  memcpy(&bits, &p, 4);
  bits += (int32_t)((uint32_t)whole << 23);
  memcpy(&p, &bits, 4);
  return 1 / (1 + p);
}

/* Σ x² of a row; with g also Σ g w x, where w has the offset in it. */
AVX2 static float row_sums(const bf16 *x, const bf16 *g, const bf16 *w, float offset, long D,
                           float *along) {
  float squares[LANES] = {0}, products[LANES] = {0};
  long d = 0;
  for (; d + LANES <= D; d += LANES)
    for (int i = 0; i < LANES; i++) {
      float v = wide(x[d + i]);
      squares[i] += v * v;
    }
  for (int i = 0; d + i < D; i++) squares[i] += wide(x[d + i]) * wide(x[d + i]);
  if (g) {
    for (d = 0; d + LANES <= D; d += LANES)
      for (int i = 0; i < LANES; i++)
        products[i] += wide(g[d + i]) * (wide(w[d + i]) + offset) * wide(x[d + i]);
    for (int i = 0; d + i < D; i++)
      products[i] += wide(g[d + i]) * (wide(w[d + i]) + offset) * wide(x[d + i]);
  }
  for (int i = 1; i < LANES; i++) squares[0] += squares[i], products[0] += products[i];
  *along = products[0];
  return squares[0];
}

AVX2 static void norm_row(const bf16 *x, const bf16 *w, bf16 *y, long D, long weighted, float eps,
                          float offset) {
  float none, scale = 1 / sqrtf(row_sums(x, 0, w, 0, D, &none) / D + eps);
  if (weighted)
    for (long d = 0; d < D; d++) y[d] = narrow((wide(w[d]) + offset) * (wide(x[d]) * scale));
  else
    for (long d = 0; d < D; d++) y[d] = narrow(wide(w[d]) * wide(narrow(wide(x[d]) * scale)));
}

AVX2 static void norm_back_row(const bf16 *g, const bf16 *x, const bf16 *w, bf16 *grad, long D,
                               float eps, float offset) {
  float along, scale = 1 / sqrtf(row_sums(x, g, w, offset, D, &along) / D + eps);
  along *= scale / D;
  for (long d = 0; d < D; d++) {
    float h = wide(g[d]) * (wide(w[d]) + offset);
    grad[d] = narrow((h - wide(x[d]) * scale * along) * scale);
  }
}

void minilora_norm_pass(const bf16 *x, const bf16 *w, bf16 *y, long M, long D, long weighted,
                        double eps, double offset) {
#pragma omp parallel for schedule(static)
  for (long m = 0; m < M; m++) norm_row(x + m * D, w, y + m * D, D, weighted, eps, offset);
}

void minilora_norm_back_pass(const bf16 *g, const bf16 *x, const bf16 *w, bf16 *grad, long M,
                             long D, double eps, double offset) {
#pragma omp parallel for schedule(static)
  for (long m = 0; m < M; m++)
    norm_back_row(g + m * D, x + m * D, w, grad + m * D, D, eps, offset);
}

#define GELU 1.5957691216f /* 2 √(2/π) */

/* act(a) = a σ(v), and its slope σ + a σ (1 - σ) v'; gelu is a constant wherever these are called,
   so that neither loop holds a branch. */
EACH void gated(const bf16 *a, const bf16 *b, bf16 *y, long count, const int gelu) {
  for (long i = 0; i < count; i++) {
    float x = wide(a[i]), v = gelu ? GELU * (x + 0.044715f * x * x * x) : x;
    y[i] = narrow(wide(narrow(x * sigmoid(v))) * wide(b[i]));
  }
}

EACH void gated_back(const bf16 *g, const bf16 *a, const bf16 *b, bf16 *grad_a, bf16 *grad_b,
                     long count, const int gelu) {
  for (long i = 0; i < count; i++) {
    float x = wide(a[i]), v = gelu ? GELU * (x + 0.044715f * x * x * x) : x;
    float s = sigmoid(v), act = x * s, slope = gelu ? GELU * (1 + 0.134145f * x * x) : 1;
    grad_a[i] = narrow(wide(g[i]) * wide(b[i]) * (s + act * (1 - s) * slope));
    grad_b[i] = narrow(wide(g[i]) * act);
  }
}

AVX2 static void gated_piece(const bf16 *a, const bf16 *b, bf16 *y, long count, long gelu) {
  if (gelu)
    gated(a, b, y, count, 1);
  else
    gated(a, b, y, count, 0);
}

AVX2 static void gated_back_piece(const bf16 *g, const bf16 *a, const bf16 *b, bf16 *grad_a,
                                  bf16 *grad_b, long count, long gelu) {
  if (gelu)
    gated_back(g, a, b, grad_a, grad_b, count, 1);
  else
    gated_back(g, a, b, grad_a, grad_b, count, 0);
}

void minilora_gated_pass(const bf16 *a, const bf16 *b, bf16 *y, long n, long gelu) {
#pragma omp parallel for schedule(static)
  for (long i = 0; i < n; i += PIECE)
    gated_piece(a + i, b + i, y + i, n - i < PIECE ? n - i : PIECE, gelu);
}

void minilora_gated_back_pass(const bf16 *g, const bf16 *a, const bf16 *b, bf16 *grad_a,
                              bf16 *grad_b, long n, long gelu) {
#pragma omp parallel for schedule(static)
  for (long i = 0; i < n; i += PIECE)
    gated_back_piece(g + i, a + i, b + i, grad_a + i, grad_b + i, n - i < PIECE ? n - i : PIECE,
                     gelu);
}

AVX2 static void rotate(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *y, long half, long D,
                      float sign) {
  for (long i = 0; i < half; i++) {
    float a = wide(x[i]), b = wide(x[half + i]), c = wide(cos[i]), s = sign * wide(sin[i]);
    y[i] = narrow(wide(narrow(a * c)) - wide(narrow(b * s)));
    y[half + i] = narrow(wide(narrow(b * c)) + wide(narrow(a * s)));
  }
  memcpy(y + 2 * half, x + 2 * half, (D - 2 * half) * sizeof *x);
}

/* x and y [B, H, T, D] by the strides of their first three dimensions; cos, sin [1 or B, T, half],
   `step` apart from one of B to the next. */
void minilora_rotary_pass(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *y, long B, long H,
                          long T, long D, long half, long back, long step, long xb, long xh,
                          long xt, long yb, long yh, long yt) {
#pragma omp parallel for collapse(3) schedule(static)
  for (long b = 0; b < B; b++)
    for (long t = 0; t < T; t++)
      for (long h = 0; h < H; h++) {
        long at = b * step + t * half;
        rotate(x + b * xb + h * xh + t * xt, cos + at, sin + at, y + b * yb + h * yh + t * yt, half, D,
             back ? -1 : 1);
      }
}
