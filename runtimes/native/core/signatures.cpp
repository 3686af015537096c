#include "signatures.h"

#include <string_view>
#include <utility>
#include <vector>

#include "json.h"

namespace rmse {
namespace {

constexpr size_t kLargestTensor = size_t{2} << 30;  // bytes of what goes into a method or comes out of it

std::string shown(const TensorSpec& tensor) { return dump(Json(tensor.shape)) + " " + std::string(name_of(tensor.dtype)); }

std::string axis_of(const TensorSpec& tensor) { return tensor.slots_axis < 0 ? "null" : std::to_string(tensor.slots_axis); }

[[noreturn]] void refuse(const std::string& field, const std::string& got, const std::string& expected) {
  throw JsonError(field + ": got " + got.substr(0, 300) + ", expected " + expected.substr(0, 300));
}

template <typename Named>
std::string names_of(const std::map<std::string, Named>& known) {
  std::string names;
  for (const auto& [name, _] : known) names += (names.empty() ? "" : ", ") + name;
  return names;
}

std::string without(std::string_view prefix, const std::string& name) {
  return name.starts_with(prefix) ? name.substr(prefix.size()) : name;
}

std::string suffix(int64_t rows) { return std::string("_").append(std::to_string(rows)); }  // of METHOD_ROWS

int64_t elements_of(const TensorSpec& tensor) { return static_cast<int64_t>(tensor.nbytes() / nbytes_of(tensor.dtype)); }

// The tensors that a host has at hand, as call follows call.
class Flow {
 public:
  explicit Flow(const ModelInfo& info) : info_(info), width_(static_cast<int32_t>(info.width)) {}

  // prelude, the loop, coda, head, commit, and what is left to be kept.
  void call(int64_t rows) {
    const std::string of_rows = suffix(rows), loop = "the loop of " + std::to_string(rows) + " rows";
    const auto n = static_cast<int32_t>(rows);
    begin_with(rows);
    run("prelude" + of_rows);
    host_loop(of_rows, n);
    require(loop, {"h", Dtype::kFloat32, {1, n, width_}});
    require(loop, {"depth", Dtype::kInt64, {1, n}});
    if (info_.has("coda")) run("coda" + of_rows);
    run("head" + of_rows);
    require("head" + of_rows, {"logits", Dtype::kFloat32, {1, n, static_cast<int32_t>(info_.text.vocab_size)}});
    if (info_.has("commit")) run("commit" + of_rows);
    for (const auto& [_, state] : info_.state) {
      if (state.kind != StateKind::kWritten) require("the call of " + std::to_string(rows) + " rows", state.taken(rows));
    }
  }

  // What is done once per segment.
  void segment(int64_t rows) {
    const std::string of_rows = suffix(rows), memorize = "memorize" + of_rows, blank = "blank" + of_rows;
    begin_with(rows);
    run(blank);
    run(memorize);
    for (auto [name, state] : info_.state) {
      if (state.kind != StateKind::kWritten) continue;
      require_of(blank, state.tensor);
      state.tensor.name = "next_" + name;
      require_of(memorize, state.tensor);
    }
    require_of(memorize, {"surprise", Dtype::kFloat32, {1}});
  }

 private:
  void begin_with(int64_t rows) {
    have_ = given_tensors(info_, rows);
    made_.clear();
  }

  // begin, then step: `first_X` and `next_X` are X, all else that step gives is stacked over the loops.
  void host_loop(const std::string& of_rows, int32_t rows) {
    const std::string begin = "begin" + of_rows, step = "step" + of_rows;
    if (info_.text.prefix && !by_name(method(begin).inputs).contains("prefix")) {
      refuse("model.text.prefix", "true", "false, since " + begin + " takes no prefix");
    }
    run(begin, "first_");
    TensorSpec depth{"depth", Dtype::kInt64, {1, rows}};
    if (const auto active = have_.find("active"); active != have_.end()) depth.shape = active->second.shape;
    have_.emplace("depth", depth);
    take(step, /*of_loop=*/true);
    const Specs outputs = by_name(method(step).outputs), inputs = by_name(method(step).inputs);
    const auto any = outputs.find("any_active");
    if (any == outputs.end() || any->second.dtype != Dtype::kBool || elements_of(any->second) != 1) {
      refuse("methods." + step + ".outputs", names_of(outputs), "any_active, bool, of one element, among them");
    }
    for (const char* name : {"next_h", "next_active", "next_depth"}) {
      if (!outputs.contains(name)) {
        refuse("methods." + step + ".outputs", names_of(outputs), std::string(name) + " among them");
      }
    }
    for (auto [name, tensor] : outputs) {
      if (name.starts_with("next_")) {
        tensor.name = without("next_", name);
        if (!inputs.contains(tensor.name)) {
          refuse("methods." + step + ".outputs", name, "an input " + tensor.name + " that it goes into");
        }
        give(step, tensor);
      } else if (name != "any_active") {
        tensor.shape.insert(tensor.shape.begin(), static_cast<int32_t>(info_.max_loops));
        give(step, tensor);
      }
    }
    give(step, {"iterations", Dtype::kInt64, {}});
  }

  const MethodSpec& method(const std::string& name) const {
    const auto known = info_.signatures.find(name);
    if (known == info_.signatures.end()) refuse("methods", names_of(info_.signatures), name + " among them");
    return known->second;
  }

  void run(const std::string& name, std::string_view prefix = "") {
    take(name);
    for (TensorSpec tensor : method(name).outputs) {
      tensor.name = without(prefix, tensor.name);
      give(name, tensor);
    }
  }

