package dev.rmseedge.demo.logic

import dev.rmseedge.core.host.LoopRuntime
import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.json.JsonException
import dev.rmseedge.core.json.items
import dev.rmseedge.core.json.text
import dev.rmseedge.core.json.whole

/**
 * What a package gave where the app was built, to hold a device against: `reference.py` writes it.
 *
 * @property fingerprint of the model that it is of.
 * @property quant how the package stores its weights.
 * @property tokens a text.
 * @property top the likeliest next token behind each of them.
 * @property depth the loops that each of them took, at the package's own dials.
 */
class Reference(val fingerprint: String, val quant: String, val tokens: List<Int>, val top: List<Int>, val depth: List<Int>) {
    /** Shares of positions with the same likeliest token, and with the same depth. */
    class Agreement(val top: Double, val depth: Double, val meanDepth: Double, val expectedMeanDepth: Double)

    /** Lets [runtime] read the text: as one prompt up to a part, then token by token. */
    fun compare(runtime: LoopRuntime): Agreement {
        runtime.reset()
        val all = tokens.toIntArray()
        val vocabulary = runtime.info.text.vocabSize
        val foundTop = mutableListOf<Int>()
        val foundDepth = mutableListOf<Int>()
        val pieces = listOf(all.copyOf(all.size / 2)) + all.drop(all.size / 2).map { intArrayOf(it) }
        for (piece in pieces) {
            val fed = runtime.feed(piece, allLogits = true)
            foundDepth += fed.depth.toList()
            for (row in piece.indices) foundTop += argmax(fed.logits, row * vocabulary, vocabulary)
        }
        return Agreement(same(foundTop, top), same(foundDepth, depth), foundDepth.average(), depth.average())
    }

    private fun same(found: List<Int>, expected: List<Int>): Double =
        found.zip(expected).count { (a, b) -> a == b } / expected.size.toDouble()

    private fun argmax(values: FloatArray, from: Int, count: Int): Int {
        var best = from
        for (i in from until from + count) if (values[i] > values[best]) best = i // the lowest index on ties
        return best - from
    }

    companion object {
        private const val MOST_TOKENS = 1 shl 22

        /** What `reference.py` wrote. */
        @Throws(JsonException::class)
        fun ofJson(document: String): Reference {
            val all = Fields(Json.parse(document))
            val numbers = items(whole(0..MOST_TOKENS))
            val found =
                Reference(
                    all.at("fingerprint", text),
                    all.at("quant", text),
                    all.at("tokens", numbers),
                    all.at("top", numbers),
                    all.at("depth", numbers),
                )
            if (found.tokens.size < 2 || setOf(found.tokens.size, found.top.size, found.depth.size).size != 1) {
                all.refuse("tokens", found.tokens.size, "as many as top and depth have, and at least 2")
            }
            return found
        }
    }
}
