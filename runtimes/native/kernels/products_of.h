// All kernels of an instruction set.
#pragma once

#include "attention_rows.h"
#include "matrix_product.h"

namespace rmse {
namespace {

template <typename Set>
Products products_of(const char* name) {
  return {name, round_row, integer_product<Set>, float_product<Set::kFloatRows>, swiglu_row, gated_row, norm_row,
          attend_rows<Set>};
}

}  // namespace
}  // namespace rmse
