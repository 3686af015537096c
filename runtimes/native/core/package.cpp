#include "package.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string_view>

#include "json.h"
#include "sha256.h"
#include "text.h"

namespace rmse {
namespace {

namespace fs = std::filesystem;

constexpr char kFormat[] = "rmse-edge package";
constexpr int64_t kFormatVersion = 2;
constexpr char kManifest[] = "manifest.json";
constexpr char kSums[] = "SHA256SUMS";
constexpr size_t kDigits = 64;  // of a hash

constexpr size_t kLargestText = 16 << 20;  // bytes of the manifest, of the list of hashes

[[noreturn]] void refuse(const fs::path& path, const std::string& what) {
  throw std::runtime_error(path.string() + ": " + what);
}

[[noreturn]] void damaged(const fs::path& path) {
  refuse(path, std::string("its SHA-256 is not that in ") + kSums + "; the file is damaged, export again");
}

// ------------------------------------------------------------------------------------------------ checking files

std::set<std::string> files_in(const fs::path& folder) {
  std::set<std::string> found;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder)) {
    if (!entry.is_directory()) found.insert(entry.path().lexically_relative(folder).generic_string());
  }
  found.erase(kSums);
  return found;
}

// Of a file that is read whole.
void check_size(const fs::path& path) {
  if (fs::file_size(path) <= kLargestText) return;
  refuse(path, "larger than 16 MiB, which no such file is; export the package again");
}

// Of any version: an older one had no SHA256SUMS, and is to be refused as what it is.
Json read_manifest(const fs::path& path) {
  if (!fs::is_regular_file(path)) refuse(path, "missing; " + path.parent_path().string() + " is not a package");
  check_size(path);
  Json manifest;
  try {
    manifest = parse_json(read_file(path.string()));
  } catch (const JsonError& error) {
    refuse(path, std::string("not readable as JSON (") + error.what() + "); export the package again");
  }
  const Json* format = find(manifest, "format");
  if (format == nullptr || *format != kFormat) refuse(path, std::string("not the manifest of an ") + kFormat);
  const Json* version = find(manifest, "format_version");
  if (version == nullptr || *version != kFormatVersion) {
    refuse(path, "format version " + (version == nullptr ? "None" : dump(*version).substr(0, 80)) + ", this runner reads " +
                     std::to_string(kFormatVersion) + "; export the package again with this version");
  }
  return manifest;
}

// A zip of a package, as `rmse-export --archive` writes it.
bool is_archive(const fs::path& path) {
  char first[4] = {};
  return fs::is_regular_file(path) && std::ifstream(path, std::ios::binary).read(first, sizeof first) &&
         std::string_view(first, sizeof first) == std::string_view("PK\x03\x04", 4);
}

std::map<std::string, int64_t> file_sizes(const Json& manifest) {
  std::map<std::string, int64_t> sizes;
  for (const auto& [name, size] : members(member(manifest, "sizes"))) {
    try {
      sizes[name] = integer(size);
    } catch (const JsonError& error) {
      throw JsonError("sizes." + name.substr(0, 200) + ": " + error.what());
    }
  }
  return sizes;
}

}  // namespace

// --------------------------------------------------------------------------------------------------------- package

Package Package::open(const std::string& folder, const std::string& target) {
  if (is_archive(folder)) refuse(folder, "is an archive; unpack it into a folder: unzip NAME.rmse.zip -d NAME.rmse");
  if (!fs::is_directory(folder)) {
    refuse(folder, std::string(fs::exists(folder) ? "is no folder, expected a package folder" : "no such package folder") +
                       "; make one with rmse-export");
  }
  Package package;
  package.folder_ = folder;
  const fs::path path = fs::path(folder) / kManifest;
  const Json manifest = read_manifest(path);
  package.read_sums();
  if (sha256_of_file(path.string()) != package.digests_.at(kManifest)) {
    refuse(path, std::string("was edited after the export (its SHA-256 is not that in ") + kSums + "); export again");
  }
  try {
    const std::map<std::string, FileParts> parts = read_parts(manifest);
    package.check_files(file_sizes(manifest), parts);
    const std::string& own = string(member(manifest, "target"));
    if (own != target) refuse(folder, "made for " + own + "; this runner takes packages made for " + target);
    package.info_ = read_model(manifest);
    const std::string& program = string(member(member(manifest, "lowering"), "program"));
    package.program_ = package.path(program);
    package.program_digest_ = package.digests_.at(program);
    if (const auto found = parts.find(program); found != parts.end()) package.program_digest_ = found->second.digest_of_parts();
    package.verification_->await_program();
  } catch (const JsonError& error) {
    refuse(path, std::string(error.what()) + "; export the package again");
  }
  return package;
}

