package dev.rmseedge.demo.ui

import android.app.Activity
import android.content.Intent
import android.net.Uri
import android.os.Bundle
import android.view.View
import android.widget.ArrayAdapter
import android.widget.Button
import android.widget.ListView
import android.widget.TextView
import dev.rmseedge.demo.R
import dev.rmseedge.demo.logic.modelName
import dev.rmseedge.demo.work.Kept
import dev.rmseedge.demo.work.Work
import dev.rmseedge.demo.work.Workspace
import java.text.DateFormat
import java.util.Date

/** The tab of the texts that were written. */
class TextsPanel(private val activity: Activity, private val workspace: Workspace, private val opened: () -> Unit) : Panel() {
    private val list = activity.findViewById<ListView>(R.id.texts)
    private val none = activity.findViewById<TextView>(R.id.texts_none)
    private val open = activity.findViewById<Button>(R.id.text_open)
    private val export = activity.findViewById<Button>(R.id.text_export)
    private val delete = activity.findViewById<Button>(R.id.text_delete)
    private var kept: List<Kept> = emptyList()

    /** The text whose file is being chosen: the screen may be made anew meanwhile. */
    private var exporting: Long? = null

    private val chosen: Kept? get() = kept.getOrNull(list.checkedItemPosition)

    init {
        list.setOnItemClickListener { _, _, _, _ -> showButtons() }
        open.setOnClickListener { chosen?.let(::open) }
        export.setOnClickListener { chosen?.let(::choosePlace) }
        delete.setOnClickListener { chosen?.let { workspace.forget(it.id) } }
    }

    override fun start() {
        workspace.writing.kept.shown(::showKept)
        workspace.work.shown { showButtons() }
    }

    fun save(state: Bundle) {
        exporting?.let { state.putLong(EXPORTING, it) }
    }

    fun restore(state: Bundle) {
        exporting = state.getLong(EXPORTING).takeIf { state.containsKey(EXPORTING) }
    }

    /** The user chose a file for the text. */
    fun write(file: Uri) {
        exporting?.let { workspace.export(it, file) }
        exporting = null
    }

    private fun open(text: Kept) {
        workspace.reopen(text.id)
        opened()
    }

    private fun choosePlace(text: Kept) {
        exporting = text.id
        val name = "${modelName(text.transcript.model)}-${text.id}.json"
        val create = Intent(Intent.ACTION_CREATE_DOCUMENT).setType("application/json").putExtra(Intent.EXTRA_TITLE, name)
        if (!activity.chooseFile(create, EXPORT)) workspace.notice.value = activity.getString(R.string.no_file_picker)
    }

    private fun showKept(all: List<Kept>) {
        val before = chosen?.id
        kept = all
        list.adapter = ArrayAdapter(activity, android.R.layout.simple_list_item_single_choice, all.map(::line))
        list.setItemChecked(all.indexOfFirst { it.id == before }, true)
        none.visibility = if (all.isEmpty()) View.VISIBLE else View.GONE
        showButtons()
    }

    private fun line(text: Kept): String {
        val date = DateFormat.getDateTimeInstance(DateFormat.MEDIUM, DateFormat.SHORT).format(Date(text.id))
        return activity.getString(R.string.text_line, text.transcript.title, text.transcript.model, date)
    }

    private fun showButtons() {
        val idle = workspace.work.value == Work.Idle
        open.isEnabled = idle && chosen != null
        export.isEnabled = chosen != null
        delete.isEnabled = idle && chosen != null
    }

    companion object {
        /** The request whose answer is a file to export to. */
        const val EXPORT = 2
        private const val EXPORTING = "exporting"
    }
}
