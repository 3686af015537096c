#include "experts.h"

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "exponential.h"
#include "rounded.h"

namespace rmse {
namespace {

using executorch::extension::parallel_for;

constexpr size_t kManyExperts = 4;  // from here on threads share out the experts, and not the outputs of each
constexpr int64_t kFewestOutputs = 4 * kTile;  // of an expert that are worth another thread

// One (row, chosen expert) of a call; an expert is the place that it lies in from here on.
struct Choice {
  int64_t row, slot, expert;
  float weight;
};

void select(const ExpertShape& shape, int64_t row, const float* logits, const float* scores, std::vector<Choice>& choices) {
  // The best so far, best first. Few of the experts ever enter, so one pass costs little more than the comparisons.
  std::vector<std::pair<float, int64_t>> best;
  best.reserve(shape.top_k + 1);
  for (int64_t e = 0; e < shape.experts; ++e) {
    const float score = scores[e];
    const bool full = static_cast<int64_t>(best.size()) == shape.top_k;
    if (full && !(score > best.back().first)) continue;
    if (full) best.pop_back();
    auto place = best.end();
    while (place != best.begin() && std::prev(place)->first < score) --place;
    best.insert(place, {score, e});
  }
  float largest = logits[best[0].second];
  for (const auto& [_, e] : best) largest = std::max(largest, logits[e]);
  float sum = 0;
  for (const auto& [_, e] : best) sum += exponential(logits[e] - largest);
  for (int64_t s = 0; s < shape.top_k; ++s) {
    const int64_t e = best[s].second;
    choices.push_back({row, s, shape.places == nullptr ? e : shape.places[e], exponential(logits[e] - largest) / sum});
  }
}

// out[to] = the expert's weights * x[from]: `integers`, or floats. Threads share the outputs where `shared`.
void multiply(const ExpertWeights& w, int64_t expert, const Matrix& integers, bool shared, const float* x,
              const RoundedRows& rounded, const std::vector<RowPair>& pairs, float* out) {
  const auto count = static_cast<int64_t>(pairs.size());
  const auto outputs = [&](int64_t first, int64_t last) {
    if (w.floats == nullptr) {
      products().integers(integers, first / kTile, (last + kTile - 1) / kTile, rounded, pairs.data(), count, out);
    } else {
      const float* weights = w.floats + expert * w.outputs * w.inputs;
      products().floats(weights, w.outputs, w.inputs, first, last, x, pairs.data(), count, out);
    }
  };
  if (!shared) return outputs(0, w.outputs);
  const int64_t parts = (w.outputs + kFewestOutputs - 1) / kFewestOutputs;  // of whole tiles
  parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    outputs(first * kFewestOutputs, std::min(last * kFewestOutputs, w.outputs));
  });
}

// What a thread needs to compute an expert for some rows.
struct Room {
  std::vector<RowPair> pairs;
  std::vector<float> gate_up, hidden;
  Rounded rounded;
};

// The integers of an expert, which are at `codes` and `scales`, or behind the first one's; nothing of floats.
Matrix integers_of(const ExpertWeights& w, int64_t expert, bool elsewhere, const uint8_t* codes, const uint16_t* scales) {
  if (w.floats != nullptr) return {};
  if (!elsewhere) return w.of(expert);
  Matrix matrix = w.first;
  matrix.codes = codes;
  matrix.scales = scales;
  return matrix;
}

