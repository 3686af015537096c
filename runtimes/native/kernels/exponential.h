// The exponential in a few products and sums, which compilers turn into vectors: the same bits on every processor.
#pragma once

#include <bit>
#include <cstdint>

namespace rmse {
namespace {  // compiled for another instruction set by every file that includes this

// e^x within 2 units in the last place; 0 below -87, at most e^88. Of NaN, NaN.
inline __attribute__((always_inline)) float exponential(float x) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23 leaves no room for a fraction
  const float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float n = (bounded * 1.44269504f + kRounder) - kRounder;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts: the first product is exact
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float whole = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  const float found = (p * (r * r) + r + 1.0f) * whole;
  return x < -87.0f ? 0.0f : found;
}

inline __attribute__((always_inline)) float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace
}  // namespace rmse
