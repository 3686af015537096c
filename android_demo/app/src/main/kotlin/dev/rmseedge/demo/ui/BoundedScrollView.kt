package dev.rmseedge.demo.ui

import android.content.Context
import android.util.AttributeSet
import android.widget.ScrollView

/** As high as what is in it, but leaves the rest of the screen a share of its own; beyond that it scrolls. */
class BoundedScrollView(context: Context, attributes: AttributeSet?) : ScrollView(context, attributes) {
    override fun onMeasure(widthSpec: Int, heightSpec: Int) {
        val bound = when (MeasureSpec.getMode(heightSpec)) {
            MeasureSpec.AT_MOST -> MeasureSpec.makeMeasureSpec((MeasureSpec.getSize(heightSpec) * SHARE).toInt(), MeasureSpec.AT_MOST)
            else -> heightSpec // told exactly, as beside the text, or free
        }
        super.onMeasure(widthSpec, bound)
    }

    private companion object {
        const val SHARE = 0.6f
    }
}
