package dev.rmseedge.core.text

import dev.rmseedge.core.ArgumentException

/** Text of one token, or of the few tokens that make one character, with its depth (the deepest of them). */
data class Span(val text: String, val depth: Int)

/**
 * Where a stream of tokens stands in its text, so that another one can go on from there.
 *
 * @property context the tokens that became text last: decoders look at neighbours.
 * @property open the tokens after them, the beginning of a character.
 */
data class Tail(val context: List<Int> = emptyList(), val open: List<Int> = emptyList())

private const val BROKEN = '\uFFFD' // stands for bytes that are no character, or not yet
private const val PATIENCE = 64 // tokens without one whole character after which it is taken for certain that there is none

/**
 * Turns tokens into text as early as it is certain.
 *
 * Tokens may be pieces of a character: such text is held back until the character is whole. Text that may yet become one of the [stop]
 * strings is held back too; of a stop string nothing is ever given out.
 *
 * @param tail of the stream that this one goes on from.
 */
class TextStream(private val decoder: Decodes, private val stop: List<String> = emptyList(), tail: Tail = Tail()) {
    private var ids = tail.context + tail.open
    private var shown = tail.context.size // of `ids`, those that became text
    private var depth = 0 // the deepest of the others
    private val held = ArrayDeque<Span>()

    /** Whether a stop string came. */
    var stopped = false
        private set

    val tail: Tail get() = Tail(ids.take(shown), ids.drop(shown))

    init {
        if ("" in stop) throw ArgumentException("stop", "got an empty string, expected the text to stop at")
    }

    /**
     * Takes tokens whose text is not wanted, such as a prompt's.
     *
     * Only the last of them are decoded: nothing before a token of whole characters matters to what follows it.
     */
    fun skip(tokens: List<Int>) {
        if (tokens.isEmpty()) return
        var first = tokens.lastIndex
        while (first > 0 && !isWhole(tokens[first])) first--
        if (isWhole(tokens[first])) {
            ids = emptyList()
            shown = 0
        }
        for (token in tokens.drop(first)) {
            ids = ids + token
            if (!isOpen(freshText())) advance()
        }
    }

    /** Takes a token; returns what can be shown now. */
    fun push(token: Int, depth: Int): List<Span> {
        ids = ids + token
        this.depth = maxOf(this.depth, depth)
        val text = freshText()
        return if (isOpen(text)) emptyList() else release(text)
    }

    /**
     * What was held back and is now certain not to be followed by more.
     *
     * @param whole the text ends here, so what was begun is broken; false leaves it to the stream that goes on from [tail].
     */
    fun finish(whole: Boolean = true): List<Span> {
        val text = if (whole) freshText() else ""
        val spans = if (text.isNotEmpty() && !stopped) release(text) else emptyList()
        val rest = if (stopped) emptyList() else held.toList()
        held.clear()
        return spans + rest
    }

    private fun isWhole(token: Int): Boolean = decoder.decode(listOf(token)).let { it.isNotEmpty() && BROKEN !in it }

    /** Whether tokens to come may change [text], that of the newest tokens: it is nothing, or no whole character yet. */
    private fun isOpen(text: String) = (text.isEmpty() || text.endsWith(BROKEN)) && ids.size - shown < PATIENCE

    private fun freshText(): String {
        val known = if (shown > 0) decoder.decode(ids.take(shown)) else ""
        val text = decoder.decode(ids)
        // Otherwise the newest broke a run of bytes, but not what was shown.
        return if (text.startsWith(known)) text.substring(known.length) else decoder.decode(ids.drop(shown))
    }

    /** The newest tokens have become text. */
    private fun advance() {
        ids = ids.drop(shown)
        shown = ids.size
    }

    /** Moves [text] into what is held, and out of it what no stop string can claim any more. */
    private fun release(text: String): List<Span> {
        advance()
        held += Span(text, depth)
        depth = 0
        val all = held.joinToString("") { it.text }
        val found = stop.map(all::indexOf).filter { it >= 0 }.minOrNull()
        if (found != null) {
            stopped = true
            return take(found)
        }
        val claimed = stop.maxOfOrNull { word -> (word.length - 1 downTo 1).firstOrNull { all.endsWith(word.take(it)) } ?: 0 } ?: 0
        return take(all.length - claimed)
    }

    /** The first [count] characters of what is held. */
    private fun take(count: Int): List<Span> = buildList {
        var left = count
        while (left > 0) {
            val span = held.removeFirst()
            if (span.text.length > left) held.addFirst(span.copy(text = span.text.substring(left)))
            add(span.copy(text = span.text.take(left)))
            left -= minOf(left, span.text.length)
        }
    }
}
