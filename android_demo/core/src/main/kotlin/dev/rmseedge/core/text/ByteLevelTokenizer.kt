package dev.rmseedge.core.text

import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.fields
import dev.rmseedge.core.json.items
import dev.rmseedge.core.json.members
import dev.rmseedge.core.json.refuseField
import dev.rmseedge.core.json.whole
import java.io.File
import java.text.Normalizer
import dev.rmseedge.core.json.text as anyText

/**
 * Pairs of bytes that were merged, as in GPT-2 and most published models: a `tokenizer.json` of the type BPE whose words are spelled in
 * bytes. Every text has tokens.
 */
internal class ByteLevelTokenizer(file: File, spec: Fields) : Tokenizer(file) {
    private val pairs = BytePairs(spec.at("model", fields), LARGEST_ID)
    private val added = spec.or(emptyList(), "added_tokens", items(fields)).map { AddedToken(it, LARGEST_ID) }
    private val normalize = normalizer(spec.orNull("normalizer", fields))
    private val written = TokenFinder(added.filter { it.asWritten }) { it }
    private val normalized = TokenFinder(added.filter { !it.asWritten }, normalize)
    private val words = PreTokenizer.of(spec.orNull("pre_tokenizer", fields))
    private val around = Around().also { it.read(spec.orNull("post_processor", fields)) }

    override val pieces: Map<Int, String> =
        pairs.ids.entries.associate { (piece, id) -> id to piece } + added.associate { it.id to it.content }

    override fun encode(text: String): IntArray {
        val own = tokens(text, first = true)
        // A text may say itself what every text begins with.
        val said = around.before.size == 1 && own.firstOrNull() == around.before[0]
        return ((if (said) emptyList() else around.before) + own + around.behind).toIntArray()
    }

    override fun encodeWhole(text: String): IntArray = tokens(text, first = true).toIntArray()

    override fun encodeMore(text: String): IntArray = tokens(text, first = false).toIntArray()

    override fun decode(ids: List<Int>): String =
        Utf8.decode(ids.mapNotNull(pieces::get).map(ByteAlphabet::read).fold(ByteArray(0), ByteArray::plus))

    private fun tokens(text: String, first: Boolean): List<Int> = buildList {
        var begins = first // behind a token of its own a text begins as everywhere else
        for (stretch in written.split(text).flatMap { if (it.id != null) listOf(it) else normalized.split(normalize(it.text)) }) {
            if (stretch.id != null) add(stretch.id) else words.cut(stretch.text, begins).forEach { addAll(pairs.encode(it)) }
            begins = true
        }
    }

    /** Tokens that stand around every text: `post_processor`. */
    private class Around {
        val before = mutableListOf<Int>()
        val behind = mutableListOf<Int>()

        fun read(spec: Fields?): Unit = when (val type = spec?.at("type", anyText)) {
            // The latter moves the places of tokens in a text, and no more.
            null, "ByteLevel" -> Unit

            "Sequence" -> spec.at("processors", items(fields)).forEach(::read)

            "TemplateProcessing" -> template(spec)

            else -> refuseField("post_processor", type, "ByteLevel, TemplateProcessing, or a Sequence of these")
        }

        private fun template(spec: Fields) {
            val known = spec.at("special_tokens", members { value, path -> Fields(value, path).at("ids", items(whole(0..LARGEST_ID))) })
            var into = before
            for (part in spec.at("single", items(fields))) {
                val token = part.orNull("SpecialToken", fields)?.at("id", anyText)
                if (token == null) into = behind else into += known[token] ?: spec.refuse("single", token, "one of special_tokens")
            }
        }
    }

    companion object {
        fun isOne(spec: Fields, model: Fields): Boolean = typeOf(model) == "BPE" && typeOf(spec.orNull("decoder", fields)) == "ByteLevel"

        private val FORMS = Normalizer.Form.entries.associateBy { it.name }

        private fun normalizer(spec: Fields?): (String) -> String = when (val type = typeOf(spec)) {
            null -> { text -> text }

            in FORMS -> { text -> Normalizer.normalize(text, FORMS[type]) }

            "Sequence" -> spec!!.at("normalizers", items(fields)).map(::normalizer).let { parts ->
                { text -> parts.fold(text) { now, part -> part(now) } }
            }

            else -> refuseField("normalizer", type, "${FORMS.keys.joinToString()}, or a Sequence of these")
        }
    }
}
