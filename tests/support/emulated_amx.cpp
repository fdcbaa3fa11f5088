// Carries out the tile instructions of AMX on a CPU without them: a library to preload.
//
// Such a CPU raises SIGILL, whose handler decodes the instruction (those that csrc/tiles.h uses)
// and does what Intel's Software Developer's Manual, volume 2, says of it, order of sums included.
// Prints at the end how many products it has carried out.
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

struct Tile {
  uint32_t row[16][16];
};
struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
thread_local Config config;
thread_local Tile tiles[8];
std::atomic<int64_t> products;

// By number, as instructions name them.
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};

// A three-byte VEX instruction of map 0F38, 128 bits, W = 0.
struct Instruction {
  bool valid = false;
  int prefix, opcode, mode, reg, rm, third;
  char* address = nullptr;
  int64_t stride = 0;
  int64_t next;

  explicit Instruction(const greg_t* registers) {
    const auto* p = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
    if (p[0] != 0xc4 || (p[1] & 0x1f) != 2 || (p[2] & 0x84) != 0) return;
    const int high_index = p[1] & 0x40 ? 0 : 8, high_base = p[1] & 0x20 ? 0 : 8;
    third = ~(p[2] >> 3) & 15;
    prefix = p[2] & 3;
    opcode = p[3];
    mode = p[4] >> 6;
    reg = p[4] >> 3 & 7;
    rm = p[4] & 7;
    valid = true;
    p += 5;
    if (mode != 3) {
      int64_t base = 0;
      bool relative = false, has_base = true;
      int number = rm | high_base;
      if (rm == 4) {
        const uint8_t sib = *p++;
        const int index = (sib >> 3 & 7) | high_index;
        number = (sib & 7) | high_base;
        has_base = mode != 0 || (sib & 7) != 5;
        stride = index == 4 ? 0 : static_cast<int64_t>(registers[kRegisters[index]]) << (sib >> 6);
      } else if (mode == 0 && rm == 5) {
        relative = true;
        has_base = false;
      }
      if (has_base) base = registers[kRegisters[number]];
      if (mode == 1) {
        base += static_cast<int8_t>(*p++);
      } else if (mode == 2 || !has_base) {
        int32_t displacement;
        std::memcpy(&displacement, p, 4);
        p += 4;
        base += displacement;
      }
      if (relative) base += reinterpret_cast<int64_t>(p);
      address = reinterpret_cast<char*>(base);
    }
    next = reinterpret_cast<int64_t>(p);
  }

  bool is(int a_prefix, int an_opcode, bool in_memory) const {
    return valid && prefix == a_prefix && opcode == an_opcode && (mode != 3) == in_memory;
  }
};

bool configured(int tile) { return config.palette == 1 && config.rows[tile] && tile < 8; }

bool configure(const void* from) {
  Config wanted;
  std::memcpy(&wanted, from, sizeof(wanted));
  if (wanted.palette == 0) {  // as tilerelease
    config = Config{};
    return true;
  }
  if (wanted.palette != 1 || wanted.start_row != 0) return false;
  for (const uint8_t x : wanted.reserved) {
    if (x != 0) return false;
  }
  for (int i = 0; i < 16; ++i) {
    if (wanted.rows[i] > (i < 8 ? 16 : 0) || wanted.row_bytes[i] > (i < 8 ? 64 : 0)) return false;
    if ((wanted.rows[i] == 0) != (wanted.row_bytes[i] == 0)) return false;
  }
  config = wanted;
  std::memset(tiles, 0, sizeof(tiles));
  return true;
}

bool move(const Instruction& x, bool store) {
  if (!configured(x.reg) || x.rm != 4) return false;
  Tile& tile = tiles[x.reg];
  if (!store) std::memset(&tile, 0, sizeof(tile));
  for (int i = 0; i < config.rows[x.reg]; ++i) {
    char* row = x.address + i * x.stride;
    if (store) {
      std::memcpy(row, tile.row[i], config.row_bytes[x.reg]);
    } else {
      std::memcpy(tile.row[i], row, config.row_bytes[x.reg]);
    }
  }
  return true;
}

// Subnormal numbers count as zero.
float flushed(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f * x : x; }
float half(uint32_t word, int i) {
  const uint32_t bits = i == 0 ? word << 16 : word & ~0xffffu;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

bool multiply(int out, int a, int b) {
  if (out == a || out == b || a == b || b >= 8) return false;
  if (!configured(out) || !configured(a) || !configured(b)) return false;
  const int rows = config.rows[out], depth = config.rows[b], columns = config.row_bytes[out] / 4;
  if (rows != config.rows[a] || depth * 4 != config.row_bytes[a]) return false;
  if (columns * 4 != config.row_bytes[b]) return false;
  for (int m = 0; m < rows; ++m) {
    float sums[2][16] = {};
    for (int k = 0; k < depth; ++k) {
      for (int i = 0; i < 2; ++i) {
        const float x = half(tiles[a].row[m][k], i);
        for (int n = 0; n < columns; ++n) {
          sums[i][n] = flushed(std::fma(x, half(tiles[b].row[k][n], i), sums[i][n]));
        }
      }
    }
    for (int n = 0; n < columns; ++n) {
      float sum;
      std::memcpy(&sum, &tiles[out].row[m][n], 4);
      sum = flushed(flushed(sum) + flushed(sums[0][n] + sums[1][n]));
      std::memcpy(&tiles[out].row[m][n], &sum, 4);
    }
  }
  products.fetch_add(1, std::memory_order_relaxed);
  return true;
}

bool carry_out(const Instruction& x) {
  if (x.is(0, 0x49, true)) return x.reg == 0 && configure(x.address);  // ldtilecfg
  if (x.is(1, 0x49, true)) {                                           // sttilecfg
    if (x.reg != 0) return false;
    std::memcpy(x.address, &config, sizeof(config));
    return true;
  }
  if (x.is(3, 0x49, false)) {  // tilezero
    if (!configured(x.reg)) return false;
    std::memset(&tiles[x.reg], 0, sizeof(Tile));
    return true;
  }
  if (x.is(3, 0x4b, true)) return move(x, false);                       // tileloadd
  if (x.is(2, 0x4b, true)) return move(x, true);                        // tilestored
  if (x.is(2, 0x5c, false)) return multiply(x.reg, x.rm, x.third);      // tdpbf16ps
  return false;
}

void handle(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction instruction(registers);
  if (carry_out(instruction)) {
    registers[REG_RIP] = instruction.next;
  } else {
    signal(SIGILL, SIG_DFL);  // the instruction is met again, and ends the process
  }
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

__attribute__((destructor)) void report() {
  const long long count = products;
  if (count) std::fprintf(stderr, "carried out %lld products of tiles\n", count);
}

}  // namespace
