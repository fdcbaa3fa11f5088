// Pairs of rows: their distance, and the rows scaled to length 1. The forward passes read two rows
// per pair, the backward passes write two rows of gradient.
#pragma once

#include "api.h"
#include "storage.h"

namespace LK_ISA {

// The row of hidden that a slot points at.
template <class S>
LK_INLINE const S* slot_row(const LkPairs& a, int64_t slot) {
  return static_cast<const S*>(a.hidden) + slot / (2 * a.num_pairs) * a.hidden_batch_stride +
         a.pairs[slot] * a.hidden_seq_stride;
}

// The row of dhidden that a slot points at, counted through the batch.
LK_INLINE int64_t gradient_row(const LkPairs& a, int64_t slot) {
  return slot / (2 * a.num_pairs) * a.seq + a.pairs[slot];
}

// Where a slot stands in `squares`, `dots` and, times dim, in `views`: all predictors, then all
// targets.
LK_INLINE int64_t view_of(const LkPairs& a, int64_t slot) {
  return slot % 2 * a.batch * a.num_pairs + slot / 2;
}

// Calls fn(Constant<i>, d, x, y) for each vector of two rows, the last one padded with zeros.
// i counts up to kSums over and over, for sums that are independent and short.
constexpr int kSums = 4;

template <class S, class Fn>
LK_INLINE void for_vectors(const S* x, const S* y, int64_t dim, Fn fn) {
  constexpr int W = kLanes<Compute<S>>;
  int64_t d = 0;
  const auto step = [&](auto i) LK_INLINE_LAMBDA {
    const int64_t at = d + i.value * W;
    fn(i, at, load_row(x + at), load_row(y + at));
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
    fn(Constant<0>{}, d, load_tail(x + d, rest), load_tail(y + d, rest));
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
// Below the clamp the norm is a constant. NaN is not.
template <class T>
LK_INLINE bool is_constant(T clamped) {
  return clamped <= T(1e-8);
}

template <class S>
void distance_forward(const LkPairs& a, int64_t pair) {
  using T = Compute<S>;
  T* stats = static_cast<T*>(a.stats) + 3 * pair;
  stats[0] = stats[1] = stats[2] = T(0);
  if (a.pairs[2 * pair] < 0) return;  // padding
  const S *x_row = slot_row<S>(a, 2 * pair), *y_row = slot_row<S>(a, 2 * pair + 1);
  if (a.metric == LK_COSINE) {
    Vec<T> xy[kSums] = {}, xx[kSums] = {}, yy[kSums] = {};
    for_vectors(x_row, y_row, a.dim, [&](auto i, int64_t, Vec<T> x, Vec<T> y) LK_INLINE_LAMBDA {
      xy[i.value] += x * y;
      xx[i.value] += x * x;
      yy[i.value] += y * y;
    });
    stats[0] = sum_all<T>(xy);
    stats[1] = sum_all<T>(xx);
    stats[2] = sum_all<T>(yy);
    return;
  }
  Vec<T> squares[kSums] = {};
  for_vectors(x_row, y_row, a.dim, [&](auto i, int64_t, Vec<T> x, Vec<T> y) LK_INLINE_LAMBDA {
    squares[i.value] += (x - y) * (x - y);
  });
  stats[0] = sum_all<T>(squares);
}

// The distance of a pair, from the sums over its rows.
template <class T>
LK_INLINE T distance_of(const LkPairs& a, int64_t pair) {
  if (a.pairs[2 * pair] < 0) return T(0);  // padding
  const T* stats = static_cast<const T*>(a.stats) + 3 * pair;
  if (a.metric == LK_COSINE) {
    return T(1) - stats[0] / (clamped_norm(stats[1]) * clamped_norm(stats[2]));
  }
  return a.metric == LK_L2 ? T(__builtin_sqrt(stats[0])) : stats[0] / T(a.dim);
}

// The loss: the distances, or their sum or mean in the order of the pairs.
template <class S>
void distance_reduce(const LkPairs& a) {
  using T = Compute<S>;
  T* loss = static_cast<T*>(a.loss);
  double sum = 0;
  int64_t count = 0;
  for (int64_t pair = 0; pair < a.batch * a.num_pairs; ++pair) {
    const T distance = distance_of<T>(a, pair);
    if (a.reduction == LK_NONE) loss[pair] = distance;
    sum += distance;
    count += a.pairs[2 * pair] >= 0;
  }
  if (a.reduction == LK_NONE) return;
  if (a.reduction == LK_MEAN && count > 0) sum /= static_cast<double>(count);
  *loss = static_cast<T>(sum);
}

// Gradient of the predictor's row is own * x + cross * y, of the target's other * y + cross * x.
template <class T>
struct PairWeights {
  T own, other, cross;

  PairWeights(const LkPairs& a, const T* stats, T ddistance) {
    if (a.metric == LK_COSINE) {
      const T nx = clamped_norm(stats[1]), ny = clamped_norm(stats[2]);
      cross = -ddistance / (nx * ny);
      // Equal rows cancel exactly.
      own = is_constant(nx) ? T(0) : -cross * (stats[0] / stats[1]);
      other = is_constant(ny) ? T(0) : -cross * (stats[0] / stats[2]);
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

// The gradient of one row of hidden: the sum of add(slot, begin, dim, sum) over the slots that
// point at it, linked in ascending order by `next` and ended by -1. add() adds elements begin ..
// begin + dim - 1 to the vectors of `sum`. `row` counts through the batch.
template <class S, class Arguments, class Fn>
LK_INLINE void sum_slots(const Arguments& a, int64_t row, const int64_t* next, int64_t first_slot,
                         Fn add) {
  using T = Compute<S>;
  constexpr int W = kLanes<T>, kVectors = 32;
  S* out = static_cast<S*>(a.dhidden) + row * a.dim;
  for (int64_t begin = 0; begin < a.dim; begin += kVectors * W) {
    const int64_t dim = a.dim - begin < kVectors * W ? a.dim - begin : kVectors * W;
    Vec<T> sum[kVectors] = {};
    for (int64_t slot = first_slot; slot >= 0; slot = next[slot]) add(slot, begin, dim, sum);
    for (int64_t d = 0; d < dim; d += W) {
      if (d + W <= dim) {
        store_row(out + begin + d, sum[d / W]);
      } else {
        store_tail(out + begin + d, sum[d / W], static_cast<int>(dim - d));
      }
    }
  }
}

template <class S>
void distance_backward(const LkPairs& a, const int64_t* next, int64_t first_slot) {
  using T = Compute<S>;
  sum_slots<S>(a, gradient_row(a, first_slot), next, first_slot,
               [&](int64_t slot, int64_t begin, int64_t dim, Vec<T>* sum) LK_INLINE_LAMBDA {
    const int64_t pair = slot / 2;
    const PairWeights<T> w(a, static_cast<const T*>(a.stats) + 3 * pair,
                           static_cast<const T*>(a.ddistance)[pair]);
    const bool predictor = slot % 2 == 0;
    const T on_x = predictor ? w.own : w.cross, on_y = predictor ? w.cross : w.other;
    const S *x_row = slot_row<S>(a, 2 * pair), *y_row = slot_row<S>(a, 2 * pair + 1);
    for_vectors(x_row + begin, y_row + begin, dim,
                [&](auto, int64_t d, Vec<T> x, Vec<T> y) LK_INLINE_LAMBDA {
                  sum[d / kLanes<T>] += x * on_x + y * on_y;
                });
  });
}

template <class S>
void views_forward(const LkPairs& a, int64_t slot) {
  using T = Compute<S>;
  constexpr int W = kLanes<T>;
  T *view = static_cast<T*>(a.views) + view_of(a, slot) * a.dim,
    *square = static_cast<T*>(a.squares) + view_of(a, slot);
  if (a.pairs[slot] < 0) {  // padding
    __builtin_memset(view, 0, a.dim * sizeof(T));
    *square = T(0);
    return;
  }
  const S* row = slot_row<S>(a, slot);
  Vec<T> squares[kSums] = {};
  for_vectors(row, row, a.dim, [&](auto i, int64_t, Vec<T> x, Vec<T>) LK_INLINE_LAMBDA {
    squares[i.value] += x * x;
  });
  *square = sum_all<T>(squares);
  const T norm = clamped_norm(*square);
  for_vectors(row, row, a.dim, [&](auto, int64_t d, Vec<T> x, Vec<T>) LK_INLINE_LAMBDA {
    if (d + W <= a.dim) {
      store(view + d, x / norm);
    } else {
      store_tail(view + d, x / norm, static_cast<int>(a.dim - d));
    }
  });
}

template <class S>
void views_dot(const LkPairs& a, int64_t slot) {
  using T = Compute<S>;
  const int64_t at = view_of(a, slot);
  Vec<T> dot[kSums] = {};
  for_vectors(static_cast<const T*>(a.views) + at * a.dim,
              static_cast<const T*>(a.dviews) + at * a.dim, a.dim,
              [&](auto i, int64_t, Vec<T> view, Vec<T> dview) LK_INLINE_LAMBDA {
                dot[i.value] += view * dview;
              });
  static_cast<T*>(a.dots)[at] = sum_all<T>(dot);
}

template <class S>
void views_backward(const LkPairs& a, const int64_t* next, int64_t first_slot) {
  using T = Compute<S>;
  sum_slots<S>(a, gradient_row(a, first_slot), next, first_slot,
               [&](int64_t slot, int64_t begin, int64_t dim, Vec<T>* sum) LK_INLINE_LAMBDA {
    const int64_t at = view_of(a, slot), first = at * a.dim + begin;
    const T norm = clamped_norm(static_cast<const T*>(a.squares)[at]);
    const T along = is_constant(norm) ? T(0) : static_cast<const T*>(a.dots)[at];
    for_vectors(static_cast<const T*>(a.views) + first, static_cast<const T*>(a.dviews) + first,
                dim, [&](auto, int64_t d, Vec<T> view, Vec<T> dview) LK_INLINE_LAMBDA {
                  sum[d / kLanes<T>] += (dview - view * along) / norm;
                });
  });
}

}  // namespace LK_ISA
