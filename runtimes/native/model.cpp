#include "model.h"

#include <sys/mman.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <new>
#include <numeric>
#include <stdexcept>

#include <executorch/runtime/backend/interface.h>

// operators.cpp
extern "C" void rmse_take_messages();
extern "C" const char* rmse_last_error();

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
using executorch::runtime::Error;
using executorch::runtime::EValue;

// Prefill calls have 64 rows, decode calls one. Up to this many rows, single calls beat a padded call.
constexpr int64_t kSingleCalls = 6;
constexpr size_t kAlignment = 64;
constexpr size_t kSlack = 128;  // bytes: XNNPACK reads a few beyond the end
constexpr char kXnnpack[] = "XnnpackBackend";
constexpr size_t kLongestOption = executorch::runtime::kMaxOptionValueLength - 1;

// Splits `count` tokens from `position` on into calls: (rows of the call, tokens in it).
std::vector<std::pair<int64_t, int64_t>> plan_calls(int64_t position, int64_t count, const std::vector<int64_t>& rows) {
  std::vector<std::pair<int64_t, int64_t>> calls;
  while (count > 0) {
    const int64_t n = std::min({count, rows.back(), kSegment - position % kSegment});
    if (n <= kSingleCalls) {
      calls.insert(calls.end(), n, {rows.front(), 1});
    } else {
      calls.emplace_back(*std::lower_bound(rows.begin(), rows.end(), n), n);
    }
    position += n;
    count -= n;
  }
  return calls;
}

bool is_row_of(const TensorSpec& row, const TensorSpec& stack) {
  return row.type == stack.type && !stack.shape.empty() &&
         std::equal(row.shape.begin(), row.shape.end(), stack.shape.begin() + 1, stack.shape.end());
}

TensorSpec stack_of(const TensorSpec& row, int64_t depth) {
  TensorSpec stack = row;
  stack.shape.insert(stack.shape.begin(), static_cast<int32_t>(depth));
  return stack;
}

TensorSpec without(std::string_view prefix, TensorSpec spec) {
  if (spec.name.starts_with(prefix)) spec.name.erase(0, prefix.size());
  return spec;
}

void require(const Method& method, const std::string& output) {
  const std::vector<TensorSpec>& outputs = method.spec().outputs;
  const bool given = std::any_of(outputs.begin(), outputs.end(), [&](const TensorSpec& t) { return t.name == output; });
  if (!given) method.refuse("gives no " + output);
}

// Gives the pages of a file that this process has mapped back to the system; they return when they are read. XNNPACK
// has packed its weights into memory of its own by now, and experts are read from the file one by one.
void release_mapped(const std::string& path) {
#if defined(MADV_PAGEOUT)
  std::error_code ignored;
  const std::string name = std::filesystem::canonical(path, ignored).string();
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    uintptr_t start = 0, end = 0;
    int at = 0;  // of the name
    const int found = std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %*s %*s %*s %*s %n", &start, &end, &at);
    if (found == 2 && line.compare(at, line.npos, name) == 0) {
      madvise(reinterpret_cast<void*>(start), end - start, MADV_PAGEOUT);  // a refusal costs nothing but memory
    }
  }
#endif
}

}  // namespace

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
    // The engine would go on without a word, and pack the weights again at every launch.
    if (!std::filesystem::is_directory(std::filesystem::absolute(packed_weights).parent_path())) {
      throw std::runtime_error(packed_weights + ": there is no such folder to write it into; make it first");
    }
    if (packed_weights.size() > kLongestOption) {
      throw std::runtime_error(packed_weights + ": the path is longer than the " + std::to_string(kLongestOption) +
                               " bytes that ExecuTorch takes; choose another");
    }
    executorch::runtime::BackendOptions<1> saving;
    if (error == Error::Ok) error = options.set_option("packed_cache_path", packed_weights.c_str());
    if (error == Error::Ok) error = saving.set_option("save_weight_cache_on_disk", true);
    if (error == Error::Ok) error = executorch::runtime::set_option(kXnnpack, saving.view());
  }
  executorch::runtime::LoadBackendOptionsMap map;
  if (error == Error::Ok) error = map.set_options(kXnnpack, options.view());
  constexpr auto kVerification = executorch::runtime::Program::Verification::InternalConsistency;
  if (error == Error::Ok) error = module_.load(map, kVerification);
  if (error != Error::Ok) refuse("executorch cannot load it");
  auto names = module_.method_names();
  if (!names.ok()) refuse("executorch cannot list its methods");
  methods_ = std::move(*names);
}

