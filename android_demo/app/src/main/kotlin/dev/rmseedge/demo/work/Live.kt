package dev.rmseedge.demo.work

import android.os.Handler
import android.os.Looper
import java.util.concurrent.atomic.AtomicBoolean

/**
 * A value that any thread sets and the main thread looks at.
 *
 * However often it is set, an observer is told once per turn of the main thread, so that a model that writes faster than the screen
 * is drawn makes nobody wait.
 */
class Live<T>(initial: T) {
    private val main = Handler(Looper.getMainLooper())
    private val told = AtomicBoolean(true)
    private val observers = LinkedHashSet<(T) -> Unit>()

    @Volatile
    private var current = initial

    var value: T
        get() = current
        set(new) {
            current = new
            announce()
        }

    /** Tells the observers again: what the value holds has changed. */
    fun announce() {
        if (!told.compareAndSet(true, false)) return
        main.post {
            told.set(true)
            observers.toList().forEach { it(current) }
        }
    }

    /** Calls [observer] now and after every change, until the result is closed. On the main thread only. */
    fun observe(observer: (T) -> Unit): AutoCloseable {
        observers += observer
        observer(current)
        return AutoCloseable { observers -= observer }
    }
}
