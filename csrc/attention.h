// What the forward and the backward pass of attention share: blocks of queries laid out along
// vector lanes, and the mask of a tile.
//
// A block holds some queries of all heads that share a kv head. Its vectors are ordered query
// group first, head second; V neighbouring vectors form a panel, which is what the matrix
// products work on. Grouped heads therefore make panels short in queries, which fits short
// segments: the keys of a panel are only those that one of its queries sees.
#pragma once

#include "cache.h"
#include "gemm.h"
#include "mask.h"
#include "storage.h"

namespace LK_ISA {

// Hands out aligned pieces of a buffer; with a null buffer it only adds up their sizes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + size_) : nullptr;
    size_ += (count * sizeof(T) + 127) / 128 * 128;
    return piece;
  }
  size_t size() const { return size_; }

 private:
  char* base_;
  size_t size_ = 0;
};

constexpr int64_t kBlockBytes = 1536;  // of one number for each lane of a block

// Sizes of the tiles of one problem.
template <class T>
struct TileShape {
  static constexpr int W = kLanes<T>;
  int dim, padded;  // head dim, and the same in whole vectors
  int stride;       // of packed rows: not a power of two, whose rows would share cache sets
  int max_vectors;  // of a block

  explicit TileShape(const LkAttention& a) {
    dim = static_cast<int>(a.dim);
    padded = (dim + W - 1) / W * W;
    stride = padded + 64 / static_cast<int>(sizeof(T));
    // As many lanes as pay for packing the keys, if what the backward pass keeps of them, about
    // five rows, leaves half of the second-level cache free.
    const int64_t fitting = second_level_cache() / 2 / (5 * padded * LK_VECTOR_BYTES);
    const int64_t enough = kBlockBytes / LK_VECTOR_BYTES;
    max_vectors = static_cast<int>(fitting < enough ? fitting : enough);
    max_vectors -= max_vectors % kMaxVectors;
    if (max_vectors < kMaxVectors) max_vectors = kMaxVectors;
  }

  // Heads, and queries, that are processed together.
  int heads(const LkAttention& a) const {
    const int64_t group = a.heads / a.kv_heads;
    return static_cast<int>(group < max_vectors ? group : max_vectors);
  }
  int64_t queries(const LkAttention& a) const { return max_vectors / heads(a) * W; }
};

// Queries and heads that are processed together.
struct BlockRange {
  int64_t head_begin;
  int heads;
  int64_t query_begin, query_end;
};

// Calls fn(BlockRange) for these queries, a few of the heads that share the kv head at a time.
template <class T, class Fn>
void for_head_groups(const LkAttention& a, int64_t kv_head, int64_t begin, int64_t end,
                     const TileShape<T>& shape, Fn fn) {
  const int64_t group = a.heads / a.kv_heads;
  const int heads = shape.heads(a);
  for (int64_t h = 0; h < group; h += heads) {
    const int count = static_cast<int>(group - h < heads ? group - h : heads);
    fn(BlockRange{kv_head * group + h, count, begin, end});
  }
}

// V neighbouring vectors of a block, from vector `first` on.
struct Panel {
  int first, vectors;
  bool ragged;  // has lanes without a query
  QueryRange queries;
};

// The vectors of a block: which query and head each lane stands for.
template <class T>
struct BlockLanes {
  static constexpr int W = kLanes<T>;
  const BlockRange& range;
  int vectors;

  explicit BlockLanes(const BlockRange& r)
      : range(r), vectors(static_cast<int>((r.query_end - r.query_begin + W - 1) / W) * r.heads) {}

  int64_t head(int vector) const { return range.head_begin + vector % range.heads; }
  int64_t query(int vector) const { return range.query_begin + vector / range.heads * W; }
  // Lanes of the vector that hold a query.
  int valid(int vector) const {
    const int64_t rest = range.query_end - query(vector);
    return static_cast<int>(rest < W ? rest : W);
  }
  // Vectors of the panel that starts at `first`: as few query groups per panel as possible.
  int panel_vectors(int first) const {
    const int rest = vectors - first;
    if (range.heads % 2 == 0 && range.heads % 3 != 0) return rest < 2 ? rest : 2;
    if (rest == 4) return 2;
    return rest < kMaxVectors ? rest : kMaxVectors;
  }
  Panel panel(const LkAttention& a, int64_t row, int first) const {
    const int count = panel_vectors(first), last = first + count - 1;
    const int64_t end = query(last) + valid(last);
    bool ragged = false;
    for (int v = first; v <= last; ++v) ragged |= valid(v) < W;
    return Panel{first, count, ragged, QueryRange(a, row, query(first), end)};
  }
};

// The query and position of each lane, to compare keys with; -1 for lanes without a query.
template <class T>
struct LaneQueries {
  Int<T>*query, *position;

