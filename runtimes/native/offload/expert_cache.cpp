#include "expert_cache.h"

#include <algorithm>
#include <chrono>

namespace rmse {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kFewest = 4;  // experts that are worth computing side by side
// Neighbours are copied in one go up to here: of more, a second thread had better begin with the rest.
constexpr size_t kMostBytes = 256 << 10;
// Where one expert had to be waited for, the next ones will: so many are taken to be on the disk, too.
constexpr int64_t kOthers = 64;
constexpr int64_t kLeaving = 16;  // of so many experts one leaves when others leave

}  // namespace

ExpertCache::ExpertCache(ExpertStore& store, const ExpertFile& file, std::vector<ExpertLayer> layers, int64_t budget, int64_t spare)
    : store_(store), maps_(store.maps()), file_(file), layers_(std::move(layers)), firsts_{0}, slow_(kOthers) {
  for (const ExpertLayer& layer : layers_) firsts_.push_back(firsts_.back() + layer.experts);
  experts_.resize(firsts_.back());
  const int64_t count = std::min(budget / static_cast<int64_t>(store_.slot_bytes()), firsts_.back());
  store_.reserve(count);
  slots_.resize(count);
  for (int32_t slot = static_cast<int32_t>(count) - 1; slot >= 0; --slot) free_.push_back(slot);
  // Who copies is worth a thread always, two where as many processors are left over; who maps takes less time than another
  // processor would lose by it.
  const int64_t count_readers = maps_ ? std::clamp<int64_t>(spare, 0, 1) : std::clamp<int64_t>(spare, 1, 2);
  for (int64_t i = 0; i < count_readers; ++i) readers_.emplace_back([this] { run_reader(); });
}

ExpertCache::~ExpertCache() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  work_.notify_all();
  for (std::thread& reader : readers_) reader.join();
}

int64_t ExpertCache::resident_bytes() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int64_t>((slots_.size() - free_.size()) * store_.slot_bytes());
}

// ------------------------------------------------------------------------------------------------------- the slots

void ExpertCache::append(int32_t slot) {
  Slot& own = slots_[slot];
  own.before = newest_;
  own.behind = kNone;
  own.listed = true;
  (newest_ == kNone ? oldest_ : slots_[newest_].behind) = slot;
  newest_ = slot;
}

void ExpertCache::unlist(int32_t slot) {
  Slot& own = slots_[slot];
  if (!own.listed) return;
  (own.before == kNone ? oldest_ : slots_[own.before].behind) = own.behind;
  (own.behind == kNone ? newest_ : slots_[own.behind].before) = own.before;
  own.listed = false;
}

int32_t ExpertCache::take_slot(std::vector<StoredExpert>& gone) {
  // Mapped experts leave several at once, which costs the processors what one costs (`ExpertFile::drop`).
  const int64_t most = maps_ ? std::max<int64_t>(1, slots() / kLeaving) : 1;
  for (int64_t i = 0; free_.empty() || (i > 0 && i < most); ++i) {
    if (oldest_ == kNone) break;
    const int32_t slot = oldest_;
    unlist(slot);
    Expert& expert = experts_[slots_[slot].expert];
    gone.push_back(stored(slots_[slot].expert));
    slots_[slot].expert = -1;
    free_.push_back(slot);
    figures_.wasted += expert.ahead;
    expert = {};
  }
  if (free_.empty()) return kNone;
  const int32_t slot = free_.back();
  free_.pop_back();
  return slot;
}

// Not all at once: what is computed makes room for what is read meanwhile.
int64_t ExpertCache::most_given() const { return std::max(kFewest, slots() / 4); }

size_t ExpertCache::layer_of(int64_t expert) const {
  return std::upper_bound(firsts_.begin(), firsts_.end(), expert) - firsts_.begin() - 1;
}

StoredExpert ExpertCache::stored(int64_t expert) const {
  const size_t layer = layer_of(expert);
  return {&layers_[layer], expert - firsts_[layer]};
}

