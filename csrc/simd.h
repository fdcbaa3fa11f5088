// The vector type that all kernels are written in.
//
// It is built on the vector extensions of GCC and Clang, so one source serves every instruction
// set: LK_VECTOR_BYTES, set per translation unit, chooses the register width and the compiler
// flags choose the instructions. Everything lives in namespace LK_ISA, which differs per
// translation unit, so that the linker cannot hand a machine without AVX-512 an inline function
// compiled for it. For the same reason the kernels use nothing of the standard library that is
// not a type or a C function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __FAST_MATH__
#error "the kernels round, and tell NaN and infinity apart: compile without -ffast-math"
#endif

#define LK_INLINE inline __attribute__((always_inline))
#define LK_INLINE_LAMBDA __attribute__((always_inline))
#ifdef __clang__
#define LK_UNROLL _Pragma("unroll")
#else
#define LK_UNROLL _Pragma("GCC unroll 32")
#endif

namespace LK_ISA {

template <class T>
struct SimdTraits;
template <>
struct SimdTraits<float> {
  typedef float Vec __attribute__((vector_size(LK_VECTOR_BYTES)));
  typedef int32_t IntVec __attribute__((vector_size(LK_VECTOR_BYTES)));
  typedef uint32_t UintVec __attribute__((vector_size(LK_VECTOR_BYTES)));
  typedef uint16_t HalfVec __attribute__((vector_size(LK_VECTOR_BYTES / 2)));
  typedef int32_t Int;
};
template <>
struct SimdTraits<double> {
  typedef double Vec __attribute__((vector_size(LK_VECTOR_BYTES)));
  typedef int64_t IntVec __attribute__((vector_size(LK_VECTOR_BYTES)));
  typedef uint64_t UintVec __attribute__((vector_size(LK_VECTOR_BYTES)));
  typedef int64_t Int;
};

// A number as a type, to index registers with.
template <int N>
struct Constant {
  static constexpr int value = N;
};

template <class T>
using Vec = typename SimdTraits<T>::Vec;
template <class T>
using IntVec = typename SimdTraits<T>::IntVec;
template <class T>
using Int = typename SimdTraits<T>::Int;
template <class T>
constexpr int kLanes = LK_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class To, class From>
LK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
LK_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class T>
LK_INLINE IntVec<T> splat_int(Int<T> x) {
  return x - IntVec<T>{};
}
template <class V>
LK_INLINE V load_vector(const void* p) {
  V x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <class T>
LK_INLINE Vec<T> load(const T* p) {
  return load_vector<Vec<T>>(p);
}
template <class T>
LK_INLINE IntVec<T> load_int(const Int<T>* p) {
  return load_vector<IntVec<T>>(p);
}
template <class T>
LK_INLINE void store(T* p, Vec<T> x) {
  std::memcpy(p, &x, sizeof(x));
}

// The larger of both, or b if either is NaN.
template <class V>
LK_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}
template <class T>
LK_INLINE T sum_lanes(Vec<T> x) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += x[i];
  return sum;
}

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());
template <class T>
constexpr T kLog2E = static_cast<T>(1.4426950408889634074);
template <class T>
constexpr T kLn2 = static_cast<T>(0.69314718055994530942);

template <class T>
struct Float;
template <>
struct Float<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLowest = -126.0f;  // of exp2's argument; 0 below
  static constexpr int kLogTerms = 5;
  // 2^x = 1 + x * polynomial, minimax on [-1/2, 1/2]; relative error 3e-9.
  static constexpr float kExp2[] = {0.69314721496788496344f,   0.24022652782876176793f,
                                    0.055503105512069805781f,  0.0096176929761431872291f,
                                    0.0013406643847480060174f, 0.00015594677015105410559f};
};
template <>
struct Float<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLowest = -1022.0;
  static constexpr int kLogTerms = 11;
  // Relative error 2e-17.
  static constexpr double kExp2[] = {
      0.69314718055994569675,    0.24022650695910098006,    0.055504108664790394528,
      0.0096181291076070026171,  0.001333355815343996974,   0.00015403530441571850099,
      0.00001525272738518977478, 1.3215442675452855182e-6,  1.0180647660573069343e-7,
      7.0725703945407994337e-9,  4.0780717860928704165e-10};
};

// 2^x for x <= 127; exactly 0 for x < -126 (float), so that a masked score of -inf weighs nothing.
template <class T>
LK_INLINE Vec<T> exp2(Vec<T> x) {
  using F = Float<T>;
  constexpr int kTerms = sizeof(F::kExp2) / sizeof(T);
  // Adding 1.5 * 2^mantissa rounds to an integer and leaves it, biased, in the low bits.
  constexpr T kMagic = static_cast<T>(3LL << (F::kMantissa - 1)) + F::kBias;
  const Vec<T> shifted = x + kMagic;
  const Vec<T> f = x - (shifted - kMagic);
  Vec<T> p = splat(F::kExp2[kTerms - 1]);
  LK_UNROLL for (int i = kTerms - 2; i >= 0; --i) p = p * f + F::kExp2[i];
  p = p * f + T(1);
  // A product rather than a sum of exponents, so that NaN stays NaN.
  const auto power = bit_cast<Vec<T>>(bit_cast<IntVec<T>>(shifted) << F::kMantissa);
  return x < splat(F::kLowest) ? Vec<T>{} : p * power;
}

