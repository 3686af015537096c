// Which experts loop k + 1 is going to use, guessed from the scores of loop k.
//
// A state changes little from one loop to the next; what a router's scores change by is mostly the same for all tokens, since the
// router has a number of its own for each loop. This change is learned while tokens pass: the guess is the best of the scores of
// loop k, moved as scores moved on average. Nothing has to be known about the model (docs/offload.md has how often it is right).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rmse {

class Forecast {
 public:
  Forecast(int64_t experts, int64_t top_k) : experts_(experts), top_k_(top_k) {}

  // scores (rows, E), active (rows,) of loop k, seen in order. Appends to `guess` what the next loop may use, each expert once;
  // nothing where loop k + 1 was never seen.
  void see(int64_t loop, const float* scores, const bool* active, int64_t rows, std::vector<int64_t>& guess);

 private:
  static constexpr int64_t kLearned = 4;  // rows of a call that are learned from
  static constexpr int64_t kMemory = 256;  // rows that the average is over, about

  struct Change {
    std::vector<float> mean;  // (E,)
    int64_t rows = 0;
  };
  void learn(int64_t loop, const float* scores, const bool* active, int64_t rows);
  void best(const float* scores, const Change& change, std::vector<int64_t>& guess);

  int64_t experts_, top_k_;
  std::vector<Change> changes_;   // from loop k to k + 1
  std::vector<float> before_;     // scores of the loop before, of the rows that are learned from
  std::vector<int64_t> of_rows_;  // which these are
  int64_t loop_before_ = -2;
  std::vector<bool> taken_;       // in this guess
};

}  // namespace rmse
