package dev.rmseedge.demo.ui

import android.text.SpannableStringBuilder
import android.text.Spanned
import android.text.TextPaint
import android.text.style.BackgroundColorSpan
import android.text.style.CharacterStyle
import dev.rmseedge.demo.logic.DepthScale

/** The ways to show the loops of a token, in the order of `R.array.mark_names`. Two of them need no colour. */
enum class Marks { COLOUR, UNDERLINE, DIGITS }

/** Text of one depth, from [start] to the end of what was written so far. */
private class Run(val depth: Int, val start: Int, val span: CharacterStyle?)

/**
 * Text whose every piece shows its loops. Neighbours of one depth are one run, with one span: a text of thousands of tokens stays
 * quick to lay out.
 */
class MarkedText(private val marks: Marks, private val scale: DepthScale) {
    private var run: Run? = null

    /** Adds a piece behind what [text] has; depth 0 has no mark. */
    fun add(text: SpannableStringBuilder, piece: String, depth: Int) {
        if (run?.depth != depth) {
            close(text)
            run = Run(depth, text.length, spanOf(depth))
        }
        text.append(piece)
        val (start, span) = run?.let { it.start to it.span } ?: return
        if (span != null) text.setSpan(span, start, text.length, Spanned.SPAN_EXCLUSIVE_EXCLUSIVE)
    }

    /** The last run has ended. */
    fun close(text: SpannableStringBuilder) {
        val depth = run?.depth ?: return
        if (marks == Marks.DIGITS && depth > 0) text.append(scale.digits(depth))
        run = null
    }

    private fun spanOf(depth: Int): CharacterStyle? = when {
        depth == 0 -> null
        marks == Marks.COLOUR -> BackgroundColorSpan(scale.background(depth))
        marks == Marks.UNDERLINE -> DepthUnderline(scale.underline(depth))
        else -> null
    }
}

/** A line under the text, as thick as a share of the letters' size, in the colour of the text. */
private class DepthUnderline(private val thickness: Float) : CharacterStyle() {
    override fun updateDrawState(paint: TextPaint) {
        paint.underlineColor = paint.color
        paint.underlineThickness = thickness * paint.textSize
    }
}

/** What the marks mean: a number of loops each, marked as a token of so many would be. */
fun legend(lead: String, marks: Marks, scale: DepthScale): CharSequence {
    val text = SpannableStringBuilder(lead)
    val marked = MarkedText(marks, scale)
    for (depth in shownDepths(scale.loops)) {
        text.append(' ')
        marked.add(text, if (marks == Marks.DIGITS) "x" else " $depth ", depth)
        marked.close(text)
    }
    return text
}

/** As many depths as a line has room for, the first and the last among them. */
private fun shownDepths(loops: Int): List<Int> {
    if (loops <= MOST_SHOWN) return (1..loops).toList()
    return (0 until MOST_SHOWN).map { 1 + it * (loops - 1) / (MOST_SHOWN - 1) }
}

private const val MOST_SHOWN = 12
