// Products with the dot product instructions of Armv8.2.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define RMSE_WIDTH 4
#include "neon_products.h"

namespace rmse {
namespace {

struct DotProduct {
  struct OfInt8 {
    int32x4_t sums = vdupq_n_s32(0);

    RMSE_INLINE void add(int8x16_t a, int8x16_t b) { sums = vdotq_s32(sums, a, b); }
    RMSE_INLINE int32x4_t total() const { return sums; }
  };
  using OfInt4 = OfInt8;
};

}  // namespace

Products dotprod_products() { return products_of<Neon<DotProduct>>("dotprod"); }

}  // namespace rmse

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
