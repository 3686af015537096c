// Values of a manifest that anybody may have written, typed and bounded: what does not fit is a JsonError that names the field.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "json.h"

namespace rmse {

constexpr int64_t kMany = int64_t{1} << 53;  // of bytes, tokens, parameters
constexpr size_t kLongestName = 200;

[[noreturn]] inline void unfit(const Json& got, const std::string& expected) {
  throw JsonError("got " + dump(got).substr(0, 100) + ", expected " + expected);
}

inline auto whole(int64_t least, int64_t most) {
  return [=](const Json& value) {
    const int64_t n = integer(value);
    if (n < least || n > most) unfit(value, "a whole number from " + std::to_string(least) + " to " + std::to_string(most));
    return n;
  };
}

inline double positive(const Json& value) {
  const double x = number(value);
  if (!(x > 0)) unfit(value, "a positive number");
  return x;
}

inline std::string name(const Json& value) {
  const std::string& text = string(value);
  if (text.empty() || text.size() > kLongestName) unfit(value, "a text of 1 to 200 bytes");
  return text;
}

template <typename Value>
auto one_of(const std::map<std::string, Value>& choices) {
  return [=](const Json& value) {
    const auto found = value.is_string() ? choices.find(string(value)) : choices.end();
    if (found != choices.end()) return found->second;
    std::string names;
    for (const auto& [choice, _] : choices) names += (names.empty() ? "" : ", ") + choice;
    unfit(value, "one of " + names);
  };
}

template <typename Read>
auto or_null(Read read) {
  return [=](const Json& value) {
    using Value = std::invoke_result_t<Read, const Json&>;
    return value.is_null() ? std::optional<Value>() : std::optional<Value>(read(value));
  };
}

template <typename Read>
auto list_of(Read read) {
  return [=](const Json& list) {
    std::vector<std::invoke_result_t<Read, const Json&>> values;
    for (const Json& value : items(list)) values.push_back(read(value));
    return values;
  };
}

inline std::set<std::string> set_of_names(const Json& list) {
  const auto names = list_of(name)(list);
  return {names.begin(), names.end()};
}

// What `run` gives; what it complains about is said of `where`.
template <typename Do>
auto within(const std::string& where, Do run) {
  try {
    return run();
  } catch (const JsonError& error) {
    const std::string what = error.what();
    throw JsonError(where + (what.starts_with('[') ? "" : ": ") + what);  // "methods.loop_1.inputs" + "[0].shape: ..."
  }
}

// An object of the manifest and where it stands: what does not fit is refused as WHERE.KEY.
class Part {
 public:
  Part(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    within(where_, [&] { return members(object_).size(); });
  }

  template <typename Read>
  auto at(const std::string& key, Read read) const {
    const Json* found = find(object_, key);
    if (found == nullptr) throw JsonError(where_ + "." + key + ": is missing");
    return within(where_ + "." + key, [&] { return read(*found); });
  }

  template <typename Read, typename Value>
  auto at(const std::string& key, Read read, Value otherwise) const {
    return find(object_, key) == nullptr ? std::invoke_result_t<Read, const Json&>(otherwise) : at(key, read);
  }

  bool has(const std::string& key) const { return find(object_, key) != nullptr; }

  // A part of this one.
  Part part(const std::string& key) const {
    return Part(at(key, [](const Json& value) { return std::cref(value); }).get(), where_ + "." + key);
  }

  // The names in it, each as long as a name may be.
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const auto& [key, _] : members(object_)) {
      if (key.empty() || key.size() > kLongestName) refuse("", "a name of " + std::to_string(key.size()) + " bytes", "1 to 200");
      found.push_back(key);
    }
    return found;
  }

  [[noreturn]] void refuse(const std::string& key, const std::string& got, const std::string& expected) const {
    throw JsonError(where_ + key + ": got " + got + ", expected " + expected);
  }

 private:
  const Json& object_;
  std::string where_;
};

}  // namespace rmse
