package dev.rmseedge.demo.ui

import dev.rmseedge.demo.work.Live

/** One of the screen's tabs. While it is started, it shows what the workspace holds. */
abstract class Panel {
    private val observed = mutableListOf<AutoCloseable>()

    abstract fun start()

    open fun stop() {
        observed.forEach(AutoCloseable::close)
        observed.clear()
    }

    /** Calls [show] now and with every change, until the panel stops. */
    protected fun <T> Live<T>.shown(show: (T) -> Unit) {
        observed += observe(show)
    }
}
