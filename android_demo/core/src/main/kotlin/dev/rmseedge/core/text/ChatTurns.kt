package dev.rmseedge.core.text

import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.Reader
import dev.rmseedge.core.json.flag
import dev.rmseedge.core.json.items
import dev.rmseedge.core.json.refuseField
import dev.rmseedge.core.json.text as anyText

/** What was said by [role]: `user` or `assistant`, or by `system` before all others. */
data class Message(val role: String, val content: String)

/** The text before and behind every message of a role. */
internal data class Around(val before: String, val behind: String)

/**
 * A chat template as plain text around each message: the manifest's "chat", which the export made of the template and held against it
 * (rmse_edge/chat_turns.py).
 *
 * @property end where an answer stops; null: the template does not say.
 */
class ChatTurns internal constructor(
    private val begin: String,
    private val around: Map<String, Around?>,
    private val answer: String,
    private val trimmed: Boolean,
    val end: String?,
) {
    /** The text of a conversation, up to where its next answer begins. */
    fun render(messages: List<Message>): String = buildString {
        if (messages.first().role != SYSTEM) append(begin)
        for ((role, content) in messages) {
            val (before, behind) = around.getValue(role)!!
            append(before).append(if (trimmed) content.trim() else content).append(behind)
        }
        append(answer)
    }

    internal companion object {
        const val SYSTEM = "system"
        const val USER = "user"
        const val ASSISTANT = "assistant"

        private val pair = Reader { value, path ->
            val texts = items(anyText).read(value, path)
            if (texts.size == 2) Around(texts[0], texts[1]) else refuseField(path, texts, "the text before a message and that behind it")
        }

        /** The manifest's "chat"; a `JsonException` names the field that does not fit. */
        fun of(spec: Fields) = ChatTurns(
            spec.at("begin", anyText),
            mapOf(SYSTEM to spec.orNull("system", pair), USER to spec.at("user", pair), ASSISTANT to spec.at("assistant", pair)),
            spec.at("answer", anyText),
            spec.at("trimmed", flag),
            spec.orNull("end", anyText)?.ifEmpty { null },
        )
    }
}
