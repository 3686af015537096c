package dev.rmseedge.demo.logic

/** The loops of the latest tokens, for a chart: the last [room] of them, the newest at the end. Any thread may use it. */
class LoopSeries(private val room: Int) {
    private val depths = ArrayDeque<Int>(room)

    val values: List<Int> get() = synchronized(depths) { depths.toList() }

    fun add(depth: Int) {
        synchronized(depths) {
            if (depths.size == room) depths.removeFirst()
            depths.addLast(depth)
        }
    }

    fun clear() = synchronized(depths) { depths.clear() }
}
