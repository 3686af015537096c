package dev.rmseedge.core.text

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.SessionException
import dev.rmseedge.core.UserException
import dev.rmseedge.core.host.LoopRuntime
import dev.rmseedge.core.host.checkTokens
import dev.rmseedge.core.host.openRuntime
import dev.rmseedge.core.model.ModelInfo
import dev.rmseedge.core.pack.LoopPackage
import dev.rmseedge.core.session.SessionFile
import dev.rmseedge.core.session.SessionText
import java.io.File

/**
 * A text that a model reads and continues, with everything that another prompt needs to go on from it.
 *
 * Nothing here starts a thread: [generate] blocks, and calls back on the thread that it was called on. For one thread at a time; only
 * [GenerationControl] may be used from another.
 */
class TextSession(val runtime: LoopRuntime, val tokenizer: Tokenizer) : AutoCloseable {
    val info: ModelInfo get() = runtime.info

    /** Tokens of the text that were not fed yet, such as the last one generated: what is fed next begins with them. */
    private var pending: List<Int> = emptyList()
    private var tail = Tail()

    /** Tokens of the text, those that were generated last included. */
    val position: Long get() = runtime.position + pending.size

    /** Forgets the text. */
    fun reset() {
        runtime.reset()
        pending = emptyList()
        tail = Tail()
    }

    /**
     * Continues the text with [prompt], and then with tokens of the model's own until one of [settings] ends it.
     *
     * @throws UserException the prompt has a character that the tokenizer does not know, is empty at the beginning of a text, or is too
     *   long for the model; the text is as before.
     */
    @Throws(UserException::class)
    fun generate(
        prompt: String,
        settings: GenerationSettings = GenerationSettings(),
        control: GenerationControl = GenerationControl(info.dials),
        onToken: (TokenEvent) -> Unit,
    ): GenerationStatistics {
        val begins = if (prompt.isEmpty() && position == 0L) listOfNotNull(info.bosTokenId) else emptyList()
        val told = pending.size // tokens that `tail` knows already
        val fed = pending + begins + (if (position == 0L) tokenizer.encode(prompt) else tokenizer.encodeMore(prompt)).toList()
        checkTokens(info, runtime.position, fed.toIntArray())
        val prefix = if (info.text.prefix && settings.prefix && position == 0L) fed.size else 0
        return run(Generator(runtime, tokenizer, fed, told, prefix, settings, control, tail), onToken)
    }

    /** What was written in one go, and what is known of it. */
    internal class Written(val generator: Generator, val statistics: GenerationStatistics)

    /** Feeds [unfed], tokens that the text ends with, and [more], and lets the model go on from there. */
    internal fun goOn(
        more: IntArray,
        unfed: List<Int>,
        settings: GenerationSettings,
        control: GenerationControl,
        onToken: (TokenEvent) -> Unit,
    ): Written {
        val fed = unfed + more.toList()
        checkTokens(info, runtime.position, fed.toIntArray())
        val prefix = if (info.text.prefix && settings.prefix && runtime.position == 0L) fed.size else 0
        val generator = Generator(runtime, tokenizer, fed, unfed.size, prefix, settings, control, tail)
        return Written(generator, run(generator, onToken))
    }

    private fun run(generator: Generator, onToken: (TokenEvent) -> Unit): GenerationStatistics = try {
        generator.run(onToken)
    } finally {
        pending = generator.pending
        tail = generator.tail
    }

    /**
     * Writes all that the text has left behind to [file], whole or not at all; `rmse-run --session` goes on from it, too.
     *
     * @param chat what a conversation keeps besides.
     */
    @Throws(SessionException::class)
    fun save(file: File, chat: String = "") = SessionFile.save(runtime, file, SessionText(pending, tail, chat))

    /** Puts a saved session in place of the text; where it does not fit, nothing is changed. Returns what [save] was given as `chat`. */
    @Throws(SessionException::class)
    fun restore(file: File): String {
        val text = SessionFile.restore(runtime, file)
        pending = text.pending
        tail = text.tail
        return text.chat
    }

    override fun close() = runtime.close()

    companion object {
        /** Of a package by itself, see [openRuntime]; a `PackageException` where its tokenizer cannot be read, or the engine cannot load it. */
        @Throws(PackageException::class)
        fun open(pack: LoopPackage, threads: Int? = null, expertMemory: String? = null): TextSession {
            val tokenizer = pack.tokenizer()
            return TextSession(openRuntime(pack, threads, expertMemory), tokenizer)
        }
    }
}
