// How the backward pass of attention is cut into tasks. The cut depends on the problem only,
// never on the number of threads, so that results do not either.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"

struct BackwardPlan {
  std::vector<BackwardTask> tasks;
  std::vector<size_t> order;  // of the tasks, heaviest first
  // Tasks groups[i] .. groups[i + 1] - 1 are those of one (row, kv head), in query order.
  std::vector<size_t> groups;
  std::vector<std::vector<int32_t>> shared;  // what the tasks' pointers point into
  std::unique_ptr<char[]> accumulators;
};

// `sum_size` is the size of the numbers that dK and dV are summed in; `in_place` says that dk and
// dv have them too. May throw std::bad_alloc.
BackwardPlan plan_backward(const LkAttention& args, size_t sum_size, bool in_place);
