#include "package.h"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <iterator>
#include <set>
#include <stdexcept>

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

// What a manifest may ask for at most, as in rmse_edge/schema.py, config.py and runtimes/host/signatures.py: one with more is not
// to be believed, and nothing is allocated by it.
constexpr size_t kLargestText = 16 << 20;       // bytes of the manifest, of the list of hashes
constexpr int64_t kLargest = INT32_MAX;         // of sizes and counts
constexpr int64_t kLargestTensor = 2LL << 30;   // bytes
constexpr int64_t kLargestState = 4LL << 30;    // bytes kept between calls
constexpr int64_t kMostLoops = 64;
constexpr int64_t kLargestWidth = 1 << 16;
constexpr int64_t kLargestVocabulary = 1 << 22;
constexpr int64_t kLargestWindow = 1 << 24;
constexpr size_t kLongestName = 200;

[[noreturn]] void refuse(const fs::path& path, const std::string& what) {
  throw std::runtime_error(path.string() + ": " + what);
}

// ------------------------------------------------------------------------------------------- reading the manifest

TensorSpec tensor(const std::string& name, const Json& shape, const Json& type) {
  const std::optional<Dtype> dtype = type.is_string() ? dtype_of(string(type)) : std::nullopt;
  if (!dtype) throw JsonError(name + ": a tensor of " + dump(type));
  if (name.empty() || name.size() > kLongestName) throw JsonError("a tensor's name of " + std::to_string(name.size()) + " bytes");
  TensorSpec spec{name, *dtype, {}};
  const int64_t largest = kLargestTensor / static_cast<int64_t>(nbytes_of(*dtype));
  int64_t elements = 1;
  if (items(shape).size() > 8) throw JsonError(name + ": a tensor of shape " + dump(shape).substr(0, 80));
  for (const Json& size : items(shape)) {
    const int64_t n = integer(size);
    if (n < 1 || n > largest / elements) throw JsonError(name + ": a tensor of shape " + dump(shape));
    elements *= n;
    spec.shape.push_back(static_cast<int32_t>(n));
  }
  return spec;
}

std::vector<TensorSpec> tensors(const Json& list) {
  std::vector<TensorSpec> specs;
  for (const Json& t : items(list)) {
    specs.push_back(tensor(string(member(t, "name")), member(t, "shape"), member(t, "dtype")));
  }
  return specs;
}

// {name: [shape, type]}: state and memory.
std::vector<TensorSpec> kept_tensors(const Json& kept) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, value] : members(kept)) {
    const auto& pair = items(value);
    if (pair.size() != 2) throw JsonError(name + ": got " + dump(value) + ", expected a shape and a type");
    specs.push_back(tensor(name, pair[0], pair[1]));
  }
  return specs;
}

int64_t count(const Json& object, const char* key, int64_t least = 1, int64_t most = kLargest) {
  const int64_t value = integer(member(object, key));
  if (value < least || value > most) {
    throw JsonError(std::string(key) + ": got " + std::to_string(value) + ", expected " + std::to_string(least) + " to " +
                    std::to_string(most));
  }
  return value;
}

std::optional<int64_t> optional_count(const Json& object, const char* key, int64_t least = 0, int64_t most = kLargest) {
  const Json* found = find(object, key);
  return found == nullptr || found->is_null() ? std::nullopt : std::optional(count(object, key, least, most));
}

double positive(const Json& object, const char* key) {
  const double value = number(member(object, key));
  if (!(value > 0)) throw JsonError(std::string(key) + ": got " + dump(member(object, key)) + ", expected a positive number");
  return value;
}

// The same in "model" and in "model.config".
void agree(const Json& model, const Json& config, const char* key) {
  const Json &value = member(model, key), &own = member(config, key);
  if (number(value) != number(own)) {
    throw JsonError(std::string("model.") + key + ": got " + dump(value) + ", expected " + dump(own) +
                    ", as model.config says");
  }
}

// A token, several or none (null).
std::vector<int64_t> token_ids(const Json* value, const char* key, int64_t vocab_size) {
  std::vector<int64_t> ids;
  if (value == nullptr || value->is_null()) return ids;
  const auto take = [&](const Json& token) {
    ids.push_back(integer(token));
    if (ids.back() < 0 || ids.back() >= vocab_size) throw JsonError(std::string(key) + ": got " + dump(*value));
  };
  if (value->is_array()) {
    for (const Json& token : items(*value)) take(token);
  } else {
    take(*value);
  }
  return ids;
}

