#include "sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "json.h"

namespace rmse {
namespace {

// NumPy's SeedSequence (a seed_seq of O'Neill's randutils): a pool of four words, in which every word of the seed
// reaches every bit.
class SeedSequence {
 public:
  explicit SeedSequence(uint64_t seed) {
    const std::array<uint32_t, 4> words = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0, 0};
    for (size_t i = 0; i < pool_.size(); ++i) pool_[i] = hash(words[i]);
    for (size_t from = 0; from < pool_.size(); ++from) {
      for (size_t to = 0; to < pool_.size(); ++to) {
        if (from != to) pool_[to] = mix(pool_[to], hash(pool_[from]));
      }
    }
  }

  // Four words of 64 bits.
  std::array<uint64_t, 4> state() const {
    std::array<uint64_t, 4> result{};
    uint32_t constant = 0x8b51f9dd;
    for (size_t i = 0; i < 8; ++i) {
      uint32_t value = pool_[i % 4] ^ constant;
      constant *= 0x58f38ded;
      value *= constant;
      result[i / 2] |= uint64_t{value ^ value >> 16} << 32 * (i % 2);
    }
    return result;
  }

 private:
  uint32_t hash(uint32_t value) {
    value ^= constant_;
    constant_ *= 0x931e8875;
    value *= constant_;
    return value ^ value >> 16;
  }

  static uint32_t mix(uint32_t x, uint32_t y) {
    const uint32_t value = 0xca01f9dd * x - 0x4973f715 * y;
    return value ^ value >> 16;
  }

  uint32_t constant_ = 0x43b0d7e5;
  std::array<uint32_t, 4> pool_;
};

unsigned __int128 join(uint64_t high, uint64_t low) { return static_cast<unsigned __int128>(high) << 64 | low; }

// NumPy's sum: pairwise, with eight running sums in blocks of up to 128.
double sum(const double* x, size_t n) {
  if (n < 8) return std::accumulate(x, x + n, 0.0);
  if (n > 128) {
    const size_t half = n / 2 - n / 2 % 8;
    return sum(x, half) + sum(x + half, n - half);
  }
  std::array<double, 8> r;
  std::copy_n(x, 8, r.begin());
  const size_t whole = n - n % 8;
  for (size_t i = 8; i < whole; i += 8) {
    for (size_t j = 0; j < 8; ++j) r[j] += x[i + j];
  }
  const double total = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
  return std::accumulate(x + whole, x + n, total);
}

void normalize(std::vector<double>& weights) {
  const double total = sum(weights.data(), weights.size());
  for (double& weight : weights) weight /= total;
}

void require(bool ok, const char* flag, const Json& value, const char* expected) {
  if (!ok) throw std::runtime_error(std::string(flag) + ": got " + value.dump() + ", expected " + expected);
}

}  // namespace

void Sampling::check() const {
  const bool finite = temperature >= 0 && temperature < std::numeric_limits<double>::infinity();  // false for NaN
  require(finite, "--temperature", temperature, "0 (greedy) or a positive number");
  require(top_k >= 0, "--top-k", top_k, "0 (all tokens) or a positive whole number");
  require(top_p > 0 && top_p <= 1, "--top-p", top_p, "a number above 0, at most 1 (all tokens)");
}

Pcg64::Pcg64(uint64_t seed) {
  const auto words = SeedSequence(seed).state();
  increment_ = join(words[2], words[3]) << 1 | 1;
  advance();
  state_ += join(words[0], words[1]);
  advance();
}

void Pcg64::advance() { state_ = state_ * join(2549297995355413924u, 4865540595714422341u) + increment_; }

double Pcg64::next() {
  advance();
  const auto high = static_cast<uint64_t>(state_ >> 64), low = static_cast<uint64_t>(state_);
  const uint64_t bits = std::rotr(high ^ low, static_cast<int>(high >> 58));
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

Sampler::Sampler(const Sampling& sampling) : sampling_(sampling), random_(sampling.seed) { sampling.check(); }

int64_t Sampler::pick(std::span<const float> logits, std::span<const std::pair<int64_t, int64_t>> unused) {
  const double draw = random_.next();
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
      // Subtracted again as NumPy does, to the last bit.
      if (through - weights_[token] >= sampling_.top_p) weights_[token] = 0;
      before = through;
    }
    normalize(weights_);
  }
}

}  // namespace rmse
