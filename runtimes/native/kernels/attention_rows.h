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

// Few queries wait for memory, and the processor looks no further ahead than a page.
RMSE_INLINE void fetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) __builtin_prefetch(from + kAhead / sizeof(float) + i);
}

// Products of R queries and sixteen keys, whose channels are whole `Lanes`: the same numbers as of `float_row`.
template <int R>
RMSE_INLINE void few_scores(const float* query, int64_t dims, const float* keys, Lanes (&scores)[R]) {
  Vectors<4>::Floats quarters[R][kLanes];
  for (int s = 0; s < kLanes; ++s, keys += dims) {
    fetch(keys, dims);
    Lanes sums[R] = {};
    for (int64_t i = 0; i < dims; i += kLanes) {
      const Lanes key = Lanes::at(keys + i);
      for (int r = 0; r < R; ++r) sums[r] += key * Lanes::at(query + r * dims + i);
    }
    for (int r = 0; r < R; ++r) quarters[r][s] = quarter(sums[r]);
  }
  for (int r = 0; r < R; ++r) scores[r] = added_up(quarters[r]);
}

// The products of all queries with the slots first .. first + count - 1 of a side.
template <typename Set>
void products_with(const AttentionRows& of, const float* keys, int64_t count, float* transposed, float* scores) {
  constexpr int R = Set::kAttention;
  if (of.rows < 4 || count < kLanes) {
    for (int64_t r = 0; r < of.rows; ++r) {
      for (int64_t s = 0; s < count; ++s) {
        scores[r * of.stride + s] = float_row(keys + s * of.dims, of.dims, of.query + r * of.dims);
      }
    }
    return;
  }
  transpose(keys, of.dims, transposed);
  int64_t r = 0;
  for (; r + R <= of.rows; r += R) scores_of<R>(of.query + r * of.dims, of.dims, transposed, scores + r * of.stride, of.stride);
  for (; r < of.rows; ++r) scores_of<1>(of.query + r * of.dims, of.dims, transposed, scores + r * of.stride, of.stride);
}

// Sixteen scores of row r from slot `first` on: `scaled` products, if there are any, with the mask and the bias that there
// may be.
RMSE_INLINE void mask_row(const AttentionRows& of, const AttentionSide& side, int64_t r, int64_t first, const Lanes* scaled,
                          float* scores) {
  Lanes found = Lanes::at(side.mask + r % of.count * side.slots + first);
  if (scaled != nullptr) found += *scaled;
  if (side.bias != nullptr) found += Lanes::at(side.bias + r * side.slots + first);
  found.store(scores + r * of.stride);
}

template <int R>
void score_few(const AttentionRows& of, const AttentionSide& side, int64_t first, float* scores) {
  Lanes products[R];
  few_scores<R>(of.query, of.dims, side.keys + first * of.dims, products);
  for (int r = 0; r < R; ++r) {
    const Lanes scaled = products[r] * splat(of.scale);
    mask_row(of, side, r, first, &scaled, scores);
  }
}

// Scores (rows, stride) of a side, from the column `column` on.
template <typename Set>
void score(const AttentionRows& of, const AttentionSide& side, int64_t column, float* transposed, float* scores) {
  for (int64_t first = 0; first < side.slots; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, side.slots - first);
    float* at = scores + column + first;
    const bool computed = side.seen[first / kLanes];
    if (computed && of.rows < 4 && count == kLanes && of.dims % kLanes == 0) {
      (of.rows == 1 ? score_few<1> : of.rows == 2 ? score_few<2> : score_few<3>)(of, side, first, at);
      continue;
    }
    if (computed) products_with<Set>(of, side.keys + first * of.dims, count, transposed, at);
    for (int64_t r = 0; r < of.rows; ++r, at += of.stride) {
      if (count == kLanes) {
        const Lanes scaled = Lanes::at(at) * splat(of.scale);
        mask_row(of, side, r, first, computed ? &scaled : nullptr, at - r * of.stride);
        continue;
      }
      const float* mask = side.mask + r % of.count * side.slots + first;
      const float* bias = side.bias == nullptr ? nullptr : side.bias + r * side.slots + first;
      for (int64_t s = 0; s < count; ++s) {
        float found = computed ? at[s] * of.scale + mask[s] : mask[s];
        if (bias != nullptr) found += bias[s];
        at[s] = found;
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
      if (s % kLanes == 0 && !side.seen[s / kLanes]) {  // whose weights are zero
        const int64_t left = std::min<int64_t>(kLanes, side.slots - s) - 1;
        s += left, weights += left;
        continue;
      }
      float any = 0;
      for (int r = 0; r < R; ++r) any += weights[r * of.stride];
      if (any == 0) continue;
      if constexpr (R <= 2) fetch(side.values + s * of.dims + first, V * kLanes);
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
  for (; r + 2 <= of.rows; r += 2) values_of<2, 2>(of, scores + r * of.stride, out + r * of.dims);
  for (; r < of.rows; ++r) values_of<1, 4>(of, scores + r * of.stride, out + r * of.dims);
}

}  // namespace
}  // namespace rmse
