#include "bench_table.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <numeric>
#include <utility>
#include <vector>

#include "document.h"

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

std::string mebibytes(const Document& count) {
  return count.is_null() ? "unknown" : format("%.1f MiB", count.get<double>() / (1 << 20));
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

std::vector<std::string> cells(const Document& row, const char* unit, int digits) {
  const Document& speed = row.at(unit);
  const std::string depth = row.at("max_loops").dump(), form = "%." + std::to_string(digits) + "f";
  const auto value = [&](const char* key) { return format(form.c_str(), speed.at(key).get<double>()); };
  return {row.at("test").get<std::string>(), row.at("mode") == "fixed" ? depth : "adaptive, at most " + depth,
          value("mean") + " ± " + value("sd"), value("median")};
}

// Depths as bars. Depths above the deepest one seen are left out.
std::string bars(const Document& histogram) {
  std::vector<int64_t> counts = histogram.get<std::vector<int64_t>>();
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

std::string memory_lines(const Document& d) {
  const Document &now = d.at("rss_bytes"), &baseline = d.at("baseline_rss_bytes"), &package = d.at("package_bytes");
  std::string lines = "memory: " + mebibytes(d.at("peak_rss_bytes")) + " at most, " + mebibytes(now) +
                      " now; artifact " + mebibytes(package) + ", state " +
                      with_commas(d.at("state_bytes").get<int64_t>()) + " bytes\n";
  if (now.is_null() || baseline.is_null()) return lines;
  const int64_t added = now.get<int64_t>() - baseline.get<int64_t>();
  return lines + "without a model the engine takes " + mebibytes(baseline) + ": this one adds " +
         mebibytes(added) + format(", %.2f × the artifact\n", added / package.get<double>());
}

}  // namespace

std::string markdown(const Document& d) {
  std::vector<std::vector<std::string>> rows = {
      {"test", "loops", "mean loops", "tokens/s", "median", "GB/s of weights"}};
  for (const Document& row : d.at("rows")) {
    std::vector<std::string> line = cells(row, "tok_per_s", 1);
    line.insert(line.begin() + 2, format("%.2f", row.at("mean_loops").get<double>()));
    line.push_back(row.at("gb_per_s").is_null() ? "" : format("%.2f", row.at("gb_per_s").get<double>()));
    rows.push_back(std::move(line));
  }
  std::vector<std::vector<std::string>> loops = {{"test", "loops", "ms", "median"}};
  for (const Document& row : d.at("loop_rows")) loops.push_back(cells(row, "ms", 3));
  const Document& ratio = d.at("loop_time_ratio");
  std::string measured;
  for (const auto& [test, value] : ratio.items()) {
    if (test.starts_with("loop")) {
      measured += (measured.empty() ? "" : ", ") + format("%.2f", value.get<double>()) + " (" + test + ")";
    }
  }
  std::string text = table(rows) + "\n" + table(loops) + "\nloop stopped at " + ratio.at("max_loops").dump() + " of " +
                     ratio.at("of").dump() + ": " + measured + " of the time of full depth\n";
  for (const auto& [test, times] : d.at("adaptive_speedup").items()) {
    text += test + format(": adaptive exit is %.2f × as fast as full depth\n", times.get<double>());
  }
  if (!d.at("histogram").is_null()) {
    const double percent = 100 * d.at("work_skipped").get<double>();
    text += format("adaptive exit skips %.1f%% of the iterations of full depth:\n", percent);
    text += bars(d.at("histogram"));
  }
  for (const Document& row : d.at("rows")) {
    if (!row.contains("expert_ram")) continue;
    text.append("\n").append(row.at("test").get<std::string>()).append(", ").append(row.at("mode").get<std::string>());
    text.append(", at most ").append(row.at("max_loops").dump()).append(" loops\n").append(offload_lines(row.at("expert_ram")));
  }
  text += format("memory bandwidth %.1f GB/s", d.at("memory_gb_per_s").get<double>()) + " (copying, threads: " +
          d.at("memory_threads").dump() + "); looped weights may come faster, from the cache\n" + memory_lines(d);
  const auto word = [&](const char* key) { return d.at(key).get<std::string>(); };
  text += word("model") + " on " + word("runtime") + ", " + word("quant") + ", " +
          with_commas(d.at("parameters").get<int64_t>()) + " parameters, " + d.at("repetitions").dump() + " repetitions";
  for (const Document& note : d.at("notes")) text += "\nnote: " + note.get<std::string>();
  return text;
}

}  // namespace rmse
