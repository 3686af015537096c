package dev.rmseedge.core.text

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.TextException
import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.json.JsonException
import dev.rmseedge.core.json.Reader
import dev.rmseedge.core.json.fields
import dev.rmseedge.core.json.items
import java.io.File
import java.io.IOException
import dev.rmseedge.core.json.text as anyText

/** The part of a tokenizer that streams of text need. */
fun interface Decodes {
    /** The text of [ids]; bytes that are no character, or not yet, are U+FFFD. */
    fun decode(ids: List<Int>): String
}

/**
 * The tokenizers of models that packages are made of: those that rmse-edge itself makes, and pairs of bytes.
 *
 * Truncation and padding that are stored in the file are left out: they are what some program asked for in its last call before it
 * saved the file.
 */
abstract class Tokenizer internal constructor(protected val file: File) : Decodes {
    internal abstract val pieces: Map<Int, String>

    /** Token ids of [text]; a `TextException` names the first character or word outside the vocabulary. */
    @Throws(TextException::class)
    abstract fun encode(text: String): IntArray

    /** Token ids of [text] as it stands: without the tokens that belong around every text, which a chat template writes itself. */
    @Throws(TextException::class)
    open fun encodeWhole(text: String): IntArray = encode(text)

    /** Token ids of [text] where it goes on from an earlier one: without what belongs to a text's beginning. */
    @Throws(TextException::class)
    abstract fun encodeMore(text: String): IntArray

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

    companion object {
        internal const val LARGEST_ID = 1 shl 24
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
            val kind = LookupTokenizer.kindOf(spec, model, spec.or(emptyList(), "added_tokens", items(anything)).isNotEmpty())
            when {
                kind != null -> LookupTokenizer(file, kind, model)

                ByteLevelTokenizer.isOne(spec, model) -> ByteLevelTokenizer(file, spec)

                else -> throw PackageException(
                    "$file: a tokenizer of the kind ${shownKind(
                        spec,
                        model,
                    )}; this app reads those of characters, of words, and of pairs " +
                        "of bytes (BPE, ByteLevel)",
                )
            }
        } catch (error: JsonException) {
            throw PackageException("$file: not a tokenizer.json that this app reads (${error.message})", error)
        } catch (error: IOException) {
            throw PackageException("$file: cannot be read (${error.message}); copy it again", error)
        }

        internal fun typeOf(part: Fields?): String? = part?.orNull("type", anyText)

        /** "Unigram, split by Metaspace": what the file says of itself. */
        private fun shownKind(spec: Fields, model: Fields): String {
            val splitter = typeOf(spec.orNull("pre_tokenizer", fields))
            return (typeOf(model) ?: "unknown") + if (splitter == null) "" else ", split by $splitter"
        }
    }
}

/** Stands in for the tokenizer of a model that has none: a token's text is its id, with spaces between them. */
object TokenNumbers : Decodes {
    override fun decode(ids: List<Int>): String = ids.joinToString(" ")
}
