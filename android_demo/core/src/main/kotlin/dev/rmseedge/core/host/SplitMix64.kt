package dev.rmseedge.core.host

private const val STEP = 0x9E3779B97F4A7C15uL
private const val PIECES = 12 // of 16 bits, which are added up to a nearly normal number
private const val PIECE_BITS = 16
private const val WORDS = PIECES * PIECE_BITS / 64

/**
 * Random numbers that are the same in every language, from integers alone.
 *
 * SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; the constants are those of Vigna's
 * public-domain splitmix64.c). The state is a counter, so number n of a seed is known without those before it.
 */
class SplitMix64(seed: ULong) {
    private var state = seed

    /** 64 random bits. */
    fun next(): ULong {
        state += STEP
        return mixed(state)
    }

    /** A number from [0, 1): the upper 53 bits, as many as a Double has. */
    fun uniform(): Double = (next() shr 11).toLong() / (1L shl 53).toDouble()

    companion object {
        /** Number [n], counted from 0, of a seed's stream. */
        fun number(seed: ULong, n: ULong): ULong = mixed(seed + (n + 1uL) * STEP)

        private fun mixed(bits: ULong): ULong {
            var z = bits
            z = (z xor (z shr 30)) * 0xBF58476D1CE4E5B9uL
            z = (z xor (z shr 27)) * 0x94D049BB133111EBuL
            return z xor (z shr 31)
        }
    }
}

/**
 * [count] random numbers that are nearly normal, bit for bit the same on every machine: sums of twelve uniform numbers of 16 bits,
 * minus 6 (Irwin and Hall's distribution, of mean 0 and variance 1).
 *
 * They depend on the seed and the position alone, so positions can be computed in any order.
 */
fun noise(seed: ULong, position: ULong, count: Int): FloatArray {
    val own = SplitMix64(SplitMix64.number(SplitMix64.number(seed, 0u), position))
    return FloatArray(count) {
        var sum = 0L
        repeat(WORDS) {
            val word = own.next()
            for (shift in 0 until 64 step PIECE_BITS) sum += (word shr shift and 0xFFFFuL).toLong()
        }
        ((sum - PIECES / 2 * 0xFFFFL) / 65536.0).toFloat()
    }
}
