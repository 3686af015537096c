// Products with AVX-512 and its dot products of bytes (VNNI).
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

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
  static constexpr int kWidth = 16, kRows = 8, kVectors = 1, kTiles = 2, kFloatRows = 4, kAttention = 8, kColumns = 2;
  using Ints = Vectors<kWidth>::Ints;

  template <int V, int R>
  static RMSE_INLINE void int4(const uint8_t* codes, int64_t step, const RowsAt<R>& x, int64_t b, Ints (&sums)[V][R]) {
    // The inputs in high halves count 16 times: these are masked, not shifted. Few rows add up both halves side by side.
    constexpr bool kFew = V * R < 8;
    __m512i low[V][R], high[V][R];
    for (int v = 0; v < V; ++v) {
      for (int r = 0; r < R; ++r) {
        low[v][r] = _mm512_set1_epi32(-8 * x.sums[r][b]);
        high[v][r] = _mm512_setzero_si512();
      }
    }
    for (int c = 0; c < 4; ++c) {
      __m512i first[V], second[V];
      for (int v = 0; v < V; ++v) {
        __m512i packed = _mm512_loadu_si512(codes + 4 * kTile * c + step * v);
        __asm__("" : "+v"(packed));  // loaded once: compilers would do it for each of the masks
        first[v] = _mm512_and_si512(packed, _mm512_set1_epi8(15));
        second[v] = kFew ? _mm512_and_si512(packed, _mm512_set1_epi8(-16))
                         : _mm512_and_si512(_mm512_srli_epi16(packed, 4), _mm512_set1_epi8(15));
      }
      for (int r = 0; r < R; ++r) {
        const int8_t* values = x.values[r] + b * kBlock + 8 * c;
        const __m512i of_low = fours(values), of_high = fours(values + 4);
        for (int v = 0; v < V; ++v) {
          low[v][r] = _mm512_dpbusd_epi32(low[v][r], first[v], of_low);
          __m512i& other = kFew ? high[v][r] : low[v][r];
          other = _mm512_dpbusd_epi32(other, second[v], of_high);
        }
      }
    }
    for (int v = 0; v < V; ++v) {
      for (int r = 0; r < R; ++r) {
        sums[v][r] = reinterpret_cast<Ints>(low[v][r]);
        if (kFew) sums[v][r] += reinterpret_cast<Ints>(high[v][r]) >> 4;
      }
    }
  }

  template <int V, int R>
  static RMSE_INLINE void int8(const uint8_t* codes, int64_t step, const RowsAt<R>& x, int64_t b, Ints (&sums)[V][R]) {
    __m512i found[V][R];
    for (int v = 0; v < V; ++v) {
      for (int r = 0; r < R; ++r) found[v][r] = _mm512_set1_epi32(-128 * x.sums[r][b]);
    }
    for (int c = 0; c < 8; ++c) {
      for (int v = 0; v < V; ++v) {
        const __m512i w = _mm512_loadu_si512(codes + 4 * kTile * c + step * v);
        for (int r = 0; r < R; ++r) {
          found[v][r] = _mm512_dpbusd_epi32(found[v][r], w, fours(x.values[r] + b * kBlock + 4 * c));
        }
      }
    }
    for (int v = 0; v < V; ++v) {
      for (int r = 0; r < R; ++r) sums[v][r] = reinterpret_cast<Ints>(found[v][r]);
    }
  }
};

}  // namespace

Products vnni_products() { return products_of<Vnni>("vnni"); }

}  // namespace rmse

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
