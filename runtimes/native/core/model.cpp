#include "model.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <utility>

#include "errors.h"

namespace rmse {
namespace {

// Up to this many rows, single calls beat a padded call.
constexpr int64_t kSingleCalls = 6;

// Splits `count` tokens from `position` on into calls: (rows of the call, tokens in it). No call crosses a multiple of the
// segment, so that a segment always ends with a call. The first `prefix` tokens are in one call, which there is.
std::vector<std::pair<int64_t, int64_t>> plan_calls(int64_t position, int64_t count, const ModelInfo& info,
                                                    int64_t prefix) {
  std::vector<std::pair<int64_t, int64_t>> calls;
  const std::vector<int64_t>& rows = info.chunks;
  while (count > 0) {
    int64_t n = std::min(count, rows.back());
    if (info.segment) n = std::min(n, *info.segment - position % *info.segment);
    if (n <= kSingleCalls && (!calls.empty() || prefix < 2)) {
      calls.insert(calls.end(), n, {rows.front(), 1});
    } else {
      calls.emplace_back(*std::lower_bound(rows.begin(), rows.end(), n), n);
    }
    position += n;
    count -= n;
  }
  return calls;
}

// Puts the row of every position into its slot: `made` is (..., rows, entry), and of its first `count` rows the first is that of
// `position`. What is older than the slots last is gone.
void put_rows(const Buffer& slots, const Buffer& made, int64_t position, int64_t count) {
  const std::vector<int32_t> &shape = slots.spec().shape, &given = made.spec().shape;
  const int64_t size = shape.rbegin()[1], rows = given.rbegin()[1];
  const auto outer = static_cast<int64_t>(slots.outer());
  const size_t entry = slots.nbytes() / (outer * size);
  for (int64_t o = 0; o < outer; ++o) {
    std::byte* to = slots.data() + o * size * entry;
    const std::byte* from = made.data() + o * rows * entry;
    for (int64_t row = std::max<int64_t>(0, count - size); row < count; ++row) {
      std::memcpy(to + (position + row) % size * entry, from + row * entry, entry);
    }
  }
}

}  // namespace

Model::Model(const Package& package, std::unique_ptr<Engine> engine)
    : info_(package.info()), verification_(package.verification()), engine_(std::move(engine)), slots_(info_.slots(0)) {
  // Before anything is allocated: what the manifest says of the methods, and the package was checked by, is what the program has.
  for (const auto& [name, spec] : info_.signatures) engine_->check(name, spec);
  make_shared();
  for (const int64_t rows : info_.chunks) calls_.push_back(std::make_unique<Calls>(*engine_, info_, rows, shared_));
  if (info_.remembers()) make_memory();
  engine_->finish_loading();
  reset();
  if (engine_->wants_trial()) run_trial();
}

void Model::run_trial() {
  feed(std::array<int64_t, 1>{0}, Dials());
  reset();
  engine_->finish_trial();
}

void Model::make_shared() {
  const auto make = [&](const TensorSpec& spec) { shared_.try_emplace(spec.name, spec); };
  for (const char* name : {"max_loops", "min_loops"}) make({name, Dtype::kInt64, {}});
  for (const ExitDial& dial : kExitDials) make({dial.name, dial.dtype, {}});
  for (const auto& [_, state] : info_.state) make(state.tensor.of_slots(slots_));
  // Nothing is looked up here: hits stay empty.
  for (const auto& [name, spec] : given_tensors(info_, info_.chunks.front())) {
    if (name.starts_with("retrieved")) make(spec);
  }
}

void Model::make_memory() {
  // Exit states since the last boundary: what the memory is going to be taught.
  const TensorSpec segment = given_tensors(info_, *info_.segment).at("segment");
  shared_.try_emplace(segment.name, segment);
  const TensorSpec valid = {"n_valid", Dtype::kInt64, {1}};
  *learned_.try_emplace(valid.name, valid).first->second.as<int64_t>() = *info_.segment;
  const std::unique_ptr<Method> blank = load_method(*engine_, info_, "blank", *info_.segment);
  memorize_ = load_method(*engine_, info_, "memorize", *info_.segment);
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
  grow(0);
  // What slots hold is masked by position; zeroed all the same, to be reproducible. What is new is zero.
  if (position_ > 0) {
    for (auto& [_, buffer] : shared_) buffer.clear();
  }
  for (const auto& [name, state] : info_.state) {
    if (state.kind == StateKind::kWritten) shared_.at(name).copy(blank_.at(name));
  }
  position_ = 0;
}

Fed Model::feed(std::span<const int64_t> tokens, const Dials& dials, bool all_logits, int64_t prefix,
                const std::function<bool()>& go_on) {
  check(tokens);
  check_prefix(prefix, std::ssize(tokens));
  set(dials);
  Fed fed;
  for (const auto& [rows, n] : plan_calls(position_, std::ssize(tokens), info_, prefix)) {
    if (go_on && !fed.iterations.empty() && !go_on()) break;
    Calls& calls = calls_of(rows);
    calls.prelude(tokens.first(n), position_, noise_seed_, prefix);
    tokens = tokens.subspan(n);
    fed.iterations.push_back(calls.loop());
    const auto* depth = calls.at("depth").as<int64_t>();
    fed.depth.insert(fed.depth.end(), depth, depth + n);
    calls.coda();
    if (all_logits || tokens.empty()) {
      calls.head();
      const float* logits = calls.at("logits").as<float>();
      fed.logits.insert(fed.logits.end(), logits + (all_logits ? 0 : n - 1) * info_.text.vocab_size,
                        logits + n * info_.text.vocab_size);
    }
    calls.commit();
    keep(calls, n);
    if (memorize_ != nullptr && position_ % *info_.segment == 0 && remember_) {
      const float surprise = memorize();
      fed.surprises.emplace_back(position_, surprise);
    }
  }
  verification_->await();
  return fed;
}

const Buffer& Model::kept(const std::string& name) const {
  const auto found = shared_.find(name);
  if (found == shared_.end()) throw std::runtime_error(info_.name + " keeps no " + name);
  return found->second;
}

void Model::resume(int64_t position) {
  grow(position);
  position_ = position;
}

Calls& Model::prepare(std::span<const int64_t> tokens, const Dials& dials) {
  verification_->await();
  set(dials);
  Calls& calls = calls_of(std::ssize(tokens));
  calls.prelude(tokens, position_, noise_seed_, /*prefix=*/0);
  return calls;
}

void Model::check(std::span<const int64_t> tokens) const {
  if (tokens.empty()) throw std::runtime_error("no tokens to run; give a prompt of at least one token");
  for (const int64_t token : tokens) {
    if (token < 0 || token >= info_.text.vocab_size) {
      throw std::runtime_error("token " + std::to_string(token) + " is outside the vocabulary (0.." +
                               std::to_string(info_.text.vocab_size - 1) + ")");
    }
  }
  const int64_t length = position_ + std::ssize(tokens);
  const std::optional<int64_t> limit = info_.text.max_seq_len, room = info_.room();
  if (limit && length > *limit) {
    throw std::runtime_error(std::to_string(length) + " tokens are more than the " + std::to_string(*limit) +
                             " this package was exported for (rmse-export --max-seq-len); shorten the prompt or export again");
  }
  if (room && length > *room) {
    throw std::runtime_error(std::to_string(length) + " tokens are more than the " + std::to_string(*room) + " that " +
                             info_.name + (room == info_.capacity() ? " attends to" : " can keep in 4 GiB") +
                             "; shorten the text");
  }
}

// Fails where the first `prefix` of `count` tokens cannot be read as a prefix.
void Model::check_prefix(int64_t prefix, int64_t count) const {
  if (prefix == 0) return;
  const auto refuse = [](const std::string& problem) { throw ArgumentError("prefix", problem); };
  if (!info_.text.prefix) refuse(info_.name + " has none: each of its positions sees those before it");
  if (position_ > 0) {
    refuse("is the beginning of a text, and " + std::to_string(position_) + " tokens were fed before");
  }
  if (prefix < 0 || prefix > count) {
    refuse("got " + std::to_string(prefix) + ", expected 0.." + std::to_string(count) + ", of the tokens that are fed");
  }
  const int64_t most = info_.segment ? std::min(info_.chunks.back(), *info_.segment) : info_.chunks.back();
  if (prefix > most) {
    refuse(std::to_string(prefix) + " tokens are more than the " + std::to_string(most) + " that one call of " +
           info_.name + " has, and a prefix must be in one; shorten it, leave it out, or raise longest_prefix in config.json");
  }
}

void Model::set(const Dials& dials) {
  dials.check(info_.max_loops, info_.untrained_loops);
  *shared_.at("max_loops").as<int64_t>() = dials.max_loops;
  *shared_.at("min_loops").as<int64_t>() = dials.min_loops;
  for (const ExitDial& dial : kExitDials) {
    const double value = dials.*dial.value;
    if (dial.dtype == Dtype::kInt64) {
      *shared_.at(dial.name).as<int64_t>() = static_cast<int64_t>(value);
    } else {
      *shared_.at(dial.name).as<float>() = static_cast<float>(value);
    }
  }
}

Calls& Model::calls_of(int64_t rows) {
  return **std::find_if(calls_.begin(), calls_.end(), [&](const auto& calls) { return calls->rows() == rows; });
}

// Gives the appended state the slots that a text of so many positions has: more, or fewer after a reset.
void Model::grow(int64_t positions) {
  const int64_t slots = info_.slots(positions), both = std::min(slots, slots_);
  if (slots == slots_) return;
  for (const auto& [name, state] : info_.state) {
    if (state.kind != StateKind::kAppend) continue;
    Buffer& old = shared_.at(name);
    Buffer grown(state.tensor.of_slots(slots));
    const size_t entry = grown.nbytes() / grown.outer() / slots;
    for (size_t o = 0; o < grown.outer(); ++o) {
      std::memcpy(grown.data() + o * slots * entry, old.data() + o * slots_ * entry, both * entry);
    }
    old = std::move(grown);
  }
  slots_ = slots;
  for (const auto& calls : calls_) calls->bind(slots);
}

// Takes what a call gave for its first `count` rows into the state, as each tensor's kind says.
void Model::keep(const Calls& calls, int64_t count) {
  grow(position_ + count);
  for (const auto& [name, state] : info_.state) {
    Buffer& kept = shared_.at(name);
    if (state.has_slots()) {
      put_rows(kept, calls.at(state.source), position_, count);
    } else if (state.kind == StateKind::kReplace) {
      kept.copy(calls.at(state.source));
    }
  }
  if (memorize_ != nullptr) {
    const size_t row = info_.width * sizeof(float);
    std::memcpy(shared_.at("segment").data() + position_ % *info_.segment * row, calls.at("h").data(), count * row);
  }
  position_ += count;
}

// Teaches the memory the segment that was just completed.
float Model::memorize() {
  memorize_->run();
  for (const auto& [name, state] : info_.state) {
    if (state.kind == StateKind::kWritten) shared_.at(name).copy(learned_.at("next_" + name));
  }
  return *learned_.at("surprise").as<float>();
}

}  // namespace rmse
