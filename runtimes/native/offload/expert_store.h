// Where experts are while they count as in memory: copied into slots, or on mapped pages of their file.
//
// Mapped pages cost no copy of what the system has cached already. Slots are memory that the system does not take back when it
// runs short; they are for when it will, for small experts, of which several would share a page, and for systems that cannot say
// why a mapped page is not there (docs/offload.md has what both cost).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "budget.h"
#include "expert_file.h"

namespace rmse {

// A piece of every expert of a layer: of expert e it lies `size` * e behind `offset`.
struct ExpertPiece {
  int64_t offset = 0;
  size_t size = 0;  // bytes

  int64_t of(int64_t expert) const { return offset + expert * static_cast<int64_t>(size); }
};

constexpr size_t kExpertPieces = 4;

// The experts of a layer: codes and scales of gate and up, then of down.
struct ExpertLayer {
  int64_t experts = 0;
  std::array<ExpertPiece, kExpertPieces> pieces;

  size_t at(size_t piece) const;                     // where in a slot it begins
  size_t bytes() const { return at(kExpertPieces); }  // of a slot
};

using ExpertPlaces = std::array<const std::byte*, kExpertPieces>;

struct StoredExpert {
  const ExpertLayer* layer;
  int64_t expert;
};

class ExpertStore {
 public:
  virtual ~ExpertStore() = default;

  size_t slot_bytes() const { return slot_bytes_; }  // memory of the largest expert
  // Whether who needs an expert brings it sooner than another thread would: nothing is copied.
  virtual bool maps() const = 0;
  // Once, before anything else: so many slots. Throws std::runtime_error where there is no memory for them.
  virtual void reserve(int64_t slots) = 0;
  // The system begins to read an expert, and nobody waits.
  virtual void announce(StoredExpert expert) const = 0;
  // Experts `first` and those behind it come into memory, each in its slot. Returns nothing, or in one line why they cannot.
  virtual std::string bring(const ExpertLayer& layer, int64_t first, std::span<const int32_t> slots) = 0;
  // How often this thread had to wait so far: for a disk, mostly.
  virtual int64_t waits() const = 0;
  // Experts leave memory, and with them what neighbours have on the same pages, until that is touched again.
  virtual void drop(std::span<const StoredExpert> experts) = 0;
  virtual ExpertPlaces at(const ExpertLayer& layer, int64_t expert, int32_t slot) const = 0;

 protected:
  explicit ExpertStore(size_t slot_bytes) : slot_bytes_(slot_bytes) {}

  size_t slot_bytes_;
};

// `access`: as it suits the experts and the memory there is, or one of the two; they are read where the system cannot map them.
std::unique_ptr<ExpertStore> open_store(ExpertFile& file, const std::vector<ExpertLayer>& layers, ExpertAccess access);

}  // namespace rmse
