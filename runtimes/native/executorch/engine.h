// ExecuTorch as the runner uses it: memory of tensors, a program, its methods.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include "../core/package.h"

namespace rmse {

// Starts the engine, which keeps its messages to itself, with as many threads as given; 0: its own choice.
void start_engine(int64_t threads);

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
  // `packed_weights`: see packed_weights.h; empty: none.
  Program(const std::string& path, const std::string& packed_weights);

  bool has(const std::string& method) const { return methods_.contains(method); }
  // Throws std::runtime_error where a method is not what the manifest says. Nothing is loaded.
  void check(const std::string& method, const MethodSpec& spec);
  // The engine, to be asked one thing: what `fail` quotes is about that.
  executorch::extension::Module& engine();
  [[noreturn]] void fail(const std::string& what) const;    // with the engine's own complaint, if it had one
  [[noreturn]] void refuse(const std::string& what) const;  // where it was this runner that found out

 private:
  std::string path_;
  executorch::extension::Module module_;
  std::unordered_set<std::string> methods_;
};

// One method. It reads and writes the memory that its arguments were bound to.
class Method {
 public:
  // Loads NAME_ROWS, which was checked. Throws std::runtime_error where there is none, or the engine cannot load it.
  Method(Program& program, const ModelInfo& info, const std::string& name, int64_t rows);

  const MethodSpec& spec() const { return spec_; }
  void read(size_t input, std::byte* data);
  void write(size_t output, std::byte* data);
  void run();
  [[noreturn]] void refuse(const std::string& what) const;

 private:
  [[noreturn]] void fail(const std::string& what) const;

  Program& program_;
  std::string name_;
  MethodSpec spec_;
  std::vector<executorch::extension::TensorPtr> inputs_, outputs_;  // a shape and where the data is
};

}  // namespace rmse
