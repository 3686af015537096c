// Which rows of a call are computed: those of positions that have not stopped.
#pragma once

#include <cstdint>

namespace rmse {

struct Active {
  const bool* flags = nullptr;  // null: all rows
  int64_t each = 1;             // rows, one after the other, that a flag is of

  bool operator()(int64_t row) const { return flags == nullptr || flags[row / each]; }
};

}  // namespace rmse
