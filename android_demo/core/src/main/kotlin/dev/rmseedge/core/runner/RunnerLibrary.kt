package dev.rmseedge.core.runner

import java.nio.ByteBuffer

/**
 * The runner of ExecuTorch packages, `runtimes/native`, as `android_demo/native/runner_jni.cpp` shows it to Java.
 *
 * A handle is a loaded model, for one thread at a time, until it is closed. Texts are UTF-8.
 */
internal object RunnerLibrary {
    /** Whether the app was built with it: it needs Android's NDK. */
    val isThere: Boolean by lazy {
        try {
            System.loadLibrary("rmse-runner")
            true
        } catch (_: UnsatisfiedLinkError) {
            false
        }
    }

    /** Loads a package; 0 [threads]: the engine's own choice; null for [expertRam]: experts are read where they are mapped. */
    external fun open(folder: ByteArray, threads: Int, expertRam: ByteArray?): Long

    external fun close(handle: Long)

    external fun position(handle: Long): Long

    external fun stateBytes(handle: Long): Long

    external fun setNoiseSeed(handle: Long, seed: Long)

    external fun reset(handle: Long)

    /** Goes on as if so many tokens had been fed; [write] puts back what they left. */
    external fun resume(handle: Long, position: Long)

    /**
     * Logits (FloatArray), depths and iterations (LongArray), and where the memory learned a segment (LongArray), how badly it
     * predicted that before (FloatArray).
     *
     * @param dials in the order of `Dial.ALL`.
     */
    external fun feed(handle: Long, tokens: IntArray, dials: DoubleArray, allLogits: Boolean, prefix: Int, asked: Asked): Array<Any>

    /** Readies a call of as many rows as there are tokens, for [runLoop]. */
    external fun prepareLoop(handle: Long, tokens: IntArray, dials: DoubleArray)

    external fun runLoop(handle: Long)

    /** Copies a tensor that is kept into a direct buffer of its size. */
    external fun read(handle: Long, name: ByteArray, into: ByteBuffer)

    external fun write(handle: Long, name: ByteArray, from: ByteBuffer)

    /** What became of the experts' budget, as JSON; null: there is none. */
    external fun experts(handle: Long, tokens: Long): ByteArray?
}

/** Asked between two calls whether to read on. */
internal fun interface Asked {
    fun goOn(): Boolean
}

/** What the runner refuses, in its own line. */
internal class RunnerException(line: ByteArray) : RuntimeException(line.toString(Charsets.UTF_8))
