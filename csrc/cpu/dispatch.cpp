// The exported functions, and the choice of the instruction set that serves them.
#include <string.h>

#include <atomic>

#include "ops.h"
#include "tiles.h"

namespace lozo {
namespace {

struct Ops {
#define LOZO_MEMBER(name, v, valid) int (*name)(const lozo_tensor *, int64_t, const lozo_call *);
  LOZO_TABLE_OPS(LOZO_MEMBER)
#undef LOZO_MEMBER
  int (*lowrank_linear)(const lozo_skinny *);
  int (*lowrank_embedding)(const lozo_skinny *);
  int (*lowrank_points)(const lozo_points *);
  void (*factor)(const lozo_factor *, float *);
};

}  // namespace

#define LOZO_ENTRY(name, v, valid) name,
#define LOZO_OPS_OF(isa)                                                                                   \
  namespace isa {                                                                                          \
  const Ops kOps = {LOZO_TABLE_OPS(LOZO_ENTRY) lowrank_linear, lowrank_embedding, lowrank_points, factor}; \
  }
#if defined(LOZO_HAVE_avx512_bf16)
LOZO_OPS_OF(avx512_bf16)
#endif
#if defined(LOZO_HAVE_avx512)
LOZO_OPS_OF(avx512)
#endif
#if defined(LOZO_HAVE_avx2)
LOZO_OPS_OF(avx2)
#endif
#if defined(LOZO_HAVE_neon)
LOZO_OPS_OF(neon)
#endif
LOZO_OPS_OF(portable)
#undef LOZO_OPS_OF
#undef LOZO_ENTRY

}  // namespace lozo

namespace {

struct Isa {
  const char *name;
  bool (*supported)();
  const lozo::Ops *ops;
};

#define LOZO_ISA_ENTRY(isa, supported) {#isa, [] { return bool(supported); }, &lozo::isa::kOps}
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
#if defined(LOZO_HAVE_neon)
    LOZO_ISA_ENTRY(neon, true),
#endif
    LOZO_ISA_ENTRY(portable, true),
};

const Isa *find(const char *name) {
  for (const Isa &isa : kIsas)
    if ((name == nullptr || strcmp(name, isa.name) == 0) && isa.supported()) return &isa;
  return nullptr;
}

std::atomic<const Isa *> chosen{nullptr};

const Isa &current_isa() {
  const Isa *isa = chosen.load(std::memory_order_acquire);
  if (!isa) {
    isa = find(nullptr);
    chosen.store(isa, std::memory_order_release);
  }
  return *isa;
}

const lozo::Ops &current() { return *current_isa().ops; }

}  // namespace

extern "C" {

#define LOZO_EXPORTED(name, v, valid)                                                                                 \
  LOZO_EXPORT int lozo_cpu_##name(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {                 \
    using namespace lozo;                                                                                             \
    return valid_call(tensors, count, call, v) && (valid) ? current().name(tensors, count, call) : LOZO_BAD_ARGUMENT; \
  }
LOZO_TABLE_OPS(LOZO_EXPORTED)
#undef LOZO_EXPORTED

int lozo_cpu_lowrank_linear(const lozo_skinny *call) {
  if (!lozo::valid_skinny(call) || !lozo::is_dtype(call->x_dtype)) return LOZO_BAD_ARGUMENT;
  return current().lowrank_linear(call);
}

int lozo_cpu_lowrank_embedding(const lozo_skinny *call) {
  if (!lozo::valid_skinny(call) || (call->x_dtype != 4 && call->x_dtype != 8)) return LOZO_BAD_ARGUMENT;
  return current().lowrank_embedding(call);
}

int lozo_cpu_lowrank_points(const lozo_points *call) {
  if (!lozo::valid_points(call)) return LOZO_BAD_ARGUMENT;
  return current().lowrank_points(call);
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
#if defined(LOZO_HAVE_neon)
      "neon "
#endif
      "portable";
}

int lozo_isa_supported(const char *name) { return name != nullptr && find(name) != nullptr; }

const char *lozo_isa_name(void) { return current_isa().name; }

int lozo_set_isa(const char *name) {
  const Isa *isa = find(name);
  if (!isa) return LOZO_NO_ISA;
  chosen.store(isa, std::memory_order_release);
  return LOZO_OK;
}

}  // extern "C"