void Program::refuse(const std::string& what) const {
  const std::string complaint = rmse_last_error();
  throw std::runtime_error(path_ + ": " + what + (complaint.empty() ? "" : " (" + complaint + ")") +
                           "; export the package again");
}

// --------------------------------------------------------------------------------------------------- one method

Method::Method(Program& program, const ModelInfo& info, const std::string& name, int64_t rows)
    : program_(program), name_(name + "_" + std::to_string(rows)) {
  const auto known = info.methods.find(name_);
  if (known == info.methods.end() || !program.has(name_)) {
    program.refuse("holds no " + name + " for " + std::to_string(rows) + " rows");
  }
  spec_ = known->second;
  if (program.module().load_method(name_) != Error::Ok) program.refuse("executorch cannot load " + name_);
  const auto meta = program.module().method_meta(name_);
  const auto agree = [](const TensorSpec& spec, const auto& tensor) {
    if (!tensor.ok() || tensor->scalar_type() != spec.type) return false;
    const auto sizes = tensor->sizes();
    return std::equal(sizes.begin(), sizes.end(), spec.shape.begin(), spec.shape.end());
  };
  bool agreed = meta.ok() && meta->num_inputs() == spec_.inputs.size() && meta->num_outputs() == spec_.outputs.size();
  for (size_t i = 0; agreed && i < spec_.inputs.size(); ++i) {
    agreed = agree(spec_.inputs[i], meta->input_tensor_meta(i));
  }
  for (size_t i = 0; agreed && i < spec_.outputs.size(); ++i) {
    agreed = agree(spec_.outputs[i], meta->output_tensor_meta(i));
  }
  if (!agreed) refuse("is not the method that the manifest describes");
  const auto holder = [](const TensorSpec& spec) {
    return executorch::extension::from_blob(nullptr, spec.shape, spec.type);
  };
  std::transform(spec_.inputs.begin(), spec_.inputs.end(), std::back_inserter(inputs_), holder);
  std::transform(spec_.outputs.begin(), spec_.outputs.end(), std::back_inserter(outputs_), holder);
}

void Method::read(size_t input, std::byte* data) {
  inputs_[input]->unsafeGetTensorImpl()->set_data(data);
  if (program_.module().set_input(name_, EValue(*inputs_[input]), input) != Error::Ok) {
    refuse("does not take " + spec_.inputs[input].name);
  }
}

void Method::write(size_t output, std::byte* data) {
  outputs_[output]->unsafeGetTensorImpl()->set_data(data);
  if (program_.module().set_output(name_, EValue(*outputs_[output]), output) != Error::Ok) {
    refuse("does not give " + spec_.outputs[output].name);
  }
}

void Method::run() {
  if (!program_.module().execute(name_).ok()) refuse("failed");
}

void Method::refuse(const std::string& what) const { program_.refuse(name_ + " " + what); }

// ------------------------------------------------------------------------------------------------------ one call

Calls::Calls(Program& program, const ModelInfo& info, int64_t rows, const Buffers& shared)
    : rows_(rows),
      max_loops_(info.max_loops),
      shared_(shared),
      prelude_(program, info, "prelude", rows),
      begin_(program, info, "begin", rows),
      step_(program, info, "step", rows),
      head_(program, info, "head", rows),
      commit_(program, info, "commit", rows) {
  make_known(info);
  bind_step_outputs();
  for (Method* method : {&prelude_, &head_, &commit_}) bind_outputs(*method);
  bind_outputs(begin_, "first_");  // first_X is X before the first iteration
  bind_inputs(step_, rows_read_);
  for (Method* method : {&prelude_, &begin_, &head_, &commit_}) {
    std::vector<Row> rows_of_stacks;
    bind_inputs(*method, rows_of_stacks);
    if (!rows_of_stacks.empty()) method->refuse("takes rows of what is kept, as only step does");
  }
  for (const char* name : {"next_h", "next_depth", "any_active"}) require(step_, name);
  require(head_, "logits");
  for (const auto& [_, source] : info.rings) require(commit_, source);
}

