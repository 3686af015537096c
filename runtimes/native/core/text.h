// Texts, which are UTF-8 here, and numbers as texts.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace rmse {

// The byte at which `text` stops being UTF-8; npos where it is.
size_t find_invalid_utf8(std::string_view text);
// The character that starts at byte `i` of valid UTF-8; moves `i` behind it.
char32_t next_character(std::string_view text, size_t& i);

// The shortest text that reads back as the same number, with a point or an exponent: 0.5, 1.0, 1e-05.
std::string shown(double value);

// The whole file; std::runtime_error where it cannot be read.
std::string read_file(const std::string& path);

}  // namespace rmse
