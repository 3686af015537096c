// The file of --packed-weights: a cache of the weights as XNNPACK packs them, which it makes where there is none.
//
// XNNPACK takes such a file as it is, and computes with damaged weights without a word. So a second file, its seal
// FILE.sha256, says which bytes the first one holds and which program they were made from.
#pragma once

#include <string>

namespace rmse {

class PackedWeights {
 public:
  // Removes a file that is damaged, unfinished or another program's; empty `file`: there is no cache. Throws
  // std::runtime_error where the file could not be written, or is something else than packed weights.
  PackedWeights(const std::string& file, const std::string& program_digest);

  // What the engine is to read, or to write where it is not there; empty: none.
  const std::string& path() const { return path_; }

  // Seals what the engine wrote. To be called when it has loaded all methods.
  void seal() const;

 private:
  std::string content_of_seal() const;
  void make_way() const;

  std::string path_, program_digest_;
  bool fits_ = true;  // there is nothing to seal
};

}  // namespace rmse
