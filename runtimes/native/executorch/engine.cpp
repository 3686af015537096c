#include "engine.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <new>
#include <stdexcept>
#include <utility>

#include <executorch/runtime/backend/interface.h>

#include "operators.h"

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

using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;

constexpr size_t kAlignment = 64;
constexpr size_t kSlack = 128;  // bytes: XNNPACK reads a few beyond the end
constexpr char kXnnpack[] = "XnnpackBackend";

}  // namespace

void start_engine(int64_t threads) {
  rmse_take_messages();
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (threads > 0 && (pool == nullptr || !pool->_unsafe_reset_threadpool(static_cast<uint32_t>(threads)))) {
    throw std::runtime_error("--threads: executorch cannot run " + std::to_string(threads) + " threads");
  }
}

// --------------------------------------------------------------------------------------------- memory of a tensor

Buffer::Buffer(const TensorSpec& spec)
    : spec_(spec),
      nbytes_(spec.nbytes()),
      bytes_(new (std::align_val_t{kAlignment}) std::byte[nbytes_ + kSlack]()) {}

void Buffer::Free::operator()(std::byte* bytes) const { operator delete[](bytes, std::align_val_t{kAlignment}); }

void Buffer::copy(const Buffer& other) { std::memcpy(data(), other.data(), nbytes_); }

void Buffer::clear() { std::memset(data(), 0, nbytes_); }

// ------------------------------------------------------------------------------------------------- the program

Program::Program(const std::string& path, const std::string& packed_weights)
    : path_(path),
      // Methods run one after the other: they can have one piece of working memory between them.
      module_(path, Module::LoadMode::Mmap, nullptr, nullptr, nullptr, /*share_memory_arenas=*/true) {
  executorch::runtime::BackendOptions<2> options;
  Error error = options.set_option("weight_cache_enabled", true);  // one packed copy of a weight for all methods
  if (!packed_weights.empty()) {
    executorch::runtime::BackendOptions<1> saving;
    if (error == Error::Ok) error = options.set_option("packed_cache_path", packed_weights.c_str());
    if (error == Error::Ok) error = saving.set_option("save_weight_cache_on_disk", true);
    if (error == Error::Ok) error = executorch::runtime::set_option(kXnnpack, saving.view());
  }
  executorch::runtime::LoadBackendOptionsMap map;
  if (error == Error::Ok) error = map.set_options(kXnnpack, options.view());
  constexpr auto kVerification = executorch::runtime::Program::Verification::InternalConsistency;
  if (error == Error::Ok) error = engine().load(map, kVerification);
  if (error != Error::Ok) fail("executorch cannot load it");
  auto names = engine().method_names();
  if (!names.ok()) fail("executorch cannot list its methods");
  methods_ = std::move(*names);
}

Module& Program::engine() {
  rmse_clear_error();
  return module_;
}

void Program::fail(const std::string& what) const {
  const std::string complaint = rmse_last_error();
  refuse(complaint.empty() ? what : what + " (" + complaint + ")");
}

void Program::refuse(const std::string& what) const {
  throw std::runtime_error(path_ + ": " + what + "; export the package again");
}

// Tensors as the manifest has them and as the program has them.
void Program::check(const std::string& method, const MethodSpec& spec) {
  const auto meta = engine().method_meta(method);
  const auto fits = [](const TensorSpec& tensor, const auto& found) {
    if (!found.ok() || found->scalar_type() != tensor.type) return false;
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

// --------------------------------------------------------------------------------------------------- one method

Method::Method(Program& program, const ModelInfo& info, const std::string& name, int64_t rows)
    : program_(program), name_(name + "_" + std::to_string(rows)) {
  const auto known = info.methods.find(name_);
  if (known == info.methods.end() || !program.has(name_)) {
    program.refuse("holds no " + name + " for " + std::to_string(rows) + " rows");
  }
  spec_ = known->second;
  if (program.engine().load_method(name_) != Error::Ok) program.fail("executorch cannot load " + name_);
  const auto holder = [](const TensorSpec& spec) {
    return executorch::extension::from_blob(nullptr, spec.shape, spec.type);
  };
  std::transform(spec_.inputs.begin(), spec_.inputs.end(), std::back_inserter(inputs_), holder);
  std::transform(spec_.outputs.begin(), spec_.outputs.end(), std::back_inserter(outputs_), holder);
}

void Method::read(size_t input, std::byte* data) {
  inputs_[input]->unsafeGetTensorImpl()->set_data(data);
  if (program_.engine().set_input(name_, EValue(*inputs_[input]), input) != Error::Ok) {
    fail("does not take " + spec_.inputs[input].name);
  }
}

void Method::write(size_t output, std::byte* data) {
  outputs_[output]->unsafeGetTensorImpl()->set_data(data);
  if (program_.engine().set_output(name_, EValue(*outputs_[output]), output) != Error::Ok) {
    fail("does not give " + spec_.outputs[output].name);
  }
}

void Method::run() {
  if (!program_.engine().execute(name_).ok()) fail("failed");
}

void Method::fail(const std::string& what) const { program_.fail(name_ + " " + what); }

void Method::refuse(const std::string& what) const { program_.refuse(name_ + " " + what); }

}  // namespace rmse
