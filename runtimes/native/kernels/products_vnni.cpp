// Products with AVX-512 and its dot products of bytes (VNNI).
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")
#endif

#define RMSE_WIDTH 16
#include "products_of.h"

namespace rmse {
namespace {

// Four neighbouring values of a row, for every output.
RMSE_INLINE __m512i fours(const int8_t* values) { return _mm512_set1_epi32(load<int32_t>(values)); }

struct Vnni {
  static constexpr int kWidth = 16, kRows = 8, kVectors = 1, kFloatRows = 4, kAttention = 8, kColumns = 2;
  using Ints = Vectors<kWidth>::Ints;

  template <int V, int R>
  static RMSE_INLINE void int4(const uint8_t* codes, const RowsAt<R>& x, int64_t b, Ints (&sums)[V][R]) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i found[R];
    for (int r = 0; r < R; ++r) found[r] = _mm512_set1_epi32(-8 * x.sums[r][b]);
    for (int c = 0; c < 4; ++c) {
      const __m512i packed = _mm512_loadu_si512(codes + 4 * kTile * c);
      const __m512i first = _mm512_and_si512(packed, low);
      const __m512i second = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
      for (int r = 0; r < R; ++r) {
        const int8_t* values = x.values[r] + b * kBlock + 8 * c;
        found[r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(found[r], first, fours(values)), second, fours(values + 4));
      }
    }
    for (int r = 0; r < R; ++r) sums[0][r] = reinterpret_cast<Ints>(found[r]);
  }

  template <int V, int R>
  static RMSE_INLINE void int8(const uint8_t* codes, const RowsAt<R>& x, int64_t b, Ints (&sums)[V][R]) {
    __m512i found[R];
    for (int r = 0; r < R; ++r) found[r] = _mm512_set1_epi32(-128 * x.sums[r][b]);
    for (int c = 0; c < 8; ++c) {
      const __m512i w = _mm512_loadu_si512(codes + 4 * kTile * c);
      for (int r = 0; r < R; ++r) found[r] = _mm512_dpbusd_epi32(found[r], w, fours(x.values[r] + b * kBlock + 4 * c));
    }
    for (int r = 0; r < R; ++r) sums[0][r] = reinterpret_cast<Ints>(found[r]);
  }
};

}  // namespace

Products vnni_products() { return products_of<Vnni>("vnni"); }

}  // namespace rmse

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
