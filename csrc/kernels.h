// What api.cpp asks of the kernels, which are compiled once per instruction set.
#pragma once

#include <cstddef>

#include "api.h"

// A range of queries of one (row, kv head) whose backward pass runs in one thread.
//
// dK and dV of the `shared` keys (ascending) are summed in `accumulators`: a row of `dim` numbers
// of the compute type for dK of each, then for dV. These are all keys before query_begin that the
// range sees and, unless the kernels sum in place, those of its own that later queries see. Of its
// other own keys nobody else has a share.
struct BackwardTask {
  int64_t row, kv_head, query_begin, query_end;
  const int32_t* shared;
  int64_t num_shared;
  void* accumulators;
};

constexpr int64_t kReduceKeys = 64;

struct AttentionKernels {
  size_t sum_size;  // of a number that dK and dV are summed in
  bool in_place;    // whether dk and dv hold such numbers
  // Bytes of scratch a thread needs; for tasks of at most `queries`.
  size_t (*forward_scratch)(const LkAttention&);
  size_t (*backward_scratch)(const LkAttention&, int64_t queries);
  // How many queries forward() takes best at once.
  int64_t (*forward_queries)(const LkAttention&);
  // Some queries, all heads that share a kv head.
  void (*forward)(const LkAttention&, int64_t row, int64_t kv_head, int64_t query_begin,
                  int64_t query_end, void* scratch);
  void (*backward)(const LkAttention&, const BackwardTask&, void* scratch);
  // Sums the accumulators of the tasks of a (row, kv head) into dk and dv of its keys begin ..
  // end - 1, at most kReduceKeys, in the order of the tasks.
  void (*reduce)(const LkAttention&, const BackwardTask* tasks, int64_t num_tasks, int64_t begin,
                 int64_t end, void* scratch);
  size_t (*reduce_scratch)(const LkAttention&);
  void (*sinks)(const LkAttention&, int64_t head);
};

// A slot is one side of a pair, 2 * pair + side. The backward passes write the gradient row that
// `first_slot` and the slots linked after it point at.
struct PairKernels {
  void (*distance_forward)(const LkPairs&, int64_t pair);
  void (*distance_reduce)(const LkPairs&);
  void (*distance_backward)(const LkPairs&, const int64_t* next, int64_t first_slot);
  void (*views_forward)(const LkPairs&, int64_t slot);
  void (*views_dot)(const LkPairs&, int64_t slot);
  void (*views_backward)(const LkPairs&, const int64_t* next, int64_t first_slot);
};

constexpr int kTubeSlots = 6;  // of a vector: the two ends of each of its three steps

struct TubeKernels {
  void (*forward)(const LkTubes&, int64_t index);
  void (*backward)(const LkTubes&, const int64_t* next, int64_t first_slot);
};

// One table per instruction set, indexed by LkDtype.
struct KernelTable {
  AttentionKernels attention[4];
  PairKernels pairs[4];
  TubeKernels tubes[4];
};
