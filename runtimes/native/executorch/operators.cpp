// Registers the kernels as operators of the ExecuTorch runtime (export/executorch/operators.py says what they mean), and gives
// hosts the C functions of operators.h.
#include "operators.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/event_tracer_hooks.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>
#include <executorch/runtime/platform/platform.h>

#include "../core/errors.h"
#include "../kernels/attention.h"
#include "../kernels/experts.h"
#include "../kernels/linear.h"
#include "../offload/offload.h"

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Kernel;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;
using executorch::runtime::internal::EventTracerProfileOpScope;

bool is(const Tensor& t, ScalarType type, ssize_t dims) { return t.scalar_type() == type && t.dim() == dims; }
bool is(const Tensor& t, ScalarType type) { return t.scalar_type() == type; }

// The arguments of a call, one after the other.
class Arguments {
 public:
  explicit Arguments(Span<EValue*> args) : args_(args) {}

  const Tensor& tensor() { return args_[next_++]->toTensor(); }
  // Null where there is none.
  const Tensor* optional() {
    EValue* value = args_[next_++];
    return value->isNone() ? nullptr : &value->toTensor();
  }
  int64_t integer() { return args_[next_++]->toInt(); }
  float number() { return static_cast<float>(args_[next_++]->toDouble()); }
  Tensor& out() { return args_[next_]->toTensor(); }

 private:
  Span<EValue*> args_;
  size_t next_ = 0;
};

// Which of so many rows are active, by flags that are of as many rows each; false where they do not fit.
bool read(const Tensor* flags, int64_t rows, rmse::Active& active) {
  if (flags == nullptr) return true;
  if (!is(*flags, ScalarType::Bool) || flags->numel() == 0 || rows % flags->numel() != 0) return false;
  active = {flags->const_data_ptr<bool>(), rows / flags->numel()};
  return true;
}

// The matrix of which `codes` (..., tiles, blocks, bytes) and `scales` (..., tiles, groups, kTile) have the tiles; false where
// they do not fit.
bool read(const Tensor& codes, const Tensor& scales, ssize_t dims, int64_t outputs, int64_t inputs, rmse::Matrix& matrix) {
  if (!is(codes, ScalarType::Byte, dims) || !is(scales, ScalarType::BFloat16, dims)) return false;
  matrix.codes = codes.const_data_ptr<uint8_t>();
  matrix.scales = static_cast<const uint16_t*>(scales.const_data_ptr());
  matrix.outputs = outputs;
  matrix.blocks = codes.size(dims - 2);
  matrix.bits = static_cast<int>(codes.size(dims - 1) * 8 / (rmse::kTile * rmse::kBlock));
  const int64_t groups = scales.size(dims - 2);
  if (groups == 0 || matrix.blocks % groups != 0) return false;
  matrix.shared = matrix.blocks / groups;
  return (matrix.bits == 4 || matrix.bits == 8) && codes.size(dims - 1) == matrix.block_bytes() && outputs > 0 &&
         codes.size(dims - 3) == matrix.tiles() && scales.size(dims - 3) == matrix.tiles() &&
         scales.size(dims - 1) == rmse::kTile && matrix.blocks == (inputs + rmse::kBlock - 1) / rmse::kBlock &&
         (dims == 3 || codes.size(0) == scales.size(0));
}

bool run_linear(Arguments args) {
  const Tensor& x = args.tensor();
  const Tensor& codes = args.tensor();
  const Tensor& scales = args.tensor();
  const Tensor* bias = args.optional();
  const Tensor* flags = args.optional();
  const int64_t outputs = args.integer();
  Tensor& out = args.out();
  if (!is(x, ScalarType::Float) || !is(out, ScalarType::Float) || x.dim() == 0 || out.dim() != x.dim()) return false;
  const int64_t inputs = x.size(x.dim() - 1);
  if (inputs == 0) return false;
  const int64_t rows = x.numel() / inputs;
  rmse::Matrix weights;
  rmse::Active active;
  if (!read(codes, scales, 3, outputs, inputs, weights) || out.numel() != rows * outputs ||
      (bias != nullptr && !(is(*bias, ScalarType::Float, 1) && bias->size(0) == outputs)) || !read(flags, rows, active)) {
    return false;
  }
  rmse::quantized_linear(weights, bias == nullptr ? nullptr : bias->const_data_ptr<float>(), x.const_data_ptr<float>(), rows,
                         inputs, active, out.mutable_data_ptr<float>());
  return true;
}

