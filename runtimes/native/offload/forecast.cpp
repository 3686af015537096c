#include "forecast.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace rmse {

void Forecast::see(int64_t loop, const float* scores, const bool* active, int64_t rows, std::vector<int64_t>& guess) {
  if (loop < 0) return;
  learn(loop, scores, active, rows);
  if (static_cast<int64_t>(changes_.size()) <= loop || changes_[loop].rows == 0) return;
  taken_.assign(experts_, false);
  for (int64_t r = 0; r < rows; ++r) {
    if (active[r]) best(scores + r * experts_, changes_[loop], guess);
  }
}

void Forecast::learn(int64_t loop, const float* scores, const bool* active, int64_t rows) {
  if (loop == loop_before_ + 1 && loop > 0) {
    if (static_cast<int64_t>(changes_.size()) < loop) changes_.resize(loop);
    Change& change = changes_[loop - 1];
    change.mean.resize(experts_, 0.0f);
    for (size_t i = 0; i < of_rows_.size(); ++i) {
      const int64_t r = of_rows_[i];
      if (r >= rows || !active[r]) continue;
      const float share = 1.0f / static_cast<float>(std::min(++change.rows, kMemory));
      const float *now = scores + r * experts_, *then = before_.data() + i * experts_;
      float* mean = change.mean.data();
      for (int64_t e = 0; e < experts_; ++e) mean[e] += share * (now[e] - then[e] - mean[e]);
    }
  }
  of_rows_.clear();
  for (int64_t r = 0; r < rows && static_cast<int64_t>(of_rows_.size()) < kLearned; ++r) {
    if (active[r]) of_rows_.push_back(r);
  }
  before_.resize(kLearned * experts_);
  for (size_t i = 0; i < of_rows_.size(); ++i) {
    std::copy_n(scores + of_rows_[i] * experts_, experts_, before_.data() + i * experts_);
  }
  loop_before_ = loop;
}

void Forecast::best(const float* scores, const Change& change, std::vector<int64_t>& guess) {
  std::vector<std::pair<float, int64_t>> found;  // best first
  found.reserve(top_k_ + 1);
  for (int64_t e = 0; e < experts_; ++e) {
    const float score = scores[e] + change.mean[e];
    const bool full = static_cast<int64_t>(found.size()) == top_k_;
    if (full && !(score > found.back().first)) continue;
    if (full) found.pop_back();
    auto place = found.end();
    while (place != found.begin() && std::prev(place)->first < score) --place;
    found.insert(place, {score, e});
  }
  for (const auto& [_, e] : found) {
    if (!taken_[e]) guess.push_back(e);
    taken_[e] = true;
  }
}

}  // namespace rmse
