// Speed of a model at fixed depths and with its own exits, all rows interleaved in one run: rmse-bench's document.
//
// pp  prefill: tokens of a prompt per second
// tg  decode: tokens per second one by one, teacher-forced, so that every repetition does the same work
// loop1, loop64  the loop alone: milliseconds per call of 1 and of 64 rows
#pragma once

#include <string>

#include "options.h"

namespace rmse {

// Opens the package, runs it as `options` say and gives the document in the form that they ask for.
std::string bench(const Options& options);

}  // namespace rmse
