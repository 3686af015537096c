#include "model.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace rmse {
namespace {

// Prefill calls have 64 rows, decode calls one. Up to this many rows, single calls beat a padded call.
constexpr int64_t kSingleCalls = 6;

// Splits `count` tokens from `position` on into calls: (rows of the call, tokens in it).
std::vector<std::pair<int64_t, int64_t>> plan_calls(int64_t position, int64_t count, const std::vector<int64_t>& rows) {
  std::vector<std::pair<int64_t, int64_t>> calls;
  while (count > 0) {
    const int64_t n = std::min({count, rows.back(), kSegment - position % kSegment});
    if (n <= kSingleCalls) {
      calls.insert(calls.end(), n, {rows.front(), 1});
    } else {
      calls.emplace_back(*std::lower_bound(rows.begin(), rows.end(), n), n);
    }
    position += n;
    count -= n;
  }
  return calls;
}

}  // namespace

Model::Model(const Package& package, std::unique_ptr<Engine> engine)
    : info_(package.info()), engine_(std::move(engine)) {
  check_methods();
  make_shared();
  for (const int64_t rows : info_.chunks) calls_.push_back(std::make_unique<Calls>(*engine_, info_, rows, shared_));
  if (!info_.memory.empty()) make_memory();
  engine_->finish_loading();
  reset();
}

// Before anything is allocated: what the manifest says of the methods is what the program has, and what it says of the model
// is what the methods take and give.
void Model::check_methods() {
  for (const auto& [name, spec] : info_.methods) engine_->check(name, spec);
  const auto find = [&](const std::string& method, std::vector<TensorSpec> MethodSpec::* side, const std::string& name) {
    const auto known = info_.methods.find(method);
    if (known == info_.methods.end()) engine_->refuse("the manifest has no " + method);
    const auto& tensors = known->second.*side;
    return std::find_if(tensors.begin(), tensors.end(), [&](const TensorSpec& t) { return t.name == name; });
  };
  const auto expect = [&](const std::string& method, std::vector<TensorSpec> MethodSpec::* side, const TensorSpec& spec) {
    const auto found = find(method, side, spec.name);
    if (found == (info_.methods.at(method).*side).end() || !found->fits(spec)) {
      engine_->refuse(method + " has " + spec.name + " in another form than the manifest's model");
    }
  };
  for (const int64_t rows : info_.chunks) {
    std::string of_rows = "_";
    of_rows += std::to_string(rows);
    const auto n = static_cast<int32_t>(rows);
    expect("prelude" + of_rows, &MethodSpec::inputs, {"tokens", Dtype::kInt64, {1, n}});
    expect("head" + of_rows, &MethodSpec::outputs,
           {"logits", Dtype::kFloat32, {1, n, static_cast<int32_t>(info_.vocab_size)}});
    expect("step" + of_rows, &MethodSpec::inputs, {"h", Dtype::kFloat32, {1, n, static_cast<int32_t>(info_.width)}});
    for (TensorSpec state : info_.state) {
      state.shape.erase(state.shape.begin());  // one loop's
      expect("step" + of_rows, &MethodSpec::inputs, state);
    }
  }
  for (const TensorSpec& memory : info_.memory) expect("memorize_64", &MethodSpec::inputs, memory);
}

void Model::make_shared() {
  const auto make = [&](const TensorSpec& spec) { shared_.try_emplace(spec.name, spec); };
  for (const char* name : {"max_loops", "min_loops"}) make({name, Dtype::kInt64, {}});
  for (const char* name : {"exit_threshold", "exit_epsilon", "exit_entropy"}) make({name, Dtype::kFloat32, {}});
  std::for_each(info_.state.begin(), info_.state.end(), make);
  std::for_each(info_.memory.begin(), info_.memory.end(), make);
  // Nothing is looked up here: hits stay empty.
  for (const TensorSpec& input : info_.methods["prelude_1"].inputs) {
    if (input.name.starts_with("retrieved")) make(input);
  }
}

void Model::make_memory() {
  // Exit states since the last boundary: what the memory is going to be taught.
  const TensorSpec segment = {"segment", Dtype::kFloat32, {1, kSegment, static_cast<int32_t>(info_.width)}};
  shared_.try_emplace(segment.name, segment);
  const TensorSpec valid = {"n_valid", Dtype::kInt64, {1}};
  *learned_.try_emplace(valid.name, valid).first->second.as<int64_t>() = kSegment;
  const std::unique_ptr<Method> blank = load_method(*engine_, info_, "blank", kSegment);
  memorize_ = load_method(*engine_, info_, "memorize", kSegment);
  for (auto [method, results] : {std::pair(blank.get(), &blank_), std::pair(memorize_.get(), &learned_)}) {
    const auto& [inputs, outputs] = method->spec();
    for (size_t i = 0; i < outputs.size(); ++i) {
      method->write(i, results->try_emplace(outputs[i].name, outputs[i]).first->second.data());
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Buffers& from = inputs[i].name == "n_valid" ? learned_ : shared_;
      const auto found = from.find(inputs[i].name);
      if (found == from.end() || !found->second.spec().fits(inputs[i])) {
        method->refuse("takes " + inputs[i].name + " in another form than this runner gives it");
      }
      method->read(i, found->second.data());
    }
  }
  for (const TensorSpec& memory : info_.memory) {
    for (const auto& [results, name] : {std::pair(&blank_, memory.name), std::pair(&learned_, "next_" + memory.name)}) {
      const auto found = results->find(name);
      if (found == results->end() || !found->second.spec().fits(memory)) memorize_->refuse("gives no " + name);
    }
  }
  blank->run();
}

