#include "linear.h"

#include <algorithm>
#include <vector>

#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "rounded.h"

namespace rmse {
namespace {

using executorch::extension::parallel_for;

constexpr int64_t kSmallestTask = 1 << 17;  // products worth another thread

// The active rows, each in its own place.
const std::vector<RowPair>& pairs_of(int64_t rows, const Active& active) {
  thread_local std::vector<RowPair> pairs;
  pairs.clear();
  for (int64_t r = 0; r < rows; ++r) {
    if (active(r)) pairs.push_back({r, r});
  }
  return pairs;
}

// Rows that are not active become zero, the others get the bias.
void finish(const float* bias, int64_t rows, int64_t outputs, const Active& active, float* out) {
  for (int64_t r = 0; r < rows; ++r, out += outputs) {
    if (!active(r)) {
      std::fill_n(out, outputs, 0.0f);
    } else if (bias != nullptr) {
      for (int64_t o = 0; o < outputs; ++o) out[o] += bias[o];
    }
  }
}

int64_t grain(int64_t products_of_one) { return std::max<int64_t>(1, kSmallestTask / std::max<int64_t>(1, products_of_one)); }

}  // namespace

void quantized_linear(const Matrix& weights, const float* bias, const float* x, int64_t rows, int64_t inputs,
                      const Active& active, float* out) {
  const std::vector<RowPair>& pairs = pairs_of(rows, active);
  const auto count = static_cast<int64_t>(pairs.size());
  thread_local Rounded kept;
  Rounded& rounded = kept;  // of this thread, also where others fill it
  rounded.resize(rows, inputs);
  for (const RowPair& pair : pairs) rounded.round(pair.from, x + pair.from * inputs);
  parallel_for(0, weights.tiles(), grain(count * inputs * kTile), [&](int64_t first, int64_t last) {
    products().integers(weights, first, last, rounded.rows(), pairs.data(), count, out);
  });
  finish(bias, rows, weights.outputs, active, out);
}

void float_linear(const float* weights, const float* bias, const float* x, int64_t rows, int64_t inputs, int64_t outputs,
                  const Active& active, float* out) {
  const std::vector<RowPair>& pairs = pairs_of(rows, active);
  const auto count = static_cast<int64_t>(pairs.size());
  parallel_for(0, outputs, grain(count * inputs), [&](int64_t first, int64_t last) {
    products().floats(weights, outputs, inputs, first, last, x, pairs.data(), count, out);
  });
  finish(bias, rows, outputs, active, out);
}

}  // namespace rmse
