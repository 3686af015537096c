#include "bench_table.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <numeric>
#include <utility>
#include <vector>

#include "../core/json.h"

namespace rmse {
namespace {

std::string format(const char* form, double value) {
  char text[64];
  std::snprintf(text, sizeof text, form, value);
  return text;
}

std::string with_commas(int64_t value) {
  std::string digits = std::to_string(value);
  for (int64_t i = std::ssize(digits) - 3; i > 0; i -= 3) digits.insert(i, 1, ',');
  return digits;
}

std::string mebibytes(const Json& count) {
  return count.is_null() ? "unknown" : format("%.1f MiB", count.number() / (1 << 20));
}

size_t characters(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; });
}

// A table with aligned columns, the first one to the left, numbers to the right.
std::string table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(rows[0].size());
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], characters(row[i]));
  }
  std::string lines;
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string space(widths[i] - characters(row[i]), ' ');
      lines += "| " + (i == 0 ? row[i] + space : space + row[i]) + " ";
    }
    lines += "|\n";
    if (&row != &rows[0]) continue;
    for (size_t i = 0; i < widths.size(); ++i) {
      lines += "|";
      lines.append(widths[i] + 1, '-').append(i == 0 ? "-" : ":");
    }
    lines += "|\n";
  }
  return lines;
}

std::vector<std::string> cells(const Json& row, const char* unit, int digits) {
  const Json& speed = row.at(unit);
  const std::string depth = row.at("max_loops").dump(), form = "%." + std::to_string(digits) + "f";
  const auto value = [&](const char* key) { return format(form.c_str(), speed.at(key).number()); };
  return {row.at("test").string(), row.at("mode").is("fixed") ? depth : "adaptive, at most " + depth,
          value("mean") + " ± " + value("sd"), value("median")};
}

// Depths as bars. Depths above the deepest one seen are left out.
std::string bars(const std::vector<Json>& histogram) {
  std::vector<int64_t> counts;
  for (const Json& count : histogram) counts.push_back(count.integer());
  while (!counts.empty() && counts.back() == 0) counts.pop_back();
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const int64_t top = *std::max_element(counts.begin(), counts.end());
  std::string lines;
  for (size_t k = 0; k < counts.size(); ++k) {
    lines += format("%3.0f loops ", k + 1.0) + format("%5.1f%%", 100.0 * counts[k] / total);
    for (int64_t i = 0; i < (40 * counts[k] + top - 1) / top; ++i) lines += i == 0 ? " █" : "█";
    lines += "\n";
  }
  return lines;
}

std::string memory_lines(const Json& d) {
  const Json &now = d.at("rss_bytes"), &baseline = d.at("baseline_rss_bytes"), &package = d.at("package_bytes");
  std::string lines = "memory: " + mebibytes(d.at("peak_rss_bytes")) + " at most, " + mebibytes(now) +
                      " now; artifact " + mebibytes(package) + ", state " +
                      with_commas(d.at("state_bytes").integer()) + " bytes\n";
  if (now.is_null() || baseline.is_null()) return lines;
  const int64_t added = now.integer() - baseline.integer();
  return lines + "without a model the engine takes " + mebibytes(baseline) + ": this one adds " +
         mebibytes(added) + format(", %.2f × the artifact\n", added / package.number());
}

}  // namespace

std::string markdown(const Json& d) {
  std::vector<std::vector<std::string>> rows = {
      {"test", "loops", "mean loops", "tokens/s", "median", "GB/s of weights"}};
  for (const Json& row : d.at("rows").items()) {
    std::vector<std::string> line = cells(row, "tok_per_s", 1);
    line.insert(line.begin() + 2, format("%.2f", row.at("mean_loops").number()));
    line.push_back(row.at("gb_per_s").is_null() ? "" : format("%.2f", row.at("gb_per_s").number()));
    rows.push_back(std::move(line));
  }
  std::vector<std::vector<std::string>> loops = {{"test", "loops", "ms", "median"}};
  for (const Json& row : d.at("loop_rows").items()) loops.push_back(cells(row, "ms", 3));
  const Json& ratio = d.at("loop_time_ratio");
  std::string measured;
  for (const auto& [test, value] : ratio.members()) {
    if (test.starts_with("loop")) {
      measured += (measured.empty() ? "" : ", ") + format("%.2f", value.number()) + " (" + test + ")";
    }
  }
  std::string text = table(rows) + "\n" + table(loops) + "\nloop stopped at " + ratio.at("max_loops").dump() + " of " +
                     ratio.at("of").dump() + ": " + measured + " of the time of full depth\n";
  for (const auto& [test, times] : d.at("adaptive_speedup").members()) {
    text += test + format(": adaptive exit is %.2f × as fast as full depth\n", times.number());
  }
  if (!d.at("histogram").is_null()) {
    const double percent = 100 * d.at("work_skipped").number();
    text += format("adaptive exit skips %.1f%% of the iterations of full depth:\n", percent);
    text += bars(d.at("histogram").items());
  }
  text += format("memory bandwidth %.1f GB/s", d.at("memory_gb_per_s").number()) + " (copying, threads: " +
          d.at("memory_threads").dump() + "); looped weights may come faster, from the cache\n" + memory_lines(d);
  text += d.at("model").string() + " on " + d.at("runtime").string() + ", " + d.at("quant").string() + ", " +
          with_commas(d.at("parameters").integer()) + " parameters, " + d.at("repetitions").dump() + " repetitions";
  for (const Json& note : d.at("notes").items()) text += "\nnote: " + note.string();
  return text;
}

}  // namespace rmse
