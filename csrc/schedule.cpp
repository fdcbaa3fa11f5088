#include "schedule.h"

#include <algorithm>
#include <vector>

namespace {

// Extreme values of each block of a row.
struct Extremes {
  std::vector<int64_t> least, most;

  Extremes(const int32_t* values, int64_t seq, int64_t block) {
    for (int64_t begin = 0; values && begin < seq; begin += block) {
      const int64_t size = std::min(block, seq - begin);
      const auto found = std::minmax_element(values + begin, values + begin + size);
      least.push_back(*found.first);
      most.push_back(*found.second);
    }
  }
};

class Row {
 public:
  Row(const LkAttention& a, int64_t row)
      : a_(a),
        until_(a.visible_until + row * a.seq),
        position_(a.positions ? a.positions + row * a.seq : nullptr),
        num_queries_((a.seq + a.block_m - 1) / a.block_m),
        num_keys_((a.seq + a.block_n - 1) / a.block_n),
        offsets_(a.kv_offsets + row * (num_queries_ + 1)),
        full_start_(a.kv_full_start + row * (num_queries_ + 1)),
        tiles_(a.kv_indices + row * a.kv_indices_stride) {}

  bool in_range() const {
    for (int64_t j = 0; j < a_.seq; ++j) {
      if (until_[j] <= j || until_[j] > a_.seq) return false;
    }
    return true;
  }

  // Every tile that is needed is listed, none twice, and what is called full is.
  bool lists_are_of_the_mask() const {
    const Extremes until(until_, a_.seq, a_.block_n);
    const Extremes queries(position_, a_.seq, a_.block_m), keys(position_, a_.seq, a_.block_n);
    const auto near = [&](int64_t m, int64_t n) {
      return !position_ || queries.least[m] - keys.most[n] < a_.window;
    };
    // The query blocks that see something of key block n, but for the window, are one run.
    const auto run_begin = [&](int64_t n) { return n * a_.block_n / a_.block_m; };
    const auto run_end = [&](int64_t n) { return (until.most[n] - 1) / a_.block_m + 1; };

    int64_t missing = 0;
    for (int64_t n = 0; n < num_keys_; ++n) {
      if (!position_) missing += run_end(n) - run_begin(n);
      for (int64_t m = run_begin(n); position_ && m < run_end(n); ++m) missing += near(m, n);
    }
    std::vector<int64_t> listed_by(num_keys_, -1);  // the last query block that lists each
    if (offsets_[0] != 0) return false;
    for (int64_t m = 0; m < num_queries_; ++m) {
      const int64_t begin = offsets_[m], full = full_start_[m], end = offsets_[m + 1];
      if (begin > full || full > end || end > a_.kv_indices_stride) return false;
      const int64_t first_query = m * a_.block_m;
      const int64_t end_query = std::min(first_query + a_.block_m, a_.seq);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = tiles_[i];
        if (n < 0 || n >= num_keys_ || listed_by[n] == m) return false;
        listed_by[n] = m;
        missing -= run_begin(n) <= m && m < run_end(n) && near(m, n);
        if (i < full) continue;
        const int64_t last_key = std::min((n + 1) * a_.block_n, a_.seq) - 1;
        if (last_key > first_query || until.least[n] < end_query) return false;
        // Lists that know of no window get its mask in full tiles too.
        if (position_ && a_.full_is_full && queries.most[m] - keys.least[n] >= a_.window) {
          return false;
        }
      }
    }
    return missing == 0;
  }

 private:
  const LkAttention& a_;
  const int32_t *until_, *position_;
  const int64_t num_queries_, num_keys_;
  const int32_t *offsets_, *full_start_, *tiles_;
};

}  // namespace

int32_t check_schedule(const LkAttention& a) {
  for (int64_t row = 0; row < a.batch; ++row) {
    const Row lists(a, row);
    if (!lists.in_range()) return LK_OUT_OF_RANGE;
    if (!lists.lists_are_of_the_mask()) return LK_BAD_SCHEDULE;
  }
  return LK_OK;
}
