// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <string>
#include <string_view>

namespace rmse {

std::string sha256(std::string_view bytes);           // hexadecimal
std::string sha256_of_file(const std::string& path);  // throws std::runtime_error where it cannot be read

// Gives bytes piece by piece: puts at most so many there and says how many they are, 0: there are no more.
using Sha256Source = std::function<size_t(char* to, size_t most)>;

std::string sha256_of_pieces(const Sha256Source& read);
// Of two messages, which takes less time than one after the other where the processor has instructions for SHA-256.
std::array<std::string, 2> sha256_of_two(const Sha256Source& first, const Sha256Source& second);

}  // namespace rmse
