package dev.rmseedge.core.host

import dev.rmseedge.core.model.ModelInfo

/** One call: [rows] of it, [tokens] of which hold tokens; the others are padding. */
internal data class PlannedCall(val rows: Int, val tokens: Int)

/** Up to this many rows, single calls beat a padded large one. */
private const val SINGLE_CALLS = 6

/**
 * How [count] tokens from [position] on are cut into calls.
 *
 * No call crosses a multiple of the segment, so that a segment always ends with a call. The first [prefix] tokens are in one call.
 */
internal fun planCalls(info: ModelInfo, position: Long, count: Int, prefix: Int = 0): List<PlannedCall> = buildList {
    var at = position
    var left = count
    while (left > 0) {
        var n = minOf(left, info.chunks.last())
        if (info.segment != null) n = minOf(n.toLong(), info.segment - at % info.segment).toInt()
        if (n <= SINGLE_CALLS && (isNotEmpty() || prefix < 2)) {
            repeat(n) { add(PlannedCall(1, 1)) }
        } else {
            add(PlannedCall(info.chunks.first { it >= n }, n))
        }
        at += n
        left -= n
    }
}
