#include "text.h"

#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace rmse {

size_t find_invalid_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const size_t start = i;
    const auto lead = static_cast<unsigned char>(text[i]);
    if ((lead >= 0x80 && lead < 0xc2) || lead > 0xf4) return start;
    const size_t length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    if (length > text.size() - start) return start;
    for (size_t j = 1; j < length; ++j) {
      if ((text[start + j] & 0xc0) != 0x80) return start;
    }
    const char32_t c = next_character(text, i);
    const bool overlong = (length == 3 && c < 0x800) || (length == 4 && c < 0x10000);
    if (overlong || (c >= 0xd800 && c <= 0xdfff) || c > 0x10ffff) return start;
  }
  return text.npos;
}

char32_t next_character(std::string_view text, size_t& i) {
  const auto byte = [&](size_t at) { return static_cast<char32_t>(static_cast<unsigned char>(text[at])); };
  const char32_t lead = byte(i++);
  const int tail = lead < 0xc0 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
  char32_t c = tail == 0 ? lead : lead & (0x3f >> tail);
  for (int k = 0; k < tail; ++k) c = c << 6 | (byte(i++) & 0x3f);
  return c;
}

std::string shown(double value) {
  if (!std::isfinite(value)) return std::isnan(value) ? "NaN" : value > 0 ? "Infinity" : "-Infinity";
  char digits[32];
  std::string text(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
  return text.find_first_of(".e") == text.npos ? text + ".0" : text;
}

std::string read_file(const std::string& path) {
  if (std::filesystem::is_directory(path)) throw std::runtime_error(path + ": is a folder, expected a file");
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read (" + std::strerror(errno) + ")");
  return std::string(std::istreambuf_iterator<char>(file), {});
}

}  // namespace rmse
