#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <utility>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/interface.h>

#include "operators.h"
#include "packed_weights.h"

// The wheel brings the thread pool, but not its header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace rmse {
namespace {

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

constexpr char kMagic[] = "ET12";  // bytes 4..8 of a program
constexpr char kXnnpack[] = "XnnpackBackend";

ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return ScalarType::Float;
    case Dtype::kFloat16: return ScalarType::Half;
    case Dtype::kBfloat16: return ScalarType::BFloat16;
    case Dtype::kInt64: return ScalarType::Long;
    case Dtype::kInt32: return ScalarType::Int;
    case Dtype::kInt8: return ScalarType::Char;
    case Dtype::kUint8: return ScalarType::Byte;
    case Dtype::kBool: break;
  }
  return ScalarType::Bool;
}

// The runtime ends the process over other bytes.
std::string checked_program(const std::string& path) {
  char start[8] = {};
  std::ifstream(path, std::ios::binary).read(start, sizeof start);
  if (std::memcmp(start + 4, kMagic, 4) != 0) {
    throw std::runtime_error(path + ": is not an ExecuTorch program (" + kMagic + "); export the package again");
  }
  return path;
}

// Gives the pages of a file that this process has mapped back to the system; they return when they are read, from the
// system's cache. XNNPACK has packed its weights into memory of its own by now, and experts are read one by one.
void release_mapped(const std::string& path) {
#if defined(MADV_DONTNEED)
  std::error_code ignored;
  const std::string name = std::filesystem::canonical(path, ignored).string();
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    uintptr_t start = 0, end = 0;
    int at = 0;  // of the name
    const int found = std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %*s %*s %*s %*s %n", &start, &end, &at);
    if (found == 2 && line.compare(at, line.npos, name) == 0) {
      madvise(reinterpret_cast<void*>(start), end - start, MADV_DONTNEED);  // a refusal costs nothing but memory
    }
  }
#endif
}

// `what`, with the engine's own complaint about what it was asked last, if it had one.
std::string with_complaint(const std::string& what) {
  const std::string complaint = rmse_last_error();
  return complaint.empty() ? what : what + " (" + complaint + ")";
}

// The engine, to be asked one thing: what a message quotes is about that.
Module& ask(Module& module) {
  rmse_clear_error();
  return module;
}

// ---------------------------------------------------------------------------------------------------- one method

class ExecutorchMethod final : public Method {
 public:
  // `offload`: of the engine; null: experts are read where they are mapped.
  ExecutorchMethod(const std::string& program, Module& module, const Offload* offload, const std::string& name,
                   const MethodSpec& spec)
      : Method(program, name, spec), module_(module), offload_(offload) {
    std::transform(spec.inputs.begin(), spec.inputs.end(), std::back_inserter(inputs_), holder);
    std::transform(spec.outputs.begin(), spec.outputs.end(), std::back_inserter(outputs_), holder);
    bound_.resize(outputs_.size());
  }

  void resize(size_t input, int64_t slots) override { inputs_[input] = holder(spec().inputs[input].of_slots(slots)); }

  void read(size_t input, std::byte* data) override {
    inputs_[input]->unsafeGetTensorImpl()->set_data(data);
    if (ask(module_).set_input(name(), EValue(*inputs_[input]), input) != Error::Ok) {
      refuse(with_complaint("does not take " + spec().inputs[input].name));
    }
  }

  void write(size_t output, std::byte* data) override {
    bound_[output] = data;
    outputs_[output]->unsafeGetTensorImpl()->set_data(data);
    if (ask(module_).set_output(name(), EValue(*outputs_[output]), output) != Error::Ok) {
      refuse(with_complaint("does not give " + spec().outputs[output].name));
    }
  }

  void run() override {
    const auto given = ask(module_).execute(name());
    if (!given.ok() && offload_ != nullptr && !offload_->problem().empty()) throw std::runtime_error(offload_->problem());
    if (!given.ok()) refuse(with_complaint("failed"));
    // What a model gives under two names is one value of the program, and lies where it was bound to last.
    for (size_t i = 0; i < bound_.size(); ++i) {
      const void* data = (*given)[i].toTensor().const_data_ptr();
      if (data != bound_[i]) std::memcpy(bound_[i], data, (*given)[i].toTensor().nbytes());
    }
  }

 private:
  static TensorPtr holder(const TensorSpec& tensor) {
    return executorch::extension::from_blob(nullptr, tensor.shape, scalar_type(tensor.dtype));
  }

  Module& module_;
  const Offload* offload_;
  std::vector<TensorPtr> inputs_, outputs_;  // a shape and where the data is
  std::vector<std::byte*> bound_;            // where results are to be
};

// ------------------------------------------------------------------------------------------------- the program

