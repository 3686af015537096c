// As many experts in memory as a budget allows, read from the program's file by threads that read ahead.
//
// What was not used for longest makes room (docs/offload.md has what else was tried). Experts of all layers share the slots. A call
// is given what is in memory first, while the rest is being read; the thread that computes reads itself rather than wait for a
// reader that has not begun. What the next loop may need is read when nothing else is. Neighbours in the file are read in one go.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <list>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "expert_slots.h"

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
  // `layers`: number their experts one after the other. `budget`: as of ExpertSlots. `spare`: processors that nothing is computed on.
  ExpertCache(const ExpertFile& file, std::vector<ExpertLayer> layers, int64_t budget, int64_t spare);
  ~ExpertCache();
  ExpertCache(const ExpertCache&) = delete;

  int64_t bytes() const;           // of all slots
  int64_t resident_bytes() const;  // of slots that hold an expert, or are about to

  // The experts that a call of a loop (-1: of none) needs, ascending. All that was wanted before has been given.
  void want(int64_t layer, int64_t loop, std::span<const int64_t> experts);
  // What may be needed of the same layer next, if there is room beside what is wanted.
  void expect(std::span<const int64_t> experts);
  struct Given {
    int64_t expert;
    ExpertPlaces pieces;
  };
  // Some of what is wanted, in memory until the next call of `next` or `want`; empty: there is no more, or it cannot be read.
  std::span<const Given> next();
  // Why it cannot, in one line; from then on nothing is given.
  std::string problem() const;

  ExpertFigures figures() const;
  void clear_figures();

 private:
  enum class State : uint8_t { kAbsent, kQueued, kGuessed, kLoading, kIdle, kInUse };
  struct Expert {
    int32_t slot = -1;
    State state = State::kAbsent;
    bool wanted = false;    // by this call, and not given yet
    bool ahead = false;     // was read on a guess, and not used so far
  };
  struct Slot {
    int64_t expert = -1;
    std::list<int32_t>::iterator place;  // in idle_ or busy_
  };
  // Neighbours of a layer that are to be read, with a slot each.
  struct Request {
    size_t layer = 0;
    int64_t first = 0;
    std::vector<int32_t> slots;
  };

  // Of expert e of the layer of this call.
  Expert& own(int64_t e) { return experts_[firsts_[layer_] + e]; }
  void use(Expert& expert);
  void rest(Expert& expert);  // the last to make room
  int32_t take_slot();  // of what was not used for longest
  Request take_request(bool reader);  // of no experts: there is nothing to read, or no room
  void load(const Request& request, std::unique_lock<std::mutex>& lock);
  void release_given();
  void run_reader();

  const ExpertFile& file_;
  ExpertSlots memory_;
  std::vector<ExpertLayer> layers_;
  std::vector<int64_t> firsts_;  // number of each layer's first expert

  mutable std::mutex mutex_;
  std::condition_variable work_, arrived_;
  std::vector<Expert> experts_;
  std::vector<Slot> slots_;
  std::list<int32_t> idle_, busy_;  // slots that make room, those without an expert first; slots that are read into or computed with
  size_t layer_ = 0;                // of this call; by their numbers in it:
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
