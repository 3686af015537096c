#include "calls.h"

#include <algorithm>
#include <cmath>

namespace rmse {
namespace {

bool is_row_of(const TensorSpec& row, const TensorSpec& stack) {
  return row.dtype == stack.dtype && !stack.shape.empty() &&
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

}  // namespace

std::unique_ptr<Method> load_method(Engine& engine, const ModelInfo& info, const std::string& name, int64_t rows) {
  const std::string of_rows = std::to_string(rows);
  const auto known = info.methods.find(name + "_" + of_rows);
  if (known == info.methods.end()) engine.refuse("holds no " + name + " for " + of_rows + " rows");
  return engine.load(known->first, known->second);
}

Calls::Calls(Engine& engine, const ModelInfo& info, int64_t rows, const Buffers& shared)
    : rows_(rows),
      max_loops_(info.max_loops),
      shared_(shared),
      prelude_(load_method(engine, info, "prelude", rows)),
      begin_(load_method(engine, info, "begin", rows)),
      step_(load_method(engine, info, "step", rows)),
      head_(load_method(engine, info, "head", rows)),
      commit_(load_method(engine, info, "commit", rows)) {
  make_known(info);
  bind_step_outputs();
  for (const auto* method : {&prelude_, &head_, &commit_}) bind_outputs(**method);
  bind_outputs(*begin_, "first_");  // first_X is X before the first iteration
  bind_inputs(*step_, rows_read_);
  for (const auto* method : {&prelude_, &begin_, &head_, &commit_}) {
    std::vector<Row> rows_of_stacks;
    bind_inputs(**method, rows_of_stacks);
    if (!rows_of_stacks.empty()) (*method)->refuse("takes rows of what is kept, as only step does");
  }
  for (const char* name : {"next_h", "next_depth", "any_active"}) require(*step_, name);
  require(*head_, "logits");
  for (const auto& [_, source] : info.rings) require(*commit_, source);
}

// What this class itself reads and writes: where a call stands, and what it is to give. All else is only passed on.
void Calls::make_known(const ModelInfo& info) {
  const auto rows = static_cast<int32_t>(rows_), pairs = static_cast<int32_t>(info.rotary_dims / 2);
  make({"tokens", Dtype::kInt64, {1, rows}});
  make({"cos", Dtype::kFloat32, {1, rows, pairs}});
  make({"sin", Dtype::kFloat32, {1, rows, pairs}});
  make({"position", Dtype::kInt64, {1}});
  make({"n_valid", Dtype::kInt64, {1}});
  make({"k", Dtype::kInt64, {}});
  make({"any_active", Dtype::kBool, {}});
  make({"iterations", Dtype::kInt64, {}});
  make({"depth", Dtype::kInt64, {1, rows}});
  make({"h", Dtype::kFloat32, {1, rows, static_cast<int32_t>(info.width)}});
  make({"logits", Dtype::kFloat32, {1, rows, static_cast<int32_t>(info.vocab_size)}});
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
  const auto& [inputs, outputs] = step_->spec();
  for (size_t i = 0; i < outputs.size(); ++i) {
    const TensorSpec& next = outputs[i];
    if (next.name == "any_active") {
      step_->write(i, made_by(*step_, i, next).data());
    } else if (!next.name.starts_with("next_")) {
      rows_written_.push_back({i, made_by(*step_, i, stack_of(next, max_loops_)).data(), next.nbytes()});
    } else {
      const TensorSpec x = without("next_", next);
      const auto named = [&](const TensorSpec& t) { return t.name == x.name; };
      const auto input = std::find_if(inputs.begin(), inputs.end(), named);
      if (input == inputs.end()) step_->refuse("gives " + next.name + ", but takes no " + x.name);
      carried_.push_back({static_cast<size_t>(input - inputs.begin()), i, &made_by(*step_, i, x), &make(next)});
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
  prelude_->run();
}

int64_t Calls::loop() {
  begin_->run();
  own_.at("depth").clear();
  int64_t& k = *own_.at("k").as<int64_t>();
  const int64_t limit = *shared_.at("max_loops").as<int64_t>();
  const bool& any_active = *own_.at("any_active").as<bool>();
  k = 0;
  do {
    for (const Row& row : rows_read_) step_->read(row.argument, row.stack + k * row.stride);
    for (const Row& row : rows_written_) step_->write(row.argument, row.stack + k * row.stride);
    for (const Carried& c : carried_) {
      step_->read(c.input, (k % 2 == 0 ? c.x : c.next)->data());
      step_->write(c.output, (k % 2 == 0 ? c.next : c.x)->data());
    }
    step_->run();
    ++k;
  } while (any_active && k < limit);
  if (k % 2 == 1) {  // head and commit read X
    for (const Carried& c : carried_) c.x->copy(*c.next);
  }
  return *own_.at("iterations").as<int64_t>() = k;
}

}  // namespace rmse
