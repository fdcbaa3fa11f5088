#include "amx.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(LK_EMULATED_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

bool may_use_amx() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  if (!(edx & kBfloat16) || !(edx & kTiles)) return false;
  // Threads save 8 KiB more when they are interrupted, so a process has to ask, once.
  // Of asm/prctl.h, since Linux 5.16. What answers every call with 0 is found out.
  constexpr int kGetPermission = 0x1022, kRequestPermission = 0x1023, kTileData = 18;
  uint64_t permitted = 0;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 &&
         syscall(SYS_arch_prctl, kGetPermission, &permitted) == 0 && (permitted >> kTileData & 1);
}
#else
bool may_use_amx() {
#ifdef LK_EMULATED_AMX
  return true;
#else
  return false;
#endif
}
#endif
