#include "bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <stdexcept>
#include <thread>

#include "bench_table.h"
#include "document.h"
#include "../core/model.h"
#include "../core/package.h"
#include "../core/text.h"
#include "../core/tokenizer.h"
#include "../executorch/engine.h"

namespace rmse {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kContext = 64;        // tokens fed before decoding is timed
constexpr double kLoopSeconds = 0.02;   // of one repetition of a loop row at least: single calls are too short to time
constexpr size_t kCopied = 128 << 20;   // bytes: far beyond the caches of phones and most desktops

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double deviation(const std::vector<double>& x) {  // of a sample
  if (x.size() < 2) return 0;
  const double middle = mean(x);
  const auto add = [&](double sum, double value) { return sum + (value - middle) * (value - middle); };
  return std::sqrt(std::accumulate(x.begin(), x.end(), 0.0, add) / (std::ssize(x) - 1));
}

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return (x[x.size() / 2] + x[(x.size() - 1) / 2]) / 2;
}

// ---------------------------------------------------------------------------------------------------- the machine

// A field of /proc/self/status in bytes; null where the system does not tell.
Document memory_in_use(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(field + ":")) return 1024 * std::stoll(line.substr(field.size() + 1));
  }
  return {};
}

// Bytes per second that `threads` threads read and write together while copying, the median of five.
double copy_bandwidth(int64_t threads) {
  std::vector<char> source(kCopied, 1), target(kCopied, 0);
  std::vector<double> seconds;
  for (int repeat = 0; repeat <= 5; ++repeat) {
    const auto start = Clock::now();
    std::vector<std::jthread> running;
    for (int64_t t = 0; t < threads; ++t) {
      const size_t begin = kCopied * t / threads, end = kCopied * (t + 1) / threads;
      running.emplace_back([&, begin, end] { std::memcpy(target.data() + begin, source.data() + begin, end - begin); });
    }
    running.clear();
    if (repeat > 0) seconds.push_back(seconds_since(start));  // the first one warms up: pages are mapped
  }
  return 2 * kCopied / median(seconds);
}

// --------------------------------------------------------------------------------------------------------- a model

// Bytes of weights that decoding one token multiplies with, an estimate: those of the loop once per loop that ran, what is
// outside of it once.
double weight_bytes_per_token(const ModelInfo& info, double loops) {
  // Of a weight in memory: fp16 is widened when loaded, scales of groups of 32 count as part of int4.
  static const std::map<std::string, double> kWeightBytes = {{"fp32", 4}, {"fp16", 4}, {"int8", 1}, {"int4", 0.625}};
  const auto known = kWeightBytes.find(info.quant);
  const double bytes = known == kWeightBytes.end() ? 4 : known->second;
  return bytes * (loops * static_cast<double>(info.loop_weights) + static_cast<double>(info.once_weights));
}

int64_t third(int64_t full) { return std::max<int64_t>(1, full / 3); }

// One line of the table: what is timed, and the speed of each repetition.
struct Row {
  std::string test, mode;  // "pp512", "tg128", "loop1", ...; "fixed" or "adaptive"
  Dials dials;
  double (*work)(Model&, const std::vector<int64_t>& ids, int64_t count, Row&);  // tokens/s, or ms for the loop rows
  int64_t count;                                                                 // tokens, or rows of a loop call
  std::vector<double> speeds = {};
  std::vector<int64_t> depth = {}, iterations = {};  // of the timed positions, of the timed calls
  Document expert_ram = {};                          // of the last repetition; null without --expert-ram

  bool adaptive() const { return mode == "adaptive"; }

  Document summary() const {
    Document result = Document::object({{"test", test}, {"mode", mode}, {"max_loops", dials.max_loops}});
    if (!depth.empty()) {
      result["mean_loops"] = mean(depth);
      result["mean_iterations"] = mean(iterations);
    }
    result[depth.empty() ? "ms" : "tok_per_s"] =
        Document::object({{"mean", mean(speeds)}, {"sd", deviation(speeds)}, {"median", median(speeds)}});
    if (!expert_ram.is_null()) result["expert_ram"] = expert_ram;
    return result;
  }
};

// What --expert-ram does is counted from here on.
void clear_figures(Model& model) {
  if (Offload* offload = offload_of(model.engine())) offload->clear_figures();
}

// Tokens per second of one prompt.
double prefill(Model& model, const std::vector<int64_t>& ids, int64_t count, Row& row) {
  model.reset();
  clear_figures(model);
  const auto start = Clock::now();
  Fed fed = model.feed(std::span(ids).first(count), row.dials);
  const double seconds = seconds_since(start);
  row.depth = std::move(fed.depth);
  row.iterations = std::move(fed.iterations);
  row.expert_ram = offload_document(model, count);
  return count / seconds;
}

