package dev.rmseedge.core.engine

import dev.rmseedge.core.model.TensorSpec
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer

/**
 * The memory of one tensor, zeroed, where engines read and write it without a copy. For one thread at a time.
 *
 * It is a direct buffer, which Android counts as part of an app's heap: so does the state of a long text, and weights never do.
 */
class Tensor(val spec: TensorSpec) {
    val bytes: ByteBuffer = ByteBuffer.allocateDirect(Math.toIntExact(spec.nbytes)).order(ByteOrder.nativeOrder())
    val floats: FloatBuffer = bytes.asFloatBuffer()
    val longs: LongBuffer = bytes.asLongBuffer()
    private val source = bytes.duplicate()
    private val target = bytes.duplicate()

    val nbytes: Int get() = bytes.capacity()

    /** Slots in the last axis but one are there so many times. */
    val outer: Int get() = spec.shape.dropLast(2).fold(1) { product, size -> product * size }

    fun clear() {
        target.clear()
        while (target.hasRemaining()) target.put(ZEROS, 0, minOf(ZEROS.size, target.remaining()))
    }

    fun copy(other: Tensor) = copy(0, other, 0, nbytes)

    /** Takes [count] bytes of another tensor, from its byte [from] on, to byte [to] on. */
    fun copy(to: Int, other: Tensor, from: Int, count: Int) {
        other.source.limit(from + count).position(from)
        target.clear().position(to)
        target.put(other.source)
    }

    private companion object {
        val ZEROS = ByteArray(1 shl 14)
    }
}
