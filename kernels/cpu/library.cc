// The library's own few functions: the kernel tables, memory, and the thread pool. Compiled once, for every CPU.
#include "abi.h"
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <vector>

namespace sdxl {

static Entry *first_entry = nullptr;

void add_entry(Entry *entry) {
  entry->next = first_entry;
  first_entry = entry;
}

namespace {

// A spin that lasts gives its core to whoever waits for one, who may be the very thread that is waited for: at every 512th turn, some 10
// us, as giving way takes longer than small kernels wait (measured: at every 64th it took them 2 us more).
constexpr int PATIENCE = 512;

// What a core does while it spins: leaves more of itself to the thread beside it.
inline void relax(int spin) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
  if (spin % PATIENCE == PATIENCE - 1) std::this_thread::yield();
}

int requested_threads = 0;

int hardware_threads() {
  // Asked once: the answer comes from a file, which takes as long as a small kernel.
  static const int found = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return found;
}

// The ranges in as many equal shares as threads. A thread first takes its own, which are the same ones in the next kernel
// over as many rows, so that it finds them in its cache; then what others have left.
struct Job {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  static constexpr int MOST = 64; // threads beyond begin with another's share
  void (*body)(void *, int64_t, int64_t);
  void *context;
  int64_t count, grain;
  int shares;
  Share share[MOST];
  std::atomic<int> running{0};

  Job(void (*body)(void *, int64_t, int64_t), void *context, int64_t count, int64_t grain, int threads)
      : body(body), context(context), count(count), grain(grain), shares(std::min(threads, MOST)) {
    const int64_t ranges = (count + grain - 1) / grain;
    for (int i = 0; i < shares; i++) {
      share[i].next.store(ranges * i / shares * grain, std::memory_order_relaxed);
      share[i].end = std::min(count, ranges * (i + 1) / shares * grain);
    }
  }
  void work(int thread) {
    for (int i = 0; i < shares; i++) {
      Share &from = share[(thread + i) % shares];
      for (int64_t begin; (begin = from.next.fetch_add(grain)) < from.end;) body(context, begin, std::min(begin + grain, from.end));
    }
  }
};

// Workers spin briefly before they sleep: consecutive kernels arrive within microseconds of each other.
class Pool {
public:
  // A system that gives no more threads (a container's limit, too little memory for a stack) leaves the work to those that are there.
  explicit Pool(int workers) {
    try {
      for (int i = 0; i < workers; i++) std::thread([this, i] { work(i + 1); }).detach();
    } catch (const std::system_error &) {
    }
  }

  void run(Job &job, int helpers) {
    std::lock_guard<std::mutex> one_at_a_time(entry);
    {
      std::lock_guard<std::mutex> lock(mutex);
      job.running.store(helpers);
      current = &job;
      places = helpers;
      generation.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    job.work(0);
    {
      // All ranges are taken: a helper that the system has not woken by now is not waited for.
      std::lock_guard<std::mutex> lock(mutex);
      job.running.fetch_sub(places);
      places = 0;
    }
    for (int spin = 0; job.running.load(std::memory_order_acquire) > 0; spin = (spin + 1) % PATIENCE) relax(spin);
  }

private:
  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < 20000 && generation.load(std::memory_order_acquire) == seen; spin++) relax(spin);
      Job *job = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return generation.load() != seen; });
        seen = generation.load();
        if (places > 0) {
          places--;
          job = current;
        }
      }
      if (job == nullptr) continue;
      job->work(thread);
      job->running.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex entry, mutex;
  std::condition_variable wake;
  std::atomic<uint64_t> generation{0};
  Job *current = nullptr;
  int places = 0;
};

} // namespace

int thread_count() { return requested_threads > 0 ? requested_threads : hardware_threads(); }

void parallel_ranges(int64_t count, int64_t grain, void (*body)(void *, int64_t, int64_t), void *context) {
  if (count <= 0) return;
  if (grain < 1) grain = 1;
  const int64_t ranges = (count + grain - 1) / grain;
  // One worker fewer than cores, because the caller works too: more would only spin against it.
  static const int workers = hardware_threads() - 1;
  const int wanted = thread_count() - 1 < workers ? thread_count() - 1 : workers;
  const int helpers = static_cast<int>(ranges - 1 < wanted ? ranges - 1 : wanted);
  if (helpers <= 0) {
    for (int64_t begin = 0; begin < count; begin += grain) body(context, begin, begin + grain < count ? begin + grain : count);
    return;
  }
  // Never destroyed: detached workers may outlive static destruction at exit.
  static Pool *pool = new Pool(workers);
  Job job(body, context, count, grain, helpers + 1);
  pool->run(job, helpers);
}

} // namespace sdxl

using namespace sdxl;

static const char *best_arch() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return "avx2";
#endif
  return "portable";
}

extern "C" {

// The instruction set that this machine runs best: avx512 | avx2 | portable.
const char *sdxl_best_arch() { return best_arch(); }

// "symbol signature\n" for every kernel compiled for `arch`.
const char *sdxl_manifest(const char *arch) {
  static std::string text;
  text.clear();
  for (Entry *entry = first_entry; entry != nullptr; entry = entry->next)
    if (strcmp(entry->arch, arch) == 0) text.append(entry->symbol).append(" ").append(entry->signature).append("\n");
  return text.c_str();
}

void *sdxl_kernel(const char *arch, const char *symbol) {
  for (Entry *entry = first_entry; entry != nullptr; entry = entry->next)
    if (strcmp(entry->arch, arch) == 0 && strcmp(entry->symbol, symbol) == 0) return entry->function;
  return nullptr;
}

void sdxl_set_threads(int count) { requested_threads = count; }
int sdxl_threads() { return thread_count(); }

// 64-byte aligned memory, on huge pages where it is large enough to profit; null when there is none.
void *sdxl_alloc(int64_t bytes) {
  const size_t huge = size_t(2) << 20;
  const size_t alignment = size_t(bytes) >= huge ? huge : 64;
  void *memory = aligned_alloc(alignment, (size_t(bytes) + alignment - 1) / alignment * alignment);
  if (memory != nullptr && alignment == huge) madvise(memory, size_t(bytes), MADV_HUGEPAGE);
  return memory;
}

void sdxl_free(void *memory) { free(memory); }
void sdxl_copy(void *target, const void *source, int64_t bytes) { memcpy(target, source, size_t(bytes)); }
void sdxl_zero(void *target, int64_t bytes) { memset(target, 0, size_t(bytes)); }

// Fills memory from an open file, all threads at once; 0 where that failed, or the file ends before.
int sdxl_read(int fd, void *target, int64_t position, int64_t bytes) {
  std::atomic<int> whole{1};
  parallel_for(bytes, int64_t(1) << 20, [&](int64_t begin, int64_t end) {
    while (begin < end && whole) {
      const ssize_t got = pread(fd, static_cast<char *>(target) + begin, size_t(end - begin), position + begin);
      if (got > 0) begin += got;
      else if (got == 0 || errno != EINTR) whole = 0;
    }
  });
  return whole;
}
}
