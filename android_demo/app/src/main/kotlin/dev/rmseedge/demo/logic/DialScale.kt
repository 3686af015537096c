package dev.rmseedge.demo.logic

import dev.rmseedge.core.model.Dial
import kotlin.math.log10
import kotlin.math.pow
import kotlin.math.roundToInt

/**
 * A dial as a slider has it: steps from 0 to [steps], each with a value that the dial can have.
 *
 * Numbers of loops have a step each. The exit threshold is a share, in hundredths. The other thresholds are small numbers that
 * differ by factors; their first step is off.
 */
class DialScale private constructor(
    val dial: String,
    val steps: Int,
    private val values: (Int) -> Double,
    private val back: (Double) -> Int,
) {
    fun value(step: Int): Double = values(step.coerceIn(0, steps))

    /** The step nearest to a value. */
    fun step(value: Double): Int = back(value).coerceIn(0, steps)

    companion object {
        private const val LEAST_EXPONENT = -4.0
        private const val PER_DECADE = 20
        private const val DECADES = 5 // up to 10

        fun of(dial: String, maxLoops: Int): DialScale = when (dial) {
            Dial.MAX_LOOPS, Dial.MIN_LOOPS -> DialScale(dial, maxLoops - 1, { it + 1.0 }, { it.toInt() - 1 })
            "exit_threshold" -> DialScale(dial, 99, { (it + 1) / 100.0 }, { (it * 100).roundToInt() - 1 })
            "exit_steady" -> DialScale(dial, maxLoops, { it.toDouble() }, { it.toInt() })
            else -> DialScale(dial, PER_DECADE * DECADES + 1, ::small, ::stepOfSmall)
        }

        private fun small(step: Int): Double = if (step == 0) 0.0 else 10.0.pow(LEAST_EXPONENT + (step - 1.0) / PER_DECADE)

        private fun stepOfSmall(value: Double): Int = if (value <= 0) 0 else ((log10(value) - LEAST_EXPONENT) * PER_DECADE).roundToInt() + 1
    }
}
