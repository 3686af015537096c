// The runner of ExecuTorch packages for Java: `rmse::Model` as it is, tokens in, logits and depths out. What is kept between calls,
// the loop, the engine and the experts' memory are the runner's (runtimes/native); here is only what JNI asks for.
// dev.rmseedge.core.runner.RunnerLibrary declares these functions, RunnerRuntime calls them, one thread at a time.
#include <jni.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iterator>
#include <limits>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cli/document.h"
#include "core/model.h"
#include "core/package.h"
#include "executorch/engine.h"

namespace rmse {
namespace {

struct Opened {
  Model model;
  Calls* timed = nullptr;  // of `prepareLoop`

  Opened(const Package& package, const std::optional<ExpertBudget>& expert_ram)
      : model(package, open_executorch(package, "", expert_ram)) {}
};

Opened& opened(jlong handle) { return *reinterpret_cast<Opened*>(handle); }

// Java is already told of something else that went wrong.
struct Thrown {};

void check_java(JNIEnv* env) {
  if (env->ExceptionCheck()) throw Thrown();
}

// Texts cross as UTF-8: JNI's own have another form, in which no text of ours is to be taken for one.
jbyteArray bytes_of(JNIEnv* env, const std::string& text) {
  const auto size = static_cast<jsize>(text.size());
  const jbyteArray bytes = env->NewByteArray(size);
  check_java(env);
  env->SetByteArrayRegion(bytes, 0, size, reinterpret_cast<const jbyte*>(text.data()));
  return bytes;
}

std::string text_of(JNIEnv* env, jbyteArray bytes) {
  std::string text(env->GetArrayLength(bytes), '\0');
  env->GetByteArrayRegion(bytes, 0, static_cast<jsize>(text.size()), reinterpret_cast<jbyte*>(text.data()));
  return text;
}

void throw_java(JNIEnv* env, const std::string& line) {
  const jclass type = env->FindClass("dev/rmseedge/core/runner/RunnerException");
  if (type == nullptr) return;  // Java says so
  const jmethodID make = env->GetMethodID(type, "<init>", "([B)V");
  if (make == nullptr) return;
  const jobject error = env->NewObject(type, make, bytes_of(env, line));
  if (error != nullptr) env->Throw(static_cast<jthrowable>(error));
}

// What `work` gives. What it throws becomes Java's: no exception of C++ may pass through its frames.
template <typename Work>
auto guarded(JNIEnv* env, const Work& work) -> decltype(work()) {
  using Result = decltype(work());
  try {
    return work();
  } catch (const Thrown&) {
  } catch (const std::bad_alloc&) {
    env->ThrowNew(env->FindClass("java/lang/OutOfMemoryError"), "the runner");
  } catch (const std::exception& error) {
    try {
      throw_java(env, error.what());
    } catch (const Thrown&) {
    }
  }
  if constexpr (!std::is_void_v<Result>) return Result{};
}

std::vector<int64_t> tokens_of(JNIEnv* env, jintArray given) {
  std::vector<jint> ids(env->GetArrayLength(given));
  env->GetIntArrayRegion(given, 0, static_cast<jsize>(ids.size()), ids.data());
  return {ids.begin(), ids.end()};
}

// In the order of manifests: max_loops, min_loops, then the rules.
Dials dials_of(JNIEnv* env, jdoubleArray given) {
  std::vector<jdouble> values(2 + kExitDials.size());
  if (env->GetArrayLength(given) != std::ssize(values)) throw std::runtime_error("other dials than this runner has");
  env->GetDoubleArrayRegion(given, 0, static_cast<jsize>(values.size()), values.data());
  Dials dials;
  dials.max_loops = static_cast<int64_t>(values[0]);
  dials.min_loops = static_cast<int64_t>(values[1]);
  for (size_t i = 0; i < kExitDials.size(); ++i) dials.*kExitDials[i].value = values[2 + i];
  return dials;
}

jobject floats_of(JNIEnv* env, const std::vector<float>& values) {
  if (values.size() > static_cast<size_t>(std::numeric_limits<jsize>::max())) throw std::bad_alloc();
  const jfloatArray array = env->NewFloatArray(static_cast<jsize>(values.size()));
  check_java(env);
  env->SetFloatArrayRegion(array, 0, static_cast<jsize>(values.size()), values.data());
  return array;
}

jobject longs_of(JNIEnv* env, const std::vector<int64_t>& values) {
  const std::vector<jlong> same(values.begin(), values.end());
  const jlongArray array = env->NewLongArray(static_cast<jsize>(same.size()));
  check_java(env);
  env->SetLongArrayRegion(array, 0, static_cast<jsize>(same.size()), same.data());
  return array;
}

// logits, depth, iterations, and of surprises the positions and the values.
jobjectArray result_of(JNIEnv* env, const Fed& fed) {
  std::vector<int64_t> positions;
  std::vector<float> surprises;
  for (const auto& [position, surprise] : fed.surprises) {
    positions.push_back(position);
    surprises.push_back(surprise);
  }
  const jobject parts[] = {floats_of(env, fed.logits), longs_of(env, fed.depth), longs_of(env, fed.iterations),
                           longs_of(env, positions), floats_of(env, surprises)};
  const jobjectArray all = env->NewObjectArray(std::size(parts), env->FindClass("java/lang/Object"), nullptr);
  check_java(env);
  for (jsize i = 0; i < static_cast<jsize>(std::size(parts)); ++i) env->SetObjectArrayElement(all, i, parts[i]);
  return all;
}

// The memory of a direct buffer of Java's that is to hold a tensor.
std::byte* room_for(JNIEnv* env, jobject buffer, const Buffer& tensor) {
  const auto size = static_cast<jlong>(tensor.nbytes());
  if (env->GetDirectBufferCapacity(buffer) != size) throw std::runtime_error(tensor.spec().name + " has another size");
  return static_cast<std::byte*>(env->GetDirectBufferAddress(buffer));
}

}  // namespace
}  // namespace rmse

