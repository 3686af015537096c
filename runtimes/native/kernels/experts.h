// The routed experts of one iteration: selection, SwiGLU experts in float32, int8 or int4, weighted sum.
//
// Weights are read where they lie, row by row, and only those of the chosen experts: in a mapped file, idle experts stay
// out of memory. Integer products are exact and float sums run over eight fixed lanes, so all processors give the same
// bits, except for the exponential of the C library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rmse {

// How the stacked weights (E, outputs, inputs) of all experts are stored.
struct ExpertWeights {
  const void* codes = nullptr;        // float32; int8; or int4, two to a byte, the first in the low half, zero at 8
  const uint16_t* scales = nullptr;   // bfloat16 (E, outputs, inputs / group); null for float32
  int64_t outputs = 0;
  int64_t inputs = 0;
  int64_t group = 0;  // inputs that share a scale
};

struct ExpertShape {
  int64_t rows = 0;
  int64_t width = 0;    // d of the rows
  int64_t experts = 0;  // E
  int64_t top_k = 0;
  int bits = 32;  // of a weight: 32, 8 or 4
  // Where c > 0, c * tanh(x / c) takes the place of a gate or an up x; within the sigmoid of silu a gate stays what it is.
  float gate_cap = 0;
  float up_cap = 0;
};

// x (rows, d) -> out (rows, d): for every active row the softmax-weighted sum of the `top_k` experts with the largest
// scores (the lower index on ties); the weights are the softmax over their logits. Rows that are not active become zero.
//
// int8 and int4: activations are rounded to int8 in blocks of 32, each with its own scale.
void sparse_experts(const ExpertShape& shape, const float* x, const float* logits, const float* scores, const bool* active,
                    const ExpertWeights& gate_up, const ExpertWeights& down, float* out);

// The instruction set that the products use here: "avx2", "dotprod", "neon" or "portable".
const char* instruction_set();

}  // namespace rmse
