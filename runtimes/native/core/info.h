// What a package's manifest says about its model, as rmse_edge/info.py has it: typed, bounded, of one piece.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "json.h"
#include "tensor.h"

namespace rmse {

// The quality dial of one call. Loops count from 1; rmse_edge/loop/stop.py has the rules.
struct Dials {
  int64_t max_loops = 1;
  int64_t min_loops = 1;
  double exit_threshold = 1;  // >= 1 disables the gate
  double exit_epsilon = 0;    // 0 disables the delta rule
  double exit_entropy = 0;    // 0 disables the entropy rule
  double exit_cosine = 0;     // and so on
  double exit_kl = 0;
  double exit_entropy_change = 0;
  double exit_steady = 0;  // loops
  double exit_gap = 0;
  double route = 0.5;  // of models with a plan, which the runner does not run; dials have it

  // Throws std::runtime_error naming the dial and its range, for a model that runs `deepest` loops at most, `untrained` of
  // them beyond the depth that it was trained to, where its configuration says so.
  void check(int64_t deepest, std::optional<int64_t> untrained) const;
  bool exits() const;  // whether any rule can stop a position before `max_loops`
};

// The threshold of an exit rule, as rmse_edge/loop/dials.py has it.
struct ExitDial {
  const char* name;
  double Dials::*value;
  Dtype dtype;         // of the scalar that programs take
  double off = 0;      // this value disables the rule; where it is positive, so does everything above, and `least` is no value
  const char* symbol;  // of its value, in help
  const char* help;
  double least = 0;
  const char* expected = "a positive number (1 disables it)";  // of a rule with a positive `off`

  bool enables(double chosen) const { return off > 0 ? chosen < off : chosen > off; }
};

extern const std::array<ExitDial, 9> kExitDials;

enum class StateKind {
  kRing,     // the row of position p lies in slot p mod W of the last axis but one
  kAppend,   // the row of position p lies in slot p of it
  kReplace,  // the source is the state
  kWritten,  // a method that is called once per segment gives it anew
};

// A tensor that is kept between calls; rmse_edge/loop/contract.py says more.
struct State {
  TensorSpec tensor;
  StateKind kind;
  std::string source;  // of written ones the method that gives them, of all others the tensor that they are updated with
  std::set<std::string> read_by;  // some of prelude, loop, coda, commit
  bool per_loop;                  // (K, ...): iteration k reads row k

  bool has_slots() const { return kind == StateKind::kRing || kind == StateKind::kAppend; }
  int64_t slots() const { return tensor.shape.rbegin()[1]; }
  TensorSpec row() const;                  // what one iteration reads of it
  TensorSpec taken(int64_t rows) const;    // its source in calls of so many rows
};

// Of a model of texts.
struct TextInfo {
  int64_t vocab_size, rotary_dims;  // rotary_dims: channels of each head that turn with the position; 0: there are no angles
  double rope_theta;
  std::map<std::string, double> further_thetas;  // of layers that turn by another base: cos_NAME and sin_NAME are given besides
  bool prefix;  // a text may begin with positions that see each other whatever their order
  std::optional<int64_t> max_seq_len;
  std::vector<int64_t> eos_tokens;                         // each of them ends a text
  std::vector<std::pair<int64_t, int64_t>> unused_tokens;  // ranges [first, end) of ids that are never to be drawn
};

struct ModelInfo {
  std::string name, target, quant;
  int64_t max_loops, width, parameters;
  std::optional<int64_t> untrained_loops;  // of max_loops, those beyond the trained depth; none: its architecture has no such setting
  Dials dials;                        // the checkpoint's own settings
  std::vector<std::string> rules;     // the dials that the model has
  std::vector<int64_t> chunks;        // rows of the calls that exist, ascending; the first is 1
  std::optional<int64_t> segment;     // no call crosses a multiple of so many positions
  std::set<std::string> methods;      // that the model has, whoever drives the loop
  std::optional<int64_t> page;        // slots by which what is appended grows; none: nothing is, or all are there from the start
  std::map<std::string, State> state;
  std::map<std::string, double> noise;  // inputs to be filled with noise: their standard deviation
  TextInfo text;
  int64_t hit_rows = 0;  // vectors that may be retrieved at once; 0: the model has no retrieval head
  int64_t loop_weights, once_weights;  // that one token is multiplied with in every loop and, whatever its depth, once
  std::optional<int64_t> bos_token;
  std::map<std::string, MethodSpec> signatures;  // what every METHOD_ROWS takes and gives

  bool has(const std::string& method) const { return methods.contains(method); }
  bool has_rule(const std::string& dial) const;
  bool remembers() const;                  // whether it has a memory that is written while it reads
  std::optional<int64_t> capacity() const; // positions that a text may have at most, for its state
  std::optional<int64_t> room() const;     // positions whose state is not too large, as far as it grows
  int64_t slots(int64_t positions) const;  // of the appended state of a text of so many positions; 0: there is none
  std::optional<int64_t> longest() const;  // of a text, in tokens, for its state and the export
};

// Throws JsonError naming the field that is missing or does not fit, by itself or beside the others.
ModelInfo read_model(const Json& manifest);

}  // namespace rmse
