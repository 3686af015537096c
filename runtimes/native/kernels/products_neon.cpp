// Products with the NEON that every AArch64 processor has.
#if defined(__aarch64__)
#define RMSE_WIDTH 4
#include "neon_products.h"

namespace rmse {
namespace {

struct Multiplied {
  struct OfInt4 {
    int16x8_t low = vdupq_n_s16(0), high = vdupq_n_s16(0);  // of a block: 8 * 15 * 127 fits 16 bits

    RMSE_INLINE void add(int8x16_t a, int8x16_t b) {
      low = vmlal_s8(low, vget_low_s8(a), vget_low_s8(b));
      high = vmlal_high_s8(high, a, b);
    }
    RMSE_INLINE int32x4_t total() const { return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)); }
  };
  struct OfInt8 {
    int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);

    RMSE_INLINE void add(int8x16_t a, int8x16_t b) {
      low = vpadalq_s16(low, vmull_s8(vget_low_s8(a), vget_low_s8(b)));
      high = vpadalq_s16(high, vmull_high_s8(a, b));
    }
    RMSE_INLINE int32x4_t total() const { return vpaddq_s32(low, high); }
  };
};

}  // namespace

Products neon_products() { return products_of<Neon<Multiplied>>("neon"); }

}  // namespace rmse
#endif
