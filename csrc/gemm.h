// The matrix products of a tile, in three shapes around one register-blocked loop. `index` says
// which row is that of each key.
//
// A tile has `count` keys and V vectors of queries ("lanes"). Queries run along the lanes, so
// that K and V are read as scalars from their rows, no operand needs transposing per tile, and
// softmax statistics are lane-wise.
#pragma once

#include "tiles.h"

namespace LK_ISA {

// Vectors of a panel, and of a row that accumulate_rows takes at once; rows of a register block
// with V vectors: accumulators, operands and addresses must fit.
#if LK_VECTOR_REGISTERS == 32
#ifdef LK_TILES
constexpr int kMaxVectors = 2;  // tiles
#else
constexpr int kMaxVectors = 3;
#endif
constexpr int kMaxRowVectors = 4;
template <int V>
constexpr int kRows = V == 4 ? 6 : V == 3 ? 8 : 12;
#else
constexpr int kMaxVectors = 2, kMaxRowVectors = 2;
template <int V>
constexpr int kRows = V == 2 ? 6 : 8;
#endif

// Calls block(Constant<R>, first) over 0 .. count in blocks of R rows, then ever smaller ones.
template <int R, class Block>
LK_INLINE void for_row_blocks(int first, int count, Block block) {
  for (; first + R <= count; first += R) block(Constant<R>{}, first);
  if constexpr (R > 1) {
    constexpr int kNext = R > 4 ? 4 : R / 2;
    for_row_blocks<kNext>(first, count, block);
  }
}

// acc[r][v] = sum over k of a(r, k) * b[k * stride + v * lanes]
template <class E, int R, int V, class A>
LK_INLINE void multiply(int depth, A a, const E* b, int64_t stride, Vec<Sum<E>> (&acc)[R][V]) {
  using T = Sum<E>;
  constexpr int W = kLanes<T>;
  LK_UNROLL for (int r = 0; r < R; ++r) {
    LK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
  }
  for (int k = 0; k < depth; ++k, b += stride) {
    WordVec<E> x[V];
    LK_UNROLL for (int v = 0; v < V; ++v) x[v] = load_words(b + v * W);
    LK_UNROLL for (int r = 0; r < R; ++r) {
      const WordVec<E> y = splat_word(a(r, k));
      LK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = multiply_add(y, x[v], acc[r][v]);
    }
  }
}

template <class E, int R>
struct RowPointers {
  const E* row[R];
  LK_INLINE E operator()(int r, int k) const { return row[r][k]; }
};

template <class E>
struct ColumnGather {
  const E* base;
  const int64_t* offset;
  LK_INLINE E operator()(int r, int k) const { return base[offset[k] + r]; }
};

// c[n][lane] = sum over words d of a[index[n] * stride + d] * b[d * b_stride + lane], where neighbours
// of the same tile are neighbours in `a`.
template <class E>
LK_INLINE void dot_tiles(const E* a, int64_t stride, const int32_t* index, int count, int words,
                         const E* b, int64_t b_stride, int lanes, Sum<E>* c) {
  for_tile_blocks(count, lanes, [&](auto rows, auto columns, int n, int lane) LK_INLINE_LAMBDA {
    multiply_tiles<rows.value, columns.value>(
        words, Matrix{[&](int i, int d) { return a + index[n + i] * stride + d; }, stride},
        Matrix{[&](int d, int i) { return b + d * b_stride + lane + i; }, b_stride}, true,
        Matrix{[&](int i, int j) { return c + (n + i) * lanes + lane + j; }, lanes});
  });
}

// Products of so many words are summed apart, so that rounding does not grow with the head dim.
constexpr int kDepth = 128;

// c[n][lane] = factor * sum over words d of a[index[n] * stride + d] * b[d][lane]: scores, and the
// gradient of P.
template <class E, int V>
__attribute__((noinline)) void dot_rows(const E* a, int64_t stride, const int32_t* index, int count,
                                        int words, const E* b, const Sum<E>* factor,
                                        Sum<E>* c) {
  using T = Sum<E>;
  constexpr int W = kLanes<T>;
  if constexpr (kTiled<E>) {
    dot_tiles(a, stride, index, count, words, b, V * W, V * W, c);
    if (*factor == 1) return;
    for (int i = 0; i < count * V; ++i) store(c + i * W, load(c + i * W) * *factor);
    return;
  }
  for_row_blocks<kRows<V>>(0, count, [&](auto rows, int n) LK_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value;
    RowPointers<E, R> pointers;
    for (int d = 0; d < words; d += kDepth) {
      LK_UNROLL for (int r = 0; r < R; ++r) pointers.row[r] = a + index[n + r] * stride + d;
      Vec<T> acc[R][V];
      multiply<E>(words - d < kDepth ? words - d : kDepth, pointers, b + d * V * W, V * W, acc);
      LK_UNROLL for (int r = 0; r < R; ++r) {
        LK_UNROLL for (int v = 0; v < V; ++v) {
          T* out = c + ((n + r) * V + v) * W;
          const Vec<T> product = acc[r][v] * *factor;
          store(out, d == 0 ? product : load(out) + product);
        }
      }
    }
  });
}

