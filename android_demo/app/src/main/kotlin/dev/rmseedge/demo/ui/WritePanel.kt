package dev.rmseedge.demo.ui

import android.app.Activity
import android.os.Bundle
import android.view.View
import android.widget.AdapterView
import android.widget.Button
import android.widget.CheckBox
import android.widget.EditText
import android.widget.Spinner
import android.widget.TextView
import dev.rmseedge.core.measure.ProcessMemory
import dev.rmseedge.core.model.Dial
import dev.rmseedge.core.text.GenerationStatistics
import dev.rmseedge.demo.R
import dev.rmseedge.demo.logic.DepthScale
import dev.rmseedge.demo.logic.DialScale
import dev.rmseedge.demo.logic.Transcript
import dev.rmseedge.demo.logic.bytesText
import dev.rmseedge.demo.work.Loaded
import dev.rmseedge.demo.work.Work
import dev.rmseedge.demo.work.Workspace

/** The tab where the model writes. */
class WritePanel(private val activity: Activity, private val workspace: Workspace) : Panel() {
    private val writing = workspace.writing
    private val output = OutputText(activity.findViewById(R.id.output), activity.findViewById(R.id.output_scroll))
    private val chart = activity.findViewById<LoopChartView>(R.id.chart)
    private val legend = activity.findViewById<TextView>(R.id.legend)
    private val statistics = activity.findViewById<TextView>(R.id.statistics)
    private val marks = activity.findViewById<Spinner>(R.id.marks)
    private val prompt = activity.findViewById<EditText>(R.id.prompt)
    private val talk = activity.findViewById<CheckBox>(R.id.talk)
    private val write = activity.findViewById<Button>(R.id.write)
    private val stop = activity.findViewById<Button>(R.id.stop)
    private val renew = activity.findViewById<Button>(R.id.renew)
    private val share = activity.findViewById<Button>(R.id.share)
    private val loops = DialSlider(activity.findViewById(R.id.loops_label), activity.findViewById(R.id.loops), ::turn)
    private val exit = DialSlider(activity.findViewById(R.id.exit_label), activity.findViewById(R.id.exit), ::turn)

    /** What the sliders stood at before the process ended, until there is a model again. */
    private var wanted: Map<String, Double> = emptyMap()
    private var shownModel: Loaded? = null

    init {
        write.setOnClickListener { ask() }
        stop.setOnClickListener { workspace.stop() }
        renew.setOnClickListener { workspace.renew() }
        talk.setOnCheckedChangeListener { _, on -> writing.talks = on }
        share.setOnClickListener { hand() }
        marks.onItemSelectedListener = object : AdapterView.OnItemSelectedListener {
            override fun onItemSelected(parent: AdapterView<*>, view: View?, position: Int, id: Long) = restyle()

            override fun onNothingSelected(parent: AdapterView<*>) = Unit
        }
    }

    override fun start() {
        workspace.loaded.shown(::showModel)
        workspace.work.shown(::showWork)
        writing.text.shown(::showText)
        writing.statistics.shown(::showStatistics)
    }

    /** Keeps what no workspace does. */
    fun save(state: Bundle) {
        for ((dial, value) in dials()) state.putDouble(DIAL + dial, value)
    }

    fun restore(state: Bundle) {
        wanted = Dial.ALL.map { it.name }.filter { state.containsKey(DIAL + it) }.associateWith { state.getDouble(DIAL + it) }
        showModel(workspace.loaded.value)
    }

    private fun ask() {
        if (prompt.text.isBlank() && writing.isConversation(workspace.loaded.value)) {
            workspace.notice.value = activity.getString(R.string.question_empty)
        } else if (prompt.text.isEmpty() && writing.text.value.size == 0) {
            workspace.notice.value = activity.getString(R.string.prompt_empty)
        } else {
            workspace.write(prompt.text.toString())
            prompt.text.clear()
        }
    }

    private fun hand() {
        val text = writing.text.value.text()
        if (text.length <= LONGEST_SHARED) {
            activity.shareText(text, "text/plain")
        } else {
            workspace.notice.value = activity.getString(R.string.too_long_to_share)
        }
    }

    private fun showModel(model: Loaded?) {
        if (model == null || (model === shownModel && wanted.isEmpty())) return
        shownModel = model
        val info = model.pack.info
        talk.visibility = if (model.conversation == null) View.GONE else View.VISIBLE
        val dials = model.dials.with(wanted.filterKeys { it == Dial.MAX_LOOPS || it in info.rules })
        wanted = emptyMap()
        val rule = info.rules.firstOrNull { Dial.BY_NAME.getValue(it).off != null }
        loops.show(DialScale.of(Dial.MAX_LOOPS, info.maxLoops), dials[Dial.MAX_LOOPS])
        exit.show(rule?.let { DialScale.of(it, info.maxLoops) }, rule?.let { dials[it] } ?: 0.0)
        turn()
        restyle()
    }

    private fun showWork(work: Work) {
        val model = workspace.loaded.value
        write.isEnabled = work == Work.Idle && model != null
        renew.isEnabled = work == Work.Idle
        stop.isEnabled = work == Work.Writing
        if (work == Work.Writing) statistics.text = activity.getString(R.string.writing_tokens) else chart.describe()
    }

    private fun showText(text: Transcript) {
        if (!output.grow(text)) restyle()
        chart.show(writing.loops.values, scale())
        share.isEnabled = text.size > 0
    }

    private fun showStatistics(found: GenerationStatistics?) {
        val first = found?.timeToFirstToken ?: return
        statistics.text = activity.getString(
            R.string.statistics,
            found.tokens.size,
            found.tokensPerSecond ?: 0.0,
            first * 1000,
            found.meanLoops,
            bytesText(ProcessMemory.now()?.resident ?: 0),
        ) + experts()
    }

    /** How often experts were in memory, where that is bounded. */
    private fun experts(): String {
        val found = writing.experts ?: return ""
        val rate = 100 * (found.hitRate ?: 1.0)
        return activity.getString(R.string.statistics_experts, rate, bytesText(found.budget), bytesText(found.total))
    }

    private fun restyle() {
        val chosen = Marks.values()[marks.selectedItemPosition.coerceAtLeast(0)]
        legend.text = legend(activity.getString(R.string.legend), chosen, scale())
        output.restyle(writing.text.value, chosen, scale())
        chart.show(writing.loops.values, scale())
    }

    private fun scale(): DepthScale {
        val known = workspace.loaded.value?.pack?.info?.maxLoops
        val loops = known ?: writing.loops.values.maxOrNull() ?: 1
        return DepthScale(loops, activity.resources.getBoolean(R.bool.dark))
    }

    /** The sliders act at once, on what is being written, too. */
    private fun turn() {
        val model = workspace.loaded.value ?: return
        workspace.turn(model.pack.info.dialsWith(dials()))
    }

    private fun dials(): Map<String, Double> = listOfNotNull(loops.value, exit.value).toMap()

    private companion object {
        const val DIAL = "dial."
        const val LONGEST_SHARED = 200_000 // characters: what is shared passes through the system's memory
    }
}
