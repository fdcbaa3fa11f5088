// What one lane of a multiply-add takes of each operand of a matrix product: a word. It is a number
// of the compute type or, where the processor multiplies bfloat16 by itself, a pair of them that are
// neighbours along the dimension that is summed over. The kernels are written once, for words.
#pragma once

#include "storage.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace LK_ISA {

// The type that products of words are summed in, a vector of words, and the numbers in a word.
template <class E>
struct WordTraits {
  using Sum = E;
  using Vec = typename SimdTraits<E>::Vec;
  static constexpr int kFold = 1;
};
// Of operands that are stored as S.
template <class S>
struct WordOf {
  using Type = Compute<S>;
};

#ifdef __AVX512BF16__
struct Bfloat16Pair {
  uint32_t bits;  // the first one in the low half
};
template <>
struct WordTraits<Bfloat16Pair> {
  using Sum = float;
  using Vec = BitsVec;
  static constexpr int kFold = 2;
};
template <>
struct WordOf<Bfloat16> {
  using Type = Bfloat16Pair;
};
#endif

template <class S>
using Word = typename WordOf<S>::Type;
template <class E>
using Sum = typename WordTraits<E>::Sum;
template <class E>
using WordVec = typename WordTraits<E>::Vec;
template <class E>
constexpr int kFold = WordTraits<E>::kFold;

template <class E>
LK_INLINE WordVec<E> load_words(const E* p) {
  return load_vector<WordVec<E>>(p);
}
template <class E>
LK_INLINE void store_words(E* p, WordVec<E> x) {
  std::memcpy(p, &x, sizeof(x));
}

LK_INLINE FloatVec splat_word(float x) { return splat(x); }
LK_INLINE Vec<double> splat_word(double x) { return splat(x); }

LK_INLINE FloatVec multiply_add(FloatVec x, FloatVec y, FloatVec sum) { return x * y + sum; }
LK_INLINE Vec<double> multiply_add(Vec<double> x, Vec<double> y, Vec<double> sum) {
  return x * y + sum;
}

// The numbers of words that are finite, and zero for the others.
LK_INLINE FloatVec finite_part(FloatVec x) { return x * 0.0f == FloatVec{} ? x : FloatVec{}; }
LK_INLINE Vec<double> finite_part(Vec<double> x) {
  return x * 0.0 == Vec<double>{} ? x : Vec<double>{};
}

// The i-th number of a word.
LK_INLINE float number(float x, int) { return x; }
LK_INLINE double number(double x, int) { return x; }

// Whether all numbers that were added are finite.
template <class E>
class Finiteness {
 public:
  LK_INLINE void add(Vec<E> x) { poison_ += x * E(0); }  // NaN from then on if x is not
  LK_INLINE bool all() const { return sum_lanes<E>(poison_) == 0; }

 private:
  Vec<E> poison_ = {};
};

#ifdef __AVX512BF16__

LK_INLINE BitsVec splat_word(Bfloat16Pair x) { return x.bits - BitsVec{}; }

