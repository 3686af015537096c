package dev.rmseedge.core.text

import dev.rmseedge.core.SessionException
import dev.rmseedge.core.UserException
import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.json.JsonException
import dev.rmseedge.core.json.Reader
import dev.rmseedge.core.json.fields
import dev.rmseedge.core.json.items
import dev.rmseedge.core.json.refuseField
import dev.rmseedge.core.json.whole
import java.io.File
import dev.rmseedge.core.json.text as anyText

/**
 * A conversation in turns: every question feeds only what the text has gained since the last one.
 *
 * The template says what the text of a conversation is. Where it begins with what the model has read, only the rest is fed; otherwise
 * the model reads it from its beginning. Sessions keep it as `rmse-run --chat` does, which goes on from them.
 */
class Conversation(private val session: TextSession, private val turns: ChatTurns) {
    private val said = mutableListOf<Message>()

    /** Text that the model has read, and the last tokens of it that were not fed. There are two ways of seeing it, with those or without. */
    private var read: List<Pair<String, List<Int>>> = emptyList()

    /** All that was said. */
    val messages: List<Message> get() = said.toList()

    /** Forgets all of it. */
    fun reset() {
        session.reset()
        said.clear()
        read = emptyList()
    }

    /**
     * Lets the model answer [question].
     *
     * @throws UserException as [TextSession.generate]; then nothing was asked.
     */
    @Throws(UserException::class)
    fun ask(
        question: String,
        settings: GenerationSettings = GenerationSettings(),
        control: GenerationControl = GenerationControl(session.info.dials),
        onToken: (TokenEvent) -> Unit,
    ): GenerationStatistics {
        val asked = Message(ChatTurns.USER, question)
        val text = turns.render(said + asked)
        val anew = session.info.text.prefix && settings.prefix // all that was said is one prefix, of an empty past
        val known = read.firstOrNull { (before, _) -> !anew && text.startsWith(before) }
        read = emptyList() // until the answer is there
        val ending = settings.copy(stop = settings.stop + listOfNotNull(turns.end))
        val answer = StringBuilder()
        val keep = { event: TokenEvent ->
            event.spans.forEach { answer.append(it.text) }
            onToken(event)
        }
        val written = if (known == null) {
            session.reset()
            session.goOn(session.tokenizer.encodeWhole(text), emptyList(), ending, control, keep)
        } else {
            session.goOn(session.tokenizer.encodeMore(text.substring(known.first.length)), known.second, ending, control, keep)
        }
        written.statistics.rest.forEach { answer.append(it.text) }
        if (written.statistics.tokens.isEmpty()) return written.statistics // as if it had not been asked
        said += asked
        said += Message(ChatTurns.ASSISTANT, answer.toString())
        val unfed = written.generator.pending
        read = listOf(
            text + written.generator.text(written.statistics.tokens.size) to unfed,
            text + written.generator.text(written.statistics.tokens.size - unfed.size) to emptyList(),
        )
        return written.statistics
    }

    /** As [TextSession.save], with what was said. */
    @Throws(SessionException::class)
    fun save(file: File) {
        val messages = said.map { mapOf("role" to it.role, "content" to it.content) }
        session.save(file, Json.write(mapOf("messages" to messages, "read" to read.map { (text, unfed) -> listOf(text, unfed) })))
    }

    /** As [TextSession.restore]; false: the session is of a plain text, with which the model goes on, but no conversation. */
    @Throws(SessionException::class)
    fun restore(file: File): Boolean {
        val chat = session.restore(file)
        said.clear()
        read = emptyList()
        if (chat.isEmpty()) return false
        try {
            val kept = Fields(Json.parse(chat))
            said += kept.at("messages", items(fields)).map { Message(it.at("role", anyText), it.at("content", anyText)) }
            read = kept.at("read", items(stretch))
        } catch (error: JsonException) {
            throw SessionException("$file: its conversation is damaged (${error.message}); start a new one", error)
        }
        return true
    }

    private companion object {
        val stretch = Reader { value, path ->
            val parts = value as? List<*>
            if (parts?.size != 2) refuseField(path, "$parts", "a text and its tokens that were not fed")
            anyText.read(parts[0], path) to items(whole(0..Tokenizer.LARGEST_ID)).read(parts[1], path)
        }
    }
}
