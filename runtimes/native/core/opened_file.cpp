#include "opened_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace rmse {

OpenedFile::OpenedFile(const std::string& path) : path_(path), file_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (file_ < 0 || !stamp(opened_)) {
    const std::string reason = std::strerror(errno);
    if (file_ >= 0) close(file_);
    throw std::runtime_error(path + ": cannot be read (" + reason + ")");
  }
}

OpenedFile::~OpenedFile() { close(file_); }

bool OpenedFile::stamp(Stamp& found) const {
  struct stat status;
  if (fstat(file_, &status) != 0) return false;
  const auto nanoseconds = [](const timespec& time) { return time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec; };
#if defined(__APPLE__)
  found = {status.st_size, nanoseconds(status.st_mtimespec), nanoseconds(status.st_ctimespec)};
#else
  found = {status.st_size, nanoseconds(status.st_mtim), nanoseconds(status.st_ctim)};
#endif
  return true;
}

std::string OpenedFile::read(int64_t offset, std::span<const iovec> to) const {
  std::vector<iovec> left(to.begin(), to.end());
  for (size_t next = 0; next < left.size();) {  // that is not full yet
    ssize_t count = preadv(file_, left.data() + next, static_cast<int>(left.size() - next), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return std::strerror(errno);
    if (count == 0) return "it ends before them";
    offset += count;
    for (; next < left.size() && static_cast<size_t>(count) >= left[next].iov_len; ++next) {
      count -= static_cast<ssize_t>(left[next].iov_len);
    }
    if (next < left.size()) {
      left[next].iov_base = static_cast<char*>(left[next].iov_base) + count;
      left[next].iov_len -= static_cast<size_t>(count);
    }
  }
  return {};
}

std::string OpenedFile::written_to() const {
  Stamp now;
  if (stamp(now) && now.size == opened_.size && now.modified == opened_.modified) return {};
  return complaint();
}

std::string OpenedFile::changed() const {
  Stamp now;
  if (stamp(now) && now == opened_) return {};
  return complaint();
}

std::string OpenedFile::complaint() const { return path_ + ": was written to while it was in use; export the package again"; }

}  // namespace rmse
