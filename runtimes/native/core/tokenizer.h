// Character and word tokenizers: those tokenizer.json files that rmse-edge itself makes (rmse_edge/text.py).
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace rmse {

class Tokenizer {
 public:
  // Throws std::runtime_error where the file is not there or is no tokenizer.json. One of another kind is opened, too:
  // it encodes nothing, and its tokens are shown as numbers.
  static Tokenizer open(const std::string& path);

  bool reads_text() const { return kind_ != Kind::kOther; }

  // The tokens of `text`, which is UTF-8, at most `limit` of them. Throws std::runtime_error naming the first character
  // or word outside the vocabulary.
  std::vector<int64_t> encode(std::string_view text, size_t limit = std::numeric_limits<size_t>::max()) const;

  // The text of one token; `first`: nothing stands before it.
  std::string decode(int64_t token, bool first) const;

 private:
  enum class Kind { kCharacters, kWords, kOther };

  void read(const std::string& json);
  std::vector<std::string_view> split(std::string_view text, size_t limit) const;
  [[noreturn]] void refuse(std::string_view piece) const;

  Kind kind_ = Kind::kOther;
  std::unordered_map<std::string, int64_t> ids_;
  std::vector<std::string> pieces_;  // by id
  int64_t unknown_ = -1;             // the token of pieces outside the vocabulary; -1: there is none
};

}  // namespace rmse
