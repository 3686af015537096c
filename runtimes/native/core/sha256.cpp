#include "sha256.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "sha256_blocks.h"

namespace rmse {

const uint32_t kSha256Rounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

namespace {

constexpr size_t kBlockBytes = 64;
constexpr size_t kRead = 256 << 10;  // bytes of a file at a time: they are hashed while they are in the cache

void plain_blocks(uint32_t* state, const uint8_t* blocks, size_t count) {
  for (; count > 0; --count, blocks += kBlockBytes) {
    std::array<uint32_t, 64> w;
    for (size_t i = 0; i < 16; ++i) {
      const uint8_t* p = blocks + 4 * i;
      w[i] = uint32_t{p[0]} << 24 | uint32_t{p[1]} << 16 | uint32_t{p[2]} << 8 | p[3];
    }
    for (size_t i = 16; i < 64; ++i) {
      const uint32_t s0 = std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ w[i - 15] >> 3;
      const uint32_t s1 = std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (size_t i = 0; i < 64; ++i) {
      const uint32_t s1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
      const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kSha256Rounds[i] + w[i];
      const uint32_t s0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
      const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const std::array<uint32_t, 8> sums = {a, b, c, d, e, f, g, h};
    for (size_t i = 0; i < 8; ++i) state[i] += sums[i];
  }
}

class Sha256 {
 public:
  explicit Sha256(const Sha256Way& way) : way_(way) {}

  // Two messages, each of which has come in whole blocks so far.
  static void update(std::array<Sha256, 2>& two, std::array<std::string_view, 2> bytes) {
    size_t both = std::min(bytes[0].size(), bytes[1].size()) / kBlockBytes;
    if (two[0].way_.pairs == nullptr || two[0].held_ + two[1].held_ > 0) both = 0;
    if (both > 0) {
      uint32_t* const states[] = {two[0].state_.data(), two[1].state_.data()};
      const uint8_t* const blocks[] = {reinterpret_cast<const uint8_t*>(bytes[0].data()),
                                       reinterpret_cast<const uint8_t*>(bytes[1].data())};
      two[0].way_.pairs(states, blocks, both);
    }
    for (size_t i = 0; i < 2; ++i) {
      two[i].total_ += both * kBlockBytes;
      two[i].update(bytes[i].substr(both * kBlockBytes));
    }
  }

  void update(std::string_view bytes) {
    total_ += bytes.size();
    if (held_ > 0) {
      const size_t n = std::min(bytes.size(), kBlockBytes - held_);
      hold(bytes.substr(0, n));
      bytes.remove_prefix(n);
      if (held_ < kBlockBytes) return;
      way_.blocks(state_.data(), block_.data(), 1);
      held_ = 0;
    }
    const size_t whole = bytes.size() / kBlockBytes;
    way_.blocks(state_.data(), reinterpret_cast<const uint8_t*>(bytes.data()), whole);
    hold(bytes.substr(whole * kBlockBytes));
  }

  std::string finish() {
    constexpr size_t kLength = sizeof(uint64_t);
    const size_t padding = 1 + (2 * kBlockBytes - kLength - 1 - held_) % kBlockBytes;
    std::string end(padding + kLength, '\0');
    end[0] = '\x80';
    for (size_t i = 0; i < kLength; ++i) end[padding + i] = static_cast<char>(8 * total_ >> (56 - 8 * i));
    update(end);
    std::string hexadecimal(8 * state_.size(), '0');
    for (size_t i = 0; i < hexadecimal.size(); ++i) {
      hexadecimal[i] = "0123456789abcdef"[state_[i / 8] >> (28 - 4 * (i % 8)) & 15];
    }
    return hexadecimal;
  }

 private:
  void hold(std::string_view bytes) {
    if (bytes.empty()) return;
    std::memcpy(block_.data() + held_, bytes.data(), bytes.size());
    held_ += bytes.size();
  }

  const Sha256Way& way_;
  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, kBlockBytes> block_{};
  size_t held_ = 0;  // bytes of the block that are there
  uint64_t total_ = 0;
};

}  // namespace

const std::vector<Sha256Way>& sha256_ways() {
  static const std::vector<Sha256Way> ways = [] {
    std::vector<Sha256Way> found = {{"x86", sha256_of_x86(), sha256_pairs_of_x86()},
                                    {"arm", sha256_of_arm(), sha256_pairs_of_arm()},
                                    {"plain", plain_blocks, nullptr}};
    std::erase_if(found, [](const Sha256Way& way) { return way.blocks == nullptr; });
    return found;
  }();
  return ways;
}

std::string sha256_by(const Sha256Way& way, std::string_view bytes) {
  Sha256 digest(way);
  digest.update(bytes);
  return digest.finish();
}

std::string sha256(std::string_view bytes) { return sha256_by(sha256_ways().front(), bytes); }

std::string sha256_of_pieces(const Sha256Source& read) {
  Sha256 digest(sha256_ways().front());
  std::vector<char> piece(kRead);
  while (const size_t n = read(piece.data(), piece.size())) digest.update({piece.data(), n});
  return digest.finish();
}

std::array<std::string, 2> sha256_of_two(const Sha256Source& first, const Sha256Source& second) {
  std::array<Sha256, 2> digests = {Sha256(sha256_ways().front()), Sha256(sha256_ways().front())};
  std::vector<char> pieces(2 * kRead);
  while (true) {
    char *one = pieces.data(), *other = one + kRead;
    const size_t count = first(one, kRead), other_count = second(other, kRead);
    if (count + other_count == 0) break;
    Sha256::update(digests, {std::string_view(one, count), std::string_view(other, other_count)});
  }
  return {digests[0].finish(), digests[1].finish()};
}

std::string sha256_of_file(const std::string& path) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (file == nullptr) throw std::runtime_error(path + ": cannot be read (" + std::strerror(errno) + ")");
  std::setvbuf(file.get(), nullptr, _IONBF, 0);  // the pieces are large enough
  const std::string digest = sha256_of_pieces([&](char* to, size_t most) { return std::fread(to, 1, most, file.get()); });
  if (std::ferror(file.get())) throw std::runtime_error(path + ": cannot be read to its end");
  return digest;
}

}  // namespace rmse
