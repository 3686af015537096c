#include "products.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

// Float sums run over eight lanes on every processor, products and sums rounded one by one (-ffp-contract=off), and are
// added up in one order: the paths differ in speed only.

namespace rmse {
namespace {

constexpr int kLanes = 8;

inline float total(const float lanes[kLanes]) {
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// ---------------------------------------------------------------------------------------------------- plain C++

using Vector = float __attribute__((vector_size(kLanes * sizeof(float))));

inline __attribute__((always_inline)) void float_product(const float* weights, int64_t outputs, int64_t inputs,
                                                         const float* x, float* out) {
  const int64_t whole = inputs / kLanes * kLanes;
  for (int64_t o = 0; o < outputs; ++o, weights += inputs) {
    Vector sum = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      Vector w, v;
      std::memcpy(&w, weights + i, sizeof w);
      std::memcpy(&v, x + i, sizeof v);
      sum += w * v;
    }
    float lanes[kLanes];
    std::memcpy(lanes, &sum, sizeof lanes);
    float result = total(lanes);
    for (int64_t i = whole; i < inputs; ++i) result += weights[i] * x[i];
    out[o] = result;
  }
}

void float_portable(const float* weights, int64_t outputs, int64_t inputs, const float* x, float* out) {
  float_product(weights, outputs, inputs, x, out);
}

// Lane l sums four neighbouring products of the block: 4 l .. 4 l + 3.
inline void block_portable(const int8_t* w, const int8_t* x, float factor, float lanes[kLanes]) {
  for (int l = 0; l < kLanes; ++l) {
    int32_t sum = 0;
    for (int j = 4 * l; j < 4 * l + 4; ++j) sum += static_cast<int32_t>(w[j]) * x[j];
    lanes[l] += factor * static_cast<float>(sum);
  }
}

void int4_portable(const uint8_t* codes, const uint16_t* scales, int64_t outputs, int64_t inputs, int64_t group,
                   const RoundedRow& x, float* out) {
  const int64_t blocks = inputs / kBlock, shared = group / kBlock;
  for (int64_t o = 0; o < outputs; ++o) {
    float lanes[kLanes] = {}, offset = 0;
    for (int64_t b = 0; b < blocks; ++b, codes += kBlock / 2) {
      const float factor = from_bfloat16(scales[b / shared]) * x.scales[b];
      int8_t w[kBlock];
      for (int j = 0; j < kBlock / 2; ++j) {
        w[j] = static_cast<int8_t>(codes[j] & 15);
        w[j + kBlock / 2] = static_cast<int8_t>(codes[j] >> 4);
      }
      block_portable(w, x.values + b * kBlock, factor, lanes);
      offset += factor * static_cast<float>(8 * x.sums[b]);
    }
    scales += blocks / shared;
    out[o] = total(lanes) - offset;
  }
}

void int8_portable(const uint8_t* codes, const uint16_t* scales, int64_t outputs, int64_t inputs, int64_t group,
                   const RoundedRow& x, float* out) {
  const int64_t blocks = inputs / kBlock, shared = group / kBlock;
  for (int64_t o = 0; o < outputs; ++o) {
    float lanes[kLanes] = {};
    for (int64_t b = 0; b < blocks; ++b, codes += kBlock) {
      const float factor = from_bfloat16(scales[b / shared]) * x.scales[b];
      block_portable(reinterpret_cast<const int8_t*>(codes), x.values + b * kBlock, factor, lanes);
    }
    scales += blocks / shared;
    out[o] = total(lanes);
  }
}

// --------------------------------------------------------------------------------------------------------- AVX2

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))

AVX2 void float_avx2(const float* weights, int64_t outputs, int64_t inputs, const float* x, float* out) {
  float_product(weights, outputs, inputs, x, out);
}

AVX2 inline float total(__m256 sum) {
  float lanes[kLanes];
  _mm256_storeu_ps(lanes, sum);
  return total(lanes);
}

AVX2 inline __m256 scaled(__m256i pairs, float factor) {
  const __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  return _mm256_mul_ps(_mm256_set1_ps(factor), _mm256_cvtepi32_ps(sums));
}

AVX2 void int4_avx2(const uint8_t* codes, const uint16_t* scales, int64_t outputs, int64_t inputs, int64_t group,
                    const RoundedRow& x, float* out) {
  const int64_t blocks = inputs / kBlock, shared = group / kBlock;
  const __m128i low = _mm_set1_epi8(15);
  for (int64_t o = 0; o < outputs; ++o) {
    __m256 sum = _mm256_setzero_ps();
    float offset = 0;
    for (int64_t b = 0; b < blocks; ++b, codes += kBlock / 2) {
      const float factor = from_bfloat16(scales[b / shared]) * x.scales[b];
      const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
      const __m256i w = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(packed, 4), low), _mm_and_si128(packed, low));
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.values + b * kBlock));
      sum = _mm256_add_ps(sum, scaled(_mm256_maddubs_epi16(w, v), factor));  // 2 * 15 * 127 fits 16 bits
      offset += factor * static_cast<float>(8 * x.sums[b]);
    }
    scales += blocks / shared;
    out[o] = total(sum) - offset;
  }
}

