// What the methods of a package take and give, by its manifest, held against the model: runtimes/host/signatures.py in C++.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "info.h"
#include "tensor.h"

namespace rmse {

using Specs = std::map<std::string, TensorSpec>;  // by the names of the tensors

// What the host itself gives to the methods of a call of so many rows, state included.
Specs given_tensors(const ModelInfo& info, int64_t rows);

// Follows every tensor from the method that gives it to those that take it, without running any. Throws JsonError naming the
// field of the manifest where a method takes what nothing gives, or another shape or type of it.
void check_signatures(const ModelInfo& info);

}  // namespace rmse
