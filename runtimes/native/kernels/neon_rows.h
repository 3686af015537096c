// The integer products of AArch64, given `Fours::sums(a, b)`: (4,) sums of four neighbouring products of 16 int8 each.
#pragma once

#include <arm_neon.h>

#include "matrix_product.h"

namespace rmse {
namespace {

// Two vectors for a row: lanes 0 to 3 belong to the first half of every block, 4 to 7 to the second.
template <int N>
struct NeonSums {
  float32x4_t low[N], high[N];

  RMSE_INLINE NeonSums() {
    for (int r = 0; r < N; ++r) low[r] = high[r] = vdupq_n_f32(0);
  }
  RMSE_INLINE void add(int r, int32x4_t of_low, int32x4_t of_high, float factor) {
    low[r] = vaddq_f32(low[r], vmulq_n_f32(vcvtq_f32_s32(of_low), factor));
    high[r] = vaddq_f32(high[r], vmulq_n_f32(vcvtq_f32_s32(of_high), factor));
  }
  RMSE_INLINE void store(Lanes (&sums)[N]) const {
    for (int r = 0; r < N; ++r) {
      float lanes[kLanes];
      vst1q_f32(lanes, low[r]);
      vst1q_f32(lanes + 4, high[r]);
      sums[r] = load<Lanes>(lanes);
    }
  }
};

template <typename Fours>
struct NeonInt4 {
  static constexpr int64_t kBytes = kBlock / 2;

  template <int N>
  static RMSE_INLINE void rows(const uint8_t* codes, const float* scales, const RoundedRow& x, int64_t blocks,
                               Lanes (&sums)[N]) {
    NeonSums<N> found;
    for (int64_t b = 0; b < blocks; ++b) {
      const int8x16_t even = vld1q_s8(x.values + b * kBlock), odd = vld1q_s8(x.values + b * kBlock + 16);
      const int32x4_t less = vld1q_s32(x.excess + b * kLanes), less_high = vld1q_s32(x.excess + b * kLanes + 4);
      for (int r = 0; r < N; ++r) {
        const uint8x16_t packed = vld1q_u8(codes + (r * blocks + b) * kBytes);
        const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15)));
        const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(packed, 4));
        found.add(r, vsubq_s32(Fours::sums(low, even), less), vsubq_s32(Fours::sums(high, odd), less_high),
                  scales[r * blocks + b] * x.scales[b]);
      }
    }
    found.store(sums);
  }
};

template <typename Fours>
struct NeonInt8 {
  static constexpr int64_t kBytes = kBlock;

  template <int N>
  static RMSE_INLINE void rows(const uint8_t* codes, const float* scales, const RoundedRow& x, int64_t blocks,
                               Lanes (&sums)[N]) {
    NeonSums<N> found;
    for (int64_t b = 0; b < blocks; ++b) {
      const int8x16_t first = vld1q_s8(x.values + b * kBlock), second = vld1q_s8(x.values + b * kBlock + 16);
      for (int r = 0; r < N; ++r) {
        const auto* w = reinterpret_cast<const int8_t*>(codes + (r * blocks + b) * kBytes);
        found.add(r, Fours::sums(vld1q_s8(w), first), Fours::sums(vld1q_s8(w + 16), second),
                  scales[r * blocks + b] * x.scales[b]);
      }
    }
    found.store(sums);
  }
};

}  // namespace
}  // namespace rmse
