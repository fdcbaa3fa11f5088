// How the backward pass of attention is cut into tasks. The cut depends on the problem only,
// never on the number of threads, so that results do not either.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"

// Tasks tasks[begin .. end - 1] share the keys key_begin .. key_end - 1, which no other task has.
struct SharedKeys {
  size_t begin, end;
  int64_t key_begin, key_end;
};

struct BackwardPlan {
  std::vector<BackwardTask> tasks;
  std::vector<size_t> order;       // of the tasks, heaviest first
  std::vector<SharedKeys> shared;  // to be reduced when all tasks are done
  std::unique_ptr<char[]> accumulators;
};

// `sum_size` is the size of the numbers that dK and dV are summed in; `in_place` says that dk and
// dv have them too. Tasks get accumulators only where they share keys. May throw std::bad_alloc.
BackwardPlan plan_backward(const LkAttention& args, size_t sum_size, bool in_place);
