// Registers the experts as operators of the ExecuTorch runtime:
//
//   rmse_edge::sparse_experts.out       (x, logits, scores, active, gate_up, down, top_k, gate_cap, up_cap, out)
//   rmse_edge::quantized_experts.out    (x, logits, scores, active, gate_up codes, scales, down codes, scales, top_k, gate_cap,
//                                        up_cap, out)
//
// and gives hosts the C functions of operators.h.
#include "operators.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/event_tracer_hooks.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/platform.h>

#include "../kernels/experts.h"

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

// The weights (E, outputs, inputs) of `codes`, or none where they and their scales (E, outputs, groups) do not fit.
bool read(const Tensor& codes, const Tensor* scales, int bits, rmse::ExpertWeights& weights) {
  weights.codes = codes.const_data_ptr();
  weights.outputs = codes.size(1);
  weights.inputs = bits == 4 ? 2 * codes.size(2) : codes.size(2);
  if (scales == nullptr) return is(codes, ScalarType::Float, 3);
  if (!is(*scales, ScalarType::BFloat16, 3) || scales->size(0) != codes.size(0) || scales->size(1) != codes.size(1) ||
      scales->size(2) == 0 || !is(codes, bits == 4 ? ScalarType::Byte : ScalarType::Char, 3)) {
    return false;
  }
  weights.scales = static_cast<const uint16_t*>(scales->const_data_ptr());
  weights.group = weights.inputs / scales->size(2);
  return weights.group * scales->size(2) == weights.inputs && weights.group % 32 == 0;
}

void run(KernelRuntimeContext& context, Span<EValue*> args, bool quantized) {
  const EventTracerProfileOpScope timed(
      context.internal_event_tracer(), quantized ? "native_call_quantized_experts.out" : "native_call_sparse_experts.out");
  if (args.size() != (quantized ? 13 : 11)) {  // `out` comes twice; other numbers are those of an older operator
    context.fail(Error::InvalidProgram);
    return;
  }
  size_t next = 0;
  const Tensor& x = args[next++]->toTensor();
  const Tensor& logits = args[next++]->toTensor();
  const Tensor& scores = args[next++]->toTensor();
  const Tensor& active = args[next++]->toTensor();
  const Tensor& up = args[next++]->toTensor();
  const Tensor* up_scales = quantized ? &args[next++]->toTensor() : nullptr;
  const Tensor& down = args[next++]->toTensor();
  const Tensor* down_scales = quantized ? &args[next++]->toTensor() : nullptr;
  rmse::ExpertShape shape;
  shape.top_k = args[next++]->toInt();
  shape.gate_cap = static_cast<float>(args[next++]->toDouble());
  shape.up_cap = static_cast<float>(args[next++]->toDouble());
  Tensor& out = args[next]->toTensor();
  rmse::ExpertWeights gate_up_weights, down_weights;
  bool fits = is(x, ScalarType::Float, 2) && is(logits, ScalarType::Float, 2) && is(scores, ScalarType::Float, 2) &&
              is(active, ScalarType::Bool, 1) && is(out, ScalarType::Float, 2) && up.dim() == 3 && down.dim() == 3;
  if (fits) {
    shape.rows = x.size(0);
    shape.width = x.size(1);
    shape.experts = logits.size(1);
    // int4 codes are bytes of two, int8 codes signed bytes.
    shape.bits = !quantized ? 32 : up.scalar_type() == ScalarType::Byte ? 4 : 8;
    fits = up.scalar_type() == down.scalar_type() && read(up, up_scales, shape.bits, gate_up_weights) &&
           read(down, down_scales, shape.bits, down_weights) && gate_up_weights.inputs == shape.width &&
           down_weights.outputs == shape.width && gate_up_weights.outputs == 2 * down_weights.inputs &&
           up.size(0) == shape.experts && down.size(0) == shape.experts && scores.size(0) == shape.rows &&
           scores.size(1) == shape.experts && logits.size(0) == shape.rows && active.size(0) == shape.rows && out.size(0) == shape.rows &&
           out.size(1) == shape.width && shape.top_k >= 1 && shape.top_k <= shape.experts;
  }
  if (!fits) {
    context.fail(Error::InvalidArgument);
    return;
  }
  rmse::sparse_experts(shape, x.const_data_ptr<float>(), logits.const_data_ptr<float>(), scores.const_data_ptr<float>(),
                       active.const_data_ptr<bool>(), gate_up_weights, down_weights, out.mutable_data_ptr<float>());
}

const Kernel kKernels[] = {
    Kernel("rmse_edge::sparse_experts.out",
           [](KernelRuntimeContext& context, Span<EValue*> args) { run(context, args, false); }),
    Kernel("rmse_edge::quantized_experts.out",
           [](KernelRuntimeContext& context, Span<EValue*> args) { run(context, args, true); }),
};

[[maybe_unused]] const Error kRegistered = executorch::runtime::register_kernels({kKernels, 2});

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

const char* rmse_instruction_set() { return rmse::instruction_set(); }
}
