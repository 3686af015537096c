#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "products.h"

namespace rmse {
namespace {

// Activations of one row, rounded to int8.
class Rounding {
 public:
  explicit Rounding(int64_t inputs) : values_(inputs), scales_(inputs / kBlock), sums_(inputs / kBlock) {}

  RoundedRow operator()(const float* x, int bits) {
    for (size_t b = 0; b < scales_.size(); ++b) block(x + b * kBlock, b, bits);
    return {values_.data(), scales_.data(), sums_.data()};
  }

 private:
  void block(const float* x, size_t b, int bits) {
    float largest = 0;
    for (int64_t i = 0; i < kBlock; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
    int8_t* values = values_.data() + b * kBlock;
    int32_t sum = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      const auto value = static_cast<int8_t>(std::nearbyintf(x[i] * inverse));
      // int4 codes lie two to a byte: their low halves meet the even activations, their high halves the odd ones.
      values[bits == 4 ? i / 2 + (i % 2) * (kBlock / 2) : i] = value;
      sum += value;
    }
    scales_[b] = scale;
    sums_[b] = sum;
  }

  std::vector<int8_t> values_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
};

// One (row, chosen expert) of a call.
struct Pair {
  int64_t row, slot, expert;
  float weight;
};

void multiply(const ExpertWeights& w, int64_t expert, int bits, const float* x, Rounding& rounding, float* out) {
  const int64_t size = w.outputs * w.inputs;
  if (bits == 32) {
    products().float32(static_cast<const float*>(w.codes) + expert * size, w.outputs, w.inputs, x, out);
    return;
  }
  const auto* codes = static_cast<const uint8_t*>(w.codes) + expert * size * bits / 8;
  const uint16_t* scales = w.scales + expert * size / w.group;
  const auto product = bits == 8 ? products().int8 : products().int4;
  product(codes, scales, w.outputs, w.inputs, w.group, rounding(x, bits), out);
}

void select(const ExpertShape& shape, int64_t row, const float* logits, const float* bias, std::vector<Pair>& pairs) {
  std::vector<int64_t> order(shape.experts);
  std::vector<float> biased(shape.experts);
  for (int64_t e = 0; e < shape.experts; ++e) {
    order[e] = e;
    biased[e] = logits[e] + bias[e];
  }
  std::partial_sort(order.begin(), order.begin() + shape.top_k, order.end(), [&](int64_t a, int64_t b) {
    return biased[a] != biased[b] ? biased[a] > biased[b] : a < b;
  });
  float largest = logits[order[0]];
  for (int64_t s = 1; s < shape.top_k; ++s) largest = std::max(largest, logits[order[s]]);
  float sum = 0;
  for (int64_t s = 0; s < shape.top_k; ++s) sum += std::exp(logits[order[s]] - largest);
  for (int64_t s = 0; s < shape.top_k; ++s) {
    pairs.push_back({row, s, order[s], std::exp(logits[order[s]] - largest) / sum});
  }
}

}  // namespace

void sparse_experts(const ExpertShape& shape, const float* x, const float* logits, const float* bias, const bool* active,
                    const ExpertWeights& gate_up, const ExpertWeights& down, float* out) {
  std::vector<Pair> pairs;
  pairs.reserve(shape.rows * shape.top_k);
  for (int64_t r = 0; r < shape.rows; ++r) {
    if (active[r]) select(shape, r, logits + r * shape.experts, bias, pairs);
  }
  // Rows that chose the same expert follow each other: its weights then come from the cache.
  std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.expert < b.expert; });
  std::vector<float> results(shape.rows * shape.top_k * shape.width);
  executorch::extension::parallel_for(0, static_cast<int64_t>(pairs.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> hidden(gate_up.outputs);
    Rounding wide(shape.bits == 32 ? 0 : gate_up.inputs), narrow(shape.bits == 32 ? 0 : down.inputs);
    for (int64_t p = begin; p < end; ++p) {
      const Pair& pair = pairs[p];
      multiply(gate_up, pair.expert, shape.bits, x + pair.row * shape.width, wide, hidden.data());
      for (int64_t i = 0; i < down.inputs; ++i) {  // gate and up interleaved; written behind what is read
        const float gate = hidden[2 * i];
        hidden[i] = gate / (1 + std::exp(-gate)) * hidden[2 * i + 1] * pair.weight;
      }
      float* result = results.data() + (pair.row * shape.top_k + pair.slot) * shape.width;
      multiply(down, pair.expert, shape.bits, hidden.data(), narrow, result);
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
