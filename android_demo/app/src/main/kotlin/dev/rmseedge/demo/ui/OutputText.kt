package dev.rmseedge.demo.ui

import android.text.SpannableStringBuilder
import android.widget.ScrollView
import android.widget.TextView
import dev.rmseedge.demo.logic.DepthScale
import dev.rmseedge.demo.logic.Transcript

/** Shows a transcript as it grows: only what is new is added, so that what the reader has selected stays selected. */
class OutputText(private val view: TextView, private val scroll: ScrollView) {
    private var shown: Transcript? = null
    private var count = 0
    private var marked: MarkedText? = null

    init {
        view.setText("", TextView.BufferType.EDITABLE)
    }

    /** Shows it anew with other marks. */
    fun restyle(transcript: Transcript, marks: Marks, scale: DepthScale) {
        shown = transcript
        count = 0
        marked = MarkedText(marks, scale)
        view.setText("", TextView.BufferType.EDITABLE)
        grow(transcript)
    }

    /** Shows what it has gained; false where it is another text, which [restyle] shows. */
    fun grow(transcript: Transcript): Boolean {
        val marked = marked
        if (transcript !== shown || marked == null) return false
        val pieces = transcript.from(count)
        if (pieces.isEmpty()) return true
        val follows = !scroll.canScrollVertically(DOWN) // whoever reads further up is left there
        val text = view.editableText as SpannableStringBuilder
        for (piece in pieces) marked.add(text, piece.text, piece.depth)
        count += pieces.size
        if (follows) scroll.post { scroll.scrollTo(0, view.bottom) }
        return true
    }

    private companion object {
        const val DOWN = 1
    }
}
