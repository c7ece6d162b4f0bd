#include "threads.h"

#include "lozo/abi.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace lozo {
namespace {

using Body = void (*)(void *, char *);

// torch.set_flush_denormal and other libraries change how this thread treats denormals; the promised bits need the default.
class [[maybe_unused]] DefaultFloatingPoint {
#if defined(__x86_64__) || defined(__i386__)
 public:
  DefaultFloatingPoint() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatingPoint() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  DefaultFloatingPoint() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~DefaultFloatingPoint() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer &) = delete;
  ~Buffer() { free(data_); }
  bool reserve(size_t size) {
    if (size <= size_) return true;
    free(data_);
    size_ = 0;
    void *p = nullptr;
    data_ = posix_memalign(&p, 64, size) == 0 ? static_cast<char *>(p) : nullptr;
    if (data_) size_ = size;
    return data_ != nullptr;
  }
  char *data() const { return data_; }

 private:
  char *data_ = nullptr;
  size_t size_ = 0;
};

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Some 20 microseconds, the time between two ops of one step; a wake-up would cost more.
constexpr int kSpins = 400;

constexpr int kMaxThreads = 256;

class Team {
 public:
  // Only one caller at a time uses the workers.
  std::mutex busy;

  void run(int threads, size_t scratch_bytes, Body body, void *context, char *scratch) {
    while (workers_ + 1 < threads && start_worker()) {
    }
    if (threads > workers_ + 1) threads = workers_ + 1;
    body_ = body;
    context_ = context;
    scratch_ = scratch;
    scratch_bytes_ = scratch_bytes;
    running_.store(threads - 1, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      wanted_ = threads - 1;
      job_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    {
      DefaultFloatingPoint environment;
      body(context, scratch);
    }
    for (int spin = 0; running_.load(std::memory_order_acquire) > 0 && spin < kSpins; ++spin) pause_briefly();
    if (running_.load(std::memory_order_acquire) > 0) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [this] { return running_.load(std::memory_order_acquire) == 0; });
    }
  }

 private:
  bool start_worker() {
    // Signals go to the threads that Python knows.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = true;
    try {
      std::thread(&Team::work, this, workers_ + 1, job_.load(std::memory_order_relaxed)).detach();
      ++workers_;
    } catch (...) {
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  void work(int slot, uint64_t seen) {
    DefaultFloatingPoint environment;
    for (;;) {
      for (int spin = 0; job_.load(std::memory_order_acquire) == seen && spin < kSpins; ++spin) pause_briefly();
      bool mine;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return job_.load(std::memory_order_relaxed) != seen; });
        seen = job_.load(std::memory_order_relaxed);
        mine = slot <= wanted_;
      }
      if (!mine) continue;
      body_(context_, scratch_ + slot * scratch_bytes_);
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> job_{0};
  std::atomic<int> running_{0};
  int wanted_ = 0;
  int workers_ = 0;
  Body body_ = nullptr;
  void *context_ = nullptr;
  char *scratch_ = nullptr;
  size_t scratch_bytes_ = 0;
};

// Never destroyed: workers may outlive main(). A forked child has no workers, so it forgets the team and makes its own.
std::atomic<Team *> team{nullptr};

// GOMP_parallel of the OpenMP runtime at hand, or null. Its threads do not survive a fork either, and it would wait for them.
using Parallel = void (*)(void (*function)(void *), void *data, unsigned threads, unsigned flags);
std::atomic<Parallel> openmp{nullptr};

void forget_threads_in_children() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    team.store(nullptr);
    openmp.store(nullptr);
  });
  (void)registered;
}

Team &current_team() {
  Team *existing = team.load();
  if (existing) return *existing;
  Team *made = new Team;
  if (team.compare_exchange_strong(existing, made)) return *made;
  delete made;
  return *existing;
}

struct Region {
  Body body;
  void *context;
  char *scratch;
  size_t scratch_bytes;
  std::atomic<int> slot{0};
};

void run_region(void *data) {
  Region &region = *static_cast<Region *>(data);
  DefaultFloatingPoint environment;
  region.body(region.context, region.scratch + region.slot.fetch_add(1) * region.scratch_bytes);
}

}  // namespace

bool run_on_team(int64_t threads, size_t scratch_bytes, Body body, void *context) {
  static thread_local Buffer buffer;
  forget_threads_in_children();
  threads = threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads;
  scratch_bytes = (scratch_bytes + 63) / 64 * 64;
  if (!buffer.reserve(threads * scratch_bytes)) return false;
  const Parallel parallel = openmp.load();
  if (parallel && threads > 1) {
    Region region{body, context, buffer.data(), scratch_bytes};
    parallel(run_region, &region, (unsigned)threads, 0);
    return true;
  }
  if (threads > 1) {
    Team &t = current_team();
    std::unique_lock<std::mutex> lock(t.busy, std::try_to_lock);
    if (lock.owns_lock()) {
      t.run((int)threads, scratch_bytes, body, context, buffer.data());
      return true;
    }
  }
  DefaultFloatingPoint environment;
  body(context, buffer.data());
  return true;
}

namespace {

struct Items {
  int64_t count;
  void (*body)(int64_t, char *, const void *);
  const void *context;
  std::atomic<int64_t> next{0};
};

void take_items(void *context, char *scratch) {
  Items &items = *static_cast<Items *>(context);
  for (;;) {
    const int64_t number = items.next.fetch_add(1, std::memory_order_relaxed);
    if (number >= items.count) return;
    items.body(number, scratch, items.context);
  }
}

}  // namespace

bool share_out(int64_t items, int64_t threads, size_t scratch_bytes, void (*body)(int64_t, char *, const void *),
               const void *context) {
  Items all{items, body, context};
  return run_on_team(threads < items ? threads : items, scratch_bytes, take_items, &all);
}

char *shared_scratch(size_t bytes) {
  static thread_local Buffer buffer;
  return buffer.reserve(bytes) ? buffer.data() : nullptr;
}

}  // namespace lozo

extern "C" void lozo_use_openmp(void *gomp_parallel) { lozo::openmp.store(reinterpret_cast<lozo::Parallel>(gomp_parallel)); }
