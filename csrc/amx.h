#pragma once

// Whether this process may use the tile registers of AMX for bfloat16. Asks Linux for them.
bool may_use_amx();
