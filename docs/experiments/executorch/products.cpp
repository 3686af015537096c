// How fast the products of runtimes/native read their weights, by the size of a matrix that is read again and again, for
// one row of activations and for several. RMSE_PRODUCTS chooses the instruction set. See README.md.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "kernels/products.h"

namespace {

constexpr int64_t kInputs = 768, kBlocks = kInputs / rmse::kBlock, kShared = 4, kReserve = 16384;
constexpr int kRepeats = 200;

// Seconds of the fastest repetition: others share the machine.
double fastest(const std::function<void()>& work) {
  double least = 1e9;
  for (int i = 0; i < kRepeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return least;
}

void print(const char* kind, int64_t rows, double bytes, double seconds) {
  std::printf("| %s | %s | %lld | %.2f | %.1f |\n", rmse::products().name, kind, static_cast<long long>(rows), bytes / 1e6,
              bytes / seconds / 1e9);
}

}  // namespace

int main() {
  std::mt19937 draw(0);
  std::puts("| instruction set | weights | rows | MB | GB/s |\n|---|---|---:|---:|---:|");
  for (const int64_t rows : {1, 2, 8, 64}) {
    std::vector<float> x(rows * kInputs);
    for (float& value : x) value = static_cast<float>(draw()) / 1e9f;
    std::vector<int8_t> values(x.size());
    std::vector<float> scales(rows * kBlocks);
    std::vector<int32_t> sums(rows * kBlocks);
    std::vector<rmse::RowPair> pairs;
    for (int64_t r = 0; r < rows; ++r) {
      rmse::products().round(&x[r * kInputs], kInputs, &values[r * kInputs], &scales[r * kBlocks], &sums[r * kBlocks]);
      pairs.push_back({r, r});
    }
    for (const int64_t outputs : {512, 9216, 40960}) {
      if (rows > 1 && outputs > 512) break;
      std::vector<uint8_t> codes(outputs * kInputs / 2 + kReserve);
      for (uint8_t& code : codes) code = static_cast<uint8_t>(draw());
      const std::vector<uint16_t> of_weights(outputs * kBlocks / kShared, 0x3c00);
      const rmse::Matrix matrix = {codes.data(), of_weights.data(), outputs, kBlocks, kShared, 4};
      std::vector<float> out(rows * outputs);
      const double seconds = fastest([&] {
        rmse::products().integers(matrix, 0, matrix.tiles(), {values.data(), scales.data(), sums.data()}, pairs.data(), rows,
                                  out.data());
      });
      print("int4", rows, static_cast<double>(codes.size() - kReserve + 2 * of_weights.size()), seconds);
    }
    for (const int64_t outputs : {64, 512, 4096}) {
      if (rows > 1) break;
      const std::vector<float> weights(outputs * kInputs, 0.5f);
      std::vector<float> out(outputs);
      const double seconds = fastest([&] {
        rmse::products().floats(weights.data(), outputs, kInputs, 0, outputs, x.data(), pairs.data(), rows, out.data());
      });
      print("float32", rows, 4.0 * static_cast<double>(weights.size()), seconds);
    }
  }
}
