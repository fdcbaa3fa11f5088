#include "plan.h"

#include <algorithm>
#include <numeric>

namespace {

constexpr int64_t kMaxTasks = 64;              // where cutting is cheap
constexpr int64_t kMinTasks = 8;               // where it is not
constexpr int64_t kMinQueries = 256;           // of a task: it wastes some lanes at its ends
constexpr int64_t kPairsPerSharedKey = 256;    // that make a cut cheap
constexpr size_t kMaxAccumulators = 40 << 20;  // bytes

// Queries begin .. end - 1 of a row, which see `pairs` keys (more than a window leaves).
struct Piece {
  int64_t row, begin, end, pairs;
};

int64_t visible_pairs(const LkAttention& a) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < a.batch * a.seq; ++i) pairs += a.visible_until[i] - i % a.seq;
  return pairs;
}

// A cut shares the keys that are seen on both sides of it: none between two documents, a prefix
// between examples that share it, everything before the cut inside a long segment.
void cut_row(const LkAttention& a, int64_t row, int64_t total_pairs, size_t key_size,
             size_t* reserved, std::vector<Piece>* pieces) {
  const int32_t* until = a.visible_until + row * a.seq;
  std::vector<int32_t> ending(a.seq + 1);
  for (int64_t j = 0; j < a.seq; ++j) ++ending[until[j]];
  Piece piece{row, 0, 0, 0};
  int64_t visible = 0;
  for (int64_t i = 0; i < a.seq; ++i) {
    const int64_t shared = visible - ending[i];  // keys before i that query i sees
    const int64_t length = i - piece.begin;
    const size_t size = shared * key_size * a.kv_heads;
    const bool cheap = piece.pairs >= total_pairs * a.kv_heads / kMaxTasks &&
                       length >= kMinQueries && shared * kPairsPerSharedKey <= piece.pairs;
    const bool needed = piece.pairs >= total_pairs * a.kv_heads / kMinTasks &&
                        length >= 2 * kMinQueries && i % a.block_m == 0;
    if ((cheap || needed) && *reserved + size <= kMaxAccumulators) {
      *reserved += size;
      piece.end = i;
      pieces->push_back(piece);
      piece = Piece{row, i, i, 0};
    }
    visible = shared + 1;
    piece.pairs += visible;
  }
  piece.end = a.seq;
  pieces->push_back(piece);
}

// Keys that other pieces see too and that this one must therefore sum by itself.
std::vector<int32_t> shared_keys(const LkAttention& a, const Piece& piece, bool in_place) {
  const int32_t* until = a.visible_until + piece.row * a.seq;
  std::vector<int32_t> keys;
  for (int64_t j = 0; j < piece.begin; ++j) {
    if (until[j] > piece.begin) keys.push_back(static_cast<int32_t>(j));
  }
  // Its own keys can be summed in place, if that loses nothing.
  for (int64_t j = piece.begin; j < piece.end && !in_place; ++j) {
    if (until[j] > piece.end) keys.push_back(static_cast<int32_t>(j));
  }
  return keys;
}

}  // namespace

BackwardPlan plan_backward(const LkAttention& a, size_t sum_size, bool in_place) {
  // Where keys are not summed in place, a shared key takes two rows for each cut.
  const size_t key_size = 2 * a.dim * sum_size;
  const int64_t total = visible_pairs(a);
  std::vector<Piece> pieces;
  size_t reserved = 0;
  for (int64_t row = 0; row < a.batch; ++row) {
    cut_row(a, row, total, in_place ? key_size : 2 * key_size, &reserved, &pieces);
  }

  BackwardPlan plan;
  for (const Piece& piece : pieces) plan.shared.push_back(shared_keys(a, piece, in_place));
  std::vector<int64_t> work;
  size_t rows = 0;  // of accumulators
  for (size_t begin = 0, end; begin < pieces.size(); begin = end) {
    for (end = begin; end < pieces.size() && pieces[end].row == pieces[begin].row;) ++end;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      plan.groups.push_back(plan.tasks.size());
      for (size_t i = begin; i < end; ++i) {
        const Piece& piece = pieces[i];
        const auto num_shared = static_cast<int64_t>(plan.shared[i].size());
        plan.tasks.push_back({piece.row, head, piece.begin, piece.end, plan.shared[i].data(),
                              num_shared, nullptr});
        work.push_back(piece.pairs);
        rows += num_shared;
      }
    }
  }
  plan.groups.push_back(plan.tasks.size());

  if (rows > 0) plan.accumulators.reset(new char[rows * key_size]);
  char* next = plan.accumulators.get();
  for (BackwardTask& task : plan.tasks) {
    task.accumulators = next;
    next += task.num_shared * key_size;
  }
  plan.order.resize(plan.tasks.size());
  std::iota(plan.order.begin(), plan.order.end(), size_t{0});
  std::stable_sort(plan.order.begin(), plan.order.end(),
                   [&](size_t x, size_t y) { return work[x] > work[y]; });
  return plan;
}
