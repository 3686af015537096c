#include "json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>

namespace rmse {
namespace {

constexpr int kDeepest = 32;  // arrays and objects within each other, as in rmse_edge/schema.py

void append_utf8(std::string& out, char32_t c) {
  const auto tail = [&](int shift) { out += static_cast<char>(0x80 | ((c >> shift) & 0x3f)); };
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xc0 | (c >> 6));
    tail(0);
  } else if (c < 0x10000) {
    out += static_cast<char>(0xe0 | (c >> 12));
    tail(6);
    tail(0);
  } else {
    out += static_cast<char>(0xf0 | (c >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
}

void append_escape(std::string& out, char32_t unit) {
  static constexpr char kDigits[] = "0123456789abcdef";
  out += "\\u";
  for (int shift = 12; shift >= 0; shift -= 4) out += kDigits[(unit >> shift) & 15];
}

void append_string(std::string& out, std::string_view text) {
  out += '"';
  for (size_t i = 0; i < text.size();) {
    const char32_t c = next_character(text, i);
    switch (c) {
      case '"': out += "\\\""; break;
      case '\\': out += "\\\\"; break;
      case '\n': out += "\\n"; break;
      case '\r': out += "\\r"; break;
      case '\t': out += "\\t"; break;
      case '\b': out += "\\b"; break;
      case '\f': out += "\\f"; break;
      default:
        if (c >= 0x20 && c < 0x7f) {
          out += static_cast<char>(c);
        } else if (c < 0x10000) {
          append_escape(out, c);
        } else {  // a surrogate pair
          append_escape(out, 0xd800 + ((c - 0x10000) >> 10));
          append_escape(out, 0xdc00 + ((c - 0x10000) & 0x3ff));
        }
    }
  }
  out += '"';
}

}  // namespace

// ------------------------------------------------------------------------------------------------------- reading

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = this->value(0);
    space();
    if (at_ != text_.size()) fail("expected the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw JsonError(std::string(what) + " at byte " + std::to_string(at_));
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  void space() { at_ = std::min(text_.find_first_not_of(" \t\n\r", at_), text_.size()); }

  Json value(int depth) {
    if (depth > kDeepest) fail("nested too deeply");
    space();
    if (peek() == '{') return object(depth);
    if (peek() == '[') return array(depth);
    if (peek() == '"') return Json(string());
    if (take("null")) return Json();
    if (take("true")) return Json(true);
    if (take("false")) return Json(false);
    return number();
  }

  Json object(int depth) {
    Json result = Json::object();
    ++at_;
    space();
    if (take("}")) return result;
    do {
      space();
      if (peek() != '"') fail("expected a name");
      std::string key = string();
      space();
      if (!take(":")) fail("expected ':'");
      result.add(std::move(key), value(depth + 1));
      space();
    } while (take(","));
    if (!take("}")) fail("expected ',' or '}'");
    reject_repeated(result);
    return result;
  }

  // Of two members with one name, readers disagree which counts.
  void reject_repeated(const Json& object) const {
    std::vector<std::string_view> keys;
    for (const auto& [key, _] : object.members_) keys.push_back(key);
    std::sort(keys.begin(), keys.end());
    if (std::adjacent_find(keys.begin(), keys.end()) != keys.end()) fail("a name occurs twice in the object that ends");
  }

  Json array(int depth) {
    Json result = Json::array();
    ++at_;
    space();
    if (take("]")) return result;
    do {
      result.items_.push_back(value(depth + 1));
      space();
    } while (take(","));
    if (!take("]")) fail("expected ',' or ']'");
    return result;
  }

  Json number() {
    const size_t start = at_;
    take("-");
    if (!take("0")) digits();
    if (take(".")) digits();
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    Json result;
    result.kind_ = Json::Kind::kNumber;
    result.text_ = text_.substr(start, at_ - start);
    return result;
  }

  void digits() {
    const size_t end = std::min(text_.find_first_not_of("0123456789", at_), text_.size());
    if (end == at_) fail("expected a value");
    at_ = end;
  }

  std::string string() {
    std::string result;
    for (++at_; !take("\"");) {
      if (at_ == text_.size() || static_cast<unsigned char>(peek()) < 0x20) fail("a string does not end");
      if (take("\\")) {
        append_utf8(result, escape());
      } else {
        result += text_[at_++];
      }
    }
    return result;
  }

  char32_t escape() {
    static constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    const char name = peek();
    ++at_;
    if (name != 'u') {
      const size_t i = kNames.find(name);
      if (i == kNames.npos) fail("an unknown escape");
      return kMeanings[i];
    }
    const char32_t first = unit();
    if (first < 0xd800 || first > 0xdfff) return first;
    const char32_t second = first < 0xdc00 && take("\\u") ? unit() : 0;
    if (second < 0xdc00 || second > 0xdfff) fail("half a surrogate pair");
    return 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
  }

  char32_t unit() {
    uint32_t value = 0;
    const std::string_view digits = text_.substr(at_, 4);
    const auto [end, _] = std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
    if (end != digits.data() + 4) fail("expected four hexadecimal digits");
    at_ += 4;
    return value;
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text) {
  const size_t invalid = find_invalid_utf8(text);
  if (invalid != text.npos) throw JsonError("not UTF-8 at byte " + std::to_string(invalid));
  return JsonParser(text).document();
}

// ------------------------------------------------------------------------------------------------------- values

Json::Json(double value) : kind_(Kind::kNumber) {
  if (!std::isfinite(value)) {
    text_ = std::isnan(value) ? "NaN" : value > 0 ? "Infinity" : "-Infinity";
    return;
  }
  char digits[32];
  text_.assign(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);  // the shortest that reads back equal
  if (text_.find_first_of(".e") == text_.npos) text_ += ".0";
}

Json Json::array(std::vector<Json> items) {
  Json result;
  result.kind_ = Kind::kArray;
  result.items_ = std::move(items);
  return result;
}

Json Json::array(const std::vector<int64_t>& values) { return array(std::vector<Json>(values.begin(), values.end())); }

Json Json::object(std::vector<Member> members) {
  Json result;
  result.kind_ = Kind::kObject;
  result.members_ = std::move(members);
  return result;
}

void Json::expect(Kind kind, const char* name) const {
  if (kind_ != kind) throw JsonError("got " + dump().substr(0, 80) + ", expected " + name);
}

bool Json::boolean() const {
  expect(Kind::kBool, "true or false");
  return truth_;
}

int64_t Json::integer() const {
  expect(Kind::kNumber, "a whole number");
  int64_t value = 0;
  const char* last = text_.data() + text_.size();
  const auto [end, error] = std::from_chars(text_.data(), last, value);
  if (error != std::errc() || end != last) throw JsonError("got " + text_.substr(0, 80) + ", expected a whole number");
  return value;
}

double Json::number() const {
  expect(Kind::kNumber, "a number");
  const double value = std::strtod(text_.c_str(), nullptr);
  if (!std::isfinite(value)) throw JsonError("got " + text_.substr(0, 80) + ", expected a number that is not so large");
  return value;
}

const std::string& Json::string() const {
  expect(Kind::kString, "a string");
  return text_;
}

const std::vector<Json>& Json::items() const {
  expect(Kind::kArray, "an array");
  return items_;
}

const std::vector<Json::Member>& Json::members() const {
  expect(Kind::kObject, "an object");
  return members_;
}

const Json* Json::find(std::string_view key) const {
  const auto found = std::find_if(members_.begin(), members_.end(), [&](const Member& m) { return m.first == key; });
  return found == members_.end() ? nullptr : &found->second;
}

const Json& Json::at(std::string_view key) const {
  const Json* found = find(key);
  if (found == nullptr) throw JsonError("there is no \"" + std::string(key) + "\"");
  return *found;
}

Json Json::without(std::string_view key) const {
  Json result = *this;
  std::erase_if(result.members_, [&](const Member& m) { return m.first == key; });
  return result;
}

// ------------------------------------------------------------------------------------------------------- writing

std::string Json::dump() const {
  std::string out;
  write(out, false);
  return out;
}

std::string Json::canonical() const {
  std::string out;
  write(out, true);
  return out;
}

void Json::write(std::string& out, bool canonical) const {
  const char *comma = canonical ? "," : ", ", *colon = canonical ? ":" : ": ";
  switch (kind_) {
    case Kind::kNull: out += "null"; break;
    case Kind::kBool: out += truth_ ? "true" : "false"; break;
    case Kind::kNumber: out += text_; break;
    case Kind::kString: append_string(out, text_); break;
    case Kind::kArray:
      out += '[';
      for (size_t i = 0; i < items_.size(); ++i) {
        if (i > 0) out += comma;
        items_[i].write(out, canonical);
      }
      out += ']';
      break;
    case Kind::kObject: {
      std::vector<const Member*> order;
      for (const Member& member : members_) order.push_back(&member);
      if (canonical) {  // bytes of UTF-8 sort like the characters they stand for
        std::sort(order.begin(), order.end(), [](const Member* a, const Member* b) { return a->first < b->first; });
      }
      out += '{';
      for (size_t i = 0; i < order.size(); ++i) {
        if (i > 0) out += comma;
        append_string(out, order[i]->first);
        out += colon;
        order[i]->second.write(out, canonical);
      }
      out += '}';
      break;
    }
  }
}

// --------------------------------------------------------------------------------------------------------- UTF-8

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

}  // namespace rmse
