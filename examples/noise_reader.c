/* The noise contract (docs/noise.md) in C: derives every value of python_tests/noise_vectors.txt, and compares it.
 *
 *   cc -O2 -ffp-contract=off examples/noise_reader.c -o noise_reader && ./noise_reader < python_tests/noise_vectors.txt
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { U, V, Z, S, SIGNS, ROW_SIGNS, COLUMN_SIGNS, ROUNDING = 8 };
static const char *names[] = {"U", "V", "Z", "S", "signs", "row_signs", "column_signs", "", "rounding"};

static void philox(uint32_t c[4], uint64_t seed) { /* Philox4x32-10 */
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
    c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k0, c[1] = (uint32_t)b;
    c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k1, c[3] = (uint32_t)a;
  }
}

static float from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

/* From a word to a normal. Every operation is rounded to fp32, which -ffp-contract=off has the compiler keep to. */
static float normal(uint32_t w) {
  const float x = (float)((int)((w & 255) + (w >> 8 & 255) + (w >> 16 & 255) + (w >> 24)) - 510), q = x * x;
  float p = q * from_bits(0x207c3b8fu);
  p = (p + from_bits(0xa9065b6eu)) * q;
  p = (p + from_bits(0x31b0c331u)) * q;
  return x * (p + from_bits(0x3bd4a59cu));
}

/* Bits of the value at a position: row ``at`` and column k of a factor, or element ``at`` of a flat stream. */
static uint32_t value(int stream, uint64_t seed, uint32_t id, uint32_t draw, uint32_t direction, uint64_t at, uint32_t k) {
  const int factor = stream == U || stream == V || stream == S;
  const int shift = factor ? 0 : stream == Z ? 2 : stream == ROUNDING ? 3 : 7; /* elements of a counter, as a power of two */
  const uint32_t high = factor ? k >> 2 : (uint32_t)(at >> shift >> 32);
  uint32_t c[4] = {(uint32_t)(at >> shift), high | direction << 8, id, (uint32_t)stream << 28 | draw}, bits;
  float z;
  philox(c, seed);
  if (stream == ROUNDING) return c[at >> 1 & 3] >> 16 * (at & 1) & 0xffff;
  if (shift == 7) return c[at >> 5 & 3] >> (at & 31) & 1 ? 0xbf800000u : 0x3f800000u; /* -1 or 1 */
  z = normal(c[factor ? k & 3 : at & 3]);
  if (factor) z = (z + 49152) - 49152; /* a multiple of 2^-8 */
  memcpy(&bits, &z, sizeof bits);
  return bits;
}

int main(void) {
  char name[16], line[256];
  uint64_t seed, at;
  uint32_t id, draw, direction, k, expected;
  int count = 0, wrong = 0;
  while (fgets(line, sizeof line, stdin)) {
    int stream = 0;
    if (line[0] == '#') continue;
    if (sscanf(line, "%15s %" SCNu64 " %" SCNu32 " %" SCNu32 " %" SCNu32 " %" SCNu64 " %" SCNu32 " %" SCNx32, name, &seed, &id,
               &draw, &direction, &at, &k, &expected) != 8)
      return fprintf(stderr, "not a vector: %s", line), 2;
    while (stream < ROUNDING && strcmp(names[stream], name)) ++stream;
    if (value(stream, seed, id, draw, direction, at, k) != expected) ++wrong, printf("differs: %s", line);
    ++count;
  }
  printf("%d values, %d differ\n", count, wrong);
  return wrong || !count;
}
