// Products of a matrix with one vector of activations, in float32, int8 and int4.
#pragma once

#include <cstdint>

namespace rmse {

constexpr int64_t kBlock = 32;  // activations that share a scale
constexpr int kLanes = 8;       // of a float sum: lane l has the products 4 l .. 4 l + 3 of every block

// One row of activations, rounded to int8 in blocks: a[i] ~ scales[i / 32] * values[i].
struct RoundedRow {
  const int8_t* values;   // (inputs,): as given for int8; in every block the even ones, then the odd ones, for int4
  const float* scales;    // (inputs / 32,)
  const int32_t* excess;  // (inputs / 32, 8): for int4, what every lane has too much because codes have their zero at 8
};

// out[i] = weights[i] . x for i in 0..outputs
using FloatProduct = void (*)(const float* weights, int64_t outputs, int64_t inputs, const float* x, float* out);
// The same over integers: weight = (code - zero) * scale, scales (outputs, inputs / group) in bfloat16.
using IntegerProduct = void (*)(const uint8_t* codes, const uint16_t* scales, int64_t outputs, int64_t inputs,
                                int64_t group, const RoundedRow& x, float* out);

struct Products {
  const char* name;
  FloatProduct float32;
  IntegerProduct int8;
  IntegerProduct int4;
};

// The best that this processor can do; RMSE_PRODUCTS=portable in the environment forces the plain C++ ones.
const Products& products();

// One set for each instruction set; those of other processors are not compiled.
Products portable_products();
Products avx2_products();
Products neon_products();
Products dotprod_products();

}  // namespace rmse
