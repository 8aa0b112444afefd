/* A row of INT4 codes without its scale: line[k] = steps[k / group] · (q - 8), column k of the first
   half in the low and of the second in the high nibble of byte k mod K / 2. */
#define INT4_ROW(name, type)                                                                       \
  static void name(const unsigned char *bytes, const unsigned char *steps, type *line, long K,     \
                   long group) {                                                                   \
    long half = K / 2;                                                                             \
    for (long start = 0; start < K; start += group) {                                              \
      type s = (type)steps[start / group];                                                         \
      long end = start + group, low = end < half ? end : half, high = start > half ? start : half; \
      for (long k = start; k < low; k++) line[k] = (type)(s * (type)((bytes[k] & 15) - 8));        \
      for (long k = high; k < end; k++) line[k] = (type)(s * (type)((bytes[k - half] >> 4) - 8));  \
    }                                                                                              \
  }