// Tokens per second after a prompt of `kContext` tokens that is not timed.
double decode(Model& model, const std::vector<int64_t>& ids, int64_t count, Row& row) {
  model.reset();
  model.feed(std::span(ids).first(kContext), row.dials);
  row.depth.clear();
  row.iterations.clear();
  clear_figures(model);
  const auto start = Clock::now();
  for (int64_t i = 0; i < count; ++i) {
    const Fed fed = model.feed(std::span(ids).subspan(kContext + i, 1), row.dials);
    row.depth.push_back(fed.depth[0]);
    row.iterations.push_back(fed.iterations[0]);
  }
  const double seconds = seconds_since(start);
  row.expert_ram = offload_document(model, count);
  return count / seconds;
}

// Milliseconds of one loop, averaged over as many as fill `kLoopSeconds`.
double loop(Model& model, const std::vector<int64_t>& ids, int64_t count, Row& row) {
  model.reset();
  Calls& calls = model.prepare(std::span(ids).first(count), row.dials);
  const auto start = Clock::now();
  int64_t ran = 0;
  double seconds = 0;
  for (; seconds < kLoopSeconds; ++ran) {
    calls.loop();
    seconds = seconds_since(start);
  }
  return 1000 * seconds / ran;
}

// Fixed depths as asked for, or full, a half and a third of it.
std::vector<int64_t> chosen_depths(const Options& options, const ModelInfo& info) {
  const int64_t full = info.max_loops;
  const std::vector<int64_t> usual = {full, std::max<int64_t>(1, full / 2), third(full)};
  std::vector<int64_t> depths;
  for (const int64_t depth : options.depths.empty() ? usual : options.depths) {
    if (std::find(depths.begin(), depths.end(), depth) == depths.end()) depths.push_back(depth);
    Dials{.max_loops = depth}.check(full, info.untrained_loops);
  }
  return depths;
}

std::vector<Row> token_rows(const Options& options, const ModelInfo& info, const std::optional<Dials>& adaptive) {
  const std::vector<int64_t> depths = chosen_depths(options, info);
  std::vector<Row> rows;
  const auto add = [&](const char* kind, int64_t count, auto work) {
    if (count == 0) return;
    const std::string test = kind + std::to_string(count);
    for (const int64_t depth : depths) rows.push_back({test, "fixed", {.max_loops = depth}, work, count});
    if (adaptive) rows.push_back({test, "adaptive", *adaptive, work, count});
  };
  add("pp", options.prefill, prefill);
  add("tg", options.decode, decode);
  return rows;
}

std::vector<Row> loop_rows(const Options& options, const ModelInfo& info) {
  // Full depth and a third are always among them: their ratio says what stopping early saves.
  std::set<int64_t, std::greater<>> depths = {info.max_loops, third(info.max_loops)};
  for (const int64_t depth : chosen_depths(options, info)) depths.insert(depth);
  std::vector<Row> rows;
  for (const int64_t chunk : info.chunks) {
    for (const int64_t depth : depths) {
      rows.push_back({"loop" + std::to_string(chunk), "fixed", {.max_loops = depth}, loop, chunk});
    }
  }
  return rows;
}

std::string sample_path(const Package& package) { return package.folder() + "/sample.txt"; }

// Whether there is something to read on which exits mean something.
bool has_text(const Package& package, const Options& options) {
  return !options.prompt_tokens.empty() || !options.text.empty() || std::filesystem::exists(sample_path(package));
}

// Any tokens, the same on every machine: the steps of a linear congruence (Knuth's MMIX).
std::vector<int64_t> made_up_ids(int64_t vocab_size, int64_t count) {
  std::vector<int64_t> ids;
  for (uint64_t x = 1; std::ssize(ids) < count;) {
    x = 6364136223846793005u * x + 1442695040888963407u;
    ids.push_back(static_cast<int64_t>((x >> 33) % vocab_size));  // the low bits repeat too soon
  }
  return ids;
}

std::vector<int64_t> read_ids(const Package& package, const Options& options) {
  const int64_t decoding = options.decode > 0 ? kContext + options.decode : 0;
  const int64_t needed = std::max({options.prefill, decoding, package.info().chunks.back()});
  if (!has_text(package, options)) return made_up_ids(package.info().text.vocab_size, needed);
  std::vector<int64_t> ids = options.prompt_tokens;
  if (ids.empty()) {
    const std::string path = options.text.empty() ? sample_path(package) : options.text;
    const std::string text = read_file(path);
    const size_t invalid = find_invalid_utf8(text);
    if (invalid != text.npos) throw std::runtime_error(path + ": not UTF-8 at byte " + std::to_string(invalid));
    ids = Tokenizer::open(package.path("tokenizer.json")).encode(text, needed);
  }
  if (std::ssize(ids) < needed) {
    throw std::runtime_error("the text has " + std::to_string(ids.size()) + " tokens, this bench needs " +
                             std::to_string(needed) + "; lower -p or -n");
  }
  return ids;
}

// ---------------------------------------------------------------------------------------------------- the document

