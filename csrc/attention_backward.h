// Backward pass: five products per visible tile, queries outside and keys inside.
//
// dQ stays with its block of queries; dK and dV are added to their rows, which only one thread
// does at a time and always in the same order (see BackwardTask).
#pragma once

#include "attention.h"
#include "kernels.h"

namespace LK_ISA {

template <class S>
struct BackwardWorkspace {
  using E = Word<S>;
  using T = Compute<S>;
  TileShape<E> shape;
  Arena arena;
  LaneQueries<T> lanes;
  PanelKeys keys;
  KeyChunk* chunk;
  uint16_t* tiles;                 // [key blocks]
  E *q_across, *dout_across;       // [lanes / kFold][stride], words across lanes
  E *q, *dout;                     // [panel][words][lanes of the panel]
  T* dq;                           // [panel][dim][lanes of the panel]
  T *lse, *delta;                  // [lanes]
  bool *q_finite, *dout_finite;    // [vectors]
  E *rows, *out;                   // [W][word_stride] and, without tiles, [words][W] of one vector
  T* dq_rows;                      // [W][stride]
  E *k, *v, *k_across;             // [kChunk][word_stride], the last as words across keys
  E *k_columns, *finite_k;         // the same for accumulate_columns, and what is finite of it
  E* finite_lanes;                 // what is finite of a panel's q_across or dout_across
  T *dk, *dv;                      // [kChunk][stride]
  T *p, *ds;                       // [kChunk][lanes of a panel]
  E* ds_across;                    // the same as words across keys

  BackwardWorkspace(const LkAttention& a, void* base)
      : shape(a), arena(base), lanes(arena, shape.max_vectors), keys(arena) {
    const int64_t num_lanes = shape.max_vectors * kLanes<T>;
    chunk = arena.take<KeyChunk>(1);
    tiles = arena.take<uint16_t>(a.seq / a.block_n + 1);
    q_across = arena.take<E>(num_lanes / kFold<E> * shape.stride);
    dout_across = arena.take<E>(num_lanes / kFold<E> * shape.stride);
    q = arena.take<E>(num_lanes * shape.padded_words);
    dout = arena.take<E>(num_lanes * shape.padded_words);
    dq = arena.take<T>(num_lanes * shape.padded);
    lse = arena.take<T>(num_lanes);
    delta = arena.take<T>(num_lanes);
    q_finite = arena.take<bool>(shape.max_vectors);
    dout_finite = arena.take<bool>(shape.max_vectors);
    rows = arena.take<E>(int64_t{kLanes<T>} * shape.word_stride);
    out = kTiled<E> ? nullptr : arena.take<E>(int64_t{kLanes<T>} * shape.padded_words);
    dq_rows = arena.take<T>(int64_t{kLanes<T>} * shape.stride);
    k = arena.take<E>(int64_t{kChunk} * shape.word_stride);
    v = arena.take<E>(int64_t{kChunk} * shape.word_stride);
    k_across = kFold<E> == 1 ? k : arena.take<E>(shape.across_size());
    k_columns = kTiled<E> ? arena.take<E>(shape.columns_size()) : k_across;
    finite_k = arena.take<E>(shape.columns_size());
    finite_lanes = arena.take<E>(int64_t{kMaxVectors} * kLanes<T> / kFold<E> * shape.stride);
    dk = arena.take<T>(int64_t{kChunk} * shape.stride);
    dv = arena.take<T>(int64_t{kChunk} * shape.stride);
    constexpr int64_t kScores = int64_t{kChunk} * kMaxVectors * kLanes<T>;
    p = arena.take<T>(kScores);
    ds = arena.take<T>(kScores);
    ds_across = kFold<E> == 1 ? nullptr : arena.take<E>(kScores / kFold<E>);
  }
};

// Whether dk and dv hold the numbers they are summed in.
template <class S>
constexpr bool kInPlace = sizeof(S) == sizeof(Compute<S>);

template <class T>
LK_INLINE void add_row(T factor, const T* in, T* out, int dim) {
  constexpr int W = kLanes<T>;
  int d = 0;
  for (; d + W <= dim; d += W) store(out + d, load(in + d) * factor + load(out + d));
  for (; d < dim; ++d) out[d] += in[d] * factor;
}

template <class S>
S* key_row(const LkTensor& x, const BackwardTask& task, int64_t key) {
  return static_cast<S*>(x.data) + task.row * x.batch_stride + task.kv_head * x.head_stride +
         key * x.seq_stride;
}

// The first of `count` ascending keys that is not below j.
inline int64_t lower_bound(const int32_t* keys, int64_t count, int64_t j) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < j) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Where a task sums dK and dV: accumulators for keys that it shares; for its own, the tensors
// themselves or a copy of them in the compute type.
template <class S>
class KeySums {
 public:
  using T = Compute<S>;

