package dev.rmseedge.core.text

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.TextException
import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.json.JsonException
import dev.rmseedge.core.json.Reader
import dev.rmseedge.core.json.fields
import dev.rmseedge.core.json.flag
import dev.rmseedge.core.json.items
import dev.rmseedge.core.json.members
import dev.rmseedge.core.json.whole
import java.io.File
import java.io.IOException
import dev.rmseedge.core.json.text as anyText

/** The part of a tokenizer that streams of text need. */
fun interface Decodes {
    /** The text of [ids]; bytes that are no character, or not yet, are U+FFFD. */
    fun decode(ids: List<Int>): String
}

/**
 * The tokenizers that rmse-edge itself makes: of characters, and of words between spaces.
 *
 * Truncation and padding that are stored in the file are left out: they are what some program asked for in its last call before it
 * saved the file.
 */
class Tokenizer private constructor(private val file: File, private val kind: Kind, private val ids: Map<String, Int>, unknown: String?) :
    Decodes {
    private val pieces: Map<Int, String> = ids.entries.associate { (piece, id) -> id to piece }
    private val unknown: Int? = ids[unknown]

    /** Token ids of [text]; a `TextException` names the first character or word outside the vocabulary. */
    @Throws(TextException::class)
    fun encode(text: String): IntArray = kind.split(text).map { ids[it] ?: unknown ?: refuse(it) }.toIntArray()

    override fun decode(ids: List<Int>): String = ids.mapNotNull(pieces::get).joinToString(kind.between)

    /** Itself, if a model of so many tokens knows all of its own. */
    @Throws(PackageException::class)
    fun fitting(vocabSize: Int): Tokenizer {
        val largest = pieces.keys.maxOrNull() ?: 0
        if (largest < vocabSize) return this
        throw PackageException(
            "$file: ${pieces.size} tokens up to id $largest, but the model has vocab_size $vocabSize; use the tokenizer that the model " +
                "was trained with",
        )
    }

    private fun refuse(piece: String): Nothing {
        val known = when (kind) {
            Kind.CHARACTERS -> ids.keys.filter { it.isNotEmpty() && !it[0].isISOControl() }.sorted().joinToString("")
            Kind.WORDS -> "${ids.size} words"
        }
        throw TextException("the tokenizer has no token for '${shownPiece(piece)}'; it knows $known")
    }

    private enum class Kind(val between: String) {
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
            override fun split(text: String): List<String> = text.split(WHITE_SPACE).filter(String::isNotEmpty)
        }, ;

        abstract fun split(text: String): List<String>
    }

    companion object {
        private const val LARGEST_ID = 1 shl 24

        /** Unicode's White_Space. */
        private val WHITE_SPACE = Regex("[\\u0009-\\u000D \\u0085\\u00A0\\u1680\\u2000-\\u200A\\u2028\\u2029\\u202F\\u205F\\u3000]")
        private val anything = Reader { value, _ -> value }

        /**
         * Reads a `tokenizer.json`.
         *
         * @throws PackageException it is none, or one of a kind that is not read here; names the kind.
         */
        @Throws(PackageException::class)
        fun open(file: File): Tokenizer = try {
            val spec = Fields(Json.read(file))
            val model = spec.at("model", fields)
            val kind = kindOf(spec, model) ?: throw PackageException(
                "$file: a tokenizer of the kind ${shownKind(spec, model)}; this app reads those of characters and of words",
            )
            Tokenizer(file, kind, model.at("vocab", members(whole(0..LARGEST_ID))), model.orNull("unk_token", anyText))
        } catch (error: JsonException) {
            throw PackageException("$file: not a tokenizer.json (${error.message}); export the package again", error)
        } catch (error: IOException) {
            throw PackageException("$file: cannot be read (${error.message}); copy it again", error)
        }

        /** Pieces that are looked up as they stand, split in one of the two ways; null: anything else. */
        private fun kindOf(spec: Fields, model: Fields): Kind? {
            val looksUp = "normalizer" !in spec && "post_processor" !in spec &&
                spec.or(emptyList(), "added_tokens", items(anything)).isEmpty() && typeOf(model) == "WordLevel"
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

        private fun typeOf(part: Fields?): String? = part?.orNull("type", anyText)

        /** "BPE, split by ByteLevel": what the file says of itself. */
        private fun shownKind(spec: Fields, model: Fields): String {
            val splitter = typeOf(spec.orNull("pre_tokenizer", fields))
            return (typeOf(model) ?: "unknown") + if (splitter == null) "" else ", split by $splitter"
        }

        private fun shownPiece(piece: String): String = when (piece) {
            "\n" -> "\\n"
            "\t" -> "\\t"
            "\r" -> "\\r"
            else -> piece
        }
    }
}

/** Stands in for the tokenizer of a model that has none: a token's text is its id, with spaces between them. */
object TokenNumbers : Decodes {
    override fun decode(ids: List<Int>): String = ids.joinToString(" ")
}
