// The frame of all products, compiled once for every instruction set.
//
// Integer products are exact. A float sum has one order: of integers block by block, of floats over `kLanes` lanes, every
// product and every sum rounded by itself (-ffp-contract=off). So all instruction sets give the same bits. Each is a type with
//
//   kWidth            outputs in a vector, a divisor of kTile; also RMSE_WIDTH, defined before this is included
//   kRows             rows that are multiplied together
//   kVectors          vectors of a tile that one row is multiplied with together; of several rows it is one
//   kTiles            tiles that several rows are multiplied with together, where a tile is one vector
//   kFloatRows        the same of floats
//   kAttention        queries that attend together, in kColumns vectors of their results
//   int4, int8<V, R>  sums[v][r] = sum over a block of (code - zero) * value, for R rows and V vectors, `step` bytes apart
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "exponential.h"
#include "products.h"

#define RMSE_INLINE inline __attribute__((always_inline))

namespace rmse {
namespace {  // not shared: every file that includes this compiles it for another instruction set

template <typename Vector>
RMSE_INLINE Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// ----------------------------------------------------------------------------------------------------- rounding

constexpr float kSmallest = 1e-30f;  // of a block's largest activation; below it 127 / x overflows, and nothing is lost

// Returns the block's scale: NaN where there is a NaN or an infinity.
inline float round_block(const float* x, int64_t count, int8_t* values, int32_t* sum) {
  float filled[kBlock] = {};
  if (count < kBlock) {
    std::copy_n(x, count, filled);
    x = filled;
  }
  uint32_t bits = 0;  // of the largest magnitude: without their sign, floats are in the order of their bits
  for (int64_t i = 0; i < kBlock; ++i) bits = std::max(bits, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  const float largest = std::bit_cast<float>(bits);
  *sum = 0;
  if (!(largest >= kSmallest && largest <= std::numeric_limits<float>::max())) {
    std::fill_n(values, kBlock, int8_t{0});
    return largest < kSmallest ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const float inverse = 127 / largest;
  int32_t rounded[kBlock], total = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    // Adding 1.5 * 2^23 leaves no room for a fraction: the nearest integer, without a call for every number.
    rounded[i] = static_cast<int32_t>((x[i] * inverse + 12582912.0f) - 12582912.0f);
    total += rounded[i];
  }
  for (int64_t i = 0; i < kBlock; ++i) values[i] = static_cast<int8_t>(rounded[i]);
  *sum = total;
  return largest / 127;
}

inline void round_row(const float* x, int64_t inputs, int8_t* values, float* scales, int32_t* sums) {
  for (int64_t i = 0; i < inputs; i += kBlock) {
    *scales++ = round_block(x + i, std::min(kBlock, inputs - i), values + i, sums++);
  }
}

// ----------------------------------------------------------------------------------------------------- integers

constexpr int64_t kAhead = 4096;  // bytes of codes, most of a tile

template <int W>
struct Vectors {
  typedef float Floats __attribute__((vector_size(W * 4)));
  typedef int32_t Ints __attribute__((vector_size(W * 4)));
  typedef uint32_t Wide __attribute__((vector_size(W * 4)));
  typedef uint16_t Halves __attribute__((vector_size(W * 2)));
};

template <int W>
RMSE_INLINE typename Vectors<W>::Floats widened(const uint16_t* bfloat16) {
  using V = Vectors<W>;
  const auto wide = __builtin_convertvector(load<typename V::Halves>(bfloat16), typename V::Wide) << 16;
  return load<typename V::Floats>(&wide);
}

// Where R rows of activations are.
template <int R>
struct RowsAt {
  const int8_t* values[R];
  const float* scales[R];
  const int32_t* sums[R];
};

// Vectors of outputs that lie `codes` bytes and `scales` scales apart: of one tile, or of tiles.
struct Steps {
  int64_t codes, scales;
};

// V vectors of outputs, of which `left` are there, times R rows.
template <typename Set, int Bits, int V, int R>
RMSE_INLINE void part_of_tile(const uint8_t* codes, const uint16_t* scales, const Matrix& weights, const Steps& steps,
                              const RowsAt<R>& x, float* const (&out)[R], int64_t left) {
  constexpr int W = Set::kWidth;
  using Floats = typename Vectors<W>::Floats;
  using Ints = typename Vectors<W>::Ints;
  constexpr int64_t kBytes = kTile * kBlock * Bits / 8;
  constexpr int kApart = V * W > kTile ? V * W / kTile : 1;  // tiles
  Floats totals[V][R] = {};
  for (int64_t b = 0; b < weights.blocks; scales += kTile) {
    Floats of_weights[V];
    for (int v = 0; v < V; ++v) of_weights[v] = widened<W>(scales + v * steps.scales);
    for (const int64_t end = b + weights.shared; b < end; ++b, codes += kBytes) {
      if constexpr (R <= 2) {  // few rows wait for memory, and the processor looks no further ahead than a page
        // Behind its end a tile goes on where the next one of its place begins.
        constexpr int64_t kNext = kAhead / kApart;
        const int64_t over = b * kBytes + kNext < weights.blocks * kBytes ? 0 : (kApart - 1) * steps.codes;
        for (int t = 0; t < kApart; ++t) {
          for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(codes + t * steps.codes + kNext + over + i);
        }
      }
      Ints sums[V][R];
      if constexpr (Bits == 4) {
        Set::template int4<V, R>(codes, steps.codes, x, b, sums);
      } else {
        Set::template int8<V, R>(codes, steps.codes, x, b, sums);
      }
      for (int r = 0; r < R; ++r) {
        const float of_x = x.scales[r][b];
        for (int v = 0; v < V; ++v) totals[v][r] += __builtin_convertvector(sums[v][r], Floats) * (of_weights[v] * of_x);
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    const int64_t count = std::min<int64_t>(W, left - v * W);
    if (count <= 0) break;
    for (int r = 0; r < R; ++r) std::memcpy(out[r] + v * W, &totals[v][r], count * sizeof(float));
  }
}

// T tiles, of one where a tile is more than a vector.
template <typename Set, int Bits, int R, int T = 1>
RMSE_INLINE void rows_of_tile(const Matrix& weights, int64_t tile, const RoundedRows& x, const RowPair* pairs, float* out) {
  constexpr int W = Set::kWidth, V = T > 1 ? T : R == 1 ? Set::kVectors : 1;
  const int64_t groups = weights.blocks / weights.shared, bytes = weights.blocks * kTile * kBlock * Bits / 8;
  const uint8_t* codes = weights.codes + tile * bytes;
  const uint16_t* scales = weights.scales + tile * groups * kTile;
  RowsAt<R> at;
  for (int r = 0; r < R; ++r) {
    at.values[r] = x.values + pairs[r].from * weights.blocks * kBlock;
    at.scales[r] = x.scales + pairs[r].from * weights.blocks;
    at.sums[r] = x.sums + pairs[r].from * weights.blocks;
  }
  const Steps steps = T > 1 ? Steps{bytes, groups * kTile} : Steps{4 * W, W};
  for (int64_t lane = 0; lane < kTile; lane += V * W) {
    const int64_t left = weights.outputs - tile * kTile - lane;
    if (left <= 0) break;
    float* to[R];
    for (int r = 0; r < R; ++r) to[r] = out + pairs[r].to * weights.outputs + tile * kTile + lane;
    part_of_tile<Set, Bits, V, R>(codes + 4 * lane, scales + lane, weights, steps, at, to, left);
  }
}

// All rows times T tiles, whose codes stay in the nearest cache for that long.
template <typename Set, int Bits, int T>
RMSE_INLINE void all_of_tile(const Matrix& weights, int64_t tile, const RoundedRows& x, const RowPair* pairs, int64_t count,
                             float* out) {
  constexpr int kMost = Set::kRows / T;
  int64_t r = 0;
  for (; r + kMost <= count; r += kMost) rows_of_tile<Set, Bits, kMost, T>(weights, tile, x, pairs + r, out);
  if constexpr (kMost > 4) {
    for (; r + 4 <= count; r += 4) rows_of_tile<Set, Bits, 4, T>(weights, tile, x, pairs + r, out);
  }
  if constexpr (kMost > 2) {
    for (; r + 2 <= count; r += 2) rows_of_tile<Set, Bits, 2, T>(weights, tile, x, pairs + r, out);
  }
  for (; r < count; ++r) rows_of_tile<Set, Bits, 1, T>(weights, tile, x, pairs + r, out);
}

template <typename Set, int Bits>
void tiles_of(const Matrix& weights, int64_t first, int64_t last, const RoundedRows& x, const RowPair* pairs, int64_t count,
              float* out) {
  constexpr int T = Set::kTiles;
  const bool together = T == 1 || count > 1;  // one row waits for its codes, and a single stream of them is fetched best
  for (; together && first + T <= last; first += T) all_of_tile<Set, Bits, T>(weights, first, x, pairs, count, out);
  if constexpr (T > 1) {
    for (; first < last; ++first) all_of_tile<Set, Bits, 1>(weights, first, x, pairs, count, out);
  }
}

template <typename Set>
void integer_product(const Matrix& weights, int64_t first, int64_t last, const RoundedRows& x, const RowPair* pairs,
                     int64_t count, float* out) {
  (weights.bits == 4 ? tiles_of<Set, 4> : tiles_of<Set, 8>)(weights, first, last, x, pairs, count, out);
}

// ------------------------------------------------------------------------------------------------------- floats

constexpr int kLanes = 16;  // of a float sum
constexpr int kOutputs = 4;  // that are added up side by side
constexpr int64_t kNearestCache = 32 << 10;  // bytes

// In vectors that the instruction set has: compilers take larger ones apart in memory.
struct Lanes {
  static constexpr int kParts = kLanes / RMSE_WIDTH;
  using Part = Vectors<RMSE_WIDTH>::Floats;
  Part part[kParts];

  static RMSE_INLINE Lanes at(const float* from) {
    Lanes lanes;
    for (int i = 0; i < kParts; ++i) lanes.part[i] = load<Part>(from + i * RMSE_WIDTH);
    return lanes;
  }
  RMSE_INLINE void store(float* to) const {
    for (int i = 0; i < kParts; ++i) std::memcpy(to + i * RMSE_WIDTH, &part[i], sizeof(Part));
  }
  RMSE_INLINE friend Lanes operator*(Lanes a, const Lanes& b) {
    for (int i = 0; i < kParts; ++i) a.part[i] *= b.part[i];
    return a;
  }
  RMSE_INLINE Lanes& operator+=(const Lanes& other) {
    for (int i = 0; i < kParts; ++i) part[i] += other.part[i];
    return *this;
  }
  // The larger one of each lane; of a NaN, the other.
  RMSE_INLINE void raise(const Lanes& other) {
    for (int i = 0; i < kParts; ++i) part[i] = other.part[i] > part[i] ? other.part[i] : part[i];
  }
};

// Halves onto halves: lanes l and l + 8, then l and l + 4, l + 2, l + 1.
RMSE_INLINE float added_up(const Lanes& sum) {
  float lanes[kLanes];
  sum.store(lanes);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// Four neighbouring lanes that are left when halves have been added onto halves twice, as `added_up` does.
RMSE_INLINE Vectors<4>::Floats quarter(const Lanes& sum) {
#if RMSE_WIDTH == 4
  return (sum.part[0] + sum.part[2]) + (sum.part[1] + sum.part[3]);
#else
#if RMSE_WIDTH == 8
  const Vectors<8>::Floats half = sum.part[0] + sum.part[1];
#else
  const auto whole = sum.part[0];
  const Vectors<8>::Floats half = __builtin_shufflevector(whole, whole, 0, 1, 2, 3, 4, 5, 6, 7) +
                                  __builtin_shufflevector(whole, whole, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#endif
}

template <int W, size_t... I>
RMSE_INLINE typename Vectors<2 * W>::Floats joined(typename Vectors<W>::Floats a, typename Vectors<W>::Floats b,
                                                   std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, static_cast<int>(I)...);
}

// Halves of groups of 2 n neighbours of two vectors onto each other: half as many numbers, in their order.
template <int W, int n, size_t... I>
RMSE_INLINE typename Vectors<W>::Floats folded(typename Vectors<W>::Floats a, typename Vectors<W>::Floats b,
                                               std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, static_cast<int>(I / n * 2 * n + I % n)...) +
         __builtin_shufflevector(a, b, static_cast<int>(I / n * 2 * n + I % n + n)...);
}

// Sixteen sums of four numbers each.
RMSE_INLINE Lanes added_up(const Vectors<4>::Floats (&of)[kLanes]) {
  constexpr int W = RMSE_WIDTH, kVectors = 4 * kLanes / W;
  using Part = Lanes::Part;
  constexpr std::make_index_sequence<W> order;
  Part all[kVectors];
#if RMSE_WIDTH == 4
  for (int i = 0; i < kVectors; ++i) all[i] = of[i];
#else
  for (int i = 0; i < kVectors; ++i) {
    constexpr std::make_index_sequence<8> eight;
    const auto first = joined<4>(of[i * W / 4], of[i * W / 4 + 1], eight);
#if RMSE_WIDTH == 8
    all[i] = first;
#else
    all[i] = joined<8>(first, joined<4>(of[i * W / 4 + 2], of[i * W / 4 + 3], eight), order);
#endif
  }
#endif
  for (int i = 0; i < kVectors / 2; ++i) all[i] = folded<W, 2>(all[2 * i], all[2 * i + 1], order);
  Lanes sums;
  for (int i = 0; i < kVectors / 4; ++i) sums.part[i] = folded<W, 1>(all[2 * i], all[2 * i + 1], order);
  return sums;
}

// Sums over whole `Lanes` of N outputs times R rows.
template <int N, int R>
RMSE_INLINE void lane_sums(const float* weights, int64_t inputs, const float* const (&x)[R], Lanes (&sums)[R][N]) {
  for (int64_t i = 0; i + kLanes <= inputs; i += kLanes) {
    Lanes w[N];
    for (int n = 0; n < N; ++n) w[n] = Lanes::at(weights + n * inputs + i);
    for (int r = 0; r < R; ++r) {
      const Lanes v = Lanes::at(x[r] + i);
      for (int n = 0; n < N; ++n) sums[r][n] += w[n] * v;
    }
  }
}

// What is left of the inputs behind whole `Lanes`.
RMSE_INLINE float with_rest(float total, const float* weights, int64_t inputs, const float* x) {
  for (int64_t i = inputs / kLanes * kLanes; i < inputs; ++i) total += weights[i] * x[i];
  return total;
}

RMSE_INLINE float float_row(const float* weights, int64_t inputs, const float* x) {
  Lanes sums[1][1] = {};
  lane_sums<1, 1>(weights, inputs, {x}, sums);
  return with_rest(added_up(sums[0][0]), weights, inputs, x);
}

// Sixteen products, of R rows and as many outputs as that takes: their lanes are added up side by side, since one by one
// that takes longer than a short row's products.
template <int R>
RMSE_INLINE void sixteen_products(const float* weights, int64_t inputs, const float* const (&x)[R], float* const (&out)[R]) {
  constexpr int kSets = kLanes / (kOutputs * R);
  Vectors<4>::Floats quarters[kLanes];
  for (int set = 0; set < kSets; ++set) {
    Lanes sums[R][kOutputs] = {};
    lane_sums<kOutputs, R>(weights + set * kOutputs * inputs, inputs, x, sums);
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < kOutputs; ++n) quarters[(set * R + r) * kOutputs + n] = quarter(sums[r][n]);
    }
  }
  float totals[kLanes];
  added_up(quarters).store(totals);
  for (int set = 0; set < kSets; ++set) {
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < kOutputs; ++n) {
        const int o = set * kOutputs + n;
        out[r][o] = with_rest(totals[(set * R + r) * kOutputs + n], weights + o * inputs, inputs, x[r]);
      }
    }
  }
}

template <int R>
void float_product(const float* weights, int64_t outputs, int64_t inputs, int64_t first, int64_t last, const float* x,
                   const RowPair* pairs, int64_t count, float* out) {
  // As many rows at a time as the nearest cache holds, while all weights pass by.
  const int64_t panel = std::max<int64_t>(R, kNearestCache / (inputs * static_cast<int64_t>(sizeof(float))) / R * R);
  for (const RowPair* end = pairs + count; pairs < end; pairs += panel) {
    const int64_t rows = std::min<int64_t>(panel, end - pairs), together = rows / R * R;
    int64_t o = first;
    for (; o + kLanes <= last; o += kLanes) {
      for (int64_t some = o; some < o + kLanes; some += kLanes / R) {
        for (int64_t r = 0; r < together; r += R) {
          const float* from[R];
          float* to[R];
          for (int i = 0; i < R; ++i) {
            from[i] = x + pairs[r + i].from * inputs;
            to[i] = out + pairs[r + i].to * outputs + some;
          }
          sixteen_products<R>(weights + some * inputs, inputs, from, to);
        }
      }
      for (int64_t r = together; r < rows; ++r) {
        const float* const from[1] = {x + pairs[r].from * inputs};
        float* const to[1] = {out + pairs[r].to * outputs + o};
        sixteen_products<1>(weights + o * inputs, inputs, from, to);
      }
    }
    for (; o < last; ++o) {
      for (int64_t r = 0; r < rows; ++r) {
        out[pairs[r].to * outputs + o] = float_row(weights + o * inputs, inputs, x + pairs[r].from * inputs);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------- swiglu

inline void swiglu_row(const float* gate_up, int64_t n, float gate_cap, float up_cap, float factor, float* out) {
  if (gate_cap > 0 || up_cap > 0) {
    const auto capped = [](float x, float cap) { return cap > 0 ? cap * std::tanh(x / cap) : x; };
    for (int64_t i = 0; i < n; ++i) {
      const float gate = gate_up[2 * i];
      out[i] = capped(gate, gate_cap) * sigmoid(gate) * capped(gate_up[2 * i + 1], up_cap) * factor;
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) out[i] = gate_up[2 * i] * sigmoid(gate_up[2 * i]) * gate_up[2 * i + 1] * factor;
}

inline void gated_row(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// --------------------------------------------------------------------------------------------------------- norm

inline void norm_row(const float* x, const float* weight, float eps, int64_t n, float* out) {
  const int64_t whole = n / kLanes * kLanes;
  Lanes squares = {};
  for (int64_t i = 0; i < whole; i += kLanes) squares += Lanes::at(x + i) * Lanes::at(x + i);
  float total = added_up(squares);
  for (int64_t i = whole; i < n; ++i) total += x[i] * x[i];
  const float factor = 1 / std::sqrt(total / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

}  // namespace
}  // namespace rmse
