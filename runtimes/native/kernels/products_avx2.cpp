// Products with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define RMSE_WIDTH 8
#include "products_of.h"

namespace rmse {
namespace {

RMSE_INLINE __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// Four neighbouring values of a row, for every output.
RMSE_INLINE __m256i fours(const int8_t* values) { return _mm256_set1_epi32(load<int32_t>(values)); }

struct Avx2 {
  static constexpr int kWidth = 8, kRows = 4, kVectors = 2, kTiles = 1, kFloatRows = 1, kAttention = 4, kColumns = 1;
  using Ints = Vectors<kWidth>::Ints;

  template <int V, int R>
  static RMSE_INLINE void int4(const uint8_t* codes, int64_t step, const RowsAt<R>& x, int64_t b, Ints (&sums)[V][R]) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i pairs[V][R];  // of products: 8 * 2 * 15 * 127 fits 16 bits
    for (int v = 0; v < V; ++v) {
      for (int r = 0; r < R; ++r) pairs[v][r] = _mm256_setzero_si256();
    }
    for (int c = 0; c < 4; ++c) {
      for (int v = 0; v < V; ++v) {
        const __m256i packed = load_bytes(codes + 4 * kTile * c + step * v);
        const __m256i first = _mm256_and_si256(packed, low);
        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
        for (int r = 0; r < R; ++r) {
          const int8_t* values = x.values[r] + b * kBlock + 8 * c;
          pairs[v][r] = _mm256_add_epi16(pairs[v][r], _mm256_maddubs_epi16(first, fours(values)));
          pairs[v][r] = _mm256_add_epi16(pairs[v][r], _mm256_maddubs_epi16(second, fours(values + 4)));
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      const __m256i excess = _mm256_set1_epi32(8 * x.sums[r][b]);  // codes count from 8
      for (int v = 0; v < V; ++v) {
        const __m256i total = _mm256_madd_epi16(pairs[v][r], _mm256_set1_epi16(1));
        sums[v][r] = reinterpret_cast<Ints>(_mm256_sub_epi32(total, excess));
      }
    }
  }

  template <int V, int R>
  static RMSE_INLINE void int8(const uint8_t* codes, int64_t step, const RowsAt<R>& x, int64_t b, Ints (&sums)[V][R]) {
    __m256i found[V][R];
    for (int v = 0; v < V; ++v) {
      for (int r = 0; r < R; ++r) found[v][r] = _mm256_setzero_si256();
    }
    for (int c = 0; c < 8; ++c) {
      for (int v = 0; v < V; ++v) {
        const __m256i w = _mm256_xor_si256(load_bytes(codes + 4 * kTile * c + step * v), _mm256_set1_epi8(-128));
        const __m256i size = _mm256_abs_epi8(w);
        for (int r = 0; r < R; ++r) {
          // |w| * (values with the sign of w): 2 * 128 * 127 fits 16 bits.
          const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(fours(x.values[r] + b * kBlock + 4 * c), w));
          found[v][r] = _mm256_add_epi32(found[v][r], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
      }
    }
    for (int v = 0; v < V; ++v) {
      for (int r = 0; r < R; ++r) sums[v][r] = reinterpret_cast<Ints>(found[v][r]);
    }
  }
};

}  // namespace

Products avx2_products() { return products_of<Avx2>("avx2"); }

}  // namespace rmse

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
