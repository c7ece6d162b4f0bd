// The ops of one instruction set, as dispatch.cpp sees them.
#ifndef LOZO_OPS_H
#define LOZO_OPS_H

#include "lozo/abi.h"

namespace lozo {

// What every tile of a call needs: arguments of draw d and tensor t are at [d * count + t].
struct OpCall {
  const lozo_call *call;
  int64_t count;
};

#define LOZO_DECLARE_OPS(isa)                                                                 \
  namespace isa {                                                                             \
  int lowrank_update(const lozo_tensor *, int64_t, const lozo_call *);                        \
  int dense_update(const lozo_tensor *, int64_t, const lozo_call *);                          \
  int lowrank_momentum(const lozo_tensor *, int64_t, const lozo_call *);                      \
  int dense_momentum(const lozo_tensor *, int64_t, const lozo_call *);                        \
  int resample(const lozo_tensor *, int64_t, const lozo_call *, int64_t reproject);           \
  int factor_update(const lozo_tensor *, int64_t, const lozo_call *);                         \
  int lowrank_merge(const lozo_tensor *, int64_t, const lozo_call *, const lozo_tensor *out); \
  int dense_merge(const lozo_tensor *, int64_t, const lozo_call *, const lozo_tensor *out);   \
  int lowrank_linear(const lozo_skinny *);                                                    \
  int lowrank_embedding(const lozo_skinny *);                                                 \
  void factor(const lozo_factor *, float *out);                                               \
  }

LOZO_DECLARE_OPS(avx512_bf16)
LOZO_DECLARE_OPS(avx512)
LOZO_DECLARE_OPS(avx2)
LOZO_DECLARE_OPS(portable)

#undef LOZO_DECLARE_OPS

}  // namespace lozo

#endif
