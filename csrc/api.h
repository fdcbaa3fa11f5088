// The plain C interface of the library, called from Python through ctypes.
#pragma once

#include <cstdint>

#define LK_EXPORT __attribute__((visibility("default")))

extern "C" {

enum LkDtype : int32_t { LK_FLOAT32 = 0, LK_FLOAT64 = 1, LK_BFLOAT16 = 2, LK_FLOAT16 = 3 };
enum LkMetric : int32_t { LK_COSINE = 0, LK_L2 = 1, LK_MSE = 2 };
enum LkReduction : int32_t { LK_NONE = 0, LK_SUM = 1, LK_MEAN = 2 };
enum LkStatus : int32_t {
  LK_OK = 0,
  LK_OUT_OF_MEMORY = 1,
  LK_OUT_OF_RANGE = 2,
  LK_BAD_SCHEDULE = 3
};

// (batch, heads, seq, dim) with unit stride in dim; strides count elements.
struct LkTensor {
  void* data;
  int64_t batch_stride, head_stride, seq_stride;
};

// One attention over a block mask. `lse`, `delta`, `sinks` and `dsinks` are float32, or float64
// for float64 tensors. The backward pass writes every field from `dq` on.
struct LkAttention {
  int64_t batch, heads, kv_heads, seq, dim;
  int64_t block_m, block_n, kv_indices_stride;
  const int32_t *visible_until, *kv_offsets, *kv_full_start, *kv_indices;
  const int32_t* positions;  // (batch, seq), null without a window
  int64_t window;            // 0: none
  double softcap;            // 0: none
  double scale;
  int32_t full_is_full;  // full tiles need no window mask either
  int32_t dtype;
  int32_t isa;  // index into the list of lk_isa_name
  int32_t num_threads;
  const void* sinks;  // (heads,), null for none
  LkTensor q, k, v, out;
  void* lse;  // (batch, heads, seq) contiguous
  LkTensor dout, dq, dk, dv;
  void* delta;   // (batch, heads, seq) contiguous, only with sinks
  void* dsinks;  // (heads,), only with sinks
};

// Pairs of rows of hidden (batch, seq, dim): their distance, and the rows themselves scaled to
// length 1, the "views". What is neither `hidden` nor `dhidden` is contiguous float32, or float64
// for float64 `hidden`. A pair of -1 is padding.
struct LkPairs {
  int64_t batch, seq, dim, num_pairs;
  int64_t hidden_batch_stride, hidden_seq_stride;
  const void* hidden;
  const int64_t* pairs;  // (batch, num_pairs, 2) contiguous
  void* dhidden;         // contiguous; written completely by the backward passes
  int32_t dtype, isa, num_threads;
  int32_t metric, reduction;
  void* stats;  // (batch, num_pairs, 3)
  void* loss;   // (batch, num_pairs) for LK_NONE, else the sum or mean of it
  const void* ddistance;
  void *views, *squares;  // (2, batch, num_pairs, dim), and the squared norm of each row
  const void* dviews;
  void* dots;  // like `squares`, to compute in
};

// Vectors of tubes: vector i is the sum of hidden[end] - hidden[start] over its steps. `vectors` and
// `dvectors` are contiguous float32, or float64 for float64 `hidden`. A step of -1 is none.
struct LkTubes {
  int64_t batch, seq, dim, num_vectors;
  int64_t hidden_batch_stride, hidden_seq_stride;
  const void* hidden;
  const int64_t* tubes;  // (batch, num_vectors, 3 steps, start and end) contiguous
  void* dhidden;         // contiguous; written completely by the backward pass
  int32_t dtype, isa, num_threads;
  void* vectors;  // (batch, num_vectors, dim)
  const void* dvectors;
};

// fn(data) in up to num_threads threads at once, as GOMP_parallel does.
typedef void (*LkParallel)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);

// Takes the threads from an OpenMP runtime that the process has already loaded.
LK_EXPORT void lk_set_parallel(LkParallel parallel);
// Size of each structure, by which the caller sees that both mean the same.
LK_EXPORT int64_t lk_attention_size();
LK_EXPORT int64_t lk_pairs_size();
LK_EXPORT int64_t lk_tubes_size();
// The digest of csrc/ that setup.py compiled it from.
LK_EXPORT const char* lk_sources();
// Has lk_isa_name, if it was not called yet, give "amx" too, and asks Linux for its use.
LK_EXPORT void lk_ask_for_amx();
// Instruction sets this library was built for and this machine has, best first; null at the end.
LK_EXPORT const char* lk_isa_name(int32_t index);

// Both check visible_until and the lists first, see schedule.h.
LK_EXPORT int32_t lk_attention_forward(const LkAttention* args);
LK_EXPORT int32_t lk_attention_backward(const LkAttention* args);
// The forward passes check the indices first.
LK_EXPORT int32_t lk_distance_forward(const LkPairs* args);
LK_EXPORT int32_t lk_distance_backward(const LkPairs* args);
LK_EXPORT int32_t lk_views_forward(const LkPairs* args);
LK_EXPORT int32_t lk_views_backward(const LkPairs* args);
LK_EXPORT int32_t lk_tubes_forward(const LkTubes* args);
LK_EXPORT int32_t lk_tubes_backward(const LkTubes* args);
}
