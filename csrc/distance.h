// Distances between pairs of rows: two rows read per pair, two rows of gradient written.
#pragma once

#include "storage.h"
#include "api.h"

namespace LK_ISA {

template <class S>
struct PairRows {
  const S *x, *y;

  PairRows(const LkDistance& a, int64_t pair) {
    const S* row = static_cast<const S*>(a.hidden) + pair / a.num_pairs * a.hidden_batch_stride;
    x = row + a.pairs[2 * pair] * a.hidden_seq_stride;
    y = row + a.pairs[2 * pair + 1] * a.hidden_seq_stride;
  }
};

// Calls fn(Constant<i>, d, x, y) for each vector of the two rows, the last one padded with zeros.
// i counts up to kSums over and over, for sums that are independent and short.
constexpr int kSums = 4;

template <class S, class Fn>
LK_INLINE void for_vectors(const PairRows<S>& rows, int64_t dim, Fn fn) {
  constexpr int W = kLanes<Compute<S>>;
  int64_t d = 0;
  const auto step = [&](auto i) LK_INLINE_LAMBDA {
    const int64_t at = d + i.value * W;
    fn(i, at, load_row(rows.x + at), load_row(rows.y + at));
  };
  for (; d + kSums * W <= dim; d += kSums * W) {
    step(Constant<0>{});
    step(Constant<1>{});
    step(Constant<2>{});
    step(Constant<3>{});
  }
  for (; d + W <= dim; d += W) step(Constant<0>{});
  if (d < dim) {
    const int rest = static_cast<int>(dim - d);
    fn(Constant<0>{}, d, load_tail(rows.x + d, rest), load_tail(rows.y + d, rest));
  }
}

template <class T>
LK_INLINE T sum_all(const Vec<T> (&x)[kSums]) {
  return sum_lanes<T>((x[0] + x[1]) + (x[2] + x[3]));
}

template <class T>
LK_INLINE T clamped_norm(T square) {
  const T norm = __builtin_sqrt(square);
  return norm < T(1e-8) ? T(1e-8) : norm;  // as torch.nn.functional.cosine_similarity
}

template <class S>
void distance_forward(const LkDistance& a, int64_t pair) {
  using T = Compute<S>;
  T *distance = static_cast<T*>(a.distance) + pair, *stats = static_cast<T*>(a.stats) + 3 * pair;
  stats[0] = stats[1] = stats[2] = *distance = T(0);
  if (a.pairs[2 * pair] < 0) return;  // padding
  const PairRows<S> rows(a, pair);
  if (a.metric == LK_COSINE) {
    Vec<T> xy[kSums] = {}, xx[kSums] = {}, yy[kSums] = {};
    for_vectors(rows, a.dim, [&](auto i, int64_t, Vec<T> x, Vec<T> y) LK_INLINE_LAMBDA {
      xy[i.value] += x * y;
      xx[i.value] += x * x;
      yy[i.value] += y * y;
    });
    stats[0] = sum_all<T>(xy);
    stats[1] = sum_all<T>(xx);
    stats[2] = sum_all<T>(yy);
    *distance = T(1) - stats[0] / (clamped_norm(stats[1]) * clamped_norm(stats[2]));
    return;
  }
  Vec<T> squares[kSums] = {};
  for_vectors(rows, a.dim, [&](auto i, int64_t, Vec<T> x, Vec<T> y) LK_INLINE_LAMBDA {
    squares[i.value] += (x - y) * (x - y);
  });
  stats[0] = sum_all<T>(squares);
  *distance = a.metric == LK_L2 ? T(__builtin_sqrt(stats[0])) : stats[0] / T(a.dim);
}

// Gradient of the predictor's row is own * x + cross * y, of the target's other * y + cross * x.
template <class T>
struct PairWeights {
  T own, other, cross;

  PairWeights(const LkDistance& a, const T* stats, T ddistance) {
    if (a.metric == LK_COSINE) {
      const T nx = clamped_norm(stats[1]), ny = clamped_norm(stats[2]);
      cross = -ddistance / (nx * ny);
      // Below the clamp the norm is a constant. Equal rows cancel exactly.
      own = nx > T(1e-8) || nx != nx ? -cross * (stats[0] / stats[1]) : T(0);
      other = ny > T(1e-8) || ny != ny ? -cross * (stats[0] / stats[2]) : T(0);
      return;
    }
    if (a.metric == LK_L2) {
      own = stats[0] == 0 ? T(0) : ddistance / T(__builtin_sqrt(stats[0]));
    } else {
      own = ddistance * T(2) / T(a.dim);
    }
    other = own;
    cross = -own;
  }
};

// The gradient of one row of hidden: the sum over the slots (2 * pair + side) that point at it,
// linked in ascending order by `next` and ended by -1.
template <class S>
void distance_backward(const LkDistance& a, const int64_t* next, int64_t first_slot) {
  using T = Compute<S>;
  constexpr int W = kLanes<T>, kVectors = 32;
  const int64_t row = first_slot / (2 * a.num_pairs) * a.seq + a.pairs[first_slot];
  S* out = static_cast<S*>(a.dhidden) + row * a.dim;
  for (int64_t begin = 0; begin < a.dim; begin += kVectors * W) {
    const int64_t dim = a.dim - begin < kVectors * W ? a.dim - begin : kVectors * W;
    Vec<T> sum[kVectors] = {};
    for (int64_t slot = first_slot; slot >= 0; slot = next[slot]) {
      const int64_t pair = slot / 2;
      const PairWeights<T> w(a, static_cast<const T*>(a.stats) + 3 * pair,
                             static_cast<const T*>(a.ddistance)[pair]);
      const bool predictor = slot % 2 == 0;
      const T on_x = predictor ? w.own : w.cross, on_y = predictor ? w.cross : w.other;
      PairRows<S> rows(a, pair);
      rows.x += begin;
      rows.y += begin;
      for_vectors(rows, dim, [&](auto, int64_t d, Vec<T> x, Vec<T> y) LK_INLINE_LAMBDA {
        sum[d / W] += x * on_x + y * on_y;
      });
    }
    for (int64_t d = 0; d < dim; d += W) {
      if (d + W <= dim) {
        store_row(out + begin + d, sum[d / W]);
      } else {
        store_tail(out + begin + d, sum[d / W], static_cast<int>(dim - d));
      }
    }
  }
}

}  // namespace LK_ISA