// Neighbours, for who copies; what is mapped at once, as many as a call of `next` gives.
ExpertCache::Request ExpertCache::take_request(bool reader) {
  std::deque<int64_t>& queue = reader && (maps_ || demand_.empty()) ? guesses_ : demand_;
  Request request;
  if (queue.empty()) return request;
  request.layer = layer_of(queue.front());
  const size_t bytes = layers_[request.layer].bytes();
  const bool at_once = maps_ && !reader;
  while (!queue.empty()) {
    const int64_t expert = queue.front();
    if (request && at_once && std::ssize(request.slots) == most_given()) break;
    if (request && !at_once && (expert != request.experts.back() + 1 || (request.slots.size() + 1) * bytes > kMostBytes)) break;
    const int32_t slot = take_slot(request.gone);
    if (slot == kNone) break;
    request.experts.push_back(expert);
    request.slots.push_back(slot);
    queue.pop_front();
    slots_[slot].expert = expert;
    Expert& own = experts_[expert];
    own.slot = slot;
    own.ahead = own.state == State::kGuessed;
    figures_.read_ahead += own.ahead;
    own.state = State::kLoading;
  }
  return request;
}

// ------------------------------------------------------------------------------------------------------- reading

// Neighbours in one go.
std::string ExpertCache::bring(const Request& request) {
  const ExpertLayer& layer = layers_[request.layer];
  const std::span<const int32_t> slots = request.slots;
  std::string why;
  for (size_t i = 0, end = 0; i < slots.size() && why.empty(); i = end) {
    for (end = i + 1; end < slots.size() && request.experts[end] == request.experts[end - 1] + 1; ++end) {
    }
    why = store_.bring(layer, request.experts[i] - firsts_[request.layer], slots.subspan(i, end - i));
  }
  return why;
}

// Brings experts into the slots that they were given; `lock` is let go of meanwhile.
void ExpertCache::load(const Request& request, std::unique_lock<std::mutex>& lock) {
  if (!request.gone.empty()) store_.drop(request.gone);  // before somebody else can fill what they leave
  lock.unlock();
  const int64_t waits = store_.waits();
  std::string why = bring(request);
  const bool waited = store_.waits() > waits;
  lock.lock();
  if (!why.empty() && problem_.empty()) problem_ = why;
  slow_ = waited ? kOthers : std::max<int64_t>(0, slow_ - std::ssize(request.slots));
  figures_.bytes_read += static_cast<int64_t>(layers_[request.layer].bytes() * request.slots.size());
  for (size_t i = 0; i < request.slots.size(); ++i) {
    const int32_t slot = request.slots[i];
    Expert& loaded = experts_[request.experts[i]];
    if (!why.empty()) {
      loaded = {};
      slots_[slot].expert = -1;
      free_.push_back(slot);
      continue;
    }
    loaded.state = State::kReady;
    if (loaded.wanted) {
      ready_.push_back(request.experts[i]);
    } else {
      append(slot);
    }
  }
  arrived_.notify_all();
}

