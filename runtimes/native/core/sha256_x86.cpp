// SHA-256 with the SHA instructions of x86: four words of the schedule and four rounds at a time.
#include "sha256_blocks.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("sha,sse4.1"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("sha,sse4.1")
#endif

namespace rmse {
namespace {

__m128i words_at(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

// Of N messages side by side.
template <int N>
__attribute__((always_inline)) inline void blocks_of(uint32_t* const* states, const uint8_t* const* messages, size_t count) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  // The instructions want the eight words as (a, b, e, f) and (c, d, g, h), the first one in the highest lane.
  __m128i abef[N], cdgh[N];
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    const __m128i badc = _mm_shuffle_epi32(words_at(states[n]), 0xb1), hgfe = _mm_shuffle_epi32(words_at(states[n] + 4), 0x1b);
    abef[n] = _mm_alignr_epi8(badc, hgfe, 8), cdgh[n] = _mm_blend_epi16(hgfe, badc, 0xf0);
  }
  for (size_t at = 0; at < 64 * count; at += 64) {
    __m128i abef_before[N], cdgh_before[N], w[N][4];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      abef_before[n] = abef[n], cdgh_before[n] = cdgh[n];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) w[n][i] = _mm_shuffle_epi8(words_at(messages[n] + at + 16 * i), big_endian);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const __m128i sums = _mm_add_epi32(w[n][i % 4], words_at(kSha256Rounds + 4 * i));
        cdgh[n] = _mm_sha256rnds2_epu32(cdgh[n], abef[n], sums);
        abef[n] = _mm_sha256rnds2_epu32(abef[n], cdgh[n], _mm_shuffle_epi32(sums, 0x0e));
        if (i < 12) {
          const __m128i last = w[n][(i + 3) % 4], older = _mm_alignr_epi8(last, w[n][(i + 2) % 4], 4);
          w[n][i % 4] = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(w[n][i % 4], w[n][(i + 1) % 4]), older), last);
        }
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      abef[n] = _mm_add_epi32(abef[n], abef_before[n]);
      cdgh[n] = _mm_add_epi32(cdgh[n], cdgh_before[n]);
    }
  }
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    const __m128i feba = _mm_shuffle_epi32(abef[n], 0x1b), dchg = _mm_shuffle_epi32(cdgh[n], 0xb1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(states[n]), _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(states[n] + 4), _mm_alignr_epi8(dchg, feba, 8));
  }
}

void blocks_of_x86(uint32_t* state, const uint8_t* blocks, size_t count) { blocks_of<1>(&state, &blocks, count); }

void pairs_of_x86(uint32_t* const* states, const uint8_t* const* blocks, size_t count) { blocks_of<2>(states, blocks, count); }

}  // namespace
}  // namespace rmse

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace rmse {

// Compilers do not all know SHA by name in __builtin_cpu_supports.
Sha256Blocks sha256_of_x86() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool sha = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b >> 29 & 1) != 0;
  return sha && __builtin_cpu_supports("sse4.1") ? blocks_of_x86 : nullptr;
}

Sha256Pairs sha256_pairs_of_x86() { return sha256_of_x86() == nullptr ? nullptr : pairs_of_x86; }

}  // namespace rmse
#else
rmse::Sha256Blocks rmse::sha256_of_x86() { return nullptr; }
rmse::Sha256Pairs rmse::sha256_pairs_of_x86() { return nullptr; }
#endif
