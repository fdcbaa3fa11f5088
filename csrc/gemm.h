// The matrix products of a tile, in three shapes around one register-blocked loop. `offset` says
// where the row of each key begins.
//
// A tile has `count` keys and V vectors of queries ("lanes"). Queries run along the lanes, so
// that K and V are read as scalars from their rows, no operand needs transposing per tile, and
// softmax statistics are lane-wise.
#pragma once

#include "simd.h"

namespace LK_ISA {

// Vectors of a panel, and of a row that accumulate_rows takes at once; rows of a register block
// with V vectors: accumulators, operands and addresses must fit.
#if LK_VECTOR_REGISTERS == 32
constexpr int kMaxVectors = 3, kMaxRowVectors = 4;
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
template <class T, int R, int V, class A>
LK_INLINE void multiply(int depth, A a, const T* b, int64_t stride, Vec<T> (&acc)[R][V]) {
  constexpr int W = kLanes<T>;
  LK_UNROLL for (int r = 0; r < R; ++r) {
    LK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
  }
  for (int k = 0; k < depth; ++k, b += stride) {
    Vec<T> x[V];
    LK_UNROLL for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
    LK_UNROLL for (int r = 0; r < R; ++r) {
      const Vec<T> y = splat(a(r, k));
      LK_UNROLL for (int v = 0; v < V; ++v) acc[r][v] += y * x[v];
    }
  }
}

template <class T, int R>
struct RowPointers {
  const T* row[R];
  LK_INLINE T operator()(int r, int k) const { return row[r][k]; }
};

template <class T>
struct ColumnGather {
  const T* base;
  const int64_t* offset;
  LK_INLINE T operator()(int r, int k) const { return base[offset[k] + r]; }
};

// Products this long are summed apart, so that rounding does not grow with the head dim.
constexpr int kDepth = 128;

// c[n][lane] = sum over d of a[offset[n] + d] * b[d][lane]: scores, and the gradient of P.
template <class T, int V>
__attribute__((noinline)) void dot_rows(const T* a, const int64_t* offset, int count,
                                        int dim, const T* b, T* c) {
  constexpr int W = kLanes<T>;
  for_row_blocks<kRows<V>>(0, count, [&](auto rows, int n) LK_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value;
    RowPointers<T, R> pointers;
    for (int d = 0; d < dim; d += kDepth) {
      LK_UNROLL for (int r = 0; r < R; ++r) pointers.row[r] = a + offset[n + r] + d;
      Vec<T> acc[R][V];
      multiply<T, R, V>(dim - d < kDepth ? dim - d : kDepth, pointers, b + d * V * W, V * W, acc);
      LK_UNROLL for (int r = 0; r < R; ++r) {
        LK_UNROLL for (int v = 0; v < V; ++v) {
          T* out = c + ((n + r) * V + v) * W;
          store(out, d == 0 ? acc[r][v] : load(out) + acc[r][v]);
        }
      }
    }
  });
}

// c[d][lane] = c[d][lane] * alpha[lane] + sum over n of a[offset[n] + d] * p[n][lane]: the
// output and the gradient of the queries, both transposed. A null alpha is 1.
template <class T, int V>
__attribute__((noinline)) void accumulate_columns(const T* a, const int64_t* offset,
                                                  int count, int dim, const T* p, const T* alpha,
                                                  T* c) {
  constexpr int W = kLanes<T>;
  Vec<T> factor[V];
  for (int v = 0; v < V; ++v) factor[v] = alpha ? load(alpha + v * W) : splat(T(1));
  for_row_blocks<kRows<V>>(0, dim, [&](auto rows, int d) LK_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value;
    Vec<T> acc[R][V];
    multiply<T, R, V>(count, ColumnGather<T>{a + d, offset}, p, V * W, acc);
    LK_UNROLL for (int r = 0; r < R; ++r) {
      LK_UNROLL for (int v = 0; v < V; ++v) {
        T* out = c + ((d + r) * V + v) * W;
        store(out, load(out) * factor[v] + acc[r][v]);
      }
    }
  });
}

// c[offset[n] + d] += sum over lanes of p[n][lane] * b[lane][d]: the gradients of keys and values.
// What c holds counts for nothing if `fresh`.
template <class T, int V>
LK_INLINE void accumulate_rows_block(const T* p, int lanes, const int64_t* offset, int count,
                                     const T* b, int64_t stride, bool fresh, T* c) {
  constexpr int W = kLanes<T>;
  for_row_blocks<kRows<V>>(0, count, [&](auto rows, int n) LK_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value;
    RowPointers<T, R> pointers;
    LK_UNROLL for (int r = 0; r < R; ++r) pointers.row[r] = p + (n + r) * lanes;
    Vec<T> acc[R][V];
    multiply<T, R, V>(lanes, pointers, b, stride, acc);
    LK_UNROLL for (int r = 0; r < R; ++r) {
      LK_UNROLL for (int v = 0; v < V; ++v) {
        T* out = c + offset[n + r] + v * W;
        store(out, fresh ? acc[r][v] : load(out) + acc[r][v]);
      }
    }
  });
}

// Rows of `vectors` vectors, V at a time and then ever fewer.
template <class T, int V = kMaxRowVectors>
LK_INLINE void accumulate_rows_from(int v, const T* p, int lanes, const int64_t* offset, int count,
                                    int vectors, const T* b, int64_t stride, bool fresh, T* c) {
  constexpr int W = kLanes<T>;
  for (; v + V <= vectors; v += V) {
    accumulate_rows_block<T, V>(p, lanes, offset, count, b + v * W, stride, fresh, c + v * W);
  }
  if constexpr (V > 1) {
    accumulate_rows_from<T, V - 1>(v, p, lanes, offset, count, vectors, b, stride, fresh, c);
  }
}

template <class T>
__attribute__((noinline)) void accumulate_rows(const T* p, int lanes, const int64_t* offset,
                                               int count, int vectors, const T* b, int64_t stride,
                                               bool fresh, T* c) {
  accumulate_rows_from<T>(0, p, lanes, offset, count, vectors, b, stride, fresh, c);
}

}  // namespace LK_ISA
