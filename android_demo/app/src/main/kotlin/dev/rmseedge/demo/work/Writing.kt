package dev.rmseedge.demo.work

import android.content.Context
import dev.rmseedge.core.SessionException
import dev.rmseedge.core.model.Dials
import dev.rmseedge.core.text.FinishReason
import dev.rmseedge.core.text.GenerationControl
import dev.rmseedge.core.text.GenerationSettings
import dev.rmseedge.core.text.GenerationStatistics
import dev.rmseedge.core.text.Sampling
import dev.rmseedge.core.text.Span
import dev.rmseedge.demo.R
import dev.rmseedge.demo.logic.LoopSeries
import dev.rmseedge.demo.logic.Notes
import dev.rmseedge.demo.logic.Transcript
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

    /** The texts that are kept, the newest first. */
    val kept = Live(emptyList<Kept>())

    /** The loops of the latest tokens. */
    val loops = LoopSeries(LATEST)

    private var id = newId()

    /** Whether the model's state is that at the end of the text: only then it goes on with it. */
    private var atEnd = false

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
        val control = GenerationControl(model.dials).also { this.control = it }
        statistics.value = null
        var given: String? = prompt
        try {
            val settings = GenerationSettings(MOST_TOKENS, Sampling(seed = Random.nextULong()))
            val end = model.session.generate(prompt, settings, control) { event ->
                given?.let { text.value.add(Span(it, Transcript.GIVEN)) } // now it has been taken
                given = null
                event.spans.forEach(text.value::add)
                loops.add(event.depth)
                text.announce()
            }
            end.rest.forEach(text.value::add)
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

    /** Begins a new text; what was written stays kept. */
    fun renew(model: Loaded?) {
        model?.session?.reset()
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
            model.session.restore(session)
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
        if (atEnd) model.session.save(parked)
        try {
            task()
        } finally {
            model.session.reset()
            if (atEnd) model.session.restore(parked)
            parked.delete()
        }
    }

    private fun keep(model: Loaded) {
        if (text.value.size == 0) return
        model.session.save(store.session(id))
        store.keep(Kept(id, text.value))
        kept.value = store.all()
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
