#include "calls.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "generator.h"

namespace rmse {
namespace {

TensorSpec stack_of(const TensorSpec& row, int64_t depth) {
  TensorSpec stack = row;
  stack.shape.insert(stack.shape.begin(), static_cast<int32_t>(depth));
  return stack;
}

TensorSpec without(std::string_view prefix, TensorSpec spec) {
  if (spec.name.starts_with(prefix)) spec.name.erase(0, prefix.size());
  return spec;
}

bool any(const Buffer& flags) {
  return std::any_of(flags.data(), flags.data() + flags.nbytes(), [](std::byte b) { return b != std::byte{0}; });
}

}  // namespace

std::unique_ptr<Method> load_method(Engine& engine, const ModelInfo& info, const std::string& name, int64_t rows) {
  const std::string of_rows = std::to_string(rows);
  const auto known = info.signatures.find(name + "_" + of_rows);
  if (known == info.signatures.end()) engine.refuse("holds no " + name + " for " + of_rows + " rows");
  return engine.load(known->first, known->second);
}

// That all of it fits together, `check_signatures` has found out.
Calls::Calls(Engine& engine, const ModelInfo& info, int64_t rows, const Buffers& shared)
    : engine_(engine), info_(info), rows_(rows), shared_(shared), host_(given_tensors(info, rows)) {
  prelude_ = load_method(engine, info, "prelude", rows);
  begin_ = load_method(engine, info, "begin", rows);
  step_ = load_method(engine, info, "step", rows);
  if (info.has("coda")) coda_ = load_method(engine, info, "coda", rows);
  head_ = load_method(engine, info, "head", rows);
  if (info.has("commit")) commit_ = load_method(engine, info, "commit", rows);
  make({"iterations", Dtype::kInt64, {}});
  bind_outputs(*begin_, "first_");  // first_X is X before the first iteration
  bind_step_outputs();
  for (const auto* method : {&prelude_, &coda_, &head_, &commit_}) {
    if (*method != nullptr) bind_outputs(**method);
  }
  bind(info.slots(0));
  if (const auto slots = given_.find("slots"); slots != given_.end()) {  // as many of them are read as there are
    std::iota(slots->second.as<int64_t>(), slots->second.as<int64_t>() + *info.capacity(), int64_t{0});
  }
  add_angles("", info.text.rope_theta);
  for (const auto& [layers, theta] : info.text.further_thetas) add_angles("_" + layers, theta);
}

// The angles of one base, if a method takes them.
void Calls::add_angles(const std::string& ending, double theta) {
  const auto taken = [&](const std::string& name) {
    const auto found = given_.find(name + ending);
    return found == given_.end() ? nullptr : found->second.as<float>();
  };
  Angles angles{taken("cos"), taken("sin"), {}};
  if (angles.cos == nullptr && angles.sin == nullptr) return;
  const int64_t dims = info_.text.rotary_dims;
  for (int64_t i = 0; i < dims / 2; ++i) angles.frequencies.push_back(std::pow(theta, -2.0 * i / static_cast<double>(dims)));
  angles_.push_back(std::move(angles));
}

void Calls::bind(int64_t slots) {
  rows_read_.clear();
  for (const auto* method : {&prelude_, &begin_, &step_, &coda_, &head_, &commit_}) {
    if (*method != nullptr) bind_inputs(**method, slots);
  }
}

Buffer& Calls::make(const TensorSpec& spec) { return made_.try_emplace(spec.name, spec).first->second; }

// The buffer that a method reads for one of its inputs.
const Buffer& Calls::given(const Method& method, const TensorSpec& input) {
  if (const auto kept = shared_.find(input.name); kept != shared_.end()) return kept->second;
  if (const auto known = host_.find(input.name); known != host_.end()) {
    return given_.try_emplace(input.name, known->second).first->second;
  }
  const auto made = made_.find(input.name);
  if (made == made_.end()) method.refuse("takes " + input.name + ", which nothing gives");
  return made->second;
}

void Calls::bind_outputs(Method& method, std::string_view prefix) {
  const std::vector<TensorSpec>& outputs = method.spec().outputs;
  for (size_t i = 0; i < outputs.size(); ++i) method.write(i, make(without(prefix, outputs[i])).data());
}

void Calls::bind_step_outputs() {
  const auto& [inputs, outputs] = step_->spec();
  for (size_t i = 0; i < outputs.size(); ++i) {
    const TensorSpec& next = outputs[i];
    if (next.name == "any_active") {
      step_->write(i, make(next).data());
    } else if (!next.name.starts_with("next_")) {
      rows_written_.push_back({i, make(stack_of(next, info_.max_loops)).data(), next.nbytes()});
    } else {
      const TensorSpec x = without("next_", next);
      const auto named = [&](const TensorSpec& t) { return t.name == x.name; };
      const auto input = std::find_if(inputs.begin(), inputs.end(), named);
      carried_.push_back({static_cast<size_t>(input - inputs.begin()), i, &make(x), &make(next)});
    }
  }
}

void Calls::bind_inputs(Method& method, int64_t slots) {
  const std::vector<TensorSpec>& inputs = method.spec().inputs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Buffer& buffer = given(method, inputs[i]);
    const auto kept = info_.state.find(inputs[i].name);
    if (inputs[i].slots_axis >= 0) method.resize(i, slots);
    if (&method == step_.get() && kept != info_.state.end() && kept->second.per_loop) {
      rows_read_.push_back({i, buffer.data(), inputs[i].of_slots(slots).nbytes()});
    } else {
      method.read(i, buffer.data());
    }
  }
}

