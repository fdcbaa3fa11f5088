#include "cache.h"

#include <unistd.h>

int64_t second_level_cache() {
  static const int64_t size = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long told = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (told > 0) return static_cast<int64_t>(told);
#endif
    return int64_t{1} << 20;
  }();
  return size;
}
