// What the library reports about itself, and the messages of its statuses.
#include "launch.h"

namespace lozo {

// A kernel that is never launched: if a device has code for it, it has code for all of them.
static __global__ void probe(const Launch) {}

}  // namespace lozo

int64_t lozo_cuda_abi_version(void) { return LOZO_CUDA_ABI_VERSION; }

const char *lozo_cuda_architectures(void) { return LOZO_CUDA_ARCHITECTURES; }

int lozo_cuda_probe(int64_t device) {
  const int error = probe_kernel(lozo::probe, device);
  return error ? LOZO_CUDA_ERROR + error : LOZO_OK;
}

const char *lozo_cuda_message(int status) {
  if (status >= LOZO_CUDA_ERROR) return error_message(status - LOZO_CUDA_ERROR);
  return status == LOZO_BAD_ARGUMENT ? "the library rejected the arguments" : "success";
}
