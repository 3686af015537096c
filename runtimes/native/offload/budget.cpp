#include "budget.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace rmse {
namespace {

namespace fs = std::filesystem;

constexpr char kExpected[] = "a size (300M, 2G), a percentage of the experts (25%) or auto";
// Of what is free, auto leaves this for all that is not experts: state that grows, the rest of the weights, the system.
constexpr double kMarginShare = 0.1;
constexpr int64_t kLeastMargin = 64 << 20;

void take_least(std::optional<int64_t>& least, int64_t value) { least = std::min(least.value_or(value), value); }

// The number in a file that has one, and nothing where it says "max" or is not there.
std::optional<int64_t> number_in(const fs::path& path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (file >> value) return value;
  return {};
}

// The value behind a word at the beginning of a line.
std::optional<int64_t> field_of(const fs::path& path, const std::string& word) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    int64_t value = 0;
    if (words >> name >> value && name == word) return value;
  }
  return {};
}

// What a cgroup still allows; v1 and v2 name the same things in two ways.
void take_group(const fs::path& folder, bool second, std::optional<int64_t>& least) {
  const auto limit = number_in(folder / (second ? "memory.max" : "memory.limit_in_bytes"));
  const auto used = number_in(folder / (second ? "memory.current" : "memory.usage_in_bytes"));
  constexpr int64_t kNone = int64_t{1} << 60;  // v1 writes "no limit" as about 2^63
  if (!limit || !used || *limit >= kNone) return;
  int64_t cached = 0;
  for (const char* kind : {"inactive_file", "active_file"}) {
    cached += field_of(folder / "memory.stat", second ? kind : std::string("total_") + kind).value_or(0);
  }
  take_least(least, std::max<int64_t>(0, *limit - *used + cached));
}

// A mounted hierarchy of cgroups that limits memory.
struct Hierarchy {
  fs::path mounted, root;  // where, and which cgroup lies there
  bool second;             // v2
};

std::vector<Hierarchy> hierarchies(const fs::path& root) {
  std::vector<Hierarchy> found;
  std::ifstream mounts(root / "proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    std::istringstream words(line);
    std::string skipped, inside, mounted, word, type, source, options;
    words >> skipped >> skipped >> skipped >> inside >> mounted;
    while (words >> word && word != "-") {
    }
    words >> type >> source >> options;
    const bool second = type == "cgroup2";
    const bool memory = ("," + options + ",").find(",memory,") != std::string::npos;
    if (second || (type == "cgroup" && memory)) found.push_back({root / fs::path(mounted).relative_path(), inside, second});
  }
  return found;
}

void take_groups(const fs::path& root, std::optional<int64_t>& least) {
  std::ifstream file(root / "proc/self/cgroup");  // lines NUMBER:CONTROLLERS:PATH; of v2 0::PATH
  const std::vector<Hierarchy> known = hierarchies(root);
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == line.npos || second == line.npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    const bool unified = controllers.empty();
    if (!unified && ("," + controllers + ",").find(",memory,") == std::string::npos) continue;
    for (const Hierarchy& h : known) {
      if (h.second != unified) continue;
      // A container may see its own cgroup as the root, whatever it is called outside.
      fs::path within = fs::path(path).lexically_relative(h.root);
      if (within.empty() || *within.begin() == ".." || !fs::is_directory(h.mounted / within)) within = ".";
      for (fs::path folder = (h.mounted / within).lexically_normal();; folder = folder.parent_path()) {
        take_group(folder, h.second, least);
        if (folder.string().size() <= h.mounted.string().size()) break;
      }
    }
  }
}

}  // namespace

ExpertBudget ExpertBudget::parse(const std::string& text) {
  if (text == "auto") return {Kind::kAuto, 0};
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  std::string unit(end, text.data() + text.size());
  const auto refuse = [&] { throw std::invalid_argument("got '" + text + "', expected " + kExpected); };
  if (error != std::errc() || !std::isfinite(value) || value <= 0) refuse();
  if (unit == "%") {
    if (value > 100) throw std::invalid_argument("got '" + text + "', expected at most 100%");
    return {Kind::kPercent, value};
  }
  for (const char* ending : {"iB", "B"}) {
    if (unit.ends_with(ending)) {
      unit.resize(unit.size() - std::string(ending).size());
      break;
    }
  }
  const size_t power = unit.empty() ? 0 : std::string("KMGT").find(unit[0]) + 1;
  if (unit.size() > 1 || (!unit.empty() && power == 0)) refuse();
  value *= std::pow(1024.0, static_cast<double>(power));
  if (value > 0x1p62) refuse();
  return {Kind::kBytes, value};
}

int64_t ExpertBudget::bytes(int64_t total) const {
  if (kind == Kind::kBytes) return static_cast<int64_t>(value);
  if (kind == Kind::kPercent) return static_cast<int64_t>(static_cast<double>(total) * value / 100);
  const std::optional<int64_t> available = available_memory();
  if (!available) return total;
  const auto margin = std::max(kLeastMargin, static_cast<int64_t>(kMarginShare * static_cast<double>(*available)));
  return std::clamp<int64_t>(*available - margin, 0, total);
}

std::optional<int64_t> available_memory() { return available_memory("/"); }

std::optional<int64_t> available_memory(const std::string& root) {
  std::optional<int64_t> least;
  if (const auto kilobytes = field_of(fs::path(root) / "proc/meminfo", "MemAvailable:")) take_least(least, *kilobytes * 1024);
  take_groups(root, least);
  return least;
}

}  // namespace rmse
