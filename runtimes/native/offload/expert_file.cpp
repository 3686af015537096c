#include "expert_file.h"

#include <fcntl.h>

#include <cinttypes>
#include <cstdio>
#include <filesystem>
#include <fstream>

namespace rmse {

ExpertFile::ExpertFile(const std::string& path) : file_(path) {
#if defined(POSIX_FADV_RANDOM)
  posix_fadvise(file_.descriptor(), 0, 0, POSIX_FADV_RANDOM);  // what lies beside an expert is another one
#endif
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

std::string ExpertFile::read(int64_t offset, std::span<const iovec> to) const {
  std::string problem;
  for (int attempt = 0; attempt < 2; ++attempt) {
    problem = file_.read(offset, to);
    if (problem.empty()) return {};
  }
  if (std::string why = changed(); !why.empty()) return why;
  return path() + ": its experts cannot be read (" + problem + ")";
}

}  // namespace rmse
