// rmse-runner: a package made for ExecuTorch writes text, token by token, each with the loops it needs; or is timed.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "bench.h"
#include "document.h"
#include "../core/errors.h"
#include "../core/model.h"
#include "options.h"
#include "../core/package.h"
#include "../core/sampler.h"
#include "../core/text.h"
#include "../core/tokenizer.h"
#include "../executorch/engine.h"

namespace rmse {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kUserError = 2, kInterrupted = 130;
constexpr char kTokenizer[] = "tokenizer.json";

volatile std::sig_atomic_t interrupted = 0;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// --------------------------------------------------------------------------------------------------------- writing

// Text with the depth of the token that it comes from.
struct Span {
  std::string text;
  int64_t depth;
};

// Writes spans as they come, with --show-depth as runs of one depth in brackets: [ROM/5][EO/3].
class Writer {
 public:
  explicit Writer(const Options& options) : silent_(options.output == "json"), brackets_(options.show_depth) {}

  void add(const Span& span) {
    text_ += span.text;
    if (silent_) return;
    if (brackets_ && span.depth != open_) {
      close();
      std::fputc('[', stdout);
      open_ = span.depth;
    }
    std::fwrite(span.text.data(), 1, span.text.size(), stdout);
    std::fflush(stdout);
  }

  void close() {
    if (open_ != 0) std::fprintf(stdout, "/%lld]", static_cast<long long>(open_));
    open_ = 0;
  }

  const std::string& text() const { return text_; }

 private:
  bool silent_, brackets_;
  int64_t open_ = 0;  // depth of the run being written
  std::string text_;
};

// Holds text back that may yet become a stop text; of a stop text nothing is ever given out.
class StopFilter {
 public:
  explicit StopFilter(const std::vector<std::string>& stop) : stop_(stop) {
    if (std::find(stop.begin(), stop.end(), "") != stop.end()) {
      throw std::runtime_error("--stop: got an empty string, expected the text to stop at");
    }
  }

  bool stopped() const { return stopped_; }

  // Takes a token's text and gives what can be shown now.
  std::vector<Span> push(Span span) {
    held_.push_back(std::move(span));
    std::string text;
    for (const Span& s : held_) text += s.text;
    size_t shown = text.size();
    for (const std::string& stop : stop_) shown = std::min(shown, text.find(stop));
    stopped_ = shown < text.size();
    if (!stopped_) shown -= longest_beginning(text);
    return take(shown);
  }

  // What was held back and nothing will follow.
  std::vector<Span> finish() { return stopped_ ? std::vector<Span>() : std::move(held_); }

 private:
  // The length of the longest beginning of a stop text that `text` ends with.
  size_t longest_beginning(const std::string& text) const {
    size_t longest = 0;
    for (const std::string& stop : stop_) {
      for (size_t n = longest + 1; n < stop.size(); ++n) {
        if (text.ends_with(std::string_view(stop).substr(0, n))) longest = n;
      }
    }
    return longest;
  }

  std::vector<Span> take(size_t count) {
    std::vector<Span> taken;
    while (count > 0) {
      Span& first = held_.front();
      const size_t n = std::min(count, first.text.size());
      taken.push_back({first.text.substr(0, n), first.depth});
      first.text.erase(0, n);
      if (first.text.empty()) held_.erase(held_.begin());
      count -= n;
    }
    return taken;
  }

  std::vector<std::string> stop_;
  std::vector<Span> held_;
  bool stopped_ = false;
};

// -------------------------------------------------------------------------------------------------------- the text

// One run of the model on one prompt.
struct Generation {
  std::vector<int64_t> prompt, prompt_depth;
  std::vector<int64_t> tokens, depth;  // with those that made a stop text, and the end token
  std::string finish_reason = "interrupted";
  double first_token_s = 0;  // from the start to the first token
  double decode_s = 0;       // spent on all further tokens

