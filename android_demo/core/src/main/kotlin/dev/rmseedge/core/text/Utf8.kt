package dev.rmseedge.core.text

/** Bytes that may be no text: which of them become one U+FFFD is a matter of the platform elsewhere. */
internal object Utf8 {
    private const val BROKEN = "\uFFFD"

    /**
     * The text of [bytes], with U+FFFD for each longest beginning of a character that does not go on as one, and for each byte that
     * begins none (The Unicode Standard 16.0, section 3.9, table 3-8).
     */
    fun decode(bytes: ByteArray): String = buildString {
        var at = 0
        while (at < bytes.size) {
            val (length, whole) = lengthAt(bytes, at)
            append(if (whole) String(bytes, at, length, Charsets.UTF_8) else BROKEN)
            at += length
        }
    }

    /** Bytes of the character at [at], or of what there is of one, and whether it is whole. */
    private fun lengthAt(bytes: ByteArray, at: Int): Pair<Int, Boolean> {
        val lead = bytes[at].toInt() and 0xFF
        val wanted = when (lead) {
            in 0x00..0x7F -> 1
            in 0xC2..0xDF -> 2
            in 0xE0..0xEF -> 3
            in 0xF0..0xF4 -> 4
            else -> return 1 to false
        }
        for (i in 1 until wanted) {
            val next = bytes.getOrNull(at + i)?.let { it.toInt() and 0xFF }
            if (next == null || next !in (if (i == 1) second(lead) else TAIL)) return i to false
        }
        return wanted to true
    }

    private val TAIL = 0x80..0xBF

    /** What may follow the first byte: not an overlong form, a surrogate, or a number beyond Unicode. */
    private fun second(lead: Int): IntRange = when (lead) {
        0xE0 -> 0xA0..0xBF
        0xED -> 0x80..0x9F
        0xF0 -> 0x90..0xBF
        0xF4 -> 0x80..0x8F
        else -> TAIL
    }
}
