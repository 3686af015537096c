package dev.rmseedge.core.text

import dev.rmseedge.core.ArgumentException
import dev.rmseedge.core.UserException
import dev.rmseedge.core.host.SplitMix64
import kotlin.math.exp

/**
 * How a token is chosen from logits.
 *
 * @property temperature 0: the largest logit, always.
 * @property topK keep the k largest; 0 keeps all.
 * @property topP keep the smallest set of tokens with at least this probability; 1 keeps all.
 * @property seed all 64 bits of it count.
 */
data class Sampling(val temperature: Double = 0.8, val topK: Int = 0, val topP: Double = 1.0, val seed: ULong = 0u) {
    init {
        fun require(fits: Boolean, name: String, got: Any, expected: String) {
            if (!fits) throw ArgumentException(name, "got $got, expected $expected")
        }
        require(temperature >= 0 && temperature.isFinite(), "temperature", temperature, "0 (greedy) or a positive number")
        require(topK >= 0, "top_k", topK, "0 (all tokens) or a positive whole number")
        require(topP > 0 && topP <= 1, "top_p", topP, "a number above 0, at most 1 (all tokens)")
    }
}

/**
 * The sampler of every runtime: the same seed and logits give the same token.
 *
 * It works in Double, adds up from the first token to the last, and owns its random numbers: one per token, whatever the options, so
 * that they do not shift the stream.
 */
class Sampler(private val sampling: Sampling) {
    private val random = SplitMix64(sampling.seed)

    /**
     * The next token.
     *
     * @param unused ids that are never drawn, as if the head had no rows for them.
     * @throws UserException the logits hold NaN or no finite maximum: the model that made them is damaged.
     */
    @Throws(UserException::class)
    fun pick(logits: FloatArray, unused: List<IntRange> = emptyList()): Int {
        val draw = random.uniform()
        val usable = if (unused.isEmpty()) logits else logits.copyOf()
        for (ids in unused) usable.fill(Float.NEGATIVE_INFINITY, ids.first, ids.last + 1)
        var likeliest = 0 // the lowest index on ties
        for (i in usable.indices) if (usable[i] > usable[likeliest]) likeliest = i
        if (usable.any(Float::isNaN) || !usable[likeliest].isFinite()) {
            throw UserException("the model gave logits that are not numbers; its weights are damaged")
        }
        if (sampling.temperature == 0.0) return likeliest
        // Tokens stay in the order of their ids: a difference of 1e-6 between two runtimes then moves a boundary by as little, where
        // an order by probability would swap whole tokens.
        val cumulative = weights(usable, usable[likeliest].toDouble())
        for (i in 1 until cumulative.size) cumulative[i] += cumulative[i - 1]
        val total = cumulative.last()
        val drawn = cumulative.indexOfFirst { it > draw * total }
        // The product can round up to the total; the total is first reached at the last token that was kept.
        return if (drawn >= 0) drawn else cumulative.indexOfFirst { it >= total }
    }

    /** What is drawn from: temperature, then top-k, then top-p. Ties at a boundary are decided for the lower index. */
    private fun weights(logits: FloatArray, largest: Double): DoubleArray {
        val weights = DoubleArray(logits.size) { (logits[it] - largest) / sampling.temperature }
        val cutsK = sampling.topK in 1 until logits.size
        val cutsP = sampling.topP < 1
        val order = if (cutsK || cutsP) byFallingLogit(logits) else IntArray(0)
        if (cutsK) for (i in sampling.topK until order.size) weights[order[i]] = Double.NEGATIVE_INFINITY
        for (i in weights.indices) weights[i] = exp(weights[i])
        normalize(weights)
        if (cutsP) {
            var before = 0.0 // the probability of all that is likelier
            for (token in order) {
                val through = before + weights[token]
                if (before >= sampling.topP) weights[token] = 0.0
                before = through
            }
            normalize(weights)
        }
        return weights
    }

    private fun normalize(weights: DoubleArray) {
        var total = 0.0
        for (weight in weights) total += weight
        for (i in weights.indices) weights[i] /= total
    }

    /** Tokens by falling logit, equal ones by rising id: both in one number, which sorts without boxes. */
    private fun byFallingLogit(logits: FloatArray): IntArray {
        val keys = LongArray(logits.size) { id ->
            val bits = (logits[id] + 0f).toRawBits() // -0 is 0
            val rising = if (bits >= 0) bits else bits xor Int.MAX_VALUE
            rising.inv().toLong() shl 32 or id.toLong()
        }
        keys.sort()
        return IntArray(keys.size) { keys[it].toInt() }
    }
}