// [[first, end), ...]: ids that no token has.
std::vector<std::pair<int64_t, int64_t>> token_ranges(const Json* list, int64_t vocab_size) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  if (list == nullptr) return ranges;
  for (const Json& range : items(*list)) {
    const auto& ends = items(range);
    const bool pair = ends.size() == 2;
    const int64_t first = pair ? integer(ends[0]) : -1, end = pair ? integer(ends[1]) : -1;
    if (first < 0 || end <= first || end > vocab_size) throw JsonError("unused_token_ids: got " + dump(*list));
    ranges.emplace_back(first, end);
  }
  return ranges;
}

std::vector<int64_t> call_rows(const Json& list) {
  std::vector<int64_t> rows;
  for (const Json& n : items(list)) rows.push_back(integer(n));
  const bool ascending = std::adjacent_find(rows.begin(), rows.end(), std::greater_equal<>()) == rows.end();
  if (rows.empty() || rows.front() != 1 || rows.back() > kSegment || !ascending) {
    throw JsonError("chunks: got " + dump(list) + ", expected numbers of rows from 1 to 64, the first of them 1");
  }
  return rows;
}

Dials own_dials(const Json& values, int64_t trained_depth) {
  const Dials dials = {.max_loops = count(values, "max_loops"),
          .min_loops = count(values, "min_loops"),
          .exit_threshold = number(member(values, "exit_threshold")),
          .exit_epsilon = number(member(values, "exit_epsilon")),
          .exit_entropy = number(member(values, "exit_entropy"))};
  try {
    dials.check(trained_depth);
  } catch (const std::runtime_error& error) {
    throw JsonError(std::string("model.dials: some that cannot be set (") + error.what() + ")");
  }
  return dials;
}

// All that is kept together fits.
void check_state(const ModelInfo& info) {
  size_t nbytes = 0;
  for (const TensorSpec& state : info.state) nbytes += state.nbytes();
  for (const TensorSpec& memory : info.memory) nbytes += memory.nbytes();
  if (nbytes > kLargestState) {
    throw JsonError("model.state: " + std::to_string(nbytes) + " bytes with model.memory, expected at most 4 GiB");
  }
}

ModelInfo model_info(const Json& manifest) {
  const Json &model = member(manifest, "model"), &config = member(model, "config");
  ModelInfo info;
  info.name = string(member(model, "name"));
  info.quant = string(member(model, "quant"));
  info.vocab_size = count(model, "vocab_size", 1, kLargestVocabulary);
  info.width = count(config, "d_model", 1, kLargestWidth);
  info.max_loops = count(model, "max_loops", 1, kMostLoops);
  info.window = count(model, "window", kSegment, kLargestWindow);
  info.rotary_dims = count(model, "rotary_dims", 2, kLargestWidth);
  info.parameters = count(model, "parameters", 0, int64_t{1} << 53);
  info.rope_theta = positive(model, "rope_theta");
  for (const char* key : {"vocab_size", "max_loops", "window", "rope_theta"}) agree(model, config, key);
  info.dials = own_dials(member(model, "dials"), info.max_loops);
  info.chunks = call_rows(member(model, "chunks"));
  info.state = kept_tensors(member(model, "state"));
  for (const auto& [ring, source] : members(member(model, "rings"))) {
    const auto kept = std::find_if(info.state.begin(), info.state.end(), [&](const auto& t) { return t.name == ring; });
    const bool fits = kept != info.state.end() && kept->shape.size() >= 2 && kept->shape.rbegin()[1] == info.window;
    if (!fits) throw JsonError(ring + ": there is no such state of " + std::to_string(info.window) + " positions");
    info.rings[ring] = string(source);
  }
  if (const Json* memory = find(model, "memory")) info.memory = kept_tensors(*memory);
  check_state(info);
  if (member(model, "target") != kTarget) throw JsonError("model.target: got " + dump(member(model, "target")) + ", expected " + kTarget);
  if (const Json& weights = member(member(manifest, "quantization"), "weights"); weights != info.quant) {
    throw JsonError("model.quant: got " + info.quant + ", expected " + dump(weights) + ", as quantization.weights says");
  }
  info.max_seq_len = optional_count(model, "max_seq_len", 1);
  info.bos_token = optional_count(config, "bos_token_id", 0, info.vocab_size - 1);
  // Packages made before a text could end in several ways have config.json's own token.
  const Json* eos = find(model, "eos_token_ids");
  info.eos_tokens = token_ids(eos != nullptr ? eos : find(config, "eos_token_id"), "eos_token_ids", info.vocab_size);
  info.unused_tokens = token_ranges(find(model, "unused_token_ids"), info.vocab_size);
  const auto& rules = items(member(config, "exit_rules"));
  info.entropy_rule = std::any_of(rules.begin(), rules.end(), [](const Json& rule) { return rule == "entropy"; });
  info.config = dump(config);
  for (const auto& [name, method] : members(member(manifest, "methods"))) {
    info.methods[name] = {tensors(member(method, "inputs")), tensors(member(method, "outputs"))};
  }
  return info;
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

// Of any version: an older one had no SHA256SUMS, and is to be refused as what it is.
Json read_manifest(const fs::path& path) {
  if (!fs::is_regular_file(path)) refuse(path, "missing; " + path.parent_path().string() + " is not a package");
  if (fs::file_size(path) > kLargestText) refuse(path, "larger than 16 MiB, which no such file is; export the package again");
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

}  // namespace

// --------------------------------------------------------------------------------------------------------- package

Package Package::open(const std::string& folder, const std::string& target) {
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
    std::map<std::string, int64_t> sizes;
    for (const auto& [name, size] : members(member(manifest, "sizes"))) sizes[name] = integer(size);
    package.check_files(sizes);
    const std::string& own = string(member(manifest, "target"));
    if (own != target) refuse(folder, "made for " + own + "; this runner takes packages made for " + target);
    package.info_ = model_info(manifest);
    const std::string& program = string(member(member(manifest, "lowering"), "program"));
    package.program_ = package.path(program);
    package.program_digest_ = package.digests_.at(program);
  } catch (const JsonError& error) {
    refuse(path, std::string(error.what()) + "; export the package again");
  }
  return package;
}

