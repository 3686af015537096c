#include "tokenizer.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "json.h"
#include "text.h"

namespace rmse {
namespace {

constexpr int64_t kLargestId = 1 << 24;  // ids index a table: one far out would only be there to exhaust the memory

bool is_space(char32_t c) {  // Unicode's White_Space
  return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

bool is_control(char32_t c) { return c < 0x20 || (c >= 0x7f && c < 0xa0); }

// In quotes, on one line.
std::string quoted(std::string_view text) {
  std::string result = "'";
  for (size_t i = 0; i < text.size();) {
    const size_t start = i;
    const char32_t c = next_character(text, i);
    if (is_control(c)) {
      char escape[8];
      std::snprintf(escape, sizeof escape, c == '\n' ? "\\n" : c == '\t' ? "\\t" : c == '\r' ? "\\r" : "\\x%02x",
                    static_cast<unsigned>(c));
      result += escape;
    } else {
      result += text.substr(start, i - start);
    }
  }
  return result + "'";
}

std::string type_of(const Json& file, const char* part) {
  const Json& found = member(file, part);
  return found.is_null() ? "" : string(member(found, "type"));
}

// Pieces that are looked up as they stand. Truncation and padding are left out on purpose: they are what some program
// asked for last before it saved the file.
bool looks_up(const Json& file) {
  return member(file, "normalizer").is_null() && member(file, "post_processor").is_null() &&
         items(member(file, "added_tokens")).empty() && type_of(file, "model") == "WordLevel";
}

bool splits_into_characters(const Json& file) {
  if (type_of(file, "pre_tokenizer") != "Split" || type_of(file, "decoder") != "Fuse") return false;
  const Json& splitter = member(file, "pre_tokenizer");
  const Json* regex = find(member(splitter, "pattern"), "Regex");
  return regex != nullptr && *regex == "[\\s\\S]" && member(splitter, "behavior") == "Isolated" &&
         !truth(member(splitter, "invert"));
}

bool splits_into_words(const Json& file) {
  return type_of(file, "pre_tokenizer") == "WhitespaceSplit" && type_of(file, "decoder").empty();
}

}  // namespace

Tokenizer Tokenizer::open(const std::string& path) {
  Tokenizer tokenizer;
  try {
    tokenizer.read(read_file(path));
  } catch (const JsonError& error) {
    throw std::runtime_error(path + ": not a tokenizer.json (" + error.what() + ")");
  }
  return tokenizer;
}

void Tokenizer::read(const std::string& json) {
  const Json file = parse_json(json);
  if (!looks_up(file)) return;
  if (splits_into_characters(file)) {
    kind_ = Kind::kCharacters;
  } else if (splits_into_words(file)) {
    kind_ = Kind::kWords;
  } else {
    return;
  }
  const Json& model = member(file, "model");
  for (const auto& [piece, value] : members(member(model, "vocab"))) {
    const int64_t id = integer(value);
    if (id < 0 || id > kLargestId) throw JsonError("token " + std::to_string(id) + " is out of range");
    if (id >= std::ssize(pieces_)) pieces_.resize(id + 1);
    pieces_[id] = piece;
    ids_.emplace(piece, id);
  }
  if (const Json* unknown = find(model, "unk_token"); unknown != nullptr && !unknown->is_null()) {
    const auto found = ids_.find(string(*unknown));
    if (found != ids_.end()) unknown_ = found->second;
  }
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, size_t limit) const {
  if (!reads_text()) {
    throw std::runtime_error(
        "this runner reads the tokenizers of characters and of words, and the package has another; give the prompt as "
        "token ids");
  }
  std::vector<int64_t> tokens;
  for (const std::string_view piece : split(text, limit)) {
    const auto found = ids_.find(std::string(piece));
    if (found == ids_.end() && unknown_ < 0) refuse(piece);
    tokens.push_back(found == ids_.end() ? unknown_ : found->second);
  }
  return tokens;
}

std::vector<std::string_view> Tokenizer::split(std::string_view text, size_t limit) const {
  std::vector<std::string_view> pieces;
  size_t start = 0;  // of the word
  for (size_t i = 0; i < text.size() && pieces.size() < limit;) {
    const size_t begin = i;
    const char32_t c = next_character(text, i);
    if (kind_ == Kind::kCharacters) {
      pieces.push_back(text.substr(begin, i - begin));
    } else if (is_space(c)) {
      if (begin > start) pieces.push_back(text.substr(start, begin - start));
      start = i;
    }
  }
  if (kind_ == Kind::kWords && start < text.size() && pieces.size() < limit) pieces.push_back(text.substr(start));
  return pieces;
}

void Tokenizer::refuse(std::string_view piece) const {
  std::string known = std::to_string(ids_.size()) + " words";
  if (kind_ == Kind::kCharacters) {
    std::vector<std::string> characters;
    for (const std::string& character : pieces_) {
      size_t i = 0;
      if (!character.empty() && !is_control(next_character(character, i))) characters.push_back(character);
    }
    std::sort(characters.begin(), characters.end());
    known.clear();
    for (const std::string& character : characters) known += character;
  }
  throw std::runtime_error("the tokenizer has no token for " + quoted(piece) + "; it knows " + known);
}

std::string Tokenizer::decode(int64_t token, bool first) const {
  const std::string space = first || kind_ == Kind::kCharacters ? "" : " ";
  if (kind_ == Kind::kOther) return space + std::to_string(token);
  return token < std::ssize(pieces_) ? space + pieces_[token] : "";
}

}  // namespace rmse
