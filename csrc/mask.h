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

// Walks the tiles of the query blocks that a range of queries touches. Keys of tiles that are full
// for all of these blocks come first; of the others, visible keys are picked one by one, so that
// those of many sparse tiles make one dense chunk.
class TileCursor {
 public:
  // `full_blocks` is scratch: for each key block, of how many query blocks its tile is full.
  TileCursor(const LkAttention& a, int64_t row, const QueryRange& queries, uint16_t* full_blocks)
      : a_(a),
        queries_(queries),
        until_(a.visible_until + row * a.seq),
        position_(a.positions ? a.positions + row * a.seq : nullptr),
        full_blocks_(full_blocks) {
    const int64_t num_queries = (a.seq + a.block_m - 1) / a.block_m;
    const int64_t num_keys = (a.seq + a.block_n - 1) / a.block_n;
    const int32_t* offsets = a.kv_offsets + row * (num_queries + 1);
    const int32_t* full_start = a.kv_full_start + row * (num_queries + 1);
    const int32_t* tiles = a.kv_indices + row * a.kv_indices_stride;
    const int64_t begin = queries.begin / a.block_m, end = (queries.end - 1) / a.block_m + 1;
    begin_ = num_keys;
    end_ = 0;
    std::memset(full_blocks, 0, num_keys * sizeof(uint16_t));
    for (int64_t block = begin; block < end; ++block) {
      for (int32_t i = offsets[block]; i < offsets[block + 1]; ++i) {
        const int64_t tile = tiles[i];
        if (tile < begin_) begin_ = tile;
        if (tile >= end_) end_ = tile + 1;
        // Where full tiles still need the window mask they are walked like partial ones.
        const bool full = i >= full_start[block] && a.full_is_full;
        full_blocks[tile] = (full_blocks[tile] + full) | kVisible;
      }
    }
    all_ = static_cast<uint16_t>(kVisible | (end - begin));
    tile_ = begin_;
  }

  bool next(KeyChunk* chunk) {
    chunk->count = 0;
    if (walk_full_) {
      chunk->full = true;
      while (chunk->count < kChunk && enter_tile()) {
        while (chunk->count < kChunk && key_ < key_end_) chunk->key[chunk->count++] = key_++;
      }
      if (chunk->count > 0) return true;
      walk_full_ = false;
      tile_ = begin_;
    }
    chunk->full = false;
    while (chunk->count < kChunk && enter_tile()) {
      for (; chunk->count < kChunk && key_ < key_end_; ++key_) {
        chunk->key[chunk->count] = key_;
        chunk->count += queries_.sees(a_, until_, position_, key_);
      }
    }
    return chunk->count > 0;
  }

 private:
  static constexpr uint16_t kVisible = 0x8000;

  // Moves on to the next tile of the kind being walked when the current one is used up.
  bool enter_tile() {
    if (key_ < key_end_) return true;
    for (; tile_ < end_; ++tile_) {
      if (full_blocks_[tile_] == 0 || (full_blocks_[tile_] == all_) != walk_full_) continue;
      key_ = static_cast<int32_t>(tile_ * a_.block_n);
      const int64_t last = key_ + a_.block_n;
      key_end_ = static_cast<int32_t>(last < a_.seq ? last : a_.seq);
      ++tile_;
      return true;
    }
    return false;
  }

  const LkAttention& a_;
  const QueryRange& queries_;
  const int32_t *until_, *position_;
  uint16_t* full_blocks_;
  int64_t begin_, end_, tile_;
  uint16_t all_;
  bool walk_full_ = true;
  int32_t key_ = 0, key_end_ = 0;
};

}  // namespace LK_ISA
