// Products with the NEON that every AArch64 processor has.
#if defined(__aarch64__)
#include "neon_rows.h"

namespace rmse {
namespace {

struct Multiplied {
  static RMSE_INLINE int32x4_t sums(int8x16_t a, int8x16_t b) {
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
  }
};

}  // namespace

Products neon_products() {
  return {"neon", float_product, integer_product<NeonInt8<Multiplied>>, integer_product<NeonInt4<Multiplied>>};
}

}  // namespace rmse
#endif
