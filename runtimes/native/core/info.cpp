#include "info.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string_view>
#include <type_traits>

#include "errors.h"
#include "fields.h"
#include "signatures.h"
#include "text.h"

namespace rmse {
namespace {

// What a manifest may ask for at most, as in rmse_edge/schema.py, numbers.py and runtimes/host/signatures.py: one with more is
// not to be believed, and nothing is allocated by it.
constexpr int64_t kLargest = INT32_MAX;       // of a tensor's sizes
constexpr int64_t kLargestState = 4LL << 30;  // bytes kept between calls
constexpr int64_t kMostLoops = 64;
constexpr int64_t kLargestCount = 1 << 16;  // of channels, rows of a call
constexpr int64_t kLargestVocabulary = 1 << 22;
constexpr size_t kMostAxes = 8;

const auto count = whole(1, kLargestCount);

// ----------------------------------------------------------------------------------------------------------- tensors

Dtype dtype(const Json& value) {
  const std::optional<Dtype> known = value.is_string() ? dtype_of(string(value)) : std::nullopt;
  if (!known) unfit(value, "the name of a type, such as float32");
  return *known;
}

// Sizes whose product is no more than kLargestState bytes, whatever the type.
std::vector<int32_t> shape(const Json& value) {
  std::vector<int32_t> sizes;
  int64_t elements = 1;
  for (const int64_t n : list_of(whole(1, kLargest))(value)) {
    if (n > kLargestState / elements || sizes.size() == kMostAxes) unfit(value, "the shape of a tensor that fits");
    elements *= n;
    sizes.push_back(static_cast<int32_t>(n));
  }
  return sizes;
}

std::vector<TensorSpec> tensors(const Json& list) {
  std::vector<TensorSpec> specs;
  for (const Json& value : items(list)) {
    const Part part(value, std::string("[").append(std::to_string(specs.size())).append("]"));
    TensorSpec tensor;
    tensor.name = part.at("name", name);
    tensor.dtype = part.at("dtype", dtype);
    tensor.shape = part.at("shape", shape);
    const auto axis = part.at("slots_axis", or_null(whole(0, kMostAxes)), std::nullopt);
    tensor.slots_axis = static_cast<int>(axis.value_or(-1));
    if (tensor.slots_axis >= std::ssize(tensor.shape)) part.refuse(".slots_axis", std::to_string(*axis), "one of its axes");
    specs.push_back(std::move(tensor));
  }
  return specs;
}

// --------------------------------------------------------------------------------------------------- parts of a model

Dials own_dials(const Part& part, int64_t deepest, std::optional<int64_t> untrained) {
  const auto loops = whole(1, kMostLoops);
  Dials dials;
  dials.max_loops = part.at("max_loops", loops);
  dials.min_loops = part.at("min_loops", loops, dials.min_loops);
  for (const ExitDial& dial : kExitDials) dials.*dial.value = part.at(dial.name, number, dial.off);
  try {
    dials.check(deepest, untrained);
  } catch (const std::runtime_error& error) {
    part.refuse("", std::string("some that cannot be set (") + error.what() + ")", "the checkpoint's own");
  }
  return dials;
}

std::vector<int64_t> call_rows(const Part& model, std::optional<int64_t> segment) {
  const std::vector<int64_t> rows = model.at("chunks", list_of(count));
  const std::string got = dump(Json(rows)).substr(0, 100);
  const bool rising = std::adjacent_find(rows.begin(), rows.end(), std::greater_equal<>()) == rows.end();
  if (rows.empty() || rows.front() != 1 || !rising) {
    model.refuse(".chunks", got, "rising numbers of rows, the first of a model of texts 1");
  }
  if (const int64_t most = segment.value_or(kLargestCount); rows.back() > most) {
    model.refuse(".chunks", got, "at most " + std::to_string(most) + " rows");
  }
  return rows;
}

std::vector<std::pair<int64_t, int64_t>> token_ranges(const Json& list) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const auto& ends : list_of(list_of(whole(0, kLargestVocabulary)))(list)) {
    if (ends.size() != 2) unfit(list, "pairs of ids, the first of a range and that behind it");
    ranges.emplace_back(ends[0], ends[1]);
  }
  return ranges;
}