size_t Model::state_bytes() const {
  size_t bytes = 0;
  for (const auto& [_, buffer] : shared_) {
    if (!buffer.spec().shape.empty()) bytes += buffer.nbytes();  // all but the dials
  }
  return bytes;
}

void Model::reset() {
  // What rings hold is masked by position; zeroed all the same, to be reproducible.
  for (auto& [_, buffer] : shared_) buffer.clear();
  for (const TensorSpec& memory : info_.memory) shared_.at(memory.name).copy(blank_.at(memory.name));
  position_ = 0;
}

Fed Model::feed(std::span<const int64_t> tokens, const Dials& dials, bool all_logits) {
  check(tokens);
  set(dials);
  Fed fed;
  for (const auto& [rows, n] : plan_calls(position_, std::ssize(tokens), info_.chunks)) {
    Calls& calls = calls_of(rows);
    calls.prelude(tokens.first(n), position_);
    tokens = tokens.subspan(n);
    fed.iterations.push_back(calls.loop());
    const auto* depth = calls.at("depth").as<int64_t>();
    fed.depth.insert(fed.depth.end(), depth, depth + n);
    if (all_logits || tokens.empty()) {
      calls.head();
      const float* logits = calls.at("logits").as<float>();
      fed.logits.insert(fed.logits.end(), logits + (all_logits ? 0 : n - 1) * info_.vocab_size,
                        logits + n * info_.vocab_size);
    }
    calls.commit();
    keep(calls, n);
    if (position_ % kSegment == 0 && memorize_ != nullptr && remember_) memorize();
  }
  return fed;
}

Calls& Model::prepare(std::span<const int64_t> tokens, const Dials& dials) {
  set(dials);
  Calls& calls = calls_of(std::ssize(tokens));
  calls.prelude(tokens, position_);
  return calls;
}

void Model::check(std::span<const int64_t> tokens) const {
  if (tokens.empty()) throw std::runtime_error("no tokens to run; give a prompt of at least one token");
  for (const int64_t token : tokens) {
    if (token < 0 || token >= info_.vocab_size) {
      throw std::runtime_error("token " + std::to_string(token) + " is outside the vocabulary (0.." +
                               std::to_string(info_.vocab_size - 1) + ")");
    }
  }
  const int64_t length = position_ + std::ssize(tokens);
  if (info_.max_seq_len && length > *info_.max_seq_len) {
    throw std::runtime_error(std::to_string(length) + " tokens are more than the " +
                             std::to_string(*info_.max_seq_len) +
                             " this package was exported for (--max-seq-len); shorten the prompt or export again");
  }
}

void Model::set(const Dials& dials) {
  dials.check(info_.max_loops);
  *shared_.at("max_loops").as<int64_t>() = dials.max_loops;
  *shared_.at("min_loops").as<int64_t>() = dials.min_loops;
  *shared_.at("exit_threshold").as<float>() = static_cast<float>(dials.exit_threshold);
  *shared_.at("exit_epsilon").as<float>() = static_cast<float>(dials.exit_epsilon);
  *shared_.at("exit_entropy").as<float>() = static_cast<float>(dials.exit_entropy);
}

Calls& Model::calls_of(int64_t rows) {
  return **std::find_if(calls_.begin(), calls_.end(), [&](const auto& calls) { return calls->rows() == rows; });
}

// Keeps the keys and values, and what the memory is to learn, of a call's first `count` rows.
void Model::keep(const Calls& calls, int64_t count) {
  const int64_t first = std::max<int64_t>(0, count - info_.window);
  for (const auto& [name, source] : info_.rings) {
    const Buffer &ring = shared_.at(name), &made = calls.at(source);
    const std::vector<int32_t>& shape = made.spec().shape;  // (..., rows, entry)
    const int64_t outer = std::accumulate(shape.begin(), shape.end() - 2, int64_t{1}, std::multiplies<>());
    const size_t entry = made.nbytes() / (outer * calls.rows());
    for (int64_t o = 0; o < outer; ++o) {
      std::byte* to = ring.data() + o * info_.window * entry;
      const std::byte* from = made.data() + o * calls.rows() * entry;
      for (int64_t row = first; row < count; ++row) {
        std::memcpy(to + (position_ + row) % info_.window * entry, from + row * entry, entry);
      }
    }
  }
  if (memorize_ != nullptr) {
    const size_t row = info_.width * sizeof(float);
    std::memcpy(shared_.at("segment").data() + position_ % kSegment * row, calls.at("h").data(), count * row);
  }
  position_ += count;
}

// Teaches the memory the segment that was just completed.
void Model::memorize() {
  memorize_->run();
  for (const TensorSpec& memory : info_.memory) shared_.at(memory.name).copy(learned_.at("next_" + memory.name));
}

}  // namespace rmse