bool run_experts(Arguments args, bool quantized) {
  const Tensor& x = args.tensor();
  const Tensor& logits = args.tensor();
  const Tensor& scores = args.tensor();
  const Tensor& active = args.tensor();
  const Tensor& up = args.tensor();
  const Tensor* up_scales = quantized ? &args.tensor() : nullptr;
  const Tensor& down = args.tensor();
  const Tensor* down_scales = quantized ? &args.tensor() : nullptr;
  if (!is(x, ScalarType::Float, 2) || !is(logits, ScalarType::Float, 2) || !is(scores, ScalarType::Float, 2) ||
      !is(active, ScalarType::Bool, 1) || up.dim() != (quantized ? 4 : 3) || down.dim() != up.dim()) {
    return false;
  }
  rmse::ExpertShape shape;
  rmse::ExpertWeights gate_up_weights, down_weights;
  shape.rows = x.size(0);
  shape.width = x.size(1);
  shape.experts = logits.size(1);
  shape.integers = quantized;
  const int64_t hidden = quantized ? args.integer() : down.size(2);
  shape.top_k = args.integer();
  shape.gate_cap = args.number();
  shape.up_cap = args.number();
  const Tensor* places = quantized ? args.optional() : nullptr;
  Tensor& out = args.out();
  if (places != nullptr) {
    if (!is(*places, ScalarType::Long, 1) || places->size(0) != shape.experts) return false;
    const int64_t* place = places->const_data_ptr<int64_t>();
    if (std::any_of(place, place + shape.experts, [&](int64_t p) { return p < 0 || p >= shape.experts; })) return false;
    shape.places = place;
  }
  gate_up_weights.outputs = 2 * hidden;
  gate_up_weights.inputs = down_weights.outputs = shape.width;
  down_weights.inputs = hidden;
  if (quantized) {
    if (!read(up, *up_scales, 4, 2 * hidden, shape.width, gate_up_weights.first) ||
        !read(down, *down_scales, 4, shape.width, hidden, down_weights.first)) {
      return false;
    }
  } else {
    if (!is(up, ScalarType::Float) || !is(down, ScalarType::Float) || up.size(1) != 2 * hidden || up.size(2) != shape.width ||
        down.size(1) != shape.width) {
      return false;
    }
    gate_up_weights.floats = up.const_data_ptr<float>();
    down_weights.floats = down.const_data_ptr<float>();
  }
  if (!is(out, ScalarType::Float, 2) || up.size(0) != shape.experts || down.size(0) != shape.experts ||
      scores.size(0) != shape.rows || scores.size(1) != shape.experts || logits.size(0) != shape.rows ||
      active.size(0) != shape.rows || out.size(0) != shape.rows || out.size(1) != shape.width || shape.top_k < 1 ||
      shape.top_k > shape.experts) {
    return false;
  }
  rmse::Offload::Call offloaded;
  if (quantized) {
    const auto bytes = [&](const Tensor& t) { return t.nbytes() / static_cast<size_t>(shape.experts); };
    const rmse::Offload::Mapped mapped = {
        {up.const_data_ptr(), up_scales->const_data_ptr(), down.const_data_ptr(), down_scales->const_data_ptr()},
        {bytes(up), bytes(*up_scales), bytes(down), bytes(*down_scales)}};
    offloaded = rmse::Offload::call(shape, mapped, scores.const_data_ptr<float>(), active.const_data_ptr<bool>());
  }
  if (offloaded.failed) return false;
  if (offloaded.skip) {
    std::memset(out.mutable_data_ptr(), 0, out.nbytes());
    return true;
  }
  return rmse::sparse_experts(shape, x.const_data_ptr<float>(), logits.const_data_ptr<float>(), scores.const_data_ptr<float>(),
                              active.const_data_ptr<bool>(), gate_up_weights, down_weights, out.mutable_data_ptr<float>(),
                              offloaded.source);
}