TextInfo text_info(const Part& part) {
  TextInfo text{.vocab_size = part.at("vocab_size", whole(1, kLargestVocabulary)),
                .rotary_dims = part.at("rotary_dims", whole(0, kLargestCount), 0),
                .rope_theta = part.at("rope_theta", positive, 10'000.0),
                .further_thetas = {},
                .prefix = part.at("prefix", truth, false),
                .max_seq_len = part.at("max_seq_len", or_null(whole(1, kMany)), std::nullopt),
                .eos_tokens = {},
                .unused_tokens = {}};
  using Ids = std::vector<int64_t>;
  text.eos_tokens = part.at("eos_token_ids", list_of(whole(0, kLargestVocabulary - 1)), Ids());
  text.unused_tokens = part.at("unused_token_ids", token_ranges, decltype(text.unused_tokens)());
  if (part.has("further_thetas")) {
    const Part further = part.part("further_thetas");
    for (const std::string& layers : further.names()) text.further_thetas[layers] = further.at(layers, positive);
  }
  const std::string expected = "ids below " + std::to_string(text.vocab_size);
  for (const int64_t token : text.eos_tokens) {
    if (token >= text.vocab_size) part.refuse(".eos_token_ids", dump(Json(text.eos_tokens)).substr(0, 100), expected);
  }
  for (const auto& [first, end] : text.unused_tokens) {
    if (first < end && end <= text.vocab_size) continue;
    part.refuse(".unused_token_ids", dump(Json(text.unused_tokens)).substr(0, 100), expected);
  }
  return text;
}

State state_of(const std::string& called, const Part& part, const ModelInfo& info) {
  static const auto kKind = one_of<StateKind>({{"ring", StateKind::kRing},
                                               {"append", StateKind::kAppend},
                                               {"replace", StateKind::kReplace},
                                               {"written", StateKind::kWritten}});
  static const auto kReaders = list_of(one_of<std::string>(
      {{"prelude", "prelude"}, {"loop", "loop"}, {"coda", "coda"}, {"commit", "commit"}}));
  const auto readers = part.at("read_by", kReaders);
  // One after the other: GCC 12 frees what a list of initialisers has made twice when a later one throws.
  State state;
  state.tensor.name = called;
  state.tensor.dtype = part.at("dtype", dtype);
  state.tensor.shape = part.at("shape", shape);
  state.kind = part.at("kind", kKind);
  state.source = part.at("source", name);
  state.read_by = {readers.begin(), readers.end()};
  state.per_loop = part.at("per_loop", truth);
  const std::vector<int32_t>& axes = state.tensor.shape;
  if (state.read_by.empty()) part.refuse(".read_by", "nothing", "the methods that read it");
  if (state.per_loop && (axes.empty() || axes.front() != info.max_loops)) {
    part.refuse(".shape", dump(Json(axes)), "a row for each of the " + std::to_string(info.max_loops) + " loops");
  }
  if (state.has_slots() && axes.size() < 3) part.refuse(".shape", dump(Json(axes)), "positions in the last axis but one");
  if (state.kind == StateKind::kAppend && info.page) state.tensor.slots_axis = static_cast<int>(axes.size()) - 2;
  if (state.kind == StateKind::kWritten && !info.segment) {
    part.refuse(".kind", "written", "another one, since model.segment is null");
  }
  if (state.kind == StateKind::kWritten && !info.has(state.source)) {
    std::string methods;
    for (const std::string& method : info.methods) methods += (methods.empty() ? "" : ", ") + method;
    part.refuse(".source", state.source, "some of " + methods.substr(0, 200));
  }
  return state;
}

void check_size(const ModelInfo& info) {
  uint64_t nbytes = 0;
  for (const auto& [called, state] : info.state) {
    nbytes += state.tensor.of_slots(info.slots(0)).nbytes();
    if (state.kind != StateKind::kAppend || state.slots() == *info.capacity()) continue;
    throw JsonError("model.state: got appended ones of " + std::to_string(*info.capacity()) + " and " +
                    std::to_string(state.slots()) + " slots, expected as many in each");
  }
  if (info.page && !info.capacity()) {
    throw JsonError("model.page: got " + std::to_string(*info.page) + ", expected null, since nothing is appended");
  }
  if (nbytes > kLargestState) {
    throw JsonError("model.state: got " + std::to_string(nbytes) + " bytes, expected at most " +
                    std::to_string(kLargestState) + " (4 GiB)");
  }
}

// The same in "model" and elsewhere in the manifest.
void agree(const char* field, const std::string& got, const Json& said, const char* elsewhere) {
  if (said == got) return;
  throw JsonError(std::string("model.") + field + ": got " + got + ", expected " + dump(said).substr(0, 100) + ", as " +
                  elsewhere + " says");
}

}  // namespace