// Choices begin .. end - 1 are of one expert, which is `at`, or lies behind the first one. results (row, slot, d).
void compute(const ExpertShape& shape, const Choice* begin, const Choice* end, const ExpertAt* at, bool shared, const float* x,
             const Rounded& rounded, const ExpertWeights& gate_up, const ExpertWeights& down, float* results) {
  thread_local Room kept;
  Room& room = kept;  // of this thread, also where others fill it
  const int64_t count = end - begin, narrow = down.inputs;
  room.pairs.clear();
  for (const Choice* c = begin; c != end; ++c) room.pairs.push_back({c->row, c - begin});
  const auto grow = [](std::vector<float>& held, int64_t size) {
    held.resize(std::max(held.size(), static_cast<size_t>(size)));
    return held.data();
  };
  float* both = grow(room.gate_up, count * gate_up.outputs);
  float* hidden = grow(room.hidden, count * narrow);
  const ExpertAt none = {};
  const ExpertAt& place = at == nullptr ? none : *at;
  const bool elsewhere = at != nullptr;
  const Matrix of_gate_up = integers_of(gate_up, begin->expert, elsewhere, place.gate_up_codes, place.gate_up_scales);
  const Matrix of_down = integers_of(down, begin->expert, elsewhere, place.down_codes, place.down_scales);
  multiply(gate_up, begin->expert, of_gate_up, shared, x, rounded.rows(), room.pairs, both);
  if (shape.integers) room.rounded.resize(count, narrow);
  for (int64_t i = 0; i < count; ++i) {
    const Choice& choice = begin[i];
    float* row = hidden + i * narrow;
    products().swiglu(both + i * gate_up.outputs, narrow, shape.gate_cap, shape.up_cap, choice.weight, row);
    if (shape.integers) room.rounded.round(i, row);
    room.pairs[i] = {i, choice.row * shape.top_k + choice.slot};
  }
  multiply(down, begin->expert, of_down, shared, hidden, room.rounded.rows(), room.pairs, results);
}

}  // namespace

Matrix ExpertWeights::of(int64_t expert) const {
  Matrix found = first;
  const int64_t blocks = expert * first.tiles() * first.blocks;
  found.codes += blocks * first.block_bytes();
  found.scales += blocks / first.shared * kTile;
  return found;
}

bool sparse_experts(const ExpertShape& shape, const float* x, const float* logits, const float* scores, const bool* active,
                    const ExpertWeights& gate_up, const ExpertWeights& down, float* out, ExpertSource* source) {
  thread_local std::vector<Choice> choices;
  thread_local std::vector<float> kept;
  thread_local Rounded kept_rounded;
  Rounded& rounded = kept_rounded;
  choices.clear();
  if (shape.integers) rounded.resize(shape.rows, shape.width);
  for (int64_t r = 0; r < shape.rows; ++r) {
    if (!active[r]) continue;
    select(shape, r, logits + r * shape.experts, scores + r * shape.experts, choices);
    if (shape.integers) rounded.round(r, x + r * shape.width);
  }
  std::stable_sort(choices.begin(), choices.end(), [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
  std::vector<const Choice*> begins;  // of every expert that was chosen, and the end
  for (const Choice& c : choices) {
    if (begins.empty() || begins.back()->expert != c.expert) begins.push_back(&c);
  }
  const size_t chosen = begins.size();
  begins.push_back(choices.data() + choices.size());
  kept.resize(std::max(kept.size(), static_cast<size_t>(shape.rows * shape.top_k * shape.width)));
  float* results = kept.data();
  // Calls of `one(i, shared)` for i of 0 .. count - 1.
  const auto each = [](size_t count, const auto& one) {
    if (count < kManyExperts) {
      for (size_t i = 0; i < count; ++i) one(i, true);
    } else {
      parallel_for(0, static_cast<int64_t>(count), 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) one(i, false);
      });
    }
  };
  const auto expert = [&](size_t e, const ExpertAt* at, bool shared) {
    compute(shape, begins[e], begins[e + 1], at, shared, x, rounded, gate_up, down, results);
  };
  if (source == nullptr) {
    each(chosen, [&](size_t e, bool shared) { expert(e, nullptr, shared); });
  } else {
    thread_local std::vector<int64_t> kept_wanted;
    std::vector<int64_t>& wanted = kept_wanted;
    wanted.clear();
    for (size_t e = 0; e < chosen; ++e) wanted.push_back(begins[e]->expert);
    source->want(wanted);
    for (size_t left = chosen; left > 0;) {
      const std::span<const ExpertAt> given = source->next();
      if (given.empty()) return false;
      each(given.size(), [&](size_t i, bool shared) {
        const auto place = std::lower_bound(wanted.begin(), wanted.end(), given[i].expert);
        expert(place - wanted.begin(), &given[i], shared);
      });
      left -= given.size();
    }
  }
  for (int64_t r = 0; r < shape.rows; ++r, out += shape.width) {
    std::fill(out, out + shape.width, 0.0f);
    if (!active[r]) continue;
    const float* result = results + r * shape.top_k * shape.width;
    for (int64_t s = 0; s < shape.top_k; ++s, result += shape.width) {
      for (int64_t i = 0; i < shape.width; ++i) out[i] += result[i];
    }
  }
  return true;
}

}  // namespace rmse
