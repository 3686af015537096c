// Random numbers that are the same in every language. rmse_edge/loop/generator.py says how they are made.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rmse {

// A stream of random numbers (Steele, Lea and Flood 2014).
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}

  uint64_t next();
  double uniform();  // from [0, 1), the upper 53 bits

 private:
  uint64_t state_;
};

// `count` nearly normal numbers: mean 0, variance 1, within -6..6. They depend on the seed and the position alone.
std::vector<float> noise(uint64_t seed, uint64_t position, size_t count);

}  // namespace rmse
