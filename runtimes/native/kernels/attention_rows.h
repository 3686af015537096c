// Attention of the rows of one group of heads, compiled once for every instruction set; see attention.h.
//
// A score is added up over the channels, and a result over the slots, one after the other: the order is the same for all
// instruction sets. What a mask hides from all rows is neither read nor computed.
#pragma once

#include <algorithm>
#include <limits>

#include "attention.h"
#include "matrix_product.h"

namespace rmse {
namespace {

constexpr float kHidden = -5e3f;  // masks are -1e4 where nothing is seen

RMSE_INLINE Lanes splat(float x) {
  Lanes lanes;
  for (auto& part : lanes.part) part = x - Lanes::Part{};  // which is x, also of a negative zero
  return lanes;
}

// Sixteen keys (kLanes, dims) as (dims, kLanes).
inline void transpose(const float* keys, int64_t dims, float* out) {
  for (int64_t i = 0; i < dims; ++i) {
    for (int l = 0; l < kLanes; ++l) out[i * kLanes + l] = keys[l * dims + i];
  }
}

// Scores of R queries and sixteen transposed keys.
template <int R>
RMSE_INLINE void scores_of(const float* query, int64_t dims, const float* transposed, float* scores, int64_t stride) {
  Lanes sums[R] = {};
  for (int64_t i = 0; i < dims; ++i) {
    const Lanes key = Lanes::at(transposed + i * kLanes);
    for (int r = 0; r < R; ++r) sums[r] += key * splat(query[r * dims + i]);
  }
  for (int r = 0; r < R; ++r) sums[r].store(scores + r * stride);
}

// The products of all queries with the slots first .. first + count - 1 of a side.
template <typename Set>
void products_with(const AttentionRows& of, const float* keys, int64_t count, float* transposed, float* scores) {
  constexpr int R = Set::kAttention;
  if (of.rows < 4 || count < kLanes) {
    for (int64_t r = 0; r < of.rows; ++r) {
      for (int64_t s = 0; s < count; ++s) {
        const float* const x[1] = {of.query + r * of.dims};
        float* const to[1] = {scores + r * of.stride + s};
        float_rows<1, 1>(keys + s * of.dims, of.dims, x, to);
      }
    }
    return;
  }
  transpose(keys, of.dims, transposed);
  int64_t r = 0;
  for (; r + R <= of.rows; r += R) scores_of<R>(of.query + r * of.dims, of.dims, transposed, scores + r * of.stride, of.stride);
  for (; r < of.rows; ++r) scores_of<1>(of.query + r * of.dims, of.dims, transposed, scores + r * of.stride, of.stride);
}

inline bool seen(const AttentionRows& of, const AttentionSide& side, int64_t first, int64_t count) {
  for (int64_t c = 0; c < of.count; ++c) {
    const float* mask = side.mask + c * side.slots + first;
    if (std::any_of(mask, mask + count, [](float m) { return m > kHidden; })) return true;
  }
  return false;
}

// Scores (rows, stride) of a side, from the column `column` on.
template <typename Set>
void score(const AttentionRows& of, const AttentionSide& side, int64_t column, float* transposed, float* scores) {
  for (int64_t first = 0; first < side.slots; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, side.slots - first);
    float* at = scores + column + first;
    const bool computed = seen(of, side, first, count);
    if (computed) products_with<Set>(of, side.keys + first * of.dims, count, transposed, at);
    for (int64_t r = 0; r < of.rows; ++r) {
      const float* mask = side.mask + r % of.count * side.slots + first;
      const float* bias = side.bias == nullptr ? nullptr : side.bias + r * side.slots + first;
      for (int64_t s = 0; s < count; ++s) {
        float& found = at[r * of.stride + s];
        found = computed ? found * of.scale + mask[s] : mask[s];
        if (bias != nullptr) found += bias[s];
      }
    }
  }
}

// exp(score - largest) of a row in place; returns their sum.
inline float weigh(float* scores, int64_t stride, const float* sink) {
  Lanes most = Lanes::at(scores);
  for (int64_t i = kLanes; i < stride; i += kLanes) most.raise(Lanes::at(scores + i));
  float lanes[kLanes];
  most.store(lanes);
  float largest = sink == nullptr ? lanes[0] : *sink;
  for (const float lane : lanes) largest = std::max(largest, lane);
  for (int64_t i = 0; i < stride; ++i) scores[i] = exponential(scores[i] - largest);
  Lanes sum = {};
  for (int64_t i = 0; i < stride; i += kLanes) sum += Lanes::at(scores + i);
  return added_up(sum) + (sink == nullptr ? 0.0f : exponential(*sink - largest));
}

// V vectors of the results of R rows, from the channel `first` on.
template <int R, int V>
RMSE_INLINE void gather_values(const AttentionRows& of, int64_t first, const float* weights, float* out) {
  Lanes sums[R][V] = {};
  for (const AttentionSide& side : of.sides) {
    for (int64_t s = 0; s < side.slots; ++s, ++weights) {
      float any = 0;
      for (int r = 0; r < R; ++r) any += weights[r * of.stride];
      if (any == 0) continue;
      for (int v = 0; v < V; ++v) {
        const Lanes value = Lanes::at(side.values + s * of.dims + first + v * kLanes);
        for (int r = 0; r < R; ++r) sums[r][v] += value * splat(weights[r * of.stride]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v].store(out + r * of.dims + first + v * kLanes);
  }
}

template <int R, int V>
void values_of(const AttentionRows& of, const float* weights, float* out) {
  int64_t first = 0;
  for (; first + V * kLanes <= of.dims; first += V * kLanes) gather_values<R, V>(of, first, weights, out);
  for (; first + kLanes <= of.dims; first += kLanes) gather_values<R, 1>(of, first, weights, out);
  for (; first < of.dims; ++first) {
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      const float* weight = weights + r * of.stride;
      for (const AttentionSide& side : of.sides) {
        for (int64_t s = 0; s < side.slots; ++s, ++weight) {
          if (*weight != 0) sum += side.values[s * of.dims + first] * *weight;
        }
      }
      out[r * of.dims + first] = sum;
    }
  }
}

template <typename Set>
void attend_rows(const AttentionRows& of, float* transposed, float* scores, float* out) {
  constexpr int R = Set::kAttention;
  int64_t column = 0;
  for (const AttentionSide& side : of.sides) {
    if (side.slots > 0) score<Set>(of, side, column, transposed, scores);
    column += side.slots;
  }
  for (int64_t r = 0; r < of.rows; ++r) {
    float* row = scores + r * of.stride;
    std::fill(row + column, row + of.stride, -std::numeric_limits<float>::infinity());
    const float sum = weigh(row, of.stride, of.sinks == nullptr ? nullptr : of.sinks + r);
    for (int64_t i = 0; i < of.stride; ++i) row[i] /= sum;
  }
  int64_t r = 0;
  for (; r + R <= of.rows; r += R) values_of<R, Set::kColumns>(of, scores + r * of.stride, out + r * of.dims);
  for (; r < of.rows; ++r) values_of<1, 4>(of, scores + r * of.stride, out + r * of.dims);
}

}  // namespace
}  // namespace rmse
