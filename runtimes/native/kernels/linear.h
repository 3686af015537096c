// Linear layers of integers and of floats.
#pragma once

#include <cstdint>

#include "active.h"
#include "products.h"

namespace rmse {

// x (rows, inputs) -> out (rows, outputs) = weights * x + bias, with activations rounded to int8 in blocks of kBlock.
// Rows that are not active become zero and cost nothing. `bias` may be null.
void quantized_linear(const Matrix& weights, const float* bias, const float* x, int64_t rows, int64_t inputs,
                      const Active& active, float* out);

// The same with weights (outputs, inputs) in float32, and nothing rounded.
void float_linear(const float* weights, const float* bias, const float* x, int64_t rows, int64_t inputs, int64_t outputs,
                  const Active& active, float* out);

}  // namespace rmse
