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

// The ops over tables: the name, whether the tensors have V, and what a call has to be beyond that.
#define LOZO_TABLE_OPS(OP)                                \
  OP(lowrank_update, true, !call->draws)                  \
  OP(lowrank_signed_update, true, has_parts(call))        \
  OP(dense_update, false, !call->draws)                   \
  OP(dense_momentum, false, !call->draws)                 \
  OP(factor_update, false, are_factors(tensors, count))   \
  OP(factor_momentum, false, are_factors(tensors, count)) \
  OP(lowrank_merge, true, call->num_draws <= 1)           \
  OP(dense_merge, false, call->num_draws <= 1)            \
  OP(resample, true, true)

#define LOZO_DECLARE_OP(name, v, valid) int name(const lozo_tensor *, int64_t, const lozo_call *);
#define LOZO_DECLARE_OPS(isa)                   \
  namespace isa {                               \
  LOZO_TABLE_OPS(LOZO_DECLARE_OP)               \
  int lowrank_linear(const lozo_skinny *);      \
  int lowrank_embedding(const lozo_skinny *);   \
  int lowrank_points(const lozo_points *);      \
  void factor(const lozo_factor *, float *out); \
  }

LOZO_DECLARE_OPS(avx512_bf16)
LOZO_DECLARE_OPS(avx512)
LOZO_DECLARE_OPS(avx2)
LOZO_DECLARE_OPS(neon)
LOZO_DECLARE_OPS(portable)

#undef LOZO_DECLARE_OPS
#undef LOZO_DECLARE_OP

}  // namespace lozo

#endif
