// What the command's JSON documents have in common.
#pragma once

#include <cstdint>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "../core/json.h"
#include "../core/model.h"
#include "../core/package.h"

namespace rmse {

Document document_of(const Dials& dials);

// What --expert-ram did while `tokens` tokens were read or written; null without it.
Document offload_document(Model& model, int64_t tokens);

// The same for people, a few lines.
std::string offload_lines(const Document& offload);

// How many positions have depth 1..`full`.
std::vector<int64_t> histogram(const std::vector<int64_t>& depth, int64_t full);

template <typename Number>
double mean(const std::vector<Number>& values) {
  return static_cast<double>(std::accumulate(values.begin(), values.end(), Number{})) / std::ssize(values);
}

// `value`, or null where there is nothing to say.
inline Document known(bool there, double value) { return there ? Document(value) : Document(); }

}  // namespace rmse
