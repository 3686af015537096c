// A package: the folder NAME.rmse/ whose SHA256SUMS lists every other file with its SHA-256, manifest.json included.
//
// What an engine parses is checked before it sees a byte: some end the process over damaged files. Where the manifest has the
// hashes of a file's parts, the weights in it are checked beside the work that follows (verification.h); whoever lets out what was
// computed with them waits for `verification` before, as `Model` does.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "file_parts.h"
#include "info.h"
#include "verification.h"

namespace rmse {

class Package {
 public:
  // Throws std::runtime_error: one line saying what is wrong with which file, and what to do.
  // `target`: what it must have been made for.
  static Package open(const std::string& folder, const std::string& target);

  const std::string& folder() const { return folder_; }
  const ModelInfo& info() const { return info_; }
  uint64_t nbytes() const { return nbytes_; }              // of all files
  const std::string& program() const { return program_; }  // path of the engine's file
  const std::string& program_digest() const { return program_digest_; }  // SHA-256 of it, or of those of its parts
  const std::shared_ptr<Verification>& verification() const { return verification_; }
  bool holds(const std::string& name) const { return digests_.contains(name); }
  std::string path(const std::string& name) const;         // of a listed file; std::runtime_error where it is none

 private:
  void read_sums();
  void check_files(const std::map<std::string, int64_t>& sizes, const std::map<std::string, FileParts>& parts);

  std::string folder_;
  std::map<std::string, std::string> digests_;  // SHA-256 of every file but SHA256SUMS, by its name
  ModelInfo info_;
  uint64_t nbytes_ = 0;
  std::string program_, program_digest_;
  std::shared_ptr<Verification> verification_ = std::make_shared<Verification>();
};

}  // namespace rmse