  LaneQueries(Arena& arena, int max_vectors)
      : query(arena.take<Int<T>>(max_vectors * kLanes<T>)),
        position(arena.take<Int<T>>(max_vectors * kLanes<T>)) {}

  void fill(const LkAttention& a, int64_t row, const BlockLanes<T>& lanes) {
    for (int v = 0; v < lanes.vectors; ++v) {
      const int64_t first = lanes.query(v);
      const int valid = lanes.valid(v);
      for (int i = 0; i < kLanes<T>; ++i) {
        const int at = v * kLanes<T> + i;
        query[at] = i < valid ? static_cast<Int<T>>(first + i) : -1;
        position[at] = a.positions && i < valid ? a.positions[row * a.seq + first + i] : 0;
      }
    }
  }
};

// The mask between a panel's lanes and single keys.
template <class T>
struct KeyMask {
  const int32_t *until, *position;
  int64_t window;

  KeyMask(const LkAttention& a, int64_t row)
      : until(a.visible_until + row * a.seq),
        position(a.positions ? a.positions + row * a.seq : nullptr),
        window(a.window < UINT32_MAX ? a.window : UINT32_MAX) {}  // no difference is greater

  // All ones in the lanes that see key j.
  LK_INLINE IntVec<T> visible(int32_t j, IntVec<T> query, IntVec<T> query_position) const {
    IntVec<T> seen = (query >= splat_int<T>(j)) & (query < splat_int<T>(until[j]));
    if (position) seen &= query_position <= splat_int<T>(last_position(j));
    return seen;
  }
  LK_INLINE bool visible(int32_t j, Int<T> query, Int<T> query_position) const {
    return query >= j && query < until[j] && (!position || query_position <= last_position(j));
  }

 private:
  LK_INLINE Int<T> last_position(int32_t j) const {
    const int64_t last = int64_t{position[j]} + window - 1;
    return static_cast<Int<T>>(last < INT32_MAX ? last : INT32_MAX);
  }
};

// The keys of a chunk that a panel visits: positions in the chunk, ascending.
struct PanelKeys {
  int count;
  bool masked;          // some lane may not see some key
  int32_t* index;       // [kChunk]
  int64_t* offset;      // [kChunk], of the keys' packed rows
  uint8_t* needs_mask;  // [kChunk], only if `masked`

  explicit PanelKeys(Arena& arena)
      : index(arena.take<int32_t>(kChunk)),
        offset(arena.take<int64_t>(kChunk)),
        needs_mask(arena.take<uint8_t>(kChunk)) {}

  template <class T>
  void select(const LkAttention& a, const KeyMask<T>& mask, const KeyChunk& chunk,
              const Panel& panel, int64_t stride) {
    masked = panel.ragged || !chunk.full;
    count = 0;
    for (int n = 0; n < chunk.count; ++n) {
      const int32_t j = chunk.key[n];
      if (!chunk.full) {
        if (j >= panel.queries.end) break;  // keys ascend
        if (!panel.queries.sees(a, mask.until, mask.position, j)) continue;
      }
      index[count] = n;
      offset[count] = n * stride;
      needs_mask[count] =
          panel.ragged || !(chunk.full || panel.queries.all_see(a, mask.until, mask.position, j));
      ++count;
    }
  }
};

// Rows lie too far apart for the hardware to foresee.
template <class S>
LK_INLINE void prefetch_row(const S* row, int dim) {
  for (int d = 0; d < dim; d += 64 / static_cast<int>(sizeof(S))) __builtin_prefetch(row + d);
}

// Rows of K or V that belong to a chunk, packed in the compute type.
template <class S>
bool pack_keys(const LkTensor& x, int64_t row, int64_t kv_head, const KeyChunk& chunk,
               const TileShape<Compute<S>>& shape, Compute<S>* packed) {
  Vec<Compute<S>> poison = {};
  const S* base = static_cast<const S*>(x.data) + row * x.batch_stride + kv_head * x.head_stride;
  constexpr int kAhead = 12;
  for (int n = 0; n < chunk.count; ++n) {
    if (n + kAhead < chunk.count) {
      prefetch_row(base + chunk.key[n + kAhead] * x.seq_stride, shape.dim);
    }
    read_row(base + chunk.key[n] * x.seq_stride, packed + int64_t{n} * shape.stride, shape.dim,
             shape.padded, &poison);
  }
  return is_finite<Compute<S>>(poison);
}

// Asks for the rows that read_lanes will read.
template <class S>
void prefetch_lanes(const LkTensor& x, int64_t row, int64_t head, int64_t query, int valid,
                    int dim) {
  const S* base = static_cast<const S*>(x.data) + row * x.batch_stride + head * x.head_stride;
  for (int i = 0; i < valid; ++i) prefetch_row(base + (query + i) * x.seq_stride, dim);
}