// log2 of positive normal x.
template <class T>
LK_INLINE Vec<T> log2(Vec<T> x) {
  using F = Float<T>;
  // Split x = 2^n * m with m in [sqrt(1/2), sqrt(2)).
  const auto bits = bit_cast<IntVec<T>>(x);
  const IntVec<T> half = splat_int<T>(bit_cast<Int<T>>(T(0.70710678118654752440)));
  const IntVec<T> n = (bits - half) >> F::kMantissa;
  const auto m = bit_cast<Vec<T>>(bits - (n << F::kMantissa));
  // ln m = 2 atanh(z)
  const Vec<T> z = (m - T(1)) / (m + T(1)), zz = z * z;
  Vec<T> p = splat(T(1) / (2 * F::kLogTerms + 1));
  for (int i = F::kLogTerms - 1; i >= 0; --i) p = p * zz + T(1) / (2 * i + 1);
  return __builtin_convertvector(n, Vec<T>) + 2 * kLog2E<T> * z * p;
}

template <class T>
LK_INLINE Vec<T> tanh(Vec<T> x) {
  // Rational and polynomial forms near 0 after Cephes.
  const Vec<T> xx = x * x;
  Vec<T> small;
  if constexpr (sizeof(T) == 4) {
    small = ((((T(-5.70498872745e-3) * xx + T(2.06390887954e-2)) * xx + T(-5.37397155531e-2)) * xx +
              T(1.33314422036e-1)) *
                 xx +
             T(-3.33332819422e-1)) *
                xx * x +
            x;
  } else {
    const Vec<T> p = (T(-9.64399179425052238628e-1) * xx + T(-9.92877231001918586564e1)) * xx +
                     T(-1.61468768441708447952e3);
    const Vec<T> q = ((xx + T(1.12811678491632931402e2)) * xx + T(2.23548839060100448583e3)) * xx +
                     T(4.84406305325125486048e3);
    small = x * xx * p / q + x;
  }
  const Vec<T> size = x < Vec<T>{} ? -x : x;
  const Vec<T> e = exp2<T>(size * (-2 * kLog2E<T>));
  const Vec<T> large = T(1) - 2 * e / (T(1) + e);
  return size < splat(T(0.625)) ? small : (x < Vec<T>{} ? -large : large);
}

// Square transposes out of perfect shuffles: log2(lanes) rounds of interleaving halves.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LK_HAVE_SHUFFLEVECTOR
#endif
#endif
template <class T, class Index>
struct Interleave;
template <class T, int... I>
struct Interleave<T, std::integer_sequence<int, I...>> {
  static constexpr int kHalf = sizeof...(I) / 2;
  static LK_INLINE void apply(Vec<T> a, Vec<T> b, Vec<T>* low, Vec<T>* high) {
    constexpr int kOther = static_cast<int>(sizeof...(I));
#ifdef LK_HAVE_SHUFFLEVECTOR
    *low = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * kOther)...);
    *high = __builtin_shufflevector(a, b, (kHalf + I / 2 + (I % 2) * kOther)...);
#else
    *low = __builtin_shuffle(a, b, IntVec<T>{(I / 2 + (I % 2) * kOther)...});
    *high = __builtin_shuffle(a, b, IntVec<T>{(kHalf + I / 2 + (I % 2) * kOther)...});
#endif
  }
};

// dst[j * dst_stride + i] = src[i * src_stride + j] for i, j < lanes.
template <class T>
LK_INLINE void transpose_block(const T* src, int64_t src_stride, T* dst, int64_t dst_stride) {
  constexpr int W = kLanes<T>;
  Vec<T> a[W], b[W];
  LK_UNROLL for (int i = 0; i < W; ++i) a[i] = load(src + i * src_stride);
  LK_UNROLL for (int step = 1; step < W; step *= 2) {
    LK_UNROLL for (int i = 0; i < W / 2; ++i) {
      Interleave<T, std::make_integer_sequence<int, W>>::apply(a[i], a[i + W / 2], &b[2 * i],
                                                               &b[2 * i + 1]);
    }
    LK_UNROLL for (int i = 0; i < W; ++i) a[i] = b[i];
  }
  LK_UNROLL for (int i = 0; i < W; ++i) store(dst + i * dst_stride, a[i]);
}

}  // namespace LK_ISA
