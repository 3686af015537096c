// The command line: rmse-run's, or with --bench rmse-bench's.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "../core/package.h"
#include "../core/sampler.h"
#include "../offload/budget.h"

namespace rmse {

struct Options {
  std::string package;
  bool help = false;
  bool bench = false;
  int64_t threads = 0;  // 0: the engine's own choice
  std::string output;   // text, md or json
  std::string packed_weights;
  std::optional<ExpertBudget> expert_ram;  // none: experts are read where the system has mapped them
  std::vector<int64_t> prompt_tokens;
  std::optional<int64_t> max_loops, min_loops;
  std::map<std::string, double> exits;  // thresholds of exit rules, by their dials

  // Writing text.
  std::optional<std::string> prompt;
  std::string prefix;  // all, none; empty: as the model has it
  std::string file;  // that holds the prompt; "-": stdin
  int64_t max_new_tokens = 256;
  Sampling sampling;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  bool no_memory = false;
  bool show_depth = false;
  bool stats = false;
  std::string logits;  // file
  std::vector<int64_t> parts;  // with it: how many tokens are fed at a time

  // Measuring.
  int64_t prefill = 512, decode = 128, repetitions = 5;
  std::vector<int64_t> depths;
  std::string text;  // file

  // Throws std::runtime_error naming the flag and what it expects.
  static Options parse(int argc, const char* const* argv);
  static std::string usage();

  // The model's dials with those of the command line put in. Throws std::runtime_error where one is out of range.
  Dials dials(const ModelInfo& info) const;
};

}  // namespace rmse
