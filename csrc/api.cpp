#include "api.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "amx.h"
#include "kernels.h"
#include "plan.h"
#include "schedule.h"
#include "threads.h"

#define LK_DECLARE(isa)            \
  namespace isa {                  \
  extern const KernelTable kTable; \
  }
#ifdef LK_WITH_AMX
namespace amx {
extern const AttentionKernels kBfloat16Attention;
}
#endif
#ifdef LK_WITH_AVX512BF16
namespace avx512bf16 {
extern const AttentionKernels kBfloat16Attention;
}
#endif
#ifdef LK_WITH_AVX512
LK_DECLARE(avx512)
#endif
#ifdef LK_WITH_AVX2
LK_DECLARE(avx2)
#endif
#ifdef LK_WITH_NEON
LK_DECLARE(neon)
#endif
LK_DECLARE(portable)

namespace {

struct Isa {
  const char* name;
  const KernelTable* table;
};

// On demand only: it has run in an emulator alone, and there are virtual machines that lose what is
// in tile registers when a thread is interrupted.
bool wants_amx = false;

// Built once; only what this machine has.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = [] {
    std::vector<Isa> found;
#ifdef LK_WITH_AVX2
    __builtin_cpu_init();  // which some compilers leave to the caller
#endif
#ifdef LK_WITH_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#ifdef LK_WITH_AVX512BF16
      const auto add = [&](const char* name, const AttentionKernels& kernels, KernelTable* table) {
        *table = avx512::kTable;
        table->attention[LK_BFLOAT16] = kernels;
        found.push_back({name, table});
      };
      if (__builtin_cpu_supports("avx512bf16")) {
#ifdef LK_WITH_AMX
        static KernelTable with_amx;
        if (wants_amx && may_use_amx()) add("amx", amx::kBfloat16Attention, &with_amx);
#endif
        static KernelTable with_bfloat16;
        add("avx512bf16", avx512bf16::kBfloat16Attention, &with_bfloat16);
      }
#endif
      found.push_back({"avx512", &avx512::kTable});
    }
#endif
#ifdef LK_WITH_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.push_back({"avx2", &avx2::kTable});
    }
#endif
#ifdef LK_WITH_NEON
    found.push_back({"neon", &neon::kTable});
#endif
    found.push_back({"portable", &portable::kTable});
    return found;
  }();
  return list;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Body>
int32_t guarded(Body body) {
  try {
    return body() ? LK_OK : LK_OUT_OF_MEMORY;
  } catch (const std::bad_alloc&) {
    return LK_OUT_OF_MEMORY;
  }
}

bool backward(const LkAttention& a) {
  const AttentionKernels& kernels = isas()[a.isa].table->attention[a.dtype];
  const BackwardPlan plan = plan_backward(a, kernels.sum_size, kernels.in_place);
  int64_t queries = 0;
  for (const BackwardTask& task : plan.tasks) {
    queries = std::max(queries, task.query_end - task.query_begin);
  }
  const auto num_tasks = static_cast<int64_t>(plan.tasks.size());
  if (!parallel_for(num_tasks, a.num_threads, kernels.backward_scratch(a, queries),
                    [&](int64_t i, void* scratch) {
                      kernels.backward(a, plan.tasks[plan.order[i]], scratch);
                    })) {
    return false;
  }

  const int64_t num_groups = a.batch * a.kv_heads, chunks = ceil_div(a.seq, kReduceKeys);
  if (plan.accumulators &&
      !parallel_for(num_groups * chunks, a.num_threads, kernels.reduce_scratch(a),
                    [&](int64_t i, void* scratch) {
                      const size_t first = plan.groups[i / chunks];
                      const size_t last = plan.groups[i / chunks + 1];
                      const int64_t begin = i % chunks * kReduceKeys;
                      kernels.reduce(a, &plan.tasks[first], static_cast<int64_t>(last - first),
                                     begin, std::min(begin + kReduceKeys, a.seq), scratch);
                    })) {
    return false;
  }
  if (!a.sinks) return true;
  return parallel_for(a.heads, a.num_threads, 0,
                      [&](int64_t head, void*) { kernels.sinks(a, head); });
}

const PairKernels& pair_kernels(const LkPairs& a) { return isas()[a.isa].table->pairs[a.dtype]; }
const TubeKernels& tube_kernels(const LkTubes& a) { return isas()[a.isa].table->tubes[a.dtype]; }

// Whether each of `count` pairs of indices lies in a row of `seq`, or is -1 twice.
bool in_range(const int64_t* pairs, int64_t count, int64_t seq) {
  for (int64_t i = 0; i < 2 * count; i += 2) {
    const int64_t x = pairs[i], y = pairs[i + 1];
    const bool real = x >= 0 && x < seq && y >= 0 && y < seq;
    if (!real && (x != -1 || y != -1)) return false;
  }
  return true;
}

constexpr int64_t kTaskBytes = 512 << 10;  // threads are worth waking for no less

template <class Arguments>
int64_t row_size(const Arguments& a) {
  return a.dim * (a.dtype == LK_FLOAT64 ? 8 : a.dtype == LK_FLOAT32 ? 4 : 2);
}

// body(i) for i in 0 .. count - 1, each of which touches some rows.
template <class Arguments, class Body>
bool for_each(const Arguments& a, int64_t count, int64_t rows, Body body) {
  const int64_t grain = kTaskBytes / (rows * row_size(a) + 1) + 1;
  return parallel_for(ceil_div(count, grain), a.num_threads, 0, [&](int64_t i, void*) {
    const int64_t end = std::min((i + 1) * grain, count);
    for (int64_t at = i * grain; at < end; ++at) body(at);
  });
}

