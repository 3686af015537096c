// A looped language model that remembers what it was fed: runtimes/host/text.py over the methods of a package.
//
// The host keeps what is kept between calls, and updates it as its kind says: rings and appended rows in their slots, of which
// every iteration reads its row where it lies, states that are replaced, memories that are written once per segment. The first call
// gives nothing before the package is verified to its last byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "calls.h"
#include "engine.h"
#include "package.h"

namespace rmse {

// What feeding tokens gave.
struct Fed {
  std::vector<float> logits;        // (n or 1, V): for every token fed, or for the last one
  std::vector<int64_t> depth;       // (n,): iterations that each position executed
  std::vector<int64_t> iterations;  // per call, the deepest position's: what the call really cost
  // Of the segments that the memory learned, the position behind each, and its mean loss before: 1 where it knew nothing.
  std::vector<std::pair<int64_t, float>> surprises;
};

class Model {
 public:
  // Loads all methods. Throws std::runtime_error: one line saying what is wrong, and what to do.
  // `engine` is that of the package.
  Model(const Package& package, std::unique_ptr<Engine> engine);
  Model(const Model&) = delete;

  const ModelInfo& info() const { return info_; }
  Engine& engine() { return *engine_; }
  int64_t position() const { return position_; }  // tokens fed since `reset`
  size_t state_bytes() const;                     // kept between calls; grows with the text where something is appended
  void leave_memory_blank() { remember_ = false; }
  void set_noise_seed(uint64_t seed) { noise_seed_ = seed; }  // of models that begin from noise; 0 unless set

  void reset();
  // `prefix`: how many of a text's first tokens see each other whatever their order; all of them are in one call.
  // `go_on` is asked before every call but the first: false stops reading there, between two tokens, and `depth` says how many
  // were read; without the last of them there are no logits of it.
  // Throws std::runtime_error: one line saying what is wrong with the tokens, or with the package.
  Fed feed(std::span<const int64_t> tokens, const Dials& dials, bool all_logits = false, int64_t prefix = 0,
           const std::function<bool()>& go_on = nullptr);

  // What is kept between calls, of which a session is made: a tensor by its name. Throws std::runtime_error where there is none.
  const Buffer& kept(const std::string& name) const;
  // Goes on as if `position` tokens had been fed; what is kept is put back afterwards, into `kept`.
  void resume(int64_t position);

  // For timing the loop alone: a call of as many rows as there are tokens, ready for `loop`.
  Calls& prepare(std::span<const int64_t> tokens, const Dials& dials);

 private:
  void make_shared();
  void make_memory();
  void run_trial();
  void check(std::span<const int64_t> tokens) const;
  void check_prefix(int64_t prefix, int64_t count) const;
  void set(const Dials& dials);
  Calls& calls_of(int64_t rows);
  void grow(int64_t positions);
  void keep(const Calls& calls, int64_t count);
  float memorize();  // the segment's mean loss before

  ModelInfo info_;
  std::shared_ptr<Verification> verification_;  // of the package
  std::unique_ptr<Engine> engine_;
  Buffers shared_;  // dials, state, memory, hits
  std::vector<std::unique_ptr<Calls>> calls_;
  std::unique_ptr<Method> memorize_;  // null: there is no memory
  Buffers blank_, learned_;           // a memory that knows nothing; what `memorize` gives
  uint64_t noise_seed_ = 0;
  int64_t slots_;  // of the appended state, as far as it has grown
  int64_t position_ = 0;
  bool remember_ = true;
};

}  // namespace rmse