Document summary_of_loops(const std::vector<Row>& rows, int64_t full) {
  std::map<std::pair<std::string, int64_t>, double> ms;
  for (const Row& row : rows) ms[{row.test, row.dials.max_loops}] = median(row.speeds);
  Document ratio = Document::object({{"max_loops", third(full)}, {"of", full}});
  for (const Row& row : rows) {
    if (!ratio.contains(row.test)) ratio[row.test] = ms[{row.test, third(full)}] / ms[{row.test, full}];
  }
  return ratio;
}

Document speedups(const std::vector<Row>& rows, int64_t full) {
  Document found = Document::object();
  for (const Row& row : rows) {
    const auto fixed = std::find_if(rows.begin(), rows.end(), [&](const Row& other) {
      return other.test == row.test && !other.adaptive() && other.dials.max_loops == full;
    });
    if (row.adaptive() && fixed != rows.end()) found[row.test] = median(row.speeds) / median(fixed->speeds);
  }
  return found;
}

void add_results(Document& document, const std::vector<Row>& rows, const std::vector<Row>& loops, const ModelInfo& info) {
  document["rows"] = Document::array();
  for (const Row& row : rows) {
    // Prefill calls share the weights they fetch among 64 rows: only decoding has one figure per token.
    Document& line = document["rows"].emplace_back(row.summary());
    const double moved = weight_bytes_per_token(info, mean(row.depth)) * median(row.speeds) / 1e9;
    line["gb_per_s"] = known(row.test.starts_with("tg"), moved);
  }
  document["loop_rows"] = Document::array();
  for (const Row& row : loops) document["loop_rows"].push_back(row.summary());
  document["loop_time_ratio"] = summary_of_loops(loops, info.max_loops);
  document["adaptive_speedup"] = speedups(rows, info.max_loops);
  const Row* adaptive = nullptr;  // the one with the most positions
  for (const Row& row : rows) {
    if (row.adaptive() && (adaptive == nullptr || row.depth.size() > adaptive->depth.size())) adaptive = &row;
  }
  document["histogram"] = adaptive ? Document(histogram(adaptive->depth, info.max_loops)) : Document();
  document["work_skipped"] = known(adaptive != nullptr, adaptive ? 1 - mean(adaptive->depth) / info.max_loops : 0);
}

}  // namespace

std::string bench(const Options& options) {
  // With the engine started and no model. Code of it that has not run yet is not in there: a program would have to be
  // loaded, and there is none without weights.
  const Document baseline = memory_in_use("VmRSS");
  const Package package = Package::open(options.package, kExecutorch);
  const ModelInfo& info = package.info();
  const Dials dials = options.dials(info);
  const bool made_up = !has_text(package, options);
  const std::optional<Dials> adaptive = made_up || !dials.exits() ? std::nullopt : std::optional(dials);
  std::vector<Row> rows = token_rows(options, info, adaptive), loops = loop_rows(options, info);
  const std::vector<int64_t> ids = read_ids(package, options);
  Model model(package, open_executorch(package, options.packed_weights, options.expert_ram));
  // One warm-up and then the repetitions, round robin over all rows: drift of the machine meets all alike.
  for (int64_t repetition = 0; repetition <= options.repetitions; ++repetition) {
    for (std::vector<Row>* kind : {&rows, &loops}) {
      for (Row& row : *kind) {
        const double speed = row.work(model, ids, row.count, row);
        if (repetition > 0) row.speeds.push_back(speed);
      }
    }
  }
  // Before the bandwidth is measured, which needs memory of its own.
  const Document peak = memory_in_use("VmHWM"), resident = memory_in_use("VmRSS");
  const int64_t threads = options.threads > 0 ? options.threads : std::max(1u, std::thread::hardware_concurrency());
  Document document = Document::object({{"model", info.name},
                                {"runtime", "executorch-native"},
                                {"quant", info.quant},
                                {"parameters", info.parameters},
                                {"package_bytes", package.nbytes()},
                                {"state_bytes", model.state_bytes()},
                                {"peak_rss_bytes", peak},
                                {"rss_bytes", resident},
                                {"baseline_rss_bytes", baseline},
                                {"threads", options.threads > 0 ? Document(options.threads) : Document()},
                                {"memory_gb_per_s", copy_bandwidth(threads) / 1e9},
                                {"memory_threads", threads},
                                {"dials", document_of(dials)},
                                {"repetitions", options.repetitions}});
  add_results(document, rows, loops, info);
  document["notes"] = Document::array();
  if (made_up) {
    document["notes"].push_back(
        "made-up tokens, the package holds no sample.txt: exits would mean nothing, fixed depths only (give --text FILE)");
  } else if (!adaptive) {
    document["notes"].push_back(
        "the checkpoint's own settings disable every exit rule: no adaptive rows (set --exit-threshold)");
  }
  return options.output == "json" ? dump(document) : markdown(document);
}

}  // namespace rmse
