// Checks files part by part, on threads of its own beside the work that needs them.
//
// A program is verified in two steps. What an engine parses, follows or indexes by is verified before the engine sees it. Weights
// are only multiplied with: any bytes of theirs give numbers, so work may begin before they are verified, as long as nothing that
// came of it leaves the process before `await`. Whoever waits takes parts himself: on one core there are no threads.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "file_parts.h"
#include "opened_file.h"

namespace rmse {

class Verification {
 public:
  Verification() = default;
  ~Verification();  // leaves undone what nobody waited for
  Verification(const Verification&) = delete;

  // A file and all of its parts. Throws std::runtime_error where it cannot be opened.
  void add(const std::string& path, const std::vector<FilePart>& parts);
  // No more files: threads begin.
  void start();

  // Until all that is not weights is verified. Throws std::runtime_error: the line about a file that is damaged.
  void await_program() { await(program_); }
  // Until everything is, and no file was written to since it was added; later calls cost nothing.
  void await();

 private:
  struct Task {
    const OpenedFile* file;
    int64_t offset;
    FilePart part;
  };

  void await(size_t count);
  void check_next(size_t count, std::unique_lock<std::mutex>& lock);
  void run();

  std::deque<OpenedFile> files_;
  std::vector<Task> tasks_;  // weights come last
  size_t program_ = 0;       // how many are not weights

  std::mutex mutex_;
  std::condition_variable checked_;
  size_t next_ = 0, program_checked_ = 0, weights_checked_ = 0;
  std::string problem_;
  bool ending_ = false;
  std::once_flag verified_;
  std::vector<std::thread> threads_;
};

}  // namespace rmse
