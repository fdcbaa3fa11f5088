// The tile registers of AMX, for the products of gemm.h whose words they multiply.
//
// A register holds 16 rows of 16 words, or of 16 sums. One instruction adds to 16 x 16 sums the
// product of 16 rows of 16 words with 16 rows of words of 16 lanes.
#pragma once

#include "words.h"

namespace LK_ISA {

#ifdef LK_TILES  // by setup.py, since compilers name the instruction set differently
template <class E>
constexpr bool kTiled = kFold<E> == 2;
#else
template <class E>
constexpr bool kTiled = false;
#endif

constexpr int kTile = 16;

// While it lives, all registers of the thread are whole tiles. Afterwards they are as before, since
// others may configure those of a thread once and for all.
template <class E>
class TileRegisters {
 public:
  TileRegisters() {
    if constexpr (kTiled<E>) {
      asm volatile("sttilecfg %0" : "=m"(before_));
      Config config;
      config.palette = 1;
      for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = kTile * sizeof(E);
        config.rows[i] = kTile;
      }
      asm volatile("ldtilecfg %0" : : "m"(config));
    }
  }
  ~TileRegisters() {
    if constexpr (kTiled<E>) asm volatile("ldtilecfg %0" : : "m"(before_));
  }
  TileRegisters(const TileRegisters&) = delete;

 private:
  struct Config {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Config before_;
};

// Registers are named in the instructions. The compiler's own functions for these do not tell it
// that they read and write memory. Strides are in bytes.
template <int R>
LK_INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(R) : "memory");
}
template <int R>
LK_INLINE void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(R) : "memory");
}
template <int R>
LK_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(R));
}
template <int Out, int A, int B>
LK_INLINE void multiply_tile() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Out), "i"(A), "i"(B));
}

template <class Body, int... I>
LK_INLINE void for_constants(std::integer_sequence<int, I...>, Body body) {
  (body(Constant<I>{}), ...);
}
// Calls body(Constant<i>) for i in 0 .. N - 1.
template <int N, class Body>
LK_INLINE void for_constants(Body body) {
  for_constants(std::make_integer_sequence<int, N>{}, body);
}

// Calls block(Constant<R>, Constant<C>, row, column) for blocks of R x C tiles, at most 2 x 2, which
// together with their operands fill the registers.
template <class Block>
LK_INLINE void for_tile_blocks(int rows, int columns, Block block) {
  for (int row = 0; row < rows; row += 2 * kTile) {
    for (int column = 0; column < columns; column += 2 * kTile) {
      const bool tall = row + kTile < rows, wide = column + kTile < columns;
      if (tall && wide) block(Constant<2>{}, Constant<2>{}, row, column);
      if (tall && !wide) block(Constant<2>{}, Constant<1>{}, row, column);
      if (!tall && wide) block(Constant<1>{}, Constant<2>{}, row, column);
      if (!tall && !wide) block(Constant<1>{}, Constant<1>{}, row, column);
    }
  }
}

// A matrix in memory: the address of element (row, column), and the stride of rows, in elements.
template <class At>
struct Matrix {
  At at;
  int64_t stride;
};
template <class At>
Matrix(At, int64_t) -> Matrix<At>;

// out = a * b, or out += a * b unless `fresh`, over `words`, for a block of R x C tiles.
template <int R, int C, class A, class B, class Out>
LK_INLINE void multiply_tiles(int words, A a, B b, bool fresh, Out out) {
  constexpr int kA = 4, kB = 6;  // the first registers of the operands
  const auto for_out = [&](auto body) LK_INLINE_LAMBDA {
    for_constants<R>([&](auto r) LK_INLINE_LAMBDA {
      for_constants<C>([&](auto c) LK_INLINE_LAMBDA { body(r, c); });
    });
  };
  for_out([&](auto r, auto c) LK_INLINE_LAMBDA {
    constexpr int kOut = 2 * decltype(r)::value + decltype(c)::value;
    if (fresh) {
      clear_tile<kOut>();
    } else {
      load_tile<kOut>(out.at(r.value * kTile, c.value * kTile), 4 * out.stride);
    }
  });
  for (int k = 0; k < words; k += kTile) {
    for_constants<R>([&](auto r) LK_INLINE_LAMBDA {
      load_tile<kA + decltype(r)::value>(a.at(r.value * kTile, k), 4 * a.stride);
    });
    for_constants<C>([&](auto c) LK_INLINE_LAMBDA {
      load_tile<kB + decltype(c)::value>(b.at(k, c.value * kTile), 4 * b.stride);
    });
    for_out([&](auto r, auto c) LK_INLINE_LAMBDA {
      constexpr int kR = decltype(r)::value, kC = decltype(c)::value;
      multiply_tile<2 * kR + kC, kA + kR, kB + kC>();
    });
  }
  for_out([&](auto r, auto c) LK_INLINE_LAMBDA {
    store_tile<2 * decltype(r)::value + decltype(c)::value>(out.at(r.value * kTile, c.value * kTile),
                                                            4 * out.stride);
  });
}

}  // namespace LK_ISA
