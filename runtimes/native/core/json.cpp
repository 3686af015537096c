#include "json.h"

#include <set>
#include <vector>

#include "text.h"

namespace rmse {
namespace {

constexpr int kDeepest = 32;        // arrays and objects within each other, as in rmse_edge/schema.py
constexpr size_t kLongestGot = 80;  // bytes of a value that a message quotes

// What the parser asks before it takes a part of the text: it would take any depth, and the last of equal names.
class Limits {
 public:
  bool operator()(int depth, Json::parse_event_t event, const Json& part) {
    using Event = Json::parse_event_t;
    if (event == Event::object_end) {
      names_.pop_back();
    } else if (event != Event::array_end && depth > kDeepest) {
      throw JsonError("nested too deeply");
    } else if (event == Event::object_start) {
      names_.emplace_back();
    } else if (event == Event::key && !names_.back().insert(part.get_ref<const std::string&>()).second) {
      throw JsonError(dump(part).substr(0, kLongestGot) + " occurs twice in one object");
    }
    return true;
  }

 private:
  std::vector<std::set<std::string>> names_;  // of the objects that are open
};

[[noreturn]] void unlike(const Json& value, const char* expected) {
  std::string got = dump(value);
  if (got.size() > kLongestGot) got = got.substr(0, kLongestGot) + "...";
  throw JsonError("got " + got + ", expected " + expected);
}

template <typename Value>
void write(std::string& out, const Value& value) {
  if (!value.is_structured()) {
    out += value.dump(-1, ' ', /*ensure_ascii=*/true, Value::error_handler_t::replace);
    return;
  }
  out += value.is_array() ? '[' : '{';
  bool first = true;
  for (const auto& [key, part] : value.items()) {
    if (!first) out += ", ";
    first = false;
    if (value.is_object()) {
      write(out, Value(key));
      out += ": ";
    }
    write(out, part);
  }
  out += value.is_array() ? ']' : '}';
}

template <typename Value>
std::string dumped(const Value& value) {
  std::string out;
  write(out, value);
  return out;
}

}  // namespace

Json parse_json(std::string_view text) {
  const size_t invalid = find_invalid_utf8(text);
  if (invalid != text.npos) throw JsonError("not UTF-8 at byte " + std::to_string(invalid));
  try {
    return Json::parse(text.begin(), text.end(), Limits());
  } catch (const Json::exception& error) {
    // "[json.exception.parse_error.101] parse error at line 1, column 6: ...; last read: '...'", which may be long.
    const std::string_view what = error.what();
    const size_t start = what.find("] ") + 2;
    throw JsonError(std::string(what.substr(start, what.find("; last read", start) - start)));
  }
}

const Json& member(const Json& object, std::string_view key) {
  const Json* found = find(object, key);
  if (found == nullptr) throw JsonError("there is no \"" + std::string(key) + "\"");
  return *found;
}

const Json* find(const Json& object, std::string_view key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  return found == object.end() ? nullptr : &*found;
}

bool truth(const Json& value) {
  if (!value.is_boolean()) unlike(value, "true or false");
  return value.get<bool>();
}

int64_t integer(const Json& value) {
  const bool fits = value.is_number_integer() && (!value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX);
  if (!fits) unlike(value, "a whole number");
  return value.get<int64_t>();
}

double number(const Json& value) {
  if (!value.is_number()) unlike(value, "a number");
  return value.get<double>();
}

const std::string& string(const Json& value) {
  if (!value.is_string()) unlike(value, "a string");
  return value.get_ref<const std::string&>();
}

const Json::array_t& items(const Json& value) {
  if (!value.is_array()) unlike(value, "an array");
  return value.get_ref<const Json::array_t&>();
}

const Json::object_t& members(const Json& value) {
  if (!value.is_object()) unlike(value, "an object");
  return value.get_ref<const Json::object_t&>();
}

std::string dump(const Json& value) { return dumped(value); }

std::string dump(const Document& value) { return dumped(value); }

}  // namespace rmse
