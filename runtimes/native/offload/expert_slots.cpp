#include "expert_slots.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace rmse {
namespace {

constexpr size_t kAlignment = 64;  // bytes, of a piece within a slot: a line of the processor's cache

size_t aligned(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

size_t ExpertLayer::at(size_t piece) const {
  size_t found = 0;
  for (size_t i = 0; i < piece; ++i) found += aligned(pieces[i].size);
  return found;
}

size_t ExpertSlots::bytes_of(const std::vector<ExpertLayer>& layers) {
  size_t found = 0;
  for (const ExpertLayer& layer : layers) found = std::max(found, layer.bytes());
  return found;
}

ExpertSlots::ExpertSlots(const ExpertFile& file, const std::vector<ExpertLayer>& layers, int64_t budget)
    : file_(file), bytes_(bytes_of(layers)), count_(0) {
  for (const ExpertLayer& layer : layers) count_ += layer.experts;
  count_ = std::min(count_, budget / static_cast<int64_t>(bytes_));
  // Pages are taken when they are written to first: memory that is never needed is never there.
  void* memory = mmap(nullptr, bytes_ * count_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error(std::string("no memory for experts (") + std::strerror(errno) + ")");
#if defined(MADV_HUGEPAGE)
  madvise(memory, bytes_ * count_, MADV_HUGEPAGE);  // fewer pages to look up, for who copies and who multiplies
#endif
  memory_ = static_cast<std::byte*>(memory);
}

ExpertSlots::~ExpertSlots() { munmap(memory_, bytes_ * count_); }

std::string ExpertSlots::read(const ExpertLayer& layer, int64_t first, std::span<const int32_t> slots) {
  std::vector<iovec> to(slots.size());
  for (size_t i = 0; i < kExpertPieces; ++i) {
    const ExpertPiece& piece = layer.pieces[i];
    for (size_t n = 0; n < slots.size(); ++n) to[n] = {memory_ + bytes_ * slots[n] + layer.at(i), piece.size};
    const int64_t offset = piece.offset + first * static_cast<int64_t>(piece.size);
    if (std::string why = file_.read(offset, to); !why.empty()) return why;
  }
  return file_.changed();  // asked afterwards: what was read is what the file was opened with
}

ExpertPlaces ExpertSlots::at(const ExpertLayer& layer, int32_t slot) const {
  ExpertPlaces found;
  for (size_t i = 0; i < found.size(); ++i) found[i] = memory_ + bytes_ * slot + layer.at(i);
  return found;
}

}  // namespace rmse
