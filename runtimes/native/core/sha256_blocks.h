// Blocks of SHA-256, one function for each instruction set that has something for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rmse {

// Takes `count` blocks of 64 bytes into the state (8,).
using Sha256Blocks = void (*)(uint32_t* state, const uint8_t* blocks, size_t count);

// The same of two messages side by side. A round waits for the one before, and a processor has room for two such chains.
using Sha256Pairs = void (*)(uint32_t* const* states, const uint8_t* const* blocks, size_t count);

struct Sha256Way {
  std::string_view name;
  Sha256Blocks blocks;
  Sha256Pairs pairs;  // null: one message after the other is as fast
};

// Those that this processor has, the fastest first; the last one is plain C++.
const std::vector<Sha256Way>& sha256_ways();

// The digest, in hexadecimal, computed in one of these ways.
std::string sha256_by(const Sha256Way& way, std::string_view bytes);

extern const uint32_t kSha256Rounds[64];

// Null where this is another processor, or one without the instructions.
Sha256Blocks sha256_of_x86();
Sha256Pairs sha256_pairs_of_x86();
Sha256Blocks sha256_of_arm();
Sha256Pairs sha256_pairs_of_arm();

}  // namespace rmse
