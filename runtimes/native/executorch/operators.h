// What operators.cpp gives to hosts as C functions; Python calls them through ctypes.
#pragma once

extern "C" {

// One packed copy of a weight for all methods that are loaded from now on; 0 where that worked.
int rmse_share_packed_weights(int on);

// From now on the runtime's messages go nowhere, but for the last error of each thread.
void rmse_take_messages();

// What the runtime last complained about in this thread; empty where it did not. Valid until it complains again.
const char* rmse_last_error();

// Forgets it: whoever is about to report a call's failure calls this before, and never quotes an old complaint.
void rmse_clear_error();

// The instruction set of the products: "vnni", "avx2", "dotprod", "neon" or "portable".
const char* rmse_instruction_set();
}