  void take(const std::string& name, bool of_loop = false) const {
    for (const TensorSpec& tensor : method(name).inputs) {
      const std::string field = "methods." + name + ".inputs." + tensor.name;
      const auto found = have_.find(tensor.name);
      if (found == have_.end()) refuse(field, "a tensor that nothing gives", "some of " + names_of(have_));
      const auto kept = info_.state.find(tensor.name);
      const TensorSpec given = of_loop && kept != info_.state.end() ? kept->second.row() : found->second;
      if (tensor.slots_axis != given.slots_axis) refuse(field + ".slots_axis", axis_of(tensor), axis_of(given));
      if (!tensor.fits(given)) refuse(field, shown(tensor), shown(given));
    }
  }

  void give(const std::string& name, const TensorSpec& tensor) {
    if (tensor.slots_axis >= 0) grows(name, tensor);
    const auto [known, fresh] = have_.emplace(tensor.name, tensor);
    if (!fresh && !known->second.fits(tensor)) {
      refuse("methods." + name + ".outputs." + tensor.name, shown(tensor), shown(known->second));
    }
    made_.emplace(tensor.name, tensor);
  }

  // Of a result that grows with the appended state: only the masks of `begin` do.
  void grows(const std::string& name, const TensorSpec& tensor) const {
    const std::string field = "methods." + name + ".outputs." + tensor.name + ".slots_axis";
    if (!info_.page || !name.starts_with("begin_")) refuse(field, axis_of(tensor), "null");
    if (tensor.shape[tensor.slots_axis] != *info_.capacity()) {
      refuse(field, axis_of(tensor), "an axis of " + std::to_string(*info_.capacity()) + ", as the appended state has");
    }
  }

  void require(const std::string& name, const TensorSpec& wanted) const { require_among(name, made_, wanted); }

  void require_of(const std::string& name, const TensorSpec& wanted) const {
    require_among(name, by_name(method(name).outputs), wanted);
  }

  static void require_among(const std::string& name, const Specs& specs, const TensorSpec& wanted) {
    const auto found = specs.find(wanted.name);
    if (found != specs.end() && found->second.fits(wanted)) return;
    const std::string got = found == specs.end() ? "no such tensor" : shown(found->second);
    refuse("methods." + name + ".outputs." + wanted.name, got, shown(wanted));
  }

  static Specs by_name(const std::vector<TensorSpec>& tensors) {
    Specs specs;
    for (const TensorSpec& tensor : tensors) specs.emplace(tensor.name, tensor);
    return specs;
  }

  const ModelInfo& info_;
  int32_t width_;
  Specs have_;  // all of them
  Specs made_;  // those that methods gave
};

}  // namespace

Specs given_tensors(const ModelInfo& info, int64_t rows) {
  const auto n = static_cast<int32_t>(rows), width = static_cast<int32_t>(info.width);
  const auto pairs = static_cast<int32_t>(info.text.rotary_dims / 2), hits = static_cast<int32_t>(info.hit_rows);
  Specs given;
  const auto add = [&](const std::string& name, Dtype dtype, std::vector<int32_t> shape) {
    given.emplace(name, TensorSpec{name, dtype, std::move(shape)});
  };
  for (const char* name : {"max_loops", "min_loops", "k"}) add(name, Dtype::kInt64, {});
  for (const ExitDial& dial : kExitDials) add(dial.name, dial.dtype, {});
  add("tokens", Dtype::kInt64, {1, n});
  for (const char* name : {"position", "n_valid"}) add(name, Dtype::kInt64, {1});
  if (info.text.prefix) add("prefix", Dtype::kInt64, {1});
  if (pairs > 0) {
    for (const char* name : {"cos", "sin"}) {
      add(name, Dtype::kFloat32, {1, n, pairs});
      for (const auto& [layers, _] : info.text.further_thetas) add(name + ("_" + layers), Dtype::kFloat32, {1, n, pairs});
    }
  }
  if (const auto most = info.capacity()) {
    add("slots", Dtype::kInt64, {static_cast<int32_t>(*most)});
    if (info.page) given.at("slots").slots_axis = 0;
  }
  if (info.remembers()) add("segment", Dtype::kFloat32, {1, static_cast<int32_t>(*info.segment), width});
  if (hits > 0) {
    add("retrieved", Dtype::kFloat32, {1, hits, width});
    add("retrieved_scores", Dtype::kFloat32, {1, hits});
    add("retrieved_valid", Dtype::kBool, {1, hits});
  }
  const auto add_new = [&](const std::string& field, const TensorSpec& tensor) {
    if (!given.emplace(tensor.name, tensor).second) refuse(field, "a name that hosts give themselves", "another");
  };
  for (const auto& [name, _] : info.noise) add_new("model.noise." + name, {name, Dtype::kFloat32, {1, n, width}});
  for (const auto& [name, state] : info.state) add_new("model.state." + name, state.tensor);
  return given;
}

void check_signatures(const ModelInfo& info) {
  for (const auto& [name, method] : info.signatures) {
    for (const auto* side : {&method.inputs, &method.outputs}) {
      for (const TensorSpec& tensor : *side) {
        // Of what grows with the text, the rest comes with it.
        if (tensor.of_slots(info.slots(0)).nbytes() > kLargestTensor) {
          refuse("methods." + name + "." + tensor.name, dump(Json(tensor.shape)), "at most 2 GiB");
        }
      }
    }
  }
  Flow flow(info);
  for (const int64_t rows : info.chunks) flow.call(rows);
  if (info.remembers()) flow.segment(*info.segment);
}

}  // namespace rmse
