package dev.rmseedge.core.pack

import dev.rmseedge.core.runner.RunnerLibrary

/**
 * What packages are made for, as far as this app can run them.
 *
 * @property label as manifests have it.
 * @property engineBytes memory that the engine takes besides the weights: its library, sessions, the Java heap.
 */
enum class Target(val label: String, val engine: String, val engineBytes: Long) {
    ONNX("onnx", "ONNX Runtime", 56L shl 20),
    EXECUTORCH("executorch", "ExecuTorch", 24L shl 20),
    ;

    /** Why its packages cannot be run here, as the rest of a sentence; null: they can. */
    val obstacle: String?
        get() = when {
            this != EXECUTORCH || RunnerLibrary.isThere -> null
            else -> "and this app was built without the runner of such packages, which takes Android's NDK to compile"
        }

    companion object {
        private val RUNNING: String get() = entries.filter { it.obstacle == null }.joinToString(" and ") { it.label }

        /** The one that [said] names; throws what [refuse] makes of the rest of a sentence. */
        internal inline fun of(said: String, refuse: (String) -> Nothing): Target {
            val found = entries.find { it.label == said } ?: refuse("and this app runs packages made for $RUNNING")
            found.obstacle?.let { refuse(it) }
            return found
        }
    }
}