#define RUNNER(result, name) extern "C" JNIEXPORT result JNICALL Java_dev_rmseedge_core_runner_RunnerLibrary_##name

using namespace rmse;  // NOLINT: nothing of it has a name of JNI's

RUNNER(jlong, open)(JNIEnv* env, jobject, jbyteArray folder, jint threads, jbyteArray expert_ram) {
  return guarded(env, [&]() -> jlong {
    start_executorch(threads);
    std::optional<ExpertBudget> budget;
    if (expert_ram != nullptr) {
      const std::string text = text_of(env, expert_ram);
      try {
        budget = ExpertBudget::parse(text);
      } catch (const std::invalid_argument& error) {
        throw std::runtime_error("expert memory: got '" + text + "', expected " + error.what());
      }
    }
    return reinterpret_cast<jlong>(new Opened(Package::open(text_of(env, folder), kExecutorch), budget));
  });
}

RUNNER(void, close)(JNIEnv*, jobject, jlong handle) { delete &opened(handle); }

RUNNER(jlong, position)(JNIEnv*, jobject, jlong handle) { return opened(handle).model.position(); }

RUNNER(jlong, stateBytes)(JNIEnv*, jobject, jlong handle) { return static_cast<jlong>(opened(handle).model.state_bytes()); }

RUNNER(void, setNoiseSeed)(JNIEnv*, jobject, jlong handle, jlong seed) {
  opened(handle).model.set_noise_seed(static_cast<uint64_t>(seed));
}

RUNNER(void, reset)(JNIEnv* env, jobject, jlong handle) {
  guarded(env, [&] { opened(handle).model.reset(); });
}

RUNNER(void, resume)(JNIEnv* env, jobject, jlong handle, jlong position) {
  guarded(env, [&] { opened(handle).model.resume(position); });
}

RUNNER(jobjectArray, feed)
(JNIEnv* env, jobject, jlong handle, jintArray tokens, jdoubleArray dials, jboolean all_logits, jint prefix, jobject asked) {
  return guarded(env, [&] {
    const jmethodID ask = env->GetMethodID(env->GetObjectClass(asked), "goOn", "()Z");
    check_java(env);
    const auto go_on = [&] {
      const bool more = env->CallBooleanMethod(asked, ask);
      check_java(env);
      return more;
    };
    return result_of(env, opened(handle).model.feed(tokens_of(env, tokens), dials_of(env, dials), all_logits, prefix, go_on));
  });
}

RUNNER(void, prepareLoop)(JNIEnv* env, jobject, jlong handle, jintArray tokens, jdoubleArray dials) {
  guarded(env, [&] { opened(handle).timed = &opened(handle).model.prepare(tokens_of(env, tokens), dials_of(env, dials)); });
}

RUNNER(void, runLoop)(JNIEnv* env, jobject, jlong handle) {
  guarded(env, [&] { opened(handle).timed->loop(); });
}

RUNNER(void, read)(JNIEnv* env, jobject, jlong handle, jbyteArray name, jobject into) {
  guarded(env, [&] {
    const Buffer& tensor = opened(handle).model.kept(text_of(env, name));
    std::copy_n(tensor.data(), tensor.nbytes(), room_for(env, into, tensor));
  });
}

RUNNER(void, write)(JNIEnv* env, jobject, jlong handle, jbyteArray name, jobject from) {
  guarded(env, [&] {
    const Buffer& tensor = opened(handle).model.kept(text_of(env, name));
    std::copy_n(room_for(env, from, tensor), tensor.nbytes(), tensor.data());
  });
}

// What became of the experts' budget, as rmse-runner's documents have it; null: there is none.
RUNNER(jbyteArray, experts)(JNIEnv* env, jobject, jlong handle, jlong tokens) {
  return guarded(env, [&]() -> jbyteArray {
    const Document found = offload_document(opened(handle).model, tokens);
    return found.is_null() ? nullptr : bytes_of(env, found.dump());
  });
}
