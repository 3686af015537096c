package dev.rmseedge.core.engine

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.model.MethodSpec

/**
 * What runs the exported methods of one package: `prelude`, `loop`, `head` and so on, for calls of so many rows each.
 *
 * The host (`dev.rmseedge.core.host`) keeps all that is kept between calls and asks nothing else of an engine, so another one is a
 * class that implements these two interfaces.
 */
interface Engine : AutoCloseable {
    /** The engine's name and version, as benches report it. */
    val description: String

    /** Threads that one call may use; null: the engine's own choice. */
    val threads: Int?

    /**
     * Loads a method, such as `loop_64`.
     *
     * @param spec what the manifest says that it takes and gives, held against the engine's own file.
     * @throws PackageException the engine cannot load it, or its file says otherwise.
     */
    @Throws(PackageException::class)
    fun load(method: String, spec: MethodSpec): Method
}

/** One loaded method. It reads and writes the memory that its arguments were bound to last. */
interface Method : AutoCloseable {
    val spec: MethodSpec

    /** Binds an input, by its place in [spec]. Inputs that grow with the text are as long as the tensor that is bound. */
    fun read(input: Int, tensor: Tensor)

    /** Binds an output, by its place in [spec]. */
    fun write(output: Int, tensor: Tensor)

    /** Every argument must be bound. A `PackageException` says what the engine cannot do. */
    fun run()
}