// What this class itself reads and writes: where a call stands, and what it is to give. All else is only passed on.
void Calls::make_known(const ModelInfo& info) {
  const auto rows = static_cast<int32_t>(rows_), pairs = static_cast<int32_t>(info.rotary_dims / 2);
  make({"tokens", ScalarType::Long, {1, rows}});
  make({"cos", ScalarType::Float, {1, rows, pairs}});
  make({"sin", ScalarType::Float, {1, rows, pairs}});
  make({"position", ScalarType::Long, {1}});
  make({"n_valid", ScalarType::Long, {1}});
  make({"k", ScalarType::Long, {}});
  make({"any_active", ScalarType::Bool, {}});
  make({"iterations", ScalarType::Long, {}});
  make({"depth", ScalarType::Long, {1, rows}});
  make({"h", ScalarType::Float, {1, rows, static_cast<int32_t>(info.width)}});
  make({"logits", ScalarType::Float, {1, rows, static_cast<int32_t>(info.vocab_size)}});
  for (const auto& [ring, source] : info.rings) {
    TensorSpec spec = shared_.at(ring).spec();
    spec.name = source;
    spec.shape[spec.shape.size() - 2] = rows;
    make(spec);
  }
  for (int32_t i = 0; i < pairs; ++i) {
    frequencies_.push_back(std::pow(info.rope_theta, -2.0 * i / static_cast<double>(info.rotary_dims)));
  }
}

Buffer& Calls::make(const TensorSpec& spec) { return own_.try_emplace(spec.name, spec).first->second; }

// The buffer that output `i` of `method` is known as.
Buffer& Calls::made_by(Method& method, size_t i, TensorSpec spec) {
  Buffer& buffer = make(spec);
  if (!buffer.spec().fits(spec)) {
    method.refuse("gives " + method.spec().outputs[i].name + " in another form than this runner takes it");
  }
  return buffer;
}

void Calls::bind_outputs(Method& method, std::string_view prefix) {
  const std::vector<TensorSpec>& outputs = method.spec().outputs;
  for (size_t i = 0; i < outputs.size(); ++i) method.write(i, made_by(method, i, without(prefix, outputs[i])).data());
}

void Calls::bind_step_outputs() {
  const auto& [inputs, outputs] = step_.spec();
  for (size_t i = 0; i < outputs.size(); ++i) {
    const TensorSpec& next = outputs[i];
    if (next.name == "any_active") {
      step_.write(i, made_by(step_, i, next).data());
    } else if (!next.name.starts_with("next_")) {
      rows_written_.push_back({i, made_by(step_, i, stack_of(next, max_loops_)).data(), next.nbytes()});
    } else {
      const TensorSpec x = without("next_", next);
      const auto named = [&](const TensorSpec& t) { return t.name == x.name; };
      const auto input = std::find_if(inputs.begin(), inputs.end(), named);
      if (input == inputs.end()) step_.refuse("gives " + next.name + ", but takes no " + x.name);
      carried_.push_back({static_cast<size_t>(input - inputs.begin()), i, &made_by(step_, i, x), &make(next)});
    }
  }
}

// Binds every input to the buffer of its name; what is one row of that buffer goes to `rows`.
void Calls::bind_inputs(Method& method, std::vector<Row>& rows) {
  const std::vector<TensorSpec>& inputs = method.spec().inputs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    auto found = own_.find(inputs[i].name);
    const bool here = found != own_.end();
    const auto kept = shared_.find(inputs[i].name);
    if (!here && kept == shared_.end()) method.refuse("takes " + inputs[i].name + ", which this runner does not know");
    const Buffer& buffer = here ? found->second : kept->second;
    if (buffer.spec().fits(inputs[i])) {
      method.read(i, buffer.data());
    } else if (!here && is_row_of(inputs[i], buffer.spec()) && buffer.spec().shape[0] == max_loops_) {
      rows.push_back({i, buffer.data(), inputs[i].nbytes()});
    } else {
      method.refuse("takes " + inputs[i].name + " in another form than this runner gives it");
    }
  }
}

void Calls::prelude(std::span<const int64_t> tokens, int64_t position) {
  own_.at("tokens").clear();
  std::copy(tokens.begin(), tokens.end(), own_.at("tokens").as<int64_t>());
  *own_.at("position").as<int64_t>() = position;
  *own_.at("n_valid").as<int64_t>() = std::ssize(tokens);
  float *cos = own_.at("cos").as<float>(), *sin = own_.at("sin").as<float>();
  for (int64_t row = 0; row < rows_; ++row) {
    for (const double frequency : frequencies_) {
      // In float64: at position 10^6 a float32 angle is wrong by hundredths of a radian.
      const double angle = static_cast<double>(position + row) * frequency;
      *cos++ = static_cast<float>(std::cos(angle));
      *sin++ = static_cast<float>(std::sin(angle));
    }
  }
  prelude_.run();
}