void ExpertCache::run_reader() {
  std::unique_lock lock(mutex_);
  while (!ending_) {
    if (const Request request = problem_.empty() ? take_request(/*reader=*/true) : Request{}) {
      load(request, lock);
    } else {
      work_.wait(lock);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- a call

void ExpertCache::release_given() {
  for (const int32_t slot : given_slots_) append(slot);
  given_slots_.clear();
  given_.clear();
}

void ExpertCache::want(int64_t layer, int64_t loop, std::span<const int64_t> experts) {
  const std::lock_guard lock(mutex_);
  release_given();
  const auto forget = [&](std::deque<int64_t>& queue) {
    for (const int64_t expert : queue) experts_[expert] = {};
    queue.clear();
  };
  forget(guesses_);
  forget(demand_);
  for (const int64_t expert : ready_) {  // of a call that failed
    experts_[expert].wanted = false;
    append(experts_[expert].slot);
  }
  ready_.clear();
  if (std::string why = file_.changed(); !why.empty() && problem_.empty()) problem_ = std::move(why);
  if (loop >= static_cast<int64_t>(figures_.loops.size())) figures_.loops.resize(loop + 1);
  ExpertFigures::Loop& figures = loop < 0 ? figures_.outside : figures_.loops[loop];
  wanted_ = left_ = static_cast<int64_t>(experts.size());
  for (const int64_t e : experts) {
    const int64_t number = firsts_[layer] + e;
    Expert& expert = experts_[number];
    expert.wanted = true;
    ++figures.wanted;
    if (expert.ahead) ++figures_.used;
    expert.ahead = false;
    if (expert.state == State::kReady) {
      ++figures.found;
      unlist(expert.slot);
      ready_.push_back(number);
    } else if (expert.state == State::kAbsent) {
      expert.state = State::kQueued;
      demand_.push_back(number);
    }
  }
  if (maps_) {
    announce(demand_);
    return;
  }
  for (size_t i = 0; i < std::min(demand_.size(), readers_.size()); ++i) work_.notify_one();
}

// The disk is asked for all before the first is waited for.
void ExpertCache::announce(const std::deque<int64_t>& experts) const {
  if (slow_ == 0) return;
  for (const int64_t expert : experts) store_.announce(stored(expert));
}

void ExpertCache::expect(int64_t layer, std::span<const int64_t> experts) {
  const std::lock_guard lock(mutex_);
  int64_t room = slots() - wanted_;
  for (const int64_t e : experts) {
    Expert& expert = experts_[firsts_[layer] + e];
    if (room-- <= 0) break;
    if (expert.state == State::kReady && slots_[expert.slot].listed) {  // not before what nobody expects
      unlist(expert.slot);
      append(expert.slot);
    } else if (expert.state == State::kAbsent && !readers_.empty()) {
      expert.state = State::kGuessed;
      guesses_.push_back(firsts_[layer] + e);
    }
  }
  if (maps_) announce(guesses_);
  if ((maps_ || demand_.empty()) && !guesses_.empty()) work_.notify_one();
}

std::span<const ExpertCache::Given> ExpertCache::next() {
  std::unique_lock lock(mutex_);
  release_given();
  if (!guesses_.empty() || (!maps_ && !demand_.empty())) work_.notify_one();  // there is room again
  if (ready_.empty() && left_ > 0) {
    const auto start = Clock::now();
    while (ready_.empty() && problem_.empty()) {
      if (const Request request = take_request(/*reader=*/false)) {
        load(request, lock);
      } else {
        arrived_.wait(lock);
      }
    }
    figures_.stall_ns += std::chrono::nanoseconds(Clock::now() - start).count();
  }
  if (!problem_.empty()) return {};
  while (!ready_.empty() && static_cast<int64_t>(given_.size()) < most_given()) {
    const int64_t expert = ready_.back();
    ready_.pop_back();
    Expert& given = experts_[expert];
    given.wanted = false;
    const size_t layer = layer_of(expert);
    const int64_t e = expert - firsts_[layer];
    given_.push_back({e, store_.at(layers_[layer], e, given.slot)});
    given_slots_.push_back(given.slot);
  }
  left_ -= static_cast<int64_t>(given_.size());
  return given_;
}

bool ExpertCache::still_right() {
  std::string why = file_.changed();
  const std::lock_guard lock(mutex_);
  if (!why.empty() && problem_.empty()) problem_ = std::move(why);
  return problem_.empty();
}

std::string ExpertCache::problem() const {
  const std::lock_guard lock(mutex_);
  return problem_;
}

ExpertFigures ExpertCache::figures() const {
  const std::lock_guard lock(mutex_);
  return figures_;
}

void ExpertCache::clear_figures() {
  const std::lock_guard lock(mutex_);
  figures_ = {};
}

}  // namespace rmse
