// SHA-256 (FIPS 180-4).
#pragma once

#include <string>
#include <string_view>

namespace rmse {

std::string sha256(std::string_view bytes);           // hexadecimal
std::string sha256_of_file(const std::string& path);  // throws std::runtime_error where it cannot be read

}  // namespace rmse
