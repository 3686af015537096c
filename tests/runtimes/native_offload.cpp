// runtimes/native/offload alone, without ExecuTorch. test_offload.py compiles and starts it:
//
//   native_offload read FILE EXPERTS BUDGET CALLS NEEDED READERS [shrink|touch|wait]
//
// calls for NEEDED random experts at a time, with READERS threads, checks every byte of what it is given, and prints figures as JSON.
// Byte i of expert e in piece p, of which the file holds one after the other, is 131 e + 31 p + 7 i, modulo 256. `shrink` and `touch`
// do that to the file half way; `wait` says "ready" then, and goes on when it reads a line.
//
//   native_offload memory ROOT        what is free, of a tree of system files
//   native_offload budget TEXT TOTAL  bytes of a budget
//   native_offload forecast           how many of the experts of loop 1 are guessed from loop 0
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "offload/budget.h"
#include "offload/expert_cache.h"
#include "offload/expert_file.h"
#include "offload/expert_slots.h"
#include "offload/forecast.h"

namespace rmse {
namespace {

constexpr std::array<size_t, 4> kSizes = {20000, 2560, 10000, 1280};

std::byte expected(int64_t expert, size_t piece, size_t i) {
  return static_cast<std::byte>(131 * static_cast<size_t>(expert) + 31 * piece + 7 * i);
}

bool right(const ExpertCache::Given& given) {
  for (size_t p = 0; p < kSizes.size(); ++p) {
    const std::byte* at = given.pieces[p];
    for (size_t i = 0; i < kSizes[p]; ++i) {
      if (at[i] != expected(given.expert, p, i)) return false;
    }
  }
  return true;
}

int read(const std::string& path, int64_t experts, const std::string& budget, int64_t calls, int64_t needed,
         int64_t readers, const std::string& event) {
  ExpertFile file(path);
  ExpertLayer layer;
  layer.experts = experts;
  int64_t offset = 0;
  for (size_t p = 0; p < kSizes.size(); ++p) {
    layer.pieces[p] = {offset, kSizes[p]};
    offset += experts * static_cast<int64_t>(kSizes[p]);
  }
  const int64_t bytes = ExpertBudget::parse(budget).bytes(experts * static_cast<int64_t>(layer.bytes()));
  ExpertCache cache(file, {layer}, bytes, readers);
  std::mt19937 random(1);
  int64_t most = 0;
  for (int64_t call = 0; call < calls; ++call) {
    if (call == calls / 2 && event == "shrink") std::filesystem::resize_file(path, 1000);
    if (call == calls / 2 && event == "touch") std::filesystem::last_write_time(path, std::filesystem::file_time_type::clock::now());
    if (call == calls / 2 && event == "wait") {
      std::string line;
      std::cout << "ready" << std::endl;
      std::getline(std::cin, line);
    }
    std::vector<int64_t> wanted;
    while (static_cast<int64_t>(wanted.size()) < needed) {
      const auto e = static_cast<int64_t>(random() % static_cast<uint64_t>(experts));
      const auto place = std::lower_bound(wanted.begin(), wanted.end(), e);
      if (place == wanted.end() || *place != e) wanted.insert(place, e);
    }
    cache.want(0, call % 3, wanted);
    std::vector<int64_t> guess;
    for (int i = 0; i < 5; ++i) guess.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(experts)));
    cache.expect(guess);
    std::vector<int64_t> found;
    for (auto given = cache.next(); !given.empty(); given = cache.next()) {
      for (const ExpertCache::Given& one : given) {
        if (!right(one)) throw std::runtime_error("expert " + std::to_string(one.expert) + " has other bytes");
        found.push_back(one.expert);
      }
      most = std::max(most, cache.resident_bytes());
    }
    if (const std::string problem = cache.problem(); !problem.empty()) throw std::runtime_error(problem);
    std::sort(found.begin(), found.end());
    if (found != wanted) throw std::runtime_error("was given other experts than it wanted");
  }
  const ExpertFigures f = cache.figures();
  int64_t hits = 0, all = 0;
  for (const ExpertFigures::Loop& loop : f.loops) hits += loop.found, all += loop.wanted;
  std::printf("{\"budget\": %lld, \"most\": %lld, \"wanted\": %lld, \"found\": %lld, \"read\": %lld, \"ahead\": %lld, "
              "\"used\": %lld, \"wasted\": %lld}\n",
              static_cast<long long>(bytes), static_cast<long long>(most), static_cast<long long>(all),
              static_cast<long long>(hits), static_cast<long long>(f.bytes_read), static_cast<long long>(f.read_ahead),
              static_cast<long long>(f.used), static_cast<long long>(f.wasted));
  return 0;
}

int forecast() {
  constexpr int64_t kExperts = 64, kTop = 4, kTokens = 50;
  Forecast learned(kExperts, kTop);
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> step(kExperts);
  for (float& x : step) x = 2 * normal(random);
  int64_t right = 0;
  for (int64_t token = 0; token < kTokens; ++token) {
    std::vector<float> scores(kExperts), next(kExperts);
    for (int64_t e = 0; e < kExperts; ++e) next[e] = (scores[e] = normal(random)) + step[e] + 0.01f * normal(random);
    const bool active = true;
    std::vector<int64_t> guess, none;
    learned.see(0, scores.data(), &active, 1, guess);
    learned.see(1, next.data(), &active, 1, none);
    std::vector<int64_t> order(kExperts);
    for (int64_t e = 0; e < kExperts; ++e) order[e] = e;
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return next[a] > next[b]; });
    for (int64_t i = 0; i < kTop; ++i) right += std::count(guess.begin(), guess.end(), order[i]);
  }
  std::printf("%lld of %lld\n", static_cast<long long>(right), static_cast<long long>(kTop * kTokens));
  return 0;
}

}  // namespace
}  // namespace rmse

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  try {
    if (words.at(0) == "read") {
      return rmse::read(words.at(1), std::stoll(words.at(2)), words.at(3), std::stoll(words.at(4)), std::stoll(words.at(5)),
                        std::stoll(words.at(6)), words.size() > 7 ? words[7] : "");
    }
    if (words[0] == "memory") {
      std::cout << rmse::available_memory(words.at(1)).value_or(-1) << "\n";
    } else if (words[0] == "budget") {
      std::cout << rmse::ExpertBudget::parse(words.at(1)).bytes(std::stoll(words.at(2))) << "\n";
    } else {
      return rmse::forecast();
    }
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}
