#include "expert_cache.h"

#include <algorithm>
#include <chrono>

namespace rmse {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kFewest = 4;  // experts that are worth computing side by side
// Neighbours are copied in one go up to here: of more, a second thread had better begin with the rest.
constexpr size_t kMostBytes = 256 << 10;

}  // namespace

ExpertCache::ExpertCache(const ExpertFile& file, std::vector<ExpertLayer> layers, int64_t budget, int64_t spare)
    : file_(file), memory_(file, layers, budget), layers_(std::move(layers)), slots_(memory_.count()) {
  int64_t experts = 0;
  for (const ExpertLayer& layer : layers_) {
    firsts_.push_back(experts);
    experts += layer.experts;
  }
  experts_.resize(experts);
  for (int32_t slot = 0; slot < std::ssize(slots_); ++slot) slots_[slot].place = idle_.insert(idle_.end(), slot);
  // One is worth its copying in any case, two where as many processors are left over.
  for (int64_t i = 0; i < std::clamp<int64_t>(spare, 1, 2); ++i) readers_.emplace_back([this] { run_reader(); });
}

ExpertCache::~ExpertCache() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  work_.notify_all();
  for (std::thread& reader : readers_) reader.join();
}

int64_t ExpertCache::bytes() const { return memory_.count() * static_cast<int64_t>(memory_.bytes()); }

int64_t ExpertCache::resident_bytes() const {
  const std::lock_guard lock(mutex_);
  return std::ranges::count_if(slots_, [](const Slot& slot) { return slot.expert >= 0; }) * static_cast<int64_t>(memory_.bytes());
}

// ------------------------------------------------------------------------------------------------------- the slots

void ExpertCache::use(Expert& expert) {
  busy_.splice(busy_.end(), idle_, slots_[expert.slot].place);
  expert.state = State::kInUse;
}

void ExpertCache::rest(Expert& expert) {
  idle_.splice(idle_.end(), busy_, slots_[expert.slot].place);
  expert.state = State::kIdle;
}

int32_t ExpertCache::take_slot() {
  const int32_t slot = idle_.front();
  busy_.splice(busy_.end(), idle_, idle_.begin());
  if (const int64_t gone = slots_[slot].expert; gone >= 0) {
    figures_.wasted += experts_[gone].ahead;
    experts_[gone] = {};
  }
  return slot;
}

// ------------------------------------------------------------------------------------------------------- reading

ExpertCache::Request ExpertCache::take_request(bool reader) {
  std::deque<int64_t>& queue = reader && demand_.empty() ? guesses_ : demand_;
  if (queue.empty()) return {};
  Request request = {layer_, queue.front(), {}};
  const size_t most = std::max<size_t>(1, kMostBytes / layers_[layer_].bytes());
  for (int64_t e = request.first; !queue.empty() && queue.front() == e && request.slots.size() < most && !idle_.empty(); ++e) {
    queue.pop_front();
    Expert& expert = own(e);
    expert.slot = take_slot();
    slots_[expert.slot].expert = firsts_[layer_] + e;
    expert.ahead = expert.state == State::kGuessed;
    figures_.read_ahead += expert.ahead;
    expert.state = State::kLoading;
    request.slots.push_back(expert.slot);
  }
  return request;
}

// Reads experts into the slots that they were given; `lock` is let go of meanwhile.
void ExpertCache::load(const Request& request, std::unique_lock<std::mutex>& lock) {
  const ExpertLayer& layer = layers_[request.layer];
  lock.unlock();
  std::string why = memory_.read(layer, request.first, request.slots);
  lock.lock();
  if (!why.empty() && problem_.empty()) problem_ = std::move(why);
  figures_.bytes_read += static_cast<int64_t>(layer.bytes() * request.slots.size());
  for (int64_t i = 0; i < std::ssize(request.slots); ++i) {
    Expert& loaded = experts_[slots_[request.slots[i]].expert];
    if (loaded.wanted) {
      loaded.state = State::kInUse;
      ready_.push_back(request.first + i);  // only this call's layer has wanted experts
    } else {
      rest(loaded);
    }
  }
  arrived_.notify_all();
}

void ExpertCache::run_reader() {
  std::unique_lock lock(mutex_);
  while (!ending_) {
    const Request request = problem_.empty() ? take_request(/*reader=*/true) : Request{};
    if (request.slots.empty()) {
      work_.wait(lock);
    } else {
      load(request, lock);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- a call

void ExpertCache::release_given() {
  for (const Given& given : given_) rest(own(given.expert));
  given_.clear();
}

void ExpertCache::want(int64_t layer, int64_t loop, std::span<const int64_t> experts) {
  const std::lock_guard lock(mutex_);
  release_given();
  for (const int64_t e : guesses_) own(e) = {};
  guesses_.clear();
  layer_ = layer;
  if (problem_.empty()) problem_ = file_.changed();
  if (!problem_.empty()) return;
  if (loop >= std::ssize(figures_.loops)) figures_.loops.resize(loop + 1);
  ExpertFigures::Loop& figures = loop < 0 ? figures_.outside : figures_.loops[loop];
  wanted_ = left_ = std::ssize(experts);
  for (const int64_t e : experts) {
    Expert& expert = own(e);
    expert.wanted = true;
    ++figures.wanted;
    figures_.used += expert.ahead;
    expert.ahead = false;
    if (expert.state == State::kIdle) {
      ++figures.found;
      use(expert);
      ready_.push_back(e);
    } else if (expert.state == State::kAbsent) {
      expert.state = State::kQueued;
      demand_.push_back(e);
    }
  }
  for (size_t i = 0; i < std::min(demand_.size(), readers_.size()); ++i) work_.notify_one();
}

void ExpertCache::expect(std::span<const int64_t> experts) {
  const std::lock_guard lock(mutex_);
  const auto room = static_cast<size_t>(std::max<int64_t>(0, memory_.count() - wanted_));
  for (const int64_t e : experts.first(std::min(room, experts.size()))) {
    Expert& expert = own(e);
    if (expert.state == State::kIdle) {  // not before what nobody expects
      use(expert);
      rest(expert);
    } else if (expert.state == State::kAbsent) {
      expert.state = State::kGuessed;
      guesses_.push_back(e);
    }
  }
  if (demand_.empty() && !guesses_.empty()) work_.notify_one();
}

std::span<const ExpertCache::Given> ExpertCache::next() {
  std::unique_lock lock(mutex_);
  release_given();
  if (!guesses_.empty() || !demand_.empty()) work_.notify_one();  // there is room again
  if (ready_.empty() && left_ > 0) {
    const auto start = Clock::now();
    while (ready_.empty() && problem_.empty()) {
      if (const Request request = take_request(/*reader=*/false); request.slots.empty()) {
        arrived_.wait(lock);
      } else {
        load(request, lock);
      }
    }
    figures_.stall_ns += std::chrono::nanoseconds(Clock::now() - start).count();
  }
  if (!problem_.empty()) return {};
  const int64_t most = std::max(kFewest, memory_.count() / 4);  // not all: what is computed makes room for what is read meanwhile
  while (!ready_.empty() && std::ssize(given_) < most) {
    const int64_t e = ready_.back();
    ready_.pop_back();
    own(e).wanted = false;
    given_.push_back({e, memory_.at(layers_[layer_], own(e).slot)});
  }
  left_ -= std::ssize(given_);
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