  // `own` has room for two rows per query, unless keys are summed in place.
  KeySums(const LkAttention& a, const BackwardTask& task, T* own)
      : a_(a),
        task_(task),
        until_(a.visible_until + task.row * a.seq),
        shared_(static_cast<T*>(task.accumulators)),
        own_(own) {
    const int64_t num_own = task.query_end - task.query_begin;
    if (task.num_shared) std::memset(shared_, 0, 2 * task.num_shared * a.dim * sizeof(T));
    if constexpr (kInPlace<S>) {
      for (int64_t j = task.query_begin; j < task.query_end; ++j) {
        std::memset(key_row<S>(a.dk, task, j), 0, a.dim * sizeof(T));
        std::memset(key_row<S>(a.dv, task, j), 0, a.dim * sizeof(T));
      }
    } else {
      std::memset(own_, 0, 2 * num_own * a.dim * sizeof(T));
    }
  }

  // The rows of dK and dV of key j. Keys come in runs: `hint` remembers where the last one was.
  struct Rows {
    T *dk, *dv;
  };
  LK_INLINE Rows rows(int64_t j, int64_t* hint) const {
    if (is_shared(j)) {
      int64_t at = *hint + 1;
      if (at >= task_.num_shared || task_.shared[at] != j) {
        at = lower_bound(task_.shared, task_.num_shared, j);
      }
      *hint = at;
      T* dk = shared_ + at * a_.dim;
      return {dk, dk + task_.num_shared * a_.dim};
    }
    if constexpr (kInPlace<S>) return {key_row<S>(a_.dk, task_, j), key_row<S>(a_.dv, task_, j)};
    T* dk = own_ + (j - task_.query_begin) * a_.dim;
    return {dk, dk + (task_.query_end - task_.query_begin) * a_.dim};
  }

  // Rounds own keys that are not shared to the type of dk and dv.
  void finish() const {
    if constexpr (!kInPlace<S>) {
      int64_t hint = -1;
      for (int64_t j = task_.query_begin; j < task_.query_end; ++j) {
        if (is_shared(j)) continue;
        const Rows sums = rows(j, &hint);
        write_row(sums.dk, key_row<S>(a_.dk, task_, j), static_cast<int>(a_.dim));
        write_row(sums.dv, key_row<S>(a_.dv, task_, j), static_cast<int>(a_.dim));
      }
    }
  }

 private:
  bool is_shared(int64_t j) const {
    return j < task_.query_begin || (!kInPlace<S> && until_[j] > task_.query_end);
  }
  const LkAttention& a_;
  const BackwardTask& task_;
  const int32_t* until_;
  T *shared_, *own_;
};

// Scores become P, and dP becomes dS without the softmax scale.
template <class T, int V>
void softmax_backward(const SoftCap<T>& softcap, const KeyMask<T>& mask, const KeyChunk& chunk,
                      const PanelKeys& keys, const Int<T>* query, const Int<T>* position,
                      const T* lse, const T* delta, T* p, T* ds) {
  constexpr int W = kLanes<T>;
  Vec<T> l[V], d[V];
  LK_UNROLL for (int v = 0; v < V; ++v) {
    l[v] = load(lse + v * W);
    d[v] = load(delta + v * W);
  }
  for (int n = 0; n < keys.count; ++n) {
    LK_UNROLL for (int v = 0; v < V; ++v) {
      const int at = (n * V + v) * W;
      Vec<T> s = load(p + at), cap = splat(T(1));
      if (softcap.cap != 0) {
        const Vec<T> t = tanh<T>(s * softcap.inverse);
        s = t * softcap.cap;
        cap -= t * t;
      }
      const Vec<T> weight = exp2<T>((s - l[v]) * kLog2E<T>);
      store(p + at, weight);
      store(ds + at, weight * (load(ds + at) - d[v]) * cap);
    }
  }
  if (!keys.masked) return;
  for (int n = 0; n < keys.count; ++n) {
    if (!keys.needs_mask[n]) continue;
    const int32_t j = chunk.key[keys.index[n]];
    for (int v = 0; v < V; ++v) {
      const int at = (n * V + v) * W;
      const IntVec<T> seen =
          mask.visible(j, load_int<T>(query + v * W), load_int<T>(position + v * W));
      store(p + at, seen ? load(p + at) : Vec<T>{});
      store(ds + at, seen ? load(ds + at) : Vec<T>{});
    }
  }
}

