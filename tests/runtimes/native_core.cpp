// runtimes/native/core alone, without ExecuTorch: its random numbers and tokens are those of tests/data/sampler.json, and
// a package runs on an engine of ours. test_native_core.py compiles and starts it: native_core SAMPLER.JSON PACKAGE,
// native_core sha256 FILE LENGTHS, or native_core stages PACKAGE MEANWHILE
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/engine.h"
#include "core/generator.h"
#include "core/json.h"
#include "core/model.h"
#include "core/package.h"
#include "core/sampler.h"
#include "core/sha256.h"
#include "core/sha256_blocks.h"
#include "core/text.h"

namespace rmse {
namespace {

int failures = 0;

template <typename Found, typename Expected>
void expect(const std::string& what, const Found& found, const Expected& expected) {
  if (found == expected) return;
  ++failures;
  std::cout << what << ": got " << dump(Json(found)) << ", expected " << dump(Json(expected)) << "\n";
}

uint64_t unsigned_of(const Json& text, int base = 10) { return std::stoull(string(text), nullptr, base); }

// ------------------------------------------------------------------------------------------------------ on record

void check_words(const Json& known) {
  SplitMix64 stream(unsigned_of(known["seed"]));
  for (const Json& word : known["words"]) expect("a word of seed " + dump(known["seed"]), stream.next(), unsigned_of(word, 16));
}

void check_uniform(const Json& known) {
  SplitMix64 stream(unsigned_of(known["seed"]));
  for (const Json& x : known["numbers"]) expect("a number of seed " + dump(known["seed"]), stream.uniform(), x.get<double>());
}

void check_noise(const Json& known) {
  const auto expected = known["numbers"].get<std::vector<float>>();
  const auto found = noise(unsigned_of(known["seed"]), unsigned_of(known["position"]), expected.size());
  expect("noise of seed " + dump(known["seed"]), found, expected);
}

void check_tokens(const Json& known) {
  std::vector<float> logits;
  if (const Json* list = find(known["logits"], "list")) {
    logits = list->get<std::vector<float>>();
  } else {
    const auto of = known["logits"]["noise"].get<std::vector<uint64_t>>();
    logits = noise(of[0], of[1], of[2]);
    for (float& logit : logits) logit *= known["logits"]["times"].get<float>();
  }
  const Json& options = known["options"];
  Sampler sampler({.temperature = options["temperature"].get<double>(),
                   .top_k = options.value("top_k", int64_t{0}),
                   .top_p = options.value("top_p", 1.0),
                   .seed = unsigned_of(options["seed"])});
  const auto unused = known["unused"].get<std::vector<std::pair<int64_t, int64_t>>>();
  std::vector<int64_t> found;
  while (found.size() < known["tokens"].size()) found.push_back(sampler.pick(logits, unused));
  expect(string(known["name"]), found, known["tokens"].get<std::vector<int64_t>>());
}

// ------------------------------------------------------------------------------------------------ another engine

// A method as a function of what its arguments are bound to, by name.
class CountingMethod final : public Method {
 public:
  using Arguments = std::map<std::string, std::byte*>;
  using Work = std::function<void(const Arguments&, int64_t slots)>;

  CountingMethod(const std::string& program, const std::string& name, const MethodSpec& spec, Work work)
      : Method(program, name, spec), work_(std::move(work)) {}

  void resize(size_t, int64_t slots) override { slots_ = slots; }
  void read(size_t input, std::byte* data) override { bound_[spec().inputs[input].name] = data; }
  void write(size_t output, std::byte* data) override { bound_[spec().outputs[output].name] = data; }
  void run() override { work_(bound_, slots_); }

 private:
  Work work_;
  Arguments bound_;
  int64_t slots_ = 0;  // of what is appended
};

// What the prelude of the model below was given, call by call.
struct Given {
  std::vector<float> start, turn;                      // of noise
  std::vector<std::vector<float>> all, last, latest;  // the state
  std::vector<std::vector<int64_t>> slots;            // the numbers of the slots of `all`
};

// A model that counts: token t takes t + 1 loops, each adds one to h, and the logits point at the sum.
class CountingEngine final : public Engine {
 public:
  CountingEngine(const std::string& program, Given& given) : Engine(program), given_(given) {}

