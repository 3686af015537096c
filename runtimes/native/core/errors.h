// What a caller of the library gave it wrong.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace rmse {

// "max_loops: got 9, expected 1..4". The command puts its flag in the argument's place.
class ArgumentError : public std::runtime_error {
 public:
  ArgumentError(std::string argument, std::string problem)
      : std::runtime_error(argument + ": " + problem), argument(std::move(argument)), problem(std::move(problem)) {}

  const std::string argument, problem;
};

}  // namespace rmse
