package dev.rmseedge.core.text

import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.fields
import dev.rmseedge.core.json.flag
import dev.rmseedge.core.json.items
import dev.rmseedge.core.json.refuseField
import java.util.regex.Pattern
import java.util.regex.PatternSyntaxException
import dev.rmseedge.core.json.text as anyText

/** Cuts a text into the words within which tokens are sought: `pre_tokenizer` of a `tokenizer.json`. */
internal fun interface PreTokenizer {
    /** @param first whether [text] is the beginning of a text, before which many tokenizers put a space. */
    fun cut(text: String, first: Boolean): List<String>

    companion object {
        /** As the file says; of a kind that is not known here, a `JsonException` names it. */
        fun of(spec: Fields?): PreTokenizer = when (val type = spec?.at("type", anyText)) {
            null -> PreTokenizer { text, _ -> listOf(text) }

            "Sequence" -> spec.at("pretokenizers", items(fields)).map(::of).let { parts ->
                PreTokenizer { text, first -> parts.fold(listOf(text)) { pieces, part -> pieces.flatMap { part.cut(it, first) } } }
            }

            "ByteLevel" -> byteLevel(spec)

            "Digits" -> Splitter(pattern("\\p{N}"), if (spec.at("individual_digits", flag)) Splitter.ISOLATED else Splitter.CONTIGUOUS)

            "Split" -> split(spec)

            else -> refuseField("pre_tokenizer", type, "ByteLevel, Split, Digits, or a Sequence of these")
        }

        private fun byteLevel(spec: Fields): PreTokenizer {
            val spaced = spec.at("add_prefix_space", flag)
            val words = if (spec.or(true, "use_regex", flag)) Splitter(pattern(GPT_2), Splitter.ISOLATED) else null
            return PreTokenizer { text, first ->
                val whole = if (spaced && first && !text.startsWith(" ")) " $text" else text
                (words?.cut(whole, first) ?: listOf(whole)).map(ByteAlphabet::spell)
            }
        }

        private fun split(spec: Fields): PreTokenizer {
            val given = spec.at("pattern", fields)
            val regex = given.orNull("Regex", anyText) ?: Pattern.quote(given.at("String", anyText))
            val behavior = spec.at("behavior", anyText)
            if (behavior !in Splitter.BEHAVIORS) spec.refuse("behavior", behavior, "one of ${Splitter.BEHAVIORS.joinToString()}")
            return Splitter(pattern(regex), behavior, spec.or(false, "invert", flag))
        }

        /** Words as GPT-2 cuts them, and many after it. */
        private const val GPT_2 = "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

        private fun pattern(regex: String): Pattern = try {
            Pattern.compile(asUnicode(regex), Pattern.UNICODE_CASE)
        } catch (error: PatternSyntaxException) {
            refuseField("pre_tokenizer.pattern", regex, "an expression that Java reads (${error.description})")
        }

        /**
         * Tokenizers take classes such as `\s` of all of Unicode; Java's are of ASCII, and the flag for the others is not on Android.
         */
        internal fun asUnicode(regex: String): String = buildString {
            var inside = false
            var i = 0
            while (i < regex.length) {
                val c = regex[i++]
                if (c == '\\' && i < regex.length) {
                    append(escaped(regex, regex[i++], inside))
                    continue
                }
                if (c == '[') inside = true
                if (c == ']') inside = false
                append(c)
            }
        }

        private fun escaped(regex: String, c: Char, inside: Boolean): String {
            val members = UNICODE[c.lowercaseChar()] ?: return "\\$c"
            return when {
                c.isLowerCase() -> if (inside) members else "[$members]"
                !inside -> "[^$members]"
                else -> refuseField("pre_tokenizer.pattern", regex, "no \\$c within brackets")
            }
        }

        /** Unicode's White_Space, as it stands between brackets. */
        const val WHITE_SPACE = "\\u0009-\\u000D \\u0085\\u00A0\\u1680\\u2000-\\u200A\\u2028\\u2029\\u202F\\u205F\\u3000"
        private val UNICODE = mapOf('s' to WHITE_SPACE, 'd' to "\\p{Nd}", 'w' to "\\p{L}\\p{M}\\p{N}\\p{Pc}")
    }
}

/** Cuts at every match of [pattern]. */
internal class Splitter(private val pattern: Pattern, private val behavior: String, private val invert: Boolean = false) : PreTokenizer {
    override fun cut(text: String, first: Boolean): List<String> {
        val pieces = mutableListOf<String>()
        var before = false // whether the last piece was a match
        for ((piece, match) in parts(text)) {
            val joins = when (behavior) {
                CONTIGUOUS -> match == before && pieces.isNotEmpty()
                MERGED_WITH_PREVIOUS -> match && !before && pieces.isNotEmpty()
                MERGED_WITH_NEXT -> before && !match
                else -> false
            }
            when {
                joins -> pieces[pieces.lastIndex] += piece
                behavior == REMOVED && match -> Unit
                else -> pieces += piece
            }
            before = match
        }
        return pieces
    }

    /** All of [text], and of each part whether it is a match. */
    private fun parts(text: String): List<Pair<String, Boolean>> = buildList {
        val matcher = pattern.matcher(text)
        var end = 0
        while (matcher.find()) {
            if (matcher.start() == matcher.end()) continue
            if (end < matcher.start()) add(text.substring(end, matcher.start()) to invert)
            add(matcher.group() to !invert)
            end = matcher.end()
        }
        if (end < text.length) add(text.substring(end) to invert)
    }

    companion object {
        const val ISOLATED = "Isolated"
        const val REMOVED = "Removed"
        const val CONTIGUOUS = "Contiguous"
        const val MERGED_WITH_PREVIOUS = "MergedWithPrevious"
        const val MERGED_WITH_NEXT = "MergedWithNext"
        val BEHAVIORS = setOf(ISOLATED, REMOVED, CONTIGUOUS, MERGED_WITH_PREVIOUS, MERGED_WITH_NEXT)
    }
}

/** A visible character for every byte, as GPT-2's vocabulary spells them: itself where it is one, otherwise one from U+0100 on. */
internal object ByteAlphabet {
    private val letters: CharArray = CharArray(256).also { letters ->
        var next = '\u0100'
        for (byte in 0..255) {
            val visible = byte in 0x21..0x7E || byte in 0xA1..0xAC || byte in 0xAE..0xFF
            letters[byte] = if (visible) byte.toChar() else next++
        }
    }
    private val bytes: Map<Char, Byte> = letters.withIndex().associate { (byte, letter) -> letter to byte.toByte() }

    fun spell(text: String): String = text.toByteArray().map { letters[it.toInt() and 0xFF] }.joinToString("")

    /** The bytes that [piece] spells; those of its own characters where it is no such spelling. */
    fun read(piece: String): ByteArray {
        val read = piece.map { bytes[it] ?: return piece.toByteArray() }
        return read.toByteArray()
    }
}