bool run_float_linear(Arguments args) {
  const Tensor& x = args.tensor();
  const Tensor& weight = args.tensor();
  const Tensor* bias = args.optional();
  const Tensor* flags = args.optional();
  Tensor& out = args.out();
  if (!is(x, ScalarType::Float) || !is(out, ScalarType::Float) || !is(weight, ScalarType::Float, 2) || x.dim() == 0 ||
      x.size(x.dim() - 1) != weight.size(1) || weight.size(1) == 0) {
    return false;
  }
  const int64_t inputs = weight.size(1), outputs = weight.size(0), rows = x.numel() / inputs;
  rmse::Active active;
  if (out.numel() != rows * outputs || !read(flags, rows, active) ||
      (bias != nullptr && !(is(*bias, ScalarType::Float, 1) && bias->size(0) == outputs))) {
    return false;
  }
  rmse::float_linear(weight.const_data_ptr<float>(), bias == nullptr ? nullptr : bias->const_data_ptr<float>(),
                     x.const_data_ptr<float>(), rows, inputs, outputs, active, out.mutable_data_ptr<float>());
  return true;
}

// What is computed row by row: rows of x (..., n) by threads, where there is enough to do.
template <typename Row>
void each_row(int64_t rows, int64_t n, const Row& row) {
  constexpr int64_t kSmallestTask = 1 << 14;
  executorch::extension::parallel_for(0, rows, std::max<int64_t>(1, kSmallestTask / std::max<int64_t>(1, n)),
                                      [&](int64_t first, int64_t last) {
                                        for (int64_t r = first; r < last; ++r) row(r);
                                      });
}

bool run_norm(Arguments args) {
  const Tensor& x = args.tensor();
  const Tensor& weight = args.tensor();
  const float eps = args.number();
  const Tensor* flags = args.optional();
  Tensor& out = args.out();
  if (!is(x, ScalarType::Float) || !is(out, ScalarType::Float) || !is(weight, ScalarType::Float, 1) || x.dim() == 0 ||
      x.size(x.dim() - 1) != weight.numel() || weight.numel() == 0 || out.numel() != x.numel()) {
    return false;
  }
  const int64_t n = weight.numel();
  rmse::Active active;
  if (!read(flags, x.numel() / n, active)) return false;
  const float *from = x.const_data_ptr<float>(), *by = weight.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  each_row(x.numel() / n, n, [&](int64_t r) {
    if (active(r)) {
      rmse::products().norm(from + r * n, by, eps, n, to + r * n);
    } else {
      std::fill_n(to + r * n, n, 0.0f);
    }
  });
  return true;
}

bool run_gated(Arguments args) {
  const Tensor& gate = args.tensor();
  const Tensor& up = args.tensor();
  Tensor& out = args.out();
  if (!is(gate, ScalarType::Float) || !is(up, ScalarType::Float) || !is(out, ScalarType::Float) || gate.dim() == 0 ||
      gate.numel() == 0 || up.numel() != gate.numel() || out.numel() != gate.numel()) {
    return false;
  }
  const int64_t n = gate.size(gate.dim() - 1);
  const float *a = gate.const_data_ptr<float>(), *b = up.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  each_row(gate.numel() / n, n, [&](int64_t r) { rmse::products().gated(a + r * n, b + r * n, n, to + r * n); });
  return true;
}