  void check(const std::string&, const MethodSpec&) override {}

  std::unique_ptr<Method> load(const std::string& method, const MethodSpec& spec) override {
    using Arguments = CountingMethod::Arguments;
    const auto f32 = [](const Arguments& a, const char* name) { return reinterpret_cast<float*>(a.at(name)); };
    const auto i64 = [](const Arguments& a, const char* name) { return reinterpret_cast<int64_t*>(a.at(name)); };
    const std::map<std::string, CountingMethod::Work> works = {
        {"prelude_1",
         [=, this](const Arguments& a, int64_t slots) {
           *f32(a, "x0") = static_cast<float>(*i64(a, "tokens"));
           given_.start.push_back(*f32(a, "start"));
           given_.turn.push_back(*f32(a, "turn"));
           given_.all.emplace_back(f32(a, "all"), f32(a, "all") + slots);
           given_.slots.emplace_back(i64(a, "slots"), i64(a, "slots") + slots);
           given_.last.emplace_back(f32(a, "last"), f32(a, "last") + 3);
           given_.latest.emplace_back(f32(a, "latest"), f32(a, "latest") + 1);
         }},
        {"begin_1",
         [=](const Arguments& a, int64_t) {
           *f32(a, "first_h") = 0;
           *reinterpret_cast<bool*>(a.at("first_active")) = true;
         }},
        {"step_1",
         [=](const Arguments& a, int64_t) {
           *f32(a, "next_h") = *f32(a, "h") + 1;
           *i64(a, "next_depth") = *i64(a, "depth") + 1;
           const bool going = static_cast<float>(*i64(a, "k")) < *f32(a, "x0");
           for (const char* name : {"next_active", "any_active"}) *reinterpret_cast<bool*>(a.at(name)) = going;
         }},
        {"coda_1", [=](const Arguments& a, int64_t) { *f32(a, "y") = *f32(a, "h"); }},
        {"head_1",
         [=](const Arguments& a, int64_t) {
           for (int v = 0; v < 4; ++v) f32(a, "logits")[v] = -std::fabs(static_cast<float>(v) - *f32(a, "y"));
         }},
    };
    return std::make_unique<CountingMethod>(program(), method, spec, works.at(method));
  }