// From one number of the rows that accumulate_columns reads to the next. Tile registers want the
// words of several rows as neighbours.
constexpr int kTileColumns = 64;
template <class E>
constexpr int kColumnStride = kTiled<E> ? kTileColumns : 1;

// c[d][lane] = c[d][lane] * alpha[lane] + sum over words n of a[offset[n] + d * kColumnStride] *
// p[n][lane]: the output and the gradient of the queries, both transposed. A null alpha is 1.
template <class E, int V>
__attribute__((noinline)) void accumulate_columns(const E* a, const int64_t* offset, int words,
                                                  int dim, const E* p, const Sum<E>* alpha,
                                                  Sum<E>* c) {
  using T = Sum<E>;
  constexpr int W = kLanes<T>;
  Vec<T> factor[V];
  for (int v = 0; v < V; ++v) factor[v] = alpha ? load(alpha + v * W) : splat(T(1));
  if constexpr (kTiled<E>) {
    for (int d = 0; alpha && d < dim; ++d) {
      for (int v = 0; v < V; ++v) {
        T* out = c + (d * V + v) * W;
        store(out, load(out) * factor[v]);
      }
    }
    for_tile_blocks(dim, V * W, [&](auto rows, auto columns, int d, int lane) LK_INLINE_LAMBDA {
      constexpr int kStride = kColumnStride<E>;
      multiply_tiles<rows.value, columns.value>(
          words, Matrix{[&](int i, int n) { return a + offset[n] + (d + i) * kStride; }, kStride},
          Matrix{[&](int n, int i) { return p + n * V * W + lane + i; }, V * W}, false,
          Matrix{[&](int i, int j) { return c + (d + i) * V * W + lane + j; }, V * W});
    });
    return;
  }
  for_row_blocks<kRows<V>>(0, dim, [&](auto rows, int d) LK_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value;
    Vec<T> acc[R][V];
    multiply<E>(words, ColumnGather<E>{a + d, offset}, p, V * W, acc);
    LK_UNROLL for (int r = 0; r < R; ++r) {
      LK_UNROLL for (int v = 0; v < V; ++v) {
        T* out = c + ((d + r) * V + v) * W;
        store(out, load(out) * factor[v] + acc[r][v]);
      }
    }
  });
}

// c[index[n] * stride + d] += sum over words i of p[n][i] * b[i * stride + d]: the gradients of
// keys and values. What c holds counts for nothing if `fresh`.
template <class E, int V>
LK_INLINE void accumulate_rows_block(const E* p, int words, const int32_t* index, int count,
                                     const E* b, int64_t stride, bool fresh, Sum<E>* c) {
  using T = Sum<E>;
  constexpr int W = kLanes<T>;
  for_row_blocks<kRows<V>>(0, count, [&](auto rows, int n) LK_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value;
    RowPointers<E, R> pointers;
    LK_UNROLL for (int r = 0; r < R; ++r) pointers.row[r] = p + (n + r) * words;
    Vec<T> acc[R][V];
    multiply<E>(words, pointers, b, stride, acc);
    LK_UNROLL for (int r = 0; r < R; ++r) {
      LK_UNROLL for (int v = 0; v < V; ++v) {
        T* out = c + index[n + r] * stride + v * W;
        store(out, fresh ? acc[r][v] : load(out) + acc[r][v]);
      }
    }
  });
}

// Rows of `vectors` vectors, V at a time and then ever fewer.
template <class E, int V = kMaxRowVectors>
LK_INLINE void accumulate_rows_from(int v, const E* p, int words, const int32_t* index, int count,
                                    int vectors, const E* b, int64_t stride, bool fresh,
                                    Sum<E>* c) {
  constexpr int W = kLanes<Sum<E>>;
  for (; v + V <= vectors; v += V) {
    accumulate_rows_block<E, V>(p, words, index, count, b + v * W, stride, fresh, c + v * W);
  }
  if constexpr (V > 1) {
    accumulate_rows_from<E, V - 1>(v, p, words, index, count, vectors, b, stride, fresh, c);
  }
}

template <class E>
__attribute__((noinline)) void accumulate_rows(const E* p, int words, const int32_t* index,
                                               int count, int vectors, const E* b, int64_t stride,
                                               bool fresh, Sum<E>* c) {
  if constexpr (kTiled<E>) {
    if (words % kTile == 0) {
      const int dim = vectors * kLanes<Sum<E>>;
      for_tile_blocks(count, dim, [&](auto rows, auto columns, int n, int d) LK_INLINE_LAMBDA {
        multiply_tiles<rows.value, columns.value>(
            words, Matrix{[&](int i, int k) { return p + (n + i) * words + k; }, words},
            Matrix{[&](int k, int j) { return b + k * stride + d + j; }, stride}, fresh,
            Matrix{[&](int i, int j) { return c + index[n + i] * stride + d + j; }, stride});
      });
      return;
    }
  }
  accumulate_rows_from<E>(0, p, words, index, count, vectors, b, stride, fresh, c);
}

}  // namespace LK_ISA
