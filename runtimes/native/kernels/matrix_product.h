// The frame of all products, compiled once for every instruction set. Four rows of the matrix are taken side by side.
//
// Integer products are exact; float sums run over eight lanes and are added up in one order, products and sums rounded one
// by one (-ffp-contract=off). So all instruction sets give the same bits. An instruction set is a type with
//
//   kBytes        of the codes of a block
//   rows<N>(...)  sums[r][l] = sum over blocks b of (weight scale * activation scale) * (integer sum of lane l in block b)
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "products.h"

#define RMSE_INLINE inline __attribute__((always_inline))

namespace rmse {
namespace {  // not shared: every file that includes this compiles it for another instruction set

constexpr int kRows = 4;
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using Four = float __attribute__((vector_size(4 * sizeof(float))));
using Indices = int32_t __attribute__((vector_size(4 * sizeof(int32_t))));

template <typename Vector>
RMSE_INLINE Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

RMSE_INLINE Four halves(const Lanes& sum) {
  Four half[2];
  std::memcpy(half, &sum, sizeof half);
  return half[0] + half[1];
}

RMSE_INLINE Four shuffle(const Four& a, const Four& b, const Indices& from) {
#if defined(__clang__)
  Four both;
  for (int i = 0; i < 4; ++i) both[i] = from[i] < 4 ? a[from[i]] : b[from[i] - 4];
  return both;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Adds up the lanes of four rows: with h = low half + high half, (h0 + h2) + (h1 + h3).
RMSE_INLINE void add_up(const Lanes (&sums)[kRows], float* out) {
  const Four a = halves(sums[0]), b = halves(sums[1]), c = halves(sums[2]), d = halves(sums[3]);
  const Four ab_low = shuffle(a, b, Indices{0, 4, 1, 5}), ab_high = shuffle(a, b, Indices{2, 6, 3, 7});
  const Four cd_low = shuffle(c, d, Indices{0, 4, 1, 5}), cd_high = shuffle(c, d, Indices{2, 6, 3, 7});
  const Four ab = ab_low + ab_high, cd = cd_low + cd_high;  // a0 + a2, b0 + b2, a1 + a3, b1 + b3
  const Four first = shuffle(ab, cd, Indices{0, 1, 4, 5}), second = shuffle(ab, cd, Indices{2, 3, 6, 7});
  const Four total = first + second;
  std::memcpy(out, &total, sizeof total);
}

RMSE_INLINE void add_up(const Lanes (&sums)[1], float* out) {
  const Four h = halves(sums[0]);
  *out = (h[0] + h[2]) + (h[1] + h[3]);
}

RMSE_INLINE float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Scales of neighbouring rows, one for every block: groups of `shared` blocks have one.
RMSE_INLINE void widen(const uint16_t* scales, int64_t count, int64_t shared, float* out) {
  if (shared == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(scales[i]);
    return;
  }
  for (int64_t i = 0; i < count; ++i) std::fill_n(out + i * shared, shared, from_bfloat16(scales[i]));
}

template <typename InstructionSet, int N>
RMSE_INLINE void product_of_rows(const uint8_t* codes, const uint16_t* scales, int64_t blocks, int64_t shared,
                                 const RoundedRow& x, float* widened, float* out) {
  widen(scales, N * blocks / shared, shared, widened);
  Lanes sums[N];
  InstructionSet::template rows<N>(codes, widened, x, blocks, sums);
  add_up(sums, out);
}

template <typename InstructionSet>
void integer_product(const uint8_t* codes, const uint16_t* scales, int64_t outputs, int64_t inputs, int64_t group,
                     const RoundedRow& x, float* out) {
  const int64_t blocks = inputs / kBlock, shared = group / kBlock, groups = blocks / shared;
  const int64_t bytes = blocks * InstructionSet::kBytes;
  thread_local std::vector<float> kept;
  kept.resize(std::max<size_t>(kept.size(), kRows * blocks));
  float* widened = kept.data();
  int64_t o = 0;
  for (; o + kRows <= outputs; o += kRows) {
    product_of_rows<InstructionSet, kRows>(codes + o * bytes, scales + o * groups, blocks, shared, x, widened, out + o);
  }
  for (; o < outputs; ++o) {
    product_of_rows<InstructionSet, 1>(codes + o * bytes, scales + o * groups, blocks, shared, x, widened, out + o);
  }
}

template <int N>
RMSE_INLINE void float_rows(const float* weights, int64_t inputs, const float* x, float* out) {
  const int64_t whole = inputs / kLanes * kLanes;
  Lanes sums[N] = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Lanes v = load<Lanes>(x + i);
    for (int r = 0; r < N; ++r) sums[r] += load<Lanes>(weights + r * inputs + i) * v;
  }
  add_up(sums, out);
  for (int r = 0; r < N; ++r) {
    for (int64_t i = whole; i < inputs; ++i) out[r] += weights[r * inputs + i] * x[i];
  }
}

inline void float_product(const float* weights, int64_t outputs, int64_t inputs, const float* x, float* out) {
  int64_t o = 0;
  for (; o + kRows <= outputs; o += kRows) float_rows<kRows>(weights + o * inputs, inputs, x, out + o);
  for (; o < outputs; ++o) float_rows<1>(weights + o * inputs, inputs, x, out + o);
}

}  // namespace
}  // namespace rmse