// Hashes by the names of their files, as coreutils' sha256sum writes and checks them.
void Package::read_sums() {
  const fs::path path = fs::path(folder_) / kSums;
  if (!fs::is_regular_file(path)) refuse(path, "missing from the package; export it again");
  check_size(path);
  const std::string text = read_file(path.string());
  const size_t invalid = find_invalid_utf8(text);
  if (invalid != text.npos) {
    refuse(path, "not a list of hashes (not UTF-8 at byte " + std::to_string(invalid) + "); export the package again");
  }
  const auto fail = [&](int64_t number, const char* what) {
    refuse(path, "line " + std::to_string(number) + ": " + what + "; export the package again");
  };
  int64_t number = 1;
  for (size_t start = 0; start < text.size(); ++number) {
    const size_t end = std::min(text.find('\n', start), text.size());
    const std::string line = text.substr(start, end - start), digest = line.substr(0, kDigits);
    const std::string name = line.size() > kDigits + 2 ? line.substr(kDigits + 2) : "";
    const bool separated = !name.empty() && line[kDigits] == ' ' && (line[kDigits + 1] == ' ' || line[kDigits + 1] == '*');
    const bool printable = std::none_of(name.begin(), name.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
    if (!separated || !printable || !is_digest(digest)) {
      fail(number, "no hash and name of a file");
    }
    if (!digests_.emplace(name, digest).second) fail(number, "the same file again");
    start = end + 1;
  }
  if (!digests_.contains(kManifest)) refuse(path, std::string("lists no ") + kManifest + "; export the package again");
}

void Package::check_files(const std::map<std::string, int64_t>& sizes,
                          const std::map<std::string, FileParts>& parts) {
  const fs::path folder = folder_;
  const std::set<std::string> present = files_in(folder);
  for (const auto& [name, _] : digests_) {
    if (!present.contains(name)) refuse(folder / name, "missing from the package; export it again");
  }
  for (const std::string& name : present) {
    if (digests_.contains(name)) continue;
    refuse(folder / name, std::string("not listed in the package's ") + kSums + "; remove it or export again");
  }
  nbytes_ = fs::file_size(folder / kSums);
  for (const auto& [name, _] : parts) {
    if (!digests_.contains(name)) throw JsonError("parts." + name + ": got a file that is not in the package");
  }
  for (const auto& [name, digest] : digests_) {
    const fs::path path = folder / name;
    if (!fs::is_regular_file(path)) refuse(path, "is no file; export the package again");  // a link to nowhere, a pipe
    const auto size = static_cast<int64_t>(fs::file_size(path));
    const auto expected = sizes.find(name);
    if (expected != sizes.end() && expected->second != size) {  // known at once, and says more than a hash that differs
      refuse(path, std::to_string(size) + " bytes, the manifest says " + std::to_string(expected->second) +
                       (size < expected->second ? "; truncated? export again" : "; written to since? export again"));
    }
    nbytes_ += size;
    const auto found = parts.find(name);
    if (found == parts.end()) continue;
    if (const int64_t bytes = found->second.bytes(); bytes != size) {
      throw JsonError("parts." + name + ".parts: got " + std::to_string(bytes) + " bytes in all, expected " + std::to_string(size));
    }
    if (found->second.digest != digest) damaged(path);
    verification_->add(path.string(), found->second.parts);
  }
  verification_->start();
  for (const auto& [name, digest] : digests_) {
    const fs::path path = folder / name;
    if (!parts.contains(name) && sha256_of_file(path.string()) != digest) damaged(path);
  }
}

std::string Package::path(const std::string& name) const {
  if (!digests_.contains(name)) refuse(folder_, "the package holds no " + name + "; export it again");
  return (fs::path(folder_) / name).string();
}

}  // namespace rmse
