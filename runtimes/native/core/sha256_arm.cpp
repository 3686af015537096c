// SHA-256 with the cryptography instructions of Armv8: four words of the schedule and four rounds at a time.
#include "sha256_blocks.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("sha2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8-a+crypto")
#endif

namespace rmse {
namespace {

// Of N messages side by side.
template <int N>
__attribute__((always_inline)) inline void blocks_of(uint32_t* const* states, const uint8_t* const* messages, size_t count) {
  uint32x4_t abcd[N], efgh[N];
  for (int n = 0; n < N; ++n) abcd[n] = vld1q_u32(states[n]), efgh[n] = vld1q_u32(states[n] + 4);
  for (size_t at = 0; at < 64 * count; at += 64) {
    uint32x4_t abcd_before[N], efgh_before[N], w[N][4];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      abcd_before[n] = abcd[n], efgh_before[n] = efgh[n];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) w[n][i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(messages[n] + at + 16 * i)));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        uint32x4_t* const words = w[n];
        const uint32x4_t sums = vaddq_u32(words[i % 4], vld1q_u32(kSha256Rounds + 4 * i)), first = abcd[n];
        abcd[n] = vsha256hq_u32(abcd[n], efgh[n], sums);
        efgh[n] = vsha256h2q_u32(efgh[n], first, sums);
        if (i < 12) {
          words[i % 4] = vsha256su1q_u32(vsha256su0q_u32(words[i % 4], words[(i + 1) % 4]), words[(i + 2) % 4], words[(i + 3) % 4]);
        }
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      abcd[n] = vaddq_u32(abcd[n], abcd_before[n]);
      efgh[n] = vaddq_u32(efgh[n], efgh_before[n]);
    }
  }
  for (int n = 0; n < N; ++n) vst1q_u32(states[n], abcd[n]), vst1q_u32(states[n] + 4, efgh[n]);
}

void blocks_of_arm(uint32_t* state, const uint8_t* blocks, size_t count) { blocks_of<1>(&state, &blocks, count); }

void pairs_of_arm(uint32_t* const* states, const uint8_t* const* blocks, size_t count) { blocks_of<2>(states, blocks, count); }

}  // namespace
}  // namespace rmse

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace rmse {

Sha256Blocks sha256_of_arm() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_SHA2) != 0 ? blocks_of_arm : nullptr;
#else
  return blocks_of_arm;  // every Apple processor has them
#endif
}

Sha256Pairs sha256_pairs_of_arm() { return sha256_of_arm() == nullptr ? nullptr : pairs_of_arm; }

}  // namespace rmse
#else
rmse::Sha256Blocks rmse::sha256_of_arm() { return nullptr; }
rmse::Sha256Pairs rmse::sha256_pairs_of_arm() { return nullptr; }
#endif
