#include "options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string_view>

#include "../core/text.h"

namespace rmse {
namespace {

constexpr int64_t kMostThreads = 1024;  // the engine ends the process where the system gives it no more

// One flag: how it is written, what it takes (nothing: it is a switch), and what it does.
struct Flag {
  std::string_view name, letter, value, help;
  std::function<void(const std::string&)> set;
};

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + " (see rmse-runner --help)"); }

[[noreturn]] void unfit(const std::string& got, const std::string& expected) {
  throw std::invalid_argument("got '" + got + "', expected " + expected);
}

template <typename Integer>
Integer whole(const std::string& text, Integer least) {
  Integer value = 0;
  const char* last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), last, value);
  if (error != std::errc() || end != last || value < least) {
    unfit(text, "a whole number of at least " + std::to_string(least));
  }
  return value;
}

int64_t thread_count(const std::string& text) {
  const auto count = whole<int64_t>(text, 1);
  if (count > kMostThreads) unfit(text, "at most " + std::to_string(kMostThreads));
  return count;
}

double number(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !std::isfinite(value)) unfit(text, "a number");
  return value;
}

double non_negative(const std::string& text) {
  if (number(text) < 0) unfit(text, "a number of at least 0");
  return number(text);
}

double positive(const std::string& text) {
  if (number(text) <= 0) unfit(text, "a number above 0");
  return number(text);
}

std::string utf8(const std::string& text) {
  const size_t invalid = find_invalid_utf8(text);
  if (invalid != text.npos) throw std::invalid_argument("not UTF-8 at byte " + std::to_string(invalid));
  return text;
}

std::vector<int64_t> list(const std::string& text, int64_t least) {
  std::vector<int64_t> values;
  for (size_t start = 0; start <= text.size();) {
    const size_t end = std::min(text.find(',', start), text.size());
    values.push_back(whole<int64_t>(text.substr(start, end - start), least));
    start = end + 1;
  }
  return values;
}

void choose(std::string& chosen, const std::string& text, const char* usual, const char* other) {
  if (text != usual && text != other) unfit(text, std::string(usual) + " or " + other);
  chosen = text;
}

// --exit-cosine of exit_cosine.
std::string flag_of(const char* dial) {
  std::string flag = std::string("--") + dial;
  std::replace(flag.begin(), flag.end(), '_', '-');
  return flag;
}

std::vector<Flag> exit_flags(Options& o) {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found;
    for (const ExitDial& dial : kExitDials) found.push_back(flag_of(dial.name));
    return found;
  }();
  std::vector<Flag> flags;
  for (size_t i = 0; i < kExitDials.size(); ++i) {
    const ExitDial& dial = kExitDials[i];
    flags.push_back({names[i], "", dial.symbol, dial.help, [&o, &dial](const std::string& v) {
                       o.exits[dial.name] = dial.least < 0                ? number(v)
                                            : dial.off > 0                  ? positive(v)
                                            : dial.dtype == Dtype::kInt64 ? static_cast<double>(whole<int64_t>(v, 0))
                                                                          : non_negative(v);
                     }});
  }
  return flags;
}

std::vector<Flag> common_flags(Options& o) {
  std::vector<Flag> flags = {
      {"--prompt-tokens", "", "N,N,...", "token ids to read instead of a text",
       [&](const std::string& v) { o.prompt_tokens = list(v, 0); }},
      {"--max-loops", "", "N", "iterations at most",
       [&](const std::string& v) { o.max_loops = whole<int64_t>(v, 1); }},
      {"--min-loops", "", "N", "iterations before a token may stop",
       [&](const std::string& v) { o.min_loops = whole<int64_t>(v, 1); }},
  };
  std::ranges::move(exit_flags(o), std::back_inserter(flags));
  const std::vector<Flag> others = {
      {"--threads", "-t", "N", "threads (the engine's own choice)",
       [&](const std::string& v) { o.threads = thread_count(v); }},
      {"--packed-weights", "", "FILE", "a cache, made if it is not there: the weights as the engine packs them",
       [&](const std::string& v) { o.packed_weights = v; }},
      {"--expert-ram", "", "SIZE|N%|auto", "keep so much of the experts in memory, read the others when they are needed",
       [&](const std::string& v) { o.expert_ram = ExpertBudget::parse(v); }},
      {"--help", "-h", "", "show this", [&](const std::string&) { o.help = true; }},
  };
  flags.insert(flags.end(), others.begin(), others.end());
  return flags;
}

