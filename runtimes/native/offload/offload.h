// A program whose experts are kept within a budget: what stands between the experts' operator and the cache.
//
// The operator knows an expert by where the engine has mapped it, and so that is how a program's layers are found: while `trial`
// runs, one token passes through the model, and every call says where its experts lie. No experts are computed then. `begin` makes
// the cache. From then on the mapped experts are not touched any more, and what was mapped of them is given back.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "../kernels/experts.h"
#include "budget.h"
#include "expert_cache.h"
#include "expert_file.h"
#include "forecast.h"

namespace rmse {

class Offload {
 public:
  // The trial begins. Throws std::runtime_error where the file cannot be read.
  explicit Offload(const std::string& program);
  ~Offload();
  Offload(const Offload&) = delete;

  // The trial is over. Throws ArgumentError where no experts were seen, or not one fits; std::runtime_error, one line, where the
  // file cannot be read.
  void begin(const ExpertBudget& budget);

  // Which loop the next call is of; -1: it is outside of the loop.
  void set_loop(int64_t loop) { loop_ = loop; }
  std::string problem() const;

  int64_t total_bytes() const;  // of all experts
  int64_t budget_bytes() const; // that slots may take
  // Figures as a JSON object; docs/offload.md says what they mean.
  std::string figures() const;
  void clear_figures();

  // What the operator asks with, where the first expert's codes of gate and up, their scales, and those of down lie.
  struct Mapped {
    std::array<const void*, 4> pieces;
    std::array<size_t, 4> sizes;  // bytes of an expert's
  };
  // The experts of a call; null: they are to be read where they are mapped. `skip`: nothing is to be computed, since the trial
  // is running, or reading failed (`failed`).
  struct Call {
    ExpertSource* source = nullptr;
    bool skip = false, failed = false;
  };
  static Call call(const ExpertShape& shape, const Mapped& mapped, const float* scores, const bool* active);

 private:
  class Source;
  struct Layer;

  Layer* layer_of(const Mapped& mapped, const ExpertShape& shape);

  ExpertFile file_;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::unique_ptr<ExpertCache> cache_;  // null: the trial is running
  std::string problem_;
  int64_t loop_ = -1;
};

}  // namespace rmse
