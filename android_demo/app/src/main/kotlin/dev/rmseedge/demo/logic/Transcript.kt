package dev.rmseedge.demo.logic

import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.json.JsonException
import dev.rmseedge.core.json.fields
import dev.rmseedge.core.json.items
import dev.rmseedge.core.json.text
import dev.rmseedge.core.json.whole
import dev.rmseedge.core.text.Span

/**
 * A text with the loops that each piece of it took, as it is shown, kept and exported.
 *
 * It may be added to on one thread and read on another: [size] pieces are there to stay, whatever is added behind them.
 *
 * @property model the name of the package that wrote it.
 */
class Transcript(val model: String, pieces: List<Span> = emptyList()) {
    private val pieces = ArrayList(pieces)

    val size: Int get() = synchronized(pieces) { pieces.size }

    /** The words that it begins with, for a list. */
    val title: String get() = text(LONGEST_TITLE).replace(Regex("\\s+"), " ").trim().take(LONGEST_TITLE)

    /** Text of the user has the depth [GIVEN]. */
    fun add(piece: Span) {
        if (piece.text.isEmpty()) return
        synchronized(pieces) { pieces += piece }
    }

    /** The pieces from the [first] on. */
    fun from(first: Int): List<Span> = synchronized(pieces) { pieces.subList(first, pieces.size).toList() }

    /** The text alone, at least its first [atLeast] characters. */
    fun text(atLeast: Int = Int.MAX_VALUE): String = buildString {
        for (piece in from(0)) {
            append(piece.text)
            if (length >= atLeast) break
        }
    }

    /** One JSON document: what was exported is read by programs. */
    fun toJson(): String = Json.write(
        mapOf("format" to FORMAT, "model" to model, "pieces" to from(0).map { mapOf("text" to it.text, "depth" to it.depth) }),
    )

    companion object {
        /** The depth of what nobody computed. */
        const val GIVEN = 0
        private const val FORMAT = "rmse-edge transcript"
        private const val LONGEST_TITLE = 60
        private const val MOST_LOOPS = 1 shl 16

        /** What [toJson] wrote. */
        @Throws(JsonException::class)
        fun ofJson(document: String): Transcript {
            val all = Fields(Json.parse(document))
            val format = all.at("format", text)
            if (format != FORMAT) all.refuse("format", format, FORMAT)
            val piece = { it: Fields -> Span(it.at("text", text), it.at("depth", whole(0..MOST_LOOPS))) }
            return Transcript(all.at("model", text), all.at("pieces", items(fields)).map(piece))
        }
    }
}