AVX2 void int8_avx2(const uint8_t* codes, const uint16_t* scales, int64_t outputs, int64_t inputs, int64_t group,
                    const RoundedRow& x, float* out) {
  const int64_t blocks = inputs / kBlock, shared = group / kBlock;
  for (int64_t o = 0; o < outputs; ++o) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; ++b, codes += kBlock) {
      const float factor = from_bfloat16(scales[b / shared]) * x.scales[b];
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.values + b * kBlock));
      // |w| * (v with the sign of w): 2 * 128 * 127 fits 16 bits.
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(v, w));
      sum = _mm256_add_ps(sum, scaled(pairs, factor));
    }
    scales += blocks / shared;
    out[o] = total(sum);
  }
}
#endif

// --------------------------------------------------------------------------------------------------------- NEON

#if defined(__aarch64__)

// Lanes of one block: `low` sums fours of its first half, `high` of its second.
inline void add_block(int32x4_t low, int32x4_t high, float factor, float32x4_t sum[2]) {
  sum[0] = vaddq_f32(sum[0], vmulq_n_f32(vcvtq_f32_s32(low), factor));
  sum[1] = vaddq_f32(sum[1], vmulq_n_f32(vcvtq_f32_s32(high), factor));
}

inline float total(const float32x4_t sum[2]) {
  float lanes[kLanes];
  vst1q_f32(lanes, sum[0]);
  vst1q_f32(lanes + 4, sum[1]);
  return total(lanes);
}

inline __attribute__((always_inline)) int32x4_t fours_neon(int8x16_t a, int8x16_t b) {
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
}

#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))

DOTPROD inline int32x4_t fours_dotprod(int8x16_t a, int8x16_t b) { return vdotq_s32(vdupq_n_s32(0), a, b); }

#define INT4_PRODUCT(NAME, ATTRIBUTE, FOURS)                                                                          \
  ATTRIBUTE void NAME(const uint8_t* codes, const uint16_t* scales, int64_t outputs, int64_t inputs, int64_t group,   \
                      const RoundedRow& x, float* out) {                                                              \
    const int64_t blocks = inputs / kBlock, shared = group / kBlock;                                                  \
    for (int64_t o = 0; o < outputs; ++o) {                                                                           \
      float32x4_t sum[2] = {vdupq_n_f32(0), vdupq_n_f32(0)};                                                          \
      float offset = 0;                                                                                               \
      for (int64_t b = 0; b < blocks; ++b, codes += kBlock / 2) {                                                     \
        const float factor = from_bfloat16(scales[b / shared]) * x.scales[b];                                         \
        const uint8x16_t packed = vld1q_u8(codes);                                                                    \
        const int8x16_t even = vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15)));                                 \
        const int8x16_t odd = vreinterpretq_s8_u8(vshrq_n_u8(packed, 4));                                             \
        const int8_t* v = x.values + b * kBlock;                                                                      \
        add_block(FOURS(even, vld1q_s8(v)), FOURS(odd, vld1q_s8(v + 16)), factor, sum);                               \
        offset += factor * static_cast<float>(8 * x.sums[b]);                                                         \
      }                                                                                                               \
      scales += blocks / shared;                                                                                      \
      out[o] = total(sum) - offset;                                                                                   \
    }                                                                                                                 \
  }

#define INT8_PRODUCT(NAME, ATTRIBUTE, FOURS)                                                                          \
  ATTRIBUTE void NAME(const uint8_t* codes, const uint16_t* scales, int64_t outputs, int64_t inputs, int64_t group,   \
                      const RoundedRow& x, float* out) {                                                              \
    const int64_t blocks = inputs / kBlock, shared = group / kBlock;                                                  \
    for (int64_t o = 0; o < outputs; ++o) {                                                                           \
      float32x4_t sum[2] = {vdupq_n_f32(0), vdupq_n_f32(0)};                                                          \
      for (int64_t b = 0; b < blocks; ++b, codes += kBlock) {                                                         \
        const float factor = from_bfloat16(scales[b / shared]) * x.scales[b];                                         \
        const int8_t* w = reinterpret_cast<const int8_t*>(codes);                                                     \
        const int8_t* v = x.values + b * kBlock;                                                                      \
        add_block(FOURS(vld1q_s8(w), vld1q_s8(v)), FOURS(vld1q_s8(w + 16), vld1q_s8(v + 16)), factor, sum);           \
      }                                                                                                               \
      scales += blocks / shared;                                                                                      \
      out[o] = total(sum);                                                                                            \
    }                                                                                                                 \
  }

INT4_PRODUCT(int4_neon, , fours_neon)
INT8_PRODUCT(int8_neon, , fours_neon)
INT4_PRODUCT(int4_dotprod, DOTPROD, fours_dotprod)
INT8_PRODUCT(int8_dotprod, DOTPROD, fours_dotprod)

bool has_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // every Apple processor since the A11
#endif
}
#endif

Products choose() {
  const Products portable = {"portable", float_portable, int8_portable, int4_portable};
  const char* wanted = std::getenv("RMSE_PRODUCTS");
  if (wanted != nullptr && std::strcmp(wanted, "portable") == 0) return portable;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return {"avx2", float_avx2, int8_avx2, int4_avx2};
  return portable;
#elif defined(__aarch64__)
  if (has_dotprod()) return {"dotprod", float_portable, int8_dotprod, int4_dotprod};
  return {"neon", float_portable, int8_neon, int4_neon};
#else
  return portable;
#endif
}

}  // namespace

const Products& products() {
  static const Products chosen = choose();
  return chosen;
}

}  // namespace rmse