  void run(Model& model, const Tokenizer& tokenizer, const Options& options, const Dials& dials, Writer& writer);
  Document statistics(int64_t full) const;
  int64_t fed() const { return std::ssize(prompt) + std::max<int64_t>(0, std::ssize(tokens) - 1); }  // tokens
};

void Generation::run(Model& model, const Tokenizer& tokenizer, const Options& options, const Dials& dials,
                     Writer& writer) {
  const std::vector<int64_t> eos = options.ignore_eos ? std::vector<int64_t>() : model.info().text.eos_tokens;
  const auto ends = [&](int64_t token) { return std::find(eos.begin(), eos.end(), token) != eos.end(); };
  const std::optional<int64_t> limit = model.info().longest();
  Sampler sampler(options.sampling);
  StopFilter filter(options.stop);
  std::vector<int64_t> fed = prompt;
  while (!interrupted) {
    if (std::ssize(tokens) == options.max_new_tokens) {
      finish_reason = "length";
    } else if (!tokens.empty() && ends(tokens.back())) {
      finish_reason = "eos";
    } else if (filter.stopped()) {
      finish_reason = "stop";
    } else if (!tokens.empty() && limit && model.position() >= *limit) {
      finish_reason = "max_seq_len";
    }
    if (finish_reason != "interrupted") break;
    const auto start = Clock::now();
    const bool prefixed = tokens.empty() && (options.prefix.empty() ? model.info().text.prefix : options.prefix == "all");
    const Fed result = model.feed(fed, dials, /*all_logits=*/false, prefixed ? std::ssize(fed) : 0);
    const int64_t token = sampler.pick(result.logits, model.info().text.unused_tokens);
    (tokens.empty() ? first_token_s : decode_s) += seconds_since(start);
    if (tokens.empty()) prompt_depth = result.depth;
    const bool first = tokens.empty() && !tokenizer.reads_text();  // text goes on from the prompt, numbers start anew
    tokens.push_back(token);
    depth.push_back(result.depth.back());
    fed = {token};
    if (ends(token)) continue;
    for (const Span& span : filter.push({tokenizer.decode(token, first), depth.back()})) writer.add(span);
  }
  for (const Span& span : filter.finish()) writer.add(span);
}

// Counts, speeds (tokens/s), time to the first token (s) and loops; null where there was nothing to measure.
Document Generation::statistics(int64_t full) const {
  const bool any = !tokens.empty();
  const double prompt_size = std::ssize(prompt), decoded = std::ssize(tokens) - 1, loops = any ? mean(depth) : 0;
  return Document::object({{"prompt_tokens", prompt.size()},
                       {"prompt_mean_loops", known(any, any ? mean(prompt_depth) : 0)},
                       {"prompt_tokens_per_s", known(any, prompt_size / first_token_s)},
                       {"time_to_first_token_s", known(any, first_token_s)},
                       {"generated_tokens", tokens.size()},
                       {"tokens_per_s", known(decode_s > 0, decoded / decode_s)},
                       {"mean_loops", known(any, loops)},
                       {"max_loops", full},
                       {"iterations_saved", known(any, 1 - loops / full)},
                       {"histogram", histogram(depth, full)},
                       {"finish_reason", finish_reason}});
}

void print_statistics(const Document& s, bool show_depth) {
  const auto value = [&](const char* key) { return s.at(key).get<double>(); };
  const std::string prompt = s.at("prompt_tokens").dump(), generated = s.at("generated_tokens").dump();
  if (s.at("mean_loops").is_null()) {
    std::fprintf(stderr, "prompt %s tokens; stopped before the first new token\n", prompt.c_str());
    return;
  }
  std::fprintf(stderr, "prompt %s tokens at %.1f tokens/s, %.2f loops on average; first token after %.0f ms\n",
               prompt.c_str(), value("prompt_tokens_per_s"), value("prompt_mean_loops"),
               1000 * value("time_to_first_token_s"));
  std::fprintf(stderr, "generated %s tokens", generated.c_str());
  if (!s.at("tokens_per_s").is_null()) std::fprintf(stderr, " at %.1f tokens/s", value("tokens_per_s"));
  const Document& reason = s.at("finish_reason");
  std::fprintf(stderr, ", %.2f of %s loops on average, %.0f%% of the iterations saved%s\n", value("mean_loops"),
               s.at("max_loops").dump().c_str(), 100 * value("iterations_saved"),
               reason == "eos"           ? "; ended by the model"
               : reason == "stop"        ? "; ended at a stop text"
               : reason == "interrupted" ? "; interrupted"
               : reason == "max_seq_len" ? "; ended at the longest text that it takes"
                                          : "");
  if (!show_depth) return;
  std::fprintf(stderr, "tokens by loops:");
  const Document& counts = s.at("histogram");
  for (size_t k = 0; k < counts.size(); ++k) {
    if (counts[k] > 0) std::fprintf(stderr, " %zu:%s", k + 1, counts[k].dump().c_str());
  }
  std::fprintf(stderr, "\n");
}

Document document(const Generation& generation, const std::string& text, const std::string& prompt, const Model& model,
                  const Dials& dials, const Sampling& sampling) {
  Document result = Document::object(
      {{"text", text}, {"tokens", generation.tokens}, {"depth", generation.depth}, {"prompt", prompt}});
  result.update(generation.statistics(model.info().max_loops));
  result["model"] = model.info().name;
  result["runtime"] = "executorch-native";
  result["state_bytes"] = model.state_bytes();
  result["dials"] = document_of(dials);
  result["sampling"] = Document::object({{"temperature", sampling.temperature},
                                         {"top_k", sampling.top_k},
                                         {"top_p", sampling.top_p},
                                         {"seed", sampling.seed}});
  return result;
}

// --------------------------------------------------------------------------------------------------- the command

std::string read_stdin() {
  if (isatty(STDIN_FILENO)) {
    throw std::runtime_error("no prompt; give --prompt TEXT, --file FILE, or pipe text into stdin");
  }
  return std::string(std::istreambuf_iterator<char>(std::cin), {});
}

// The text to continue, exactly as given, or nothing. Throws std::runtime_error where its file is missing or not UTF-8.
std::string read_prompt(const Options& options) {
  if (options.prompt) return *options.prompt;
  const bool piped = options.file.empty() || options.file == "-";
  std::string text = piped ? read_stdin() : read_file(options.file);
  if (text.starts_with("\xef\xbb\xbf")) text.erase(0, 3);  // the mark that some editors and shells put before a text
  const size_t invalid = find_invalid_utf8(text);
  if (invalid != text.npos) {
    throw std::runtime_error((piped ? "stdin" : options.file) + ": not UTF-8 at byte " + std::to_string(invalid) +
                             "; convert it first (iconv -t UTF-8)");
  }
  return text;
}

// What an empty prompt starts from.
std::vector<int64_t> begin_of_text(const ModelInfo& info) {
  if (!info.bos_token) {
    throw std::runtime_error(
        "the prompt is empty and the model has no begin-of-text token; give at least one character");
  }
  return {*info.bos_token};
}

void check_memory(const Options& options, const ModelInfo& info) {
  if (options.no_memory && !info.remembers()) {
    throw std::runtime_error("--no-memory: " + info.name + " has no memory");
  }
}

// --logits: what tests compare, between processors and with PyTorch.
int write_logits(const Options& options) {
  if (options.prompt_tokens.empty()) throw std::runtime_error("--logits: needs --prompt-tokens");
  std::vector<int64_t> parts = options.parts;
  if (parts.empty()) parts.push_back(std::ssize(options.prompt_tokens));
  int64_t left = std::ssize(options.prompt_tokens);
  for (const int64_t count : parts) left = count <= left ? left - count : -1;
  if (left != 0) {
    throw std::runtime_error("--parts: expected numbers that add up to the " +
                             std::to_string(options.prompt_tokens.size()) + " of --prompt-tokens");
  }
  const Package package = Package::open(options.package, kExecutorch);
  const Dials dials = options.dials(package.info());
  check_memory(options, package.info());
  Model model(package, open_executorch(package, options.packed_weights, options.expert_ram));
  if (options.no_memory) model.leave_memory_blank();
  model.set_noise_seed(options.sampling.seed);
  std::span<const int64_t> tokens = options.prompt_tokens;
  std::vector<float> logits;
  std::string depths;
  for (const int64_t count : parts) {
    // A text that is only read has no prefix, unless it is asked for: then the first part is one.
    const bool prefixed = options.prefix == "all" && depths.empty();
    const Fed fed = model.feed(tokens.first(count), dials, /*all_logits=*/true, prefixed ? count : 0);
    tokens = tokens.subspan(count);
    logits.insert(logits.end(), fed.logits.begin(), fed.logits.end());
    for (const int64_t depth : fed.depth) depths += std::to_string(depth) + " ";
  }
  std::ofstream file(options.logits, std::ios::binary);
  file.write(reinterpret_cast<const char*>(logits.data()), logits.size() * sizeof(float));
  if (!file.flush()) throw std::runtime_error(options.logits + ": cannot be written");
  std::puts(depths.c_str());
  if (options.stats) {
    std::fputs(offload_lines(offload_document(model, std::ssize(options.prompt_tokens))).c_str(), stderr);
  }
  return 0;
}

int generate(const Options& options) {
  options.sampling.check();
  if (!options.parts.empty()) throw std::runtime_error("--parts: needs --logits");
  if (options.prompt && !options.file.empty()) {
    throw std::runtime_error("--file: leave out --prompt, or the other way round");
  }
  if (!options.prompt_tokens.empty() && (options.prompt || !options.file.empty())) {
    throw std::runtime_error("--prompt-tokens: leave out --prompt and --file, or the other way round");
  }
  const std::string text = options.prompt_tokens.empty() ? read_prompt(options) : "";
  const Package package = Package::open(options.package, kExecutorch);
  const Dials dials = options.dials(package.info());
  check_memory(options, package.info());
  // Without a tokenizer, ids are read and shown.
  const bool only_ids = !options.prompt_tokens.empty() && !package.holds(kTokenizer);
  const Tokenizer tokenizer = only_ids ? Tokenizer() : Tokenizer::open(package.path(kTokenizer));
  Generation generation;
  generation.prompt = options.prompt_tokens.empty() ? tokenizer.encode(text) : options.prompt_tokens;
  if (generation.prompt.empty()) generation.prompt = begin_of_text(package.info());
  Writer writer(options);
  Model model(package, open_executorch(package, options.packed_weights, options.expert_ram));
  if (options.no_memory) model.leave_memory_blank();
  model.set_noise_seed(options.sampling.seed);
  struct sigaction once = {};  // Ctrl-C ends the text; a second one the program
  once.sa_handler = [](int) { interrupted = 1; };
  once.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &once, nullptr);
  generation.run(model, tokenizer, options, dials, writer);
  package.verification()->await();  // also where it was interrupted before the first call
  if (options.output == "json") {
    Document result = document(generation, writer.text(), text, model, dials, options.sampling);
    if (options.expert_ram) result["expert_ram"] = offload_document(model, generation.fed());
    std::puts(dump(result).c_str());
  } else {
    writer.close();
    if (options.show_depth || !writer.text().ends_with('\n')) std::puts("");
    std::fflush(stdout);
    print_statistics(generation.statistics(model.info().max_loops), options.show_depth);
    if (options.stats) std::fputs(offload_lines(offload_document(model, generation.fed())).c_str(), stderr);
  }
  return generation.finish_reason == "interrupted" ? kInterrupted : 0;
}

