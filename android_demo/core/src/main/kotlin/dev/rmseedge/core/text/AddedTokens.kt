package dev.rmseedge.core.text

import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.flag
import dev.rmseedge.core.json.whole
import dev.rmseedge.core.json.text as anyText

/** A token that is looked for in a text before anything else is done to it, such as `</s>`. */
internal class AddedToken(spec: Fields, largestId: Int) {
    val id = spec.at("id", whole(0..largestId))
    val content = spec.at("content", anyText)

    /** Whether it is sought in the text as it is written, or as it is normalized. */
    val asWritten = !spec.or(false, "normalized", flag)

    init {
        for (name in listOf("single_word", "lstrip", "rstrip")) {
            if (spec.or(false, name, flag)) spec.refuse(name, true, "false; such tokens are not read here")
        }
    }
}

/** A piece of text, or a token in its place. */
internal class Stretch(val text: String, val id: Int? = null)

/** Takes tokens out of texts: the first of them, and of those that begin there the longest. */
internal class TokenFinder(tokens: List<AddedToken>, spelled: (String) -> String) {
    private val ids = tokens.associate { spelled(it.content) to it.id }.filterKeys(String::isNotEmpty)
    private val pattern = ids.keys.sortedByDescending(String::length).joinToString("|", transform = Regex::escape).toRegex()

    fun split(text: String): List<Stretch> = buildList {
        var end = 0
        if (ids.isNotEmpty()) {
            for (found in pattern.findAll(text)) {
                if (end < found.range.first) add(Stretch(text.substring(end, found.range.first)))
                add(Stretch(found.value, ids.getValue(found.value)))
                end = found.range.last + 1
            }
        }
        if (end < text.length) add(Stretch(text.substring(end)))
    }
}
