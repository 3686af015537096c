package dev.rmseedge.demo.work

import android.content.Context
import dev.rmseedge.core.SessionException
import dev.rmseedge.core.host.ExpertFigures
import dev.rmseedge.core.model.Dials
import dev.rmseedge.core.text.FinishReason
import dev.rmseedge.core.text.GenerationControl
import dev.rmseedge.core.text.GenerationSettings
import dev.rmseedge.core.text.GenerationStatistics
import dev.rmseedge.core.text.Sampling
import dev.rmseedge.core.text.Span
import dev.rmseedge.core.text.TokenEvent
import dev.rmseedge.demo.R
import dev.rmseedge.demo.logic.LoopSeries
import dev.rmseedge.demo.logic.Notes
import dev.rmseedge.demo.logic.Transcript
import dev.rmseedge.demo.logic.bytesText
import java.io.File
import kotlin.random.Random
import kotlin.random.nextULong

/**
 * The text that is being written, and those that were.
 *
 * What takes a [Loaded] is called on the thread of models. The state of the model at the end of a text is kept with it, so a text
 * goes on after a rotation, another text, a bench, or the end of the process.
 */
class Writing(
    private val context: Context,
    private val store: TranscriptStore,
    private val notes: Notes,
    private val notice: Live<String>,
) {
    /** The text on the screen. It is told anew whenever it has grown. */
    val text = Live(Transcript(""))

    /** Of the latest run of the model; null: it has not run, or runs. */
    val statistics = Live<GenerationStatistics?>(null)

    /** Of the memory for experts, behind the latest run; null: it is not bounded. */
    @Volatile
    var experts: ExpertFigures? = null
        private set

    /** The texts that are kept, the newest first. */
    val kept = Live(emptyList<Kept>())

    /** The loops of the latest tokens. */
    val loops = LoopSeries(LATEST)

    private var id = newId()

    /** Whether the model's state is that at the end of the text: only then it goes on with it. */
    private var atEnd = false

    /** Whether a new text is to be a conversation, of models with a chat template. */
    @Volatile
    var talks = true

    /** Whether the text on the screen is one. */
    @Volatile
    private var talking = false

    @Volatile
    private var control: GenerationControl? = null

    /** Finds what was kept, and shows what was on the screen last. */
    fun open() {
        kept.value = store.all()
        notes[CURRENT]?.toLongOrNull()?.let(store::find)?.let(::show)
    }

    /** Lets the model go on from [prompt], until it ends, is stopped, or the text is full. */
    fun write(model: Loaded, prompt: String) {
        if (!atEnd) renew(model)
        val conversation = model.conversation.takeIf { isConversation(model) }
        talking = conversation != null
        val control = GenerationControl(model.dials).also { this.control = it }
        statistics.value = null
        var given: String? = if (conversation == null) prompt else asTurn(prompt)
        try {
            val settings = GenerationSettings(MOST_TOKENS, Sampling(seed = Random.nextULong()))
            val show = { event: TokenEvent ->
                given?.let { text.value.add(Span(it, Transcript.GIVEN)) } // now it has been taken
                given = null
                event.spans.forEach(text.value::add)
                loops.add(event.depth)
                text.announce()
            }
            val end = conversation?.ask(prompt, settings, control, show) ?: model.session.generate(prompt, settings, control, show)
            end.rest.forEach(text.value::add)
            experts = model.session.runtime.experts
            statistics.value = end
            if (end.finishReason == FinishReason.MAX_SEQ_LEN) notice.value = context.getString(R.string.text_full, model.pack.info.longest)
        } finally {
            this.control = null
        }
        keep(model)
    }

    fun stop() {
        control?.stop()
    }

    /** New settings for what is being written, from the next token on. */
    fun turn(dials: Dials) {
        control?.dials = dials
    }

    /** Whether what is written next is a turn of a conversation. */
    fun isConversation(model: Loaded?): Boolean = model?.conversation != null && if (text.value.size == 0) talks else talking

    /** A question as it stands in the text on the screen. */
    private fun asTurn(question: String) = if (text.value.size == 0) "$question\n\n" else "\n\n$question\n\n"

    /** Begins a new text; what was written stays kept. */
    fun renew(model: Loaded?) {
        model?.conversation?.reset() ?: model?.session?.reset()
        talking = false
        show(Kept(newId(), Transcript(model?.settings?.model.orEmpty())))
        statistics.value = null
        atEnd = model != null
    }

    /** Shows a kept text, and goes on with it where [model] wrote it. */
    fun reopen(id: Long, model: Loaded?) {
        store.find(id)?.let(::show) ?: return
        resume(model)
    }

    /** Puts a model, one that was just loaded, where the text on the screen ends; where it cannot go on, a notice says so. */
    fun resume(model: Loaded?) {
        val session = store.session(id)
        atEnd = false
        if (model == null || text.value.size == 0) return
        if (model.settings.model != text.value.model || !session.exists()) {
            notice.value = context.getString(R.string.text_of_other_model)
            return
        }
        try {
            restore(model, session)
            atEnd = true
        } catch (error: SessionException) {
            notice.value = error.message.orEmpty()
        }
    }

    fun find(id: Long): Kept? = store.find(id)

    /** Takes a kept text out; the one on the screen stays there until a new one begins. */
    fun remove(id: Long) {
        store.remove(id)
        kept.value = store.all()
    }

    /** Lets [task] read other texts with the model, whose state is laid aside meanwhile. */
    fun aside(model: Loaded, task: () -> Unit) {
        val parked = File(context.cacheDir, "parked.session")
        if (atEnd) save(model, parked)
        try {
            task()
        } finally {
            model.session.reset()
            if (atEnd) restore(model, parked)
            parked.delete()
        }
    }

    private fun keep(model: Loaded) {
        if (text.value.size == 0) return
        save(model, store.session(id))
        store.keep(Kept(id, text.value))
        kept.value = store.all()
        val removed = store.limitStates(id)
        if (removed > 0) notice.value = context.getString(R.string.states_removed, removed, bytesText(TranscriptStore.MOST_STATE))
    }

    private fun save(model: Loaded, file: File) {
        if (talking) model.conversation!!.save(file) else model.session.save(file)
    }

    private fun restore(model: Loaded, file: File) {
        talking = if (model.conversation != null) model.conversation.restore(file) else model.session.restore(file).isNotEmpty()
    }

    private fun show(kept: Kept) {
        id = kept.id
        notes.commit(mapOf(CURRENT to id.toString()))
        loops.clear()
        kept.transcript.from(0).filter { it.depth != Transcript.GIVEN }.takeLast(LATEST).forEach { loops.add(it.depth) }
        text.value = kept.transcript
    }

    private fun newId() = System.currentTimeMillis()

    private companion object {
        const val CURRENT = "text.current"
        const val LATEST = 120 // tokens in the chart
        const val MOST_TOKENS = 4096 // of one run; it can be told to go on
    }
}
