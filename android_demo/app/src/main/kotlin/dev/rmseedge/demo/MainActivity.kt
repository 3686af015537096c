package dev.rmseedge.demo

import android.app.Activity
import android.content.Intent
import android.os.Bundle
import android.view.View
import android.widget.ProgressBar
import android.widget.TabHost
import android.widget.TextView
import dev.rmseedge.demo.ui.ModelsPanel
import dev.rmseedge.demo.ui.Panel
import dev.rmseedge.demo.ui.TextsPanel
import dev.rmseedge.demo.ui.TimePanel
import dev.rmseedge.demo.ui.WritePanel
import dev.rmseedge.demo.work.Work
import dev.rmseedge.demo.work.Workspace

/** The screen: four tabs, and above them what is being done and what there is to say. */
class MainActivity : Activity() {
    private val workspace: Workspace get() = (application as DemoApplication).workspace
    private val tabs: TabHost get() = findViewById(android.R.id.tabhost)
    private lateinit var write: WritePanel
    private lateinit var texts: TextsPanel
    private lateinit var panels: List<Panel>

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.main)
        tabs.setup()
        for ((name, title, panel) in TABS) tabs.addTab(tabs.newTabSpec(name).setIndicator(getString(title)).setContent(panel))
        write = WritePanel(this, workspace)
        texts = TextsPanel(this, workspace) { tabs.setCurrentTabByTag(WRITE) }
        panels = listOf(Head(), write, ModelsPanel(this, workspace), TimePanel(this, workspace), texts)
    }

    override fun onStart() {
        super.onStart()
        panels.forEach(Panel::start)
    }

    override fun onStop() {
        panels.forEach(Panel::stop)
        super.onStop()
    }

    override fun onSaveInstanceState(state: Bundle) {
        super.onSaveInstanceState(state) // what was typed, and where lists stand
        state.putString(TAB, tabs.currentTabTag)
        write.save(state)
        texts.save(state)
    }

    override fun onRestoreInstanceState(state: Bundle) {
        super.onRestoreInstanceState(state)
        state.getString(TAB)?.let(tabs::setCurrentTabByTag)
        write.restore(state)
        texts.restore(state)
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        val file = data?.data?.takeIf { result == RESULT_OK } ?: return
        when (request) {
            ModelsPanel.ADD -> workspace.add(file)
            TextsPanel.EXPORT -> texts.write(file)
        }
    }

    /** What stands above the tabs. */
    private inner class Head : Panel() {
        private val notice = findViewById<TextView>(R.id.notice)
        private val preparing = findViewById<View>(R.id.preparing)
        private val what = findViewById<TextView>(R.id.preparing_text)
        private val share = findViewById<ProgressBar>(R.id.preparing_share)

        override fun start() {
            workspace.notice.shown { sentence ->
                notice.text = sentence
                notice.visibility = if (sentence.isEmpty()) View.GONE else View.VISIBLE
            }
            workspace.work.shown(::show)
        }

        private fun show(work: Work) {
            preparing.visibility = if (work is Work.Preparing) View.VISIBLE else View.GONE
            if (work !is Work.Preparing) return
            if (what.text.toString() != work.what) what.text = work.what // a screen reader says it once
            share.isIndeterminate = work.share == null
            share.progress = ((work.share ?: 0f) * share.max).toInt()
        }
    }

    private companion object {
        const val TAB = "tab"
        const val WRITE = "write"
        val TABS = listOf(
            Triple(WRITE, R.string.tab_write, R.id.write_panel),
            Triple("models", R.string.tab_models, R.id.models_panel),
            Triple("time", R.string.tab_time, R.id.time_panel),
            Triple("texts", R.string.tab_texts, R.id.texts_panel),
        )
    }
}
