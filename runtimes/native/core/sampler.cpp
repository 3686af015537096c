#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "errors.h"
#include "text.h"

namespace rmse {
namespace {

void normalize(std::vector<double>& weights) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (double& weight : weights) weight /= total;
}

void require(bool ok, const char* setting, const std::string& value, const char* expected) {
  if (!ok) throw ArgumentError(setting, "got " + value + ", expected " + expected);
}

}  // namespace

void Sampling::check() const {
  const bool finite = temperature >= 0 && temperature < std::numeric_limits<double>::infinity();  // false for NaN
  require(finite, "temperature", shown(temperature), "0 (greedy) or a positive number");
  require(top_k >= 0, "top_k", std::to_string(top_k), "0 (all tokens) or a positive whole number");
  require(top_p > 0 && top_p <= 1, "top_p", shown(top_p), "a number above 0, at most 1 (all tokens)");
}

Sampler::Sampler(const Sampling& sampling) : sampling_(sampling), random_(sampling.seed) { sampling.check(); }

int64_t Sampler::pick(std::span<const float> logits, std::span<const std::pair<int64_t, int64_t>> unused) {
  const double draw = random_.uniform();
  if (!unused.empty()) {
    usable_.assign(logits.begin(), logits.end());
    for (const auto& [first, end] : unused) std::fill(usable_.begin() + first, usable_.begin() + end, -INFINITY);
    logits = usable_;
  }
  const bool numbers = std::none_of(logits.begin(), logits.end(), [](float x) { return std::isnan(x); });
  const auto largest = std::max_element(logits.begin(), logits.end());  // the lowest index on ties
  if (!numbers || !std::isfinite(*largest)) {
    throw std::runtime_error("the model gave logits that are not numbers; its weights are damaged");
  }
  if (sampling_.temperature == 0) return largest - logits.begin();
  weigh(logits, *largest);
  // Tokens stay in the order of their ids: a difference of 1e-6 between two runtimes then moves a boundary by as
  // little, where an order by probability would swap whole tokens.
  std::partial_sum(weights_.begin(), weights_.end(), weights_.begin());
  const double total = weights_.back();
  const auto drawn = std::upper_bound(weights_.begin(), weights_.end(), draw * total);
  // The product can round up to the total; the total is first reached at the last token that was kept.
  const auto last = std::lower_bound(weights_.begin(), weights_.end(), total);
  return std::min(drawn, last) - weights_.begin();
}

// What is drawn from: temperature, then top-k, then top-p. Ties at a boundary are decided for the lower index.
void Sampler::weigh(std::span<const float> logits, double largest) {
  weights_.resize(logits.size());
  std::transform(logits.begin(), logits.end(), weights_.begin(),
                 [&](float x) { return (x - largest) / sampling_.temperature; });
  const bool cut_k = sampling_.top_k > 0 && sampling_.top_k < std::ssize(weights_), cut_p = sampling_.top_p < 1;
  if (cut_k || cut_p) {
    order_.resize(logits.size());
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return weights_[a] > weights_[b]; });
  }
  if (cut_k) {
    for (auto i = order_.begin() + sampling_.top_k; i != order_.end(); ++i) weights_[*i] = -INFINITY;
  }
  for (double& weight : weights_) weight = std::exp(weight);
  normalize(weights_);
  if (cut_p) {
    double before = 0;  // the probability of all that is likelier
    for (const int64_t token : order_) {
      const double through = before + weights_[token];
      if (before >= sampling_.top_p) weights_[token] = 0;
      before = through;
    }
    normalize(weights_);
  }
}

}  // namespace rmse
