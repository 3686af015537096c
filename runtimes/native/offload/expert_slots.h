// Memory that experts are copied into from their file, all of one size: the process's own, which the system cannot take back.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "expert_file.h"

namespace rmse {

// A piece of every expert of a layer: of expert e it lies `size` * e behind `offset`.
struct ExpertPiece {
  int64_t offset = 0;
  size_t size = 0;  // bytes
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

class ExpertSlots {
 public:
  // Memory of the largest expert.
  static size_t bytes_of(const std::vector<ExpertLayer>& layers);

  // As many as fit into `budget` bytes, which one has to, or one for each expert. Throws std::runtime_error where there is no memory.
  ExpertSlots(const ExpertFile& file, const std::vector<ExpertLayer>& layers, int64_t budget);
  ~ExpertSlots();
  ExpertSlots(const ExpertSlots&) = delete;

  size_t bytes() const { return bytes_; }  // of a slot
  int64_t count() const { return count_; }
  // Reads expert `first` and those behind it, each into its slot. Returns nothing, or in one line why that did not work.
  std::string read(const ExpertLayer& layer, int64_t first, std::span<const int32_t> slots);
  ExpertPlaces at(const ExpertLayer& layer, int32_t slot) const;

 private:
  const ExpertFile& file_;
  size_t bytes_;
  int64_t count_;
  std::byte* memory_;
};

}  // namespace rmse
