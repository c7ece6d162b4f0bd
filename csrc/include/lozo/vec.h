// The vectors of the instruction set that a file is compiled for, in the namespace of that set.
//
//   F, I, L        W floats; W 32-bit integers; W / 2 counters, one in the low half of each 64-bit lane
//   Pair<V>        2 W values of a block, a and b
//   Io<T>          blocks of 2 W elements in memory <-> Pair<F>
//   kRegisters     vector registers, by which kernels choose how much they keep in them
//
// Io<T>::interleaved says in which order: a holds the even and b the odd columns (bf16, where a 32-bit lane holds one of
// each and unpacking is a shift and a mask), or a the first W and b the last W.
#ifndef LOZO_VEC_H
#define LOZO_VEC_H

#include <stdint.h>
#include <string.h>

#include "lozo/noise.h"

#define LOZO_INLINE static inline __attribute__((always_inline))
#define LOZO_INLINE_METHOD inline __attribute__((always_inline))

#if defined(LOZO_ISA_avx512_bf16)
#define LOZO_ISA avx512_bf16
#elif defined(LOZO_ISA_avx512)
#define LOZO_ISA avx512
#elif defined(LOZO_ISA_avx2)
#define LOZO_ISA avx2
#elif defined(LOZO_ISA_neon)
#define LOZO_ISA neon
#else
#define LOZO_ISA portable
#endif

namespace lozo {
namespace LOZO_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class V>
struct Pair {
  V a, b;
};

template <class T>
struct Io;

}  // namespace LOZO_ISA
}  // namespace lozo

#if defined(LOZO_ISA_avx512_bf16) || defined(LOZO_ISA_avx512)
#include "lozo/vec_avx512.h"
#elif defined(LOZO_ISA_avx2)
#include "lozo/vec_avx2.h"
#elif defined(LOZO_ISA_neon)
#include "lozo/vec_neon.h"
#else
#include "lozo/vec_portable.h"
#endif

namespace lozo {
namespace LOZO_ISA {

constexpr int kBlock = 2 * W;     // elements that the kernels handle at once
constexpr int kCounters = W / 2;  // Philox counters in an L

// Asks for the lines that BLOCKS blocks have so many bytes further on, which may lie beyond the end of what there is.
template <int BLOCKS, class T>
LOZO_INLINE void prefetch_blocks(const T *x, int64_t bytes) {
  for (int64_t at = 0; at < (int64_t)(BLOCKS * kBlock * sizeof(T)); at += 64) __builtin_prefetch((const char *)x + bytes + at);
}

// Instruction sets with masked memory access use it; on others the last block of a row goes through the stack.
template <class T>
LOZO_INLINE Pair<F> load_partial(const T *x, int64_t count) {
#if defined(LOZO_MASKED_IO)
  return Io<T>::load_masked(x, count);
#else
  alignas(64) T block[kBlock] = {};
  memcpy(block, x, count * sizeof(T));
  return Io<T>::load(block);
#endif
}

template <class T>
LOZO_INLINE void store_partial(T *x, Pair<F> y, int64_t count) {
#if defined(LOZO_MASKED_IO)
  Io<T>::store_masked(x, y, count);
#else
  alignas(64) T block[kBlock];
  Io<T>::store(block, y);
  memcpy(x, block, count * sizeof(T));
#endif
}

// A whole block whose bits are not promised: denormals may become zero, which spares some machines a test.
template <class T>
LOZO_INLINE void store_flushing(T *x, Pair<F> y) {
  Io<T>::store(x, y);
}
#if defined(LOZO_ISA_avx512_bf16)
LOZO_INLINE void store_flushing(bf16 *x, Pair<F> y) { _mm512_storeu_si512(x, round_to_bf16_flushing(y)); }
#endif

}  // namespace LOZO_ISA
}  // namespace lozo

#endif
