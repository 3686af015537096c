#include "expert_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>

namespace rmse {

ExpertFile::ExpertFile(const std::string& path) : path_(path), file_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (file_ < 0 || !stamp(opened_)) {
    const std::string reason = std::strerror(errno);
    if (file_ >= 0) close(file_);
    throw std::runtime_error(path + ": cannot be read (" + reason + ")");
  }
#if defined(POSIX_FADV_RANDOM)
  posix_fadvise(file_, 0, 0, POSIX_FADV_RANDOM);  // what lies beside an expert is another one
#endif
}

ExpertFile::~ExpertFile() { close(file_); }

bool ExpertFile::stamp(Stamp& found) const {
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

int64_t ExpertFile::offset_of(const void* address) const {
  std::error_code ignored;
  const std::string name = std::filesystem::canonical(path_, ignored).string();
  const auto at = reinterpret_cast<uintptr_t>(address);
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    uintptr_t start = 0, end = 0;
    uint64_t offset = 0;
    int rest = 0;  // where the name is
    const int found =
        std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %*s %" SCNx64 " %*s %*s %n", &start, &end, &offset, &rest);
    if (found == 3 && start <= at && at < end && line.compare(rest, line.npos, name) == 0) {
      return static_cast<int64_t>(offset + (at - start));
    }
  }
  return -1;
}

std::string ExpertFile::read(int64_t offset, size_t size, void* to) const {
  std::string problem;
  for (int attempt = 0; attempt < 2; ++attempt) {
    size_t done = 0;
    while (done < size) {
      const ssize_t count = pread(file_, static_cast<char*>(to) + done, size - done, offset + static_cast<int64_t>(done));
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) {
        problem = count == 0 ? "it ends before them" : std::strerror(errno);
        break;
      }
      done += static_cast<size_t>(count);
    }
    if (done == size) return changed();  // asked afterwards: what was read is what the file was opened with
  }
  if (const std::string why = changed(); !why.empty()) return why;
  return path_ + ": its experts cannot be read (" + problem + ")";
}

std::string ExpertFile::changed() const {
  Stamp now;
  if (stamp(now) && now == opened_) return {};
  return path_ + ": was written to while it was in use; export the package again";
}

}  // namespace rmse
