#include "tokenizer.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "json.h"
#include "package.h"

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

}  // namespace

Tokenizer Tokenizer::open(const std::string& path) {
  Tokenizer tokenizer;
  try {
    tokenizer.read(Json::parse(read_file(path)));
  } catch (const JsonError& error) {
    throw std::runtime_error(path + ": not a tokenizer.json (" + error.what() + ")");
  }
  return tokenizer;
}

void Tokenizer::read(const Json& file) {
  kind_ = kind_of(file);
  if (kind_ == Kind::kOther) return;
  const Json& model = file.at("model");
  for (const auto& [piece, value] : model.at("vocab").members()) {
    const int64_t id = value.integer();
    if (id < 0 || id > kLargestId) throw JsonError("token " + std::to_string(id) + " is out of range");
    if (id >= std::ssize(pieces_)) pieces_.resize(id + 1);
    pieces_[id] = piece;
    ids_.emplace(piece, id);
  }
  if (const Json* unknown = model.find("unk_token"); unknown != nullptr && !unknown->is_null()) {
    const auto found = ids_.find(unknown->string());
    if (found != ids_.end()) unknown_ = found->second;
  }
}

Tokenizer::Kind Tokenizer::kind_of(const Json& file) {
  const auto type_of = [&](const char* part) {
    return file.at(part).is_null() ? "" : file.at(part).at("type").string();
  };
  // Truncation and padding are left out on purpose: they are what some program asked for last before it saved the file.
  const bool plain = file.at("normalizer").is_null() && file.at("post_processor").is_null() &&
                     file.at("added_tokens").items().empty();
  if (!plain || type_of("model") != "WordLevel") return Kind::kOther;
  const Json& splitter = file.at("pre_tokenizer");
  if (type_of("pre_tokenizer") == "Split" && type_of("decoder") == "Fuse") {
    const Json* regex = splitter.at("pattern").find("Regex");
    const bool characters = regex != nullptr && regex->is("[\\s\\S]") && splitter.at("behavior").is("Isolated") &&
                            !splitter.at("invert").boolean();
    return characters ? Kind::kCharacters : Kind::kOther;
  }
  return type_of("pre_tokenizer") == "WhitespaceSplit" && type_of("decoder").empty() ? Kind::kWords : Kind::kOther;
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, size_t limit) const {
  if (!reads_text()) {
    throw std::runtime_error(
        "this runner reads the tokenizers of characters and of words, and the package has another; give the prompt as "
        "--prompt-tokens");
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
