// How much memory experts may take: what --expert-ram says, and what the system leaves free.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace rmse {

struct ExpertBudget {
  enum class Kind { kBytes, kPercent, kAuto };
  Kind kind = Kind::kAuto;
  double value = 0;  // bytes, or percent of all experts

  // "300M" (of 1024 x 1024 bytes; also K, G, T, with B or iB behind them), "25%", "auto". Throws std::invalid_argument: what was
  // expected.
  static ExpertBudget parse(const std::string& text);
  // Bytes of experts of `total` bytes.
  int64_t bytes(int64_t total) const;
};

// What this process may still take, in bytes: of what the system has, and of what the cgroups that it is in allow, of which it is
// the least; cached pages of files count as free. Nothing where the system does not tell.
std::optional<int64_t> available_memory();

// The same from another root than "/": for tests.
std::optional<int64_t> available_memory(const std::string& root);

}  // namespace rmse