ModelInfo read_model(const Json& manifest) {
  const Part model(member(manifest, "model"), "model");
  const auto present = [&](const char* key) {
    const Json* found = find(member(manifest, "model"), key);
    return found != nullptr && !found->is_null();
  };
  ModelInfo info;
  info.name = model.at("name", string);
  info.target = model.at("target", name);
  info.quant = model.at("quant", name, "fp32");
  model.at("model_type", name);  // what it is, no host of an exported model needs to know
  info.max_loops = model.at("max_loops", whole(1, kMostLoops));
  info.width = model.at("width", count);
  info.parameters = model.at("parameters", whole(0, kMany));
  if (present("config")) {
    info.untrained_loops = model.part("config").at("untrained_loops", or_null(whole(0, kMostLoops)), std::nullopt);
  }
  info.dials = own_dials(model.part("dials"), info.max_loops, info.untrained_loops);
  info.rules = model.at("rules", list_of(name));
  info.segment = model.at("segment", or_null(count));
  info.chunks = call_rows(model, info.segment);
  info.methods = model.at("methods", set_of_names);
  if (!present("text")) {
    if (!present("board") && !present("blocks")) model.refuse("", "neither text nor board", "one of them");
    model.refuse(".text", "none", "a model of texts, as this runner runs");
  }
  if (present("plan")) model.refuse(".plan", "one of layers", "a model whose iterations are alike, as this runner runs");
  info.text = text_info(model.part("text"));
  info.page = model.at("page", or_null(count), std::nullopt);
  const Part states = model.part("state");
  for (const std::string& called : states.names()) info.state.emplace(called, state_of(called, states.part(called), info));
  check_size(info);
  if (present("noise")) {
    const Part noise = model.part("noise");
    for (const std::string& input : noise.names()) info.noise[input] = noise.at(input, positive);
  }
  if (present("retrieval")) {
    const Part space = model.part("retrieval");
    info.hit_rows = space.at("slots", count) * space.at("hits", count);
    if (info.hit_rows > kLargest) space.refuse(".hits", std::to_string(info.hit_rows) + " with their slots", "fewer");
  }
  info.loop_weights = model.at("loop_weights", whole(0, kMany), 0);
  info.once_weights = model.at("once_weights", whole(0, kMany), 0);
  if (present("config")) {
    info.bos_token = model.part("config").at("bos_token_id", or_null(whole(0, info.text.vocab_size - 1)), std::nullopt);
  }
  agree("target", info.target, member(manifest, "target"), "target");
  agree("quant", info.quant, member(member(manifest, "quantization"), "weights"), "quantization.weights");
  const Part methods(member(manifest, "methods"), "methods");
  for (const std::string& called : methods.names()) {
    const Part method = methods.part(called);
    info.signatures[called] = {method.at("inputs", tensors), method.at("outputs", tensors)};
  }
  check_signatures(info);
  return info;
}

// ------------------------------------------------------------------------------------------------------------- parts

TensorSpec State::row() const {
  TensorSpec row = tensor;
  if (per_loop) {
    row.shape.erase(row.shape.begin());
    if (row.slots_axis >= 0) --row.slots_axis;
  }
  return row;
}

TensorSpec State::taken(int64_t rows) const {
  TensorSpec taken = tensor;
  taken.name = source;
  taken.slots_axis = -1;
  if (has_slots()) taken.shape.rbegin()[1] = static_cast<int32_t>(rows);
  return taken;
}

bool ModelInfo::has_rule(const std::string& dial) const {
  return std::find(rules.begin(), rules.end(), dial) != rules.end();
}

bool ModelInfo::remembers() const {
  return std::any_of(state.begin(), state.end(), [](const auto& s) { return s.second.kind == StateKind::kWritten; });
}

