// Dot products of a matrix's rows with one vector of activations, in float32, int8 and int4.
#pragma once

#include <cstdint>

namespace rmse {

constexpr int64_t kBlock = 32;  // activations that share a scale

// One row of activations, rounded to int8 in blocks: a[i] ~ scale[i / 32] * value[i].
struct RoundedRow {
  const int8_t* values;   // (inputs,): as given for int8; in every block the even ones, then the odd ones, for int4
  const float* scales;    // (inputs / 32,)
  const int32_t* sums;    // (inputs / 32,) of the block's values
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

inline float from_bfloat16(uint16_t bits) {
  union {
    uint32_t u;
    float f;
  } value{static_cast<uint32_t>(bits) << 16};
  return value.f;
}

}  // namespace rmse