// The mapped parts of a program, read where they lie, cannot be read any more: the file is shorter than it was, or its disk is
// gone. The system says so by a signal, after which nothing can be computed.
void report_lost_pages(const std::string& package) {
  static std::string line;
  line = "rmse-runner: error: " + package + ": a file became shorter or unreadable while it was in use; export the package again\n";
  struct sigaction lost = {};
  lost.sa_handler = [](int) {
    [[maybe_unused]] const auto written = write(STDERR_FILENO, line.data(), line.size());
    _exit(kUserError);
  };
  sigaction(SIGBUS, &lost, nullptr);
}

int run(int argc, char** argv) {
  const Options options = Options::parse(argc, argv);
  if (options.stats && !options.expert_ram) throw std::runtime_error("--stats: needs --expert-ram");
  if (options.help) {
    std::fputs(Options::usage().c_str(), stdout);
    return 0;
  }
  report_lost_pages(options.package);
  start_executorch(options.threads);
  if (!options.logits.empty()) return write_logits(options);
  if (!options.bench) return generate(options);
  std::puts(bench(options).c_str());
  return 0;
}

// Says what was wrong, in one line.
int report(std::string line) {
  // Names that come from a file may hold anything: nothing that a terminal would obey.
  std::replace_if(line.begin(), line.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, ' ');
  std::fprintf(stderr, "rmse-runner: error: %s\n", line.c_str());
  return kUserError;
}

}  // namespace
}  // namespace rmse

int main(int argc, char** argv) {
  try {
    const int code = rmse::run(argc, argv);
    if (std::fflush(stdout) != 0 || std::ferror(stdout)) {
      throw std::runtime_error("the output cannot be written; is the disk full?");
    }
    return code;
  } catch (const rmse::ArgumentError& error) {
    std::string flag = error.argument;
    std::replace(flag.begin(), flag.end(), '_', '-');
    return rmse::report("--" + flag + ": " + error.problem);
  } catch (const std::exception& error) {
    return rmse::report(error.what());
  }
}
