#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "products.h"

namespace rmse {

void attention(const AttentionShape& shape, const float* query, const AttentionSide& past, const AttentionSide& own,
               const float* sinks, float* out) {
  constexpr int64_t kStep = 16;  // floats that a row of scores is a multiple of
  const int64_t rows = shape.heads / shape.groups * shape.count;
  const int64_t stride = (past.slots + own.slots + kStep - 1) / kStep * kStep;
  executorch::extension::parallel_for(0, shape.batch * shape.groups, 1, [&](int64_t first, int64_t last) {
    thread_local std::vector<float> room;
    room.resize(std::max(room.size(), static_cast<size_t>(rows * stride + shape.dims * kStep)));
    for (int64_t g = first; g < last; ++g) {
      AttentionRows of = {query + g * rows * shape.dims, sinks == nullptr ? nullptr : sinks + g * rows, {past, own}, rows,
                          shape.count, shape.dims, stride, 1 / std::sqrt(static_cast<float>(shape.dims))};
      for (AttentionSide& side : of.sides) {
        if (side.slots == 0) continue;
        side.keys += g * side.slots * shape.dims;
        side.values += g * side.slots * shape.dims;
        if (shape.own_masks) side.mask += g / shape.groups * shape.count * side.slots;
        if (side.bias != nullptr) side.bias += g * rows * side.slots;
      }
      float* scores = room.data() + shape.dims * kStep;
      products().attend(of, room.data(), scores, out + g * rows * shape.dims);
    }
  });
}

}  // namespace rmse
