// The parts of large files that a manifest has hashes of, under "parts", beside those of whole files in SHA256SUMS; as
// rmse_edge/parts.py writes them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "json.h"

namespace rmse {

// A piece of a file; it begins where the one before ends.
struct FilePart {
  int64_t bytes = 0;
  std::string digest;    // SHA-256, hexadecimal
  bool weights = false;  // it holds nothing but codes and scales of quantised weights
};

// All of a file.
struct FileParts {
  std::string digest;  // of the whole
  std::vector<FilePart> parts;

  int64_t bytes() const;
  std::string digest_of_parts() const;  // of their digests: what a file is known by that was verified part by part
};

bool is_digest(const std::string& text);

// By the names of the files; none where the manifest has no parts. Throws JsonError naming the field that does not fit.
std::map<std::string, FileParts> read_parts(const Json& manifest);

}  // namespace rmse
