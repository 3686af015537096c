// As many experts in memory as a budget allows, brought there from the program's file by threads that read ahead.
//
// What was not used for longest makes room (docs/offload.md has what else was tried). Experts of all layers share the slots. A call
// is given what is in memory first, while the rest is being read; the thread that computes reads itself rather than wait for a
// reader that has not begun. What the next loop may need is read when nothing else is, if reading takes long enough to be worth it.
// Neighbours in the file are read in one go.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "expert_store.h"

namespace rmse {

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
  // `layers`: number their experts one after the other. At least one slot has to fit. `spare`: processors that nothing is computed on.
  ExpertCache(ExpertStore& store, const ExpertFile& file, std::vector<ExpertLayer> layers, int64_t budget, int64_t spare);
  ~ExpertCache();
  ExpertCache(const ExpertCache&) = delete;

  int64_t slots() const { return static_cast<int64_t>(slots_.size()); }
  int64_t resident_bytes() const;  // of slots that hold an expert, or are about to

  // The experts that a call of a loop (-1: of none) needs, ascending. What an earlier call did not take is forgotten.
  void want(int64_t layer, int64_t loop, std::span<const int64_t> experts);
  // What may be needed next, if there is room beside what is wanted.
  void expect(int64_t layer, std::span<const int64_t> experts);
  struct Given {
    int64_t expert;
    ExpertPlaces pieces;
  };
  // Some of what is wanted, in memory until the next call of `next` or `want`; empty: there is no more, or it cannot be read.
  std::span<const Given> next();
  // Whether what was given since `want` was right until now: nobody has written to the file.
  bool still_right();
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
  // Experts of a layer that are to be brought, with a slot each, and what has to go for them.
  struct Request {
    size_t layer = 0;
    std::vector<int64_t> experts;
    std::vector<int32_t> slots;
    std::vector<StoredExpert> gone;

    explicit operator bool() const { return !slots.empty(); }
  };

  int64_t most_given() const;
  size_t layer_of(int64_t expert) const;
  StoredExpert stored(int64_t expert) const;
  void announce(const std::deque<int64_t>& experts) const;
  void append(int32_t slot);
  void unlist(int32_t slot);
  int32_t take_slot(std::vector<StoredExpert>& gone);  // free, or of what was not used for longest; kNone: all are in use
  Request take_request(bool reader);
  void load(const Request& request, std::unique_lock<std::mutex>& lock);
  std::string bring(const Request& request);
  void release_given();
  void run_reader();

  ExpertStore& store_;
  const bool maps_;
  const ExpertFile& file_;
  std::vector<ExpertLayer> layers_;
  std::vector<int64_t> firsts_;  // number of each layer's first expert, and of all

  mutable std::mutex mutex_;
  std::condition_variable work_, arrived_;
  std::vector<Expert> experts_;
  std::vector<Slot> slots_;
  std::vector<int32_t> free_;
  int32_t oldest_ = kNone, newest_ = kNone;
  std::deque<int64_t> demand_, guesses_;
  std::vector<int64_t> ready_;  // wanted and in memory
  std::vector<Given> given_;
  std::vector<int32_t> given_slots_;
  int64_t wanted_ = 0, left_ = 0;  // of this call: how many, and how many were not given yet
  int64_t slow_;  // experts that are taken to be on the disk, not in the system's cache
  std::string problem_;
  ExpertFigures figures_;
  bool ending_ = false;
  std::vector<std::thread> readers_;
};

}  // namespace rmse
