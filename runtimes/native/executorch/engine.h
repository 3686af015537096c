// ExecuTorch as the engine of packages exported with --target executorch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "../core/engine.h"
#include "../core/package.h"

namespace rmse {

constexpr char kExecutorch[] = "executorch";  // the target of its packages

// Starts the engine, which keeps its messages to itself, with as many threads as given; 0: its own choice.
void start_executorch(int64_t threads);

// The engine of a package that was made for it. Throws std::runtime_error, one line, where it cannot load the program.
// `packed_weights`: see packed_weights.h; empty: none.
std::unique_ptr<Engine> open_executorch(const Package& package, const std::string& packed_weights = "");

}  // namespace rmse
