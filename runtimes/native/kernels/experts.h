// The routed experts of one iteration: selection, SwiGLU experts in float32, int8 or int4, weighted sum.
//
// Weights are read where they lie, and only those of the chosen experts: in a mapped file, idle experts stay out of memory.
// Rows that chose the same expert are multiplied together. All processors give the same bits, except for caps: their tanh is
// that of the C library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "products.h"

namespace rmse {

// The stacked weights (E, outputs, inputs) of all experts.
struct ExpertWeights {
  const float* floats = nullptr;  // or
  Matrix first;                   // the integers of the first expert; those of the others follow, each in tiles of its own
  int64_t outputs = 0;
  int64_t inputs = 0;

  Matrix of(int64_t expert) const;
};

struct ExpertShape {
  int64_t rows = 0;
  int64_t width = 0;    // d of the rows
  int64_t experts = 0;  // E
  int64_t top_k = 0;
  bool integers = false;
  const int64_t* places = nullptr;  // (E,) where in the stacked weights each expert lies; null: in the order of their numbers
  // Where c > 0, c * tanh(x / c) takes the place of a gate or an up x; within the sigmoid of silu a gate stays what it is.
  float gate_cap = 0;
  float up_cap = 0;
};

// Where the integers of the expert of a place are, that do not lie behind those of the first one.
struct ExpertAt {
  int64_t expert;
  const uint8_t* gate_up_codes;
  const uint16_t* gate_up_scales;
  const uint8_t* down_codes;
  const uint16_t* down_scales;
};

// Gives the experts of a call where not all of them are in memory. It knows them by their places.
class ExpertSource {
 public:
  virtual ~ExpertSource() = default;
  // What the call needs: each expert once, ascending.
  virtual void want(std::span<const int64_t> experts) = 0;
  // Some of these that were not given yet, in memory until the next call of this; none: all were given, or one cannot be had.
  virtual std::span<const ExpertAt> next() = 0;
};

// x (rows, d) -> out (rows, d): for every active row the softmax-weighted sum of the `top_k` experts with the largest
// scores (the lower index on ties); the weights are the softmax over their logits. Rows that are not active become zero.
//
// Of integers: activations are rounded to int8 in blocks of kBlock, and experts come from `source`, if there is one, in any order:
// the results are the same. False where it does not give them all; `out` is then undefined.
bool sparse_experts(const ExpertShape& shape, const float* x, const float* logits, const float* scores, const bool* active,
                    const ExpertWeights& gate_up, const ExpertWeights& down, float* out, ExpertSource* source = nullptr);

}  // namespace rmse
