// A package: the folder NAME.rmse/ whose SHA256SUMS lists every other file with its SHA-256, manifest.json included.
//
// All of it is checked before an engine sees a byte: some end the process over damaged files, others compute with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tensor.h"

namespace rmse {

constexpr int64_t kSegment = 64;  // tokens between two writes of the memory; no call crosses a multiple of it

// The quality dial of one call. Loops count from 1; rmse_edge/loop/stop.py has the rules.
struct Dials {
  int64_t max_loops = 1;
  int64_t min_loops = 1;
  double exit_threshold = 1;  // >= 1 disables the gate
  double exit_epsilon = 0;    // 0 disables the delta rule
  double exit_entropy = 0;    // 0 disables the entropy rule

  void check(int64_t trained_depth) const;  // throws std::runtime_error naming the dial and its range
};

// What the manifest says about the model.
struct ModelInfo {
  std::string name, quant;
  int64_t vocab_size, width, max_loops, window, rotary_dims, parameters;
  double rope_theta;
  Dials dials;                               // the checkpoint's own settings
  std::vector<int64_t> chunks;               // rows of the calls that exist, ascending; the first is 1
  std::vector<TensorSpec> state;             // (K, ...), ring axis -2
  std::map<std::string, std::string> rings;  // state name -> the result of commit that fills it
  std::vector<TensorSpec> memory;            // empty: the model has none
  std::optional<int64_t> max_seq_len, bos_token;
  std::vector<int64_t> eos_tokens;             // each of them ends a text
  std::vector<std::pair<int64_t, int64_t>> unused_tokens;  // ranges [first, end) of ids that are never to be drawn
  bool entropy_rule;  // whether exits can look at the entropy
  std::string config;  // of the checkpoint, its config.json
  std::map<std::string, MethodSpec> methods;
};

class Package {
 public:
  // Throws std::runtime_error: one line saying what is wrong with which file, and what to do.
  // `target`: what it must have been made for.
  static Package open(const std::string& folder, const std::string& target);

  const std::string& folder() const { return folder_; }
  const ModelInfo& info() const { return info_; }
  uint64_t nbytes() const { return nbytes_; }              // of all files
  const std::string& program() const { return program_; }  // path of the engine's file
  const std::string& program_digest() const { return program_digest_; }  // SHA-256 of it
  std::string path(const std::string& name) const;         // of a listed file; std::runtime_error where it is none

 private:
  void read_sums();
  void check_files(const std::map<std::string, int64_t>& sizes);

  std::string folder_;
  std::map<std::string, std::string> digests_;  // SHA-256 of every file but SHA256SUMS, by its name
  ModelInfo info_;
  uint64_t nbytes_ = 0;
  std::string program_, program_digest_;
};

}  // namespace rmse
