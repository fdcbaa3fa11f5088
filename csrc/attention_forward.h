// Forward pass: FlashAttention's online softmax over the visible tiles of a block of queries.
#pragma once

#include "attention.h"

namespace LK_ISA {

template <class S>
struct ForwardWorkspace {
  using E = Word<S>;
  using T = Compute<S>;
  TileShape<E> shape;
  Arena arena;
  LaneQueries<T> lanes;
  PanelKeys keys;
  KeyChunk* chunk;
  uint16_t* tiles;       // [key blocks]
  E* q;                  // [panel][words][lanes of the panel]
  T* out;                // [panel][dim][lanes of the panel]
  T *max, *sum, *alpha;  // [lanes]
  E* q_rows;             // [W][word_stride]
  T* out_rows;           // [W][stride]
  E *k, *v, *v_across;   // [kChunk][word_stride], the last as words across keys
  E *v_columns, *finite; // the same for accumulate_columns, and what is finite of it
  T* scores;             // [kChunk][lanes of a panel]

  ForwardWorkspace(const LkAttention& a, void* base)
      : shape(a), arena(base), lanes(arena, shape.max_vectors), keys(arena) {
    const int64_t num_lanes = shape.max_vectors * kLanes<T>;
    chunk = arena.take<KeyChunk>(1);
    tiles = arena.take<uint16_t>(a.seq / a.block_n + 1);
    q = arena.take<E>(num_lanes * shape.padded_words);
    out = arena.take<T>(num_lanes * shape.padded);
    max = arena.take<T>(num_lanes);
    sum = arena.take<T>(num_lanes);
    alpha = arena.take<T>(kMaxVectors * kLanes<T>);
    q_rows = arena.take<E>(int64_t{kLanes<T>} * shape.word_stride);
    out_rows = arena.take<T>(int64_t{kLanes<T>} * shape.stride);
    k = arena.take<E>(int64_t{kChunk} * shape.word_stride);
    v = arena.take<E>(int64_t{kChunk} * shape.word_stride);
    v_across = kFold<E> == 1 ? v : arena.take<E>(shape.across_size());
    v_columns = kTiled<E> ? arena.take<E>(shape.columns_size()) : v_across;
    finite = arena.take<E>(shape.columns_size());
    scores = arena.take<T>(int64_t{kChunk} * kMaxVectors * kLanes<T>);
  }
};

// Soft cap and mask, where a score needs either.
template <class T, int V>
void finish_scores(const SoftCap<T>& softcap, const KeyMask<T>& mask, const KeyChunk& chunk,
                   const PanelKeys& keys, const Int<T>* query, const Int<T>* position, T* scores) {
  constexpr int W = kLanes<T>;
  if (softcap.cap != 0) {
    for (int n = 0; n < keys.count * V; ++n) {
      store(scores + n * W, tanh<T>(load(scores + n * W) * softcap.inverse) * softcap.cap);
    }
  }
  if (!keys.masked) return;
  for (int n = 0; n < keys.count; ++n) {
    if (!keys.needs_mask[n]) continue;
    const int32_t j = chunk.key[keys.index[n]];
    for (int v = 0; v < V; ++v) {
      T* x = scores + (n * V + v) * W;
      const IntVec<T> seen =
          mask.visible(j, load_int<T>(query + v * W), load_int<T>(position + v * W));
      store(x, seen ? load(x) : splat(-kInfinity<T>));
    }
  }
}

// Turns scores into exp(score - max), updating the running maximum and sum of each lane; alpha
// is what the sums so far must be multiplied by.
template <class T, int V>
void online_softmax_update(int count, T* scores, T* max, T* sum, T* alpha) {
  constexpr int W = kLanes<T>;
  // Summed per chunk: one long sum would lose a digit over a few thousand keys.
  Vec<T> m[V], l[V] = {}, base[V];
  LK_UNROLL for (int v = 0; v < V; ++v) m[v] = load(max + v * W);
  for (int n = 0; n < count; ++n) {
    LK_UNROLL for (int v = 0; v < V; ++v) m[v] = maximum(load(scores + (n * V + v) * W), m[v]);
  }
  LK_UNROLL for (int v = 0; v < V; ++v) {
    const Vec<T> before = load(max + v * W);
    // A lane that has seen nothing yet keeps a maximum of -inf, which must not meet itself.
    base[v] = m[v] == splat(-kInfinity<T>) ? Vec<T>{} : m[v];
    const Vec<T> a = exp2<T>((before - base[v]) * kLog2E<T>);
    store(alpha + v * W, a);
    store(sum + v * W, load(sum + v * W) * a);
    store(max + v * W, m[v]);
  }
  for (int n = 0; n < count; ++n) {
    LK_UNROLL for (int v = 0; v < V; ++v) {
      T* x = scores + (n * V + v) * W;
      const Vec<T> p = exp2<T>((load(x) - base[v]) * kLog2E<T>);
      l[v] += p;
      store(x, p);
    }
  }
  LK_UNROLL for (int v = 0; v < V; ++v) store(sum + v * W, load(sum + v * W) + l[v]);
}

template <class S, int V>
void forward_panel(const LkAttention& a, ForwardWorkspace<S>& w, const SoftCap<Compute<S>>& softcap,
                   const KeyMask<Compute<S>>& mask, const Panel& panel, bool v_finite) {
  using E = Word<S>;
  using T = Compute<S>;
  constexpr int W = kLanes<T>;
  const int lane = panel.first * W;
  const Int<T>*query = w.lanes.query + lane, *position = w.lanes.position + lane;
  const TileShape<E>& shape = w.shape;
  const PanelKeys& keys = w.keys;
  T* out = w.out + int64_t{lane} * shape.padded;
  w.keys.select(a, mask, *w.chunk, panel, shape);
  if (keys.count == 0) return;

  const T scale = T(a.scale);
  dot_rows<E, V>(w.k, shape.word_stride, keys.index, keys.count, shape.words,
                 w.q + int64_t{lane} * shape.padded_words, &scale, w.scores);
  finish_scores<T, V>(softcap, mask, *w.chunk, keys, query, position, w.scores);
  online_softmax_update<T, V>(keys.count, w.scores, w.max + lane, w.sum + lane, w.alpha);
  const E* p = round_across<E>(w.scores, keys.count, V * W, kGroupWords<E>,
                               reinterpret_cast<E*>(w.scores));
  if (v_finite || !keys.masked) {
    accumulate_columns<E, V>(w.v_columns, keys.offset, keys.words, shape.dim, p, w.alpha, out);
  } else {
    accumulate_columns_masked<E, V>(w.v_columns, w.finite, keys, *w.chunk, shape.dim, p, w.alpha,
                                    mask, query, position, out);
  }
}

template <class S>
void forward_range(const LkAttention& a, int64_t row, int64_t kv_head, const BlockRange& range,
                   ForwardWorkspace<S>& w) {
  using E = Word<S>;
  using T = Compute<S>;
  constexpr int W = kLanes<T>;
  const SoftCap<T> softcap(a);
  const KeyMask<T> mask(a, row);
  const BlockLanes<T> lanes(range);
  w.lanes.fill(a, row, lanes);

  for (int first = 0; first < lanes.vectors; first += lanes.panel_vectors(first)) {
    const int count = lanes.panel_vectors(first);
    E* q = w.q + int64_t{first} * W * w.shape.padded_words;
    for (int v = first; v < first + count; ++v) {
      if (v + 1 < lanes.vectors) {
        prefetch_lanes<S>(a.q, row, lanes.head(v + 1), lanes.query(v + 1), lanes.valid(v + 1),
                          w.shape.dim);
      }
      read_lanes<S>(a.q, row, lanes.head(v), lanes.query(v), lanes.valid(v), w.shape, w.q_rows);
      rows_to_columns(w.shape, w.q_rows, q + (v - first) * W, count * W);
      // A sink is one more score, whose value is zero.
      const T sink = a.sinks ? static_cast<const T*>(a.sinks)[lanes.head(v)] : -kInfinity<T>;
      store(w.max + v * W, splat(sink));
      store(w.sum + v * W, splat(T(sink != -kInfinity<T>)));
    }
    std::memset(w.out + int64_t{first} * W * w.shape.padded, 0,
                int64_t{count} * W * w.shape.padded * sizeof(T));
  }

  const QueryRange queries(a, row, range.query_begin, range.query_end);
  TileCursor cursor(a, row, queries, w.tiles);
  while (cursor.next(w.chunk)) {
    pack_keys<S>(a.k, row, kv_head, *w.chunk, w.shape, w.k);
    const bool v_finite = pack_keys<S>(a.v, row, kv_head, *w.chunk, w.shape, w.v);
    keys_to_columns(w.shape, w.v, w.chunk->count, w.v_across, w.v_columns);
    if (!v_finite) copy_finite(w.v_columns, w.shape.columns_size(), w.finite);
    for (int first = 0; first < lanes.vectors; first += lanes.panel_vectors(first)) {
      const Panel panel = lanes.panel(a, row, first);
      switch (panel.vectors) {
        case 1: forward_panel<S, 1>(a, w, softcap, mask, panel, v_finite); break;
        case 2: forward_panel<S, 2>(a, w, softcap, mask, panel, v_finite); break;
        default: forward_panel<S, kMaxVectors>(a, w, softcap, mask, panel, v_finite); break;
      }
    }
  }

  T* lse = static_cast<T*>(a.lse);
  for (int first = 0; first < lanes.vectors; first += lanes.panel_vectors(first)) {
    const int count = lanes.panel_vectors(first);
    for (int v = first; v < first + count; ++v) {
      const Vec<T> sum = load(w.sum + v * W), max = load(w.max + v * W);
      const auto empty = sum == Vec<T>{};  // every visible score was -inf
      const Vec<T> inverse = empty ? Vec<T>{} : T(1) / sum;
      // NaN must survive the bit arithmetic of log2.
      Vec<T> value = max + log2<T>(sum) * kLn2<T>;
      value = empty ? splat(-kInfinity<T>) : (sum == sum ? value : sum);
      T buffer[W];
      store(buffer, value);
      std::memcpy(lse + (row * a.heads + lanes.head(v)) * a.seq + lanes.query(v), buffer,
                  lanes.valid(v) * sizeof(T));
      write_lanes<S>(a.out, row, lanes.head(v), lanes.query(v), lanes.valid(v), w.shape,
                     w.out + int64_t{first} * W * w.shape.padded + (v - first) * W, count * W,
                     inverse, w.out_rows);
    }
  }
}

template <class S>
size_t forward_scratch(const LkAttention& a) {
  return ForwardWorkspace<S>(a, nullptr).arena.size();
}

template <class S>
int64_t forward_queries(const LkAttention& a) {
  return TileShape<Word<S>>(a).queries(a);
}

template <class S>
void attention_forward(const LkAttention& a, int64_t row, int64_t kv_head, int64_t query_begin,
                       int64_t query_end, void* scratch) {
  ForwardWorkspace<S> workspace(a, scratch);
  const TileRegisters<Word<S>> tiles;
  for_head_groups(a, kv_head, query_begin, query_end, workspace.shape,
                  [&](const BlockRange& range) {
                    forward_range<S>(a, row, kv_head, range, workspace);
                  });
}

}  // namespace LK_ISA
