// Products of matrices with rows of activations, in int4, int8 and float32.
//
// A matrix of integers is stored in tiles of 16 outputs, side by side, so that a vector has a lane for each output: then a
// sum over inputs is one sum for each lane, and every instruction set adds it up in the same order, whatever its width.
#pragma once

#include <cstdint>

namespace rmse {

constexpr int64_t kBlock = 32;  // inputs of which the activations share a scale
constexpr int64_t kTile = 16;   // outputs that are stored side by side

// Weights (outputs, inputs): (code - zero) * scale, with zero at 8 of int4 and at 128 of int8. What fills up the last tile
// and the last block is zero.
struct Matrix {
  // (tiles, blocks, kTile * kBlock * bits / 8). A block of int8 has 8 chunks of (kTile, 4) codes, of the inputs 4 c .. 4 c + 3.
  // A block of int4 has 4 of them: in the low halves the inputs 8 c .. 8 c + 3, in the high ones 8 c + 4 .. 8 c + 7.
  const uint8_t* codes = nullptr;
  const uint16_t* scales = nullptr;  // bfloat16 (tiles, groups, kTile)
  int64_t outputs = 0;
  int64_t blocks = 0;  // of a row
  int64_t shared = 0;  // blocks that share a scale: blocks / groups
  int bits = 0;

  int64_t tiles() const { return (outputs + kTile - 1) / kTile; }
  int64_t block_bytes() const { return kTile * kBlock * bits / 8; }
};

// Rows of activations, rounded to int8 in blocks: a[i] ~ scales[i / kBlock] * values[i].
struct RoundedRows {
  const int8_t* values;  // (rows, blocks * kBlock)
  const float* scales;   // (rows, blocks)
  const int32_t* sums;   // (rows, blocks) of the values
};

// Row `from` of the activations makes row `to` of the result.
struct RowPair {
  int64_t from, to;
};

struct AttentionRows;

struct Products {
  const char* name;
  // x (inputs,) -> a row of `RoundedRows`.
  void (*round)(const float* x, int64_t inputs, int8_t* values, float* scales, int32_t* sums);
  // Tiles first .. last - 1 of out[to] (outputs,) = weights * x[from], for all pairs.
  void (*integers)(const Matrix& weights, int64_t first, int64_t last, const RoundedRows& x, const RowPair* pairs,
                   int64_t count, float* out);
  // Outputs first .. last - 1 of out[to] (outputs,) = weights (outputs, inputs) * x[from], for all pairs.
  void (*floats)(const float* weights, int64_t outputs, int64_t inputs, int64_t first, int64_t last, const float* x,
                 const RowPair* pairs, int64_t count, float* out);
  // gate_up (2 n,) -> silu(gate) * up (n,) * factor, gate and up interleaved; where a cap c > 0, c * tanh(x / c) takes the
  // place of a gate or an up x, but not within the sigmoid of silu.
  void (*swiglu)(const float* gate_up, int64_t n, float gate_cap, float up_cap, float factor, float* out);
  // silu(gate) * up (n,)
  void (*gated)(const float* gate, const float* up, int64_t n, float* out);
  // x / rms(x) * weight (n,), with `eps` added to the mean square.
  void (*norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  // Room: transposed (dims, 16) and scores (rows, stride).
  void (*attend)(const AttentionRows& of, float* transposed, float* scores, float* out);
};

// The best that this processor can do; RMSE_PRODUCTS in the environment names another one that it can.
const Products& products();

// One set for each instruction set; those of other processors are not compiled.
Products portable_products();
Products avx2_products();
Products vnni_products();
Products neon_products();
Products dotprod_products();

}  // namespace rmse
