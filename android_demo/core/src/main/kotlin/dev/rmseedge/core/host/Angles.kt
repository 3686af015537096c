package dev.rmseedge.core.host

import dev.rmseedge.core.engine.Tensor
import dev.rmseedge.core.model.TextInfo
import kotlin.math.cos
import kotlin.math.pow
import kotlin.math.sin

/** The angles of one base that methods of a call take, (1, rows, pairs) each; null: not taken. */
internal class Angles(dims: Int, theta: Double, private val cosines: Tensor?, private val sines: Tensor?) {
    private val frequencies = DoubleArray(dims / 2) { theta.pow(-2.0 * it / dims) } // radians per position

    /** Of rows that begin at [position]; in Double, since at position 10^6 a Float's angle is wrong by hundredths of a radian. */
    fun fill(position: Long, rows: Int) {
        for (row in 0 until rows) {
            frequencies.forEachIndexed { pair, frequency ->
                val angle = (position + row) * frequency
                val at = row * frequencies.size + pair
                cosines?.floats?.put(at, cos(angle).toFloat())
                sines?.floats?.put(at, sin(angle).toFloat())
            }
        }
    }

    companion object {
        /** Of all bases that the model has, as far as methods take them. */
        fun of(text: TextInfo, given: Map<String, Tensor>): List<Angles> {
            val bases = listOf("" to text.ropeTheta) + text.furtherThetas.map { (layers, theta) -> "_$layers" to theta }
            return bases.map { (ending, theta) -> Angles(text.rotaryDims, theta, given["cos$ending"], given["sin$ending"]) }
        }
    }
}
