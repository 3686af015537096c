// Reading JSON that anybody may have written, and writing it as Python's json module does. The parser is nlohmann's.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace rmse {

using Json = nlohmann::json;              // what is read
using Document = nlohmann::ordered_json;  // what is written: members stay in the order they were put in

// A text that is not JSON, or a value that is not what a reader expected.
struct JsonError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws JsonError saying what is wrong: it is no JSON or not UTF-8, a name occurs twice in an object, a number is too
// large for any type, values are nested more than 32 deep.
Json parse_json(std::string_view text);

// Values of a known kind; JsonError where they are another, or not there.
const Json& member(const Json& object, std::string_view key);
bool truth(const Json& value);
int64_t integer(const Json& value);
double number(const Json& value);
const std::string& string(const Json& value);
const Json::array_t& items(const Json& value);
const Json::object_t& members(const Json& value);

const Json* find(const Json& object, std::string_view key);  // null where this is no object or has no such member

// json.dumps(value)
std::string dump(const Json& value);
std::string dump(const Document& value);

}  // namespace rmse