// `fresh` says that dk and dv of the chunk hold nothing yet.
template <class S, int V>
void backward_panel(const LkAttention& a, BackwardWorkspace<S>& w,
                    const SoftCap<Compute<S>>& softcap, const KeyMask<Compute<S>>& mask,
                    const Panel& panel, bool k_finite, bool fresh) {
  using E = Word<S>;
  using T = Compute<S>;
  constexpr int W = kLanes<T>;
  const int lane = panel.first * W;
  const Int<T>*query = w.lanes.query + lane, *position = w.lanes.position + lane;
  const TileShape<E>& shape = w.shape;
  const int64_t columns = int64_t{lane} * shape.padded_words;
  const int64_t rows = int64_t{lane / kFold<E>} * shape.stride;
  PanelKeys& keys = w.keys;
  keys.select(a, mask, *w.chunk, panel, shape);
  if (keys.count == 0) return;

  const T scale = T(a.scale), one = 1;
  dot_rows<E, V>(w.k, shape.word_stride, keys.index, keys.count, shape.words, w.q + columns,
                 &scale, w.p);
  dot_rows<E, V>(w.v, shape.word_stride, keys.index, keys.count, shape.words, w.dout + columns,
                 &one, w.ds);
  softmax_backward<T, V>(softcap, mask, *w.chunk, keys, query, position, w.lse + lane,
                         w.delta + lane, w.p, w.ds);

  const E* ds_across = round_across<E>(w.ds, keys.count, V * W, kGroupWords<E>, w.ds_across);
  T* dq = w.dq + int64_t{lane} * shape.padded;
  if (k_finite || !keys.masked) {
    accumulate_columns<E, V>(w.k_columns, keys.offset, keys.words, shape.dim, ds_across, nullptr,
                             dq);
  } else {
    accumulate_columns_masked<E, V>(w.k_columns, w.finite_k, keys, *w.chunk, shape.dim, ds_across,
                                    nullptr, mask, query, position, dq);
  }
  bool q_finite = true, dout_finite = true;
  for (int v = panel.first; v < panel.first + V; ++v) {
    q_finite &= w.q_finite[v];
    dout_finite &= w.dout_finite[v];
  }
  const auto add_rows = [&](bool finite, T* weights, const E* b, T* c) {
    const E* words = round_along<E>(weights, keys.count * V * W);
    constexpr int kWords = V * W / kFold<E>;
    if (finite || !keys.masked) {
      accumulate_rows<E>(words, kWords, keys.index, keys.count, shape.vectors, b, shape.stride,
                         fresh, c);
    } else {
      copy_finite(b, int64_t{kWords} * shape.stride, w.finite_lanes);
      accumulate_rows_masked<E>(words, kWords, keys, *w.chunk, shape.vectors, b, w.finite_lanes,
                                shape.stride, mask, query, position, c);
    }
  };
  add_rows(dout_finite, w.p, w.dout_across + rows, w.dv);
  add_rows(q_finite, w.ds, w.q_across + rows, w.dk);
}

