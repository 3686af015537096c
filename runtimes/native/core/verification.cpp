#include "verification.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <utility>

#include "sha256.h"

namespace rmse {
namespace {

constexpr size_t kMostThreads = 8;  // they read faster than disks do

// That this process may run on.
size_t cores() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return static_cast<size_t>(CPU_COUNT(&allowed));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// What is read of a part.
class PartReader {
 public:
  PartReader(const OpenedFile& file, int64_t offset, const FilePart& part)
      : file_(file), part_(part), at_(offset), end_(offset + part.bytes) {}

  size_t operator()(char* to, size_t most) {
    const size_t size = std::min(most, static_cast<size_t>(end_ - at_));
    if (size == 0 || !unread_.empty()) return 0;
    const iovec piece[] = {{to, size}};
    unread_ = file_.read(at_, piece);
    at_ += static_cast<int64_t>(size);
    return unread_.empty() ? size : 0;
  }

  // Nothing, or a line about the file.
  std::string problem(const std::string& digest) const {
    if (!unread_.empty()) return file_.path() + ": cannot be read to its end (" + unread_ + ")";
    if (digest == part_.digest) return {};
    return file_.path() + ": its SHA-256 is not that in SHA256SUMS; the file is damaged, export again";
  }

 private:
  const OpenedFile& file_;
  const FilePart& part_;
  int64_t at_, end_;
  std::string unread_;  // why
};

}  // namespace

Verification::~Verification() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
}

void Verification::add(const std::string& path, const std::vector<FilePart>& parts) {
  const OpenedFile& file = files_.emplace_back(path);
  int64_t offset = 0;
  for (const FilePart& part : parts) {
    tasks_.push_back({&file, offset, part});
    offset += part.bytes;
  }
}

void Verification::start() {
  const auto weights = std::stable_partition(tasks_.begin(), tasks_.end(), [](const Task& task) { return !task.part.weights; });
  program_ = static_cast<size_t>(weights - tasks_.begin());
  const size_t count = std::min({cores() - 1, kMostThreads, tasks_.size()});
  for (size_t i = 0; i < count; ++i) threads_.emplace_back([this] { run(); });
}

// Some of the first `count`, of which there are; `lock` is let go of meanwhile.
void Verification::check_next(size_t count, std::unique_lock<std::mutex>& lock) {
  const size_t first = next_, taken = std::min<size_t>(2, count - first);  // two take little longer than one
  next_ += taken;
  lock.unlock();
  const auto reader = [&](size_t i) { return PartReader(*tasks_[i].file, tasks_[i].offset, tasks_[i].part); };
  PartReader one = reader(first), other = reader(first + taken - 1);
  std::string problem;
  if (taken == 1) {
    problem = one.problem(sha256_of_pieces(std::ref(one)));
  } else {
    const auto digests = sha256_of_two(std::ref(one), std::ref(other));
    problem = one.problem(digests[0]);
    if (problem.empty()) problem = other.problem(digests[1]);
  }
  lock.lock();
  if (problem_.empty()) problem_ = std::move(problem);
  (first < program_ ? program_checked_ : weights_checked_) += taken;
  checked_.notify_all();
}

void Verification::run() {
  std::unique_lock lock(mutex_);
  while (!ending_ && problem_.empty() && next_ < tasks_.size()) {
    check_next(next_ < program_ ? program_ : tasks_.size(), lock);
  }
}

void Verification::await(size_t count) {
  std::unique_lock lock(mutex_);
  const auto left = [&] { return program_checked_ + (count > program_ ? weights_checked_ : 0) < count; };
  while (problem_.empty() && left()) {
    if (next_ < count) {
      check_next(next_ < program_ ? program_ : count, lock);
    } else {
      checked_.wait(lock);
    }
  }
  if (!problem_.empty()) throw std::runtime_error(problem_);
}

void Verification::await() {
  std::call_once(verified_, [&] {
    await(tasks_.size());
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    for (const OpenedFile& file : files_) {
      if (std::string why = file.written_to(); !why.empty()) throw std::runtime_error(why);
    }
  });
}

}  // namespace rmse