 private:
  Given& given_;
};

std::string complaint_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void check_engine(const std::string& folder, const Json& start) {
  const Package package = Package::open(folder, "counting");
  Given given;
  Model model(package, std::make_unique<CountingEngine>(package.program(), given));
  model.set_noise_seed(unsigned_of(start["seed"]));
  const std::vector<int64_t> tokens = {0, 2, 1, 0};
  const Fed fed = model.feed(tokens, {.max_loops = 3}, /*all_logits=*/true);
  expect("depth", fed.depth, std::vector<int64_t>{1, 3, 2, 1});
  expect("iterations", fed.iterations, fed.depth);
  Sampler greedy({.temperature = 0});
  std::vector<int64_t> best;
  for (size_t i = 0; i < tokens.size(); ++i) best.push_back(greedy.pick(std::span(fed.logits).subspan(4 * i, 4)));
  expect("the likeliest tokens", best, fed.depth);
  expect("depth at a bound", model.feed(tokens, {.max_loops = 2}).depth, std::vector<int64_t>{1, 2, 2, 1});
  expect("position", model.position(), 8);
  for (const auto& [name, got] : {std::pair("start", &given.start), std::pair("turn", &given.turn)}) {
    got->resize(4);
    expect(std::string("the noise of a Python host: ") + name, *got, start[name].get<std::vector<float>>());
  }
  const std::vector<float> read = {0, 2, 1, 0, 0, 2, 1};  // by all calls but the last
  expect("a ring after seven tokens", given.last.back(), std::vector<float>{1, 0, 2});
  expect("a ring after two", given.last[2], std::vector<float>{0, 2, 0});
  expect("what was replaced", given.latest.back(), std::vector<float>{1});
  std::vector<float> all(8);  // two pages
  std::copy(read.begin(), read.end(), all.begin());
  expect("what was appended", given.all.back(), all);
  expect("what was appended to the first page", given.all[3], std::vector<float>{0, 2, 1, 0});
  expect("the slots of one page", given.slots[3], std::vector<int64_t>{0, 1, 2, 3});
  expect("the slots of two", given.slots.back(), std::vector<int64_t>{0, 1, 2, 3, 4, 5, 6, 7});
  const std::vector<int64_t> too_many(5);
  const std::string long_text = complaint_of([&] { model.feed(too_many, {.max_loops = 3}); });
  expect("a text too long", long_text, std::string("13 tokens are more than the 12 that counting attends to; shorten the text"));
  expect("position after it", model.position(), 8);
  model.reset();
  model.feed(std::span(tokens).first(1), {.max_loops = 3});
  expect("a new text", given.all.back(), std::vector<float>(4));
  const std::string refusal = complaint_of([&] { Package::open(folder, "executorch"); });
  expect("another target", refusal.ends_with("made for counting; this runner takes packages made for executorch"), true);
}

// Every way to a digest that this processor has: its name, then the digests of the file's first 0, 1, .. bytes, and of all. At the
// end, that of the file, and of all its bytes beside those behind the first `lengths`.
void print_digests(const std::string& path, int64_t lengths) {
  const std::string bytes = read_file(path);
  for (const Sha256Way& way : sha256_ways()) {
    std::cout << way.name << "\n";
    for (int64_t n = 0; n < lengths; ++n) std::cout << sha256_by(way, std::string_view(bytes).substr(0, n)) << "\n";
    std::cout << sha256_by(way, bytes) << "\n";
  }
  std::cout << sha256_of_file(path) << "\n";
  const auto source = [](std::string_view left) {
    return [left](char* to, size_t most) mutable {
      const size_t count = left.copy(to, most);
      left.remove_prefix(count);
      return count;
    };
  };
  for (const std::string& digest : sha256_of_two(source(bytes), source(std::string_view(bytes).substr(lengths)))) {
    std::cout << digest << "\n";
  }
}

// How far a package comes, and the line that ends it. `meanwhile`: what becomes of its program when it was opened, "cut" or
// "written".
void print_stages(const std::string& folder, const std::string& meanwhile) {
  Given given;
  const std::string complaint = complaint_of([&] {
    const Package package = Package::open(folder, "counting");
    std::cout << "opened\n";
    if (meanwhile == "cut" && truncate(package.program().c_str(), 70000) != 0) std::cout << "not cut\n";
    if (meanwhile == "written") std::fstream(package.program(), std::ios::in | std::ios::out).put('x');
    Model model(package, std::make_unique<CountingEngine>(package.program(), given));
    const std::vector<int64_t> tokens = {0};
    model.feed(tokens, {.max_loops = 3});
    std::cout << "fed\n";
  });
  if (!given.start.empty()) std::cout << "computed\n";
  std::cout << complaint << "\n";
}

}  // namespace
}  // namespace rmse

int main(int count, char** argv) {
  if (count == 4) {
    if (argv[1] == std::string("stages")) {
      rmse::print_stages(argv[2], argv[3]);
    } else {
      rmse::print_digests(argv[2], std::stoll(argv[3]));
    }
    return 0;
  }
  const rmse::Json golden = rmse::parse_json(rmse::read_file(argv[1]));
  for (const auto& known : golden["words"]) rmse::check_words(known);
  for (const auto& known : golden["uniform"]) rmse::check_uniform(known);
  for (const auto& known : golden["noise"]) rmse::check_noise(known);
  for (const auto& known : golden["tokens"]) rmse::check_tokens(known);
  rmse::check_engine(argv[2], golden["start"]);
  return rmse::failures == 0 ? 0 : 1;
}
