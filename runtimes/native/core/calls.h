// The methods for calls of one number of rows. One block is applied up to K times, and the loop is the host's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine.h"
#include "package.h"

namespace rmse {

// Loads NAME_ROWS. Throws std::runtime_error where the manifest has no such method.
std::unique_ptr<Method> load_method(Engine& engine, const ModelInfo& info, const std::string& name, int64_t rows);

// They, and the tensors that one gives to the next.
class Calls {
 public:
  // `shared`: tensors that calls of all numbers of rows read.
  Calls(Engine& engine, const ModelInfo& info, int64_t rows, const Buffers& shared);
  Calls(const Calls&) = delete;

  void prelude(std::span<const int64_t> tokens, int64_t position);
  int64_t loop();  // iterations that ran
  void head() { head_->run(); }
  void commit() { commit_->run(); }

  int64_t rows() const { return rows_; }
  const Buffer& at(const std::string& name) const { return own_.at(name); }

 private:
  // An argument of `step` that is row k of a stack (K, ...).
  struct Row {
    size_t argument;
    std::byte* stack;
    size_t stride;
  };
  // What one iteration hands to the next: X and next_X, which change places every time.
  struct Carried {
    size_t input, output;
    Buffer *x, *next;
  };

  Buffer& make(const TensorSpec& spec);
  void make_known(const ModelInfo& info);
  Buffer& made_by(Method& method, size_t i, TensorSpec spec);
  void bind_inputs(Method& method, std::vector<Row>& rows);
  void bind_outputs(Method& method, std::string_view prefix = "");
  void bind_step_outputs();

  int64_t rows_, max_loops_;
  const Buffers& shared_;
  Buffers own_;
  std::vector<double> frequencies_;  // of the rotary channels, radians per position
  std::unique_ptr<Method> prelude_, begin_, step_, head_, commit_;
  std::vector<Row> rows_read_, rows_written_;
  std::vector<Carried> carried_;
};

}  // namespace rmse
