// Memory for as many experts as a budget allows, filled from the program's file by threads that read ahead.
//
// What was not used for longest makes room (docs/offload.md has what else was tried). Experts of all layers share the slots. A call
// is given what is in memory first, while the rest is being read; the thread that computes reads itself rather than wait for a
// reader that has not begun. What the next loop may need is read when nothing else is.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "expert_file.h"

namespace rmse {

// A piece of every expert of a layer: of expert e it lies `size` * e behind `offset`.
struct ExpertPiece {
  int64_t offset = 0;
  size_t size = 0;  // bytes
};

// The experts of a layer, in the order in which their pieces lie in a slot: codes and scales of gate and up, then of down.
struct ExpertLayer {
  int64_t experts = 0;
  std::array<ExpertPiece, 4> pieces;

  size_t at(size_t piece) const;              // where in a slot it begins
  size_t slot() const { return at(pieces.size()); }  // bytes
};

// Of everything since the figures were last cleared.
struct ExpertFigures {
  struct Loop {
    int64_t wanted = 0, found = 0;  // experts that calls needed, and of these those that were in memory
  };
  std::vector<Loop> loops;
  Loop outside;               // of the loop
  int64_t bytes_read = 0;     // also of what nobody needed
  int64_t stall_ns = 0;       // that computing waited for experts
  int64_t read_ahead = 0, used = 0, wasted = 0;  // experts that were guessed and read, were needed, had to go unused
};

class ExpertCache {
 public:
  static constexpr int64_t kReaders = 2;

  // `layers`: number their experts one after the other. At least one slot has to fit; throws std::runtime_error where there is no
  // memory for the slots.
  ExpertCache(const ExpertFile& file, std::vector<ExpertLayer> layers, int64_t budget);
  ~ExpertCache();
  ExpertCache(const ExpertCache&) = delete;

  static size_t slot_bytes(const std::vector<ExpertLayer>& layers);  // of the largest expert
  int64_t slots() const { return static_cast<int64_t>(slots_.size()); }
  int64_t resident_bytes() const;  // of slots that hold an expert, or are about to

  // The experts that a call of a loop (-1: of none) needs, ascending. What an earlier call did not take is forgotten.
  void want(int64_t layer, int64_t loop, std::span<const int64_t> experts);
  // What may be needed next, if there is room beside what is wanted.
  void expect(int64_t layer, std::span<const int64_t> experts);
  struct Given {
    int64_t expert;
    const std::byte* data;
  };
  // Some of what is wanted, in memory until the next call of `next` or `want`; empty: there is no more, or it cannot be read.
  std::span<const Given> next();
  // Why it cannot, in one line; from then on nothing is given.
  std::string problem() const;

  ExpertFigures figures() const;
  void clear_figures();

 private:
  enum class State : uint8_t { kAbsent, kQueued, kGuessed, kLoading, kReady };
  struct Expert {
    int32_t slot = -1;
    State state = State::kAbsent;
    bool wanted = false;    // by this call, and not given yet
    bool ahead = false;     // was read on a guess, and not used so far
  };
  struct Slot {
    int64_t expert = -1;
    int32_t before = -1, behind = -1;  // in the order of use, while it may be evicted
    bool listed = false;
  };
  static constexpr int32_t kNone = -1;

  std::byte* data(int32_t slot) const { return memory_ + static_cast<size_t>(slot) * slot_bytes_; }
  void append(int32_t slot);
  void unlist(int32_t slot);
  int32_t take_slot();              // free, or of what was not used for longest; kNone: all are in use
  int64_t take_request(bool guesses);  // an expert to be read, with a slot; -1: none
  void load(int64_t expert, std::unique_lock<std::mutex>& lock);
  std::string read(int64_t expert, std::byte* to) const;
  void release_given();
  void run_reader();

  const ExpertFile& file_;
  std::vector<ExpertLayer> layers_;
  std::vector<int64_t> firsts_;  // number of each layer's first expert, and of all
  size_t slot_bytes_;
  std::byte* memory_ = nullptr;
  size_t mapped_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable work_, arrived_;
  std::vector<Expert> experts_;
  std::vector<Slot> slots_;
  std::vector<int32_t> free_;
  int32_t oldest_ = kNone, newest_ = kNone;
  std::deque<int64_t> demand_, guesses_;
  std::vector<int64_t> ready_;  // wanted and in memory
  std::vector<Given> given_;
  int64_t wanted_ = 0, left_ = 0;  // of this call: how many, and how many were not given yet
  std::string problem_;
  ExpertFigures figures_;
  bool ending_ = false;
  std::vector<std::thread> readers_;
};

}  // namespace rmse
