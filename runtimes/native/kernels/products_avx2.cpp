// Products with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#include "matrix_product.h"

namespace rmse {
namespace {

RMSE_INLINE __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// Sums of two neighbouring products -> float sums of four, times the weights' scale and the activations'.
RMSE_INLINE Lanes scaled(__m256i fours, const float* scale, __m256 of_x) {
  return _mm256_mul_ps(_mm256_mul_ps(_mm256_broadcast_ss(scale), of_x), _mm256_cvtepi32_ps(fours));
}

RMSE_INLINE __m256i fours_of(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

struct Avx2Int4 {
  static constexpr int64_t kBytes = kBlock / 2;

  template <int N>
  static RMSE_INLINE void rows(const uint8_t* codes, const float* scales, const RoundedRow& x, int64_t blocks,
                               Lanes (&sums)[N]) {
    const __m128i low = _mm_set1_epi8(15);
    for (int r = 0; r < N; ++r) sums[r] = Lanes{};
    for (int64_t b = 0; b < blocks; ++b) {
      const __m256i v = load_bytes(x.values + b * kBlock), excess = load_bytes(x.excess + b * kLanes);
      const __m256 of_x = _mm256_broadcast_ss(x.scales + b);
      for (int r = 0; r < N; ++r) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + (r * blocks + b) * kBytes));
        const __m256i w = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(packed, 4), low), _mm_and_si128(packed, low));
        const __m256i pairs = _mm256_maddubs_epi16(w, v);  // 2 * 15 * 127 fits 16 bits
        sums[r] += scaled(_mm256_sub_epi32(fours_of(pairs), excess), scales + r * blocks + b, of_x);
      }
    }
  }
};

struct Avx2Int8 {
  static constexpr int64_t kBytes = kBlock;

  template <int N>
  static RMSE_INLINE void rows(const uint8_t* codes, const float* scales, const RoundedRow& x, int64_t blocks,
                               Lanes (&sums)[N]) {
    for (int r = 0; r < N; ++r) sums[r] = Lanes{};
    for (int64_t b = 0; b < blocks; ++b) {
      const __m256i v = load_bytes(x.values + b * kBlock);
      const __m256 of_x = _mm256_broadcast_ss(x.scales + b);
      for (int r = 0; r < N; ++r) {
        const __m256i w = load_bytes(codes + (r * blocks + b) * kBytes);
        // |w| * (v with the sign of w): 2 * 128 * 127 fits 16 bits.
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(v, w));
        sums[r] += scaled(fours_of(pairs), scales + r * blocks + b, of_x);
      }
    }
  }
};

}  // namespace

Products avx2_products() { return {"avx2", float_product, integer_product<Avx2Int8>, integer_product<Avx2Int4>}; }

}  // namespace rmse

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