// The rows of one vector's queries, times `factor`; zeros where there is no query.
template <class S>
void read_lanes(const LkTensor& x, int64_t row, int64_t head, int64_t query, int valid,
                const TileShape<Compute<S>>& shape, Compute<S> factor, Compute<S>* rows,
                Vec<Compute<S>>* poison) {
  using T = Compute<S>;
  const S* base = static_cast<const S*>(x.data) + row * x.batch_stride + head * x.head_stride;
  for (int i = 0; i < kLanes<T>; ++i) {
    T* out = rows + int64_t{i} * shape.stride;
    if (i < valid) {
      read_row(base + (query + i) * x.seq_stride, out, shape.dim, shape.padded, poison);
      if (factor == T(1)) continue;
      for (int d = 0; d < shape.padded; d += kLanes<T>) {
        const Vec<T> x = load(out + d) * factor;
        *poison += x * T(0);  // it may have become infinite
        store(out + d, x);
      }
    } else {
      for (int d = 0; d < shape.padded; d += kLanes<T>) store(out + d, Vec<T>{});
    }
  }
}

// columns[d * stride + i] = rows[i][d], for one vector of a panel.
template <class T>
void rows_to_columns(const TileShape<T>& shape, const T* rows, T* columns, int stride) {
  for (int d = 0; d < shape.padded; d += kLanes<T>) {
    transpose_block(rows + d, shape.stride, columns + int64_t{d} * stride, stride);
  }
}

// The inverse, times `factor` per lane, and written to the rows of a tensor.
template <class S>
void write_lanes(const LkTensor& x, int64_t row, int64_t head, int64_t query, int valid,
                 const TileShape<Compute<S>>& shape, Compute<S>* columns, int stride,
                 Vec<Compute<S>> factor, Compute<S>* rows) {
  using T = Compute<S>;
  for (int d = 0; d < shape.padded; ++d) {
    store(columns + int64_t{d} * stride, load(columns + int64_t{d} * stride) * factor);
  }
  for (int d = 0; d < shape.padded; d += kLanes<T>) {
    transpose_block(columns + int64_t{d} * stride, stride, rows + d, shape.stride);
  }
  S* base = static_cast<S*>(x.data) + row * x.batch_stride + head * x.head_stride;
  for (int i = 0; i < valid; ++i) {
    write_row(rows + int64_t{i} * shape.stride, base + (query + i) * x.seq_stride, shape.dim);
  }
}

// The soft cap: score = softcap * tanh(score / softcap). The softmax scale is in the queries.
template <class T>
struct SoftCap {
  T inverse, cap;  // 0 without one

  explicit SoftCap(const LkAttention& a)
      : inverse(a.softcap > 0 ? T(1 / a.softcap) : T(0)), cap(T(a.softcap)) {}
};

// The rare tile in which an operand is infinite or NaN and must not reach lanes that the mask
// hides it from, as 0 * NaN would. Sums run in the order of accumulate_columns.
template <class T>
__attribute__((noinline)) void accumulate_columns_masked(
    const T* a, const PanelKeys& keys, const KeyChunk& chunk, int dim, const T* p,
    int vectors, const T* alpha, const KeyMask<T>& mask, const Int<T>* query,
    const Int<T>* position, T* c) {
  constexpr int W = kLanes<T>;
  for (int d = 0; d < dim; ++d) {
    for (int v = 0; v < vectors; ++v) {
      Vec<T> acc = {};
      for (int n = 0; n < keys.count; ++n) {
        const IntVec<T> seen = mask.visible(chunk.key[keys.index[n]], load_int<T>(query + v * W),
                                            load_int<T>(position + v * W));
        const Vec<T> sum =
            acc + splat(a[keys.offset[n] + d]) * load(p + (n * vectors + v) * W);
        acc = seen ? sum : acc;
      }
      T* out = c + (int64_t{d} * vectors + v) * W;
      store(out, load(out) * (alpha ? load(alpha + v * W) : splat(T(1))) + acc);
    }
  }
}

// Likewise for accumulate_rows.
template <class T>
__attribute__((noinline)) void accumulate_rows_masked(const T* p, int lanes, const PanelKeys& keys,
                                                      const KeyChunk& chunk, int padded, const T* b,
                                                      int64_t stride, const KeyMask<T>& mask,
                                                      const Int<T>* query, const Int<T>* position,
                                                      T* c) {
  constexpr int W = kLanes<T>;
  for (int n = 0; n < keys.count; ++n) {
    const int32_t j = chunk.key[keys.index[n]];
    for (int d = 0; d < padded; d += W) {
      Vec<T> acc = {};
      for (int i = 0; i < lanes; ++i) {
        if (mask.visible(j, query[i], position[i])) {
          acc += splat(p[n * lanes + i]) * load(b + i * stride + d);
        }
      }
      T* out = c + keys.offset[n] + d;
      store(out, load(out) + acc);
    }
  }
}

}  // namespace LK_ISA
