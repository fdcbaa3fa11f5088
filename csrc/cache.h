// What tile sizes depend on.
#pragma once

#include <cstdint>

// Bytes of a core's second-level cache; 1 MiB where the system does not tell.
int64_t second_level_cache();
