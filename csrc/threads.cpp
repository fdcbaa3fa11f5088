#include "threads.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// Linking an OpenMP runtime would bring a second one into the process next to torch's, with its
// own pool of threads fighting for the same cores. So none is linked: cpu.py finds GOMP_parallel
// in the runtime that torch has loaded (libgomp; libomp and libiomp5 export it too) and gives it
// to us. Without one, threads are started per call.
void start_threads(void (*fn)(void*), void* data, unsigned num_threads, unsigned) {
  std::vector<std::thread> threads;
  try {
    for (unsigned i = 1; i < num_threads; ++i) threads.emplace_back(fn, data);
  } catch (const std::system_error&) {
    // Those that did start, and this one, do the work.
  }
  fn(data);
  for (std::thread& thread : threads) thread.join();
}

std::atomic<LkParallel> parallel{start_threads};

// Memory of a thread that outlives the call, since fresh pages cost more than small kernels do.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* reserve(size_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = (size + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, size_);
      if (!data_) size_ = 0;
    }
    return data_;
  }
  // Keeps no more than tiles need.
  void trim() {
    if (size_ <= size_t{4} << 20) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

struct Region {
  int64_t count;
  size_t scratch_size;
  const std::function<void(int64_t, void*)>* task;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  void work() {
    thread_local Scratch scratch;
    int64_t i = next++;
    if (i >= count) return;
    void* memory = scratch_size ? scratch.reserve(scratch_size) : nullptr;
    if (scratch_size && !memory) {
      failed = true;
      return;
    }
    for (; i < count; i = next++) (*task)(i, memory);
    scratch.trim();
  }
};

}  // namespace

void set_parallel(LkParallel fn) { parallel = fn ? fn : start_threads; }

bool parallel_for(int64_t count, int num_threads, size_t scratch_size,
                  const std::function<void(int64_t, void*)>& task) {
  Region region{count, scratch_size, &task};
  if (num_threads > count) num_threads = static_cast<int>(count);
  if (num_threads <= 1) {
    region.work();
  } else {
    parallel.load()([](void* data) { static_cast<Region*>(data)->work(); }, &region,
                    static_cast<unsigned>(num_threads), 0);
  }
  return !region.failed;
}
