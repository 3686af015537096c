package dev.rmseedge.demo.ui

import android.widget.SeekBar
import android.widget.TextView
import dev.rmseedge.demo.R
import dev.rmseedge.demo.logic.DialScale
import java.util.Locale

/** A slider for one dial of the model, with its value in words above it. */
class DialSlider(private val label: TextView, private val bar: SeekBar, private val moved: () -> Unit) : SeekBar.OnSeekBarChangeListener {
    private var scale: DialScale? = null

    /** What it stands at; null before a model is loaded. */
    val value: Pair<String, Double>? get() = scale?.let { it.dial to it.value(bar.progress) }

    init {
        bar.setOnSeekBarChangeListener(this)
        bar.isEnabled = false
    }

    /** Turns a dial of a model from now on; null: the model has none for it. */
    fun show(scale: DialScale?, value: Double) {
        this.scale = scale
        bar.isEnabled = scale != null && scale.steps > 0
        if (scale == null) return
        bar.max = scale.steps
        bar.progress = scale.step(value)
        describe()
    }

    private fun describe() {
        val (dial, value) = value ?: return
        val number = if (value % 1 == 0.0) value.toInt().toString() else String.format(Locale.getDefault(), "%.3g", value)
        val text = when (dial) {
            "max_loops" -> R.string.dial_max_loops
            "exit_threshold" -> R.string.dial_exit_threshold
            else -> R.string.dial_other
        }
        label.text = label.context.getString(text, number, dial.replace('_', ' '))
        bar.contentDescription = label.text
    }

    override fun onProgressChanged(bar: SeekBar, progress: Int, fromUser: Boolean) {
        describe()
        if (fromUser) moved()
    }

    override fun onStartTrackingTouch(bar: SeekBar) = Unit

    override fun onStopTrackingTouch(bar: SeekBar) = Unit
}
