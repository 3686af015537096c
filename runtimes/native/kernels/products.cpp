// The choice of an instruction set, and the products in plain C++.
#include "products.h"

#include <cstdlib>
#include <cstring>

#include "matrix_product.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace rmse {
namespace {

inline int32_t four_products(const int8_t* a, const int8_t* b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
}

struct PortableInt8 {
  static constexpr int64_t kBytes = kBlock;

  template <int N>
  static void rows(const uint8_t* codes, const float* scales, const RoundedRow& x, int64_t blocks, Lanes (&sums)[N]) {
    for (int r = 0; r < N; ++r) {
      sums[r] = Lanes{};
      for (int64_t b = 0; b < blocks; ++b) {
        const auto* w = reinterpret_cast<const int8_t*>(codes + (r * blocks + b) * kBytes);
        const float factor = scales[r * blocks + b] * x.scales[b];
        for (int l = 0; l < kLanes; ++l) {
          sums[r][l] += factor * static_cast<float>(four_products(w + 4 * l, x.values + b * kBlock + 4 * l));
        }
      }
    }
  }
};

struct PortableInt4 {
  static constexpr int64_t kBytes = kBlock / 2;

  template <int N>
  static void rows(const uint8_t* codes, const float* scales, const RoundedRow& x, int64_t blocks, Lanes (&sums)[N]) {
    for (int r = 0; r < N; ++r) {
      sums[r] = Lanes{};
      for (int64_t b = 0; b < blocks; ++b, codes += kBytes) {
        int8_t w[kBlock];
        for (int j = 0; j < kBytes; ++j) {
          w[j] = static_cast<int8_t>(codes[j] & 15);
          w[j + kBytes] = static_cast<int8_t>(codes[j] >> 4);
        }
        const float factor = scales[r * blocks + b] * x.scales[b];
        for (int l = 0; l < kLanes; ++l) {
          const int32_t sum = four_products(w + 4 * l, x.values + b * kBlock + 4 * l) - x.excess[b * kLanes + l];
          sums[r][l] += factor * static_cast<float>(sum);
        }
      }
    }
  }
};

Products choose() {
  const char* wanted = std::getenv("RMSE_PRODUCTS");
  if (wanted != nullptr && std::strcmp(wanted, "portable") == 0) return portable_products();
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") ? avx2_products() : portable_products();
#elif defined(__aarch64__) && defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 ? dotprod_products() : neon_products();
#elif defined(__aarch64__)
  return dotprod_products();  // every Apple processor since the A11 has it
#else
  return portable_products();
#endif
}

}  // namespace

Products portable_products() {
  return {"portable", float_product, integer_product<PortableInt8>, integer_product<PortableInt4>};
}

const Products& products() {
  static const Products chosen = choose();
  return chosen;
}

}  // namespace rmse
