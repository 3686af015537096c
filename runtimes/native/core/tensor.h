// Tensors as methods take and give them, and the memory that they lie in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace rmse {

enum class Dtype { kFloat32, kFloat16, kBfloat16, kInt64, kInt32, kInt8, kUint8, kBool };

std::optional<Dtype> dtype_of(std::string_view name);  // "float32", as manifests have it; none where it is another
std::string_view name_of(Dtype dtype);
size_t nbytes_of(Dtype dtype);  // of one element

struct TensorSpec {
  std::string name;
  Dtype dtype;
  std::vector<int32_t> shape;
  // The axis that is as long as the appended state has slots just then, `shape` the most there are; -1: there is none.
  int slots_axis = -1;

  TensorSpec of_slots(int64_t slots) const;  // the same where the appended state has so many slots
  size_t nbytes() const;
  bool fits(const TensorSpec& other) const { return dtype == other.dtype && shape == other.shape; }
};

struct MethodSpec {
  std::vector<TensorSpec> inputs, outputs;
};

// The memory of one tensor, zeroed. An engine may read a few bytes beyond its end.
class Buffer {
 public:
  explicit Buffer(const TensorSpec& spec);

  const TensorSpec& spec() const { return spec_; }
  size_t nbytes() const { return nbytes_; }
  size_t outer() const;  // of slots in the last axis but one: how many times they are there
  std::byte* data() const { return bytes_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data());
  }
  void copy(const Buffer& other);
  void clear();

 private:
  struct Free {
    void operator()(std::byte* room) const;
  };

  TensorSpec spec_;
  size_t nbytes_;
  std::unique_ptr<std::byte[], Free> room_;
  std::byte* bytes_;  // aligned, within the room
};

using Buffers = std::map<std::string, Buffer>;  // by the names of their tensors

}  // namespace rmse
