#include "offload.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <thread>

#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "../core/errors.h"

namespace rmse {
namespace {

// All of this process, one for each program that has a budget.
std::mutex everyone_mutex;
std::vector<Offload*> everyone;

std::string mebibytes(size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f MiB", static_cast<double>(bytes) / 0x1p20);
  return text;
}

// Whole pages within, which the system may have back.
void give_back(const void* address, size_t size) {
#if defined(MADV_DONTNEED)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = (reinterpret_cast<uintptr_t>(address) + page - 1) / page * page;
  const auto last = (reinterpret_cast<uintptr_t>(address) + size) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#endif
}

// Processors that this process may use and does not compute on.
int64_t spare_processors() {
  int64_t usable = std::thread::hardware_concurrency();
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) usable = CPU_COUNT(&allowed);
#endif
  return usable - executorch::extension::get_thread_count();
}

}  // namespace

// Experts of one layer, by where they are mapped, as a call asks for them.
struct Offload::Layer {
  Mapped mapped;
  ExpertLayer stored;
  int64_t number = 0;
  Forecast forecast;
  std::vector<int64_t> guess;
};

class Offload::Source final : public ExpertSource {
 public:
  void use(Offload& owner, Layer& layer, const ExpertShape& shape, const float* scores, const bool* active) {
    owner_ = &owner;
    layer_ = &layer;
    scores_ = scores;
    active_ = active;
    rows_ = shape.rows;
    places_ = shape.places;
  }

  void want(std::span<const int64_t> experts) override {
    ExpertCache& cache = *owner_->cache_;
    cache.want(layer_->number, owner_->loop_, experts);
    layer_->guess.clear();
    layer_->forecast.see(owner_->loop_, scores_, active_, rows_, layer_->guess);
    if (layer_->guess.empty()) return;
    if (places_ != nullptr) {
      for (int64_t& expert : layer_->guess) expert = places_[expert];
    }
    std::sort(layer_->guess.begin(), layer_->guess.end());  // neighbours are read in one go
    cache.expect(layer_->guess);
  }

  std::span<const ExpertAt> next() override {
    placed_.clear();
    for (const ExpertCache::Given& given : owner_->cache_->next()) {
      const ExpertPlaces& at = given.pieces;
      placed_.push_back({given.expert, reinterpret_cast<const uint8_t*>(at[0]), reinterpret_cast<const uint16_t*>(at[1]),
                         reinterpret_cast<const uint8_t*>(at[2]), reinterpret_cast<const uint16_t*>(at[3])});
    }
    return placed_;
  }

 private:
  Offload* owner_ = nullptr;
  Layer* layer_ = nullptr;
  const float* scores_ = nullptr;
  const bool* active_ = nullptr;
  int64_t rows_ = 0;
  const int64_t* places_ = nullptr;
  std::vector<ExpertAt> placed_;
};

Offload::Offload(const std::string& program) : file_(program) {
  const std::lock_guard lock(everyone_mutex);
  everyone.push_back(this);
}

Offload::~Offload() {
  const std::lock_guard lock(everyone_mutex);
  std::erase(everyone, this);
}

void Offload::begin(const ExpertBudget& budget) {
  if (!problem_.empty()) throw std::runtime_error(problem_);
  if (layers_.empty()) {
    throw ArgumentError("expert_ram", file_.path() + " has no quantised experts whose memory could be bounded; leave it out");
  }
  std::vector<ExpertLayer> stored;
  for (const auto& layer : layers_) stored.push_back(layer->stored);
  const auto least = static_cast<int64_t>(ExpertSlots::bytes_of(stored));
  const int64_t bytes = budget.bytes(total_bytes());
  if (bytes < least) {
    throw ArgumentError("expert_ram", mebibytes(bytes) + " hold no expert of " + mebibytes(least) +
                                          "; the smallest budget that works is " + std::to_string((least + 1023) / 1024) + "K");
  }
  cache_ = std::make_unique<ExpertCache>(file_, stored, bytes, spare_processors());
  for (const auto& layer : layers_) {
    for (size_t i = 0; i < layer->mapped.pieces.size(); ++i) {
      give_back(layer->mapped.pieces[i], layer->mapped.sizes[i] * layer->stored.experts);
    }
  }
}

std::string Offload::problem() const {
  if (!problem_.empty() || cache_ == nullptr) return problem_;
  return cache_->problem();
}

int64_t Offload::total_bytes() const {
  int64_t total = 0;
  for (const auto& layer : layers_) total += layer->stored.experts * static_cast<int64_t>(layer->stored.bytes());
  return total;
}

int64_t Offload::budget_bytes() const { return cache_->bytes(); }

Offload::Layer* Offload::layer_of(const Mapped& mapped, const ExpertShape& shape) {
  for (const auto& layer : layers_) {
    if (layer->mapped.pieces == mapped.pieces) return layer.get();
  }
  if (cache_ != nullptr) return nullptr;
  auto layer = std::make_unique<Layer>(Layer{mapped, {}, std::ssize(layers_), Forecast(shape.experts, shape.top_k), {}});
  layer->stored.experts = shape.experts;
  for (size_t i = 0; i < mapped.pieces.size(); ++i) {
    layer->stored.pieces[i] = {file_.offset_of(mapped.pieces[i]), mapped.sizes[i]};
    if (layer->stored.pieces[i].offset < 0) return nullptr;  // another program's
  }
  layers_.push_back(std::move(layer));
  return layers_.back().get();
}

Offload::Call Offload::call(const ExpertShape& shape, const Mapped& mapped, const float* scores, const bool* active) {
  const std::lock_guard lock(everyone_mutex);
  for (Offload* one : everyone) {
    Layer* layer = one->layer_of(mapped, shape);
    if (layer == nullptr) continue;
    if (one->cache_ == nullptr) return {nullptr, /*skip=*/true, false};
    thread_local Source source;
    source.use(*one, *layer, shape, scores, active);
    return {&source, false, !one->problem().empty()};
  }
  return {};
}

std::string Offload::figures() const {
  const ExpertFigures f = cache_->figures();
  std::ostringstream json;
  const auto loop = [&](const ExpertFigures::Loop& of) {
    json << "{\"wanted\": " << of.wanted << ", \"found\": " << of.found << "}";
  };
  json << "{\"expert_bytes\": " << total_bytes() << ", \"budget_bytes\": " << budget_bytes()
       << ", \"resident_bytes\": " << cache_->resident_bytes() << ", \"loops\": [";
  for (size_t k = 0; k < f.loops.size(); ++k) {
    if (k > 0) json << ", ";
    loop(f.loops[k]);
  }
  json << "], \"outside\": ";
  loop(f.outside);
  json << ", \"bytes_read\": " << f.bytes_read << ", \"stall_ns\": " << f.stall_ns << ", \"read_ahead\": " << f.read_ahead
       << ", \"used\": " << f.used << ", \"wasted\": " << f.wasted << "}";
  return json.str();
}

void Offload::clear_figures() { cache_->clear_figures(); }

}  // namespace rmse