int64_t Calls::loop() {
  begin_.run();
  own_.at("depth").clear();
  int64_t& k = *own_.at("k").as<int64_t>();
  const int64_t limit = *shared_.at("max_loops").as<int64_t>();
  const bool& any_active = *own_.at("any_active").as<bool>();
  k = 0;
  do {
    for (const Row& row : rows_read_) step_.read(row.argument, row.stack + k * row.stride);
    for (const Row& row : rows_written_) step_.write(row.argument, row.stack + k * row.stride);
    for (const Carried& c : carried_) {
      step_.read(c.input, (k % 2 == 0 ? c.x : c.next)->data());
      step_.write(c.output, (k % 2 == 0 ? c.next : c.x)->data());
    }
    step_.run();
    ++k;
  } while (any_active && k < limit);
  if (k % 2 == 1) {  // head and commit read X
    for (const Carried& c : carried_) c.x->copy(*c.next);
  }
  return *own_.at("iterations").as<int64_t>() = k;
}

// ------------------------------------------------------------------------------------------------------ the model

Model::Model(const Package& package, const std::string& packed_weights)
    : info_(package.info()), program_(package.program(), packed_weights) {
  make_shared();
  for (const int64_t rows : info_.chunks) calls_.push_back(std::make_unique<Calls>(program_, info_, rows, shared_));
  if (!info_.memory.empty()) make_memory();
  release_mapped(package.program());
  reset();
}

void Model::make_shared() {
  const auto make = [&](const TensorSpec& spec) { shared_.try_emplace(spec.name, spec); };
  for (const char* name : {"max_loops", "min_loops"}) make({name, ScalarType::Long, {}});
  for (const char* name : {"exit_threshold", "exit_epsilon", "exit_entropy"}) make({name, ScalarType::Float, {}});
  std::for_each(info_.state.begin(), info_.state.end(), make);
  std::for_each(info_.memory.begin(), info_.memory.end(), make);
  // Nothing is looked up here: hits stay empty.
  for (const TensorSpec& input : info_.methods["prelude_1"].inputs) {
    if (input.name.starts_with("retrieved")) make(input);
  }
}

void Model::make_memory() {
  // Exit states since the last boundary: what the memory is going to be taught.
  const TensorSpec segment = {"segment", ScalarType::Float, {1, kSegment, static_cast<int32_t>(info_.width)}};
  shared_.try_emplace(segment.name, segment);
  const TensorSpec valid = {"n_valid", ScalarType::Long, {1}};
  *learned_.try_emplace(valid.name, valid).first->second.as<int64_t>() = kSegment;
  Method blank(program_, info_, "blank", kSegment);
  memorize_ = std::make_unique<Method>(program_, info_, "memorize", kSegment);
  for (auto [method, results] : {std::pair(&blank, &blank_), std::pair(memorize_.get(), &learned_)}) {
    const auto& [inputs, outputs] = method->spec();
    for (size_t i = 0; i < outputs.size(); ++i) {
      method->write(i, results->try_emplace(outputs[i].name, outputs[i]).first->second.data());
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Buffers& from = inputs[i].name == "n_valid" ? learned_ : shared_;
      const auto found = from.find(inputs[i].name);
      if (found == from.end() || !found->second.spec().fits(inputs[i])) {
        method->refuse("takes " + inputs[i].name + " in another form than this runner gives it");
      }
      method->read(i, found->second.data());
    }
  }
  for (const TensorSpec& memory : info_.memory) {
    for (const auto& [results, name] : {std::pair(&blank_, memory.name), std::pair(&learned_, "next_" + memory.name)}) {
      const auto found = results->find(name);
      if (found == results->end() || !found->second.spec().fits(memory)) memorize_->refuse("gives no " + name);
    }
  }
  blank.run();
}

size_t Model::state_bytes() const {
  size_t bytes = 0;
  for (const auto& [_, buffer] : shared_) {
    if (!buffer.spec().shape.empty()) bytes += buffer.nbytes();  // all but the dials
  }
  return bytes;
}

void Model::reset() {
  // What rings hold is masked by position; zeroed all the same, to be reproducible.
  for (auto& [_, buffer] : shared_) buffer.clear();
  for (const TensorSpec& memory : info_.memory) shared_.at(memory.name).copy(blank_.at(memory.name));
  position_ = 0;
}

