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

struct Sha256Way {
  std::string_view name;
  Sha256Blocks blocks;
};

// Those that this processor has, the fastest first; the last one is plain C++.
const std::vector<Sha256Way>& sha256_ways();

// The digest, in hexadecimal, computed in one of these ways.
std::string sha256_by(Sha256Blocks blocks, std::string_view bytes);

extern const uint32_t kSha256Rounds[64];

// Null where this is another processor, or one without the instructions.
Sha256Blocks sha256_of_x86();
Sha256Blocks sha256_of_arm();

}  // namespace rmse
