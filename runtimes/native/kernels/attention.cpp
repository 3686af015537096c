#include "attention.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "products.h"

namespace rmse {
namespace {

constexpr int64_t kStep = 16;     // floats that a row of scores is a multiple of, and slots that are seen or not
constexpr float kHidden = -5e3f;  // masks are -1e4 where nothing is seen

int64_t steps(int64_t slots) { return (slots + kStep - 1) / kStep; }

// Whether any of `rows` rows of a mask sees one of the slots, for every `kStep` of them.
void find_seen(const float* mask, int64_t rows, int64_t slots, bool* seen) {
  std::fill_n(seen, steps(slots), false);
  for (int64_t r = 0; r < rows; ++r, mask += slots) {
    for (int64_t step = 0; step < steps(slots); ++step) {
      if (seen[step]) continue;
      const int64_t first = step * kStep, last = std::min(slots, first + kStep);
      float most = mask[first];
      for (int64_t s = first + 1; s < last; ++s) most = mask[s] > most ? mask[s] : most;
      seen[step] = most > kHidden;
    }
  }
}

template <typename T>
T* grown(std::vector<T>& room, int64_t size) {
  room.resize(std::max(room.size(), static_cast<size_t>(size)));
  return room.data();
}

// The chosen ones of every `count` rows (n,) of `from`, one after the other.
void gather(const float* from, int64_t times, int64_t count, int64_t n, const std::vector<int64_t>& chosen, float* to) {
  for (int64_t t = 0; t < times; ++t, from += count * n) {
    for (const int64_t row : chosen) to = std::copy_n(from + row * n, n, to);
  }
}

// The chosen rows of a mask (C, slots) or a bias (heads, C, slots).
const float* gathered(const float* from, int64_t times, int64_t count, int64_t n, const std::vector<int64_t>& chosen,
                      std::vector<float>& room) {
  float* to = grown(room, times * static_cast<int64_t>(chosen.size()) * n);
  gather(from, times, count, n, chosen, to);
  return to;
}

// The chosen queries attend as a call of their own.
void attention_of(const std::vector<int64_t>& chosen, AttentionShape shape, const float* query, AttentionSide past,
                  AttentionSide own, const float* sinks, float* out) {
  thread_local std::vector<float> kept[7];
  const int64_t heads = shape.heads, count = shape.count, dims = shape.dims;
  std::fill_n(out, heads * count * dims, 0.0f);
  if (chosen.empty()) return;
  query = gathered(query, heads, count, dims, chosen, kept[0]);
  if (sinks != nullptr) sinks = gathered(sinks, heads, count, 1, chosen, kept[1]);
  std::vector<float>* room = kept + 2;
  for (AttentionSide* side : {&past, &own}) {
    if (side->slots > 0) side->mask = gathered(side->mask, 1, count, side->slots, chosen, *room);
    ++room;
    if (side->bias != nullptr) side->bias = gathered(side->bias, heads, count, side->slots, chosen, *room);
    ++room;
  }
  shape.count = static_cast<int64_t>(chosen.size());
  float* found = grown(kept[6], heads * shape.count * dims);
  attention(shape, query, past, own, sinks, nullptr, found);
  for (int64_t h = 0; h < heads; ++h, out += count * dims) {
    for (const int64_t row : chosen) {
      std::copy_n(found, dims, out + row * dims);
      found += dims;
    }
  }
}

}  // namespace

void attention(const AttentionShape& shape, const float* query, const AttentionSide& past, const AttentionSide& own,
               const float* sinks, const bool* active, float* out) {
  if (active != nullptr && !std::all_of(active, active + shape.count, [](bool a) { return a; })) {
    std::vector<int64_t> chosen;
    for (int64_t c = 0; c < shape.count; ++c) {
      if (active[c]) chosen.push_back(c);
    }
    return attention_of(chosen, shape, query, past, own, sinks, out);
  }
  const int64_t rows = shape.heads / shape.groups * shape.count;
  const int64_t stride = steps(past.slots + own.slots) * kStep;
  const int64_t masks = shape.own_masks ? shape.batch : 1, all_steps = steps(past.slots) + steps(own.slots);
  const auto seen = std::make_unique<bool[]>(masks * all_steps);  // of `past` and `own`, for each mask
  for (int64_t m = 0; m < masks; ++m) {
    bool* at = seen.get() + m * all_steps;
    if (past.slots > 0) find_seen(past.mask + m * shape.count * past.slots, shape.count, past.slots, at);
    find_seen(own.mask + m * shape.count * own.slots, shape.count, own.slots, at + steps(past.slots));
  }
  executorch::extension::parallel_for(0, shape.batch * shape.groups, 1, [&](int64_t first, int64_t last) {
    thread_local std::vector<float> room;
    float* transposed = grown(room, rows * stride + shape.dims * kStep);
    for (int64_t g = first; g < last; ++g) {
      AttentionRows of = {query + g * rows * shape.dims, sinks == nullptr ? nullptr : sinks + g * rows, {past, own}, rows,
                          shape.count, shape.dims, stride, 1 / std::sqrt(static_cast<float>(shape.dims))};
      const int64_t mask = shape.own_masks ? g / shape.groups : 0;
      const bool* at = seen.get() + mask * all_steps;
      for (AttentionSide& side : of.sides) {
        if (side.slots == 0) continue;
        side.keys += g * side.slots * shape.dims;
        side.values += g * side.slots * shape.dims;
        side.mask += mask * shape.count * side.slots;
        side.seen = at;
        at += steps(side.slots);
        if (side.bias != nullptr) side.bias += g * rows * side.slots;
      }
      products().attend(of, transposed, transposed + shape.dims * kStep, out + g * rows * shape.dims);
    }
  });
}

}  // namespace rmse