template <class Arguments>
bool fill_with_zeros(const Arguments& a) {
  const int64_t size = a.batch * a.seq * row_size(a);
  return parallel_for(ceil_div(size, kTaskBytes), a.num_threads, 0, [&](int64_t i, void*) {
    const int64_t begin = i * kTaskBytes;
    std::memset(static_cast<char*>(a.dhidden) + begin, 0, std::min(kTaskBytes, size - begin));
  });
}

// Zero rows first, then the rows that slots point at, of which each row of the batch has
// `num_slots` with an index each. A row that several slots point at is written once, from all of
// them in ascending order.
template <class Arguments>
bool scatter(const Arguments& a, const int64_t* slots, int64_t num_slots,
             void (*kernel)(const Arguments&, const int64_t* next, int64_t first_slot)) {
  const int64_t num_rows = a.batch * a.seq;
  std::vector<int64_t> first(num_rows, -1), next(a.batch * num_slots, -1), owners;
  for (int64_t slot = a.batch * num_slots - 1; slot >= 0; --slot) {
    if (slots[slot] < 0) continue;
    int64_t& head = first[slot / num_slots * a.seq + slots[slot]];
    next[slot] = head;
    head = slot;
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    if (first[row] >= 0) owners.push_back(first[row]);
  }
  return fill_with_zeros(a) &&
         for_each(a, static_cast<int64_t>(owners.size()), 3,
                  [&](int64_t i) { kernel(a, next.data(), owners[i]); });
}

// Checks the lists, then runs body.
template <class Body>
int32_t attend(const LkAttention& a, Body body) {
  int32_t status = LK_OK;
  const int32_t ran = guarded([&] {
    status = check_schedule(a);
    return status != LK_OK || body();
  });
  return ran == LK_OK ? status : ran;
}

}  // namespace

void lk_set_parallel(LkParallel parallel) { set_parallel(parallel); }

void lk_ask_for_amx() { wants_amx = true; }

int64_t lk_attention_size() { return sizeof(LkAttention); }

int64_t lk_pairs_size() { return sizeof(LkPairs); }

int64_t lk_tubes_size() { return sizeof(LkTubes); }

const char* lk_sources() { return LK_SOURCES; }

const char* lk_isa_name(int32_t index) {
  return index < static_cast<int32_t>(isas().size()) ? isas()[index].name : nullptr;
}

int32_t lk_attention_forward(const LkAttention* args) {
  const LkAttention& a = *args;
  const AttentionKernels& kernels = isas()[a.isa].table->attention[a.dtype];
  const int64_t queries = kernels.forward_queries(a), blocks = ceil_div(a.seq, queries);
  return attend(a, [&] {
    return parallel_for(blocks * a.batch * a.kv_heads, a.num_threads, kernels.forward_scratch(a),
                        [&](int64_t i, void* scratch) {
                          // One kv head after the other, since its keys are then in the cache;
                          // late blocks, which may see most keys, first.
                          const int64_t group = i / blocks;
                          const int64_t begin = (blocks - 1 - i % blocks) * queries;
                          kernels.forward(a, group / a.kv_heads, group % a.kv_heads, begin,
                                          std::min(begin + queries, a.seq), scratch);
                        });
  });
}

int32_t lk_attention_backward(const LkAttention* args) {
  return attend(*args, [&] { return backward(*args); });
}

int32_t lk_distance_forward(const LkPairs* args) {
  const LkPairs& a = *args;
  const PairKernels& kernels = pair_kernels(a);
  if (!in_range(a.pairs, a.batch * a.num_pairs, a.seq)) return LK_OUT_OF_RANGE;
  return guarded([&] {
    if (!for_each(a, a.batch * a.num_pairs, 2,
                  [&](int64_t pair) { kernels.distance_forward(a, pair); })) {
      return false;
    }
    kernels.distance_reduce(a);
    return true;
  });
}

int32_t lk_distance_backward(const LkPairs* args) {
  const LkPairs& a = *args;
  return guarded(
      [&] { return scatter(a, a.pairs, 2 * a.num_pairs, pair_kernels(a).distance_backward); });
}

int32_t lk_views_forward(const LkPairs* args) {
  const LkPairs& a = *args;
  const PairKernels& kernels = pair_kernels(a);
  if (!in_range(a.pairs, a.batch * a.num_pairs, a.seq)) return LK_OUT_OF_RANGE;
  return guarded([&] {
    return for_each(a, 2 * a.batch * a.num_pairs, 2,
                    [&](int64_t slot) { kernels.views_forward(a, slot); });
  });
}

int32_t lk_views_backward(const LkPairs* args) {
  const LkPairs& a = *args;
  const PairKernels& kernels = pair_kernels(a);
  return guarded([&] {
    return for_each(a, 2 * a.batch * a.num_pairs, 2,
                    [&](int64_t slot) { kernels.views_dot(a, slot); }) &&
           scatter(a, a.pairs, 2 * a.num_pairs, kernels.views_backward);
  });
}

int32_t lk_tubes_forward(const LkTubes* args) {
  const LkTubes& a = *args;
  const int64_t count = a.batch * a.num_vectors;
  if (!in_range(a.tubes, count * kTubeSlots / 2, a.seq)) return LK_OUT_OF_RANGE;
  return guarded([&] {
    return for_each(a, count, kTubeSlots,
                    [&](int64_t i) { tube_kernels(a).forward(a, i); });
  });
}

int32_t lk_tubes_backward(const LkTubes* args) {
  const LkTubes& a = *args;
  return guarded([&] {
    return scatter(a, a.tubes, kTubeSlots * a.num_vectors, tube_kernels(a).backward);
  });
}
