#include "expert_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <vector>

namespace rmse {
namespace {

#if defined(__linux__)
constexpr int kPopulateRead = 22;  // of linux/mman.h since 5.14; older headers lack it
constexpr size_t kAnnounced = 512 << 10;  // bytes that a system begins to read at once; of more it would leave out the rest
#endif

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

ExpertFile::ExpertFile(const std::string& path) : file_(path) {
#if defined(POSIX_FADV_RANDOM)
  posix_fadvise(file_.descriptor(), 0, 0, POSIX_FADV_RANDOM);  // what lies beside an expert is another one
#endif
}

ExpertFile::~ExpertFile() {
  if (self_ >= 0) close(self_);
  if (mapped_ != nullptr) munmap(mapped_, static_cast<size_t>(file_.size()));
}

int64_t ExpertFile::offset_of(const void* address) const {
  std::error_code ignored;
  const std::string name = std::filesystem::canonical(path(), ignored).string();
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

std::string ExpertFile::cannot_read(const std::string& problem) const {
  if (std::string why = changed(); !why.empty()) return why;
  return path() + ": its experts cannot be read (" + problem + ")";
}

std::string ExpertFile::read(int64_t offset, std::span<const iovec> to) const {
  std::string problem;
  for (int attempt = 0; attempt < 2; ++attempt) {
    problem = file_.read(offset, to);
    if (problem.empty()) return {};
  }
  return cannot_read(problem);
}

bool ExpertFile::map() {
#if defined(__linux__)
  void* found = mmap(nullptr, static_cast<size_t>(file_.size()), PROT_READ, MAP_SHARED, file_.descriptor(), 0);
  if (found == MAP_FAILED) return false;
  mapped_ = static_cast<std::byte*>(found);
#if defined(SYS_pidfd_open) && defined(SYS_process_madvise)
  self_ = static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0));
#endif
  if (madvise(mapped_, page_bytes(), kPopulateRead) == 0) return true;
  munmap(mapped_, static_cast<size_t>(file_.size()));
  mapped_ = nullptr;
#endif
  return false;
}

std::span<std::byte> ExpertFile::pages(int64_t offset, size_t size) const {
  const size_t page = page_bytes(), first = static_cast<size_t>(offset) / page * page;
  const size_t last = (static_cast<size_t>(offset) + size + page - 1) / page * page;
  return {mapped_ + first, last - first};
}

void ExpertFile::announce([[maybe_unused]] int64_t offset, [[maybe_unused]] size_t size) const {
#if defined(__linux__)
  for (size_t done = 0; done < size; done += kAnnounced) {
    posix_fadvise(file_.descriptor(), offset + static_cast<int64_t>(done), static_cast<off_t>(std::min(kAnnounced, size - done)),
                  POSIX_FADV_WILLNEED);
  }
#endif
}

std::string ExpertFile::bring([[maybe_unused]] int64_t offset, [[maybe_unused]] size_t size) const {
#if defined(__linux__)
  const std::span<std::byte> part = pages(offset, size);
  for (int attempt = 0; attempt < 2;) {
    if (madvise(part.data(), part.size(), kPopulateRead) == 0) return {};
    if (errno != EINTR) ++attempt;
  }
  return cannot_read(errno == EFAULT ? "Input/output error" : std::strerror(errno));  // EFAULT: touching it would be a signal
#else
  return cannot_read("not mapped");
#endif
}

void ExpertFile::drop([[maybe_unused]] std::span<const std::span<std::byte>> parts) const {
#if defined(__linux__)
  // Whenever pages go, every processor that runs this process forgets where all its memory is: once a call is enough.
  std::vector<iovec> all;
  for (const auto& part : parts) all.push_back({part.data(), part.size()});
  size_t done = 0;  // parts
#if defined(SYS_process_madvise)
  if (self_ >= 0) {
    ssize_t bytes = syscall(SYS_process_madvise, self_, all.data(), all.size(), MADV_DONTNEED, 0);
    for (; done < all.size() && bytes >= static_cast<ssize_t>(all[done].iov_len); ++done) bytes -= static_cast<ssize_t>(all[done].iov_len);
  }
#endif
  for (; done < all.size(); ++done) madvise(all[done].iov_base, all[done].iov_len, MADV_DONTNEED);
#endif
}

}  // namespace rmse
