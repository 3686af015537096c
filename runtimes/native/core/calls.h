// The methods for calls of one number of rows. One block is applied up to K times, and the loop is the host's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine.h"
#include "info.h"
#include "signatures.h"

namespace rmse {

// Loads NAME_ROWS. Throws std::runtime_error where the manifest has no such method.
std::unique_ptr<Method> load_method(Engine& engine, const ModelInfo& info, const std::string& name, int64_t rows);

// They, and the tensors that one gives to the next.
class Calls {
 public:
  // `shared`: tensors that calls of all numbers of rows read, state among them.
  Calls(Engine& engine, const ModelInfo& info, int64_t rows, const Buffers& shared);
  Calls(const Calls&) = delete;

  // What is shared lies elsewhere now, and the appended state has so many slots.
  void bind(int64_t slots);

  // `noise_seed`: of what the model begins from, where it begins from noise. `prefix`: of the text's first positions, how many
  // see each other whatever their order.
  void prelude(std::span<const int64_t> tokens, int64_t position, uint64_t noise_seed, int64_t prefix);
  int64_t loop();  // iterations that ran
  void coda() { run(coda_); }
  void head() { run(head_); }
  void commit() { run(commit_); }

  int64_t rows() const { return rows_; }
  const Buffer& at(const std::string& name) const { return made_.at(name); }  // what a method gave

 private:
  // An argument of `step` that is row k of a stack (K, ...).
  struct Row {
    size_t argument;
    std::byte* stack;
    size_t stride;
  };
  // Angles of one base that methods take, (1, rows, pairs) each; null: not taken.
  struct Angles {
    float *cos, *sin;
    std::vector<double> frequencies;  // of the rotary channels, radians per position
  };
  // What one iteration hands to the next: X and next_X, which change places every time.
  struct Carried {
    size_t input, output;
    Buffer *x, *next;
  };

  static void run(const std::unique_ptr<Method>& method) {
    if (method != nullptr) method->run();  // a model need not have it
  }
  Buffer& make(const TensorSpec& spec);
  void bind_inputs(Method& method, int64_t slots);
  void bind_outputs(Method& method, std::string_view prefix = "");
  void bind_step_outputs();
  const Buffer& given(const Method& method, const TensorSpec& input);
  void add_angles(const std::string& ending, double theta);
  void fill_angles(int64_t position);
  void fill_noise(int64_t position, uint64_t seed);

  Engine& engine_;
  const ModelInfo& info_;
  int64_t rows_;
  const Buffers& shared_;
  Specs host_;     // what the host gives
  Buffers given_;  // of it, what methods take and is not shared
  Buffers made_;   // by methods
  std::vector<Angles> angles_;
  std::unique_ptr<Method> prelude_, begin_, step_, coda_, head_, commit_;  // coda, commit: null where the model has none
  std::vector<Row> rows_read_, rows_written_;
  std::vector<Carried> carried_;
};

}  // namespace rmse
