#include "package.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <set>
#include <stdexcept>

#include "sha256.h"

namespace rmse {
namespace {

namespace fs = std::filesystem;
using executorch::aten::ScalarType;

constexpr char kFormat[] = "rmse-edge package";
constexpr int64_t kFormatVersion = 2;
constexpr char kTarget[] = "executorch";
constexpr char kManifest[] = "manifest.json";
constexpr char kSums[] = "SHA256SUMS";
constexpr size_t kDigits = 64;  // of a hash
constexpr char kMagic[] = "ET12";  // bytes 4..8 of a program

// What a manifest may ask for at most, as in rmse_edge/schema.py, config.py and runtimes/host/signatures.py: one with more is not
// to be believed, and nothing is allocated by it.
constexpr size_t kLargestManifest = 16 << 20;   // bytes
constexpr int64_t kLargest = INT32_MAX;         // of sizes and counts
constexpr int64_t kLargestTensor = 2LL << 30;   // bytes
constexpr int64_t kLargestState = 4LL << 30;    // bytes kept between calls
constexpr int64_t kMostLoops = 64;
constexpr int64_t kLargestWidth = 1 << 16;
constexpr int64_t kLargestVocabulary = 1 << 22;
constexpr int64_t kLargestWindow = 1 << 24;
constexpr size_t kLongestName = 200;
// What is kept between calls <- the result of commit that fills it; rmse_edge/config.py has it, too.
const std::map<std::string, std::string> kRings = {{"past_keys", "keys"}, {"past_values", "values"}};

struct Type {
  const char* name;
  ScalarType type;
  size_t nbytes;
};

constexpr Type kTypes[] = {
    {"float32", ScalarType::Float, 4}, {"float16", ScalarType::Half, 2}, {"bfloat16", ScalarType::BFloat16, 2},
    {"int64", ScalarType::Long, 8},    {"int32", ScalarType::Int, 4},    {"int8", ScalarType::Char, 1},
    {"uint8", ScalarType::Byte, 1},    {"bool", ScalarType::Bool, 1},
};

[[noreturn]] void refuse(const fs::path& path, const std::string& what) {
  throw std::runtime_error(path.string() + ": " + what);
}

// ------------------------------------------------------------------------------------------- reading the manifest

TensorSpec tensor(const std::string& name, const Json& shape, const Json& type) {
  const auto known = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const Type& t) { return type.is(t.name); });
  if (known == std::end(kTypes)) throw JsonError(name + ": a tensor of " + type.dump());
  if (name.empty() || name.size() > kLongestName) throw JsonError("a tensor's name of " + std::to_string(name.size()) + " bytes");
  TensorSpec spec{name, known->type, {}};
  const int64_t largest = kLargestTensor / static_cast<int64_t>(known->nbytes);
  int64_t elements = 1;
  if (shape.items().size() > 8) throw JsonError(name + ": a tensor of shape " + shape.dump().substr(0, 80));
  for (const Json& size : shape.items()) {
    const int64_t n = size.integer();
    if (n < 1 || n > largest / elements) throw JsonError(name + ": a tensor of shape " + shape.dump());
    elements *= n;
    spec.shape.push_back(static_cast<int32_t>(n));
  }
  return spec;
}

std::vector<TensorSpec> tensors(const Json& list) {
  std::vector<TensorSpec> specs;
  for (const Json& t : list.items()) specs.push_back(tensor(t.at("name").string(), t.at("shape"), t.at("dtype")));
  return specs;
}

// {name: [shape, type]}: state and memory.
std::vector<TensorSpec> kept_tensors(const Json& kept) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, value] : kept.members()) {
    const std::vector<Json>& pair = value.items();
    if (pair.size() != 2) throw JsonError(name + ": got " + value.dump() + ", expected a shape and a type");
    specs.push_back(tensor(name, pair[0], pair[1]));
  }
  return specs;
}