// Reads the queries of a block: rows for dK and dV, columns for the scores, and statistics.
template <class S>
void read_queries(const LkAttention& a, int64_t row, const BlockLanes<Compute<S>>& lanes,
                  BackwardWorkspace<S>& w) {
  using E = Word<S>;
  using T = Compute<S>;
  constexpr int W = kLanes<T>;
  const TileShape<E>& shape = w.shape;
  // Reads rows of one vector's lanes, to words across lanes, and as columns to others.
  const auto read = [&](const LkTensor& x, int v, E* across, E* columns, int stride) {
    E* rows = across && kFold<E> == 1 ? across : w.rows;
    const bool finite =
        read_lanes<S>(x, row, lanes.head(v), lanes.query(v), lanes.valid(v), shape, rows);
    if (across) words_across(rows, shape.word_stride, W, shape.padded_words, across, shape.stride);
    if (columns) rows_to_columns(shape, rows, columns, stride);
    return finite;
  };
  for (int first = 0; first < lanes.vectors; first += lanes.panel_vectors(first)) {
    const int count = lanes.panel_vectors(first);
    const int64_t columns = int64_t{first} * W * shape.padded_words;
    for (int v = first; v < first + count; ++v) {
      const int64_t head = lanes.head(v), query = lanes.query(v);
      const int valid = lanes.valid(v);
      const int64_t at = int64_t{v} * W;
      const LkTensor* const tensors[] = {&a.q, &a.dout, &a.out};
      for (const LkTensor* x : tensors) {
        if (v + 1 == lanes.vectors) break;
        prefetch_lanes<S>(*x, row, lanes.head(v + 1), lanes.query(v + 1), lanes.valid(v + 1),
                          shape.dim);
      }
      const int64_t across = at / kFold<E> * shape.stride;
      E *q = w.q + columns + (v - first) * W, *dout = w.dout + columns + (v - first) * W;
      w.q_finite[v] = read(a.q, v, w.q_across + across, q, count * W);
      w.dout_finite[v] = read(a.dout, v, w.dout_across + across, dout, count * W);
      read(a.out, v, nullptr, w.out, W);
      // delta = sum of dout * out, in the order in which dP sums dout * v: a query that sees a
      // single key has out = v, and then a gradient of exactly zero.
      Vec<T> delta = {};
      if constexpr (kTiled<E>) {
        T products[W * W];
        const int32_t first_row = 0;
        dot_tiles(w.rows, shape.word_stride, &first_row, W, shape.words, dout, count * W, W,
                  products);
        for (int i = 0; i < W; ++i) delta[i] = products[i * W + i];
      }
      for (int begin = 0; !kTiled<E> && begin < shape.words; begin += kDepth) {
        const int end = begin + kDepth < shape.words ? begin + kDepth : shape.words;
        Vec<T> sum = {};
        for (int d = begin; d < end; ++d) {
          sum = multiply_add(load_words(w.out + int64_t{d} * W),
                             load_words(dout + int64_t{d} * count * W), sum);
        }
        delta += sum;
      }
      store(w.delta + at, delta);
      const int64_t stat = (row * a.heads + head) * a.seq + query;
      std::memset(w.lse + at, 0, W * sizeof(T));
      std::memcpy(w.lse + at, static_cast<const T*>(a.lse) + stat, valid * sizeof(T));
      if (a.delta) {
        std::memcpy(static_cast<T*>(a.delta) + stat, w.delta + at, valid * sizeof(T));
      }
    }
    std::memset(w.dq + int64_t{first} * W * shape.padded, 0,
                int64_t{count} * W * shape.padded * sizeof(T));
  }
}

template <class S>
void backward_range(const LkAttention& a, int64_t row, int64_t kv_head, const BlockRange& range,
                    BackwardWorkspace<S>& w, const KeySums<S>& sums) {
  using T = Compute<S>;
  constexpr int W = kLanes<T>;
  const SoftCap<T> softcap(a);
  const KeyMask<T> mask(a, row);
  const BlockLanes<T> lanes(range);
  w.lanes.fill(a, row, lanes);
  read_queries<S>(a, row, lanes, w);

  const QueryRange queries(a, row, range.query_begin, range.query_end);
  TileCursor cursor(a, row, queries, w.tiles);
  while (cursor.next(w.chunk)) {
    const bool k_finite = pack_keys<S>(a.k, row, kv_head, *w.chunk, w.shape, w.k);
    pack_keys<S>(a.v, row, kv_head, *w.chunk, w.shape, w.v);
    keys_to_columns(w.shape, w.k, w.chunk->count, w.k_across, w.k_columns);
    if (!k_finite) copy_finite(w.k_columns, w.shape.columns_size(), w.finite_k);
    // The first panel writes dk and dv if it visits all keys, none of them under a mask.
    bool fresh = w.chunk->full && !lanes.panel(a, row, 0).ragged;
    if (!fresh) {
      const size_t bytes = int64_t{w.chunk->count} * w.shape.stride * sizeof(T);
      std::memset(w.dk, 0, bytes);
      std::memset(w.dv, 0, bytes);
    }
    for (int first = 0; first < lanes.vectors; first += lanes.panel_vectors(first)) {
      const Panel panel = lanes.panel(a, row, first);
      switch (panel.vectors) {
        case 1: backward_panel<S, 1>(a, w, softcap, mask, panel, k_finite, fresh); break;
        case 2: backward_panel<S, 2>(a, w, softcap, mask, panel, k_finite, fresh); break;
        default: backward_panel<S, kMaxVectors>(a, w, softcap, mask, panel, k_finite, fresh); break;
      }
      fresh = false;
    }
    int64_t hint = -1;
    for (int n = 0; n < w.chunk->count; ++n) {
      const auto rows = sums.rows(w.chunk->key[n], &hint);
      add_row(T(a.scale), w.dk + int64_t{n} * w.shape.stride, rows.dk, w.shape.dim);
      add_row(T(1), w.dv + int64_t{n} * w.shape.stride, rows.dv, w.shape.dim);
    }
  }

  for (int first = 0; first < lanes.vectors; first += lanes.panel_vectors(first)) {
    const int count = lanes.panel_vectors(first);
    for (int v = first; v < first + count; ++v) {
      write_lanes<S>(a.dq, row, lanes.head(v), lanes.query(v), lanes.valid(v), w.shape,
                     w.dq + int64_t{first} * W * w.shape.padded + (v - first) * W, count * W,
                     splat(T(a.scale)), w.dq_rows);
    }
  }
}

