package dev.rmseedge.demo.ui

import android.app.Activity
import android.content.Intent
import android.view.View
import android.widget.ArrayAdapter
import android.widget.Button
import android.widget.RadioButton
import android.widget.RadioGroup
import android.widget.Spinner
import android.widget.TextView
import dev.rmseedge.demo.R
import dev.rmseedge.demo.logic.LoadSettings
import dev.rmseedge.demo.logic.MemoryForecast
import dev.rmseedge.demo.logic.bytesText
import dev.rmseedge.demo.work.Loaded
import dev.rmseedge.demo.work.Work
import dev.rmseedge.demo.work.Workspace
import java.text.NumberFormat

/** The tab where a package is chosen, looked at, and loaded. */
class ModelsPanel(private val activity: Activity, private val workspace: Workspace) : Panel() {
    private val loaded = activity.findViewById<TextView>(R.id.loaded)
    private val packages = activity.findViewById<RadioGroup>(R.id.packages)
    private val threads = activity.findViewById<Spinner>(R.id.thread_count)
    private val experts = activity.findViewById<Spinner>(R.id.expert_memory)
    private val expertRow = activity.findViewById<View>(R.id.expert_row)
    private val forecast = activity.findViewById<TextView>(R.id.forecast)
    private val load = activity.findViewById<Button>(R.id.load)
    private val add = activity.findViewById<Button>(R.id.add)
    private val remove = activity.findViewById<Button>(R.id.remove)

    /** Of the chosen package; null: not known, so that it may not be loaded yet. */
    private var known: MemoryForecast? = null

    /** The package that was looked at last, whatever came of it. */
    private var looked: String? = null

    private val chosen: String? get() = packages.findViewById<RadioButton>(packages.checkedRadioButtonId)?.text?.toString()

    init {
        activity.findViewById<TextView>(R.id.cores).text = activity.getString(R.string.cores, workspace.cores)
        val automatic = activity.getString(R.string.threads_automatic, workspace.cores.threads)
        val counts = workspace.cores.frequencies.indices.map { "${it + 1}" }
        threads.adapter = ArrayAdapter(activity, android.R.layout.simple_spinner_dropdown_item, listOf(automatic) + counts)
        packages.setOnCheckedChangeListener { _, _ -> forget() }
        load.setOnClickListener { load() }
        add.setOnClickListener { choose() }
        remove.setOnClickListener { chosen?.let(workspace::remove) }
    }

    override fun start() {
        workspace.names.shown(::showNames)
        workspace.loaded.shown(::showLoaded)
        workspace.work.shown { showButtons() }
    }

    private fun showNames(names: List<String>) {
        val before = chosen
        packages.removeAllViews()
        forget()
        for (name in names) {
            val button = RadioButton(activity).apply {
                text = name
                minHeight = resources.getDimensionPixelSize(R.dimen.touch)
            }
            packages.addView(button)
            if (name == before) packages.check(button.id)
        }
    }

    private fun showLoaded(model: Loaded?) {
        loaded.text = if (model == null) {
            activity.getString(R.string.no_model)
        } else {
            val info = model.pack.info
            val parameters = NumberFormat.getIntegerInstance().format(info.parameters)
            activity.getString(
                R.string.loaded,
                model.settings.model,
                info.quant,
                parameters,
                info.maxLoops,
                model.settings.threads,
                model.pack.target.engine,
            )
        }
    }

    private fun showButtons() {
        val idle = workspace.work.value == Work.Idle
        add.isEnabled = idle
        remove.isEnabled = idle && chosen != null
        load.isEnabled = idle && known != null
        if (idle && chosen != looked) look()
    }

    /** Another package was chosen, or none. */
    private fun forget() {
        known = null
        looked = null
        forecast.text = ""
        expertRow.visibility = View.GONE
        showButtons()
    }

    /** Verifies the chosen package and says what it would take, before it is loaded. */
    private fun look() {
        val name = chosen ?: return
        looked = name
        workspace.forecast(name) { found ->
            activity.runOnUiThread { if (name == chosen) show(name, found) }
        }
    }

    private fun show(name: String, found: MemoryForecast) {
        known = found
        val text = if (found.fits) R.string.forecast else R.string.forecast_tight
        forecast.text = activity.getString(text, name, bytesText(found.needed), bytesText(found.free), found.engine)
        expertRow.visibility = if (found.bounds) View.VISIBLE else View.GONE
        load.setText(if (found.fits) R.string.load else R.string.load_anyway)
        showButtons()
    }

    private fun load() {
        val name = chosen ?: return
        val count = threads.selectedItemPosition.takeIf { it > 0 } ?: workspace.cores.threads
        val budget = EXPERT_MEMORY.getOrNull(experts.selectedItemPosition).takeIf { known?.bounds == true }
        workspace.load(LoadSettings(name, count, budget), insist = true)
    }

    private fun choose() {
        val open = Intent(Intent.ACTION_OPEN_DOCUMENT).setType("*/*") // pickers know no type of ours
        if (!activity.chooseFile(open, ADD)) workspace.notice.value = activity.getString(R.string.no_file_picker)
    }

    companion object {
        /** The request whose answer is an archive. */
        const val ADD = 1

        /** In the order of `R.array.expert_memory_names`. */
        private val EXPERT_MEMORY = listOf(null, "auto", "75%", "50%", "25%")
    }
}
