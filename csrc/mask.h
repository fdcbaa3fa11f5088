// Which keys a block of queries visits, in which order.
#pragma once

#include "api.h"
#include "simd.h"

namespace LK_ISA {

constexpr int kChunk = 128;  // most keys processed at once

// Keys taken from the tiles of a query block; unless `full`, some query may not see some key.
struct KeyChunk {
  int count;
  bool full;
  int32_t key[kChunk];
};

// Queries begin .. end - 1 of a row and, with a window, their extreme positions.
struct QueryRange {
  int64_t begin, end;
  int32_t min_position, max_position;

  QueryRange(const LkAttention& a, int64_t row, int64_t begin_, int64_t end_)
      : begin(begin_), end(end_), min_position(0), max_position(0) {
    if (!a.positions) return;
    const int32_t* position = a.positions + row * a.seq;
    min_position = max_position = position[begin];
    for (int64_t i = begin + 1; i < end; ++i) {
      if (position[i] < min_position) min_position = position[i];
      if (position[i] > max_position) max_position = position[i];
    }
  }

  // Whether any query of the range may see key j ...
  LK_INLINE bool sees(const LkAttention& a, const int32_t* until, const int32_t* position,
                      int32_t j) const {
    return j < end && until[j] > begin &&
           (!position || int64_t{min_position} - position[j] < a.window);
  }
  // ... and whether all of them do.
  LK_INLINE bool all_see(const LkAttention& a, const int32_t* until, const int32_t* position,
                         int32_t j) const {
    return j <= begin && until[j] >= end &&
           (!position || int64_t{max_position} - position[j] < a.window);
  }
};

// Walks the tiles of one query block. Keys of full tiles come first; those of partial tiles are
// picked one by one, so that the visible keys of many sparse tiles make one dense chunk.
class TileCursor {
 public:
  TileCursor(const LkAttention& a, int64_t row, int64_t block, const QueryRange& queries)
      : a_(a),
        queries_(queries),
        until_(a.visible_until + row * a.seq),
        position_(a.positions ? a.positions + row * a.seq : nullptr),
        tiles_(a.kv_indices + row * a.kv_indices_stride) {
    const int64_t num_blocks = (a.seq + a.block_m - 1) / a.block_m;
    const int32_t* offsets = a.kv_offsets + row * (num_blocks + 1) + block;
    const int32_t full_start = a.kv_full_start[row * num_blocks + block];
    partial_ = offsets[0];
    // Where full tiles still need the window mask they are walked like partial ones.
    partial_end_ = a.full_is_full ? full_start : offsets[1];
    full_ = partial_end_;
    full_end_ = offsets[1];
  }

  bool next(KeyChunk* chunk) {
    chunk->count = 0;
    chunk->full = true;
    while (chunk->count < kChunk && enter_tile(&full_, full_end_)) {
      while (chunk->count < kChunk && key_ < key_end_) chunk->key[chunk->count++] = key_++;
    }
    if (chunk->count > 0) return true;
    chunk->full = false;
    while (chunk->count < kChunk && enter_tile(&partial_, partial_end_)) {
      for (; chunk->count < kChunk && key_ < key_end_; ++key_) {
        chunk->key[chunk->count] = key_;
        chunk->count += queries_.sees(a_, until_, position_, key_);
      }
    }
    return chunk->count > 0;
  }

 private:
  // Moves on to the next tile of the list when the current one is used up.
  bool enter_tile(int32_t* tile, int32_t end) {
    if (key_ < key_end_) return true;
    if (*tile == end) return false;
    key_ = static_cast<int32_t>(tiles_[(*tile)++] * a_.block_n);
    const int64_t last = key_ + a_.block_n;
    key_end_ = static_cast<int32_t>(last < a_.seq ? last : a_.seq);
    return true;
  }

  const LkAttention& a_;
  const QueryRange& queries_;
  const int32_t *until_, *position_, *tiles_;
  int32_t full_, full_end_, partial_, partial_end_;
  int32_t key_ = 0, key_end_ = 0;
};

}  // namespace LK_ISA
