// What the model asks of an engine: that it loads the methods of a program, and runs them on memory it is given. An
// engine implements these two classes (executorch/engine.cpp); the model knows no other thing about it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "tensor.h"

namespace rmse {

// One loaded method. It reads and writes the memory that its arguments were bound to last. All of it throws
// std::runtime_error, one line, where the engine fails.
class Method {
 public:
  Method(std::string program, std::string name, MethodSpec spec)
      : program_(std::move(program)), name_(std::move(name)), spec_(std::move(spec)) {}
  Method(const Method&) = delete;
  virtual ~Method() = default;

  // How long an input is that grows with the appended state. Its data is bound anew afterwards.
  virtual void resize(size_t input, int64_t slots) = 0;
  virtual void read(size_t input, std::byte* data) = 0;
  virtual void write(size_t output, std::byte* data) = 0;
  virtual void run() = 0;

  const std::string& name() const { return name_; }
  const MethodSpec& spec() const { return spec_; }
  [[noreturn]] void refuse(const std::string& what) const {
    throw std::runtime_error(program_ + ": " + name_ + " " + what + "; export the package again");
  }

 private:
  std::string program_, name_;
  MethodSpec spec_;
};

class Engine {
 public:
  explicit Engine(std::string program) : program_(std::move(program)) {}
  Engine(const Engine&) = delete;
  virtual ~Engine() = default;

  // Throws std::runtime_error where a method is not what the manifest says of it. Nothing is loaded.
  virtual void check(const std::string& method, const MethodSpec& spec) = 0;
  // Loads a method that was checked.
  virtual std::unique_ptr<Method> load(const std::string& method, const MethodSpec& spec) = 0;
  // All methods are loaded: what was only needed for that may go.
  virtual void finish_loading() {}
  // Whether it has to see a token pass through the model before it can be used; what comes out is thrown away.
  virtual bool wants_trial() const { return false; }
  virtual void finish_trial() {}
  // Which iteration the methods that run next are of; -1: they are outside of the loop.
  virtual void at_loop(int64_t) {}

  const std::string& program() const { return program_; }  // the path of its file
  [[noreturn]] void refuse(const std::string& what) const {
    throw std::runtime_error(program_ + ": " + what + "; export the package again");
  }

 private:
  std::string program_;
};

}  // namespace rmse
