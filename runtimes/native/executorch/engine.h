// ExecuTorch as the engine of packages exported with --target executorch.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "../core/engine.h"
#include "../core/package.h"
#include "../offload/offload.h"

namespace rmse {

constexpr char kExecutorch[] = "executorch";  // the target of its packages

// Starts the engine, which keeps its messages to itself, with as many threads as given; 0: its own choice.
void start_executorch(int64_t threads);

// The engine of a package that was made for it. Throws std::runtime_error, one line, where it cannot load the program.
// `packed_weights`: see packed_weights.h; empty: none. `expert_ram`: how much memory experts may take, where that is bounded.
std::unique_ptr<Engine> open_executorch(const Package& package, const std::string& packed_weights = "",
                                        const std::optional<ExpertBudget>& expert_ram = {});

// What became of the budget of an engine that `open_executorch` gave; null: it has none.
Offload* offload_of(Engine& engine);

}  // namespace rmse
