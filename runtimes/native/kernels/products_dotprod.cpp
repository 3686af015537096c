// Products with the dot product instructions of Armv8.2.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "neon_rows.h"

namespace rmse {
namespace {

struct DotProduct {
  static RMSE_INLINE int32x4_t sums(int8x16_t a, int8x16_t b) { return vdotq_s32(vdupq_n_s32(0), a, b); }
};

}  // namespace

Products dotprod_products() {
  return {"dotprod", float_product, integer_product<NeonInt8<DotProduct>>, integer_product<NeonInt4<DotProduct>>};
}

}  // namespace rmse

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
