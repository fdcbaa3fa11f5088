// The matrix products of a tile, in three shapes around one register-blocked loop.
//
// A tile has `count` keys and V vectors of queries ("lanes"). Queries run along the lanes, so
// that K and V are read as scalars from their rows, no operand needs transposing per tile, and
// softmax statistics are lane-wise.
#pragma once

#include "simd.h"

namespace LK_ISA {

// Rows of a register block with V vectors: accumulators, operands and addresses must fit.
#if LK_VECTOR_REGISTERS == 32
constexpr int kMaxVectors = 3;
template <int V>
constexpr int kRows = V == 3 ? 8 : 12;
#else
constexpr int kMaxVectors = 2;
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
  int64_t stride;
  const int32_t* index;
  LK_INLINE T operator()(int r, int k) const { return base[index[k] * stride + r]; }
};

// Products this long are summed apart, so that rounding does not grow with the head dim.
constexpr int kDepth = 128;

// c[n][lane] = sum over d of a[index[n]][d] * b[d][lane]: scores, and the gradient of P.
template <class T, int V>
__attribute__((noinline)) void dot_rows(const T* a, int64_t stride, const int32_t* index, int count,
                                        int dim, const T* b, T* c) {
  constexpr int W = kLanes<T>;
  for_row_blocks<kRows<V>>(0, count, [&](auto rows, int n) LK_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value;
    RowPointers<T, R> pointers;
    for (int d = 0; d < dim; d += kDepth) {
      LK_UNROLL for (int r = 0; r < R; ++r) pointers.row[r] = a + index[n + r] * stride + d;
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

// c[d][lane] = c[d][lane] * alpha[lane] + sum over n of a[index[n]][d] * p[n][lane]: the output
// and the gradient of the queries, both transposed. A null alpha is 1.
template <class T, int V>
__attribute__((noinline)) void accumulate_columns(const T* a, int64_t stride, const int32_t* index,
                                                  int count, int dim, const T* p, const T* alpha,
                                                  T* c) {
  constexpr int W = kLanes<T>;
  Vec<T> factor[V];
  for (int v = 0; v < V; ++v) factor[v] = alpha ? load(alpha + v * W) : splat(T(1));
  for_row_blocks<kRows<V>>(0, dim, [&](auto rows, int d) LK_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value;
    Vec<T> acc[R][V];
    multiply<T, R, V>(count, ColumnGather<T>{a + d, stride, index}, p, V * W, acc);
    LK_UNROLL for (int r = 0; r < R; ++r) {
      LK_UNROLL for (int v = 0; v < V; ++v) {
        T* out = c + ((d + r) * V + v) * W;
        store(out, load(out) * factor[v] + acc[r][v]);
      }
    }
  });
}

// c[index[n]][d] += sum over lanes of p[n][lane] * b[lane][d]: the gradients of keys and values.
template <class T, int V>
LK_INLINE void accumulate_rows_block(const T* p, int lanes, const int32_t* index, int count,
                                     const T* b, T* c, int64_t stride) {
  constexpr int W = kLanes<T>;
  for_row_blocks<kRows<V>>(0, count, [&](auto rows, int n) LK_INLINE_LAMBDA {
    constexpr int R = decltype(rows)::value;
    RowPointers<T, R> pointers;
    LK_UNROLL for (int r = 0; r < R; ++r) pointers.row[r] = p + (n + r) * lanes;
    Vec<T> acc[R][V];
    multiply<T, R, V>(lanes, pointers, b, stride, acc);
    LK_UNROLL for (int r = 0; r < R; ++r) {
      LK_UNROLL for (int v = 0; v < V; ++v) {
        T* out = c + index[n + r] * stride + v * W;
        store(out, load(out) + acc[r][v]);
      }
    }
  });
}

template <class T>
__attribute__((noinline)) void accumulate_rows(const T* p, int lanes, const int32_t* index,
                                               int count, int vectors, const T* b, T* c,
                                               int64_t stride) {
  constexpr int W = kLanes<T>;
  int v = 0;
  // Four vectors are better cut in 2 + 2 than in 3 + 1.
  for (; kMaxVectors == 3 && vectors - v >= 3 && vectors - v != 4; v += 3) {
    accumulate_rows_block<T, kMaxVectors>(p, lanes, index, count, b + v * W, c + v * W, stride);
  }
  for (; vectors - v >= 2; v += 2) {
    accumulate_rows_block<T, 2>(p, lanes, index, count, b + v * W, c + v * W, stride);
  }
  if (v < vectors) {
    accumulate_rows_block<T, 1>(p, lanes, index, count, b + v * W, c + v * W, stride);
  }
}

}  // namespace LK_ISA