bool run_swiglu(Arguments args) {
  const Tensor& x = args.tensor();
  Tensor& out = args.out();
  if (!is(x, ScalarType::Float) || !is(out, ScalarType::Float) || x.dim() == 0 || x.numel() == 0 ||
      x.size(x.dim() - 1) % 2 != 0 || 2 * out.numel() != x.numel()) {
    return false;
  }
  const int64_t n = x.size(x.dim() - 1) / 2;
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  each_row(x.numel() / (2 * n), n, [&](int64_t r) { rmse::products().swiglu(from + 2 * r * n, n, 0, 0, 1, to + r * n); });
  return true;
}

// Rows of a where the condition holds, of b elsewhere.
bool run_where(Arguments args) {
  const Tensor& condition = args.tensor();
  const Tensor& a = args.tensor();
  const Tensor& b = args.tensor();
  Tensor& out = args.out();
  const auto rows = static_cast<size_t>(condition.numel());
  if (!is(condition, ScalarType::Bool) || a.scalar_type() != b.scalar_type() || out.scalar_type() != a.scalar_type() ||
      a.nbytes() != b.nbytes() || out.nbytes() != a.nbytes() || rows == 0 || a.nbytes() % rows != 0) {
    return false;
  }
  const size_t size = a.nbytes() / rows;
  const bool* holds = condition.const_data_ptr<bool>();
  const auto *first = static_cast<const char*>(a.const_data_ptr()), *second = static_cast<const char*>(b.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for (size_t r = 0; r < rows; ++r) std::memcpy(to + r * size, (holds[r] ? first : second) + r * size, size);
  return true;
}

// x (B, H, C, 2 n) turned by cos and sin (B or 1, 1, C, n): channel i with channel i + n.
bool run_rotary(Arguments args) {
  const Tensor& x = args.tensor();
  const Tensor& cos = args.tensor();
  const Tensor& sin = args.tensor();
  Tensor& out = args.out();
  if (!is(x, ScalarType::Float, 4) || !is(cos, ScalarType::Float, 4) || !is(sin, ScalarType::Float, 4) ||
      !is(out, ScalarType::Float, 4) || out.numel() != x.numel() || cos.numel() != sin.numel() || cos.size(1) != 1 ||
      cos.size(2) != x.size(2) || 2 * cos.size(3) != x.size(3) || (cos.size(0) != 1 && cos.size(0) != x.size(0))) {
    return false;
  }
  const int64_t heads = x.size(1), count = x.size(2), n = cos.size(3);
  const bool own = cos.size(0) != 1;  // angles for each of the batch
  const float *from = x.const_data_ptr<float>(), *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  each_row(x.size(0) * heads * count, 2 * n, [&](int64_t r) {
    const int64_t angle = ((own ? r / (heads * count) * count : 0) + r % count) * n;
    const float* a = from + 2 * r * n;
    float* turned = to + 2 * r * n;
    for (int64_t i = 0; i < n; ++i) {
      const float first = a[i], second = a[i + n];
      turned[i] = first * c[angle + i] - second * s[angle + i];
      turned[i + n] = second * c[angle + i] + first * s[angle + i];
    }
  });
  return true;
}

// Keys, values, mask and bias of a side, each of which has so many slots; false where they do not fit. Of keys and values
// the groups from `first` on are read, of one text; others lie before and behind them.
bool read(const rmse::AttentionShape& shape, const Tensor& keys, const Tensor& values, int64_t first, const Tensor& mask,
          const Tensor* bias, rmse::AttentionSide& side) {
  side.slots = keys.dim() == 4 ? keys.size(2) : 0;
  const auto fits = [&](const Tensor& t, int64_t a, int64_t b, int64_t c, int64_t d) {
    return is(t, ScalarType::Float, 4) && t.size(0) == a && t.size(1) == b && t.size(2) == c && t.size(3) == d;
  };
  const int64_t groups = keys.dim() == 4 ? keys.size(1) : 0;
  if (first < 0 || first > groups - shape.groups || (groups != shape.groups && shape.batch != 1)) return false;
  side.keys = keys.const_data_ptr<float>() + first * side.slots * shape.dims;
  side.values = values.const_data_ptr<float>() + first * side.slots * shape.dims;
  side.mask = mask.const_data_ptr<float>();
  side.bias = bias == nullptr ? nullptr : bias->const_data_ptr<float>();
  return fits(keys, shape.batch, groups, side.slots, shape.dims) && fits(values, shape.batch, groups, side.slots, shape.dims) &&
         fits(mask, shape.own_masks ? shape.batch : 1, 1, shape.count, side.slots) &&
         (bias == nullptr || fits(*bias, shape.batch, shape.heads, shape.count, side.slots));
}

bool run_attention(Arguments args) {
  const Tensor& query = args.tensor();
  const Tensor& keys = args.tensor();
  const Tensor& values = args.tensor();
  const Tensor& mask = args.tensor();
  const Tensor* bias = args.optional();
  const Tensor* past_keys = args.optional();
  const Tensor* past_values = args.optional();
  const Tensor* past_mask = args.optional();
  const Tensor* past_bias = args.optional();
  const Tensor* sinks = args.optional();
  const Tensor* active = args.optional();
  const int64_t first = args.integer();
  Tensor& out = args.out();
  if (!is(query, ScalarType::Float, 4) || !is(out, ScalarType::Float, 4) || out.numel() != query.numel() ||
      query.numel() == 0 || !is(keys, ScalarType::Float, 4) || keys.size(1) == 0 || query.size(1) % keys.size(1) != 0 ||
      !is(mask, ScalarType::Float, 4)) {
    return false;
  }
  rmse::AttentionShape shape;
  shape.batch = query.size(0);
  shape.heads = query.size(1);
  shape.groups = keys.size(1);
  shape.count = query.size(2);
  shape.dims = query.size(3);
  shape.own_masks = mask.size(0) != 1;
  rmse::AttentionSide past, own;
  const bool behind = past_keys != nullptr;
  if (!read(shape, keys, values, 0, mask, bias, own) || behind != (past_values != nullptr) || behind != (past_mask != nullptr) ||
      (behind && !read(shape, *past_keys, *past_values, first, *past_mask, past_bias, past)) ||
      (sinks != nullptr && !(is(*sinks, ScalarType::Float) && sinks->numel() == query.numel() / shape.dims)) ||
      (active != nullptr &&
       !(is(*active, ScalarType::Bool) && active->numel() == shape.count && shape.batch == 1 && !shape.own_masks))) {
    return false;
  }
  rmse::attention(shape, query.const_data_ptr<float>(), past, own, sinks == nullptr ? nullptr : sinks->const_data_ptr<float>(),
                  active == nullptr ? nullptr : active->const_data_ptr<bool>(), out.mutable_data_ptr<float>());
  return true;
}

// A kernel; `out` comes twice among its arguments, and other numbers of them are those of an older operator.
struct Operator {
  const char* name;
  size_t arguments;
  bool (*run)(Arguments);
};

constexpr Operator kOperators[] = {
    {"quantized_linear.out", 8, run_linear},
    {"float_linear.out", 6, run_float_linear},
    {"sparse_experts.out", 11, [](Arguments args) { return run_experts(args, false); }},
    {"quantized_experts.out", 15, [](Arguments args) { return run_experts(args, true); }},
    {"rms_norm.out", 6, run_norm},
    {"gated.out", 4, run_gated},
    {"swiglu.out", 3, run_swiglu},
    {"where_rows.out", 5, run_where},
    {"rotary.out", 5, run_rotary},
    {"attention.out", 14, run_attention},
};
constexpr size_t kCount = std::size(kOperators);

template <size_t I>
void run(KernelRuntimeContext& context, Span<EValue*> args) {
  constexpr const Operator& op = kOperators[I];
  static const std::string label = std::string("native_call_") + op.name;
  const EventTracerProfileOpScope timed(context.internal_event_tracer(), label.c_str());
  if (args.size() != op.arguments) {
    context.fail(Error::InvalidProgram);
  } else if (!op.run(Arguments(args))) {
    context.fail(Error::InvalidArgument);
  }
}

// The registry keeps pointers to the names.
template <size_t... I>
Error register_all(std::index_sequence<I...>) {
  static const std::string names[] = {std::string("rmse_edge::") + kOperators[I].name...};
  static const Kernel kernels[] = {Kernel(names[I].c_str(), run<I>)...};
  return executorch::runtime::register_kernels({kernels, kCount});
}

[[maybe_unused]] const Error kRegistered = register_all(std::make_index_sequence<kCount>());

// What a function of --expert-ram last complained about, and what it last told.
std::string& offload_error() {
  static thread_local std::string message;
  return message;
}

std::string& offload_text() {
  static thread_local std::string text;
  return text;
}

rmse::Offload* offload_at(void* handle) { return static_cast<rmse::Offload*>(handle); }

// The runtime's messages go nowhere, but for the last error: whoever reports a failure says why in one line.
std::string& last_error() {
  static thread_local std::string message;
  return message;
}

void keep_error(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* message,
                size_t length) {
  if (level == kError || level == kFatal) last_error().assign(message, length);
}

template <typename Value>
int set_xnnpack(const char* name, Value value) {
  executorch::runtime::BackendOption option{};
  std::strncpy(option.key, name, sizeof option.key - 1);
  option.value = value;
  return static_cast<int>(executorch::runtime::set_option("XnnpackBackend", {&option, 1}));
}

}  // namespace

