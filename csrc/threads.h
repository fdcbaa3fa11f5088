// Dynamic scheduling of independent tasks over the threads of the process's OpenMP runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "api.h"

void set_parallel(LkParallel parallel);

// Calls task(i, scratch) for i in 0 .. count - 1, in this order but in up to num_threads threads;
// each thread has scratch_size aligned bytes. False if memory ran out.
bool parallel_for(int64_t count, int num_threads, size_t scratch_size,
                  const std::function<void(int64_t, void*)>& task);
