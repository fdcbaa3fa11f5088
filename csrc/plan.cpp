#include "plan.h"

#include <algorithm>
#include <numeric>

namespace {

constexpr int64_t kMinTasks = 8;               // where long segments must be sliced for it
constexpr int64_t kMaxTasks = 64;              // where a row falls apart by itself
constexpr int64_t kMinQueries = 256;           // of a task: it wastes some lanes at its ends
constexpr size_t kMaxAccumulators = 40 << 20;  // bytes for slices that share keys

// A run of queries that see no key before it and whose keys no later query sees.
struct Section {
  int64_t row, begin, end;
  int64_t pairs;  // of tokens that see each other: the work, windows aside
};

void append_sections(const LkAttention& a, int64_t row, int64_t min_pairs,
                        std::vector<Section>* sections) {
  const int32_t* until = a.visible_until + row * a.seq;
  int64_t reach = 0;
  Section section{row, 0, 0, 0};
  for (int64_t j = 0; j < a.seq; ++j) {
    reach = std::max<int64_t>(reach, until[j]);
    section.pairs += until[j] - j;
    section.end = j + 1;
    const bool large = section.pairs >= min_pairs && section.end - section.begin >= kMinQueries;
    if ((reach == j + 1 && large) || section.end == a.seq) {
      sections->push_back(section);
      section = Section{row, j + 1, j + 1, 0};
    }
  }
}

// The bounds of `slices` runs of queries with about equal work, at block boundaries.
std::vector<int64_t> slice_bounds(const LkAttention& a, const Section& section, int64_t slices) {
  const int32_t* until = a.visible_until + section.row * a.seq;
  std::vector<int64_t> ending(section.end - section.begin + 1);
  for (int64_t j = section.begin; j < section.end; ++j) ++ending[until[j] - section.begin];
  std::vector<int64_t> bounds = {section.begin};
  int64_t visible = 0, pairs = 0;
  for (int64_t i = section.begin; i < section.end; ++i) {
    const auto next = static_cast<int64_t>(bounds.size());
    if (next < slices && i % a.block_m == 0 && i > bounds.back() &&
        pairs * slices >= section.pairs * next) {
      bounds.push_back(i);
    }
    visible += 1 - ending[i - section.begin];
    pairs += visible;
  }
  bounds.push_back(section.end);
  return bounds;
}

// The first key that a query from `begin` on sees.
int64_t first_visible(const LkAttention& a, const Section& section, int64_t begin) {
  const int32_t* until = a.visible_until + section.row * a.seq;
  int64_t j = section.begin;
  while (j < begin && until[j] <= begin) ++j;
  return j;
}

}  // namespace

BackwardPlan plan_backward(const LkAttention& a, size_t sum_size, bool in_place) {
  int64_t total = 0;
  for (int64_t i = 0; i < a.batch * a.seq; ++i) total += a.visible_until[i] - i % a.seq;
  total *= a.kv_heads;
  std::vector<Section> sections;
  for (int64_t row = 0; row < a.batch; ++row) {
    append_sections(a, row, total / kMaxTasks, &sections);
  }

  BackwardPlan plan;
  std::vector<int64_t> work;
  const size_t key_size = 2 * a.dim * sum_size;
  size_t reserved = 0;
  std::vector<size_t> offsets;  // of each task's accumulators, or SIZE_MAX
  for (const Section& section : sections) {
    const int64_t slices = std::min((section.pairs * kMinTasks + total - 1) / total,
                                    (section.end - section.begin) / (2 * kMinQueries));
    std::vector<int64_t> bounds = slice_bounds(a, section, slices);
    std::vector<int64_t> keys;  // first key of each slice
    size_t shared_keys = 0;     // that need accumulators
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      // The last slice sums in place where it can, and then stands for the whole section.
      const bool last = i + 2 == bounds.size();
      keys.push_back(last ? section.begin : first_visible(a, section, bounds[i]));
      if (!(last && in_place)) shared_keys += bounds[i + 1] - keys.back();
    }
    const bool sliced = keys.size() > 1 &&
                        reserved + shared_keys * key_size * a.kv_heads <= kMaxAccumulators;
    if (!sliced) {
      bounds = {section.begin, section.end};
      keys = {section.begin};
    }
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const size_t first = plan.tasks.size();
      for (size_t i = 0; i < keys.size(); ++i) {
        const bool last = i + 1 == keys.size();
        const bool own = sliced && !(last && in_place);
        offsets.push_back(own ? reserved : SIZE_MAX);
        if (own) reserved += (bounds[i + 1] - keys[i]) * key_size;
        plan.tasks.push_back({section.row, head, bounds[i], bounds[i + 1], keys[i], nullptr});
        work.push_back(section.pairs / static_cast<int64_t>(keys.size()));
      }
      if (sliced) plan.shared.push_back({first, plan.tasks.size(), section.begin, section.end});
    }
  }

  if (reserved > 0) plan.accumulators.reset(new char[reserved]);
  for (size_t i = 0; i < plan.tasks.size(); ++i) {
    if (offsets[i] != SIZE_MAX) plan.tasks[i].accumulators = plan.accumulators.get() + offsets[i];
  }
  plan.order.resize(plan.tasks.size());
  std::iota(plan.order.begin(), plan.order.end(), size_t{0});
  std::stable_sort(plan.order.begin(), plan.order.end(),
                   [&](size_t x, size_t y) { return work[x] > work[y]; });
  return plan;
}
