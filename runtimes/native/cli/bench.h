// Speed of a model at fixed depths and with its own exits, all rows interleaved in one run: rmse-bench's document.
//
// pp  prefill: tokens of a prompt per second
// tg  decode: tokens per second one by one, teacher-forced, so that every repetition does the same work
// loop1, loop64  the loop alone: milliseconds per call of 1 and of 64 rows
#pragma once

#include <cstdint>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "options.h"

namespace rmse {

// Opens the package, runs it as `options` say and gives the document in the form that they ask for.
std::string bench(const Options& options);

// How many positions have depth 1..`full`.
std::vector<int64_t> histogram(const std::vector<int64_t>& depth, int64_t full);

template <typename Number>
double mean(const std::vector<Number>& values) {
  return static_cast<double>(std::accumulate(values.begin(), values.end(), Number{})) / std::ssize(values);
}

}  // namespace rmse
