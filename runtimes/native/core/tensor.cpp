#include "tensor.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <new>
#include <numeric>

namespace rmse {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kSlack = 128;  // bytes: XNNPACK reads a few beyond the end

struct Type {
  std::string_view name;
  Dtype dtype;
  size_t nbytes;
};

constexpr Type kTypes[] = {
    {"float32", Dtype::kFloat32, 4}, {"float16", Dtype::kFloat16, 2}, {"bfloat16", Dtype::kBfloat16, 2},
    {"int64", Dtype::kInt64, 8},     {"int32", Dtype::kInt32, 4},     {"int8", Dtype::kInt8, 1},
    {"uint8", Dtype::kUint8, 1},     {"bool", Dtype::kBool, 1},
};

const Type& type_of(Dtype dtype) {
  return *std::find_if(std::begin(kTypes), std::end(kTypes), [&](const Type& t) { return t.dtype == dtype; });
}

}  // namespace

std::optional<Dtype> dtype_of(std::string_view name) {
  const auto known = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const Type& t) { return t.name == name; });
  return known == std::end(kTypes) ? std::nullopt : std::optional(known->dtype);
}

std::string_view name_of(Dtype dtype) { return type_of(dtype).name; }

size_t nbytes_of(Dtype dtype) { return type_of(dtype).nbytes; }

TensorSpec TensorSpec::of_slots(int64_t slots) const {
  TensorSpec grown = *this;
  if (slots_axis >= 0) grown.shape[slots_axis] = static_cast<int32_t>(slots);
  return grown;
}

size_t TensorSpec::nbytes() const {
  size_t bytes = nbytes_of(dtype);
  for (const int32_t n : shape) bytes *= n;
  return bytes;
}

Buffer::Buffer(const TensorSpec& spec)
    : spec_(spec),
      nbytes_(spec.nbytes()),
      // Zeros from the system, which gives memory only where it is written: a ring is large, and a text may be short.
      room_(static_cast<std::byte*>(std::calloc(nbytes_ + kSlack + kAlignment, 1))) {
  if (room_ == nullptr) throw std::bad_alloc();
  const auto address = reinterpret_cast<uintptr_t>(room_.get());
  bytes_ = room_.get() + (kAlignment - address % kAlignment) % kAlignment;
}

size_t Buffer::outer() const {
  return std::accumulate(spec_.shape.begin(), spec_.shape.end() - 2, size_t{1}, std::multiplies<>());
}

void Buffer::Free::operator()(std::byte* room) const { std::free(room); }

void Buffer::copy(const Buffer& other) { std::memcpy(data(), other.data(), nbytes_); }

void Buffer::clear() { std::memset(data(), 0, nbytes_); }

}  // namespace rmse