LK_INLINE FloatVec multiply_add(BitsVec x, BitsVec y, FloatVec sum) {
  return (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}

LK_INLINE BitsVec finite_part(BitsVec x) {
  constexpr uint32_t kLow = 0x7f80u, kHigh = kLow << 16;  // the exponents
  x = (x & kLow) == kLow ? x & ~0xffffu : x;
  return (x & kHigh) == kHigh ? x & 0xffffu : x;
}

LK_INLINE float number(Bfloat16Pair x, int i) {
  return bit_cast<float>(i == 0 ? x.bits << 16 : x.bits & ~0xffffu);
}

template <>
class Finiteness<Bfloat16Pair> {
 public:
  // An exponent of all ones carries into the place of the sign.
  LK_INLINE void add(BitsVec x) { carry_ |= (x & 0x7f807f80u) + 0x00800080u; }
  LK_INLINE bool all() const {
    uint32_t carry = 0;
    for (int i = 0; i < kLanes<float>; ++i) carry |= carry_[i];
    return (carry & 0x80008000u) == 0;
  }

 private:
  BitsVec carry_ = {};
};

// Rounded: x[0], y[0], x[1], y[1], …
LK_INLINE BitsVec round_across(FloatVec x, FloatVec y) {
  typedef uint16_t Halves __attribute__((vector_size(LK_VECTOR_BYTES)));
  const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
  const Halves order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (BitsVec)_mm512_permutexvar_epi16((__m512i)order, halves);
}
// Rounded: x[0], x[1], …, y[0], y[1], …
LK_INLINE BitsVec round_along(FloatVec x, FloatVec y) {
  return (BitsVec)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
}

#endif

// The words of a row as it lies in memory.
template <class S>
LK_INLINE WordVec<Word<S>> read_words(const S* p) {
  if constexpr (kFold<Word<S>> == 1) {
    return load_row(p);
  } else {
    return load_words(reinterpret_cast<const Word<S>*>(p));
  }
}

// dst = the words of src[0 .. dim), then zeros up to `words`, a multiple of the lanes.
template <class S>
LK_INLINE void read_row(const S* src, Word<S>* dst, int dim, int words,
                        Finiteness<Word<S>>* finite) {
  using E = Word<S>;
  constexpr int W = kLanes<Sum<E>>, N = W * kFold<E>;
  int d = 0;
  for (; (d + 1) * N <= dim; ++d) {
    const WordVec<E> x = read_words(src + d * N);
    finite->add(x);
    store_words(dst + d * W, x);
  }
  if (d * N < dim) {
    S tail[N] = {};
    std::memcpy(tail, src + d * N, (dim - d * N) * sizeof(S));
    const WordVec<E> x = read_words(tail);
    finite->add(x);
    store_words(dst + d * W, x);
    ++d;
  }
  for (; d * W < words; ++d) store_words(dst + d * W, WordVec<E>{});
}

// Rows of words along them become words across neighbouring rows, of which the last may lack its
// neighbour: across[i][d] = rows[kFold * i .. ][d]. Where a word is one number they stay what they are.
template <class E>
LK_INLINE const E* words_across(const E* rows, int64_t stride, int count, int words, E* across,
                                int64_t across_stride) {
  if constexpr (kFold<E> == 1) {
    return rows;
  } else {
    constexpr int W = kLanes<Sum<E>>;
    using Shuffle = Interleave<Sum<E>, std::make_integer_sequence<int, W>>;
    for (int i = 0; i < count; i += 2) {
      E* out = across + i / 2 * across_stride;
      for (int d = 0; d < words; d += W) {
        const BitsVec x = load_words(rows + i * stride + d);
        const BitsVec y = i + 1 < count ? load_words(rows + (i + 1) * stride + d) : BitsVec{};
        FloatVec low, high;
        Shuffle::apply(bit_cast<FloatVec>((x & 0xffffu) | (y << 16)),
                       bit_cast<FloatVec>((x >> 16) | (y & ~0xffffu)), &low, &high);
        store_words(out + 2 * d, bit_cast<BitsVec>(low));
        store_words(out + 2 * d + W, bit_cast<BitsVec>(high));
      }
    }
    return across;
  }
}

// Numbers [count][lanes] as words across neighbouring rows, which may take the place of them. Zeros
// fill the rows of words up to a multiple of `multiple`.
template <class E>
LK_INLINE const E* round_across(const Sum<E>* rows, int count, int lanes, int multiple, E* across) {
  if constexpr (kFold<E> == 1) {
    return rows;
  } else {
    for (int i = 0; i < count; i += 2) {
      for (int v = 0; v < lanes; v += kLanes<Sum<E>>) {
        const auto x = load(rows + i * lanes + v);
        const auto y = i + 1 < count ? load(rows + (i + 1) * lanes + v) : Vec<Sum<E>>{};
        store_words(across + i / 2 * lanes + v, round_across(x, y));
      }
    }
    for (int i = (count + 1) / 2; i % multiple != 0; ++i) {
      for (int v = 0; v < lanes; v += kLanes<Sum<E>>) store_words(across + i * lanes + v, BitsVec{});
    }
    return across;
  }
}

// Numbers [count] as words of neighbours, in their place.
template <class E>
LK_INLINE const E* round_along(Sum<E>* numbers, int count) {
  if constexpr (kFold<E> == 1) {
    return numbers;
  } else {
    constexpr int W = kLanes<Sum<E>>;
    E* words = reinterpret_cast<E*>(numbers);
    for (int i = 0; i < count; i += 2 * W) {
      const auto y = i + W < count ? load(numbers + i + W) : Vec<Sum<E>>{};
      store_words(words + i / 2, round_along(load(numbers + i), y));
    }
    return words;
  }
}

}  // namespace LK_ISA