int64_t count(const Json& object, const char* key, int64_t least = 1, int64_t most = kLargest) {
  const int64_t value = object.at(key).integer();
  if (value < least || value > most) {
    throw JsonError(std::string(key) + ": got " + std::to_string(value) + ", expected " + std::to_string(least) + " to " +
                    std::to_string(most));
  }
  return value;
}

std::optional<int64_t> optional_count(const Json& object, const char* key, int64_t least = 0, int64_t most = kLargest) {
  const Json* found = object.find(key);
  return found == nullptr || found->is_null() ? std::nullopt : std::optional(count(object, key, least, most));
}

double positive(const Json& object, const char* key) {
  const double value = object.at(key).number();
  if (!(value > 0)) throw JsonError(std::string(key) + ": got " + object.at(key).dump() + ", expected a positive number");
  return value;
}

// What "model" says of `key` is what follows from "model.config".
void agree(const Json& model, const char* key, const Json& own, const std::string& where = "model.") {
  const Json& value = model.at(key);
  const bool same = own.is_array() ? value.dump() == own.dump() : value.number() == own.number();
  if (!same) throw JsonError(where + key + ": got " + value.dump() + ", expected " + own.dump() + ", as model.config says");
}

// A token, several or none (null).
std::vector<int64_t> token_ids(const Json* value, const char* key, int64_t vocab_size) {
  std::vector<int64_t> ids;
  if (value == nullptr || value->is_null()) return ids;
  const auto take = [&](const Json& token) {
    ids.push_back(token.integer());
    if (ids.back() < 0 || ids.back() >= vocab_size) throw JsonError(std::string(key) + ": got " + value->dump());
  };
  if (value->is_array()) {
    for (const Json& token : value->items()) take(token);
  } else {
    take(*value);
  }
  return ids;
}

// [[first, end), ...]: ids that no token has.
std::vector<std::pair<int64_t, int64_t>> token_ranges(const Json* list, int64_t vocab_size) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  if (list == nullptr) return ranges;
  for (const Json& range : list->items()) {
    const std::vector<Json>& ends = range.items();
    const bool pair = ends.size() == 2;
    const int64_t first = pair ? ends[0].integer() : -1, end = pair ? ends[1].integer() : -1;
    if (first < 0 || end <= first || end > vocab_size) throw JsonError("unused_token_ids: got " + list->dump());
    ranges.emplace_back(first, end);
  }
  return ranges;
}

std::vector<int64_t> call_rows(const Json& list) {
  std::vector<int64_t> rows;
  for (const Json& n : list.items()) rows.push_back(n.integer());
  const bool ascending = std::adjacent_find(rows.begin(), rows.end(), std::greater_equal<>()) == rows.end();
  if (rows.empty() || rows.front() != 1 || rows.back() > kSegment || !ascending) {
    throw JsonError("chunks: got " + list.dump() + ", expected numbers of rows from 1 to 64, the first of them 1");
  }
  return rows;
}

Dials own_dials(const Json& values, int64_t trained_depth) {
  const Dials dials = {.max_loops = count(values, "max_loops"),
          .min_loops = count(values, "min_loops"),
          .exit_threshold = values.at("exit_threshold").number(),
          .exit_epsilon = values.at("exit_epsilon").number(),
          .exit_entropy = values.at("exit_entropy").number()};
  try {
    dials.check(trained_depth);
  } catch (const JsonError&) {
    throw;
  } catch (const std::runtime_error& error) {
    throw JsonError(std::string("model.dials: some that cannot be set (") + error.what() + ")");
  }
  return dials;
}

