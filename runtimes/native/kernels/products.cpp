// The choice of an instruction set, and the products in plain C++.
#include "products.h"

#include <cstdlib>
#include <cstring>

#define RMSE_WIDTH 4
#include "products_of.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace rmse {
namespace {

struct Portable {
  static constexpr int kWidth = 4, kRows = 4, kVectors = 1, kTiles = 1, kFloatRows = 1, kAttention = 4, kColumns = 1;
  using Ints = Vectors<kWidth>::Ints;

  template <int V, int R>
  static void int4(const uint8_t* codes, int64_t, const RowsAt<R>& x, int64_t b, Ints (&sums)[V][R]) {
    for (int r = 0; r < R; ++r) {
      int32_t found[kWidth] = {};
      for (int c = 0; c < 4; ++c) {
        const int8_t* values = x.values[r] + b * kBlock + 8 * c;
        for (int o = 0; o < kWidth; ++o) {
          const uint8_t* w = codes + 4 * kTile * c + 4 * o;
          for (int i = 0; i < 4; ++i) found[o] += (w[i] & 15) * values[i] + (w[i] >> 4) * values[i + 4];
        }
      }
      for (int o = 0; o < kWidth; ++o) sums[0][r][o] = found[o] - 8 * x.sums[r][b];
    }
  }

  template <int V, int R>
  static void int8(const uint8_t* codes, int64_t, const RowsAt<R>& x, int64_t b, Ints (&sums)[V][R]) {
    for (int r = 0; r < R; ++r) {
      int32_t found[kWidth] = {};
      for (int c = 0; c < 8; ++c) {
        const int8_t* values = x.values[r] + b * kBlock + 4 * c;
        for (int o = 0; o < kWidth; ++o) {
          for (int i = 0; i < 4; ++i) found[o] += (codes[4 * kTile * c + 4 * o + i] - 128) * values[i];
        }
      }
      for (int o = 0; o < kWidth; ++o) sums[0][r][o] = found[o];
    }
  }
};

// By name, the best first.
Products choose() {
  const char* wanted = std::getenv("RMSE_PRODUCTS");
  const auto may = [&](const char* name, bool can) {
    return can && (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, name) == 0);
  };
#if defined(__x86_64__)
  const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (may("vnni", vnni)) return vnni_products();
  if (may("avx2", __builtin_cpu_supports("avx2"))) return avx2_products();
#elif defined(__aarch64__)
#if defined(__linux__)
  const bool dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  const bool dotprod = true;  // every Apple processor since the A11 has it
#endif
  if (may("dotprod", dotprod)) return dotprod_products();
  if (may("neon", true)) return neon_products();
#endif
  static_cast<void>(may);
  return portable_products();
}

}  // namespace

Products portable_products() { return products_of<Portable>("portable"); }

const Products& products() {
  static const Products chosen = choose();
  return chosen;
}

}  // namespace rmse
