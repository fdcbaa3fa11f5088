// Whether the lists of tiles that a call hands over are those of its mask.
#pragma once

#include "api.h"

// LK_OK; LK_OUT_OF_RANGE if a value of visible_until lies outside its row; LK_BAD_SCHEDULE if the
// lists point elsewhere than into the grid, lack a tile in which something is visible, or call one
// full that is not. Takes time by the blocks and tiles, not by the pairs. May throw std::bad_alloc.
int32_t check_schedule(const LkAttention& args);