extern "C" {

int rmse_share_packed_weights(int on) { return set_xnnpack("weight_cache_enabled", on != 0); }

void rmse_take_messages() {
  std::fflush(stderr);
  const int kept = dup(STDERR_FILENO), nowhere = open("/dev/null", O_WRONLY);
  dup2(nowhere, STDERR_FILENO);  // the runtime has a message about that, too
  executorch::runtime::register_pal(
      executorch::runtime::PalImpl::create(nullptr, nullptr, nullptr, nullptr, keep_error, nullptr, nullptr, __FILE__));
  std::fflush(stderr);
  dup2(kept, STDERR_FILENO);
  close(kept);
  close(nowhere);
}

const char* rmse_last_error() { return last_error().c_str(); }

void rmse_clear_error() { last_error().clear(); }

void* rmse_offload_open(const char* program) {
  try {
    return new rmse::Offload(program);
  } catch (const std::exception& error) {
    offload_error() = error.what();
    return nullptr;
  }
}

int rmse_offload_begin(void* offload, const char* budget) {
  try {
    offload_at(offload)->begin(rmse::ExpertBudget::parse(budget));
    return 0;
  } catch (const std::invalid_argument& error) {
    offload_error() = error.what();
    return 1;
  } catch (const rmse::ArgumentError& error) {
    offload_error() = error.problem;
    return 1;
  } catch (const std::exception& error) {
    offload_error() = error.what();
    return 2;
  }
}

void rmse_offload_loop(void* offload, int64_t loop) { offload_at(offload)->set_loop(loop); }

const char* rmse_offload_problem(void* offload) { return (offload_text() = offload_at(offload)->problem()).c_str(); }

const char* rmse_offload_figures(void* offload) { return (offload_text() = offload_at(offload)->figures()).c_str(); }

void rmse_offload_clear(void* offload) { offload_at(offload)->clear_figures(); }

void rmse_offload_close(void* offload) { delete offload_at(offload); }

const char* rmse_offload_error() { return offload_error().c_str(); }

const char* rmse_instruction_set() { return rmse::products().name; }
}
