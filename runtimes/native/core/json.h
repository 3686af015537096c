// JSON as Python's json module reads and writes it: objects keep their order, numbers the text they were written as.
#pragma once

#include <concepts>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace rmse {

// A text that is not JSON, or a value that is not what a reader expected.
struct JsonError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Json {
 public:
  using Member = std::pair<std::string, Json>;

  Json() = default;  // null
  Json(bool value) : kind_(Kind::kBool), truth_(value) {}
  template <std::integral Integer>
  Json(Integer value) : kind_(Kind::kNumber), text_(std::to_string(value)) {}
  Json(double value);
  Json(const char* value) : Json(std::string(value)) {}
  Json(std::string value) : kind_(Kind::kString), text_(std::move(value)) {}
  static Json array(std::vector<Json> items = {});
  static Json array(const std::vector<int64_t>& values);
  static Json object(std::vector<Member> members = {});

  // Throws JsonError saying what is wrong at which byte.
  static Json parse(std::string_view text);

  bool is_null() const { return kind_ == Kind::kNull; }
  bool is_array() const { return kind_ == Kind::kArray; }
  bool is_object() const { return kind_ == Kind::kObject; }

  // Values of a known kind; JsonError where it is another.
  bool boolean() const;
  int64_t integer() const;
  double number() const;
  const std::string& string() const;
  const std::vector<Json>& items() const;
  const std::vector<Member>& members() const;
  const Json& at(std::string_view key) const;

  const Json* find(std::string_view key) const;  // null where this is no object or has no such member
  bool is(std::string_view text) const { return kind_ == Kind::kString && text_ == text; }

  Json without(std::string_view key) const;
  void add(std::string key, Json value) { members_.emplace_back(std::move(key), std::move(value)); }

  std::string dump() const;       // json.dumps(value)
  std::string canonical() const;  // json.dumps(value, sort_keys=True, separators=(",", ":"))

 private:
  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };
  friend class JsonParser;

  void expect(Kind kind, const char* name) const;
  void write(std::string& out, bool canonical) const;

  Kind kind_ = Kind::kNull;
  bool truth_ = false;
  std::string text_;  // of a string, or of a number as it was written
  std::vector<Json> items_;
  std::vector<Member> members_;
};

// UTF-8, in which JSON and all texts here are kept.

// The byte at which `text` stops being UTF-8; npos where it is.
size_t find_invalid_utf8(std::string_view text);
// The character that starts at byte `i` of valid UTF-8; moves `i` behind it.
char32_t next_character(std::string_view text, size_t& i);

}  // namespace rmse