template <class S>
void attention_backward(const LkAttention& a, const BackwardTask& task, void* scratch) {
  using T = Compute<S>;
  BackwardWorkspace<S> workspace(a, scratch);
  const TileRegisters<Word<S>> tiles;
  T* own = nullptr;
  if (!kInPlace<S>) {
    own = workspace.arena.template take<T>(2 * (task.query_end - task.query_begin) * a.dim);
  }
  const KeySums<S> sums(a, task, own);
  const int64_t queries = workspace.shape.queries(a);
  for (int64_t q = task.query_begin; q < task.query_end; q += queries) {
    const int64_t end = q + queries < task.query_end ? q + queries : task.query_end;
    for_head_groups(a, task.kv_head, q, end, workspace.shape, [&](const BlockRange& range) {
      backward_range<S>(a, task.row, task.kv_head, range, workspace, sums);
    });
  }
  sums.finish();
}

// Adds the rows that the tasks have summed by themselves to those of their keys, in place or, where
// that would round, in scratch first.
template <class S>
void attention_reduce(const LkAttention& a, const BackwardTask* tasks, int64_t num_tasks,
                      int64_t begin, int64_t end, void* scratch) {
  using T = Compute<S>;
  const int dim = static_cast<int>(a.dim);
  const auto sum_of = [&](int part, int64_t key) -> T* {
    if constexpr (kInPlace<S>) return key_row<S>(part ? a.dv : a.dk, tasks[0], key);
    return static_cast<T*>(scratch) + (part * kReduceKeys + key - begin) * dim;
  };
  bool touched[kReduceKeys] = {};
  for (const BackwardTask* task = tasks; task < tasks + num_tasks; ++task) {
    const int32_t* shared = task->shared;
    constexpr int kAhead = 8;
    for (int64_t i = lower_bound(shared, task->num_shared, begin);
         i < task->num_shared && shared[i] < end; ++i) {
      for (int part = 0; part < 2; ++part) {
        T* sum = sum_of(part, shared[i]);
        const T* in =
            static_cast<const T*>(task->accumulators) + (part * task->num_shared + i) * dim;
        if (i + kAhead < task->num_shared) prefetch_row(in + kAhead * dim, dim);
        if (!kInPlace<S> && !touched[shared[i] - begin]) std::memset(sum, 0, dim * sizeof(T));
        add_row(T(1), in, sum, dim);
      }
      touched[shared[i] - begin] = true;
    }
  }
  if (kInPlace<S>) return;
  for (int64_t key = begin; key < end; ++key) {
    if (!touched[key - begin]) continue;
    for (int part = 0; part < 2; ++part) {
      write_row(sum_of(part, key), key_row<S>(part ? a.dv : a.dk, tasks[0], key), dim);
    }
  }
}

template <class S>
size_t reduce_scratch(const LkAttention& a) {
  if (kInPlace<S>) return 0;
  // write_row reads whole vectors.
  return (2 * kReduceKeys * a.dim + kLanes<Compute<S>>) * sizeof(Compute<S>);
}

// dsinks[h] = -sum over rows and queries of exp(sinks[h] - lse) * delta
template <class S>
void attention_sinks(const LkAttention& a, int64_t head) {
  using T = Compute<S>;
  const T sink = static_cast<const T*>(a.sinks)[head];
  double sum = 0;
  for (int64_t row = 0; row < a.batch; ++row) {
    const int64_t at = (row * a.heads + head) * a.seq;
    const T *lse = static_cast<const T*>(a.lse) + at, *delta = static_cast<const T*>(a.delta) + at;
    for (int64_t i = 0; i < a.seq; ++i) {
      // The compiler's exp may be an AVX function of libm, which is fine: it is not inlined.
      sum -= __builtin_exp(double(sink) - double(lse[i])) * double(delta[i]);
    }
  }
  static_cast<T*>(a.dsinks)[head] = static_cast<T>(sum);
}

template <class S>
size_t backward_scratch(const LkAttention& a, int64_t queries) {
  using T = Compute<S>;
  Arena arena = BackwardWorkspace<S>(a, nullptr).arena;
  // write_row reads whole vectors.
  if (!kInPlace<S>) arena.take<T>(2 * queries * a.dim + kLanes<T>);
  return arena.size();
}

}  // namespace LK_ISA