// Hashes by the names of their files, as coreutils' sha256sum writes and checks them.
void Package::read_sums() {
  const fs::path path = fs::path(folder_) / kSums;
  if (!fs::is_regular_file(path)) refuse(path, "missing from the package; export it again");
  if (fs::file_size(path) > kLargestText) refuse(path, "larger than 16 MiB, which no such file is; export the package again");
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
    if (!separated || !printable || digest.find_first_not_of("0123456789abcdef") != digest.npos) {
      fail(number, "no hash and name of a file");
    }
    if (!digests_.emplace(name, digest).second) fail(number, "the same file again");
    start = end + 1;
  }
  if (!digests_.contains(kManifest)) refuse(path, std::string("lists no ") + kManifest + "; export the package again");
}

void Package::check_files(const std::map<std::string, int64_t>& sizes) {
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
  for (const auto& [name, digest] : digests_) {
    const fs::path path = folder / name;
    if (!fs::is_regular_file(path)) refuse(path, "is no file; export the package again");  // a link to nowhere, a pipe
    const auto size = static_cast<int64_t>(fs::file_size(path));
    const auto expected = sizes.find(name);
    if (expected != sizes.end() && expected->second != size) {  // known at once, and says more than a hash that differs
      refuse(path, std::to_string(size) + " bytes, the manifest says " + std::to_string(expected->second) +
                       (size < expected->second ? "; truncated? export again" : "; written to since? export again"));
    }
    if (sha256_of_file(path.string()) != digest) {
      refuse(path, std::string("its SHA-256 is not that in ") + kSums + "; the file is damaged, export again");
    }
    nbytes_ += size;
  }
}

std::string Package::path(const std::string& name) const {
  if (!digests_.contains(name)) refuse(folder_, "the package holds no " + name + "; export it again");
  return (fs::path(folder_) / name).string();
}

// ---------------------------------------------------------------------------------------------------------- dials

void Dials::check(int64_t trained_depth) const {
  const auto fail = [](const char* flag, const std::string& got, const std::string& expected) {
    throw std::runtime_error(std::string(flag) + ": got " + got + ", expected " + expected);
  };
  if (max_loops < 1 || max_loops > trained_depth) {
    fail("--max-loops", std::to_string(max_loops), "1.." + std::to_string(trained_depth) + " (the depth the model was trained to)");
  }
  if (min_loops < 1 || min_loops > max_loops) {
    fail("--min-loops", std::to_string(min_loops), "1..max-loops (" + std::to_string(max_loops) + ")");
  }
  if (!(exit_threshold > 0)) fail("--exit-threshold", shown(exit_threshold), "a positive number (1 disables it)");
  if (!(exit_epsilon >= 0)) fail("--exit-epsilon", shown(exit_epsilon), "0 (off) or more");
  if (!(exit_entropy >= 0)) fail("--exit-entropy", shown(exit_entropy), "0 (off) or more");
}

}  // namespace rmse
