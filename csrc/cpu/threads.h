// The threads that share a call: those of the OpenMP runtime that lozo_use_openmp named, else a team of our own.
#ifndef LOZO_THREADS_H
#define LOZO_THREADS_H

#include <stddef.h>
#include <stdint.h>

namespace lozo {

// Runs body(context, scratch) on up to ``threads`` threads at once, one of which is the caller. Each has ``scratch_bytes`` of
// memory of its own on a cache line, and the default floating-point environment. The body shares out the work itself: it must be
// right for any number of threads. Returns false, having run nothing, if there is no memory.
bool run_on_team(int64_t threads, size_t scratch_bytes, void (*body)(void *context, char *scratch), void *context);

// Runs body(number, scratch, context) for every number below ``items``, in any order, on up to ``threads`` threads as above.
bool share_out(int64_t items, int64_t threads, size_t scratch_bytes,
               void (*body)(int64_t number, char *scratch, const void *context), const void *context);

// Memory on a cache line that all threads of a call share. It is valid until the calling thread asks again. NULL if there is none.
char *shared_scratch(size_t bytes);

}  // namespace lozo

#endif
