// Softmax attention to what was before a call and to the call itself, each read where it lies.
#pragma once

#include <cstdint>

namespace rmse {

// What queries attend to: keys and values (B, G, slots, dims), mask (B or 1, 1, C, slots), 0 where seen.
struct AttentionSide {
  const float* keys = nullptr;
  const float* values = nullptr;
  const float* mask = nullptr;
  const float* bias = nullptr;  // (B, H, C, slots), added to the scores; may be null
  int64_t slots = 0;
  // Of every kLanes slots, whether a query sees one of them: the others are neither read nor computed. Made by `attention`.
  const bool* seen = nullptr;
};

struct AttentionShape {
  int64_t batch = 0, heads = 0, groups = 0, count = 0, dims = 0;  // B, H, G, C, hd
  bool own_masks = false;                                         // a mask for each of the batch
};

// query (B, H, C, hd) -> out (B, H, C, hd). `past` has no slots where there is nothing before the call. `sinks` (B, H, C, 1):
// a score of each query with nothing behind it; may be null. `active` (C,), for B = 1: the other queries become zero; may be
// null.
void attention(const AttentionShape& shape, const float* query, const AttentionSide& past, const AttentionSide& own,
               const float* sinks, const bool* active, float* out);

// The rows of one group of heads: what `attend_rows` is given.
struct AttentionRows {
  const float* query;  // (rows, dims)
  const float* sinks;
  AttentionSide sides[2];  // of this group
  int64_t rows, count, dims, stride;  // H / G * C, C, hd; of a row of scores, a multiple of 16
  float scale;
};

}  // namespace rmse
