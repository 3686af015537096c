// The integer products of AArch64, given `Fours`, which adds up four neighbouring products of bytes for each output.
#pragma once

#include <arm_neon.h>

#include "products_of.h"

namespace rmse {
namespace {

// Four neighbouring values of a row, for every output.
RMSE_INLINE int8x16_t fours(const int8_t* values) { return vreinterpretq_s8_s32(vdupq_n_s32(load<int32_t>(values))); }

template <typename Fours>
struct Neon {
  static constexpr int kWidth = 4, kRows = 4, kVectors = 4, kTiles = 1, kFloatRows = 1, kAttention = 4, kColumns = 1;
  using Ints = Vectors<kWidth>::Ints;

  template <int V, int R>
  static RMSE_INLINE void int4(const uint8_t* codes, int64_t step, const RowsAt<R>& x, int64_t b, Ints (&sums)[V][R]) {
    typename Fours::OfInt4 found[V][R];
    for (int c = 0; c < 4; ++c) {
      for (int v = 0; v < V; ++v) {
        const uint8x16_t packed = vld1q_u8(codes + 4 * kTile * c + step * v);
        const int8x16_t first = vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15)));
        const int8x16_t second = vreinterpretq_s8_u8(vshrq_n_u8(packed, 4));
        for (int r = 0; r < R; ++r) {
          const int8_t* values = x.values[r] + b * kBlock + 8 * c;
          found[v][r].add(first, fours(values));
          found[v][r].add(second, fours(values + 4));
        }
      }
    }
    for (int v = 0; v < V; ++v) {
      for (int r = 0; r < R; ++r) {
        sums[v][r] = vsubq_s32(found[v][r].total(), vdupq_n_s32(8 * x.sums[r][b]));  // codes count from 8
      }
    }
  }

  template <int V, int R>
  static RMSE_INLINE void int8(const uint8_t* codes, int64_t step, const RowsAt<R>& x, int64_t b, Ints (&sums)[V][R]) {
    typename Fours::OfInt8 found[V][R];
    for (int c = 0; c < 8; ++c) {
      for (int v = 0; v < V; ++v) {
        const uint8x16_t stored = vld1q_u8(codes + 4 * kTile * c + step * v);
        const int8x16_t w = vreinterpretq_s8_u8(veorq_u8(stored, vdupq_n_u8(128)));
        for (int r = 0; r < R; ++r) found[v][r].add(w, fours(x.values[r] + b * kBlock + 4 * c));
      }
    }
    for (int v = 0; v < V; ++v) {
      for (int r = 0; r < R; ++r) sums[v][r] = found[v][r].total();
    }
  }
};

}  // namespace
}  // namespace rmse
