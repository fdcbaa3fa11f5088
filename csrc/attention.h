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

// Sizes of the tiles of one problem, whose products take words E.
template <class E>
struct TileShape {
  static constexpr int W = kLanes<Sum<E>>;
  int dim;             // head dim
  int words, vectors;  // words of a row, and vectors of its numbers
  int padded_words;    // the words in whole vectors
  int padded;          // the numbers of these
  // Of packed rows, in words, and of rows of sums, and of words across rows: not powers of two,
  // whose rows would share cache sets.
  int word_stride, stride;
  int max_vectors;  // of a block

  explicit TileShape(const LkAttention& a) {
    dim = static_cast<int>(a.dim);
    words = (dim + kFold<E> - 1) / kFold<E>;
    vectors = (dim + W - 1) / W;
    padded_words = (words + W - 1) / W * W;
    padded = padded_words * kFold<E>;
    constexpr int kPadding = 64 / static_cast<int>(sizeof(E));
    word_stride = padded_words + kPadding;
    stride = padded + kPadding;
    // As many lanes as pay for packing the keys, if what the backward pass keeps of them, about
    // four rows of words and one of sums, leaves half of the second-level cache free.
    const int64_t kept = (4 * padded_words + padded) * LK_VECTOR_BYTES;
    const int64_t fitting = second_level_cache() / 2 / kept;
    const int64_t enough = kBlockBytes / LK_VECTOR_BYTES;
    max_vectors = static_cast<int>(fitting < enough ? fitting : enough);
    max_vectors -= max_vectors % kMaxVectors;
    if (max_vectors < kMaxVectors) max_vectors = kMaxVectors;
  }

