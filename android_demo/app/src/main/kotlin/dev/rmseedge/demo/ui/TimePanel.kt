package dev.rmseedge.demo.ui

import android.app.Activity
import android.widget.Button
import android.widget.EditText
import android.widget.TextView
import dev.rmseedge.demo.R
import dev.rmseedge.demo.work.TimingResult
import dev.rmseedge.demo.work.TimingSettings
import dev.rmseedge.demo.work.Work
import dev.rmseedge.demo.work.Workspace

/** The tab where the model is timed. */
class TimePanel(private val activity: Activity, private val workspace: Workspace) : Panel() {
    private val prompt = Number(R.id.time_prompt, R.string.time_prompt, 0..16_384)
    private val generate = Number(R.id.time_generate, R.string.time_generate, 1..16_384)
    private val repetitions = Number(R.id.time_repetitions, R.string.time_repetitions, 1..100)
    private val run = activity.findViewById<Button>(R.id.time_run)
    private val stop = activity.findViewById<Button>(R.id.time_stop)
    private val report = activity.findViewById<Button>(R.id.time_report)
    private val share = activity.findViewById<Button>(R.id.time_share)
    private val progress = activity.findViewById<TextView>(R.id.time_progress)
    private val result = activity.findViewById<TextView>(R.id.time_result)

    init {
        run.setOnClickListener { settings()?.let(workspace::time) }
        stop.setOnClickListener { workspace.stop() }
        report.setOnClickListener { workspace.report() }
        share.setOnClickListener { workspace.timing.result.value?.let { activity.shareText(it.document, it.type) } }
    }

    override fun start() {
        workspace.work.shown(::showWork)
        workspace.loaded.shown { showWork(workspace.work.value) }
        workspace.timing.result.shown(::showResult)
    }

    private fun showWork(work: Work) {
        val ready = work == Work.Idle && workspace.loaded.value != null
        run.isEnabled = ready
        report.isEnabled = ready
        stop.isEnabled = work is Work.Timing
        progress.text = if (work is Work.Timing) activity.getString(R.string.time_progress, work.done, work.rows) else ""
    }

    private fun showResult(found: TimingResult?) {
        share.isEnabled = found != null
        result.text = found?.text.orEmpty()
    }

    private fun settings(): TimingSettings? {
        return TimingSettings(prompt.read() ?: return null, generate.read() ?: return null, repetitions.read() ?: return null)
    }

    /** A field for a whole number. */
    private inner class Number(field: Int, private val name: Int, private val range: IntRange) {
        private val field = activity.findViewById<EditText>(field)

        /** What it says; null, and a notice that tells why, where that is out of range. */
        fun read(): Int? {
            val value = field.text.toString().toIntOrNull()
            if (value != null && value in range) return value
            val expected = activity.getString(R.string.time_number, activity.getString(name), field.text, range.first, range.last)
            workspace.notice.value = expected
            return null
        }
    }
}
