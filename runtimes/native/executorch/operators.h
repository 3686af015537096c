// What operators.cpp gives to hosts as C functions; Python calls them through ctypes.
#pragma once

#include <cstdint>

extern "C" {

// One packed copy of a weight for all methods that are loaded from now on; 0 where that worked.
int rmse_share_packed_weights(int on);

// From now on the runtime's messages go nowhere, but for the last error of each thread.
void rmse_take_messages();

// What the runtime last complained about in this thread; empty where it did not. Valid until it complains again.
const char* rmse_last_error();

// Forgets it: whoever is about to report a call's failure calls this before, and never quotes an old complaint.
void rmse_clear_error();

// --expert-ram in steps, as runtimes/native/offload has them. `rmse_offload_open` begins the trial of a program that is loaded;
// null where it cannot. All that fail leave a line in `rmse_offload_error`.
void* rmse_offload_open(const char* program);
// The trial is over: a budget as the command line takes it. 0 where that worked, 1: it is none, or does not
// fit this program; 2: anything else.
int rmse_offload_begin(void* offload, const char* budget);
void rmse_offload_loop(void* offload, int64_t loop);
// Why experts cannot be read; empty: they can.
const char* rmse_offload_problem(void* offload);
const char* rmse_offload_figures(void* offload);  // JSON; valid until it is asked again
void rmse_offload_clear(void* offload);           // the figures
void rmse_offload_close(void* offload);
const char* rmse_offload_error();

// The instruction set of the products: "vnni", "avx2", "dotprod", "neon" or "portable".
const char* rmse_instruction_set();
}