  // Words of the rows of a chunk as words across keys, and as accumulate_columns reads them.
  int64_t across_size() const { return int64_t{kChunk} / kFold<E> * stride; }
  int64_t columns_size() const {
    return kTiled<E> ? int64_t{padded} * kTileColumns : across_size();
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
template <class E, class Fn>
void for_head_groups(const LkAttention& a, int64_t kv_head, int64_t begin, int64_t end,
                     const TileShape<E>& shape, Fn fn) {
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

// Words across keys that are visited together.
template <class E>
constexpr int kGroupWords = kTiled<E> ? kTile : 1;
static_assert(kTileColumns * 2 == kChunk && kTileColumns % kTile == 0, "a chunk fills its columns");

// The keys of a chunk that a panel visits: positions in the chunk, ascending, in groups of which
// only the last of the chunk may lack some.
struct PanelKeys {
  int count, words;
  bool masked;          // some lane may not see some key
  int32_t* index;       // [kChunk]
  int64_t* offset;      // [kChunk], of the words across keys
  uint8_t* needs_mask;  // [kChunk], only if `masked`

  explicit PanelKeys(Arena& arena)
      : index(arena.take<int32_t>(kChunk)),
        offset(arena.take<int64_t>(kChunk)),
        needs_mask(arena.take<uint8_t>(kChunk)) {}

  template <class E>
  void select(const LkAttention& a, const KeyMask<Sum<E>>& mask, const KeyChunk& chunk,
              const Panel& panel, const TileShape<E>& shape) {
    constexpr int F = kFold<E>, kGroup = kGroupWords<E> * F;
    masked = panel.ragged || !chunk.full;
    count = words = 0;
    for (int first = 0; first < chunk.count; first += kGroup) {
      const int end = first + kGroup < chunk.count ? first + kGroup : chunk.count;
      if (!chunk.full) {
        if (chunk.key[first] >= panel.queries.end) break;  // keys ascend
        bool seen = false;
        for (int n = first; n < end; ++n) {
          seen |= panel.queries.sees(a, mask.until, mask.position, chunk.key[n]);
        }
        if (!seen) continue;
      }
      for (int n = first; n < end; n += F) {
        offset[words++] = int64_t{n / F} * (kTiled<E> ? 1 : shape.stride);
      }
      for (int n = first; n < end; ++n) {
        index[count] = n;
        needs_mask[count] =
            panel.ragged ||
            !(chunk.full || panel.queries.all_see(a, mask.until, mask.position, chunk.key[n]));
        ++count;
      }
    }
  }
};

// Rows lie too far apart for the hardware to foresee.
template <class S>
LK_INLINE void prefetch_row(const S* row, int dim) {
  for (int d = 0; d < dim; d += 64 / static_cast<int>(sizeof(S))) __builtin_prefetch(row + d);
}

// Rows of K or V that belong to a chunk, packed; tells whether they are finite.
template <class S>
bool pack_keys(const LkTensor& x, int64_t row, int64_t kv_head, const KeyChunk& chunk,
               const TileShape<Word<S>>& shape, Word<S>* packed) {
  Finiteness<Word<S>> finite;
  const S* base = static_cast<const S*>(x.data) + row * x.batch_stride + kv_head * x.head_stride;
  constexpr int kAhead = 12;
  for (int n = 0; n < chunk.count; ++n) {
    if (n + kAhead < chunk.count) {
      prefetch_row(base + chunk.key[n + kAhead] * x.seq_stride, shape.dim);
    }
    read_row(base + chunk.key[n] * x.seq_stride, packed + int64_t{n} * shape.word_stride, shape.dim,
             shape.padded_words, &finite);
  }
  return finite.all();
}

// Packed rows of keys as accumulate_columns reads them, by way of `across`.
template <class E>
void keys_to_columns(const TileShape<E>& shape, const E* packed, int count, E* across, E* columns) {
  words_across(packed, shape.word_stride, count, shape.padded_words, across, shape.stride);
  if constexpr (kTiled<E>) {
    using T = Sum<E>;  // as which words can be moved
    int words = (count + kFold<E> - 1) / kFold<E>;
    for (; words % kTile != 0; ++words) {
      std::memset(across + int64_t{words} * shape.stride, 0, shape.padded * sizeof(E));
    }
    for (int n = 0; n < words; n += kTile) {
      for (int d = 0; d < shape.padded; d += kTile) {
        transpose_block(reinterpret_cast<const T*>(across + int64_t{n} * shape.stride + d),
                        shape.stride, reinterpret_cast<T*>(columns + d * kTileColumns + n),
                        kTileColumns);
      }
    }
  }
}

// Asks for the rows that read_lanes will read.
template <class S>
void prefetch_lanes(const LkTensor& x, int64_t row, int64_t head, int64_t query, int valid,
                    int dim) {
  const S* base = static_cast<const S*>(x.data) + row * x.batch_stride + head * x.head_stride;
  for (int i = 0; i < valid; ++i) prefetch_row(base + (query + i) * x.seq_stride, dim);
}

// The rows of one vector's queries, zeros where there is no query; tells whether they are finite.
template <class S>
bool read_lanes(const LkTensor& x, int64_t row, int64_t head, int64_t query, int valid,
                const TileShape<Word<S>>& shape, Word<S>* rows) {
  using E = Word<S>;
  constexpr int W = kLanes<Sum<E>>;
  Finiteness<E> finite;
  const S* base = static_cast<const S*>(x.data) + row * x.batch_stride + head * x.head_stride;
  for (int i = 0; i < W; ++i) {
    E* out = rows + int64_t{i} * shape.word_stride;
    if (i < valid) {
      read_row(base + (query + i) * x.seq_stride, out, shape.dim, shape.padded_words, &finite);
    } else {
      for (int d = 0; d < shape.padded_words; d += W) store_words(out + d, WordVec<E>{});
    }
  }
  return finite.all();
}

// columns[d * stride + i] = rows[i][d], for the words of one vector of a panel.
template <class E>
void rows_to_columns(const TileShape<E>& shape, const E* rows, E* columns, int stride) {
  using T = Sum<E>;  // as which words can be moved
  for (int d = 0; d < shape.padded_words; d += kLanes<T>) {
    transpose_block(reinterpret_cast<const T*>(rows + d), shape.word_stride,
                    reinterpret_cast<T*>(columns + int64_t{d} * stride), stride);
  }
}

// The inverse for sums, times `factor` per lane, and written to the rows of a tensor.
template <class S>
void write_lanes(const LkTensor& x, int64_t row, int64_t head, int64_t query, int valid,
                 const TileShape<Word<S>>& shape, Compute<S>* columns, int stride,
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

// The soft cap: score = softcap * tanh(score / softcap).
template <class T>
struct SoftCap {
  T inverse, cap;  // 0 without one

  explicit SoftCap(const LkAttention& a)
      : inverse(a.softcap > 0 ? T(1 / a.softcap) : T(0)), cap(T(a.softcap)) {}
};

// What is infinite or NaN must not reach lanes that the mask hides it from, as 0 * NaN would. So
// where an operand holds some, products are of a copy without it, in which all sums are as ever,
// and then what the copy lacks is added where it is seen.
template <class E>
__attribute__((noinline)) void copy_finite(const E* words, int64_t count, E* out) {
  for (int64_t i = 0; i < count; i += kLanes<Sum<E>>) {
    store_words(out + i, finite_part(load_words(words + i)));
  }
}
template <class T>
LK_INLINE bool is_finite(T x) {
  return x * 0 == 0;
}

// Of a[word] that copy_finite has changed in `finite`.
template <class E, int V>
__attribute__((noinline)) void accumulate_columns_masked(
    const E* a, const E* finite, const PanelKeys& keys, const KeyChunk& chunk, int dim, const E* p,
    const Sum<E>* alpha, const KeyMask<Sum<E>>& mask, const Int<Sum<E>>* query,
    const Int<Sum<E>>* position, Sum<E>* c) {
  constexpr int kPanel = V * kLanes<Sum<E>>, F = kFold<E>;
  accumulate_columns<E, V>(finite, keys.offset, keys.words, dim, p, alpha, c);
  for (int n = 0; n < keys.count; ++n) {
    const int32_t j = chunk.key[keys.index[n]];
    for (int d = 0; d < dim; ++d) {
      const Sum<E> x = number(a[keys.offset[n / F] + d * kColumnStride<E>], n % F);
      if (is_finite(x)) continue;
      for (int i = 0; i < kPanel; ++i) {
        if (!mask.visible(j, query[i], position[i])) continue;
        c[d * kPanel + i] += number(p[n / F * kPanel + i], n % F) * x;
      }
    }
  }
}

// Likewise for accumulate_rows.
template <class E>
__attribute__((noinline)) void accumulate_rows_masked(
    const E* p, int words, const PanelKeys& keys, const KeyChunk& chunk, int vectors, const E* b,
    const E* finite, int64_t stride, const KeyMask<Sum<E>>& mask, const Int<Sum<E>>* query,
    const Int<Sum<E>>* position, Sum<E>* c) {
  constexpr int F = kFold<E>;
  accumulate_rows<E>(p, words, keys.index, keys.count, vectors, finite, stride, false, c);
  for (int i = 0; i < words * F; ++i) {
    for (int d = 0; d < vectors * kLanes<Sum<E>>; ++d) {
      const Sum<E> x = number(b[i / F * stride + d], i % F);
      if (is_finite(x)) continue;
      for (int n = 0; n < keys.count; ++n) {
        if (!mask.visible(chunk.key[keys.index[n]], query[i], position[i])) continue;
        c[keys.index[n] * stride + d] += number(p[n * words + i / F], i % F) * x;
      }
    }
  }
}

}  // namespace LK_ISA