std::vector<Flag> run_flags(Options& o) {
  return {
      {"--prompt", "-p", "TEXT", "text to continue; without it, all of stdin",
       [&](const std::string& v) { o.prompt = utf8(v); }},
      {"--file", "-f", "FILE", "the prompt is in a UTF-8 file, taken as it is; - for stdin",
       [&](const std::string& v) { o.file = v; }},
      {"--prefix", "", "all|none", "positions of the prompt see each other whatever their order (all, if the model can)",
       [&](const std::string& v) { choose(o.prefix, v, "all", "none"); }},
      {"--max-new-tokens", "-n", "N", "tokens to write at most (256)",
       [&](const std::string& v) { o.max_new_tokens = whole<int64_t>(v, 1); }},
      {"--temperature", "", "T", "0: the likeliest token, always (0.8)",
       [&](const std::string& v) { o.sampling.temperature = number(v); }},
      {"--top-k", "", "K", "draw from the K likeliest tokens; 0: all (0)",
       [&](const std::string& v) { o.sampling.top_k = whole<int64_t>(v, 0); }},
      {"--top-p", "", "P", "draw from the likeliest tokens of mass P (1)",
       [&](const std::string& v) { o.sampling.top_p = number(v); }},
      {"--seed", "", "N", "the same seed draws the same tokens on every runtime (0)",
       [&](const std::string& v) { o.sampling.seed = whole<uint64_t>(v, 0); }},
      {"--stop", "", "TEXT", "end before this text; repeatable",
       [&](const std::string& v) { o.stop.push_back(utf8(v)); }},
      {"--ignore-eos", "", "", "go on after the model's end tokens", [&](const std::string&) { o.ignore_eos = true; }},
      {"--no-memory", "", "", "leave the neural memory blank", [&](const std::string&) { o.no_memory = true; }},
      {"--show-depth", "", "", "mark every token with the loops it took: [ROM/5][EO/3]",
       [&](const std::string&) { o.show_depth = true; }},
      {"--stats", "", "", "with --expert-ram: what it read and what it waited for",
       [&](const std::string&) { o.stats = true; }},
      {"--output", "-o", "text|json", "json: one document at the end",
       [&](const std::string& v) { choose(o.output, v, "text", "json"); }},
      {"--logits", "", "FILE", "only feed --prompt-tokens: float32 logits to FILE, depths to stdout",
       [&](const std::string& v) { o.logits = v; }},
      {"--parts", "", "N,N,...", "with --logits: tokens to feed at a time, as a conversation does (all at once)",
       [&](const std::string& v) { o.parts = list(v, 1); }},
  };
}

std::vector<Flag> bench_flags(Options& o) {
  return {
      {"--bench", "", "", "measure speed instead of writing text", [&](const std::string&) { o.bench = true; }},
      {"--prompt", "-p", "N", "tokens of a prompt, pp in the table; 0: none (512)",
       [&](const std::string& v) { o.prefill = whole<int64_t>(v, 0); }},
      {"--generate", "-n", "N", "tokens to generate, tg in the table; 0: none (128)",
       [&](const std::string& v) { o.decode = whole<int64_t>(v, 0); }},
      {"--depths", "-d", "N,N,...", "fixed depths (full, a half and a third)",
       [&](const std::string& v) { o.depths = list(v, 1); }},
      {"--repetitions", "-r", "N", "timed, after one warm-up (5)",
       [&](const std::string& v) { o.repetitions = whole<int64_t>(v, 1); }},
      {"--text", "", "FILE", "text to read (the package's sample.txt, or made-up tokens)",
       [&](const std::string& v) { o.text = v; }},
      {"--output", "-o", "md|json", "a table, or for programs",
       [&](const std::string& v) { choose(o.output, v, "md", "json"); }},
  };
}

