#include "file_parts.h"

#include <algorithm>

#include "fields.h"
#include "sha256.h"

namespace rmse {
namespace {

std::string digest(const Json& value) {
  const std::string& text = string(value);
  if (!is_digest(text)) unfit(value, "64 hexadecimal digits");
  return text;
}

std::vector<FilePart> file_parts(const Json& list) {
  std::vector<FilePart> parts;
  for (const Json& value : items(list)) {
    const Part part(value, std::string("[").append(std::to_string(parts.size())).append("]"));
    parts.push_back({part.at("bytes", whole(1, kMany)), part.at("sha256", digest), part.at("weights", truth, false)});
  }
  return parts;
}

}  // namespace

bool is_digest(const std::string& text) {
  constexpr size_t kDigits = 64;
  return text.size() == kDigits && text.find_first_not_of("0123456789abcdef") == text.npos;
}

int64_t FileParts::bytes() const {
  int64_t sum = 0;
  for (const FilePart& part : parts) sum = std::min(kMany, sum + part.bytes);
  return sum;
}

std::string FileParts::digest_of_parts() const {
  std::string digests;
  for (const FilePart& part : parts) digests += part.digest;
  return sha256(digests);
}

std::map<std::string, FileParts> read_parts(const Json& manifest) {
  std::map<std::string, FileParts> files;
  const Json* found = find(manifest, "parts");
  if (found == nullptr) return files;
  const Part all(*found, "parts");
  for (const std::string& name : all.names()) {
    const Part file = all.part(name);
    files[name] = {file.at("sha256", digest), file.at("parts", file_parts)};
  }
  return files;
}

}  // namespace rmse
