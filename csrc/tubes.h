// Vectors of tubes: each the sum of up to three steps from one row of hidden to another. The
// forward pass reads those rows alone, the backward pass writes the gradient of them alone.
#pragma once

#include "api.h"
#include "kernels.h"
#include "pairs.h"
#include "storage.h"

namespace LK_ISA {

// Writes vector `index`. A slot is one end of one of its steps; -1 where there is no step.
template <class S>
void tubes_forward(const LkTubes& a, int64_t index) {
  using T = Compute<S>;
  constexpr int W = kLanes<T>;
  const int64_t* slots = a.tubes + index * kTubeSlots;
  const S* rows =
      static_cast<const S*>(a.hidden) + index / a.num_vectors * a.hidden_batch_stride;
  T* out = static_cast<T*>(a.vectors) + index * a.dim;
  __builtin_memset(out, 0, a.dim * sizeof(T));
  for (int slot = 0; slot < kTubeSlots; slot += 2) {
    if (slots[slot] < 0) continue;
    const S *start = rows + slots[slot] * a.hidden_seq_stride,
            *end = rows + slots[slot + 1] * a.hidden_seq_stride;
    for_vectors(end, start, a.dim, [&](auto, int64_t d, Vec<T> x, Vec<T> y) LK_INLINE_LAMBDA {
      if (d + W <= a.dim) {
        store(out + d, load(out + d) + (x - y));
      } else {
        const int rest = static_cast<int>(a.dim - d);
        store_tail(out + d, load_tail(out + d, rest) + (x - y), rest);
      }
    });
  }
}

// A row gains the gradient of a vector where it ends a step, and loses it where it starts one.
template <class S>
void tubes_backward(const LkTubes& a, const int64_t* next, int64_t first_slot) {
  using T = Compute<S>;
  const int64_t row = first_slot / (kTubeSlots * a.num_vectors) * a.seq + a.tubes[first_slot];
  sum_slots<S>(a, row, next, first_slot,
               [&](int64_t slot, int64_t begin, int64_t dim, Vec<T>* sum) LK_INLINE_LAMBDA {
    const T sign = slot % 2 ? T(1) : T(-1);
    const T* vector = static_cast<const T*>(a.dvectors) + slot / kTubeSlots * a.dim + begin;
    for_vectors(vector, vector, dim, [&](auto, int64_t d, Vec<T> x, Vec<T>) LK_INLINE_LAMBDA {
      sum[d / kLanes<T>] += x * sign;
    });
  });
}

}  // namespace LK_ISA
