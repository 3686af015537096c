// Room for rows of activations that are rounded to int8, and the pairs of rows that a product takes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "products.h"

namespace rmse {

class Rounded {
 public:
  // Makes room for rows of `inputs`; what it held before is gone.
  void resize(int64_t rows, int64_t inputs) {
    inputs_ = inputs;
    blocks_ = (inputs + kBlock - 1) / kBlock;
    // It only grows: nothing is cleared that is about to be written.
    grow(values_, rows * blocks_ * kBlock);
    grow(scales_, rows * blocks_);
    grow(sums_, rows * blocks_);
  }

  void round(int64_t row, const float* x) {
    const int64_t at = row * blocks_;
    products().round(x, inputs_, values_.data() + at * kBlock, scales_.data() + at, sums_.data() + at);
  }

  RoundedRows rows() const { return {values_.data(), scales_.data(), sums_.data()}; }

 private:
  template <typename T>
  static void grow(std::vector<T>& held, int64_t size) {
    held.resize(std::max(held.size(), static_cast<size_t>(size)));
  }

  int64_t inputs_ = 0, blocks_ = 0;
  std::vector<int8_t> values_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
};

}  // namespace rmse