// Trained numbers of the model that `config` describes; rmse_edge/costs.py has it, too.
int64_t parameters_of(const Json& config) {
  const auto size = [&](const char* key, int64_t least = 1) { return count(config, key, least, kLargestWidth); };
  const int64_t d = size("d_model"), heads = size("n_heads"), head = size("head_dim");
  const int64_t wide = heads * head, kv = size("n_kv_heads") * head, experts = size("n_experts");
  const int64_t vocabulary = count(config, "vocab_size", 1, kLargestVocabulary), loops = count(config, "max_loops", 1, kMostLoops);
  int64_t total = vocabulary * d * (config.at("tie_embeddings").boolean() ? 1 : 2);  // embeddings, head
  total += d * d + (config.at("step_encoding").is("learned") ? loops * d : 0);      // injection, a bias per loop
  const int64_t gates = config.at("attention_gate").is("elementwise") ? wide : heads;
  total += d * (2 * wide + 2 * kv + gates) + 2 * head;                // attention and the norms of its queries and keys
  total += experts * (loops + d + 3 * d * size("expert_width"));      // biases per loop, router, experts
  total += 3 * d * size("n_shared_experts", 0) * size("shared_width", 0);
  total += 5 * d + d + 1;  // norms, exit gate
  const Json& memory = config.at("memory");
  if (!memory.is("none")) {
    const bool titans = memory.is("titans");
    const int64_t values = size("memory_dim"), keys = titans ? values : size("memory_key_dim"), rates = titans ? 3 : 4;
    const int64_t features = titans ? values : keys + keys * (keys + 1) / 2;  // ATLAS: all products of two channels, too
    total += (features + values) * size("memory_hidden") + 4 * keys + d * 2 * (keys + values) + (rates + 1) * (d + 1);
  }
  if (const int64_t slots = size("retrieval_slots", 0); slots > 0) {
    // Pooling queries, pooling and value projections, a norm; the key and search projections; attention to the hits.
    total += 2 * slots * d + 2 * d * d + d + 1 + 2 * size("retrieval_dim") * slots * d + 4 * d * wide;
  }
  return total;
}

