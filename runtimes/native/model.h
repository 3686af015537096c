// A looped language model that remembers what it was fed: runtimes/host.py over the methods of an ExecuTorch program.
//
// One block is applied up to K times, and the loop is the host's. So is everything that is kept between calls: the ring
// of keys and values, of which every iteration reads its row where it lies, and the neural memory, written every 64
// tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include "package.h"

namespace rmse {

// The memory of one tensor, zeroed.
class Buffer {
 public:
  explicit Buffer(const TensorSpec& spec);

  const TensorSpec& spec() const { return spec_; }
  size_t nbytes() const { return nbytes_; }
  std::byte* data() const { return bytes_.get(); }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data());
  }
  void copy(const Buffer& other);
  void clear();

 private:
  struct Free {
    void operator()(std::byte* bytes) const;
  };

  TensorSpec spec_;
  size_t nbytes_;
  std::unique_ptr<std::byte[], Free> bytes_;
};

using Buffers = std::map<std::string, Buffer>;  // by the names of their tensors

// The program of a package.
class Program {
 public:
  // `packed_weights`: a file that keeps the weights as XNNPACK packs them, written by the first launch; empty: none.
  Program(const std::string& path, const std::string& packed_weights);

  bool has(const std::string& method) const { return methods_.contains(method); }
  executorch::extension::Module& module() { return module_; }
  [[noreturn]] void refuse(const std::string& what) const;  // with the runtime's own complaint, if there is one

 private:
  std::string path_;
  executorch::extension::Module module_;
  std::unordered_set<std::string> methods_;
};

// One method. It reads and writes the memory that its arguments were bound to.
class Method {
 public:
  // Loads NAME_ROWS. Throws std::runtime_error where the program's method is not what the manifest says.
  Method(Program& program, const ModelInfo& info, const std::string& name, int64_t rows);

  const MethodSpec& spec() const { return spec_; }
  void read(size_t input, std::byte* data);
  void write(size_t output, std::byte* data);
  void run();
  [[noreturn]] void refuse(const std::string& what) const;

 private:
  Program& program_;
  std::string name_;
  MethodSpec spec_;
  std::vector<executorch::extension::TensorPtr> inputs_, outputs_;  // a shape and where the data is
};

// The methods for calls of one number of rows, and the tensors that one gives to the next.
class Calls {
 public:
  // `shared`: tensors that calls of all numbers of rows read.
  Calls(Program& program, const ModelInfo& info, int64_t rows, const Buffers& shared);
  Calls(const Calls&) = delete;

  void prelude(std::span<const int64_t> tokens, int64_t position);
  int64_t loop();  // iterations that ran
  void head() { head_.run(); }
  void commit() { commit_.run(); }

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
  Method prelude_, begin_, step_, head_, commit_;
  std::vector<Row> rows_read_, rows_written_;
  std::vector<Carried> carried_;
};

// What feeding tokens gave.
struct Fed {
  std::vector<float> logits;        // (n or 1, V): for every token fed, or for the last one
  std::vector<int64_t> depth;       // (n,): iterations that each position executed
  std::vector<int64_t> iterations;  // per call, the deepest position's: what the call really cost
};

class Model {
 public:
  // Loads all methods. Throws std::runtime_error: one line saying what is wrong, and what to do.
  explicit Model(const Package& package, const std::string& packed_weights = "");
  Model(const Model&) = delete;

  const ModelInfo& info() const { return info_; }
  int64_t position() const { return position_; }  // tokens fed since `reset`
  size_t state_bytes() const;                     // kept between calls, the same however long the text is
  void leave_memory_blank() { remember_ = false; }

  void reset();
  Fed feed(std::span<const int64_t> tokens, const Dials& dials, bool all_logits = false);

  // For timing the loop alone: a call of as many rows as there are tokens, ready for `loop`.
  Calls& prepare(std::span<const int64_t> tokens, const Dials& dials);

 private:
  void make_shared();
  void make_memory();
  void check(std::span<const int64_t> tokens) const;
  void set(const Dials& dials);
  Calls& calls_of(int64_t rows);
  void keep(const Calls& calls, int64_t count);
  void memorize();

  ModelInfo info_;
  Program program_;
  Buffers shared_;  // dials, state, memory, hits
  std::vector<std::unique_ptr<Calls>> calls_;
  std::unique_ptr<Method> memorize_;  // null: there is no memory
  Buffers blank_, learned_;           // a memory that knows nothing; what `memorize` gives
  int64_t position_ = 0;
  bool remember_ = true;
};

// Starts the engine, which keeps its messages to itself, with as many threads as given; 0: its own choice.
void start_engine(int64_t threads);

}  // namespace rmse
