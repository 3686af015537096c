#include "expert_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>

namespace rmse {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kAlignment = 64;  // bytes, of a piece within a slot: a line of the processor's cache
constexpr int64_t kFewest = 4;     // experts that are worth computing side by side

size_t aligned(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

size_t ExpertLayer::at(size_t piece) const {
  size_t found = 0;
  for (size_t i = 0; i < piece; ++i) found += aligned(pieces[i].size);
  return found;
}

size_t ExpertCache::slot_bytes(const std::vector<ExpertLayer>& layers) {
  size_t largest = 0;
  for (const ExpertLayer& layer : layers) largest = std::max(largest, layer.slot());
  return largest;
}

ExpertCache::ExpertCache(const ExpertFile& file, std::vector<ExpertLayer> layers, int64_t budget)
    : file_(file), layers_(std::move(layers)), firsts_{0}, slot_bytes_(slot_bytes(layers_)) {
  for (const ExpertLayer& layer : layers_) firsts_.push_back(firsts_.back() + layer.experts);
  experts_.resize(firsts_.back());
  const int64_t count = std::min(budget / static_cast<int64_t>(slot_bytes_), firsts_.back());
  mapped_ = static_cast<size_t>(count) * slot_bytes_;
  // Pages are taken when they are written to first: memory that is never needed is never there.
  void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error(std::string("no memory for experts (") + std::strerror(errno) + ")");
  memory_ = static_cast<std::byte*>(memory);
  slots_.resize(count);
  for (int32_t slot = static_cast<int32_t>(count) - 1; slot >= 0; --slot) free_.push_back(slot);
  for (int64_t i = 0; i < kReaders; ++i) readers_.emplace_back([this] { run_reader(); });
}

ExpertCache::~ExpertCache() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  work_.notify_all();
  for (std::thread& reader : readers_) reader.join();
  munmap(memory_, mapped_);
}

int64_t ExpertCache::resident_bytes() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int64_t>((slots_.size() - free_.size()) * slot_bytes_);
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

int32_t ExpertCache::take_slot() {
  if (!free_.empty()) {
    const int32_t slot = free_.back();
    free_.pop_back();
    return slot;
  }
  if (oldest_ == kNone) return kNone;
  const int32_t slot = oldest_;
  unlist(slot);
  Expert& gone = experts_[slots_[slot].expert];
  figures_.wasted += gone.ahead;
  gone = {};
  return slot;
}

int64_t ExpertCache::take_request(bool guesses) {
  std::deque<int64_t>& queue = demand_.empty() && guesses ? guesses_ : demand_;
  if (queue.empty()) return -1;
  const int32_t slot = take_slot();
  if (slot == kNone) return -1;
  const int64_t expert = queue.front();
  queue.pop_front();
  slots_[slot].expert = expert;
  experts_[expert].slot = slot;
  experts_[expert].ahead = experts_[expert].state == State::kGuessed;
  figures_.read_ahead += experts_[expert].ahead;
  experts_[expert].state = State::kLoading;
  return expert;
}

// ------------------------------------------------------------------------------------------------------- reading

std::string ExpertCache::read(int64_t expert, std::byte* to) const {
  const size_t number = std::upper_bound(firsts_.begin(), firsts_.end(), expert) - firsts_.begin() - 1;
  const ExpertLayer& layer = layers_[number];
  const int64_t e = expert - firsts_[number];
  for (size_t i = 0; i < layer.pieces.size(); ++i) {
    const ExpertPiece& piece = layer.pieces[i];
    std::string why = file_.read(piece.offset + e * static_cast<int64_t>(piece.size), piece.size, to + layer.at(i));
    if (!why.empty()) return why;
  }
  return {};
}

// Fills the slot that an expert was given; `lock` is let go of meanwhile.
void ExpertCache::load(int64_t expert, std::unique_lock<std::mutex>& lock) {
  const int32_t slot = experts_[expert].slot;
  lock.unlock();
  std::string why = read(expert, data(slot));
  lock.lock();
  Expert& loaded = experts_[expert];
  figures_.bytes_read += static_cast<int64_t>(slot_bytes_);
  if (!why.empty()) {
    if (problem_.empty()) problem_ = std::move(why);
    loaded = {};
    slots_[slot].expert = -1;
    free_.push_back(slot);
  } else {
    loaded.state = State::kReady;
    if (loaded.wanted) {
      ready_.push_back(expert);
    } else {
      append(slot);
    }
  }
  arrived_.notify_all();
}

void ExpertCache::run_reader() {
  std::unique_lock lock(mutex_);
  while (!ending_) {
    const int64_t expert = problem_.empty() ? take_request(/*guesses=*/true) : -1;
    if (expert < 0) {
      work_.wait(lock);
    } else {
      load(expert, lock);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- a call

void ExpertCache::release_given() {
  for (const Given& given : given_) {
    const int64_t slot = (given.data - memory_) / static_cast<int64_t>(slot_bytes_);
    append(static_cast<int32_t>(slot));
  }
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
  for (size_t i = 0; i < std::min(demand_.size(), readers_.size()); ++i) work_.notify_one();
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
    } else if (expert.state == State::kAbsent) {
      expert.state = State::kGuessed;
      guesses_.push_back(firsts_[layer] + e);
    }
  }
  if (demand_.empty() && !guesses_.empty()) work_.notify_one();
}

std::span<const ExpertCache::Given> ExpertCache::next() {
  std::unique_lock lock(mutex_);
  release_given();
  if (!demand_.empty() || !guesses_.empty()) work_.notify_one();  // there is room again
  if (ready_.empty() && left_ > 0) {
    const auto start = Clock::now();
    while (ready_.empty() && problem_.empty()) {
      const int64_t expert = take_request(/*guesses=*/false);
      if (expert >= 0) {
        load(expert, lock);
      } else {
        arrived_.wait(lock);
      }
    }
    figures_.stall_ns += std::chrono::nanoseconds(Clock::now() - start).count();
  }
  if (!problem_.empty()) return {};
  // Not all at once: what is computed makes room for what is read meanwhile.
  const int64_t most = std::max(kFewest, slots() / 4);
  while (!ready_.empty() && static_cast<int64_t>(given_.size()) < most) {
    const int64_t expert = ready_.back();
    ready_.pop_back();
    Expert& given = experts_[expert];
    given.wanted = false;
    const size_t layer = std::upper_bound(firsts_.begin(), firsts_.end(), expert) - firsts_.begin() - 1;
    given_.push_back({expert - firsts_[layer], data(given.slot)});
  }
  left_ -= static_cast<int64_t>(given_.size());
  return given_;
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