Fed Model::feed(std::span<const int64_t> tokens, const Dials& dials, bool all_logits) {
  check(tokens);
  set(dials);
  Fed fed;
  for (const auto& [rows, n] : plan_calls(position_, std::ssize(tokens), info_.chunks)) {
    Calls& calls = calls_of(rows);
    calls.prelude(tokens.first(n), position_);
    tokens = tokens.subspan(n);
    fed.iterations.push_back(calls.loop());
    const auto* depth = calls.at("depth").as<int64_t>();
    fed.depth.insert(fed.depth.end(), depth, depth + n);
    if (all_logits || tokens.empty()) {
      calls.head();
      const float* logits = calls.at("logits").as<float>();
      fed.logits.insert(fed.logits.end(), logits + (all_logits ? 0 : n - 1) * info_.vocab_size,
                        logits + n * info_.vocab_size);
    }
    calls.commit();
    keep(calls, n);
    if (position_ % kSegment == 0 && memorize_ != nullptr && remember_) memorize();
  }
  return fed;
}

Calls& Model::prepare(std::span<const int64_t> tokens, const Dials& dials) {
  set(dials);
  Calls& calls = calls_of(std::ssize(tokens));
  calls.prelude(tokens, position_);
  return calls;
}

void Model::check(std::span<const int64_t> tokens) const {
  if (tokens.empty()) throw std::runtime_error("no tokens to run; give a prompt of at least one token");
  for (const int64_t token : tokens) {
    if (token < 0 || token >= info_.vocab_size) {
      throw std::runtime_error("token " + std::to_string(token) + " is outside the vocabulary (0.." +
                               std::to_string(info_.vocab_size - 1) + ")");
    }
  }
  const int64_t length = position_ + std::ssize(tokens);
  if (info_.max_seq_len && length > *info_.max_seq_len) {
    throw std::runtime_error(std::to_string(length) + " tokens are more than the " +
                             std::to_string(*info_.max_seq_len) +
                             " this package was exported for (--max-seq-len); shorten the prompt or export again");
  }
}

void Model::set(const Dials& dials) {
  dials.check(info_.max_loops);
  *shared_.at("max_loops").as<int64_t>() = dials.max_loops;
  *shared_.at("min_loops").as<int64_t>() = dials.min_loops;
  *shared_.at("exit_threshold").as<float>() = static_cast<float>(dials.exit_threshold);
  *shared_.at("exit_epsilon").as<float>() = static_cast<float>(dials.exit_epsilon);
  *shared_.at("exit_entropy").as<float>() = static_cast<float>(dials.exit_entropy);
}

Calls& Model::calls_of(int64_t rows) {
  return **std::find_if(calls_.begin(), calls_.end(), [&](const auto& calls) { return calls->rows() == rows; });
}

// Keeps the keys and values, and what the memory is to learn, of a call's first `count` rows.
void Model::keep(const Calls& calls, int64_t count) {
  const int64_t first = std::max<int64_t>(0, count - info_.window);
  for (const auto& [name, source] : info_.rings) {
    const Buffer &ring = shared_.at(name), &made = calls.at(source);
    const std::vector<int32_t>& shape = made.spec().shape;  // (..., rows, entry)
    const int64_t outer = std::accumulate(shape.begin(), shape.end() - 2, int64_t{1}, std::multiplies<>());
    const size_t entry = made.nbytes() / (outer * calls.rows());
    for (int64_t o = 0; o < outer; ++o) {
      std::byte* to = ring.data() + o * info_.window * entry;
      const std::byte* from = made.data() + o * calls.rows() * entry;
      for (int64_t row = first; row < count; ++row) {
        std::memcpy(to + (position_ + row) % info_.window * entry, from + row * entry, entry);
      }
    }
  }
  if (memorize_ != nullptr) {
    const size_t row = info_.width * sizeof(float);
    std::memcpy(shared_.at("segment").data() + position_ % kSegment * row, calls.at("h").data(), count * row);
  }
  position_ += count;
}

// Teaches the memory the segment that was just completed.
void Model::memorize() {
  memorize_->run();
  for (const TensorSpec& memory : info_.memory) shared_.at(memory.name).copy(learned_.at("next_" + memory.name));
}

// ----------------------------------------------------------------------------------------------------- the engine

void start_engine(int64_t threads) {
  rmse_take_messages();
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (threads > 0 && (pool == nullptr || !pool->_unsafe_reset_threadpool(static_cast<uint32_t>(threads)))) {
    throw std::runtime_error("--threads: executorch cannot run " + std::to_string(threads) + " threads");
  }
}

}  // namespace rmse