class ExecutorchEngine final : public Engine {
 public:
  ExecutorchEngine(const Package& package, const std::string& packed_weights, const std::optional<ExpertBudget>& expert_ram)
      : Engine(checked_program(package.program())),
        verification_(package.verification()),
        budget_(expert_ram),
        offload_(expert_ram ? std::make_unique<Offload>(program()) : nullptr),
        packed_weights_(packed_weights, package.program_digest()),
        // Methods run one after the other: they can have one piece of working memory between them.
        module_(program(), Module::LoadMode::Mmap, nullptr, nullptr, nullptr, /*share_memory_arenas=*/true) {
    executorch::runtime::BackendOptions<2> options;
    Error error = options.set_option("weight_cache_enabled", true);  // one packed copy of a weight for all methods
    if (!packed_weights_.path().empty()) {
      executorch::runtime::BackendOptions<1> saving;
      if (error == Error::Ok) error = options.set_option("packed_cache_path", packed_weights_.path().c_str());
      if (error == Error::Ok) error = saving.set_option("save_weight_cache_on_disk", true);
      if (error == Error::Ok) error = executorch::runtime::set_option(kXnnpack, saving.view());
    }
    executorch::runtime::LoadBackendOptionsMap map;
    if (error == Error::Ok) error = map.set_options(kXnnpack, options.view());
    constexpr auto kVerification = executorch::runtime::Program::Verification::InternalConsistency;
    if (error == Error::Ok) error = ask(module_).load(map, kVerification);
    if (error != Error::Ok) refuse(with_complaint("executorch cannot load it"));
  }

  // Tensors as the manifest has them and as the program has them.
  void check(const std::string& method, const MethodSpec& spec) override {
    const auto meta = ask(module_).method_meta(method);
    const auto fits = [](const TensorSpec& tensor, const auto& found) {
      if (!found.ok() || found->scalar_type() != scalar_type(tensor.dtype)) return false;
      const auto sizes = found->sizes();
      return std::equal(sizes.begin(), sizes.end(), tensor.shape.begin(), tensor.shape.end());
    };
    if (!meta.ok()) refuse("holds no " + method + ", which the manifest has");
    if (meta->num_inputs() != spec.inputs.size() || meta->num_outputs() != spec.outputs.size()) {
      refuse(method + " takes or gives another number of tensors than the manifest says");
    }
    for (size_t i = 0; i < spec.inputs.size(); ++i) {
      if (fits(spec.inputs[i], meta->input_tensor_meta(i))) continue;
      refuse(method + " takes " + spec.inputs[i].name + " in another form than the manifest says");
    }
    for (size_t i = 0; i < spec.outputs.size(); ++i) {
      if (fits(spec.outputs[i], meta->output_tensor_meta(i))) continue;
      refuse(method + " gives " + spec.outputs[i].name + " in another form than the manifest says");
    }
  }

  std::unique_ptr<Method> load(const std::string& method, const MethodSpec& spec) override {
    if (ask(module_).load_method(method) != Error::Ok) refuse(with_complaint("executorch cannot load " + method));
    return std::make_unique<ExecutorchMethod>(program(), module_, offload_.get(), method, spec);
  }

  void finish_loading() override {
    if (!packed_weights_.path().empty()) verification_->await();  // a seal outlives the process
    packed_weights_.seal();
    release_mapped(program());
  }

  bool wants_trial() const override { return offload_ != nullptr; }

  void finish_trial() override { offload_->begin(*budget_); }

  void at_loop(int64_t k) override {
    if (offload_ != nullptr) offload_->set_loop(k);
  }

  Offload* offload() { return offload_.get(); }

 private:
  std::shared_ptr<Verification> verification_;  // of the package
  std::optional<ExpertBudget> budget_;
  std::unique_ptr<Offload> offload_;  // outlives the module, whose operators ask it
  PackedWeights packed_weights_;
  Module module_;
};

}  // namespace

void start_executorch(int64_t threads) {
  rmse_take_messages();
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (threads > 0 && (pool == nullptr || !pool->_unsafe_reset_threadpool(static_cast<uint32_t>(threads)))) {
    throw std::runtime_error("--threads: executorch cannot run " + std::to_string(threads) + " threads");
  }
}

std::unique_ptr<Engine> open_executorch(const Package& package, const std::string& packed_weights,
                                        const std::optional<ExpertBudget>& expert_ram) {
  return std::make_unique<ExecutorchEngine>(package, packed_weights, expert_ram);
}

Offload* offload_of(Engine& engine) {
  const auto own = dynamic_cast<ExecutorchEngine*>(&engine);
  return own == nullptr ? nullptr : own->offload();
}

}  // namespace rmse