// What "model" says is what follows from "model.config", as check_model of runtimes/signatures.py has it.
void check_against_config(const Json& model, const Json& config) {
  for (const char* key : {"vocab_size", "max_loops", "window", "rope_theta"}) agree(model, key, config.at(key));
  const int64_t head = count(config, "head_dim", 1, kLargestWidth);
  const bool turned = config.at("step_encoding").is("temporal_rope");
  agree(model, "rotary_dims", head - (turned ? count(config, "step_dims", 0, kLargestWidth) : 0));
  agree(model, "parameters", parameters_of(config));
  for (const char* key : {"max_loops", "min_loops", "exit_threshold", "exit_epsilon", "exit_entropy"}) {
    agree(model.at("dials"), key, config.at(key), "model.dials.");
  }
  const Json shape = Json::array(std::vector<int64_t>{config.at("max_loops").integer(), 1,
                                                      count(config, "n_kv_heads", 1, kLargestWidth),
                                                      config.at("window").integer(), head});
  const Json ring = Json::array(std::vector<Json>{shape, config.at("kv_dtype")});
  for (const auto& [name, _] : model.at("state").members()) {
    if (!kRings.contains(name)) throw JsonError("model.state." + name + ": expected none, as model.config says");
  }
  for (const auto& [name, source] : kRings) {
    agree(model.at("state"), name.c_str(), ring, "model.state.");
    if (model.at("rings").members().size() != kRings.size() || !model.at("rings").at(name.c_str()).is(source.c_str())) {
      throw JsonError("model.rings: got " + model.at("rings").dump() + ", expected " + source + " for " + name);
    }
  }
  const Json* memory = model.find("memory");
  const bool some = memory != nullptr && !memory->members().empty();
  if (some == config.at("memory").is("none")) {
    throw JsonError("model.memory: expected " + std::string(some ? "none" : "some") + ", as model.config says");
  }
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
  const Json &model = manifest.at("model"), &config = model.at("config");
  ModelInfo info;
  info.name = model.at("name").string();
  info.quant = model.at("quant").string();
  info.vocab_size = count(model, "vocab_size", 1, kLargestVocabulary);
  info.width = count(config, "d_model", 1, kLargestWidth);
  info.max_loops = count(model, "max_loops", 1, kMostLoops);
  info.window = count(model, "window", kSegment, kLargestWindow);
  info.rotary_dims = count(model, "rotary_dims", 2, kLargestWidth);
  info.parameters = count(model, "parameters", 0, int64_t{1} << 53);
  info.rope_theta = positive(model, "rope_theta");
  info.dials = own_dials(model.at("dials"), info.max_loops);
  info.chunks = call_rows(model.at("chunks"));
  info.state = kept_tensors(model.at("state"));
  info.rings = kRings;
  if (const Json* memory = model.find("memory")) info.memory = kept_tensors(*memory);
  check_state(info);
  check_against_config(model, config);
  if (!model.at("target").is(kTarget)) throw JsonError("model.target: got " + model.at("target").dump() + ", expected " + kTarget);
  if (const Json& weights = manifest.at("quantization").at("weights"); !weights.is(info.quant)) {
    throw JsonError("model.quant: got " + info.quant + ", expected " + weights.dump() + ", as quantization.weights says");
  }
  info.max_seq_len = optional_count(model, "max_seq_len", 1);
  info.bos_token = optional_count(config, "bos_token_id", 0, info.vocab_size - 1);
  // Packages made before a text could end in several ways have config.json's own token.
  const Json* eos = model.find("eos_token_ids");
  info.eos_tokens = token_ids(eos != nullptr ? eos : config.find("eos_token_id"), "eos_token_ids", info.vocab_size);
  info.unused_tokens = token_ranges(model.find("unused_token_ids"), info.vocab_size);
  std::set<std::string> rules;
  for (const Json& rule : config.at("exit_rules").items()) {
    const bool known = rule.is("gate") || rule.is("delta") || rule.is("entropy");
    if (!known || !rules.insert(rule.string()).second) {
      throw JsonError("exit_rules: got " + config.at("exit_rules").dump() + ", expected some of gate, delta, entropy, each once");
    }
  }
  info.entropy_rule = rules.contains("entropy");
  info.config = config;
  for (const auto& [name, method] : manifest.at("methods").members()) {
    info.methods[name] = {tensors(method.at("inputs")), tensors(method.at("outputs"))};
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

void check_magic(const std::string& path) {
  char start[8] = {};
  std::ifstream(path, std::ios::binary).read(start, sizeof start);
  if (std::memcmp(start + 4, kMagic, 4) != 0) {
    refuse(path, std::string("is not an ExecuTorch program (") + kMagic + "); export the package again");
  }
}

}  // namespace

// --------------------------------------------------------------------------------------------------------- package

Package Package::open(const std::string& folder) {
  if (!fs::is_directory(folder)) {
    refuse(folder, std::string(fs::exists(folder) ? "is no folder, expected a package folder" : "no such package folder") +
                       "; make one with rmse-export");
  }
  Package package;
  package.folder_ = folder;
  package.read_manifest();
  package.read_sums();
  const fs::path manifest = fs::path(folder) / kManifest;
  if (sha256_of_file(manifest.string()) != package.digests_.at(kManifest)) {
    refuse(manifest, std::string("was edited after the export (its SHA-256 is not that in ") + kSums + "); export again");
  }
  try {
    package.check_files();
    const std::string& target = package.manifest_.at("target").string();
    if (target != kTarget) refuse(folder, "made for " + target + "; this runner takes packages made for " + kTarget);
    package.info_ = model_info(package.manifest_);
    const std::string& program = package.manifest_.at("lowering").at("program").string();
    package.program_ = package.path(program);
    package.program_digest_ = package.digests_.at(program);
  } catch (const JsonError& error) {
    refuse(manifest, std::string(error.what()) + "; export the package again");
  }
  check_magic(package.program_);
  return package;
}

void Package::read_manifest() {
  const fs::path path = fs::path(folder_) / kManifest;
  if (!fs::is_regular_file(path)) refuse(path, "missing; " + folder_ + " is not a package");
  try {
    if (fs::file_size(path) > kLargestManifest) refuse(path, "larger than 16 MiB, which no manifest is; export the package again");
    manifest_ = Json::parse(read_file(path.string()));
  } catch (const JsonError& error) {
    refuse(path, std::string("not readable as JSON (") + error.what() + "); export the package again");
  }
  const Json* format = manifest_.find("format");
  if (format == nullptr || !format->is(kFormat)) refuse(path, std::string("not the manifest of an ") + kFormat);
  const Json* version = manifest_.find("format_version");
  const std::string known = std::to_string(kFormatVersion);
  if (version == nullptr || version->dump() != known) {
    refuse(path, "format version " + (version == nullptr ? "None" : version->dump()) + ", this runner reads " + known +
                     "; export the package again with this version");
  }
}

// Hashes by the names of their files, as coreutils' sha256sum writes and checks them.
void Package::read_sums() {
  const fs::path path = fs::path(folder_) / kSums;
  if (!fs::is_regular_file(path)) refuse(path, "missing from the package; export it again");
  if (fs::file_size(path) > kLargestManifest) refuse(path, "larger than 16 MiB, which no such file is; export the package again");
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

void Package::check_files() {
  const fs::path folder = folder_;
  const std::set<std::string> present = files_in(folder);
  for (const auto& [name, _] : digests_) {
    if (!present.contains(name)) refuse(folder / name, "missing from the package; export it again");
  }
  for (const std::string& name : present) {
    if (digests_.contains(name)) continue;
    refuse(folder / name, std::string("not listed in the package's ") + kSums + "; remove it or export again");
  }
  const Json& sizes = manifest_.at("sizes");
  nbytes_ = fs::file_size(folder / kSums);
  for (const auto& [name, digest] : digests_) {
    const fs::path path = folder / name;
    if (!fs::is_regular_file(path)) refuse(path, "is no file; export the package again");  // a link to nowhere, a pipe
    const auto size = static_cast<int64_t>(fs::file_size(path));
    const Json* expected = sizes.find(name);
    if (expected != nullptr && expected->integer() != size) {  // known at once, and says more than a hash that differs
      refuse(path, std::to_string(size) + " bytes, the manifest says " + expected->dump() +
                       (size < expected->integer() ? "; truncated? export again" : "; written to since? export again"));
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

std::string read_file(const std::string& path) {
  if (fs::is_directory(path)) refuse(path, "is a folder, expected a file");
  std::ifstream file(path, std::ios::binary);
  if (!file) refuse(path, std::string("cannot be read (") + std::strerror(errno) + ")");
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// ------------------------------------------------------------------------------------------------ specs and dials

size_t TensorSpec::nbytes() const {
  const auto known = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const Type& t) { return t.type == type; });
  size_t bytes = known->nbytes;
  for (const int32_t n : shape) bytes *= n;
  return bytes;
}

void Dials::check(int64_t trained_depth) const {
  const auto fail = [](const char* flag, const Json& got, const std::string& expected) {
    throw std::runtime_error(std::string(flag) + ": got " + got.dump() + ", expected " + expected);
  };
  if (max_loops < 1 || max_loops > trained_depth) {
    fail("--max-loops", max_loops, "1.." + std::to_string(trained_depth) + " (the depth the model was trained to)");
  }
  if (min_loops < 1 || min_loops > max_loops) {
    fail("--min-loops", min_loops, "1..max-loops (" + std::to_string(max_loops) + ")");
  }
  if (!(exit_threshold > 0)) fail("--exit-threshold", exit_threshold, "a positive number (1 disables it)");
  if (!(exit_epsilon >= 0)) fail("--exit-epsilon", exit_epsilon, "0 (off) or more");
  if (!(exit_entropy >= 0)) fail("--exit-entropy", exit_entropy, "0 (off) or more");
}

Json Dials::to_json() const {
  return Json::object({{"max_loops", max_loops},
                       {"min_loops", min_loops},
                       {"exit_threshold", exit_threshold},
                       {"exit_epsilon", exit_epsilon},
                       {"exit_entropy", exit_entropy}});
}

}  // namespace rmse
