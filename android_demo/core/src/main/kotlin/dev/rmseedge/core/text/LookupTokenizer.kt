package dev.rmseedge.core.text

import dev.rmseedge.core.TextException
import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.fields
import dev.rmseedge.core.json.flag
import dev.rmseedge.core.json.members
import dev.rmseedge.core.json.whole
import java.io.File
import dev.rmseedge.core.json.text as anyText

/** The tokenizers that rmse-edge itself makes, of characters and of words between spaces: pieces that are looked up as they stand. */
internal class LookupTokenizer(file: File, private val kind: Kind, model: Fields) : Tokenizer(file) {
    private val ids: Map<String, Int> = model.at("vocab", members(whole(0..LARGEST_ID)))
    private val unknown: Int? = ids[model.orNull("unk_token", anyText)]
    override val pieces: Map<Int, String> = ids.entries.associate { (piece, id) -> id to piece }

    override fun encode(text: String): IntArray = kind.split(text).map { ids[it] ?: unknown ?: refuse(it) }.toIntArray()

    override fun encodeMore(text: String): IntArray = encode(text)

    override fun decode(ids: List<Int>): String = ids.mapNotNull(pieces::get).joinToString(kind.between)

    private fun refuse(piece: String): Nothing {
        val known = when (kind) {
            Kind.CHARACTERS -> ids.keys.filter { it.isNotEmpty() && !it[0].isISOControl() }.sorted().joinToString("")
            Kind.WORDS -> "${ids.size} words"
        }
        throw TextException("the tokenizer has no token for '${shownPiece(piece)}'; it knows $known")
    }

    enum class Kind(val between: String) {
        CHARACTERS("") {
            override fun split(text: String): List<String> = buildList {
                var i = 0
                while (i < text.length) {
                    val end = i + Character.charCount(text.codePointAt(i))
                    add(text.substring(i, end))
                    i = end
                }
            }
        },
        WORDS(" ") {
            override fun split(text: String): List<String> = text.split(BETWEEN_WORDS).filter(String::isNotEmpty)
        }, ;

        abstract fun split(text: String): List<String>
    }

    companion object {
        private val BETWEEN_WORDS = Regex("[${PreTokenizer.WHITE_SPACE}]")

        /** Pieces that are looked up as they stand, split in one of the two ways; null: anything else. */
        fun kindOf(spec: Fields, model: Fields, hasAdded: Boolean): Kind? {
            val looksUp = "normalizer" !in spec && "post_processor" !in spec && !hasAdded && typeOf(model) == "WordLevel"
            val splitter = spec.orNull("pre_tokenizer", fields)
            val decoder = spec.orNull("decoder", fields)
            return when {
                !looksUp || splitter == null -> null
                typeOf(splitter) == "WhitespaceSplit" && decoder == null -> Kind.WORDS
                splitsIntoCharacters(splitter) && typeOf(decoder) == "Fuse" -> Kind.CHARACTERS
                else -> null
            }
        }

        private fun splitsIntoCharacters(splitter: Fields): Boolean = typeOf(splitter) == "Split" &&
            splitter.orNull("pattern", fields)?.orNull("Regex", anyText) == "[\\s\\S]" &&
            splitter.orNull("behavior", anyText) == "Isolated" && !splitter.or(false, "invert", flag)

        private fun shownPiece(piece: String): String = when (piece) {
            "\n" -> "\\n"
            "\t" -> "\\t"
            "\r" -> "\\r"
            else -> piece
        }
    }
}