std::string lines_of(const std::vector<Flag>& flags) {
  std::string lines;
  for (const Flag& flag : flags) {
    std::string line = "  ";
    if (!flag.letter.empty()) line.append(flag.letter).append(", ");
    line.append(flag.name);
    if (!flag.value.empty()) line.append(" ").append(flag.value);
    line.resize(std::max<size_t>(line.size() + 2, 30), ' ');
    lines += line.append(flag.help) + "\n";
  }
  return lines;
}

}  // namespace

Options Options::parse(int argc, const char* const* argv) {
  Options options;
  const std::vector<std::string> words(argv + 1, argv + argc);
  const bool bench = std::find(words.begin(), words.end(), "--bench") != words.end();
  options.output = bench ? "md" : "text";
  std::vector<Flag> flags = bench ? bench_flags(options) : run_flags(options);
  std::ranges::move(common_flags(options), std::back_inserter(flags));
  const auto find = [&](const std::string& word) {
    const auto named = [&](const Flag& f) { return !word.empty() && (word == f.name || word == f.letter); };
    return std::find_if(flags.begin(), flags.end(), named);
  };
  for (size_t i = 0; i < words.size(); ++i) {
    if (!words[i].starts_with('-')) {
      if (!options.package.empty()) fail("unknown argument " + words[i]);
      options.package = words[i];
      continue;
    }
    const size_t equals = words[i].starts_with("--") ? words[i].find('=') : words[i].npos;
    const std::string word = words[i].substr(0, equals);
    const auto flag = find(word);
    if (flag == flags.end()) fail("unknown argument " + word);
    std::string value;
    if (equals != words[i].npos) {
      if (flag->value.empty()) fail(word + ": takes no value");
      value = words[i].substr(equals + 1);
    } else if (!flag->value.empty()) {
      if (i + 1 == words.size() || find(words[i + 1]) != flags.end()) fail(word + ": expected one argument");
      value = words[++i];
    }
    try {
      flag->set(value);
    } catch (const std::invalid_argument& error) {
      fail(word + ": " + error.what());
    }
  }
  if (options.package.empty() && !options.help) fail("missing PACKAGE");
  return options;
}

std::string Options::usage() {
  Options unused;
  return "usage: rmse-runner PACKAGE [options]\n\n"
         "Continue a prompt. Text goes to stdout, statistics to stderr. With --bench, time prefill (pp), decoding\n"
         "(tg) and the loop alone, at fixed depths and adaptive, interleaved.\n\n"
         "text:\n" +
         lines_of(run_flags(unused)) + "\nbench:\n" + lines_of(bench_flags(unused)) + "\nboth:\n" +
         lines_of(common_flags(unused)) + "\nLoops count from 1; the checkpoint's own dials hold unless given. Chat templates,\n"
         "sessions and knowledge bases are rmse-run's.\n";
}

Dials Options::dials(const ModelInfo& info) const {
  Dials dials = info.dials;
  for (const ExitDial& dial : kExitDials) {
    const auto chosen = exits.find(dial.name);
    if (chosen == exits.end()) continue;
    if (chosen->second != dial.off && !info.has_rule(dial.name)) {
      std::string rules;
      for (const std::string& known : info.rules) rules += (rules.empty() ? "" : ", ") + known;
      throw std::runtime_error(flag_of(dial.name) + ": " + info.name + " has no such rule; it has " + rules);
    }
    dials.*dial.value = chosen->second;
  }
  if (max_loops) dials.min_loops = std::min(dials.min_loops, *max_loops);
  dials.max_loops = max_loops.value_or(dials.max_loops);
  dials.min_loops = min_loops.value_or(dials.min_loops);
  dials.check(info.max_loops, info.untrained_loops);
  return dials;
}

}  // namespace rmse
