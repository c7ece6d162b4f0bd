#include "emulator.h"

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <vector>

dim3 threadIdx, blockIdx;

namespace emulator {
namespace {

constexpr int kLanes = 32, kMaxThreads = 1024, kWords = 16;
constexpr size_t kStack = 1 << 18;

// Where some fibers meet: the last to come lets all of them pass.
struct Meeting {
  int expected, here, generation, instruction;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};

struct Warp {
  Meeting meeting;
  uint32_t words[2][kLanes][kWords];  // in turn, as a lane may bring its next while others read the last
};

Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / kLanes];
Meeting block;
ucontext_t scheduler;
const std::function<void()> *body;
int current;
bool progress, reversed;

char failure[200];

void note_failure(const char *what) {
  snprintf(failure, sizeof failure, "emulator: block %u, thread %u: %s", blockIdx.x, threadIdx.x, what);
}

// Ends the launch: this fiber and all others are never run again.
[[noreturn]] void fail(const char *what) {
  note_failure(what);
  setcontext(&scheduler);
  abort();
}

void fiber_main() {
  (*body)();
  fibers[current].done = true;
  progress = true;
  swapcontext(&fibers[current].context, &scheduler);
}

void meet(Meeting &m, int instruction) {
  if (m.here == 0) m.instruction = instruction;
  if (m.instruction != instruction) fail("another instruction than the other threads");
  progress = true;
  const int generation = m.generation;
  if (++m.here == m.expected) {
    m.here = 0;
    ++m.generation;
    return;
  }
  while (m.generation == generation) swapcontext(&fibers[current].context, &scheduler);
}

struct Range {
  const char *begin, *end;
  bool writable;
};
std::vector<Range> ranges;

void run_block(int threads) {
  for (int t = 0; t < threads; ++t) {
    Fiber &f = fibers[t];
    if (!f.stack) f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    f.done = false;
    makecontext(&f.context, fiber_main, 0);
  }
  block = {threads, 0, 0, 0};
  for (int w = 0; w < threads / kLanes; ++w) warps[w].meeting = {kLanes, 0, 0, 0};
  for (int left = threads; left > 0;) {
    progress = false;
    for (int i = 0; i < threads; ++i) {
      current = reversed ? threads - 1 - i : i;
      if (fibers[current].done) continue;
      threadIdx = {(unsigned)current, 0, 0};
      swapcontext(&scheduler, &fibers[current].context);
      if (failure[0]) return;
      left -= fibers[current].done;
    }
    if (!progress) return note_failure("waits for threads that never come");
  }
}

}  // namespace

int run_grid(int64_t blocks, int threads, const std::function<void()> &kernel) {
  failure[0] = 0;
  if (threads > kMaxThreads || threads % kLanes) note_failure("an unsupported block size");
  body = &kernel;
  for (int64_t i = 0; i < blocks && !failure[0]; ++i) {
    blockIdx = {(unsigned)(reversed ? blocks - 1 - i : i), 0, 0};
    run_block(threads);
  }
  return failure[0] != 0;
}

const char *last_failure() { return failure; }

void wait_for_block() { meet(block, 0); }

int lane() { return current % kLanes; }

const uint32_t (*exchange(const uint32_t *words, int count, int instruction))[16] {
  Warp &w = warps[current / kLanes];
  uint32_t (*slot)[kWords] = w.words[w.meeting.generation % 2];
  memcpy(slot[lane()], words, count * sizeof *words);
  meet(w.meeting, instruction);
  return slot;
}

void check_access(const void *p, int64_t bytes, bool write) {
  if ((uintptr_t)p % (size_t)bytes) fail("a misaligned access");
  if (ranges.empty()) return;
  for (const Range &r : ranges)
    if (r.begin <= (const char *)p && (const char *)p + bytes <= r.end && (r.writable || !write)) return;
  fail(write ? "a store outside the tensors" : "a load outside the tensors");
}

float f16_to_float(uint16_t bits) {
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                : exponent     ? ldexpf((float)(1024 + fraction), (int)exponent - 25)
                               : ldexpf((float)fraction, -24);
  return bits >> 15 ? -value : value;
}

uint16_t float_to_f16(float value) {
  const uint16_t sign = signbit(value) ? 0x8000 : 0;
  const double magnitude = fabs((double)value);
  if (isnan(value)) return 0x7fff;
  if (magnitude >= 65520.0) return sign | 0x7c00;
  int exponent;
  frexp(magnitude, &exponent);
  const int unit = magnitude < 0x1p-14 ? -24 : exponent - 11;
  // In the default mode nearbyint rounds ties to even, and carries into the exponent by itself.
  const uint32_t steps = (uint32_t)nearbyint(ldexp(magnitude, -unit));
  return sign | (uint16_t)(unit == -24 ? steps : ((uint32_t)(unit + 24) << 10) + steps);
}

uint16_t float_to_bf16(float value) {
  uint32_t u;
  memcpy(&u, &value, sizeof u);
  if (isnan(value)) return 0x7fff;
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace emulator

namespace {

enum { kMma = 1 };

float half_of(uint32_t pair, int which) { return emulator::f16_to_float((uint16_t)(which ? pair >> 16 : pair)); }

}  // namespace

// The layouts of the PTX manual: A[row][k] is in lane 4 * (row % 8) + k / 2 % 4, register row / 8 + 2 * (k / 8), half k % 2;
// B[k][col] in lane 4 * col + k / 2 % 4, register k / 8, half k % 2; C[row][col] in lane 4 * (row % 8) + col / 2.
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const uint32_t (*all)[16] = emulator::exchange(words, 6, kMma);
  const int lane = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), col = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t pair_a = all[4 * (row % 8) + k / 2 % 4][row / 8 + 2 * (k / 8)];
      const uint32_t pair_b = all[4 * col + k / 2 % 4][4 + k / 8];
      sum += (double)half_of(pair_a, k % 2) * half_of(pair_b, k % 2);
    }
    c[i] = (float)sum;
  }
}

extern "C" {

// Threads and blocks from the last to the first: results must not depend on it.
__attribute__((visibility("default"))) void emulator_reverse(int reverse) { emulator::reversed = reverse != 0; }

// From the first call on, the kernels may access tensors only where this said.
__attribute__((visibility("default"))) void emulator_allow(const void *begin, int64_t bytes, int writable) {
  emulator::ranges.push_back({(const char *)begin, (const char *)begin + bytes, writable != 0});
}
__attribute__((visibility("default"))) void emulator_allow_all(void) { emulator::ranges.clear(); }
}