void Calls::prelude(std::span<const int64_t> tokens, int64_t position, uint64_t noise_seed, int64_t prefix) {
  const auto set = [&](const char* name, int64_t value) {
    if (const auto found = given_.find(name); found != given_.end()) *found->second.as<int64_t>() = value;
  };
  set("position", position);
  set("n_valid", std::ssize(tokens));
  set("prefix", prefix);
  if (const auto ids = given_.find("tokens"); ids != given_.end()) {
    ids->second.clear();
    std::copy(tokens.begin(), tokens.end(), ids->second.as<int64_t>());
  }
  fill_angles(position);
  fill_noise(position, noise_seed);
  prelude_->run();
}

void Calls::fill_angles(int64_t position) {
  for (const Angles& angles : angles_) {
    for (int64_t row = 0, i = 0; row < rows_; ++row) {
      for (const double frequency : angles.frequencies) {
        // In float64: at position 10^6 a float32 angle is wrong by hundredths of a radian.
        const double angle = static_cast<double>(position + row) * frequency;
        if (angles.cos != nullptr) angles.cos[i] = static_cast<float>(std::cos(angle));
        if (angles.sin != nullptr) angles.sin[i] = static_cast<float>(std::sin(angle));
        ++i;
      }
    }
  }
}

// Row r of what the model begins from belongs to its position, however the text is cut into calls.
void Calls::fill_noise(int64_t position, uint64_t seed) {
  SplitMix64 others(seed);  // its numbers are the seeds of all inputs but the first
  others.next();
  uint64_t own = seed;
  for (const auto& [name, deviation] : info_.noise) {
    if (name != info_.noise.begin()->first) own = others.next();
    const auto found = given_.find(name);
    if (found == given_.end()) continue;
    float* x = found->second.as<float>();
    for (int64_t row = 0; row < rows_; ++row) {
      for (const float z : noise(own, position + row, info_.width)) *x++ = z * static_cast<float>(deviation);
    }
  }
}

int64_t Calls::loop() {
  begin_->run();
  made_.at("depth").clear();
  const auto index = given_.find("k");
  const int64_t limit = *shared_.at("max_loops").as<int64_t>();
  const bool& any_active = *made_.at("any_active").as<bool>();
  int64_t k = 0;
  for (bool running = any(made_.at("active")); running && k < limit; running = any_active) {
    if (index != given_.end()) *index->second.as<int64_t>() = k;
    for (const Row& row : rows_read_) step_->read(row.argument, row.stack + k * row.stride);
    for (const Row& row : rows_written_) step_->write(row.argument, row.stack + k * row.stride);
    for (const Carried& c : carried_) {
      step_->read(c.input, (k % 2 == 0 ? c.x : c.next)->data());
      step_->write(c.output, (k % 2 == 0 ? c.next : c.x)->data());
    }
    engine_.at_loop(k);
    step_->run();
    ++k;
  }
  engine_.at_loop(-1);
  if (k % 2 == 1) {  // the methods behind the loop read X
    for (const Carried& c : carried_) c.x->copy(*c.next);
  }
  return *made_.at("iterations").as<int64_t>() = k;
}

}  // namespace rmse
