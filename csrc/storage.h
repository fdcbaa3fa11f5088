// Rows of the tensors, read and written in the compute type.
#pragma once

#include "simd.h"

namespace LK_ISA {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type a storage type is computed in.
template <class S>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::Type;

using FloatVec = Vec<float>;
using BitsVec = SimdTraits<float>::UintVec;
using HalfVec = SimdTraits<float>::HalfVec;

LK_INLINE FloatVec from_half_bits(BitsVec bits, Bfloat16) { return bit_cast<FloatVec>(bits << 16); }

LK_INLINE FloatVec from_half_bits(BitsVec bits, Float16) {
  // Normal: shift exponent and mantissa into place and correct the bias. Infinity and NaN have
  // exponent 31, which must become 255. A subnormal is its bits in units of 2^-24, which are the
  // last ones of floats from 1/2 on: so no subnormal float arises, which a process may flush to 0.
  const BitsVec magnitude = bits & 0x7fffu;
  const BitsVec subnormal =
      bit_cast<BitsVec>(bit_cast<FloatVec>(magnitude | 0x3f000000u) - 0.5f);
  BitsVec value = (magnitude << 13) + (112u << 23);
  value = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : value;
  value = magnitude < 0x400u ? subnormal : value;
  return bit_cast<FloatVec>(value | ((bits & 0x8000u) << 16));
}

LK_INLINE BitsVec to_half_bits(FloatVec x, Bfloat16) {
  const auto bits = bit_cast<BitsVec>(x);
  const BitsVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? rounded : (bits >> 16) | 0x40u;
}

LK_INLINE BitsVec to_half_bits(FloatVec x, Float16) {
  const auto bits = bit_cast<BitsVec>(x);
  const BitsVec sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal: rebias and round to nearest even. A carry out of the mantissa is the right answer.
  const BitsVec normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal: adding 1/2 leaves the value in units of 2^-24 in the low bits, rounded.
  const BitsVec subnormal = bit_cast<BitsVec>(bit_cast<FloatVec>(magnitude) + 0.5f) - 0x3f000000u;
  BitsVec half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? BitsVec{} + 0x7c00u : half;   // rounds to 2^16 or more
  half = magnitude > 0x7f800000u ? BitsVec{} + 0x7e00u : half;    // NaN
  return half | sign;
}

template <class S>
LK_INLINE FloatVec load_half(const S* p) {
  return from_half_bits(__builtin_convertvector(load_vector<HalfVec>(p), BitsVec), S{});
}

LK_INLINE FloatVec load_row(const float* p) { return load(p); }
LK_INLINE Vec<double> load_row(const double* p) { return load(p); }
LK_INLINE FloatVec load_row(const Bfloat16* p) { return load_half(p); }
LK_INLINE FloatVec load_row(const Float16* p) { return load_half(p); }

LK_INLINE void store_row(float* p, FloatVec x) { store(p, x); }
LK_INLINE void store_row(double* p, Vec<double> x) { store(p, x); }
template <class S>
LK_INLINE void store_row(S* p, FloatVec x) {
  const HalfVec half = __builtin_convertvector(to_half_bits(x, S{}), HalfVec);
  std::memcpy(p, &half, sizeof(half));
}

// The first n < lanes elements at p, zeros after them.
template <class S>
LK_INLINE Vec<Compute<S>> load_tail(const S* p, int n) {
  S buffer[kLanes<Compute<S>>] = {};
  std::memcpy(buffer, p, n * sizeof(S));
  return load_row(buffer);
}
template <class S>
LK_INLINE void store_tail(S* p, Vec<Compute<S>> x, int n) {
  S buffer[kLanes<Compute<S>>];
  store_row(buffer, x);
  std::memcpy(p, buffer, n * sizeof(S));
}

template <class S>
LK_INLINE void write_row(const Compute<S>* src, S* dst, int dim) {
  constexpr int W = kLanes<Compute<S>>;
  int d = 0;
  for (; d + W <= dim; d += W) store_row(dst + d, load(src + d));
  if (d < dim) store_tail(dst + d, load(src + d), dim - d);
}

}  // namespace LK_ISA