std::optional<int64_t> ModelInfo::capacity() const {
  for (const auto& [_, s] : state) {
    if (s.kind == StateKind::kAppend) return s.slots();
  }
  return std::nullopt;
}

int64_t ModelInfo::slots(int64_t positions) const {
  const std::optional<int64_t> most = capacity();
  if (!most || !page) return most.value_or(0);
  return std::min(*most, *page * std::max<int64_t>(1, (positions + *page - 1) / *page));
}

std::optional<int64_t> ModelInfo::room() const {
  const std::optional<int64_t> most = capacity();
  if (!most || !page) return most;
  int64_t slot = 0, others = 0;
  for (const auto& [_, s] : state) {
    (s.kind == StateKind::kAppend ? slot : others) += static_cast<int64_t>(s.tensor.of_slots(1).nbytes());
  }
  return std::min(*most, std::max<int64_t>(0, kLargestState - others) / slot);
}

std::optional<int64_t> ModelInfo::longest() const {
  const std::optional<int64_t> most = room();
  if (!most || !text.max_seq_len) return most ? most : text.max_seq_len;
  return std::min(*most, *text.max_seq_len);
}

const std::array<ExitDial, 9> kExitDials = {{
    {"exit_threshold", &Dials::exit_threshold, Dtype::kFloat32, 1, "P", "brake score to stop at; 1 disables"},
    {"exit_epsilon", &Dials::exit_epsilon, Dtype::kFloat32, 0, "E", "state change to stop at; 0 disables"},
    {"exit_entropy", &Dials::exit_entropy, Dtype::kFloat32, 0, "H", "entropy (nats) to stop at; 0 disables"},
    {"exit_cosine", &Dials::exit_cosine, Dtype::kFloat32, 0, "C",
     "1 - cosine of two loops' states to stop at; 0 disables"},
    {"exit_kl", &Dials::exit_kl, Dtype::kFloat32, 0, "D",
     "KL divergence (nats) of two loops' predictions to stop at; 0 disables"},
    {"exit_entropy_change", &Dials::exit_entropy_change, Dtype::kFloat32, 0, "H",
     "entropy change (nats) to stop at; 0 disables"},
    {"exit_steady", &Dials::exit_steady, Dtype::kInt64, 0, "N",
     "loops without another likeliest token to stop at; 0 disables"},
    {"exit_gap", &Dials::exit_gap, Dtype::kFloat32, 0, "G",
     "mean lead (logits) at which a block is filled in whole; 0 disables"},
    {"route", &Dials::route, Dtype::kFloat32, 0.5, "P",
     "layers that a prompt is run through: -0.5 as routers say, less skips more; 0.5 disables", -1,
     "a number above -1 (0.5 runs every layer once)"},
}};

bool Dials::exits() const {
  return std::any_of(kExitDials.begin(), kExitDials.end(), [&](const ExitDial& d) { return d.enables(this->*d.value); });
}

void Dials::check(int64_t deepest, std::optional<int64_t> untrained) const {
  const auto fail = [](const char* dial, const std::string& got, const std::string& expected) {
    throw ArgumentError(dial, "got " + got + ", expected " + expected);
  };
  if (max_loops < 1 || max_loops > deepest) {
    const std::string trained = "the depth the model was trained to";
    const std::string which =
        untrained.value_or(0) > 0 ? std::to_string(*untrained) + " of them beyond " + trained + ", by untrained_loops in its config.json"
        : untrained               ? trained + "; untrained_loops in its config.json allows more"
                                  : trained;
    fail("max_loops", std::to_string(max_loops), "1.." + std::to_string(deepest) + " (" + which + ")");
  }
  if (min_loops < 1 || min_loops > max_loops) {
    fail("min_loops", std::to_string(min_loops), "1.." + std::to_string(max_loops) + " (max_loops)");
  }
  for (const ExitDial& dial : kExitDials) {
    const double got = this->*dial.value;
    if (dial.off > 0) {
      if (!(got > dial.least)) fail(dial.name, shown(got), dial.expected);
    } else if (dial.dtype == Dtype::kInt64) {
      if (!(got >= 0 && got == std::floor(got))) fail(dial.name, shown(got), "0 (off) or a whole number");
    } else if (!(got >= 0)) {
      fail(dial.name, shown(got), "0 (off) or more");
    }
  }
}

}  // namespace rmse
