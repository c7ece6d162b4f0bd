// The exported functions, and the choice of the instruction set that serves them.
#include <string.h>

#include <atomic>

#include "ops.h"
#include "tiles.h"

namespace {

struct Isa {
  const char *name;
  bool (*supported)();
  int (*lowrank_update)(const lozo_tensor *, int64_t, const lozo_call *);
  int (*dense_update)(const lozo_tensor *, int64_t, const lozo_call *);
  int (*lowrank_momentum)(const lozo_tensor *, int64_t, const lozo_call *);
  int (*dense_momentum)(const lozo_tensor *, int64_t, const lozo_call *);
  int (*resample)(const lozo_tensor *, int64_t, const lozo_call *, int64_t);
  int (*factor_update)(const lozo_tensor *, int64_t, const lozo_call *);
  int (*lowrank_merge)(const lozo_tensor *, int64_t, const lozo_call *, const lozo_tensor *);
  int (*dense_merge)(const lozo_tensor *, int64_t, const lozo_call *, const lozo_tensor *);
  int (*lowrank_linear)(const lozo_skinny *);
  int (*lowrank_embedding)(const lozo_skinny *);
  void (*factor)(const lozo_factor *, float *);
};

#define LOZO_ISA_ENTRY(isa, supported) \
  {#isa,                               \
   [] { return bool(supported); },     \
   lozo::isa::lowrank_update,          \
   lozo::isa::dense_update,            \
   lozo::isa::lowrank_momentum,        \
   lozo::isa::dense_momentum,          \
   lozo::isa::resample,                \
   lozo::isa::factor_update,           \
   lozo::isa::lowrank_merge,           \
   lozo::isa::dense_merge,             \
   lozo::isa::lowrank_linear,          \
   lozo::isa::lowrank_embedding,       \
   lozo::isa::factor}

#define LOZO_CPU(feature) __builtin_cpu_supports(feature)
#define LOZO_CPU_AVX512 \
  (LOZO_CPU("avx512f") && LOZO_CPU("avx512bw") && LOZO_CPU("avx512dq") && LOZO_CPU("avx512vl") && LOZO_CPU("avx2"))

// Best first.
const Isa kIsas[] = {
#if defined(LOZO_HAVE_avx512_bf16)
    LOZO_ISA_ENTRY(avx512_bf16, LOZO_CPU_AVX512 &&LOZO_CPU("avx512vnni") && LOZO_CPU("avx512bf16")),
#endif
#if defined(LOZO_HAVE_avx512)
    LOZO_ISA_ENTRY(avx512, LOZO_CPU_AVX512),
#endif
#if defined(LOZO_HAVE_avx2)
    LOZO_ISA_ENTRY(avx2, LOZO_CPU("avx2") && LOZO_CPU("fma") && LOZO_CPU("f16c")),
#endif
    LOZO_ISA_ENTRY(portable, true),
};

const Isa *find(const char *name) {
  for (const Isa &isa : kIsas)
    if ((name == nullptr || strcmp(name, isa.name) == 0) && isa.supported()) return &isa;
  return nullptr;
}

std::atomic<const Isa *> chosen{nullptr};

const Isa &current() {
  const Isa *isa = chosen.load(std::memory_order_acquire);
  if (!isa) {
    isa = find(nullptr);
    chosen.store(isa, std::memory_order_release);
  }
  return *isa;
}

}  // namespace

extern "C" {

int lozo_cpu_lowrank_update(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  if (!lozo::valid_call(tensors, count, call, true)) return LOZO_BAD_ARGUMENT;
  return current().lowrank_update(tensors, count, call);
}

int lozo_cpu_dense_update(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  if (!lozo::valid_call(tensors, count, call, false)) return LOZO_BAD_ARGUMENT;
  return current().dense_update(tensors, count, call);
}

int lozo_cpu_lowrank_momentum(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  if (!lozo::valid_call(tensors, count, call, true)) return LOZO_BAD_ARGUMENT;
  return current().lowrank_momentum(tensors, count, call);
}

int lozo_cpu_dense_momentum(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  if (!lozo::valid_call(tensors, count, call, false)) return LOZO_BAD_ARGUMENT;
  return current().dense_momentum(tensors, count, call);
}

int lozo_cpu_resample(const lozo_tensor *tensors, int64_t count, const lozo_call *call, int64_t reproject) {
  if (!lozo::valid_call(tensors, count, call, true)) return LOZO_BAD_ARGUMENT;
  return current().resample(tensors, count, call, reproject);
}

int lozo_cpu_factor_update(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  if (!lozo::valid_call(tensors, count, call, false) || !lozo::are_factors(tensors, count)) return LOZO_BAD_ARGUMENT;
  return current().factor_update(tensors, count, call);
}

int lozo_cpu_lowrank_merge(const lozo_tensor *tensors, int64_t count, const lozo_call *call, const lozo_tensor *out) {
  if (!lozo::valid_call(tensors, count, call, true) || call->num_draws > 1) return LOZO_BAD_ARGUMENT;
  return current().lowrank_merge(tensors, count, call, out);
}

int lozo_cpu_dense_merge(const lozo_tensor *tensors, int64_t count, const lozo_call *call, const lozo_tensor *out) {
  if (!lozo::valid_call(tensors, count, call, false) || call->num_draws > 1) return LOZO_BAD_ARGUMENT;
  return current().dense_merge(tensors, count, call, out);
}

int lozo_cpu_lowrank_linear(const lozo_skinny *call) {
  if (!lozo::valid_skinny(call) || !lozo::is_dtype(call->x_dtype)) return LOZO_BAD_ARGUMENT;
  return current().lowrank_linear(call);
}

int lozo_cpu_lowrank_embedding(const lozo_skinny *call) {
  if (!lozo::valid_skinny(call) || (call->x_dtype != 4 && call->x_dtype != 8)) return LOZO_BAD_ARGUMENT;
  return current().lowrank_embedding(call);
}

int lozo_cpu_factor(const lozo_factor *factor, float *out) {
  if (factor->rank < 1 || factor->rank > LOZO_MAX_RANK || factor->rows < 0) return LOZO_BAD_ARGUMENT;
  current().factor(factor, out);
  return LOZO_OK;
}

int64_t lozo_abi_version(void) { return LOZO_ABI_VERSION; }

const char *lozo_isa_list(void) {
  return
#if defined(LOZO_HAVE_avx512_bf16)
      "avx512_bf16 "
#endif
#if defined(LOZO_HAVE_avx512)
      "avx512 "
#endif
#if defined(LOZO_HAVE_avx2)
      "avx2 "
#endif
      "portable";
}

int lozo_isa_supported(const char *name) { return name != nullptr && find(name) != nullptr; }

const char *lozo_isa_name(void) { return current().name; }

int lozo_set_isa(const char *name) {
  const Isa *isa = find(name);
  if (!isa) return LOZO_NO_ISA;
  chosen.store(isa, std::memory_order_release);
  return LOZO_OK;
}

}  // extern "C"
