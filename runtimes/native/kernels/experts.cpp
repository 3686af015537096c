#include "experts.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>
#include <vector>

#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "products.h"

namespace rmse {
namespace {

constexpr float kSmallest = 1e-30f;  // of a block's largest activation; below it 127 / x overflows, and nothing is lost

// Rows of activations rounded to int8 in blocks of 32.
class RoundedRows {
 public:
  RoundedRows(int64_t rows, int64_t inputs, int bits)
      : inputs_(inputs), blocks_(inputs / kBlock), packed_(bits == 4), values_(rows * inputs),
        scales_(rows * blocks_), excess_(bits == 4 ? rows * blocks_ * kLanes : 0) {}

  void round(int64_t row, const float* x) {
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t block = row * blocks_ + b;
      scales_[block] = round_block(x + b * kBlock, values_.data() + block * kBlock);
      if (packed_) count_excess(values_.data() + block * kBlock, excess_.data() + block * kLanes);
    }
  }

  RoundedRow operator[](int64_t row) const {
    return {values_.data() + row * inputs_, scales_.data() + row * blocks_, excess_.data() + row * blocks_ * kLanes};
  }

 private:
  // Returns the block's scale.
  float round_block(const float* x, int8_t* values) const {
    float largest = 0, poison = 0;  // zero, or NaN where there is a NaN or an infinity
    for (int64_t i = 0; i < kBlock; ++i) {
      largest = std::max(largest, std::fabs(x[i]));
      poison += x[i] * 0;
    }
    if (poison != 0 || largest < kSmallest) {
      std::fill_n(values, kBlock, int8_t{0});
      return poison;
    }
    const float inverse = 127 / largest;
    int32_t rounded[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      // Adding 1.5 * 2^23 leaves no room for a fraction: the nearest integer, without a call for every number.
      rounded[i] = static_cast<int32_t>((x[i] * inverse + 12582912.0f) - 12582912.0f);
    }
    // int4 codes lie two to a byte: their low halves meet the even activations, their high halves the odd ones.
    for (int64_t i = 0; i < kBlock; ++i) {
      values[i] = static_cast<int8_t>(rounded[packed_ ? 2 * (i % 16) + i / 16 : i]);
    }
    return largest / 127;
  }

  // Codes of int4 count from 8: lane by lane, 8 * sum of the activations is too much.
  static void count_excess(const int8_t* values, int32_t* excess) {
    for (int l = 0; l < kLanes; ++l, values += 4) excess[l] = 8 * (values[0] + values[1] + values[2] + values[3]);
  }

  int64_t inputs_, blocks_;
  bool packed_;
  std::vector<int8_t> values_;
  std::vector<float> scales_;
  std::vector<int32_t> excess_;
};

// One (row, chosen expert) of a call.
struct Pair {
  int64_t row, slot, expert;
  float weight;
};

void select(const ExpertShape& shape, int64_t row, const float* logits, const float* scores, std::vector<Pair>& pairs) {
  // The best so far, best first. Few of the experts ever enter, so one pass costs little more than the comparisons.
  std::vector<std::pair<float, int64_t>> best;
  best.reserve(shape.top_k + 1);
  for (int64_t e = 0; e < shape.experts; ++e) {
    const float score = scores[e];
    const bool full = static_cast<int64_t>(best.size()) == shape.top_k;
    if (full && !(score > best.back().first)) continue;
    if (full) best.pop_back();
    auto place = best.end();
    while (place != best.begin() && std::prev(place)->first < score) --place;
    best.insert(place, {score, e});
  }
  float largest = logits[best[0].second];
  for (const auto& [_, e] : best) largest = std::max(largest, logits[e]);
  float sum = 0;
  for (const auto& [_, e] : best) sum += std::exp(logits[e] - largest);
  for (int64_t s = 0; s < shape.top_k; ++s) {
    const int64_t e = best[s].second;
    pairs.push_back({row, s, e, std::exp(logits[e] - largest) / sum});
  }
}

float capped(float x, float cap) { return cap > 0 ? cap * std::tanh(x / cap) : x; }

void multiply_float(const ExpertWeights& w, int64_t expert, const float* x, float* out) {
  const auto* weights = static_cast<const float*>(w.codes) + expert * w.outputs * w.inputs;
  products().float32(weights, w.outputs, w.inputs, x, out);
}

void multiply_integers(const ExpertWeights& w, int64_t expert, int bits, const RoundedRow& x, float* out) {
  const int64_t size = w.outputs * w.inputs;
  const auto* codes = static_cast<const uint8_t*>(w.codes) + expert * size * bits / 8;
  const uint16_t* scales = w.scales + expert * size / w.group;
  (bits == 8 ? products().int8 : products().int4)(codes, scales, w.outputs, w.inputs, w.group, x, out);
}

}  // namespace

void sparse_experts(const ExpertShape& shape, const float* x, const float* logits, const float* scores, const bool* active,
                    const ExpertWeights& gate_up, const ExpertWeights& down, float* out) {
  const bool integers = shape.bits != 32;
  std::vector<Pair> pairs;
  pairs.reserve(shape.rows * shape.top_k);
  RoundedRows wide(integers ? shape.rows : 0, shape.width, shape.bits);
  for (int64_t r = 0; r < shape.rows; ++r) {
    if (!active[r]) continue;
    select(shape, r, logits + r * shape.experts, scores + r * shape.experts, pairs);
    if (integers) wide.round(r, x + r * shape.width);
  }
  // Rows that chose the same expert follow each other: its weights then come from the cache.
  std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.expert < b.expert; });
  std::vector<float> results(shape.rows * shape.top_k * shape.width);
  executorch::extension::parallel_for(0, static_cast<int64_t>(pairs.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> hidden(gate_up.outputs);
    RoundedRows narrow(integers ? 1 : 0, down.inputs, shape.bits);
    for (int64_t p = begin; p < end; ++p) {
      const Pair& pair = pairs[p];
      float* result = results.data() + (pair.row * shape.top_k + pair.slot) * shape.width;
      if (integers) {
        multiply_integers(gate_up, pair.expert, shape.bits, wide[pair.row], hidden.data());
      } else {
        multiply_float(gate_up, pair.expert, x + pair.row * shape.width, hidden.data());
      }
      for (int64_t i = 0; i < down.inputs; ++i) {  // gate and up interleaved; written behind what is read
        const float gate = hidden[2 * i];
        hidden[i] = capped(gate, shape.gate_cap) / (1 + std::exp(-gate)) * capped(hidden[2 * i + 1], shape.up_cap) * pair.weight;
      }
      if (integers) {
        narrow.round(0, hidden.data());
        multiply_integers(down, pair.expert, shape.bits, narrow[0], result);
      } else {
        multiply_float(down, pair.expert, hidden.data(), result);
      }
    }
  });
  for (int64_t r = 0; r < shape.rows; ++r, out += shape.width) {
    std::fill(out, out + shape.width, 0.0f);
    if (!active[r]) continue;
    const float* result = results.data() + r * shape.top_k * shape.width;
    for (int64_t s = 0; s < shape.top_k; ++s, result += shape.width) {
      for (int64_t i = 0; i < shape.width; ++i) out[i] += result[i];
    }
  }
}

const char* instruction_set() { return products().name; }

}  // namespace rmse
