#include "expert_store.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace rmse {
namespace {

constexpr size_t kAlignment = 64;  // bytes, of a piece within a slot: a line of the processor's cache
// Pages of experts smaller than this hold too much of their neighbours to be counted as theirs.
constexpr size_t kFewestPages = 32;

size_t aligned(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

template <typename Measure>
size_t largest(const std::vector<ExpertLayer>& layers, const Measure& measure) {
  size_t found = 0;
  for (const ExpertLayer& layer : layers) found = std::max(found, measure(layer));
  return found;
}

// Slots of memory of the process's own, which the file is read into.
class CopiedExperts final : public ExpertStore {
 public:
  CopiedExperts(const ExpertFile& file, const std::vector<ExpertLayer>& layers)
      : ExpertStore(largest(layers, [](const ExpertLayer& layer) { return layer.bytes(); })), file_(file) {}

  ~CopiedExperts() override {
    if (memory_ != nullptr) munmap(memory_, mapped_);
  }

  void reserve(int64_t slots) override {
    mapped_ = static_cast<size_t>(slots) * slot_bytes_;
    // Pages are taken when they are written to first: memory that is never needed is never there.
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error(std::string("no memory for experts (") + std::strerror(errno) + ")");
    memory_ = static_cast<std::byte*>(memory);
#if defined(MADV_HUGEPAGE)
    madvise(memory, mapped_, MADV_HUGEPAGE);  // fewer pages to look up, for who copies and who multiplies
#endif
  }

  std::string bring(const ExpertLayer& layer, int64_t first, std::span<const int32_t> slots) override {
    std::vector<iovec> to(slots.size());
    for (size_t i = 0; i < layer.pieces.size(); ++i) {
      const ExpertPiece& piece = layer.pieces[i];
      for (size_t n = 0; n < slots.size(); ++n) to[n] = {slot(slots[n]) + layer.at(i), piece.size};
      if (std::string why = file_.read(piece.of(first), to); !why.empty()) return why;
    }
    return file_.changed();  // asked afterwards: what was read is what the file was opened with
  }

  bool maps() const override { return false; }
  int64_t waits() const override { return 0; }
  void announce(StoredExpert) const override {}
  void drop(std::span<const StoredExpert>) override {}  // others take their slots

  ExpertPlaces at(const ExpertLayer& layer, int64_t, int32_t slot_number) const override {
    ExpertPlaces found;
    for (size_t i = 0; i < found.size(); ++i) found[i] = slot(slot_number) + layer.at(i);
    return found;
  }

 private:
  std::byte* slot(int32_t number) const { return memory_ + static_cast<size_t>(number) * slot_bytes_; }

  const ExpertFile& file_;
  std::byte* memory_ = nullptr;
  size_t mapped_ = 0;
};

// Pages of the file itself. A slot is only counted.
class MappedExperts final : public ExpertStore {
 public:
  MappedExperts(const ExpertFile& file, const std::vector<ExpertLayer>& layers)
      : ExpertStore(largest(layers, on_pages)), file_(file) {}

  // Memory of an expert's pages, those that it shares with its neighbours included.
  static size_t on_pages(const ExpertLayer& layer) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_t found = 0;
    for (const ExpertPiece& piece : layer.pieces) {
      const bool whole = piece.size % page == 0 && static_cast<size_t>(piece.offset) % page == 0;
      found += whole ? piece.size : ((piece.size + page - 2) / page + 1) * page;
    }
    return found;
  }

  bool maps() const override { return true; }
  void reserve(int64_t) override {}

  int64_t waits() const override {
#if defined(RUSAGE_THREAD)
    struct rusage used;
    if (getrusage(RUSAGE_THREAD, &used) == 0) return used.ru_nvcsw;
#endif
    return 0;
  }

  void announce(StoredExpert expert) const override {
    for (const ExpertPiece& piece : expert.layer->pieces) file_.announce(piece.of(expert.expert), piece.size);
  }

  std::string bring(const ExpertLayer& layer, int64_t first, std::span<const int32_t> slots) override {
    for (const ExpertPiece& piece : layer.pieces) {
      if (std::string why = file_.bring(piece.of(first), piece.size * slots.size()); !why.empty()) return why;
    }
    return {};
  }

  void drop(std::span<const StoredExpert> experts) override {
    std::vector<std::span<std::byte>> parts;
    for (const StoredExpert& gone : experts) {
      for (const ExpertPiece& piece : gone.layer->pieces) parts.push_back(file_.pages(piece.of(gone.expert), piece.size));
    }
    file_.drop(parts);
  }

  ExpertPlaces at(const ExpertLayer& layer, int64_t expert, int32_t) const override {
    ExpertPlaces found;
    for (size_t i = 0; i < found.size(); ++i) {
      found[i] = file_.at(layer.pieces[i].of(expert));
    }
    return found;
  }

 private:
  const ExpertFile& file_;
};

// Whether the system can keep all of the file cached, and an expert has its pages about for itself.
bool worth_mapping(const std::vector<ExpertLayer>& layers) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  int64_t total = 0;
  for (const ExpertLayer& layer : layers) {
    if (layer.bytes() < kFewestPages * page) return false;
    total += layer.experts * static_cast<int64_t>(layer.bytes());
  }
  return available_memory().value_or(0) > total;
}

}  // namespace

size_t ExpertLayer::at(size_t piece) const {
  size_t found = 0;
  for (size_t i = 0; i < piece; ++i) found += aligned(pieces[i].size);
  return found;
}

std::unique_ptr<ExpertStore> open_store(ExpertFile& file, const std::vector<ExpertLayer>& layers, ExpertAccess access) {
  const bool wanted = access == ExpertAccess::kMap || (access == ExpertAccess::kAuto && worth_mapping(layers));
  if (wanted && file.map()) return std::make_unique<MappedExperts>(file, layers);
  return std::make_unique<CopiedExperts>(file, layers);
}

}  // namespace rmse
