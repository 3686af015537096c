package dev.rmseedge.demo.logic

import kotlin.math.abs
import kotlin.math.roundToInt

/**
 * How the loops that a token took look: from blue for few to orange for many, behind the text, which stays readable.
 *
 * Colour is not all there is: the same depth can be a digit or the thickness of an underline.
 *
 * @property loops the most that a token can take.
 * @property dark of a dark theme.
 */
class DepthScale(val loops: Int, val dark: Boolean) {
    /** The colour behind text of this depth, ARGB. */
    fun background(depth: Int): Int = hsl(
        hue = FEW + (MANY - FEW) * share(depth),
        saturation = if (dark) 0.55f else 0.85f,
        lightness = if (dark) 0.24f else 0.86f,
    )

    /** The colour of a bar of this depth, which has no text on it, ARGB. */
    fun bar(depth: Int): Int = hsl(FEW + (MANY - FEW) * share(depth), 0.7f, if (dark) 0.6f else 0.45f)

    /** The thickness of an underline, as a share of the text's size. */
    fun underline(depth: Int): Float = 0.02f + 0.14f * share(depth)

    /** The depth as small digits behind a text: "¹²". */
    fun digits(depth: Int): String = depth.toString().map { SUPERSCRIPTS[it - '0'] }.joinToString("")

    /** 0 for one loop, 1 for as many as there can be. */
    private fun share(depth: Int): Float = if (loops <= 1) 0f else ((depth - 1f) / (loops - 1)).coerceIn(0f, 1f)

    private companion object {
        const val FEW = 215f // hues, degrees; told apart by eyes that see no red or no green
        const val MANY = 25f
        const val SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
    }
}

/** ARGB of a hue in degrees; see CSS Color Module Level 4, section 7.1. */
internal fun hsl(hue: Float, saturation: Float, lightness: Float): Int {
    val chroma = (1 - abs(2 * lightness - 1)) * saturation
    val side = hue / 60
    val second = chroma * (1 - abs(side % 2 - 1))
    val (red, green, blue) = when (side.toInt()) {
        0 -> Triple(chroma, second, 0f)
        1 -> Triple(second, chroma, 0f)
        2 -> Triple(0f, chroma, second)
        3 -> Triple(0f, second, chroma)
        4 -> Triple(second, 0f, chroma)
        else -> Triple(chroma, 0f, second)
    }
    val base = lightness - chroma / 2
    val channels = listOf(red, green, blue).map { ((it + base) * 255).roundToInt() }
    return channels.fold(0xFF) { packed, channel -> packed shl 8 or channel }
}
