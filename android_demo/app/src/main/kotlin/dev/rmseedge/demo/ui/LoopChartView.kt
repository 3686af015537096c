package dev.rmseedge.demo.ui

import android.content.Context
import android.graphics.Canvas
import android.graphics.Paint
import android.util.AttributeSet
import android.view.View
import dev.rmseedge.demo.R
import dev.rmseedge.demo.logic.DepthScale

/** The loops of the latest tokens as bars, the newest at the right; a full bar is as many as a token can take. */
class LoopChartView(context: Context, attributes: AttributeSet?) : View(context, attributes) {
    private val paint = Paint()
    private var values: List<Int> = emptyList()
    private var scale = DepthScale(loops = 1, dark = false)

    init {
        importantForAccessibility = IMPORTANT_FOR_ACCESSIBILITY_YES
        describe()
    }

    fun show(values: List<Int>, scale: DepthScale) {
        this.values = values
        this.scale = scale
        invalidate()
    }

    /** Says in words what the bars show. Not with every token: a screen reader would never come to an end. */
    fun describe() {
        contentDescription = if (values.isEmpty()) {
            context.getString(R.string.chart_empty)
        } else {
            context.getString(R.string.chart_of, values.size, values.average(), values.max())
        }
    }

    override fun onDraw(canvas: Canvas) {
        val slot = width.toFloat() / maxOf(LEAST_SLOTS, values.size)
        val first = width - slot * values.size
        values.forEachIndexed { i, depth ->
            paint.color = scale.bar(depth)
            val left = first + slot * i
            canvas.drawRect(left, height * (1 - depth.toFloat() / scale.loops), left + slot * BAR, height.toFloat(), paint)
        }
    }

    private companion object {
        const val LEAST_SLOTS = 60
        const val BAR = 0.85f // of a slot; the rest is a gap
    }
}
