#include "generator.h"

namespace rmse {
namespace {

constexpr uint64_t kStep = 0x9e3779b97f4a7c15;
constexpr int kPieces = 12;  // of 16 bits, which are added up to a nearly normal number

}  // namespace

uint64_t SplitMix64::next() {
  uint64_t z = state_ += kStep;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

double SplitMix64::uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

std::vector<float> noise(uint64_t seed, uint64_t position, size_t count) {
  // The position's own stream starts from number `position` of another one.
  SplitMix64 own(SplitMix64(SplitMix64(seed).next() + position * kStep).next());
  std::vector<float> numbers(count);
  for (float& number : numbers) {
    int64_t sum = 0;
    for (int word = 0; word < kPieces / 4; ++word) {
      const uint64_t bits = own.next();
      for (int shift = 0; shift < 64; shift += 16) sum += bits >> shift & 0xffff;
    }
    number = static_cast<float>(static_cast<double>(sum - kPieces / 2 * 0xffff) / 0x1p16);
  }
  return numbers;
}

}  // namespace rmse
