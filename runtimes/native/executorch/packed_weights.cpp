#include "packed_weights.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string_view>

#include <executorch/runtime/backend/options.h>

#include "../core/sha256.h"

namespace rmse {
namespace {

namespace fs = std::filesystem;

constexpr size_t kLongestPath = executorch::runtime::kMaxOptionValueLength - 1;
constexpr int kMostLinks = 40;  // as Linux
constexpr std::string_view kMagic = "CWPX";  // XNNPACK's, eight bytes before the end, in front of its version

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw std::runtime_error("--packed-weights: " + path + ": " + what);
}

// Where a path leads: a link stays, and what it leads to is made anew.
std::string behind_links(const std::string& path) {
  fs::path found = path;
  std::error_code failed;
  for (int links = 0; fs::is_symlink(found, failed); ++links) {
    if (links == kMostLinks) refuse(path, "is a loop of links; choose another name");
    found = found.parent_path() / fs::read_symlink(found, failed);
  }
  return found.string();
}

std::string seal_of(const std::string& path) { return behind_links(path + ".sha256"); }

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// While a process uses the file, its engine keeps it locked; others do without, as their engines would.
bool in_use(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  const bool locked = flock(file, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK;
  close(file);
  return locked;
}

// Whether it is empty or ends as the engine ends such files: then it may be removed.
bool made_by_engine(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (file.tellg() == 0) return true;
  char magic[kMagic.size()] = {};
  file.seekg(-8, std::ios::end).read(magic, sizeof magic);
  return std::string_view(magic, sizeof magic) == kMagic;
}

}  // namespace

PackedWeights::PackedWeights(const std::string& file, const std::string& program_digest)
    : path_(behind_links(file)), program_digest_(program_digest) {
  if (path_.empty()) return;
  if (path_.size() > kLongestPath) {
    refuse(path_, "the path is longer than the " + std::to_string(kLongestPath) +
                      " bytes that ExecuTorch takes; choose another");
  }
  for (const std::string& path : {path_, seal_of(path_)}) {
    if (fs::exists(path) && !fs::is_regular_file(path)) refuse(path, "is no file; choose another name");
  }
  const bool there = fs::exists(path_);
  if (there && in_use(path_)) {
    path_.clear();
    return;
  }
  fits_ = there && content(seal_of(path_)) == content_of_seal();
  if (!fits_) make_way();
}

// As sha256sum writes and checks it.
std::string PackedWeights::content_of_seal() const {
  const std::string name = fs::path(path_).filename().string();
  return "# weights of the program " + program_digest_ + "\n" + sha256_of_file(path_) + "  " + name + "\n";
}

void PackedWeights::make_way() const {
  if (fs::exists(path_) && !fs::exists(seal_of(path_)) && !made_by_engine(path_)) {
    refuse(path_, "holds something else than packed weights; remove it or choose another name");
  }
  // Removed, not overwritten: another process may just have mapped it.
  std::error_code failed;
  fs::remove(path_, failed);
  if (failed) refuse(path_, "cannot be removed, to make it anew (" + failed.message() + ")");
  // The engine would go on without a word, and pack the weights again at every launch.
  const int made = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (made < 0) refuse(path_, std::string("cannot be written (") + std::strerror(errno) + ")");
  close(made);
}

void PackedWeights::seal() const {
  if (fits_) return;
  // A launch that is interrupted, or cannot write, leaves no seal or one that does not fit: the next one starts anew.
  // The unfinished one has one name, so that those of killed launches do not pile up.
  const std::string seal = seal_of(path_), unfinished = seal + ".part";
  std::error_code failed;
  fs::remove(unfinished, failed);
  if ((std::ofstream(unfinished, std::ios::binary) << content_of_seal()).flush()) {
    fs::rename(unfinished, seal, failed);
  } else {
    failed = std::make_error_code(std::errc::io_error);
  }
  if (failed) fs::remove(unfinished, failed);
}

}  // namespace rmse
