// The sampler of every runtime: the same seed and logits give the same token, here and in runtimes/text/sampling.py.
//
// It works in float64, adds up from the first token to the last, and owns its random numbers.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "generator.h"

namespace rmse {

// How a token is chosen from logits.
struct Sampling {
  double temperature = 0.8;  // 0: the largest logit, always
  int64_t top_k = 0;         // keep the k largest; 0 keeps all
  double top_p = 1;          // keep the smallest set of tokens with at least this probability; 1 keeps all
  uint64_t seed = 0;

  void check() const;  // throws std::runtime_error naming the flag and its range
};

// Draws tokens. One random number per token, whatever the options, so that they do not shift the stream.
class Sampler {
 public:
  explicit Sampler(const Sampling& sampling);

  // Throws std::runtime_error where the logits hold NaN or no finite maximum; the model that made them is damaged.
  // `unused`: ranges [first, end) of ids that are never drawn, as if the head had no rows for them.
  int64_t pick(std::span<const float> logits, std::span<const std::pair<int64_t, int64_t>> unused = {});

 private:
  void weigh(std::span<const float> logits, double largest);

  Sampling sampling_;
  SplitMix64 random_;
  std::vector<float> usable_;    // logits, without those of unused ids
  std::vector<double> weights_;  // probabilities of the tokens, then their running sum
  std::vector<int64_t> order_;   // tokens by falling logit
};

}  // namespace rmse
