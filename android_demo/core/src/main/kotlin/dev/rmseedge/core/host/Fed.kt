package dev.rmseedge.core.host

/**
 * What feeding tokens gave.
 *
 * @property logits (n or 1, V): for every token fed, or for the last one; without the last one's where reading was stopped before it.
 * @property depth of every position that was read, the iterations that it executed.
 * @property iterations per call, the deepest position's depth: what the call really cost.
 * @property surprises of the segments that the memory learned, by the position behind each: its mean loss before, 1 where it knew nothing.
 */
class Fed(val logits: FloatArray, val depth: IntArray, val iterations: IntArray, val surprises: Map<Long, Float>)

/** Collects what the calls of one `feed` give. */
internal class Reading(private val vocabSize: Int, private val tokens: Int, private val allLogits: Boolean) {
    private val logits = FloatArray((if (allLogits) tokens else 1) * vocabSize)
    private val depth = IntArray(tokens)
    private val iterations = mutableListOf<Int>()
    private val surprises = linkedMapOf<Long, Float>()

    /** Tokens that were read so far. */
    var count = 0
        private set

    /** Whether a call of so many tokens has logits that are wanted. */
    fun wantsHead(next: Int): Boolean = allLogits || count + next == tokens

    fun take(calls: Calls, read: Int, loops: Int) {
        for (row in 0 until read) depth[count + row] = calls.made("depth").longs[row].toInt()
        if (allLogits) {
            copyLogits(calls, 0, read, count)
        } else if (wantsHead(read)) {
            copyLogits(calls, read - 1, 1, 0)
        }
        iterations += loops
        count += read
    }

    fun learned(position: Long, surprise: Float) {
        surprises[position] = surprise
    }

    fun fed(): Fed {
        val there = when {
            allLogits -> count * vocabSize
            count == tokens -> vocabSize
            else -> 0
        }
        return Fed(logits.copyOf(there), depth.copyOf(count), iterations.toIntArray(), surprises)
    }

    private fun copyLogits(calls: Calls, from: Int, rows: Int, at: Int) {
        val made = calls.made("logits").floats.duplicate()
        made.position(from * vocabSize)
        made.get(logits, at * vocabSize, rows * vocabSize)
    }
}
